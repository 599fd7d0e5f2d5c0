"""Importing the callback, over importing what it stands on; each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import time

from paired import Ratio, compare

OURS = "from lightning_adaptive import OptimizerSwitchCallback; import sys; assert 'hydra' not in sys.modules"
THEIRS = "import lightning.pytorch, torchmetrics"


def seconds(code: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def measure(pairs: int) -> list[Ratio]:
    """The ratio of the times of two whole processes."""
    name = "`from lightning_adaptive import OptimizerSwitchCallback` over `import lightning.pytorch, torchmetrics`"
    return [compare(name, lambda: seconds(OURS), lambda: seconds(THEIRS), pairs, goal=1.03)]
