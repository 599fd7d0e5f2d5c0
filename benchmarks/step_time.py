"""Training with our `configure_optimizers` and an armed switch, over the same written by hand in Lightning."""

from __future__ import annotations

import functools
import logging
import math
import time
import warnings
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


class ByHand(Model):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3, fused=True)
        total = int(self.trainer.estimated_stepping_batches) - WARMUP

        def factor(step: int) -> float:
            return (step + 1) / WARMUP if step < WARMUP else (1 + math.cos(math.pi * (step - WARMUP) / total)) / 2

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


def seconds(model_class: type[Model], switched: bool) -> float:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(STEPS * BATCH, WIDTH), torch.randint(0, 10, (STEPS * BATCH,)))
    timer = Timer()
    # Armed to the last: the switch would come at the last step.
    switch = OptimizerSwitchCallback(at=f"{STEPS - 1}st", optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[timer, *([switch] if switched else [])],
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model_class(), DataLoader(data, batch_size=BATCH))
    return timer.seconds


def measure(pairs: int) -> list[Ratio]:
    """The ratio of the times of 600 steps of a three-layer net of width 64, on one thread."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    name = "600 steps: our configure_optimizers and an armed switch, over hand-written Lightning"
    return [compare(name, lambda: seconds(Ours, True), lambda: seconds(ByHand, False), pairs, goal=1.03)]
