"""Ctrl-C, SIGTERM and exceptions, on real processes: exit codes, the checkpoint, and that no process is left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

BATCHES = 4  # in an epoch
# Long enough to be interrupted, and bounded if it is not.
LONG = [
    "switch=none",
    "test=false",
    "trainer.max_epochs=1000",
    f"trainer.limit_train_batches={BATCHES}",
    "+trainer.limit_val_batches=1",
]
PAIR = ["trainer=ddp_cpu", "trainer.devices=2"]
TRAINING = "epoch 3/"

# A task whose module does, on the rank and at the step of the environment, what a test wants.
TASK = """
module:
  _target_: mine.Module
data:
  _target_: lightning_adaptive.tasks.digits.DigitsData
monitor: val/acc
mode: max
"""
MODULE = """
import os, time
from lightning_adaptive.tasks.digits import DigitsNet

class Module(DigitsNet):
    def _maybe(self, place):
        if os.environ["PLACE"] == place and self.global_rank == int(os.environ["RANK_OF_TEST"]):
            if os.environ["ACT"] == "raise":
                raise ValueError("the user's own")
            print("here", flush=True)
            time.sleep(600)

    def setup(self, stage):
        self._maybe("setup")

    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            self._maybe("step")
        return super().training_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self._maybe("test")
        return super().test_step(batch, batch_idx)
"""


class Command:
    """``lightning-adaptive train`` in a session of its own, with its output in a file."""

    def __init__(self, folder: Path, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self.folder = folder
        self.output = folder / "output.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightning_adaptive", "train", *arguments],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self.output.read_text()

    def wait_for(self, pattern: str, timeout: float = 240) -> None:
        """Returns when the output has the pattern."""
        _until(lambda: bool(re.search(pattern, self.text)) or self.process.poll() is not None, timeout, f"no {pattern!r}")
        assert re.search(pattern, self.text), f"ended with {self.process.returncode}:\n{self.text}"

    def send(self, target: str, signum: int) -> None:
        """Sends a signal to ``rank 0``, ``rank 1`` or the ``group``."""
        if target == "group":
            os.killpg(self.process.pid, signum)
        else:
            os.kill(self.process.pid if target == "rank 0" else self._rank_1(), signum)

    def end(self, within: float = 30) -> int:
        """The command's exit code; fails when it takes too long, or leaves a process behind."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {within} s:\n{self.text}")
        # A worker of a loader looks every 5 s whether its parent is there.
        _until(lambda: not self.processes(), 10, "a process is left")
        return code

    def processes(self) -> list[int]:
        """The processes of the session that still run."""
        return [pid for pid, (_, session) in _running().items() if session == self.process.pid]

    def kill(self) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def _rank_1(self) -> int:
        children = [pid for pid, (parent, _) in _running().items() if parent == self.process.pid]
        [pid] = [pid for pid in children if b"LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        return pid


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts a command in a folder of its own; whatever it leaves is killed afterwards."""
    started: list[Command] = []

    def start(*arguments: str, **environment: str) -> Command:
        folder = tmp_path / str(len(started))
        (folder / "conf" / "task").mkdir(parents=True)
        (folder / "conf" / "task" / "mine.yaml").write_text(TASK)
        (folder / "mine.py").write_text(MODULE)
        started.append(Command(folder, arguments, environment))
        return started[-1]

    yield start
    for command in started:
        command.kill()


def start_mine(start: Callable[..., Command], *arguments: str, rank: int, place: str, act: str) -> Command:
    words = ["--trust", "mine", "-cd", "conf", "task=mine", *long_but_for(arguments), *arguments]
    return start(*words, RANK_OF_TEST=str(rank), PLACE=place, ACT=act)


def long_but_for(arguments: Sequence[str]) -> list[str]:
    """`LONG` without the keys that are given otherwise: a key that is given twice is refused."""
    keys = {argument.partition("=")[0] for argument in arguments}
    return [argument for argument in LONG if argument.partition("=")[0] not in keys]


def saved(command: Command, signum: signal.Signals) -> Path:
    """The checkpoint that an interrupted command names."""
    checkpoints = list(command.folder.glob("outputs/*/checkpoints/interrupted.ckpt"))
    assert checkpoints, command.text
    [checkpoint] = checkpoints
    assert command.text.count(f"ended by {signum.name}; resume with ckpt_path={checkpoint}\n") == 1
    assert "Traceback" not in command.text
    return checkpoint


def resume(start: Callable[..., Command], checkpoint: Path, *arguments: str) -> Callable[[], None]:
    """Resumes for an epoch or two; what is returned checks that it came to its end."""
    epochs = torch.load(checkpoint, weights_only=True)["epoch"] + 2
    own = [*arguments, f"trainer.max_epochs={epochs}", f"ckpt_path={checkpoint}"]
    command = start(*long_but_for(own), *own)

    def check() -> None:
        assert command.end(120) == 0, command.text
        [result] = command.folder.glob("outputs/*/result.json")
        assert json.loads(result.read_text())["steps"] == epochs * BATCHES

    return check


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([("rank 0", signal.SIGINT), ("group", signal.SIGTERM)]),
        pytest.param([("rank 0", signal.SIGTERM), ("group", signal.SIGINT)], marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_saves_a_checkpoint_that_resumes(
    start: Callable[..., Command], cases: list[tuple[str, signal.Signals]]
) -> None:
    # Side by side, since most of the time is spent on imports; with a worker, which a signal to the group must not end.
    commands = [start(*LONG, f"task.data.num_workers={1 if target == 'group' else 0}") for target, _ in cases]
    for command, (target, signum) in zip(commands, cases, strict=True):
        command.wait_for(TRAINING)
        command.send(target, signum)
        assert command.end() == 128 + signum
    for check in [resume(start, saved(command, signum)) for command, (_, signum) in zip(commands, cases, strict=True)]:
        check()


@pytest.mark.parametrize(
    ("target", "signum"),
    [
        pytest.param("group", signal.SIGINT),
        pytest.param("rank 1", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("rank 0", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("rank 0", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("rank 1", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("group", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_ddp_saves_a_checkpoint_that_resumes(
    start: Callable[..., Command], target: str, signum: signal.Signals
) -> None:
    command = start(*PAIR, *LONG)
    command.wait_for(TRAINING)
    command.send(target, signum)
    assert command.end() == 128 + signum
    # One process can go on where two were stopped; both ways are tried.
    resume(start, saved(command, signum), *([] if target == "rank 1" else PAIR))()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "target", "signum"),
    [
        ([], "rank 0", signal.SIGTERM),
        (PAIR, "rank 0", signal.SIGINT),
        (PAIR, "rank 1", signal.SIGTERM),
        (PAIR, "group", signal.SIGINT),
    ],
)
def test_a_second_signal_ends_at_once(
    start: Callable[..., Command], processes: list[str], target: str, signum: signal.Signals
) -> None:
    # One rank hangs, so that no step boundary comes; the other waits for it in a collective, where Python handles no signal.
    command = start_mine(start, *processes, rank=len(processes) // 2, place="step", act="sleep")
    command.wait_for("here")
    command.send(target, signum)
    with pytest.raises(subprocess.TimeoutExpired):
        command.process.wait(1)
    command.send(target, signum)
    assert command.end() == 128 + signum
    assert f"ended by {signum.name}; nothing was saved" in command.text
    assert not list(command.folder.glob("outputs/*/checkpoints/interrupted.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "target", "signum", "place"),
    [
        ([], "rank 0", signal.SIGTERM, "test"),
        (PAIR, "rank 0", signal.SIGTERM, "setup"),
        (PAIR, "rank 1", signal.SIGTERM, "test"),
        (PAIR, "group", signal.SIGINT, "setup"),
    ],
)
def test_a_signal_outside_of_training_saves_nothing(
    start: Callable[..., Command], processes: list[str], target: str, signum: signal.Signals, place: str
) -> None:
    rank = len(processes) // 2
    command = start_mine(start, "test=true", "trainer.max_epochs=2", *processes, rank=rank, place=place, act="sleep")
    command.wait_for("here")
    command.send(target, signum)
    assert command.end() == 128 + signum
    assert f"ended by {signum.name}; nothing was saved" in command.text
    assert not list(command.folder.glob("outputs/*/checkpoints/interrupted.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "rank", "place"), [([], 0, "step"), (PAIR, 0, "step"), (PAIR, 1, "setup"), (PAIR, 1, "step"), (PAIR, 1, "test")]
)
def test_an_exception_of_one_rank_ends_all(start: Callable[..., Command], processes: list[str], rank: int, place: str) -> None:
    command = start_mine(start, "test=true", "trainer.max_epochs=2", *processes, rank=rank, place=place, act="raise")
    _until(lambda: "the user's own" in command.text or command.process.poll() is not None, 90, "no exception")
    assert command.end() == 1
    assert "ValueError: the user's own" in command.text
    assert "Traceback" in command.text


def _until(is_so: Callable[[], bool], timeout: float, otherwise: str) -> None:
    deadline = time.monotonic() + timeout
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{otherwise} within {timeout} s")
        time.sleep(0.05)


def _running() -> dict[int, tuple[int, int]]:
    """Parent and session of every process that runs, by pid."""
    table = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent, _, session, *_ = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            table[int(path.parent.name)] = int(parent), int(session)
    return table


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_all_and_is_named(start: Callable[..., Command], rank: int) -> None:
    command = start(*LONG, *PAIR)
    command.wait_for(TRAINING)
    killed = command._rank_1() if rank else command.process.pid
    os.kill(killed, signal.SIGKILL)
    assert command.end(30) == (1 if rank else -signal.SIGKILL)
    if rank:
        named = f"lightning-adaptive: rank 1 (process {killed}) was killed by SIGKILL, so the others ended too. "
        assert f"{named}The run goes on with resume=last.\n" in command.text
