"""Partitions: recorded from a running optimizer, imposed on a new one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_adaptive import ConfigError, ParamGroups
from lightning_adaptive.param_groups import Group, extend, impose, named_tensors, record


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.nn.Parameter(torch.zeros(1)) for name in names}


def names_of(named: dict[str, torch.Tensor]) -> dict[int, str]:
    return {id(tensor): name for name, tensor in named.items()}


def test_records_names_members_ratios_and_zero_decays() -> None:
    named = tensors("body.weight", "body.bias", "head.weight")
    running = torch.optim.AdamW(
        [
            {"params": [named["body.weight"]], "name": "body", "lr": 1e-4},
            {"params": [named["body.bias"]], "lr": 1e-4, "weight_decay": 0.0},
            {"params": [named["head.weight"]], "name": "head"},
        ],
        lr=1e-3,
        weight_decay=0.1,
    )
    assert record(running.param_groups, names_of(named)) == (
        Group(("body.weight",), "body", 1.0, no_decay=False),
        Group(("body.bias",), "pg2", 1.0, no_decay=True),
        Group(("head.weight",), "head", pytest.approx(10.0), no_decay=False),
    )


def test_the_base_and_not_the_scheduled_learning_rate_is_recorded() -> None:
    named = tensors("a", "b")
    running = torch.optim.SGD([{"params": [named["a"]], "lr": 0.1}, {"params": [named["b"]], "lr": 0.2}])
    torch.optim.lr_scheduler.LambdaLR(running, [lambda _: 0.0, lambda _: 1.0])
    assert [group.lr_ratio for group in record(running.param_groups, names_of(named))] == [1.0, 2.0]


def test_a_group_at_zero_stays_at_zero_and_is_no_reference() -> None:
    named = tensors("frozen", "live")
    running = torch.optim.SGD([{"params": [named["frozen"]], "lr": 0.0}, {"params": [named["live"]], "lr": 0.5}])
    assert [group.lr_ratio for group in record(running.param_groups, names_of(named))] == [0.0, 1.0]


def test_zero_decay_everywhere_says_nothing_about_the_groups() -> None:
    named = tensors("a", "b")
    running = torch.optim.Adam([{"params": [named["a"]]}, {"params": [named["b"]]}], lr=1e-3)
    assert not any(group.no_decay for group in record(running.param_groups, names_of(named)))


def test_a_tensor_that_is_no_parameter_of_the_module_is_named_by_its_place() -> None:
    running = torch.optim.SGD([torch.zeros(1), torch.zeros(1)], lr=0.1)
    partition = record(running.param_groups, {})
    assert partition[0].parameters == ("(group 0, tensor 0)", "(group 0, tensor 1)")
    assert named_tensors(running.param_groups, partition)["(group 0, tensor 1)"] is running.param_groups[0]["params"][1]


def test_parameters_added_later_are_kept_as_groups_of_their_own() -> None:
    recorded = (Group(("head",)),)
    running = (Group(("head",), "pg1"), Group(("body.0", "body.1"), "pg2", lr_ratio=0.1))
    assert extend(recorded, running) == (Group(("head",)), Group(("body.0", "body.1"), "pg2", lr_ratio=0.1))
    assert extend(recorded, (Group(("head",), "other"),)) == recorded


def test_rules_are_not_available_yet() -> None:
    assert ParamGroups().partition(["a", "b"]) == (Group(("a", "b")),)
    with pytest.raises(ConfigError, match=r"^no_decay: rules for parameter groups are not available yet\.$"):
        ParamGroups(no_decay={"match": "*.bias"})


group_options = st.fixed_dictionaries(
    {"lr": st.floats(1e-6, 10), "weight_decay": st.sampled_from([0.0, 0.1])}, optional={"name": st.sampled_from("xyz")}
)


@given(st.lists(group_options, min_size=1, max_size=4), st.floats(1e-4, 1))
def test_a_new_optimizer_gets_the_ratios_and_zero_decays_of_the_old(options: list[dict[str, Any]], lr: float) -> None:
    named = tensors(*(f"p{index}" for index in range(len(options))))
    groups = [{"params": [tensor], **option} for tensor, option in zip(named.values(), options, strict=True)]
    running = torch.optim.AdamW(groups, lr=1e-3)
    partition = record(running.param_groups, names_of(named))
    new = torch.optim.SGD([{"params": [tensor]} for tensor in named.values()], lr=lr, weight_decay=0.5)
    impose(new.param_groups, partition)
    for old_group, new_group in zip(running.param_groups, new.param_groups, strict=True):
        assert new_group["lr"] / lr == pytest.approx(old_group["lr"] / running.param_groups[0]["lr"], rel=1e-12)
        decays = any(group["weight_decay"] for group in running.param_groups)
        assert new_group["weight_decay"] == (0.0 if decays and not old_group["weight_decay"] else 0.5)
        assert new_group["params"][0] is old_group["params"][0]
        assert "betas" not in new_group
