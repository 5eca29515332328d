"""Runs that are killed at random moments and resumed must equal one that was not, bit for bit.

python tests/kill_and_resume.py 10      # ten kills of each script, some minutes
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.helpers import AMFT_RUN, ROOT, command, final_weights, logged, save_small_model

META = [
    "--data", "embedded",
    "--steps", "8", "--save-every", "2", "--inner-steps", "2", "--support-batch", "2",
    "--query-batch", "2", "--tasks-per-step", "2", "--eval-every", "4", "--eval-tasks", "2",
    "--eval-problems", "4", "--eval-max-new-tokens", "4",
]  # fmt: skip
RUNS = {"fomaml.py": META, "meta_lora.py": META, "amft.py": AMFT_RUN}


def start(script: str, model: Path, folder: Path, *more: str) -> subprocess.Popen:
    flags = [script, *RUNS[script], "--output-dir", folder, *more]
    if script != "amft.py":
        flags += ["--model", model]
    # Its own session: a kill of the group leaves nothing behind
    return subprocess.Popen(
        command(*flags),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def same(a: Path, b: Path) -> bool:
    weights, others = final_weights(a), final_weights(b)
    equal = all(weights[name].equal(others[name]) for name in weights)
    files = ("metrics.jsonl", "evaluations.jsonl")
    return equal and all(logged(a, name) == logged(b, name) for name in files)


def trial(script: str, model: Path, whole: Path, seconds: float, rng: random.Random) -> str | None:
    """One run that is killed until it gets through; what is wrong with it at the end."""
    folder, kills = Path(tempfile.mkdtemp()) / "run", 0
    moment = rng.uniform(0.2, 1.0) * seconds
    process = start(script, model, folder)
    while True:
        try:
            process.wait(moment)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            kills += 1
            moment = 10 * seconds
            process = start(script, model, folder, "--resume")
    wrong = None
    if process.returncode:
        wrong = f"{script}: exit status {process.returncode} after a kill at {moment:.1f} s"
    elif not same(whole, folder):
        wrong = f"{script}: not equal after {kills} kill(s)"
    shutil.rmtree(folder.parent)
    return wrong


def main(times: int) -> int:
    rng, faults, kills = random.Random(0), [], 0
    model = save_small_model(Path(tempfile.mkdtemp()))
    for script in RUNS:
        whole = Path(tempfile.mkdtemp()) / "run"
        began = time.time()
        assert start(script, model, whole).wait() == 0, script
        seconds = time.time() - began
        for _ in range(times):
            wrong = trial(script, model, whole, seconds, rng)
            kills += 1
            if wrong:
                faults.append(wrong)
                print(wrong, flush=True)
        shutil.rmtree(whole.parent)
    print(json.dumps({"trials": kills, "faults": len(faults)}))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 3))
