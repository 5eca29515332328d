"""Numbers and files that nobody should give, to every program.

    python tests/sweep_flags.py              # all, some minutes; test_flags.py runs a sample of it
    python tests/sweep_flags.py eval data    # of some programs

Every numeric flag with -1, 0, nan, inf, 1e30, a number of 30 digits and a word; every file as it
should be, missing, empty, binary, a folder, and cut in the middle. A call must end with exit status
0 and finite weights, with 1 and one line (it gave up, as nothing was finite; faults of a checked
folder), or with 2 and one line; never with a traceback.
"""

import contextlib
import gzip
import importlib
import io
import json
import random
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, get_args
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import load_file

import amft
import bench
import data
import fomaml
import games.__main__
import meta_lora
import plots
import tiny.train
from tests.helpers import run_here, save_small_model

evaluation = importlib.import_module("eval")  # not the built-in function

VALUES = ("-1", "0", "nan", "inf", "1e30", "1" + 29 * "0", "word")
BROKEN = ("", "missing", "empty", "binary", "folder", "cut")  # "": as it should be

# --------------------------------------------------------------------------------------------------
# The programs. {work} is a folder of each call, {model} a small model, {good} a folder of files


class Program(NamedTuple):
    prefix: str  # of the line in which it says what is wrong
    call: Callable[[list[str]], int]  # its exit status
    module: object  # has Args, and NUMBERS where it has numbers
    settings: str  # of a short run


def cli_of(module) -> Callable[[list[str]], int]:
    return lambda options: run_here(module, *options)


def main_of(name: str) -> Callable[[list[str]], int]:
    """Of a program that is only run as one: python -m `name`."""

    def call(options: list[str]) -> int:
        before, sys.argv = sys.argv, [name, *options]
        try:
            runpy.run_module(name, run_name="__main__")
            return 0
        except SystemExit as e:
            return e.code or 0
        finally:
            sys.argv = before

    return call


def embedded_models(options: list[str]) -> int:
    """tiny.train on a hundredth of its problems."""
    whole = data.embedded_examples

    def few(per_family: int, *args):
        return whole(max(5, per_family // 100), *args)

    with mock.patch("data.embedded_examples", few):
        return main_of("tiny.train")(options)


META = (
    "--model {model} --output-dir {work}/run --data embedded --steps 2 --inner-steps 2 "
    "--support-batch 2 --query-batch 2 --tasks-per-step 2 --eval-every 0 --eval-tasks 1 "
    "--eval-problems 2 --eval-max-new-tokens 4 --gain-every 1"
)
RL = (
    "--model {model} --output-dir {work}/run --steps 2 --warmup-steps 1 --prompts-per-step 4 "
    "--samples 4 --max-new-tokens 8 --eval-every 0 --eval-problems 2 --validation-prompts 4 "
    "--validation-size 8 --show 1"
)
EVAL = "--model {model} --output-dir {work}/run --max-length 8 --limit 2"
STUDY = f"{EVAL} --few-shot 0 2 --seeds 1 --adapt-steps 2 --tasks Geometry/box_surface"
PROGRAMS = {
    "fomaml": Program("fomaml.py", cli_of(fomaml), fomaml, META),
    "meta_lora": Program("meta_lora.py", cli_of(meta_lora), meta_lora, META),
    "amft": Program("amft.py", cli_of(amft), amft, RL),
    "eval": Program("eval.py", cli_of(evaluation), evaluation, EVAL),
    "study": Program("eval.py", cli_of(evaluation), evaluation, STUDY),
    "data": Program(
        "data.py", cli_of(data), data, "--data {good}/rows.jsonl --output-dir {work}/out"
    ),
    "plots": Program("plots.py", cli_of(plots), plots, "--out {work}/picture.png"),
    "bench": Program(
        "bench.py", main_of("bench"), bench, "rollout --model {model} --repeats 1 --warmup 0"
    ),
    "games": Program(
        "games", main_of("games"), games.__main__, "general_points --picture {work}/game.png"
    ),
    "tiny": Program(
        "tiny.train",
        embedded_models,
        tiny.train,
        "--output-dir {work}/run --steps 2 --batch-size 4 --game-steps 2 --vision-steps 2",
    ),
}

# --------------------------------------------------------------------------------------------------
# The files that they take


class Taken(NamedTuple):
    program: str
    options: str  # {file} is the file, {folder} the one in which it lies
    good: str  # of write_good_files


PREPARED = "prepared/few_shot_eval/sums_test.parquet"
TAKEN = [
    *(Taken(name, "--data {file}", "tasks.jsonl") for name in ("fomaml", "meta_lora")),
    Taken("amft", "--data {file}", "rows.jsonl"),
    Taken("amft", "--task virl --model tiny_games --routes {file}", "routes.json"),
    Taken("amft", "--task virl --model tiny_games --test-routes {file}", "routes.json"),
    *(Taken("data", "--data {file}", f"rows.{x}") for x in ("json", "jsonl", "jsonl.gz")),
    *(Taken("data", "--data {file}", f"rows.{x}") for x in ("csv", "parquet")),
    Taken("data", "--validate-only --output-dir {folder}/prepared", PREPARED),
    Taken("data", "--data {folder}/prepared", PREPARED),
    Taken("eval", "--benchmark mine --data {file}", "rows.jsonl"),
    Taken("eval", "--benchmark virl --compact --data {file}", "routes.json"),
    Taken("eval", "--check-overlap {file}", "rows.jsonl"),
    Taken("study", "--tasks a --data {file}", "tasks.jsonl"),
    Taken("plots", "{folder}", "metrics.jsonl"),
    Taken("plots", "{folder} {good}", "evaluations.jsonl"),
    Taken("plots", "{folder} {good}", "args.json"),
    Taken("plots", "{folder}", "results.json"),
    Taken("bench", "checker --cases {file}", "cases.jsonl"),
    Taken("games", "virl --routes {file}", "routes.json"),
]


def write_good_files(folder: Path) -> Path:
    rows = []
    for i in range(40):
        row = {"problem": f"What is {i} + {i}?", "solution": rf"It is \boxed{{{2 * i}}}."}
        rows.append(row | {"answer": str(2 * i), "subject": "sums"})
    tasks = []
    for i, row in enumerate(2 * rows):
        task = "ab"[i // 40]
        tasks.append(row | {"subject": task, "problem": f"{task}: {row['problem']}"})
    block = {"to_next_intersection_heading": "90 (east)", "landmarks": ["A is on your left"]}
    places = [[0, 0], [0, 0.001], [0, 0.002]]
    route = {"route_results": {"geocode_list": places}, "milestone_info": [block, block]}
    losses = {"loss_before": 2.0, "loss_after": 1.0}
    evaluation_row = {"step": 1, "mean": losses, "tasks": {"sums": losses | {"problems": 2}}}
    numbers = {"problems": 2, "samples": 1, "accuracy": 0.5, "interval": [0.1, 0.9]}
    texts = {
        "rows.jsonl": json_lines(rows),
        "rows.json": json.dumps(rows),
        "tasks.jsonl": json_lines(tasks),
        "routes.json": json.dumps([[route, route], 2]),
        "cases.jsonl": json_lines([{"response": r"\boxed{1}", "gold": "1"}] * 4),
        "metrics.jsonl": json_lines([{"step": i, "meta/loss": 1 / i} for i in (1, 2, 3)]),
        "evaluations.jsonl": json_lines([evaluation_row] * 2),
        "args.json": json.dumps({"args": {"seed": 1, "steps": 3}}),
        "results.json": json.dumps({"benchmarks": {"tiny": {"mine": numbers}}}),
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(texts["rows.jsonl"].encode()))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    lines = [",".join(rows[0])]
    lines += [",".join(row.values()) for row in rows]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    examples = [example for _, example in data.to_examples(rows, "rows", None)]
    task = data.Task("sums", examples[:10], examples[10:20], examples[20:])
    data.write_prepared([task], folder / "prepared")
    return folder


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_broken(good: Path, file: Path, how: str) -> None:
    """Writes the good file at `file`, or what is left of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    content = good.read_bytes()
    if how == "folder":
        file.mkdir()
    elif how == "binary":
        file.write_bytes(random.Random(0).randbytes(2000))
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2 + 3])
    elif how != "missing":
        file.write_bytes(b"" if how == "empty" else content)


# --------------------------------------------------------------------------------------------------
# The sweep


class Case(NamedTuple):
    program: str
    options: str  # after the program's settings
    taken: Taken | None = None
    how: str = ""  # of BROKEN


def numeric_flags(module) -> list[str]:
    """The fields of Args that hold numbers."""
    names = []
    for field in fields(module.Args):
        kinds = {field.type, *get_args(field.type)}
        if kinds & {int, float, "int", "float"} and bool not in kinds:
            names.append(field.name)
    return names


def number_cases() -> list[Case]:
    found = []
    for name, program in PROGRAMS.items():
        for flag in numeric_flags(program.module):
            option = f"--{flag.replace('_', '-')}"
            found += [Case(name, f"{option}={value}") for value in VALUES]
    return found


def file_cases() -> list[Case]:
    found = []
    for taken in TAKEN:
        found += [Case(taken.program, taken.options, taken, how) for how in BROKEN]
    return found


def fault(case: Case, model: Path, good: Path) -> str | None:
    """What is wrong with the way in which a call ends; None if nothing is."""
    program, work = PROGRAMS[case.program], Path(tempfile.mkdtemp())
    places = {"model": model, "good": good, "work": work, "folder": work / "in", "file": ""}
    if case.taken:
        places["file"] = places["folder"] / case.taken.good
        if case.taken.good == PREPARED:
            shutil.copytree(good / "prepared", places["folder"] / "prepared")
            places["file"].unlink()
        write_broken(good / case.taken.good, places["file"], case.how)
        if case.taken.good in ("evaluations.jsonl", "args.json"):  # lie beside metrics
            shutil.copy(good / "metrics.jsonl", places["folder"])
    options = f"{program.settings} {case.options}".format(**places).split()
    if case.options.startswith("checker"):  # the name of a bench, in place of another
        options.remove("rollout")
    elif case.options.startswith("virl"):
        options.remove("general_points")
    errors, status, raised = io.StringIO(), None, ""
    try:
        said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # data.py reconfigures it
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(said):
            status = program.call(options)
    except SystemExit as e:  # the command line's own parser
        status = e.code
    except Exception as e:
        raised = f"{type(e).__name__}: {str(e)[:200]}"
    weights = list((work / "run").glob("**/*.safetensors"))
    bad = [f.name for f in weights if not finite(f)]
    shutil.rmtree(work)
    if raised:
        return raised
    if bad:
        return f"exit status {status}, weights not finite: {', '.join(bad)}"
    text = errors.getvalue()
    if status == 2 and "For full helptext" in text:  # of the parser
        return None
    lines = [line for line in text.splitlines() if line.startswith(f"{program.prefix}: ")]
    if status not in (0, 1, 2) or "Traceback" in text:
        return f"exit status {status}: {text[-300:]}"
    faults_listed = case.options.startswith("--validate-only")
    if status and len(lines) != 1 and not (status == 1 and faults_listed):
        return f"exit status {status} and {len(lines)} lines: {text[-300:]}"
    if case.taken and not case.how and status:
        return f"exit status {status} for a good file: {text[-300:]}"
    return None


def finite(file: Path) -> bool:
    return all(bool(torch.isfinite(w).all()) for w in load_file(file).values())


def sweep(chosen: list[Case]) -> list[str]:
    model = save_small_model(Path(tempfile.mkdtemp()))
    good = write_good_files(Path(tempfile.mkdtemp()))
    faults = []
    for case in chosen:
        found = fault(case, model, good)
        if found:
            file = f" ({case.taken.good}, {case.how})" if case.taken else ""
            faults.append(f"{PROGRAMS[case.program].prefix} {case.options}{file}: {found}")
            print(faults[-1], flush=True)
    shutil.rmtree(model)
    shutil.rmtree(good)
    return faults


if __name__ == "__main__":
    every = number_cases() + file_cases()
    if len(sys.argv) > 1:
        every = [case for case in every if case.program in sys.argv[1:]]
    result = sweep(every)
    print(json.dumps({"calls": len(every), "faults": len(result)}))
    sys.exit(bool(result))
