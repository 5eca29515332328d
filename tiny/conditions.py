"""Conditions of the study of imitation and exploration: problems whose demonstrations differ.

    python -m tiny.conditions DIR --seed 0      # DIR/A1, DIR/A0.3, ...: train.jsonl and test.jsonl

Each is a folder for `amft.py --data`. Problems of training and test are disjoint, and the embedded
models have seen neither.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from tiny.problems import embedded_rows

# Of the families that the embedded models have not seen, those whose worked solutions they learn in
# a few hundred rows; of the others they learn next to nothing
UNKNOWN = {
    "Prealgebra/missing_addend",
    "Prealgebra/difference_of_products",
    "Prealgebra/average_of_three",
    "Intermediate Algebra/arithmetic_term",
    "Number Theory/digit_sum",
    "Number Theory/units_digit",
    "Counting & Probability/two_menus",
    "Geometry/missing_side",
}
NAMES = ("A1", "A0.7", "A0.3", "B1", "B0.5", "C", "D")


@dataclass
class Args:
    """Write the conditions of the study, a folder each."""

    folder: tyro.conf.Positional[Path]
    """Where they go."""
    seed: int = 0
    """Of the problems and of which demonstrations are wrong."""
    names: tuple[str, ...] = NAMES
    """A<q>: families that the model knows, a share q of the demonstrations worked and right, the
    rest a wrong answer alone. B<q>: the same with eight families that it does not know. C: half
    A0.3, half B1. D: as A1, with demonstrations (sft.jsonl, for --sft-data) of levels 1 and 2."""
    per_family: int = 60
    """Training problems of a family."""
    test_per_family: int = 8
    """Test problems of a family; three times as many of one that the models do not know."""


def with_wrong_answers(families: dict[str, list[dict]], q: float, rng: random.Random) -> list[dict]:
    """All rows; of a share 1 - q the response is a box with another row's answer, nothing else."""
    rows = []
    for of_family in families.values():
        answers = [row["answer"] for row in of_family]
        for row in of_family:
            wrong = [a for a in answers if a != row["answer"]]
            if rng.random() >= q and wrong:
                row = row | {"solution": rf"\boxed{{{rng.choice(wrong)}}}"}
            rows.append(row)
    return rows


def families_of(known: bool, per_family: int, seed: int, part: str) -> dict[str, list[dict]]:
    """As embedded_rows, of the families that the embedded models know, or of UNKNOWN."""
    if known:
        return embedded_rows(per_family, seed, part, "pretraining")
    rows = embedded_rows(per_family, seed, part, "training", "heldout")
    return {name: rows[name] for name in rows if name in UNKNOWN}


def condition(name: str, args: Args) -> dict[str, list[dict]]:
    """{"train", "test" and for D "sft": rows} with problem, solution, answer, subject and level."""
    if name == "C":
        halves = [condition("A0.3", args), condition("B1", args)]
        size = {part: min(len(half[part]) for half in halves) for part in ("train", "test")}
        rng = random.Random(f"{args.seed}/C")
        return {
            part: [row for half in halves for row in rng.sample(half[part], count)]
            for part, count in size.items()
        }
    known, q = name[0] in "AD", float(name[1:] or 1)
    families = families_of(known, args.per_family, args.seed, "post")
    # fewer unknown families, so more problems of each
    per_family = args.test_per_family if known else 3 * args.test_per_family
    test = families_of(known, per_family, args.seed, "final")
    rng = random.Random(f"{args.seed}/{name}")
    parts = {
        "train": with_wrong_answers(families, q, rng),
        "test": with_wrong_answers(test, 1.0, rng),
    }
    if name == "D":
        parts["sft"] = [row for row in parts["train"] if row["level"] <= 2]
    return parts


def main(args: Args) -> int:
    for name in args.names:
        if name not in NAMES:
            print(f"tiny.conditions: no condition {name}: {', '.join(NAMES)}", file=sys.stderr)
            return 2
        parts = condition(name, args)
        for part, rows in parts.items():
            # the SFT's file lies apart: what is in the folder is trained on and tested
            folder = args.folder / (f"{name}-sft" if part == "sft" else name)
            folder.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / ("train.jsonl" if part == "sft" else f"{part}.jsonl")).write_text(lines)
        print(f"{name}: " + ", ".join(f"{len(rows)} {part}" for part, rows in parts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
