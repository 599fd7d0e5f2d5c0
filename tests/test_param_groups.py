"""Partitions: made by rules, recorded from a running optimizer, imposed on a new one."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_adaptive import ConfigError, LayerDecay, MupLike, ParamGroups, Rule
from lightning_adaptive.param_groups import NO_DECAY
from lightning_adaptive.partitions import Group, Partition, extend, impose, keep_zero_decays, named_tensors, record
from lightning_adaptive.rules import Parameter


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


# Rules

LINEAR = ("Linear", "torch.nn.modules.linear.Linear", "torch.nn.Linear")
NORM = ("LayerNorm", "torch.nn.modules.normalization.LayerNorm", "torch.nn.LayerNorm")
EMBEDDING = ("Embedding", "torch.nn.modules.sparse.Embedding", "torch.nn.Embedding")
NET = (
    Parameter("embed.weight", (100, 8), (*EMBEDDING, *LINEAR), aliases=("head.weight",)),
    Parameter("body.0.weight", (16, 8), LINEAR),
    Parameter("body.0.bias", (16,), LINEAR),
    Parameter("norm.weight", (4, 4), NORM),
    Parameter("conv.weight", (4, 2, 3, 3), ("Conv2d", "torch.nn.Conv2d")),
    Parameter("head.bias", (100,), LINEAR, trainable=False),
)
NAMES = tuple(parameter.name for parameter in NET)


def members(partition: Partition) -> dict[str | None, tuple[str, ...]]:
    return {group.name: group.parameters for group in partition}


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        ({"match": "*.bias"}, ["body.0.bias"]),
        ({"match": "body"}, None),
        ({"match": ["body.0.w*", "conv.*"]}, ["body.0.weight", "conv.weight"]),
        ({"match": "head.weight"}, ["embed.weight"]),
        ({"regex": r"\.\d+\."}, ["body.0.weight", "body.0.bias"]),
        ({"regex": ["^conv", "^norm"]}, ["norm.weight", "conv.weight"]),
        ({"module": "LayerNorm"}, ["norm.weight"]),
        ({"module": "torch.nn.LayerNorm"}, ["norm.weight"]),
        ({"module": "torch.nn.modules.n*"}, ["norm.weight"]),
        ({"module": "*Norm"}, ["norm.weight"]),
        ({"module": "*norm*"}, None),
        ({"module": ["Embedding", "Conv?d"]}, ["embed.weight", "conv.weight"]),
        ({"ndim": 1}, ["body.0.bias"]),
        ({"ndim": "<2"}, ["body.0.bias"]),
        ({"ndim": ">= 3"}, ["conv.weight"]),
        ({"ndim": [1, "4"]}, ["body.0.bias", "conv.weight"]),
        ({"ndim": "!=2"}, ["body.0.bias", "conv.weight"]),
        ({"module": "Linear", "ndim": 2}, ["embed.weight", "body.0.weight"]),
        ({"any": [{"ndim": "<2"}, {"module": "*Norm"}]}, ["body.0.bias", "norm.weight"]),
        ({"any": [{"ndim": "<2"}, {"module": "*Norm"}], "match": "norm.*"}, ["norm.weight"]),
        ({"any": [{"any": [{"match": "conv.*"}]}]}, ["conv.weight"]),
        ({"match": None, "ndim": 4}, ["conv.weight"]),
    ],
)
def test_a_condition_matches(rule: dict[str, Any], matched: list[str] | None) -> None:
    if matched is None:
        with pytest.raises(ConfigError, match="matches none of 6 parameters"):
            ParamGroups(one=rule).partition(NET)
        return
    expected = tuple(name for name in NAMES if name in matched)
    for made in (rule, Rule(**rule), OmegaConf.create(rule)):
        assert members(ParamGroups(one=made).partition(NET))["one"] == expected


def test_the_first_match_wins_and_the_rest_is_the_default_group() -> None:
    groups = ParamGroups(biases={"match": "*.bias"}, body={"match": "body.*", "lr_scale": 0.1}, left_out=None)
    assert members(groups.partition(NET)) == {
        "biases": ("body.0.bias",),
        "default": ("embed.weight", "norm.weight", "conv.weight"),
        "body": ("body.0.weight",),
    }


def test_without_rules_or_with_one_group_there_is_no_name() -> None:
    trainable = NAMES[:-1]
    assert ParamGroups().partition(NET) == (Group(trainable),)
    assert ParamGroups(none=None).partition(NET) == (Group(trainable),)
    [group] = ParamGroups(all={"match": "*", "lr": 0.5}).partition(NET)
    assert (group.name, group.lr, group.parameters) == (None, 0.5, trainable)
    assert ParamGroups().partition([]) == (Group(()),)


def test_a_rule_of_frozen_parameters_is_not_dead_and_takes_them_when_they_are_unfrozen() -> None:
    groups = ParamGroups(head={"match": "head.bias", "lr_scale": 3}, norm={"module": "*Norm"})
    assert "head" not in members(groups.partition(NET))
    unfrozen = [*NET[:-1], Parameter("head.bias", (100,), LINEAR)]
    assert members(groups.partition(unfrozen))["head"] == ("head.bias",)


def test_what_a_rule_sets_beside_its_conditions() -> None:
    made = ParamGroups(
        a={"match": "norm.*", "weight_decay": 0, "lr": 3, "betas": [0.9, 0.95]}, b={"match": "conv.*", "weight_decay": 0.3}
    ).partition(NET)
    b, rest, a = made
    assert (a.no_decay, a.lr, a.lr_ratio, a.options) == (True, 3.0, 1.0, {"betas": [0.9, 0.95]})
    assert (b.no_decay, b.lr, b.options) == (False, None, {"weight_decay": 0.3})
    assert [group.rule for group in made] == ["name conv.*", "the rest", "name norm.*"]
    assert rest == Group(("embed.weight", "body.0.weight", "body.0.bias"), "default", rule="the rest")


def test_groups_say_the_same_after_a_pickle_and_show_every_difference() -> None:
    made = ParamGroups(no_decay={**NO_DECAY, "weight_decay": 0}, head=Rule(match="conv.*", lr_scale=10, momentum=0.5))
    assert pickle.loads(pickle.dumps(made)).partition(NET) == made.partition(NET)
    assert repr(made) == (
        "ParamGroups(no_decay=Rule(any=[Rule(ndim='<2'), Rule(module=['*Norm', '*Norm?d', 'Embedding', 'EmbeddingBag']), "
        "Rule(match=['*pos*embed*', '*cls_token', '*class_token'])], weight_decay=0), head=Rule(match='conv.*', lr_scale=10.0, "
        "momentum=0.5))"
    )
    assert repr(LayerDecay(no_decay=None)) == "LayerDecay(decay=0.75, pattern=None, no_decay=None)"
    assert repr(MupLike(64)) == "MupLike(base_fan_in=64.0, scaled=None)"
    assert Rule(match="a", lr=1, weight_decay=0) == Rule(weight_decay=0, lr=1.0, match=["a"]) != Rule(match="a", lr=1)


conditions = st.one_of(
    st.fixed_dictionaries({"match": st.sampled_from(["*", "*.weight", "*.bias", "a.*", "*b*"])}),
    st.fixed_dictionaries({"regex": st.sampled_from(["a", r"\d", "^b", "t$"])}),
    st.fixed_dictionaries({"module": st.sampled_from(["Linear", "*Norm", ["Linear", "Embedding"]])}),
    st.fixed_dictionaries({"ndim": st.sampled_from([1, 2, "<2", ">1", [1, 3]])}),
)
either = st.lists(conditions, min_size=1, max_size=3).map(lambda found: {"any": found})
overrides = st.dictionaries(st.sampled_from(["lr_scale", "weight_decay", "momentum"]), st.floats(0.1, 3), max_size=3)
rules = st.lists(st.tuples(conditions, st.one_of(conditions, either), overrides), max_size=4).map(
    lambda found: [{**one, **other, **more} for one, other, more in found]
)
parameters = st.lists(
    st.builds(
        Parameter,
        name=st.from_regex(r"[ab]{1,2}\.[0-3]\.(weight|bias)", fullmatch=True),
        shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
        modules=st.sampled_from([LINEAR, NORM, EMBEDDING]),
        trainable=st.booleans(),
    ),
    unique_by=lambda parameter: parameter.name,
    max_size=12,
)


@given(rules, parameters)
def test_rules_partition_the_parameters(given_rules: list[dict[str, Any]], whole: list[Parameter]) -> None:
    """Disjoint, complete, in order, each parameter under the first rule that matches it; or a rule is dead."""
    groups = ParamGroups(**{f"rule_{index}": rule for index, rule in enumerate(given_rules)})
    first = {
        parameter.name: next((name for name, rule in groups.rules.items() if rule.holds(parameter)), "default")
        for parameter in whole
    }
    if dead := set(groups.rules) - set(first.values()):
        with pytest.raises(ConfigError) as caught:
            groups.partition(whole)
        assert caught.value.key.partition(".")[0] in dead
        return
    made, names = groups.partition(whole), [parameter.name for parameter in whole if parameter.trainable]
    assert sorted(name for group in made for name in group.parameters) == sorted(names)
    for group in made:
        assert list(group.parameters) == [name for name in names if group.name is None or first[name] == group.name]
        assert group.parameters or not names
    assert len({group.name for group in made}) == len(made)
    own = [group.has_own_lr for group in made]
    assert own == sorted(own), "those with the optimizer's own learning rate come first"


# What cannot be meant


def rule_of(**rule: Any) -> Callable[[], Any]:
    return lambda: ParamGroups(one=rule).partition(NET)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (rule_of(match="*.biass"), "one.match: '*.biass' matches none of 6 parameters. Nearest: body.0.bias."),
        (
            rule_of(match=["*.q", "*.k"]),
            "one.match: ['*.q', '*.k'] matches none of 6 parameters. There are embed.weight, body.0.weight, body.0.bias, "
            "norm.weight, ...",
        ),
        (rule_of(regex="^hea$", ndim=1), "one.regex: '^hea$' matches none of 6 parameters. Nearest: head.bias."),
        (rule_of(module="LayerNrom"), "one.module: 'LayerNrom' matches none of 6 parameters. Nearest: LayerNorm."),
        (rule_of(ndim=">4"), "one.ndim: '>4' matches none of 6 parameters. They have 1 or 2 or 4 dimensions."),
        (
            rule_of(any=[{"match": "x"}, {"ndim": 7}]),
            "one.any: name x or ndim 7 matches none of 6 parameters. There are embed.weight, body.0.weight, body.0.bias, "
            "norm.weight, ...",
        ),
        (rule_of(match="conv.*", ndim=1), "one: none of 6 parameters meets all its conditions: name conv.*, and ndim 1."),
        (
            lambda: ParamGroups(all={"match": "*"}, biases={"ndim": 1}).partition(NET),
            "biases: all 2 parameters that it matches are taken by rules before it: all. Put it first, or leave it out.",
        ),
        (
            lambda: ParamGroups(flat={"ndim": 1}).partition([Parameter("lazy.weight", None)]),
            "flat: lazy.weight has no shape yet: its module is built by its first forward. Run one batch through the model before "
            "it is trained, or match it by name or class.",
        ),
        (
            rule_of(weight_decay=0),
            "one: a rule needs a condition, which parameters it is for. Write one of match, regex, module, ndim, any.",
        ),
        (rule_of(regex="(["), "one.regex: '([' is no regular expression: unterminated character set at position 1."),
        (rule_of(regex="a" * 201), "one.regex: an expression of 201 characters; at most 200 are read."),
        (rule_of(regex=3), "one.regex: 3 is no regular expression. Write a text such as '^head', or a list."),
        (rule_of(match=3), "one.match: 3 is no name or glob. Write '*.bias', or a list."),
        (rule_of(module=[True]), "one.module: True is no class or glob. Write LayerNorm or '*Norm', or a list."),
        (rule_of(match=[]), "one.match: an empty list matches nothing. Leave it out, or write null."),
        (rule_of(ndim="few"), "one.ndim: 'few' is no number of dimensions. Write 1, '<2', '>=2', or a list."),
        (rule_of(ndim=-1), "one.ndim: -1 is no number of dimensions. Write 1, '<2', '>=2', or a list."),
        (rule_of(ndim=1000), "one.ndim: 1000 is no number of dimensions. Write 1, '<2', '>=2', or a list."),
        (rule_of(ndim=True), "one.ndim: True is no number of dimensions. Write 1, '<2', '>=2', or a list."),
        (rule_of(any={"ndim": 1}), "one.any: {'ndim': 1} is no list of conditions. Write [{ndim: '<2'}, {module: Embedding}]."),
        (rule_of(any=[]), "one.any: an empty list matches nothing. Leave it out, or write null."),
        (
            rule_of(any=[{"match": "*"}, {"match": "*", "lr": 1}]),
            "one.any.1.lr: 'lr' is no condition. Here stand only match, regex, module, ndim, any.",
        ),
        (rule_of(any=[{"regex": "["}]), "one.any.0.regex: '[' is no regular expression: unterminated character set at position 0."),
        (rule_of(match="*", lr=1, lr_scale=2), "one: lr 1 and lr_scale 2 are both given. Leave one of them out."),
        (
            rule_of(match="*", lr=0),
            "one.lr: 0 is not possible. Write a finite number above zero. To keep parameters as they are, freeze them.",
        ),
        (
            rule_of(match="*", lr_scale=math.inf),
            "one.lr_scale: inf is not possible. Write a finite number above zero. To keep parameters as they are, freeze them.",
        ),
        (rule_of(match="*", lr_scale="big"), "one.lr_scale: 'big' is not a number. Write one, for example 0.1."),
        (rule_of(match="*", lr=True), "one.lr: True is not a number. Write one, for example 0.001."),
        (lambda: ParamGroups(one=[1]), "one: [1] is no rule. Write a mapping such as {match: '*.bias', weight_decay: 0}."),
        (
            lambda: ParamGroups(default={"match": "*"}),
            "default: this is the name of the group for what no rule matches. Choose another.",
        ),
        (lambda: LayerDecay(1.5), "decay: 1.5 is above 1, so the first layers would learn fastest."),
        (lambda: LayerDecay(0), "decay: 0 is not possible. Write a finite number above zero."),
        (lambda: LayerDecay(pattern=["a"]), "pattern: ['a'] is no regular expression. Write a text such as '^head'."),  # type: ignore[arg-type]
        (lambda: LayerDecay(pattern="(["), "pattern: '([' is no regular expression: unterminated character set at position 1."),
        (
            lambda: LayerDecay(pattern="block").partition(NET),
            "pattern: 'block' matches none of 6 parameters. There are embed.weight, body.0.weight, body.0.bias, norm.weight, ...",
        ),
        (
            lambda: LayerDecay(no_decay={"ndim": 1, "lr": 2}),
            "no_decay.lr: 'lr' is no condition. Here stand only match, regex, module, ndim, any.",
        ),
        (
            lambda: LayerDecay(layer_2={"match": "body.*"}).partition(NET),
            "layer_2: LayerDecay makes a group of this name by itself. Choose another.",
        ),
        (lambda: MupLike("wide"), "base_fan_in: 'wide' is not a number. Write one, for example 256."),  # type: ignore[arg-type]
        (
            lambda: MupLike(scaled={"ndim": 5}).partition(NET),
            "scaled: none of 6 parameters is scaled. There are embed.weight, body.0.weight, body.0.bias, norm.weight, ...",
        ),
    ],
)
def test_refuses(made: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made()
    assert str(caught.value) == message


def test_a_hostile_expression_is_short_and_meets_short_names() -> None:
    begun = time.perf_counter()
    with pytest.raises(ConfigError, match="matches none of 3 parameters"):
        ParamGroups(one={"regex": "(a+)+$"}).partition([Parameter(f"{'a' * 12}.{index}!") for index in range(3)])
    assert time.perf_counter() - begun < 1


# What is derived from the model


def layer(depth: int, kept: bool = False) -> str:
    return f"layer_{depth}" + "_no_decay" * kept


def vit(blocks: int = 4) -> list[Parameter]:
    """Names and shapes of a vision transformer, in its module's order."""
    inner = [
        Parameter(f"blocks.{block}.{name}", shape, kind)
        for block in range(blocks)
        for name, shape, kind in [
            ("norm1.weight", (8,), NORM),
            ("norm1.bias", (8,), NORM),
            ("attn.qkv.weight", (24, 8), LINEAR),
            ("attn.qkv.bias", (24,), LINEAR),
            ("mlp.0.weight", (8, 8), LINEAR),
        ]
    ]
    return [
        Parameter("cls_token", (1, 1, 8), ("VisionTransformer",)),
        Parameter("pos_embed", (1, 5, 8), ("VisionTransformer",)),
        Parameter("patch_embed.proj.weight", (8, 3, 4, 4), ("Conv2d",)),
        Parameter("patch_embed.proj.bias", (8,), ("Conv2d",)),
        *inner,
        Parameter("norm.weight", (8,), NORM),
        Parameter("norm.bias", (8,), NORM),
        Parameter("head.weight", (10, 8), LINEAR),
        Parameter("head.bias", (10,), LINEAR),
    ]


def test_layer_decay_gives_timms_depths_and_scales() -> None:
    made = LayerDecay(0.5).partition(vit())
    found = members(made)
    assert found[layer(0)] == ("patch_embed.proj.weight",)
    assert found[layer(0, True)] == ("cls_token", "pos_embed", "patch_embed.proj.bias")
    assert found[layer(1)] == ("blocks.0.attn.qkv.weight", "blocks.0.mlp.0.weight")
    assert found[layer(4, True)] == (
        *("blocks.3.norm1.weight", "blocks.3.norm1.bias", "blocks.3.attn.qkv.bias"),
        *("norm.weight", "norm.bias"),  # timm too counts it to the last block
    )
    assert (found[layer(5)], found[layer(5, True)]) == (("head.weight",), ("head.bias",))
    assert {group.name: group.lr_ratio for group in made} == {
        layer(depth, kept): 0.5 ** (5 - depth) for depth in range(6) for kept in (False, True)
    }
    assert all(group.no_decay == str(group.name).endswith("no_decay") for group in made)
    assert made[0].name == layer(5), "the head, whose learning rate is the optimizer's, is what ratios are taken from"


def test_layer_decay_by_a_pattern_without_the_split_and_with_rules_before_it() -> None:
    by_attention = LayerDecay(0.5, pattern=r"blocks\.\d+\.attn", no_decay=None, head={"match": "head.*", "lr": 3.0})
    assert {group.name: (group.lr_ratio, group.lr, len(group.parameters)) for group in by_attention.partition(vit())} == {
        "layer_0": (0.5**5, None, 6),  # all before the first attention
        **{layer(depth): (0.5 ** (5 - depth), None, 5) for depth in (1, 2, 3)},
        "layer_4": (0.5, None, 2),
        "layer_5": (1.0, None, 3),  # what comes after the last one: a matrix, and the norm after that
        "head": (1.0, 3.0, 2),
    }


@pytest.mark.parametrize(
    ("names", "depths"),
    [
        (["net.0.w", "net.2.w", "net.4.w"], [0, 1, 2]),
        (["net.0.w", "net.1.v", "net.3.w", "net.4.v", "net.9.w", "net.9.v"], [0, 0, 1, 1, 2, 2]),
        (["0.v", "1.w", "2.w"], [0, 1, 2]),
        (["conv1.w", "bn1.v", "layer1.0.conv.w", "layer1.1.conv.w", "layer2.0.conv.w", "fc.w", "fc.v"], [0, 0, 1, 2, 3, 4, 4]),
        (["emb.w", "enc.0.w", "mid.w", "dec.0.w", "norm.v", "out.w", "last.v"], [0, 1, 1, 2, 2, 3, 3]),
        (["one.w", "norm.v", "two.w", "three.w"], [0, 0, 1, 2]),
        (["scale", "one.w", "two.w"], [0, 1, 2]),
        (["bias"], [0]),
    ],
)
def test_depth_follows_the_modules_order(names: list[str], depths: list[int]) -> None:
    whole = [Parameter(name, (3,) if name.endswith("v") else (3, 3)) for name in names]
    made = LayerDecay(0.5, no_decay=None).partition(whole)
    deepest = max(depths)
    assert {name: group.lr_ratio for group in made for name in group.parameters} == {
        name: 0.5 ** (deepest - depth) for name, depth in zip(names, depths, strict=True)
    }


@given(parameters, st.floats(0.1, 1))
def test_layers_partition_the_parameters(whole: list[Parameter], decay: float) -> None:
    made = LayerDecay(decay).partition(whole)
    names = [parameter.name for parameter in whole if parameter.trainable]
    assert sorted(name for group in made for name in group.parameters) == sorted(names)
    assert all(0 < group.lr_ratio <= 1 for group in made)


def test_mup_like_scales_by_fan_in_what_has_one() -> None:
    made = MupLike(16, stem={"match": "conv.*"}).partition(NET)
    assert {group.name: (group.parameters, group.lr_ratio) for group in made} == {
        "stem": (("conv.weight",), 1.0),
        "default": (("embed.weight", "body.0.bias"), 1.0),
        "fan_in_8": (("body.0.weight",), 2.0),
        "fan_in_4": (("norm.weight",), 4.0),
    }
    assert members(MupLike(18, scaled={"module": "Conv2d"}).partition(NET)) == {
        "default": NAMES[:4],
        "fan_in_18": ("conv.weight",),
    }


# Imposed


def test_rules_set_options_after_the_optimizer_is_built() -> None:
    made = ParamGroups(
        head={"match": "b", "lr": 0.5, "betas": [0.8, 0.9], "weight_decay": 0}, scaled={"match": "c", "lr_scale": 0.1}
    ).partition([Parameter("a"), Parameter("b"), Parameter("c")])
    optimizer = torch.optim.AdamW([{"params": [tensor]} for tensor in tensors("a", "b", "c").values()], lr=1.0, weight_decay=0.3)
    impose(optimizer.param_groups, made)
    assert [(group["name"], group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("default", 1.0, (0.9, 0.999), 0.3),
        ("head", 0.5, (0.8, 0.9), 0.0),
        ("scaled", 0.1, (0.9, 0.999), 0.3),
    ]


def test_a_zero_decay_that_a_rule_asks_for_is_kept_where_nothing_decays() -> None:
    made = ParamGroups(free={"match": "b", "weight_decay": 0}).partition([Parameter("a"), Parameter("b")])
    named = tensors("b", "a")
    optimizer = torch.optim.Adam([{"params": [tensor]} for tensor in named.values()], lr=1.0)
    impose(optimizer.param_groups, made)
    recorded = record(optimizer.param_groups, names_of(named))
    assert [group.no_decay for group in recorded] == [False, False]
    assert [(group.name, group.no_decay) for group in keep_zero_decays(recorded, made)] == [("free", True), ("default", False)]


class ByKey(ParamGroups):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.key = lambda name: name


def test_what_a_subclass_shows_is_the_same_in_every_run() -> None:
    """A resumed run is compared by it, and the address of a function would always differ."""
    assert repr(ByKey(3)) == "ByKey(depth=3)"
