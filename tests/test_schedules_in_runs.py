"""Schedules in real runs: what each step trains with, across switches and resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, MultiStepLR, StepLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_adaptive import (
    CheckpointError,
    Clock,
    ConfigError,
    Continue,
    Cosine,
    ExactResume,
    Linear,
    MultiStep,
    OneCycle,
    OptimizerSwitchCallback,
    PerOption,
    Piecewise,
    Plateau,
    WarmupStableDecay,
    attach,
)
from tests.cpu_strategies import STRATEGIES, ShardableNet
from tests.pair import Pair
from tests.support import Net, ValidatedNet, dataset, digest, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")


class Seen(Callback):
    """The options of the first group with which each step trained."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.steps.append({key: value for key, value in optimizer.param_groups[0].items() if key != "params"})


def fit(
    module: LightningModule, *callbacks: Callback, ckpt_path: Any = None, data: Any = None, option: str = "lr", **options: Any
) -> list[Any]:
    """Two epochs of eight steps, and what each step trained with."""
    seen = Seen()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    runner = trainer(**{"max_epochs": 2, "callbacks": [*callbacks, seen], "enable_checkpointing": saves, **options})
    validated = loader() if isinstance(module, ValidatedNet) else None
    runner.fit(module, loader() if data is None else data, validated, ckpt_path=ckpt_path, weights_only=True)
    return [step[option] for step in seen.steps if option in step]


def curve(schedule: Any, base: float, total: int, first: int = 0, steps_per_epoch: int = 8) -> list[Any]:
    factor = schedule(Clock(steps_per_epoch=steps_per_epoch, total_steps=total, first_step=first))
    return [pytest.approx(base * factor(step), rel=1e-12) for step in range(total - first)]


def switch(at: str = "1ep", scheduler: Any = "continue", lr: float = 0.02, **options: Any) -> OptimizerSwitchCallback:
    return OptimizerSwitchCallback(at=at, optimizer=partial(SGD, lr=lr, momentum=0.9), scheduler=scheduler, **options)


def scheduled(scheduler: Any, lr: float = 0.1, kind: type[Net] = Net, **options: Any) -> Net:
    return attach(kind(), optimizer=partial(Adam, lr=lr, **options), scheduler=scheduler)


# Continue


def test_a_continued_schedule_keeps_its_clock_on_the_next_base_value() -> None:
    whole = Cosine(warmup="25%")
    lrs = fit(scheduled(whole), switch(at="6st"))
    assert lrs == [*curve(whole, 0.1, 16)[:6], *curve(whole, 0.02, 16)[6:]]


def test_a_schedule_of_the_next_phase_spans_what_remains() -> None:
    assert fit(scheduled(Cosine()), switch(scheduler=Cosine())) == [*curve(Cosine(), 0.1, 16)[:8], *curve(Cosine(), 0.02, 16, 8)]


def test_a_chain_continues_what_began_before_it() -> None:
    """The third phase goes on with the second's schedule, which began at step 4; the fourth as well."""
    decay = WarmupStableDecay(warmup="2st", decay="50%")
    then = switch("8st", then=switch("11st", lr=0.05, scheduler=Continue()))
    lrs = fit(scheduled(Linear()), switch("4st", scheduler=decay, then=then))
    phase = curve(decay, 1.0, 16, 4)
    assert lrs[:4] == curve(Linear(), 0.1, 16)[:4]
    assert lrs[4:] == [
        pytest.approx(base * float(value.expected)) for base, value in zip([0.02] * 7 + [0.05] * 5, phase, strict=True)
    ]


def test_an_untuned_warm_up_that_is_continued_keeps_the_length_that_adam_gave_it() -> None:
    lrs = fit(scheduled(Cosine(warmup="untuned"), betas=(0.9, 0.8)), switch("4st"))
    assert lrs == [*curve(Cosine(warmup="10st"), 0.1, 16)[:4], *curve(Cosine(warmup="10st"), 0.02, 16)[4:]]


def test_other_options_go_on_as_well() -> None:
    both = PerOption(options={"lr": Cosine(), "momentum": Linear(floor=0.5)})
    lrs, momenta = fit(scheduled(both), switch()), fit(scheduled(both), switch(), option="momentum")
    assert lrs[8:] == curve(Cosine(), 0.02, 16)[8:]
    assert momenta == curve(Linear(floor=0.5), 0.9, 16)[8:]


@pytest.fixture
def saved(tmp_path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)


def check_resumes(run: Callable[..., tuple[list[float], str]], saver: ModelCheckpoint, steps: Sequence[int]) -> list[float]:
    """A run of these callbacks, resumed at each of the steps, trains with the same values to the same weights."""
    lrs, weights = run(saver)
    for step in steps:
        assert run(ckpt_path=Path(str(saver.dirpath), f"step={step}.ckpt")) == (lrs[step:], weights), step
    return lrs


def test_a_continued_schedule_goes_on_after_a_resume(saved: ModelCheckpoint) -> None:
    def run(*callbacks: Callback, ckpt_path: Path | None = None) -> tuple[list[float], str]:
        module = scheduled(PerOption(options={"lr": OneCycle(momentum_low=0.8)}))
        chain = switch("4st", scheduler=Cosine(warmup="3st"), then=switch("7st", then=switch("12st", lr=0.1)))
        return fit(module, chain, ExactResume(), *callbacks, ckpt_path=ckpt_path), digest(module)

    check_resumes(run, saved, (2, 5, 8, 11, 15))


@pytest.mark.parametrize(
    ("first", "words"),
    [(None, "constant"), (partial(StepLR, step_size=1), "StepLR"), (Plateau(monitor="val/loss"), "plateau, monitor val/loss")],
)
def test_nothing_continues_what_is_no_function_of_the_step(first: Any, words: str) -> None:
    module = ValidatedNet() if first is None else scheduled(first, kind=ValidatedNet)
    with pytest.raises(ConfigError) as caught:
        fit(module, switch())
    assert str(caught.value) == (
        f"switch.scheduler: 'continue' needs a running schedule that is a function of the step, and {words} is not one. Give the "
        "phase before it a schedule of lightning_adaptive, or the switch one of its own."
    )


# Plateau


class Standing(ValidatedNet):
    """Its metric never gets better."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", 1.0)


def test_pain_11_warm_up_and_plateau_in_one_run() -> None:
    plateau = Plateau(monitor="val/loss", patience=0, factor=0.5, warmup="12st")
    lrs = fit(attach(Standing(), optimizer=partial(SGD, lr=0.1), scheduler=plateau), max_epochs=4)
    scale = [1.0] * 16 + [0.5] * 8 + [0.25] * 8  # the first look is the best so far
    assert lrs == [pytest.approx(0.1 * scale[step] * min((step + 1) / 12, 1)) for step in range(32)]


def test_a_plateau_looks_within_an_epoch_where_it_is_asked_to() -> None:
    plateau = Plateau(monitor="val/loss", patience=0, factor=0.5, interval="step", frequency=2)
    module = attach(Standing(), optimizer=partial(SGD, lr=0.1), scheduler=plateau)
    assert fit(module, val_check_interval=2, max_epochs=1) == pytest.approx([0.1] * 4 + [0.05] * 2 + [0.025] * 2)


def test_a_phase_with_a_plateau_after_one_without_and_one_without_after_it() -> None:
    plateau = Plateau(monitor="val/loss", patience=0, factor=0.5)
    chain = switch("8st", scheduler=plateau, then=switch("32st", scheduler=None))
    module = attach(Standing(), optimizer=partial(Adam, lr=0.1), scheduler=Linear())
    lrs = fit(module, chain, max_epochs=5)
    assert lrs == [*curve(Linear(), 0.1, 40)[:8], *pytest.approx([0.02] * 16 + [0.01] * 8 + [0.02] * 8).expected]


def test_a_plateau_goes_on_after_a_resume(saved: ModelCheckpoint) -> None:
    def run(*callbacks: Callback, ckpt_path: Path | None = None) -> tuple[list[float], str]:
        plateau = Plateau(monitor="val/loss", patience=1, factor=0.5, warmup="10st")
        module = attach(Standing(), optimizer=partial(Adam, lr=0.1), scheduler=Linear())
        lrs = fit(module, switch("4st", scheduler=plateau), ExactResume(), *callbacks, ckpt_path=ckpt_path, max_epochs=5)
        return lrs, digest(module)

    lrs = check_resumes(run, saved, (8, 16, 20, 24))
    assert min(lrs[-8:]) < max(lrs) / 2


def test_a_metric_that_is_not_logged_ends_the_run_with_those_that_are() -> None:
    with pytest.raises(MisconfigurationException, match=r"metric val/los which is not available\. Available metrics are: \['train"):
        fit(scheduled(Plateau(monitor="val/los"), kind=ValidatedNet))


def test_the_curve_of_learning_rates_is_one_across_phases_with_and_without_a_plateau(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    plateau = switch("8st", scheduler=Plateau(monitor="val/loss"))
    fit(scheduled(Linear(), kind=ValidatedNet), plateau, LearningRateMonitor("step"), logger=logger)
    logger.save()
    header, *rows = (tmp_path / "metrics.csv").read_text(encoding="utf-8").splitlines()
    place = header.split(",").index("lr")
    assert len([row for row in rows if row.split(",")[place]]) == 16


def test_deepspeed_has_no_room_for_a_plateau(pair: Pair) -> None:
    message = (
        "switch.scheduler: under DeepSpeed a phase has one scheduler, and a Plateau needs a second, which watches its metric. Give "
        "torch.optim.lr_scheduler.ReduceLROnPlateau, without warm-up."
    )
    assert pair.run(plateau_under_deepspeed) == [message] * 2


def plateau_under_deepspeed() -> str:
    runner = trainer(
        strategy=STRATEGIES["deepspeed 1"](), devices=2, max_epochs=2, callbacks=[switch(scheduler=Plateau(monitor="val/loss"))]
    )
    with pytest.raises(ConfigError) as caught:
        runner.fit(ShardableNet(), loader())
    return str(caught.value)


# What the trainer gives to a schedule


def test_pain_7_the_number_of_steps_is_known_to_every_schedule_without_being_typed() -> None:
    """Devices apart (see pain 8): accumulation, limits, and the place of the phase."""
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "limit_train_batches": 7, "max_epochs": 5}
    assert fit(scheduled(Cosine(warmup="20%")), **options) == curve(Cosine(warmup="3st"), 0.1, 15, steps_per_epoch=3)
    theirs = partial(CosineAnnealingLR, T_max="100%")
    assert fit(scheduled(theirs), **options) == curve(Cosine(), 0.1, 15)
    assert fit(scheduled(Linear()), max_epochs=100, max_steps=11) == curve(Linear(), 0.1, 11)


def test_pain_7_a_torch_scheduler_after_a_switch_gets_the_steps_that_remain() -> None:
    lrs = fit(scheduled(Cosine()), switch("6st", scheduler=partial(CosineAnnealingLR, T_max="100%")))
    assert lrs[6:] == [pytest.approx(value.expected) for value in curve(Cosine(), 0.02, 16, 6)]


class Endless(IterableDataset):
    """Without a length."""

    def __iter__(self) -> Iterator[Any]:
        data = dataset(64)
        return iter(data[index] for index in range(64))


def test_pain_8_a_loader_without_length_needs_max_steps_and_is_told_so() -> None:
    data = DataLoader(Endless(), batch_size=8)
    with pytest.raises(ConfigError) as caught:
        fit(scheduled(Cosine(warmup="5%")), data=data)
    assert str(caught.value) == (
        "scheduler.warmup: 5% cannot be counted: the number of training steps is not known. "
        "Set trainer.max_steps, or write it in steps (st)."
    )
    with pytest.raises(ConfigError, match=r"^scheduler: Cosine must know where it ends, and this training has no known end\. Set"):
        fit(scheduled(Cosine(warmup="2st")), data=data)
    assert fit(scheduled(Cosine(warmup="25%")), data=data, max_epochs=-1, max_steps=12) == curve(Cosine(warmup="3st"), 0.1, 12)
    assert fit(scheduled(MultiStep(milestones=["9st"])), data=data) == curve(MultiStep(milestones=["9st"]), 0.1, 16)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_pain_8_two_processes_count_their_steps_before_they_are_started(pair: Pair) -> None:
    assert pair.run(lrs_of_two) == [[pytest.approx(value.expected) for value in curve(Cosine(warmup="25%"), 0.1, 8)]] * 2


def lrs_of_two() -> list[float]:
    return fit(scheduled(Cosine(warmup="25%")), strategy="ddp", devices=2)


def test_pain_9_the_unit_says_what_a_schedule_counts_in() -> None:
    """A warm-up of one epoch is its eight steps, of eight steps as well, and never eight epochs."""
    assert fit(scheduled(Linear(warmup="1ep"))) == fit(scheduled(Linear(warmup="8st"))) == curve(Linear(warmup="8st"), 0.1, 16)
    in_steps = partial(MultiStepLR, milestones=["4st", "1.5ep"], gamma=0.5)
    assert fit(scheduled(in_steps)) == pytest.approx([0.1] * 4 + [0.05] * 8 + [0.025] * 4)
    held = fit(scheduled(Linear(interval="epoch")))
    assert held == pytest.approx([0.1] * 8 + [0.05] * 8)


def test_pain_9_a_bare_number_is_refused() -> None:
    with pytest.raises(TypeError) as caught:
        Cosine(warmup=4000)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "warmup: 4000 has no unit. Write 4000ep (epochs), 4000st (optimizer steps) or 4000% (of training)."
    )


def test_pain_12_pieces_are_right_after_a_resume_at_any_step(saved: ModelCheckpoint) -> None:
    """torch's SequentialLR resumes with wrong learning rates (pytorch#162591)."""
    pieces = Piecewise(pieces={"rise": Linear(warmup="3st", length="5st"), "fall": Cosine(floor=0.1, warmup="2st")})

    def run(*callbacks: Callback, ckpt_path: Path | None = None) -> tuple[list[float], str]:
        module = scheduled(pieces)
        return fit(module, ExactResume(), *callbacks, ckpt_path=ckpt_path), digest(module)

    assert check_resumes(run, saved, (2, 4, 5, 6, 15)) == curve(pieces, 0.1, 16)


# Resume with another schedule


def late(policy: Any) -> OptimizerSwitchCallback:
    return OptimizerSwitchCallback("15st", partial(AdamW, lr=0.1), on_resume=policy)


@pytest.mark.parametrize("policy", ["config", "checkpoint"])
def test_a_changed_schedule_holds_from_the_first_resumed_step(policy: str, saved: ModelCheckpoint, tmp_path: Path) -> None:
    fit(scheduled(Cosine()), late(policy), saved)
    with pytest.raises(CheckpointError, match=r"scheduler: cosine in the checkpoint, linear, floor 0\.5 in this run"):
        fit(scheduled(Linear(floor=0.5)), late("error"), ckpt_path=tmp_path / "step=8.ckpt")
    lrs = fit(scheduled(Linear(floor=0.5)), late(policy), ckpt_path=tmp_path / "step=8.ckpt")
    assert lrs[:7] == curve(Linear(floor=0.5), 0.1, 16)[8:15]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            Cosine(),
            partial(StepLR, step_size=1),
            "scheduler: cosine in the checkpoint, StepLR in this run, and a scheduler of torch takes its options back from the "
            "checkpoint. Resume with the one of the run that wrote it, or let a switch lead to the other.",
        ),
        (
            partial(StepLR, step_size=1),
            partial(ExponentialLR, gamma=0.5),
            "scheduler: StepLR in the checkpoint, ExponentialLR in this run, and a scheduler of torch takes its options back from "
            "the checkpoint. Resume with the one of the run that wrote it, or let a switch lead to the other.",
        ),
        (
            partial(StepLR, step_size=1),
            Cosine(),
            "the checkpoint holds the state of another scheduler than cosine: step_size, gamma, base_lrs, last_epoch, "
            "_step_count, _is_initial, _get_lr_called_within_step, _last_lr. Resume with the scheduler of the run that wrote it, "
            "or let a switch lead to the new one.",
        ),
    ],
    ids=["to torch's", "among torch's", "from torch's"],
)
def test_a_scheduler_is_never_half_another(first: Any, second: Any, message: str, saved: ModelCheckpoint, tmp_path: Path) -> None:
    fit(scheduled(first), late("error"), saved)
    for policy in ("config", "checkpoint"):
        with pytest.raises(CheckpointError) as caught:
            fit(scheduled(second), late(policy), ckpt_path=tmp_path / "step=8.ckpt")
        assert str(caught.value) == message


def test_scheduler_state_is_plain_and_small(saved: ModelCheckpoint, tmp_path: Path) -> None:
    fit(scheduled(OneCycle(momentum_low=0.5)), saved)
    checkpoint = torch.load(tmp_path / "step=7.ckpt", weights_only=True)
    assert checkpoint["lr_schedulers"] == [{"step": 7}]
