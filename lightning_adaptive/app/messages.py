"""Hydra's errors in the user's words: what was typed, what is allowed, the nearest name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.lightning_adaptive import SWITCH_SLOTS, data_folder
from lightning_adaptive.errors import did_you_mean

_SHOWN = 30
_NO_NAME = re.compile(r"null|true|false|[-+.\d].*|", re.IGNORECASE)
"""What Hydra reads as something else than the name of a file."""


def hydra_message(error: CompactHydraException | OSError | ValueError, arguments: Sequence[str]) -> str:
    """One message for an error that Hydra raised before a job began: composing the config, making the run's folder.

    Args:
        error: what Hydra raised.
        arguments: the command line without the sub-command.
    """
    if isinstance(error, OSError) and not isinstance(error, CompactHydraException):
        return f"{error.filename}: {error.strerror}. A run writes there: hydra.run.dir=FOLDER names another place."
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read. Write key=value, and quote a value with special characters: \"key='a=b'\"."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_choice(error.missing_cfg_file, arguments)
    first_line, *others = str(error).strip().splitlines() or [type(error).__name__]
    for pattern, explain in _EXPLAINED:
        if match := pattern.match(first_line):
            return explain(match[1], others, arguments)
    return first_line


def _missing_choice(path: str, arguments: Sequence[str]) -> str:
    """A name that its group does not have; ``path`` is ``group/name``."""
    known = _groups(arguments)
    group = next((path[:end] for end in _slashes(path) if path[:end] in known), path.rpartition("/")[0])
    choice = path.removeprefix(f"{group}/")
    if not group:
        return f"-cn {choice}: there is no such config. Ours is train; one of your own lies in the folder of -cd."
    options = _options(group, arguments)
    typed = next(
        (argument for argument in arguments if choice in argument.partition("=")[2] and _group(argument) == group),
        f"{group}={choice}",
    )
    return f"{typed}: {group} has no {choice!r}.{did_you_mean(choice, options)} Choices: {_listed(options)}."


def _no_choice(_: str, __: Sequence[str], arguments: Sequence[str]) -> str:
    """A value that is no name, where a group needs one: ``switch=null``."""
    groups = _groups(arguments)
    for argument in arguments:
        group, value = _group(argument), argument.partition("=")[2]
        if "=" in argument and group in groups and _NO_NAME.fullmatch(value):
            return f"{argument}: {value!r} is not the name of a file of {group}. Choices: {_listed(_options(group, arguments))}."
    return "a group needs the name of one of its files."


def _unknown_key(key: str, others: Sequence[str], arguments: Sequence[str]) -> str:
    """Hydra's own advice, to append the key with a plus, would only hide the mistake."""
    if "@" in key:
        return _unknown_place(key, others, arguments)
    parent, _, name = key.rpartition(".")
    slot = parent.rpartition(".")[2]
    keys = _keys(parent, [argument for argument in arguments if _key(argument) != key])
    group = SWITCH_SLOTS.get(slot, slot)
    if not keys and group in _groups(arguments):
        place = f"{group}@{parent}" if "." in parent else group
        choices = _listed(_options(group, arguments))
        return f"{_typed(key, arguments)}: {parent} is empty. Choose a file for it first: {place}={choices.partition(',')[0]}."
    if key in _groups(arguments):
        inner = [argument for argument in arguments if _key(argument) != key]
        return f"{_typed(key, arguments)}: it sets what {key} does not have. Keys: {_listed(_keys(key, inner))}."
    if name in keys:
        return f"{_typed(key, arguments)}: the value is null, and Hydra takes out only what has one. Leave it as it is."
    allowed = f" Keys: {_listed(keys)}." if keys else ""
    where = f" in {parent}" if parent else ""
    return f"{_typed(key, arguments)}: there is no key {name!r}{where}.{did_you_mean(name, keys)}{allowed}"


def _unknown_place(key: str, others: Sequence[str], arguments: Sequence[str]) -> str:
    """A group chosen for a place that the config does not have; Hydra names those that it has."""
    known = re.search(r"one of (.+)\?", " ".join(others))
    places = known[1].split(", ") if known else []
    return f"{_typed(key, arguments)}: there is no place {key!r}.{did_you_mean(key, places)} Places: {_listed(places)}."


def _unknown_group(group: str, _: Sequence[str], arguments: Sequence[str]) -> str:
    groups = _groups(arguments)
    typed = next((argument for argument in arguments if _group(argument) == group), group)
    return f"{typed}: there is no group {group!r}.{did_you_mean(group, groups)} Groups: {', '.join(groups)}."


def _several_values(override: str, _: Sequence[str], __: Sequence[str]) -> str:
    return f"{override}: several values. Add -m to run each of them, or write a list in brackets: [1,2]."


def _chosen_already(group: str, _: Sequence[str], arguments: Sequence[str]) -> str:
    return f"{_typed(group, arguments)}: {group} is chosen already. Write it without the plus, to choose another."


def _added_group(override: str, _: Sequence[str], __: Sequence[str]) -> str:
    return f"{override}: a group is chosen without a plus: {override.lstrip('+')}."


def _there_already(key: str, _: Sequence[str], arguments: Sequence[str]) -> str:
    return f"{_typed(key, arguments)}: {key} is there already. Write it without the plus, to change it."


_EXPLAINED = [
    (re.compile(r"force-add of config groups is not supported: '(.+)'"), _added_group),
    (re.compile(r"(Config group override must be a string)"), _no_choice),
    (re.compile(r"(?:Could not override|Could not delete from config\.) '([^']+)'"), _unknown_key),
    (re.compile(r"Override \S+ looks like .* config group '([^']+)' does not exist"), _unknown_group),
    (re.compile(r"Ambiguous value for argument '(.+)'$"), _several_values),
    (re.compile(r"Multiple values for ([^.\s]\S*)\. "), _chosen_already),
    (re.compile(r"Could not append to config\. An item is already at '([^']+)'"), _there_already),
]
"""How the first lines of Hydra's errors begin, and what says the same in the user's words."""


def _keys(parent: str, arguments: Sequence[str]) -> list[str]:
    """The keys of a node in the config that the other arguments compose; none if they are wrong as well."""
    try:
        with _composer():
            config = compose("train", _overrides(arguments))
        node = OmegaConf.select(config, parent) if parent else config
    except (CompactHydraException, OmegaConfBaseException, ValueError):
        return []
    return [str(name) for name in node if not str(name).startswith("_")] if isinstance(node, DictConfig) else []


def _options(group: str, arguments: Sequence[str]) -> list[str]:
    with _composer() as loader:
        return sorted(loader.get_group_options(group, config_name="train", overrides=_search_path(arguments)))


def _groups(arguments: Sequence[str]) -> list[str]:
    with _composer() as loader:
        # Composed once for its search path, which is where ``-cd`` belongs.
        loader.load_configuration("train", _search_path(arguments), RunMode.RUN)
        return sorted(group for group in loader.list_groups("") if group != "hydra")


@contextmanager
def _composer() -> Iterator[ConfigLoader]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def _overrides(arguments: Sequence[str]) -> list[str]:
    return [argument for argument in arguments if "=" in argument and not argument.startswith("-")] + _search_path(arguments)


def _search_path(arguments: Sequence[str]) -> list[str]:
    """The folder of ``-cd`` as an override, which is what the Compose API takes."""
    folders = [value for flag, value in itertools.pairwise(arguments) if flag in ("-cd", "--config-dir")]
    return [f"hydra.searchpath=['file://{Path(folder).resolve()}']" for folder in folders]


def _typed(key: str, arguments: Sequence[str]) -> str:
    return next((argument for argument in arguments if _key(argument) == key), key)


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def _group(argument: str) -> str:
    return _key(argument).partition("@")[0]


def _slashes(path: str) -> list[int]:
    return [index for index, character in enumerate(path) if character == "/"]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") or "none"
