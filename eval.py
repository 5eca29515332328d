"""Evaluation by adaptation: a model's loss and accuracy on a task's test rows before and after adapting to its support rows."""

import random
from collections.abc import Callable

import torch
import torch.distributed as dist

import model as models
from checker import grade
from data import Encoded, Example, Task, collate, template


def score(model, items: list[tuple[int, Example]], tokens: dict[str, Encoded], tokenizer, max_new_tokens: int, out: torch.Tensor) -> None:
    """out[task] += (summed response-token loss, right greedy answers) over this rank's (task, example) items.

    Every rank has the whole weights meanwhile, so ranks may have different numbers of items. max_new_tokens 0: loss only.
    """
    by_task: dict[int, list[Encoded]] = {}
    for i, e in items:
        by_task.setdefault(i, []).append(tokens[e.id])
    with models.gathered(model), torch.no_grad():
        for i, rows in by_task.items():
            rows = sorted(rows, key=lambda r: len(r.ids))
            for at in range(0, len(rows), 16):
                batch = {k: v.to(out.device) for k, v in collate(rows[at : at + 16], tokenizer.pad_token_id).items()}
                out[i, 0] += models.token_loss(model, batch).double()
        if max_new_tokens and items:
            prompts = [tokens[e.id].ids[: tokens[e.id].prompt_length] for _, e in items]
            answers = models.generate_greedy(model, prompts, template(tokenizer).stop, tokenizer.pad_token_id, max_new_tokens)
            for (i, e), text in zip(items, tokenizer.batch_decode(answers), strict=True):
                out[i, 1] += grade(text, e.answer)


def adaptation(model, tasks: list[Task], tokens: dict[str, Encoded], tokenizer, world: models.World, *, adapt: Callable, restore: Callable,
               shots: int, problems: int, max_new_tokens: int, seed: int, stop: models.Stop | None = None) -> dict[str, dict] | None:
    """{task: loss_before, loss_after, accuracy_before, accuracy_after, problems}, the same rows at every call with the same seed.

    adapt(rows) trains on a task's `shots` support rows, restore() brings the weights back. Replicas take different tasks, the ranks
    of one replica different problems. None if a stop was agreed on.
    """
    tests = [t.test[:problems] for t in tasks]
    totals = torch.zeros(len(tasks), 4, dtype=torch.float64, device=world.device)  # before: loss, right; after: loss, right
    pool = [(i, e) for i, rows in enumerate(tests) for e in rows]
    score(model, pool[world.rank :: world.size], tokens, tokenizer, max_new_tokens, totals[:, :2])
    for i, task in enumerate(tasks):
        if stop is not None and i % world.replicas == 0 and stop.agreed():
            return None
        if i % world.replicas == world.replica:
            adapt(random.Random(f"{seed}/evaluation/{task.name}").sample(task.support, shots))
            score(model, [(i, e) for e in tests[i][world.shard :: world.shards]], tokens, tokenizer, max_new_tokens, totals[:, 2:])
            restore()
    dist.all_reduce(totals)
    result = {}
    for task, rows, (loss0, right0, loss1, right1) in zip(tasks, tests, totals.tolist(), strict=True):
        count = sum(len(tokens[e.id].ids) - tokens[e.id].prompt_length for e in rows)
        result[task.name] = {"loss_before": loss0 / count, "loss_after": loss1 / count, "problems": len(rows)}
        if max_new_tokens:
            result[task.name] |= {"accuracy_before": right0 / len(rows), "accuracy_after": right1 / len(rows)}
    return result


def average(result: dict[str, dict]) -> dict[str, float]:
    """Mean over tasks."""
    keys = [k for k in next(iter(result.values())) if k != "problems"]
    return {k: sum(r[k] for r in result.values()) / len(result) for k in keys}


def results_table(base: dict[str, dict], trained: dict[str, dict]) -> str:
    """task | loss before | after | accuracy before | after, the base model beside the meta-trained one."""
    width = max(len(n) for n in [*base, "mean of tasks"])
    column = f"{'loss before':>11} {'after':>6} {'acc. before':>12} {'after':>6}"
    lines = [f"{'':{width}} | {'base model':^{len(column)}} | {'meta-trained':^{len(column)}}", f"{'task':{width}} | {column} | {column}"]
    lines.append("".join("+" if c == "|" else "-" for c in lines[1]))
    for name, pair in [*((n, (base[n], trained[n])) for n in base), ("mean of tasks", (average(base), average(trained)))]:
        cells = []
        for row in pair:
            accuracy = [f"{100 * row[k]:.1f}%" if k in row else "-" for k in ("accuracy_before", "accuracy_after")]
            cells.append(f"{row['loss_before']:11.3f} {row['loss_after']:6.3f} {accuracy[0]:>12} {accuracy[1]:>6}")
        lines.append(f"{name:{width}} | " + " | ".join(cells))
    return "\n".join(lines)
