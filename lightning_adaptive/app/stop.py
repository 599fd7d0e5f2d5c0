"""`StopTogether`: all processes end at the same step when one of them was signalled, and save one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_adaptive import strategies
from lightning_adaptive.app.interrupt import Interrupted, Signals

CHECKPOINT_NAME = "interrupted.ckpt"


class StopTogether(Callback):
    """Arms `Signals` while training lasts, and acts on them at step boundaries.

    With several processes the flag of each is reduced at every step, over the CPU and while the next step already runs, and
    read one step later: no step waits for it.

    Args:
        signals: what was received.
        folder: where the checkpoint is written.
    """

    def __init__(self, signals: Signals, folder: Path) -> None:
        self._signals = signals
        self._checkpoint = folder / CHECKPOINT_NAME
        self._group: dist.ProcessGroup | None = None
        self._pending: tuple[Tensor, dist.Work] | None = None
        self._step = 0
        signals.take_processes = strategies.take_processes

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.install()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
        self._step = trainer.global_step
        self._signals.install()
        self._signals.armed = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            signum = self._agreed()
            if self._group is not None:
                self._ask()
            if signum:
                self._stop(trainer, signum)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._group is not None and not self._agreed():
            self._ask()
        signum = self._agreed()
        self._signals.armed = False
        if signum:
            self._stop(trainer, signum)
        if self._signals.received:
            raise Interrupted(self._signals.received)  # it came after the processes had last asked

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._signals.armed = False

    def _ask(self) -> None:
        flag = torch.tensor([self._signals.received])
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = flag, work

    def _agreed(self) -> int:
        """The signal that any process had received when they last asked, or 0."""
        if self._group is None:
            return self._signals.received
        if self._pending is None:
            return 0
        flag, work = self._pending
        work.wait()
        return int(flag.item())

    def _stop(self, trainer: Trainer, signum: int) -> None:
        self._signals.agreed = True
        trainer.save_checkpoint(self._checkpoint, weights_only=False)
        raise Interrupted(signum, self._checkpoint)
