"""The command line on the sharded strategies, and a resume with what does not fit.

Each of the shipped trainer groups has a variant for two processes of the CPU in ``tests/conf``, which only says where it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hydra_plugins.lightning_adaptive import data_folder
from lightning_adaptive.app import job  # noqa: F401 - registers the resolvers that train.yaml uses
from tests.cli import Run, digests, result, runs
from tests.support import ROOT, command
from tests.witness import seen

CONF = ROOT / "tests" / "conf"
VARIANTS = ("fsdp_cpu", "fsdp2_cpu", "deepspeed_1_cpu", "deepspeed_2_cpu", "deepspeed_3_cpu")
PARAMETERS = 9978


# The variants


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_the_shipped_group_on_the_cpu(variant: str, tmp_path: Path) -> None:
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        shipped, ours = (
            compose("train", [f"hydra.searchpath=['file://{CONF}']", f"output_dir={tmp_path}", f"trainer={name}"]).trainer
            for name in (variant.removesuffix("_cpu"), variant)
        )
    OmegaConf.resolve(shipped)
    OmegaConf.resolve(ours)
    one, other = dotted(shipped), dotted(ours)
    changed = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    buckets = {"strategy.allgather_bucket_size", "strategy.reduce_bucket_size"} if "deepspeed" in variant else set()
    target = set() if variant == "fsdp2_cpu" else {"strategy._target_"}  # which needs no GPU as it is
    assert changed - {"devices"} == {"accelerator"} | target | buckets
    assert (other["accelerator"], other["devices"]) == ("cpu", 2)


def dotted(node: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= dotted(value, f"{prefix}{key}.") if hasattr(value, "items") else {prefix + key: value}
    return flat


def test_fsdp2_shares_the_batch_among_all_devices() -> None:
    """Its ``auto`` would be the number of machines."""
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        strategy = compose("train", ["output_dir=.", "trainer=fsdp2", "trainer.devices=4"]).trainer.strategy
    assert strategy.data_parallel_size * strategy.tensor_parallel_size == 4


# Runs


def trained(variant: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Six epochs of 17 steps on two processes, with a switch after three."""
    return command(
        [
            *("train", "-cd", str(CONF), "--trust", "tests", "recipe=digits_adam_to_sgd", f"trainer={variant}"),
            *("switch.at=3ep", "trainer.max_epochs=6", "+callbacks.witness={_target_: tests.witness.ShardedWitness}"),
            *arguments,
        ],
        folder,
        timeout=300,
        PYTHONPATH=str(ROOT),
    )


@dataclass
class Trained:
    """A run that saved every epoch."""

    variant: str
    ended: subprocess.CompletedProcess[str]
    working: Path

    @property
    def folder(self) -> Path:
        [folder] = runs(self.working)
        return folder

    def checkpoint(self, epoch: int) -> Path:
        """What it saved after so many epochs."""
        return self.folder / "checkpoints" / f"epoch{epoch - 1:03d}-step{17 * epoch:06d}.ckpt"


# One of them is run in the quick tests as well.
@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=() if name == "fsdp2_cpu" else pytest.mark.slow) for name in VARIANTS]
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    working = tmp_path_factory.mktemp(request.param)
    return Trained(request.param, trained(request.param, working, "callbacks.checkpoint.save_top_k=-1"), working)


def test_a_run_switches_on_both_ranks_and_leaves_everything(whole: Trained) -> None:
    ended, folder = whole.ended, whole.folder
    assert ended.returncode == 0, ended.stderr
    one, other = seen(whole.working)
    assert one["weights"] == other["weights"]
    assert one["process"] != other["process"]
    for rank in (one, other):
        assert (rank["steps"], rank["optimizer"]) == ({"Adam": 51, "SGD": 51}, "SGD")
    [line] = [line for line in ended.stderr.splitlines() if "SWITCH at step 51 (epoch 3): Adam" in line]
    assert ", freed " in line
    files = {"checkpoints", "metrics.csv", "plan.txt", "result.json", "run.png", "summary.md", "train_ddp_process_1.log"}
    assert files <= {file.name for file in folder.iterdir()}
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "17 batches, accumulate 1, 2 processes" in (folder / "plan.txt").read_text(encoding="utf-8")
    assert "\nphase  optimizer  schedule " in ended.stdout
    check_result(whole)


def check_result(whole: Trained) -> None:
    told = result(whole.folder)
    phases = [(phase["optimizer"], phase["first_step"], phase["end_step"]) for phase in told["phases"]]
    assert phases == [("Adam", 0, 51), ("SGD", 51, 102)]
    # Two moments, then one, of the half that this process has; and a step or a few zeros that fill up a shard.
    adam, sgd = (phase["state_bytes"] for phase in told["phases"])
    assert 0 < adam - 2 * PARAMETERS / 2 * 4 < 200
    assert 0 <= sgd - PARAMETERS / 2 * 4 < 200
    assert told["metrics"]["val/acc"] > 0.95
    assert told["metrics"]["test/acc"] > 0.95  # of the best checkpoint, loaded into what was trained
    assert (whole.folder / told["best_checkpoint"]).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(("epoch", "steps"), [(2, {"Adam": 17, "SGD": 51}), (4, {"SGD": 34})], ids=["before", "after"])
def test_a_run_resumes_to_the_same_weights(epoch: int, steps: dict[str, int], whole: Trained, tmp_path: Path) -> None:
    given = whole.checkpoint(epoch)
    before = digests(given)
    ended = trained(whole.variant, tmp_path, f"ckpt_path={given}", "test=false")
    assert ended.returncode == 0, ended.stderr
    for rank in seen(tmp_path):
        assert (rank["steps"], rank["optimizer"]) == (steps, "SGD")
    assert {rank["weights"] for rank in seen(tmp_path)} == {rank["weights"] for rank in seen(whole.working)}
    [run] = runs(tmp_path)
    phases = [(phase["optimizer"], phase["first_step"], phase["end_step"]) for phase in result(run)["phases"]]
    assert phases == [("Adam", 0, 51), ("SGD", 51, 102)]
    assert before
    assert digests(given) == before


# A checkpoint that does not fit

REFUSED = (
    "the checkpoint was written in phase 1 (SGD, from step {step}), but this run has no switch. "
    "Resume with the switch of the run that wrote it."
)
OTHERWISE = (
    "this run is configured otherwise than the one that wrote the checkpoint:\n{listed}\n"
    "Say which options the running optimizer goes on with: switch.on_resume=config or switch.on_resume=checkpoint."
)
LR = "  optimizer.lr: 0.003 in the checkpoint, 0.1 in this run"


@pytest.mark.slow
@pytest.mark.parametrize("whole", ["fsdp2_cpu", "deepspeed_3_cpu"], indirect=True)
@pytest.mark.parametrize(
    ("epoch", "argument", "message"),
    [(4, "switch=none", REFUSED.format(step=51)), (2, "optimizer.lr=0.1", OTHERWISE.format(listed=LR))],
    ids=["no switch", "another learning rate"],
)
def test_a_checkpoint_that_does_not_fit_ends_both_processes(
    epoch: int, argument: str, message: str, whole: Trained, tmp_path: Path
) -> None:
    before = digests(whole.working)
    ended = trained(whole.variant, tmp_path, f"ckpt_path={whole.checkpoint(epoch)}", "test=false", argument)
    assert ended.returncode == 3
    assert f"\nlightning-adaptive: {message}\n" in ended.stderr
    assert "Traceback" not in ended.stderr + ended.stdout
    assert seen(tmp_path) == []
    assert digests(whole.working) == before


SHORT = (
    "recipe=digits_adam_to_sgd",
    "trainer.limit_train_batches=4",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "test=false",
)
SAVED = "callbacks.checkpoint.save_top_k=-1"
IN_MY_OWN_FOLDER = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@IN_MY_OWN_FOLDER
def test_a_checkpoint_of_a_later_phase_is_refused_without_the_switch(train: Run, tmp_path: Path) -> None:
    assert train(*SHORT, SAVED, "switch.at=2st").code == 0
    [given] = tmp_path.glob("outputs/*/checkpoints/epoch000-step000004.ckpt")
    before = digests(tmp_path)
    ended = train(*SHORT, f"ckpt_path={given}", "switch=none")
    assert (ended.code, ended.err) == (3, f"lightning-adaptive: {REFUSED.format(step=2)}\n")
    assert "Traceback" not in ended.out
    assert before.items() <= digests(tmp_path).items()


@IN_MY_OWN_FOLDER
@pytest.mark.parametrize(
    ("at", "changed", "listed", "policy"),
    [
        ("6st", ["optimizer.lr=0.1"], [LR], "checkpoint"),
        (
            "2st",
            ["optimizer.lr=0.1", "switch.optimizer.lr=1", "scheduler.warmup=50%"],
            [
                LR,
                "  scheduler: cosine, warmup 5% in the checkpoint, cosine, warmup 50% in this run",
                "  switch.optimizer.lr: 0.03 in the checkpoint, 1 in this run",
            ],
            "config",
        ),
    ],
    ids=["before", "after"],
)
def test_other_settings_are_listed_and_the_words_of_the_message_can_be_typed(
    at: str, changed: Sequence[str], listed: Sequence[str], policy: str, train: Run, tmp_path: Path
) -> None:
    assert train(*SHORT, SAVED, f"switch.at={at}").code == 0
    [given] = tmp_path.glob("outputs/*/checkpoints/epoch000-step000004.ckpt")
    resumed = [*SHORT, f"switch.at={at}", f"ckpt_path={given}", *changed]
    before = digests(tmp_path)
    ended = train(*resumed)
    assert (ended.code, ended.err) == (3, f"lightning-adaptive: {OTHERWISE.format(listed=chr(10).join(listed))}\n")
    assert "Traceback" not in ended.out
    assert before.items() <= digests(tmp_path).items()
    assert train(*resumed, f"switch.on_resume={policy}").code == 0
    whole, again = (
        [phase["lr_last"] for phase in result(run)["phases"]] for run in runs(tmp_path) if (run / "result.json").is_file()
    )
    assert (again == whole) == (policy == "checkpoint")


# Folders


def sharded(folder: Path, file: str, minutes: int) -> Path:
    """A folder as FSDP or DeepSpeed leave one, by its metadata; so old."""
    (folder / file).parent.mkdir(parents=True)
    torch.save({"epoch": 0, "state_dict": {}}, folder / file)
    os.utime(folder, (minutes * 60,) * 2)
    return folder


def test_a_folder_that_is_no_checkpoint_hears_of_the_newest_one_there(train: Run, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    told = "a folder, but no checkpoint of FSDP, FSDP2 or DeepSpeed, or not a whole one."
    assert train("ckpt_path=a.ckpt").err == f"lightning-adaptive: ckpt_path=a.ckpt: {told}\n"
    torch.save({"epoch": 0}, tmp_path / "file.ckpt")
    os.utime(tmp_path / "file.ckpt", (60, 60))
    for name, file in (("fsdp", "meta.pt"), ("zero", "checkpoint/mp_rank_00_model_states.pt")):
        sharded(tmp_path / f"{name}.ckpt", file, minutes=2 if name == "fsdp" else 3)
        before = digests(tmp_path)
        ended = train("ckpt_path=.")
        assert ended.err == f"lightning-adaptive: ckpt_path=.: {told} Newest whole one there: {name}.ckpt.\n"
        assert ended.code == 3
        assert train("ckpt_path=b.ckpt").err.endswith(f": there is no such file. Newest whole one there: {name}.ckpt.\n")
        assert before.items() <= digests(tmp_path).items()


@pytest.mark.parametrize("file", ["meta.pt", "checkpoint/zero_pp_rank_0_mp_rank_00_model_states.pt"])
def test_a_truncated_folder_is_refused(file: str, train: Run, tmp_path: Path) -> None:
    damaged = sharded(tmp_path / "cut.ckpt", file, minutes=1) / file
    damaged.write_bytes(damaged.read_bytes()[:100])
    ended = train("ckpt_path=cut.ckpt")
    assert ended.err == f"lightning-adaptive: ckpt_path=cut.ckpt: {file} in it: no checkpoint, or not a whole one (100 bytes).\n"
    assert ended.code == 3
    assert damaged.stat().st_size == 100


@pytest.mark.parametrize("given", ["a.ckpt", "."], ids=["file", "folder"])
def test_a_checkpoint_is_looked_at_before_torch_is_imported(given: str, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"hello")
    lines = (
        "import sys\n"
        "from lightning_adaptive.app import cli\n"
        f"sys.argv = ['lightning-adaptive', 'train', 'ckpt_path={given}']\n"
        "try:\n    cli.main()\n"
        "except SystemExit as end:\n    print(end.code, 'torch' in sys.modules)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    told = subprocess.check_output([sys.executable, "-c", lines], cwd=tmp_path, env=environment, text=True)
    assert told == "3 False\n"
