"""Lengths of training with their unit, and the clock that turns them into optimizer steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

from lightning_adaptive.errors import ConfigError, ConfigTypeError, is_number

Unit = Literal["ep", "st", "%"]

_UNITS: dict[str, Unit] = {
    **dict.fromkeys(("ep", "epoch", "epochs"), "ep"),
    **dict.fromkeys(("st", "step", "steps"), "st"),
    **dict.fromkeys(("%", "percent"), "%"),
}
_PATTERN = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z%]*)\s*")


@dataclass(frozen=True)
class Clock:
    """What turns durations into optimizer steps.

    Args:
        steps_per_epoch: optimizer steps in one epoch on each process; ``None`` when the loader has no length.
        total_steps: optimizer steps of the whole training; ``None`` when it has no known end.
        first_step: 0-based global step at which the phase begins.
    """

    steps_per_epoch: int | None
    total_steps: int | None
    first_step: int = 0

    @property
    def remaining_steps(self) -> int | None:
        """Optimizer steps from the phase's first to the end of training, or ``None`` when the end is unknown."""
        return None if self.total_steps is None else self.total_steps - self.first_step


class Duration:
    """A length of training: ``10ep`` (epochs), ``500st`` (optimizer steps) or ``30%``.

    The number is kept exactly, as a fraction; it becomes a whole number of steps in one place, `steps`.

    Args:
        value: a non-negative number of units.
        unit: ``"ep"``, ``"st"`` or ``"%"``. Steps are whole.

    >>> Duration.parse("10 epochs")
    Duration('10ep')
    >>> Duration.parse("2.5ep").steps(Clock(steps_per_epoch=9, total_steps=90))
    23
    >>> Duration.parse("30%").steps(Clock(steps_per_epoch=9, total_steps=90), whole=90)
    27
    """

    __slots__ = ("unit", "value")

    def __init__(self, value: int | Fraction, unit: Unit) -> None:
        self.value = Fraction(value)
        self.unit: Unit = unit

    @classmethod
    def parse(cls, text: str | Duration, key: str = "") -> Duration:
        """Reads a duration.

        Args:
            text: ``10ep``, ``500st``, ``30%``, a long form (``10 epochs``, ``500 steps``, ``30 percent``), or a `Duration`.
            key: the setting's name, for the message.

        Raises:
            ConfigTypeError: for a bare number or any other type.
            ConfigError: for text without unit, with an unknown unit, with a fraction of a step, or above 100%.
        """
        if isinstance(text, cls):
            return text
        if not isinstance(text, str):
            raise ConfigTypeError(_no_unit(text), key)
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ConfigError(
                f"{text!r} is not a duration. Write a number and its unit: 5ep (epochs), 5st (optimizer steps) or 5%.", key
            )
        number, unit = Fraction(match[1]), _UNITS.get(match[2].lower())
        if not match[2]:
            raise ConfigError(_no_unit(text, match[1]), key)
        if unit is None:
            raise ConfigError(f"{text!r} has the unknown unit {match[2]!r}. Units are ep (epochs), st (steps) and %.", key)
        if unit == "st" and number.denominator != 1:
            raise ConfigError(f"{text!r} is not a whole number of steps.", key)
        if unit == "%" and number > 100:
            raise ConfigError(f"{text!r} is more than the whole. A percentage lies between 0% and 100%.", key)
        return cls(number, unit)

    def steps(self, clock: Clock, whole: int | None = None, key: str = "", least: int = 0) -> int:
        """The duration in optimizer steps, rounded to the nearest whole number, halves up.

        Args:
            clock: the run's clock.
            whole: the number of steps that ``100%`` stands for; ``None`` when it is not known.
            key: the setting's name, for the message.
            least: 1 where none at all has no meaning.

        Raises:
            ConfigError: when the clock does not know what the unit needs, or fewer are found than the least.
        """
        found = _nearest(self.value * self._unit_in_steps(clock, whole, key))
        if found < least:
            raise ConfigError(f"{self} rounds to 0 steps of this training.", key)
        return found

    def _unit_in_steps(self, clock: Clock, whole: int | None, key: str) -> Fraction:
        if self.unit == "st":
            return Fraction(1)
        if self.unit == "ep":
            if clock.steps_per_epoch is None:
                raise ConfigError(f"{self} cannot be counted: the training loader has no length. Write it in steps (st).", key)
            return Fraction(clock.steps_per_epoch)
        if whole is None:
            raise ConfigError(
                f"{self} cannot be counted: the number of training steps is not known. "
                "Set trainer.max_steps, or write it in steps (st).",
                key,
            )
        return Fraction(whole, 100)

    def __bool__(self) -> bool:
        return self.value > 0

    def __str__(self) -> str:
        number = self.value.numerator if self.value.denominator == 1 else float(self.value)
        return f"{number}{self.unit}"

    def __repr__(self) -> str:
        return f"Duration({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Duration) and (self.value, self.unit) == (other.value, other.unit)

    def __hash__(self) -> int:
        return hash((self.value, self.unit))


def is_duration(value: object) -> bool:
    """Whether a value is a duration, or text with a number and a unit of one.

    >>> is_duration("30%"), is_duration("cos"), is_duration(30)
    (True, False, False)
    """
    match = _PATTERN.fullmatch(value) if isinstance(value, str) else None
    return isinstance(value, Duration) or (match is not None and match[2].lower() in _UNITS)


class Warmup:
    """What a warm-up may be: a duration, or the word ``untuned``. One class, since OmegaConf knows no union of classes."""

    @staticmethod
    def parse(text: str | Duration, key: str = "") -> Duration | Literal["untuned"]:
        """Reads a warm-up; arguments and errors as of `Duration.parse`."""
        return "untuned" if text == "untuned" else Duration.parse(text, key)


if TYPE_CHECKING:
    DurationLike = str | Duration
    WarmupLike = str | Duration
else:
    # jsonargparse would take any text for a `str`, and what is wrong with it would be said by a traceback.
    DurationLike, WarmupLike = Duration, Warmup


def _nearest(number: Fraction) -> int:
    return (number + Fraction(1, 2)).__floor__()


def _no_unit(value: Any, number: str | None = None) -> str:
    if number is None and not is_number(value):
        return f"{value!r} is not a duration. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training)."
    number = number or str(value)
    return f"{value!r} has no unit. Write {number}ep (epochs), {number}st (optimizer steps) or {number}% (of training)."
