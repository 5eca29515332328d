"""Tables and pictures from results.jsonl: python studies/few_shot/report.py

Prints the tables of docs/studies/few_shot.md and writes its three pictures to assets/.
"""

import math
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import matplotlib.pyplot as plt
import tyro

from measure import bootstrap
from plots import AFTER, COLOURS, GREY, STYLE, line
from studies.runs import rows_of

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parent.parent / "assets"
LABELS = {
    "none": "no training",
    "joint": "joint training",
    "reptile": "Reptile",
    "fomaml": "FOMAML",
    "fomaml, learned scalar": "FOMAML, one learned rate",
    "fomaml, learned tensor": "FOMAML, a learned rate a tensor",
    "in_context": "trained in context",
}


def read(file: Path) -> dict[str, dict[str, list[dict]]]:
    """{group: {name: rows}}."""
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows_of(file):
        groups[row["group"]][row["name"]].append(row)
    return groups


def values(rows: list[dict], key: str) -> list[float]:
    """Of every (seed, rule), in percent."""
    found = []
    for row in rows:
        found += [100 * task[key] for task in row["tasks"].values()]
    return found


def with_interval(numbers: list[float]) -> str:
    low, high = bootstrap(numbers)
    return f"{sum(numbers) / len(numbers):.1f} ({low:.1f} to {high:.1f})"


def arm_line(label: str, rows: list[dict]) -> str:
    """A row of the main table."""
    training = [row["training"] for row in rows if row["training"]]
    seeds = ", ".join(map(str, sorted(row["seed"] for row in rows)))
    tokens = seconds = "-"
    if training:
        tokens = f"{sum(t['tokens'] for t in training) / len(training) / 1000:,.0f}k"
        seconds = f"{sum(t['seconds'] for t in training) / len(training):,.0f}"
    before, after = values(rows, "accuracy_before"), values(rows, "accuracy_after")
    prompted = "-"
    if all("accuracy_in_context" in row["mean"] for row in rows):
        prompted = with_interval(values(rows, "accuracy_in_context"))
    return (
        f"| {label} | {seeds} | {sum(before) / len(before):.1f} | {with_interval(after)} "
        f"| {prompted} | {tokens} | {seconds} |"
    )


def table(groups: dict, group: str, names: dict[str, str]) -> list[str]:
    lines = [
        "| arm | seeds | before | after 5 steps on the rows, % (95%) | rows in the prompt, % (95%) "
        "| tokens trained on | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, label in names.items():
        if rows := groups[group].get(name):
            lines.append(arm_line(label, rows))
    return lines


def difference(groups: dict, group: str, first: str, second: str) -> str:
    """Of two arms' accuracy after adaptation, paired by seed and rule."""
    by_pair = []
    for name in (first, second):
        pairs = {}
        for row in groups[group].get(name, []):
            for rule, task in row["tasks"].items():
                pairs[row["seed"], rule] = 100 * task["accuracy_after"]
        by_pair.append(pairs)
    common = by_pair[0].keys() & by_pair[1].keys()
    if not common:
        return ""
    changes = [by_pair[1][key] - by_pair[0][key] for key in sorted(common)]
    return f"| {LABELS[second]} - {LABELS[first]} | {with_interval(changes)} |"


def curve(rows: list[dict]) -> list[float]:
    """Mean accuracy after 0 to K steps, in percent."""
    curves = []
    for row in rows:
        for task in row["tasks"].values():
            curves.append([100 * step["accuracy"] for step in task.get("steps", [])])
    return [sum(ys) / len(ys) for ys in zip(*curves, strict=True)]


def draw_steps(groups: dict, out: Path) -> None:
    """Accuracy over adaptation steps of every arm, a panel a family; those in context as horizontal
    lines."""
    fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.6), sharey=True)
    for axis, group, word in zip(axes, ("main", "changes"), ("cipher", "change"), strict=True):
        for colour, (name, label) in zip(COLOURS, LABELS.items(), strict=False):
            rows = groups[group].get(name, [])
            if not rows:
                continue
            if name == "in_context":
                axis.axhline(prompted(rows), color=colour, linestyle=":", label=label)
                continue
            axis.plot(curve(rows), color=colour, label=label, **AFTER)
        if rows := groups[group].get("none"):
            label = "no training, rows in the prompt"
            axis.axhline(prompted(rows), color=GREY, linestyle=":", label=label)
        axis.set(xlabel=f"Adam steps on 30 rows of a new {word}", ylim=(-4, 104))
    axes[0].set_ylabel("exact answers (%)")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.savefig(out)
    plt.close(fig)


def prompted(rows: list[dict]) -> float:
    """Mean accuracy with the rows in the prompt, in percent."""
    numbers = values(rows, "accuracy_in_context")
    return sum(numbers) / len(numbers)


def draw_training(groups: dict, out: Path) -> None:
    """Query loss over the meta-steps: after adaptation, or in context; several seeds as mean and
    range."""
    fig, axis = plt.subplots(figsize=(7.4, 3.2))
    arms = [(LABELS[name], groups["main"].get(name, [])) for name in LABELS if name != "none"]
    earlier = groups["first"].get("fomaml, inner 5e-3, outer 1e-3", [])
    arms.append(("FOMAML at an inner rate of 5e-3", earlier))
    for colour, (label, rows) in zip((*COLOURS[1:], GREY), arms, strict=True):
        seeds = [list(enumerate(row["training"]["losses"], 1)) for row in rows]
        line(axis, seeds, colour, label=label, window=7)
    chance = 2 * math.log(10) / 6  # two digits of six response tokens
    axis.axhline(chance, color=GREY, linestyle=":", label="chance")
    axis.set(xlabel="meta-step", ylabel="query loss (nats/token)", ylim=(0, 1.2))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    fig.savefig(out)
    plt.close(fig)


def draw_axes(groups: dict, out: Path) -> None:
    """FOMAML's accuracy over the number of training rules and of support rows, seed 42."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.2))
    whole = [row for row in groups["main"].get("fomaml", []) if row["seed"] == 42]
    for axis, word, xs, at in (
        (left, "rules", (4, 16, 64, 256), 980),
        (right, "rows", (5, 10, 60), 30),
    ):
        points = {x: groups["axes"].get(f"{x} {word}", []) for x in xs} | {at: whole}
        points = {x: values(rows, "accuracy_after") for x, rows in sorted(points.items()) if rows}
        means = {x: sum(numbers) / len(numbers) for x, numbers in points.items()}
        axis.plot(list(means), list(means.values()), color=COLOURS[0], **AFTER)
        for x, numbers in points.items():
            axis.plot([x, x], bootstrap(numbers), color=COLOURS[0], linewidth=1.2)
        axis.set_xscale("log")
        axis.set_xticks(list(means), [str(x) for x in means])
        axis.minorticks_off()
        axis.set_ylabel("exact answers (%)")
        axis.set_ylim(-4, 104)
    left.set_xlabel("ciphers to train on")
    right.set_xlabel("support rows of a cipher")
    fig.savefig(out)
    plt.close(fig)


def main(results: Path = HERE / "results.jsonl") -> None:
    """Prints the tables and draws the pictures."""
    groups = read(results)
    lines = []
    for group in ("main", "changes"):
        lines += ["", group, "", *table(groups, group, LABELS), ""]
        lines += ["| difference after 5 steps, same seeds | points (95%) |", "|---|---|"]
        for first in ("joint", "reptile", "fomaml, learned scalar", "fomaml, learned tensor"):
            if text := difference(groups, group, first, "fomaml"):
                lines.append(text)
    for group in ("axes", "lora", "exact", "first", "search"):
        names = {name: name for name in groups[group]}
        lines += ["", group, "", *table(groups, group, names)]
    print("\n".join(lines))
    with plt.rc_context(STYLE):
        draw_steps(groups, ASSETS / "few_shot_steps.png")
        draw_training(groups, ASSETS / "few_shot_training.png")
        if groups["axes"].keys() & {"16 rules", "64 rules", "10 rows", "5 rows"}:
            draw_axes(groups, ASSETS / "few_shot_axes.png")


if __name__ == "__main__":
    tyro.cli(main)
