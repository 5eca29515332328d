"""What is measured: loss and accuracy before and after adaptation, test sets played, intervals."""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from data import Encoded, Example, Task, collate, encode_in_context, is_right, template
from model import World, cache_bytes, gathered, token_loss
from policy import never, sample

# --------------------------------------------------------------------------------------------------
# Adaptation to tasks


def rows_to_score(config, length: int) -> int:
    """Rows in one forward without gradient: 16, or fewer where their logits pass 2^29 numbers."""
    return max(1, min(16, 2**29 // (length * config.get_text_config().vocab_size)))


def rows_to_answer(config, length: int, width: int) -> int:
    """Rows that are sampled together: 128, or fewer where keys and values pass 8 GB."""
    return max(1, int(min(128, 2**33 // cache_bytes(config, length, width))))


@torch.no_grad()
def score(
    model,
    items: Sequence[tuple[int, Example]],
    tokens: dict[str, Encoded],
    tokenizer,
    max_new_tokens: int,
    sums: torch.Tensor,
    interrupted: Callable[[], bool] = never,
    losses: bool = True,
) -> None:
    """sums[task] += (response-token loss, right greedy answers) of this rank's (task, example)s.

    Every rank has the whole weights meanwhile, so ranks may have different numbers of items.
    max_new_tokens 0: loss only. losses False: no loss. sums: [tasks, 2], float64. interrupted:
    asked on the way; once it says so, the sums stay incomplete.
    """
    by_task = defaultdict(list)
    for i, example in items:
        by_task[i].append(tokens[example.id])
    with gathered(model):
        for i, rows in by_task.items() if losses else ():
            rows = sorted(rows, key=lambda row: len(row.ids))
            size = rows_to_score(model.config, len(rows[-1].ids))
            for at in range(0, len(rows), size):
                if interrupted():
                    return
                batch = collate(rows[at : at + size], tokenizer.pad_token_id)
                batch = {name: x.to(sums.device) for name, x in batch.items()}
                sums[i, 0] += token_loss(model, batch).double()
        if max_new_tokens and items:
            rows = [tokens[example.id] for _, example in items]
            prompts = [row.ids[: row.prompt_length] for row in rows]
            stop = template(tokenizer).stop
            longest = max(map(len, prompts)) + max_new_tokens
            width = next(model.parameters()).element_size()
            answers = sample(
                model,
                tokenizer,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=0,
                stop=stop,
                batch_size=rows_to_answer(model.config, longest, width),
                interrupted=interrupted,
            )
            texts = tokenizer.batch_decode([a.answer for a in answers])
            for (i, example), text in zip(items, texts, strict=True):
                sums[i, 1] += is_right(text, example)


def adaptation(
    model,
    tasks: list[Task],
    tokens: dict[str, Encoded],
    tokenizer,
    world: World,
    *,
    adapt: Callable,
    restore: Callable,
    draw: Callable,
    curve: int,
    max_length: int,
    problems: int,
    max_new_tokens: int,
    seed: int,
    stop,
) -> dict[str, dict] | None:
    """{task: loss_before, loss_after, accuracy_before, accuracy_after, problems} on its test rows.

    draw(rng, rows): a task's support rows, the same at every call with the same seed. adapt(rows,
    watch) trains on them and calls watch(k) after k steps; restore() brings the weights back.
    curve: the number of these steps, to measure after each (steps: [{loss, accuracy}], from step 0
    on), and the accuracy without any, the support rows in the prompt (accuracy_in_context), if
    these prompts have at most max_length tokens; 0: neither. Replicas take
    different tasks, the ranks of one replica different problems. stop: see run.Stop; None once a
    stop is agreed on. Losses in nats a token. Collective.
    """
    tests = [task.test[:problems] for task in tasks]
    supports = [draw(random.Random(f"{seed}/evaluation/{t.name}"), t.support) for t in tasks]
    pool = [(i, example) for i, rows in enumerate(tests) for example in rows]
    in_context = {}
    if curve and max_new_tokens:
        for support, rows in zip(supports, tests, strict=True):
            in_context |= encode_in_context(tokenizer, support, rows)
        if any(len(row.ids) > max_length for row in in_context.values()):
            in_context = {}
    # Of each task the sums of loss and right answers: before, after, in context, after k steps
    sums = torch.zeros(4 + curve, len(tasks), 2, dtype=torch.float64, device=world.device)
    before, after, prompted, *steps = sums

    measure = partial(
        score,
        model,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        interrupted=stop.is_requested,
    )
    mine = pool[world.rank :: world.size]
    measure(mine, tokens, sums=before)
    if in_context:
        measure(mine, in_context, sums=prompted, losses=False)
    for i, support in enumerate(supports):
        if i % world.replicas == 0 and stop.agreed():
            return None
        if i % world.replicas == world.replica:
            mine = [(i, example) for example in tests[i][world.shard :: world.shards]]

            def watch(k: int, mine=mine) -> None:
                if k < curve:
                    measure(mine, tokens, sums=steps[k])

            adapt(support, watch)
            measure(mine, tokens, sums=after)
            restore()
    if stop.agreed():
        return None
    dist.all_reduce(sums)
    steps[0], steps[-1] = before, after
    result = {}
    for i, (task, rows) in enumerate(zip(tasks, tests, strict=True)):
        length = sum(len(tokens[e.id].ids) - tokens[e.id].prompt_length for e in rows)

        def means(sums: torch.Tensor, name: str = "", i=i, rows=rows, length=length) -> dict:
            loss, right = sums[i].tolist()
            numbers = {f"loss{name}": loss / length}
            return numbers | ({f"accuracy{name}": right / len(rows)} if max_new_tokens else {})

        result[task.name] = means(before, "_before") | means(after, "_after")
        result[task.name]["problems"] = len(rows)
        if in_context:
            right = prompted[i, 1].item()
            result[task.name]["accuracy_in_context"] = right / len(rows)
        if curve:
            result[task.name]["steps"] = [means(at_step) for at_step in steps]
    return result


def average(result: dict[str, dict]) -> dict[str, float]:
    """Mean over tasks."""
    keys = [k for k in next(iter(result.values())) if k not in ("problems", "steps")]
    return {k: sum(r[k] for r in result.values()) / len(result) for k in keys}


def adaptation_lines(step: int, result: dict | None, earlier: dict[int, dict]) -> list[str]:
    """What the terminal says of an evaluation, and of what is wrong with it.

    earlier: evaluations by step. At the first ones: whether adaptation works at all. At later ones:
    whether the model has got worse before adaptation, as it does under too high rates.
    """
    if result is None:
        return []
    mean = average(result)
    before, after = mean["loss_before"], mean["loss_after"]
    line = f"step {step}: loss before adaptation {before:.3f}, after {after:.3f}"
    if "accuracy_after" in mean:
        line += f", accuracy {mean['accuracy_before']:.1%} -> {mean['accuracy_after']:.1%}"
    if "accuracy_in_context" in mean:
        line += f", with the examples in the prompt instead {mean['accuracy_in_context']:.1%}"
    lines, gain = [line], before - after
    if len(earlier) < 2 and -0.01 < gain < 0.01:
        lines.append(
            f"warning: adaptation gains only {gain:+.4f} nats: the inner loop hardly moves the "
            "model (raise --inner-lr or --inner-steps)"
        )
    if len(earlier) < 2 and gain <= -0.01:
        lines.append(
            f"warning: adaptation makes the loss worse by {-gain:.3f} nats (lower --inner-lr)"
        )
    start = average(earlier[min(earlier)]) if earlier else mean
    if before > start["loss_before"] + 0.5 and after > start["loss_after"]:
        lines.append(
            f"warning: the loss is above its start, before adaptation ({start['loss_before']:.3f}) "
            f"and after it ({start['loss_after']:.3f}): lower --outer-lr"
        )
    return lines


def results_table(base: dict[str, dict], trained: dict[str, dict]) -> str:
    """task | loss before, after | accuracy before, after: the base model and the meta-trained.

    The accuracy in context, where it was measured: without adaptation, the rows in the prompt.
    """
    in_context = any("accuracy_in_context" in numbers for numbers in base.values())
    width = max(len(name) for name in [*base, "mean of tasks"])
    column = f"{'loss before':>11} {'after':>6} {'acc. before':>12} {'after':>6}"
    column += f" {'in context':>11}" if in_context else ""
    titles = f"{'base model':^{len(column)}} | {'meta-trained':^{len(column)}}"
    head = f"{'task':{width}} | {column} | {column}"
    rule = "".join("+" if c == "|" else "-" for c in head)
    lines = [f"{'':{width}} | {titles}", head, rule]
    rows = [(name, base[name], trained[name]) for name in base]
    for name, *pair in [*rows, ("mean of tasks", average(base), average(trained))]:
        cells = [_adaptation_cell(numbers, in_context) for numbers in pair]
        lines.append(f"{name:{width}} | " + " | ".join(cells))
    return "\n".join(lines)


def _adaptation_cell(numbers: dict, in_context: bool) -> str:
    names = ["accuracy_before", "accuracy_after", "accuracy_in_context"]
    before, after, prompted = (f"{numbers[k]:.1%}" if k in numbers else "-" for k in names)
    losses = f"{numbers['loss_before']:11.3f} {numbers['loss_after']:6.3f}"
    cell = f"{losses} {before:>12} {after:>6}"
    return f"{cell} {prompted:>11}" if in_context else cell


def step_metrics(losses: list[list[float]], names: list[str], gain: bool) -> dict[str, float]:
    """The metrics of one meta-step, under the names of the reference trainer.

    losses: of each task (support, query, query before adaptation). adaptation_gap is a
    generalisation gap (query after adaptation - last support loss), adaptation_gain is what
    meta-learning is to raise (query before - after).
    """
    support, query, before = ([row[k] for row in losses] for k in range(3))
    gaps = [q - s for q, s in zip(query, support, strict=True)]
    metrics = {
        "meta/loss": _mean(query),
        "meta/avg_support_loss": _mean(support),
        "meta/avg_query_loss": _mean(query),
        "meta/avg_adaptation_gap": _mean(gaps),
        "meta/adaptation_gap_std": math.sqrt(_variance(gaps)),
        "meta/task_loss_variance": _variance(query),
    }
    if gain:
        metrics["meta/query_loss_before"] = _mean(before)
        metrics["meta/adaptation_gain"] = _mean(before) - _mean(query)
    for i, name in enumerate(names):
        metrics[f"{name}/support_loss"] = support[i]
        metrics[f"{name}/query_loss"] = query[i]
        metrics[f"{name}/adaptation_gap"] = gaps[i]
        if gain:
            metrics[f"{name}/adaptation_gain"] = before[i] - query[i]
    return metrics


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _variance(values: list[float]) -> float:
    return _mean([(v - _mean(values)) ** 2 for v in values])


# --------------------------------------------------------------------------------------------------
# Problems and games with a reward. A group is a list of trajectories of one prompt, see games/.

COUNTS = ("right", "turns", "right_turns", "reward", "tokens", "cut_turns", "misread")


def trajectory_counts(trajectory, game) -> dict:
    """What is counted of a trajectory; right: it is won."""
    turns = trajectory.turns
    misread = getattr(game, "misread_reward", math.nan)
    return {
        "right": trajectory.won,
        "turns": len(turns),
        "right_turns": sum(t.reward > 0 for t in turns),
        "reward": sum(t.reward for t in turns),
        "tokens": sum(len(t.ids) for t in turns),
        "cut_turns": sum(not t.finished for t in turns),
        "misread": sum(t.reward == misread for t in turns),
    }


def play_tests(play: Callable, tests: dict[str, tuple], world: World, stop) -> dict | None:
    """{test set: accuracy, step_accuracy, reward, length, truncated, episodes}, greedy.

    tests: {name: (game, number of episodes)}; every rank plays some of each. play(game, seeds,
    samples, key, temperature) -> groups. accuracy: fraction of episodes won; step_accuracy: right
    turns / turns; for cards in pictures also recognition, the fraction of turns that name them.
    stop: see run.Stop; None once a stop is agreed on. Under FSDP2 call it within gathered(model).
    Collective.
    """
    result = {}
    for name, (game, n) in tests.items():
        groups = play(game, range(world.rank, n, world.size), 1, "test", 0.0)
        if stop.agreed():
            return None
        rows = [trajectory_counts(trajectory, game) for (trajectory,) in groups]
        counts = world.sum(*(sum(row[k] for row in rows) for k in COUNTS))
        sums = dict(zip(COUNTS, counts, strict=True))
        result[name] = {
            "accuracy": sums["right"] / n,
            "step_accuracy": sums["right_turns"] / sums["turns"],
            "reward": sums["reward"] / n,
            "length": sums["tokens"] / sums["turns"],
            "truncated": sums["cut_turns"] / sums["turns"],
            "episodes": n,
        }
        if getattr(game, "misread_reward", None):
            result[name]["recognition"] = 1 - sums["misread"] / sums["turns"]
    return result


def equally_good(group: list) -> bool:
    """Whether a prompt's trajectories all have the same reward, so that none stands out."""
    return len({trajectory.returns()[0] for trajectory in group}) == 1


def rollout_metrics(groups: list[list], world: World) -> dict[str, float]:
    """Reward, length and truncation of a step's rollouts, over all ranks. Collective.

    groups_without_variance: the fraction of groups whose rewards are all the same.
    """
    trajectories = [t for group in groups for t in group]
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    rewards = [t.returns()[0] for t in trajectories]
    equal = sum(map(equally_good, groups))
    n, reward, square, won, length, cut, n_turns, equal, n_groups = world.sum(
        len(rewards),
        sum(rewards),
        sum(r * r for r in rewards),
        sum(t.won for t in trajectories),
        sum(len(turn.ids) for turn in turns),
        sum(not turn.finished for turn in turns),
        len(turns),
        equal,
        len(groups),
    )
    return {
        "reward/mean": reward / n,
        "reward/std": math.sqrt(max(0.0, square / n - (reward / n) ** 2)),
        "reward/won": won / n,
        "response_length": length / n_turns,
        "truncated": cut / n_turns,
        "groups_without_variance": equal / n_groups,
    }


def rollout_warnings(metrics: dict[str, float], max_new_tokens: int) -> dict[str, str]:
    """{kind: what is wrong with a step's rollouts}."""
    warnings = {}
    if metrics.get("truncated", 0) > 0.5:
        warnings["cut"] = (
            f"{metrics['truncated']:.0%} of the responses are cut at --max-new-tokens "
            f"{max_new_tokens}: their rewards say little"
        )
    if metrics.get("groups_without_variance") == 1:
        warnings["equal"] = (
            "all responses to each prompt have the same reward: this step's advantages are zero, "
            "nothing is learned from them"
        )
    return warnings


def sample_rows(groups: list[list], step: int, tokenizer) -> list[dict]:
    """Responses with their rewards, as rows for people to read."""
    rows = []
    for i, group in enumerate(groups):
        for j, trajectory in enumerate(group):
            for k, turn in enumerate(trajectory.turns):
                rows.append(
                    {
                        "step": step,
                        "prompt": tokenizer.decode(turn.prompt),
                        "response": turn.text,
                        "reward": turn.reward,
                        "length": len(turn.ids),
                        "truncated": not turn.finished,
                        "episode": i,
                        "sample": j,
                        "turn": k,
                        **({"noted": turn.noted} if turn.noted else {}),
                    }
                )
    return rows


def tests_lines(step: int, result: dict[str, dict], samples: list[dict]) -> list[str]:
    """What the terminal says of test sets, and of the best and the worst of some responses."""
    texts = []
    for name, r in result.items():
        text = f"{name} {r['accuracy']:.1%}"
        if r["step_accuracy"] != r["accuracy"]:  # episodes of several turns
            text += f", step accuracy {r['step_accuracy']:.1%}"
        if "recognition" in r:
            text += f", recognition {r['recognition']:.1%}"
        texts.append(f"{text}, {r['length']:.0f} tokens")
    lines = [f"step {step}: " + "; ".join(texts)]
    if samples:
        ordered = sorted(samples, key=lambda row: (row["reward"], -row["length"]))
        for label, row in (("best", ordered[-1]), ("worst", ordered[0])):
            response = " ".join(row["response"].split())
            if len(response) > 130:
                response = response[:130] + "..."
            lines.append(f"  {label}, reward {row['reward']:g}, {row['length']} tokens: {response}")
    return lines


def tests_table(first: dict[str, dict], last: dict[str, dict]) -> str:
    """Each test set's accuracy at two evaluations, with the last one's 95% interval; lengths."""
    head = (
        f"{'test set':18} {'episodes':>8} {'accuracy: first':>16} {'last':>7} "
        f"{'95% interval':>16} {'length: first':>14} {'last':>7}"
    )
    lines = [head, "-" * len(head)]
    for name, b in last.items():
        low, high = wilson(round(b["accuracy"] * b["episodes"]), b["episodes"])
        lines.append(
            f"{name:18} {b['episodes']:8} {100 * first[name]['accuracy']:15.1f}% "
            f"{100 * b['accuracy']:6.1f}% {100 * low:7.1f} to {100 * high:4.1f} "
            f"{first[name]['length']:14.1f} {b['length']:7.1f}"
        )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Statistics


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right) from `right` of n.

    Chen et al. 2021, arXiv 2107.03374, eq. 1.
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927)."""
    p = right / n
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    middle, scale = p + z * z / (2 * n), 1 + z * z / n
    return (middle - spread) / scale, (middle + spread) / scale


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 4000) -> tuple[float, float]:
    """95% percentile interval of the mean, resampling the values (one for each problem).

    For a paired comparison give differences.
    """
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[rng.integers(0, len(values), (100, len(values)))].mean(1)
            for _ in range(draws // 100)
        ]
    )
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models are equally often right.

    From the numbers of problems that only one of them solves.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)
