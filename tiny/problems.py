"""Generated problems: the seven MATH subjects, eight families each, five levels, worked solutions.

A family is a function (rng, size) -> (problem, steps, answer). size, 1 to 5, is the level; steps
are the clauses of a short worked solution; the answer, a whole number or text, is computed beside
the text. Texts are plain LaTeX, numbers stay small.
"""

import math
import random
import re
import zlib

# --------------------------------------------------------------------------------------------------
# The pieces of a text


def fraction(a: int, b: int) -> str:
    """a/b in lowest terms, b > 0."""
    divisor = math.gcd(a, b)
    a, b = a // divisor, b // divisor
    sign = "-" if a < 0 else ""
    return str(a) if b == 1 else rf"{sign}\frac{{{abs(a)}}}{{{b}}}"


def linear(a: int, b: int, x: str = "x") -> str:
    """ax + b as one writes it."""
    head = {1: x, -1: f"-{x}"}.get(a, f"{a}{x}")
    return head if b == 0 else f"{head} {'+' if b > 0 else '-'} {abs(b)}"


def quadratic(b: int, c: int) -> str:
    """x^2 + bx + c as one writes it."""
    middle = "" if b == 0 else f" {'+' if b > 0 else '-'} {'' if abs(b) == 1 else abs(b)}x"
    return f"x^2{middle}" + ("" if c == 0 else f" {'+' if c > 0 else '-'} {abs(c)}")


def multiple_of_pi(a: int, b: int) -> str:
    """a pi / b in lowest terms, both positive."""
    divisor = math.gcd(a, b)
    top = r"\pi" if a == divisor else rf"{a // divisor}\pi"
    return top if b == divisor else rf"\frac{{{top}}}{{{b // divisor}}}"


def falling_product(n: int, k: int) -> str:
    """n (n-1) ... of k factors."""
    return r" \cdot ".join(str(n - i) for i in range(k))


def plus(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}"


def minus(a: int, b: int) -> str:
    return f"{a} - {b} = {a - b}"


def times(a: int, b: int) -> str:
    return rf"{a} \cdot {b} = {a * b}"


def over(a: int, b: int) -> str:
    return f"{a} / {b} = {a // b}"


def squared(a: int) -> str:
    return f"{a}^2 = {a * a}"


def divided(a: int, b: int) -> str:
    """Division with remainder."""
    return rf"{a} = {a // b} \cdot {b} + {a % b}"


# --------------------------------------------------------------------------------------------------
# Draws: their order is a part of the family, as a seed names its problems


def nonzero(rng: random.Random, n: int) -> int:
    """From -n to n without 0."""
    return rng.choice((-1, 1)) * rng.randint(1, n)


def several(rng: random.Random, count: int, low: int, high: int) -> list[int]:
    return [rng.randint(low, high) for _ in range(count)]


def several_nonzero(rng: random.Random, count: int, n: int) -> list[int]:
    return [nonzero(rng, n) for _ in range(count)]


# --------------------------------------------------------------------------------------------------
# Prealgebra


def add_and_subtract(rng, size):
    a, b, c = rng.randint(2, 12 * size), rng.randint(2, 9 * size), rng.randint(1, 8 * size)
    return f"Compute ${a} + {b} - {c}$.", [plus(a, b), minus(a + b, c)], a + b - c


def order_of_operations(rng, size):
    a, b, c = rng.randint(1, 10 * size), rng.randint(2, 4 + size), rng.randint(2, 9)
    return rf"Compute ${a} + {b} \cdot {c}$.", [times(b, c), plus(a, b * c)], a + b * c


def percent_of(rng, size):
    a, b = rng.choice(((1, 2), (1, 10), (1, 4), (1, 5), (3, 4), (2, 5), (3, 10))[: 2 + size])
    k = rng.randint(1, 6 * size)
    percent = 100 * a // b
    steps = [f"{percent} / 100 = {a} / {b}", over(b * k, b), times(a, k)]
    return rf"What is ${percent}\%$ of ${b * k}$?", steps, a * k


def fraction_sum(rng, size):
    b, d = several(rng, 2, 2, 3 + size)
    a, c = rng.randint(1, b), rng.randint(1, d)
    top, bottom = a * d + c * b, b * d
    steps = [rf"{a} \cdot {d} + {c} \cdot {b} = {a * d} + {c * b} = {top}", times(b, d)]
    return (
        rf"Compute $\frac{{{a}}}{{{b}}} + \frac{{{c}}}{{{d}}}$.",
        steps,
        fraction(top, bottom),
    )


def unit_price(rng, size):
    price, m, n = rng.randint(2, 3 + 2 * size), rng.randint(2, 6 + size), rng.randint(2, 6 + size)
    problem = f"If {m} pens cost {m * price} dollars, how many dollars do {n} pens cost?"
    return problem, [over(m * price, m), times(price, n)], price * n


def missing_addend(rng, size):
    a, b = rng.randint(2, 12 * size), rng.randint(2, 9 * size)
    return f"What number added to ${a}$ gives ${a + b}$?", [minus(a + b, a)], b


def difference_of_products(rng, size):
    a, b, c, d = several(rng, 4, 2, 4 + size)
    steps = [times(a, b), times(c, d), minus(a * b, c * d)]
    return rf"Compute ${a} \cdot {b} - {c} \cdot {d}$.", steps, a * b - c * d


def average_of_three(rng, size):
    mean = rng.randint(3, 5 * size)
    a, b = rng.randint(1, 2 * mean - 1), rng.randint(1, mean)
    c = 3 * mean - a - b
    steps = [plus(a, b), plus(a + b, c), over(3 * mean, 3)]
    return f"What is the average of ${a}$, ${b}$ and ${c}$?", steps, mean


# --------------------------------------------------------------------------------------------------
# Algebra


def linear_equation(rng, size):
    a, x, b = rng.randint(2, 3 + size), nonzero(rng, 4 * size), nonzero(rng, 8 * size)
    moved = f"{'-' if b > 0 else '+'} {abs(b)}"
    steps = [f"{a}x = {a * x + b} {moved} = {a * x}", f"x = {a * x} / {a} = {x}"]
    return f"Solve ${linear(a, b)} = {a * x + b}$ for $x$.", steps, x


def evaluate_quadratic(rng, size):
    b, c, k = nonzero(rng, 2 + size), nonzero(rng, 4 * size), rng.randint(2, 4 + size)
    steps = [squared(k), times(b, k), plus(k * k, b * k), plus(k * k + b * k, c)]
    return f"If $f(x) = {quadratic(b, c)}$, what is $f({k})$?", steps, k * k + b * k + c


def sum_and_difference(rng, size):
    x, y = rng.randint(2, 12 * size), rng.randint(1, 10 * size)
    steps = [f"2x = {x + y} + {x - y} = {2 * x}", f"x = {x}"]
    return f"If $x + y = {x + y}$ and $x - y = {x - y}$, what is $x$?", steps, x


def expand_product(rng, size):
    a, b = several_nonzero(rng, 2, 3 + 2 * size)
    problem = f"Expand $({linear(1, a)})({linear(1, b)})$."
    return problem, [plus(a, b), times(a, b)], quadratic(a + b, a * b)


def larger_root(rng, size):
    low, high = sorted(several_nonzero(rng, 2, 3 + size))
    steps = [rf"{low * high} = {low} \cdot {high}", f"{low + high} = {low} + {high}"]
    equation = f"{quadratic(-low - high, low * high)} = 0"
    return f"What is the larger root of ${equation}$?", steps, high


def two_step_equation(rng, size):
    a, b, d = rng.randint(2, 4 + size), rng.randint(1, 6 * size), rng.randint(1, 4 + size)
    steps = [minus(d + b, b), times(a, d)]
    return rf"Solve $\frac{{x}}{{{a}}} + {b} = {d + b}$ for $x$.", steps, a * d


def value_of_expression(rng, size):
    a, b = several(rng, 2, 2, 4 + size)
    p, q = several(rng, 2, 2, 5)
    steps = [times(p, a), times(q, b), plus(p * a, q * b)]
    return f"If $a = {a}$ and $b = {b}$, what is ${p}a + {q}b$?", steps, p * a + q * b


def slope(rng, size):
    m, dx = nonzero(rng, 2 + size), rng.randint(1, 2 + size)
    x, y = several(rng, 2, 0, 3 * size)
    to_x, to_y = x + dx, y + m * dx
    problem = f"What is the slope of the line through $({x}, {y})$ and $({to_x}, {to_y})$?"
    return problem, [minus(to_y, y), minus(to_x, x), over(m * dx, dx)], m


# --------------------------------------------------------------------------------------------------
# Intermediate Algebra


def remainder_theorem(rng, size):
    b, c, k = nonzero(rng, 2 + size), nonzero(rng, 5 * size), rng.randint(1, 3 + size)
    problem = f"What is the remainder when ${quadratic(b, c)}$ is divided by ${linear(1, -k)}$?"
    steps = [squared(k), times(b, k), plus(k * k, b * k), plus(k * k + b * k, c)]
    return problem, steps, k * k + b * k + c


def geometric_term(rng, size):
    a, q, n = rng.randint(1, 3 * size), rng.randint(2, 3), rng.randint(3, 4 + size // 3)
    terms = [a * q**i for i in range(n)]
    problem = rf"What is term {n} of the geometric sequence ${a}, {a * q}, \ldots$?"
    return problem, terms, terms[-1]


def logarithm(rng, size):
    b, n, k = rng.randint(2, 5 + size), rng.randint(1, 2 + (size > 2)), rng.randint(0, 8 * size)
    steps = [f"{b}^{n} = {b**n}", plus(n, k)]
    return rf"Compute $\log_{{{b}}} {b**n} + {k}$.", steps, n + k


def sum_of_squared_roots(rng, size):
    p, q = several_nonzero(rng, 2, 4 + size)
    s, t = p + q, p * q
    problem = f"The roots of ${quadratic(-s, t)} = 0$ are $r$ and $t$. What is $r^2 + t^2$?"
    return problem, [times(s, s), times(2, t), minus(s * s, 2 * t)], s * s - 2 * t


def arithmetic_series(rng, size):
    a, d, n = rng.randint(1, 3 * size), rng.randint(1, 1 + size), rng.randint(3, 4 + size // 2)
    last = a + (n - 1) * d
    sequence = rf"arithmetic sequence ${a}, {a + d}, \ldots$"
    steps = [times(n - 1, d), plus(a, last - a), plus(a, last), times(n, a + last)]
    steps.append(over(n * (a + last), 2))
    return f"What is the sum of the first {n} terms of the {sequence}?", steps, n * (a + last) // 2


def function_sum(rng, size):
    a, b = rng.randint(2, 3 + size), rng.randint(1, 4 * size)
    k, m = several(rng, 2, 1, 3 + size)
    f, g = a * k + b, a * m + b
    steps = [times(a, k), plus(a * k, b), times(a, m), plus(a * m, b), plus(f, g)]
    return f"If $f(x) = {a}x + {b}$, what is $f({k}) + f({m})$?", steps, f + g


def arithmetic_term(rng, size):
    a, d, n = rng.randint(1, 4 * size), rng.randint(1, 2 + size), rng.randint(3, 6 + size)
    problem = rf"What is term {n} of the arithmetic sequence ${a}, {a + d}, \ldots$?"
    return problem, [times(n - 1, d), plus(a, (n - 1) * d)], a + (n - 1) * d


def composition(rng, size):
    a, b = rng.randint(2, 2 + size), nonzero(rng, 2 * size)
    c, d = rng.randint(2, 2 + size), nonzero(rng, 2 * size)
    k = rng.randint(1, 2 + size)
    g = c * k + d
    problem = f"If $f(x) = {linear(a, b)}$ and $g(x) = {linear(c, d)}$, what is $f(g({k}))$?"
    return problem, [times(c, k), plus(c * k, d), times(a, g), plus(a * g, b)], a * g + b


# --------------------------------------------------------------------------------------------------
# Precalculus


def degrees_to_radians(rng, size):
    degrees = rng.choice((30, 45, 60, 36, 20)[:size]) * rng.randint(1, 6 + 6 * size)
    g = math.gcd(degrees, 180)
    steps = [rf"{degrees} = {degrees // g} \cdot {g}", rf"180 = {180 // g} \cdot {g}"]
    return rf"Convert ${degrees}^\circ$ to radians.", steps, multiple_of_pi(degrees, 180)


def dot_product(rng, size):
    a, b, c, d = several_nonzero(rng, 4, 2 + size)
    steps = [times(a, c), times(b, d), plus(a * c, b * d)]
    return rf"Compute $({a}, {b}) \cdot ({c}, {d})$.", steps, a * c + b * d


def determinant(rng, size):
    a, b, c, d = several(rng, 4, 1, 3 + size)
    matrix = rf"\begin{{vmatrix}} {a} & {b} \\ {c} & {d} \end{{vmatrix}}"
    return f"Compute ${matrix}$.", [times(a, d), times(b, c), minus(a * d, b * c)], a * d - b * c


def complex_product(rng, size):
    a, b, c, d = several(rng, 4, 1, 2 + size)
    real, imaginary = a * c - b * d, a * d + b * c
    steps = [
        rf"{a} \cdot {c} - {b} \cdot {d} = {a * c} - {b * d} = {real}",
        rf"{a} \cdot {d} + {b} \cdot {c} = {a * d} + {b * c} = {imaginary}",
    ]
    return f"Compute $({a} + {b}i)({c} + {d}i)$.", steps, f"{real} + {imaginary}i"


def squared_length(rng, size):
    a, b, c = several_nonzero(rng, 3, 3 + size)
    problem = f"What is the square of the length of the vector $({a}, {b}, {c})$?"
    steps = [plus(a * a, b * b), plus(a * a + b * b, c * c)]
    return problem, steps, a * a + b * b + c * c


def vector_sum(rng, size):
    a, b, c, d = several_nonzero(rng, 4, 4 * size)
    return f"Compute $({a}, {b}) + ({c}, {d})$.", [plus(a, c), plus(b, d)], f"({a + c}, {b + d})"


def scaled_vector(rng, size):
    k = rng.randint(2, 3 + size)
    a, b = several(rng, 2, 1, 3 + size)
    c, d = several(rng, 2, 1, 4 * size)
    x, y = k * a + c, k * b + d
    steps = [
        rf"{k} \cdot {a} + {c} = {k * a} + {c} = {x}",
        rf"{k} \cdot {b} + {d} = {k * b} + {d} = {y}",
    ]
    return f"Compute ${k}({a}, {b}) + ({c}, {d})$.", steps, f"({x}, {y})"


def matrix_times_vector(rng, size):
    a, b, c, d, x, y = several(rng, 6, 1, 2 + size)
    p, q = a * x + b * y, c * x + d * y
    matrix = rf"\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}}"
    steps = [
        rf"{a} \cdot {x} + {b} \cdot {y} = {a * x} + {b * y} = {p}",
        rf"{c} \cdot {x} + {d} \cdot {y} = {c * x} + {d * y} = {q}",
    ]
    return f"Compute ${matrix} ({x}, {y})$.", steps, f"({p}, {q})"


# --------------------------------------------------------------------------------------------------
# Number Theory


def division_remainder(rng, size):
    b, q = rng.randint(3, 5 + size), rng.randint(1, 4 * size)
    a = b * q + rng.randint(0, b - 1)
    steps = [times(b, q), minus(a, b * q)]
    return f"What is the remainder when ${a}$ is divided by ${b}$?", steps, a - b * q


def common_divisor(rng, size):
    g = rng.randint(2, 3 + 2 * size)
    a, b = g * rng.randint(1, 4 + size), g * rng.randint(1, 4 + size)
    steps, x, y = [], max(a, b), min(a, b)
    while y:
        steps.append(divided(x, y))
        x, y = y, x % y
    return f"What is the greatest common divisor of ${a}$ and ${b}$?", steps, x


def common_multiple(rng, size):
    a, b = several(rng, 2, 2, 5 + 2 * size)
    g = math.gcd(a, b)
    steps = [rf"{a} = {g} \cdot {a // g}", rf"{b} = {g} \cdot {b // g}", times(a, b // g)]
    return f"What is the least common multiple of ${a}$ and ${b}$?", steps, a * b // g


def divisor_count(rng, size):
    primes = ((2, 3), (2, 5), (3, 5), (2, 7), (3, 7), (5, 7), (2, 11), (3, 11), (2, 13), (3, 13))
    p, q = rng.choice(primes[: 4 + 2 * size])
    i, j = rng.randint(1, 2 + size // 2), rng.randint(1, 1 + (size > 2) + (size > 4))
    n = p**i * q**j
    steps = [rf"{n} = {p}^{i} \cdot {q}^{j}", times(i + 1, j + 1)]
    return f"How many positive divisors does ${n}$ have?", steps, (i + 1) * (j + 1)


def base_conversion(rng, size):
    base, n = rng.randint(2, 4 + size), rng.randint(5, 12 + 12 * size)
    steps, digits, left = [], "", n
    while left:
        steps.append(divided(left, base))
        digits, left = str(left % base) + digits, left // base
    return f"Write ${n}$ in base ${base}$.", steps, f"{digits}_{{{base}}}"


def digit_sum(rng, size):
    a, b, c = rng.randint(1, 9), rng.randint(0, 9), rng.randint(0, 9)
    steps = [plus(a, b), plus(a + b, c)]
    return f"What is the sum of the digits of ${a}{b}{c}$?", steps, a + b + c


def next_multiple(rng, size):
    k, n = rng.randint(3, 5 + size), rng.randint(4, 15 * size + 5)
    q = n // k
    steps = [divided(n, k), times(q + 1, k)]
    return f"What is the smallest multiple of ${k}$ greater than ${n}$?", steps, (q + 1) * k


def units_digit(rng, size):
    a, n = rng.randint(2, 4 + 4 * size), rng.randint(2, 2 + size)
    digits = [pow(a, i, 10) for i in range(1, n + 1)]
    return f"What is the units digit of ${a}^{{{n}}}$?", digits, digits[-1]


# --------------------------------------------------------------------------------------------------
# Counting & Probability


def arrangements(rng, size):
    n, k = rng.randint(3, 5 + 2 * size), rng.randint(1, 2 + (size > 3))
    thing = rng.choice(("books", "cups", "flags", "photos"))
    problem = f"In how many ways can {k} of {n} different {thing} be placed in a row?"
    return problem, [f"{falling_product(n, k)} = {math.perm(n, k)}"], math.perm(n, k)


def combinations(rng, size):
    n, k = rng.randint(4, 5 + 2 * size), rng.randint(2, 2 + (size > 3))
    thing = rng.choice(("books", "cups", "flags", "students"))
    ordered = math.perm(n, k)
    steps = [f"{falling_product(n, k)} = {ordered}", over(ordered, math.factorial(k))]
    return f"In how many ways can {k} of {n} {thing} be chosen?", steps, math.comb(n, k)


def single_draw(rng, size):
    a, b = several(rng, 2, 1, 3 + 3 * size)
    bag = f"A bag holds {a} red and {b} blue marbles."
    problem = f"{bag} One is drawn. What is the probability that it is red?"
    return problem, [plus(a, b)], fraction(a, a + b)


def outfits(rng, size):
    a, b, c = several(rng, 3, 2, 3 + size)
    problem = f"How many outfits can be made from {a} shirts, {b} hats and {c} belts?"
    return problem, [times(a, b), times(a * b, c)], a * b * c


def multiples_up_to(rng, size):
    k, n = rng.randint(2, 5 + size), rng.randint(10, 20 + 20 * size)
    return f"How many multiples of ${k}$ are between $1$ and ${n}$?", [divided(n, k)], n // k


def other_color(rng, size):
    a, b = several(rng, 2, 1, 3 + 3 * size)
    bag = f"A bag holds {a} red and {b} blue marbles."
    problem = f"{bag} One is drawn. What is the probability that it is not red?"
    return problem, [plus(a, b)], fraction(b, a + b)


def two_menus(rng, size):
    a, b, c, d = several(rng, 4, 2, 4 + size)
    menus = f"One menu has {a} soups and {b} mains, another {c} soups and {d} mains."
    steps = [times(a, b), times(c, d), plus(a * b, c * d)]
    return f"{menus} How many meals of one menu are there?", steps, a * b + c * d


def two_draws(rng, size):
    a, b = rng.randint(2, 3 + size), rng.randint(1, 3 + 2 * size)
    n = a + b
    bag = f"A bag holds {a} red and {b} blue marbles."
    problem = f"{bag} Two are drawn. What is the probability that both are red?"
    return problem, [times(a, a - 1), times(n, n - 1)], fraction(a * (a - 1), n * (n - 1))


# --------------------------------------------------------------------------------------------------
# Geometry


def rectangle_perimeter(rng, size):
    a, b = several(rng, 2, 1, 8 * size)
    problem = f"What is the perimeter of a rectangle with sides ${a}$ and ${b}$?"
    return problem, [plus(a, b), times(2, a + b)], 2 * (a + b)


def triangle_area(rng, size):
    base, height = 2 * rng.randint(1, 3 + 2 * size), rng.randint(2, 4 + 2 * size)
    problem = f"What is the area of a triangle with base ${base}$ and height ${height}$?"
    return problem, [over(base, 2), times(base // 2, height)], base // 2 * height


def hypotenuse(rng, size):
    triples = ((3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29))
    a, b, c = rng.choice(triples[:size])
    k = rng.randint(1, 12 if size == 1 else 6)
    a, b, c = (a * k, b * k, c * k) if rng.random() < 0.5 else (b * k, a * k, c * k)
    steps = [squared(a), squared(b), f"{a * a} + {b * b} = {c * c} = {c}^2"]
    return f"What is the hypotenuse of a right triangle with legs ${a}$ and ${b}$?", steps, c


def sector_area(rng, size):
    radius, n = rng.randint(2, 5 + 3 * size), rng.choice((2, 3, 4, 5, 6, 8))
    circle = f"A circle of radius ${radius}$ is cut into {n} equal sectors."
    return f"{circle} What is the area of one?", [squared(radius)], multiple_of_pi(radius**2, n)


def third_angle(rng, size):
    unit = 10 if size == 1 else 5 if size < 4 else 1
    a = unit * rng.randint(1, 160 // unit)
    b = unit * rng.randint(1, max(1, (175 - a) // unit))
    angles = rf"Two angles of a triangle are ${a}^\circ$ and ${b}^\circ$."
    steps = [plus(a, b), minus(180, a + b)]
    return f"{angles} What is the third, in degrees?", steps, 180 - a - b


def box_volume(rng, size):
    a, b, c = several(rng, 3, 2, 3 + size)
    problem = f"What is the volume of a box with sides ${a}$, ${b}$ and ${c}$?"
    return problem, [times(a, b), times(a * b, c)], a * b * c


def missing_side(rng, size):
    a, b = several(rng, 2, 1, 7 * size)
    perimeter = 2 * (a + b)
    problem = f"The perimeter of a rectangle is ${perimeter}$ and one side is ${a}$."
    return f"{problem} What is the other side?", [over(perimeter, 2), minus(a + b, a)], b


def box_surface(rng, size):
    a, b, c = several(rng, 3, 1, 2 + size)
    half = a * b + b * c + a * c
    problem = f"What is the surface area of a box with sides ${a}$, ${b}$ and ${c}$?"
    sums = [plus(a * b, b * c), plus(a * b + b * c, a * c)]
    return problem, [times(a, b), times(b, c), times(a, c), *sums, times(2, half)], 2 * half


# --------------------------------------------------------------------------------------------------
# The rows

# Of each subject the first families are what the tiny model is pre-trained on, the next are for
# meta-training, the last is held out: so meta-training meets families that the model does not know
# yet, as evaluation will. (Meta-trained on families that it had been pre-trained on, it learned
# nothing: there was nothing to adapt to.)
ROLES = ("pretraining", "training", "heldout")
FAMILIES = {
    "Prealgebra": (
        (add_and_subtract, order_of_operations, percent_of, fraction_sum, unit_price),
        (missing_addend, difference_of_products),
        (average_of_three,),
    ),
    "Algebra": (
        (linear_equation, evaluate_quadratic, sum_and_difference, expand_product, larger_root),
        (two_step_equation, value_of_expression),
        (slope,),
    ),
    "Intermediate Algebra": (
        (remainder_theorem, geometric_term, logarithm, sum_of_squared_roots, arithmetic_series),
        (function_sum, arithmetic_term),
        (composition,),
    ),
    "Precalculus": (
        (degrees_to_radians, dot_product, determinant, complex_product, squared_length),
        (vector_sum, scaled_vector),
        (matrix_times_vector,),
    ),
    "Number Theory": (
        (division_remainder, common_divisor, common_multiple, divisor_count, base_conversion),
        (digit_sum, next_multiple),
        (units_digit,),
    ),
    "Counting & Probability": (
        (arrangements, combinations, single_draw, outfits, multiples_up_to),
        (other_color, two_menus),
        (two_draws,),
    ),
    "Geometry": (
        (rectangle_perimeter, triangle_area, hypotenuse, sector_area, third_angle),
        (box_volume, missing_side),
        (box_surface,),
    ),
}


def embedded_rows(per_family: int, seed: int, part: str, *roles: str) -> dict[str, list[dict]]:
    """Up to `per_family` distinct problems of each family of the roles (all without any).

    Keyed "Subject/family"; a row has problem, solution, answer, subject and level (1 to 5).
    part: "train" or "test"; the test part is again two halves, "post" and "final". A problem's part
    is a hash of its text, the same for every seed: the tiny model's pre-training and the tasks of
    meta-learning take "train", reinforcement learning takes "post" and is tested on "final", so
    none trains on what it is tested on or, after pre-training, has seen.
    Families with few problems give as many as they have.
    """
    rows = {}
    for subject, by_role in FAMILIES.items():
        for role in roles or ROLES:
            for family in by_role[ROLES.index(role)]:
                drawn = family_rows(family, per_family, seed, part)
                rows[f"{subject}/{family.__name__}"] = [
                    {**row, "subject": subject} for row in drawn
                ]
    return rows


# The remainders by 10 of a problem's hash
PARTS = {"train": (1, 2, 3, 4, 6, 7, 8, 9), "test": (0, 5), "post": (5,), "final": (0,)}


def family_rows(family, per_family: int, seed: int, part: str) -> list[dict]:
    """The rows of one family, its levels in turn."""
    rng = random.Random(f"{seed}/{part}/{family.__name__}")
    seen, rows = set(), []
    for draw in range(25 * per_family):
        level = 1 + draw % 5
        problem, steps, answer = family(rng, level)
        if problem in seen or zlib.crc32(problem.encode()) % 10 not in PARTS[part]:
            continue
        seen.add(problem)
        text = ", ".join(map(str, steps)) + "."
        text = re.sub(r"([-+] |\\cdot )(-\d+)", r"\1(\2)", text)  # 3 + (-4), not 3 + -4
        solution = rf"{text} \boxed{{{answer}}}"
        row = {"problem": problem, "solution": solution, "answer": str(answer), "level": level}
        rows.append(row)
        if len(rows) == per_family:
            break
    return rows
