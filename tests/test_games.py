"""games/: exact rules, rewards, experts, pictures, route files, hostile answers."""

import contextlib
import itertools
import json
import math
import random
import re
import runpy
import sys
import time
import types
from dataclasses import replace
from fractions import Fraction

import pytest
from PIL import Image, ImageChops, ImageDraw

import games
import games.__main__ as terminal
import games.play
import games.problems
import policy
from data import BOX, DataError, Example, embedded_examples
from games import games_of
from games.__main__ import save_picture
from games.general_points import (
    RANKS,
    GeneralPoints,
    Hand,
    IllegalFormula,
    _draw_suit,
    evaluate,
    solutions,
    solvable,
)
from games.play import Actor, Trajectory, Turn, demonstrate, play
from games.problems import (
    MathProblems,
    _asking,
    _source,
    _unearned,
    load_demonstrations,
    load_problems,
    own_result,
)
from games.rules import Result, chat, fields_of, own_function
from games.virl import (
    FIRST,
    SECOND,
    STYLES,
    VIRL,
    Position,
    Route,
    Walk,
    bearing,
    city_route,
    compass,
    load_routes,
    observation,
    turn,
    wrap,
)
from model import ModelError, load_config
from policy import Prompt, Sample
from tests.helpers import SHARED, hostile_rows

GAMES = [
    GeneralPoints(),
    GeneralPoints("11_12_13"),
    GeneralPoints(suits="red", vision=True),
    GeneralPoints(compact=True),
    VIRL(),
    VIRL("relative"),
    VIRL("relative", compact=True, turns=(2, 3), forward_points=1),
    VIRL(style=1, vision=True),
]


def play_expert(game, seed: int) -> list:
    """The results of the expert's episode."""
    state, results = game.reset(seed), []
    while not results or not results[-1].done:
        results.append(game.step(state, game.expert(state)))
    return results


def test_the_expert_wins():
    """1,000 of 1,000 episodes of each game and variant; every step the best reward; seeds give the
    same episode."""
    for game in GAMES:
        best = 5 if isinstance(game, GeneralPoints) else 1
        for seed in range(1000):
            results = play_expert(game, seed)
            assert results[-1].won, f"{game}, seed {seed}"
            assert {r.reward for r in results} == {best}, f"{game}, seed {seed}"
        assert game.reset(7) == game.reset(7), game
        assert game.reset(7) != game.reset(8), game
    for seed in range(200):
        ranks, suits = zip(*GeneralPoints("11_12_13").reset(seed).cards, strict=True)
        assert set(ranks) & set("JQK"), f"seed {seed}: no J, Q or K"
        assert set(suits) <= {"spades", "clubs"}, f"seed {seed}"
        first, *_, last = VIRL().reset(seed).positions
        assert not first.intersection, f"seed {seed}"
        assert not last.intersection, f"seed {seed}"
        assert last.action == "stop()", f"seed {seed}"
    walks = set()
    for split, seed in itertools.product(("train", "test"), range(100)):
        walk = VIRL(split=split).reset(seed)
        walks.add(walk.instructions[0] + str(walk.positions))
    assert len(walks) == 200, "a route is in two splits, or twice in one"


def test_problems_come_round_in_new_orders():
    """An endless list: every problem once a round; the order is a function of the seed."""
    examples = [Example(str(i), "", str(i), "", 0, str(i)) for i in range(10)]

    def order(game: MathProblems, first: int) -> list[str]:
        return [game.reset(seed).prompt for seed in range(first, first + 10)]

    game = MathProblems(examples, 1)
    rounds = [order(game, 0), order(game, 10), order(game, 0)]
    for found in rounds:
        assert sorted(found) == [e.prompt for e in examples]
    assert rounds[0] == rounds[2] != rounds[1]
    assert order(MathProblems(examples, 1), 0) == rounds[0]
    assert order(MathProblems(examples, 2), 0) != rounds[0]
    assert order(MathProblems(examples), 10) == [e.prompt for e in examples]
    results = [game.step(examples[3], text) for text in (r"\boxed{3}", r"\boxed{4}")]
    assert [(r.reward, r.done, r.won) for r in results] == [(1.0, True, True), (0.0, True, False)]


def test_embedded_problems_with_a_reward_are_new():
    """Neither they nor their tests were in the models' pre-training, or in each other."""
    _, tokenizer = load_config("tiny")
    sizes = {"validation": 8, "test": 70, "max_length": 512}
    train, validation, tests, _ = load_problems("embedded", tokenizer, **sizes)
    learnt = {e.prompt for e in train.examples + validation.examples}
    tested = {e.prompt for game in tests.values() for e in game.examples}
    known = set()
    for seed in (0, 1):
        for rows in embedded_examples(400, seed, "train", "pretraining").values():
            known |= {e.prompt for e in rows}
    assert min(len(learnt), len(known)) > 4000
    assert learnt.isdisjoint(known)
    assert tested.isdisjoint(learnt | known)


def test_tests_of_the_games():
    """Other deals and routes; the other rule; with pictures another look."""
    game, validation, tests = games_of("general_points", compact=True, vision=True)
    assert (game.split, validation.split) == ("train", "validation")
    assert list(tests) == ["in distribution", "rule", "visual"]
    assert {test.split for test in tests.values()} == {"test"}
    assert [test.rule for test in tests.values()] == ["10", "11_12_13", "10"]
    assert [test.suits for test in tests.values()] == ["black", "black", "red"]
    assert [test.attempts for test in tests.values()] == [2, 2, 2]
    game, validation, tests = games_of("virl", actions="relative", vision=True)
    assert (game.split, validation.split) == ("train", "validation")
    assert [test.actions for test in tests.values()] == ["relative", "absolute", "relative"]
    assert [test.style for test in tests.values()] == [0, 0, 1]
    assert games_of("general_points", rule="11_12_13")[2]["rule"].rule == "10"
    assert "visual" not in games_of("virl")[2]
    assert games_of("general_points")[0].attempts == 5


def test_settings_of_the_games():
    """What is asked for is what is played, in all sets; without a word the originals' settings."""
    game, validation, tests = games_of("general_points", rule="11_12_13", suits="red", vision=True)
    assert game == GeneralPoints("11_12_13", "red", vision=True)
    assert validation == replace(game, split="validation")
    assert tests == {
        "in distribution": GeneralPoints("11_12_13", "red", vision=True, split="test"),
        "rule": GeneralPoints("10", "red", vision=True, split="test"),
        "visual": GeneralPoints("11_12_13", "black", vision=True, split="test"),
    }
    game, _, tests = games_of("general_points")
    assert game == GeneralPoints("10", "black", False, False, "train", 24, 5)
    assert list(tests) == ["in distribution", "rule"]
    game, _, tests = games_of("virl")
    assert game == VIRL("absolute", False, False, "train", 0, (2, 6), 5, (), 2)
    assert tests == {
        "in distribution": VIRL(split="test"), "rule": VIRL("relative", split="test"),
    }  # fmt: skip
    small = {"vision": True, "compact": True, "turns": (2, 3), "forward_points": 1}
    game, validation, tests = games_of("virl", vision=True, compact=True)
    assert game == VIRL(**small)
    assert validation == VIRL(**small, split="validation")
    assert tests == {
        "in distribution": VIRL(**small, split="test"),
        "rule": VIRL("relative", **small, split="test"),
        "visual": VIRL(**small, split="test", style=1),
    }


def test_what_a_seed_names_stays():
    """docs/games.md's deal, another, and two walks: results of other days are of the same games."""
    for game, seed, cards, formula in (
        (GeneralPoints(), 3, "5 J K 7", "10+10/(5/7)=24"),
        (GeneralPoints("11_12_13", split="test"), 3, "7 Q 8 K", "12+7-(8-13)=24"),
    ):
        hand = game.reset(seed)
        assert [rank for rank, _ in hand.cards] == cards.split()
        assert json.loads(game.expert(hand))["formula"] == formula
    suits = [suit for _, suit in GeneralPoints(suits="red").reset(3).cards]
    assert suits == ["diamonds", "diamonds", "hearts", "diamonds"]
    walk = VIRL().reset(3)
    assert walk.instructions == [
        "First, turn right to face north.",
        "Move forward until you reach next intersection where Red Hotel is on your right.",
        "Turn right to face east.",
        "Move forward until you reach destination where Corner Gallery is on your left.",
    ]
    assert [p.instruction for p in walk.positions] == [0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    walk = VIRL("relative", split="test").reset(5)
    turns = [p.action for p in walk.positions if p.action.startswith("turn")]
    assert turns == [f"turn_direction({by})" for by in ("right", "left", "left", "left", "right")]
    assert walk.instructions[7::2] == [
        "Move forward until you reach next intersection where Lucky Bakery is on your right.",
        "Move forward until you reach destination.",
    ]


def test_routes_of_the_tests(monkeypatch):
    """Of their own file, or else the training's."""
    monkeypatch.setattr(games, "load_routes", lambda path: [path])
    for test_routes, expected in (("b", "b"), (None, "a")):
        train, validation, tests = games_of("virl", routes="a", test_routes=test_routes)
        assert train.routes == validation.routes == ("a",)
        assert {game.routes for game in tests.values()} == {(expected,)}


# --------------------------------------------------------------------------------------------------
# General Points


def by_python(formula: str) -> Fraction:
    """Python's own arithmetic on Fractions, on a text of our own making."""
    return eval(re.sub(r"(\d+)", r"Fraction(\1)", formula), {"Fraction": Fraction})


def test_general_points_solver():
    """The known numbers of solvable hands; every solution evaluates to 24 with each number used
    once; a hand with only fractions."""
    for highest, count, known in ((10, 715, 566), (13, 1820, 1362)):
        hands = list(itertools.combinations_with_replacement(range(1, highest + 1), 4))
        assert len(hands) == count
        assert sum(map(solvable, hands)) == known
    for hand in hands[::37]:
        found = solutions(hand, 24)
        assert bool(found) == solvable(hand), hand
        for formula in found:
            value, used = evaluate(formula)
            assert value == 24, formula
            assert by_python(formula) == 24, formula
            assert sorted(used) == list(hand), formula
    assert "8/(3-8/3)" in solutions((3, 3, 8, 8), 24)
    assert evaluate(" -( 2 - 3) *24 ") == (24, [2, 3, 24])


def judged(answer: str, cards: str = "4 7 8 8", vision: bool = False):
    """What the game says of an answer to a hand."""
    game = GeneralPoints(vision=vision)
    ranks = cards.split()
    hand = Hand(0, [(rank, "clubs") for rank in ranks], [game._value(rank) for rank in ranks])
    return game.step(hand, answer)


FORMULAS = [
    ("(7-8/8)*4=24", 5, "Right."),
    (" (7 - 8/8) * 4", 5, "Right."),
    ("-(8/8-7)*4=24", 5, "Right."),
    ("7+8+8+4=24", -1, "gives 27"),
    ("(7-9/9)*4=24", -4, "uses a number"),
    ("(7-8/8)*4+8=24", -2, "uses a number"),
    ("4*7=24", -2, "leaves a number out"),
    ("(7-8/8)*3=24", -4, "uses a number"),
    ("8/(8-8)*7+4", -3, "division by zero"),
    ("((7-8/8)*4=24", -3, "illegal"),
    ("7**8", -3, "illegal"),
    ("7-8/8)*4", -3, "illegal"),
    ("", -3, "illegal"),
    ("24=(7-8/8)*4", -4, "uses a number"),
    ("7 - 8\\u00b2", -3, "illegal"),
]


def test_general_points_rewards():
    """Each reward and message of the specification, reached by a hand-written answer."""
    for formula, reward, message in FORMULAS:
        result = judged(json.dumps({"formula": formula}))
        assert result.reward == reward, formula
        assert result.won == (reward == 5), formula
        assert message in result.message, formula
    assert judged("no formula here").reward == -3
    assert judged('The answer: "formula": "(7-8/8)*4=24" }').won
    assert judged('{"formula": 24}').reward == -3
    assert judged('{"formula": "8/(3-8/3)=24"}', "3 3 8 8").won
    assert judged('{"cards": ["10"], "formula": "(10-4)*4/A"}', "Q 4 4 A").reward == -3
    assert judged('{"formula": "(10-4)*4/1"}', "Q 4 4 A").won
    assert judged('{"formula": "(10+1)*4"}', "Q 4 4 A").reward == -2  # one of the two fours
    good = '{"cards": ["8", "7", "4", "8"], "number": [], "formula": "(7-8/8)*4=24"}'
    assert judged(good, vision=True).won
    assert judged(good.replace('"8", "7"', '"9", "7"'), vision=True).reward == -1.5
    assert judged("garbage !", vision=True).reward == -1.5
    game = GeneralPoints()
    hand = game.reset(0)
    results = [game.step(hand, "{}") for _ in range(5)]
    assert [r.done for r in results] == [False] * 4 + [True]
    assert not any(r.won for r in results)
    messages = game.prompt(hand)
    assert len(messages) == 11
    said = "There is no formula in your answer. Try again."
    assert messages[2] == {"role": "user", "content": said}


# --------------------------------------------------------------------------------------------------
# V-IRL

# North along a block to Old Bank, then west along another to Red Cafe; at the start one looks east
ROUTE = Route(90, (0, 270), ((("Old Bank", 90),), (("Red Cafe", 180),)), (50, 50))
AT_THE_BANK = "Old Bank on your right; you are at an intersection"
INSTRUCTIONS = [
    "First, turn left to face north.",
    "Move forward until you reach next intersection where Old Bank is on your right.",
    "Turn left to face west.",
    "Move forward until you reach destination where Red Cafe is on your left.",
]
POSITIONS = [
    ("No landmarks nearby; no intersection", 0, "turn_direction(north)"),
    ("No landmarks nearby; no intersection", 1, "forward()"),
    (AT_THE_BANK, 2, "turn_direction(west)"),
    ("Old Bank on your behind; you are at an intersection", 3, "forward()"),
    ("Red Cafe on your left; no intersection", 3, "stop()"),
]


def say(action: str, see: str | None = None, follow: str | None = None) -> str:
    """An answer with the fields that are given."""
    answer = {"current observation": see, "current instruction": follow, "action": action}
    return json.dumps({name: text for name, text in answer.items() if text})


# Answers at the bank, where turn_direction(west) is right
ANSWERS = [
    (say("forward()"), -1, "forward() is not the right action"),
    (say("forward()", AT_THE_BANK, INSTRUCTIONS[2]), -1, "not the right"),
    (
        say("forward()", "No landmarks nearby; you are at an intersection", INSTRUCTIONS[2]),
        -1.5,
        "observation",
    ),
    (
        say("forward()", AT_THE_BANK.replace("right", "left"), INSTRUCTIONS[2]),
        -1.5,
        "observation",
    ),
    (
        say("forward()", "Old Bank on your right; no intersection", INSTRUCTIONS[2]),
        -1.5,
        "observation",
    ),
    (say("forward()", AT_THE_BANK, INSTRUCTIONS[1]), -1.75, "Another instruction"),
    (say("forward()", "Red Cafe", INSTRUCTIONS[1]), -1.75, "Another instruction"),
    ("garbage", -1, "no action"),
    (say("turn_direction(west)", "nonsense", "nonsense"), 1, "Right."),
    (say(" Turn_Direction(west) "), 1, "Right."),
]


def test_virl_directions():
    """The direction words by hand."""
    by_degrees = {
        45: "slightly right",
        46: "right",
        90: "right",
        180: "right",
        315: "slightly left",
        270: "left",
        225: "left",
    }
    assert {degrees: turn(0, degrees) for degrees in by_degrees} == by_degrees
    assert turn(350, 30) == "slightly right"
    assert wrap(-180) == 180
    assert bearing(-45) == "left front"
    assert compass(181) == "south"


def test_virl_rewards():
    """Instructions, observations, rewards, the rails and the two attempts, by hand."""
    game = VIRL(routes=(ROUTE,), forward_points=0)
    walk = game.reset(0)
    assert walk.instructions == INSTRUCTIONS
    assert [(observation(p), p.instruction, p.action) for p in walk.positions] == POSITIONS
    relative = VIRL("relative", routes=(ROUTE,), forward_points=0).reset(0)
    left = "turn_direction(left)"
    assert [p.action for p in relative.positions] == [
        left,
        "forward()",
        left,
        "forward()",
        "stop()",
    ]
    for answer, reward, message in ANSWERS:
        walk = game.reset(0)
        for action in ("turn_direction(north)", "forward()"):
            assert game.step(walk, say(action)).reward == 1
        result = game.step(walk, answer)
        assert result.reward == reward, answer
        assert message in result.message, answer
        assert not result.done, answer
        if reward < 0:
            assert len(game.prompt(walk)) == 3
            assert walk.place == 2
            assert game.step(walk, say("turn_direction(west)")).reward == 1
            messages = game.prompt(walk)
            assert len(messages) == 1, "the failed attempt is not forgotten"
            assert f"{AT_THE_BANK} -> turn_direction(west)" in messages[0]["content"]
    walk = game.reset(0)
    results = [game.step(walk, say("stop()")) for _ in range(2)]
    assert [r.done for r in results] == [False, True]
    assert not results[1].won
    assert game.step(walk, say("forward()")).done


# A route in the original's format
RECORD = {
    "start_place": {"relocated_geocode": [40.0, -74.0]},
    "init_heading": 0,
    "dest_place": {},
    "milestone_info": {
        "0": {
            "landmarks": [{"name": "Deli", "bearing": "right"}],
            "to_next_intersection_heading": "2 (north)",
        },
        "1": {
            "landmarks": ["Bank of Us is on your left"],
            "to_next_intersection_heading": "91 (east)",
        },
        "2": {"landmarks": [], "to_next_intersection_heading": ""},
    },
    "route_results": {"geocode_list": [[40.0, -74.0], [40.001, -74.0], [40.001, -73.998]]},
    "landmark_list": [],
}


def test_route_files(tmp_path):
    """The expert walks the routes of a file; wrong files are one clear line."""
    file = tmp_path / "routes.json"
    file.write_text(json.dumps([[RECORD, {**RECORD, "init_heading": 177}], 2]))
    routes = tuple(load_routes(str(file)))
    assert [round(x) for x in routes[0].lengths] == [111, 171]
    assert routes[1].initial_heading == 177
    assert math.isnan(routes[0].initial_heading)
    for actions in ("absolute", "relative"):
        game = VIRL(actions, routes=routes)
        for seed in range(20):
            assert play_expert(game, seed)[-1].won, f"{actions}, seed {seed}"
        instructions = game.reset(1).instructions
        assert instructions[0] == "First, turn left to face north."
        on_the_way = "Move forward until you reach next intersection where Deli is on your right."
        assert instructions[1] == on_the_way
        end = "Move forward until you reach destination where Bank of Us is on your left."
        assert instructions[3] == end
    lengths = {len(VIRL(routes=routes).reset(seed).positions) for seed in range(0, 40, 2)}
    assert len(lengths) > 3, "forward points are drawn at reset"
    file.write_text("\ufeff" + json.dumps([[RECORD], 1]), encoding="utf-8")  # as Windows saves it
    assert [route.headings for route in load_routes(str(file))] == [routes[0].headings]
    huge = json.dumps([[RECORD], 1]).replace("40.001", "1" + 400 * "0")
    for bad in ("{", "[[], 0]", '[[{"init_heading": 1}], 1]', '{"a": 1}', "[" * 100_000, huge):
        file.write_text(bad)
        with pytest.raises(DataError, match="route"):
            load_routes(str(file))


# --------------------------------------------------------------------------------------------------
# Pictures and hostile answers


def test_game_pictures():
    """Pictures differ where cards, suits, landmarks or style differ, and are drawn at any size."""
    black, red = GeneralPoints(vision=True), GeneralPoints(vision=True, suits="red")
    hand, other = black.reset(1), black.reset(2)
    assert black.render(hand).size == (256, 128)
    assert black.render(hand, 512).size == (512, 256)
    pictures = [black.render(hand), black.render(other), red.render(red.reset(1))]
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert black.prompt(hand)[0]["content"][0]["type"] == "image"
    plain, styled = VIRL(vision=True), VIRL(vision=True, style=1)
    picture = plain.render(plain.reset(3))
    assert picture.size == (256, 256)
    assert picture.tobytes() != styled.render(styled.reset(3)).tobytes()
    views = set()
    for where in range(0, 360, 45):
        route = Route(0, (0, 90), ((("Old Bank", where),), ()), (50, 50))
        game = VIRL(routes=(route,), forward_points=0)
        walk = game.reset(0)
        for _ in range(2):
            game.step(walk, game.expert(walk))
        views.add(game.render(walk).tobytes())
    assert len(views) == 8, "two bearings of a landmark have the same picture"


def test_signs_stand_where_their_landmarks_are(monkeypatch):
    """In the view ahead or behind, on the side on which one sees them."""
    drawn = []
    monkeypatch.setattr(VIRL, "_draw_sign", lambda _, draw, x, y, size, name: drawn.append((x, y)))
    for where, column, upper in (
        (0, 0.5, True), (45, 0.78, True), (315, 0.22, True),
        (180, 0.5, False), (135, 0.22, False), (225, 0.78, False),  # looking back
    ):  # fmt: skip
        drawn.clear()
        walk = VIRL(routes=(Route(0, (0, 90), ((("Old Bank", where),), ()), (50, 50)),)).reset(0)
        walk.place = next(i for i, position in enumerate(walk.positions) if position.landmarks)
        assert walk.here.heading == 0
        VIRL().render(walk)
        ((x, y),) = drawn
        assert x == pytest.approx(128 * column)
        assert (y < 128) == upper


def test_the_saved_picture_shows_something(monkeypatch):
    """python -m games: of the first place with a landmark, also one that is no corner."""
    shown = []
    picture = types.SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(VIRL, "render", lambda _, state, width: shown.append(state) or picture)
    for seed in range(20):
        save_picture(VIRL(), seed, "game.png")
        walk = shown[-1]
        assert walk.here.landmarks
        assert not any(position.landmarks for position in walk.positions[: walk.place])


def test_the_end_of_a_long_answer_is_read():
    """Thoughts come before what is to be judged."""
    field = '{"formula": "1"}'
    assert fields_of("x" * 9000 + field, ("formula",)) == {"formula": "1"}
    assert fields_of(field + "x" * 9000, ("formula",)) == {}


def hostile_answers() -> list[str]:
    texts = []
    if SHARED.is_dir():
        for row in hostile_rows():
            texts += map(str, row.values())
    texts += [sign * 100_000 for sign in '[{"9']
    texts += [
        '{"formula": "' + "(" * 100_000,
        '{"formula": "' + "9" * 5000 + '"}',
        '{"number": ' + "9" * 7000 + "}",
        '{"action": ' * 9000,
        '{"formula": "' + "1+" * 90 + '1"}',
        '{"formula": "' + "(" * 30 + "1" + ")" * 30 + '"}',
        '{"formula": "9999/1*' + "9999*" * 40 + '1"}',
    ]
    return texts


def mutated(rng: random.Random, text: str, alphabet: str) -> str:
    chars = list(text)
    for _ in range(rng.randint(1, 6)):
        chars[rng.randrange(len(chars))] = rng.choice(alphabet)
    return "".join(chars)


@pytest.mark.parametrize("game", [GeneralPoints(), VIRL()], ids=["general_points", "virl"])
def test_hostile_game_outputs(game):
    """20,000 random and mutated answers and the checker's hostile strings: a reward, a message, no
    exception, under 20 ms."""
    rng, hostile = random.Random(0), hostile_answers()
    alphabet = "{}[]\"'\\:,.0123456789+-*/()= \n\tabcAKQJ\u00e9\u4e2d\x00"

    def timed_step(seed: int, text: str) -> tuple:
        state = game.reset(seed)
        start = time.perf_counter()
        result = game.step(state, text)
        return time.perf_counter() - start, result

    for i in range(20_000 + len(hostile)):
        seed = i % 50
        if i < len(hostile):
            text = hostile[i]
        elif i % 2:
            text = "".join(rng.choices(alphabet, k=rng.randint(0, 80)))
        else:
            text = mutated(rng, game.expert(game.reset(seed)), alphabet)
        seconds, result = timed_step(seed, text)
        if seconds >= 0.02:  # a busy machine has a second chance
            seconds, _ = timed_step(seed, text)
        assert seconds < 0.02, text[:100]
        assert isinstance(result.reward, float), text[:100]
        assert isinstance(result.message, str), text[:100]
        assert len(result.message) < 300, text[:100]


# --------------------------------------------------------------------------------------------------
# What games give and take


def test_fields_of_an_answer():
    """Of the last object, or found one by one in what does not parse."""
    names = ("formula", "cards")
    for text, found in (
        ('{"formula": "1", "x": 2} then {"cards": [1]}', {"cards": [1]}),
        ('so {"cards": ["A"], "formula": "2", "other": 3}!', {"cards": ["A"], "formula": "2"}),
        ('"formula": "1+1", "cards": ["A", \'10\' , K]', {
            "formula": "1+1", "cards": ["A", "10", "K"],
        }),
        ('} "formula":"1" {', {"formula": "1"}),
        ('{"formula": "1"', {"formula": "1"}),
        ('[{"formula": "1"}]', {"formula": "1"}),
        ('"formula": ""', {"formula": ""}),
        (f'"formula": "{"1" * 500}"', {"formula": "1" * 500}),
        (f'"formula": "{"1" * 501}"', {}),
        (f'"cards": [{"1" * 500}]', {"cards": ["1" * 500]}),
        (f'"cards": [{"1" * 501}]', {}),
        ("{}", {}),
        ('{"formula": 5}', {"formula": 5}),
        ("formula: 1", {}),
    ):  # fmt: skip
        assert fields_of(text, names) == found, text
    long = '{"formula": "1"}'
    assert fields_of("x" + long + " " * (8000 - len(long)), names) == {"formula": "1"}
    assert fields_of(long + " " * (8001 - len(long)), ("formula",)) == {"formula": "1"}
    assert fields_of('"formula": "1"' + " " * 7987, ("formula",)) == {}


def test_an_answer_nested_too_deep():
    """For the parser; its fields are searched for."""
    deep = '{"x": ' + "[" * 3500 + "]" * 3500 + ', "formula": "1"}'
    assert fields_of(deep, ("formula",)) == {"formula": "1"}
    assert fields_of("}{", ("formula",)) == {}


def test_messages_of_a_game():
    assert chat("task", None, [("a", "m"), ("b", "n")]) == [
        {"role": "user", "content": "task"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "m"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "n"},
    ]
    (message,) = chat("task", "picture", [])
    assert message == {
        "role": "user",
        "content": [{"type": "image", "image": "picture"}, {"type": "text", "text": "task"}],
    }
    assert Result(1.0, True, False, "").noted == {}


def test_functions_of_the_user(tmp_path, monkeypatch):
    file = tmp_path / "own_reward.py"
    file.write_text("x = 3\ndef f(n):\n    return n + x\n")
    assert own_function(f"{file}:f", "--reward")(4) == 7
    assert own_function("math:isqrt", "--reward")(17) == 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "reward_beside.py").write_text(file.read_text())
    assert own_function("reward_beside:f", "--reward")(5) == 8
    for name, said in (
        (f"{file}:x", "is no function"),
        (f"{file}:g", "AttributeError: module 'own_reward' has no attribute 'g'"),
        ("no_such_module_here:f", "ModuleNotFoundError: No module named 'no_such_module_here'"),
    ):
        with pytest.raises(DataError) as caught:
            own_function(name, "--reward")
        assert str(caught.value) in (f"--reward {name} {said}", f"--reward {name}: {said}")


def test_functions_of_a_file_at_home(tmp_path, monkeypatch):
    """~ is the user's folder; a dataclass of the file finds its module."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own_home.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n\n@dataclasses.dataclass\n"
        "class Point:\n    x: dataclasses.InitVar[int]\n\ndef f(x):\n    return Point(x)\n"
    )
    assert type(own_function("~/own_home.py:f", "--task")(3)).__name__ == "Point"
    with pytest.raises(DataError, match="^--task ~/none.py:f: FileNotFoundError: "):
        own_function("~/none.py:f", "--task")


# --------------------------------------------------------------------------------------------------
# General Points: limits, texts, pictures


def illegal(formula: str) -> str:
    with pytest.raises(IllegalFormula) as caught:
        evaluate(formula)
    return str(caught.value)


def test_limits_of_formulas():
    """200 characters, 20 parentheses deep, numbers of four digits."""
    assert evaluate("1+" * 99 + "11") == (110, [1] * 99 + [11])
    assert illegal("1+" * 100 + "1") == "too long"
    assert evaluate("(" * 20 + "7" + ")" * 20) == (7, [7])
    assert illegal("(" * 21 + "7" + ")" * 21) == "unexpected ("
    assert evaluate("9999") == (9999, [9999])
    assert illegal("10000") == "unexpected 10000"
    for formula, said in (
        ("", "unexpected end"), ("1+", "unexpected end"), ("(1", "unclosed parenthesis"),
        ("1)", "unexpected )"), ("1 2", "unexpected 2"), ("1/(2-2)", "division by zero"),
        ("2^3", "unexpected ^"), ("--1", "unexpected -"), ("2*-1", "unexpected -"),
        ("+1", "unexpected +"), ("1.5", "unexpected ."),
    ):  # fmt: skip
        assert illegal(formula) == said, formula
    for formula, value, used in (
        ("-2*3+10", 4, [2, 3, 10]), ("10-2-3", 5, [10, 2, 3]), ("2-(-3)", 5, [2, 3]),
        ("24/4/3*2", 4, [24, 4, 3, 2]), ("2+3*4-1", 13, [2, 3, 4, 1]),
        ("(2+3)*4", 20, [2, 3, 4]), ("1/3", Fraction(1, 3), [1, 3]), ("12/8*2", 3, [12, 8, 2]),
    ):  # fmt: skip
        assert evaluate(formula) == (value, used), formula


@pytest.mark.parametrize("digit", ["\u0663", "\uff18", "\u096e"])
def test_digits_of_other_scripts_are_no_numbers(digit):
    assert illegal(digit) == f"unexpected {digit}"
    assert illegal(f"3*{digit}") == f"unexpected {digit}"
    assert judged(json.dumps({"formula": f"{digit}*3"}), "8 3 3 3").reward == -3


def test_solutions_of_three_numbers():
    """Every way, with no parenthesis too many, found by hand."""
    assert solutions((2, 3), 6) == ("2*3",)
    assert solutions((2, 3), -1) == ("2-3",)
    assert solutions((0, 5), 0) == ("0*5", "0/5")
    assert solutions((1, 2, 3), 9) == ("3*(1+2)",)
    assert solutions((1, 2, 3), 7) == ("1+2*3",)
    zero = {"3-(1+2)", "1+2-3", "2+1-3", "2-(3-1)", "3-1-2", "1-(3-2)", "3-2-1"}
    assert solutions((1, 2, 3), 0) == tuple(sorted(zero))
    one = {
        "6/(2*3)", "2*3/6", "6-(2+3)", "6-2-3", "3*2/6", "3/(6/2)", "6/2/3", "6-3-2", "2/(6/3)",
        "6/3/2",
    }  # fmt: skip
    assert solutions((2, 3, 6), 1) == tuple(sorted(one))
    assert solvable((2, 3, 6), 1)
    assert not solvable((1, 2, 3), 24)
    assert not solvable((0, 0), 1)


def test_deals():
    """Four cards of any rank and of both suits; their values by each rule."""
    for rule, values in (("10", [*range(1, 11), 10, 10, 10]), ("11_12_13", list(range(1, 14)))):
        game = GeneralPoints(rule)
        assert [game._value(rank) for rank in RANKS] == values
        seen = [set(), set(), set(), set()]
        suits = [set(), set(), set(), set()]
        for seed in range(400):
            hand = game.reset(seed)
            assert len(hand.cards) == 4
            assert hand.values == [game._value(rank) for rank, _ in hand.cards]
            assert (hand.seed, hand.attempts, hand.turns, hand.done) == (seed, 0, [], False)
            for i, (rank, suit) in enumerate(hand.cards):
                seen[i].add(rank)
                suits[i].add(suit)
        assert seen == [set(RANKS)] * 4
        assert suits == [{"spades", "clubs"}] * 4
    cards = GeneralPoints(suits="red").reset(1).cards
    assert {suit for _, suit in cards} <= {"hearts", "diamonds"}
    dealt = []
    for seed in range(300):
        dealt.append({rank for rank, _ in GeneralPoints().reset(seed).cards})
    assert any(ranks.isdisjoint("JQK") for ranks in dealt), "only the other rule deals one always"
    deals = {split: GeneralPoints(split=split).reset(1).cards for split in ("train", "test")}
    assert deals["train"] != deals["test"]
    for target in (24, 10):
        hand = GeneralPoints(target=target).reset(3)
        assert solvable(tuple(sorted(hand.values)), target)


def hand_of(game: GeneralPoints, cards: str) -> Hand:
    ranks = cards.split()
    return Hand(0, [(rank, "clubs") for rank in ranks], [game._value(rank) for rank in ranks])


def test_prompts_of_general_points():
    """Word for word, by each rule, long and short, in text and in pictures."""
    long = (
        "This is the game of 24 points. {} 'A' counts as 1, number cards as their number, {}. "
        "Write a formula that uses the number of each card exactly once, with +, -, *, / and "
        "parentheses, and that equals 24. Answer in JSON with these fields and nothing else:\n"
        '{{"cards": [the ranks of the four cards], "number": [the numbers that they count as], '
        '"formula": "your formula=24"}}'
    )
    shown = 'Your four cards are ["A", "10", "K", "7"].'
    ten, own = "'J', 'Q' and 'K' count as 10", "'J' counts as 11, 'Q' as 12 and 'K' as 13"
    for game, text in (
        (GeneralPoints(), long.format(shown, ten)),
        (GeneralPoints("11_12_13"), long.format(shown, own)),
        (GeneralPoints(compact=True), '["A", "10", "K", "7"], J, Q, K = 10: 24'),
        (
            GeneralPoints("11_12_13", compact=True),
            '["A", "10", "K", "7"], J = 11, Q = 12, K = 13: 24',
        ),
    ):
        (message,) = game.prompt(hand_of(game, "A 10 K 7"))
        assert message == {"role": "user", "content": text}
    game = GeneralPoints(vision=True)
    content = game.prompt(hand_of(game, "A 10 K 7"))[0]["content"]
    assert content[1]["text"] == long.format("You see four cards in the picture.", ten)
    assert content[0]["image"].size == (256, 128)
    game = GeneralPoints(vision=True, compact=True)
    content = game.prompt(hand_of(game, "A 10 K 7"))[0]["content"]
    assert content[1]["text"] == "The cards, J, Q, K = 10: 24"
    game = GeneralPoints(target=10, compact=True)
    assert game.prompt(hand_of(game, "A 2 3 4"))[0]["content"].endswith(": 10")


def test_turns_of_general_points():
    """What is remembered; after the last attempt, or a right one, the game is over."""
    game = GeneralPoints(attempts=2)
    hand = hand_of(game, "4 7 8 8")
    wrong = '{"formula": "4*7-8+8"}'
    assert game.step(hand, wrong) == (
        -1.0,
        False,
        False,
        "The formula gives 28, not 24. Try again.",
        {},
    )
    assert (hand.attempts, hand.done) == (1, False)
    assert game.prompt(hand)[1:] == [
        {"role": "assistant", "content": wrong},
        {"role": "user", "content": "The formula gives 28, not 24. Try again."},
    ]
    assert game.step(hand, "{}")[:3] == (-3.0, True, False)
    assert game.step(hand, wrong) == (0.0, True, False, "The game is over.", {})
    assert (hand.attempts, len(hand.turns)) == (2, 2)
    hand = hand_of(game, "4 7 8 8")
    assert game.step(hand, '{"formula": "(7-8/8)*4=23"}') == (5.0, True, True, "Right.", {})
    assert game.step(hand, "")[3] == "The game is over."
    short = GeneralPoints(compact=True)
    said = short.step(hand_of(short, "4 7 8 8"), wrong).message
    assert said == "The formula gives 28, not 24."
    assert GeneralPoints(target=28).step(hand_of(game, "4 7 8 8"), wrong).won
    for factor, shown in ((999, str(9999 * 9998 * 9997 * 9995 * 999)), (9991, "another number")):
        assert len(shown) == (19 if factor == 999 else 14)
        values = [9999, 9998, 9997, 9995, factor]
        formula = json.dumps({"formula": "*".join(map(str, values))})
        result = game.step(Hand(0, [], values), formula)
        assert result.message == f"The formula gives {shown}, not 24. Try again."
    assert json.loads(game.expert(hand_of(game, "3 3 8 8"))) == {
        "cards": ["3", "3", "8", "8"], "number": [3, 3, 8, 8], "formula": "8/(3-8/3)=24",
    }  # fmt: skip
    hand = hand_of(game, "2 3 4 5")
    answers = set()
    for hand.seed in range(20):
        answers.add(game.expert(hand))
    assert len(answers) > 2


def test_recognised_cards():
    """In any order and case; not one more, one less or another."""
    game = GeneralPoints(vision=True)
    hand = hand_of(game, "A 10 K 10")
    for cards, right in (
        (["A", "10", "K", "10"], True), ([" k", 10, "a ", "10"], True), (["A", "10", "K"], False),
        (["A", "10", "K", "10", "10"], False), (["A", "10", "K", "K"], False), ("A10K10", False),
        (["A", "10", "K", "10"] * 3, False), (None, False),
    ):  # fmt: skip
        assert game.recognised(hand, json.dumps({"cards": cards})) == right, cards
        result = game.step(hand_of(game, "A 10 K 10"), json.dumps({"cards": cards}))
        assert result.reward == (-3 if right else -1.5)
        said = (
            "There is no formula in your answer."
            if right
            else ("The cards are not those in the picture.")
        )
        assert result.message == said + " Try again."
    assert GeneralPoints().misread_reward is None


TABLE, CARD, EDGE = (30, 110, 60), (250, 250, 245), (60, 60, 60)


@pytest.mark.parametrize("scale", [1, 2])
def test_where_the_cards_lie(scale):
    """56 x 84 of 256 x 128, 62 apart, from (6, 22) on; the rank above the sign."""
    game = GeneralPoints(suits="red")
    hand = Hand(0, [("A", "diamonds"), ("7", "hearts"), ("K", "clubs"), ("2", "spades")], [])
    picture = game.render(hand, 256 * scale)
    assert picture.size == (256 * scale, 128 * scale)

    def at(x: float, y: float) -> tuple:
        return picture.getpixel((round(x * scale), round(y * scale)))

    for i, colour in enumerate([(200, 20, 30)] * 2 + [(20, 20, 20)] * 2):
        left, middle = 6 + 62 * i, 64
        for x, y in ((left, middle), (left + 56, middle), (left + 28, 22), (left + 28, 106)):
            assert at(x, y) == EDGE, (i, x, y)
        for x, y in ((left - 2, middle), (left + 58, middle), (left + 28, 20), (left + 28, 108)):
            assert at(min(x, 255), y) == TABLE, (i, x, y)
        for x, y in ((left + 2, middle), (left + 54, middle), (left + 28, 24), (left + 28, 104)):
            assert at(x, y) == CARD, (i, x, y)
        assert at(left, 22) == TABLE  # rounded
        box = (left + 3, 26, left + 53, 102)
        inside = picture.crop(tuple(scale * edge for edge in box))
        drawn = ImageChops.difference(inside, Image.new("RGB", inside.size, CARD)).convert("L")
        mask = drawn.point(lambda value: 255 if value > 60 else 0)
        above, below = (
            mask.crop((0, 0, 50 * scale, 41 * scale)),
            mask.crop((0, 44 * scale, 50 * scale, 76 * scale)),
        )
        x0, y0, x1, y1 = (edge / scale for edge in above.getbbox())
        assert (x0 + x1) / 2 == pytest.approx(25, abs=2.5)
        assert (y0 + y1) / 2 == pytest.approx(22, abs=3)
        assert 18 < y1 - y0 < 32
        x0, y0, x1, y1 = (edge / scale for edge in below.getbbox())
        assert (x0 + x1) / 2 == pytest.approx(25, abs=1)
        assert y1 == pytest.approx(14 + 13.5, abs=1)
        assert 0.5 < y0 < 4
        assert at(left + 28, 85) == colour


@pytest.mark.parametrize(
    "suit,left,top,right,bottom",
    [
        ("diamonds", -0.75, -1, 0.75, 1),
        ("hearts", -0.92, -0.85, 0.92, 1),
        ("clubs", -0.9, -0.9, 0.9, 1),
        ("spades", -0.9, -1, 0.9, 1),
    ],
)
def test_signs_of_the_suits(suit, left, top, right, bottom):
    """Their extent, for a radius of 1; the same on both sides."""
    image = Image.new("L", (241, 281))
    _draw_suit(ImageDraw.Draw(image), suit, 120, 140, 100, 255)
    box = image.getbbox()
    expected = [120 + 100 * left, 140 + 100 * top, 121 + 100 * right, 141 + 100 * bottom]
    assert list(box) == pytest.approx(expected, abs=1.5)
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    difference = ImageChops.difference(image, mirrored)
    assert sum(difference.histogram()[128:]) < 0.01 * image.histogram()[255]


# (suit, points that it covers, points beside it), for a radius of 1
SHAPES = {
    "diamonds": ("0 0, 0.3 0.5, 0 -0.9", "0.6 0.6, 0.7 -0.3, 0.5 -0.6"),
    "hearts": ("0 0, 0.42 -0.8, 0.85 -0.2, 0 0.9, 0.4 0.4", "0 -0.75, 0.6 0.6, 0.95 -0.35"),
    "clubs": ("0 -0.8, 0.8 0.2, 0 0, 0.25 0.9, 0 0.2", "0.5 -0.6, 0.6 0.8, 0.5 -0.35"),
    "spades": ("0 -0.9, 0.8 0.2, 0 0, 0.25 0.9, 0.4 -0.4", "0.4 -0.8, 0.7 0.8, 0.95 0.2"),
}


@pytest.mark.parametrize("suit", SHAPES)
def test_shapes_of_the_suits(suit):
    image = Image.new("L", (241, 281))
    _draw_suit(ImageDraw.Draw(image), suit, 120, 140, 100, 255)
    for points, colour in zip(SHAPES[suit], (255, 0), strict=True):
        for point in points.split(", "):
            x, y = map(float, point.split())
            for side in (1, -1):
                at = image.getpixel((round(120 + side * 100 * x), round(140 + 100 * y)))
                assert at == colour, (point, side)


# --------------------------------------------------------------------------------------------------
# V-IRL: routes, walks, texts, pictures


def test_directions_of_all_degrees():
    assert [compass(45 * i) for i in range(9)] == [
        "north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest",
        "north",
    ]  # fmt: skip
    assert [bearing(45 * i) for i in range(-1, 8)] == [
        "left front", "front", "right front", "right", "right behind", "behind", "left behind",
        "left", "left front",
    ]  # fmt: skip
    assert (compass(22), compass(23), compass(338), compass(337)) == (
        "north", "northeast", "north", "northwest",
    )  # fmt: skip
    assert [wrap(x) for x in (180, 181, -179, 360, 540, 0, -90)] == [
        180,
        -179,
        -179,
        0,
        180,
        0,
        -90,
    ]
    assert [turn(90, x) for x in (45, 44, 135, 136, 270, 271)] == [
        "slightly left", "left", "slightly right", "right", "right", "left",
    ]  # fmt: skip


def test_routes_of_the_city():
    """Their measures over many seeds: legs, headings, turns, landmarks, lengths."""
    routes = [city_route(seed, "train") for seed in range(1500)]
    assert {len(route.headings) for route in routes} == {2, 3, 4, 5, 6}
    assert {len(city_route(seed, "train", (3, 4)).headings) for seed in range(50)} == {3, 4}
    first = [route.headings[0] for route in routes]
    assert set(first) == {45.0 * i for i in range(8)}
    on_the_grid = sum(heading % 90 == 0 for heading in first) / len(first)
    assert on_the_grid == pytest.approx(0.7 + 0.3 / 2, abs=0.03)
    offsets, starts, lengths, names, marked, corners, by = [], set(), [], set(), 0, 0, []
    for route in routes:
        assert len(route.landmarks) == len(route.lengths) == len(route.headings)
        for before, after in zip(route.headings, route.headings[1:], strict=False):
            by.append((after - before) % 360)
        starts.add((route.initial_heading - route.headings[0]) % 360)
        lengths += route.lengths
        own = []
        for corner, heading in zip(route.landmarks, route.headings, strict=True):
            corners += 1
            for name, degrees in corner:
                marked += 1
                own.append(name)
                assert 0 <= degrees < 360
                offsets.append((degrees - heading) % 360)
        assert len(set(own)) == len(own)
        names |= set(own)
    shares = {degrees: by.count(degrees) / len(by) for degrees in set(by)}
    expected = {90: 0.25, 270: 0.25, 45: 0.125, 315: 0.125, 135: 0.125, 225: 0.125}
    assert shares == pytest.approx(expected, abs=0.03)
    shares = {degrees: offsets.count(degrees) / len(offsets) for degrees in set(offsets)}
    assert shares == pytest.approx({90: 1 / 3, 270: 1 / 3, 45: 1 / 6, 315: 1 / 6}, abs=0.03)
    assert starts == {45.0 * i for i in range(1, 8)}
    assert 0 <= min(lengths) - 40 < 1
    assert 0 <= 120 - max(lengths) < 1
    assert marked / corners == pytest.approx(0.85, abs=0.02)
    assert len(names) == len(FIRST) * len(SECOND) == 168
    assert all(max(map(len, route.landmarks)) <= 1 for route in routes)


@pytest.mark.parametrize("compact,legs,most", [(False, {2, 3, 4, 5, 6}, 6), (True, {2, 3}, 2)])
def test_how_long_walks_are(compact, legs, most):
    """Two to six legs of up to six steps; for small models two or three of up to two."""
    game, *_ = games_of("virl", compact=compact)
    assert game.attempts == 2
    found, steps = set(), []
    for seed in range(200):
        walk = game.reset(seed)
        found.add(sum(line.startswith("Move forward") for line in walk.instructions))
        here = [position.instruction for position in walk.positions]
        on_the_way = [p.instruction for p in walk.positions if p.action == "forward()"]
        steps += [on_the_way.count(i) for i in set(on_the_way)]
        assert here == sorted(here)
    assert found == legs
    assert max(steps) == most


def test_headings_and_landmarks_of_files(tmp_path):
    """In every way that the originals' files write them."""
    record = {
        "init_heading": "90.5",
        "milestone_info": [
            {"to_next_intersection_heading": " -90 (west)", "landmarks": {"a": "Deli", "b": {
                "name": " Bank ", "direction": "Left Behind."}}},
            {"to_next_intersection_heading": "725.5", "landmarks": "Cafe is on your right."},
            {"to_next_intersection_heading": "10", "landmarks": None},
        ],
        "route_results": {"geocode_list": [[0, 0], [0, 0.001], [0.002, 0.001], [60, 0.001]]},
    }  # fmt: skip
    file = tmp_path / "r.json"
    file.write_text(json.dumps([[record], 1]))
    (route,) = load_routes(str(file))
    assert route.initial_heading == 90.5
    assert route.headings == (270, 5.5, 10)
    assert route.landmarks == (
        (("Deli", 270), ("Bank", (270 + 225) % 360)), (("Cafe", 95.5),), (),
    )  # fmt: skip
    assert route.lengths[:2] == pytest.approx((111.32, 222.64), rel=1e-5)
    record["route_results"]["geocode_list"] = [[60, 0], [60, 0.001]]
    record["milestone_info"] = {"10": {}, "9": record["milestone_info"][0]}
    file.write_text(json.dumps([[record], 1]))
    (route,) = load_routes(str(file))
    assert route.lengths == pytest.approx((55.66,), rel=1e-4)  # half as far, at 60 degrees north
    record["route_results"]["geocode_list"] = [[60, 0]]
    file.write_text(json.dumps([[record], 1]))
    with pytest.raises(DataError) as caught:
        load_routes(str(file))
    assert str(caught.value) == f"{file}: no route, or a route without legs"
    file.write_text("{")
    with pytest.raises(DataError) as caught:
        load_routes(str(file))
    assert str(caught.value).startswith(f"{file} is not a route file: JSONDecodeError ")


def test_landmarks_without_a_bearing(tmp_path):
    """What a file does not say, or in words that are none of the eight, is ahead."""
    seen = [{"name": "Deli"}, {"name": "Bank", "bearing": "above"}, "Cafe", "Bar is on your up"]
    record = {
        "milestone_info": [{"to_next_intersection_heading": "90", "landmarks": seen}],
        "route_results": {"geocode_list": [[0, 0], [0, 1]]},
    }
    (tmp_path / "r.json").write_text(json.dumps([[record], 1]))
    (route,) = load_routes(str(tmp_path / "r.json"))
    assert route.landmarks == ((("Deli", 90), ("Bank", 90), ("Cafe", 90), ("Bar", 90)),)
    assert math.isnan(route.initial_heading)


def test_route_files_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "r.json").write_text(json.dumps([[RECORD], 1]))
    (route,) = load_routes("~/r.json")
    assert route.headings == (2, 91)


def walk_of(seed: int = 0, *, headings=(0, 270), lengths=(50, 50), landmarks=None, **settings):
    landmarks = landmarks or ((),) * len(headings)
    route = Route(90, tuple(headings), tuple(landmarks), tuple(lengths))
    return VIRL(routes=(route,), **settings).reset(seed)


def test_points_between_corners():
    """Up to so many, evenly, at random, none within 8 m of a corner, and nothing to be seen."""
    for length, points, most in ((40, 4, 2), (41, 4, 4), (16, 1, 0), (16.1, 1, 1), (60, 5, 5)):
        counts = []
        for seed in range(400):
            walk = walk_of(seed, headings=(90,), lengths=(length,), forward_points=points)
            assert walk.positions[1].action == "forward()"
            between = walk.positions[2:-1]
            for position in between:
                assert position == Position(90, (), False, 1, "forward()")
            counts.append(len(between))
        assert max(counts) == most
        assert sum(counts) / 400 == pytest.approx(most / 2, abs=0.2)
        assert min(counts) == 0
    assert len(walk_of(headings=(90,), lengths=(60,), forward_points=0).positions) == 3


def test_straight_on_there_is_no_turn():
    """A corner where one goes on has no instruction to turn; at the start there is always one."""
    landmarks = ((("A", 270), ("B", 0)), (), (("C", 180),))
    walk = walk_of(headings=(0, 0, 270), lengths=(50,) * 3, landmarks=landmarks, forward_points=0)
    assert walk.instructions == [
        "First, turn left to face north.",
        "Move forward until you reach next intersection where A is on your left.",
        "Move forward until you reach next intersection.",
        "Turn left to face west.",
        "Move forward until you reach destination where C is on your left.",
    ]
    a_and_b = (("A", "left"), ("B", "front"))
    assert walk.positions == [
        Position(90, (), False, 0, "turn_direction(north)"),
        Position(0, (), False, 1, "forward()"),
        Position(0, a_and_b, True, 2, "forward()"),
        Position(0, (), True, 3, "turn_direction(west)"),
        Position(270, (), True, 4, "forward()"),
        Position(270, (("C", "left"),), False, 4, "stop()"),
    ]
    at_once = walk_of(headings=(90,), lengths=(50,), forward_points=0)
    assert [p.action for p in at_once.positions] == ["turn_direction(east)", "forward()", "stop()"]
    headings = set()
    for seed in range(60):
        route = Route(math.nan, (0,), ((),), (50,))
        headings.add(VIRL(routes=(route,)).reset(seed).positions[0].heading)
    assert headings == {45.0 * i for i in range(8)}
    two = tuple(Route(0, (45.0 * i,), ((),), (9,)) for i in range(2))
    first = [VIRL(routes=two).reset(seed).positions[1].heading for seed in range(4)]
    assert first == [0, 45, 0, 45]
    over = Walk([], walk.positions, place=6)
    assert over.here == walk.positions[-1]
    assert Walk([], walk.positions, place=2).here == walk.positions[2]


LONG_TASK = """\
You walk through a city by these instructions:
1. First, turn left to face north.
2. Move forward until you reach next intersection where Old Bank is on your right.
3. Turn left to face west.
4. Move forward until you reach destination where Red Cafe is on your left.

What you saw and did so far:
{history}

What you see now:
{seen}

Choose one action: forward(), turn_direction(x) with x one of {choices}, or stop() at the \
destination. Answer in JSON with these fields and nothing else:
{{"current observation": what you see, "current instruction": the instruction that you follow now, \
"action": your action}}"""
TO_THE_BANK = """\
No landmarks nearby; no intersection -> turn_direction({0})
No landmarks nearby; no intersection -> forward()"""
SHORT_TASK = (
    "1. First, turn left to face north. 2. Move forward until you reach next intersection where "
    "Old Bank is on your right. 3. Turn left to face west. 4. Move forward until you reach "
    "destination where Red Cafe is on your left.\n"
)
ALL_DIRECTIONS = "north, northeast, east, southeast, south, southwest, west, northwest"
RELATIVE = "left, right, slightly left, slightly right"


def prompt_at(place: int, **settings):
    game = VIRL(routes=(ROUTE,), forward_points=0, **settings)
    walk = game.reset(0)
    walk.place = place
    (message,) = game.prompt(walk)
    return message["content"]


def test_prompts_of_virl():
    """Word for word, at the start and on the way, in every variant."""
    nothing = "No landmarks nearby; no intersection"
    assert prompt_at(0) == LONG_TASK.format(
        history="(none yet)", seen=nothing, choices=ALL_DIRECTIONS
    )
    assert prompt_at(2) == LONG_TASK.format(
        history=TO_THE_BANK.format("north"), seen=AT_THE_BANK, choices=ALL_DIRECTIONS
    )
    assert prompt_at(2, actions="relative") == LONG_TASK.format(
        history=TO_THE_BANK.format("left"), seen=AT_THE_BANK, choices=RELATIVE
    )
    assert prompt_at(0, compact=True) == f"{SHORT_TASK}Actions: none\n{nothing}"
    assert prompt_at(2, compact=True) == (
        f"{SHORT_TASK}Actions: turn_direction(north), forward()\n{AT_THE_BANK}"
    )
    assert prompt_at(1, compact=True, actions="relative") == (
        f"{SHORT_TASK}Turns: left, right, slightly left, slightly right\n"
        f"Actions: turn_direction(left)\n{nothing}"
    )
    view = "The picture shows what you see: front and right above, back and left below. You are "
    for place, here, short in ((0, "not at", "no intersection"), (2, "at", "intersection")):
        image, text = prompt_at(place, vision=True)
        assert image["image"].size == (256, 256)
        assert f"What you see now:\n{view}{here} an intersection.\n" in text["text"]
        assert prompt_at(place, vision=True, compact=True)[1]["text"].endswith(f"\n{short}")


def test_turns_of_virl():
    """Any case and spaces; two failures in one place end it, not two in all."""
    game = VIRL(routes=(ROUTE,), forward_points=0)
    walk = game.reset(0)
    assert game.step(walk, say("stop()")) == (
        -1.0, False, False, "stop() is not the right action here.", {},
    )  # fmt: skip
    assert walk.failures == [(say("stop()"), "stop() is not the right action here. Try again.")]
    assert game.step(walk, say("  Turn_Direction(North)\n")) == (1.0, False, False, "Right.", {})
    assert (walk.place, walk.failures) == (1, [])
    assert not game.step(walk, say("go" * 40)).done
    assert walk.failures[0][1] == f"{'go' * 20} is not the right action here. Try again."
    for action in ("forward()", "turn_direction(west)", "forward()"):
        assert game.step(walk, say(action)) == (1.0, False, False, "Right.", {})
    assert game.step(walk, say("stop()" + " " * 60)) == (1.0, True, True, "You have arrived.", {})
    assert walk.done
    assert game.step(walk, say("stop()")) == (0.0, True, False, "The walk is over.", {})
    short = VIRL(routes=(ROUTE,), forward_points=0, compact=True, attempts=3)
    walk = short.reset(0)
    results = [short.step(walk, "{}") for _ in range(3)]
    assert [result.done for result in results] == [False, False, True]
    assert walk.failures == [("{}", "There is no action in your answer.")] * 3
    walk = game.reset(0)
    assert game.step(walk, say("turn_direction(north)x" + "y" * 60)).reward == -1
    spaced = game.reset(0)
    spaced.positions[0] = spaced.positions[0].__class__(90, (), False, 0, "a b")
    assert game.step(spaced, say("a \n\t b")).reward == 1


def test_claims_of_what_is_seen():
    """Landmarks by name, here and nowhere else, at their bearing; the intersection as it is."""
    game = VIRL(routes=(ROUTE,), forward_points=0)
    walk = game.reset(0)
    walk.place = 2
    for claim, reward in (
        (AT_THE_BANK, -1), ("An intersection. OLD BANK!", -1),
        ("old bank is on your right, at an intersection", -1),
        ("old bank on your right behind; intersection", -1.5),
        ("old bank on your right", -1.5), ("Old Bank; you are not at an intersection", -1.5),
        ("Old Bank; this is not an intersection", -1.5), ("intersection", -1.5),
        ("Old Bank and Red Cafe; intersection", -1.5), ("Old Bank, no intersection", -1.5),
    ):  # fmt: skip
        walk.failures.clear()
        result = game.step(walk, say("stop()", claim))
        assert result.reward == reward, claim
        end = " The observation is not what you see." if reward == -1.5 else ""
        assert result.message == f"stop() is not the right action here.{end}"
        walk.done = False
    walk.failures.clear()
    result = game.step(walk, say("stop()", "nonsense", "turn LEFT to face west"))
    assert (result.reward, walk.done) == (-1.5, False)
    result = game.step(walk, say("stop()", AT_THE_BANK, "turn right"))
    assert (result.reward, walk.done) == (-1.75, True)
    assert result.message.endswith(" Another instruction is to be followed now.")


def test_views_of_a_place(monkeypatch):
    """Front and right above, back and left below; streets where one can go, signs where things are:
    something diagonal in front or behind, never beside."""
    views, signs = [], []
    monkeypatch.setattr(VIRL, "_draw_view", lambda _, draw, *view: views.append(view))
    monkeypatch.setattr(VIRL, "_draw_sign", lambda _, draw, *sign: signs.append(sign))
    corners = ((0, 0), (100, 0), (0, 100), (100, 100))
    for position, streets in (
        (Position(0, (), False, 0, "forward()"), (True, False, True, False)),
        (Position(0, (), True, 0, "stop()"), (True, True, True, True)),
        (Position(0, (), False, 0, "turn_direction(left)"), (False, False, False, False)),
    ):
        views.clear()
        image = VIRL().render(Walk([], [position]), 200)
        assert image.size == (200, 200)
        assert views == [
            (*corner, 100, street) for corner, street in zip(corners, streets, strict=True)
        ]
    for where, x, y in (
        ("front", 50, 32), ("right front", 78, 32), ("left front", 22, 32), ("right", 150, 32),
        ("behind", 50, 132), ("right behind", 22, 132), ("left behind", 78, 132),
        ("left", 150, 132),
    ):  # fmt: skip
        signs.clear()
        VIRL().render(Walk([], [Position(0, (("Old Bank", where),), False, 0, "stop()")]), 200)
        assert signs == [(pytest.approx(x), pytest.approx(y), 100, "Old Bank")], where
    pixels = VIRL().render(Walk([], [Position(0, (), False, 0, "stop()")]), 200)
    for i in (0, 50, 199):
        assert pixels.getpixel((100, i)) == pixels.getpixel((i, 100)) == (255, 255, 255)
        assert pixels.getpixel((103, i)) == (0, 0, 0) or i == 100


@pytest.mark.parametrize("style", [0, 1])
def test_streets_and_walls(style):
    """A view of 100 x 100 pixels, from (100, 200) on, row by row."""
    colours = STYLES[style]
    sky, wall, road = colours["sky"], colours["wall"], colours["road"]
    for street, expected in (
        (True, {
            (50, 5): sky, (50, 43): sky, (50, 47): road, (50, 98): road,
            (10, 5): sky, (10, 13): sky, (10, 17): wall, (10, 60): wall,
            (34, 30): wall, (38, 30): sky, (62, 30): sky, (66, 30): wall, (98, 30): wall,
            (98, 13): sky, (3, 98): wall, (8, 98): road, (92, 98): road, (97, 98): wall,
            (44, 46): wall, (47, 46): road, (53, 46): road, (56, 46): wall,
        }),
        (False, {
            (50, 5): sky, (50, 8): sky, (50, 12): wall, (2, 12): wall, (98, 12): wall,
            (50, 78): wall, (50, 82): road, (1, 98): road, (98, 98): road,
        }),
    ):  # fmt: skip
        image = Image.new("RGB", (300, 400))
        VIRL(style=style)._draw_view(ImageDraw.Draw(image), 100, 200, 100, street)
        for (x, y), colour in expected.items():
            assert image.getpixel((100 + x, 200 + y)) == colour, (street, x, y)
        drawn = image.getbbox()
        assert drawn == pytest.approx((100, 200, 201, 301), abs=1)


def test_a_sign():
    """40 x 31 pixels of a view of 100, its words in one line or two around the middle."""
    style = STYLES[0]
    for name, heights in (("Bank", [50]), ("Old Bank", [44, 56]), ("Old Bank Inn", [44, 56])):
        image = Image.new("RGB", (100, 100))
        VIRL()._draw_sign(ImageDraw.Draw(image), 50, 50, 100, name)
        assert image.getbbox() == pytest.approx((30, 34.4, 71, 66.6), abs=1)
        assert image.getpixel((31, 36)) == style["sign"]
        assert image.getpixel((30, 50)) == style["text"]  # its frame
        inside = image.crop((33, 37, 67, 64)).convert("L")
        dark = [y + 37 for y in range(27) if inside.crop((0, y, 34, y + 1)).getextrema()[0] < 150]
        middle = [y for y in dark if abs(y - 50) <= 1]
        assert bool(middle) == (len(heights) == 1)
        assert (min(dark) + max(dark)) / 2 == pytest.approx(sum(heights) / len(heights), abs=2)
        assert max(dark) - min(dark) == pytest.approx(8 if len(heights) == 1 else 20, abs=4)


# --------------------------------------------------------------------------------------------------
# Mathematics with a reward; players


def problem_file(folder, first: int, last: int, name: str = "a.jsonl", **more):
    rows = []
    for i in range(first, last):
        row = {"problem": f"What is {i} + 1?", "solution": f"\\boxed{{{i + 1}}}"}
        rows.append(row | {"subject": "AB"[i % 2], "level": 1 + i % 5} | more)
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder / name


def loaded(place, **more) -> tuple:
    """(problems of training, of validation, of tests, the report)"""
    _, tokenizer = load_config("tiny")
    settings = {"validation": 4, "test": 100, "max_length": 512} | more
    train, valid, tests, report = load_problems(str(place), tokenizer, **settings)
    return train, valid, tests["test"], report


def test_how_problems_are_shared(tmp_path):
    """A tenth is the test, at most as many as asked for and at least one."""
    report = (
        "{} training problems, 4 for validation, {} test; {} over 512 tokens and {} without an "
        "answer or not chosen left out"
    )
    file = problem_file(tmp_path, 0, 100)
    for test, held in ((100, 10), (10, 10), (3, 3)):
        train, valid, tests, said = loaded(file, test=test)
        assert said == report.format(96 - held, held, 0, 0)
        assert (len(train), len(valid), len(tests)) == (96 - held, 4, held)
    train, valid, tests, said = loaded(file, subjects=("A",), levels=(1, 2))
    assert said == report.format(14, 2, 0, 80)  # 0, 6, 10, 16, ...: 20 are chosen
    for game in (train, valid, tests):
        for e in game.examples:
            assert (e.subject, e.level <= 2) == ("A", True)
            assert e.prompt.endswith(f" + 1?{BOX}")
    assert train.shuffle == valid.shuffle == 42
    assert tests.shuffle is None
    assert {e.id for e in loaded(file, seed=1)[2].examples} != {
        e.id for e in loaded(file)[2].examples
    }
    rows = problem_file(tmp_path, 0, 9, "few.jsonl")
    assert len(loaded(rows)[2]) == 1
    rows.write_text(rows.read_text().replace("1 + 1?", "1 + 1? " + "x" * 2000))
    assert loaded(rows, validation=2)[3].startswith(
        "5 training problems, 2 for validation, 1 test; 1 over"
    )
    problem_file(tmp_path, 0, 5, "five.jsonl")
    assert len(loaded(tmp_path / "five.jsonl", validation=3)[0]) == 1
    with pytest.raises(DataError) as caught:
        loaded(tmp_path / "five.jsonl")
    assert str(caught.value) == (
        f"{tmp_path / 'five.jsonl'}: 4 training problems with an answer and 1 test problems remain "
        "(subjects: A, B; --subjects, --levels and --max-length choose); more than "
        "--validation-size 4 and 1 are needed"
    )
    rows = [{"problem": f"{i}?", "solution": "x", "subject": f"s{i:02}"} for i in range(12)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"\(subjects: s00, s01, .*, s08, s09; --subjects"):
        loaded(tmp_path / "many.jsonl", levels=(9,))
    problem_file(tmp_path, 0, 30, "prose.jsonl", solution="words alone")
    with pytest.raises(DataError, match="0 training problems with an answer and 0 test problems"):
        loaded(tmp_path / "prose.jsonl")


def test_own_test_file_and_rewards(tmp_path):
    """Its first rows in the order of the seed, as many as asked for; with a reward of one's own
    also problems without an answer."""
    problem_file(tmp_path, 0, 20, "train.jsonl", solution="no answer", level=0)
    problem_file(tmp_path, 18, 40, "test.jsonl")
    reward = tmp_path / "own.py"
    reward.write_text(
        "def f(problem, response, row):\n    return {'reward': len(response), 'n': 1}"
    )
    _, tokenizer = load_config("tiny")
    settings = {"validation": 2, "max_length": 512, "reward": f"{reward}:f", "suffix": " Say."}
    train, valid, tests, report = load_problems(str(tmp_path), tokenizer, test=7, **settings)
    assert report == (
        "16 training problems, 2 for validation, 7 test; 0 over 512 tokens and 0 without an answer "
        "or not chosen left out; 2 that occur twice or in the test left out"
    )
    assert (len(train), len(valid), len(tests["test"])) == (16, 2, 7)
    for game in (train, valid, tests["test"]):
        example = game.reset(0)
        assert example.prompt.endswith("? Say.")
        assert game.step(example, "four") == (4.0, True, True, "", {"n": 1})
        assert game.expert(example) == example.response
        assert game.prompt(example) == [{"role": "user", "content": example.prompt}]
    with pytest.raises(DataError, match="0 training problems with an answer and 22 test problems"):
        load_problems(str(tmp_path), tokenizer, validation=2, test=30, max_length=512)


def test_a_reward_that_fails_is_found_at_once(tmp_path):
    """Not after the model is loaded, in the first rollout; it sees the first problem's solution."""
    file = problem_file(tmp_path, 0, 20)
    (tmp_path / "own.py").write_text(
        "def fails(*_):\n    return 1 / 0\n\n"
        "seen = []\ndef keep(*given):\n    seen.append(given)\n    return 1\n"
        "def get():\n    return seen\n"
    )
    with pytest.raises(DataError, match="^--reward fails on .*: ZeroDivisionError: "):
        loaded(file, reward=f"{tmp_path / 'own.py'}:fails")
    train, valid, *_ = loaded(file, reward=f"{tmp_path / 'own.py'}:keep")
    ((problem, response, row),) = sys.modules["own"].get()
    asked = {e.prompt: e for game in (train, valid) for e in game.examples}
    assert (response, row["id"]) == (asked[problem].response, asked[problem].id)


def test_rewards_of_the_user():
    example = Example("p", "r", "a", "s", 3, "id/7")
    seen = []

    def keep(*given):
        seen.append(given)
        return 0.0

    assert own_result(keep, example, "text") == (0.0, True, False, "", {})
    row = {"problem": "p", "solution": "r", "answer": "a", "subject": "s", "level": 3, "id": "id/7"}
    assert seen == [("p", "text", row)]
    assert own_result(lambda *_: {"reward": 1e-9, "x": 2}, example, "") == (
        1e-9, True, True, "", {"x": 2},
    )  # fmt: skip
    assert own_result(lambda *_: -1, example, "") == (-1.0, True, False, "", {})
    assert own_result(lambda *_: True, example, "").won
    for value, said in (
        (math.nan, "--reward gives nan on id/7"), (math.inf, "--reward gives inf on id/7"),
        ({"score": 1}, "--reward fails on id/7: KeyError: 'reward'"),
        (None, "--reward fails on id/7: TypeError: "),
    ):  # fmt: skip
        with pytest.raises(DataError) as caught:
            own_result(lambda *_, value=value: value, example, "")
        assert str(caught.value).startswith(said)


def test_demonstrations_that_are_looked_at():
    """Evenly over the list; the first that fails is named."""
    examples = []
    for i in range(1000):
        answer = "9" * 70 if i in (5, 500, 501) else str(i)
        examples.append(Example("", f"\\boxed{{{i}}}", answer, "", 0, f"e{i}"))
    assert _unearned(examples) == (
        f"; 2 of 200 demonstrations looked at do not give their own answer, as e5: {'9' * 60!r}"
    )
    assert _unearned(examples[:5]) == ""
    assert _unearned(examples[5:6]).startswith("; 1 of 1 demonstrations")
    assert _unearned(examples[498:502], 2).startswith("; 1 of 2 demonstrations")  # 498 and 500
    assert _unearned(examples[500:502], 2).startswith("; 2 of 2 demonstrations")


def test_demonstrations_of_a_file(tmp_path):
    """All of them, but for those of a test and those that are too long, with the question's
    suffix."""
    _, tokenizer = load_config("tiny")
    file = problem_file(tmp_path, 0, 20)
    tests = {"test": MathProblems([Example(f"What is 3 + 1?{BOX}", "", "", "", 0, "t")])}
    shown = load_demonstrations(str(file), tokenizer, tests, 512, None)
    assert sorted(e.id for e in shown.examples) == sorted(
        f"{file}/{i}" for i in range(20) if i != 3
    )
    assert shown.shuffle == 0
    assert all(e.prompt.endswith(BOX) for e in shown.examples)
    plain = load_demonstrations(str(file), tokenizer, {}, 512, "")
    assert len(plain) == 20
    assert all(e.prompt.endswith("1?") for e in plain.examples)
    with pytest.raises(DataError) as caught:
        load_demonstrations(str(file), tokenizer, tests, 5, None)
    assert str(caught.value) == f"--sft-data {file}: no demonstration of at most 5 tokens"


def test_rounds_of_problems_are_remembered():
    """Only the present one; a set of its own order comes round as it is."""
    examples = [Example(str(i), "", "", "", 0, str(i)) for i in range(5)]
    game = MathProblems(examples)
    assert [game.reset(seed).id for seed in range(12)] == [str(i % 5) for i in range(12)]
    assert len(game) == 5
    shuffled = MathProblems(examples, 0)
    rounds = []
    for first in range(0, 30, 5):
        rounds.append(tuple(shuffled.reset(first + i).id for i in range(5)))
    assert len(set(rounds)) > 3
    assert len(shuffled._orders) == 1


def test_returns_of_a_trajectory():
    turns = [Turn([1], [2], [0.0], True, "", reward) for reward in (1.0, -2.0, 4.0)]
    assert Trajectory(turns).returns() == [3.0, 2.0, 4.0]
    assert Trajectory(turns).returns(0.5) == [1.0, 0.0, 4.0]
    assert Trajectory().returns() == []


def test_what_an_actor_plays(monkeypatch):
    """This rank's seeds; progress is shown by the first rank for long responses; the run's seed
    names the random streams."""
    calls = []
    monkeypatch.setattr(games.play, "play", lambda *args: calls.append(args) or "groups")
    monkeypatch.setattr(games.play, "gathered", contextlib.nullcontext)
    stop = types.SimpleNamespace(is_requested=lambda: True)

    def actor(rank: int, tokens: int) -> Actor:
        world = types.SimpleNamespace(rank=rank, size=3)
        return Actor(
            "policy", "lm", "tokenizer", "processor", world, seed=7, max_new_tokens=tokens,
            batch_size=64, stop=stop, sampler="sampler",
        )  # fmt: skip

    assert list(actor(1, 9).mine(8)) == [1, 4, 7]
    assert list(actor(2, 9).mine(4, 10)) == [12]
    assert list(actor(0, 9).mine(4, 10)) == [10, 13]
    assert actor(0, 1024).rollout("game", [3], 2, "key") == "groups"
    actor(0, 1025).play("game", [3], 2, "own", 0.5, to_the_end=True)
    actor(1, 1025).play("game", [3], 2, "own")
    shared = ("lm", "tokenizer", "game", [3], 2)
    assert {call[-1] for call in calls} == {"sampler"}
    assert [call[:-2] for call in calls] == [
        (*shared, "7/key", 1024, 64, 1.0, None, "processor"),
        (*shared, "own", 1025, 64, 0.5, "rollout", "processor"),
        (*shared, "own", 1025, 64, 1.0, None, "processor"),
    ]
    assert [call[-2]() for call in calls] == [True, False, True]


class Countdown:
    """A game of as many turns as its seed says; it is won where the seed is even."""

    def reset(self, seed: int) -> list[int]:
        return [seed, seed]

    def prompt(self, state: list[int]) -> list[dict]:
        return [{"role": "user", "content": f"{state[1]} left"}]

    def step(self, state: list[int], text: str) -> Result:
        state[1] -= 1
        over = state[1] == 0
        return Result(float(text), over, over and state[0] % 2 == 0, "", {"left": state[1]})

    def expert(self, state: list[int]) -> str:
        return str(10 * state[0] + state[1])


class Sampler:
    """Answers call c's k-th response with c and k, two digits, of which the odd are unfinished; or
    its arguments are those of sample_with_pictures."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls, self.options = tokenizer, [], []

    def __call__(self, model, tokenizer, prompts, samples, *limits, **options) -> list[Sample]:
        assert (model, tokenizer) == ("model", self.tokenizer)
        ids = [getattr(prompt, "ids", prompt) for prompt in prompts]
        self.calls.append((self.tokenizer.batch_decode(ids), samples, limits))
        self.options.append(options)
        responses = []
        for k in range(samples * len(prompts)):
            ids = self.tokenizer(f"{len(self.calls)}{k}", add_special_tokens=False)["input_ids"]
            finished = k % 2 == 0
            responses.append(Sample(ids + [1] * finished, [-0.5 - k] * len(ids), finished))
        return responses


def rewards(groups) -> list:
    return [[[turn.reward for turn in t.turns] for t in group] for group in groups]


ASKED = [
    ([f"<|user|>{n} left<|assistant|>" for n in (1, 3, 2)], 2),
    ([f"<|user|>{n} left<|assistant|>" for n in (2, 2, 1, 1)], 1),
    ([f"<|user|>{n} left<|assistant|>" for n in (1, 1)], 1),
]
# Of the seeds 1, 3 and 2, two samples each
REWARDS = [[[10], [11]], [[12, 20, 30], [13, 21, 31]], [[14, 22], [15, 23]]]


def test_episodes_advance_together():
    """All that are not over take a turn in one call: first by seed, then each with its own prompt;
    everything goes to the sampler and every response to its episode."""
    _, tokenizer = load_config("tiny")

    def never() -> bool:
        return False

    def played(seeds, key: str, progress=None):
        sampler = Sampler(tokenizer)
        groups = play(
            "model", tokenizer, Countdown(), seeds, 2, key, 7, 5, 0.3, progress, None, never,
            sampler,
        )  # fmt: skip
        return groups, sampler

    groups, sampler = played((1, 3, 2), "key", "shown")
    assert sampler.calls == [(*asked, (7, 0.3)) for asked in ASKED]
    assert rewards(groups) == REWARDS
    assert [[t.won for t in group] for group in groups] == [[False] * 2, [False] * 2, [True] * 2]
    streams = []
    for options in sampler.options:
        streams += options.pop("seeds")
        assert options == {
            "stop": {tokenizer.eos_token_id}, "batch_size": 5, "progress": "shown",
            "interrupted": never,
        }  # fmt: skip
    assert len(set(streams)) == len(streams) == 12
    assert streams[-1] == 2074817323380681983, "the draws of a run are no longer what they were"
    alone = played((3,), "key")[1].options
    assert [options["seeds"] for options in alone] == [streams[2:4], streams[6:8], streams[10:]]
    assert played((3,), "other")[1].options[0]["seeds"] != streams[2:4]
    first, second = groups[1][0].turns[0], groups[1][1].turns[0]
    ids = tokenizer("12", add_special_tokens=False)["input_ids"]
    prompt = tokenizer("<|user|>3 left<|assistant|>", add_special_tokens=False)["input_ids"]
    assert first == Turn(prompt, [*ids, 1], [-2.5] * len(ids), True, "12", 12.0, {}, {"left": 2})
    assert (second.finished, second.text, second.noted) == (False, "13", {"left": 2})


def test_interrupted_episodes_are_cut_short():
    """After the turn in which it is asked for; each sample keeps what it has."""
    _, tokenizer = load_config("tiny")
    for turns in range(3):
        asked = itertools.count(1)
        groups = play(
            "model", tokenizer, Countdown(), (1, 3, 2), 2, "key", 7,
            interrupted=lambda asked=asked, turns=turns: next(asked) > turns,
            sampler=Sampler(tokenizer),
        )  # fmt: skip
        assert rewards(groups) == [[t[:turns] for t in group] for group in REWARDS]


def test_episodes_with_pictures(monkeypatch):
    """Prompts and demonstrations come from the processor, whose inputs the turns keep."""
    _, tokenizer = load_config("tiny")
    real = games.play.encode_prompts

    def encode(tokenizer, conversations, processor):
        assert processor == "eyes"
        texts = [messages[0]["content"] for messages in conversations]
        prompts = real(tokenizer, conversations)
        return [Prompt(p.ids, {"seen": text}) for p, text in zip(prompts, texts, strict=True)]

    sampler = Sampler(tokenizer)
    monkeypatch.setattr(games.play, "encode_prompts", encode)
    monkeypatch.setattr(games.play, "sample_with_pictures", sampler)
    settings = {"batch_size": 5, "temperature": 0.3, "processor": "eyes"}
    groups = play("model", tokenizer, Countdown(), (1, 3, 2), 2, "key", 7, **settings)
    assert rewards(groups) == REWARDS
    stop = {tokenizer.eos_token_id}
    assert [(prompts, n, limits[:-1]) for prompts, n, limits in sampler.calls] == [
        (*asked, (7, 0.3, stop, 5)) for asked in ASKED
    ]
    text = Sampler(tokenizer)
    monkeypatch.setattr(games.play, "encode_prompts", real)
    play("model", tokenizer, Countdown(), (1, 3, 2), 2, "key", 7, sampler=text)
    assert [limits[-1] for *_, limits in sampler.calls] == [o["seeds"] for o in text.options]
    for group in groups:
        for trajectory in group:
            assert [turn.inputs["seen"] for turn in trajectory.turns] == [
                f"{n} left" for n in range(len(trajectory.turns), 0, -1)
            ]
    monkeypatch.setattr(games.play, "encode_prompts", encode)
    seen = demonstrate(tokenizer, Countdown(), 2, "eyes").turns
    assert [turn.inputs for turn in seen] == [{"seen": "2 left"}, {"seen": "1 left"}]


def test_what_the_expert_shows():
    """An answer a turn until the game is over, with the token that ends a turn."""
    _, tokenizer = load_config("tiny")
    episode = demonstrate(tokenizer, Countdown(), 2)
    assert episode.won
    for done, text, left in zip(episode.turns, ("22", "21"), (2, 1), strict=True):
        ids = tokenizer(f"{text}<|end|>", add_special_tokens=False)["input_ids"]
        prompt = f"<|user|>{left} left<|assistant|>"
        prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        zeros, noted = [0.0] * len(ids), {"left": left - 1}
        assert done == Turn(prompt, ids, zeros, True, text, float(text), {}, noted)


def test_rollouts_of_an_actor(monkeypatch):
    """The policy is whole while it plays, and only then; to the end where that is asked for."""
    seen = []

    @contextlib.contextmanager
    def gathered(model):
        seen.append(model)
        yield
        seen.append("apart")

    monkeypatch.setattr(games.play, "gathered", gathered)
    monkeypatch.setattr(games.play, "play", lambda *args: seen.append(args[-2]()))
    monkeypatch.setattr(games.play, "demonstrate", lambda *args: args)
    world = types.SimpleNamespace(rank=0, size=1)
    stop = types.SimpleNamespace(is_requested=lambda: True)
    actor = Actor(
        "policy", "lm", "tokenizer", "eyes", world, seed=7, max_new_tokens=9, batch_size=4,
        stop=stop,
    )  # fmt: skip
    actor.rollout("game", [3], 2, "key", to_the_end=True)
    actor.rollout("game", [3], 2, "key")
    assert seen == ["policy", False, "apart", "policy", True, "apart"]
    assert actor.demonstrate("game", 3) == ("tokenizer", "game", 3, "eyes")
    assert actor.sampler is policy.sample


def test_sources_of_problems(monkeypatch):
    """Embedded: the known families' own part, and as many tests as asked for, about, of the known
    and half as many of the others. The hub: LUFFY's rows, which have no test of their own."""
    calls = []

    def rows(per_family, seed, part, *roles):
        calls.append((per_family, seed, part, *roles))
        return {"a": [f"{part} {roles[0]} {i}" for i in range(2)], "b": ["last"]}

    monkeypatch.setattr(games.problems, "embedded_examples", rows)
    for test, known, unseen in ((1, 1, 1), (70, 2, 2), (84, 3, 2), (85, 3, 3)):
        calls.clear()
        train, tests = _source("embedded", test, 9)
        assert calls == [
            (400, 9, "post", "pretraining"), (known, 9, "final", "pretraining"),
            (unseen, 9, "final", "training", "heldout"),
        ]  # fmt: skip
    assert train == ["post pretraining 0", "post pretraining 1", "last"]
    assert tests == {
        "trained families": ["final pretraining 0", "final pretraining 1", "last"],
        "unseen families": ["final training 0", "final training 1", "last"],
    }

    asked = []
    row = {"prompt": "How many?", "target": r"Some. \boxed{3}", "reward_model": {
        "ground_truth": "3"}}  # fmt: skip
    tables = {"train": [row], "test": []}
    monkeypatch.setattr(games.problems, "hub_tables", lambda name: asked.append(name) or tables)
    ((example,), tests) = _source("hub", 10, 9)
    assert (example.prompt, example.response, example.answer, tests) == (
        "How many?", r"Some. \boxed{3}", "3", {},
    )  # fmt: skip
    assert asked == ["Elliott/Openr1-Math-46k-8192"]


def test_what_follows_a_problem():
    """BOX, but for embedded ones and those that speak of the box themselves."""
    example = Example("1 + 1?", "r", "2", "s", 1, "i")
    for data, suffix, said in (
        ("embedded", None, "1 + 1?"), ("embedded", " Say.", "1 + 1? Say."),
        ("hub", None, f"1 + 1?{BOX}"), ("a.jsonl", None, f"1 + 1?{BOX}"), ("hub", "", "1 + 1?"),
    ):  # fmt: skip
        assert _asking(example, data, suffix) == replace(example, prompt=said)
    boxed = replace(example, prompt=r"1 + 1? Answer in \boxed{}.")
    assert _asking(boxed, "hub", None) == _asking(boxed, "hub", " Say.") == boxed


def test_a_model_in_the_terminal(monkeypatch):
    """Its likeliest answer, of up to 256 tokens, for which its positions must suffice."""
    _, tokenizer = load_config("tiny")
    calls = []

    def sample(model, tokenizer, prompts, **options):
        assert not model.training
        calls.append((tokenizer.batch_decode(prompts), options))
        return [Sample([*tokenizer("42", add_special_tokens=False)["input_ids"], 1], [], True)]

    monkeypatch.setattr(policy, "sample", sample)
    answer = terminal.model_player("tiny")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert answer([*messages, {"role": "user", "content": "z"}]) == "42"
    options = {"max_new_tokens": 256, "temperature": 0, "stop": {tokenizer.eos_token_id}}
    prompt = "<|user|>x<|assistant|>y<|end|><|user|>z<|assistant|>"
    assert calls == [([prompt], options)]
    digits = 2048 - 256 - 2  # what surrounds them is two tokens
    answer([{"role": "user", "content": "1" * digits}])
    with pytest.raises(ModelError, match="^rows of up to 2049 tokens, .* lower .*--compact$"):
        answer([{"role": "user", "content": "1" * (digits + 1)}])


def test_games_as_asked_for_in_the_terminal(tmp_path, capsys, monkeypatch):
    """Rule, suits, actions, length and seed reach the game; the player's answers count."""
    shown = []
    monkeypatch.setattr(terminal, "save_picture", lambda game, *rest: shown.append((game, *rest)))
    asked = []

    def model_player(name: str):
        def answer(messages):
            asked.append((name, messages))
            return "stop()" if len(asked) % 2 else game.expert(state)

        return answer

    monkeypatch.setattr(terminal, "model_player", model_player)
    game = VIRL("relative", compact=True)
    state = game.reset(4)
    settings = {"actions": "relative", "compact": True, "seed": 4, "player": "folder"}
    terminal.main(terminal.Args("virl", **settings))
    assert shown.pop() == (game, 4, "game.png")
    assert [name for name, _ in asked] == ["folder"] * 4  # a right one, then what was right there
    assert asked[0][1] == game.prompt(state)
    said = capsys.readouterr().out
    assert said.count("folder: stop()\nreward -1: There is no action in your answer.") == 2
    assert said.count("reward +1: Right.") == 1

    terminal.main(terminal.Args("general_points", rule="11_12_13", suits="red", seed=5))
    assert shown.pop() == (GeneralPoints("11_12_13", "red"), 5, "game.png")
    assert "'J' counts as 11" in capsys.readouterr().out
    terminal.main(terminal.Args("general_points", compact=True))
    assert shown.pop() == (GeneralPoints(compact=True), 0, "game.png")
    terminal.main(terminal.Args("virl"))
    assert shown.pop() == (VIRL(), 0, "game.png")
    typed = iter([' {"action": "stop()"} ', "stop()"])
    monkeypatch.setattr("builtins.input", lambda asked: next(typed))
    assert terminal.human("action") == terminal.human("action") == '{"action": "stop()"}'


def test_a_picture_where_there_is_nothing_to_see(monkeypatch):
    """Of the start."""
    shown = []
    picture = types.SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(VIRL, "render", lambda _, state, width: shown.append(state) or picture)
    save_picture(VIRL(routes=(Route(0, (0, 90), ((), ()), (50, 50)),)), 0, "game.png")
    assert shown[0].place == 0


@pytest.mark.parametrize(
    "ends,status,said",
    [(EOFError, None, ""), (KeyboardInterrupt, 130, ""), (OSError("full"), 2, "games: full\n")],
)
def test_how_the_terminal_is_left(ends, status, said, tmp_path, monkeypatch, capsys):
    """By the end of the input without an error, by Ctrl-C as programs do."""

    def ask(_):
        raise ends

    monkeypatch.setattr("builtins.input", ask)
    picture = str(tmp_path / "p.png")
    argv = ["games", "virl", "--player", "human", "--picture", picture]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delitem(sys.modules, "games.__main__")
    with contextlib.ExitStack() as stack:
        if status is not None:
            caught = stack.enter_context(pytest.raises(SystemExit))
        runpy.run_module("games", run_name="__main__")
    assert status is None or caught.value.code == status
    assert capsys.readouterr().err == said


def test_games_in_the_terminal(tmp_path, capsys, monkeypatch):
    """python -m games: the expert's episode, a human's, and what is shown on the way."""
    file = tmp_path / "routes.json"
    file.write_text(json.dumps([[RECORD], 1]))
    picture = tmp_path / "p.png"
    args = terminal.Args("virl", routes=str(file), picture=str(picture), compact=True, seed=1)
    terminal.main(args)
    said = capsys.readouterr().out
    assert said.startswith(f"(picture: {picture})\n\n1. First, turn ")
    assert said.endswith("reward +1: You have arrived.\nwon\n")
    assert said.count("\nexpert: {") == said.count("reward +1: ")
    assert said.count("You see: ") == said.count("reward +1: Right.")
    assert "\nYou see: Deli on your right; you are at an intersection\n" in said
    assert Image.open(picture).size == (768, 768)

    answers = iter(["1+1", '{"formula": "2"}', *["0"] * 3])
    monkeypatch.setattr("builtins.input", lambda asked: next(answers))
    args = terminal.Args("general_points", player="human", picture=str(picture), seed=3)
    terminal.main(args)
    said = capsys.readouterr().out
    assert said.count("reward -") == 5
    assert "lost; the expert's answer: {" in said
    assert Image.open(picture).size == (768, 384)
    monkeypatch.setattr("builtins.input", lambda asked: "  forward() ")
    assert terminal.human("action") == '{"action": "forward()"}'
