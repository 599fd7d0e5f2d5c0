"""CONTRIBUTING.md is followed to the letter: its blocks are written where it says, and then hold what it promises."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.strategies import Strategy
from torch.optim import SGD

import lightning_adaptive
from lightning_adaptive import ConfigError, OptimizerSwitchCallback, curves, strategies
from tests import test_foreign_apps, test_schedules, test_yaml
from tests.cli import SHORT, Run
from tests.support import ROOT, Net, counted_steps, loader, trainer
from tests.test_readme import CONTRIBUTING, blocks


def section(title: str) -> str:
    [found] = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", CONTRIBUTING, re.DOTALL | re.MULTILINE)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the files of a walk lie, and where the tests of all YAML files then look for them."""
    monkeypatch.setattr(test_yaml, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def composed(folder: Path) -> Callable[..., Any]:
    """Composes ``train`` with the walk's files beside ours."""

    def composed(*overrides: str) -> Any:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("train", [f"output_dir={folder}", f"hydra.searchpath=[file://{folder}/conf]", *overrides])

    return composed


def written(title: str, folder: Path, more: str = "") -> str:
    """Writes the YAML file of a section, which has the form of all others; returns its name."""
    [text], [path] = (
        blocks(section(title), "yaml"),
        map(Path, re.findall(r"^.*`(conf/\w+/\w+\.yaml)`:$", section(title), re.MULTILINE)),
    )
    (folder / path).parent.mkdir(parents=True)
    (folder / path).write_text(text + more, encoding="utf-8")
    test_yaml.test_a_file_is_short_and_says_first_what_it_is(path)
    test_yaml.test_every_value_is_documented_where_it_stands(path)
    return path.stem


# An optimizer


def test_the_optimizer_is_one_file(folder: Path, composed: Any, train: Run) -> None:
    name = written("Add an optimizer", folder)
    test_yaml.test_an_optimizer_takes_a_step(name, composed)
    test_yaml.test_an_optimizer_takes_a_step_after_a_switch(name, composed)
    test_foreign_apps.test_no_file_of_ours_puts_omegaconf_into_an_optimizer(composed, name)
    with counted_steps() as counts:
        ended = train("-cd", "conf", f"optimizer={name}", "switch=none", *SHORT)
    assert (ended.code, counts) == (0, {"ASGD": 4}), ended.err


# A schedule

CROSSED = [test for test in vars(test_schedules).values() if test_schedules.contract.mark in getattr(test, "pytestmark", [])]
DRAWN = [
    test
    for test in vars(test_schedules).values()
    if hasattr(test, "hypothesis") and "schedule" in inspect.signature(test.hypothesis.inner_test).parameters
]


@pytest.fixture
def half_life(monkeypatch: pytest.MonkeyPatch) -> dict[str, test_schedules.Row]:
    """The class in a module that stands for curves.py, exported, and its row."""
    code, row = blocks(section("Add a schedule"), "python")
    module = ModuleType("walked")
    vars(module).update(vars(curves) | {"__name__": "walked"})
    monkeypatch.setitem(sys.modules, "walked", module)
    exec(code, vars(module))
    monkeypatch.setattr(lightning_adaptive, "HalfLife", module.HalfLife, raising=False)
    rows: dict[str, test_schedules.Row] = eval(f"{{{row}}}", {**vars(test_schedules), "HalfLife": module.HalfLife})
    monkeypatch.setattr(test_schedules, "CONTRACT", rows)
    return rows


def test_the_schedule_is_asked_for_what_all_are() -> None:
    assert len(CROSSED) >= 9
    assert len(DRAWN) >= 5


@pytest.mark.parametrize("test", [*CROSSED, *DRAWN], ids=lambda test: test.__name__)
def test_the_schedule_keeps_the_contract(test: Callable[..., None], half_life: dict[str, test_schedules.Row]) -> None:
    [(name, row)] = half_life.items()
    test(*((name, row) if test in CROSSED else ()))


def test_the_schedule_is_one_file(folder: Path, composed: Any, half_life: dict[str, test_schedules.Row]) -> None:
    of_curve = (ROOT / "conf" / "scheduler" / "constant.yaml").read_text(encoding="utf-8").splitlines(keepends=True)[-6:]
    name = written("Add a schedule", folder, "".join(of_curve))
    test_yaml.test_a_schedule_lists_all_its_options(name)
    test_yaml.test_a_schedule_bears_the_shortest_trainings(name, composed)
    test_yaml.test_every_schedule_warms_up(name, composed)
    test_yaml.test_hydras_own_instantiate_builds_the_same_schedule(name, composed)
    module = lightning_adaptive.attach(
        Net(),
        optimizer=composed("optimizer.lr=0.5").optimizer,
        scheduler=composed(f"scheduler={name}", "scheduler.every=4st").scheduler,
    )
    running = trainer(max_steps=8)
    running.fit(module, loader())
    assert running.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 / 4, rel=1e-12)


# A strategy


class AveragingStrategy(Strategy):
    """One process, and no class that is in PLACEMENTS among its bases."""

    root_device = torch.device("cpu")  # type: ignore[assignment]
    is_global_zero = True  # type: ignore[assignment]
    global_rank, world_size = 0, 1

    def __init__(self, average_every: int = 1) -> None:
        super().__init__()
        self.average_every = average_every

    def model_to_device(self) -> None: ...

    def barrier(self, name: str | None = None) -> None: ...

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        return obj

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    def all_gather(self, tensor: Any, group: Any = None, sync_grads: bool = False) -> Any:
        return tensor


def switched(average_every: int = 1) -> dict[str, int]:
    switch = OptimizerSwitchCallback(at="1ep", optimizer=partial(SGD, lr=0.1))
    with counted_steps() as counts:
        trainer(strategy=AveragingStrategy(average_every), max_epochs=2, callbacks=[switch]).fit(Net(), loader())
    return counts


def test_the_strategy_is_one_class_and_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^trainer\.strategy: a switch is not available on AveragingStrategy\. "):
        switched()
    code, line = blocks(section("Add a strategy"), "python")
    names = {**vars(strategies), "AveragingStrategy": AveragingStrategy}
    exec(code, names)
    [(strategy, placement)] = eval(f"{{{line}}}", names).items()
    monkeypatch.setitem(strategies.PLACEMENTS, strategy, placement)
    assert switched() == {"Adam": 8, "SGD": 8}
    with pytest.raises(ConfigError, match=r"^trainer\.strategy\.average_every: between two averages the weights differ"):
        switched(average_every=2)


# The rooms


def test_the_way_of_a_setting_leads_through_rooms_that_exist() -> None:
    way = re.findall(r"^(\d)\. `(\w+)\.py`, `([\w.]+)`: ", section("Follow a setting"), re.MULTILINE)
    assert [number for number, _, _ in way] == [*"1234", *"1234"]
    for _, home, path in way:
        module: Any = __import__(f"lightning_adaptive.{home}", fromlist=["_"])
        for name in path.split("."):
            module = getattr(module, name)
