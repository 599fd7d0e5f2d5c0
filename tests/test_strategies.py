"""The switch on every strategy, on two real processes; the whole table is `tests.matrix`."""

from __future__ import annotations

import gc
import tempfile
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.optim import SGD, Adam, AdamW

from lightning_adaptive import OptimizerSwitchCallback
from lightning_adaptive.strategies import before_restore, placement
from tests import matrix
from tests.cpu_strategies import STRATEGIES, ShardableNet
from tests.matrix import Ended, to_sgd
from tests.pair import Pair
from tests.support import ROOT, Net, counted_steps, digest, loader, trainer

SHAPES = {"net.0.weight": (32, 16), "net.0.bias": (32,), "net.2.weight": (4, 32), "net.2.bias": (4,)}
QUICK = ("switch at epoch", "resume at", "weights as DDP", "old state freed")


@pytest.fixture(scope="module")
def ddp(pair: Pair) -> Ended:
    """What the reference run under DDP ends with."""
    return matrix.row(pair, "ddp", None, columns=QUICK)[1]


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name != "ddp"])
def test_switches_resumes_and_ends_as_ddp_does(strategy: str, pair: Pair, ddp: Ended) -> None:
    cells, _ = matrix.row(pair, strategy, ddp, columns=QUICK)
    assert {name: cells[name] for name in QUICK} == dict.fromkeys(QUICK, "yes")


@pytest.mark.slow
def test_the_table_in_the_readme_is_what_is_seen() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert matrix.table() in readme


def shapes_of(strategy: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    seen: dict[str, Any] = {}

    class Look(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.update(placement(trainer).full_shapes(pl_module))

    trainer(strategy=STRATEGIES[strategy](), devices=2, max_steps=1, callbacks=[Look()]).fit(ShardableNet(), loader())
    return seen


@pytest.mark.parametrize("strategy", ["ddp", "fsdp sharded", "fsdp2 sharded", "deepspeed 2", "deepspeed 3"])
def test_parameters_are_known_by_name_and_full_shape(strategy: str, pair: Pair) -> None:
    assert pair.run(shapes_of, strategy) == [SHAPES, SHAPES]


def after_switches(count: int, strategy: str) -> tuple[int, int, int]:
    """Goes back and forth so often; returns how many of its optimizers live, the module's hooks, and the number of switches."""
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    switch: OptimizerSwitchCallback | None = None
    for step in range(count, 0, -1):
        factory = partial(SGD, lr=1e-3) if step % 2 else partial(Adam, lr=1e-3)
        switch = OptimizerSwitchCallback(at=f"{step}st", optimizer=factory, then=switch)
    found: list[int] = []

    class Count(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.append(sum(reference() is not None for reference in built))
            found.append(sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in pl_module.modules()))

    built: list[weakref.ref[Any]] = []
    exchange = OptimizerSwitchCallback._exchange

    def remember(callback: OptimizerSwitchCallback, trainer: Trainer, phase: Any, state: Any) -> None:
        built.append(weakref.ref(phase.optimizer))
        exchange(callback, trainer, phase, state)

    callbacks = [Count()] if switch is None else [switch, Count()]
    gc.collect()
    gc.disable()
    try:
        with mock.patch.object(OptimizerSwitchCallback, "_exchange", remember):
            runner = trainer(strategy=STRATEGIES[strategy](), devices=2, max_steps=count + 2, max_epochs=-1, callbacks=callbacks)
            runner.fit(ShardableNet(), loader())
    finally:
        gc.enable()
    alive, hooks = found
    return alive, hooks, len(built)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2 sharded", "deepspeed 2", pytest.param("deepspeed 3", marks=pytest.mark.slow)])
def test_fifty_switches_leave_one_phase_alive(strategy: str, pair: Pair) -> None:
    _, hooks, _ = pair.run(after_switches, 0, strategy)[0]
    assert pair.run(after_switches, 50, strategy) == [(1, hooks, 50)] * 2


class Redundant(ShardableNet):
    """Its Adam's state is spread over the ranks."""

    def configure_optimizers(self) -> Any:
        return _spread(self.parameters(), optimizer_class=Adam, lr=1e-2)


def _spread(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of its own use of torch.jit when it is imported

    return ZeroRedundancyOptimizer(parameters, **options)


def redundant(folder: Path, source: bool, resumed_from: int | None) -> str:
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    target = partial(_spread, optimizer_class=AdamW, lr=1e-3)
    switch = to_sgd("2ep") if source else OptimizerSwitchCallback(at="2ep", optimizer=target)
    saver = ModelCheckpoint(folder, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    model = Redundant() if source else ShardableNet()
    callbacks = [switch, *([] if resumed_from is not None else [saver])]
    runner = trainer(strategy="ddp", devices=2, max_epochs=4, callbacks=callbacks, enable_checkpointing=resumed_from is None)
    runner.fit(model, loader(), ckpt_path=None if resumed_from is None else folder / f"epoch{resumed_from - 1}.ckpt")
    return digest(model)


@pytest.mark.parametrize("source", [True, False], ids=["source", "target"])
def test_zero_redundancy_optimizer(source: bool, pair: Pair, tmp_path: Path) -> None:
    reference = pair.run(redundant, tmp_path, source, None)
    assert reference[0] == reference[1]
    for epoch in (1, 2, 3):
        assert pair.run(redundant, tmp_path, source, epoch) == reference


def compressed() -> tuple[str, bool]:
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    calls = [0]

    def hook(state, bucket):  # type: ignore[no-untyped-def] # torch checks annotations, and refuses those that are text
        calls[0] += 1
        return fp16_compress_hook(state, bucket)

    class Compress(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            model: Any = trainer.strategy.model
            model.register_comm_hook(None, hook)  # Lightning itself does so on GPUs only

        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 2:
                calls[0] = 0

    model = ShardableNet()
    trainer(strategy="ddp", devices=2, max_epochs=3, callbacks=[to_sgd("1ep"), Compress()]).fit(model, loader())
    return digest(model), calls[0] > 0


def test_a_hook_that_compresses_gradients_is_kept(pair: Pair) -> None:
    one, other = pair.run(compressed)
    assert one == other
    assert one[1]


def crossing(source: str, target: str, folder: Path) -> tuple[float, float]:
    """Difference of a run of the source that goes on under the target from one that stays, before and after the switch."""
    switch = partial(to_sgd, "2ep")
    stayed = matrix.train(source, folder, switch)
    crossed = [matrix.train(target, folder, switch, epoch) for epoch in (1, 3)]
    return matrix.difference(stayed, crossed[0]), matrix.difference(stayed, crossed[1])


@pytest.mark.parametrize(
    ("source", "target"),
    [("ddp", "fsdp2 sharded"), ("ddp", "fsdp sharded"), ("fsdp2 full", "ddp"), ("fsdp2 full", "fsdp2 sharded")],
)
def test_a_file_resumes_under_another_strategy(source: str, target: str, pair: Pair, tmp_path: Path) -> None:
    assert pair.run(crossing, source, target, tmp_path) == [(0, 0)] * 2


def sgd_run(folder: Path, resumed: bool) -> str:
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    model = ShardableNet()
    switch = OptimizerSwitchCallback(at="1ep", optimizer=partial(SGD, lr=0.1, momentum=0.9), on_resume="config")
    saver = ModelCheckpoint(folder, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1)
    options: dict[str, Any] = {"strategy": "ddp", "devices": 2} if dist.is_torchelastic_launched() else {}
    callbacks = [switch] if resumed else [switch, saver]
    runner = trainer(max_epochs=4, callbacks=callbacks, enable_checkpointing=not resumed, **options)
    with counted_steps() as counts:
        runner.fit(model, loader(), ckpt_path=folder / "epoch2.ckpt" if resumed else None)
    assert not resumed or set(counts) == {"SGD"}
    return digest(model)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_of_two_processes_resumes_on_one(pair: Pair, tmp_path: Path) -> None:
    """With half the processes an epoch has twice the steps, which is said and obeys the policy."""
    pair.run(sgd_run, tmp_path, False)
    sgd_run(tmp_path, True)


def test_several_users_share_one_wrapper_of_load_checkpoint() -> None:
    runner = trainer(max_epochs=1)
    seen: list[str] = []
    removals = [before_restore(runner, lambda path, name=name: seen.append(f"{name} {path.name}")) for name in "ab"]
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"epoch": 3, "state_dict": {}}, Path(folder, "saved.ckpt"))
        runner.strategy.load_checkpoint(Path(folder, "saved.ckpt"))
        assert seen == ["a saved.ckpt", "b saved.ckpt"]
        removals[0]()
        runner.strategy.load_checkpoint(Path(folder, "saved.ckpt"))
        assert seen == ["a saved.ckpt", "b saved.ckpt", "b saved.ckpt"]
    for remove in removals:
        remove()
    assert "load_checkpoint" not in vars(runner.strategy)


# What happens without us.


class OnlyTheSetter(Callback):
    """A new optimizer through the setter at an epoch, and nothing for a resume."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 2:
            trainer.strategy.optimizers = [SGD(pl_module.parameters(), lr=0.1, momentum=0.9)]


def test_a_switch_through_the_setter_alone_does_not_resume_on_fsdp2(pair: Pair, tmp_path: Path) -> None:
    pair.run(matrix.train, "fsdp2 sharded", tmp_path, OnlyTheSetter)
    with pytest.raises(RuntimeError, match=r"Missing key in checkpoint state_dict: optimizer_0\.state\."):
        pair.run(matrix.train, "fsdp2 sharded", tmp_path, OnlyTheSetter, 4)


class OneRankAlone(Callback):
    """Only rank 1 switches."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1 and trainer.global_rank == 1:
            trainer.strategy.optimizers = [SGD(pl_module.parameters(), lr=0.1)]


def disagreeing() -> str:
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    model = ShardableNet()
    trainer(strategy="ddp", devices=2, max_epochs=2, callbacks=[OneRankAlone()]).fit(model, loader())
    return digest(model)


def test_ranks_that_disagree_end_with_two_models_and_nobody_says_so(pair: Pair) -> None:
    one, other = pair.run(disagreeing)
    assert one != other


def test_replacing_an_entry_of_the_trainers_list_changes_nothing() -> None:
    class ThroughTheList(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.optimizers[0] = SGD(pl_module.parameters(), lr=0.1)

    with counted_steps() as counts:
        trainer(max_epochs=2, callbacks=[ThroughTheList()]).fit(Net(), loader())
    assert counts == {"Adam": 16}
