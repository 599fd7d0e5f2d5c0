"""The same files serve the source tree, an editable install and a wheel; and installing them changes nobody else's application.

Each way of installing has an environment of its own, which takes torch and the other packages from the running one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT

MODES = ("source", "editable", "wheel")
DATA = ("conf", "recipes")


@dataclass
class Environment:
    """A fresh environment with the package in it."""

    mode: str
    python: Path
    package: Path

    def run(self, arguments: Sequence[str | Path], folder: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs its Python in a folder, without what the running environment would lend it."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LIGHTNING_ADAPTIVE"))}
        if self.mode == "source":
            environment["PYTHONPATH"] = str(ROOT)
        ended = subprocess.run(
            [self.python, *arguments],
            cwd=folder,
            env={**environment, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or ended.returncode == 0, ended.stderr
        return ended

    def evaluate(self, code: str, folder: Path) -> str:
        return self.run(["-c", code], folder).stdout.strip()


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    ended = subprocess.run(build, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


@pytest.fixture(scope="session")
def environment_of(distributions: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Environment]:
    made: dict[str, Environment] = {}

    def environment_of(mode: str) -> Environment:
        if mode not in made:
            made[mode] = _environment(mode, distributions, tmp_path_factory.mktemp(mode))
        return made[mode]

    return environment_of


def _environment(mode: str, distributions: Path, folder: Path) -> Environment:
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    [site] = folder.glob("lib/python*/site-packages")
    # A path in a .pth file lends its packages, but not its own .pth files, among which is our editable install.
    lent = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "lent.pth").write_text("\n".join(lent))
    what = {"wheel": [str(path) for path in distributions.glob("*.whl")], "editable": ["--editable", str(ROOT)], "source": []}[mode]
    if what:
        # Ignoring what is installed: the lent packages hold this package too.
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet"]
        install = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, *what]
        subprocess.run(install, capture_output=True, text=True, timeout=120, check=True)
    return Environment(mode, python, (site if mode == "wheel" else ROOT) / "lightning_adaptive")


@pytest.fixture(params=MODES)
def environment(request: pytest.FixtureRequest, environment_of: Callable[[str], Environment]) -> Environment:
    return environment_of(request.param)


@pytest.fixture
def wheel(environment_of: Callable[[str], Environment]) -> Environment:
    return environment_of("wheel")


def data_files() -> dict[str, bytes]:
    """All but the page about the recipes, whose picture and command are in the source tree only."""
    paths = [path for name in DATA for path in (ROOT / name).rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(paths) >= 92, "so many there were when this was written"
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths}


# What is in the distributions


def test_the_wheel_holds_the_data_within_the_package(distributions: Path) -> None:
    [path] = distributions.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        held = {name: wheel.read(f"lightning_adaptive/{name}") for name in data_files()}
    assert held == data_files()
    assert "lightning_adaptive/recipes/README.md" not in names
    tops = {name.partition("/")[0] for name in names}
    assert {re.sub(r"-[^-]+\.dist-info$", ".dist-info", top) for top in tops} == {
        "lightning_adaptive",
        "hydra_plugins",
        "lightning_adaptive.dist-info",
    }
    assert "lightning_adaptive/py.typed" in names
    assert "hydra_plugins/lightning_adaptive/__init__.py" in names
    assert "hydra_plugins/__init__.py" not in names, "it would hide other packages' plugins"
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names) == (ROOT / "LICENSE").is_file()


def test_the_source_distribution_holds_all_four_folders(distributions: Path) -> None:
    [path] = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(data_files()) <= names
    assert {"pyproject.toml", "lightning_adaptive/__init__.py", "hydra_plugins/lightning_adaptive/__init__.py"} <= names


# The same in every mode


def test_code_and_data_come_from_this_installation(environment: Environment, tmp_path: Path) -> None:
    code = (
        "import lightning_adaptive, hydra_plugins.lightning_adaptive as plugin\n"
        "print(lightning_adaptive.__file__)\n"
        "print(plugin.data_folder('conf'))\n"
        "print(plugin.data_folder('recipes'))"
    )
    package, *folders = environment.evaluate(code, tmp_path).splitlines()
    assert Path(package) == environment.package / "__init__.py"
    home = environment.package if environment.mode == "wheel" else ROOT
    assert [Path(folder) for folder in folders] == [home / name for name in DATA]


def test_the_default_run_composes_in_an_empty_folder(environment: Environment, tmp_path: Path) -> None:
    shown = yaml.safe_load(environment.run(["-m", "lightning_adaptive", "train", "--cfg", "job"], tmp_path).stdout)
    assert shown["optimizer"]["_target_"] == "torch.optim.Adam"
    assert shown["switch"]["optimizer"]["_target_"] == "torch.optim.SGD"
    assert os.listdir(tmp_path) == []


def test_a_recipe_is_found_by_its_name(environment: Environment, tmp_path: Path) -> None:
    arguments = ["-m", "lightning_adaptive", "train", "recipe=digits_adam_to_sgd", "switch.at=3ep", "--cfg", "job"]
    shown = yaml.safe_load(environment.run(arguments, tmp_path).stdout)
    recipe = yaml.safe_load((ROOT / "recipes" / "digits_adam_to_sgd.yaml").read_text(encoding="utf-8"))
    assert shown["optimizer"]["lr"] == recipe["optimizer"]["lr"]
    assert shown["switch"]["at"] == "3ep"


FOREIGN = """
import hydra
from omegaconf import OmegaConf


@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(config):
    print(OmegaConf.to_yaml(config))


if __name__ == "__main__":
    main()
"""


def foreign(folder: Path, config: str, **others: str) -> Path:
    """Somebody else's application; other files of its configuration by their path, with ``__`` for a slash."""
    (folder / "app.py").write_text(FOREIGN)
    for name, text in {"app": config, **others}.items():
        path = folder / "conf" / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "app.py"


def test_a_foreign_application_gets_our_groups_with_one_line(environment: Environment, tmp_path: Path) -> None:
    app = foreign(
        tmp_path,
        "defaults:\n  - optimizer: adamw\n  - scheduler: cosine\n  - switch: adam_to_sgd\n  - _self_\n"
        'hydra:\n  searchpath: ["lightning_adaptive://"]\n',
        optimizer__mine="_target_: mine.Mine\nlr: 3\n",
        optimizer__adamw="_target_: mine.AdamW\n",
    )
    shown = yaml.safe_load(environment.run([app, "switch.at=3ep", "optimizer@switch.optimizer=mine"], tmp_path).stdout)
    assert shown["optimizer"] == {"_target_": "mine.AdamW"}, "its own file wins"
    assert shown["scheduler"]["_target_"] == "lightning_adaptive.Cosine"
    assert shown["switch"]["_target_"] == "lightning_adaptive.OptimizerSwitchCallback"
    assert shown["switch"]["at"] == "3ep"
    assert shown["switch"]["optimizer"] == {"_target_": "mine.Mine", "lr": 3}, "its file stands beside ours"


def test_our_own_groups_are_not_given_to_a_foreign_application(environment: Environment, tmp_path: Path) -> None:
    app = foreign(tmp_path, 'defaults:\n  - _self_\nhydra:\n  searchpath: ["lightning_adaptive://"]\n')
    ours = {"trainer": "cpu", "task": "digits", "recipe": "digits_adam_to_sgd"}
    ended = environment.run([app, *(f"+{group}={name}" for group, name in ours.items())], tmp_path)
    assert yaml.safe_load(ended.stdout) == ours, "plain values of its own"


def test_installing_changes_nothing_in_a_foreign_application(environment: Environment, tmp_path: Path) -> None:
    app = foreign(tmp_path, "optimizer: adam\nswitch: false\n")
    shown = yaml.safe_load(environment.run([app, "optimizer=sgd"], tmp_path).stdout)
    assert shown == {"optimizer": "sgd", "switch": False}


def test_entries_of_a_foreign_config_store_stay(wheel: Environment, tmp_path: Path) -> None:
    app = tmp_path / "app.py"
    store = (
        "from hydra.core.config_store import ConfigStore\n"
        "ConfigStore.instance().store(group='optimizer', name='adam', node={'theirs': True})\n"
        "ConfigStore.instance().store(name='app', node={'defaults': [{'optimizer': 'adam'}]})\n"
    )
    app.write_text(store + FOREIGN.replace('config_path="conf"', "config_path=None"))
    assert yaml.safe_load(wheel.run([app], tmp_path).stdout) == {"optimizer": {"theirs": True}}


def test_an_address_that_does_not_exist_is_an_error(wheel: Environment, tmp_path: Path) -> None:
    app = foreign(tmp_path, 'hydra:\n  searchpath: ["lightning_adaptive://optimizers"]\n')
    ended = wheel.run([app], tmp_path, check=False)
    assert ended.returncode != 0
    assert "lightning_adaptive://optimizers: there are lightning_adaptive:// and lightning_adaptive://recipes" in ended.stderr


def test_the_wheel_trains_from_an_empty_folder(wheel: Environment, tmp_path: Path) -> None:
    script = wheel.python.with_name("lightning-adaptive")
    assert script.read_text(encoding="utf-8").startswith(f"#!{wheel.python.parent}"), "the script runs in this environment"
    arguments = [
        "recipe=digits_adam_to_sgd",
        "trainer.max_epochs=2",
        "trainer.limit_train_batches=4",
        "switch.at=1ep",
        "test=false",
    ]
    ended = wheel.run([script, "train", *arguments], tmp_path)
    assert "SWITCH at step 4 (epoch 1): Adam" in ended.stdout + ended.stderr
    assert os.listdir(tmp_path) == ["outputs"]
    [run] = (tmp_path / "outputs").iterdir()
    assert (run / "result.json").is_file()
    assert (run / "run.png").is_file()


# What is imported, and when


def imported(code: str, *names: str) -> list[str]:
    """Which of some packages a piece of code imports in a process of its own."""
    program = f"import sys\n{code}\nprint([name for name in {names!r} if name in sys.modules], file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return yaml.safe_load(ended.stderr.splitlines()[-1])


def test_the_plugin_imports_neither_torch_nor_the_package() -> None:
    heavy = ("torch", "lightning", "lightning_adaptive", "numpy")
    assert imported("import hydra_plugins.lightning_adaptive", *heavy) == []
    assert imported("import numpy", *heavy) == ["numpy"], "the probe sees what is imported"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--cfg", "job"], ["train", "optimizer=adamv"]])
def test_help_and_slips_of_the_pen_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        f"sys.argv = ['lightning-adaptive', *{arguments}]\n"
        "from lightning_adaptive.app.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert imported(code, "torch", "lightning", "matplotlib", "hydra") == ([] if arguments == ["--help"] else ["hydra"])
