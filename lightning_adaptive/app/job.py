"""One job under Hydra: what Lightning's processes, a sweep and the shell need to find before and after it."""

from __future__ import annotations

import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, read_write

from lightning_adaptive.app.interrupt import Interrupted, Signals
from lightning_adaptive.app.sweep import Sweep, one_line
from lightning_adaptive.errors import UserError

_OF_ONE_JOB = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")


def run_stamp() -> str:
    """A run's name: the id that a scheduler gave, which all its processes share, or else the time."""
    for variable in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        identity = os.environ.get(variable)
        if identity and identity != "none":
            return identity
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")


# At import, so that the workers of a launcher, which import the task function, have it too.
OmegaConf.register_new_resolver("run_stamp", run_stamp, use_cache=True, replace=True)


def overrides() -> list[str]:
    """What was typed for this job, with its interpolations as they stand."""
    typed: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(typed)


def run(command: str, task: Callable[[DictConfig, Signals], float | None], config: DictConfig) -> float | None:
    """Runs a task as one job, and turns what ends it into what the shell or the sweep expects.

    A user's mistake and a signal end a single run with their exit code. Within a sweep a mistake or an exception fails the job
    alone, while a signal ends the sweep.

    Args:
        command: the sub-command's name.
        task: what to run.
        config: the composed config.
    """
    sweep = Sweep.current
    if sweep is None:
        os.environ.pop("HYDRA_FULL_ERROR", None)
    with Signals() as signals, _as_lightning_expects(command):
        try:
            return task(config, signals)
        except Interrupted as stop:
            if stop.checkpoint is None or _is_first():
                _say(str(stop))
            _exit(stop.exit_code)
        except UserError as error:
            if sweep is None:
                _say(f"lightning-adaptive: {error}")
                sys.exit(error.exit_code)
            sweep.failed(str(error), error.exit_code)
        except Exception as error:
            if signum := signals.cause():
                # What followed from a signal that this process, or one that it started, could not save for.
                _say(f"{Interrupted(signum)} ({one_line(error)})")
                _exit(128 + signum)
            lost = signals.lost(within=1.0)  # what this process saw of it is a broken connection, which comes first
            if sweep is None:
                if lost:
                    _say(f"lightning-adaptive: {lost}, so the others ended too. The run goes on with resume=last.")
                raise
            traceback.print_exc()
            sweep.failed(lost or one_line(error))
    return None


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
    print(f"{rank}{message}", file=sys.stderr, flush=True)


@contextmanager
def _as_lightning_expects(command: str) -> Iterator[None]:
    """Lets Lightning start its other processes with this job's command line, and forgets them afterwards.

    Lightning repeats ``sys.argv`` and appends ``hydra.run.dir``. The sub-command is not in it, a sweep's is not this job's, that
    of a launcher's worker is the launcher's, and a console script's file may not be Python.
    """
    import __main__

    hydra: Any = HydraConfig.get()
    argv, spec, run_dir = sys.argv, __main__.__spec__, hydra.run.dir
    environment = {name: os.environ.get(name) for name in _OF_ONE_JOB}
    search_path = [override for override in hydra.overrides.hydra if override.startswith("hydra.searchpath=")]
    sys.argv = [sys.argv[0], command, *_flags(hydra), *search_path, *overrides()]
    __main__.__spec__ = importlib.util.find_spec("lightning_adaptive.__main__")
    with read_write(hydra):
        hydra.run.dir = hydra.runtime.output_dir
    try:
        yield
    finally:
        sys.argv, __main__.__spec__ = argv, spec
        with read_write(hydra):
            hydra.run.dir = run_dir
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


def _flags(hydra: Any) -> list[str]:
    """Hydra's flags for the places that this job's config was composed from."""
    folders = {
        source.provider: source.path if source.schema == "file" else f"{source.schema}://{source.path}"
        for source in hydra.runtime.config_sources
    }
    own = ["-cd", folders["command-line"]] if "command-line" in folders else []
    return ["-cp", folders["main"], "-cn", hydra.job.config_name, *own]


def tell_processes(told: Sequence[str]) -> None:
    """Puts overrides into the command line of the processes that Lightning will start, in place of earlier ones of their keys."""
    keys = {override.partition("=")[0] for override in told}
    sys.argv = [argument for argument in sys.argv if argument.partition("=")[0] not in keys] + list(told)
