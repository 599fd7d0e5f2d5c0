"""A step of the learning rates: ours over torch's ``LambdaLR``, ``SequentialLR`` and transformers', with few groups and many."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from paired import Ratio, compare
from step_time import quiet_on_one_thread, warmup_cosine
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR

from lightning_adaptive import Clock, Cosine
from lightning_adaptive.lr_schedulers import ScheduleLR

TOTAL, WARMUP = 20_000, 2_000
GROUPS = {1: 10_000, 50: 2_000, 1000: 200}
"""Groups, and the steps that are timed."""


def by_hand(optimizer: Optimizer) -> Any:
    return LambdaLR(optimizer, warmup_cosine(WARMUP, TOTAL))


def in_sequence(optimizer: Optimizer) -> Any:
    parts = [LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP), CosineAnnealingLR(optimizer, TOTAL - WARMUP)]
    return SequentialLR(optimizer, parts, [WARMUP])


def of_transformers(optimizer: Optimizer) -> Any:
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, WARMUP, TOTAL)


def ours(optimizer: Optimizer) -> Any:
    return ScheduleLR(optimizer, Cosine(warmup=f"{WARMUP}st"), Clock(steps_per_epoch=100, total_steps=TOTAL))


REFERENCES: dict[str, tuple[Callable[[Optimizer], Any], float | None]] = {
    "LambdaLR": (by_hand, 1.5),
    "SequentialLR": (in_sequence, None),
    "transformers' cosine": (of_transformers, None),
}


def seconds(make: Callable[[Optimizer], Any], groups: int, steps: int) -> float:
    optimizer = SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(groups)], lr=0.1)
    scheduler = make(optimizer)
    optimizer.step()
    begin = time.perf_counter()
    for _ in range(steps):
        scheduler.step()
    return time.perf_counter() - begin


def measure(pairs: int) -> list[Ratio]:
    """The ratios of the times of as many steps as `GROUPS` says, from the first on."""
    quiet_on_one_thread()
    found = []
    for groups, steps in GROUPS.items():
        for name, (reference, goal) in REFERENCES.items():
            title = f"a step of the schedule with {groups} group{'s' * (groups > 1)}: ours over {name}"
            own, other = (partial(seconds, make, groups, steps) for make in (ours, reference))
            found.append(compare(title, own, other, pairs, goal))
    return found
