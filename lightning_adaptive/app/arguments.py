"""What was typed, as Hydra wants it: its flags first, no setting twice, values quoted that its grammar refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence

from lightning_adaptive.errors import ConfigError, did_you_mean
from lightning_adaptive.trust import TRUST_VARIABLE

_SWITCHES = (
    *("-h", "--help", "--hydra-help", "--version", "-r", "--run", "-m", "--multirun", "--resolve", "-sc", "--shell-completion"),
)
_VALUED = (
    *("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"),
    *("--experimental-rerun", "--trust"),
)
_OPTIONAL = dict.fromkeys(("-i", "--info"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"))


def for_hydra(given: Sequence[str]) -> list[str]:
    """The command line that Hydra gets.

    ``--trust NAME`` moves into the environment, and a run that goes on gets its settings back.

    Args:
        given: what was typed after the sub-command.

    Raises:
        ConfigError: for an unknown flag, a flag without its value, or a setting that is given twice.
        CheckpointError: for a run that cannot go on.
    """
    flags, overrides = _parted(given)
    _check_once(overrides)
    taken = [*_take_trust(flags), *overrides]
    if any(override.startswith("resume=") for override in overrides):
        from lightning_adaptive.app.resume import with_settings

        taken = with_settings(taken)
    return [_quoted(item) if item.lstrip("+").startswith("ckpt_path=") else item for item in taken]


def _parted(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and overrides. Hydra itself wants all overrides in one row."""
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(given)
    while rest:
        item = rest.pop(0)
        name, equals, _ = item.partition("=")
        if not item.startswith("-"):
            overrides.append(item)
            continue
        flags.append(item)
        if name in _VALUED and not equals:
            if not rest:
                raise ConfigError(f"{name} needs {'the name of a package' if name == '--trust' else 'a value'}.")
            flags.append(rest.pop(0))
        elif name in _OPTIONAL and rest and rest[0] in _OPTIONAL[name]:
            flags.append(rest.pop(0))
        elif name not in (*_SWITCHES, *_VALUED, *_OPTIONAL):
            known = [flag for flag in (*_SWITCHES, *_VALUED, *_OPTIONAL) if flag.startswith("--")]
            raise ConfigError(f"{item}: there is no such flag.{did_you_mean(name, known)} Flags: {', '.join(known)}.")
    return flags, overrides


def _check_once(overrides: Iterable[str]) -> None:
    """Hydra takes the last of two values in silence."""
    seen: dict[str, str] = {}
    for override in overrides:
        key = override.lstrip("+").partition("=")[0]
        if override.startswith("~"):
            continue
        if key in seen:
            raise ConfigError(f"{seen[key]}: given twice. {override} would win; leave one of them out.")
        seen[key] = override


def _take_trust(flags: Sequence[str]) -> list[str]:
    """Moves ``--trust NAME`` into the environment, where the processes that Lightning starts see it too."""
    rest: list[str] = []
    names: list[str] = []
    iterator = iter(flags)
    for flag in iterator:
        if flag == "--trust":
            names.append(next(iterator))
        elif flag.startswith("--trust="):
            names.append(flag.removeprefix("--trust="))
        else:
            rest.append(flag)
    if names:
        os.environ[TRUST_VARIABLE] = ":".join([*filter(None, [os.environ.get(TRUST_VARIABLE)]), *names])
    if os.environ.get(TRUST_VARIABLE) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a trusted package lies; a console script does not look there
    return rest


def _quoted(override: str) -> str:
    """Quotes a path: Lightning's default names hold ``=``, which Hydra's grammar refuses."""
    key, _, value = override.partition("=")
    if not value or value == "null" or value[0] in "'\"":
        return override
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"
