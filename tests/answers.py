"""The answers of tiny/problems.py's families, worked out another way from the problems' text.

A function for each family, under its name: of the prompt and the whole numbers in it.
"""

import itertools
import math
import re
from fractions import Fraction

import sympy
import torch
from sympy.parsing.sympy_parser import (
    convert_xor,
    implicit_multiplication,
    parse_expr,
    standard_transformations,
)


def expression(text: str):
    """A polynomial (in i, too) as sympy reads it, expanded."""
    rules = (*standard_transformations, implicit_multiplication, convert_xor)
    return sympy.expand(parse_expr(text.replace("i", "*I"), transformations=rules))


def found(pattern: str, prompt: str):
    """The expression that the pattern's group finds in the prompt."""
    return expression(re.search(pattern, prompt)[1])


def roots(prompt: str) -> list:
    return sympy.Poly(found(r"\$(.*) = 0\$", prompt)).all_roots()


def how_many(numbers, condition) -> int:
    return sum(1 for n in numbers if condition(n))


# Prealgebra


def add_and_subtract(prompt, a, b, c):
    return sum((a, b, -c))


def order_of_operations(prompt, a, b, c):
    return a + sum(b for _ in range(c))


def percent_of(prompt, percent, whole):
    return Fraction(percent, 100) * whole


def fraction_sum(prompt, a, b, c, d):
    return Fraction(a, b) + Fraction(c, d)


def unit_price(prompt, count, price, wanted):
    return Fraction(price, count) * wanted


def missing_addend(prompt, a, result):
    return next(x for x in range(200) if a + x == result)


def difference_of_products(prompt, a, b, c, d):
    return sum(a for _ in range(b)) - sum(c for _ in range(d))


def average_of_three(prompt, *numbers):
    return Fraction(sum(numbers), 3)


# Algebra


def linear_equation(prompt, *numbers):
    left = found(r"\$(.*) = ", prompt)
    return next(x for x in range(-200, 201) if left.subs("x", x) == numbers[-1])


def evaluate_quadratic(prompt, *numbers):
    return found(r"= (.*?)\$,", prompt).subs("x", numbers[-1])


def sum_and_difference(prompt, a, b):
    return Fraction(a + b, 2)


def larger_root(prompt, *numbers):
    return max(roots(prompt))


def two_step_equation(prompt, *numbers):
    divisor = int(re.search(r"\{x\}\{(\d+)\}", prompt)[1])
    added, result = numbers[1:3]
    return next(x for x in range(200) if Fraction(x, divisor) + added == result)


def value_of_expression(prompt, a, b, *numbers):
    return found(r"is \$(.*)\$", prompt).subs({"a": a, "b": b})


def slope(prompt, x1, y1, x2, y2):
    return Fraction(y2 - y1, x2 - x1)


# Intermediate Algebra


def remainder_theorem(prompt, *numbers):
    return sympy.rem(found(r"when \$(.*?)\$", prompt), found(r"by \$(.*?)\$", prompt))


def geometric_term(prompt, n, first, second):
    return first * Fraction(second, first) ** (n - 1)


def logarithm(prompt, base, power, added):
    exponent = round(math.log(power, base))
    return exponent + added if base**exponent == power else None


def sum_of_squared_roots(prompt, *numbers):
    return sum(r**2 for r in roots(prompt))


def arithmetic_series(prompt, n, first, second):
    return sum(first + i * (second - first) for i in range(n))


def function_sum(prompt, *numbers):
    f = found(r"f\(x\) = (.*?)\$", prompt)
    return sum(f.subs("x", x) for x in numbers[-2:])


def arithmetic_term(prompt, n, first, second, *numbers):
    return [first + i * (second - first) for i in range(n)][-1]


def composition(prompt, *numbers):
    inner = found(r"g\(x\) = (.*?)\$", prompt).subs("x", numbers[-1])
    return found(r"f\(x\) = (.*?)\$", prompt).subs("x", inner)


# Precalculus


def degrees_to_radians(prompt, degrees):
    return Fraction(degrees, 180)


def dot_product(prompt, *numbers):
    return sum(x * y for x, y in zip(numbers[:2], numbers[2:], strict=True))


def determinant(prompt, *numbers):
    matrix = torch.tensor(numbers, dtype=torch.float64).view(2, 2)
    return round(float(torch.linalg.det(matrix)))


def squared_length(prompt, *numbers):
    return round(math.dist(numbers, (0, 0, 0)) ** 2)


# Number Theory


def division_remainder(prompt, a, b):
    return a - b * (a // b)


def common_divisor(prompt, *numbers):
    return max(d for d in range(1, min(numbers) + 1) if numbers[0] % d == 0 and numbers[1] % d == 0)


def common_multiple(prompt, a, b):
    return next(m for m in range(max(a, b), a * b + 1) if m % a == 0 and m % b == 0)


def divisor_count(prompt, n):
    return how_many(range(1, n + 1), lambda d: n % d == 0)


def digit_sum(prompt, n):
    return sum(map(int, str(n)))


def next_multiple(prompt, a, b):
    return next(m for m in range(b + 1, b + a + 1) if m % a == 0)


def units_digit(prompt, base, exponent):
    return int(str(base**exponent)[-1])


# Counting & Probability


def arrangements(prompt, chosen, there):
    return len(list(itertools.permutations(range(there), chosen)))


def combinations(prompt, chosen, there):
    return len(list(itertools.combinations(range(there), chosen)))


def single_draw(prompt, a, b):
    return Fraction(a, a + b)


def outfits(prompt, *numbers):
    return len(list(itertools.product(*map(range, numbers))))


def multiples_up_to(prompt, divisor, _, limit):
    return how_many(range(1, limit + 1), lambda m: m % divisor == 0)


def other_color(prompt, a, b):
    return 1 - Fraction(a, a + b)


def two_menus(prompt, a, b, c, d):
    return len(list(itertools.product(range(a), range(b)))) + c * d


def two_draws(prompt, a, b):
    return Fraction(a, a + b) * Fraction(a - 1, a + b - 1)


# Geometry


def rectangle_perimeter(prompt, a, b):
    return a + b + a + b


def triangle_area(prompt, base, height):
    return Fraction(base * height, 2)


def hypotenuse(prompt, a, b):
    return math.isqrt(a**2 + b**2)


def sector_area(prompt, radius, sectors):
    return Fraction(radius**2, sectors)


def third_angle(prompt, *angles):
    return 180 - sum(angles)


def box_volume(prompt, *sides):
    return len(list(itertools.product(*map(range, sides))))


def missing_side(prompt, perimeter, side):
    return next(x for x in range(200) if x + x + side + side == perimeter)


def box_surface(prompt, *sides):
    return sum(2 * a * b for a, b in itertools.combinations(sides, 2))
