"""What the scripts of the studies share: a program called in this process, runs side by side."""

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import torch


def rows_of(path: Path) -> list[dict]:
    """Of a .jsonl file; none where there is no file yet."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def add_rows(path: Path, rows: Sequence[dict]) -> None:
    with path.open("a") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def made_with() -> dict[str, str]:
    """What a row says of the machine and the day."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def call(script: ModuleType, flags: Sequence, log: Path) -> float:
    """Seconds of a script's command line in this process. Raises RuntimeError where it fails."""
    began, argv = time.time(), sys.argv
    sys.argv = [f"{script.__name__}.py", *map(str, flags)]
    try:
        with open(log, "a") as f, redirect_stdout(f), redirect_stderr(f):
            status = script.cli()
    finally:
        sys.argv = argv
    if status:
        raise RuntimeError(f"{' '.join(map(str, flags))}: exit status {status}, see {log}")
    return time.time() - began


def make_all(
    make: Callable, jobs: Sequence[tuple], at_a_time: int, runs: Path, results: Path
) -> Iterator[tuple[tuple, list[dict]]]:
    """(job, its rows) as they come: make(job, runs), in processes of one thread each.

    The rows are in `results` by then. A run that fails is named, and the others go on.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{len(jobs)} runs to make", flush=True)
    with ProcessPoolExecutor(at_a_time, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(make, job, runs): job for job in jobs}
        for future in as_completed(waiting):
            job = waiting[future]
            try:
                rows = future.result()
            except RuntimeError as e:
                print(f"{job}: {e}", flush=True)
                continue
            add_rows(results, rows)
            yield job, rows
