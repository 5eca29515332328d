"""Rows of files, folders and the hub, and what in a row is prompt, response and answer.

docs/data.md shows every form with three rows. A form is read where its meaning is plain; all else
is one line that names the file, the row and the columns found.
"""

import csv
import gzip
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from numbers import Number
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet", ".csv", ".arrow")
# Files about the data, not of it: `datasets` writes them beside the rows
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
SPLITS = ("train", "test", "validation", "valid", "val", "dev")
TEST_FOLDERS = ("test", "few_shot_eval")

# Names of columns, the first that is there counts; a point stands before a field of a column
PROMPTS = ("prompt", "problem", "question", "query", "instruction", "input")
RESPONSES = (
    "response", "solution", "target", "completion", "output", "generated_solution", "r1_solution_1",
)  # fmt: skip
ANSWERS = (
    "answer", "final_answer", "expected_answer", "ground_truth", "reward_model.ground_truth",
)  # fmt: skip
CONVERSATIONS = ("messages", "conversations")
ROLES = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip


class DataError(ValueError):
    """The data cannot be used as asked; the message is one line for the user."""


def reason_of(error: Exception) -> str:
    """An exception in one short line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeEncodeError):
        return f"\\u{ord(error.object[error.start]):04x} is half a character, which is no text"
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


# --------------------------------------------------------------------------------------------------
# Files


def read_rows(path: Path) -> list[dict]:
    """The rows of a file with one of the SUFFIXES, all splits together. Raises DataError."""
    rows = []
    for table in read_tables(path).values():
        rows += table
    return rows


def read_tables(path: Path) -> dict[str, list[dict]]:
    """{split: its rows} of a file; the split is "" but for JSON of the form {"train": [...]}.

    Raises DataError.
    """
    path = expanded(path)
    try:
        tables = _tables(path)
        for rows in tables.values():
            for number, row in enumerate(rows, 1):
                if not isinstance(row, dict):
                    raise ValueError(f"row {number} is no object with named columns")
    except Exception as e:  # half a file can raise anything in json, gzip, csv and pyarrow
        raise DataError(f"cannot read {path}: {reason_of(e)}") from None
    return tables


def expanded(path: str | Path) -> Path:
    """With ~ replaced: a shell leaves it alone in --data=~/x."""
    return Path(os.path.expanduser(path))


def _tables(path: Path) -> dict[str, list]:
    with open(path, "rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError("it is a Git LFS pointer, not the data: git lfs pull")
        file.seek(0)
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return {"": pyarrow.parquet.ParquetFile(file).read().to_pylist()}
        if path.suffix == ".arrow":
            import pyarrow

            return {"": pyarrow.ipc.open_stream(file).read_all().to_pylist()}
    opened = gzip.open if path.suffix == ".gz" else open
    newline = "" if path.suffix == ".csv" else None
    # utf-8-sig: with or without a byte order mark. Bytes that are no UTF-8 come as half characters
    with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline=newline) as f:
        if path.suffix == ".json":
            return _json_tables("".join(_utf8(f)))
        return {"": _csv_rows(_utf8(f)) if path.suffix == ".csv" else _json_lines(_utf8(f))}


def _utf8(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:
                raise ValueError(f"line {number}: not encoded as UTF-8") from None
        yield line


def parse(text: str):
    """json.loads, but half of a surrogate pair ("\\ud800") is an error: no tokenizer takes it."""
    value = json.loads(text)
    if "\\u" in text:
        _check_characters(value)
    return value


def _check_characters(value) -> None:
    json.dumps(value, ensure_ascii=False).encode()


def _json_lines(lines: Iterable[str]) -> list:
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(parse(line))
        except json.JSONDecodeError as e:
            raise ValueError(f"line {number}, column {e.colno}: {e.msg}") from None
        except (ValueError, RecursionError) as e:
            raise ValueError(f"line {number}: {reason_of(e)}") from None
    return rows


def _json_tables(text: str) -> dict[str, list]:
    """A list of rows, {"data": rows}, {"train": rows, "test": rows}, or one row."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as e:
        if e.msg == "Extra data" and text.lstrip().startswith("{"):
            return {"": _json_lines(text.split("\n"))}  # JSON Lines under another name
        raise ValueError(f"line {e.lineno}, column {e.colno}: {e.msg}") from None
    if not isinstance(content, (list, dict)):
        raise ValueError("it holds no list of rows")
    tables = {"": content}
    if isinstance(content, dict):
        tables = {"": [content]}
        named = {name: rows for name, rows in content.items() if isinstance(rows, list)}
        if "data" in named:
            tables = {"": named["data"]}
        elif find_columns(content).prompt is None and not named.keys().isdisjoint(SPLITS):
            tables = {name: rows for name, rows in named.items() if name in SPLITS}
    if "\\u" in text:
        for rows in tables.values():
            for number, row in enumerate(rows, 1):
                try:
                    _check_characters(row)
                except UnicodeEncodeError as e:
                    raise ValueError(f"row {number}: {reason_of(e)}") from None
    return tables


def _csv_rows(lines: Iterable[str]) -> list[dict]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    reader = csv.DictReader(lines, strict=True)
    rows = []
    try:
        for row in reader:
            if None in row:
                raise ValueError("more fields than the first line names")
            rows.append(row)
    except (csv.Error, ValueError) as e:
        raise ValueError(f"line {reader.reader.line_num}: {reason_of(e)}") from None
    return rows


# --------------------------------------------------------------------------------------------------
# Folders


def local_tables(place: str) -> list[tuple[str, bool, list[dict]]]:
    """(source, whether it is of a test split, rows) of every table in a file or folder.

    In a folder these are its files, or, where it has none, those of the folders below: what
    `datasets` saves, a snapshot of the hub, MATH's own folders, what data.py writes. Of a test
    split is a file whose name begins with test, or which lies in a folder named test (or
    few_shot_eval). Raises DataError.
    """
    path = expanded(place)
    if not place or not path.exists():
        raise DataError(
            f"no such file or folder: {place} (--data takes ciphers, "
            "changes, embedded, hub or a path)"
        )
    files = [path] if path.is_file() else _files(path)
    if not files or not all(file.name.endswith(SUFFIXES) for file in files):
        raise DataError(f"{path}: no {', '.join(SUFFIXES)} file")
    tables = []
    for file in files:
        *folders, name = file.relative_to(path.parent).parts[1:] or [""]
        is_test = name.startswith("test") or not set(folders).isdisjoint(TEST_FOLDERS)
        for split, rows in read_tables(file).items():
            source = f"{file}/{split}" if split else str(file)
            tables.append((source, is_test or split == "test", rows))
    if all(is_test for _, is_test, _ in tables):  # nothing else is there: these are to be split
        tables = [(source, False, rows) for source, _, rows in tables]
    return tables


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if _is_data(file))
    if files:
        return files
    below = []
    for file in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and _is_data(file):
            below.append(file)
    return sorted(below)


def _is_data(file: Path) -> bool:
    cache = file.name.startswith("cache-") and file.suffix == ".arrow"
    return file.name.endswith(SUFFIXES) and file.name not in ABOUT and not cache and file.is_file()


def hub_tables(name: str, config: str | None = None) -> dict[str, list[dict]]:
    """{split: its rows} of a data set of the Hugging Face hub. Raises DataError."""
    import datasets

    try:
        loaded = datasets.load_dataset(name, config)
        return {split: table.to_list() for split, table in loaded.items()}
    except Exception as e:  # datasets and huggingface_hub raise many kinds
        of_config = f" ({config})" if config else ""
        raise DataError(f"cannot load {name}{of_config} from the hub: {reason_of(e)}") from None


# --------------------------------------------------------------------------------------------------
# Columns


class Columns(NamedTuple):
    """Where a row's texts are; both the same for conversations, None where there is no column."""

    prompt: str | None
    response: str | None


def present(row: dict, names: Sequence[str]) -> str | None:
    """The first of the names that is a column of the row, or a field of one."""
    for name in names:
        column, _, field = name.partition(".")
        cell = row.get(column)
        if name in row or (field and isinstance(cell, dict) and field in cell):
            return name
    return None


def cell_of(row: dict, name: str):
    if name in row:
        return row[name]
    column, _, field = name.partition(".")
    cell = row.get(column)
    return cell.get(field) if isinstance(cell, dict) else None


def find_columns(row: dict) -> Columns:
    """Of the row's prompt and response, whatever form it has."""
    prompt, response = present(row, PROMPTS), present(row, RESPONSES)
    if response is None and prompt == "question" and not present(row, ("choices", "options")):
        response = present(row, ("answer",))  # GSM8K: the worked answer
    if response is None:
        response = present(row, ("extra_info.answer",))  # verl
    conversation = present(row, CONVERSATIONS)
    if conversation and not (prompt and response):
        return Columns(conversation, conversation)
    return Columns(prompt, response)


def texts_of(row: dict, columns: Columns) -> tuple[str, str] | None:
    """(prompt, response), or None unless both are text.

    Of a conversation the response is the assistant's last turn and the prompt the user's turn
    before it; turns before these stand in the prompt with the speaker's name. System prompts are
    left out: the tokenizer's chat template has its own.
    """
    prompt, response = cell_of(row, columns.prompt), cell_of(row, columns.response)
    if columns.prompt == columns.response:
        turns = _turns(prompt)
        while turns and turns[-1][0] == "user":
            turns.pop()
        prompt, response = _question(turns[:-1]), _last_answer(turns)
    if isinstance(prompt, list):
        prompt = _question(_turns(prompt))
    if isinstance(response, list):
        response = _last_answer(_turns(response))
    if columns.prompt in ("instruction", "question"):
        for given in (row.get("input"), row.get("context")):
            if given not in (None, ""):  # Alpaca's input, Dolly's context
                prompt = f"{prompt}\n\n{given}" if _is_text(prompt) and _is_text(given) else None
    return (prompt, response) if _is_text(prompt) and _is_text(response) else None


def _is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _turns(messages) -> list[tuple[str, str]]:
    """[(role, text)] without system prompts; [] for what is no conversation in text."""
    turns = []
    for message in messages if isinstance(messages, list) else ():
        if not isinstance(message, dict):
            return []
        role = ROLES.get(str(message.get("role") or message.get("from")))
        if role == "system":
            continue
        text = message.get("content") or message.get("value")
        if isinstance(text, list):  # [{"type": "text", "text": ...}]
            parts = [part.get("text") if isinstance(part, dict) else None for part in text]
            text = "".join(parts) if all(isinstance(part, str) for part in parts) else None
        if role is None or not _is_text(text):
            return []
        turns.append((role, text))
    return turns


def _question(turns: Sequence[tuple[str, str]]) -> str | None:
    if not turns or turns[-1][0] != "user":
        return None
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role.capitalize()}: {text}" for role, text in turns)


def _last_answer(turns: Sequence[tuple[str, str]]) -> str | None:
    return turns[-1][1] if turns and turns[-1][0] == "assistant" else None


def given_answer(row: dict, columns: Columns) -> str | None:
    """The final answer that a column gives; None where none does, "" where one says that there is
    none. Raises ValueError for what is neither text, number nor a list of them."""
    for name in ANSWERS:
        value = cell_of(row, name)
        worked = name == columns.response and "####" not in str(value)
        answer = None if worked else _final(value)
        if answer is not None:
            return answer
    return None


def _final(value) -> str | None:
    if isinstance(value, list):
        answers = [_final(element) for element in value]
        return ", ".join(answer for answer in answers if answer) or None
    if value is None or isinstance(value, bool) or value in (float("inf"), float("-inf")):
        return None
    if not isinstance(value, (str, Number)):
        raise ValueError("the answer must be text or a number")
    text = str(value)
    if text.strip().lower() in ("", "nan", "none", "null"):
        return None
    if text.strip().lower() in ("proof", "notfound"):  # NuminaMath
        return ""
    return text.rpartition("####")[2].strip() if "####" in text else text
