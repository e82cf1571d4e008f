"""The fake device for these tests. They run in a process that was started with it: see run.py."""

import gc
from collections.abc import Iterator

import pytest
import torch
from cuda_host.fake_device import FakeDevice


@pytest.fixture(scope="session")
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture(scope="module", autouse=True)
def _whole_device() -> Iterator[None]:
    """Each module finds the device empty."""
    yield
    free_memory()


def free_memory() -> None:
    """Engines and their graphs refer to each other."""
    gc.collect()
    torch.cuda.empty_cache()
