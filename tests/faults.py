"""Runs that are killed again and again, and go on from the newest whole checkpoint each time. ``benchmarks/faults.py`` counts them.

The processes come from a server that has Lightning imported and forks, so that one starts in a fraction of a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD

from lightning_adaptive import Cosine, OptimizerSwitchCallback, checkpoints, strategies
from lightning_adaptive.checkpoints import saved_step
from tests.exactness import Case, run

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.faults"])

KINDS = {
    "one process": Case(switched=True, validated=True),
    "ddp": Case(strategy="ddp", switched=True, validated=True),
    "fsdp2": Case(strategy="fsdp2 sharded", switched=True, validated=True),
    "zero-2": Case(strategy="deepspeed 2", switched=True),
}


class Tell(Callback):
    """Tells the parent which batch is running, and at the end writes down what the run ended with."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.value = trainer.fit_loop.epoch_loop.total_batch_idx


SEAMS = (
    "ask", "before build", "after build", "before install", "after install", "in exchange", "after exchange", "before announce",
    "after announce",
)  # fmt: skip
"""Between the parts of a switch, and within its exchange."""

FAULTS = ("kill -9", "Ctrl-C", "exception")


class FaultySwitch(OptimizerSwitchCallback):
    """Breaks at a seam, as often as it comes there."""

    __qualname__ = "OptimizerSwitchCallback"  # its state is that of the sound one
    seam = ""
    fault = ""

    @classmethod
    def break_at(cls, seam: str) -> None:
        if seam != cls.seam:
            return
        if cls.fault == "kill -9":
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt if cls.fault == "Ctrl-C" else RuntimeError("planted")

    def _is_due(self, trainer: Trainer, batch_idx: int) -> bool:
        due = super()._is_due(trainer, batch_idx)
        if due:
            self.break_at("ask")
        return due

    def _build_next(self, *arguments: Any) -> Any:
        self.break_at("before build")
        built = super()._build_next(*arguments)
        self.break_at("after build")
        return built

    def _exchange(self, trainer: Trainer, *arguments: Any) -> None:
        kind = type(strategies.placement(trainer))
        install = kind.install

        def faulty(placement: Any, *arguments: Any) -> None:
            self.break_at("before install")
            install(placement, *arguments)
            self.break_at("after install")

        kind.install = faulty
        try:
            super()._exchange(trainer, *arguments)
        finally:
            kind.install = install
        self.break_at("after exchange")

    def _clip_val(self) -> float | None:
        self.break_at("in exchange")
        return super()._clip_val()

    def _announce(self, *arguments: Any) -> None:
        self.break_at("before announce")
        super()._announce(*arguments)
        self.break_at("after announce")


def work(
    case: Case, folder: Path, path: Path | None, seed: int, rank: int, ranks: int, port: int, batches: Any, broken: tuple[str, str]
) -> None:
    """What each process of a job does; ``broken`` is the seam and the fault of its switch, if it has one."""
    torch.set_num_threads(1)
    os.dup2(os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "faults",
        }
    saver = ModelCheckpoint(
        folder / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max"
    )
    case = replace(case, options={**case.options, "enable_checkpointing": True})
    FaultySwitch.seam, FaultySwitch.fault = broken
    faulty = partial(FaultySwitch, at="1.5ep", optimizer=partial(SGD, lr=0.1, momentum=0.9), scheduler=Cosine())
    ended = run(case, path, seed, [*([Tell(batches)] if batches is not None and rank == 0 else []), saver], faulty)
    (folder / f"ended{rank}.json").write_text(json.dumps([ended.weights, ended.optimizer, ended.random]))


def start(
    case: Case, folder: Path, path: Path | None, seed: int, batches: Any = None, broken: tuple[str, str] = ("", "")
) -> list[BaseProcess]:
    """Starts a job's processes."""
    ranks = 2 if case.strategy else 1
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = [
        FORKS.Process(target=work, args=(case, folder, path, seed, rank, ranks, port, batches, broken), daemon=False)
        for rank in range(ranks)
    ]
    for job in jobs:
        job.start()
    return jobs


def stop(jobs: Sequence[BaseProcess]) -> None:
    """Ends what still runs of a job's processes."""
    for job in jobs:
        job.kill()
    for job in jobs:
        job.join()


def ended(folder: Path, jobs: Sequence[BaseProcess], timeout: float = 120) -> list[Any]:
    """What each process ended with."""
    for job in jobs:
        job.join(timeout)
    if any(job.exitcode != 0 for job in jobs):
        codes = [job.exitcode for job in jobs]
        stop(jobs)
        texts = [path.read_text()[-3000:] for path in sorted(folder.glob("rank*.txt"))]
        raise AssertionError(f"exit codes {codes}:\n" + "\n".join(texts))
    return [json.loads((folder / f"ended{rank}.json").read_text()) for rank in range(len(jobs))]


def chain(case: Case, kills: Sequence[tuple[int, float]], reference: list[Any], seed: int) -> list[str]:
    """One run that is killed several times.

    Args:
        case: the run.
        kills: of each kill the batch at which it comes at the earliest, and the seconds to wait then.
        reference: what the run that was not killed ended with.
        seed: of the resumed runs, which is another than the first one's.

    Returns:
        For each kill what was found after it: the step of the newest whole checkpoint, or what was broken.

    Raises:
        AssertionError: when the run ends otherwise than the reference.
    """
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    path: Path | None = None
    found: list[str] = []
    try:
        for number, (batch, wait) in enumerate(kills):
            batches = FORKS.Value("i", -1)
            jobs = start(case, folder, path, seed + number if path else 1, batches)
            deadline = time.monotonic() + 90
            while batches.value < batch and any(job.is_alive() for job in jobs) and time.monotonic() < deadline:
                time.sleep(0.0005)
            time.sleep(wait)
            was_alive = any(job.is_alive() for job in jobs)
            stop(jobs)
            path, broken = checkpoints.newest(folder / "checkpoints")
            assert not broken, f"a checkpoint is broken: {broken}"
            found.append(f"step {saved_step(path)}" if path else "nothing yet")
            if not was_alive:
                found[-1] += ", after the end"
        jobs = start(case, folder, path, seed + len(kills))
        got = ended(folder, jobs)
        assert got == reference, f"{kills} ended with {got}, not {reference}"
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def broken_at(case: Case, seam: str, fault: str, reference: list[Any]) -> None:
    """A run whose switch breaks at a seam on every process, and the run that goes on after it.

    Raises:
        AssertionError: when a checkpoint is broken, or the run ends otherwise than the reference.
    """
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    try:
        jobs = start(case, folder, None, 1, broken=(seam, fault))
        for job in jobs:
            job.join(60)
        codes = [job.exitcode for job in jobs]
        stop(jobs)
        assert all(code not in (0, None) for code in codes), f"{codes}: it did not break"
        path, broken = checkpoints.newest(folder / "checkpoints")
        assert path is not None
        assert not broken
        got = ended(folder, start(case, folder, path, 70))
        assert got == reference, f"{fault} at {seam} ended with {got}, not {reference}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def reference(case: Case) -> list[Any]:
    """What the run ends with when it is left alone."""
    folder = Path(tempfile.mkdtemp(prefix="faults"))
    try:
        return ended(folder, start(case, folder, None, 1))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plan(chooser: random.Random, length: int, batches: int = 24) -> list[tuple[int, float]]:
    """Kills at growing batches, each at a random time after the batch began."""
    return [(batch, chooser.uniform(0, 0.03)) for batch in sorted(chooser.sample(range(batches), length))]
