"""Progress with the phase and its learning rate: a bar on a terminal, one plain line per epoch elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from lightning_adaptive.combined import class_name
from lightning_adaptive.phases import format_lrs, lrs
from lightning_adaptive.strategies import running_optimizer
from lightning_adaptive.switch import find_switch


def progress(monitor: str | None) -> ProgressBar:
    """The progress that fits where the output goes.

    Args:
        monitor: name of the validation metric to show.
    """
    return PhaseProgressBar() if sys.stdout.isatty() else EpochLines(monitor)


def phase_words(trainer: Trainer) -> tuple[str, str]:
    """The running phase, ``2/3 SGD``, and its learning rate.

    Args:
        trainer: a trainer that is fitting.
    """
    optimizer, switch = running_optimizer(trainer), find_switch(trainer)
    number, count = (switch.phase + 1, len(switch.chain) + 1) if switch else (1, 1)
    return f"{number}/{count} {class_name(optimizer)}", format_lrs(lrs(optimizer))


class PhaseProgressBar(RichProgressBar):
    """Lightning's rich bar, with phase and learning rate in front of the metrics."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Lightning's metrics for the bar, and ours."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if not (trainer.training or trainer.validating) or not trainer.optimizers:
            return metrics
        phase, lr = phase_words(trainer)
        return {"phase": phase, "lr": lr, **metrics}


class EpochLines(ProgressBar):
    """One line per epoch, for a file or a pipe.

    Args:
        monitor: name of the validation metric to show.
    """

    def __init__(self, monitor: str | None) -> None:
        super().__init__()
        self._monitor = monitor
        self._enabled = True

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Undoes `disable`."""
        self._enabled = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        phase, lr = phase_words(trainer)
        shown = [name for name in trainer.callback_metrics if "loss" in name or name == self._monitor]
        metrics = "  ".join(f"{name} {float(trainer.callback_metrics[name]):.4f}" for name in shown)
        epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else "?"
        line = f"epoch {trainer.current_epoch + 1}/{epochs}  step {trainer.global_step}  phase {phase}  lr {lr}  {metrics}"
        print(line, flush=True)
