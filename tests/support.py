"""A small model and the tools that the tests share."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parent.parent
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
}


class Net(LightningModule):
    """Linear-ReLU-Linear; its own optimizer is Adam."""

    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class ValidatedNet(Net):
    """The same with a validation loss."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)


def dataset(size: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(size, 16, generator=generator), torch.randint(0, 4, (size,), generator=generator))


def loader(size: int = 64, batch_size: int = 8, shuffle: bool = False) -> DataLoader:
    return DataLoader(dataset(size), batch_size=batch_size, shuffle=shuffle)


def trainer(**options: Any) -> Trainer:
    return Trainer(**{**QUIET, **options})


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def digest(module: nn.Module) -> str:
    """A hash of all weights, bit for bit."""
    return digest_of(module.state_dict())


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """A hash of tensors and their names, bit for bit."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(name.encode())
        hashed.update(tensor.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


@contextmanager
def counted_steps() -> Iterator[Counter[str]]:
    """Counts the real steps of each optimizer class."""
    counts: Counter[str] = Counter()

    def count(optimizer: Optimizer, *_: Any) -> None:
        counts[type(optimizer).__name__] += 1

    handle = register_optimizer_step_post_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def command(arguments: Sequence[str], folder: Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``lightning-adaptive`` as a user would, in a folder."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_adaptive", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
