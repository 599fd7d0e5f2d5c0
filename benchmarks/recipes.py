"""Runs every recipe on digits over the same five seeds, and writes the blocks of ``recipes/README.md`` and its picture.

``python benchmarks/recipes.py`` runs the command of each row of the table: fifty runs, two at a time. ``--tune`` runs instead what
was tried for each recipe, on other seeds and on the validation images alone, and writes the block of what was chosen; that is then
written into the recipe by hand. What stands between the blocks is written by hand as well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import t

sys.path.insert(0, str(Path(__file__).parent.parent))

from lightning_adaptive.report import read_curves
from lightning_adaptive.tables import markdown

ROOT = Path(__file__).parent.parent
README = ROOT / "recipes" / "README.md"
PICTURE = ROOT / "docs" / "digits_recipes.png"
SEEDS = (1, 2, 3, 4, 5)
TUNING_SEEDS = (101, 102, 103)
THRESHOLD = 0.97
"""Validation accuracy that counts as learnt."""
COMPARED_WITH = "digits_adam_to_sgd"
TASK = ", on scikit-learn's digits."
"""How the first line of each recipe ends."""

ADAM = {"optimizer.lr": "0.0001,0.0002,0.0005,0.001,0.002,0.005,0.01,0.02"}
TRIES: dict[str, dict[str, str]] = {
    "digits_sgd": {"optimizer.lr": "0.005,0.01,0.02,0.05,0.1,0.2,0.5,1"},
    "digits_momentum": {"optimizer.lr": "0.001,0.002,0.005,0.01,0.02,0.05,0.1,0.2"},
    "digits_adagrad": {"optimizer.lr": "0.001,0.002,0.005,0.01,0.02,0.05,0.1,0.2"},
    "digits_rmsprop": ADAM,
    "digits_adam": ADAM,
    "digits_adam_step": ADAM,
    "digits_adam_cosine": ADAM,
    "digits_wsd": ADAM,
    "digits_warmup_cosine": {"optimizer.lr": "0.002,0.005,0.01,0.02,0.05,0.1,0.2,0.5"},
    "digits_adam_to_sgd": {"optimizer.lr": "0.001,0.003", "switch.optimizer.lr": "0.03,0.1", "switch.at": "30%,60%"},
    "digits_swats": ADAM,
    "digits_noise": ADAM,
}
"""What was tried for each recipe: eight settings each. The rows of the tables stand in this order."""


@dataclass(frozen=True)
class Run:
    """What a run left in its folder.

    Args:
        seed: its seed.
        setting: the overrides that were tried.
        steps: optimizer steps at each validation.
        accuracies: validation accuracy after each epoch.
        losses: validation loss after each epoch.
        best_epoch: 1-based epoch of the checkpoint with the best validation accuracy.
        seconds: time of the training, with its validations and checkpoints.
        last_phase: 1-based epoch in which the last phase began.
        test: metrics of the best checkpoint on the test images; empty when it was not tested.
        versions: what it ran with.
    """

    seed: int
    setting: tuple[str, ...]
    steps: list[int]
    accuracies: list[float]
    losses: list[float]
    best_epoch: int
    seconds: float
    last_phase: int
    test: Mapping[str, float]
    versions: Mapping[str, str]


# What is computed


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval."""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * error


def first_epoch(accuracies: Sequence[float], threshold: float = THRESHOLD) -> int | None:
    """The first epoch, 1-based, after which the accuracy is at least the threshold; None if there is none.

    >>> first_epoch([0.9, 0.98, 0.96]), first_epoch([0.9])
    (2, None)
    """
    return next((epoch for epoch, accuracy in enumerate(accuracies, 1) if accuracy >= threshold), None)


def epochs_until(found: Sequence[int | None]) -> str:
    """Mean of first epochs, with the number of runs that had one if not all had.

    >>> epochs_until([2, 3]), epochs_until([2, None]), epochs_until([None])
    ('2.5', '2.0 (1 of 2)', 'never')
    """
    reached = [epoch for epoch in found if epoch is not None]
    if not reached:
        return "never"
    return f"{statistics.fmean(reached):.1f}" + (f" ({len(reached)} of {len(found)})" if len(reached) < len(found) else "")


def difference(ours: Sequence[float | None], theirs: Sequence[float | None], digits: int) -> str:
    """Mean and 95 % interval of the paired differences, in bold if the interval is without zero.

    >>> difference([1.0, 2.0, 4.0], [0.5, 2.0, 3.0], 1), difference([2.0, 2.1], [1.0, 1.0], 1), difference([1, None], [1, 1], 1)
    ('+0.5 ± 1.2', '**+1.1 ± 0.6**', '-')
    """
    if None in (*ours, *theirs):
        return "-"
    mean, half = interval([own - other for own, other in zip(ours, theirs, strict=True)])  # type: ignore[operator]
    cell = f"{mean:+.{digits}f} ± {half:.{digits}f}"
    return f"**{cell}**" if abs(mean) > half else cell


def best(tries: Mapping[tuple[str, ...], Sequence[Run]]) -> tuple[str, ...]:
    """The setting with the highest mean of the best validation accuracies; of equal ones, that with the lowest loss there."""

    def key(setting: tuple[str, ...]) -> tuple[float, float]:
        accuracy, loss = validated(tries[setting])
        return round(accuracy, 6), -loss

    return max(tries, key=key)


def validated(runs: Sequence[Run]) -> tuple[float, float]:
    """Mean validation accuracy and loss of the checkpoints that would be tested."""
    return (
        statistics.fmean(run.accuracies[run.best_epoch - 1] for run in runs),
        statistics.fmean(run.losses[run.best_epoch - 1] for run in runs),
    )


# What is run


def command(recipe: str, seeds: Sequence[int] = SEEDS) -> str:
    """The command of a row."""
    return f"lightning-adaptive train -m recipe={recipe} seed={','.join(map(str, seeds))}"


def sweep(recipe: str, seeds: Sequence[int], tries: Mapping[str, str], folder: Path) -> list[Run]:
    """Runs a recipe's command in a process of its own, in a folder; what is done there is not run again."""
    study = f"{recipe}-tries" if tries else recipe
    words = [*command(recipe, seeds).split()[1:], *(f"{key}={values}" for key, values in tries.items())]
    words += [f"study={study}", *(["test=false"] if tries else [])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LIGHTNING_ADAPTIVE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (folder / f"{study}.log").open("w", encoding="utf-8") as log:
        line = [sys.executable, "-m", "lightning_adaptive", *words]
        subprocess.run(line, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    runs = [read(path.parent) for path in sorted((folder / "studies" / study).glob("*/result.json"))]
    expected = len(seeds) * math.prod(len(values.split(",")) for values in tries.values())
    if len(runs) != expected:
        raise RuntimeError(f"{folder / 'studies' / study} holds {len(runs)} runs, not {expected}: others were there before")
    print(f"{recipe}: {len(runs)} runs", file=sys.stderr, flush=True)
    return sorted(runs, key=lambda run: (run.setting, run.seed))


def read(folder: Path) -> Run:
    """Reads a run's folder."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    overrides = yaml.safe_load((folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
    curves = read_curves(folder / "metrics.csv")
    steps, accuracies = curves["val/acc"]
    per_epoch = result["steps"] // len(accuracies)
    [epoch] = re.findall(r"epoch(\d+)", result["best_checkpoint"])
    return Run(
        seed=result["seed"],
        setting=tuple(override for override in overrides if override.partition("=")[0] not in ("recipe", "seed", "study", "test")),
        steps=[step + 1 for step in steps],
        accuracies=accuracies,
        losses=curves["val/loss"][1],
        best_epoch=int(epoch) + 1,
        seconds=sum(phase["seconds"] for phase in result["phases"]),
        last_phase=result["phases"][-1]["first_step"] // per_epoch + 1,
        test={name: value for name, value in result["metrics"].items() if name.startswith("test/")},
        versions={**result["versions"], "python": result["python"]},
    )


def run_all(seeds: Sequence[int], tries: Mapping[str, Mapping[str, str]], folder: Path) -> dict[str, list[Run]]:
    """Runs every recipe, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        done = {recipe: pool.submit(sweep, recipe, seeds, tries.get(recipe, {}), folder) for recipe in TRIES}
        return {recipe: future.result() for recipe, future in done.items()}


# What is written


def row(recipe: str, runs: Sequence[Run]) -> list[str]:
    """A recipe's row of the table of results."""
    accuracy = interval([100 * run.test["test/acc"] for run in runs])
    loss = interval([run.test["test/loss"] for run in runs])
    return [
        f"[{recipe}]({recipe}.yaml)",
        header(recipe)[0].removesuffix(TASK),
        f"{accuracy[0]:.2f} ± {accuracy[1]:.2f}",
        f"{loss[0]:.3f} ± {loss[1]:.3f}",
        epochs_until([first_epoch(run.accuracies) for run in runs]),
        f"{statistics.fmean(run.best_epoch for run in runs):.1f}",
        f"{min(run.seconds for run in runs):.1f}",
        f"`{command(recipe)}`",
    ]


RESULTS = ["recipe", "what it is", "test accuracy, %", "test loss", "epochs to 97 %", "epoch tested", "seconds", "command"]
PAIRED = ["recipe", "test accuracy, points", "test loss", "epochs to 97 %", "validation loss after the last epoch"]
CHOSEN = ["recipe", "tried", "chosen", "validation accuracy, %", "validation loss"]


def paired_row(recipe: str, runs: Sequence[Run], others: Sequence[Run]) -> list[str]:
    """A recipe's row of the table of differences."""
    assert [run.seed for run in runs] == [run.seed for run in others]
    measures: list[tuple[Any, int]] = [
        (lambda run: 100 * run.test["test/acc"], 2),
        (lambda run: run.test["test/loss"], 3),
        (lambda run: first_epoch(run.accuracies), 1),
        (lambda run: run.losses[-1], 3),
    ]
    return [recipe, *(difference([of(run) for run in runs], [of(run) for run in others], digits) for of, digits in measures)]


def chosen_row(recipe: str, runs: Sequence[Run]) -> list[str]:
    """A recipe's row of the table of what was chosen."""
    tries: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        tries[run.setting].append(run)
    for setting, group in tries.items():
        accuracy, loss = validated(group)
        print(f"{recipe} {' '.join(setting)}: validation accuracy {100 * accuracy:.2f} %, loss {loss:.4f}", flush=True)
    accuracy, loss = validated(tries[best(tries)])
    tried = "; ".join(f"`{key}={values}`" for key, values in TRIES[recipe].items())
    setting = " ".join(f"`{override}`" for override in best(tries))
    return [recipe, tried, setting, f"{100 * accuracy:.2f}", f"{loss:.4f}"]


def facts(done: Mapping[str, Sequence[Run]]) -> str:
    """What it was measured with, and what of it follows from the numbers."""
    every = [run for runs in done.values() for run in runs]
    versions = every[0].versions
    seeds = statistics.fmean(statistics.stdev([100 * run.test["test/acc"] for run in runs]) for runs in done.values())
    mean = statistics.fmean(run.test["test/acc"] for run in every)
    switched = done[COMPARED_WITH]
    after = sum(run.best_epoch >= run.last_phase for run in switched)
    return (
        f"On {os.cpu_count()} CPU cores ({platform.machine()}), two runs at a time with one thread each; "
        f"Python {versions['python']}, torch {versions['torch']}, lightning {versions['lightning']}.\n"
        f"The standard deviation over the seeds is {seeds:.2f} points, in the mean of all recipes.\n"
        f"At the mean accuracy of {100 * mean:.2f} % the standard error of a set of 360 test images is "
        f"{100 * math.sqrt(mean * (1 - mean) / 360):.2f} points; it is in none of the intervals.\n"
        f"Of {COMPARED_WITH}, {after} of {len(switched)} tested checkpoints are from after the switch."
    )


def header(recipe: str) -> list[str]:
    """The comments that a recipe begins with, without its package."""
    lines = (ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[1:]
    return [line.removeprefix("# ") for line in itertools.takewhile(lambda line: line.startswith("# "), lines)]


def expectation(cells: Sequence[str]) -> str:
    """The line of a recipe's header that repeats its row.

    >>> expectation(["", "", "98.50 ± 0.40", "0.060 ± 0.010", "", "", "6.4", ""])
    'Expect: test accuracy 98.50 ± 0.40 %, loss 0.060 ± 0.010 (mean and 95 % interval, n = 5), 6.4 s on 2 CPU cores.'
    """
    _, _, accuracy, loss, _, _, seconds, _ = cells
    measured = f"mean and 95 % interval, n = {len(SEEDS)}"
    return f"Expect: test accuracy {accuracy} %, loss {loss} ({measured}), {seconds} s on 2 CPU cores."


def replaced(text: str, name: str, block: str) -> str:
    """A text with another block of a name.

    >>> replaced("a\\n<!-- x -->\\nold\\n<!-- end of x -->\\nb", "x", "new")
    'a\\n<!-- x -->\\nnew\\n<!-- end of x -->\\nb'
    """
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"there is no block {name!r}")
    return before + begin + block + end + after


def draw(done: Mapping[str, Sequence[Run]], path: Path) -> None:
    """Draws the mean curves of validation accuracy and loss over the steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(9, 8), sharex=True, layout="constrained")
    for recipe, runs in done.items():
        ours = recipe == COMPARED_WITH
        for axis, curves in zip(axes, ([run.accuracies for run in runs], [run.losses for run in runs]), strict=True):
            means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
            style: dict[str, Any] = {"color": "black", "linewidth": 2.2} if ours else {"linewidth": 1.3}
            axis.plot(runs[0].steps, means, label=recipe.removeprefix("digits_"), **style)
    axes[0].set(ylabel="validation accuracy", ylim=(0.9, 1.0), title=f"digits, mean of {len(SEEDS)} seeds")
    axes[1].set(ylabel="validation loss", yscale="log", xlabel="optimizer step")
    for axis in axes:
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_blocks(**blocks: str) -> None:
    """Writes blocks of the README."""
    text = README.read_text(encoding="utf-8")
    for name, block in blocks.items():
        text = replaced(text, name, block)
    README.write_text(text, encoding="utf-8")


def measure(folder: Path) -> None:
    """Runs all recipes, and writes the table, the differences, the picture and the headers."""
    done = run_all(SEEDS, {}, folder)
    rows = [row(recipe, runs) for recipe, runs in done.items()]
    others = [paired_row(recipe, runs, done[COMPARED_WITH]) for recipe, runs in done.items() if recipe != COMPARED_WITH]
    write_blocks(results=f"{markdown(RESULTS, rows)}\n\n{facts(done)}", differences=markdown(PAIRED, others))
    for recipe, cells in zip(done, rows, strict=True):
        path = ROOT / "recipes" / f"{recipe}.yaml"
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"^# Expect: .*$", f"# {expectation(cells)}", text, flags=re.MULTILINE), encoding="utf-8")
    draw(done, PICTURE)
    print(markdown(RESULTS, rows), facts(done), markdown(PAIRED, others), sep="\n\n")


def tune(folder: Path) -> None:
    """Runs all tries, and writes what was chosen."""
    done = run_all(TUNING_SEEDS, TRIES, folder)
    table = markdown(CHOSEN, [chosen_row(recipe, runs) for recipe, runs in done.items()])
    write_blocks(choice=table)
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", help="run the tries instead, and write what was chosen")
    parser.add_argument("--folder", type=Path, help="where the runs lie; given again, those that are done are not repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        (tune if options.tune else measure)(folder)


if __name__ == "__main__":
    main()
