"""The frame of our pictures: panels over the optimizer steps, with each switch marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def panels(path: Path, titles: Sequence[str], switches: Sequence[tuple[int, str, str]], height: int) -> Iterator[list[Any]]:
    """Panels one below the other, in which the caller draws; what it gives a label is in the panel's legend.

    Args:
        path: the PNG, written at the end.
        titles: what the panels show.
        switches: the step at which each phase but the first began, the optimizer before it, and its own.
        height: of a panel, in inches.

    Returns:
        The panels, ``matplotlib.axes.Axes``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + height * len(titles)), layout="constrained")
    axes = list(figure.subplots(len(titles), 1, sharex=True, squeeze=False)[:, 0])
    yield axes
    for axis, title in zip(axes, titles, strict=True):
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        for step, _, _ in switches:
            axis.axvline(step, color="0.4", linestyle="--", linewidth=1)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(loc="best", fontsize="small")
    for step, before, after in switches:
        axes[0].text(step, 1.02, f"{before} → {after}", transform=axes[0].get_xaxis_transform(), ha="center")
    axes[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)
