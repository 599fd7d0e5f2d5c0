"""Sweeps as their users meet them: a study goes on where it ended, past what failed, in whatever processes its jobs run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from lightning_adaptive.app import job
from lightning_adaptive.tasks.digits import DigitsNet
from tests.cli import SCRIPT, SHORT, Run, result
from tests.support import command, digest_of
from tests.test_signals import Command, _running

TWO_EPOCHS = ("trainer.max_epochs=2", *SHORT[1:], "+trainer.limit_val_batches=1", "switch.at=1ep")
"""Eight steps, with a checkpoint after four."""

NO_UNIT = "switch.at: 5 has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training)."


def jobs(folder: Path, study: str = "s1") -> dict[str, Path]:
    """The folders of a study's jobs, by what their names begin with."""
    found = sorted(path for path in (folder / "studies" / study).iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path.name.split("_")[0]: path for path in found}


def weights(folder: Path) -> str:
    return digest_of(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])


def outcome(folder: Path) -> dict[str, Any]:
    """What a job ended with, without what depends on the clock."""
    found = result(folder)
    for phase in found["phases"]:
        del phase["seconds"]
    return found


def told(err: str) -> list[str]:
    """The lines on stderr that are ours, without those of a traceback and of Lightning."""
    return [line for line in err.splitlines() if line.startswith(("FAILED", "lightning-adaptive:", "  seed", "  and", "The sweep"))]


@pytest.fixture
def power_cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Training ends with an exception at step 6, until it is called."""
    step = DigitsNet.training_step

    def training_step(self: DigitsNet, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 6:
            raise RuntimeError("power cut")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(DigitsNet, "training_step", training_step)
        yield patch.undo


# A study goes on


def test_a_study_does_not_repeat_what_is_done(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics: list[float | None] = []
    run = job.run
    monkeypatch.setattr(job, "run", lambda *arguments: metrics.append(run(*arguments)) or metrics[-1])
    ended = train("-m", "study=s1", "seed=1,2", "switch.at=2st", *SHORT)
    assert ended.code == 0, ended.err
    assert not (tmp_path / "studies" / "s1" / ".sweep").exists()
    first = jobs(tmp_path)
    assert list(first) == ["seed-1", "seed-2"]
    before = {path: path.stat().st_mtime_ns for path in first.values() for path in (path / "result.json", path / "metrics.csv")}
    # In another order, with a default spelled out, and with one more.
    ended = train("-m", *SHORT, "optimizer=adam", "switch.at=2st", "seed=1,2,3", "study=s1")
    assert ended.code == 0, ended.err
    done = [line for line in ended.out.splitlines() if line.startswith("DONE")]
    assert done == [f"DONE already: {folder}" for folder in first.values()]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(jobs(tmp_path)) == 3
    assert metrics[2:4] == metrics[:2] == [result(folder)["metrics"]["val/acc"] for folder in first.values()]
    assert [path.name for path in (tmp_path / "studies" / "s1").iterdir() if path.name.startswith(".")] == []


def test_another_config_is_another_folder(train: Run, tmp_path: Path) -> None:
    """Also when the same was typed."""
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.parent.mkdir()
    for lr in (0.25, 0.5):
        recipe.write_text(f"# @package _global_\ndefaults:\n  - override /switch: none\noptimizer:\n  lr: {lr}\n")
        assert train("-m", "study=s1", "recipe=mine", *SHORT).code == 0
    folders = sorted((tmp_path / "studies" / "s1").glob("recipe-mine_*"))
    assert len({path.name[:-8] for path in folders}) == 1
    assert {result(folder)["phases"][0]["lr_first"][0] for folder in folders} == {0.25, 0.5}


def test_a_folder_of_another_config_is_left_alone(train: Run, tmp_path: Path) -> None:
    """Hydra's own way to name the folders of jobs is to number them."""
    numbered = ("-m", "study=s1", "hydra.sweep.subdir='${hydra.job.num}'", *SHORT)
    assert train(*numbered, "seed=1").code == 0
    ended = train(*numbered, "seed=2")
    folder = tmp_path / "studies" / "s1" / "0"
    fault = "this folder holds a run of another config. Name another study, or leave hydra.sweep.subdir out."
    assert ended.err == (
        f"FAILED in {folder}: {fault}\nlightning-adaptive: 1 of 1 jobs failed in {folder.parent}:\n  0: {fault}\n"
    )
    assert ended.code == 3
    assert result(folder)["seed"] == 1
    assert train(*numbered, "seed=1").out.splitlines()[-1] == f"DONE already: {folder}"


def test_an_interrupted_job_goes_on_from_its_checkpoint(power_cut: Callable[[], None], train: Run, tmp_path: Path) -> None:
    assert train("-m", "study=s1", "seed=1", *TWO_EPOCHS).code == 1
    [folder] = jobs(tmp_path).values()
    assert not (folder / "result.json").exists()
    power_cut()
    ended = train("-m", "study=s1", "seed=1", *TWO_EPOCHS)
    assert ended.code == 0, ended.err
    assert "<- resumed at step 4\n" in ended.out
    assert train("-m", "study=whole", "seed=1", *TWO_EPOCHS).code == 0
    [whole] = jobs(tmp_path, "whole").values()
    assert outcome(folder) == outcome(whole)
    assert weights(folder) == weights(whole)


def test_a_job_without_a_whole_checkpoint_begins_anew(power_cut: Callable[[], None], train: Run, tmp_path: Path) -> None:
    assert train("-m", "study=s1", "seed=1", *TWO_EPOCHS).code == 1
    [folder] = jobs(tmp_path).values()
    saved = sorted((folder / "checkpoints").iterdir())
    for path in saved:
        path.write_bytes(b"")
    power_cut()
    ended = train("-m", "study=s1", "seed=1", *TWO_EPOCHS)
    assert ended.code == 0, ended.err
    *broken, anew = ended.err.splitlines()
    assert sorted(broken) == [f"{path}: the file is empty." for path in saved]
    assert anew == f"{folder}: no checkpoint is whole, so the run starts anew."
    assert result(folder)["steps"] == 8
    assert "resumed" not in ended.out


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the job keeps its checkpoints in its own folder
def test_a_job_that_goes_on_leaves_the_checkpoint_that_it_began_with(
    power_cut: Callable[[], None], train: Run, tmp_path: Path
) -> None:
    assert train("-m", "study=first", "seed=1", *TWO_EPOCHS).code == 1
    [first] = jobs(tmp_path, "first").values()
    sweep = ("-m", "study=s1", "seed=1", f"ckpt_path={first}/checkpoints/last.ckpt", *TWO_EPOCHS, EVERY_STEP)
    ended = train(*sweep)
    assert ended.code == 1
    assert "<- resumed at step 4\n" in ended.out
    power_cut()
    ended = train(*sweep)
    assert ended.code == 0, ended.err
    assert "<- resumed at step 6\n" in ended.out


def test_a_job_inherits_no_seed_from_the_one_before(train: Run, tmp_path: Path) -> None:
    assert train("-m", "study=s1", "seed=5,null", *SHORT).code == 0
    folders = jobs(tmp_path)
    assert weights(folders["seed-5"]) != weights(folders["seed-null"])


# Jobs that fail


def test_a_failed_job_does_not_end_the_sweep(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DigitsNet.training_step

    def training_step(self: DigitsNet, batch: Any, batch_idx: int) -> Any:
        if os.environ["PL_GLOBAL_SEED"] == "1":
            raise ValueError("of mine\nand more of it")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DigitsNet, "training_step", training_step)
    # In batches, since Hydra's own sweeper ends after the first one with an exception.
    ended = train("-m", "study=s1", "seed=1,2", "switch.at=5,2st", *SHORT, "hydra.sweeper.max_batch_size=1")
    study = tmp_path / "studies" / "s1"
    names = [
        next(path.name for path in study.glob(f"{start}_*"))
        for start in ("seed-1_switch.at-5", "seed-1_switch.at-2st", "seed-2_switch.at-5", "seed-2_switch.at-2st")
    ]
    before, traceback, after = re.fullmatch(r"(.*?)(Traceback .*?and more of it\n)(.*)", ended.err, re.DOTALL).groups()  # type: ignore[union-attr]
    assert before == f"FAILED in {study}/{names[0]}: {NO_UNIT}\n"
    assert "hydra" not in traceback
    assert after == (
        f"FAILED in {study}/{names[1]}: ValueError: of mine\n"
        f"FAILED in {study}/{names[2]}: {NO_UNIT}\n"
        f"lightning-adaptive: 3 of 4 jobs failed in {study}:\n"
        f"  {names[0]}: {NO_UNIT}\n"
        f"  {names[1]}: ValueError: of mine\n"
        f"  {names[2]}: {NO_UNIT}\n"
    )
    assert ended.code == 1  # not all are mistakes
    assert [(study / name / "result.json").is_file() for name in names] == [False, False, False, True]
    assert [path.name for path in study.iterdir() if path.name.startswith(".")] == []
    # Those that failed are run again.
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    ended = train("-m", "study=s1", "seed=1,2", "switch.at=2st", *SHORT)
    assert ended.code == 0, ended.err
    assert [line for line in ended.out.splitlines() if line.startswith("DONE")] == [f"DONE already: {study}/{names[3]}"]
    assert (study / names[1] / "result.json").is_file()


def test_many_failures_of_one_kind_are_told_briefly(train: Run, tmp_path: Path) -> None:
    ended = train("-m", "study=s1", "seed=range(25)", "switch.at=5")
    study = tmp_path / "studies" / "s1"
    summary = ended.err.splitlines()[25:]
    assert summary[0] == f"lightning-adaptive: 25 of 25 jobs failed in {study}:"
    assert all(re.fullmatch(rf"  seed-{number}_switch\.at-5_[0-9a-f]{{8}}: {re.escape(NO_UNIT)}", summary[1 + number]) for number in range(18))
    assert summary[19:] == ["  and 7 more"]
    assert ended.code == 2


def test_checkpoints_that_do_not_fit_keep_their_code(train: Run, tmp_path: Path) -> None:
    ended = train("-m", "study=s1", "seed=1,2", "ckpt_path=a.ckpt")
    assert ended.err.count("ckpt_path=a.ckpt: there is no such file.\n") == 4
    assert ended.code == 3


def test_what_ended_a_sweep_early_is_told_too(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweeper that optimizes may give up for want of a metric."""
    sweep = BasicSweeper.sweep

    def give_up(self: BasicSweeper, arguments: list[str]) -> None:
        [[ended]] = sweep(self, arguments)
        assert ended.return_value is None
        raise ValueError("no float")

    monkeypatch.setattr(BasicSweeper, "sweep", give_up)
    ended = train("-m", "study=s1", "switch.at=5")
    assert ended.err.splitlines()[-1] == "The sweep ended early: ValueError: no float"
    assert ended.code == 1


# What is asked for


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".hidden", "a/b", "/tmp/x", "a b", "null", "''", "'a\\b'", "x" * 129, "ü", "../x,y", "'a\n'"]
)
def test_a_study_lies_in_its_place(name: str, train: Run, tmp_path: Path) -> None:
    ...
    

def test_names_of_studies(train: Run, tmp_path: Path) -> None:
    ended = train("-m", "study='a-b_c.d=1,2'", "switch.at=5")
    assert ended.code == 2
    assert os.listdir(tmp_path / "studies") == ["a-b_c.d=1,2"]


def test_an_unknown_launcher_names_the_nearest(train: Run, tmp_path: Path) -> None:
    ended = train("-m", "hydra/launcher=joblibb", "seed=1,2")
    assert ended.err == (
        "lightning-adaptive: hydra/launcher=joblibb: hydra/launcher has no 'joblibb'. Did you mean 'joblib'? "
        "Choices: basic, joblib, submitit_local, submitit_slurm.\n"
    )
    assert ended.code == 2
    assert os.listdir(tmp_path) == []


def test_runs_that_start_together_get_folders_of_their_own(tmp_path: Path) -> None:
    # The mistake keeps them short; the folder comes before it.
    arguments = [sys.executable, "-m", "lightning_adaptive", "train", "switch.at=5"]
    started = [subprocess.Popen(arguments, cwd=tmp_path, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(60) for process in started] == [2, 2]
    assert len(os.listdir(tmp_path / "outputs")) == 2


# Processes

MISTAKES_TOO = ("recipe=digits_adam_to_sgd", "seed=1,2", "switch.at=1ep,5", *TWO_EPOCHS[:-1])
PAIR = ("seed=1,2", "switch.at=1ep,2ep", "trainer=ddp_cpu", "trainer.devices=2", *TWO_EPOCHS[:-1], "trainer.max_epochs=3")
LAUNCHERS = {
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit": ("hydra/launcher=submitit_local",),
}
