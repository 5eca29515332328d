"""Makes the runs of the study of a real model: python studies/real_model/run.py --model DIR

The evaluations of each run go to results.jsonl beside this file, a row each. A run that was stopped
goes on from its last checkpoint; those that are in results.jsonl are not made again. plan.md says
what is run and why.
"""

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import tyro

import amft
from run import checkpoints
from sources import hub_tables, read_rows
from studies.runs import add_rows, call, made_with, rows_of

HERE = Path(__file__).resolve().parent
TEST_PROBLEMS = 400
ARMS = {
    "sft then rl": (
        "--method", "sft_then_rl", "--warmup-steps", "40", "--warmup-lr", "3e-4", "--steps", "52",
    ),
    "rl": ("--method", "rl", "--steps", "12"),
    "amft": ("--method", "amft", "--mu-every", "2", "--warmup-steps", "2", "--steps", "12"),
}  # fmt: skip
SAME = (
    "--lora-r", "16", "--lr", "1e-4", "--lr-warmup", "2", "--prompts-per-step", "8",
    "--samples", "4", "--max-new-tokens", "200", "--eval-every", "20", "--eval-problems", "100",
    "--micro-batch", "8", "--save-every", "4",
)  # fmt: skip


@dataclass
class Args:
    """Make the runs of the study that results.jsonl does not hold yet."""

    model: str = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    """A local folder in Hugging Face format or a hub name."""
    data: Path | None = None
    """GSM8K's test rows (problem or question, solution or answer); default: openai/gsm8k."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Which, and in which order."""
    threads: int = 2
    """Of the CPU."""
    runs: Path = Path("runs/real_model")
    """Where data and the runs' folders go."""
    results: Path = HERE / "results.jsonl"
    """Where the rows go."""


def demonstration(row: dict) -> dict:
    """problem, solution and answer of a row of GSM8K: no calculator marks, the answer boxed."""
    problem = row.get("problem") or row["question"]
    text, answer = (row.get("solution") or row["answer"]).split("\n####")
    text, answer = re.sub("<<.*?>>", "", text).strip(), answer.strip()
    solution = f"{text}\nThe answer is \\boxed{{{answer}}}."
    return {"problem": problem, "solution": solution, "answer": answer}


def write_data(rows: Sequence[dict], folder: Path) -> None:
    """train.jsonl and test.jsonl, in an order that does not depend on the rows' own."""
    made = [demonstration(row) for row in rows]
    made.sort(key=lambda row: hashlib.sha256(row["problem"].encode()).hexdigest())
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"test": made[:TEST_PROBLEMS], "train": made[TEST_PROBLEMS:]}
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text)


def make(arm: str, args: Args) -> list[dict]:
    """Trains one arm; a row for each of its evaluations. Raises RuntimeError."""
    folder = args.runs / arm.replace(" ", "-")
    flags = (
        *ARMS[arm], *SAME, "--model", args.model, "--data", args.runs / "data",
        "--output-dir", folder,
    )  # fmt: skip
    if checkpoints(folder):
        flags += ("--resume",)
    args.runs.mkdir(parents=True, exist_ok=True)
    call(amft, flags, args.runs / f"{folder.name}.txt")
    metrics, rows = rows_of(folder / "metrics.jsonl"), []
    for evaluation in rows_of(folder / "evaluations.jsonl"):
        (tested,) = evaluation["tasks"].values()
        past = [step for step in metrics if step["step"] <= evaluation["step"]]
        row = {"arm": arm, "step": evaluation["step"]} | tested
        row["seconds"] = sum(step["seconds"] for step in past)
        row["samples"] = sum(step["samples/train"] + step["samples/validation"] for step in past)
        rows.append(row | {"threads": args.threads} | made_with())
    return rows


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    write_data(
        read_rows(args.data) if args.data else hub_tables("openai/gsm8k", "main")["test"],
        args.runs / "data",
    )
    done = {row["arm"] for row in rows_of(args.results)}
    for arm in args.arms:
        if arm in done:
            continue
        rows = make(arm, args)
        add_rows(args.results, rows)
        print(f"{arm}: " + ", ".join(f"{r['accuracy']:.1%} at {r['step']}" for r in rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
