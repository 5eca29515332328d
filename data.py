"""Episodes for meta-learning on mathematics: sources, splits, sampling, tokenisation.

A *task* is a set of problems that belong together: a MATH subject, a family of generated problems,
a hidden cipher. Its rows are split into support (what the inner loop adapts on), query (what the
meta-gradient is taken on) and test (never trained on). An *episode* is one visit to a task: fresh
support rows for K inner steps and fresh query rows.

Sources, one flag `--data`:
    ciphers        generated (tiny/hidden_rules.py): each task hides a digit cipher that its prompts
                   do not tell, so only the support rows can answer the query. No download.
    changes        the same with a readable change of each of the two digits.
    embedded       generated (tiny/problems.py): the 7 MATH subjects, 8 families each, 5 levels.
                   Tasks are the families that the tiny model was not pre-trained on; one of each
                   subject is held out.
    hub            EleutherAI/hendrycks_math through `datasets`, all 7 configurations.
    PATH           a file (.json, .jsonl, .jsonl.gz, .parquet, .csv), a folder of such files, what
                   `datasets` or the hub keeps, or a folder written by this program (sources.py).

As a program it prepares and checks a folder of parquet files (names and columns as in
ZhaochenYu0201/fomaml, so that files of either program work in the other):
    python data.py --output-dir math_meta --data hub --validate
"""

import hashlib
import json
import os
import random
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from numbers import Number
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from checker import extract_answer, grade
from sources import (
    Columns,
    DataError,
    cell_of,
    expanded,
    find_columns,
    given_answer,
    hub_tables,
    local_tables,
    parse,
    present,
    read_rows,
    reason_of,
    texts_of,
)

MATH_CONFIGS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
    "prealgebra", "precalculus",
)  # fmt: skip
TASK_COLUMNS = ("task", "subject", "type")
# The usual request to a model that knows instructions
BOX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def check_numbers(args, intervals: dict[str, Sequence[str]]) -> None:
    """Raises DataError unless each named setting lies in its interval, as "[1, 1e9]" or "(0, inf)".

    Of tuples every number is looked at; None is a default to come. nan lies nowhere.
    """
    words = {"[1, 1e9]": "at least 1", "(0, inf)": "a positive number", "[0, 1e9]": "0 or more"}
    for interval, names in intervals.items():
        low, high = map(float, interval[1:-1].split(","))
        for name in names:
            setting = getattr(args, name)
            for value in setting if isinstance(setting, tuple) else (setting,):
                if value is None:
                    continue
                above = value > low if interval[0] == "(" else value >= low
                below = value < high if interval[-1] == ")" else value <= high
                if not (above and below):
                    must_be = words.get(interval, f"in {interval}")
                    raise DataError(f"--{name.replace('_', '-')} must be {must_be}, not {value}")


@dataclass(frozen=True)
class Example:
    prompt: str
    response: str
    answer: str  # the final answer, as in \boxed{answer}; "" where none is known
    subject: str
    level: int  # 1 (easy) to 5, 0 where unknown
    id: str  # unique within a run


@dataclass(frozen=True)
class Task:
    name: str
    support: list[Example]
    query: list[Example]
    test: list[Example]
    heldout: bool = False  # kept out of meta-training; evaluation adapts to it


@dataclass(frozen=True)
class Episode:
    task: str
    support: list[Example]  # K x support_batch rows, in the order in which the inner steps use them
    query: list[Example]


# --------------------------------------------------------------------------------------------------
# Files and the hub


def to_examples(rows: list[dict], source: str, task_column: str | None) -> list[tuple]:
    """[(task, Example)] from rows in any of the accepted forms.

    task_column: None for the first of task, subject, type; "" where no tasks are asked for. Raises
    DataError naming what is missing.
    """
    if not rows:
        raise DataError(f"{source} holds no rows")
    if isinstance(rows[0].get("metadata"), str):  # a prepared file: other columns travel as JSON
        rows = [_unpacked(row, f"{source}, row {i}") for i, row in enumerate(rows, 1)]
    if task_column == "" and not present(rows[0], TASK_COLUMNS):
        rows = [{**row, "subject": "math"} for row in rows]
    columns = find_columns(rows[0])
    task = present(rows[0], (task_column,) if task_column else TASK_COLUMNS)
    wanted = (
        ("problem (or prompt)", columns.prompt),
        ("solution (or response)", columns.response),
        (task_column or "subject (or type, task, --task-column)", task),
    )
    if missing := [name for name, column in wanted if column is None]:
        word = "columns" if len(missing) > 1 else "column"
        there = ", ".join(map(str, rows[0]))
        raise DataError(f"{source}: missing {word} {', '.join(missing)}; found: {there}")
    examples = []
    for i, row in enumerate(rows):
        where = f"{source}, row {i + 1}"
        texts = texts_of(row, columns)
        name = row.get(task)
        named = isinstance(name, (str, Number)) and str(name).strip() and name == name  # not nan
        if texts is None or not named:
            names = ", ".join(dict.fromkeys(columns))
            chat = ""
            if any(isinstance(cell_of(row, column), list) for column in columns):
                chat = " (or turns of user and assistant, the assistant's last)"
            raise DataError(f"{where}: {names} and {task} must be non-empty text{chat}")
        try:
            answer = given_answer(row, columns)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where}: {reason_of(e)}") from None
        if answer is None:
            answer = extract_answer(texts[1]) or ""
        subject = next((row[c] for c in ("subject", "type") if row.get(c) not in (None, "")), name)
        level = re.search(r"\d{1,9}", str(row.get("level") or ""))
        level = int(level.group()) if level else 0
        examples.append((str(name), Example(*texts, answer, str(subject), level, f"{source}/{i}")))
    return examples


def _unpacked(row: dict, where: str) -> dict:
    """With the fields of its metadata, where it has some, as columns."""
    if row.get("metadata") is None:
        return row
    try:
        return parse(row["metadata"]) | row
    except (ValueError, TypeError, RecursionError):
        raise DataError(f"{where}: column metadata is not JSON") from None


def local_rows(data: str, task_column: str | None) -> tuple[list, list]:
    """(rows to split, rows of test files), as of to_examples. Raises DataError."""
    train, test = [], []
    for source, is_test, rows in local_tables(data):
        split_rows = test if is_test else train
        split_rows.extend(to_examples(rows, source, task_column))
    return train, test


def hub_rows(task_column: str | None) -> tuple[list, list]:
    """(training rows, test rows) of MATH, as of to_examples. Raises DataError."""
    train, test = [], []
    for config in MATH_CONFIGS:
        tables = hub_tables("EleutherAI/hendrycks_math", config)
        for split_name, rows in (("train", train), ("test", test)):
            source = f"hub/{config}/{split_name}"
            rows.extend(to_examples(tables[split_name], source, task_column))
    return train, test


# --------------------------------------------------------------------------------------------------
# Tasks and their splits


def order_by_hash(seed: int, rows: list[Example]) -> list[Example]:
    """In an order that depends on the seed and the problems' texts alone."""
    return sorted(rows, key=lambda e: hashlib.sha256(f"{seed}/{e.prompt}".encode()).digest())


def split(rows: list[Example], support_ratio: float, query_ratio: float, seed: int) -> tuple:
    """Lists of support, query and test rows: disjoint, stratified by level, the same for the same
    seed and texts whatever their order."""
    support, query, test = [], [], []
    levels = defaultdict(list)
    for example in rows:
        levels[example.level].append(example)
    for level in sorted(levels):
        ordered = order_by_hash(seed, levels[level])
        a = round(len(ordered) * support_ratio)
        b = round(len(ordered) * (support_ratio + query_ratio))
        support += ordered[:a]
        query += ordered[a:b]
        test += ordered[b:]
    # Stratified by level, and in random order: the first rows are not the easiest
    return support, query, order_by_hash(seed, test)


def check_ratios(support_ratio: float, query_ratio: float) -> None:
    """Raises DataError for ratios that cannot split anything."""
    if not (support_ratio > 0 and query_ratio > 0 and support_ratio + query_ratio <= 1):
        raise DataError(
            "support and query ratio must be positive and sum to at most 1, "
            f"not {support_ratio} + {query_ratio}"
        )


def load_tasks(
    data: str,
    *,
    task_column: str | None = None,
    heldout: Sequence[str] = (),
    support_ratio: float = 0.30,
    query_ratio: float = 0.40,
    max_samples: int = 0,
    seed: int = 42,
) -> list[Task]:
    """The tasks of a source, each split into support, query and test rows.

    task_column: what makes a task. Embedded problems: "family" (default) or "subject". Files: a
    column name (default: the first of task, subject, type). heldout: names of tasks or of subjects
    to keep out of meta-training; None of them: the embedded held-out families and the last
    ciphers and changes are held out, of other sources nothing is. max_samples: rows per task, 0 for
    all. A source with its own test split (hub, a folder with a test file) keeps it, and its other
    rows are shared between support and query. Raises DataError.
    """
    check_ratios(support_ratio, query_ratio)
    make = partial(_task, support_ratio=support_ratio, query_ratio=query_ratio, seed=seed)
    if data == "embedded":
        tasks = _embedded_tasks(make, task_column, max_samples, seed)
    elif data in ("ciphers", "changes"):
        if task_column is not None:
            raise DataError(f"--task-column {task_column}: each of the {data} is a task already")
        tasks = _hidden_rule_tasks(make, data)
    elif data and (expanded(data) / "meta_train").is_dir():
        tasks = _prepared_tasks(expanded(data), task_column)
    elif data == "hub":
        tasks = _grouped_tasks(make, *hub_rows(task_column), max_samples, seed)
    else:
        tasks = _grouped_tasks(make, *local_rows(data, task_column), max_samples, seed)
    return _hold_out(tasks, heldout) if heldout else tasks


def _task(name, rows, own_test, heldout=False, *, support_ratio, query_ratio, seed) -> Task:
    if not own_test:
        return Task(name, *split(rows, support_ratio, query_ratio, seed), heldout)
    fraction = support_ratio / (support_ratio + query_ratio)
    support, query, _ = split(rows, fraction, 1 - fraction, seed)
    return Task(name, support, query, own_test, heldout)


def embedded_examples(per_family: int, seed: int, part: str, *roles: str) -> dict[str, list]:
    """The Examples of tiny.problems.embedded_rows, keyed "Subject/family"."""
    from tiny.problems import embedded_rows

    families = embedded_rows(per_family, seed, part, *roles)
    return {name: _generated(rows, f"{name}/{part}") for name, rows in families.items()}


def _generated(rows: list[dict], prefix: str, digits: int = 1) -> list[Example]:
    """Examples with ids of the prefix and a number of at least so many digits."""
    values = itemgetter("problem", "solution", "answer", "subject", "level")
    return [Example(*values(row), f"{prefix}{i:0{digits}}") for i, row in enumerate(rows)]


def _embedded_tasks(make: Callable, task_column: str | None, max_samples: int, seed: int):
    if task_column not in (None, "family", "subject"):
        raise DataError(
            f"--task-column {task_column}: embedded problems are grouped by family or subject"
        )
    roles = ("training",)
    if task_column == "subject":
        roles = ("pretraining", "training")
    train = embedded_examples(max_samples or 200, seed, "train", *roles)
    test = embedded_examples(40, seed, "test", *roles)
    if task_column == "subject":
        train, test = _by_subject(train), _by_subject(test)
    tasks = [make(name, rows, test[name]) for name, rows in train.items()]
    train = embedded_examples(max_samples or 200, seed, "train", "heldout")
    test = embedded_examples(40, seed, "test", "heldout")
    return tasks + [make(name, rows, test[name], True) for name, rows in train.items()]


def _by_subject(families: dict[str, list[Example]]) -> dict[str, list[Example]]:
    subjects = defaultdict(list)
    for name, rows in families.items():
        subjects[name.split("/")[0]] += rows
    return subjects


def _hidden_rule_tasks(make: Callable, data: str) -> list[Task]:
    from tiny.hidden_rules import CHANGES, CIPHERS, HELD_OUT, change_rows, cipher_rows

    kind, rows_of, count = "cipher", cipher_rows, CIPHERS
    if data == "changes":
        kind, rows_of, count = "change", change_rows, CHANGES
    tasks = []
    for i in range(count):
        rows = _generated(rows_of(i), f"{kind}-{i}/", digits=2)
        tasks.append(make(f"{kind}-{i}", rows, [], i >= count - HELD_OUT))
    return tasks


def _grouped_tasks(make: Callable, train, test, max_samples: int, seed: int) -> list[Task]:
    """Of a source's [(task, Example)]. A problem in both stays in the test split alone."""
    seen: set[str] = set()
    train_rows, test_rows = defaultdict(list), defaultdict(list)
    for groups, rows in ((test_rows, test), (train_rows, train)):
        for name, example in rows:
            key = words_of(example)
            if key not in seen:
                seen.add(key)
                groups[name].append(example)
    tasks = []
    for name in sorted(train_rows.keys() | test_rows.keys()):
        rows = order_by_hash(seed, train_rows[name])[: max_samples or None]
        tasks.append(make(name, rows, test_rows[name]))
    return tasks


def words_of(example: Example) -> str:
    """The problem's text; two rows with the same are the same problem."""
    return " ".join(example.prompt.split())


def slug(name: str) -> str:
    """A task's name in names of files."""
    return re.sub(r"[^\w&.-]+", "_", name.lower())


def _prepared_tasks(folder: Path, task_column: str | None) -> list[Task]:
    """Of the files that write_prepared writes."""
    tasks = []
    for support_file in sorted((folder / "meta_train").glob("*_support.parquet")):
        stem = support_file.name.removesuffix("_support.parquet")
        splits = []
        for name in _prepared_names(stem):
            if not (folder / name).exists():
                raise DataError(f"{folder}: {name} is missing")
            rows = to_examples(read_rows(folder / name), name, task_column)
            splits.append([example for _, example in rows])
        seen = {words_of(example) for example in splits[2]}
        for examples in splits[:2]:  # a problem of the test split is not trained on
            examples[:] = [example for example in examples if words_of(example) not in seen]
        subjects = {example.subject for example in splits[0]}
        name = next(iter(subjects), stem)
        if len(subjects) > 1 or slug(name) != stem:
            name = stem
        tasks.append(Task(name, *splits))
    if not tasks:
        raise DataError(f"{folder / 'meta_train'}: no *_support.parquet file")
    return tasks


def _prepared_names(stem: str) -> tuple[str, str, str]:
    """A task's three files in a prepared folder."""
    train = f"meta_train/{stem}"
    return (
        f"{train}_support.parquet",
        f"{train}_query.parquet",
        f"few_shot_eval/{stem}_test.parquet",
    )


def _hold_out(tasks: list[Task], heldout: Sequence[str]) -> list[Task]:
    known = set().union(*map(_names, tasks))
    if unknown := [name for name in heldout if name not in known]:
        raise DataError(
            f"--heldout-subjects {', '.join(unknown)}: no such task or subject; "
            f"there are {', '.join(sorted(known)[:20])}"
        )
    tasks = [replace(t, heldout=not _names(t).isdisjoint(heldout)) for t in tasks]
    if all(t.heldout for t in tasks):
        raise DataError("every task is held out: nothing is left to train on")
    return tasks


def _names(task: Task) -> set[str]:
    """What --heldout-subjects may call it: its name and its subject."""
    return {task.name, *(example.subject for example in task.support[:1])}


# --------------------------------------------------------------------------------------------------
# Episodes


def sample_episode(
    tasks: Sequence[Task],
    seed: int,
    step: int,
    place: int,
    support_size: int,
    query_size: int,
    shots: int = 0,
) -> Episode:
    """One place of a meta-batch, a pure function of its arguments: resuming needs no data state.

    The meta-batch of a step is a random order of the tasks, and a replica takes some places of it,
    so that one replica with all places sees what several replicas see together. Query rows are
    drawn without replacement; support_size and shots: as for draw_support.
    """
    rng = random.Random(f"{seed}/{step}/{place // len(tasks)}")
    task = tasks[rng.sample(range(len(tasks)), len(tasks))[place % len(tasks)]]
    rng = random.Random(f"{seed}/{step}/{place}/rows")
    support = draw_support(rng, task.support, support_size, shots)
    return Episode(task.name, support, rng.sample(task.query, query_size))


def is_right(response: str, example: Example) -> bool:
    """Whether a response has the example's final answer; where none is known, its very words."""
    if example.answer:
        return grade(response, example.answer)
    return response.split() == example.response.split()


def draw_support(
    rng: random.Random, rows: Sequence[Example], size: int, shots: int = 0
) -> list[Example]:
    """`size` rows in random order, of `shots` different ones (0: of all rows).

    Without replacement; where that is fewer than `size`, in several passes, each in a new order.
    """
    if shots:
        rows = rng.sample(rows, min(shots, len(rows)))
    drawn: list[Example] = []
    while len(drawn) < size:
        drawn += rng.sample(rows, min(len(rows), size - len(drawn)))
    return drawn


# --------------------------------------------------------------------------------------------------
# Tokenisation


class Encoded(NamedTuple):
    ids: list[int]
    prompt_length: int  # the loss is on ids[prompt_length:]


class Template(NamedTuple):
    """How a model is shown a prompt: before + prompt + after, then the response, then `end`."""

    before: str
    after: str
    end: list[int]  # tokens
    stop: frozenset[int]  # tokens that end a generated response


def template(tokenizer) -> Template:
    """The tokenizer's own chat template (prompt as user turn, response as assistant turn), or
    "Problem: ... Solution:" without one.

    The template is rendered around markers. What opens and what ends an assistant turn is read from
    it: hybrid thinking models put an empty thought before an answer that has none, and models
    differ in whether the end of a turn is the end-of-sequence token. Raises DataError where there
    is neither.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is None:
        if not eos:
            raise DataError("the tokenizer has no end-of-sequence token and no chat template")
        before = f"{tokenizer.bos_token or ''}Problem: "
        return Template(before, "\nSolution: ", eos, frozenset(eos))
    question = {"role": "user", "content": "<<Q>>"}
    reply = {"role": "assistant", "content": "<<A>>"}
    before, _, after_question = _render(tokenizer, [question]).partition("<<Q>>")
    between, _, closing = _render(tokenizer, [question, reply]).partition("<<A>>")
    after = between.partition("<<Q>>")[2]
    end = tokenizer(closing.strip(), add_special_tokens=False)["input_ids"][:1]
    marks = tokenizer.added_tokens_decoder.keys() | set(tokenizer.all_special_ids)
    if eos and end and end[0] not in marks:
        end = eos  # a turn that ends in plain text: its first token ends nothing
    end = end or eos
    if len(after) <= len(after_question) or not end:
        raise DataError("the tokenizer's chat template has no generation prompt or no end of turn")
    return Template(before, after, end, frozenset(end + eos))


DAY = date(2024, 7, 26)  # of every template: a run resumed tomorrow must see the same tokens


def _render(tokenizer, messages: Sequence[dict]) -> str:
    """Always of the same day, whether the template takes a date or asks for today's."""
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=re.sub(
                r"strftime_now\(\s*(['\"])(.*?)\1\s*\)",
                lambda asked: asked[1] + DAY.strftime(asked[2]) + asked[1],
                tokenizer.get_chat_template(),
            ),
            tokenize=False,
            add_generation_prompt=False,
            date_string=DAY.strftime("%d %b %Y"),
        )
    except Exception as e:  # the template is a program: anything may go wrong in it
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise DataError(f"the tokenizer's chat template fails: {reason[:200]}") from None


def prompt_texts(tokenizer, conversations: Sequence[Sequence[dict]]) -> list[str]:
    """What the model reads before its next answer to each conversation.

    A conversation: messages of {"role", "content"}, the last from the user.
    """
    if tokenizer.chat_template is not None:
        question = {"role": "user", "content": "<<Q>>"}
        closing = _render(tokenizer, [question]).partition("<<Q>>")[2]
        opening = template(tokenizer).after.removeprefix(closing)
        return [_render(tokenizer, messages) + opening for messages in conversations]
    names = {"system": "", "user": "Problem: ", "assistant": "Solution: "}
    texts = []
    for messages in conversations:
        lines = [names[message["role"]] + message["content"] for message in messages]
        texts.append((tokenizer.bos_token or "") + "\n".join(lines) + "\nSolution: ")
    return texts


def encode(tokenizer, examples: Sequence[Example], max_length: int) -> tuple[dict, int]:
    """({example.id: Encoded}, number dropped): longer rows are left out, never cut."""
    if not examples:
        return {}, 0
    chat = template(tokenizer)
    prompts = _tokens(tokenizer, [chat.before + e.prompt + chat.after for e in examples])
    responses = _tokens(tokenizer, [e.response for e in examples])
    encoded = {}
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        encoded[example.id] = Encoded(prompt + response + chat.end, len(prompt))
    kept = {i: row for i, row in encoded.items() if len(row.ids) <= max_length}
    return kept, len(encoded) - len(kept)


def _tokens(tokenizer, texts: list[str]) -> list[list[int]]:
    """Of each text; the same text is read once: the tasks of a hidden rule share their prompts."""
    different = list(dict.fromkeys(texts))
    ids = tokenizer(different, add_special_tokens=False)["input_ids"]
    of_text = dict(zip(different, ids, strict=True))
    return [of_text[text] for text in texts]


def encode_in_context(
    tokenizer, shots: Sequence[Example], examples: Sequence[Example]
) -> dict[str, Encoded]:
    """{example.id: Encoded}: each example behind the shots, as turns of one conversation.

    The loss is on the example's own response. A shot that is there twice is shown once.
    """
    turns = []
    for shot in {shot.id: shot for shot in shots}.values():
        turns.append({"role": "user", "content": shot.prompt})
        turns.append({"role": "assistant", "content": shot.response})
    conversations = [[*turns, {"role": "user", "content": e.prompt}] for e in examples]
    prompts = _tokens(tokenizer, prompt_texts(tokenizer, conversations))
    responses = _tokens(tokenizer, [e.response for e in examples])
    end = template(tokenizer).end
    encoded = {}
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        encoded[example.id] = Encoded(prompt + response + end, len(prompt))
    return encoded


def episode_tasks(
    tokenizer,
    tasks: Sequence[Task],
    max_length: int,
    steps: int,
    support: int,
    query: int,
    evaluated: int,
    limit: str = "--max-length",
    shots: int = 0,
) -> tuple[list[Task], list[Task], dict[str, Encoded], str]:
    """(tasks to train on, tasks to evaluate on, {example.id: Encoded}, a line on what there is) for
    episodes of `steps` times `support` rows, `shots` of them different (0: all), and `query` rows.

    Evaluated are the held-out tasks, or all where none is held out; at most `evaluated` of them (0:
    all), evenly over the list, so that every kind is there. limit: what the user calls max_length.
    Raises DataError for a task with too few rows.
    """
    rows, read = [], {}
    for t in tasks:
        own = t.support + t.query + t.test
        rows += own
        read[t.name] = len(own)
    tokens, dropped = encode(tokenizer, rows, max_length)

    def fitting(examples: list[Example]) -> list[Example]:
        return [e for e in examples if e.id in tokens]

    tasks = [
        replace(t, support=fitting(t.support), query=fitting(t.query), test=fitting(t.test))
        for t in tasks
    ]
    for t in tasks:
        few_queries = len(t.query) < query and not t.heldout
        if len(t.support) < support or few_queries or not t.test:
            longer = read[t.name] - len(t.support) - len(t.query) - len(t.test)
            cause = f" ({longer} are over the {max_length} tokens of {limit})" if longer else ""
            raise DataError(
                f"task {t.name} has {len(t.support)} support, {len(t.query)} query and "
                f"{len(t.test)} test rows{cause}; it needs {support} support, {query} query and 1 "
                "test: fewer rows in an episode, more rows in the file, or other ratios"
            )
    heldout = [t for t in tasks if t.heldout]
    report = (
        f"{len(tasks)} tasks ({len(heldout)} held out), {len(tokens)} sequences; "
        f"{dropped} over {max_length} tokens left out"
    )
    wanted = min(shots or steps * support, steps * support)
    if few := sum(len(t.support) < wanted for t in tasks):
        report += (
            f"; {few} tasks have fewer than {wanted} support rows and go through them more than "
            "once"
        )
    pool = heldout or tasks
    count = min(evaluated or len(pool), len(pool))
    chosen = [pool[i * len(pool) // count] for i in range(count)]
    return [t for t in tasks if not t.heldout], chosen, tokens, report


def describe_tasks(
    tasks: Sequence[Task], test_tasks: Sequence[Task], tokens: dict[str, Encoded], step_rows: int
) -> str:
    """What a dry run says of the data; step_rows: rows of a meta-step."""
    lines = []
    for t in [*tasks, *(t for t in test_tasks if t.heldout)]:
        held_out = " (held out)" if t.heldout else ""
        sizes = f"{len(t.support)} support, {len(t.query)} query, {len(t.test)} test"
        lines.append(f"  {t.name}{held_out}: {sizes}")
    lengths = [len(row.ids) for row in tokens.values()]
    mean = sum(lengths) / len(lengths)
    lines.append(
        f"about {step_rows * mean:,.0f} tokens per step; mean sequence {mean:.0f}, "
        f"longest {max(lengths)}"
    )
    return "\n".join(lines)


def response_tokens(rows: Sequence[Encoded]) -> int:
    """The number of tokens that a loss over the rows is a mean of."""
    return sum(len(row.ids) - row.prompt_length for row in rows)


def collate(rows: Sequence[Encoded], pad_id: int, multiple: int = 0) -> dict:
    """Right-padded batch: input_ids and labels (-100 outside of the responses), each [B, T], T a
    multiple of `multiple` so that shapes repeat (0: of 32, or of 4 where all rows are short)."""
    import torch

    longest = max(len(row.ids) for row in rows)
    multiple = multiple or (32 if longest > 32 else 4)
    length = -(-longest // multiple) * multiple
    ids = torch.full((len(rows), length), pad_id)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        labels[i, row.prompt_length : n] = ids[i, row.prompt_length : n]
    return {"input_ids": ids, "labels": labels}


# --------------------------------------------------------------------------------------------------
# python data.py


def write_prepared(tasks: Sequence[Task], folder: Path) -> None:
    """Parquet files with the columns prompt, response, metadata (JSON: subject, level, answer,
    task). Raises DataError for tasks that would share a file."""
    import pyarrow
    import pyarrow.parquet

    names: dict[str, str] = {}
    for task in tasks:
        first = names.setdefault(slug(task.name), task.name)
        if first != task.name:
            raise DataError(
                f"tasks {first!r} and {task.name!r} would both be {slug(first)} in names of "
                "files: rename one"
            )
    schema = pyarrow.schema([(c, pyarrow.string()) for c in ("prompt", "response", "metadata")])
    for task in tasks:
        splits = (task.support, task.query, task.test)
        for name, examples in zip(_prepared_names(slug(task.name)), splits, strict=True):
            rows = []
            for e in examples:
                metadata = {"subject": e.subject, "level": e.level, "answer": e.answer}
                metadata = json.dumps(metadata | {"task": task.name})
                rows.append({"prompt": e.prompt, "response": e.response, "metadata": metadata})
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / name)


def validate(folder: Path) -> list[str]:
    """What is wrong with a prepared folder, one line each: missing files or columns, empty texts,
    metadata that is not JSON, a problem in two splits, a response without a final answer. Empty:
    the folder is good."""
    files = sorted(folder.glob("meta_train/*.parquet"))
    files += sorted(folder.glob("few_shot_eval/*.parquet"))
    if not files:
        return [f"{folder}: no parquet files under meta_train/ and few_shot_eval/"]
    faults = []
    for support in folder.glob("meta_train/*_support.parquet"):
        names = _prepared_names(support.name.removesuffix("_support.parquet"))
        faults += [f"{name}: missing" for name in names if not (folder / name).exists()]
    seen: dict[str, str] = {}
    for file in files:
        try:
            faults += _faults(read_rows(file), str(file.relative_to(folder)), seen)
        except DataError as e:
            faults.append(str(e))
    return faults


def _faults(rows: list[dict], name: str, seen: dict[str, str]) -> Iterator[str]:
    """What is wrong with a file. seen: the file of each problem met so far. Raises DataError for
    metadata that is not JSON."""
    if not rows:
        yield f"{name}: no rows"
        return
    if missing := [c for c in ("prompt", "response", "metadata") if c not in rows[0]]:
        yield f"{name}: missing columns {', '.join(missing)}; found {', '.join(rows[0])}"
        return
    for i, row in enumerate(rows, 1):
        texts = texts_of(row, Columns("prompt", "response"))
        if texts is None:
            yield f"{name}, row {i}: empty prompt or response, or not text"
            continue
        _unpacked(row, f"{name}, row {i}")
        if not extract_answer(texts[1]):
            yield f"{name}, row {i}: no final answer in the response"
        first = seen.setdefault(" ".join(texts[0].split()), name)
        if first != name:
            yield f"{name}, row {i}: the same problem is in {first}"


@dataclass
class Args:
    """Split a source into support, query and test parquet files, one set for each task."""

    output_dir: str = "math_meta"
    """Folder to write: meta_train/{task}_support.parquet, meta_train/{task}_query.parquet,
    few_shot_eval/{task}_test.parquet."""
    data: str = "embedded"
    """embedded, ciphers, changes, hub (EleutherAI/hendrycks_math), or a local file or folder."""
    task_column: str | None = None
    """Column that names a row's task (default: task, subject or type; embedded: family or
    subject)."""
    support_ratio: float = 0.30
    """Share of a task's rows for inner-loop adaptation."""
    query_ratio: float = 0.40
    """Share for the meta-gradient; what is left is the test split."""
    max_samples: int = 0
    """Rows per task at most; 0 (or -1) for all."""
    seed: int = 42
    """The split is a function of the seed and the problems' texts."""
    validate: bool = False
    """Check the folder after writing it; exit status 1 and a line for each fault on a bad one."""
    validate_only: bool = False
    """Check an existing folder and write nothing."""


SPLITS = ("support", "query", "test")


def prepare(args: Args, folder: Path) -> None:
    """Writes the folder and prints the sizes of the splits. Raises DataError."""
    tasks = load_tasks(
        args.data,
        task_column=args.task_column,
        support_ratio=args.support_ratio,
        query_ratio=args.query_ratio,
        max_samples=max(args.max_samples, 0),
        seed=args.seed,
    )
    empty = []
    for t in tasks:
        empty += [f"{t.name} ({name})" for name in SPLITS if not getattr(t, name)]
    if empty:
        raise DataError(f"an empty split: {', '.join(empty[:5])}; use fewer tasks or other ratios")
    write_prepared(tasks, folder)
    width = max(len(t.name) for t in tasks)
    print(f"{'task':{width}} {'support':>8} {'query':>8} {'test':>8} {'total':>8}")
    for t in tasks:
        sizes = [len(t.support), len(t.query), len(t.test)]
        print(f"{t.name:{width}} " + " ".join(f"{n:8}" for n in [*sizes, sum(sizes)]))
    print(f"wrote {3 * len(tasks)} files to {folder}")


NUMBERS = {
    "(0, 1]": ("support_ratio", "query_ratio"),
    "[-1, 1e9]": ("max_samples",),
    "(-9e18, 9e18)": ("seed",),
}


def main(args: Args) -> int:
    check_numbers(args, NUMBERS)
    if not args.output_dir:
        raise DataError("--output-dir must name a folder")
    folder = expanded(args.output_dir)
    if not args.validate_only:
        prepare(args, folder)
    if not (args.validate or args.validate_only):
        return 0
    faults = validate(folder)
    print("\n".join(faults[:50]) or f"{folder}: valid")
    if len(faults) > 50:
        print(f"... and {len(faults) - 50} more")
    return 1 if faults else 0


def cli() -> int:
    import tyro

    sys.stdout.reconfigure(errors="backslashreplace")  # a task's name in an ASCII terminal
    try:
        status = main(tyro.cli(Args))
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("data.py: interrupted", file=sys.stderr)
        return 130
    except (DataError, OSError, UnicodeError) as e:
        print(f"data.py: {e}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # the output's own disk is full: Python would fail again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head`: end when nobody reads on
    sys.exit(cli())
