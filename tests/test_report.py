"""The plan before a run and the report after it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from lightning_adaptive import Cosine, OptimizerSwitchCallback, attach
from lightning_adaptive.plan import plan
from lightning_adaptive.report import PhaseReport, RunReport, explanations, picture, read_curves, table, write_result
from tests.grouped import Seen
from tests.support import ValidatedNet, loader, trainer


def run(folder: Path, resumed_from: Path | None = None) -> tuple[Seen, RunReport]:
    model = attach(ValidatedNet(), optimizer=partial(Adam, lr=1e-2), scheduler=Cosine(warmup="25%"))
    seen, report = Seen(), RunReport("val/loss")
    switch = OptimizerSwitchCallback(at="50%", optimizer=partial(SGD, lr=0.1, momentum=0.9), scheduler=Cosine(floor=0.1))
    saver = ModelCheckpoint(folder, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    runner = trainer(max_epochs=4, callbacks=[seen, switch, report, saver], enable_checkpointing=True)
    runner.fit(model, loader(), loader(), ckpt_path=resumed_from, weights_only=True)
    return seen, report


def test_the_plan_says_what_the_run_then_does(tmp_path: Path) -> None:
    seen, _ = run(tmp_path)
    weights = sum(parameter.numel() for parameter in ValidatedNet().parameters())
    lrs = [f"{seen.lrs(step)['']:.1e}" for step in range(32)]
    assert str(seen.plan).splitlines() == [
        "PLAN  32 optimizer steps  <- 8 steps an epoch (8 batches, accumulate 1, 1 process), max_epochs 4",
        f"  phase 1  Adam       steps 0..15  cosine, warmup 25%  lr {lrs[0]} -> {lrs[7]} (step 7) -> {lrs[15]}  "
        f"{weights} parameters  <- configure_optimizers",
        f"  phase 2  SGD        steps 16..31  cosine, floor 0.1  lr 1.0e-01 -> {lrs[31]}  {weights} parameters  <- at=50%",
    ]
    assert seen.lrs(0) == {"": pytest.approx(0.01 / 8)}
    assert seen.lrs(16) == {"": 0.1}


def test_planning_changes_nothing_in_the_run(tmp_path: Path) -> None:
    class Repeatedly(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            plan(trainer)

    def weights(*extra: Callback) -> torch.Tensor:
        model = attach(ValidatedNet(), optimizer=partial(Adam, lr=1e-2))
        switch = OptimizerSwitchCallback(at="50%", optimizer=partial(SGD, lr=0.1), scheduler=partial(StepLR, step_size=1))
        trainer(max_epochs=4, callbacks=[switch, *extra]).fit(model, loader(), loader())
        return model.net[0].weight

    assert torch.equal(weights(), weights(Repeatedly()))


def test_the_report_has_a_row_for_each_phase(tmp_path: Path) -> None:
    seen, report = run(tmp_path)
    first, second = report.phases
    said = [(phase.number, phase.optimizer, phase.schedule, phase.first_step, phase.end_step) for phase in report.phases]
    weights = sum(parameter.numel() for parameter in ValidatedNet().parameters())
    assert said == [(1, "Adam", "cosine, warmup 25%", 0, 16), (2, "SGD", "cosine, floor 0.1", 16, 32)]
    assert (first.lr_first, first.lr_last) == ([*seen.lrs(0).values()], [*seen.lrs(15).values()])
    assert (second.lr_first, second.lr_last) == ([*seen.lrs(16).values()], [*seen.lrs(31).values()])
    assert (first.state_bytes, second.state_bytes) == (weights * 8 + 16, weights * 4)
    assert second.train_loss is not None
    assert first.train_loss is not None
    assert second.train_loss < first.train_loss
    assert first.metric is not None
    assert 0 < first.seconds < 60


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
def test_a_resumed_run_reports_the_phases_before_it(tmp_path: Path) -> None:
    _, whole = run(tmp_path / "whole")
    for epoch in range(3):
        seen, resumed = run(tmp_path / f"from{epoch}", tmp_path / "whole" / f"epoch{epoch}.ckpt")
        for one, other in zip(whole.phases, resumed.phases, strict=True):
            assert replace(one, seconds=0) == replace(other, seconds=0), epoch
        number = 1 if epoch < 2 else 2  # the switch comes with the first batch after the checkpoint
        assert seen.plan is not None
        assert seen.plan.phases[0].number == number
        assert seen.plan.phases[0].reason == f"resumed at step {8 * (epoch + 1)}"


PHASES = [
    PhaseReport(1, "Adam", "cosine", 0, 10, [1e-3, 1e-4], [5e-4], 0.5, 0.9, 1.25, 2048),
    PhaseReport(2, "SGD", "constant", 10, 20, [0.1], [0.1], math.nan, None, 2.0, 12),
]


def test_the_table() -> None:
    header, rows = table(PHASES, "val/acc")
    assert header == ["phase", "optimizer", "schedule", "steps", "lr first", "lr last", "train loss", "val/acc", "seconds", "state"]
    assert rows == [
        ["1", "Adam", "cosine", "0..9", "1.0e-03/1.0e-04", "5.0e-04", "0.5000", "0.9000", "1.2", "2.0 KB"],
        ["2", "SGD", "constant", "10..19", "1.0e-01", "1.0e-01", "nan", "-", "2.0", "12 B"],
    ]


def test_the_result_is_plain_json_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    write_result(tmp_path / "result.json", PHASES, {"val/acc": 0.9, "val/loss": math.inf}, seed=3)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["metrics"] == {"val/acc": 0.9, "val/loss": None}
    assert result["seed"] == 3
    assert [phase["train_loss"] for phase in result["phases"]] == [0.5, None]
    assert result["versions"]["torch"].startswith(torch.__version__.split("+")[0])


def test_the_picture_is_drawn_from_what_the_logger_wrote(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("epoch,lr,step,train/loss,val/acc\n0,0.1,0,,\n0,,1,2.5,\n0,,1,,0.5\n1,0.2,2,,\n", encoding="utf-8")
    assert read_curves(metrics) == {"lr": ([0, 2], [0.1, 0.2]), "train/loss": ([1], [2.5]), "val/acc": ([1], [0.5])}
    picture(metrics, PHASES, "val/acc", tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    metrics.write_text("epoch,step\n", encoding="utf-8")
    picture(metrics, PHASES[:1], None, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")


def test_the_lines_below_the_table_explain_each_phase(tmp_path: Path) -> None:
    _, report = run(tmp_path)
    assert [phase.decays for phase in report.phases] == [[0.0], [0.0]]
    assert explanations(report.phases) == ["phase 2  because at=50% was reached; lr own, momentum zero"]
    waiting = replace(report.phases[0], seen={"val/loss": 0.123456, "waited": 2})
    assert explanations([waiting]) == ["phase 1  the trigger last saw val/loss 0.1235, waited 2"]


def test_the_noise_has_a_column_where_it_was_measured() -> None:
    phases = [PhaseReport(1, "Adam", "constant", 0), PhaseReport(2, "SGD", "constant", 8, noise=123.4)]
    header, rows = table(phases, None)
    assert (header[-1], [row[-1] for row in rows]) == ("noise scale", ["-", "123"])
    assert table(phases[:1], None)[0][-1] == "state"
