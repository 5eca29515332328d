"""Episodes with a reward: two games with exact rules, and mathematics as a game of one turn.

python -m games general_points --seed 3       # the expert plays; the picture is saved
python -m games virl --player human           # you play
python -m games general_points --player runs/amft/checkpoint
"""

from dataclasses import replace

from games.general_points import GeneralPoints
from games.virl import VIRL, load_routes


def games_of(
    name: str,
    *,
    rule: str = "10",
    suits: str = "black",
    actions: str = "absolute",
    vision: bool = False,
    compact: bool = False,
    routes: str | None = None,
    test_routes: str | None = None,
) -> tuple:
    """(training game, validation game, test games by name) of general_points or virl.

    Tests: other deals or routes of the same kind, the other rule, and with vision the other suits
    or other signs. compact: short prompts, routes and episodes, for models that run on a laptop.
    """
    if name == "general_points":
        game = GeneralPoints(rule, suits, vision, compact, attempts=2 if compact else 5)
        test = replace(game, split="test")
        other_rule = replace(test, rule="11_12_13" if rule == "10" else "10")
        other_look = replace(test, suits="red" if suits == "black" else "black")
    else:
        game = VIRL(actions, vision, routes=_read(routes))
        if compact:
            game = replace(game, compact=True, turns=(2, 3), forward_points=1)
        test = replace(game, split="test", routes=_read(test_routes or routes))
        other_rule = replace(test, actions="relative" if actions == "absolute" else "absolute")
        other_look = replace(test, style=1)
    tests = {"in distribution": test, "rule": other_rule}
    if vision:
        tests["visual"] = other_look
    return game, replace(game, split="validation"), tests


def _read(routes: str | None) -> tuple:
    return tuple(load_routes(routes)) if routes else ()
