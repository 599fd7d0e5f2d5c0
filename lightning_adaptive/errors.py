"""What a user can get wrong, as exceptions that know the config key and the exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(Exception):
    """An error whose cure is in the user's hands; the command line shows its text and no traceback."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """A setting that cannot be used.

    Args:
        message: the value received and what to do about it.
        key: the setting's key, as the user would type it, for example ``switch.at``.
    """

    exit_code = 2

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message, key)
        self.message = message
        self.key = key

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message

    def within(self, prefix: str) -> ConfigError:
        """The same error, its key seen from further out: ``at`` within ``switch`` is ``switch.at``."""
        return type(self)(self.message, ".".join(part for part in (prefix, self.key) if part))


class ConfigTypeError(ConfigError, TypeError):
    """A setting of the wrong type, for example an optimizer where a factory of optimizers belongs."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is missing, damaged, or does not fit this run."""

    exit_code = 3


def check_factory(value: Any, base: type, key: str) -> None:
    """Refuses what is not a factory.

    Raises:
        ConfigTypeError: for an instance of ``base`` (it holds its own parameters already), and for what cannot be called.
    """
    if isinstance(value, base):
        name = type(value).__name__
        raise ConfigTypeError(
            f"a {name} that is already built holds its own parameters. Pass a factory: partial({name}, ...) from functools.", key
        )
    if not callable(value):
        raise ConfigTypeError(f"{value!r} is not a factory. Pass a class, or partial(...) of one.", key)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A sentence with the nearest option, or an empty string.

    >>> did_you_mean("momentun", ["lr", "momentum"])
    " Did you mean 'momentum'?"
    >>> did_you_mean("x", ["lr", "momentum"])
    ''
    """
    nearest = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
