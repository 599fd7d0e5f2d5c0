"""Importing the callback, over importing what it stands on; each in a fresh process."""

from __future__ import annotations

import sys

from paired import Ratio, compare, seconds

OURS = "from lightning_adaptive import OptimizerSwitchCallback; import sys; assert 'hydra' not in sys.modules"
THEIRS = "import lightning.pytorch, torchmetrics"


def measure(pairs: int) -> list[Ratio]:
    """The ratio of the times of two whole processes."""
    name = "`from lightning_adaptive import OptimizerSwitchCallback` over `import lightning.pytorch, torchmetrics`"
    ours, theirs = ([sys.executable, "-c", code] for code in (OURS, THEIRS))
    return [compare(name, lambda: seconds(ours), lambda: seconds(theirs), pairs, goal=1.03)]
