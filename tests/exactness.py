"""Runs that save at every moment they can, and that are resumed from each of their checkpoints. Run on one process or on two."""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_adaptive import Cosine, ExactResume, OptimizerSwitchCallback
from lightning_adaptive.strategies import running_optimizer
from tests.cpu_strategies import STRATEGIES, ShardableNet, whole_weights
from tests.support import dataset, trainer

MOMENTS = ("batch", "validation", "epoch")


@dataclass(frozen=True)
class Case:
    """One kind of run.

    Args:
        strategy: name in `STRATEGIES`; empty for one process.
        workers: of the training loader.
        validated: whether it validates.
        switched: whether it switches in the middle of the second epoch.
        options: the trainer's; three epochs of 8 batches, and two batches a step, unless they say otherwise.
        module: what the module does besides.
        loader: the training loader's options.
        exact: whether `ExactResume` is there.
    """

    strategy: str = ""
    workers: int = 0
    validated: bool = False
    switched: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    module: tuple[str, ...] = ()
    loader: dict[str, Any] = field(default_factory=dict)
    exact: bool = True


class Augmented(torch.utils.data.Dataset):
    """Adds noise from each of the three global generators to its samples."""

    def __init__(self, size: int = 64) -> None:
        self.inner = dataset(size)

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        sample, label = self.inner[index]
        noise = 0.1 * torch.randn(16) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return sample + noise, label


class RandomNet(ShardableNet):
    """With dropout; and what a case asks for."""

    def __init__(self, does: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.does = does
        self.dropout = nn.Dropout(0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.net(self.dropout(batch[0])), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if "reads the number of steps" in self.does:
            assert self.trainer.estimated_stepping_batches > 0
        if "plateau" in self.does:
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val/loss"}}
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        if "draws at the start" in self.does:
            torch.rand(3), random.random(), np.random.rand()
        if "draws by rank" in self.does:
            torch.rand(self.global_rank), random.sample(range(9), self.global_rank), np.random.rand(self.global_rank)

    def on_train_epoch_start(self) -> None:
        if "draws in each epoch" in self.does:
            torch.rand(3), random.random(), np.random.rand()


class RandomValidatedNet(RandomNet):
    """With a validation that draws as well."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        noise = torch.rand(1).item() if "plateau" not in self.does else 0.0
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]) + 0 * noise, sync_dist=True)


class SaveAtEachMoment(Callback):
    """Saves at the end of each step, validation and epoch."""

    def __init__(self, folder: Path, every_batch: bool = False) -> None:
        self.folder = folder
        self.every_batch = every_batch
        self.step = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self.step or self.every_batch:
            self._save(trainer, "batch", f"-{batch_idx}" if self.every_batch else "")
        self.step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, "epoch")

    def _save(self, trainer: Trainer, moment: str, suffix: str = "") -> None:
        trainer.save_checkpoint(self.folder / f"{trainer.global_step:03d}-{moment}{suffix}.ckpt")


class Ending(Callback):
    """What a run ends with: weights, optimizer state, random states; and which batches were seen at which logged step."""

    def __init__(self) -> None:
        self.weights = ""
        self.optimizer = ""
        self.random = ""
        self.seen: list[str] = []
        self.logged: list[int] = []
        self.epochs: list[str] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append(_hash(batch[0]))
        self.logged.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(f"start {trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(f"end {trainer.current_epoch}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.random = _hash(torch.rand(1)) + f" {random.random()} {np.random.rand()}"
        self.weights = _hash(*(tensor for _, tensor in sorted(whole_weights(trainer).items())))
        moments = [value for state in running_optimizer(trainer).state.values() for value in state.values()]
        local = [value.to_local() if isinstance(value, DTensor) else value for value in moments if isinstance(value, torch.Tensor)]
        self.optimizer = " ".join(sorted(map(_hash, local)))

    def differs_from(self, resumed: Ending) -> list[str]:
        """In what a run that went on from one of this run's checkpoints differs."""
        lists = {name: getattr(self, name)[-len(getattr(resumed, name)) :] for name in ("seen", "logged", "epochs")}
        expected = {"weights": self.weights, "optimizer": self.optimizer, "random": self.random, **lists}
        return [name for name, value in expected.items() if getattr(resumed, name) != value]


def _hash(*tensors: torch.Tensor) -> str:
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return hashed.hexdigest()[:12]


def switch() -> OptimizerSwitchCallback:
    return OptimizerSwitchCallback(at="1.5ep", optimizer=partial(SGD, lr=0.1, momentum=0.9), scheduler=Cosine())


def run(
    case: Case, path: Path | None, seed: int, extra: Sequence[Callback] = (), switched: Callable[[], Callback] = switch
) -> Ending:
    """One run, resumed from a checkpoint or not."""
    warnings.simplefilter("ignore")
    seed_everything(seed, workers=True, verbose=False)
    ending = Ending()
    callbacks: list[Callback] = [*([switched()] if case.switched else []), *([ExactResume()] if case.exact else []), ending, *extra]
    distributed = {"strategy": STRATEGIES[case.strategy](), "devices": 2} if case.strategy else {}
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "num_sanity_val_steps": 1, **case.options}
    runner = trainer(callbacks=callbacks, **distributed, **options)
    model = (RandomValidatedNet if case.validated else RandomNet)(case.module)
    options = {"batch_size": 8, "shuffle": True, "num_workers": case.workers, **case.loader}
    loader = DataLoader(Augmented(128 if distributed else 64), **options)
    validation = DataLoader(Augmented(16), batch_size=8) if case.validated else None
    runner.fit(model, loader, validation, ckpt_path=path)
    return ending


def resume_everywhere(case: Case, folder: Path, every_batch: bool = False) -> tuple[int, dict[str, list[str]]]:
    """The number of runs that went on from a checkpoint, and what each of those that did not come back differs in."""
    saver = SaveAtEachMoment(folder, every_batch)
    reference = run(case, None, 1, [saver])
    paths = [path for path in sorted(folder.glob("*.ckpt")) if not path.name.startswith(f"{saver.step:03d}")]
    resumed = {path.stem: run(case, path, 100 + number) for number, path in enumerate(paths)}
    differing = {name: reference.differs_from(ending) for name, ending in resumed.items()}
    return len(resumed), {name: faults for name, faults in differing.items() if faults}
