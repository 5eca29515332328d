"""Episodes for meta-learning on mathematics: sources, splits, sampling, tokenisation.

A *task* is a set of problems that belong together (a MATH subject, a family of generated problems, a hidden rule). Its rows
are split into support (what the inner loop adapts on), query (what the meta-gradient is taken on) and test (never trained on).
An *episode* is one visit to a task: fresh support rows for K inner steps and fresh query rows.

Sources, one flag `--data`:
    embedded       generated here from a seed: the 7 MATH subjects, 8 families each, 5 levels, worked solutions. Tasks are the
                   families that the tiny model was not pre-trained on; one of each subject is held out. No download.
    conventions    generated: each task hides a rule that its prompts do not tell (what a ∘ b means, a digit cipher), so nothing
                   but adaptation on the support rows can answer the query.
    hub            EleutherAI/hendrycks_math through `datasets`, all 7 configurations.
    PATH           .json, .jsonl, .jsonl.gz or .parquet, a folder of such files, or a folder written by this program.

As a program it prepares and checks a folder of parquet files (names and columns as in ZhaochenYu0201/fomaml, so that files of
either program work in the other):
    python data.py --output-dir math_meta --data hub --support-ratio 0.30 --query-ratio 0.40 --validate
"""

import gzip
import hashlib
import json
import math
import random
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from checker import extract_answer, grade

MATH_CONFIGS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus")
SUFFIXES = (".json", ".jsonl", ".jsonl.gz", ".parquet")
BOX = "\nPlease reason step by step, and put your final answer within \\boxed{}."  # the usual request to a model that knows instructions


class DataError(ValueError):
    """The data cannot be used as asked; the message is one line for the user."""


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


# ---------------------------------------------------------------------------------------------------------------------
# Embedded problems. A family is a function (rng, size) -> (problem, steps, answer), size 1..5 the level; the answer is
# computed beside the text, the steps are what a short worked solution says. Text is plain LaTeX, numbers stay small.


def _fraction(a: int, b: int) -> str:
    """a/b in lowest terms, b > 0."""
    g = math.gcd(a, b)
    a, b = a // g, b // g
    return str(a) if b == 1 else f"{'-' if a < 0 else ''}\\frac{{{abs(a)}}}{{{b}}}"


def _linear(a: int, b: int, x: str = "x") -> str:
    """ax + b as one writes it."""
    head = {1: x, -1: f"-{x}"}.get(a, f"{a}{x}")
    return head if b == 0 else f"{head} {'+' if b > 0 else '-'} {abs(b)}"


def _quadratic(b: int, c: int) -> str:
    """x^2 + bx + c as one writes it."""
    middle = "" if b == 0 else f" {'+' if b > 0 else '-'} {'' if abs(b) == 1 else abs(b)}x"
    return f"x^2{middle}" + ("" if c == 0 else f" {'+' if c > 0 else '-'} {abs(c)}")


def _times(n: int, k: int) -> str:
    """n (n-1) ... of k factors."""
    return " \\cdot ".join(str(n - i) for i in range(k))


def _nonzero(r: random.Random, n: int) -> int:
    return r.choice((-1, 1)) * r.randint(1, n)


# Prealgebra
def add_and_subtract(r, size):
    a, b, c = r.randint(2, 12 * size), r.randint(2, 9 * size), r.randint(1, 8 * size)
    return f"Compute ${a} + {b} - {c}$.", f"{a} + {b} = {a + b}, {a + b} - {c} = {a + b - c}.", str(a + b - c)


def order_of_operations(r, size):
    a, b, c = r.randint(1, 10 * size), r.randint(2, 4 + size), r.randint(2, 9)
    return f"Compute ${a} + {b} \\cdot {c}$.", f"{b} \\cdot {c} = {b * c}, {a} + {b * c} = {a + b * c}.", str(a + b * c)


def percent_of(r, size):
    a, b, k = r.choice(((1, 2), (1, 10), (1, 4), (1, 5), (3, 4), (2, 5), (3, 10))[: 2 + size]) + (r.randint(1, 6 * size),)
    return (f"What is ${100 * a // b}\\%$ of ${b * k}$?",
            f"{100 * a // b} / 100 = {a} / {b}, {b * k} / {b} = {k}, {a} \\cdot {k} = {a * k}.", str(a * k))


def fraction_sum(r, size):
    b, d = r.randint(2, 3 + size), r.randint(2, 3 + size)
    a, c = r.randint(1, b), r.randint(1, d)
    n, m = a * d + c * b, b * d
    return (f"Compute $\\frac{{{a}}}{{{b}}} + \\frac{{{c}}}{{{d}}}$.",
            f"{a} \\cdot {d} + {c} \\cdot {b} = {a * d} + {c * b} = {n}, {b} \\cdot {d} = {m}.", _fraction(n, m))


def unit_price(r, size):
    price, m, n = r.randint(2, 3 + 2 * size), r.randint(2, 6 + size), r.randint(2, 6 + size)
    return (f"If {m} pens cost {m * price} dollars, how many dollars do {n} pens cost?",
            f"{m * price} / {m} = {price}, {price} \\cdot {n} = {price * n}.", str(price * n))


def average_of_three(r, size):
    mean = r.randint(3, 5 * size)
    a, b = r.randint(1, 2 * mean - 1), r.randint(1, mean)
    c = 3 * mean - a - b
    return (f"What is the average of ${a}$, ${b}$ and ${c}$?",
            f"{a} + {b} = {a + b}, {a + b} + {c} = {3 * mean}, {3 * mean} / 3 = {mean}.", str(mean))


# Algebra
def linear_equation(r, size):
    a, x, b = r.randint(2, 3 + size), _nonzero(r, 4 * size), _nonzero(r, 8 * size)
    return (f"Solve ${_linear(a, b)} = {a * x + b}$ for $x$.",
            f"{a}x = {a * x + b} {'-' if b > 0 else '+'} {abs(b)} = {a * x}, x = {a * x} / {a} = {x}.", str(x))


def evaluate_quadratic(r, size):
    b, c, k = _nonzero(r, 2 + size), _nonzero(r, 4 * size), r.randint(2, 4 + size)
    return (f"If $f(x) = {_quadratic(b, c)}$, what is $f({k})$?",
            f"{k}^2 = {k * k}, {b} \\cdot {k} = {b * k}, {k * k} + {b * k} = {k * k + b * k}, {k * k + b * k} + {c} = {k * k + b * k + c}.",
            str(k * k + b * k + c))


def sum_and_difference(r, size):
    x, y = r.randint(2, 12 * size), r.randint(1, 10 * size)
    return (f"If $x + y = {x + y}$ and $x - y = {x - y}$, what is $x$?",
            f"2x = {x + y} + {x - y} = {2 * x}, x = {x}.", str(x))


def expand_product(r, size):
    a, b = _nonzero(r, 3 + 2 * size), _nonzero(r, 3 + 2 * size)
    return (f"Expand $({_linear(1, a)})({_linear(1, b)})$.", f"{a} + {b} = {a + b}, {a} \\cdot {b} = {a * b}.", _quadratic(a + b, a * b))


def larger_root(r, size):
    p, q = _nonzero(r, 3 + size), _nonzero(r, 3 + size)
    low, high = min(p, q), max(p, q)
    return (f"What is the larger root of ${_quadratic(-p - q, p * q)} = 0$?",
            f"{p * q} = {low} \\cdot {high}, {p + q} = {low} + {high}.", str(high))


def slope(r, size):
    m, dx, x, y = _nonzero(r, 2 + size), r.randint(1, 2 + size), r.randint(0, 3 * size), r.randint(0, 3 * size)
    return (f"What is the slope of the line through $({x}, {y})$ and $({x + dx}, {y + m * dx})$?",
            f"{y + m * dx} - {y} = {m * dx}, {x + dx} - {x} = {dx}, {m * dx} / {dx} = {m}.", str(m))


# Intermediate Algebra
def remainder_theorem(r, size):
    b, c, k = _nonzero(r, 2 + size), _nonzero(r, 5 * size), r.randint(1, 3 + size)
    return (f"What is the remainder when ${_quadratic(b, c)}$ is divided by ${_linear(1, -k)}$?",
            f"{k}^2 = {k * k}, {b} \\cdot {k} = {b * k}, {k * k} + {b * k} = {k * k + b * k}, {k * k + b * k} + {c} = {k * k + b * k + c}.",
            str(k * k + b * k + c))


def geometric_term(r, size):
    a, q, n = r.randint(1, 3 * size), r.randint(2, 3), r.randint(3, 4 + size // 3)
    terms = [a * q**i for i in range(n)]
    return (f"What is term {n} of the geometric sequence ${a}, {a * q}, \\ldots$?",
            f"{', '.join(map(str, terms))}.", str(terms[-1]))


def logarithm(r, size):
    b, n, k = r.randint(2, 5 + size), r.randint(1, 2 + (size > 2)), r.randint(0, 8 * size)
    return (f"Compute $\\log_{{{b}}} {b**n} + {k}$.", f"{b}^{n} = {b**n}, {n} + {k} = {n + k}.", str(n + k))


def sum_of_squared_roots(r, size):
    p, q = _nonzero(r, 4 + size), _nonzero(r, 4 + size)
    s, t = p + q, p * q
    return (f"The roots of ${_quadratic(-s, t)} = 0$ are $r$ and $t$. What is $r^2 + t^2$?",
            f"{s} \\cdot {s} = {s * s}, 2 \\cdot {t} = {2 * t}, {s * s} - {2 * t} = {s * s - 2 * t}.", str(s * s - 2 * t))


def arithmetic_series(r, size):
    a, d, n = r.randint(1, 3 * size), r.randint(1, 1 + size), r.randint(3, 4 + size // 2)
    last = a + (n - 1) * d
    return (f"What is the sum of the first {n} terms of the arithmetic sequence ${a}, {a + d}, \\ldots$?",
            f"{n - 1} \\cdot {d} = {last - a}, {a} + {last - a} = {last}, {a} + {last} = {a + last}, {n} \\cdot {a + last} = {n * (a + last)}, {n * (a + last)} / 2 = {n * (a + last) // 2}.",
            str(n * (a + last) // 2))


def composition(r, size):
    a, b, c, d, k = r.randint(2, 2 + size), _nonzero(r, 2 * size), r.randint(2, 2 + size), _nonzero(r, 2 * size), r.randint(1, 2 + size)
    g = c * k + d
    return (f"If $f(x) = {_linear(a, b)}$ and $g(x) = {_linear(c, d)}$, what is $f(g({k}))$?",
            f"{c} \\cdot {k} = {c * k}, {c * k} + {d} = {g}, {a} \\cdot {g} = {a * g}, {a * g} + {b} = {a * g + b}.", str(a * g + b))


# Precalculus
def degrees_to_radians(r, size):
    d = r.choice((30, 45, 60, 36, 20)[:size] or (30,)) * r.randint(1, 6 + 6 * size)
    g = math.gcd(d, 180)
    top = "\\pi" if d == g else f"{d // g}\\pi"
    answer = top if g == 180 else f"\\frac{{{top}}}{{{180 // g}}}"
    return f"Convert ${d}^\\circ$ to radians.", f"{d} = {d // g} \\cdot {g}, 180 = {180 // g} \\cdot {g}.", answer


def dot_product(r, size):
    a, b, c, d = (_nonzero(r, 2 + size) for _ in range(4))
    return (f"Compute $({a}, {b}) \\cdot ({c}, {d})$.",
            f"{a} \\cdot {c} = {a * c}, {b} \\cdot {d} = {b * d}, {a * c} + {b * d} = {a * c + b * d}.", str(a * c + b * d))


def determinant(r, size):
    a, b, c, d = (r.randint(1, 3 + size) for _ in range(4))
    return (f"Compute $\\begin{{vmatrix}} {a} & {b} \\\\ {c} & {d} \\end{{vmatrix}}$.",
            f"{a} \\cdot {d} = {a * d}, {b} \\cdot {c} = {b * c}, {a * d} - {b * c} = {a * d - b * c}.", str(a * d - b * c))


def complex_product(r, size):
    a, b, c, d = (r.randint(1, 2 + size) for _ in range(4))
    return (f"Compute $({a} + {b}i)({c} + {d}i)$.",
            f"{a} \\cdot {c} - {b} \\cdot {d} = {a * c} - {b * d} = {a * c - b * d}, {a} \\cdot {d} + {b} \\cdot {c} = {a * d} + {b * c} = {a * d + b * c}.", f"{a * c - b * d} + {a * d + b * c}i")


def squared_length(r, size):
    a, b, c = (_nonzero(r, 3 + size) for _ in range(3))
    return (f"What is the square of the length of the vector $({a}, {b}, {c})$?",
            f"{a * a} + {b * b} = {a * a + b * b}, {a * a + b * b} + {c * c} = {a * a + b * b + c * c}.", str(a * a + b * b + c * c))


def matrix_times_vector(r, size):
    a, b, c, d, x, y = (r.randint(1, 2 + size) for _ in range(6))
    p, q = a * x + b * y, c * x + d * y
    return (f"Compute $\\begin{{pmatrix}} {a} & {b} \\\\ {c} & {d} \\end{{pmatrix}} ({x}, {y})$.",
            f"{a} \\cdot {x} + {b} \\cdot {y} = {a * x} + {b * y} = {p}, {c} \\cdot {x} + {d} \\cdot {y} = {c * x} + {d * y} = {q}.", f"({p}, {q})")


# Number Theory
def division_remainder(r, size):
    b, q = r.randint(3, 5 + size), r.randint(1, 4 * size)
    a = b * q + r.randint(0, b - 1)
    return f"What is the remainder when ${a}$ is divided by ${b}$?", f"{b} \\cdot {q} = {b * q}, {a} - {b * q} = {a - b * q}.", str(a - b * q)


def common_divisor(r, size):
    g = r.randint(2, 3 + 2 * size)
    a, b = g * r.randint(1, 4 + size), g * r.randint(1, 4 + size)
    steps, x, y = [], max(a, b), min(a, b)
    while y:
        steps.append(f"{x} = {x // y} \\cdot {y} + {x % y}")
        x, y = y, x % y
    return f"What is the greatest common divisor of ${a}$ and ${b}$?", ", ".join(steps) + ".", str(x)


def common_multiple(r, size):
    a, b = r.randint(2, 5 + 2 * size), r.randint(2, 5 + 2 * size)
    g = math.gcd(a, b)
    return (f"What is the least common multiple of ${a}$ and ${b}$?",
            f"{a} = {g} \\cdot {a // g}, {b} = {g} \\cdot {b // g}, {a} \\cdot {b // g} = {a * b // g}.", str(a * b // g))


def divisor_count(r, size):
    p, q = r.choice(((2, 3), (2, 5), (3, 5), (2, 7), (3, 7), (5, 7), (2, 11), (3, 11), (2, 13), (3, 13))[: 4 + 2 * size])
    i, j = r.randint(1, 2 + size // 2), r.randint(1, 1 + (size > 2) + (size > 4))
    n = p**i * q**j
    return (f"How many positive divisors does ${n}$ have?",
            f"{n} = {p}^{i} \\cdot {q}^{j}, {i + 1} \\cdot {j + 1} = {(i + 1) * (j + 1)}.", str((i + 1) * (j + 1)))


def base_conversion(r, size):
    b, n = r.randint(2, 4 + size), r.randint(5, 12 + 12 * size)
    steps, digits, m = [], "", n
    while m:
        steps.append(f"{m} = {m // b} \\cdot {b} + {m % b}")
        digits, m = str(m % b) + digits, m // b
    return f"Write ${n}$ in base ${b}$.", ", ".join(steps) + ".", f"{digits}_{{{b}}}"


def units_digit(r, size):
    a, n = r.randint(2, 4 + 4 * size), r.randint(2, 2 + size)
    digits = [pow(a, i, 10) for i in range(1, n + 1)]
    return f"What is the units digit of ${a}^{{{n}}}$?", f"{', '.join(map(str, digits))}.", str(digits[-1])


# Counting & Probability
def arrangements(r, size):
    n, k = r.randint(3, 5 + 2 * size), r.randint(1, 2 + (size > 3))
    thing = r.choice(("books", "cups", "flags", "photos"))
    return (f"In how many ways can {k} of {n} different {thing} be placed in a row?",
            f"{_times(n, k)} = {math.perm(n, k)}.", str(math.perm(n, k)))


def combinations(r, size):
    n, k = r.randint(4, 5 + 2 * size), r.randint(2, 2 + (size > 3))
    thing = r.choice(("books", "cups", "flags", "students"))
    return (f"In how many ways can {k} of {n} {thing} be chosen?",
            f"{_times(n, k)} = {math.perm(n, k)}, {math.perm(n, k)} / {math.factorial(k)} = {math.comb(n, k)}.",
            str(math.comb(n, k)))


def single_draw(r, size):
    a, b = r.randint(1, 3 + 3 * size), r.randint(1, 3 + 3 * size)
    return (f"A bag holds {a} red and {b} blue marbles. One is drawn. What is the probability that it is red?",
            f"{a} + {b} = {a + b}.", _fraction(a, a + b))


def outfits(r, size):
    a, b, c = (r.randint(2, 3 + size) for _ in range(3))
    return (f"How many outfits can be made from {a} shirts, {b} hats and {c} belts?",
            f"{a} \\cdot {b} = {a * b}, {a * b} \\cdot {c} = {a * b * c}.", str(a * b * c))


def multiples_up_to(r, size):
    k, n = r.randint(2, 5 + size), r.randint(10, 20 + 20 * size)
    return f"How many multiples of ${k}$ are between $1$ and ${n}$?", f"{n} = {n // k} \\cdot {k} + {n % k}.", str(n // k)


def two_draws(r, size):
    a, b = r.randint(2, 3 + size), r.randint(1, 3 + 2 * size)
    n = a + b
    return (f"A bag holds {a} red and {b} blue marbles. Two are drawn. What is the probability that both are red?",
            f"{a} \\cdot {a - 1} = {a * (a - 1)}, {n} \\cdot {n - 1} = {n * (n - 1)}.", _fraction(a * (a - 1), n * (n - 1)))


# Geometry
def rectangle_perimeter(r, size):
    a, b = r.randint(1, 8 * size), r.randint(1, 8 * size)
    return f"What is the perimeter of a rectangle with sides ${a}$ and ${b}$?", f"{a} + {b} = {a + b}, 2 \\cdot {a + b} = {2 * (a + b)}.", str(2 * (a + b))


def triangle_area(r, size):
    base, h = 2 * r.randint(1, 3 + 2 * size), r.randint(2, 4 + 2 * size)
    return f"What is the area of a triangle with base ${base}$ and height ${h}$?", f"{base} / 2 = {base // 2}, {base // 2} \\cdot {h} = {base // 2 * h}.", str(base // 2 * h)


def hypotenuse(r, size):
    a, b, c = r.choice(((3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29))[:size] or ((3, 4, 5),))
    k = r.randint(1, 12 if size == 1 else 6)
    a, b, c = (a * k, b * k, c * k) if r.random() < 0.5 else (b * k, a * k, c * k)
    return (f"What is the hypotenuse of a right triangle with legs ${a}$ and ${b}$?",
            f"{a}^2 = {a * a}, {b}^2 = {b * b}, {a * a} + {b * b} = {c * c} = {c}^2.", str(c))


def sector_area(r, size):
    radius, n = r.randint(2, 5 + 3 * size), r.choice((2, 3, 4, 5, 6, 8))
    s = radius * radius
    g = math.gcd(s, n)
    top = "\\pi" if s == g else f"{s // g}\\pi"
    return (f"A circle of radius ${radius}$ is cut into {n} equal sectors. What is the area of one?",
            f"{radius}^2 = {s}.", top if n == g else f"\\frac{{{top}}}{{{n // g}}}")


def third_angle(r, size):
    step = 10 if size == 1 else 5 if size < 4 else 1
    a = step * r.randint(1, 160 // step)
    b = step * r.randint(1, max(1, (175 - a) // step))
    return f"Two angles of a triangle are ${a}^\\circ$ and ${b}^\\circ$. What is the third, in degrees?", f"{a} + {b} = {a + b}, 180 - {a + b} = {180 - a - b}.", str(180 - a - b)


def box_surface(r, size):
    a, b, c = (r.randint(1, 2 + size) for _ in range(3))
    s = a * b + b * c + a * c
    return (f"What is the surface area of a box with sides ${a}$, ${b}$ and ${c}$?",
            f"{a} \\cdot {b} = {a * b}, {b} \\cdot {c} = {b * c}, {a} \\cdot {c} = {a * c}, {a * b} + {b * c} = {a * b + b * c}, "
            f"{a * b + b * c} + {a * c} = {s}, 2 \\cdot {s} = {2 * s}.", str(2 * s))


# Families of meta-training only
def missing_addend(r, size):
    a, b = r.randint(2, 12 * size), r.randint(2, 9 * size)
    return f"What number added to ${a}$ gives ${a + b}$?", f"{a + b} - {a} = {b}.", str(b)


def difference_of_products(r, size):
    a, b, c, d = (r.randint(2, 4 + size) for _ in range(4))
    return f"Compute ${a} \\cdot {b} - {c} \\cdot {d}$.", f"{a} \\cdot {b} = {a * b}, {c} \\cdot {d} = {c * d}, {a * b} - {c * d} = {a * b - c * d}.", str(a * b - c * d)


def two_step_equation(r, size):
    a, b, d = r.randint(2, 4 + size), r.randint(1, 6 * size), r.randint(1, 4 + size)
    return f"Solve $\\frac{{x}}{{{a}}} + {b} = {d + b}$ for $x$.", f"{d + b} - {b} = {d}, {a} \\cdot {d} = {a * d}.", str(a * d)


def value_of_expression(r, size):
    a, b, p, q = r.randint(2, 4 + size), r.randint(2, 4 + size), r.randint(2, 5), r.randint(2, 5)
    return f"If $a = {a}$ and $b = {b}$, what is ${p}a + {q}b$?", f"{p} \\cdot {a} = {p * a}, {q} \\cdot {b} = {q * b}, {p * a} + {q * b} = {p * a + q * b}.", str(p * a + q * b)


def function_sum(r, size):
    a, b, k, m = r.randint(2, 3 + size), r.randint(1, 4 * size), r.randint(1, 3 + size), r.randint(1, 3 + size)
    f, g = a * k + b, a * m + b
    return f"If $f(x) = {a}x + {b}$, what is $f({k}) + f({m})$?", f"{a} \\cdot {k} = {a * k}, {a * k} + {b} = {f}, {a} \\cdot {m} = {a * m}, {a * m} + {b} = {g}, {f} + {g} = {f + g}.", str(f + g)


def arithmetic_term(r, size):
    a, d, n = r.randint(1, 4 * size), r.randint(1, 2 + size), r.randint(3, 6 + size)
    return (f"What is term {n} of the arithmetic sequence ${a}, {a + d}, \\ldots$?",
            f"{n - 1} \\cdot {d} = {(n - 1) * d}, {a} + {(n - 1) * d} = {a + (n - 1) * d}.", str(a + (n - 1) * d))


def vector_sum(r, size):
    a, b, c, d = (_nonzero(r, 4 * size) for _ in range(4))
    return f"Compute $({a}, {b}) + ({c}, {d})$.", f"{a} + {c} = {a + c}, {b} + {d} = {b + d}.", f"({a + c}, {b + d})"


def scaled_vector(r, size):
    k, a, b, c, d = r.randint(2, 3 + size), r.randint(1, 3 + size), r.randint(1, 3 + size), r.randint(1, 4 * size), r.randint(1, 4 * size)
    return f"Compute ${k}({a}, {b}) + ({c}, {d})$.", f"{k} \\cdot {a} + {c} = {k * a} + {c} = {k * a + c}, {k} \\cdot {b} + {d} = {k * b} + {d} = {k * b + d}.", f"({k * a + c}, {k * b + d})"


def digit_sum(r, size):
    a, b, c = r.randint(1, 9), r.randint(0, 9), r.randint(0, 9)
    return f"What is the sum of the digits of ${a}{b}{c}$?", f"{a} + {b} = {a + b}, {a + b} + {c} = {a + b + c}.", str(a + b + c)


def next_multiple(r, size):
    k, n = r.randint(3, 5 + size), r.randint(4, 15 * size + 5)
    q = n // k
    return f"What is the smallest multiple of ${k}$ greater than ${n}$?", f"{n} = {q} \\cdot {k} + {n % k}, {q + 1} \\cdot {k} = {(q + 1) * k}.", str((q + 1) * k)


def other_color(r, size):
    a, b = r.randint(1, 3 + 3 * size), r.randint(1, 3 + 3 * size)
    return f"A bag holds {a} red and {b} blue marbles. One is drawn. What is the probability that it is not red?", f"{a} + {b} = {a + b}.", _fraction(b, a + b)


def two_menus(r, size):
    a, b, c, d = (r.randint(2, 4 + size) for _ in range(4))
    return (f"One menu has {a} soups and {b} mains, another {c} soups and {d} mains. How many meals of one menu are there?",
            f"{a} \\cdot {b} = {a * b}, {c} \\cdot {d} = {c * d}, {a * b} + {c * d} = {a * b + c * d}.", str(a * b + c * d))


def box_volume(r, size):
    a, b, c = (r.randint(2, 3 + size) for _ in range(3))
    return f"What is the volume of a box with sides ${a}$, ${b}$ and ${c}$?", f"{a} \\cdot {b} = {a * b}, {a * b} \\cdot {c} = {a * b * c}.", str(a * b * c)


def missing_side(r, size):
    a, b = r.randint(1, 7 * size), r.randint(1, 7 * size)
    return f"The perimeter of a rectangle is ${2 * (a + b)}$ and one side is ${a}$. What is the other side?", f"{2 * (a + b)} / 2 = {a + b}, {a + b} - {a} = {b}.", str(b)


# Of each subject the first five families are the tiny model's pre-training, the next two meta-training, the last one is held out: so
# meta-training meets families that the model does not know yet, as evaluation will. (Meta-trained on families that it had been
# pre-trained on, it learned nothing: there was nothing to adapt to.)
FAMILIES = {
    "Prealgebra": (add_and_subtract, order_of_operations, percent_of, fraction_sum, unit_price, missing_addend, difference_of_products, average_of_three),
    "Algebra": (linear_equation, evaluate_quadratic, sum_and_difference, expand_product, larger_root, two_step_equation, value_of_expression, slope),
    "Intermediate Algebra": (remainder_theorem, geometric_term, logarithm, sum_of_squared_roots, arithmetic_series, function_sum, arithmetic_term, composition),
    "Precalculus": (degrees_to_radians, dot_product, determinant, complex_product, squared_length, vector_sum, scaled_vector, matrix_times_vector),
    "Number Theory": (division_remainder, common_divisor, common_multiple, divisor_count, base_conversion, digit_sum, next_multiple, units_digit),
    "Counting & Probability": (arrangements, combinations, single_draw, outfits, multiples_up_to, other_color, two_menus, two_draws),
    "Geometry": (rectangle_perimeter, triangle_area, hypotenuse, sector_area, third_angle, box_volume, missing_side, box_surface),
}
ROLES = {"pretraining": slice(0, 5), "training": slice(5, 7), "heldout": slice(7, 8)}


def embedded_examples(per_family: int, seed: int, part: str, *roles: str) -> dict[str, list[Example]]:
    """Up to `per_family` distinct problems for each family of the roles (all without), keyed "Subject/family".

    part: "train" or "test". A problem's part is a hash of its text, the same for every seed: what any run trains on (the tiny
    model's pre-training included) never contains a test problem. Families with few problems give as many as they have.
    """
    tasks = {}
    for subject, families in FAMILIES.items():
        for family in [f for role in roles or ROLES for f in families[ROLES[role]]]:
            name = family.__name__
            rng, seen, rows = random.Random(f"{seed}/{part}/{name}"), set(), []
            for draw in range(25 * per_family):
                level = 1 + draw % 5
                problem, steps, answer = family(rng, level)
                if problem in seen or (zlib.crc32(problem.encode()) % 5 == 0) != (part == "test"):
                    continue
                seen.add(problem)
                steps = re.sub(r"([-+] |\\cdot )(-\d+)", r"\1(\2)", steps)  # 3 + (-4), not 3 + -4
                rows.append(Example(problem, f"{steps} \\boxed{{{answer}}}", answer, subject, level, f"{subject}/{name}/{part}{len(rows)}"))
                if len(rows) == per_family:
                    break
            tasks[f"{subject}/{name}"] = rows
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# Conventions: what the prompt says is the same for every task of a kind; the rule is in the support rows alone.


def convention_examples(kind: str, rule: int) -> list[Example]:
    """All 100 problems of one hidden rule. kind "operation": a ∘ b = (pa + qb + s) mod 10 with (p, q, s) drawn from the rule's
    number, p and q not both 0. kind "cipher": a permutation of the digits applied to a two-digit text."""
    rng = random.Random(f"{kind}/{rule}")
    p, q, s = rng.choice([(p, q, s) for p in range(10) for q in range(10) for s in range(10) if p or q])
    code = rng.sample(range(10), 10)
    rows = []
    for a in range(10):
        for b in range(10):
            prompt, answer = (f"${a} \\circ {b}$", str((p * a + q * b + s) % 10)) if kind == "operation" else (f"Decode {a}{b}", f"{code[a]}{code[b]}")
            rows.append(Example(prompt, f"\\boxed{{{answer}}}", answer, kind, 1, f"{kind}-{rule}/{a}{b}"))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Files and the hub


def read_rows(path: Path) -> list[dict]:
    """The rows of a .json, .jsonl, .jsonl.gz or .parquet file. Raises DataError."""
    try:
        if path.name.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            if path.suffix == ".json":
                rows = json.load(f)
                return rows if isinstance(rows, list) else rows["data"]
            return [json.loads(line) for line in f if line.strip()]
    except (OSError, ValueError, KeyError, EOFError) as e:  # pyarrow's errors are ValueErrors, JSON's too
        raise DataError(f"cannot read {path}: {str(e).splitlines()[0]}") from None


def _pick(row: dict, names: Iterable[str]) -> str | None:
    return next((n for n in names if n in row), None)


def _to_examples(rows: list[dict], source: str, task_column: str | None) -> list[tuple[str, Example]]:
    """[(task, Example)] from rows in any of the accepted column layouts; task_column "": without tasks. Raises DataError naming what is missing."""
    if not rows:
        raise DataError(f"{source} holds no rows")
    if not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{source}: every row must be an object with named columns")
    first = rows[0]
    if isinstance(first.get("metadata"), str):  # a prepared file: the rest of the columns travel as JSON
        try:
            rows = [{**json.loads(row["metadata"]), **row} for row in rows]
        except (ValueError, TypeError):
            raise DataError(f"{source}: column metadata is not JSON") from None
        first = rows[0]
    if task_column == "":  # no tasks are asked for
        task_column = None
        if not _pick(first, ("task", "subject", "type")):
            rows = [{**row, "subject": "math"} for row in rows]
            first = rows[0]
    prompt, response = _pick(first, ("prompt", "problem")), _pick(first, ("response", "solution"))
    task = task_column if task_column in first else None if task_column else _pick(first, ("task", "subject", "type"))
    missing = [n for n, found in (("problem (or prompt)", prompt), ("solution (or response)", response),
                                  (task_column or "subject (or type, task, --task-column)", task)) if found is None]
    if missing:
        raise DataError(f"{source}: missing column{'s' * (len(missing) > 1)} {', '.join(missing)}; found: {', '.join(map(str, first))}")
    examples = []
    for i, row in enumerate(rows):
        if not all(isinstance(row.get(c), str) and row[c].strip() for c in (prompt, response)) or row.get(task) in (None, ""):
            raise DataError(f"{source}, row {i + 1}: {prompt}, {response} and {task} must be non-empty text")
        level = re.search(r"\d+", str(row.get("level") or ""))
        answer = row.get("answer")
        answer = str(answer) if answer not in (None, "") else extract_answer(row[response]) or ""
        subject = str(row.get(_pick(row, ("subject", "type")) or task))
        examples.append((str(row[task]), Example(row[prompt], row[response], answer, subject, int(level.group()) if level else 0, f"{source}/{i}")))
    return examples


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())


def _local_rows(path: Path, task_column: str | None) -> tuple[list[tuple[str, Example]], list[tuple[str, Example]]]:
    """(rows to split, rows of a test file). In a folder a file named test* is its test split."""
    if not path.exists():
        raise DataError(f"no such file or folder: {path} (--data takes embedded, conventions, hub or a path)")
    files = _files(path) if path.is_dir() else [path]
    if not files or not all(f.name.endswith(SUFFIXES) for f in files):
        raise DataError(f"{path}: no {', '.join(SUFFIXES)} file")
    train, test = [], []
    for f in files:
        (test if path.is_dir() and len(files) > 1 and f.name.startswith("test") else train).extend(_to_examples(read_rows(f), str(f), task_column))
    return train, test


def _hub_rows(task_column: str | None) -> tuple[list[tuple[str, Example]], list[tuple[str, Example]]]:
    import datasets

    rows = {"train": [], "test": []}
    for config in MATH_CONFIGS:
        try:
            loaded = datasets.load_dataset("EleutherAI/hendrycks_math", config)
        except Exception as e:  # datasets and huggingface_hub raise many kinds; the user needs the one line
            raise DataError(f"cannot load EleutherAI/hendrycks_math ({config}) from the hub: {str(e).splitlines()[0][:200]}") from None
        for split, out in rows.items():
            out.extend(_to_examples(loaded[split].to_list(), f"hub/{config}/{split}", task_column))
    return rows["train"], rows["test"]


# ---------------------------------------------------------------------------------------------------------------------
# Splits


def _order(seed: int, rows: list[Example]) -> list[Example]:
    return sorted(rows, key=lambda e: hashlib.sha256(f"{seed}/{e.prompt}".encode()).digest())


def split(rows: list[Example], support_ratio: float, query_ratio: float, seed: int) -> tuple[list[Example], list[Example], list[Example]]:
    """Support, query and test rows: disjoint, stratified by level, the same for the same seed and texts whatever their order."""
    parts: tuple[list, list, list] = ([], [], [])
    levels = defaultdict(list)
    for e in rows:
        levels[e.level].append(e)
    for level in sorted(levels):
        ordered = _order(seed, levels[level])
        a, b = round(len(ordered) * support_ratio), round(len(ordered) * (support_ratio + query_ratio))
        for part, chunk in zip(parts, (ordered[:a], ordered[a:b], ordered[b:]), strict=True):
            part.extend(chunk)
    return parts


def check_ratios(support_ratio: float, query_ratio: float) -> None:
    if not (support_ratio > 0 and query_ratio > 0 and support_ratio + query_ratio <= 1):
        raise DataError(f"support and query ratio must be positive and sum to at most 1, not {support_ratio} + {query_ratio}")


def load_tasks(data: str, *, task_column: str | None = None, heldout: Sequence[str] = (), support_ratio: float = 0.30,
               query_ratio: float = 0.40, max_samples: int = 0, seed: int = 42) -> list[Task]:
    """The tasks of a source, each split into support, query and test rows.

    task_column: what makes a task. Embedded problems: "family" (default) or "subject". Files: a column name (default: the first
    of task, subject, type). heldout: names of tasks or of subjects to keep out of meta-training; None of them: the embedded
    held-out families and the last conventions are held out, of other sources nothing is. max_samples: rows per task, 0 for all.
    A source with its own test split (hub, a folder with a test file) keeps it, and its other rows are shared between support and
    query. Raises DataError.
    """
    check_ratios(support_ratio, query_ratio)
    tasks: list[Task] = []
    if data == "embedded":
        if task_column not in (None, "family", "subject"):
            raise DataError(f"--task-column {task_column}: embedded problems are grouped by family or subject")
        share = support_ratio / (support_ratio + query_ratio)
        for roles in (("training",), ("heldout",)):
            if task_column == "subject" and roles == ("training",):
                roles = ("pretraining", "training")
            train, test = (embedded_examples(n, seed, part, *roles) for n, part in ((max_samples or 200, "train"), (40, "test")))
            if len(roles) > 1:
                train, test = ({s: [e for rows in part.values() for e in rows if e.subject == s] for s in FAMILIES} for part in (train, test))
            tasks += [Task(name, *split(train[name], share, 1 - share, seed)[:2], test[name], roles == ("heldout",)) for name in train]
    elif data == "conventions":
        for kind in ("operation", "cipher"):
            tasks += [Task(f"{kind}-{i}", *split(convention_examples(kind, i), support_ratio, query_ratio, seed), heldout=i >= 480) for i in range(500)]
    elif (Path(data) / "meta_train").is_dir():
        tasks = _prepared_tasks(Path(data), task_column)
    else:
        train, test = _hub_rows(task_column) if data == "hub" else _local_rows(Path(data), task_column)
        tasks = _group(train, test, support_ratio, query_ratio, max_samples, seed)
    if heldout:
        names = {t.name for t in tasks} | {s for t in tasks for s in {e.subject for e in t.support[:1]}}
        if unknown := [h for h in heldout if h not in names]:
            raise DataError(f"--heldout-subjects {', '.join(unknown)}: no such task or subject; there are {', '.join(sorted(names)[:20])}")
        tasks = [replace(t, heldout=t.name in heldout or t.support[0].subject in heldout) for t in tasks]
        if all(t.heldout for t in tasks):
            raise DataError("every task is held out: nothing is left to train on")
    return tasks


def _group(train, test, support_ratio, query_ratio, max_samples, seed) -> list[Task]:
    seen: set[str] = set()
    groups: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
    for part, rows in ((1, test), (0, train)):  # test first: a problem in both stays in the test split alone
        for name, e in rows:
            key = " ".join(e.prompt.split())
            if key not in seen:
                seen.add(key)
                groups[name][part].append(e)
    tasks = []
    for name, (rows, own_test) in sorted(groups.items()):
        rows = _order(seed, rows)[: max_samples or None]
        if own_test:
            share = support_ratio / (support_ratio + query_ratio)
            support, query, rest = split(rows, share, 1 - share, seed)
            tasks.append(Task(name, support, query, rest + own_test))
        else:
            tasks.append(Task(name, *split(rows, support_ratio, query_ratio, seed)))
    return tasks


def slug(name: str) -> str:
    return re.sub(r"[^\w&.-]+", "_", name.lower())


def _prepared_tasks(folder: Path, task_column: str | None) -> list[Task]:
    tasks = []
    for support_file in sorted((folder / "meta_train").glob("*_support.parquet")):
        stem = support_file.name.removesuffix("_support.parquet")
        parts = []
        for f in (support_file, folder / "meta_train" / f"{stem}_query.parquet", folder / "few_shot_eval" / f"{stem}_test.parquet"):
            if not f.exists():
                raise DataError(f"{folder}: {f.relative_to(folder)} is missing")
            parts.append([e for _, e in _to_examples(read_rows(f), str(f.relative_to(folder)), task_column)])
        tasks.append(Task(parts[0][0].subject if len({e.subject for e in parts[0]}) == 1 and slug(parts[0][0].subject) == stem else stem, *parts))
    if not tasks:
        raise DataError(f"{folder / 'meta_train'}: no *_support.parquet file")
    return tasks


# ---------------------------------------------------------------------------------------------------------------------
# Episodes


def sample_episode(tasks: Sequence[Task], seed: int, step: int, task_index: int, replica: int, per_replica: int,
                   support_size: int, query_size: int) -> Episode:
    """One place of a meta-batch, a pure function of its arguments: resuming needs no data state.

    The meta-batch of a step is a random order of the tasks; replica r takes places r * per_replica ... of it, so that one replica
    with all places sees what several replicas see together. Rows are drawn without replacement within an episode; a support set
    smaller than support_size is gone through several times, in a new order each time.
    """
    place = replica * per_replica + task_index
    order = random.Random(f"{seed}/{step}/{place // len(tasks)}").sample(range(len(tasks)), len(tasks))
    task = tasks[order[place % len(tasks)]]
    rng = random.Random(f"{seed}/{step}/{place}/rows")
    return Episode(task.name, draw_support(rng, task.support, support_size), rng.sample(task.query, query_size))


def draw_support(rng: random.Random, rows: Sequence[Example], size: int) -> list[Example]:
    """`size` rows in random order: without replacement, in several passes where there are fewer."""
    out: list[Example] = []
    while len(out) < size:
        out += rng.sample(rows, min(len(rows), size - len(out)))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Problems with a reward, for learning from the model's own responses. The interface is that of the games: reset, prompt, step, expert.


class Result(NamedTuple):
    reward: float
    done: bool  # the episode is over
    won: bool
    message: str  # to the player; empty where there is nothing to say


class MathProblems:
    """Episodes of one turn: reward 1 for a right final answer, else 0; the expert is the reference solution."""

    def __init__(self, examples: Sequence[Example], shuffle: int | None = None):
        self.examples, self.shuffle, self._orders = list(examples), shuffle, {}

    def __len__(self) -> int:
        return len(self.examples)

    def reset(self, seed: int) -> Example:
        """Problem number `seed` of an endless list: all problems in a new order each time round (the given order without `shuffle`)."""
        epoch, place = divmod(seed, len(self.examples))
        if self.shuffle is None:
            return self.examples[place]
        if epoch not in self._orders:
            self._orders = {epoch: random.Random(f"{self.shuffle}/{epoch}").sample(self.examples, len(self.examples))}
        return self._orders[epoch][place]

    def prompt(self, state: Example) -> list[dict]:
        return [{"role": "user", "content": state.prompt}]

    def step(self, state: Example, text: str) -> Result:
        right = grade(text, state.answer)
        return Result(float(right), True, right, "")

    def expert(self, state: Example) -> str:
        return state.response


def load_problems(data: str, tokenizer, *, validation: int, test: int, max_length: int, subjects: Sequence[str] = (), levels: Sequence[int] = (),
                  seed: int = 42, suffix: str | None = None) -> tuple[MathProblems, MathProblems, dict[str, MathProblems], str]:
    """(training, validation, test sets by name, a line on what there is).

    embedded: the families of the tiny model's pre-training; tests are unseen problems of these, and of the families that no embedded model
    has seen. hub: Elliott/Openr1-Math-46k-8192. A file or folder as for load_tasks, whose own test file, or else up to a tenth of its
    rows, is the test. Rows without an answer, or longer than max_length tokens, are left out and counted. suffix: text after every
    problem that does not speak of \\boxed itself, by default BOX except for embedded ones. Raises DataError.
    """
    if suffix is None:
        suffix = "" if data == "embedded" else BOX
    wanted = lambda e: e.answer and (not subjects or e.subject in subjects) and (not levels or e.level in levels)  # noqa: E731
    choose = lambda rows: [e if "\\boxed" in e.prompt else replace(e, prompt=e.prompt + suffix) for e in rows if wanted(e)]  # noqa: E731
    if data == "embedded":
        train = [e for rows in embedded_examples(400, seed, "train", "pretraining").values() for e in rows]
        tests = {name: choose(e for rows in embedded_examples(per_family, seed, "test", *roles).values() for e in rows)
                 for name, per_family, roles in (("trained families", -(-test // 35), ("pretraining",)), ("unseen families", -(-test // 42), ("training", "heldout")))}
    else:
        rows, own = (_to_examples(_openr1_rows(), "hub", ""), []) if data == "hub" else _local_rows(Path(data), "")
        train, tests = [e for _, e in rows], {"test": choose(e for _, e in own)}
        if not own:
            ordered = _order(seed, choose(train))
            held = min(max(test, 1), len(ordered) // 10 or 1)
            tests = {"test": ordered[:held]}
            taken = {e.id for e in tests["test"]}
            train = [e for e in train if e.id not in taken]
    chosen = choose(train)
    tokens, dropped = encode(tokenizer, chosen, max_length)
    chosen = _order(seed, [e for e in chosen if e.id in tokens])
    if len(chosen) <= validation or not all(tests.values()):
        found = ", ".join(sorted({e.subject for e in train})[:10])
        raise DataError(f"{data}: {len(chosen)} training problems with an answer and {min(map(len, tests.values()))} test problems remain (subjects: {found}; "
                        f"--subjects, --levels and --max-length choose); more than --validation-size {validation} and 1 are needed")
    tests = {name: MathProblems(_order(seed, rows)[:test]) for name, rows in tests.items()}
    report = (f"{len(chosen) - validation} training problems, {validation} for validation, " + ", ".join(f"{len(t)} {n}" for n, t in tests.items())
              + f"; {dropped} over {max_length} tokens and {len(train) - len(chosen) - dropped} without an answer or not chosen left out")
    return MathProblems(chosen[validation:], seed), MathProblems(chosen[:validation], seed), tests, report


def _openr1_rows() -> list[dict]:
    """LUFFY's data set: chat messages in the columns prompt and target, the answer in reward_model. Its system prompt is left out."""
    import datasets

    try:
        loaded = datasets.load_dataset("Elliott/Openr1-Math-46k-8192", split="train")
    except Exception as e:
        raise DataError(f"cannot load Elliott/Openr1-Math-46k-8192 from the hub: {str(e).splitlines()[0][:200]}") from None
    last = lambda value, role: next((m["content"] for m in reversed(value) if m["role"] == role), "") if isinstance(value, list) else value  # noqa: E731
    return [{"prompt": last(row["prompt"], "user"), "response": last(row["target"], "assistant"),
             "answer": (row.get("reward_model") or {}).get("ground_truth", "")} for row in loaded]


# ---------------------------------------------------------------------------------------------------------------------
# Tokenisation


class Encoded(NamedTuple):
    ids: list[int]
    prompt_length: int  # the loss is on ids[prompt_length:]


class Template(NamedTuple):
    """How a prompt is presented to a model: before + prompt + after, then the response, then the tokens `end`."""

    before: str
    after: str
    end: list[int]
    stop: frozenset[int]  # tokens that end a generated response


def template(tokenizer) -> Template:
    """The tokenizer's own chat template (prompt as user turn, response as assistant turn), "Problem: ... Solution:" without one.

    The template is rendered once around a marker. What ends an assistant turn is read from it too: models differ in whether that
    is the end-of-sequence token. Raises DataError where there is neither.
    """
    eos = tokenizer.eos_token_id
    if tokenizer.chat_template is None:
        if eos is None:
            raise DataError("the tokenizer has no end-of-sequence token and no chat template")
        return Template(f"{tokenizer.bos_token or ''}Problem: ", "\nSolution: ", [eos], frozenset([eos]))
    user, reply = [{"role": "user", "content": "<<Q>>"}], [{"role": "assistant", "content": "<<A>>"}]
    before, _, after = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True).partition("<<Q>>")
    closing = tokenizer.apply_chat_template(user + reply, tokenize=False).partition("<<A>>")[2].strip()
    end = tokenizer(closing, add_special_tokens=False)["input_ids"][:1] or ([] if eos is None else [eos])
    if not after or not end:
        raise DataError("the tokenizer's chat template has no generation prompt or no end of turn")
    return Template(before, after, end, frozenset(end + ([] if eos is None else [eos])))


def prompt_text(tokenizer, messages: Sequence[dict]) -> str:
    """What the model reads before its next answer: messages of {"role", "content"}, the last from the user."""
    if tokenizer.chat_template is not None:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    names = {"system": "", "user": "Problem: ", "assistant": "Solution: "}
    return (tokenizer.bos_token or "") + "\n".join(names[m["role"]] + m["content"] for m in messages) + "\nSolution: "


def encode(tokenizer, examples: Sequence[Example], max_length: int) -> tuple[dict[str, Encoded], int]:
    """({example.id: Encoded}, number dropped): rows over max_length tokens are left out, never cut."""
    if not examples:
        return {}, 0
    t = template(tokenizer)
    prompts = tokenizer([t.before + e.prompt + t.after for e in examples], add_special_tokens=False)["input_ids"]
    responses = tokenizer([e.response for e in examples], add_special_tokens=False)["input_ids"]
    rows = {e.id: Encoded(p + r + t.end, len(p)) for e, p, r in zip(examples, prompts, responses, strict=True)}
    kept = {i: row for i, row in rows.items() if len(row.ids) <= max_length}
    return kept, len(rows) - len(kept)


def episode_tasks(tokenizer, tasks: Sequence[Task], max_length: int, steps: int, support: int, query: int, evaluated: int) -> tuple:
    """(tasks to train on, tasks to evaluate on, {example.id: Encoded}, a line on what there is) for episodes of `steps` times `support`
    and `query` rows.

    Evaluated are the held-out tasks, or all where none is held out; at most `evaluated` of them (0: all), evenly over the list, so
    that every kind is there. Raises DataError for a task with too few rows.
    """
    tokens, dropped = encode(tokenizer, [e for t in tasks for part in (t.support, t.query, t.test) for e in part], max_length)
    tasks = [Task(t.name, *([e for e in part if e.id in tokens] for part in (t.support, t.query, t.test)), t.heldout) for t in tasks]
    for t in tasks:
        if len(t.support) < support or (not t.heldout and len(t.query) < query) or not t.test:
            raise DataError(f"task {t.name} has {len(t.support)} support, {len(t.query)} query and {len(t.test)} test rows; it needs {support} "
                            f"(--support-batch), {query} (--query-batch) and 1: lower these or change the ratios")
    pool = [t for t in tasks if t.heldout] or tasks
    count = min(evaluated or len(pool), len(pool))
    report = f"{len(tasks)} tasks ({sum(t.heldout for t in tasks)} held out), {len(tokens)} sequences; {dropped} over {max_length} tokens left out"
    if few := sum(len(t.support) < steps * support for t in tasks):
        report += f"; {few} tasks have fewer than {steps} x {support} support rows and go through them more than once"
    return [t for t in tasks if not t.heldout], [pool[i * len(pool) // count] for i in range(count)], tokens, report


def response_tokens(rows: Sequence[Encoded]) -> int:
    return sum(len(r.ids) - r.prompt_length for r in rows)


def collate(rows: Sequence[Encoded], pad_id: int, multiple: int = 32) -> dict:
    """Right-padded batch: input_ids and labels (-100 outside of the responses), each [B, T], T a multiple of `multiple`."""
    import torch

    length = -(-max(len(r.ids) for r in rows) // multiple) * multiple
    ids = torch.full((len(rows), length), pad_id)
    labels = torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        n = len(row.ids)
        ids[i, :n] = torch.tensor(row.ids)
        labels[i, row.prompt_length : n] = ids[i, row.prompt_length : n]
    return {"input_ids": ids, "labels": labels}


# ---------------------------------------------------------------------------------------------------------------------
# python data.py


def write_prepared(tasks: Sequence[Task], folder: Path) -> None:
    """Parquet files with the columns prompt, response, metadata (JSON: subject, level, answer, task)."""
    import pyarrow
    import pyarrow.parquet

    for task in tasks:
        for part, rows in (("support", task.support), ("query", task.query), ("test", task.test)):
            out = folder / ("few_shot_eval" if part == "test" else "meta_train") / f"{slug(task.name)}_{part}.parquet"
            out.parent.mkdir(parents=True, exist_ok=True)
            table = [{"prompt": e.prompt, "response": e.response,
                      "metadata": json.dumps({"subject": e.subject, "level": e.level, "answer": e.answer, "task": task.name})} for e in rows]
            schema = pyarrow.schema([(c, pyarrow.string()) for c in ("prompt", "response", "metadata")])
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table, schema), out)


def validate(folder: Path) -> list[str]:
    """What is wrong with a prepared folder, one line each: missing files or columns, empty texts, a problem in two splits, a
    response without a final answer. Empty: the folder is good."""
    problems, seen = [], {}
    files = sorted(folder.glob("meta_train/*.parquet")) + sorted(folder.glob("few_shot_eval/*.parquet"))
    for support in folder.glob("meta_train/*_support.parquet"):
        stem = support.name.removesuffix("_support.parquet")
        problems += [f"{p}: missing" for p in (f"meta_train/{stem}_query.parquet", f"few_shot_eval/{stem}_test.parquet") if not (folder / p).exists()]
    if not files:
        return [f"{folder}: no parquet files under meta_train/ and few_shot_eval/"]
    for f in files:
        name = str(f.relative_to(folder))
        try:
            rows = read_rows(f)
        except DataError as e:
            problems.append(str(e))
            continue
        if not rows:
            problems.append(f"{name}: no rows")
            continue
        if missing := [c for c in ("prompt", "response", "metadata") if c not in rows[0]]:
            problems.append(f"{name}: missing columns {', '.join(missing)}; found {', '.join(rows[0])}")
            continue
        for i, row in enumerate(rows, 1):
            if not (row["prompt"] or "").strip() or not (row["response"] or "").strip():
                problems.append(f"{name}, row {i}: empty prompt or response")
                continue
            if not extract_answer(row["response"]):
                problems.append(f"{name}, row {i}: no final answer in the response")
            key = " ".join(row["prompt"].split())
            if seen.setdefault(key, name) != name:
                problems.append(f"{name}, row {i}: the same problem is in {seen[key]}")
    return problems


@dataclass
class Args:
    """Split a source into support, query and test parquet files, one set for each task."""

    output_dir: str = "math_meta"
    """Folder to write: meta_train/{task}_support.parquet, meta_train/{task}_query.parquet, few_shot_eval/{task}_test.parquet."""
    data: str = "embedded"
    """embedded, conventions, hub (EleutherAI/hendrycks_math), or a local file or folder."""
    task_column: str | None = None
    """Column that names a row's task (default: task, subject or type; embedded: family or subject)."""
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


def main(args: Args) -> int:
    folder = Path(args.output_dir)
    if not args.validate_only:
        tasks = load_tasks(args.data, task_column=args.task_column, support_ratio=args.support_ratio, query_ratio=args.query_ratio,
                           max_samples=max(args.max_samples, 0), seed=args.seed)
        if empty := [f"{t.name} ({p})" for t in tasks for p in ("support", "query") if not getattr(t, p)]:
            raise DataError(f"an empty split: {', '.join(empty[:5])}; use fewer tasks or other ratios")
        write_prepared(tasks, folder)
        width = max(len(t.name) for t in tasks)
        print(f"{'task':{width}} {'support':>8} {'query':>8} {'test':>8} {'total':>8}")
        for t in tasks:
            sizes = [len(t.support), len(t.query), len(t.test)]
            print(f"{t.name:{width}} " + " ".join(f"{n:8}" for n in [*sizes, sum(sizes)]))
        print(f"wrote {3 * len(tasks)} files to {folder}")
    if args.validate or args.validate_only:
        problems = validate(folder)
        print("\n".join(problems[:50] + [f"... and {len(problems) - 50} more"] * (len(problems) > 50)) if problems else f"{folder}: valid")
        return 1 if problems else 0
    return 0


if __name__ == "__main__":
    import tyro

    try:
        sys.exit(main(tyro.cli(Args)))
    except (DataError, OSError) as e:
        print(f"data.py: {e}", file=sys.stderr)
        sys.exit(2)
