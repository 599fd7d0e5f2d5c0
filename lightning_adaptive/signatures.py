"""Whether options fit what a class takes: its names, and where it has numbers, truths and rows of numbers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_adaptive.durations import Duration
from lightning_adaptive.errors import ConfigError, ConfigTypeError, did_you_mean


def check(maker: Any, options: Mapping[str, Any], key: str) -> None:
    """Refuses options that a class, or a function that makes an object, does not take, and values that cannot be meant.

    Args:
        maker: the class or function.
        options: plain values by name.
        key: the config key that holds them.

    Raises:
        ConfigError: for an option that it does not have, one that is missing, and a number that cannot be used.
        ConfigTypeError: for a word, a blank or a fraction where it has a number or a truth.
    """
    parameters = dict(_signature(maker).parameters)
    parameters.pop(_given(maker, parameters), None)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in options.items():
        if name not in parameters and not takes_any:
            nearest = did_you_mean(name, parameters)
            raise ConfigError(
                f"{maker.__name__} has no option {name!r}.{nearest} Options: {', '.join(parameters)}.", f"{key}.{name}"
            )
        if value == "???":
            raise ConfigError("must be given.", f"{key}.{name}")
        is_lr = name == "lr" and inspect.isclass(maker) and issubclass(maker, Optimizer)
        _check_value(value, parameters.get(name), f"{key}.{name}", is_lr)
    for name, parameter in parameters.items():
        is_named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if is_named and parameter.default is parameter.empty and name not in options:
            raise ConfigError(f"{maker.__name__} needs the option {name!r}.", f"{key}.{name}")


def with_floats(maker: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of numbers as floats where the class has floats: torch refuses betas of 0 and 0.9, one of which is whole."""
    parameters = _signature(maker).parameters
    return {name: _floats(value, parameters[name].default) if name in parameters else value for name, value in options.items()}


def _floats(value: Any, default: Any) -> Any:
    if isinstance(value, list) and isinstance(default, tuple) and all(isinstance(number, float) for number in default):
        return [float(number) if type(number) is int else number for number in value]
    return value


def _given(maker: Any, parameters: Mapping[str, Any]) -> str:
    """The parameter that is not an option, since a factory is called with it."""
    if not inspect.isclass(maker):
        return next(iter(parameters), "")
    if issubclass(maker, Optimizer):
        return "params"
    return "optimizer" if issubclass(maker, LRScheduler | ReduceLROnPlateau) else ""


def _signature(maker: Any) -> inspect.Signature:
    try:
        return inspect.signature(maker, eval_str=True)
    except (NameError, AttributeError, TypeError, SyntaxError):  # annotations that only a type checker can read
        return inspect.signature(maker)


def _check_value(value: Any, parameter: inspect.Parameter | None, key: str, is_lr: bool) -> None:
    """A word, a blank or a fraction where the class has a number or a truth; and a learning rate that no optimizer can use."""
    default = None if parameter is None or parameter.default is parameter.empty else parameter.default
    kinds = _kinds(parameter, default)
    if is_lr and not kinds:
        kinds = {float}
    if _is_number(kinds) and not _fits(value, kinds):
        number = "number" if float in kinds else "whole number"
        example = default if isinstance(default, int | float) else 0.001 if is_lr else 1
        shown = "null" if value is None else repr(str(value) if isinstance(value, Duration) else value)
        raise ConfigTypeError(f"{shown} is not a {number}. Write one, for example {example}.", key)
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    is_truth = bool in kinds and all(kind in (bool, NoneType) or get_origin(kind) is Literal for kind in kinds)
    if is_truth and type(value) not in kinds and value not in words:
        raise ConfigTypeError(f"{value!r} is neither true nor false{''.join(f', nor {word!r}' for word in words)}.", key)
    if is_lr and isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{value!r} is no learning rate. It is finite and above zero.", key)
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError("nan is no number to train with.", key)
    if value is not None:
        _check_row(value, kinds, default, key)


def _check_row(value: Any, kinds: set[Any], default: Any, key: str) -> None:
    """A row of numbers, such as betas, of a length that the class fixes; some classes allow several lengths, or a word as well."""
    rows = [[_members(one) for one in get_args(kind)] for kind in kinds if get_origin(kind) is tuple]
    others = any(get_origin(kind) is not tuple for kind in kinds - {NoneType})
    if not rows or others or not all(_is_number(column) for row in rows for column in row):
        return
    fitting = [row for row in rows if isinstance(value, list) and len(value) == len(row)]
    if not fitting:
        lengths = " or ".join(str(length) for length in sorted({len(row) for row in rows}))
        example = f", for example {list(default)}" if isinstance(default, tuple) else ""
        raise ConfigTypeError(f"{value!r} is not a row of {lengths} numbers. Write them in brackets{example}.", key)
    for index, (number, *columns) in enumerate(zip(value, *fitting, strict=True)):
        if not _fits(number, set().union(*columns)) or (isinstance(number, float) and not math.isfinite(number)):
            raise ConfigTypeError(f"{number!r} is not a number.", f"{key}.{index}")


def _is_number(kinds: set[Any]) -> bool:
    return bool(kinds & {int, float}) and kinds <= {int, float, bool, NoneType, Tensor}


def _kinds(parameter: inspect.Parameter | None, default: Any) -> set[Any]:
    """The types that an option may have, by its annotation and its default; empty where neither says anything."""
    if parameter is None:
        return set()
    if parameter.annotation is parameter.empty or isinstance(parameter.annotation, str):
        # Without an annotation a default of None says nothing, and 0 may stand for 0.0.
        return {int, float} if isinstance(default, int | float) and not isinstance(default, bool) else set()
    members = _members(parameter.annotation)
    return members if parameter.default is parameter.empty or isinstance(default, tuple) else {*members, type(default)}


def _members(annotation: Any) -> set[Any]:
    return set(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else {annotation}


def _fits(value: Any, kinds: set[Any]) -> bool:
    if isinstance(value, Duration):
        return int in kinds  # it will be a number of steps
    if value is None or isinstance(value, bool):
        return type(value) in kinds
    if isinstance(value, int):
        return True
    return isinstance(value, float) and float in kinds
