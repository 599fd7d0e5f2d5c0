"""What goes wrong at the switch alone: an optimizer that cannot be built again, a logger that fails, a step that is skipped."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import SGD

from lightning_adaptive import OptimizerSwitchCallback
from tests.support import Net, counted_steps, digest, loader, trainer
from tests.test_restore import InfiniteAfter, InfiniteNet
from tests.test_resume import SaveOnException

TO_SGD = partial(SGD, lr=0.1, momentum=0.9)


class OnlyOnce:
    """A factory whose second optimizer fails: not the one of the trial, but that of the switch."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, parameters: Any) -> SGD:
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError("no second one")
        return TO_SGD(parameters)


def test_an_optimizer_that_cannot_be_built_at_the_switch_leaves_the_old_phase_whole(tmp_path: Path) -> None:
    model = Net()
    trainer(max_epochs=4, callbacks=[OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD)]).fit(model, loader())
    broken = OptimizerSwitchCallback(at="2ep", optimizer=OnlyOnce())
    with pytest.raises(RuntimeError, match="no second one"):
        trainer(max_epochs=4, callbacks=[broken, SaveOnException(tmp_path / "saved.ckpt")]).fit(Net(), loader())
    assert broken.phase == 0
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    assert len(saved["optimizer_states"][0]["state"]) == 4
    resumed = Net()
    with counted_steps() as counts:
        trainer(max_epochs=4, callbacks=[OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD)]).fit(
            resumed, loader(), ckpt_path=tmp_path / "saved.ckpt", weights_only=True
        )
    assert counts == {"SGD": 16}
    assert digest(resumed) == digest(model)


class Unreachable(CSVLogger):
    """Fails to log the phase."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "phase" in metrics:
            raise ConnectionError("no route")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_at_the_switch_does_not_end_training(tmp_path: Path) -> None:
    switch = OptimizerSwitchCallback(at="1ep", optimizer=TO_SGD)
    runner = trainer(max_epochs=2, callbacks=[switch], logger=Unreachable(tmp_path))
    message = r"^Unreachable could not log phase: ConnectionError\('no route'\)\. Training goes on\.$"
    with counted_steps() as counts, pytest.warns(UserWarning, match=message):
        runner.fit(Net(), loader())
    assert counts == {"Adam": 8, "SGD": 8}


@pytest.mark.parametrize("net", [InfiniteNet, InfiniteAfter])
def test_a_first_step_that_the_scaler_skips_is_said(net: type[Net], caplog: pytest.LogCaptureFixture) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    switch = OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD)
    runner = trainer(max_epochs=4, callbacks=[switch], plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("ignore")
        runner.fit(net(), loader())
    line = "The first step of SGD (step 16) was skipped, because its gradients were not finite. It counts as a step."
    assert caplog.text.count(line) == (net is InfiniteAfter)
