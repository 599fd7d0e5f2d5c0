"""The switches of a run, one after another, as they are configured: when each comes, and what it leads to.

They decide and compute; `OptimizerSwitchCallback` asks them, and knows the trainer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch.optim import Optimizer

from lightning_adaptive import moments, settings
from lightning_adaptive.combined import class_name, parts
from lightning_adaptive.durations import Clock, Duration
from lightning_adaptive.errors import ConfigError, ConfigTypeError, check_factory, is_number, within
from lightning_adaptive.handover import Handover
from lightning_adaptive.lr_schedulers import ScheduleLR, SchedulerLike, describe_schedule
from lightning_adaptive.param_groups import Inherit, ParamGroups
from lightning_adaptive.partitions import Partition
from lightning_adaptive.phases import OptimizerFactory, Phase
from lightning_adaptive.rules import Parameter
from lightning_adaptive.schedules import Continue, Plateau
from lightning_adaptive.settings import Settings
from lightning_adaptive.triggers import Swats, Trigger


@dataclass(frozen=True, kw_only=True, eq=False)
class Switch:
    """One switch; its options are those of `OptimizerSwitchCallback`, checked, and with their defaults where a slot was empty.

    Args:
        before: the switch that comes before it; ``None`` for the first.

    Raises:
        ConfigError: for a moment that is missing or malformed, or a value that is not allowed.
        ConfigTypeError: for a value of another kind.
    """

    at: Duration | None
    when: Trigger | None
    optimizer: OptimizerFactory
    scheduler: SchedulerLike | None
    param_groups: Inherit | ParamGroups
    handover: Handover
    gradient_clip_val: Literal["keep"] | float | None
    before: Switch | None = None

    @classmethod
    def of(
        cls, at: Any, when: Any, optimizer: Any, scheduler: Any, param_groups: Any, handover: Any, gradient_clip_val: Any
    ) -> Switch:
        """Checks what was given; a slot that a configuration left empty (``{}`` or ``null``) means its default."""
        trigger = _default_if_empty(when, None)
        if trigger is not None and not isinstance(trigger, Trigger):
            raise ConfigTypeError(f"{when!r} is no trigger. Write one, OnPlateau(monitor='val/loss') or another.", "when")
        if at is None and trigger is None:
            raise ConfigError(
                "a switch needs its moment: 5ep (epochs), 5st (optimizer steps) or 5% (of training); or a trigger (when).", "at"
            )
        if optimizer is None:
            raise ConfigError("a switch needs the factory of its next optimizer, for example partial(SGD, lr=0.1).", "optimizer")
        moment = None if at is None else Duration.parse(at, key="at")
        check_factory(optimizer, Optimizer, "optimizer")
        _check_clip_val(gradient_clip_val)
        return cls(
            at=moment,
            when=trigger,
            optimizer=optimizer,
            scheduler=Continue() if scheduler == "continue" else _default_if_empty(scheduler, None),
            param_groups=_param_groups(_default_if_empty(param_groups, "inherit")),
            handover=Handover.of(_default_if_empty(handover, "own")),
            gradient_clip_val=gradient_clip_val,
        )

    @property
    def key(self) -> str:
        """Its key, as a user types it: ``switch``, ``switch.then``, ..."""
        return "switch" if self.before is None else f"{self.before.key}.then"

    @property
    def words(self) -> str:
        """When it comes, for a person."""
        given = {"at": self.at, "when": self.when}
        return " or ".join(f"{name}={value}" for name, value in given.items() if value is not None)

    @property
    def inherits(self) -> bool:
        """Whether the phase that it leads to has the groups of the phase before."""
        return isinstance(self.param_groups, Inherit)

    @property
    def is_split(self) -> bool:
        """Whether the phase that it leads to has a group for each tensor: by its handover, or kept from the phase before."""
        keeps = self.handover.lr == "keep" and self.inherits and self.before is not None and self.before.is_split
        return self.handover.splits or keeps

    def moment(self, clock: Clock, previous: int) -> int | None:
        """The step at which it comes; ``None`` where a trigger alone decides.

        Args:
            clock: the training's clock.
            previous: the moment of the switch before it.

        Raises:
            ConfigError: for a moment outside the training, or not after the one before.
        """
        if self.at is None:
            return None
        step = self.at.steps(clock, clock.total_steps, key="at")
        if step <= 0:
            raise ConfigError(f"{self.at} is step {step}; the first phase would not make a step. Begin with this optimizer.", "at")
        if self.before is not None and step <= previous:
            raise ConfigError(f"{self.at} is step {step}, but the switch before it is at step {previous}. Moments must grow.", "at")
        if clock.total_steps is not None and step >= clock.total_steps:
            raise ConfigError(
                f"{self.at} is step {step}, but training ends after {clock.total_steps} steps. Choose an earlier moment.", "at"
            )
        return step

    def schedule(self, running: Any, begun: int, step: int) -> tuple[Any, int]:
        """The schedule of the phase that begins at a step, and its first step.

        Args:
            running: the scheduler of the phase before it.
            begun: first step of that one's schedule.
            step: the moment of the switch.

        Raises:
            ConfigError: when the running schedule is to go on, and is no function of the step.
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

    def first_factor(self, schedule: Any, clock: Clock, since: int) -> float:
        """What multiplies the base learning rates at the phase's first step, where the running schedule goes on; else 1.

        Args:
            schedule: the phase's schedule.
            clock: the phase's clock.
            since: steps for which the schedule has run.
        """
        if not isinstance(self.scheduler, Continue):
            return 1.0
        factor: float = schedule.curves(replace(clock, first_step=clock.first_step - since))["lr"](since)
        return factor

    def partition(self, running: Partition, described: Sequence[Parameter]) -> Partition:
        """The groups of the phase that it leads to.

        Args:
            running: those of the phase before it.
            described: the module's parameters.

        Raises:
            ConfigError: for rules that cannot be followed.
        """
        if isinstance(self.param_groups, Inherit):
            return running
        with within("param_groups"):
            return self.param_groups.partition(described)

    def settings(self, optimizer: Optimizer) -> Settings:
        """What it is configured with, in plain values by key.

        Args:
            optimizer: the optimizer that it leads to, built.
        """
        return {
            f"{self.key}.at": None if self.at is None else str(self.at),
            f"{self.key}.when": None if self.when is None else str(self.when),
            **settings.of_optimizer(optimizer, f"{self.key}.optimizer"),
            f"{self.key}.scheduler": settings.of_scheduler(self.scheduler),
            f"{self.key}.param_groups": repr(self.param_groups),
            f"{self.key}.handover": str(self.handover),
            f"{self.key}.gradient_clip_val": self.gradient_clip_val,
        }

    def lr_rule(self, optimizer: Optimizer) -> str:
        """The rule that gave an optimizer its learning rate, and whether it is the class's default rather than the user's."""
        words = self.handover.words()
        if self.handover.lr != "own":
            return words
        defaults = [f"the default of {type(part).__name__}" for part in parts(optimizer).values() if _has_default_lr(part)]
        return ", ".join([words, *dict.fromkeys(defaults)])

    def check_handover(self, running: Optimizer, following: Optimizer, partition: Partition, clock: Clock) -> None:
        """Refuses a handover, or a trigger, that has no meaning between two optimizers.

        Args:
            running: the running optimizer, or one like it.
            following: the next, built for a trial.
            partition: its groups.
            clock: its phase's clock.

        Raises:
            ConfigError: naming the rule.
        """
        handover, before = self.handover, self.before
        with within("handover"):
            handover.check(running, following, partition, inherits=self.inherits)
            handover.guard_steps(clock)
            if before is not None and before.is_split:
                if handover.lr == "keep" and not self.inherits:
                    raise ConfigError(
                        "the running phase has a learning rate for each tensor, which other groups cannot keep. Write "
                        "param_groups: inherit, or own.",
                        "lr",
                    )
                if handover.weight_decay == "match" == before.handover.weight_decay and not self.is_split:
                    raise ConfigError(
                        "the running phase has a weight decay for each tensor, which groups of several cannot match. Write own, or "
                        "let lr be keep, or matched per tensor.",
                        "weight_decay",
                    )
        found_per = {trigger.per for trigger in self.when.of_kind(Swats)} if self.when else set()
        if found_per and moments.family(running) != "adam":
            raise ConfigError(
                f"SWATS looks at steps of Adam, AdamW, NAdam or RAdam, and the running optimizer is {class_name(running)}.", "when"
            )
        takes = handover.per if handover.lr == "match_projection" and handover.per != "tensor" else None
        if found_per and takes and takes not in found_per:
            raise ConfigError(
                f"the handover takes a learning rate per {takes}, and SWATS finds one per {', '.join(sorted(found_per))}. Give "
                "both the same.",
                "handover.per",
            )

    def check_manual(self, has_scheduler: bool) -> None:
        """Refuses what has no meaning where the module steps optimizers and schedulers itself.

        Args:
            has_scheduler: whether it has one for the running optimizer.

        Raises:
            ConfigError: naming the option.
        """
        if self.at is not None and self.at.unit != "st":
            raise ConfigError(
                f"{self.at} cannot be counted under manual optimization, where steps count every step() of each optimizer. Write "
                "it in such steps (st).",
                "at",
            )
        if self.scheduler is not None and not has_scheduler:
            raise ConfigError(
                "the module steps no scheduler for this optimizer, so none can take its place. Leave it out.", "scheduler"
            )
        if not self.inherits:
            raise ConfigError("under manual optimization the groups stay as they are. Write 'inherit'.", "param_groups")
        if self.gradient_clip_val != "keep":
            raise ConfigError("under manual optimization the module clips by itself. Write 'keep'.", "gradient_clip_val")


class PlannedPhase(NamedTuple):
    """A later phase as it was built for a trial at the start of training; its first step is ``None`` when a trigger decides it."""

    first_step: int | None
    reason: str
    phase: Phase
    lr_rule: str = ""
    """What finds its learning rates in the moment of the switch, where they are not those of its configuration."""


def linked(switches: Iterable[Switch]) -> tuple[Switch, ...]:
    """Switches in their order, each of which knows the one before it."""
    chain: list[Switch] = []
    for switch in switches:
        chain.append(replace(switch, before=chain[-1] if chain else None))
    return tuple(chain)


def _default_if_empty(value: Any, default: Any) -> Any:
    return default if value is None or (isinstance(value, Mapping) and not value) else value


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


def _has_default_lr(optimizer: Optimizer) -> bool:
    default = inspect.signature(type(optimizer)).parameters.get("lr")
    return default is not None and optimizer.param_groups[0].get("initial_lr") == default.default
