r"""Evaluation: benchmark accuracy, the few-shot study, and what the training scripts measure and log.

    python eval.py --model runs/fomaml/checkpoint --benchmark embedded                            # accuracy on all embedded test problems
    python eval.py --model Qwen/Qwen2.5-Math-1.5B-Instruct --benchmark math500 --temperature 0.6 --samples 32      # avg@32, pass@k
    torchrun --standalone --nproc_per_node 4 eval.py --model DIR --benchmark all_id               # problems split over ranks
    python eval.py --model tiny runs/fomaml/checkpoint --few-shot 0 5 10 25 --seeds 3              # who learns faster from n examples?

Every response goes to responses-RANK.jsonl of the output folder as it comes; a killed run continues from there, none lost, none twice.
Results: results.json, results.md. Problems, not samples, are the unit of every interval.
"""

import json
import math
import os
import random
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import model as models
from checker import extract_answer, grade, is_equal
from data import BOX, DataError, Encoded, Example, Task, collate, draw_support, embedded_examples, episode_tasks, load_tasks, read_rows, response_tokens, template
from games import games_of


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
            adapt(draw_support(random.Random(f"{seed}/evaluation/{task.name}"), task.support, shots))
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

    def __init__(self, project: str, settings: dict, run: Path, active: bool, step: int, *more: str):
        self.run, self.active, self.last_gain, self.wandb = run, active, None, None
        kept = {}
        for name in ("metrics.jsonl", "evaluations.jsonl", *more):
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

    def record(self, step: int, result: dict[str, dict], text: str, samples: list[dict]) -> None:
        """An evaluation on test sets. samples go to samples.jsonl, the best and the worst to the terminal: people read them."""
        self.evaluations[step] = result
        if self.active:
            self._append("evaluations.jsonl", {"step": step, "tasks": result})
            tqdm.write(f"step {step}: {text}", file=sys.stdout)
            for row in samples:
                self._append("samples.jsonl", row)
            ordered = sorted(samples, key=lambda r: (r["reward"], -r["length"]))
            for label, row in (("best", ordered[-1]), ("worst", ordered[0])) if ordered else ():
                line = " ".join(row["response"].split())
                tqdm.write(f"  {label}, reward {row['reward']:g}, {row['length']} tokens: {line[:130]}{'...' if len(line) > 130 else ''}", file=sys.stdout)
            if self.wandb:
                self.wandb.log({f"{name}/{k}": v for name, r in result.items() for k, v in r.items()}, step=step)

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

        plots.figure([self.run], self.run / "curves.png")
        print(f"\n{time.time() - start_time:.0f} s; model: {self.run / 'checkpoint'}; picture: {self.run / 'curves.png'}")


# ---------------------------------------------------------------------------------------------------------------------
# Problems and games with a reward (amft.py)


def play_tests(model, tokenizer, world: models.World, tests: dict[str, tuple], max_new_tokens: int, batch_size: int, processor=None) -> dict[str, dict]:
    """{test set: accuracy (share of episodes won), step_accuracy (right turns / turns), reward, length, truncated, episodes; for cards in
    pictures recognition, the share of turns that name them}, greedy.

    tests: {name: (game, number of episodes)}. Every rank plays its share; call it within gathered(model).
    """
    result = {}
    for name, (game, n) in tests.items():
        groups = models.play(model, tokenizer, game, range(world.rank, n, world.size), 1, "test", max_new_tokens, batch_size, 0.0, processor=processor)
        rows = [episode_counts(e, game) for (e,) in groups]
        sums = dict(zip(COUNTS, models.total(world, *(sum(r[k] for r in rows) for k in COUNTS)), strict=True))
        result[name] = {"accuracy": sums["right"] / n, "step_accuracy": sums["right_turns"] / sums["turns"], "reward": sums["reward"] / n,
                        "length": sums["tokens"] / sums["turns"], "truncated": sums["cut_turns"] / sums["turns"], "episodes": n}
        if getattr(game, "misread_reward", None):
            result[name]["recognition"] = 1 - sums["misread"] / sums["turns"]
    return result


COUNTS = ("right", "turns", "right_turns", "reward", "tokens", "cut_turns", "misread")


def episode_counts(episode: models.Episode, game) -> dict:
    """What is counted of an episode; right: it is won."""
    turns = episode.turns
    return dict(zip(COUNTS, (episode.won, len(turns), sum(t.reward > 0 for t in turns), sum(t.reward for t in turns), sum(len(t.ids) for t in turns),
                             sum(not t.finished for t in turns), sum(t.reward == getattr(game, "misread_reward", math.nan) for t in turns)), strict=True))


def rollout_metrics(groups: list[list[models.Episode]], world: models.World) -> dict[str, float]:
    """Reward, length and truncation of a step's rollouts, over all ranks; the share of groups whose rewards are all the same."""
    rewards = [e.returns()[0] for g in groups for e in g]
    turns = [t for g in groups for e in g for t in e.turns]
    equal = sum(len({e.returns()[0] for e in g}) == 1 for g in groups)
    n, s, squares, won, length, cut, count, equal, all_groups = models.total(
        world, len(rewards), sum(rewards), sum(x * x for x in rewards), sum(e.won for g in groups for e in g), sum(len(t.ids) for t in turns),
        sum(not t.finished for t in turns), len(turns), equal, len(groups))
    return {"reward/mean": s / n, "reward/std": math.sqrt(max(0.0, squares / n - (s / n) ** 2)), "reward/won": won / n, "response_length": length / count,
            "truncated": cut / count, "groups_without_variance": equal / all_groups}


def sample_rows(model, tokenizer, game, count: int, samples: int, step: int, seed: int, max_new_tokens: int, batch_size: int, processor=None) -> list[dict]:
    """`samples` responses to each of `count` prompts, others at each step, as rows for people to read."""
    groups = models.play(model, tokenizer, game, range(step, step + count), samples, f"{seed}/show/{step}", max_new_tokens, batch_size, processor=processor)
    return [{"step": step, "prompt": tokenizer.decode(t.prompt), "response": t.text, "reward": t.reward, "length": len(t.ids), "truncated": not t.finished,
             "episode": i, "sample": j, "turn": k} for i, g in enumerate(groups) for j, e in enumerate(g) for k, t in enumerate(e.turns)]


def tests_table(first: dict[str, dict], last: dict[str, dict]) -> str:
    """Each test set's accuracy with its 95% interval at the end, and response length, of two evaluations."""
    lines = [f"{'test set':18} {'episodes':>8} {'accuracy: first':>16} {'last':>7} {'95% interval':>16} {'length: first':>14} {'last':>7}"]
    lines.append("-" * len(lines[0]))
    for name, b in last.items():
        low, high = wilson(round(b["accuracy"] * b["episodes"]), b["episodes"])
        lines.append(f"{name:18} {b['episodes']:8} {100 * first[name]['accuracy']:15.1f}% {100 * b['accuracy']:6.1f}% {100 * low:7.1f} to {100 * high:4.1f} "
                     f"{first[name]['length']:14.1f} {b['length']:7.1f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def pass_at_k(n: int, right: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k samples is right) from `right` of n (Chen et al. 2021, arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a proportion."""
    p, spread = right / n, z * math.sqrt(right / n * (1 - right / n) / n + z * z / (4 * n * n))
    return (p + z * z / (2 * n) - spread) / (1 + z * z / n), (p + z * z / (2 * n) + spread) / (1 + z * z / n)


def bootstrap(values: Sequence[float], seed: int = 0, draws: int = 4000) -> tuple[float, float]:
    """95% percentile interval of the mean, resampling the values (one for each problem). For a paired comparison give differences."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = np.concatenate([values[rng.integers(0, len(values), (100, len(values)))].mean(1) for _ in range(draws // 100)])
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models are equally often right, from the problems that only one of them solves."""
    n = only_first + only_second
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1)) / 2**n)


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks


class Problem(NamedTuple):
    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    subject: str = ""
    level: str = ""


# name: (hub data set, configuration, split)
HUB = {"math500": ("HuggingFaceH4/MATH-500", None, "test"), "aime24": ("HuggingFaceH4/aime_2024", None, "train"), "amc23": ("math-ai/amc23", None, "test"),
       "minerva": ("math-ai/minervamath", None, "test"), "olympiadbench": ("math-ai/olympiadbench", None, "test"), "gsm8k": ("openai/gsm8k", "main", "test"),
       "arc_c": ("allenai/ai2_arc", "ARC-Challenge", "test"), "gpqa_d": ("Idavidrein/gpqa", "gpqa_diamond", "train"), "mmlu_pro": ("TIGER-Lab/MMLU-Pro", None, "test")}
GROUPS = {"all_id": ("aime24", "amc23", "math500", "minerva", "olympiadbench"), "all_ood": ("arc_c", "gpqa_d", "mmlu_pro")}
LETTER_BOX = "\nPlease reason step by step, and put the letter of your final answer within \\boxed{}."


def _problem(row: dict, where: str) -> Problem:
    """A row of any of the benchmarks (hub columns or local files). Raises DataError naming the columns."""
    lower = {k.lower(): v for k, v in row.items()}
    prompt = lower.get("problem") or lower.get("question") or lower.get("prompt")
    answer = next((lower[k] for k in ("answer", "answerkey", "final_answer", "correct answer", "solution") if lower.get(k) not in (None, "", [])), None)
    choices = lower.get("choices") or lower.get("options") or ()
    if isinstance(choices, dict):  # ARC: {"text": [...], "label": ["A", ...] or ["1", ...]}
        answer, choices = "ABCDEFGHIJ"[choices["label"].index(answer)], choices["text"]
    if "incorrect answer 1" in lower:  # GPQA: the right answer's place is a function of the question
        choices = [lower[k] for k in ("correct answer", "incorrect answer 1", "incorrect answer 2", "incorrect answer 3")]
        place = zlib.crc32(prompt.encode()) % 4
        choices = choices[1 : place + 1] + choices[:1] + choices[place + 1 :]
        answer = "ABCD"[place]
    if isinstance(answer, list):
        answer = ", ".join(answer)
    if not isinstance(prompt, str) or answer is None:
        raise DataError(f"{where}: needs problem (or question) and answer; found {', '.join(row)}")
    answer = str(answer)
    if "####" in answer:
        answer = extract_answer(answer)
    return Problem("", prompt, answer, tuple(map(str, choices)), str(lower.get("subject") or lower.get("category") or lower.get("type") or ""), str(lower.get("level") or ""))


def load_benchmark(name: str, path: str | None, limit: int) -> list[Problem]:
    """Problems of a benchmark from the hub, or of any name from a local file. GPQA is read at run time only and never stored."""
    if name == "embedded":
        rows = [e for es in embedded_examples(40, 42, "test").values() for e in es]
        problems = [Problem("", e.prompt, e.answer, (), e.id.rsplit("/", 1)[0], str(e.level)) for e in rows]
    elif path:
        problems = [_problem(row, path) for row in read_rows(Path(path))]
    else:
        import datasets

        source, config, split = HUB[name]
        try:
            rows = datasets.load_dataset(source, config, split=split)
        except Exception as e:  # datasets and huggingface_hub raise many kinds; the user needs the one line
            raise DataError(f"cannot load {source} from the hub: {str(e).splitlines()[0][:200]} (local files: --data PATH)") from None
        problems = [_problem(row, source) for row in rows]
    if not problems:
        raise DataError(f"benchmark {name}: no problems")
    if limit and limit < len(problems):  # evenly over the file
        problems = [problems[i * len(problems) // limit] for i in range(limit)]
    return [p._replace(id=f"{name}/{i}") for i, p in enumerate(problems)]


def judge(response: str, problem: Problem) -> bool:
    """Right or wrong; of multiple choice the letter counts, or the text of the choice."""
    if not problem.choices:
        return grade(response, problem.answer)
    answer = extract_answer(response) or ""
    text = problem.choices["ABCDEFGHIJ".index(problem.answer)]
    return is_equal(answer, problem.answer) or is_equal(answer, text)


def summarise(rows: list[dict], samples: int) -> dict:
    """Accuracy (mean over samples: avg@k), pass@k, 95% interval over problems, by subject and level, lengths, truncated, unparsable."""
    by_problem = defaultdict(list)
    for r in rows:
        by_problem[r["id"]].append(r)
    means = [sum(r["right"] for r in rs) / len(rs) for rs in by_problem.values()]
    low, high = wilson(int(sum(means)), len(means)) if samples == 1 else bootstrap(means)
    result = {"problems": len(means), "samples": samples, "accuracy": sum(means) / len(means), "interval": [low, high],
              "mean_tokens": sum(r["tokens"] for r in rows) / len(rows), "truncated": sum(not r["finished"] for r in rows) / len(rows),
              "unparsable": sum(r["answer"] is None and not r["right"] for r in rows) / len(rows)}
    for k in (k for k in (2, 4, 8, 16, 32, 64) if k <= samples):
        result[f"pass@{k}"] = sum(pass_at_k(len(rs), sum(r["right"] for r in rs), k) for rs in by_problem.values()) / len(means)
    for key in ("subject", "level"):
        groups = defaultdict(list)
        for r in rows:
            groups[r[key]].append(r["right"])
        if len(groups) > 1:
            result[key] = {g: [sum(v) / len(v), len(v) // samples] for g, v in sorted(groups.items())}
    return result


GAMES = ("general_points", "virl")


def written(out: Path, model_name: str) -> dict[tuple, dict]:
    """{(id, sample): row} of the responses that a folder holds for a model. A kill may leave half a line."""
    lines = (line for file in sorted(out.glob("responses-*.jsonl")) for line in file.read_text().splitlines() if line.endswith("}"))
    return {(r["id"], r["sample"]): r for r in map(json.loads, lines) if r["model"] == model_name}


def append_to(file: Path):
    """The file, open at its end, at the start of a line."""
    f = open(file, "a")
    if f.tell() and not file.read_text().endswith("\n"):
        f.write("\n")
    return f


def run_games(args, name: str, model_name: str, out: Path, rank: int, size: int, device: torch.device) -> dict:
    """Episodes of a game's test sets, in distribution and out of it: {"name (test set)": summary} on rank 0. right: the episode is won."""
    _, tokenizer, processor = models.load_readers(model_name, args.vision, args.trust_remote_code)
    _, _, tests = games_of(name, vision=args.vision, compact=args.compact, routes=args.data, test_routes=args.data)
    ids = {f"{name} ({test})": [f"{name}/{test}/{i}" for i in range(args.limit or 234)] for test in tests}
    done, model = written(out, model_name), None
    _barrier()
    with append_to(out / f"responses-{rank}.jsonl") as f:
        for (label, wanted), game in zip(ids.items(), tests.values(), strict=True):
            todo = [i for i, key in enumerate(wanted) if (key, args.samples - 1) not in done][rank::size]
            if todo and model is None:
                model = models.load_weights(model_name, torch.bfloat16 if device.type == "cuda" else torch.float32, args.trust_remote_code).to(device).eval()
            step = max(1, args.batch_size // args.samples)
            for at in tqdm(range(0, len(todo), step), desc=label, disable=rank != 0):
                groups = models.play(model, tokenizer, game, todo[at : at + step], args.samples, f"{args.seed}/{label}", args.max_length, args.batch_size, args.temperature, processor=processor)
                for i, group in zip(todo[at : at + step], groups, strict=True):
                    for k, e in enumerate(group):
                        counts = episode_counts(e, game)
                        f.write(json.dumps({"model": model_name, "id": wanted[i], "sample": k, **counts, "answer": "", "subject": label, "level": "",
                                            "finished": not counts["cut_turns"], "response": [t.text for t in e.turns]}) + "\n")
                f.flush()
    _barrier()
    rows, result = written(out, model_name) if rank == 0 else {}, {}
    for label, wanted in ids.items() if rank == 0 else ():
        mine = [rows[key, k] for key in wanted for k in range(args.samples)]
        turns = sum(r["turns"] for r in mine)
        result[label] = summarise(mine, args.samples) | {"step_accuracy": sum(r["right_turns"] for r in mine) / turns, "reward": sum(r["reward"] for r in mine) / len(mine)}
        if args.vision and name == "general_points":
            result[label]["recognition"] = 1 - sum(r["misread"] for r in mine) / turns
    return result


def run_benchmarks(args, names: Sequence[str], model_name: str, out: Path, rank: int, size: int, device: torch.device) -> dict:
    """Sample, judge and write what is not in the output folder yet; returns {benchmark: summary} on rank 0."""
    problems = {n: load_benchmark(n, args.data, args.limit) for n in names}
    _, tokenizer = models.load_config(model_name, args.trust_remote_code)
    done = written(out, model_name)
    chat, dtype = template(tokenizer), torch.bfloat16 if device.type == "cuda" else torch.float32
    wanted = [(p, k) for ps in problems.values() for p in ps for k in range(args.samples)]
    todo = sorted((w for w in wanted if (w[0].id, w[1]) not in done), key=lambda w: len(w[0].prompt))[rank::size]
    _barrier()
    if todo:
        model = models.load_weights(model_name, dtype, args.trust_remote_code).to(device).eval()
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    right = sum(r["right"] for r in done.values())
    bar = tqdm(total=len(wanted), initial=len(done), disable=rank != 0, desc="/".join(names), unit="response")
    with append_to(out / f"responses-{rank}.jsonl") as f:
        for at in range(0, len(todo), args.batch_size):
            chunk = todo[at : at + args.batch_size]
            texts = []
            for p, _ in chunk:
                listed = "".join(f"\n({letter}) {text}" for letter, text in zip("ABCDEFGHIJ", p.choices, strict=False))
                suffix = args.suffix if args.suffix is not None else "" if p.id.startswith("embedded/") else LETTER_BOX if p.choices else BOX
                texts.append(chat.before + p.prompt + listed + suffix + chat.after)
            prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
            tokens = max(1, min(args.max_length, limit - max(map(len, prompts))))
            seeds = [zlib.crc32(f"{args.seed}/{p.id}/{k}".encode()) for p, k in chunk]  # whatever the chunk: a continued run draws the same
            drawn = models.sample(model, tokenizer, prompts, 1, tokens, args.temperature, args.top_p, seeds=seeds, stop=chat.stop, batch_size=args.batch_size)
            for (p, k), s in zip(chunk, drawn, strict=True):
                text = tokenizer.decode(s.answer)
                row = {"model": model_name, "id": p.id, "sample": k, "right": judge(text, p), "answer": extract_answer(text), "gold": p.answer, "subject": p.subject,
                       "level": p.level, "tokens": len(s.ids), "finished": s.finished, "response": text}
                done[p.id, k] = row
                right += row["right"]
                f.write(json.dumps(row) + "\n")
            f.flush()
            bar.update(len(chunk) * size)
            bar.set_postfix(accuracy=f"{100 * right / max(1, len(done)):.1f}%")
    bar.close()
    _barrier()
    rows = written(out, model_name) if rank == 0 else {}
    return {n: summarise([rows[p.id, k] for p in ps for k in range(args.samples)], args.samples) for n, ps in problems.items()} if rank == 0 else {}


# ---------------------------------------------------------------------------------------------------------------------
# The few-shot study: adapt from the checkpoint on n examples of a task, measure on its test rows, restore


def adapt(model, rows: list[Encoded], pad_id: int, optimizer: str, lr: float, steps: int, batch_size: int, seed: int, after: Callable[[int], None]) -> None:
    """`steps` steps of AdamW or SGD on batches of `rows` (reshuffled at every pass); after(step) is called at 0 and after every step."""
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=lr, weight_decay=0.0) if optimizer == "adam" else torch.optim.SGD(params, lr=lr)
    rng, queue = random.Random(seed), []
    after(0)
    for step in range(1, steps + 1):
        while len(queue) < min(batch_size, len(rows)):
            queue += rng.sample(rows, len(rows))
        batch, queue = queue[:batch_size], queue[batch_size:]
        loss = models.token_loss(model, {k: v.to(params[0].device) for k, v in collate(batch, pad_id).items()}) / response_tokens(batch)
        opt.zero_grad()
        loss.backward()
        opt.step()
        after(step)
    opt.zero_grad()


CURVE = (0, 1, 2, 5, 10, 20, 50, 100, 200)  # adaptation steps at which the test loss is taken


def few_shot(args, model_name: str, rank: int, size: int, device: torch.device) -> list[dict]:
    """One row for each (task, n, seed): test loss and the problems solved; curves of the test loss over adaptation steps. All on rank 0."""
    config, tokenizer = models.load_config(model_name, args.trust_remote_code)
    tasks = load_tasks(args.data or "embedded", task_column=args.task_column, seed=args.seed)
    if args.tasks:
        if unknown := set(args.tasks) - {t.name for t in tasks}:
            raise DataError(f"--tasks {', '.join(sorted(unknown))}: no such task; there are {', '.join(t.name for t in tasks)[:400]}")
        tasks = [t for t in tasks if t.name in args.tasks]
    _, evaluated, tokens, report = episode_tasks(tokenizer, tasks, 2048, 1, max(args.few_shot), 0, 0)
    if rank == 0:
        print(report, flush=True)
    model = models.load_weights(model_name, trust_remote_code=args.trust_remote_code).to(device)
    if args.adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
    saved = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    chat = template(tokenizer)
    units = [(t, n, s) for t in evaluated for n in sorted(args.few_shot) for s in range(args.seeds if n else 1)]
    results = []
    for task, n, seed in tqdm(units[rank::size], disable=rank != 0, desc="few-shot " + "/".join(Path(model_name).parts[-2:])):
        test = [tokens[e.id] for e in task.test[: args.limit or None]]
        curve = {}

        def measure(step, test=test, curve=curve):
            if step in CURVE or step == args.adapt_steps:
                model.eval()
                with torch.no_grad():
                    batches = (collate(test[i : i + 32], tokenizer.pad_token_id) for i in range(0, len(test), 32))
                    total = sum(models.token_loss(model, {k: v.to(device) for k, v in b.items()}).item() for b in batches)
                curve[step] = total / response_tokens(test)
                model.train()

        if n:
            shots = [tokens[e.id] for e in random.Random(f"{args.seed}/{seed}/{task.name}").sample(task.support, max(args.few_shot))[:n]]  # nested: 5 are among the 10
            adapt(model, shots, tokenizer.pad_token_id, args.adapt_optimizer, args.adapt_lr, args.adapt_steps, args.adapt_batch, seed, measure)
        else:
            measure(0)
        model.eval()
        answers = models.sample(model, tokenizer, [r.ids[: r.prompt_length] for r in test], max_new_tokens=args.max_length, temperature=0, stop=chat.stop)
        texts = tokenizer.batch_decode([a.answer for a in answers])
        right = [grade(text, e.answer) for text, e in zip(texts, task.test, strict=False)]
        results.append({"model": model_name, "task": task.name, "shots": n, "seed": seed, "loss": curve[max(curve)], "curve": curve, "right": right})
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in saved:
                    p.copy_(saved[name])
    gathered: list = [None] * size
    if size > 1:
        dist.all_gather_object(gathered, results)
    else:
        gathered = [results]
    return [r for rs in gathered for r in rs]


def compare_few_shot(rows: list[dict], names: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """(per model and n: mean and standard deviation over seeds of loss and accuracy, pooled over tasks; per pair of models and n, pooled
    and by task: difference of accuracy with its paired bootstrap interval over problems, and McNemar's p-value on the first seed)."""
    shots, tasks = sorted({r["shots"] for r in rows}), sorted({r["task"] for r in rows})
    cell = {(r["model"], r["task"], r["shots"], r["seed"]): r for r in rows}
    summary, pairs = [], []
    for m in names:
        for n in shots:
            seeds = sorted({r["seed"] for r in rows if r["shots"] == n})
            runs = [[cell[m, t, n, s] for t in tasks] for s in seeds]
            accuracy = [sum(sum(r["right"]) for r in run) / sum(len(r["right"]) for r in run) for run in runs]
            loss = [sum(r["loss"] for r in run) / len(run) for run in runs]
            summary.append({"model": m, "shots": n, "seeds": len(seeds), "accuracy": float(np.mean(accuracy)), "accuracy_sd": float(np.std(accuracy, ddof=1)) if len(seeds) > 1 else 0.0,
                            "loss": float(np.mean(loss)), "loss_sd": float(np.std(loss, ddof=1)) if len(seeds) > 1 else 0.0})
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            for n in shots:
                seeds = sorted({r["seed"] for r in rows if r["shots"] == n})
                for group in [tasks, *([t] for t in tasks)] if len(tasks) > 1 else [tasks]:
                    # per problem: right for b minus right for a, mean over seeds
                    d = np.concatenate([np.mean([np.subtract(cell[b, t, n, s]["right"], cell[a, t, n, s]["right"], dtype=float) for s in seeds], 0) for t in group])
                    first = [(x, y) for t in group for x, y in zip(cell[a, t, n, seeds[0]]["right"], cell[b, t, n, seeds[0]]["right"], strict=True)]
                    pairs.append({"first": a, "second": b, "shots": n, "task": "all" if group is tasks else group[0], "difference": float(d.mean()), "interval": list(bootstrap(d)),
                                  "mcnemar": mcnemar(sum(x and not y for x, y in first), sum(y and not x for x, y in first))})
    return summary, pairs


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Args:
    """Benchmark accuracy, or with --few-shot the few-shot study, of one or several models."""

    model: tuple[str, ...] = ("tiny",)
    """tiny, local folders in Hugging Face format or hub names; several are measured one after the other and compared."""
    adapter: str | None = None
    """A LoRA adapter in PEFT's format for the few-shot study (pip install peft): only it is adapted."""
    output_dir: str = "evals/run"
    """responses-*.jsonl, results.json, results.md. A folder in use is continued; its settings must be the same."""
    seed: int = 42
    """Of samples, shots and splits."""
    limit: int = 0
    """Problems per benchmark (evenly over it; games: episodes) or test rows per task, 0 for all (games: 234, as in the papers)."""
    batch_size: int = 64
    """Responses generated together on a rank."""
    trust_remote_code: bool = False
    """Let a hub model run its own code."""

    # Benchmarks
    benchmark: tuple[str, ...] = ("embedded",)
    """embedded, general_points, virl, math500, aime24, amc23, minerva, olympiadbench, gsm8k, arc_c, gpqa_d, mmlu_pro, all_id, all_ood; with --data a name of your choice."""
    data: str | None = None
    """A local file of the benchmark (.json, .jsonl, .jsonl.gz, .parquet: problem, answer, choices; virl: a route file), or the tasks' data of
    the few-shot study."""
    compact: bool = False
    """Games with the short prompts and routes that amft.py trains small models on."""
    vision: bool = False
    """Games in pictures."""
    temperature: float = 0.6
    """0: greedy."""
    top_p: float = 1.0
    """Nucleus."""
    max_length: int = 8192
    """Tokens of a response at most (cut to the model's context)."""
    samples: int = 1
    """Responses per problem."""
    suffix: str | None = None
    """Text after each problem; default: a request to reason and to box the answer (none for embedded)."""
    check_overlap: str | None = None
    """A training file: warn when it shares problems with the benchmark."""

    # Few-shot study
    few_shot: tuple[int, ...] = ()
    """Numbers of examples n to adapt on."""
    seeds: int = 3
    """Draws of the examples."""
    tasks: tuple[str, ...] = ()
    """Default: the held-out tasks of the data, or all."""
    task_column: str | None = None
    """What makes a task (as in training)."""
    adapt_optimizer: str = "adam"
    """adam (AdamW without decay) or sgd, the inner optimizer of meta-training: report both."""
    adapt_lr: float = 1e-4
    """Its learning rate."""
    adapt_steps: int = 20
    """Its steps, the same for every n."""
    adapt_batch: int = 4
    """Rows per step."""


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _check(args: Args) -> list[str]:
    """The benchmarks' names. Raises DataError for arguments that cannot work."""
    models.check_positive(args, ("batch_size", "samples", "seeds", "max_length", "adapt_steps", "adapt_batch"), ("top_p", "adapt_lr"))
    if args.temperature < 0 or args.top_p > 1:
        raise DataError("--temperature must be 0 or more and --top-p at most 1")
    if args.temperature == 0 and args.samples > 1:
        raise DataError("--samples above 1 needs a --temperature above 0")
    if args.adapt_optimizer not in ("adam", "sgd"):
        raise DataError("--adapt-optimizer is adam or sgd")
    if any(n < 0 for n in args.few_shot):
        raise DataError("--few-shot takes numbers from 0 on")
    names = [n for b in args.benchmark for n in GROUPS.get(b, (b,))]
    if args.data and not args.few_shot and ("embedded" in names or len(names) > 1):
        raise DataError("--data is the file of one benchmark: name it with --benchmark (math500, gsm8k, ... or a name of your choice)")
    if unknown := [n for n in names if n not in (*HUB, *GAMES, "embedded") and not args.data]:
        raise DataError(f"--benchmark {', '.join(unknown)}: unknown; there are embedded, {', '.join([*GAMES, *HUB, *GROUPS])}, or any name with --data PATH")
    if args.vision and any(n not in GAMES for n in names):
        raise DataError("--vision is for the games: --benchmark general_points or virl")
    return names


def _warn_overlap(path: str, problems: list[Problem]) -> None:
    normal = lambda s: " ".join(s.lower().split())  # noqa: E731
    seen = {normal(str(row.get("problem") or row.get("prompt") or row.get("question") or "")) for row in read_rows(Path(path))}
    if shared := [p.id for p in problems if normal(p.prompt) in seen]:
        print(f"warning: {path} contains {len(shared)} of the {len(problems)} problems ({', '.join(shared[:3])} ...): the accuracy below is not held out", flush=True)


def main(args: Args) -> int:
    names = _check(args)
    for m in args.model:
        models.load_config(m, args.trust_remote_code)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if size > 1:
        models.setup()
    out = Path(args.output_dir)
    settings = json.loads(json.dumps({k: v for k, v in asdict(args).items() if k not in ("output_dir", "batch_size", "check_overlap")}))
    if (out / "args.json").exists() and (old := json.loads((out / "args.json").read_text())) != settings:
        raise DataError(f"{out} holds results of other settings ({', '.join(k for k in settings if old.get(k) != settings[k])}): choose another --output-dir")
    if args.check_overlap and rank == 0 and not args.few_shot:
        _warn_overlap(args.check_overlap, [p for n in names for p in load_benchmark(n, args.data, args.limit)])
    _barrier()
    out.mkdir(parents=True, exist_ok=True)
    (out / "args.json").write_text(json.dumps(settings))
    lines, report = [], {"args": settings}
    if args.few_shot:
        rows = [r for m in args.model for r in few_shot(args, m, rank, size, device)]
        if rank == 0:
            summary, pairs = compare_few_shot(rows, args.model)
            report |= {"few_shot": rows, "summary": summary, "pairs": pairs}
            lines = ["| model | shots | accuracy | loss |", "|---|---|---|---|"]
            lines += [f"| {s['model']} | {s['shots']} | {100 * s['accuracy']:.1f}% ± {100 * s['accuracy_sd']:.1f} | {s['loss']:.3f} ± {s['loss_sd']:.3f} |" for s in summary]
            if pairs:
                lines += ["", "| second - first | task | shots | difference of accuracy, 95% interval | McNemar p |", "|---|---|---|---|---|"]
                lines += [f"| {p['second']} - {p['first']} | {p['task']} | {p['shots']} | {100 * p['difference']:+.1f} ({100 * p['interval'][0]:+.1f} to {100 * p['interval'][1]:+.1f}) | {p['mcnemar']:.2g} |"
                          for p in pairs]
    else:
        plain, games = [n for n in names if n not in GAMES], [n for n in names if n in GAMES]
        report["benchmarks"] = {m: (run_benchmarks(args, plain, m, out, rank, size, device) if plain else {}) for m in args.model}
        for m in args.model:
            for n in games:
                report["benchmarks"][m] |= run_games(args, n, m, out, rank, size, device)
        lines = ["| model | benchmark | problems | accuracy, 95% interval | pass@k | mean tokens | truncated | unparsable |", "|---|---|---|---|---|---|---|---|"]
        for m, results in report["benchmarks"].items():
            for n, r in results.items():
                passes = ", ".join(f"{k[5:]}: {100 * v:.1f}%" for k, v in r.items() if k.startswith("pass@")) or "-"
                lines.append(f"| {m} | {n} | {r['problems']} x {r['samples']} | {100 * r['accuracy']:.1f}% ({100 * r['interval'][0]:.1f} to {100 * r['interval'][1]:.1f}) | {passes} "
                             f"| {r['mean_tokens']:.0f} | {100 * r['truncated']:.1f}% | {100 * r['unparsable']:.1f}% |")
        for m, results in report["benchmarks"].items():  # games: rates per environment step, retries included
            lines += [f"\n{m}, {n}: " + ", ".join(f"{k.replace('_', ' ')} {r[k]:.3f}" for k in ("step_accuracy", "reward", "recognition") if k in r)
                      for n, r in results.items() if "step_accuracy" in r]
    if rank == 0:
        (out / "results.json").write_text(json.dumps(report))
        (out / "results.md").write_text("\n".join(lines) + "\n")
        print("\n".join(lines) + f"\n\n{out / 'results.json'}")
    return 0


def cli() -> int:
    import tyro

    args = tyro.cli(Args)
    try:
        return main(args)
    except (DataError, models.ModelError, OSError) as e:
        print(f"eval.py: {e}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(cli())
