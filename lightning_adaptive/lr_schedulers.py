"""What steps a phase's learning rate, and other options of its groups: schedules as torch schedulers, and torch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, Required, TypedDict, cast

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_adaptive.durations import Clock, Duration, is_duration
from lightning_adaptive.errors import CheckpointError, ConfigError, ConfigTypeError, check_factory, did_you_mean, is_number, within
from lightning_adaptive.schedules import Constant, Plateau, Schedule

SchedulerFactory = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]
"""Optimizer to torch scheduler, for example ``functools.partial(StepLR, step_size=10)``."""

CURVE_NAME = "lr"
"""The one name under which `LearningRateMonitor` logs the learning rates of all phases."""


class SchedulerConfig(TypedDict, total=False):
    """Lightning's dictionary around a scheduler, with a `Schedule` or a factory where Lightning has the scheduler itself."""

    scheduler: Required[Schedule | SchedulerFactory]
    interval: Literal["step", "epoch"]
    frequency: int
    monitor: str
    strict: bool
    name: str


SchedulerLike = Schedule | SchedulerConfig | SchedulerFactory
"""What a user may give for a scheduler; ``None`` in its place is constant. jsonargparse takes the first that fits a dictionary."""

_KEYS = tuple(SchedulerConfig.__annotations__)
_OF_SCHEDULES = {"interval": "step", "frequency": 1, "name": CURVE_NAME}


class ScheduleLR(LambdaLR):
    """Steps a schedule's factors; its whole state is the step.

    The base values are the groups' own ``initial_lr``, and ``initial_<option>`` of every other option that is driven. They travel
    in the optimizer's state, so a value that was decided at run time survives a resume; the factors are closed form and come from
    the configuration.

    Args:
        optimizer: the optimizer whose groups are driven, all by the same factors.
        schedule: what gives the factors.
        clock: the phase's clock.
        since: steps for which the schedule had run when the phase began, of one that a switch continues.

    Raises:
        ConfigError: for an option that the optimizer does not have, that is no number, or whose base value is zero in every group.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, clock: Clock, since: int = 0) -> None:
        self.schedule = schedule
        self.since = since
        self.scale = 1.0
        """What a plateau has made of the base learning rates."""
        curves = dict(schedule.curves(replace(clock, first_step=clock.first_step - since)))
        self.factor = curves.pop("lr")
        self._others = curves
        for option in curves:
            _check_driven(option, optimizer)
        super().__init__(optimizer, self.factor)

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        self._drive_others()

    def get_lr(self) -> list[float | Tensor]:
        return self.lrs_at(self.last_epoch)

    def lrs_at(self, step: int) -> list[float | Tensor]:
        """Each group's learning rate at a step of the phase, 0-based."""
        factor = self.scale * self.factor(step + self.since)
        # A group that was added to the running optimizer has as its base what it was given.
        return [group.setdefault("initial_lr", group["lr"]) * factor for group in self.optimizer.param_groups]

    def values_at(self, step: int) -> list[dict[str, float]]:
        """The driven options that each group has, at a step of the phase."""
        values = [{"lr": float(lr)} for lr in self.lrs_at(step)]
        for option, index, _, value in self._others_at(step):
            values[index][option] = _first(value)
        return values

    def refresh(self) -> None:
        """Gives the groups the values of this step anew, after their base values were changed."""
        for group, lr in zip(self.optimizer.param_groups, self.lrs_at(self.last_epoch), strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        self._let_go_others()
        self._drive_others()
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _check_state(state_dict, self.state_dict(), self.schedule)
        self.last_epoch = state_dict["step"]
        self._step_count = self.last_epoch + 1
        self.refresh()

    def _others_at(self, step: int) -> Iterator[tuple[str, int, str, Any]]:
        """What is driven beside the learning rate: the option, a group's index, its key there, and its value at a step."""
        for option, factor in self._others.items():
            value = factor(step + self.since)
            for index, key, base in _bases(option, self.optimizer):
                yield option, index, key, (base[0] * value, *base[1:]) if key == "betas" else base * value

    def _drive_others(self) -> None:
        for _, index, key, value in self._others_at(self.last_epoch):
            self.optimizer.param_groups[index][key] = value

    def _let_go_others(self) -> None:
        """What the schedule of the checkpoint drove, and this one does not, is at its base value again."""
        driven = {(index, key) for _, index, key, _ in self._others_at(self.last_epoch)}
        for index, group in enumerate(self.optimizer.param_groups):
            for key in [key for key in group if f"initial_{key}" in group and key != "lr" and (index, key) not in driven]:
                group[key] = group.pop(f"initial_{key}")


class PlateauLR(ReduceLROnPlateau):
    """torch's ``ReduceLROnPlateau``, which scales the values that a `ScheduleLR` gives, and so goes with a warm-up.

    Its state is what it has seen and the scale; its options come from the configuration.

    Args:
        driven: what gives the learning rates, of a `Plateau`.
    """

    def __init__(self, driven: ScheduleLR) -> None:
        plateau = cast(Plateau, driven.schedule)
        self.driven = driven
        self.floor = plateau.floor
        super().__init__(
            driven.optimizer,
            mode=plateau.mode,
            factor=plateau.factor,
            patience=plateau.patience,
            threshold=plateau.threshold,
            threshold_mode=plateau.threshold_mode,
            cooldown=plateau.cooldown,
        )

    def _reduce_lr(self, epoch: int) -> None:
        self.driven.scale = max(self.driven.scale * self.factor, self.floor)
        self.driven.refresh()

    def state_dict(self) -> dict[str, Any]:
        seen = {name: getattr(self, name) for name in ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")}
        return {**seen, "scale": self.driven.scale}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        _check_state(state_dict, self.state_dict(), self.driven.schedule)
        seen = dict(state_dict)
        self.driven.scale = seen.pop("scale")
        vars(self).update(seen)
        self.driven.refresh()


def _check_state(saved: Mapping[str, Any], own: Mapping[str, Any], schedule: Schedule) -> None:
    if saved.keys() != own.keys():
        raise CheckpointError(
            f"the checkpoint holds the state of another scheduler than {schedule}: {', '.join(saved)}. Resume with the scheduler "
            "of the run that wrote it, or let a switch lead to the new one."
        )


def build_scheduler(scheduler: SchedulerLike | None, optimizer: Optimizer, clock: Clock, since: int = 0) -> list[dict[str, Any]]:
    """Lightning's dictionaries around an optimizer's schedulers: one, and of a `Plateau` a second, which watches its metric.

    Args:
        scheduler: a `Schedule`, a factory of a torch scheduler, Lightning's dictionary around either, or ``None`` for constant.
        optimizer: the optimizer.
        clock: the phase's clock.
        since: steps for which a schedule that is continued had run when the phase began.

    Raises:
        ConfigError: for a dictionary with keys that are unknown or have no meaning, and for a duration that cannot be counted.
        ConfigTypeError: for what is not a scheduler.
    """
    options: dict[str, Any] = {}
    if isinstance(scheduler, Mapping):
        options = dict(scheduler)
        for key in options:
            if key not in _KEYS:
                raise ConfigError(f"unknown key. Allowed: {', '.join(_KEYS)}." + did_you_mean(key, _KEYS), f"scheduler.{key}")
        if "scheduler" not in options:
            raise ConfigError("a dictionary needs the key 'scheduler' with a Schedule or a factory.", "scheduler")
        scheduler = options.pop("scheduler")
    if scheduler is None:
        scheduler = Constant()
    check_factory(scheduler, LRScheduler, "scheduler")
    if isinstance(scheduler, Schedule):
        return _of_schedule(scheduler, optimizer, clock, since, options)
    with within("scheduler"):
        factory, counted = _counted(cast(SchedulerFactory, scheduler), clock)
    built = factory(optimizer)
    if not isinstance(built, LRScheduler | ReduceLROnPlateau):
        raise ConfigTypeError(f"the factory returned a {type(built).__name__}, not a scheduler of torch.", "scheduler")
    plateau = isinstance(built, ReduceLROnPlateau)
    if plateau and not options.get("monitor"):
        raise ConfigError("ReduceLROnPlateau needs the name of a metric. Add the key monitor.", "scheduler.monitor")
    if counted and options.get("interval") == "epoch":
        raise ConfigError("durations are counted in steps, so the scheduler is stepped at each. Write step.", "scheduler.interval")
    defaults = {"interval": "step" if counted else "epoch", "frequency": 1, "name": CURVE_NAME, "reduce_on_plateau": plateau}
    return [{**defaults, **options, "scheduler": built}]


def describe_schedule(scheduler: LRScheduler | ReduceLROnPlateau | None) -> str:
    """A scheduler in words: a `Schedule` with its options, or the class's name."""
    if scheduler is None:
        return "constant"
    return str(scheduler.schedule) if isinstance(scheduler, ScheduleLR) else type(scheduler).__name__


def _of_schedule(
    schedule: Schedule, optimizer: Optimizer, clock: Clock, since: int, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    for key, value in options.items():
        if key != "name" and value != _OF_SCHEDULES.get(key):
            raise ConfigError(
                f"{value!r} is for a factory of a torch scheduler. {type(schedule).__name__} is stepped at each optimizer step; "
                "what it looks at and how often are options of its own.",
                f"scheduler.{key}",
            )
    if any("lr" not in group for group in optimizer.param_groups):
        raise ConfigError(
            f"{type(optimizer).__name__} has no learning rate (lr) to schedule. Choose another optimizer.", "optimizer"
        )
    betas: Any = next((group["betas"] for group in optimizer.param_groups if "betas" in group), ())
    with within("scheduler"):
        if len(betas) > 1:
            schedule = schedule.with_untuned_warmup(float(betas[1]))
        driven = ScheduleLR(optimizer, schedule, clock, since)
    found: list[dict[str, Any]] = [{**_OF_SCHEDULES, "reduce_on_plateau": False, **options, "scheduler": driven}]
    if isinstance(schedule, Plateau):
        watch = {"interval": schedule.interval, "frequency": schedule.frequency, "monitor": schedule.monitor}
        found.append({"reduce_on_plateau": True, "name": "plateau", **watch, "scheduler": PlateauLR(driven)})
    return found


def _counted(factory: SchedulerFactory, clock: Clock) -> tuple[SchedulerFactory, bool]:
    """A factory whose durations, ``T_max="100%"`` of the steps that remain, are steps; and whether there were any."""
    if not isinstance(factory, functools.partial):
        return factory, False
    counted = {}
    for name, value in factory.keywords.items():
        items = value if isinstance(value, list | tuple) else [value]
        if items and all(is_duration(item) for item in items):
            steps = [Duration.parse(item).steps(clock, clock.remaining_steps, key=name) for item in items]
            counted[name] = steps if isinstance(value, list | tuple) else steps[0]
    return (functools.partial(factory, **counted), True) if counted else (factory, False)


def _check_driven(option: str, optimizer: Optimizer) -> None:
    name, found = type(optimizer).__name__, [base for _, _, base in _bases(option, optimizer)]
    if not found:
        bases = {f"initial_{key}" for group in optimizer.param_groups for key in group}
        keys = dict.fromkeys(key for group in optimizer.param_groups for key in (*group, "momentum") if _key(key, group))
        known = [key for key in keys if key != "lr" and key not in bases]
        advice = did_you_mean(option, known) or (" momentum stands for beta1." if option in ("beta1", "betas") else "")
        raise ConfigError(f"{name} has no number {option!r} to drive.{advice} Numbers: {', '.join(known)}.")
    if not any(_first(base) for base in found):
        raise ConfigError(f"{option} of {name} is 0 in every group, so a schedule of it does nothing.")


def _bases(option: str, optimizer: Optimizer) -> Iterator[tuple[int, str, Any]]:
    """Of each group that has the option: its index, its key, and the base value."""
    for index, group in enumerate(optimizer.param_groups):
        if key := _key(option, group):
            yield index, key, group.setdefault(f"initial_{key}", group[key])


def _key(option: str, group: Mapping[str, Any]) -> str | None:
    """Under which key a group has an option that is a number; the momentum of one with betas is the first of them."""
    if option == "momentum" and isinstance(group.get("betas"), tuple | list) and group["betas"]:
        return "betas"
    return option if is_number(group.get(option)) else None


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, tuple | list) else value)
