"""The address ``lightning_adaptive://`` for Hydra's search path.

It hides where the files lie: beside the package in the source tree and an editable install, inside it in a wheel. Hydra imports
this module at every start, so it imports neither torch nor the package.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

SCHEME = "lightning_adaptive"
SWITCH_SLOTS = {
    "optimizer": "optimizer",
    "scheduler": "scheduler",
    "param_groups": "param_groups",
    "when": "trigger",
    "handover": "handover",
    "then": "switch",
}
"""The slots of a switch, each with the group whose files fill it."""

PHASE_GROUPS = tuple(SWITCH_SLOTS.values())
"""The groups that any application may use; the others are for our own."""

RECIPES_ADDRESS = f"{SCHEME}://recipes"
RECIPE_PATH_VARIABLE = "LIGHTNING_ADAPTIVE_PATH"
"""Environment variable with folders, separated by colons, in which recipes are looked for after ``./recipes``."""


def data_folder(name: str) -> Path:
    """The folder ``conf`` or ``recipes``, wherever this installation keeps it.

    Raises:
        FileNotFoundError: when the installation has no such folder.
    """
    spec = importlib.util.find_spec("lightning_adaptive")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the package lightning_adaptive is not installed")
    package = Path(spec.origin).parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{name}/ lies neither in {package} nor beside it")


def recipe_folders() -> list[Path]:
    """Where recipes are looked for, in this order: ``./recipes``, those of `RECIPE_PATH_VARIABLE`, ours."""
    named = [Path(folder) for folder in os.environ.get(RECIPE_PATH_VARIABLE, "").split(":") if folder]
    return [folder for folder in (Path("recipes"), *named, data_folder("recipes")) if folder.is_dir()]


def recipe_file(name: str) -> Path:
    """The file of a recipe, which need not exist: a path (``./mine``, ``/tmp/mine``), or the first of its name in the folders."""
    given = Path(name if name.endswith(".yaml") else f"{name}.yaml")
    folders = recipe_folders()
    if given.is_absolute() or name.startswith(("./", "../")):
        return given
    return next((folder / given for folder in folders if (folder / given).is_file()), folders[-1] / given)


class PhaseGroupSource(FileConfigSource):
    """Serves ``lightning_adaptive://`` (the phase groups) and ``lightning_adaptive://recipes`` (the group ``recipe``)."""

    def __init__(self, provider: str, path: str) -> None:
        super().__init__(provider, path)
        if self.path not in ("", "recipes"):
            raise ValueError(f"{path}: there are {SCHEME}:// and {RECIPES_ADDRESS}")

    @staticmethod
    def scheme() -> str:
        """The scheme of the address."""
        return SCHEME

    def available(self) -> bool:
        """Always: an installation without its folders fails with a reason."""
        return True

    def load_config(self, config_path: str) -> ConfigResult:
        """Loads a file of a group.

        Raises:
            ConfigCompositionException: for a recipe that reaches beyond the run.
        """
        source, path = self._locate(config_path)
        result = source.load_config(path)
        if self.path:
            _check_recipe(path.removesuffix(".yaml"), result)
        result.path, result.provider = self.full_path(), self.provider
        return result

    def is_group(self, config_path: str) -> bool:
        """Whether the address has such a group."""
        source, path = self._locate(config_path)
        return self._serves(config_path) and source.is_group(path)

    def is_config(self, config_path: str) -> bool:
        """Whether the address has such a file."""
        source, path = self._locate(config_path)
        return self._serves(config_path) and source.is_config(path)

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """The names in a group."""
        if config_path in ("", "."):
            groups = ["recipe"] if self.path else [name for name in PHASE_GROUPS if self.is_group(name)]
            return [] if results_filter == ObjectType.CONFIG else groups
        if not self.path:
            return FileConfigSource("", str(data_folder("conf"))).list(config_path, results_filter)
        names = (FileConfigSource("", str(folder)).list("", results_filter) for folder in recipe_folders())
        return sorted({name for found in names for name in found})

    def _serves(self, config_path: str) -> bool:
        first = config_path.partition("/")[0]
        return first in ("", ".") or (first == "recipe" if self.path else first in PHASE_GROUPS)

    def _locate(self, config_path: str) -> tuple[FileConfigSource, str]:
        """The folder that holds a path, and the path within it."""
        if not self.path:
            return FileConfigSource("", str(data_folder("conf"))), config_path
        name = config_path.removeprefix("recipe").removeprefix("/")
        if not name:
            return FileConfigSource("", str(data_folder("recipes"))), name
        file = recipe_file(name)
        return FileConfigSource("", str(file.parent.resolve())), file.name


def _check_recipe(name: str, result: ConfigResult) -> None:
    """A recipe may come from anywhere, and Hydra's own settings name code (logging, launchers) and environment variables."""
    package = result.header.get("package")
    reaches_hydra = isinstance(result.config, DictConfig) and "hydra" in result.config
    if package != "_global_" or reaches_hydra:
        fault = "it sets the key 'hydra', which only the command line may" if reaches_hydra else f"its package is {package!r}"
        raise ConfigCompositionException(f"recipe={name}: {fault}. A recipe begins with '# @package _global_' and chooses a run.")


class RecipeSearchPath(SearchPathPlugin):
    """Adds the recipes to our own application's search path, and to nobody else's.

    The primary config could name them, but ``hydra.searchpath`` on the command line replaces that list.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra for every application."""
        ours = str(data_folder("conf"))
        if any(element.provider == "main" and element.path.removeprefix("file://") == ours for element in search_path.get_path()):
            search_path.append(provider="lightning-adaptive", path=RECIPES_ADDRESS)
