"""What crosses a switch: promises of each rule against the first updates of torch's optimizers, and what is refused."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RAdam

from lightning_adaptive import Clock, ConfigError, Duration, Handover, moments
from lightning_adaptive import handover as handovers
from lightning_adaptive.guard import Guard
from lightning_adaptive.handover import PRESETS, Crossed, cross, eta
from lightning_adaptive.partitions import Group, Partition, impose, record, split
from tests.steps import all_of, step

MATCHING = ["match_orthogonal", "match_norm", "match_projection"]
SHAPES = [(4, 3), (5,), (), (2, 2), (1, 6)]
NAMES = [f"p{index}" for index in range(len(SHAPES))]


def here(_: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Where there is one process, its sums are whole."""
    return rows


def weights(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in SHAPES]


def stepped(optimizer: Optimizer, steps: int = 3, seed: int = 0, sizes: Sequence[float] = (1.0,) * len(SHAPES)) -> Optimizer:
    """After so many steps with random gradients of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        gradients = []
        for one, size in zip(all_of(optimizer), sizes, strict=True):
            drawn = torch.randn(one.shape, generator=generator, dtype=torch.float64) + 0.3
            gradients.append((size * drawn).to(one.dtype))
        step(optimizer, gradients)
    return optimizer


def partition_of(running: Optimizer) -> Partition:
    return record(running.param_groups, {id(one): name for one, name in zip(all_of(running), NAMES, strict=True)})


def built(cls: Any, partition: Partition, tensors: Sequence[Tensor], **options: Any) -> Optimizer:
    """An optimizer for a partition, as the switch builds it."""
    named = dict(zip(NAMES, tensors, strict=True))
    optimizer: Optimizer = cls([{"params": [named[name] for name in group.parameters]} for group in partition], **options)
    impose(optimizer.param_groups, partition)
    return optimizer


# The learning rate


@dataclass
class Case:
    """A running optimizer after some steps, and rules."""

    running: Optimizer
    handover: Handover

    def follow(self, cls: Any = SGD, inherits: bool = True, partition: Partition | None = None, **options: Any) -> Optimizer:
        groups = partition or partition_of(self.running)
        groups = split(groups) if self.handover.splits else groups
        following = built(cls, groups, all_of(self.running), **{"lr": 7.0, **options})
        self.crossed = cross(self.handover, self.running, following, groups, here, inherits=inherits)
        return following

    def parts(self, following: Optimizer) -> list[list[int]]:
        """The places of the parameters that share a learning rate, or its ratios."""
        places = {id(one): place for place, one in enumerate(all_of(self.running))}
        groups = [[places[id(one)] for one in group["params"]] for group in following.param_groups]
        return [list(itertools.chain(*groups))] if self.handover.per == "model" else groups


def adams_update(optimizer: Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """Adam's step on its mean gradient, written down, and that mean."""
    updates, means = [], []
    for group in optimizer.param_groups:
        for one in group["params"]:
            state, (beta1, beta2) = optimizer.state[one], group["betas"]
            t = float(state["step"])
            mean = state["exp_avg"].double() / (1 - beta1**t)
            square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double() / (1 - beta2**t)
            means.append(mean)
            updates.append(-float(group["lr"]) * mean / (square.sqrt() + group["eps"]))
    return updates, means


def first_update(following: Optimizer, gradients: Sequence[Tensor]) -> list[Tensor]:
    """What the next optimizer adds to weights of zero, on which nothing is rounded away."""
    with torch.no_grad():
        for one in all_of(following):
            one.zero_()
    step(following, [gradient.to(one.dtype) for one, gradient in zip(all_of(following), gradients, strict=True)])
    return [one.detach().double() for one in all_of(following)]


def joined(tensors: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    return torch.cat([tensors[place].reshape(-1) for place in places])


def keeps_its_promise(handover: Handover, p: Tensor, update: Tensor, rtol: float) -> None:
    """What the rule says of the running optimizer's update and that of the next one."""
    update = update / handover.scale
    if handover.lr == "match_norm":
        assert float(update.norm()) == pytest.approx(float(p.norm()), rel=rtol)
    elif handover.lr == "match_orthogonal":
        # The closest along its direction: what is left over is orthogonal to it.
        assert float((p - update) @ update) == pytest.approx(0, abs=rtol * float(p @ p))
        closest = float((p - update).norm())
        slack = rtol * float(p.norm())
        assert all(float((p - times * update).norm()) >= closest - slack for times in (0.9, 0.99, 1.01, 1.1))
    else:
        torch.testing.assert_close((update @ p) / (p @ p) * p, p, rtol=rtol, atol=0)


sgds = st.one_of(
    st.fixed_dictionaries({"momentum": st.floats(0.1, 0.95), "dampening": st.floats(0, 0.9)}),
    st.fixed_dictionaries({"momentum": st.floats(0.1, 0.95), "nesterov": st.just(True)}),
    st.just({"momentum": 0.0}),
)
layouts = st.sampled_from([[5], [2, 3], [1, 1, 3], [1, 1, 1, 1, 1]])
exponents = st.lists(st.integers(-3, 3), min_size=5, max_size=5)


@st.composite
def cases(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16)) -> Case:
    dtype = draw(st.sampled_from(dtypes))
    tensors, groups, lrs = weights(dtype), [], draw(st.lists(st.sampled_from([0.01, 0.03, 0.001]), min_size=5, max_size=5))
    sizes = draw(layouts)
    for index, (first, last) in enumerate(itertools.pairwise([0, *itertools.accumulate(sizes)])):
        groups.append({"params": tensors[first:last], "lr": lrs[index], "eps": draw(st.sampled_from([1e-8, 1e-2]))})
    options = {"betas": (draw(st.floats(0.0, 0.95)), draw(st.floats(0.5, 0.999))), "amsgrad": draw(st.booleans())}
    running = draw(st.sampled_from([Adam, AdamW]))(groups, weight_decay=0.0, **options)
    stepped(running, draw(st.integers(1, 5)), draw(st.integers(0, 99)), [10.0**one for one in draw(exponents)])
    handover = Handover(
        lr=draw(st.sampled_from(MATCHING)),
        per=draw(st.sampled_from(["tensor", "group", "model"])),
        scale=draw(st.sampled_from([1.0, 0.25])),
    )
    return Case(running, handover)


def tolerance(running: Optimizer) -> float:
    return {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2}[all_of(running)[0].dtype]


def check_first_update(case: Case, options: dict[str, Any]) -> None:
    case.handover = replace(case.handover, momentum="carry" if options["momentum"] else "zero")
    p, means = adams_update(case.running)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handovers, "_MOST", math.inf)  # gradients of sizes as far apart as here are bounded otherwise
        following = case.follow(SGD, **options)
    update = first_update(following, means)
    for places in case.parts(following):
        keeps_its_promise(case.handover, joined(p, places), joined(update, places), tolerance(case.running))


@given(cases(), sgds)
@settings(deadline=None, max_examples=150)
def test_the_first_update_keeps_the_promise_of_its_rule(case: Case, options: dict[str, Any]) -> None:
    """On the carried mean; without momentum on the mean that would have been."""
    event(f"{case.handover.lr} per {case.handover.per}")
    check_first_update(case, options)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="planted: the gain is forgotten, where it sets and where it seeds")
@pytest.mark.parametrize("rule", MATCHING)
def test_the_first_update_sees_a_gain_that_is_forgotten(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = moments.gain
    monkeypatch.setattr(moments, "gain", lambda group: right(group) ** 0.5)
    running = stepped(Adam(weights(), lr=0.01))
    check_first_update(Case(running, Handover(lr=rule)), {"momentum": 0.9, "nesterov": True})


@pytest.mark.parametrize("rule", MATCHING)
def test_a_tensor_of_rounding_errors_is_bounded_by_the_model(rule: Any) -> None:
    """As a bias before a batch norm: its gradient is 1e-9, and Adam steps as far as elsewhere."""
    running = stepped(Adam(weights(), lr=0.01), sizes=[1.0, 1.0, 1.0, 1e-9, 1.0])
    alone, whole = (rates(Case(running, Handover(lr=rule, per=per))) for per in ("tensor", "model"))
    assert alone[3] == pytest.approx(100 * whole[0], rel=1e-9)
    assert all(rate < 10 * whole[0] for place, rate in enumerate(alone) if place != 3)


@given(cases(dtypes=[torch.float64]), sgds)
@settings(deadline=None, max_examples=40)
def test_orthogonal_is_at_most_norm_is_at_most_projection(case: Case, options: dict[str, Any]) -> None:
    found = []
    for rule in MATCHING:
        case.handover = replace(case.handover, lr=rule)  # type: ignore[arg-type]
        found.append([group["lr"] for group in case.follow(SGD, **options).param_groups])
    for low, middle, high in zip(*found, strict=True):
        assert 0 < low <= middle * (1 + 1e-9) <= high * (1 + 2e-9)


@given(
    st.sampled_from(MATCHING),
    st.sampled_from(["tensor", "group", "model"]),
    st.sampled_from([{"momentum": 0.9}, {"momentum": 0.8, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}]),
    st.sampled_from([Adam, AdamW]),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_from_sgd_to_adam_the_first_update_keeps_it_too(rule: Any, per: Any, options: dict[str, Any], cls: Any, seed: int) -> None:
    tensors = weights()
    groups = [{"params": tensors[:2], "lr": 0.05}, {"params": tensors[2:], "lr": 0.2}]
    running = stepped(SGD(groups, **options), 4, seed)
    buffers = [running.state[one]["momentum_buffer"] for one in tensors]
    p = [-lr * buffer for lr, buffer in zip([0.05] * 2 + [0.2] * 3, buffers, strict=True)]
    means = [buffer / moments.gain(running.param_groups[0]) for buffer in buffers]
    case = Case(running, Handover(lr=rule, per=per, momentum="carry"))
    following = case.follow(cls, eps=1e-12, weight_decay=0.0)
    update = first_update(following, means)
    for places in case.parts(following):
        keeps_its_promise(case.handover, joined(p, places), joined(update, places), 1e-6)


@pytest.mark.parametrize("rule", MATCHING)
@pytest.mark.parametrize("per", ["tensor", "group", "model"])
def test_within_a_kind_what_matches_is_the_same_learning_rate(rule: Any, per: Any) -> None:
    tensors = weights()
    groups = [{"params": tensors[:2], "lr": 0.01}, {"params": tensors[2:], "lr": 0.03}]
    of_each = [0.01] * 2 + [0.03] * 3 if per == "tensor" else [0.01, 0.03]
    adam = Case(stepped(Adam(copied(groups))), Handover(lr=rule, per=per))
    for cls in (AdamW, NAdam, RAdam):
        assert [group["lr"] for group in adam.follow(cls).param_groups] == pytest.approx(of_each, rel=1e-9)
    sgd = Case(stepped(SGD(copied(groups), momentum=0.9)), Handover(lr=rule, per=per))
    assert [group["lr"] for group in sgd.follow(SGD, momentum=0.9).param_groups] == pytest.approx(of_each, rel=1e-9)
    halved = sgd.follow(SGD, momentum=0.8)
    assert [group["lr"] for group in halved.param_groups] == pytest.approx([2 * lr for lr in of_each], rel=1e-9)
    plain = Case(stepped(SGD(copied(groups))), Handover(lr=rule, per=per))
    assert [group["lr"] for group in plain.follow(SGD).param_groups] == pytest.approx(of_each, rel=1e-9)


def copied(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(group) for group in groups]


def two_groups(**options: Any) -> Optimizer:
    """Adam with a first group at 0.01 and a second one at 0.03, each with a name."""
    tensors = weights()
    groups = [{"params": tensors[:2], "lr": 0.01, "name": "a"}, {"params": tensors[2:], "lr": 0.03, "name": "b"}]
    return stepped(Adam(groups, **options))


def rates(case: Case, **options: Any) -> list[float]:
    return [float(group["lr"]) for group in case.follow(**options).param_groups]


def test_own_keep_and_scale() -> None:
    running = two_groups()
    assert rates(Case(running, Handover())) == [7.0, pytest.approx(21.0)], "the ratio is the partition's"
    assert rates(Case(running, Handover(scale=0.5))) == [3.5, pytest.approx(10.5)]
    assert rates(Case(running, Handover(lr="keep"))) == [0.01, 0.03]
    assert rates(Case(running, Handover(lr="keep", scale=2.0))) == [0.02, 0.06]
    running.param_groups[1]["lr"] = torch.tensor(0.5)
    case = Case(running, Handover(lr="keep"))
    following = case.follow(SGD, lr=torch.tensor(7.0))
    assert [group["lr"] for group in following.param_groups] == [torch.tensor(0.01), torch.tensor(0.5)]
    assert all(isinstance(group["lr"], Tensor) for group in following.param_groups)
    assert case.crossed.notes == ("configured 7.0e+00..3.5e+02",)
    assert following.param_groups[0]["lr"] is not following.param_groups[1]["lr"], "a scheduler fills them in place"


@pytest.mark.parametrize("rule", ["keep", *MATCHING])
def test_a_learning_rate_that_a_rule_gives_stays(rule: Any) -> None:
    running = two_groups()
    partition = (Group(tuple(NAMES[:2]), "a", lr=0.123), Group(tuple(NAMES[2:]), "b"))
    for scale in (1.0, 2.0):
        case = Case(running, Handover(lr=rule, per="group", scale=scale))
        first, second = case.follow(partition=partition, inherits=False).param_groups
        assert first["lr"] == 0.123
        assert second["lr"] != 7.0
    stays = Case(running, Handover(scale=2.0))
    assert rates(stays, partition=partition, inherits=False) == [0.123, 14.0]


@pytest.mark.parametrize("rule", ["keep", *MATCHING])
def test_lr_scale_of_new_rules_multiplies(rule: Any) -> None:
    """Where the groups are the running ones, the ratio is in what is matched already."""
    running, handover = two_groups(), Handover(lr=rule, per="group")
    partition = (Group(tuple(NAMES[:2]), "a"), Group(tuple(NAMES[2:]), "b", lr_ratio=0.1))
    plain = rates(Case(running, handover), partition=partition)
    scaled = rates(Case(running, handover), partition=partition, inherits=False)
    assert scaled == [plain[0], pytest.approx(0.1 * plain[1])]


@pytest.mark.parametrize("inherits", [False, True])
@pytest.mark.parametrize("rule", MATCHING)
def test_the_whole_model_keeps_its_ratios(rule: Any, inherits: bool) -> None:
    first, second = rates(Case(two_groups(), Handover(lr=rule, per="model")), inherits=inherits)
    assert second / first == pytest.approx(3.0)


@pytest.mark.parametrize("handover", [Handover(), Handover(scale=3.0), Handover(lr="keep"), Handover(lr="match_norm", per="group")])
def test_where_the_schedule_goes_on_its_factor_times_the_base_is_what_was_found(handover: Handover) -> None:
    """Of the next optimizer's own learning rate the factor was always a part, so that stays the base."""
    running = two_groups()
    partition = partition_of(running)

    def base(factor: float) -> list[float]:
        following = built(SGD, partition, all_of(running), lr=7.0, weight_decay=0.1)
        cross(handover, running, following, partition, here, factor=factor)
        return [group["lr"] for group in following.param_groups]

    whole = base(1.0)
    times = 1.0 if handover.lr == "own" else 0.3
    assert [times * lr for lr in base(0.3)] == pytest.approx(whole, rel=1e-12)
    assert base(0.0) == pytest.approx(whole, rel=1e-12), "at a factor of zero there is nothing to divide by"
    if handover == Handover():
        assert base(0.3) == whole


def estimated(per: str, estimate: dict[str, float], rule: str = "match_projection") -> list[float]:
    running = two_groups()
    partition = partition_of(running)
    handover = Handover(lr=rule, per=per)  # type: ignore[arg-type]
    groups = split(partition) if handover.splits else partition
    following = built(SGD, groups, all_of(running), lr=7.0, momentum=0.9)
    cross(handover, running, following, groups, here, estimate=estimate)
    return [group["lr"] for group in following.param_groups]


def test_match_projection_takes_the_estimate_of_a_trigger() -> None:
    assert estimated("model", {"": 2.0}) == pytest.approx([0.2, 0.6])
    assert estimated("group", {"a": 2.0, "b": 5.0}) == pytest.approx([0.2, 0.5])
    found = estimated("group", {})
    assert estimated("group", {"b": 5.0}) == [found[0], pytest.approx(0.5)]
    assert estimated("tensor", {"": 2.0, "a": 3.0}) == estimated("tensor", {}), "a trigger does not look at tensors"
    for rule in MATCHING[:2]:
        assert estimated("model", {"": 2.0}, rule) == estimated("model", {}, rule)


def test_a_tensor_that_does_not_move_gets_the_learning_rate_of_the_model() -> None:
    """Its moments are zero, or it has none."""
    tensors = weights()
    running = Adam([{"params": tensors[:2], "lr": 0.01}, {"params": tensors[2:], "lr": 0.03}])
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        gradients = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in tensors]
        step(running, [torch.zeros_like(tensors[0]), None, None, *gradients[3:]])
    per_model = rates(Case(running, Handover(lr="match_norm", per="model")))
    found = rates(Case(running, Handover(lr="match_norm")))
    assert found[:3] == pytest.approx([per_model[0], per_model[0], per_model[1]])
    assert all(rate > 0 for rate in found)


def test_where_nothing_can_be_found_the_configured_learning_rate_stays_and_is_said() -> None:
    case = Case(Adam(weights(), lr=0.01), Handover(lr="match_norm"))
    assert rates(case) == [7.0] * 5
    assert case.crossed.notes == ("configured 7.0e+00", "5 of 5 learning rates could not be found and are the configured ones")


def test_the_first_of_several_processes_has_whole_sums() -> None:
    """Each holds half of every tensor, and what is exchanged are sums."""
    whole, halves = two_groups(), two_groups()
    partition = partition_of(whole)
    following = built(SGD, partition, all_of(whole), lr=7.0)
    doubled = built(SGD, partition, all_of(halves), lr=7.0)
    handover = Handover(lr="match_norm", per="group", guard=2.0)
    alone = cross(handover, whole, following, partition, here)
    crossed = cross(handover, halves, doubled, partition, lambda _, rows: rows * 4)
    assert [group["lr"] for group in doubled.param_groups] == pytest.approx([group["lr"] for group in following.param_groups])
    assert crossed.limit == pytest.approx(2 * (alone.limit or 0))


@pytest.mark.parametrize(
    "sums", [(0.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (math.nan, 1.0, 1.0), (1.0, math.nan, math.nan)]
)
def test_sums_that_say_nothing(sums: tuple[float, float, float]) -> None:
    for rule in MATCHING:
        found = eta(rule, *sums)
        assert found is None or (math.isfinite(found) and found >= 0)


# Weight decay


def shrinkage(optimizer: Optimizer, parameter: Tensor) -> float:
    """By what share a weight shrinks in a step, when nothing else moves it and momentum has built up."""
    with torch.no_grad():
        parameter.fill_(1.0)
    optimizer.state.clear()
    for _ in range(400):
        before = float(parameter.detach().mean())
        step(optimizer, [torch.zeros_like(one) for one in all_of(optimizer)])
    return 1 - float(parameter.detach().mean()) / before


DECAYING: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (AdamW, {"lr": 1e-3, "weight_decay": 0.01}),
    "NAdam decoupled": (NAdam, {"lr": 2e-3, "weight_decay": 0.02, "decoupled_weight_decay": True}),
    "SGD": (SGD, {"lr": 0.01, "weight_decay": 1e-3}),
    "SGD momentum": (SGD, {"lr": 0.003, "weight_decay": 1e-3, "momentum": 0.9}),
    "SGD dampening": (SGD, {"lr": 0.01, "weight_decay": 1e-3, "momentum": 0.8, "dampening": 0.4}),
    "SGD nesterov": (SGD, {"lr": 0.01, "weight_decay": 1e-3, "momentum": 0.9, "nesterov": True}),
}
ACROSS = [pair for pair in itertools.permutations(DECAYING, 2) if len({name[:3] == "SGD" for name in pair}) == 2]


def decays(before: str, after: str, handover: Handover, **options: Any) -> tuple[float, float]:
    """The shrinkage of both."""
    (old, given), (new, others) = DECAYING[before], DECAYING[after]
    tensors = weights()
    running = stepped(old(tensors, **given))
    case = Case(running, handover)
    following = case.follow(new, **{**others, **options})
    assert case.crossed.notes[-1].endswith(" (match)")
    return shrinkage(running, tensors[0]), shrinkage(following, tensors[0])


@pytest.mark.parametrize("rule", ["own", "match_orthogonal"])
@pytest.mark.parametrize(("before", "after"), ACROSS)
def test_weights_shrink_as_they_did(before: str, after: str, rule: Any) -> None:
    old, new = decays(before, after, Handover(lr=rule, weight_decay="match", per="model"))
    assert new == pytest.approx(old, rel=2e-3)
    assert 1e-6 < old < 1e-3


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="planted: momentum's share of the decay is forgotten")
def test_the_shrinkage_sees_a_gain_that_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "gain", lambda group: 1.0)
    test_weights_shrink_as_they_did("AdamW", "SGD momentum", "own")


@pytest.mark.parametrize("factor", [0.25, 0.0])
def test_the_decay_is_that_of_the_learning_rate_with_which_the_schedule_goes_on(factor: float) -> None:
    running = stepped(AdamW(weights(), lr=1e-3, weight_decay=0.1))
    partition = partition_of(running)
    following = built(SGD, partition, all_of(running), lr=0.5)
    cross(Handover(weight_decay="match"), running, following, partition, here, factor=factor)
    [group] = following.param_groups
    assert group["lr"] == 0.5
    assert 0.5 * (factor or 1.0) * group["weight_decay"] == pytest.approx(1e-3 * 0.1)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((AdamW, {}), (NAdam, {"decoupled_weight_decay": True})),
        ((AdamW, {}), (Adam, {"decoupled_weight_decay": True})),
        ((SGD, {"momentum": 0.9}), (SGD, {})),
        ((Adam, {}), (SGD, {"momentum": 0.9})),
        ((SGD, {}), (RAdam, {})),
    ],
)
def test_a_decay_of_the_same_kind_keeps_its_value(before: Any, after: Any) -> None:
    tensors = weights()
    groups = [{"params": tensors[:2], "weight_decay": 0.0}, {"params": tensors[2:]}]
    running = stepped(before[0](groups, lr=0.01, weight_decay=0.05, **before[1]))
    case = Case(running, Handover(weight_decay="match"))
    following = case.follow(after[0], weight_decay=0.7, **after[1])
    assert [group["weight_decay"] for group in following.param_groups] == [0.0, 0.05]
    assert case.crossed.notes == ("weight decay 0.0e+00..5.0e-02 -> 0.0e+00..5.0e-02 (match)",)
    own = Case(running, Handover()).follow(after[0], weight_decay=0.7, **after[1])
    assert [group["weight_decay"] for group in own.param_groups] == [0.0, 0.7]


def test_without_decay_there_is_none_to_match_and_nothing_to_say() -> None:
    case = Case(stepped(AdamW(weights(), lr=0.01, weight_decay=0.0)), Handover(weight_decay="match"))
    assert [group["weight_decay"] for group in case.follow(SGD, weight_decay=0.7).param_groups] == [0.0]
    assert case.crossed.notes == ()


# Momentum


def test_all_are_seeded_or_none() -> None:
    """A parameter that never had a gradient begins with zeros, so that fused SGD takes the group."""
    tensors = weights(torch.float32)
    running = Adam(tensors, lr=0.01)
    step(running, [None, *(torch.ones_like(one) for one in tensors[1:])])
    case = Case(running, Handover(momentum="carry"))
    following = case.follow(SGD, momentum=0.9, fused=True)
    assert all("momentum_buffer" in following.state[one] for one in tensors)
    assert case.crossed == Crossed(("momentum carried",), None, 0)
    stepped(following)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(len(SHAPES)))
def test_a_momentum_that_is_not_finite_is_zero_for_all_and_said(place: int, fault: float) -> None:
    running = stepped(Adam(weights(), lr=0.01))
    running.state[all_of(running)[place]]["exp_avg"].view(-1)[-1] = fault
    case = Case(running, Handover(momentum="carry"))
    following = case.follow(SGD, momentum=0.9)
    assert not following.state
    assert case.crossed.notes == ("momentum zero, as the running one is not finite",)


def test_what_is_not_copied_is_counted() -> None:
    tensors = weights(torch.float32)
    size = sum(one.numel() for one in tensors)
    running = stepped(Adam(tensors, lr=0.01))
    same, other = Case(running, Handover(momentum="carry")), Case(running, Handover(momentum="carry"))
    same.follow(AdamW)
    other.follow(AdamW, betas=(0.9, 0.99))
    assert (same.crossed.shared, other.crossed.shared) == (2 * 4 * size, 4 * size)


@given(cases(), sgds, st.sampled_from(["own", "match"]), st.sampled_from([None, 1.5]))
@settings(deadline=None, max_examples=30)
def test_the_running_optimizer_stays_as_it_is(case: Case, options: dict[str, Any], decay: Any, guard: Any) -> None:
    momentum: Any = "carry" if options["momentum"] else "zero"
    case.handover = replace(case.handover, momentum=momentum, weight_decay=decay, guard=guard)
    running = case.running
    groups = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in running.param_groups])
    state = {one: {key: value.clone() for key, value in running.state[one].items()} for one in all_of(running)}
    kept = {one: {key: id(value) for key, value in running.state[one].items()} for one in all_of(running)}
    before = [one.detach().clone() for one in all_of(running)]
    case.follow(SGD, **options)
    case.follow(NAdam)
    assert [{k: v for k, v in group.items() if k != "params"} for group in running.param_groups] == groups
    assert {one: {key: id(value) for key, value in running.state[one].items()} for one in all_of(running)} == kept
    for one, weight in zip(all_of(running), before, strict=True):
        assert torch.equal(one, weight)
        assert all(torch.equal(value, state[one][key]) for key, value in running.state[one].items())


# The guard


def limited(cls: Any, size: float, limit: float, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """An update under a guard and the same without."""
    found = []
    for is_guarded in (True, False):
        tensors = weights(dtype)
        optimizer = cls([{"params": tensors[:2]}, {"params": tensors[2:], "lr": 0.5}], lr=0.1)
        if is_guarded:
            Guard(optimizer, limit, here)
        before = [one.detach().clone() for one in tensors]
        stepped(optimizer, 1, sizes=[size] * len(tensors))
        found.append([one.detach().double() - old.double() for one, old in zip(tensors, before, strict=True)])
    return found[0], found[1]


EVERY = list(range(len(SHAPES)))


def distance(tensors: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """How far the whole model has moved."""
    return float(joined([one.detach() - old.detach() for one, old in zip(tensors, before, strict=True)], EVERY).norm())


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-9), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize(("size", "limit"), [(1.0, 0.5), (30.0, 0.3), (1e8, 0.3), (1e25, 0.3)])
def test_an_update_above_the_limit_has_its_norm_and_keeps_its_direction(
    dtype: torch.dtype, rtol: float, size: float, limit: float
) -> None:
    """Also where its share is below the rounding of one, and where squares overflow. Weights of one are rounded in 16 bits."""
    held, free = limited(SGD, size, limit, dtype)
    one, other = joined(held, EVERY), joined(free, EVERY)
    assert float(other.norm()) > limit
    assert float(one.norm()) == pytest.approx(limit, rel=rtol)
    assert float(one @ other / other.norm()) == pytest.approx(limit, rel=rtol)


@pytest.mark.xfail(strict=True, raises=AssertionError, reason="planted: each group is held by itself")
def test_the_norm_sees_that_groups_count_together() -> None:
    tensors = weights()
    for part in (tensors[:2], tensors[2:]):
        optimizer = SGD(part, lr=10.0)
        Guard(optimizer, 0.5, here)
        step(optimizer, [torch.ones_like(one) for one in part])
    assert distance(tensors, weights()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [100.0, 1e6])
def test_an_update_below_the_limit_is_left_bit_for_bit(dtype: torch.dtype, limit: float) -> None:
    for cls in (SGD, Adam):
        held, free = limited(cls, 0.3, limit, dtype)
        assert all(torch.equal(one, other) for one, other in zip(held, free, strict=True))


def test_a_guard_holds_until_it_is_taken_off() -> None:
    tensors = weights()
    optimizer = SGD(tensors, lr=1.0)
    guard = Guard(optimizer, 0.01, here)
    norms = []
    for index in range(5):
        if index == 3:
            guard.remove()
        before = [one.detach().clone() for one in tensors]
        step(optimizer, [torch.ones_like(one) for one in tensors])
        norms.append(distance(tensors, before))
    assert norms == pytest.approx([0.01] * 3 + [math.sqrt(28)] * 2)
    guard.remove()
    assert (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)) == (0, 0)


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_left_as_it_is_and_the_next_is_held(fault: float) -> None:
    tensors, free = weights(), weights()
    optimizer = SGD(tensors, lr=1.0)
    Guard(optimizer, 0.01, here)
    for one in (optimizer, SGD(free, lr=1.0)):
        gradients = [torch.ones_like(tensor) for tensor in tensors]
        gradients[1][2] = fault
        step(one, gradients)
    for one, other in zip(tensors, free, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        tensors[1].zero_()
    before = [one.detach().clone() for one in tensors]
    step(optimizer, [torch.ones_like(one) for one in tensors])
    assert distance(tensors, before) == pytest.approx(0.01)


def test_a_guard_holds_any_mixture_of_dtypes_and_what_is_empty() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.complex64, torch.float64]
    tensors = [torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in dtypes]
    tensors += [torch.nn.Parameter(torch.zeros(0)), torch.nn.Parameter(torch.zeros(()))]
    optimizer = SGD(tensors, lr=1.0)
    Guard(optimizer, 1.0, here)
    step(optimizer, [torch.full_like(one, 2 - 1j if one.is_complex() else 2.0) for one in tensors])
    norm = math.sqrt(sum(float(one.detach().abs().double().square().sum()) for one in tensors))
    assert norm == pytest.approx(1.0, rel=1e-2)
    assert tensors[2].detach()[0].item() == pytest.approx((-2 + 1j) / math.sqrt(10 * 4 + 3 * 5), rel=1e-2)


def test_a_guard_of_shards_holds_the_whole_update() -> None:
    optimizer = SGD(weights(), lr=1.0)
    Guard(optimizer, 1.0, lambda _, rows: 4 * rows)
    before = [one.detach().clone() for one in all_of(optimizer)]
    stepped(optimizer, 1)
    assert distance(all_of(optimizer), before) == pytest.approx(0.5)


@pytest.mark.parametrize("cls", [Adam, AdamW, RAdam, SGD])
def test_the_limit_is_a_multiple_of_the_last_updates_norm(cls: Any) -> None:
    options = {"momentum": 0.9} if cls is SGD else {"weight_decay": 0.0, "eps": 1e-12}
    running = stepped(cls([{"params": weights()[:2]}, {"params": weights()[2:], "lr": 0.5}], lr=0.1, **options), 7)
    before = [one.detach().clone() for one in all_of(running)]
    step(running, [torch.ones_like(one) for one in all_of(running)])
    moved = distance(all_of(running), before)
    case = Case(running, Handover(guard=1.5, guard_for="2ep"))
    case.follow(Adagrad)
    assert case.crossed.limit == pytest.approx(1.5 * moved, rel=1e-6)
    assert case.crossed.notes == (f"updates held to a norm of {case.crossed.limit:.2g} for 2ep",)


def test_without_an_update_to_go_by_there_is_no_guard_and_that_is_said() -> None:
    """A limit of zero would keep the weights where they are."""
    never = Case(Adam(weights(), lr=0.1), Handover(guard=1.0))
    at_foot = Case(stepped(Adam(weights(), lr=0.1)), Handover(guard=1.0))
    at_foot.running.param_groups[0]["lr"] = 0.0
    broken = Case(stepped(Adam(weights(), lr=0.1)), Handover(guard=1.0))
    broken.running.state[all_of(broken.running)[0]]["exp_avg"].fill_(math.nan)
    for case, norm in ((never, "0"), (at_foot, "0"), (broken, "nan")):
        case.follow(SGD)
        assert case.crossed == Crossed((f"no guard, as the last update's norm is {norm}",), None, 0)


def test_the_window_of_a_guard_is_counted_from_the_switch() -> None:
    clock = Clock(steps_per_epoch=10, total_steps=100, first_step=40)
    assert Handover(guard=1.0, guard_for="2ep").guard_steps(clock) == 20
    assert Handover(guard=1.0, guard_for="10%").guard_steps(clock) == 6
    assert Handover(guard=1.0).guard_steps(clock) == 100
    assert Handover(guard_for="2ep").guard_steps(clock) == 0
    with pytest.raises(ConfigError, match=r"^guard_for: 2ep cannot be counted: the training loader has no length\."):
        Handover(guard=1.0, guard_for="2ep").guard_steps(Clock(steps_per_epoch=None, total_steps=100))


@pytest.mark.gpu
def test_a_guard_does_not_wait_for_a_gpu() -> None:
    tensors = [torch.nn.Parameter(one.detach().cuda()) for one in weights(torch.float32)]
    optimizer = SGD(tensors, lr=1.0)
    Guard(optimizer, 0.5, here)
    for one in tensors:
        one.grad = torch.ones_like(one)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert distance([one.cpu() for one in tensors], weights(torch.float32)) == pytest.approx(0.5, rel=1e-3)


# What a handover is


def test_presets_and_words() -> None:
    smooth = Handover(lr="match_orthogonal", momentum="carry", weight_decay="match", guard=1.0)
    assert Handover.of("smooth") == smooth
    assert Handover.of(smooth) is smooth
    assert [str(preset) for preset in PRESETS.values()] == list(PRESETS) == ["own", "keep", "smooth", "swats"]
    assert str(Handover(lr="match_norm", scale=2, guard=3.0)) == "lr=match_norm, scale=2, guard=3.0"
    assert str(Handover(guard_for="2ep")) == "guard_for=2ep"
    assert Handover(guard_for="2 epochs").guard_for == Duration.parse("2ep")
    assert [preset.words() for preset in PRESETS.values()] == [
        "own",
        "keep",
        "match_orthogonal per tensor",
        "match_projection per model",
    ]
    assert Handover(lr="keep", scale=0.5).words() == "keep x 0.5"


@pytest.mark.parametrize(
    ("handover", "matches", "splits", "looks", "found"),
    [
        (PRESETS["own"], False, False, False, ()),
        (PRESETS["keep"], False, False, False, ("lr",)),
        (PRESETS["smooth"], True, True, True, ("lr", "weight_decay")),
        (PRESETS["swats"], True, False, True, ("lr",)),
        (Handover(scale=2.0), False, False, False, ("lr",)),
        (Handover(guard=2.0), False, False, True, ()),
        (Handover(momentum="carry", per="tensor"), False, False, True, ()),
    ],
)
def test_what_a_handover_needs_and_finds(handover: Handover, matches: bool, splits: bool, looks: bool, found: Any) -> None:
    options = {"lr": 0.1, "initial_lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    [configured] = handover.configured([options], [Group(())])
    assert (handover.matches, handover.splits, handover.looks) == (matches, splits, looks)
    assert options.keys() - configured.keys() == {name for name in options if name.removeprefix("initial_") in found}


# What is refused

RULES = "own, keep, match_norm, match_orthogonal, match_projection"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "match_norms"}, f"lr: the rule 'match_norms' does not exist. Rules: {RULES}. Did you mean 'match_norm'?"),
        ({"lr": 0.1}, f"lr: the rule 0.1 does not exist. Rules: {RULES}."),
        ({"per": "layer"}, "per: the rule 'layer' does not exist. Rules: tensor, group, model."),
        ({"momentum": "carried"}, "momentum: the rule 'carried' does not exist. Rules: zero, carry. Did you mean 'carry'?"),
        ({"weight_decay": None}, "weight_decay: the rule None does not exist. Rules: own, match."),
        ({"scale": 0}, "scale: 0 is no factor. Write a number above 0."),
        ({"scale": math.nan}, "scale: nan is no factor. Write a number above 0."),
        ({"scale": math.inf}, "scale: inf is no factor. Write a number above 0."),
        ({"scale": "2"}, "scale: '2' is not a number."),
        ({"guard": -1.0}, "guard: -1.0 is no factor. Write a number above 0."),
        ({"guard": True}, "guard: True is not a number."),
        ({"guard_for": 100}, "guard_for: 100 has no unit. Write 100ep (epochs), 100st (optimizer steps) or 100% (of training)."),
        (
            {"guard_for": "long"},
            "guard_for: 'long' is not a duration. Write a number and its unit: 5ep (epochs), 5st (optimizer steps) or 5%.",
        ),
    ],
)
def test_a_handover_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Handover(**options)
    assert str(caught.value) == message
    assert isinstance(caught.value, TypeError) == ("not a number" in message or "no unit" in message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("smoth", "handover: 'smoth' does not exist. Write 'own', 'keep', 'smooth', 'swats' or a Handover. Did you mean 'smooth'?"),
        ("none", "handover: 'none' does not exist. Write 'own', 'keep', 'smooth', 'swats' or a Handover."),
        (None, "handover: None is no handover. Write 'own', 'keep', 'smooth', 'swats' or a Handover."),
        ({"lr": "own"}, "handover: {'lr': 'own'} is no handover. Write 'own', 'keep', 'smooth', 'swats' or a Handover."),
    ],
)
def test_what_is_no_handover(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Handover.of(value)
    assert str(caught.value) == message


def adam(**options: Any) -> Optimizer:
    return Adam(weights(), lr=0.1, **options)


def sgd(**options: Any) -> Optimizer:
    return SGD(weights(), **{"lr": 0.1, "momentum": 0.9, **options})


class RateFree(Optimizer):
    """Without a learning rate, as some that find their own."""


def mean(rule: Any, whose: str, cls: str, instead: str) -> str:
    known = "Adam, AdamW, NAdam, RAdam and SGD"
    return f"{rule!r} needs the gradients' mean, which {known} keep, and {whose} is {cls}. Write {instead}."


def momentum(whose: str, instead: str) -> str:
    return f"{whose} is SGD without momentum, which keeps no mean of the gradients. Give it momentum, or write {instead}."


def constant(values: str, rule: str, whose: str, instead: str) -> str:
    fault = f"of a constant gradient, {values} makes nothing that {rule!r} could go by, and {whose} has them."
    return f"{fault} Both must be below 1; or write {instead}."


PAIRS: list[tuple[Handover, Any, Any, str]] = [
    (
        Handover(lr="match_norm"),
        lambda: Adagrad(weights()),
        sgd,
        "lr: " + mean("match_norm", "the running optimizer", "Adagrad", "own or keep"),
    ),
    (
        PRESETS["smooth"],
        adam,
        lambda: LBFGS(weights()),
        "lr: " + mean("match_orthogonal", "the next one", "LBFGS", "own or keep"),
    ),
    (
        Handover(momentum="carry"),
        adam,
        lambda: Adagrad(weights()),
        "momentum: " + mean("carry", "the next one", "Adagrad", "zero"),
    ),
    (
        Handover(momentum="carry"),
        lambda: LBFGS(weights()),
        adam,
        "momentum: " + mean("carry", "the running optimizer", "LBFGS", "zero"),
    ),
    (
        Handover(guard=2.0),
        lambda: Adagrad(weights()),
        sgd,
        "guard: " + mean(2.0, "the running optimizer", "Adagrad", "null"),
    ),
    (
        Handover(lr="match_norm"),
        lambda: sgd(momentum=0.0),
        adam,
        "lr: " + momentum("the running optimizer", "own or keep"),
    ),
    (
        Handover(momentum="carry"),
        lambda: sgd(momentum=0.0),
        adam,
        "momentum: " + momentum("the running optimizer", "zero"),
    ),
    (
        PRESETS["smooth"],
        adam,
        lambda: sgd(momentum=0.0),
        "momentum: " + momentum("the next one", "zero"),
    ),
    (
        Handover(guard=2.0),
        lambda: sgd(momentum=0.0),
        adam,
        "guard: SGD without momentum keeps nothing that tells the length of its updates. Write null.",
    ),
    (
        PRESETS["keep"],
        lambda: RateFree(weights(), {}),
        sgd,
        "lr: RateFree has no learning rate (lr) that could be kept. Write own.",
    ),
    (
        Handover(weight_decay="match"),
        lambda: AdamW(weights()),
        lambda: Adagrad(weights()),
        "weight_decay: how Adagrad shrinks weights is not known, only of Adam, AdamW, NAdam, RAdam and SGD. Write own.",
    ),
    (
        Handover(weight_decay="match"),
        lambda: AdamW(weights()),
        adam,
        "weight_decay: the decay of AdamW and that of Adam have no common measure: one divides it by the size of the gradients. "
        "Write own.",
    ),
    (
        PRESETS["smooth"],
        adam,
        lambda: sgd(dampening=1.0),
        "lr: " + constant("momentum 0.9 with dampening 1", "match_orthogonal", "the next one", "own or keep"),
    ),
    (
        Handover(momentum="carry"),
        lambda: sgd(momentum=1.0),
        adam,
        "momentum: " + constant("momentum 1 with dampening 0", "carry", "the running optimizer", "zero"),
    ),
    (
        Handover(weight_decay="match"),
        lambda: AdamW(weights()),
        lambda: sgd(dampening=2.0),
        "weight_decay: " + constant("momentum 0.9 with dampening 2", "match", "the next one", "own"),
    ),
]


@pytest.mark.parametrize(("handover", "running", "following", "message"), PAIRS, ids=[message for *_, message in PAIRS])
def test_a_pair_without_a_meaning_is_refused(handover: Handover, running: Any, following: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        handover.check(running(), following(), (Group(tuple(NAMES)),))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("handover", "key", "values"),
    [(Handover(lr="keep"), "lr", "learning rates"), (Handover(weight_decay="match"), "weight_decay", "weight decays")],
)
def test_groups_that_merge_have_no_single_value(handover: Handover, key: str, values: str) -> None:
    tensors = weights()
    running = AdamW([{"params": tensors[:2]}, {"params": tensors[2:], key: 0.5}], lr=0.1, weight_decay=0.1)
    for name in (None, "all"):
        with pytest.raises(ConfigError) as caught:
            handover.check(running, SGD(tensors, lr=0.1), (Group(tuple(NAMES), name),))
        assert str(caught.value) == (
            f"{key}: the group {name or 0} takes parameters of running groups with different {values}. Keep the groups "
            "(param_groups: inherit), or write own."
        )
    handover.check(running, built(SGD, partition_of(running), tensors, lr=0.1), partition_of(running))


@pytest.mark.parametrize(
    ("handover", "running", "following"),
    [
        (PRESETS["own"], lambda: Adagrad(weights()), lambda: LBFGS(weights())),
        (PRESETS["keep"], lambda: Adagrad(weights()), lambda: LBFGS(weights())),
        (PRESETS["smooth"], lambda: AdamW(weights()), sgd),
        (PRESETS["smooth"], sgd, lambda: AdamW(weights())),
        (PRESETS["swats"], adam, lambda: sgd(momentum=0.0)),
        (Handover(lr="match_norm"), lambda: sgd(momentum=0.0), lambda: sgd(momentum=0.0)),
        (Handover(weight_decay="match"), lambda: AdamW(weights(), weight_decay=0.0), adam),
        (Handover(guard=2.0), sgd, lambda: LBFGS(weights())),
        (Handover(), lambda: sgd(dampening=1.0), lambda: sgd(momentum=1.0)),
    ],
)
def test_a_pair_with_a_meaning_is_taken(handover: Handover, running: Any, following: Any) -> None:
    handover.check(running(), following(), (Group(tuple(NAMES)),))
