"""Generated tasks that hide a rule: only the support rows of a task tell it.

What the prompt says is the same for every task of a kind, so nothing but adaptation on the support
rows, or reading them in the prompt, can answer the query.
"""

import itertools
import random

CIPHERS = 1000
ORDERS = 120
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


def order_rows(rule: int) -> list[dict]:
    """100 problems of one order: the places of five different digits are exchanged.

    There are 120 orders, numbered at random. Chance, for who knows that it is one of them: 0.8%.
    What is to be found is a choice: which place each digit comes from.
    """
    every = list(itertools.permutations(range(5)))
    order = _shuffled(every, "orders")[rule]
    rng, texts = random.Random("order texts"), {}
    while len(texts) < 100:
        digits = "".join(rng.sample("0123456789", 5))
        texts[digits] = "".join(digits[place] for place in order)
    return [_row("order", f"Move {digits}", moved) for digits, moved in texts.items()]


def _shuffled(items, name: str) -> list:
    items = list(items)
    return random.Random(name).sample(items, len(items))


def _row(kind: str, problem: str, answer: str) -> dict:
    solution = rf"\boxed{{{answer}}}"
    row = {"problem": problem, "solution": solution, "answer": answer}
    return row | {"subject": kind, "level": 1}
