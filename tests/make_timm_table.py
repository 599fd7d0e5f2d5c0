"""Writes ``timm_cosine.json``, the learning rates of timm's cosine schedule that `test_schedules` compares ours with.

timm needs a torchvision that fits torch, so it has no place among the development packages, and only its schedulers are loaded
here. In an environment of its own::

    python -m venv timm && timm/bin/pip install torch numpy && timm/bin/pip install --no-deps timm
    timm/bin/python tests/make_timm_table.py
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

STEPS = 120
CASES: dict[str, dict[str, Any]] = {
    "cosine": {"t_initial": 120},
    "cosine with a floor": {"t_initial": 120, "lr_min": 0.05},
    "cosine with warm-up": {"t_initial": 108, "warmup_t": 12, "warmup_prefix": True},
    "restarts with warm-up, longer and lower": {
        **{"t_initial": 15, "cycle_mul": 2, "cycle_decay": 0.5, "cycle_limit": 9, "warmup_t": 12, "warmup_prefix": True},
    },
}


def schedulers() -> ModuleType:
    """timm's schedulers, without what the package itself imports."""
    found = find_spec("timm")
    assert found is not None
    package = ModuleType("timm")
    package.__path__ = list(found.submodule_search_locations or ())
    sys.modules["timm"] = package
    return importlib.import_module("timm.scheduler")


def lrs(scheduler_class: Any, options: dict[str, Any]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = scheduler_class(optimizer, t_in_epochs=False, **options)
    found = []
    for step in range(STEPS):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


if __name__ == "__main__":
    cosine = schedulers().CosineLRScheduler
    table = {"timm": version("timm"), **{name: lrs(cosine, options) for name, options in CASES.items()}}
    text = json.dumps(table).replace('], "', '],\n"').replace('", "', '",\n"')
    Path(__file__).with_name("timm_cosine.json").write_text(text + "\n", encoding="utf-8")
