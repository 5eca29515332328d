"""Pictures from run folders.

    python plots.py runs/fomaml runs/joint --out comparison.png

Reads metrics.jsonl and evaluations.jsonl of each run: the query loss after adaptation over meta-steps (smoothed, raw values
faint), and held-out loss and accuracy before (dashed) and after adaptation (solid) at each evaluation.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import tyro

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: colour-blind safe
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.titlesize": 10.5,
         "lines.linewidth": 1.8, "legend.frameon": False, "savefig.dpi": 150, "figure.constrained_layout.use": True}


def read(run: Path, name: str) -> list[dict]:
    file = Path(run) / name
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window that shrinks at both ends."""
    half = window // 2
    return [sum(values[max(0, i - half) : i + half + 1]) / len(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def training_curves(runs: Sequence[Path], out: Path, labels: Sequence[str] = ()) -> None:
    """One row of panels; several runs are drawn over each other and named by their folders (or labels)."""
    runs = [Path(r) for r in runs]
    labels = list(labels) or [r.resolve().name for r in runs]
    evaluations = [read(r, "evaluations.jsonl") for r in runs]
    with_accuracy = any("accuracy_after" in row["mean"] for rows in evaluations for row in rows)
    count = 1 + any(evaluations) + with_accuracy
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(1, count, figsize=(3.6 * count, 3.1), squeeze=False)
        for colour, run, label, rows in zip(COLOURS * len(runs), runs, labels, evaluations):
            metrics = [m for m in read(run, "metrics.jsonl") if m["meta/loss"] == m["meta/loss"]]
            steps, loss = [m["step"] for m in metrics], [m["meta/loss"] for m in metrics]
            axes[0, 0].plot(steps, loss, color=colour, alpha=0.2, linewidth=1)
            axes[0, 0].plot(steps, smooth(loss, max(3, len(loss) // 10)), color=colour, label=label)
            for axis, key, scale in list(zip(axes[0, 1:], ("loss", "accuracy"), (1, 100), strict=False)):
                if rows and f"{key}_after" in rows[0]["mean"]:
                    x = [r["step"] for r in rows]
                    for when, line in (("before", "--"), ("after", "-")):
                        axis.plot(x, [scale * r["mean"][f"{key}_{when}"] for r in rows], line, color=colour, marker="o", markersize=3.5,
                                  label=f"{when} adaptation" if len(runs) == 1 else label if when == "after" else None)
        axes[0, 0].set(title="training tasks", ylabel="query loss after adaptation (nats/token)")
        if any(evaluations):
            axes[0, 1].set(title="evaluation tasks", ylabel="test loss (nats/token)")
        if with_accuracy:
            axes[0, 2].set(title="evaluation tasks", ylabel="exact answers (%)", ylim=(0, None))
        for axis in axes[0]:
            axis.set(xlabel="meta-step")
        for axis in axes[0, :1] if len(runs) > 1 else axes[0, 1:]:
            axis.legend(fontsize=8.5)
        if len(runs) > 1 and count > 1:
            axes[0, 1].plot([], [], "--", color="grey", label="before adaptation")
            axes[0, 1].plot([], [], "-", color="grey", label="after adaptation")
            axes[0, 1].legend(handles=axes[0, 1].lines[-2:], fontsize=8.5)
        fig.savefig(out)
        plt.close(fig)


@dataclass
class Args:
    """Draw the training curves of one or several runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""
    out: Path = Path("curves.png")
    """The picture to write (.png, .svg, .pdf)."""
    labels: tuple[str, ...] = ()
    """A name for each run (default: the folder's)."""


if __name__ == "__main__":
    args = tyro.cli(Args)
    if missing := [str(r) for r in args.runs if not read(r, "metrics.jsonl")]:
        print(f"plots.py: no metrics.jsonl in {', '.join(missing)}", file=sys.stderr)
        sys.exit(2)
    training_curves(args.runs, args.out, args.labels)
    print(args.out)
