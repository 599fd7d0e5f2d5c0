"""Completion in bash: Hydra's own, with the sub-commands before it, and with the groups of the next phase."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterable, Sequence

NAME = "lightning-adaptive"


def main(given: Sequence[str], commands: Iterable[str]) -> None:
    """Answers ``-sc install=bash``, ``uninstall=bash``, and ``query=bash``, which the shell asks with ``COMP_LINE``.

    Args:
        given: what follows ``-sc``.
        commands: the sub-commands.
    """
    if "query=bash" not in given:
        print(_of_hydra("train", given))
        if "install=bash" in given:
            print("COMP_WORDBREAKS=${COMP_WORDBREAKS//@}")  # optimizer@switch.optimizer is one word
        return
    _, *words = os.environ.get("COMP_LINE", "").split(" ")
    if len(words) < 2:
        print(" ".join(commands))
    elif words[0] == "list":
        from lightning_adaptive.app.list import KINDS

        print(" ".join(KINDS))
    elif words[0] in commands:
        print(" ".join(_choices(words[0], words[1:])))


def _choices(command: str, words: Sequence[str]) -> list[str]:
    *before, last = words
    group, at, place = last.partition("@")
    if not at or "=" not in place:
        places = [found for found in _places() if found.startswith(last)]
        return places if at else [*_query(command, words), *places]
    # Hydra completes the choices of a group, but not where it says for which place they are.
    place, _, choice = place.partition("=")
    return [f"{group}@{place}={found.partition('=')[2]}" for found in _query(command, [*before, f"{group}={choice}"])]


def _query(command: str, words: Sequence[str]) -> list[str]:
    os.environ["COMP_LINE"] = " ".join([NAME, *words])
    return _of_hydra(command, ["query=bash"]).split()


def _of_hydra(command: str, given: Sequence[str]) -> str:
    sys.argv = [NAME, "-sc", *given]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        importlib.import_module(f"lightning_adaptive.app.{command}").main()
    return shown.getvalue().rstrip()


def _places() -> list[str]:
    """The groups of the next phase, in the words that choose one of their files."""
    from hydra_plugins.lightning_adaptive import SWITCH_SLOTS, data_folder

    return [f"{group}@switch.{slot}=" for slot, group in SWITCH_SLOTS.items() if (data_folder("conf") / group).is_dir()]
