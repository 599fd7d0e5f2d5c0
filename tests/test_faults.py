"""Runs that are killed, and go on: the same end. All of it is short here; ``python benchmarks/faults.py`` is the long form."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest

from tests.faults import FAULTS, KINDS, SEAMS, broken_at, chain, plan, reference


@functools.cache
def ended_of(kind: str) -> list[Any]:
    return reference(KINDS[kind])


@pytest.mark.parametrize("kind", ["one process", "ddp", "fsdp2"])
def test_a_run_that_is_killed_three_times_ends_as_if_it_had_not_been(kind: str) -> None:
    assert len(chain(KINDS[kind], plan(random.Random(kind), 3), ended_of(kind), seed=50)) == 3


QUICK = {"one process": SEAMS, "ddp": ("after build", "in exchange"), "fsdp2": ("in exchange",), "zero-2": ()}
ALL = [(kind, seam, fault) for kind in KINDS for seam in SEAMS for fault in FAULTS]


@pytest.mark.parametrize(
    ("kind", "seam", "fault"), [case if case[1] in QUICK[case[0]] else pytest.param(*case, marks=pytest.mark.slow) for case in ALL]
)
def test_a_switch_that_breaks_is_never_half(kind: str, seam: str, fault: str) -> None:
    broken_at(KINDS[kind], seam, fault, ended_of(kind))
