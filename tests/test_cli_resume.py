"""``resume=last|FOLDER`` as a user types it: after a kill the run goes on in its folder, and ends as if nothing had been."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_adaptive.app.resume import lock, unlock, with_settings
from lightning_adaptive.errors import CheckpointError, ConfigError
from tests.support import command
from tests.test_signals import PAIR, Command
from tests.test_sweeps import outcome

RUN = [
    "recipe=digits_adam_to_sgd",
    "trainer.max_epochs=5",
    "switch.at=2.5ep",
    "trainer.accumulate_grad_batches=2",
    "callbacks.last.every_n_train_steps=3",
    "logger.csv.flush_logs_every_n_steps=1",
    "seed=7",
]


def folder_of(place: Path) -> Path:
    [folder] = (place / "outputs").iterdir()
    return folder


def curves(folder: Path) -> list[dict[str, str]]:
    """The rows of the curves; the number of the phase is written down again when a run goes on."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{name: value for name, value in row.items() if value and name != "phase"} for row in csv.DictReader(file)]
    return [row for row in rows if row.keys() != {"step"}]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("uninterrupted")
    ended = command(["train", *RUN], place)
    assert ended.returncode == 0, ended.stderr
    return folder_of(place)


def test_a_killed_run_goes_on_in_its_folder_and_ends_as_if_it_had_not_been(uninterrupted: Path, tmp_path: Path) -> None:
    for epoch in (2, 4):  # before the switch and after it
        run = Command(tmp_path, RUN if epoch == 2 else ["resume=last"], {})
        run.wait_for(f"epoch {epoch}/")
        run.kill()
    ended = command(["train", "resume=last"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    folder = folder_of(tmp_path)
    assert re.search(rf"RESUMED from {folder}/checkpoints/\S+\.ckpt \(step \d+\)\.", ended.stderr)
    assert outcome(folder) == outcome(uninterrupted)
    assert curves(folder) == curves(uninterrupted)


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert command(["train", *RUN, *PAIR], whole).returncode == 0
    run = Command(killed, [*RUN, *PAIR], {})
    run.wait_for("epoch 3/")
    run.kill()
    ended = command(["train", f"resume={folder_of(killed)}"], killed)
    assert ended.returncode == 0, ended.stderr
    assert outcome(folder_of(killed)) == outcome(folder_of(whole))


@pytest.mark.slow
def test_a_broken_checkpoint_is_named_and_the_one_before_it_taken(uninterrupted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "run"
    shutil.copytree(uninterrupted, folder)
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-500])
    ended = command(["train", f"resume={folder}"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert re.search(rf"{last}: no checkpoint, or not a whole one \([\d,]+ bytes\)\.", ended.stderr)
    assert re.search(r"RESUMED from \S+/epoch\S+\.ckpt", ended.stderr)
    assert outcome(folder)["steps"] == outcome(uninterrupted)["steps"]


def test_a_folder_in_use_is_refused_and_free_again_after_a_kill(tmp_path: Path) -> None:
    run = Command(
        tmp_path, [*(words for words in RUN if not words.startswith("trainer.max_epochs=")), "trainer.max_epochs=200"], {}
    )
    run.wait_for("epoch 2/")
    before = (folder_of(tmp_path) / ".hydra" / "overrides.yaml").read_text()
    second = command(["train", "resume=last", "seed=8"], tmp_path)
    assert second.returncode == 3
    in_use = (
        rf"lightning-adaptive: \S+ is in use by process {run.process.pid} on \S+, since [\d :-]+\. Wait for its end, or end it\.\n"
    )
    assert re.fullmatch(in_use, second.stderr)
    assert (folder_of(tmp_path) / ".hydra" / "overrides.yaml").read_text() == before
    run.kill()
    ended = command(["train", "resume=last", "trainer.max_epochs=3", "--cfg", "job"], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "max_epochs: 3" in ended.stdout
    assert "seed: 7" in ended.stdout


def test_what_is_said_now_stands_over_what_was_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "overrides.yaml").write_text("- recipe=r\n- seed=1\n- +callbacks.x=2\n- resume=/old\n- ckpt_path=a.ckpt\n")
    try:
        given = with_settings(["seed=2", "resume=last", "~logger.csv"])
    finally:
        unlock(run)
    assert given == ["seed=2", "recipe=r", "+callbacks.x=2", f"resume='{run}'", f"hydra.run.dir='{run}'", "~logger.csv"]
    assert with_settings(given) == given  # as the other processes of the run see it
    for plain in (["seed=2"], ["resume=null"]):
        assert with_settings(plain) == plain


def test_where_no_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^resume=last: there is no run in \S+outputs\.$"):
        with_settings(["resume=last"])
    with pytest.raises(CheckpointError, match=r"^resume=nowhere: there is no such folder, so no run goes on there\.$"):
        with_settings(["resume=nowhere"])
    (tmp_path / "outputs" / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "outputs" / "run" / ".hydra" / "overrides.yaml").write_text("[]")
    message = r"^resume=outputs: it has no \.hydra/overrides\.yaml, so no run goes on there\. The newest run: resume=outputs/run$"
    with pytest.raises(CheckpointError, match=message):
        with_settings(["resume=outputs"])
    with pytest.raises(ConfigError, match=r"^resume: a sweep has many folders, and one run goes on in its own\. Leave -m out\.$"):
        with_settings(["-m", "resume=last"])
    assert command(["train", "resume=outputs/run"], tmp_path).returncode == 3


def is_free(folder: Path) -> bool:
    """Whether another process could take the folder."""
    code = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    ended = subprocess.run([sys.executable, "-c", code, folder / ".lock"], stderr=subprocess.DEVNULL, timeout=30, check=False)
    return ended.returncode == 0


def test_a_lock_is_taken_once_by_a_process(tmp_path: Path) -> None:
    lock(tmp_path)
    lock(tmp_path)
    assert not is_free(tmp_path)
    unlock(tmp_path)
    assert is_free(tmp_path)
    unlock(tmp_path)
