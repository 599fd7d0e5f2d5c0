"""Which parameters an optimizer gets, in which groups: known by name, whatever a strategy makes of the tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_adaptive.errors import ConfigError

OptimizerGroup = dict[str, Any]
"""A group as ``optimizer.param_groups`` holds it: ``params`` and the optimizer's options."""


@dataclass(frozen=True)
class Group:
    """One group of a partition.

    Args:
        parameters: names of its parameters in the module, in the optimizer's order.
        name: the group's name; ``None`` for a single unnamed group.
        lr_ratio: its base learning rate over that of the first group whose base learning rate is above zero.
        no_decay: whether it is kept free of weight decay while other groups decay.
    """

    parameters: tuple[str, ...]
    name: str | None = None
    lr_ratio: float = 1.0
    no_decay: bool = False


Partition = tuple[Group, ...]


class ParamGroups:
    """How a phase groups the trainable parameters; without rules, one flat group of all of them.

    Args:
        rules: rules by name, in order. None are available yet.

    Raises:
        ConfigError: when a rule is given.
    """

    def __init__(self, **rules: Any) -> None:
        if rules:
            raise ConfigError("rules for parameter groups are not available yet.", next(iter(rules)))

    def partition(self, trainable: Iterable[str]) -> Partition:
        """Groups the names of the trainable parameters."""
        return (Group(tuple(trainable)),)

    def __repr__(self) -> str:
        return "ParamGroups()"


class Inherit:
    """The next phase keeps the running phase's partition: names, membership, ratios of learning rates, and zero decays."""

    def __repr__(self) -> str:
        return "Inherit()"


def record(groups: Sequence[OptimizerGroup], names: Mapping[int, str]) -> Partition:
    """The partition of a running optimizer.

    A group without weight decay counts as kept free of it only beside a group that decays: in an optimizer whose groups all
    have none, the zero says nothing about the groups.

    Args:
        groups: ``optimizer.param_groups``.
        names: parameter names by ``id``. A tensor that is not among them is named by its place, ``(group 0, tensor 3)``.
    """
    base_lrs = [_base_lr(group) for group in groups]
    reference = next((lr for lr in base_lrs if lr is not None and lr > 0), None)
    decays = any(_decays(group) for group in groups)
    return tuple(
        Group(
            parameters=tuple(
                names.get(id(tensor), f"(group {index}, tensor {place})") for place, tensor in enumerate(group["params"])
            ),
            name=group.get("name") or (f"pg{index + 1}" if len(groups) > 1 else None),
            lr_ratio=1.0 if reference is None or lr is None else lr / reference,
            no_decay=decays and not _decays(group),
        )
        for index, (group, lr) in enumerate(zip(groups, base_lrs, strict=True))
    )


def extend(partition: Partition, running: Partition) -> Partition:
    """A partition with the parameters that were added to the running optimizer since it was recorded."""
    known = {name for group in partition for name in group.parameters}
    added = (replace(group, parameters=tuple(name for name in group.parameters if name not in known)) for group in running)
    return (*partition, *(group for group in added if group.parameters))


def named_tensors(groups: Sequence[OptimizerGroup], partition: Partition) -> dict[str, Any]:
    """The tensors of a running optimizer by the names that `record` gave them."""
    return {
        name: tensor
        for recorded, group in zip(partition, groups, strict=True)
        for name, tensor in zip(recorded.parameters, group["params"], strict=True)
    }


def impose(groups: Sequence[OptimizerGroup], partition: Partition) -> None:
    """Sets names, ratios of learning rates and zero decays on a new optimizer's groups, in place.

    They are set afterwards and not passed to the constructor, since an optimizer keeps options that it does not know in silence.

    Args:
        groups: ``optimizer.param_groups`` of an optimizer built from one plain group for each group of the partition.
        partition: what to impose.
    """
    for group, recorded in zip(groups, partition, strict=True):
        if recorded.name is not None:
            group["name"] = recorded.name
        if recorded.lr_ratio != 1:
            group["lr"] = group["lr"] * recorded.lr_ratio
        if recorded.no_decay and "weight_decay" in group:
            group["weight_decay"] = 0.0


def is_uniform(partition: Partition) -> bool:
    """Whether one flat group would train every parameter in the same way."""
    return len({group.lr_ratio for group in partition}) == 1


def _base_lr(group: OptimizerGroup) -> float | None:
    lr = group.get("initial_lr", group.get("lr"))
    return None if lr is None else float(lr)


def _decays(group: OptimizerGroup) -> bool:
    return bool(group.get("weight_decay", 0.0))
