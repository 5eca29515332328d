"""Makes the runs of the few-shot study: python studies/few_shot/run.py

Each run trains without evaluations; what it has learned is then measured once. A row for each
measurement goes to results.jsonl beside this file; those that are there already are not made again,
so that a call that was killed goes on where it was. plan.md says what is run and why.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
import tyro

import fomaml
import meta_lora
from studies.runs import call, made_with, make_all, rows_of

HERE = Path(__file__).resolve().parent
SCRIPTS = {"fomaml": fomaml, "meta_lora": meta_lora}
STEPS = ("--steps", "120")
TRAINED = (
    "--eval-every", "-1", "--gain-every", "0", "--save-every", "1000", "--keep", "1",
)  # fmt: skip
MEASURED = (
    "--eval-every", "0", "--eval-tasks", "20", "--eval-problems", "20",
    "--eval-max-new-tokens", "12",
)  # fmt: skip
NO_PROMPT = ("--max-length", "64")  # 30 rows in the prompt do not fit: that is not measured
SEARCH_RULES = ("--heldout-subjects", *(f"cipher-{i}" for i in range(960, 980)))

NONE = ("--meta-gradient", "none")
REPTILE = ("--meta-gradient", "reptile")
JOINT = ("--meta-gradient", "joint", "--inner-steps", "1", "--tasks-per-step", "14")
IN_CONTEXT = ("--meta-gradient", "in_context", "--query-batch", "5")


@dataclass
class Args:
    """Make the runs of the study that results.jsonl does not hold yet."""

    groups: tuple[str, ...] = ("search", "main", "changes", "axes", "lora", "exact")
    """Which, and in which order."""
    seeds: tuple[int, ...] = (42, 43, 44)
    """Of main and changes, the tables of the two families."""
    only: tuple[str, ...] = ()
    """Names of runs, of those groups; default: all."""
    jobs: int = 1
    """Runs at a time, each with one thread."""
    runs: Path = Path("runs/few_shot")
    """Where the runs' folders go; a run's folder is deleted once it is measured."""
    results: Path = HERE / "results.jsonl"
    """Where the rows go."""


@dataclass(frozen=True)
class Job:
    """A run to make and to measure.

    train: the flags of its training; none for the embedded model as it is. measures: (name, flags)
    of each measurement. own: measured by the run itself, with its own inner loop; else the inner
    loop is that of the measurement's flags.
    """

    group: str
    name: str
    seed: int
    train: tuple[str, ...] | None
    measures: tuple[tuple[str, tuple[str, ...]], ...] = (("", NO_PROMPT),)
    own: bool = False
    script: str = "fomaml"

    def names(self) -> list[str]:
        """Of the rows that it gives."""
        return [self.name + label for label, _ in self.measures]


# --------------------------------------------------------------------------------------------------
# What is run. Rates without a search are the scripts' defaults.

# What the rows of group search say
JOINT_RATES = ("--outer-lr", "1e-3"), ("--inner-lr", "1e-3")
NONE_RATE = ("--inner-lr", "5e-3")
REPTILE_EPSILON = ("--reptile-epsilon", "1.0")
FROM = ("--inner-lr", "5e-3")  # where learned rates start, and Reptile's
IN_CONTEXT_RATE = ("--outer-lr", "2e-3")


def search() -> list[Job]:
    """Rates, on rules and with a seed that are not reported, in half the meta-steps."""
    half = (*SEARCH_RULES, "--steps", "60")
    plain = (*SEARCH_RULES, "--no-eval-curve")
    adapted = [
        (f", adapted at {rate}", (*plain, "--inner-lr", rate)) for rate in ("1e-3", "5e-3", "2e-2")
    ]
    jobs = [Job("search", "none", 7, None, tuple(adapted))]
    for rate in ("1e-3", "3e-3"):
        flags = (*half, *JOINT, "--outer-lr", rate)
        jobs.append(Job("search", f"joint {rate}", 7, flags, tuple(adapted)))
    for epsilon in ("1.0", "0.5"):
        flags = (*half, *REPTILE, "--reptile-epsilon", epsilon)
        jobs.append(Job("search", f"reptile {epsilon}", 7, flags, (("", plain),)))
    for rate in ("2e-3", "5e-4"):
        flags = (*half, *IN_CONTEXT, "--outer-lr", rate)
        jobs.append(Job("search", f"in_context {rate}", 7, flags, (("", SEARCH_RULES),)))
    return jobs


def arms(data: str, seed: int) -> list[Job]:
    """Every arm on one family of rules."""
    joint_outer, joint_inner = JOINT_RATES
    joint_measures = (
        ("", (*NO_PROMPT, *joint_inner)),
        (", adapted at 5e-3", (*NO_PROMPT, "--inner-lr", "5e-3")),
    )
    made = (
        ("none", None, (("", NONE_RATE),)),
        ("fomaml", (), (("", NO_PROMPT),)),
        ("joint", (*JOINT, *joint_outer), joint_measures),
        ("reptile", (*REPTILE, *REPTILE_EPSILON, *FROM), (("", (*NO_PROMPT, *FROM)),)),
        ("in_context", (*IN_CONTEXT, *IN_CONTEXT_RATE), (("", ()),)),
    )
    group, of_data = ("main", ()) if data == "ciphers" else (data, ("--data", data))
    jobs = []
    for name, train, measures in made:
        if train is not None:
            train = (*of_data, *train)
        measures = tuple((label, (*of_data, *flags)) for label, flags in measures)
        jobs.append(Job(group, name, seed, train, measures))
    for kind in ("tensor", "scalar"):
        train = (*of_data, "--learn-inner-lr", kind, *FROM)
        jobs.append(Job(group, f"fomaml, learned {kind}", seed, train, own=True))
    return jobs


def table_of(data: str, seeds: Sequence[int]) -> list[Job]:
    """Every arm with every seed, seed after seed."""
    jobs = []
    for seed in seeds:
        jobs += arms(data, seed)
    return jobs


def axes() -> list[Job]:
    """One seed each."""
    job = partial(Job, "axes", seed=42)
    jobs = []
    for count in ("64", "16", "256", "4"):
        jobs.append(job(f"{count} rules", train=("--training-tasks", count)))
    for shots in ("10", "5"):
        rows = ("--shots", shots, "--support-batch", shots)
        jobs.append(job(f"{shots} rows", train=rows, measures=(("", (*rows, *NO_PROMPT)),)))
    rows = ("--shots", "60", "--support-batch", "60", "--support-ratio", "0.6")
    rows += ("--query-ratio", "0.2")
    jobs.append(job("60 rows", train=rows, measures=(("", (*rows, *NO_PROMPT)),)))
    low = ("--inner-lr", "5e-4")
    jobs.append(job("rate 5e-4", train=low, own=True))
    jobs.append(job("rate 5e-4, learned", train=(*low, "--learn-inner-lr", "tensor"), own=True))
    return jobs


def exact() -> list[Job]:
    """The exact gradient beside the first-order one: the same five SGD steps, on changes."""
    sgd = ("--data", "changes", "--inner-optimizer", "sgd", "--inner-lr", "0.1")
    jobs = []
    for method in ("fomaml", "maml"):
        train = (*sgd, "--meta-gradient", method)
        measures = (("", (*sgd, *NO_PROMPT)),)
        jobs.append(Job("exact", f"{method}, sgd", 42, train, measures))
    return jobs


def lora() -> list[Job]:
    """MeTA-LoRA's own arms, at its defaults, with one seed."""
    jobs = []
    for method in ("fomaml", "joint", "reptile", "none"):
        flags = ("--meta-gradient", method)
        jobs.append(Job("lora", method, 42, flags, own=True, script="meta_lora"))
    return jobs


# --------------------------------------------------------------------------------------------------
# Making them


def make(job: Job, runs: Path) -> list[dict]:
    """The rows of a run's measurements."""
    torch.set_num_threads(1)
    folder = runs / f"{job.group}-{job.name.replace(' ', '-').replace(',', '')}-{job.seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log, trained, seed = folder / "log.txt", folder / "trained", ("--seed", job.seed)
    training, model = {}, "tiny"
    if job.train is not None:
        flags = (*STEPS, *job.train, *TRAINED, *seed, "--output-dir", trained)
        seconds = call(SCRIPTS[job.script], flags, log)
        steps = rows_of(trained / "metrics.jsonl")
        training = {
            "seconds": seconds,
            "tokens": sum(row["tokens_per_second"] * row["seconds"] for row in steps),
            "steps": len(steps),
            "losses": [round(row["meta/loss"], 4) for row in steps],
        }
        if "inner_lr/lowest" in (steps or [{}])[-1]:
            last = steps[-1]
            training["inner_lr"] = [last["inner_lr/lowest"], last["inner_lr/highest"]]
        model = trained / "checkpoint"
    rows = []
    for i, (label, flags) in enumerate(job.measures):
        if job.own:
            where = trained
            flags = (*STEPS, *job.train, *TRAINED, *MEASURED, *flags, *seed, "--resume")
            flags = without_length(flags)
        else:
            where = folder / f"measured-{i}"
            flags = ("--model", model, *NONE, *MEASURED, *flags, *seed)
        seconds = call(SCRIPTS[job.script], (*flags, "--output-dir", where), log)
        result = rows_of(where / "evaluations.jsonl")[-1]
        row = {"group": job.group, "name": job.name + label, "seed": job.seed}
        row |= {"script": job.script, "train": job.train, "measure": flags, "training": training}
        row |= {"seconds": seconds, "mean": result["mean"], "tasks": result["tasks"]}
        row |= made_with()
        rows.append(json.loads(json.dumps(row, default=str)))
    shutil.rmtree(folder)
    return rows


def without_length(flags: Sequence) -> tuple:
    """Without NO_PROMPT: a run must be resumed with the --max-length that it was trained with."""
    at = list(flags).index("--max-length") if "--max-length" in flags else None
    return tuple(flags) if at is None else (*flags[:at], *flags[at + 2 :])


def main(args: Args) -> None:
    done = {(row["group"], row["name"], row["seed"]) for row in rows_of(args.results)}
    groups = {"search": search, "axes": axes, "lora": lora, "exact": exact}
    groups["main"] = partial(table_of, "ciphers", args.seeds)
    groups["changes"] = partial(table_of, "changes", args.seeds)
    jobs = []
    for group in args.groups:
        for job in groups[group]():
            made = all((job.group, name, job.seed) in done for name in job.names())
            if not made and (not args.only or job.name in args.only):
                jobs.append(job)
    for _, rows in make_all(make, jobs, args.jobs, args.runs, args.results):
        for row in rows:
            numbers = {k: round(v, 3) for k, v in row["mean"].items()}
            seconds = row["training"].get("seconds", 0)
            name = f"{row['group']}/{row['name']}/{row['seed']}"
            print(f"{name}: {numbers} {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
