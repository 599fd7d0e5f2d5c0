"""Ctrl-C and SIGTERM: the first one ends training at a step that all processes agree on, with a checkpoint; the second at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal ended the run.

    Args:
        signum: the signal.
        checkpoint: where the run can be resumed from, if something was saved.
    """

    def __init__(self, signum: int, checkpoint: Path | None = None) -> None:
        super().__init__(signum, checkpoint)
        self.signum = signum
        self.checkpoint = checkpoint

    @property
    def exit_code(self) -> int:
        """The shell's code for the signal: 130 or 143."""
        return 128 + self.signum

    def __str__(self) -> str:
        name = signal.Signals(self.signum).name
        if self.checkpoint is None:
            return f"ended by {name}; nothing was saved"
        return f"ended by {name}; resume with ckpt_path={self.checkpoint}"


class Signals:
    """Handles SIGINT and SIGTERM while a job runs.

    Outside of training the first signal raises `Interrupted`. While training is armed it is only kept in `received`, for the
    step boundary at which the processes agree. The second ends this process and those that it started, at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self.armed = False
        self.end_processes: Callable[[], None] = _nothing
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        """Puts our handlers in place, over Lightning's, which would speak to other processes from within the handler."""
        for signum in _SIGNALS:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked worker of a loader: its parent ends it
        if self.received:
            self.end_processes()
            os._exit(128 + signum)
        self.received = signum
        if not self.armed:
            raise Interrupted(signum)


def _nothing() -> None:
    """Before a trainer exists there are no other processes."""
