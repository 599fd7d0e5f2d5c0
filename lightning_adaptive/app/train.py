"""``lightning-adaptive train``: composes a run, trains, tests, and leaves everything in one folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from hydra_plugins.lightning_adaptive import data_folder
from lightning_adaptive import checkpoints
from lightning_adaptive.app import checks, job, recipe, resume
from lightning_adaptive.app.assemble import assemble
from lightning_adaptive.app.interrupt import Signals
from lightning_adaptive.app.sweep import Sweep, claim, overseen
from lightning_adaptive.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from lightning_adaptive.report import PhaseReport


RESULT = "result.json"


def main() -> None:
    """One run, or the jobs of a sweep."""
    with overseen():
        _app()


@hydra.main(version_base="1.3", config_path=str(data_folder("conf")), config_name="train")
def _app(config: DictConfig) -> float | None:
    """The Hydra application; returns the monitored metric, for a sweeper that optimizes it."""
    return job.run("train", _train, config)


def _train(config: DictConfig, signals: Signals) -> float | None:
    checks.check(config)
    folder = Path(config.output_dir)
    resume.lock(folder)
    try:
        if Sweep.current is not None:
            claim(folder, config)
            if (folder / RESULT).is_file():
                print(f"DONE already: {folder}")
                return _metric(folder / RESULT, config.task.get("monitor"))
        return _train_in(folder, config, signals)
    finally:
        resume.unlock(folder)


def _metric(result: Path, monitor: str | None) -> float | None:
    """The monitored metric of a finished run, as it was returned then; infinities, which JSON does not know, as NaN."""
    metrics = json.loads(result.read_text(encoding="utf-8"))["metrics"]
    if monitor not in metrics:
        return None
    return math.nan if metrics[monitor] is None else float(metrics[monitor])


def _train_in(folder: Path, config: DictConfig, signals: Signals) -> float | None:
    checkpoint, broken = _checkpoint(config, folder)
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    from lightning_adaptive import strategies
    from lightning_adaptive.app.progress import progress
    from lightning_adaptive.app.show import ShowPlan
    from lightning_adaptive.app.stop import StopTogether
    from lightning_adaptive.report import RunReport

    monitor = config.task.get("monitor")
    report = RunReport(monitor)
    callbacks = [report, ShowPlan(OmegaConf.to_container(config), folder), StopTogether(signals, folder / "checkpoints")]
    if config.trainer.get("enable_progress_bar", True):
        callbacks.append(progress(monitor))
    trainer, model, data = assemble(config, folder, callbacks)
    if config.resume and checkpoint is not None and trainer.is_global_zero:
        step = int(checkpoints.read_metadata(checkpoint)["global_step"])
        resume.keep_curves(trainer.loggers, step)
        for line in (*broken, f"RESUMED from {checkpoint} (step {step})."):
            rank_zero_info(line)
    for line in recipe.lines(HydraConfig.get().runtime.choices, job.overrides()) if trainer.is_global_zero else ():
        rank_zero_info(line)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        # Before the test, which loads the best checkpoint and with it the report's state of that time.
        phases, metrics = report.phases, {name: float(value) for name, value in trainer.callback_metrics.items()}
        tested = _test(trainer, model, data) if config.test else {}
    except BaseException as error:
        strategies.end_processes(trainer)
        if isinstance(error, MisconfigurationException):  # Lightning's word for settings that do not go together
            raise ConfigError(str(error)) from error
        raise
    if trainer.is_global_zero:
        _close(trainer, config, phases, metrics, tested)
    return metrics.get(monitor) if monitor else None


def _test(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> dict[str, float]:
    """Tests the best checkpoint, or the model as it is when there is none; nothing for a task without tests."""
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from lightning_adaptive import strategies

    if not is_overridden("test_step", model) or not is_overridden("test_dataloader", data):
        return {}
    callback: Any = trainer.checkpoint_callback
    best = getattr(callback, "best_model_path", "") or None
    with strategies.placement(trainer).tested_as_fitted():
        [metrics] = trainer.test(model, datamodule=data, ckpt_path=best, verbose=False, weights_only=True)
    return dict(metrics)


def _close(
    trainer: Trainer, config: DictConfig, phases: Sequence[PhaseReport], metrics: dict[str, float], tested: dict[str, float]
) -> None:
    """Writes and shows what the run did."""
    from lightning_adaptive import report
    from lightning_adaptive.app.show import show_result
    from lightning_adaptive.tables import markdown

    folder, monitor = Path(config.output_dir), config.task.get("monitor")
    header, rows = report.table(phases, monitor)
    test = "  ".join(f"{name} {value:.4f}" for name, value in tested.items())
    lines = [*report.explanations(phases), *([f"test   {test}"] if test else [])]
    (folder / "summary.md").write_text("\n\n".join([markdown(header, rows), *lines, ""]), encoding="utf-8")
    curves = folder / "metrics.csv"
    if curves.is_file():
        report.picture(curves, phases, monitor, folder / "run.png")
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    report.write_result(
        folder / RESULT,
        phases,
        {**metrics, **tested},
        seed=config.seed,
        steps=trainer.global_step,
        best_checkpoint=os.path.relpath(best, folder) if best else None,
    )
    show_result(header, rows, lines, folder)


def _checkpoint(config: DictConfig, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, looked at before anything is built; and a line for each newer one that is broken.

    Raises:
        CheckpointError: when it is missing or not whole.
        ConfigError: when two are given.
    """
    if config.resume and config.ckpt_path:
        raise ConfigError("resume goes on in a run's folder, ckpt_path in a new one. Give one of the two.", "ckpt_path")
    if config.resume:
        return resume.newest_checkpoint(folder)
    if Sweep.current is not None and (left := resume.left_off(folder)):
        config.resume, config.ckpt_path = str(folder), None
        job.tell_processes([f"resume='{folder}'", "ckpt_path=null"])
        return left
    if config.ckpt_path is None:
        return None, []
    if config.ckpt_path == "":
        raise ConfigError("'' names no checkpoint. Write its path, or null.", "ckpt_path")
    path = Path(config.ckpt_path)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        checkpoints.check(path, f"ckpt_path={config.ckpt_path}")
    return path, []
