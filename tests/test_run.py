"""run.py and what users do: checkpoints, kill and resume, Ctrl-C, failures, command lines; and
which file may import which."""

import ast
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

import amft
import fomaml
import meta_lora
import plots
from model import ModelError, World, load_config
from policy import Policy
from run import (
    Log,
    ModelCheckpoint,
    Run,
    Stop,
    checkpoint_reason,
    checkpoints,
    run_folder,
    save_checkpoint,
)
from sources import DataError
from tests.helpers import (
    AMFT_RUN,
    ROOT,
    assert_same_weights,
    command,
    final_weights,
    logged,
    run,
    run_here,
    run_well,
    small_llama,
    wait_for_lines,
    weights_of,
)

evaluation = importlib.import_module("eval")  # not the built-in function
SCRIPTS = {"fomaml": fomaml, "meta_lora": meta_lora, "amft": amft, "eval": evaluation}

# --------------------------------------------------------------------------------------------------
# A run that is cut off and goes on

META_RUN = [
    "--data", "embedded", "--shots", "0",
    "--steps", "6", "--save-every", "2", "--eval-every", "3", "--eval-problems", "4",
    "--eval-tasks", "2", "--eval-max-new-tokens", "4", "--inner-steps", "2",
    "--tasks-per-step", "2", "--support-batch", "2", "--query-batch", "2", "--gain-every", "2",
]  # fmt: skip


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()]
    found = [pid]
    for parent in found:  # grows while it is gone through
        found += [child for child, its_parent in pairs if its_parent == parent]
    return found[1:]


def kill_at_line(arguments: list[str], metrics: Path, line: int) -> None:
    """Starts a command and kills it when its metrics have that many lines, its ranks too: torchrun
    starts each in a session of its own."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_lines(metrics, line, process, seconds=200)
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)


@pytest.mark.parametrize(
    "name,ranks",
    [("fomaml", 0), ("fomaml", 2), ("meta_lora", 0), ("meta_lora", 2), ("amft", 0)],
)
def test_kill_and_resume(name, ranks, tmp_path, small_model, capsys):
    """SIGKILL in the middle, --resume: weights, metrics and evaluations equal the uninterrupted
    run's, bit for bit."""
    script, settings, steps = f"{name}.py", ["--model", small_model, *META_RUN], 6
    if name == "amft":
        settings, steps = AMFT_RUN, 14
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    if ranks:
        output = run_well(script, *settings, "--output-dir", whole, ranks=ranks).stdout
    else:
        assert run_here(SCRIPTS[name], *settings, "--output-dir", whole) == 0
        output = capsys.readouterr().out
    assert "model: " in output
    picture = "dynamics.png" if name == "amft" else "curves.png"
    assert (whole / picture).stat().st_size > 10_000

    metrics = cut / "metrics.jsonl"
    arguments = command(script, *settings, "--output-dir", cut, ranks=ranks)
    kill_at_line(arguments, metrics, random.randint(2, steps - 1))
    with open(metrics, "a") as file:
        file.write(f'{{"step": {steps}, "half a li')  # what a kill can leave
    run_well(script, *settings, "--output-dir", cut, "--resume", ranks=ranks)
    assert_same_weights(final_weights(cut), final_weights(whole))
    assert logged(cut) == logged(whole)
    assert [row["step"] for row in logged(cut)] == list(range(1, steps + 1))
    assert logged(cut, "evaluations.jsonl") == logged(whole, "evaluations.jsonl")
    if name == "amft":
        assert logged(cut, "samples.jsonl") == logged(whole, "samples.jsonl")
        changes = [row.get("mu_change/meta_gradient", 0) for row in logged(cut)]
        assert any(changes), "no meta-gradient has moved mu"
        assert logged(cut)[-1]["mu"] != 0.5
    if name != "meta_lora":
        from transformers import AutoModelForCausalLM

        assert AutoModelForCausalLM.from_pretrained(cut / "checkpoint").num_parameters() > 0
    if not ranks:
        flag = "--lr" if name == "amft" else "--inner-lr"
        changed = [*settings, "--output-dir", cut, "--resume", flag, "0.2"]
        assert run_here(SCRIPTS[name], *changed) == 2
        assert flag in capsys.readouterr().err


def test_interrupt_saves(tmp_path, small_model):
    """SIGINT: a checkpoint at the last finished step, exit status 0, the message says how to go
    on."""
    endless = ["--steps", "100000", "--eval-every", "-1", "--save-every", "100000"]
    settings = ["--model", small_model, *META_RUN, *endless, "--output-dir", tmp_path / "r"]
    process = subprocess.Popen(
        command("fomaml.py", *settings),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_lines(tmp_path / "r" / "metrics.jsonl", 3, process, seconds=120)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-2000:]
    done = len(logged(tmp_path / "r"))
    assert f"stopped at step {done}" in out
    assert "--resume" in out
    assert (tmp_path / "r" / f"step-{done:06d}" / "state" / "extra.json").exists()


def test_non_finite_steps(tmp_path, small_model, capsys):
    """An inner learning rate that overflows: steps are skipped and counted, after 5 the run ends
    with status 1."""
    overflow = [
        "--steps", "20", "--eval-every", "-1", "--inner-steps", "6", "--inner-lr", "100",
        "--inner-optimizer", "sgd",
    ]  # fmt: skip
    settings = ["--model", small_model, *META_RUN, *overflow, "--output-dir", tmp_path / "r"]
    assert run_here(fomaml, *settings) == 1
    assert "not finite in 5 steps" in capsys.readouterr().err
    assert [row["skipped_steps"] for row in logged(tmp_path / "r")] == [1, 2, 3, 4, 5]


def test_skipped_steps_are_counted_in_a_row():
    """A good step between two bad ones begins the count anew."""
    passive = types.SimpleNamespace(state={"step": 0, "skipped": 0, "skipped_in_a_row": 0})
    found = []
    for values in ((1.0, math.nan), (1.0,), (math.inf,), (torch.tensor([0.0, math.nan]),), (0.0,)):
        good = Run.finite(passive, *values)
        found.append((good, passive.state["skipped"], passive.state["skipped_in_a_row"]))
    bad = [(False, 1, 1), (True, 1, 0), (False, 2, 1), (False, 3, 2), (True, 3, 0)]
    assert found == bad


@pytest.mark.parametrize(
    "every,steps", [(3, [0, 2, 3, 6, 7]), (0, [0, 2, 7]), (-1, []), (1, list(range(8)))]
)
def test_evaluations_that_are_due(every, steps):
    """Before the first step, after the last and after the warm-up, whatever the period; once."""
    passive = types.SimpleNamespace(
        args=types.SimpleNamespace(eval_every=every), evaluations={}, last_step=7
    )
    assert [step for step in range(8) if Run.evaluation_due(passive, step, 2)] == steps
    passive.evaluations = {0: {}, 7: {}}
    assert not Run.evaluation_due(passive, 0)
    assert not Run.evaluation_due(passive, 7)


# --------------------------------------------------------------------------------------------------
# Wrong input: one line, status 2, before any weight is read

BAD = {
    "fomaml": [
        ("--inner-steps 0", "--inner-steps must be at least 1"),
        ("--replicas 2", "--replicas 2 does not divide the 1 ranks"),
        ("--data /no/such", "no such file or folder"),
        ("--model /no/such", "no such model folder"),
        ("--support-batch 100", "more than the --shots 30"),
        ("--support-ratio 0.7", "sum to at most 1"),
        ("--heldout-subjects Topology", "no such task or subject"),
        ("--data embedded --task-column colour", "grouped by family or subject"),
        ("--task-column colour", "each of the ciphers is a task already"),
        ("--meta-gradient maml --micro-batch 1", "one process"),
        ("--max-length 8", "needs"),
        ("--inner-lr nan", "must be in (0, 100]"),
    ],
    "meta_lora": [
        (
            "--target-modules q_proj c_attn",
            "c_attn: the model has no such linear layer; it has down_proj, gate_proj",
        ),
        ("--dropout 1", "--dropout must be in [0, 1)"),
        ("--lora-r 0", "--lora-r must be at least 1"),
        ("--r 8", "--r is now --lora-r"),
        ("--model /no/such", "no such model folder"),
    ],
    "amft": [
        ("--model /no/such", "no such model folder"),
        ("--data /no/such", "no such file or folder"),
        ("--samples 1", "--samples must be at least 2"),
        ("--mu-init 0.99", "--mu-min <= --mu-init"),
        ("--epochs 2", "one optimizer step per rollout"),
        ("--replicas 2", "--replicas 2 does not divide"),
        ("--method luffy --advantage gae", "advantages of its own"),
        ("--subjects Topology", "subjects: Algebra"),
        ("--validation-size 99999", "more than --validation-size"),
        ("--warmup-steps 99", "--warmup-steps must be between"),
        ("--vision", "--vision is for the games"),
        ("--task virl --routes /no", "not a route file"),
        ("--lr nan", "must be in (0, 100]"),
    ],
    "eval": [
        (
            "--benchmark nope",
            "--benchmark nope: unknown; there are embedded, general_points, virl, math500",
        ),
        ("--samples 4 --temperature 0", "--samples above 1"),
        ("--benchmark mine --data /no/such.jsonl", "cannot read"),
        ("--data x.jsonl", "name it with --benchmark"),
        ("--few-shot 5 --tasks Topology", "no such task"),
        ("--model /no/such", "no such model folder"),
    ],
}


def test_bad_input(monkeypatch, capsys, tmp_path):
    for name, script in SCRIPTS.items():
        monkeypatch.setattr(script, "load_weights", lambda *_, **__: pytest.fail("weights read"))
        for i, (flags, message) in enumerate(BAD[name]):
            where = ["--output-dir", tmp_path / f"{name}{i}"]
            assert run_here(script, *flags.split(), *where) == 2, f"{name} {flags}"
            error = capsys.readouterr().err
            assert message in error, f"{name} {flags}"
            assert error.count("\n") == 1, f"{name} {flags}: {error}"
    files = {file.name for file in tmp_path.glob("*/*")}
    assert files <= {"args.json"}


def test_command_lines(tmp_path, small_model, capsys):
    """Exit statuses as a user's shell sees them; --help names every option; the environment test
    reads no weights."""
    bad = run("fomaml.py", "--model", "/no/such")
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    with pytest.raises(SystemExit):
        run_here(fomaml, "--help")
    help_text = capsys.readouterr().out
    for field in fomaml.Args.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in help_text
    empty, out = tmp_path / "empty.jsonl", tmp_path / "out"
    empty.write_text("")
    assert run("data.py", "--data", empty, "--output-dir", out).returncode == 2
    assert run("data.py", "--support-ratio", "0.9", "--output-dir", out).returncode == 2
    bare = tmp_path / "bare"  # config and tokenizer, no weights
    bare.mkdir()
    for file in small_model.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    dry = run_well("fomaml.py", "--model", bare, "--dry-run").stdout
    assert "ready" in dry
    assert "all-reduce works" in dry
    assert run_here(amft, "--model", bare, "--dry-run") == 0
    assert "ready" in capsys.readouterr().out
    assert run_here(fomaml, "--model", bare, "--dry-run", "--query-batch", "50") == 1
    assert "cannot finish: task" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Which file may import which


def source_files() -> dict[str, Path]:
    """{module: file}, but for the tests."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("games/*.py"), *ROOT.glob("tiny/*.py")]
    modules = {}
    for file in files:
        words = file.relative_to(ROOT).with_suffix("").parts
        modules[".".join(word for word in words if word != "__init__")] = file
    modules.pop("test_smoke")
    return modules


def imports_of(file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the repository that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & modules.keys()


def reached(start: str, imports: dict[str, set[str]]) -> set[str]:
    """All modules that are loaded sooner or later with one."""
    found, new = set(), [start]
    while new:
        for module in imports[new.pop()] - found:
            found.add(module)
            new.append(module)
    return found


def packages(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def test_imports():
    """No program is imported (but by those that measure them); FOMAML and MeTA-LoRA need a
    few files and no games; no two files need each other."""
    modules = source_files()
    imports = {module: imports_of(file, modules) for module, file in modules.items()}
    for module in imports.keys() - {"bench", "bench_gpu"}:
        programs = imports[module] & {"fomaml", "meta_lora", "amft", "eval", "bench"}
        assert not programs, f"{module} imports {programs}"
        if module != "run":
            assert "plots" not in imports[module], f"{module} imports plots"
    for module in ("fomaml", "meta_lora"):
        others = imports[module] - {"data", "model", "measure", "run", "lora"}
        assert not others, f"{module} imports {others}"
        assert "games" not in packages(reached(module, imports)), f"{module} needs the games"
    for module in ("model", "run", "policy"):
        assert not packages(imports[module]) & {"games", "tiny"}, module
    for module in imports:
        assert module not in reached(module, imports), f"{module} needs itself"


def test_import_rule_sees_late_imports(tmp_path):
    modules = {name: tmp_path / f"{name}.py" for name in ("a", "b", "c")}
    modules["a"].write_text("def f():\n    from b import g\n")
    modules["b"].write_text("import c\n")
    modules["c"].write_text("import json\n")
    imports = {name: imports_of(file, modules) for name, file in modules.items()}
    assert imports == {"a": {"b"}, "b": {"c"}, "c": set()}
    assert reached("a", imports) == {"b", "c"}


# --------------------------------------------------------------------------------------------------
# Run folders and checkpoints


def test_run_folders_are_numbered(tmp_path, process_group):
    """A used one is never written over; resuming finds the first; what it holds of the start."""
    place = str(tmp_path / "a" / "run")
    settings = {"inner_lr": 0.1, "betas": (0.9, 0.99), "keep": 5}
    names = [run_folder(place, settings, False, set(), 0).name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]
    assert run_folder(place, settings, True, set(), 0) == tmp_path / "a" / "run"
    text = (tmp_path / "a" / "run-2" / "args.json").read_text()
    assert text.startswith('{\n "args": {\n  "inner_lr"')  # for people too
    record = json.loads(text)
    assert record["args"] == {"inner_lr": 0.1, "betas": [0.9, 0.99], "keep": 5}
    assert record["command"] == sys.argv
    assert record["ranks"] == 1
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"].keys() == {"python", "torch", "transformers"}
    assert re.fullmatch("run-2-[0-9a-f]{8}", record["id"])
    (tmp_path / "empty").mkdir()
    assert run_folder(str(tmp_path / "empty"), settings, False, set(), 0).name == "empty"


def test_settings_that_have_changed(tmp_path, process_group):
    """All of them are named with their old values, but those that are free."""
    place, old = str(tmp_path / "run"), {"inner_lr": 0.1, "steps": 4, "keep": 5, "shots": None}
    folder = run_folder(place, old, False, set(), 0)
    assert run_folder(place, old | {"keep": 9, "new": 1}, True, {"keep"}, 0) == folder
    message = f"--resume: {folder} was started with --inner-lr 0.1, --shots None; give the same"
    with pytest.raises(ModelError) as error:
        run_folder(place, old | {"inner_lr": 0.2, "shots": 3, "keep": 9}, True, {"keep"}, 0)
    assert str(error.value) == message
    message = f"--resume: {folder} was started with --steps 4; give the same (the schedule is made"
    with pytest.raises(ModelError) as error:
        run_folder(place, old | {"steps": 5}, True, set(), 0)
    assert str(error.value) == message + " for --steps)"


def test_checkpoints_on_disk(tmp_path, process_group):
    """The newest are kept, whole ones only are counted, the link names the last."""
    link, written = tmp_path / "checkpoint", []

    def write(folder: Path) -> None:
        assert not list(folder.glob("*.txt")), "left from a cut write"
        (folder / "value.txt").write_text(str(len(written)))
        written.append(folder.name)

    (tmp_path / "step-000010.tmp" / "state").mkdir(parents=True)
    (tmp_path / "step-000010.tmp" / "old.txt").write_text("cut")
    (tmp_path / "step-000001" / "state").mkdir(parents=True)  # without extra.json: not whole
    for step in (2, 10, 3, 10):
        save_checkpoint(link, write, {"step": step, "own": [1.5]}, keep=2)
        assert link.is_symlink()
        assert os.readlink(link) == f"step-{step:06d}"
    assert written == [f"step-{step:06d}.tmp" for step in (2, 10, 3, 10)]
    assert [p.name for p in checkpoints(tmp_path)] == ["step-000003", "step-000010"]
    assert (link / "value.txt").read_text() == "3"
    extra = json.loads((link / "state" / "extra.json").read_text())
    assert extra == {"step": 10, "own": [1.5]}
    assert not list(tmp_path.glob("*.tmp"))
    assert (tmp_path / "step-000001").exists()


def test_a_checkpoint_that_was_not_renamed(tmp_path):
    """A kill may come when all of it is written."""
    (tmp_path / "step-000004.tmp" / "state").mkdir(parents=True)
    (tmp_path / "step-000004.tmp" / "state" / "extra.json").write_text("{}")
    assert checkpoints(tmp_path) == []


def test_checkpoints_in_the_order_of_their_steps(tmp_path, monkeypatch):
    """However the file system lists them."""
    folders = [tmp_path / f"step-{step:06d}" for step in (20, 3, 100, 4)]
    for folder in folders:
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "extra.json").write_text("{}")
    monkeypatch.setattr(Path, "glob", lambda *_: iter(folders))
    assert checkpoints(tmp_path) == [folders[i] for i in (1, 3, 0, 2)]


def test_a_link_that_was_not_renamed(tmp_path, process_group):
    (tmp_path / "checkpoint.tmp").symlink_to("step-000001")
    save_checkpoint(tmp_path / "checkpoint", lambda _: None, {"step": 2}, keep=1)
    assert os.readlink(tmp_path / "checkpoint") == "step-000002"


def test_ranks_write_a_checkpoint_together(tmp_path, monkeypatch):
    """All of them write, between the making of the folder and its renaming, on which they wait;
    the other files are of rank 0."""
    seen = []
    monkeypatch.setattr(
        run_module.dist, "barrier", lambda: seen.append(sorted(p.name for p in tmp_path.iterdir()))
    )
    for rank, before, after in (
        (1, [], ["of rank 1"]),
        (0, ["step-000002.tmp"], ["checkpoint", "of rank 0", "step-000002"]),
    ):
        monkeypatch.setattr(run_module.dist, "get_rank", lambda rank=rank: rank)
        seen.clear()

        def write(folder: Path, rank=rank) -> None:
            assert folder == tmp_path / "step-000002.tmp"
            assert len(seen) == 1
            (tmp_path / f"of rank {rank}").write_text("")

        save_checkpoint(tmp_path / "checkpoint", write, {"step": 2}, keep=1)
        assert seen == [before, after]
        (tmp_path / f"of rank {rank}").unlink()


def test_other_ranks_take_the_folder_of_rank_0(tmp_path, monkeypatch):
    """They make none; what is wrong is raised on all of them."""

    def broadcast(answer: list, source: int) -> None:
        assert (answer, source) == ([None], 0)
        answer[0] = from_rank_0

    monkeypatch.setattr(run_module.dist, "broadcast_object_list", broadcast)
    from_rank_0 = str(tmp_path / "run-2")
    assert run_folder(str(tmp_path / "run"), {}, False, set(), 1) == tmp_path / "run-2"
    from_rank_0 = ModelError("no")
    with pytest.raises(ModelError, match="no"):
        run_folder(str(tmp_path / "run"), {}, False, set(), 1)
    assert not list(tmp_path.iterdir())


def test_a_folder_at_home(tmp_path, monkeypatch, process_group):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = [run_folder("~/run", {}, False, set(), 0) for _ in range(2)]
    assert found == [tmp_path / "run", tmp_path / "run-2"]


def test_dtype_of_a_checkpoint(monkeypatch):
    """What others load: bfloat16 from a GPU."""
    for there, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert ModelCheckpoint(None, None, None).dtype == dtype


def test_reasons_of_checkpoints():
    assert checkpoint_reason(OSError("no room\nat all")) == "no room"
    failures = {1: (ValueError("of rank 1"), None), 0: (ValueError("of rank 0"), None)}
    assert checkpoint_reason(CheckpointException("wrapped", failures)) == "of rank 1"
    assert "CheckpointException" in checkpoint_reason(CheckpointException("wrapped", {}))


def test_checkpoint_of_a_model(tmp_path, process_group):
    """Weights for others, of the part that is a language model; with the optimizer they come back
    as they were."""
    from transformers import AutoModelForCausalLM

    _, tokenizer = load_config("tiny")
    found = []
    for factor in (1.0, 2.0):
        policy = Policy(small_llama(torch.float32), True)
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(factor)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1 * factor)
        for p in policy.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        checkpoint = ModelCheckpoint(policy, tokenizer, optimizer, policy.lm)
        if factor == 1:
            checkpoint.write(tmp_path)
        else:
            checkpoint.read(tmp_path)
        moments = [optimizer.state[p]["exp_avg_sq"].clone() for p in policy.parameters()]
        found.append((weights_of(policy), moments, optimizer.param_groups[0]["lr"]))
    assert_same_weights(found[1][0], found[0][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)
    assert found[1][2] == 0.1
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert saved.dtype == torch.float32
    for name, p in saved.named_parameters():
        assert torch.equal(p, found[0][0][f"lm.{name}"]), name
    assert not [name for name in saved.state_dict() if "value" in name]


# --------------------------------------------------------------------------------------------------
# The passive object

run_module = importlib.import_module("run")  # beside the function of the helpers


@dataclass
class RunArgs:
    output_dir: str
    model: str = "tiny"
    steps: int = 5
    save_every: int = 2
    keep: int = 2
    eval_every: int = -1
    resume: bool = False
    wandb: bool = False
    push_to_hub: str | None = None


class Number:
    """A checkpoint of one number."""

    def __init__(self):
        self.value, self.writes = 0, 0

    def write(self, folder: Path) -> None:
        (folder / "number.txt").write_text(str(self.value))
        self.writes += 1

    def read(self, folder: Path) -> None:
        self.value = int((folder / "number.txt").read_text())


@pytest.fixture
def begun(tmp_path, process_group, monkeypatch):
    """Starts runs: (run, its checkpoint). No pictures; after it signals are as they were."""
    monkeypatch.setattr(plots, "figure", lambda folders, file: file.write_text(str(folders)))
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]

    def begin(own_state=None, steps=None, size=1, **changes) -> tuple[Run, Number]:
        args = RunArgs(str(tmp_path / "r"), **changes)
        world = World(torch.device("cpu"), size=size)
        shows = {"loss": "loss", "tok_s": "tokens_per_second"}
        run = Run(
            "script", args, world, {"resume"},
            title="title", shows=shows, advice="lower it", steps=steps,
        )  # fmt: skip
        number = Number()
        run.start(number, "7 parameters", own_state)
        return run, number

    yield begin
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def train(run: Run, number: Number, until: int = 99) -> None:
    for step in run.steps():
        if run.is_over(step) or step == until:
            break
        number.value += 10
        run.log(step, {"loss": float(step)})


def names_of(folder: Path) -> list[str]:
    return [p.name for p in checkpoints(folder)]


def test_a_run_from_its_start_to_its_end(begun, tmp_path, capsys):
    """Five steps; checkpoints of every second one and of the last, of which two are kept."""
    run, number = begun()
    folder = tmp_path / "r"
    assert capsys.readouterr().out == f"title: 7 parameters, 1 rank(s), run folder {folder}\n"
    assert not (folder / "samples.jsonl").exists()
    run.evaluation(0, {"task": {"loss": 2.0}}, ["said", "too"], {"loss": 2.0})
    train(run, number)
    run.evaluation(5, {"task": {"loss": 1.0}}, [], None, [{"step": 5, "text": "so"}])
    assert names_of(folder) == ["step-000002", "step-000004"]
    assert run.completed
    assert run.finish(lambda first, last: f"{first} {last}", "curves.png", "; and more") == 0
    rows = logged(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["skipped_steps"] for row in rows] == [0] * 5
    assert logged(folder, "evaluations.jsonl") == [
        {"step": 0, "mean": {"loss": 2.0}, "tasks": {"task": {"loss": 2.0}}},
        {"step": 5, "tasks": {"task": {"loss": 1.0}}},
    ]
    assert logged(folder, "samples.jsonl") == [{"step": 5, "text": "so"}]
    assert names_of(folder) == ["step-000004", "step-000005"]
    assert number.writes == 3
    assert (folder / "checkpoint" / "number.txt").read_text() == "50"
    card = (folder / "checkpoint" / "README.md").read_text()
    assert "Step 5 of a run of `script.py`" in card
    assert "library_name" not in card
    assert (folder / "curves.png").read_text() == str([folder])
    model, picture = folder / "checkpoint", folder / "curves.png"
    assert re.fullmatch(
        re.escape("said\ntoo\n\n{'task': {'loss': 2.0}} {'task': {'loss': 1.0}}\n\n")
        + r"\d+"
        + re.escape(f" s; model: {model}; picture: {picture}; and more\n"),
        capsys.readouterr().out,
    )


def test_a_run_goes_on(begun, tmp_path, capsys):
    """At its newest checkpoint, with its own state; later rows are cut off; nothing is saved
    twice."""
    run, number = begun({"mu": 0.0})
    for step in run.steps():
        if step == 3:
            break
        run.finite(1.0 if step != 1 else math.nan)
        run.own_state["mu"] = step / 2
        number.value += 10
        run.log(step, {"loss": float(step)})
        run.evaluation(step, {"t": {}}, ())
        if step == 1:
            assert not checkpoints(tmp_path / "r"), "saved at a step that was skipped"
    run.save()
    run.save()
    assert (number.writes, names_of(tmp_path / "r")) == (1, ["step-000003"])
    run.log(3, {"loss": 3.0})
    run.evaluation(4, {"t": {}}, ())
    shutil.rmtree(tmp_path / "r" / "step-000004")
    capsys.readouterr()
    state = {"mu": 9.0}
    run, number = begun(state, resume=True)
    assert capsys.readouterr().out.endswith(f"run folder {tmp_path / 'r'}, resumed at step 3\n")
    assert number.value == 30
    assert state == {"mu": 1.0}
    assert run.state == {"step": 3, "skipped": 1, "skipped_in_a_row": 0}
    assert [row["step"] for row in logged(tmp_path / "r")] == [1, 2, 3]
    assert sorted(run.evaluations) == [0, 1, 2]
    assert run.bar.n == 3
    assert run.bar.total == 5
    run.save()
    assert number.writes == 0
    assert next(run.steps()) == 3
    run, _ = begun(resume=True, steps=3)
    assert list(run.steps()) == [3]
    assert run.is_over(3)


def test_a_run_that_is_asked_to_stop(begun, tmp_path, capsys):
    """It ends with the step, is saved, and says how to go on; a second signal ends it at once."""
    run, number = begun()
    for step in run.steps():
        number.value += 1
        run.log(step, {"loss": 1.0})
        if step == 0:
            assert not run.stop.is_requested()
            assert not run.stop_agreed()
            os.kill(os.getpid(), signal.SIGTERM)
            assert run.stop.is_requested()
    assert number.value == 1
    assert run.stopped
    assert run.is_over(1)
    assert not run.completed
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) != signal.SIG_DFL
    capsys.readouterr()
    assert run.finish(lambda *_: "", "curves.png") == 0
    assert capsys.readouterr().out == (
        "stopped at step 1 and saved; to go on: the same command with --output-dir "
        f"{tmp_path / 'r'} --resume\n"
    )
    assert names_of(tmp_path / "r") == ["step-000001"]
    run, _ = begun(resume=True)
    run.evaluation(1, None, ["not said"])  # it was broken off
    assert run.stopped
    assert list(run.steps()) == []
    assert 1 not in run.evaluations


def test_a_run_that_is_stopped_before_its_first_step(begun, tmp_path):
    run, number = begun()
    run.stop.requested = True
    assert list(run.steps()) == []
    assert run.finish(lambda *_: "", "curves.png") == 0
    assert names_of(tmp_path / "r") == ["step-000000"]


def test_a_run_that_gives_up(begun, tmp_path, capsys):
    """After five steps running that are not finite, not after four; the last good checkpoint is
    from before."""
    run, number = begun(steps=99)
    for step in run.steps():
        run.finite(1.0 if step in (0, 1, 6) else math.nan)
        run.log(step, {"loss": 1.0})
        assert bool(run.failed) == (step == 11)
    assert step == 11
    assert not run.completed
    assert number.writes == 1  # step 7 is none of every second
    capsys.readouterr()
    assert run.finish(lambda *_: "", "curves.png") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "script.py: the loss or gradient was not finite in 5 steps running (to step 12): lower it. "
        f"Last good checkpoint: {tmp_path / 'r' / 'step-000002'}"
    )
    assert number.writes == 1


def test_speed_of_a_step(begun, tmp_path, monkeypatch):
    """600 tokens of both ranks in two seconds; 4 FLOPs a token of 1,000 that each rank can do a
    second; laps begin anew with each step and after an evaluation."""
    run, _ = begun(size=2)
    sent = []
    run.log_files.wandb = types.SimpleNamespace(
        log=lambda values, step: sent.append((step, values))
    )
    clock = itertools.chain([10.0, 11.0, 12.0, 13.0, 15.0, 20.0, 22.0, 23.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(run_module, "peak_flops", lambda _: 1e3)
    monkeypatch.setattr(run_module, "peak_memory", lambda _: 3e9)
    steps = run.steps()
    assert next(steps) == 0  # at 10
    run.log(0, {"loss": 1.0}, tokens=600, flops_per_token=4)  # at 11
    assert next(steps) == 1  # at 12
    assert run.lap() == 1
    assert run.lap() == 2
    run.evaluation(1, {"t": {"loss": 1.0}}, (), {"loss": 3.0})  # at 20
    run.log(1, {"loss": 5.0}, tokens=600, flops_per_token=4)  # at 22
    run.evaluation(2, {"t": {"loss": 4.0}}, ())
    rows = [json.loads(s) for s in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    always = {"skipped_steps": 0, "peak_memory_gb": 3.0}
    first = {"loss": 1.0, "tokens_per_second": 600, "mfu": 1.2, "step": 1, "seconds": 1}
    second = {"loss": 5.0, "tokens_per_second": 300, "mfu": 0.6, "step": 2, "seconds": 2}
    assert rows == [first | always, second | always]
    assert sent == [
        (1, first | always), (1, {"eval/loss": 3.0}), (2, second | always), (2, {"t/loss": 4.0}),
    ]  # fmt: skip
    assert run.latest == second | always
    assert run.bar.n == 2
    assert "loss=5.000, tok_s=300" in run.bar.postfix


def test_numbers_beside_the_bar():
    passive = types.SimpleNamespace(
        latest={"a": 0.12345, "b": 99.9994, "c": 100, "d": -1234.6, "e": None, "f": -99.5}
    )
    shown = [Run._shown(passive, name) for name in "abcdefg"]
    assert shown == ["0.123", "99.999", "100", "-1,235", "-", "-99.500", "-"]


def test_warnings_are_said_once(capsys):
    passive = types.SimpleNamespace(warned=set(), world=World(torch.device("cpu")))
    for warnings in ({"a": "one"}, {"a": "one", "b": "two"}, {"b": "three"}):
        Run.warn(passive, warnings)
    assert capsys.readouterr().out == "warning: one\nwarning: two\n"


def test_ranks_read_the_log_before_it_is_cut(tmp_path, monkeypatch):
    """They wait for each other between the two, and until it is cut."""
    file, seen = tmp_path / "evaluations.jsonl", []
    file.write_text('{"step": 1, "tasks": {}}\n{"step": 3, "tasks": {}}\n')
    monkeypatch.setattr(
        run_module.dist, "barrier", lambda: seen.append(file.read_text().count("\n"))
    )
    Log("script", {"wandb": False}, tmp_path, True, 2)
    assert seen == [2, 1]


def test_what_weights_and_biases_are_told(tmp_path, monkeypatch, process_group):
    """A run of an older version has no id: its name."""
    asked = []
    wandb = types.SimpleNamespace(init=lambda **settings: asked.append(settings))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings, folder = {"wandb": True, "lr": 0.5}, tmp_path / "r"
    folder.mkdir()
    for record, name in (({"id": "r-12"}, "r-12"), ({}, "r")):
        (folder / "args.json").write_text(json.dumps(record))
        Log("script", settings, folder, True, 0)
        Log("script", settings, folder, False, 0)  # not rank 0
        assert asked.pop() == {
            "project": "script", "name": "r", "id": name, "resume": "allow", "config": settings,
            "dir": folder,
        }  # fmt: skip
        assert not asked


def test_a_stop_of_another_rank(monkeypatch):
    """One rank is enough."""
    stop, operations = Stop.__new__(Stop), []
    stop.world, stop.requested = World(torch.device("cpu")), False

    def reduced(flag, operation):
        operations.append(operation)
        flag.fill_(of_all_ranks)

    monkeypatch.setattr(run_module.dist, "all_reduce", reduced)
    for of_all_ranks in (0.0, 1.0):
        assert stop.agreed() == bool(of_all_ranks)
    assert set(operations) <= {torch.distributed.ReduceOp.MAX, torch.distributed.ReduceOp.SUM}
    assert not stop.is_requested()


def test_end_of_a_run(begun, tmp_path, capsys, monkeypatch):
    """Its seconds; the checkpoint is uploaded where that was asked for, by rank 0; the table is of
    the first and of the last evaluation, in whatever order they came."""
    uploaded = []
    monkeypatch.setattr(
        run_module, "push_to_hub", lambda *what: uploaded.append(what) or "https://hub/me/mine"
    )
    run, number = begun(push_to_hub="me/mine")
    for step in (2, 5, 0):
        run.evaluation(step, {"t": {"loss": float(step)}}, ())
    train(run, number)
    monkeypatch.setattr(time, "time", lambda: run.began + 65.2)
    capsys.readouterr()
    assert run.finish(lambda first, last: f"{first} {last}", "curves.png") == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == "{'t': {'loss': 0.0}} {'t': {'loss': 5.0}}"
    assert lines[3].startswith("65 s; ")
    assert lines[4] == "uploaded to https://hub/me/mine"
    assert uploaded == [(tmp_path / "r" / "checkpoint", "me/mine")]
    run.world = World(torch.device("cpu"), rank=1, size=2)
    assert run.finish(lambda *_: pytest.fail("a table"), "curves.png") == 0
    assert len(uploaded) == 1
    run.failed = "no"
    assert run.finish(lambda *_: pytest.fail("a table"), "curves.png") == 1
    assert capsys.readouterr() == ("", "")


def test_only_rank_0_shows_a_bar(begun, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "run_folder", lambda *_: tmp_path)
    for rank in (0, 1):
        world = World(torch.device("cpu"), rank, 2)
        run = Run("x", RunArgs("r"), world, set(), title="t", shows={}, advice="")
        run.start(Number(), "p")
        assert run.bar.disable == (rank == 1)
        assert run.log_files.active == (rank == 0)
    assert capsys.readouterr().out.count("\n") == 1


def test_only_rank_0_writes_the_card(begun, tmp_path):
    run, _ = begun()
    for rank in (1, 0):
        run.world, folder = World(torch.device("cpu"), rank, 2), tmp_path / str(rank)
        folder.mkdir()
        run._write(folder)
        assert (folder / "README.md").exists() == (rank == 0)


def test_only_rank_0_writes_the_log(tmp_path, process_group):
    (tmp_path / "evaluations.jsonl").write_text('{"step": 1, "tasks": {"t": 5}}\n{"step": 3}\n')
    log = Log("script", {"wandb": False}, tmp_path, False, 2)
    log.append("metrics.jsonl", {"step": 1})
    assert [file.name for file in tmp_path.iterdir()] == ["evaluations.jsonl"]
    assert log.evaluations == {1: {"t": 5}}
    assert (tmp_path / "evaluations.jsonl").read_text().count("\n") == 2
    log = Log("script", {"wandb": False}, tmp_path, True, 1)
    assert (tmp_path / "evaluations.jsonl").read_text() == '{"step": 1, "tasks": {"t": 5}}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    log.send({"loss": 1.0}, 1)  # to nobody


# --------------------------------------------------------------------------------------------------
# The machine, and what is checked before anything expensive


def test_memory_of_a_process(monkeypatch):
    """Linux counts in kilobytes, macOS in bytes, a GPU by itself."""
    usage = types.SimpleNamespace(ru_maxrss=5)
    monkeypatch.setattr(run_module.resource, "getrusage", lambda _: usage)
    for platform, size in (("linux", 5120), ("darwin", 5)):
        monkeypatch.setattr(sys, "platform", platform)
        assert run_module.peak_memory(torch.device("cpu")) == size
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    assert run_module.peak_memory(torch.device("cuda")) == 7


def test_speed_of_gpus(monkeypatch):
    """TFLOP/s in bf16 without sparsity, of the vendors' data sheets."""
    assert run_module.peak_flops(torch.device("cpu")) is None
    for name, tera in (
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 3090", 71), ("Another", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        speed = run_module.peak_flops(torch.device("cuda"))
        assert speed == (None if tera is None else tera * 1e12), name


def test_warnings_of_rates():
    """At the limit too; none for an embedded model."""
    args = types.SimpleNamespace(model="other", outer_lr=1e-3, inner_lr=0.0999, lr=5.0)
    limits = {"outer_lr": 1e-3, "inner_lr": 0.1, "lr": 0.5}
    text = (
        "--{} is a rate for the embedded models: a real one wants less than {}, or its weights are "
        "lost"
    )
    assert run_module.rate_warnings(args, limits) == {
        "outer_lr": text.format("outer-lr 0.001", "0.001"),
        "lr": text.format("lr 5", "0.5"),
    }
    args.model = "tiny_games"
    assert run_module.rate_warnings(args, limits) == {}


def test_what_is_said_of_the_ranks(capsys, process_group, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert run_module.check_ranks(World(torch.device("cpu"))) == []
    versions, ranks = capsys.readouterr().out.splitlines()
    assert f", torch {torch.__version__}, transformers " in versions
    said = "1 rank(s), CPU with 3 thread(s); 1 replica(s) of 1 shard(s); all-reduce works"
    assert ranks == said
    # More ranks than there are processes: their sum is too small
    world = World(torch.device("cpu"), size=6, replicas=2)
    assert run_module.check_ranks(world) == ["the all-reduce gave a wrong sum"]
    said = "6 rank(s), CPU with 3 thread(s); 2 replica(s) of 3 shard(s); all-reduce FAILED"
    assert capsys.readouterr().out.splitlines()[1] == said


def test_verdicts_of_a_dry_run(capsys, monkeypatch):
    world = World(torch.device("cpu"))

    def refuses(args, world):
        raise DataError("no rows")

    def cannot(args, world):
        raise ModelError("no weights")

    for of_ranks, examine, status, said in (
        ([], lambda *_: [], 0, "ready\n"),
        (["sum"], lambda *_: [], 1, "cannot finish: sum\n"),
        (["sum"], lambda *_: ["a", "b"], 1, "sum\ncannot finish: a\ncannot finish: b\n"),
        ([], refuses, 1, "cannot finish: no rows\n"),
        (["sum"], cannot, 1, "cannot finish: sum\ncannot finish: no weights\n"),
    ):
        monkeypatch.setattr(run_module, "check_ranks", lambda _, found=of_ranks: list(found))
        assert run_module.dry_run(None, world, examine) == status
        assert capsys.readouterr().out.endswith(said)


@pytest.fixture
def shell(monkeypatch):
    """start() with what is asked of the machine written down; no group of processes."""
    asked = []
    world = World(torch.device("cpu"))
    monkeypatch.setattr(run_module, "setup", lambda replicas: asked.append(replicas) or world)
    monkeypatch.setattr(run_module, "dry_run", lambda *_: asked.append("dry run") or 7)
    monkeypatch.setattr(run_module, "check_hub", lambda: asked.append("hub"))
    monkeypatch.setattr(time, "sleep", lambda seconds: asked.append(f"{seconds} s"))
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def start(rank=0, ranks=1, error=None, **changes) -> tuple:
        settings = {"replicas": 2, "wandb": False, "push_to_hub": None, "dry_run": False}
        if ranks > 1:
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(ranks))

        def main(args, world):
            asked.append("main")
            if error:
                raise error
            return 3

        asked.clear()
        args = types.SimpleNamespace(**settings | changes)
        status = run_module.start(
            "x.py", args, lambda _, ranks: asked.append(f"{ranks} ranks"), None, main
        )
        return status, list(asked)

    return start


def test_how_a_script_starts(shell):
    assert shell() == (3, ["1 ranks", 2, "main"])
    assert shell(dry_run=True) == (7, ["1 ranks", 2, "dry run"])
    assert shell(push_to_hub="me/mine") == (3, ["1 ranks", "hub", 2, "main"])
    assert shell(rank=1, ranks=4, push_to_hub="me/mine") == (3, ["4 ranks", 2, "main"])


def test_how_a_script_ends(shell, capsys, monkeypatch):
    """One line and status 2 for wrong input, which rank 0 says first; 130 for Ctrl-C."""
    for kind in (DataError, ModelError, OSError):
        assert shell(error=kind("so")) == (2, ["1 ranks", 2, "main"])
        assert capsys.readouterr().err == "x.py: so\n"
    assert shell(error=KeyboardInterrupt())[0] == 130
    assert capsys.readouterr().err == "x.py: interrupted, nothing new is saved\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert shell(wandb=True) == (2, ["1 ranks"])
    assert capsys.readouterr().err == "x.py: --wandb needs the package: pip install wandb\n"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert shell(wandb=True)[0] == 3
    assert shell(1, 2, DataError("so")) == (2, ["2 ranks", 2, "main", "5 s"])
    assert capsys.readouterr().err == "x.py, rank 1: so\n"
    assert shell(1, 2, KeyboardInterrupt())[0] == 130
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        shell(error=ZeroDivisionError())
