"""Generated tasks with a hidden rule: only the support rows of a task tell its rule.

What the prompt says is the same for every task of a kind, so nothing but adaptation on the support
rows can answer the query.
"""

import itertools
import random

KINDS = ("operation", "cipher")


def convention_rows(kind: str, rule: int) -> list[dict]:
    """All 100 problems of one hidden rule, with the columns of tiny.problems.embedded_rows.

    kind "operation": a ∘ b = (pa + qb + s) mod 10 with (p, q, s) drawn from the rule's number, p
    and q not both 0. kind "cipher": a permutation of the digits applied to a two-digit text.
    """
    rng = random.Random(f"{kind}/{rule}")
    p, q, s = rng.choice([c for c in itertools.product(range(10), repeat=3) if c[0] or c[1]])
    code = rng.sample(range(10), 10)
    rows = []
    for a, b in itertools.product(range(10), repeat=2):
        if kind == "operation":
            problem, answer = rf"${a} \circ {b}$", str((p * a + q * b + s) % 10)
        else:
            problem, answer = f"Decode {a}{b}", f"{code[a]}{code[b]}"
        solution = rf"\boxed{{{answer}}}"
        row = {"problem": problem, "solution": solution, "answer": answer}
        rows.append(row | {"subject": kind, "level": 1})
    return rows
