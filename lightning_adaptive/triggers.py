"""When the next phase starts: what is observed, and what has to be seen before a switch.

A trigger is a value without a memory of its own. What it has seen is a dictionary of plain values that travels in the checkpoint:
each observation makes a new one of it, and whether it has fired stands there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lightning_adaptive.durations import Clock, Duration, DurationLike
from lightning_adaptive.errors import ConfigError, ConfigTypeError, did_you_mean

Memory = Mapping[str, Any]
"""What a trigger has seen, in plain values; empty at the beginning of its phase. ``fired`` holds the reason once it has."""


@dataclass(frozen=True)
class Seen:
    """One observation, the same on every rank.

    Args:
        step: optimizer steps that were made.
        clock: the training's clock.
        metrics: what the module has logged, after a validation; ``None`` at other times.
        asked: whether a person has asked for the switch.
    """

    step: int
    clock: Clock
    metrics: Mapping[str, float] | None = None
    asked: bool = False


@dataclass(frozen=True, kw_only=True)
class Trigger(ABC):
    """What decides that the next phase starts.

    Args:
        not_before: moment from the start of training before which nothing is observed; ``None`` for the phase's first step.

    Raises:
        ConfigError: for a value that is not allowed.
    """

    not_before: DurationLike | None = None

    def __post_init__(self) -> None:
        if self.not_before is not None:
            object.__setattr__(self, "not_before", Duration.parse(self.not_before, "not_before"))

    def observe(self, memory: Memory, seen: Seen) -> dict[str, Any]:
        """What is remembered after an observation; a trigger that has fired stays so.

        Args:
            memory: what was remembered before it.
            seen: the observation.

        Raises:
            ConfigError: for a metric that is not logged, with those that are.
        """
        if seen.step < self.first_step(seen.clock):
            return dict(memory)
        after = self._observe(memory, seen)
        return {**after, "fired": memory["fired"]} if "fired" in memory else after

    def first_step(self, clock: Clock) -> int:
        """Steps that are made before anything is observed.

        Raises:
            ConfigError: when `not_before` cannot be counted.
        """
        return 0 if self.not_before is None else self._not_before.steps(clock, clock.total_steps, "not_before")

    @property
    def _not_before(self) -> Duration:
        assert isinstance(self.not_before, Duration)
        return self.not_before

    def monitors(self) -> tuple[str, ...]:
        """Names of the metrics that it looks at, after each validation."""
        return ()

    def manual(self) -> tuple[Manual, ...]:
        """What lets a person ask for the switch."""
        return ()

    @abstractmethod
    def _observe(self, memory: Memory, seen: Seen) -> dict[str, Any]: ...

    def shows(self, memory: Memory) -> dict[str, float]:
        """What it sees now, in numbers to log."""
        return {}

    def reasons(self, memory: Memory) -> dict[str, str]:
        """Why it has fired, and which of its members have, by name; its own is empty."""
        return {"": memory["fired"]} if "fired" in memory else {}

    def passed_over(self, memory: Memory) -> int:
        """Number of values that were not finite."""
        return int(memory.get("passed_over", 0))

    def __str__(self) -> str:
        given = (
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)
            if getattr(self, option.name) is not None and getattr(self, option.name) != option.default
        )
        return f"{type(self).__name__}({', '.join(given)})"


@dataclass(frozen=True, kw_only=True)
class OnMetric(Trigger):
    """Looks at a metric after each validation, the sanity check left out. A value that is not finite is passed over.

    Args:
        monitor: name of a metric that the module logs, ``val/loss``.
        smoothing: share of the past in the value that is looked at, 0 to below 1: an exponential moving average, corrected for its
            beginning at zero. 0 looks at the metric itself.
    """

    monitor: str
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ConfigTypeError(f"{self.monitor!r} is no name of a metric. Write one that is logged, val/loss.", "monitor")
        _check_number("smoothing", self.smoothing)
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"{self.smoothing!r} lies outside 0 to below 1. It is a share of the past.", "smoothing")

    def monitors(self) -> tuple[str, ...]:
        return (self.monitor,)

    def _observe(self, memory: Memory, seen: Seen) -> dict[str, Any]:
        # A resumed run may repeat the validation that it was saved after.
        if seen.metrics is None or memory.get("step") == seen.step or "fired" in memory:
            return dict(memory)
        if self.monitor not in seen.metrics:
            nearest, logged = did_you_mean(self.monitor, seen.metrics), ", ".join(seen.metrics) or "nothing"
            raise ConfigError(f"{self.monitor!r} was not logged.{nearest} Logged: {logged}.", "monitor")
        value = float(seen.metrics[self.monitor])
        memory = {**memory, "step": seen.step}
        if not math.isfinite(value):
            return {**memory, "passed_over": memory.get("passed_over", 0) + 1}
        count = memory.get("count", 0) + 1
        average = self.smoothing * memory.get("average", 0.0) + (1 - self.smoothing) * value
        looked_at = average / (1 - self.smoothing**count)
        return self._look({**memory, "count": count, "average": average, "value": looked_at}, looked_at)

    @abstractmethod
    def _look(self, memory: dict[str, Any], value: float) -> dict[str, Any]: ...

    def shows(self, memory: Memory) -> dict[str, float]:
        return {self.monitor: memory["value"]} if "value" in memory else {}


@dataclass(frozen=True, kw_only=True)
class OnPlateau(OnMetric):
    """Fires when a metric has stood still: ``patience`` validations without an improvement were borne, and one more came.

    Args:
        mode: ``min`` when less is better, ``max`` when more is.
        patience: number of validations without an improvement that are borne.
        min_delta: least change that counts as an improvement, from 0 on.
        cooldown: number of the first validations that are not counted.

    >>> from lightning_adaptive import Clock
    >>> trigger, memory = OnPlateau(monitor="val/loss", patience=1), {}
    >>> for loss in (1.0, 0.5, 0.6, 0.55):
    ...     memory = trigger.observe(memory, Seen(memory.get("step", 0) + 10, Clock(10, 100), {"val/loss": loss}))
    >>> memory["fired"]
    'val/loss has not been below 0.5 for 2 validations'
    """

    mode: Literal["min", "max"] = "min"
    patience: int = 3
    min_delta: float = 0.0
    cooldown: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("min", "max"):
            raise ConfigError(f"{self.mode!r} is not one of min, max.{did_you_mean(str(self.mode), ('min', 'max'))}", "mode")
        for option in ("patience", "cooldown"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigTypeError(f"{value!r} is not a whole number. It is a number of validations.", option)
            if value < 0:
                raise ConfigError(f"{value!r} is below 0. It is a number of validations.", option)
        _check_number("min_delta", self.min_delta)
        if not 0 <= self.min_delta < math.inf:
            raise ConfigError(f"{self.min_delta!r} is no change of a metric. Write a number from 0 on.", "min_delta")

    def _look(self, memory: dict[str, Any], value: float) -> dict[str, Any]:
        if memory["count"] <= self.cooldown:
            return memory
        sign = 1 if self.mode == "min" else -1
        best = memory.get("best")
        if best is None or sign * value < sign * best - self.min_delta:
            return {**memory, "best": value, "waited": 0}
        waited = memory["waited"] + 1
        after = {**memory, "waited": waited}
        if waited <= self.patience:
            return after
        words = "below" if self.mode == "min" else "above"
        return {**after, "fired": f"{self.monitor} has not been {words} {best:.4g} for {waited} validations"}

    def shows(self, memory: Memory) -> dict[str, float]:
        return {**super().shows(memory), **{name: memory[name] for name in ("best", "waited") if name in memory}}


@dataclass(frozen=True, kw_only=True)
class OnThreshold(OnMetric):
    """Fires when a metric is above or below a value.

    Args:
        above: fires when the metric is greater; ``None`` for no such value.
        below: fires when the metric is less. One of the two is given.
    """

    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.above is None) == (self.below is None):
            raise ConfigError("a threshold is either above or below a value. Give one of the two.", "above")
        option, value = ("above", self.above) if self.below is None else ("below", self.below)
        _check_number(option, value)
        if not math.isfinite(float(value)):  # type: ignore[arg-type] # one of them is a number
            raise ConfigError(f"{value!r} is never passed. Write a finite number.", option)

    def _look(self, memory: dict[str, Any], value: float) -> dict[str, Any]:
        if self.above is not None and value > self.above:
            return {**memory, "fired": f"{self.monitor} is {value:.4g}, above {self.above:g}"}
        if self.below is not None and value < self.below:
            return {**memory, "fired": f"{self.monitor} is {value:.4g}, below {self.below:g}"}
        return memory


@dataclass(frozen=True, kw_only=True)
class Manual(Trigger):
    """Fires when a person asks for it: by a file in the run's folder, or by ``callback.switch_now()``.

    Args:
        file: name of the file, in the Trainer's ``default_root_dir``. It is taken away when it was seen.
        every_n_steps: steps from one look to the next.
    """

    file: str = "SWITCH"
    every_n_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.file, str) or not self.file or "/" in self.file or self.file.startswith("."):
            raise ConfigError(f"{self.file!r} is no name of a file in the run's folder.", "file")
        if isinstance(self.every_n_steps, bool) or not isinstance(self.every_n_steps, int) or self.every_n_steps < 1:
            raise ConfigError(f"{self.every_n_steps!r} is no number of steps. Write a whole number from 1 on.", "every_n_steps")

    def manual(self) -> tuple[Manual, ...]:
        return (self,)

    def _observe(self, memory: Memory, seen: Seen) -> dict[str, Any]:
        return {**memory, "fired": "it was asked for"} if seen.asked else dict(memory)


@dataclass(frozen=True, kw_only=True)
class Combined(Trigger):
    """Several triggers by name. Each keeps what it has seen, and stays fired once it has.

    Args:
        of: triggers by name; ``None`` leaves one out.
    """

    of: Mapping[str, Trigger | None] = field(hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.of, Mapping):
            raise ConfigTypeError(f"{self.of!r} is no mapping of triggers by name.", "of")
        for name, trigger in self.of.items():
            if trigger is not None and not isinstance(trigger, Trigger):
                raise ConfigTypeError(f"{trigger!r} is no trigger.", f"of.{name}")
        members = {str(name): trigger for name, trigger in self.of.items() if trigger is not None}
        if not members:
            raise ConfigError("is empty. Write at least one trigger, by name.", "of")
        object.__setattr__(self, "of", members)

    def members(self) -> Iterator[tuple[str, Trigger]]:
        """Its triggers by name."""
        for name, trigger in self.of.items():
            assert trigger is not None
            yield name, trigger

    def monitors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, trigger in self.members() for name in trigger.monitors()))

    def manual(self) -> tuple[Manual, ...]:
        return tuple(found for _, trigger in self.members() for found in trigger.manual())

    def _observe(self, memory: Memory, seen: Seen) -> dict[str, Any]:
        of: dict[str, Any] = {}
        for name, trigger in self.members():
            try:
                of[name] = trigger.observe(memory.get("of", {}).get(name, {}), seen)
            except ConfigError as error:
                raise error.within(f"of.{name}") from None
        fired = {name: state["fired"] for name, state in of.items() if "fired" in state}
        after = {**memory, "of": of}
        return {**after, "fired": self._joined(fired)} if self._is_enough(fired) else after

    @abstractmethod
    def _is_enough(self, fired: Mapping[str, str]) -> bool: ...

    @staticmethod
    def _joined(fired: Mapping[str, str]) -> str:
        return " and ".join(f"{name}: {reason}" for name, reason in fired.items())

    def shows(self, memory: Memory) -> dict[str, float]:
        of = memory.get("of", {})
        return {
            f"{name}/{key}": value for name, trigger in self.members() for key, value in trigger.shows(of.get(name, {})).items()
        }

    def passed_over(self, memory: Memory) -> int:
        of = memory.get("of", {})
        return sum(trigger.passed_over(of.get(name, {})) for name, trigger in self.members())

    def reasons(self, memory: Memory) -> dict[str, str]:
        of = memory.get("of", {})
        inner = {
            f"{name}.{key}".rstrip("."): reason
            for name, trigger in self.members()
            for key, reason in trigger.reasons(of.get(name, {})).items()
        }
        return {**super().reasons(memory), **inner}

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}: {trigger}' for name, trigger in self.members())})"


class AnyOf(Combined):
    """Fires when one of its triggers has."""

    def _is_enough(self, fired: Mapping[str, str]) -> bool:
        return bool(fired)


class AllOf(Combined):
    """Fires when each of its triggers has, at any time since the phase began."""

    def _is_enough(self, fired: Mapping[str, str]) -> bool:
        return len(fired) == len(self.of)


def _check_number(option: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigTypeError(f"{value!r} is not a number.", option)
