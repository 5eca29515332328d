"""measure.py and eval.py: statistics against known values; benchmarks that are cut and go on; the
few-shot study."""

import importlib
import itertools
import json
import random
import subprocess

import pytest

import measure
from games import games_of
from model import load_weights
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
    assert [row[:2] for row in got] == [row[:2] for row in expected]
    assert sum(a == b for a, b in zip(expected, got, strict=True)) >= 118
    assert run_here(evaluation, *benchmark, "--seed", "1", "--output-dir", cut) == 2


def test_games_as_benchmarks(tmp_path):
    """A killed evaluation of a game continues; won episodes and right turns are those that the
    written answers earn when played again."""
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
    file.write_text("".join(lines[:10]) + '{"model": "tiny_ga')
    assert evaluation.main(args) == 0
    assert json.loads(results.read_text()) == first
    rows = whole_rows(file)
    assert len(rows) == 24
    assert len({(row["id"], row["sample"]) for row in rows}) == 24
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
    for pair in report["pairs"]:
        assert pair["difference"] == 0, pair
        assert pair["mcnemar"] == 1, pair
