"""Which code a config may name: installed packages, the running application's own, and what the user gave a word for.

A config can come from anywhere, so a name is judged before anything is imported by it, and the word of trust is never in it.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from lightning_adaptive.errors import ConfigError

TRUST_VARIABLE = "LIGHTNING_ADAPTIVE_TRUST"
"""Environment variable with names, separated by colons, that a config may use besides the installed packages: packages, or the
full names of functions that make an optimizer or a scheduler."""

_OWN = ("torch", "lightning", "torchmetrics", "lightning_adaptive")


def names() -> set[str]:
    """What the user gave a word for."""
    return set(filter(None, os.environ.get(TRUST_VARIABLE, "").split(":")))


def check(target: str, key: str) -> None:
    """Refuses a name whose code a config may not bring in. Imports nothing.

    Args:
        target: dotted path of a class or function.
        key: the config key that holds it, for the message.

    Raises:
        ConfigError: for the standard library, a package that is not installed, a file that stands before an installed one, and a
            program within a package.
    """
    package, _, rest = target.partition(".")
    if package in sys.stdlib_module_names:
        raise ConfigError(f"{target!r} lies in the standard library, which a config may never name.", key)
    if "__main__" in rest.split("."):
        raise ConfigError(f"{target!r} is a program, which would run when it is imported.", key)
    if package in _OWN or package in _application() or {package, target} & names():
        return
    homes = _homes(package)
    how = f"If it is your own code, say so outside the config: --trust {package}, or {TRUST_VARIABLE}={package}."
    if not homes:
        raise ConfigError(f"{package!r} is not an installed package. {how}", key)
    for place in _places(package):
        if not any(_lies_in(place, home) for home in homes):
            raise ConfigError(f"{place} stands before the installed package {package!r}. {how}", key)


def check_all(tree: Any, key: str = "") -> None:
    """`check` for every ``_target_`` in a tree of mappings and lists; what is no text is left to who builds the node."""
    if isinstance(tree, Mapping):
        items = [(str(name), value) for name, value in tree.items()]
    elif isinstance(tree, Sequence) and not isinstance(tree, str):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return
    for name, value in items:
        inner = f"{key}.{name}" if key else name
        if name == "_target_" and isinstance(value, str) and value != "???":
            check(value, inner)
        check_all(value, inner)


def _application() -> set[str]:
    """The running program itself, and the package that holds it when it was started with ``python -m``."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return {"__main__", *([spec.name.partition(".")[0]] if spec else [])}


@functools.cache
def _packages() -> Mapping[str, Sequence[str]]:
    """The names of the distributions that hold each package; to read them takes a third of a second."""
    return importlib.metadata.packages_distributions()


@functools.cache
def _homes(package: str) -> tuple[Path, ...]:
    """The folders in which installed distributions keep a package."""
    listed = _packages().get(package, ())
    # An editable install may list no package at all; then it is known by its own name.
    found = [one for name in {*listed, package} for one in _distributions(name)]
    return tuple(_edited(one) or _folder(one) for one in found if listed or _edited(one))


def _distributions(name: str) -> list[importlib.metadata.Distribution]:
    """The installed distributions of a name, without those that only the working folder, or the script's, says to be installed."""
    main = sys.modules.get("__main__")
    script = getattr(main, "__file__", None) if getattr(main, "__spec__", None) is None else None
    loose = {Path.cwd(), *([Path(script).resolve().parent] if script else [])}
    found = importlib.metadata.distributions(name=name) if name else ()
    return [one for one in found if _folder(one).resolve() not in loose]


def _folder(distribution: importlib.metadata.Distribution) -> Path:
    return Path(os.path.abspath(str(distribution.locate_file(""))))


def _edited(distribution: importlib.metadata.Distribution) -> Path | None:
    """The project's folder of an editable install."""
    record = json.loads(distribution.read_text("direct_url.json") or "{}")
    editable = record.get("dir_info", {}).get("editable", False)
    return Path(unquote(urlparse(record["url"]).path)) if editable else None


def _places(package: str) -> list[Path]:
    """Where an import would find a package: its file, or the folders of one without, to each of which anybody may add."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return []
    found = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    return [place for place in map(Path, map(os.path.abspath, found)) if place.exists()]


def _lies_in(place: Path, home: Path) -> bool:
    # As written, for installers that link to files elsewhere; as resolved, for folders that are reached by a link.
    return place.is_relative_to(home) or place.resolve().is_relative_to(home.resolve())
