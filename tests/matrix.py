"""The table of strategies: every cell is run on two processes. ``python -m tests.matrix`` prints it; the README holds it."""

from __future__ import annotations

import gc
import importlib
import sys
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, Adam

from lightning_adaptive import Cosine, OptimizerSwitchCallback
from lightning_adaptive.strategies import running_optimizer
from tests.cpu_strategies import STRATEGIES, ShardableNet, whole_weights
from tests.pair import Pair
from tests.support import counted_steps, loader, trainer

EPOCHS = 6
STEPS_PER_EPOCH = 4
COLUMNS = (
    "switch at epoch",
    "switch at step",
    "resume before",
    "resume at",
    "resume after",
    "second switch and back",
    "weights as DDP",
    "old state freed",
)


def to_sgd(at: str, then: OptimizerSwitchCallback | None = None) -> OptimizerSwitchCallback:
    sgd = partial(SGD, lr=0.1, momentum=0.9)
    return OptimizerSwitchCallback(at=at, optimizer=sgd, scheduler=Cosine(warmup="1ep"), then=then)


def and_back() -> OptimizerSwitchCallback:
    return to_sgd("1ep", then=OptimizerSwitchCallback(at="4ep", optimizer=partial(Adam, lr=1e-2)))


@dataclass(frozen=True)
class Ended:
    """What a run ended with, on one process."""

    weights: dict[str, torch.Tensor]
    steps: Counter[str]
    lrs: list[float]
    freed: list[bool]


class Watch(Callback):
    """Looks at the running phase without holding it: what of the first is alive after the switch, and the whole weights."""

    def __init__(self, collect: bool) -> None:
        self.collect = collect
        self.first: list[weakref.ref[Any]] = []
        self.freed: list[bool] = []
        self.lrs: list[float] = []
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        optimizer = running_optimizer(trainer)
        self.lrs.append(float(optimizer.param_groups[0]["lr"]))
        if not self.first and optimizer.state:
            moments = [state["exp_avg"] for state in optimizer.state.values() if "exp_avg" in state]
            self.first = [weakref.ref(found) for found in (optimizer, trainer.optimizers[0], *moments)]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.freed = [reference() is None for reference in self.first]
        if self.collect:
            self.weights = whole_weights(trainer)


def train(strategy: str, folder: Path, switch: Any, resumed_from: int | None = None, epochs: int = EPOCHS, seed: int = 1) -> Ended:
    """One run on each process of a pair; saves every epoch unless it was resumed."""
    warnings.simplefilter("ignore")
    seed_everything(seed, verbose=False)
    watch, callbacks = Watch(collect=True), []
    if resumed_from is None:
        callbacks.append(ModelCheckpoint(folder, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1))
    runner = trainer(
        strategy=STRATEGIES[strategy](),
        devices=2,
        max_epochs=epochs,
        callbacks=[switch(), watch, *callbacks],
        enable_checkpointing=bool(callbacks),
    )
    path = None if resumed_from is None else folder / f"epoch{resumed_from - 1}.ckpt"
    gc.collect()
    gc.disable()
    try:
        with counted_steps() as counts:
            runner.fit(ShardableNet(), loader(), ckpt_path=path)
    finally:
        gc.enable()
    return Ended(watch.weights, counts, watch.lrs, watch.freed)


def difference(one: Ended, other: Ended) -> float:
    """The largest absolute difference of any weight."""
    return max(float((one.weights[name] - other.weights[name]).abs().max()) for name in one.weights)


def cell(equal: float) -> str:
    return "yes" if equal == 0 else f"differs by {equal:.1e}"


def row(pair: Pair, strategy: str, ddp: Ended | None, columns: Sequence[str] = COLUMNS) -> tuple[dict[str, str], Ended]:
    """Runs the cells of one strategy.

    Args:
        pair: the two processes.
        strategy: name in `STRATEGIES`.
        ddp: what the same run under DDP ended with; ``None`` when this is it.
        columns: which cells to run.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = partial(_both, pair, strategy, Path(folder))
        reference = run(partial(to_sgd, "2ep"))
        cells = {"switch at epoch": _switched(reference, 2 * STEPS_PER_EPOCH)}
        for name, epoch in (("resume before", 1), ("resume at", 2), ("resume after", 4)):
            if name in columns:
                cells[name] = cell(difference(reference, run(partial(to_sgd, "2ep"), epoch)))
    cells["weights as DDP"] = "-" if ddp is None else cell(difference(reference, ddp))
    cells["old state freed"] = "yes" if reference.freed and all(reference.freed) else f"no: {reference.freed}"
    if "switch at step" in columns:
        with tempfile.TemporaryDirectory() as folder:
            run = partial(_both, pair, strategy, Path(folder))
            at_step = run(partial(to_sgd, "10st"))
            resumed = cell(difference(at_step, run(partial(to_sgd, "10st"), 4)))
            cells["switch at step"] = _switched(at_step, 10) if resumed == "yes" else resumed
    if "second switch and back" in columns:
        with tempfile.TemporaryDirectory() as folder:
            run = partial(_both, pair, strategy, Path(folder))
            back = run(and_back)
            differences = [difference(back, run(and_back, epoch)) for epoch in (1, 3, 4, 5)]
            cells["second switch and back"] = cell(max(differences))
    return {name: cells.get(name, "") for name in COLUMNS}, reference


def _both(pair: Pair, strategy: str, folder: Path, switch: Any, resumed_from: int | None = None) -> Ended:
    one, other = pair.run(train, strategy, folder, switch, resumed_from)
    assert difference(one, other) == 0, "the ranks ended with two models"
    return one


def _switched(ended: Ended, step: int) -> str:
    """Whether the new optimizer stepped from there on; FSDP2 adds steps with learning rate 0 when it saves or loads."""
    sgd = EPOCHS * STEPS_PER_EPOCH - step
    return "yes" if ended.steps["SGD"] == sgd and ended.steps["Adam"] >= step else f"no: {dict(ended.steps)}"


def table() -> str:
    """The table in Markdown."""
    lines = [f"| strategy | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    ddp: Ended | None = None
    for strategy in STRATEGIES:
        with Pair() as pair:
            cells, ended = row(pair, strategy, ddp)
        ddp = ddp or ended
        lines.append(f"| {strategy} | {' | '.join(cells.values())} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    # By its name, under which the processes find its functions.
    print(importlib.import_module("tests.matrix").table())
