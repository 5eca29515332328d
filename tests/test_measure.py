"""measure.py and eval.py: statistics against known values; benchmarks that are cut and go on; the
few-shot study."""

import importlib
import itertools
import json
import random
import subprocess
import types

import pytest
import torch

import measure
from games import games_of
from games.play import Trajectory, Turn
from model import World, load_weights
from tests.helpers import (
    ROOT,
    assert_same_weights,
    command,
    run_here,
    run_well,
    wait_for_lines,
)

evaluation = importlib.import_module("eval")  # not the built-in function


def test_statistics():
    """pass@k against all subsets, the bootstrap's coverage on simulated data, Wilson's and
    McNemar's known values."""
    for n, right, k in ((5, 2, 3), (6, 0, 2), (6, 5, 4), (8, 3, 1)):
        outcomes = [True] * right + [False] * (n - right)
        solved = [any(subset) for subset in itertools.combinations(outcomes, k)]
        expected = sum(solved) / len(solved)
        assert measure.pass_at_k(n, right, k) == pytest.approx(expected), (n, right, k)
    rng, covered = random.Random(0), 0
    for i in range(200):
        values = [rng.random() < 0.3 for _ in range(150)]
        low, high = measure.bootstrap(values, seed=i, draws=400)
        covered += low <= 0.3 <= high
    assert covered / 200 == pytest.approx(0.94, abs=0.05)  # of 95%
    assert measure.mcnemar(1, 8) == pytest.approx(0.0390625)
    assert measure.mcnemar(3, 3) == 1.0
    assert measure.mcnemar(0, 0) == 1.0
    assert measure.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert measure.wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)


def turn(reward: float, length: int, finished: bool = True) -> Turn:
    return Turn([1], [2] * length, [0.0] * length, finished, "", reward)


# Of two prompts two samples each: a win at the second turn, a loss that is cut, two equal wins
EPISODES = [
    [
        Trajectory([turn(-1.5, 3), turn(5.0, 4)], won=True),
        Trajectory([turn(-1.0, 8, False)]),
    ],
    [Trajectory([turn(5.0, 2)], won=True), Trajectory([turn(5.0, 3)], won=True)],
]


def test_rates_of_episodes(process_group):
    """Per episode and per turn, by hand: 4 episodes of 5 turns, 20 tokens."""
    world = World(torch.device("cpu"))
    asked = []

    def play(game, seeds, samples, key, temperature):
        asked.append((list(seeds), samples, temperature))
        return [[trajectory] for group in EPISODES for trajectory in group]

    game = types.SimpleNamespace(misread_reward=-1.5)
    stop = types.SimpleNamespace(agreed=lambda: False)
    found = measure.play_tests(play, {"cards": (game, 4)}, world, stop)
    assert asked == [([0, 1, 2, 3], 1, 0.0)]
    assert found["cards"] == pytest.approx(
        {
            "accuracy": 3 / 4,
            "step_accuracy": 3 / 5,
            "reward": 12.5 / 4,
            "length": 20 / 5,
            "truncated": 1 / 5,
            "episodes": 4,
            "recognition": 4 / 5,
        }
    )
    returns = torch.tensor([3.5, -1.0, 5.0, 5.0])
    assert measure.rollout_metrics(EPISODES, world) == pytest.approx(
        {
            "reward/mean": 12.5 / 4,
            "reward/std": returns.std(correction=0).item(),
            "reward/won": 3 / 4,
            "response_length": 20 / 5,
            "truncated": 1 / 5,
            "groups_without_variance": 1 / 2,
        }
    )


def test_metrics_of_a_meta_step():
    """By hand: support, query and query before adaptation of two tasks."""
    losses = [[1.0, 1.5, 3.0], [2.0, 3.5, 4.0]]
    without = measure.step_metrics(losses, ["a", "b"], gain=False)
    expected = {
        "meta/loss": 2.5,
        "meta/avg_support_loss": 1.5,
        "meta/avg_query_loss": 2.5,
        "meta/avg_adaptation_gap": 1.0,
        "meta/adaptation_gap_std": 0.5,
        "meta/task_loss_variance": 1.0,
        "a/support_loss": 1.0,
        "a/query_loss": 1.5,
        "a/adaptation_gap": 0.5,
        "b/support_loss": 2.0,
        "b/query_loss": 3.5,
        "b/adaptation_gap": 1.5,
    }
    assert without == pytest.approx(expected)
    expected |= {"meta/query_loss_before": 3.5, "meta/adaptation_gain": 1.0}
    expected |= {"a/adaptation_gain": 1.5, "b/adaptation_gain": 0.5}
    assert measure.step_metrics(losses, ["a", "b"], gain=True) == pytest.approx(expected)


def test_lines_of_an_evaluation():
    """What adaptation does is said at the first evaluations."""

    def lines(before: float, after: float, earlier: int) -> str:
        result = {"t": {"loss_before": before, "loss_after": after, "problems": 1}}
        return "\n".join(measure.adaptation_lines(7, result, dict.fromkeys(range(earlier), result)))

    assert lines(2.0, 1.5, 0) == "step 7: loss before adaptation 2.000, after 1.500"
    assert "adaptation gains only +0.0050 nats" in lines(2.0, 1.995, 0)
    assert "adaptation gains only -0.0050 nats" in lines(2.0, 2.005, 1)
    assert "adaptation makes the loss worse by 0.500 nats" in lines(2.0, 2.5, 0)
    assert "warning" not in lines(2.0, 2.5, 2)
    few, same = {"truncated": 0.51}, {"groups_without_variance": 1.0}
    assert measure.rollout_warnings(few, 8).keys() == {"cut"}
    assert measure.rollout_warnings(same, 8).keys() == {"equal"}
    assert not measure.rollout_warnings({"truncated": 0.5, "groups_without_variance": 0.9}, 8)


def test_responses_for_people():
    tokenizer = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    rows = measure.sample_rows(EPISODES, 3, tokenizer)
    names = ("episode", "sample", "turn", "reward", "length", "truncated")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (0, 0, 0, -1.5, 3, False),
        (0, 0, 1, 5.0, 4, False),
        (0, 1, 0, -1.0, 8, True),
        (1, 0, 0, 5.0, 2, False),
        (1, 1, 0, 5.0, 3, False),
    ]
    assert {row["step"] for row in rows} == {3}
    assert {row["prompt"] for row in rows} == {"1"}
    result = {"cards": {"accuracy": 0.75, "step_accuracy": 0.6, "length": 4.0, "episodes": 4}}
    first, best, worst = measure.tests_lines(3, result, rows)
    assert first == "step 3: cards 75.0%, step accuracy 60.0%, 4 tokens"
    assert best.startswith("  best, reward 5, 2 tokens")
    assert worst.startswith("  worst, reward -1.5, 3 tokens")
    later = {"cards": result["cards"] | {"accuracy": 0.5, "length": 6.0}}
    row = measure.tests_table(result, later).splitlines()[-1].split()
    low, high = measure.wilson(2, 4)
    numbers = ["75.0%", "50.0%", f"{100 * low:.1f}", "to", f"{100 * high:.1f}", "4.0", "6.0"]
    assert row == ["cards", "4", *numbers]


def test_summary_of_a_benchmark():
    """Three problems of two samples: both right, one right, none; means over problems."""
    rows = []
    for name, right in (("a", (1, 1)), ("b", (0, 1)), ("c", (0, 0))):
        for k in (0, 1):
            row = {"id": name, "sample": k, "right": bool(right[k]), "tokens": 4 + k}
            row |= {"finished": k == 0, "answer": None if name == "c" else "1"}
            rows.append(row | {"subject": "S" if name == "a" else "T", "level": "1"})
    found = evaluation.summarise(rows, 2)
    assert found["problems"] == 3
    assert found["accuracy"] == pytest.approx(1 / 2)
    assert found["pass@2"] == pytest.approx(2 / 3)
    assert "pass@4" not in found
    assert found["mean_tokens"] == 4.5
    assert found["truncated"] == 0.5
    assert found["unparsable"] == pytest.approx(1 / 3)
    assert found["subject"] == {"S": [1.0, 1], "T": [0.25, 2]}
    assert "level" not in found
    low, high = found["interval"]
    assert low < 0.5 < high
    single = evaluation.summarise([row for row in rows if row["sample"] == 1], 1)
    assert single["interval"] == pytest.approx(measure.wilson(2, 3))


def test_prompts_of_a_benchmark():
    plain = evaluation.Problem("x/0", "1 + 1?", "2")
    assert evaluation.prompt_of(plain, None) == "1 + 1?" + evaluation.BOX
    assert evaluation.prompt_of(plain, " Go.") == "1 + 1? Go."
    assert evaluation.prompt_of(plain._replace(id="embedded/0"), None) == "1 + 1?"
    choices = plain._replace(choices=("two", "three"), answer="A")
    assert evaluation.prompt_of(choices, "") == "1 + 1?\n(A) two\n(B) three"
    assert evaluation.prompt_of(choices, None).endswith(evaluation.LETTER_BOX)


def test_differences_are_second_minus_first():
    rows = []
    for name, right in (("a", [0, 0, 1, 0]), ("b", [1, 1, 1, 0])):
        row = {"model": name, "task": "t", "shots": 2, "seed": 0, "loss": 1.0, "right": right}
        rows.append(row)
    summary, (pair,) = evaluation.compare_few_shot(rows, ["a", "b"])
    assert [s["accuracy"] for s in summary] == [0.25, 0.75]
    assert (pair["first"], pair["second"]) == ("a", "b")
    assert pair["difference"] == 0.5
    low, high = pair["interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert pair["mcnemar"] == 0.5  # 2 against 0


def test_judging_choices():
    arc = {
        "question": "Which?",
        "choices": {"text": ["3", "4", "5", "6"], "label": ["1", "2", "3", "4"]},
        "answerKey": "2",
    }
    problem = evaluation._problem(arc, "arc")
    assert problem.answer == "B"
    for response in (r"so \boxed{B}", r"\boxed{4}", "The answer is (B) 4."):
        assert evaluation.judge(response, problem), response
    assert not evaluation.judge(r"\boxed{C}", problem)
    gpqa = {
        "Question": "Which one?",
        "Correct Answer": "x",
        "Incorrect Answer 1": "a",
        "Incorrect Answer 2": "b",
        "Incorrect Answer 3": "c",
    }
    problem = evaluation._problem(gpqa, "gpqa")
    assert sorted(problem.choices) == ["a", "b", "c", "x"]
    assert problem.choices["ABCD".index(problem.answer)] == "x"
    questions = [gpqa | {"Question": f"Which of {i}?"} for i in range(40)]
    assert {evaluation._problem(row, "gpqa").answer for row in questions} == set("ABCD")
    gsm8k = {"question": "How many?", "answer": "6 + 1 = 7\n#### 7"}
    assert evaluation._problem(gsm8k, "gsm8k").answer == "7"


def whole_rows(file) -> list[dict]:
    """The rows of a file of which a kill may have cut lines."""
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]


def test_benchmark_continues_after_a_kill(tmp_path, small_model):
    """SIGKILL in the middle, the same command again: every response once, the same as those of an
    uninterrupted run."""
    benchmark = [
        "--model", small_model, "--benchmark", "embedded", "--limit", "60", "--max-length", "8",
        "--samples", "2", "--batch-size", "6", "--temperature", "1",
    ]  # fmt: skip
    assert run_here(evaluation, *benchmark, "--output-dir", tmp_path / "whole") == 0
    cut = tmp_path / "cut"
    process = subprocess.Popen(
        command("eval.py", *benchmark, "--output-dir", cut),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    responses = cut / "responses-0.jsonl"
    wait_for_lines(responses, 12, process, seconds=100)
    process.kill()
    process.wait()
    responses.write_text(responses.read_text() + '{"model": "half a li')
    run_well("eval.py", *benchmark, "--output-dir", cut)

    def responses_of(folder) -> list[tuple]:
        rows = whole_rows(folder / "responses-0.jsonl")
        return sorted((row["id"], row["sample"], row["response"]) for row in rows)

    expected, got = responses_of(tmp_path / "whole"), responses_of(cut)
    assert len(expected) == 120
    pairs = zip(expected[::2], expected[1::2], strict=True)  # the two samples of a problem
    assert sum(first[2] != second[2] for first, second in pairs) > 50
    assert [row[:2] for row in got] == [row[:2] for row in expected]
    assert sum(a == b for a, b in zip(expected, got, strict=True)) >= 118
    assert run_here(evaluation, *benchmark, "--seed", "1", "--output-dir", cut) == 2


def test_games_as_benchmarks(tmp_path):
    """A killed evaluation of a game continues, one sample of a seed written and one not; won
    episodes and right turns are those that the written answers earn when played again."""
    args = evaluation.Args(
        model=("tiny_games",),
        benchmark=("general_points",),
        compact=True,
        limit=6,
        samples=2,
        temperature=1.0,
        max_length=64,
        output_dir=str(tmp_path),
    )
    assert evaluation.main(args) == 0
    file, results = tmp_path / "responses-0.jsonl", tmp_path / "results.json"
    first, lines = json.loads(results.read_text()), file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:11]) + '{"model": "tiny_ga')
    assert evaluation.main(args) == 0
    assert json.loads(results.read_text()) == first
    rows = list({(row["id"], row["sample"]): row for row in whole_rows(file)}.values())
    assert len(rows) == 24
    _, _, tests = games_of("general_points", compact=True)
    for row in rows:
        _, name, seed = row["id"].split("/")
        state = tests[name].reset(int(seed))
        played = [tests[name].step(state, text) for text in row["response"]]
        assert played[-1].done, row
        assert played[-1].won == row["right"], row
        assert sum(result.reward for result in played) == row["reward"], row
        assert sum(result.reward > 0 for result in played) == row["right_turns"], row
    label = "general_points (in distribution)"
    summary = first["benchmarks"]["tiny_games"][label]
    in_distribution = [row["right"] for row in rows if row["subject"] == label]
    assert summary["problems"] == 6
    assert len(in_distribution) == 12
    assert summary["accuracy"] == sum(in_distribution) / 12
    assert summary["step_accuracy"] == pytest.approx(0.5, abs=0.5)


def test_few_shot_study(tmp_path, small_model, monkeypatch):
    """Adaptation lowers the loss on the shots' task, weights are restored bit for bit, two equal
    models differ by nothing."""
    kept = []

    def load_and_keep(*args, **options):
        kept.append(load_weights(*args, **options))
        return kept[-1]

    monkeypatch.setattr(evaluation, "load_weights", load_and_keep)
    args = evaluation.Args(
        model=(str(small_model), f"{small_model}/"),
        few_shot=(0, 2, 6),
        seeds=2,
        tasks=("Geometry/missing_side",),
        adapt_lr=3e-3,
        adapt_steps=5,
        limit=8,
        max_length=4,
        output_dir=str(tmp_path),
    )
    assert evaluation.main(args) == 0
    before = load_weights(str(small_model)).state_dict()
    assert len(kept) == 2
    for model in kept:
        assert_same_weights(model.state_dict(), before)
    report = json.loads((tmp_path / "results.json").read_text())
    draws = {(row["shots"], row["seed"]) for row in report["few_shot"]}
    assert draws == {(0, 0), (2, 0), (2, 1), (6, 0), (6, 1)}
    curve = next(row["curve"] for row in report["few_shot"] if row["shots"] == 6)
    assert list(curve) == ["0", "1", "2", "5"]
    assert curve["5"] < curve["0"]
    for row in report["few_shot"]:
        assert row["loss"] == row["curve"]["5" if row["shots"] else "0"]
    for pair in report["pairs"]:
        assert pair["difference"] == 0, pair
        assert pair["mcnemar"] == 1, pair
