"""At which step SWATS switches and with which learning rate, as published and by averages, over ten seeds of three small trainings.

``python benchmarks/swats_steps.py`` prints a table; nothing is switched.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import torch
from small_tasks import TASKS, Task
from torch.optim import Adam, AdamW

from lightning_adaptive import Clock, Swats, moments
from lightning_adaptive.triggers import Memory, Projection, Seen

STEPS = 1500
SEEDS = range(10)
TRIGGERS = {
    "paper, eps 1e-9": Swats(criterion="paper"),
    "paper, eps 1e-3": Swats(criterion="paper", eps=1e-3),
    "paper, eps 1e-2": Swats(criterion="paper", eps=1e-2),
    "relative": Swats(),
}


def fired(task: Task, factor: Callable[[int], float]) -> dict[str, tuple[int, float]]:
    """Step and learning rate of each trigger that fires."""
    kind = AdamW if task.weight_decay else Adam
    optimizer = kind(task.model.parameters(), weight_decay=task.weight_decay)
    memories: dict[str, Memory] = {name: {} for name in TRIGGERS}
    found: dict[str, tuple[int, float]] = {}
    for step in range(1, STEPS + 1):
        lr = optimizer.param_groups[0]["lr"] = task.lr * factor(step)
        optimizer.zero_grad()
        task.loss(*next(task.batches)).backward()
        optimizer.step()
        update, along = moments.projections(optimizer)[1].sum(dim=1).tolist()
        seen = Seen(step, Clock(None, STEPS), projections={"": Projection(update, along, 0.999, lr)})
        for name, trigger in TRIGGERS.items():
            memories[name] = trigger.observe(memories[name], seen)
            if "fired" in memories[name] and name not in found:
                found[name] = (step, trigger.estimate(memories[name])[""])
    return found


def spread(values: list[float]) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else "-"


def main() -> None:
    torch.set_num_threads(1)
    schedules = {"constant": lambda _: 1.0, "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * step / STEPS)}
    print(f"{len(SEEDS)} seeds, {STEPS} steps: median (least to greatest) of those that switch")
    print("| task | schedule | criterion | switched | step | learning rate |\n|---|---|---|---|---|---|")
    for task, make in TASKS.items():
        for schedule, factor in schedules.items():
            runs = [fired(make(seed), factor) for seed in SEEDS]
            for name in TRIGGERS:
                fires = [run[name] for run in runs if name in run]
                spreads = (spread([fire[of] for fire in fires]) for of in (0, 1))
                row = (task, schedule, name, f"{len(fires)} of {len(runs)}", *spreads)
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
