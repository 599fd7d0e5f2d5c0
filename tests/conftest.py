"""Settings and fixtures of all tests."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tests.cli import command_line, train
from tests.pair import Pair

__all__ = ["command_line", "train"]

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("tests", deadline=None)  # a busy machine is no fault
settings.load_profile("tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _as_if_alone() -> Iterator[None]:
    """Each test begins without the seeds that Lightning leaves in the environment, and leaves what it has found."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)
    folder, environment = Path.cwd(), dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    assert Path.cwd() == folder
    if multiprocessing.active_children():
        gc.collect()  # persistent workers end with their loader
    assert multiprocessing.active_children() == []


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two processes of one gloo group that stay alive for the session."""
    with Pair() as workers:
        yield workers
