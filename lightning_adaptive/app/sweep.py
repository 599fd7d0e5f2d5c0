"""Sweeps: where the folder of a job lies, which config it belongs to, and which jobs of a sweep failed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_adaptive.app.interrupt import Interrupted
from lightning_adaptive.errors import CheckpointError, ConfigError, UserError

_PLACES = ("hydra", "study", "output_dir", "resume")
"""Keys that say where a run lies and how it is started, and nothing of what it does."""

_MARK = ".config_hash"
_SHOWN = 18
"""Failed jobs that are listed at the end."""


def study_name(name: Any) -> str:
    """The name of a study, which becomes a folder's.

    >>> study_name("s1")
    's1'

    Raises:
        ConfigError: for a name that could lead elsewhere.
    """
    if name is None or not re.fullmatch(r"(?!\.)[A-Za-z0-9._=,-]{1,128}", str(name)):
        allowed = "Write up to 128 letters, digits and . _ = , - with no dot at the beginning."
        raise ConfigError(f"{name!r} cannot name a study. {allowed}", "study")
    return str(name)


def config_hash(config: DictConfig) -> str:
    """A hash of all that makes a run: the composed config, its interpolations unresolved, without the places."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    text = json.dumps({key: value for key, value in plain.items() if key not in _PLACES}, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def run_key(overrides: ListConfig, *, _root_: DictConfig) -> str:
    """The name of a job's folder: its overrides as far as 48 characters go, and 8 digits of its config's hash.

    A config that has a folder in the study keeps it, in whatever words it is asked for next: other overrides may compose the same.

    >>> config = OmegaConf.create({"seed": 1, "switch": {"at": "3ep"}, "study": "s1", "hydra": {"sweep": {"dir": "studies/s1"}}})
    >>> run_key(OmegaConf.create(["study=s1", "seed=1", "switch.at=3ep"]), _root_=config)
    'seed-1_switch.at-3ep_8ecedf60'

    Args:
        overrides: those of the job.
        _root_: its composed config, which OmegaConf hands over.
    """
    digits = config_hash(_root_)[:8]
    earlier = sorted(path.name for path in Path(_root_.hydra.sweep.dir).glob(f"*{digits}"))
    typed: Any = OmegaConf.to_container(overrides, resolve=False)  # what they refer to may not be there yet
    text = ",".join(override for override in typed if not override.startswith("study="))
    head = re.sub(r"[^\w.+-]+", "_", text.replace("=", "-")).strip("_")[:48]
    return earlier[0] if earlier else f"{head}_{digits}".lstrip("_")


# At import, so that the workers of a launcher, which import the task function, have them too.
OmegaConf.register_new_resolver("study_name", study_name, replace=True)
OmegaConf.register_new_resolver("run_key", run_key, replace=True)


def claim(folder: Path, config: DictConfig) -> None:
    """Marks a job's folder as its config's, so that none takes the result or the checkpoints of another for its own.

    Raises:
        CheckpointError: when it is another config's. That takes a ``hydra.sweep.subdir`` of the user's own.
    """
    mark, own = folder / _MARK, config_hash(config)
    marked = mark.read_text(encoding="utf-8") if mark.is_file() else ""
    if marked not in ("", own):
        raise CheckpointError("this folder holds a run of another config. Name another study, or leave hydra.sweep.subdir out.")
    if not marked:  # or it was killed before the text was there
        mark.write_text(own, encoding="utf-8")


def one_line(error: BaseException) -> str:
    """An exception as a line: its class, and how its text begins.

    >>> one_line(KeyError("x"))
    "KeyError: 'x'"
    """
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")


class Sweep(Callback):
    """Hydra's callback around a sweep, through which the jobs tell the process that started them how they ended.

    Launchers copy it to the processes of the jobs, on this machine or others; with those it shares the study's folder alone. A
    job that failed returns no metric instead of raising, since Hydra ends a sweep at the first exception.
    """

    current: ClassVar[Sweep | None] = None
    """The sweep that this process started, or runs a job of."""

    def __init__(self) -> None:
        self.study = ""
        self._folder = self._notes = self._job = Path()
        self._number = 0

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        try:
            folder = Path(config.hydra.runtime.cwd, config.hydra.sweep.dir)
        except OmegaConfBaseException:
            return  # what Hydra asks next fails likewise, and there it is not lost
        self.study, self._folder, self._notes = str(config.study), folder, folder / f".sweep-{uuid.uuid4().hex[:8]}"
        Sweep.current = self

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        if self.study:  # else it is a single run
            Sweep.current = self
            self._job, self._number = Path(config.hydra.runtime.output_dir), config.hydra.job.num
            self._note("", 0)

    def failed(self, cause: str, exit_code: int = 1) -> None:
        """Says now, and keeps for the end, that the job of this process failed.

        Args:
            cause: its first line is kept.
            exit_code: what a single run would have ended with.
        """
        print(f"FAILED in {self._job}: {cause}", file=sys.stderr, flush=True)
        self._note(cause.partition("\n")[0], exit_code)

    def error(self, end: Exception | None) -> UserError | None:
        """What is to be said of the jobs that failed; None when none did.

        Args:
            end: what ended the sweep before all its jobs were run; a sweeper may do so for a job that failed.
        """
        notes = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self._notes.glob("*.json"))]
        failed = [note for note in notes if note["cause"]]
        if not failed:
            return None
        lines = [f"  {os.path.relpath(note['folder'], self._folder)}: {note['cause']}" for note in failed[:_SHOWN]]
        if len(failed) > _SHOWN:
            lines.append(f"  and {len(failed) - _SHOWN} more")
        if end is not None:
            lines.append(f"The sweep ended early: {one_line(end)}")
        error = UserError("\n".join([f"{len(failed)} of {len(notes)} jobs failed in {self._folder}:", *lines]))
        codes = {note["exit_code"] for note in failed}
        error.exit_code = codes.pop() if len(codes) == 1 and end is None else 1
        return error

    def forget(self) -> None:
        """Removes what the jobs told."""
        shutil.rmtree(self._notes, ignore_errors=True)

    def _note(self, cause: str, exit_code: int) -> None:
        self._notes.mkdir(parents=True, exist_ok=True)
        note = {"folder": str(self._job), "cause": cause, "exit_code": exit_code}
        (self._notes / f"{self._number:06d}.json").write_text(json.dumps(note), encoding="utf-8")


@contextmanager
def overseen() -> Iterator[None]:
    """Around Hydra: tells at the end which jobs of a sweep failed, and handles a signal that reaches no job of this process.

    Raises:
        UserError: with a line for each job that failed; or what one of our resolvers refused.
    """
    before = {signum: signal.signal(signum, _interrupt) for signum in (signal.SIGINT, signal.SIGTERM)}
    Sweep.current = None
    try:
        yield
    except (Interrupted, SystemExit) as end:
        code = end.exit_code if isinstance(end, Interrupted) else end.code
        if Sweep.current is None and isinstance(end, Interrupted):
            print(end, file=sys.stderr)
        elif Sweep.current is not None and code in (130, 143):
            print(f"The sweep has ended; the same command with study={Sweep.current.study} goes on with it.", file=sys.stderr)
        sys.exit(code)
    except Exception as error:
        known = _refusal(error) or _failures(error)
        if known is None:
            raise
        raise known from error
    else:
        if failures := _failures(None):
            raise failures
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if Sweep.current is not None:
            Sweep.current.forget()
        Sweep.current = None


def _interrupt(signum: int, _: FrameType | None) -> NoReturn:
    raise Interrupted(signum)


def _refusal(error: BaseException | None) -> UserError | None:
    """What a resolver of ours raised, out of OmegaConf's and Hydra's wrappings."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _failures(error: Exception | None) -> UserError | None:
    return Sweep.current.error(error) if Sweep.current is not None else None
