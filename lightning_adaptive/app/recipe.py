"""What a run says of its recipe: which file it was, and which of its values now hold for another choice than they were made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose

from hydra_plugins.lightning_adaptive import recipe_file


def lines(choices: Mapping[str, str | None], overrides: Sequence[str]) -> list[str]:
    """Lines for the user; none without a recipe. Called while Hydra runs.

    Hydra lays a recipe's values over whatever was chosen: ``recipe=X optimizer=sgd`` keeps the learning rate that X sets for Adam.

    Args:
        choices: the file of each group, ``hydra.runtime.choices``.
        overrides: what was typed.
    """
    name = choices.get("recipe")
    if name is None:
        return []
    path = recipe_file(name)
    made_for = compose("train", [f"recipe={name}"], return_hydra_config=True).hydra.runtime.choices
    # The place of a group in the config, and its file by the recipe and by what was typed.
    places = {group.partition("@")[2] or group: (made_for.get(group), chosen) for group, chosen in choices.items()}
    typed = {override.lstrip("+~").partition("=")[0] for override in overrides}
    return [f"RECIPE {path}", *_sticking(_values(path), places, typed)]


def _sticking(values: Mapping[str, Any], places: Mapping[str, tuple[str | None, str | None]], typed: set[str]) -> Iterator[str]:
    for key, value in values.items():
        parents = [key[:end] for end, character in enumerate(key) if character == "."]
        place = next((parent for parent in reversed(parents) if parent in places), None)
        if place is None or typed & {key, *parents[parents.index(place) + 1 :]}:
            continue
        was, now = places[place]
        if was != now:
            yield f"recipe sets {key}={value} for {was}; it now holds for {now}."


def _values(path: Path) -> dict[str, Any]:
    """The values that a recipe sets, by their full keys."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return dict(_leaves({key: value for key, value in content.items() if key != "defaults"}, ""))


def _leaves(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
