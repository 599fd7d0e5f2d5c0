"""Two long-lived worker processes of one gloo group: a test hands them a function, both run it, both answer.

``python -m tests.pair RANK PORT`` is one worker.
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, BinaryIO

from tests.support import ROOT

_TIMEOUT = 300.0  # DeepSpeed compiles an operator when it is first used on a machine


class Pair:
    """Starts two workers when it is entered; a function that fails or hangs ends both, and the next call starts new ones."""

    def __init__(self) -> None:
        self._workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = _TIMEOUT) -> list[Any]:
        """The function's answer from both ranks; an exception of either is raised here, with its rank and its traceback."""
        if not self._workers:
            self._start()
        answers: list[Any] = [None, None]
        threads = [
            threading.Thread(target=self._ask, args=(rank, (function, arguments), answers), daemon=True) for rank in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        if any(answer is None for answer in answers):
            self._end()
            raise TimeoutError(f"{function.__name__} did not end within {timeout} s on both ranks: {answers}")
        for rank, (failed, value) in enumerate(answers):
            if failed:
                self._end()
                raise RuntimeError(f"rank {rank}:\n{value}")
        return [value for _, value in answers]

    def _ask(self, rank: int, task: Any, answers: list[Any]) -> None:
        worker = self._workers[rank]
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            _send(worker.stdin, task)
            answers[rank] = _receive(worker.stdout)
        except (OSError, EOFError, struct.error) as error:
            answers[rank] = (True, f"the worker died: {error!r}")

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(2):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "pair",
                "OMP_NUM_THREADS": "1",
            }
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.pair"], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._workers.append(worker)

    def _end(self) -> None:
        for worker in self._workers:
            worker.kill()
            worker.wait()
            for stream in (worker.stdin, worker.stdout):
                if stream is not None:
                    stream.close()
        self._workers = []


def _send(stream: BinaryIO, value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(struct.pack("!Q", len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError("no answer")
    return pickle.loads(stream.read(struct.unpack("!Q", header)[0]))


def _serve() -> None:
    """Answers until the pipe closes; whatever a task prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    tasks = sys.stdin.buffer
    while True:
        try:
            function, arguments = _receive(tasks)
        except EOFError:
            return
        try:
            answer = (False, function(*arguments))
        except BaseException:  # noqa: BLE001 - the parent raises it
            answer = (True, traceback.format_exc())
        _send(answers, answer)


if __name__ == "__main__":
    _serve()
