"""What a run did: a row for each phase, the closing table, the picture, and the result as JSON."""

from __future__ import annotations

import csv
import itertools
import json
import math
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_adaptive import checkpoints
from lightning_adaptive.combined import class_name
from lightning_adaptive.errors import ConfigError, did_you_mean
from lightning_adaptive.lr_schedulers import describe_schedule
from lightning_adaptive.noise import find_monitor
from lightning_adaptive.phases import format_bytes, format_lrs, lrs, state_bytes
from lightning_adaptive.pictures import panels
from lightning_adaptive.strategies import running_optimizer
from lightning_adaptive.switch import find_switch

_COLUMNS = ("phase", "optimizer", "schedule", "steps", "lr first", "lr last", "train loss", "{metric}", "seconds", "state")


@dataclass(frozen=True)
class PhaseReport:
    """What one phase did on this process.

    Args:
        number: 1-based.
        optimizer: class name.
        schedule: the schedule in words.
        first_step: 0-based global step of its first update.
        end_step: the global step that no longer belongs to it.
        lr_first: learning rate of each group at its first update.
        lr_last: the same at its last.
        train_loss: mean over the batches of its last epoch, or what there was of it.
        metric: the monitored metric at its last validation, if there was one.
        seconds: time it took.
        state_bytes: bytes of the optimizer's state.
        decays: weight decay of each group that has one, at its first update.
        explanation: why it began, and what crossed the switch to it; empty for the first.
        seen: what the trigger of the next switch saw last.
        noise: gradient noise scale at its end, in samples, where a `GradientNoiseMonitor` measured it.
    """

    number: int
    optimizer: str
    schedule: str
    first_step: int
    end_step: int = 0
    lr_first: list[float] = field(default_factory=list)
    lr_last: list[float] = field(default_factory=list)
    train_loss: float | None = None
    metric: float | None = None
    seconds: float = 0.0
    state_bytes: int = 0
    decays: list[float] = field(default_factory=list)
    explanation: str = ""
    seen: dict[str, float] = field(default_factory=dict)
    noise: float | None = None


class RunReport(Callback):
    """Watches a run and keeps a `PhaseReport` for each phase, across a resume as well.

    Args:
        monitor: name of the validation metric to report.
    """

    def __init__(self, monitor: str | None = None) -> None:
        self.monitor = monitor
        self._closed: list[PhaseReport] = []
        self._open: PhaseReport | None = None
        self._since = 0.0
        self._lrs: list[Any] = []
        self._loss: Tensor | None = None
        self._batches = 0
        self._validated = False

    @property
    def phases(self) -> list[PhaseReport]:
        """The phases so far, the running one last."""
        return [*self._closed, *([self._measured(self._open)] if self._open else [])]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._open is None or self._open.number != _phase_number(trainer):
            self._begin(trainer)
        if batch_idx == 0:
            self._loss, self._batches = None, 0
        self._lrs = [group["lr"] for group in running_optimizer(trainer).param_groups if "lr" in group]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
            self._batches += 1
        assert self._open is not None
        is_first_step = self._open.end_step <= self._open.first_step < trainer.global_step
        self._open = replace(self._open, end_step=trainer.global_step)
        switch = find_switch(trainer)
        if is_first_step:
            optimizer = running_optimizer(trainer)
            decays = [float(group["weight_decay"]) for group in optimizer.param_groups if "weight_decay" in group]
            self._open = replace(
                self._open,
                lr_first=_floats(self._lrs),
                decays=decays,
                state_bytes=state_bytes(optimizer),
                explanation=switch.explanation if switch else "",
            )
        if switch is not None and (seen := switch.shows):
            self._open = replace(self._open, seen=seen)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated |= not trainer.sanity_checking
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        if value is not None and self._open is not None and not trainer.sanity_checking:
            self._open = replace(self._open, metric=float(value))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.callback_metrics
        if self._validated and self.monitor and self.monitor not in logged:
            raise ConfigError(
                f"{self.monitor!r} was not logged.{did_you_mean(self.monitor, logged)} Logged: {', '.join(logged)}.", "task.monitor"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer)

    def state_dict(self) -> dict[str, Any]:
        loss = None if self._loss is None else float(self._loss)
        return {"phases": [asdict(phase) for phase in self.phases], "loss": loss, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._closed = [PhaseReport(**phase) for phase in state_dict["phases"]]
        self._loss = None if state_dict["loss"] is None else torch.tensor(state_dict["loss"])
        self._batches = state_dict["batches"]

    def _begin(self, trainer: Trainer) -> None:
        self._close(trainer)
        number, switch = _phase_number(trainer), find_switch(trainer)
        self._since = time.monotonic()
        if self._closed and self._closed[-1].number == number:
            self._open = self._closed.pop()  # resumed within the phase
            return
        self._loss, self._batches = None, 0
        optimizer = running_optimizer(trainer)
        config = trainer.lr_scheduler_configs[0] if trainer.lr_scheduler_configs else None
        self._open = PhaseReport(
            number=number,
            optimizer=class_name(optimizer),
            schedule=describe_schedule(config.scheduler if config else None),
            first_step=switch.first_step if switch else 0,
        )
        self._lrs = lrs(optimizer)

    def _close(self, trainer: Trainer) -> None:
        if self._open is not None:
            monitor = find_monitor(trainer)
            noise = monitor.values().get("noise/scale") if monitor else None
            self._closed.append(replace(self._measured(self._open), noise=noise))
            self._open = None

    def _measured(self, phase: PhaseReport) -> PhaseReport:
        loss = phase.train_loss if self._loss is None else float(self._loss) / self._batches
        seconds = phase.seconds + time.monotonic() - self._since
        return replace(phase, train_loss=loss, seconds=seconds, lr_last=_floats(self._lrs) or phase.lr_last)


def table(phases: Sequence[PhaseReport], metric: str | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the closing table.

    Args:
        phases: what each phase did.
        metric: name of the monitored metric.
    """
    header = [column.format(metric=metric or "metric") for column in _COLUMNS]
    measured = any(phase.noise is not None for phase in phases)
    header += ["noise scale"] * measured
    rows = [
        [
            str(phase.number),
            phase.optimizer,
            phase.schedule,
            f"{phase.first_step}..{max(phase.end_step - 1, phase.first_step)}",
            format_lrs(phase.lr_first),
            format_lrs(phase.lr_last),
            _number(phase.train_loss),
            _number(phase.metric),
            f"{phase.seconds:.1f}",
            format_bytes(phase.state_bytes),
            *["-" if phase.noise is None else f"{phase.noise:.3g}"] * measured,
        ]
        for phase in phases
    ]
    return header, rows


def explanations(phases: Sequence[PhaseReport]) -> list[str]:
    """Why each phase began, and what the trigger after it saw last, a line each."""
    lines = []
    for phase in phases:
        if phase.explanation:
            lines.append(f"phase {phase.number}  because {phase.explanation}")
        if phase.seen:
            seen = ", ".join(f"{name} {value:.4g}" for name, value in phase.seen.items())
            lines.append(f"phase {phase.number}  the trigger last saw {seen}")
    return lines


def write_result(path: Path, phases: Sequence[PhaseReport], metrics: Mapping[str, float], **facts: Any) -> None:
    """Writes ``result.json``: metrics, phases, the versions it ran with, and further facts; numbers that are not finite as null.

    It is there whole or not at all, since a sweep takes it for the mark of a finished job.
    """
    result = {
        "metrics": dict(metrics),
        **facts,
        "phases": [asdict(phase) for phase in phases],
        "versions": {name: _version(name) for name in ("lightning-adaptive", "lightning", "torch", "hydra-core")},
        "python": platform.python_version(),
    }
    written = checkpoints.unfinished(path)
    written.write_text(json.dumps(_finite(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    checkpoints.publish(written, path)


def picture(metrics_csv: Path, phases: Sequence[PhaseReport], metric: str | None, path: Path) -> None:
    """Draws loss, metric and learning rate over the optimizer steps, with each switch marked.

    Args:
        metrics_csv: what Lightning's ``CSVLogger`` wrote.
        phases: the phases, for the marks.
        metric: name of the monitored metric.
        path: the PNG to write.
    """
    curves = read_curves(metrics_csv)
    shown = [
        ("loss", [name for name in curves if "loss" in name and not name.startswith("test")], "log"),
        (metric or "metric", [name for name in curves if name == metric], "linear"),
        ("learning rate", [name for name in curves if name == "lr" or name.startswith(("lr-", "lr/"))], "log"),
    ]
    if "noise/scale" in curves:
        shown.append(("gradient noise, samples", ["noise/scale", "noise/batch"], "log"))
    switches = [(after.first_step, before.optimizer, after.optimizer) for before, after in itertools.pairwise(phases)]
    with panels(path, [title for title, _, _ in shown], switches, height=2) as axes:
        for axis, (_, names, scale) in zip(axes, shown, strict=True):
            for name in names:
                steps, values = curves[name]
                label = name if len(names) <= 12 else None
                axis.plot(steps, values, label=label, marker="." if len(steps) < 60 else None, linewidth=1.2)
            positive = any(value > 0 for name in names for value in curves[name][1])
            axis.set_yscale(scale if positive else "linear")


def read_curves(metrics_csv: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each column that ``CSVLogger`` wrote; empty cells left out."""
    curves: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    with metrics_csv.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if cell and name not in ("step", "epoch"):
                    curves[name][0].append(int(row["step"]))
                    curves[name][1].append(float(cell))
    return dict(curves)


def _phase_number(trainer: Trainer) -> int:
    switch = find_switch(trainer)
    return switch.phase + 1 if switch else 1


def _floats(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a source tree
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
