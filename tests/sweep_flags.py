"""Every numeric flag of every training script with values that nobody should give.

    python tests/sweep_flags.py            # all, some minutes; test_flags.py runs a sample of it

A call must end with exit status 0 and finite weights, with 1 and one line (it gave up, as nothing
was finite), or with 2 and one line; never with a traceback.
"""

import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file

import amft
import fomaml
import meta_lora
from tests.helpers import save_small_model

VALUES = ("-1", "0", "nan", "inf", "1e30", "word")
META = (
    "--steps 2 --inner-steps 2 --support-batch 2 --query-batch 2 --tasks-per-step 2 --eval-every 0 "
    "--eval-tasks 1 --eval-problems 2 --eval-max-new-tokens 4 --gain-every 1"
)
RL = (
    "--steps 2 --warmup-steps 1 --prompts-per-step 4 --samples 4 --max-new-tokens 8 --eval-every 0 "
    "--eval-problems 2 --validation-prompts 4 --validation-size 8 --show 1"
)
SCRIPTS = {"fomaml": (fomaml, META), "meta_lora": (meta_lora, META), "amft": (amft, RL)}


def numeric_flags(script) -> list[str]:
    """The fields of Args that hold numbers."""
    names = []
    for field in fields(script.Args):
        kinds = {field.type, *get_args(field.type)}
        if kinds & {int, float, "int", "float"} and bool not in kinds:
            names.append(field.name)
    return names


def cases() -> list[tuple[str, str, str]]:
    """(script, flag, value)."""
    found = []
    for name, (script, _) in SCRIPTS.items():
        for flag in numeric_flags(script):
            found += [(name, flag, value) for value in VALUES]
    return found


def fault(name: str, flag: str, value: str, model: Path) -> str | None:
    """What is wrong with the way in which such a call ends; None if nothing is."""
    script, settings = SCRIPTS[name]
    folder = Path(tempfile.mkdtemp())
    option = f"--{flag.replace('_', '-')}={value}"
    argv = [f"{name}.py", "--model", str(model), "--output-dir", str(folder / "run")]
    argv += [*settings.split(), option]
    errors, before = io.StringIO(), sys.argv
    try:
        sys.argv = argv
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            status = script.cli()
    except SystemExit as e:  # the command line's own parser
        return None if e.code == 2 else f"{option}: exit status {e.code}"
    except Exception as e:
        return f"{option}: {type(e).__name__}: {e}"
    finally:
        sys.argv = before
        weights = list((folder / "run").glob("checkpoint/*.safetensors"))
        bad = [f.name for f in weights if not finite(f)]
        shutil.rmtree(folder)
    lines = [line for line in errors.getvalue().splitlines() if line.startswith(f"{name}.py: ")]
    if bad:
        return f"{option}: exit status {status}, weights not finite: {', '.join(bad)}"
    if status and len(lines) != 1:
        return f"{option}: exit status {status} and {len(lines)} lines"
    if status not in (0, 1, 2):
        return f"{option}: exit status {status}"
    return None


def finite(file: Path) -> bool:
    return all(bool(torch.isfinite(w).all()) for w in load_file(file).values())


def sweep(chosen: list[tuple[str, str, str]]) -> list[str]:
    model = save_small_model(Path(tempfile.mkdtemp()))
    faults = []
    for name, flag, value in chosen:
        found = fault(name, flag, value, model)
        if found:
            faults.append(f"{name}.py {found}")
            print(faults[-1], flush=True)
    shutil.rmtree(model)
    return faults


if __name__ == "__main__":
    every = cases()
    if len(sys.argv) > 1:
        every = random.Random(int(sys.argv[1])).sample(every, 40)
    result = sweep(every)
    print(json.dumps({"calls": len(every), "faults": len(result)}))
    sys.exit(bool(result))
