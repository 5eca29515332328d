"""A sample of tests/sweep_flags.py: numeric flags with values that nobody should give."""

import random

from tests.sweep_flags import SCRIPTS, cases, numeric_flags, sweep


def test_every_number_has_an_interval():
    for name, (script, _) in SCRIPTS.items():
        checked = {flag for flags in script.NUMBERS.values() for flag in flags}
        assert set(numeric_flags(script)) <= checked, name


def test_sample_of_the_sweep():
    assert sweep(random.Random(0).sample(cases(), 30)) == []
