"""What `GradientNoiseMonitor` costs: a step of two micro-batches with it, over the same without."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from paired import Ratio, compare
from step_time import fit, quiet_on_one_thread
from torch import nn

from lightning_adaptive import GradientNoiseMonitor

# Few steps, so that both ways of a pair see the same machine.
STEPS, LAYERS, WIDTH, TOKENS, BATCH = 4, 6, 384, 64, 4


class Transformer(LightningModule):
    """An encoder of 10.6 million parameters, which sees 256 tokens in a micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 6, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.head(self.body(batch[0]).mean(1)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-4, fused=True)


def seconds(monitored: bool) -> float:
    monitors = [GradientNoiseMonitor()] if monitored else []
    return fit(Transformer(), 2 * STEPS, (BATCH, TOKENS, WIDTH), *monitors, accumulate_grad_batches=2)


def measure(pairs: int) -> list[Ratio]:
    """The ratio of the times of 4 steps of an encoder of 10.6 million parameters, every step measured; on one thread."""
    quiet_on_one_thread()
    name = f"{STEPS} steps of two micro-batches, 10.6 million parameters: noise measured in each, over not measured"
    return [compare(name, lambda: seconds(True), lambda: seconds(False), pairs, goal=1.05)]
