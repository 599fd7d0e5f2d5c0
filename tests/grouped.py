"""Runs whose groups are watched: what each step trained with, and what a resumed run trained with again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_adaptive.plan import Plan, plan
from tests.cpu_strategies import STRATEGIES, whole_weights
from tests.support import ValidatedNet, loader, trainer


class Seen(Callback):
    """Names, base and current learning rates, decays and members of the groups at each step, the plan, and the last weights."""

    def __init__(self) -> None:
        self.groups: list[dict[str, tuple[float, float | None, tuple[str, ...]]]] = []
        self.plan: Plan | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.plan = plan(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        names = {id(tensor): name for name, tensor in pl_module.named_parameters()}
        self.groups.append(
            {
                group.get("name", ""): (
                    group["lr"],
                    group.get("weight_decay"),
                    tuple(names.get(id(tensor), "?") for tensor in group["params"]),
                )
                for group in trainer.optimizers[0].param_groups
            }
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = whole_weights(trainer)

    def lrs(self, step: int) -> dict[str, float]:
        return {name: lr for name, (lr, _, _) in self.groups[step].items()}

    def members(self, step: int = -1) -> dict[str, tuple[str, ...]]:
        return {name: members for name, (_, _, members) in self.groups[step].items()}

    def goes_on_in(self, other: Seen) -> bool:
        """Whether a run that was resumed from this one trained with the same values, to the same weights bit for bit."""
        values = [
            [{name: (lr, decay) for name, (lr, decay, _) in groups.items()} for groups in seen]
            for seen in (self.groups[-len(other.groups) :], other.groups)
        ]
        same_weights = all(torch.equal(tensor, other.weights[name]) for name, tensor in self.weights.items())
        return same_weights and values[0] == values[1]


def fit(module: LightningModule, *callbacks: Callback, **options: Any) -> tuple[Trainer, Seen]:
    """Two epochs of eight steps."""
    seen = Seen()
    runner = trainer(**{"max_epochs": 2, "callbacks": [*callbacks, seen], **options})
    runner.fit(module, loader(), loader() if isinstance(module, ValidatedNet) else None)
    return runner, seen


def fit_saved(
    folder: Path, module: LightningModule, switch: Callback, epochs: int, strategy: str | None = None, resumed_from: int = 0
) -> Seen:
    """Saves each epoch, or resumes after so many."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    saver = ModelCheckpoint(folder, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    saving = [] if resumed_from else [saver]
    options = {"strategy": STRATEGIES[strategy](), "devices": 2} if strategy else {}
    seen = Seen()
    runner = trainer(max_epochs=epochs, callbacks=[switch, seen, *saving], enable_checkpointing=bool(saving), **options)
    path = folder / f"epoch{resumed_from - 1}.ckpt" if resumed_from else None
    runner.fit(module, loader(), ckpt_path=path, weights_only=None if strategy else True)
    if resumed_from:
        assert len(seen.groups) == (len(loader()) // runner.world_size) * (epochs - resumed_from)
    return seen
