"""How a phase groups its parameters: by rules, or by what is derived from the model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_adaptive.errors import ConfigError, within
from lightning_adaptive.partitions import DEFAULT, Group, Partition
from lightning_adaptive.rules import Parameter, Rule, dead_rule, positive, read_regex, some

_FIRST_NUMBER = r"^([^.]+\.)*?\d+(?=\.)"


class ParamGroups:
    """How a phase groups the trainable parameters: by rules in order, the first match wins.

    What no rule matches forms the group ``default``. Without rules there is one group of all of them; a single group has no
    name. Groups with the optimizer's own learning rate come first, then the others, each in the order of the rules: a phase
    that inherits them takes its ratios from the first one. Frozen parameters are matched too and left out of the groups, so
    that a parameter belongs where it belongs whenever it is unfrozen.

    Args:
        rules: rules by name, each a `Rule` or a mapping ``{"match": "*.bias", "weight_decay": 0}``; ``None`` leaves one out.

    Raises:
        ConfigError: for a rule that cannot be used; the message names it. `partition` raises it for a rule that matches nothing.

    >>> groups = ParamGroups(no_decay={"ndim": "<2", "weight_decay": 0})
    >>> [(group.name, group.parameters) for group in groups.partition([Parameter("w", (4, 4)), Parameter("b", (4,))])]
    [('no_decay', ('b',)), ('default', ('w',))]
    """

    def __init__(self, **rules: Rule | Mapping[str, Any] | None) -> None:
        self.rules: dict[str, Rule] = {}
        for name, rule in rules.items():
            if rule is not None:
                with within(name):
                    self.rules[name] = Rule.of(rule)
        if DEFAULT in self.rules:
            raise ConfigError("this is the name of the group for what no rule matches. Choose another.", DEFAULT)

    def partition(self, parameters: Iterable[Parameter]) -> Partition:
        """Groups all parameters of a module, and keeps the trainable ones.

        Raises:
            ConfigError: for a rule that gets no parameter, frozen ones counted.
        """
        whole = tuple(parameters)
        members: dict[str, list[Parameter]] = {name: [] for name in (*self.rules, DEFAULT)}
        for parameter in whole:
            taker = next((name for name, rule in self.rules.items() if _holds(rule, parameter, name)), DEFAULT)
            members[taker].append(parameter)
        for name, rule in self.rules.items():
            if not members[name]:
                raise dead_rule(name, rule, whole, self.rules)
        groups = [*(_group(name, rule, members[name]) for name, rule in self.rules.items()), *self.rest(members[DEFAULT], whole)]
        twice = [group.name for index, group in enumerate(groups) if group.name in [other.name for other in groups[:index]]]
        if twice:
            raise ConfigError(f"{type(self).__name__} makes a group of this name by itself. Choose another.", str(twice[0]))
        groups = sorted((group for group in groups if group.parameters), key=lambda group: group.has_own_lr)
        if len(groups) <= 1:
            return (replace(groups[0], name=None),) if groups else (Group(()),)
        return tuple(groups)

    def rest(self, parameters: Sequence[Parameter], whole: Sequence[Parameter]) -> Iterable[Group]:
        """Groups what no rule matches.

        Args:
            parameters: these.
            whole: all parameters of the module, in its order.
        """
        return [Group(_trainable(parameters), DEFAULT, rule="the rest" if self.rules else "")]

    def __repr__(self) -> str:
        # Of a subclass; and what a resumed run is compared by, so nothing that shows an address.
        plain = (int, float, str, Rule, type(None))
        shown = {**{name: value for name, value in vars(self).items() if isinstance(value, plain)}, **self.rules}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


NO_DECAY: Mapping[str, Any] = {
    "any": [
        {"ndim": "<2"},
        {"module": ["*Norm", "*Norm?d", "Embedding", "EmbeddingBag"]},
        {"match": ["*pos*embed*", "*cls_token", "*class_token"]},
    ]
}
"""Biases, norms and embeddings: by dimensions and class, and by name the embeddings that no module of their own holds."""


class LayerDecay(ParamGroups):
    """A learning rate that falls with the distance from the output: ``lr_scale = decay ** (max_depth - depth)``.

    The number means what it means in timm: depth 0 is the stem (what comes before the first block), then the blocks count, and
    what comes after the last of them is the head, at ``max_depth`` and the optimizer's own learning rate. A norm right after
    the last block belongs to that block. Without blocks each module that holds parameters is one.

    Args:
        decay: above 0 and at most 1, where 1 is the same learning rate everywhere.
        pattern: a regular expression whose match in a name says which block a parameter belongs to, ``"blocks\\.\\d+"``;
            blocks count in the module's order. ``None``: the name up to its first number, ``layer1.0`` or ``vit.blocks.3``.
        no_decay: conditions of the parameters without weight decay, a group of their own in each layer; ``None`` for no split.
        rules: rules that come before the layers; what they match is in none of them.

    Raises:
        ConfigError: as of `ParamGroups`, and for a pattern that matches no name.
    """

    def __init__(
        self,
        decay: float = 0.75,
        pattern: str | None = None,
        no_decay: Rule | Mapping[str, Any] | None = NO_DECAY,
        **rules: Rule | Mapping[str, Any] | None,
    ) -> None:
        super().__init__(**rules)
        self.decay = positive(decay, "decay", "0.75")
        if self.decay > 1:
            raise ConfigError(f"{decay!r} is above 1, so the first layers would learn fastest.", "decay")
        self.pattern = None if pattern is None else read_regex(pattern, "pattern")
        self.no_decay = _condition(no_decay, "no_decay")

    def rest(self, parameters: Sequence[Parameter], whole: Sequence[Parameter]) -> Iterable[Group]:
        """The layers, each split by weight decay."""
        depths = _depths(whole, self.pattern)
        deepest = max(depths.values(), default=0)
        layers: dict[tuple[int, bool], list[Parameter]] = {}
        for parameter in parameters:
            kept = self.no_decay is not None and _holds(self.no_decay, parameter, "no_decay")
            layers.setdefault((depths[parameter.name], kept), []).append(parameter)
        for (depth, kept), members in sorted(layers.items(), key=lambda layer: (-layer[0][0], layer[0][1])):
            name = f"layer_{depth}" + "_no_decay" * kept
            words = f"depth {depth} of {deepest}" + ", without decay" * kept
            yield Group(_trainable(members), name, self.decay ** (deepest - depth), kept, rule=words)


class MupLike(ParamGroups):
    """Learning rates by fan-in, so that one found on a narrow model holds on a wide one: ``lr_scale = base_fan_in / fan_in``.

    The rule of maximal update parametrization for Adam (Yang & Hu 2022, arXiv 2203.03466): weights whose fan-in grows with the
    width are scaled, the rest is not. It changes learning rates alone, not how the model is initialised.

    Args:
        base_fan_in: fan-in of the hidden weights where the learning rate was found; the scale is 1 there.
        scaled: conditions of the weights that are scaled; by default those of two and more dimensions, without embeddings.
        rules: rules that come before; what they match is not scaled. The first layer, whose fan-in is that of the data, should
            be among them: ``input={"match": "stem.*"}``.

    Raises:
        ConfigError: as of `ParamGroups`.
    """

    def __init__(
        self, base_fan_in: int = 256, scaled: Rule | Mapping[str, Any] | None = None, **rules: Rule | Mapping[str, Any] | None
    ) -> None:
        super().__init__(**rules)
        self.base_fan_in = positive(base_fan_in, "base_fan_in", "256")
        self.scaled = _condition(scaled, "scaled")

    def rest(self, parameters: Sequence[Parameter], whole: Sequence[Parameter]) -> Iterable[Group]:
        """A group of each fan-in, and one of what is not scaled."""
        by_fan_in: dict[int, list[Parameter]] = {}
        for parameter in parameters:
            by_fan_in.setdefault(self._fan_in(parameter), []).append(parameter)
        if not any(by_fan_in):
            names = some(parameter.name for parameter in whole)
            raise ConfigError(f"none of {len(whole)} parameters is scaled. There are {names}", "scaled")
        for fan_in, members in sorted(by_fan_in.items()):
            if fan_in:
                words = f"fan-in {fan_in}, base {self.base_fan_in:g}"
                yield Group(_trainable(members), f"fan_in_{fan_in}", self.base_fan_in / fan_in, rule=words)
            else:
                yield Group(_trainable(members), DEFAULT, rule="the rest")

    def _fan_in(self, parameter: Parameter) -> int:
        """Fan-in of a weight that is scaled, of others 0."""
        shape = parameter.size_of_shape()
        if self.scaled is None:
            is_scaled = len(shape) >= 2 and not {"Embedding", "EmbeddingBag"} & set(parameter.modules)
        else:
            is_scaled = _holds(self.scaled, parameter, "scaled")
        return math.prod(shape[1:]) if is_scaled else 0


class Inherit:
    """The next phase keeps the running phase's partition: names, membership, ratios of learning rates, and zero decays."""

    def __repr__(self) -> str:
        return "Inherit()"


def _group(name: str, rule: Rule, members: Iterable[Parameter]) -> Group:
    """The group of a rule's trainable parameters."""
    decay = rule.options.get("weight_decay")
    no_decay = decay == 0 and not isinstance(decay, bool)
    options = {option: value for option, value in rule.options.items() if not (no_decay and option == "weight_decay")}
    ratio = 1.0 if rule.lr_scale is None else rule.lr_scale
    return Group(_trainable(members), name, ratio, no_decay, rule.lr, options, str(rule))


def _trainable(members: Iterable[Parameter]) -> tuple[str, ...]:
    return tuple(parameter.name for parameter in members if parameter.trainable)


def _condition(value: Rule | Mapping[str, Any] | None, key: str) -> Rule | None:
    with within(key):
        return None if value is None else Rule.condition(value)


def _holds(rule: Rule, parameter: Parameter, key: str) -> bool:
    with within(key):
        return rule.holds(parameter)


# Depth


def _depths(whole: Sequence[Parameter], pattern: str | None) -> dict[str, int]:
    """The depth of each parameter: the blocks in the module's order, one before them for the stem, one after for the head.

    Raises:
        ConfigError: for a pattern that matches no name.
    """
    found = {parameter.name: re.search(pattern or _FIRST_NUMBER, parameter.name) for parameter in whole}
    if pattern is not None and not any(found.values()):
        raise ConfigError(f"{pattern!r} matches none of {len(whole)} parameters. There are {some(found)}", "pattern")
    holders = {parameter.name: parameter.name.rpartition(".")[0] for parameter in whole}
    units = {name: match.group() if match else holders[name] for name, match in found.items()}
    # What holds only vectors, such as a norm, is no layer by itself and belongs to what comes before it.
    layers = {units[parameter.name] for parameter in whole if parameter.shape is None or len(parameter.shape) > 1}
    is_block = {name: bool(match or not any(found.values())) and units[name] in layers for name, match in found.items()}
    inside = [index for index, name in enumerate(units) if is_block[name]] or [0]
    numbers: dict[str, int] = {}
    depths: dict[str, int] = {}
    depth = 0
    for index, (name, unit) in enumerate(units.items()):
        if is_block[name]:
            depth = numbers.setdefault(unit, len(numbers) + (inside[0] > 0))
        elif index > inside[-1] and unit in layers:
            depth = len(numbers) + (inside[0] > 0)
        depths[name] = depth
    return depths
