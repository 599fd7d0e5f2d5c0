"""The plan of a run before it starts: phases, steps, learning rates, and where each derived number comes from."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lightning.pytorch import Trainer
from torch.nn.parameter import is_lazy

from lightning_adaptive import strategies
from lightning_adaptive.combined import class_name
from lightning_adaptive.phases import Phase, ScheduleLR, describe_schedule, format_lrs, lrs, partition_of
from lightning_adaptive.switch import PlannedPhase, find_switch


@dataclass(frozen=True)
class GroupPlan:
    """One parameter group of a phase.

    Args:
        name: the group's name.
        tensors: number of its parameters.
        parameters: number of their scalars, of whole parameters where a strategy shards them; lazily built ones do not count yet.
        lr: base learning rate, which a schedule multiplies.
        decay: weight decay, or a dash where the optimizer has none.
        matched_by: the rule in words; ``inherited`` from the phase before, or ``configure_optimizers`` of the module.
    """

    name: str
    tensors: int
    parameters: int
    lr: str
    decay: str
    matched_by: str


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a plan.

    Args:
        number: 1-based.
        optimizer: class name.
        schedule: the schedule in words.
        first_step: 0-based global step of its first update.
        end_step: the global step that no longer belongs to it; ``None`` when the end of training is unknown.
        reason: why it begins there.
        lr: learning rates in words, at the first and, where the schedule is closed form, the last step.
        groups: number of parameter groups.
        parameters: number of trainable scalars.
        notes: what was decided while building it.
        table: its parameter groups, where there are several.
    """

    number: int
    optimizer: str
    schedule: str
    first_step: int
    end_step: int | None
    reason: str
    lr: str
    groups: int
    parameters: int
    notes: tuple[str, ...] = ()
    table: tuple[GroupPlan, ...] = ()

    def __str__(self) -> str:
        last = "?" if self.end_step is None else str(self.end_step - 1)
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        lines = [
            f"phase {self.number}  {self.optimizer:<10} steps {self.first_step}..{last}  {self.schedule}  lr {self.lr}  "
            f"{self.parameters:,} parameters{groups}  <- {self.reason}"
        ]
        return "\n".join([*lines, *(f"         note: {note}" for note in self.notes), *_lines(self.table)])


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Args:
        total_steps: optimizer steps of the whole training, or ``None`` when its end is unknown.
        derivation: where the total comes from.
        phases: the phases in order, from the running one on.
    """

    total_steps: int | None
    derivation: str
    phases: tuple[PhasePlan, ...]

    def __str__(self) -> str:
        total = "an unknown number of" if self.total_steps is None else f"{self.total_steps:,}"
        return "\n".join([f"PLAN  {total} optimizer steps  <- {self.derivation}", *(f"  {phase}" for phase in self.phases)])


def plan(trainer: Trainer) -> Plan:
    """The plan of a trainer whose training is about to start, as seen from ``on_train_start``.

    Raises:
        ConfigError: for a later phase that cannot be built.
    """
    clock = strategies.clock(trainer)
    switch = find_switch(trainer)
    scheduler = trainer.lr_scheduler_configs[0].scheduler if trainer.lr_scheduler_configs else None
    planned = [
        PlannedPhase(
            switch.first_step if switch else 0,
            f"resumed at step {trainer.global_step}" if trainer.global_step else "configure_optimizers",
            Phase(strategies.running_optimizer(trainer), {"scheduler": scheduler}),
        ),
        *(switch.planned(trainer) if switch else ()),
    ]
    ends = [*(later.first_step for later in planned[1:]), clock.total_steps]
    numbers = range(switch.phase + 1 if switch else 1, len(planned) + 2)
    shapes = strategies.full_shapes(trainer)
    phases = tuple(_phase_plan(number, begun, end, shapes) for number, begun, end in zip(numbers, planned, ends, strict=False))
    return Plan(clock.total_steps, _derivation(trainer, clock.steps_per_epoch), phases)


def _derivation(trainer: Trainer, steps_per_epoch: int | None) -> str:
    parts = []
    if steps_per_epoch is not None:
        batches = int(trainer.num_training_batches)
        parts.append(
            f"{steps_per_epoch} steps an epoch ({batches} batches, accumulate {trainer.accumulate_grad_batches}, "
            f"{trainer.world_size} process{'es' if trainer.world_size > 1 else ''})"
        )
    if trainer.max_epochs not in (None, -1):
        parts.append(f"max_epochs {trainer.max_epochs}")
    if trainer.max_steps != -1:
        parts.append(f"max_steps {trainer.max_steps}")
    return ", ".join(parts) or "no limit"


def _phase_plan(number: int, planned: PlannedPhase, end_step: int | None, shapes: Mapping[str, tuple[int, ...]]) -> PhasePlan:
    first_step, reason, phase = planned
    groups = phase.optimizer.param_groups
    table = tuple(_group_plans(phase, shapes, "inherited" if reason.startswith("at=") else "configure_optimizers"))
    return PhasePlan(
        number=number,
        optimizer=class_name(phase.optimizer),
        schedule=describe_schedule(phase.lr_scheduler["scheduler"]),
        first_step=first_step,
        end_step=end_step,
        reason=reason,
        lr=_curve(phase, None if end_step is None else end_step - first_step - 1),
        groups=len(groups),
        parameters=sum(group.parameters for group in table),
        notes=phase.notes,
        table=table if len(table) > 1 else (),
    )


def _group_plans(phase: Phase, shapes: Mapping[str, tuple[int, ...]], otherwise: str) -> Iterator[GroupPlan]:
    groups = phase.optimizer.param_groups
    partition = partition_of(phase.optimizer) or ()
    for index, group in enumerate(groups):
        # By name, where names are known: the tensors may be shards, or not there.
        built = partition[index] if len(partition) == len(groups) else None
        tensors = [tensor for tensor in group["params"] if not is_lazy(tensor)]
        sizes = [math.prod(shapes[name]) for name in built.parameters if name in shapes] if built else []
        yield GroupPlan(
            name=group.get("name", f"pg{index + 1}"),
            tensors=len(built.parameters) if built else len(group["params"]),
            parameters=sum(sizes) if built else sum(tensor.numel() for tensor in tensors),
            lr=format_lrs([float(group.get("initial_lr", group["lr"]))]) if "lr" in group else "-",
            decay=f"{group['weight_decay']:g}" if "weight_decay" in group else "-",
            matched_by=(built.rule if built else "") or otherwise,
        )


def _lines(table: tuple[GroupPlan, ...]) -> list[str]:
    """The table in columns, numbers to the right."""
    if not table:
        return []
    rows = [("group", "tensors", "parameters", "lr", "decay", "matched by")]
    rows += [(row.name, f"{row.tensors:,}", f"{row.parameters:,}", row.lr, row.decay, row.matched_by) for row in table]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return [
        f"         {row[0]:<{widths[0]}}  {'  '.join(f'{row[column]:>{widths[column]}}' for column in range(1, 5))}  {row[5]}"
        for row in rows
    ]


def _curve(phase: Phase, last: int | None) -> str:
    """Learning rates in words: now, or where the schedule is closed form, at the phase's first and last step."""
    scheduler = phase.lr_scheduler["scheduler"]
    if not isinstance(scheduler, ScheduleLR):
        return format_lrs(lrs(phase.optimizer))
    corners = [0] if last is None else [0, last]
    return " -> ".join(format_lrs(float(lr) for lr in scheduler.lrs_at(step)) for step in corners)
