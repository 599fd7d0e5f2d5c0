"""Steps of an optimizer with given gradients."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer


def all_of(optimizer: Optimizer) -> list[Tensor]:
    """Its parameters."""
    return [one for group in optimizer.param_groups for one in group["params"]]


def step(optimizer: Optimizer, gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(all_of(optimizer), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
