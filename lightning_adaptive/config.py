"""From config node to object: checked before anything is imported, and again before anything is called.

A node is a mapping with a ``_target_``. In this order: the target's package is installed or trusted; it is a class, and of the
kind that its slot needs; the node's keys are in its signature and of a plausible type; the values are plain Python; then it is
built, or kept as a factory where the slot needs one.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from hydra_plugins.lightning_adaptive import SWITCH_SLOTS
from lightning_adaptive import signatures, trust
from lightning_adaptive.combined import CombinedOptimizer, OptimizerFactory, given
from lightning_adaptive.durations import Duration, is_duration
from lightning_adaptive.errors import ConfigError, ConfigTypeError, did_you_mean, within
from lightning_adaptive.handover import Handover
from lightning_adaptive.lr_schedulers import SchedulerLike
from lightning_adaptive.param_groups import Inherit, ParamGroups
from lightning_adaptive.phases import check_options
from lightning_adaptive.schedules import Schedule
from lightning_adaptive.switch import OptimizerSwitchCallback
from lightning_adaptive.triggers import Trigger

Node = Mapping[str, Any]

_HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_")


def optimizer_factory(value: Node | OptimizerFactory, key: str = "optimizer") -> OptimizerFactory:
    """A factory of optimizers from a node, or the callable itself."""
    if not isinstance(value, Mapping):
        return _object_itself(value, key)
    maker = _target(value, (Optimizer,), key, functions=True)
    options = _options(maker, value, key)
    if _is(maker, Optimizer):
        check_options(maker, options, key)
    return functools.partial(maker, **options)


def scheduler(value: Any, key: str = "scheduler") -> SchedulerLike | None:
    """A `Schedule`, a factory of a torch scheduler, or Lightning's dictionary around one, from a node; or the value itself."""
    if isinstance(value, DictConfig) and _is(OmegaConf.get_type(value), Schedule):
        return cast(Schedule, OmegaConf.to_object(value))  # Hydra's instantiate took it apart, a dataclass in a mapping
    if not isinstance(value, Mapping) or not value:
        return _object_itself(value, key)
    options = _plain(value, key)
    if "_target_" in options:
        maker = _target(options, (Schedule, LRScheduler, ReduceLROnPlateau), key, functions=True)
        if _is(maker, Schedule):
            return _call(maker, _options(maker, options, key, nested=(Schedule,)), key)  # its pieces
        counted = {name: _durations(option) for name, option in options.items()}
        return functools.partial(maker, **_options(maker, counted, key))
    around = {name: _nested(option, (), f"{key}.{name}") for name, option in options.items() if name != "scheduler"}
    if "scheduler" in options:
        inner = value["scheduler"] if isinstance(options["scheduler"], Mapping) else options["scheduler"]
        around["scheduler"] = scheduler(inner, f"{key}.scheduler")
    return around  # type: ignore[return-value]


def param_groups(value: Any, key: str = "param_groups") -> Inherit | ParamGroups | None:
    """The grouping of parameters from a node, or the object itself."""
    return _object(value, (Inherit, ParamGroups), key)


def switch(value: Any, key: str = "switch") -> OptimizerSwitchCallback | None:
    """The switch and those after it from a node."""
    if not isinstance(value, Mapping) or not value:
        return _object_itself(value, key)
    cls = _target(value, (OptimizerSwitchCallback,), key)
    options = {name: option for name, option in _plain(value, key).items() if name not in _HYDRA_KEYS}
    if options.get("enabled") is False:
        return cls(enabled=False)
    signatures.check(cls, options, key)
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
    is_switch = isinstance(node, Mapping) and _is(_target(node, (Callback,), key), OptimizerSwitchCallback)
    built: Any = switch(node, key) if is_switch else _object(node, (Callback,), key)
    return cast(Callback, built)


def _durations(value: Any) -> Any:
    """An option of a torch scheduler; what is written as a duration, ``T_max: 100%``, is counted when the clock is known."""
    if isinstance(value, list):
        return [_durations(item) for item in value]
    return Duration.parse(value) if is_duration(value) else value


def _object(value: Any, bases: tuple[type, ...], key: str, nested: tuple[type, ...] = (), **objects: Any) -> Any:
    if not isinstance(value, Mapping) or not value:
        return _object_itself(value, key)
    cls = _target(value, bases, key)
    return _call(cls, {**_options(cls, value, key, nested), **objects}, key)


def _call(cls: type, options: dict[str, Any], key: str) -> Any:
    try:
        return cls(**options)
    except ConfigError as error:
        raise error.within(key) from error.__cause__
    except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
        if not cls.__module__.startswith(("lightning.", "lightning_adaptive.")):
            raise
        # A machine without a GPU, a logger without its package, a word that Lightning does not know.
        raise ConfigError(f"{cls.__name__} cannot be built: {str(error).rstrip('.!')}.", key) from error


def _object_itself(value: Any, key: str) -> Any:
    """What is no node: objects of the Python API pass, an empty mapping is ``None``, and what only a config can say is refused."""
    if isinstance(value, str) and value not in ("inherit", "own"):
        raise ConfigTypeError(
            f"{value!r} is a word where a node belongs. To choose a file of the group, write {_group_override(key)}={value}.", key
        )
    if isinstance(value, bool | int | float | list | ListConfig):
        raise ConfigTypeError(f"{value!r} stands where a node belongs, a mapping with _target_.", key)
    return None if isinstance(value, Mapping) else _plain(value, key)


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
    signatures.check(cls, options, key)
    built = {name: _nested(value, nested, f"{key}.{name}") for name, value in options.items()}
    return signatures.with_floats(cls, built)


def _parts(value: Any, key: str) -> dict[str, OptimizerFactory]:
    """The factories of a `CombinedOptimizer`, each under its own key."""
    with within(key):
        nodes = given(value)
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


def _is(found: Any, *bases: type) -> bool:
    """Whether something that a node named is a class of these."""
    return inspect.isclass(found) and issubclass(found, bases)


def _plain(value: Any, key: str) -> Any:
    """In plain Python: torch refuses ``DictConfig`` and ``ListConfig``, or keeps them, and then no checkpoint loads."""
    if isinstance(value, DictConfig | ListConfig):
        try:
            value = OmegaConf.to_container(value, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(str(error).splitlines()[0], error.full_key or key) from None
    if isinstance(value, Mapping):
        return {name: _plain(item, key) for name, item in value.items()}
    if isinstance(value, functools.partial):
        # Hydra's instantiate made it. Around it and not anew from its parts, since it checks its target when it is called.
        options = {name: _plain(item, key) for name, item in value.keywords.items() if isinstance(item, Mapping | ListConfig)}
        return functools.partial(value, **options) if options else value
    return [_plain(item, key) for item in value] if isinstance(value, list) else value
