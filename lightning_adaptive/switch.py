"""`OptimizerSwitchCallback`: moves a Lightning run from one optimizer and schedule to the next."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_adaptive import checkpoints, module_parameters, moments, phases, settings, strategies, trainers
from lightning_adaptive import handover as handovers
from lightning_adaptive.chain import PlannedPhase, Switch, linked
from lightning_adaptive.combined import class_name
from lightning_adaptive.durations import Clock, DurationLike
from lightning_adaptive.errors import CheckpointError, ConfigError, check_count, check_word, within
from lightning_adaptive.guard import Guard
from lightning_adaptive.handover import Crossed, Handover
from lightning_adaptive.lr_schedulers import ScheduleLR, SchedulerLike, build_scheduler, describe_schedule
from lightning_adaptive.noise import find_monitor
from lightning_adaptive.param_groups import Inherit, ParamGroups
from lightning_adaptive.partitions import Partition, extend, group_names, members, named_tensors, split
from lightning_adaptive.phases import OptimizerFactory, Phase, format_bytes
from lightning_adaptive.rules import Parameter
from lightning_adaptive.schedules import Continue
from lightning_adaptive.settings import Settings
from lightning_adaptive.switch_state import SwitchState, check_first_phase, check_later_phase, check_shapes
from lightning_adaptive.triggers import Manual, OnNoise, Projection, Seen, Swats, Trigger


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
        ConfigError: for a moment that is missing or malformed, or an option that is not allowed. At the start of training:
            for a moment outside it, a strategy without support, or a phase that cannot be built.
        ConfigTypeError: for a bare number as moment, or an optimizer where a factory belongs.
        CheckpointError: on resume, for saved state that does not fit this run.

    >>> from functools import partial
    >>> import torch
    >>> OptimizerSwitchCallback(at="30ep", optimizer=partial(torch.optim.SGD, lr=0.1))
    OptimizerSwitchCallback(at=30ep)
    """

    def __init__(
        self,
        at: DurationLike | None = None,
        optimizer: OptimizerFactory | None = None,
        *,
        when: Trigger | None = None,
        scheduler: SchedulerLike | Literal["continue"] | None = None,
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
        self.on_resume = on_resume
        self.chain: tuple[Switch, ...] = ()
        """This switch and those after it; empty when it is not enabled."""
        self._state = SwitchState()
        self._tensors: dict[str, Tensor] = {}
        self._due_at: tuple[int | None, ...] = ()
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
        check_count(optimizer_index, "optimizer_index", "optimizers, counted from 0", least=0)
        check_word(on_resume, "on_resume", ("error", "config", "checkpoint"))
        own = Switch.of(at, when, optimizer, scheduler, param_groups, handover, gradient_clip_val)
        if then is not None and then.enabled and (then.optimizer_index != 0 or then.on_resume != "error" or then.dry_run):
            raise ConfigError(
                "optimizer_index, on_resume and dry_run are given to the first switch, and hold for those after it.", "then"
            )
        self.chain = linked([own, *(then.chain if then is not None else ())])

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
        return self._next.when.shows(self._state.trigger) if self._next and self._next.when else {}

    @property
    def _next(self) -> Switch | None:
        """The switch that comes next."""
        return next(iter(self.chain[self.phase :]), None)

    @property
    def _watching(self) -> Trigger | None:
        """The trigger of the switch that comes next, while it observes."""
        return self._next.when if self._due_at and self._next else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'; '.join(switch.words for switch in self.chain) or 'enabled=False'})"

    def switch_now(self) -> None:
        """Asks for the next switch, on any rank; it comes when its trigger `Manual` looks next.

        Raises:
            ConfigError: when the next switch has no such trigger.
        """
        if self._next is None or self._next.when is None or not self._next.when.of_kind(Manual):
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
            check_later_phase({}, self._state, phase_count=0)
            return
        placement = self._placement(trainer)
        placement.check()
        _refuse_weight_averaging(trainer)
        if not pl_module.automatic_optimization:
            has_scheduler = placement.lr_scheduler is not None
            for switch in self.chain:
                with within(switch.key):
                    switch.check_manual(has_scheduler)
        partition = phases.inheritable(placement.optimizer, placement.groups, module_parameters.names(pl_module))
        self._tensors = {**named_tensors(placement.groups, partition), **module_parameters.tensors(pl_module)}
        self._trainer_clip_val = trainer.gradient_clip_val
        self._first = {
            **settings.of_optimizer(placement.optimizer, "optimizer"),
            **settings.of_groups(placement.optimizer, "param_groups"),
            "scheduler": describe_schedule(_scheduler(placement)),
        }
        self._options = _options(placement.optimizer)
        name, shapes = class_name(placement.optimizer), placement.full_shapes(pl_module)
        if self._state.phase == 0:
            begun = SwitchState(optimizer=name, partition=partition, trigger=self._state.trigger, shapes=shapes)
            self._state, self._configured = begun, partition
            if self._saved is not None:
                check_first_phase(begun, self._saved)
        else:
            self._restore_phase(trainer, shapes)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled:
            self._looked = trainer.global_step
            self._check_triggers(trainer)
            self._plan(trainer)
            self._hold(trainer)
            self._log(trainer, {"phase": self.phase})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._end_guard(trainer)
        if not self._is_due(trainer, batch_idx):
            return
        if self.dry_run:
            self._tell(trainer, {"at": f"at={self.chain[0].at} was reached"})
            self._due_at = (None, *self._due_at[1:])
        else:
            self._switch(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._end_guard(trainer)  # here too, as a batch of manual optimization may hold several updates
        if self._watching and self._watching.of_kind(Swats):
            running = self._placement(trainer).optimizer
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
        names = self._watching.monitors() if self._watching else []
        if names and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._observe(trainer, Seen(trainer.global_step, _clock(trainer), trainers.agreed_metrics(trainer, names)))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due_at and not self.dry_run:
            words = self.chain[self.phase].words
            rank_zero_info(f"NO SWITCH: training ended at step {trainer.global_step}, before {words}.")

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

    # What is known before training

    def planned(self, trainer: Trainer) -> Iterator[PlannedPhase]:
        """Builds every phase that is still to come, for a trial, and yields each.

        Raises:
            ConfigError: for a moment outside the training or not after the one before it, and for a phase that cannot be built.
        """
        clock, placement = _clock(trainer), self._placement(trainer)
        described = self._described(trainer)
        partition, previous, before = self._state.partition, self._latest_moment(clock), placement.optimizer
        running, begun = _scheduler(placement), self._state.schedule_step
        for switch in self.chain[self.phase :]:
            with within(switch.key):
                moment = switch.moment(clock, previous)
                # Where only a trigger decides, the next step is as good a moment for a trial as any other.
                previous = previous + 1 if moment is None else moment
                phase_clock = replace(clock, first_step=max(previous, self._state.first_step))
                partition = switch.partition(partition, described)
                schedule, begun = switch.schedule(running, begun, phase_clock.first_step)
                since = phase_clock.first_step - begun
                phase = phases.build(switch.optimizer, schedule, partition, self._tensors, phase_clock, since)
                switch.check_handover(before, phase.optimizer, partition, phase_clock)
                self._check_placement(switch, before, placement)
                placement.check_next(phase.optimizer, phase.lr_schedulers, switch.gradient_clip_val)
                running, before = phase.lr_scheduler, phase.optimizer
                partition = self._inheritable(switch, partition, phase.optimizer, trainer)
            yield PlannedPhase(moment, switch.words, phase, "" if switch.handover.lr == "own" else switch.handover.lr)

    def _latest_moment(self, clock: Clock) -> int:
        """The moment that the next one must lie after: that of the running phase, or where a trigger began it, its latest."""
        last = self.chain[self.phase - 1] if self.phase else None
        if last is None or last.when is None:
            return self._state.first_step
        return 0 if last.at is None else last.at.steps(clock, clock.total_steps, key="at")

    @staticmethod
    def _check_placement(switch: Switch, running: Optimizer, placement: strategies.Plain) -> None:
        """Refuses, where the strategy keeps it otherwise, what looks at the running optimizer's state and gradients."""
        handover = switch.handover
        if handover.looks:
            key = "lr" if handover.matches else "momentum" if handover.momentum == "carry" else "guard"
            placement.check_state("a handover of what the running optimizer knows", f"handover.{key}")
        if switch.when is not None and switch.when.of_kind(Swats):
            placement.check_state("SWATS", "when")
            placement.check_gradients(running, "when")

    def _inheritable(self, switch: Switch, partition: Partition, optimizer: Optimizer, trainer: Trainer) -> Partition:
        """The partition as it is saved, and as a later phase inherits it: of what rules say, ratios and zero decays."""
        if switch.inherits:
            return partition
        if switch.is_split:
            optimizer, _ = phases.build_optimizer(switch.optimizer, partition, self._tensors)
        if len(optimizer.param_groups) != len(partition):
            return partition
        return phases.inheritable(optimizer, optimizer.param_groups, module_parameters.names(trainer.lightning_module))

    def _plan(self, trainer: Trainer) -> None:
        """Fixes the moments, and settles with the checkpoint what this run is configured with."""
        clock, described = _clock(trainer), self._described(trainer)
        now = dict(self._first)
        for switch in self.chain[: self.phase]:
            with within(switch.key):
                partition = switch.partition(self._state.partition, described)
                now |= switch.settings(phases.build_optimizer(switch.optimizer, partition, self._tensors)[0])
        later = list(self.planned(trainer))
        for switch, planned in zip(self.chain[self.phase :], later, strict=True):
            now |= switch.settings(planned.phase.optimizer)
        now |= {
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
            "steps of an epoch": clock.steps_per_epoch,
            "steps of the training": clock.total_steps,
            "seed": os.environ.get("PL_GLOBAL_SEED"),
        }
        if self._saved is not None:
            self._settle(trainer, settings.changes(self._saved.settings, now))
            self._saved = None
        self._due_at = tuple(planned.first_step for planned in later)
        self._check_agreement(trainer)
        self._state = replace(self._state, settings=now)

    def _check_agreement(self, trainer: Trainer) -> None:
        """Refuses processes that would switch at different steps, or observe at different ones."""
        clock, watching = _clock(trainer), [switch.when for switch in self.chain[self.phase :] if switch.when]
        numbers = [*self._due_at, clock.total_steps, *(trigger.first_step(clock) for trigger in watching)]
        if any(trigger.monitors() for trigger in watching):
            numbers.append(clock.steps_per_epoch)
        if not trainers.is_same_everywhere(trainer, numbers):
            raise ConfigError(
                f"the processes have data of different lengths ({clock.steps_per_epoch} steps an epoch on one of them), so they "
                "would not switch at one step. Let Lightning part the data (true), or set trainer.limit_train_batches to the "
                "least number of batches.",
                "trainer.use_distributed_sampler",
            )

    def _check_triggers(self, trainer: Trainer) -> None:
        """Refuses a trigger that would never see anything."""
        for switch in self.chain:
            if switch.when is None:
                continue
            key = f"{switch.key}.when"
            if switch.when.monitors() and not trainer.enable_validation:
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
            with within(key):
                switch.when.first_step(_clock(trainer))

    # What is observed

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
        placement = self._placement(trainer)
        optimizer, lrs = placement.optimizer, self._lrs
        tensors, rows = moments.projections(optimizer, lrs)
        columns = dict(zip(tensors, placement.whole(tensors, rows).T.tolist(), strict=True))
        found = {}
        for name, group, lr in zip(group_names(optimizer.param_groups), optimizer.param_groups, lrs, strict=True):
            of_group = [columns[tensor] for tensor in group["params"] if tensor in columns]
            update, along = sum(column[0] for column in of_group), sum(column[1] for column in of_group)
            found[name] = Projection(update, along, float(group["betas"][1]), lr)
        return found

    def _observe(self, trainer: Trainer, seen: Seen) -> None:
        """Lets the trigger see something, which is the same on every rank, and so is what it remembers."""
        trigger, before = self._watching, self._state.trigger
        assert trigger is not None
        with within(f"{self.chain[self.phase].key}.when"):
            after = trigger.observe(before, seen)
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
            self._log(trainer, {f"switch/{name}": value for name, value in trigger.shows(after).items()})

    def _tell(self, trainer: Trainer, reasons: Mapping[str, str]) -> None:
        """Says what a dry run would do now."""
        for name, reason in reasons.items():
            rank_zero_info(
                f"DRY RUN at step {trainer.global_step} (epoch {trainer.current_epoch}): "
                f"{name or 'the trigger'} would switch now, because {reason}."
            )

    # The switch, in its order: ask, build, exchange, announce

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        if not self._due_at or not strategies.opens_accumulation_window(trainer, batch_idx):
            return False
        moment, has_fired = self._due_at[0], "fired" in self._state.trigger and not self.dry_run
        return has_fired or (moment is not None and trainer.global_step >= moment)

    def _switch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        switch, running = self.chain[self.phase], self._placement(trainer).optimizer
        before, freed, old = phases.describe(running), phases.state_bytes(running), weakref.ref(running)
        _warn_at_foot(running, switch.handover)
        del running  # or it could not be freed
        phase, state, crossed = self._build_next(trainer, pl_module)
        after, rule = phases.describe(phase.optimizer), switch.lr_rule(phase.optimizer)
        crossings = [*([] if switch.handover.momentum == "carry" else ["momentum zero"]), *crossed.notes]
        state = replace(state, handed=", ".join([f"lr {rule}", *crossings]))
        self._exchange(trainer, phase, state)
        self._due_at = self._due_at[1:]
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
        placement, clock = self._placement(trainer), _clock(trainer, step)
        running = phases.record(placement.optimizer, placement.groups, module_parameters.names(pl_module))
        partition = switch.partition(extend(self._state.partition, running), self._described(trainer))
        schedule, begun = switch.schedule(_scheduler(placement), self._state.schedule_step, step)
        groups = split(partition) if switch.is_split else partition
        optimizer, notes = phases.build_optimizer(switch.optimizer, groups, self._tensors)
        crossed = handovers.cross(
            switch.handover,
            placement.optimizer,
            optimizer,
            groups,
            placement.whole,
            running_groups=placement.groups,
            inherits=switch.inherits,
            estimate=switch.when.estimate(self._state.trigger) if switch.when else None,
            factor=switch.first_factor(schedule, clock, step - begun),
        )
        phase = Phase(optimizer, build_scheduler(schedule, optimizer, clock, step - begun), notes)
        state = SwitchState(
            phase=self.phase + 1,
            first_step=step,
            schedule_step=begun,
            optimizer=class_name(optimizer),
            partition=self._inheritable(switch, partition, optimizer, trainer),
            reason=self._state.trigger.get("fired") or f"at={switch.at} was reached",
            limit=crossed.limit,
            shapes=self._state.shapes,
            settings=self._state.settings,
        )
        return phase, state, crossed

    def _exchange(self, trainer: Trainer, phase: Phase, state: SwitchState) -> None:
        """Puts optimizer, schedule, state and clipping in place, all or nothing."""
        placement = self._placement(trainer)
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
        self._log(trainer, {"phase": self.phase})

    def _hold(self, trainer: Trainer) -> None:
        """Guards what is left of the running phase's first updates."""
        self._let_loose()
        if self._state.limit is None or not self.phase:
            return
        # In global steps, which a step that the scaler skips counts as well: so a resumed run knows where the window ends.
        steps = self.chain[self.phase - 1].handover.guard_steps(_clock(trainer, self.first_step))
        self._guarded_to = self.first_step + steps
        if trainer.global_step < self._guarded_to:
            placement = self._placement(trainer)
            self._guard = Guard(placement.optimizer, self._state.limit, placement.whole)

    def _end_guard(self, trainer: Trainer) -> None:
        if trainer.global_step >= self._guarded_to:
            self._let_loose()

    def _let_loose(self) -> None:
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    # Resume and end

    def _read(self, trainer: Trainer, path: Path) -> None:
        """On a strategy that restores late: puts the phase in place that wrote the checkpoint, before its state is loaded."""
        if not self._fitting or (self.enabled and not self._tensors):
            return
        state = checkpoints.read_metadata(path).get("callbacks", {}).get(self.state_key)
        if state is None:
            return
        now, self._saved = self._state, SwitchState.from_dict(state)
        if self._saved.phase:
            self._state = self._saved
            self._restore_phase(trainer, now.shapes)
        elif self.enabled:
            self._state = replace(now, trigger=self._saved.trigger)
            check_first_phase(self._state, self._saved)

    def _restore_phase(self, trainer: Trainer, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Builds and installs the phase that a checkpoint, or an earlier fit of this trainer, had reached."""
        state = self._state
        check_later_phase(self._tensors, state, len(self.chain))
        switch = self.chain[state.phase - 1]
        clock = _clock(trainer, first_step=state.first_step)
        with within(switch.key):
            partition = switch.partition(state.partition, self._described(trainer))
            self._configured = partition if members(partition) == members(state.partition) else None
            # Rules that regroup would put the saved state onto other parameters; the options come back with that state.
            built_for = state.partition if self._configured is None else partition
            built_for = split(built_for) if switch.is_split else built_for
            since = state.first_step - state.schedule_step
            phase = phases.build(switch.optimizer, self._restored_schedule(trainer), built_for, self._tensors, clock, since)
        if self._configured is not None:
            self._configured = self._inheritable(switch, partition, phase.optimizer, trainer)
        name = class_name(phase.optimizer)
        if name != state.optimizer:
            raise CheckpointError(
                f"the checkpoint's phase {state.phase} was stepped by {state.optimizer}, but {switch.key}.optimizer is {name} in "
                "this run. Resume with the optimizer of the run that wrote it, and let switch.then lead to another."
            )
        check_shapes(shapes, state)
        self._options = switch.handover.configured(_options(phase.optimizer), built_for)
        self._exchange(trainer, phase, replace(state, shapes=shapes))

    def _restored_schedule(self, trainer: Trainer) -> Any:
        """The schedule of the phase that is restored: its own, or that of the phase which it continues, at the end the module's."""
        switch = self.chain[self.phase - 1]
        if not isinstance(switch.scheduler, Continue):
            return switch.scheduler
        earlier = switch.before
        while earlier is not None and isinstance(earlier.scheduler, Continue):
            earlier = earlier.before
        if earlier is None:
            running: Any = _scheduler(self._placement(trainer))
        else:
            partition = earlier.partition(self._state.partition, self._described(trainer))
            clock = _clock(trainer, self._state.schedule_step)
            running = phases.build(earlier.optimizer, earlier.scheduler, partition, self._tensors, clock).lr_scheduler
        return switch.schedule(running, self._state.schedule_step, self._state.first_step)[0]

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
            _impose_options(self._placement(trainer), self._options)

    def _refuse_other_scheduler(self, trainer: Trainer, changes: list[settings.Change]) -> None:
        """Refuses another scheduler of torch than that of the checkpoint, whose state and options it has taken over by now."""
        placed = self._placement(trainer).lr_scheduler
        if placed is None or isinstance(placed.scheduler, ScheduleLR):
            return
        key = f"{self.chain[self.phase - 1].key}.scheduler" if self.phase else "scheduler"
        change = next((change for change in changes if change.key == key), None)
        if change is None:
            return
        same_class = str(change.saved).partition(",")[0] == str(change.now).partition(",")[0]
        if self.on_resume == "config" or not same_class:
            raise CheckpointError(
                f"{change}, and a scheduler of torch takes its options back from the checkpoint. Resume with the one of the run "
                "that wrote it, or let a switch lead to the other."
            )

    def _clip_val(self) -> float | None:
        values = [switch.gradient_clip_val for switch in self.chain[: self.phase] if switch.gradient_clip_val != "keep"]
        return values[-1] if values else self._trainer_clip_val

    def _let_go(self, trainer: Trainer) -> None:
        self._let_loose()
        if self._tensors:
            trainer.gradient_clip_val = self._trainer_clip_val
            self._tensors, self._due_at = {}, ()
        if self._stop_reading is not None:
            self._stop_reading()
            self._stop_reading = None

    def _placement(self, trainer: Trainer) -> strategies.Plain:
        return strategies.placement(trainer, self.optimizer_index)

    def _described(self, trainer: Trainer) -> list[Parameter]:
        module = trainer.lightning_module
        return module_parameters.described(module, self._placement(trainer).full_shapes(module))

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        trainers.log_metrics(trainer, values, trainer.global_step)


def find_switch(trainer: Trainer) -> OptimizerSwitchCallback | None:
    """The trainer's enabled switch, if it has one."""
    return next((switch for switch in trainers.callbacks_of(trainer, OptimizerSwitchCallback) if switch.enabled), None)


def _clock(trainer: Trainer, first_step: int = 0) -> Clock:
    """The trainer's clock. It counts batches; where the steps of all optimizers of a manual optimization end, nobody knows."""
    clock = trainers.clock(trainer, first_step)
    return clock if trainer.lightning_module.automatic_optimization else replace(clock, total_steps=None)


def _scheduler(placement: strategies.Plain) -> Any:
    """What gives the running learning rates, if anything does."""
    return placement.lr_scheduler and placement.lr_scheduler.scheduler


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The options of each group."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def _impose_options(placement: strategies.Plain, options: list[dict[str, Any]]) -> None:
    """Gives the running optimizer these options instead of those that it was restored with."""
    optimizer, scheduler = placement.optimizer, _scheduler(placement)
    for group, fresh in zip(optimizer.param_groups, options, strict=True):
        factor = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0
        group.update(fresh)
        if "lr" in group:
            group["lr"] = group.get("initial_lr", group["lr"]) * factor
    if isinstance(scheduler, ScheduleLR):
        scheduler.refresh()
    elif scheduler is not None:
        scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]


def _refuse_weight_averaging(trainer: Trainer) -> None:
    """Refuses the callback that puts a scheduler of its own in place towards the end of training."""
    for found in trainers.callbacks_of(trainer, StochasticWeightAveraging):
        raise ConfigError(
            f"{type(found).__name__} and OptimizerSwitchCallback both replace the scheduler during training, so one would undo the "
            "other. Remove one of them; weights are averaged without a scheduler by lightning's WeightAveraging or "
            "EMAWeightAveraging.",
            "callbacks",
        )


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
