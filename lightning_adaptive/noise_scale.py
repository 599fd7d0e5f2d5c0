"""`GradientNoiseScale`: what squared norms of gradients of two sizes of batch say of the noise in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_adaptive.errors import ConfigError, check_share

_OF_EACH = ("grad_sq", "trace", "updates")
"""States with a value of the whole, and then one of each group."""
STATES = (*_OF_EACH, "skipped", "batch")

Number = float | Tensor


def estimates(small_sq: Tensor, big_sq: Tensor, small_batch: Number, big_batch: Number) -> tuple[Tensor, Tensor]:
    """Unbiased estimates of the squared norm of the true gradient and of the trace of the covariance of one sample's gradient.

    With ``E|g_b|^2 = |G|^2 + tr(Sigma) / b`` for the mean gradient of ``b`` samples (McCandlish et al. 2018, arXiv 1812.06162,
    appendix A.1)::

        |G|^2     = (B |g_B|^2 - b |g_b|^2) / (B - b)
        tr(Sigma) = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)

    Either may come out negative.

    Args:
        small_sq: ``|g_b|^2``, the squared norm of a small batch's gradient; the mean over several of the same size is less noisy.
        big_sq: ``|g_B|^2``, that of a big batch's, which may be made of the small ones.
        small_batch: ``b``, samples of the small batch; of unequal ones their harmonic mean.
        big_batch: ``B``, samples of the big batch, more than ``b``.

    Returns:
        ``|G|^2`` and ``tr(Sigma)``, in the units of the gradient squared.

    >>> estimates(torch.tensor(5.0), torch.tensor(2.0), 1, 4)  # |G|^2 = 1, tr(Sigma) = 4
    (tensor(1.), tensor(4.))
    """
    grad_sq = (big_batch * big_sq - small_batch * small_sq) / (big_batch - small_batch)
    return grad_sq, (small_sq - big_sq) / (1 / small_batch - 1 / big_batch)


class GradientNoiseScale(Metric):
    """The gradient noise scale ``B_simple = tr(Sigma) / |G|^2``, from squared norms of gradients of a small and a big batch.

    Numerator and denominator are each an exponential moving average of unbiased `estimates`, corrected by ``1 - decay^n`` for its
    beginning at zero after ``n`` updates; their ratio is taken last, since the average of ratios is not the ratio of averages. An
    update that is not finite is left out and counted in ``skipped``. Everything is float64 and stays on the metric's device.

    What is fed must be the same on all processes, as after a reduction: the states are not synchronized.

    Args:
        decay: share of the past in each average, 0 to below 1. 0 looks at the last update alone.
        groups: names of parameter groups, for values of each beside those of the whole.

    Raises:
        ConfigError: for a decay out of range, or a name that comes twice.

    >>> metric = GradientNoiseScale()
    >>> metric.update(small_sq=5.0, big_sq=2.0, small_batch=1, big_batch=4)
    >>> {name: round(float(value), 6) for name, value in metric.compute().items()}
    {'scale': 4.0, 'grad_sq': 1.0, 'trace': 4.0, 'snr': 1.0, 'batch': 4.0}
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = True

    grad_sq: Tensor
    trace: Tensor
    updates: Tensor
    skipped: Tensor
    batch: Tensor

    def __init__(self, decay: float = 0.99, groups: Sequence[str] = ()) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        check_share(decay, "decay", "It is a share of the past.", below_one=True)
        if len(set(groups)) < len(groups):
            raise ConfigError(f"{list(groups)!r} has a name twice. Give each group its own.", "groups")
        self.decay = decay
        self.groups = tuple(groups)
        for name in STATES:
            size = (1 + len(self.groups),) if name in _OF_EACH else ()
            self.add_state(name, torch.zeros(size, dtype=torch.float64), persistent=True)

    def update(self, small_sq: Number, big_sq: Number, small_batch: Number, big_batch: Number) -> None:
        """Takes one step's squared norms, as `estimates` does.

        Args:
            small_sq: a number; with groups, a vector with one value for each, which add up to the whole's.
            big_sq: the same of the big batch.
            small_batch: samples of the small batch.
            big_batch: samples of the big batch.

        Raises:
            ValueError: for numbers of samples that are not ``0 < small_batch < big_batch``; of tensors, whose values are not looked
                at, such an update is left out.
        """
        if not isinstance(small_batch, Tensor) and not isinstance(big_batch, Tensor) and not 0 < small_batch < big_batch:
            raise ValueError(f"the small batch must be smaller than the big one, got {small_batch} and {big_batch} samples")
        small, big = self._with_whole(small_sq), self._with_whole(big_sq)
        batch = self._double(big_batch)
        grad_sq, trace = estimates(small, big, self._double(small_batch), batch)
        counts = (torch.isfinite(grad_sq) & torch.isfinite(trace)).all()
        self.grad_sq = torch.where(counts, self.decay * self.grad_sq + (1 - self.decay) * grad_sq, self.grad_sq)
        self.trace = torch.where(counts, self.decay * self.trace + (1 - self.decay) * trace, self.trace)
        self.batch = torch.where(counts, batch, self.batch)
        self.updates = self.updates + counts
        self.skipped = self.skipped + ~counts

    def compute(self) -> dict[str, Tensor]:
        """The smoothed values, 0-dimensional; not a number before the first update.

        Returns:
            ``scale`` (samples), ``grad_sq`` and ``trace`` (gradient squared), ``snr = batch * grad_sq / trace`` (how often the
            squared gradient exceeds the noise that is left at this batch), ``batch`` (samples of the last big batch); for each
            group ``scale/NAME`` and so on. In ratios an average below zero, which noise can cause, counts as zero: ``scale`` is
            then infinite, or zero.
        """
        return self.values()

    def values(self) -> dict[str, Tensor]:
        """What `compute` returns; for a metric that was loaded and not updated since, of which `compute` would warn."""
        weights = 1 - self.decay**self.updates
        grad_sq, trace = self.grad_sq / weights, self.trace / weights
        signal, noise = grad_sq.clamp(min=0), trace.clamp(min=0)
        found = {"scale": noise / signal, "grad_sq": grad_sq, "trace": trace, "snr": self.batch * signal / noise}
        whole = {name: of_each[0] for name, of_each in found.items()}
        of_groups = {
            f"{name}/{group}": of_each[index] for index, group in enumerate(self.groups, start=1) for name, of_each in found.items()
        }
        return {**whole, "batch": self.batch, **of_groups}

    def with_groups(self, groups: Sequence[str]) -> GradientNoiseScale:
        """The same for other groups: what was seen of the whole, and of groups of the same names, goes on."""
        other = GradientNoiseScale(self.decay, groups).to(self.device)
        places = {name: index for index, name in enumerate(("", *self.groups))}
        for index, name in enumerate(("", *other.groups)):
            if name in places:
                for state in _OF_EACH:
                    getattr(other, state)[index] = getattr(self, state)[places[name]]
        other.skipped, other.batch = self.skipped, self.batch
        return other

    def _with_whole(self, squares: Number) -> Tensor:
        of_groups = self._double(squares)
        return torch.cat([of_groups.sum().reshape(1), of_groups]) if self.groups else of_groups.reshape(1)

    def _double(self, value: Number) -> Tensor:
        # A number is filled in, not copied: a copy to the device would wait for it.
        if isinstance(value, Tensor):
            return value.to(self.device, torch.float64)
        return torch.full((), value, dtype=torch.float64, device=self.device)
