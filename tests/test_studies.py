"""The studies' tables, from made-up rows, and the real model's script, on a small one."""

import json

import pytest

from studies.balance import report
from studies.real_model import run as real_model


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
