"""When a switch comes: what triggers see, on one rank and on two, before and after a resume."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_adaptive import (
    AllOf,
    AnyOf,
    Clock,
    ConfigError,
    Cosine,
    ExactResume,
    GradientNoiseMonitor,
    Manual,
    OnNoise,
    OnPlateau,
    OnThreshold,
    OptimizerSwitchCallback,
    Trigger,
    attach,
    moments,
    preview,
)
from lightning_adaptive.handover import PRESETS, cross
from lightning_adaptive.partitions import Group
from lightning_adaptive.report import read_curves
from lightning_adaptive.triggers import Projection, Seen, Swats
from tests.cli import Run, result, runs
from tests.cpu_strategies import STRATEGIES, ShardableNet
from tests.pair import Pair
from tests.support import Net, ValidatedNet, counted_steps, digest, loader, trainer
from tests.swats import PROBLEMS, WHOLE, Problem, Published, flat

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")

CLOCK = Clock(steps_per_epoch=10, total_steps=100)


def watched(
    trigger: Trigger, values: Sequence[float], memory: Mapping[str, Any] | None = None, steps: int = 0
) -> list[dict[str, Any]]:
    """What is remembered after each of these values of a metric, ten steps apart."""
    memories = [dict(memory or {})]
    for step, value in enumerate(values, start=1):
        seen = Seen(steps + 10 * step, CLOCK, {"val/loss": value, "other": 1.0})
        memories.append(trigger.observe(memories[-1], seen))
    return memories[1:]


def fires_at(trigger: Trigger, values: Sequence[float]) -> int | None:
    """Which of the values makes it fire, counted from 0."""
    return next((index for index, memory in enumerate(watched(trigger, values)) if "fired" in memory), None)


# What is seen


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"patience": 0}, [3, 2, 2], 2),
        ({"patience": 2}, [3, 2, 2, 2, 1.9, 2, 2, 2], 7),
        ({"patience": 1, "min_delta": 0.5}, [3, 2.6, 2.4, 2.2, 2.0], 4),
        ({"patience": 1, "mode": "max"}, [0.1, 0.3, 0.2, 0.25], 3),
        ({"patience": 0, "cooldown": 3}, [1, 2, 3, 4, 5], 4),
        ({"patience": 3}, [3, 2, 1, 0.5], None),
        ({"patience": 0}, [3, math.nan, 2, math.inf, 1.9, 2.5], 5),
        ({"patience": 0, "smoothing": 0.5}, [1, 0.5, 0.9], 2),
        ({"patience": 0, "not_before": "50st"}, [1, 1, 1, 1, 1, 1], 5),
    ],
)
def test_a_plateau(options: dict[str, Any], values: list[float], expected: int | None) -> None:
    assert fires_at(OnPlateau(monitor="val/loss", **options), values) == expected


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.integers(0, 5))
def test_a_plateau_is_a_run_of_values_that_are_not_below_the_best(values: list[int], patience: int) -> None:
    def stands(index: int) -> bool:
        begin = index - patience
        return begin > 0 and min(values[begin : index + 1]) >= min(values[:begin])

    expected = next((index for index in range(len(values)) if stands(index)), None)
    assert fires_at(OnPlateau(monitor="val/loss", patience=patience), values) == expected


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.floats(0, 0.95))
def test_smoothing_is_an_average_that_is_corrected_for_its_beginning(values: list[float], share: float) -> None:
    memories = watched(OnThreshold(monitor="val/loss", above=1e9, smoothing=share), values)
    weights = [share ** (len(values) - 1 - index) for index in range(len(values))]
    expected = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
    assert memories[-1]["value"] == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("trigger", "values", "expected", "reason"),
    [
        (OnThreshold(monitor="val/loss", below=0.5), [0.9, 0.5, 0.4], 2, "val/loss is 0.4, below 0.5"),
        (OnThreshold(monitor="val/loss", above=0.97), [0.9, 0.97, 0.98], 2, "val/loss is 0.98, above 0.97"),
        (OnPlateau(monitor="val/loss", patience=0), [0.9, 0.95], 1, "val/loss has not been below 0.9 for 1 validations"),
    ],
)
def test_says_why(trigger: Trigger, values: list[float], expected: int, reason: str) -> None:
    memories = watched(trigger, values)
    assert fires_at(trigger, values) == expected
    assert memories[-1]["fired"] == reason
    assert watched(trigger, [0.0, 99.0], memories[-1], 500) == [memories[-1]] * 2, "it stays fired"


def test_any_and_all() -> None:
    low, high = OnThreshold(monitor="val/loss", below=1.0), OnThreshold(monitor="val/loss", above=2.0)
    values = [1.5, 0.5, 1.5, 2.5]
    assert fires_at(AnyOf(of={"low": low, "high": high}), values) == 1
    assert fires_at(AllOf(of={"low": low, "high": high, "none": None}), values) == 3
    last = watched(AllOf(of={"low": low, "high": high}), values)[-1]
    assert last["fired"] == "low: val/loss is 0.5, below 1 and high: val/loss is 2.5, above 2"
    nested = AnyOf(of={"both": AllOf(of={"low": low, "high": high}), "asked": Manual()}, not_before="30st")
    assert fires_at(nested, values) is None
    assert fires_at(nested, [*values, 0.5]) == 4
    assert nested.of_kind(OnThreshold) == [low, high]
    assert nested.of_kind(Manual) == [Manual()]
    assert nested.reasons(watched(nested, [*values, 0.5])[-1]) == {
        "": "both: low: val/loss is 0.5, below 1 and high: val/loss is 2.5, above 2",
        "both": "low: val/loss is 0.5, below 1 and high: val/loss is 2.5, above 2",
        "both.low": "val/loss is 0.5, below 1",
        "both.high": "val/loss is 2.5, above 2",
    }
    assert nested.shows(watched(nested, [*values, 0.5])[-1]) == {"both/low/val/loss": 0.5, "both/high/val/loss": 2.5}


SWATS = Swats(window=3, patience=2, rtol=0.5)
EVERY: list[Trigger] = [
    OnPlateau(monitor="val/loss", patience=2, smoothing=0.3, cooldown=1),
    OnThreshold(monitor="val/loss", below=0.3, smoothing=0.6),
    *(replace(SWATS, criterion=criterion, per=per, eps=0.1) for criterion in ("relative", "paper") for per in ("model", "group")),
    OnNoise(above=1, patience=3),
    Manual(),
    AnyOf(of={"a": OnPlateau(monitor="val/loss", patience=4), "b": OnThreshold(monitor="val/loss", above=1.4)}),
    AllOf(of={"a": OnPlateau(monitor="val/loss", patience=1), "b": AnyOf(of={"c": SWATS, "d": OnNoise(below=1, patience=2)})}),
]
sums = st.tuples(st.floats(1e-3, 1.0), st.one_of(st.just(0.0), st.floats(-1.0, -1e-3), st.floats(1e-3, 1.0)))
"""``p.p`` and ``-p.g``."""
observations = st.tuples(st.floats(0, 2), sums, sums, st.booleans())


@given(st.sampled_from(EVERY), st.lists(observations, min_size=2, max_size=30), st.data())
def test_what_is_remembered_is_plain_and_enough(trigger: Trigger, values: list[Any], data: st.DataObject) -> None:
    """Saved and loaded in the middle it goes on as if nothing had been."""

    def after(memory: Mapping[str, Any], first: int, last: int) -> Mapping[str, Any]:
        for step, (value, one, other, is_asked) in enumerate(values[first:last], start=first + 1):
            projections = {"a": Projection(*one, 0.9), "b": Projection(*other, 0.9)}
            noise = {"noise/scale": 32 * value, "noise/batch": 32.0}
            memory = trigger.observe(memory, Seen(10 * step, CLOCK, {"val/loss": value}, is_asked, projections, noise))
        return memory

    stop = data.draw(st.integers(1, len(values) - 1))
    memory = after({}, 0, stop)
    saved = json.loads(json.dumps(memory))
    assert saved == memory
    event(f"{type(trigger).__name__} has fired: {'fired' in saved}")
    assert after(saved, stop, len(values)) == after({}, 0, len(values))


def test_a_validation_that_is_repeated_at_its_step_is_seen_once() -> None:
    trigger = OnPlateau(monitor="val/loss", patience=0)
    first = trigger.observe({}, Seen(10, CLOCK, {"val/loss": 1.0}))
    assert trigger.observe(first, Seen(10, CLOCK, {"val/loss": 1.0})) == first


def test_a_request_is_seen_at_any_time() -> None:
    trigger = Manual()
    assert "fired" not in trigger.observe({}, Seen(3, CLOCK))
    assert trigger.observe({}, Seen(3, CLOCK, asked=True))["fired"] == "it was asked for"
    assert "fired" not in Manual(not_before="10%").observe({}, Seen(3, CLOCK, asked=True))


EITHER = "above: a threshold is either above or below a value. Give one of the two."
REFUSED: list[tuple[type[Trigger], dict[str, Any], str]] = [
    (OnPlateau, {"monitor": ""}, "monitor: '' is no name of a metric. Write one that is logged, val/loss."),
    (OnPlateau, {"monitor": "x", "mode": "maxx"}, "mode: 'maxx' is not one of min, max. Did you mean 'max'?"),
    (OnPlateau, {"monitor": "x", "patience": 1.5}, "patience: 1.5 is no number of validations. Write a whole number from 0 on."),
    (OnPlateau, {"monitor": "x", "cooldown": -1}, "cooldown: -1 is no number of validations. Write a whole number from 0 on."),
    (OnPlateau, {"monitor": "x", "min_delta": math.nan}, "min_delta: nan is no change of a metric. Write a number from 0 on."),
    (OnPlateau, {"monitor": "x", "smoothing": 1}, "smoothing: 1 lies outside 0 to below 1. It is a share of the past."),
    (
        OnPlateau,
        {"monitor": "x", "not_before": 5},
        "not_before: 5 has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training).",
    ),
    *((cls, others, EITHER) for cls, others in ((OnThreshold, {"monitor": "x"}), (OnNoise, {}))),
    *((cls, {**others, "above": 1, "below": 0}, EITHER) for cls, others in ((OnThreshold, {"monitor": "x"}), (OnNoise, {}))),
    (OnThreshold, {"monitor": "x", "below": "low"}, "below: 'low' is not a number."),
    (OnNoise, {"above": "big"}, "above: 'big' is not a number."),
    (OnThreshold, {"monitor": "x", "above": math.inf}, "above: inf is never passed. Write a finite number."),
    (OnNoise, {"below": math.inf}, "below: inf is never passed. Write a finite number."),
    (OnNoise, {"above": 1, "of": "batches"}, "of: 'batches' is not one of batch, samples. Did you mean 'batch'?"),
    (OnNoise, {"above": 1, "patience": 0}, "patience: 0 is no number of looks. Write a whole number from 1 on."),
    (OnNoise, {"above": 1, "every_n_steps": 0}, "every_n_steps: 0 is no number of steps. Write a whole number from 1 on."),
    (Manual, {"file": "../x"}, "file: '../x' is no name of a file in the run's folder."),
    (Manual, {"every_n_steps": 0}, "every_n_steps: 0 is no number of steps. Write a whole number from 1 on."),
    (AnyOf, {"of": {}}, "of: is empty. Write at least one trigger, by name."),
    (AnyOf, {"of": ["a"]}, "of: ['a'] is no mapping of triggers by name."),
    (AllOf, {"of": {"a": "plateau"}}, "of.a: 'plateau' is no trigger."),
    (Swats, {"criterion": "papers"}, "criterion: 'papers' is not one of relative, paper. Did you mean 'paper'?"),
    (Swats, {"per": "tensor"}, "per: 'tensor' is not one of model, group."),
    (Swats, {"rtol": "0.1"}, "rtol: '0.1' is not a number."),
    (Swats, {"rtol": 0}, "rtol: 0 is no tolerance. Write a number above 0."),
    (Swats, {"eps": math.inf}, "eps: inf is no tolerance. Write a number above 0."),
    (Swats, {"eps": True}, "eps: True is not a number."),
    (Swats, {"eps": math.nan}, "eps: nan is no tolerance. Write a number above 0."),
    (Swats, {"window": 1}, "window: 1 is no number of looks. Write a whole number from 2 on."),
    (Swats, {"patience": 0}, "patience: 0 is no number of looks. Write a whole number from 1 on."),
    (Swats, {"every_n_steps": 2.0}, "every_n_steps: 2.0 is no number of steps. Write a whole number from 1 on."),
]


@pytest.mark.parametrize(("cls", "options", "message"), REFUSED, ids=[f"{cls.__name__}, {message}" for cls, _, message in REFUSED])
def test_refuses(cls: type[Trigger], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(**options)
    assert str(caught.value) == message


# SWATS


def projections(optimizer: Optimizer) -> dict[str, Projection]:
    """What each group has done in the last step, summed up as the switch does it."""
    found, rows = moments.projections(optimizer)
    columns = dict(zip(found, rows.T.tolist(), strict=True))
    return {
        group.get("name", ""): Projection(*np.sum([columns[one] for one in group["params"]], axis=0).tolist(), group["betas"][1])
        for group in optimizer.param_groups
    }


def asked(
    problem: Problem, trigger: Swats, optimizer: Optimizer, steps: int = 115, sign: float = 1.0
) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """The gammas of torch's steps by group, and what the trigger remembers after each."""
    tensors = [one for group in optimizer.param_groups for one in group["params"]]
    gammas, memories = [], [dict[str, Any]()]
    for k in range(1, steps + 1):
        optimizer.zero_grad()
        (sign * problem.loss(tensors, k)).backward()
        optimizer.step()
        seen = projections(optimizer)
        gammas.append({name: one.update / one.along for name, one in seen.items()})
        memories.append(trigger.observe(memories[-1], Seen(k, CLOCK, projections=seen)))
    return gammas, memories[1:]


def fired_at(memories: Sequence[Mapping[str, Any]]) -> int | None:
    """The step after which it fired, counted from 1."""
    return next((step for step, memory in enumerate(memories, start=1) if "fired" in memory), None)


PAPER = Swats(criterion="paper", eps=1e-3)
NEXT_TO_NOTHING = 1e-30
"""Adam's eps, whose place in the paper is another than in torch."""

VARIANTS: dict[str, tuple[type[Optimizer], dict[str, Any], dict[str, Any]]] = {
    "plain": (Adam, {"foreach": False}, {}),
    "foreach": (Adam, {"foreach": True}, {}),
    "fused": (Adam, {"fused": True}, {}),
    "tensor lr": (Adam, {"lr": torch.tensor(0.03, dtype=torch.float64)}, {}),
    "other betas": (Adam, {"betas": (0.8, 0.99)}, {"betas": (0.8, 0.99)}),
    "amsgrad": (Adam, {"amsgrad": True}, {"amsgrad": True}),
    "decay": (Adam, {"weight_decay": 0.01}, {"decay": 0.01}),
    "decay, fused and amsgrad": (
        Adam,
        {"weight_decay": 0.01, "fused": True, "amsgrad": True},
        {"decay": 0.01, "amsgrad": True},
    ),
    "decoupled decay": (AdamW, {"weight_decay": 0.1}, {"decay": 0.1, "decoupled": True}),
    "decoupled decay of Adam": (
        Adam,
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"decay": 0.1, "decoupled": True},
    ),
    "maximize": (Adam, {"maximize": True}, {"maximize": True}),
    "maximize with decay": (Adam, {"maximize": True, "weight_decay": 0.01}, {"maximize": True, "decay": 0.01}),
}


def equals_the_publication(name: str, variant: str, **planted: Any) -> None:
    problem, (cls, options, theirs) = PROBLEMS[name], VARIANTS[variant]
    sign = -1.0 if options.get("maximize") else 1.0
    optimizer = cls(problem.tensors(), **{"lr": 0.03, "eps": NEXT_TO_NOTHING, **options})
    gammas, memories = asked(problem, PAPER, optimizer, sign=sign)
    published = Published(lambda w, k: sign * problem.gradient(w, k), problem.start, lr=0.03, **{**theirs, **planted})
    expected, switched = published.run(115)
    np.testing.assert_allclose([one[""] for one in gammas], expected[:, 0], rtol=1e-6)
    assert ([fired_at(memories)] if switched else []) == [step for step, _ in switched]
    found = PAPER.estimate(memories[-1])
    assert switched == [] or found == {"": pytest.approx(switched[0][1], rel=1e-6)}


@pytest.mark.parametrize(
    ("name", "variant"),
    [*(("quadratic", variant) for variant in VARIANTS), *(("net", variant) for variant in ("plain", "fused", "amsgrad", "decay"))],
)
def test_swats_equals_the_publication(name: str, variant: str) -> None:
    equals_the_publication(name, variant)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_publication_switches_on_these_problems(name: str) -> None:
    problem = PROBLEMS[name]
    [(step, lr)] = Published(problem.gradient, problem.start, lr=0.03).run(300)[1]
    assert 10 < step < 200
    assert lr > 0.1


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="planted: another algorithm than ours")
@pytest.mark.parametrize(
    ("variant", "planted"),
    [
        ("plain", {"late": 1}),
        ("plain", {"betas": (0.9, 0.99901)}),
        ("plain", {"amsgrad": True}),
        ("decay", {"decay": 0.0}),
        ("decay", {"decoupled": True}),
        ("decoupled decay", {"decoupled": False}),
        ("plain", {"parts": (slice(0, 6),)}),
    ],
)
def test_parity_with_the_publication_sees(variant: str, planted: dict[str, Any]) -> None:
    equals_the_publication("quadratic", variant, **planted)


@pytest.mark.parametrize("per", ["model", "group"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_groups_of_swats_are_decided_for_together(name: str, per: Any) -> None:
    """With another learning rate in the second group; the decision of groups comes with the last, at what each found."""
    problem = PROBLEMS[name]
    first = len(problem.shapes) // 2
    size = sum(map(math.prod, problem.shapes[:first]))
    rest = len(problem.start) - size
    tensors = problem.tensors()
    groups = [{"params": tensors[:first], "name": "a"}, {"params": tensors[first:], "name": "b", "lr": 0.01}]
    trigger = replace(PAPER, per=per)
    gammas, memories = asked(problem, trigger, Adam(groups, lr=0.03, eps=NEXT_TO_NOTHING), 270)
    parts = (slice(0, size), slice(size, None))
    published = Published(problem.gradient, problem.start, lr=np.repeat([0.03, 0.01], [size, rest]))
    expected, switched = replace(published, parts=parts if per == "group" else (WHOLE,)).run(270)
    assert len(switched) == (2 if per == "group" else 1)
    assert fired_at(memories) == max(step for step, _ in switched)
    names = ["a", "b"] if per == "group" else [""]
    assert trigger.estimate(memories[-1]) == {
        name: pytest.approx(lr, rel=1e-6) for name, (_, lr) in zip(names, switched, strict=True)
    }
    if per == "group":
        np.testing.assert_allclose([[one["a"], one["b"]] for one in gammas], expected, rtol=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_swats_with_its_handover_ends_with_the_weights_of_the_publication(name: str) -> None:
    """``v = beta1 v + g, w -= (1 - beta1) L v`` is torch's SGD with the learning rate ``(1 - beta1) L``."""
    problem = PROBLEMS[name]
    tensors = problem.tensors()
    adam = Adam(tensors, lr=0.03, eps=NEXT_TO_NOTHING)
    published = Published(problem.gradient, problem.start, lr=0.03, stays=False)
    [(step, lr)] = published.run(200)[1]
    _, memories = asked(problem, PAPER, adam, step)
    assert fired_at(memories) == step
    sgd = SGD(tensors, lr=9.0, momentum=0.9)
    cross(PRESETS["swats"], adam, sgd, (Group(()),), lambda _, rows: rows, estimate=PAPER.estimate(memories[-1]))
    assert sgd.param_groups[0]["lr"] == pytest.approx(0.1 * lr, rel=1e-9)
    for k in range(step + 1, 201):
        sgd.zero_grad()
        problem.loss(tensors, k).backward()
        sgd.step()
    np.testing.assert_allclose(flat(tensors), published.weights, rtol=1e-6)


def looked(trigger: Swats, seen: Sequence[tuple[float, float]], beta2: float = 0.999) -> list[dict[str, Any]]:
    """What is remembered after each look at sums ``p.p`` and ``-p.g``."""
    memories = [dict[str, Any]()]
    for step, (update, along) in enumerate(seen, start=1):
        one = Seen(step, CLOCK, projections={"": Projection(update, along, beta2)})
        memories.append(trigger.observe(memories[-1], one))
    return memories[1:]


@given(st.lists(sums, min_size=1, max_size=25), st.sampled_from([0.5, 0.9, 0.999]), st.floats(1e-3, 1.0))
def test_the_papers_average_is_a_sum_in_which_zeros_count_as_steps_only(
    seen: list[tuple[float, float]], beta2: float, eps: float
) -> None:
    memories = looked(Swats(criterion="paper", eps=eps), seen, beta2)
    expected = None
    for k in range(1, len(seen) + 1):
        gammas = [update / along for update, along in seen[:k] if along]
        weighted = sum(gamma * beta2 ** (len(gammas) - 1 - index) for index, gamma in enumerate(gammas))
        corrected = weighted * (1 - beta2) / (1 - beta2**k)
        if gammas:
            assert memories[k - 1]["groups"][""]["average"] == pytest.approx(weighted * (1 - beta2), rel=1e-9, abs=1e-9)
        if expected is None and k > 1 and seen[k - 1][1] and corrected > 0 and abs(corrected - gammas[-1]) < eps:
            expected = k
            assert memories[k - 1]["groups"][""]["settled_at"] == pytest.approx(corrected, rel=1e-9)
        if expected is not None:
            break
    assert fired_at(memories) == expected


def test_the_paper_needs_two_looks_and_passes_over_what_is_no_learning_rate() -> None:
    trigger = Swats(criterion="paper", eps=1e-3)
    assert fired_at(looked(trigger, [(1.0, 2.0)] * 3)) == 2
    falling = looked(trigger, [(1.0, -2.0)] * 5)
    assert fired_at(falling) is None
    assert falling[-1]["groups"][""]["lr"] == pytest.approx(-0.5)
    assert trigger.estimate(falling[-1]) == {}
    assert looked(trigger, [(1.0, 2.0)] * 2)[-1]["fired"] == "the learning rate for SGD has settled, at 0.5"


FINITE = [(1.0, 2.0), (1.1, 2.0), (0.9, 2.0), (1.0, 2.1), (1.0, 1.9)]


@pytest.mark.parametrize("criterion", ["paper", "relative"])
@pytest.mark.parametrize("value", [(math.nan, 1.0), (1.0, math.inf), (1.0, -math.inf)])
def test_a_look_that_is_not_finite_is_passed_over(criterion: Any, value: tuple[float, float]) -> None:
    trigger = Swats(criterion=criterion, window=2, eps=1e-9)
    clean = looked(trigger, FINITE)[-1]
    dirty = looked(trigger, [*FINITE[:2], value, *FINITE[2:], value])[-1]
    assert dirty == {**clean, "passed_over": 2}
    assert trigger.passed_over(dirty) == 2


def settled(seen: Sequence[tuple[float, float]], window: int, rtol: float, patience: int) -> int | None:
    """When the relative criterion fires, from its definition: weighted sums over all looks, anew for each."""

    def ratio(looks: int, length: int) -> float:
        weights = [(1 - 1 / length) ** (looks - 1 - index) for index in range(looks)]
        update, along = (math.fsum(w * one[part] for w, one in zip(weights, seen, strict=False)) for part in (0, 1))
        return update / along if along > 0 else math.nan

    agreed = 0
    for looks in range(1, len(seen) + 1):
        short, long = ratio(looks, window), ratio(looks, 10 * window)
        agrees = looks >= 2 * window and abs(long - short) <= rtol * long
        agreed = agreed + 1 if agrees else 0
        if agreed == patience:
            return looks
    return None


@given(st.lists(sums, min_size=1, max_size=30), st.integers(2, 5), st.floats(0.01, 2.0), st.integers(1, 4))
def test_the_relative_criterion_is_its_definition(seen: list[tuple[float, float]], window: int, rtol: float, patience: int) -> None:
    trigger = Swats(window=window, rtol=rtol, patience=patience)
    found = fired_at(looked(trigger, seen))
    event(f"fires: {found is not None}")
    assert found == settled(seen, window, rtol, patience)


@given(st.integers(2, 40), st.integers(1, 30), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6))
def test_a_constant_settles_as_early_as_can_be(window: int, patience: int, update: float, along: float) -> None:
    trigger = Swats(window=window, patience=patience)
    memories = looked(trigger, [(update, along)] * (2 * window + patience))
    assert fired_at(memories) == 2 * window + patience - 1
    assert trigger.estimate(memories[-1]) == {"": pytest.approx(update / along, rel=1e-9)}


@pytest.mark.parametrize(("rate", "patience"), [(0.01, 20), (-0.01, 20), (0.002, 150), (-0.002, 150), (0.0004, 1000)])
def test_what_drifts_never_settles(rate: float, patience: int) -> None:
    """By a share in each look. At first the two averages are nearly over the same, so a slow drift needs patience to be seen."""
    trigger = Swats(rtol=0.1, patience=patience)
    assert fired_at(looked(trigger, [(math.exp(rate * step), 1.0) for step in range(3000)])) is None
    assert fired_at(looked(trigger, [(math.exp(rate * min(step, 500)), 1.0) for step in range(6000)])) is not None


def test_noise_in_what_is_averaged_does_not_keep_it_from_settling() -> None:
    """``-p.g`` is negative in two of five looks, and the quotient of a single look anything between minus and plus infinity."""
    random = np.random.default_rng(0)
    seen = [(1.0, along) for along in random.normal(0.5, 2.0, size=6000)]
    trigger = Swats(window=200, rtol=0.3)
    memories = looked(trigger, seen)
    assert sum(along < 0 for _, along in seen) > 2000
    assert fired_at(memories) is not None
    assert trigger.estimate(memories[-1])[""] == pytest.approx(2.0, rel=0.4)
    assert max(update / along for update, along in seen) > 1000


def test_a_group_that_has_settled_stays_so_and_one_that_never_moved_is_not_waited_for() -> None:
    trigger = Swats(per="group", window=2, patience=1, rtol=0.1)
    memory: dict[str, Any] = {}
    for step in range(1, 101):
        settles_early = Projection(1.0 if step < 12 else float(step), 1.0, 0.999)
        settles_late = Projection(min(step, 20), 1.0, 0.999)
        seen = {"early": settles_early, "late": settles_late, "frozen": Projection(0, 0, 0.999)}
        memory = trigger.observe(memory, Seen(step, CLOCK, projections=seen))
        if step == 15:
            assert memory["groups"]["early"]["settled_at"] == pytest.approx(1.0)
            assert memory["groups"]["early"]["gap"] > 0.1
            assert list(memory["groups"]) == ["early", "late"]
    assert trigger.estimate(memory)["early"] == pytest.approx(1.0)
    assert memory["fired"].startswith("the learning rate for SGD has settled, at early 1, late ")
    frozen = Seen(1, CLOCK, projections={"frozen": Projection(0, 0, 0.999)})
    assert "fired" not in trigger.observe({}, frozen), "nothing has settled where nothing moves"


def test_swats_looks_every_so_many_steps_and_shows_what_it_sees() -> None:
    trigger = Swats(window=2, patience=1, every_n_steps=5, not_before="10st")
    memory: dict[str, Any] = {}
    looks = []
    for step in range(1, 31):
        after = trigger.observe(
            memory, Seen(step, CLOCK, projections={"a": Projection(1.0, 4.0, 0.9), "b": Projection(1.0, 4.0, 0.9)})
        )
        looks += [step] if after != memory else []
        memory = after
    assert looks == [10, 15, 20, 25], "the fourth of them settles it, and then there is nothing to see"
    assert trigger.shows(memory) == {"lr": pytest.approx(0.25), "gap": pytest.approx(0.0, abs=1e-12)}
    assert trigger.observe(memory, Seen(35, CLOCK)) == memory
    of_groups = replace(trigger, per="group", not_before=None)
    memory = of_groups.observe({}, Seen(5, CLOCK, projections={"a": Projection(1.0, 4.0, 0.9), "b": Projection(1.0, 2.0, 0.9)}))
    assert of_groups.shows(memory) == {"a/lr": 0.25, "a/gap": 0.0, "b/lr": 0.5, "b/gap": 0.0}


def test_among_others_the_estimate_is_that_of_the_first_that_has_one() -> None:
    slow, quick = Swats(not_before="50st"), Swats(criterion="paper")
    both = AllOf(of={"asked": Manual(), "slow": slow, "quick": quick})
    memory = both.observe({}, Seen(1, CLOCK, projections={"": Projection(1.0, 4.0, 0.9)}))
    assert both.of_kind(Swats) == [slow, quick]
    assert both.estimate(memory) == {"": pytest.approx(0.25)}


# In runs


class Scripted(ValidatedNet):
    """Logs the given values as its metric, one for each validation; the sanity check sees the best that there could be."""

    def __init__(self, values: Sequence[float], by_rank: float = 0.0) -> None:
        super().__init__()
        self.values = list(values)
        self.by_rank = by_rank

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        value = -100.0 if self.trainer.sanity_checking else self.values[min(self.trainer.current_epoch, len(self.values) - 1)]
        self.log("val/loss", value + self.by_rank * self.trainer.global_rank)


class Steps(Callback):
    """The class that made each step."""

    def __init__(self) -> None:
        self.classes: list[str] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.classes.append(type(optimizer).__name__)

    @property
    def first_sgd(self) -> int | None:
        return self.classes.index("SGD") if "SGD" in self.classes else None


def switch(when: Trigger | None, at: str | None = None, **options: Any) -> OptimizerSwitchCallback:
    return OptimizerSwitchCallback(at, partial(SGD, lr=0.02, momentum=0.9), when=when, **options)


def fit(module: Net, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Steps:
    steps = Steps()
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    runner = trainer(**{"max_epochs": 5, "callbacks": [*callbacks, steps], "enable_checkpointing": saves, **options})
    runner.fit(module, loader(), loader(), ckpt_path=ckpt_path, weights_only=True)
    return steps


PLATEAU = OnPlateau(monitor="val/loss", patience=1)
STANDS = [1.0, 0.5, 0.6, 0.7, 0.1]
"""Its plateau is seen after the fourth epoch."""


def test_a_plateau_switches_at_the_next_step_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert fit(Scripted(STANDS), switch(PLATEAU)).first_sgd == 32
    [line] = [line for line in caplog.messages if line.startswith("SWITCH")]
    assert line.startswith(
        "SWITCH at step 32 (epoch 4): Adam lr 1.0e-02 -> SGD lr 2.0e-02 (own), because val/loss has not been below "
    )


def test_whichever_comes_first() -> None:
    assert fit(Scripted(STANDS), switch(PLATEAU, "2ep")).first_sgd == 16
    assert fit(Scripted(STANDS), switch(PLATEAU, "39st")).first_sgd == 32
    assert fit(Scripted([5.0, 4.0, 3.0, 2.0, 1.0]), switch(PLATEAU, "35st")).first_sgd == 35


def test_a_sanity_check_is_not_seen() -> None:
    assert fit(Scripted(STANDS), switch(PLATEAU), num_sanity_val_steps=2).first_sgd == 32


def test_a_trigger_of_a_later_switch_sees_only_its_own_phase() -> None:
    values = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    quick = OnPlateau(monitor="val/loss", patience=0)
    then = OptimizerSwitchCallback(optimizer=partial(Adam, lr=0.01), when=quick)
    steps = fit(Scripted(values), switch(quick, then=then), max_epochs=6)
    assert [name for name, _ in itertools.groupby(steps.classes)] == ["Adam", "SGD", "Adam"]
    assert (steps.classes.index("SGD"), steps.classes.index("Adam", 16)) == (16, 32)


def test_validations_within_an_epoch_count() -> None:
    class Rising(ValidatedNet):
        count = 0

        def on_validation_epoch_end(self) -> None:
            self.count += not self.trainer.sanity_checking
            self.log("val/rise", float(self.count))

    assert fit(Rising(), switch(OnThreshold(monitor="val/rise", above=2)), val_check_interval=2).first_sgd == 6


def test_a_switch_waits_for_the_beginning_of_a_window() -> None:
    class Late(ValidatedNet):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", 0.0)

    trigger = OnThreshold(monitor="val/loss", below=1)
    steps = fit(Late(), switch(trigger), val_check_interval=3, accumulate_grad_batches=4)
    assert steps.first_sgd == 1  # seen after the third of eight batches, in the first window of four


def test_a_metric_that_is_not_logged_ends_the_run_at_the_first_validation() -> None:
    steps: list[int] = []

    class Counting(Scripted):
        def on_train_batch_end(self, *_: Any) -> None:
            steps.append(1)

    with pytest.raises(ConfigError) as caught:
        fit(Counting(STANDS), switch(OnPlateau(monitor="val_loss")))
    assert str(caught.value) == (
        "switch.when.monitor: 'val_loss' was not logged. Did you mean 'val/loss'? Logged: train/loss, val/loss."
    )
    assert len(steps) == 8


def test_a_value_that_is_not_finite_is_passed_over_and_said() -> None:
    with pytest.warns(UserWarning, match=r"^A metric of OnPlateau\(monitor=val/loss, patience=1\) was not finite at step 16\."):
        assert fit(Scripted([1.0, math.nan, 1.0, 1.0, 1.0]), switch(PLATEAU)).first_sgd == 32


@pytest.mark.filterwarnings(
    "ignore:You passed in a `val_dataloader` but have no", "ignore:You defined a `validation_step` but have no"
)
@pytest.mark.parametrize("missing", ["batches", "data", "step"])
def test_without_validation_there_is_nothing_to_see(missing: str) -> None:
    trigger = AnyOf(of={"stands": PLATEAU, "settled": Swats()})
    runner = trainer(max_epochs=5, callbacks=[switch(trigger)], limit_val_batches=0 if missing == "batches" else 1.0)
    with counted_steps() as counts, pytest.raises(ConfigError) as caught:
        runner.fit(Net() if missing == "step" else Scripted(STANDS), loader(), None if missing == "data" else loader())
    assert str(caught.value) == (
        f"switch.when: {trigger} looks at a metric after each validation, and this training has none: a module with "
        "validation_step, validation data and limit_val_batches above 0 are needed."
    )
    assert counts == {}


def test_a_switch_that_never_came_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert fit(Scripted([5.0, 4.0, 3.0, 2.0, 1.0]), switch(PLATEAU)).first_sgd is None
    assert "NO SWITCH: training ended at step 40, before when=OnPlateau(monitor=val/loss, patience=1)." in caplog.messages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "at: a switch needs its moment: 5ep (epochs), 5st (optimizer steps) or 5% (of training); or a trigger (when)."),
        ({"when": "plateau"}, "when: 'plateau' is no trigger. Write one, OnPlateau(monitor='val/loss') or another."),
        (
            {"at": "5ep", "then": switch(PLATEAU, dry_run=True)},
            "then: optimizer_index, on_resume and dry_run are given to the first switch, and hold for those after it.",
        ),
    ],
)
def test_a_switch_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        OptimizerSwitchCallback(optimizer=partial(SGD, lr=0.1), **options)
    assert str(caught.value) == message


# By a person


def test_a_file_switches_and_is_taken_away(tmp_path: Path) -> None:
    class Asking(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 11:
                (tmp_path / "SWITCH").touch()

    manual = switch(AnyOf(of={"plateau": OnPlateau(monitor="val/loss", patience=9), "asked": Manual(every_n_steps=5)}))
    assert fit(Scripted(STANDS), Asking(), manual, default_root_dir=str(tmp_path)).first_sgd == 15
    assert list(tmp_path.iterdir()) == []


def test_a_program_may_ask() -> None:
    manual = switch(Manual(every_n_steps=1))

    class Asking(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                manual.switch_now()

    assert fit(Scripted(STANDS), manual, Asking(), limit_val_batches=0).first_sgd == 7


def test_a_switch_without_the_trigger_cannot_be_asked() -> None:
    with pytest.raises(ConfigError) as caught:
        switch(PLATEAU).switch_now()
    assert str(caught.value) == "when: this switch cannot be asked for. Give it the trigger Manual(), alone or among others."


# Resume


def test_what_is_remembered_lies_in_the_checkpoint_in_plain_values(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=12, save_on_train_epoch_end=False)
    fit(Scripted(STANDS), switch(PLATEAU), saver)
    states = torch.load(tmp_path / "step=12.ckpt", weights_only=True)["callbacks"]
    [state] = [state for key, state in states.items() if key.startswith("OptimizerSwitch")]
    assert state["trigger"] == {"step": 8, "count": 1, "average": 1.0, "value": 1.0, "best": 1.0, "waited": 0}


# Two ranks


@pytest.mark.parametrize("name", ["ddp", "fsdp2 sharded"])
def test_ranks_that_see_different_values_decide_together(name: str, pair: Pair) -> None:
    """Rank 0 sees 0.5 after the second epoch, rank 1 sees 0.9: the mean is 0.7, and below 0.65 only after the third."""
    [one, other] = pair.run(scripted_pair, name)
    assert one == other
    assert one.index("SGD") == 12


class ScriptedShardable(ShardableNet, Scripted):
    pass


def scripted_pair(name: str) -> list[str]:
    trigger = OnThreshold(monitor="val/loss", below=0.65)
    module = ScriptedShardable([1.0, 0.5, 0.4, 0.3], by_rank=0.4)
    steps = Steps()
    runner = trainer(strategy=STRATEGIES[name](), devices=2, max_epochs=4, callbacks=[switch(trigger), steps])
    runner.fit(module, loader(), loader())
    return steps.classes


def test_one_rank_may_ask_for_all(pair: Pair) -> None:
    [one, other] = pair.run(asked_by_one)
    assert one == other
    assert one.index("SGD") == 4


def asked_by_one() -> list[str]:
    manual, steps = switch(Manual(every_n_steps=2)), Steps()

    class Asking(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 2 and trainer.global_rank == 1:
                manual.switch_now()

    runner = trainer(strategy="ddp", devices=2, max_epochs=2, callbacks=[manual, Asking(), steps], limit_val_batches=0)
    runner.fit(Net(), loader())
    return steps.classes


# What a user sees


def test_what_the_trigger_sees_is_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Scripted(STANDS), switch(PLATEAU), logger=logger)
    logger.save()
    curves = read_curves(tmp_path / "metrics.csv")
    assert curves["switch/waited"] == ([8, 16, 24, 32], [0.0, 0.0, 1.0, 2.0])
    assert curves["switch/best"] == ([8, 16, 24, 32], [1.0, 0.5, 0.5, 0.5])


def test_the_plan_leaves_open_when_a_trigger_decides() -> None:
    module = attach(Scripted(STANDS), optimizer=partial(Adam, lr=0.1), scheduler=Cosine())
    runner = trainer(max_epochs=5, callbacks=[switch(PLATEAU, scheduler=Cosine())])
    lines = str(preview(runner, module, loader())).splitlines()
    assert re.match(r"  phase 1  Adam       steps 0\.\.\?  cosine  lr 1\.0e-01  676 parameters", lines[1])
    assert re.match(r"  phase 2  SGD        steps \?\.\.39  cosine  lr 2\.0e-02  676 parameters", lines[2])
    assert lines[2].endswith("  <- when=OnPlateau(monitor=val/loss, patience=1)")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trigger@switch.when=threshold", "switch.when.monitor=val/acc", "switch.when.above=0"], "val/acc is "),
        (
            ["trigger@switch.when=any", "+trigger@switch.when.of.good=threshold", "switch.when.of.good.below=99"],
            "good: val/loss is ",
        ),
        (["trigger@switch.when=plateau", "switch.when.min_delta=99", "switch.when.patience=0"], "val/loss has not been below "),
    ],
)
def test_the_command_line_switches_by_a_trigger(
    overrides: list[str], words: str, train: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = ("trainer.max_epochs=4", "trainer.limit_train_batches=4", "trainer.log_every_n_steps=1", "test=false")
    with caplog.at_level("INFO"):
        ended = train(*short, "switch.at=null", *overrides)
    assert ended.code == 0, ended.err
    assert f"because {words}" in caplog.text
    [folder] = runs(tmp_path)
    assert [phase["optimizer"] for phase in result(folder)["phases"]] == ["Adam", "SGD"]


def test_swats_and_the_handover_find_a_learning_rate_for_the_same() -> None:
    with pytest.raises(ConfigError) as caught:
        fit(ValidatedNet(), switch(Swats(per="group"), handover="swats"))
    assert str(caught.value) == (
        "switch.handover.per: the handover takes a learning rate per model, and SWATS finds one per group. Give both the same."
    )


@pytest.mark.parametrize("scheduler", [None, Cosine(warmup="4st")])
def test_swats_sees_the_step_that_was_made(scheduler: Any) -> None:
    """A scheduler has changed the learning rate by the end of the batch."""

    class Compares(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
            self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            moved = [(a.detach() - b).double().flatten() for a, b in zip(pl_module.parameters(), self.before, strict=True)]
            gradients = [parameter.grad.double().flatten() for parameter in pl_module.parameters() if parameter.grad is not None]
            expected = sum(float(p @ p) for p in moved) / -sum(float(p @ g) for p, g in zip(moved, gradients, strict=True))
            seen.append((watching.shows["gamma"], expected))

    class Gamma(Swats):
        """Shows the last step alone."""

        def _shows(self, memory: Mapping[str, Any]) -> dict[str, float]:
            return {"gamma": memory["gamma"]}

        def _observe(self, memory: Mapping[str, Any], what: Seen) -> dict[str, Any]:
            assert what.projections is not None
            return {**memory, "gamma": what.projections[""].update / what.projections[""].along}

    seen: list[tuple[float, float]] = []
    watching = switch(Gamma())
    module = attach(ValidatedNet(), optimizer=partial(Adam, lr=1e-2), scheduler=scheduler)
    fit(module, watching, Compares(), max_epochs=2)
    assert len(seen) == 16
    assert [gamma for gamma, _ in seen] == pytest.approx([expected for _, expected in seen], rel=1e-3)


# The gradient noise


def noises(trigger: Trigger, scales: Sequence[float], batch: float = 32.0) -> list[dict[str, Any]]:
    """What is remembered after each of these noise scales, ten steps apart."""
    memories: list[dict[str, Any]] = [{}]
    for step, scale in enumerate(scales, start=1):
        seen = Seen(10 * step, CLOCK, noise={"noise/scale": scale, "noise/batch": batch})
        memories.append(trigger.observe(memories[-1], seen))
    return memories[1:]


@pytest.mark.parametrize(
    ("trigger", "scales", "expected"),
    [
        (OnNoise(above=2, patience=1), [63.9, 64.0, 64.1], 2),
        (OnNoise(above=2, patience=2), [65, 10, 65, 65], 3),
        (OnNoise(above=2, patience=2), [65, math.nan, 65, 65], 3),
        (OnNoise(above=2, patience=1), [math.inf], 0),
        (OnNoise(below=2, patience=1), [64, 63], 1),
        (OnNoise(below=2, patience=1), [math.nan, math.inf], None),
        (OnNoise(above=50, of="samples", patience=1), [50, 51], 1),
        (OnNoise(above=1, patience=1, every_n_steps=20), [40, 40], 1),
        (OnNoise(above=1, patience=1, not_before="30st"), [40, 40, 40], 2),
    ],
)
def test_the_noise_is_above_or_below_for_some_looks_in_a_row(trigger: Trigger, scales: list[float], expected: int | None) -> None:
    fired = ["fired" in memory for memory in noises(trigger, scales)]
    assert fired == [expected is not None and index >= expected for index in range(len(scales))]


def test_the_noise_says_what_it_saw() -> None:
    [*_, memory] = noises(OnNoise(above=1.5, patience=2), [64, 96])
    assert memory["fired"] == "the gradient noise scale is 96 samples, 3 batches of 32, above 1.5 batch for 2 looks"
    assert OnNoise(above=1.5).shows(memory) == {"scale": 96, "batch": 32}
    assert OnNoise(above=1).observe({}, Seen(10, CLOCK, noise={})) == {}, "before anything was measured"


NOISE = AnyOf(of={"noise": OnNoise(above=1e-9, patience=3, every_n_steps=2), "loss": OnPlateau(monitor="val/loss", patience=99)})


def test_the_noise_switches_a_run_and_resumes_within_its_patience(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1, save_on_train_epoch_end=False)

    def run(ckpt_path: Path | None = None, *callbacks: Callback) -> tuple[list[str], str]:
        module, monitor = ValidatedNet(), GradientNoiseMonitor()
        steps = fit(module, switch(NOISE), monitor, ExactResume(), *callbacks, ckpt_path=ckpt_path, accumulate_grad_batches=2)
        return steps.classes, digest(module)

    classes, weights = run(None, saver)
    assert classes.index("SGD") == 6, "it looks after steps 2, 4 and 6"
    for step in (3, 4, 5, 6, 7):
        assert run(tmp_path / f"step={step}.ckpt") == (classes[step:], weights)


def test_the_noise_needs_its_monitor() -> None:
    with pytest.raises(ConfigError) as caught:
        fit(ValidatedNet(), switch(NOISE))
    assert str(caught.value) == (
        "switch.when: OnNoise reads what GradientNoiseMonitor measures, which is not among the callbacks. Add it: callbacks=noise, "
        "or GradientNoiseMonitor() in Python."
    )


def noisy_rank(rank: int = 0) -> tuple[int | None, str]:
    module = ShardableNet()
    steps = Steps()
    callbacks = [switch(OnNoise(above=1e-9, patience=2, every_n_steps=2)), GradientNoiseMonitor(), steps]
    trainer(max_epochs=3, callbacks=callbacks, strategy="ddp", devices=2).fit(module, loader())
    return steps.first_sgd, digest(module)


def test_the_noise_is_one_decision_on_two_ranks(pair: Pair) -> None:
    one, other = pair.run(noisy_rank)
    assert one == other
    assert one[0] == 4
