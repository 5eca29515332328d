"""measure.py and eval.py: statistics against known values; benchmarks that are cut and go on; the
few-shot study."""

import importlib
import itertools
import json
import math
import random
import statistics
import subprocess
import types

import numpy as np
import pytest
import torch

import measure
from data import Encoded, Example, Task
from games import games_of
from games.play import Trajectory, Turn
from model import World, load_weights
from tests.helpers import (
    ROOT,
    assert_same_weights,
    command,
    functional,
    random_episodes,
    reference_loss,
    run_here,
    run_well,
    small_llama,
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


def turn(reward: float, length: int, finished: bool = True) -> Turn:
    return Turn([1], [2] * length, [0.0] * length, finished, "", reward)


# Of two prompts two samples each: a win at the second turn, a loss that is cut, two equal wins
EPISODES = [
    [
        Trajectory([turn(-1.5, 3), turn(5.0, 4)], won=True),
        Trajectory([turn(-1.0, 8, False)]),
    ],
    [Trajectory([turn(5.0, 2)], won=True), Trajectory([turn(5.0, 3)], won=True)],
]


def test_rates_of_episodes(process_group):
    """Per episode and per turn, by hand: 4 episodes of 5 turns, 20 tokens."""
    world = World(torch.device("cpu"))
    asked = []

    def play(game, seeds, samples, key, temperature):
        asked.append((list(seeds), samples, temperature))
        return [[trajectory] for group in EPISODES for trajectory in group]

    game = types.SimpleNamespace(misread_reward=-1.5)
    stop = types.SimpleNamespace(agreed=lambda: False)
    found = measure.play_tests(play, {"cards": (game, 4)}, world, stop)
    assert asked == [([0, 1, 2, 3], 1, 0.0)]
    assert found["cards"] == pytest.approx(
        {
            "accuracy": 3 / 4,
            "step_accuracy": 3 / 5,
            "reward": 12.5 / 4,
            "length": 20 / 5,
            "truncated": 1 / 5,
            "episodes": 4,
            "recognition": 4 / 5,
        }
    )
    returns = torch.tensor([3.5, -1.0, 5.0, 5.0])
    assert measure.rollout_metrics(EPISODES, world) == pytest.approx(
        {
            "reward/mean": 12.5 / 4,
            "reward/std": returns.std(correction=0).item(),
            "reward/won": 3 / 4,
            "response_length": 20 / 5,
            "truncated": 1 / 5,
            "groups_without_variance": 1 / 2,
        }
    )


def test_metrics_of_a_meta_step():
    """By hand: support, query and query before adaptation of two tasks."""
    losses = [[1.0, 1.5, 3.0], [2.0, 3.5, 4.0]]
    without = measure.step_metrics(losses, ["a", "b"], gain=False)
    expected = {
        "meta/loss": 2.5,
        "meta/avg_support_loss": 1.5,
        "meta/avg_query_loss": 2.5,
        "meta/avg_adaptation_gap": 1.0,
        "meta/adaptation_gap_std": 0.5,
        "meta/task_loss_variance": 1.0,
        "a/support_loss": 1.0,
        "a/query_loss": 1.5,
        "a/adaptation_gap": 0.5,
        "b/support_loss": 2.0,
        "b/query_loss": 3.5,
        "b/adaptation_gap": 1.5,
    }
    assert without == pytest.approx(expected)
    expected |= {"meta/query_loss_before": 3.5, "meta/adaptation_gain": 1.0}
    expected |= {"a/adaptation_gain": 1.5, "b/adaptation_gain": 0.5}
    assert measure.step_metrics(losses, ["a", "b"], gain=True) == pytest.approx(expected)


def test_lines_of_an_evaluation():
    """What adaptation does is said at the first evaluations."""

    def lines(before: float, after: float, earlier: int) -> str:
        result = {"t": {"loss_before": before, "loss_after": after, "problems": 1}}
        return "\n".join(measure.adaptation_lines(7, result, dict.fromkeys(range(earlier), result)))

    assert lines(2.0, 1.5, 0) == "step 7: loss before adaptation 2.000, after 1.500"
    assert "adaptation gains only +0.0050 nats" in lines(2.0, 1.995, 0)
    assert "adaptation gains only -0.0050 nats" in lines(2.0, 2.005, 1)
    assert "adaptation makes the loss worse by 0.500 nats" in lines(2.0, 2.5, 0)
    assert "warning" not in lines(2.0, 2.5, 2)
    few, same = {"truncated": 0.51}, {"groups_without_variance": 1.0}
    assert measure.rollout_warnings(few, 8).keys() == {"cut"}
    assert measure.rollout_warnings(same, 8).keys() == {"equal"}
    assert not measure.rollout_warnings({"truncated": 0.5, "groups_without_variance": 0.9}, 8)


def test_responses_for_people():
    tokenizer = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    rows = measure.sample_rows(EPISODES, 3, tokenizer)
    names = ("episode", "sample", "turn", "reward", "length", "truncated")
    assert [tuple(row[name] for name in names) for row in rows] == [
        (0, 0, 0, -1.5, 3, False),
        (0, 0, 1, 5.0, 4, False),
        (0, 1, 0, -1.0, 8, True),
        (1, 0, 0, 5.0, 2, False),
        (1, 1, 0, 5.0, 3, False),
    ]
    assert {row["step"] for row in rows} == {3}
    assert {row["prompt"] for row in rows} == {"1"}
    result = {"cards": {"accuracy": 0.75, "step_accuracy": 0.6, "length": 4.0, "episodes": 4}}
    first, best, worst = measure.tests_lines(3, result, rows)
    assert first == "step 3: cards 75.0%, step accuracy 60.0%, 4 tokens"
    assert best.startswith("  best, reward 5, 2 tokens")
    assert worst.startswith("  worst, reward -1.5, 3 tokens")
    later = {"cards": result["cards"] | {"accuracy": 0.5, "length": 6.0}}
    row = measure.tests_table(result, later).splitlines()[-1].split()
    low, high = measure.wilson(2, 4)
    numbers = ["75.0%", "50.0%", f"{100 * low:.1f}", "to", f"{100 * high:.1f}", "4.0", "6.0"]
    assert row == ["cards", "4", *numbers]


def config_of(**settings):
    text = types.SimpleNamespace(**settings)
    return types.SimpleNamespace(get_text_config=lambda: text)


def test_rows_of_a_forward():
    """As many as memory takes: 2^29 logits; 2^33 bytes of keys and values."""
    config = config_of(vocab_size=2**15)
    for length, rows in ((2**9, 16), (2**10, 16), (2**11, 8), (2**13, 2), (2**14, 1), (2**20, 1)):
        assert measure.rows_to_score(config, length) == rows, length
    # 2 x 8 layers x 4 heads x 64 x 2 bytes = 2^13 a token
    config = config_of(
        num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4, head_dim=64
    )
    for length, rows in ((2**12, 128), (2**13, 128), (2**14, 64), (2**19, 2), (2**22, 1)):
        assert measure.rows_to_answer(config, length, 2) == rows, length


def scored_items(count: int = 5):
    """Items of two tasks, mixed; rows of other lengths; what a model says to each."""
    _, tokens = random_episodes(1, count, 0, seed=3)
    items, texts = [], []
    for i, name in enumerate(tokens):
        items.append((i % 2, Example("", f"word {i}", "", "", 0, name)))
        texts.append(f"word {i}" if i < 3 else "else")
    return items, tokens, texts


@pytest.fixture
def sampled(monkeypatch):
    """The arguments of measure.sample, which draws the number of each prompt's place."""
    calls = []

    def sample(model, tokenizer, prompts, **options):
        calls.append((prompts, options))
        return [types.SimpleNamespace(answer=i) for i in range(len(prompts))]

    monkeypatch.setattr(measure, "sample", sample)
    monkeypatch.setattr(measure, "template", lambda _: types.SimpleNamespace(stop=frozenset([7])))
    return calls


def test_scores_are_summed_by_task(monkeypatch, sampled):
    """Losses and right answers, added to what the sums hold; rows of like lengths together, a few
    at a time."""
    items, tokens, texts = scored_items()
    tokenizer = types.SimpleNamespace(
        pad_token_id=0, batch_decode=lambda answers: [texts[i] for i in answers]
    )
    model, forwards = small_llama(), []
    collate = measure.collate

    def recording(rows, pad_id):
        assert not torch.is_grad_enabled()
        forwards.append([len(row.ids) for row in rows])
        return collate(rows, pad_id)

    monkeypatch.setattr(measure, "collate", recording)
    lengths = []

    def two_rows(config, length):
        lengths.append(length)
        return 2

    monkeypatch.setattr(measure, "rows_to_score", two_rows)
    monkeypatch.setattr(measure, "rows_to_answer", lambda config, length, width: (length, width))
    sums = torch.full((2, 2), 100.0, dtype=torch.float64)
    measure.score(model, items, tokens, tokenizer, 9, sums)
    expected = torch.full((2, 2), 100.0, dtype=torch.float64)
    forward = functional(model, dict(model.named_parameters()))
    for place, (task, example) in enumerate(items):
        row = tokens[example.id]
        tokens_of_row = len(row.ids) - row.prompt_length
        expected[task, 0] += reference_loss(forward, [row]).detach() * tokens_of_row
        expected[task, 1] += place < 3
    torch.testing.assert_close(sums, expected)
    by_task = []
    for task in (0, 1):
        by_task.append(sorted(len(tokens[e.id].ids) for i, e in items if i == task))
    assert forwards == [by_task[0][:2], by_task[0][2:], by_task[1]]
    assert lengths == [by_task[0][-1], by_task[1][-1]]
    ((prompts, options),) = sampled
    assert prompts == [tokens[e.id].ids[: tokens[e.id].prompt_length] for _, e in items]
    longest = max(map(len, prompts)) + 9
    expected = {
        "max_new_tokens": 9,
        "temperature": 0,
        "stop": {7},
        "batch_size": (longest, 8),
        "interrupted": measure.never,
    }
    assert options == expected


def test_scores_that_are_not_asked_for(sampled):
    items, tokens, texts = scored_items()
    tokenizer = types.SimpleNamespace(
        pad_token_id=0, batch_decode=lambda answers: [texts[i] for i in answers]
    )
    model = small_llama()
    sums = torch.zeros(2, 2, dtype=torch.float64)
    measure.score(model, items, tokens, tokenizer, 0, sums)
    assert sums[:, 0].min() > 0
    assert sums[:, 1].tolist() == [0, 0]
    measure.score(model, [], tokens, tokenizer, 5, sums)
    assert not sampled
    sums.zero_()
    measure.score(model, items, tokens, tokenizer, 5, sums, losses=False)
    assert sums.tolist() == [[0, 2], [0, 1]]
    sums.zero_()
    asked = itertools.count()
    measure.score(model, items, tokens, tokenizer, 5, sums, lambda: next(asked) == 1)
    assert sums[0, 0] > 0
    assert sums[1, 0] == 0
    assert len(sampled) == 1


class Phases:
    """Stands in for measure.score and for training: a row's loss is its number times the steps
    made plus one; it is right from the step on that its number says."""

    def __init__(self):
        self.steps, self.calls = 0, []

    def score(
        self, model, items, tokens, tokenizer, max_new_tokens, sums, interrupted, losses=True
    ):
        assert sums.dtype == torch.float64
        self.calls.append((self.steps, [example.id for _, example in items], losses))
        for i, example in items:
            number = int(example.id[1:])
            sums[i, 0] += number * (self.steps + 1) if losses else 1000
            sums[i, 1] += self.steps >= number if losses else number == 1

    def adapt(self, support, watch):
        for k in range(1, 4):
            self.steps = k
            watch(k)

    def restore(self):
        self.steps = 0


def evaluated(monkeypatch, world, agreed=lambda: False, curve=3, max_new_tokens=4, tasks="tuv"):
    """(what adaptation returns, the calls of score, the draws of support)."""
    phases, draws = Phases(), []
    monkeypatch.setattr(measure, "score", phases.score)
    tokens, made = {}, []
    for name in tasks:
        rows = [Example("", "", "", "", 0, f"{name}{i}") for i in (1, 2, 3)]
        made.append(Task(name, support=[name], query=[], test=rows))
        for i, row in enumerate(rows, 1):
            tokens[row.id] = Encoded([0] * (10 + i), 4)  # 7, 8, 9 tokens of response

    def in_context(tokenizer, support, rows):
        lengths = [40] + [20] * (len(rows) - 1)
        return {r.id: Encoded([0] * n, 30) for r, n in zip(rows, lengths, strict=True)}

    def draw(rng, rows):
        draws.append((rng.random(), rows))
        return rows

    monkeypatch.setattr(measure, "encode_in_context", in_context)
    stop = types.SimpleNamespace(agreed=agreed, is_requested=None)
    result = measure.adaptation(
        None, made, tokens, None, world, adapt=phases.adapt, restore=phases.restore, draw=draw,
        curve=curve, max_length=40, problems=2, max_new_tokens=max_new_tokens, seed=7, stop=stop,
    )  # fmt: skip
    return result, phases.calls, draws


def test_numbers_of_adaptation(monkeypatch, process_group):
    """Two test rows a task, of 7 and 8 tokens; their losses are 1 and 2 times the steps + 1."""
    world = World(torch.device("cpu"))
    result, calls, draws = evaluated(monkeypatch, world, tasks="tu")
    losses = [3 / 15, 6 / 15, 9 / 15, 12 / 15]
    accuracies = [0, 1 / 2, 1, 1]
    steps = []
    for loss, accuracy in zip(losses, accuracies, strict=True):
        steps.append({"loss": pytest.approx(loss), "accuracy": accuracy})
    numbers = {
        "loss_before": pytest.approx(losses[0]),
        "accuracy_before": 0,
        "loss_after": pytest.approx(losses[3]),
        "accuracy_after": 1,
        "problems": 2,
        "accuracy_in_context": 1 / 2,
        "steps": steps,
    }
    assert result == {"t": numbers, "u": numbers}
    both = ["t1", "t2", "u1", "u2"]
    of_task = [(k, rows, True) for rows in (["t1", "t2"], ["u1", "u2"]) for k in (1, 2, 3)]
    assert calls == [(0, both, True), (0, both, False), *of_task]
    assert [rows for _, rows in draws] == [["t"], ["u"]]
    assert draws == evaluated(monkeypatch, world, tasks="tu")[2]
    assert draws[0][0] != draws[1][0]
    result, calls, _ = evaluated(monkeypatch, world, curve=0, tasks="t")
    kept = ("loss_before", "accuracy_before", "loss_after", "accuracy_after", "problems")
    assert result == {"t": {name: numbers[name] for name in kept}}
    assert calls == [(0, ["t1", "t2"], True), (3, ["t1", "t2"], True)]
    result, calls, _ = evaluated(monkeypatch, world, max_new_tokens=0, tasks="t")
    assert result["t"].keys() == {"loss_before", "loss_after", "problems", "steps"}
    assert result["t"]["steps"] == [{"loss": pytest.approx(loss)} for loss in losses]
    assert len(calls) == 4


def test_adaptation_is_shared_by_ranks(monkeypatch):
    """Before it, rank by rank; after it, task by task on a replica, row by row on its ranks."""
    monkeypatch.setattr(measure.dist, "all_reduce", lambda sums: None)
    found = []
    for rank in range(4):
        world = World(torch.device("cpu"), rank, 4, rank // 2, 2)
        _, calls, _ = evaluated(monkeypatch, world)
        assert [(k, losses) for k, _, losses in calls[:2]] == [(0, True), (0, False)]
        assert calls[0][1] == calls[1][1]
        after = [rows for k, rows, _ in calls if k == 3]
        found.append((calls[0][1], after))
    assert found == [
        (["t1", "v1"], [["t1"], ["v1"]]),
        (["t2", "v2"], [["t2"], ["v2"]]),
        (["u1"], [["u1"]]),
        (["u2"], [["u2"]]),
    ]


def test_adaptation_stops_where_all_ranks_agree(monkeypatch):
    """Asked before each round of tasks over the replicas and at the end, on every replica."""
    monkeypatch.setattr(measure.dist, "all_reduce", lambda sums: None)
    for replica, tasks_before in ((0, (0, 1, 2)), (1, (0, 1, 1))):
        world = World(torch.device("cpu"), replica, 2, replica, 2)
        for asked_before, tasks in enumerate(tasks_before):
            asked = itertools.count()

            def agreed(asked=asked, asked_before=asked_before):
                return next(asked) == asked_before

            result, calls, _ = evaluated(monkeypatch, world, agreed)
            assert result is None
            assert sum(k == 3 for k, *_ in calls) == tasks
            assert next(asked) == asked_before + 1
        assert evaluated(monkeypatch, world)[0] is not None


def test_what_an_evaluation_is_made_of(monkeypatch):
    """Sums over all ranks; other support rows with another seed; no prompts where one of them
    has more tokens than fit."""
    monkeypatch.setattr(measure.dist, "all_reduce", lambda sums: sums.mul_(3))
    world, adaptation = World(torch.device("cpu")), measure.adaptation
    result, _, draws = evaluated(monkeypatch, world, tasks="t")
    assert result["t"]["loss_before"] == pytest.approx(3 * 3 / 15)
    assert result["t"]["accuracy_after"] == 3
    assert result["t"]["accuracy_in_context"] == pytest.approx(3 / 2)
    for changes in ({"seed": 8}, {"max_length": 39}):
        monkeypatch.setattr(
            measure,
            "adaptation",
            lambda *args, changes=changes, **options: adaptation(*args, **options | changes),
        )
        result, calls, others = evaluated(monkeypatch, world, tasks="t")
        assert (others != draws) == ("seed" in changes)
        assert ("accuracy_in_context" in result["t"]) == ("seed" in changes)
        assert len(calls) == (5 if "seed" in changes else 4)


RESULT = {
    "t": {
        "loss_before": 2.0,
        "loss_after": 1.5,
        "accuracy_before": 0.25,
        "accuracy_after": 0.5,
        "accuracy_in_context": 0.375,
        "problems": 8,
        "steps": [],
    },
    "u/v": {
        "loss_before": 3.0,
        "loss_after": 2.0,
        "accuracy_before": 0.5,
        "accuracy_after": 1.0,
        "accuracy_in_context": 0.125,
        "problems": 4,
        "steps": [],
    },
}


def without(result: dict, *names: str) -> dict:
    """The numbers of a result but these."""
    kept = {}
    for task, numbers in result.items():
        kept[task] = {name: value for name, value in numbers.items() if name not in names}
    return kept


def test_means_over_tasks():
    assert measure.average(RESULT) == {
        "loss_before": 2.5,
        "loss_after": 1.75,
        "accuracy_before": 0.375,
        "accuracy_after": 0.75,
        "accuracy_in_context": 0.25,
    }


def test_line_of_an_evaluation():
    """Of what was measured."""
    assert measure.adaptation_lines(7, None, {}) == []
    start = "step 7: loss before adaptation 2.500, after 1.750"
    accuracies = ", accuracy 37.5% -> 75.0%"
    prompted = ", with the examples in the prompt instead 25.0%"
    assert measure.adaptation_lines(7, RESULT, {}) == [start + accuracies + prompted]
    for names, line in (
        (["accuracy_in_context"], start + accuracies),
        (["accuracy_in_context", "accuracy_before", "accuracy_after"], start),
    ):
        assert measure.adaptation_lines(7, without(RESULT, *names), {}) == [line]


def losses(before: float, after: float) -> dict:
    return {"t": {"loss_before": before, "loss_after": after, "problems": 1}}


def test_bounds_of_warnings():
    """A gain of 0.01 nats is enough; a loss may be half a nat above its start."""
    few = "warning: adaptation gains only"
    worse = "warning: adaptation makes the loss worse by"
    for before, after, warning in (
        (0.01, 0.0, None),
        (0.0099, 0.0, f"{few} +0.0099 nats: the inner loop hardly moves the model (raise "
         "--inner-lr or --inner-steps)"),
        (0.0, 0.0099, f"{few} -0.0099 nats: the inner loop hardly moves the model (raise "
         "--inner-lr or --inner-steps)"),
        (0.0, 0.01, f"{worse} 0.010 nats (lower --inner-lr)"),
        (0.0, 0.25, f"{worse} 0.250 nats (lower --inner-lr)"),
    ):  # fmt: skip
        result = losses(before, after)
        expected = [warning] if warning else []
        assert measure.adaptation_lines(1, result, {})[1:] == expected
        assert measure.adaptation_lines(1, result, {1: result})[1:] == expected
        assert measure.adaptation_lines(1, result, {1: result, 2: result})[1:] == []
    earlier = {9: losses(5.0, 5.0), 0: losses(1.0, 0.5)}
    for before, after, warned in (
        (1.5, 0.75, False),
        (1.625, 0.5, False),
        (1.625, 0.75, True),
        (1.25, 0.75, False),
    ):
        lines = measure.adaptation_lines(12, losses(before, after), earlier)
        expected = [
            "warning: the loss is above its start, before adaptation (1.000) and after it (0.500): "
            "lower --outer-lr"
        ]
        assert lines[1:] == (expected if warned else [])


def test_table_of_two_models():
    trained = {"t": RESULT["t"] | {"loss_after": 0.5, "accuracy_after": 1.0}, "u/v": RESULT["u/v"]}
    dashes = "-" * 14 + "+" + "-" * 40 + "+" + "-" * 39
    column = "loss before  after  acc. before  after"
    plain = [
        f"{'':13} | {'':14}base model{'':14} | {'':13}meta-trained{'':13}",
        f"task          | {column} | {column}",
        dashes,
        "t             |       2.000  1.500        25.0%  50.0% "
        "|       2.000  0.500        25.0% 100.0%",
        "u/v           |       3.000  2.000        50.0% 100.0% "
        "|       3.000  2.000        50.0% 100.0%",
        "mean of tasks |       2.500  1.750        37.5%  75.0% "
        "|       2.500  1.250        37.5% 100.0%",
    ]
    names = ["accuracy_in_context"]
    table = measure.results_table(without(RESULT, *names), without(trained, *names))
    assert table.split("\n") == plain
    names += ["accuracy_before", "accuracy_after"]
    base = {"a task of some length": without(RESULT, *names)["t"]}
    table = measure.results_table(base, base)
    assert table.split("\n")[3:] == [
        "a task of some length |       2.000  1.500            -      - "
        "|       2.000  1.500            -      -",
        "mean of tasks         |       2.000  1.500            -      - "
        "|       2.000  1.500            -      -",
    ]
    table = measure.results_table(RESULT, trained)
    lines = table.split("\n")
    assert lines[0] == f"{'':13} | {'':20}base model{'':20} | {'':19}meta-trained{'':19}"
    assert lines[1] == f"task          | {column}  in context | {column}  in context"
    assert lines[2] == "-" * 14 + "+" + "-" * 52 + "+" + "-" * 51
    assert lines[5] == (
        "mean of tasks |       2.500  1.750        37.5%  75.0%       25.0% "
        "|       2.500  1.250        37.5% 100.0%       25.0%"
    )
    one = {"t": RESULT["t"], "u/v": without(RESULT, "accuracy_in_context")["u/v"]}
    cell = measure._adaptation_cell(one["u/v"], True)
    assert cell == "      3.000  2.000        50.0% 100.0%           -"


def test_counts_of_an_episode():
    """A reward of 0 is no right turn; what the cards are is misread at one reward only."""
    turns = [turn(0.0, 3), turn(-1.5, 2, False), turn(5.0, 4), turn(-1.0, 1, False), turn(0.5, 1)]
    episode = Trajectory(turns, won=True)
    expected = {
        "right": True,
        "turns": 5,
        "right_turns": 2,
        "reward": 3.0,
        "tokens": 11,
        "cut_turns": 2,
        "misread": 1,
    }
    game = types.SimpleNamespace(misread_reward=-1.5)
    assert measure.trajectory_counts(episode, game) == expected
    found = measure.trajectory_counts(episode, types.SimpleNamespace())
    assert found == expected | {"misread": 0}
    assert set(measure.COUNTS) == set(expected)


def test_episodes_are_shared_by_ranks(monkeypatch):
    """Every second one of each test set, from the rank's number on; a stop ends it."""
    asked = []

    def play(game, seeds, samples, key, temperature):
        asked.append((game, list(seeds), samples, key, temperature))
        return [[Trajectory([turn(1.0, 2)], won=True)] for _ in seeds]

    world = World(torch.device("cpu"), 1, 2)
    monkeypatch.setattr(World, "sum", lambda self, *values: [2.0 * value for value in values])
    tests = {"a": ("game a", 6), "b": ("game b", 4)}
    stop = types.SimpleNamespace(agreed=lambda: len(asked) == 4)
    found = measure.play_tests(play, tests, world, stop)
    assert asked == [
        ("game a", [1, 3, 5], 1, "test", 0.0),
        ("game b", [1, 3], 1, "test", 0.0),
    ]
    expected = {
        "accuracy": 1.0,
        "step_accuracy": 1.0,
        "reward": 1.0,
        "length": 2.0,
        "truncated": 0.0,
    }
    assert found == {"a": expected | {"episodes": 6}, "b": expected | {"episodes": 4}}
    assert measure.play_tests(play, tests, world, stop) is None


def test_rewards_of_groups(process_group):
    """Two groups of three whose rewards are all the same; none but the first turn's return counts;
    no variance is no square root of a negative number."""
    world = World(torch.device("cpu"))

    def group(*rewards: float) -> list[Trajectory]:
        return [Trajectory([turn(reward, 2, finished=reward < 2)]) for reward in rewards]

    two_turns = Trajectory([turn(1.0, 5), turn(0.1, 5)])
    groups = [group(0.1, 0.1, 0.1), group(1.1, 1.1) + [two_turns], group(0.1, 0.1, 2.1)]
    assert [measure.equally_good(g) for g in groups] == [True, True, False]
    found = measure.rollout_metrics(groups, world)
    assert found["groups_without_variance"] == pytest.approx(2 / 3)
    assert found["reward/mean"] == pytest.approx((0.3 + 3.3 + 2.3) / 9)
    assert found["truncated"] == pytest.approx(1 / 10)
    assert found["response_length"] == pytest.approx((8 * 2 + 10) / 10)
    assert found["reward/won"] == 0
    same = measure.rollout_metrics([group(*[0.1] * 3)], world)
    assert same["reward/std"] == pytest.approx(0, abs=1e-7)


def test_warnings_of_rollouts():
    found = measure.rollout_warnings({"truncated": 0.75, "groups_without_variance": 1.0}, 8)
    assert found == {
        "cut": "75% of the responses are cut at --max-new-tokens 8: their rewards say little",
        "equal": "all responses to each prompt have the same reward: this step's advantages are "
        "zero, nothing is learned from them",
    }
    assert measure.rollout_warnings({}, 8) == {}


def test_rows_for_people():
    tokenizer = types.SimpleNamespace(decode=lambda ids: f"<{ids}>")
    plain = Turn([1, 2], [3, 4, 5], [0.0] * 3, False, "said", 0.5)
    noted = plain._replace(finished=True, noted={"cards": "4 5"})
    groups = [[Trajectory([plain])], [Trajectory([plain]), Trajectory([plain, noted])]]
    rows = measure.sample_rows(groups, 9, tokenizer)
    row = {
        "step": 9,
        "prompt": "<[1, 2]>",
        "response": "said",
        "reward": 0.5,
        "length": 3,
        "truncated": True,
    }
    assert rows == [
        row | {"episode": 0, "sample": 0, "turn": 0},
        row | {"episode": 1, "sample": 0, "turn": 0},
        row | {"episode": 1, "sample": 1, "turn": 0},
        row | {"truncated": False, "episode": 1, "sample": 1, "turn": 1, "noted": {"cards": "4 5"}},
    ]


def test_lines_of_test_sets():
    """Of equal rewards the shortest is best and the longest worst; 130 characters are shown."""
    result = {
        "a": {"accuracy": 0.5, "step_accuracy": 0.5, "length": 7.4},
        "b": {"accuracy": 0.25, "step_accuracy": 0.5, "length": 9.6, "recognition": 0.125},
    }
    line = "step 4: a 50.0%, 7 tokens; b 25.0%, step accuracy 50.0%, recognition 12.5%, 10 tokens"
    assert measure.tests_lines(4, result, []) == [line]
    samples = []
    for reward, length, text in (
        (1.0, 4, "y" * 131),
        (-2.0, 5, "short\nand  bad"),
        (1.0, 3, "x" * 130),
        (-2.0, 8, "long and bad"),
        (0.0, 1, ""),
    ):
        samples.append({"reward": reward, "length": length, "response": text})
    assert measure.tests_lines(4, result, samples) == [
        line,
        f"  best, reward 1, 3 tokens: {'x' * 130}",
        "  worst, reward -2, 8 tokens: long and bad",
    ]
    assert measure.tests_lines(4, result, samples[:2]) == [
        line,
        f"  best, reward 1, 4 tokens: {'y' * 130}...",
        "  worst, reward -2, 5 tokens: short and bad",
    ]


def test_table_of_test_sets():
    """The interval is Wilson's of 8 in 10."""
    first = {"in distribution": {"accuracy": 0.25, "length": 4.0, "episodes": 20}}
    last = {"in distribution": {"accuracy": 0.8, "length": 6.5, "episodes": 10}}
    assert measure.tests_table(first, last).split("\n") == [
        "test set           episodes  accuracy: first    last     95% interval "
        " length: first    last",
        "-" * 92,
        "in distribution          10            25.0%   80.0%    49.0 to 94.3 "
        "           4.0     6.5",
    ]


def test_bootstrap_of_many_values():
    """Near the normal approximation; the same at every call."""
    values = [math.sin(i) + (i % 7) for i in range(400)]
    mean = statistics.mean(values)
    half = 1.95996 * statistics.pstdev(values) / 20
    low, high = measure.bootstrap(values)
    assert low == pytest.approx(mean - half, abs=0.06 * half)
    assert high == pytest.approx(mean + half, abs=0.06 * half)
    assert measure.bootstrap(values) == (low, high)
    assert measure.bootstrap(values, seed=1) != (low, high)
    assert measure.bootstrap([0.5]) == (0.5, 0.5)


def test_draws_of_the_bootstrap(monkeypatch):
    """4,000 of as many values as there are."""
    drawn = []

    def generator(seed):
        def integers(low, high, shape):
            drawn.append((low, high, *shape))
            return np.zeros(shape, dtype=int)

        return types.SimpleNamespace(integers=integers)

    monkeypatch.setattr(measure.np.random, "default_rng", generator)
    assert measure.bootstrap([7.0, 1.0, 2.0]) == (7.0, 7.0)
    assert {(low, high, count) for low, high, _, count in drawn} == {(0, 3, 3)}
    assert sum(draws for _, _, draws, _ in drawn) == 4000


def test_exact_p_values():
    """Of n discordant problems, all on one side: 2 / 2^n."""
    for n in range(1, 9):
        assert measure.mcnemar(n, 0) == measure.mcnemar(0, n) == pytest.approx(2 / 2**n)
    assert measure.mcnemar(2, 5) == pytest.approx(2 * (1 + 7 + 21) / 128)
    assert measure.wilson(5, 10) == pytest.approx((0.2365931, 0.7634069), abs=1e-6)
    assert measure.wilson(10, 10) == pytest.approx((0.7224672, 1), abs=1e-6)


def test_summary_of_a_benchmark():
    """Three problems of two samples: both right, one right, none; means over problems."""
    rows = []
    for name, right in (("a", (1, 1)), ("b", (0, 1)), ("c", (0, 0))):
        for k in (0, 1):
            row = {"id": name, "sample": k, "right": bool(right[k]), "tokens": 4 + k}
            row |= {"finished": k == 0, "answer": None if name == "c" else "1"}
            rows.append(row | {"subject": "S" if name == "a" else "T", "level": "1"})
    found = evaluation.summarise(rows, 2)
    assert found["problems"] == 3
    assert found["accuracy"] == pytest.approx(1 / 2)
    assert found["pass@2"] == pytest.approx(2 / 3)
    assert "pass@4" not in found
    assert found["mean_tokens"] == 4.5
    assert found["truncated"] == 0.5
    assert found["unparsable"] == pytest.approx(1 / 3)
    assert found["subject"] == {"S": [1.0, 1], "T": [0.25, 2]}
    assert "level" not in found
    low, high = found["interval"]
    assert low < 0.5 < high
    single = evaluation.summarise([row for row in rows if row["sample"] == 1], 1)
    assert single["interval"] == pytest.approx(measure.wilson(2, 3))


def test_prompts_of_a_benchmark():
    plain = evaluation.Problem("x/0", "1 + 1?", "2")
    assert evaluation.prompt_of(plain, None) == "1 + 1?" + evaluation.BOX
    assert evaluation.prompt_of(plain, " Go.") == "1 + 1? Go."
    assert evaluation.prompt_of(plain._replace(id="embedded/0"), None) == "1 + 1?"
    choices = plain._replace(choices=("two", "three"), answer="A")
    assert evaluation.prompt_of(choices, "") == "1 + 1?\n(A) two\n(B) three"
    assert evaluation.prompt_of(choices, None).endswith(evaluation.LETTER_BOX)


def test_differences_are_second_minus_first():
    rows = []
    for name, right in (("a", [0, 0, 1, 0]), ("b", [1, 1, 1, 0])):
        row = {"model": name, "task": "t", "shots": 2, "seed": 0, "loss": 1.0, "right": right}
        rows.append(row)
    summary, (pair,) = evaluation.compare_few_shot(rows, ["a", "b"])
    assert [s["accuracy"] for s in summary] == [0.25, 0.75]
    assert (pair["first"], pair["second"]) == ("a", "b")
    assert pair["difference"] == 0.5
    low, high = pair["interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert pair["mcnemar"] == 0.5  # 2 against 0


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
    questions = [gpqa | {"Question": f"Which of {i}?"} for i in range(40)]
    assert {evaluation._problem(row, "gpqa").answer for row in questions} == set("ABCD")
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
    pairs = zip(expected[::2], expected[1::2], strict=True)  # the two samples of a problem
    assert sum(first[2] != second[2] for first, second in pairs) > 50
    assert [row[:2] for row in got] == [row[:2] for row in expected]
    assert sum(a == b for a, b in zip(expected, got, strict=True)) >= 118
    assert run_here(evaluation, *benchmark, "--seed", "1", "--output-dir", cut) == 2


def test_games_as_benchmarks(tmp_path):
    """A killed evaluation of a game continues, one sample of a seed written and one not; won
    episodes and right turns are those that the written answers earn when played again."""
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
    file.write_text("".join(lines[:11]) + '{"model": "tiny_ga')
    assert evaluation.main(args) == 0
    assert json.loads(results.read_text()) == first
    rows = list({(row["id"], row["sample"]): row for row in whole_rows(file)}.values())
    assert len(rows) == 24
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
    for row in report["few_shot"]:
        assert row["loss"] == row["curve"]["5" if row["shots"] else "0"]
    for pair in report["pairs"]:
        assert pair["difference"] == 0, pair
        assert pair["mcnemar"] == 1, pair
