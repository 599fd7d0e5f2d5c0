"""From a composed run to its objects: the model with its optimizer, the data, and the trainer with its callbacks."""

from __future__ import annotations

import importlib.util
import logging
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig

from lightning_adaptive.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer


class Objects(NamedTuple):
    """What a run is made of."""

    trainer: Trainer
    model: LightningModule
    data: LightningDataModule


def assemble(config: DictConfig, folder: Path, callbacks: Sequence[Callback] = (), **options: Any) -> Objects:
    """Builds the objects of a run, with the random states of its seed.

    Args:
        config: the composed config.
        folder: the run folder.
        callbacks: further ones, after the switch and those of the config.
        options: of the Trainer, in place of the config's.

    Raises:
        ConfigError: for a node that cannot be used; the message names its key.
    """
    _require("rich", "matplotlib")
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Checkpoint

    from lightning_adaptive import config as build
    from lightning_adaptive.hooks import attach

    _silence_noise(folder)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    model = attach(
        build.module(config.task.module, "task.module"),
        optimizer=config.optimizer,
        scheduler=config.scheduler,
        param_groups=config.param_groups,
    )
    data = build.datamodule(config.task.data, "task.data")
    switch = build.switch(config.switch)
    whole = [*([switch] if switch else []), *build.callbacks(config.callbacks), *callbacks]
    if not any(isinstance(callback, Checkpoint) for callback in whole):
        options["enable_checkpointing"] = False  # or Lightning adds a callback for checkpoints of its own
    options = {"logger": build.loggers(config.logger) or False, **options}
    return Objects(build.trainer(config.trainer, callbacks=whole, **options), model, data)


def _silence_noise(folder: Path) -> None:
    """Lines of Lightning's that say nothing about this run."""
    # The run folder exists before its logger does: Hydra made it.
    warnings.filterwarnings("ignore", r"Experiment logs directory .* exists and is not empty")
    # And a run that goes on has checkpoints there.
    warnings.filterwarnings("ignore", rf"Checkpoint directory {re.escape(str(folder))}/.* exists and is not empty")
    # Lightning 2.6 asks torch in a way that torch 2.13 no longer likes.
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).* is deprecated")
    # Parts of torch warn one another, at every checkpoint of FSDP.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "litlogger" not in record.getMessage())


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"the command line needs {', '.join(missing)}: pip install 'lightning-adaptive[recipes]'.")
