"""Pictures from run folders and evaluation folders.

    # runs over each other: losses, accuracy, gain of adaptation; of amft.py mu, entropy, reward
    python plots.py runs/fomaml runs/joint --out comparison.png
    python plots.py runs/amft runs/rl runs/sft --out dynamics.png
    # few-shot curves with bands; benchmark accuracy with 95% intervals
    python plots.py evals/study --out few_shot.png
    python plots.py evals/math evals/gsm8k --out accuracy.png

What a folder holds decides its panels; folders of any kinds may be mixed. Runs that differ in
nothing but the seed become one line, their mean, with a band from the lowest to the highest. Raw
values are faint, smoothed ones strong. Dashed, with open points, is before adaptation.
"""

import itertools
import json
import signal
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro
from matplotlib.backend_bases import FigureCanvasBase

# Okabe and Ito: can be told apart by the colour-blind
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#777777"
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10.5,
    "lines.linewidth": 1.8,
    "lines.markersize": 3.5,
    "lines.dashed_pattern": (3.0, 1.5),
    "lines.dotted_pattern": (1.0, 1.2),
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 3.6,  # three dashes
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
}
# How a line is drawn, as matplotlib's properties
SOLID = {"linestyle": "-"}
DASHED = {"linestyle": "--"}
AFTER = {"linestyle": "-", "marker": "o"}
BEFORE = {"linestyle": "--", "marker": "o", "markerfacecolor": "white"}
TEST_SETS = (AFTER, BEFORE, {"linestyle": ":", "marker": "s", "markerfacecolor": "white"})


class Panel(NamedTuple):
    title: str
    ylabel: str
    xlabel: str
    draw: Callable  # draw(axis)


@dataclass
class Setting:
    """Runs that differ in nothing but the seed: of each its metrics and its evaluations."""

    label: str
    colour: str
    metrics: list[list[dict]]
    evaluations: list[list[dict]]

    def has(self, name: str) -> bool:
        """Whether a run logged this metric."""
        return any(name in row for row in itertools.chain(*self.metrics))


Series = list[tuple[float, float]]  # points (x, y)


# --------------------------------------------------------------------------------------------------
# Reading


class PlotError(ValueError):
    """The folders cannot be drawn; the message is one line for the user."""


def read(folder: Path, name: str) -> list[dict]:
    """Rows of a .jsonl file; none where there is no file."""
    file, rows = Path(folder) / name, []
    if not file.exists():
        return rows
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):  # a kill may leave half a line
            rows.append(json.loads(line))
    return rows


def results(folder: Path) -> dict:
    """What eval.py has measured. Raises PlotError."""
    file = folder / "results.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise PlotError(f"cannot read {file}: it is damaged") from None


def seedless_args(run: Path) -> str:
    """What must be equal for two runs to be seeds of one setting."""
    file = run / "args.json"
    if not file.exists():
        return str(run)
    try:
        args = json.loads(file.read_text(encoding="utf-8"))["args"]
    except (ValueError, KeyError, TypeError):
        return str(run)
    free = ("seed", "output_dir", "resume")
    return json.dumps({k: v for k, v in args.items() if k not in free}, sort_keys=True)


def is_of_amft(run: Path) -> bool:
    return any("mu" in row for row in read(run, "metrics.jsonl")[:1])


def settings_of(runs: Iterable[Path], names: dict[Path, str]) -> list[Setting]:
    """Runs as settings, each with the name of its first run and a colour."""
    groups = defaultdict(list)
    for run in runs:
        groups[seedless_args(run)].append(run)
    settings = []
    for i, seeds in enumerate(groups.values()):
        setting = Setting(
            label=names.get(seeds[0], seeds[0].resolve().name),
            colour=COLOURS[i % len(COLOURS)],
            metrics=[read(run, "metrics.jsonl") for run in seeds],
            evaluations=[read(run, "evaluations.jsonl") for run in seeds],
        )
        settings.append(setting)
    return settings


def model_name(model: str) -> str:
    """runs/NAME/checkpoint -> NAME; else the last part of a folder or hub name. An arm of eval.py's
    study that is named behind the model stays."""
    model, bracket, arm = model.partition(" (")
    path = Path(model)
    name = path.parent.name if path.name in ("checkpoint", "merged") else path.name
    return name + bracket + arm


# --------------------------------------------------------------------------------------------------
# Lines


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window that shrinks at both ends."""
    half = window // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]


def line(
    axis,
    seeds: list[Series],
    colour: str,
    style: dict = SOLID,
    label: str | None = None,
    window: int = 1,
) -> None:
    """One setting: a single seed as a line over its faint raw values, several as mean and range."""
    seeds = [dict(series) for series in seeds if series]
    if not seeds:
        return
    xs = sorted(set.intersection(*map(set, seeds)))
    mean, low, high = [], [], []
    for x in xs:
        ys = [series[x] for series in seeds]
        mean.append(sum(ys) / len(ys))
        low.append(min(ys))
        high.append(max(ys))
    if len(seeds) > 1:
        low, high = smooth(low, window), smooth(high, window)
        axis.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
    elif window > 1:
        axis.plot(xs, mean, color=colour, alpha=0.2, linewidth=1)
    axis.plot(xs, smooth(mean, window), color=colour, label=label, **style)


def name_style(axis, style: dict, label: str) -> None:
    """Says in the legend what a style means, where colours tell runs apart."""
    axis.plot([], [], color=GREY, label=label, **style)


def from_zero(axis) -> None:
    """The axis starts at 0, with room for a line that lies there."""
    top = max(1.0, axis.get_ylim()[1])
    axis.set_ylim(-0.04 * top, top)


# --------------------------------------------------------------------------------------------------
# Runs of fomaml.py and meta_lora.py


def training_panels(settings: list[Setting]) -> list[Panel]:
    panels = [
        Panel(
            "training tasks, after adaptation",
            "query loss (nats/token)",
            "meta-step",
            partial(draw_metric, settings, "meta/loss", 10),
        )
    ]
    rows = all_evaluations(settings)
    if not rows:
        return panels
    losses = partial(draw_adaptation, settings, "loss", 1)
    panels.append(Panel("evaluation tasks", "test loss (nats/token)", "meta-step", losses))
    if any("accuracy_after" in row["mean"] for row in rows):
        accuracies = partial(draw_adaptation, settings, "accuracy", 100)
        panels.append(Panel("evaluation tasks", "exact answers (%)", "meta-step", accuracies))
    if adaptation_curves(settings[0].evaluations, -1):
        curves = partial(draw_adaptation_curves, settings)
        panels.append(Panel("adapting to new tasks", "exact answers (%)", "inner step", curves))
    else:
        gains = partial(draw_gains, settings)
        panels.append(
            Panel("gain of adaptation by task", "", "loss before - after (nats/token)", gains)
        )
    return panels


def adaptation_curves(evaluations: list[list[dict]], which: int) -> list[Series]:
    """Of each seed the accuracy (%) after 0 to K inner steps, mean over tasks, at its first (0) or
    last (-1) evaluation; none where it was not measured."""
    curves = []
    for rows in evaluations:
        tasks = rows[which]["tasks"].values() if rows else ()
        if tasks and all("accuracy" in task.get("steps", [{}])[0] for task in tasks):
            by_task = [[step["accuracy"] for step in task["steps"]] for task in tasks]
            means = [100 * sum(values) / len(values) for values in zip(*by_task, strict=True)]
            curves.append(list(enumerate(means)))
    return curves


def draw_adaptation_curves(settings: list[Setting], axis) -> None:
    """Accuracy over the inner steps at the end of each setting; of a single one also at its start,
    and, as horizontal lines, with the support rows in the prompt instead of any step."""
    single = len(settings) == 1
    for setting in settings:
        moments = [(-1, setting.colour, AFTER, "after meta-training" if single else setting.label)]
        if single:
            moments.insert(0, (0, GREY, BEFORE, "before meta-training"))
        for which, colour, style, label in moments:
            line(axis, adaptation_curves(setting.evaluations, which), colour, style, label)
            in_context = []
            for rows in filter(None, setting.evaluations):
                if "accuracy_in_context" in rows[which]["mean"]:
                    in_context.append(100 * rows[which]["mean"]["accuracy_in_context"])
            if in_context and single:
                height = sum(in_context) / len(in_context)
                axis.axhline(height, color=colour, linestyle=":", linewidth=1.2)
    if single and in_context:
        name_style(axis, {"linestyle": ":"}, "in the prompt instead")
    from_zero(axis)


def all_evaluations(settings: list[Setting]) -> list[dict]:
    rows = []
    for setting in settings:
        rows += itertools.chain(*setting.evaluations)
    return rows


def draw_metric(settings: list[Setting], name: str, windows: int, axis) -> None:
    """A metric over the steps, smoothed over a part of them: 1/windows. windows 0: as it is."""
    for setting in settings:
        seeds = []
        for rows in setting.metrics:
            rows = [row for row in rows if name in row]
            # a skipped step's loss is nan, which equals nothing
            seeds.append([(row["step"], row[name]) for row in rows if row[name] == row[name]])
        window = max(3, max(map(len, seeds)) // windows) if windows else 1
        label = setting.label if len(settings) > 1 else None
        line(axis, seeds, setting.colour, label=label, window=window)


def draw_adaptation(settings: list[Setting], quantity: str, scale: float, axis) -> None:
    """Loss or accuracy on the evaluation tasks before and after adaptation, over the steps.

    The legend tells the two apart; which run has which colour, the first panel's says.
    """
    single = len(settings) == 1
    for when, style in (("before", BEFORE), ("after", AFTER)):
        name, label = f"{quantity}_{when}", f"{when} adaptation"
        for setting in settings:
            seeds = []
            for rows in setting.evaluations:
                rows = [row for row in rows if name in row["mean"]]
                seeds.append([(row["step"], scale * row["mean"][name]) for row in rows])
            line(axis, seeds, setting.colour, style, label if single else None)
        if not single:
            name_style(axis, style, label)
    if quantity == "accuracy":
        from_zero(axis)


def draw_gains(settings: list[Setting], axis) -> None:
    """By task, how far adaptation lowers the loss: at the end of each setting; of a single one also
    at its start."""
    names = list(all_evaluations(settings)[0]["tasks"])[::-1]
    bars = []  # (label, colour, evaluations of its seeds)
    for setting in settings:
        seeds = [rows for rows in setting.evaluations if rows]
        label = setting.label
        if len(settings) == 1:
            label = "after training"
            bars.append(("before training", "#BBBBBB", [rows[0]["tasks"] for rows in seeds]))
        if seeds:
            bars.append((label, setting.colour, [rows[-1]["tasks"] for rows in seeds]))
    height = 0.8 / len(bars)
    for j, (label, colour, seeds) in enumerate(bars):
        values = []
        for name in names:
            tasks = [tasks[name] for tasks in seeds if name in tasks]
            gains = [task["loss_before"] - task["loss_after"] for task in tasks]
            values.append(sum(gains) / len(gains) if gains else 0.0)
        places = [i + height * (len(bars) - 1 - j) for i in range(len(names))]
        axis.barh(places, values, height, color=colour, label=label)
    short = [name.split("/")[-1].replace("_", " ") for name in names]
    axis.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], short, fontsize=8)
    axis.grid(axis="y", visible=False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=2, handlelength=2)


# --------------------------------------------------------------------------------------------------
# Runs of amft.py


def dynamics_panels(settings: list[Setting]) -> list[Panel]:
    """Accuracy on each test set, reward, mu, entropy and its target, length, what moved mu."""
    test_sets = {}
    for row in all_evaluations(settings):
        test_sets |= row["tasks"]
    accuracy = partial(draw_test_sets, settings, list(test_sets))
    panels = [Panel("test sets, greedy", "accuracy (%)", "step", accuracy)]
    for name, title, ylabel, draw in (
        ("reward/mean", "reward of own samples", "mean reward", None),
        ("mu", "weight of imitation", "mu", partial(draw_metric, settings, "mu", 0)),
        ("entropy", "policy entropy", "nats/token", partial(draw_entropy, settings)),
        ("response_length", "response length", "tokens", None),
    ):
        if any(setting.has(name) for setting in settings):
            draw = draw or partial(draw_metric, settings, name, 12)
            panels.append(Panel(title, ylabel, "step", draw))
    first = settings[0]
    if any(moved_mu(row) for row in first.metrics[0]):
        title = "what moved mu" if len(settings) == 1 else f"what moved mu ({first.label})"
        draw = partial(draw_mu_changes, first)
        panels.append(Panel(title, "summed change of mu", "step", draw))
    return panels


def draw_test_sets(settings: list[Setting], names: list[str], axis) -> None:
    single = len(settings) == 1
    for setting in settings:
        for k, (name, style) in enumerate(zip(names, TEST_SETS, strict=False)):
            seeds = []
            for rows in setting.evaluations:
                rows = [row for row in rows if name in row["tasks"]]
                seeds.append([(row["step"], 100 * row["tasks"][name]["accuracy"]) for row in rows])
            label = name if single else None
            if k == 0 and not single:
                label = setting.label
            line(axis, seeds, setting.colour, style, label)
    if not single:
        for name, style in zip(names, TEST_SETS, strict=False):
            name_style(axis, style, name)
    from_zero(axis)


def draw_entropy(settings: list[Setting], axis) -> None:
    draw_metric(settings, "entropy", 12, axis)
    single = len(settings) == 1
    for setting in settings:
        seeds = []
        for rows in setting.metrics:
            rows = [row for row in rows if "entropy_target" in row]
            seeds.append([(row["step"], row["entropy_target"]) for row in rows])
        line(axis, seeds, setting.colour, DASHED, "target H*" if single else None)
    if not single and any(setting.has("entropy_target") for setting in settings):
        name_style(axis, DASHED, "target H*")


MU_CHANGES = {
    "mu_change/meta_gradient": "meta-gradient",
    "mu_change/entropy": "entropy term",
}


def moved_mu(row: dict) -> bool:
    return any(row.get(name) for name in MU_CHANGES)


def draw_mu_changes(setting: Setting, axis) -> None:
    """The parts of mu's changes, summed over the steps, of a setting's first seed."""
    for colour, (name, label) in zip(COLOURS, MU_CHANGES.items(), strict=False):
        if not any(row.get(name) for row in setting.metrics[0]):  # a term without a weight
            continue
        height, series = 0.0, []
        for row in setting.metrics[0]:
            height += row.get(name, 0.0)
            series.append((row["step"], height))
        line(axis, [series], colour, label=label)


# --------------------------------------------------------------------------------------------------
# Evaluations


def few_shot_panels(reports: list[dict]) -> list[Panel]:
    """Accuracy and loss over the number of examples (mean, one standard deviation over seeds); loss
    over adaptation steps at the largest number."""
    summaries, rows = defaultdict(list), defaultdict(list)  # by model
    for report in reports:
        for summary in report["summary"]:
            summaries[model_name(summary["model"])].append(summary)
        for row in report["few_shot"]:
            rows[model_name(row["model"])].append(row)
    accuracy = partial(draw_shots, summaries, "accuracy", 100)
    loss = partial(draw_shots, summaries, "loss", 1)
    shots = max(row["shots"] for row in itertools.chain(*rows.values()))
    curves = partial(draw_curves, rows)
    return [
        Panel("few-shot accuracy", "exact answers (%)", "examples", accuracy),
        Panel("few-shot loss", "test loss (nats/token)", "examples", loss),
        Panel(
            f"adapting on {shots} examples", "test loss (nats/token)", "adaptation steps", curves
        ),
    ]


def coloured(names: Iterable[str]) -> list[tuple[str, str]]:
    """(name, colour) of each."""
    return [(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(names)]


def draw_shots(summaries: dict[str, list[dict]], quantity: str, scale: float, axis) -> None:
    shots = sorted({row["shots"] for rows in summaries.values() for row in rows})
    for name, colour in coloured(summaries):
        rows = sorted(summaries[name], key=lambda s: s["shots"])
        places = [shots.index(row["shots"]) for row in rows]
        mean = [scale * s[quantity] for s in rows]
        deviation = [scale * s[f"{quantity}_sd"] for s in rows]
        low = [m - d for m, d in zip(mean, deviation, strict=True)]
        high = [m + d for m, d in zip(mean, deviation, strict=True)]
        axis.plot(places, mean, color=colour, label=name, **AFTER)
        axis.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.set_xticks(range(len(shots)), map(str, shots))
    axis.legend()


def draw_curves(rows: dict[str, list[dict]], axis) -> None:
    curves = {name: mean_curve(rows[name]) for name in rows}
    steps = sorted(set().union(*curves.values()))
    for name, colour in coloured(rows):
        mean = list(curves[name].values())
        if len(mean) == 1:  # in context: no steps at all
            axis.axhline(mean[0], color=colour, linestyle=":", label=name)
            continue
        places = [steps.index(step) for step in curves[name]]
        axis.plot(places, mean, color=colour, label=name, **AFTER)
    axis.set_xticks(range(len(steps)), map(str, steps))
    axis.legend()


def mean_curve(rows: list[dict]) -> dict[int, float]:
    """{step: loss}, of the rows with the most examples, at the steps that all of them have."""
    largest = max(row["shots"] for row in rows)
    curves = [row["curve"] for row in rows if row["shots"] == largest]
    steps = sorted(map(int, set.intersection(*map(set, curves))))
    return {step: sum(curve[str(step)] for curve in curves) / len(curves) for step in steps}


def benchmark_panels(reports: list[dict]) -> list[Panel]:
    """Bars of accuracy with 95% intervals, benchmarks side by side, one colour a model."""
    summaries = defaultdict(dict)  # {model: {benchmark: summary}}
    for report in reports:
        for model, benchmarks in report["benchmarks"].items():
            summaries[model_name(model)] |= benchmarks
    draw = partial(draw_benchmarks, summaries)
    return [Panel("benchmarks, 95% intervals", "accuracy (%)", "", draw)]


def draw_benchmarks(summaries: dict[str, dict], axis) -> None:
    present = defaultdict(list)  # {benchmark: models}
    for model, benchmarks in summaries.items():
        for name in benchmarks:
            present[name].append(model)
    width = 0.8 / max(map(len, present.values()))
    for model, colour in coloured(summaries):
        places, heights, below, above = [], [], [], []
        for i, (name, models) in enumerate(present.items()):
            if model in models:
                summary = summaries[model][name]
                low, high = summary["interval"]
                places.append(i + width * (models.index(model) - (len(models) - 1) / 2))
                heights.append(100 * summary["accuracy"])
                below.append(100 * (summary["accuracy"] - low))
                above.append(100 * (high - summary["accuracy"]))
        axis.bar(
            places,
            heights,
            width * 0.92,
            color=colour,
            label=model,
            yerr=[below, above],
            error_kw={"linewidth": 1.2, "capsize": 3},
        )
    ticks = [textwrap.fill(name.replace("_", " "), 13) for name in present]
    axis.set_xticks(range(len(ticks)), ticks, fontsize=10 if len(ticks) < 4 else 8)
    axis.grid(axis="x", visible=False)
    axis.legend(handlelength=2)


# --------------------------------------------------------------------------------------------------
# The figure


def figure(folders: Sequence[Path], out: Path, labels: Sequence[str] = ()) -> None:
    """All panels that the folders give, in rows of two or three: for the width of a page.

    Raises PlotError.
    """
    folders = [Path(f) for f in folders]
    names = dict(zip(folders, labels, strict=False))
    panels, run_labels = [], []
    runs = [f for f in folders if (f / "metrics.jsonl").exists()]
    amft_runs = [run for run in runs if is_of_amft(run)]
    meta_runs = [run for run in runs if run not in amft_runs]
    for chosen, make in ((meta_runs, training_panels), (amft_runs, dynamics_panels)):
        if settings := settings_of(chosen, names):
            panels += make(settings)
            run_labels += [setting.label for setting in settings]
    reports = [results(f) for f in folders if f not in runs]
    for key, make in (("few_shot", few_shot_panels), ("benchmarks", benchmark_panels)):
        if chosen := [report for report in reports if key in report]:
            panels += make(chosen)
    if not panels:
        raise PlotError(f"nothing to draw in {', '.join(map(str, folders))}")
    with plt.rc_context(STYLE):
        draw_panels(panels, run_labels, out)


def draw_panels(panels: list[Panel], run_labels: list[str], out: Path) -> None:
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (3.7 * columns if columns > 1 else 5, 3.0 * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for i, (axis, panel) in enumerate(zip(axes.flat, panels, strict=False)):
        axis.set(title=panel.title, ylabel=panel.ylabel, xlabel=panel.xlabel)
        panel.draw(axis)
        if axis.get_legend() is None:
            handles, shown = axis.get_legend_handles_labels()
            entries = dict(zip(shown, handles, strict=True))
            if len(run_labels) > 3 and i > 0:  # one legend of many runs is enough
                entries = {k: handle for k, handle in entries.items() if k not in run_labels}
            if entries:
                axis.legend(entries.values(), entries.keys())
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


def check(args: Args) -> None:
    """Raises PlotError for arguments that cannot work."""
    if not args.runs:
        raise PlotError("name at least one run or evaluation folder")
    if len(args.labels) > len(args.runs):
        raise PlotError(f"--labels: {len(args.labels)} names for {len(args.runs)} folders")
    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if args.out.suffix.removeprefix(".").lower() not in endings:
        raise PlotError(f"--out {args.out}: the ending must be one of {', '.join(endings)}")
    missing = []
    for folder in args.runs:
        if not read(folder, "metrics.jsonl") and not (folder / "results.json").exists():
            missing.append(str(folder))
    if missing:
        raise PlotError(f"neither metrics.jsonl nor results.json in {', '.join(missing)}")


def main(args: Args) -> int:
    check(args)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        figure(args.runs, args.out, args.labels)
    except (PlotError, OSError):
        raise
    except Exception as e:  # whatever rows of other programs or edited ones lead to
        reason = f"{type(e).__name__}: {str(e)[:100]}"
        raise PlotError(f"cannot draw {', '.join(map(str, args.runs))}: {reason}") from e
    print(args.out)
    return 0


def cli() -> int:
    try:
        return main(tyro.cli(Args))
    except (PlotError, OSError) as e:
        print(f"plots.py: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGPIPE):  # end without a traceback
        signal.signal(number, signal.SIG_DFL)
    sys.exit(cli())
