r"""Evaluation: the accuracy of models on benchmarks and games, and the few-shot study.

    # accuracy on all embedded test problems
    python eval.py --model runs/fomaml/checkpoint --benchmark embedded
    # avg@32 and pass@k; problems split over ranks
    python eval.py --model DIR --benchmark math500 --temperature 0.6 --samples 32
    torchrun --standalone --nproc_per_node 4 eval.py --model DIR --benchmark all_id
    # who learns faster from n examples of a new task, and what do they give in the prompt?
    python eval.py --model tiny runs/fomaml/checkpoint --data ciphers --few-shot 0 5 10 30 \
        --in-context --adapt-lr 3e-3 --adapt-steps 5 --adapt-batch 30 --limit 10 --max-length 12

Every response goes to responses-RANK.jsonl of the output folder as it comes; a killed run continues
from there, none lost, none twice. Results: results.json, results.md. Problems, not samples, are the
unit of every interval.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the imports below take their seconds: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import errno
import importlib.util
import itertools
import json
import math
import os
import random
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from checker import extract_answer, grade, is_equal
from data import (
    BOX,
    DataError,
    Encoded,
    Task,
    check_numbers,
    collate,
    embedded_examples,
    encode,
    encode_in_context,
    is_right,
    load_tasks,
    read_rows,
    response_tokens,
    template,
)
from games import games_of
from games.play import play
from measure import bootstrap, mcnemar, pass_at_k, trajectory_counts, wilson
from model import (
    ModelError,
    World,
    load_config,
    load_readers,
    load_weights,
    setup,
    token_loss,
)
from policy import Sample, sample
from sources import cell_of, find_columns, reason_of, texts_of


@dataclass
class Args:
    """Benchmark accuracy, or with --few-shot the few-shot study, of one or several models."""

    model: tuple[str, ...] = ("tiny",)
    """tiny, local folders in Hugging Face format or hub names; several are measured one after the
    other and compared."""
    adapter: str | None = None
    """A LoRA adapter in PEFT's format for the few-shot study (pip install peft): only it is
    adapted."""
    output_dir: str = "evals/run"
    """responses-*.jsonl, results.json, results.md. A folder with results of the same settings is
    continued. Where the default one holds results of others, a number is appended (evals/run-2);
    one that you name is refused then."""
    seed: int = 42
    """Of samples, shots and splits."""
    limit: int = 0
    """Problems per benchmark or test rows per task, evenly over them; of a game, episodes. 0: all
    (games: 234, as in the papers)."""
    batch_size: int = 64
    """Responses generated together on a rank."""
    trust_remote_code: bool = False
    """Let a hub model run its own code."""

    # Benchmarks
    benchmark: tuple[str, ...] = ("embedded",)
    """embedded, general_points, virl, math500, aime24, amc23, minerva, olympiadbench, gsm8k, arc_c,
    gpqa_d, mmlu_pro, all_id, all_ood; with --data a name of your choice."""
    data: str | None = None
    """A local file of the benchmark (.json, .jsonl, .jsonl.gz, .parquet: problem, answer, choices;
    the answer to choices is a letter, a number from 0 or the text; virl: a route file), or the
    tasks' data of the few-shot study."""
    compact: bool = False
    """Games with the short prompts and routes that amft.py trains small models on."""
    vision: bool = False
    """Games in pictures."""
    temperature: float = 0.6
    """0: greedy."""
    top_p: float = 1.0
    """Nucleus."""
    max_length: int = 8192
    """Tokens of a response at most (cut to the model's context)."""
    samples: int = 1
    """Responses per problem."""
    suffix: str | None = None
    """Text after each problem; default: a request to reason and to box the answer (none for
    embedded)."""
    check_overlap: str | None = None
    """A training file: warn when it shares problems with the benchmark."""

    # Few-shot study
    few_shot: tuple[int, ...] = ()
    """Numbers of examples n to adapt on."""
    seeds: int = 3
    """Draws of the examples."""
    tasks: tuple[str, ...] = ()
    """Default: the held-out tasks of the data, or all."""
    task_column: str | None = None
    """What makes a task (as in training)."""
    adapt_optimizer: str = "adam"
    """adam (AdamW without decay) or sgd, the inner optimizer of meta-training: report both."""
    adapt_lr: float = 1e-4
    """Its learning rate."""
    adapt_steps: int = 20
    """Its steps, the same for every n."""
    adapt_batch: int = 4
    """Rows per step."""
    in_context: bool = False
    """Each model also without any step, the n examples in the prompt instead: an arm of its own."""


# --------------------------------------------------------------------------------------------------
# The problems of a benchmark


class Problem(NamedTuple):
    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    subject: str = ""
    level: str = ""


# name: (hub data set, configuration, split)
HUB = {
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "amc23": ("math-ai/amc23", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "olympiadbench": ("math-ai/olympiadbench", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "arc_c": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "gpqa_d": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", None, "test"),
}
GROUPS = {
    "all_id": ("aime24", "amc23", "math500", "minerva", "olympiadbench"),
    "all_ood": ("arc_c", "gpqa_d", "mmlu_pro"),
}
GAMES = ("general_points", "virl")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LETTER_BOX = (
    "\nPlease reason step by step, and put the letter of your final answer within \\boxed{}."
)


def load_benchmark(name: str, path: str | None, limit: int) -> list[Problem]:
    """Problems of a benchmark from the hub, or of any name from a local file.

    limit: that many, evenly over the file; 0 for all. GPQA is read at run time only and never
    stored. Raises DataError.
    """
    if name == "embedded":
        problems = _embedded_problems()
    else:
        source = path or HUB[name][0]
        rows = read_rows(Path(path)) if path else _hub_rows(name)
        problems = [_problem(row, f"{source}, row {i}") for i, row in enumerate(rows, 1)]
    if not problems:
        raise DataError(f"benchmark {name}: no problems")
    problems = evenly(problems, limit)
    return [problem._replace(id=f"{name}/{i}") for i, problem in enumerate(problems)]


def evenly(rows: Sequence, limit: int) -> list:
    """`limit` of the rows, evenly over them: files are often ordered by difficulty. 0: all."""
    count = min(limit or len(rows), len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _embedded_problems() -> list[Problem]:
    problems = []
    for examples in embedded_examples(40, 42, "test").values():
        for e in examples:
            family = e.id.rsplit("/", 1)[0]
            problems.append(Problem("", e.prompt, e.answer, (), family, str(e.level)))
    return problems


def _hub_rows(name: str):
    import datasets

    source, config, split = HUB[name]
    try:
        return datasets.load_dataset(source, config, split=split)
    except Exception as e:  # of many kinds; the user needs the one line
        raise DataError(
            f"cannot load {source} from the hub: {reason_of(e)} (local files: --data PATH)"
        ) from None


ANSWERS = ("answer", "answerkey", "final_answer", "correct answer", "solution")


def _problem(row: dict, where: str) -> Problem:
    """A row of any of the benchmarks (hub columns or local files).

    where: file and row, for the messages. Raises DataError naming the columns.
    """
    cells = {str(key).lower(): value for key, value in row.items()}
    prompt = cells.get("problem") or cells.get("question") or cells.get("prompt")
    answer = next((cells[name] for name in ANSWERS if _is_answer(cells.get(name))), None)
    if not isinstance(prompt, str) or not prompt.strip() or answer is None:
        found = ", ".join(map(str, row))
        raise DataError(f"{where}: needs problem (or question) and answer; found {found}")
    if isinstance(answer, list):
        answer = answer[0] if len(answer) == 1 else ", ".join(map(str, answer))
    choices = cells.get("choices") or cells.get("options") or ()
    if "incorrect answer 1" in cells:
        answer, choices = _gpqa_choices(prompt, cells)
    if choices:
        answer, choices = _lettered(answer, choices, where)
    answer = str(answer)
    if "####" in answer:
        answer = extract_answer(answer) or answer
    subject = cells.get("subject") or cells.get("category") or cells.get("type") or ""
    level = cells.get("level") or ""
    return Problem("", prompt, answer, tuple(choices), str(subject), str(level))


def _is_answer(value) -> bool:
    """Whether a cell holds something that a response can earn."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):  # the last two are NuminaMath's
        return value.strip().lower() not in ("", "nan", "none", "proof", "notfound")
    if isinstance(value, list):
        return bool(value) and all(map(_is_answer, value))
    return value is not None and not isinstance(value, dict | bytes)


def _gpqa_choices(question: str, cells: dict) -> tuple[str, list]:
    """(letter, choices): the right answer's place is a function of the question."""
    choices = [cells.get(f"incorrect answer {i}") for i in (1, 2, 3)]
    place = zlib.crc32(question.encode()) % 4
    choices.insert(place, cells.get("correct answer"))
    return LETTERS[place], choices


def _lettered(answer, choices, where: str) -> tuple[str, list[str]]:
    """(the right letter, the texts) of a list of choices, or of ARC's {"text": [...], "label":
    ["A", ...] or ["1", ...]}.

    answer: a label; a number from 0, as in MMLU; or a choice's text. Raises DataError.
    """
    labels = LETTERS
    if isinstance(choices, dict):
        labels, choices = choices.get("label"), choices.get("text")
    are_texts = isinstance(choices, list) and all(isinstance(c, str | int | float) for c in choices)
    if not are_texts or not isinstance(labels, list | str):
        raise DataError(f"{where}: choices must be a list of texts")
    if not 2 <= len(choices) <= min(len(labels), len(LETTERS)):
        raise DataError(f"{where}: {len(choices)} choices for {len(labels)} labels")
    texts = [str(choice).strip() for choice in choices]
    labels = [str(label) for label in labels[: len(texts)]]
    found = _places(answer, labels, texts, isinstance(choices[0], str))
    if len(found) != 1:
        problem = "can be read as several" if found else "is none"
        raise DataError(f"{where}: answer {answer!r} {problem} of the {len(texts)} choices")
    return LETTERS[found.pop()], texts


def _places(answer, labels: list[str], texts: list[str], numbers_count: bool) -> set[int]:
    """Which choices an answer may mean; numbers_count: a number is a place before it is a text."""
    word = str(answer).strip()
    for label in (word, word.strip("(). ").upper()):
        if label in labels:
            return {labels.index(label)}
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    if is_number and answer == int(answer):
        word = str(int(answer))
    found = {i for i, text in enumerate(texts) if text == word}
    if word.isdecimal() and int(word) < len(texts):
        return {int(word)} if is_number and numbers_count else found | {int(word)}
    return found


def prompt_of(problem: Problem, suffix: str | None) -> str:
    """The problem, its choices, and the suffix (None: what suits the benchmark)."""
    if suffix is None:
        suffix = LETTER_BOX if problem.choices else BOX
        if problem.id.startswith("embedded/"):
            suffix = ""
    lettered = zip(LETTERS, problem.choices, strict=False)
    listed = "".join(f"\n({letter}) {text}" for letter, text in lettered)
    return problem.prompt + listed + suffix


def judge(response: str, problem: Problem) -> bool:
    """Right or wrong; of multiple choice the letter counts, or the text of the choice."""
    if not problem.choices:
        return grade(response, problem.answer)
    answer = extract_answer(response) or ""
    text = problem.choices[LETTERS.index(problem.answer)]
    return is_equal(answer, problem.answer) or is_equal(answer, text)


def summarise(rows: list[dict], samples: int) -> dict:
    """Of a benchmark's responses: accuracy (mean over samples: avg@k), its 95% interval over
    problems, pass@k, lengths, truncated, unparsable; by subject and level where there are several;
    how many there are not, as the prompt alone is too long for the model.
    """
    by_problem = defaultdict(list)
    for row in rows:
        by_problem[row["id"]].append(row["right"])
    means = [sum(right) / len(right) for right in by_problem.values()]
    low, high = wilson(int(sum(means)), len(means)) if samples == 1 else bootstrap(means)
    summary = {
        "problems": len(means),
        "samples": samples,
        "accuracy": sum(means) / len(means),
        "interval": [low, high],
        "mean_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "truncated": sum(not row["finished"] for row in rows) / len(rows),
        "unparsable": sum(row["answer"] is None and not row["right"] for row in rows) / len(rows),
    }
    if too_long := sum(not row["tokens"] for row in rows):
        summary["too_long"] = too_long
    for k in (2, 4, 8, 16, 32, 64):
        if k <= samples:
            passed = [pass_at_k(len(right), sum(right), k) for right in by_problem.values()]
            summary[f"pass@{k}"] = sum(passed) / len(means)
    for column in ("subject", "level"):
        groups = defaultdict(list)
        for row in rows:
            groups[row[column]].append(row["right"])
        if len(groups) > 1:
            summary[column] = {
                name: [sum(right) / len(right), len(right) // samples]
                for name, right in sorted(groups.items())
            }
    return summary


# --------------------------------------------------------------------------------------------------
# Responses, written as they come


def written(folder: Path, model_name: str) -> dict[tuple, dict]:
    """{(id, sample): row} of the responses that a folder holds for a model."""
    rows = {}
    for file in sorted(folder.glob("responses-*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a kill may leave half a line
            if row["model"] == model_name:
                rows[row["id"], row["sample"]] = row
    return rows


def append_to(file: Path):
    """The file, open at its end, at the start of a line."""
    f = open(file, "a", encoding="utf-8")  # noqa: SIM115 - the caller closes it
    if f.tell() and not file.read_bytes().endswith(b"\n"):
        f.write("\n")
    return f


def write_rows(f, rows: list[dict]) -> None:
    f.writelines(json.dumps(row) + "\n" for row in rows)
    f.flush()


def write_text(file: Path, text: str) -> None:
    """The whole text or, after a kill or on a full disk, what the file was before."""
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(file)


def generator_of(args: Args, model_name: str, device: torch.device):
    """The model as it generates: bf16 on a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return load_weights(model_name, dtype, args.trust_remote_code).to(device).eval()


def positions(config) -> int:
    """How many tokens a model takes; very many where its configuration names no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9


def run_benchmarks(
    args: Args, problems: dict[str, list[Problem]], model_name: str, world: World
) -> dict:
    """{benchmark: summary} on rank 0, after sampling, judging and writing what the output folder
    does not hold yet."""
    folder = Path(args.output_dir)
    wanted = list(itertools.product(itertools.chain(*problems.values()), range(args.samples)))
    done = written(folder, model_name)
    wait(world)  # no rank writes before all have read
    todo = [(problem, k) for problem, k in wanted if (problem.id, k) not in done]
    todo.sort(key=lambda item: len(item[0].prompt))
    right, count = sum(row["right"] for row in done.values()), len(done)
    with (
        append_to(folder / f"responses-{world.rank}.jsonl") as f,
        tqdm(
            total=len(wanted),
            initial=len(done),
            disable=world.rank != 0,
            desc="/".join(problems),
            unit="response",
        ) as bar,
    ):
        for rows in respond(args, model_name, todo[world.rank :: world.size], world.device):
            write_rows(f, rows)
            right, count = right + sum(row["right"] for row in rows), count + len(rows)
            bar.update(len(rows) * world.size)
            bar.set_postfix(accuracy=f"{right / count:.1%}")
    wait(world)
    if world.rank != 0:
        return {}
    rows = written(folder, model_name)
    summaries = {}
    for name, asked in problems.items():
        keys = itertools.product((problem.id for problem in asked), range(args.samples))
        summaries[name] = summarise([rows[key] for key in keys], args.samples)
    return summaries


NO_RESPONSE = Sample([], [], False)


def respond(
    args: Args, model_name: str, todo: list[tuple[Problem, int]], device: torch.device
) -> Iterator[list[dict]]:
    """Rows of judged responses to (problem, number of the sample), a batch at a time.

    Where the prompt alone fills the model's positions there is no response, which is wrong.
    """
    if not todo:
        return
    model = generator_of(args, model_name, device)
    _, tokenizer = load_config(model_name, args.trust_remote_code)
    chat = template(tokenizer)
    context = positions(model.config)
    for at in range(0, len(todo), args.batch_size):
        batch = todo[at : at + args.batch_size]
        texts = [chat.before + prompt_of(p, args.suffix) + chat.after for p, _ in batch]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        responses = [NO_RESPONSE] * len(batch)
        if fitting := [i for i, prompt in enumerate(prompts) if len(prompt) < context]:
            room = context - max(len(prompts[i]) for i in fitting)
            # whatever the batch, so that a continued run draws the same
            names = [f"{args.seed}/{batch[i][0].id}/{batch[i][1]}" for i in fitting]
            samples = sample(
                model,
                tokenizer,
                [prompts[i] for i in fitting],
                max_new_tokens=min(args.max_length, room),
                temperature=args.temperature,
                top_p=args.top_p,
                stop=chat.stop,
                batch_size=args.batch_size,
                seeds=[zlib.crc32(name.encode()) for name in names],
            )
            for i, response in zip(fitting, samples, strict=True):
                responses[i] = response
        rows = []
        for (problem, k), response in zip(batch, responses, strict=True):
            text = tokenizer.decode(response.answer)
            row = {
                "model": model_name,
                "id": problem.id,
                "sample": k,
                "right": judge(text, problem),
                "answer": extract_answer(text),
                "gold": problem.answer,
                "subject": problem.subject,
                "level": problem.level,
                "tokens": len(response.ids),
                "finished": response.finished,
                "response": text,
            }
            rows.append(row)
        yield rows


class GameTest(NamedTuple):
    """A test set of a game: in distribution, or out of it."""

    id: str  # of an episode: id/seed
    label: str
    game: object


def game_tests(args: Args, name: str) -> list[GameTest]:
    _, _, tests = games_of(
        name,
        vision=args.vision,
        compact=args.compact,
        routes=args.data,
        test_routes=args.data,
    )
    return [GameTest(f"{name}/{test}", f"{name} ({test})", game) for test, game in tests.items()]


def run_games(args: Args, name: str, model_name: str, world: World) -> dict:
    """{"game (test set)": summary} on rank 0, after playing what the output folder does not hold
    yet. right: the episode is won."""
    folder = Path(args.output_dir)
    tests, seeds = game_tests(args, name), range(args.limit or 234)
    done = written(folder, model_name)
    wait(world)  # no rank writes before all have read
    todo = []
    for test in tests:
        missing = []
        for seed in seeds:
            played = [(f"{test.id}/{seed}", k) in done for k in range(args.samples)]
            if not all(played):
                missing.append(seed)
        todo.append((test, missing[world.rank :: world.size]))
    with append_to(folder / f"responses-{world.rank}.jsonl") as f:
        for rows in play_episodes(args, model_name, todo, world):
            write_rows(f, rows)
    wait(world)
    if world.rank != 0:
        return {}
    rows = written(folder, model_name)
    summaries = {}
    for test in tests:
        keys = itertools.product((f"{test.id}/{i}" for i in seeds), range(args.samples))
        summaries[test.label] = summarise_episodes([rows[key] for key in keys], args)
    return summaries


def play_episodes(
    args: Args, model_name: str, todo: list[tuple[GameTest, list[int]]], world: World
) -> Iterator[list[dict]]:
    """Rows of the episodes of (test set, seeds), args.samples to a seed, a batch at a time.

    Raises ModelError where an episode needs more positions than the model has.
    """
    if not any(seeds for _, seeds in todo):
        return
    _, tokenizer, processor = load_readers(model_name, args.vision, args.trust_remote_code)
    model = generator_of(args, model_name, world.device)
    context = positions(model.config)
    size = max(1, args.batch_size // args.samples)
    for test, seeds in todo:
        for at in tqdm(range(0, len(seeds), size), desc=test.label, disable=world.rank != 0):
            batch = seeds[at : at + size]
            try:
                groups = play(
                    model,
                    tokenizer,
                    test.game,
                    batch,
                    args.samples,
                    f"{args.seed}/{test.label}",
                    min(args.max_length, context),
                    args.batch_size,
                    args.temperature,
                    processor=processor,
                    sampler=partial(sample, top_p=args.top_p),
                )
            except IndexError:  # of a table of positions: prompts grow from turn to turn
                raise ModelError(
                    f"{test.label}: an episode needs more than the {context} positions of "
                    f"{model_name}: lower --max-length, or --compact"
                ) from None
            rows = []
            for seed, group in zip(batch, groups, strict=True):
                for k, trajectory in enumerate(group):
                    start = {"model": model_name, "id": f"{test.id}/{seed}", "sample": k}
                    rows.append(start | episode_row(trajectory, test))
            yield rows


def episode_row(trajectory, test: GameTest) -> dict:
    counts = trajectory_counts(trajectory, test.game)
    return counts | {
        "answer": "",
        "subject": test.label,
        "level": "",
        "finished": not counts["cut_turns"],
        "response": [turn.text for turn in trajectory.turns],
    }


def summarise_episodes(rows: list[dict], args: Args) -> dict:
    """As of a benchmark, and rates per environment step, retries included."""
    turns = sum(row["turns"] for row in rows)
    summary = summarise(rows, args.samples)
    summary["step_accuracy"] = sum(row["right_turns"] for row in rows) / turns
    summary["reward"] = sum(row["reward"] for row in rows) / len(rows)
    if args.vision and rows[0]["id"].startswith("general_points/"):
        summary["recognition"] = 1 - sum(row["misread"] for row in rows) / turns
    return summary


# --------------------------------------------------------------------------------------------------
# The few-shot study: adapt on n examples of a task, measure on its test rows, restore

CURVE = (0, 1, 2, 5, 10, 20, 50, 100, 200)  # adaptation steps at which the test loss is taken


IN_CONTEXT = " (in context)"  # what the arm adds to a model's name


class Study(NamedTuple):
    """Tasks of rows that fit into all models, and each model's {example.id: tokens}."""

    tasks: list[Task]
    tokens: dict[str, dict[str, Encoded]]


def load_study(args: Args, readers: dict[str, tuple], world: World) -> Study:
    """readers: {model: (config, tokenizer)}. Raises DataError."""
    tasks = load_tasks(args.data or "embedded", task_column=args.task_column, seed=args.seed)
    if args.tasks:
        if unknown := set(args.tasks) - {task.name for task in tasks}:
            there = ", ".join(task.name for task in tasks)[:400]
            raise DataError(
                f"--tasks {', '.join(sorted(unknown))}: no such task; there are {there}"
            )
        tasks = [task for task in tasks if task.name in args.tasks]
    tasks = [task for task in tasks if task.heldout] or tasks
    rows = []
    for task in tasks:
        rows += task.support + task.test
    tokens, lengths = {}, set()
    for model_name, (config, tokenizer) in readers.items():
        # Batches are padded to multiples of 32 tokens, which must fit as well
        length = min(2048, positions(config) // 32 * 32)
        tokens[model_name], _ = encode(tokenizer, rows, length)
        lengths.add(length)
    fitting = set.intersection(*(set(encoded) for encoded in tokens.values()))
    dropped, longest, shots = len(rows) - len(fitting), min(lengths), max(args.few_shot)
    chosen = []
    for task in tasks:
        support = [e for e in task.support if e.id in fitting]
        test = [e for e in task.test if e.id in fitting]
        if len(support) < shots or not test:
            raise DataError(
                f"task {task.name} has {len(support)} support and {len(test)} test rows of at most "
                f"{longest} tokens; --few-shot {shots} needs {shots} and 1"
            )
        chosen.append(replace(task, support=support, test=evenly(test, args.limit)))
    if args.in_context:
        check_prompts(args, chosen, readers)
    world.say(
        f"few-shot study: {len(chosen)} tasks, {len(fitting)} sequences; {dropped} over {longest} "
        "tokens left out"
    )
    return Study(chosen, tokens)


def check_prompts(args: Args, tasks: list[Task], readers: dict[str, tuple]) -> None:
    """Raises DataError where a model has too few positions for the most examples in a prompt."""
    for model_name, (config, tokenizer) in readers.items():
        longest = 0
        for task, seed in itertools.product(tasks, range(args.seeds)):
            prompts = encode_in_context(tokenizer, draw_shots(args, task, seed), task.test)
            longest = max(longest, *(len(row.ids) for row in prompts.values()))
        if longest > positions(config) // 32 * 32:
            raise DataError(
                f"--in-context: {max(args.few_shot)} examples and a problem take up to {longest} "
                f"tokens; {model_name} has {positions(config)} positions: lower --few-shot"
            )


def few_shot(args: Args, study: Study, model_name: str, world: World) -> list[dict]:
    """A row for each (task, n, seed), the same on all ranks: test loss after adaptation, its curve
    over the steps, which problems are solved. With --in-context another for the examples in the
    prompt instead, under the model's name with IN_CONTEXT behind it."""
    tokens = study.tokens[model_name]
    _, tokenizer = load_config(model_name, args.trust_remote_code)
    model = study_model(args, model_name).to(world.device)
    saved = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    units = []
    for task, n in itertools.product(study.tasks, sorted(set(args.few_shot))):
        units += [(task, n, seed) for seed in range(args.seeds if n else 1)]
    mine = units[world.rank :: world.size]
    title = "few-shot " + "/".join(Path(model_name).parts[-2:])
    rows = []

    def measure(task: Task, test_tokens: list[Encoded], examples: list, seed: int) -> dict:
        """After adaptation on the examples."""
        shots, curve = [tokens[e.id] for e in examples], {}
        for step in adapt(args, model, shots, tokenizer.pad_token_id, seed):
            if step in CURVE or step == args.adapt_steps:
                curve[step] = test_loss(model, test_tokens, tokenizer.pad_token_id)
        texts = greedy_answers(args, model, tokenizer, test_tokens)
        right = [is_right(text, e) for text, e in zip(texts, task.test, strict=True)]
        return {"loss": curve[max(curve)], "curve": curve, "right": right}

    for task, n, seed in tqdm(mine, disable=world.rank != 0, desc=title):
        unit = {"task": task.name, "shots": n, "seed": seed}
        examples = draw_shots(args, task, seed)[:n]
        if args.in_context:
            prompts = encode_in_context(tokenizer, examples, task.test)
            numbers = measure(task, [prompts[e.id] for e in task.test], [], seed)
            rows.append({"model": model_name + IN_CONTEXT} | unit | numbers)
        numbers = measure(task, [tokens[e.id] for e in task.test], examples, seed)
        rows.append({"model": model_name} | unit | numbers)
        restore(model, saved)
    return of_all_ranks(rows, world)


def study_model(args: Args, model_name: str):
    """In fp32, with --adapter inside. Raises ModelError."""
    model = load_weights(model_name, trust_remote_code=args.trust_remote_code)
    if args.adapter:
        import peft

        try:
            model = peft.PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
        except Exception as e:  # many kinds: no such folder, other layers, cut files
            raise ModelError(f"cannot load the adapter {args.adapter}: {reason_of(e)}") from None
    return model


def draw_shots(args: Args, task: Task, seed: int) -> list:
    """As many examples as the study takes at most; of fewer it takes the first: nested draws."""
    rng = random.Random(f"{args.seed}/{seed}/{task.name}")
    return rng.sample(task.support, max(args.few_shot))


def adapt(args: Args, model, rows: list[Encoded], pad_id: int, seed: int) -> Iterator[int]:
    """Adapts the model, by AdamW or SGD on batches of rows, which are reshuffled at every pass.

    Yields the number of steps made, 0 first; without rows that is all.
    """
    yield 0
    if not rows:
        return
    params = [p for p in model.parameters() if p.requires_grad]
    if args.adapt_optimizer == "adam":
        optimizer = torch.optim.AdamW(params, lr=args.adapt_lr, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(params, lr=args.adapt_lr)
    rng, queue = random.Random(seed), []
    model.train()
    for step in range(1, args.adapt_steps + 1):
        while len(queue) < min(args.adapt_batch, len(rows)):
            queue += rng.sample(rows, len(rows))
        batch, queue = queue[: args.adapt_batch], queue[args.adapt_batch :]
        loss = response_loss(model, batch, pad_id) / response_tokens(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step
    optimizer.zero_grad()


def response_loss(model, rows: list[Encoded], pad_id: int) -> torch.Tensor:
    """Summed over the response tokens, nats."""
    device = next(model.parameters()).device
    return token_loss(model, {k: x.to(device) for k, x in collate(rows, pad_id).items()})


@torch.no_grad()
def test_loss(model, rows: list[Encoded], pad_id: int) -> float:
    """Mean over the response tokens, nats."""
    training = model.training
    model.eval()
    batches = [rows[i : i + 32] for i in range(0, len(rows), 32)]
    losses = [response_loss(model, batch, pad_id).item() for batch in batches]
    model.train(training)
    return sum(losses) / response_tokens(rows)


def greedy_answers(args: Args, model, tokenizer, rows: list[Encoded]) -> list[str]:
    model.eval()
    prompts = [row.ids[: row.prompt_length] for row in rows]
    room = positions(model.config) - max(map(len, prompts))
    answers = sample(
        model,
        tokenizer,
        prompts,
        max_new_tokens=min(args.max_length, room),
        temperature=0,
        stop=template(tokenizer).stop,
    )
    return tokenizer.batch_decode([answer.answer for answer in answers])


@torch.no_grad()
def restore(model, saved: dict[str, torch.Tensor]) -> None:
    for name, p in model.named_parameters():
        if name in saved:
            p.copy_(saved[name])


def compare_few_shot(rows: list[dict], names: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """(a summary for each model and n, a comparison for each pair of models, n and group of tasks).

    Groups: all tasks together, then each for itself.
    """
    shots, tasks = sorted({r["shots"] for r in rows}), sorted({r["task"] for r in rows})
    runs = defaultdict(dict)  # (model, n, task): {seed: row}
    for r in sorted(rows, key=lambda r: r["seed"]):
        runs[r["model"], r["shots"], r["task"]][r["seed"]] = r
    summary, pairs = [], []
    for name, n in itertools.product(names, shots):
        by_seed = zip(*(runs[name, n, task].values() for task in tasks), strict=True)
        summary.append({"model": name, "shots": n} | summarise_seeds(list(by_seed)))
    groups = [("all", tasks)]
    if len(tasks) > 1:
        groups += [(task, [task]) for task in tasks]
    for first, second in itertools.combinations(names, 2):
        for n, (label, group) in itertools.product(shots, groups):
            changes = []  # of each task [seeds, problems]
            for task in group:
                a = [r["right"] for r in runs[first, n, task].values()]
                b = [r["right"] for r in runs[second, n, task].values()]
                changes.append(np.subtract(b, a, dtype=float))
            pair = {"first": first, "second": second, "shots": n, "task": label}
            pairs.append(pair | compare_paired(np.concatenate(changes, 1)))
    return summary, pairs


def summarise_seeds(runs: list[list[dict]]) -> dict:
    """Mean and standard deviation over seeds of accuracy and loss, pooled over tasks.

    runs: of each seed the rows of all tasks.
    """
    accuracy, loss = [], []
    for run in runs:
        problems = sum(len(r["right"]) for r in run)
        accuracy.append(sum(sum(r["right"]) for r in run) / problems)
        loss.append(sum(r["loss"] for r in run) / len(run))
    summary = {"seeds": len(runs)}
    for name, values in (("accuracy", accuracy), ("loss", loss)):
        summary[name] = float(np.mean(values))
        summary[f"{name}_sd"] = float(np.std(values, ddof=1)) if len(runs) > 1 else 0.0
    return summary


def compare_paired(changes: np.ndarray) -> dict:
    """changes [seeds, problems]: 1 where only the second model solves the problem, -1 where only
    the first does. The difference of accuracy with its paired bootstrap interval over problems, and
    McNemar's p-value on the first seed."""
    by_problem = changes.mean(0)
    only_first, only_second = int((changes[0] < 0).sum()), int((changes[0] > 0).sum())
    return {
        "difference": float(by_problem.mean()),
        "interval": list(bootstrap(by_problem)),
        "mcnemar": mcnemar(only_first, only_second),
    }


# --------------------------------------------------------------------------------------------------
# Ranks: those of torchrun; without it a single one, and no process group


def ranks() -> World:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return setup()
    return World(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))


def wait(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def of_all_ranks(rows: list[dict], world: World) -> list[dict]:
    if world.size == 1:
        return rows
    gathered: list = [None] * world.size
    dist.all_gather_object(gathered, rows)
    return list(itertools.chain(*gathered))


# --------------------------------------------------------------------------------------------------
# Tables


def benchmark_lines(results: dict[str, dict]) -> list[str]:
    """results.md of {model: {benchmark: summary}}."""
    lines = [
        "| model | benchmark | problems | accuracy, 95% interval | pass@k | mean tokens "
        "| truncated | unparsable |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for model_name, summaries in results.items():
        for name, r in summaries.items():
            low, high = r["interval"]
            passed = [(key[5:], value) for key, value in r.items() if key.startswith("pass@")]
            lines.append(
                f"| {model_name} | {name} | {r['problems']} x {r['samples']} "
                f"| {r['accuracy']:.1%} ({100 * low:.1f} to {100 * high:.1f}) "
                f"| {', '.join(f'{k}: {value:.1%}' for k, value in passed) or '-'} "
                f"| {r['mean_tokens']:.0f} | {r['truncated']:.1%} | {r['unparsable']:.1%} |"
            )
            if "too_long" in r:
                notes.append(
                    f"\n{model_name}, {name}: {r['too_long']} responses count as wrong, as the "
                    "prompt alone fills the model's positions"
                )
            if "step_accuracy" in r:
                names = [k for k in ("step_accuracy", "reward", "recognition") if k in r]
                numbers = ", ".join(f"{k.replace('_', ' ')} {r[k]:.3f}" for k in names)
                notes.append(f"\n{model_name}, {name}: {numbers}")
    return lines + notes


def few_shot_lines(summary: list[dict], pairs: list[dict]) -> list[str]:
    """results.md of the few-shot study."""
    lines = ["| model | shots | accuracy | loss |", "|---|---|---|---|"]
    for s in summary:
        lines.append(
            f"| {s['model']} | {s['shots']} "
            f"| {s['accuracy']:.1%} ± {100 * s['accuracy_sd']:.1f} "
            f"| {s['loss']:.3f} ± {s['loss_sd']:.3f} |"
        )
    if not pairs:
        return lines
    lines += [
        "",
        "| second - first | task | shots | difference of accuracy, 95% interval | McNemar p |",
        "|---|---|---|---|---|",
    ]
    for p in pairs:
        low, high = p["interval"]
        lines.append(
            f"| {p['second']} - {p['first']} | {p['task']} | {p['shots']} "
            f"| {100 * p['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) "
            f"| {p['mcnemar']:.2g} |"
        )
    return lines


# --------------------------------------------------------------------------------------------------
# The program


# Where the numbers must lie
NUMBERS = {
    "[1, 1e9]": ("batch_size", "samples", "seeds", "max_length", "adapt_steps", "adapt_batch"),
    "[0, 1e9]": ("limit", "few_shot"),
    "[0, 1000]": ("temperature",),
    "(0, 1]": ("top_p",),
    "(0, 100]": ("adapt_lr",),
    "(-9e18, 9e18)": ("seed",),
}


def check(args: Args) -> list[str]:
    """The benchmarks' names. Raises DataError for arguments that cannot work."""
    check_numbers(args, NUMBERS)
    for flag in ("model", "benchmark"):
        if not getattr(args, flag):
            raise DataError(f"--{flag}: name at least one")
    if not args.output_dir:
        raise DataError("--output-dir must name a folder")
    if 0 < args.temperature < 0.01:
        raise DataError("--temperature is 0 (greedy) or at least 0.01")
    if args.temperature == 0 and args.samples > 1:
        raise DataError("--samples above 1 needs a --temperature above 0")
    if args.adapt_optimizer not in ("adam", "sgd"):
        raise DataError("--adapt-optimizer is adam or sgd")
    if args.in_context and not args.few_shot:
        raise DataError("--in-context is for the few-shot study: give --few-shot as well")
    if args.adapter and not args.few_shot:
        raise DataError("--adapter is for the few-shot study: give --few-shot as well")
    if args.adapter and importlib.util.find_spec("peft") is None:
        raise DataError("--adapter needs the package: pip install peft")
    names = itertools.chain(*(GROUPS.get(name, (name,)) for name in args.benchmark))
    names = list(dict.fromkeys(names))
    if args.data and not args.few_shot and ("embedded" in names or len(names) > 1):
        raise DataError(
            "--data is the file of one benchmark: name it with --benchmark "
            "(math500, gsm8k, ... or a name of your choice)"
        )
    known = ("embedded", *GAMES, *HUB)
    if not args.data and (unknown := [name for name in names if name not in known]):
        raise DataError(
            f"--benchmark {', '.join(unknown)}: unknown; there are "
            f"{', '.join([*known, *GROUPS])}, or any name with --data PATH"
        )
    if args.vision and any(name not in GAMES for name in names):
        raise DataError("--vision is for the games: --benchmark general_points or virl")
    return names


def claim_folder(args: Args, world: World) -> str:
    """Makes the output folder, with the settings that its results are of in args.json.

    The same on all ranks. Raises DataError where it holds results of other settings.
    """
    answer: list = [None]
    if world.rank == 0:
        try:
            answer[0] = _claim_folder(args)
        except (DataError, OSError) as e:
            answer[0] = DataError(str(e))
    if world.size > 1:
        dist.broadcast_object_list(answer, 0)
    if isinstance(answer[0], DataError):
        raise answer[0]
    return answer[0]


def _claim_folder(args: Args) -> str:
    folder, number = Path(args.output_dir).expanduser(), 2
    settings = settings_of(args)
    while changed := changed_settings(folder, settings):
        if args.output_dir != Args.output_dir:
            raise DataError(
                f"{folder} holds results of other settings ({', '.join(changed)}): "
                "choose another --output-dir"
            )
        folder, number = Path(f"{args.output_dir}-{number}"), number + 1
    folder.mkdir(parents=True, exist_ok=True)
    try:
        write_text(folder / "args.json", json.dumps(settings))
    except OSError:
        leave_nothing_empty(folder)
        raise
    return str(folder)


def settings_of(args: Args) -> dict:
    """What results depend on, as JSON gives it back."""
    free = ("output_dir", "batch_size", "check_overlap")
    settings = {name: value for name, value in asdict(args).items() if name not in free}
    return json.loads(json.dumps(settings))


def changed_settings(folder: Path, settings: dict) -> list[str]:
    """The names of the settings in which the results of a folder are others'."""
    try:
        old = json.loads((folder / "args.json").read_text(encoding="utf-8"))
        return [name for name in settings if old.get(name) != settings[name]]
    except FileNotFoundError:
        return []
    except (ValueError, AttributeError):
        return ["a damaged args.json"]


def leave_nothing_empty(folder: Path) -> None:
    """Takes a folder back that was made for results and holds none."""
    responses = list(folder.glob("responses-*.jsonl"))
    if (folder / "results.json").exists() or any(file.stat().st_size for file in responses):
        return
    for file in [*responses, *folder.glob("args.json*"), *folder.glob("results.*.tmp")]:
        file.unlink()
    with suppress(OSError):  # there may be other things in it
        folder.rmdir()


def warn_of_overlap(path: str, problems: Sequence[Problem], world: World) -> None:
    """A line where a training file shares problems with the benchmarks. Raises DataError."""
    seen = {_without_spacing(_question(row)) for row in read_rows(Path(path))}
    if not any(seen):
        raise DataError(f"--check-overlap {path}: no column problem, prompt or question with text")
    if found := [p.id for p in problems if _without_spacing(p.prompt) in seen]:
        world.say(
            f"warning: {path} contains {len(found)} of the {len(problems)} problems "
            f"({', '.join(found[:3])} ...): the accuracy below is not held out"
        )


def _question(row: dict) -> str:
    """The problem's text in a row of a training file of any form; "" where there is none."""
    columns = find_columns(row)
    text = cell_of(row, columns.prompt) if columns.prompt else ""
    if columns.response and (texts := texts_of(row, columns)):
        text = texts[0]
    return text if isinstance(text, str) else ""


def _without_spacing(text: str) -> str:
    return " ".join(text.lower().split())


def measure_benchmarks(
    args: Args, names: list[str], problems: dict[str, list[Problem]], world: World
) -> dict[str, dict]:
    """{model: {benchmark: summary}} on rank 0. problems: of the benchmarks that are no games."""
    results = {model_name: {} for model_name in args.model}
    if problems:
        for model_name in args.model:
            results[model_name] |= run_benchmarks(args, problems, model_name, world)
    for model_name in args.model:
        for name in names:
            if name in GAMES:
                results[model_name] |= run_games(args, name, model_name, world)
    return results


def load_problems(args: Args, names: list[str], world: World) -> dict[str, list[Problem]]:
    """Of the benchmarks that are no games. Raises DataError, also for a game's routes."""
    problems = {}
    for name in names:
        if name in GAMES:
            game_tests(args, name)
        else:
            problems[name] = load_benchmark(name, args.data, args.limit)
    if args.check_overlap:
        warn_of_overlap(args.check_overlap, list(itertools.chain(*problems.values())), world)
    return problems


def measure_few_shot(args: Args, study: Study, world: World) -> tuple[dict, list[str]]:
    """(what results.json says, the lines of results.md)."""
    rows = []
    for model_name in args.model:
        rows += few_shot(args, study, model_name, world)
    arms = list(args.model)
    if args.in_context:
        arms += [name + IN_CONTEXT for name in args.model]
    summary, pairs = compare_few_shot(rows, arms)
    report = {"few_shot": rows, "summary": summary, "pairs": pairs}
    return report, few_shot_lines(summary, pairs)


def main(args: Args) -> int:
    names = check(args)
    readers = {}
    for model_name in args.model:
        config, tokenizer, _ = load_readers(model_name, args.vision, args.trust_remote_code)
        template(tokenizer)  # raises where there is none
        readers[model_name] = (config, tokenizer)
    world = ranks()
    if args.few_shot:
        study = load_study(args, readers, world)
    else:
        problems = load_problems(args, names, world)
    # Nothing is written before this line, so that a call that cannot work leaves nothing
    folder = Path(claim_folder(args, world))
    args = replace(args, output_dir=str(folder))
    try:
        report = {"args": settings_of(args)}
        if args.few_shot:
            results, lines = measure_few_shot(args, study, world)
            report |= results
        else:
            report["benchmarks"] = measure_benchmarks(args, names, problems, world)
            lines = benchmark_lines(report["benchmarks"])
        if world.rank == 0:
            write_text(folder / "results.json", json.dumps(report))
            write_text(folder / "results.md", "\n".join(lines) + "\n")
    finally:
        if world.rank == 0:
            leave_nothing_empty(folder)
    world.say("\n".join(lines) + f"\n\n{folder / 'results.json'}")
    return 0


def cli() -> int:
    import tyro

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 has no plus-minus sign
    rank = int(os.environ.get("RANK", 0))
    try:
        args = tyro.cli(Args)
        return main(args)
    except (DataError, ModelError, OSError) as e:
        if rank != 0:
            time.sleep(5)  # torchrun ends all ranks when one fails: let rank 0 speak first
        advice = ""
        if isinstance(e, OSError) and e.errno == errno.ENOSPC:
            advice = "; responses so far are kept: make room and give the same command again"
        print(f"eval.py: {e}{advice}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            print(
                "eval.py: interrupted; responses so far are kept (a few-shot study starts anew): "
                "to go on, give the same command again",
                file=sys.stderr,
                flush=True,
            )
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(cli())
