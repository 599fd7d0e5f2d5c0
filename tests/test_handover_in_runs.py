"""What crosses a switch in whole runs: learning rates, momentum and decay, on one process and on two, before and after a resume."""

from __future__ import annotations

import gc
import hashlib
import importlib
import itertools
import logging
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import LBFGS, SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler

from lightning_adaptive import (
    AllOf,
    AnyOf,
    ConfigError,
    Cosine,
    ExactResume,
    Handover,
    Manual,
    OnPlateau,
    OnThreshold,
    OptimizerSwitchCallback,
    ParamGroups,
    Plateau,
    Trigger,
    attach,
)
from lightning_adaptive.handover import PRESETS
from lightning_adaptive.report import RunReport, read_curves
from lightning_adaptive.strategies import placement, running_optimizer
from lightning_adaptive.triggers import Swats
from tests.cpu_strategies import STRATEGIES, ShardableNet, whole_weights
from tests.exactness import SaveAtEachMoment
from tests.pair import Pair
from tests.support import ValidatedNet, counted_steps, dataset, loader, trainer
from tests.test_resume import SaveOnException
from tests.test_switch import TwoOptimizers

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

TO_SGD = partial(SGD, lr=0.1, momentum=0.9)
STEPS_PER_EPOCH, STEPS = 4, 24


class GroupedNet(ShardableNet):
    """AdamW over two groups by name: the weights, which decay, and the biases, with half the learning rate and no decay."""

    def configure_optimizers(self) -> Any:
        weights, biases = ([layer.weight for layer in self.layers()], [layer.bias for layer in self.layers()])
        groups = [
            {"params": weights, "name": "weights"},
            {"params": biases, "name": "biases", "lr": 5e-3, "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=1e-2, weight_decay=0.1)

    def layers(self) -> list[torch.nn.Linear]:
        return [self.net[0], self.net[2]]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]), sync_dist=True)


def global_batches(distributed: bool) -> DataLoader:
    """Batches of sixteen over all processes, in the same order on one and on two."""
    data = dataset()
    if not distributed:
        return DataLoader(data, batch_size=16)
    return DataLoader(data, batch_size=8, sampler=DistributedSampler(data, 2, int(os.environ["RANK"]), shuffle=False))


@contextmanager
def told() -> Iterator[list[str]]:
    """What is said while it lasts, on rank 0."""
    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@dataclass(frozen=True)
class Ended:
    """What a run ended with, on one process, in plain values.

    Args:
        weights: the whole weights.
        state: a hash of the optimizer's state, of what lies on this process.
        groups: the options of each group.
        classes: what made each step.
        lrs: of each step the learning rate of each group.
        shown: after each step what the trigger of the next switch had seen.
        lines: what was said.
    """

    weights: dict[str, torch.Tensor]
    state: str
    groups: list[dict[str, Any]]
    classes: list[str]
    lrs: list[list[float]]
    shown: list[dict[str, float]]
    lines: list[str]

    @property
    def switches(self) -> list[str]:
        """The lines about switches, without what differs from strategy to strategy."""
        return [line.partition(", freed")[0] for line in self.lines if "SWITCH" in line]


class Watch(Callback):
    """Class and learning rates of each step; at the end weights, state and options."""

    def __init__(self, switch: Callback) -> None:
        self.switch = switch
        self.classes: list[str] = []
        self.lrs: list[list[float]] = []
        self.shown: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step
        self.now = type(running_optimizer(trainer)).__name__, [float(group["lr"]) for group in groups_of(trainer)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self.step:
            self.classes.append(self.now[0])
            self.lrs.append(self.now[1])
            self.shown.append(getattr(self.switch, "shows", {}))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = whole_weights(trainer)
        hashed = hashlib.sha256()
        optimizer = running_optimizer(trainer)
        # Of a parameter of which nothing lies here, FSDP loads a count of steps that the optimizer itself does not keep.
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"] if tensor.numel()]
        for name, value in (item for tensor in tensors for item in sorted(optimizer.state[tensor].items())):
            here = getattr(value, "to_local", lambda value=value: value)()
            hashed.update(f"{name} {here.tolist()}".encode())
        self.state = hashed.hexdigest()[:12]
        self.groups = [{name: value for name, value in group.items() if name != "params"} for group in groups_of(trainer)]


def groups_of(trainer: Trainer) -> list[dict[str, Any]]:
    return running_optimizer(trainer).param_groups


@dataclass(frozen=True)
class Case:
    """One kind of run: 24 steps, six epochs of four.

    Args:
        switch: makes the callback.
        strategy: name in `STRATEGIES`, for two processes; empty for one process.
        net: makes the module.
        options: the trainer's.
        plugins: makes the trainer's.
    """

    switch: Callable[[], Callback]
    strategy: str = ""
    net: Callable[[], LightningModule] = GroupedNet
    options: dict[str, Any] = field(default_factory=dict)
    plugins: Callable[[], list[Any]] = list


def run(case: Case, folder: Path | None = None, path: Path | None = None, extra: Sequence[Callback] = (), seed: int = 1) -> Ended:
    """One run; with a folder it saves after each step there, and with a path it goes on from there."""
    if case.strategy:
        warnings.simplefilter("ignore")
    seed_everything(seed, verbose=False)
    switch = case.switch()
    watch = Watch(switch)
    saver = [] if folder is None else [ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)]
    distributed: dict[str, Any] = {"strategy": STRATEGIES[case.strategy](), "devices": 2} if case.strategy else {}
    runner = trainer(
        **{
            "max_epochs": STEPS // STEPS_PER_EPOCH,
            "callbacks": [switch, ExactResume(), watch, *extra, *saver],
            "enable_checkpointing": bool(saver),
            "use_distributed_sampler": False,
            "plugins": case.plugins(),
            **distributed,
            **case.options,
        }
    )
    batches, validation = (global_batches(bool(case.strategy)) for _ in range(2))
    with told() as lines:
        runner.fit(case.net(), batches, validation, ckpt_path=path, weights_only=True)
    return Ended(watch.weights, watch.state, watch.groups, watch.classes, watch.lrs, watch.shown, lines)


def of_each_rank(pair: Pair, strategy: str, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function returns on one process, or with a strategy on each of two."""
    return pair.run(function, *arguments) if strategy else [function(*arguments)]


def on(pair: Pair, case: Case, *arguments: Any) -> Ended:
    """A run on as many processes as the case asks for; both ranks must have decided the same."""
    if not case.strategy:
        return run(case, *arguments)
    one, other = pair.run(run, case, *arguments)
    assert (one.classes, one.lrs, one.groups, one.shown) == (other.classes, other.lrs, other.groups, other.shown)
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    return one


def switch(handover: Any, at: str | None = "10st", **options: Any) -> OptimizerSwitchCallback:
    return OptimizerSwitchCallback(**{"at": at, "optimizer": TO_SGD, "handover": handover, **options})


SMOOTH = replace(PRESETS["smooth"], guard=0.5, guard_for="6st")
"""Its guard holds updates back, for six steps."""
slow = partial(pytest.param, marks=pytest.mark.slow)
TWO = ["ddp", "fsdp sharded", "fsdp2 sharded"]


# One process


LINES = {
    "own": "SGD lr 1.0e-01/5.0e-02 (own), because at=10st was reached; constant, momentum zero, freed 5.4 KB",
    "keep": "SGD lr 1.0e-02/5.0e-03 (keep), because at=10st was reached; constant, momentum zero, configured 5.0e-02..1.0e-01, "
    "freed 5.4 KB",
    "smooth": "SGD lr 2.8e-02/1.0e-02/1.1e-02/2.5e-03 (match_orthogonal per tensor), because at=10st was reached; constant, "
    "configured 5.0e-02..1.0e-01, weight decay 0.0e+00..1.0e-01 -> 0.0e+00..9.6e-03 (match), momentum carried, updates held to a "
    "norm of 0.11 for 100st, freed 5.4 KB",
    "swats": "SGD lr 2.7e-02/1.3e-02 (match_projection per model), because at=10st was reached; constant, momentum zero, "
    "configured 5.0e-02..1.0e-01, freed 5.4 KB",
}


@pytest.mark.parametrize("preset", LINES)
def test_the_line_of_a_preset(preset: str) -> None:
    ended = run(Case(partial(switch, preset)))
    assert [line for line in ended.lines if "SWITCH" in line] == [
        f"SWITCH at step 10 (epoch 2): AdamW lr 1.0e-02/5.0e-03 -> {LINES[preset]}"
    ]
    assert ended.classes == ["AdamW"] * 10 + ["SGD"] * 14


def test_the_line_with_the_trigger_and_a_scale() -> None:
    when = Swats(window=2, patience=1, rtol=10.0)
    half = replace(PRESETS["swats"], scale=0.5)
    ended = run(Case(partial(switch, half, None, when=when, scheduler=Cosine(warmup="2st"))))
    [line] = [line for line in ended.lines if "SWITCH" in line]
    [shown] = [shown for shown, name in zip(ended.shown, ended.classes, strict=True) if name == "AdamW"][-1:]
    lr = shown["lr"]
    assert line == (
        f"SWITCH at step 4 (epoch 1): AdamW lr 1.0e-02/5.0e-03 -> SGD lr {lr / 10 / 4:.1e}/{lr / 10 / 8:.1e} (match_projection per "
        f"model x 0.5), because the learning rate for SGD has settled, at {lr:.4g}; cosine, warmup 2st, momentum zero, configured "
        "5.0e-02..1.0e-01, freed 5.4 KB"
    )


class Before(Callback):
    """Learning rates, moments and weights as they were when the switch came, in float64."""

    def __init__(self, step: int = 10) -> None:
        self.step = step
        self.moments: dict[str, tuple[float, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step:
            return
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        optimizer = running_optimizer(trainer)
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                state = optimizer.state[tensor]
                mean = state["exp_avg"].double() / (1 - 0.9**self.step)
                root = (state["exp_avg_sq"].double() / (1 - 0.999**self.step)).sqrt()
                self.moments[names[tensor]] = group["lr"], mean, -group["lr"] * mean / (root + 1e-8), tensor.detach().double()


SETS = {
    "tensor": [["net.0.weight"], ["net.2.weight"], ["net.0.bias"], ["net.2.bias"]],
    "group": [["net.0.weight", "net.2.weight"], ["net.0.bias", "net.2.bias"]],
}


@pytest.mark.parametrize("per", ["tensor", "group", "model"])
@pytest.mark.parametrize("rule", ["match_orthogonal", "match_norm", "match_projection"])
def test_learning_rates_are_what_the_formulas_say(rule: str, per: str) -> None:
    before = Before()
    ended = run(Case(partial(switch, Handover(lr=rule, per=per))), extra=(before,))  # type: ignore[arg-type]

    def eta(names: Sequence[str], ratios: Sequence[float]) -> float:
        found = [before.moments[name] for name in names]
        update = sum(float((step * step).sum()) for _, _, step, _ in found)
        along = sum(-ratio * float((step * mean).sum()) for ratio, (_, mean, step, _) in zip(ratios, found, strict=True))
        other = sum(ratio**2 * float((mean * mean).sum()) for ratio, (_, mean, _, _) in zip(ratios, found, strict=True))
        return {
            "match_orthogonal": along / other,
            "match_norm": math.sqrt(update / other),
            "match_projection": update / along,
        }[rule]

    if per == "model":
        of_model = eta([name for names in SETS["group"] for name in names], [1, 1, 0.5, 0.5])
        expected = [of_model, of_model / 2]
    else:
        expected = [eta(names, [1.0] * len(names)) for names in SETS[per]]
    names = ["weights", "biases"] if per != "tensor" else [name for [name] in SETS["tensor"]]
    assert [group["name"] for group in ended.groups] == names
    assert [group["initial_lr"] for group in ended.groups] == pytest.approx([lr / 10 for lr in expected], rel=1e-5)
    assert [group["lr"] for group in ended.groups] == [group["initial_lr"] for group in ended.groups]


def test_the_first_update_after_a_smooth_switch_is_what_it_promises() -> None:
    """Momentum and decay are carried: SGD's first step on the mean gradient would be Adam's, brought as near as it can be."""
    before, seeded = Before(), {}

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 10:
                names = {parameter: name for name, parameter in pl_module.named_parameters()}
                optimizer = running_optimizer(trainer)
                for group in optimizer.param_groups:
                    [tensor] = group["params"]
                    seeded[names[tensor]] = group, optimizer.state[tensor]["momentum_buffer"].double()

    with counted_steps() as counts:
        run(Case(partial(switch, "smooth")), extra=(before, Look()))
    assert counts == {"AdamW": 10, "SGD": 14}
    assert len(seeded) == 4
    for name, (group, buffer) in seeded.items():
        lr, mean, step, _ = before.moments[name]
        torch.testing.assert_close(buffer, 10 * mean, rtol=1e-5, atol=1e-9)
        assert (float((step + group["lr"] * buffer).double().flatten() @ buffer.flatten())) == pytest.approx(0, abs=1e-7)
        decay = 0.1 if name.endswith("weight") else 0.0
        assert group["weight_decay"] * group["lr"] * 10 == pytest.approx(lr * decay, rel=1e-6)
        assert group["name"] == name


def test_the_old_optimizer_and_its_state_are_freed_after_a_handover() -> None:
    references: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    class Freed(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 10:
                optimizer = running_optimizer(trainer)
                moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
                references.extend(weakref.ref(found) for found in (optimizer, *moments))
            if trainer.global_step == 11:
                alive.extend(reference() is not None for reference in references)

    gc.disable()
    try:
        run(Case(partial(switch, "smooth")), extra=(Freed(),))
    finally:
        gc.enable()
    assert alive == [False] * 9


def test_moments_that_cross_unchanged_are_not_called_freed() -> None:
    """Of Adam's state for AdamW 16 bytes of counts are new, and both moments are the same tensors."""
    handover = Handover(lr="keep", momentum="carry")
    ended = run(Case(partial(switch, handover, optimizer=partial(Adam, lr=0.1))))
    [line] = [line for line in ended.lines if "SWITCH" in line]
    assert line == (
        "SWITCH at step 10 (epoch 2): AdamW lr 1.0e-02/5.0e-03 -> Adam lr 1.0e-02/5.0e-03 (keep), because at=10st was reached; "
        "constant, configured 5.0e-02..1.0e-01, momentum carried, freed 16 B"
    )


def test_the_monitor_of_learning_rates_and_the_report_see_a_group_for_each_tensor(tmp_path: Path) -> None:
    report, logger = RunReport("val/loss"), CSVLogger(tmp_path, name="", version="")
    options = {"logger": logger, "log_every_n_steps": 1}
    ended = run(Case(partial(switch, "smooth"), options=options), extra=(report, LearningRateMonitor("step")))
    logger.save()
    curves = read_curves(tmp_path / "metrics.csv")
    names = [name for [name] in SETS["tensor"]]
    for index, name in enumerate(names):
        assert curves[f"lr/{name}"] == (list(range(10, 24)), [pytest.approx(ended.lrs[10][index])] * 14)
    first, second = report.phases
    assert (first.optimizer, first.end_step, first.lr_last) == ("AdamW", 10, [0.01, 0.005])
    assert (second.optimizer, second.first_step, second.lr_first) == ("SGD", 10, ended.lrs[10])


# The next schedule


def factor_of_cosine(step: int, steps: int = 14) -> float:
    return (1 + math.cos(math.pi * step / steps)) / 2


SCHEDULES: dict[str, tuple[Any, Callable[[int], float]]] = {
    "constant": (None, lambda step: 1.0),
    "cosine": (Cosine(), factor_of_cosine),
    "cosine, warmup": (Cosine(warmup="2st"), lambda step: (step + 1) / 2 if step < 2 else factor_of_cosine(step - 2, 12)),
    "StepLR": ({"scheduler": partial(StepLR, step_size=3, gamma=0.5), "interval": "step"}, lambda step: 0.5 ** (step // 3)),
    "Plateau": (Plateau(monitor="val/loss", patience=99, warmup="2st"), lambda step: min((step + 1) / 2, 1)),
    "continue": ("continue", lambda step: factor_of_cosine(step + 10, 24) / factor_of_cosine(10, 24)),
}


@pytest.mark.parametrize("handover", ["keep", "smooth", "swats"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_starts_from_what_was_handed_over(name: str, handover: str) -> None:
    """Of a schedule that goes on, the first step has what was handed over; of a new one, that is the base."""
    scheduler, factor = SCHEDULES[name]
    constant = run(Case(partial(switch, handover), net=scheduled)).lrs[10]
    ended = run(Case(partial(switch, handover, scheduler=scheduler), net=scheduled))
    for step in range(14):
        assert ended.lrs[10 + step] == pytest.approx([lr * factor(step) for lr in constant], rel=1e-9)


def scheduled() -> LightningModule:
    return attach(GroupedNet(), optimizer=partial(AdamW, lr=1e-2), scheduler=Cosine())


@pytest.mark.parametrize("handover", ["keep", "swats"])
def test_new_groups_take_what_was_handed_over_and_an_explicit_learning_rate_stays(handover: str) -> None:
    rules = ParamGroups(
        head={"match": "net.2.*", "lr_scale": 0.1, "weight_decay": 0.25},
        bias={"match": "net.0.bias", "lr": 0.3},
    )
    case = Case(
        partial(switch, replace(PRESETS[handover], weight_decay="match"), param_groups=rules), net=partial(ValidatedNet, 0.02)
    )
    ended = run(case)
    whole = run(replace(case, switch=partial(switch, handover))).lrs[10] if handover == "keep" else None
    by_name = {group["name"]: group for group in ended.groups}
    assert by_name["bias"]["initial_lr"] == 0.3
    assert by_name["head"]["initial_lr"] == pytest.approx(0.1 * by_name["default"]["initial_lr"])
    assert by_name["head"]["weight_decay"] == 0.25
    if whole is not None:
        assert by_name["default"]["initial_lr"] == whole[0] == 0.02


# The same decision on every strategy


SWATS = Swats(window=2, patience=3, rtol=0.14)
PAPER = Swats(criterion="paper", eps=3e-2)
SAME: dict[str, Callable[[], Callback]] = {
    "keep": partial(switch, "keep"),
    "smooth": partial(switch, SMOOTH),
    "swats": partial(switch, "swats"),
    "match_norm per group": partial(switch, Handover(lr="match_norm", per="group", momentum="carry")),
    "match_projection per tensor": partial(switch, Handover(lr="match_projection")),
    "match_orthogonal per model": partial(switch, Handover(lr="match_orthogonal", per="model", weight_decay="match")),
    "to Adam": partial(switch, Handover(lr="match_norm", per="model", momentum="carry"), optimizer=partial(Adam, lr=0.5)),
    "relative per model": partial(switch, "swats", "20st", when=SWATS),
    "relative per group": partial(switch, Handover(lr="match_projection", per="group"), "20st", when=replace(SWATS, per="group")),
    "paper": partial(switch, "swats", "20st", when=PAPER),
    "every second step": partial(switch, "smooth", "20st", when=replace(SWATS, every_n_steps=2, patience=2)),
}
DECIDED = {"relative per model": 9, "relative per group": 18, "paper": 9, "every second step": 10}
"""Switch steps of those with a trigger."""
QUICK = ("smooth", "relative per model", "relative per group")


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in SAME])
def test_every_strategy_decides_as_one_process_does(name: str, pair: Pair) -> None:
    """At the same step and, but for the rounding of float32, with the same learning rates and then weights."""
    alone = run(Case(SAME[name]))
    begin = DECIDED.get(name, 10)
    expected = ["AdamW"] * begin + ["Adam" if name == "to Adam" else "SGD"] * (STEPS - begin)
    assert alone.classes == expected
    for strategy in TWO:
        ended = on(pair, Case(SAME[name], strategy))
        assert ended.classes == expected, strategy
        assert ended.switches == alone.switches, strategy
        for one, other in zip(ended.lrs, alone.lrs, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        for one, other in zip(ended.shown, alone.shown, strict=True):
            # A gap is a difference of numbers that nearly agree.
            assert one == {key: pytest.approx(value, rel=1e-4, abs=1e-6 * ("gap" in key)) for key, value in other.items()}
        for key, tensor in ended.weights.items():
            torch.testing.assert_close(tensor, alone.weights[key], rtol=1e-4, atol=1e-5)


class Sums(Callback):
    """What a process is told of a sum of which each has computed another."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = torch.tensor([[1.0 + trainer.global_rank]], dtype=torch.float64)
        self.found = placement(trainer).whole([next(pl_module.parameters())], rows).tolist()


def told_of_sums() -> list[list[float]]:
    sums = Sums()
    trainer(strategy="ddp", devices=2, max_steps=1, callbacks=[sums]).fit(ShardableNet(), loader())
    return sums.found


def test_ranks_that_have_computed_other_sums_decide_by_those_of_the_first(pair: Pair) -> None:
    assert pair.run(told_of_sums) == [[[1.0]]] * 2


def moved(strategy: str) -> tuple[float, list[float]]:
    """The norm to which updates are held, and of each step after the switch how far the whole model went."""
    weights: list[torch.Tensor] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            if trainer.global_step >= 10:
                weights.append(torch.cat([tensor.flatten().double() for tensor in whole_weights(trainer).values()]))

    callback = switch(SMOOTH)
    run(Case(lambda: callback, strategy), extra=[Look()])
    limit = callback.state_dict()["limit"]
    return limit, [float((after - before).norm()) for before, after in itertools.pairwise(weights)]


@pytest.mark.parametrize("strategy", ["", *TWO])
def test_the_guard_holds_the_whole_models_update(strategy: str, pair: Pair) -> None:
    for limit, norms in of_each_rank(pair, strategy, moved, strategy):
        assert norms[:6] == [pytest.approx(limit, rel=1e-3)] * 6
        assert max(norms[6:]) > 1.2 * limit  # the window is over


DEEPSPEED = {
    "lr": ({"handover": "smooth"}, "handover.lr: a handover of what the running optimizer knows"),
    "momentum": ({"handover": Handover(momentum="carry")}, "handover.momentum: a handover of what the running optimizer knows"),
    "guard": ({"handover": Handover(guard=1.5)}, "handover.guard: a handover of what the running optimizer knows"),
    "swats": ({"handover": "own", "when": SWATS}, "when: SWATS"),
}


def refused(strategy: str, make: Callable[[], Callback]) -> str:
    with counted_steps() as counts:
        try:
            run(Case(make, strategy))
        except ConfigError as error:
            assert not counts
            return str(error)
    return ""


@pytest.mark.parametrize("name", DEEPSPEED)
def test_deepspeed_refuses_what_looks_at_the_state_before_the_first_step(name: str, pair: Pair) -> None:
    options, begins = DEEPSPEED[name]
    message = (
        f"switch.{begins} looks at the optimizer's state of each parameter, which lies in flat partitions under DeepSpeed. Use "
        "DDP, FSDP or FSDP2 (ModelParallelStrategy)."
    )
    assert pair.run(refused, "deepspeed 2", partial(switch, **options)) == [message] * 2


@pytest.mark.parametrize("strategy", ["deepspeed 2", pytest.param("deepspeed 3", marks=pytest.mark.slow)])
def test_deepspeed_keeps_learning_rates_and_decay(strategy: str, pair: Pair) -> None:
    """They stand in the groups, whose parameters are flat partitions there."""
    handover = Handover(lr="keep", scale=2, weight_decay="match")
    alone, ended = run(Case(partial(switch, handover))), on(pair, Case(partial(switch, handover), strategy))
    assert ended.lrs[10] == alone.lrs[10] == [0.02, 0.01]
    decays = [group["weight_decay"] for group in ended.groups]
    assert decays == [group["weight_decay"] for group in alone.groups] == [pytest.approx(0.005), 0.0]


# Resume


def chain() -> OptimizerSwitchCallback:
    """AdamW, then SGD that is matched, a tenth of that, and Adam on its own."""
    last = switch("own", "18st", optimizer=partial(Adam, lr=1e-3))
    tenth = switch(Handover(lr="keep", scale=0.1, momentum="carry"), "12st", then=last)
    return switch(SMOOTH, "6st", then=tenth)


def regrouped() -> OptimizerSwitchCallback:
    """SGD on groups by rules, matched for each tensor, and then Adam on what it inherits of them."""
    rules = ParamGroups(
        head={"match": "net.2.*", "lr_scale": 0.1, "weight_decay": 0}, bias={"match": "net.0.bias", "lr": 0.3, "momentum": 0.5}
    )
    last = switch("own", "14st", optimizer=partial(Adam, lr=1e-3, weight_decay=1e-2))
    return switch(replace(SMOOTH, weight_decay="own"), "10st", param_groups=rules, then=last)


RESUMED: dict[str, tuple[Callable[[], Callback], Sequence[int]]] = {
    "keep": (partial(switch, "keep", scheduler=Cosine()), (6, 10, 11, 20)),
    "smooth": (partial(switch, SMOOTH, scheduler=Cosine(warmup="2st")), (6, 10, 11, 13, 16, 20)),
    "swats": (partial(switch, "swats", "20st", when=SWATS, scheduler=Cosine()), (1, 6, 8, 9, 10, 20)),
    "continue": (partial(switch, "smooth", scheduler="continue"), (10, 13)),
    "chain": (chain, (5, 6, 8, 12, 14, 18, 20)),
    "regrouped": (regrouped, (10, 12, 14, 16)),
}


def resumed(case: Case, folder: Path, steps: Sequence[int]) -> tuple[Ended, list[Ended]]:
    """The uninterrupted run, and those that went on from after each of these steps."""
    saved = run(case, folder)
    return saved, [run(case, path=folder / f"step={step}.ckpt", seed=100 + step) for step in steps]


def assert_resumed(steps: Sequence[int], whole: Ended, runs: Sequence[Ended]) -> None:
    for step, ended in zip(steps, runs, strict=True):
        where = f"from step {step}"
        assert ended.classes == whole.classes[step:], where
        assert ended.lrs == whole.lrs[step:], where
        assert ended.shown == whole.shown[step:], where
        assert ended.groups == whole.groups, where
        assert ended.state == whole.state, where
        assert all(torch.equal(ended.weights[name], tensor) for name, tensor in whole.weights.items()), where


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (strategy, name)
        if not strategy or (strategy, name) in (("ddp", "smooth"), ("fsdp2 sharded", "chain"))
        else slow(strategy, name)
        for strategy in ("", *TWO)
        for name in RESUMED
    ],
)
def test_every_resume_ends_in_the_same_weights_state_and_options(strategy: str, name: str, pair: Pair, tmp_path: Path) -> None:
    make, steps = RESUMED[name]
    case = Case(make, strategy, scheduled if name == "continue" else GroupedNet)
    for whole, runs in of_each_rank(pair, strategy, resumed, case, tmp_path, steps):
        assert_resumed(steps, whole, runs)


def with_other_settings(strategy: str, folder: Path, policy: str) -> list[list[dict[str, Any]]]:
    """Groups of the run that was saved, and of one that goes on within the guard's window with other settings."""
    saved = run(Case(partial(switch, SMOOTH, scheduler=Cosine()), strategy), folder)
    other = partial(switch, SMOOTH, optimizer=partial(SGD, lr=0.7, momentum=0.8, nesterov=True), scheduler=Cosine())
    path = folder / "step=13.ckpt"
    ended = run(Case(partial(other, on_resume=policy), strategy), path=path)
    told = [line for line in ended.lines if line.startswith("RESUMED")]
    lines = [
        f"RESUMED with other settings (on_resume={policy}):",
        "  switch.optimizer.lr: 0.1 in the checkpoint, 0.7 in this run",
        "  switch.optimizer.momentum: 0.9 in the checkpoint, 0.8 in this run",
        "  switch.optimizer.nesterov: default in the checkpoint, True in this run",
    ]
    assert told == (["\n".join(lines)] if os.environ.get("RANK", "0") == "0" else [])
    return [saved.groups, ended.groups]


@pytest.mark.parametrize("policy", ["config", "checkpoint"])
@pytest.mark.parametrize("strategy", ["", *(name if name == "ddp" else slow(name) for name in TWO)])
def test_what_was_handed_over_survives_a_resume_with_other_settings(strategy: str, policy: str, pair: Pair, tmp_path: Path) -> None:
    for saved, ended in of_each_rank(pair, strategy, with_other_settings, strategy, tmp_path, policy):
        expected = {"momentum": 0.8, "nesterov": True} if policy == "config" else {}
        assert ended == [{**group, **expected} for group in saved]


def test_a_learning_rate_that_a_rule_gives_follows_the_config_on_a_resume(tmp_path: Path) -> None:
    def make(bias_lr: float, decay: float, policy: str) -> Callback:
        rules = ParamGroups(bias={"match": "*.bias", "lr": bias_lr, "weight_decay": decay})
        handover = Handover(lr="match_norm", per="group", weight_decay="match")
        return switch(handover, param_groups=rules, on_resume=policy)

    net = partial(ValidatedNet, 0.02)
    saved = run(Case(partial(make, 0.3, 0.1, "error"), net=net), tmp_path)
    ended = run(Case(partial(make, 0.2, 0.4, "config"), net=net), path=tmp_path / "step=13.ckpt")
    [plain, bias] = saved.groups
    assert (plain["name"], bias["name"]) == ("default", "bias")
    assert ended.groups == [plain, {**bias, "lr": 0.2, "initial_lr": 0.2, "weight_decay": 0.4}]


def test_a_resume_between_two_switches_of_which_the_second_was_due_first(tmp_path: Path) -> None:
    """The trigger comes late, when the moment of the switch after it is over: that one comes a step later, resumed or not."""
    last = partial(switch, "own", "5st", optimizer=partial(Adam, lr=1e-3))

    def make() -> Callback:
        return switch("swats", None, when=SWATS, then=last())

    whole, [ended] = resumed(Case(make), tmp_path, [10])
    assert whole.classes == ["AdamW"] * 9 + ["SGD"] + ["Adam"] * 14
    assert len(whole.switches) == 2
    assert_resumed([10], whole, [ended])


# Resume within what a trigger observes


class ScriptedNet(GroupedNet):
    """Its validation loss of each epoch is given."""

    values = (1.0, 0.5, 0.6, 0.7, 0.1, 0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = -100.0 if self.trainer.sanity_checking else self.values[self.trainer.current_epoch]
        self.log("val/loss", value, sync_dist=True)


STANDS = OnPlateau(monitor="val/loss", patience=1, smoothing=0.2)
LOW = OnThreshold(monitor="val/loss", below=0.68, smoothing=0.6)
WINDOWS: dict[str, tuple[Trigger, int]] = {
    "plateau": (STANDS, 16),
    "threshold": (LOW, 12),
    "relative": (SWATS, 9),
    "paper": (PAPER, 9),
    "per group": (replace(SWATS, per="group"), 18),
    "any": (AnyOf(of={"stands": replace(STANDS, patience=9), "settled": replace(SWATS, per="group"), "low": LOW}), 12),
    "all": (AllOf(of={"stands": STANDS, "settled": SWATS}), 16),
    "manual": (Manual(every_n_steps=5), 15),
}


class Asking(Callback):
    """Asks for the switch by a file after the eleventh step."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 11 and trainer.is_global_zero:
            Path(trainer.default_root_dir, "SWITCH").touch()


def observed(strategy: str, trigger: Trigger, folder: Path, steps: Sequence[int]) -> tuple[Ended, list[Ended]]:
    case = Case(partial(switch, SMOOTH, None, when=trigger), strategy, ScriptedNet, {"default_root_dir": str(folder)})
    whole = run(case, folder, extra=[Asking()])
    runs = []
    for step in steps:
        if 11 <= step < 15:
            Asking.on_train_batch_end(Asking(), SimpleNamespace(global_step=11, is_global_zero=True, default_root_dir=str(folder)))
        runs.append(run(case, path=folder / f"step={step}.ckpt", seed=100 + step, extra=[Asking()]))
    return whole, runs


@pytest.mark.parametrize(
    ("strategy", "name"),
    [
        (strategy, name) if (strategy, name) == ("fsdp2 sharded", "relative") or not strategy else slow(strategy, name)
        for strategy in ("", *TWO)
        for name in WINDOWS
    ],
)
def test_a_resume_within_what_a_trigger_observes_switches_at_the_same_step(
    strategy: str, name: str, pair: Pair, tmp_path: Path
) -> None:
    trigger, moment = WINDOWS[name]
    steps = [step for step in (1, 3, 8, 12, 15) if step < moment] + [moment, moment + 1]
    for whole, runs in of_each_rank(pair, strategy, observed, strategy, trigger, tmp_path, steps):
        assert whole.classes == ["AdamW"] * moment + ["SGD"] * (STEPS - moment)
        assert_resumed(steps, whole, runs)


def test_a_step_is_seen_once_where_batches_are_accumulated(tmp_path: Path) -> None:
    """The first batch after a resume makes no step, and its gradients are none of one."""
    options = {"accumulate_grad_batches": 2, "max_epochs": 12}
    steps = [3, 5, 8]
    whole, runs = resumed(Case(partial(switch, "swats", "20st", when=SWATS), options=options), tmp_path, steps)
    assert all(whole.shown[:9])
    assert_resumed(steps, whole, runs)


def test_accumulated_batches_are_seen_as_one() -> None:
    """Two of eight make the same estimates as one of sixteen."""
    make = partial(switch, "swats", None, when=SWATS)
    halves = [loader(batch_size=8), loader(batch_size=16)]
    seen = []
    for batches, accumulate in zip(halves, (2, 1), strict=True):
        callback = make()
        watch = Watch(callback)
        trainer(max_epochs=6, accumulate_grad_batches=accumulate, callbacks=[callback, watch]).fit(GroupedNet(), batches, batches)
        seen.append(watch)
    small, large = seen
    assert small.classes == large.classes == ["AdamW"] * 9 + ["SGD"] * 15
    assert [shown["lr"] for shown in small.shown[:8]] == pytest.approx([shown["lr"] for shown in large.shown[:8]], rel=1e-4)


# Faults


class BrokenNet(GroupedNet):
    """The loss of one step is not a number; the weights are as if it had not been, but for the optimizer's state."""

    def __init__(self, at_step: int) -> None:
        super().__init__()
        self.at_step = at_step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.trainer.global_step == self.at_step else loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.nan_to_num_(0.01)


def test_momentum_that_is_not_finite_is_zero_with_a_line() -> None:
    """The loss of the last step before the switch was not a number: nothing of it crosses."""
    ended = run(Case(partial(switch, "smooth"), net=partial(BrokenNet, 9)))
    assert [line for line in ended.lines if "SWITCH" in line] == [
        "SWITCH at step 10 (epoch 2): AdamW lr 1.0e-02/5.0e-03 -> SGD lr 1.0e-01/5.0e-02 (match_orthogonal per tensor), because "
        "at=10st was reached; constant, configured 5.0e-02..1.0e-01, 4 of 4 learning rates could not be found and are the "
        "configured ones, weight decay 0.0e+00..1.0e-01 -> 0.0e+00..1.0e-03 (match), momentum zero, as the running one is "
        "not finite, no guard, as the last update's norm is nan, freed 5.4 KB"
    ]
    assert all(tensor.isfinite().all() for tensor in ended.weights.values())


@pytest.mark.parametrize("criterion", [SWATS, PAPER])
def test_swats_does_not_fire_on_steps_that_are_not_finite_and_says_so_once(criterion: Swats) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ended = run(Case(partial(switch, "swats", None, when=criterion), net=partial(BrokenNet, 3)))
    assert ended.classes == ["AdamW"] * STEPS
    said = [str(warning.message) for warning in caught if "finite" in str(warning.message)]
    assert said == [f"A step seen by {criterion} was not finite at step 4. It is passed over."]
    assert f"NO SWITCH: training ended at step 24, before when={criterion}." in ended.lines


class TimeIsOver(Callback):
    """Lets the trainer's timer believe so after seven steps."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 7:
            [timer] = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
            timer.load_state_dict({"time_elapsed": {"train": 1e6}})


class Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 7


@pytest.mark.parametrize("how", ["early stopping", "time", "a stop"])
def test_a_training_that_ends_before_its_switch_says_so(how: str) -> None:
    extra, options = {
        "early stopping": ([EarlyStopping("val/loss", patience=1)], {}),
        "time": ([TimeIsOver()], {"max_time": {"hours": 1}}),
        "a stop": ([Stop()], {}),
    }[how]
    ended = run(
        Case(partial(switch, "smooth", "23st", when=OnThreshold(monitor="val/loss", below=-1.0)), "", ScriptedNet, options),
        extra=extra,
    )
    steps = len(ended.classes)
    assert 0 < steps < 23
    assert ended.classes == ["AdamW"] * steps
    told = [line for line in ended.lines if "SWITCH" in line]
    assert told == [f"NO SWITCH: training ended at step {steps}, before at=23st or when=OnThreshold(monitor=val/loss, below=-1.0)."]


def test_a_switch_back() -> None:
    """Adam begins with SGD's mean gradient, its square, and the matched step."""
    back = switch("smooth", "14st", optimizer=partial(Adam, lr=0.5))
    ended = run(Case(partial(switch, "smooth", then=back)))
    assert ended.classes == ["AdamW"] * 10 + ["SGD"] * 4 + ["Adam"] * 10
    [_, second] = [line for line in ended.lines if "SWITCH" in line]
    assert second.startswith("SWITCH at step 14 (epoch 3): SGD lr 2.8e-02/1.0e-02/1.1e-02/2.5e-03 -> Adam lr ")
    assert "momentum carried, updates held to a norm of " in second


DRY = AnyOf(of={"low": LOW, "settled": SWATS, "paper": PAPER, "both": AllOf(of={"low": LOW, "settled": SWATS})})


def test_a_dry_run_tells_when_each_of_several_would_have_switched() -> None:
    dry = run(Case(partial(switch, "smooth", "20st", when=DRY, dry_run=True), net=ScriptedNet))
    plain = run(Case(Callback, net=ScriptedNet))
    assert dry.classes == plain.classes == ["AdamW"] * STEPS
    assert dry.state == plain.state
    assert all(torch.equal(dry.weights[name], plain.weights[name]) for name in plain.weights)
    told = [line for line in dry.lines if "DRY RUN" in line]
    settled = dry.shown[8]["settled/lr"]
    paper = dry.shown[8]["paper/lr"]
    assert told == [
        f"DRY RUN at step 9 (epoch 2): the trigger would switch now, because settled: the learning rate for SGD has settled, at "
        f"{settled:.4g} and paper: the learning rate for SGD has settled, at {paper:.4g}.",
        f"DRY RUN at step 9 (epoch 2): settled would switch now, because the learning rate for SGD has settled, at {settled:.4g}.",
        f"DRY RUN at step 9 (epoch 2): paper would switch now, because the learning rate for SGD has settled, at {paper:.4g}.",
        f"DRY RUN at step 9 (epoch 2): both.settled would switch now, because the learning rate for SGD has settled, at "
        f"{settled:.4g}.",
        "DRY RUN at step 12 (epoch 2): low would switch now, because val/loss is 0.6429, below 0.68.",
        "DRY RUN at step 12 (epoch 2): both would switch now, because low: val/loss is 0.6429, below 0.68 and settled: the "
        f"learning rate for SGD has settled, at {settled:.4g}.",
        "DRY RUN at step 12 (epoch 2): both.low would switch now, because val/loss is 0.6429, below 0.68.",
        "DRY RUN at step 20 (epoch 5): at would switch now, because at=20st was reached.",
    ]


FOOT = {
    "lr": (
        "keep",
        "The learning rate that is handed over is at the foot of the schedule: AdamW steps with 4.3e-05, and its base is 1.0e-02. "
        "The next phase would hardly move. Let the switch come earlier, or write handover.lr=own.",
    ),
    "guard": (
        Handover(guard=1.5),
        "The updates to whose length the guard holds the next ones are at the foot of the schedule: AdamW steps with 4.3e-05, and "
        "its base is 1.0e-02. The next phase would hardly move. Let the switch come earlier, or write handover.guard=null.",
    ),
}


@pytest.mark.parametrize("name", [*FOOT, ""])
def test_what_is_handed_over_at_the_foot_of_a_schedule_is_said(name: str) -> None:
    handover, message = FOOT.get(name, ("own", None))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(Case(partial(switch, handover, "23st"), net=scheduled))
    assert [str(warning.message) for warning in caught if "foot" in str(warning.message)] == [message] * bool(name)


KNOWN = "needs the gradients' mean, which Adam, AdamW, NAdam, RAdam and SGD keep, and"
MISTAKES: dict[str, tuple[dict[str, Any], Callable[[], LightningModule], str]] = {
    "to L-BFGS": (
        {"handover": "smooth", "optimizer": LBFGS},
        ShardableNet,
        f"handover.lr: 'match_orthogonal' {KNOWN} the next one is LBFGS. Write own or keep.",
    ),
    "from L-BFGS": (
        {"handover": "smooth"},
        partial(attach, ValidatedNet(), optimizer=LBFGS),
        f"handover.lr: 'match_orthogonal' {KNOWN} the running optimizer is LBFGS. Write own or keep.",
    ),
    "an unknown length": (
        {"handover": Handover(guard=1.0, guard_for="5%"), "at": "10st"},
        ShardableNet,
        "handover.guard_for: 5% cannot be counted: the number of training steps is not known. Set trainer.max_steps, or write it "
        "in steps (st).",
    ),
    "SWATS after SGD": (
        {"handover": "own", "then": switch("swats", None, when=SWATS)},
        ShardableNet,
        "then.when: SWATS looks at steps of Adam, AdamW, NAdam or RAdam, and the running optimizer is SGD.",
    ),
    "decays of tensors merged": (
        {"handover": "smooth", "then": switch(Handover(weight_decay="match"), "12st")},
        GroupedNet,
        "then.handover.weight_decay: the running phase has a weight decay for each tensor, which groups of several cannot match. "
        "Write own, or let lr be keep, or matched per tensor.",
    ),
    "learning rates of tensors merged": (
        {"handover": "smooth", "then": switch("keep", "12st", param_groups=ParamGroups())},
        ShardableNet,
        "then.handover.lr: the running phase has a learning rate for each tensor, which other groups cannot keep. Write "
        "param_groups: inherit, or own.",
    ),
}


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_rule_without_a_meaning_ends_the_run_before_its_first_step(name: str) -> None:
    options, net, message = MISTAKES[name]
    endless = {"max_epochs": -1, "max_time": "00:00:10:00"} if name == "an unknown length" else {}
    with counted_steps() as counts, pytest.raises(ConfigError) as caught:
        run(Case(partial(switch, **options), net=net, options=endless))
    assert str(caught.value) == f"switch.{message}"
    assert counts == {}


class ScaledNet(GroupedNet):
    """Plain or fused Adam; at one step its loss is infinite."""

    def __init__(self, fused: bool = False, at_step: int | None = None) -> None:
        super().__init__()
        self.fused = fused
        self.at_step = at_step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if self.trainer.global_step == self.at_step else loss

    def configure_optimizers(self) -> Any:
        return Adam(self.parameters(), lr=1e-2, fused=self.fused)


def scaling() -> list[Any]:
    """16-mixed on the CPU, with a scaler that really scales; Lightning's own choice there would be bf16."""
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5))]


def test_swats_sees_gradients_as_they_were_before_they_were_scaled() -> None:
    make = partial(switch, "swats", None, when=replace(SWATS, rtol=1e-9))
    scaled = run(Case(make, net=ScaledNet, plugins=scaling))
    plain = run(Case(make, net=ScaledNet))
    assert scaled.classes == plain.classes == ["Adam"] * STEPS
    assert scaled.shown[5]["lr"] == pytest.approx(plain.shown[5]["lr"], rel=0.02)


def test_swats_refuses_a_fused_optimizer_that_unscales_by_itself() -> None:
    with counted_steps() as counts, pytest.raises(ConfigError) as caught:
        run(Case(partial(switch, "swats", when=SWATS), net=partial(ScaledNet, True), plugins=scaling))
    assert str(caught.value) == (
        "switch.when: a fused Adam unscales gradients by itself under trainer.precision=16-mixed, so they are not seen as it takes "
        "them. Set its fused to false."
    )
    assert counts == {}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_step_within_the_guards_window_that_the_scaler_skips_counts(tmp_path: Path) -> None:
    """So the window of a run that resumes after it ends where that of the uninterrupted run does."""
    steps = [11, 13, 15]
    net = partial(ScaledNet, False, 12)
    whole, runs = resumed(Case(partial(switch, SMOOTH), net=net, plugins=scaling), tmp_path, steps)
    assert len(whole.classes) == STEPS
    assert_resumed(steps, whole, runs)


# All or nothing


@pytest.mark.parametrize(
    "part",
    ["handover._matched", "handover._match_decay", "handover._carry", "handover._sums", "switch.build_scheduler"],
)
def test_an_error_within_the_handover_leaves_the_old_phase_whole(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(Case(partial(switch, SMOOTH)))
    broken = switch(SMOOTH)
    module, _, name = part.partition(".")
    path = f"lightning_adaptive.{module}.{name}"
    plain = getattr(importlib.import_module(f"lightning_adaptive.{module}"), name)

    def fails_after(*arguments: Any, **options: Any) -> Any:
        plain(*arguments, **options)
        raise RuntimeError("planted")

    monkeypatch.setattr(path, fails_after)
    with pytest.raises(RuntimeError, match="planted"):
        run(Case(lambda: broken), extra=[SaveOnException(tmp_path / "saved.ckpt")])
    monkeypatch.undo()
    assert broken.phase == 0
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    [optimizer] = saved["optimizer_states"]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer["param_groups"]] == [(0.01, 0.1), (0.005, 0.0)]
    assert [sorted(state) for state in optimizer["state"].values()] == [["exp_avg", "exp_avg_sq", "step"]] * 4
    ended = run(Case(partial(switch, SMOOTH)), path=tmp_path / "saved.ckpt", seed=9)
    assert_resumed([10], whole, [ended])


# Data that never come, validations that seldom do


@pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero", "ignore:`.*` returned 0 length")
@pytest.mark.parametrize("how", ["limit", "drop_last"])
def test_a_training_without_a_batch_is_an_error(how: str) -> None:
    batches = loader() if how == "limit" else DataLoader(dataset(4), batch_size=8, drop_last=True)
    runner = trainer(max_epochs=2, callbacks=[switch("smooth")], **({"limit_train_batches": 0} if how == "limit" else {}))
    with counted_steps() as counts, pytest.raises(ConfigError) as caught:
        runner.fit(ScriptedNet(), batches, loader())
    assert str(caught.value) == (
        "switch: there is not one training batch, so the switch is never reached. Check trainer.limit_train_batches, and whether "
        "the data fill a batch where drop_last is true."
    )
    assert counts == {}


def test_patience_counts_validations_and_not_epochs() -> None:
    """Validated every other epoch, it is 0.5, 0.7 and 0.1 that are seen."""
    trigger = OnThreshold(monitor="val/loss", above=0.65)
    ended = run(Case(partial(switch, "keep", None, when=trigger), "", ScriptedNet, {"check_val_every_n_epoch": 2}))
    assert ended.classes.index("SGD") == 16
    patient = OnPlateau(monitor="val/loss", patience=1)
    ended = run(Case(partial(switch, "keep", "23st", when=patient), "", ScriptedNet, {"check_val_every_n_epoch": 2}))
    assert ended.classes.index("SGD") == 23


# Manual optimization


def manual(folder: Path | None, path: Path | None) -> tuple[dict[str, torch.Tensor], list[list[float]], dict[str, int]]:
    callback = OptimizerSwitchCallback("20st", TO_SGD, handover=SMOOTH, optimizer_index=1, scheduler=Cosine(length="60st"))
    saver = [] if folder is None else [SaveAtEachMoment(folder)]
    lrs: list[list[float]] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            lrs.append([group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups])

    runner = trainer(max_epochs=3, callbacks=[callback, ExactResume(), Look(), *saver])
    model = TwoOptimizers()
    with counted_steps() as counts:
        runner.fit(model, loader(), ckpt_path=path, weights_only=True)
    return whole_weights(runner), lrs, dict(counts)


def test_one_of_several_optimizers_hands_over_and_resumes_within_the_guards_window(tmp_path: Path) -> None:
    """The window of six steps holds three of this optimizer's updates, since steps of both count."""
    weights, lrs, counts = manual(tmp_path, None)
    assert counts == {"Adam": 20 + 14, "SGD": 14}
    assert len(lrs[-1]) == 3  # Adam's one group, and a group for each of the two tensors
    for step in (18, 20, 22, 24, 26, 30):
        resumed_weights, resumed_lrs, _ = manual(None, tmp_path / f"{step:03d}-batch.ckpt")
        assert resumed_lrs == lrs[step // 2 :], step
        assert all(torch.equal(resumed_weights[name], tensor) for name, tensor in weights.items()), step


def test_a_guards_window_may_end_within_a_batch() -> None:
    norms: list[float] = []

    class Twice(ShardableNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(2):
                self.optimizers().zero_grad()
                self.manual_backward(torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
                before = torch.nn.utils.parameters_to_vector(self.parameters()).detach()
                self.optimizers().step()
                norms.append(float((torch.nn.utils.parameters_to_vector(self.parameters()).detach() - before).norm()))

    callback = switch(replace(SMOOTH, guard_for="5st"), "4st")
    trainer(max_epochs=1, callbacks=[callback]).fit(Twice(), loader())
    limit = callback.state_dict()["limit"]
    assert norms[4:9] == [pytest.approx(limit, rel=1e-3)] * 5
    assert norms[9] > 1.1 * limit


def test_swats_sees_the_steps_of_the_one_that_it_watches() -> None:
    class Unlike(TwoOptimizers):
        def configure_optimizers(self) -> Any:
            optimizers, _ = super().configure_optimizers()
            optimizers[1].param_groups[0]["lr"] = 7.0
            return optimizers

    callback = OptimizerSwitchCallback("40st", TO_SGD, when=Swats(), optimizer_index=0)
    trainer(max_epochs=1, callbacks=[callback]).fit(Unlike(scheduled=False), loader())
    assert callback._lrs == [1e-2], "and not 7.0, with which the other one steps after it"
    assert callback.shows["lr"] > 0


# Data that end at different steps


def uneven(make: Callable[[], Callback], options: dict[str, Any]) -> list[str] | str:
    """Eight batches on rank 0, seven on rank 1."""
    warnings.simplefilter("ignore")
    callback = make()
    watch = Watch(callback)
    size = 64 if os.environ["RANK"] == "0" else 56
    runner = trainer(
        strategy="ddp",
        devices=2,
        callbacks=[callback, watch],
        use_distributed_sampler=False,
        max_epochs=-1,
        max_steps=24,
        **options,
    )
    try:
        runner.fit(GroupedNet(), loader(size), loader())
    except ConfigError as error:
        return str(error)
    return watch.classes


@pytest.mark.parametrize("make", [partial(switch, "smooth"), partial(switch, "swats", None, when=SWATS)], ids=["at", "swats"])
def test_a_decision_at_steps_that_all_share_needs_no_even_data(make: Callable[[], Callback], pair: Pair) -> None:
    one, other = pair.run(uneven, make, {"limit_val_batches": 0}, timeout=60)
    assert one == other
    assert one.index("SGD") > 0


@pytest.mark.parametrize(
    "make", [partial(switch, "smooth", "2ep"), partial(switch, "swats", "20st", when=STANDS)], ids=["epochs", "validations"]
)
def test_a_decision_at_steps_that_only_some_make_is_refused(make: Callable[[], Callback], pair: Pair) -> None:
    assert pair.run(uneven, make, {}, timeout=60) == [
        f"trainer.use_distributed_sampler: the processes have data of different lengths ({steps} steps an epoch on one of them), "
        "so they would not switch at one step. Let Lightning part the data (true), or set trainer.limit_train_batches to the least "
        "number of batches."
        for steps in (8, 7)
    ]
