"""Squared norms of gradients while a step accumulates them: of each micro-batch, and of all together.

Nothing here waits for the device, and of what is copied there is little: small gradients, and shards.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.utils.hooks import RemovableHandle

_HALF = (torch.float16, torch.bfloat16)

_SMALL = 2**15
"""Elements of a gradient that is kept to the end of the backward, where the norms of all such are one operation.

Autograd has to copy such a gradient into an empty ``.grad``, so larger ones are looked at at once."""

_PIECE = 2**17
"""Elements of a sum in float32 on the CPU, which adds one after the other: 10 million lose 7e-4 of their sum, pieces 1e-6."""


class StepNorms(ABC):
    """The gradients of one step, which belong to the caller: they are looked at, and nothing of them is changed.

    Args:
        groups: the parameters, by group.
        device: where the sums lie.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], device: torch.device) -> None:
        self.groups = groups
        self.device = device
        self.micro_batches = 0
        self.in_pieces = False
        """Whether some parameter got its gradient in several pieces, whose norm cannot be told: it is then not a number."""
        self.small = torch.zeros(len(groups), dtype=torch.float64, device=device)
        """Sum over the micro-batches of the squared norms of their gradients, one value for each group."""

    @abstractmethod
    def begin(self, is_alone: bool) -> None:
        """Called before each backward.

        Args:
            is_alone: whether it leaves in ``.grad`` what this process has computed, whole and not reduced.
        """

    def end(self, is_last: bool) -> None:
        """Called after each backward.

        Args:
            is_last: whether it is the step's last.
        """
        self.small += self._of_micro_batch(is_last)
        self.micro_batches += 1

    @abstractmethod
    def close(self) -> None:
        """Leaves nothing behind, wherever the step was left."""

    @property
    def big(self) -> Tensor:
        """Squared norm of what lies in ``.grad``, one value for each group, float64."""
        return self._squared({id(tensor): tensor.grad for group in self.groups for tensor in group if tensor.grad is not None})

    @abstractmethod
    def _of_micro_batch(self, is_last: bool) -> Tensor: ...

    def _squared(self, grads: Mapping[int, Tensor]) -> Tensor:
        """Squared norms of gradients by their parameters' ``id``, one value for each group."""
        of_groups = [[grads[id(tensor)] for tensor in group if id(tensor) in grads] for group in self.groups]
        return self._summed([norms_of(group, self._holders) for group in of_groups])

    def _holders(self, grad: Tensor) -> int:
        """How many processes hold each element of a gradient, of whose squares this one's share is then only a part."""
        return 1

    def _summed(self, norms: Sequence[Sequence[Tensor]]) -> Tensor:
        return torch.stack([self._sum_of_squares(of_group) for of_group in norms])

    def _sum_of_squares(self, norms: Sequence[Tensor]) -> Tensor:
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        together = torch.stack([norm.to(self.device, non_blocking=True) for norm in norms])
        return together.double().square().sum()


@dataclass(frozen=True)
class Leaf:
    """What autograd gives a gradient to: a parameter, or a vector of several that FSDP has flattened.

    Args:
        tensor: the leaf.
        pieces: numbers of its elements in their order, each with the index of the group that they belong to, if to any.
    """

    tensor: Tensor
    pieces: Sequence[tuple[int, int | None]]


class OwnGradients(StepNorms):
    """On one process, under DDP and FSDP: each process's own gradients, by hooks on what autograd gives them to.

    A hook sees a micro-batch's gradient before it is added to ``.grad``, and so before it is reduced. A parameter that is used
    several times has one gradient, their sum. The hooks are there during the backward alone, so that no other call of autograd
    (a gradient penalty, a validation) is taken for it. None are needed where the micro-batch's gradient is all that is in ``.grad``
    afterwards, as that of a step's first.

    Args:
        groups: the parameters, by group.
        device: where the sums lie.
        leaves: what has hooks.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], device: torch.device, leaves: Sequence[Leaf]) -> None:
        super().__init__(groups, device)
        self._leaves = leaves
        self._listens = True
        self._handles: list[RemovableHandle] = []
        self._norms: list[list[Tensor]] = []
        self._kept: list[list[Tensor]] = []
        self._seen: set[int] = set()

    def begin(self, is_alone: bool) -> None:
        self.close()
        self._listens = not is_alone or any(tensor.grad is not None for group in self.groups for tensor in group)
        if not self._listens:
            return
        self._norms, self._kept, self._seen = [[] for _ in self.groups], [[] for _ in self.groups], set()
        self._handles = [leaf.tensor.register_hook(functools.partial(self._take, leaf)) for leaf in self._leaves]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._kept = [], []

    def _take(self, leaf: Leaf, grad: Tensor) -> None:
        parts = [grad] if len(leaf.pieces) == 1 else grad.split([count for count, _ in leaf.pieces])
        for (count, index), part in zip(leaf.pieces, parts, strict=True):
            if index is None:
                continue
            if count <= _SMALL and len(parts) == 1:
                self._kept[index].append(grad)  # itself, and no view: then autograd knows, and does not give its memory to .grad
            else:
                self._norms[index] += norms_of([part])
            if id(leaf) in self._seen:
                self.in_pieces = True
                self._norms[index].append(torch.full((), math.nan, device=grad.device))
        self._seen.add(id(leaf))

    def _of_micro_batch(self, is_last: bool) -> Tensor:
        if not self._listens:
            return self.big
        norms = [[*norms, *norms_of(kept)] for norms, kept in zip(self._norms, self._kept, strict=True)]
        self.close()
        return self._summed(norms)


class ShardedGradients(StepNorms):
    """Under FSDP2: gradients that all processes have reduced, of which each holds its shard in ``.grad``.

    A micro-batch's gradient is what it adds to ``.grad``; for that a copy of the shard is kept from one micro-batch to the next.
    The sum of a value over all processes is that of the whole parameters.

    Args:
        groups: the parameters, by group.
        device: where the sums lie.
        processes: number of all processes.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], device: torch.device, processes: int) -> None:
        super().__init__(groups, device)
        self._processes = processes
        self._before: dict[int, Tensor] = {}

    def begin(self, is_alone: bool) -> None:
        """Nothing: all that is looked at lies in ``.grad`` afterwards."""

    def close(self) -> None:
        self._before = {}

    @torch.no_grad()
    def _of_micro_batch(self, is_last: bool) -> Tensor:
        now = {id(tensor): tensor.grad for group in self.groups for tensor in group if tensor.grad is not None}
        before = self._before
        if before:
            torch._foreach_sub_(list(before.values()), [now[key] for key in before])  # the sign does not matter
        squared = self._squared({**now, **before})
        self._before = {} if is_last else {key: tensor.clone() for key, tensor in now.items()}
        return squared

    def _holders(self, grad: Tensor) -> int:
        if not isinstance(grad, DTensor):
            return self._processes
        mesh = grad.device_mesh
        repeats = (size for size, placement in zip(mesh.shape, grad.placements, strict=True) if isinstance(placement, Replicate))
        return math.prod(repeats) * self._processes // mesh.size()


def norms_of(grads: Iterable[Tensor], holders: Callable[[Tensor], int] = lambda _: 1) -> list[Tensor]:
    """Norms of gradients' pieces, so that their squares add up; of what several processes hold, to this one's share."""
    pieces = [(piece, holders(grad)) for grad in grads for piece in _pieces(_values(grad))]
    norms: list[Tensor] = []
    for is_half in (False, True):
        alike = [(piece, count) for piece, count in pieces if (piece.dtype in _HALF) is is_half]
        if alike:
            found = torch._foreach_norm([piece for piece, _ in alike], 2, dtype=torch.float32 if is_half else None)
            norms += [norm if count == 1 else norm / math.sqrt(count) for norm, (_, count) in zip(found, alike, strict=True)]
    return norms


def _values(grad: Tensor) -> Tensor:
    """What this process holds of a gradient, dense."""
    values = grad.detach()
    if isinstance(values, DTensor):
        values = values.to_local()
    return values.coalesce().values() if values.is_sparse else values


def _pieces(values: Tensor) -> Iterator[Tensor]:
    """Views of a tensor, small enough for the CPU."""
    if values.device.type != "cpu" or values.numel() <= _PIECE:
        yield values
        return
    # In the order of memory a transposed weight, or one in channels_last, is flat without a copy.
    ordered = values.permute(sorted(range(values.dim()), key=values.stride, reverse=True))
    yield from ordered.reshape(-1).split(_PIECE)
