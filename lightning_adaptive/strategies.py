"""What Lightning holds while it trains: its clock, and the optimizer and scheduler of its strategy.

One of the two files that know Lightning's inside (the private names are listed in ``tests/test_lightning_names.py``).
"""

from __future__ import annotations

import contextlib
import math
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import Any

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_adaptive.durations import Clock
from lightning_adaptive.errors import ConfigError

_ACCUMULATE = "trainer.accumulate_grad_batches"
SUPPORTED = ("SingleDeviceStrategy", "DDPStrategy")


def check_supported(trainer: Trainer) -> None:
    """Refuses a strategy on which a switch is not implemented.

    Raises:
        ConfigError: naming the strategy and the supported ones.
    """
    strategy = trainer.strategy
    # DeepSpeed's strategy is a subclass of DDP's, but owns the optimizer itself.
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        return
    raise ConfigError(
        f"a switch is not available on {type(strategy).__name__} yet. Available: {', '.join(SUPPORTED)} and their subclasses.",
        "trainer.strategy",
    )


def clock(trainer: Trainer, first_step: int = 0) -> Clock:
    """The trainer's clock: devices, accumulation, limits, ``max_steps`` and ``max_epochs`` counted.

    Loads the training data if Lightning has not done so, as ``trainer.estimated_stepping_batches`` does.

    Args:
        trainer: a trainer that is fitting.
        first_step: 0-based global step at which the phase begins.

    Raises:
        ConfigError: when accumulation changes between epochs, so that steps cannot be counted.
    """
    if trainer.accumulate_grad_batches < 1:
        raise ConfigError(f"{trainer.accumulate_grad_batches} batches make no step. Write at least 1.", _ACCUMULATE)
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    steps_per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None
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


def opens_accumulation_window(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a batch is the first of those that are accumulated into one step."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def parameter_names(module: LightningModule) -> dict[int, str]:
    """Names of the module's parameters by ``id``; a tied parameter has the first of its names."""
    return {id(parameter): _plain(name) for name, parameter in module.named_parameters()}


def parameters(module: LightningModule) -> dict[str, Tensor]:
    """The module's parameters by name, with the names that `parameter_names` gives."""
    return {_plain(name): parameter for name, parameter in module.named_parameters()}


def running_optimizer(trainer: Trainer) -> Optimizer:
    """The one optimizer of an automatic optimization.

    Raises:
        ConfigError: when there is none, or more than one, or optimization is manual.
    """
    optimizers = trainer.optimizers
    module = trainer.lightning_module
    if not module.automatic_optimization or len(optimizers) > 1:
        raise ConfigError(
            f"{type(module).__name__} has {len(optimizers)} optimizers and "
            f"{'automatic' if module.automatic_optimization else 'manual'} optimization. "
            "A switch is available for one optimizer under automatic optimization only, so far.",
            "optimizer_index",
        )
    if not optimizers or not isinstance(optimizers[0], Optimizer):
        raise ConfigError(f"{type(module).__name__}.configure_optimizers returned no optimizer.", "optimizer")
    return optimizers[0]


def stepping_optimizer(trainer: Trainer) -> Optimizer:
    """The optimizer that Lightning's loop calls ``step`` on, seen where the loop looks it up."""
    return trainer.strategy._lightning_optimizers[0].optimizer


class Installation:
    """Optimizer and scheduler of a trainer, exchanged together, with a way back until the old ones are let go.

    Args:
        trainer: a trainer that is fitting.
        optimizer: the next optimizer, complete.
        lr_scheduler: Lightning's dictionary around its scheduler.
    """

    def __init__(self, trainer: Trainer, optimizer: Optimizer, lr_scheduler: Mapping[str, Any]) -> None:
        self._strategy = trainer.strategy
        self._new = [optimizer], [LRSchedulerConfig(**lr_scheduler)]
        self._old = self._strategy.optimizers, self._strategy.lr_scheduler_configs

    def install(self) -> None:
        """Puts the new optimizer and scheduler in place."""
        optimizers, _ = self._new
        _optimizers_to_device(optimizers, self._strategy.root_device)
        for old in self._old[0]:
            # Parameters outside the new groups must not keep a gradient that nobody clears.
            old.zero_grad(set_to_none=True)
        self._put(self._new)

    def undo(self) -> None:
        """Puts the old optimizer and scheduler back, whatever `install` had done."""
        self._put(self._old)

    def _put(self, pair: tuple[list[Optimizer], list[LRSchedulerConfig]]) -> None:
        # Only the setter also changes the wrappers that the loop steps; the scheduler would keep the old optimizer alive.
        self._strategy.optimizers, self._strategy.lr_scheduler_configs = pair


def end_processes(trainer: Trainer) -> None:
    """Ends the processes that Lightning's launcher started from this one, if it did.

    They have a moment to end by themselves, with an exit code that says why; those that wait for this one would do so for long.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    deadline = time.monotonic() + 2
    for process in launcher.procs:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0, deadline - time.monotonic()))
    launcher.kill(signal.SIGKILL)


def take_processes() -> list[subprocess.Popen[bytes]]:
    """Takes the processes that Lightning started from its observer, which would kill this one when another rank has failed."""
    processes: list[subprocess.Popen[bytes]] = []
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            processes += thread._child_processes
            thread._child_processes = []
    return processes


def _plain(name: str) -> str:
    """A parameter's name without what ``torch.compile`` puts into it."""
    return name.replace("_orig_mod.", "")
