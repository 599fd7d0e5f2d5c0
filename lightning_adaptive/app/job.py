"""One job under Hydra: what Lightning's processes, a sweep and the shell need to find before and after it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from lightning_adaptive.app.interrupt import Interrupted, Signals
from lightning_adaptive.errors import UserError

_DISTRIBUTED = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FLAGS = ("-cd", "--config-dir", "-cn", "--config-name", "-cp", "--config-path")


def run_stamp() -> str:
    """A run's name: the id that a scheduler gave, which all its processes share, or else the time."""
    for variable in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        identity = os.environ.get(variable)
        if identity and identity != "none":
            return identity
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")


def run_key(overrides: Sequence[str]) -> str:
    """A sweep folder's name for a job: its overrides, readable as far as 48 characters go, and 8 digits of their hash.

    >>> run_key(["seed=1", "switch.at=3ep"])
    'seed-1_switch.at-3ep_433df39d'
    """
    text = ",".join(str(override) for override in overrides)
    head = re.sub(r"[^\w.+-]+", "_", text.replace("=", "-")).strip("_")[:48]
    return f"{head}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# At import, so that the workers of a launcher, which import the task function, have them too.
OmegaConf.register_new_resolver("run_stamp", run_stamp, use_cache=True, replace=True)
OmegaConf.register_new_resolver("run_key", run_key, replace=True)


def run(command: str, task: Callable[[DictConfig, Signals], float | None], config: DictConfig) -> float | None:
    """Runs a task as one job, and turns what ends it into what the shell or the sweep expects.

    A user's mistake and a signal end a single run with their exit code; within a sweep a mistake fails the job alone, while a
    signal ends the sweep.

    Args:
        command: the sub-command's name.
        task: what to run.
        config: the composed config.
    """
    os.environ.pop("HYDRA_FULL_ERROR", None)
    with Signals() as signals, _as_lightning_expects(command):
        try:
            return task(config, signals)
        except Interrupted as stop:
            if stop.checkpoint is None or _is_first():
                _say(str(stop))
            _exit(stop.exit_code)
        except UserError as error:
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then lets it pass to the command line, which shows its text
                raise
            _say(f"lightning-adaptive: {error}")
            sys.exit(error.exit_code)
        except Exception as error:
            signum = signals.cause()
            if not signum:
                _say_lost(signals)
                raise
            # What followed from a signal that this process, or one that it started, could not save for.
            _say(f"{Interrupted(signum)} ({type(error).__name__}: {str(error).partition(chr(10))[0]})")
            _exit(128 + signum)


def _say_lost(signals: Signals) -> None:
    """Names the process that has failed; what this one saw of it is a broken connection."""
    deadline = time.monotonic() + 1
    while not (lost := signals.lost()) and signals.has_processes and time.monotonic() < deadline:
        time.sleep(0.05)  # its end is seen over the connection first
    if lost:
        _say(f"lightning-adaptive: {lost}, so the others ended too. The run goes on with resume=last.")


def _is_first() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _exit(code: int) -> NoReturn:
    if not _is_first():
        # Python closes connections a second before it ends; the first process, which they tell, asks for this exit code then.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _say(message: str) -> None:
    rank = "" if _is_first() else f"[rank {os.environ['LOCAL_RANK']}] "
    print(f"{rank}{message}", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def _as_lightning_expects(command: str) -> Iterator[None]:
    """Lets Lightning start its other processes with this job's command line, and forgets them afterwards.

    Lightning repeats ``sys.argv`` and appends ``hydra.run.dir``. The sub-command is not in it, a sweep's is not this job's, and
    a console script's file may not be Python.
    """
    import __main__

    hydra: Any = HydraConfig.get()
    kept = {"argv": sys.argv, "spec": __main__.__spec__, "run_dir": hydra.run.dir}
    environment = {name: os.environ.get(name) for name in _DISTRIBUTED}
    search_path = [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]
    sys.argv = [sys.argv[0], command, *_flags(sys.argv[1:]), *search_path, *hydra.overrides.task]
    __main__.__spec__ = importlib.util.find_spec("lightning_adaptive.__main__")
    with read_write(hydra):
        hydra.run.dir = hydra.runtime.output_dir
    try:
        yield
    finally:
        sys.argv, __main__.__spec__ = kept["argv"], kept["spec"]
        with read_write(hydra):
            hydra.run.dir = kept["run_dir"]
        if environment["LOCAL_RANK"] is None:  # else Lightning or torchrun started this process, for one job
            _forget_processes(environment)


def _forget_processes(environment: dict[str, str | None]) -> None:
    """Without this the next job of a sweep believes that it was launched from outside."""
    if "torch" in sys.modules:
        import torch.distributed

        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _flags(arguments: Sequence[str]) -> list[str]:
    """Hydra's flags that decide what is composed, with folders made absolute."""
    flags: list[str] = []
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in _FLAGS:
            value = value if equals else arguments[index + 1]
            flags += [name, str(Path(value).resolve()) if name in ("-cd", "--config-dir") else value]
    return flags
