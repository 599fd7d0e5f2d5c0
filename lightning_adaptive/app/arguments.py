"""What was typed, as Hydra wants it: its flags first, no setting twice, values quoted that its grammar refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence

from lightning_adaptive.errors import ConfigError, did_you_mean
from lightning_adaptive.trust import TRUST_VARIABLE

Flag = tuple[str, str | None]
"""A flag with its value, if it has one."""

ANY: Sequence[str] = ("VALUE",)
"""In a table of flags: the flag needs a value, whatever it is."""

_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_FLAGS: dict[str, Sequence[str]] = {
    **dict.fromkeys(("-h", "--help", "--hydra-help", "--version", "-r", "--run", "-m", "--multirun", "--resolve"), ()),
    **dict.fromkeys(("-sc", "--shell-completion"), ()),
    **dict.fromkeys(("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir"), ANY),
    **dict.fromkeys(("--experimental-rerun", "--trust"), ANY),
    **dict.fromkeys(("-i", "--info"), _INFO),
}
"""Hydra's flags and ours, each with the values that it may have."""


def for_hydra(given: Sequence[str]) -> list[str]:
    """The command line that Hydra gets.

    ``--trust NAME`` moves into the environment, and a run that goes on gets its settings back.

    Args:
        given: what was typed after the sub-command.

    Raises:
        ConfigError: for an unknown flag, a flag without its value, or a setting that is given twice.
        CheckpointError: for a run that cannot go on.
    """
    flags, overrides = parted(given, _FLAGS)
    _check_once(overrides)
    _take_trust([value for name, value in flags if name == "--trust" and value])
    taken = [word for flag in flags if flag[0] != "--trust" for word in flag if word is not None] + overrides
    if any(override.startswith("resume=") for override in overrides):
        from lightning_adaptive.app.resume import with_settings

        taken = with_settings(taken)
    return [_quoted(item) if item.lstrip("+").startswith("ckpt_path=") else item for item in taken]


def parted(given: Sequence[str], known: Mapping[str, Sequence[str]]) -> tuple[list[Flag], list[str]]:
    """Flags and the other words, which Hydra wants in one row.

    Args:
        given: what was typed.
        known: the values that each flag may have: none, some, or `ANY`, of which it needs one.

    Raises:
        ConfigError: for an unknown flag, or one without the value that it needs.
    """
    flags: list[Flag] = []
    words: list[str] = []
    rest = list(given)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif name not in known or (equals and known[name] == ()):
            shown = [flag for flag in known if flag.startswith("--")]
            raise ConfigError(f"{word}: there is no such flag.{did_you_mean(name, shown)} Flags: {', '.join(shown)}.")
        elif equals:
            flags.append((name, value))
        elif known[name] is ANY:
            if not rest:
                raise ConfigError(f"{name} needs {'the name of a package' if name == '--trust' else 'a value'}.")
            flags.append((name, rest.pop(0)))
        else:
            flags.append((name, rest.pop(0) if rest and rest[0] in known[name] else None))
    return flags, words


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


def _take_trust(names: Sequence[str]) -> None:
    """Moves what ``--trust`` names into the environment, where the processes that Lightning starts see it too."""
    if names:
        os.environ[TRUST_VARIABLE] = ":".join([*filter(None, [os.environ.get(TRUST_VARIABLE)]), *names])
    if os.environ.get(TRUST_VARIABLE) and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where a trusted package lies; a console script does not look there


def _quoted(override: str) -> str:
    """Quotes a path: Lightning's default names hold ``=``, which Hydra's grammar refuses."""
    key, _, value = override.partition("=")
    if not value or value == "null" or value[0] in "'\"":
        return override
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"
