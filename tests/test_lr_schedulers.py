"""What steps the groups' options: schedules of any option, a plateau with a warm-up, durations in torch's own schedulers."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau, StepLR

from lightning_adaptive import (
    CheckpointError,
    Clock,
    ConfigError,
    Constant,
    Continue,
    Cosine,
    Linear,
    MultiStep,
    OneCycle,
    PerOption,
    Piecewise,
    Plateau,
)
from lightning_adaptive.lr_schedulers import PlateauLR, ScheduleLR, build_scheduler, describe_schedule

CLOCK = Clock(steps_per_epoch=10, total_steps=100)


def optimizer(kind: Callable[..., Optimizer] = AdamW, **options: Any) -> Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.01}]
    return kind(groups, **{"lr": 0.1, **options})


def stepped(built: Optimizer, scheduler: Any, *arguments: Any) -> None:
    built.step()
    scheduler.step(*arguments)


# Other options than the learning rate


@pytest.mark.parametrize(
    ("ours", "theirs", "read"),
    [
        (partial(SGD, momentum=0.95), {"max_momentum": 0.95, "base_momentum": 0.85}, lambda group: group["momentum"]),
        (partial(Adam, betas=(0.95, 0.99)), {"max_momentum": 0.95, "base_momentum": 0.85}, lambda group: group["betas"]),
    ],
    ids=["momentum", "beta1"],
)
def test_one_cycle_moves_the_momentum_as_torch_does(ours: Any, theirs: dict[str, float], read: Callable[[Any], Any]) -> None:
    one, other = optimizer(ours), optimizer(ours)
    driven = ScheduleLR(one, OneCycle(momentum_low=0.85 / 0.95), CLOCK)
    reference = OneCycleLR(other, max_lr=[0.1, 0.01], total_steps=100, **theirs)
    for step in range(100):
        for group, expected in zip(one.param_groups, other.param_groups, strict=True):
            assert group["lr"] == pytest.approx(expected["lr"], rel=1e-12), step
            assert read(group) == pytest.approx(read(expected), rel=1e-12), step
        if step < 99:
            stepped(one, driven)
            stepped(other, reference)


def test_each_group_keeps_its_own_base_value() -> None:
    built = optimizer(weight_decay=0.4)
    built.param_groups[1]["weight_decay"] = 0.0
    driven = ScheduleLR(built, PerOption(options={"lr": Cosine(), "weight_decay": Linear(floor=0.5)}), CLOCK)
    for step in range(100):
        assert [group["weight_decay"] for group in built.param_groups] == [pytest.approx(0.4 * (1 - step / 200), rel=1e-12), 0.0]
        assert driven.values_at(step) == [
            {"lr": group["lr"], "weight_decay": group["weight_decay"]} for group in built.param_groups
        ]
        stepped(built, driven)
    assert [group["initial_weight_decay"] for group in built.param_groups] == [0.4, 0.0]


@pytest.mark.parametrize("step", [0, 1, 37, 99])
def test_its_state_is_the_step_and_a_resume_at_any_step_goes_on(step: int) -> None:
    schedule = PerOption(options={"lr": OneCycle(momentum_low=0.5), "weight_decay": Linear(warmup="5st")})

    def begun() -> tuple[Optimizer, ScheduleLR]:
        built = optimizer(weight_decay=0.3)
        return built, ScheduleLR(built, schedule, CLOCK)

    one, driven = begun()
    for _ in range(step):
        stepped(one, driven)
    assert driven.state_dict() == {"step": step}
    saved = io.BytesIO()
    torch.save({"optimizer": one.state_dict(), "scheduler": driven.state_dict()}, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    other, resumed = begun()
    other.load_state_dict(loaded["optimizer"])
    resumed.load_state_dict(loaded["scheduler"])
    for _ in range(100 - step):
        for ours, theirs in zip(one.param_groups, other.param_groups, strict=True):
            assert {key: ours[key] for key in ours if key != "params"} == {key: theirs[key] for key in theirs if key != "params"}
        stepped(one, driven)
        stepped(other, resumed)


def test_a_resume_with_another_schedule_is_on_it_at_once_and_lets_go_what_only_the_old_one_drove() -> None:
    one = optimizer(betas=(0.8, 0.99), weight_decay=0.3)
    driven = ScheduleLR(one, PerOption(options={"momentum": Linear(), "weight_decay": Cosine()}), CLOCK)
    for _ in range(50):
        stepped(one, driven)
    assert one.param_groups[0]["betas"] == (pytest.approx(0.4), 0.99)
    other = optimizer(betas=(0.8, 0.99), weight_decay=0.3)
    resumed = ScheduleLR(other, Linear(), CLOCK)
    other.load_state_dict(one.state_dict())
    resumed.load_state_dict(driven.state_dict())
    [first, second] = other.param_groups
    assert (first["lr"], first["betas"], first["weight_decay"]) == (pytest.approx(0.05), (0.8, 0.99), 0.3)
    assert (second["lr"], second["betas"], second["weight_decay"]) == (pytest.approx(0.005), (0.8, 0.99), 0.3)
    assert resumed.get_last_lr() == [first["lr"], second["lr"]]


def test_adagrads_own_initial_value_is_no_base_value() -> None:
    built = optimizer(Adagrad, initial_accumulator_value=0.1)
    ScheduleLR(built, Cosine(), CLOCK).refresh()
    assert built.param_groups[0]["initial_accumulator_value"] == 0.1
    assert "accumulator_value" not in built.param_groups[0]


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    lr = torch.tensor(0.1)
    built = Adam([torch.nn.Parameter(torch.ones(2))], lr=lr, capturable=False, foreach=False)
    driven = ScheduleLR(built, Cosine(), CLOCK)
    stepped(built, driven)
    driven.refresh()
    assert built.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.1 * (1 + math.cos(math.pi / 100)) / 2)


def test_a_group_that_is_added_later_has_as_its_base_what_it_was_given() -> None:
    built = optimizer(weight_decay=0.2)
    driven = ScheduleLR(built, PerOption(options={"lr": Linear(), "weight_decay": Linear()}), CLOCK)
    for _ in range(50):
        stepped(built, driven)
    built.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.5, "weight_decay": 1.0})
    stepped(built, driven)
    assert (built.param_groups[2]["lr"], built.param_groups[2]["weight_decay"]) == (pytest.approx(0.245), pytest.approx(0.49))


def test_since_lets_a_schedule_go_on() -> None:
    one, other = optimizer(), optimizer()
    whole = ScheduleLR(one, MultiStep(milestones=["3ep", "70%"], warmup="5%"), CLOCK)
    for _ in range(37):
        stepped(one, whole)
    continued = ScheduleLR(other, whole.schedule, Clock(steps_per_epoch=10, total_steps=100, first_step=37), since=37)
    for _ in range(37, 100):
        assert [group["lr"] for group in one.param_groups] == [group["lr"] for group in other.param_groups]
        stepped(one, whole)
        stepped(other, continued)
    assert continued.state_dict() == {"step": 63}


REFUSED: list[tuple[Any, Any, str]] = [
    (
        AdamW,
        PerOption(options={"weigth_decay": Linear()}),
        "scheduler: AdamW has no number 'weigth_decay' to drive. Did you mean 'weight_decay'? "
        "Numbers: eps, weight_decay, momentum.",
    ),
    (
        AdamW,
        PerOption(options={"beta1": Linear()}),
        "scheduler: AdamW has no number 'beta1' to drive. momentum stands for beta1. Numbers: eps, weight_decay, momentum.",
    ),
    (
        Adagrad,
        OneCycle(momentum_low=0.5),
        "scheduler: Adagrad has no number 'momentum' to drive. Numbers: lr_decay, eps, weight_decay, initial_accumulator_value.",
    ),
    (AdamW, PerOption(options={"amsgrad": Linear()}), "scheduler: AdamW has no number 'amsgrad' to drive. "),
    (
        SGD,
        OneCycle(momentum_low=0.5),
        "scheduler: momentum of SGD is 0 in every group, so a schedule of it does nothing.",
    ),
    (SGD, Continue(), "scheduler: there is no running schedule to continue; only a switch has one. Choose another."),
    (
        SGD,
        {"scheduler": Cosine(), "interval": "epoch"},
        "scheduler.interval: 'epoch' is for a factory of a torch scheduler. Cosine is stepped at each optimizer step; what it "
        "looks at and how often are options of its own.",
    ),
    (
        SGD,
        {"scheduler": Plateau(monitor="val/loss"), "monitor": "val/loss"},
        "scheduler.monitor: 'val/loss' is for a factory of a torch scheduler. Plateau is stepped at each optimizer step; what it "
        "looks at and how often are options of its own.",
    ),
    (
        SGD,
        {"scheduler": partial(StepLR, step_size="1ep"), "interval": "epoch"},
        "scheduler.interval: durations are counted in steps, so the scheduler is stepped at each. Write step.",
    ),
]


@pytest.mark.parametrize(("kind", "scheduler", "message"), REFUSED, ids=[message[:60] for *_, message in REFUSED])
def test_refuses(kind: Any, scheduler: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_scheduler(scheduler, optimizer(kind), CLOCK)
    assert str(caught.value).startswith(message)


def test_the_state_of_another_scheduler_is_refused() -> None:
    built = optimizer()
    other = CosineAnnealingLR(optimizer(), T_max=10)
    with pytest.raises(CheckpointError, match=r"^the checkpoint holds the state of another scheduler than cosine: T_max, "):
        ScheduleLR(built, Cosine(), CLOCK).load_state_dict(other.state_dict())
    plateau = PlateauLR(ScheduleLR(built, Plateau(monitor="val/loss"), CLOCK))
    with pytest.raises(CheckpointError, match=r"^the checkpoint holds the state of another scheduler than plateau, monitor"):
        plateau.load_state_dict(ReduceLROnPlateau(optimizer()).state_dict())


# Plateau


def metrics(count: int = 60, seed: int = 0) -> list[float]:
    """Falls, stands still with noise, falls again."""
    draw = random.Random(seed)
    return [max(1 - step / 20, 0.3) * (0.5 if step > 45 else 1) + draw.uniform(0, 0.05) for step in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 2},
        {"patience": 4, "factor": 0.9, "threshold": 0.1},
        {"patience": 2, "factor": 0.5, "cooldown": 3},
        {"patience": 0, "threshold": 0.05, "threshold_mode": "abs"},
        {"patience": 1, "mode": "max"},
    ],
    ids=str,
)
def test_a_plateau_equals_torchs(options: dict[str, Any]) -> None:
    one, other = optimizer(), optimizer()
    [around, watch] = build_scheduler(Plateau(monitor="val/loss", **options), one, CLOCK)
    reference = ReduceLROnPlateau(other, **options, eps=0)
    reductions = 0
    for metric in metrics():
        before = one.param_groups[0]["lr"]
        stepped(one, around["scheduler"])
        watch["scheduler"].step(metric)
        stepped(other, reference, metric)
        assert [group["lr"] for group in one.param_groups] == pytest.approx(
            [group["lr"] for group in other.param_groups], rel=1e-12
        )
        reductions += one.param_groups[0]["lr"] < before
    assert reductions > 1


def test_pain_11_a_plateau_has_a_warm_up_and_its_reductions_hold_through_it() -> None:
    built = optimizer()
    [around, watch] = build_scheduler(Plateau(monitor="val/loss", patience=0, factor=0.5, warmup="40%", floor=0.2), built, CLOCK)
    scale = 1.0
    for step in range(60):
        assert built.param_groups[0]["lr"] == pytest.approx(0.1 * scale * min((step + 1) / 40, 1), rel=1e-12)
        assert built.param_groups[1]["lr"] == pytest.approx(0.01 * scale * min((step + 1) / 40, 1), rel=1e-12)
        stepped(built, around["scheduler"])
        if step % 10 == 9:
            watch["scheduler"].step(1.0)
            scale = 1.0 if step == 9 else max(scale / 2, 0.2)  # the first look is the best so far
    assert scale == 0.2
    assert built.param_groups[0]["initial_lr"] == 0.1


@pytest.mark.parametrize("stop", [1, 13, 30])
def test_a_plateau_goes_on_from_its_state(stop: int) -> None:
    plateau = Plateau(monitor="val/loss", patience=2, factor=0.5, cooldown=1, warmup="20st")

    def begun() -> tuple[Optimizer, Any, Any]:
        built = optimizer()
        [around, watch] = build_scheduler(plateau, built, CLOCK)
        return built, around["scheduler"], watch["scheduler"]

    one, driven, watch = begun()
    resumed: tuple[Optimizer, Any, Any] | None = None
    for step, metric in enumerate(metrics()):
        if step == stop:
            saved = io.BytesIO()
            torch.save([one.state_dict(), driven.state_dict(), watch.state_dict()], saved)
            saved.seek(0)
            resumed = begun()
            for item, state in zip(resumed, torch.load(saved, weights_only=True), strict=True):
                item.load_state_dict(state)
            assert set(watch.state_dict()) == {"best", "num_bad_epochs", "cooldown_counter", "last_epoch", "scale"}
        for built, first, second in filter(None, ((one, driven, watch), resumed)):
            stepped(built, first)
            second.step(metric)
        if resumed:
            assert [group["lr"] for group in one.param_groups] == [group["lr"] for group in resumed[0].param_groups]
            assert watch.state_dict() == resumed[2].state_dict()
    assert watch.state_dict()["scale"] < 1


PLATEAUS: list[tuple[Callable[[], Any], str]] = [
    (lambda: Plateau(monitor=""), "monitor: '' is no name of a metric. Write one that is logged, val/loss."),
    (lambda: Plateau(monitor="x", mode="less"), "mode: 'less' is not one of min, max."),  # type: ignore[arg-type]
    (lambda: Plateau(monitor="x", factor=1.0), "factor: 1.0 would reduce nothing. Write a number below 1."),
    (lambda: Plateau(monitor="x", factor=0), "factor: 0 lies outside 0 to 1. It multiplies the value at each reduction."),
    (
        lambda: Plateau(monitor="x", patience=-1),
        "patience: -1 is no number of looks at the metric. Write a whole number from 0 on.",
    ),
    (lambda: Plateau(monitor="x", threshold=-0.1), "threshold: -0.1 is no change of a metric. Write a number from 0 on."),
    (
        lambda: Plateau(monitor="x", cooldown=1.5),
        "cooldown: 1.5 is no number of looks at the metric. Write a whole number from 0 on.",
    ),  # type: ignore[arg-type]
    (
        lambda: Piecewise(pieces={"one": Plateau(monitor="x", length="50%"), "two": Constant()}),
        "pieces.one: Plateau stands alone and is no part of another schedule.",
    ),
    (
        lambda: PerOption(options={"lr": Plateau(monitor="x")}),
        "options.lr: Plateau stands alone and is no part of another schedule.",
    ),
    (lambda: PerOption(options={"lr": Continue()}), "options.lr: Continue stands alone and is no part of another schedule."),
]


@pytest.mark.parametrize(("build", "message"), PLATEAUS, ids=[message for _, message in PLATEAUS])
def test_a_plateau_refuses(build: Callable[[], Any], message: str) -> None:
    with pytest.raises((ConfigError, TypeError)) as caught:
        build()
    assert str(caught.value) == message


# torch's own


def test_durations_of_a_torch_scheduler_are_counted_in_the_steps_that_remain() -> None:
    clock = Clock(steps_per_epoch=10, total_steps=100, first_step=20)
    built = optimizer(RMSprop)
    [around] = build_scheduler(partial(CosineAnnealingLR, T_max="100%", eta_min=0.001), built, clock)
    assert (around["scheduler"].T_max, around["interval"], around["scheduler"].eta_min) == (80, "step", 0.001)
    [around] = build_scheduler(partial(MultiStepLR, milestones=["2ep", "50%"], gamma=0.5), optimizer(), clock)
    assert (sorted(around["scheduler"].milestones), around["interval"]) == ([20, 40], "step")
    [around] = build_scheduler({"scheduler": partial(StepLR, step_size="30 steps"), "name": "mine"}, optimizer(), clock)
    assert (around["scheduler"].step_size, around["interval"], around["name"]) == (30, "step", "mine")
    [around] = build_scheduler(partial(OneCycleLR, max_lr=0.1, total_steps="100%", anneal_strategy="cos"), optimizer(SGD), clock)
    assert (around["scheduler"].total_steps, around["interval"]) == (80, "step")


def test_a_number_of_a_torch_scheduler_is_what_lightning_takes_it_for() -> None:
    [around] = build_scheduler(partial(StepLR, step_size=30), optimizer(), CLOCK)
    assert (around["scheduler"].step_size, around["interval"]) == (30, "epoch")


def test_a_duration_of_a_torch_scheduler_that_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        build_scheduler(partial(CosineAnnealingLR, T_max="100%"), optimizer(), Clock(steps_per_epoch=None, total_steps=None))
    assert str(caught.value) == (
        "scheduler.T_max: 100% cannot be counted: the number of training steps is not known. "
        "Set trainer.max_steps, or write it in steps (st)."
    )


def test_describes_what_runs() -> None:
    built = optimizer()
    assert describe_schedule(ScheduleLR(built, Plateau(monitor="val/loss", warmup="5%"), CLOCK)) == (
        "plateau, warmup 5%, monitor val/loss"
    )
    assert describe_schedule(StepLR(built, 3)) == "StepLR"
    assert describe_schedule(None) == "constant"
