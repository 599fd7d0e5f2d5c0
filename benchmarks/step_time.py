"""Training with our `configure_optimizers` and an armed switch, over the same written by hand in Lightning."""

from __future__ import annotations

import functools
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from paired import Ratio, compare
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_adaptive import Cosine, OptimizerSwitchCallback, configure_optimizers

STEPS, WARMUP, WIDTH, BATCH = 600, 60, 64, 64


class Model(LightningModule):
    """A small net, so that what surrounds the arithmetic shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def warmup_cosine(warmup: int, total: int) -> Callable[[int], float]:
    """The factor by which hand-written code multiplies a learning rate."""

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2

    return factor


class ByHand(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)
        factor = warmup_cosine(WARMUP, int(self.trainer.estimated_stepping_batches))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Ours(Model):
    def configure_optimizers(self) -> Any:
        adam = functools.partial(torch.optim.Adam, lr=1e-3, fused=True)
        return configure_optimizers(self, optimizer=adam, scheduler=Cosine(warmup=f"{WARMUP}st"))


class Timer(Callback):
    """Seconds from the first batch to the last."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = time.perf_counter() - self.begin


def quiet_on_one_thread() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def fit(model: LightningModule, batches: int, shape: Sequence[int], *callbacks: Callback, **options: Any) -> float:
    """Trains an epoch of random batches, with nothing that Lightning adds by itself.

    Args:
        model: a model of ten classes.
        batches: how many.
        shape: of each, the samples first.
        callbacks: what is measured, and what looks.
        options: ``shuffle``, and the trainer's.

    Returns:
        Seconds from the first batch to the last.
    """
    torch.manual_seed(0)
    size, *rest = shape
    data = TensorDataset(torch.randn(batches * size, *rest), torch.randint(0, 10, (batches * size,)))
    loader, timer = DataLoader(data, batch_size=size, shuffle=options.pop("shuffle", False)), Timer()
    bare = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[timer, *callbacks], **bare, **options).fit(model, loader)
    return timer.seconds


def seconds(model: Model, switched: bool) -> float:
    # Armed to the last: the switch would come at the last step.
    switch = OptimizerSwitchCallback(at=f"{STEPS - 1}st", optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    return fit(model, STEPS, (BATCH, WIDTH), *([switch] if switched else []))


def measure(pairs: int) -> list[Ratio]:
    """The ratio of the times of 600 steps of a three-layer net of width 64, on one thread."""
    quiet_on_one_thread()
    name = "600 steps: our configure_optimizers and an armed switch, over hand-written Lightning"
    return [compare(name, lambda: seconds(Ours(), True), lambda: seconds(ByHand(), False), pairs, goal=1.03)]
