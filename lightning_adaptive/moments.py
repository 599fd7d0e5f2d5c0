"""What an optimizer's state says of the gradients and of its last update, for those that know how to say it.

Two families are known: ``adam`` (Adam, AdamW, NAdam, RAdam) and ``sgd``. Both keep a mean of the gradients, in two conventions::

    Adam's   m <- beta1 m + (1 - beta1) g            mean  m / (1 - beta1^t)            after t steps
    SGD's    buf <- momentum buf + (1 - dampening) g  mean  buf / gain                  gain = (1 - dampening) / (1 - momentum)

The gain is what SGD makes of a constant gradient: ``buf`` tends to ``gain * g``, and so do the steps with Nesterov's look-ahead.
Without momentum it is 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, NAdam, Optimizer, RAdam

from lightning_adaptive.partitions import OptimizerGroup

Family = Literal["adam", "sgd"]

Whole = Callable[[Sequence[Tensor], Tensor], Tensor]
"""Parameters and a row of sums for each, of what lies on this process, to the same sums of the whole parameters; no waiting."""

FAMILIES: Mapping[Family, tuple[type[Optimizer], ...]] = {"adam": (Adam, AdamW, NAdam, RAdam), "sgd": (SGD,)}

_CACHED = 1 << 15
"""Elements of what is worked on at once on a CPU, if more than one tensor: they stay in its cache."""
_AT_ONCE = 1 << 26
"""The same elsewhere, which bounds the memory for what lies in between."""


def family(optimizer: Optimizer) -> Family | None:
    """The family whose state an optimizer keeps, ``None`` for any other."""
    return next((name for name, classes in FAMILIES.items() if isinstance(optimizer, classes)), None)


def gain(group: OptimizerGroup) -> float:
    """What SGD makes of a constant gradient of one, at a learning rate of one, once its momentum has built up; of Adam's 1.

    >>> gain({"momentum": 0.9, "dampening": 0.0}), gain({"momentum": 0.0, "dampening": 0.5}), gain({"betas": (0.9, 0.999)})
    (10.000000000000002, 1.0, 1.0)
    """
    momentum = float(group.get("momentum", 0.0))
    return (1 - float(group["dampening"])) / (1 - momentum) if momentum else 1.0


def is_decoupled(optimizer: Optimizer, group: OptimizerGroup) -> bool:
    """Whether a group's weight decay acts on the weights beside the gradients, as AdamW's does."""
    return isinstance(optimizer, AdamW) or bool(group.get("decoupled_weight_decay"))


def parameters(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in the order of its groups."""
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def local(tensor: Tensor) -> Tensor:
    """Of a tensor that is sharded, what lies on this process."""
    shard: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return shard


def real(tensor: Tensor) -> Tensor:
    """What lies on this process of a tensor, and of complex numbers both parts as a last dimension."""
    here = local(tensor)
    return torch.view_as_real(here) if here.is_complex() else here


def projections(optimizer: Optimizer, lrs: Sequence[float] | None = None) -> tuple[list[Tensor], Tensor]:
    """Of Adam's last step ``p`` and the gradient ``g`` that it was made with, ``p.p`` and ``-p.g`` of each tensor.

    Their ratio is the learning rate at which plain SGD, ``-gamma g``, projected onto ``p`` is ``p`` (Keskar & Socher 2017,
    arXiv 1712.07628, equation 3). Nothing waits for the device. Weight decay that is decoupled is no part of ``p``; one that is
    not belongs to ``g``. Of NAdam ``p`` is Adam's step from the same state, and so it is of RAdam's first five.

    Args:
        optimizer: one of the family ``adam``, after a step, with its gradients still there.
        lrs: each group's learning rate in that step; ``None`` when no scheduler has changed it since.

    Returns:
        Its parameters; and a tensor of shape (2, number of them) in float64, of what lies on this process. It has zeros where there
        is no gradient or no state.
    """
    sums: list[Sums] = []
    for index, group in enumerate(optimizer.param_groups):
        tensors = [tensor for tensor in group["params"] if tensor.grad is not None and optimizer.state.get(tensor)]
        if tensors:
            stepped = group if lrs is None else {**group, "lr": lrs[index]}
            sums.append((tensors, _adam_along_gradients(optimizer, stepped, tensors)))
    return _of_all(optimizer, sums, 2)


def updates(optimizer: Optimizer, toward: Family) -> tuple[list[Tensor], Tensor]:
    """Of the running optimizer's update ``p`` and the step ``u`` of another's at a learning rate of one, three sums of each tensor.

    ``p`` is what the running optimizer makes of its mean gradient, and ``u`` what one of the family ``toward`` does: SGD the mean
    gradient itself, without its gain; Adam, ``mean / (sqrt(square) + eps)``, with what `carried` seeds it with.

    Args:
        optimizer: the running optimizer, of a known family.
        toward: family of the next.

    Returns:
        Its parameters; and ``p.p``, ``-p.u`` and ``u.u`` as a tensor of shape (3, number of them) in float64, of what lies on this
        process. It has zeros where there is no state.
    """
    own = family(optimizer)
    look = _within_family if own == toward else _adam_toward_sgd if own == "adam" else _sgd_toward_adam
    sums: list[Sums] = []
    for group in optimizer.param_groups:
        is_known = own == toward and not group.get("momentum", True)  # without momentum there is no state to wait for
        tensors = [tensor for tensor in group["params"] if is_known or optimizer.state.get(tensor)]
        if tensors:
            sums.append((tensors, look(optimizer, group, tensors)))
    return _of_all(optimizer, sums, 3)


def carried(
    running: Optimizer, groups: Mapping[Tensor, OptimizerGroup], following: Optimizer, group: OptimizerGroup
) -> list[dict[str, Any]]:
    """The state with which a group of the next optimizer begins, so that it goes on with the mean gradient of the running one.

    Between optimizers of the family ``adam`` both moments and the count of steps are carried. Each parameter's state is exactly
    what one of the two conventions makes of it:

    * Adam's to SGD's: ``buf = gain * m / (1 - beta1^t)``.
    * SGD's to SGD's: ``buf' = buf * gain' / gain``.
    * SGD's to Adam's: SGD has no second moment, so Adam begins as after one step with the mean gradient ``a = buf / gain``:
      ``m = (1 - beta1) a``, ``v = (1 - beta2) a^2``, ``t = 1``. Since a mean of squares is no less than the squared mean, ``v`` is
      the least that it can be.

    What is not changed is not copied: the same tensor then belongs to both.

    Args:
        running: the running optimizer.
        groups: its group of each parameter.
        following: the next optimizer, of a known family.
        group: one of its groups.

    Returns:
        The state of each parameter of the group; zeros where the running optimizer has none, and nothing where nothing of the
        parameter lies here.
    """
    states: list[dict[str, Any]] = []
    for tensor in group["params"]:
        state = running.state.get(tensor) or {}
        if not state and not tensor.numel():
            states.append({})
            continue
        old = groups.get(tensor, {})
        states.append(
            _for_sgd(tensor, state, old, group) if family(following) == "sgd" else _for_adam(tensor, state, old, following, group)
        )
    return states


# Sums


Sums = tuple[Sequence[Tensor], Tensor]
"""Some parameters, and a tensor of shape (sums of each, number of them)."""


def _of_all(optimizer: Optimizer, sums: Sequence[Sums], count: int) -> tuple[list[Tensor], Tensor]:
    """Sums of some parameters as those of all, of the others zero: FSDP leaves a process without a share of some.

    Args:
        optimizer: whose parameters they are.
        sums: of some of them, in float64.
        count: number of sums of each.
    """
    everything = parameters(optimizer)
    device = sums[0][1].device if sums else local(everything[0]).device
    places = {tensor: place for place, tensor in enumerate(everything)}
    spread = torch.zeros(count, len(everything), dtype=torch.float64, device=device)
    if sums:
        found = [places[tensor] for some, _ in sums for tensor in some]
        spread[:, found] = torch.cat([rows for _, rows in sums], dim=1)
    return everything, spread


def _within_family(_: Optimizer, group: OptimizerGroup, tensors: Sequence[Tensor]) -> Tensor:
    """``p`` is ``lr * gain * u``, whatever ``u`` is: each element counts once, so that shards add up."""
    lr = float(group["lr"]) * gain(group)
    sizes = torch.tensor([local(tensor).numel() for tensor in tensors], dtype=torch.float64)
    return torch.tensor([[lr * lr], [lr], [1.0]], dtype=torch.float64) * sizes


def _adam_along_gradients(optimizer: Optimizer, group: OptimizerGroup, tensors: Sequence[Tensor]) -> Tensor:
    scale, _ = _scales(optimizer, group, tensors)
    norms: list[Tensor] = []
    dots: list[Tensor] = []
    for some, ratios in _ratios(optimizer, group, tensors):
        norms += map(torch.dot, ratios, ratios)
        dots += map(torch.dot, ratios, _gradients(optimizer, group, some))
    update, along = torch.stack([torch.stack(norms), torch.stack(dots)]).double() * torch.stack([scale**2, scale])
    if not is_decoupled(optimizer, group):
        # The decay was that of the weights before the step, which now are `p` further.
        along = along + group["weight_decay"] * update
    return torch.stack([update, along])


def _adam_toward_sgd(optimizer: Optimizer, group: OptimizerGroup, tensors: Sequence[Tensor]) -> Tensor:
    scale, correction = _scales(optimizer, group, tensors)
    update: list[Tensor] = []
    along: list[Tensor] = []
    step: list[Tensor] = []
    for some, ratios in _ratios(optimizer, group, tensors):
        means = [_flat(optimizer.state[tensor]["exp_avg"]) for tensor in some]
        update += map(torch.dot, ratios, ratios)
        along += map(torch.dot, ratios, means)
        step += map(torch.dot, means, means)
    rows = torch.stack([torch.stack(update), torch.stack(along), torch.stack(step)])
    return rows.double() * torch.stack([scale**2, scale / correction, correction**-2])


def _sgd_toward_adam(optimizer: Optimizer, group: OptimizerGroup, tensors: Sequence[Tensor]) -> Tensor:
    """``u`` is ``a / |a|``, the sign of the buffer, as `carried` has it."""
    lr = float(group["lr"])
    sums: list[Tensor] = []
    for tensor in tensors:
        buffer = _flat(optimizer.state[tensor]["momentum_buffer"])
        sums.append(torch.stack([buffer.dot(buffer), buffer.abs().sum(), buffer.count_nonzero().to(buffer.dtype)]))
    return torch.stack(sums, dim=1).double() * torch.tensor([[lr**2], [lr], [1.0]], dtype=torch.float64).to(sums[0].device)


def _ratios(optimizer: Optimizer, group: OptimizerGroup, tensors: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """``m / (sqrt(v) + eps sqrt(1 - beta2^t))``, flat: Adam's step without its `_scales`. RAdam adds a plain ``eps``.

    By portions, with the tensors of each; what one portion is worked on in is that of the next.
    """
    state, second = optimizer.state, "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    corrections = (1 - group["betas"][1] ** _steps(optimizer, tensors)).sqrt()
    least = iter(_each((torch.ones_like(corrections) if isinstance(optimizer, RAdam) else corrections) * group["eps"]))
    portions = list(_portions(tensors))
    size = max(sum(real(tensor).numel() for tensor in some) for some in portions)
    room = _flat(state[tensors[0]][second]).new_empty(size)
    for some in portions:
        roots = _roots([_flat(state[tensor][second]) for tensor in some], room)
        torch._foreach_add_(roots, list(itertools.islice(least, len(some))))
        torch._foreach_reciprocal_(roots)
        torch._foreach_mul_(roots, [_flat(state[tensor]["exp_avg"]) for tensor in some])
        yield some, roots


def _scales(optimizer: Optimizer, group: OptimizerGroup, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each tensor ``lr sqrt(1 - beta2^t) / (1 - beta1^t)``, which makes `_ratios` the step, and ``1 - beta1^t``."""
    steps = _steps(optimizer, tensors).to(local(tensors[0]).device, non_blocking=True)
    first, second = 1 - group["betas"][0] ** steps, 1 - group["betas"][1] ** steps
    scale = group["lr"] * second.sqrt() / first
    return scale * _rectifications(group, steps) if isinstance(optimizer, RAdam) else scale, first


def _rectifications(group: OptimizerGroup, steps: Tensor) -> Tensor:
    """RAdam's factor (Liu et al. 2020, arXiv 1908.03265), from the step on at which it has one."""
    beta2 = group["betas"][1]
    last = 2 / (1 - beta2) - 1
    length = last - 2 * steps * beta2**steps / (1 - beta2**steps)
    factor = ((length - 4) * (length - 2) * last / ((last - 4) * (last - 2) * length)).sqrt()
    return torch.where(length > 5, factor, 1.0)


def _steps(optimizer: Optimizer, tensors: Sequence[Tensor]) -> Tensor:
    """Steps of each tensor. One that was never stepped, whose moments are zero, counts as stepped once."""
    return torch.stack([local(optimizer.state[tensor]["step"]) for tensor in tensors]).double().clamp(min=1)


def _each(values: Tensor) -> Any:
    """A number for each tensor, in the form that does not wait for a device."""
    return values.tolist() if values.device.type == "cpu" else list(values.float().unbind())


def _gradients(optimizer: Optimizer, group: OptimizerGroup, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the family ``adam`` averages: the gradient, with the weight decay that is part of it."""
    gradients = [_flat(tensor.grad) for tensor in tensors if tensor.grad is not None]
    if group.get("maximize"):
        gradients = list(torch._foreach_neg(gradients))
    if group["weight_decay"] and not is_decoupled(optimizer, group):
        weights = [_flat(tensor.detach()) for tensor in tensors]
        gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
    return gradients


def _flat(tensor: Tensor) -> Tensor:
    """What lies here of a tensor, as a vector. Of 16 bits are made 32, in which squares and their sums have a place."""
    here = real(tensor)
    return (here.float() if here.dtype in (torch.float16, torch.bfloat16) else here).reshape(-1)


def _roots(vectors: Sequence[Tensor], room: Tensor) -> list[Tensor]:
    """Square roots, in memory that is there, where they fit: on a CPU new pages cost more than all that is computed."""
    if any(vector.dtype != room.dtype for vector in vectors):
        return list(torch._foreach_sqrt(list(vectors)))
    sizes = [vector.numel() for vector in vectors]
    places = room[: sum(sizes)].split(sizes)
    return [torch.sqrt(vector, out=place) for vector, place in zip(vectors, places, strict=True)]


def _portions(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in portions that are worked on at once."""
    limit = _CACHED if local(tensors[0]).device.type == "cpu" else _AT_ONCE
    portion: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if portion and size + local(tensor).numel() > limit:
            yield portion
            portion, size = [], 0
        portion.append(tensor)
        size += local(tensor).numel()
    yield portion


# State


def _for_sgd(tensor: Tensor, state: Mapping[str, Any], old: OptimizerGroup, new: OptimizerGroup) -> dict[str, Any]:
    if "exp_avg" in state:
        factor = gain(new) / (1 - old["betas"][0] ** max(float(state["step"]), 1))
        return {"momentum_buffer": state["exp_avg"] * factor}
    if state.get("momentum_buffer") is not None:
        return {"momentum_buffer": _times(state["momentum_buffer"], gain(new) / gain(old))}
    return {"momentum_buffer": torch.zeros_like(tensor)}


def _for_adam(
    tensor: Tensor, state: Mapping[str, Any], old: OptimizerGroup, following: Optimizer, new: OptimizerGroup
) -> dict[str, Any]:
    beta1, beta2 = new["betas"]
    greatest = None
    if "exp_avg" in state:
        step = float(state["step"])
        taken = max(step, 1)  # what was never stepped has moments of zero
        factors = [(1 - after**taken) / (1 - before**taken) for before, after in zip(old["betas"], new["betas"], strict=True)]
        first, second = _times(state["exp_avg"], factors[0]), _times(state["exp_avg_sq"], factors[1])
        if "max_exp_avg_sq" in state:
            greatest = _times(state["max_exp_avg_sq"], factors[1])
    elif state.get("momentum_buffer") is not None:
        step, mean = 1.0, state["momentum_buffer"] / gain(old)
        first, second = mean * (1 - beta1), _square(mean) * (1 - beta2)
    else:
        step, first, second = 0.0, torch.zeros_like(tensor), torch.zeros_like(tensor)
    on_device = new.get("capturable") or new.get("fused")
    device = local(tensor).device if on_device else torch.device("cpu")
    carried = {"step": torch.tensor(step, dtype=torch.float32, device=device), "exp_avg": first, "exp_avg_sq": second}
    if new.get("amsgrad"):
        carried["max_exp_avg_sq"] = second.clone() if greatest is None else greatest
    if isinstance(following, NAdam):
        carried["mu_product"] = _mu_product(state, old, new, step).to(device)
    return carried


def _mu_product(state: Mapping[str, Any], old: OptimizerGroup, new: OptimizerGroup, step: float) -> Tensor:
    """NAdam's product of the momenta of all steps (Dozat 2016), which no other keeps."""
    if "mu_product" in state and all(old[option] == new[option] for option in ("betas", "momentum_decay")):
        return state["mu_product"]
    steps = torch.arange(1, int(step) + 1, dtype=torch.float64)
    return (new["betas"][0] * (1 - 0.5 * 0.96 ** (steps * new["momentum_decay"]))).prod().float()


def _square(tensor: Tensor) -> Tensor:
    """Adam's square, which is of both parts of complex numbers."""
    return torch.view_as_complex(torch.view_as_real(tensor) ** 2) if tensor.is_complex() else tensor**2


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1 else tensor * factor
