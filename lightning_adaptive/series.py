"""What every driven option of every group will be, step by step, before training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_adaptive.lr_schedulers import ScheduleLR
from lightning_adaptive.partitions import group_names
from lightning_adaptive.phases import Phase

MOST_POINTS = 10_000
"""Points of a curve; of a longer phase about so many, evenly spread, and its last step."""

Values = list[dict[str, float]]
"""The driven options of each group."""


@dataclass(frozen=True)
class Series:
    """What one option of one group will be.

    Args:
        group: the group's name; ``pg1`` and so on where it has none, as `LearningRateMonitor` counts, and empty for a single one.
        option: ``lr``, or another that is driven; ``momentum`` stands for beta1 where there are betas.
        steps: 0-based global steps, the phase's first and last among them.
        values: the value with which each of these steps trains.
    """

    group: str
    option: str
    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class Epoch:
    """What Lightning counts while it steps schedulers.

    Args:
        steps: optimizer steps of an epoch; ``None`` when the loader has no length.
        batches: batches of an epoch.
        accumulated: batches of a step.
    """

    steps: int | None
    batches: float
    accumulated: int


def of_phase(phase: Phase, steps: range, epoch: Epoch) -> tuple[Series, ...]:
    """The curves of a phase.

    A `Schedule` is asked for the steps; a scheduler of torch is stepped as Lightning would step it, and put back afterwards.

    Args:
        phase: the phase, built for its first step.
        steps: its steps.
        epoch: the counts of the training.
    """
    first, shown = steps.start, [*steps[: -1 : max(1, len(steps) // MOST_POINTS)], steps[-1]]
    scheduler = phase.lr_scheduler
    if isinstance(scheduler, ScheduleLR) and len(_moving(phase)) == 1:
        points = [scheduler.values_at(step - first) for step in shown]
    else:
        wanted = set(shown)
        points = [values for step, values in enumerate(_stepped(phase, steps, epoch), first) if step in wanted]
    groups = phase.optimizer.param_groups
    return tuple(
        Series(name, option, shown, [values[index][option] for values in points])
        for index, name in enumerate(group_names(groups))
        for option in points[0][index]
        if option == "lr" or isinstance(scheduler, ScheduleLR) or len({values[index][option] for values in points}) > 1
    )


def corners(factor: Callable[[int], float], last: int) -> list[int]:
    """First step, the highest between, if it is higher than both, and the last.

    >>> corners(lambda step: 1 - abs(step - 3) / 10, 9)
    [0, 3, 9]
    """
    stride = max(1, last // 1000)
    about = max(range(0, last + 1, stride), key=factor)
    highest = max(range(max(about - stride, 0), min(about + stride, last) + 1), key=factor)
    between = [highest] if factor(highest) > max(factor(0), factor(last)) else []
    return sorted({0, *between, last})


def _stepped(phase: Phase, steps: range, epoch: Epoch) -> Iterator[Values]:
    moving = _moving(phase)
    before = [dict(group) for group in phase.optimizer.param_groups]
    states = [copy.deepcopy(around["scheduler"].state_dict()) for around in moving]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps
            for step in steps:
                yield [_options(group) for group in phase.optimizer.param_groups]
                for around in moving:
                    if _is_due(step, around.get("interval", "epoch"), around.get("frequency", 1), epoch):
                        around["scheduler"].step()
    finally:
        for group, kept in zip(phase.optimizer.param_groups, before, strict=True):
            group.update(kept)
        for around, state in zip(moving, states, strict=True):
            around["scheduler"].load_state_dict(state)


def _moving(phase: Phase) -> list[dict[str, Any]]:
    """The phase's schedulers that go on with time alone; a module of a user's may have several for one optimizer."""
    schedulers = [around for around in phase.lr_schedulers if around["scheduler"] is not None]
    return [around for around in schedulers if not isinstance(around["scheduler"], ReduceLROnPlateau)]


def _is_due(step: int, interval: str, frequency: int, epoch: Epoch) -> bool:
    """Whether Lightning steps a scheduler after a step; it counts batches from each epoch's first, and epochs."""
    index = step if epoch.steps is None else step % epoch.steps
    if interval == "step":
        return min((index + 1) * epoch.accumulated, epoch.batches) % frequency == 0
    return epoch.steps is not None and index + 1 == epoch.steps and (step // epoch.steps + 1) % frequency == 0


def _options(group: Mapping[str, Any]) -> dict[str, float]:
    options = {"lr": float(group["lr"])} if "lr" in group else {}
    if "momentum" in group or "betas" in group:
        options["momentum"] = float(group["momentum"] if "momentum" in group else group["betas"][0])
    return options
