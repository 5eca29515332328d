"""run.py and what users do: checkpoints, kill and resume, Ctrl-C, failures, command lines; and
which file may import which."""

import ast
import importlib
import math
import os
import random
import signal
import subprocess
import time
import types
from pathlib import Path

import pytest
import torch

import amft
import fomaml
import meta_lora
from run import Run
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
    wait_for_lines,
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
