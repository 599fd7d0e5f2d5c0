"""`OptimizerSwitchCallback`: moves a Lightning run from one optimizer and schedule to the next."""

from __future__ import annotations

import functools
import inspect
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_adaptive import checkpoints, moments, phases, settings, strategies, trainers
from lightning_adaptive import handover as handovers
from lightning_adaptive.combined import class_name, parts
from lightning_adaptive.durations import Clock, Duration, DurationLike
from lightning_adaptive.errors import (
    CheckpointError,
    ConfigError,
    ConfigTypeError,
    check_count,
    check_factory,
    check_word,
    is_number,
)
from lightning_adaptive.guard import Guard
from lightning_adaptive.handover import Crossed, Handover
from lightning_adaptive.lr_schedulers import ScheduleLR, SchedulerConfig, SchedulerFactory, build_scheduler, describe_schedule
from lightning_adaptive.noise import find_monitor
from lightning_adaptive.param_groups import Group, Inherit, ParamGroups, Partition, extend, members, named_tensors, split
from lightning_adaptive.phases import OptimizerFactory, Phase
from lightning_adaptive.schedules import Continue, Plateau, Schedule
from lightning_adaptive.settings import Settings
from lightning_adaptive.triggers import Manual, Memory, OnMetric, OnNoise, Projection, Seen, Swats, Trigger

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

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, so that a checkpoint loads with ``weights_only=True``."""
        groups = [
            {"parameters": list(group.parameters), "name": group.name, "lr_ratio": group.lr_ratio, "no_decay": group.no_decay}
            for group in self.partition
        ]
        return {
            "version": STATE_VERSION,
            "phase": self.phase,
            "first_step": self.first_step,
            "schedule_step": self.schedule_step,
            "optimizer": self.optimizer,
            "partition": groups,
            "trigger": dict(self.trigger),
            "reason": self.reason,
            "handed": self.handed,
            "limit": self.limit,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> SwitchState:
        """Reads what `to_dict` wrote.

        Raises:
            CheckpointError: for another version, or values of the wrong type or range.
        """
        version = state.get("version")
        if version != STATE_VERSION:
            raise CheckpointError(
                f"the checkpoint holds the switch's state in version {version!r}, this package reads version {STATE_VERSION}."
            )
        try:
            phase, first_step, schedule_step = (int(state[name]) for name in ("phase", "first_step", "schedule_step"))
            partition = tuple(
                Group(
                    parameters=tuple(str(name) for name in group["parameters"]),
                    name=None if group["name"] is None else str(group["name"]),
                    lr_ratio=float(group["lr_ratio"]),
                    no_decay=bool(group["no_decay"]),
                )
                for group in state["partition"]
            )
            trigger, reason, handed = dict(state["trigger"]), str(state["reason"]), str(state["handed"])
            limit = None if state["limit"] is None else float(state["limit"])
            shapes = {str(name): tuple(int(size) for size in shape) for name, shape in state["shapes"].items()}
            settings = {str(key): value for key, value in state["settings"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the switch's state in the checkpoint is damaged: {error!r}.") from error
        if phase < 0 or not 0 <= schedule_step <= first_step:
            raise CheckpointError(
                f"the switch's state in the checkpoint is damaged: phase {phase}, first step {first_step}, of its schedule "
                f"{schedule_step}."
            )
        optimizer = str(state.get("optimizer", ""))
        return cls(phase, first_step, schedule_step, optimizer, partition, trigger, reason, handed, limit, shapes, settings)


class PlannedPhase(NamedTuple):
    """A later phase as it was built for a trial at the start of training; its first step is ``None`` when a trigger decides it."""

    first_step: int | None
    reason: str
    phase: Phase
    lr_rule: str = ""
    """What finds its learning rates in the moment of the switch, where they are not those of its configuration."""


class OptimizerSwitchCallback(Callback):
    """Moves training to another optimizer and schedule at a chosen moment.

    The new phase is built completely, for exactly the parameters that the running optimizer had, before the old one is
    touched; optimizer and scheduler are exchanged together at the first batch of a step; the old state is freed. What is
    saved lets a run resume on either side of the switch. Every later phase is built once for a trial before the first step,
    so that a setting that cannot work ends the run at once.

    Args:
        at: moment of the switch, from the start of training: ``30ep``, ``12000st`` or ``70%`` (of the whole training).
        optimizer: factory of the next optimizer, ``partial(torch.optim.SGD, lr=0.1)``. Without a learning rate its class's
            default holds.
        when: a trigger, which starts the next phase when something is observed; with ``at`` as well, whichever comes first.
        scheduler: the next schedule; ``None`` is constant. A `Schedule`, a factory of a torch scheduler (stepped once an
            epoch, as in Lightning; at each step, where one of its options is a duration, ``T_max="100%"``), or Lightning's
            dictionary around either. ``"continue"`` lets the running schedule go on, with its own clock and first step, on the
            next optimizer's base values.
        param_groups: ``"inherit"`` keeps the running groups: their names, members, ratios of learning rates and zero decays.
            ``ParamGroups(...)`` makes groups of all trainable parameters by rules, and without rules one.
        handover: what crosses the switch. ``"own"``: nothing; the next phase starts with its own learning rate. ``"keep"``: the
            running learning rates. ``"smooth"``: learning rates that match the running steps, the momentum, and the weight decay,
            with the first updates guarded. ``"swats"``: the learning rate that the trigger `Swats` has found. Or a `Handover`.
        then: the switch after this one.
        gradient_clip_val: the Trainer's value from the switch on; ``"keep"`` leaves it, ``None`` ends clipping. The Trainer's
            own value is set back when training ends.
        optimizer_index: which of the module's optimizers is switched, counted from 0. Only manual optimization has several; there
            a moment is in steps (st), which count every ``step()`` of each of them, and the module steps the schedulers. A module
            must ask for ``self.optimizers()`` at each step: one that it keeps is the old one. `then` has the same.
        on_resume: what holds when a run resumes with other settings than those of the checkpoint (optimizer, schedule, moments,
            groups, accumulation, steps). ``"error"`` says them and ends the run; ``"config"`` gives the running optimizer this
            run's options; ``"checkpoint"`` leaves it those of the checkpoint. Both say what differs, and everything that is not
            an option of the running optimizer is this run's. A class or parameters that do not fit are always an error.
        dry_run: says when the switch would come, and by which of several triggers, and changes nothing.
        enabled: ``False`` makes the callback do nothing.

    Raises:
        ConfigError: for a moment that is missing or malformed, or an option that is not available yet. At the start of training:
            for a moment outside it, a strategy without support, or a phase that cannot be built.
        ConfigTypeError: for a bare number as moment, or an optimizer where a factory belongs.
        CheckpointError: on resume, for saved state that does not fit this run.

    >>> from functools import partial
    >>> import torch
    >>> OptimizerSwitchCallback(at="30ep", optimizer=partial(torch.optim.SGD, lr=0.1))
    OptimizerSwitchCallback(at='30ep')
    """

    def __init__(
        self,
        at: DurationLike | None = None,
        optimizer: OptimizerFactory | None = None,
        *,
        when: Trigger | None = None,
        scheduler: Schedule | SchedulerConfig | SchedulerFactory | Literal["continue"] | None = None,
        param_groups: Literal["inherit"] | Inherit | ParamGroups = "inherit",
        handover: Literal["own", "keep", "smooth", "swats"] | Handover = "own",
        then: OptimizerSwitchCallback | None = None,
        gradient_clip_val: Literal["keep"] | float | None = "keep",
        optimizer_index: int = 0,
        on_resume: Literal["error", "config", "checkpoint"] = "error",
        dry_run: bool = False,
        enabled: bool = True,
    ) -> None:
        self.enabled = enabled
        self.dry_run = dry_run
        self.optimizer_index = optimizer_index
        self.then = then if then is not None and then.enabled else None
        self.gradient_clip_val = gradient_clip_val
        self._state = SwitchState()
        self._tensors: dict[str, Tensor] = {}
        self._moments: tuple[int | None, ...] = ()
        self._asked = False
        self._looked = 0
        self._guarded_to = 0
        self._trainer_clip_val: float | None = None
        self._stop_reading: Callable[[], None] | None = None
        self._fitting = True
        self._saved: SwitchState | None = None
        self._scale: float | None = None
        self._lrs: list[float] = []
        self._guard: Guard | None = None
        self._first: Settings = {}
        self._options: list[dict[str, Any]] = []
        self._configured: Partition | None = None
        if not enabled:
            return
        check_count(optimizer_index, "optimizer_index", "an optimizer", least=0)
        check_word(on_resume, "on_resume", ("error", "config", "checkpoint"))
        self.on_resume = on_resume
        self.when = _default_if_empty(when, None)
        if self.when is not None and not isinstance(self.when, Trigger):
            raise ConfigTypeError(f"{when!r} is no trigger. Write one, OnPlateau(monitor='val/loss') or another.", "when")
        if at is None and self.when is None:
            raise ConfigError(
                "a switch needs its moment: 5ep (epochs), 5st (optimizer steps) or 5% (of training); or a trigger (when).", "at"
            )
        if optimizer is None:
            raise ConfigError("a switch needs the factory of its next optimizer, for example partial(SGD, lr=0.1).", "optimizer")
        self.at = None if at is None else Duration.parse(at, key="at")
        check_factory(optimizer, Optimizer, "optimizer")
        self.optimizer = optimizer
        self.scheduler = Continue() if scheduler == "continue" else _default_if_empty(scheduler, None)
        if self.then is not None and (self.then.optimizer_index != 0 or self.then.on_resume != "error" or self.then.dry_run):
            raise ConfigError(
                "optimizer_index, on_resume and dry_run are given to the first switch, and hold for those after it.", "then"
            )
        self.param_groups = _param_groups(_default_if_empty(param_groups, "inherit"))
        self.handover = Handover.of(_default_if_empty(handover, "own"))
        _check_clip_val(gradient_clip_val)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(optimizer_index=self.optimizer_index)

    @property
    def phase(self) -> int:
        """Index of the running phase; 0 is the one that the module configured."""
        return self._state.phase

    @property
    def first_step(self) -> int:
        """0-based global step at which the running phase began."""
        return self._state.first_step

    @property
    def explanation(self) -> str:
        """Why the running phase began, and what crossed the switch to it by which rules; empty in the first."""
        return f"{self._state.reason}; {self._state.handed}" if self.phase else ""

    @property
    def shows(self) -> dict[str, float]:
        """What the trigger of the next switch has seen last, in numbers."""
        chain = self.chain[self.phase :]
        return chain[0].when.shows(self._state.trigger) if chain and chain[0].when else {}

    @property
    def chain(self) -> tuple[OptimizerSwitchCallback, ...]:
        """This switch and those after it; empty when it is not enabled."""
        return (self, *(self.then.chain if self.then else ())) if self.enabled else ()

    def __repr__(self) -> str:
        if not self.enabled:
            return f"{type(self).__name__}(enabled=False)"
        then = f", then={self.then!r}" if self.then else ""
        when = f", when={self.when}" if self.when else ""
        return f"{type(self).__name__}(at={None if self.at is None else str(self.at)!r}{when}{then})"

    def switch_now(self) -> None:
        """Asks for the next switch, on any rank; it comes when its trigger `Manual` looks next.

        Raises:
            ConfigError: when the next switch has no such trigger.
        """
        chain = self.chain[self.phase :]
        if not chain or chain[0].when is None or not chain[0].when.of_kind(Manual):
            raise ConfigError("this switch cannot be asked for. Give it the trigger Manual(), alone or among others.", "when")
        self._asked = True

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        if trainer.strategy.restore_checkpoint_after_setup:
            self._stop_reading = strategies.before_restore(trainer, functools.partial(self._read, trainer))
        if not self.enabled or not self._fitting:
            return
        strategies.warn_if_unseen()
        # First, so that a monitor of learning rates sees the new one at the first new step; a new list, because Lightning
        # iterates over the old one.
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [self, *others]  # type: ignore[attr-defined]
        if trainer.global_step < self._state.first_step:
            self._state = SwitchState()  # another Trainer: what an earlier one reached does not hold here
        elif trainer.global_step == 0:
            self._state = replace(self._state, trigger={})

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            self._refuse_later_phase()
            return
        placement = strategies.placement(trainer, self.optimizer_index)
        placement.check()
        _refuse_weight_averaging(trainer)
        if not pl_module.automatic_optimization:
            self._check_manual(placement)
        partition = phases.inheritable(placement.optimizer, placement.groups, strategies.parameter_names(pl_module))
        self._tensors = {**named_tensors(placement.groups, partition), **strategies.parameters(pl_module)}
        self._trainer_clip_val = trainer.gradient_clip_val
        scheduler = placement.lr_scheduler.scheduler if placement.lr_scheduler else None
        first_schedule = {"scheduler": describe_schedule(scheduler)}
        first_groups = settings.of_groups(placement.optimizer, "param_groups")
        self._first = {**settings.of_optimizer(placement.optimizer, "optimizer"), **first_groups, **first_schedule}
        self._options = _options(placement.optimizer)
        name, shapes = class_name(placement.optimizer), strategies.full_shapes(trainer)
        if self._state.phase == 0:
            begun = SwitchState(optimizer=name, partition=partition, trigger=self._state.trigger, shapes=shapes)
            self._state, self._configured = begun, partition
            self._check_fit()
        else:
            self._restore_phase(trainer, shapes)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            self._looked = trainer.global_step
            self._check_triggers(trainer)
            self._plan(trainer)
            self._hold(trainer)
            self._log_phase(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._is_due(trainer, batch_idx):
            return
        if self.dry_run:
            self._tell(trainer, {"at": f"at={self.chain[0].at} was reached"})
            self._moments = (None, *self._moments[1:])
        else:
            self._switch(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step >= self._guarded_to:  # not at a batch's end: in manual optimization it may hold several updates
            self._let_loose()
        if self._watching and self._watching.of_kind(Swats):
            running = strategies.placement(trainer, self.optimizer_index).optimizer
            if optimizer.param_groups is running.param_groups:  # and not another one of a manual optimization
                self._lrs = phases.lrs(running)  # at the batch's end the scheduler has been stepped

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._scale is not None and trainer.global_step > self.first_step:
            before, self._scale = self._scale, None
            if trainers.loss_scale(trainer) < before:  # type: ignore[operator] # there was one before
                rank_zero_info(
                    f"The first step of {self._state.optimizer} (step {self.first_step}) was skipped, because its gradients were "
                    "not finite. It counts as a step."
                )

        if self._watching and trainer.global_step != self._looked:
            self._look(trainer, self._watching)
        self._looked = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        watching = self._watching.of_kind(OnMetric) if self._watching else []  # type: ignore[type-abstract] # it is only asked for
        names = [trigger.monitor for trigger in watching]
        if names and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._observe(trainer, Seen(trainer.global_step, _clock(trainer), trainers.agreed_metrics(trainer, names)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._moments and not self.dry_run:
            switch = self.chain[self.phase]
            rank_zero_info(f"NO SWITCH: training ended at step {trainer.global_step}, before {switch._words()}.")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning then calls no hook of training at all, and ends as if all were well.
        if self.enabled and 0 in (trainer.limit_train_batches, trainer.num_training_batches):
            raise ConfigError(
                "there is not one training batch, so the switch is never reached. Check trainer.limit_train_batches, and whether "
                "the data fill a batch where drop_last is true.",
                "switch",
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(trainer)

    def state_dict(self) -> dict[str, Any]:
        return self._state.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting:  # an evaluation takes weights from a checkpoint, and a fit after it goes on from its own phase
            self._state = self._saved = SwitchState.from_dict(state_dict)

    def _check_manual(self, placement: strategies.Plain) -> None:
        """Refuses what has no meaning where the module steps optimizers and schedulers itself."""
        for index, switch in enumerate(self.chain):
            if switch.at is not None and switch.at.unit != "st":
                raise ConfigError(
                    f"{switch.at} cannot be counted under manual optimization, where steps count every step() of each optimizer. "
                    "Write it in such steps (st).",
                    f"{_key(index)}.at",
                )
            if switch.scheduler is not None and placement.lr_scheduler is None:
                raise ConfigError(
                    "the module steps no scheduler for this optimizer, so none can take its place. Leave it out.",
                    f"{_key(index)}.scheduler",
                )
            if not isinstance(switch.param_groups, Inherit):
                raise ConfigError(
                    "under manual optimization the groups stay as they are. Write 'inherit'.", f"{_key(index)}.param_groups"
                )
            if switch.gradient_clip_val != "keep":
                raise ConfigError(
                    "under manual optimization the module clips by itself. Write 'keep'.", f"{_key(index)}.gradient_clip_val"
                )

    # What is known before training

    def planned(self, trainer: Trainer) -> Iterator[PlannedPhase]:
        """Builds every phase that is still to come, for a trial, and yields each.

        Raises:
            ConfigError: for a moment outside the training or not after the one before it, and for a phase that cannot be built.
        """
        clock, placement = _clock(trainer), strategies.placement(trainer, self.optimizer_index)
        partition, previous = self._state.partition, self._latest_moment(clock)
        before = placement.optimizer
        running, begun = placement.lr_scheduler and placement.lr_scheduler.scheduler, self._state.schedule_step
        for index, switch in enumerate(self.chain[self.phase :], start=self.phase):
            try:
                moment = switch._moment(clock, previous, is_first=index == 0)
                # Where only a trigger decides, the next step is as good a moment for a trial as any other.
                previous = previous + 1 if moment is None else moment
                first_step = max(previous, self._state.first_step)
                partition = switch._partition(partition, trainer)
                phase_clock = replace(clock, first_step=first_step)
                schedule, begun = switch._schedule(running, begun, first_step)
                phase = phases.build(switch.optimizer, schedule, partition, self._tensors, phase_clock, first_step - begun)
                self._check_handover(index, before, phase.optimizer, partition, phase_clock, placement)
                running, before = phase.lr_scheduler, phase.optimizer
                placement.check_next(phase.optimizer, phase.lr_schedulers, switch.gradient_clip_val)
                partition = self._reached(index, partition, phase.optimizer, trainer)
            except ConfigError as error:
                raise error.within(_key(index)) from None
            yield PlannedPhase(moment, switch._words(), phase, "" if switch.handover.lr == "own" else switch.handover.lr)

    def _latest_moment(self, clock: Clock) -> int:
        """The moment that the next one must lie after: that of the running phase, or where a trigger began it, its latest."""
        last = self.chain[self.phase - 1] if self.phase else None
        if last is None or last.when is None:
            return self._state.first_step
        return 0 if last.at is None else last.at.steps(clock, clock.total_steps, key="at")

    def _check_handover(
        self,
        index: int,
        running: Optimizer,
        following: Optimizer,
        partition: Partition,
        clock: Clock,
        placement: strategies.Plain,
    ) -> None:
        """Refuses rules that have no meaning between two optimizers, or here."""
        switch = self.chain[index]
        handover = switch.handover
        try:
            handover.check(running, following, partition, inherits=isinstance(switch.param_groups, Inherit))
            handover.guard_steps(clock)
            if handover.looks:
                key = "lr" if handover.matches else "momentum" if handover.momentum == "carry" else "guard"
                placement.check_state("a handover of what the running optimizer knows", key)
            if handover.lr == "keep" and self._is_split(index - 1) and not isinstance(switch.param_groups, Inherit):
                raise ConfigError(
                    "the running phase has a learning rate for each tensor, which other groups cannot keep. Write param_groups: "
                    "inherit, or own.",
                    "lr",
                )
            before = self.chain[index - 1].handover if self._is_split(index - 1) else None
            if handover.weight_decay == "match" and before and before.weight_decay == "match" and not self._is_split(index):
                raise ConfigError(
                    "the running phase has a weight decay for each tensor, which groups of several cannot match. Write own, or let "
                    "lr be keep, or matched per tensor.",
                    "weight_decay",
                )
        except ConfigError as error:
            raise error.within("handover") from None
        if switch.when is not None and switch.when.of_kind(Swats):
            if moments.family(running) != "adam":
                raise ConfigError(
                    f"SWATS looks at steps of Adam, AdamW, NAdam or RAdam, and the running optimizer is {class_name(running)}.",
                    "when",
                )
            found_per = {trigger.per for trigger in switch.when.of_kind(Swats)}
            if handover.lr == "match_projection" and handover.per in ("model", "group") and handover.per not in found_per:
                raise ConfigError(
                    f"the handover takes a learning rate per {handover.per}, and SWATS finds one per "
                    f"{', '.join(sorted(found_per))}. Give both the same.",
                    "handover.per",
                )
            placement.check_state("SWATS", "when")
            placement.check_gradients(running, "when")

    def _words(self) -> str:
        """When it comes, for a person."""
        words = [f"at={self.at}"] if self.at is not None else []
        return " or ".join([*words, *([f"when={self.when}"] if self.when else [])])

    def _moment(self, clock: Clock, previous: int, is_first: bool) -> int | None:
        if self.at is None:
            return None
        step = self.at.steps(clock, clock.total_steps, key="at")
        if step <= 0:
            raise ConfigError(f"{self.at} is step {step}; the first phase would not make a step. Begin with this optimizer.", "at")
        if not is_first and step <= previous:
            raise ConfigError(f"{self.at} is step {step}, but the switch before it is at step {previous}. Moments must grow.", "at")
        if clock.total_steps is not None and step >= clock.total_steps:
            raise ConfigError(
                f"{self.at} is step {step}, but training ends after {clock.total_steps} steps. Choose an earlier moment.", "at"
            )
        return step

    def _schedule(self, running: Any, begun: int, step: int) -> tuple[Any, int]:
        """The schedule of the phase that begins at a step, and its first step.

        Args:
            running: the scheduler of the phase before it.
            begun: first step of that one's schedule.
            step: the moment of the switch.
        """
        if not isinstance(self.scheduler, Continue):
            return self.scheduler, step
        if not isinstance(running, ScheduleLR) or isinstance(running.schedule, Plateau):
            raise ConfigError(
                f"'continue' needs a running schedule that is a function of the step, and {describe_schedule(running)} is not one. "
                "Give the phase before it a schedule of lightning_adaptive, or the switch one of its own.",
                "scheduler",
            )
        return running.schedule, begun

    def _is_split(self, index: int) -> bool:
        """Whether the phase that a switch leads to has a group for each tensor: by its handover, or kept from the phase before."""
        if index < 0:
            return False
        switch = self.chain[index]
        keeps = switch.handover.lr == "keep" and isinstance(switch.param_groups, Inherit)
        return switch.handover.splits or (keeps and self._is_split(index - 1))

    def _partition(self, running: Partition, trainer: Trainer) -> Partition:
        if isinstance(self.param_groups, Inherit):
            return running
        try:
            return self.param_groups.partition(strategies.described(trainer.lightning_module))
        except ConfigError as error:
            raise error.within("param_groups") from None

    def _reached(self, index: int, partition: Partition, optimizer: Optimizer, trainer: Trainer) -> Partition:
        """The partition as it is saved, and as a later phase inherits it: of what rules say, ratios and zero decays."""
        switch = self.chain[index]
        if isinstance(switch.param_groups, Inherit):
            return partition
        if self._is_split(index):
            optimizer, _ = phases.build_optimizer(switch.optimizer, partition, self._tensors)
        groups = optimizer.param_groups
        if len(groups) != len(partition):
            return partition
        return phases.inheritable(optimizer, groups, strategies.parameter_names(trainer.lightning_module))

    def _plan(self, trainer: Trainer) -> None:
        """Fixes the moments, and settles with the checkpoint what this run is configured with."""
        clock = _clock(trainer)
        now = dict(self._first)
        for index, switch in enumerate(self.chain[: self.phase]):
            try:
                partition = switch._partition(self._state.partition, trainer)
                now |= switch._settings(index, phases.build_optimizer(switch.optimizer, partition, self._tensors)[0])
            except ConfigError as error:
                raise error.within(_key(index)) from None
        moments = []
        for index, planned in enumerate(self.planned(trainer), start=self.phase):
            moments.append(planned.first_step)
            now |= self.chain[index]._settings(index, planned.phase.optimizer)
        now |= {
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
            "steps of an epoch": clock.steps_per_epoch,
            "steps of the training": clock.total_steps,
            "seed": os.environ.get("PL_GLOBAL_SEED"),
        }
        if self._saved is not None:
            self._settle(trainer, settings.changes(self._saved.settings, now))
            self._saved = None
        self._check_agreement(trainer, moments)
        self._moments = tuple(moments)
        self._state = replace(self._state, settings=now)

    def _check_agreement(self, trainer: Trainer, moments: list[int | None]) -> None:
        """Refuses processes that would switch at different steps, or observe at different ones."""
        clock, watching = _clock(trainer), [switch.when for switch in self.chain[self.phase :] if switch.when]
        numbers = [*moments, clock.total_steps, *(trigger.first_step(clock) for trigger in watching)]
        if any(trigger.of_kind(OnMetric) for trigger in watching):
            numbers.append(clock.steps_per_epoch)
        if not trainers.is_same_everywhere(trainer, numbers):
            raise ConfigError(
                f"the processes have data of different lengths ({clock.steps_per_epoch} steps an epoch on one of them), so they "
                "would not switch at one step. Let Lightning part the data (true), or set trainer.limit_train_batches to the "
                "least number of batches.",
                "trainer.use_distributed_sampler",
            )

    def _settings(self, index: int, optimizer: Optimizer) -> Settings:
        key = _key(index)
        return {
            f"{key}.at": None if self.at is None else str(self.at),
            f"{key}.when": None if self.when is None else str(self.when),
            **settings.of_optimizer(optimizer, f"{key}.optimizer"),
            f"{key}.scheduler": settings.of_scheduler(self.scheduler),
            f"{key}.param_groups": repr(self.param_groups),
            f"{key}.handover": str(self.handover),
            f"{key}.gradient_clip_val": self.gradient_clip_val,
        }

    # The switch, in its order: ask, build, exchange, announce

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        if not self._moments or not strategies.opens_accumulation_window(trainer, batch_idx):
            return False
        moment, has_fired = self._moments[0], "fired" in self._state.trigger and not self.dry_run
        return has_fired or (moment is not None and trainer.global_step >= moment)

    @property
    def _watching(self) -> Trigger | None:
        """The trigger of the switch that comes next, while it observes."""
        return self.chain[self.phase].when if self._moments else None

    def _look(self, trainer: Trainer, trigger: Trigger) -> None:
        """What a trigger sees after a step, in those steps in which it looks."""
        step, manual = trainer.global_step, trigger.of_kind(Manual)
        seen = Seen(step, _clock(trainer))
        if any(step % one.every_n_steps == 0 for one in manual):
            asked, self._asked = trainers.is_asked(trainer, self._asked, [one.file for one in manual]), False
            seen = replace(seen, asked=asked)
        if step >= trigger.first_step(seen.clock):
            if any(step % one.every_n_steps == 0 for one in trigger.of_kind(Swats)):
                seen = replace(seen, projections=self._projections(trainer))
            monitor = find_monitor(trainer)
            if monitor is not None and any(step % one.every_n_steps == 0 for one in trigger.of_kind(OnNoise)):
                seen = replace(seen, noise=monitor.values())
        if seen.asked or seen.projections is not None or seen.noise is not None:
            self._observe(trainer, seen)

    def _projections(self, trainer: Trainer) -> dict[str, Projection]:
        """What the last step has done, by group. The one place of it that waits for the device."""
        placement = strategies.placement(trainer, self.optimizer_index)
        optimizer, lrs = placement.optimizer, self._lrs
        tensors, rows = moments.projections(optimizer, lrs)
        columns = dict(zip(tensors, placement.whole(tensors, rows).T.tolist(), strict=True))
        found = {}
        for index, group in enumerate(optimizer.param_groups):
            of_group = [columns[tensor] for tensor in group["params"] if tensor in columns]
            update, along = sum(column[0] for column in of_group), sum(column[1] for column in of_group)
            name = group.get("name", "" if len(optimizer.param_groups) == 1 else f"pg{index + 1}")
            found[name] = Projection(update, along, float(group["betas"][1]), lrs[index])
        return found

    def _observe(self, trainer: Trainer, seen: Seen) -> None:
        """Lets the trigger see something, which is the same on every rank, and so is what it remembers."""
        trigger, before = self._watching, self._state.trigger
        assert trigger is not None
        try:
            after = trigger.observe(before, seen)
        except ConfigError as error:
            raise error.within(f"{_key(self.phase)}.when") from None
        self._state = replace(self._state, trigger=after)
        # Of steps only the first is said: where weights are no longer finite, none of those that follow is.
        known = trigger.passed_over(before)
        if trigger.passed_over(after) > known and (seen.metrics is not None or not known):
            what = "A step seen by" if seen.metrics is None else "A metric of"
            rank_zero_warn(f"{what} {trigger} was not finite at step {seen.step}. It is passed over.")
        if self.dry_run:
            told = trigger.reasons(before)
            self._tell(trainer, {name: reason for name, reason in trigger.reasons(after).items() if name not in told})
        if seen.metrics is not None or (seen.projections and seen.step % trainer.log_every_n_steps == 0):  # type: ignore[attr-defined]
            shown = trigger.shows(after)
            self._log(trainer, {f"switch/{name}": value for name, value in shown.items()})

    def _tell(self, trainer: Trainer, reasons: Mapping[str, str]) -> None:
        """Says what a dry run would do now."""
        for name, reason in reasons.items():
            rank_zero_info(
                f"DRY RUN at step {trainer.global_step} (epoch {trainer.current_epoch}): "
                f"{name or 'the trigger'} would switch now, because {reason}."
            )

    def _check_triggers(self, trainer: Trainer) -> None:
        """Refuses a trigger that would never see anything."""
        for index, switch in enumerate(self.chain):
            key = f"{_key(index)}.when"
            if switch.when is None:
                continue
            if switch.when.of_kind(OnMetric) and not trainer.enable_validation:
                raise ConfigError(
                    f"{switch.when} looks at a metric after each validation, and this training has none: a module with "
                    "validation_step, validation data and limit_val_batches above 0 are needed.",
                    key,
                )
            if switch.when.of_kind(OnNoise) and find_monitor(trainer) is None:
                raise ConfigError(
                    "OnNoise reads what GradientNoiseMonitor measures, which is not among the callbacks. Add it: callbacks=noise, "
                    "or GradientNoiseMonitor() in Python.",
                    key,
                )
            try:
                switch.when.first_step(_clock(trainer))
            except ConfigError as error:
                raise error.within(key) from None

    def _switch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        switch = self.chain[self.phase]
        running = strategies.placement(trainer, self.optimizer_index).optimizer
        before, freed, old = phases.describe(running), phases.state_bytes(running), weakref.ref(running)
        _warn_at_foot(running, switch.handover)
        del running  # or it could not be freed
        phase, state, crossed = self._build_next(trainer, pl_module)
        after, rule = phases.describe(phase.optimizer), _lr_rule(switch.handover, phase.optimizer)
        crossings = [*([] if switch.handover.momentum == "carry" else ["momentum zero"]), *crossed.notes]
        state = replace(state, handed=", ".join([f"lr {rule}", *crossings]))
        self._exchange(trainer, phase, state)
        self._moments = self._moments[1:]
        self._hold(trainer)
        self._scale = trainers.loss_scale(trainer)
        fate = "freed" if old() is None else "still held elsewhere"
        facts = [
            describe_schedule(phase.lr_scheduler),
            *crossings,
            f"{fate} {format_bytes(freed - crossed.shared)}",
            *phase.notes,
        ]
        self._announce(
            trainer,
            f"SWITCH at step {state.first_step} (epoch {trainer.current_epoch}): {before} -> {after} ({rule}), "
            f"because {state.reason}; {', '.join(facts)}",
        )

    def _build_next(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Phase, SwitchState, Crossed]:
        switch, step = self.chain[self.phase], trainer.global_step
        placement = strategies.placement(trainer, self.optimizer_index)
        running = phases.record(placement.optimizer, placement.groups, strategies.parameter_names(pl_module))
        partition = switch._partition(extend(self._state.partition, running), trainer)
        scheduler = placement.lr_scheduler and placement.lr_scheduler.scheduler
        schedule, begun = switch._schedule(scheduler, self._state.schedule_step, step)
        clock = _clock(trainer, step)
        groups = split(partition) if self._is_split(self.phase) else partition
        optimizer, notes = phases.build_optimizer(switch.optimizer, groups, self._tensors)
        crossed = handovers.cross(
            switch.handover,
            placement.optimizer,
            optimizer,
            groups,
            placement.whole,
            running_groups=placement.groups,
            inherits=isinstance(switch.param_groups, Inherit),
            estimate=switch.when.estimate(self._state.trigger) if switch.when else None,
            factor=_factor(schedule, clock, step - begun) if isinstance(switch.scheduler, Continue) else 1.0,
        )
        phase = Phase(optimizer, build_scheduler(schedule, optimizer, clock, step - begun), notes)
        state = SwitchState(
            phase=self.phase + 1,
            first_step=step,
            schedule_step=begun,
            optimizer=class_name(phase.optimizer),
            partition=self._reached(self.phase, partition, phase.optimizer, trainer),
            reason=self._state.trigger.get("fired") or f"at={switch.at} was reached",
            limit=crossed.limit,
            shapes=self._state.shapes,
            settings=self._state.settings,
        )
        return phase, state, crossed

    def _hold(self, trainer: Trainer) -> None:
        """Guards what is left of the running phase's first updates."""
        self._let_loose()
        if self._state.limit is None or not self.phase:
            return
        # In global steps, which a step that the scaler skips counts as well: so a resumed run knows where the window ends.
        steps = self.chain[self.phase - 1].handover.guard_steps(_clock(trainer, self.first_step))
        self._guarded_to = self.first_step + steps
        if trainer.global_step < self._guarded_to:
            placement = strategies.placement(trainer, self.optimizer_index)
            self._guard = Guard(placement.optimizer, self._state.limit, placement.whole)

    def _let_loose(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    def _exchange(self, trainer: Trainer, phase: Phase, state: SwitchState) -> None:
        """Puts optimizer, schedule, state and clipping in place, all or nothing."""
        placement = strategies.placement(trainer, self.optimizer_index)
        before = self._state, trainer.gradient_clip_val
        try:
            placement.install(phase.optimizer, phase.lr_schedulers)
            self._state = state
            trainer.gradient_clip_val = self._clip_val()
            assert placement.stepping is phase.optimizer
        except BaseException:
            placement.undo()
            self._state, trainer.gradient_clip_val = before
            raise

    def _announce(self, trainer: Trainer, line: str) -> None:
        rank_zero_info(line)
        self._log_phase(trainer)

    def _log_phase(self, trainer: Trainer) -> None:
        self._log(trainer, {"phase": self.phase})

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        trainers.log_metrics(trainer, values, trainer.global_step)

    # Resume and end

    def _read(self, trainer: Trainer, path: Path) -> None:
        """On a strategy that restores late: puts the phase in place that wrote the checkpoint, before its state is loaded."""
        if not self._fitting or (self.enabled and not self._tensors):
            return
        state = checkpoints.read_metadata(path).get("callbacks", {}).get(self.state_key)
        if state is None:
            return
        if not self.enabled:
            self._state = SwitchState.from_dict(state)
            self._refuse_later_phase()
            return
        now, self._saved = self._state, SwitchState.from_dict(state)
        if self._saved.phase:
            self._state = self._saved
            self._restore_phase(trainer, now.shapes)
        else:
            self._state = replace(now, trigger=self._saved.trigger)
            self._check_fit()

    def _refuse_later_phase(self) -> None:
        """Refuses, without a switch, to go on from a checkpoint of a later phase."""
        state = self._state
        if state.phase:
            raise CheckpointError(
                f"the checkpoint was written in phase {state.phase} ({state.optimizer}, from step {state.first_step}), but this "
                "run has no switch. Resume with the switch of the run that wrote it."
            )

    def _check_fit(self) -> None:
        """Refuses a checkpoint of the first phase that another optimizer wrote, or for other parameters."""
        now, saved = self._state, self._saved
        if saved is None:
            return
        if now.optimizer != saved.optimizer:
            raise CheckpointError(
                f"the checkpoint's first phase was stepped by {saved.optimizer}, this run's by {now.optimizer}. Resume with the "
                f"optimizer of the run that wrote it; to change it, let a switch lead from {saved.optimizer} to {now.optimizer}."
            )
        names, saved_names = ({name for group in state.partition for name in group.parameters} for state in (now, saved))
        self._refuse_other_parameters(names, saved_names, saved)
        if members(now.partition) != members(saved.partition):
            raise CheckpointError(
                f"{_first_difference(saved.partition, now.partition)}, and the optimizer's state lies in the order of the groups. "
                "Resume with the groups of the run that wrote the checkpoint; to change them, let a switch lead to others."
            )

    def _refuse_other_parameters(self, names: set[str], saved_names: set[str], saved: SwitchState) -> None:
        for difference, where in ((saved_names - names, "the checkpoint"), (names - saved_names, "this run")):
            if difference:
                shown = ", ".join(sorted(difference)[:3]) + (", ..." if len(difference) > 3 else "")
                raise CheckpointError(f"{len(difference)} parameters are optimized in {where} only: {shown}.")
        for name, shape in self._state.shapes.items():
            if name in saved_names and saved.shapes.get(name, shape) != shape:
                raise CheckpointError(f"{name} has shape {saved.shapes[name]} in the checkpoint and {shape} in this run.")

    def _settle(self, trainer: Trainer, changes: list[settings.Change]) -> None:
        """Obeys `on_resume` for what this run is configured with otherwise than the checkpoint's; a seed is only said."""
        if not changes:
            return
        self._refuse_other_scheduler(trainer, changes)
        listed = settings.listed(changes)
        if self.on_resume == "error" and any(change.key != "seed" for change in changes):
            raise CheckpointError(
                f"this run is configured otherwise than the one that wrote the checkpoint:\n{listed}\n"
                "Say which options the running optimizer goes on with: switch.on_resume=config or switch.on_resume=checkpoint."
            )
        if self.on_resume == "config" and self._configured is None:
            raise CheckpointError(
                "this run's rules put parameters into other groups than those of the checkpoint, in whose order the optimizer's "
                "state lies. Resume with the rules of the run that wrote it, or with switch.on_resume=checkpoint."
            )
        rank_zero_info(f"RESUMED with other settings (on_resume={self.on_resume}):\n{listed}")
        if self.on_resume == "config":
            self._state = replace(self._state, partition=self._configured or self._state.partition)
            _impose_options(strategies.placement(trainer, self.optimizer_index), self._options)

    def _refuse_other_scheduler(self, trainer: Trainer, changes: list[settings.Change]) -> None:
        """Refuses another scheduler of torch than that of the checkpoint, whose state and options it has taken over by now."""
        placed = strategies.placement(trainer, self.optimizer_index).lr_scheduler
        if placed is None or isinstance(placed.scheduler, ScheduleLR):
            return
        key = f"{_key(self.phase - 1)}.scheduler" if self.phase else "scheduler"
        change = next((change for change in changes if change.key == key), None)
        if change is None:
            return
        same_class = str(change.saved).partition(",")[0] == str(change.now).partition(",")[0]
        if self.on_resume == "config" or not same_class:
            raise CheckpointError(
                f"{change}, and a scheduler of torch takes its options back from the checkpoint. Resume with the one of the run "
                "that wrote it, or let a switch lead to the other."
            )

    def _restore_phase(self, trainer: Trainer, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Builds and installs the phase that a checkpoint, or an earlier fit of this trainer, had reached."""
        state, phase_count = self._state, len(self.chain)
        if state.phase > phase_count:
            raise CheckpointError(
                f"the checkpoint was written in phase {state.phase} ({state.optimizer}), but this run's switch leads only to "
                f"phase {phase_count}. Resume with the switch of the run that wrote it."
            )
        missing = [name for group in state.partition for name in group.parameters if name not in self._tensors]
        if missing:
            raise CheckpointError(
                f"the checkpoint's {state.optimizer} holds {len(missing)} parameters that the model does not have: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
            )
        switch = self.chain[state.phase - 1]
        clock = _clock(trainer, first_step=state.first_step)
        try:
            partition = switch._partition(state.partition, trainer)
            self._configured = partition if members(partition) == members(state.partition) else None
            # Rules that regroup would put the saved state onto other parameters; the options come back with that state.
            built_for = state.partition if self._configured is None else partition
            built_for = split(built_for) if self._is_split(state.phase - 1) else built_for
            since = state.first_step - state.schedule_step
            phase = phases.build(switch.optimizer, self._restored_schedule(trainer), built_for, self._tensors, clock, since)
        except ConfigError as error:
            raise error.within(_key(state.phase - 1)) from None
        if self._configured is not None:
            self._configured = self._reached(state.phase - 1, partition, phase.optimizer, trainer)
        name = class_name(phase.optimizer)
        if name != state.optimizer:
            raise CheckpointError(
                f"the checkpoint's phase {state.phase} was stepped by {state.optimizer}, but {_key(state.phase - 1)}.optimizer is "
                f"{name} in this run. Resume with the optimizer of the run that wrote it, and let switch.then lead to another."
            )
        self._state = replace(state, shapes=shapes)
        recorded = {name for group in state.partition for name in group.parameters}
        self._refuse_other_parameters(recorded, recorded, state)
        self._options = switch.handover.configured(_options(phase.optimizer), built_for)
        self._exchange(trainer, phase, self._state)

    def _restored_schedule(self, trainer: Trainer) -> Any:
        """The schedule of the phase that is restored: its own, or that of the phase which it continues, at the end the module's."""
        chain = self.chain[: self.phase]
        own = [index for index, switch in enumerate(chain) if not isinstance(switch.scheduler, Continue)]
        if own and own[-1] == self.phase - 1:
            return chain[-1].scheduler
        if own:
            earlier = chain[own[-1]]
            partition = earlier._partition(self._state.partition, trainer)
            clock = _clock(trainer, self._state.schedule_step)
            running: Any = phases.build(earlier.optimizer, earlier.scheduler, partition, self._tensors, clock).lr_scheduler
        else:
            placed = strategies.placement(trainer, self.optimizer_index).lr_scheduler
            running = placed and placed.scheduler
        return chain[-1]._schedule(running, self._state.schedule_step, self._state.first_step)[0]

    def _clip_val(self) -> float | None:
        values = [switch.gradient_clip_val for switch in self.chain[: self.phase] if switch.gradient_clip_val != "keep"]
        return values[-1] if values else self._trainer_clip_val

    def _let_go(self, trainer: Trainer) -> None:
        self._let_loose()
        if self._tensors:
            trainer.gradient_clip_val = self._trainer_clip_val
            self._tensors, self._moments = {}, ()
        if self._stop_reading is not None:
            self._stop_reading()
            self._stop_reading = None


def find_switch(trainer: Trainer) -> OptimizerSwitchCallback | None:
    """The trainer's enabled switch, if it has one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, OptimizerSwitchCallback) and callback.enabled), None)


def _clock(trainer: Trainer, first_step: int = 0) -> Clock:
    """The trainer's clock. It counts batches; where the steps of all optimizers of a manual optimization end, nobody knows."""
    clock = trainers.clock(trainer, first_step)
    return clock if trainer.lightning_module.automatic_optimization else replace(clock, total_steps=None)


def _key(index: int) -> str:
    """The key of a switch in the chain, as a user types it: ``switch``, ``switch.then``, ..."""
    return ".".join(("switch", *["then"] * index))


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


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


def _impose_options(placement: strategies.Plain, options: list[dict[str, Any]]) -> None:
    """Gives the running optimizer these options instead of those that it was restored with."""
    optimizer, config = placement.optimizer, placement.lr_scheduler
    for group, fresh in zip(optimizer.param_groups, options, strict=True):
        factor = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0
        group.update(fresh)
        group["lr"] = group.get("initial_lr", group["lr"]) * factor
    if config is None:
        return
    if isinstance(config.scheduler, ScheduleLR):
        config.scheduler.refresh()
    else:
        config.scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]


def _default_if_empty(value: Any, default: Any) -> Any:
    """A slot that a configuration left empty (``{}`` or ``null``) means its default."""
    return default if value is None or (isinstance(value, Mapping) and not value) else value


def _refuse_weight_averaging(trainer: Trainer) -> None:
    """Refuses the callback that puts a scheduler of its own in place towards the end of training."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    found = next((callback for callback in callbacks if isinstance(callback, StochasticWeightAveraging)), None)
    if found is not None:
        raise ConfigError(
            f"{type(found).__name__} and OptimizerSwitchCallback both replace the scheduler during training, so one would undo the "
            "other. Remove one of them; weights are averaged without a scheduler by lightning's WeightAveraging or "
            "EMAWeightAveraging.",
            "callbacks",
        )


def _param_groups(value: Any) -> Inherit | ParamGroups:
    if value == "inherit":
        return Inherit()
    if isinstance(value, Inherit | ParamGroups):
        return value
    raise ConfigTypeError(f"{value!r} says nothing about groups. Write 'inherit' or ParamGroups().", "param_groups")


def _check_clip_val(value: Any) -> None:
    if value is None or value == "keep":
        return
    if not is_number(value):
        raise ConfigTypeError(f"{value!r} is no clipping value. Write a number, null (no clipping) or 'keep'.", "gradient_clip_val")
    if value < 0:
        raise ConfigError(f"{value!r} is below zero.", "gradient_clip_val")


def _factor(schedule: Schedule, clock: Clock, since: int) -> float:
    """What a schedule that goes on begins the phase with."""
    return schedule.curves(replace(clock, first_step=clock.first_step - since))["lr"](since)


def _warn_at_foot(running: Optimizer, handover: Handover) -> None:
    """Says so when a learning rate, or the length of updates, is handed over that has come down to nearly nothing."""
    if handover.lr == "own" and handover.guard is None:
        return
    now, base = (max(float(group.get(key, group["lr"])) for group in running.param_groups) for key in ("lr", "initial_lr"))
    if now >= 0.01 * base:
        return
    what, cure = "The learning rate that is handed over is", "lr=own"
    if handover.lr == "own":
        what, cure = "The updates to whose length the guard holds the next ones are", "guard=null"
    rank_zero_warn(
        f"{what} at the foot of the schedule: {class_name(running)} steps with {now:.1e}, and its base is {base:.1e}. The next "
        f"phase would hardly move. Let the switch come earlier, or write handover.{cure}."
    )


def _lr_rule(handover: Handover, optimizer: Optimizer) -> str:
    """The rule that gave the learning rate, and whether it is the class's default rather than the user's."""
    if handover.lr != "own":
        return handover.words()
    defaults = [f"the default of {type(part).__name__}" for part in parts(optimizer).values() if _has_default_lr(part)]
    return ", ".join([handover.words(), *dict.fromkeys(defaults)])


def _has_default_lr(optimizer: Optimizer) -> bool:
    default = inspect.signature(type(optimizer)).parameters.get("lr")
    return default is not None and optimizer.param_groups[0].get("initial_lr") == default.default


def format_bytes(count: int) -> str:
    """A number of bytes for a person.

    >>> format_bytes(304_000), format_bytes(12)
    ('304.0 KB', '12 B')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
