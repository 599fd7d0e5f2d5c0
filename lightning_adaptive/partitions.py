"""Partitions: which parameters an optimizer has in which groups, known by name, whatever a strategy makes of the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_adaptive.errors import ConfigError, did_you_mean
from lightning_adaptive.rules import CONDITIONS

OptimizerGroup = dict[str, Any]
"""A group as ``optimizer.param_groups`` holds it: ``params`` and the optimizer's options."""

DEFAULT = "default"
"""Name of the group of the parameters that no rule matches."""


@dataclass(frozen=True)
class Group:
    """One group of a partition.

    Args:
        parameters: names of its parameters in the module, in the optimizer's order.
        name: the group's name; ``None`` for a single unnamed group.
        lr_ratio: its base learning rate over that of the first group whose base learning rate is above zero, of those that the
            same class steps; of a group made by a rule, over the optimizer's own.
        no_decay: whether it is kept free of weight decay while other groups decay.
        lr: the base learning rate that a rule gives it, in place of a ratio.
        options: other options that a rule gives it.
        rule: in words, what put its parameters into it; empty when no rule did.
    """

    parameters: tuple[str, ...]
    name: str | None = None
    lr_ratio: float = 1.0
    no_decay: bool = False
    lr: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    rule: str = ""

    @property
    def has_own_lr(self) -> bool:
        """Whether its learning rate is another than the optimizer's."""
        return self.lr is not None or self.lr_ratio != 1


Partition = tuple[Group, ...]


def group_names(groups: Sequence[OptimizerGroup], single: str = "") -> list[str]:
    """Each group's name; ``pg1`` and so on where it has none, as `LearningRateMonitor` counts.

    Args:
        groups: ``optimizer.param_groups``.
        single: what a single group without a name is called.
    """
    unnamed = [f"pg{number}" for number in range(1, len(groups) + 1)] if len(groups) > 1 else [single]
    return [str(group.get("name") or name) for group, name in zip(groups, unnamed, strict=True)]


def record(groups: Sequence[OptimizerGroup], names: Mapping[int, str], parts: Sequence[int] = ()) -> Partition:
    """The partition of a running optimizer.

    A group without weight decay counts as kept free of it only beside a group that decays: in an optimizer whose groups all
    have none, the zero says nothing about the groups. Nor do the learning rates of two classes say anything about each other.

    Args:
        groups: ``optimizer.param_groups``.
        names: parameter names by ``id``. A tensor that is not among them is named by its place, ``(group 0, tensor 3)``.
        parts: of each group the one of several optimizers that steps it; none where there is one.
    """
    parts = parts or [0] * len(groups)
    base_lrs = [_base_lr(group) for group in groups]
    # From the last to the first, so that the first one stays.
    reference = {part: lr for part, lr in reversed(list(zip(parts, base_lrs, strict=True))) if lr is not None and lr > 0}
    decaying = {part for part, group in zip(parts, groups, strict=True) if _decays(group)}
    return tuple(
        Group(
            parameters=tuple(
                names.get(id(tensor), f"(group {index}, tensor {place})") for place, tensor in enumerate(group["params"])
            ),
            name=name or None,
            lr_ratio=1.0 if part not in reference or lr is None else lr / reference[part],
            no_decay=part in decaying and not _decays(group),
        )
        for index, (name, group, lr, part) in enumerate(zip(group_names(groups), groups, base_lrs, parts, strict=True))
    )


def extend(partition: Partition, running: Partition) -> Partition:
    """A partition with the parameters that were added to the running optimizer since it was recorded."""
    known = {name for group in partition for name in group.parameters}
    added = (replace(group, parameters=tuple(name for name in group.parameters if name not in known)) for group in running)
    return (*partition, *(group for group in added if group.parameters))


def split(partition: Partition) -> Partition:
    """The same with a group for each parameter, which has its name; what holds for the group holds for each."""
    return tuple(replace(group, parameters=(name,), name=name) for group in partition for name in group.parameters)


def named_tensors(groups: Sequence[OptimizerGroup], partition: Partition) -> dict[str, Any]:
    """The tensors of a running optimizer by the names that `record` gave them."""
    return {
        name: tensor
        for recorded, group in zip(partition, groups, strict=True)
        for name, tensor in zip(recorded.parameters, group["params"], strict=True)
    }


def keep_zero_decays(recorded: Partition, built: Partition) -> Partition:
    """A recorded partition that also keeps free of weight decay what rules keep free of it.

    In an optimizer without weight decay the zero that a rule asks for cannot be told from the others, and would be lost at the
    switch to one that decays.
    """
    return tuple(replace(group, no_decay=group.no_decay or asked.no_decay) for group, asked in zip(recorded, built, strict=True))


def impose(groups: Sequence[OptimizerGroup], partition: Partition) -> None:
    """Sets names, learning rates, zero decays and what rules say on a new optimizer's groups, in place.

    They are set afterwards and not passed to the constructor, since an optimizer keeps options that it does not know in silence.

    Args:
        groups: ``optimizer.param_groups`` of an optimizer built from one plain group for each group of the partition.
        partition: what to impose.

    Raises:
        ConfigError: for an option that the optimizer does not have; its key begins with the group's name.
    """
    for group, recorded in zip(groups, partition, strict=True):
        known = [option for option in group if option not in ("params", "name")]
        if recorded.name is not None:
            group["name"] = recorded.name
        if recorded.lr is not None and "lr" in group:
            group["lr"] = recorded.lr
        elif recorded.lr_ratio != 1:
            group["lr"] = group["lr"] * recorded.lr_ratio
        if recorded.no_decay and "weight_decay" in group:
            group["weight_decay"] = 0.0
        for option, value in recorded.options.items():
            if option not in known:
                allowed = ["lr_scale", *known]
                raise ConfigError(
                    f"the optimizer has no option {option!r}.{did_you_mean(option, [*allowed, *CONDITIONS])} A rule sets "
                    f"{', '.join(allowed)}; its conditions are {', '.join(CONDITIONS)}.",
                    f"{recorded.name}.{option}" if recorded.name else option,
                )
            group[option] = tuple(value) if isinstance(group[option], tuple) and isinstance(value, list) else value


def members(partition: Partition) -> tuple[tuple[str, ...], ...]:
    """The names alone: what lies where in an optimizer's state."""
    return tuple(group.parameters for group in partition)


def _base_lr(group: OptimizerGroup) -> float | None:
    lr = group.get("initial_lr", group.get("lr"))
    return None if lr is None else float(lr)


def _decays(group: OptimizerGroup) -> bool:
    return bool(group.get("weight_decay", 0.0))
