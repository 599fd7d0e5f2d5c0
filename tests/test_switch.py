"""The switch on one process: what it does, what it says, what it refuses."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
import warnings
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_adaptive import ConfigError, Cosine, Handover, Inherit, OptimizerSwitchCallback, ParamGroups, attach
from lightning_adaptive.report import read_curves
from lightning_adaptive.strategies import placement
from tests.support import Net, ValidatedNet, counted_steps, dataset, digest, loader, trainer, weights

TO_SGD = partial(SGD, lr=0.1, momentum=0.9)


class Watch(Callback):
    """Records step, optimizer class and learning rate of every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        optimizer = trainer.optimizers[0]
        self.seen.append((trainer.global_step, type(optimizer).__name__, float(optimizer.param_groups[0]["lr"])))

    @property
    def switched_at(self) -> list[tuple[int, str]]:
        """The first step of each optimizer."""
        firsts = [self.seen[0], *(after for before, after in zip(self.seen, self.seen[1:], strict=False) if after[1] != before[1])]
        return [(step, name) for step, name, _ in firsts]


def fit(switch: OptimizerSwitchCallback, model: LightningModule | None = None, **options: Any) -> Watch:
    watch = Watch()
    callbacks = [watch, *options.pop("callbacks", ()), switch]
    data = options.pop("data") if "data" in options else loader()
    trainer(**{"max_epochs": 4, **options}, callbacks=callbacks).fit(model or Net(), data)
    return watch


@pytest.mark.parametrize(
    ("at", "options", "first_steps"),
    [
        ("2ep", {}, [(0, "Adam"), (16, "SGD")]),
        ("2.5ep", {}, [(0, "Adam"), (20, "SGD")]),
        ("11st", {}, [(0, "Adam"), (11, "SGD")]),
        ("25%", {}, [(0, "Adam"), (8, "SGD")]),
        ("50%", {"max_steps": 20, "max_epochs": -1}, [(0, "Adam"), (10, "SGD")]),
        ("1ep", {"max_steps": 20, "max_epochs": -1}, [(0, "Adam"), (8, "SGD")]),
        ("50%", {"max_steps": 20}, [(0, "Adam"), (10, "SGD")]),
        ("1ep", {"accumulate_grad_batches": 2}, [(0, "Adam"), (4, "SGD")]),
        ("5st", {"accumulate_grad_batches": 3}, [(0, "Adam"), (5, "SGD")]),
        ("1ep", {"limit_train_batches": 5}, [(0, "Adam"), (5, "SGD")]),
        ("2ep", {"gradient_clip_val": 0.1}, [(0, "Adam"), (16, "SGD")]),
        ("2ep", {"precision": "bf16-mixed"}, [(0, "Adam"), (16, "SGD")]),
    ],
)
def test_switches_at_the_step_that_was_asked_for(at: str, options: dict[str, Any], first_steps: list[tuple[int, str]]) -> None:
    with counted_steps() as counts:
        watch = fit(OptimizerSwitchCallback(at=at, optimizer=TO_SGD), **options)
    assert watch.switched_at == first_steps
    total = len({step for step, _, _ in watch.seen})
    assert counts == {"Adam": first_steps[1][0], "SGD": total - first_steps[1][0]}


def test_equals_a_hand_written_run_bit_for_bit() -> None:
    ours = Net()
    fit(OptimizerSwitchCallback(at="12st", optimizer=TO_SGD, scheduler=Cosine(warmup="3st")), ours)
    by_hand = Net()
    optimizer: torch.optim.Optimizer = Adam(by_hand.parameters(), lr=1e-2)
    for step, (inputs, targets) in enumerate(batch for _ in range(4) for batch in loader()):
        if step == 12:
            optimizer = TO_SGD(by_hand.parameters())
        if step >= 12:
            t, warm = step - 12, 3
            factor = (t + 1) / warm if t < warm else (1 + math.cos(math.pi * ((t - warm) / 17))) / 2
            optimizer.param_groups[0]["lr"] = 0.1 * factor
        optimizer.zero_grad()
        nn.functional.cross_entropy(by_hand.net(inputs), targets).backward()
        optimizer.step()
    assert digest(ours) == digest(by_hand)


def test_accumulated_gradients_are_never_dropped() -> None:
    """Two batches accumulated equal one of twice the size, across the switch."""
    small, large = Net(), Net()
    fit(OptimizerSwitchCallback(at="1ep", optimizer=TO_SGD), small, accumulate_grad_batches=2)
    fit(OptimizerSwitchCallback(at="1ep", optimizer=TO_SGD), large, data=loader(batch_size=16))
    for one, other in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_validation_within_the_epoch_does_not_move_the_switch() -> None:
    switch, watch = OptimizerSwitchCallback(at="12st", optimizer=TO_SGD), Watch()
    trainer(max_epochs=3, val_check_interval=3, callbacks=[switch, watch]).fit(ValidatedNet(), loader(), loader())
    assert watch.switched_at == [(0, "Adam"), (12, "SGD")]


def test_the_line_says_what_happened_and_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD, scheduler=Cosine(warmup="2st")))
    [line] = [record.message for record in caplog.records if record.message.startswith("SWITCH")]
    weights = sum(parameter.numel() for parameter in Net().parameters())
    assert line == (
        "SWITCH at step 16 (epoch 2): Adam lr 1.0e-02 -> SGD lr 5.0e-02 (own), because at=2ep was reached; "
        f"cosine, warmup 2st, momentum zero, freed {(weights * 8 + 16) / 1e3:.1f} KB"
    )


def test_a_factory_without_learning_rate_uses_its_class_default_and_the_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fit(OptimizerSwitchCallback(at="2ep", optimizer=RMSprop))
    assert "RMSprop lr 1.0e-02 (own, the default of RMSprop)" in caplog.text


class Freed(Callback):
    """Weak references to the first optimizer, its scheduler and a tensor of its state, asked in the step of the switch."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.references: list[weakref.ref[Any]] = []
        self.alive: list[bool] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step - 1:
            optimizer = trainer.optimizers[0]
            moment = next(iter(optimizer.state.values()))["exp_avg"]
            self.references = [weakref.ref(found) for found in (optimizer, trainer.lr_scheduler_configs[0].scheduler, moment)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step + 1:
            self.alive = [reference() is not None for reference in self.references]


def test_the_old_optimizer_its_state_and_its_scheduler_are_freed_without_the_garbage_collector() -> None:
    freed = Freed(step=16)
    model = attach(Net(), optimizer=partial(Adam, lr=1e-2), scheduler=Cosine())
    gc.disable()
    try:
        fit(OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), model, callbacks=[freed])
    finally:
        gc.enable()
    assert freed.alive == [False, False, False]


def test_what_somebody_else_holds_is_not_called_freed(caplog: pytest.LogCaptureFixture) -> None:
    class Holder(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.held = trainer.optimizers[0]

    with caplog.at_level(logging.INFO):
        fit(OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), callbacks=[Holder()])
    assert "still held elsewhere" in caplog.text
    assert ", freed" not in caplog.text


@pytest.mark.parametrize("monitor_first", [True, False])
def test_one_curve_of_the_learning_rate_crosses_the_switch(tmp_path: Path, monitor_first: bool) -> None:
    model = attach(Net(), optimizer=partial(Adam, lr=1e-2), scheduler=Cosine())
    switch, monitor = OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), LearningRateMonitor("step")
    callbacks = [monitor, switch] if monitor_first else [switch, monitor]
    logger = CSVLogger(tmp_path, name="", version="run")
    trainer(max_epochs=4, callbacks=callbacks, logger=logger, log_every_n_steps=1).fit(model, loader())
    curves = read_curves(tmp_path / "run" / "metrics.csv")
    assert [name for name in curves if name.startswith("lr")] == ["lr"]
    steps, lrs = curves["lr"]
    assert steps == list(range(32))
    assert lrs[15] < 1e-2
    assert lrs[16:] == [0.1] * 16
    assert curves["phase"] == ([0, 16], [0.0, 1.0])


def test_a_users_own_first_phase_keeps_its_curve(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    callbacks = [OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), LearningRateMonitor("step")]
    trainer(max_epochs=4, callbacks=callbacks, logger=logger, log_every_n_steps=1).fit(Net(), loader())
    curves = read_curves(tmp_path / "run" / "metrics.csv")
    assert curves["lr-Adam"] == (list(range(16)), [0.01] * 16)
    assert curves["lr"] == (list(range(16, 32)), [0.1] * 16)


def test_a_chain_of_switches(caplog: pytest.LogCaptureFixture) -> None:
    last = OptimizerSwitchCallback(at="75%", optimizer=partial(AdamW, lr=1e-3))
    switch = OptimizerSwitchCallback(at="1ep", optimizer=TO_SGD, then=last)
    with caplog.at_level(logging.INFO):
        watch = fit(switch)
    assert watch.switched_at == [(0, "Adam"), (8, "SGD"), (24, "AdamW")]
    assert caplog.text.count("SWITCH at") == 2
    assert repr(switch) == "OptimizerSwitchCallback(at=1ep; at=75%)"


class SignNet(Net):
    """Its optimizer has no learning rate."""

    def configure_optimizers(self) -> Any:
        return SignOfGradient(self.parameters(), {})


class SignOfGradient(Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad.sign(), alpha=1e-3)
        return loss


def test_from_an_optimizer_without_a_learning_rate(caplog: pytest.LogCaptureFixture) -> None:
    with counted_steps() as counts, caplog.at_level(logging.INFO):
        trainer(max_epochs=4, callbacks=[OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD)]).fit(SignNet(), loader())
    assert counts == {"SignOfGradient": 16, "SGD": 16}
    assert "SignOfGradient lr - -> SGD lr 1.0e-01" in caplog.text


def test_a_next_optimizer_without_a_learning_rate_is_refused_before_the_first_step() -> None:
    with counted_steps() as counts, pytest.raises(ConfigError) as caught:
        fit(OptimizerSwitchCallback(at="2ep", optimizer=partial(SignOfGradient, defaults={})))
    assert str(caught.value) == "switch.optimizer: SignOfGradient has no learning rate (lr) to schedule. Choose another optimizer."
    assert counts == {}


def test_a_phase_inherits_the_ratios_that_the_one_before_it_has_kept() -> None:
    groups = ParamGroups(weights={"match": "*.weight", "weight_decay": 0})
    last = OptimizerSwitchCallback(at="2ep", optimizer=partial(SGD, lr=0.5))
    switch = OptimizerSwitchCallback(at="1ep", optimizer=TO_SGD, param_groups=groups, handover="keep", then=last)
    runner = trainer(max_epochs=3, callbacks=[switch])
    runner.fit(TwoRates(), loader())
    rates = {group["name"]: group["lr"] for group in runner.optimizers[0].param_groups}
    assert rates == pytest.approx({"weights": 0.5, "default": 0.05}, rel=1e-12)


class TwoRates(Net):
    def configure_optimizers(self) -> Any:
        named = dict(self.named_parameters())
        weights = [parameter for name, parameter in named.items() if ".weight" in name]
        biases = [parameter for name, parameter in named.items() if ".bias" in name]
        return Adam([{"params": weights, "lr": 1e-2}, {"params": biases, "lr": 1e-3}])


def test_lbfgs_as_target() -> None:
    with counted_steps() as counts:
        fit(OptimizerSwitchCallback(at="2ep", optimizer=partial(LBFGS, max_iter=3)), data=loader(batch_size=32))
    assert counts == {"Adam": 4, "LBFGS": 4}


@pytest.mark.parametrize(
    "scheduler",
    [partial(StepLR, step_size=1, gamma=0.5), {"scheduler": partial(StepLR, step_size=8, gamma=0.5), "interval": "step"}],
)
def test_schedulers_of_torch(scheduler: Any) -> None:
    watch = fit(OptimizerSwitchCallback(at="2ep", optimizer=partial(SGD, lr=0.1), scheduler=scheduler))
    assert [lr for _, _, lr in watch.seen[16:]] == [0.1] * 8 + [0.05] * 8


def test_gradient_clipping_of_the_next_phase_and_back() -> None:
    class ClipValue(Callback):
        def __init__(self) -> None:
            self.seen: list[float | None] = []

        def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
            self.seen.append(trainer.gradient_clip_val)

    seen = ClipValue()
    last = OptimizerSwitchCallback(at="3ep", optimizer=TO_SGD, gradient_clip_val="keep")
    switch = OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD, gradient_clip_val=0.25, then=last)
    runner = trainer(max_epochs=4, gradient_clip_val=1.0, callbacks=[switch, seen])
    runner.fit(Net(), loader())
    assert seen.seen == [1.0] * 16 + [0.25] * 16
    assert runner.gradient_clip_val == 1.0


def test_gradient_clipping_can_end_with_the_phase() -> None:
    clipped, free = Net(), Net()
    fit(OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), clipped, gradient_clip_val=1e-3)
    fit(OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD, gradient_clip_val=None), free, gradient_clip_val=1e-3)
    assert not torch.equal(clipped.net[0].weight, free.net[0].weight)


def test_every_step_can_be_saved(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), callbacks=[saver], enable_checkpointing=True)
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(files) == 32
    classes = []
    for file in files:
        saved = torch.load(file, weights_only=True)
        [state] = [value for key, value in saved["callbacks"].items() if key.startswith("OptimizerSwitchCallback")]
        assert state["version"] == 1
        assert len(saved["optimizer_states"][0]["state"]) == 4
        classes.append((state["optimizer"], "betas" in saved["optimizer_states"][0]["param_groups"][0]))
    # The checkpoint at the moment of the switch holds the old phase whole: the switch comes with the next batch.
    assert classes == [("Adam", True)] * 16 + [("SGD", False)] * 16


class Groups(Net):
    """Adam over named groups with their own learning rates and decays, a frozen layer, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(16, 16)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(4, 4)
        self.tied = self.head.weight

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.net(self.frozen(batch[0]))
        return nn.functional.cross_entropy(self.head(hidden) + hidden @ self.tied, batch[1])

    def configure_optimizers(self) -> Any:
        decayed = [self.net[0].weight, self.net[2].weight]
        plain = [self.net[0].bias, self.net[2].bias]
        return AdamW(
            [
                {"params": decayed, "name": "decayed"},
                {"params": plain, "name": "plain", "weight_decay": 0.0},
                {"params": list(self.head.parameters()), "name": "head", "lr": 5e-3},
            ],
            lr=1e-3,
            weight_decay=0.1,
        )


def test_groups_cross_the_switch_with_their_members_ratios_and_zero_decays() -> None:
    model, runner = Groups(), None
    frozen = copy.deepcopy(model.frozen.weight)
    switch = OptimizerSwitchCallback(at="2ep", optimizer=partial(SGD, lr=0.02, weight_decay=5e-4), scheduler=Cosine())
    runner = trainer(max_epochs=4, callbacks=[switch])
    runner.fit(model, loader())
    groups = runner.optimizers[0].param_groups
    assert [(group["name"], group["initial_lr"], group["weight_decay"]) for group in groups] == [
        ("decayed", 0.02, 5e-4),
        ("plain", 0.02, 0.0),
        ("head", 0.1, 5e-4),
    ]
    expected = [
        [model.net[0].weight, model.net[2].weight],
        [model.net[0].bias, model.net[2].bias],
        [model.head.weight, model.head.bias],
    ]
    assert [[id(tensor) for tensor in group["params"]] for group in groups] == [[id(t) for t in group] for group in expected]
    assert torch.equal(model.frozen.weight, frozen)


def test_a_head_only_optimizer_never_trains_the_backbone() -> None:
    class HeadOnly(Net):
        def configure_optimizers(self) -> Any:
            return Adam(self.net[2].parameters(), lr=1e-2)  # the backbone still requires gradients

    model = HeadOnly()
    backbone, head = model.net[0].weight.clone(), model.net[2].weight.clone()
    fit(OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), model)
    assert torch.equal(model.net[0].weight, backbone)
    assert not torch.equal(model.net[2].weight, head)


def test_param_groups_object_makes_one_group_of_all_trainable_parameters() -> None:
    model = Groups()
    runner = trainer(max_epochs=3, callbacks=[OptimizerSwitchCallback(at="1ep", optimizer=TO_SGD, param_groups=ParamGroups())])
    runner.fit(model, loader())
    [group] = runner.optimizers[0].param_groups
    assert len(group["params"]) == 6


def test_parameters_added_to_the_running_optimizer_are_switched_too() -> None:
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters()), "lr": 1e-3})

    class HeadOnly(Net):
        def configure_optimizers(self) -> Any:
            return Adam(self.net[2].parameters(), lr=1e-2)

    runner = trainer(max_epochs=4, callbacks=[OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), Unfreeze()])
    runner.fit(HeadOnly(), loader())
    groups = runner.optimizers[0].param_groups
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(2, 0.1), (2, pytest.approx(0.01))]


def test_a_second_fit_goes_on_in_the_phase_that_was_reached() -> None:
    switch, model = OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), Net()
    runner = trainer(max_epochs=3, callbacks=[switch])
    runner.fit(model, loader())
    runner.fit_loop.max_epochs = 4
    with counted_steps() as counts:
        runner.fit(model, loader())
    assert counts == {"SGD": 8}
    with counted_steps() as counts:
        trainer(max_epochs=3, callbacks=[switch]).fit(Net(), loader())
    assert counts == {"Adam": 16, "SGD": 8}


def test_disabled_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    switch = OptimizerSwitchCallback(enabled=False)
    with counted_steps() as counts, caplog.at_level(logging.INFO):
        fit(switch)
    assert counts == {"Adam": 32}
    assert "SWITCH" not in caplog.text
    assert repr(switch) == "OptimizerSwitchCallback(enabled=False)"
    then_disabled = OptimizerSwitchCallback(at="1ep", optimizer=TO_SGD, then=switch)
    assert len(then_disabled.chain) == 1


def test_the_callback_pickles_and_copies() -> None:
    switch = OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD, scheduler=Cosine(warmup="5%"))
    for copied in (copy.deepcopy(switch), pickle.loads(pickle.dumps(switch))):
        with counted_steps() as counts:
            fit(copied)
        assert counts == {"Adam": 16, "SGD": 16}


class Endless(IterableDataset):
    """Batches without end or length."""

    def __iter__(self) -> Any:
        while True:
            yield from dataset(8)


def endless() -> DataLoader:
    return DataLoader(Endless(), batch_size=8)


def test_a_loader_without_length_counts_in_steps() -> None:
    watch = fit(OptimizerSwitchCallback(at="5st", optimizer=TO_SGD), data=endless(), max_steps=9, max_epochs=-1)
    assert watch.switched_at == [(0, "Adam"), (5, "SGD")]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"at": 30}, TypeError, "at: 30 has no unit. Write 30ep (epochs), 30st (optimizer steps) or 30% (of training)."),
        ({"at": "5"}, ValueError, "at: '5' has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training)."),
        (
            {"at": None},
            ValueError,
            "at: a switch needs its moment: 5ep (epochs), 5st (optimizer steps) or 5% (of training); or a trigger (when).",
        ),
        (
            {"optimizer": None},
            ValueError,
            "optimizer: a switch needs the factory of its next optimizer, for example partial(SGD, lr=0.1).",
        ),
        (
            {"optimizer": SGD([torch.zeros(1)])},
            TypeError,
            "optimizer: a SGD that is already built holds its own parameters. Pass a factory: partial(SGD, ...) from functools.",
        ),
        (
            {"optimizer_index": -1},
            ValueError,
            "optimizer_index: -1 is no number of optimizers, counted from 0. Write a whole number from 0 on.",
        ),
        (
            {"then": OptimizerSwitchCallback(at="3ep", optimizer=TO_SGD, on_resume="config")},
            ValueError,
            "then: optimizer_index, on_resume and dry_run are given to the first switch, and hold for those after it.",
        ),
        ({"on_resume": "both"}, ValueError, "on_resume: 'both' is not one of error, config, checkpoint."),
        (
            {"handover": "smoth"},
            ValueError,
            "handover: 'smoth' does not exist. Write 'own', 'keep', 'smooth', 'swats' or a Handover. Did you mean 'smooth'?",
        ),
        ({"param_groups": 3}, TypeError, "param_groups: 3 says nothing about groups. Write 'inherit' or ParamGroups()."),
        (
            {"gradient_clip_val": "no"},
            TypeError,
            "gradient_clip_val: 'no' is no clipping value. Write a number, null (no clipping) or 'keep'.",
        ),
        ({"gradient_clip_val": -1.0}, ValueError, "gradient_clip_val: -1.0 is below zero."),
    ],
)
def test_the_constructor_refuses(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        OptimizerSwitchCallback(**{"at": "2ep", "optimizer": TO_SGD, **arguments})
    assert str(caught.value) == message
    assert isinstance(caught.value, ConfigError)


def test_handover_refuses_a_rule_that_does_not_exist() -> None:
    with pytest.raises(
        ConfigError, match=r"^momentum: the rule 'carri' does not exist\. Rules: zero, carry\. Did you mean 'carry'\?$"
    ):
        Handover(momentum="carri")
    assert Handover.of("own") == Handover()


def fails_when_it_is_built(params: Any) -> SGD:
    raise RuntimeError("no such device")


@pytest.mark.parametrize(
    ("switch", "options", "message"),
    [
        (
            {"at": "900ep"},
            {},
            "switch.at: 900ep is step 7200, but training ends after 32 steps. Choose an earlier moment.",
        ),
        ({"at": "32st"}, {}, "switch.at: 32st is step 32, but training ends after 32 steps. Choose an earlier moment."),
        (
            {"at": "0st"},
            {},
            "switch.at: 0st is step 0; the first phase would not make a step. Begin with this optimizer.",
        ),
        (
            {"at": "2ep", "then": OptimizerSwitchCallback(at="50%", optimizer=TO_SGD)},
            {},
            "switch.then.at: 50% is step 16, but the switch before it is at step 16. Moments must grow.",
        ),
        (
            {"scheduler": Cosine(warmup="30ep")},
            {},
            "switch.scheduler.warmup: 30ep is 240 steps, but the schedule spans only 16.",
        ),
        ({}, {"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches: 0 batches make no step. Write at least 1."),
        (
            {"optimizer": partial(Adam, betas=(0.9, 1.5))},
            {},
            "switch.optimizer: cannot be built: Invalid beta parameter at index 1: 1.5",
        ),
        (
            {"at": "50%"},
            {"max_time": "00:00:10:00", "max_epochs": -1},
            "switch.at: 50% cannot be counted: the number of training steps is not known. "
            "Set trainer.max_steps, or write it in steps (st).",
        ),
    ],
)
def test_a_phase_that_cannot_work_ends_the_run_before_its_first_step(
    switch: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with counted_steps() as counts, pytest.raises(ConfigError) as caught:
        fit(OptimizerSwitchCallback(**{"at": "2ep", "optimizer": TO_SGD, **switch}), **options)
    assert str(caught.value) == message
    assert counts == {}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            {"optimizer": LBFGS},
            {},
            "switch.optimizer: LBFGS and trainer.precision=16-mixed do not go together. Train in bf16-mixed or 32-true.",
        ),
        (
            {"optimizer": partial(SGD, lr=0.1, fused=True)},
            {"gradient_clip_val": 1.0},
            "switch.optimizer.fused: a fused SGD unscales by itself, so gradients cannot be clipped before under "
            "trainer.precision=16-mixed. Set fused to false, or gradient_clip_val to null.",
        ),
        (
            {"optimizer": partial(SGD, lr=0.1, fused=True), "gradient_clip_val": 1.0},
            {},
            "switch.optimizer.fused: a fused SGD unscales by itself, so gradients cannot be clipped before under "
            "trainer.precision=16-mixed. Set fused to false, or gradient_clip_val to null.",
        ),
        ({"optimizer": partial(SGD, lr=0.1, fused=True), "gradient_clip_val": None}, {"gradient_clip_val": 1.0}, None),
        ({"optimizer": TO_SGD}, {"gradient_clip_val": 1.0}, None),
    ],
)
def test_what_fails_under_16_bit_only_at_its_first_step_is_refused_before(
    arguments: dict[str, Any], options: dict[str, Any], message: str | None
) -> None:
    # Lightning turns "16-mixed" on the CPU into bfloat16; with a scaler of its own it really scales.
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    switch = OptimizerSwitchCallback(**{"at": "2ep", **arguments})
    with counted_steps() as counts:
        if message is None:
            fit(switch, plugins=[precision], **options)
            assert counts["SGD"] == 16
            return
        with pytest.raises(ConfigError) as caught:
            fit(switch, plugins=[precision], **options)
    assert str(caught.value) == message
    assert counts == {}


def test_an_error_of_the_factory_comes_before_the_first_step() -> None:
    with counted_steps() as counts, pytest.raises(RuntimeError, match="no such device"):
        fit(OptimizerSwitchCallback(at="2ep", optimizer=fails_when_it_is_built))
    assert counts == {}


def test_durations_in_epochs_need_a_length() -> None:
    with pytest.raises(ConfigError, match=r"^switch\.at: 2ep cannot be counted: the training loader has no length\."):
        fit(OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), data=endless(), max_steps=9, max_epochs=-1)


def test_a_strategy_that_is_not_known_is_named() -> None:
    class MyStrategy:
        """Not even one of Lightning's."""

    unknown = SimpleNamespace(strategy=MyStrategy())
    with pytest.raises(ConfigError) as caught:
        placement(unknown).check()  # type: ignore[arg-type]
    assert str(caught.value) == (
        "trainer.strategy: a switch is not available on MyStrategy. Available: SingleDeviceStrategy, DDPStrategy, FSDPStrategy, "
        "ModelParallelStrategy, DeepSpeedStrategy, and what is derived from them. Another one needs a class of its own in "
        "lightning_adaptive/strategies.py, a subclass of Plain."
    )


def test_fsdp_without_the_modules_own_parameters_is_refused() -> None:
    flat = SimpleNamespace(strategy=FSDPStrategy(use_orig_params=False))
    with pytest.raises(ConfigError, match=r"^trainer\.strategy\.use_orig_params: .* Leave use_orig_params at its default, true\.$"):
        placement(flat).check()  # type: ignore[arg-type]


class TwoOptimizers(Net):
    """Manual optimization: each layer has its own optimizer and, if asked, scheduler; each steps once a batch."""

    def __init__(self, scheduled: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.scheduled = scheduled

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers, schedulers = self.optimizers(), self.lr_schedulers()
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        assert not self.scheduled or len(schedulers) == 2
        for scheduler in schedulers or ():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = [Adam(self.net[place].parameters(), lr=1e-2) for place in (0, 2)]
        return optimizers, [StepLR(optimizer, 8, 0.5) for optimizer in optimizers] if self.scheduled else []


@pytest.mark.parametrize("index", [0, 1])
def test_manual_optimization_switches_one_of_two(index: int, tmp_path: Path) -> None:
    def run(resumed_from: Path | None = None) -> tuple[list[str], list[int], Any, dict[str, int]]:
        switch = OptimizerSwitchCallback(at="20st", optimizer=TO_SGD, scheduler=Cosine(length="30st"), optimizer_index=index)
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = [switch, *([] if resumed_from else [saver])]
        runner, model = trainer(max_epochs=3, callbacks=callbacks, enable_checkpointing=not resumed_from), TwoOptimizers()
        with counted_steps() as counts:
            runner.fit(model, loader(), ckpt_path=resumed_from, weights_only=True)
        steps = [config.scheduler.state_dict().get("step", -1) for config in runner.lr_scheduler_configs]
        return [type(optimizer).__name__ for optimizer in runner.optimizers], steps, weights(model), dict(counts)

    names, steps, reference, counts = run()
    assert names == (["SGD", "Adam"] if index == 0 else ["Adam", "SGD"])
    assert steps[index] == 14  # of 24 batches, the switch came with the eleventh: 20 steps of two optimizers
    assert steps[1 - index] == -1
    assert counts == {"Adam": 20 + 14, "SGD": 14}
    for epoch in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the resumed run saves nothing
            _, _, resumed, _ = run(tmp_path / f"epoch={epoch}.ckpt")
        assert all(torch.equal(reference[name], resumed[name]) for name in reference)


def test_under_manual_optimization_a_moment_may_exceed_the_number_of_batches() -> None:
    with counted_steps() as counts:
        fit(OptimizerSwitchCallback(at="40st", optimizer=TO_SGD), TwoOptimizers(), max_epochs=3)
    assert counts == {"Adam": 40 + 4, "SGD": 4}  # 24 batches, two steps each


@pytest.mark.parametrize(
    ("arguments", "scheduled", "message"),
    [
        (
            {"at": "2ep"},
            True,
            "switch.at: 2ep cannot be counted under manual optimization, where steps count every step() of each optimizer. "
            "Write it in such steps (st).",
        ),
        ({"optimizer_index": 2}, True, "optimizer_index: 2 is none of the 2 optimizers of TwoOptimizers, counted from 0."),
        (
            {"scheduler": Cosine(length="5st")},
            False,
            "switch.scheduler: the module steps no scheduler for this optimizer, so none can take its place. Leave it out.",
        ),
        (
            {"param_groups": ParamGroups()},
            True,
            "switch.param_groups: under manual optimization the groups stay as they are. Write 'inherit'.",
        ),
        (
            {"gradient_clip_val": 1.0},
            True,
            "switch.gradient_clip_val: under manual optimization the module clips by itself. Write 'keep'.",
        ),
    ],
)
def test_manual_optimization_refuses(arguments: dict[str, Any], scheduled: bool, message: str) -> None:
    with counted_steps() as counts, pytest.raises(ConfigError) as caught:
        fit(OptimizerSwitchCallback(**{"at": "20st", "optimizer": TO_SGD, **arguments}), TwoOptimizers(scheduled))
    assert str(caught.value) == message
    assert counts == {}


def test_an_empty_slot_of_a_config_means_its_default() -> None:
    [switch] = OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD, scheduler={}, param_groups={}, handover={}).chain
    assert switch.scheduler is None
    assert isinstance(switch.param_groups, Inherit)
    assert switch.handover == Handover()


class MyAveraging(StochasticWeightAveraging):
    """One's own is meant as well."""


@pytest.mark.parametrize("kind", [StochasticWeightAveraging, MyAveraging])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_lightnings_weight_averaging_that_replaces_schedulers_is_refused(kind: type[Callback], first: bool) -> None:
    switch, averaging = OptimizerSwitchCallback(at="2ep", optimizer=TO_SGD), kind(swa_lrs=1e-2)
    runner = trainer(max_epochs=4, callbacks=[averaging, switch] if first else [switch, averaging])
    with counted_steps() as counts, pytest.raises(ConfigError) as caught:
        runner.fit(Net(), loader())
    assert str(caught.value) == (
        f"callbacks: {kind.__name__} and OptimizerSwitchCallback both replace the scheduler during training, so one would undo the "
        "other. Remove one of them; weights are averaged without a scheduler by lightning's WeightAveraging or EMAWeightAveraging."
    )
    assert counts == {}


def test_a_disabled_switch_leaves_weight_averaging_alone() -> None:
    averaging = StochasticWeightAveraging(swa_lrs=1e-2)
    with counted_steps() as counts:
        trainer(max_epochs=4, callbacks=[averaging, OptimizerSwitchCallback(enabled=False)]).fit(Net(), loader())
    assert counts["Adam"] == 32
