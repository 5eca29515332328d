"""eval.py and plots.py where something is wrong: folders, damaged files, forms of choices, models
with few positions, interruptions, full disks."""

import dataclasses
import errno
import importlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import plots
from data import DataError, Encoded, Example, Task
from model import World, load_config
from tests.helpers import ROOT, command, run_here

evaluation = importlib.import_module("eval")  # not the built-in function

TWO_PROBLEMS = ["--limit", "2", "--max-length", "8", "--temperature", "0"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder, for the default --output-dir."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *args) -> str:
    """The one line with which a command line ends in status 2."""
    assert run_here(evaluation, *args) == 2, args
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def refused_last(capsys, *args) -> str:
    """As refused, where a progress bar may stand before the line."""
    assert run_here(evaluation, *args) == 2, args
    return capsys.readouterr().err.splitlines()[-1]


def small_gpt2(folder: Path, places: int) -> Path:
    """Fills a folder with a random GPT-2, whose positions are a table, and the embedded
    tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    _, tokenizer = load_config("tiny")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer) + 8,
        n_positions=places,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------
# The output folder


def test_default_folder_is_numbered(here, small_model, capsys):
    """Same settings continue, others get a number; a folder that is named is refused."""
    ask = ["--model", small_model, *TWO_PROBLEMS]
    assert run_here(evaluation, *ask) == 0
    assert run_here(evaluation, *ask, "--seed", "1") == 0
    assert run_here(evaluation, *ask) == 0
    assert run_here(evaluation, *ask, "--seed", "1", "--batch-size", "1") == 0
    assert sorted(p.name for p in (here / "evals").iterdir()) == ["run", "run-2"]
    for name, seed in (("run", 42), ("run-2", 1)):
        folder = here / "evals" / name
        assert json.loads((folder / "args.json").read_text())["seed"] == seed
        assert len((folder / "responses-0.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    named = ["--output-dir", "evals/run-2"]
    error = refused(capsys, *ask, *named)
    assert "holds results of other settings (seed): choose another --output-dir" in error
    (here / "evals" / "run-2" / "args.json").write_text('{"mod')
    assert "a damaged args.json" in refused(capsys, *ask, "--seed", "1", *named)
    assert "must name a folder" in refused(capsys, *ask, "--output-dir", "")


def test_failed_call_leaves_nothing(here, small_model, capsys, monkeypatch):
    """Neither before the folder is claimed nor after, as when the weights are cut off."""
    refused(capsys, "--benchmark", "mine", "--data", "/no/such.jsonl")
    cut = here / "cut"
    cut.mkdir()
    for file in small_model.iterdir():
        size = 1000 if file.suffix == ".safetensors" else None
        (cut / file.name).write_bytes(file.read_bytes()[:size])
    assert "cannot load the weights" in refused_last(capsys, "--model", cut, *TWO_PROBLEMS)
    assert not list((here / "evals").iterdir())
    assert run_here(evaluation, "--model", small_model, *TWO_PROBLEMS) == 0
    # What is there stays
    (here / "evals" / "run" / "results.json").unlink()
    before = (here / "evals" / "run" / "responses-0.jsonl").read_text()

    def fail(*_):
        raise OSError("no results for you")

    monkeypatch.setattr(evaluation, "summarise", fail)
    assert "no results" in refused_last(capsys, "--model", small_model, *TWO_PROBLEMS)
    assert (here / "evals" / "run" / "responses-0.jsonl").read_text() == before


def test_broken_lines(tmp_path):
    """Half a line that ends in a brace is dropped, wherever it stands; the next goes to a line of
    its own."""
    file = tmp_path / "responses-0.jsonl"
    rows = [{"model": "m", "id": f"b/{i}", "sample": 0, "response": r"\boxed{é}"} for i in range(3)]
    lines = [json.dumps(row) for row in rows]
    half = lines[1][: lines[1].index("}") + 1]
    assert half.endswith("}")
    file.write_bytes("\n".join([lines[0], half, lines[2], half]).encode() + b"\xc3")
    assert evaluation.written(tmp_path, "m") == {("b/0", 0): rows[0], ("b/2", 0): rows[2]}
    with evaluation.append_to(file) as f:
        evaluation.write_rows(f, [rows[1]])
    assert evaluation.written(tmp_path, "m")["b/1", 0] == rows[1]
    assert len(evaluation.written(tmp_path, "m")) == 3
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mean": {"a": 1}}\n{"step": 2, "b": {}')
    assert plots.read(tmp_path, "metrics.jsonl") == [{"step": 1, "mean": {"a": 1}}]


# --------------------------------------------------------------------------------------------------
# Benchmarks


@pytest.mark.parametrize(
    "answer,choices,letter",
    [
        (0, ["0", "4", "2", "6"], "A"),  # MMLU: a number is a place, whatever the texts
        (1, ["0", "4", "2", "6"], "B"),
        ("C", ["0", "4", "2", "6"], "C"),
        ("(d)", ["0", "4", "2", "6"], "D"),
        ("Paris", ["Rome", "Paris"], "B"),
        (["Paris"], ["Rome", "Paris"], "B"),
        ("1", ["Rome", "Paris"], "B"),
        (1.0, ["Rome", "Paris"], "B"),
        (15, [12, 15, 20], "B"),
        ("2", {"text": ["x", "y"], "label": ["1", "2"]}, "B"),
    ],
)
def test_forms_of_choices(answer, choices, letter):
    row = {"question": "Which?", "choices": choices, "answer": answer}
    problem = evaluation._problem(row, "file, row 1")
    assert problem.answer == letter
    right = problem.choices["ABCD".index(letter)]
    assert evaluation.judge(rf"\boxed{{{letter}}}", problem)
    assert evaluation.judge(rf"\boxed{{{right}}}", problem)
    other = "B" if letter == "A" else "A"
    assert not evaluation.judge(rf"\boxed{{{other}}}", problem)


GPQA = {"Question": "Which?", "Correct Answer": "x", "Incorrect Answer 1": "a"}


@pytest.mark.parametrize(
    "row,message",
    [
        ({"question": "Which?", "choices": ["x", "y"], "answer": 2}, "answer 2 is none of the 2"),
        ({"question": "Which?", "choices": ["x", "y"], "answer": "z"}, "answer 'z' is none"),
        ({"question": "Which?", "choices": ["x", "x"], "answer": "x"}, "read as several"),
        ({"question": "Which?", "choices": ["1", "2"], "answer": "1"}, "read as several"),
        ({"question": "Which?", "choices": ["x"], "answer": "A"}, "1 choices"),
        ({"question": "Which?", "choices": "A) x B) y", "answer": "A"}, "a list of texts"),
        ({"question": "Which?", "choices": [{"text": "x"}, {}], "answer": "A"}, "a list of texts"),
        ({"question": "Which?", "choices": {"text": ["x", "y"]}, "answer": "A"}, "a list of texts"),
        (GPQA, "a list of texts"),
        ({"question": "Prove it.", "answer": "proof"}, "needs problem (or question) and answer"),
        ({"question": "What?", "answer": float("nan")}, "needs problem (or question) and answer"),
        ({"question": "What?", "answer": [None]}, "needs problem (or question) and answer"),
        ({"question": ["What?"], "answer": "1"}, "found question, answer"),
    ],
)
def test_rows_that_cannot_be_judged(tmp_path, row, message):
    """One line with file and row, before anything is generated."""
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": "1"}) + "\n" + json.dumps(row))
    with pytest.raises(DataError) as error:
        evaluation.load_benchmark("mine", str(file), 0)
    assert str(error.value).startswith(f"{file}, row 2: ")
    assert message in str(error.value)


def test_limit_is_even(tmp_path):
    """--limit takes problems over the whole file, and of a study test rows of all levels."""
    assert evaluation.evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evaluation.evenly(range(3), 5) == evaluation.evenly(range(3), 0) == [0, 1, 2]
    rows = [{"question": f"{i}?", "answer": i} for i in range(100)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = evaluation.load_benchmark("b", str(tmp_path / "b.jsonl"), 4)
    assert [problem.answer for problem in problems] == ["0", "25", "50", "75"]


def test_prompt_over_the_positions(tmp_path, capsys):
    """A prompt that fills the model counts as wrong, and that is said; the others are cut to the
    room there is."""
    model = small_gpt2(tmp_path / "model", 32)
    rows = [{"problem": "1 + 1", "answer": "2"}, {"problem": "1 + " * 40 + "1", "answer": "41"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ask = ["--model", model, "--benchmark", "b", "--data", tmp_path / "b.jsonl", "--suffix", ""]
    assert run_here(evaluation, *ask, "--output-dir", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "1 responses count as wrong, as the prompt alone fills the model's positions" in output
    written = evaluation.written(tmp_path / "out", str(model))
    assert 1 <= written["b/0", 0]["tokens"] < 32
    assert written["b/1", 0]["tokens"] == 0
    assert written["b/1", 0]["right"] is False
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["benchmarks"][str(model)]["b"]["too_long"] == 1


def test_games_over_the_positions(tmp_path, capsys):
    model = small_gpt2(tmp_path / "model", 48)
    ask = ["--model", model, "--benchmark", "general_points", "--compact", "--limit", "1"]
    error = refused_last(capsys, *ask, "--output-dir", tmp_path / "out")
    assert "needs more than the 48 positions" in error
    assert not (tmp_path / "out").exists()


def test_overlap_with_odd_files(tmp_path, capsys):
    """--check-overlap finds a problem in plain rows and in conversations, and says where a file has
    no problems."""
    problems = [evaluation.Problem("b/0", "What is  1 + 1?", "2")]
    file = tmp_path / "t.jsonl"
    chat = [{"role": "user", "content": "what is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    world = World(torch.device("cpu"))
    for row in (
        {"problem": "What is 1 + 1?"},
        {"prompt": "What is 1 + 1?", "response": "2"},
        {"messages": chat},
    ):
        file.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps(row))
        evaluation.warn_of_overlap(str(file), problems, world)
        assert "contains 1 of the 1 problems (b/0 ...)" in capsys.readouterr().out, row
    for row in (5, {"text": "x"}, {"prompt": [1, 2]}, {"prompt": {}}):
        file.write_text(json.dumps(row))
        with pytest.raises(DataError):
            evaluation.warn_of_overlap(str(file), problems, world)


# --------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--model", "--model: name at least one"),
        ("--benchmark", "--benchmark: name at least one"),
        ("--adapter x", "--adapter is for the few-shot study"),
        ("--few-shot 2 --adapter /no/such", "cannot load the adapter /no/such"),
        ("--few-shot 2 --tasks Topology", "no such task; there are"),
        ("--few-shot 999", "--few-shot 999 needs 999 and 1"),
        ("--few-shot 2 --adapt-lr nan", "--adapt-lr must be in (0, 100]"),
        ("--limit -1", "--limit must be 0 or more"),
        ("--temperature 1e-30", "--temperature is 0 (greedy) or at least 0.01"),
        ("--check-overlap /no/such.jsonl", "cannot read"),
    ],
)
def test_flags(here, capsys, flags, message):
    assert message in refused(capsys, *flags.split())
    assert not list(here.glob("evals/*"))


def test_every_number_is_checked():
    fields = dataclasses.fields(evaluation.Args)
    numeric = {f.name for f in fields if f.type in (int, float, tuple[int, ...])}
    assert len(numeric) == 12
    checked = [name for names in evaluation.NUMBERS.values() for name in names]
    assert sorted(checked) == sorted(numeric)


def test_adapter_needs_peft(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "peft" else find(name)
    )
    assert "pip install peft" in refused(capsys, "--few-shot", "2", "--adapter", "x")


# --------------------------------------------------------------------------------------------------
# The few-shot study


def test_study_rows(monkeypatch):
    """Rows that fit into every model, test rows evenly; a model with fewer positions decides."""
    _, tokenizer = load_config("tiny")

    def examples(part: str, count: int, length: int) -> list[Example]:
        return [
            Example("1 + " * length + "1", "x", "", "S", i, f"{part}/{i}") for i in range(count)
        ]

    short, long = examples("short", 6, 1), examples("long", 3, 60)
    task = Task("t", support=short[:3] + long, query=[], test=short[3:] * 4)
    monkeypatch.setattr(evaluation, "load_tasks", lambda *_, **__: [task])
    readers = {}
    for name, places in (("a", 2048), ("b", 70)):
        text = SimpleNamespace(max_position_embeddings=places)
        config = SimpleNamespace(get_text_config=lambda text=text: text)
        readers[name] = (config, tokenizer)
    args = evaluation.Args(few_shot=(2,), limit=4)
    world = World(torch.device("cpu"))
    study = evaluation.load_study(args, readers, world)
    assert study.tasks[0].support == short[:3]
    assert [e.id for e in study.tasks[0].test] == ["short/3"] * 4
    assert max(len(row.ids) for row in study.tokens["b"].values()) <= 64
    assert study.tokens["a"].keys() > study.tokens["b"].keys()
    with pytest.raises(DataError, match="3 support and 12 test rows of at most 64 tokens"):
        evaluation.load_study(dataclasses.replace(args, few_shot=(4,)), readers, world)
    study = evaluation.load_study(args, {"a": readers["a"]}, world)
    assert study.tasks[0].support == short[:3] + long
    new = dataclasses.replace(task, name="new", heldout=True)
    monkeypatch.setattr(evaluation, "load_tasks", lambda *_, **__: [task, new])
    study = evaluation.load_study(args, readers, world)
    assert [t.name for t in study.tasks] == ["new"]  # where some are held out, these


def test_study_judges_words(tmp_path, monkeypatch):
    """A few positions are no IndexError; where no answer is known the response's words count."""
    model = small_gpt2(tmp_path / "model", 96)
    rows = [Example(f"Say {i}", "a b", "", "S", 1, f"{i}") for i in range(5)]
    task = Task("t", support=rows[:3], query=[], test=rows[3:])
    monkeypatch.setattr(evaluation, "load_tasks", lambda *_, **__: [task])
    monkeypatch.setattr(evaluation, "greedy_answers", lambda *_: ["a  b", "a c"])
    args = evaluation.Args(
        model=(str(model),), few_shot=(0, 2), seeds=1, adapt_steps=2, output_dir=str(tmp_path / "o")
    )
    assert evaluation.main(args) == 0
    report = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [row["right"] for row in report["few_shot"]] == [[True, False]] * 2


def test_every_step_of_the_study_has_a_whole_batch(monkeypatch):
    """Five examples in batches of three: a batch may begin one pass and end another."""
    model, batches = torch.nn.Linear(1, 1), []

    def loss(model, rows, pad_id):
        batches.append(rows)
        return sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(evaluation, "response_loss", loss)
    rows = [Encoded([i, i], 1) for i in range(5)]
    args = evaluation.Args(adapt_steps=10, adapt_batch=3)
    assert list(evaluation.adapt(args, model, rows, 0, seed=0)) == list(range(11))
    assert [len(batch) for batch in batches] == [3] * 10
    taken = list(itertools.chain(*batches))
    assert [taken.count(row) for row in rows] == [6] * 5


def test_study_with_few_positions(tmp_path, small_model):
    """Adaptation and greedy answers stay within a table of 96 positions; models with other numbers
    of positions are compared on the same rows."""
    model = small_gpt2(tmp_path / "model", 96)
    args = evaluation.Args(
        model=(str(model), str(small_model)),
        few_shot=(2,),
        seeds=1,
        limit=2,
        adapt_steps=1,
        tasks=("Geometry/missing_side",),
        output_dir=str(tmp_path / "o"),
    )
    assert evaluation.main(args) == 0
    report = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [len(row["right"]) for row in report["few_shot"]] == [2, 2]
    assert report["pairs"][0]["task"] == "all"


# --------------------------------------------------------------------------------------------------
# Interruptions, full disks


def test_interrupt(tmp_path, small_model):
    """Ctrl-C while the imports run and while responses come: no traceback, status 130, what was
    written stays."""
    ask = ["--model", small_model, "--limit", "200", "--batch-size", "1", "--max-length", "60"]
    arguments = command("eval.py", *ask, "--temperature", "1", "--output-dir", tmp_path / "o")

    def interrupted(ready) -> tuple[int, str]:
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 60
        while not ready() and time.time() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        assert "Traceback" not in error
        return process.returncode, error

    soon = time.time() + 0.7
    assert interrupted(lambda: time.time() > soon)[0] in (-signal.SIGINT, 130)
    assert not (tmp_path / "o").exists()
    responses = tmp_path / "o" / "responses-0.jsonl"
    status, error = interrupted(lambda: responses.exists() and responses.stat().st_size > 0)
    assert status == 130
    assert "interrupted; responses so far are kept" in error.splitlines()[-1]
    assert 0 < len(evaluation.written(tmp_path / "o", str(small_model))) < 200


def test_ascii_locale(tmp_path, small_model):
    """Tables with a plus-minus sign, where neither files nor the terminal are UTF-8 by default."""
    ask = ["--model", small_model, "--few-shot", "0", "--tasks", "Geometry/missing_side"]
    done = subprocess.run(
        command("eval.py", *ask, *TWO_PROBLEMS, "--output-dir", tmp_path),
        cwd=ROOT,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "±" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_full_disk(tmp_path, small_model, capsys, monkeypatch):
    """One line that says what to do; responses stay, and the same command ends the work."""
    ask = ["--model", small_model, "--batch-size", "1", *TWO_PROBLEMS, "--output-dir", tmp_path]
    write, calls = evaluation.write_rows, []

    def write_once(f, rows) -> None:
        calls.append(rows)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(f, rows)

    monkeypatch.setattr(evaluation, "write_rows", write_once)
    error = refused_last(capsys, *ask)
    assert "No space left on device; responses so far are kept: make room" in error
    assert len(evaluation.written(tmp_path, str(small_model))) == 1
    monkeypatch.setattr(evaluation, "write_rows", write)
    assert run_here(evaluation, *ask) == 0
    assert len((tmp_path / "responses-0.jsonl").read_text().splitlines()) == 2


# --------------------------------------------------------------------------------------------------
# Pictures


RUN = [{"step": i, "meta/loss": 1.0 / (i + 1)} for i in range(4)]


@pytest.mark.parametrize(
    "files,flags,message",
    [
        ({"metrics.jsonl": RUN}, ["--out", "/proc/x.png"], "/proc/x.png"),
        ({"metrics.jsonl": RUN}, ["--out", "x.xyz"], "x.xyz: the ending must be one of"),
        ({"metrics.jsonl": RUN}, ["--out", "x"], "x: the ending must be one of"),
        ({"metrics.jsonl": RUN}, ["--labels", "a", "b"], "--labels: 2 names for 1 folders"),
        ({"metrics.jsonl": [5]}, [], "cannot draw"),
        ({"metrics.jsonl": [{"meta/loss": 1}]}, [], "cannot draw"),
        ({"metrics.jsonl": RUN, "evaluations.jsonl": [{"step": 1}]}, [], "cannot draw"),
        ({"metrics.jsonl": []}, [], "neither metrics.jsonl nor results.json"),
        ({"results.json": [{"args": {}}]}, [], "nothing to draw"),
        ({"results.json": [{"benchmarks": 5}]}, [], "cannot draw"),
        ({"results.json": []}, [], "cannot read"),
    ],
)
def test_pictures_that_cannot_be_drawn(here, capsys, files, flags, message):
    folder = here / "run"
    folder.mkdir()
    for name, rows in files.items():
        (folder / name).write_text("\n".join(map(json.dumps, rows)))
    assert run_here(plots, folder, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(here.glob("*.png"))


def test_bars_show_the_interval():
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots()
    summary = {"accuracy": 0.5, "interval": [0.4, 0.7]}
    plots.draw_benchmarks({"m": {"b": summary}}, axis)
    (bars,) = (c for c in axis.containers if hasattr(c, "errorbar"))
    (bar,) = bars
    assert bar.get_height() == 50
    (segment,) = bars.errorbar.lines[2][0].get_segments()
    assert segment[:, 1].tolist() == pytest.approx([40, 70])
    plt.close(fig)


def drawn(draw, *args) -> list[list[list[float]]]:
    """[x, y] of the lines that a panel draws."""
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots()
    draw(*args, axis)
    lines = [[list(line.get_xdata()), list(line.get_ydata())] for line in axis.get_lines()]
    plt.close(fig)
    return lines


def test_lines_of_panels():
    """Smoothing over a centred window; the mean of seeds; summed changes of mu; a test set."""
    assert plots.smooth([0.0, 3.0, 6.0, 0.0], 3) == [1.5, 3.0, 3.0, 3.0]
    assert plots.smooth([1.0, 5.0], 1) == [1.0, 5.0]
    first = [{"step": 1, "mu": 0.5, "mu_change/entropy": 0.1}, {"step": 2, "mu": 0.6}]
    first.append({"step": 3, "mu": 0.7, "mu_change/entropy": 0.2})
    second = [{"step": step, "mu": 0.8} for step in (1, 2, 3)]
    tasks = [{"step": 0, "tasks": {"test": {"accuracy": 0.25}}}]
    setting = plots.Setting("a", "#000000", [first, second], [tasks, tasks])
    (line,) = drawn(plots.draw_metric, [setting], "mu", 0)
    assert line == [[1, 2, 3], pytest.approx([0.65, 0.7, 0.75])]
    changes = drawn(plots.draw_mu_changes, setting)
    assert changes[-1] == [[1, 2, 3], pytest.approx([0.1, 0.1, 0.3])]
    (line,) = drawn(plots.draw_test_sets, [setting], ["test"])
    assert line == [[0], [25.0]]


def test_curves_are_of_the_most_examples():
    rows = []
    for shots, low in ((8, 1.0), (2, 4.0), (8, 2.0)):
        rows.append({"shots": shots, "curve": {"0": low + 4, "10": low, "2": low + 1}})
    (line,) = drawn(plots.draw_curves, {"m": rows})
    assert line[1] == [5.5, 2.5, 1.5]  # steps 0, 2, 10


def test_gains_are_what_adaptation_lowers():
    import matplotlib.pyplot as plt

    rows = []
    for step, after in ((0, 2.5), (9, 1.25)):
        rows.append({"step": step, "tasks": {"t": {"loss_before": 2.0, "loss_after": after}}})
    fig, axis = plt.subplots()
    plots.draw_gains([plots.Setting("a", "#000000", [[]], [rows])], axis)
    assert [bar.get_width() for bar in axis.patches] == [-0.5, 0.75]  # before, after training
    plt.close(fig)


def test_seeds_of_a_setting_are_one_line(tmp_path):
    runs = []
    for i, (seed, lr) in enumerate(((1, 0.1), (2, 0.1), (1, 0.2))):
        run = tmp_path / f"r{i}"
        run.mkdir()
        args = {"seed": seed, "lr": lr, "output_dir": str(run), "resume": i == 1}
        (run / "args.json").write_text(json.dumps({"args": args}))
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, RUN)))
        runs.append(run)
    settings = plots.settings_of(runs, {})
    assert [(s.label, len(s.metrics)) for s in settings] == [("r0", 2), ("r2", 1)]


def test_picture(here, capsys):
    (here / "run").mkdir()
    lines = "\n".join(map(json.dumps, RUN))
    (here / "run" / "metrics.jsonl").write_text(lines + '\n{"step": 9, "meta/loss": {}')
    assert run_here(plots, "run", "--out", "new/x.svg") == 0
    assert capsys.readouterr().out == "new/x.svg\n"
    assert (here / "new" / "x.svg").stat().st_size > 1000
