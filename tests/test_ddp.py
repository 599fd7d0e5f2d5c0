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


@pytest.mark.parametrize(
    "strategy",
    ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp_spawn", "ddp_fork", "ddp_notebook"))],
)
def test_a_script_switches_on_both_ranks(strategy: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(strategy=strategy), encoding="utf-8")
    environment, line = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, [sys.executable, "script.py"]
    ended = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    one, other = seen(tmp_path)
    assert one["weights"] == other["weights"]
    assert one["process"] != other["process"]
    for rank in (one, other):
        assert (rank["steps"], rank["optimizer"]) == ({"Adam": 8, "SGD": 12}, "SGD")
    assert ended.stderr.count("SWITCH at step 8 (epoch 2): Adam") == 1  # one rank speaks


def test_the_command_line_switches_on_both_ranks(tmp_path: Path) -> None:
    run = ["recipe=digits_adam_to_sgd", "trainer=ddp_cpu", "trainer.devices=2", "switch.at=3ep", "trainer.max_epochs=6"]
    witness = ["--trust", "tests", "+callbacks.witness={_target_: tests.witness.Witness}"]
    ended = command(["train", *run, *witness], tmp_path, PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr
    one, other = seen(tmp_path)
    assert one["weights"] == other["weights"]
    for rank in (one, other):
        assert (rank["steps"], rank["optimizer"]) == ({"Adam": 51, "SGD": 51}, "SGD")
    [folder] = (tmp_path / "outputs").iterdir()
    assert {"result.json", "run.png", "train.log", "train_ddp_process_1.log"} <= {file.name for file in folder.iterdir()}
