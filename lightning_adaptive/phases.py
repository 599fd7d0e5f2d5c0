"""A phase: optimizer, schedule and parameter groups, built together and replaced together."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_adaptive import partitions
from lightning_adaptive.combined import OptimizerFactory, class_name, part_of_each_group, parts
from lightning_adaptive.durations import Clock
from lightning_adaptive.errors import ConfigError, ConfigTypeError, within
from lightning_adaptive.lr_schedulers import SchedulerLike, build_scheduler
from lightning_adaptive.partitions import OptimizerGroup, Partition


@dataclass(frozen=True)
class Phase:
    """One built phase.

    Args:
        optimizer: the optimizer, a plain one of the ecosystem.
        lr_schedulers: Lightning's dictionaries around the optimizer's schedulers: one that gives its learning rates, and where
            that is a plateau's, one that watches the metric.
        notes: lines about what was decided while building, for the user.
    """

    optimizer: Optimizer
    lr_schedulers: Sequence[dict[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def lr_scheduler(self) -> LRScheduler | ReduceLROnPlateau:
        """What gives the learning rates."""
        scheduler: LRScheduler | ReduceLROnPlateau = self.lr_schedulers[0]["scheduler"]
        return scheduler

    def configuration(self) -> dict[str, Any] | tuple[list[Optimizer], list[dict[str, Any]]]:
        """What ``LightningModule.configure_optimizers`` returns for this phase; its dictionary has room for one scheduler."""
        if len(self.lr_schedulers) > 1:
            return [self.optimizer], list(self.lr_schedulers)
        return {"optimizer": self.optimizer, "lr_scheduler": self.lr_schedulers[0]}


def build(
    optimizer: OptimizerFactory,
    scheduler: SchedulerLike | None,
    partition: Partition,
    tensors: Mapping[str, Tensor],
    clock: Clock,
    since: int = 0,
) -> Phase:
    """Builds a phase for given parameters.

    Args:
        optimizer: factory of the optimizer; it gets the parameters of the partition and nothing else.
        scheduler: a `Schedule`, a factory of a torch scheduler, Lightning's dictionary around either, or ``None`` for constant.
        partition: the groups, by parameter name.
        tensors: the parameters by name.
        clock: steps of the training and the phase's first step.
        since: steps for which the schedule had run when the phase began, of one that a switch continues.

    Raises:
        ConfigError: when the optimizer cannot express the partition, has no learning rate to schedule, or a duration of the
            schedule cannot be counted.
        ConfigTypeError: when a factory returns something else.
    """
    built, notes = build_optimizer(optimizer, partition, tensors)
    return Phase(built, build_scheduler(scheduler, built, clock, since), notes)


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in the optimizer's state on this process."""
    return sum(value.numel() * value.element_size() for state in optimizer.state.values() for value in _tensors(state))


def planned_state_bytes(optimizer: Optimizer) -> int | None:
    """Bytes that the optimizer's state will have, of whole parameters on one process; ``None`` where only a real step can say.

    A copy of it takes a step on parameters that have a shape and no memory; where its step reads values, on small ones that have.
    """
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"] if not is_lazy(tensor)]
    small = sum(tensor.numel() for tensor in tensors) <= 1_000_000
    for device in ("meta", "cpu") if small else ("meta",):
        try:
            copied = copy.deepcopy(optimizer, {id(tensor): _twin(tensor, device) for tensor in tensors})
            copied.step()
        except Exception:  # noqa: BLE001, S112 - other people's optimizers may raise anything; a plan does without this number
            continue
        return state_bytes(copied)
    return None


def _twin(tensor: Tensor, device: str) -> torch.nn.Parameter:
    twin = torch.nn.Parameter(torch.zeros_like(tensor, device=device))
    twin.grad = torch.zeros_like(twin)
    return twin


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
    try:
        optimizer, has_groups = _made(factory, partition, lists)
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
    _PARTITIONS[optimizer] = partition
    if has_groups:
        _impose(optimizer, partition)
        return optimizer, ()
    _refuse_unequal(optimizer, partition)
    return optimizer, (f"{type(optimizer).__name__} has no parameter groups: {len(lists)} groups became one",)


def _made(factory: OptimizerFactory, partition: Partition, lists: Sequence[list[Tensor]]) -> tuple[Optimizer, bool]:
    """What a factory makes of the groups, and whether it has them: a class that takes none gets one flat one."""
    if len(lists) == 1 and partition[0].name is None:
        return factory(lists[0]), True
    names = [{} if group.name is None else {"name": group.name} for group in partition]
    try:
        return factory([{"params": parameters, **name} for parameters, name in zip(lists, names, strict=True)]), True
    except ValueError as error:
        try:
            return factory([tensor for parameters in lists for tensor in parameters]), False
        except ValueError:
            raise error from None  # the groups were not its trouble


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
    return recorded if built is None else partitions.keep_zero_decays(recorded, built)


def record(optimizer: Optimizer, groups: Sequence[OptimizerGroup], names: Mapping[int, str]) -> Partition:
    """The partition of an optimizer as it is now; arguments as of `inheritable`."""
    return partitions.record(groups, names, [id(part) for part in part_of_each_group(optimizer)])


def _impose(optimizer: Optimizer, partition: Partition) -> None:
    steppers = part_of_each_group(optimizer)
    for part, group, recorded in zip(steppers, optimizer.param_groups, partition, strict=True):
        if recorded.has_own_lr and "lr" not in group:
            raise ConfigError(f"{type(part).__name__} has no learning rate, so groups cannot have their own.", "param_groups")
    with within("param_groups"):
        partitions.impose(optimizer.param_groups, partition)
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


def _refuse_unequal(optimizer: Optimizer, partition: Partition) -> None:
    name = type(optimizer).__name__
    for group in partition:
        if group.rule and (group.has_own_lr or group.options):
            raise ConfigError(
                f"{name} has no parameter groups, so none can have options of its own. Choose another optimizer, or leave the rule "
                "out.",
                f"param_groups.{group.name}",
            )
    if len({group.lr_ratio for group in partition}) > 1:
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


def describe(optimizer: Optimizer) -> str:
    """The optimizer's class with its learning rates, for a person.

    >>> import torch
    >>> describe(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    'SGD lr 1.0e-01'
    """
    return f"{class_name(optimizer)} lr {format_lrs(lrs(optimizer))}"


def lrs(optimizer: Optimizer) -> list[float]:
    """The current learning rate of each group that has one."""
    return [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]


def format_lrs(values: Iterable[float]) -> str:
    """Learning rates in words, each once; of many, the least and the greatest; of none a dash.

    >>> format_lrs([0.1, 0.1]), format_lrs([0.1, 0.01]), format_lrs([0.1, 0.2, 0.3, 0.4, 0.5])
    ('1.0e-01', '1.0e-01/1.0e-02', '1.0e-01..5.0e-01')
    """
    values = list(values)
    words = list(dict.fromkeys(f"{value:.1e}" for value in values)) or ["-"]
    return "/".join(words) if len(words) <= 4 else f"{min(values):.1e}..{max(values):.1e}"


def format_bytes(count: int) -> str:
    """A number of bytes for a person.

    >>> format_bytes(304_000), format_bytes(12)
    ('304.0 KB', '12 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
