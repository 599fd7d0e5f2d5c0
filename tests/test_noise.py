"""The monitor of gradient noise against gradients computed by hand, on every strategy."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import LBFGS, SGD
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from lightning_adaptive import (
    CheckpointError,
    ConfigError,
    ExactResume,
    GradientNoiseMonitor,
    OptimizerSwitchCallback,
    ParamGroups,
    strategies,
)
from lightning_adaptive.gradient_norms import norms_of
from lightning_adaptive.noise_scale import estimates
from lightning_adaptive.report import read_curves
from tests.cpu_strategies import STRATEGIES, CpuFSDP, ShardableNet
from tests.pair import Pair
from tests.support import ROOT, Net, dataset, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

Batch = tuple[Tensor, Tensor]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"decay": -0.1}, "decay: -0.1 lies outside 0 to below 1. It is a share of the past."),
    ({"every_n_steps": 0}, "every_n_steps: 0 is no number of steps. Write a whole number from 1 on."),
    (
        {"batch_size": 0},
        "batch_size: 0 is no number of samples. Write a whole number from 1 on, a function of the batch, or nothing.",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GradientNoiseMonitor(**options)
    assert str(caught.value) == message


# Known noise

DIMENSIONS = 20
GRAD_SQ = 1.0
TRACE = (DIMENSIONS + 1) * GRAD_SQ + DIMENSIONS
"""Of ``g = x (x.e - epsilon)`` with standard normal x and epsilon and ``|e| = 1``: ``E|g|^2 = (d + 2) |e|^2 + d``."""


TRIALS = 30
"""Models that are trained side by side, each a parameter group of its own."""


def sampled(samples: int, generator: torch.Generator) -> Batch:
    inputs = torch.randn(samples, DIMENSIONS, generator=generator)
    return inputs, inputs[:, 0] + torch.randn(samples, generator=generator)


def test_eight_micro_batches_are_less_noisy_than_the_last_alone() -> None:
    """At a batch of 256; gpt-neox, for one, compares the last micro-batch alone with the whole."""
    generator = torch.Generator().manual_seed(0)
    samples = sampled(1000 * 256, generator)
    gradients = (samples[0] * -samples[1][:, None]).double().reshape(1000, 8, 32, DIMENSIONS).mean(2)
    squares, whole = gradients.square().sum(2), gradients.mean(1).square().sum(1)
    of_all, of_last = (estimates(small, whole, 32, 256)[1] for small in (squares.mean(1), squares[:, -1]))
    assert float(of_all.mean()) == pytest.approx(TRACE, rel=0.02)
    assert float(of_all.std() / of_last.std()) <= 0.4


class Known(LightningModule):
    """Linear models that stay at zero, where their gradients' mean and covariance are known."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(DIMENSIONS) for _ in range(TRIALS))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, targets = (part.chunk(TRIALS) for part in batch)
        losses = [(x @ w - y).square().mean() / 2 for x, w, y in zip(inputs, self.weights, targets, strict=True)]
        return torch.stack(losses).sum()

    def configure_optimizers(self) -> Any:
        return SGD([{"params": [weights]} for weights in self.weights], lr=0.0)


class Batches(Dataset):
    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def known_batches(steps: int, micro_batches: int, samples: int) -> list[Batch]:
    inputs, targets = sampled(steps * micro_batches * samples, torch.Generator().manual_seed(0))
    return list(zip(inputs.split(samples), targets.split(samples), strict=True))


def whole_batches(batches: Sequence[Any], processes: int = 1) -> DataLoader:
    """As they are; each process has every so many of them, in their order."""
    first = int(os.environ["RANK"]) if processes > 1 else 0
    return DataLoader(Batches(batches[first::processes]), batch_size=None)


class Each(Callback):
    """Keeps the monitor's values after each step."""

    def __init__(self, monitor: GradientNoiseMonitor) -> None:
        self.monitor = monitor
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if strategies.closes_accumulation_window(trainer):
            self.values.append(self.monitor.values())


def measured(module: LightningModule, batches: Sequence[Any], monitor: GradientNoiseMonitor | None = None, **options: Any) -> list:
    """The monitor's values after each step of an epoch; without smoothing unless a monitor is given."""
    monitor = monitor or GradientNoiseMonitor(decay=0.0)
    each = Each(monitor)
    callbacks = [monitor, each, *options.pop("callbacks", [])]
    runner = trainer(max_epochs=1, callbacks=callbacks, use_distributed_sampler=False, **options)
    runner.fit(module, whole_batches(batches, options.get("devices", 1)))
    assert no_hooks(module)
    return each.values


def fit(module: LightningModule, *callbacks: Callback, **options: Any) -> None:
    """An epoch of eight batches, two in a step."""
    batches = {"max_epochs": 1, "accumulate_grad_batches": 2, **options}
    trainer(callbacks=list(callbacks), **batches).fit(module, loader())


def uncounted(module: LightningModule, monitor: GradientNoiseMonitor, **options: Any) -> list[str]:
    """What is said of steps that are not counted."""
    with pytest.warns(UserWarning, match="counted") as told:
        fit(module, monitor, Each(monitor), **options)
    return [str(warning.message) for warning in told if "counted" in str(warning.message)]


def no_hooks(module: nn.Module) -> bool:
    return not any(parameter._backward_hooks for parameter in module.parameters())


def recovered(options: Mapping[str, Any], micro_batches: int, samples: int) -> Tensor:
    """Both estimates of 3,000 trials."""
    monitor = GradientNoiseMonitor(decay=0.0, per_group=True, batch_size=samples)
    batches = known_batches(3000 // TRIALS, micro_batches, samples * TRIALS)
    found = measured(Known(), batches, monitor, **options)
    names = [[f"noise/{name}/pg{number}" for name in ("grad_sq", "trace")] for number in range(1, TRIALS + 1)]
    return torch.tensor([[each[name] for name in pair] for each in found for pair in names], dtype=torch.float64)


def check_recovered(trials: Tensor) -> None:
    assert len(trials) == 3000
    means, errors = trials.mean(0), trials.std(0) / math.sqrt(len(trials))
    assert float(means[0]) == pytest.approx(GRAD_SQ, rel=0.05)
    assert float(means[1]) == pytest.approx(TRACE, rel=0.02)
    assert torch.all((means - torch.tensor([GRAD_SQ, TRACE])).abs() < 2.58 * errors), "outside of the 99 % interval"


KNOWN = {
    "accumulated": ({"accumulate_grad_batches": 4}, 4, 8),
    "two processes": ({"strategy": "ddp", "devices": 2}, 2, 16),
    "two processes, accumulated": ({"strategy": "ddp", "devices": 2, "accumulate_grad_batches": 2}, 4, 8),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_noise_is_recovered(name: str, pair: Pair) -> None:
    for trials in pair.run(recovered, *KNOWN[name]) if "processes" in name else [recovered(*KNOWN[name])]:
        check_recovered(trials)


# The monitor, against gradients by hand


class Still(Net):
    """Its weights stay, so that its gradients can be told afterwards."""

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.0)


def micro_batches(sizes: Sequence[int]) -> list[Batch]:
    inputs, targets = dataset(sum(sizes)).tensors
    return list(zip(inputs.split(list(sizes)), targets.split(list(sizes)), strict=True))


def by_hand(module: LightningModule, batches: Sequence[Any], sizes: Sequence[int]) -> dict[str, float]:
    """What a step with these micro-batches shows, each gradient computed for itself and in float64."""
    module = module.double()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rows = []
    for batch in batches:
        whole = [part.double() if part.is_floating_point() else part for part in batch]
        found = torch.autograd.grad(module.training_step(whole, 0), parameters, allow_unused=True)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in zip(found, parameters, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in dense]).detach())
    gradients, inverse = torch.stack(rows), sum(1 / size for size in sizes) / len(sizes)
    small, big = gradients.square().sum(1).mean(), gradients.mean(0).square().sum()
    grad_sq, trace = (float(value) for value in estimates(small, big, 1 / inverse, len(sizes) / inverse))
    return {"noise/grad_sq": grad_sq, "noise/trace": trace, "noise/batch": len(sizes) / inverse}


def close(expected: Mapping[str, float], rel: float = 1e-4) -> Any:
    return pytest.approx(expected, rel=rel)


def shown(values: Mapping[str, float], *names: str) -> dict[str, float]:
    return {name: values[name] for name in names or ("noise/grad_sq", "noise/trace", "noise/batch")}


class Frozen(Still):
    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)


class Tied(Still):
    """One layer, used twice in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        self.net[2] = self.net[0]


class Unused(Still):
    """A layer that only every other micro-batch needs."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(16, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        layer = self.other if float(batch[0][0, 0]) > 0 else self.net
        return nn.functional.cross_entropy(layer(batch[0]), batch[1])


class Sparse(Still):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 16, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0] + self.table(batch[1])), batch[1])


class Penalized(Still):
    """Asks autograd for the parameters' gradients by itself, before the backward."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        grads = torch.autograd.grad(loss, list(self.parameters()), create_graph=True)
        return loss + sum(grad.square().sum() for grad in grads)


class Checkpointed(Still):
    """As with most checkpointing: each layer once."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(checkpoint(self.net, batch[0], use_reentrant=False), batch[1])


class Large(Still):
    """A weight of more elements than the CPU sums in one piece, and one whose gradient is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 40_000), nn.ReLU(), nn.Linear(40_000, 4))
        self.turned = nn.Parameter(torch.full((40_000, 16), 1e-3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1]) + (batch[0] @ self.turned.T).square().mean()


@pytest.mark.parametrize("turned", [False, True])
def test_norms_of_large_gradients_are_exact(turned: bool) -> None:
    """In one piece, torch 2.13 loses 7e-4 of the sum of 10 million squares on a CPU."""
    grad = torch.randn(2000, 2000, generator=torch.Generator().manual_seed(0)) * 1e-3
    grad = grad.t() if turned else grad
    found = sum(float(norm) ** 2 for norm in norms_of([grad]))
    assert found == pytest.approx(float(grad.double().square().sum()), rel=1e-5)
    assert float(torch.linalg.vector_norm(grad)) ** 2 != pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("module", [Still, Frozen, Tied, Unused, Sparse, Penalized, Checkpointed, Large])
def test_every_kind_of_gradient_is_seen(module: type[Still]) -> None:
    torch.manual_seed(0)
    instance, sizes = module(), [8] * 4
    [found] = measured(instance, micro_batches(sizes), accumulate_grad_batches=4)
    assert shown(found) == close(by_hand(instance, micro_batches(sizes), sizes))


def test_unequal_batches_and_an_epoch_that_ends_within_a_window() -> None:
    sizes = [8, 8, 8, 8, 8, 3]
    batches = micro_batches(sizes)
    first, rest = measured(Still(), batches, accumulate_grad_batches=4)
    assert shown(first) == close(by_hand(Still(), batches[:4], sizes[:4]))
    assert shown(rest) == close(by_hand(Still(), batches[4:], sizes[4:]))
    assert rest["noise/batch"] == pytest.approx(4 / (1 / 8 + 1 / 3))


def test_a_rest_of_one_batch_is_not_counted() -> None:
    monitor = GradientNoiseMonitor()
    measured(Still(), micro_batches([8] * 5), monitor, accumulate_grad_batches=2)
    assert (float(monitor.metric.updates[0]), float(monitor.metric.skipped)) == (2, 0)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_not_seen(algorithm: str) -> None:
    batches = micro_batches([8] * 4)
    [plain] = measured(Still(), batches, accumulate_grad_batches=4)
    clipping = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    assert measured(Still(), batches, accumulate_grad_batches=4, **clipping) == [plain]


@pytest.mark.parametrize("options", [{"batch_size": 8}, {"batch_size": lambda batch: len(batch[1])}])
def test_the_size_of_a_batch_may_be_given(options: dict[str, Any]) -> None:
    batches = micro_batches([8] * 4)
    [plain] = measured(Still(), batches, accumulate_grad_batches=4)
    [given] = measured(Still(), batches, GradientNoiseMonitor(decay=0.0, **options), accumulate_grad_batches=4)
    assert given == plain


def test_groups_have_values_of_their_own() -> None:
    class Grouped(Still):
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[0].parameters(), "name": "body"}, {"params": self.net[2].parameters()}]
            return SGD(groups, lr=0.0)

    batches = micro_batches([8] * 4)
    [found] = measured(Grouped(), batches, GradientNoiseMonitor(decay=0.0, per_group=True), accumulate_grad_batches=4)
    assert shown(found) == close(by_hand(Still(), batches, [8] * 4))
    frozen = by_hand(Frozen(), batches, [8] * 4)
    assert found["noise/trace/pg2"] == pytest.approx(frozen["noise/trace"], rel=1e-4)
    assert found["noise/trace/body"] == pytest.approx(found["noise/trace"] - frozen["noise/trace"], rel=1e-3)


# Mixed precision


def with_scaler(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.mark.parametrize("fused", [False, True])
def test_the_loss_scale_is_undone(fused: bool) -> None:
    class Fused(Still):
        def configure_optimizers(self) -> Any:
            return SGD(self.parameters(), lr=0.0, fused=fused)

    batches = micro_batches([8] * 4)
    found = [measured(Fused(), batches, accumulate_grad_batches=4, plugins=with_scaler(scale))[0] for scale in (64.0, 4096.0)]
    assert found[0] == close(found[1], rel=1e-2)
    assert shown(found[0]) == close(by_hand(Still(), batches, [8] * 4), rel=0.05)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions(precision: str) -> None:
    batches = micro_batches([8] * 4)
    [found] = measured(Still(), batches, accumulate_grad_batches=4, precision=precision)
    assert shown(found) == close(by_hand(Still(), batches, [8] * 4), rel=0.05)


class Overflowing(Net):
    """Some steps of its second batch have gradients that are not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * (math.inf if batch_idx in (3, 5) else 1)


def test_steps_that_mixed_precision_skips_are_not_counted_and_said_once() -> None:
    monitor = GradientNoiseMonitor()
    said = uncounted(Overflowing(), monitor, plugins=with_scaler(64.0))
    assert said == ["1 step had gradients that were not finite. Such a step's noise is not counted."]
    assert (float(monitor.metric.updates[0]), float(monitor.metric.skipped)) == (2, 2)
    assert math.isfinite(monitor.values()["noise/scale"])


def test_a_gradient_that_comes_in_pieces_is_not_counted_and_said_once() -> None:
    class Reentrant(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            layer, inputs = self.net[0], batch[0].requires_grad_()
            once = checkpoint(layer, inputs, use_reentrant=True)
            twice = checkpoint(layer, once[:, :16], use_reentrant=True)
            return nn.functional.cross_entropy(self.net[2](twice), batch[1])

    monitor = GradientNoiseMonitor()
    assert uncounted(Reentrant(), monitor) == [
        "Some parameter's gradient came in several pieces, as under checkpointing with use_reentrant=True. Such a step's noise is "
        "not counted. Set use_reentrant to false."
    ]
    assert (float(monitor.metric.updates[0]), float(monitor.metric.skipped)) == (0, 4)
    assert monitor.values() == {}


# Strategies

PAIRED: dict[str, Callable[[], Any]] = {
    **{name: STRATEGIES[name] for name in ("ddp", "ddp static graph", "ddp find unused", "fsdp sharded", "fsdp2 sharded")},
    "ddp with views": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "fsdp of whole gradients": lambda: CpuFSDP(sharding_strategy="SHARD_GRAD_OP"),
}


class ShardableStill(ShardableNet, Still):
    pass


class Headless(Still):
    def __init__(self) -> None:
        super().__init__()
        self.net[2].requires_grad_(False)


class Partial(ShardableNet, Headless):
    pass


def paired(name: str, module: type[Net], sizes: Sequence[int], micro: int, *, per_group: bool = False) -> Any:
    """Values after each step on two processes, and the weights with the monitor and without it."""
    monitored, alone = module(), module()
    options = {"devices": 2, "accumulate_grad_batches": micro}
    monitor = GradientNoiseMonitor(decay=0.0, per_group=per_group)
    values = measured(monitored, micro_batches(sizes), monitor, strategy=PAIRED[name](), **options)
    runner = trainer(max_epochs=1, strategy=PAIRED[name](), use_distributed_sampler=False, **options)
    runner.fit(alone, whole_batches(micro_batches(sizes), 2))
    local = [
        [parameter.detach().to_local() if hasattr(parameter, "to_local") else parameter.detach() for parameter in one.parameters()]
        for one in (monitored, alone)
    ]
    return values, all(torch.equal(one, other) for one, other in zip(*local, strict=True))


@pytest.mark.parametrize(
    ("name", "module"), [*((name, ShardableStill) for name in PAIRED), ("ddp", Partial), ("fsdp2 sharded", Partial)]
)
def test_two_processes_see_what_one_would(name: str, module: type[Net], pair: Pair) -> None:
    """Eight batches, two to each process in each step; under FSDP2 those of a micro-batch are seen as one."""
    # The first step of a static graph with accumulation ends in an assertion of torch 2.13, with the monitor or without it.
    micro = 1 if name == "ddp static graph" else 2
    batches = micro_batches([8] * 4 * micro)
    if name == "fsdp2 sharded":
        batches = [tuple(map(torch.cat, zip(*batches[place : place + 2], strict=True))) for place in range(0, 8, 2)]
    half = len(batches) // 2
    reference = Headless() if module is Partial else Still()
    expected = [by_hand(reference, steps, [len(step[1]) for step in steps]) for steps in (batches[:half], batches[half:])]
    for values, is_same in pair.run(paired, name, module, [8] * 4 * micro, micro):
        assert is_same
        assert [shown(value) for value in values] == [close(value) for value in expected]


class Split(Still):
    """Two processes share a batch, and each holds a part of its layers; the last bias is whole on both."""

    def configure_model(self) -> None:
        parallelize_module(self.net, self.device_mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})


def split_layers() -> list[dict[str, float]]:
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
    monitor = GradientNoiseMonitor(decay=0.0)
    each = Each(monitor)
    options = {"devices": 2, "accumulate_grad_batches": 4, "use_distributed_sampler": False}
    runner = trainer(max_epochs=1, strategy=strategy, callbacks=[monitor, each], **options)
    runner.fit(Split(), whole_batches(micro_batches([8] * 4)))
    return each.values


def test_layers_that_are_split_count_once(pair: Pair) -> None:
    expected = by_hand(Still(), micro_batches([8] * 4), [8] * 4)
    for [found] in pair.run(split_layers):
        assert shown(found) == close(expected)


def test_the_estimate_does_not_change_with_accumulation_and_processes(pair: Pair) -> None:
    sizes = [8] * 16
    alone = measured(Still(), micro_batches(sizes), accumulate_grad_batches=8)
    for values, _ in pair.run(paired, "ddp", Still, sizes, 4):
        assert len(values) == 2
        assert [close(value) for value in alone] == values


def test_processes_with_batches_of_other_sizes(pair: Pair) -> None:
    sizes = [8, 4, 8, 2]
    expected = by_hand(Still(), micro_batches(sizes), sizes)
    [one, other] = pair.run(paired, "ddp", Still, sizes, 2)
    assert one == other
    assert shown(one[0][0]) == close(expected)
    # Under FSDP2 a mean of both processes' means is one gradient.
    for values, _ in pair.run(paired, "fsdp2 sharded", ShardableStill, sizes, 2):
        assert values[0]["noise/batch"] == pytest.approx(expected["noise/batch"])


@pytest.mark.parametrize("name", ["ddp", "ddp find unused", "fsdp sharded", "fsdp2 sharded"])
def test_training_is_the_same_with_the_monitor(name: str, pair: Pair) -> None:
    for values, is_same in pair.run(paired, name, ShardableNet, [8] * 14, 3):
        assert is_same
        assert len(values) == 3
        assert len({value["noise/scale"] for value in values}) == (2 if name == "fsdp2 sharded" else 3)  # a rest of one batch


def counted_reductions() -> tuple[int, int]:
    """Reductions of the strategy, and measured steps."""
    monitor, strategy = GradientNoiseMonitor(every_n_steps=2), DDPStrategy()
    calls = []

    def reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        calls.append(tensor.dtype)
        return DDPStrategy.reduce(strategy, tensor, *arguments, **options)

    strategy.reduce = reduce  # type: ignore[method-assign]
    runner = trainer(max_epochs=1, strategy=strategy, devices=2, callbacks=[monitor])
    runner.fit(Net(), loader())
    return calls.count(torch.float64), int(monitor.metric.updates[0])


def test_there_is_one_reduction_in_a_measured_step(pair: Pair) -> None:
    assert pair.run(counted_reductions) == [(2, 2)] * 2


# Hooks, logging, waiting


def test_nothing_is_left_behind_by_a_backward_that_fails() -> None:
    class Failing(Still):
        def on_before_backward(self, loss: Tensor) -> None:
            if self.global_step == 1 and self.trainer.fit_loop.batch_idx % 2:
                assert not no_hooks(self), "the test looks where the hooks are"
                loss.register_hook(self.fail)

        def fail(self, grad: Tensor) -> None:
            raise RuntimeError("no memory")

    module, monitor = Failing(), GradientNoiseMonitor()
    with pytest.raises(RuntimeError, match="no memory"):
        fit(module, monitor)
    assert no_hooks(module)
    assert float(monitor.metric.updates[0]) == 1
    fit(Still(), monitor)
    assert float(monitor.metric.updates[0]) == 4, "another run than the one before"


def test_hooks_are_there_in_the_backward_of_measured_steps_alone() -> None:
    class Watching(Net):
        def __init__(self) -> None:
            super().__init__()
            self.hooked: list[bool] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            assert no_hooks(self)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            assert no_hooks(self)

        def on_before_backward(self, loss: Tensor) -> None:
            self.hooked.append(not no_hooks(self))

    module, monitor = Watching(), GradientNoiseMonitor(every_n_steps=2)
    runner = trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[monitor], val_check_interval=1, num_sanity_val_steps=2)
    runner.fit(module, loader(), loader())
    # The gradient of a step's first batch is all that lies in .grad, and is read there.
    assert module.hooked == [False, True, False, False, False, True, False, False]
    assert float(monitor.metric.updates[0]) == 2


def test_a_second_fit_goes_on() -> None:
    monitor, module = GradientNoiseMonitor(), Net()
    runner = trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[monitor])
    runner.fit(module, loader())
    runner.fit_loop.max_epochs = 2
    runner.fit(module, loader())
    assert float(monitor.metric.updates[0]) == 8


def logged(folder: Path, monitor: GradientNoiseMonitor, **options: Any) -> dict[str, tuple[list[int], list[float]]]:
    logger = CSVLogger(folder, name="", version="")
    trainer(max_epochs=1, accumulate_grad_batches=2, callbacks=[monitor], logger=logger, **options).fit(Net(), loader(size=256))
    return read_curves(folder / "metrics.csv")


def test_what_is_logged_and_when(tmp_path: Path) -> None:
    curves = logged(tmp_path, GradientNoiseMonitor(every_n_steps=3), log_every_n_steps=4)
    names = {name for name in curves if name.startswith("noise/")}
    assert names == {"noise/scale", "noise/grad_sq", "noise/trace", "noise/snr", "noise/batch"}
    assert curves["noise/scale"][0] == curves["train/loss"][0] == [3, 7, 11, 15]
    assert curves["noise/batch"][1] == [16] * 4


def test_a_logger_that_fails_ends_nothing(tmp_path: Path) -> None:
    class Broken(CSVLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if "noise/scale" in metrics:
                raise OSError("no space")

    monitor = GradientNoiseMonitor()
    with pytest.warns(UserWarning, match=r"^Broken could not log noise/scale, .*: OSError\('no space'\)\. Training goes on\.$"):
        fit(Net(), monitor, logger=Broken(tmp_path))
    assert float(monitor.metric.updates[0]) == 4


def test_the_host_waits_once_for_each_logging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reads: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        original = getattr(Tensor, name)

        def spied(tensor: Tensor, *arguments: Any, original: Any = original, name: str = name) -> Any:
            if Path(sys._getframe(1).f_code.co_filename).name in ("noise.py", "noise_scale.py", "gradient_norms.py", "metric.py"):
                reads.append(name)
            return original(tensor, *arguments)

        monkeypatch.setattr(Tensor, name, spied)
    logged(tmp_path, GradientNoiseMonitor(per_group=True), log_every_n_steps=8)
    assert reads == ["tolist"] * 3  # two of logging, one at the end of training


def test_groups_that_a_switch_brings_begin_anew_and_the_whole_goes_on() -> None:
    monitor = GradientNoiseMonitor(per_group=True)
    groups = ParamGroups(weights={"match": "*.weight"})
    switch = OptimizerSwitchCallback(at="2st", optimizer=partial(SGD, lr=0.1), param_groups=groups)
    fit(Net(), monitor, switch)
    assert monitor.metric.groups == ("weights", "default")
    assert monitor.metric.updates.tolist() == [4, 2, 2]


def test_a_later_optimizer_with_a_closure_is_not_measured_and_said() -> None:
    monitor = GradientNoiseMonitor()
    switch = OptimizerSwitchCallback(at="2st", optimizer=partial(LBFGS, max_iter=2))
    told = r"^From step 2 on gradient noise is not measured: LBFGS evaluates several gradients in a step\.$"
    with pytest.warns(UserWarning, match=told):
        fit(Net(), monitor, switch)
    assert float(monitor.metric.updates[0]) == 2


def test_accumulation_that_begins_later() -> None:
    monitor = GradientNoiseMonitor()
    scheduler = GradientAccumulationScheduler({0: 1, 1: 4})
    fit(Net(), monitor, scheduler, max_epochs=2, accumulate_grad_batches=1)
    assert float(monitor.metric.updates[0]) == 2
    assert monitor.values()["noise/batch"] == 32


# Resume


def series(strategy: str, folder: Path | None, ckpt_path: Path | None = None) -> tuple[list[dict[str, float]], list[float]]:
    """Values after each step of three epochs, and what was seen at the end."""
    monitor = GradientNoiseMonitor(decay=0.9, per_group=True)
    each = Each(monitor)
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)
    callbacks: list[Callback] = [monitor, each, ExactResume(), *([saver] if folder else [])]
    options = {} if strategy == "one" else {"strategy": STRATEGIES[strategy](), "devices": 2}
    runner = trainer(max_epochs=3, accumulate_grad_batches=2, callbacks=callbacks, enable_checkpointing=bool(folder), **options)
    runner.fit(ShardableNet(), loader(shuffle=True), ckpt_path=ckpt_path)
    return each.values, monitor.metric.updates.tolist()


def resumed(strategy: str, folder: Path) -> list[tuple[int, bool]]:
    """Steps from which a run was resumed, and whether it went on with the same values."""
    torch.manual_seed(1)
    whole, updates = series(strategy, folder)
    found = []
    for step in range(1, len(whole)):
        values, after = series(strategy, None, folder / f"step={step}.ckpt")
        found.append((step, values == whole[step:] and after == updates))
    return found


def test_a_resumed_run_goes_on_with_the_same_values(tmp_path: Path) -> None:
    assert resumed("one", tmp_path) == [(step, True) for step in range(1, 12)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2 sharded"])
def test_a_resumed_run_of_two_processes_goes_on_with_the_same_values(strategy: str, tmp_path: Path, pair: Pair) -> None:
    for found in pair.run(resumed, strategy, tmp_path):
        assert found == [(step, True) for step in range(1, 6)]


def test_the_saved_state_is_plain() -> None:
    monitor = GradientNoiseMonitor(per_group=True)
    fit(Net(), monitor)
    state = monitor.state_dict()
    assert json.loads(json.dumps(state)) == state
    assert state["groups"] == ["pg1"]
    assert state["updates"] == [4, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "the checkpoint holds GradientNoiseMonitor's state in version 2, not 1."),
        (
            {"trace": "x"},
            "GradientNoiseMonitor's state in the checkpoint is damaged: TypeError(\"new(): invalid data type 'str'\").",
        ),
        (
            {"trace": [1.0, 2.0]},
            "GradientNoiseMonitor's state in the checkpoint is damaged: ValueError('trace has the shape (2,)').",
        ),
    ],
)
def test_refuses_a_state_that_is_not_its_own(change: dict[str, Any], message: str) -> None:
    monitor = GradientNoiseMonitor()
    with pytest.raises(CheckpointError) as caught:
        monitor.load_state_dict({**monitor.state_dict(), **change})
    assert str(caught.value) == message


# Refusals when training starts


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Closed(Net):
    def configure_optimizers(self) -> Any:
        return LBFGS(self.parameters())


NOT_AVAILABLE: list[tuple[type[Net], dict[str, Any], str]] = [
    (
        Net,
        {},
        "trainer.accumulate_grad_batches: gradient noise is not available: 1 batch a step on one process gives one gradient, and "
        "noise shows between several. Write 2 or more, or train with DDP on several devices.",
    ),
    (
        Net,
        {"accumulate_grad_batches": 2, "limit_train_batches": 1},
        "trainer.accumulate_grad_batches: gradient noise is not available: 1 batch an epoch on one process gives one gradient, and "
        "noise shows between several. Make the batches smaller, or train with DDP on several devices.",
    ),
    (
        Manual,
        {},
        "gradient noise is not available under manual optimization, where Manual alone knows which gradients make a step. Set "
        "automatic_optimization to true, or feed a GradientNoiseScale from training_step.",
    ),
    (
        Closed,
        {"accumulate_grad_batches": 2},
        "optimizer: gradient noise is not available: LBFGS evaluates several gradients in a step. Choose another one.",
    ),
]


@pytest.mark.parametrize(("module", "options", "message"), NOT_AVAILABLE, ids=[message for _, _, message in NOT_AVAILABLE])
@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:trainer.accumulate_grad_batches=2 is more than")
def test_refuses_where_noise_cannot_be_seen(module: type[Net], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(module(), GradientNoiseMonitor(), **{"accumulate_grad_batches": 1, **options})
    assert str(caught.value) == message


def refused(name: str) -> str:
    strategy = {**STRATEGIES, "fsdp copied": lambda: CpuFSDP(sharding_strategy="NO_SHARD")}[name]()
    runner = trainer(max_epochs=1, strategy=strategy, devices=2, callbacks=[GradientNoiseMonitor()])
    try:
        runner.fit(ShardableNet(), loader())
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "fsdp2 sharded",
            "trainer.accumulate_grad_batches: gradient noise is not available: 1 batch a step under ModelParallelStrategy gives "
            "one gradient, and noise shows between several. Write 2 or more, or use DDP, where each process's own gradient is "
            "seen.",
        ),
        (
            "deepspeed 2",
            "trainer.strategy: gradient noise is not available under CpuDeepSpeed, which frees gradients when it has reduced them. "
            "Use one process with accumulation, DDP, FSDP or FSDP2.",
        ),
        (
            "fsdp copied",
            "trainer.strategy.sharding_strategy: gradient noise is not available with NO_SHARD, where several processes hold the "
            "same shard. Write FULL_SHARD or SHARD_GRAD_OP.",
        ),
        ("fsdp sharded", ""),
    ],
)
def test_refuses_on_two_processes(name: str, message: str, pair: Pair) -> None:
    assert pair.run(refused, name) == [message] * 2


def test_refuses_gradients_that_are_not_the_mean() -> None:
    def half(state: Any, bucket: Any) -> None: ...

    with pytest.raises(ConfigError) as caught:
        strategies.placement(SimpleNamespace(strategy=DDPStrategy(ddp_comm_hook=half))).hooks_see_own_gradients()  # type: ignore[arg-type]
    assert str(caught.value) == (
        "trainer.strategy.ddp_comm_hook: gradient noise is not available with half, after which gradients need not be the mean of "
        "the processes'. Use none, fp16_compress_hook or bf16_compress_hook."
    )
    allowed = SimpleNamespace(strategy=DDPStrategy(ddp_comm_hook=fp16_compress_hook))
    assert strategies.placement(allowed).hooks_see_own_gradients()  # type: ignore[arg-type]


def test_refuses_other_strategies_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        strategies.placement(SimpleNamespace(strategy=object())).hooks_see_own_gradients()  # type: ignore[arg-type]
    assert str(caught.value) == (
        "trainer.strategy: gradient noise is not available on object. Available: one process, DDP, FSDP, FSDP2, and what is "
        "derived from them."
    )
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", torch.device("mps"))
    with pytest.raises(ConfigError) as caught:
        GradientNoiseMonitor().on_fit_start(trainer(), Net())
    assert str(caught.value) == (
        "trainer.accelerator: gradient noise is not available on mps, which has no float64. Train on a CPU or a GPU of CUDA."
    )


UNCLEAR: list[tuple[Any, str]] = [
    (
        [torch.zeros(4, 16), torch.zeros(3)],
        "batch_size: the number of samples is not clear from a batch (list) with tensors of lengths 3, 4. Give a number, or a "
        "function of the batch.",
    ),
    (
        {"text": "abc"},
        "batch_size: the number of samples is not clear from a batch (dict) with no tensor. Give a number, or a function of "
        "the batch.",
    ),
    ([torch.zeros(0, 16)], "batch_size: 0 is no number of samples. A batch needs samples."),
]


@pytest.mark.parametrize(("batch", "message"), UNCLEAR, ids=[message for _, message in UNCLEAR])
def test_refuses_a_batch_whose_size_is_not_clear(batch: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        measured(Still(), [batch] * 2, accumulate_grad_batches=2)
    assert str(caught.value) == message


def test_refuses_a_size_that_is_none() -> None:
    with pytest.raises(ConfigError) as caught:
        fit(Still(), GradientNoiseMonitor(batch_size=lambda batch: 0))
    assert str(caught.value) == "batch_size: 0 is no number of samples. The function must return a whole number from 1 on."


def test_sizes_are_read_off_nested_batches() -> None:
    @dataclass
    class Item:
        inputs: Tensor
        name: str = "x"

    for batch in (torch.zeros(5), {"a": [torch.zeros(5, 2), "text", 3], "b": torch.tensor(1.0)}, Item(torch.zeros(5, 1))):
        assert GradientNoiseMonitor()._samples(batch) == 5


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "gradient_noise.md").read_text(encoding="utf-8")
    [code] = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(code, {"model": Net(), "loader": loader(size=512)})
    assert float(capsys.readouterr().out.splitlines()[-1]) > 0
