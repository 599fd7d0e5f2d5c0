"""The plan of a run before it starts: phases, steps, learning rates, and where each derived number comes from."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.nn.parameter import is_lazy

from lightning_adaptive import strategies, trainers
from lightning_adaptive.chain import PlannedPhase
from lightning_adaptive.combined import class_name
from lightning_adaptive.lr_schedulers import ScheduleLR, describe_schedule
from lightning_adaptive.partitions import group_names
from lightning_adaptive.phases import Phase, format_bytes, format_lrs, lrs, partition_of, planned_state_bytes
from lightning_adaptive.pictures import panels
from lightning_adaptive.series import Epoch, Series, corners, of_phase
from lightning_adaptive.switch import find_switch
from lightning_adaptive.tables import columns


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

    def cells(self) -> tuple[str, ...]:
        """Its line in the plan's table."""
        return (self.name, f"{self.tensors:,}", f"{self.parameters:,}", self.lr, self.decay, self.matched_by)


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a plan.

    Args:
        number: 1-based.
        optimizer: class name.
        schedule: the schedule in words.
        first_step: 0-based global step of its first update; ``None`` when a trigger decides it.
        end_step: the global step that no longer belongs to it; ``None`` when a trigger decides it, or nobody knows the end.
        reason: why it begins there.
        lr: learning rates in words, and what else is driven: at the first step and, where the schedule is closed form, at the
            highest between, with its step, and at the last.
        groups: number of parameter groups.
        parameters: number of trainable scalars.
        notes: what was decided while building it.
        table: its parameter groups, where there are several.
        state_bytes: bytes of the optimizer's state, of whole parameters on one process; of a preview, where they can be told.
        curves: of a preview, what every driven option of every group will be.
    """

    number: int
    optimizer: str
    schedule: str
    first_step: int | None
    end_step: int | None
    reason: str
    lr: str
    groups: int
    parameters: int
    notes: tuple[str, ...] = ()
    table: tuple[GroupPlan, ...] = ()
    state_bytes: int | None = None
    curves: tuple[Series, ...] = ()

    def __str__(self) -> str:
        first = "?" if self.first_step is None else str(self.first_step)
        last = "?" if self.end_step is None else str(self.end_step - 1)
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        state = "" if self.state_bytes is None else f", state {format_bytes(self.state_bytes)}"
        lines = [
            f"phase {self.number}  {self.optimizer:<10} steps {first}..{last}  {self.schedule}  {self.lr}  "
            f"{self.parameters:,} parameters{groups}{state}  <- {self.reason}"
        ]
        lines += [f"         note: {note}" for note in self.notes]
        if self.table:
            rows = [("group", "tensors", "parameters", "lr", "decay", "matched by"), *(group.cells() for group in self.table)]
            lines += [f"         {line}" for line in columns(rows, to_the_right=range(1, 5))]
        return "\n".join(lines)


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

    def write_csv(self, path: Path) -> None:
        """Writes the curves: a row for each step and group, a column for each option, empty where it is not driven.

        Args:
            path: the file.
        """
        options = self._options()
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "phase", "optimizer", "group", *options])
            for phase in self.phases:
                by_group: dict[str, dict[str, Series]] = {}
                for series in phase.curves:
                    by_group.setdefault(series.group, {})[series.option] = series
                for group, driven in by_group.items():
                    columns = [driven[option].values if option in driven else None for option in options]
                    for index, step in enumerate(next(iter(driven.values())).steps):
                        values = [repr(column[index]) if column is not None else "" for column in columns]
                        writer.writerow([step, phase.number, phase.optimizer, group, *values])

    def draw(self, path: Path) -> None:
        """Draws the curves over the optimizer steps, a panel for each option, with each switch marked.

        Args:
            path: the PNG.
        """
        options = self._options() or ["lr"]
        titles = ["learning rate" if option == "lr" else option for option in options]
        switches = [
            (after.first_step, before.optimizer, after.optimizer)
            for before, after in pairwise(self.phases)
            if after.first_step is not None
        ]
        with panels(path, titles, switches, height=3) as axes:
            for axis, option in zip(axes, options, strict=True):
                drawn = [series for phase in self.phases for series in phase.curves if series.option == option]
                groups = list(dict.fromkeys(series.group for series in drawn))
                for index, group in enumerate(groups):
                    of_group = [series for series in drawn if series.group == group]
                    for series in of_group:
                        is_named = 1 < len(groups) <= 20 and series is of_group[0]
                        label = (group or option) if is_named else None
                        axis.plot(series.steps, series.values, color=f"C{index % 10}", label=label, linewidth=1.4)
                positive = [value for series in drawn for value in series.values if value > 0]
                wide = option == "lr" and bool(positive) and max(positive) > 20 * min(positive)
                axis.set_yscale("log" if wide else "linear")

    def _options(self) -> list[str]:
        return list(dict.fromkeys(series.option for phase in self.phases for series in phase.curves))


def preview(trainer: Trainer, model: LightningModule, train_dataloaders: Any = None, datamodule: Any = None) -> Plan:
    """The plan of ``trainer.fit(model, train_dataloaders, datamodule=datamodule)``, without training a step.

    It is what the run would do: the data are set up as they will be parted among processes, and every phase is built for the
    module as it is. No process is started, and nothing is written, moved or logged; callbacks are not called. Schedules are shown
    as they are; a plateau without its reductions.

    Args:
        trainer: a trainer that is not running, with its `OptimizerSwitchCallback` if there is one.
        model: the module.
        train_dataloaders: training data, as of ``trainer.fit``.
        datamodule: or the data as a whole.

    Raises:
        ConfigError: for a setting with which the fit would end before its first step.
    """
    with strategies.staged(trainer, model, train_dataloaders, datamodule):
        switch = find_switch(trainer)
        if switch is None:
            return plan(trainer, with_curves=True)
        switch.on_fit_start(trainer, model)
        try:
            return plan(trainer, with_curves=True)
        finally:
            switch.teardown(trainer, model, "fit")


def plan(trainer: Trainer, with_curves: bool = False) -> Plan:
    """The plan of a trainer whose training is about to start, as seen from ``on_train_start``.

    Args:
        trainer: the trainer.
        with_curves: whether the plan has curves and the size of the optimizers' state. To draw a scheduler of torch it is stepped,
            so this is for a preview alone.

    Raises:
        ConfigError: for a later phase that cannot be built.
    """
    clock = trainers.clock(trainer)
    switch = find_switch(trainer)
    configs = trainer.lr_scheduler_configs
    around = [vars(config) for config in configs] or [{"scheduler": None}]
    planned = [
        PlannedPhase(
            switch.first_step if switch else 0,
            f"resumed at step {trainer.global_step}" if trainer.global_step else "configure_optimizers",
            Phase(strategies.running_optimizer(trainer), around),
        ),
        *(switch.planned(trainer) if switch else ()),
    ]
    ends = [*(later.first_step for later in planned[1:]), clock.total_steps]  # None where a trigger decides
    numbers = range(switch.phase + 1 if switch else 1, len(planned) + 2)
    shapes = strategies.placement(trainer).full_shapes(trainer.lightning_module)
    epoch = Epoch(clock.steps_per_epoch, trainer.num_training_batches, trainer.accumulate_grad_batches) if with_curves else None
    places = zip(numbers, planned, ends, strict=False)
    phases = tuple(_phase_plan(number, begun, end, shapes, epoch) for number, begun, end in places)
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


def _phase_plan(
    number: int, planned: PlannedPhase, end_step: int | None, shapes: Mapping[str, tuple[int, ...]], epoch: Epoch | None
) -> PhasePlan:
    first_step, reason, phase, lr_rule = planned
    groups = phase.optimizer.param_groups
    steps = None if first_step is None or end_step is None else range(first_step, end_step)
    curves = of_phase(phase, steps, epoch) if epoch and steps and not lr_rule else ()
    table = tuple(_group_plans(phase, shapes, "inherited" if reason.startswith(("at=", "when=")) else "configure_optimizers"))
    return PhasePlan(
        number=number,
        optimizer=class_name(phase.optimizer),
        schedule=describe_schedule(phase.lr_scheduler),
        first_step=first_step,
        end_step=end_step,
        reason=reason,
        lr=f"lr found at the switch ({lr_rule})"
        if lr_rule
        else _curve(phase, first_step or 0, None if steps is None else len(steps) - 1),
        groups=len(groups),
        parameters=sum(group.parameters for group in table),
        notes=phase.notes,
        table=table if len(table) > 1 else (),
        state_bytes=planned_state_bytes(phase.optimizer) if epoch else None,
        curves=curves,
    )


def _group_plans(phase: Phase, shapes: Mapping[str, tuple[int, ...]], otherwise: str) -> Iterator[GroupPlan]:
    groups = phase.optimizer.param_groups
    partition = partition_of(phase.optimizer) or ()
    for index, (name, group) in enumerate(zip(group_names(groups, single="pg1"), groups, strict=True)):
        # By name, where names are known: the tensors may be shards, or not there.
        built = partition[index] if len(partition) == len(groups) else None
        tensors = [tensor for tensor in group["params"] if not is_lazy(tensor)]
        sizes = [math.prod(shapes[name]) for name in built.parameters if name in shapes] if built else []
        yield GroupPlan(
            name=name,
            tensors=len(built.parameters) if built else len(group["params"]),
            parameters=sum(sizes) if built else sum(tensor.numel() for tensor in tensors),
            lr=format_lrs([float(group.get("initial_lr", group["lr"]))]) if "lr" in group else "-",
            decay=f"{group['weight_decay']:g}" if "weight_decay" in group else "-",
            matched_by=(built.rule if built else "") or otherwise,
        )


def _curve(phase: Phase, first: int, last: int | None) -> str:
    """In words, the learning rates and what else is driven: now, or where the schedule is closed form, at its corners."""
    scheduler = phase.lr_scheduler
    if not isinstance(scheduler, ScheduleLR):
        return f"lr {format_lrs(lrs(phase.optimizer))}"
    options = dict.fromkeys(option for group in scheduler.values_at(0) for option in group)
    words = []
    for option in options:

        def highest(step: int, option: str = option) -> float:
            return max(group[option] for group in scheduler.values_at(step) if option in group)

        steps = [0] if last is None else corners(highest, last)
        values = [format_lrs(group[option] for group in scheduler.values_at(step) if option in group) for step in steps]
        if len(steps) > 2:
            values[1] += f" (step {first + steps[1]})"
        words.append(f"{option} {' -> '.join(values)}")
    return "  ".join(words)
