"""eval.py, piece by piece, and where something is wrong: folders, damaged files, forms of choices,
models with few positions, interruptions, full disks."""

import dataclasses
import errno
import importlib
import importlib.util
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import plots
from data import DataError, Encoded, Example, Task, embedded_examples, encode
from games.play import Trajectory, Turn
from measure import bootstrap
from model import World, load_config
from policy import Sample
from tests.helpers import (
    ROOT,
    command,
    functional,
    random_episodes,
    reference_loss,
    run_here,
    small_llama,
)

evaluation = importlib.import_module("eval")  # not the built-in function

TWO_PROBLEMS = ["--limit", "2", "--max-length", "8", "--temperature", "0"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder, for the default --output-dir."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *args) -> str:
    """The one line with which a command line ends in status 2."""
    assert run_here(evaluation, *args) == 2, args
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def refused_last(capsys, *args) -> str:
    """As refused, where a progress bar may stand before the line."""
    assert run_here(evaluation, *args) == 2, args
    return capsys.readouterr().err.splitlines()[-1]


def small_gpt2(folder: Path, places: int) -> Path:
    """Fills a folder with a random GPT-2, whose positions are a table, and the embedded
    tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    _, tokenizer = load_config("tiny")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer) + 8,
        n_positions=places,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------
# The output folder


def test_default_folder_is_numbered(here, small_model, capsys):
    """Same settings continue, others get a number; a folder that is named is refused."""
    ask = ["--model", small_model, *TWO_PROBLEMS]
    assert run_here(evaluation, *ask) == 0
    assert run_here(evaluation, *ask, "--seed", "1") == 0
    assert run_here(evaluation, *ask) == 0
    assert run_here(evaluation, *ask, "--seed", "1", "--batch-size", "1") == 0
    assert sorted(p.name for p in (here / "evals").iterdir()) == ["run", "run-2"]
    for name, seed in (("run", 42), ("run-2", 1)):
        folder = here / "evals" / name
        assert json.loads((folder / "args.json").read_text())["seed"] == seed
        assert len((folder / "responses-0.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    named = ["--output-dir", "evals/run-2"]
    error = refused(capsys, *ask, *named)
    assert "holds results of other settings (seed): choose another --output-dir" in error
    (here / "evals" / "run-2" / "args.json").write_text('{"mod')
    assert "a damaged args.json" in refused(capsys, *ask, "--seed", "1", *named)
    assert "must name a folder" in refused(capsys, *ask, "--output-dir", "")


def test_failed_call_leaves_nothing(here, small_model, capsys, monkeypatch):
    """Neither before the folder is claimed nor after, as when the weights are cut off."""
    refused(capsys, "--benchmark", "mine", "--data", "/no/such.jsonl")
    cut = here / "cut"
    cut.mkdir()
    for file in small_model.iterdir():
        size = 1000 if file.suffix == ".safetensors" else None
        (cut / file.name).write_bytes(file.read_bytes()[:size])
    assert "cannot load the weights" in refused_last(capsys, "--model", cut, *TWO_PROBLEMS)
    assert not list((here / "evals").iterdir())
    assert run_here(evaluation, "--model", small_model, *TWO_PROBLEMS) == 0
    # What is there stays
    (here / "evals" / "run" / "results.json").unlink()
    before = (here / "evals" / "run" / "responses-0.jsonl").read_text()

    def fail(*_):
        raise OSError("no results for you")

    monkeypatch.setattr(evaluation, "summarise", fail)
    assert "no results" in refused_last(capsys, "--model", small_model, *TWO_PROBLEMS)
    assert (here / "evals" / "run" / "responses-0.jsonl").read_text() == before


def test_broken_lines(tmp_path):
    """Half a line that ends in a brace is dropped, wherever it stands; the next goes to a line of
    its own."""
    file = tmp_path / "responses-0.jsonl"
    rows = [{"model": "m", "id": f"b/{i}", "sample": 0, "response": r"\boxed{é}"} for i in range(3)]
    lines = [json.dumps(row) for row in rows]
    half = lines[1][: lines[1].index("}") + 1]
    assert half.endswith("}")
    file.write_bytes("\n".join([lines[0], half, lines[2], half]).encode() + b"\xc3")
    assert evaluation.written(tmp_path, "m") == {("b/0", 0): rows[0], ("b/2", 0): rows[2]}
    with evaluation.append_to(file) as f:
        evaluation.write_rows(f, [rows[1]])
    assert evaluation.written(tmp_path, "m")["b/1", 0] == rows[1]
    assert len(evaluation.written(tmp_path, "m")) == 3
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "mean": {"a": 1}}\n{"step": 2, "b": {}')
    assert plots.read(tmp_path, "metrics.jsonl") == [{"step": 1, "mean": {"a": 1}}]


# --------------------------------------------------------------------------------------------------
# Benchmarks


@pytest.mark.parametrize(
    "answer,choices,letter",
    [
        (0, ["0", "4", "2", "6"], "A"),  # MMLU: a number is a place, whatever the texts
        (1, ["0", "4", "2", "6"], "B"),
        ("C", ["0", "4", "2", "6"], "C"),
        ("(d)", ["0", "4", "2", "6"], "D"),
        ("Paris", ["Rome", "Paris"], "B"),
        (["Paris"], ["Rome", "Paris"], "B"),
        ("1", ["Rome", "Paris"], "B"),
        (1.0, ["Rome", "Paris"], "B"),
        (15, [12, 15, 20], "B"),
        ("2", {"text": ["x", "y"], "label": ["1", "2"]}, "B"),
    ],
)
def test_forms_of_choices(answer, choices, letter):
    row = {"question": "Which?", "choices": choices, "answer": answer}
    problem = evaluation._problem(row, "file, row 1")
    assert problem.answer == letter
    right = problem.choices["ABCD".index(letter)]
    assert evaluation.judge(rf"\boxed{{{letter}}}", problem)
    assert evaluation.judge(rf"\boxed{{{right}}}", problem)
    other = "B" if letter == "A" else "A"
    assert not evaluation.judge(rf"\boxed{{{other}}}", problem)


GPQA = {"Question": "Which?", "Correct Answer": "x", "Incorrect Answer 1": "a"}


@pytest.mark.parametrize(
    "row,message",
    [
        ({"question": "Which?", "choices": ["x", "y"], "answer": 2}, "answer 2 is none of the 2"),
        ({"question": "Which?", "choices": ["x", "y"], "answer": "z"}, "answer 'z' is none"),
        ({"question": "Which?", "choices": ["x", "x"], "answer": "x"}, "read as several"),
        ({"question": "Which?", "choices": ["1", "2"], "answer": "1"}, "read as several"),
        ({"question": "Which?", "choices": ["x"], "answer": "A"}, "1 choices"),
        ({"question": "Which?", "choices": "A) x B) y", "answer": "A"}, "a list of texts"),
        ({"question": "Which?", "choices": [{"text": "x"}, {}], "answer": "A"}, "a list of texts"),
        ({"question": "Which?", "choices": {"text": ["x", "y"]}, "answer": "A"}, "a list of texts"),
        (GPQA, "a list of texts"),
        ({"question": "Prove it.", "answer": "proof"}, "needs problem (or question) and answer"),
        ({"question": "What?", "answer": float("nan")}, "needs problem (or question) and answer"),
        ({"question": "What?", "answer": [None]}, "needs problem (or question) and answer"),
        ({"question": ["What?"], "answer": "1"}, "found question, answer"),
    ],
)
def test_rows_that_cannot_be_judged(tmp_path, row, message):
    """One line with file and row, before anything is generated."""
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"question": "?", "answer": "1"}) + "\n" + json.dumps(row))
    with pytest.raises(DataError) as error:
        evaluation.load_benchmark("mine", str(file), 0)
    assert str(error.value).startswith(f"{file}, row 2: ")
    assert message in str(error.value)


def test_limit_is_even(tmp_path):
    """--limit takes problems over the whole file, and of a study test rows of all levels."""
    assert evaluation.evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evaluation.evenly(range(3), 5) == evaluation.evenly(range(3), 0) == [0, 1, 2]
    rows = [{"question": f"{i}?", "answer": i} for i in range(100)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    problems = evaluation.load_benchmark("b", str(tmp_path / "b.jsonl"), 4)
    assert [problem.answer for problem in problems] == ["0", "25", "50", "75"]


def test_prompt_over_the_positions(tmp_path, capsys):
    """A prompt that fills the model counts as wrong, and that is said; the others are cut to the
    room there is."""
    model = small_gpt2(tmp_path / "model", 32)
    rows = [{"problem": "1 + 1", "answer": "2"}, {"problem": "1 + " * 40 + "1", "answer": "41"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    ask = ["--model", model, "--benchmark", "b", "--data", tmp_path / "b.jsonl", "--suffix", ""]
    assert run_here(evaluation, *ask, "--output-dir", tmp_path / "out") == 0
    output = capsys.readouterr().out
    assert "1 responses count as wrong, as the prompt alone fills the model's positions" in output
    written = evaluation.written(tmp_path / "out", str(model))
    assert 1 <= written["b/0", 0]["tokens"] < 32
    assert written["b/1", 0]["tokens"] == 0
    assert written["b/1", 0]["right"] is False
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    assert report["benchmarks"][str(model)]["b"]["too_long"] == 1


def test_games_over_the_positions(tmp_path, capsys):
    model = small_gpt2(tmp_path / "model", 48)
    ask = ["--model", model, "--benchmark", "general_points", "--compact", "--limit", "1"]
    error = refused_last(capsys, *ask, "--output-dir", tmp_path / "out")
    assert "needs more than the 48 positions" in error
    assert not (tmp_path / "out").exists()


def test_overlap_with_odd_files(tmp_path, capsys):
    """--check-overlap finds a problem in plain rows and in conversations, and says where a file has
    no problems."""
    problems = [evaluation.Problem("b/0", "What is  1 + 1?", "2")]
    file = tmp_path / "t.jsonl"
    chat = [{"role": "user", "content": "what is 1 + 1?"}, {"role": "assistant", "content": "2"}]
    world = World(torch.device("cpu"))
    for row in (
        {"problem": "What is 1 + 1?"},
        {"prompt": "What is 1 + 1?", "response": "2"},
        {"messages": chat},
    ):
        file.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps(row))
        evaluation.warn_of_overlap(str(file), problems, world)
        assert "contains 1 of the 1 problems (b/0 ...)" in capsys.readouterr().out, row
    for row in (5, {"text": "x"}, {"prompt": [1, 2]}, {"prompt": {}}):
        file.write_text(json.dumps(row))
        with pytest.raises(DataError):
            evaluation.warn_of_overlap(str(file), problems, world)


# --------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    "flags,message",
    [
        ("--model", "--model: name at least one"),
        ("--benchmark", "--benchmark: name at least one"),
        ("--adapter x", "--adapter is for the few-shot study"),
        ("--few-shot 2 --adapter /no/such", "cannot load the adapter /no/such"),
        ("--few-shot 2 --tasks Topology", "no such task; there are"),
        ("--few-shot 999", "--few-shot 999 needs 999 and 1"),
        ("--few-shot 2 --adapt-lr nan", "--adapt-lr must be in (0, 100]"),
        ("--limit -1", "--limit must be 0 or more"),
        ("--temperature 1e-30", "--temperature is 0 (greedy) or at least 0.01"),
        ("--check-overlap /no/such.jsonl", "cannot read"),
    ],
)
def test_flags(here, capsys, flags, message):
    assert message in refused(capsys, *flags.split())
    assert not list(here.glob("evals/*"))


def test_every_number_is_checked():
    fields = dataclasses.fields(evaluation.Args)
    numeric = {f.name for f in fields if f.type in (int, float, tuple[int, ...])}
    assert len(numeric) == 12
    checked = [name for names in evaluation.NUMBERS.values() for name in names]
    assert sorted(checked) == sorted(numeric)


def test_adapter_needs_peft(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *args: None if name == "peft" else find(name)
    )
    assert "pip install peft" in refused(capsys, "--few-shot", "2", "--adapter", "x")


# --------------------------------------------------------------------------------------------------
# The few-shot study


def test_study_rows(monkeypatch):
    """Rows that fit into every model, test rows evenly; a model with fewer positions decides."""
    _, tokenizer = load_config("tiny")

    def examples(part: str, count: int, length: int) -> list[Example]:
        return [
            Example("1 + " * length + "1", "x", "", "S", i, f"{part}/{i}") for i in range(count)
        ]

    short, long = examples("short", 6, 1), examples("long", 3, 60)
    task = Task("t", support=short[:3] + long, query=[], test=short[3:] * 4)
    monkeypatch.setattr(evaluation, "load_tasks", lambda *_, **__: [task])
    readers = {}
    for name, places in (("a", 2048), ("b", 70)):
        text = SimpleNamespace(max_position_embeddings=places)
        config = SimpleNamespace(get_text_config=lambda text=text: text)
        readers[name] = (config, tokenizer)
    args = evaluation.Args(few_shot=(2,), limit=4)
    world = World(torch.device("cpu"))
    study = evaluation.load_study(args, readers, world)
    assert study.tasks[0].support == short[:3]
    assert [e.id for e in study.tasks[0].test] == ["short/3"] * 4
    assert max(len(row.ids) for row in study.tokens["b"].values()) <= 64
    assert study.tokens["a"].keys() > study.tokens["b"].keys()
    with pytest.raises(DataError, match="3 support and 12 test rows of at most 64 tokens"):
        evaluation.load_study(dataclasses.replace(args, few_shot=(4,)), readers, world)
    study = evaluation.load_study(args, {"a": readers["a"]}, world)
    assert study.tasks[0].support == short[:3] + long
    new = dataclasses.replace(task, name="new", heldout=True)
    monkeypatch.setattr(evaluation, "load_tasks", lambda *_, **__: [task, new])
    study = evaluation.load_study(args, readers, world)
    assert [t.name for t in study.tasks] == ["new"]  # where some are held out, these


def test_study_judges_words(tmp_path, monkeypatch):
    """A few positions are no IndexError; where no answer is known the response's words count."""
    model = small_gpt2(tmp_path / "model", 96)
    rows = [Example(f"Say {i}", "a b", "", "S", 1, f"{i}") for i in range(5)]
    task = Task("t", support=rows[:3], query=[], test=rows[3:])
    monkeypatch.setattr(evaluation, "load_tasks", lambda *_, **__: [task])
    monkeypatch.setattr(evaluation, "greedy_answers", lambda *_: ["a  b", "a c"])
    args = evaluation.Args(
        model=(str(model),), few_shot=(0, 2), seeds=1, adapt_steps=2, output_dir=str(tmp_path / "o")
    )
    assert evaluation.main(args) == 0
    report = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [row["right"] for row in report["few_shot"]] == [[True, False]] * 2


def test_every_step_of_the_study_has_a_whole_batch(monkeypatch):
    """Five examples in batches of three: a batch may begin one pass and end another."""
    model, batches = torch.nn.Linear(1, 1), []

    def loss(model, rows, pad_id):
        batches.append(rows)
        return sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(evaluation, "response_loss", loss)
    rows = [Encoded([i, i], 1) for i in range(5)]
    args = evaluation.Args(adapt_steps=10, adapt_batch=3)
    assert list(evaluation.adapt(args, model, rows, 0, seed=0)) == list(range(11))
    assert [len(batch) for batch in batches] == [3] * 10
    taken = list(itertools.chain(*batches))
    assert [taken.count(row) for row in rows] == [6] * 5


def test_study_with_few_positions(tmp_path, small_model):
    """Adaptation and greedy answers stay within a table of 96 positions; models with other numbers
    of positions are compared on the same rows."""
    model = small_gpt2(tmp_path / "model", 96)
    args = evaluation.Args(
        model=(str(model), str(small_model)),
        few_shot=(2,),
        seeds=1,
        limit=2,
        adapt_steps=1,
        tasks=("Geometry/missing_side",),
        output_dir=str(tmp_path / "o"),
    )
    assert evaluation.main(args) == 0
    report = json.loads((tmp_path / "o" / "results.json").read_text())
    assert [len(row["right"]) for row in report["few_shot"]] == [2, 2]
    assert report["pairs"][0]["task"] == "all"


# --------------------------------------------------------------------------------------------------
# Interruptions, full disks


def test_interrupt(tmp_path, small_model):
    """Ctrl-C while the imports run and while responses come: no traceback, status 130, what was
    written stays."""
    ask = ["--model", small_model, "--limit", "200", "--batch-size", "1", "--max-length", "60"]
    arguments = command("eval.py", *ask, "--temperature", "1", "--output-dir", tmp_path / "o")

    def interrupted(ready) -> tuple[int, str]:
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        deadline = time.time() + 60
        while not ready() and time.time() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
        assert "Traceback" not in error
        return process.returncode, error

    soon = time.time() + 0.7
    assert interrupted(lambda: time.time() > soon)[0] in (-signal.SIGINT, 130)
    assert not (tmp_path / "o").exists()
    responses = tmp_path / "o" / "responses-0.jsonl"
    status, error = interrupted(lambda: responses.exists() and responses.stat().st_size > 0)
    assert status == 130
    assert "interrupted; responses so far are kept" in error.splitlines()[-1]
    assert 0 < len(evaluation.written(tmp_path / "o", str(small_model))) < 200


def test_ascii_locale(tmp_path, small_model):
    """Tables with a plus-minus sign, where neither files nor the terminal are UTF-8 by default."""
    ask = ["--model", small_model, "--few-shot", "0", "--tasks", "Geometry/missing_side"]
    done = subprocess.run(
        command("eval.py", *ask, *TWO_PROBLEMS, "--output-dir", tmp_path),
        cwd=ROOT,
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "±" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_full_disk(tmp_path, small_model, capsys, monkeypatch):
    """One line that says what to do; responses stay, and the same command ends the work."""
    ask = ["--model", small_model, "--batch-size", "1", *TWO_PROBLEMS, "--output-dir", tmp_path]
    write, calls = evaluation.write_rows, []

    def write_once(f, rows) -> None:
        calls.append(rows)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(f, rows)

    monkeypatch.setattr(evaluation, "write_rows", write_once)
    error = refused_last(capsys, *ask)
    assert "No space left on device; responses so far are kept: make room" in error
    assert len(evaluation.written(tmp_path, str(small_model))) == 1
    monkeypatch.setattr(evaluation, "write_rows", write)
    assert run_here(evaluation, *ask) == 0
    assert len((tmp_path / "responses-0.jsonl").read_text().splitlines()) == 2


# --------------------------------------------------------------------------------------------------
# Benchmarks, piece by piece

CPU = World(torch.device("cpu"))


def problem(i: int, prompt: str = "", answer: str = "1", **more) -> evaluation.Problem:
    return evaluation.Problem(f"b/{i}", prompt or f"What is {i}?", answer, **more)


def test_defaults_are_those_of_the_page():
    """docs/evaluation.md, "Flags that matter"."""
    args = evaluation.Args()
    assert (args.temperature, args.top_p, args.samples) == (0.6, 1.0, 1)
    assert (args.max_length, args.limit, args.output_dir) == (8192, 0, "evals/run")
    assert (args.few_shot, args.seeds, args.suffix) == ((), 3, None)
    assert (args.adapt_optimizer, args.adapt_lr) == ("adam", 1e-4)
    assert (args.adapt_steps, args.adapt_batch) == (20, 4)
    assert (args.in_context, args.compact, args.vision, args.trust_remote_code) == (False,) * 4
    assert (args.model, args.benchmark) == (("tiny",), ("embedded",))
    assert (args.seed, args.batch_size) == (42, 64)


def test_embedded_problems():
    """Forty at most of each family's test part, with family and level."""
    families = embedded_examples(40, 42, "test")
    sizes = {name: len(examples) for name, examples in families.items()}
    assert max(sizes.values()) == 40
    problems = evaluation.load_benchmark("embedded", None, 0)
    assert len(problems) == sum(sizes.values())
    assert [p.id for p in problems] == [f"embedded/{i}" for i in range(len(problems))]
    subjects = [p.subject for p in problems]
    assert Counter(subjects) == sizes
    first = next(iter(families.values()))[0]
    start = evaluation.Problem("embedded/0", first.prompt, first.answer, (), problems[0].subject)
    assert problems[0] == start._replace(level=str(first.level))
    some = evaluation.load_benchmark("embedded", None, 3)
    assert [p.id for p in some] == ["embedded/0", "embedded/1", "embedded/2"]
    places = (0, len(problems) // 3, 2 * len(problems) // 3)
    assert [p.prompt for p in some] == [problems[i].prompt for i in places]


def test_benchmarks_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(source, config, split):
        asked.append((source, config, split))
        if source == "math-ai/amc23":
            raise OSError("no network\nmore")
        return [{"question": "1 + 1?", "answer": "#### 2"}] * 2 + [{"text": "?"}] * (
            split == "train"
        )

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    problems = evaluation.load_benchmark("gsm8k", None, 0)
    assert [(p.id, p.answer) for p in problems] == [("gsm8k/0", "2"), ("gsm8k/1", "2")]
    with pytest.raises(DataError, match="^HuggingFaceH4/aime_2024, row 3: needs problem") as error:
        evaluation.load_benchmark("aime24", None, 0)
    assert str(error.value).endswith("(or question) and answer; found text")
    with pytest.raises(DataError) as error:
        evaluation.load_benchmark("amc23", None, 0)
    assert str(error.value) == (
        "cannot load math-ai/amc23 from the hub: no network (local files: --data PATH)"
    )
    assert asked == [
        ("openai/gsm8k", "main", "test"),
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("math-ai/amc23", None, "test"),
    ]
    monkeypatch.setattr(evaluation, "_hub_rows", lambda name: [])
    with pytest.raises(DataError, match="^benchmark minerva: no problems$"):
        evaluation.load_benchmark("minerva", None, 0)


def test_sets_of_the_hub():
    """The parts with the problems that are reported: of two sets on the hub there is a training
    part alone; GPQA's diamond set, ARC's hard questions."""
    assert {name for name, (_, _, part) in evaluation.HUB.items() if part != "test"} == {
        "aime24",
        "gpqa_d",
    }
    assert evaluation.HUB["aime24"][2] == evaluation.HUB["gpqa_d"][2] == "train"
    configurations = {name: config for name, (_, config, _) in evaluation.HUB.items() if config}
    assert configurations == {
        "gsm8k": "main",
        "arc_c": "ARC-Challenge",
        "gpqa_d": "gpqa_diamond",
    }
    owners = {name: source for name, (source, *_) in evaluation.HUB.items()}
    assert owners == {
        "math500": "HuggingFaceH4/MATH-500",
        "aime24": "HuggingFaceH4/aime_2024",
        "amc23": "math-ai/amc23",
        "minerva": "math-ai/minervamath",
        "olympiadbench": "math-ai/olympiadbench",
        "gsm8k": "openai/gsm8k",
        "arc_c": "allenai/ai2_arc",
        "gpqa_d": "Idavidrein/gpqa",
        "mmlu_pro": "TIGER-Lab/MMLU-Pro",
    }


@pytest.mark.parametrize(
    "row,expected",
    [
        ({"Problem": "P", "question": "Q", "answer": 7}, ("P", "7")),
        ({"problem": "", "question": "Q", "prompt": "R", "answer": 0}, ("Q", "0")),
        ({"prompt": "R", "answer": False}, ("R", "False")),
        ({"problem": "P", "answer": ["3"]}, ("P", "3")),
        ({"problem": "P", "answer": ["3", "x"]}, ("P", "3, x")),
        ({"problem": "P", "answer": "", "final_answer": [2, 5], "solution": "s"}, ("P", "2, 5")),
        (
            {"problem": "P", "answer": "proof", "solution": r"So \boxed{4}."},
            ("P", r"So \boxed{4}."),
        ),
        ({"problem": "P", "answer": "1\n#### 1,234"}, ("P", "1234")),
        ({"problem": "P", "answer": "1", "type": "T", "level": 3}, ("P", "1", "T", "3")),
        ({"problem": "P", "answer": "1", "type": "T", "category": "C"}, ("P", "1", "C", "")),
        ({"problem": "P", "answer": "1", "category": "C", "subject": "S"}, ("P", "1", "S", "")),
    ],
)
def test_columns_of_rows(row, expected):
    found = evaluation._problem(row, "file, row 1")
    prompt, answer, subject, level = (*expected, "", "")[:4]
    if answer == "1234":
        assert evaluation.judge(r"\boxed{1234}", found)
        answer = found.answer
        assert "#" not in answer
    assert found == evaluation.Problem("", prompt, answer, (), subject, level)


def test_answers_before_solutions():
    """Rows of the hub hold both: what is shorter is the reference."""
    row = {"problem": "P", "solution": "s", "correct answer": "c", "final_answer": "f"}
    row |= {"answerKey": "k", "answer": "a"}
    for name in ("answer", "answerKey", "final_answer", "correct answer", "solution"):
        assert evaluation._problem(row, "f").answer == row.pop(name)[0]
    with pytest.raises(DataError, match="needs problem"):
        evaluation._problem({"question": " \n", "answer": "1"}, "f")
    labelled = {"question": "Q", "choices": ["x", "y"], "options": ["z", "x"], "answer": "x"}
    assert evaluation._problem(labelled, "f").choices == ("x", "y")


def test_what_is_an_answer():
    for value in (0, 2.5, False, "x", "no", ["1"], [1, "x"]):
        assert evaluation._is_answer(value), value
    wrong = (
        None,
        math.nan,
        math.inf,
        "",
        "  ",
        " NaN ",
        "none",
        "Proof",
        "notfound",
        [],
        ["1", ""],
    )
    for value in (*wrong, [None], {}, {"a": 1}, b"1"):
        assert not evaluation._is_answer(value), value


def choices_row(answer, choices) -> dict:
    return {"question": "Which?", "options": choices, "answer": answer}


def test_numbers_of_choices():
    """Two to 26, each with a label."""
    many = [f"text {i}" for i in range(26)]
    assert evaluation._problem(choices_row("text 25", many), "f").answer == "Z"
    assert evaluation._problem(choices_row("Z", many), "f").answer == "Z"
    assert evaluation._problem(choices_row(25, many), "f").answer == "Z"
    for choices, message in (
        ([*many, "x"], "f: 27 choices for 26 labels"),
        (["x"], "f: 1 choices for 26 labels"),
        ({"text": ["x", "y", "z"], "label": ["A", "B"]}, "f: 3 choices for 2 labels"),
        ({"text": "xyz", "label": ["A", "B", "C"]}, "f: choices must be a list of texts"),
        ({"text": ["x", "y"], "label": 2}, "f: choices must be a list of texts"),
    ):
        with pytest.raises(DataError) as error:
            evaluation._problem(choices_row("x", choices), "f")
        assert str(error.value) == message
    labelled = {"text": [" x ", 2.5], "label": [7, 8, 9]}
    found = evaluation._problem(choices_row("8", labelled), "f")
    assert (found.answer, found.choices) == ("B", ("x", "2.5"))
    with pytest.raises(DataError, match="answer '9' is none of the 2 choices"):
        evaluation._problem(choices_row("9", labelled), "f")


@pytest.mark.parametrize(
    "answer,choices,places",
    [
        (True, ["True", "False"], {0}),  # no number
        (1.5, ["1", "1.5"], {1}),
        (2.0, ["x", "2"], {1}),
        (1, ["2", "x"], {1}),
        (2, ["2", "x"], {0}),
        (-1, ["x", "y"], set()),
        ("-1", ["x", "y"], set()),
        ("0", ["x", "y"], {0}),
        ("1", ["1", "y"], {0, 1}),
        ("x", ["x", "y", "x"], {0, 2}),
        (" (b). ", ["x", "y"], {1}),
        ("b", ["b", "c"], {1}),
    ],
)
def test_places_of_answers(answer, choices, places):
    labels = list("ABC")[: len(choices)]
    assert evaluation._places(answer, labels, choices, True) == places


def test_numbers_as_choices():
    """Where the choices are numbers, a number is a text first."""
    assert evaluation._problem(choices_row(15, [12, 15, 20]), "f").answer == "B"
    for answer, choices in ((1, [1, 2]), (1, [1, "none of them"])):
        with pytest.raises(DataError, match="can be read as several of the 2 choices"):
            evaluation._problem(choices_row(answer, choices), "f")
    assert evaluation._problem(choices_row(1, ["1", 2]), "f").answer == "B"


def test_plain_problems_are_graded_by_their_answer():
    assert evaluation.judge(r"\boxed{1}", problem(0))
    assert not evaluation.judge(r"\boxed{2}", problem(0))
    assert not evaluation.judge("", problem(0, answer="A", choices=("x", "y")))


def response(name: str, right: bool, tokens: int = 4, **more) -> dict:
    row = {"id": name, "right": right, "tokens": tokens, "finished": True, "answer": "1"}
    return row | {"subject": "", "level": ""} | more


def test_whole_summary():
    """Three problems of two samples; one response is cut, two hold no answer, one was not drawn."""
    rows = [
        response("a", True, 5, subject="T", level="2"),
        response("a", True, 6, subject="T", level="2", answer=None),  # right without a number
        response("b", False, 8, subject="S", level="1", finished=False),
        response("c", False, 0, subject="T", level="1", answer=None, finished=False),
        response("b", True, 1, subject="S", level="1"),
        response("c", False, 4, subject="T", level="1"),
    ]
    low, high = bootstrap([1.0, 0.5, 0.0])
    assert evaluation.summarise(rows, 2) == {
        "problems": 3,
        "samples": 2,
        "accuracy": 0.5,
        "interval": [low, high],
        "mean_tokens": 4.0,
        "truncated": 2 / 6,
        "unparsable": 1 / 6,
        "too_long": 1,
        "pass@2": pytest.approx(2 / 3),
        "subject": {"S": [0.5, 1], "T": [0.5, 2]},
        "level": {"1": [0.25, 2], "2": [1.0, 1]},
    }
    found = evaluation.summarise([row | {"subject": "S"} for row in rows], 2)
    assert list(evaluation.summarise(rows, 2)["level"]) == ["1", "2"]
    assert "subject" not in found
    single = evaluation.summarise([response(name, name < "i") for name in "abcdefghij"], 1)
    assert single["interval"] == pytest.approx([0.4901625, 0.9433178], abs=1e-6)  # Wilson's
    assert single.keys().isdisjoint({"too_long", "subject", "level", "pass@2"})


@pytest.mark.parametrize("samples,ks", [(1, []), (2, [2]), (4, [2, 4]), (63, [2, 4, 8, 16, 32])])
def test_pass_at_k(samples, ks):
    """One right of n: k / n, the mean with a problem that is never solved half of it."""
    rows = []
    for i in range(samples):
        rows += [response("a", i == 0), response("b", False)]
    found = evaluation.summarise(rows, samples)
    passed = {name: value for name, value in found.items() if name.startswith("pass")}
    assert passed == {f"pass@{k}": pytest.approx(k / samples / 2) for k in ks}
    found = evaluation.summarise([response("a", i == 0) for i in range(64)], 64)
    assert found["pass@64"] == 1


# --------------------------------------------------------------------------------------------------
# Responses


def test_rows_that_a_folder_holds(tmp_path):
    """Of one model; of two files the later; each sample for itself."""
    rows = []
    for model, name, k, text in (
        ("m", "b/0", 0, "first"), ("n", "b/0", 0, "other"), ("m", "b/0", 1, "second"),
        ("m", "b/0", 0, "again"),
    ):  # fmt: skip
        rows.append({"model": model, "id": name, "sample": k, "response": text})
    for i, some in enumerate((rows[:3], rows[3:])):
        with evaluation.append_to(tmp_path / f"responses-{i}.jsonl") as f:
            evaluation.write_rows(f, some)
    assert evaluation.written(tmp_path, "m") == {("b/0", 0): rows[3], ("b/0", 1): rows[2]}
    text = (tmp_path / "responses-0.jsonl").read_text()
    assert text == "".join(json.dumps(row) + "\n" for row in rows[:3])
    with evaluation.append_to(tmp_path / "responses-1.jsonl") as f:
        evaluation.write_rows(f, rows[:1])
    text = (tmp_path / "responses-1.jsonl").read_text()
    assert text == json.dumps(rows[3]) + "\n" + json.dumps(rows[0]) + "\n"
    evaluation.write_text(tmp_path / "results.md", "é")
    assert (tmp_path / "results.md").read_bytes() == "é".encode()
    assert not list(tmp_path.glob("*.tmp"))


def test_responses_are_in_the_file_at_once(tmp_path):
    """Before it is closed: a kill loses nothing."""
    with evaluation.append_to(tmp_path / "responses-0.jsonl") as f:
        evaluation.write_rows(f, [{"model": "m", "id": "b/0", "sample": 0}])
        assert len(evaluation.written(tmp_path, "m")) == 1


def test_the_last_file_counts(tmp_path):
    for i in random.Random(0).sample(range(10), 10):
        with evaluation.append_to(tmp_path / f"responses-{i}.jsonl") as f:
            evaluation.write_rows(f, [{"model": "m", "id": "b/0", "sample": 0, "file": i}])
    (row,) = evaluation.written(tmp_path, "m").values()
    assert row["file"] == 9


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    file.write_text("old")
    write = Path.write_text

    def half(self, text, **options):
        write(self, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(Path, "write_text", half)
        evaluation.write_text(file, "something new")
    assert file.read_text() == "old"


def test_models_of_the_hub_may_run_their_code_where_it_is_allowed(monkeypatch):
    """--trust-remote-code reaches every loader; --vision those of a game alone."""
    asked = []

    def weights(name, dtype=torch.float32, trust_remote_code=False):
        asked.append(("weights", trust_remote_code))
        return torch.nn.Linear(1, 1)

    def readers(name, vision, trust_remote_code):
        asked.append(("readers", vision, trust_remote_code))
        return None, None, None

    def config(name, trust_remote_code):
        asked.append(("config", trust_remote_code))
        return None, Letters()

    def play(*_, **__):
        return [[]]

    monkeypatch.setattr(evaluation, "load_weights", weights)
    monkeypatch.setattr(evaluation, "load_readers", readers)
    monkeypatch.setattr(evaluation, "load_config", config)
    monkeypatch.setattr(evaluation, "template", lambda _: CHAT)
    monkeypatch.setattr(evaluation, "positions", lambda _: 99)
    monkeypatch.setattr(evaluation, "play", play)
    monkeypatch.setattr(evaluation, "sample", lambda *_, **__: [Sample([1], [], True)])
    monkeypatch.setattr(torch.nn.Linear, "config", None, raising=False)
    test = evaluation.GameTest("g/a", "g (a)", None)
    for trust, vision in ((True, False), (False, True)):
        asked.clear()
        args = evaluation.Args(trust_remote_code=trust, vision=vision, few_shot=(0,))
        evaluation.study_model(args, "m")
        evaluation.few_shot(args, evaluation.Study([], {"m": {}}), "m", CPU)
        list(evaluation.respond(args, "m", [(problem(0), 0)], CPU.device))
        list(evaluation.play_episodes(args, "m", [(test, [0])], CPU))
        assert sorted(asked) == [
            *[("config", trust)] * 2,
            ("readers", vision, trust),
            *[("weights", trust)] * 4,
        ]


def test_how_a_model_generates(monkeypatch):
    asked = []

    class Model:
        def to(self, device):
            asked.append(device)
            return self

        def eval(self):
            asked.append("eval")
            return self

    def load(name, dtype, trust):
        asked.append((name, dtype, trust))
        return Model()

    monkeypatch.setattr(evaluation, "load_weights", load)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        asked.clear()
        evaluation.generator_of(evaluation.Args(), "m", torch.device(device))
        assert asked == [("m", dtype, False), torch.device(device), "eval"]


def config_with(places: int | None):
    text = SimpleNamespace(max_position_embeddings=places)
    return SimpleNamespace(get_text_config=lambda: text)


def test_positions():
    assert evaluation.positions(config_with(77)) == 77
    assert evaluation.positions(config_with(None)) > 10**7
    assert evaluation.positions(SimpleNamespace(get_text_config=object)) > 10**7


class Bar:
    """Stands in for tqdm as a context."""

    def __init__(self, **settings):
        self.said = [settings]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def update(self, count):
        self.said.append(count)

    def set_postfix(self, **numbers):
        self.said.append(numbers)


def judged(args, model, todo) -> list[dict]:
    """Rows of responses; the first problem's are right."""
    rows = []
    for p, k in todo:
        row = response(p.id, p.id == "b/0", len(p.prompt))
        rows.append(row | {"model": model, "sample": k})
    return rows


@pytest.mark.parametrize("rank", [0, 1])
def test_responses_are_shared_by_ranks(rank, tmp_path, monkeypatch):
    """What is not there yet, short prompts first, every second one; rank 0 sums up."""
    problems = {
        "b": [problem(0, "xxxx"), problem(1, "x"), problem(2, "xxx")],
        "c": [evaluation.Problem("c/0", "xx", "1")],
    }
    args = evaluation.Args(samples=2, output_dir=str(tmp_path))
    world, order, bars = World(torch.device("cpu"), rank, 2), [], []
    done = judged(args, "m", [(problems["b"][1], 0), (problems["b"][0], 1)])
    with evaluation.append_to(tmp_path / "responses-0.jsonl") as f:
        evaluation.write_rows(f, [*done, *judged(args, "n", [(problems["b"][2], 0)])])
    todo = [("b/1", 1), ("c/0", 0), ("c/0", 1), ("b/2", 0), ("b/2", 1), ("b/0", 0)]
    by_name = {p.id: p for p in [*problems["b"], *problems["c"]]}

    def respond(args, model, mine, device):
        assert model == "m"
        order.extend((p.id, k) for p, k in mine)
        yield judged(args, model, mine[:2])
        yield judged(args, model, mine[2:])
        theirs = [(by_name[name], k) for name, k in todo[1 - rank :: 2]]
        with evaluation.append_to(tmp_path / f"responses-{1 - rank}.jsonl") as f:
            evaluation.write_rows(f, judged(args, model, theirs))

    def bar(**settings):
        bars.append(Bar(**settings))
        return bars[-1]

    monkeypatch.setattr(evaluation, "respond", respond)
    monkeypatch.setattr(evaluation, "tqdm", bar)
    waits = []
    monkeypatch.setattr(evaluation, "wait", waits.append)
    found = evaluation.run_benchmarks(args, problems, "m", world)
    assert order == todo[rank::2]
    assert waits == [world, world]
    settings = {"total": 8, "initial": 2, "disable": rank != 0, "desc": "b/c", "unit": "response"}
    # One of the two there was right; of rank 1's three the last is
    first, second = {"accuracy": "25.0%"}, {"accuracy": "40.0%" if rank else "20.0%"}
    assert bars[0].said == [settings, 4, first, 2, second]
    if rank:
        assert found == {}
        return
    assert {name: (r["problems"], r["accuracy"]) for name, r in found.items()} == {
        "b": (3, pytest.approx(1 / 3)),
        "c": (1, 0.0),
    }
    assert found["b"]["mean_tokens"] == pytest.approx(8 / 3)
    assert found["c"]["samples"] == 2


@pytest.fixture
def draws(monkeypatch):
    """The calls of the sampler; each response is the number of its place, cut for even ones."""
    calls = []

    def sample(model, tokenizer, prompts, **options):
        calls.append((prompts, options))
        drawn = []
        for i in range(len(prompts)):
            finished = i % 2 == 1
            drawn.append(Sample([5] * (i + 2), [], finished))
        return drawn

    monkeypatch.setattr(evaluation, "sample", sample)
    return calls


class Letters:
    """A tokenizer of one token a character; what it decodes is a boxed number of tokens."""

    pad_token_id = 3

    def __call__(self, texts, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [list(map(ord, text)) for text in texts]}

    def decode(self, ids):
        return rf"\boxed{{{len(ids)}}}" if ids else ""

    def batch_decode(self, rows):
        return [self.decode(ids) for ids in rows]


CHAT = SimpleNamespace(before="<", after=">", stop=frozenset([9]))


def test_rows_of_responses(draws, monkeypatch):
    """Batch by batch; streams that depend on seed, problem and sample alone; what fits into the
    model's positions."""
    model = SimpleNamespace(config=config_with(12))
    asked = []

    def generator_of(args, name, device):
        asked.append((name, device))
        return model

    monkeypatch.setattr(evaluation, "generator_of", generator_of)
    monkeypatch.setattr(evaluation, "load_config", lambda name, trust: (None, Letters()))
    monkeypatch.setattr(evaluation, "template", lambda _: CHAT)
    args = evaluation.Args(
        batch_size=3, max_length=6, suffix="!", seed=5, temperature=0.25, top_p=0.75
    )
    prompts = ["x" * n for n in (2, 8, 9, 40, 9)]  # 5, 11, 12, 43 and 12 tokens
    todo = []
    for i, prompt in enumerate(prompts):
        todo.append((problem(i, prompt, "2", subject="S", level="3"), i % 2))
    assert list(evaluation.respond(args, "m", [], "cpu")) == []
    assert not asked
    first, second = evaluation.respond(args, "m", todo, torch.device("cpu"))
    assert asked == [("m", torch.device("cpu"))]
    ((fitting, options),) = draws  # nothing of the second batch fits
    assert fitting == [list(map(ord, f"<{prompt}!>")) for prompt in prompts[:2]]
    assert options == {
        "max_new_tokens": 1,
        "temperature": 0.25,
        "top_p": 0.75,
        "stop": {9},
        "batch_size": 3,
        "seeds": [zlib.crc32(b"5/b/0/0"), zlib.crc32(b"5/b/1/1")],
    }
    shared = {"model": "m", "gold": "2", "subject": "S", "level": "3"}
    cut = {"right": False, "answer": None, "tokens": 0, "finished": False, "response": ""}
    whole = {"right": True, "answer": "2", "response": r"\boxed{2}"}
    assert first == [
        shared | {"id": "b/0", "sample": 0, "tokens": 2, "finished": False} | whole,
        shared | {"id": "b/1", "sample": 1, "tokens": 3, "finished": True} | whole,
        shared | {"id": "b/2", "sample": 0} | cut,
    ]
    assert second == [shared | {"id": f"b/{i}", "sample": i % 2} | cut for i in (3, 4)]
    model.config = config_with(1000)
    list(evaluation.respond(args, "m", todo[:1], torch.device("cpu")))
    assert draws[-1][1]["max_new_tokens"] == 6
    other = dataclasses.replace(args, batch_size=1)  # the streams do not depend on the batch
    list(evaluation.respond(other, "m", todo[:2], torch.device("cpu")))
    seeds = [options["seeds"] for _, options in draws[-2:]]
    assert seeds == [[zlib.crc32(b"5/b/0/0")], [zlib.crc32(b"5/b/1/1")]]


# --------------------------------------------------------------------------------------------------
# Games as benchmarks


def test_test_sets_of_games():
    tests = evaluation.game_tests(evaluation.Args(compact=True), "general_points")
    assert [test[:2] for test in tests] == [
        ("general_points/in distribution", "general_points (in distribution)"),
        ("general_points/rule", "general_points (rule)"),
    ]
    assert all(test.game.compact for test in tests)
    tests = evaluation.game_tests(evaluation.Args(vision=True), "virl")
    assert [test.id for test in tests] == ["virl/in distribution", "virl/rule", "virl/visual"]
    assert not any(test.game.compact for test in tests)


def test_flags_of_games(monkeypatch):
    """A route file is that of all test sets."""
    asked = []

    def games_of(name, **settings):
        asked.append((name, settings))
        return "train", "validation", {"rule": name}

    monkeypatch.setattr(evaluation, "games_of", games_of)
    for vision, compact, data in ((True, False, "routes.json"), (False, True, None)):
        args = evaluation.Args(vision=vision, compact=compact, data=data)
        assert evaluation.game_tests(args, "virl") == [("virl/rule", "virl (rule)", "virl")]
        settings = {"vision": vision, "compact": compact, "routes": data, "test_routes": data}
        assert asked.pop() == ("virl", settings)


def episode(test, seed: int, k: int, **numbers) -> dict:
    row = {"model": "m", "id": f"{test.id}/{seed}", "sample": k, "turns": 1, "right_turns": 0}
    row |= {"right": seed == 1, "reward": 1.0, "tokens": 3, "cut_turns": 0, "misread": 0}
    return row | {"finished": True, "answer": "", "subject": "", "level": ""} | numbers


@pytest.mark.parametrize("rank", [0, 1])
def test_episodes_are_shared_by_ranks(rank, tmp_path, monkeypatch):
    """A seed with a sample missing is played again; every second of them."""
    tests = [evaluation.GameTest("g/a", "g (a)", None), evaluation.GameTest("g/b", "g (b)", None)]
    monkeypatch.setattr(evaluation, "game_tests", lambda args, name: tests)
    monkeypatch.setattr(evaluation, "wait", lambda world: None)
    args = evaluation.Args(samples=2, limit=5, output_dir=str(tmp_path))
    with evaluation.append_to(tmp_path / "responses-7.jsonl") as f:
        rows = [episode(tests[0], 1, k) for k in (0, 1)] + [episode(tests[0], 3, 1)]
        evaluation.write_rows(f, rows)
    asked = []

    def play_episodes(args, name, todo, world):
        asked.append([(test.id, seeds) for test, seeds in todo])
        for test in tests:
            yield [episode(test, seed, k) for seed in range(5) for k in (0, 1)]

    monkeypatch.setattr(evaluation, "play_episodes", play_episodes)
    found = evaluation.run_games(args, "g", "m", World(torch.device("cpu"), rank, 2))
    mine = [[0, 3], [0, 2, 4]] if rank == 0 else [[2, 4], [1, 3]]
    assert asked == [[("g/a", mine[0]), ("g/b", mine[1])]]
    assert (tmp_path / f"responses-{rank}.jsonl").exists()
    if rank:
        assert found == {}
        return
    assert list(found) == ["g (a)", "g (b)"]
    assert (found["g (a)"]["problems"], found["g (a)"]["accuracy"]) == (5, 0.2)


def test_a_game_has_234_episodes(tmp_path, monkeypatch):
    """As in the papers, unless --limit says another number."""
    test = evaluation.GameTest("g/a", "g (a)", None)
    monkeypatch.setattr(evaluation, "game_tests", lambda args, name: [test])

    def play_episodes(args, name, todo, world):
        ((_, seeds),) = todo
        yield [episode(test, seed, 0) for seed in seeds]

    monkeypatch.setattr(evaluation, "play_episodes", play_episodes)
    for limit, episodes in ((0, 234), (1, 1), (300, 300)):
        folder = tmp_path / f"{limit}"
        folder.mkdir()
        args = evaluation.Args(limit=limit, output_dir=str(folder))
        found = evaluation.run_games(args, "g", "m", CPU)
        assert found["g (a)"]["problems"] == episodes


def test_played_episodes(monkeypatch, capsys):
    """In batches that hold all samples of a seed; streams by seed of the call and test set."""
    tests = [evaluation.GameTest("g/a", "g (a)", "A"), evaluation.GameTest("g/b", "g (b)", "B")]
    asked = []

    def play(model, tokenizer, game, seeds, samples, *rest, processor, sampler):
        asked.append((game, list(seeds), samples, *rest, processor, sampler.keywords["top_p"]))
        if game == "B":
            raise IndexError
        groups = []
        for seed in seeds:
            turn = Turn([1], [2], [0.0], True, f"{seed}", 1.0)
            groups.append([Trajectory([turn] * (k + 1)) for k in range(samples)])
        return groups

    monkeypatch.setattr(evaluation, "play", play)
    monkeypatch.setattr(evaluation, "load_readers", lambda *_: (None, "tokenizer", "processor"))
    model = SimpleNamespace(config=config_with(100))
    monkeypatch.setattr(evaluation, "generator_of", lambda *_: model)
    args = evaluation.Args(
        samples=2, batch_size=5, seed=3, max_length=64, temperature=0.5, top_p=0.75
    )
    assert list(evaluation.play_episodes(args, "m", [(tests[0], [])], CPU)) == []
    first, second = evaluation.play_episodes(args, "m", [(tests[0], [4, 6, 7])], CPU)
    settings = (2, "3/g (a)", 64, 5, 0.5, "processor", 0.75)
    assert asked == [("A", [4, 6], *settings), ("A", [7], *settings)]
    names = [(row["model"], row["id"], row["sample"], row["turns"]) for row in [*first, *second]]
    assert names == [("m", f"g/a/{seed}", k, k + 1) for seed in (4, 6, 7) for k in (0, 1)]
    assert [row["response"] for row in second] == [["7"], ["7", "7"]]
    assert "g (a):" in capsys.readouterr().err
    list(evaluation.play_episodes(args, "m", [(tests[0], [4])], World(CPU.device, 1, 2)))
    assert capsys.readouterr().err == ""
    asked.clear()
    wide = dataclasses.replace(args, samples=8, max_length=500)
    list(evaluation.play_episodes(wide, "m", [(tests[0], [4, 6])], CPU))
    one_by_one = (8, "3/g (a)", 100, 5, 0.5, "processor", 0.75)
    assert asked == [("A", [seed], *one_by_one) for seed in (4, 6)]
    with pytest.raises(evaluation.ModelError) as error:
        list(evaluation.play_episodes(args, "m", [(tests[0], []), (tests[1], [1])], CPU))
    assert str(error.value) == (
        "g (b): an episode needs more than the 100 positions of m: lower --max-length, or --compact"
    )


def test_row_of_an_episode():
    test = evaluation.GameTest("g/a", "g (a)", SimpleNamespace(misread_reward=-1.5))
    turns = [
        Turn([1], [2, 3], [0.0] * 2, False, "one", -1.5),
        Turn([1], [2, 3, 4], [0.0] * 3, True, "two", 5.0),
    ]
    expected = {
        "right": True,
        "turns": 2,
        "right_turns": 1,
        "reward": 3.5,
        "tokens": 5,
        "cut_turns": 1,
        "misread": 1,
        "answer": "",
        "subject": "g (a)",
        "level": "",
        "finished": False,
        "response": ["one", "two"],
    }
    assert evaluation.episode_row(Trajectory(turns, won=True), test) == expected
    assert evaluation.episode_row(Trajectory(turns[1:], won=True), test)["finished"] is True


def test_rates_of_a_game():
    """Per turn: right ones and pictures that were read; per episode the reward."""
    test = evaluation.GameTest("general_points/rule", "", None)
    rows = [
        episode(test, 0, 0, turns=3, right_turns=1, reward=2.0, misread=2),
        episode(test, 1, 0, turns=5, right_turns=4, reward=-1.0, misread=0),
    ]
    found = evaluation.summarise_episodes(rows, evaluation.Args(vision=True))
    numbers = {"step_accuracy": 5 / 8, "reward": 0.5, "recognition": 6 / 8}
    assert {name: found[name] for name in numbers} == numbers
    assert found["problems"] == 2
    assert "recognition" not in evaluation.summarise_episodes(rows, evaluation.Args())
    rows = [row | {"id": "virl/rule/0"} for row in rows]
    assert "recognition" not in evaluation.summarise_episodes(rows, evaluation.Args(vision=True))


# --------------------------------------------------------------------------------------------------
# The few-shot study, piece by piece


def words(n: int, name: str) -> Example:
    """A row of some more tokens than n."""
    return Example("1 " * (n // 2) + "1" * (n % 2), "x", "", "S", 0, name)


def test_lengths_of_the_study(monkeypatch, capsys):
    """Multiples of 32 within a model's positions, 2,048 at most; of the models the lowest."""
    _, tokenizer = load_config("tiny")
    rows = [words(n, f"r{n}") for n in (*range(5, 101), *range(2020, 2060))]
    encoded, _ = encode(tokenizer, rows, 10**6)
    assert set(range(30, 100)) <= {len(row.ids) for row in encoded.values()}
    assert {2048, 2049} <= {len(row.ids) for row in encoded.values()}
    task = Task("t", support=rows[2:], query=[], test=rows[:2])
    asked = []

    def load(data, task_column, seed):
        asked.append((data, task_column, seed))
        return [task]

    monkeypatch.setattr(evaluation, "load_tasks", load)
    for places, longest in (
        ((63,), 32), ((64,), 64), ((95, 96), 64), ((96, 10**6), 96), ((10**6,), 2048),
        ((None,), 2048),
    ):  # fmt: skip
        readers = {f"m{p}": (config_with(p), tokenizer) for p in places}
        args = evaluation.Args(few_shot=(1, 2), seed=9, task_column="c", data="d")
        study = evaluation.load_study(args, readers, CPU)
        fitting = {name for name, row in encoded.items() if len(row.ids) <= longest}
        kept = study.tasks[0].test + study.tasks[0].support
        assert {e.id for e in kept} == fitting
        assert capsys.readouterr().out == (
            f"few-shot study: 1 tasks, {len(fitting)} sequences; {len(rows) - len(fitting)} over "
            f"{longest} tokens left out\n"
        )
    assert asked[0] == ("d", "c", 9)
    evaluation.load_study(evaluation.Args(few_shot=(1,)), readers, CPU)
    assert asked[-1] == ("embedded", None, 42)


def test_tasks_of_the_study(monkeypatch):
    """Those that are named, then the held-out ones; as many rows as are asked for."""
    _, tokenizer = load_config("tiny")
    readers = {"m": (config_with(2048), tokenizer)}
    tasks = []
    for name, heldout in (("a", False), ("b", True), ("c", False), ("d", True)):
        rows = [words(1, f"{name}{i}") for i in range(9)]
        tasks.append(Task(name, support=rows[:3], query=[], test=rows[3:], heldout=heldout))
    monkeypatch.setattr(evaluation, "load_tasks", lambda *_, **__: tasks)

    def names(**settings) -> list[str]:
        args = evaluation.Args(**({"few_shot": (2, 3)} | settings))
        return [task.name for task in evaluation.load_study(args, readers, CPU).tasks]

    assert names() == ["b", "d"]
    assert names(tasks=("d", "a", "c")) == ["d"]
    assert names(tasks=("c", "a")) == ["a", "c"]
    with pytest.raises(DataError) as error:
        names(tasks=("z", "a", "y"))
    assert str(error.value) == "--tasks y, z: no such task; there are a, b, c, d"
    with pytest.raises(DataError) as error:
        names(few_shot=(4, 1))
    assert str(error.value) == (
        "task b has 3 support and 6 test rows of at most 2048 tokens; --few-shot 4 needs 4 and 1"
    )
    tasks[3] = dataclasses.replace(tasks[3], test=[])
    with pytest.raises(DataError, match="task d has 3 support and 0 test rows of at most 2048"):
        names()
    assert names(tasks=("b",), limit=2) == ["b"]
    study = evaluation.load_study(
        evaluation.Args(few_shot=(0,), tasks=("b",), limit=2), readers, CPU
    )
    assert [e.id for e in study.tasks[0].test] == ["b3", "b6"]


def test_prompts_with_examples_must_fit(monkeypatch):
    """The longest of all tasks and draws, in multiples of 32 positions."""
    lengths = {"t": [50, 64], "u": [10, 20]}
    asked = []

    def in_context(tokenizer, shots, rows):
        asked.append((tokenizer, shots, rows))
        longest = lengths[rows][shots % 2]
        return {"a": Encoded([0] * 3, 1), "b": Encoded([0] * longest, 1)}

    monkeypatch.setattr(evaluation, "encode_in_context", in_context)
    monkeypatch.setattr(evaluation, "draw_shots", lambda args, task, seed: seed)
    tasks = [Task(name, support=[], query=[], test=name) for name in lengths]
    args = evaluation.Args(few_shot=(2, 7), seeds=2)
    readers = {"wide": (config_with(200), "W"), "narrow": (config_with(64), "N")}
    assert evaluation.check_prompts(args, tasks, readers) is None
    assert asked == [(kind, seed, name) for kind in "WN" for name in "tu" for seed in (0, 1)]
    lengths["t"][1] = 65
    for places in (64, 95):
        readers["narrow"] = (config_with(places), "N")
        with pytest.raises(DataError) as error:
            evaluation.check_prompts(args, tasks, readers)
        assert str(error.value) == (
            "--in-context: 7 examples and a problem take up to 65 tokens; narrow has "
            f"{places} positions: lower --few-shot"
        )
    evaluation.check_prompts(args, tasks, {"narrow": (config_with(96), "N")})


def test_prompts_are_checked_where_examples_stand_in_them(monkeypatch):
    """Before anything is measured, on the rows that the study takes; nowhere else."""
    _, tokenizer = load_config("tiny")
    rows = [words(30, f"{i}") for i in range(9)]
    task = Task("t", support=rows[:3], query=[], test=rows[3:])
    monkeypatch.setattr(evaluation, "load_tasks", lambda *_, **__: [task])
    readers = {"m": (config_with(64), tokenizer)}
    args = evaluation.Args(few_shot=(3,), limit=1)
    assert len(evaluation.load_study(args, readers, CPU).tasks) == 1
    with pytest.raises(DataError, match="^--in-context: 3 examples"):
        evaluation.load_study(dataclasses.replace(args, in_context=True), readers, CPU)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("in_context", [False, True])
def test_units_of_the_study(rank, in_context, monkeypatch, capsys):
    """Each task, number and draw; without examples a single draw. The loss is that at the end, the
    curve that at a few steps; every unit begins with the model's own weights."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    adapted = []

    def adapt(args, model, rows, pad_id, seed):
        adapted.append((model.weight.item(), rows, pad_id, seed))
        yield 0
        for step in range(1, 251 if rows else 1):
            with torch.no_grad():
                model.weight += 1
            yield step

    def test_loss(model, rows, pad_id):
        assert pad_id == 3
        return model.weight.item() + 1000 * (rows[0] == "prompt of t5")

    monkeypatch.setattr(evaluation, "study_model", lambda args, name: model)
    monkeypatch.setattr(evaluation, "load_config", lambda name, trust: (None, Letters()))
    monkeypatch.setattr(evaluation, "adapt", adapt)
    monkeypatch.setattr(evaluation, "test_loss", test_loss)
    monkeypatch.setattr(
        evaluation, "greedy_answers", lambda args, model, tokenizer, rows: ["a", "x"]
    )
    monkeypatch.setattr(
        evaluation,
        "encode_in_context",
        lambda tokenizer, shots, rows: {e.id: f"prompt of {e.id}" for e in rows},
    )
    gathered = []

    def of_all_ranks(rows, world):
        gathered.append(rows)
        return rows

    monkeypatch.setattr(evaluation, "of_all_ranks", of_all_ranks)
    rows = [Example("", "x", "", "", 0, f"t{i}") for i in range(7)]
    study = evaluation.Study(
        [Task("t", support=rows[:5], query=[], test=rows[5:])],
        {"runs/m/checkpoint": {e.id: f"row {e.id}" for e in rows}},
    )
    args = evaluation.Args(
        few_shot=(3, 0, 3, 1), seeds=2, adapt_steps=250, in_context=in_context, seed=4
    )
    world = World(torch.device("cpu"), rank, 2)
    found = evaluation.few_shot(args, study, "runs/m/checkpoint", world)
    assert gathered == [found]
    draws = [evaluation.draw_shots(args, study.tasks[0], seed) for seed in (0, 1)]
    units = [(0, 0), (1, 0), (1, 1), (3, 0), (3, 1)][rank::2]
    steps = (0, 1, 2, 5, 10, 20, 50, 100, 200, 250)
    expected, trained = [], []
    for n, seed in units:
        unit = {"task": "t", "shots": n, "seed": seed}
        if in_context:
            numbers = {"loss": 1001.0, "curve": {0: 1001.0}, "right": [False, True]}
            arm = {"model": "runs/m/checkpoint (in context)"}
            expected.append(arm | unit | numbers)
            trained.append((1.0, [], 3, seed))
        curve = {step: 1.0 + step for step in (steps if n else (0,))}
        numbers = {"loss": curve[max(curve)], "curve": curve, "right": [False, True]}
        expected.append({"model": "runs/m/checkpoint"} | unit | numbers)
        trained.append((1.0, [f"row {e.id}" for e in draws[seed][:n]], 3, seed))
    assert found == expected
    assert adapted == trained
    assert model.weight.item() == 1.0
    bar = capsys.readouterr().err  # of rank 0 alone
    assert ("few-shot m/checkpoint:" in bar, bool(bar)) == (rank == 0,) * 2


def test_draws_are_nested_and_of_their_own():
    rows = [words(1, f"{i}") for i in range(40)]
    task = Task("t", support=rows, query=[], test=[])
    args = evaluation.Args(few_shot=(2, 7, 5))
    draw = evaluation.draw_shots(args, task, 0)
    assert len({e.id for e in draw}) == 7
    assert evaluation.draw_shots(args, task, 0) == draw
    others = (
        evaluation.draw_shots(args, task, 1),
        evaluation.draw_shots(args, dataclasses.replace(task, name="u"), 0),
        evaluation.draw_shots(dataclasses.replace(args, seed=1), task, 0),
    )
    for other in others:
        assert [e.id for e in other] != [e.id for e in draw]


def test_an_adapter_is_adapted_alone(small_model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapter = peft.get_peft_model(evaluation.load_weights(str(small_model)), config)
    adapter.save_pretrained(tmp_path)
    args = evaluation.Args(adapter=str(tmp_path))
    model = evaluation.study_model(args, str(small_model))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4  # two layers, two factors
    assert all("lora_" in name for name in trained)
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_adaptation_steps(name, monkeypatch):
    """torch.optim's, without decay, on the mean over the batch's response tokens."""
    monkeypatch.setattr(
        evaluation, "response_loss", lambda model, rows, pad_id: loss_of(model, rows)
    )
    rows = [Encoded([i] * (i + 2), 1) for i in range(4)]

    def loss_of(model, rows):
        numbers = torch.tensor([[float(row.ids[0])] for row in rows])
        return (model(numbers) - 3).square().sum()

    def linear():
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        model.bias.requires_grad_(False)
        return model.eval()

    args = evaluation.Args(adapt_optimizer=name, adapt_lr=0.01, adapt_steps=3, adapt_batch=9)
    model = linear()
    moved = []
    for step in evaluation.adapt(args, model, rows, 0, seed=5):
        moved.append((step, model.weight.item()))
    assert model.training
    assert model.weight.grad is None
    expected = linear()
    params = [expected.weight]
    optimizer = {
        "adam": lambda: torch.optim.Adam(params, lr=0.01),
        "sgd": lambda: torch.optim.SGD(params, lr=0.01),
    }[name]()
    path = [(0, expected.weight.item())]
    for step in (1, 2, 3):
        optimizer.zero_grad()
        (loss_of(expected, rows) / (1 + 2 + 3 + 4)).backward()
        optimizer.step()
        path.append((step, expected.weight.item()))
    assert moved == [(step, pytest.approx(value, rel=1e-5)) for step, value in path]
    assert model.bias.item() == expected.bias.item()
    assert list(evaluation.adapt(args, model, [], 0, seed=5)) == [0]


def test_batches_are_shuffled_by_the_seed(monkeypatch):
    rows = [Encoded([i, i], 1) for i in range(6)]
    orders = []

    def loss(model, batch, pad_id):
        orders[-1] += [row.ids[0] for row in batch]
        return sum(p.sum() for p in model.parameters())

    monkeypatch.setattr(evaluation, "response_loss", loss)
    args = evaluation.Args(adapt_steps=6, adapt_batch=2)
    for seed in (0, 0, 1):
        orders.append([])
        list(evaluation.adapt(args, torch.nn.Linear(1, 1), rows, 0, seed))
    assert orders[0] == orders[1] != orders[2]
    passes = [orders[0][:6], orders[0][6:]]
    assert [sorted(one) for one in passes] == [list(range(6))] * 2
    assert passes[0] != passes[1]


def test_losses_of_the_study():
    """Summed and mean over response tokens, as without padding; the model is in training before
    and after."""
    model = small_llama().train()
    _, tokens = random_episodes(1, 35, 0)
    rows = list(tokens.values())
    forward = functional(model, dict(model.named_parameters()))
    count = sum(len(row.ids) - row.prompt_length for row in rows[:3])
    loss = evaluation.response_loss(model, rows[:3], 0)
    torch.testing.assert_close(loss, reference_loss(forward, rows[:3]) * count)
    found = evaluation.test_loss(model, rows, 0)
    assert found == pytest.approx(reference_loss(forward, rows).item(), rel=1e-6)
    assert model.training
    assert loss.requires_grad
    model.eval()
    evaluation.test_loss(model, rows[:1], 0)
    assert not model.training


def test_test_loss_takes_32_rows_at_a_time(monkeypatch):
    sizes = []

    def loss(model, rows, pad_id):
        assert not model.training
        assert not torch.is_grad_enabled()
        sizes.append(len(rows))
        return torch.tensor(float(len(rows)))

    monkeypatch.setattr(evaluation, "response_loss", loss)
    rows = [Encoded([1, 2, 3], 1)] * 65
    assert evaluation.test_loss(torch.nn.Linear(1, 1), rows, 0) == 0.5
    assert sizes == [32, 32, 1]


def test_greedy_answers(draws, monkeypatch):
    """Of the prompts alone, as long as there is room."""
    monkeypatch.setattr(evaluation, "template", lambda _: CHAT)
    model = torch.nn.Linear(1, 1)
    model.config = config_with(20)
    rows = [Encoded([1, 2, 3, 4], 3), Encoded([1, 2, 3, 4, 5, 6, 7], 5)]
    answers = evaluation.greedy_answers(evaluation.Args(max_length=99), model, Letters(), rows)
    assert answers == [r"\boxed{2}", r"\boxed{2}"]
    assert not model.training
    ((prompts, options),) = draws
    assert prompts == [[1, 2, 3], [1, 2, 3, 4, 5]]
    assert options == {"max_new_tokens": 15, "temperature": 0, "stop": {9}}
    evaluation.greedy_answers(evaluation.Args(max_length=7), model, Letters(), rows)
    assert draws[-1][1]["max_new_tokens"] == 7


def study_row(model: str, task: str, shots: int, seed: int, loss: float, *right: int) -> dict:
    row = {"model": model, "task": task, "shots": shots, "seed": seed, "loss": loss}
    return row | {"right": [bool(r) for r in right]}


STUDY_ROWS = [
    study_row("b", "u", 2, 1, 6.0, 1, 1),
    study_row("a", "t", 2, 1, 3.0, 0, 0, 1, 1),
    study_row("a", "t", 2, 0, 1.0, 1, 0, 0, 0),
    study_row("b", "t", 2, 0, 4.0, 1, 1, 1, 0),
    study_row("a", "u", 2, 0, 2.0, 1, 1),
    study_row("a", "u", 2, 1, 5.0, 0, 1),
    study_row("b", "t", 2, 1, 4.0, 1, 1, 1, 1),
    study_row("b", "u", 2, 0, 8.0, 0, 1),
    study_row("a", "t", 0, 0, 1.0, 0, 0, 0, 0),
    study_row("a", "u", 0, 0, 2.0, 1, 1),
    study_row("b", "t", 0, 0, 1.0, 0, 0, 0, 1),
    study_row("b", "u", 0, 0, 4.0, 0, 0),
]


def test_comparison_of_the_study():
    """Rows in any order; accuracy pooled over the problems of tasks, loss over tasks; of each pair
    all tasks, then each. By hand."""
    summary, pairs = evaluation.compare_few_shot(STUDY_ROWS, ["a", "b"])
    half = math.sqrt(0.5)  # the standard deviation of two numbers 1 apart
    numbers = [
        ("a", 0, 1, 2 / 6, 0.0, 1.5, 0.0),
        ("a", 2, 2, 3 / 6, 0.0, 2.75, 2.5 * half),  # 3 and 3 of 6; 1.5 and 4
        ("b", 0, 1, 1 / 6, 0.0, 2.5, 0.0),
        ("b", 2, 2, 5 / 6, half / 3, 5.5, half),  # 4 and 6 of 6; 6 and 5
    ]
    expected = []
    for model, shots, seeds, accuracy, accuracy_sd, loss, loss_sd in numbers:
        expected.append(
            {
                "model": model,
                "shots": shots,
                "seeds": seeds,
                "accuracy": pytest.approx(accuracy),
                "accuracy_sd": pytest.approx(accuracy_sd),
                "loss": pytest.approx(loss),
                "loss_sd": pytest.approx(loss_sd),
            }
        )
    assert summary == expected
    found = []
    for pair in pairs:
        found.append(tuple(pair[k] for k in ("first", "second", "shots", "task", "difference")))
    assert found == [
        ("a", "b", 0, "all", pytest.approx(-1 / 6)),
        ("a", "b", 0, "t", 1 / 4),
        ("a", "b", 0, "u", -1.0),
        ("a", "b", 2, "all", pytest.approx(2 / 6)),  # 1 and 3 of 6
        ("a", "b", 2, "t", 1 / 2),
        ("a", "b", 2, "u", 0.0),
    ]
    # Of the first seed: at 0 shots 2 against 1, at 2 shots 1 against 2; u: 1 against none
    assert [pair["mcnemar"] for pair in pairs] == [1.0, 1.0, 0.5, 1.0, 0.5, 1.0]
    by_problem = [0.5, 1.0, 0.5, 0.0, 0.0, 0.0]
    assert pairs[3]["interval"] == list(bootstrap(by_problem))


def test_pairs_of_three_models():
    rows = [study_row(name, "t", 1, 0, 1.0, 1, 0) for name in "abc"]
    summary, pairs = evaluation.compare_few_shot(rows, ["c", "a", "b"])
    assert [s["model"] for s in summary] == ["c", "a", "b"]
    assert [(p["first"], p["second"]) for p in pairs] == [("c", "a"), ("c", "b"), ("a", "b")]
    assert [p["task"] for p in pairs] == ["all"] * 3


# --------------------------------------------------------------------------------------------------
# Ranks


def test_ranks(monkeypatch):
    """torchrun's; a single one without it needs no process group."""
    monkeypatch.setattr(evaluation, "setup", lambda: "of torchrun")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert evaluation.ranks() == CPU
    for size, expected in (("1", CPU), ("2", "of torchrun")):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert evaluation.ranks() == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert evaluation.ranks() == World(torch.device("cuda", 0))


def test_rows_of_all_ranks(monkeypatch):
    def all_gather_object(places, rows):
        for i in range(len(places)):
            places[i] = [f"{rows} of {i}"]

    waits = []
    monkeypatch.setattr(evaluation.dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(evaluation.dist, "barrier", lambda: waits.append(1))
    two = World(torch.device("cpu"), 1, 2)
    assert evaluation.of_all_ranks("rows", two) == ["rows of 0", "rows of 1"]
    assert evaluation.of_all_ranks("rows", CPU) == "rows"
    evaluation.wait(CPU)
    assert not waits
    evaluation.wait(two)
    assert waits == [1]


# --------------------------------------------------------------------------------------------------
# Tables


def test_table_of_benchmarks():
    plain = {
        "problems": 30,
        "samples": 1,
        "accuracy": 0.1234,
        "interval": [0.05, 0.25],
        "mean_tokens": 123.6,
        "truncated": 0.5,
        "unparsable": 0.015,
    }
    sampled = plain | {"samples": 4, "pass@2": 0.25, "pass@4": 0.5, "too_long": 3}
    game = plain | {"step_accuracy": 0.5, "reward": -1.25, "recognition": 0.75}
    other = plain | {"step_accuracy": 0.125, "reward": 1.0}
    found = evaluation.benchmark_lines(
        {"m": {"b": plain, "g": game}, "n": {"b": sampled, "h": other}}
    )
    end = "| 124 | 50.0% | 1.5% |"
    accuracy = "| 12.3% (5.0 to 25.0) |"
    assert found == [
        "| model | benchmark | problems | accuracy, 95% interval | pass@k | mean tokens "
        "| truncated | unparsable |",
        "|---|---|---|---|---|---|---|---|",
        f"| m | b | 30 x 1 {accuracy} - {end}",
        f"| m | g | 30 x 1 {accuracy} - {end}",
        f"| n | b | 30 x 4 {accuracy} 2: 25.0%, 4: 50.0% {end}",
        f"| n | h | 30 x 1 {accuracy} - {end}",
        "\nm, g: step accuracy 0.500, reward -1.250, recognition 0.750",
        "\nn, b: 3 responses count as wrong, as the prompt alone fills the model's positions",
        "\nn, h: step accuracy 0.125, reward 1.000",
    ]


def test_table_of_the_study():
    summary = [
        {"model": "a", "shots": 5, "accuracy": 0.5, "accuracy_sd": 0.0625, "loss": 1.5},
    ]
    summary[0]["loss_sd"] = 0.25
    pair = {"first": "a", "second": "b", "task": "all", "shots": 5, "difference": -0.125}
    pair |= {"interval": [-0.25, 0.5], "mcnemar": 0.0123}
    table = [
        "| model | shots | accuracy | loss |",
        "|---|---|---|---|",
        "| a | 5 | 50.0% ± 6.2 | 1.500 ± 0.250 |",
    ]
    assert evaluation.few_shot_lines(summary, []) == table
    assert evaluation.few_shot_lines(summary, [pair]) == [
        *table,
        "",
        "| second - first | task | shots | difference of accuracy, 95% interval | McNemar p |",
        "|---|---|---|---|---|",
        "| b - a | all | 5 | -12.5 (-25.0 to +50.0) | 0.012 |",
    ]


# --------------------------------------------------------------------------------------------------
# The program


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 0.01},
        {"temperature": 1000.0, "top_p": 1.0},
        {"samples": 10**9, "batch_size": 1, "limit": 0},
        {"few_shot": (0, 10**9), "in_context": True, "adapt_lr": 100.0, "adapt_optimizer": "sgd"},
        {"data": "x", "few_shot": (1,)},
        {"data": "x", "benchmark": ("mine",)},
        {"vision": True, "benchmark": ("general_points", "virl")},
    ],
)
def test_settings_that_work(settings):
    assert evaluation.check(evaluation.Args(**settings))


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"temperature": 0.0099}, "--temperature is 0 (greedy) or at least 0.01"),
        ({"temperature": 1001.0}, "--temperature must be in [0, 1000], not 1001.0"),
        ({"temperature": 0.0, "samples": 2}, "--samples above 1 needs a --temperature above 0"),
        ({"top_p": 0.0}, "--top-p must be in (0, 1], not 0.0"),
        ({"top_p": 1.01}, "--top-p must be in (0, 1], not 1.01"),
        ({"adapt_lr": 0.0}, "--adapt-lr must be in (0, 100], not 0.0"),
        ({"adapt_lr": 101.0}, "--adapt-lr must be in (0, 100], not 101.0"),
        ({"samples": 0}, "--samples must be at least 1, not 0"),
        ({"max_length": 10**9 + 1}, "--max-length must be at least 1, not 1000000001"),
        ({"few_shot": (3, -1)}, "--few-shot must be 0 or more, not -1"),
        ({"seed": 9 * 10**18}, "--seed must be in (-9e18, 9e18), not 9000000000000000000"),
        ({"adapt_optimizer": "adamw"}, "--adapt-optimizer is adam or sgd"),
        ({"in_context": True}, "--in-context is for the few-shot study: give --few-shot as well"),
        ({"adapter": "x"}, "--adapter is for the few-shot study: give --few-shot as well"),
        ({"output_dir": ""}, "--output-dir must name a folder"),
        (
            {"vision": True, "benchmark": ("virl", "gsm8k")},
            "--vision is for the games: --benchmark general_points or virl",
        ),
        (
            {"data": "x"},
            "--data is the file of one benchmark: name it with --benchmark (math500, gsm8k, ... or "
            "a name of your choice)",
        ),
    ],
)
def test_settings_that_do_not(settings, message):
    with pytest.raises(DataError) as error:
        evaluation.check(evaluation.Args(**settings))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "name", ["batch_size", "seeds", "max_length", "adapt_steps", "adapt_batch"]
)
def test_numbers_that_begin_at_one(name):
    assert evaluation.check(evaluation.Args(**{name: 1}))
    with pytest.raises(DataError, match=f"--{name.replace('_', '-')} must be at least 1, not 0"):
        evaluation.check(evaluation.Args(**{name: 0}))


@pytest.mark.parametrize(
    "settings",
    [{"temperature": -0.1}, {"limit": 10**9 + 1}, {"seed": -9 * 10**18}, {"top_p": -0.5}],
)
def test_numbers_out_of_their_bounds(settings):
    (name,) = settings
    with pytest.raises(DataError, match=f"--{name.replace('_', '-')} must be"):
        evaluation.check(evaluation.Args(**settings))


def test_names_of_benchmarks():
    """Groups are spelled out, each benchmark once, in order."""

    def names(*benchmarks: str, data: str | None = None) -> list[str]:
        return evaluation.check(evaluation.Args(benchmark=benchmarks, data=data))

    assert names("gsm8k", "all_ood", "gsm8k") == ["gsm8k", "arc_c", "gpqa_d", "mmlu_pro"]
    every_id = ["aime24", "amc23", "math500", "minerva", "olympiadbench"]
    assert names("math500", "all_id") == ["math500", *[n for n in every_id if n != "math500"]]
    assert names("mine", "mine", data="x") == ["mine"]
    for several in (("all_id",), ("a", "b"), ("embedded",)):
        with pytest.raises(DataError, match="--data is the file of one benchmark"):
            names(*several, data="x")
    with pytest.raises(DataError) as error:
        names("mine", "embedded", "yours")
    assert str(error.value) == (
        "--benchmark mine, yours: unknown; there are embedded, general_points, virl, math500, "
        "aime24, amc23, minerva, olympiadbench, gsm8k, arc_c, gpqa_d, mmlu_pro, all_id, all_ood, "
        "or any name with --data PATH"
    )


def test_numbers_of_folders(here):
    """The third settings get the third folder; what the results do not depend on is no setting."""
    folders = []
    for changes in (
        {}, {"seed": 1}, {"seed": 2}, {"seed": 1, "batch_size": 3}, {"check_overlap": "x"},
        {"samples": 2, "few_shot": (1, 2)}, {"samples": 2, "few_shot": (1, 2)},
    ):  # fmt: skip
        folders.append(evaluation.claim_folder(evaluation.Args(**changes), CPU))
    ends = ["run", "run-2", "run-3", "run-2", "run", "run-4", "run-4"]
    assert folders == [f"evals/{end}" for end in ends]
    settings = json.loads((here / "evals" / "run-4" / "args.json").read_text())
    assert settings["few_shot"] == [1, 2]
    fields = {field.name for field in dataclasses.fields(evaluation.Args)}
    assert settings.keys() == fields - {"output_dir", "batch_size", "check_overlap"}
    args = evaluation.Args(output_dir="evals/run", seed=1, samples=3)
    assert evaluation.claim_folder(args, CPU) == "evals/run-5"
    args = dataclasses.replace(args, output_dir="evals/run-4", seed=1)
    with pytest.raises(DataError) as error:
        evaluation.claim_folder(args, CPU)
    assert str(error.value) == (
        "evals/run-4 holds results of other settings (seed, samples, few_shot): choose another "
        "--output-dir"
    )
    (here / "file").write_text("")
    with pytest.raises(DataError, match="file"):
        evaluation.claim_folder(evaluation.Args(output_dir="file/x"), CPU)


def test_ranks_take_the_folder_of_rank_0(here, monkeypatch):
    claimed = []

    def broadcast(answer, source):
        claimed.append((list(answer), source))
        answer[0] = answer[0] or claimed[0][0][0]

    monkeypatch.setattr(evaluation.dist, "broadcast_object_list", broadcast)
    for rank in (0, 1):
        world = World(torch.device("cpu"), rank, 2)
        assert evaluation.claim_folder(evaluation.Args(), world) == "evals/run"
    assert claimed == [(["evals/run"], 0), ([None], 0)]


def test_all_ranks_end_where_rank_0_has_no_folder(here, monkeypatch):
    """With its error."""
    sent = []

    def broadcast(answer, source):
        sent.append(answer[0])
        answer[0] = sent[0]

    monkeypatch.setattr(evaluation.dist, "broadcast_object_list", broadcast)
    (here / "file").write_text("")
    args = evaluation.Args(output_dir="file/x")
    for rank in (0, 1):
        with pytest.raises(DataError, match="file"):
            evaluation.claim_folder(args, World(torch.device("cpu"), rank, 2))
    assert sent[1] is None


def test_folders_of_the_user(here, monkeypatch):
    """~ is the user's, whoever wrote it into the command."""
    monkeypatch.setenv("HOME", str(here / "home"))
    folder = evaluation.claim_folder(evaluation.Args(output_dir="~/x"), CPU)
    assert folder == str(here / "home" / "x")
    assert (here / "home" / "x" / "args.json").exists()


def test_a_folder_without_room_is_taken_back(here, monkeypatch):
    def fail(file, text):
        file.with_name("args.json.tmp").touch()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(evaluation, "write_text", fail)
    with pytest.raises(DataError, match="full"):
        evaluation.claim_folder(evaluation.Args(output_dir="x"), CPU)
    assert not (here / "x").exists()


@pytest.mark.parametrize("text", ["[]", "5", '"x"'])
def test_settings_of_others(here, text):
    """What is JSON, but no settings, is damaged; a setting that is new counts as changed."""
    (here / "args.json").write_text(text)
    settings = evaluation.settings_of(evaluation.Args())
    assert evaluation.changed_settings(here, settings) == ["a damaged args.json"]
    (here / "args.json").write_text(json.dumps({**settings, "gone": 1}))
    assert evaluation.changed_settings(here, settings) == []
    assert evaluation.changed_settings(here, {**settings, "new": 1}) == ["new"]
    assert evaluation.changed_settings(here / "none", settings) == []


def test_folders_that_are_taken_back(tmp_path):
    """Those that hold no response and no result; what is not ours stays."""
    for name, files, left in (
        ("none", {}, None),
        ("empty", {"args.json": "{}", "responses-0.jsonl": "", "results.md.tmp": "x"}, None),
        ("half", {"args.json.tmp": "{"}, None),
        ("response", {"args.json": "{}", "responses-0.jsonl": "", "responses-1.jsonl": "x"}, 3),
        ("result", {"args.json": "{}", "results.json": "", "responses-0.jsonl": ""}, 3),
        ("other", {"args.json": "{}", "mine.txt": "x"}, 1),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file).write_text(text)
        evaluation.leave_nothing_empty(folder)
        found = len(list(folder.iterdir())) if folder.exists() else None
        assert found == left, name


def test_warning_of_overlap(tmp_path, capsys):
    """The first three of them are named."""
    problems = [problem(i, f"What  is {i}?") for i in range(6)]
    file = tmp_path / "t.jsonl"
    for shared, names in (((1, 2, 3, 5), "b/1, b/2, b/3"), ((4,), "b/4"), ((), None)):
        rows = [{"problem": f" WHAT is\n{i}?"} for i in (*shared, 99)]
        file.write_text("\n".join(map(json.dumps, rows)))
        evaluation.warn_of_overlap(str(file), problems, CPU)
        expected = (
            f"warning: {file} contains {len(shared)} of the 6 problems ({names} ...): the accuracy "
            "below is not held out\n"
        )
        assert capsys.readouterr().out == (expected if names else "")
    file.write_text(json.dumps({"answer": "1"}))
    with pytest.raises(DataError) as error:
        evaluation.warn_of_overlap(str(file), problems, CPU)
    assert str(error.value) == (
        f"--check-overlap {file}: no column problem, prompt or question with text"
    )


def test_games_and_benchmarks_are_measured(monkeypatch):
    asked = []

    def run_benchmarks(args, problems, model, world):
        asked.append(("benchmarks", model, list(problems)))
        return {"b": f"b of {model}"}

    def run_games(args, name, model, world):
        asked.append((name, model))
        return {f"{name} (rule)": model}

    monkeypatch.setattr(evaluation, "run_benchmarks", run_benchmarks)
    monkeypatch.setattr(evaluation, "run_games", run_games)
    args = evaluation.Args(model=("m", "n"))
    names = ["virl", "b", "general_points"]
    assert evaluation.measure_benchmarks(args, names, {"b": []}, CPU) == {
        "m": {"b": "b of m", "virl (rule)": "m", "general_points (rule)": "m"},
        "n": {"b": "b of n", "virl (rule)": "n", "general_points (rule)": "n"},
    }
    assert asked[:2] == [("benchmarks", "m", ["b"]), ("benchmarks", "n", ["b"])]
    asked.clear()
    assert evaluation.measure_benchmarks(args, ["virl"], {}, CPU)["n"] == {"virl (rule)": "n"}
    assert asked == [("virl", "m"), ("virl", "n")]


def test_problems_are_loaded_before_anything(monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "game_tests", lambda args, name: asked.append(name))

    def load_benchmark(name, path, limit):
        asked.append((name, path, limit))
        return [f"{name} 0", f"{name} 1"]

    monkeypatch.setattr(evaluation, "load_benchmark", load_benchmark)
    monkeypatch.setattr(evaluation, "warn_of_overlap", lambda *args: asked.append(args))
    args = evaluation.Args(limit=7, data="d")
    found = evaluation.load_problems(args, ["b", "virl", "c"], CPU)
    assert found == {"b": ["b 0", "b 1"], "c": ["c 0", "c 1"]}
    assert asked == [("b", "d", 7), "virl", ("c", "d", 7)]
    args = dataclasses.replace(args, check_overlap="train")
    evaluation.load_problems(args, ["b", "c"], CPU)
    assert asked[-1] == ("train", ["b 0", "b 1", "c 0", "c 1"], CPU)


def test_arms_of_the_study(monkeypatch):
    def few_shot(args, study, name, world):
        rows = [study_row(name, "t", 1, 0, 1.0, 1, 0)]
        if args.in_context:
            rows.append(study_row(f"{name} (in context)", "t", 1, 0, 1.0, 1, 1))
        return rows

    monkeypatch.setattr(evaluation, "few_shot", few_shot)
    report, lines = evaluation.measure_few_shot(evaluation.Args(model=("m", "n")), None, CPU)
    assert [row["model"] for row in report["few_shot"]] == ["m", "n"]
    assert [s["model"] for s in report["summary"]] == ["m", "n"]
    assert len(report["pairs"]) == 1
    assert lines == evaluation.few_shot_lines(report["summary"], report["pairs"])
    args = evaluation.Args(model=("m", "n"), in_context=True)
    report, _ = evaluation.measure_few_shot(args, None, CPU)
    arms = ["m", "n", "m (in context)", "n (in context)"]
    assert [s["model"] for s in report["summary"]] == arms
    assert len(report["pairs"]) == 6


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("study", [False, True])
def test_what_the_program_writes(rank, study, here, monkeypatch, capsys):
    """The settings and what was found, by rank 0 alone; every model's tokenizer is read first."""
    read, closed = [], []

    def load_readers(name, vision, trust):
        read.append((name, vision, trust))
        return "config", f"tokenizer of {name}", None

    def load_study(args, readers, world):
        return readers

    def measure_few_shot(args, readers, world):
        assert readers == {name: ("config", f"tokenizer of {name}") for name in args.model}
        return {"few_shot": [1]}, ["some", "lines"]

    world = World(torch.device("cpu"), rank, 2)
    monkeypatch.setattr(evaluation, "load_readers", load_readers)
    monkeypatch.setattr(evaluation, "template", read.append)
    monkeypatch.setattr(evaluation, "ranks", lambda: world)
    monkeypatch.setattr(evaluation, "load_problems", lambda *_: "problems")
    monkeypatch.setattr(evaluation, "load_study", load_study)
    monkeypatch.setattr(evaluation, "measure_few_shot", measure_few_shot)
    monkeypatch.setattr(evaluation, "measure_benchmarks", lambda *asked: {"m": {}})
    monkeypatch.setattr(evaluation, "benchmark_lines", lambda found: [f"table of {found}"])
    monkeypatch.setattr(evaluation, "leave_nothing_empty", closed.append)
    monkeypatch.setattr(evaluation, "claim_folder", lambda *_: "evals/run-2")
    folder = here / "evals" / "run-2"
    folder.mkdir(parents=True)
    args = evaluation.Args(model=("m", "n"), few_shot=(1,) if study else ())
    assert evaluation.main(args) == 0
    of_m, of_n = ("m", False, False), ("n", False, False)
    assert read == [of_m, "tokenizer of m", of_n, "tokenizer of n"]
    out = capsys.readouterr().out
    if rank:
        assert (list(folder.iterdir()), closed, out) == ([], [], "")
        return
    found = {"few_shot": [1]} if study else {"benchmarks": {"m": {}}}
    text = "some\nlines" if study else "table of {'m': {}}"
    report = {"args": evaluation.settings_of(args)} | found
    assert json.loads((folder / "results.json").read_text()) == report
    assert (folder / "results.md").read_text() == text + "\n"
    assert out == f"{text}\n\nevals/run-2/results.json\n"
    assert closed == [Path("evals/run-2")]


def test_how_the_program_ends(monkeypatch, capsys):
    """Status and line by error; other ranks let the first speak."""
    monkeypatch.setattr(evaluation.time, "sleep", lambda seconds: slept.append(seconds))
    kept = "responses so far are kept"
    for rank, error, status, line in (
        (0, DataError("bad"), 2, "eval.py: bad\n"),
        (0, OSError(errno.ENOSPC, "full"), 2, f"; {kept}: make room and give the same command"),
        (0, OSError(errno.EACCES, "denied"), 2, "denied\n"),
        (1, evaluation.ModelError("bad"), 2, "eval.py: bad\n"),
        (0, KeyboardInterrupt(), 130, f"eval.py: interrupted; {kept} (a few-shot study starts"),
        (1, KeyboardInterrupt(), 130, ""),
    ):
        slept = []

        def fail(args, error=error):
            raise error

        monkeypatch.setattr(evaluation, "main", fail)
        monkeypatch.setenv("RANK", str(rank))
        assert run_here(evaluation) == status
        found = capsys.readouterr().err
        assert line in found
        assert found.count("\n") == bool(line)
        assert len(slept) == (rank == 1 and status == 2)
    monkeypatch.setattr(evaluation, "main", lambda args: 0)
    assert run_here(evaluation) == 0
