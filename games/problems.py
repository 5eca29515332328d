"""Mathematics as a game of one turn, for learning from the model's own responses."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from checker import grade
from data import (
    BOX,
    DataError,
    Example,
    embedded_examples,
    encode,
    local_rows,
    order_by_hash,
    to_examples,
    words_of,
)
from games.rules import Result, own_function
from sources import hub_tables

OPENR1 = "Elliott/Openr1-Math-46k-8192"  # LUFFY's: the columns prompt, target, reward_model


class MathProblems:
    """Episodes of one turn: reward 1 for a right final answer, else 0, or a reward of the user's
    own; the expert is the reference solution."""

    def __init__(
        self,
        examples: Sequence[Example],
        shuffle: int | None = None,
        reward: Callable[[str, str, dict], object] | None = None,
    ):
        self.examples, self.shuffle, self._orders = list(examples), shuffle, {}
        self.reward = reward

    def __len__(self) -> int:
        return len(self.examples)

    def reset(self, seed: int) -> Example:
        """Problem number `seed` of an endless list: all problems in a new order each time round
        (the given order without `shuffle`)."""
        epoch, place = divmod(seed, len(self.examples))
        if self.shuffle is None:
            return self.examples[place]
        if epoch not in self._orders:
            rng = random.Random(f"{self.shuffle}/{epoch}")
            self._orders = {epoch: rng.sample(self.examples, len(self.examples))}
        return self._orders[epoch][place]

    def prompt(self, state: Example) -> list[dict]:
        return [{"role": "user", "content": state.prompt}]

    def step(self, state: Example, text: str) -> Result:
        if self.reward is not None:
            return own_result(self.reward, state, text)
        right = grade(text, state.answer)
        return Result(float(right), True, right, "")

    def expert(self, state: Example) -> str:
        return state.response


def own_result(reward: Callable, example: Example, text: str) -> Result:
    """What a reward of the user's own says of a response; solved is what earns more than 0.

    Raises DataError where it fails, or gives neither a number nor a dict with one as "reward".
    """
    row = asdict(example)
    row = {"problem": row.pop("prompt"), "solution": row.pop("response"), **row}
    try:
        value = reward(example.prompt, text, row)
        noted = dict(value) if isinstance(value, dict) else {"reward": value}
        number = float(noted.pop("reward"))
    except Exception as e:  # whatever the user's function raises, or gives back
        raise DataError(f"--reward fails on {example.id}: {type(e).__name__}: {e}") from e
    if not math.isfinite(number):
        raise DataError(f"--reward gives {number} on {example.id}")
    return Result(number, True, number > 0, "", noted)


def load_problems(
    data: str,
    tokenizer,
    *,
    validation: int,
    test: int,
    max_length: int,
    subjects: Sequence[str] = (),
    levels: Sequence[int] = (),
    seed: int = 42,
    suffix: str | None = None,
    reward: str | None = None,
) -> tuple[MathProblems, MathProblems, dict[str, MathProblems], str]:
    """(training, validation, test sets by name, a line on what there is).

    embedded: problems of the families of the tiny model's pre-training, but none that it has seen;
    tests are other problems of these, and of the families that no embedded model has seen. hub:
    Elliott/Openr1-Math-46k-8192. A file or folder as for load_tasks, whose own test file, or else
    up to a tenth of its rows, is the test. Rows without an answer, or longer than max_length
    tokens, are left out and counted, and so are problems that occur twice: what is in a test set is
    never trained on. suffix: text after every problem that does not speak of \\boxed itself, by
    default BOX except for embedded ones. reward: the name of a function, see own_function. Raises
    DataError.
    """
    own_reward = own_function(reward, "--reward") if reward else None

    def choose(examples: Sequence[Example]) -> list[Example]:
        """Those that are asked for, with the suffix."""
        chosen = []
        for e in examples:
            fits = (not subjects or e.subject in subjects) and (not levels or e.level in levels)
            if fits and (e.answer or own_reward):
                chosen.append(_asking(e, data, suffix))
        return chosen

    train, tests = _source(data, test, seed)
    read = len(train)
    seen: set[str] = set()
    tests = {name: _new(examples, seen) for name, examples in tests.items()}
    train = _new(train, seen)
    repeated = read - len(train)
    tests = {name: choose(examples) for name, examples in tests.items()}
    if not tests:  # the source has no test of its own
        ordered = order_by_hash(seed, choose(train))
        held = min(max(test, 1), len(ordered) // 10 or 1)
        tests = {"test": ordered[:held]}
        taken = {e.id for e in tests["test"]}
        train = [e for e in train if e.id not in taken]
    chosen = choose(train)
    tokens, dropped = encode(tokenizer, chosen, max_length)
    left_out = len(train) - len(chosen)
    chosen = order_by_hash(seed, [e for e in chosen if e.id in tokens])
    if len(chosen) <= validation or not all(tests.values()):
        found = ", ".join(sorted({e.subject for e in train})[:10])
        raise DataError(
            f"{data}: {len(chosen)} training problems with an answer and "
            f"{min(map(len, tests.values()))} test problems remain (subjects: {found}; --subjects, "
            f"--levels and --max-length choose); more than --validation-size {validation} and 1 "
            "are needed"
        )
    for name, of_test in tests.items():
        tests[name] = MathProblems(order_by_hash(seed, of_test)[:test], reward=own_reward)
    sizes = ", ".join(f"{len(problems)} {name}" for name, problems in tests.items())
    report = (
        f"{len(chosen) - validation} training problems, {validation} for validation, {sizes}; "
        f"{dropped} over {max_length} tokens and {left_out} without an answer or not chosen "
        "left out"
    )
    if repeated:
        report += f"; {repeated} that occur twice or in the test left out"
    if own_reward is None:
        report += _unearned(chosen)
    else:  # it fails here or, after much else, in the first rollout
        own_result(own_reward, chosen[0], chosen[0].response)
    train, valid = (
        MathProblems(part, seed, own_reward) for part in (chosen[validation:], chosen[:validation])
    )
    return train, valid, tests, report


def _asking(example: Example, data: str, suffix: str | None) -> Example:
    """With the suffix after its problem, unless that speaks of \\boxed itself."""
    if suffix is None:
        suffix = "" if data == "embedded" else BOX
    if "\\boxed" in example.prompt:
        return example
    return replace(example, prompt=example.prompt + suffix)


def load_demonstrations(
    data: str, tokenizer, tests: dict[str, MathProblems], max_length: int, suffix: str | None
) -> MathProblems:
    """The problems of a file or folder whose solutions are shown, but for those that are in a test.

    Raises DataError.
    """
    examples, _ = _source(data, 0, 0)
    examples = [_asking(e, data, suffix) for e in examples]
    seen = {words_of(e) for game in tests.values() for e in game.examples}
    examples = _new(examples, seen)
    tokens, _ = encode(tokenizer, examples, max_length)
    examples = [e for e in examples if e.id in tokens and e.response]
    if not examples:
        raise DataError(f"--sft-data {data}: no demonstration of at most {max_length} tokens")
    return MathProblems(examples, 0)


def _source(data: str, test: int, seed: int) -> tuple[list[Example], dict[str, list[Example]]]:
    """(training examples, test sets by name: none where the source has none of its own)."""
    if data == "embedded":
        train = _embedded(400, seed, "post", "pretraining")
        trained = _embedded(-(-test // 35), seed, "final", "pretraining")
        unseen = _embedded(-(-test // 42), seed, "final", "training", "heldout")
        return train, {"trained families": trained, "unseen families": unseen}
    if data == "hub":
        rows, own = to_examples(hub_tables(OPENR1)["train"], "hub", ""), []
    else:
        rows, own = local_rows(data, "")
    tests = {"test": [e for _, e in own]} if own else {}
    return [e for _, e in rows], tests


def _embedded(per_family: int, seed: int, part: str, *roles: str) -> list[Example]:
    examples = []
    for rows in embedded_examples(per_family, seed, part, *roles).values():
        examples += rows
    return examples


def _new(examples: Sequence[Example], seen: set[str]) -> list[Example]:
    """Those whose problem is not among the seen ones, which grow by it."""
    new = []
    for example in examples:
        if words_of(example) not in seen:
            seen.add(words_of(example))
            new.append(example)
    return new


def _unearned(examples: Sequence[Example], looked_at: int = 200) -> str:
    """What the report says of demonstrations that do not earn their own reward: nothing where all
    do. Of many examples some are looked at, evenly over the list."""
    count = min(looked_at, len(examples))
    sample = [examples[i * len(examples) // count] for i in range(count)]
    failing = [e for e in sample if not grade(e.response, e.answer)]
    if not failing:
        return ""
    first = failing[0]
    return (
        f"; {len(failing)} of {count} demonstrations looked at do not give their own answer, as "
        f"{first.id}: {first.answer[:60]!r}"
    )
