"""bench.py and bench_gpu.py: that what they time still runs, at a size that takes seconds."""

import functools

import pytest
import torch

import bench
import bench_gpu
from model import World
from tests.helpers import one_rank_mesh


def test_gpu_cases_run(process_group):
    """A dry pass on the CPU of all but --compile; decoding and rollouts with fewer tokens."""
    world = World(torch.device("cpu"), mesh=one_rank_mesh())
    args = bench_gpu.Args(device="cpu", sizes=("debug",), length=32, repeats=1)
    names = []
    for case in bench_gpu.cases(args):
        if "--compile" in case.name:
            continue
        if case.name.startswith(("decode", "GRPO")):
            case = case._replace(prepare=functools.partial(case.prepare, new=4))
        row = bench_gpu.measure(case, args, world)
        names.append(case.name)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        flops = case.flops_per_parameter * row["parameters"] * row["tokens"]
        assert row["mfu"] == pytest.approx(flops / row["seconds"] / 989e12)
        if not case.name.startswith("decode"):
            assert row["estimate_gb"] > 0
        assert case.name in bench_gpu.table_row(row)
    assert len(names) == 13
    assert len(set(names)) == 13


def test_pairs_have_their_functions():
    """A side of a pair is a function of bench.py, with numbers after colons."""
    for pairs in bench.PAIRS.values():
        for pair in pairs:
            for side in (pair.ours, pair.peer):
                assert callable(getattr(bench, side.split(":")[0]))


@pytest.mark.parametrize("side", ["fomaml_ours:1:1:2:32", "lora_ours:1:32", "grpo_ours"])
def test_our_sides_take_a_step(side, monkeypatch):
    monkeypatch.setattr(bench, "NEW_TOKENS", 4)
    name, *numbers = side.split(":")
    try:
        getattr(bench, name)("tiny", "cpu", *map(int, numbers))()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
