"""Makes the runs of the study of balance: python studies/balance/run.py

A row for each run goes to results.jsonl beside this file; those that are there already are not made
again, so a call that was killed goes on where it was. plan.md says what is run and why. One cell:

    python studies/balance/run.py --seeds 0 --conditions A0.3 --arms amft --results one.jsonl
"""

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import tyro

import amft
from checker import grade
from data import template
from model import load_config, load_weights
from policy import encode_prompts, sample
from studies.runs import call, made_with, make_all, rows_of
from tiny import conditions

HERE = Path(__file__).resolve().parent
CONDITIONS = ("A0.3", "B1", "C", "A1", "D", "B0.5")
STEPS = {"B1": 60, "B0.5": 60, "C": 60}  # else 40


def sft_then_rl(share: float):
    """The flags for a run of so many steps."""
    return lambda steps: (
        *("--method", "sft_then_rl", "--warmup-lr", "1e-3"),
        *("--warmup-steps", str(round(share * steps))),
    )


def fixed(mu: str) -> tuple[str, ...]:
    return "--method", "fixed", "--mu-init", mu


NORMALISED = ("--mu-update", "normalised", "--mu-every", "5", "--warmup-steps", "5")
SHRUNKEN = ("--mu-update", "shrunken", "--no-entropy-term", "--mu-every", "2")
ARMS = {
    "rl": ("--method", "rl"),
    "sft": ("--method", "sft"),
    "fixed 0.5": fixed("0.5"),
    "amft": NORMALISED,
    "amft, shrunken": (*SHRUNKEN, "--warmup-steps", "2"),
    "sft then rl 0.25": sft_then_rl(0.25),
    "fixed 0.25": fixed("0.25"),
    "chord": ("--method", "chord"),
    "hpt": ("--method", "hpt"),
    "gac": ("--method", "gac"),
    "fixed 0.1": fixed("0.1"),
    "fixed 0.75": fixed("0.75"),
    "fixed 0.9": fixed("0.9"),
    "sft then rl 0.1": sft_then_rl(0.1),
    "sft then rl 0.5": sft_then_rl(0.5),
    "amft, no meta-gradient": (*NORMALISED, "--no-meta-gradient"),
    "amft, no entropy term": (*NORMALISED, "--no-entropy-term"),
    "amft, text's sign": (*NORMALISED, "--entropy-sign", "text"),
    "luffy": ("--method", "luffy"),
    "srft": ("--method", "srft"),
}


@dataclass
class Args:
    """Make the runs of the study that results.jsonl does not hold yet."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of problems, demonstrations and runs. 7: of the choice of the best fixed mu."""
    conditions: tuple[str, ...] = CONDITIONS
    """Which, and in which order."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which, and in which order."""
    jobs: int = 1
    """Runs at a time, each with one thread."""
    runs: Path = Path("runs/balance")
    """Where data and the runs' folders go; a run's folder is deleted once it is measured."""
    results: Path = HERE / "results.jsonl"
    """Where the rows go."""


class Job(NamedTuple):
    seed: int
    condition: str
    arm: str


def jobs_of(args: Args) -> Iterator[Job]:
    """Those that are not made yet, in the plan's order."""
    done = {Job(row["seed"], row["condition"], row["arm"]) for row in rows_of(args.results)}
    for seed in args.seeds:
        for condition in args.conditions:
            for arm in args.arms:
                if Job(seed, condition, arm) not in done:
                    yield Job(seed, condition, arm)


def solved(model_folder: Path | str, tests: Path) -> str:
    """For each test problem 1 if the model's greedy answer is right, else 0."""
    _, tokenizer = load_config(str(model_folder))
    model, problems = load_weights(str(model_folder)).eval(), rows_of(tests)
    asked = [[{"role": "user", "content": row["problem"]}] for row in problems]
    prompts = [prompt.ids for prompt in encode_prompts(tokenizer, asked)]
    stop = template(tokenizer).stop
    answers = sample(model, tokenizer, prompts, 1, 96, temperature=0, stop=stop)
    texts = [tokenizer.decode(answer.answer) for answer in answers]
    pairs = zip(texts, problems, strict=True)
    return "".join(str(int(grade(text, row["answer"]))) for text, row in pairs)


def make(job: Job, runs: Path) -> list[dict]:
    """Trains one arm in one condition; the row of its result. Raises RuntimeError."""
    torch.set_num_threads(1)
    folder = runs / f"{job.seed}-{job.condition}-{job.arm.replace(' ', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    with open(log, "w") as f, redirect_stdout(f):
        conditions.main(conditions.Args(folder, job.seed, (job.condition,)))
    steps = STEPS.get(job.condition, 40)
    flags = ARMS[job.arm]
    flags = own = flags(steps) if callable(flags) else flags
    if job.condition == "D" and job.arm not in ("luffy", "srft", "hpt"):
        flags += ("--sft-data", str(folder / "D-sft"))
    flags = (
        *flags, "--data", folder / job.condition, "--suffix", "", "--steps", steps,
        "--lr", "3e-4", "--samples", "4", "--seed", job.seed, "--eval-every", "-1", "--show", "0",
        "--save-every", "1000", "--keep", "1", "--output-dir", folder / "run",
    )  # fmt: skip
    began = time.time()
    call(amft, flags, log)
    metrics = rows_of(folder / "run" / "metrics.jsonl")
    right = solved(folder / "run" / "checkpoint", folder / job.condition / "test.jsonl")
    row = {**job._asdict(), "flags": own, "right": right}
    row["mu"] = [round(step["mu"], 3) for step in metrics]
    for name in ("grad_mu", "grad_mu_snr", "grad_mu_snr_window", "reward/mean"):
        row[name] = [float(f"{step[name]:.3g}") for step in metrics if name in step]
    row["samples"] = {
        kind: sum(step[f"samples/{kind}"] for step in metrics) for kind in ("train", "validation")
    }
    row |= {"seconds": sum(step["seconds"] for step in metrics), "steps": len(metrics)}
    row |= made_with()
    row["wall_seconds"] = time.time() - began
    shutil.rmtree(folder)
    return [row]


def main(args: Args) -> None:
    for job, (row,) in make_all(make, list(jobs_of(args)), args.jobs, args.runs, args.results):
        right = row["right"]
        print(f"{' '.join(map(str, job))}: {right.count('1')} of {len(right)}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
