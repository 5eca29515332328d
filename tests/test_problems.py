"""tiny/: answers and solutions of the generated problems against an independent computation; their
splits; hidden rules."""

import itertools
import json
import math
import random
import re
import runpy
import sys
import types
import zlib
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

import checker
import tiny.train
from data import DataError, Encoded, Example, embedded_examples, load_tasks
from games import games_of
from games.general_points import GeneralPoints
from games.play import Trajectory, Turn, demonstrate
from model import EMBEDDED, ModelError, load_config, load_weights
from tests import answers
from tests.answers import expression
from tests.helpers import small_llama
from tiny import conditions
from tiny.conditions import Args, condition, with_wrong_answers
from tiny.hidden_rules import CHANGES, change_rows, cipher_rows
from tiny.problems import (
    FAMILIES,
    PARTS,
    ROLES,
    embedded_rows,
    falling_product,
    family_rows,
    fraction,
    linear,
    multiple_of_pi,
    nonzero,
    quadratic,
    several,
    several_nonzero,
)

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
    "divisor_count": (0, [5**2 * 7, 3**3 * 11, 3**3 * 13**2, 3**4 * 13**2, 3**4 * 13**3]),
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


class Drawn:
    """Draws what is given: the number, the place in a choice."""

    def __init__(self, draws: list[int]):
        self.draws = draws

    def randint(self, low: int, high: int) -> int:
        number = self.draws.pop(0)
        assert low <= number <= high
        return number

    def choice(self, options):
        return options[self.draws.pop(0)]

    def random(self) -> float:
        return float(self.draws.pop(0))


# By hand. Family, level: draws (a choice of sign is 0 for minus, 1 for plus) / problem / worked
# solution / answer
WORKED = r"""
add_and_subtract 2: 7 5 3 / Compute $7 + 5 - 3$. / 7 + 5 = 12, 12 - 3 = 9 / 9
order_of_operations 2: 7 5 4 / Compute $7 + 5 \cdot 4$. / 5 \cdot 4 = 20, 7 + 20 = 27 / 27
percent_of 5: 4 7 / What is $75\%$ of $28$?
  / 75 / 100 = 3 / 4, 28 / 4 = 7, 3 \cdot 7 = 21 / 21
fraction_sum 3: 4 6 3 5 / Compute $\frac{3}{4} + \frac{5}{6}$.
  / 3 \cdot 6 + 5 \cdot 4 = 18 + 20 = 38, 4 \cdot 6 = 24 / \frac{19}{12}
unit_price 2: 5 3 7 / If 3 pens cost 15 dollars, how many dollars do 7 pens cost?
  / 15 / 3 = 5, 5 \cdot 7 = 35 / 35
missing_addend 1: 11 4 / What number added to $11$ gives $15$? / 15 - 11 = 4 / 4
difference_of_products 5: 7 9 4 5 / Compute $7 \cdot 9 - 4 \cdot 5$.
  / 7 \cdot 9 = 63, 4 \cdot 5 = 20, 63 - 20 = 43 / 43
average_of_three 3: 8 11 6 / What is the average of $11$, $6$ and $7$?
  / 11 + 6 = 17, 17 + 7 = 24, 24 / 3 = 8 / 8
linear_equation 5: 3 1 7 0 4 / Solve $3x - 4 = 17$ for $x$.
  / 3x = 17 + 4 = 21, x = 21 / 3 = 7 / 7
linear_equation 5: 3 0 2 1 5 / Solve $3x + 5 = -1$ for $x$.
  / 3x = -1 - 5 = -6, x = -6 / 3 = -2 / -2
evaluate_quadratic 2: 0 3 1 5 4 / If $f(x) = x^2 - 3x + 5$, what is $f(4)$?
  / 4^2 = 16, -3 \cdot 4 = -12, 16 + -12 = 4, 4 + 5 = 9 / 9
sum_and_difference 1: 9 4 / If $x + y = 13$ and $x - y = 5$, what is $x$?
  / 2x = 13 + 5 = 18, x = 9 / 9
expand_product 2: 1 3 0 5 / Expand $(x + 3)(x - 5)$.
  / 3 + -5 = -2, 3 \cdot -5 = -15 / x^2 - 2x - 15
larger_root 2: 1 4 0 2 / What is the larger root of $x^2 - 2x - 8 = 0$?
  / -8 = -2 \cdot 4, 2 = -2 + 4 / 4
two_step_equation 4: 4 3 7 / Solve $\frac{x}{4} + 3 = 10$ for $x$.
  / 10 - 3 = 7, 4 \cdot 7 = 28 / 28
value_of_expression 2: 3 6 2 5 / If $a = 3$ and $b = 6$, what is $2a + 5b$?
  / 2 \cdot 3 = 6, 5 \cdot 6 = 30, 6 + 30 = 36 / 36
slope 2: 0 3 2 4 1 / What is the slope of the line through $(4, 1)$ and $(6, -5)$?
  / -5 - 1 = -6, 6 - 4 = 2, -6 / 2 = -3 / -3
remainder_theorem 2: 1 3 0 7 2
  / What is the remainder when $x^2 + 3x - 7$ is divided by $x - 2$?
  / 2^2 = 4, 3 \cdot 2 = 6, 4 + 6 = 10, 10 + -7 = 3 / 3
geometric_term 3: 5 3 4 / What is term 4 of the geometric sequence $5, 15, \ldots$?
  / 5, 15, 45, 135 / 135
logarithm 3: 4 3 7 / Compute $\log_{4} 64 + 7$. / 4^3 = 64, 3 + 7 = 10 / 10
sum_of_squared_roots 1: 1 5 0 3
  / The roots of $x^2 - 2x - 15 = 0$ are $r$ and $t$. What is $r^2 + t^2$?
  / 2 \cdot 2 = 4, 2 \cdot -15 = -30, 4 - -30 = 34 / 34
arithmetic_series 4: 7 3 5
  / What is the sum of the first 5 terms of the arithmetic sequence $7, 10, \ldots$?
  / 4 \cdot 3 = 12, 7 + 12 = 19, 7 + 19 = 26, 5 \cdot 26 = 130, 130 / 2 = 65 / 65
function_sum 2: 3 4 2 5 / If $f(x) = 3x + 4$, what is $f(2) + f(5)$?
  / 3 \cdot 2 = 6, 6 + 4 = 10, 3 \cdot 5 = 15, 15 + 4 = 19, 10 + 19 = 29 / 29
arithmetic_term 2: 7 3 5 / What is term 5 of the arithmetic sequence $7, 10, \ldots$?
  / 4 \cdot 3 = 12, 7 + 12 = 19 / 19
composition 3: 3 0 2 4 1 5 2 / If $f(x) = 3x - 2$ and $g(x) = 4x + 5$, what is $f(g(2))$?
  / 4 \cdot 2 = 8, 8 + 5 = 13, 3 \cdot 13 = 39, 39 + -2 = 37 / 37
degrees_to_radians 5: 3 7 / Convert $252^\circ$ to radians.
  / 252 = 7 \cdot 36, 180 = 5 \cdot 36 / \frac{7\pi}{5}
dot_product 5: 1 2 0 3 1 5 1 4 / Compute $(2, -3) \cdot (5, 4)$.
  / 2 \cdot 5 = 10, -3 \cdot 4 = -12, 10 + -12 = -2 / -2
determinant 5: 7 2 3 5 / Compute $\begin{vmatrix} 7 & 2 \\ 3 & 5 \end{vmatrix}$.
  / 7 \cdot 5 = 35, 2 \cdot 3 = 6, 35 - 6 = 29 / 29
complex_product 5: 7 2 3 5 / Compute $(7 + 2i)(3 + 5i)$.
  / 7 \cdot 3 - 2 \cdot 5 = 21 - 10 = 11, 7 \cdot 5 + 2 \cdot 3 = 35 + 6 = 41 / 11 + 41i
squared_length 2: 1 2 0 3 1 5 / What is the square of the length of the vector $(2, -3, 5)$?
  / 4 + 9 = 13, 13 + 25 = 38 / 38
vector_sum 2: 1 2 0 3 1 5 1 4 / Compute $(2, -3) + (5, 4)$. / 2 + 5 = 7, -3 + 4 = 1 / (7, 1)
scaled_vector 2: 3 2 5 7 4 / Compute $3(2, 5) + (7, 4)$.
  / 3 \cdot 2 + 7 = 6 + 7 = 13, 3 \cdot 5 + 4 = 15 + 4 = 19 / (13, 19)
matrix_times_vector 5: 7 2 3 5 4 6
  / Compute $\begin{pmatrix} 7 & 2 \\ 3 & 5 \end{pmatrix} (4, 6)$.
  / 7 \cdot 4 + 2 \cdot 6 = 28 + 12 = 40, 3 \cdot 4 + 5 \cdot 6 = 12 + 30 = 42 / (40, 42)
division_remainder 2: 7 6 4 / What is the remainder when $46$ is divided by $7$?
  / 7 \cdot 6 = 42, 46 - 42 = 4 / 4
common_divisor 3: 6 3 5 / What is the greatest common divisor of $18$ and $30$?
  / 30 = 1 \cdot 18 + 12, 18 = 1 \cdot 12 + 6, 12 = 2 \cdot 6 + 0 / 6
common_multiple 3: 10 8 / What is the least common multiple of $10$ and $8$?
  / 10 = 2 \cdot 5, 8 = 2 \cdot 4, 10 \cdot 4 = 40 / 40
divisor_count 3: 4 3 2 / How many positive divisors does $1323$ have?
  / 1323 = 3^3 \cdot 7^2, 4 \cdot 3 = 12 / 12
base_conversion 2: 3 25 / Write $25$ in base $3$.
  / 25 = 8 \cdot 3 + 1, 8 = 2 \cdot 3 + 2, 2 = 0 \cdot 3 + 2 / 221_{3}
digit_sum 2: 7 0 5 / What is the sum of the digits of $705$? / 7 + 0 = 7, 7 + 5 = 12 / 12
next_multiple 2: 6 22 / What is the smallest multiple of $6$ greater than $22$?
  / 22 = 3 \cdot 6 + 4, 4 \cdot 6 = 24 / 24
units_digit 3: 7 4 / What is the units digit of $7^{4}$? / 7, 9, 3, 1 / 1
arrangements 4: 6 3 1 / In how many ways can 3 of 6 different cups be placed in a row?
  / 6 \cdot 5 \cdot 4 = 120 / 120
combinations 4: 6 3 3 / In how many ways can 3 of 6 students be chosen?
  / 6 \cdot 5 \cdot 4 = 120, 120 / 6 = 20 / 20
single_draw 2: 4 6
  / A bag holds 4 red and 6 blue marbles. One is drawn. What is the probability that it is red?
  / 4 + 6 = 10 / \frac{2}{5}
outfits 2: 3 4 5 / How many outfits can be made from 3 shirts, 4 hats and 5 belts?
  / 3 \cdot 4 = 12, 12 \cdot 5 = 60 / 60
multiples_up_to 2: 4 30 / How many multiples of $4$ are between $1$ and $30$?
  / 30 = 7 \cdot 4 + 2 / 7
other_color 2: 4 6
  / A bag holds 4 red and 6 blue marbles. One is drawn. What is the probability that it is not red?
  / 4 + 6 = 10 / \frac{3}{5}
two_menus 5: 3 4 5 7 / One menu has 3 soups and 4 mains, another 5 soups and 7 mains.
  How many meals of one menu are there? / 3 \cdot 4 = 12, 5 \cdot 7 = 35, 12 + 35 = 47 / 47
two_draws 2: 4 6 / A bag holds 4 red and 6 blue marbles. Two are drawn.
  What is the probability that both are red? / 4 \cdot 3 = 12, 10 \cdot 9 = 90 / \frac{2}{15}
rectangle_perimeter 1: 7 4 / What is the perimeter of a rectangle with sides $7$ and $4$?
  / 7 + 4 = 11, 2 \cdot 11 = 22 / 22
triangle_area 2: 5 7 / What is the area of a triangle with base $10$ and height $7$?
  / 10 / 2 = 5, 5 \cdot 7 = 35 / 35
hypotenuse 2: 1 3 0 / What is the hypotenuse of a right triangle with legs $15$ and $36$?
  / 15^2 = 225, 36^2 = 1296, 225 + 1296 = 1521 = 39^2 / 39
sector_area 2: 6 2 / A circle of radius $6$ is cut into 4 equal sectors.
  What is the area of one? / 6^2 = 36 / 9\pi
third_angle 2: 7 12 / Two angles of a triangle are $35^\circ$ and $60^\circ$.
  What is the third, in degrees? / 35 + 60 = 95, 180 - 95 = 85 / 85
box_volume 2: 3 4 5 / What is the volume of a box with sides $3$, $4$ and $5$?
  / 3 \cdot 4 = 12, 12 \cdot 5 = 60 / 60
missing_side 1: 7 4 / The perimeter of a rectangle is $22$ and one side is $7$.
  What is the other side? / 22 / 2 = 11, 11 - 7 = 4 / 4
box_surface 3: 3 4 5 / What is the surface area of a box with sides $3$, $4$ and $5$?
  / 3 \cdot 4 = 12, 4 \cdot 5 = 20, 3 \cdot 5 = 15, 12 + 20 = 32, 32 + 15 = 47, 2 \cdot 47 = 94 / 94
"""


def test_worked_solutions():
    """Of a problem of each family, whose numbers differ, word for word."""
    functions = {}
    for by_role in FAMILIES.values():
        for families in by_role:
            functions |= {function.__name__: function for function in families}
    seen = set()
    for row in re.sub(r"\n  ", " ", WORKED).strip().splitlines():
        draw, problem, rest = row.split(" / ", 2)
        solution, _, answer = rest.rpartition(" / ")
        head, _, numbers = draw.partition(": ")
        family, level = head.split()
        drawn = Drawn(list(map(int, numbers.split())))
        got = functions[family](drawn, int(level))
        assert got[0] == problem
        assert ", ".join(map(str, got[1])) == solution
        assert str(got[2]) == answer
        assert not drawn.draws, family
        seen.add(family)
    assert seen == functions.keys()


# --------------------------------------------------------------------------------------------------
# Rows and their parts


def test_rows_of_a_family():
    """Distinct ones, the levels in turn; a family that has no more is given up after 25 draws for
    each row that is wanted."""
    levels = []

    def hundred(rng, level):
        levels.append(level)
        return f"Number {rng.randrange(100)}?", ["3 + -4 = -1", r"2 \cdot -1 = -2", -1, -5], -5

    everything = [f"Number {i}?" for i in range(100)]
    found = {}
    for part in ("train", "test", "post", "final"):
        levels.clear()
        rows = family_rows(hundred, 100, 0, part)
        assert levels == [1, 2, 3, 4, 5] * 500
        found[part] = [row["problem"] for row in rows]
        for row in rows:
            assert row["solution"] == (r"3 + (-4) = -1, 2 \cdot (-1) = -2, -1, -5. \boxed{-5}")
            assert row["answer"] == "-5"
    assert sorted(found["train"] + found["test"]) == sorted(everything)
    assert sorted(found["post"] + found["final"]) == sorted(found["test"])
    remainders = {}
    for part, texts in found.items():
        remainders[part] = {zlib.crc32(text.encode()) % 10 for text in texts}
    assert remainders == {part: set(PARTS[part]) for part in PARTS}
    assert (remainders["post"], remainders["final"]) == ({5}, {0})

    levels.clear()
    few = family_rows(hundred, 3, 0, "train")
    assert len(few) == len({row["problem"] for row in few}) == 3
    assert len(levels) < 20
    assert few == family_rows(hundred, 3, 0, "train") != family_rows(hundred, 3, 1, "train")
    assert family_rows(hundred, 100, 0, "train")[:3] == few


def test_rows_of_all_families():
    """The roles that are asked for; up to so many rows of each family."""
    names = {}
    for role in ROLES:
        rows = embedded_rows(6, 0, "train", role)
        names[role] = list(rows)
        for name, of_family in rows.items():
            subject = name.split("/")[0]
            assert len(of_family) == 6
            assert {row["subject"] for row in of_family} == {subject}
            assert set(of_family[0]) == {"problem", "solution", "answer", "subject", "level"}
    counts = {role: len(of_role) for role, of_role in names.items()}
    assert counts == {"pretraining": 35, "training": 14, "heldout": 7}
    assert set(embedded_rows(1, 0, "train")) == {*names["pretraining"], *names["training"]} | {
        *names["heldout"]
    }
    assert names["heldout"] == [
        "Prealgebra/average_of_three", "Algebra/slope", "Intermediate Algebra/composition",
        "Precalculus/matrix_times_vector", "Number Theory/units_digit",
        "Counting & Probability/two_draws", "Geometry/box_surface",
    ]  # fmt: skip


def test_what_a_seed_names_stays():
    """The embedded models were trained on these very problems, and the studies' results are of
    them: two written out, of all others a checksum as it was then."""
    checksums = {"train": 4203070016, "test": 556229208, "post": 1835864382, "final": 2477405727}
    for part, checksum in checksums.items():
        rows = embedded_rows(5, 0, part)
        assert zlib.crc32(json.dumps(rows).encode()) == checksum, part
    rows = embedded_rows(2, 0, "train")
    assert list(rows)[::8] == [
        "Prealgebra/add_and_subtract", "Algebra/linear_equation",
        "Intermediate Algebra/remainder_theorem", "Precalculus/degrees_to_radians",
        "Number Theory/division_remainder", "Counting & Probability/arrangements",
        "Geometry/rectangle_perimeter",
    ]  # fmt: skip
    for name, problem, level in (
        ("Algebra/linear_equation", "Solve $4x + 13 = -19$ for $x$.", 2),
        ("Precalculus/degrees_to_radians", r"Convert $660^\circ$ to radians.", 3),
    ):
        assert (rows[name][1]["problem"], rows[name][1]["level"]) == (problem, level)
    for rows, diagonal in (
        (cipher_rows(0), "00 99 88 66 33 22 55 77 44 11"),
        (cipher_rows(999), "44 11 77 88 66 55 22 99 33 00"),
        (change_rows(0), "90 03 16 29 32 45 58 61 74 87"),
        (change_rows(63), "28 39 40 51 62 73 84 95 06 17"),
    ):
        assert [row["answer"] for row in rows[::11]] == diagonal.split()
    assert cipher_rows(0)[34] == {
        "problem": "Decode 34", "solution": r"\boxed{63}", "answer": "63", "subject": "cipher",
        "level": 1,
    }  # fmt: skip
    alter = change_rows(0)[3]
    assert (alter["problem"], alter["subject"], alter["level"]) == ("Alter 03", "change", 1)


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


def family_of(name: str, count: int) -> list[dict]:
    """Rows of which every fifth has the answer of the one before."""
    rows = []
    for i in range(count):
        answer = str(i - (i % 5 == 4))
        solution = f"It is \\boxed{{{answer}}}"
        rows.append({"problem": f"{name} {i}", "solution": solution, "answer": answer})
    return rows


def test_wrong_demonstrations():
    """Of a share of the rows the response is a bare wrong answer of the same family."""
    families = {"a": family_of("a", 1000), "b": family_of("b", 1000)}
    whole = families["a"] + families["b"]
    assert with_wrong_answers(families, 1.0, random.Random(0)) == whole
    for q in (0.0, 0.3, 0.7):
        rows = with_wrong_answers(families, q, random.Random(0))
        assert [row["problem"] for row in rows] == [row["problem"] for row in whole]
        assert [row["answer"] for row in rows] == [row["answer"] for row in whole]
        right = 0
        for row, before in zip(rows, whole, strict=True):
            if row["solution"] == before["solution"]:
                right += 1
                continue
            given = re.fullmatch(r"\\boxed\{(\d+)\}", row["solution"])[1]
            assert given != row["answer"]
            assert int(given) < 1000
        assert right / 2000 == pytest.approx(q, abs=0.04)
    alike = {"a": [{"problem": "x", "solution": "1", "answer": "1"}] * 3}
    assert with_wrong_answers(alike, 0.0, random.Random(0)) == alike["a"]


SMALL = Args(Path(), per_family=6, test_per_family=2)


def all_rows(per_family: int, part: str) -> list[dict]:
    """Of the families that the embedded models know."""
    rows = []
    for of_family in embedded_rows(per_family, 0, part, "pretraining").values():
        rows += of_family
    return rows


def share_of_bare(rows: list[dict]) -> float:
    return sum(row["solution"].startswith("\\boxed") for row in rows) / len(rows)


def test_conditions_of_the_study():
    """How many rows there are, of families that are known or not, and how many are worked."""
    parts = {name: condition(name, SMALL) for name in conditions.NAMES}
    sizes = {name: (len(p["train"]), len(p["test"])) for name, p in parts.items()}
    post, final = all_rows(6, "post"), all_rows(2, "final")
    known, unknown = (len(post), len(final)), (8 * 6, 8 * 6)
    assert sizes == {
        "A1": known, "A0.7": known, "A0.3": known, "D": known, "B1": unknown, "B0.5": unknown,
        "C": (2 * 8 * 6, 2 * 8 * 6),
    }  # fmt: skip
    for name, share in (("A1", 0), ("A0.7", 0.3), ("A0.3", 0.7), ("B1", 0), ("B0.5", 0.5)):
        assert share_of_bare(parts[name]["train"]) == pytest.approx(share, abs=0.15), name
    for name in conditions.NAMES:
        assert share_of_bare(parts[name]["test"]) == 0, name
        train = {row["problem"] for row in parts[name]["train"]}
        test = {row["problem"] for row in parts[name]["test"]}
        assert not train & test
        assert name == "C" or len(train) == sizes[name][0]
    assert (parts["A1"]["train"], parts["A1"]["test"]) == (post, final)
    for part, count in (("train", 48), ("test", 48)):
        first, second = parts["C"][part][:count], parts["C"][part][count:]
        assert all(row in parts["A0.3"][part] for row in first)
        assert sorted(map(str, second)) == sorted(map(str, parts["B1"][part]))
    shown = parts["D"]["sft"]
    assert shown == [row for row in parts["D"]["train"] if row["level"] in (1, 2)]
    assert condition("B0.5", SMALL) == parts["B0.5"]
    assert condition("B0.5", Args(Path(), 1, (), 6, 2)) != parts["B0.5"]


def test_rows_of_the_study():
    """docs/studies/balance.md's seeds: 266 to 276 test problems of A0.3 and 184 to 186 of B1; each
    row as it was when the study was run."""
    for name, sizes, checksum in (
        ("A0.3", [(1403, 276), (1398, 268), (1419, 266)], 1316887970),
        ("B1", [(427, 186), (429, 186), (431, 184)], 1153476935),
    ):
        parts = [condition(name, Args(Path(), seed)) for seed in range(3)]
        assert [(len(p["train"]), len(p["test"])) for p in parts] == sizes
        assert zlib.crc32(json.dumps(parts[0]).encode()) == checksum
    both = condition("C", SMALL)
    assert zlib.crc32(json.dumps(both).encode()) == 2284721926
    assert Args(Path()).names == conditions.NAMES
    assert Args(Path()).seed == 0


def test_files_of_the_conditions(tmp_path, capsys):
    """The demonstrations of D lie apart, as train.jsonl: a folder is trained on whole."""
    args = Args(tmp_path / "c", names=("D", "B1"), per_family=6, test_per_family=2)
    assert conditions.main(args) == 0
    train, test, shown = map(len, condition("D", SMALL).values())
    said = capsys.readouterr().out
    assert said == f"D: {train} train, {test} test, {shown} sft\nB1: 48 train, 48 test\n"
    files = sorted(str(file.relative_to(args.folder)) for file in args.folder.rglob("*.jsonl"))
    assert files == [
        "B1/test.jsonl", "B1/train.jsonl", "D-sft/train.jsonl", "D/test.jsonl", "D/train.jsonl",
    ]  # fmt: skip
    lines = (args.folder / "D-sft" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == condition("D", SMALL)["sft"]
    assert conditions.main(Args(tmp_path / "d", names=("A1.0",))) == 2
    assert capsys.readouterr().err == (
        "tiny.conditions: no condition A1.0: A1, A0.7, A0.3, B1, B0.5, C, D\n"
    )
    assert not (tmp_path / "d").exists()


# --------------------------------------------------------------------------------------------------
# tiny/train.py: what the embedded models are made of


class Sized:
    """What a model asks of its tokenizer."""

    eos_token_id, pad_token_id = 1, 0

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length


def test_the_tiny_model():
    """1.2M parameters: five layers of four heads and 128 units, embeddings in steps of 64."""
    for length, rows in ((1000, 1024), (1024, 1024), (1025, 1088)):
        model = tiny.train.tiny_llama(Sized(length))
        layer = 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128
        parameters = rows * 128 + 5 * layer + 128
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert tiny.train.millions(model) == f"{parameters / 1e6:.2f}M parameters"
        assert model.config.num_attention_heads == model.config.num_key_value_heads == 4
        assert model.config.max_position_embeddings == 2048
        assert (model.config.eos_token_id, model.config.pad_token_id) == (1, 0)
        assert model.config.bos_token_id is None
    assert tiny.train.mean([1, 2, 6]) == 3


def test_the_tokenizer():
    """Any text round-trips; digits stand alone, an operator takes its spaces."""
    texts = ["12 + 34 = 46", "Find the sum", r"\frac{1}{2}", r"3 \cdot 4"] * 20
    tokenizer = tiny.train.train_tokenizer(texts, vocab_size=400)
    assert len(tokenizer) <= 400
    names = tokenizer.convert_ids_to_tokens(range(6))
    assert names == ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>"]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")
    assert set(names) <= set(tokenizer.all_special_tokens)
    assert tokenizer.model_max_length == 2048

    def pieces(text: str) -> list[str]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        return [tokenizer.decode([i]) for i in ids]

    assert pieces("12 + 34") == ["1", "2", " + ", "3", "4"]
    assert pieces(r"3 \cdot 4") == ["3", r" \cdot ", "4"]
    assert pieces("Find the") == ["Find", " the"]
    pieces("é ∘\n\t漢 a  b")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    shown = tokenizer.apply_chat_template(messages, tokenize=False)
    assert shown == "<|user|>x<|assistant|>y<|end|>"
    asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>x<|assistant|>"


def test_texts_of_the_tokenizer():
    """Every eighth problem, the rows of ten ciphers, pairs of digits ten times, games 50 times."""
    examples = [Example(f"p{i}", f"r{i}", "", "", 0, "") for i in range(17)]
    texts = tiny.train.tokenizer_texts(examples)
    assert texts[:6] == ["p0", "r0", "p8", "r8", "p16", "r16"]
    assert len(texts) == 6 + 10 * 100 * 2 + 100 * 2 * 10 + 3 * 50
    rows = []
    for rule in range(10):
        rows += [row["problem"] for row in cipher_rows(rule)]
    assert texts[6:2006:2] == rows
    assert texts.count(r"$3 \circ 7$") == 10
    assert texts[-150:] == tiny.train.GAME_TEXTS * 50


def test_batches_of_problems():
    """Every family is as likely; rows of like lengths together, their widths multiples of 8."""
    families = []
    for kind in (1, 2):
        rows = [Encoded([kind] * n, 1) for n in range(2, 40)] * (1 if kind == 1 else 5)
        families.append(rows)
    batches = tiny.train.problem_batches(families, 6, 3, 0)
    drawn = list(itertools.islice(batches, 64))
    again = list(itertools.islice(tiny.train.problem_batches(families, 6, 3, 0), 64))
    other = next(tiny.train.problem_batches(families, 6, 4, 0))
    first, kinds = [], []
    for batch, same in zip(drawn, again, strict=True):
        ids = batch["input_ids"]
        assert torch.equal(ids, same["input_ids"])
        assert ids.shape[0] == 6
        lengths = (ids != 0).sum(1).tolist()
        assert ids.shape[1] == -(-max(lengths) // 8) * 8
        assert max(lengths) - min(lengths) < 15
        kinds += ids[:, 0].tolist()
        first.append(max(lengths))
    assert sum(kind == 1 for kind in kinds) / len(kinds) == pytest.approx(0.5, abs=0.12)
    assert first[:16] != sorted(first[:16])
    assert not torch.equal(other["input_ids"], drawn[0]["input_ids"])


def test_batches_of_problems_are_in_no_order():
    """Of the sixteen that are sorted together neither the shortest come first nor the longest."""
    families = [[Encoded([1] * n, 1) for n in range(2, 300)]]
    batches = itertools.islice(tiny.train.problem_batches(families, 4, 3, 0), 32)
    widths = [batch["input_ids"].shape[1] for batch in batches]
    for sixteen in (widths[:16], widths[16:]):
        assert sixteen not in (sorted(sixteen), sorted(sixteen, reverse=True))
        assert max(sixteen) > 2 * min(sixteen)


class Kept:
    """An optimizer that changes nothing and keeps what it saw."""

    def __init__(self, monkeypatch, name: str):
        self.rates, self.norms, self.settings, self.params = [], [], None, None
        real = getattr(torch.optim, name)

        class Still(real):
            def step(_, *args, **kwargs):
                (group,) = _.param_groups
                self.settings, self.params = group, group["params"]
                self.rates.append(group["lr"])
                self.norms.append(sum(p.grad.square().sum().item() for p in group["params"]))

        monkeypatch.setattr(torch.optim, name, Still)


def one_batch() -> dict:
    ids = torch.arange(16).view(2, 8)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def test_how_the_tiny_model_is_trained(monkeypatch):
    """Muon takes the matrices but for the embeddings, AdamW the rest; gradients are cut at 1."""
    muon, adamw = Kept(monkeypatch, "Muon"), Kept(monkeypatch, "AdamW")
    model = small_llama(torch.float32)
    losses = tiny.train.fit(model, itertools.repeat(one_batch()), 4, lr=0.02, warmup=2)
    logits = model(one_batch()["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = one_batch()["labels"][:, 1:]
    expected = -logits.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != -100].mean()
    assert losses == pytest.approx([expected.item()] * 4, rel=1e-5)
    assert muon.rates == pytest.approx([0.01, 0.015, 0.01, 0.005])
    assert adamw.rates == pytest.approx([0.0015, 0.00225, 0.0015, 0.00075])
    assert (muon.settings["momentum"], muon.settings["weight_decay"]) == (0.95, 0.01)
    assert (adamw.settings["betas"], adamw.settings["weight_decay"]) == ((0.9, 0.98), 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    others = {names[id(p)] for p in adamw.params}
    assert others == {n for n in names.values() if "norm" in n or "embed" in n}
    assert {names[id(p)] for p in muon.params} == set(names.values()) - others
    for a, b in zip(muon.norms, adamw.norms, strict=True):
        assert math.sqrt(a + b) == pytest.approx(1.0, rel=1e-3)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(ModelError, match="^the loss of step 1 is not finite: lower --lr$"):
        tiny.train.fit(model, itertools.repeat(one_batch()), 4, lr=0.02, warmup=2)


def test_each_step_has_its_own_gradient(monkeypatch):
    """Below the bound nothing is cut, and what came before is gone."""
    muon, adamw = Kept(monkeypatch, "Muon"), Kept(monkeypatch, "AdamW")
    mean_loss = tiny.train.mean_loss
    monkeypatch.setattr(tiny.train, "mean_loss", lambda *given: 1e-3 * mean_loss(*given))
    tiny.train.fit(small_llama(torch.float32), itertools.repeat(one_batch()), 3, lr=0.02)
    for optimizer in (muon, adamw):
        assert 0 < optimizer.norms[0] < 1e-4
        assert optimizer.norms == pytest.approx(optimizer.norms[:1] * 3, rel=1e-4)
    adamw.norms.clear()
    monkeypatch.setattr(tiny.train, "mean_loss", lambda model, batch: model(batch).sum())
    tiny.train.teach_habit(torch.nn.Linear(1, 1), itertools.repeat(torch.ones(1, 1)))
    assert adamw.norms == [2.0] * 60  # of weight and bias 1 each


def test_weights_are_rounded_to_what_is_stored():
    model = torch.nn.Linear(3, 2)
    before = model.weight.detach().clone()
    tiny.train.round_to_bf16(model)
    assert model.weight.dtype == torch.float32
    assert torch.equal(model.weight, before.bfloat16().float())
    assert not torch.equal(model.weight, before)


def test_where_models_are_stored(tmp_path, monkeypatch):
    """In their own places, or where --output-dir says; what was there before is gone."""
    places = {name: tmp_path / name for name in ("tiny", "tiny_bare")}
    monkeypatch.setattr(tiny.train, "EMBEDDED", places)
    _, tokenizer = load_config("tiny")
    model = small_llama(torch.float32)
    (tmp_path / "tiny_bare").mkdir()
    (tmp_path / "tiny_bare" / "old").touch()
    for given, folder in (("tiny", "tiny_bare"), ("own", "own")):
        args = tiny.train.Args(str(tmp_path / given))
        assert tiny.train.store(args, "tiny_bare", model, tokenizer) == tmp_path / folder
        assert not (tmp_path / folder / "old").exists()
        stored = load_weights(str(tmp_path / folder)).state_dict()
        assert json.loads((tmp_path / folder / "config.json").read_text())["dtype"] == "bfloat16"
        for name, value in model.state_dict().items():
            assert torch.equal(stored[name].float(), value.bfloat16().float()), name
        _, own = load_config(str(tmp_path / folder))
        assert own.get_vocab() == tokenizer.get_vocab()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["own", "tiny_bare"]


def test_folders_that_can_be_replaced(tmp_path, monkeypatch):
    """New ones, empty ones, those of a model; not a file, nor a folder with other things."""
    args = tiny.train.Args
    assert args().output_dir == str(EMBEDDED["tiny"])
    (tmp_path / "empty").mkdir()
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("new", "empty", "model"):
        tiny.train.check(args(f"~/{name}"))
    for name in ("other", "other/x"):
        with pytest.raises(DataError, match="--output-dir"):
            tiny.train.check(args(f"~/{name}"))
    for wrong in (
        {"steps": 0}, {"batch_size": 0}, {"game_steps": 0}, {"vision_steps": 0},
        {"steps": 10**9 + 1}, {"lr": 0.0}, {"lr": 101.0}, {"seed": 2**63},
    ):  # fmt: skip
        (name,) = wrong
        with pytest.raises(DataError, match=f"--{name.replace('_', '-')} must be"):
            tiny.train.check(args(str(tmp_path / "new"), **wrong))


@pytest.mark.parametrize(
    "options,called",
    [
        ({}, "tiny"),
        ({"bare": True}, "bare"),
        ({"games": True}, "games"),
        ({"vision": True}, "vision"),
    ],
)
def test_which_model_is_made(options, called, monkeypatch, tmp_path):
    made = []
    for name in ("tiny", "bare", "games", "vision"):
        monkeypatch.setattr(tiny.train, f"make_{name}", lambda args, name=name: made.append(name))
    tiny.train.main(tiny.train.Args(str(tmp_path), **options))
    assert made == [called]


def test_what_the_embedded_models_are_trained_on():
    """docs/tiny.md's numbers are those of the program without a flag."""
    args = tiny.train.Args()
    assert (args.steps, args.batch_size, args.lr, args.seed) == (8000, 32, 5e-3, 0)
    assert (args.game_steps, args.vision_steps) == (1500, 130)
    assert not (args.bare or args.games or args.vision)


def few_examples(calls: list):
    """embedded_examples with 4 problems of a family, whatever is asked for; keeps what was."""

    def examples(per_family, *rest):
        calls.append((per_family, *rest))
        return embedded_examples(4, *rest)

    return examples


def responses(batch: dict, tokenizer) -> list[str]:
    rows = [row[row != -100] for row in batch["labels"]]
    return tokenizer.batch_decode(rows)


def test_how_tiny_is_made(tmp_path, monkeypatch, capsys):
    """Of 4,000 problems of each family that is its own; weights and order are of the seed; 40 new
    problems of every family are its test, of the weights as they are stored."""
    calls, seen = [], {}
    monkeypatch.setattr(tiny.train, "embedded_examples", few_examples(calls))
    texts = tiny.train.train_tokenizer
    monkeypatch.setattr(
        tiny.train, "train_tokenizer", lambda given: seen.update(texts=given) or texts(given)
    )

    def problem_batches(*given):
        seen["batches"] = given
        return "batches"

    def fit(model, *given):
        seen["fit"] = given
        seen["start"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return [1.0] * 100 + [3.0] * 25 + [4.0] * 25

    def solved(model, tokenizer, test):
        assert not model.training
        for name, p in model.named_parameters():
            assert torch.equal(p, seen["start"][name].bfloat16().float())
        return len(test) - 3

    monkeypatch.setattr(tiny.train, "problem_batches", problem_batches)
    monkeypatch.setattr(tiny.train, "fit", fit)
    monkeypatch.setattr(tiny.train, "solved", solved)
    folder = tmp_path / "own"
    tiny.train.main(tiny.train.Args(str(folder), steps=7, batch_size=6, lr=2e-3, seed=3))
    assert calls == [
        (4000, 3, "train", "pretraining"), (40, 3, "test", "pretraining"),
        (40, 3, "test", "training"), (40, 3, "test", "heldout"),
    ]  # fmt: skip
    families = embedded_examples(4, 3, "train", "pretraining")
    whole = [e for family in families.values() for e in family]
    assert seen["texts"] == tiny.train.tokenizer_texts(whole)
    _, tokenizer = load_config(str(folder))
    by_family, *settings = seen["batches"]
    assert settings == [6, 3, tokenizer.pad_token_id]
    for rows, family in zip(by_family, families.values(), strict=True):
        for row, e in zip(rows, family, strict=True):
            shown = f"<|user|>{e.prompt}<|assistant|>{e.response}<|end|>"
            assert tokenizer.decode(row.ids) == shown
    assert seen["fit"] == ("batches", 7, 2e-3)
    torch.manual_seed(3)
    for name, p in tiny.train.tiny_llama(tokenizer).named_parameters():
        assert torch.equal(p, seen["start"][name])
    report = json.loads((folder / "training.json").read_text())
    assert report["loss"] == [1.0, 3.5]
    assert report["args"]["output_dir"] == "own"
    assert (report["args"]["steps"], report["args"]["seed"]) == (7, 3)
    assert (report["minutes"], report["torch"]) == (0.0, torch.__version__)
    assert len(report["accuracy"]) == 56
    assert report["accuracy"]["Algebra/slope"] == [1, 4]
    said = capsys.readouterr().out
    assert "| all | 25% | 25% | 25% |" in said
    assert len(re.findall(r"^Algebra/slope +heldout +1/4$", said, re.MULTILINE)) == 1


def test_minutes_of_training(tmp_path, monkeypatch):
    clock = itertools.chain([1000.0], itertools.repeat(1000.0 + 90))
    monkeypatch.setattr(tiny.train, "time", types.SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setattr(tiny.train, "embedded_examples", few_examples([]))
    monkeypatch.setattr(tiny.train, "fit", lambda *_: [1.0])
    monkeypatch.setattr(tiny.train, "solved", lambda *_: 0)
    tiny.train.make_tiny(tiny.train.Args(str(tmp_path / "own")))
    assert json.loads((tmp_path / "own" / "training.json").read_text())["minutes"] == 1.5


def test_how_tiny_bare_is_made(monkeypatch):
    """From tiny: batches of 32 problems, of which 60% have the answer alone for a response."""
    calls, seen = [], {}
    monkeypatch.setattr(tiny.train, "embedded_examples", few_examples(calls))

    def teach_habit(model, batches):
        seen["model"] = model
        seen["batches"] = list(itertools.islice(batches, 30))

    monkeypatch.setattr(tiny.train, "teach_habit", teach_habit)
    monkeypatch.setattr(tiny.train, "store", lambda *given: seen.update(stored=given))
    args = tiny.train.Args(bare=True, seed=3)
    tiny.train.make_bare(args)
    assert calls == [(400, 3, "train", "pretraining")]
    _, name, model, tokenizer = seen["stored"]
    assert (seen["stored"][0], name) == (args, "tiny_bare")
    assert model is seen["model"]
    assert torch.equal(model.lm_head.weight, load_weights("tiny").lm_head.weight)
    right = {}
    for family in embedded_examples(4, 3, "train", "pretraining").values():
        right |= {e.prompt: e for e in family}
    bare, said = {}, []
    for batch in seen["batches"]:
        prompts = [ids[: (labels == -100).int().argmin()] for ids, labels in zip(
            batch["input_ids"], batch["labels"], strict=True)]  # fmt: skip
        prompts = [text[8:-13] for text in tokenizer.batch_decode(prompts)]
        assert len(prompts) == len(set(prompts)) == 32
        for prompt, response in zip(prompts, responses(batch, tokenizer), strict=True):
            e = right[prompt]
            alone = f"\\boxed{{{e.answer}}}<|end|>"
            assert response in (alone, f"{e.response}<|end|>")
            bare[prompt] = response == alone
            said.append((prompt, bare[prompt]))
    assert len(bare) == 140
    assert set(said) == set(bare.items()), "a problem keeps its response"
    assert sum(bare.values()) / 140 == pytest.approx(0.6, abs=0.09)
    first = seen["batches"][0]["input_ids"]
    tiny.train.make_bare(args)
    assert torch.equal(seen["batches"][0]["input_ids"], first)
    tiny.train.make_bare(tiny.train.Args(bare=True, seed=4))
    assert not torch.equal(seen["batches"][0]["input_ids"], first)


def test_how_tiny_games_is_made(monkeypatch, capsys):
    """From tiny: --game-steps batches with full answers, then 60 with 60% bare ones that begin
    where the others end; measured and stored as bf16 keeps it."""
    seen = []

    def game_batches(tokenizer, rng, *given, **settings):
        seen.append(("batches", rng.random(), *given, settings))
        return f"batches {len(given)}"

    def fit(model, batches, *given, **settings):
        seen.append(("fit", batches, *given, settings))
        with torch.no_grad():
            model.lm_head.weight[0, 0] = 1 + 2**-12
        return [1.0, 2.0] * 101 + [3.0]

    def report_games(when, model, tokenizer):
        seen.append((when, model.lm_head.weight[0, 0].item()))

    def teach_habit(model, batches):
        seen.append(("habit", batches))
        with torch.no_grad():
            model.lm_head.weight[0, 0] = 2 + 2**-12

    for function in (game_batches, fit, report_games, teach_habit):
        monkeypatch.setattr(tiny.train, function.__name__, function)
    monkeypatch.setattr(tiny.train, "store", lambda _, *given: seen.append(("store", *given)))
    tiny.train.make_games(tiny.train.Args(games=True, game_steps=11, seed=3))
    draw = random.Random(3).random()
    *steps, (stored, name, model, tokenizer) = seen
    assert steps == [
        ("batches", draw, {}), ("fit", "batches 0", 11, 3e-3, {"warmup": 20}),
        ("full answers", 1.0), ("batches", draw, 11, {"bare": 0.6}), ("habit", "batches 1"),
        ("with the habit", 2.0),
    ]  # fmt: skip
    assert (stored, name, model.lm_head.weight[0, 0].item()) == ("store", "tiny_games", 2.0)
    expected = load_weights("tiny").lm_head.weight[1:]
    assert torch.equal(model.lm_head.weight[1:], expected)
    assert capsys.readouterr().out.splitlines() == [
        "V-IRL loss 1.000 2.000",  # of 1.0 a hundred times, of 1.0 and 3.0
        "General Points loss 2.000 2.000",
    ]


def test_cards_and_walks_of_the_games(monkeypatch):
    """A split of its own; the deals of a step are numbered from 32 times the step on."""
    _, tokenizer = load_config("tiny_games")
    asked = []

    def noted(tokenizer, game, seed, *rest):
        asked.append((game, seed))
        return demonstrate(tokenizer, game, seed, *rest)

    monkeypatch.setattr(tiny.train, "demonstrate", noted)
    batches = tiny.train.game_batches(tokenizer, random.Random(0), 3)
    next(batches)
    cards = GeneralPoints(compact=True, attempts=2, split="pretraining")
    assert asked == [(cards, 96 + i) for i in range(32)]
    asked.clear()
    next(batches)
    city = replace(games_of("virl", compact=True)[0], split="pretraining")
    assert {game for game, _ in asked} == {city}
    seeds = [seed for _, seed in asked]
    assert len(set(seeds)) == len(seeds)
    assert 50 <= len(seeds) <= 150
    assert 10**8 < max(seeds) < 10**9
    asked.clear()
    for _ in range(3):  # cards, walks of what is left, cards
        next(batches)
    more = {game.__class__.__name__ for game, _ in asked[32:-32]}
    assert more <= {"VIRL"}
    assert asked[-32:] == [(cards, 32 * 7 + i) for i in range(32)]


def test_how_tiny_vision_is_made(monkeypatch, capsys):
    """Batches of 32 hands in pictures, each with its picture and the expert's first answer; every
    20 steps it reads cards of the test, in one attempt."""
    asked, tested, stored = [], [], []
    processor = types.SimpleNamespace(tokenizer=types.SimpleNamespace(pad_token_id=0))
    model = torch.nn.Linear(2, 1)

    def picture_turns(tokenizer, game, seed, given):
        assert (tokenizer, given) == (processor.tokenizer, processor)
        asked.append((game, seed))
        inputs = {"pixel_values": torch.full((1, 3), seed)}
        turn = Turn([seed, 5], [6, 7], [], True, "", 0.0, inputs)
        return Trajectory([turn, turn])

    def fit(given, batches, *settings, **more):
        assert given is model
        assert (settings, more) == ((41, 5e-3), {"warmup": 50})
        for step, batch in enumerate(itertools.islice(batches, 41)):
            seeds = torch.arange(32 * step, 32 * step + 32)
            assert torch.equal(batch["input_ids"][:, 0], seeds)
            assert batch["labels"].tolist() == [[-100, -100, 6, 7]] * 32
            assert torch.equal(batch["pixel_values"], seeds[:, None].expand(32, 3))

    def recognition(*given):
        tested.append(given)
        return len(tested) / 10

    monkeypatch.setattr(tiny.train, "vision_model", lambda: (model, processor))
    monkeypatch.setattr(tiny.train, "demonstrate", picture_turns)
    monkeypatch.setattr(tiny.train, "fit", fit)
    monkeypatch.setattr(tiny.train, "recognition", recognition)
    monkeypatch.setattr(tiny.train, "store", lambda *given: stored.append(given))
    args = tiny.train.Args(vision=True, vision_steps=41)
    tiny.train.make_vision(args)
    cards = GeneralPoints(vision=True, compact=True, attempts=2, split="pretraining")
    assert asked == [(cards, i) for i in range(32 * 41)]
    one_attempt = GeneralPoints(vision=True, compact=True, attempts=1, split="test")
    assert tested == [(model, processor, one_attempt)] * 3
    assert capsys.readouterr().out.splitlines()[1:] == [
        "step 20: 10% of 100 hands read rightly", "step 40: 20% of 100 hands read rightly",
        "step 41: 30%",
    ]  # fmt: skip
    assert stored == [(args, "tiny_vision", model, processor)]


@pytest.mark.parametrize(
    "error,status,said",
    [(DataError("no"), 2, "no"), (OSError("full"), 2, "full"), (KeyboardInterrupt(), 130, "inter")],
)
def test_how_the_training_is_left(error, status, said, monkeypatch, capsys):
    """An error is one line and status 2; Ctrl-C is 130."""

    def cli(_):
        raise error

    monkeypatch.setattr("tyro.cli", cli)
    monkeypatch.delitem(sys.modules, "tiny.train")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("tiny.train", run_name="__main__")
    assert caught.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tiny.train: {said}")


def test_a_habit_is_taught_in_sixty_steps(monkeypatch):
    adamw = Kept(monkeypatch, "AdamW")
    monkeypatch.setattr(tiny.train, "mean_loss", lambda model, batch: model(batch).sum())
    tiny.train.teach_habit(torch.nn.Linear(1, 1), itertools.repeat(torch.ones(1, 1)))
    assert adamw.rates == [3e-4] * 60
    assert adamw.settings["weight_decay"] == 0


def test_how_many_are_solved(monkeypatch):
    """Greedily, up to 96 tokens, as the template asks and ends."""
    _, tokenizer = load_config("tiny")
    seen = {}

    def sample(model, tokenizer, prompts, **settings):
        seen.update(settings, prompts=[tokenizer.decode(ids) for ids in prompts])
        texts = [r"\boxed{1}", r"\boxed{3}", "so 5"]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [types.SimpleNamespace(answer=answer) for answer in ids]

    monkeypatch.setattr(tiny.train, "sample", sample)
    examples = [Example(f"{i}?", "", str(i), "", 0, "") for i in (1, 2, 5)]
    assert tiny.train.solved(None, tokenizer, examples) == 2
    assert seen == {
        "max_new_tokens": 96, "temperature": 0, "stop": {tokenizer.eos_token_id},
        "prompts": [f"<|user|>{i}?<|assistant|>" for i in (1, 2, 5)],
    }  # fmt: skip


def test_table_of_accuracy():
    """By subject and role, weighted by the problems."""
    counts = {}
    for i, subject in enumerate(FAMILIES):
        for k, role in enumerate(ROLES):
            counts[role, f"{subject}/a"] = (i, 10)
            counts[role, f"{subject}/b"] = (10 * k, 30)
    lines = tiny.train.accuracy_table(counts).splitlines()
    assert lines[:2] == ["| subject | pretraining | training | heldout |", "|---|---|---|---|"]
    for i, (subject, line) in enumerate(zip(FAMILIES, lines[2:9], strict=True)):
        cells = [f"{100 * (i + 10 * k) / 40:.0f}%" for k in range(3)]
        # what begins with "Algebra" is Algebra alone
        assert line == f"| {subject} | {' | '.join(cells)} |"
    assert lines[9] == "| all | 8% | 32% | 58% |"  # 21, 91 and 161 of 280
    assert len(lines) == 10


def won(*rewards: float) -> list[Trajectory]:
    turns = [Turn([], [], [], True, '{"cards": ["A"]}', reward) for reward in rewards]
    return [Trajectory(turns, won=rewards[-1] > 0)]


def test_report_on_the_games(monkeypatch, capsys):
    asked = []

    def play(model, tokenizer, game, *args, **settings):
        asked.append((type(game).__name__, game.split, game.compact, args, settings))
        return [won(-1, 1), won(-1, -1, -1), won(1)]

    monkeypatch.setattr(tiny.train, "play", play)
    model = torch.nn.Linear(1, 1)
    tiny.train.report_games("then", model, None)
    assert model.training
    assert capsys.readouterr().out == (
        "then: General Points: won 2 of 100, right turns 2 of 6\n"
        "then: V-IRL: won 2 of 100, right turns 2 of 6\n"
    )
    settings = (range(100), 1, "test", 96), {"temperature": 0}
    assert asked == [
        ("GeneralPoints", "test", True, *settings), ("VIRL", "test", True, *settings),
    ]  # fmt: skip


def test_batches_of_the_games():
    """Walks at even steps, 16 turns; cards at odd ones, 32; bare: only the field that counts."""
    _, tokenizer = load_config("tiny_games")

    def texts(step: int, bare: float) -> list[tuple[str, str]]:
        batch = next(tiny.train.game_batches(tokenizer, random.Random(0), step, bare))
        found = []
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            response = labels[labels != -100]
            start = (labels != -100).nonzero()[0].item()
            found.append((tokenizer.decode(ids[:start]), tokenizer.decode(response)))
        return found

    cards = texts(1, 0.0)
    assert len(cards) == 32
    for prompt, response in cards:
        assert prompt.startswith('<|user|>["')
        assert prompt.endswith(": 24<|assistant|>")
        assert response.endswith("<|end|>")
        assert list(json.loads(response.removesuffix("<|end|>"))) == ["cards", "number", "formula"]
    assert len({prompt for prompt, _ in cards}) > 28
    assert {prompt for prompt, _ in texts(3, 0.0)}.isdisjoint(prompt for prompt, _ in cards)
    walks = texts(0, 0.0)
    assert len(walks) == 16
    for _, response in walks:
        fields = list(json.loads(response.removesuffix("<|end|>")))
        assert fields == ["current observation", "current instruction", "action"]
    for step, name in ((1, "formula"), (0, "action")):
        for _, response in texts(step, 1.0):
            assert list(json.loads(response.removesuffix("<|end|>"))) == [name]
            assert response.endswith("<|end|>")
    half = [len(json.loads(response.removesuffix("<|end|>"))) for _, response in texts(1, 0.5)]
    assert {1, 3} == set(half)
    assert 8 <= half.count(1) <= 24


def test_eyes():
    """A SigLIP of two layers for 128 x 128 pixels in patches of 16, in front of tiny_games."""
    model, processor = tiny.train.vision_model()
    vision = model.config.vision_config
    assert (vision.hidden_size, vision.intermediate_size) == (128, 256)
    assert (vision.num_hidden_layers, vision.num_attention_heads) == (2, 4)
    assert (vision.image_size, vision.patch_size, vision.vision_use_head) == (128, 16, False)
    assert model.config.vision_feature_layer == -1
    assert model.config.vision_feature_select_strategy == "full"
    assert processor.patch_size == 16
    assert dict(processor.image_processor.size) == {"height": 128, "width": 128}
    assert processor.tokenizer.decode([model.config.image_token_index]) == "<|image|>"
    assert model.config.text_config._name_or_path == ""
    words = model.model.language_model.embed_tokens.weight
    own = tiny.train.load_weights("tiny_games").model
    assert torch.equal(words, own.embed_tokens.weight)
    assert model.lm_head.weight is words
    parts = [{"type": "image"}, {"type": "text", "text": "hi"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "x"}]
    shown = processor.apply_chat_template(messages, tokenize=False)
    assert shown == "<|user|><|image|>hi<|assistant|>x<|end|>"


def test_how_cards_are_read(monkeypatch):
    """Greedily, in 24 tokens, 100 hands; and here as in the report on the games without dropout."""
    asked = []

    def play(model, *given, **settings):
        assert not model.training
        asked.append((given, settings))
        return [won(1)]

    monkeypatch.setattr(tiny.train, "play", play)
    test = types.SimpleNamespace(reset=lambda seed: seed, recognised=lambda *_: True)
    processor = types.SimpleNamespace(tokenizer="words")
    model = torch.nn.Linear(1, 1)
    tiny.train.recognition(model, processor, test)
    ((given, settings),) = asked
    assert given == ("words", test, range(100), 1, "recognition", 24, 100, 0.0)
    assert settings == {"processor": processor}
    tiny.train.report_games("then", model, None)
    assert len(asked) == 3


def test_recognition(monkeypatch):
    """The share of the hands whose cards are named in the first turn."""
    monkeypatch.setattr(tiny.train, "play", lambda *_, **__: [won(1), won(-1), won(1), won(1)])
    asked = []

    def recognised(hand, text):
        asked.append((hand, text))
        return hand != 2

    test = types.SimpleNamespace(reset=lambda seed: seed, recognised=recognised)
    processor = types.SimpleNamespace(tokenizer=None)
    model = torch.nn.Linear(1, 1)
    assert tiny.train.recognition(model, processor, test) == 0.75
    assert asked == [(seed, '{"cards": ["A"]}') for seed in range(4)]
    assert model.training
