"""Two games with exact rules: General Points (make 24 of four cards) and V-IRL (follow a route through a city), in text and in pictures.

    python games.py general_points --seed 3                 # the expert plays an episode; the picture is saved
    python games.py virl --player human                     # you play
    python games.py general_points --player runs/amft/checkpoint

They are the tasks of "SFT Memorizes, RL Generalizes" (arXiv 2501.17161, repository LeslieTrue/SFTvsRL) and of AMFT (arXiv 2508.06944).
A game is pure and seeded: state = game.reset(seed); game.prompt(state) -> chat messages; game.step(state, text) -> Result, changing the
state; game.expert(state) -> the demonstration for the present position. Anything a model can write gets a reward and a message.

What differs from the originals, on purpose:
- General Points: exact fractions, not floats (8/(3-8/3) is 24); spaces and a minus at the start of an expression or parenthesis are
  legal; one -3 for an illegal formula, not one a token; division by zero is illegal; no +1 for an unclosed parenthesis; the episode ends
  after the fifth answer (there a sixth is asked for and not judged).
- V-IRL: heading differences wrap at 180 degrees; -1.75 for a wrong current instruction is really given, and the observation is compared
  by its landmarks and whether it says that this is an intersection; the views are those that the prompt names (front, right, back, left).
"""

import functools
import json
import math
import random
import re
import sys
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import tyro

from data import DataError, Result

MAX_CHARS = 8000  # of an answer: the end is read


def fields_of(text: str, names: tuple[str, ...]) -> dict:
    """The named fields of a model's JSON answer: the last object in the text if it parses, else a search for each field. Never raises."""
    text = text[-MAX_CHARS:]
    start, end = text.rfind("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1]) if 0 <= start < end else None
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return {n: found[n] for n in names if n in found}
    out = {}
    for n in names:
        if m := re.search(rf'"{n}"\s*:\s*(?:"([^"]{{0,500}})"|\[([^\[\]]{{0,500}})\])', text):
            out[n] = m[1] if m[1] is not None else [x.strip().strip("\"'") for x in m[2].split(",")]
    return out


def chat(text: str, image, judged: list[tuple[str, str]]) -> list[dict]:
    """The task (with its picture, where there is one), then each answer as an assistant's turn and each verifier's message as a user's."""
    messages = [{"role": "user", "content": text if image is None else [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
    for answer, message in judged:
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": message}]
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# General Points

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = {"black": ("spades", "clubs"), "red": ("hearts", "diamonds")}


class IllegalFormula(ValueError):
    pass


def evaluate(formula: str) -> tuple[Fraction, list[int]]:
    """(exact value, the numbers used) of + - * / and parentheses over whole numbers. Raises IllegalFormula; limits before work."""
    if len(formula) > 200:
        raise IllegalFormula("too long")
    tokens = re.findall(r"\d+|[-+*/()]|\S", formula)
    used: list[int] = []
    place = 0

    def peek() -> str:
        return tokens[place] if place < len(tokens) else ""

    def take() -> str:
        nonlocal place
        place += 1
        return tokens[place - 1]

    def total(depth: int) -> Fraction:
        negative = peek() == "-" and bool(take())
        value = -product(depth) if negative else product(depth)
        while peek() in ("+", "-"):
            value = value + product(depth) if take() == "+" else value - product(depth)
        return value

    def product(depth: int) -> Fraction:
        value = atom(depth)
        while peek() in ("*", "/"):
            if take() == "*":
                value *= atom(depth)
            else:
                divisor = atom(depth)
                if divisor == 0:
                    raise IllegalFormula("division by zero")
                value /= divisor
        return value

    def atom(depth: int) -> Fraction:
        token = peek()
        if token == "(" and depth < 20:
            take()
            value = total(depth + 1)
            if peek() != ")":
                raise IllegalFormula("unclosed parenthesis")
            take()
            return value
        if not token.isdecimal() or not token.isascii() or len(token) > 4:
            raise IllegalFormula(f"unexpected {token or 'end'}")
        used.append(int(take()))
        return Fraction(used[-1])

    value = total(0)
    if place < len(tokens):
        raise IllegalFormula(f"unexpected {peek()}")
    return value, used


@functools.cache
def solutions(hand: tuple[int, ...], target: int) -> tuple[str, ...]:
    """Every way (up to reordering a sum or product of two) to make `target` of the hand's numbers, each used once; hand sorted.

    Fractions as pairs (numerator, denominator), expressions with their precedence: 0 a sum, 1 a product, 2 a number.
    """
    found: set[str] = set()

    def wrap(item, least: int) -> str:
        return item[3] if item[2] >= least else f"({item[3]})"

    def search(items: list) -> None:
        if len(items) == 1:
            if items[0][0] == target * items[0][1]:
                found.add(items[0][3])
            return
        for i in range(len(items)):
            for j in range(i + 1, len(items)):
                (a, b, _, _), (c, d, _, _) = x, y = items[i], items[j]
                rest = items[:i] + items[i + 1 : j] + items[j + 1 :]
                results = [(a * d + c * b, b * d, 0, f"{wrap(x, 0)}+{wrap(y, 0)}"), (a * d - c * b, b * d, 0, f"{wrap(x, 0)}-{wrap(y, 1)}"),
                           (c * b - a * d, b * d, 0, f"{wrap(y, 0)}-{wrap(x, 1)}"), (a * c, b * d, 1, f"{wrap(x, 1)}*{wrap(y, 1)}")]
                results += [(a * d, b * c, 1, f"{wrap(x, 1)}/{wrap(y, 2)}")] * (c != 0) + [(c * b, d * a, 1, f"{wrap(y, 1)}/{wrap(x, 2)}")] * (a != 0)
                for r in results:
                    search([*rest, r])

    search([(n, 1, 2, str(n)) for n in hand])
    return tuple(sorted(found))


@functools.cache
def solvable(hand: tuple[int, ...], target: int = 24) -> bool:
    """Whether a hand makes the target: the same search on values alone, stopped at the first success."""
    def search(items: tuple) -> bool:
        if len(items) == 1:
            return items[0][0] == target * items[0][1]
        for i in range(len(items)):
            for j in range(i + 1, len(items)):
                (a, b), (c, d) = items[i], items[j]
                rest = items[:i] + items[i + 1 : j] + items[j + 1 :]
                for r in {(a * d + c * b, b * d), (a * d - c * b, b * d), (c * b - a * d, b * d), (a * c, b * d), (a * d, b * c), (c * b, d * a)}:
                    if r[1] and search((*rest, r)):
                        return True
        return False

    return search(tuple((n, 1) for n in hand))


@dataclass
class Hand:
    seed: int
    cards: list[tuple[str, str]]  # (rank, suit)
    values: list[int]
    attempts: int = 0
    turns: list[tuple[str, str]] = field(default_factory=list)  # answers and the verifier's messages
    done: bool = False


@dataclass(frozen=True)
class GeneralPoints:
    """Four cards, each used once, + - * / and parentheses, to make the target.

    rule "10": J, Q, K count 10 (in distribution); "11_12_13": they count 11, 12, 13 and at least one is dealt (out of distribution).
    suits "red" is the visual out-of-distribution set. vision: the cards are in a picture. compact: a prompt of some 50 tokens. split: its deals are other deals.
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
            values = [self._value(r) for r in ranks]
            if solvable(tuple(sorted(values)), self.target):
                return Hand(seed, [(r, rng.choice(SUITS[self.suits])) for r in ranks], values)

    def _value(self, rank: str) -> int:
        value = RANKS.index(rank) + 1
        return min(value, 10) if self.rule == "10" else value

    def prompt(self, state: Hand) -> list[dict]:
        """The task, then each answer as an assistant's turn and each verifier's message as a user's."""
        faces = "'J', 'Q' and 'K' count as 10" if self.rule == "10" else "'J' counts as 11, 'Q' as 12 and 'K' as 13"
        cards = json.dumps([r for r, _ in state.cards])
        if self.compact:
            faces = "J, Q, K = 10" if self.rule == "10" else "J = 11, Q = 12, K = 13"
            text = f"{'The cards' if self.vision else cards}, {faces}: {self.target}"
        else:
            shown = "You see four cards in the picture." if self.vision else f"Your four cards are {cards}."
            text = (f"This is the game of {self.target} points. {shown} 'A' counts as 1, number cards as their number, {faces}. Write a formula that uses the number "
                    f"of each card exactly once, with +, -, *, / and parentheses, and that equals {self.target}. Answer in JSON with these fields and nothing else:\n"
                    f'{{"cards": [the ranks of the four cards], "number": [the numbers that they count as], "formula": "your formula={self.target}"}}')
        return chat(text, self.render(state) if self.vision else None, state.turns)

    def step(self, state: Hand, text: str) -> Result:
        if state.done:
            return Result(0.0, True, False, "The game is over.")
        state.attempts += 1
        reward, message = self._judge(state, text)
        state.done = reward == 5 or state.attempts >= self.attempts
        state.turns.append((text, message))
        return Result(float(reward), state.done, reward == 5, message)

    def recognised(self, state: Hand, text: str) -> bool:
        """Whether the answer names the four cards, in any order."""
        cards = fields_of(text, ("cards",)).get("cards")
        return isinstance(cards, list) and len(cards) < 9 and sorted(str(c).strip().upper() for c in cards) == sorted(r for r, _ in state.cards)

    def _judge(self, state: Hand, text: str) -> tuple[float, str]:
        again = "" if self.compact else " Try again."
        if self.vision and not self.recognised(state, text):
            return self.misread_reward, "The cards are not those in the picture." + again
        formula = fields_of(text, ("formula",)).get("formula")
        if not isinstance(formula, str):
            return -3, "There is no formula in your answer." + again
        try:
            value, used = evaluate(formula.split("=")[0])
        except IllegalFormula as e:
            return -3, f"The formula is illegal: {e}." + again
        foreign = any(used.count(n) > state.values.count(n) for n in used)
        missing = any(used.count(n) < state.values.count(n) for n in state.values)
        if foreign or missing:
            problem = "uses a number that is not there, or too often" if foreign else "leaves a number out"
            return -2 * foreign - 2 * missing, f"The formula {problem}." + again
        if value != self.target:
            shown = str(value) if len(str(value)) < 20 else "another number"
            return -1, f"The formula gives {shown}, not {self.target}." + again
        return 5, "Right."

    def expert(self, state: Hand) -> str:
        """A random solution in the answer's format."""
        formula = random.Random(f"expert/{state.seed}").choice(solutions(tuple(sorted(state.values)), self.target))
        return json.dumps({"cards": [r for r, _ in state.cards], "number": state.values, "formula": f"{formula}={self.target}"})

    def render(self, state: Hand, width: int = 256):
        """The four cards side by side on a green table, width x width/2 pixels."""
        from PIL import Image, ImageDraw

        scale = width / 256
        image = Image.new("RGB", (width, width // 2), (30, 110, 60))
        draw = ImageDraw.Draw(image)
        for i, (rank, suit) in enumerate(state.cards):
            x, y, w, h = (6 + 62 * i) * scale, 22 * scale, 56 * scale, 84 * scale
            colour = (200, 20, 30) if suit in SUITS["red"] else (20, 20, 20)
            draw.rounded_rectangle((x, y, x + w, y + h), 5 * scale, fill=(250, 250, 245), outline=(60, 60, 60))
            draw.text((x + w / 2, y + 26 * scale), rank, fill=colour, font=font(34 * scale), anchor="mm")
            _suit(draw, suit, x + w / 2, y + 62 * scale, 13 * scale, colour)
        return image


@functools.lru_cache(maxsize=32)
def font(size: float):
    """Pillow's own scalable font: no file of ours."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _suit(draw, suit: str, x: float, y: float, r: float, colour) -> None:
    """A suit's sign of radius r around (x, y), from circles and polygons."""
    def disc(dx: float, dy: float, s: float) -> None:
        draw.ellipse((x + dx * r - s * r, y + dy * r - s * r, x + dx * r + s * r, y + dy * r + s * r), fill=colour)

    if suit == "diamonds":
        draw.polygon([(x, y - r), (x + 0.75 * r, y), (x, y + r), (x - 0.75 * r, y)], fill=colour)
    elif suit == "hearts":
        disc(-0.42, -0.35, 0.5), disc(0.42, -0.35, 0.5)
        draw.polygon([(x - 0.9 * r, y - 0.15 * r), (x + 0.9 * r, y - 0.15 * r), (x, y + r)], fill=colour)
    else:
        if suit == "clubs":
            disc(0, -0.45, 0.45), disc(-0.45, 0.2, 0.45), disc(0.45, 0.2, 0.45)
        else:
            disc(-0.42, 0.2, 0.48), disc(0.42, 0.2, 0.48)
            draw.polygon([(x - 0.85 * r, y + 0.05 * r), (x + 0.85 * r, y + 0.05 * r), (x, y - r)], fill=colour)
        draw.polygon([(x - 0.35 * r, y + r), (x + 0.35 * r, y + r), (x, y)], fill=colour)


# ---------------------------------------------------------------------------------------------------------------------
# V-IRL

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
BEARINGS = ("front", "right front", "right", "right behind", "behind", "left behind", "left", "left front")
FIRST = ("Blue", "Old", "Royal", "Little", "Golden", "Green", "Corner", "Happy", "Silver", "Grand", "Red", "Lucky")
SECOND = ("Cafe", "Bank", "Bakery", "Museum", "Hotel", "Library", "Pharmacy", "Theater", "Market", "Diner", "Gallery", "School", "Church", "Garage")
STYLES = ({"sky": (150, 190, 230), "wall": (150, 140, 130), "road": (80, 80, 85), "sign": (250, 245, 220), "text": (20, 20, 20)},
          {"sky": (40, 40, 70), "wall": (90, 60, 60), "road": (40, 40, 45), "sign": (20, 60, 120), "text": (250, 240, 120)})


def wrap(degrees: float) -> float:
    """To (-180, 180]."""
    return 180 - (180 - degrees) % 360


def compass(degrees: float) -> str:
    return COMPASS[round(degrees / 45) % 8]


def bearing(degrees: float) -> str:
    """Of something seen at that many degrees to the right of the heading."""
    return BEARINGS[round(degrees / 45) % 8]


def turn(from_heading: float, to_heading: float) -> str:
    """left, right, slightly left, slightly right."""
    by = wrap(to_heading - from_heading)
    return ("slightly " if abs(by) <= 45 else "") + ("right" if by > 0 else "left")


@dataclass(frozen=True)
class Route:
    """Legs between waypoints: the heading of each leg, the landmark (name, degrees from north) at its end, its length in metres."""

    initial_heading: float
    headings: tuple[float, ...]
    landmarks: tuple[tuple[tuple[str, float], ...], ...]
    lengths: tuple[float, ...]


def city_route(seed: int, split: str, turns: tuple[int, int] = (2, 6)) -> Route:
    """A route through a procedural city: streets along a grid and its diagonals, blocks of 40 to 120 m, a landmark at most corners."""
    rng = random.Random(f"virl/{split}/{seed}")
    legs = rng.randint(*turns)
    headings = [45.0 * rng.choice((0, 2, 4, 6)) if rng.random() < 0.7 else 45.0 * rng.randrange(8)]
    while len(headings) < legs:
        headings.append((headings[-1] + rng.choice((90, -90, 90, -90, 45, -45, 135, -135))) % 360)
    names = rng.sample([f"{a} {b}" for a in FIRST for b in SECOND], legs)
    landmarks = []
    for name, heading in zip(names, headings, strict=True):
        landmarks.append(((name, (heading + rng.choice((90, -90, 45, -45, 90, -90))) % 360),) if rng.random() < 0.85 else ())
    initial = (headings[0] + 45 * rng.randrange(1, 8)) % 360
    return Route(initial, tuple(headings), tuple(landmarks), tuple(rng.uniform(40, 120) for _ in headings))


def load_routes(path: str) -> list[Route]:
    """Routes of the originals' files: a JSON of [routes, count]. Raises DataError.

    A route's milestone_info has one block per entry of route_results.geocode_list: the heading of the leg that leaves waypoint i
    ("177 (south)") and the landmarks of waypoint i + 1 (names, or objects with a name and a bearing; seen on arrival).
    """
    def landmark(item, heading: float) -> tuple[str, float]:
        if isinstance(item, dict):
            name, where = str(item["name"]), str(item.get("bearing", item.get("direction", "front")))
        else:
            name, _, where = str(item).partition(" is on your ")
        place = BEARINGS.index(where.strip(" .").lower()) if where.strip(" .").lower() in BEARINGS else 0
        return name.strip(), (heading + 45 * place) % 360

    try:
        routes, _ = json.loads(Path(path).read_text())
        out = []
        for r in routes:
            places = r["route_results"]["geocode_list"]
            blocks = r["milestone_info"]
            blocks = [blocks[k] for k in sorted(blocks, key=int)] if isinstance(blocks, dict) else blocks
            headings, marks, lengths = [], [], []
            for i in range(len(places) - 1):
                headings.append(float(re.match(r"\s*(-?[\d.]+)", str(blocks[i]["to_next_intersection_heading"]))[1]) % 360)
                seen = blocks[i].get("landmarks") or []
                seen = list(seen.values()) if isinstance(seen, dict) else [seen] if isinstance(seen, str) else seen
                marks.append(tuple(landmark(x, headings[-1]) for x in seen))
                (lat, lon), (lat2, lon2) = places[i], places[i + 1]
                lengths.append(111_320 * math.hypot(lat2 - lat, (lon2 - lon) * math.cos(math.radians(lat))))
            initial = float(r.get("init_heading") or 0)
            out.append(Route(initial or math.nan, tuple(headings), tuple(marks), tuple(lengths)))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
        raise DataError(f"{path} is not a route file: {type(e).__name__} {str(e)[:100]}") from None
    if not out or not all(r.headings for r in out):
        raise DataError(f"{path}: no route, or a route without legs")
    return out


@dataclass(frozen=True)
class Position:
    heading: float
    landmarks: tuple[tuple[str, str], ...]  # (name, bearing)
    intersection: bool
    instruction: int  # of Walk.instructions
    action: str  # the right one


@dataclass
class Walk:
    instructions: list[str]
    positions: list[Position]
    place: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)  # at this position: answers and the verifier's messages
    done: bool = False


def observation(p: Position) -> str:
    """What is seen, as the prompt gives it and the expert claims it."""
    seen = "; ".join(f"{name} on your {where}" for name, where in p.landmarks) or "No landmarks nearby"
    return f"{seen}; {'you are at an intersection' if p.intersection else 'no intersection'}"


@dataclass(frozen=True)
class VIRL:
    """Navigation along a route, on rails: a right action advances, a wrong one does not; two judged attempts a position.

    actions "absolute": turn_direction takes a compass direction (in distribution); "relative": left, right, slightly ... (out of
    distribution). split: its routes are other routes. style 1: other signs and colours (visual out of distribution).
    routes: of load_routes, instead of the procedural city. compact: short prompts, for small models.
    """

    actions: Literal["absolute", "relative"] = "absolute"
    vision: bool = False
    compact: bool = False
    split: str = "train"
    style: int = 0
    turns: tuple[int, int] = (2, 6)
    forward_points: int = 5
    routes: tuple[Route, ...] = ()
    attempts: int = 2

    def reset(self, seed: int) -> Walk:
        rng = random.Random(f"walk/{self.split}/{seed}")
        route = self.routes[seed % len(self.routes)] if self.routes else city_route(seed, self.split, self.turns)
        heading = route.initial_heading if route.initial_heading == route.initial_heading else 45.0 * rng.randrange(8)
        instructions: list[str] = []
        positions: list[Position] = []
        seen: tuple = ()
        for i, (to, marks, length) in enumerate(zip(route.headings, route.landmarks, route.lengths, strict=True)):
            last = i == len(route.headings) - 1
            corner = i > 0
            if compass(to) != compass(heading) or i == 0:
                instructions.append(f"{'First, turn' if i == 0 else 'Turn'} {turn(heading, to)} to face {compass(to)}.")
                action = f"turn_direction({compass(to) if self.actions == 'absolute' else turn(heading, to)})"
                positions.append(Position(heading, self._relative(seen, heading), corner, len(instructions) - 1, action))
            where = "".join(f" where {name} is on your {bearing(absolute - to)}" for name, absolute in marks[:1])
            instructions.append(f"Move forward until you reach {'destination' if last else 'next intersection'}{where}.")
            positions.append(Position(to, self._relative(seen, to), corner, len(instructions) - 1, "forward()"))
            n = self.forward_points
            between = [k * length / (n + 1) for k in range(1, n + 1)]
            for at in between:
                if min(at, length - at) > 8 and rng.random() < 0.5:
                    positions.append(Position(to, (), False, len(instructions) - 1, "forward()"))
            heading, seen = to, marks
        positions.append(Position(heading, self._relative(seen, heading), False, len(instructions) - 1, "stop()"))
        return Walk(instructions, positions)

    @staticmethod
    def _relative(marks, heading: float) -> tuple[tuple[str, str], ...]:
        return tuple((name, bearing(absolute - heading)) for name, absolute in marks)

    def prompt(self, state: Walk) -> list[dict]:
        """The instructions, the right actions so far with what was seen, the present observation; failed attempts at this position follow."""
        now = state.positions[min(state.place, len(state.positions) - 1)]
        past = state.positions[: state.place]
        if self.compact:
            steps = " ".join(f"{i + 1}. {line}" for i, line in enumerate(state.instructions))
            done = ", ".join(p.action for p in past) or "none"
            turns = "" if self.actions == "absolute" else "Turns: left, right, slightly left, slightly right\n"
            text = f"{steps}\n{turns}Actions: {done}\n" + (f"{'' if now.intersection else 'no '}intersection" if self.vision else observation(now))
        else:
            choices = ", ".join(COMPASS) if self.actions == "absolute" else "left, right, slightly left, slightly right"
            steps = "\n".join(f"{i + 1}. {line}" for i, line in enumerate(state.instructions))
            history = "\n".join(f"{observation(p)} -> {p.action}" for p in past) or "(none yet)"
            seen = ("The picture shows what you see: front and right above, back and left below. You are " + ("" if now.intersection else "not ") + "at an intersection."
                    if self.vision else observation(now))
            text = (f"You walk through a city by these instructions:\n{steps}\n\nWhat you saw and did so far:\n{history}\n\nWhat you see now:\n{seen}\n\n"
                    f"Choose one action: forward(), turn_direction(x) with x one of {choices}, or stop() at the destination. Answer in JSON with these fields and "
                    'nothing else:\n{"current observation": what you see, "current instruction": the instruction that you follow now, "action": your action}')
        return chat(text, self.render(state) if self.vision else None, state.failures)

    def step(self, state: Walk, text: str) -> Result:
        if state.done:
            return Result(0.0, True, False, "The walk is over.")
        now = state.positions[state.place]
        found = fields_of(text, ("current observation", "current instruction", "action"))
        action = found.get("action")
        if isinstance(action, str) and re.sub(r"\s+", " ", action[:60].strip().lower()) == now.action:
            state.place, state.failures = state.place + 1, []
            state.done = state.place == len(state.positions)
            return Result(1.0, state.done, state.done, "You have arrived." if state.done else "Right.")
        reward, message = -1.0, f"{action[:40]} is not the right action here." if isinstance(action, str) else "There is no action in your answer."
        claim, instruction = found.get("current observation"), found.get("current instruction")
        if isinstance(claim, str) and isinstance(action, str) and not self._fits(state, now, claim):
            reward, message = -1.5, message + " The observation is not what you see."
        if isinstance(instruction, str) and isinstance(action, str) and _plain(instruction) != _plain(state.instructions[now.instruction]):
            reward, message = -1.75, message + " Another instruction is to be followed now."
        state.failures.append((text, message if self.compact else message + " Try again."))
        state.done = len(state.failures) >= self.attempts
        return Result(reward, state.done, False, message)

    @staticmethod
    def _fits(state: Walk, now: Position, claim: str) -> bool:
        """Whether a claimed observation names the landmarks that are seen and no other of this walk, each at its bearing where it gives one,
        and says rightly whether this is an intersection."""
        claim = _plain(claim[:1000])
        for name in {n for p in state.positions for n, _ in p.landmarks}:
            if (_plain(name) in claim) != any(name == n for n, _ in now.landmarks):
                return False
        for name, where in now.landmarks:
            m = re.search(rf"{re.escape(_plain(name))} (?:is )?on your (right front|right behind|left front|left behind|front|right|behind|left)", claim)
            if m and m[1] != where:
                return False
        return (re.search(r"(?<!no )(?<!not at an )(?<!not an )intersection", claim) is not None) == now.intersection

    def expert(self, state: Walk) -> str:
        now = state.positions[min(state.place, len(state.positions) - 1)]
        return json.dumps({"current observation": observation(now), "current instruction": state.instructions[now.instruction], "action": now.action})

    def render(self, state: Walk, width: int = 256):
        """The 2 x 2 grid [front, right; back, left] of street views with the landmarks' signs, width x width pixels."""
        from PIL import Image, ImageDraw

        now, half, style = state.positions[min(state.place, len(state.positions) - 1)], width // 2, STYLES[self.style]
        image = Image.new("RGB", (2 * half, 2 * half))
        draw = ImageDraw.Draw(image)
        ahead = now.action == "forward()" or now.intersection
        for k, (ox, oy) in enumerate(((0, 0), (half, 0), (0, half), (half, half))):  # front, right, back, left
            side = (0, 2, 4, 6)[k]
            horizon = oy + half * 0.45
            draw.rectangle((ox, oy, ox + half, horizon), fill=style["sky"])
            draw.rectangle((ox, horizon, ox + half, oy + half), fill=style["wall"])
            if side in (0, 4) and ahead or side in (2, 6) and now.intersection:  # a street to the horizon, else a wall
                draw.polygon([(ox + half * 0.46, horizon), (ox + half * 0.54, horizon), (ox + half * 0.95, oy + half), (ox + half * 0.05, oy + half)], fill=style["road"])
                for x0, x1 in ((0, 0.36), (0.64, 1)):
                    draw.rectangle((ox + half * x0, oy + half * 0.15, ox + half * x1, horizon), fill=style["wall"])
            else:
                draw.rectangle((ox, oy + half * 0.1, ox + half, oy + half * 0.8), fill=style["wall"])
                draw.rectangle((ox, oy + half * 0.8, ox + half, oy + half), fill=style["road"])
            for name, where in now.landmarks:
                at = BEARINGS.index(where)
                offset = {0: 0.5, 1: 0.78, 7: 0.22}.get((at - side) % 8)  # diagonal bearings are in the front and back views
                if offset is None or (at % 2 and side in (2, 6)):
                    continue
                lines, size = name.split(" "), half * 0.12
                x, y, w = ox + half * offset, oy + half * 0.32, half * 0.2
                draw.rectangle((x - w, y - size * 1.3, x + w, y + size * 1.3), fill=style["sign"], outline=style["text"])
                for j, part in enumerate(lines[:2]):
                    draw.text((x, y + (j - 0.5 * (len(lines[:2]) - 1)) * size), part, fill=style["text"], font=font(size), anchor="mm")
        draw.line((half, 0, half, 2 * half), fill=(255, 255, 255), width=2)
        draw.line((0, half, 2 * half, half), fill=(255, 255, 255), width=2)
        return image


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text[:1000].lower()).strip()


def games_of(name: str, *, rule: str = "10", suits: str = "black", actions: str = "absolute", vision: bool = False, compact: bool = False, routes: str | None = None,
             test_routes: str | None = None) -> tuple:
    """(training game, validation game, test games by name) of general_points or virl. Tests: other deals or routes of the same kind, the
    other rule, and with vision the other suits or other signs. compact: short prompts, routes and episodes, for models that run on a laptop."""
    if name == "general_points":
        make = functools.partial(GeneralPoints, rule, suits, vision=vision, compact=compact, attempts=2 if compact else 5)
        tests = {"in distribution": make(split="test"), "rule": replace(make(split="test"), rule="11_12_13" if rule == "10" else "10")}
        tests |= {"visual": replace(make(split="test"), suits="red" if suits == "black" else "black")} if vision else {}
    else:
        size = {"compact": True, "turns": (2, 3), "forward_points": 1} if compact else {}
        files = {"train": tuple(load_routes(routes)) if routes else (), "test": tuple(load_routes(test_routes or routes)) if test_routes or routes else ()}
        make = lambda split: VIRL(actions, vision, split=split, routes=files["test" if split == "test" else "train"], **size)  # noqa: E731
        tests = {"in distribution": make("test"), "rule": replace(make("test"), actions="relative" if actions == "absolute" else "absolute")}
        tests |= {"visual": replace(make("test"), style=1)} if vision else {}
    return make(split="train"), make(split="validation"), tests


# ---------------------------------------------------------------------------------------------------------------------
# python games.py


@dataclass
class Args:
    """Play one episode in the terminal."""

    game: tyro.conf.Positional[Literal["general_points", "virl"]]
    """Which game."""
    seed: int = 0
    """Which episode."""
    player: str = "expert"
    """expert, human (reads your answer from the terminal: a formula, or an action), or a model: tiny, a folder, a hub name."""
    rule: Literal["10", "11_12_13"] = "10"
    """General Points: what J, Q and K count."""
    suits: Literal["black", "red"] = "black"
    """General Points: colour of the cards."""
    actions: Literal["absolute", "relative"] = "absolute"
    """V-IRL: what turn_direction takes."""
    routes: str | None = None
    """V-IRL: a route file of the original, instead of the procedural city."""
    compact: bool = False
    """The short prompts that small models are trained on."""
    picture: str = "game.png"
    """Where the picture is saved (V-IRL: of the first place with a landmark)."""


def main(args: Args) -> None:
    if args.game == "general_points":
        game = GeneralPoints(args.rule, args.suits, compact=args.compact)
    else:
        game = VIRL(args.actions, compact=args.compact, routes=tuple(load_routes(args.routes)) if args.routes else ())
    answer = None
    if args.player not in ("expert", "human"):
        import model as models
        from data import prompt_text, template

        _, tokenizer = models.load_config(args.player)
        lm = models.load_weights(args.player).eval()

        def answer(messages: list[dict]) -> str:
            ids = tokenizer(prompt_text(tokenizer, messages), add_special_tokens=False)["input_ids"]
            (response,) = models.sample(lm, tokenizer, [ids], max_new_tokens=256, temperature=0, stop=template(tokenizer).stop)
            return tokenizer.decode(response.answer)

    state, pictured = game.reset(args.seed), game.reset(args.seed)
    if args.game == "virl":  # the first place with something to see
        pictured.place = next((i for i, p in enumerate(pictured.positions) if p.landmarks), 0)
    game.render(pictured, 768).save(args.picture)
    print(f"(picture: {args.picture})\n\n{game.prompt(state)[0]['content']}")
    done, shown = False, 0
    while not done:
        if args.game == "virl" and state.place != shown:
            shown = state.place
            print(f"\nYou see: {observation(state.positions[shown])}")
        if args.player == "human":
            try:
                line = input("\nyour answer (a formula, an action, or JSON): ").strip()
            except EOFError:
                print()
                return
            text = line if line.startswith("{") else json.dumps({"formula" if args.game == "general_points" else "action": line})
        else:
            text = answer(game.prompt(state)) if answer else game.expert(state)
            print(f"\n{args.player}: {text}")
        result = game.step(state, text)
        print(f"reward {result.reward:+g}: {result.message}")
        done = result.done
    print("won" if result.won else f"lost; the expert's answer: {game.expert(state)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (ValueError, OSError) as e:
        print(f"games.py: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
