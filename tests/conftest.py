"""Fixtures for all tests."""

import pytest
import torch.distributed as dist

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
