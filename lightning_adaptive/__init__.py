"""Optimizer and schedule switching for PyTorch Lightning, composed with Hydra, resumed exactly."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_adaptive.combined import CombinedOptimizer as CombinedOptimizer
    from lightning_adaptive.curves import REX as REX
    from lightning_adaptive.curves import Cosine as Cosine
    from lightning_adaptive.curves import CosineRestarts as CosineRestarts
    from lightning_adaptive.curves import Cyclic as Cyclic
    from lightning_adaptive.curves import Exponential as Exponential
    from lightning_adaptive.curves import InverseSqrt as InverseSqrt
    from lightning_adaptive.curves import Linear as Linear
    from lightning_adaptive.curves import MultiStep as MultiStep
    from lightning_adaptive.curves import OneCycle as OneCycle
    from lightning_adaptive.curves import Polynomial as Polynomial
    from lightning_adaptive.curves import StepDecay as StepDecay
    from lightning_adaptive.curves import WarmupStableDecay as WarmupStableDecay
    from lightning_adaptive.durations import Clock as Clock
    from lightning_adaptive.durations import Duration as Duration
    from lightning_adaptive.errors import CheckpointError as CheckpointError
    from lightning_adaptive.errors import ConfigError as ConfigError
    from lightning_adaptive.exact_resume import ExactResume as ExactResume
    from lightning_adaptive.handover import Handover as Handover
    from lightning_adaptive.hooks import attach as attach
    from lightning_adaptive.hooks import configure_optimizers as configure_optimizers
    from lightning_adaptive.noise import GradientNoiseMonitor as GradientNoiseMonitor
    from lightning_adaptive.noise_scale import GradientNoiseScale as GradientNoiseScale
    from lightning_adaptive.param_groups import Inherit as Inherit
    from lightning_adaptive.param_groups import LayerDecay as LayerDecay
    from lightning_adaptive.param_groups import MupLike as MupLike
    from lightning_adaptive.param_groups import ParamGroups as ParamGroups
    from lightning_adaptive.plan import Plan as Plan
    from lightning_adaptive.plan import preview as preview
    from lightning_adaptive.rules import Rule as Rule
    from lightning_adaptive.schedules import Constant as Constant
    from lightning_adaptive.schedules import Continue as Continue
    from lightning_adaptive.schedules import Curve as Curve
    from lightning_adaptive.schedules import PerOption as PerOption
    from lightning_adaptive.schedules import Piecewise as Piecewise
    from lightning_adaptive.schedules import Plateau as Plateau
    from lightning_adaptive.schedules import Schedule as Schedule
    from lightning_adaptive.switch import OptimizerSwitchCallback as OptimizerSwitchCallback
    from lightning_adaptive.triggers import AllOf as AllOf
    from lightning_adaptive.triggers import AnyOf as AnyOf
    from lightning_adaptive.triggers import Manual as Manual
    from lightning_adaptive.triggers import OnNoise as OnNoise
    from lightning_adaptive.triggers import OnPlateau as OnPlateau
    from lightning_adaptive.triggers import OnThreshold as OnThreshold
    from lightning_adaptive.triggers import Swats as Swats
    from lightning_adaptive.triggers import Trigger as Trigger

__version__ = "0.1.0"

# Names are imported when they are first used, so that `--help` does not wait for torch.
_HOMES = {
    "AllOf": "triggers",
    "AnyOf": "triggers",
    "CheckpointError": "errors",
    "Clock": "durations",
    "CombinedOptimizer": "combined",
    "ConfigError": "errors",
    "Constant": "schedules",
    "Continue": "schedules",
    "Cosine": "curves",
    "CosineRestarts": "curves",
    "Curve": "schedules",
    "Cyclic": "curves",
    "Duration": "durations",
    "ExactResume": "exact_resume",
    "Exponential": "curves",
    "GradientNoiseMonitor": "noise",
    "GradientNoiseScale": "noise_scale",
    "Handover": "handover",
    "Inherit": "param_groups",
    "InverseSqrt": "curves",
    "LayerDecay": "param_groups",
    "Linear": "curves",
    "Manual": "triggers",
    "MultiStep": "curves",
    "MupLike": "param_groups",
    "OnNoise": "triggers",
    "OnPlateau": "triggers",
    "OnThreshold": "triggers",
    "OneCycle": "curves",
    "OptimizerSwitchCallback": "switch",
    "ParamGroups": "param_groups",
    "PerOption": "schedules",
    "Piecewise": "schedules",
    "Plan": "plan",
    "Plateau": "schedules",
    "Polynomial": "curves",
    "REX": "curves",
    "Rule": "rules",
    "Schedule": "schedules",
    "StepDecay": "curves",
    "Swats": "triggers",
    "Trigger": "triggers",
    "WarmupStableDecay": "curves",
    "attach": "hooks",
    "configure_optimizers": "hooks",
    "preview": "plan",
}

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
