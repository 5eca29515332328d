"""sources.py: every form that people keep their data in, and broken twins of each."""

import csv
import gzip
import json
import os
import re
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import data
from data import DataError, load_tasks, local_rows
from games.problems import _source, load_problems
from model import load_config
from sources import (
    Columns,
    cell_of,
    find_columns,
    given_answer,
    hub_tables,
    local_tables,
    present,
    read_rows,
    read_tables,
    reason_of,
    texts_of,
)
from tests.helpers import ROOT

TEXTS = [
    ("What is 3 + 4?", "3 + 4 = 7. \\boxed{7}", "7"),
    ("What is 6 * 7?", "Six sevens are forty-two: \\boxed{42}", "42"),
    ("What is é - 4, if é = 9?", "9 - 4 = 5, so\n\\boxed{5}", "5"),
]


def chat(*turns: str, names=("user", "assistant"), keys=("role", "content")) -> list[dict]:
    return [dict(zip(keys, (names[i % 2], text), strict=True)) for i, text in enumerate(turns)]


def worked(response: str, answer: str) -> str:
    """As in GSM8K."""
    return f"{response.replace(chr(92) + 'boxed', '')} #### {answer}"


# {form: row of (prompt, response, answer)}
FORMS = {
    "MATH": lambda p, r, a: {"problem": p, "level": "Level 3", "type": "S", "solution": r},
    "NuminaMath": lambda p, r, a: {"problem": p, "solution": r, "answer": a, "messages": chat("x")},
    "DeepMath": lambda p, r, a: {"question": p, "final_answer": a, "r1_solution_1": r},
    "MetaMath": lambda p, r, a: {"query": p, "response": r, "original_question": "x"},
    "Alpaca": lambda p, r, a: {"instruction": p, "input": "", "output": r},
    "prompt and completion": lambda p, r, a: {"prompt": p, "completion": r},
    "messages": lambda p, r, a: {"messages": chat(p, r)},
    "ShareGPT": lambda p, r, a: {
        "conversations": [{"from": "system", "value": ""}]
        + chat(p, r, names=("human", "gpt"), keys=("from", "value"))
    },
    "OpenR1": lambda p, r, a: {
        "prompt": [{"role": "system", "content": "Think."}, *chat(p)],
        "target": [{"role": "assistant", "content": r}],
        "reward_model": {"style": "rule", "ground_truth": a},
    },
    "verl": lambda p, r, a: {
        "data_source": "x",
        "prompt": chat(p),
        "reward_model": {"style": "rule", "ground_truth": a},
        "extra_info": {"index": 0, "answer": r, "question": "x"},
    },
}
FLAT = ("MATH", "DeepMath", "MetaMath", "Alpaca", "prompt and completion")


def rows_of(form: str) -> list[dict]:
    return [FORMS[form](*texts) for texts in TEXTS]


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_gz(path, rows):
    with gzip.open(path, "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))


def save_to_disk(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


# {name in a folder: writer}
FILES = {
    "a.jsonl": write_lines,
    "lines.json": write_lines,
    "a.parquet": write_parquet,
    "a.jsonl.gz": write_gz,
    "a.csv": write_csv,
    "list.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "data.json": lambda path, rows: path.write_text(json.dumps({"data": rows})),
    "train.json": lambda path, rows: path.write_text(json.dumps({"train": rows})),
    "mark.jsonl": lambda path, rows: path.write_text(
        "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    ),
    "mark.json": lambda path, rows: path.write_text("\ufeff" + json.dumps(rows), encoding="utf-8"),
    "saved": save_to_disk,
}


def read(path, task_column: str | None = "") -> list[tuple]:
    """(prompt, response, answer) of each row."""
    rows, test = local_rows(str(path), task_column)
    assert not test
    return [(e.prompt, e.response, e.answer) for _, e in rows]


def one_line(path, task_column: str | None = "") -> str:
    with pytest.raises(DataError) as caught:
        read(path, task_column)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form):
    names = ["a.jsonl", "a.parquet", "list.json"]
    if form in FLAT:
        names.append("a.csv")
    for name in names:
        FILES[name](tmp_path / name, rows_of(form))
        assert read(tmp_path / name) == TEXTS, name


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    FILES[name](tmp_path / name, rows_of("MATH"))
    assert read(tmp_path / name) == TEXTS
    long = rows_of("MATH")[0] | {"problem": "x" * 1_000_000, "target": "not this"}
    FILES[name](tmp_path / f"long-{name}", [long])
    assert read(tmp_path / f"long-{name}") == [(long["problem"], *TEXTS[0][1:])]
    [task] = load_tasks(str(tmp_path / name), support_ratio=0.4, query_ratio=0.3)
    assert task.name == "S"
    assert {e.level for e in task.support + task.query + task.test} == {3}


def test_gsm8k(tmp_path):
    """The response is the worked answer, the final answer what stands behind ####."""
    texts = [*TEXTS, ("Which letter?", "Of $2$ and $y$ it is the last.", "y")]
    rows = [{"question": p, "answer": worked(r, a)} for p, r, a in texts]
    write_lines(tmp_path / "a.jsonl", rows)
    assert read(tmp_path / "a.jsonl") == [(p, worked(r, a), a) for p, r, a in texts]
    choices = [row | {"choices": ["x", "y"]} for row in rows]  # its answer is a letter
    write_lines(tmp_path / "b.jsonl", choices)
    assert "missing column solution" in one_line(tmp_path / "b.jsonl")


def test_conversations_of_several_turns(tmp_path):
    system = [{"role": "system", "content": "Be brief."}]
    rows = [
        {"messages": system + chat("2 + 3?", "5", "Doubled?", "\\boxed{10}", "Thanks.")},
        {"messages": chat("1 + 1?", "\\boxed{2}")},
    ]
    write_lines(tmp_path / "a.jsonl", rows)
    assert read(tmp_path / "a.jsonl") == [
        ("User: 2 + 3?\n\nAssistant: 5\n\nUser: Doubled?", "\\boxed{10}", "10"),
        ("1 + 1?", "\\boxed{2}", "2"),
    ]
    for broken in (
        chat("no answer"),
        chat("x", names=("assistant",)),
        chat("x", "{}", "y", "z", names=("user", "tool")),
        chat("x", 5),
        chat("x", "y", keys=("speaker", "text")),
        "x",
        None,
        [None, 5],
        [],
    ):
        write_lines(tmp_path / "b.jsonl", [rows[0], {"messages": broken}])
        assert "b.jsonl, row 2: messages and subject must be" in one_line(tmp_path / "b.jsonl")


def test_what_is_given_stands_in_the_prompt(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "3, 4", "output": "\\boxed{7}"},
        {"instruction": "Say 5.", "input": None, "output": "\\boxed{5}"},
    ]
    write_lines(tmp_path / "a.jsonl", rows)
    assert [prompt for prompt, *_ in read(tmp_path / "a.jsonl")] == ["Add.\n\n3, 4", "Say 5."]
    dolly = [{"instruction": "Who?", "context": "It is Ada.", "response": "Ada"}]
    write_lines(tmp_path / "b.jsonl", dolly)
    assert read(tmp_path / "b.jsonl")[0][0] == "Who?\n\nIt is Ada."


def sizes(path) -> tuple[int, int]:
    return tuple(map(len, local_rows(str(path), None)))


def test_folders(tmp_path):
    """What `datasets` saves, the hub keeps, MATH is, and data.py writes."""
    rows = [FORMS["MATH"](f"{i} + 1?", f"\\boxed{{{i + 1}}}", "") for i in range(9)]
    both = {"train": datasets.Dataset.from_list(rows[:6]), "test": rows[6:]}
    both["test"] = datasets.Dataset.from_list(rows[6:])
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "dict" / "train" / "cache-1f.arrow").write_text("of map()")
    write_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet", rows[:6])
    write_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", rows[6:])
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    (tmp_path / "hub" / ".cache").mkdir()
    (tmp_path / "hub" / ".cache" / "x.json").write_text("{}")
    for i, row in enumerate(rows):
        folder = tmp_path / "MATH" / ("train" if i < 6 else "test") / "algebra"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.json").write_text(json.dumps(row, indent=1))
    (tmp_path / "json").mkdir()
    parts = {"train": rows[:6], "test": rows[6:]}
    (tmp_path / "json" / "a.json").write_text(json.dumps(parts))
    (tmp_path / "dev.json").write_text(json.dumps(parts | {"validation": rows[6:]}))
    splits = [(source[-10:], is_test) for source, is_test, _ in local_tables(tmp_path / "dev.json")]
    assert splits == [("json/train", False), (".json/test", True), ("validation", False)]
    for name in ("dict", "hub", "MATH", "json"):
        assert sizes(tmp_path / name) == (6, 3), name
        [task] = load_tasks(str(tmp_path / name))
        assert {e.prompt for e in task.test} == {row["problem"] for row in rows[6:]}, name
    assert sizes(tmp_path / "MATH" / "test") == (3, 0)
    assert len(read_rows(tmp_path / "json" / "a.json")) == 9

    data.write_prepared(load_tasks(str(tmp_path / "hub")), tmp_path / "prepared")
    assert sizes(tmp_path / "prepared") == (6, 3)
    (tmp_path / "empty").mkdir()
    assert "empty: no .json, .jsonl" in one_line(tmp_path / "empty")


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "a.jsonl", rows_of("MATH"))
    assert read("~/a.jsonl") == TEXTS
    assert len(load_tasks("~/a.jsonl")) == 1
    assert data.main(data.Args("~/out", "~/a.jsonl", validate=True)) == 0
    assert len(load_tasks("~/out")) == 1
    assert (tmp_path / "out").is_dir()
    for nothing in ("", "~/nothing.jsonl", "~nobody-here/x"):
        assert "no such file or folder" in one_line(nothing)


def test_hub(monkeypatch):
    """OpenR1's rows: without the system prompt, numbered, with the answer of the reward model."""
    table = datasets.Dataset.from_list(rows_of("OpenR1"))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: {"train": table})
    examples, tests = _source("hub", 10, 42)
    assert not tests
    assert [(e.prompt, e.response, e.answer) for e in examples] == TEXTS
    assert [(e.id, e.subject, e.level) for e in examples][1:] == [
        ("hub/1", "math", 0),
        ("hub/2", "math", 0),
    ]
    rows = [FORMS["MATH"](f"{i} + 1?", f"\\boxed{{{i + 1}}}", "") for i in range(9)]
    tables = {"train": datasets.Dataset.from_list(rows[:6])}
    tables["test"] = datasets.Dataset.from_list(rows[6:])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: tables)
    train, test = data.hub_rows(None)
    assert (len(train), len(test)) == (7 * 6, 7 * 3)
    assert train[0][1].id == "hub/algebra/train/0"


def test_examples_of_the_page_are_read(tmp_path):
    """Each block of JSON in docs/data.md that is training data."""
    page = (ROOT / "docs" / "data.md").read_text().partition("## Benchmarks for eval.py")[0]
    blocks = re.findall(r"\n\n((?:    [^\n]*\n)+)", page)
    read_blocks = 0
    for block in blocks:
        text = block.strip()
        if text[0] not in "{[":
            continue
        rows = []
        while text:
            row, end = json.JSONDecoder().raw_decode(text)
            rows.append(row)
            text = text[end:].lstrip()
        path = tmp_path / "a.json"
        path.write_text(json.dumps(rows if len(rows) > 1 else rows[0]))
        column = "topic" if "topic" in rows[0] else ""
        train, test = local_rows(str(path), column)
        assert len(train) + len(test) == 3, block
        read_blocks += 1
    assert read_blocks >= 14


# --------------------------------------------------------------------------------------------------
# Broken


def outcome(path):
    """Rows, or one line: any other exception fails the test."""
    try:
        return read(path, None)
    except DataError as e:
        assert "\n" not in str(e)
        assert len(str(e)) < 500
        return str(e)


@pytest.mark.parametrize("name", FILES)
def test_cut_files(tmp_path, name):
    """Half a download, at many places; and bytes of something else."""
    whole = tmp_path / name
    FILES[name](whole, rows_of("MATH"))
    file = next(whole.glob("*.arrow")) if whole.is_dir() else whole
    content = file.read_bytes()
    for i in range(24):
        file.write_bytes(content[: i * len(content) // 24])
        got = outcome(whole)
        lines = name.endswith((".jsonl", "lines.json", ".csv"))
        assert isinstance(got, str) or (lines and len(got) < 3), (i, got)
    for noise in (b"\x00" * 90, bytes(range(256)), b"\xff\xfe{\x00", b"PAR1", content[::-1]):
        file.write_bytes(noise)
        assert isinstance(outcome(whole), str), noise
    spoilt = bytearray(content)
    spoilt[len(content) // 2] ^= 0xFF
    file.write_bytes(spoilt)
    outcome(whole)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in outcome(whole)


@pytest.mark.parametrize("form", FORMS)
def test_broken_rows(tmp_path, form):
    """Every column of a row in turn as something else; no row, one row, the same row, long ones."""
    rows = rows_of(form)
    path = tmp_path / "a.jsonl"
    for key in rows[1]:
        for odd in (None, 5, True, float("nan"), "", [], {}, [[]], [{}], ["71"], {"x": 1}, "\0"):
            write_lines(path, [rows[0], rows[1] | {key: odd}, rows[2]])
            outcome(path)
            write_lines(path, [row | {key: odd} for row in rows])
            outcome(path)
        write_lines(path, [{k: v for k, v in row.items() if k != key} for row in rows])
        outcome(path)
    write_lines(path, [])
    assert outcome(path) == f"{path} holds no rows"
    tasked = [row | {"subject": "S"} for row in rows]
    write_lines(path, tasked[:1])
    assert outcome(path) == TEXTS[:1]
    write_lines(path, tasked[:1] * 3)
    task = load_tasks(str(path))[0]
    assert len(task.support + task.query + task.test) == 1, "a problem is kept once"
    lone = json.dumps(tasked).replace("What is 6", "\\ud800 is 6")
    path.with_suffix(".json").write_text(lone)
    assert "row 2: \\ud800 is half a character" in outcome(path.with_suffix(".json"))
    long = json.dumps(tasked).replace("What is 6", "x" * 1_000_000)
    path.with_suffix(".json").write_text(long)
    assert len(outcome(path.with_suffix(".json"))[1][0]) > 1_000_000


def test_an_empty_subject_is_none(tmp_path):
    row = rows_of("MATH")[0] | {"task": "T"}
    write_lines(tmp_path / "a.jsonl", [row | {"subject": None}, row | {"subject": "U", "type": ""}])
    rows, _ = local_rows(str(tmp_path / "a.jsonl"), None)
    assert [(name, e.subject) for name, e in rows] == [("T", "S"), ("T", "U")]


def test_errors_name_the_place(tmp_path):
    row = json.dumps(rows_of("MATH")[0])
    deep = '{"problem": ' + "[" * 200_000 + "]" * 200_000 + "}"
    path = tmp_path / "a.jsonl"
    for line, said in (
        ('{"problem": ', "line 60, column 13: Expecting value"),
        ('{"problem": "\\ud800"}', "line 60: \\ud800 is half a character"),
        (deep, "line 60: nested too deeply"),
        ("5", "row 60 is no object with named columns"),
        ('{"problem": "x"}', "row 60: problem, solution and type must be non-empty text"),
        ('{"problem": [1], "solution": "x", "type": "S"}', "row 60: problem, solution and type"),
        ('{"problem": "x", "solution": "x", "type": NaN}', "row 60: problem, solution and type"),
        ('{"problem": "x", "solution": "x", "type": ["S"]}', "row 60: problem, solution and type"),
    ):
        path.write_text("\n".join([row] * 59 + [line]))
        assert said in one_line(path, None)
        assert str(path) in one_line(path, None)
    path.write_bytes(b"\n".join([row.encode()] * 59 + [b'{"problem": "\xe9"}']))
    assert "line 60: not encoded as UTF-8" in one_line(path)
    for content in ("5", '"abc"', "null", "[5]", "[null]", deep, '[{"problem": "x"}, [1]]'):
        (tmp_path / "a.json").write_text(content)
        assert "a.json: " in one_line(tmp_path / "a.json")
    write_lines(path, [{"text": "x", "label": 1}])
    message = "missing columns problem (or prompt), solution (or response); found: text, label"
    assert message in one_line(path)
    write_csv(tmp_path / "a.csv", rows_of("MATH"))
    with (tmp_path / "a.csv").open("a", encoding="utf-8") as file:
        file.write("a,b,c,d,e\n")
    assert "line 6: more fields than the first line names" in one_line(tmp_path / "a.csv")


def test_metadata(tmp_path):
    """A prepared file: the fields of its metadata are columns; a row may lack them."""
    whole = {"prompt": "1 + 1?", "response": "\\boxed{2}", "metadata": '{"subject": "S"}'}
    bare = {"prompt": "1 + 2?", "response": "\\boxed{3}", "subject": "S"}
    write_lines(tmp_path / "a.jsonl", [whole, bare])
    assert len(read(tmp_path / "a.jsonl", None)) == 2
    for broken in ("{", "5", "[]", '{"subject": "\\ud800"}', 5, {"subject": "S"}):
        write_lines(tmp_path / "a.jsonl", [whole, whole | {"metadata": broken}])
        said = one_line(tmp_path / "a.jsonl", None)
        assert "row 2: column metadata is not JSON" in said or "\\ud800" in said


# --------------------------------------------------------------------------------------------------
# Tables of files and folders, columns of a row


def test_reasons_are_short():
    half = UnicodeEncodeError("utf-8", "ab\ud83d", 2, 3, "surrogates not allowed")
    for error, said in (
        (RecursionError("maximum depth"), "nested too deeply"),
        (half, "\\ud83d is half a character, which is no text"),
        (ValueError("  \nfirst\nsecond"), "first"),
        (ValueError("x" * 201), "x" * 200),
        (KeyError(), "KeyError"),
        (ValueError(" "), "ValueError"),
    ):
        assert reason_of(error) == said


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def test_tables_of_json(tmp_path):
    """A list, "data", splits by any of their names, or one row: also a row with lists in it."""
    row, path = {"problem": "p", "solution": "s"}, tmp_path / "a.json"
    named = ("train", "test", "validation", "valid", "val", "dev")
    for content, tables in (
        ([row, row], {"": [row, row]}),
        ({"data": [row], "train": [row, row], "version": 2}, {"": [row]}),
        ({name: [row] for name in named}, {name: [row] for name in named}),
        ({"dev": [row], "notes": [row], "n": 1}, {"dev": [row]}),
        ({"notes": [row]}, {"": [{"notes": [row]}]}),
        ({"train": {"a": 1}}, {"": [{"train": {"a": 1}}]}),
        (row, {"": [row]}),
        (row | {"test": ["x"]}, {"": [row | {"test": ["x"]}]}),
        ({"data": {"a": 1}}, {"": [{"data": {"a": 1}}]}),
        ([], {"": []}),
    ):
        assert read_tables(write_json(path, content)) == tables
    assert read_rows(write_json(path, {"train": [row], "test": [row | {"n": 1}]})) == [
        row, row | {"n": 1},
    ]  # fmt: skip
    for text, said in (
        ("[\n  {]", "line 2, column 4: Expecting property name enclosed in double quotes"),
        ("3", "it holds no list of rows"),
        ("[{}, 3]", "row 2 is no object with named columns"),
        ('[{}, {"a": "\\ud800"}]', "row 2: \\ud800 is half a character, which is no text"),
        ('{"a": 1}\n{"a": }', "line 2, column 7: Expecting value"),
        ("[1] [2]", "line 1, column 5: Extra data"),
    ):
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            read_tables(path)
        assert str(caught.value) == f"cannot read {path}: {said}"
    path.write_text(' {"a": 1}\n\n{"a": "\\u00e9"}\n')
    assert read_tables(path) == {"": [{"a": 1}, {"a": "é"}]}


def test_tables_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,"x\ny"\n2\n')
    assert read_tables(path) == {"": [{"a": "1", "b": "x\ny"}, {"a": "2", "b": None}]}
    path.write_bytes(b'a,b\r\n1,"x\r\ny"\r\n')
    assert read_tables(path) == {"": [{"a": "1", "b": "x\r\ny"}]}
    for text, said in (
        ("a,b\n1,2\n1,2,3\n", ": line 3: more fields than the first line names"),
        ('a,b\n1,2\n"1" x,2\n', ": line 3: ',' expected after '\"'"),
    ):
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            read_tables(path)
        assert str(caught.value) == f"cannot read {path}{said}"


def tables_of(path) -> list[tuple]:
    """(where below the path, whether it is of a test split, the number of rows)"""
    found = []
    for source, is_test, rows in local_tables(str(path)):
        found.append((source.removeprefix(f"{path}/"), is_test, len(rows)))
    return found


def test_tables_of_folders(tmp_path):
    """Of a test split: a file whose name begins with test, one in a folder of that name, a split of
    that name; where there is nothing else, these are rows as others. A folder's own files hide
    those below; hidden folders, caches and what tells about the data are no data."""
    row = {"problem": "p", "solution": "s"}
    deep = tmp_path / "deep"
    for name in (
        "b/train.json",
        "a/test/x.json",
        "few_shot_eval/y.json",
        ".git/z.json",
        "a/latest.json",
        "testing/x.json",
        "a/.cache/q/x.json",
        "a/state.json",
    ):
        (deep / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(deep / name, [row] * 2)
    (deep / "a" / "cache-1.arrow").write_text("")
    (deep / "a" / "readme.md").write_text("")
    (deep / "a" / "folder.json").mkdir()
    assert tables_of(deep) == [
        ("a/latest.json", False, 2), ("a/test/x.json", True, 2), ("b/train.json", False, 2),
        ("few_shot_eval/y.json", True, 2), ("testing/x.json", False, 2),
    ]  # fmt: skip
    assert tables_of(deep / "a" / "test") == [("x.json", False, 2)]
    write_json(deep / "tests.json", [row])
    write_json(deep / "dataset_info.json", [row])
    assert tables_of(deep) == [("tests.json", False, 1)]
    write_json(deep / "m.json", {"test": [row], "dev": [row] * 3})
    assert tables_of(deep) == [
        ("m.json/test", True, 1), ("m.json/dev", False, 3), ("tests.json", True, 1),
    ]  # fmt: skip
    write_json(deep / "m.json", {"test": [row]})
    assert tables_of(deep) == [("m.json/test", False, 1), ("tests.json", False, 1)]
    alone = deep / "tests.json"
    assert [source for source, *_ in local_tables(str(alone))] == [str(alone)]
    for nothing in ("", str(tmp_path / "none")):
        with pytest.raises(DataError) as caught:
            local_tables(nothing)
        assert str(caught.value).startswith(f"no such file or folder: {nothing} (--data takes ")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError) as caught:
        local_tables(str(tmp_path / "a.txt"))
    assert str(caught.value) == (
        f"{tmp_path / 'a.txt'}: no .json, .jsonl, .jsonl.gz, .parquet, .csv, .arrow file"
    )


def test_hub_that_fails(monkeypatch):
    def fail(name, config):
        raise ConnectionError(f"no {name}\n{config}")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    for config, words in ((None, ""), ("algebra", " (algebra)")):
        with pytest.raises(DataError) as caught:
            hub_tables("a/b", config)
        assert str(caught.value) == f"cannot load a/b{words} from the hub: no a/b"


def test_columns_of_a_row():
    """The first of the names that is there; a field of a column has a point before it."""
    nested = {"a": {"b": 1, "c": None}, "a.d": 2}
    assert present(nested, ("x", "a.z", "a.c", "a.b")) == "a.c"
    assert present(nested, ("a.d",)) == "a.d"
    assert present(nested, ("x.b", "b")) is None
    assert present({"a": "text"}, ("a.b",)) is None
    assert [cell_of(nested, name) for name in ("a.b", "a.c", "a.z", "a.d", "x.y", "a")] == [
        1, None, None, 2, None, nested["a"],
    ]  # fmt: skip
    chat = {"messages": []}
    for row, columns in (
        ({"input": 1, "problem": 2, "output": 3, "solution": 4}, ("problem", "solution")),
        ({"question": 1, "answer": 2}, ("question", "answer")),
        ({"question": 1, "answer": 2, "choices": 3}, ("question", None)),
        ({"question": 1, "answer": 2, "options": 3}, ("question", None)),
        ({"problem": 1, "answer": 2}, ("problem", None)),
        ({"question": 1, "extra_info": {"answer": 2}}, ("question", "extra_info.answer")),
        ({"question": 1, "answer": 3, "extra_info": {"answer": 2}}, ("question", "answer")),
        (chat, ("messages", "messages")),
        (chat | {"prompt": 1}, ("messages", "messages")),
        (chat | {"solution": 1}, ("messages", "messages")),
        (chat | {"prompt": 1, "solution": 1}, ("prompt", "solution")),
        ({}, (None, None)),
    ):
        assert find_columns(row) == Columns(*columns), row


def talk(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns]


def test_texts_of_a_row():
    """What is asked and what is answered, in every form; None where one is no text."""
    both = Columns("prompt", "response")
    conversation = Columns("messages", "messages")
    user, reply = ("user", "1 + 1?"), ("assistant", "2")
    parts = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]
    cases = [
        ({"prompt": "p", "response": "r"}, both, ("p", "r")),
        ({"prompt": "p", "response": " "}, both, None),
        ({"prompt": "p"}, both, None),
        ({"prompt": talk(user), "response": talk(reply)}, both, ("1 + 1?", "2")),
        ({"prompt": talk(reply), "response": talk(reply)}, both, None),
        ({"prompt": talk(user), "response": talk(user)}, both, None),
        ({"messages": talk(user, reply)}, conversation, ("1 + 1?", "2")),
        ({"messages": talk(user, reply, user, user)}, conversation, ("1 + 1?", "2")),
        ({"messages": talk(("developer", "x"), user, reply)}, conversation, ("1 + 1?", "2")),
        ({"messages": talk(user, user, reply)}, conversation, (
            "User: 1 + 1?\n\nUser: 1 + 1?", "2",
        )),
        ({"messages": talk(user, reply, reply)}, conversation, None),
        ({"messages": talk(reply)}, conversation, None),
        ({"messages": talk(user)}, conversation, None),
        ({"messages": talk(("robot", "x"), reply)}, conversation, None),
        ({"messages": talk(("user", parts), reply)}, conversation, ("1 + 1?", "2")),
        ({"messages": talk(("user", [*parts, "x"]), reply)}, conversation, None),
        ({"messages": "x"}, conversation, None),
        ({"instruction": "i", "input": "x", "context": "y", "output": "o"},
         Columns("instruction", "output"), ("i\n\nx\n\ny", "o")),
        ({"question": "q", "input": "", "context": "y", "answer": "o"},
         Columns("question", "answer"), ("q\n\ny", "o")),
        ({"instruction": "i", "input": 5, "output": "o"}, Columns("instruction", "output"), None),
        ({"problem": "i", "input": "x", "output": "o"}, Columns("problem", "output"), ("i", "o")),
    ]  # fmt: skip
    for row, columns, texts in cases:
        assert texts_of(row, columns) == texts, row
    names = {"from": "human", "value": "1?"}, {"from": "gpt", "value": "2"}
    assert texts_of({"messages": list(names)}, conversation) == ("1?", "2")


def test_given_answers_of_a_row():
    """The first column that gives one; a worked answer only behind ####."""
    columns = Columns("question", "answer")
    for row, answer in (
        ({"answer": "so it is 5"}, None),
        ({"answer": "so it is #### 5"}, "5"),
        ({"answer": "1 #### 2 #### 3 "}, "3"),
        ({"answer": "x", "ground_truth": 6}, "6"),
        ({"final_answer": None, "expected_answer": 2.5, "ground_truth": "4"}, "2.5"),
        ({"reward_model": {"ground_truth": ["a", None, "b"]}}, "a, b"),
        ({"final_answer": "Null"}, None),
        ({"final_answer": "NotFound", "ground_truth": 1}, ""),
        ({"final_answer": [[], [None]]}, None),
        ({"final_answer": False, "ground_truth": " x "}, " x "),
    ):
        assert given_answer(row, columns) == answer, row
    assert given_answer({"answer": "5"}, Columns("problem", "solution")) == "5"


# As docs/data.md lists them
PROMPT_COLUMNS = ["prompt", "problem", "question", "query", "instruction", "input"]
RESPONSE_COLUMNS = [
    "response", "solution", "target", "completion", "output", "generated_solution",
    "r1_solution_1", "extra_info.answer",
]  # fmt: skip
ANSWER_COLUMNS = [
    "answer", "final_answer", "expected_answer", "ground_truth", "reward_model.ground_truth",
]  # fmt: skip


def row_with(names: list[str]) -> dict:
    """A row with these columns; a point stands before a field of a column."""
    row = {}
    for i, name in enumerate(names):
        column, _, field = name.partition(".")
        row[column] = {field: str(i)} if field else str(i)
    return row


def test_order_of_the_columns():
    """Each name is one, and goes before all that follow in the documentation."""
    for i in range(len(PROMPT_COLUMNS)):
        there = row_with(PROMPT_COLUMNS[i:][::-1])
        assert find_columns(there).prompt == PROMPT_COLUMNS[i]
    for i in range(len(RESPONSE_COLUMNS)):
        there = row_with(RESPONSE_COLUMNS[i:][::-1])
        assert find_columns(there).response == RESPONSE_COLUMNS[i]
    columns = Columns("problem", "solution")
    for i in range(len(ANSWER_COLUMNS)):
        there = row_with(ANSWER_COLUMNS[i:])
        assert given_answer(there, columns) == "0", ANSWER_COLUMNS[i]
    both = {"conversations": 1, "messages": 2}
    assert find_columns(both) == Columns("messages", "messages")
    assert find_columns({"conversations": 1}) == Columns("conversations", "conversations")


def test_turns_that_are_none_spoil_a_conversation():
    """What stands between may matter: nothing is left out but system prompts."""
    user, reply = ("user", "1 + 1?"), ("assistant", "2")
    for turns in (
        talk(("robot", "x"), user, reply),
        talk(user, ("tool", "x"), user, reply),
        talk(("user", " "), user, reply),
        [None, *talk(user, reply)],
        [*talk(user), "x", *talk(reply)],
        talk(user, ("user", [{"type": "image"}]), reply),
    ):
        assert texts_of({"messages": turns}, Columns("messages", "messages")) is None
    assert given_answer({"answer": float("inf"), "final_answer": "3"}, Columns("a", "b")) == "3"


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    """Also where a program reads rows without asking for a folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_lines(tmp_path / "a.jsonl", [{"a": 1}])
    assert read_rows("~/a.jsonl") == [{"a": 1}]


def test_names_above_the_data_do_not_count(tmp_path):
    """A folder or file that is asked for by name may itself be called test; what lies in it is told
    apart all the same, in the order of its names."""
    row = {"problem": "p", "solution": "s"}
    folder = tmp_path / "test"
    folder.mkdir()
    names = [f"{word}.json" for word in ("b", "test-1", "a", "d", "c", "f", "e")]
    for name in [*names, "cache-x.json"]:
        write_json(folder / name, [row])
    assert tables_of(folder) == [
        (name, name == "test-1.json", 1) for name in sorted([*names, "cache-x.json"])
    ]
    below = tmp_path / "few_shot_eval"
    for name in names:
        (below / "x").mkdir(parents=True, exist_ok=True)
        write_json(below / "x" / name, [row])
    assert tables_of(below) == [(f"x/{name}", name == "test-1.json", 1) for name in sorted(names)]
    alone = write_json(tmp_path / "test.json", {"train": [row] * 2, "test": [row]})
    splits = [(is_test, len(rows)) for _, is_test, rows in local_tables(str(alone))]
    assert splits == [(False, 2), (True, 1)]


# --------------------------------------------------------------------------------------------------
# Answers, repeated problems, tasks that collide


def test_gold_answers(tmp_path):
    """What no response can earn is unwrapped, or none: then the solution's own answer counts, but
    not where the data say that there is none."""
    row = {"problem": "3 + 4?", "solution": "It is \\boxed{7}"}
    proof = {"problem": "Show it.", "solution": "As $x = 3$, it holds."}
    cases = [
        (["71"], "71"), ([["71"]], "71"), (71, "71"), ("71", "71"), (["2", "-2"], "2, -2"),
        ("3 and 4 make 7. #### 7", "7"), (0, "0"), ("True", "True"),
        (None, "7"), ("", "7"), (float("nan"), "7"), ("nan", "7"), ("None", "7"), ([], "7"),
        (True, "7"), ([None], "7"), (float("-inf"), "7"),
    ]  # fmt: skip
    path = tmp_path / "a.jsonl"
    write_lines(path, [row | {"answer": given} for given, _ in cases])
    assert [answer for *_, answer in read(path)] == [answer for _, answer in cases]
    write_lines(path, [proof | {"answer": given} for given in ("proof", "notfound", "Proof")])
    assert [answer for *_, answer in read(path)] == ["", "", ""]
    write_lines(path, [row, row | {"answer": {"value": 7}}])
    assert "row 2: the answer must be text or a number" in one_line(path)


def sums(first: int, last: int) -> list[dict]:
    rows = []
    for i in range(first, last):
        problem, solution = f"What is {i} + 1?", f"It is \\boxed{{{i + 1}}}"
        rows.append({"problem": problem, "solution": solution, "type": "S", "answer": str(i + 1)})
    return rows


def problems(path):
    """(training and validation texts, test texts, the report) of load_problems."""
    _, tokenizer = load_config("tiny")
    train, validation, tests, report = load_problems(
        str(path), tokenizer, validation=4, test=100, max_length=512
    )
    learnt = [e.prompt for e in train.examples + validation.examples]
    return learnt, [e.prompt for e in tests["test"].examples], report


def test_problems_of_the_test_are_not_trained_on(tmp_path):
    """Also where a space differs, and with --levels or --subjects that choose."""
    write_lines(tmp_path / "train.jsonl", sums(0, 60))
    spaced = [row | {"problem": row["problem"].replace(" + ", "  +\n")} for row in sums(0, 20)]
    write_lines(tmp_path / "test.jsonl", spaced)
    learnt, tested, report = problems(tmp_path)
    assert len(learnt) == 40
    assert len(tested) == 20
    assert "36 training problems, 4 for validation, 20 test;" in report
    assert "20 that occur twice or in the test left out" in report
    words = {" ".join(text.split()) for text in tested}
    assert words.isdisjoint(" ".join(text.split()) for text in learnt)

    write_lines(tmp_path / "twice.jsonl", sums(0, 60) * 3)
    learnt, tested, report = problems(tmp_path / "twice.jsonl")
    assert len({*learnt, *tested}) == len(learnt + tested) == 60
    assert "120 that occur twice" in report
    write_lines(tmp_path / "once.jsonl", sums(0, 60))
    assert "twice" not in problems(tmp_path / "once.jsonl")[2]
    write_lines(tmp_path / "same.jsonl", sums(0, 1) * 60)
    with pytest.raises(DataError, match="0 training problems"):
        problems(tmp_path / "same.jsonl")


def test_prepared_folders_do_not_train_on_their_test(tmp_path):
    tasks = [data.Task("S", *[[e for _, e in local_rows_of(tmp_path, 9)] for _ in range(2)], [])]
    test = tasks[0].support[:3]
    data.write_prepared([data.replace(tasks[0], test=test)], tmp_path / "prepared")
    [task] = load_tasks(str(tmp_path / "prepared"))
    assert [len(task.support), len(task.query), len(task.test)] == [6, 6, 3]


def local_rows_of(folder, count: int) -> list:
    write_lines(folder / "a.jsonl", sums(0, count))
    return local_rows(str(folder / "a.jsonl"), None)[0]


def test_demonstrations_that_earn_nothing_are_counted(tmp_path):
    rows = sums(0, 60)
    for row in rows[:6]:
        row["answer"] = "-1"
    write_lines(tmp_path / "train.jsonl", rows)
    write_lines(tmp_path / "test.jsonl", sums(60, 70))
    report = problems(tmp_path)[2]
    assert "6 of 60 demonstrations looked at do not give their own answer, as " in report
    assert "'-1'" in report
    write_lines(tmp_path / "train.jsonl", sums(0, 60))
    assert "demonstrations" not in problems(tmp_path)[2]


def test_tasks_that_share_a_file_are_refused(tmp_path):
    rows = []
    for i, subject in enumerate(("a/b", "a_b", "A/B") * 4):
        rows.append({"problem": f"{i}?", "solution": f"\\boxed{{{i}}}", "subject": subject})
    write_lines(tmp_path / "a.jsonl", rows)
    args = data.Args(str(tmp_path / "out"), str(tmp_path / "a.jsonl"), validate=True)
    with pytest.raises(DataError, match="'A/B' and 'a/b' would both be a_b in names of files"):
        data.main(args)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# python data.py


def test_validate_only_reports_odd_columns(tmp_path, capsys):
    rows = sums(0, 20)
    write_lines(tmp_path / "a.jsonl", rows)
    data.write_prepared(load_tasks(str(tmp_path / "a.jsonl")), tmp_path / "out")
    file = tmp_path / "out" / "meta_train" / "s_query.parquet"
    whole = pyarrow.parquet.read_table(file).to_pylist()
    write_parquet(file, [row | {"prompt": ["x", "y"]} for row in whole])
    assert "s_query.parquet, row 1: empty prompt or response, or not text" in data.validate(
        tmp_path / "out"
    )[0].replace("meta_train/", "")
    write_parquet(file, [row | {"metadata": "{"} for row in whole])
    faults = data.validate(tmp_path / "out")
    assert "meta_train/s_query.parquet, row 1: column metadata is not JSON" in faults
    capsys.readouterr()


def status_of(monkeypatch, capsys, *flags: str) -> tuple[int, str]:
    """Exit status and what is said on stderr."""
    monkeypatch.setattr(sys, "argv", ["data.py", *flags])
    try:
        status = data.cli()
    except SystemExit as e:  # tyro's own
        status = e.code
    return status, capsys.readouterr().err


def test_flags(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", sums(0, 20))
    here = ("--data", "a.jsonl", "--output-dir", "out")
    for flag in ("--support-ratio", "--query-ratio", "--max-samples", "--seed"):
        for value in ("-1", "0", "nan", "inf", "1e30", "word", "9" * 23):
            status, said = status_of(monkeypatch, capsys, *here, flag, value)
            assert status in (0, 2), (flag, value)
            assert "Traceback" not in said
            if flag.endswith("ratio"):
                assert status == 2, (flag, value)
                assert value == "word" or said.count("\n") == 1
    assert status_of(monkeypatch, capsys, *here, "--support-ratio", "0.9")[0] == 2  # 0.9 + 0.4
    for flags in (("--max-samples", "-2"), ("--seed", "9" * 23)):
        status, said = status_of(monkeypatch, capsys, *here, *flags)
        assert (status, said.count("\n")) == (2, 1), flags
    status, said = status_of(monkeypatch, capsys, "--output-dir", "")
    assert (status, said) == (2, "data.py: --output-dir must name a folder\n")
    assert status_of(monkeypatch, capsys, *here, "--validate") == (0, "")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load_tasks", interrupted)
    assert status_of(monkeypatch, capsys, *here) == (130, "data.py: interrupted\n")


def run_data(tmp_path, stdout, **environment) -> subprocess.CompletedProcess:
    rows = [row | {"type": "Sätze ∘"} for row in sums(0, 20)]
    write_lines(tmp_path / "a.jsonl", rows)
    command = [sys.executable, str(ROOT / "data.py"), "--data", "a.jsonl", "--validate"]
    return subprocess.run(
        command,
        cwd=tmp_path,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        timeout=60,
    )


def test_output_that_cannot_be_written(tmp_path):
    """A pipe that nobody reads: quiet. A full disk: one line. An ASCII terminal: escapes."""
    reading, writing = os.pipe()
    os.close(reading)
    done = run_data(tmp_path, writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (-13, b"")
    with open("/dev/full", "w") as full:
        done = run_data(tmp_path, full)
    assert done.returncode == 2
    assert done.stderr == b"data.py: [Errno 28] No space left on device\n"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_data(tmp_path, subprocess.PIPE, **ascii_only)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"S\\xe4tze \\u2218" in done.stdout


def test_long_rows_are_named_where_a_task_has_too_few(tmp_path):
    _, tokenizer = load_config("tiny")
    write_lines(tmp_path / "a.jsonl", sums(0, 20))
    tasks = load_tasks(str(tmp_path / "a.jsonl"))
    with pytest.raises(DataError) as caught:
        data.episode_tasks(tokenizer, tasks, 8, 1, 2, 2, 0)
    said = str(caught.value)
    assert "task S has 0 support, 0 query and 0 test rows (20 are over the 8 tokens of" in said
    assert "--max-length); it needs 2 support, 2 query and 1 test" in said
    with pytest.raises(DataError) as caught:
        data.episode_tasks(tokenizer, tasks, 512, 1, 200, 2, 0)
    assert "--" not in str(caught.value)
