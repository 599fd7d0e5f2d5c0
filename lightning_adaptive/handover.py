"""What crosses a switch: the learning rate, the momentum and the weight decay; and to what the first updates are held."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adaptive import moments
from lightning_adaptive.combined import class_name
from lightning_adaptive.durations import Clock, Duration, DurationLike
from lightning_adaptive.errors import ConfigError, ConfigTypeError, check_number, did_you_mean
from lightning_adaptive.partitions import Group, OptimizerGroup, Partition

G = TypeVar("G")

_KNOWN = "Adam, AdamW, NAdam, RAdam and SGD"
_MOST = 100.0
"""The greatest learning rate for SGD, found for some of the parameters, over that of the whole model."""


def _check_factor(option: str, value: Any) -> None:
    check_number(value, option)
    if not 0 < value < math.inf:
        raise ConfigError(f"{value!r} is no factor. Write a number above 0.", option)


@dataclass(frozen=True, kw_only=True)
class Handover:
    """Rules by which the next phase starts.

    The rules that match look at one step of both optimizers, from the state in the moment of the switch. With Adam's bias-corrected
    moments ``m, v`` and its current learning rate ``lr``, its step on the mean gradient is ``p = -lr m / (sqrt(v) + eps)``, and SGD
    at a learning rate of one would step by ``-m``, once its momentum has built up. Of a set of parameters let ``A = p.p``,
    ``C = -p.m`` and ``D = m.m``. Then, with ``eta`` the learning rate of an SGD that averages,

    * ``match_orthogonal``, ``eta = C / D``, brings SGD's step closest to ``p``: it minimises ``|eta m + p|^2``;
    * ``match_norm``, ``eta = sqrt(A / D)``, makes both as long;
    * ``match_projection``, ``eta = A / C``, makes ``p`` the projection of SGD's step onto it: SWATS' estimate (Keskar & Socher
      2017, arXiv 1712.07628, equation 3), with the mean gradient for the last one.

    ``eta_orthogonal <= eta_norm <= eta_projection``, since ``C^2 <= A D`` (Cauchy & Schwarz). torch's SGD does not average but adds
    up: on a constant gradient its buffer tends to ``gain = (1 - dampening) / (1 - momentum)`` times it, so its learning rate is
    ``eta / gain``. Between optimizers of one kind the three are the same learning rate.

    A tensor whose gradient is nothing but rounding, such as a bias before a batch norm, is stepped by Adam as far as any other: its
    ``eta``, a step over a rounding error, is then some 10,000 times that of the rest, and its next rounding error a leap. On the
    way from Adam to SGD what is found for a tensor or a group is therefore at most 100 times what is found for the whole model.

    Args:
        lr: where the next phase's base learning rates come from. ``"own"``: its configuration. ``"keep"``: what each group has
            now. Or one of the three that match; ``match_projection`` takes the estimate of a trigger `Swats` where there is one, of
            the whole model or of each group as `per` says. A learning rate that a rule of ``param_groups`` gives stays, and
            ``lr_scale`` of new rules multiplies.
        scale: multiplies what the rule gives, above 0.
        per: for which parameters one learning rate is matched: each ``"tensor"``, which then is a group of its own, each
            ``"group"``, or the whole ``"model"``, whose groups keep their ratios.
        momentum: ``"zero"``: the next optimizer begins with an empty state. ``"carry"``: with the mean gradient of the running
            one, as `moments.carried` says; one that is not finite is zero, with a line.
        weight_decay: ``"own"``: the next optimizer's configured value. ``"match"``: the same shrinkage of the weights per step.
            AdamW's decay shrinks them by ``lr * weight_decay``, SGD's is part of the gradient and shrinks them by
            ``lr * weight_decay * gain``. Between optimizers with the same kind of decay its value is kept. A weight decay that a
            rule of ``param_groups`` gives stays.
        guard: the first updates, of the whole model, are held to this multiple of the last phase's ``|p|``; ``None`` for no guard.
        guard_for: for how many updates, as a duration: ``100st``. While it lasts the weights are there twice.

    Raises:
        ConfigError: for a rule that does not exist, or a value out of range.
        ConfigTypeError: for what is not a number.
    """

    lr: Literal["own", "keep", "match_norm", "match_orthogonal", "match_projection"] = "own"
    scale: float = 1.0
    per: Literal["tensor", "group", "model"] = "tensor"
    momentum: Literal["zero", "carry"] = "zero"
    weight_decay: Literal["own", "match"] = "own"
    guard: float | None = None
    guard_for: DurationLike = "100st"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            rule, rules = getattr(self, name), get_args(kind)
            if get_origin(kind) is Literal and rule not in rules:
                nearest = did_you_mean(str(rule), rules)
                raise ConfigError(f"the rule {rule!r} does not exist. Rules: {', '.join(rules)}.{nearest}", name)
        _check_factor("scale", self.scale)
        if self.guard is not None:
            _check_factor("guard", self.guard)
        object.__setattr__(self, "guard_for", Duration.parse(self.guard_for, key="guard_for"))

    @classmethod
    def of(cls, value: Handover | str, key: str = "handover") -> Handover:
        """A `Handover` from itself or from the name of a preset.

        Raises:
            ConfigError: for an unknown name.
            ConfigTypeError: for anything else.
        """
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise ConfigTypeError(f"{value!r} is no handover. Write {', '.join(map(repr, PRESETS))} or a Handover.", key)
        if value not in PRESETS:
            raise ConfigError(
                f"{value!r} does not exist. Write {', '.join(map(repr, PRESETS))} or a Handover.{did_you_mean(value, PRESETS)}", key
            )
        return PRESETS[value]

    @property
    def matches(self) -> bool:
        """Whether the learning rate is found by looking at both optimizers."""
        return self.lr.startswith("match")

    @property
    def splits(self) -> bool:
        """Whether each tensor becomes a group of its own."""
        return self.matches and self.per == "tensor"

    @property
    def looks(self) -> bool:
        """Whether something depends on the running optimizer's state."""
        return self.matches or self.momentum == "carry" or self.guard is not None

    @property
    def found(self) -> tuple[Literal["lr", "weight_decay"], ...]:
        """Options of the next optimizer's groups that the switch finds, where no rule gives them."""
        return (
            *(("lr",) if self.lr != "own" or self.scale != 1 else ()),
            *(("weight_decay",) if self.weight_decay == "match" else ()),
        )

    def configured(self, options: Sequence[Mapping[str, Any]], partition: Partition) -> list[dict[str, Any]]:
        """Of the options of a phase's groups those that its configuration holds, and that were not found at the switch.

        Args:
            options: the options of each group.
            partition: the groups.
        """
        kept = []
        for group, recorded in _zipped(options, partition):
            names = [prefix + name for name in self.found if not is_given(recorded, name) for prefix in ("", "initial_")]
            kept.append({name: value for name, value in group.items() if name not in names})
        return kept

    def guard_steps(self, clock: Clock) -> int:
        """For how many updates of a phase the guard lasts.

        Raises:
            ConfigError: when `guard_for` cannot be counted.
        """
        if self.guard is None:
            return 0
        assert isinstance(self.guard_for, Duration)
        return self.guard_for.steps(clock, clock.remaining_steps, key="guard_for")

    def __str__(self) -> str:
        preset = next((name for name, preset in PRESETS.items() if preset == self), None)
        given = (
            f"{one.name}={getattr(self, one.name)}" for one in fields(self) if str(getattr(self, one.name)) != str(one.default)
        )
        return preset or ", ".join(given)

    def words(self) -> str:
        """The rule of the learning rate, for a person."""
        per = f" per {self.per}" if self.matches else ""
        return f"{self.lr}{per}" + (f" x {self.scale:g}" if self.scale != 1 else "")

    def check(self, running: Optimizer, following: Optimizer, partition: Partition, *, inherits: bool = False) -> None:
        """Refuses rules that have no meaning between two optimizers.

        Args:
            running: the running optimizer, or one like it.
            following: the next, built for a trial.
            partition: the groups for which that was built.
            inherits: whether they are the running ones, of which none is merged.

        Raises:
            ConfigError: naming the rule, and those that have one.
        """
        sides = {"the running optimizer": running, "the next one": following}
        asked = {
            "lr": self.matches,
            "momentum": self.momentum == "carry",
            "weight_decay": self.weight_decay == "match",
            "guard": self.guard is not None,
        }
        for name in (name for name, is_asked in asked.items() if is_asked):
            for whose, optimizer in sides.items():
                if name == "guard" and optimizer is following:
                    continue
                if name != "weight_decay":
                    self._check_mean(name, whose, optimizer, moments.family(following))
                if name != "guard":
                    self._check_gain(name, whose, optimizer)
        if self.weight_decay == "match":
            _check_decay(running, following)
        if self.lr == "keep" and any("lr" not in group for group in running.param_groups):
            raise ConfigError(f"{class_name(running)} has no learning rate (lr) that could be kept. Write own.", "lr")
        if self.lr == "keep" and not inherits:
            _check_merged("lr", running, following, partition)
        if self.weight_decay == "match" and not inherits:
            _check_merged("weight_decay", running, following, partition)

    def _check_mean(self, name: str, whose: str, optimizer: Optimizer, toward: moments.Family | None) -> None:
        """Refuses an optimizer that keeps no mean of the gradients; SGD without momentum, where another family needs it."""
        if moments.family(optimizer) is None:
            raise ConfigError(
                f"{getattr(self, name)!r} needs the gradients' mean, which {_KNOWN} keep, and {whose} is {class_name(optimizer)}. "
                f"Write {_WITHOUT[name]}.",
                name,
            )
        if not _without_momentum(optimizer) or (name == "lr" and toward != "adam"):
            return
        if name == "guard":
            raise ConfigError("SGD without momentum keeps nothing that tells the length of its updates. Write null.", name)
        raise ConfigError(
            f"{whose} is SGD without momentum, which keeps no mean of the gradients. Give it momentum, or write {_WITHOUT[name]}.",
            name,
        )

    def _check_gain(self, name: str, whose: str, optimizer: Optimizer) -> None:
        """Refuses an SGD of which nothing says what it makes of a constant gradient."""
        for group in optimizer.param_groups if moments.family(optimizer) == "sgd" else ():
            momentum, dampening = group["momentum"], group["dampening"]
            if momentum and max(momentum, dampening) >= 1:
                raise ConfigError(
                    f"of a constant gradient, momentum {momentum:g} with dampening {dampening:g} makes nothing that "
                    f"{getattr(self, name)!r} could go by, and {whose} has them. Both must be below 1; or write {_WITHOUT[name]}.",
                    name,
                )


PRESETS: Mapping[str, Handover] = {
    "own": Handover(),
    "keep": Handover(lr="keep"),
    "smooth": Handover(lr="match_orthogonal", momentum="carry", weight_decay="match", guard=1.0),
    "swats": Handover(lr="match_projection", per="model"),
}
"""Handovers by name; ``conf/handover/`` has the same."""

_WITHOUT = {"lr": "own or keep", "momentum": "zero", "weight_decay": "own", "guard": "null"}


@dataclass(frozen=True)
class Crossed:
    """What has crossed a switch.

    Args:
        notes: what happened, for a person.
        limit: the norm to which the first updates are held, if they are.
        shared: bytes of the running optimizer's state that now belong to the next.
    """

    notes: tuple[str, ...] = ()
    limit: float | None = None
    shared: int = 0


def cross(
    handover: Handover,
    running: Optimizer,
    following: Optimizer,
    partition: Partition,
    whole: moments.Whole,
    *,
    running_groups: Sequence[OptimizerGroup] | None = None,
    inherits: bool = True,
    estimate: Mapping[str, float] | None = None,
    factor: float = 1.0,
) -> Crossed:
    """Gives the next optimizer what the rules say, in place; the running one stays as it is.

    Args:
        handover: the rules.
        running: the running optimizer.
        following: the next one, without a scheduler yet.
        partition: its groups.
        whole: what makes whole sums of those on this process.
        running_groups: the running groups with the module's own parameters, where those of the optimizer hold others (DeepSpeed).
        inherits: whether the groups are the running ones, whose ratios are then in what is matched.
        estimate: learning rates that a trigger has found, by name of the running group, or one by the empty name.
        factor: what the next schedule begins with, where the running one goes on: its base is the learning rate over it.
    """
    groups = {tensor: group for group in running_groups or running.param_groups for tensor in group["params"]}
    look = functools.cache(functools.partial(_sums, running, whole))
    notes: list[str] = []
    if "lr" in handover.found:
        configured = [float(group["lr"]) for group in following.param_groups]
        rates: list[float | None] = [lr * (factor or 1.0) for lr in configured]
        if handover.matches:
            rates = _matched(handover, running, look, following, partition, inherits, estimate or {})
        elif handover.lr == "keep":
            rates = _kept(following, partition, groups, inherits)
        _set_rates(handover, following, partition, rates, factor)
        if handover.lr != "own":
            notes.append(f"configured {_range(configured)}")
        if None in rates:
            notes.append(f"{rates.count(None)} of {len(rates)} learning rates could not be found and are the configured ones")
    if handover.weight_decay == "match":
        notes.append(_match_decay(running, following, partition, groups, factor))
    shared, note = _carry(running, following, groups, whole) if handover.momentum == "carry" else (0, "")
    notes.append(note)
    limit = None
    if handover.guard is not None:
        other: moments.Family = "sgd" if moments.family(running) == "adam" else "adam"
        limit = handover.guard * math.sqrt(sum(update for update, *_ in look(other).values()))
        if 0 < limit < math.inf:
            notes.append(f"updates held to a norm of {limit:.2g} for {handover.guard_for}")
        else:
            notes.append(f"no guard, as the last update's norm is {limit / handover.guard:g}")
            limit = None
    return Crossed(tuple(note for note in notes if note), limit, shared)


def eta(rule: str, update: float, along: float, step: float) -> float | None:
    """The learning rate that a rule finds, or ``None`` where the sums say nothing.

    Args:
        rule: ``match_orthogonal``, ``match_norm`` or ``match_projection``.
        update: ``A = p.p`` of the running optimizer's update.
        along: ``C = -p.u``, with ``u`` the next optimizer's step at a learning rate of one.
        step: ``D = u.u``.

    >>> [eta(rule, 4.0, 1.0, 1.0) for rule in ("match_orthogonal", "match_norm", "match_projection")]
    [1.0, 2.0, 4.0]
    """
    over, under = {
        "match_orthogonal": (along, step),
        "match_norm": (math.sqrt(update) if update >= 0 else math.nan, math.sqrt(step) if step >= 0 else math.nan),
        "match_projection": (update, along),
    }[rule]
    found = over / under if under > 0 else math.nan
    return found if math.isfinite(found) else None


def is_given(group: Group, option: Literal["lr", "weight_decay"]) -> bool:
    """Whether a rule gives a group this option, which then no handover finds."""
    return group.lr is not None if option == "lr" else group.no_decay or option in group.options


# Learning rates


def _matched(
    handover: Handover,
    running: Optimizer,
    look: Callable[[moments.Family], Mapping[Tensor, Sequence[float]]],
    following: Optimizer,
    partition: Partition,
    inherits: bool,
    estimate: Mapping[str, float],
) -> list[float | None]:
    """The learning rate of each group, before `scale`."""
    toward = moments.family(following)
    assert toward is not None
    columns = look(toward)
    sums = [_sum(columns[tensor] for tensor in group["params"] if tensor in columns) for group in following.param_groups]
    ratios = [recorded.lr_ratio for recorded in partition]
    # The whole model's groups step by their ratios: u of a group is ratio * u.
    scaled = [(a, c * ratio, d * ratio**2) for (a, c, d), ratio in zip(sums, ratios, strict=True)]
    of_model = eta(handover.lr, *_sum(scaled))
    if handover.lr == "match_projection" and handover.per != "tensor":
        of_model = estimate.get("", of_model)
    bounded = toward == "sgd" and moments.family(running) == "adam"
    found: list[float | None] = []
    for group, one, ratio in zip(following.param_groups, sums, ratios, strict=True):
        rate = None if handover.per == "model" else eta(handover.lr, *one)
        if rate is not None and of_model is not None and bounded:
            rate = min(rate, _MOST * of_model * (ratio if inherits else 1.0))
        if handover.lr == "match_projection" and handover.per == "group":
            rate = estimate.get(group.get("name", ""), rate)
        times = ratio if rate is None or not inherits else 1.0
        rate = of_model if rate is None else rate
        found.append(None if rate is None else rate * times / (moments.gain(group) if toward == "sgd" else 1.0))
    return found


def _kept(
    following: Optimizer, partition: Partition, groups: Mapping[Tensor, OptimizerGroup], inherits: bool
) -> list[float | None]:
    """The running learning rate of each group, by new rules times their ratio."""
    rates: list[float | None] = []
    for group, recorded in _zipped(following.param_groups, partition):
        source = _source(group, groups)
        rates.append(None if source is None else float(source["lr"]) * (1.0 if inherits else recorded.lr_ratio))
    return rates


def _set_rates(
    handover: Handover, following: Optimizer, partition: Partition, rates: Sequence[float | None], factor: float
) -> None:
    for (group, recorded), rate in zip(_zipped(following.param_groups, partition), rates, strict=True):
        if rate is None or is_given(recorded, "lr"):
            continue
        base = handover.scale * rate / (factor or 1.0)
        group["lr"] = torch.full_like(group["lr"], base) if isinstance(group["lr"], Tensor) else base


def _source(group: OptimizerGroup, groups: Mapping[Tensor, OptimizerGroup]) -> OptimizerGroup | None:
    """The running group of a group's parameters, or one of those that are alike in what is taken of them."""
    return next((groups[tensor] for tensor in group["params"] if tensor in groups), None)


def _zipped(groups: Sequence[G], partition: Partition) -> Iterable[tuple[G, Group]]:
    """An optimizer's groups with what they were built for; the two differ in number where a class has no groups."""
    return zip(groups, partition if len(partition) == len(groups) else [Group(())], strict=True)


def _sum(rows: Iterable[Sequence[float]]) -> tuple[float, float, float]:
    update = along = step = 0.0
    for row in rows:
        update, along, step = update + row[0], along + row[1], step + row[2]
    return update, along, step


def _sums(running: Optimizer, whole: moments.Whole, toward: moments.Family) -> dict[Tensor, list[float]]:
    """The whole sums of `moments.updates`, of each parameter."""
    tensors, rows = moments.updates(running, toward)
    return dict(zip(tensors, whole(tensors, rows).T.tolist(), strict=True))


def _check_merged(option: Literal["lr", "weight_decay"], running: Optimizer, following: Optimizer, partition: Partition) -> None:
    """Refuses a group whose parameters have had different values of an option."""
    had = {tensor: float(group[option]) for group in running.param_groups for tensor in group["params"]}
    for group, recorded in zip(following.param_groups, partition, strict=False):
        if len({had[tensor] for tensor in group["params"] if tensor in had}) > 1 and not is_given(recorded, option):
            values = {"lr": "learning rates", "weight_decay": "weight decays"}[option]
            raise ConfigError(
                f"the group {recorded.name or 0} takes parameters of running groups with different {values}. Keep the groups "
                "(param_groups: inherit), or write own.",
                option,
            )


# Weight decay


def _kind_of_decay(optimizer: Optimizer) -> Literal["decoupled", "adaptive", "gradient"]:
    if moments.family(optimizer) == "sgd":
        return "gradient"
    return "decoupled" if moments.is_decoupled(optimizer, optimizer.param_groups[0]) else "adaptive"


def _check_decay(running: Optimizer, following: Optimizer) -> None:
    """Refuses decays that are not known, or have no common measure."""
    for optimizer in (running, following):
        if moments.family(optimizer) is None:
            raise ConfigError(
                f"how {class_name(optimizer)} shrinks weights is not known, only of {_KNOWN}. Write own.", "weight_decay"
            )
    decays = any(group["weight_decay"] for group in running.param_groups)
    if decays and {_kind_of_decay(running), _kind_of_decay(following)} == {"decoupled", "adaptive"}:
        raise ConfigError(
            f"the decay of {class_name(running)} and that of {class_name(following)} have no common measure: one divides it by the "
            "size of the gradients. Write own.",
            "weight_decay",
        )


def _match_decay(
    running: Optimizer, following: Optimizer, partition: Partition, groups: Mapping[Tensor, OptimizerGroup], factor: float
) -> str:
    before, after = _kind_of_decay(running), _kind_of_decay(following)
    old, new = [], []
    for group, recorded in _zipped(following.param_groups, partition):
        source = _source(group, groups)
        if source is None:
            continue
        decay = float(source["weight_decay"])
        lr = float(group["lr"]) * (factor or 1.0)
        if is_given(recorded, "weight_decay"):
            decay = float(group["weight_decay"])
        elif {before, after} == {"decoupled", "gradient"} and lr > 0:
            decay *= float(source["lr"]) * moments.gain(source) / (lr * moments.gain(group))
        old.append(float(source["weight_decay"]))
        new.append(decay)
        group["weight_decay"] = decay
    return f"weight decay {_range(old)} -> {_range(new)} (match)" if any(old) else ""


# Momentum


def _carry(
    running: Optimizer, following: Optimizer, groups: Mapping[Tensor, OptimizerGroup], whole: moments.Whole
) -> tuple[int, str]:
    """Seeds every parameter or, where a value is not finite, none; bytes that were not copied, and a line."""
    states = [moments.carried(running, groups, following, group) for group in following.param_groups]
    parameters = moments.parameters(following)
    flat = [state for of_group in states for state in of_group]
    if not flat:
        return 0, ""
    faults = torch.stack([_count_of_faults(parameter, state) for parameter, state in zip(parameters, flat, strict=True)])
    if float(whole(parameters, faults.double()[None]).sum()):
        return 0, "momentum zero, as the running one is not finite"
    for parameter, state in zip(parameters, flat, strict=True):
        if state:
            following.state[parameter].update(state)
    kept = {id(value) for state in running.state.values() for value in state.values()}
    shared = [moments.local(value) for state in flat for value in state.values() if id(value) in kept]
    return sum(value.numel() * value.element_size() for value in shared), "momentum carried"


def _count_of_faults(parameter: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Number of tensors in a parameter's state with values that are not finite, of what lies on this process."""
    none = moments.local(parameter).new_zeros((), dtype=torch.int64)
    moved = [moments.local(value) for name, value in state.items() if name not in ("step", "mu_product")]
    # A sum tells it in one pass: what is not finite makes it so. That of 16 bits is taken in 32, where it has a place.
    sums = (value.sum(dtype=torch.promote_types(value.dtype, torch.float32)) for value in moved)
    return sum(((~one.abs().isfinite()).long() for one in sums), start=none)


def _without_momentum(optimizer: Optimizer) -> bool:
    return moments.family(optimizer) == "sgd" and not all(group["momentum"] for group in optimizer.param_groups)


def _range(values: Sequence[float]) -> str:
    """One value, or the least and the greatest."""
    least, greatest = min(values), max(values)
    return f"{least:.1e}" if f"{least:.1e}" == f"{greatest:.1e}" else f"{least:.1e}..{greatest:.1e}"
