"""``resume=last|FOLDER``: goes on in a run's own folder, with its settings, from its newest whole checkpoint."""

from __future__ import annotations

import csv
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightning_adaptive import checkpoints
from lightning_adaptive.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

RUNS = "outputs"
"""Where runs lie, in the working folder; as in ``conf/train.yaml``."""

_OVERRIDES = Path(".hydra", "overrides.yaml")
_locks: dict[Path, IO[str]] = {}


def with_settings(arguments: Sequence[str]) -> list[str]:
    """The command line of a run that goes on: that of the run before, and over it what is said now.

    Args:
        arguments: what was typed; without ``resume=`` it is returned as it is, and so it is for the processes that Lightning
            starts, which get the whole command line.

    Raises:
        CheckpointError: when there is no such run, or it still runs.
        ConfigError: for a sweep.
    """
    asked = [argument for argument in arguments if argument.startswith("resume=")]
    if not asked or asked[-1] in ("resume=", "resume=null") or any(item.startswith("hydra.run.dir=") for item in arguments):
        return list(arguments)
    if "-m" in arguments or "--multirun" in arguments:
        raise ConfigError("a sweep has many folders, and one run goes on in its own. Leave -m out.", "resume")
    import yaml

    folder = _folder(asked[-1].partition("=")[2])
    lock(folder)
    place = arguments.index(asked[0])  # Hydra wants all overrides in one row
    ahead, behind = arguments[:place], [argument for argument in arguments[place:] if argument not in asked]
    said = {_key(argument) for argument in (*ahead, *behind)}
    before = yaml.safe_load((folder / _OVERRIDES).read_text(encoding="utf-8")) or []
    kept = [str(item) for item in before if _key(str(item)) not in {*said, "resume", "ckpt_path"}]
    return [*ahead, *kept, f"resume='{folder}'", f"hydra.run.dir='{folder}'", *behind]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _folder(value: str) -> Path:
    value = value.strip("'\"")
    overrides = max(Path(RUNS).glob(f"*/{_OVERRIDES}"), key=lambda path: path.stat().st_mtime, default=None)
    last = overrides and overrides.parent.parent
    if value == "last":
        if last is None:
            raise CheckpointError(f"resume=last: there is no run in {Path(RUNS).resolve()}.")
        return last.resolve()
    folder = Path(value)
    if not (folder / _OVERRIDES).is_file():
        fault = "it has no .hydra/overrides.yaml" if folder.is_dir() else "there is no such folder"
        newest = f" The newest run: resume={last}" if last else ""
        raise CheckpointError(f"resume={value}: {fault}, so no run goes on there.{newest}")
    return folder.resolve()


def lock(folder: Path) -> None:
    """Takes a run's folder until this process ends, however it ends.

    Raises:
        CheckpointError: when another process has it; with the process and since when.
    """
    import fcntl

    if os.environ.get("LOCAL_RANK", "0") != "0" or folder in _locks:
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        # A record lock, which a loader's worker does not inherit: it would hold it longer than a run that was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise CheckpointError(f"{folder} is in use by {owner}. Wait for its end, or end it.") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M:%S}")
    file.flush()
    _locks[folder] = file


def unlock(folder: Path) -> None:
    """Gives a run's folder back."""
    if folder in _locks:
        _locks.pop(folder).close()


def newest_checkpoint(folder: Path) -> tuple[Path, list[str]]:
    """The newest whole checkpoint of a run, and a line for each newer one that is broken.

    Raises:
        CheckpointError: when there is none.
    """
    found, lines = _newest(folder)
    if found is None:
        reason = " ".join(lines) or "No checkpoint was written there."
        raise CheckpointError(f"resume={folder}: {reason} Start the run anew, without resume.")
    return found, lines


def left_off(folder: Path) -> tuple[Path, list[str]] | None:
    """The same for a job of a sweep that was begun before; None for one that begins, or begins anew because none is whole."""
    found, lines = _newest(folder)
    if found is not None:
        return found, lines
    if lines:
        print("\n".join([*lines, f"{folder}: no checkpoint is whole, so the run starts anew."]), file=sys.stderr)
    return None


def _newest(folder: Path) -> tuple[Path | None, list[str]]:
    found, broken = checkpoints.newest(folder / "checkpoints")
    return found, [f"{path}: {wrong}." for path, wrong in broken.items()]


def keep_curves(loggers: Iterable[Logger], step: int) -> None:
    """Lets Lightning's CSV loggers go on in their files, which they would begin anew; later rows than the checkpoint's go.

    Args:
        loggers: the run's.
        step: global step of the checkpoint.
    """
    from lightning.pytorch.loggers import CSVLogger

    for logger in loggers:
        if not isinstance(logger, CSVLogger):
            continue
        path = Path(logger.log_dir) / "metrics.csv"
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            names, rows = list(reader.fieldnames or ()), [row for row in reader if int(row.get("step") or 0) < step]
        experiment: Any = logger.experiment  # which removes the file
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)
        experiment.metrics_keys = names
