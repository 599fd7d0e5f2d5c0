"""What a run shows on the terminal: the plan and the config before it, the table after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from lightning_adaptive.plan import Plan, plan
from lightning_adaptive.tables import columns


class ShowPlan(Callback):
    """Prints the plan and the composed run before the first step, and keeps the plan in the run folder.

    Args:
        config: the composed config, interpolations unresolved.
        folder: the run folder.
    """

    def __init__(self, config: Any, folder: Path) -> None:
        self._config = config
        self._folder = folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        made = plan(trainer)
        if trainer.is_global_zero:
            show_plan(made, self._folder / "plan.txt")
            Console(soft_wrap=True, highlight=False).print(_tree(f"RUN   {self._folder}", self._config))


def show_plan(plan: Plan, file: Path) -> None:
    """Prints a plan, and keeps it in a file."""
    file.write_text(f"{plan}\n", encoding="utf-8")
    Console(soft_wrap=True, highlight=False).print(escape(str(plan)))


def show_result(header: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str], folder: Path) -> None:
    """Prints the closing table, lines below it, and what lies in the run folder."""
    console = Console(soft_wrap=True, highlight=False)
    for line in ("", *columns([header, *rows]), "", *lines):
        console.print(escape(line))
    files = sorted(file.name + ("/" if file.is_dir() else "") for file in folder.iterdir() if not file.name.startswith("."))
    console.print(escape(f"saved  {folder}: {'  '.join(files)}"))


def _tree(title: str, config: Mapping[str, Any]) -> Tree:
    tree = Tree(escape(title))
    _grow(tree, config)
    return tree


def _grow(tree: Tree, config: Mapping[str, Any]) -> None:
    """A branch for each mapping; empty values and Hydra's own marks are left out."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            target = value.get("_target_")
            branch = tree.add(escape(f"{key}  {target}" if target else str(key)))
            _grow(branch, value)
        elif value not in (None, {}) and not str(key).startswith("_"):
            tree.add(escape(f"{key}: {value}"))
