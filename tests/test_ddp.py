"""Several processes as users start them: the command line, a script, ``ddp_spawn``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, command
from tests.witness import seen

SCRIPT = """
from functools import partial
import torch
from tests.support import Net, loader, trainer
from tests.witness import Witness
from lightning_adaptive import Cosine, OptimizerSwitchCallback, attach

if __name__ == "__main__":
    switch = OptimizerSwitchCallback(at="2ep", optimizer=partial(torch.optim.SGD, lr=0.1), scheduler=Cosine())
    model = attach(Net(), optimizer=partial(torch.optim.Adam, lr=1e-2), scheduler=Cosine(warmup="1ep"))
    runner = trainer(max_epochs=5, strategy={strategy!r}, devices=2, callbacks=[switch, Witness()])
    runner.fit(model, loader())
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "strategy",
    ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp_spawn", "ddp_fork", "ddp_notebook"))],
)
def test_a_script_switches_on_both_ranks(strategy: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(strategy=strategy), encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    one, other = seen(tmp_path)
    assert one["weights"] == other["weights"]
    assert one["process"] != other["process"]
    for rank in (one, other):
        assert (rank["steps"], rank["optimizer"]) == ({"Adam": 8, "SGD": 12}, "SGD")
    assert ended.stderr.count("SWITCH at step 8 (epoch 2): Adam") == 1  # one rank speaks


RECIPE = ["train", "recipe=digits_adam_to_sgd", "trainer=ddp_cpu", "trainer.devices=2", "switch.at=3ep", "trainer.max_epochs=6"]


def test_the_command_line_switches_on_both_ranks(tmp_path: Path) -> None:
    ended = command(
        [*RECIPE, "--trust", "tests", "+callbacks.witness={_target_: tests.witness.Witness}"], tmp_path, PYTHONPATH=str(ROOT)
    )
    assert ended.returncode == 0, ended.stderr
    one, other = seen(tmp_path)
    assert one["weights"] == other["weights"]
    for rank in (one, other):
        assert (rank["steps"], rank["optimizer"]) == ({"Adam": 51, "SGD": 51}, "SGD")
    [folder] = (tmp_path / "outputs").iterdir()
    assert {"result.json", "run.png", "train.log", "train_ddp_process_1.log"} <= {file.name for file in folder.iterdir()}


@pytest.mark.slow
def test_a_sweep_of_two_process_runs(tmp_path: Path) -> None:
    """Each job starts its own second rank with its own overrides, and the next job is not taken for a rank."""
    ended = command(["train", "-m", *RECIPE[1:], "seed=1,2", "study=pairs"], tmp_path, timeout=240)
    assert ended.returncode == 0, ended.stderr
    folders = [folder for folder in (tmp_path / "studies" / "pairs").iterdir() if folder.is_dir()]
    assert len(folders) == 2
    for folder in folders:
        assert {"result.json", "train_ddp_process_1.log"} <= {file.name for file in folder.iterdir()}
    assert (folders[0] / "result.json").read_text() != (folders[1] / "result.json").read_text()
