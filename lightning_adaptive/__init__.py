"""Optimizer and schedule switching for PyTorch Lightning, composed with Hydra, resumed exactly."""

from __future__ import annotations

import importlib
import sys
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
    _teach_jsonargparse()
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def _teach_jsonargparse() -> None:
    """Lets LightningCLI read a duration with `Duration.parse`, whose message is then an error of usage and no traceback.

    jsonargparse looks a class up by its public name before it reads it, so this is in time in any order of imports.
    """
    typing = sys.modules.get("jsonargparse.typing")
    if typing is not None:
        from lightning_adaptive.durations import Duration

        # With a key of its own it is not looked up by its public name first, which would end here again.
        typing.register_type(Duration, deserializer=Duration.parse, uniqueness_key=(__name__, "Duration"))


def __dir__() -> list[str]:
    return [*globals(), *__all__]
