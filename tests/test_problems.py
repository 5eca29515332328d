"""tiny/: answers and solutions of the generated problems against an independent computation; their
splits; hidden rules."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import checker
from data import Example, embedded_examples, load_tasks
from tests import answers
from tests.answers import expression
from tiny.conditions import Args, condition
from tiny.hidden_rules import ORDERS, cipher_rows, order_rows
from tiny.problems import FAMILIES, ROLES

WITH_PI = ("degrees_to_radians", "sector_area")


def integers(text: str) -> list[int]:
    return [int(x) for x in re.findall(r"-?\d+", text)]


def number(answer: str) -> Fraction:
    r"""An integer or \frac{a}{b}; \pi counts as a factor 1 (its presence is checked beside)."""
    body = re.sub(r"(\d*)\\pi", lambda m: m[1] or "1", answer.removeprefix("-"))
    value = Fraction(body) if body.isdigit() else None
    if m := re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}", body):
        value = Fraction(int(m[1]), int(m[2]))
    assert value is not None, f"{answer} is not a number"
    return -value if answer.startswith("-") else value


def assert_right(family: str, example: Example) -> None:
    """The answer is what the problem's text says, worked out another way."""
    prompt, answer = example.prompt, example.answer
    numbers = integers(prompt)
    if family in ("expand_product", "complex_product"):
        product = re.search(r"\$(.*)\$", prompt)[1].replace(")(", ")*(")
        assert expression(answer) == expression(product), example
    elif family in ("vector_sum", "scaled_vector"):
        k = numbers.pop(0) if family == "scaled_vector" else 1
        a, b, c, d = numbers
        assert integers(answer) == [k * a + c, k * b + d], example
    elif family == "matrix_times_vector":
        product = torch.tensor(numbers[:4]).view(2, 2) @ torch.tensor(numbers[4:])
        assert integers(answer) == product.tolist(), example
    elif family == "base_conversion":
        digits, base = re.fullmatch(r"(\d+)_\{(\d+)\}", answer).groups()
        assert int(base) == numbers[1], example
        assert int(digits, int(base)) == numbers[0], example
    else:
        assert number(answer) == getattr(answers, family)(prompt, *numbers), example
        assert ("\\pi" in answer) == (family in WITH_PI), example


@pytest.mark.parametrize("role", ROLES)
def test_embedded_answers(role):
    checked = 0
    for split, per_family in (("train", 40), ("test", 20)):
        for name, examples in embedded_examples(per_family, 7, split, role).items():
            subject, family = name.split("/")
            for example in examples:
                assert checker.extract_answer(example.response) == example.answer, example
                assert example.subject == subject, example
                assert_right(family, example)
                checked += 1
            if split == "train":
                assert len({e.level for e in examples}) == 5, name
    assert checked > 300


def test_embedded_solutions_are_true():
    """Every "= " in a worked solution that joins plain arithmetic holds, also after "2x = "."""
    for_reading = ("hypotenuse", "arithmetic_series", "rectangle")  # chains and products of sums
    checked = 0
    for name, examples in embedded_examples(20, 3, "train").items():
        if any(family in name for family in for_reading):
            continue
        for example in examples:
            for clause in re.split(r"[,.] ", example.response.split("\\boxed")[0]):
                sides = [side.strip(" .") for side in clause.replace("\\cdot", "*").split("=")]
                plain = [side for side in sides if re.fullmatch(r"[-+*/()\d ^]+", side)]
                for side in plain[1:]:
                    assert expression(side) == expression(plain[0]), example
                    checked += 1
    assert checked > 800


def prompts_of(per_family: int, seeds: tuple[int, ...], split: str) -> set[str]:
    prompts = set()
    for seed in seeds:
        for examples in embedded_examples(per_family, seed, split).values():
            prompts |= {e.prompt for e in examples}
    return prompts


def test_embedded_splits():
    """No test problem is ever trained on, whatever the seeds; held-out families stay out."""
    trained, tested = prompts_of(500, (0, 1), "train"), prompts_of(40, (5, 6), "test")
    assert trained
    assert tested
    assert not trained & tested
    tasks = load_tasks("embedded")
    known = embedded_examples(1, 0, "train", "pretraining")
    assert [t.heldout for t in tasks] == [False] * 14 + [True] * 7
    assert not {t.name for t in tasks} & set(known)
    assert len(known) == 35
    assert load_tasks("embedded") == tasks
    by_subject = load_tasks("embedded", task_column="subject")
    assert [t.name for t in by_subject if not t.heldout] == list(FAMILIES)


def agreement(rows: list[dict], others: list[dict]) -> float:
    """How often two rules give the same answer to the same question."""
    pairs = list(zip(rows, others, strict=True))
    assert all(a["problem"] == b["problem"] for a, b in pairs)
    return sum(a["answer"] == b["answer"] for a, b in pairs) / len(pairs)


def test_ciphers():
    """A digit has one code, whatever the other digit: the support rows tell it. Another cipher's
    rows answer the same questions at chance."""
    agree = 0.0
    for i in range(30):
        rows = cipher_rows(i)
        table = {}
        for row in rows:
            a, b = re.findall(r"\d", row["problem"])
            table[int(a), int(b)] = row["answer"]
        assert len(table) == 100
        assert sorted(table[d, d][0] for d in range(10)) == list("0123456789")
        for (a, b), answer in table.items():
            assert answer == table[a, a][0] + table[b, b][1], f"{a}{b}"
        agree += agreement(rows, cipher_rows(i + 100)) / 30
    assert agree < 0.05


def test_orders():
    """Each of the 120 is another permutation of places, which one row tells."""
    orders, agree = set(), 0.0
    for i in range(ORDERS):
        rows = order_rows(i)
        found = set()
        for row in rows:
            (digits,) = re.findall(r"\d+", row["problem"])
            assert len(set(digits)) == 5
            found.add(tuple(digits.index(digit) for digit in row["answer"]))
        assert len({row["problem"] for row in rows}) == 100
        assert len(found) == 1, "several orders"
        orders |= found
        agree += agreement(rows, order_rows((i + 1) % ORDERS)) / ORDERS
    assert len(orders) == 120
    assert agree == 0
    held_out = [order_rows(i)[0] for i in range(100, 120)]  # of all kinds, not the last in a list
    digits = held_out[0]["problem"].split()[-1]
    assert {digits.index(row["answer"][0]) for row in held_out} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("data,training", [("ciphers", 980), ("orders", 100)])
def test_hidden_rules_as_tasks(data, training):
    """Rows of support, query and test differ; the last 20 rules are held out; no test question is
    ever trained on, whatever the rule."""
    tasks = load_tasks(data)
    assert [t.heldout for t in tasks] == [False] * training + [True] * 20
    seen, tested = set(), set()
    for t in tasks:
        assert [len(rows) for rows in (t.support, t.query, t.test)] == [30, 40, 30]
        seen |= {e.prompt for e in t.support + t.query}
        tested |= {e.prompt for e in t.test}
    assert len(seen) == 70
    assert seen.isdisjoint(tested)


def test_demonstrations_of_the_lower_levels():
    """Condition D trains on all levels and shows the first two."""
    parts = condition("D", Args(Path(), per_family=10, test_per_family=5))
    levels = {part: {row["level"] for row in rows} for part, rows in parts.items()}
    every = {1, 2, 3, 4, 5}
    assert levels == {"train": every, "test": every, "sft": {1, 2}}
