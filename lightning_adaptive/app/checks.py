"""What can be said of a composed run before anything heavy is imported: a slip is answered at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_adaptive import trust
from lightning_adaptive.durations import Duration
from lightning_adaptive.errors import ConfigError, check_truth

_GROUPS = ("task", "optimizer", "scheduler", "param_groups", "switch", "trainer", "logger", "callbacks")
_VALUES = ("seed", "resume", "ckpt_path", "test", "output_dir")
_NOT_ZERO = {
    **dict.fromkeys(("max_epochs", "max_steps", "limit_train_batches", "accumulate_grad_batches"), "a training without a step"),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), "no interval between two validations"),
}
_PROCESSES_PER_CPU = 4
"""More than one for each may be wanted to try something out; far more only bring the machine to a stop."""


def check(config: DictConfig) -> None:
    """Refuses a run that cannot be meant.

    Raises:
        ConfigError: for a key that was taken out, a name that a config may not hold, a malformed moment, a training without
            steps, or far more processes than CPUs.
    """
    for key in (*_GROUPS, *_VALUES):
        if key not in config:
            instead = f"{key}=null, or the value that holds" if key in _VALUES else f"another of its files: {key}=NAME"
            raise ConfigError(f"every run has this key. Instead of taking it out, write {instead}.", f"~{key}")
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0], error.full_key or "") from None
    _check_values(plain)
    trust.check_all(plain)
    _check_moments(plain["switch"], "switch")
    _check_trainer(plain["trainer"] or {})


def _check_values(config: Mapping[str, Any]) -> None:
    seed = config["seed"]
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**32):
        raise ConfigError(f"{seed!r} is no seed. Write a whole number from 0 to {2**32 - 1}, or null.", "seed")
    check_truth(config["test"], "test")


def _check_moments(switch: Any, key: str) -> None:
    while isinstance(switch, Mapping) and switch.get("enabled", True) is not False:
        if switch.get("at") is not None:
            Duration.parse(switch["at"], f"{key}.at")
        switch, key = switch.get("then"), f"{key}.then"


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    for name, missing in _NOT_ZERO.items():
        value = trainer.get(name)
        if value == 0 and not isinstance(value, bool):
            raise ConfigError(f"{value} makes {missing}. Write at least 1.", f"trainer.{name}")
    devices = trainer.get("devices")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if trainer.get("accelerator") == "cpu" and type(devices) is int and devices > _PROCESSES_PER_CPU * cpus:
        raise ConfigError(f"{devices} processes would bring the {cpus} CPUs here to a stop. Write {cpus}.", "trainer.devices")
