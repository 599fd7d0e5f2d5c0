"""What SWATS, the switch itself and the steps after it cost, in steps of a fused optimizer of about 10 million parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from paired import Ratio, compare
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lightning_adaptive import moments
from lightning_adaptive.durations import Clock
from lightning_adaptive.handover import PRESETS, Whole, cross
from lightning_adaptive.partitions import Group, split
from lightning_adaptive.phases import build_optimizer
from lightning_adaptive.triggers import Projection, Seen, Swats

STEPS = 10
WHOLE: Whole = lambda _, rows: rows  # noqa: E731 - one process has the whole


def gpt() -> dict[str, tuple[int, ...]]:
    """Shapes of a GPT of 6 blocks of width 384: 76 tensors, 10.8 million parameters."""
    width, shapes = 384, {"embed": (256, 384), "place": (256, 384), "norm.weight": (384,), "norm.bias": (384,)}
    linears = {"attend": (3 * width, width), "project": (width, width), "widen": (4 * width, width), "narrow": (width, 4 * width)}
    for block in range(6):
        for norm in ("norm1", "norm2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        for name, shape in linears.items():
            shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    return shapes


def resnet() -> dict[str, tuple[int, ...]]:
    """Shapes of a ResNet-18 for small images and ten classes: 62 tensors, 11.2 million parameters."""
    shapes: dict[str, tuple[int, ...]] = {"stem": (64, 3, 3, 3), "head.weight": (10, 512), "head.bias": (10,)}
    norms = {"stem": 64}
    width = 64
    for stage, wider in enumerate((64, 128, 256, 512)):
        for block in range(2):
            key = f"{stage}.{block}"
            shapes |= {f"{key}.conv1": (wider, width, 3, 3), f"{key}.conv2": (wider, wider, 3, 3)}
            norms |= {f"{key}.1": wider, f"{key}.2": wider}
            if width != wider:
                shapes[f"{key}.shortcut"] = (wider, width, 1, 1)
                norms[f"{key}.shortcut"] = wider
            width = wider
    for key, size in norms.items():
        shapes |= {f"{key}.weight": (size,), f"{key}.bias": (size,)}
    return shapes


SHAPES = {"GPT": gpt(), "ResNet-18": resnet()}


def parameters(shapes: dict[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    """Small random parameters with random gradients."""
    torch.manual_seed(0)
    tensors = {name: nn.Parameter(0.02 * torch.randn(shape)) for name, shape in shapes.items()}
    for tensor in tensors.values():
        tensor.grad = torch.randn_like(tensor)
    return tensors


def timed(steps: Callable[[], Any], count: int = STEPS) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        steps()
    return (time.perf_counter() - begin) / count


class Watched:
    """Steps of Adam that the trigger looks at, every so many."""

    def __init__(self, optimizer: Adam, every: int) -> None:
        self.optimizer, self.trigger = optimizer, Swats(every_n_steps=every)
        self.memory: dict[str, Any] = {}
        self.made = 0

    def step(self) -> None:
        self.optimizer.step()
        self.made += 1
        if self.made % self.trigger.every_n_steps == 0:
            _, rows = moments.projections(self.optimizer)
            update, along = rows.sum(dim=1).tolist()
            seen = {"": Projection(update, along, 0.999, 1e-3)}
            self.memory = self.trigger.observe(self.memory, Seen(self.made, Clock(None, None), projections=seen))


def _stepped(shapes: dict[str, tuple[int, ...]], factory: Callable[..., Optimizer]) -> Optimizer:
    optimizer = factory(list(parameters(shapes).values()))
    optimizer.step()
    return optimizer


def _switched(shapes: dict[str, tuple[int, ...]], per: str) -> Optimizer:
    """Fused SGD after a smooth handover from fused Adam, without the guard."""
    tensors = parameters(shapes)
    running = Adam(tensors.values(), fused=True)
    running.step()
    whole = (Group(tuple(tensors)),)
    groups = split(whole) if per == "tensor" else whole
    following, _ = build_optimizer(partial(SGD, lr=0.1, momentum=0.9, fused=True), groups, tensors)
    cross(PRESETS["smooth"], running, following, groups, WHOLE)
    return following


def _switch(shapes: dict[str, tuple[int, ...]]) -> float:
    """Seconds of one smooth handover, with the next optimizer built for each tensor."""
    tensors = parameters(shapes)
    running = Adam(tensors.values(), fused=True)
    running.step()
    groups = split((Group(tuple(tensors)),))

    def hand_over() -> None:
        following, _ = build_optimizer(partial(SGD, lr=0.1, momentum=0.9, fused=True), groups, tensors)
        cross(PRESETS["smooth"], running, following, groups, WHOLE)

    return timed(hand_over, 3)


def measure(pairs: int) -> list[Ratio]:
    """Ratios of the times of optimizer steps alone, on all of the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(torch.multiprocessing.cpu_count())
    fused_adam, fused_sgd = partial(Adam, fused=True), partial(SGD, lr=1e-3, momentum=0.9, fused=True)
    ratios = []
    for name, shapes in SHAPES.items():
        adam, sgd = _stepped(shapes, fused_adam), _stepped(shapes, fused_sgd)
        for every, goal in ((1, 2.8), (10, 1.25)):
            watched = Watched(_stepped(shapes, fused_adam), every)  # type: ignore[arg-type]
            words = f"{name}, fused Adam with SWATS looking every {every} step{'s' * (every > 1)}, over fused Adam"
            ratios.append(
                compare(words, partial(timed, watched.step), partial(timed, adam.step), pairs, goal if name == "GPT" else None)
            )
        library = _library(shapes)
        if library is not None:
            words = f"{name}, SWATS of pytorch_optimizer, over fused Adam"
            ratios.append(compare(words, partial(timed, library.step), partial(timed, adam.step), pairs))
        for per, goal in (("group", 1.05), ("tensor", 1.35)):
            after = _switched(shapes, per)
            words = f"{name}, SGD after a switch, one group per {per if per == 'tensor' else 'model'}, over fused SGD"
            ratios.append(compare(words, partial(timed, after.step), partial(timed, sgd.step), pairs, goal))
        words = f"{name}, the handover of a smooth switch, over a step of fused Adam"
        ratios.append(compare(words, partial(_switch, shapes), partial(timed, adam.step), pairs, 5.0))
    torch.set_num_threads(threads)
    return ratios


def _library(shapes: dict[str, tuple[int, ...]]) -> Optimizer | None:
    """SWATS of pytorch_optimizer, where that is installed."""
    try:
        from pytorch_optimizer import SWATS
    except ImportError:
        return None
    return _stepped(shapes, partial(SWATS, lr=1e-3))
