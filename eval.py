"""Evaluation by adaptation (a task's test rows before and after adapting to its support rows), and the log of a meta-learning run."""

import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

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
            answers = models.sample(model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=0, stop=template(tokenizer).stop)
            for (i, e), text in zip(items, tokenizer.batch_decode([s.answer for s in answers]), strict=True):
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


# ---------------------------------------------------------------------------------------------------------------------
# The log of a meta-learning run


def step_metrics(losses: list[list[float]], names: list[str], gain: bool) -> dict[str, float]:
    """The metrics of one meta-step, under the names of the reference trainer; adaptation_gap is a generalisation gap (query after
    adaptation - last support loss), adaptation_gain is what meta-learning is to raise (query before - after)."""
    count = len(losses)
    support, query, before = ([row[k] for row in losses] for k in range(3))
    gaps = [q - s for q, s in zip(query, support, strict=True)]
    mean = lambda x: sum(x) / count  # noqa: E731
    spread = lambda x: mean([(v - mean(x)) ** 2 for v in x])  # noqa: E731
    metrics = {"meta/loss": mean(query), "meta/avg_support_loss": mean(support), "meta/avg_query_loss": mean(query),
               "meta/avg_adaptation_gap": mean(gaps), "meta/adaptation_gap_std": math.sqrt(spread(gaps)), "meta/task_loss_variance": spread(query)}
    if gain:
        metrics |= {"meta/query_loss_before": mean(before), "meta/adaptation_gain": mean(before) - mean(query)}
    for i, name in enumerate(names):
        metrics |= {f"{name}/support_loss": support[i], f"{name}/query_loss": query[i], f"{name}/adaptation_gap": gaps[i]}
        if gain:
            metrics[f"{name}/adaptation_gain"] = before[i] - query[i]
    return metrics


class Log:
    """metrics.jsonl and evaluations.jsonl (cut back to the resumed step), wandb if asked, the table and picture at the end."""

    def __init__(self, project: str, settings: dict, run: Path, active: bool, step: int):
        self.run, self.active, self.last_gain, self.wandb = run, active, None, None
        kept = {}
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            lines = (run / name).read_text().splitlines() if (run / name).exists() else []
            kept[name] = [row for line in lines if line.endswith("}") and (row := json.loads(line))["step"] <= step]  # a kill may leave half a line
        self.evaluations = {row["step"]: row["tasks"] for row in kept["evaluations.jsonl"]}
        dist.barrier()
        if active:
            for name, rows in kept.items():
                (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            if settings["wandb"]:
                import wandb

                self.wandb = wandb.init(project=project, name=run.name, id=run.name, resume="allow", config=settings, dir=run)
        dist.barrier()

    def _append(self, name: str, row: dict) -> None:
        with open(self.run / name, "a") as f:
            f.write(json.dumps(row) + "\n")

    def step(self, metrics: dict) -> None:
        self.last_gain = metrics.get("meta/adaptation_gain", self.last_gain)
        if self.active:
            self._append("metrics.jsonl", metrics)
            if self.wandb:
                self.wandb.log(metrics, step=metrics["step"])

    def evaluation(self, step: int, result: dict) -> None:
        self.evaluations[step] = result
        mean = average(result)
        if not self.active:
            return
        self._append("evaluations.jsonl", {"step": step, "mean": mean, "tasks": result})
        gain = mean["loss_before"] - mean["loss_after"]
        accuracy = f", accuracy {100 * mean['accuracy_before']:.1f}% -> {100 * mean['accuracy_after']:.1f}%" if "accuracy_after" in mean else ""
        tqdm.write(f"step {step}: loss before adaptation {mean['loss_before']:.3f}, after {mean['loss_after']:.3f}{accuracy}", file=sys.stdout)
        if len(self.evaluations) <= 2 and gain < 0.01:
            tqdm.write(f"warning: adaptation gains only {gain:+.4f} nats: the inner loop hardly moves the model (raise --inner-lr or --inner-steps)"
                       if gain > -0.01 else f"warning: adaptation makes the loss worse by {-gain:.3f} nats (lower --inner-lr)", file=sys.stdout)
        if self.wandb:
            self.wandb.log({f"eval/{k}": v for k, v in mean.items()}, step=step)

    def finish(self, start_time: float) -> None:
        if self.evaluations:
            base, trained = self.evaluations[min(self.evaluations)], self.evaluations[max(self.evaluations)]
            print("\n" + results_table(base, trained))
        import plots

        plots.training_curves([self.run], self.run / "curves.png")
        print(f"\n{time.time() - start_time:.0f} s; model: {self.run / 'checkpoint'}; picture: {self.run / 'curves.png'}")
