"""Rules: which parameters are meant, known by name, shape and the module that holds them; no torch."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_adaptive.errors import ConfigError, ConfigTypeError, is_number, within

_REGEX_LENGTH = 200
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "<": int.__lt__,
    "<=": int.__le__,
    ">": int.__gt__,
    ">=": int.__ge__,
    "==": int.__eq__,
    "!=": int.__ne__,
}


@dataclass(frozen=True)
class Parameter:
    """What a rule can know of one parameter.

    Args:
        name: its first name in the module, without what wrappers put into names.
        shape: of the whole parameter, also where a strategy keeps a shard; ``None`` for a lazily built one that has none yet.
        modules: class names of the modules that hold it and of their bases, bare (``LayerNorm``) and dotted
            (``torch.nn.LayerNorm``).
        trainable: whether it requires a gradient.
        aliases: the other names of a tied one.
    """

    name: str
    shape: tuple[int, ...] | None = ()
    modules: tuple[str, ...] = ()
    trainable: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All its names, the first one first."""
        return (self.name, *self.aliases)

    def size_of_shape(self) -> tuple[int, ...]:
        """The shape.

        Raises:
            ConfigError: when there is none yet.
        """
        if self.shape is None:
            raise ConfigError(
                f"{self.name} has no shape yet: its module is built by its first forward. Run one batch through the model before "
                "it is trained, or match it by name or class."
            )
        return self.shape


@dataclass(frozen=True, init=False)
class Rule:
    """Which parameters form a group, and which options the group has in place of the optimizer's.

    Several conditions must all hold. A list within one holds when one of its members does. A tied parameter is matched under
    each of its names and in each module that holds it.

    Args:
        match: a glob on the whole name, ``"*.bias"``, or several.
        regex: a regular expression that is searched in the name, or several; at most 200 characters each.
        module: the class of the module that holds the parameter, or of its bases: ``LayerNorm``, ``torch.nn.LayerNorm``,
            ``"*Norm"``, or several. A glob with a dot is compared with dotted names, one without with bare names.
        ndim: number of dimensions of the whole parameter: ``1``, ``"<2"``, ``">=2"``, or several.
        any: conditions, of which one must hold: ``[{"ndim": "<2"}, {"module": "Embedding"}]``.
        lr: the group's base learning rate; a schedule drives it as it drives the others.
        lr_scale: its base learning rate as a multiple of the optimizer's.
        options: any other option of the optimizer: ``weight_decay=0``, ``betas=(0.9, 0.95)``.

    Raises:
        ConfigError: for a rule without a condition, an expression that does not compile, or a learning rate that is none.
        ConfigTypeError: for a value of another kind.

    >>> Rule(match="*.bias", weight_decay=0)
    Rule(match='*.bias', weight_decay=0)
    """

    conditions: Mapping[str, tuple[Any, ...]]
    lr: float | None
    lr_scale: float | None
    options: Mapping[str, Any]

    def __init__(
        self,
        *,
        match: str | Sequence[str] | None = None,
        regex: str | Sequence[str] | None = None,
        module: str | Sequence[str] | None = None,
        ndim: int | str | Sequence[int | str] | None = None,
        any: Sequence[Mapping[str, Any]] | None = None,  # noqa: A002 - it is the word that a user writes
        lr: float | None = None,
        lr_scale: float | None = None,
        **options: Any,
    ) -> None:
        given = {"match": match, "regex": regex, "module": module, "ndim": ndim, "any": any}
        conditions = {kind: _CONDITIONS[kind].read(value, kind) for kind, value in given.items() if value is not None}
        if not conditions:
            raise ConfigError(f"a rule needs a condition, which parameters it is for. Write one of {', '.join(CONDITIONS)}.")
        if lr is not None and lr_scale is not None:
            raise ConfigError(f"lr {lr!r} and lr_scale {lr_scale!r} are both given. Leave one of them out.")
        object.__setattr__(self, "conditions", conditions)
        object.__setattr__(self, "lr", _learning_rate(lr, "lr"))
        object.__setattr__(self, "lr_scale", _learning_rate(lr_scale, "lr_scale"))
        object.__setattr__(self, "options", {name: _plain(option) for name, option in sorted(options.items())})

    @classmethod
    def of(cls, value: Rule | Mapping[str, Any]) -> Rule:
        """A rule from a mapping, or the rule itself."""
        if isinstance(value, Rule):
            return value
        if not isinstance(value, Mapping):
            raise ConfigTypeError(f"{value!r} is no rule. Write a mapping such as {{match: '*.bias', weight_decay: 0}}.")
        return cls(**value)

    @classmethod
    def condition(cls, value: Any) -> Rule:
        """Conditions alone, as they stand within ``any``.

        Raises:
            ConfigError: when there is something else among them.
        """
        rule = cls.of(value)
        if rule.overrides:
            other = next(iter(rule.overrides))
            raise ConfigError(f"{other!r} is no condition. Here stand only {', '.join(CONDITIONS)}.", other)
        return rule

    @property
    def overrides(self) -> dict[str, Any]:
        """What the group has in place of the optimizer's options."""
        rates = {"lr": self.lr, "lr_scale": self.lr_scale}
        return {**{name: value for name, value in rates.items() if value is not None}, **self.options}

    def holds(self, parameter: Parameter) -> bool:
        """Whether all conditions hold for a parameter."""
        return all(self.holds_in(kind, parameter) for kind in self.conditions)

    def holds_in(self, kind: str, parameter: Parameter) -> bool:
        """Whether one of its conditions holds for a parameter."""
        return any(_CONDITIONS[kind].holds(alternative, parameter) for alternative in self.conditions[kind])

    def __str__(self) -> str:
        """The conditions in words.

        >>> str(Rule(module=["LayerNorm", "Embedding"], ndim="<2"))
        'module LayerNorm|Embedding, and ndim <2'
        """
        words = []
        for kind, alternatives in self.conditions.items():
            if kind == "any":
                either = " or ".join(map(str, alternatives))
                words.append(f"({either})" if len(self.conditions) > 1 else either)
            else:
                words.append(f"{'name' if kind == 'match' else kind} {'|'.join(map(str, alternatives))}")
        return ", and ".join(words)

    def __repr__(self) -> str:
        given = {kind: list(values) if len(values) > 1 else values[0] for kind, values in self.conditions.items()}
        return f"Rule({', '.join(f'{name}={value!r}' for name, value in {**given, **self.overrides}.items())})"


# What a rule's conditions may be, read when it is made


def _several(value: Any, kind: str) -> list[Any]:
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not found:
        raise ConfigError("an empty list matches nothing. Leave it out, or write null.", kind)
    return found


def _each(read: Callable[[Any, str], Any]) -> Callable[[Any, str], tuple[Any, ...]]:
    return lambda value, kind: tuple(read(one, kind) for one in _several(value, kind))


def _glob(value: Any, kind: str) -> str:
    if not isinstance(value, str) or not value:
        what, example = ("name", "'*.bias'") if kind == "match" else ("class", "LayerNorm or '*Norm'")
        raise ConfigTypeError(f"{value!r} is no {what} or glob. Write {example}, or a list.", kind)
    return value


def read_regex(value: Any, key: str) -> str:
    """A regular expression that compiles.

    Raises:
        ConfigError: for one that does not, or that is longer than 200 characters.
        ConfigTypeError: for anything but text.
    """
    if not isinstance(value, str) or not value:
        several = ", or a list" if key == "regex" else ""
        raise ConfigTypeError(f"{value!r} is no regular expression. Write a text such as '^head'{several}.", key)
    if len(value) > _REGEX_LENGTH:
        raise ConfigError(f"an expression of {len(value)} characters; at most {_REGEX_LENGTH} are read.", key)
    try:
        re.compile(value)
    except re.error as error:
        raise ConfigError(f"{value!r} is no regular expression: {error}.", key) from None
    return value


def _dimensions(value: Any, kind: str) -> int | str:
    if isinstance(value, bool) or not isinstance(value, int | str) or not _comparison(str(value)):
        raise ConfigError(f"{value!r} is no number of dimensions. Write 1, '<2', '>=2', or a list.", kind)
    return value


def _comparison(text: str) -> re.Match[str] | None:
    return re.fullmatch(r"\s*(<=|>=|<|>|==|!=|)\s*(\d{1,3})\s*", text)


def _either(value: Any, kind: str) -> tuple[Rule, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ConfigTypeError(f"{value!r} is no list of conditions. Write [{{ndim: '<2'}}, {{module: Embedding}}].", kind)
    found = []
    for index, one in enumerate(_several(value, kind)):
        with within(f"{kind}.{index}"):
            found.append(Rule.condition(one))
    return tuple(found)


def _learning_rate(value: Any, key: str) -> float | None:
    return None if value is None else positive(value, key, "0.001" if key == "lr" else "0.1")


def positive(value: Any, key: str, example: str) -> float:
    """A finite number above zero.

    Raises:
        ConfigError: for another number.
        ConfigTypeError: for anything else.
    """
    if not is_number(value):
        raise ConfigTypeError(f"{value!r} is not a number. Write one, for example {example}.", key)
    if not (math.isfinite(value) and value > 0):
        to_freeze = " To keep parameters as they are, freeze them." if key in ("lr", "lr_scale") else ""
        raise ConfigError(f"{value!r} is not possible. Write a finite number above zero.{to_freeze}", key)
    return float(value)


def _plain(value: Any) -> Any:
    """Lists of any kind as plain ones."""
    return [_plain(item) for item in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


# Whether they hold


def _holds_in_name(glob: str, parameter: Parameter) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in parameter.names)


def _is_found_in_name(expression: str, parameter: Parameter) -> bool:
    return any(re.search(expression, name) for name in parameter.names)


def _holds_in_class(glob: str, parameter: Parameter) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for name in parameter.modules if ("." in name) == ("." in glob))


def _has_dimensions(wanted: int | str, parameter: Parameter) -> bool:
    found = _comparison(str(wanted))
    assert found is not None
    return _COMPARISONS[found[1] or "=="](len(parameter.size_of_shape()), int(found[2]))


class _Condition(NamedTuple):
    read: Callable[[Any, str], tuple[Any, ...]]
    holds: Callable[[Any, Parameter], bool]


_CONDITIONS = {
    "match": _Condition(_each(_glob), _holds_in_name),
    "regex": _Condition(_each(read_regex), _is_found_in_name),
    "module": _Condition(_each(_glob), _holds_in_class),
    "ndim": _Condition(_each(_dimensions), _has_dimensions),
    "any": _Condition(_either, Rule.holds),
}
CONDITIONS = tuple(_CONDITIONS)
"""What a rule can ask of a parameter."""


# What is said of a rule that cannot be meant


def dead_rule(name: str, rule: Rule, whole: Sequence[Parameter], rules: Mapping[str, Rule]) -> ConfigError:
    """Why a rule gets no parameter."""
    matched = [parameter for parameter in whole if rule.holds(parameter)]
    if matched:
        takers = dict.fromkeys(next(other for other, its in rules.items() if its.holds(parameter)) for parameter in matched)
        return ConfigError(
            f"all {len(matched)} parameters that it matches are taken by rules before it: {', '.join(takers)}. Put it first, or "
            "leave it out.",
            name,
        )
    for kind, values in rule.conditions.items():
        if not any(rule.holds_in(kind, parameter) for parameter in whole):
            shown = f"{' or '.join(map(str, values))}" if kind == "any" else repr(list(values) if len(values) > 1 else values[0])
            return ConfigError(f"{shown} matches none of {len(whole)} parameters. {_hint(kind, values, whole)}", f"{name}.{kind}")
    return ConfigError(f"none of {len(whole)} parameters meets all its conditions: {rule}.", name)


def _hint(kind: str, values: Sequence[Any], whole: Sequence[Parameter]) -> str:
    if kind == "ndim":
        found = sorted({len(parameter.size_of_shape()) for parameter in whole})
        return f"They have {' or '.join(map(str, found))} dimensions."
    words = [parameter.name for parameter in whole]
    if kind == "module":
        words = list(dict.fromkeys(name for parameter in whole for name in parameter.modules if "." not in name))
    nearest = {word for value in values for word in _nearest(str(value), words)}
    near = [word for word in words if word in nearest]
    return f"Nearest: {', '.join(near)}." if near else f"There are {some(words)}"


def _nearest(pattern: str, words: Iterable[str]) -> list[str]:
    """The words a part of which is spelt most like a pattern."""
    parts: dict[str, str] = {}
    for word in words:
        pieces = word.split(".")
        for cut in range(len(pieces)):
            parts.setdefault(".".join(pieces[cut:]), word)
            parts.setdefault(".".join(pieces[: cut + 1]), word)
    text = re.sub(r"[^\w.]", "", pattern).strip(".")
    return [parts[part] for part in difflib.get_close_matches(text, parts, n=3, cutoff=0.6)]


def some(words: Iterable[str]) -> str:
    """The first words of a list, which may be long."""
    listed = list(words)
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else ".")
