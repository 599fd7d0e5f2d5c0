"""``lightning-adaptive list KIND``: what there is to choose, in a line each, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra_plugins.lightning_adaptive import data_folder, recipe_folders
from lightning_adaptive.app.arguments import ANY, parted
from lightning_adaptive.errors import ConfigError, did_you_mean
from lightning_adaptive.tables import columns

KINDS = {
    "optimizers": "optimizer",
    "schedulers": "scheduler",
    "param_groups": "param_groups",
    "switches": "switch",
    "triggers": "trigger",
    "handovers": "handover",
    "recipes": "recipe",
    "tasks": "task",
    "trainers": "trainer",
    "loggers": "logger",
    "callbacks": "callbacks",
}
"""Config groups by the word for several of their files."""

_OURS = "lightning-adaptive"


@dataclass(frozen=True)
class Choice:
    """A file of a config group.

    Args:
        name: what is typed after ``group=``.
        what: its first line.
        provider: where it lies.
        hidden_by: who has a file of the same name that comes before it; empty for none.
    """

    name: str
    what: str
    provider: str
    hidden_by: str = ""


def main(given: Sequence[str]) -> None:
    """Prints the choices of a kind, or the kinds.

    Raises:
        ConfigError: for a kind that there is not.
    """
    flags, words = parted(given, {"-cd": ANY, "--config-dir": ANY, "-h": (), "--help": ()})
    folders: list[Path] = []
    for name, value in flags:
        if value is None:
            print(f"usage: lightning-adaptive list [{'|'.join(KINDS)}] [-cd FOLDER]")
            return
        folders.append(Path(value))
        if not folders[-1].is_dir():
            raise ConfigError(f"{name} {value}: there is no such folder.")
    if not words:
        rows = [(kind, f"{len(choices(kind, folders))} to choose with {KINDS[kind]}=NAME") for kind in KINDS]
        print(*columns(rows), sep="\n")
    for word in words:
        kind = next((kind for kind, group in KINDS.items() if word in (kind, group)), None)
        if kind is None:
            raise ConfigError(f"there are no {word!r}.{did_you_mean(word, KINDS)} Kinds: {', '.join(KINDS)}.")
        found = [
            (one.name, one.what, one.provider + f", hidden by {one.hidden_by}" * bool(one.hidden_by))
            for one in choices(kind, folders)
        ]
        print(*columns(found), sep="\n")


def choices(kind: str, folders: Sequence[Path] = ()) -> list[Choice]:
    """The files of a kind, by name; of one name, the one that counts comes first.

    Args:
        kind: one of `KINDS`.
        folders: config folders of the user's, as ``-cd`` takes them.
    """
    found: dict[str, Choice] = {}
    others: list[Choice] = []
    for folder, provider in _sources(KINDS[kind], folders):
        for path in sorted(folder.glob("*.yaml")):
            one = Choice(path.stem, _first_line(path), provider, found[path.stem].provider if path.stem in found else "")
            if one.hidden_by:
                others.append(one)
            else:
                found[path.stem] = one
    return sorted([*found.values(), *others], key=lambda one: (one.name, bool(one.hidden_by)))


def _sources(group: str, folders: Sequence[Path]) -> Iterator[tuple[Path, str]]:
    """Folders with files of a group, in the order in which Hydra looks."""
    if group == "recipe":
        ours = data_folder("recipes").resolve()
        yield from ((folder, str(folder)) for folder in recipe_folders() if folder.resolve() != ours)
        yield ours, _OURS
        return
    yield data_folder("conf") / group, _OURS
    yield from ((folder / group, str(folder / group)) for folder in folders)


def _first_line(path: Path) -> str:
    """The comment that says what a file is."""
    with path.open(encoding="utf-8") as file:
        lines = [line.lstrip("# ").rstrip() for line in file if line.startswith("#") and "@package" not in line]
    return lines[0] if lines else ""
