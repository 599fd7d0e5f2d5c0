"""The estimators of gradient noise against closed forms, and the metric that averages them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_adaptive import GradientNoiseScale
from lightning_adaptive.noise_scale import estimates

# The estimators


@given(st.integers(2, 12), st.integers(1, 9), st.integers(0, 2**31))
def test_the_estimates_are_the_sample_variance_and_the_mean_of_products(count: int, samples: int, seed: int) -> None:
    gradients = torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 1
    mean = gradients.mean(0)
    found = estimates(gradients.square().sum(1).mean(), mean.square().sum(), samples, count * samples)
    products = [torch.dot(one, other) for one, other in itertools.permutations(gradients, 2)]
    variance = samples * (gradients - mean).square().sum() / (count - 1)
    torch.testing.assert_close(found, (torch.stack(products).mean(), variance), rtol=1e-9, atol=1e-9)


@given(st.lists(st.integers(1, 100), min_size=2, max_size=10), st.floats(0.1, 10), st.floats(0.1, 100))
def test_batches_of_any_sizes_give_the_truth_in_expectation(sizes: list[int], grad_sq: float, trace: float) -> None:
    inverse = sum(1 / size for size in sizes) / len(sizes)
    small, big = torch.tensor([grad_sq + trace * inverse, grad_sq + trace * inverse / len(sizes)], dtype=torch.float64)
    found = estimates(small, big, 1 / inverse, len(sizes) / inverse)
    assert [float(value) for value in found] == pytest.approx([grad_sq, trace], rel=1e-6)


# The metric


def fed(updates: Sequence[tuple[Any, Any]], **options: Any) -> GradientNoiseScale:
    """A metric that saw these squared norms of batches of 2 and 8."""
    metric = GradientNoiseScale(**options)
    for small, big in updates:
        metric.update(*torch.tensor([small, big], dtype=torch.float64), 2, 8)
    return metric


def numbers(metric: GradientNoiseScale) -> dict[str, float]:
    return {name: float(value) for name, value in metric.values().items()}


squares = st.lists(st.tuples(st.floats(1, 10), st.floats(0.5, 0.9)), min_size=1, max_size=20)


@given(squares, st.floats(0, 0.99))
def test_both_averages_are_corrected_for_their_beginning_and_divided_last(updates: list[tuple[float, float]], decay: float) -> None:
    weights = torch.tensor([decay ** (len(updates) - 1 - index) for index in range(len(updates))], dtype=torch.float64)
    small, big = torch.tensor(updates, dtype=torch.float64).T
    grad_sq, trace = (float((weights * each).sum() / weights.sum()) for each in estimates(small, big, 2, 8))
    found = numbers(fed(updates, decay=decay))
    assert found["grad_sq"] == pytest.approx(grad_sq, rel=1e-9, abs=1e-9)
    assert found["trace"] == pytest.approx(trace, rel=1e-9)
    assert found["batch"] == 8
    if grad_sq > 1e-3:
        assert found["scale"] == pytest.approx(trace / grad_sq, rel=1e-6)
        assert found["snr"] == pytest.approx(8 * grad_sq / trace, rel=1e-6)


@given(squares, st.integers(0, 19))
def test_what_is_not_finite_is_left_out(updates: list[tuple[float, float]], place: int) -> None:
    for bad in (math.inf, math.nan):
        spoiled = fed([*updates[:place], (bad, 1.0), *updates[place:]])
        assert numbers(spoiled) == numbers(fed(updates))
        assert (float(spoiled.skipped), float(spoiled.updates[0])) == (1, len(updates))
    same_sizes = fed(updates)
    same_sizes.update(1.0, 1.0, torch.tensor(4.0), torch.tensor(4.0))
    assert float(same_sizes.skipped) == 1


def test_groups_add_up_to_the_whole() -> None:
    metric = fed([([3.0, 2.0], [1.0, 1.5]), ([4.0, 1.0], [2.0, 0.5])], groups=("body", "head"), decay=0.5)
    found, whole = numbers(metric), numbers(fed([(5.0, 2.5), (5.0, 2.5)], decay=0.5))
    assert {name: found[name] for name in whole} == pytest.approx(whole)
    for name in ("grad_sq", "trace"):
        assert found[f"{name}/body"] + found[f"{name}/head"] == pytest.approx(found[name])
    assert found.keys() == {*whole, *(f"{name}/{group}" for name in whole if name != "batch" for group in ("body", "head"))}
    body = numbers(fed([(3.0, 1.0), (4.0, 2.0)], decay=0.5))
    assert {name: found[f"{name}/body"] for name in ("scale", "grad_sq", "trace", "snr")} == pytest.approx(
        {name: value for name, value in body.items() if name != "batch"}
    )


def test_other_groups_keep_what_was_seen_of_the_whole_and_of_the_same_names() -> None:
    metric = fed([([3.0, 2.0], [1.0, 1.5])], groups=("body", "head"))
    other = metric.with_groups(("head", "new"))
    before, after = numbers(metric), numbers(other)
    for name in ("scale", "grad_sq", "trace", "snr", "batch", "scale/head", "grad_sq/head", "trace/head", "snr/head"):
        assert after[name] == before[name]
    assert math.isnan(after["scale/new"])
    other.update(torch.tensor([2.0, 3.0]), torch.tensor([1.5, 1.0]), 2, 8)
    assert numbers(other)["scale/new"] == pytest.approx(before["scale/body"])


@pytest.mark.parametrize(
    ("small", "big", "scale", "snr"),
    [(5.0, 0.1, math.inf, 0.0), (1.0, 2.0, 0.0, math.inf)],
    ids=["no signal is seen", "no noise is seen"],
)
def test_an_average_below_zero_counts_as_zero_in_ratios(small: float, big: float, scale: float, snr: float) -> None:
    found = numbers(fed([(small, big)]))
    assert (found["scale"], found["snr"]) == (scale, snr)
    assert min(found["grad_sq"], found["trace"]) < 0


def test_it_is_a_metric_like_others() -> None:
    metric = fed([(5.0, 2.0)])
    copied = GradientNoiseScale()
    copied.load_state_dict(metric.state_dict())
    assert {name: float(value) for name, value in copied.values().items()} == numbers(metric)
    assert {tensor.dtype for tensor in metric.half().state_dict().values()} == {torch.float64}
    assert float(metric(torch.tensor(9.0), torch.tensor(3.0), 2, 8)["trace"]) == pytest.approx(16)  # forward: of the batch alone
    assert float(metric.updates[0]) == 2
    metric.reset()
    assert float(metric.updates[0]) == 0


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: GradientNoiseScale(decay=1.0), "decay: 1.0 lies outside 0 to below 1. It is a share of the past."),
    (lambda: GradientNoiseScale(decay="0.9"), "decay: '0.9' is not a number."),  # type: ignore[arg-type]
    (lambda: GradientNoiseScale(groups=("a", "a")), "groups: ['a', 'a'] has a name twice. Give each group its own."),
    (lambda: fed([(5.0, 2.0)]).update(5.0, 2.0, 8, 8), "the small batch must be smaller than the big one, got 8 and 8 samples"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert str(caught.value) == message
