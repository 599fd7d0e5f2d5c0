"""``train --help`` and completion, over the same of a bare application of Hydra's; each in a fresh process."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

from paired import Ratio, compare, seconds

BARE = """
import hydra


@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(config):
    pass


main()
"""
OURS = [sys.executable, "-m", "lightning_adaptive"]
LINE = "train optimizer=a"


def run(command: list[str], line: str, folder: str, taken: list[float]) -> float:
    taken.append(seconds(command, cwd=folder, env={**os.environ, "COMP_LINE": line}))
    return taken[-1]


def measure(pairs: int) -> list[Ratio]:
    """The ratios of the times of two whole processes; the name holds our median in seconds."""
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "app.py").write_text(BARE, encoding="utf-8")
        Path(folder, "conf").mkdir()
        Path(folder, "conf", "app.yaml").write_text("optimizer: a\n", encoding="utf-8")
        bare = [sys.executable, "app.py"]
        for name, ours, theirs in (
            ("`train --help`", [*OURS, "train", "--help"], [*bare, "--help"]),
            ("completion", [*OURS, "-sc", "query=bash"], [*bare, "-sc", "query=bash"]),
        ):
            taken: list[float] = []
            ratio = compare(
                name,
                partial(run, ours, f"lightning-adaptive {LINE}", folder, taken),
                partial(run, theirs, "python app.py optimizer=a", folder, []),
                pairs,
            )
            own = f"{name}, {median(taken[1:]):.2f} s, over that of an application of Hydra's with one key"
            ratios.append(replace(ratio, name=own))
    return ratios
