"""A sample of tests/sweep_flags.py: numbers and files that nobody should give."""

import random

from tests.sweep_flags import PROGRAMS, file_cases, number_cases, numeric_flags, sweep


def test_every_number_has_an_interval():
    for name in ("fomaml", "meta_lora", "amft", "eval", "data", "tiny"):
        module = PROGRAMS[name].module
        checked = {flag for flags in module.NUMBERS.values() for flag in flags}
        assert set(numeric_flags(module)) <= checked, name


def test_sample_of_the_sweep():
    numbers = [case for case in number_cases() if case.program not in ("bench", "tiny")]
    assert sweep(random.Random(0).sample(numbers, 30)) == []


def test_sample_of_broken_files():
    """Every one for the programs that only read; of the others, which load a model, some."""
    light = [case for case in file_cases() if case.program in ("data", "plots", "games")]
    heavy = [case for case in file_cases() if case not in light]
    assert sweep(light + random.Random(0).sample(heavy, 12)) == []
