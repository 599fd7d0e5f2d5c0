"""A callback for runs in other processes: each rank writes down what it ended with."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_adaptive.strategies import running_optimizer
from tests.support import digest, digest_of


class Witness(Callback):
    """Writes ``rank0.json``, ``rank1.json``, ...: weights, steps of each optimizer class, and which one ran last.

    Args:
        folder: where to; the working folder unless given.
    """

    def __init__(self, folder: str = ".") -> None:
        self.folder = Path(folder)
        self.counts: Counter[str] = Counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handle = register_optimizer_step_post_hook(self._count)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.handle.remove()
        seen = {
            "weights": self.weights(trainer),
            "steps": dict(self.counts),
            "optimizer": type(running_optimizer(trainer)).__name__,
            "process": os.getpid(),
        }
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen), encoding="utf-8")

    def weights(self, trainer: Trainer) -> str:
        """A hash of what the module holds."""
        return digest(trainer.lightning_module)

    def _count(self, optimizer: Any, *_: Any) -> None:
        self.counts[type(optimizer).__name__] += 1


class ShardedWitness(Witness):
    """The same where a process holds a part of the weights: it asks for the whole of each parameter."""

    def weights(self, trainer: Trainer) -> str:
        """A hash of the parameters alone: what batch norm has seen differs between processes that share no buffers."""
        from tests.cpu_strategies import whole_weights

        return digest_of(whole_weights(trainer))


def seen(folder: Path) -> list[dict[str, Any]]:
    """What each rank wrote, the first rank first."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("rank*.json"))]
