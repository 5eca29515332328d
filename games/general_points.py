"""General Points: make 24 of four cards, each used once. In text and in pictures.

The task of "SFT Memorizes, RL Generalizes" (arXiv 2501.17161, repository LeslieTrue/SFTvsRL) and of
AMFT (arXiv 2508.06944). What differs from the original, on purpose: exact fractions, not floats
(8/(3-8/3) is 24); spaces and a minus at the start of an expression or parenthesis are legal; one -3
for an illegal formula, not one a token; division by zero is illegal; no +1 for an unclosed
parenthesis; the episode ends after the fifth answer (there a sixth is asked for and not judged).
"""

import functools
import json
import random
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from games.rules import Result, chat, fields_of, font

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = {"black": ("spades", "clubs"), "red": ("hearts", "diamonds")}

# --------------------------------------------------------------------------------------------------
# Formulas


class IllegalFormula(ValueError):
    pass


def evaluate(formula: str) -> tuple[Fraction, list[int]]:
    """(exact value, the numbers used) of + - * / and parentheses over whole numbers. Raises
    IllegalFormula; limits before work."""
    if len(formula) > 200:
        raise IllegalFormula("too long")
    reader = _Reader(formula)
    value = reader.sum(0)
    if reader.next:
        raise IllegalFormula(f"unexpected {reader.next}")
    return value, reader.used


class _Reader:
    """Reads a formula from left to right: a method for each rule of the grammar."""

    def __init__(self, formula: str):
        self.tokens = re.findall(r"\d+|[-+*/()]|\S", formula)
        self.place = 0
        self.used: list[int] = []

    @property
    def next(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        self.place += 1
        return self.tokens[self.place - 1]

    def sum(self, depth: int) -> Fraction:
        if self.next == "-":
            self.take()
            value = -self.product(depth)
        else:
            value = self.product(depth)
        while self.next in ("+", "-"):
            if self.take() == "+":
                value += self.product(depth)
            else:
                value -= self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while self.next in ("*", "/"):
            if self.take() == "*":
                value *= self.atom(depth)
                continue
            divisor = self.atom(depth)
            if divisor == 0:
                raise IllegalFormula("division by zero")
            value /= divisor
        return value

    def atom(self, depth: int) -> Fraction:
        token = self.next
        if token == "(" and depth < 20:
            self.take()
            value = self.sum(depth + 1)
            if self.next != ")":
                raise IllegalFormula("unclosed parenthesis")
            self.take()
            return value
        if not token.isdecimal() or not token.isascii() or len(token) > 4:
            raise IllegalFormula(f"unexpected {token or 'end'}")
        self.used.append(int(self.take()))
        return Fraction(self.used[-1])


# --------------------------------------------------------------------------------------------------
# Solutions: two terms become one until one is left


@functools.cache
def solutions(hand: tuple[int, ...], target: int) -> tuple[str, ...]:
    """Every way (up to reordering a sum or product of two) to make `target` of the hand's numbers,
    each used once; hand sorted."""
    found: set[str] = set()

    def search(terms: list) -> None:
        if len(terms) == 1:
            top, bottom, _, text = terms[0]
            if top == target * bottom:
                found.add(text)
            return
        for i in range(len(terms)):
            for j in range(i + 1, len(terms)):
                rest = terms[:i] + terms[i + 1 : j] + terms[j + 1 :]
                for term in _joined(terms[i], terms[j]):
                    search([*rest, term])

    search([(n, 1, 2, str(n)) for n in hand])
    return tuple(sorted(found))


def _joined(x: tuple, y: tuple) -> list[tuple]:
    """What + - * / make of two terms. A term: numerator, denominator, precedence (0 a sum, 1 a
    product, 2 a number), text."""
    (a, b, _, _), (c, d, _, _) = x, y
    results = [
        (a * d + c * b, b * d, 0, f"{_in_brackets(x, 0)}+{_in_brackets(y, 0)}"),
        (a * d - c * b, b * d, 0, f"{_in_brackets(x, 0)}-{_in_brackets(y, 1)}"),
        (c * b - a * d, b * d, 0, f"{_in_brackets(y, 0)}-{_in_brackets(x, 1)}"),
        (a * c, b * d, 1, f"{_in_brackets(x, 1)}*{_in_brackets(y, 1)}"),
    ]
    if c != 0:
        results.append((a * d, b * c, 1, f"{_in_brackets(x, 1)}/{_in_brackets(y, 2)}"))
    if a != 0:
        results.append((c * b, d * a, 1, f"{_in_brackets(y, 1)}/{_in_brackets(x, 2)}"))
    return results


def _in_brackets(term: tuple, precedence: int) -> str:
    """The term's text, in parentheses where it binds less than that."""
    return term[3] if term[2] >= precedence else f"({term[3]})"


@functools.cache
def solvable(hand: tuple[int, ...], target: int = 24) -> bool:
    """Whether a hand makes the target: the same search on values alone, stopped at the first
    success."""

    def search(terms: tuple) -> bool:
        if len(terms) == 1:
            return terms[0][0] == target * terms[0][1]
        for i in range(len(terms)):
            for j in range(i + 1, len(terms)):
                rest = terms[:i] + terms[i + 1 : j] + terms[j + 1 :]
                for top, bottom in _values(*terms[i], *terms[j]):
                    if bottom and search((*rest, (top, bottom))):
                        return True
        return False

    return search(tuple((n, 1) for n in hand))


def _values(a: int, b: int, c: int, d: int) -> set[tuple[int, int]]:
    """a/b and c/d joined by + - * /, as fractions of which a denominator may be 0."""
    return {
        (a * d + c * b, b * d),
        (a * d - c * b, b * d),
        (c * b - a * d, b * d),
        (a * c, b * d),
        (a * d, b * c),
        (c * b, d * a),
    }


# --------------------------------------------------------------------------------------------------
# The game


@dataclass
class Hand:
    seed: int
    cards: list[tuple[str, str]]  # (rank, suit)
    values: list[int]
    attempts: int = 0
    turns: list[tuple[str, str]] = field(default_factory=list)  # answers, the verifier's messages
    done: bool = False


@dataclass(frozen=True)
class GeneralPoints:
    """Four cards, each used once, + - * / and parentheses, to make the target.

    rule "10": J, Q, K count 10 (in distribution); "11_12_13": they count 11, 12, 13 and at least
    one is dealt (out of distribution). suits "red" is the visual out-of-distribution set. vision:
    the cards are in a picture. compact: a prompt of some 50 tokens. split: its deals are other
    deals.
    """

    rule: Literal["10", "11_12_13"] = "10"
    suits: Literal["black", "red"] = "black"
    vision: bool = False
    compact: bool = False
    split: str = "train"
    target: int = 24
    attempts: int = 5

    @property
    def misread_reward(self) -> float | None:
        """The reward of an answer that does not name the cards in the picture."""
        return -1.5 if self.vision else None

    def reset(self, seed: int) -> Hand:
        rng = random.Random(f"general_points/{self.rule}/{self.split}/{seed}")
        while True:
            if self.rule == "10":
                ranks = [rng.choice(RANKS) for _ in range(4)]
            else:
                ranks = [rng.choice(RANKS) for _ in range(3)] + [rng.choice(("J", "Q", "K"))]
                rng.shuffle(ranks)
            values = [self._value(rank) for rank in ranks]
            if solvable(tuple(sorted(values)), self.target):
                suits = SUITS[self.suits]
                return Hand(seed, [(rank, rng.choice(suits)) for rank in ranks], values)

    def _value(self, rank: str) -> int:
        value = RANKS.index(rank) + 1
        return min(value, 10) if self.rule == "10" else value

    def prompt(self, state: Hand) -> list[dict]:
        """The task, then each answer as an assistant's turn and each verifier's message as a
        user's."""
        cards = json.dumps([rank for rank, _ in state.cards])
        text = self._short_task(cards) if self.compact else self._task(cards)
        return chat(text, self.render(state) if self.vision else None, state.turns)

    def _short_task(self, cards: str) -> str:
        faces = "J, Q, K = 10" if self.rule == "10" else "J = 11, Q = 12, K = 13"
        return f"{'The cards' if self.vision else cards}, {faces}: {self.target}"

    def _task(self, cards: str) -> str:
        faces = "'J' counts as 11, 'Q' as 12 and 'K' as 13"
        if self.rule == "10":
            faces = "'J', 'Q' and 'K' count as 10"
        shown = f"Your four cards are {cards}."
        if self.vision:
            shown = "You see four cards in the picture."
        return (
            f"This is the game of {self.target} points. {shown} 'A' counts as 1, number cards as "
            f"their number, {faces}. Write a formula that uses the number of each card exactly "
            f"once, with +, -, *, / and parentheses, and that equals {self.target}. Answer in JSON "
            'with these fields and nothing else:\n{"cards": [the ranks of the four cards], '
            '"number": [the numbers that they count as], '
            f'"formula": "your formula={self.target}"}}'
        )

    def step(self, state: Hand, text: str) -> Result:
        if state.done:
            return Result(0.0, True, False, "The game is over.")
        state.attempts += 1
        reward, message = self._judge(state, text)
        if reward != 5 and not self.compact:
            message += " Try again."
        state.done = reward == 5 or state.attempts >= self.attempts
        state.turns.append((text, message))
        return Result(float(reward), state.done, reward == 5, message)

    def recognised(self, state: Hand, text: str) -> bool:
        """Whether the answer names the four cards, in any order."""
        cards = fields_of(text, ("cards",)).get("cards")
        if not isinstance(cards, list) or len(cards) > 8:
            return False
        named = sorted(str(card).strip().upper() for card in cards)
        return named == sorted(rank for rank, _ in state.cards)

    def _judge(self, state: Hand, text: str) -> tuple[float, str]:
        """(reward, message) of an answer."""
        if self.vision and not self.recognised(state, text):
            return self.misread_reward, "The cards are not those in the picture."
        formula = fields_of(text, ("formula",)).get("formula")
        if not isinstance(formula, str):
            return -3, "There is no formula in your answer."
        try:
            value, used = evaluate(formula.split("=")[0])
        except IllegalFormula as e:
            return -3, f"The formula is illegal: {e}."
        foreign = any(used.count(n) > state.values.count(n) for n in used)
        missing = any(used.count(n) < state.values.count(n) for n in state.values)
        if foreign:
            reward = -4 if missing else -2
            return reward, "The formula uses a number that is not there, or too often."
        if missing:
            return -2, "The formula leaves a number out."
        if value != self.target:
            shown = str(value) if len(str(value)) < 20 else "another number"
            return -1, f"The formula gives {shown}, not {self.target}."
        return 5, "Right."

    def expert(self, state: Hand) -> str:
        """A random solution in the answer's format."""
        found = solutions(tuple(sorted(state.values)), self.target)
        formula = f"{random.Random(f'expert/{state.seed}').choice(found)}={self.target}"
        cards = [rank for rank, _ in state.cards]
        return json.dumps({"cards": cards, "number": state.values, "formula": formula})

    def render(self, state: Hand, width: int = 256):
        """The four cards side by side on a green table, width x width/2 pixels."""
        from PIL import Image, ImageDraw

        scale = width / 256
        image = Image.new("RGB", (width, width // 2), (30, 110, 60))
        draw = ImageDraw.Draw(image)
        for i, (rank, suit) in enumerate(state.cards):
            x, y, w, h = (6 + 62 * i) * scale, 22 * scale, 56 * scale, 84 * scale
            colour = (200, 20, 30) if suit in SUITS["red"] else (20, 20, 20)
            card, edge = (250, 250, 245), (60, 60, 60)
            draw.rounded_rectangle((x, y, x + w, y + h), 5 * scale, fill=card, outline=edge)
            at = (x + w / 2, y + 26 * scale)
            draw.text(at, rank, fill=colour, font=font(34 * scale), anchor="mm")
            _draw_suit(draw, suit, x + w / 2, y + 62 * scale, 13 * scale, colour)
        return image


# Discs (x, y, radius) and polygons (corners) of the suits' signs, around (0, 0) and of radius 1
STEM = ((-0.35, 1), (0.35, 1), (0, 0))
SIGNS = {
    "diamonds": ((), (((0, -1), (0.75, 0), (0, 1), (-0.75, 0)),)),
    "hearts": (
        ((-0.42, -0.35, 0.5), (0.42, -0.35, 0.5)),
        (((-0.9, -0.15), (0.9, -0.15), (0, 1)),),
    ),
    "clubs": (((0, -0.45, 0.45), (-0.45, 0.2, 0.45), (0.45, 0.2, 0.45)), (STEM,)),
    "spades": (
        ((-0.42, 0.2, 0.48), (0.42, 0.2, 0.48)),
        (((-0.85, 0.05), (0.85, 0.05), (0, -1)), STEM),
    ),
}


def _draw_suit(draw, suit: str, x: float, y: float, r: float, colour) -> None:
    """A suit's sign of radius r around (x, y)."""
    discs, polygons = SIGNS[suit]
    for dx, dy, s in discs:
        left, top = x + dx * r - s * r, y + dy * r - s * r
        right, bottom = x + dx * r + s * r, y + dy * r + s * r
        draw.ellipse((left, top, right, bottom), fill=colour)
    for corners in polygons:
        draw.polygon([(x + dx * r, y + dy * r) for dx, dy in corners], fill=colour)
