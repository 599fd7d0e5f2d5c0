"""What a checkpoint says of the run that wrote it, in plain values, and how a resumed run differs from it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_adaptive.combined import CombinedOptimizer, part_of_each_group, parts
from lightning_adaptive.partitions import group_names
from lightning_adaptive.schedules import Schedule

Settings = dict[str, Any]
"""Plain values by key, as a user would type the key where there is one."""


class Change(NamedTuple):
    """A setting that differs: its key, the checkpoint's value and the run's; ``None`` stands for the default."""

    key: str
    saved: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.saved)} in the checkpoint, {_shown(self.now)} in this run"


def of_optimizer(optimizer: Optimizer, key: str) -> Settings:
    """An optimizer's class, and its options where they differ from the class's defaults; of several for groups each's."""
    if isinstance(optimizer, CombinedOptimizer):
        inner = [of_optimizer(part, f"{key}.{rest}") for rest, part in parts(optimizer).items()]
        return {key: type(optimizer).__name__, **{name: value for settings in inner for name, value in settings.items()}}
    parameters = inspect.signature(type(optimizer)).parameters
    options = {name: _plain(value) for name, value in optimizer.defaults.items()}
    defaults = {name: _plain(parameter.default) for name, parameter in parameters.items()}
    changed = {f"{key}.{name}": value for name, value in options.items() if name not in defaults or value != defaults[name]}
    return {key: type(optimizer).__name__, **changed}


def of_groups(optimizer: Optimizer, key: str) -> Settings:
    """Of several groups, the options by which each differs from the optimizer's own, without what a schedule made of them."""
    groups = optimizer.param_groups
    if len(groups) == 1:
        return {}
    return {
        f"{key}.{of}.{name}": _plain(value)
        for of, group, part in zip(group_names(groups), groups, part_of_each_group(optimizer), strict=True)
        for name, default in part.defaults.items()
        if name in group and _plain(value := group.get(f"initial_{name}", group[name])) != _plain(default)
    }


def of_scheduler(scheduler: Any) -> str:
    """A schedule or a factory of schedulers in words, with its options."""
    if scheduler is None:
        return "constant"
    if isinstance(scheduler, Schedule):
        return str(scheduler)
    if isinstance(scheduler, Mapping):
        rest = {name: value for name, value in scheduler.items() if name != "scheduler"}
        return ", ".join([of_scheduler(scheduler.get("scheduler")), *(f"{name} {value}" for name, value in sorted(rest.items()))])
    if isinstance(scheduler, functools.partial):
        # A factory of LightningCLI's is a function with the class as its argument, and spells out all of the class's options.
        made = next((given for given in scheduler.args if inspect.isclass(given)), scheduler.func)
        defaults = {name: parameter.default for name, parameter in inspect.signature(made).parameters.items()}
        options = {name: value for name, value in sorted(scheduler.keywords.items()) if value != defaults.get(name, made)}
        return ", ".join([of_scheduler(made), *(f"{name} {_plain(value)}" for name, value in options.items())])
    return getattr(scheduler, "__name__", type(scheduler).__name__)


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """The settings that differ, in the order of this run, those that it does not have last."""
    keys = [*now, *(key for key in saved if key not in now)]
    return [Change(key, saved.get(key), now.get(key)) for key in keys if saved.get(key) != now.get(key)]


def listed(found: Iterable[Change]) -> str:
    """The changes, a line each."""
    return "\n".join(f"  {change}" for change in found)


def _plain(value: Any) -> Any:
    """What a checkpoint may hold: numbers, words, and lists of them."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _shown(value: Any) -> str:
    return "default" if value is None else str(value)
