"""Tables and pictures from results.jsonl: python studies/balance/report.py

Prints the tables of docs/studies/balance.md and writes its two pictures to assets/.
"""

import random
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import matplotlib.pyplot as plt

from plots import COLOURS, GREY, STYLE
from studies.balance.run import ARMS, CONDITIONS
from studies.runs import rows_of

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent.parent / "assets"
CONSTANT = {
    "rl": 0.0, "fixed 0.1": 0.1, "fixed 0.25": 0.25, "fixed 0.5": 0.5, "fixed 0.75": 0.75,
    "fixed 0.9": 0.9, "sft": 1.0,
}  # fmt: skip
CHOICE_SEED = 7  # of the best constant; not reported

Cells = dict[tuple[str, str], dict[int, dict]]  # {(condition, arm): {seed: row}}


def read() -> Cells:
    cells: Cells = defaultdict(dict)
    for row in rows_of(HERE / "results.jsonl"):
        cells[row["condition"], row["arm"]][row["seed"]] = row
    return cells


def accuracy(row: dict) -> float:
    return row["right"].count("1") / len(row["right"])


def best_constant(cells: Cells, condition: str) -> str | None:
    """The arm with a constant mu that is best with the seed that is not reported."""
    found = {}
    for arm in CONSTANT:
        if CHOICE_SEED in cells[condition, arm]:
            found[arm] = accuracy(cells[condition, arm][CHOICE_SEED])
    return max(found, key=found.get) if found else None


def seeds_of(cells: Cells, condition: str, arm: str) -> list[int]:
    return sorted(set(cells[condition, arm]) - {CHOICE_SEED})


def differences(cells: Cells, condition: str, arm: str) -> dict[int, list[int]]:
    """{seed: [best constant's answer right - the arm's, a problem each]}."""
    best = best_constant(cells, condition)
    if best is None:
        return {}
    common = set(seeds_of(cells, condition, arm)) & set(seeds_of(cells, condition, best))
    found = {}
    for seed in sorted(common):
        pair = cells[condition, best][seed]["right"], cells[condition, arm][seed]["right"]
        found[seed] = [int(a) - int(b) for a, b in zip(*pair, strict=True)]
    return found


def interval(groups: list[dict[int, list[int]]], draws: int = 2000) -> tuple[float, float]:
    """95% bootstrap of the mean over conditions of the mean over (seed, problem).

    Seeds are drawn, and in each of them problems.
    """
    rng, means = random.Random(0), []
    for _ in range(draws):
        of_conditions = []
        for by_seed in groups:
            numbers = []
            for seed in rng.choices(list(by_seed), k=len(by_seed)):
                numbers += rng.choices(by_seed[seed], k=len(by_seed[seed]))
            of_conditions.append(sum(numbers) / len(numbers))
        means.append(sum(of_conditions) / len(of_conditions))
    means.sort()
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def mean(groups: list[dict[int, list[int]]]) -> float:
    of_conditions = []
    for by_seed in groups:
        numbers = [x for numbers in by_seed.values() for x in numbers]
        of_conditions.append(sum(numbers) / len(numbers))
    return sum(of_conditions) / len(of_conditions)


def regrets(cells: Cells, conditions: list[str]) -> dict[str, tuple[float, float, float]]:
    """{arm: (mean regret, low, high)} of the arms that were run in all of the conditions."""
    found = {}
    for arm in ARMS:
        groups = [differences(cells, condition, arm) for condition in conditions]
        if groups and all(groups):
            found[arm] = mean(groups), *interval(groups)
    return found


def table(cells: Cells) -> list[str]:
    """Accuracy of each arm in each condition, its mean regret, and what it cost."""
    conditions = [c for c in CONDITIONS if seeds_of(cells, c, "rl")]
    regret = regrets(cells, conditions)
    lines = [
        f"| arm | {' | '.join(f'{c}, %' for c in conditions)} | mean regret, points (95%) "
        "| samples: training, validation | seconds |",
        "|---" * (len(conditions) + 4) + "|",
    ]
    for arm in sorted(ARMS, key=lambda arm: regret.get(arm, (9, 9, 9))[0]):
        cellsof = [cells[c, arm] for c in conditions]
        rows = [row for cell in cellsof for seed, row in cell.items() if seed != CHOICE_SEED]
        if not rows:
            continue
        parts = []
        for condition in conditions:
            of_cell = [accuracy(cells[condition, arm][s]) for s in seeds_of(cells, condition, arm)]
            mark = "*" if arm == best_constant(cells, condition) else ""
            mean_of_cell = f"{100 * sum(of_cell) / len(of_cell):.1f}" if of_cell else "-"
            parts.append(f"{mean_of_cell}{mark} ({len(of_cell)})" if of_cell else "-")
        numbers = "-"
        if arm in regret:
            middle, low, high = (100 * x for x in regret[arm])
            numbers = f"{middle:.1f} ({low:.1f} to {high:.1f})"
        samples = [
            sum(row["samples"][kind] for row in rows) / len(rows)
            for kind in ("train", "validation")
        ]
        seconds = sum(row["seconds"] for row in rows) / len(rows)
        lines.append(
            f"| {arm} | {' | '.join(parts)} | {numbers} | {samples[0]:,.0f}, {samples[1]:,.0f} "
            f"| {seconds:.0f} |"
        )
    return lines


def draw_regret(cells: Cells, out: Path) -> None:
    conditions = [c for c in CONDITIONS if seeds_of(cells, c, "rl")]
    regret = regrets(cells, conditions)
    arms = sorted(regret, key=lambda arm: -regret[arm][0])
    with plt.rc_context(STYLE):
        fig, axis = plt.subplots(figsize=(6.4, 0.6 + 0.28 * len(arms)))
        for y, arm in enumerate(arms):
            middle, low, high = (100 * x for x in regret[arm])
            colour = GREY if arm in CONSTANT else COLOURS[0]
            axis.plot([low, high], [y, y], color=colour)
            axis.plot(middle, y, "o", color=colour)
        axis.set_yticks(range(len(arms)), arms)
        axis.set(xlabel=f"mean regret over {', '.join(conditions)}, points of accuracy")
        axis.axvline(0, color=GREY, linewidth=1)
        fig.savefig(out)
        plt.close(fig)


def draw_mu(cells: Cells, out: Path) -> None:
    """mu over the steps of the arms that move it, a panel a condition, with the reported seeds."""
    conditions = [c for c in CONDITIONS if seeds_of(cells, c, "rl")]
    moving = ("amft", "amft, shrunken", "gac", "chord")
    with plt.rc_context(STYLE):
        size = (2.6 * len(conditions), 2.8)
        fig, axes = plt.subplots(1, len(conditions), figsize=size, sharey=True, squeeze=False)
        for axis, condition in zip(axes[0], conditions, strict=True):
            for colour, arm in zip(COLOURS, moving, strict=False):
                for i, seed in enumerate(seeds_of(cells, condition, arm)):
                    label = None if i else arm
                    axis.plot(cells[condition, arm][seed]["mu"], color=colour, label=label)
            axis.set(title=condition, xlabel="step", ylim=(0, 1))
        axes[0][0].set_ylabel("mu")
        axes[0][0].legend()
        fig.savefig(out)
        plt.close(fig)


def main() -> None:
    cells = read()
    print("\n".join(table(cells)))
    draw_regret(cells, ASSETS / "balance_regret.png")
    draw_mu(cells, ASSETS / "balance_mu.png")


if __name__ == "__main__":
    main()
