"""The plan of a run before it starts: phases, steps, learning rates, and where each derived number comes from."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer

from lightning_adaptive import strategies
from lightning_adaptive.phases import Phase, ScheduleLR, describe_schedule, format_lrs, lrs
from lightning_adaptive.switch import PlannedPhase, find_switch


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

    def __str__(self) -> str:
        last = "?" if self.end_step is None else str(self.end_step - 1)
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        lines = [
            f"phase {self.number}  {self.optimizer:<10} steps {self.first_step}..{last}  {self.schedule}  lr {self.lr}  "
            f"{self.parameters:,} parameters{groups}  <- {self.reason}"
        ]
        return "\n".join([*lines, *(f"         note: {note}" for note in self.notes)])


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
    phases = tuple(_phase_plan(number, begun, end) for number, begun, end in zip(numbers, planned, ends, strict=False))
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


def _phase_plan(number: int, planned: PlannedPhase, end_step: int | None) -> PhasePlan:
    first_step, reason, phase = planned
    groups = phase.optimizer.param_groups
    return PhasePlan(
        number=number,
        optimizer=type(phase.optimizer).__name__,
        schedule=describe_schedule(phase.lr_scheduler["scheduler"]),
        first_step=first_step,
        end_step=end_step,
        reason=reason,
        lr=_curve(phase, None if end_step is None else end_step - first_step - 1),
        groups=len(groups),
        parameters=sum(tensor.numel() for group in groups for tensor in group["params"]),
        notes=phase.notes,
    )


def _curve(phase: Phase, last: int | None) -> str:
    """Learning rates in words: now, or where the schedule is closed form, at the phase's first and last step."""
    scheduler = phase.lr_scheduler["scheduler"]
    if not isinstance(scheduler, ScheduleLR):
        return format_lrs(lrs(phase.optimizer))
    corners = [0] if last is None else [0, last]
    return " -> ".join(format_lrs(float(lr) for lr in scheduler.lrs_at(step)) for step in corners)
