"""Generated tasks that hide a rule: only the support rows of a task tell it.

What the prompt says is the same for every task of a kind, so nothing but adaptation on the support
rows, or reading them in the prompt, can answer the query.
"""

import itertools
import random

CIPHERS = 1000
CHANGES = 64
HELD_OUT = 20  # the last ones of each


def cipher_rows(rule: int) -> list[dict]:
    """All 100 problems of one cipher, with the columns of tiny.problems.embedded_rows.

    A permutation of the ten digits is applied to a two-digit text. Chance: 1%. What is to be found
    is a table: ten symbols, each with its code.
    """
    code = _shuffled(range(10), f"cipher/{rule}")
    rows = []
    for a, b in itertools.product(range(10), repeat=2):
        rows.append(_row("cipher", f"Decode {a}{b}", f"{code[a]}{code[b]}"))
    return rows


# What may happen to a digit: nothing, the next, the one before, two on, two back, five on, its
# complement to 9, three times it; all modulo 10, so that each can be undone
DIGIT_CHANGES = (
    "0123456789",
    "1234567890",
    "9012345678",
    "2345678901",
    "8901234567",
    "5678901234",
    "9876543210",
    "0369258147",
)


def change_rows(rule: int) -> list[dict]:
    """All 100 problems of one pair of changes, the first for tens and the second for units.

    There are 64 pairs, numbered at random. Chance, for who knows that it is one of them: some 3%.
    What is to be found is a choice, of one of eight for either place.
    """
    pairs = list(itertools.product(DIGIT_CHANGES, repeat=2))
    tens, units = _shuffled(pairs, "changes")[rule]
    rows = []
    for a, b in itertools.product(range(10), repeat=2):
        rows.append(_row("change", f"Alter {a}{b}", f"{tens[a]}{units[b]}"))
    return rows


def _shuffled(items, name: str) -> list:
    items = list(items)
    return random.Random(name).sample(items, len(items))


def _row(kind: str, problem: str, answer: str) -> dict:
    solution = rf"\boxed{{{answer}}}"
    row = {"problem": problem, "solution": solution, "answer": answer}
    return row | {"subject": kind, "level": 1}
