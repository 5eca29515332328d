"""data.py: splits, episodes, files in every format, tokens and the loss mask."""

import gzip
import itertools
import json
import math
import random
import types
from dataclasses import asdict

import pyarrow
import pyarrow.parquet
import pytest

import data
from data import DataError, Encoded, Example, Task, load_tasks
from games.problems import load_problems
from model import load_config
from tests.helpers import SHARED, needs_shared
from tiny.problems import embedded_rows


def additions(count: int = 50) -> list[Example]:
    examples = []
    for i in range(count):
        problem, solution = f"What is {i} + 1?", f"\\boxed{{{i + 1}}}"
        examples.append(Example(problem, solution, str(i + 1), "Algebra", 1 + i % 5, str(i)))
    return examples


def of_level(rows: list[Example], level: int) -> int:
    return sum(e.level == level for e in rows)


def test_split_is_stratified_disjoint_and_order_free():
    splits = support, query, test = data.split(additions(), 0.3, 0.4, 1)
    assert [len(rows) for rows in splits] == [15, 20, 15]
    for level in range(1, 6):
        assert of_level(support, level) == 3, f"level {level}"
        assert of_level(query, level) == 4, f"level {level}"
    assert sorted(e.id for e in support + query + test) == sorted(e.id for e in additions())
    assert data.split(additions()[::-1], 0.3, 0.4, 1) == splits, "depends on the rows' order"
    assert data.split(additions(), 0.3, 0.4, 2) != splits, "does not depend on the seed"


def test_rows_beside_a_test_file_are_shared(tmp_path):
    """Between support and query, at the ratio that they were asked for; none is left out."""
    for name, first, count in (("train", 0, 70), ("test", 100, 5)):
        rows = []
        for i in range(first, first + count):
            row = {"problem": f"What is {i} + 1?", "solution": f"\\boxed{{{i + 1}}}"}
            rows.append(row | {"subject": "sums", "level": 1})
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for ratios, sizes in ((None, (30, 40, 5)), ((0.1, 0.1), (35, 35, 5))):
        given = dict(zip(("support_ratio", "query_ratio"), ratios or (), strict=False))
        (task,) = load_tasks(str(tmp_path), **given)
        assert (len(task.support), len(task.query), len(task.test)) == sizes


def test_episodes_are_pure_and_replicas_share_the_meta_batch():
    tasks = [t for t in load_tasks("embedded") if not t.heldout]

    def meta_batch(step: int, places, tasks=tasks):
        return [data.sample_episode(tasks, 1, step, place, 6, 3) for place in places]

    one = meta_batch(5, range(4))
    assert meta_batch(5, range(2)) + meta_batch(5, range(2, 4)) == one
    assert len({episode.task for episode in one}) == 4
    assert meta_batch(6, range(4)) != one
    assert len({e.id for e in one[0].support + one[0].query}) == 9
    few = [episode.task for episode in meta_batch(5, range(4), tasks[:2])]
    assert len(set(few[:2])) == 2
    assert len(set(few[2:])) == 2


def texts_of(examples: list[Example]) -> list[tuple]:
    return [(e.prompt, e.response, e.answer, e.level) for e in examples]


def test_prepare_round_trip_and_validate(tmp_path):
    """data.py writes the agreed names and columns; training reads them; a spoilt folder gives
    status 1 and names the fault."""
    folder = tmp_path / "out"
    assert data.main(data.Args(str(folder), task_column="subject", validate=True)) == 0
    file = folder / "meta_train" / "counting_&_probability_support.parquet"
    table = pyarrow.parquet.read_table(file)
    assert table.column_names == ["prompt", "response", "metadata"]
    assert set(json.loads(table.to_pylist()[0]["metadata"])) >= {"subject", "level"}
    before = load_tasks("embedded", task_column="subject")
    after = {t.name: t for t in load_tasks(str(folder))}
    for t in before:
        if not t.heldout:
            for name in ("support", "query", "test"):
                written, read = getattr(t, name), getattr(after[t.name], name)
                assert texts_of(written) == texts_of(read), f"{t.name}, {name}"

    query = folder / "meta_train" / "algebra_query.parquet"
    spoilt = pyarrow.parquet.read_table(query).to_pylist()
    spoilt[0]["response"] = "no answer here"
    spoilt[1]["prompt"] = table.to_pylist()[3]["prompt"]
    spoilt[2]["response"] = "  "
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(spoilt), query)
    faults = "\n".join(data.validate(folder))
    assert "row 1: no final answer" in faults
    assert "row 4: the same problem is in meta_train/algebra_query" in faults
    assert "row 3: empty" in faults
    assert data.main(data.Args(str(folder), validate_only=True)) == 1


@pytest.fixture
def math_files(tmp_path):
    """A folder with the same problems of two subjects in every format."""
    rows = []
    for i, e in enumerate(additions()):
        subject = "Algebra" if i % 2 else "Geometry"
        row = {"problem": e.prompt, "solution": e.response, "type": subject}
        rows.append(row | {"level": f"Level {e.level}"})
    lines = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text(lines)
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    return tmp_path


def test_local_formats(math_files):
    shapes = []
    for name in ("a.json", "b.jsonl", "c.jsonl.gz", "d.parquet"):
        shape = []
        for t in load_tasks(str(math_files / name)):
            sizes = len(t.support), len(t.query), len(t.test)
            shape.append((t.name, *sizes, t.test[0].answer, t.test[0].level))
        shapes.append(shape)
        assert shape == shapes[0], name
    assert [task[0] for task in shapes[0]] == ["Algebra", "Geometry"]

    custom = [{"prompt": e.prompt, "response": e.response, "kind": "k"} for e in additions()]
    file = math_files / "e.jsonl"
    file.write_text("\n".join(map(json.dumps, custom)))
    assert [t.name for t in load_tasks(str(file), task_column="kind")] == ["k"]
    with pytest.raises(DataError, match="missing column.*subject.*found: prompt, response, kind"):
        load_tasks(str(file))
    with pytest.raises(DataError, match="Geometry"):
        load_tasks(str(math_files / "a.json"), heldout=("Topology",))
    held = load_tasks(str(math_files / "a.json"), heldout=("Geometry",))
    assert [t.heldout for t in held] == [False, True]
    problems_from_files(math_files)


def problems_from_files(folder):
    """The same file as problems with a reward: real models are asked to box the answer, or what
    --suffix says."""
    _, tokenizer = load_config("tiny")
    sizes = {"validation": 2, "test": 3, "max_length": 512}

    def ask(**choice):
        choice = {"subjects": ("Geometry",), "levels": (1, 2, 3)} | choice
        return load_problems(str(folder / "a.json"), tokenizer, **sizes, **choice)

    train, validation, tests, _ = ask()
    examples = []
    for game in (train, validation, *tests.values()):
        examples += game.examples
    for e in examples:
        assert e.prompt.endswith(data.BOX), e
        assert e.subject == "Geometry", e
        assert e.level <= 3, e
    assert len(validation) == 2
    assert len({e.id for e in examples}) == len(examples), "a problem is in two sets"
    brief, *_ = ask(suffix=" Be brief.")
    assert brief.reset(0).prompt.endswith(" Be brief.")
    with pytest.raises(DataError, match="0 training problems.*subjects: Algebra, Geometry"):
        ask(subjects=("Topology",))
    rows = json.loads((folder / "a.json").read_text())
    plain = [{"problem": r["problem"], "solution": r["solution"]} for r in rows]
    (folder / "plain.jsonl").write_text("\n".join(map(json.dumps, plain)))
    *_, report = load_problems(str(folder / "plain.jsonl"), tokenizer, **sizes)
    assert "0 without an answer" in report


@needs_shared
def test_shared_math():
    """The MATH files work as they are; the test file stays the test split."""
    tasks = load_tasks(str(SHARED / "data" / "math"))
    assert len(tasks) == 7
    assert sum(len(t.test) for t in tasks) == 500
    assert sum(len(t.support) + len(t.query) for t in tasks) > 4400


def test_tokens_and_loss_mask():
    """Anything round-trips; the loss is on the response and its end, nothing else; long rows are
    dropped and counted."""
    _, tokenizer = load_config("tiny")

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for text in (
        '\\frac{12}{34} \\cdot x^{2} ∘ ∞ é 漢字\n\t{"cards": [1, 10]}',
        "a  b\\\\c $x$",
        "".join(map(chr, range(32, 300))),
    ):
        assert tokenizer.decode(ids_of(text)) == text
    assert len(ids_of("1234567890")) == 10
    examples = additions(3)
    encoded, dropped = data.encode(tokenizer, examples, 2048)
    row = encoded["0"]
    assert dropped == 0
    assert tokenizer.decode(row.ids) == "<|user|>What is 0 + 1?<|assistant|>\\boxed{1}<|end|>"
    assert tokenizer.decode(row.ids[row.prompt_length :]) == "\\boxed{1}<|end|>"
    batch = data.collate(list(encoded.values()), tokenizer.pad_token_id)
    labels = batch["labels"]
    longest = max(len(r.ids) for r in encoded.values())
    assert batch["input_ids"].shape[1] == -(-longest // 4) * 4
    assert data.collate([data.Encoded([7] * 33, 1)], 0)["input_ids"].shape[1] == 64
    assert (labels != -100).sum() == sum(len(r.ids) - r.prompt_length for r in encoded.values())
    response = slice(row.prompt_length, len(row.ids))
    assert labels[0, response].tolist() == row.ids[response]
    assert data.encode(tokenizer, examples, 5) == ({}, 3)
    assert data.encode(tokenizer, examples, longest) == (encoded, 0)


@pytest.mark.parametrize("chat", [True, False])
def test_examples_in_the_prompt(chat):
    """As turns of one conversation, each shown once; the loss is on the last answer alone."""
    _, tokenizer = load_config("tiny")
    if not chat:
        tokenizer.chat_template = None
    one, two, asked = additions(3)
    encoded = data.encode_in_context(tokenizer, [one, two, one], [asked])
    (row,) = encoded.values()
    shown = "<|user|>What is 0 + 1?<|assistant|>\\boxed{1}<|end|>"
    shown += "<|user|>What is 1 + 1?<|assistant|>\\boxed{2}<|end|>"
    question = "<|user|>What is 2 + 1?<|assistant|>"
    if not chat:
        shown = "Problem: What is 0 + 1?\nSolution: \\boxed{1}\n"
        shown += "Problem: What is 1 + 1?\nSolution: \\boxed{2}\n"
        question = "Problem: What is 2 + 1?\nSolution: "
    assert tokenizer.decode(row.ids[: row.prompt_length]) == shown + question
    assert tokenizer.decode(row.ids[row.prompt_length :]) == "\\boxed{3}<|end|>"


# --------------------------------------------------------------------------------------------------
# Numbers and columns


def test_bounds_in_words():
    """At each bound and beyond it; the message whole."""
    for interval, inside, outside in (
        (
            "[1, 1e9]",
            (1, 10**9),
            {0: "at least 1", 10**9 + 1: "at least 1", math.nan: "at least 1"},
        ),
        ("(0, inf)", (1e-300, 1e300), {0.0: "a positive number", -1: "a positive number"}),
        ("[0, 1e9]", (0, 10**9), {-1: "0 or more", 10**9 + 1: "0 or more"}),
        ("[0, 1)", (0, 0.99), {1: "in [0, 1)", -0.5: "in [0, 1)"}),
        ("(-1, 2]", (2, -0.99), {-1: "in (-1, 2]", 3: "in (-1, 2]"}),
    ):
        for value in (*inside, inside, None):
            data.check_numbers(
                types.SimpleNamespace(some_long_flag=value), {interval: ["some_long_flag"]}
            )
        for value, words in outside.items():
            for given in (value, (inside[0], value)):
                args = types.SimpleNamespace(some_long_flag=given)
                with pytest.raises(DataError) as error:
                    data.check_numbers(args, {"[0, 9]": [], interval: ["some_long_flag"]})
                assert str(error.value) == f"--some-long-flag must be {words}, not {value}"


def test_examples_of_rows():
    """Every field: the task's column, the subject beside it, levels in any writing."""
    row = {"problem": "1 + 1?", "solution": "It is \\boxed{2}."}
    rows = [
        row | {"task": "T", "subject": "S", "type": "U", "level": "Level 4"},
        row | {"task": 5, "subject": "", "type": "U", "level": 12},
        row | {"task": "T", "level": "hard"},
        row | {"task": "T", "type": 7, "answer": "3", "level": None},
    ]
    made = data.to_examples(rows, "f", None)
    texts = "1 + 1?", "It is \\boxed{2}."
    assert made == [
        ("T", Example(*texts, "2", "S", 4, "f/0")),
        ("5", Example(*texts, "2", "U", 12, "f/1")),
        ("T", Example(*texts, "2", "T", 0, "f/2")),
        ("T", Example(*texts, "3", "7", 0, "f/3")),
    ]
    assert [name for name, _ in data.to_examples(rows[:1], "f", "type")] == ["U"]
    assert [name for name, _ in data.to_examples(rows[:1], "f", "")] == ["T"]
    assert data.to_examples([row], "f", "") == [("math", Example(*texts, "2", "math", 0, "f/0"))]
    assert data.to_examples([row | {"solution": "Yes"}], "f", "")[0][1].answer == ""


def refusal(*args) -> str:
    with pytest.raises(DataError) as error:
        data.to_examples(*args)
    return str(error.value)


def test_rows_that_are_refused():
    row = {"problem": "1 + 1?", "solution": "2", "type": "S"}
    assert refusal([], "f", None) == "f holds no rows"
    assert refusal([{"solution": "2", "x": 1}], "f", None) == (
        "f: missing columns problem (or prompt), subject (or type, task, --task-column); "
        "found: solution, x"
    )
    assert refusal([{"problem": "2", "type": 1}], "f", None) == (
        "f: missing column solution (or response); found: problem, type"
    )
    assert refusal([row], "f", "kind") == "f: missing column kind; found: problem, solution, type"
    texts = "problem, solution and type must be non-empty text"
    for broken in ({"problem": " "}, {"solution": 5}, {"type": ""}, {"type": None}, {"type": [1]}):
        assert refusal([row, row | broken], "f", None) == f"f, row 2: {texts}"
    talk = {"messages": [{"role": "user", "content": "x"}], "type": "S"}
    chat = " (or turns of user and assistant, the assistant's last)"
    assert refusal([talk], "f", None) == (
        f"f, row 1: messages and type must be non-empty text{chat}"
    )
    assert refusal([row, row | {"answer": {"a": 1}}], "f", None) == (
        "f, row 2: the answer must be text or a number"
    )
    packed = {"prompt": "1", "response": "2", "metadata": '{"subject": "S", "prompt": "no"}'}
    ((name, example),) = data.to_examples([packed], "f", None)
    assert (name, example.prompt) == ("S", "1")
    assert refusal([packed, packed | {"metadata": "{"}], "f", None) == (
        "f, row 2: column metadata is not JSON"
    )


# --------------------------------------------------------------------------------------------------
# Tasks


def of_levels(**counts: int) -> list[Example]:
    rows = []
    for name, count in counts.items():
        level = int(name[1:])
        rows += [Example(f"{name}-{i}", "", "", "", level, f"{name}-{i}") for i in range(count)]
    return rows


def test_split_rounds_each_level():
    """0.3 and 0.7 of 7 are 2 and 5, of 3 are 1 and 2, of 6 are 2 and 4, of 1 are 0 and 1."""
    rows = of_levels(l5=7, l2=3, l9=6, l1=1)
    support, query, test = data.split(rows, 0.3, 0.4, 3)
    assert [e.level for e in support] == [2] + [5] * 2 + [9] * 2
    assert [e.level for e in query] == [1] + [2] + [5] * 3 + [9] * 2
    assert sorted(e.level for e in test) == [2] + [5] * 2 + [9] * 2
    everything = data.split(rows, 0.5, 0.5, 3)
    assert [len(part) for part in everything] == [9, 8, 0]  # 4, 2, 3 and 0; halves to even
    renamed = [Example(e.prompt, "", "", "", e.level, "new") for e in rows]
    assert [e.prompt for e in data.split(renamed, 0.3, 0.4, 3)[0]] == [e.prompt for e in support]
    assert data.order_by_hash(3, rows) == data.order_by_hash(3, rows[::-1])
    assert data.order_by_hash(3, rows) != data.order_by_hash(4, rows)


def test_ratios():
    for good in ((0.5, 0.5), (1e-9, 1e-9), (0.3, 0.4)):
        data.check_ratios(*good)
    for bad in ((0, 0.5), (0.5, 0), (-0.1, 0.5), (0.5, -0.1), (0.6, 0.5), (math.nan, 0.5)):
        with pytest.raises(DataError) as error:
            data.check_ratios(*bad)
        assert str(error.value) == (
            "support and query ratio must be positive and sum to at most 1, "
            f"not {bad[0]} + {bad[1]}"
        )


def lines_of(folder, name: str, first: int, last: int, task: str = "sums"):
    rows = []
    for i in range(first, last):
        row = {"problem": f"What is {i} + 1?", "solution": f"\\boxed{{{i + 1}}}"}
        rows.append(row | {"task": task, "subject": f"of {task}", "level": 1 + i % 2})
    file = folder / name
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_rows_of_a_task_at_most(tmp_path):
    """max_samples, of the training rows alone: the first in the order of the seed; 0 for all. What
    is not said is 0.3, 0.4, all rows, seed 42."""
    lines_of(tmp_path, "train.jsonl", 0, 40)
    lines_of(tmp_path, "test.jsonl", 40, 50)
    (whole,) = load_tasks(str(tmp_path))
    explicit = {"support_ratio": 0.3, "query_ratio": 0.4, "max_samples": 0, "seed": 42}
    assert load_tasks(str(tmp_path), **explicit) == [whole]
    assert load_tasks(str(tmp_path), seed=43) != [whole]
    assert [len(rows) for rows in (whole.support, whole.query, whole.test)] == [18, 22, 10]
    (task,) = load_tasks(str(tmp_path), max_samples=14)
    rows = data.order_by_hash(42, whole.support + whole.query)[:14]
    assert {e.id for e in task.support + task.query} == {e.id for e in rows}
    assert task.test == whole.test
    assert not task.heldout
    alone = lines_of(tmp_path, "alone.jsonl", 0, 40)
    (task,) = load_tasks(str(alone))
    assert [len(rows) for rows in (task.support, task.query, task.test)] == [12, 16, 12]
    (task,) = load_tasks(str(alone), max_samples=20, support_ratio=0.1, query_ratio=0.2)
    assert len(task.support + task.query + task.test) == 20


def sizes_of(tasks: list[Task]) -> dict[str, tuple]:
    return {t.name: (len(t.support) + len(t.query), len(t.test), t.heldout) for t in tasks}


def test_embedded_tasks():
    """200 problems of a family or so many as there are, 40 others for the test; a subject's task
    has those of its pre-training too, and its held-out family stays by itself."""
    expected = {}
    for role in ("training", "heldout"):
        train, test = embedded_rows(200, 42, "train", role), embedded_rows(40, 42, "test", role)
        for name in train:
            expected[name] = len(train[name]), len(test[name]), role == "heldout"
    assert max(expected.values()) == (200, 40, True)
    assert sizes_of(load_tasks("embedded")) == expected
    few = sizes_of(load_tasks("embedded", max_samples=10))
    assert set(few.values()) == {(10, n, held) for _, n, held in expected.values()}
    tasks = load_tasks("embedded", max_samples=10, task_column="subject")
    by_subject = sizes_of([t for t in tasks if not t.heldout])
    test = embedded_rows(40, 42, "test", "pretraining", "training")
    for subject, (trained, tested, _) in by_subject.items():
        assert trained == 70
        assert tested == sum(len(test[name]) for name in test if name.startswith(f"{subject}/"))
    assert [t.name for t in tasks[7:]] == [name for name in expected if expected[name][2]]
    first = load_tasks("embedded", max_samples=3)[0]
    (row,) = [e for e in first.support + first.query if e.id.endswith("train0")]
    given = embedded_rows(3, 42, "train", "training")["Prealgebra/missing_addend"][0]
    assert row == Example(
        given["problem"], given["solution"], given["answer"], "Prealgebra", given["level"],
        "Prealgebra/missing_addend/train0",
    )  # fmt: skip
    with pytest.raises(DataError, match="^--task-column type: embedded problems are grouped by"):
        load_tasks("embedded", task_column="type")
    with pytest.raises(DataError, match="^--task-column x: each of the ciphers is a task already"):
        load_tasks("ciphers", task_column="x")


def named_tasks(*names: str) -> list[Task]:
    tasks = []
    for name in names:
        rows = [Example(f"{name}{i}", "", "", f"of {name[0]}", 0, f"{name}{i}") for i in range(6)]
        tasks.append(Task(name, rows[:2], rows[2:4], rows[4:]))
    return tasks


def test_held_out_tasks(tmp_path):
    """By the name of a task or of its subject; an unknown one is told what there is."""
    rows = []
    for task in ("a1", "a2", "b1"):
        lines_of(tmp_path, f"{task}.jsonl", len(rows), len(rows) + 10, task)
        rows += [task] * 10

    def held(*names: str) -> list[str]:
        return [t.name for t in load_tasks(str(tmp_path), heldout=names) if t.heldout]

    assert held() == []
    assert held("a2") == ["a2"]
    assert held("of a1", "b1") == ["a1", "b1"]
    with pytest.raises(DataError) as error:
        held("a1", "x", "y")
    assert str(error.value) == (
        "--heldout-subjects x, y: no such task or subject; there are a1, a2, b1, of a1, of a2, "
        "of b1"
    )
    with pytest.raises(DataError, match="^every task is held out: nothing is left to train on$"):
        held("a1", "a2", "of b1")
    many = named_tasks(*(f"t{i:02}" for i in range(30)))
    with pytest.raises(DataError) as error:
        data._hold_out(many, ["x"])
    assert str(error.value).endswith(", t17, t18")  # 20 names, the first is "of t"
    assert [t.name for t in data._hold_out(many, ["t03"]) if t.heldout] == ["t03"]


def test_prepared_folders_that_lack_something(tmp_path):
    """A task's name is its subject's where the files have that name, else theirs."""
    tasks = named_tasks("One two", "b")
    tasks[0] = data.replace(tasks[0], name="Of O")
    for t in tasks:
        for rows in (t.support, t.query, t.test):
            rows[:] = [data.replace(e, response="\\boxed{1}", answer="1") for e in rows]
    folder = tmp_path / "p"
    data.write_prepared(tasks, folder)
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.parquet"))
    assert files == [
        "few_shot_eval/b_test.parquet", "few_shot_eval/of_o_test.parquet",
        "meta_train/b_query.parquet", "meta_train/b_support.parquet",
        "meta_train/of_o_query.parquet", "meta_train/of_o_support.parquet",
    ]  # fmt: skip
    read = load_tasks(str(folder))
    assert [t.name for t in read] == ["b", "of O"]
    for t in read:
        assert [len(rows) for rows in (t.support, t.query, t.test)] == [2] * 3
    assert data.validate(folder) == []
    first, second = (data.replace(tasks[0].support[0], subject=name) for name in ("S!", "S?"))
    two = Task("S!", [first, second], [first], tasks[0].test)
    data.write_prepared([two], tmp_path / "two")
    assert [t.name for t in load_tasks(str(tmp_path / "two"))] == ["s_"]
    shared = data.replace(tasks[1].test[0], id="another")
    for name in ("support", "query"):  # what is tested is not trained on
        rows = [*getattr(tasks[1], name), shared]
        data.write_prepared([data.replace(tasks[1], **{name: rows})], tmp_path / name)
        (task,) = load_tasks(str(tmp_path / name))
        assert [len(rows) for rows in (task.support, task.query, task.test)] == [2] * 3, name
    (folder / "few_shot_eval" / "b_test.parquet").unlink()
    with pytest.raises(DataError) as error:
        load_tasks(str(folder))
    assert str(error.value) == f"{folder}: few_shot_eval/b_test.parquet is missing"
    assert data.validate(folder) == ["few_shot_eval/b_test.parquet: missing"]
    for file in folder.glob("meta_train/*_support.parquet"):
        file.unlink()
    with pytest.raises(DataError) as error:
        load_tasks(str(folder))
    assert str(error.value) == f"{folder / 'meta_train'}: no *_support.parquet file"
    assert data.slug("A b/c: & D.e-f_9") == "a_b_c_&_d.e-f_9"


# --------------------------------------------------------------------------------------------------
# Episodes


def test_support_in_passes():
    """Each pass in a new order; of `shots` different rows."""
    rows = of_levels(l0=5)

    def ids(size: int, shots: int = 0, seed: int = 0) -> list[str]:
        return [e.id for e in data.draw_support(random.Random(seed), rows, size, shots)]

    everything = {e.id for e in rows}
    drawn = ids(13)
    assert len(drawn) == 13
    assert set(drawn[:5]) == set(drawn[5:10]) == everything
    assert len(set(drawn[10:])) == 3
    assert drawn[:5] != drawn[5:10]
    assert len(set(ids(4))) == 4
    assert ids(13) == drawn
    assert ids(13, seed=1) != drawn
    few = ids(7, shots=3)
    assert len(few) == 7
    assert set(few[:3]) == set(few[3:6]) == set(few)
    assert len(set(few)) == 3
    assert set(ids(12, shots=9)) == everything
    chosen = {frozenset(ids(2, shots=2, seed=seed)) for seed in range(100)}
    assert len(chosen) == 10, "every pair of five"


def test_places_of_a_meta_batch():
    """Three tasks, seven places: each task once before one comes again."""
    tasks = named_tasks("a", "b", "c")
    episodes = [data.sample_episode(tasks, 1, 0, place, 3, 2) for place in range(7)]
    names = [episode.task for episode in episodes]
    assert set(names[:3]) == set(names[3:6]) == {"a", "b", "c"}
    for episode in episodes:
        (task,) = (t for t in tasks if t.name == episode.task)
        assert len(episode.support) == 3
        assert {e.id for e in episode.support} == {e.id for e in task.support}
        assert sorted(e.id for e in episode.query) == sorted(e.id for e in task.query)
    orders = set()
    for seed, step in ((1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)):
        places = [data.sample_episode(tasks, seed, step, place, 1, 1).task for place in range(3)]
        orders.add("".join(places))
    assert len(orders) > 2
    shots = data.sample_episode(tasks, 1, 0, 0, 6, 1, shots=1).support
    assert len({e.id for e in shots}) == 1
    assert len(shots) == 6
    same_task = [data.sample_episode(tasks[:1], 1, 0, place, 2, 1) for place in range(40)]
    assert len({episode.query[0].id for episode in same_task}) == 2
    assert len({episode.support[0].id for episode in same_task}) == 2


def ten_tokens(*names: str, heldout: str = "") -> list[Task]:
    """Tasks with 6 support, 3 query and 2 test rows."""
    tasks = []
    for name in names:
        rows = [Example(f"{i}?", f"\\boxed{{{i}}}", str(i), "", 0, f"{name}{i}") for i in range(11)]
        tasks.append(Task(name, rows[:6], rows[6:9], rows[9:], name in heldout))
    return tasks


def test_what_there_is_for_episodes():
    """The reports word for word; a task with just enough rows serves, a held-out one needs no
    query rows."""
    _, tokenizer = load_config("tiny")
    tasks = ten_tokens("a", "b", "c", heldout="b")

    def episode_tasks(*sizes, tasks=tasks, **more):
        return data.episode_tasks(tokenizer, tasks, 99, *sizes, **more)

    train, test, tokens, report = episode_tasks(3, 2, 3, 0)
    assert [t.name for t in train] == ["a", "c"]
    assert [t.name for t in test] == ["b"]
    assert len(tokens) == 33
    assert report == "3 tasks (1 held out), 33 sequences; 0 over 99 tokens left out"
    more = "; 3 tasks have fewer than {} support rows and go through them more than once"
    assert episode_tasks(7, 1, 3, 0)[3] == report + more.format(7)
    assert episode_tasks(2, 4, 3, 0)[3] == report + more.format(8)
    assert episode_tasks(7, 1, 3, 0, shots=6)[3] == report
    assert episode_tasks(8, 1, 3, 0, shots=7)[3] == report + more.format(7)
    assert episode_tasks(3, 2, 3, 0, shots=20)[3] == report
    whole = tasks[0]
    one_short = [data.replace(whole, support=whole.support[:5]), *tasks[1:]]
    assert episode_tasks(3, 2, 3, 0, tasks=one_short)[3] == report.replace("33", "32") + (
        "; 1 tasks have fewer than 6 support rows and go through them more than once"
    )
    assert [t.name for t in episode_tasks(1, 6, 3, 1, tasks=ten_tokens("x", "y"))[1]] == ["x"]
    queryless = [whole, data.replace(tasks[1], query=[])]
    assert episode_tasks(1, 6, 3, 0, tasks=queryless)[1][0].name == "b"
    needs = "; it needs {} support, {} query and 1 test: fewer rows in an episode, more rows in "
    needs += "the file, or other ratios"
    for task, sizes, has in (
        (whole, (1, 7, 3), "6 support, 3 query and 2 test"),
        (whole, (1, 6, 4), "6 support, 3 query and 2 test"),
        (data.replace(whole, test=[]), (1, 6, 3), "6 support, 3 query and 0 test"),
    ):
        with pytest.raises(DataError) as error:
            episode_tasks(*sizes, 0, tasks=[task])
        assert str(error.value) == f"task a has {has} rows" + needs.format(*sizes[1:])


def test_long_rows_are_left_out():
    _, tokenizer = load_config("tiny")
    (task,) = ten_tokens("a")
    long = [Example("x" * 200, "y", "y", "", 0, f"long{i}") for i in range(3)]
    task = data.replace(task, support=[*task.support, *long[:2]], test=[long[2], *task.test])
    (kept,), _, tokens, report = data.episode_tasks(tokenizer, [task], 40, 1, 6, 3, 0)
    assert [len(kept.support), len(kept.query), len(kept.test)] == [6, 3, 2]
    assert report == "1 tasks (0 held out), 11 sequences; 3 over 40 tokens left out"
    with pytest.raises(DataError) as error:
        data.episode_tasks(tokenizer, [task], 40, 1, 7, 3, 0, limit="--size")
    assert "2 test rows (3 are over the 40 tokens of --size); it needs 7" in str(error.value)
    assert data.encode(tokenizer, [], 40) == ({}, 0)


def test_what_a_dry_run_says_of_the_data():
    a, b, c = ten_tokens("a", "b", "c", heldout="bc")
    tokens = {str(i): Encoded([0] * n, 1) for i, n in enumerate((10, 20, 90))}
    assert data.describe_tasks([a], [b, a, c], tokens, 300) == (
        "  a: 6 support, 3 query, 2 test\n"
        "  b (held out): 6 support, 3 query, 2 test\n"
        "  c (held out): 6 support, 3 query, 2 test\n"
        "about 12,000 tokens per step; mean sequence 40, longest 90"
    )
    assert data.response_tokens([Encoded([0] * 7, 3), Encoded([0] * 5, 5)]) == 4


def test_batches():
    """Right padding; labels are the responses alone; lengths are multiples of 4, of 32 above 32, or
    of what is asked for."""
    rows = [Encoded([5, 6, 7], 1), Encoded([8, 9, 1, 2, 3], 3)]
    batch = data.collate(rows, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0, 0, 0, 0], [8, 9, 1, 2, 3, 0, 0, 0]]
    none = -100
    assert batch["labels"].tolist() == [
        [none, 6, 7, none, none, none, none, none],
        [none, none, none, 2, 3, none, none, none],
    ]
    assert data.collate(rows, 4, 6)["input_ids"].tolist()[0] == [5, 6, 7, 4, 4, 4]
    widths = {}
    for length in (1, 4, 5, 32, 33, 64, 65):
        widths[length] = data.collate([Encoded([7] * length, 1)], 0)["labels"].shape[1]
    assert widths == {1: 4, 4: 4, 5: 8, 32: 32, 33: 64, 64: 64, 65: 96}
    assert data.collate([Encoded([7] * 33, 1)], 0, 8)["labels"].shape[1] == 40


# --------------------------------------------------------------------------------------------------
# Templates


class Words:
    """A tokenizer of one number a word, with a template."""

    chat_template = "{}"
    bos_token, eos_token_id = "<s>", 2
    all_special_ids = [2, 3]
    added_tokens_decoder = {3: "<end>"}
    known = {"<end>": 3, "</s>": 2}

    def __init__(self, opening: str = "A:", closing: str = "<end>"):
        self.opening, self.closing = opening, closing

    def get_chat_template(self) -> str:
        return "{}"

    def apply_chat_template(self, messages, **_) -> str:
        text = "<s>"
        for message in messages:
            if message["role"] == "user":
                text += f"Q:{message['content']} ;"
            else:
                text += f"{self.opening}{message['content']} {self.closing} "
        return text

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        if isinstance(text, list):
            return {"input_ids": [self(t, False)["input_ids"] for t in text]}
        return {"input_ids": [self.known.get(word, 10 + len(word)) for word in text.split()]}


def test_parts_of_a_template():
    """What stands before and after the prompt, the first token of the end of a turn; what ends a
    response is that or the end of the sequence."""
    chat = data.template(Words())
    assert chat == ("<s>Q:", " ;A:", [3], frozenset({2, 3}))
    assert data.template(Words(closing="</s> <end>")) == ("<s>Q:", " ;A:", [2], frozenset({2}))
    assert data.template(Words(closing="bye")).end == [2]  # a word ends nothing
    no_eos = Words(closing="bye")
    no_eos.eos_token_id = None
    assert data.template(no_eos) == ("<s>Q:", " ;A:", [13], frozenset({13}))
    assert data.template(Words(closing="")).end == [2]
    no_eos.closing = ""
    message = "^the tokenizer's chat template has no generation prompt or no end of turn$"
    for broken in (Words(opening=""), no_eos):
        with pytest.raises(DataError, match=message):
            data.template(broken)
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert data.prompt_texts(Words(), [talk[:1], [*talk, talk[0]]]) == [
        "<s>Q:x ;A:", "<s>Q:x ;A:y <end> Q:x ;A:",
    ]  # fmt: skip


def test_without_a_template():
    """Problem and solution, behind the token that begins a text where there is one."""
    plain = Words()
    plain.chat_template = None
    assert data.template(plain) == ("<s>Problem: ", "\nSolution: ", [2], frozenset({2}))
    talk = [
        {"role": "system", "content": "Think."}, {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"},
    ]  # fmt: skip
    assert data.prompt_texts(plain, [talk, talk[1:2]]) == [
        "<s>Think.\nProblem: x\nSolution: y\nProblem: z\nSolution: ",
        "<s>Problem: x\nSolution: ",
    ]
    plain.bos_token = None
    assert data.template(plain).before == "Problem: "
    assert data.prompt_texts(plain, [talk[1:2]]) == ["Problem: x\nSolution: "]
    plain.eos_token_id = None
    with pytest.raises(DataError, match="no end-of-sequence token and no chat template"):
        data.template(plain)


def test_templates_that_fail_are_told_briefly():
    broken = Words()
    for error, said in (
        (ValueError("one\ntwo"), "one"), (KeyError(), "KeyError"),
        (ValueError("x" * 300), "x" * 200),
    ):  # fmt: skip

        def fail(*_, error=error, **__):
            raise error

        broken.apply_chat_template = fail
        with pytest.raises(DataError) as caught:
            data.template(broken)
        assert str(caught.value) == f"the tokenizer's chat template fails: {said}"


# --------------------------------------------------------------------------------------------------
# python data.py


def test_what_preparing_says(tmp_path, capsys):
    """The table of sizes, the number of files; a split that stays empty is named."""
    lines_of(tmp_path, "a.jsonl", 0, 20, "a")
    lines_of(tmp_path, "b.jsonl", 20, 60, "longer name")
    folder = tmp_path / "out"
    args = data.Args(str(folder), str(tmp_path), max_samples=-1, validate=True)
    assert data.main(args) == 0
    assert capsys.readouterr().out == (
        "task         support    query     test    total\n"
        "a                  6        8        6       20\n"
        "longer name       12       16       12       40\n"
        f"wrote 6 files to {folder}\n"
        f"{folder}: valid\n"
    )
    rows = pyarrow.parquet.read_table(folder / "meta_train" / "a_query.parquet").to_pylist()
    assert len(rows) == 8
    row = rows[0]
    number = int(row["prompt"].split()[2])
    assert row["response"] == f"\\boxed{{{number + 1}}}"
    assert json.loads(row["metadata"]) == {
        "subject": "of a", "level": 1 + number % 2, "answer": str(number + 1), "task": "a",
    }  # fmt: skip
    args = data.Args(str(tmp_path / "few"), str(tmp_path), max_samples=10)
    assert data.main(args) == 0
    totals = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:3]]
    assert totals == ["10", "10"]
    (tmp_path / "in").mkdir()
    lines_of(tmp_path / "in", "b.jsonl", 0, 20, "b")
    with pytest.raises(DataError, match=r"an empty split: b \(test\); use fewer"):
        data.main(data.Args(str(tmp_path / "none"), str(tmp_path / "in"), query_ratio=0.7))
    for i in range(8):
        lines_of(tmp_path, f"few{i}.jsonl", 100 + 2 * i, 102 + 2 * i, f"few{i}")
    with pytest.raises(DataError) as error:
        data.main(data.Args(str(tmp_path / "none"), str(tmp_path)))
    assert str(error.value) == (
        "an empty split: few0 (support), few0 (test), few1 (support), few1 (test), few2 (support); "
        "use fewer tasks or other ratios"
    )
    assert not (tmp_path / "none").exists()


def test_faults_of_a_folder(tmp_path, capsys):
    """A line each, at most 50 of them; status 1."""
    folder = tmp_path / "p"
    assert data.validate(folder) == [
        f"{folder}: no parquet files under meta_train/ and few_shot_eval/"
    ]
    schema = pyarrow.schema([(c, pyarrow.string()) for c in ("prompt", "response", "metadata")])
    good = [{"prompt": f"p {i}", "response": "\\boxed{1}", "metadata": None} for i in range(3)]
    parts = {
        "meta_train/s_support": good,
        "meta_train/s_query": [
            {"prompt": "new", "response": "none", "metadata": "{}"},
            {"prompt": "", "response": "\\boxed{1}", "metadata": "{}"},
            {"prompt": "p\n1", "response": "\\boxed{1}", "metadata": "{}"},
        ],
        "few_shot_eval/s_test": [],
    }

    def write(name, rows, schema=schema):
        file = folder / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file)

    for name, rows in parts.items():
        write(name, rows)
    found = [
        "meta_train/s_query.parquet, row 1: no final answer in the response",
        "meta_train/s_query.parquet, row 2: empty prompt or response, or not text",
        "meta_train/s_support.parquet, row 2: the same problem is in meta_train/s_query.parquet",
        "few_shot_eval/s_test.parquet: no rows",
    ]
    assert data.validate(folder) == found
    assert data.main(data.Args(str(folder), validate_only=True)) == 1
    assert capsys.readouterr().out.splitlines() == found
    write("few_shot_eval/s_test", [{"prompt": "x", "note": "y"}], None)
    assert data.validate(folder)[-1] == (
        "few_shot_eval/s_test.parquet: missing columns response, metadata; found prompt, note"
    )
    for count, rest in ((49, ""), (50, "... and 1 more"), (52, "... and 3 more")):
        rows = [{"prompt": f"x {i}", "response": "no", "metadata": None} for i in range(count - 2)]
        write("few_shot_eval/s_test", rows)
        assert data.main(data.Args(str(folder), validate_only=True)) == 1
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == min(count + 1, 50) + bool(rest)
        assert not rest or lines[-1] == rest


def test_defaults_of_preparing():
    """What --help and docs/data.md say."""
    assert asdict(data.Args()) == {
        "output_dir": "math_meta", "data": "embedded", "task_column": None, "support_ratio": 0.3,
        "query_ratio": 0.4, "max_samples": 0, "seed": 42, "validate": False,
        "validate_only": False,
    }  # fmt: skip


def test_bounds_of_the_numbers():
    for settings, good in (
        ({"support_ratio": 1.0}, True), ({"support_ratio": 0.0}, False),
        ({"query_ratio": 1.0}, True), ({"query_ratio": 1.01}, False),
        ({"max_samples": -1}, True), ({"max_samples": -2}, False),
        ({"seed": -(10**18)}, True), ({"seed": 10**19}, False),
    ):  # fmt: skip
        if good:
            data.check_numbers(data.Args(**settings), data.NUMBERS)
            continue
        with pytest.raises(DataError):
            data.check_numbers(data.Args(**settings), data.NUMBERS)


def test_flags_of_preparing(tmp_path, capsys):
    """The seed, both ratios and the tasks' column are those of the split that is written."""
    file = lines_of(tmp_path, "a.jsonl", 0, 40, "a")
    settings = {"support_ratio": 0.2, "query_ratio": 0.5, "seed": 7, "task_column": "level"}
    assert data.main(data.Args(str(tmp_path / "out"), str(file), **settings)) == 0
    written = load_tasks(str(tmp_path / "out"))
    assert [(len(t.support), len(t.query), len(t.test)) for t in written] == [(4, 10, 6)] * 2
    expected = load_tasks(str(file), **settings)
    assert [t.name for t in expected] == ["1", "2"]
    for one, other in zip(written, expected, strict=True):
        assert texts_of(one.support + one.query) == texts_of(other.support + other.query)


def test_a_folder_is_checked_where_that_is_asked_for(tmp_path, capsys):
    """Responses without an answer: a fault to --validate alone."""
    rows = [{"problem": f"{i}?", "solution": "Yes", "subject": "s"} for i in range(20)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for flags, status in (({}, 0), ({"validate": True}, 1), ({"validate_only": True}, 1)):
        args = data.Args(str(tmp_path / "out"), str(tmp_path / "a.json"), **flags)
        assert data.main(args) == status
        out = capsys.readouterr().out
        assert ("no final answer" in out) == bool(status)
        assert ("wrote 3 files" in out) == ("validate_only" not in flags)


# --------------------------------------------------------------------------------------------------
# What the random numbers and the names depend on


def test_order_of_rows():
    """That of sha256 of "seed/problem", as `printf '42/1 + 1?' | sha256sum` says it: a split stays
    the same from version to version."""
    rows = [Example(f"{i} + {i}?", "", "", "", 0, str(i)) for i in range(1, 5)]
    assert [e.id for e in data.order_by_hash(42, rows)] == ["2", "4", "3", "1"]


def test_episodes_of_every_seed_step_and_place():
    """Other rows in each, and other orders of the tasks in each pass."""
    rows = of_levels(l0=60)
    task = Task("t", rows[:40], rows[40:], [])
    for part in ("support", "query"):
        found = set()
        for seed, step, place in itertools.product(range(3), repeat=3):
            episode = data.sample_episode([task], seed, step, place, 8, 8)
            found.add(tuple(e.id for e in getattr(episode, part)))
        assert len(found) == 27, part
    tasks = named_tasks(*"abcdefgh")

    def order(seed: int, step: int, a_pass: int) -> str:
        places = range(8 * a_pass, 8 * a_pass + 8)
        return "".join(data.sample_episode(tasks, seed, step, p, 1, 1).task for p in places)

    orders = {order(*key) for key in itertools.product(range(3), repeat=3)}
    assert len(orders) == 27
    assert {"".join(sorted(names)) for names in orders} == {"abcdefgh"}


def test_which_column_names_the_task():
    """The first of task, subject, type that is there; it is also the subject's, if need be."""
    row = {"problem": "1 + 1?", "solution": "\\boxed{2}"}
    for columns, name, subject in (
        ({"type": "U", "subject": "S", "task": "T"}, "T", "S"),
        ({"type": "U", "subject": "S"}, "S", "S"),
        ({"type": "U", "task": "T"}, "T", "U"),
        ({"type": "U"}, "U", "U"),
    ):
        ((found, example),) = data.to_examples([row | columns], "f", None)
        assert (found, example.subject) == (name, subject)


def test_a_task_of_the_test_file_alone(tmp_path):
    """It is there, without rows to learn from; names are in order."""
    (tmp_path / "in").mkdir()
    lines_of(tmp_path / "in", "train.jsonl", 0, 10, "b")
    lines_of(tmp_path / "in", "test.jsonl", 20, 25, "a")
    assert sizes_of(load_tasks(str(tmp_path / "in"))) == {"a": (0, 5, False), "b": (8, 2, False)}
    assert [t.name for t in load_tasks(str(tmp_path / "in"))] == ["a", "b"]


def test_a_prepared_folder_without_the_column(tmp_path):
    lines_of(tmp_path, "a.jsonl", 0, 20, "a")
    data.write_prepared(load_tasks(str(tmp_path / "a.jsonl")), tmp_path / "out")
    assert len(load_tasks(str(tmp_path / "out"), task_column="level")) == 1
    with pytest.raises(DataError, match="missing column colour"):
        load_tasks(str(tmp_path / "out"), task_column="colour")


SUBJECTS = {
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
    "prealgebra", "precalculus",
}  # fmt: skip


def test_math_of_the_hub(monkeypatch):
    """Its seven configurations; what is there for the test is the test split."""
    asked = []

    def tables(name, config):
        asked.append((name, config))
        parts = {}
        for part, numbers in (("test", range(20, 24)), ("train", range(10))):
            rows = []
            for i in numbers:
                row = {"problem": f"{config} {i}", "solution": "\\boxed{1}", "kind": f"k{i % 2}"}
                rows.append(row | {"type": config.upper(), "level": "Level 2"})
            parts[part] = rows
        return parts

    monkeypatch.setattr(data, "hub_tables", tables)
    tasks = load_tasks("hub")
    assert {config for _, config in asked} == SUBJECTS
    assert {name for name, _ in asked} == {"EleutherAI/hendrycks_math"}
    assert sizes_of(tasks) == {name.upper(): (10, 4, False) for name in SUBJECTS}
    assert set(sizes_of(load_tasks("hub", max_samples=6)).values()) == {(6, 4, False)}
    kinds = load_tasks("hub", task_column="kind", heldout=("k1",))
    assert sizes_of(kinds) == {"k0": (35, 14, False), "k1": (35, 14, True)}
    assert load_tasks("hub", seed=1) != tasks


# --------------------------------------------------------------------------------------------------
# Ends of turns, and the day


def test_marks_that_end_a_turn():
    """A token that was added to the tokenizer, or one that it calls special: each alone is enough;
    beside it the end of the sequence stops a response."""
    tokenizer = Words(closing="<eot>")
    tokenizer.known = Words.known | {"<eot>": 4}
    assert data.template(tokenizer).end == [2]  # it is a word as others
    tokenizer.all_special_ids = [2, 4]
    assert data.template(tokenizer)[2:] == ([4], frozenset({2, 4}))
    tokenizer.all_special_ids, tokenizer.added_tokens_decoder = [2], {4: "<eot>"}
    assert data.template(tokenizer)[2:] == ([4], frozenset({2, 4}))


@pytest.mark.parametrize(
    "asks",
    [
        "{{ strftime_now('%d %b %Y') }}",
        '{{ strftime_now( "%d %b %Y" ) }}',
        "{{ date_string }}",
        "{{ strftime_now('%d') }} {{ strftime_now(\"%b\") }} {{ strftime_now('%Y') }}",
    ],
)
def test_the_day_of_a_template(asks):
    """26 July 2024, which Llama 3's templates name where nobody tells them the day."""
    _, tokenizer = load_config("tiny")
    messages = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    opening = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer.chat_template = f"Today: {asks}\n" + messages + opening
    chat = data.template(tokenizer)
    assert chat.before == "Today: 26 Jul 2024\n<|user|>"
