"""Runs the command line in this process, through `cli.main` with the arguments in ``sys.argv``: every new process waits for its
imports."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_adaptive.app import cli
from lightning_adaptive.trust import TRUST_VARIABLE

SCRIPT = Path(sys.executable).with_name("lightning-adaptive")
SHORT = ("trainer.max_epochs=1", "trainer.limit_train_batches=4", "trainer.log_every_n_steps=1", "test=false")
"""A run of four steps."""


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs ``lightning-adaptive`` in an empty folder of its own, and takes back what a process leaves to its end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    environment = dict(os.environ)
    level = logging.getLogger().level

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            _close_log_files()
            logging.getLogger().setLevel(level)
            torch.use_deterministic_algorithms(False)
            os.environ.clear()
            os.environ.update(environment)
        return Ended(code, *capsys.readouterr())

    yield run
    sys.modules.pop("mylab", None)


@pytest.fixture
def train(command_line: Run) -> Run:
    """Runs ``lightning-adaptive train``."""
    return functools.partial(command_line, "train")


def _close_log_files() -> None:
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()


def runs(folder: Path) -> list[Path]:
    return sorted((folder / "outputs").iterdir())


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[Path, str]:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}
