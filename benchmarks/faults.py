"""Kills runs at random moments and lets them go on, up to three times each; every one must end as if it had not been killed.

``python benchmarks/faults.py --chains 8`` prints a line for each kind of run. Three epochs of eight batches, shuffled, with
dropout, two batches a step, a checkpoint at each step, and a switch in the middle of the second epoch; each resumed run has
another global seed. The processes are killed with SIGKILL, all at once, from 0 to 30 ms after a random batch began, which is
before, in or after a step, the switch, or the writing of a checkpoint.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.faults import KINDS, chain, plan, reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=int, default=8, help="runs of each kind that are killed (default: 8)")
    parser.add_argument("--kinds", nargs="+", default=["one process", "ddp", "fsdp2"], choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(
        "| run | kills | before the first checkpoint | before the switch | after it | after the end | ended as the reference | s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        begin, expected = time.monotonic(), reference(KINDS[kind])
        chooser = random.Random(f"{options.seed} {kind}")
        counts: Counter[str] = Counter()
        for number in range(options.chains):
            for found in chain(KINDS[kind], plan(chooser, chooser.randint(1, 3)), expected, seed=1000 * number + 7):
                counts[_where(found)] += 1
        kills = sum(counts.values())
        row = [kind, kills, *(counts[name] for name in ("none", "before", "after", "end")), f"{options.chains} of {options.chains}"]
        print(f"| {' | '.join(map(str, row))} | {time.monotonic() - begin:.0f} |", flush=True)


def _where(found: str) -> str:
    """Where in a run a kill came, by the newest checkpoint that it left; the switch is at step 6."""
    if "after the end" in found:
        return "end"
    return "none" if not found.startswith("step") else "before" if int(found.split()[1]) < 6 else "after"


if __name__ == "__main__":
    main()
