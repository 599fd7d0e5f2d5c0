"""The closed forms: what follows the warm-up, each a pure function of the step.

In the formulas ``t`` counts steps after the warm-up from 0, ``T`` is the number of steps from there to the end of the span, and
``floor`` is zero; how it enters is said at `Curve`, as are the options that all share. Percentages are of ``T``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from lightning_adaptive.durations import Clock, Duration, DurationLike
from lightning_adaptive.errors import ConfigError, ConfigTypeError, check_count, check_number, check_share, check_truth, check_word
from lightning_adaptive.schedules import Curve, Factor, falls_short

_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "1-sqrt": lambda share: 1 - math.sqrt(share),
}
"""From 1 to 0 while a share of the way goes from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Polynomial(Curve):
    """A power of the steps that are left: ``factor(t) = (1 - t / T) ** power``. It ends at zero, so the floor scales it.

    Equal to torch's ``PolynomialLR`` with ``total_iters = T``, and to transformers' ``polynomial`` with
    ``floor = lr_end / lr`` (there 1e-7 / lr unless given, here 0).

    Args:
        power: a finite number above 0. 1 is `Linear`; above 1 the curve falls fast first, below 1 late.

    >>> factor = Polynomial(power=2.0)(Clock(steps_per_epoch=5, total_steps=4))
    >>> [factor(step) for step in range(5)]
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
    """

    ends_at_zero: ClassVar[bool] = True

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self.power, "power")
        if not 0 < self.power < math.inf:
            raise ConfigError(f"{self.power!r} is not a finite number above 0.", "power")

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        power, end = self.power, self._known(steps)
        return lambda step: (1 - step / end) ** power


@dataclass(frozen=True, kw_only=True)
class Linear(Curve):
    """A straight line to zero, `Polynomial` of power 1: ``factor(t) = 1 - t / T``. The floor scales it.

    Equal to transformers' ``linear``, and to torch's ``LinearLR`` with ``start_factor = 1``, ``end_factor = floor`` and
    ``total_iters = T``. On many tasks at least as good as a cosine (Defazio et al. 2023, arXiv 2310.07831).

    >>> factor = Linear(floor=0.5)(Clock(steps_per_epoch=5, total_steps=4))
    >>> [factor(step) for step in range(5)]
    [1.0, 0.875, 0.75, 0.625, 0.5]
    """

    ends_at_zero: ClassVar[bool] = True

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        end, fall = self._known(steps), _FALLS["linear"]
        return lambda step: fall(step / end)


@dataclass(frozen=True, kw_only=True)
class Cosine(Curve):
    """Half a cosine to zero: ``factor(t) = (1 + cos(pi * t / T)) / 2``. The floor scales it.

    Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5, with one cycle. Equal to torch's ``CosineAnnealingLR`` with
    ``T_max = T`` and ``eta_min = floor * lr``, and to transformers' ``cosine``.

    >>> factor = Cosine(warmup="2st")(Clock(steps_per_epoch=5, total_steps=10))
    >>> [round(factor(step), 3) for step in range(10)]
    [0.5, 1.0, 1.0, 0.962, 0.854, 0.691, 0.5, 0.309, 0.146, 0.038]
    """

    ends_at_zero: ClassVar[bool] = True

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        end, fall = self._known(steps), _FALLS["cosine"]
        return lambda step: fall(step / end)


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(Curve):
    """Half cosines that start again and again (SGDR: Loshchilov & Hutter 2017, arXiv 1608.03983, equation 5).

    In cycle ``i``, of ``T_i = cycle * t_mult ** i`` steps, ``factor(t) = decay ** i * (1 + cos(pi * t_i / T_i)) / 2`` with
    ``t_i`` steps since the restart. Each cycle ends at zero, so the floor scales it. The end of the span cuts the last cycle; if
    both end together the value stays at the cycle's foot.

    Equal to torch's ``CosineAnnealingWarmRestarts`` with ``T_0 = cycle``, and with ``cycle = T / n`` to transformers'
    ``cosine_with_restarts`` of ``n`` cycles. timm's ``cycle_decay`` leaves the floor out of the scaling: it goes from
    ``decay ** i`` to ``floor``, this from ``floor + (1 - floor) * decay ** i``; without floor both are the same.

    Args:
        cycle: length of the first cycle.
        t_mult: by how much each cycle is longer than the one before; a whole number, at least 1.
        decay: by what the peak is multiplied at each restart, above 0 and at most 1.

    >>> factor = CosineRestarts(cycle="2st", t_mult=2, decay=0.5)(Clock(steps_per_epoch=5, total_steps=6))
    >>> [round(factor(step), 3) for step in range(7)]
    [1.0, 0.5, 0.5, 0.427, 0.25, 0.073, 0.0]
    """

    ends_at_zero: ClassVar[bool] = True

    cycle: DurationLike = "10ep"
    t_mult: int = 1
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_duration("cycle", "a cycle of 0 steps has no meaning. Write a duration above zero.")
        check_count(self.t_mult, "t_mult", "times")
        check_share(self.decay, "decay", "It multiplies the peak at each restart.", above_zero=True)

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        first, t_mult, decay, fall = self._steps("cycle", clock, steps, least=1), self.t_mult, self.decay, _FALLS["cosine"]

        def factor(step: int) -> float:
            if t_mult == 1:
                cycle, since = divmod(step, first)
                length = first
            else:
                cycle, since, length = 0, step, first
                while since >= length:
                    cycle, since, length = cycle + 1, since - length, length * t_mult
            return 0.0 if step == steps and since == 0 else decay**cycle * fall(since / length)

        return factor


@dataclass(frozen=True, kw_only=True)
class Exponential(Curve):
    """A steady decay: ``factor(t) = gamma ** (t / every)``. It never ends, so the floor cuts it.

    Equal to torch's ``ExponentialLR`` stepped at each step for ``every = 1st``. torch's, stepped at each epoch, is the same curve
    held: ``every = 1ep`` with ``interval = epoch``.

    Args:
        every: the distance over which the value falls to ``gamma`` of itself.
        gamma: above 0 and at most 1.

    >>> factor = Exponential(every="2st", gamma=0.25)(Clock(steps_per_epoch=5, total_steps=None))
    >>> [factor(step) for step in range(5)]
    [1.0, 0.5, 0.25, 0.125, 0.0625]
    """

    every: DurationLike = "1ep"
    gamma: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_duration("every", "a decay every 0 steps has no meaning. Write a duration above zero.")
        check_share(self.gamma, "gamma", "It multiplies the value at each decay.", above_zero=True)

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        gamma, every = self.gamma, self._steps("every", clock, steps, least=1)
        return lambda step: gamma ** (step / every)


@dataclass(frozen=True, kw_only=True)
class StepDecay(Exponential):
    """`Exponential`, held from one multiple of ``every`` to the next: ``factor(t) = gamma ** (t // every)``.

    Equal to torch's ``StepLR``. The floor cuts it.

    Args:
        every: the distance between two decays.
        gamma: the multiplier of each decay, above 0 and at most 1.

    >>> factor = StepDecay(every="2st", gamma=0.5, floor=0.2)(Clock(steps_per_epoch=5, total_steps=None))
    >>> [factor(step) for step in range(7)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.2]
    """

    every: DurationLike = "30ep"
    gamma: float = 0.1

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        exponential, every = super().shape(clock, steps), self._steps("every", clock, steps, least=1)
        return lambda step: exponential(step - step % every)


@dataclass(frozen=True, kw_only=True)
class MultiStep(Curve):
    """Multiplies by ``gamma`` at each milestone: ``factor(t) = gamma ** n`` with ``n`` milestones up to and with ``t``.

    Equal to torch's ``MultiStepLR``. The floor cuts it. He et al. 2016, arXiv 1512.03385, section 4.2, divide by 10 at 50 % and
    75 % of training.

    Args:
        milestones: rising durations since the end of the warm-up, each before the end of the span. Percentages that round to one
            step, or to the end, of a very short training are let be.
        gamma: the multiplier of each milestone, above 0 and at most 1.

    Raises:
        ConfigError: also for a milestone that would never be reached, which torch lets pass.

    >>> factor = MultiStep(milestones=["2st", "3st"], gamma=0.5)(Clock(steps_per_epoch=5, total_steps=5))
    >>> [factor(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.25, 0.25]
    """

    milestones: Sequence[DurationLike]
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.milestones, str) or not isinstance(self.milestones, Sequence):
            raise ConfigTypeError(f"{self.milestones!r} is not a list. Write durations, [50%, 75%].", "milestones")
        if not self.milestones:
            raise ConfigError("is empty. Write at least one duration, [50%, 75%].", "milestones")
        parsed = tuple(Duration.parse(milestone, f"milestones.{index}") for index, milestone in enumerate(self.milestones))
        for index, milestone in enumerate(parsed):
            if not milestone:
                raise ConfigError("a milestone at step 0 has no meaning. Write a duration above zero.", f"milestones.{index}")
        object.__setattr__(self, "milestones", parsed)
        check_share(self.gamma, "gamma", "It multiplies the value at each milestone.", above_zero=True)

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        gamma, reached = self.gamma, self._reached(clock, steps)
        return lambda step: float(gamma ** bisect_right(reached, step))

    def _reached(self, clock: Clock, steps: int | None) -> list[int]:
        reached: list[int] = []
        for index, milestone in enumerate(self.milestones):
            key = f"milestones.{index}"
            assert isinstance(milestone, Duration)
            step = milestone.steps(clock, steps, key)
            if reached and step < reached[-1]:
                raise ConfigError(f"{milestone} is step {step}, before the milestone that precedes it, step {reached[-1]}.", key)
            if steps is not None and step >= steps and not falls_short(milestone):
                raise ConfigError(f"{milestone} is step {step}, but the curve after the warm-up has only {steps}.", key)
            reached.append(step)
        return reached


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Curve):
    """The inverse square root of time: ``factor(t) = 1 / sqrt(1 + t / timescale)``. It never ends, so the floor cuts it.

    Equal to transformers' ``inverse_sqrt``, which follows big_vision. With a timescale as long as the warm-up ``W``, the default,
    it is ``sqrt(W / (W + t))``, the curve of Vaswani et al. 2017, arXiv 1706.03762, equation 3, with its peak at the base value.

    Args:
        timescale: after three times this length the value is half of the base value. ``None`` is the length of the warm-up, or
            10,000 steps where there is none.

    >>> factor = InverseSqrt(warmup="2st")(Clock(steps_per_epoch=5, total_steps=None))
    >>> [round(factor(step), 3) for step in (0, 1, 2, 8)]
    [0.5, 1.0, 1.0, 0.5]
    """

    timescale: DurationLike | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timescale is not None:
            self._check_duration("timescale", "a timescale of 0 steps has no meaning. Write a duration above zero, or null.")

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        warmup, _ = self._span(clock)
        scale = (warmup or 10_000) if self.timescale is None else self._steps("timescale", clock, steps, least=1)
        return lambda step: 1 / math.sqrt(1 + step / scale)


@dataclass(frozen=True, kw_only=True)
class OneCycle(Curve):
    """One rise to the base value and one fall below where it began (Smith & Topin, arXiv 1708.07120).

    With a rise of ``R`` steps the value goes from ``start`` at ``t = 0`` to 1 at ``t = R - 1`` and to ``end`` at ``t = T - 1``;
    with ``three_phase`` back to ``start`` at ``t = 2 R - 2`` and then to ``end``. Between two corners it follows half a cosine or
    a line. The floor cuts it. A rise of at most one step begins at 1.

    Equal to torch's ``OneCycleLR`` with ``max_lr = lr``, ``pct_start = R / T``, ``div_factor = 1 / start`` and
    ``final_div_factor = start / end``, while ``R / T * T`` is whole: torch does not round the corner to a step. Here the rise is
    the warm-up, and ``warmup``, which goes before it, is best left at zero.

    Args:
        rise: length of the rise. torch: 30 %.
        start: the first value as a share of the base value, 0 to 1. torch: 1 / 25.
        end: the last value as a share of the base value, 0 to 1. torch: 1 / 250,000.
        anneal: ``cosine`` (torch: ``cos``) or ``linear``.
        three_phase: falls back over as many steps as it rose, and then to ``end``.
        momentum_low: if given, `curves` also has ``momentum``: from 1 to this share of the base momentum (of beta1, where the
            optimizer has betas) at the peak, and back to 1. torch: ``base_momentum / max_momentum``, 0.85 / 0.95, where
            ``max_momentum`` is our base momentum.

    >>> clock = Clock(steps_per_epoch=5, total_steps=5)
    >>> curves = OneCycle(rise="3st", start=0.5, end=0.25, anneal="linear", momentum_low=0.5).curves(clock)
    >>> [curves["lr"](step) for step in range(5)]
    [0.5, 0.75, 1.0, 0.625, 0.25]
    >>> [curves["momentum"](step) for step in range(5)]
    [1.0, 0.75, 0.5, 0.75, 1.0]
    """

    rise: DurationLike = "30%"
    start: float = 0.04
    end: float = 4e-6
    anneal: Literal["cosine", "linear"] = "cosine"
    three_phase: bool = False
    momentum_low: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_duration("rise")
        check_share(self.start, "start", "It is a share of the base value.")
        check_share(self.end, "end", "It is a share of the base value.")
        check_word(self.anneal, "anneal", ("cosine", "linear"))
        check_truth(self.three_phase, "three_phase")
        if self.momentum_low is not None:
            check_share(self.momentum_low, "momentum_low", "It is a share of the base momentum.")

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        return self._between(clock, steps, self.start, 1.0, self.start, self.end)

    def shapes(self, clock: Clock, steps: int | None) -> Mapping[str, Factor]:
        curves = super().shapes(clock, steps)
        if self.momentum_low is None:
            return curves
        return {**curves, "momentum": self._between(clock, steps, 1.0, self.momentum_low, 1.0, 1.0)}

    def _between(self, clock: Clock, steps: int | None, start: float, peak: float, back: float, end: float) -> Factor:
        """A curve through its values at the corners."""
        last, top = self._known(steps) - 1, max(self._within("rise", clock, self._known(steps)) - 1, 0)
        corners = [(0, start), (top, peak), (last, end)]
        if self.three_phase:
            if 2 * top > last:
                raise ConfigError(
                    f"{self.rise} there and as much back, as three_phase asks, is more than the {steps} steps after the warm-up.",
                    "rise",
                )
            corners.insert(2, (2 * top, back))
        fall, ways = _FALLS[self.anneal], list(pairwise(corners))

        def factor(step: int) -> float:
            at = min(step, last)
            (begin, before), (corner, value) = next(way for way in ways if at <= way[1][0])
            return value + (before - value) * fall((at - begin) / (corner - begin)) if corner > begin else value

        return factor


@dataclass(frozen=True, kw_only=True)
class Cyclic(Curve):
    """Triangles between the floor and the base value (Smith 2017, arXiv 1506.01186).

    A cycle rises over ``U`` steps and falls over ``D``: with ``u`` steps since it began, ``h = u / U`` while ``u <= U`` and
    ``h = (U + D - u) / D`` afterwards. Then ``factor(t) = h * s`` with ``s = 1`` (triangular), ``s = 1 / 2 ** cycle`` with cycles
    from 0 (triangular2), or ``s = gamma ** t`` (exp_range). It comes back to zero, so the floor scales it.

    Equal to torch's ``CyclicLR`` with ``max_lr = lr`` and ``base_lr = floor * lr``: here the base value is the **top**, so that all
    factors lie within 0 and 1. torch also cycles the momentum unless told otherwise; this does not.

    Args:
        floor: the foot of the triangles as a share of the base value. The paper (section 3.3) takes 1/3 or 1/4. With 0 the first
            step of each cycle trains with a learning rate of zero.
        rise: from the foot to the top. The paper takes 2 to 10 epochs.
        fall: from the top to the foot; ``None`` is as long as the rise.
        mode: ``triangular``, ``triangular2`` or ``exp_range``.
        gamma: of exp_range, per step; above 0 and at most 1.

    >>> factor = Cyclic(rise="2st", floor=0.5, mode="triangular2")(Clock(steps_per_epoch=5, total_steps=None))
    >>> [factor(step) for step in range(8)]
    [0.5, 0.75, 1.0, 0.75, 0.5, 0.625, 0.75, 0.625]
    """

    ends_at_zero: ClassVar[bool] = True

    floor: float = 0.25
    rise: DurationLike = "2ep"
    fall: DurationLike | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("rise", "fall"):
            if getattr(self, option) is not None:
                self._check_duration(option, f"a {option} of 0 steps has no meaning. Write a duration above zero.")
        check_word(self.mode, "mode", ("triangular", "triangular2", "exp_range"))
        check_share(self.gamma, "gamma", "It multiplies the height at each step.", above_zero=True)
        if self.gamma != 1 and self.mode != "exp_range":
            raise ConfigError(f"{self.gamma!r} has no effect in the mode {self.mode}, only in exp_range.", "gamma")

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        up = self._steps("rise", clock, steps, least=1)
        down = up if self.fall is None else self._steps("fall", clock, steps, least=1)
        halves, gamma = self.mode == "triangular2", self.gamma

        def factor(step: int) -> float:
            cycle, since = divmod(step, up + down)
            height = since / up if since <= up else (up + down - since) / down
            return height * (0.5**cycle if halves else gamma**step)

        return factor


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Curve):
    """Constant, and a cool-down at the end (Hägele et al. 2024, arXiv 2405.18392).

    With a cool-down of ``D`` steps and ``x = (t - (T - D)) / D``: ``factor(t) = 1`` while ``t < T - D``, then ``1 - x`` (linear),
    ``(1 + cos(pi x)) / 2`` (cosine) or ``1 - sqrt(x)`` (1-sqrt, the paper's best). It ends at zero, so the floor scales it.

    Equal to transformers' ``warmup_stable_decay`` with ``min_lr_ratio = floor``, except that its warm-up then begins at the ratio
    and not at zero; its ``decay_type`` is a cosine unless given.

    Args:
        decay: length of the cool-down. The paper mostly takes 20 % of training. One that rounds to no step is left out.
        decay_shape: ``linear``, ``cosine`` or ``1-sqrt``.

    >>> factor = WarmupStableDecay(decay="2st", decay_shape="linear")(Clock(steps_per_epoch=5, total_steps=4))
    >>> [factor(step) for step in range(5)]
    [1.0, 1.0, 1.0, 0.5, 0.0]
    """

    ends_at_zero: ClassVar[bool] = True

    decay: DurationLike = "20%"
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "1-sqrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_duration("decay", "a cool-down of 0 steps has no meaning. Write a duration above zero, or choose Constant.")
        check_word(self.decay_shape, "decay_shape", _FALLS)

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        end, fall = self._known(steps), _FALLS[self.decay_shape]
        decay = self._within("decay", clock, end)
        stable = end - decay
        return lambda step: fall((step - stable) / decay) if step > stable else 1.0


@dataclass(frozen=True, kw_only=True)
class REX(Curve):
    """Reflected exponential: flat first, steep at the end (Chen et al. 2021, arXiv 2107.04197).

    ``factor(t) = (1 - x) / (1 / 2 + (1 - x) / 2)`` with ``x = t / T``. It ends at zero, so the floor scales it.

    >>> factor = REX()(Clock(steps_per_epoch=5, total_steps=4))
    >>> [round(factor(step), 3) for step in range(5)]
    [1.0, 0.857, 0.667, 0.4, 0.0]
    """

    ends_at_zero: ClassVar[bool] = True

    def shape(self, clock: Clock, steps: int | None) -> Factor:
        end = self._known(steps)

        def factor(step: int) -> float:
            rest = 1 - step / end
            return rest / (0.5 + 0.5 * rest)

        return factor
