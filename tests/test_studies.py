"""The studies' tables, from made-up rows, and the real model's script, on a small one."""

import json
import re
import sys
import types
from concurrent.futures import Future
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

import policy
from measure import bootstrap
from model import load_config
from plots import COLOURS, GREY
from studies import runs
from studies.balance import report
from studies.balance import run as balance
from studies.few_shot import report as few_shot_report
from studies.few_shot import run as few_shot
from studies.real_model import report as real_report
from studies.real_model import run as real_model
from tests.helpers import ROOT


def page_of(study: str) -> list[str]:
    return (ROOT / "docs" / "studies" / f"{study}.md").read_text().splitlines()


def committed(study: str) -> list[dict]:
    lines = (ROOT / "studies" / study / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def words_after(flags: list, name: str) -> str:
    """The last value of a flag, as the command line takes it."""
    flags = list(map(str, flags))
    return flags[len(flags) - flags[::-1].index(name)]


@pytest.fixture
def figures(monkeypatch):
    """Of each picture drawn, the figure."""
    kept, close = [], plt.close
    monkeypatch.setattr(plt, "close", kept.append)
    yield kept
    for figure in kept:
        close(figure)


# --------------------------------------------------------------------------------------------------
# What they share


def test_rows_of_a_file(tmp_path):
    """None where there is no file; they are appended."""
    file = tmp_path / "rows.jsonl"
    assert runs.rows_of(file) == []
    runs.add_rows(file, [{"a": 1}])
    runs.add_rows(file, [{"b": "2"}, {"c": None}])
    assert runs.rows_of(file) == [{"a": 1}, {"b": "2"}, {"c": None}]
    made = runs.made_with()
    assert made["torch"] == torch.__version__
    assert made["python"] == ".".join(map(str, sys.version_info[:3]))
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", made["date"])


def test_call_of_a_program(tmp_path, monkeypatch):
    """Its own command line for so long, what it prints at the log's end; a failure is said."""
    script, status = types.ModuleType("program"), [0, None, 3]

    def cli():
        print(sys.argv)
        print("to the error stream", file=sys.stderr)
        return status.pop(0)

    script.cli = cli
    readings = iter([10.0, 12.5, 20.0, 21.0, 30.0, 31.0])
    monkeypatch.setattr(runs.time, "time", lambda: next(readings))
    argv, log = sys.argv, tmp_path / "log.txt"
    assert runs.call(script, ("--a", 1, Path("b")), log) == 2.5
    assert runs.call(script, (), log) == 1.0
    with pytest.raises(RuntimeError, match="^--c: exit status 3, see .*log.txt$"):
        runs.call(script, ("--c",), log)
    assert sys.argv is argv
    lines = log.read_text().splitlines()
    assert lines[::2] == [
        "['program.py', '--a', '1', 'b']",
        "['program.py']",
        "['program.py', '--c']",
    ]
    assert lines[1::2] == ["to the error stream"] * 3


def test_runs_side_by_side(tmp_path, monkeypatch, capsys):
    """Fresh processes, so many at a time; rows are on disk before they are told; one may fail."""
    made = []

    class Here:
        def __init__(self, at_a_time, mp_context):
            made.append((at_a_time, mp_context.get_start_method()))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *args):
            future = Future()
            try:
                future.set_result(function(*args))
            except RuntimeError as e:
                future.set_exception(e)
            return future

    def make(job, folder):
        made.append((job, folder))
        if job == "broken":
            raise RuntimeError("it says why")
        return [{"job": job}, {"job": job, "second": True}]

    monkeypatch.setattr(runs, "ProcessPoolExecutor", Here)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    results = tmp_path / "results.jsonl"
    told = {}
    for job, rows in runs.make_all(make, ["a", "broken", "b"], 3, tmp_path, results):
        told[job] = rows
        assert runs.rows_of(results)[-2:] == rows
    assert made == [(3, "spawn"), *[(job, tmp_path) for job in ("a", "broken", "b")]]
    assert told == {job: [{"job": job}, {"job": job, "second": True}] for job in "ab"}
    assert len(runs.rows_of(results)) == 4
    assert runs.os.environ["OMP_NUM_THREADS"] == "1"
    assert capsys.readouterr().out.splitlines() == ["3 runs to make", "broken: it says why"]


# --------------------------------------------------------------------------------------------------
# Balance


@pytest.fixture
def cells():
    """Two conditions; 10 problems; seed 7 chooses the best constant, seeds 0 and 1 are reported."""
    right = {
        ("A", "rl", 7): 9, ("A", "sft", 7): 2, ("A", "rl", 0): 8, ("A", "rl", 1): 6,
        ("A", "sft", 0): 9, ("A", "sft", 1): 9, ("A", "gac", 0): 4, ("A", "gac", 1): 6,
        ("B", "rl", 7): 1, ("B", "sft", 7): 5, ("B", "rl", 0): 0, ("B", "sft", 0): 5,
        ("B", "gac", 0): 2,
    }  # fmt: skip
    found = report.defaultdict(dict)
    for (condition, arm, seed), count in right.items():
        samples = {"train": 100, "validation": 0}
        row = {"right": "1" * count + "0" * (10 - count), "samples": samples, "seconds": 6}
        found[condition, arm][seed] = row
    return found


def test_seeds_that_choose_are_not_reported(cells):
    assert report.seeds_of(cells, "A", "rl") == [0, 1]
    assert report.best_constant(cells, "A") == "rl"  # though sft is better with seeds 0 and 1
    assert report.best_constant(cells, "B") == "sft"
    assert report.best_constant(cells, "C") is None


def test_regret_is_of_the_same_problems(cells):
    """Best constant minus arm, of the seeds that both have; the mean over conditions."""
    differences = report.differences(cells, "A", "gac")
    assert differences == {0: [0] * 4 + [1] * 4 + [0] * 2, 1: [0] * 10}
    assert sum(report.differences(cells, "A", "sft")[1]) == -3
    groups = [differences, report.differences(cells, "B", "gac")]
    assert report.mean(groups) == pytest.approx((4 / 20 + 3 / 10) / 2)
    low, high = report.interval(groups)
    assert 0 < low < 0.25 < high < 0.6
    assert report.interval(groups) == (low, high)
    cells["A", "hpt"] = cells["A", "gac"]  # an arm of one condition alone has no mean
    assert set(report.regrets(cells, ["A", "B"])) == {"rl", "sft", "gac"}


def test_table_of_the_balance(cells, monkeypatch):
    monkeypatch.setattr(report, "CONDITIONS", ("A", "B"))
    head, _, *rows = report.table(cells)
    assert head.startswith("| arm | A, % | B, % | mean regret")
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| sft", "90.0 (2)", "50.0* (1)"],
        ["| rl", "70.0* (2)", "0.0 (1)"],
        ["| gac", "50.0 (2)", "20.0 (1)"],
    ]
    assert rows[0].split(" | ")[3].startswith("-10.0 (")
    assert rows[2].endswith("| 100, 0 | 6 |")


def test_numbers_of_the_page_of_the_balance(monkeypatch):
    """The page's table is what its script makes of results.jsonl: of the intervals two."""
    cells = report.read()
    conditions = ["A0.3", "B1", "C"]
    for arm, expected in (("amft", "18.9 to 26.7"), ("sft then rl 0.5", "-5.4 to -0.1")):
        groups = [report.differences(cells, condition, arm) for condition in conditions]
        low, high = (100 * x for x in report.interval(groups))
        assert f"{low:.1f} to {high:.1f}" == expected
    monkeypatch.setattr(report, "interval", lambda groups: (0.0, 0.0))
    found = report.table(cells)
    page = [line for line in page_of("balance") if line.startswith("|")]

    def plain(line: str) -> str:
        return re.sub(r" \(-?[\d.]+ to -?[\d.]+\)", "", line)

    assert [plain(line) for line in page] == [plain(line) for line in found]


def test_pictures_of_the_balance(cells, monkeypatch, figures, tmp_path):
    """Regret with its interval, the worst arm below, in percent, constants grey; mu of the reported
    seeds."""
    monkeypatch.setattr(report, "CONDITIONS", ("A", "B", "none"))
    of_arms = {"rl": (0.3, 0.2, 0.5), "gac": (-0.1, -0.2, 0.1), "sft": (0.1, 0.0, 0.15)}
    monkeypatch.setattr(report, "regrets", lambda cells, conditions: of_arms)
    report.draw_regret(cells, tmp_path / "a.png")
    for i, arm in enumerate(("amft", "gac", "chord")):
        for condition in "AB":
            for seed in (0, 1, 7):
                mu = [0.1 * i, 0.2, 0.01 * seed]
                cells[condition, arm][seed] = {"mu": mu, "right": "10"}
    report.draw_mu(cells, tmp_path / "b.png")
    regret, mu = figures
    (axis,) = regret.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["rl", "sft", "gac"]
    lines = axis.get_lines()
    drawn = []
    for bar, dot in (lines[0:2], lines[2:4], lines[4:6]):
        drawn.append([*dot.get_xdata(), *bar.get_xdata(), *dot.get_ydata(), *bar.get_ydata()])
        assert dot.get_color() == bar.get_color()
    expected = [[30, 20, 50, 0, 0, 0], [10, 0, 15, 1, 1, 1], [-10, -20, 10, 2, 2, 2]]
    assert [pytest.approx(row) for row in expected] == drawn
    assert [line.get_color() for line in lines[:6:2]] == [GREY, GREY, COLOURS[0]]
    assert list(lines[6].get_xdata()) == [0, 0]
    assert axis.get_xlabel().startswith("mean regret over A, B, points")
    assert [axis.get_title() for axis in mu.axes] == ["A", "B"]
    for axis in mu.axes:
        assert axis.get_ylim() == (0, 1)
        drawn = [(line.get_label(), list(line.get_ydata())) for line in axis.get_lines()]
        assert [list(ys) for _, ys in drawn] == [
            [0.0, 0.2, 0.0], [0.0, 0.2, 0.01],
            [0.1, 0.2, 0.0], [0.1, 0.2, 0.01],
            [0.2, 0.2, 0.0], [0.2, 0.2, 0.01],
        ]  # fmt: skip
        assert [label for label, _ in drawn][::2] == ["amft", "gac", "chord"]
        assert all(label.startswith("_") for label, _ in drawn[1::2])
    assert mu.axes[0].get_legend() is not None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_jobs_of_the_balance(tmp_path):
    """Seed by seed, in each the conditions, in each the arms, without those that are made."""
    results = tmp_path / "results.jsonl"
    runs.add_rows(results, [{"seed": 2, "condition": "C", "arm": "rl", "right": "1"}])
    args = balance.Args(seeds=(2, 0), conditions=("C", "A1"), arms=("rl", "sft"), results=results)
    assert list(balance.jobs_of(args)) == [
        (2, "C", "sft"), (2, "A1", "rl"), (2, "A1", "sft"),
        (0, "C", "rl"), (0, "C", "sft"), (0, "A1", "rl"), (0, "A1", "sft"),
    ]  # fmt: skip
    plan = balance.Args()
    assert plan.seeds == (0, 1, 2, 3, 4)
    assert plan.conditions == ("A0.3", "B1", "C", "A1", "D", "B0.5")
    assert len(plan.arms) == 20
    assert [arm for arm in plan.arms if arm in report.CONSTANT] == [
        "rl", "sft", "fixed 0.5", "fixed 0.25", "fixed 0.1", "fixed 0.75", "fixed 0.9"
    ]  # fmt: skip
    for arm, mu in report.CONSTANT.items():
        assert mu == {"rl": 0.0, "sft": 1.0}.get(arm) or arm == f"fixed {mu}"
    assert report.CHOICE_SEED == 7 not in plan.seeds


@pytest.fixture
def runs_of_amft(monkeypatch):
    """Command lines of runs that are not made, with two steps of metrics."""
    asked, steps = [], {"A": {"mu": 0.12345, "seconds": 3.0, "reward/mean": 0.123456}}
    steps["A"] |= {"samples/train": 64, "samples/validation": 0}
    steps["B"] = {"mu": 0.5, "seconds": 4.5, "grad_mu": -0.00123456, "reward/mean": 0.5}
    steps["B"] |= {"samples/train": 32, "samples/validation": 16}

    def call(script, flags, log):
        asked.append((script.__name__, list(map(str, flags))))
        folder = Path(words_after(flags, "--output-dir"))
        folder.mkdir()
        runs.add_rows(folder / "metrics.jsonl", steps.values())

    def solved(model, tests):
        asked.append((str(model), str(tests)))
        return "101"

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(balance, "call", call)
    monkeypatch.setattr(balance, "solved", solved)
    monkeypatch.setattr(balance.conditions, "main", asked.append)
    return asked


def test_a_run_of_the_balance(runs_of_amft, monkeypatch, tmp_path):
    """Its problems are of its seed; its row has what the run logged; its folder goes."""
    readings = iter([100.0, 107.5])
    monkeypatch.setattr(balance.time, "time", lambda: next(readings))
    (row,) = balance.make(balance.Job(3, "B1", "sft then rl 0.25"), tmp_path)
    made, (script, flags), (model, tests) = runs_of_amft
    folder = made.folder
    assert (made.seed, made.names) == (3, ("B1",))
    assert folder.parent == tmp_path
    assert not folder.exists()
    assert script == "amft"
    assert (model, tests) == (f"{folder}/run/checkpoint", f"{folder}/B1/test.jsonl")
    for flag, value in {
        "--method": "sft_then_rl", "--warmup-steps": "15", "--warmup-lr": "1e-3",
        "--data": f"{folder}/B1", "--steps": "60", "--lr": "3e-4", "--samples": "4",
        "--seed": "3", "--eval-every": "-1", "--suffix": "", "--output-dir": f"{folder}/run",
    }.items():  # fmt: skip
        assert words_after(flags, flag) == value, flag
    assert "--sft-data" not in flags
    assert row["right"] == "101"
    assert [row[name] for name in ("seed", "condition", "arm")] == [3, "B1", "sft then rl 0.25"]
    assert row["mu"] == [0.123, 0.5]
    assert row["grad_mu"] == [-0.00123]
    assert row["grad_mu_snr"] == row["grad_mu_snr_window"] == []
    assert row["reward/mean"] == [0.123, 0.5]
    assert row["samples"] == {"train": 96, "validation": 16}
    assert (row["seconds"], row["steps"], row["wall_seconds"]) == (7.5, 2, 7.5)
    assert row["torch"] == torch.__version__


def test_flags_of_the_balance(runs_of_amft, tmp_path):
    """Those of the committed rows and, of arms that were not run, of the plan; demonstrations of
    their own in D, where they are a loss of their own."""
    known = {(row["condition"], row["arm"]): row for row in committed("balance")}
    for (condition, arm), row in known.items():
        (made,) = balance.make(balance.Job(0, condition, arm), tmp_path)
        assert list(made["flags"]) == row["flags"], arm
        _, flags = runs_of_amft[-2]
        assert words_after(flags, "--steps") == str(row["steps"])
    first = ["--mu-update", "normalised", "--mu-every", "5", "--warmup-steps", "5"]
    plan = {
        "fixed 0.75": ["--method", "fixed", "--mu-init", "0.75"],
        "fixed 0.9": ["--method", "fixed", "--mu-init", "0.9"],
        "luffy": ["--method", "luffy"],
        "srft": ["--method", "srft"],
        "amft, text's sign": [*first, "--entropy-sign", "text"],
        "amft, no entropy term": [*first, "--no-entropy-term"],
        "amft, no meta-gradient": [*first, "--no-meta-gradient"],
    }
    assert plan.keys() | {arm for _, arm in known} == balance.ARMS.keys()
    for arm in balance.ARMS:
        for condition, steps in (("A1", "40"), ("B0.5", "60"), ("D", "40")):
            (made,) = balance.make(balance.Job(0, condition, arm), tmp_path)
            _, flags = runs_of_amft[-2]
            assert words_after(flags, "--steps") == steps
            with_sft = condition == "D" and arm not in ("luffy", "srft", "hpt")
            assert ("--sft-data" in flags) == with_sft
            if with_sft:
                assert words_after(flags, "--sft-data").endswith("/D-sft")
        if arm in plan:
            assert list(made["flags"]) == plan[arm]


def test_what_a_model_solves(monkeypatch, small_model, tmp_path):
    """Greedy answers of up to 96 tokens to every test problem, graded in their order."""
    _, tokenizer = load_config(str(small_model))
    problems = [("What is 1 + 2?", "3"), ("What is 2 + 2?", "4"), ("What is 3 + 2?", "5")]
    tests = tmp_path / "test.jsonl"
    runs.add_rows(tests, [{"problem": problem, "answer": answer} for problem, answer in problems])
    asked = []

    def sample(model, tokenizer, prompts, count, longest, temperature, stop):
        asked.append((tokenizer.batch_decode(prompts), count, longest, temperature, model.training))
        end = tokenizer.eos_token_id
        texts = [r"\boxed{3}", r"\boxed{5}", r"\boxed{5}"]
        return [policy.Sample([*tokenizer.encode(t), end], [], True) for t in texts]

    monkeypatch.setattr(balance, "sample", sample)
    assert balance.solved(small_model, tests) == "101"
    ((prompts, *how),) = asked
    assert how == [1, 96, 0, False]
    assert [problem in prompt for prompt, (problem, _) in zip(prompts, problems, strict=True)] == [
        True
    ] * 3


def test_what_the_balance_tells(monkeypatch, capsys, tmp_path):
    asked = []

    def make_all(make, jobs, at_a_time, folder, results):
        asked.append((make, jobs, at_a_time, folder, results))
        yield jobs[0], [{"right": "1101"}]

    monkeypatch.setattr(balance, "make_all", make_all)
    args = balance.Args((4,), ("A1",), ("gac",), 2, tmp_path / "runs", tmp_path / "results.jsonl")
    balance.main(args)
    job = balance.Job(4, "A1", "gac")
    assert asked == [(balance.make, [job], 2, args.runs, args.results)]
    assert capsys.readouterr().out == "4 A1 gac: 3 of 4\n"


# --------------------------------------------------------------------------------------------------
# The real model


def test_demonstrations_of_gsm8k():
    """Without the calculator's marks, with a box; by the hub's names of columns and by ours."""
    solution = "She has 2 + 3 = <<2+3=5>>5 eggs.\nShe sells them.\n#### 1,005"
    expected = {
        "problem": "How many?",
        "solution": "She has 2 + 3 = 5 eggs.\nShe sells them.\nThe answer is \\boxed{1,005}.",
        "answer": "1,005",
    }
    assert real_model.demonstration({"question": "How many?", "answer": solution}) == expected
    ours = {"problem": "How many?", "solution": solution, "answer": "1005"}
    assert real_model.demonstration(ours) == expected


def test_split_of_gsm8k(tmp_path, monkeypatch):
    """Disjoint, and the same whatever the order of the rows."""
    monkeypatch.setattr(real_model, "TEST_PROBLEMS", 3)
    rows = [{"question": f"q{i}", "answer": f"a.\n#### {i}"} for i in range(10)]
    real_model.write_data(rows, tmp_path / "a")
    real_model.write_data(rows[::-1], tmp_path / "b")
    texts = {}
    for name, count in (("test", 3), ("train", 7)):
        text = (tmp_path / "a" / f"{name}.jsonl").read_text()
        assert (tmp_path / "b" / f"{name}.jsonl").read_text() == text
        texts[name] = {json.loads(line)["problem"] for line in text.splitlines()}
        assert len(texts[name]) == count
    assert texts["test"].isdisjoint(texts["train"])


def test_a_run_of_the_real_model(tmp_path, monkeypatch, small_model):
    """A row for each evaluation; what is there is not made again, nor is a finished run."""
    data = tmp_path / "gsm.jsonl"
    rows = [{"question": f"{i} + 1?", "answer": f"It is it.\n#### {i + 1}"} for i in range(120)]
    data.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(real_model, "TEST_PROBLEMS", 20)
    monkeypatch.setattr(real_model, "ARMS", {"sft": ("--method", "sft", "--steps", "3")})
    same = ["--lora-r", "2", "--lr", "1e-3", "--prompts-per-step", "2", "--samples", "2"]
    same += ["--max-new-tokens", "4", "--eval-every", "2", "--eval-problems", "4"]
    monkeypatch.setattr(real_model, "SAME", (*same, "--save-every", "1"))
    flags = {"model": str(small_model), "data": data, "arms": ("sft",), "threads": 1}
    args = real_model.Args(**flags, runs=tmp_path / "runs", results=tmp_path / "results.jsonl")
    real_model.main(args)
    made = (tmp_path / "results.jsonl").read_text()
    found = [json.loads(line) for line in made.splitlines()]
    assert [row["step"] for row in found] == [0, 2, 3]
    assert [row["episodes"] for row in found] == [4] * 3
    assert found[0]["seconds"] == 0 < found[1]["seconds"] < found[2]["seconds"]
    real_model.main(args)
    assert (tmp_path / "results.jsonl").read_text() == made
    (tmp_path / "results.jsonl").unlink()  # a finished run is read again, not made again
    real_model.main(args)
    again = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["seconds"] for row in again] == [row["seconds"] for row in found]


def test_flags_of_the_real_model():
    """Those of its plan."""
    for flag, value in {
        "--lora-r": "16", "--lr": "1e-4", "--prompts-per-step": "8", "--samples": "4",
        "--max-new-tokens": "200", "--eval-every": "20", "--eval-problems": "100",
    }.items():  # fmt: skip
        assert words_after(real_model.SAME, flag) == value
    assert real_model.TEST_PROBLEMS == 400
    assert list(real_model.ARMS) == ["sft then rl", "rl", "amft"] == list(real_model.Args().arms)
    first, rl, amft = real_model.ARMS.values()
    for flags, expected in (
        (
            first,
            {"method": "sft_then_rl", "warmup-steps": "40", "warmup-lr": "3e-4", "steps": "52"},
        ),
        (rl, {"method": "rl", "steps": "12"}),
        (amft, {"method": "amft", "mu-every": "2", "warmup-steps": "2", "steps": "12"}),
    ):
        assert dict(zip(flags[::2], flags[1::2], strict=True)) == {
            f"--{name}": value for name, value in expected.items()
        }


def test_rows_of_a_run_of_the_real_model(tmp_path, monkeypatch):
    """Seconds and samples up to each evaluation; a run with a checkpoint goes on."""
    asked = []

    def call(script, flags, log):
        asked.append((script.__name__, list(map(str, flags)), log))
        folder = Path(words_after(flags, "--output-dir"))
        folder.mkdir(parents=True, exist_ok=True)
        steps = []
        for step in (1, 2, 3, 4):
            samples = {"samples/train": 10 * step, "samples/validation": step}
            steps.append({"step": step, "seconds": 2.0**step} | samples)
        tests = {"only": {"accuracy": 0.5, "episodes": 4}}
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
        evaluations = [{"step": step, "tasks": tests} for step in (0, 3, 4)]
        (folder / "evaluations.jsonl").write_text("\n".join(map(json.dumps, evaluations)))

    monkeypatch.setattr(real_model, "call", call)
    monkeypatch.setattr(real_model, "checkpoints", lambda folder: len(asked) == 1)
    args = real_model.Args(model="m", threads=3, runs=tmp_path / "runs")
    rows = real_model.make("sft then rl", args)
    real_model.make("sft then rl", args)
    assert [row["step"] for row in rows] == [0, 3, 4]
    assert [row["seconds"] for row in rows] == [0, 14.0, 30.0]
    assert [row["samples"] for row in rows] == [0, 66, 110]
    for row in rows:
        assert (row["arm"], row["threads"]) == ("sft then rl", 3)
        assert (row["accuracy"], row["episodes"]) == (0.5, 4)
        assert row["torch"] == torch.__version__
    (script, flags, _), (_, again, _) = asked
    assert script == "amft"
    assert flags[: len(real_model.ARMS["sft then rl"])] == list(real_model.ARMS["sft then rl"])
    assert words_after(flags, "--model") == "m"
    assert words_after(flags, "--data") == str(tmp_path / "runs" / "data")
    assert again == [*flags, "--resume"]


def test_rows_of_the_hub(tmp_path, monkeypatch):
    """Without a file: the test rows of GSM8K; the arms in order, but for those that are made."""
    rows = [{"question": "a?", "answer": "b\n#### 1"}, {"question": "c?", "answer": "d\n#### 2"}]
    asked = []

    def hub_tables(*name):
        asked.append(name)
        return {"test": rows, "train": []}

    def make(arm, args):
        return [{"arm": arm, "accuracy": 0.5, "step": 0}]

    monkeypatch.setattr(real_model, "hub_tables", hub_tables)
    monkeypatch.setattr(real_model, "make", make)
    threads = []
    monkeypatch.setattr(real_model.torch, "set_num_threads", threads.append)
    args = real_model.Args(runs=tmp_path / "runs", results=tmp_path / "results.jsonl", threads=3)
    runs.add_rows(args.results, [{"arm": "rl"}])
    real_model.main(args)
    assert asked == [("openai/gsm8k", "main")]
    assert threads == [3]
    assert {row["problem"] for row in runs.rows_of(tmp_path / "runs/data/test.jsonl")} == {
        "a?", "c?"
    }  # fmt: skip
    assert [row["arm"] for row in runs.rows_of(args.results)] == ["rl", "sft then rl", "amft"]


def test_numbers_of_the_page_of_the_real_model(monkeypatch, figures, tmp_path):
    """Table and picture of results.jsonl; Wilson's intervals of 9, 24 and 18 of 100."""
    monkeypatch.setattr(real_report, "ASSETS", tmp_path)
    printed = []
    monkeypatch.setattr(real_report, "print", printed.append, raising=False)
    real_report.main()
    rows = printed[0].splitlines()[2:]
    page = page_of("real_model")
    for row in rows:
        _, _, step, accuracy, tokens, cut, samples, hours, _ = row.split("|")
        hours = hours.replace("0.0", "0")
        assert "|".join(["", step, accuracy, tokens, cut, hours, ""]) in page
        assert samples == " 0 "
    assert len(rows) == 3
    ((axis,),) = [figure.axes for figure in figures]
    (line,) = axis.get_lines()
    assert list(line.get_xdata()) == [0, 20, 40]
    assert list(line.get_ydata()) == [9, 24, 18]
    assert axis.get_ylim()[0] == 0
    (band,) = axis.collections
    edges = band.get_paths()[0].vertices
    assert {round(y) for x, y in edges if x == 20} == {17, 33}
    assert (tmp_path / "real_model.png").exists()
    row = {"arm": "x", "step": 8, "accuracy": 0.5, "episodes": 4, "length": 12.6}
    row |= {"truncated": 0.256, "samples": 1234.4, "seconds": 5400}
    *_, line = real_report.table({"x": [row]})
    assert line == "| x | 8 | 50 (15 to 85) | 13 | 26% | 1,234 | 1.5 |"


# --------------------------------------------------------------------------------------------------
# Few shots: the runs


@pytest.fixture
def runs_of_fomaml(monkeypatch, tmp_path):
    """Command lines of runs that are not made, in a folder of their own."""
    asked = []
    steps = [
        {"tokens_per_second": 100.0, "seconds": 2.0, "meta/loss": 1.234567},
        {"tokens_per_second": 10.0, "seconds": 5.0, "meta/loss": 0.5},
    ]

    def call(script, flags, log):
        flags = list(map(str, flags))
        asked.append((script.__name__, flags))
        folder = Path(words_after(flags, "--output-dir"))
        folder.mkdir(exist_ok=True)
        if words_after(flags, "--eval-every") == "-1":
            if "--learn-inner-lr" in flags:
                steps[0] |= {"inner_lr/lowest": 9.0, "inner_lr/highest": 9.5}
                steps[1] |= {"inner_lr/lowest": 1.0, "inner_lr/highest": 2.0}
            (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
            return 7.0
        results = [{"mean": {"a": k}, "tasks": {"t": {"a": k}}} for k in (1, 2)]
        (folder / "evaluations.jsonl").write_text("\n".join(map(json.dumps, results)))
        return 0.5

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(few_shot, "call", call)
    monkeypatch.chdir(tmp_path)
    return asked


FOLDER = Path("runs/few_shot")


def test_flags_of_the_few_shot_study(runs_of_fomaml):
    """Those of the committed rows that were made by the script as it is."""
    known = {(row["group"], row["name"], row["seed"]): row for row in committed("few_shot")}
    jobs = few_shot.table_of("changes", (42, 43, 44)) + few_shot.table_of("ciphers", (44,))
    jobs += few_shot.axes() + few_shot.lora() + few_shot.exact()
    found = set()
    for job in jobs:
        keys = {(job.group, name, job.seed) for name in job.names()}
        if not keys <= known.keys():
            continue
        for row in few_shot.make(job, FOLDER):
            key = row["group"], row["name"], row["seed"]
            found.add(key)
            for part in ("script", "train", "measure"):
                assert row[part] == known[key][part], key
    assert len(found) == 17 + 5 + 7 + 4 + 2


def test_a_run_of_the_few_shot_study(runs_of_fomaml):
    """Training, then each measurement; of the rows the last evaluation and step count."""
    measures = (("", ("--a", "1")), (" b", ("--b", "2")))
    job = few_shot.Job("g", "a name, so", 5, ("--train", "x"), measures, script="meta_lora")
    first, second = few_shot.make(job, FOLDER)
    folder = f"{FOLDER}/g-a-name-so-5"
    trained = [
        "--steps", "120", "--train", "x", "--eval-every", "-1", "--gain-every", "0",
        "--save-every", "1000", "--keep", "1", "--seed", "5", "--output-dir", f"{folder}/trained",
    ]  # fmt: skip
    measured = [
        "--model", f"{folder}/trained/checkpoint", "--meta-gradient", "none", "--eval-every", "0",
        "--eval-tasks", "20", "--eval-problems", "20", "--eval-max-new-tokens", "12",
    ]  # fmt: skip
    end = ["--seed", "5", "--output-dir"]
    assert runs_of_fomaml == [
        ("meta_lora", trained),
        ("meta_lora", [*measured, "--a", "1", *end, f"{folder}/measured-0"]),
        ("meta_lora", [*measured, "--b", "2", *end, f"{folder}/measured-1"]),
    ]
    assert first["training"] == {
        "seconds": 7.0, "tokens": 250.0, "steps": 2, "losses": [1.2346, 0.5]
    }  # fmt: skip
    assert (first["name"], second["name"]) == ("a name, so", "a name, so b")
    assert (first["mean"], first["tasks"], first["seconds"]) == ({"a": 2}, {"t": {"a": 2}}, 0.5)
    assert first["torch"] == torch.__version__
    assert not Path(folder).exists()
    (row,) = few_shot.make(few_shot.Job("g", "n", 5, None), FOLDER)
    assert row["training"] == {}
    assert words_after(row["measure"], "--model") == "tiny"
    own = few_shot.Job("g", "n", 5, ("--learn-inner-lr", "tensor"), own=True)
    (row,) = few_shot.make(own, FOLDER)
    assert row["training"]["inner_lr"] == [1.0, 2.0]
    words = runs_of_fomaml[-1][1]
    assert words_after(words, "--output-dir") == f"{FOLDER}/g-n-5/trained"
    assert "--resume" in words
    assert "--max-length" not in words
    assert few_shot.without_length(("a", "--max-length", "64", "b")) == ("a", "b")


def test_jobs_of_the_few_shot_study():
    """Of the plan, but for what the page says was changed: searches with another seed, in half the
    steps, on rules that are trained on but not reported."""
    searches = few_shot.search()
    assert {job.seed for job in searches} == {7}
    assert [(job.name, len(job.measures)) for job in searches] == [
        ("none", 3), ("joint 1e-3", 3), ("joint 3e-3", 3), ("reptile 1.0", 1), ("reptile 0.5", 1),
        ("in_context 2e-3", 1), ("in_context 5e-4", 1),
    ]  # fmt: skip
    rules = [f"cipher-{i}" for i in range(960, 980)]
    known = {row["name"]: row for row in committed("few_shot") if row["group"] == "search"}
    for job in searches:
        for flags in (job.train, *(flags for _, flags in job.measures)):
            if flags is not None:
                at = flags.index("--heldout-subjects") + 1
                assert list(flags[at : at + 21])[:20] == rules
        if job.train is not None:
            method, value = job.name.split()
            assert 2 * int(words_after(job.train, "--steps")) == 120
            assert words_after(job.train, "--meta-gradient") == method
            rate = "--reptile-epsilon" if method == "reptile" else "--outer-lr"
            assert words_after(job.train, rate) == value
        for label, flags in job.measures:
            assert ("--no-eval-curve" in flags) == ("in_context" not in job.name)
            if label:
                assert label == f", adapted at {words_after(flags, '--inner-lr')}"
            if job.name + label in known:
                end = known[job.name + label]["measure"][-len(flags) - 2 : -2]
                assert list(flags) == end
    names = ["none", "fomaml", "joint", "reptile", "in_context", "fomaml, learned tensor"]
    names.append("fomaml, learned scalar")
    table = few_shot.table_of("ciphers", (1, 2))
    assert [(job.group, job.name, job.seed) for job in table] == [
        ("main", name, seed) for seed in (1, 2) for name in names
    ]
    assert words_after(table[6].train, "--learn-inner-lr") == "scalar"
    assert "--data" not in table[6].train
    assert few_shot.table_of("changes", (1,))[6].train[:2] == ("--data", "changes")
    names = [f"{count} rules" for count in (64, 16, 256, 4)]
    names += ["10 rows", "5 rows", "60 rows", "rate 5e-4", "rate 5e-4, learned"]
    assert [job.name for job in few_shot.axes()] == names
    *_, low, learned = few_shot.axes()
    assert (low.own, learned.own) == (True, True)
    assert low.train == ("--inner-lr", "5e-4")
    assert learned.train == ("--inner-lr", "5e-4", "--learn-inner-lr", "tensor")
    args = few_shot.Args()
    assert args.groups == ("search", "main", "changes", "axes", "lora", "exact")
    assert args.seeds == (42, 43, 44)


def test_what_the_few_shot_study_makes(monkeypatch, capsys, tmp_path):
    """What is not in the results yet; a run of two measurements is made whole; --only chooses."""
    asked = []

    def make_all(make, jobs, at_a_time, folder, results):
        assert (make, at_a_time, folder) == (few_shot.make, 2, tmp_path / "runs")
        asked.append([(job.group, job.name, job.seed) for job in jobs])
        row = {"group": "g", "name": "n", "seed": 1, "mean": {"a": 0.12345}, "training": {}}
        yield jobs[0], [row, row | {"training": {"seconds": 6.6}}]

    monkeypatch.setattr(few_shot, "make_all", make_all)
    results = tmp_path / "results.jsonl"
    done = [("main", "none", 1), ("main", "joint", 1), ("lora", "joint", 42), ("main", "fomaml", 2)]
    done += [("main", "joint", 2), ("main", "joint, adapted at 5e-3", 2)]
    runs.add_rows(results, [dict(zip(("group", "name", "seed"), k, strict=True)) for k in done])
    common = {"jobs": 2, "runs": tmp_path / "runs", "results": results}
    few_shot.main(few_shot.Args(("lora", "main"), (1, 2), **common))
    few_shot.main(few_shot.Args(("changes", "exact"), (9,), only=("maml, sgd", "joint"), **common))
    few_shot.main(few_shot.Args(("axes", "search"), only=("4 rows", "5 rows", "none"), **common))
    names = ["none", "fomaml", "joint", "reptile", "in_context", "fomaml, learned tensor"]
    names.append("fomaml, learned scalar")
    expected = [("lora", name, 42) for name in ("fomaml", "reptile", "none")]
    expected += [("main", name, 1) for name in names if name != "none"]
    expected += [("main", name, 2) for name in names if name not in ("fomaml", "joint")]
    assert asked == [
        expected,
        [("changes", "joint", 9), ("exact", "maml, sgd", 42)],
        [("axes", "5 rows", 42), ("search", "none", 7)],
    ]
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["g/n/1: {'a': 0.123} 0 s", "g/n/1: {'a': 0.123} 7 s"]


# --------------------------------------------------------------------------------------------------
# Few shots: tables and pictures


def test_numbers_of_the_page_of_few_shots(monkeypatch, capsys, tmp_path):
    """Those of the page's tables are what its script makes of results.jsonl."""
    drawn = []
    for name in ("steps", "training", "axes"):
        monkeypatch.setattr(
            few_shot_report, f"draw_{name}", lambda groups, out: drawn.append(out.name)
        )
    few_shot_report.main()
    assert drawn == [f"few_shot_{name}.png" for name in ("steps", "training", "axes")]
    text = capsys.readouterr().out
    page = page_of("few_shot")
    sections = dict(re.findall(r"\n(\w+)\n\n(\|.+?)(?=\n\n\w+\n\n|\Z)", text, re.S))
    assert list(sections) == ["main", "changes", "axes", "lora", "exact", "first", "search"]
    for group in ("main", "changes"):
        lines = [line for line in sections[group].splitlines() if line]
        assert len(lines) == 2 + 6 + 2 + 3
        assert "\n".join(lines[:8]) in "\n".join(page)
        assert "\n".join(lines[8:]) in "\n".join(page)
    for group, count in (("axes", 7), ("lora", 4), ("exact", 2)):
        rows = sections[group].splitlines()[2:]
        assert len(rows) == count
        for row in rows:
            cells = row.split(" | ")
            tail = " | ".join(["", *cells[2:4], *cells[5:]])
            assert any(line.endswith(tail) for line in page), row


@pytest.fixture
def groups():
    """A row of two rules for each of two seeds: after so many steps 10, 20, ... percent."""

    def row(seed, base, **more):
        tasks = {}
        for i, rule in enumerate(("x", "y")):
            steps = [{"accuracy": base + 0.1 * i + 0.2 * k} for k in range(3)]
            tasks[rule] = {"steps": steps, "accuracy_before": base, "accuracy_in_context": base / 2}
            tasks[rule]["accuracy_after"] = steps[-1]["accuracy"]
        training = {"losses": [1.0 + seed, 0.5, 0.25], "tokens": 1000.0 * seed, "seconds": seed}
        found = {"seed": seed, "tasks": tasks, "training": training} | more
        return found | {"mean": {"accuracy_in_context": 0.0}}

    made = few_shot_report.defaultdict(lambda: few_shot_report.defaultdict(list))
    made["main"] |= {"fomaml": [row(42, 0.2), row(43, 0.3)], "none": [row(42, 0.0, training={})]}
    made["main"] |= {"joint": [row(43, 0.1)], "in_context": [row(42, 0.4)]}
    made["changes"] |= {"fomaml": [row(42, 0.5)]}
    made["axes"] |= {"16 rules": [row(42, 0.1)], "64 rules": [row(42, 0.4)], "5 rows": [row(42, 0)]}
    return made


def test_arms_of_few_shots(groups):
    """In percent; paired by seed and rule; a curve over all rules of all seeds."""
    rows = groups["main"]["fomaml"]
    after = [60.0, 70.0, 70.0, 80.0]
    assert few_shot_report.values(rows, "accuracy_after") == pytest.approx(after)
    assert few_shot_report.curve(rows) == pytest.approx([30, 50, 70])
    assert few_shot_report.prompted(rows) == pytest.approx(12.5)
    low, high = bootstrap(after)
    assert few_shot_report.with_interval(after) == f"70.0 ({low:.1f} to {high:.1f})"
    line = few_shot_report.arm_line("label", rows)
    assert line.startswith("| label | 42, 43 | 25.0 | 70.0 (")
    assert line.endswith("| 42k | 42 |")
    assert few_shot_report.arm_line("label", rows[::-1]).startswith("| label | 42, 43 |")
    assert few_shot_report.arm_line("n", groups["main"]["none"]).endswith("| - | - |")
    del rows[0]["mean"]["accuracy_in_context"]
    assert few_shot_report.arm_line("label", rows).endswith("| - | 42k | 42 |")
    difference = few_shot_report.difference(groups, "main", "joint", "fomaml")
    assert difference == "| FOMAML - joint training | 20.0 (20.0 to 20.0) |"  # seed 43 alone
    assert few_shot_report.difference(groups, "main", "joint", "none") == ""


def test_pictures_of_few_shots(groups, figures, tmp_path):
    few_shot_report.draw_steps(groups, tmp_path / "a.png")
    groups["first"]["fomaml, inner 5e-3, outer 1e-3"] = [groups["main"]["joint"][0]]
    few_shot_report.draw_training(groups, tmp_path / "b.png")
    few_shot_report.draw_axes(groups, tmp_path / "c.png")
    steps, training, axes = figures
    labels = ["no training", "joint training", "FOMAML", "trained in context"]
    labels.append("no training, rows in the prompt")
    left, right = steps.axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in left.get_lines()}
    assert list(drawn) == labels
    assert drawn["FOMAML"] == pytest.approx([30, 50, 70])
    assert drawn["trained in context"] == pytest.approx([20, 20])
    assert drawn["no training, rows in the prompt"] == [0, 0]
    assert [line.get_label() for line in right.get_lines()] == ["FOMAML"]
    assert right.get_lines()[0].get_color() == left.get_lines()[2].get_color()  # of all arms
    assert "cipher" in left.get_xlabel()
    assert "change" in right.get_xlabel()
    (axis,) = training.axes
    drawn = {line.get_label(): line for line in axis.get_lines()}
    assert list(drawn["joint training"].get_xdata()) == [1, 2, 3]
    for label in ("FOMAML", "trained in context", "FOMAML at an inner rate of 5e-3"):
        assert label in drawn
    assert "no training" not in drawn
    # Two of six tokens are digits, one of ten each: log(10) / 3
    assert drawn["chance"].get_ydata()[0] == pytest.approx(0.76753, abs=1e-5)
    of_rules, of_rows = axes.axes
    for axis, xs, ys in ((of_rules, [16, 64, 980], [55, 85, 65]), (of_rows, [5, 30], [45, 65])):
        line, *bars = axis.get_lines()
        assert list(line.get_xdata()) == xs
        assert list(line.get_ydata()) == pytest.approx(ys)  # of the whole, seed 42 alone
        assert [list(bar.get_xdata()) for bar in bars] == [[x, x] for x in xs]
        for bar, y in zip(bars, ys, strict=True):
            assert list(bar.get_ydata()) == pytest.approx([y - 5, y + 5])
        assert [tick.get_text() for tick in axis.get_xticklabels()] == list(map(str, xs))
    assert "ciphers" in of_rules.get_xlabel()
    assert "rows" in of_rows.get_xlabel()
