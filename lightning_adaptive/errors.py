"""What a user can get wrong, as exceptions that know the config key and the exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def reading(whose: str, state: Mapping[str, Any], version: int) -> Iterator[None]:
    """Around a block that reads what a callback has saved: what cannot be read is a `CheckpointError`.

    Args:
        whose: the callback.
        state: what it has saved.
        version: the version that is read.

    Raises:
        CheckpointError: for another version, and for what the block cannot read.
    """
    if state.get("version") != version:
        raise CheckpointError(f"the checkpoint holds {whose}'s state in version {state.get('version')!r}, not {version}.")
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{whose}'s state in the checkpoint is damaged: {error!r}.") from error


@contextmanager
def within(prefix: str) -> Iterator[None]:
    """Errors of the settings in a block have their keys seen from further out; see `ConfigError.within`."""
    try:
        yield
    except ConfigError as error:
        raise error.within(prefix) from error.__cause__


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


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_number(value: Any, key: str) -> None:
    """Refuses what is not a number, with a `ConfigTypeError`."""
    if not is_number(value):
        raise ConfigTypeError(f"{value!r} is not a number.", key)


def check_share(value: Any, key: str, meaning: str, *, above_zero: bool = False, below_one: bool = False) -> None:
    """Refuses what does not lie within 0 and 1.

    Args:
        value: the value received.
        key: the setting's key.
        meaning: a sentence that says of what it is a share.
        above_zero: whether 0 itself is refused.
        below_one: whether 1 itself is refused.
    """
    check_number(value, key)
    if not 0 <= value <= 1 or (above_zero and value == 0) or (below_one and value == 1):
        raise ConfigError(f"{value!r} lies outside 0 to {'below ' * below_one}1. {meaning}", key)


def check_truth(value: Any, key: str) -> None:
    """Refuses what is not ``True`` or ``False``."""
    if not isinstance(value, bool):
        raise ConfigTypeError(f"{value!r} is neither true nor false.", key)


def check_count(value: Any, key: str, of: str, least: int = 1) -> None:
    """Refuses what is no whole number from the least on; ``of`` says what is counted."""
    is_whole = isinstance(value, int) and is_number(value)
    if not is_whole or value < least:
        message = f"{value!r} is no number of {of}. Write a whole number from {least} on."
        raise ConfigError(message, key) if is_whole else ConfigTypeError(message, key)


def check_word(value: Any, key: str, words: Iterable[str]) -> None:
    """Refuses what is none of the words, with the nearest one."""
    if value not in (allowed := tuple(words)):
        message = f"{value!r} is not one of {', '.join(allowed)}.{did_you_mean(str(value), allowed)}"
        raise ConfigError(message, key) if isinstance(value, str) else ConfigTypeError(message, key)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A sentence with the nearest option, or an empty string.

    >>> did_you_mean("momentun", ["lr", "momentum"])
    " Did you mean 'momentum'?"
    >>> did_you_mean("x", ["lr", "momentum"])
    ''
    """
    nearest = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""
