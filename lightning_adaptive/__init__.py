"""Optimizer and schedule switching for PyTorch Lightning, composed with Hydra, resumed exactly."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # isort: off
    # In the order of the table below; sorted, each name would take a line.
    from lightning_adaptive.combined import CombinedOptimizer as CombinedOptimizer
    from lightning_adaptive.curves import REX as REX, Cosine as Cosine, CosineRestarts as CosineRestarts, Cyclic as Cyclic
    from lightning_adaptive.curves import Exponential as Exponential, InverseSqrt as InverseSqrt, Linear as Linear
    from lightning_adaptive.curves import MultiStep as MultiStep, OneCycle as OneCycle, Polynomial as Polynomial
    from lightning_adaptive.curves import StepDecay as StepDecay, WarmupStableDecay as WarmupStableDecay
    from lightning_adaptive.durations import Clock as Clock, Duration as Duration
    from lightning_adaptive.errors import CheckpointError as CheckpointError, ConfigError as ConfigError
    from lightning_adaptive.exact_resume import ExactResume as ExactResume
    from lightning_adaptive.handover import Handover as Handover
    from lightning_adaptive.hooks import attach as attach, configure_optimizers as configure_optimizers
    from lightning_adaptive.noise import GradientNoiseMonitor as GradientNoiseMonitor
    from lightning_adaptive.noise_scale import GradientNoiseScale as GradientNoiseScale
    from lightning_adaptive.param_groups import Inherit as Inherit, LayerDecay as LayerDecay, MupLike as MupLike
    from lightning_adaptive.param_groups import ParamGroups as ParamGroups
    from lightning_adaptive.plan import Plan as Plan, preview as preview
    from lightning_adaptive.rules import Rule as Rule
    from lightning_adaptive.schedules import Constant as Constant, Continue as Continue, Curve as Curve, PerOption as PerOption
    from lightning_adaptive.schedules import Piecewise as Piecewise, Plateau as Plateau, Schedule as Schedule
    from lightning_adaptive.switch import OptimizerSwitchCallback as OptimizerSwitchCallback
    from lightning_adaptive.triggers import AllOf as AllOf, AnyOf as AnyOf, Manual as Manual, OnNoise as OnNoise
    from lightning_adaptive.triggers import OnPlateau as OnPlateau, OnThreshold as OnThreshold, Swats as Swats, Trigger as Trigger

__version__ = "0.1.0"

# Names are imported when they are first used, so that `--help` does not wait for torch.
_NAMES = {
    "combined": "CombinedOptimizer",
    "curves": "REX Cosine CosineRestarts Cyclic Exponential InverseSqrt Linear MultiStep OneCycle Polynomial StepDecay "
    "WarmupStableDecay",
    "durations": "Clock Duration",
    "errors": "CheckpointError ConfigError",
    "exact_resume": "ExactResume",
    "handover": "Handover",
    "hooks": "attach configure_optimizers",
    "noise": "GradientNoiseMonitor",
    "noise_scale": "GradientNoiseScale",
    "param_groups": "Inherit LayerDecay MupLike ParamGroups",
    "plan": "Plan preview",
    "rules": "Rule",
    "schedules": "Constant Continue Curve PerOption Piecewise Plateau Schedule",
    "switch": "OptimizerSwitchCallback",
    "triggers": "AllOf AnyOf Manual OnNoise OnPlateau OnThreshold Swats Trigger",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _teach_jsonargparse()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def _teach_jsonargparse() -> None:
    """Lets LightningCLI read durations with our own readers, whose message is then an error of usage and no traceback.

    jsonargparse looks a class up by its public name before it reads it, so this is in time in any order of imports.
    """
    typing = sys.modules.get("jsonargparse.typing")
    if typing is not None:
        from lightning_adaptive.durations import Duration, Warmup

        # With a key of its own it is not looked up by its public name first, which would end here again.
        for kind in (Duration, Warmup):
            typing.register_type(kind, deserializer=kind.parse, uniqueness_key=(__name__, kind.__name__))


def __dir__() -> list[str]:
    return [*globals(), *__all__]
