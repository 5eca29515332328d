"""Pictures from run folders and evaluation folders.

    python plots.py runs/fomaml runs/joint --out comparison.png      # training and evaluation curves of runs, over each other
    python plots.py runs/amft runs/rl runs/sft --out dynamics.png     # mu, entropy, reward, length and accuracy of amft.py's methods
    python plots.py evals/study --out few_shot.png                    # few-shot curves with bands, loss over adaptation steps
    python plots.py evals/math evals/gsm8k --out accuracy.png         # benchmark accuracy with 95% intervals

What a folder holds decides its panels; folders of any kinds may be mixed. Runs that differ in nothing but the seed become one line,
their mean, with a band from the lowest to the highest. Raw values are faint, smoothed ones strong; dashed is before adaptation.
"""

import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: colour-blind safe
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.titlesize": 10.5,
         "lines.linewidth": 1.8, "legend.frameon": False, "legend.fontsize": 8.5, "savefig.dpi": 150, "figure.constrained_layout.use": True}


def read(run: Path, name: str) -> list[dict]:
    file = Path(run) / name
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window that shrinks at both ends."""
    half = window // 2
    return [sum(values[max(0, i - half) : i + half + 1]) / len(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def settings(run: Path) -> str:
    """What must be equal for two runs to be seeds of one setting."""
    file = run / "args.json"
    args = json.loads(file.read_text()).get("args", {}) if file.exists() else {"run": str(run)}
    return json.dumps({k: v for k, v in args.items() if k not in ("seed", "output_dir", "resume")}, sort_keys=True)


def line(axis, series: list[list[tuple[float, float]]], colour: str, style: str = "-", label: str | None = None, window: int = 1, marker: str | None = None) -> None:
    """One setting: a single seed as a line over its faint raw values, several as their mean and range."""
    series = [s for s in series if s]
    if not series:
        return
    common = sorted(set.intersection(*({x for x, _ in s} for s in series)))
    columns = [[dict(s)[x] for s in series] for x in common]
    mean = [sum(c) / len(c) for c in columns]
    smoothed = smooth(mean, window) if window > 1 else mean
    if len(series) > 1:
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        if window > 1:
            low, high = smooth(low, window), smooth(high, window)
        axis.fill_between(common, low, high, color=colour, alpha=0.18, linewidth=0)
    elif window > 1:
        axis.plot(common, mean, color=colour, alpha=0.2, linewidth=1)
    axis.plot(common, smoothed, style, color=colour, label=label, marker=marker, markersize=3.5)


def model_name(model: str) -> str:
    """runs/NAME/checkpoint -> NAME; else the last part of a folder or hub name."""
    path = Path(model)
    return path.parent.name if path.name in ("checkpoint", "merged") else path.name


def training_panels(groups: dict[str, list[Path]]) -> list:
    """[(title, ylabel, xlabel, draw(axis))] for folders with metrics.jsonl."""
    metrics = {label: [read(r, "metrics.jsonl") for r in runs] for label, runs in groups.items()}
    evaluations = {label: [read(r, "evaluations.jsonl") for r in runs] for label, runs in groups.items()}
    single = len(groups) == 1

    def curve(key):
        def draw(axis):
            for colour, (label, seeds) in zip(COLOURS * len(groups), metrics.items()):
                series = [[(m["step"], m[key]) for m in rows if m.get(key) == m.get(key) and key in m] for rows in seeds]
                line(axis, series, colour, label=None if single else label, window=max(3, max(map(len, series)) // 10))
        return draw

    def evaluation(key, scale):
        def draw(axis):
            for colour, (label, seeds) in zip(COLOURS * len(groups), evaluations.items()):
                for when, style in (("before", "--"), ("after", "-")):
                    series = [[(r["step"], scale * r["mean"][f"{key}_{when}"]) for r in rows if f"{key}_{when}" in r["mean"]] for rows in seeds]
                    line(axis, series, colour, style, f"{when} adaptation" if single else label if when == "after" else None, marker="o")
            if key == "accuracy":
                axis.set_ylim(0, None)
        return draw

    def gains(axis):
        names = list(next(iter(evaluations.values()))[0][-1]["tasks"])[::-1]
        bars = [("before training", "#BBBBBB", 0)] if single else []
        bars += [(label if not single else "after training", COLOURS[i % len(COLOURS)], -1) for i, label in enumerate(groups)]
        for j, (label, colour, at) in enumerate(bars):
            rows = [seed[at] for seed in (evaluations[label] if not single else next(iter(evaluations.values()))) if seed]
            values = [sum(r["tasks"][n]["loss_before"] - r["tasks"][n]["loss_after"] for r in rows if n in r["tasks"]) / len(rows) for n in names]
            axis.barh([i + 0.8 * (len(bars) - 1 - j) / len(bars) for i in range(len(names))], values, 0.8 / len(bars), color=colour, label=label)
        axis.set_yticks([i + 0.4 - 0.4 / len(bars) for i in range(len(names))], [n.split("/")[-1].replace("_", " ") for n in names], fontsize=8)
        axis.grid(axis="y", visible=False)
        axis.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=2)

    panels = [("training tasks, after adaptation", "query loss (nats/token)", "meta-step", curve("meta/loss"))]
    if any(rows for seeds in evaluations.values() for rows in seeds):
        panels.append(("evaluation tasks", "test loss (nats/token)", "meta-step", evaluation("loss", 1)))
        if any("accuracy_after" in r["mean"] for seeds in evaluations.values() for rows in seeds for r in rows):
            panels.append(("evaluation tasks", "exact answers (%)", "meta-step", evaluation("accuracy", 100)))
        panels.append(("gain of adaptation by task", "", "loss before - after (nats/token)", gains))
    return panels


def dynamics_panels(groups: dict[str, list[Path]]) -> list:
    """Panels for runs of amft.py: accuracy on each test set, reward, mu, entropy with its target, response length, what moved mu."""
    metrics = {label: [read(r, "metrics.jsonl") for r in runs] for label, runs in groups.items()}
    evaluations = {label: [read(r, "evaluations.jsonl") for r in runs] for label, runs in groups.items()}
    single = len(groups) == 1

    def accuracy(axis):
        for colour, (label, seeds) in zip(COLOURS * len(groups), evaluations.items()):
            for k, (name, style) in enumerate(zip(names, ("-", "--", ":"), strict=False)):
                series = [[(r["step"], 100 * r["tasks"][name]["accuracy"]) for r in rows if name in r["tasks"]] for rows in seeds]
                line(axis, series, colour, style, name if single else label if k == 0 else None, marker="o")
        if not single and len(names) > 1:
            axis.set_title(f"{names[0]} (dashed: {names[1]})")
        axis.set_ylim(0, None)

    def curve(key, target=None, scale=1.0):
        def draw(axis):
            for colour, (label, seeds) in zip(COLOURS * len(groups), metrics.items()):
                series = [[(m["step"], scale * m[key]) for m in rows if key in m] for rows in seeds]
                line(axis, series, colour, label=None if single else label, window=1 if key == "mu" else max(3, max(map(len, series)) // 12))
                if target and any(target in m for rows in seeds for m in rows):
                    line(axis, [[(m["step"], m[target]) for m in rows if target in m] for rows in seeds], colour, "--", label="H* (target)" if single else None)
        return draw

    def contributions(axis):
        label, seeds = next(iter(metrics.items()))
        for colour, (key, name) in zip(COLOURS, (("mu_change/meta_gradient", "meta-gradient"), ("mu_change/entropy", "entropy term"))):
            total, series = 0.0, []
            for m in seeds[0]:
                total += m.get(key, 0.0)
                series.append((m["step"], total))
            line(axis, [series], colour, label=name)
        if not single:
            axis.set_title(f"what moved mu ({label})")

    names = list(dict.fromkeys(n for seeds in evaluations.values() for rows in seeds for r in rows[:1] for n in r["tasks"]))
    panels = [("test sets, greedy", "accuracy (%)", "step", accuracy)]
    for key, title, ylabel, target in (("reward/mean", "reward of own samples", "mean reward", None), ("mu", "weight of imitation", "mu", None),
                                       ("entropy", "policy entropy", "nats/token", "entropy_target"), ("response_length", "response length", "tokens", None)):
        if any(key in m for seeds in metrics.values() for rows in seeds for m in rows):
            panels.append((title, ylabel, "step", curve(key, target)))
    if any(m.get("mu_change/entropy") or m.get("mu_change/meta_gradient") for rows in next(iter(metrics.values())) for m in rows):
        panels.append(("what moved mu", "summed change of mu", "step", contributions))
    return panels


def few_shot_panels(folders: list[Path]) -> list:
    """Accuracy and loss over the number of examples (mean, one standard deviation over seeds); loss over adaptation steps at the largest n."""
    reports = [json.loads((f / "results.json").read_text()) for f in folders]
    summary = [(s, model_name(s["model"])) for r in reports for s in r["summary"]]
    models = list(dict.fromkeys(name for _, name in summary))

    def over_shots(key, scale):
        def draw(axis):
            for colour, name in zip(COLOURS * len(models), models):
                rows = sorted((s["shots"], scale * s[key], scale * s[f"{key}_sd"]) for s, n in summary if n == name)
                x = range(len(rows))
                axis.plot(x, [m for _, m, _ in rows], "-o", color=colour, label=name, markersize=3.5)
                axis.fill_between(x, [m - d for _, m, d in rows], [m + d for _, m, d in rows], color=colour, alpha=0.18, linewidth=0)
                axis.set_xticks(list(x), [str(n) for n, _, _ in rows])
            axis.legend()
        return draw

    def over_steps(axis):
        for colour, name in zip(COLOURS * len(models), models):
            rows = [r for report in reports for r in report["few_shot"] if model_name(r["model"]) == name]
            largest = max(r["shots"] for r in rows)
            curves = [r["curve"] for r in rows if r["shots"] == largest]
            steps = sorted(map(int, set.intersection(*(set(c) for c in curves))))
            axis.plot(range(len(steps)), [sum(c[str(s)] for c in curves) / len(curves) for s in steps], "-o", color=colour, label=name, markersize=3.5)
            axis.set_xticks(range(len(steps)), map(str, steps))
        axis.set_title(f"adapting on {largest} examples")
        axis.legend()

    return [("few-shot accuracy", "exact answers (%)", "examples", over_shots("accuracy", 100)), ("few-shot loss", "test loss (nats/token)", "examples", over_shots("loss", 1)),
            ("adaptation", "test loss (nats/token)", "adaptation steps", over_steps)]


def benchmark_panels(folders: list[Path]) -> list:
    """Bars of accuracy with 95% intervals, benchmarks side by side, one colour a model."""
    results = defaultdict(dict)
    for f in folders:
        for model, benchmarks in json.loads((f / "results.json").read_text())["benchmarks"].items():
            results[model_name(model)] |= benchmarks
    names = list(dict.fromkeys(n for b in results.values() for n in b))

    def draw(axis):
        present = [[m for m in results if n in results[m]] for n in names]
        width = 0.8 / max(map(len, present))
        for colour, (model, b) in zip(COLOURS * len(results), results.items()):
            shown = [(i + width * (ms.index(model) - (len(ms) - 1) / 2), b[n]) for i, (n, ms) in enumerate(zip(names, present, strict=True)) if n in b]
            rows = [r for _, r in shown]
            errors = [[100 * (r["accuracy"] - r["interval"][0]) for r in rows], [100 * (r["interval"][1] - r["accuracy"]) for r in rows]]
            axis.bar([x for x, _ in shown], [100 * r["accuracy"] for r in rows], width * 0.92, color=colour, label=model, yerr=errors, error_kw={"linewidth": 1.2, "capsize": 3})
        axis.set_xticks(range(len(names)), [textwrap.fill(n.replace("_", " "), 13) for n in names], fontsize=10 if len(names) < 4 else 8)
        axis.grid(axis="x", visible=False)
        axis.legend()

    return [("benchmarks, 95% intervals", "accuracy (%)", "", draw)]


def figure(folders: Sequence[Path], out: Path, labels: Sequence[str] = ()) -> None:
    """All panels that the folders give, in rows of two or three, readable at the width of a page."""
    folders = [Path(f) for f in folders]
    runs = [f for f in folders if (f / "metrics.jsonl").exists()]
    reports = {f: json.loads((f / "results.json").read_text()) for f in folders if f not in runs}
    names = dict(zip(folders, labels, strict=False)) if labels else {}
    groups: dict[str, list[Path]] = {}
    for key in dict.fromkeys(settings(r) for r in runs):
        same = [r for r in runs if settings(r) == key]
        groups[names.get(same[0], same[0].resolve().name)] = same
    panels = []
    for make, wanted in ((training_panels, False), (dynamics_panels, True)):
        if chosen := {k: v for k, v in groups.items() if any("mu" in m for m in read(v[0], "metrics.jsonl")[:1]) == wanted}:
            panels += make(chosen)
    if studies := [f for f, r in reports.items() if "few_shot" in r]:
        panels += few_shot_panels(studies)
    if tables := [f for f, r in reports.items() if "benchmarks" in r]:
        panels += benchmark_panels(tables)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=(3.7 * columns if columns > 1 else 5, 3.0 * rows), squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, ylabel, xlabel, draw) in zip(axes.flat, panels, strict=False):
            axis.set(title=title, ylabel=ylabel, xlabel=xlabel)
            draw(axis)
            shown = axis.get_legend_handles_labels()[1]
            crowded = len(groups) > 3 and axis is not axes.flat[0] and set(shown) <= set(groups)  # one legend of many runs is enough
            if shown and not crowded and axis.get_legend() is None:
                axis.legend()
        fig.savefig(out)
        plt.close(fig)


@dataclass
class Args:
    """Draw run folders (metrics.jsonl) and evaluation folders (results.json)."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders."""
    out: Path = Path("curves.png")
    """The picture to write (.png, .svg, .pdf)."""
    labels: tuple[str, ...] = ()
    """A name for each folder (default: the folder's)."""


if __name__ == "__main__":
    args = tyro.cli(Args)
    missing = [str(r) for r in args.runs if not read(r, "metrics.jsonl") and not (r / "results.json").exists()]
    if missing or not args.runs:
        print(f"plots.py: neither metrics.jsonl nor results.json in {', '.join(missing)}" if missing else "plots.py: name at least one run or evaluation folder", file=sys.stderr)
        sys.exit(2)
    figure(args.runs, args.out, args.labels)
    print(args.out)
