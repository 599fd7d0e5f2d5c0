"""Schedules: time as a pure function of the step.

A schedule multiplies each group's base value. It spans from its phase's first step to the end of training, so that the
phase before a switch follows the same curve as a run without one; a switch cuts it, and ``length`` gives it another span.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

from lightning_adaptive.durations import Clock, Duration, DurationLike
from lightning_adaptive.errors import ConfigError, ConfigTypeError

Factor = Callable[[int], float]
"""Phase step (0-based) to multiplier."""


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """Base of all schedules; subclasses give the `shape` that follows the warm-up.

    Called with a clock it returns ``factor(step)``, a pure function of the phase's 0-based step. During a warm-up of
    ``W`` steps the factor is ``(step + 1) / W``, so no update is wasted on a learning rate of zero; afterwards it is
    ``shape(step - W)``. Beyond the schedule's span the last value holds.

    Args:
        warmup: length of the linear warm-up, ``0st`` for none. A percentage is of the schedule's span.
        length: the span; ``None`` means to the end of training. A percentage is of the steps that remain.

    Raises:
        ConfigError: when called, if the warm-up is longer than the span or a duration cannot be counted.
    """

    warmup: DurationLike = "0st"
    length: DurationLike | None = None

    def __post_init__(self) -> None:
        self._parse("warmup")
        if self.length is not None and not self._parse("length"):
            raise ConfigError(f"{str(self.length)!r} is no length. Write a duration above zero, or null.", "length")

    def __call__(self, clock: Clock) -> Factor:
        span = clock.remaining_steps
        if isinstance(self.length, Duration):
            span = self.length.steps(clock, span, key="length")
        assert isinstance(self.warmup, Duration)
        warmup = self.warmup.steps(clock, span, key="warmup")
        if span is not None and warmup > span:
            raise ConfigError(f"{self.warmup} is {warmup} steps, but the schedule spans only {span}.", "warmup")
        shape = self.shape(clock, None if span is None else span - warmup)
        if not warmup:
            return shape
        return lambda step: (step + 1) / warmup if step < warmup else shape(step - warmup)

    @abstractmethod
    def shape(self, clock: Clock, steps: int | None) -> Factor:
        """The curve after the warm-up.

        Args:
            clock: the phase's clock, for durations of the schedule's own.
            steps: length of the curve in steps, or ``None`` when the end of training is unknown.
        """

    def __str__(self) -> str:
        options = [
            f"{field.name} {value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) not in (None, field.default) and str(value) != str(field.default)
        ]
        words = re.sub(r"(?<!^)(?=[A-Z])", " ", type(self).__name__).lower()
        return ", ".join([words, *options])

    def _parse(self, field: str) -> Duration:
        duration = Duration.parse(getattr(self, field), key=field)
        object.__setattr__(self, field, duration)
        return duration

    def _known(self, steps: int | None) -> int:
        if steps is None:
            raise ConfigError(
                f"{type(self).__name__} must know where it ends, and this training has no known end. "
                "Set trainer.max_steps, or the schedule's length in steps (st)."
            )
        return steps


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The base value itself, after an optional warm-up."""

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        return lambda _: 1.0


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    r"""Half a cosine from 1 to ``floor``.

    ``factor(t) = floor + (1 - floor) * (1 + cos(pi * t / T)) / 2`` with ``t`` steps after the warm-up and ``T`` the span
    without it (Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5, one cycle). Equal to torch's ``CosineAnnealingLR`` with
    ``T_max = T`` and ``eta_min = floor * lr``.

    Args:
        floor: the last factor, from 0 to 1; a share of the base value, not a learning rate.

    >>> factor = Cosine(warmup="2st")(Clock(steps_per_epoch=5, total_steps=10))
    >>> [round(factor(step), 3) for step in range(10)]
    [0.5, 1.0, 1.0, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]
    """

    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not _is_number(self.floor):
            raise ConfigTypeError(f"{self.floor!r} is not a number. Write a share of the base value from 0 to 1.", "floor")
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"{self.floor!r} lies outside 0 to 1. It is a share of the base value.", "floor")

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        end, floor = self._known(steps), self.floor

        def factor(step: int) -> float:
            return floor + (1 - floor) * (1 + math.cos(math.pi * step / end)) / 2 if step < end else floor

        return factor


@dataclass(frozen=True, kw_only=True)
class StepDecay(Schedule):
    """Multiplies by ``gamma`` every ``every``: ``factor(t) = gamma ** (t // every)``, as torch's ``StepLR``.

    Args:
        every: the distance between two decays. A percentage is of the span without the warm-up.
        gamma: the multiplier of each decay, above 0 and at most 1.
    """

    every: DurationLike = "30ep"
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._parse("every"):
            raise ConfigError("a decay every 0 steps has no meaning. Write a duration above zero.", "every")
        if not _is_number(self.gamma):
            raise ConfigTypeError(f"{self.gamma!r} is not a number.", "gamma")
        if not 0 < self.gamma <= 1:
            raise ConfigError(f"{self.gamma!r} lies outside 0 to 1. It multiplies the value at each decay.", "gamma")

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        assert isinstance(self.every, Duration)
        gamma = self.gamma
        every = self.every.steps(clock, steps, key="every")
        if every == 0:
            raise ConfigError(f"{self.every} rounds to 0 steps of this training.", "every")
        last = math.inf if steps is None else steps

        def factor(step: int) -> float:
            return float(gamma ** (min(step, last) // every))

        return factor


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
