"""Play one episode in the terminal: python -m games general_points --seed 3

A game has a state for a seed; the expert, you, or a model answers its prompts until it is over.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import tyro

from games.general_points import GeneralPoints
from games.virl import VIRL, load_routes, observation


@dataclass
class Args:
    """Play one episode in the terminal."""

    game: tyro.conf.Positional[Literal["general_points", "virl"]]
    """Which game."""
    seed: int = 0
    """Which episode."""
    player: str = "expert"
    """expert, human (reads your answer from the terminal: a formula, or an action), or a model:
    tiny, a folder, a hub name."""
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


def model_player(name: str) -> Callable[[list[dict]], str]:
    """A model's most likely answer to messages."""
    from data import prompt_texts, template
    from model import check_positions, load_config, load_weights
    from policy import sample

    config, tokenizer = load_config(name)
    model, stop = load_weights(name).eval(), template(tokenizer).stop

    def answer(messages: list[dict]) -> str:
        (text,) = prompt_texts(tokenizer, [messages])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        check_positions(config, len(ids) + 256, "the prompt's length with --compact")
        (response,) = sample(model, tokenizer, [ids], max_new_tokens=256, temperature=0, stop=stop)
        return tokenizer.decode(response.answer)

    return answer


def human(field: str) -> str:
    """An answer from the terminal: JSON, or its one field that is judged."""
    line = input("\nyour answer (a formula, an action, or JSON): ").strip()
    return line if line.startswith("{") else json.dumps({field: line})


def save_picture(game, seed: int, path: str) -> None:
    state = game.reset(seed)
    if isinstance(game, VIRL):  # the first place with something to see
        marked = (i for i, position in enumerate(state.positions) if position.landmarks)
        state.place = next(marked, 0)
    game.render(state, 768).save(path)


def main(args: Args) -> None:
    if args.game == "general_points":
        game = GeneralPoints(args.rule, args.suits, compact=args.compact)
        field = "formula"
    else:
        routes = tuple(load_routes(args.routes)) if args.routes else ()
        game = VIRL(args.actions, compact=args.compact, routes=routes)
        field = "action"
    model = None
    if args.player not in ("expert", "human"):
        model = model_player(args.player)
    save_picture(game, args.seed, args.picture)
    state = game.reset(args.seed)
    print(f"(picture: {args.picture})\n\n{game.prompt(state)[0]['content']}")
    place = 0
    while not state.done:
        if isinstance(game, VIRL) and state.place != place:
            place = state.place
            print(f"\nYou see: {observation(state.here)}")
        if args.player == "human":
            text = human(field)
        else:
            text = model(game.prompt(state)) if model else game.expert(state)
            print(f"\n{args.player}: {text}")
        result = game.step(state, text)
        print(f"reward {result.reward:+g}: {result.message}")
    print("won" if result.won else f"lost; the expert's answer: {game.expert(state)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except EOFError:  # the human has left
        print()
    except (ValueError, OSError) as e:
        print(f"games: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
