"""Fixtures for all tests."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from run import Run
from tests.helpers import save_small_model


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A folder with a random Llama of 60k parameters and the embedded tokenizer."""
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture
def process_group():
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if dist.is_initialized():  # a script's cli() ends it too
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Path:
    """A file with three tasks of 40 short problems."""
    rows = []
    for task, word in (("sum", "plus"), ("more", "and"), ("with", "with")):
        for i in range(40):
            a, b = divmod(i, 5)
            row = {"task": task, "problem": f"What is {a} {word} {b}?", "answer": str(a + b)}
            rows.append(row | {"solution": f"It is \\boxed{{{a + b}}}."})
    file = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture
def counted(monkeypatch) -> list[tuple[float, float]]:
    """(tokens, FLOPs a token) of each step that a run logs, as they come."""
    counts, log = [], Run.log

    def noted(self, step, metrics, tokens, flops_per_token):
        counts.append((tokens, flops_per_token))
        log(self, step, metrics, tokens, flops_per_token)

    monkeypatch.setattr(Run, "log", noted)
    return counts
