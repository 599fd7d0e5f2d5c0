"""From config node to object: checked before anything is imported, and again before anything is called.

A node is a mapping with a ``_target_``. In this order: the target's package is installed or trusted; it is a class, and of the
kind that its slot needs; the node's keys are in its signature and of a plausible type; the values are plain Python; then it is
built, or kept as a factory where the slot needs one.
"""

from __future__ import annotations

import functools
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hydra_plugins.lightning_adaptive import SWITCH_SLOTS
from lightning_adaptive import trust
from lightning_adaptive.combined import CombinedOptimizer, given
from lightning_adaptive.durations import Duration, is_duration
from lightning_adaptive.errors import ConfigError, ConfigTypeError, did_you_mean
from lightning_adaptive.handover import Handover
from lightning_adaptive.lr_schedulers import SchedulerLike
from lightning_adaptive.param_groups import Inherit, ParamGroups
from lightning_adaptive.phases import OptimizerFactory, check_options
from lightning_adaptive.schedules import Schedule
from lightning_adaptive.switch import OptimizerSwitchCallback
from lightning_adaptive.triggers import Trigger

Node = Mapping[str, Any]

_HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")
_SCHEDULERS = (Schedule, LRScheduler, ReduceLROnPlateau)


def optimizer_factory(value: Node | OptimizerFactory, key: str = "optimizer") -> OptimizerFactory:
    """A factory of optimizers from a node, or the callable itself."""
    return _factory(value, (Optimizer,), key)


def scheduler(value: Any, key: str = "scheduler") -> SchedulerLike | None:
    """A `Schedule`, a factory of a torch scheduler, or Lightning's dictionary around one, from a node; or the value itself."""
    if isinstance(value, DictConfig) and _is(OmegaConf.get_type(value), Schedule):
        return cast(Schedule, OmegaConf.to_object(value))  # Hydra's instantiate took it apart, a dataclass in a mapping
    if not _is_mapping(value) or not value:
        return _plain_partial(_refuse_value(value, key)) or None
    options = _plain(value, key)
    if "_target_" in options:
        found = _target(options, _SCHEDULERS, key, functions=True)
        if _is(found, Schedule):
            return _build(found, options, key, nested=(Schedule,))  # its pieces
        return _factory({name: _durations(option) for name, option in options.items()}, _SCHEDULERS, key)
    around = {name: _nested(option, (), f"{key}.{name}") for name, option in options.items() if name != "scheduler"}
    if "scheduler" in options:
        inner = value["scheduler"] if _is_mapping(options["scheduler"]) else options["scheduler"]
        around["scheduler"] = scheduler(inner, f"{key}.scheduler")
    return around  # type: ignore[return-value]


def param_groups(value: Any, key: str = "param_groups") -> Inherit | ParamGroups | None:
    """The grouping of parameters from a node, or the object itself."""
    return _object(value, (Inherit, ParamGroups), key)


def switch(value: Any, key: str = "switch") -> OptimizerSwitchCallback | None:
    """The switch and those after it from a node."""
    if not _is_mapping(value):
        return _object(value, (OptimizerSwitchCallback,), key)
    if not value:
        return None
    cls = _target(value, (OptimizerSwitchCallback,), key)
    options = {name: option for name, option in _plain(value, key).items() if name not in _HYDRA_KEYS}
    if options.get("enabled") is False:
        return cls(enabled=False)
    _check_keys(cls, options, key)
    if not options.get("optimizer"):
        raise ConfigError(
            f"a switch needs its next optimizer. Choose one with optimizer@{key}.optimizer=sgd, or no switch with "
            f"{_group_override(key)}=none.",
            f"{key}.optimizer",
        )
    slots: dict[str, Callable[[Any, str], Any]] = {
        "optimizer": optimizer_factory,
        "scheduler": scheduler,
        "param_groups": lambda node, at: param_groups(node, at) or "inherit",
        "when": lambda node, at: _object(node, (Trigger,), at, nested=(Trigger,)),
        "handover": lambda node, at: _object(node, (Handover,), at) or "own",
        "then": switch,
    }
    built = {name: slots[name](option, f"{key}.{name}") if name in slots else option for name, option in options.items()}
    return _call(cls, built, key)


def module(value: Node, key: str) -> LightningModule:
    """A LightningModule from a node; its options may be nodes of ``torch.nn.Module``."""
    return _object(value, (LightningModule,), key, nested=(nn.Module,))


def datamodule(value: Node, key: str) -> LightningDataModule:
    """A LightningDataModule from a node."""
    return _object(value, (LightningDataModule,), key)


def trainer(value: Node, key: str = "trainer", **objects: Any) -> Trainer:
    """A Trainer from a node and from objects that are built already; its options may be nodes of a Strategy."""
    return _object(value, (Trainer,), key, nested=(Strategy,), **objects)


def callbacks(value: Node | None, key: str = "callbacks") -> list[Callback]:
    """Callbacks from a mapping of nodes by name, in file order, a switch among them; ``null`` leaves one out."""
    return [_callback(node, f"{key}.{name}") for name, node in (value or {}).items() if node]


def loggers(value: Node | None, key: str = "logger") -> list[Logger]:
    """Loggers from a mapping of nodes by name, in file order; ``null`` leaves one out."""
    return [_object(node, (Logger,), f"{key}.{name}") for name, node in (value or {}).items() if node]


def _callback(node: Any, key: str) -> Callback:
    is_switch = _is_mapping(node) and _is(_target(node, (Callback,), key), OptimizerSwitchCallback)
    built: Any = switch(node, key) if is_switch else _object(node, (Callback,), key)
    return cast(Callback, built)


def _factory(value: Any, bases: tuple[type, ...], key: str) -> Any:
    if not _is_mapping(value):
        return _plain_partial(_refuse_value(value, key))
    maker = _target(value, bases, key, functions=True)
    options = _options(maker, value, key)
    if _is(maker, Optimizer):
        check_options(maker, options, key)
    return functools.partial(maker, **options)


def _durations(value: Any) -> Any:
    """An option of a torch scheduler; what is written as a duration, ``T_max: 100%``, is counted when the clock is known."""
    if isinstance(value, list):
        return [_durations(item) for item in value]
    return Duration.parse(value) if is_duration(value) else value


def _object(value: Any, bases: tuple[type, ...], key: str, nested: tuple[type, ...] = (), **objects: Any) -> Any:
    if not _is_mapping(value):
        return _refuse_value(value, key)
    if not value:
        return None
    return _build(_target(value, bases, key), value, key, nested, **objects)


def _build(cls: type, node: Node, key: str, nested: tuple[type, ...] = (), **objects: Any) -> Any:
    return _call(cls, {**_options(cls, node, key, nested), **objects}, key)


def _call(cls: type, options: dict[str, Any], key: str) -> Any:
    try:
        return cls(**options)
    except ConfigError as error:
        raise error.within(key) from None
    except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
        if not cls.__module__.startswith(("lightning.", "lightning_adaptive.")):
            raise
        # A machine without a GPU, a logger without its package, a word that Lightning does not know.
        raise ConfigError(f"{cls.__name__} cannot be built: {str(error).rstrip('.!')}.", key) from error


def _refuse_value(value: Any, key: str) -> Any:
    """Lets the objects of the Python API pass, and refuses what only a config can have written where a node belongs."""
    if isinstance(value, str) and value not in ("inherit", "own"):
        raise ConfigTypeError(
            f"{value!r} is a word where a node belongs. To choose a file of the group, write {_group_override(key)}={value}.", key
        )
    if isinstance(value, bool | int | float | list | ListConfig):
        raise ConfigTypeError(f"{value!r} stands where a node belongs, a mapping with _target_.", key)
    return value


def _group_override(key: str) -> str:
    """What chooses a file of the group for a key: ``optimizer`` at the top, ``optimizer@switch.optimizer`` further in."""
    slot = key.rsplit(".", 1)[-1]
    return f"{SWITCH_SLOTS.get(slot, slot)}@{key}" if "." in key else key


def _target(node: Node, bases: tuple[type, ...], key: str, functions: bool = False) -> Any:
    """The class that a node names, imported only after its package was found to be installed or trusted.

    What a function makes cannot be known before it is called, so one is taken only by the user's word for it alone.
    """
    target = node.get("_target_")
    wanted = " or ".join(base.__name__ for base in bases)
    if target in (None, "???"):
        raise ConfigError(f"must be given: the path of a class, package.module.Class, of {wanted}.", f"{key}._target_")
    if not isinstance(target, str) or "." not in target or not all(part.isidentifier() for part in target.split(".")):
        raise ConfigError(f"{target!r} is no path of a class. Write package.module.Class, of {wanted}.", f"{key}._target_")
    trust.check(target, f"{key}._target_")
    try:
        found = pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise ConfigError(_not_found(target, error), f"{key}._target_") from None
    is_class = inspect.isclass(found) and issubclass(found, bases)
    if not is_class and not (functions and inspect.isfunction(found) and target in trust.names()):
        raise ConfigTypeError(f"{target} is not a class of {wanted}, which belongs here.", f"{key}._target_")
    return found


def _not_found(target: str, error: Exception) -> str:
    module_name, _, name = target.rpartition(".")
    if isinstance(error, ImportError) and not target.startswith(error.name or target):
        return f"importing {target} failed: {error}."  # one of the imports within it
    module_object = sys.modules.get(module_name)
    if module_object is None:
        return f"there is no module {module_name!r}."
    # A name that the module does not hold yet is one that it would import when asked; it is not asked for a suggestion.
    classes = [option for option in dir(module_object) if inspect.isclass(vars(module_object).get(option, type))]
    return f"{module_name} has no {name!r}." + did_you_mean(name, classes)


def _options(cls: type, node: Node, key: str, nested: tuple[type, ...] = ()) -> dict[str, Any]:
    options = {name: value for name, value in _plain(node, key).items() if name not in _HYDRA_KEYS}
    if _is(cls, CombinedOptimizer) and "optimizers" in options:
        options["optimizers"] = _parts(options["optimizers"], key)
    if not nested:
        _nested(options, nested, key)  # a node is refused as one, and not taken for a wrong value
    _check_keys(cls, options, key)
    parameters = _signature(cls).parameters
    return {name: _floats(_nested(value, nested, f"{key}.{name}"), parameters.get(name)) for name, value in options.items()}


def _floats(value: Any, parameter: inspect.Parameter | None) -> Any:
    """A row of numbers as floats where the class has floats: torch refuses betas of 0 and 0.9, one of which is whole."""
    default = None if parameter is None else parameter.default
    if isinstance(value, list) and isinstance(default, tuple) and all(isinstance(number, float) for number in default):
        return [float(number) if type(number) is int else number for number in value]
    return value


def _parts(value: Any, key: str) -> dict[str, OptimizerFactory]:
    """The factories of a `CombinedOptimizer`, each under its own key."""
    try:
        nodes = given(value)
    except ConfigError as error:
        raise error.within(key) from None
    for name, node in nodes.items():
        if isinstance(node, str):
            example = "{_target_: torch.optim.AdamW, lr: 3e-4}"
            raise ConfigTypeError(f"{node!r} is a word where a node belongs, such as {example}.", f"{key}.optimizers.{name}")
    return {name: optimizer_factory(node, f"{key}.optimizers.{name}") for name, node in nodes.items()}


def _nested(value: Any, bases: tuple[type, ...], key: str) -> Any:
    """Builds the nodes inside an option where its slot may hold some, and refuses them elsewhere."""
    if isinstance(value, list):
        return [_nested(item, bases, f"{key}.{index}") for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "_target_" not in value:
        return {name: _nested(item, bases, f"{key}.{name}") for name, item in value.items()}
    if not bases:
        raise ConfigError("a node is not allowed here; only plain values are.", key)
    return _object(value, bases, key, nested=bases)


def _check_keys(cls: Any, options: dict[str, Any], key: str) -> None:
    """Refuses options that a class, or a function that makes an object, does not take, and values that cannot be meant."""
    parameters = dict(_signature(cls).parameters)
    parameters.pop(_given(cls, parameters), None)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in options.items():
        if name not in parameters and not takes_any:
            nearest = did_you_mean(name, parameters)
            raise ConfigError(f"{cls.__name__} has no option {name!r}.{nearest} Options: {', '.join(parameters)}.", f"{key}.{name}")
        if value == "???":
            raise ConfigError("must be given.", f"{key}.{name}")
        _check_value(value, parameters.get(name), f"{key}.{name}", is_lr=name == "lr" and _is(cls, Optimizer))
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in options
    ]
    if missing:
        raise ConfigError(f"{cls.__name__} needs the option {missing[0]!r}.", f"{key}.{missing[0]}")


def _is(found: Any, *bases: type) -> bool:
    """Whether something that a node named is a class of these."""
    return inspect.isclass(found) and issubclass(found, bases)


def _given(cls: Any, parameters: Iterable[str]) -> str:
    """The parameter that is not an option, since a factory is called with it."""
    if not inspect.isclass(cls):
        return next(iter(parameters), "")
    return "params" if issubclass(cls, Optimizer) else "optimizer" if _is(cls, LRScheduler, ReduceLROnPlateau) else ""


def _signature(cls: Any) -> inspect.Signature:
    try:
        return inspect.signature(cls, eval_str=True)
    except (NameError, AttributeError, TypeError, SyntaxError):  # annotations that only a type checker can read
        return inspect.signature(cls)


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


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _plain(node: Node, key: str) -> dict[str, Any]:
    """The node in plain Python: torch refuses ``DictConfig`` and ``ListConfig``."""
    plain: dict[str, Any] = _plain_value(node, key)
    return plain


def _plain_value(value: Any, key: str) -> Any:
    if isinstance(value, DictConfig | ListConfig):
        try:
            return OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0], error.full_key or key) from None
    if isinstance(value, Mapping):
        return {name: _plain_value(item, key) for name, item in value.items()}
    return [_plain_value(item, key) for item in value] if isinstance(value, list) else value


def _plain_partial(value: Any) -> Any:
    """A partial that Hydra's instantiate made, with plain lists: torch keeps a ``ListConfig``, and then no checkpoint loads."""
    if not isinstance(value, functools.partial):
        return value
    configs = {name: option for name, option in value.keywords.items() if isinstance(option, Mapping | ListConfig)}
    # Around it and not anew from its parts, since Hydra's partial checks its target when it is called.
    return functools.partial(value, **{name: _plain_option(option, name) for name, option in configs.items()}) if configs else value


def _plain_option(option: Any, name: str) -> Any:
    """Also of partials within a mapping, the optimizers of a `CombinedOptimizer`."""
    plain = _plain_value(option, name)
    return {key: _plain_partial(item) for key, item in plain.items()} if _is_mapping(plain) else plain
