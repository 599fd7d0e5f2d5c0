"""Sweeps as their users meet them: a study goes on where it ended, past what failed, in whatever processes its jobs run."""

from __future__ import annotations

import os
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from omegaconf import OmegaConf

from lightning_adaptive.app import job
from lightning_adaptive.app.sweep import Sweep, overseen, run_key, study_name
from lightning_adaptive.errors import ConfigError, UserError
from lightning_adaptive.tasks.digits import DigitsNet
from tests.cli import SCRIPT, SHORT, Run, result
from tests.support import command, digest_of
from tests.test_signals import PAIR, Command

TWO_EPOCHS = ("trainer.max_epochs=2", *SHORT[1:], "+trainer.limit_val_batches=1", "switch.at=1ep")
"""Eight steps, with a checkpoint after four."""

EVERY_STEP = "callbacks.last.every_n_train_steps=1"

NO_UNIT = "switch.at: 5 has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training)."


def jobs_of(folder: Path, study: str = "s1") -> list[Path]:
    """The folders of a study's jobs, by name."""
    return sorted(path for path in (folder / "studies" / study).iterdir() if path.is_dir() and not path.name.startswith("."))


def weights(folder: Path) -> str:
    return digest_of(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])


def outcome(folder: Path) -> dict[str, Any]:
    """What a job ended with, without what depends on the clock."""
    found = result(folder)
    for phase in found["phases"]:
        del phase["seconds"]
    return found


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
    first = jobs_of(tmp_path)
    assert [path.name.split("_")[0] for path in first] == ["seed-1", "seed-2"]
    before = {path: path.stat().st_mtime_ns for folder in first for path in (folder / "result.json", folder / "metrics.csv")}
    # In another order, with a default spelled out, and with one more.
    ended = train("-m", *SHORT, "optimizer=adam", "switch.at=2st", "seed=1,2,3", "study=s1")
    assert ended.code == 0, ended.err
    done = [line for line in ended.out.splitlines() if line.startswith("DONE")]
    assert done == [f"DONE already: {folder}" for folder in first]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(jobs_of(tmp_path)) == 3
    assert metrics[2:4] == metrics[:2] == [result(folder)["metrics"]["val/acc"] for folder in first]
    assert [path.name for path in (tmp_path / "studies" / "s1").iterdir() if path.name.startswith(".")] == []


def test_another_config_is_another_folder(tmp_path: Path) -> None:
    """Also when the same was typed, and a recipe changed meanwhile. The same config keeps its folder, whatever was typed."""
    places = {"study": "s1", "output_dir": "x", "resume": None, "hydra": {"sweep": {"dir": str(tmp_path)}}}
    names = []
    for lr, typed in ((0.1, ["seed=1", "study=s1"]), (0.2, ["seed=1"]), (0.2, ["lr=0.2", "seed=1"])):
        config = OmegaConf.create({"lr": lr, **places, "output_dir": f"{lr} {typed}", "study": len(typed)})
        names.append(run_key(OmegaConf.create(typed), _root_=config))
        (tmp_path / names[-1]).mkdir(exist_ok=True)
    assert all(re.fullmatch(r"seed-1_[0-9a-f]{8}", name) for name in names)
    assert names[0] != names[1] == names[2]


@pytest.mark.parametrize("count", [0, 1, 60])
def test_names_of_folders_are_short_and_plain(count: int, tmp_path: Path) -> None:
    typed = OmegaConf.create([f"+a.b{number}='[x: ${{y}}/ü]'" for number in range(count)])
    name = run_key(typed, _root_=OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert re.fullmatch(r"([\w.+-]{1,48}_)?[0-9a-f]{8}", name)


def test_a_folder_of_another_config_is_left_alone(train: Run, tmp_path: Path) -> None:
    """Hydra's own way to name the folders of jobs is to number them."""
    numbered = ("-m", "study=s1", "hydra.sweep.subdir='${hydra.job.num}'", "optimizer.lr=-1")
    assert train(*numbered, "seed=1").code == 2
    ended = train(*numbered, "seed=2")
    folder = tmp_path / "studies" / "s1" / "0"
    fault = "this folder holds a run of another config. Name another study, or leave hydra.sweep.subdir out."
    assert ended.err == (f"FAILED in {folder}: {fault}\nlightning-adaptive: 1 of 1 jobs failed in {folder.parent}:\n  0: {fault}\n")
    assert ended.code == 3
    assert train(*numbered, "seed=1").code == 2


def test_an_interrupted_job_goes_on_from_its_checkpoint(power_cut: Callable[[], None], train: Run, tmp_path: Path) -> None:
    assert train("-m", "study=s1", "seed=1", *TWO_EPOCHS).code == 1
    [folder] = jobs_of(tmp_path)
    assert not (folder / "result.json").exists()
    power_cut()
    ended = train("-m", "study=s1", "seed=1", *TWO_EPOCHS)
    assert ended.code == 0, ended.err
    assert "<- resumed at step 4\n" in ended.out
    assert train("-m", "study=whole", "seed=1", *TWO_EPOCHS).code == 0
    [whole] = jobs_of(tmp_path, "whole")
    assert outcome(folder) == outcome(whole)
    assert weights(folder) == weights(whole)


def test_a_job_without_a_whole_checkpoint_begins_anew(power_cut: Callable[[], None], train: Run, tmp_path: Path) -> None:
    assert train("-m", "study=s1", "seed=1", *TWO_EPOCHS).code == 1
    [folder] = jobs_of(tmp_path)
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
    assert train("-m", "study=first", "seed=1", *TWO_EPOCHS, EVERY_STEP).code == 1
    [first] = jobs_of(tmp_path, "first")
    given = f"ckpt_path={first}/checkpoints/epoch000-step000004.ckpt"
    ended = train("-m", "study=s1", "seed=1", given, *TWO_EPOCHS, EVERY_STEP)
    assert ended.code == 1
    assert "<- resumed at step 4\n" in ended.out
    power_cut()
    ended = train("-m", "study=s1", "seed=1", given, *TWO_EPOCHS, EVERY_STEP)
    assert ended.code == 0, ended.err
    assert "<- resumed at step 6\n" in ended.out


def test_a_job_inherits_no_seed_from_the_one_before(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning takes it from the environment where none is given."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    found = []
    seed_everything = lightning.pytorch.seed_everything

    def recorded(seed: int | None, **options: Any) -> int:
        found.append(os.environ.get("PL_GLOBAL_SEED"))
        return seed_everything(seed, **options)

    monkeypatch.setattr(lightning.pytorch, "seed_everything", recorded)
    assert train("-m", "study=s1", "seed=5,null", "optimizer.lr=-1").code == 2
    assert found == [None, None]


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


def test_checkpoints_that_do_not_fit_keep_their_code(train: Run, tmp_path: Path) -> None:
    ended = train("-m", "study=s1", "seed=1,2", "ckpt_path=a.ckpt")
    assert ended.err.count("ckpt_path=a.ckpt: there is no such file.\n") == 4
    assert ended.code == 3


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    """A sweep that Hydra has begun in this process, until the test is over."""
    monkeypatch.setattr(Sweep, "current", None)
    sweep = Sweep()
    sweep.on_multirun_start(OmegaConf.create({"study": "s1", "hydra": {"runtime": {"cwd": str(tmp_path)}, "sweep": {"dir": "s1"}}}))
    return sweep


def run_job(sweep: Sweep, folder: Path, number: int, cause: str, exit_code: int) -> None:
    """As Hydra has it where the job runs."""
    there = pickle.loads(pickle.dumps(sweep))
    there.on_job_start(OmegaConf.create({"hydra": {"runtime": {"output_dir": str(folder)}, "job": {"num": number}}}))
    if cause:
        there.failed(cause, exit_code)


def test_many_failures_are_told_briefly(begun: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(30):
        run_job(begun, tmp_path / "s1" / f"job-{number}", number, "ValueError: x\nand more" if number % 6 else "", 1)
    assert capsys.readouterr().err.startswith(f"FAILED in {tmp_path}/s1/job-1: ValueError: x\nand more\nFAILED in ")
    error = begun.error(None)
    assert error is not None
    lines = str(error).splitlines()
    assert lines[0] == f"25 of 30 jobs failed in {tmp_path}/s1:"
    assert lines[1:19] == [f"  job-{number}: ValueError: x" for number in range(22) if number % 6]
    assert lines[19:] == ["  and 7 more"]
    begun.forget()
    assert os.listdir(tmp_path / "s1") == []


@pytest.mark.parametrize(("codes", "code"), [([2, 2], 2), ([3, 3], 3), ([1, 1], 1), ([2, 3], 1), ([1, 2], 1)], ids=str)
def test_a_sweep_ends_with_the_code_of_its_failures(codes: list[int], code: int, begun: Sweep, tmp_path: Path) -> None:
    run_job(begun, tmp_path, 0, "", 0)
    assert begun.error(None) is None
    for number, each in enumerate(codes, start=1):
        run_job(begun, tmp_path, number, "x", each)
    error = begun.error(None)
    assert error is not None
    assert error.exit_code == code


def test_what_ended_a_sweep_early_is_told_too(begun: Sweep, tmp_path: Path) -> None:
    """A sweeper that optimizes may give up for want of a metric."""

    def give_up() -> None:
        Sweep.current = begun
        run_job(begun, tmp_path / "s1" / "job", 0, "x", 2)
        raise ValueError("no float")

    with pytest.raises(UserError) as caught, overseen():
        give_up()
    assert str(caught.value) == f"1 of 1 jobs failed in {tmp_path}/s1:\n  job: x\nThe sweep ended early: ValueError: no float"
    assert caught.value.exit_code == 1


def test_a_signal_between_jobs_ends_the_sweep(begun: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    """Or while they run in other processes."""

    def receive(sweep: Sweep | None, signum: signal.Signals) -> None:
        Sweep.current = sweep
        signal.raise_signal(signum)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=r"^143$"), overseen():
        receive(begun, signal.SIGTERM)
    assert capsys.readouterr().err == "The sweep has ended; the same command with study=s1 goes on with it.\n"
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(SystemExit, match=r"^130$"), overseen():
        receive(None, signal.SIGINT)
    assert capsys.readouterr().err == "ended by SIGINT; nothing was saved\n"


# Names


NO_STUDY = "study: {!r} cannot name a study. Write up to 128 letters, digits and . _ = , - with no dot at the beginning."


@pytest.mark.parametrize("name", ["..", "../x", ".x", "a/b", "/x", "a b", None, "", "a\\b", "x" * 129, "ä", ["a"], "a\n", "$x"])
def test_a_study_lies_in_its_place(name: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(NO_STUDY.format(name))}$"):
        study_name(name)


def test_a_study_elsewhere_gets_one_line(train: Run, tmp_path: Path) -> None:
    before = set(tmp_path.parent.iterdir())
    for launcher in ("basic", "joblib", "submitit_local"):
        ended = train("-m", "study=../../x", "seed=1", f"hydra/launcher={launcher}")
        assert ended.err == f"lightning-adaptive: {NO_STUDY.format('../../x')}\n"
        assert ended.code == 2
    assert os.listdir(tmp_path) == []
    # A sweep over studies.
    ended = train("-m", "study=a,../../x", "switch.at=5")
    assert ended.err.splitlines()[-1] == f"lightning-adaptive: {NO_STUDY.format('../../x')}"
    assert ended.code == 2
    assert set(tmp_path.parent.iterdir()) == before


def test_what_a_study_may_be_called(train: Run, tmp_path: Path) -> None:
    assert train("-m", "study='A-b_c.d=1,2'", "switch.at=5").code == 2
    assert os.listdir(tmp_path / "studies") == ["A-b_c.d=1,2"]


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

LAUNCHERS = {
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "submitit": ("hydra/launcher=submitit_local",),
}
TASK = """
module:
  _target_: lightning_adaptive.tasks.digits.DigitsNet
data:
  _target_: lightning_adaptive.tasks.digits.DigitsData
monitor: val/acc
mode: max
"""
GRID = [(seed, at) for seed in (1, 2) for at in ("1ep", "2ep")]
THREE_EPOCHS = ("-cd", "./conf", "task=mine", *PAIR, "trainer.max_epochs=3", *TWO_EPOCHS[1:-1])


def own_conf(folder: Path) -> Path:
    """A folder with a task of its own in ``./conf``, which every process must find."""
    (folder / "conf" / "task").mkdir(parents=True)
    (folder / "conf" / "task" / "mine.yaml").write_text(TASK)
    return folder


def of_grid(folder: Path) -> dict[tuple[int, str], Path]:
    """The jobs of a sweep over `GRID`, by what their folders' configs hold."""
    found = {}
    for path in jobs_of(folder):
        overrides = (path / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")
        [cell] = [(seed, at) for seed, at in GRID if f"- seed={seed}\n" in overrides and f"- switch.at={at}\n" in overrides]
        found[cell] = path
    return found


@pytest.fixture(scope="module")
def single_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], str]:
    """The weights of four runs of two processes, each by itself."""
    found = {}
    for seed, at in GRID:
        folder = own_conf(tmp_path_factory.mktemp("single"))
        ended = command(["train", f"seed={seed}", f"switch.at={at}", *THREE_EPOCHS], folder)
        assert ended.returncode == 0, ended.stderr
        [run] = (folder / "outputs").iterdir()
        found[seed, at] = weights(run)
    assert len(set(found.values())) == len(GRID)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["script", "module", *LAUNCHERS])
def test_jobs_of_two_processes_are_those_of_single_runs(way: str, single_runs: dict[tuple[int, str], str], tmp_path: Path) -> None:
    own_conf(tmp_path)
    program = [str(SCRIPT)] if way == "script" else [sys.executable, "-m", "lightning_adaptive"]
    ended = subprocess.run(
        [*program, "train", "-m", "study=s1", "seed=1,2", "switch.at=1ep,2ep", *THREE_EPOCHS, *LAUNCHERS.get(way, ())],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert {cell: weights(folder) for cell, folder in of_grid(tmp_path).items()} == single_runs
    for (seed, at), folder in of_grid(tmp_path).items():
        assert result(folder)["seed"] == seed
        assert [phase["first_step"] for phase in result(folder)["phases"]] == [0, 4 * int(at[0])]
        assert (folder / "train_ddp_process_1.log").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers(launcher: str, tmp_path: Path) -> None:
    """Without a name for the study, which all processes must call the same."""
    sweep = ("train", "-m", "recipe=digits_adam_to_sgd", "seed=1,2", "switch.at=1ep,5", *TWO_EPOCHS[:-1], *LAUNCHERS[launcher])
    ended = command(sweep, tmp_path, timeout=240)
    [study] = (tmp_path / "studies").iterdir()
    folders = {path.name: path for path in jobs_of(tmp_path, study.name)}
    wrong = sorted(name for name in folders if "switch.at-5" in name)
    assert len(folders) == 4
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-3:] == [
        f"lightning-adaptive: 2 of 4 jobs failed in {study}:",
        *(f"  {name}: {NO_UNIT}" for name in wrong),
    ]
    assert "Traceback" not in ended.stderr
    assert sorted(name for name, path in folders.items() if not (path / "result.json").exists()) == wrong
    before = {path: path.read_bytes() for path in study.rglob("*/result.json")}
    assert {result(path.parent)["seed"] for path in before} == {1, 2}
    again = command([*sweep, f"study={study.name}"], tmp_path, timeout=240)
    assert again.returncode == 2
    assert {path: path.read_bytes() for path in study.rglob("*/result.json")} == before
    assert len(jobs_of(tmp_path, study.name)) == 4


LONG = ("recipe=digits_adam_to_sgd", "switch.at=2.5ep", "logger.csv.flush_logs_every_n_steps=1")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [(), PAIR], ids=["one process", "two processes"])
def test_a_study_that_was_killed_goes_on(processes: tuple[str, ...], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    sweep = ["-m", "study=s1", "seed=7,8", *LONG, "trainer.max_epochs=4", "callbacks.last.every_n_train_steps=10", *processes]
    assert command(["train", *sweep], whole, timeout=240).returncode == 0
    run = Command(killed, sweep, {})
    try:
        run.wait_for(r"(?s)epoch 4/4.*epoch 3/4")
    finally:
        run.kill()
    done, begun = jobs_of(killed)
    assert ((done / "result.json").is_file(), (begun / "result.json").is_file()) == (True, False)
    ended = command(["train", *sweep], killed, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert f"DONE already: {done}\n" in ended.stdout
    assert re.search(rf"RESUMED from {begun}/checkpoints/\S+\.ckpt \(step \d+\)\.", ended.stderr)
    assert [outcome(folder) for folder in jobs_of(killed)] == [outcome(folder) for folder in jobs_of(whole)]
    assert [weights(folder) for folder in jobs_of(killed)] == [weights(folder) for folder in jobs_of(whole)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "signum"),
    [((), signal.SIGTERM), ((), signal.SIGINT), (LAUNCHERS["joblib"], signal.SIGTERM)],
    ids=["SIGTERM", "SIGINT", "SIGTERM beside joblib's workers"],
)
def test_a_signal_ends_the_sweep_with_all_its_processes(launcher: tuple[str, ...], signum: signal.Signals, tmp_path: Path) -> None:
    run = Command(tmp_path, ["-m", "study=s1", "seed=1,2,3", *LONG, "trainer.max_epochs=1000", *launcher], {})
    try:
        run.wait_for("epoch 3/")
        run.send("rank 0", signum)
        assert run.end() == 128 + signum
    finally:
        run.kill()
    assert run.text.splitlines()[-1] == "The sweep has ended; the same command with study=s1 goes on with it."
    assert "Traceback" not in run.text
    assert len(jobs_of(tmp_path)) == (2 if launcher else 1)


@pytest.mark.slow
def test_a_job_that_lost_a_process_fails_alone(tmp_path: Path) -> None:
    run = Command(tmp_path, ["-m", "study=s1", "seed=1,2", *LONG, *PAIR, "trainer.max_epochs=40"], {})
    try:
        run.wait_for("epoch 3/")
        killed = run._rank_1()
        os.kill(killed, signal.SIGKILL)
        assert run.end(180) == 1
    finally:
        run.kill()
    first, second = jobs_of(tmp_path)
    study = tmp_path / "studies" / "s1"
    assert f"FAILED in {first}: rank 1 (process {killed}) was killed by SIGKILL\n" in run.text
    assert run.text.endswith(
        f"lightning-adaptive: 1 of 2 jobs failed in {study}:\n  {first.name}: rank 1 (process {killed}) was killed by SIGKILL\n"
    )
    assert result(second)["steps"] == 40 * 17
