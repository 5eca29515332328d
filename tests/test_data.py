"""data.py: splits, episodes, files in every format, tokens and the loss mask."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

import data
from data import DataError, Example, load_tasks
from games.problems import load_problems
from model import load_config
from tests.helpers import SHARED, needs_shared


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
