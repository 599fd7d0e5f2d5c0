"""What has to be known of a strategy, in a class for each; and what Lightning does around it.

One of the two files that know Lightning's inside (the private names are listed in ``tests/test_lightning_names.py``).
"""

from __future__ import annotations

import contextlib
import functools
import math
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.loops.utilities import _parse_loop_limits
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.call import _call_lightning_datamodule_hook, _call_lightning_module_hook
from lightning.pytorch.trainer.states import RunningStage, TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter
from torch.optim import SGD, Optimizer

from lightning_adaptive import module_parameters
from lightning_adaptive.combined import CombinedOptimizer, class_name, needs_closure, parts
from lightning_adaptive.errors import ConfigError

SEEN = ("2.6",)
"""Minor versions of Lightning on which the private names of this file were seen to hold."""

FlatVector = tuple[Tensor, list[tuple[Tensor | None, int]]]
"""A vector of flattened parameters, with each of these and its number of elements; padding has no parameter."""


def warn_if_unseen() -> None:
    """Says so when this version of Lightning was never tested."""
    if not lightning.__version__.startswith(tuple(f"{minor}." for minor in SEEN)):
        rank_zero_warn(
            f"lightning {lightning.__version__} was never tested with lightning-adaptive (tested: {', '.join(SEEN)}). "
            "If a switch fails, lightning_adaptive/strategies.py is where its names are used."
        )


def placement(trainer: Trainer, index: int = 0) -> Plain:
    """What is known of the trainer's strategy, and puts an optimizer onto it.

    Args:
        trainer: a trainer that is fitting.
        index: which of the module's optimizers is meant, under manual optimization.
    """
    cls = next((PLACEMENTS[base] for base in type(trainer.strategy).__mro__ if base in PLACEMENTS), Unknown)
    return cls(trainer, index)


class Plain:
    """One process: Lightning's loop steps a plain optimizer of whole parameters. What differs elsewhere is said by subclasses.

    Under manual optimization one of several is exchanged, and the number of optimizers and schedulers stays: the module counts
    on it.

    Args:
        trainer: a trainer that is fitting.
        index: which of the module's optimizers is meant.
    """

    holds_shards = False
    """Whether each process holds only a part of the gradient that the optimizer steps with."""

    _gives_closure = True
    """Whether a step may evaluate the loss itself, on whole parameters."""

    _one_vector_of = ""
    """What the strategy makes one flat vector of, if of anything."""

    def __init__(self, trainer: Trainer, index: int = 0) -> None:
        self.trainer = trainer
        self.index = index
        self.strategy: Any = trainer.strategy
        self._old: tuple[list[Any], list[LRSchedulerConfig]] | None = None

    @property
    def optimizer(self) -> Optimizer:
        """The running optimizer of the ecosystem, whose groups hold the options.

        Raises:
            ConfigError: when there is none of this index.
        """
        optimizers, name = self.strategy.optimizers, type(self.trainer.lightning_module).__name__
        if not 0 <= self.index < len(optimizers):
            raise ConfigError(
                f"{self.index} is none of the {len(optimizers)} optimizers of {name}, counted from 0.", "optimizer_index"
            )
        optimizer = _unwrapped(optimizers[self.index])
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"{name}.configure_optimizers returned no optimizer.", "optimizer")
        return optimizer

    @property
    def lr_scheduler(self) -> LRSchedulerConfig | None:
        """What steps the running optimizer's learning rate, if anything does."""
        place = self._scheduler_place()
        return None if place is None else self.strategy.lr_scheduler_configs[place]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The running groups: their options, with the module's own parameters as ``params``."""
        return self.optimizer.param_groups

    @property
    def stepping(self) -> Optimizer:
        """The optimizer whose step Lightning's loop calls, seen where the loop looks it up."""
        return _unwrapped(self.strategy._lightning_optimizers[self.index].optimizer)

    def whole(self, tensors: Sequence[Tensor], rows: Tensor) -> Tensor:
        """Sums over what lies on this process, as sums over the whole parameters, the same on every rank. Does not wait.

        Args:
            tensors: parameters.
            rows: rows of a sum for each parameter.
        """
        if self.trainer.world_size > 1:
            # Every process has the whole; that all decide as one does not rest on their having computed the same bits.
            rows = rows.to(self.strategy.root_device)
            torch.distributed.broadcast(rows, 0)
        return rows

    def full_shapes(self, module: LightningModule) -> dict[str, tuple[int, ...]]:
        """Shape of each whole parameter by name, whatever the strategy keeps of it on this process.

        A lazily built parameter that has no shape yet is left out.

        Args:
            module: the module, in place where the strategy shards.
        """
        named = module_parameters.tensors(module).items()
        return {name: self._full_shape(tensor) for name, tensor in named if not isinstance(tensor, UninitializedParameter)}

    def _full_shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(tensor.shape)  # of a DTensor that of the whole

    def hooks_see_own_gradients(self) -> bool:
        """Whether hooks see the gradient of each process's own batch, before all have reduced it.

        Raises:
            ConfigError: where a step's gradients cannot be seen, or are not their mean.
        """
        return True

    def flat_parameters(self) -> list[FlatVector]:
        """The vectors that FSDP has flattened parameters into; without FSDP there are none."""
        return []

    @property
    def processes_with_own_batches(self) -> int:
        """How many processes train on different batches: all, but for those that share one under tensor parallelism."""
        return self.trainer.world_size

    def configure_model(self) -> None:
        """Lets the module build its layers in a preview, for which there are no devices.

        Raises:
            ConfigError: when it cannot without.
        """
        _call_lightning_module_hook(self.trainer, "configure_model")

    def forget_preview(self) -> None:
        """Takes back what `configure_model` has left on the strategy."""

    def tested_as_fitted(self) -> contextlib.AbstractContextManager[None]:
        """Within it ``trainer.test`` takes the model that was just fitted, also where Lightning or DeepSpeed cannot."""
        return contextlib.nullcontext()

    def check_state(self, what: str, key: str) -> None:
        """Refuses what looks at the optimizer's state by parameter, where that does not lie so.

        Args:
            what: what looks at it.
            key: the config key that asks for it.

        Raises:
            ConfigError: naming the setting.
        """

    def check_gradients(self, optimizer: Optimizer, key: str) -> None:
        """Refuses what looks at gradients after a step, where they are then not what the optimizer was given.

        Args:
            optimizer: the optimizer that steps.
            key: the config key that asks for it.

        Raises:
            ConfigError: naming the setting.
        """
        if self._unscales(optimizer):
            raise ConfigError(
                f"a fused {class_name(optimizer)} unscales gradients by itself under trainer.precision={self.trainer.precision}, "
                "so they are not seen as it takes them. Set its fused to false.",
                key,
            )

    def check(self) -> None:
        """Refuses a strategy whose settings, or whose running optimizer, do not allow a switch.

        Raises:
            ConfigError: naming the setting.
        """
        self.check_optimizer(self.optimizer)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuses an optimizer that the strategy would break.

        Raises:
            ConfigError: for several for groups where groups or parameters become flat vectors.
        """
        if self._one_vector_of and isinstance(optimizer, CombinedOptimizer):
            raise ConfigError(
                f"{type(self.strategy).__name__} makes one flat vector of {self._one_vector_of}, so several optimizers cannot each "
                "have their own. Choose one optimizer, or DDP or ModelParallelStrategy (FSDP2).",
                "optimizer",
            )

    def check_next(
        self, optimizer: Optimizer, lr_schedulers: Sequence[Any], gradient_clip_val: float | Literal["keep"] | None
    ) -> None:
        """Refuses what would fail only at its first step.

        Args:
            optimizer: a later phase's, built for a trial.
            lr_schedulers: Lightning's dictionaries around its schedulers.
            gradient_clip_val: what that phase asks for.

        Raises:
            ConfigError: naming both settings that do not go together.
        """
        name = type(optimizer).__name__
        if needs_closure(optimizer) and self._scales_loss:
            raise ConfigError(
                f"{name} and trainer.precision={self.trainer.precision} do not go together. Train in bf16-mixed or 32-true.",
                "optimizer",
            )
        clips = bool(self.trainer.gradient_clip_val if gradient_clip_val == "keep" else gradient_clip_val)
        if clips and self._unscales(optimizer):
            raise ConfigError(
                f"a fused {name} unscales by itself, so gradients cannot be clipped before under "
                f"trainer.precision={self.trainer.precision}. Set fused to false, or gradient_clip_val to null.",
                "optimizer.fused",
            )
        if needs_closure(optimizer) and not self._gives_closure:
            raise ConfigError(
                f"{name} needs the whole parameters and a closure, which {type(self.strategy).__name__} does not give. Use one "
                "process or DDP.",
                "optimizer",
            )
        self.check_optimizer(optimizer)

    @property
    def _scales_loss(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def _unscales(self, optimizer: Optimizer) -> bool:
        """Whether a fused optimizer divides gradients by the loss scale within its step."""
        return self._scales_loss and getattr(optimizer, "_step_supports_amp_scaling", False)

    def install(self, optimizer: Optimizer, lr_schedulers: Sequence[Mapping[str, Any]]) -> None:
        """Puts optimizer and schedulers in place of the running ones, which it keeps for `undo`.

        Args:
            optimizer: the next optimizer, complete.
            lr_schedulers: Lightning's dictionaries around its schedulers.
        """
        self._old = self.strategy.optimizers, self.strategy.lr_scheduler_configs
        _optimizers_to_device([optimizer], self.strategy.root_device)
        # Parameters outside the new groups must not keep a gradient that nobody clears.
        self._old[0][self.index].zero_grad(set_to_none=True)
        configs = [LRSchedulerConfig(**lr_scheduler) for lr_scheduler in lr_schedulers]
        self._put(_replaced(self._old[0], self.index, optimizer), self._schedulers(configs))

    def undo(self) -> None:
        """Puts the old optimizer and scheduler back, however far `install` had come."""
        if self._old is not None:
            self._put(*self._old)

    def _schedulers(self, configs: list[LRSchedulerConfig]) -> list[LRSchedulerConfig]:
        if self.trainer.lightning_module.automatic_optimization:
            return configs
        running, place = self.strategy.lr_scheduler_configs, self._scheduler_place()
        return running if place is None else _replaced(running, place, configs[0])

    def _scheduler_place(self) -> int | None:
        configs, running = self.strategy.lr_scheduler_configs, self.optimizer
        return next((place for place, config in enumerate(configs) if _unwrapped(config.scheduler.optimizer) is running), None)

    def _put(self, optimizers: list[Any], lr_scheduler_configs: list[LRSchedulerConfig]) -> None:
        # Only the setter also changes the wrappers that the loop steps; the scheduler would keep the old optimizer alive.
        self.strategy.optimizers = optimizers
        self.strategy.lr_scheduler_configs = lr_scheduler_configs


class DDP(Plain):
    """Every process has the whole parameters, and its own batch."""

    def hooks_see_own_gradients(self) -> bool:
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook

        comm_hook = self.strategy._ddp_comm_hook
        if comm_hook not in (None, fp16_compress_hook, bf16_compress_hook):
            name = getattr(comm_hook, "__name__", type(comm_hook).__name__)
            raise ConfigError(
                f"gradient noise is not available with {name}, after which gradients need not be the mean of the processes'. Use "
                "none, fp16_compress_hook or bf16_compress_hook.",
                "trainer.strategy.ddp_comm_hook",
            )
        return True


class Sharded(Plain):
    """FSDP and FSDP2: a plain optimizer of parameters that are cut into parts."""

    holds_shards = True
    _gives_closure = False

    @property
    def _loads_without_state(self) -> bool:
        """Whether Lightning loads a checkpoint of an optimizer that keeps no state."""
        return False

    def _part_count(self, tensor: Tensor) -> int:
        """Into how many different parts a parameter is cut among the ranks, some of which may hold the same part."""
        raise NotImplementedError

    def whole(self, tensors: Sequence[Tensor], rows: Tensor) -> Tensor:
        device = self.strategy.root_device
        counts = [self._part_count(tensor) / self.trainer.world_size for tensor in tensors]
        shares = torch.tensor(counts, dtype=rows.dtype, device=device)
        summed: Tensor = self.strategy.reduce(rows.to(device) * shares, reduce_op="sum")
        return summed

    def check_next(
        self, optimizer: Optimizer, lr_schedulers: Sequence[Any], gradient_clip_val: float | Literal["keep"] | None
    ) -> None:
        super().check_next(optimizer, lr_schedulers, gradient_clip_val)
        several = parts(optimizer)
        loads = self._loads_without_state and len(several) == 1
        for key, part in several.items():
            if isinstance(part, SGD) and not loads and not any(group["momentum"] for group in part.param_groups):
                way_out = " or use ModelParallelStrategy (FSDP2) with save_distributed_checkpoint=True" if len(several) == 1 else ""
                raise ConfigError(
                    "SGD without momentum keeps no state, and Lightning cannot load a checkpoint of such an optimizer under FSDP. "
                    f"Give it momentum{',' * bool(way_out)}{way_out}.",
                    ".".join(filter(None, ("optimizer", key, "momentum"))),
                )


class FSDP(Sharded):
    """The first FSDP, whose units flatten their parameters into vectors and shard those."""

    _one_vector_of = "parameters of several groups"

    def _handles(self) -> list[Any]:
        """What holds a unit's vector, for each unit that has one."""
        from torch.distributed.fsdp import FullyShardedDataParallel

        units: list[Any] = FullyShardedDataParallel.fsdp_modules(self.strategy.model)
        return [unit._handle for unit in units if unit._handle is not None]

    @functools.cached_property
    def _flattened(self) -> dict[int, tuple[tuple[int, ...], int]]:
        """Shape of each flattened parameter, and into how many shards its vector is cut, by ``id``."""
        return {
            id(parameter): (tuple(shape), handle.world_size if handle.uses_sharded_strategy else 1)
            for handle in self._handles()
            for parameter, shape in zip(handle.flat_param._params or (), handle.flat_param._shapes, strict=False)
        }

    def _full_shape(self, tensor: Tensor) -> tuple[int, ...]:
        shape, _ = self._flattened.get(id(tensor), (super()._full_shape(tensor), 1))
        return shape

    def _part_count(self, tensor: Tensor) -> int:
        _, count = self._flattened.get(id(tensor), ((), 1))
        return count

    def flat_parameters(self) -> list[FlatVector]:
        found: list[FlatVector] = []
        for handle in self._handles():
            flat = handle.flat_param
            sizes = flat._numels_with_padding
            if flat._params is None:  # without use_orig_params the optimizer has the vectors themselves
                found.append((flat, [(flat, sum(sizes))]))
                continue
            unpadded = iter(flat._params)
            members = [None if is_padding else next(unpadded) for is_padding in flat._is_padding_mask]
            found.append((flat, list(zip(members, sizes, strict=True))))
        return found

    def hooks_see_own_gradients(self) -> bool:
        allowed, given = ("FULL_SHARD", "SHARD_GRAD_OP"), self.strategy.sharding_strategy.name
        if given not in allowed:
            raise ConfigError(
                f"gradient noise is not available with {given}, where several processes hold the same shard. Write "
                f"{' or '.join(allowed)}.",
                "trainer.strategy.sharding_strategy",
            )
        return True

    @contextlib.contextmanager
    def tested_as_fitted(self) -> Iterator[None]:
        # FSDP would wrap the module once more, whose parameters are shards by now.
        fitted = self.strategy.model
        vars(self.strategy)["_setup_model"] = lambda _: fitted
        try:
            yield
        finally:
            del vars(self.strategy)["_setup_model"]

    def check(self) -> None:
        if not self.strategy.kwargs.get("use_orig_params"):
            raise ConfigError(
                "a switch under FSDP needs the module's own parameters. Leave use_orig_params at its default, true.",
                "trainer.strategy.use_orig_params",
            )
        super().check()


class FSDP2(Sharded):
    """FSDP2 and tensor parallelism: parameters are DTensors."""

    @property
    def _loads_without_state(self) -> bool:
        return bool(self.strategy._save_distributed_checkpoint)

    def _part_count(self, tensor: Tensor) -> int:
        if not isinstance(tensor, DTensor):
            return 1
        mesh = tensor.device_mesh
        return math.prod(mesh.size(dim) for dim, placed in enumerate(tensor.placements) if not placed.is_replicate())

    def hooks_see_own_gradients(self) -> bool:
        return False

    @property
    def processes_with_own_batches(self) -> int:
        return int(self.strategy.device_mesh["data_parallel"].size())

    def configure_model(self) -> None:
        module = self.trainer.lightning_module
        if not any(True for _ in module.parameters()):
            raise ConfigError(
                f"{type(module).__name__} builds its layers in configure_model, which needs the devices of this strategy. Preview "
                "it with another.",
                "trainer.strategy",
            )
        self.strategy._device_mesh = _PlannedMesh(self.strategy)

    def forget_preview(self) -> None:
        self.strategy._device_mesh = None


class _PlannedMesh:
    """What Lightning asks the devices of ``ModelParallelStrategy`` for when it parts the data, before there are processes."""

    def __init__(self, strategy: ModelParallelStrategy) -> None:
        size = strategy._data_parallel_size
        self._size = strategy.num_nodes if size == "auto" else size

    def __getitem__(self, _: str) -> _PlannedMesh:
        return self

    def size(self) -> int:
        return self._size

    def get_local_rank(self) -> int:
        return 0


class DeepSpeed(Plain):
    """ZeRO-1, 2 and 3: the engine wraps the optimizer, and must destroy the old wrapper before it makes the new one.

    So there is no way back: between the two nothing can be saved, and an error there ends the run.
    """

    _gives_closure = False
    _one_vector_of = "each group"

    def _full_shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 leaves an empty tensor

    def hooks_see_own_gradients(self) -> bool:
        raise ConfigError(
            f"gradient noise is not available under {type(self.strategy).__name__}, which frees gradients when it has reduced "
            "them. Use one process with accumulation, DDP, FSDP or FSDP2.",
            "trainer.strategy",
        )

    @contextlib.contextmanager
    def tested_as_fitted(self) -> Iterator[None]:
        # ZeRO-3 asks the optimizer, which a test does not have, to take over the weights that were loaded (issue 7272 of
        # DeepSpeed, seen on 0.19).
        def expect_no_optimizer(_: Path) -> None:
            optimizer = self.strategy.model.optimizer
            if optimizer is not None and not hasattr(optimizer, "_restore_from_bit16_weights"):
                optimizer._restore_from_bit16_weights = lambda: None

        remove = before_restore(self.trainer, expect_no_optimizer)
        try:
            yield
        finally:
            remove()

    def check(self) -> None:
        super().check()
        windows = self.trainer.accumulate_grad_batches
        if windows > 1:
            rank_zero_warn(
                f"trainer.accumulate_grad_batches={windows}: Lightning divides the loss by it, and DeepSpeed divides it again, so "
                f"gradients are {windows} times too small. Adam does not mind, SGD does. Multiply the loss that training_step "
                "returns by it."
            )

    def check_next(
        self, optimizer: Optimizer, lr_schedulers: Sequence[Any], gradient_clip_val: float | Literal["keep"] | None
    ) -> None:
        super().check_next(optimizer, lr_schedulers, gradient_clip_val)
        self._check_class(optimizer)
        if len(lr_schedulers) > 1:
            raise ConfigError(
                "under DeepSpeed a phase has one scheduler, and a Plateau needs a second, which watches its metric. Give "
                "torch.optim.lr_scheduler.ReduceLROnPlateau, without warm-up.",
                "scheduler",
            )
        if _members(optimizer.param_groups) != _members(self.groups):
            raise ConfigError(
                "under DeepSpeed the groups stay as they are, since its fp32 weights lie in their order. Write 'inherit'.",
                "param_groups",
            )
        if gradient_clip_val != "keep":
            raise ConfigError(
                f"{gradient_clip_val!r} cannot be set under DeepSpeed: its config fixes clipping for the whole run. Write 'keep'.",
                "gradient_clip_val",
            )

    def check_state(self, what: str, key: str) -> None:
        raise ConfigError(
            f"{what} looks at the optimizer's state of each parameter, which lies in flat partitions under DeepSpeed. Use DDP, "
            "FSDP or FSDP2 (ModelParallelStrategy).",
            key,
        )

    def _check_class(self, optimizer: Optimizer) -> None:
        """Refuses the classes that the engine would refuse when the old optimizer is destroyed already."""
        from deepspeed.runtime.zero.utils import is_zero_supported_optimizer  # type: ignore[import-untyped]

        engine, name = self.strategy.model, type(optimizer).__name__
        if not hasattr(engine, "zero_use_cpu_optimizer"):
            return  # in a preview there is none to ask
        for_cpu = {"DeepSpeedCPUAdam", "DeepSpeedCPULion"} & {base.__name__ for base in type(optimizer).__mro__}
        if engine.zero_use_cpu_optimizer() and engine.zero_force_ds_cpu_optimizer() and not for_cpu:
            option, allowed = "zero_force_ds_cpu_optimizer: false", "DeepSpeedCPUAdam, as its optimizer lies on the CPU"
        elif engine.zero_optimization() and not (engine.zero_allow_untested_optimizer() or is_zero_supported_optimizer(optimizer)):
            option, allowed = "zero_allow_untested_optimizer: true", "the classes that it was tested with, such as Adam and AdamW"
        else:
            return
        raise ConfigError(
            f"DeepSpeed takes no {name} here, only {allowed}. For another class put {option} into trainer.strategy.config.",
            "optimizer",
        )

    @property
    def groups(self) -> list[dict[str, Any]]:
        # The optimizer's own groups hold flat partitions.
        wrapper = getattr(self.strategy.model, "optimizer", None)  # in a preview there is no engine
        lists = ("bit16_groups", "fp16_groups", "bf16_groups")  # of ZeRO-1 and 2, of ZeRO-3, of its bf16 optimizer
        whole = next((getattr(wrapper, name) for name in lists if hasattr(wrapper, name)), None)
        if whole is None:
            return self.optimizer.param_groups
        members: list[list[Tensor]] = [[] for _ in self.optimizer.param_groups]
        group_of = getattr(wrapper, "sub_group_to_group_id", {})
        for index, tensors in enumerate(whole):
            members[group_of.get(index, index)] += tensors
        return [{**group, "params": tensors} for group, tensors in zip(self.optimizer.param_groups, members, strict=True)]

    def install(self, optimizer: Optimizer, lr_schedulers: Sequence[Mapping[str, Any]]) -> None:
        [lr_scheduler] = lr_schedulers
        engine, strategy = self.strategy.model, self.strategy
        old = engine.optimizer
        masters = [master.detach().clone() for master in _master_weights(old)]
        scalers = {name: vars(old)[name] for name in ("loss_scaler", "loss_scale_config") if name in vars(old)}
        saving = vars(strategy).get("save_checkpoint")  # that of `ExactResume`, if there is one
        strategy.save_checkpoint = _refuse_to_save
        if hasattr(old, "destroy"):
            old.destroy()
            _break_cycle(old)
        # The engine keeps the first optimizer and scheduler, and with them the old state, until others take their places.
        engine.client_optimizer, engine.client_lr_scheduler = optimizer, lr_scheduler["scheduler"]
        engine._configure_optimizer(optimizer, None)
        for master, kept in zip(_master_weights(engine.optimizer), masters, strict=True):
            master.data.copy_(kept)
        vars(engine.optimizer).update(scalers)
        self._put([engine.optimizer], [LRSchedulerConfig(**lr_scheduler)])
        del strategy.save_checkpoint
        if saving is not None:
            strategy.save_checkpoint = saving

    def undo(self) -> None:
        """Nothing: the old optimizer is destroyed, and `install` lets nothing be saved until the new one stands."""


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise RuntimeError("DeepSpeed has destroyed the old optimizer and the new one does not stand yet: nothing can be saved.")


def _break_cycle(wrapper: Any) -> None:
    """ZeRO-3 (seen on 0.19) keeps partials of itself, so that only the garbage collector would free it."""
    for name, value in tuple(vars(wrapper).items()):
        if isinstance(value, functools.partial) and wrapper in value.args:
            delattr(wrapper, name)


def _master_weights(wrapper: Any) -> list[Tensor]:
    """The fp32 weights that DeepSpeed keeps beside bf16 or fp16 ones; built anew, they would be rounded."""
    # Of ZeRO-1 and 2, of ZeRO-3, of ZeRO-1 that accumulates bf16 gradients in fp32, and of no ZeRO.
    lists = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "fp32_groups")
    found = next((getattr(wrapper, name) for name in lists if hasattr(wrapper, name)), ())
    return [tensor for item in found for tensor in (item if isinstance(item, list) else [item])]


class Unknown(Plain):
    """A strategy that no other class here serves: it is previewed and tested as if it were one process, and not switched on."""

    def check(self) -> None:
        raise ConfigError(
            f"a switch is not available on {type(self.strategy).__name__}. Available: "
            f"{', '.join(base.__name__ for base in PLACEMENTS)}, and what is derived from them. Another one needs a class of its "
            "own in lightning_adaptive/strategies.py, a subclass of Plain.",
            "trainer.strategy",
        )

    def hooks_see_own_gradients(self) -> bool:
        raise ConfigError(
            f"gradient noise is not available on {type(self.strategy).__name__}. Available: one process, DDP, FSDP, FSDP2, and "
            "what is derived from them.",
            "trainer.strategy",
        )


PLACEMENTS: dict[type, type[Plain]] = {
    SingleDeviceStrategy: Plain,
    DDPStrategy: DDP,
    FSDPStrategy: FSDP,
    ModelParallelStrategy: FSDP2,
    DeepSpeedStrategy: DeepSpeed,
}
"""Strategies on which a switch is available, with their subclasses; the nearest base counts."""


def _replaced(items: list[Any], index: int, item: Any) -> list[Any]:
    return [*items[:index], item, *items[index + 1 :]]


def _members(groups: list[dict[str, Any]]) -> list[list[int]]:
    return [[id(tensor) for tensor in group["params"]] for group in groups]


def opens_accumulation_window(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a batch is the first of those that are accumulated into one step."""
    return batch_idx % trainer.accumulate_grad_batches == 0


def closes_accumulation_window(trainer: Trainer) -> bool:
    """Whether the batch that is being trained on is the last of those that are accumulated; an epoch's last one always is."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def running_optimizer(trainer: Trainer) -> Optimizer:
    """The first optimizer of the ecosystem that trains, without what DeepSpeed wraps around it."""
    return _unwrapped(trainer.optimizers[0])


def _unwrapped(optimizer: Any) -> Any:
    return optimizer if isinstance(optimizer, Optimizer) else getattr(optimizer, "optimizer", optimizer)


@contextlib.contextmanager
def staged(trainer: Trainer, module: LightningModule, train_dataloaders: Any = None, datamodule: Any = None) -> Iterator[None]:
    """Within it the trainer stands as before the first step of a fit, in this process alone.

    Data and optimizers are set up; no process is started, no model is moved or sharded, nothing is logged, no callback is called,
    and the random states are afterwards what they were.

    Args:
        trainer: a trainer that is not running.
        module: the module that it would fit.
        train_dataloaders: the training data, in one of the forms that ``trainer.fit`` takes.
        datamodule: or the data as a whole.

    Raises:
        ConfigError: for a module whose layers need the devices of ``ModelParallelStrategy`` to be built.
    """
    if isinstance(train_dataloaders, LightningDataModule):
        train_dataloaders, datamodule = None, train_dataloaders
    strategy: Any = trainer.strategy
    state = trainer.state.fn, trainer.state.status, trainer.state.stage
    trainer.state.fn, trainer.state.status, trainer.state.stage = TrainerFn.FITTING, TrainerStatus.RUNNING, RunningStage.TRAINING
    try:
        with isolate_rng():
            _stage(trainer, module, train_dataloaders, datamodule)
            yield
    finally:
        trainer.fit_loop.teardown()
        strategy.optimizers, strategy.lr_scheduler_configs = [], []
        placement(trainer).forget_preview()
        trainer.state.fn, trainer.state.status, trainer.state.stage = state


def _stage(trainer: Trainer, module: LightningModule, train_dataloaders: Any, datamodule: Any) -> None:
    """What ``trainer.fit`` does before the first step, in its order, without what needs other processes or devices."""
    strategy, connector = trainer.strategy, trainer._data_connector
    connector.attach_data(module, train_dataloaders=train_dataloaders, datamodule=datamodule)
    loop = trainer.fit_loop
    loop.min_epochs, loop.max_epochs = _parse_loop_limits(
        trainer.min_steps, trainer.max_steps, trainer.min_epochs, trainer.max_epochs, trainer
    )
    strategy.connect(module)
    trainer._callback_connector._attach_model_callbacks()
    if hasattr(strategy, "set_world_ranks"):
        strategy.set_world_ranks()  # so that the data are parted as they will be
    connector.prepare_data()
    if datamodule is not None:
        _call_lightning_datamodule_hook(trainer, "setup", stage="fit")
    _call_lightning_module_hook(trainer, "setup", stage="fit")
    placement(trainer).configure_model()
    loop.setup_data()
    optimizers, configs = _init_optimizers_and_lr_schedulers(module)
    strategy.optimizers, strategy.lr_scheduler_configs = optimizers, configs


def before_restore(trainer: Trainer, function: Callable[[Path], None], first: bool = False) -> Callable[[], None]:
    """Calls a function with a checkpoint's path before anything of it is loaded, on every strategy.

    Late strategies load weights and optimizer state inside ``load_checkpoint``, before a callback knows which optimizer wrote
    them; and it is the first place that sees the path that ``"last"`` or a requeued job stand for.

    Args:
        trainer: the trainer, from ``setup`` on.
        function: called on every process.
        first: whether it comes before those that are there already.

    Returns:
        What takes the function out again.
    """
    strategy: Any = trainer.strategy
    wrapper = vars(strategy).get("load_checkpoint")
    if not isinstance(wrapper, _LoadCheckpoint):
        wrapper = strategy.load_checkpoint = _LoadCheckpoint(trainer)
    wrapper.functions.insert(0 if first else len(wrapper.functions), function)

    def remove() -> None:
        if function in wrapper.functions:
            wrapper.functions.remove(function)
            if not wrapper.functions:
                vars(strategy).pop("load_checkpoint", None)

    return remove


class _LoadCheckpoint:
    """The one wrapper around a strategy's ``load_checkpoint``; the last user of it takes it away."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._strategy: Any = trainer.strategy
        self.functions: list[Callable[[Path], None]] = []

    def __call__(self, checkpoint_path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        path = Path(self._strategy.broadcast(checkpoint_path))
        for function in tuple(self.functions):
            function(path)
        load = functools.partial(type(self._strategy).load_checkpoint, self._strategy, checkpoint_path, *arguments, **options)
        return self._without_optimizers(load) if self._trainer.evaluating or self._trainer.predicting else load()

    def _without_optimizers(self, load: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """An evaluation needs the weights alone, but FSDP2 would load the state of another class into what a fit has left."""
        optimizers, self._strategy.optimizers = self._strategy.optimizers, []
        try:
            return load()
        finally:
            self._strategy.optimizers = optimizers


def end_processes(trainer: Trainer) -> None:
    """Ends the processes that Lightning's launcher started from this one, if it did.

    They have a moment to end by themselves, with an exit code that says why; those that wait for this one would do so for long.
    """
    launcher = trainer.strategy.launcher
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    deadline = time.monotonic() + 2
    for process in launcher.procs:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0, deadline - time.monotonic()))
    launcher.kill(signal.SIGKILL)


def take_processes() -> list[subprocess.Popen[bytes]]:
    """Takes the processes that Lightning started from its observer, which would kill this one when another rank has failed."""
    processes: list[subprocess.Popen[bytes]] = []
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            processes += thread._child_processes
            thread._child_processes = []
    return processes
