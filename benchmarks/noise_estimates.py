"""``python benchmarks/noise_estimates.py``: how near the estimates of gradient noise come to a known truth."""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from lightning_adaptive import GradientNoiseScale
from lightning_adaptive.noise_scale import estimates

DIMENSIONS, BATCH = 20, 256
GRAD_SQ, TRACE = 1.0, DIMENSIONS + 1.0 + DIMENSIONS
"""Of ``g = x (x.e - epsilon)`` with standard normal x and epsilon and ``|e| = 1``: ``E|g|^2 = (d + 2) |e|^2 + d``."""

HEADER = "| micro-batches | mean of tr(Sigma) | mean of \\|G\\|^2 | scatter of tr(Sigma) | of the last alone | ratio |"


def gradients(trials: int, micro_batches: int, batch: int = BATCH) -> Tensor:
    """Mean gradients of the micro-batches of a linear model: trials, micro-batches, dimensions."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(trials, micro_batches, batch // micro_batches, DIMENSIONS, generator=generator, dtype=torch.float64)
    errors = inputs[..., 0] + torch.randn(inputs.shape[:-1], generator=generator, dtype=torch.float64)
    return (inputs * errors[..., None]).mean(2)


def row(trials: int, micro_batches: int) -> str:
    """Means, and standard deviations of single steps, both over the truth; also those of the last micro-batch against the whole."""
    found = gradients(trials, micro_batches)
    squares, whole = found.square().sum(2), found.mean(1).square().sum(1)
    grad_sq, trace = estimates(squares.mean(1), whole, BATCH / micro_batches, BATCH)
    _, last = estimates(squares[:, -1], whole, BATCH / micro_batches, BATCH)
    cells = [_of_truth(trace, TRACE), _of_truth(grad_sq, GRAD_SQ)]
    scatter = [float(each.std() / TRACE) for each in (trace, last)]
    return f"| {micro_batches} | {' | '.join(cells)} | {scatter[0]:.2f} | {scatter[1]:.2f} | {scatter[0] / scatter[1]:.2f} |"


def _of_truth(values: Tensor, truth: float) -> str:
    """The mean with its 95 % interval."""
    return f"{float(values.mean()) / truth:.3f} ± {1.96 * float(values.std()) / truth / math.sqrt(len(values)):.3f}"


def smoothed(runs: int, steps: int, batch: int) -> str:
    """The scale after many steps of four micro-batches, as the ratio of two averages and as the average of ratios."""
    found = gradients(runs * steps, 4, batch).reshape(runs, steps, 4, DIMENSIONS)
    weights = 0.01 * 0.99 ** torch.arange(steps - 1, -1, -1, dtype=torch.float64) / (1 - 0.99**steps)
    averages, ratios = [], []
    for run in found:
        metric, small, big = GradientNoiseScale(decay=0.99), run.square().sum(2).mean(1), run.mean(1).square().sum(1)
        for step in range(steps):
            metric.update(small[step], big[step], batch // 4, batch)
        averages.append(float(metric.compute()["scale"]))
        grad_sq, trace = estimates(small, big, batch // 4, batch)
        ratios.append(float((weights * trace / grad_sq).sum()))
    cells = (torch.tensor(values).quantile(torch.tensor([0.5, 0.25, 0.75])).tolist() for values in (averages, ratios))
    words = ["{:.1f} ({:.1f} to {:.1f})".format(*cell) for cell in cells]
    return (
        f"Scale {TRACE:.0f} at a batch of {batch}, after {steps} steps, median and quartiles of {runs} runs: ratio of averages "
        f"{words[0]}, average of ratios {words[1]}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=3000, help="steps, each for itself (default: 3000)")
    trials = parser.parse_args().trials
    print(HEADER, "|---|---|---|---|---|---|", sep="\n")
    for micro_batches in (2, 4, 8, 16):
        print(row(trials, micro_batches), flush=True)
    print("\n" + smoothed(50, 400, 32))


if __name__ == "__main__":
    main()
