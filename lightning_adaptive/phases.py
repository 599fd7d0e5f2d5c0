"""A phase: optimizer, schedule and parameter groups, built together and replaced together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Required, TypedDict, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from lightning_adaptive import param_groups
from lightning_adaptive.combined import OptimizerFactory, class_name, part_of_each_group, parts
from lightning_adaptive.durations import Clock
from lightning_adaptive.errors import ConfigError, ConfigTypeError, check_factory, did_you_mean
from lightning_adaptive.param_groups import OptimizerGroup, Partition
from lightning_adaptive.schedules import Constant, Schedule

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


_SCHEDULER_KEYS = tuple(SchedulerConfig.__annotations__)


class ScheduleLR(LambdaLR):
    """Steps a schedule's factor; its whole state is the step.

    The base values are the groups' own ``initial_lr``, which travel in the optimizer's state, so a learning rate that was
    decided at run time survives a resume; the factor is closed form and comes from the configuration.

    Args:
        optimizer: the optimizer whose groups are driven, all by the same factor.
        schedule: what gives the factor.
        clock: the phase's clock.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, clock: Clock) -> None:
        self.schedule = schedule
        self.factor = schedule(clock)
        super().__init__(optimizer, self.factor)

    def get_lr(self) -> list[float | Tensor]:
        return self.lrs_at(self.last_epoch)

    def lrs_at(self, step: int) -> list[float | Tensor]:
        """Each group's learning rate at a step of the phase, 0-based."""
        factor = self.factor(step)
        # A group that was added to the running optimizer has as its base what it was given.
        return [group.setdefault("initial_lr", group["lr"]) * factor for group in self.optimizer.param_groups]

    def refresh(self) -> None:
        """Gives the groups the learning rates of this step anew, after their base values were changed."""
        for group, lr in zip(self.optimizer.param_groups, self.lrs_at(self.last_epoch), strict=True):
            group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["step"]
        self._step_count = self.last_epoch + 1
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


@dataclass(frozen=True)
class Phase:
    """One built phase.

    Args:
        optimizer: the optimizer, a plain one of the ecosystem.
        lr_scheduler: Lightning's dictionary around the optimizer's scheduler.
        notes: lines about what was decided while building, for the user.
    """

    optimizer: Optimizer
    lr_scheduler: dict[str, Any]
    notes: tuple[str, ...] = ()

    def configuration(self) -> dict[str, Any]:
        """What ``LightningModule.configure_optimizers`` returns for this phase."""
        return {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler}


def build(
    optimizer: OptimizerFactory,
    scheduler: Schedule | SchedulerFactory | SchedulerConfig | None,
    partition: Partition,
    tensors: Mapping[str, Tensor],
    clock: Clock,
) -> Phase:
    """Builds a phase for given parameters.

    Args:
        optimizer: factory of the optimizer; it gets the parameters of the partition and nothing else.
        scheduler: a `Schedule`, a factory of a torch scheduler, Lightning's dictionary around either, or ``None`` for constant.
        partition: the groups, by parameter name.
        tensors: the parameters by name.
        clock: steps of the training and the phase's first step.

    Raises:
        ConfigError: when the optimizer cannot express the partition, has no learning rate to schedule, or a duration of the
            schedule cannot be counted.
        ConfigTypeError: when a factory returns something else.
    """
    built, notes = build_optimizer(optimizer, partition, tensors)
    return Phase(built, _scheduler(scheduler, built, clock), notes)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in the optimizer's state on this process."""
    return sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in _tensors(state))


def _tensors(state: Any) -> Iterable[Tensor]:
    if isinstance(state, Tensor):
        yield getattr(state, "to_local", lambda: state)()  # of a DTensor what lies on this process
    elif isinstance(state, Mapping):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def build_optimizer(
    factory: OptimizerFactory, partition: Partition, tensors: Mapping[str, Tensor]
) -> tuple[Optimizer, tuple[str, ...]]:
    """Builds a phase's optimizer alone, with lines about what was decided; arguments and errors as of `build`."""
    lists = [[tensors[name] for name in group.parameters] for group in partition]
    if not any(lists):
        raise ConfigError("there is nothing to train: no parameter requires a gradient.", "optimizer")
    notes: tuple[str, ...] = ()
    grouped = True
    try:
        if len(lists) == 1 and partition[0].name is None:
            optimizer = factory(lists[0])
        else:
            names = [{} if group.name is None else {"name": group.name} for group in partition]
            try:
                optimizer = factory([{"params": parameters, **name} for parameters, name in zip(lists, names, strict=True)])
            except ValueError as error:
                optimizer = _without_groups(factory, lists, error)
                grouped = False
                notes = (f"{type(optimizer).__name__} has no parameter groups: {len(lists)} groups became one",)
    except ConfigError as error:
        raise error.within("optimizer") from error.__cause__
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot be built: {error}", "optimizer") from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigTypeError(f"the factory returned a {type(optimizer).__name__}, not a torch.optim.Optimizer.", "optimizer")
    for key, part in parts(optimizer).items():
        if any(group["lr"] is None for group in part.param_groups if "lr" in group):
            name = ".".join(filter(None, ("optimizer", key, "lr")))
            raise ConfigError(f"{type(part).__name__} has no learning rate (lr is None). Give it one.", name)
    if grouped:
        _impose(optimizer, partition)
    else:
        _refuse_unequal(optimizer, partition)
    _PARTITIONS[optimizer] = partition
    return optimizer, notes


_PARTITIONS: WeakKeyDictionary[Optimizer, Partition] = WeakKeyDictionary()


def partition_of(optimizer: Optimizer) -> Partition | None:
    """The partition that an optimizer was built for; ``None`` when it was built elsewhere."""
    return _PARTITIONS.get(optimizer)


def inheritable(optimizer: Optimizer, groups: Sequence[OptimizerGroup], names: Mapping[int, str]) -> Partition:
    """What a later phase inherits of an optimizer: its partition as it is recorded, with the zero decays that rules asked for.

    Args:
        optimizer: a running or a new one.
        groups: its groups, with the module's own parameters.
        names: parameter names by ``id``.
    """
    recorded, built = record(optimizer, groups, names), partition_of(optimizer)
    return recorded if built is None else param_groups.keep_zero_decays(recorded, built)


def record(optimizer: Optimizer, groups: Sequence[OptimizerGroup], names: Mapping[int, str]) -> Partition:
    """The partition of an optimizer as it is now; arguments as of `inheritable`."""
    return param_groups.record(groups, names, [id(part) for part in part_of_each_group(optimizer)])


def _impose(optimizer: Optimizer, partition: Partition) -> None:
    steppers = part_of_each_group(optimizer)
    for part, group, recorded in zip(steppers, optimizer.param_groups, partition, strict=True):
        if recorded.has_own_lr and "lr" not in group:
            raise ConfigError(f"{type(part).__name__} has no learning rate, so groups cannot have their own.", "param_groups")
    try:
        param_groups.impose(optimizer.param_groups, partition)
    except ConfigError as error:
        raise error.within("param_groups") from None
    for part, group, recorded in zip(steppers, optimizer.param_groups, partition, strict=True):
        if recorded.options:
            known = inspect.signature(type(part)).parameters
            options = {option: value for option, value in group.items() if option in known and option != "params"}
            check_options(type(part), options, f"param_groups.{recorded.name or next(iter(recorded.options))}")


def check_options(cls: type[Optimizer], options: Mapping[str, Any], key: str) -> None:
    """Builds one of torch's optimizers for a single weight: its constructor refuses bad values, and groups are not asked.

    Other people's optimizers may need more than a weight, and are first built for the model.

    Args:
        cls: a class of torch's; others pass.
        options: its options.
        key: the config key that holds them.

    Raises:
        ConfigError: for options that it refuses.
    """
    if not cls.__module__.startswith("torch."):
        return
    try:
        cls([torch.nn.Parameter(torch.zeros(1, 1))], **options)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{cls.__name__} cannot be built: {str(error).rstrip('.')}.", key) from error


def _without_groups(factory: OptimizerFactory, lists: Sequence[list[Tensor]], error: ValueError) -> Optimizer:
    """One flat group for a class that takes no groups; if it refuses that too, the groups were not its trouble."""
    try:
        return factory([tensor for parameters in lists for tensor in parameters])
    except ValueError:
        raise error from None


def _refuse_unequal(optimizer: Optimizer, partition: Partition) -> None:
    name = type(optimizer).__name__
    for group in partition:
        if group.rule and (group.has_own_lr or group.options):
            raise ConfigError(
                f"{name} has no parameter groups, so none can have options of its own. Choose another optimizer, or leave the rule "
                "out.",
                f"param_groups.{group.name}",
            )
    if not param_groups.is_uniform(partition):
        ratios = ", ".join(f"{group.lr_ratio:g}" for group in partition)
        raise ConfigError(
            f"{name} has no parameter groups, and the running groups' learning rates differ (ratios {ratios}). "
            "Choose another optimizer, or give the switch param_groups=ParamGroups() for one group.",
            "optimizer",
        )
    if optimizer.param_groups[0].get("weight_decay") and any(recorded.no_decay for recorded in partition):
        raise ConfigError(
            f"{name} has no parameter groups, and its weight decay would reach groups that are kept free of it. Set it to 0.",
            "optimizer.weight_decay",
        )


def _scheduler(
    scheduler: Schedule | SchedulerFactory | SchedulerConfig | None, optimizer: Optimizer, clock: Clock
) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if isinstance(scheduler, Mapping):
        options = dict(scheduler)
        for key in options:
            if key not in _SCHEDULER_KEYS:
                raise ConfigError(
                    f"unknown key. Allowed: {', '.join(_SCHEDULER_KEYS)}." + did_you_mean(key, _SCHEDULER_KEYS), f"scheduler.{key}"
                )
        if "scheduler" not in options:
            raise ConfigError("a dictionary needs the key 'scheduler' with a Schedule or a factory.", "scheduler")
        scheduler = options.pop("scheduler")
    if scheduler is None:
        scheduler = Constant()
    check_factory(scheduler, LRScheduler, "scheduler")
    if isinstance(scheduler, Schedule):
        betas = optimizer.param_groups[0].get("betas")
        try:
            if isinstance(betas, tuple | list) and len(betas) > 1:
                scheduler = scheduler.with_untuned_warmup(float(betas[1]))
            others = [option for option in scheduler.curves(clock) if option != "lr"]
            if others:
                raise ConfigError(f"a schedule of {', '.join(others)} is not available yet, only one of the learning rate.")
            built: LRScheduler | ReduceLROnPlateau = ScheduleLR(optimizer, scheduler, clock)
        except ConfigError as error:
            raise error.within("scheduler") from None
    else:
        built = cast(SchedulerFactory, scheduler)(optimizer)
    if not isinstance(built, LRScheduler | ReduceLROnPlateau):
        raise ConfigTypeError(f"the factory returned a {type(built).__name__}, not a scheduler of torch.", "scheduler")
    plateau = isinstance(built, ReduceLROnPlateau)
    if plateau and not options.get("monitor"):
        raise ConfigError("ReduceLROnPlateau needs the name of a metric. Add the key monitor.", "scheduler.monitor")
    interval = "step" if isinstance(built, ScheduleLR) else "epoch"
    defaults = {"interval": interval, "frequency": 1, "name": CURVE_NAME, "reduce_on_plateau": plateau}
    return {**defaults, **options, "scheduler": built}


def describe_schedule(scheduler: LRScheduler | ReduceLROnPlateau | None) -> str:
    """A scheduler in words: a `Schedule` with its options, or the class's name."""
    if scheduler is None:
        return "constant"
    return str(scheduler.schedule) if isinstance(scheduler, ScheduleLR) else type(scheduler).__name__


def describe(optimizer: Optimizer) -> str:
    """The optimizer's class with its learning rates, for a person.

    >>> import torch
    >>> describe(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    'SGD lr 1.0e-01'
    """
    return f"{class_name(optimizer)} lr {format_lrs(lrs(optimizer))}"


def lrs(optimizer: Optimizer) -> list[float]:
    """Each group's current learning rate."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def format_lrs(values: Iterable[float]) -> str:
    """Learning rates in words, each once.

    >>> format_lrs([0.1, 0.1]), format_lrs([0.1, 0.01])
    ('1.0e-01', '1.0e-01/1.0e-02')
    """
    return "/".join(dict.fromkeys(f"{value:.1e}" for value in values))
