"""Every strategy on two CPU processes; where Lightning asks for a GPU, a subclass that does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch.strategies.fsdp as lightning_fsdp
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.api import FullOptimStateDictConfig
from torch.distributed.tensor import DTensor

from tests.support import Net, ValidatedNet

os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _full_state_dict_on_cpu(module: Any, world_size: int, rank0_only: bool = True) -> AbstractContextManager[Any]:
    # Lightning's asks for an offload to the CPU, which ends in a segmentation fault when the tensors are there already.
    return FullyShardedDataParallel.state_dict_type(
        module,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
        FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
    )


class CpuFSDP(FSDPStrategy):
    def _setup_model(self, model: Any) -> Any:
        if self._state_dict_type == "full":
            lightning_fsdp._get_full_state_dict_context = _full_state_dict_on_cpu
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), sharding_strategy=self.sharding_strategy, **self.kwargs
        )


class CpuDeepSpeed(DeepSpeedStrategy):
    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _get_process_group_backend(self) -> str:
        return "gloo"

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDPStrategy,
    "ddp static graph": lambda: DDPStrategy(static_graph=True),
    "ddp find unused": lambda: DDPStrategy(find_unused_parameters=True),
    "fsdp sharded": lambda: CpuFSDP(state_dict_type="sharded"),
    "fsdp full": lambda: CpuFSDP(state_dict_type="full"),
    "fsdp2 sharded": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    "fsdp2 full": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False),
    "deepspeed 1": lambda: CpuDeepSpeed(stage=1),
    "deepspeed 2": lambda: CpuDeepSpeed(stage=2),
    "deepspeed 3": lambda: CpuDeepSpeed(stage=3),
}


class ShardableNet(Net):
    """Shards itself under FSDP2."""

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[0], self.net[2], self.net):
                fully_shard(layer, mesh=mesh)


class ShardableValidatedNet(ValidatedNet, ShardableNet):
    """The same with a validation loss."""


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every parameter whole, by its plain name, on each process."""
    module, model = trainer.lightning_module, trainer.strategy.model
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in module.named_parameters()
    }
