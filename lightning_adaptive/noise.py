"""`GradientNoiseMonitor`: the gradient noise scale, measured while a model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_adaptive import strategies, trainers
from lightning_adaptive.combined import needs_closure
from lightning_adaptive.errors import ConfigError, check_count, is_number, reading
from lightning_adaptive.gradient_norms import Leaf, OwnGradients, ShardedGradients, StepNorms
from lightning_adaptive.noise_scale import STATES, GradientNoiseScale
from lightning_adaptive.partitions import group_names

STATE_VERSION = 1
"""Version of the callback's saved state; CONTRIBUTING.md says what happens when it changes."""


class GradientNoiseMonitor(Callback):
    """Measures the gradient noise scale of a training, without a further backward.

    The small batches are the micro-batches of each process, the big one is what the optimizer steps with. So under DDP and FSDP
    every step has several; one process needs accumulation (``accumulate_grad_batches`` of 2 or more), and so does FSDP2, where
    only gradients that all processes have reduced can be seen. The loss is taken for the mean over a batch's samples.
    Gradients are those before clipping, without Lightning's and mixed precision's scaling.

    Logged to the module's loggers as often as Lightning logs (``log_every_n_steps``), after `GradientNoiseScale`'s names:
    ``noise/scale``, ``noise/grad_sq``, ``noise/trace``, ``noise/snr`` and ``noise/batch``. The state is in the checkpoint, so
    that a resumed run goes on with the same series.

    A measured step costs one pass over the gradients for each micro-batch and one over their sum, and one small all-reduce where
    there are several processes. The host waits for the device when values are logged or read, and not in between.

    Args:
        every_n_steps: optimizer steps from one measured step to the next.
        decay: share of the past in the averages, 0 to below 1; 0.99 looks back over about 100 measured steps.
        per_group: whether each parameter group of the optimizer has values of its own, ``noise/scale/NAME``; groups without
            a name are ``pg1`` and so on.
        batch_size: samples of a micro-batch on one process: a number, or a function of the batch. ``None`` takes the length that
            all tensors of the batch have.

    Raises:
        ConfigError: for an option out of range. When training starts: where the noise cannot be seen (one gradient a step, manual
            optimization, an optimizer with a closure, DeepSpeed). At the first step: for a batch whose size is not clear.
        CheckpointError: on resume, for saved state that is not this callback's.

    Attributes:
        metric: the `GradientNoiseScale`, on the trainer's device; the same on every process.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 1,
        decay: float = 0.99,
        per_group: bool = False,
        batch_size: int | Callable[[Any], int] | None = None,
    ) -> None:
        check_count(every_n_steps, "every_n_steps", "steps")
        if batch_size is not None and not callable(batch_size):
            _check_size(batch_size, "Write a whole number from 1 on, a function of the batch, or nothing.")
        self.metric = GradientNoiseScale(decay)
        self.every_n_steps = every_n_steps
        self.decay = decay
        self.per_group = per_group
        self.batch_size = batch_size
        self._step: _Step | None = None
        self._sees_own = True
        self._is_new = False
        self._fitting = True
        self._said: set[str] = set()

    def values(self) -> dict[str, float]:
        """The smoothed values by the names under which they are logged, the same on every process; empty before the first.

        Waits for the device, once. For reading at a step: from ``on_train_batch_end`` on it holds that step.
        """
        computed = self.metric.values()
        found = torch.stack([*computed.values(), self.metric.updates[0], self.metric.skipped]).tolist()
        *values, updates, skipped = found
        if skipped:
            steps = f"{skipped:.0f} steps" if skipped > 1 else "1 step"
            self._warn(f"{steps} had gradients that were not finite. Such a step's noise is not counted.", "skipped")
        return {f"noise/{name}": value for name, value in zip(computed, values, strict=True)} if updates else {}

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fitting = stage == "fit"
        if self._fitting:
            strategies.warn_if_unseen()
            self._drop()
            self._is_new, self._said = False, set()
            if not trainer.global_step:
                self.metric = GradientNoiseScale(self.decay)  # another run than the one before, if there was one

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization:
            raise ConfigError(
                f"gradient noise is not available under manual optimization, where {type(pl_module).__name__} alone knows which "
                "gradients make a step. Set automatic_optimization to true, or feed a GradientNoiseScale from training_step."
            )
        if trainer.strategy.root_device.type == "mps":
            raise ConfigError(
                "gradient noise is not available on mps, which has no float64. Train on a CPU or a GPU of CUDA.",
                "trainer.accelerator",
            )
        self._sees_own = strategies.placement(trainer).hooks_see_own_gradients()
        optimizer = strategies.running_optimizer(trainer)
        if needs_closure(optimizer):
            raise ConfigError(f"gradient noise is not available: {_of_closure(optimizer)} Choose another one.", "optimizer")
        self._refuse_single(trainer, _most_accumulated(trainer), "a step", "Write 2 or more")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.metric.to(trainer.strategy.root_device)
        self._refuse_single(trainer, trainer.num_training_batches, "an epoch", "Make the batches smaller")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if strategies.opens_accumulation_window(trainer, batch_idx):
            self._open(trainer)
        if self._step is not None:
            self._step.samples = self._samples(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._step is not None:
            is_reduced = trainer.world_size > 1 and strategies.closes_accumulation_window(trainer)
            self._step.norms.begin(is_alone=not is_reduced and not strategies.placement(trainer).holds_shards)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step is None:
            return
        is_last = strategies.closes_accumulation_window(trainer)
        self._step.norms.end(is_last)
        self._step.inverse_samples += 1 / self._step.samples
        if is_last:
            self._measure(trainer, self._step)
            self._drop()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._is_new and trainer.loggers and every and trainer.global_step % every == 0:
            self._is_new = False
            trainers.log_metrics(trainer, self.values(), trainer.global_step - 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values()  # which says what was left out, where nothing was logged

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._drop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._drop()

    def state_dict(self) -> dict[str, Any]:
        states = {name: getattr(self.metric, name).tolist() for name in STATES}
        return {"version": STATE_VERSION, "groups": list(self.metric.groups), **states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._fitting:
            self.metric = _restored(self.decay, state_dict)

    # One step

    def _open(self, trainer: Trainer) -> None:
        self._drop()
        if trainer.global_step % self.every_n_steps or self._is_single(trainer, trainer.accumulate_grad_batches):
            return
        optimizer = strategies.running_optimizer(trainer)
        if needs_closure(optimizer):
            self._warn(f"From step {trainer.global_step} on gradient noise is not measured: {_of_closure(optimizer)}", "closure")
            return
        groups = _groups(optimizer, self.per_group)
        names = tuple(name for name in groups if name)
        if names != self.metric.groups:  # at the first step, or after a switch
            self.metric = self.metric.with_groups(names)
        self._step = _Step(self._norms(trainer, list(groups.values())))

    def _norms(self, trainer: Trainer, groups: list[list[Tensor]]) -> StepNorms:
        device = trainer.strategy.root_device
        if not self._sees_own:
            return ShardedGradients(groups, device, trainer.world_size)
        return OwnGradients(groups, device, _leaves(groups, strategies.placement(trainer).flat_parameters()))

    def _measure(self, trainer: Trainer, step: _Step) -> None:
        """Brings the processes' sums together and updates the metric.

        Of ``n`` gradients whose mean is stepped with, the small batches' harmonic mean is ``b``, and ``n b`` is the big batch: for
        batches of any sizes ``E mean|g_i|^2 = |G|^2 + tr(Sigma)/b`` and ``E|mean g_i|^2 = |G|^2 + tr(Sigma)/(n b)`` hold exactly.
        """
        norms, processes = step.norms, trainer.world_size
        gradients = norms.micro_batches * (processes if self._sees_own else 1)
        if gradients < 2:
            return  # an epoch's rest
        if norms.in_pieces:
            self._warn(
                "Some parameter's gradient came in several pieces, as under checkpointing with use_reentrant=True. Such a "
                "step's noise is not counted. Set use_reentrant to false.",
                "skipped",
            )
        big = norms.big if strategies.placement(trainer).holds_shards else norms.big / processes
        inverse = torch.full((1,), step.inverse_samples, dtype=torch.float64, device=norms.device)
        agreed = trainer.strategy.reduce(torch.cat([norms.small, big, inverse]), reduce_op="sum")
        small, big, inverse = agreed.split([len(norms.groups), len(norms.groups), 1])
        # One process's mean of 1/b; where only reduced gradients are seen, each is of all processes' batches.
        inverse = inverse[0] / (norms.micro_batches * processes)
        inverse = inverse if self._sees_own else inverse / strategies.placement(trainer).processes_with_own_batches
        scale = trainers.gradient_scale(trainer)
        self.metric.update(small / gradients / scale**2, big / (norms.micro_batches * scale) ** 2, 1 / inverse, gradients / inverse)
        self._is_new = True

    def _drop(self) -> None:
        if self._step is not None:
            self._step.norms.close()
            self._step = None

    def _samples(self, batch: Any) -> int:
        if self.batch_size is None:
            return _length(batch)
        if not callable(self.batch_size):
            return self.batch_size
        return _check_size(self.batch_size(batch), "The function must return a whole number from 1 on.")

    def _is_single(self, trainer: Trainer, micro_batches: float) -> bool:
        return micro_batches < 2 and (not self._sees_own or trainer.world_size < 2)

    def _refuse_single(self, trainer: Trainer, micro_batches: float, of: str, cure: str) -> None:
        if not self._is_single(trainer, micro_batches):
            return
        where = "on one process" if self._sees_own else f"under {type(trainer.strategy).__name__}"
        way = "train with DDP on several devices" if self._sees_own else "use DDP, where each process's own gradient is seen"
        raise ConfigError(
            f"gradient noise is not available: {micro_batches:g} batch {of} {where} gives one gradient, and noise shows between "
            f"several. {cure}, or {way}.",
            "trainer.accumulate_grad_batches",
        )

    def _warn(self, message: str, subject: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            rank_zero_warn(message)


def find_monitor(trainer: Trainer) -> GradientNoiseMonitor | None:
    """The trainer's `GradientNoiseMonitor`, if it has one."""
    return next(iter(trainers.callbacks_of(trainer, GradientNoiseMonitor)), None)


@dataclasses.dataclass
class _Step:
    """A step that is being measured.

    Args:
        norms: of its gradients so far.
        samples: of the batch that is being trained on.
        inverse_samples: sum over the batches that are done of 1 over their samples.
    """

    norms: StepNorms
    samples: int = 0
    inverse_samples: float = 0.0


def _groups(optimizer: Optimizer, per_group: bool) -> dict[str, list[Tensor]]:
    """The trainable parameters of an optimizer by its groups' names; all of them under an empty name if not `per_group`."""
    found: dict[str, list[Tensor]] = {}
    for name, group in zip(group_names(optimizer.param_groups, single="pg1"), optimizer.param_groups, strict=True):
        found.setdefault(name if per_group else "", []).extend(tensor for tensor in group["params"] if tensor.requires_grad)
    return found


def _leaves(groups: Sequence[Sequence[Tensor]], flat: Sequence[tuple[Tensor, Sequence[tuple[Tensor | None, int]]]]) -> list[Leaf]:
    """What autograd gives the groups' gradients to: the parameters themselves, or the vectors that hold them."""
    places = {id(tensor): index for index, group in enumerate(groups) for tensor in group}
    vectors = [Leaf(vector, [(count, places.get(id(tensor))) for tensor, count in members]) for vector, members in flat]
    held = {id(tensor) for _, members in flat for tensor, _ in members}
    return [
        *vectors,
        *(Leaf(tensor, [(tensor.numel(), places[id(tensor)])]) for group in groups for tensor in group if id(tensor) not in held),
    ]


def _restored(decay: float, state: Mapping[str, Any]) -> GradientNoiseScale:
    with reading("GradientNoiseMonitor", state, STATE_VERSION):
        metric = GradientNoiseScale(decay, [str(name) for name in state["groups"]])
        for name in STATES:
            value = torch.tensor(state[name], dtype=torch.float64)
            if value.shape != getattr(metric, name).shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}")
            setattr(metric, name, value)
    return metric


def _length(batch: Any) -> int:
    """The length that all tensors of a batch have."""
    lengths = set(_lengths(batch))
    if len(lengths) != 1:
        found = f"tensors of lengths {', '.join(map(str, sorted(lengths)))}" if lengths else "no tensor"
        raise ConfigError(
            f"the number of samples is not clear from a batch ({type(batch).__name__}) with {found}. Give a number, or a function "
            "of the batch.",
            "batch_size",
        )
    return _check_size(lengths.pop(), "A batch needs samples.")


def _lengths(batch: Any) -> Iterator[int]:
    if isinstance(batch, Tensor):
        yield from batch.shape[:1]
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _lengths(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for value in batch:
            yield from _lengths(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        yield from _lengths(vars(batch))


def _check_size(size: Any, allowed: str) -> int:
    if not isinstance(size, int) or not is_number(size) or size < 1:
        raise ConfigError(f"{size!r} is no number of samples. {allowed}", "batch_size")
    return size


def _of_closure(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__name__} evaluates several gradients in a step."


def _most_accumulated(trainer: Trainer) -> int:
    """Batches of a step, at their most where a callback changes them between epochs."""
    schedules = [found.scheduling.values() for found in trainers.callbacks_of(trainer, GradientAccumulationScheduler)]
    return max([trainer.accumulate_grad_batches, *(most for values in schedules for most in values)])
