"""plots.py: what stands in the figures (lines, bars, bands, labels, limits), without their pixels;
folders that cannot be drawn."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import pytest
from matplotlib.colors import to_hex

import plots
from tests.helpers import run_here

BLUE, RED, GREEN, *_ = plots.COLOURS


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def axis():
    fig, axis = plt.subplots()
    yield axis
    plt.close(fig)


class Line(NamedTuple):
    """A line of a panel, as a reader sees it."""

    label: str | None  # in the legend
    colour: str
    style: str
    xs: object
    ys: object


def label_of(artist) -> str | None:
    label = artist.get_label()
    return None if label.startswith("_") else label


def drawn(axis) -> list[Line]:
    lines = []
    for line in axis.get_lines():
        xs, ys = list(line.get_xdata()), list(line.get_ydata())
        lines.append(
            Line(label_of(line), to_hex(line.get_color()).upper(), line.get_linestyle(), xs, ys)
        )
    return lines


def approx(*values: float):
    return pytest.approx(list(values))


def bands(axis) -> list[dict]:
    """Of each filled band {x: (low, high)}."""
    found = []
    for band in axis.collections:
        heights = {}
        for x, y in band.get_paths()[0].vertices.tolist():
            heights.setdefault(x, []).append(y)
        found.append({x: (min(ys), max(ys)) for x, ys in heights.items()})
    return found


class Bars(NamedTuple):
    label: str
    colour: str
    places: object  # of their middles
    lengths: object
    thickness: object


def bars(axis) -> list[Bars]:
    """Upright or lying bars, a row for each colour."""
    found = []
    for container in axis.containers:
        if not hasattr(container, "patches"):  # the error bars
            continue
        places, lengths, thickness = [], [], set()
        for bar in container.patches:
            lying = container.orientation == "horizontal"
            start, size = (
                (bar.get_y(), bar.get_height()) if lying else (bar.get_x(), bar.get_width())
            )
            places.append(start + size / 2)
            lengths.append(bar.get_width() if lying else bar.get_height())
            thickness.add(round(size, 9))
        colour = to_hex(container.patches[0].get_facecolor()).upper()
        found.append(Bars(container.get_label(), colour, places, lengths, thickness.pop()))
        assert not thickness
    return found


def setting(label="a", colour=BLUE, metrics=((),), evaluations=((),)) -> plots.Setting:
    return plots.Setting(label, colour, list(metrics), list(evaluations))


def write(folder: Path, **files) -> Path:
    """A folder with rows in .jsonl files, and dicts in .json files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, dict):
            (folder / f"{name}.json").write_text(json.dumps(content))
        else:
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, content)))
    return folder


# --------------------------------------------------------------------------------------------------
# Reading


def test_rows_of_a_file(tmp_path):
    assert plots.read(tmp_path, "none.jsonl") == []
    (tmp_path / "m.jsonl").write_bytes(b'{"a": 1}\n{"a": \n{"a": 2}\n\xff{"a"')
    assert plots.read(tmp_path, "m.jsonl") == [{"a": 1}, {"a": 2}]
    (tmp_path / "results.json").write_text('{"x": [1]}')
    assert plots.results(tmp_path) == {"x": [1]}
    (tmp_path / "results.json").write_text('{"x": [1')
    with pytest.raises(plots.PlotError, match=r"cannot read .*results.json: it is damaged"):
        plots.results(tmp_path)


def test_what_makes_seeds_of_one_setting(tmp_path):
    runs = {
        "one": {"lr": 0.1, "seed": 1, "output_dir": "x", "resume": False},
        "two": {"seed": 2, "resume": True, "output_dir": "y", "lr": 0.1},
        "other": {"lr": 0.2, "seed": 1, "output_dir": "x", "resume": False},
    }
    for name, args in runs.items():
        write(tmp_path / name, args={"args": args})
    one, two, other = (plots.seedless_args(tmp_path / name) for name in runs)
    assert one == two == '{"lr": 0.1}'
    assert other == '{"lr": 0.2}'
    for text in (None, '{"args', "{}", "[]", "5"):  # no file, damaged ones: each for itself
        folder = write(tmp_path / f"odd{len(text or '')}")
        if text:
            (folder / "args.json").write_text(text)
        assert plots.seedless_args(folder) == str(folder)


def test_the_order_of_settings_says_nothing(tmp_path):
    """Runs of other versions of a script may name them in another order."""
    one = write(tmp_path / "one", args={"args": {"lr": 0.1, "steps": 3, "seed": 1}})
    two = write(tmp_path / "two", args={"args": {"steps": 3, "seed": 2, "lr": 0.1}})
    assert len(plots.settings_of([one, two], {})) == 1


def test_settings_have_names_and_colours(tmp_path):
    """The name of the first run, or the one that was given; the eighth has the first colour."""
    folders = []
    for i in range(9):
        args = {"lr": 7 if i == 8 else i, "seed": i}
        row = {"step": i}
        folders.append(write(tmp_path / f"r{i}", args={"args": args}, metrics=[row, row]))
    write(folders[8], evaluations=[{"step": 3, "tasks": {}}])
    settings = plots.settings_of(folders, {folders[0]: "zero", folders[8]: "not the first"})
    assert [s.label for s in settings] == ["zero", "r1", "r2", "r3", "r4", "r5", "r6", "r7"]
    assert [s.colour for s in settings] == [*plots.COLOURS, plots.COLOURS[0]]
    assert settings[1].metrics == [[{"step": 1}, {"step": 1}]]
    assert settings[7].metrics == [[{"step": 7}] * 2, [{"step": 8}] * 2]
    assert settings[7].evaluations == [[], [{"step": 3, "tasks": {}}]]
    assert len(set(plots.COLOURS)) == 7


def test_kinds_of_runs(tmp_path):
    """The first row tells."""
    for name, rows, of_amft in (
        ("a", [{"mu": 0.5}, {}], True),
        ("b", [{"loss": 1}, {"mu": 0.5}], False),
        ("c", [], False),
    ):
        assert plots.is_of_amft(write(tmp_path / name, metrics=rows)) == of_amft
    several = setting(metrics=[[{"a": 1}, {"b": 1}], [{"c": 1}]])
    assert [several.has(name) for name in "abcd"] == [True, True, True, False]


@pytest.mark.parametrize(
    "model,name",
    [
        ("tiny", "tiny"),
        ("org/model", "model"),
        ("runs/fomaml/checkpoint", "fomaml"),
        ("runs/lora/merged", "lora"),
        ("runs/fomaml/step-000004", "step-000004"),
        ("runs/fomaml/checkpoint (in context)", "fomaml (in context)"),
    ],
)
def test_names_of_models(model, name):
    assert plots.model_name(model) == name


# --------------------------------------------------------------------------------------------------
# Lines


def test_smoothing():
    """A centred window, shorter at both ends; an even one is as wide as the next odd one."""
    values = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    five = approx(7 / 3, 15 / 4, 31 / 5, 62 / 5, 60 / 4, 56 / 3)
    assert plots.smooth(values, 5) == plots.smooth(values, 4) == five
    assert plots.smooth(values, 3) == approx(3 / 2, 7 / 3, 14 / 3, 28 / 3, 56 / 3, 24)
    assert plots.smooth(values, 1) == values


def test_line_of_a_single_seed(axis):
    """Its raw values are faint behind it where it is smoothed."""
    series = [(0, 4.0), (5, 1.0), (9, 7.0)]
    plots.line(axis, [], BLUE)
    plots.line(axis, [[], []], BLUE)
    assert not drawn(axis)
    plots.line(axis, [series, []], RED, plots.DASHED, "raw")
    plots.line(axis, [series], GREEN, window=2)
    assert drawn(axis) == [
        Line("raw", RED, "--", [0, 5, 9], [4.0, 1.0, 7.0]),
        Line(None, GREEN, "-", [0, 5, 9], [4.0, 1.0, 7.0]),
        Line(None, GREEN, "-", [0, 5, 9], approx(2.5, 4.0, 4.0)),
    ]
    alone, faint, strong = axis.get_lines()
    assert faint.get_alpha() < 0.3
    assert faint.get_linewidth() < strong.get_linewidth()
    assert alone.get_alpha() is strong.get_alpha() is None
    assert not axis.collections


def test_line_of_several_seeds(axis):
    """Mean and range at the steps that all have, in their order; both smoothed."""
    one = [(9, 2.0), (0, 0.0), (3, 6.0), (4, 1.0)]
    two = [(0, 4.0), (3, 2.0), (9, 5.0), (11, 100.0)]
    three = [(0, 5.0), (3, 1.0), (9, 2.0), (10, 100.0)]
    plots.line(axis, [one, two, three], BLUE, label="mean")
    assert drawn(axis) == [Line("mean", BLUE, "-", [0, 3, 9], approx(3, 3, 3))]
    assert bands(axis) == [{0: (0, 5), 3: (1, 6), 9: (2, 5)}]
    (band,) = axis.collections
    assert band.get_alpha() < 0.3
    assert list(band.get_linewidth()) == [0]
    assert to_hex(band.get_facecolor()[0]).upper() == BLUE
    plots.line(axis, [one, two], RED, window=3)
    assert drawn(axis)[1:] == [Line(None, RED, "-", [0, 3, 9], approx(3, 9.5 / 3, 3.75))]
    assert bands(axis)[1] == {
        0: approx_pair(1, 5),
        3: approx_pair(4 / 3, 5),
        9: approx_pair(2, 5.5),
    }


def approx_pair(low: float, high: float):
    return pytest.approx((low, high))


def test_axis_from_zero(axis):
    for top, expected in ((50, 50), (0.5, 1.0), (1.5, 1.5), (1.0, 1.0)):
        axis.set_ylim(-10, top)
        plots.from_zero(axis)
        assert axis.get_ylim() == approx_pair(-0.04 * expected, expected)


# --------------------------------------------------------------------------------------------------
# Runs of fomaml.py and meta_lora.py


def evaluation(step: int, steps=(), **numbers: float) -> dict:
    """A row of evaluations.jsonl: its mean, and one task with the accuracy after each step."""
    task = {"steps": [{"accuracy": a} for a in steps]} if steps else {}
    return {"step": step, "mean": numbers, "tasks": {"t": task}}


def titles(panels: list[plots.Panel]) -> list[tuple]:
    return [(p.title, p.ylabel, p.xlabel) for p in panels]


LOSS_PANEL = ("training tasks, after adaptation", "query loss (nats/token)", "meta-step")
EVALUATED = ("evaluation tasks", "test loss (nats/token)", "meta-step")
ANSWERED = ("evaluation tasks", "exact answers (%)", "meta-step")
CURVES = ("adapting to new tasks", "exact answers (%)", "inner step")
GAINS = ("gain of adaptation by task", "", "loss before - after (nats/token)")


def test_panels_of_training_runs():
    """What was measured decides; a run that was not evaluated does not count."""
    bare = setting()
    losses = setting(evaluations=[[evaluation(0, loss_before=1, loss_after=1)]])
    answers = setting(evaluations=[[evaluation(0, loss_after=1), evaluation(1, accuracy_after=1)]])
    curves = setting(evaluations=[[evaluation(0, (0.5, 1.0), accuracy_after=1)]])
    assert titles(plots.training_panels([bare])) == [LOSS_PANEL]
    assert titles(plots.training_panels([bare, losses])) == [LOSS_PANEL, EVALUATED, GAINS]
    assert titles(plots.training_panels([answers])) == [LOSS_PANEL, EVALUATED, ANSWERED, GAINS]
    assert titles(plots.training_panels([curves])) == [LOSS_PANEL, EVALUATED, ANSWERED, CURVES]


def test_what_the_training_panels_draw():
    rows = [{"step": i, "meta/loss": i * i} for i in range(50)]
    first = {"loss_before": 3.0, "loss_after": 2.0, "accuracy_before": 0.1, "accuracy_after": 0.2}
    evaluations = [evaluation(0, (0.1, 0.3), **first), evaluation(9, (0.4, 0.6), loss_after=1.0)]
    panels = plots.training_panels([setting(metrics=[rows], evaluations=[evaluations])])
    expected = [
        [Line(None, BLUE, "-", list(range(50)), [i * i for i in range(50)])],
        [
            Line("before adaptation", BLUE, "--", [0], [3.0]),
            Line("after adaptation", BLUE, "-", [0, 9], [2.0, 1.0]),
        ],
        [
            Line("before adaptation", BLUE, "--", [0], approx(10)),
            Line("after adaptation", BLUE, "-", [0], approx(20)),
        ],
        [
            Line("before meta-training", plots.GREY, "--", [0, 1], approx(10, 30)),
            Line("after meta-training", BLUE, "-", [0, 1], approx(40, 60)),
        ],
    ]
    for panel, lines in zip(panels, expected, strict=True):
        fig, axis = plt.subplots()
        panel.draw(axis)
        found = drawn(axis)
        if panel is panels[0]:
            smoothed = found.pop()
            # a window of a tenth of the 50 steps: 5
            assert smoothed.ys[20] == pytest.approx((18**2 + 19**2 + 20**2 + 21**2 + 22**2) / 5)
            assert smoothed.ys[0] == pytest.approx((0 + 1 + 4) / 3)
        assert found == lines
        plt.close(fig)


def test_windows_of_a_metric(axis):
    """A part of the longest seed's steps, at least three; without a part, the values themselves."""
    short, long = ([{"step": i, "x": i**3} for i in range(n)] for n in (70, 81))
    for windows, half in ((10, 4), (12, 3), (40, 1), (0, 0)):
        axis.clear()
        plots.draw_metric([setting(metrics=[short, long])], "x", windows, axis)
        (found,) = drawn(axis)
        assert found.label is None
        around = [i**3 for i in range(30 - half, 31 + half)]
        assert found.ys[30] == pytest.approx(sum(around) / len(around)), windows


def test_metrics_of_several_settings(axis):
    """Rows without the metric, and steps whose loss is nan, are left out."""
    first = [{"step": 0, "x": 1.0}, {"step": 1, "y": 5.0}, {"step": 2, "x": math.nan}]
    first.append({"step": 3, "x": 4.0})
    second = [{"step": 0, "x": 2.0}]
    settings = [setting("a", BLUE, [first]), setting("b", RED, [second])]
    plots.draw_metric(settings, "x", 0, axis)
    assert drawn(axis) == [
        Line("a", BLUE, "-", [0, 3], [1.0, 4.0]),
        Line("b", RED, "-", [0], [2.0]),
    ]


def test_points_are_open_before_adaptation(axis):
    """And full after it; a loss of the training has no points."""
    rows = [evaluation(0, loss_before=2.0, loss_after=1.0)]
    plots.draw_adaptation([setting(evaluations=[rows])], "loss", 1, axis)
    before, after = axis.get_lines()
    assert before.get_marker() == after.get_marker() == "o"
    assert to_hex(before.get_markerfacecolor()) == "#ffffff"
    assert to_hex(after.get_markerfacecolor()).upper() == BLUE
    axis.clear()
    tasks = {name: {"accuracy": 0.5} for name in "xyz"}
    plots.draw_test_sets([setting(evaluations=[[{"step": 0, "tasks": tasks}]])], list("xyz"), axis)
    points = [(line.get_marker(), to_hex(line.get_markerfacecolor())) for line in axis.get_lines()]
    assert len(set(points)) == 3  # a single evaluation is points alone: they tell the sets apart
    assert all(marker not in ("None", "") for marker, _ in points)
    axis.clear()
    plots.draw_metric([setting(metrics=[[{"step": 0, "x": 1.0}]])], "x", 0, axis)
    assert {line.get_marker() for line in axis.get_lines()} == {"None"}


def test_adaptation_of_several_settings(axis):
    """Colours tell the runs apart, dashes before from after; accuracies from zero, in percent."""
    one = [evaluation(0, accuracy_before=0.25, accuracy_after=0.5), evaluation(4)]
    two = [evaluation(0, accuracy_after=0.75)]
    settings = [setting("a", BLUE, evaluations=[one]), setting("b", RED, evaluations=[two])]
    plots.draw_adaptation(settings, "accuracy", 100, axis)
    assert drawn(axis) == [
        Line(None, BLUE, "--", [0], [25.0]),
        Line("before adaptation", plots.GREY, "--", [], []),
        Line(None, BLUE, "-", [0], [50.0]),
        Line(None, RED, "-", [0], [75.0]),
        Line("after adaptation", plots.GREY, "-", [], []),
    ]
    low, high = axis.get_ylim()
    assert low == pytest.approx(-0.04 * high)
    axis.clear()
    rows = [evaluation(0, loss_before=10.0, loss_after=9.0), evaluation(1, loss_after=9.5)]
    plots.draw_adaptation([setting(evaluations=[rows])], "loss", 2, axis)
    assert drawn(axis) == [
        Line("before adaptation", BLUE, "--", [0], [20.0]),
        Line("after adaptation", BLUE, "-", [0, 1], [18.0, 19.0]),
    ]
    assert axis.get_ylim()[0] > 1  # losses do not start at zero


def curve_rows() -> list[list[dict]]:
    """Two seeds of two evaluations of two tasks; a third seed that was never evaluated."""
    seeds = []
    for shift in (0.0, 0.2):
        rows = []
        for step, gain, prompted in ((0, 0.1, 0.3), (8, 0.4, 0.5)):
            tasks = {}
            for name, base in (("t", 0.0), ("u", 0.2)):
                accuracies = [base + shift, base + shift + gain]
                tasks[name] = {"steps": [{"accuracy": a} for a in accuracies]}
            mean = {"accuracy_in_context": prompted + shift}
            rows.append({"step": step, "mean": mean, "tasks": tasks})
        seeds.append(rows)
    return [*seeds, []]


def test_curves_of_adaptation():
    first, second = plots.adaptation_curves(curve_rows(), 0)
    assert first == [(0, pytest.approx(10)), (1, pytest.approx(20))]
    assert second == [(0, pytest.approx(30)), (1, pytest.approx(40))]
    last, _ = plots.adaptation_curves(curve_rows(), -1)
    assert last == [(0, pytest.approx(10)), (1, pytest.approx(50))]
    partly = curve_rows()[0]
    partly[0]["tasks"]["u"] = {"loss_after": 1.0}  # one task was measured before and after only
    partly[1]["tasks"]["u"] = {"steps": [{"loss": 1.0}]}  # or without answers
    assert plots.adaptation_curves([partly], 0) == plots.adaptation_curves([partly], -1) == []
    assert plots.adaptation_curves([[{"tasks": {}}], []], 0) == []


def test_drawn_curves_of_adaptation(axis):
    """Of one setting at its start and its end, with what the rows in the prompt reach."""
    plots.draw_adaptation_curves([setting(evaluations=curve_rows()[:2])], axis)
    assert drawn(axis) == [
        Line("before meta-training", plots.GREY, "--", [0, 1], approx(20, 30)),
        Line(None, plots.GREY, ":", [0, 1], approx(40, 40)),
        Line("after meta-training", BLUE, "-", [0, 1], approx(20, 60)),
        Line(None, BLUE, ":", [0, 1], approx(60, 60)),
        Line("in the prompt instead", plots.GREY, ":", [], []),
    ]
    low, high = axis.get_ylim()
    assert low == pytest.approx(-0.04 * high)
    axis.clear()
    first, second, _ = curve_rows()
    settings = [
        setting("a", BLUE, evaluations=[first]),
        setting("b", RED, evaluations=[second]),
    ]
    plots.draw_adaptation_curves(settings, axis)
    assert drawn(axis) == [
        Line("a", BLUE, "-", [0, 1], approx(10, 50)),
        Line("b", RED, "-", [0, 1], approx(30, 70)),
    ]


def test_curves_beside_runs_that_were_not_evaluated(axis):
    """A seed or a setting that has only begun takes nothing from the picture of the others."""
    plots.draw_adaptation_curves([setting(evaluations=curve_rows())], axis)
    found = drawn(axis)
    assert [line.ys for line in found[:2]] == [approx(20, 30), approx(40, 40)]
    axis.clear()
    first, *_ = curve_rows()
    begun = setting("b", RED, evaluations=[[]])
    plots.draw_adaptation_curves([setting("a", BLUE, evaluations=[first]), begun], axis)
    assert drawn(axis) == [Line("a", BLUE, "-", [0, 1], approx(10, 50))]


def test_curves_without_prompts(axis):
    """No line for what was not measured."""
    rows = curve_rows()[0]
    for row in rows:
        row["mean"] = {}
    plots.draw_adaptation_curves([setting(evaluations=[rows])], axis)
    assert [line.label for line in drawn(axis)] == ["before meta-training", "after meta-training"]


def gain_row(step: int, **gains: float) -> dict:
    """Tasks by gain."""
    tasks = {}
    for name, gain in gains.items():
        tasks[f"S/{name}"] = {"loss_before": 2.0, "loss_after": 2.0 - gain}
    return {"step": step, "tasks": tasks}


def test_gains_by_task(axis):
    """The first task on top; the bars of a task side by side around its name."""
    one = [gain_row(0, first_task=0.5, second=-0.25, third=0), gain_row(3), gain_row(9, third=1)]
    one[-1] = gain_row(9, first_task=1.0, second=0.75, third=1.5)
    two = [gain_row(9, first_task=2.0, second=0.25, third=0.5)]
    plots.draw_gains([setting("a", evaluations=[one, two, []])], axis)
    assert bars(axis) == [
        Bars("before training", "#BBBBBB", approx(0.4, 1.4, 2.4), approx(0.25, 0, 1.25), 0.4),
        Bars("after training", BLUE, approx(0, 1, 2), approx(1.0, 0.5, 1.5), 0.4),
    ]
    assert axis.get_yticks().tolist() == approx(0.2, 1.2, 2.2)
    ticks = [tick.get_text() for tick in axis.get_yticklabels()]
    assert ticks == ["third", "second", "first task"]
    assert {tick.get_fontsize() for tick in axis.get_yticklabels()} == {8}
    assert axis.get_legend() is not None
    assert not any(line.get_visible() for line in axis.get_ygridlines())
    axis.clear()
    others = [setting(name, colour, evaluations=[two]) for name, colour in plots.coloured("abc")]
    plots.draw_gains([*others, setting("not evaluated", evaluations=[[]])], axis)
    found = bars(axis)
    assert [bar.label for bar in found] == ["a", "b", "c"]
    assert [bar.colour for bar in found] == [BLUE, RED, GREEN]
    thickness = 0.8 / 3
    for bar, place in zip(found, (2 * thickness, thickness, 0), strict=True):
        assert bar.places == approx(place, place + 1, place + 2)
        assert bar.thickness == pytest.approx(thickness)
    assert axis.get_yticks()[0] == pytest.approx(thickness)  # of the middle bar


# --------------------------------------------------------------------------------------------------
# Runs of amft.py


def test_panels_of_amft(axis):
    rows = [{"step": i, "reward/mean": i**3, "mu": i**3, "response_length": 1} for i in range(37)]
    tasks = [{"step": 0, "tasks": {"x": {"accuracy": 0.5}}}]
    tasks.append({"step": 1, "tasks": {"y": {"accuracy": 1.0}}})
    entropy = [{"step": 0, "mu": 1.0}, {"step": 1, "entropy": 1.0, "mu_change/entropy": 0.5}]
    one, two = setting("a", BLUE, [rows], [tasks]), setting("b", RED, [entropy])
    test_sets = ("test sets, greedy", "accuracy (%)", "step")
    reward = ("reward of own samples", "mean reward", "step")
    mu = ("weight of imitation", "mu", "step")
    of_entropy = ("policy entropy", "nats/token", "step")
    length = ("response length", "tokens", "step")
    changes = "summed change of mu"
    panels = plots.dynamics_panels([one])
    assert titles(panels) == [test_sets, reward, mu, length]
    found = titles(plots.dynamics_panels([one, two]))
    assert found == [test_sets, reward, mu, of_entropy, length]
    found = titles(plots.dynamics_panels([two, one]))
    assert found[:-1] == [test_sets, reward, mu, of_entropy, length]
    assert found[-1] == ("what moved mu (b)", changes, "step")
    found = titles(plots.dynamics_panels([two]))
    assert found == [test_sets, mu, of_entropy, ("what moved mu", changes, "step")]

    panels[0].draw(axis)
    assert [(line.label, line.ys) for line in drawn(axis)] == [("x", [50.0]), ("y", [100.0])]
    axis.clear()
    panels[1].draw(axis)  # smoothed over a twelfth of the steps
    raw, smoothed = drawn(axis)
    assert raw.ys[20] == 8000
    assert smoothed.ys[20] == pytest.approx((19**3 + 20**3 + 21**3) / 3)
    axis.clear()
    panels[2].draw(axis)  # mu as it is
    assert [line.ys[20] for line in drawn(axis)] == [8000]
    axis.clear()
    plots.dynamics_panels([two])[-1].draw(axis)
    assert drawn(axis) == [Line("entropy term", RED, "-", [0, 1], [0.0, 0.5])]


def test_accuracy_on_test_sets(axis):
    """Three sets at most, each with a style; of several settings the colours are in the legend."""
    names = ["w", "x", "y", "z"]
    rows = []
    for step in (0, 5):
        tasks = {name: {"accuracy": 0.1 * i + 0.01 * step} for i, name in enumerate(names)}
        rows.append({"step": step, "tasks": tasks})
    del rows[1]["tasks"]["x"]
    plots.draw_test_sets([setting(evaluations=[rows])], names, axis)
    assert drawn(axis) == [
        Line("w", BLUE, "-", [0, 5], approx(0, 5)),
        Line("x", BLUE, "--", [0], approx(10)),
        Line("y", BLUE, ":", [0, 5], approx(20, 25)),
    ]
    low, high = axis.get_ylim()
    assert low == pytest.approx(-0.04 * high)
    axis.clear()
    settings = [setting("a", BLUE, evaluations=[rows]), setting("b", RED, evaluations=[rows[:1]])]
    plots.draw_test_sets(settings, names[:2], axis)
    assert drawn(axis) == [
        Line("a", BLUE, "-", [0, 5], approx(0, 5)),
        Line(None, BLUE, "--", [0], approx(10)),
        Line("b", RED, "-", [0], approx(0)),
        Line(None, RED, "--", [0], approx(10)),
        Line("w", plots.GREY, "-", [], []),
        Line("x", plots.GREY, "--", [], []),
    ]


def test_entropy_and_its_target(axis):
    rows = [{"step": 0, "entropy": 1.0}, {"step": 1, "entropy": 2.0, "entropy_target": 1.5}]
    plain = [{"step": 0, "entropy": 3.0}]
    plots.draw_entropy([setting("a", BLUE, [rows])], axis)
    target = Line("target H*", BLUE, "--", [1], [1.5])
    assert drawn(axis)[1:] == [Line(None, BLUE, "-", [0, 1], approx(1.5, 1.5)), target]
    axis.clear()
    plots.draw_entropy([setting("a", BLUE, [plain]), setting("b", RED, [rows])], axis)
    found = [line for line in drawn(axis) if line.style == "--"]
    meaning = Line("target H*", plots.GREY, "--", [], [])
    assert found == [target._replace(label=None, colour=RED), meaning]
    axis.clear()
    plots.draw_entropy([setting("a", BLUE, [plain]), setting("b", RED, [plain])], axis)
    assert {line.style for line in drawn(axis)} == {"-"}
    axis.clear()
    many = [{"step": i, "entropy": i**3} for i in range(60)]
    plots.draw_entropy([setting("a", BLUE, [many])], axis)  # over a twelfth: 5 steps
    assert drawn(axis)[1].ys[30] == pytest.approx(sum(i**3 for i in range(28, 33)) / 5)


def test_what_moved_mu(axis):
    assert not plots.moved_mu({"mu_change/entropy": 0.0, "mu": 1.0})
    assert plots.moved_mu({"mu_change/entropy": -0.5, "mu_change/meta_gradient": 0.0})
    first = [
        {"step": 2, "mu_change/meta_gradient": 0.25, "mu_change/entropy": -0.5},
        {"step": 3, "mu_change/entropy": -0.25},
        {"step": 4, "mu_change/meta_gradient": 0.5},
    ]
    plots.draw_mu_changes(setting(metrics=[first, [{"step": 2, "mu_change/entropy": 9.0}]]), axis)
    assert drawn(axis) == [
        Line("meta-gradient", BLUE, "-", [2, 3, 4], [0.25, 0.25, 0.75]),
        Line("entropy term", RED, "-", [2, 3, 4], [-0.5, -0.75, -0.75]),
    ]
    axis.clear()
    for row in first:
        row["mu_change/entropy"] = 0.0  # a term without a weight is left out
    plots.draw_mu_changes(setting(metrics=[first]), axis)
    assert [line.label for line in drawn(axis)] == ["meta-gradient"]


# --------------------------------------------------------------------------------------------------
# Evaluations


def study(model: str, *rows: tuple) -> dict:
    """A report of the few-shot study: (shots, accuracy, its deviation) of each row."""
    summary, runs = [], []
    for shots, accuracy, sd in rows:
        losses = {"loss": 10 * accuracy, "loss_sd": 10 * sd}
        row = {"model": model, "shots": shots}
        summary.append(row | {"accuracy": accuracy, "accuracy_sd": sd} | losses)
        runs.append(row | {"curve": {"0": 3.0, "1": accuracy}})
    return {"summary": summary, "few_shot": runs}


def test_panels_of_the_study(axis):
    """Accuracy and loss with a standard deviation to each side, evenly spaced over the numbers of
    examples, whatever their order; loss over the steps."""
    reports = [
        study("runs/a/checkpoint", (30, 0.75, 0.125), (5, 0.5, 0.25), (10, 0.625, 0.0)),
        study("tiny", (5, 0.25, 0.0), (40, 0.375, 0.125)),
    ]
    panels = plots.few_shot_panels(reports)
    assert titles(panels) == [
        ("few-shot accuracy", "exact answers (%)", "examples"),
        ("few-shot loss", "test loss (nats/token)", "examples"),
        ("adapting on 40 examples", "test loss (nats/token)", "adaptation steps"),
    ]
    accuracy, loss, curves = panels
    accuracy.draw(axis)
    assert drawn(axis) == [
        Line("a", BLUE, "-", [0, 1, 2], [50.0, 62.5, 75.0]),
        Line("tiny", RED, "-", [0, 3], [25.0, 37.5]),  # 40 examples stand behind 30
    ]
    assert bands(axis) == [
        {0: (25.0, 75.0), 1: (62.5, 62.5), 2: (62.5, 87.5)},
        {0: (25.0, 25.0), 3: (25.0, 50.0)},
    ]
    for band in axis.collections:
        assert band.get_alpha() < 0.3
        assert list(band.get_linewidth()) == [0]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "tiny"]
    axis.clear()
    loss.draw(axis)
    assert drawn(axis)[0].ys == [5.0, 6.25, 7.5]
    assert bands(axis)[0] == {0: (2.5, 7.5), 1: (6.25, 6.25), 2: (6.25, 8.75)}
    axis.clear()
    curves.draw(axis)
    assert drawn(axis) == [
        Line("a", BLUE, "-", [0, 1], [3.0, 0.75]),
        Line("tiny", RED, "-", [0, 1], [3.0, 0.375]),
    ]


def test_ticks_of_the_study(axis):
    summaries = {"m": study("m", (30, 0.75, 0.1), (5, 0.5, 0.2), (10, 0.6, 0.1))["summary"]}
    plots.draw_shots(summaries, "accuracy", 100, axis)
    assert axis.get_xticks().tolist() == [0, 1, 2]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["5", "10", "30"]


def test_curves_are_of_the_most_examples(axis):
    """The mean of its draws; what took no step is a horizontal line."""
    rows = []
    for shots, low in ((8, 1.0), (2, 4.0), (8, 2.0)):
        rows.append({"shots": shots, "curve": {"0": low + 4, "10": low, "2": low + 1}})
    context = [{"shots": 8, "curve": {"0": 2.5}}, {"shots": 8, "curve": {"0": 3.5}}]
    plots.draw_curves({"m": rows, "m (in context)": context}, axis)
    assert drawn(axis) == [
        Line("m", BLUE, "-", [0, 1, 2], [5.5, 2.5, 1.5]),
        Line("m (in context)", RED, ":", [0, 1], [3.0, 3.0]),
    ]
    assert axis.get_xticks().tolist() == [0, 1, 2]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "2", "10"]
    assert axis.get_legend() is not None


def test_curves_of_different_lengths(axis):
    """A point stands over its own step, whatever the others' steps are."""
    short = [{"shots": 8, "curve": {"0": 4.0, "5": 2.0}}]
    long = [{"shots": 8, "curve": {"0": 3.0, "1": 2.5, "5": 1.0, "10": 0.5}}]
    plots.draw_curves({"short": short, "long": long}, axis)
    assert [line.xs for line in drawn(axis)] == [[0, 2], [0, 1, 2, 3]]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["0", "1", "5", "10"]


def result(accuracy: float, low: float, high: float) -> dict:
    return {"accuracy": accuracy, "interval": [low, high]}


def test_bars_of_benchmarks(axis):
    """Side by side around the benchmark's place, no gap where a model was not measured; intervals
    to both sides of the height."""
    reports = [
        {"benchmarks": {"runs/a/checkpoint": {"math500": result(0.5, 0.4, 0.7)}}},
        {"benchmarks": {"b": {"math500": result(0.2, 0.1, 0.25), "gsm8k": result(0.6, 0.5, 0.8)}}},
        {"benchmarks": {"runs/a/checkpoint": {"general_points (rule)": result(0.0, 0.0, 0.1)}}},
    ]
    (panel,) = plots.benchmark_panels(reports)
    assert titles([panel]) == [("benchmarks, 95% intervals", "accuracy (%)", "")]
    panel.draw(axis)
    width = 0.4 * 0.92  # two models at most, a little air between them
    assert bars(axis) == [
        Bars("a", BLUE, approx(-0.2, 1), approx(50, 0), pytest.approx(width)),
        Bars("b", RED, approx(0.2, 2), approx(20, 60), pytest.approx(width)),
    ]
    spans = []
    for container in axis.containers:
        if hasattr(container, "errorbar"):
            for segment in container.errorbar.lines[2][0].get_segments():
                spans.append(segment[:, 1].tolist())
    assert spans == [approx(40, 70), approx(0, 10), approx(10, 25), approx(50, 80)]
    ticks = axis.get_xticklabels()
    texts = [tick.get_text() for tick in ticks]
    assert texts == ["math500", "general\npoints (rule)", "gsm8k"]
    assert axis.get_xticks().tolist() == [0, 1, 2]
    assert ticks[0].get_fontsize() == 10
    assert not any(line.get_visible() for line in axis.get_xgridlines())
    assert axis.get_legend() is not None


def test_names_of_many_benchmarks_are_smaller(axis):
    plots.draw_benchmarks({"m": {name: result(0.5, 0.4, 0.6) for name in "abcd"}}, axis)
    assert {tick.get_fontsize() for tick in axis.get_xticklabels()} == {8}
    (bar,) = bars(axis)
    assert (bar.places, bar.thickness) == (approx(0, 1, 2, 3), pytest.approx(0.8 * 0.92))


def test_colours_come_again():
    names = "abcdefghi"
    assert plots.coloured(names) == list(zip(names, plots.COLOURS * 2, strict=False))


# --------------------------------------------------------------------------------------------------
# The figure


@pytest.fixture
def figures(monkeypatch):
    """The figures that plots.py draws, kept open."""
    kept, close = [], plt.close
    monkeypatch.setattr(plots.plt, "close", kept.append)
    yield kept
    for fig in kept:
        close(fig)


def simple_panel(number: int, *labels: str) -> plots.Panel:
    def draw(axis) -> None:
        for label in labels:
            axis.plot([0, 1], [0, number], label=label)

    return plots.Panel(f"title {number}", f"y {number}", f"x {number}", draw)


@pytest.mark.parametrize(
    "count,rows,columns,inches",
    [
        (1, 1, 1, (5, 3)),
        (2, 1, 2, (7.4, 3)),
        (3, 1, 3, (11.1, 3)),
        (4, 2, 2, (7.4, 6)),
        (5, 2, 3, (11.1, 6)),
        (7, 3, 3, (11.1, 9)),
    ],
)
def test_panels_on_the_page(count, rows, columns, inches, figures, tmp_path):
    """In rows of two or three; places without a panel are empty."""
    panels = [simple_panel(i) for i in range(count)]
    plots.draw_panels(panels, [], tmp_path / "x.svg")
    (fig,) = figures
    assert fig.get_size_inches().tolist() == approx(*inches)
    assert fig.axes[0].get_subplotspec().get_gridspec().get_geometry() == (rows, columns)
    shown = [axis.get_visible() for axis in fig.axes]
    assert shown == [True] * count + [False] * (rows * columns - count)
    for i, axis in enumerate(fig.axes[:count]):
        words = (axis.get_title(), axis.get_ylabel(), axis.get_xlabel())
        assert words == (f"title {i}", f"y {i}", f"x {i}")
        assert axis.get_legend() is None
    assert (tmp_path / "x.svg").exists()


def legends(fig) -> list[list[str]]:
    found = []
    for axis in fig.axes:
        legend = axis.get_legend()
        found.append([text.get_text() for text in legend.get_texts()] if legend else [])
    return found


def test_legends(figures, tmp_path):
    """Of more than three runs in the first panel only; a style's meaning everywhere, once."""
    for count in (3, 4):
        runs = [f"run {i}" for i in range(count)]
        panels = [simple_panel(i, *runs, "target", "target") for i in range(2)]
        plots.draw_panels([*panels, simple_panel(2, *runs)], runs, tmp_path / "x.svg")
    few, many = figures
    runs = ["run 0", "run 1", "run 2"]
    assert legends(few) == [[*runs, "target"], [*runs, "target"], runs]
    assert legends(many) == [[*runs, "run 3", "target"], ["target"], []]


def test_a_panel_may_have_its_own_legend(figures, tmp_path):
    def draw(axis) -> None:
        axis.plot([0, 1], label="a")
        axis.legend(title="own")

    plots.draw_panels([plots.Panel("", "", "", draw)], [], tmp_path / "x.svg")
    assert figures[0].axes[0].get_legend().get_title().get_text() == "own"


def test_style_of_pictures(figures, tmp_path):
    """Two spines, a faint grid, no frames; a legend's handle shows three dashes; titles fit their
    panels."""
    rows = [evaluation(0, (0.1, 0.3), loss_before=3.0, loss_after=2.0, accuracy_after=1.0)] * 2
    metrics = [{"step": 0, "meta/loss": 1.0}]
    panels = plots.training_panels([setting(metrics=[metrics], evaluations=[rows])])
    with plt.rc_context(plots.STYLE):
        plots.draw_panels(panels[:3], ["a"], tmp_path / "x.png")
        (fig,) = figures
        renderer = fig.canvas.get_renderer()
        for axis in fig.axes:
            title = axis.title.get_window_extent(renderer)
            assert 0.3 < title.width / (fig.bbox.width / 3) < 0.9
    image = plt.imread(tmp_path / "x.png")
    assert image.shape[:2] == (450, 1665)  # 150 dots an inch
    axis = fig.axes[1]
    shown = {side for side, spine in axis.spines.items() if spine.get_visible()}
    assert shown == {"left", "bottom"}
    for line in axis.get_xgridlines():
        assert line.get_visible()
        assert 0.1 < line.get_alpha() < 0.4
    legend = axis.get_legend()
    assert not legend.get_frame_on()
    line = axis.get_lines()[0]
    assert 1 < line.get_markersize() / line.get_linewidth() < 3
    (text, *_), (handle, *_) = legend.get_texts(), legend.get_lines()
    size = text.get_fontsize()
    assert size < axis.title.get_fontsize()
    length = legend.handlelength * size
    _, pattern = handle._dash_pattern
    assert int(length / sum(pattern)) == 3
    assert pattern[0] == pytest.approx(2 * pattern[1])  # dashes twice as long as gaps


RUN = [{"step": i, "meta/loss": 1.0 / (i + 1)} for i in range(4)]


def test_folders_of_all_kinds(figures, tmp_path):
    """Panels of meta-training, of amft.py, of a study and of benchmarks, in this order."""
    meta = write(tmp_path / "meta", metrics=RUN)
    seed = write(tmp_path / "seed", metrics=RUN, results={"benchmarks": {"x": {}}})
    amft = write(tmp_path / "amft", metrics=[{"step": 0, "mu": 0.5}])
    few = write(tmp_path / "few", results=study("m", (5, 0.5, 0.1)))
    math500 = write(tmp_path / "math", results={"benchmarks": {"m": {"b": result(0.5, 0, 1)}}})
    folders = [math500, few, amft, meta, seed]
    plots.figure(folders, tmp_path / "x.svg", ["", "", "named"])
    (fig,) = figures
    assert [axis.get_title() for axis in fig.axes if axis.get_visible()] == [
        "training tasks, after adaptation",
        "test sets, greedy",
        "weight of imitation",
        "few-shot accuracy",
        "few-shot loss",
        "adapting on 5 examples",
        "benchmarks, 95% intervals",
    ]
    assert legends(fig)[0] == ["meta", "seed"]
    plots.figure([math500], tmp_path / "x.svg")
    assert [axis.get_title() for axis in figures[1].axes] == ["benchmarks, 95% intervals"]
    assert plt.rcParams["savefig.dpi"] == "figure"  # the style is the picture's alone
    names = []
    for chosen in ([amft, meta], [meta]):
        plots.figure(chosen, tmp_path / "x.svg", ["named", "other"])
        names.append([axis.get_title() for axis in figures[-1].axes if axis.get_visible()])
    assert names == [
        ["training tasks, after adaptation", "test sets, greedy", "weight of imitation"],
        ["training tasks, after adaptation"],
    ]
    empty = write(tmp_path / "empty", results={"args": {}})
    with pytest.raises(plots.PlotError, match=f"^nothing to draw in {empty}, {empty}$"):
        plots.figure([empty, empty], tmp_path / "x.svg")


def test_more_than_three_runs_share_a_legend(figures, tmp_path):
    folders = []
    for i in range(4):
        rows = [evaluation(0, (0.1, 0.3), loss_before=1.0, loss_after=0.5)]
        folders.append(write(tmp_path / f"r{i}", metrics=RUN, evaluations=rows))
    plots.figure(folders, tmp_path / "x.svg", ["p", "q"])
    runs = ["p", "q", "r2", "r3"]
    styles = ["before adaptation", "after adaptation"]
    (fig,) = figures
    assert legends(fig)[:2] == [runs, styles]


@pytest.mark.parametrize(
    "files,flags,message",
    [
        ({"metrics": RUN}, ["--out", "/proc/x.png"], "/proc/x.png"),
        ({"metrics": RUN}, ["--out", "x.xyz"], "x.xyz: the ending must be one of"),
        ({"metrics": RUN}, ["--out", "x"], "x: the ending must be one of"),
        ({"metrics": RUN}, ["--labels", "a", "b"], "--labels: 2 names for 1 folders"),
        ({"metrics": [5]}, [], "cannot draw"),
        ({"metrics": [{"meta/loss": 1}]}, [], "cannot draw run: KeyError: 'step'"),
        ({"metrics": RUN, "evaluations": [{"step": 1}]}, [], "cannot draw"),
        ({"metrics": []}, [], "neither metrics.jsonl nor results.json in run"),
        ({"results": {"args": {}}}, [], "nothing to draw"),
        ({"results": {"benchmarks": 5}}, [], "cannot draw"),
    ],
)
def test_pictures_that_cannot_be_drawn(here, capsys, files, flags, message):
    write(here / "run", **files)
    assert run_here(plots, "run", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("plots.py: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(here.glob("*.png"))


def test_folders_that_are_none(here, capsys):
    """All of them are named; a damaged result is none."""
    write(here / "good", metrics=RUN)
    (write(here / "cut") / "results.json").write_text('{"a')
    assert run_here(plots, "good", "none", "no", "--labels", "a", "b", "c") == 2
    error = capsys.readouterr().err
    assert error == "plots.py: neither metrics.jsonl nor results.json in none, no\n"
    assert run_here(plots, "cut") == 2
    assert "cannot read cut/results.json: it is damaged" in capsys.readouterr().err
    with pytest.raises(plots.PlotError, match="name at least one run or evaluation folder"):
        plots.check(plots.Args(()))


def test_long_reasons_are_cut(here, monkeypatch):
    def fail(*_):
        raise RuntimeError("x" * 200)

    monkeypatch.setattr(plots, "figure", fail)
    write(here / "run", metrics=RUN)
    with pytest.raises(plots.PlotError) as error:
        plots.main(plots.Args((Path("run"), Path("run"))))
    assert str(error.value) == "cannot draw run, run: RuntimeError: " + "x" * 100


def test_picture(here, capsys):
    write(here / "run", metrics=RUN)
    with (here / "run" / "metrics.jsonl").open("a") as f:
        f.write('\n{"step": 9, "meta/loss": {}')
    assert run_here(plots, "run", "--out", "new/x.SVG") == 0
    assert capsys.readouterr().out == "new/x.SVG\n"
    assert (here / "new" / "x.SVG").stat().st_size > 1000
    assert run_here(plots, "run", "--labels", "a") == 0
    assert (here / "curves.png").exists()


def test_folders_of_no_name(here, figures, monkeypatch):
    """The current folder has the name that it has elsewhere; all folders of --out are made."""
    write(here / "mine", metrics=RUN)
    write(here / "other", metrics=RUN)
    monkeypatch.chdir(here / "mine")
    assert run_here(plots, ".", "../other", "--out", "a/b/x.svg") == 0
    assert legends(figures[0]) == [["mine", "other"]]
    assert (here / "mine" / "a" / "b" / "x.svg").exists()
