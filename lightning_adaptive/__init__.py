"""Optimizer and schedule switching for PyTorch Lightning, composed with Hydra, resumed exactly."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_adaptive.durations import Clock as Clock
    from lightning_adaptive.durations import Duration as Duration
    from lightning_adaptive.errors import CheckpointError as CheckpointError
    from lightning_adaptive.errors import ConfigError as ConfigError
    from lightning_adaptive.exact_resume import ExactResume as ExactResume
    from lightning_adaptive.handover import Handover as Handover
    from lightning_adaptive.hooks import attach as attach
    from lightning_adaptive.hooks import configure_optimizers as configure_optimizers
    from lightning_adaptive.param_groups import Inherit as Inherit
    from lightning_adaptive.param_groups import ParamGroups as ParamGroups
    from lightning_adaptive.schedules import Constant as Constant
    from lightning_adaptive.schedules import Cosine as Cosine
    from lightning_adaptive.schedules import Schedule as Schedule
    from lightning_adaptive.schedules import StepDecay as StepDecay
    from lightning_adaptive.switch import OptimizerSwitchCallback as OptimizerSwitchCallback

__version__ = "0.1.0"

# Names are imported when they are first used, so that `--help` does not wait for torch.
_HOMES = {
    "CheckpointError": "errors",
    "Clock": "durations",
    "ConfigError": "errors",
    "Constant": "schedules",
    "Cosine": "schedules",
    "Duration": "durations",
    "ExactResume": "exact_resume",
    "Handover": "handover",
    "Inherit": "param_groups",
    "OptimizerSwitchCallback": "switch",
    "ParamGroups": "param_groups",
    "Schedule": "schedules",
    "StepDecay": "schedules",
    "attach": "hooks",
    "configure_optimizers": "hooks",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
