"""Ctrl-C and SIGTERM: the first one ends training at a step that all processes agree on, with a checkpoint; the second at once."""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 5.0  # seconds that the main thread has to end by itself, once nothing can be saved any more
_PERIOD = 0.2  # seconds between two looks at the processes


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
    """Handles SIGINT and SIGTERM while a job runs, and watches the processes that it started.

    Outside of training the first signal raises `Interrupted`. While training is armed it is only kept in `received`, for the
    step boundary at which the processes agree. The second ends this process and those that it started, at once.

    A thread counts the signals, because Python's own handlers wait for as long as the main thread is in a collective. It also
    ends this process when one that it started has failed, or the first signal did not: soon, if the main thread does not.
    """

    def __init__(self) -> None:
        self.received = 0
        self.armed = False
        self.agreed = False  # to end together: the other processes end with a code of their own, which is no failure
        self.take_processes: Callable[[], Sequence[Popen[bytes]]] = tuple
        self._processes: list[Popen[bytes]] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno())
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        _active.append(self)
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._reader.close()

    def install(self) -> None:
        """Puts our handlers in place, over Lightning's, which would speak to other processes from within the handler."""
        for signum in _SIGNALS:
            signal.signal(signum, self._handle)

    def cause(self) -> int:
        """The signal that ended this process or one that it started, or 0."""
        codes = [process.poll() for process in self._all_processes()]
        return self.received or next((signum for signum in _SIGNALS if 128 + signum in codes), 0)

    def lost(self, within: float = 0.0) -> str:
        """Which of the processes that this one started has ended badly, and how; empty if none has within so many seconds."""
        deadline = time.monotonic() + within
        while True:
            for rank, process in enumerate(self._all_processes(), start=1):
                if code := process.poll():
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                    return f"rank {rank} (process {process.pid}) {how}"
            if not self._processes or time.monotonic() >= deadline:
                return ""
            time.sleep(0.05)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            return  # the thread counts
        self.received = signum
        if not self.armed and not self.agreed:
            raise Interrupted(signum)

    def _watch(self) -> None:
        count, code, end_at = 0, 0, math.inf
        while (arrived := self._arrived()) is not None:
            failed = self._failed()
            count += len(arrived)
            code = 128 + arrived[-1] if arrived else code or failed
            is_lost = not self.agreed and (failed or (count and not self.armed))
            end_at = min(end_at, time.monotonic() + _PATIENCE) if is_lost else math.inf
            if count > 1 or time.monotonic() > end_at:
                self._end(code)

    def _arrived(self) -> list[int] | None:
        """The signals of the last moment; None when there will be no more."""
        if not select.select([self._reader], [], [], _PERIOD)[0]:
            return []
        data = self._reader.recv(64)
        return [signum for signum in data if signum in _SIGNALS] if data else None

    def _failed(self) -> int:
        """The exit code of a process that ended badly, as the shell counts, or 0."""
        code = next((process.returncode for process in self._all_processes() if process.poll()), 0)
        return code if code >= 0 else 128 - code

    def _end(self, code: int) -> None:
        for process in self._all_processes():
            process.kill()
        signum = code - 128
        reason = str(Interrupted(signum)) if signum in _SIGNALS else f"ended, because {self.lost()}"
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 0)[1]:  # the main thread may hold sys.stderr, and nobody may read
                os.write(2, f"{reason}\n".encode())
        os._exit(code)

    def _all_processes(self) -> list[Popen[bytes]]:
        self._processes += self.take_processes()
        return self._processes


_active: list[Signals] = []


def _hold_signals() -> None:
    if _active:  # one that comes while a process is forked must not reach the new one, which writes into the same socket
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _release_signals() -> None:
    if _active:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _leave_to_parent() -> None:
    """In a forked process, such as a loader's worker: signals to the group are for its parent, which needs it until it ends it."""
    if not _active:
        return
    os.setpgid(0, 0)
    signal.set_wakeup_fd(-1)
    before = _active[-1]._before
    for signum in before:
        signal.signal(signum, signal.SIG_IGN)  # which drops one that came meanwhile
    _release_signals()
    for signum, handler in before.items():
        signal.signal(signum, handler)


os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_leave_to_parent)
