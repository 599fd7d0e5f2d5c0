"""SWATS as it was published, written anew in NumPy, and two problems that it and torch's Adam are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

Array = np.ndarray[Any, np.dtype[np.float64]]
WHOLE = slice(None)


@dataclass
class Published:
    """Algorithm 1 of Keskar & Socher 2017 (arXiv 1712.07628) in float64, over one flat vector.

    Args:
        gradient: of the weights, in the k-th step.
        lr: of Adam, for all or for each weight.
        eps: tolerated difference; Adam's own is next to nothing, so that its place does not matter.
        parts: of the weights, each of which is decided for by itself.
        stays: whether Adam goes on after the switch.
        late: planted fault: the average is corrected as if so many steps more had been made.
    """

    gradient: Callable[[Array, int], Array]
    weights: Array
    lr: float | Array = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-3
    decay: float = 0.0
    decoupled: bool = False
    amsgrad: bool = False
    maximize: bool = False
    parts: tuple[slice, ...] = (WHOLE,)
    stays: bool = True
    late: int = 0

    def run(self, steps: int) -> tuple[Array, list[tuple[int, float]]]:
        """The gammas of each step, one of each part; and the step and learning rate with which each part switched."""
        b1, b2 = self.betas
        w = self.weights
        m, a, highest, v = (np.zeros_like(w) for _ in range(4))
        gammas, averages = np.zeros((steps, len(self.parts))), np.zeros(len(self.parts))
        switched: dict[int, tuple[int, float]] = {}
        for k in range(1, steps + 1):
            g = self.gradient(w, k) * (-1 if self.maximize else 1)
            if switched and not self.stays:
                v = b1 * v + g
                w = w - (1 - b1) * switched[0][1] * v
                continue
            if not self.decoupled:
                g = g + self.decay * w
            m = b1 * m + (1 - b1) * g
            a = b2 * a + (1 - b2) * g**2
            highest = np.maximum(highest, a) if self.amsgrad else a
            p = -self.lr * math.sqrt(1 - b2**k) / (1 - b1**k) * m / (np.sqrt(highest) + 1e-30)
            w = w + p - (self.lr * self.decay * w if self.decoupled else 0.0)
            for index, part in enumerate(self.parts):
                along = float(p[part] @ g[part])
                if along == 0:
                    continue
                gamma = gammas[k - 1, index] = p[part] @ p[part] / -along
                averages[index] = b2 * averages[index] + (1 - b2) * gamma
                corrected = float(averages[index]) / (1 - b2 ** (k + self.late))
                if k > 1 and abs(corrected - gamma) < self.eps and corrected > 0:
                    switched.setdefault(index, (k, corrected))
        self.weights = w
        return gammas, [switched[index] for index in sorted(switched)]


class Problem(NamedTuple):
    """A loss of tensors in torch, and its gradient in NumPy, in the k-th step."""

    shapes: tuple[tuple[int, ...], ...]
    start: Array
    loss: Callable[[Sequence[torch.Tensor], int], torch.Tensor]
    gradient: Callable[[Array, int], Array]

    def tensors(self) -> list[torch.Tensor]:
        """Where it starts."""
        return cut(self.start, self.shapes)


def cut(weights: Array, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    pieces = torch.tensor(weights).split([math.prod(shape) for shape in shapes])
    return [piece.reshape(shape).clone().requires_grad_() for piece, shape in zip(pieces, shapes, strict=True)]


def flat(tensors: Sequence[torch.Tensor]) -> Array:
    return np.concatenate([one.detach().reshape(-1).numpy() for one in tensors])


def quadratic() -> Problem:
    """With noise on its gradient, which is written down."""
    random = np.random.default_rng(3)
    root, target, start = random.normal(size=(10, 10)), random.normal(size=10), 3 * random.normal(size=10)
    curvature, noise = root @ root.T / 500, 0.03 * random.normal(size=(1001, 10))

    def loss(parameters: Sequence[torch.Tensor], k: int) -> torch.Tensor:
        distance = torch.cat([one.reshape(-1) for one in parameters]) - torch.tensor(target)
        return distance @ torch.tensor(curvature) @ distance / 2 + distance @ torch.tensor(noise[k])

    return Problem(((2, 3), (4,)), start, loss, lambda w, k: curvature @ (w - target) + noise[k])


def net() -> Problem:
    """Two layers on eight batches in turn; its gradient is autograd's."""
    shapes = ((8, 5), (8,), (3, 8), (3,))
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(8, 16, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (8, 16), generator=generator)
    start = 0.5 * torch.randn(sum(map(math.prod, shapes)), generator=generator, dtype=torch.float64)

    def loss(parameters: Sequence[torch.Tensor], k: int) -> torch.Tensor:
        first, bias, last, other = parameters
        logits = functional.linear(functional.linear(inputs[k % 8], first, bias).tanh(), last, other)
        return functional.cross_entropy(logits, labels[k % 8])

    def gradient(w: Array, k: int) -> Array:
        parameters = cut(w, shapes)
        return flat(torch.autograd.grad(loss(parameters, k), parameters))

    return Problem(shapes, start.numpy(), loss, gradient)


PROBLEMS = {"quadratic": quadratic(), "net": net()}
