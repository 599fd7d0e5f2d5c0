"""What people's modules call: `configure_optimizers`, and `attach` for modules that are not to be edited."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from lightning_adaptive import config, module_parameters, phases, strategies, trainers
from lightning_adaptive.errors import ConfigError, ConfigTypeError, check_factory, within
from lightning_adaptive.lr_schedulers import SchedulerLike
from lightning_adaptive.param_groups import Inherit, ParamGroups
from lightning_adaptive.phases import OptimizerFactory

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def configure_optimizers(
    module: LightningModule,
    *,
    optimizer: OptimizerFactory | Mapping[str, Any],
    scheduler: SchedulerLike | Mapping[str, Any] | None = None,
    param_groups: ParamGroups | Mapping[str, Any] | None = None,
) -> dict[str, Any] | tuple[list[Optimizer], list[dict[str, Any]]]:
    """What ``LightningModule.configure_optimizers`` may return, from Hydra nodes or plain callables.

    The number of steps that a schedule spans comes from the module's trainer.

    Args:
        module: the module that is about to be trained.
        optimizer: a factory of the optimizer, or a node ``{_target_: torch.optim.AdamW, lr: 1e-3}``.
        scheduler: a `Schedule`, a factory of a torch scheduler, Lightning's dictionary around either, or a node of these;
            ``None`` is constant.
        param_groups: the groups of the trainable parameters; ``None`` is one group of all of them.

    Returns:
        Lightning's dictionary with ``optimizer`` and ``lr_scheduler``; with a `Plateau`, its lists of optimizers and schedulers.

    Raises:
        ConfigError: for a node or value that cannot be used; the message names its key.
    """
    return _configure(module, *_first_phase(optimizer, scheduler, param_groups))


def attach(
    module: ModuleT,
    *,
    optimizer: OptimizerFactory | Mapping[str, Any],
    scheduler: SchedulerLike | Mapping[str, Any] | None = None,
    param_groups: ParamGroups | Mapping[str, Any] | None = None,
) -> ModuleT:
    """Gives a module this package's `configure_optimizers` without editing it; arguments as there.

    Survives ``deepcopy``, ``pickle``, ``torch.save(module)``, ``ddp_spawn`` and ``torch.compile``. A module that
    ``load_from_checkpoint`` makes has its own hook again: attach once more before training goes on.

    Returns:
        The module itself.

    Raises:
        ConfigError: for a node or value that cannot be used; the message names its key.
    """
    first_phase = _first_phase(optimizer, scheduler, param_groups)
    inner: Any = getattr(module, "_orig_mod", module)
    # A partial of a module-level function: a bound method or a closure cannot be pickled, or optimizes the original of a copy.
    inner.configure_optimizers = functools.partial(_configure, inner, *first_phase)
    return module


def _first_phase(optimizer: Any, scheduler: Any, param_groups: Any) -> tuple[OptimizerFactory, SchedulerLike | None, ParamGroups]:
    """What builds the first phase; plain and picklable, as the module that carries it must be."""
    groups: Any = config.param_groups(param_groups) or ParamGroups()
    if groups == "inherit" or isinstance(groups, Inherit):
        raise ConfigError("the first phase has no groups to inherit. Leave it out, or write none.", "param_groups")
    if not isinstance(groups, ParamGroups):
        raise ConfigTypeError(f"{groups!r} says nothing about groups. Write ParamGroups(...), or leave it out.", "param_groups")
    factory = config.optimizer_factory(optimizer)
    check_factory(factory, Optimizer, "optimizer")
    return factory, config.scheduler(scheduler), groups


def _configure(
    module: LightningModule, optimizer: OptimizerFactory, scheduler: SchedulerLike | None, param_groups: ParamGroups
) -> dict[str, Any] | tuple[list[Optimizer], list[dict[str, Any]]]:
    placement = strategies.placement(module.trainer)
    with within("param_groups"):
        partition = param_groups.partition(module_parameters.described(module, placement.full_shapes(module)))
    phase = phases.build(optimizer, scheduler, partition, module_parameters.tensors(module), trainers.clock(module.trainer))
    placement.check_optimizer(phase.optimizer)
    return phase.configuration()
