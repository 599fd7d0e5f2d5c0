"""The same run back: every epoch's checkpoint, resumed, ends in the weights of the run that was never interrupted.

The loader does not shuffle and the net draws nothing at random, so that only the switch is on trial here.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import Strategy
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lightning_adaptive import CheckpointError, Clock, Cosine, OptimizerSwitchCallback, StepDecay, attach
from lightning_adaptive.switch_state import SwitchState
from tests.faults import SEAMS, FaultySwitch
from tests.pair import Pair
from tests.support import Net, ValidatedNet, counted_steps, digest, loader, trainer

# A resumed run saves nothing here.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")

EPOCHS = 6
TO_SGD = partial(SGD, lr=0.1, momentum=0.9)


@dataclass(frozen=True)
class Case:
    """One run that is resumed: a switch, the steps each optimizer class takes, and the trainer's options.

    Args:
        switch: makes the callback.
        steps: optimizer class of each step of one process; of two processes half as many.
        options: the trainer's.
        validated: whether it validates.
        scheduled: whether the first phase has a schedule of ours.
    """

    switch: Callable[[], Callback]
    at: float
    classes: tuple[str, ...] = ("Adam", "SGD")
    options: dict[str, Any] = field(default_factory=dict)
    validated: bool = False
    scheduled: bool = False


def to_sgd(**options: Any) -> Callback:
    return OptimizerSwitchCallback(**{"at": "2ep", "optimizer": TO_SGD, **options})


CASES = {
    "epoch": Case(to_sgd, at=2),
    "mid-epoch": Case(partial(to_sgd, at="2.5ep"), at=2.5),
    "scheduled": Case(partial(to_sgd, scheduler=Cosine(warmup="10%")), at=2, scheduled=True),
    "validated": Case(to_sgd, at=2, validated=True),
    "accumulated": Case(partial(to_sgd, scheduler=StepDecay(every="1ep")), at=2, options={"accumulate_grad_batches": 2}),
    "clipped": Case(partial(to_sgd, gradient_clip_val=0.2), at=2, options={"gradient_clip_val": 0.5}),
    "bf16": Case(to_sgd, at=2, options={"precision": "bf16-mixed"}),
    "torch scheduler": Case(partial(to_sgd, scheduler=partial(StepLR, step_size=1, gamma=0.5)), at=2),
    "plateau": Case(
        partial(to_sgd, scheduler={"scheduler": partial(ReduceLROnPlateau, patience=0), "monitor": "val/loss"}),
        at=2,
        validated=True,
    ),
    "to AdamW": Case(partial(to_sgd, optimizer=partial(AdamW, lr=1e-3)), at=2, classes=("Adam", "AdamW")),
    "to L-BFGS": Case(partial(to_sgd, optimizer=partial(LBFGS, lr=0.1, max_iter=2)), at=2, classes=("Adam", "LBFGS")),
}


def run(case: Case, folder: Path, resumed_from: Path | None = None, seed: int = 1, extra: tuple[Callback, ...] = ()) -> Any:
    """Trains, saves every epoch unless it was resumed, and returns the weights' digest with the steps of each class."""
    seed_everything(seed, verbose=False)
    model: LightningModule = (ValidatedNet if case.validated else Net)()
    if case.scheduled:
        model = attach(model, optimizer=partial(torch.optim.Adam, lr=1e-2), scheduler=Cosine(warmup="5%"))
    saver = ModelCheckpoint(folder, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    callbacks = [case.switch(), *extra, *([saver] if resumed_from is None else [])]
    distributed = {"strategy": "ddp", "devices": 2} if dist.is_torchelastic_launched() else {}
    runner = trainer(
        max_epochs=EPOCHS,
        callbacks=callbacks,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        **distributed,
        **case.options,
    )
    with counted_steps() as counts:
        runner.fit(model, loader(), loader() if case.validated else None, ckpt_path=resumed_from, weights_only=True)
    return digest(model), counts


def steps_of(case: Case, from_epoch: int, steps_per_epoch: int) -> Counter[str]:
    """What each class must step when a run begins after so many epochs."""
    switch, begin, end = int(case.at * steps_per_epoch), from_epoch * steps_per_epoch, EPOCHS * steps_per_epoch
    first, second = case.classes
    return +Counter({first: max(switch - begin, 0), second: end - max(switch, begin)})


def resume_everywhere(case: Case, folder: Path, seed: int) -> list[tuple[int, Any, Any]]:
    """The uninterrupted run, then a run from the checkpoint of each epoch; run on each process of a group."""
    reference = run(case, folder)
    assert len(list(folder.glob("*.ckpt"))) == EPOCHS
    resumed = [run(case, folder, folder / f"epoch{epoch}.ckpt", seed) for epoch in range(EPOCHS - 1)]
    return [(0, *reference), *((epoch + 1, *result) for epoch, result in enumerate(resumed))]


def assert_same_run(case: Case, runs: list[tuple[int, Any, Any]], steps_per_epoch: int) -> None:
    reference = runs[0][1]
    for from_epoch, weights, counts in runs:
        assert counts == steps_of(case, from_epoch, steps_per_epoch), f"from epoch {from_epoch}"
        assert weights == reference, f"from epoch {from_epoch}"


@pytest.mark.parametrize("name", CASES)
def test_every_epoch_resumes_to_the_same_weights(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    batches = 8 // case.options.get("accumulate_grad_batches", 1)
    assert_same_run(case, resume_everywhere(case, tmp_path, seed=2), steps_per_epoch=batches)


@pytest.mark.parametrize("name", ["epoch", "mid-epoch", "scheduled", "validated", "accumulated", "clipped"])
def test_every_epoch_resumes_to_the_same_weights_on_two_processes(name: str, tmp_path: Path, pair: Pair) -> None:
    case = CASES[name]
    one, other = pair.run(resume_everywhere, case, tmp_path, 1)
    assert one == other
    assert_same_run(case, one, steps_per_epoch=4 // case.options.get("accumulate_grad_batches", 1))


class OnlyTheSetter(Callback):
    """What people write: a new optimizer through the setter at an epoch, and nothing for a resume."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 2:
            trainer.strategy.optimizers = [TO_SGD(pl_module.parameters())]


class AnEpochLate(OptimizerSwitchCallback):
    """Our own switch, but its resumed moment is an epoch later than the run's."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step:
            self._due_at = tuple(step + trainer.num_training_batches for step in self._due_at)


def test_a_callback_that_only_uses_the_setter_fails_these_tests(tmp_path: Path) -> None:
    case = Case(OnlyTheSetter, at=2)
    with pytest.raises(KeyError, match="step"):  # Adam is given SGD's state
        resume_everywhere(case, tmp_path, seed=1)


def test_a_callback_that_switches_an_epoch_late_fails_these_tests(tmp_path: Path) -> None:
    case = Case(partial(AnEpochLate, at="2ep", optimizer=TO_SGD), at=2)
    runs = resume_everywhere(case, tmp_path, seed=1)
    with pytest.raises(AssertionError, match="from epoch 1"):
        assert_same_run(case, runs, steps_per_epoch=8)


class SaveOnException(Callback):
    """Saves as Lightning's own callbacks do, without what they change in a run that is not resumed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def break_setter_once(patch: pytest.MonkeyPatch) -> None:
    """Another seam, in Lightning's setter after it has set: between new optimizer and new scheduler."""
    plain, armed = Strategy.optimizers, [True]

    def set_and_break(strategy: Strategy, optimizers: Any) -> None:
        plain.fset(strategy, optimizers)  # type: ignore[attr-defined]
        if armed and type(optimizers[0]) is SGD:
            armed.clear()
            FaultySwitch.break_at("between optimizer and scheduler")

    patch.setattr(Strategy, "optimizers", plain.setter(set_and_break))  # type: ignore[attr-defined]


@pytest.mark.parametrize("fault", ["exception", "Ctrl-C"])
@pytest.mark.parametrize("seam", [*SEAMS, "between optimizer and scheduler"])
def test_an_exception_at_a_seam_leaves_a_checkpoint_that_resumes(
    seam: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = Case(partial(to_sgd, scheduler=Cosine()), at=2, scheduled=True)
    reference, _ = run(sound, tmp_path / "reference")
    broken = replace(sound, switch=partial(FaultySwitch, at="2ep", optimizer=TO_SGD, scheduler=Cosine()))
    with monkeypatch.context() as patched:
        patched.setattr(FaultySwitch, "seam", seam)
        patched.setattr(FaultySwitch, "fault", fault)
        break_setter_once(patched)
        # Lightning turns Ctrl-C into an exit.
        with pytest.raises(SystemExit) if fault == "Ctrl-C" else pytest.raises(RuntimeError, match="planted"):
            run(broken, tmp_path / "broken", extra=(SaveOnException(tmp_path / "saved.ckpt"),))
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    [state] = [value for key, value in saved["callbacks"].items() if "OptimizerSwitchCallback" in key]
    [group] = saved["optimizer_states"][0]["param_groups"]
    found = state["phase"], "betas" in group, len(saved["optimizer_states"][0]["state"]), saved["lr_schedulers"][0]["step"]
    assert found == ((1, False, 0, 0) if seam in ("after exchange", "before announce", "after announce") else (0, True, 4, 16))
    weights, counts = run(sound, tmp_path, tmp_path / "saved.ckpt", seed=3)
    assert weights == reference
    assert counts == {"SGD": 32}


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    changed = saved_state(tmp_path, version=2)
    with pytest.raises(CheckpointError) as caught:
        run(CASES["epoch"], tmp_path, changed)
    assert str(caught.value) == "the checkpoint holds the switch's state in version 2, not 1."


@pytest.mark.parametrize(
    ("field_and_value", "message"),
    [
        (
            {"phase": 99},
            "the checkpoint was written in phase 99 (SGD, from step 16), but this run's switch leads only to phase 1. ",
        ),
        ({"phase": -1}, "the switch's state in the checkpoint is damaged: phase -1, first step 16, of its schedule 16."),
        ({"schedule_step": 17}, "the switch's state in the checkpoint is damaged: phase 1, first step 16, of its schedule 17."),
        ({"trigger": 5}, "the switch's state in the checkpoint is damaged: TypeError("),
        ({"first_step": "soon"}, "the switch's state in the checkpoint is damaged: ValueError("),
        ({"partition": 7}, "the switch's state in the checkpoint is damaged: TypeError("),
        (
            {"partition": [{"name": None, "parameters": ["gone"], "lr_ratio": 1.0, "no_decay": False}]},
            "the checkpoint's SGD holds 1 parameters that the model does not have: gone.",
        ),
        ({"optimizer": "RMSprop"}, "the checkpoint's phase 1 was stepped by RMSprop, but switch.optimizer is SGD in this run. "),
        ({"shapes": {"net.0.bias": [3]}}, "net.0.bias has shape (3,) in the checkpoint and (32,) in this run."),
        ({"settings": 3}, "the switch's state in the checkpoint is damaged: AttributeError("),
    ],
)
def test_damaged_state_is_refused_before_it_is_used(field_and_value: dict[str, Any], message: str, tmp_path: Path) -> None:
    changed = saved_state(tmp_path, **field_and_value)
    with counted_steps() as counts, pytest.raises(CheckpointError) as caught:
        run(CASES["epoch"], tmp_path, changed)
    assert str(caught.value).startswith(message)
    assert counts == {}


def saved_state(folder: Path, **changes: Any) -> Path:
    """A checkpoint of the second phase with changes in the switch's state."""
    run(CASES["epoch"], folder)
    saved = torch.load(folder / "epoch3.ckpt", weights_only=True)
    [key] = [name for name in saved["callbacks"] if name.startswith("OptimizerSwitchCallback")]
    saved["callbacks"][key].update(changes)
    torch.save(saved, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def test_every_field_of_the_state_survives(tmp_path: Path) -> None:
    run(CASES["epoch"], tmp_path)
    saved = torch.load(tmp_path / "epoch3.ckpt", weights_only=True)
    [state] = [value for key, value in saved["callbacks"].items() if key.startswith("OptimizerSwitchCallback")]
    assert state == {
        "version": 1,
        "phase": 1,
        "first_step": 16,
        "schedule_step": 16,
        "trigger": {},
        "reason": "at=2ep was reached",
        "handed": "lr own, momentum zero",
        "limit": None,
        "optimizer": "SGD",
        "partition": [
            {
                "parameters": ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"],
                "name": None,
                "lr_ratio": 1.0,
                "no_decay": False,
            }
        ],
        "shapes": {"net.0.weight": [32, 16], "net.0.bias": [32], "net.2.weight": [4, 32], "net.2.bias": [4]},
        "settings": {
            "optimizer": "Adam",
            "optimizer.lr": 0.01,
            "scheduler": "constant",
            "switch.at": "2ep",
            "switch.when": None,
            "switch.optimizer": "SGD",
            "switch.optimizer.lr": 0.1,
            "switch.optimizer.momentum": 0.9,
            "switch.scheduler": "constant",
            "switch.param_groups": "Inherit()",
            "switch.handover": "own",
            "switch.gradient_clip_val": "keep",
            "trainer.accumulate_grad_batches": 1,
            "steps of an epoch": 8,
            "steps of the training": 48,
            "seed": "1",
        },
    }
    # With a value in each field that is not its default.
    state |= {"schedule_step": 8, "trigger": {"step": 8, "waited": 1}, "limit": 0.5}
    state["partition"][0] |= {"name": "all", "lr_ratio": 2.0, "no_decay": True}
    callback = OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD)
    callback.load_state_dict(state)
    assert callback.state_dict() == state
    fresh = SwitchState()
    assert [name for name, value in vars(SwitchState.from_dict(state)).items() if value == getattr(fresh, name)] == []


def test_the_weights_of_a_switched_checkpoint_load_without_the_package(tmp_path: Path) -> None:
    run(CASES["epoch"], tmp_path)
    shutil.copy(tmp_path / "epoch5.ckpt", tmp_path / "weights.ckpt")
    model = Net.load_from_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert digest(model) == run(CASES["epoch"], tmp_path / "again")[0]


def resumed(folder: Path, epoch: int, **run_options: Any) -> Trainer:
    """Resumes the checkpoint of an epoch of the case "epoch" with other settings, and returns the trainer."""
    options = {"max_epochs": EPOCHS, **run_options.pop("trainer", {})}
    switch = to_sgd(**run_options.pop("switch", {}))
    seed_everything(1, verbose=False)
    runner = trainer(callbacks=[switch], **options)
    runner.fit(run_options.pop("model", None) or Net(), loader(), ckpt_path=folder / f"epoch{epoch}.ckpt", weights_only=True)
    return runner


@pytest.mark.parametrize(
    ("epoch", "changed", "line"),
    [
        (0, {"model": Net(lr=0.02)}, "optimizer.lr: 0.01 in the checkpoint, 0.02 in this run"),
        (3, {"switch": {"optimizer": partial(SGD, lr=0.05, momentum=0.9)}}, "switch.optimizer.lr: 0.1 in the checkpoint, 0.05 in "),
        (
            3,
            {"switch": {"optimizer": partial(SGD, lr=0.1)}},
            "switch.optimizer.momentum: 0.9 in the checkpoint, default in this ",
        ),
        (3, {"switch": {"scheduler": Cosine()}}, "switch.scheduler: constant in the checkpoint, cosine in this run"),
        (0, {"switch": {"at": "3ep"}}, "switch.at: 2ep in the checkpoint, 3ep in this run"),
        (0, {"trainer": {"accumulate_grad_batches": 2}}, "trainer.accumulate_grad_batches: 1 in the checkpoint, 2 in this run"),
        (3, {"trainer": {"max_epochs": 7}}, "steps of the training: 48 in the checkpoint, 56 in this run"),
        (3, {"trainer": {"limit_train_batches": 4}}, "steps of an epoch: 8 in the checkpoint, 4 in this run"),
    ],
)
def test_other_settings_are_said_and_end_the_run_unless_a_policy_is_given(
    epoch: int, changed: dict[str, Any], line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(CASES["epoch"], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with counted_steps() as counts, pytest.raises(CheckpointError) as caught:
        resumed(tmp_path, epoch, **copy.deepcopy(changed))
    assert line in str(caught.value)
    assert str(caught.value).endswith("switch.on_resume=config or switch.on_resume=checkpoint.")
    assert counts == {}
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    for policy in ("config", "checkpoint"):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            resumed(tmp_path, epoch, **{**copy.deepcopy(changed), "switch": {**changed.get("switch", {}), "on_resume": policy}})
        assert f"RESUMED with other settings (on_resume={policy}):\n" in caplog.text
        assert line in caplog.text


def test_the_policy_decides_which_options_the_running_optimizer_goes_on_with(tmp_path: Path) -> None:
    run(CASES["epoch"], tmp_path)
    other = {"optimizer": partial(SGD, lr=0.05, momentum=0.8, weight_decay=0.1)}
    for policy, expected in (("config", (0.05, 0.8, 0.1)), ("checkpoint", (0.1, 0.9, 0))):
        [group] = resumed(tmp_path, 3, switch={**other, "on_resume": policy}).optimizers[0].param_groups
        assert (group["lr"], group["momentum"], group["weight_decay"]) == expected
    [group] = resumed(tmp_path, 0, model=Net(lr=0.02), switch={"at": "40st", "on_resume": "config"}).optimizers[0].param_groups
    assert group["lr"] == 0.1  # the first phase went on with 0.02, and SGD is as configured


def test_the_config_policy_keeps_the_place_in_the_schedule(tmp_path: Path) -> None:
    scheduled = Case(partial(to_sgd, scheduler=Cosine()), at=2, scheduled=False)
    run(scheduled, tmp_path)
    seen: list[float] = []

    class See(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    sgd = partial(SGD, lr=0.2, momentum=0.9)
    switch = to_sgd(optimizer=sgd, scheduler=Cosine(), on_resume="config")
    trainer(max_epochs=EPOCHS, callbacks=[switch, See()]).fit(
        Net(), loader(), ckpt_path=tmp_path / "epoch3.ckpt", weights_only=True
    )
    factor = Cosine()(Clock(steps_per_epoch=8, total_steps=48, first_step=16))
    assert seen == [0.2 * factor(step) for step in range(16, 32)]


def test_another_class_or_other_parameters_are_an_error_under_every_policy(tmp_path: Path) -> None:
    class Other(Net):
        def configure_optimizers(self) -> Any:
            return AdamW(self.parameters(), lr=1e-2)

    class Head(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.net[2].parameters(), lr=1e-2)

    run(CASES["epoch"], tmp_path)
    for policy in ("error", "config", "checkpoint"):
        with pytest.raises(CheckpointError, match=r"^the checkpoint's first phase was stepped by Adam, this run's by AdamW\. "):
            resumed(tmp_path, 0, model=Other(), switch={"on_resume": policy})
        with pytest.raises(CheckpointError, match=r"^2 parameters are optimized in the checkpoint only: net\.0\.bias, net\."):
            resumed(tmp_path, 0, model=Head(), switch={"on_resume": policy})
        with pytest.raises(CheckpointError, match=r"^the checkpoint's phase 1 was stepped by SGD, but switch\.optimizer is AdamW "):
            resumed(tmp_path, 3, switch={"optimizer": partial(AdamW, lr=1e-3), "on_resume": policy})


def test_a_switched_checkpoint_is_refused_by_a_run_whose_switch_is_disabled(tmp_path: Path) -> None:
    run(CASES["epoch"], tmp_path)
    with pytest.raises(CheckpointError) as caught:
        resumed(tmp_path, 3, switch={"enabled": False})
    assert str(caught.value) == (
        "the checkpoint was written in phase 1 (SGD, from step 16), but this run has no switch. "
        "Resume with the switch of the run that wrote it."
    )


@pytest.mark.parametrize(("at", "first_sgd_step"), [("1ep", 24), ("4ep", 32)])
def test_a_checkpoint_from_before_the_callback_was_used_switches_now_or_later(at: str, first_sgd_step: int, tmp_path: Path) -> None:
    """The most common manual workflow: go on with an Adam run in SGD."""
    saver = ModelCheckpoint(tmp_path, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    trainer(max_epochs=3, callbacks=[saver], enable_checkpointing=True).fit(Net(), loader())
    with counted_steps() as counts:
        resumed(tmp_path, 2, switch={"at": at})
    assert counts == +Counter({"Adam": first_sgd_step - 24, "SGD": 48 - first_sgd_step})


class NeverAveraged(EMAWeightAveraging):
    """Takes the first weights for the average, so that a run which averages must end elsewhere."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return False


@pytest.mark.parametrize("case", ["scheduled", "mid-epoch", "validated"])
@pytest.mark.parametrize(
    "averaging",
    [
        partial(EMAWeightAveraging, decay=0.9),
        partial(EMAWeightAveraging, decay=0.5, update_every_n_steps=3, update_starting_at_step=10),
        WeightAveraging,
    ],
    ids=["every step", "every third step", "plain mean"],
)
def test_weights_averaged_across_a_switch_resume_to_the_same_average(
    averaging: Callable[[], WeightAveraging], case: str, tmp_path: Path
) -> None:
    """What is compared is the average, which the callback puts into the module at the end."""
    reference, counts = run(CASES[case], tmp_path, extra=(averaging(),))
    assert counts == steps_of(CASES[case], 0, steps_per_epoch=8)
    last, first = run(CASES[case], tmp_path / "last")[0], run(CASES[case], tmp_path / "first", extra=(NeverAveraged(),))[0]
    assert len({reference, last, first}) == 3
    for epoch in range(EPOCHS - 1):
        weights, counts = run(CASES[case], tmp_path, tmp_path / f"epoch{epoch}.ckpt", seed=2, extra=(averaging(),))
        assert counts == steps_of(CASES[case], epoch + 1, steps_per_epoch=8)
        assert weights == reference, f"from epoch {epoch + 1}"
