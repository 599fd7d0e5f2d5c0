"""How a user finds what there is to type: ``list``, completion in bash, ``--help``; and what a run says of its recipe."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_adaptive.app.list import KINDS, choices
from lightning_adaptive.app.recipe import lines
from tests.cli import SCRIPT, SHORT, Run, result, runs
from tests.support import ROOT

RECIPE = "# @package _global_\n# {what}\ndefaults:\n  - override /optimizer: sgd\noptimizer:\n  lr: 0.25\n"


def told(path: Path) -> str:
    """The first comment of a file, without a recipe's package."""
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    return next(line for line in comments if "@package" not in line).lstrip("# ")


# list


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_lists_each_file_with_what_it_is_and_where_it_comes_from(kind: str, command_line: Run) -> None:
    folder = ROOT / "recipes" if kind == "recipes" else ROOT / "conf" / KINDS[kind]
    ended = command_line("list", kind)
    rows = [line.split("  ", 1) for line in ended.out.splitlines()]
    files = sorted(folder.glob("*.yaml"))
    assert [name for name, _ in rows] == [path.stem for path in files]
    for (_, rest), path in zip(rows, files, strict=True):
        assert rest.strip().startswith(told(path))
        assert rest.endswith("  lightning-adaptive")


def test_without_a_kind_the_kinds_are_listed_with_their_groups(command_line: Run) -> None:
    rows = command_line("list").out.splitlines()
    assert [row.split()[0] for row in rows] == list(KINDS)
    count = len(list((ROOT / "conf" / "optimizer").glob("*.yaml")))
    assert rows[0].split(maxsplit=1)[1] == f"{count} to choose with optimizer=NAME"


def test_a_group_of_ones_own_folder_is_listed_and_a_hidden_file_says_so(command_line: Run, tmp_path: Path) -> None:
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    for name in ("adam", "mine"):
        (tmp_path / "conf" / "optimizer" / f"{name}.yaml").write_text(f"# My {name}.\n_target_: torch.optim.Adam\n")
    rows = [" ".join(row.split()) for row in command_line("list", "optimizers", "-cd", "conf").out.splitlines()]
    assert "mine My mine. conf/optimizer" in rows
    assert "adam My adam. conf/optimizer, hidden by lightning-adaptive" in rows
    shown = yaml.safe_load(command_line("train", "-cd", "conf", "optimizer=adam", "--cfg", "job").out)
    assert shown["optimizer"]["lr"] == 1e-3, "ours is the one that counts, as the list says"


def test_recipes_of_ones_own_come_before_ours(command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, what in (("recipes", "The near one."), ("shelf", "The far one.")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text(RECIPE.format(what=what))
    (tmp_path / "shelf" / "digits_adam_to_sgd.yaml").write_text(RECIPE.format(what="Another of this name."))
    monkeypatch.setenv("LIGHTNING_ADAPTIVE_PATH", f"{tmp_path / 'nowhere'}:{tmp_path / 'shelf'}")
    found = [(one.name, one.what, one.provider, one.hidden_by) for one in choices("recipes")]
    shelf = str(tmp_path / "shelf")
    ours = told(ROOT / "recipes" / "digits_adam_to_sgd.yaml")
    assert [row for row in found if row[0] in ("mine", "digits_adam_to_sgd")] == [
        ("digits_adam_to_sgd", "Another of this name.", shelf, ""),
        ("digits_adam_to_sgd", ours, "lightning-adaptive", shelf),
        ("mine", "The near one.", "recipes", ""),
        ("mine", "The far one.", shelf, "recipes"),
    ]
    shown = yaml.safe_load(command_line("train", "recipe=digits_adam_to_sgd", "--cfg", "job").out)
    assert shown["optimizer"] == {**shown["optimizer"], "_target_": "torch.optim.SGD", "lr": 0.25}, "the first one counts"


# Recipes


@pytest.mark.parametrize("typed", ["./shelf/mine", "./shelf/mine.yaml", "../{name}/shelf/mine", "{folder}/shelf/mine"])
def test_a_recipe_can_be_a_path(typed: str, train: Run, tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf" / "mine.yaml").write_text(RECIPE.format(what="Mine."))
    path = typed.format(name=tmp_path.name, folder=tmp_path)
    shown = yaml.safe_load(train(f"recipe={path}", "--cfg", "job").out)
    assert shown["optimizer"] == {**shown["optimizer"], "_target_": "torch.optim.SGD", "lr": 0.25}


def test_a_run_says_which_recipe_it_used_and_which_values_now_hold_for_another_choice(
    train: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ended = train("recipe=digits_adam_to_sgd", "optimizer@switch.optimizer=rmsprop", "switch.at=3st", *SHORT)
    assert ended.code == 0, ended.err
    said = [line for line in caplog.messages if line.startswith(("RECIPE", "recipe"))]
    assert said == [
        f"RECIPE {ROOT / 'recipes' / 'digits_adam_to_sgd.yaml'}",
        "recipe sets switch.optimizer.lr=0.03 for sgd; it now holds for rmsprop.",
    ]
    assert result(runs(tmp_path)[0])["phases"][1]["lr_first"] == [0.03]


@pytest.mark.parametrize(
    ("overrides", "sticks"),
    [
        ([], False),
        (["optimizer=adam"], False),  # what the recipe chose itself
        (["optimizer=adamw"], True),
        (["optimizer=adamw", "optimizer.lr=1e-4"], False),  # the user's own value
        (["optimizer=adamw", "+optimizer.foreach=true"], True),
        (["switch=none"], False),
    ],
)
def test_a_value_sticks_when_its_group_is_another_and_nobody_gave_another_value(overrides: list[str], sticks: bool) -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        whole = compose("train", ["recipe=digits_adam_to_sgd", *overrides], return_hydra_config=True)
        _, *said = lines(whole.hydra.runtime.choices, ["recipe=digits_adam_to_sgd", *overrides])
    line = "recipe sets optimizer.lr=0.003 for adam; it now holds for adamw."
    assert [other for other in said if " optimizer.lr=" in other] == [line] * sticks


# Completion


def completed(line: str, folder: Path, *, cword: int | None = None) -> list[str]:
    """What bash offers for a line, through the script that it was given."""
    words = line.split(" ")
    code = f"""
eval "$({SCRIPT} -sc install=bash)"
COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}; COMP_CWORD={len(words) - 1 if cword is None else cword}
PATH={SCRIPT.parent}:$PATH
hydra_bash_completion
echo "${{COMPREPLY[@]}}"
"""
    ended = subprocess.run(["bash", "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=True)
    return ended.stdout.split()


OPTIMIZERS_IN_A = sorted(path.stem for path in (ROOT / "conf" / "optimizer").glob("a*.yaml"))


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lightning-adaptive tr", ["train"]),
        ("lightning-adaptive list opt", ["optimizers"]),
        ("lightning-adaptive train optimizer=a", [f"optimizer={name}" for name in OPTIMIZERS_IN_A]),
        (
            "lightning-adaptive train seed=1 optimizer@switch.optimizer=a",
            [f"optimizer@switch.optimizer={name}" for name in OPTIMIZERS_IN_A],
        ),
        ("lightning-adaptive train optimizer@", ["optimizer@switch.optimizer="]),
        ("lightning-adaptive train recipe=digits_adam_to", ["recipe=digits_adam_to_sgd"]),
        ("lightning-adaptive train recipe=", [f"recipe={path.stem}" for path in sorted((ROOT / "recipes").glob("*.yaml"))]),
        ("lightning-adaptive train switch.optimizer.mom", ["switch.optimizer.momentum="]),
        ("lightning-adaptive train optimizer=sgd optimizer.nest", ["optimizer.nesterov="]),
        ("lightning-adaptive nonsense opt", []),
    ],
)
def test_bash_offers_what_can_be_typed(line: str, offered: list[str], tmp_path: Path) -> None:
    assert completed(line, tmp_path) == offered


def test_an_at_sign_does_not_part_words_in_bash(tmp_path: Path) -> None:
    script = subprocess.run([SCRIPT, "-sc", "install=bash"], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    code = 'COMP_WORDBREAKS=" =@:"; eval "$1"; echo "$COMP_WORDBREAKS"'
    ended = subprocess.run(["bash", "-c", code, "bash", script], capture_output=True, text=True, check=True)
    assert ended.stdout == " :\n"


def test_completion_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "os.environ['COMP_LINE'] = 'lightning-adaptive train optimizer=a'\n"
        "sys.argv = ['lightning-adaptive', '-sc', 'query=bash']\n"
        "from lightning_adaptive.app.cli import main\nmain()\n"
        "print([name for name in ('torch', 'lightning', 'hydra') if name in sys.modules], file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert ended.stderr == "['hydra']\n"
    assert ended.stdout.split() == [f"optimizer={name}" for name in OPTIMIZERS_IN_A]


# Help


def test_help_shows_what_can_be_typed_and_every_group(train: Run) -> None:
    ended = train("--help")
    assert ended.code == 0
    shown = ended.out.splitlines()
    assert shown[2] == "usage: lightning-adaptive train [flag ...] [option=value ...]"
    for group in ("optimizer", "scheduler", "switch", "recipe"):
        folder = ROOT / "recipes" if group == "recipe" else ROOT / "conf" / group
        assert f"{group}: {', '.join(sorted(path.stem for path in folder.glob('*.yaml')))}" in shown
    assert "    at: 70%" not in shown
    assert "  at: 70%" in shown


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["--version"], ["-c", "job", "-p", "optimizer"], ["-cd", ".", "--cfg=job"]])
def test_flags_stand_before_after_and_among_the_overrides(flags: list[str], train: Run, tmp_path: Path) -> None:
    shown = {
        train(*flags, "optimizer=sgd", "seed=7").out,
        train("optimizer=sgd", *flags, "seed=7").out,
        train("optimizer=sgd", "seed=7", *flags).out,
    }
    assert len(shown) == 1
    assert shown.pop()
    assert list(tmp_path.iterdir()) == []


def test_info_shows_where_things_come_from(train: Run) -> None:
    ended = train("--info", "searchpath", "optimizer=sgd")
    assert ended.code == 0
    # Hydra pads the columns to the longest path, which depends on where the checkout lies.
    assert re.search(r"\| lightning-adaptive +\| lightning_adaptive://recipes +\|", ended.out)
    assert "optimizer/sgd" in train("optimizer=sgd", "--info", "defaults").out
