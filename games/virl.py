"""V-IRL: follow a route through a city. In text and in pictures.

The task of "SFT Memorizes, RL Generalizes" (arXiv 2501.17161, repository LeslieTrue/SFTvsRL) and of
AMFT (arXiv 2508.06944). What differs from the original, on purpose: heading differences wrap at 180
degrees; -1.75 for a wrong current instruction is really given, and the observation is compared by
its landmarks and whether it says that this is an intersection; the views are those that the prompt
names (front, right, back, left).
"""

import json
import math
import random
import re
from dataclasses import dataclass, field
from typing import Literal

from data import DataError
from games.rules import Result, chat, fields_of, font
from sources import expanded, reason_of

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
BEARINGS = (
    "front", "right front", "right", "right behind", "behind", "left behind", "left", "left front",
)  # fmt: skip
FIRST = (
    "Blue", "Old", "Royal", "Little", "Golden", "Green", "Corner", "Happy", "Silver", "Grand",
    "Red", "Lucky",
)  # fmt: skip
SECOND = (
    "Cafe", "Bank", "Bakery", "Museum", "Hotel", "Library", "Pharmacy", "Theater", "Market",
    "Diner", "Gallery", "School", "Church", "Garage",
)  # fmt: skip
STYLES = (
    {
        "sky": (150, 190, 230),
        "wall": (150, 140, 130),
        "road": (80, 80, 85),
        "sign": (250, 245, 220),
        "text": (20, 20, 20),
    },
    {
        "sky": (40, 40, 70),
        "wall": (90, 60, 60),
        "road": (40, 40, 45),
        "sign": (20, 60, 120),
        "text": (250, 240, 120),
    },
)

# --------------------------------------------------------------------------------------------------
# Directions


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


# --------------------------------------------------------------------------------------------------
# Routes


@dataclass(frozen=True)
class Route:
    """Legs between waypoints: the heading of each leg, the landmarks (name, degrees from north) at
    its end, its length in metres."""

    initial_heading: float  # nan where it is drawn at reset
    headings: tuple[float, ...]
    landmarks: tuple[tuple[tuple[str, float], ...], ...]
    lengths: tuple[float, ...]


def city_route(seed: int, split: str, turns: tuple[int, int] = (2, 6)) -> Route:
    """A route through a procedural city: streets along a grid and its diagonals, blocks of 40 to
    120 m, a landmark at most corners."""
    rng = random.Random(f"virl/{split}/{seed}")
    legs = rng.randint(*turns)
    on_the_grid = rng.random() < 0.7
    headings = [45.0 * (rng.choice((0, 2, 4, 6)) if on_the_grid else rng.randrange(8))]
    while len(headings) < legs:
        by = rng.choice((90, -90, 90, -90, 45, -45, 135, -135))
        headings.append((headings[-1] + by) % 360)
    names = []
    for first in FIRST:
        names += [f"{first} {second}" for second in SECOND]
    landmarks = []
    for name, heading in zip(rng.sample(names, legs), headings, strict=True):
        corner = ()
        if rng.random() < 0.85:
            corner = ((name, (heading + rng.choice((90, -90, 45, -45, 90, -90))) % 360),)
        landmarks.append(corner)
    initial = (headings[0] + 45 * rng.randrange(1, 8)) % 360
    lengths = tuple(rng.uniform(40, 120) for _ in headings)
    return Route(initial, tuple(headings), tuple(landmarks), lengths)


def load_routes(path: str) -> list[Route]:
    """Routes of the originals' files: a JSON of [routes, count]. Raises DataError.

    A route's milestone_info has one block per entry of route_results.geocode_list: the heading of
    the leg that leaves waypoint i ("177 (south)") and the landmarks of waypoint i + 1 (names, or
    objects with a name and a bearing; seen on arrival).
    """
    try:
        records, _ = json.loads(expanded(path).read_text(encoding="utf-8-sig"))
        routes = [_route(record) for record in records]
    except Exception as e:  # a file of something else can hold anything
        reason = f"{type(e).__name__} {reason_of(e)[:100]}"
        raise DataError(f"{path} is not a route file: {reason}") from None
    if not routes or not all(route.headings for route in routes):
        raise DataError(f"{path}: no route, or a route without legs")
    return routes


def _route(record: dict) -> Route:
    places = record["route_results"]["geocode_list"]
    blocks = record["milestone_info"]
    if isinstance(blocks, dict):
        blocks = [blocks[key] for key in sorted(blocks, key=int)]
    headings, landmarks, lengths = [], [], []
    for i in range(len(places) - 1):
        degrees = re.match(r"\s*(-?[\d.]+)", str(blocks[i]["to_next_intersection_heading"]))
        headings.append(float(degrees[1]) % 360)
        seen = blocks[i].get("landmarks") or []
        if isinstance(seen, dict):
            seen = list(seen.values())
        elif isinstance(seen, str):
            seen = [seen]
        landmarks.append(tuple(_landmark(item, headings[-1]) for item in seen))
        (lat, lon), (lat2, lon2) = places[i], places[i + 1]
        east = (lon2 - lon) * math.cos(math.radians(lat))
        lengths.append(111_320 * math.hypot(lat2 - lat, east))  # metres in a degree
    initial = float(record.get("init_heading") or 0) or math.nan
    return Route(initial, tuple(headings), tuple(landmarks), tuple(lengths))


def _landmark(item, heading: float) -> tuple[str, float]:
    if isinstance(item, dict):
        name, where = str(item["name"]), str(item.get("bearing", item.get("direction", "front")))
    else:
        name, _, where = str(item).partition(" is on your ")
    where = where.strip(" .").lower()
    place = BEARINGS.index(where) if where in BEARINGS else 0
    return name.strip(), (heading + 45 * place) % 360


# --------------------------------------------------------------------------------------------------
# The game


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
    failures: list[tuple[str, str]] = field(default_factory=list)  # here: answers and messages
    done: bool = False

    @property
    def here(self) -> Position:
        return self.positions[min(self.place, len(self.positions) - 1)]

    def add(self, heading: float, landmarks, intersection: bool, action: str) -> None:
        """A position at which the last instruction is followed; landmarks: (name, degrees)."""
        seen = tuple((name, bearing(degrees - heading)) for name, degrees in landmarks)
        current = len(self.instructions) - 1
        self.positions.append(Position(heading, seen, intersection, current, action))


def observation(p: Position) -> str:
    """What is seen, as the prompt gives it and the expert claims it."""
    seen = "; ".join(f"{name} on your {where}" for name, where in p.landmarks)
    place = "you are at an intersection" if p.intersection else "no intersection"
    return f"{seen or 'No landmarks nearby'}; {place}"


@dataclass(frozen=True)
class VIRL:
    """Navigation along a route, on rails: a right action advances, a wrong one does not; two judged
    attempts a position.

    actions "absolute": turn_direction takes a compass direction (in distribution); "relative":
    left, right, slightly ... (out of distribution). split: its routes are other routes. style 1:
    other signs and colours (visual out of distribution). routes: of load_routes, instead of the
    procedural city. compact: short prompts, for small models.
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
        if self.routes:
            route = self.routes[seed % len(self.routes)]
        else:
            route = city_route(seed, self.split, self.turns)
        heading = route.initial_heading
        if math.isnan(heading):
            heading = 45.0 * rng.randrange(8)
        walk, seen = Walk([], []), ()
        legs = zip(route.headings, route.landmarks, route.lengths, strict=True)
        for i, (to, landmarks, length) in enumerate(legs):
            corner = i > 0
            if i == 0 or compass(to) != compass(heading):
                by, face = turn(heading, to), compass(to)
                begin = "Turn" if corner else "First, turn"
                walk.instructions.append(f"{begin} {by} to face {face}.")
                direction = face if self.actions == "absolute" else by
                walk.add(heading, seen, corner, f"turn_direction({direction})")
            last = i == len(route.headings) - 1
            goal = "destination" if last else "next intersection"
            for name, degrees in landmarks[:1]:
                goal += f" where {name} is on your {bearing(degrees - to)}"
            walk.instructions.append(f"Move forward until you reach {goal}.")
            walk.add(to, seen, corner, "forward()")
            for k in range(1, self.forward_points + 1):
                at = k * length / (self.forward_points + 1)
                if min(at, length - at) > 8 and rng.random() < 0.5:
                    walk.add(to, (), False, "forward()")
            heading, seen = to, landmarks
        walk.add(heading, seen, False, "stop()")
        return walk

    def prompt(self, state: Walk) -> list[dict]:
        """The instructions, the right actions so far with what was seen, the present observation;
        failed attempts at this position follow."""
        text = self._short_task(state) if self.compact else self._task(state)
        return chat(text, self.render(state) if self.vision else None, state.failures)

    def _short_task(self, state: Walk) -> str:
        steps = " ".join(f"{i}. {line}" for i, line in enumerate(state.instructions, 1))
        past = state.positions[: state.place]
        actions = ", ".join(p.action for p in past) or "none"
        turns = ""
        if self.actions == "relative":
            turns = "Turns: left, right, slightly left, slightly right\n"
        seen = observation(state.here)
        if self.vision:
            seen = "intersection" if state.here.intersection else "no intersection"
        return f"{steps}\n{turns}Actions: {actions}\n{seen}"

    def _task(self, state: Walk) -> str:
        steps = "\n".join(f"{i}. {line}" for i, line in enumerate(state.instructions, 1))
        past = state.positions[: state.place]
        history = "\n".join(f"{observation(p)} -> {p.action}" for p in past) or "(none yet)"
        seen = observation(state.here)
        if self.vision:
            seen = (
                "The picture shows what you see: front and right above, back and left below. "
                f"You are {'' if state.here.intersection else 'not '}at an intersection."
            )
        choices = "left, right, slightly left, slightly right"
        if self.actions == "absolute":
            choices = ", ".join(COMPASS)
        return (
            f"You walk through a city by these instructions:\n{steps}\n\n"
            f"What you saw and did so far:\n{history}\n\nWhat you see now:\n{seen}\n\n"
            f"Choose one action: forward(), turn_direction(x) with x one of {choices}, or stop() "
            "at the destination. Answer in JSON with these fields and nothing else:\n"
            '{"current observation": what you see, "current instruction": the instruction that '
            'you follow now, "action": your action}'
        )

    def step(self, state: Walk, text: str) -> Result:
        if state.done:
            return Result(0.0, True, False, "The walk is over.")
        answer = fields_of(text, ("current observation", "current instruction", "action"))
        action = answer.get("action")
        if isinstance(action, str):
            asked = re.sub(r"\s+", " ", action[:60].strip().lower())
            if asked == state.here.action:
                state.place, state.failures = state.place + 1, []
                state.done = state.place == len(state.positions)
                message = "You have arrived." if state.done else "Right."
                return Result(1.0, state.done, state.done, message)
        reward, message = self._judge_failure(state, answer)
        state.failures.append((text, message if self.compact else message + " Try again."))
        state.done = len(state.failures) >= self.attempts
        return Result(reward, state.done, False, message)

    @staticmethod
    def _judge_failure(state: Walk, answer: dict) -> tuple[float, str]:
        """(reward, message) of an answer without the right action."""
        action, claim = answer.get("action"), answer.get("current observation")
        instruction = answer.get("current instruction")
        if not isinstance(action, str):
            return -1.0, "There is no action in your answer."
        reward, message = -1.0, f"{action[:40]} is not the right action here."
        if isinstance(claim, str) and not _fits(state, claim):
            reward, message = -1.5, f"{message} The observation is not what you see."
        right = state.instructions[state.here.instruction]
        if isinstance(instruction, str) and _plain(instruction) != _plain(right):
            reward, message = -1.75, f"{message} Another instruction is to be followed now."
        return reward, message

    def expert(self, state: Walk) -> str:
        return json.dumps(
            {
                "current observation": observation(state.here),
                "current instruction": state.instructions[state.here.instruction],
                "action": state.here.action,
            }
        )

    def render(self, state: Walk, width: int = 256):
        """The 2 x 2 grid [front, right; back, left] of street views with the landmarks' signs,
        width x width pixels."""
        from PIL import Image, ImageDraw

        now, half = state.here, width // 2
        image = Image.new("RGB", (2 * half, 2 * half))
        draw = ImageDraw.Draw(image)
        ahead = now.action == "forward()" or now.intersection
        views = ((0, 0, 0), (2, half, 0), (4, 0, half), (6, half, half))
        for side, left, top in views:  # the side as a place in BEARINGS
            street = ahead if side in (0, 4) else now.intersection
            self._draw_view(draw, left, top, half, street)
            for name, where in now.landmarks:
                # Something diagonal is in the front or the back view, not in those of the sides
                at = BEARINGS.index(where)
                place = {0: 0.5, 1: 0.78, 7: 0.22}.get((at - side) % 8)
                if place is not None and (at % 2 == 0 or side in (0, 4)):
                    self._draw_sign(draw, left + half * place, top + half * 0.32, half, name)
        draw.line((half, 0, half, 2 * half), fill=(255, 255, 255), width=2)
        draw.line((0, half, 2 * half, half), fill=(255, 255, 255), width=2)
        return image

    def _draw_view(self, draw, left: int, top: int, size: int, street: bool) -> None:
        """A street to the horizon, or a wall."""
        style = STYLES[self.style]
        sky, wall, road = style["sky"], style["wall"], style["road"]

        def box(x0: float, y0: float, x1: float, y1: float) -> tuple:
            return left + size * x0, top + size * y0, left + size * x1, top + size * y1

        horizon = 0.45
        draw.rectangle(box(0, 0, 1, horizon), fill=sky)
        draw.rectangle(box(0, horizon, 1, 1), fill=wall)
        if street:
            far, near = box(0.46, horizon, 0.54, horizon), box(0.05, 1, 0.95, 1)
            draw.polygon([far[:2], far[2:], near[2:], near[:2]], fill=road)
            draw.rectangle(box(0, 0.15, 0.36, horizon), fill=wall)
            draw.rectangle(box(0.64, 0.15, 1, horizon), fill=wall)
        else:
            draw.rectangle(box(0, 0.1, 1, 0.8), fill=wall)
            draw.rectangle(box(0, 0.8, 1, 1), fill=road)

    def _draw_sign(self, draw, x: float, y: float, size: int, name: str) -> None:
        """A landmark's name, in up to two lines around (x, y)."""
        style, lines = STYLES[self.style], name.split(" ")[:2]
        w, h = size * 0.2, size * 0.12
        around = (x - w, y - h * 1.3, x + w, y + h * 1.3)
        draw.rectangle(around, fill=style["sign"], outline=style["text"])
        for j, line in enumerate(lines):
            at = (x, y + (j - 0.5 * (len(lines) - 1)) * h)
            draw.text(at, line, fill=style["text"], font=font(h), anchor="mm")


def _fits(state: Walk, claim: str) -> bool:
    """Whether a claimed observation names the landmarks that are seen and no other of this walk,
    each at its bearing where it gives one, and says rightly whether this is an intersection."""
    claim, seen = _plain(claim), [name for name, _ in state.here.landmarks]
    for position in state.positions:
        for name, _ in position.landmarks:
            if (_plain(name) in claim) != (name in seen):
                return False
    bearings = "right front|right behind|left front|left behind|front|right|behind|left"
    for name, where in state.here.landmarks:
        match = re.search(rf"{re.escape(_plain(name))} (?:is )?on your ({bearings})", claim)
        if match and match[1] != where:
            return False
    said = re.search(r"(?<!no )(?<!not at an )(?<!not an )intersection", claim)
    return (said is not None) == state.here.intersection


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", " ", text[:1000].lower()).strip()
