"""Every command and every piece of code in the README runs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tests.cpu_strategies import STRATEGIES
from tests.support import ROOT, command

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

MYLAB = """
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import DataLoader, TensorDataset


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(20, 2)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))


class Data(LightningDataModule):
    def train_dataloader(self):
        inputs = torch.randn(128, 20)
        return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).long()), batch_size=16)

    val_dataloader = train_dataloader
"""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands() -> Iterator[list[str]]:
    for block in blocks(README, "bash"):
        for line in block.splitlines():
            yield shlex.split(line, comments=True)


OURS = [words for words in commands() if words[0] == "lightning-adaptive"]


def test_every_command_is_one_that_is_tested_here() -> None:
    assert {words[0] for words in commands()} == {"make", "lightning-adaptive"}
    assert len(OURS) == 11
    assert "lightning-adaptive train ... ckpt_path=RUN/checkpoints/interrupted.ckpt" in README  # tests/test_signals.py runs it


def is_quick(words: list[str]) -> bool:
    """Whether a command stands for its kind in the quick tests; the others differ in their values."""
    return len(words) == 3 or "task=mine" in words or "optimizer=adamw" in words or words[1] == "preview"


@pytest.mark.parametrize(
    "words", [pytest.param(words, marks=() if is_quick(words) else pytest.mark.slow, id=" ".join(words)) for words in OURS]
)
def test_a_command_of_the_readme(words: list[str], tmp_path: Path) -> None:
    if "task=mine" in words:
        (tmp_path / "mylab.py").write_text(MYLAB, encoding="utf-8")
        (tmp_path / "conf" / "task").mkdir(parents=True)
        [_, yaml] = blocks(README, "yaml")
        (tmp_path / "conf" / "task" / "mine.yaml").write_text(yaml, encoding="utf-8")
    if "resume=last" in words:
        assert command(["train", "recipe=digits_adam_to_sgd", "trainer.max_epochs=2"], tmp_path).returncode == 0
    ended = command(words[1:], tmp_path)
    assert ended.returncode == 0, ended.stderr
    if words[1] == "list":
        assert len(ended.stdout.splitlines()) == len(list((ROOT / "conf" / "optimizer").glob("*.yaml")))
        return
    if words[1] == "preview":
        assert [len(list(tmp_path.glob(f"previews/*/preview.{kind}"))) for kind in ("png", "csv")] == [1, 1]
        return
    results = list(tmp_path.rglob("result.json"))
    assert len(results) == (4 if "study=moments" in words else 3 if "-m" in words else 1)
    assert ("SWITCH" in ended.stderr) == ("switch=none" not in words and "resume=last" not in words)


@pytest.mark.parametrize(
    "target", [words[1] for block in blocks(CONTRIBUTING, "bash") for words in map(shlex.split, block.splitlines())]
)
def test_a_target_of_make_exists(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True, timeout=30)


def test_the_application_of_the_readme_gets_our_groups(tmp_path: Path) -> None:
    [app, _] = blocks(README, "yaml")
    (tmp_path / "app.yaml").write_text(app, encoding="utf-8")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        whole = compose("app", ["switch.at=3ep"])
    assert whole.optimizer._target_ == "torch.optim.AdamW"
    assert whole.switch._target_ == "lightning_adaptive.OptimizerSwitchCallback"
    assert whole.switch.at == "3ep"


def python_blocks() -> dict[str, str]:
    return {block.splitlines()[0].removeprefix("# "): block for block in blocks(README, "python")}


@pytest.mark.parametrize("name", python_blocks())
def test_a_script_of_the_readme(name: str, tmp_path: Path) -> None:
    script = python_blocks()[name]
    assert len([line for line in script.splitlines() if line.strip() and not line.startswith("#")]) <= 30
    for other, text in python_blocks().items():
        (tmp_path / other).write_text(text, encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    if name == "own_trainer.py":
        [said] = re.findall(r"It says `(SWITCH .*?); \.\.\.`", README)
        assert said in ended.stderr


def test_the_table_of_strategies_has_a_row_for_each_and_no_failure() -> None:
    section = README[README.index("## What works where") : README.index("## What to expect")]
    cells = {name: row.split(" | ") for name, row in re.findall(r"^\| (.*?) \| (.*) \|$", section, re.MULTILINE)}
    assert list(cells) == ["strategy", *STRATEGIES]
    del cells["strategy"]
    assert {cell for row in cells.values() for cell in row} == {"yes", "-"}  # tests/test_strategies.py compares with what it sees


def test_what_the_readme_points_to_exists() -> None:
    targets = re.findall(r"\]\(((?!http)[^)]+)\)", README + CONTRIBUTING)
    assert {"recipes/README.md", "docs/hydra.md", "docs/lightning_cli.md"} <= set(targets)
    for target in targets:
        assert (ROOT / target).is_file(), target
