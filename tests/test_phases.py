"""Building a phase: optimizer, schedule and groups together."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import LBFGS, SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from lightning_adaptive import Clock, ConfigError, Cosine, settings
from lightning_adaptive.errors import check_factory
from lightning_adaptive.lr_schedulers import ScheduleLR
from lightning_adaptive.partitions import Group
from lightning_adaptive.phases import build, state_bytes

CLOCK = Clock(steps_per_epoch=10, total_steps=100)
TENSORS = {name: torch.nn.Parameter(torch.ones(4)) for name in ("a", "b", "c")}
ONE = (Group(("a", "b", "c")),)
THREE = (Group(("a",), "x"), Group(("b",), "y", lr_ratio=0.5), Group(("c",), "z", no_decay=True))
UNIFORM = (Group(("a",), "x"), Group(("b", "c"), "y", no_decay=True))


def test_gives_the_factory_exactly_the_parameters_of_the_partition() -> None:
    phase = build(partial(SGD, lr=0.1), None, (Group(("c", "a")),), TENSORS, CLOCK)
    [group] = phase.optimizer.param_groups
    assert [id(tensor) for tensor in group["params"]] == [id(TENSORS["c"]), id(TENSORS["a"])]
    assert "name" not in group


def test_imposes_names_ratios_and_zero_decays() -> None:
    phase = build(partial(AdamW, lr=0.1, weight_decay=0.2), Cosine(warmup="2st"), THREE, TENSORS, CLOCK)
    assert [(group["name"], group["initial_lr"], group["lr"], group["weight_decay"]) for group in phase.optimizer.param_groups] == [
        ("x", 0.1, 0.05, 0.2),
        ("y", 0.05, 0.025, 0.2),
        ("z", 0.1, 0.05, 0.0),
    ]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (None, {"interval": "step", "name": "lr", "reduce_on_plateau": False}),
        (Cosine(), {"interval": "step", "name": "lr"}),
        (partial(StepLR, step_size=3), {"interval": "epoch", "name": "lr"}),
        ({"scheduler": partial(StepLR, step_size=3), "interval": "step", "name": "mine"}, {"interval": "step", "name": "mine"}),
        (partial(StepLR, step_size="10%"), {"interval": "step", "frequency": 1}),
        ({"scheduler": ReduceLROnPlateau, "monitor": "val/loss"}, {"monitor": "val/loss", "reduce_on_plateau": True}),
    ],
)
def test_wraps_the_scheduler_as_lightning_wants_it(scheduler: Any, expected: dict[str, Any]) -> None:
    phase = build(partial(SGD, lr=0.1), scheduler, ONE, TENSORS, CLOCK)
    assert {key: phase.lr_schedulers[0][key] for key in expected} == expected
    assert phase.configuration()["lr_scheduler"]["scheduler"].optimizer is phase.optimizer


def test_a_class_without_groups_gets_one_and_says_so() -> None:
    phase = build(partial(LBFGS, lr=1.0), None, UNIFORM, TENSORS, CLOCK)
    assert [len(group["params"]) for group in phase.optimizer.param_groups] == [3]
    assert phase.notes == ("LBFGS has no parameter groups: 2 groups became one",)


class FlatSGD(SGD):
    """An optimizer without groups, but with weight decay."""

    def __init__(self, params: Any, **options: Any) -> None:
        params = list(params)
        if params and isinstance(params[0], dict):
            raise ValueError("no groups here")
        super().__init__(params, **options)


def refuses_twelve(params: Any) -> SGD:
    raise ValueError("momentum must not be 12")


@pytest.mark.parametrize(
    ("factory", "scheduler", "partition", "message"),
    [
        (
            LBFGS,
            None,
            THREE,
            "optimizer: LBFGS has no parameter groups, and the running groups' learning rates differ (ratios 1, 0.5, 1). "
            "Choose another optimizer, or give the switch param_groups=ParamGroups() for one group.",
        ),
        (
            partial(FlatSGD, lr=0.1, weight_decay=0.1),
            None,
            UNIFORM,
            "optimizer.weight_decay: FlatSGD has no parameter groups, and its weight decay would reach groups that are kept free "
            "of it. Set it to 0.",
        ),
        (lambda _: "SGD", None, ONE, "optimizer: the factory returned a str, not a torch.optim.Optimizer."),
        (partial(SGD, lr=0.1), lambda _: 3, ONE, "scheduler: the factory returned a int, not a scheduler of torch."),
        (SGD, None, (Group(()),), "optimizer: there is nothing to train: no parameter requires a gradient."),
        (SGD, {"interval": "step"}, ONE, "scheduler: a dictionary needs the key 'scheduler' with a Schedule or a factory."),
        (
            SGD,
            {"scheduler": StepLR, "intervall": "step"},
            ONE,
            "scheduler.intervall: unknown key. Allowed: scheduler, interval, frequency, monitor, strict, name. "
            "Did you mean 'interval'?",
        ),
        (
            SGD,
            ReduceLROnPlateau,
            ONE,
            "scheduler.monitor: ReduceLROnPlateau needs the name of a metric. Add the key monitor.",
        ),
        (SGD, Cosine(warmup="200st"), ONE, "scheduler.warmup: 200st is 200 steps, but the schedule spans only 100."),
    ],
)
def test_refuses(factory: Any, scheduler: Any, partition: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(factory, scheduler, partition, TENSORS, CLOCK)
    assert str(caught.value) == message


def test_an_optimizers_own_error_is_not_taken_for_missing_groups() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer: cannot be built: momentum must not be 12$"):
        build(refuses_twelve, None, UNIFORM, TENSORS, CLOCK)


def test_an_optimizer_without_learning_rate_is_refused() -> None:
    def build_without_lr(params: Any) -> SGD:
        optimizer = SGD(params, lr=0.1)
        optimizer.param_groups[0]["lr"] = None
        return optimizer

    with pytest.raises(ConfigError, match=r"^optimizer\.lr: SGD has no learning rate \(lr is None\)\. Give it one\.$"):
        build(build_without_lr, None, ONE, TENSORS, CLOCK)


def test_check_factory_refuses_what_is_built_already() -> None:
    with pytest.raises(TypeError, match=r"^optimizer: a SGD that is already built holds its own parameters\. Pass a factory: "):
        check_factory(SGD([torch.zeros(1)]), torch.optim.Optimizer, "optimizer")
    with pytest.raises(TypeError, match=r"^optimizer: 3 is not a factory\."):
        check_factory(3, torch.optim.Optimizer, "optimizer")


def test_schedule_lr_equals_lambda_lr_and_its_state_is_the_step() -> None:
    schedule, ours, theirs = Cosine(warmup="7st"), SGD([torch.zeros(1)], lr=0.3), SGD([torch.zeros(1)], lr=0.3)
    scheduler, reference = ScheduleLR(ours, schedule, CLOCK), LambdaLR(theirs, schedule(CLOCK))
    for step in range(100):
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] == scheduler.lrs_at(step)[0]
        assert scheduler.state_dict() == {"step": step}
        for stepped in (ours, scheduler, theirs, reference):
            stepped.step()


def test_schedule_lr_goes_on_from_a_learning_rate_decided_at_run_time() -> None:
    schedule, running = Cosine(), SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = ScheduleLR(running, schedule, CLOCK)
    running.param_groups[0]["initial_lr"] = 0.019
    for _ in range(10):
        running.step()
        scheduler.step()
    resumed = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    resumed_scheduler = ScheduleLR(resumed, Cosine(), CLOCK)
    resumed.load_state_dict(running.state_dict())
    resumed_scheduler.load_state_dict(scheduler.state_dict())
    assert resumed_scheduler.get_last_lr() == scheduler.get_last_lr()
    for optimizer, its in ((running, scheduler), (resumed, resumed_scheduler)):
        optimizer.step()
        its.step()
    assert resumed.param_groups[0]["lr"] == running.param_groups[0]["lr"] == pytest.approx(0.019 * schedule(CLOCK)(11))


def test_settings_of_groups_are_those_of_the_configuration_and_not_what_a_schedule_makes_of_them() -> None:
    groups = [{"params": [TENSORS["a"]], "name": "x"}, {"params": [TENSORS["b"]], "name": "y", "lr": 0.5}]
    optimizer = SGD(groups, lr=0.1)
    configured = settings.of_groups(optimizer, "param_groups")
    ScheduleLR(optimizer, Cosine(warmup="10st"), CLOCK)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.05)
    assert settings.of_groups(optimizer, "param_groups") == configured == {"param_groups.y.lr": 0.5}


def test_counts_the_bytes_of_an_optimizers_state() -> None:
    parameter = torch.nn.Parameter(torch.zeros(100))
    parameter.grad = torch.ones(100)
    optimizer = Adam([parameter], lr=0.1)
    assert state_bytes(optimizer) == 0
    optimizer.step()
    assert state_bytes(optimizer) == 2 * 100 * 4 + 4  # two moments and the step


def test_an_untuned_warm_up_takes_its_length_from_the_optimizer() -> None:
    clock = Clock(steps_per_epoch=10, total_steps=500)
    phase = build(partial(Adam, lr=0.1, betas=(0.9, 0.98)), Cosine(warmup="untuned"), ONE, TENSORS, clock)
    scheduler = phase.lr_scheduler
    assert str(scheduler.schedule) == "cosine, warmup 100st"  # 2 / (1 - 0.98)
    assert scheduler.lrs_at(0) == [pytest.approx(0.1 / 100)]
    assert scheduler.lrs_at(99) == [pytest.approx(0.1)]
    with pytest.raises(ConfigError) as caught:
        build(partial(SGD, lr=0.1), Cosine(warmup="untuned"), ONE, TENSORS, clock)
    assert str(caught.value) == (
        "scheduler.warmup: 'untuned' is 2 / (1 - beta2) steps and needs an optimizer with beta2, such as Adam. "
        "Choose one, or write a duration."
    )


def test_a_factory_of_lightning_cli_is_the_class_that_it_makes() -> None:
    """It is a partial of a function of jsonargparse's, with the class and all of its options."""

    def make(cls: type, optimizer: Any, **options: Any) -> Any:
        return cls(optimizer, **options)

    theirs = partial(make, StepLR, step_size=3, gamma=0.1, last_epoch=-1)
    assert settings.of_scheduler(theirs) == settings.of_scheduler(partial(StepLR, step_size=3)) == "StepLR, step_size 3"
    assert settings.of_scheduler(partial(StepLR, step_size=3, gamma=0.5)) == "StepLR, gamma 0.5, step_size 3"
