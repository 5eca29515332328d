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
from tiny.hidden_rules import CHANGES, change_rows, cipher_rows
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


# --------------------------------------------------------------------------------------------------
# How large the problems are, what is in their solutions


class Extreme:
    """Draws the least of everything, or the greatest."""

    def __init__(self, greatest: bool):
        self.greatest = greatest

    def randint(self, low: int, high: int) -> int:
        return high if self.greatest else low

    def choice(self, options):
        return options[-1] if self.greatest else options[0]

    def random(self) -> float:
        return 0.999 if self.greatest else 0.0


def extreme(family: str, greatest: bool, level: int) -> list[int]:
    """The numbers in the family's least or greatest problem."""
    for by_role in FAMILIES.values():
        for families in by_role:
            for function in families:
                if function.__name__ == family:
                    return integers(function(Extreme(greatest), level)[0])
    raise KeyError(family)


# The numbers as they stand in the problem, exponents and coefficients too: of the least problem, of
# the greatest of level 1, of the greatest of level 5
SIZES = r"""
add_and_subtract        2 2 1         12 9 8           60 45 40
order_of_operations     1 2 2         10 5 9           50 9 9
percent_of              50 2          25 24            30 300
fraction_sum            1 2 1 2       4 4 4 4          8 8 8 8
unit_price              2 4 2         7 35 7           11 143 11
missing_addend          2 4           12 21            60 105
difference_of_products  2 2 2 2       5 5 5 5          9 9 9 9
average_of_three        1 1 7         9 5 1            49 25 1
linear_equation         2 1 -3        4 8 24           8 40 200
evaluate_quadratic      2 1 2         2 3 4 5          2 7 20 9
sum_and_difference      3 1           22 2             110 10
expand_product          1 1           5 5              13 13
larger_root             2 2 1 0       2 8 16 0         2 16 64 0
two_step_equation       2 1 2         5 6 11           9 30 39
value_of_expression     2 2 2 2       5 5 5 5          9 9 5 5
slope                   0 0 1 -1      3 3 6 12         15 15 22 64
remainder_theorem       2 1 1         2 3 5 4          2 7 25 8
geometric_term          3 1 2         4 3 9            5 15 45
logarithm               2 2 0         6 36 8           10 1000 40
sum_of_squared_roots    2 2 1 0 2 2   2 10 25 0 2 2    2 18 81 0 2 2
arithmetic_series       3 1 2         4 3 5            6 15 21
function_sum            2 1 1 1       4 4 4 4          8 20 8 8
arithmetic_term         3 1 2         7 4 7            11 20 27
composition             2 1 2 1 1     3 2 3 2 3        7 10 7 10 7
degrees_to_radians      30            360              720
dot_product             -1 -1 -1 -1   3 3 3 3          7 7 7 7
determinant             1 1 1 1       4 4 4 4          8 8 8 8
complex_product         1 1 1 1       3 3 3 3          7 7 7 7
squared_length          -1 -1 -1      4 4 4            8 8 8
vector_sum              -1 -1 -1 -1   4 4 4 4          20 20 20 20
scaled_vector           2 1 1 1 1     4 4 4 4 4        8 8 8 20 20
matrix_times_vector     1 1 1 1 1 1   3 3 3 3 3 3      7 7 7 7 7 7
division_remainder      3 3           29 6             209 10
common_divisor          2 2           25 25            117 117
common_multiple         2 2           7 7              15 15
divisor_count           6             175              177957
base_conversion         5 2           24 5             72 9
digit_sum               100           999              999
next_multiple           3 4           6 20             10 80
units_digit             2 2           8 3              24 7
arrangements            1 3           2 7              3 15
combinations            2 4           2 7              3 15
single_draw             1 1           6 6              18 18
outfits                 2 2 2         4 4 4            8 8 8
multiples_up_to         2 1 10        6 1 40           10 1 120
other_color             1 1           6 6              18 18
two_menus               2 2 2 2       5 5 5 5          9 9 9 9
two_draws               2 1           4 5              8 13
rectangle_perimeter     1 1           8 8              40 40
triangle_area           2 2           10 6             26 14
hypotenuse              3 4           48 36            126 120
sector_area             2 2           8 8              20 8
third_angle             10 10         160 10           160 15
box_volume              2 2 2         4 4 4            8 8 8
missing_side            4 1           28 7             140 35
box_surface             1 1 1         3 3 3            7 7 7
"""
# Of the greatest problems of levels 1 to 5: what grows in steps, as (place in the problem, numbers)
GREATEST = {
    "geometric_term": (0, [4, 4, 5, 5, 5]),
    "logarithm": (1, [6**2, 7**2, 8**3, 9**3, 10**3]),
    "arithmetic_series": (0, [4, 5, 5, 6, 6]),
    "divisor_count": (0, [5**2 * 7, 3**3 * 11, 2**3 * 13**2, 3**4 * 13**2, 3**4 * 13**3]),
    "arrangements": (0, [2, 2, 2, 3, 3]),
    "combinations": (0, [2, 2, 2, 3, 3]),
    "hypotenuse": (1, [3 * 12, 5 * 6, 8 * 6, 7 * 6, 20 * 6]),
    "percent_of": (0, [25, 20, 75, 40, 30]),
    "degrees_to_radians": (0, [30 * 12, 45 * 18, 60 * 24, 36 * 30, 20 * 36]),
}


def test_sizes_of_the_problems():
    rows = [re.split(r"\s{2,}", row) for row in SIZES.strip().splitlines()]
    assert len(rows) == 56
    for family, *expected in rows:
        found = [extreme(family, *which) for which in ((False, 1), (True, 1), (True, 5))]
        assert found == [list(map(int, numbers.split())) for numbers in expected], family
        assert extreme(family, False, 5) == found[0] or family == "third_angle"
    for family, (place, expected) in GREATEST.items():
        assert [extreme(family, True, level)[place] for level in range(1, 6)] == expected, family
    angles = [extreme("third_angle", False, level) for level in range(1, 6)]
    assert angles == [[10, 10], [5, 5], [5, 5], [1, 1], [1, 1]]
    angles = [extreme("third_angle", True, level) for level in range(1, 6)]
    assert angles == [[160, 10], [160, 15], [160, 15], [160, 15], [160, 15]]


class Least(random.Random):
    """The first of the choices, all else at random."""

    def choice(self, options):
        return options[0]


def test_angles_leave_a_third():
    """Also where the first is wide and the second is a multiple of ten."""
    for level in range(1, 6):
        rng = random.Random(level)
        for _ in range(300):
            problem, *_ = FAMILIES["Geometry"][0][4](rng, level)
            a, b = integers(problem)
            assert 5 <= 180 - a - b < 180
            assert (a % 10 == b % 10 == 0) or level > 1


def test_pieces_of_a_text():
    """As one writes them: no 1x, no 0, no + -3, in lowest terms."""
    assert [fraction(a, b) for a, b in ((6, 4), (-6, 4), (8, 4), (-8, 4), (0, 5), (3, 7))] == [
        r"\frac{3}{2}", r"-\frac{3}{2}", "2", "-2", "0", r"\frac{3}{7}",
    ]  # fmt: skip
    cases = {
        (1, 0): "x", (-1, 0): "-x", (2, 0): "2x", (1, 3): "x + 3", (-1, -3): "-x - 3",
        (0, 1): "0x + 1", (-2, 1): "-2x + 1", (2, -1): "2x - 1",
    }  # fmt: skip
    assert {case: linear(*case) for case in cases} == cases
    assert linear(3, 4, "y") == "3y + 4"
    cases = {
        (0, 0): "x^2", (1, 0): "x^2 + x", (-1, 1): "x^2 - x + 1", (2, -1): "x^2 + 2x - 1",
        (-2, 0): "x^2 - 2x", (0, 5): "x^2 + 5", (0, -5): "x^2 - 5",
    }  # fmt: skip
    assert {case: quadratic(*case) for case in cases} == cases
    cases = {
        (1, 1): r"\pi", (6, 2): r"3\pi", (2, 4): r"\frac{\pi}{2}", (6, 4): r"\frac{3\pi}{2}",
        (90, 180): r"\frac{\pi}{2}", (360, 180): r"2\pi",
    }  # fmt: skip
    assert {case: multiple_of_pi(*case) for case in cases} == cases
    assert falling_product(7, 3) == r"7 \cdot 6 \cdot 5"
    assert falling_product(7, 1) == "7"


def test_draws():
    rng = random.Random(0)
    assert {nonzero(rng, 3) for _ in range(200)} == {-3, -2, -1, 1, 2, 3}
    assert set(several(rng, 200, 2, 5)) == {2, 3, 4, 5}
    assert set(several_nonzero(rng, 200, 2)) == {-2, -1, 1, 2}
    assert (len(several(rng, 4, 1, 9)), len(several_nonzero(rng, 3, 9))) == (4, 3)


# Of worked solutions: numbers that stand neither in the problem nor to the right of a step before
KNOWN = {
    "average_of_three": {3}, "triangle_area": {2}, "rectangle_perimeter": {2}, "box_surface": {2},
    "missing_side": {2}, "third_angle": {180}, "degrees_to_radians": {180}, "percent_of": {100},
    "arithmetic_series": {2}, "sum_of_squared_roots": {2},
}  # fmt: skip
# Solutions of which another part is checked, or which take a number apart
APART = {
    "degrees_to_radians", "common_multiple", "divisor_count", "larger_root", "two_draws",
    "combinations", "next_multiple", "arithmetic_series", "geometric_term", "arithmetic_term",
    "sum_of_squared_roots", "base_conversion", "units_digit", "expand_product", "percent_of",
    "linear_equation", "evaluate_quadratic", "remainder_theorem", "composition", "slope",
    "digit_sum",
}  # fmt: skip


def steps_of(example: Example) -> list[str]:
    return example.response.split(" \\boxed")[0].rstrip(".").split(", ")


def test_numbers_of_a_solution_come_from_somewhere():
    """Of the problem, or of a step before; the last step gives the answer where that is a whole
    number."""
    for name, examples in embedded_examples(25, 5, "train").items():
        family = name.split("/")[1]
        for example in examples:
            known = set(integers(example.prompt)) | KNOWN.get(family, set())
            for step in steps_of(example):
                left = step.split("=")[0]
                if family not in APART:
                    assert set(integers(left)) <= known, (family, example)
                known |= set(integers(step))
            assert set(integers(example.answer)) <= known or "frac" in example.answer, example


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


def test_changes():
    """Each of the 64 is another pair of eight readable changes, the same for all rows."""
    readable = {
        "as it is": lambda d: d,
        "next": lambda d: d + 1,
        "one before": lambda d: d - 1,
        "two on": lambda d: d + 2,
        "two back": lambda d: d - 2,
        "five on": lambda d: d + 5,
        "complement": lambda d: 9 - d,
        "three times": lambda d: 3 * d,
    }
    pairs, agree = set(), 0.0
    for i in range(CHANGES):
        rows = change_rows(i)
        digits = [re.findall(r"\d", row["problem"] + row["answer"]) for row in rows]
        assert len({(a, b) for a, b, _, _ in digits}) == 100
        pair = []
        for place in (0, 1):
            changes = {(int(row[place]), int(row[place + 2])) for row in digits}
            for name, change in readable.items():
                if all(change(d) % 10 == changed for d, changed in changes):
                    pair.append(name)
        assert len(pair) == 2
        pairs.add(tuple(pair))
        agree += agreement(rows, change_rows((i + 1) % CHANGES)) / CHANGES
    assert len(pairs) == 64
    assert agree < 0.05
    held_out = {tuple(row["answer"] for row in change_rows(i)[:2]) for i in range(44, 64)}
    assert len({a[0][0] for a in held_out}) > 3  # of many kinds, not the last in a list


@pytest.mark.parametrize("data,training", [("ciphers", 980), ("changes", 44)])
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
