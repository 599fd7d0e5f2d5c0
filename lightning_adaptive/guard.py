"""What holds back the first updates after a switch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adaptive import moments


class Guard:
    """Holds the first updates of an optimizer to a norm: ``w <- w_before + min(1, limit / |update|) (w - w_before)``.

    It is a pair of the optimizer's own step hooks. Nothing waits for the device. An update that is not finite is left as it is.

    Args:
        optimizer: the optimizer.
        limit: the norm, of the update of the whole model.
        whole: what makes whole sums of those on this process.
    """

    def __init__(self, optimizer: Optimizer, limit: float, whole: moments.Whole) -> None:
        self._limit = limit
        self._whole = whole
        self._before: list[Tensor] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._keep),
            optimizer.register_step_post_hook(self._hold),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._before = []

    def _keep(self, optimizer: Optimizer, _: Any, __: Any) -> None:
        self._before = [moments.real(tensor.detach()).clone() for tensor in moments.parameters(optimizer)]

    @torch.no_grad()
    def _hold(self, optimizer: Optimizer, _: Any, __: Any) -> None:
        parameters = moments.parameters(optimizer)
        weights = [moments.real(tensor.detach()) for tensor in parameters]
        moved = torch._foreach_norm(torch._foreach_sub(weights, self._before), dtype=torch.float64)
        norm = self._whole(parameters, torch.stack(moved)[None] ** 2).sum().sqrt()
        share = self._limit / norm
        is_held = (share < 1) & norm.isfinite()
        for weight, before in zip(weights, self._before, strict=True):
            held = before.lerp(weight, share.to(weight.device, weight.dtype))
            weight.copy_(torch.where(is_held.to(weight.device), held, weight))
        self._before = []
