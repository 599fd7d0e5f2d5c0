"""``make bench``: all measurements, as one table on the terminal."""

from __future__ import annotations

import argparse
import platform

import command_time
import exact_resume_time
import import_time
import lightning
import noise_time
import scheduler_time
import step_time
import switch_time
import torch
from paired import HEADER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20, help="counted pairs of each measurement (default: 20)")
    pairs = parser.parse_args().pairs
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, lightning {lightning.__version__}\n"
    )
    print(HEADER)
    for measurement in (step_time, switch_time, exact_resume_time, scheduler_time, noise_time, import_time, command_time):
        for ratio in measurement.measure(pairs):
            print(ratio, flush=True)


if __name__ == "__main__":
    main()
