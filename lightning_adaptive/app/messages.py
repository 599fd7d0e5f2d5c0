"""Hydra's errors in the user's words: what was typed, what is allowed, the nearest name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.lightning_adaptive import data_folder
from lightning_adaptive.errors import did_you_mean

_SHOWN = 30


def hydra_message(error: CompactHydraException, arguments: Sequence[str]) -> str:
    """One message for an error that Hydra raised while it composed the config.

    Args:
        error: what Hydra raised.
        arguments: the command line without the sub-command.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_choice(error.missing_cfg_file, sorted(set(error.options or ())), arguments)
    first_line = str(error).strip().splitlines()[0]
    # A value for a key that does not exist, and a choice for a group that does not.
    unknown = re.match(r"Could not override '([^']+)'", first_line)
    return _unknown_key(unknown[1], arguments) if unknown else first_line


def _missing_choice(path: str, options: Sequence[str], arguments: Sequence[str]) -> str:
    group, _, choice = path.rpartition("/")
    typed = next((argument for argument in arguments if argument.partition("=")[2] == choice), f"{group}={choice}")
    shown = ", ".join(options[:_SHOWN]) + (", ..." if len(options) > _SHOWN else "")
    return f"{typed}: {group} has no {choice!r}.{did_you_mean(choice, options)} Choices: {shown or 'none'}."


def _unknown_key(key: str, arguments: Sequence[str]) -> str:
    """Hydra's own advice, to append the key with a plus, would only hide the mistake."""
    typed = next((argument for argument in arguments if argument.partition("=")[0] == key), key)
    parent, _, name = key.rpartition(".")
    keys = _keys(parent, [argument for argument in arguments if argument.partition("=")[0] != key])
    allowed = f" Keys: {', '.join(keys[:_SHOWN])}." if keys else ""
    return f"{typed}: there is no key {name!r}{f' in {parent}' if parent else ''}.{did_you_mean(name, keys)}{allowed}"


def _keys(parent: str, arguments: Sequence[str]) -> list[str]:
    """The keys of a node in the config that the other arguments compose; none if they are wrong as well."""
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    for flag, value in itertools.pairwise(arguments):
        if flag in ("-cd", "--config-dir"):
            overrides.append(f"hydra.searchpath=['file://{Path(value).resolve()}']")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
            config = compose("train", overrides)
        node = OmegaConf.select(config, parent) if parent else config
    except (CompactHydraException, OmegaConfBaseException):
        return []
    return [str(name) for name in node if not str(name).startswith("_")] if isinstance(node, DictConfig) else []
