"""When the next phase starts: what is observed, and what has to be seen before a switch.

A trigger is a value without a memory of its own. What it has seen is a dictionary of plain values that travels in the checkpoint:
each observation makes a new one of it, and whether it has fired stands there.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeVar

from lightning_adaptive.durations import Clock, Duration, DurationLike
from lightning_adaptive.errors import (
    ConfigError,
    ConfigTypeError,
    check_count,
    check_number,
    check_share,
    check_word,
    did_you_mean,
    within,
)


class Projection(NamedTuple):
    """What a group of the running optimizer has done in one step ``p`` with the gradient ``g``.

    Args:
        update: ``p.p``.
        along: ``-p.g``.
        beta2: Adam's.
        lr: its learning rate in that step, with which ``p`` grows.
    """

    update: float
    along: float
    beta2: float
    lr: float = 1.0


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
        projections: after a step, what it has done, by name of the group; ``None`` at other times.
        noise: after a step, what `GradientNoiseMonitor` has measured, by its names, if anything; ``None`` at other times.
    """

    step: int
    clock: Clock
    metrics: Mapping[str, float] | None = None
    asked: bool = False
    projections: Mapping[str, Projection] | None = None
    noise: Mapping[str, float] | None = None


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
        if self.not_before is None:
            return 0
        assert isinstance(self.not_before, Duration)
        return self.not_before.steps(clock, clock.total_steps, "not_before")

    def walk(self, memory: Memory) -> Iterator[Node]:
        """Itself and then, of several, each of its members, with what it remembers of what the whole does."""
        yield Node((), self, memory)

    def of_kind(self, kind: type[T]) -> list[T]:
        """What is of a kind of trigger, of itself and its members."""
        return [node.trigger for node in self.walk({}) if isinstance(node.trigger, kind)]

    def monitors(self) -> list[str]:
        """Names of the metrics that are looked at, after each validation."""
        return [trigger.monitor for trigger in self.of_kind(OnMetric)]  # type: ignore[type-abstract] # it is only asked for

    def estimate(self, memory: Memory) -> dict[str, float]:
        """Learning rates for SGD, of the first that has found some, by name of the running group; by none for the whole model."""
        found = (node.trigger._estimate(node.memory) for node in self.walk(memory))
        return next((estimate for estimate in found if estimate), {})

    def shows(self, memory: Memory) -> dict[str, float]:
        """What it sees now, in numbers to log, by the names that lead there: ``both/low/val/loss``."""
        return {
            "/".join((*node.names, key)): value
            for node in self.walk(memory)
            for key, value in node.trigger._shows(node.memory).items()
        }

    def reasons(self, memory: Memory) -> dict[str, str]:
        """Why it has fired, and which of its members have, by name, ``both.low``; its own is empty."""
        return {".".join(node.names): node.memory["fired"] for node in self.walk(memory) if "fired" in node.memory}

    def passed_over(self, memory: Memory) -> int:
        """Number of values that were not finite."""
        return sum(int(node.memory.get("passed_over", 0)) for node in self.walk(memory))

    @abstractmethod
    def _observe(self, memory: Memory, seen: Seen) -> dict[str, Any]: ...

    def _estimate(self, memory: Memory) -> dict[str, float]:
        return {}

    def _shows(self, memory: Memory) -> dict[str, float]:
        return {}

    def __str__(self) -> str:
        given = (
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)
            if getattr(self, option.name) is not None and getattr(self, option.name) != option.default
        )
        return f"{type(self).__name__}({', '.join(given)})"


T = TypeVar("T", bound=Trigger)


class Node(NamedTuple):
    """A trigger where it stands: the names that lead to it, and what it remembers."""

    names: tuple[str, ...]
    trigger: Trigger
    memory: Memory


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
        check_share(self.smoothing, "smoothing", "It is a share of the past.", below_one=True)

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

    def _shows(self, memory: Memory) -> dict[str, float]:
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
        check_word(self.mode, "mode", ("min", "max"))
        for option in ("patience", "cooldown"):
            check_count(getattr(self, option), option, "validations", least=0)
        check_number(self.min_delta, "min_delta")
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

    def _shows(self, memory: Memory) -> dict[str, float]:
        return {**super()._shows(memory), **{name: memory[name] for name in ("best", "waited") if name in memory}}


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
        _check_threshold(self.above, self.below)

    def _look(self, memory: dict[str, Any], value: float) -> dict[str, Any]:
        passed, limit = _passed(value, self.above, self.below)
        return {**memory, "fired": f"{self.monitor} is {value:.4g}, {limit}"} if passed else memory


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
        check_count(self.every_n_steps, "every_n_steps", "steps")

    def _observe(self, memory: Memory, seen: Seen) -> dict[str, Any]:
        return {**memory, "fired": "it was asked for"} if seen.asked else dict(memory)


@dataclass(frozen=True, kw_only=True)
class Swats(Trigger):
    """Fires when the learning rate that fits SGD has settled, as seen in Adam's own steps (Keskar & Socher 2017, arXiv 1712.07628).

    With Adam's step ``p`` and the gradient ``g``, ``gamma = p.p / -p.g`` is the learning rate at which SGD's step, projected onto
    ``p``, is ``p``. One step says little of it: where noise prevails, ``p.g`` is small and of any sign.

    ``paper`` is algorithm 1 as published. In the ``k``-th look, ``lambda <- beta2 lambda + (1 - beta2) gamma`` unless ``p.g`` is 0;
    it fires when ``k > 1`` and ``|lambda / (1 - beta2^k) - gamma| < eps``, with the first of the two as the learning rate. (One
    that is not above 0 is passed over, on which the paper is silent.) It waits for two numbers to coincide, of which one
    fluctuates, so its step differs widely from run to run; and ``eps=1e-9``, the paper's, is below the rounding of float32.

    ``relative`` averages before it divides, and leaves Adam's schedule out: ``G = mean(p.p / lr^2) / mean(-p.g / lr)``, over the
    last ``window`` looks and over ten times as many, both exponential averages with decay ``1 - 1 / window``. It fires when the two
    have differed by at most ``rtol`` of the longer one for ``patience`` looks in a row, with the longer one, times Adam's current
    ``lr``, as the learning rate.

    Args:
        criterion: ``relative`` or ``paper``.
        rtol: of ``relative``, the tolerated difference as a share, above 0.
        window: of ``relative``, number of looks that the shorter average spans, at least 2. Nothing fires before twice as many.
        patience: of ``relative``, number of looks in a row for which the averages must agree, at least 1. In the beginning both
            are over nearly the same looks, and only patience sees a slow drift.
        eps: of ``paper``, the tolerated difference, above 0.
        per: ``model`` for one learning rate, found from the sums over all groups; ``group`` for one of each, where it fires when
            the last of them has settled, each at what it found then. One that has never moved is not waited for. There is one
            decision in either case.
        every_n_steps: steps from one look to the next. The averages are over looks.

    Raises:
        ConfigError: for values out of range.
        ConfigTypeError: for what is no number.
    """

    criterion: Literal["relative", "paper"] = "relative"
    rtol: float = 0.1
    window: int = 50
    patience: int = 20
    eps: float = 1e-9
    per: Literal["model", "group"] = "model"
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word(self.criterion, "criterion", ("relative", "paper"))
        check_word(self.per, "per", ("model", "group"))
        for option in ("rtol", "eps"):
            check_number(getattr(self, option), option)
            if not 0 < getattr(self, option) < math.inf:
                raise ConfigError(f"{getattr(self, option)!r} is no tolerance. Write a number above 0.", option)
        check_count(self.window, "window", "looks", least=2)
        check_count(self.patience, "patience", "looks")
        check_count(self.every_n_steps, "every_n_steps", "steps")

    def _estimate(self, memory: Memory) -> dict[str, float]:
        found = {name: group.get("settled_at", group.get("lr")) for name, group in memory.get("groups", {}).items()}
        return {name: lr for name, lr in found.items() if lr is not None and lr > 0}

    def _observe(self, memory: Memory, seen: Seen) -> dict[str, Any]:
        if seen.projections is None or seen.step % self.every_n_steps or "fired" in memory:
            return dict(memory)
        seen_by = dict(seen.projections) if self.per == "group" else {"": _joined(seen.projections.values())}
        if not all(one.lr for one in seen_by.values()):
            return dict(memory)  # at a learning rate of zero nothing is to be seen
        if not all(math.isfinite(one.update) and math.isfinite(one.along) for one in seen_by.values()):
            return {**memory, "passed_over": memory.get("passed_over", 0) + 1}
        count = memory.get("count", 0) + 1
        before = memory.get("groups", {})
        groups = {
            name: self._look(before.get(name, {}), one, count)
            for name, one in seen_by.items()
            if name in before or one.update or one.along
        }
        after = {**memory, "count": count, "groups": groups}
        if not groups or not all("settled_at" in group for group in groups.values()):
            return after
        lrs = ", ".join(f"{name or 'one'} {group['settled_at']:.4g}" for name, group in groups.items())
        return {**after, "fired": f"the learning rate for SGD has settled, at {lrs.removeprefix('one ')}"}

    def _look(self, before: Memory, seen: Projection, count: int) -> dict[str, Any]:
        """What is remembered of a group; where one has settled, it stays."""
        after = self._paper(before, seen, count) if self.criterion == "paper" else self._relative(before, seen, count)
        return {**after, "settled_at": before["settled_at"]} if "settled_at" in before else after

    def _paper(self, before: Memory, seen: Projection, count: int) -> dict[str, Any]:
        after = dict(before)
        if seen.along == 0:
            return after
        gamma = seen.update / seen.along
        average = seen.beta2 * before.get("average", 0.0) + (1 - seen.beta2) * gamma
        lr = average / (1 - seen.beta2**count)
        after |= {"average": average, "lr": lr, "gap": abs(lr - gamma)}
        if count > 1 and after["gap"] < self.eps and lr > 0:
            after["settled_at"] = lr
        return after

    def _relative(self, before: Memory, seen: Projection, count: int) -> dict[str, Any]:
        parts = {"update": seen.update / seen.lr**2, "along": seen.along / seen.lr}
        after: dict[str, Any] = {
            f"{part}_{length}": before.get(f"{part}_{length}", 0.0) * (1 - 1 / looks) + value / looks
            for length, looks in (("short", self.window), ("long", 10 * self.window))
            for part, value in parts.items()
        }
        after["agreed"] = 0
        if after["along_short"] <= 0 or after["along_long"] <= 0:
            return after
        # Both begin at zero, and so do over and under alike: the ratios need no correction.
        short, lr = (seen.lr * after[f"update_{length}"] / after[f"along_{length}"] for length in ("short", "long"))
        after |= {"lr": lr, "gap": abs(lr - short) / lr if lr else math.inf}
        if count >= 2 * self.window and after["gap"] <= self.rtol:
            after["agreed"] = before.get("agreed", 0) + 1
        if after["agreed"] >= self.patience:
            after["settled_at"] = lr
        return after

    def _shows(self, memory: Memory) -> dict[str, float]:
        return {
            "/".join(filter(None, (name, key))): group[key]
            for name, group in memory.get("groups", {}).items()
            for key in ("lr", "gap")
            if key in group
        }


def _joined(projections: Iterable[Projection]) -> Projection:
    """Of all groups together; the first stands for what one schedule does to all, and for the decay rate."""
    several = list(projections)
    return several[0]._replace(update=sum(one.update for one in several), along=sum(one.along for one in several))


@dataclass(frozen=True, kw_only=True)
class OnNoise(Trigger):
    """Fires when the gradient noise scale has been above or below a value for some looks in a row.

    It reads the averages of a `GradientNoiseMonitor` among the callbacks, which says where they can be had. The noise scale
    ``tr(Sigma) / |G|^2`` is in samples: in a batch of that size noise and gradient are as long as each other.

    Args:
        above: fires when the noise scale is greater; ``None`` for no such value.
        below: fires when it is less. One of the two is given.
        of: what the value is counted in: ``batch``, the samples that a step is made of, or ``samples``.
        patience: number of looks in a row, at least 1. A look that sees no number begins anew.
        every_n_steps: steps from one look to the next, each of which waits for the device; a multiple of the monitor's.
    """

    above: float | None = None
    below: float | None = None
    of: Literal["batch", "samples"] = "batch"
    patience: int = 5
    every_n_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_threshold(self.above, self.below)
        check_word(self.of, "of", ("batch", "samples"))
        check_count(self.patience, "patience", "looks")
        check_count(self.every_n_steps, "every_n_steps", "steps")

    def _observe(self, memory: Memory, seen: Seen) -> dict[str, Any]:
        if not seen.noise or seen.step % self.every_n_steps or "fired" in memory:
            return dict(memory)
        scale, batch = seen.noise["noise/scale"], seen.noise["noise/batch"]
        value = scale / batch if self.of == "batch" else scale
        passed, limit = _passed(value, self.above, self.below)
        held = memory.get("held", 0) + 1 if passed else 0
        after = {**memory, "scale": scale, "batch": batch, "held": held}
        if held < self.patience:
            return after
        words = f"the gradient noise scale is {scale:.4g} samples, {scale / batch:.3g} batches of {batch:g}, {limit} {self.of}"
        return {**after, "fired": f"{words} for {held} looks"}

    def _shows(self, memory: Memory) -> dict[str, float]:
        return {name: memory[name] for name in ("scale", "batch") if name in memory}


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

    def walk(self, memory: Memory) -> Iterator[Node]:
        yield from super().walk(memory)
        for name, trigger in self.members():
            for node in trigger.walk(memory.get("of", {}).get(name, {})):
                yield node._replace(names=(name, *node.names))

    def _observe(self, memory: Memory, seen: Seen) -> dict[str, Any]:
        of: dict[str, Any] = {}
        for name, trigger in self.members():
            with within(f"of.{name}"):
                of[name] = trigger.observe(memory.get("of", {}).get(name, {}), seen)
        fired = {name: state["fired"] for name, state in of.items() if "fired" in state}
        after = {**memory, "of": of}
        if not self._is_enough(fired):
            return after
        return {**after, "fired": " and ".join(f"{name}: {reason}" for name, reason in fired.items())}

    @abstractmethod
    def _is_enough(self, fired: Mapping[str, str]) -> bool: ...

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


def _check_threshold(above: Any, below: Any) -> None:
    if (above is None) == (below is None):
        raise ConfigError("a threshold is either above or below a value. Give one of the two.", "above")
    option, value = ("above", above) if below is None else ("below", below)
    check_number(value, option)
    if not math.isfinite(float(value)):
        raise ConfigError(f"{value!r} is never passed. Write a finite number.", option)


def _passed(value: float, above: float | None, below: float | None) -> tuple[bool, str]:
    """Whether a value has passed the one of the two thresholds that is given, and that in words."""
    if above is not None:
        return value > above, f"above {above:g}"
    assert below is not None
    return value < below, f"below {below:g}"
