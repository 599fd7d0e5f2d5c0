"""The gradient noise scale over a training on digits, for Adam and for SGD with momentum, five seeds each.

``python benchmarks/noise_digits.py`` runs both recipes with each batch of 32 in two halves, prints a table and draws
``docs/digits_noise.png``.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from lightning_adaptive.report import read_curves
from lightning_adaptive.tables import markdown

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "digits_noise.png"
RECIPES = {"digits_adam": "Adam", "digits_momentum": "SGD with momentum"}
LINE = "-m study=noise recipe={} seed=1,2,3,4,5 callbacks=noise trainer.accumulate_grad_batches=2 task.data.batch_size=16"
EPOCHS = (1, 2, 5, 10, 20)
STEPS_PER_EPOCH = 34

Curve = dict[int, float]


def curves(folder: Path) -> dict[str, list[Curve]]:
    """The noise scale at each logged step, of every run of each recipe."""
    words = LINE.format(",".join(RECIPES)).split()
    subprocess.run([sys.executable, "-m", "lightning_adaptive", "train", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, list[Curve]] = {recipe: [] for recipe in RECIPES}
    for run in sorted((folder / "studies" / "noise").glob("*/metrics.csv")):
        overrides = yaml.safe_load((run.parent / ".hydra" / "overrides.yaml").read_text(encoding="utf-8"))
        [recipe] = [override.removeprefix("recipe=") for override in overrides if override.startswith("recipe=")]
        found[recipe].append(dict(zip(*read_curves(run)["noise/scale"], strict=True)))
    return found


def table(found: dict[str, list[Curve]]) -> str:
    """Median and range over the seeds, at the last logged step of some epochs."""
    rows = []
    for recipe, runs in found.items():
        cells = []
        for epoch in EPOCHS:
            values = [curve[max(step for step in curve if step < epoch * STEPS_PER_EPOCH)] for curve in runs]
            cells.append(f"{statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f})")
        rows.append([RECIPES[recipe], *cells])
    return markdown(["optimizer", *(f"epoch {epoch}" for epoch in EPOCHS)], rows)


def draw(found: dict[str, list[Curve]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for index, (recipe, runs) in enumerate(found.items()):
        steps = sorted(set.intersection(*(set(curve) for curve in runs)))
        several = [[curve[step] for curve in runs] for step in steps]
        axis.plot(steps, [statistics.median(values) for values in several], color=f"C{index}", label=RECIPES[recipe])
        axis.fill_between(
            steps, [min(values) for values in several], [max(values) for values in several], color=f"C{index}", alpha=0.2
        )
    axis.axhline(32, color="0.4", linestyle="--", linewidth=1, label="the batch")
    axis.set(xlabel="optimizer step", ylabel="gradient noise scale, samples", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(PICTURE, dpi=120)
    plt.close(figure)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = curves(Path(folder))
    print(table(found))
    draw(found)


if __name__ == "__main__":
    main()
