"""What every game gives and takes.

A game is pure and seeded: state = game.reset(seed); game.prompt(state) -> chat messages;
game.step(state, text) -> Result, changing the state; game.expert(state) -> the demonstration for
the present position. Anything a model can write gets a reward and a message.
"""

import functools
import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sources import DataError

MAX_CHARS = 8000  # of an answer: the end is read


class Result(NamedTuple):
    reward: float
    done: bool  # the episode is over
    won: bool
    message: str  # to the player; empty where there is nothing to say
    noted: dict = {}  # what else is to be read beside the response, in samples.jsonl


def fields_of(text: str, names: tuple[str, ...]) -> dict:
    """The named fields of a model's JSON answer: the last object in the text if it parses, else a
    search for each field. Never raises."""
    text = text[-MAX_CHARS:]
    start, end = text.rfind("{"), text.rfind("}")
    answer = None
    if 0 <= start < end:
        try:
            answer = json.loads(text[start : end + 1])
        except (ValueError, RecursionError):
            answer = None
    if isinstance(answer, dict):
        return {name: answer[name] for name in names if name in answer}
    found = {}
    for name in names:
        value = rf'"{name}"\s*:\s*(?:"([^"]{{0,500}})"|\[([^\[\]]{{0,500}})\])'
        if match := re.search(value, text):
            if match[1] is not None:
                found[name] = match[1]
            else:
                found[name] = [item.strip().strip("\"'") for item in match[2].split(",")]
    return found


def chat(text: str, image, judged: list[tuple[str, str]]) -> list[dict]:
    """The task (with its picture, where there is one), then each answer as an assistant's turn and
    each verifier's message as a user's."""
    task = text
    if image is not None:
        task = [{"type": "image", "image": image}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": task}]
    for answer, message in judged:
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": message})
    return messages


@functools.lru_cache(maxsize=32)
def font(size: float):
    """Pillow's own scalable font, for the pictures: no file of ours."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def own_function(name: str, flag: str) -> Callable:
    """A user's function: "MODULE:FUNCTION", or "FILE.py:FUNCTION". Raises DataError."""
    where, _, function = name.rpartition(":")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(
                Path(where).stem, Path(where).expanduser()
            )
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # dataclasses look their module up
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(where)
        found = getattr(module, function)
    except Exception as e:  # of the user's file, while it is run
        raise DataError(f"{flag} {name}: {type(e).__name__}: {e}") from None
    if not callable(found):
        raise DataError(f"{flag} {name} is no function")
    return found
