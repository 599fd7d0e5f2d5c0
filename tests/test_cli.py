"""The command line as a user meets it: what a run leaves. Most runs happen in this process, a few in processes of their own."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from lightning_adaptive.app import job
from lightning_adaptive.trust import TRUST_VARIABLE
from tests.cli import SCRIPT, SHORT, Run, digests, result, runs
from tests.support import command


@dataclass
class Finished:
    """One finished run, which several tests look at."""

    out: str
    folder: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    arguments = "optimizer=adamw optimizer.lr=3e-3 scheduler=cosine scheduler.warmup=10% switch=none trainer.max_epochs=1"
    ended = command(["train", *arguments.split()], folder)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    [run] = runs(folder)
    return Finished(ended.stdout, run)


def test_a_run_tells_its_plan_its_config_and_its_end(finished: Finished) -> None:
    assert "PLAN  34 optimizer steps  <- 34 steps an epoch (34 batches, accumulate 1, 1 process), max_epochs 1\n" in finished.out
    # 10 % of 34 steps are 3; the last of 31 steps of the cosine is at cos(pi * 30 / 31).
    phase = "phase 1  AdamW      steps 0..33  cosine, warmup 10%  lr 1.0e-03 -> 3.0e-03 (step 2) -> 7.7e-06  9,978 parameters"
    assert phase in finished.out
    assert "lr: 0.003" in finished.out
    assert "epoch 1/1  step 34  phase 1/1 AdamW" in finished.out
    assert "test   test/acc 0." in finished.out
    assert finished.out.rstrip().endswith(
        f"saved  {finished.folder}: checkpoints/  metrics.csv  plan.txt  result.json  run.png  summary.md  train.log"
    )


def test_a_run_folder_holds_everything(finished: Finished) -> None:
    folder = finished.folder
    composed = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
    assert composed["optimizer"]["_target_"] == "torch.optim.AdamW"
    assert composed["optimizer"]["lr"] == 3e-3
    assert composed["switch"]["enabled"] is False
    assert (folder / "plan.txt").read_text(encoding="utf-8").splitlines()[0] in finished.out
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"step", "epoch", "train/loss", "val/acc", "val/loss", "lr"} <= set(rows[0])
    rates = {int(row["step"]): float(row["lr"]) for row in rows if row["lr"]}
    assert rates, "the learning rate is logged"
    assert (folder / "summary.md").read_text(encoding="utf-8").startswith("| phase | optimizer |")
    picture = (folder / "run.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000


def test_a_runs_result_can_be_read_by_a_program(finished: Finished) -> None:
    told = result(finished.folder)
    [phase] = told["phases"]
    assert (phase["optimizer"], phase["first_step"], phase["end_step"]) == ("AdamW", 0, 34)
    assert phase["lr_first"] == [pytest.approx(1e-3)]
    assert told["steps"] == 34
    assert told["seed"] == 0
    assert 0.5 < told["metrics"]["test/acc"] <= 1
    assert (finished.folder / told["best_checkpoint"]).is_file()


def test_a_truncated_checkpoint_gets_code_3_and_hears_of_a_whole_one(finished: Finished, train: Run, tmp_path: Path) -> None:
    whole = (finished.folder / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "good.ckpt").write_bytes(whole)
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    before = digests(tmp_path)
    ended = train("ckpt_path=cut.ckpt")
    size = f"{len(whole) // 2:,} bytes"
    cut = f"lightning-adaptive: ckpt_path=cut.ckpt: no checkpoint, or not a whole one ({size}). It was left as it is."
    assert ended.err == f"{cut} Newest whole one there: good.ckpt.\n"
    assert ended.code == 3
    assert train("ckpt_path=cut2.ckpt").err == (
        "lightning-adaptive: ckpt_path=cut2.ckpt: there is no such file. Newest whole one there: good.ckpt.\n"
    )
    folder = "lightning-adaptive: ckpt_path=.: a folder, but no checkpoint of FSDP, FSDP2 or DeepSpeed, or not a whole one."
    assert train("ckpt_path=.").err == f"{folder} Newest whole one there: good.ckpt.\n"
    assert before.items() <= digests(tmp_path).items()


def test_checkpoints_are_the_last_and_the_best_and_can_be_typed(finished: Finished) -> None:
    names = sorted(path.name for path in (finished.folder / "checkpoints").iterdir())
    assert names == ["epoch000-step000034.ckpt", "last.ckpt"]
    for name in names:
        state = torch.load(finished.folder / "checkpoints" / name, weights_only=True)
        assert state["global_step"] == 34


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the new run keeps its checkpoints in its own folder
def test_a_checkpoint_with_an_equals_sign_in_its_name_resumes(finished: Finished, train: Run, tmp_path: Path) -> None:
    """Lightning's default names hold ``=``, which Hydra's grammar does not take."""
    given = tmp_path / "a b" / "epoch=0-step=34.ckpt"
    given.parent.mkdir()
    shutil.copy(finished.folder / "checkpoints" / "last.ckpt", given)
    before = digests(given.parent)
    ended = train(f"ckpt_path={given}", "optimizer=adamw", "switch=none", "trainer.max_epochs=2", "test=false")
    assert ended.code == 0, ended.err
    assert "<- resumed at step 34\n" in ended.out
    [run] = runs(tmp_path)
    told = result(run)
    assert told["steps"] == 68
    assert [(phase["first_step"], phase["end_step"]) for phase in told["phases"]] == [(0, 68)]
    assert digests(given.parent) == before


def test_a_sweep_makes_a_folder_for_each_job(train: Run, tmp_path: Path) -> None:
    ended = train("-m", "seed=1,2", "switch.at=2st", *SHORT)
    assert ended.code == 0, ended.err
    [study] = (tmp_path / "studies").iterdir()
    jobs = sorted(path for path in study.iterdir() if path.is_dir())
    assert [path.name.split("_")[0] for path in jobs] == ["seed-1", "seed-2"]
    assert [result(path)["seed"] for path in jobs] == [1, 2]
    for path in jobs:
        assert [(phase["optimizer"], phase["first_step"]) for phase in result(path)["phases"]] == [("Adam", 0), ("SGD", 2)]
        assert (path / "checkpoints" / "last.ckpt").is_file()
    assert len({result(path)["metrics"]["val/loss"] for path in jobs}) == 2
    assert not (tmp_path / "outputs").exists()


def test_a_study_can_be_named_and_a_mistake_in_it_is_no_success(train: Run, tmp_path: Path) -> None:
    ended = train("-m", "study=s1", "seed=7", "switch.at=5")
    assert ended.code != 0
    assert "switch.at: 5 has no unit." in ended.err
    [job] = (path.name for path in (tmp_path / "studies" / "s1").iterdir() if path.is_dir())
    assert job.startswith("seed-7_switch.at-5_")


def test_two_runs_of_one_second_get_two_folders(train: Run, tmp_path: Path) -> None:
    first, second = (train("switch.at=5"), train("switch.at=5"))  # the mistake keeps them short; the folder comes before it
    assert (first.code, second.code) == (2, 2)
    assert len(runs(tmp_path)) == 2
    assert job.run_stamp() != job.run_stamp()


def test_a_schedulers_job_id_names_the_folder(train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes of the job must find the same one."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert job.run_stamp() != "none"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "elastic")
    assert job.run_stamp() == "elastic"
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    assert job.run_stamp() == "1234"


def test_a_recipe_stays_overridable(train: Run, tmp_path: Path) -> None:
    ended = train("recipe=digits_adam_to_sgd", "switch.at=3st", "optimizer@switch.optimizer=rmsprop", *SHORT)
    assert ended.code == 0, ended.err
    [run] = runs(tmp_path)
    assert [(phase["optimizer"], phase["first_step"]) for phase in result(run)["phases"]] == [("Adam", 0), ("RMSprop", 3)]
    # 5 % of four steps round to none; 3e-3 is the recipe's own, as is the next phase's 0.03.
    assert "lr 3.0e-03" in ended.out
    assert "lr 3.0e-02" in ended.out


def test_a_recipe_of_ones_own_is_found_in_the_working_folder(train: Run, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /optimizer: sgd\n  - override /switch: none\noptimizer:\n  lr: 0.25\n"
    )
    ended = train("recipe=mine", *SHORT)
    assert ended.code == 0, ended.err
    [run] = runs(tmp_path)
    [phase] = result(run)["phases"]
    assert (phase["optimizer"], phase["lr_first"]) == ("SGD", [0.25])


@pytest.mark.parametrize("logger", ["tensorboard", "[csv,tensorboard]", "many"])
def test_loggers_stand_beside_each_other(logger: str, train: Run, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    ended = train(f"logger={logger}", "switch.at=2st", *SHORT)
    assert ended.code == 0, ended.err
    [run] = runs(tmp_path)
    assert (run / "metrics.csv").is_file()
    assert (run / "run.png").is_file()
    assert [path.name.split(".")[0] for path in (run / "tensorboard").iterdir() if path.name.startswith("events")] == ["events"]


def test_a_missing_package_of_a_logger_is_named(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", _Absent())
    ended = train("logger=mlflow", *SHORT)
    assert ended.err == "lightning-adaptive: logger.mlflow: MLFlowLogger cannot be built: mlflow is absent.\n"
    assert ended.code == 2


class _Absent:
    """What Lightning holds in place of a package that is not installed."""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return "mlflow is absent."


def test_without_callbacks_nothing_is_saved_and_the_switch_still_happens(train: Run, tmp_path: Path) -> None:
    ended = train("callbacks=none", "switch.at=2st", *SHORT)
    assert ended.code == 0, ended.err
    [run] = runs(tmp_path)
    assert list(run.rglob("*.ckpt")) == []
    assert [phase["optimizer"] for phase in result(run)["phases"]] == ["Adam", "SGD"]
    assert result(run)["best_checkpoint"] is None


def test_without_a_logger_a_run_still_ends_well(train: Run, tmp_path: Path) -> None:
    ended = train("~logger.csv", "~callbacks.learning_rate", "switch.at=2st", *SHORT)
    assert ended.code == 0, ended.err
    [run] = runs(tmp_path)
    assert not (run / "run.png").exists()
    assert result(run)["steps"] == 4


# A user's own module and data

MYLAB = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Model(pl.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.Rprop(self.parameters())


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def _loader(self):
        inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=self.batch_size)

    def train_dataloader(self):
        return self._loader()

    def val_dataloader(self):
        return self._loader()
"""
TASK = """
# My task.
module:
  _target_: mylab.Model
  width: 8
data:
  _target_: mylab.Data
  batch_size: 8
monitor: val_loss
mode: min
"""
OWN = ("-cd", "./conf", "task=mine", "trainer.max_epochs=2", "switch.at=50%")


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    (tmp_path / "mylab.py").write_text(MYLAB)
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "mine.yaml").write_text(TASK)
    return tmp_path


def own_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Through the console script, which does not look for modules in the working folder by itself."""
    return subprocess.run(
        [SCRIPT, "train", "--trust", "mylab", *OWN, *arguments],
        cwd=folder,
        env={**{name: value for name, value in os.environ.items() if name != TRUST_VARIABLE}, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def check_own_run(folder: Path, ended: subprocess.CompletedProcess[str], steps_per_epoch: int) -> None:
    assert ended.returncode == 0, ended.stderr
    [run] = runs(folder)
    told = result(run)
    phases = [(phase["optimizer"], phase["first_step"], phase["end_step"]) for phase in told["phases"]]
    assert phases == [("Adam", 0, steps_per_epoch), ("SGD", steps_per_epoch, 2 * steps_per_epoch)]
    assert set(told["metrics"]) >= {"val_loss"}
    assert all(phase["metric"] is not None for phase in told["phases"])
    assert (run / told["best_checkpoint"]).is_file()
    assert (run / "run.png").is_file()


def test_ones_own_module_and_data_are_trained(own_folder: Path) -> None:
    check_own_run(own_folder, own_command(own_folder), steps_per_epoch=4)


@pytest.mark.slow
def test_ones_own_module_and_data_are_trained_on_two_processes(own_folder: Path) -> None:
    """The other process must find the module, the task, the word of trust and the run folder as well."""
    check_own_run(own_folder, own_command(own_folder, "trainer=ddp_cpu", "trainer.devices=2"), steps_per_epoch=2)


def test_ones_own_module_is_refused_without_a_word(own_folder: Path, train: Run) -> None:
    ended = train(*OWN)
    assert ended.err == (
        "lightning-adaptive: task.module._target_: 'mylab' is not an installed package. If it is your own code, say so outside "
        "the config: --trust mylab, or LIGHTNING_ADAPTIVE_TRUST=mylab.\n"
    )
    assert ended.code == 2
    assert "mylab" not in sys.modules


@pytest.mark.parametrize(
    ("recipe", "fault"),
    [
        (
            "# @package _global_\nhydra: {job_logging: {formatters: {simple: {(): os.system, command: touch ran}}}}\n",
            "it sets the key 'hydra', which only the command line may",
        ),
        ("# @package hydra.job.env_set\nLIGHTNING_ADAPTIVE_TRUST: mylab\n", "its package is 'hydra.job.env_set'"),
        ("optimizer:\n  lr: 3\n", "its package is None"),
    ],
    ids=["logging", "environment", "no package"],
)
def test_a_recipe_reaches_no_further_than_the_run(recipe: str, fault: str, train: Run, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "theirs.yaml").write_text(recipe)
    ended = train("recipe=theirs")
    assert ended.err == (
        f"lightning-adaptive: recipe=theirs: {fault}. A recipe begins with '# @package _global_' and chooses a run.\n"
    )
    assert ended.code == 2
    assert os.listdir(tmp_path) == ["recipes"]


@pytest.mark.parametrize("flag", [("-cd", "./conf"), ("--config-dir=./conf",)])
def test_choices_of_ones_own_folder_are_known_to_a_mistake(flag: tuple[str, ...], own_folder: Path, train: Run) -> None:
    ended = train(*flag, "task=mime")
    assert ended.err == "lightning-adaptive: task=mime: task has no 'mime'. Did you mean 'mine'? Choices: digits, mine.\n"
    ended = train(*flag, "task=mine", "task.module.wdth=3")
    assert ended.err == (
        "lightning-adaptive: task.module.wdth=3: there is no key 'wdth' in task.module. Did you mean 'width'? Keys: width.\n"
    )


def test_an_error_of_ones_own_code_keeps_its_traceback(own_folder: Path, train: Run) -> None:
    text = MYLAB.replace("        super().__init__()\n        self.net", "        raise ValueError('of mine')\n        self.net")
    (own_folder / "mylab.py").write_text(text)
    ended = train("--trust", "mylab", *OWN)
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert "ValueError: of mine" in ended.err


@pytest.mark.parametrize("spelling", [("--trust",), ("--trust", "a", "--trust")])
def test_trust_without_a_name(spelling: tuple[str, ...], train: Run) -> None:
    ended = train(*spelling)
    assert ended.err == "lightning-adaptive: --trust needs the name of a package.\n"
    assert ended.code == 2
