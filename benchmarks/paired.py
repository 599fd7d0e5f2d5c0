"""Paired measurement: two ways in turn, A B A B, and the ratio of each pair with its interval."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios A / B of all pairs, with a 95 % bootstrap interval.

    Args:
        name: what was compared.
        goal: the ratio that it is meant to stay under, if there is one.
        median: median ratio.
        low: lower end of the interval of the median.
        high: upper end.
        pairs: number of pairs.
    """

    name: str
    goal: float | None
    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        judged = "- | -" if self.goal is None else f"{self.goal} | {'yes' if self.median <= self.goal else 'no'}"
        return f"| {self.name} | {self.median:.3f} | {self.low:.3f} to {self.high:.3f} | {self.pairs} | {judged} |"


HEADER = "| A over B | ratio | 95 % interval | pairs | goal | met |\n|---|---|---|---|---|---|"


def seconds(command: Sequence[str], **options: Any) -> float:
    """The time of a whole process; what it prints is thrown away."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - begin


def compare(name: str, ours: Callable[[], float], theirs: Callable[[], float], pairs: int, goal: float | None = None) -> Ratio:
    """Measures both once as a warm-up, then in turn; each second pair begins with the other.

    Args:
        name: what is compared.
        ours: runs A and returns its seconds.
        theirs: runs B and returns its seconds.
        pairs: counted pairs.
        goal: the ratio that it is meant to stay under, if there is one.
    """
    ours(), theirs()
    ratios = []
    for index in range(pairs):
        if index % 2:
            other, own = theirs(), ours()
        else:
            own, other = ours(), theirs()
        ratios.append(own / other)
    interval = bootstrap((ratios,), np.median, method="percentile", random_state=0).confidence_interval
    return Ratio(name, goal, float(np.median(ratios)), float(interval.low), float(interval.high), pairs)
