"""Several optimizers for the groups of one phase, which are one optimizer to everything around them."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_adaptive.errors import ConfigError, ConfigTypeError, check_factory, did_you_mean
from lightning_adaptive.partitions import DEFAULT, OptimizerGroup

OptimizerFactory = Callable[[Iterable], Optimizer]
"""Parameters (or group dicts) to optimizer, for example ``functools.partial(torch.optim.SGD, lr=0.1)``."""


class CombinedOptimizer(Optimizer):
    """Several optimizers, each for the parameter groups of its name, as one: Muon for hidden matrices, AdamW for the rest.

    They share its groups and its state, so its ``state_dict`` is that of one plain optimizer with these groups, and schedulers
    drive each group on its own base learning rate. A step evaluates the closure once and then steps each of them.

    Args:
        params: group dicts, each with its ``name``.
        optimizers: a factory for the groups of each name; ``None`` leaves one out. The one called ``default`` gets every group
            that has no optimizer of its name.

    Raises:
        ConfigError: for groups without names, an optimizer whose name no group has, a group that no optimizer takes, and an
            optimizer that cannot be built, needs the closure itself (L-BFGS), or loads its state in a way of its own.
        ConfigTypeError: for what is no mapping of factories.

    >>> from functools import partial
    >>> import torch
    >>> matrix, bias = torch.zeros(2, 2), torch.zeros(2)
    >>> groups = [{"params": [matrix], "name": "hidden"}, {"params": [bias], "name": "biases"}]
    >>> factories = {"hidden": partial(torch.optim.Muon, lr=0.02), "default": partial(torch.optim.AdamW, lr=3e-4)}
    >>> [group["lr"] for group in CombinedOptimizer(groups, factories).param_groups]
    [0.02, 0.0003]
    """

    optimizers: dict[str, Optimizer]

    def __init__(self, params: Iterable, optimizers: Mapping[str, OptimizerFactory | None]) -> None:
        groups, factories = _named(params), given(optimizers)
        takers = [_taker(group["name"], factories) for group in groups]
        for name in factories:
            if name not in takers:
                raise _idle(name, [str(group["name"]) for group in groups])
        self.optimizers = {
            name: _built(factories[name], [group for group, taker in zip(groups, takers, strict=True) if taker == name], name)
            for name in dict.fromkeys(takers)
        }
        self._takers: list[str] = []
        built = {name: iter(part.param_groups) for name, part in self.optimizers.items()}
        super().__init__([next(built[taker]) for taker in takers], {})
        self._share_state()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the optimizer of its name."""
        taker = _taker(param_group.get("name"), self.optimizers)
        part = self.optimizers[taker]
        super().add_param_group(param_group)
        if all(group is not param_group for group in part.param_groups):  # those of the constructor are there already
            try:
                part.add_param_group(param_group)
            except BaseException:
                self.param_groups.pop()
                raise
            self.param_groups[-1] = part.param_groups[-1]
        self._takers.append(taker)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluates the loss once, if there is a closure, and steps each optimizer."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.optimizers.values():
            part.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        bare = {name: _bare(part) for name, part in self.optimizers.items()}
        return {**super().__getstate__(), "optimizers": bare, "_takers": self._takers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also the end of ``load_state_dict``, which makes new groups and a new state."""
        super().__setstate__(state)
        for name, part in self.optimizers.items():
            groups = [group for group, taker in zip(self.param_groups, self._takers, strict=True) if taker == name]
            tensors = [tensor for group in groups for tensor in group["params"] if tensor in self.state]
            # Its own state alone: Adagrad takes every state that it finds for one of its own, and completes it.
            own = defaultdict(dict, {tensor: self.state[tensor] for tensor in tensors})
            part.__setstate__({"state": own, "param_groups": groups})
        self._share_state()

    def _share_state(self) -> None:
        for part in self.optimizers.values():
            self.state.update(part.state)
            part.state = self.state

    def __repr__(self) -> str:
        return "".join([f"{type(self).__name__} (", *(f"\n{name}: {part!r}" for name, part in self.optimizers.items()), "\n)"])


def given(optimizers: Any) -> dict[str, Any]:
    """Optimizers by name, without those that are left out.

    Raises:
        ConfigTypeError: for anything but a mapping.
    """
    if not isinstance(optimizers, Mapping):
        raise ConfigTypeError(
            f"{optimizers!r} is no mapping. Give an optimizer for each name of a group, and one called {DEFAULT} for the others.",
            "optimizers",
        )
    return {str(name): optimizer for name, optimizer in optimizers.items() if optimizer is not None}


def parts(optimizer: Optimizer) -> dict[str, Optimizer]:
    """What steps, by the rest of its key: the members of a `CombinedOptimizer`, ``optimizers.hidden``; or the optimizer by none."""
    if not isinstance(optimizer, CombinedOptimizer):
        return {"": optimizer}
    return {f"optimizers.{name}": part for name, part in optimizer.optimizers.items()}


def part_of_each_group(optimizer: Optimizer) -> list[Optimizer]:
    """What steps a group, for each group: a member of a `CombinedOptimizer`, or the optimizer itself."""
    if not isinstance(optimizer, CombinedOptimizer):
        return [optimizer] * len(optimizer.param_groups)
    return [optimizer.optimizers[taker] for taker in optimizer._takers]


def class_name(optimizer: Optimizer) -> str:
    """The optimizer's class; of several for groups each, in the order of the groups.

    >>> class_name(torch.optim.SGD([torch.zeros(1)]))
    'SGD'
    """
    if not isinstance(optimizer, CombinedOptimizer):
        return type(optimizer).__name__
    return "+".join(f"{type(part).__name__}({name})" for name, part in optimizer.optimizers.items())


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step evaluates the loss itself, as L-BFGS does."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def _named(params: Iterable) -> list[OptimizerGroup]:
    groups = list(params)
    if not groups or not all(isinstance(group, Mapping) and group.get("name") for group in groups):
        raise ConfigError(
            "several optimizers need parameter groups by name, one for each. Choose param_groups=muon, or write rules: "
            "ParamGroups(hidden={...})."
        )
    return [dict(group) for group in groups]


def _taker(name: str | None, optimizers: Mapping[str, Any]) -> str:
    """The name of the optimizer that takes a group."""
    taker = name if name in optimizers else DEFAULT
    if taker not in optimizers:
        raise ConfigError(
            f"none takes the group {name!r}. Add one of this name, or one called {DEFAULT} for all groups without one.",
            "optimizers",
        )
    return str(taker)


def _idle(name: str, groups: Sequence[str]) -> ConfigError:
    if name == DEFAULT:
        return ConfigError(
            "every group has an optimizer of its name, so none is left for this one. Leave it out.", f"optimizers.{name}"
        )
    return ConfigError(
        f"no parameter group has this name.{did_you_mean(name, groups)} Groups: {', '.join(groups)}.", f"optimizers.{name}"
    )


def _built(factory: OptimizerFactory, groups: list[OptimizerGroup], name: str) -> Optimizer:
    key = f"optimizers.{name}"
    check_factory(factory, Optimizer, key)
    try:
        part = factory(groups)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot be built: {error}", key) from error
    if not isinstance(part, Optimizer):
        raise ConfigTypeError(f"the factory returned a {type(part).__name__}, not a torch.optim.Optimizer.", key)
    _check_part(part, len(groups), key)
    return part


def _check_part(part: Optimizer, group_count: int, key: str) -> None:
    """Refuses what would not step or load as it does alone."""
    cls = type(part)
    faults = {
        "evaluates the loss itself": needs_closure(part),
        "holds several itself": isinstance(part, CombinedOptimizer),
        "makes other groups of those that it is given": len(part.param_groups) != group_count,
        "saves and loads its state in a way of its own": (cls.state_dict, cls.load_state_dict)
        != (Optimizer.state_dict, Optimizer.load_state_dict),
    }
    for fault in (fault for fault, is_so in faults.items() if is_so):
        raise ConfigError(f"{cls.__name__} {fault}, so it cannot be one of several. Choose another optimizer.", key)


def _bare(part: Optimizer) -> Optimizer:
    """A member without what it shares, to be copied or pickled beside that."""
    bare: Optimizer = object.__new__(type(part))
    bare.__dict__.update(vars(part), state={}, param_groups=[])
    return bare
