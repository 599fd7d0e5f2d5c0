"""The recipes on digits and the tables of ``recipes/README.md`` say the same, and ``benchmarks/recipes.py`` counts rightly."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from scipy.stats import ttest_1samp, ttest_rel

from lightning_adaptive.app import job  # noqa: F401 - registers the resolvers that train.yaml uses
from lightning_adaptive.report import read_curves
from tests.cli import SHORT, runs
from tests.cli import Run as Command
from tests.support import ROOT


def benchmark() -> ModuleType:
    """``benchmarks/recipes.py``, which is a script and lies in no package."""
    spec = importlib.util.spec_from_file_location("benchmarks_recipes", ROOT / "benchmarks" / "recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = benchmark()
README = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("digits_*.yaml"))


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", list(overrides))


def table(block: str) -> tuple[list[str], dict[str, list[str]]]:
    """Header of the table of a block, and its rows by recipe."""
    _, _, rest = README.partition(f"<!-- {block} -->\n")
    text, found, _ = rest.partition(f"\n<!-- end of {block} -->")
    assert found
    header, _, *rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [cell.strip() for cell in header], {re.sub(r"^\[(.*)\]\(.*\)$", r"\1", row[0]): row for row in cells}


# What the files say


def test_every_recipe_has_its_rows() -> None:
    assert sorted(BENCHMARK.TRIES) == RECIPES
    header, rows = table("results")
    assert header == BENCHMARK.RESULTS
    assert list(rows) == list(BENCHMARK.TRIES)
    header, others = table("differences")
    assert header == BENCHMARK.PAIRED
    assert list(others) == [recipe for recipe in rows if recipe != BENCHMARK.COMPARED_WITH]
    header, choices = table("choice")
    assert header == BENCHMARK.CHOSEN
    assert list(choices) == list(rows)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_header_says_what_the_table_says(recipe: str) -> None:
    _, rows = table("results")
    cells = rows[recipe]
    what, shows, expected, command = BENCHMARK.header(recipe)
    assert cells[:2] == [f"[{recipe}]({recipe}.yaml)", what.removesuffix(BENCHMARK.TASK)]
    assert what.endswith(BENCHMARK.TASK)
    assert shows.startswith("Shows: ")
    assert expected == BENCHMARK.expectation(cells)
    assert f"`{command}`" == cells[-1] == f"`{BENCHMARK.command(recipe)}`"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_holds_what_was_chosen_among_what_was_tried(recipe: str) -> None:
    tries = BENCHMARK.TRIES[recipe]
    assert math.prod(len(values.split(",")) for values in tries.values()) == 8, "as many for each recipe"
    _, _, setting, *_ = table("choice")[1][recipe]
    chosen = dict(override.split("=") for override in re.findall(r"`(.*?)`", setting))
    assert chosen.keys() == tries.keys()
    whole = composed(f"recipe={recipe}")
    same = composed(f"recipe={recipe}", *(f"{key}={value}" for key, value in chosen.items()))
    for key, value in chosen.items():
        assert value in tries[key].split(",")
        assert OmegaConf.select(whole, key) == OmegaConf.select(same, key)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_differ_in_their_phases_only(recipe: str) -> None:
    """So that the rows can be compared: the same data, net and number of steps."""
    ours, first = composed(f"recipe={recipe}"), composed(f"recipe={RECIPES[0]}")
    assert ours.task.data.batch_size * ours.trainer.accumulate_grad_batches == 32
    if recipe == "digits_noise":  # it sees the noise between two halves of a batch
        ours.task.data.batch_size, ours.trainer.accumulate_grad_batches = 32, 1
        del ours.callbacks.noise
    for key in ("task", "trainer", "callbacks", "param_groups"):
        assert OmegaConf.to_container(ours[key], resolve=False) == OmegaConf.to_container(first[key], resolve=False)
    assert ours.trainer.max_epochs == 20
    assert ours.switch.enabled == ("and then" in BENCHMARK.header(recipe)[0]), "the first line says what steps, and what then"


def test_a_seed_means_the_same_weights_and_batches_in_every_recipe(train: Command, tmp_path: Path) -> None:
    """So that differences of one seed are pairs. The learning rates are so small that no weight moves."""
    still = ("optimizer.lr=1e-30", "switch.optimizer.lr=1e-30", "switch.at=2st", *SHORT)
    for recipe in ("digits_sgd", "digits_wsd", "digits_adam_to_sgd"):
        still_here = [override for override in still if recipe == "digits_adam_to_sgd" or not override.startswith("switch")]
        ended = train(f"recipe={recipe}", "seed=3", *still_here)
        assert ended.code == 0, ended.err
    losses = [read_curves(run / "metrics.csv")["train/loss"] for run in runs(tmp_path)]
    assert len(losses) == 3
    assert losses[0] == losses[1] == losses[2]
    assert len(losses[0][1]) == 4


def test_what_the_page_points_to_exists() -> None:
    targets = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert f"../{BENCHMARK.PICTURE.relative_to(ROOT)}" in targets
    for target in targets:
        assert (ROOT / "recipes" / target).is_file(), target


def test_what_is_concluded_by_hand_names_numbers_of_the_tables() -> None:
    """So that another measurement does not leave old numbers in the text."""
    by_hand = README[README.index("## What it says") : README.index("## How the values were chosen")]
    generated = README[README.index("<!-- results -->") : README.index("<!-- end of differences -->")]
    an_image = f"{100 / 360:.2f}"
    stale = [number for number in re.findall(r"\d+\.\d+", by_hand) if number not in generated and number != an_image]
    assert stale == []
    _, rows = table("differences")
    cells = [cell for row in rows.values() for cell in row[1:]]
    count = {6: "Six", 7: "Seven", 9: "Nine"}[sum(cell.startswith("**") for cell in cells)]
    assert f"{count} of the {len(cells)} intervals leave zero out" in by_hand


# How it is counted


@pytest.mark.parametrize("values", [[98.1, 98.6, 97.9, 98.3, 98.3], [0.5, 0.25], [1.0, 1.0, 2.0]])
def test_an_interval_is_that_of_scipy(values: list[float]) -> None:
    mean, half = BENCHMARK.interval(values)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high), rel=1e-12)


@pytest.mark.parametrize(
    ("ours", "bold"), [([1.0, 2.0, 4.0, 3.0], False), ([1.5, 2.5, 3.6, 4.5], True), ([0.2, 1.2, 2.2, 3.1], True)]
)
def test_a_difference_is_paired_and_bold_if_its_interval_is_without_zero(ours: list[float], bold: bool) -> None:
    theirs = [1.0, 2.0, 3.0, 4.0]
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    cell = BENCHMARK.difference(ours, theirs, 4)
    mean, half = (float(number) for number in cell.strip("*").split(" ± "))
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high), abs=1.1e-4)  # four digits
    assert cell.startswith("**") == bold == (expected.low > 0 or expected.high < 0)


def test_a_difference_needs_a_number_of_every_run() -> None:
    assert BENCHMARK.difference([1, None], [1, 2], 1) == "-"
    assert BENCHMARK.difference([1, 2], [None, 2], 1) == "-"


@pytest.mark.parametrize(
    ("accuracies", "epoch"), [([0.5, 0.97, 0.99], 2), ([0.98, 0.9], 1), ([0.5, 0.9699], None), ([], None), ([0.1, 0.1, 0.971], 3)]
)
def test_the_first_epoch_at_the_threshold(accuracies: list[float], epoch: int | None) -> None:
    assert BENCHMARK.first_epoch(accuracies) == epoch


def test_epochs_say_how_many_runs_reached_it() -> None:
    assert BENCHMARK.epochs_until([2, 2, 3, 2, 2]) == "2.2"
    assert BENCHMARK.epochs_until([2, None, 5]) == "3.5 (2 of 3)"
    assert BENCHMARK.epochs_until([None, None]) == "never"


def made_up(seed: int = 1, accuracy: float = 0.98, loss: float = 0.1, **others: Any) -> Any:
    """A run of two epochs whose second is the best."""
    fields: Mapping[str, Any] = {
        "setting": (),
        "steps": [34, 68],
        "accuracies": [0.9, accuracy],
        "losses": [0.3, loss],
        "best_epoch": 2,
        "seconds": 6.0,
        "last_phase": 1,
        "test": {"test/acc": accuracy, "test/loss": loss},
        "versions": {"python": "3", "torch": "2", "lightning": "2"},
    }
    return BENCHMARK.Run(seed=seed, **{**fields, **others})


def test_the_best_try_is_that_of_the_highest_accuracy_and_then_of_the_lowest_loss() -> None:
    low, high, other = [made_up(accuracy=0.97, loss=0.01)], [made_up(loss=0.2)], [made_up(loss=0.1)]
    assert BENCHMARK.best({("low",): low, ("high",): high}) == ("high",)
    assert BENCHMARK.best({("other",): other, ("high",): high}) == ("other",)
    assert BENCHMARK.best({("high",): high, ("other",): other}) == ("other",)
    never_best = [made_up(accuracy=0.99, best_epoch=1)]
    assert BENCHMARK.best({("low",): low, ("never",): never_best}) == ("low",), "that of the checkpoint that is tested"


def test_a_row_and_its_differences() -> None:
    ours = [made_up(seed, accuracy) for seed, accuracy in enumerate((0.97, 0.98, 0.99), 1)]
    assert BENCHMARK.row("digits_adam", ours)[2:] == [
        *("98.00 ± 2.48", "0.100 ± 0.000", "2.0", "2.0", "6.0"),
        "`lightning-adaptive train -m recipe=digits_adam seed=1,2,3,4,5`",
    ]
    others = [made_up(seed, accuracy, loss=0.2) for seed, accuracy in enumerate((0.96, 0.98, 0.98), 1)]
    cells = BENCHMARK.paired_row("digits_adam", ours, others)
    assert cells == ["digits_adam", "+0.67 ± 1.43", "**-0.100 ± 0.000**", "-", "**-0.100 ± 0.000**"]
    with pytest.raises(AssertionError):
        BENCHMARK.paired_row("digits_adam", ours, others[::-1])


def test_a_block_is_replaced_and_what_stands_around_it_stays() -> None:
    text = "By hand.\n<!-- one -->\nold\n<!-- end of one -->\n\nBy hand.\n<!-- two -->\nold\n<!-- end of two -->\n"
    again = BENCHMARK.replaced(text, "one", "new\nlines")
    assert again == text.replace("old", "new\nlines", 1)
    assert BENCHMARK.replaced(again, "one", "old") == text
    for fault in ("three", "tw"):
        with pytest.raises(ValueError, match=f"^there is no block '{fault}'$"):
            BENCHMARK.replaced(text, fault, "new")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    runs = {recipe: [made_up(seed) for seed in (1, 2)] for recipe in BENCHMARK.TRIES}
    BENCHMARK.draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_runs_folder_is_read(command_line: Command, tmp_path: Path) -> None:
    setting = ("trainer.max_epochs=2", "trainer.limit_train_batches=10", "switch.at=1ep")
    ended = command_line("train", "recipe=digits_adam_to_sgd", "seed=7", *setting)
    assert ended.code == 0, ended.err
    [folder] = runs(tmp_path)
    run = BENCHMARK.read(folder)
    assert (run.seed, run.setting, run.steps, run.last_phase) == (7, setting, [10, 20], 2)
    assert run.accuracies[run.best_epoch - 1] == max(run.accuracies)
    assert len(run.losses) == 2
    assert 0 < run.seconds < 60
    assert set(run.test) == {"test/acc", "test/f1", "test/loss", "test/calibration_error"}
    assert run.versions.keys() >= {"python", "torch", "lightning"}
