"""What a run with a switch has reached, as it travels in the checkpoint; and whether another run can take it up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_adaptive.errors import CheckpointError, reading
from lightning_adaptive.partitions import Group, Partition, members
from lightning_adaptive.settings import Settings
from lightning_adaptive.triggers import Memory

STATE_VERSION = 1
"""Version of the callback's saved state; CONTRIBUTING.md says what happens when it changes."""


@dataclass(frozen=True)
class SwitchState:
    """The callback's whole mutable state, which travels in the checkpoint.

    Args:
        phase: index of the running phase; 0 is the one that the module configured.
        first_step: 0-based global step at which it began.
        schedule_step: the same of its schedule, which began earlier where a switch continues it.
        optimizer: class name of its optimizer, for messages; nothing is imported by it.
        partition: its parameter groups by name.
        trigger: what the trigger of the next switch has seen.
        reason: why the phase began.
        handed: what crossed the switch to it, and by which rules.
        limit: the norm to which its first updates are held; ``None`` without a guard.
        shapes: shape of each whole parameter of the groups.
        settings: what the run was configured with, to tell a resumed run what has changed.
    """

    phase: int = 0
    first_step: int = 0
    schedule_step: int = 0
    optimizer: str = ""
    partition: Partition = ()
    trigger: Memory = field(default_factory=dict)
    reason: str = ""
    handed: str = ""
    limit: float | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)

    @property
    def parameters(self) -> set[str]:
        """Names of all parameters of the groups."""
        return {name for group in self.partition for name in group.parameters}

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, so that a checkpoint loads with ``weights_only=True``."""
        groups = [
            {"parameters": list(group.parameters), "name": group.name, "lr_ratio": group.lr_ratio, "no_decay": group.no_decay}
            for group in self.partition
        ]
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {"version": STATE_VERSION, **vars(self), "partition": groups, "trigger": dict(self.trigger), "shapes": shapes}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> SwitchState:
        """Reads what `to_dict` wrote.

        Raises:
            CheckpointError: for another version, or values of the wrong type or range.
        """
        with reading("the switch", state, STATE_VERSION):
            found = cls(**{name: read(state[name]) for name, read in _READERS.items()})
        if found.phase < 0 or not 0 <= found.schedule_step <= found.first_step:
            raise CheckpointError(
                f"the switch's state in the checkpoint is damaged: phase {found.phase}, first step {found.first_step}, of its "
                f"schedule {found.schedule_step}."
            )
        return found


def _read_group(group: Mapping[str, Any]) -> Group:
    return Group(
        parameters=tuple(str(name) for name in group["parameters"]),
        name=None if group["name"] is None else str(group["name"]),
        lr_ratio=float(group["lr_ratio"]),
        no_decay=bool(group["no_decay"]),
    )


_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("phase", "first_step", "schedule_step"), int),
    **dict.fromkeys(("optimizer", "reason", "handed"), str),
    "partition": lambda groups: tuple(map(_read_group, groups)),
    "trigger": dict,
    "limit": lambda limit: None if limit is None else float(limit),
    "shapes": lambda shapes: {str(name): tuple(map(int, shape)) for name, shape in shapes.items()},
    "settings": lambda values: {str(key): value for key, value in values.items()},
}


def check_first_phase(now: SwitchState, saved: SwitchState) -> None:
    """Refuses a checkpoint of the first phase that another optimizer wrote, or for other parameters.

    Args:
        now: the run's.
        saved: the checkpoint's.

    Raises:
        CheckpointError: with both sides.
    """
    if now.optimizer != saved.optimizer:
        raise CheckpointError(
            f"the checkpoint's first phase was stepped by {saved.optimizer}, this run's by {now.optimizer}. Resume with the "
            f"optimizer of the run that wrote it; to change it, let a switch lead from {saved.optimizer} to {now.optimizer}."
        )
    for difference, where in (
        (saved.parameters - now.parameters, "the checkpoint"),
        (now.parameters - saved.parameters, "this run"),
    ):
        if difference:
            shown = ", ".join(sorted(difference)[:3]) + (", ..." if len(difference) > 3 else "")
            raise CheckpointError(f"{len(difference)} parameters are optimized in {where} only: {shown}.")
    check_shapes(now.shapes, saved)
    if members(now.partition) != members(saved.partition):
        raise CheckpointError(
            f"{_first_difference(saved.partition, now.partition)}, and the optimizer's state lies in the order of the groups. "
            "Resume with the groups of the run that wrote the checkpoint; to change them, let a switch lead to others."
        )


def check_later_phase(tensors: Mapping[str, Any], saved: SwitchState, phase_count: int) -> None:
    """Refuses a checkpoint of a later phase that this run does not lead to, or whose parameters it does not have.

    Args:
        tensors: the run's parameters by name.
        saved: the checkpoint's.
        phase_count: number of this run's later phases; 0 without a switch.

    Raises:
        CheckpointError: with both sides.
    """
    written = f"the checkpoint was written in phase {saved.phase} ({saved.optimizer}, from step {saved.first_step}), but this run"
    if saved.phase and not phase_count:
        raise CheckpointError(f"{written} has no switch. Resume with the switch of the run that wrote it.")
    if saved.phase > phase_count:
        raise CheckpointError(
            f"{written}'s switch leads only to phase {phase_count}. Resume with the switch of the run that wrote it."
        )
    missing = [name for group in saved.partition for name in group.parameters if name not in tensors]
    if phase_count and missing:
        raise CheckpointError(
            f"the checkpoint's {saved.optimizer} holds {len(missing)} parameters that the model does not have: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
        )


def check_shapes(shapes: Mapping[str, tuple[int, ...]], saved: SwitchState) -> None:
    """Refuses a checkpoint for parameters of another shape.

    Args:
        shapes: the run's, by name.
        saved: the checkpoint's.

    Raises:
        CheckpointError: with both shapes.
    """
    optimized = saved.parameters
    for name, shape in shapes.items():
        if name in optimized and saved.shapes.get(name, shape) != shape:
            raise CheckpointError(f"{name} has shape {saved.shapes[name]} in the checkpoint and {shape} in this run.")


def _first_difference(saved: Partition, now: Partition) -> str:
    """In words, the first group that holds other parameters."""
    if len(saved) != len(now):
        return f"the optimizer has {len(saved)} groups in the checkpoint and {len(now)} in this run"
    index = next(index for index, (one, other) in enumerate(zip(saved, now, strict=True)) if one.parameters != other.parameters)
    one, other = saved[index].parameters, now[index].parameters
    name = now[index].name or f"group {index}"
    if len(one) != len(other):
        return f"{name} holds {len(one)} parameters in the checkpoint and {len(other)} in this run"
    first = next((before, after) for before, after in zip(one, other, strict=True) if before != after)
    return f"{name} holds {first[0]} in the checkpoint where it holds {first[1]} in this run"
