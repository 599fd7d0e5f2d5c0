"""What `ExactResume` costs: a step of a shuffled training, and a checkpoint."""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from paired import Ratio, compare
from step_time import BATCH, STEPS, WIDTH, ByHand, Timer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

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


def _fit(model: LightningModule, steps: int, *callbacks: Callback) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(steps * BATCH, WIDTH), torch.randint(0, 10, (steps * BATCH,)))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(data, batch_size=BATCH, shuffle=True))


def _of_steps(model: LightningModule, steps: int, exact: bool) -> float:
    timer = Timer()
    _fit(model, steps, timer, *([ExactResume()] if exact else []))
    return timer.seconds


def _of_checkpoints(exact: bool) -> float:
    with tempfile.TemporaryDirectory() as folder:
        save = Save(Path(folder))
        _fit(ByHand(), 100, save, *([ExactResume()] if exact else []))
        return save.seconds


def measure(pairs: int) -> list[Ratio]:
    """Ratios of the times of steps, of a wide net and of one of width 64, and of checkpoints of the latter; on one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
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
