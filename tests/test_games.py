"""games/: exact rules, rewards, experts, pictures, route files, hostile answers."""

import itertools
import json
import math
import random
import re
import time
import types
from fractions import Fraction

import pytest

import games
from data import DataError, Example, embedded_examples
from games import games_of
from games.__main__ import save_picture
from games.general_points import GeneralPoints, Hand, evaluate, solutions, solvable
from games.problems import MathProblems, load_problems
from games.rules import fields_of
from games.virl import VIRL, Route, bearing, compass, load_routes, observation, turn, wrap
from model import load_config
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
