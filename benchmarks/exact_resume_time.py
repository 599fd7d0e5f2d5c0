"""What `ExactResume` costs: a step of a shuffled training, and a checkpoint."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from paired import Ratio, compare
from step_time import BATCH, STEPS, WIDTH, ByHand, fit, quiet_on_one_thread
from torch import nn

from lightning_adaptive import ExactResume

SAVES = 100


class Save(Callback):
    """Saves many times after training, and keeps the seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begin = time.perf_counter()
        for _ in range(SAVES):
            trainer.save_checkpoint(self.folder / "saved.ckpt")
        self.seconds = time.perf_counter() - begin


class Wide(ByHand):
    """A step of about 10 ms."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 2048), nn.ReLU(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 10))


def _of_steps(model: LightningModule, steps: int, exact: bool, *callbacks: Callback) -> float:
    return fit(model, steps, (BATCH, WIDTH), *callbacks, *([ExactResume()] if exact else []), shuffle=True)


def _of_checkpoints(exact: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        save = Save(Path(folder))
        _of_steps(ByHand(), 100, exact, save)
        return save.seconds


def measure(pairs: int) -> list[Ratio]:
    """Ratios of the times of steps, of a wide net and of one of width 64, and of checkpoints of the latter; on one thread."""
    quiet_on_one_thread()
    return [
        compare(
            "100 steps of about 10 ms: with ExactResume, over without",
            lambda: _of_steps(Wide(), 100, True),
            lambda: _of_steps(Wide(), 100, False),
            pairs,
            goal=1.01,
        ),
        compare(
            f"{STEPS} steps of about 0.5 ms: with ExactResume, over without",
            lambda: _of_steps(ByHand(), STEPS, True),
            lambda: _of_steps(ByHand(), STEPS, False),
            pairs,
            goal=1.01,
        ),
        compare(
            f"{SAVES} checkpoints of 0.1 MB: with ExactResume, over without",
            lambda: _of_checkpoints(True),
            lambda: _of_checkpoints(False),
            pairs,
        ),
    ]
