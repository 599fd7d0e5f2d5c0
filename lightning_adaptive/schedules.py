"""Schedules: time as a pure function of the step.

A schedule multiplies each group's own base value. It spans from its phase's first step to the end of training, so that the
phase before a switch follows the same curve as a run without one; a switch cuts it, and ``length`` gives it another span.

Here is what all schedules share, and what is made of other schedules; the closed forms themselves are in ``curves.py``.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

from lightning_adaptive.durations import Clock, Duration, DurationLike, Warmup, WarmupLike
from lightning_adaptive.errors import (
    ConfigError,
    ConfigTypeError,
    check_count,
    check_number,
    check_share,
    check_word,
    is_number,
    within,
)

Factor = Callable[[int], float]
"""Phase step (0-based) to multiplier."""


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """What drives options of an optimizer's groups over time.

    Called with a clock it returns the learning rate's ``factor(step)``, a pure function of the phase's 0-based step, which
    multiplies each group's own base value. Those with a warm-up and a shape are subclasses of `Curve`.
    """

    def __call__(self, clock: Clock) -> Factor:
        """The learning rate's factor; argument and errors as of `curves`."""
        return self.curves(clock)["lr"]

    @abstractmethod
    def curves(self, clock: Clock) -> Mapping[str, Factor]:
        """A factor for each option that is driven, ``lr`` among them; ``momentum`` stands for beta1 where there are betas.

        Args:
            clock: the phase's clock.

        Raises:
            ConfigError: when a duration cannot be counted or does not fit into the span.
        """

    def with_untuned_warmup(self, beta2: float) -> Schedule:
        """The schedule for an optimizer with this ``beta2``: an ``untuned`` warm-up gets its length, nothing else changes."""
        return self

    def __str__(self) -> str:
        options = [
            f"{option.name} {text}"
            for option in fields(self)
            if (value := getattr(self, option.name)) is not None and (text := _in_words(value)) != _in_words(option.default)
        ]
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(self).__name__).lower()
        return ", ".join([words, *options])


@dataclass(frozen=True, kw_only=True)
class Curve(Schedule):
    """A warm-up and then a `shape`, which subclasses give.

    With ``W`` steps of warm-up, ``S`` steps of span and ``c(t)`` the shape with its floor, ``t`` steps after the warm-up::

        factor(step) = rise((step + 1) / W) * c(0)     while step < W
        factor(step) = c(min(step - W, S - W))         afterwards: beyond the span the last value holds

    so that no update is wasted on a learning rate of zero, and the last step of the warm-up has the value with which the shape
    begins; for most shapes that is 1. A warm-up as long as the span ends at 1, which then holds.

    Args:
        warmup: length of the warm-up, ``0st`` for none; a percentage is of the span. ``untuned`` is ``2 / (1 - beta2)`` steps of
            the optimizer (Ma & Yarats 2021, arXiv 1910.04209), 2000 for Adam's 0.999.
        warmup_shape: ``linear``, ``rise(x) = x``; or ``exponential``, ``rise(x) = (1 - exp(-2 x)) / (1 - exp(-2))``. The paper's
            exponential warm-up ``1 - exp(-t / tau)`` never ends; here ``tau = W / 2``, for which its untuned length is that of
            the linear one, and it is divided by its value at ``W``, so that it ends at 1 as well.
        floor: share of the base value, 0 to 1, below which the curve never falls once the warm-up is over. A shape that ends at
            zero is scaled, ``c = floor + (1 - floor) * shape``, and so ends at the floor; any other is cut,
            ``c = max(floor, shape)``. Each class says which it is (``ends_at_zero``).
        length: the span; ``None`` is to the end of training. A percentage is of the steps that remain. The end of training cuts
            a longer one.
        interval: what the value is held for. ``step`` changes it at every step; ``epoch`` at the first step of each epoch of
            the training.
        frequency: number of intervals, at least 1, for which a value is held, counted from the phase's first. Held is the
            curve's value at the first of these steps, and of a warm-up the value at the last of them, which is again never zero.

    Raises:
        ConfigError: for values that are not allowed; and when called, if the warm-up is longer than the span, a duration cannot
            be counted, or an ``untuned`` warm-up was not given its length by `with_untuned_warmup`.
    """

    ends_at_zero: ClassVar[bool] = False

    warmup: WarmupLike = "0st"
    warmup_shape: Literal["linear", "exponential"] = "linear"
    floor: float = 0.0
    length: DurationLike | None = None
    interval: Literal["step", "epoch"] = "step"
    frequency: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "warmup", Warmup.parse(self.warmup, key="warmup"))
        check_word(self.warmup_shape, "warmup_shape", ("linear", "exponential"))
        check_share(self.floor, "floor", "It is a share of the base value.")
        if self.length is not None:
            self._check_duration("length", "{!r} is no length. Write a duration above zero, or null.")
        check_word(self.interval, "interval", ("step", "epoch"))
        check_count(self.frequency, "frequency", "intervals")

    def curves(self, clock: Clock) -> Mapping[str, Factor]:
        warmup, steps = self._span(clock)
        period, before = self._period(clock)
        # A shape of no steps is never asked for; its formula may divide by them.
        shapes = {"lr": _one} if steps == 0 else self.shapes(clock, steps)
        curves = {}
        for option, shape in shapes.items():
            curve, rise = (self._above_floor(shape), _RISES[self.warmup_shape]) if option == "lr" else (shape, _one)
            curves[option] = _held(_timed(curve, rise, warmup, steps), warmup, period, before)
        return curves

    def with_untuned_warmup(self, beta2: float) -> Self:
        if self.warmup != "untuned":
            return self
        if not is_number(beta2) or not 0 <= beta2 < 1:
            raise ConfigError(f"a beta2 of {beta2!r} gives no warm-up. It lies from 0 to below 1.", "warmup")
        return replace(self, warmup=Duration(math.floor(2 / (1 - beta2) + 0.5), "st"))

    @abstractmethod
    def shape(self, clock: Clock, steps: int | None) -> Factor:
        """The curve after the warm-up, from 0 to 1, without the floor.

        Args:
            clock: the phase's clock, for durations of the schedule's own.
            steps: length of the curve in steps, at least 1, or ``None`` when the end of training is unknown. The curve is asked
                for steps from 0 to this, both included.
        """

    def shapes(self, clock: Clock, steps: int | None) -> Mapping[str, Factor]:
        """As `shape`, for every option that is driven. The warm-up and the floor are the learning rate's alone."""
        return {"lr": self.shape(clock, steps)}

    def _span(self, clock: Clock) -> tuple[int, int | None]:
        """Steps of the warm-up and of the curve after it."""
        span = clock.remaining_steps if self.length is None else self._steps("length", clock, clock.remaining_steps, least=1)
        if self.warmup == "untuned":
            raise ConfigError(
                "'untuned' is 2 / (1 - beta2) steps and needs an optimizer with beta2, such as Adam. "
                "Choose one, or write a duration.",
                "warmup",
            )
        warmup = self._steps("warmup", clock, span)
        if span is not None and warmup > span:
            raise ConfigError(f"{self.warmup} is {warmup} steps, but the schedule spans only {span}.", "warmup")
        return warmup, None if span is None else span - warmup

    def _period(self, clock: Clock) -> tuple[int, int]:
        """For how many steps a value is held, and how many of the first of these lie before the phase."""
        if self.interval == "step":
            return self.frequency, 0
        if clock.steps_per_epoch is None:
            raise ConfigError("epochs cannot be counted: the training loader has no length. Write step.", "interval")
        return self.frequency * clock.steps_per_epoch, clock.first_step % clock.steps_per_epoch

    def _above_floor(self, shape: Factor) -> Factor:
        floor = self.floor
        if not floor:
            return shape
        if self.ends_at_zero:
            return lambda step: floor + (1 - floor) * shape(step)
        return lambda step: max(floor, shape(step))

    # What subclasses need to read their options

    def _known(self, steps: int | None) -> int:
        if steps is None:
            raise ConfigError(
                f"{type(self).__name__} must know where it ends, and this training has no known end. "
                "Set trainer.max_steps, or the schedule's length in steps (st)."
            )
        return steps

    def _steps(self, option: str, clock: Clock, whole: int | None, least: int = 0) -> int:
        """An option in steps; a percentage is of the whole."""
        duration = getattr(self, option)
        assert isinstance(duration, Duration)
        return duration.steps(clock, whole, option, least)

    def _within(self, option: str, clock: Clock, steps: int) -> int:
        """An option in steps, of which the curve has enough."""
        found = self._steps(option, clock, steps)
        if found > steps:
            duration = getattr(self, option)
            raise ConfigError(f"{duration} is {found} steps, but the curve after the warm-up has only {steps}.", option)
        return found

    def _check_duration(self, option: str, if_zero: str | None = None) -> None:
        duration = Duration.parse(getattr(self, option), key=option)
        if if_zero and not duration:
            raise ConfigError(if_zero.format(str(duration)), option)
        object.__setattr__(self, option, duration)


@dataclass(frozen=True, kw_only=True)
class Constant(Curve):
    """The base value itself, after an optional warm-up: ``factor(t) = 1``.

    >>> factor = Constant(warmup="4st")(Clock(steps_per_epoch=5, total_steps=None))
    >>> [factor(step) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        return _one


@dataclass(frozen=True, kw_only=True)
class Plateau(Constant):
    """The base value, after an optional warm-up, times ``factor`` whenever a metric has stood still.

    The one schedule that is not a function of the step alone: it looks at the metric with torch's ``ReduceLROnPlateau``, which
    goes on from where it was when a run resumes. A plan shows its warm-up. It stands alone: neither a piece of another schedule
    nor one for a single option.

    Args:
        monitor: name of a metric that the module logs, ``val/loss``.
        mode: ``min`` when less is better, ``max`` when more is.
        factor: the multiplier of each reduction, above 0 and below 1.
        patience: number of looks without an improvement that are borne; the one after them reduces.
        threshold: least change that counts as an improvement, as a share of the best value (``rel``) or itself (``abs``).
        threshold_mode: ``rel`` or ``abs``.
        cooldown: number of looks after a reduction in which nothing is counted.
        floor: share of the base value below which it is never reduced.
        interval: ``epoch`` looks at the end of epochs, ``step`` after batches, as of Lightning's schedulers.
        frequency: at the end of each how manieth epoch, or after each how manieth batch of an epoch; for validations within an
            epoch that of ``trainer.val_check_interval``.

    Raises:
        ConfigError: for values that are not allowed. When training reaches the first look and no such metric was logged,
            Lightning ends the run and names those that were.
    """

    monitor: str
    mode: Literal["min", "max"] = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    interval: Literal["step", "epoch"] = "epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.monitor, str) or not self.monitor:
            raise ConfigTypeError(f"{self.monitor!r} is no name of a metric. Write one that is logged, val/loss.", "monitor")
        check_word(self.mode, "mode", ("min", "max"))
        check_share(self.factor, "factor", "It multiplies the value at each reduction.", above_zero=True)
        if self.factor == 1:
            raise ConfigError(f"{self.factor!r} would reduce nothing. Write a number below 1.", "factor")
        check_count(self.patience, "patience", "looks at the metric", least=0)
        check_number(self.threshold, "threshold")
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(f"{self.threshold!r} is no change of a metric. Write a number from 0 on.", "threshold")
        check_word(self.threshold_mode, "threshold_mode", ("rel", "abs"))
        check_count(self.cooldown, "cooldown", "looks at the metric", least=0)

    def _period(self, clock: Clock) -> tuple[int, int]:
        # Interval and frequency say when it looks; the warm-up moves at every step.
        return 1, 0


@dataclass(frozen=True, kw_only=True)
class Continue(Schedule):
    """For a switch: the running schedule goes on, on the base values of the next optimizer, with its own clock and first step."""

    def curves(self, clock: Clock) -> Mapping[str, Factor]:
        raise ConfigError("there is no running schedule to continue; only a switch has one. Choose another.")


@dataclass(frozen=True, kw_only=True)
class Piecewise(Curve):
    """One curve after another, each with its own local step.

    The pieces tile the span in the order of the mapping: with ``b(k)`` the sum of the lengths before piece ``k``,
    ``factor(t) = piece_k(t - b(k))`` while ``b(k) <= t < b(k + 1)``. Each piece keeps its own warm-up, floor and interval. A
    percentage in a piece's ``length`` is of the whole curve, one elsewhere in a piece of that piece. When the last piece ends
    before the span does, its last value holds; when the span ends first, it cuts the piece. A ``floor`` of the whole cuts.

    torch's ``SequentialLR`` counts as well from the beginning of each piece, but changes the optimizer while it is built.

    Args:
        pieces: curves by name. Each but the last must have a ``length``; the last may be open.

    Raises:
        ConfigError: for no pieces, or one without a length before the last; and when called, for a piece that would never
            begin. Keys name the piece: ``pieces.NAME.length``. A piece for which percentages alone leave no step, in a very short
            training, is left out.

    >>> pieces = {"high": Constant(length="2st"), "low": Constant(warmup="2st")}
    >>> factor = Piecewise(pieces=pieces)(Clock(steps_per_epoch=5, total_steps=5))
    >>> [factor(step) for step in range(5)]
    [1.0, 1.0, 0.5, 1.0, 1.0]
    """

    # Left out of the hash, since a mapping has none.
    pieces: Mapping[str, Curve] = field(hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pieces", _by_name(self.pieces, Curve, "pieces"))
        for name, piece in list(self.pieces.items())[:-1]:
            if piece.length is None:
                raise ConfigError("must be given: only the last piece may be open.", f"pieces.{name}.length")

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        return self.shapes(clock, steps)["lr"]

    def shapes(self, clock: Clock, steps: int | None) -> Mapping[str, Factor]:
        first = clock.first_step + self._span(clock)[0]
        starts: list[int] = []
        built: list[Mapping[str, Factor]] = []
        for name, begin, end in self._places(clock, steps):
            local = Clock(clock.steps_per_epoch, None if end is None else first + end, first + begin)
            with within(f"pieces.{name}"):
                built.append(replace(self.pieces[name], length=None).curves(local))
            starts.append(begin)
        if not starts:
            return {"lr": _one}
        options = dict.fromkeys(option for curves in built for option in curves)
        return {option: _tiled(starts, [curves.get(option, _one) for curves in built]) for option in options}

    def _places(self, clock: Clock, steps: int | None) -> Iterator[tuple[str, int, int | None]]:
        """Name, first step and end of each piece that has steps."""
        begin, before = 0, list[Duration]()
        for name, piece in self.pieces.items():
            if steps is not None and begin >= steps:
                if falls_short(*before):
                    return
                raise ConfigError(f"would begin at step {begin}, but the pieces have only {steps} steps.", f"pieces.{name}")
            if not isinstance(piece.length, Duration):
                yield name, begin, steps
                return
            least = 0 if falls_short(piece.length) else 1
            length = piece.length.steps(clock, steps, f"pieces.{name}.length", least)
            before.append(piece.length)
            if length:
                yield name, begin, begin + length
            begin += length

    def with_untuned_warmup(self, beta2: float) -> Self:
        whole = super().with_untuned_warmup(beta2)
        return replace(whole, pieces={name: piece.with_untuned_warmup(beta2) for name, piece in self.pieces.items()})


@dataclass(frozen=True, kw_only=True)
class PerOption(Schedule):
    """A schedule for each option of the optimizer's groups: ``lr``, ``weight_decay``, ``momentum``, or any other number.

    Each multiplies the groups' own base value of its option; the learning rate is constant where it has none.

    Args:
        options: schedules by the option's name; ``momentum`` stands for beta1 where the optimizer has betas.

    Raises:
        ConfigError: when called, if two schedules drive one option: one that drives the momentum with the learning rate belongs
            under ``lr``, and leaves no room for one under ``momentum``.

    >>> both = PerOption(options={"weight_decay": Constant(warmup="2st")})
    >>> curves = both.curves(Clock(steps_per_epoch=5, total_steps=5))
    >>> [(option, factor(0)) for option, factor in curves.items()]
    [('lr', 1.0), ('weight_decay', 0.5)]
    """

    options: Mapping[str, Schedule] = field(hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _by_name(self.options, Schedule, "options"))

    def curves(self, clock: Clock) -> Mapping[str, Factor]:
        driven: dict[str, Factor] = {"lr": _one}
        by: dict[str, str] = {}
        for name, schedule in self.options.items():
            with within(f"options.{name}"):
                curves = dict(schedule.curves(clock))
            found = {name: curves.pop("lr"), **curves}
            if curves and name != "lr":
                raise ConfigError(f"also drives {', '.join(curves)}, as only the schedule of lr may.", f"options.{name}")
            for option in found:
                if option in by:
                    raise ConfigError(f"{option} is driven by the schedule of {by[option]} already.", f"options.{name}")
                by[option] = name
            driven |= found
        return driven

    def with_untuned_warmup(self, beta2: float) -> Self:
        return replace(self, options={name: schedule.with_untuned_warmup(beta2) for name, schedule in self.options.items()})


def falls_short(*lengths: Duration) -> bool:
    """Whether lengths only reach the end, or come to nothing, by rounding: the training is too short for its percentages."""
    return all(length.unit == "%" for length in lengths) and sum(length.value for length in lengths) < 100


_Kind = TypeVar("_Kind", bound=Schedule)


def _by_name(value: Any, kind: type[_Kind], key: str) -> dict[str, _Kind]:
    """A mapping of schedules, copied."""
    if not isinstance(value, Mapping):
        raise ConfigTypeError(f"{value!r} is not a mapping of schedules by name.", key)
    if not value:
        raise ConfigError("is empty. Write at least one schedule, by name.", key)
    for name, schedule in value.items():
        if not isinstance(schedule, kind):
            known = "a schedule with a length" if kind is Curve else "a schedule"
            # Hydra takes the dataclasses in a mapping apart.
            advice = (
                " Hydra's own instantiate keeps it one where the node has _convert_: all." if isinstance(schedule, Mapping) else ""
            )
            raise ConfigTypeError(f"{schedule!r} is not {known}.{advice}", f"{key}.{name}")
        if isinstance(schedule, Plateau | Continue):
            raise ConfigError(f"{type(schedule).__name__} stands alone and is no part of another schedule.", f"{key}.{name}")
    return dict(value)


def _one(_: float) -> float:
    return 1.0


_RISES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "exponential": lambda share: math.expm1(-2 * share) / math.expm1(-2),
}


def _timed(curve: Factor, rise: Callable[[float], float], warmup: int, steps: int | None) -> Factor:
    """Puts a curve behind its warm-up, and lets its last value hold."""

    def after(step: int) -> float:
        since = step - warmup
        return curve(since if steps is None or since < steps else steps)

    if not warmup:
        return after
    begin = curve(0)
    return lambda step: rise((step + 1) / warmup) * begin if step < warmup else after(step)


def _held(factor: Factor, warmup: int, period: int, before: int) -> Factor:
    """Lets each value hold for a period; of the first, some steps lie before the phase."""
    if period == 1:
        return factor

    def held(step: int) -> float:
        begin = (step + before) // period * period - before
        first = max(begin, 0)
        return factor(min(begin + period, warmup) - 1 if first < warmup else first)

    return held


def _tiled(starts: Sequence[int], factors: Sequence[Factor]) -> Factor:
    def factor(step: int) -> float:
        piece = bisect_right(starts, step) - 1
        return factors[piece](step - starts[piece])

    return factor


def _in_words(value: object) -> str:
    if isinstance(value, Mapping):
        return f"{{{'; '.join(f'{name}: {item}' for name, item in value.items())}}}"
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
