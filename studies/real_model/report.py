"""Table and picture from results.jsonl: python studies/real_model/report.py

Prints the table of docs/studies/real_model.md and writes its picture to assets/.
"""

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import matplotlib.pyplot as plt

from measure import wilson
from plots import COLOURS, STYLE
from studies.runs import rows_of

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent.parent / "assets"


def interval(row: dict) -> tuple[float, float, float]:
    """Accuracy of an evaluation and its 95% interval, in percent."""
    n = row["episodes"]
    low, high = wilson(round(row["accuracy"] * n), n)
    return 100 * row["accuracy"], 100 * low, 100 * high


def table(runs: dict[str, list[dict]]) -> list[str]:
    lines = [
        "| arm | step | accuracy, % (95%) | mean tokens | cut at 200 | samples drawn | hours |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, rows in runs.items():
        for row in rows:
            middle, low, high = interval(row)
            lines.append(
                f"| {arm} | {row['step']} | {middle:.0f} ({low:.0f} to {high:.0f}) "
                f"| {row['length']:.0f} | {row['truncated']:.0%} | {row['samples']:,.0f} "
                f"| {row['seconds'] / 3600:.1f} |"
            )
    return lines


def draw(runs: dict[str, list[dict]], out: Path) -> None:
    """Accuracy over steps with its interval, a line an arm."""
    with plt.rc_context(STYLE):
        fig, axis = plt.subplots(figsize=(4.8, 3.2))
        for colour, (arm, rows) in zip(COLOURS, runs.items(), strict=False):
            steps, numbers = [row["step"] for row in rows], [interval(row) for row in rows]
            middle, low, high = zip(*numbers, strict=True)
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            axis.plot(steps, middle, "o-", color=colour, label=arm)
        axis.set(xlabel="step", ylabel="right answers on 100 test problems, %", ylim=(0, None))
        axis.legend()
        fig.savefig(out)
        plt.close(fig)


def main() -> None:
    runs = defaultdict(list)
    for row in rows_of(HERE / "results.jsonl"):
        runs[row["arm"]].append(row)
    print("\n".join(table(runs)))
    draw(runs, ASSETS / "real_model.png")


if __name__ == "__main__":
    main()
