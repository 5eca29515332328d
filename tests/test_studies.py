"""The tables of the studies, from made-up rows."""

import pytest

from studies.balance import report


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
