"""Schedules against torch's own, closed forms, and properties that hold for any lengths."""

from __future__ import annotations

import math
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from lightning_adaptive import Clock, ConfigError, Constant, Cosine, Duration, Schedule, StepDecay

CLOCK = Clock(steps_per_epoch=10, total_steps=100)


def torch_factors(scheduler: Any, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    built = scheduler(optimizer)
    factors = []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        built.step()
    return factors


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [
        (Cosine(), partial(CosineAnnealingLR, T_max=100)),
        (Cosine(floor=0.1), partial(CosineAnnealingLR, T_max=100, eta_min=0.1)),
        (StepDecay(every="3ep", gamma=0.5), partial(StepLR, step_size=30, gamma=0.5)),
        (StepDecay(every="7st"), partial(StepLR, step_size=7)),
    ],
)
def test_equals_torch_over_a_whole_run(schedule: Schedule, reference: Any) -> None:
    factor = schedule(CLOCK)
    assert [factor(step) for step in range(100)] == pytest.approx(torch_factors(reference, 100), rel=1e-12)


@pytest.mark.parametrize("schedule_class", [Constant, Cosine, partial(StepDecay, every="20st")])
def test_warm_up_rises_to_the_base_value_and_the_shape_follows(schedule_class: Any) -> None:
    warm, cold = schedule_class(warmup="8st")(CLOCK), schedule_class(length="92st")(CLOCK)
    assert [warm(step) for step in range(8)] == [(step + 1) / 8 for step in range(8)]
    assert [warm(8 + step) for step in range(92)] == [cold(step) for step in range(92)]


def test_spans_from_the_phase_to_the_end_of_training() -> None:
    factor = Cosine(warmup="10%")(Clock(steps_per_epoch=10, total_steps=100, first_step=60))
    assert factor(3) == 1.0
    assert factor(4) == 1.0
    assert factor(4 + 18) == pytest.approx(0.5)


def test_length_gives_another_span_after_which_the_last_value_holds() -> None:
    factor = Cosine(length="2ep", floor=0.25)(CLOCK)
    assert factor(10) == pytest.approx(0.625)
    assert [factor(20), factor(21), factor(99)] == [0.25, 0.25, 0.25]
    decay = StepDecay(length="20st", every="20st")(CLOCK)
    assert [decay(19), decay(20), decay(99)] == pytest.approx([1.0, 0.1, 0.1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Cosine(warmup=5), "warmup: 5 has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training)."),
        (lambda: Cosine(length="0ep"), "length: '0ep' is no length. Write a duration above zero, or null."),
        (lambda: Cosine(floor=1.5), "floor: 1.5 lies outside 0 to 1. It is a share of the base value."),
        (lambda: Cosine(floor="low"), "floor: 'low' is not a number. Write a share of the base value from 0 to 1."),
        (lambda: Cosine(floor=math.nan), "floor: nan lies outside 0 to 1. It is a share of the base value."),
        (lambda: StepDecay(every="0st"), "every: a decay every 0 steps has no meaning. Write a duration above zero."),
        (lambda: StepDecay(gamma=0), "gamma: 0 lies outside 0 to 1. It multiplies the value at each decay."),
        (lambda: Cosine(warmup="20ep")(CLOCK), "warmup: 20ep is 200 steps, but the schedule spans only 100."),
        (lambda: StepDecay(every="0.01ep")(CLOCK), "every: 0.01ep rounds to 0 steps of this training."),
        (
            lambda: Cosine()(Clock(steps_per_epoch=None, total_steps=None)),
            "Cosine must know where it ends, and this training has no known end. "
            "Set trainer.max_steps, or the schedule's length in steps (st).",
        ),
    ],
)
def test_refuses(build: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    assert str(caught.value) == message


def test_needs_no_end_of_training_where_it_has_none() -> None:
    endless = Clock(steps_per_epoch=None, total_steps=None)
    assert Constant(warmup="4st")(endless)(1) == 0.5
    assert StepDecay(every="10st")(endless)(1000) == pytest.approx(1e-100)
    assert Cosine(length="10st")(endless)(5) == pytest.approx(0.5)


def test_says_its_options_in_words() -> None:
    assert str(Cosine()) == "cosine"
    assert str(Cosine(warmup="5%", floor=0.1)) == "cosine, warmup 5%, floor 0.1"
    assert str(StepDecay(every="3ep")) == "step decay, every 3ep"


schedules = st.builds(
    lambda make, warmup, length: make(warmup=f"{warmup}%", length=None if length is None else f"{length}%"),
    st.sampled_from([Constant, Cosine, partial(Cosine, floor=0.2), partial(StepDecay, every="1st", gamma=0.9)]),
    st.integers(0, 100),
    st.one_of(st.none(), st.integers(1, 100)),
)


@given(schedules, st.integers(100, 10**5), st.floats(0, 0.99), st.lists(st.integers(0, 2 * 10**5), max_size=20))
def test_is_finite_bounded_and_depends_on_the_step_alone(schedule: Schedule, total: int, begin: float, steps: list[int]) -> None:
    clock = Clock(steps_per_epoch=7, total_steps=total, first_step=int(begin * (total - 100)))
    factor, again = schedule(clock), pickle.loads(pickle.dumps(schedule))(clock)
    values = [factor(step) for step in steps]
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in values)
    assert values == [again(step) for step in steps]


def test_is_a_value() -> None:
    assert Cosine(warmup="5%") == Cosine(warmup=Duration.parse("5 percent"))
    assert pickle.loads(pickle.dumps(StepDecay(every="3ep"))) == StepDecay(every="3ep")
