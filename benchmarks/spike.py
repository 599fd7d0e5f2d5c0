"""What a switch from Adam to SGD does to the loss: writes the block of ``spike.md`` and ``spike.png``.

On the three `small_tasks`, early and late, with constant and cosine schedules, over ten seeds. Each seed trains with Adam once, and
every way of switching goes on from a copy of that, on the same batches. Two figures of each are divided by those of the run that
goes on with Adam: the largest evaluation loss in the 150 steps after the switch over that at the switch (the spike), and the
training loss 500 steps later, a mean over the last 50.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, islice, product
from pathlib import Path
from typing import Any

import torch
from small_tasks import TASKS, Task, markov
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from recipes import replaced

sys.path.insert(0, str(Path(__file__).parent.parent))

from lightning_adaptive import Clock, Constant, Cosine, Schedule, moments
from lightning_adaptive.guard import Guard
from lightning_adaptive.handover import PRESETS, Handover, cross
from lightning_adaptive.lr_schedulers import ScheduleLR
from lightning_adaptive.partitions import Group, split
from lightning_adaptive.tables import markdown
from lightning_adaptive.triggers import Memory, Projection, Seen, Swats

SEEDS = range(10)
MOMENTS = {"early": 150, "late": 800}
SCHEDULES: dict[str, Schedule] = {"constant": Constant(), "cosine": Cosine()}
CLOCK = Clock(steps_per_epoch=None, total_steps=1600)
WINDOW, LATER, LAST = 150, 500, 50
TRAININGS: dict[str, Callable[[int], Task]] = {**TASKS, "Markov text, transformer": partial(markov, words=16, width=32, batch=8)}
"""The small tasks; the language with fewer words, a narrower net and smaller batches, so that it costs a third."""
EVERY = {"digits, MLP": 1, "digits, CNN": 5, "Markov text, transformer": 10}
"""Steps from one evaluation to the next: they cost as much as about 4, 5 and 4 steps."""
EVALUATED = {"digits, MLP": 1797, "digits, CNN": 600, "Markov text, transformer": 64}
"""Images or sentences of an evaluation."""
PAPER = Swats(criterion="paper", eps=1e-300)
"""Never fires: the estimate at the moment of the switch is wanted."""
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Moment:
    """What stands at a switch.

    Args:
        task: the task, with its model at that time.
        optimizer: Adam, for that model.
        schedule: of both phases.
        step: steps that were made.
        batches: of the steps to come.
        estimate: SWATS' learning rate.
        loss: evaluation loss.
    """

    task: Task
    optimizer: Optimizer
    schedule: Schedule
    step: int
    batches: Sequence[tuple[Tensor, Tensor]]
    estimate: float
    loss: float


@dataclass(frozen=True)
class Run:
    """What came after a switch.

    Args:
        losses: evaluation losses in the window, over that at the switch; infinite once one was not finite.
        later: training loss at the end, over the evaluation loss at the switch.
    """

    losses: Sequence[float]
    later: float

    @property
    def spike(self) -> float:
        return max(self.losses)

    @property
    def diverged(self) -> bool:
        return not self.later <= 2


NOTHING = Run([math.inf], math.inf)
"""Of a way that finds no learning rate above zero."""

Way = Callable[[Moment, Task, Optimizer], tuple[Optimizer, int]]
"""Makes the next optimizer of the running one; with it, for how many steps its schedule has run."""


# Training


def before(name: str, schedule: Schedule, seed: int) -> Iterator[Moment]:
    """Trains with Adam, and stops at each moment."""
    task = TRAININGS[name](seed)
    first = slice(EVALUATED[name])
    task = replace(task, evaluation=(task.evaluation[0][first], task.evaluation[1][first]))
    last = max(MOMENTS.values())
    batches = list(islice(task.batches, last + LATER))
    kind, decay = (AdamW, {"weight_decay": task.weight_decay}) if task.weight_decay else (Adam, {})
    optimizer: Optimizer = kind(task.model.parameters(), task.lr, **decay)
    scheduler = ScheduleLR(optimizer, schedule, CLOCK)
    memory: Memory = {}
    for step, batch in enumerate(batches[:last], 1):
        advance(task, optimizer, batch)
        memory = PAPER.observe(memory, Seen(step, CLOCK, projections={"": projection(optimizer)}))
        scheduler.step()
        if step in MOMENTS.values():
            model, adam = copy.deepcopy((task.model, optimizer))
            there = replace(task, model=model)
            yield Moment(there, adam, schedule, step, batches[step : step + LATER], memory["groups"][""]["lr"], there.evaluate())


def advance(task: Task, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    loss = task.loss(*batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def projection(optimizer: Optimizer) -> Projection:
    update, along = moments.projections(optimizer)[1].sum(dim=1).tolist()
    return Projection(update, along, optimizer.param_groups[0]["betas"][1])


def after(moment: Moment, way: Way, every: int) -> Run:
    """Goes on from a moment in one of the ways."""
    model, running = copy.deepcopy((moment.task.model, moment.optimizer))
    task = replace(moment.task, model=model)
    optimizer, since = way(moment, task, running)
    scheduler = ScheduleLR(optimizer, moment.schedule, replace(CLOCK, first_step=moment.step), since)
    losses: list[float] = []
    trained: list[float] = []
    for step, batch in enumerate(moment.batches, 1):
        trained.append(advance(task, optimizer, batch))
        scheduler.step()
        if not math.isfinite(trained[-1]):
            return Run([*losses, math.inf], math.inf)
        if step <= WINDOW and (step % every == 0 or step == 1):
            losses.append(task.evaluate() / moment.loss)
    return Run([loss if math.isfinite(loss) else math.inf for loss in losses], statistics.fmean(trained[-LAST:]) / moment.loss)


# Ways to switch


def adam(moment: Moment, _: Task, running: Optimizer) -> tuple[Optimizer, int]:
    """No switch."""
    return running, moment.step


def frozen(moment: Moment, _: Task, running: Optimizer) -> tuple[Optimizer, int]:
    """Adam whose second moment stays what it is: SGD with a learning rate for each weight, which nobody's SGD has."""
    for group in running.param_groups:
        for tensor in group["params"]:
            state = running.state[tensor]
            for beta, average in zip(group["betas"], ("exp_avg", "exp_avg_sq"), strict=True):
                state[average] /= 1 - beta ** state["step"]
            state["step"].fill_(1e10)  # both averages count as whole
        group["betas"] = (group["betas"][0], 1 - 1e-8)
    return running, moment.step


@dataclass(frozen=True)
class ToSGD:
    """A switch to SGD with momentum.

    Args:
        handover: the rules.
        lr: SGD's configured learning rate.
    """

    handover: Handover
    lr: float = 0.1

    def __call__(self, moment: Moment, task: Task, running: Optimizer) -> tuple[Optimizer, int]:
        tensors = dict(task.model.named_parameters())
        partition = (Group(tuple(tensors)),)
        if self.handover.splits:
            partition = split(partition)
        groups = [{"params": [tensors[name] for name in group.parameters]} for group in partition]
        following = SGD(groups, self.lr, momentum=0.9)
        crossed = cross(self.handover, running, following, partition, here, estimate={"": moment.estimate})
        if crossed.limit is not None:
            guard, steps = Guard(following, crossed.limit, here), count(1)
            last = self.handover.guard_steps(replace(CLOCK, first_step=moment.step))
            following.register_step_post_hook(lambda *_: guard.remove() if next(steps) == last else None)
        return following, 0


def here(_: Sequence[Tensor], rows: Tensor) -> Tensor:
    """All parameters lie on this process."""
    return rows


HELD = Handover(lr="match_norm", scale=1.5, momentum="carry", weight_decay="match", guard=1.0, guard_for="100%")
"""Half as fast again as what makes both steps as long, and never let loose."""
WAYS: dict[str, Way] = {
    "own, lr 0.1": ToSGD(PRESETS["own"], 0.1),
    "own, lr 0.01": ToSGD(PRESETS["own"], 0.01),
    "keep": ToSGD(PRESETS["keep"]),
    "swats": ToSGD(PRESETS["swats"]),
    "smooth": ToSGD(PRESETS["smooth"]),
    "held": ToSGD(HELD),
    "frozen Adam": frozen,
    "Adam": adam,
}
WITHOUT = [("Markov text, transformer", "held"), ("Markov text, transformer", "frozen Adam")]
"""What is left out: it explains what happens on the digits."""

# Cells


@dataclass(frozen=True)
class Cell:
    """One task, moment and schedule, with the runs of each way, one for each seed."""

    task: str
    schedule: str
    moment: str
    runs: Mapping[str, Sequence[Run]]

    def over_adam(self, way: str, figure: str) -> list[float]:
        """A figure of each seed, ``spike`` or ``later``, over that of Adam."""
        pairs = zip(self.runs[way], self.runs["Adam"], strict=True)
        return [getattr(run, figure) / getattr(other, figure) for run, other in pairs]

    def diverged(self, way: str) -> int:
        return sum(run.diverged for run in self.runs[way])


def run_seed(name: str, schedule: str, seed: int, path: Path) -> dict[str, dict[str, Run]]:
    """The runs by moment and way; those that lie in the file are not repeated."""
    known = json.loads(path.read_text()) if path.exists() else {moment: {} for moment in MOMENTS}
    ways = [way for way in WAYS if (name, way) not in WITHOUT]
    if any(way not in runs for runs in known.values() for way in ways):
        for label, moment in zip(MOMENTS, before(name, SCHEDULES[schedule], seed), strict=True):
            for way in ways:
                if way not in known[label]:
                    known[label][way] = asdict(run_way(moment, way, EVERY[name]))
        path.write_text(json.dumps(known))
    return {moment: {way: Run(**run) for way, run in runs.items() if way in ways} for moment, runs in known.items()}


def run_way(moment: Moment, way: str, every: int) -> Run:
    if way == "swats" and moment.estimate <= 0:
        return NOTHING
    return after(moment, WAYS[way], every)


def measure(folder: Path) -> Iterator[Cell]:
    """Runs everything, seed by seed."""
    found: dict[tuple[str, str], list[dict[str, dict[str, Run]]]] = {pair: [] for pair in product(TASKS, SCHEDULES)}
    for seed, (name, schedule) in product(SEEDS, found):
        found[name, schedule].append(run_seed(name, schedule, seed, folder / f"{name}-{schedule}-{seed}.json".replace(" ", "_")))
        print(f"{name}, {schedule}, seed {seed}", file=sys.stderr, flush=True)
    for (name, schedule), seeds in found.items():
        for moment in MOMENTS:
            yield Cell(name, schedule, moment, {way: [runs[moment][way] for runs in seeds] for way in seeds[0][moment]})


# Table and picture


def middle_and_worst(values: Sequence[float]) -> str:
    """Median, and the worst in brackets.

    >>> middle_and_worst([1.0, 1.25, 300.0]), middle_and_worst([1.0, 1.25, math.inf])
    ('1.25 (300)', '1.25 (lost)')
    """
    return f"{_short(statistics.median(values))} ({_short(max(values))})"


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "lost"
    return f"{value:.2f}" if value < 10 else f"{value:.3g}"


def tables(cells: Sequence[Cell]) -> str:
    """The two figures, and the number of runs that diverged."""
    ways = [way for way in WAYS if way != "Adam"]
    header = ["task", "schedule", "switch", *ways]
    blocks = []
    for title, figure in {"Spike over Adam's": "spike", "Loss 500 steps later over Adam's": "later"}.items():
        rows = [
            [
                *(cell.task, cell.schedule, f"{cell.moment}"),
                *(middle_and_worst(cell.over_adam(way, figure)) if way in cell.runs else "" for way in ways),
            ]
            for cell in cells
        ]
        blocks.append(f"**{title}**: median (worst of {len(SEEDS)} seeds)\n\n{markdown(header, rows)}")
    counts = [
        [
            *(cell.task, cell.schedule, cell.moment),
            *(str(cell.diverged(way)) if way in cell.runs else "" for way in (*ways, "Adam")),
        ]
        for cell in cells
    ]
    blocks.append(f"**Diverged runs** of {len(SEEDS)}\n\n{markdown([*header, 'Adam'], counts)}")
    without = sum(run == NOTHING for cell in cells for run in cell.runs["swats"])
    blocks.append(
        f"In {without} of {len(cells) * len(SEEDS)} runs SWATS' estimate was below zero at the switch; they count as diverged.\n"
        f"torch {torch.__version__.partition('+')[0]}, one thread of 2 cores; n = {len(SEEDS)}."
    )
    return "\n\n".join(blocks)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draws the evaluation losses after the switch: the median over the seeds, and for ours from the least to the greatest."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(TASKS), 4, figsize=(14, 9), sharex=True, sharey="row", layout="constrained")
    for axis, cell in zip(axes.flat, cells, strict=True):
        for way, style in STYLES.items():
            curves = [run.losses for run in cell.runs[way]]
            draw_curves(axis, curves, EVERY[cell.task], {"label": way, **style}, banded=way == "smooth")
        axis.axhline(1, color="grey", linewidth=0.6)
        axis.grid(alpha=0.3)
    for axis, cell in zip(axes[0], cells, strict=False):
        axis.set_title(f"{cell.moment} switch, {cell.schedule}")
    for row, task in zip(axes, TRAININGS, strict=True):
        row[0].set_ylabel(f"{task}\nevaluation loss / at the switch")
        if row[0].get_ylim()[1] > 2:
            row[0].set_yscale("log")
    for axis in axes[-1]:
        axis.set_xlabel("steps after the switch")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


STYLES: dict[str, dict[str, Any]] = {
    "own, lr 0.1": {"color": "tab:red"},
    "own, lr 0.01": {"color": "tab:orange"},
    "keep": {"color": "tab:green", "linestyle": "--"},
    "swats": {"color": "tab:purple"},
    "Adam": {"color": "black", "linewidth": 1.8},
    "smooth": {"color": "tab:blue", "linewidth": 2.2},
}


def draw_curves(axis: Any, curves: Iterable[Sequence[float]], every: int, style: Mapping[str, Any], banded: bool) -> None:
    """The median, point by point; a run that is lost counts as infinite from there on."""
    steps = [1, *range(every, WINDOW + 1, every)] if every > 1 else list(range(1, WINDOW + 1))
    filled = [[*curve, *[math.inf] * len(steps)][: len(steps)] for curve in curves]
    points = list(zip(*filled, strict=True))
    axis.plot(steps, [statistics.median(values) for values in points], **style)
    if banded:
        axis.fill_between(steps, [min(values) for values in points], [max(values) for values in points], alpha=0.2, linewidth=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the figures lie; given again, those that are there are not repeated")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        cells = list(measure(folder))
    block = tables(cells)
    path = FOLDER / "spike.md"
    path.write_text(replaced(path.read_text(encoding="utf-8"), "results", block), encoding="utf-8")
    draw(cells, FOLDER / "spike.png")
    print(block)


if __name__ == "__main__":
    main()
