"""The plan before training: it is what training then does, and making it changes nothing."""

from __future__ import annotations

import csv
import inspect
import itertools
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import ExponentialLR, MultiplicativeLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader

from lightning_adaptive import (
    Clock,
    CombinedOptimizer,
    ConfigError,
    Cosine,
    CosineRestarts,
    Cyclic,
    LayerDecay,
    Linear,
    OneCycle,
    OptimizerSwitchCallback,
    ParamGroups,
    PerOption,
    Piecewise,
    Plateau,
    StepDecay,
    attach,
    preview,
    strategies,
    trainers,
)
from lightning_adaptive.phases import Phase, planned_state_bytes, state_bytes
from lightning_adaptive.plan import Plan, plan
from lightning_adaptive.series import MOST_POINTS, Epoch, corners, of_phase
from tests.cli import Run
from tests.cpu_strategies import STRATEGIES, ShardableNet
from tests.pair import Pair
from tests.support import Net, ValidatedNet, digest, loader, trainer

GROUPS = ParamGroups(biases={"ndim": 1, "weight_decay": 0, "lr_scale": 2}, last={"match": "net.2.*", "lr": 0.05})

Values = dict[tuple[int, str, str], float]
"""By step, group and option."""


class Seen(Callback):
    """What each step trained with, and the plan that was made at its start."""

    def __init__(self) -> None:
        self.values: Values = {}
        self.plan: Plan | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.plan = plan(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        groups = trainer.optimizers[0].param_groups
        for index, group in enumerate(groups, start=1):
            name = group.get("name", f"pg{index}" if len(groups) > 1 else "")
            options = {option: group[option] for option in ("lr", "weight_decay", "momentum") if option in group}
            if "betas" in group:
                options["momentum"] = group["betas"][0]
            self.values |= {(trainer.global_step, name, option): value for option, value in options.items()}


def drawn(shown: Plan) -> Values:
    return {
        (step, series.group, series.option): value
        for phase in shown.phases
        for series in phase.curves
        for step, value in zip(series.steps, series.values, strict=True)
    }


def switch(at: str, optimizer: Any, **options: Any) -> OptimizerSwitchCallback:
    return OptimizerSwitchCallback(at=at, optimizer=optimizer, **options)


def own(optimizer: Any, **options: Any) -> Callable[[], Net]:
    return lambda: attach(Net(), optimizer=optimizer, **options)


class Configured(Net):
    """Configures a scheduler as people do, without this package."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": StepLR(optimizer, 2, gamma=0.5), "interval": "step", "frequency": 3}]


class Doubled(Net):
    """Two schedulers for one optimizer, which multiply."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        falling = {"scheduler": ExponentialLR(optimizer, 0.9), "interval": "step"}
        return [optimizer], [falling, {"scheduler": StepLR(optimizer, 1, gamma=0.1)}]


sgd = partial(SGD, lr=0.02, momentum=0.9, weight_decay=0.1)
adamw = partial(AdamW, lr=0.1, betas=(0.9, 0.8), weight_decay=0.3)
RUNS: dict[str, tuple[Callable[[], Net], Callable[[], OptimizerSwitchCallback | None], dict[str, Any]]] = {
    "one phase": (own(adamw, scheduler=Cosine(warmup="20%")), lambda: None, {}),
    "no scheduler of ours": (Net, lambda: None, {}),
    "a module of its own": (Configured, lambda: switch("1ep", adamw, scheduler=Linear()), {}),
    "two schedulers": (Doubled, lambda: None, {"max_epochs": 3}),
    "groups": (own(adamw, scheduler=Cosine(), param_groups=GROUPS), lambda: switch("9st", sgd, scheduler=Linear()), {}),
    "layers": (own(adamw, param_groups=LayerDecay(0.5)), lambda: switch("1ep", sgd, scheduler=StepDecay(every="3st")), {}),
    "other options": (
        own(adamw, scheduler=PerOption(options={"weight_decay": Linear(), "momentum": Cosine(floor=0.5)}), param_groups=GROUPS),
        lambda: switch("60%", sgd, scheduler=OneCycle(momentum_low=0.8)),
        {},
    ),
    "a chain that continues": (
        own(adamw, scheduler=Piecewise(pieces={"a": Linear(length="50%"), "b": CosineRestarts()})),
        lambda: switch("3st", sgd, scheduler="continue", then=switch("10st", adamw, scheduler=Cyclic(rise="2st"))),
        {},
    ),
    "accumulation and limits": (
        own(adamw, scheduler=Cosine(interval="epoch")),
        lambda: switch("50%", sgd, scheduler=Linear(warmup="1ep")),
        {"accumulate_grad_batches": 3, "limit_train_batches": 7, "max_epochs": 5},
    ),
    "torch's, at each epoch": (
        own(adamw, scheduler=partial(ExponentialLR, gamma=0.5)),
        lambda: switch("12st", sgd, scheduler=partial(StepLR, step_size=1)),
        {"max_epochs": 4},
    ),
    "torch's, at each step": (
        own(sgd, scheduler=partial(OneCycleLR, max_lr=0.1, total_steps="100%")),
        lambda: switch("7st", adamw, scheduler=partial(OneCycleLR, max_lr=0.1, total_steps="100%"), param_groups=GROUPS),
        {},
    ),
    "torch's, at some": (
        own(
            sgd,
            scheduler={"scheduler": partial(MultiplicativeLR, lr_lambda=lambda _: 0.9), "interval": "step", "frequency": 3},
        ),
        lambda: switch("9st", sgd, scheduler={"scheduler": partial(StepLR, step_size=1), "interval": "epoch", "frequency": 2}),
        {"max_epochs": 6, "accumulate_grad_batches": 2},
    ),
    "several optimizers": (
        own(
            partial(CombinedOptimizer, optimizers={"matrices": partial(Muon, lr=0.02), "default": adamw}),
            scheduler=PerOption(options={"lr": Cosine(warmup="untuned"), "momentum": Linear(floor=0.5)}),
            param_groups=ParamGroups(matrices={"ndim": 2}),
        ),
        lambda: switch("9st", sgd),
        {"max_epochs": 4},
    ),
    "max_steps": (own(sgd, scheduler=Linear()), lambda: switch("50%", adamw), {"max_epochs": -1, "max_steps": 13}),
}


@pytest.mark.parametrize("name", RUNS)
def test_what_preview_draws_is_what_training_does(name: str) -> None:
    make, make_switch, options = RUNS[name]

    def runner() -> tuple[Trainer, Seen]:
        seen, built = Seen(), make_switch()
        callbacks = [seen] if built is None else [built, seen]
        return trainer(**{"max_epochs": 2, "callbacks": callbacks, **options}), seen

    shown = preview(runner()[0], make(), loader())
    fitted, seen = runner()
    fitted.fit(make(), loader())
    expected = drawn(shown)
    assert {step for step, _, _ in expected} == set(range(fitted.global_step))
    assert expected == {key: pytest.approx(seen.values[key], rel=1e-12) for key in expected}
    assert {key for key in seen.values if key[2] == "lr"} <= expected.keys()
    # What is not drawn of a phase does not change in it.
    ends = [*(phase.first_step for phase in shown.phases[1:]), fitted.global_step]
    for phase, end in zip(shown.phases, ends, strict=True):
        still = {(step, *key): value for (step, *key), value in seen.values.items() if phase.first_step <= step < end}
        for _, values in itertools.groupby(sorted(still.items(), key=lambda item: item[0][1:]), key=lambda item: item[0][1:]):
            found = list(values)
            assert all(key in expected for key, _ in found) or len({value for _, value in found}) == 1


def test_the_text_is_that_of_the_run_and_more() -> None:
    make, make_switch, _ = RUNS["groups"]
    seen = Seen()
    shown = preview(trainer(max_epochs=2, callbacks=[make_switch()]), make(), loader())
    trainer(max_epochs=2, callbacks=[make_switch(), seen]).fit(make(), loader())
    count = sum(parameter.numel() for parameter in Net().parameters())
    adam, momentum = f", state {(8 * count + 16) / 1000:.1f} KB", f", state {4 * count / 1000:.1f} KB"  # 4 steps beside the moments
    text, reasons = str(shown), ("  <- configure_optimizers", "  <- at=9st")
    assert all(state + reason in text for state, reason in zip((adam, momentum), reasons, strict=True))
    assert text.replace(adam, "").replace(momentum, "") == str(seen.plan)


# Nothing happens


class Loud(Callback):
    """Fails whatever it is asked."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        raise AssertionError("setup")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise AssertionError("on_fit_start")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        raise AssertionError("teardown")


def test_no_callback_is_called_and_no_file_is_written(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="log")
    model = own(adamw)()
    before = digest(model)
    preview(trainer(max_epochs=1, callbacks=[Loud()], logger=logger), model, loader())
    assert list(tmp_path.iterdir()) == []
    assert digest(model) == before
    assert multiprocessing.active_children() == []


class Lazy(ValidatedNet):
    """Builds its layers late, with random weights, and shuffles."""

    def __init__(self) -> None:
        super().__init__()
        del self.net

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.3), nn.Linear(32, 4))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [ValidatedNet, Lazy])
@pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`")
def test_a_fit_after_a_preview_is_the_fit(kind: type[Net], workers: int) -> None:
    def fitted(previewed: bool) -> str:
        seed_everything(3, verbose=False)
        model = attach(kind(), optimizer=partial(Adam, lr=0.01), scheduler=Cosine())
        data = DataLoader(loader().dataset, batch_size=8, shuffle=True, num_workers=workers)
        runner = trainer(max_epochs=2, callbacks=[switch("1ep", sgd, scheduler=Linear())])
        if previewed:
            if kind is Lazy:
                model.configure_model()
            assert preview(runner, model, data).total_steps == 16
            assert runner.optimizers == []
            assert runner.state.fn is None
        elif kind is Lazy:
            model.configure_model()
        runner.fit(model, data, loader())
        assert runner.global_step == 16
        return digest(model)

    assert fitted(True) == fitted(False)


def test_layers_that_are_built_late_are_in_the_plan() -> None:
    shown = preview(trainer(max_epochs=1), attach(Lazy(), optimizer=adamw), loader())
    assert shown.phases[0].parameters == 16 * 32 + 32 + 32 * 4 + 4


def test_a_scheduler_that_a_module_made_before_is_put_back() -> None:
    """As LightningCLI's do: the same objects at every call."""
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler = StepLR(optimizer, 1, gamma=0.5)

    class Kept(Net):
        def configure_optimizers(self) -> Any:
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    shown = preview(trainer(max_epochs=1), Kept(), loader())
    assert shown.phases[0].curves[0].values == pytest.approx([0.1 * 0.5**step for step in range(8)])
    assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch) == (0.1, 0)


class Data(LightningDataModule):
    """Has its data after ``setup``."""

    def setup(self, stage: str) -> None:
        assert stage == "fit"
        self.data = loader()

    def train_dataloader(self) -> DataLoader:
        return self.data


@pytest.mark.parametrize("given", ["datamodule", "first"])
def test_takes_data_as_fit_does(given: str) -> None:
    arguments = {"datamodule": Data()} if given == "datamodule" else {"train_dataloaders": Data()}
    assert preview(trainer(max_epochs=3), Net(), **arguments).total_steps == 24


@pytest.mark.parametrize(
    ("options", "callbacks", "message"),
    [
        (
            {"max_epochs": 1},
            [switch("2ep", sgd)],
            "switch.at: 2ep is step 16, but training ends after 8 steps. Choose an earlier moment.",
        ),
        (
            {"max_epochs": 3},
            [switch("2ep", sgd, scheduler=Cosine(warmup="20ep"))],
            "switch.scheduler.warmup: 20ep is 160 steps, but the schedule spans only 8.",
        ),
        (
            {"max_epochs": 3},
            [switch("2ep", sgd, param_groups=ParamGroups(no_decay={"match": "*.biass", "weight_decay": 0}))],
            "switch.param_groups.no_decay.match: '*.biass' matches none of 4 parameters. Nearest: net.0.bias, net.2.bias.",
        ),
    ],
    ids=["moment", "warm-up", "rule"],
)
def test_what_would_end_the_fit_ends_the_preview(options: Any, callbacks: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preview(trainer(callbacks=callbacks, **options), Net(), loader())
    assert str(caught.value) == message
    with pytest.raises(ConfigError) as fitted:
        trainer(callbacks=callbacks, **options).fit(Net(), loader())
    assert str(fitted.value) == str(caught.value)


def test_a_training_without_known_end_has_a_plan_and_the_curves_that_are_known() -> None:
    shown = preview(trainer(max_epochs=-1, callbacks=[switch("6st", sgd)]), own(adamw)(), loader())
    assert [phase.end_step for phase in shown.phases] == [6, None]
    assert [len(phase.curves) for phase in shown.phases] == [1, 0]


# Every strategy, without its processes


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_plan_of_two_processes_is_made_by_one(name: str, pair: Pair) -> None:
    model = ShardableNet()
    runner = trainer(strategy=STRATEGIES[name](), devices=2, max_epochs=3, callbacks=[two_process_switch()])
    shown = str(preview(runner, attach(model, optimizer=partial(AdamW, lr=0.1), scheduler=Cosine(warmup="20%")), loader()))
    assert "steps an epoch (4 batches, accumulate 1, 2 processes)" in shown
    said = [line.partition(", state")[0] for line in shown.splitlines()]
    assert [[line.partition("  <-")[0] for line in text.splitlines()[1:]] for text in pair.run(plan_of_two, name)] == [said[1:]] * 2


def two_process_switch() -> OptimizerSwitchCallback:
    return switch("50%", partial(SGD, lr=0.02, momentum=0.9), scheduler=Linear())


def plan_of_two(name: str) -> str:
    seen = Seen()
    runner = trainer(strategy=STRATEGIES[name](), devices=2, max_epochs=3, callbacks=[two_process_switch(), seen])
    runner.fit(attach(ShardableNet(), optimizer=partial(AdamW, lr=0.1), scheduler=Cosine(warmup="20%")), loader())
    return str(seen.plan)


class BuiltUnderStrategy(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.net


def test_layers_that_need_the_devices_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        preview(trainer(strategy=STRATEGIES["fsdp2 sharded"](), devices=2, max_epochs=1), BuiltUnderStrategy(), loader())
    assert str(caught.value) == (
        "trainer.strategy: BuiltUnderStrategy builds its layers in configure_model, which needs the devices of this strategy. "
        "Preview it with another."
    )


# The clock


def clock_of(data: DataLoader, **options: Any) -> Clock:
    runner = trainer(**options)
    with strategies.staged(runner, Net(), data):
        return trainers.clock(runner)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 3}, (8, 24)),
        ({"max_epochs": 3, "limit_train_batches": 5}, (5, 15)),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, (4, 12)),
        ({"max_epochs": 3, "accumulate_grad_batches": 3}, (3, 9)),
        ({"max_epochs": 3, "strategy": "ddp", "devices": 2}, (4, 12)),
        ({"max_epochs": 3, "strategy": "ddp", "devices": 2, "accumulate_grad_batches": 4}, (1, 3)),
        ({"max_steps": 13}, (8, 13)),
        ({"max_steps": 13, "max_epochs": 1}, (8, 8)),
        ({"max_steps": 5, "max_epochs": 4}, (8, 5)),
        ({"max_time": "00:00:01:00", "max_epochs": -1}, (8, None)),
        ({"max_epochs": -1}, (8, None)),
    ],
    ids=str,
)
def test_the_clock_of_a_trainer(options: dict[str, Any], expected: tuple[int, int | None]) -> None:
    clock = clock_of(loader(), **options)
    assert (clock.steps_per_epoch, clock.total_steps) == expected


def test_more_accumulation_than_an_epoch_has_batches_is_said() -> None:
    with pytest.warns(UserWarning, match=r"^trainer\.accumulate_grad_batches=100 is more than the 8 batches of an epoch"):
        assert clock_of(loader(), max_epochs=2, accumulate_grad_batches=100) == Clock(steps_per_epoch=1, total_steps=2)


# Parts


class RateFreeNet(Net):
    def configure_optimizers(self) -> Any:
        return Optimizer(self.parameters(), {"weight_decay": 0.1})


def test_a_first_phase_without_a_learning_rate(tmp_path: Path) -> None:
    switch = OptimizerSwitchCallback(at="1ep", optimizer=partial(SGD, lr=0.1))
    shown = preview(trainer(max_epochs=2, callbacks=[switch]), RateFreeNet(), loader())
    assert [phase.lr for phase in shown.phases] == ["lr -", "lr 1.0e-01 -> 1.0e-01"]
    shown.write_csv(tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["phase"], row["lr"]) for row in rows} == {("2", "0.1")}


TAKE_A_STEP = set(filter(inspect.isclass, vars(torch.optim).values())) - {Optimizer, LBFGS, torch.optim.SparseAdam}
"""Classes that take a plain step; the others need a closure, or sparse gradients."""


@pytest.mark.parametrize("kind", [*sorted(TAKE_A_STEP, key=lambda cls: cls.__name__), partial(SGD, momentum=0.9)])
def test_state_is_as_large_as_it_will_be(kind: Any) -> None:
    shapes = [(4, 6), (8, 3)]
    optimizer = kind([nn.Parameter(torch.ones(shape)) for shape in shapes], lr=0.1)
    planned = planned_state_bytes(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert (parameter == 1).all()
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert planned == state_bytes(optimizer)


def test_state_of_what_needs_a_real_step_is_not_guessed() -> None:
    assert planned_state_bytes(LBFGS([nn.Parameter(torch.ones(3))])) is None


def test_state_of_large_parameters_takes_no_memory() -> None:
    optimizer = Adam([nn.Parameter(torch.empty(2**40, 4, device="meta"))])
    assert planned_state_bytes(optimizer) == 2**40 * 4 * 4 * 2 + 4


@pytest.mark.parametrize("last", [0, 1, 2, 7, 999, 1000, 54_321])
@pytest.mark.parametrize("share", [0.0, 0.013, 0.4, 1.0])
def test_the_corner_of_a_warm_up_is_its_last_step(last: int, share: float) -> None:
    warmup = round(last * share)
    factor = Cosine(warmup=f"{warmup}st")(Clock(steps_per_epoch=10, total_steps=last + 1))
    # A warm-up as long as the training has its end there.
    expected = {0, last} if warmup < 2 or warmup >= last else {0, warmup - 1, last}
    assert corners(factor, last) == sorted(expected)


def test_a_long_phase_has_so_many_points_and_its_ends() -> None:
    [phase] = phases_of(own(adamw, scheduler=Linear()), max_steps=10 * MOST_POINTS + 7, max_epochs=-1)
    [series] = phase.curves
    assert MOST_POINTS <= len(series.steps) <= MOST_POINTS + 2
    assert (series.steps[0], series.steps[-1]) == (0, 10 * MOST_POINTS + 6)


def phases_of(make: Callable[[], Net], **options: Any) -> Any:
    return preview(trainer(**options), make(), loader()).phases


# On the command line


@pytest.fixture
def previewed(command_line: Run, tmp_path: Path) -> Callable[..., tuple[str, Path]]:
    def run(*arguments: str) -> tuple[str, Path]:
        ended = command_line("preview", *arguments)
        assert (ended.code, ended.err) == (0, "")
        *_, folder = sorted((tmp_path / "previews").iterdir())
        return ended.out, folder

    return run


def test_the_command_shows_draws_and_trains_nothing(previewed: Callable[..., tuple[str, Path]], tmp_path: Path) -> None:
    out, folder = previewed("recipe=digits_adam_to_sgd", "scheduler=cosine", "scheduler.warmup=10%")
    lines = (folder / "plan.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "PLAN  680 optimizer steps  <- 34 steps an epoch (34 batches, accumulate 1, 1 process), max_epochs 20"
    assert [line.split("  ")[1:4] for line in lines[1:]] == [
        ["phase 1", "Adam", ""],
        ["phase 2", "SGD", ""],
    ]
    assert "\n".join(lines) in out
    assert out.endswith(f"saved  {folder}: plan.txt  preview.csv  preview.png\nNothing was trained.\n")
    assert {path.name for path in folder.iterdir()} == {".hydra", "plan.txt", "preview.csv", "preview.png", "preview.log"}
    assert not (tmp_path / "outputs").exists()
    assert (folder / "preview.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "preview.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(680))
    assert {row["phase"]: row["optimizer"] for row in rows} == {"1": "Adam", "2": "SGD"}
    factor = Cosine(warmup="10%")(Clock(steps_per_epoch=34, total_steps=680))
    first = [float(row["lr"]) for row in rows if row["phase"] == "1"]
    assert first == [pytest.approx(max(first) * factor(step), rel=1e-12) for step in range(len(first))]


def test_the_command_counts_two_devices_with_accumulation_and_starts_none(previewed: Callable[..., tuple[str, Path]]) -> None:
    out, _ = previewed("recipe=digits_adam_to_sgd", "trainer=ddp_cpu", "trainer.devices=2", "trainer.accumulate_grad_batches=4")
    assert "PLAN  100 optimizer steps  <- 5 steps an epoch (17 batches, accumulate 4, 2 processes), max_epochs 20\n" in out
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ckpt_path=x.ckpt"], "ckpt_path: a preview shows a run from its first step on. Leave it out."),
        (["-m", "seed=1,2"], "a preview is of one run. Leave -m out."),
        (
            ["scheduler.warmup=20ep", "trainer.max_epochs=10"],
            "scheduler.warmup: 20ep is 680 steps, but the schedule spans only 340.",
        ),
        (["optimizer=adm"], "optimizer=adm: "),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, command_line: Run, tmp_path: Path) -> None:
    ended = command_line("preview", *arguments)
    assert ended.code == 2
    assert ended.err.startswith(f"lightning-adaptive: {message}")
    assert not list(tmp_path.glob("previews/*/preview.csv"))


def test_its_help_is_its_own(command_line: Run) -> None:
    ended = command_line("preview", "--help")
    assert ended.out.startswith("Shows the plan of a run")
    assert "usage: lightning-adaptive preview [flag ...]" in ended.out


def test_epochs_of_unknown_length_step_nothing_at_their_end() -> None:
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    phase = Phase(optimizer, [{"scheduler": ExponentialLR(optimizer, 0.5), "interval": "epoch"}])
    [series] = of_phase(phase, range(6), Epoch(None, float("inf"), 1))
    assert series.values == [0.1] * 6


def test_a_plateau_is_drawn_without_its_reductions() -> None:
    plateau = Plateau(monitor="val/loss", warmup="4st")
    [phase] = phases_of(lambda: attach(ValidatedNet(), optimizer=adamw, scheduler=plateau), max_epochs=1)
    assert phase.curves[0].values == pytest.approx([0.025, 0.05, 0.075, *[0.1] * 5])
