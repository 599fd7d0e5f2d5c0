"""What is asked of a trainer, by Lightning's public names alone: its clock, its loss scale, and what all ranks agree on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_adaptive.durations import Clock
from lightning_adaptive.errors import ConfigError

_ACCUMULATE = "trainer.accumulate_grad_batches"


C = TypeVar("C", bound=Callback)


def callbacks_of(trainer: Trainer, kind: type[C]) -> list[C]:
    """The trainer's callbacks of a class."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def clock(trainer: Trainer, first_step: int = 0) -> Clock:
    """The trainer's clock: devices, accumulation, limits, ``max_steps`` and ``max_epochs`` counted.

    Loads the training data if Lightning has not done so, as ``trainer.estimated_stepping_batches`` does.

    Args:
        trainer: a trainer that is fitting.
        first_step: 0-based global step at which the phase begins.

    Raises:
        ConfigError: when accumulation changes between epochs, so that steps cannot be counted.
    """
    accumulated = trainer.accumulate_grad_batches
    if accumulated < 1:
        raise ConfigError(f"{accumulated} batches make no step. Write at least 1.", _ACCUMULATE)
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    if accumulated > batches > 0:
        rank_zero_warn(
            f"{_ACCUMULATE}={accumulated} is more than the {batches} batches of an epoch, at whose end what is left makes a step: "
            "an epoch is one step."
        )
    rest = int(batches % accumulated) if math.isfinite(batches) else 0
    if rest and trainer.strategy.handles_gradient_accumulation:
        raise ConfigError(
            f"under DeepSpeed {accumulated} does not go with {batches} batches an epoch: it accumulates over the epoch's end, and "
            "Lightning counts other steps than are made. Write a divisor, or cut the rest off with "
            f"trainer.limit_train_batches={int(batches) - rest}.",
            _ACCUMULATE,
        )
    steps_per_epoch = math.ceil(batches / accumulated) if math.isfinite(batches) else None
    try:
        total = trainer.estimated_stepping_batches
    except MisconfigurationException as error:
        raise ConfigError(
            "accumulation that changes between epochs leaves the number of steps unknown. Set trainer.max_steps and "
            "trainer.max_epochs=-1, or write durations in steps (st).",
            _ACCUMULATE,
        ) from error
    known = math.isfinite(total) and total >= 0
    return Clock(steps_per_epoch=steps_per_epoch, total_steps=int(total) if known else None, first_step=first_step)


def agreed_metrics(trainer: Trainer, names: Sequence[str]) -> dict[str, float]:
    """What the module has logged; those of these names in the mean over all ranks, so that every rank sees the same."""
    logged = trainer.callback_metrics
    device = trainer.strategy.root_device
    own = {name: logged[name].detach().float().to(device) for name in names if name in logged}
    agreed = {name: trainer.strategy.reduce(value, reduce_op="mean") for name, value in own.items()}
    return {name: float(agreed.get(name, value)) for name, value in logged.items()}


def is_asked(trainer: Trainer, asked: bool, files: Sequence[str]) -> bool:
    """Whether a person asks for something on any rank: in this process, or by a file in the run's folder, which is taken away.

    Args:
        trainer: the trainer, whose ``default_root_dir`` is the run's folder.
        asked: whether it was asked for in this process.
        files: names of the files.
    """
    for file in files if trainer.is_global_zero else ():
        path = Path(trainer.default_root_dir, file)
        if path.exists():
            path.unlink()
            asked = True
    return trainer.strategy.reduce_boolean_decision(asked, all=False)


def is_same_everywhere(trainer: Trainer, numbers: Sequence[int | None]) -> bool:
    """Whether every rank has the same numbers, as many of them; the same answer on every rank."""
    if trainer.world_size == 1:
        return True
    device = trainer.strategy.root_device
    own = torch.tensor([-1 if number is None else number for number in numbers], dtype=torch.float64, device=device)
    mean = trainer.strategy.reduce(own.clone(), reduce_op="mean")
    return trainer.strategy.reduce_boolean_decision(bool((own == mean).all()), all=True)


def loss_scale(trainer: Trainer) -> float | None:
    """The factor by which 16-bit mixed precision scales the loss now; ``None`` where it does not. Waits for the device."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def gradient_scale(trainer: Trainer) -> Tensor:
    """The factor that gradients have between a backward and the step: loss scale over accumulated batches, float64.

    Does not wait for the device, as `loss_scale` does.
    """
    one = torch.ones((), device=trainer.strategy.root_device)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scaled = one if scaler is None else scaler.scale(one)
    return scaled.double() / trainer.accumulate_grad_batches


def log_metrics(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Gives values to every logger; one that fails is told of, and does not end the training.

    Args:
        trainer: the trainer.
        values: the values, by name.
        step: 0-based step that they belong to.
    """
    for logger in trainer.loggers:
        try:
            logger.log_metrics(dict(values), step=step)
        except Exception as error:  # noqa: BLE001 - a logger may raise anything; a training of a week goes on
            rank_zero_warn(f"{type(logger).__name__} could not log {', '.join(values)}: {error!r}. Training goes on.")
