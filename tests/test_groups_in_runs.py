"""Rules for parameter groups in real runs: what steps, what crosses a switch, what a resume brings back, on every strategy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Rprop
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_adaptive import (
    CheckpointError,
    Clock,
    ConfigError,
    Cosine,
    LayerDecay,
    MupLike,
    OptimizerSwitchCallback,
    ParamGroups,
    attach,
)
from lightning_adaptive.param_groups import NO_DECAY
from tests.cli import SHORT, Run, runs
from tests.cpu_strategies import STRATEGIES, ShardableNet
from tests.grouped import Seen, fit, fit_saved
from tests.pair import Pair
from tests.support import Net, ValidatedNet, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")

FREE = {**NO_DECAY, "weight_decay": 0}
"""The preset ``no_decay``."""

BIASES = ParamGroups(biases={"ndim": 1, "weight_decay": 0, "lr_scale": 2}, last={"match": "net.2.*", "lr": 0.05})


class Bare(Net):
    """A net of the test's own layers, whose loss gives every parameter a gradient of one, or of zero."""

    def __init__(self, gradient: float = 1.0, **layers: nn.Module) -> None:
        super().__init__()
        del self.net
        self.gradient = gradient
        for name, layer in layers.items():
            self.add_module(name, layer)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.gradient * sum(parameter.sum() for parameter in self.parameters() if parameter.requires_grad)


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


class Vit(nn.Module):
    """A vision transformer as far as names and shapes go."""

    def __init__(self, blocks: int = 3, width: int = 8) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
        self.patch_embed = nn.Conv2d(3, width, 4)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)


def switch(groups: Any = "inherit", optimizer: Any = None, at: str = "1ep", **options: Any) -> OptimizerSwitchCallback:
    sgd = partial(SGD, lr=0.02, momentum=0.9, weight_decay=5e-4)
    return OptimizerSwitchCallback(at=at, optimizer=optimizer or sgd, param_groups=groups, **options)


# What steps


def test_weights_decay_as_their_group_says_and_the_others_not_at_all() -> None:
    module = Bare(0.0, inner=nn.Linear(4, 4), norm=nn.LayerNorm((2, 2)), words=nn.Embedding(3, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    fit(attach(module, optimizer=partial(SGD, lr=0.5, weight_decay=0.1), param_groups=ParamGroups(no_decay=FREE)))
    for name, tensor in module.state_dict().items():
        factor = (1 - 0.5 * 0.1) ** 16 if name == "inner.weight" else 1.0
        torch.testing.assert_close(tensor, before[name] * factor, rtol=1e-5, atol=0)


def test_pain_19_the_preset_goes_by_class_and_dimensions_and_not_by_names() -> None:
    module = Bare(
        one=nn.Linear(4, 4), two=nn.LayerNorm((2, 2)), three=nn.Embedding(3, 2), four=nn.BatchNorm1d(3), five=nn.RMSNorm((2, 2)),
        vit=Vit(1), bias=nn.Conv1d(2, 2, 1, bias=False),
    )  # fmt: skip
    _, seen = fit(attach(module, optimizer=partial(AdamW, lr=0.1, weight_decay=0.3), param_groups=ParamGroups(no_decay=FREE)))
    decayed = {
        *("one.weight", "bias.weight", "vit.patch_embed.weight", "vit.head.weight"),
        *(f"vit.blocks.0.{name}.weight" for name in ("attn", "mlp.0", "mlp.2")),
    }
    assert set(seen.members()["default"]) == decayed
    assert set(seen.members()["no_decay"]) == {name for name, _ in module.named_parameters()} - decayed
    assert {name: decay for name, (_, decay, _) in seen.groups[0].items()} == {"no_decay": 0.0, "default": 0.3}
    lines = str(seen.plan).splitlines()
    assert lines[2:] == [
        "         group     tensors  parameters       lr  decay  matched by",
        "         no_decay       18         150  1.0e-01      0  ndim <2 or module *Norm|*Norm?d|Embedding|EmbeddingBag or name "
        "*pos*embed*|*cls_token|*class_token",
        "         default         7         676  1.0e-01    0.3  the rest",
    ]


def test_pain_20_layer_decay_reaches_the_optimizer_at_every_step() -> None:
    """Against timm's formula: ``decay ** (blocks + 1 - depth)`` with the stem at 0 and the head at ``blocks + 1``."""
    module, blocks, decay = Bare(vit=Vit(3)), 3, 0.65
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    attach(module, optimizer=partial(SGD, lr=0.5), scheduler=Cosine(warmup="2st"), param_groups=LayerDecay(decay))
    _, seen = fit(module)

    def scale(name: str) -> float:
        if name.startswith(("vit.cls_token", "vit.pos_embed", "vit.patch_embed")):
            depth = 0
        elif name.startswith("vit.head"):
            depth = blocks + 1
        else:
            depth = blocks if name.startswith("vit.norm") else int(name.split(".")[2]) + 1
        return decay ** (blocks + 1 - depth)

    factor = Cosine(warmup="2st")(Clock(steps_per_epoch=8, total_steps=16))
    for step in range(16):
        for lr, _, members in seen.groups[step].values():
            assert all(lr == pytest.approx(0.5 * factor(step) * scale(name), rel=1e-12) for name in members)
    for name, tensor in module.state_dict().items():  # with a gradient of one a weight moves by the sum of its learning rates
        moved = 0.5 * scale(name) * sum(factor(step) for step in range(16))
        torch.testing.assert_close(before[name] - tensor, torch.full_like(tensor, moved), rtol=1e-4, atol=1e-5)


def test_a_wide_layer_learns_slower_by_its_fan_in() -> None:
    module = Bare(stem=nn.Linear(3, 32), hidden=nn.Linear(32, 64), out=nn.Linear(64, 4))
    groups = MupLike(base_fan_in=16, input={"match": "stem.*"})
    _, seen = fit(attach(module, optimizer=partial(Adam, lr=0.1), param_groups=groups))
    assert seen.lrs(0) == {"input": 0.1, "default": 0.1, "fan_in_32": 0.05, "fan_in_64": 0.025}


def test_pain_17_lightnings_keys_around_a_scheduler_hold_with_several_groups() -> None:
    plateau = {"scheduler": partial(ReduceLROnPlateau, patience=0, threshold=10.0), "monitor": "val/loss", "interval": "epoch"}
    _, seen = fit(attach(ValidatedNet(), optimizer=partial(SGD, lr=0.1), scheduler=plateau, param_groups=BIASES), max_epochs=3)
    assert seen.lrs(0) == {"default": 0.1, "biases": 0.2, "last": 0.05}
    # Its threshold lets no epoch count as better, so it acts after each.
    assert seen.lrs(-1) == {name: pytest.approx(lr / 100) for name, lr in seen.lrs(0).items()}


def test_pain_28_the_schedule_of_every_group_counts_optimizer_steps() -> None:
    module = attach(Net(), optimizer=partial(SGD, lr=0.1), scheduler=Cosine(), param_groups=BIASES)
    _, seen = fit(module, accumulate_grad_batches=4)
    factor = Cosine()(Clock(steps_per_epoch=2, total_steps=4))
    for batch in range(16):
        assert seen.lrs(batch) == {
            name: pytest.approx(base * factor(batch // 4)) for name, base in (("default", 0.1), ("biases", 0.2), ("last", 0.05))
        }


# What crosses a switch


def test_rules_after_a_switch_and_what_the_phase_after_them_inherits() -> None:
    then = switch(optimizer=partial(AdamW, lr=1.0, weight_decay=0.3), at="10st")
    _, seen = fit(Net(), switch(BIASES, then=then))
    assert seen.groups[7] == {"": (1e-2, 0, ("net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"))}
    assert seen.groups[8] == {
        "default": (0.02, 5e-4, ("net.0.weight",)),
        "biases": (0.04, 0.0, ("net.0.bias", "net.2.bias")),
        "last": (0.05, 5e-4, ("net.2.weight",)),
    }
    assert {name: (pytest.approx(lr), decay) for name, (lr, decay, _) in seen.groups[10].items()} == {
        "default": (1.0, 0.3),
        "biases": (2.0, 0.0),
        "last": (2.5, 0.3),
    }
    assert [(row.name, row.tensors, row.parameters, row.lr, row.decay, row.matched_by) for row in seen.plan.phases[2].table] == [  # type: ignore[union-attr]
        ("default", 1, 512, "1.0e+00", "0.3", "inherited"),
        ("biases", 2, 36, "2.0e+00", "0", "inherited"),
        ("last", 1, 128, "2.5e+00", "0.3", "inherited"),
    ]


def test_a_zero_decay_of_a_phase_that_does_not_decay_holds_in_the_next() -> None:
    """Adam without decay, then SGD with some: the biases that the rule keeps free of it stay so."""
    _, seen = fit(attach(Net(), optimizer=partial(Adam, lr=0.1), param_groups=ParamGroups(no_decay=FREE)), switch())
    assert {name: decay for name, (_, decay, _) in seen.groups[8].items()} == {"no_decay": 0.0, "default": 5e-4}


@pytest.mark.parametrize("optimizer", [partial(Rprop, lr=0.1), partial(LBFGS, lr=0.1)])
def test_no_decay_goes_with_an_optimizer_that_does_not_decay(optimizer: Any) -> None:
    fit(attach(Net(), optimizer=optimizer, param_groups=ParamGroups(no_decay=FREE)))


@pytest.mark.parametrize(
    ("groups", "optimizer", "message"),
    [
        (
            {"no_decay": {"match": "*.biass"}},
            SGD,
            "no_decay.match: '*.biass' matches none of 4 parameters. Nearest: net.0.bias, net.2.bias.",
        ),
        (
            {"slow": {"match": "net.0.*", "lrscale": 0.1}},
            SGD,
            "slow.lrscale: the optimizer has no option 'lrscale'. Did you mean 'lr_scale'? A rule sets lr_scale, lr, momentum, "
            "dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused; its conditions are match, regex, module, "
            "ndim, any.",
        ),
        (
            {"slow": {"match": "net.0.*", "params": []}},
            partial(LBFGS, lr=1),
            "slow: LBFGS has no parameter groups, so none can have options of its own. Choose another optimizer, or leave the rule "
            "out.",
        ),
        (
            {"slow": {"match": "net.0.*", "lr_scale": 0.1}},
            partial(LBFGS, lr=1),
            "slow: LBFGS has no parameter groups, so none can have options of its own. Choose another optimizer, or leave the rule "
            "out.",
        ),
        (
            {"slow": {"match": "net.0.*", "weight_decay": -1}},
            partial(SGD, lr=1),
            "slow: SGD cannot be built: Invalid weight_decay value: -1.",
        ),
        (
            {"slow": {"match": "net.0.*", "betas": [0.9]}},
            partial(Adam, lr=1),
            "slow: Adam cannot be built: tuple index out of range.",
        ),
    ],
)
def test_what_cannot_be_meant_ends_the_run_before_its_first_step(groups: Any, optimizer: Any, message: str) -> None:
    for module, callbacks, key in (
        (attach(Net(), optimizer=optimizer, param_groups=ParamGroups(**groups)), (), "param_groups."),
        (Net(), (switch(ParamGroups(**groups), optimizer),), "switch.param_groups."),
    ):
        with pytest.raises(ConfigError) as caught:
            fit(module, *callbacks)
        assert str(caught.value) == key + message


# Parameters of every kind


def test_tied_parameters_are_one_under_all_their_names_and_frozen_ones_none() -> None:
    module = Bare(words=nn.Embedding(5, 3), body=nn.Linear(3, 3), head=nn.Linear(3, 5))
    module.get_submodule("head").weight = module.get_submodule("words").weight
    module.get_submodule("body").bias.requires_grad_(False)
    for rule in ({"match": "head.weight"}, {"module": "Embedding"}, {"match": "words.*"}):
        groups = ParamGroups(tied=rule, frozen={"match": "body.bias"})
        _, seen = fit(attach(module, optimizer=partial(SGD, lr=0.1), param_groups=groups))
        assert seen.members() == {"tied": ("words.weight",), "default": ("body.weight", "head.bias")}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate")
def test_a_lazily_built_layer_goes_by_its_name_and_has_no_dimensions_yet() -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4))

    by_name = ParamGroups(first={"match": "net.0.*"}, linear={"module": "Linear"})
    _, seen = fit(attach(Lazy(), optimizer=partial(SGD, lr=0.1), param_groups=by_name), switch())
    assert [len(members) for members in seen.members().values()] == [2, 2]
    with pytest.raises(ConfigError, match=r"^param_groups\.flat: net\.0\.weight has no shape yet: its module is "):
        fit(attach(Lazy(), optimizer=partial(SGD, lr=0.1), param_groups=ParamGroups(flat={"ndim": 1})))


@pytest.mark.parametrize("compiled", ["module", "layer"])
def test_a_compiled_module_is_grouped_by_its_plain_names(compiled: str) -> None:
    module: Any = Net()
    if compiled == "module":
        module.net = torch.compile(module.net, backend="eager")
    else:
        module.net[0] = torch.compile(module.net[0], backend="eager")
    groups = ParamGroups(last={"match": "net.2.*", "module": "Linear"}, biases={"regex": r"^net\.0\.bias$"})
    _, seen = fit(attach(module, optimizer=partial(SGD, lr=0.1), param_groups=groups))
    assert {name: len(members) for name, members in seen.members().items()} == {"last": 2, "biases": 1, "default": 1}


class Thaw(BaseFinetuning):
    """Lightning's way: the first layer is frozen, and joins the running optimizer in the second epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-3)


def test_pain_14_a_group_that_is_added_follows_the_schedule_and_is_grouped_by_the_rules_of_the_next_phase() -> None:
    module = attach(
        Net(), optimizer=partial(SGD, lr=0.1), scheduler=Cosine(), param_groups=ParamGroups(biases={"ndim": 1, "lr_scale": 2})
    )
    _, seen = fit(module, switch(BIASES, at="2ep"), Thaw(), max_epochs=3)
    assert seen.members(0) == {"biases": ("net.2.bias",), "default": ("net.2.weight",)}
    assert seen.members(8) == {**seen.members(0), "": ("net.0.weight", "net.0.bias")}
    factor = Cosine()(Clock(steps_per_epoch=8, total_steps=24))
    assert seen.lrs(8)[""] == 1e-3
    assert seen.lrs(15) == {
        name: pytest.approx(base * factor(15)) for name, base in (("biases", 0.2), ("default", 0.1), ("", 1e-3))
    }
    assert seen.members(16) == {
        "default": ("net.0.weight",),
        "biases": ("net.0.bias", "net.2.bias"),
        "last": ("net.2.weight",),
    }


def test_what_only_requires_a_gradient_again_is_trained_by_the_next_rules_and_by_no_inherited_groups() -> None:
    class Unfreeze(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.net[0].requires_grad_(trainer.current_epoch > 0)

    for groups, names in ((BIASES, {"default", "biases", "last"}), ("inherit", {"biases", "last"})):
        module = Net()
        module.net[0].requires_grad_(False)
        attach(module, optimizer=partial(SGD, lr=0.1), param_groups=BIASES)
        _, seen = fit(module, switch(groups), Unfreeze())
        assert set(seen.members(0)) == {"biases", "last"}
        assert set(seen.members(8)) == names


# The same run back


def train(folder: Path, groups: Any, later: Any, resumed_from: int = 0, strategy: str | None = None, policy: str = "error") -> Seen:
    """Four epochs with a switch after the second."""
    optimizer = partial(AdamW, lr=1e-2, weight_decay=0.1)
    module = attach(ShardableNet(), optimizer=optimizer, scheduler=Cosine(), param_groups=groups)
    to_sgd = switch(later, at="2ep", scheduler=Cosine(), on_resume=policy)
    return fit_saved(folder, module, to_sgd, 4, strategy, resumed_from)


FIRST = ParamGroups(no_decay=FREE, last={"match": "net.2.weight", "lr": 0.03, "betas": [0.8, 0.99]})
LATER = ParamGroups(biases={"ndim": 1, "weight_decay": 0, "momentum": 0.5}, last={"match": "net.2.*", "lr": 0.05})


def resumes(folder: Path, strategy: str | None = None) -> list[bool]:
    """Whether it resumes bit for bit before the switch, at it, and after it."""
    later = "inherit" if strategy and strategy.startswith("deepspeed") else LATER
    whole = train(folder, FIRST, later, strategy=strategy)
    return [whole.goes_on_in(train(folder, FIRST, later, epoch, strategy)) for epoch in (1, 2, 3)]


def test_a_run_with_rules_on_either_side_of_the_switch_resumes_bit_for_bit(tmp_path: Path) -> None:
    assert resumes(tmp_path) == [True] * 3
    saved = torch.load(tmp_path / "epoch3.ckpt", weights_only=True)
    [state] = [value for key, value in saved["callbacks"].items() if key.startswith("OptimizerSwitchCallback")]
    assert [set(group) for group in state["partition"]] == [{"parameters", "name", "lr_ratio", "no_decay"}] * 3
    assert [(group["name"], group["lr_ratio"], group["no_decay"]) for group in state["partition"]] == [
        ("biases", 1.0, True),
        ("default", 1.0, False),
        ("last", 2.5, False),
    ]


@pytest.mark.parametrize(
    "strategy",
    [
        "ddp",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("fsdp sharded", "fsdp full", "fsdp2 sharded", "fsdp2 full", "deepspeed 1", "deepspeed 3")
        ),
    ],
)
def test_two_processes_with_rules_resume_bit_for_bit_wherever_the_groups_are_sharded(
    strategy: str, pair: Pair, tmp_path: Path
) -> None:
    assert pair.run(resumes, tmp_path, strategy) == [[True] * 3] * 2


@pytest.mark.parametrize(
    ("epoch", "first", "later", "line", "value"),
    [
        (
            1,
            ParamGroups(no_decay=FREE, last={"match": "net.2.weight", "lr": 0.04, "betas": [0.8, 0.99]}),
            LATER,
            "param_groups.last.lr: 0.03 in the checkpoint, 0.04 in this run",
            lambda groups: groups["last"][0] / (1 + torch.cos(torch.tensor(torch.pi / 4)).item()) * 2,
        ),
        (
            3,
            FIRST,
            ParamGroups(biases={"ndim": 1, "weight_decay": 0.2, "momentum": 0.5}, last={"match": "net.2.*", "lr": 0.05}),
            "switch.param_groups: ParamGroups(biases=Rule(ndim=1, momentum=0.5, weight_decay=0), ",
            lambda groups: groups["biases"][1],
        ),
    ],
)
def test_a_changed_rule_is_said_on_resume_and_obeys_the_policy(
    epoch: int, first: Any, later: Any, line: str, value: Callable[[Any], float], tmp_path: Path
) -> None:
    train(tmp_path, FIRST, LATER)
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path, first, later, resumed_from=epoch)
    assert line in str(caught.value)
    found = {policy: train(tmp_path, first, later, epoch, policy=policy).groups[0] for policy in ("checkpoint", "config")}
    expected = {1: {"checkpoint": 0.03, "config": 0.04}, 3: {"checkpoint": 0.0, "config": 0.2}}[epoch]
    assert {policy: pytest.approx(value(groups), rel=1e-6) for policy, groups in found.items()} == expected


def test_rules_that_regroup_never_put_saved_state_onto_other_parameters(tmp_path: Path) -> None:
    train(tmp_path, FIRST, LATER)
    other = ParamGroups(no_decay=FREE, last={"match": "net.0.weight", "lr": 0.03, "betas": [0.8, 0.99]})
    for policy in ("error", "config", "checkpoint"):
        with pytest.raises(CheckpointError) as caught:
            train(tmp_path, other, LATER, resumed_from=1, policy=policy)
        assert str(caught.value) == (
            "default holds net.0.weight in the checkpoint where it holds net.2.weight in this run, and the optimizer's state lies "
            "in the order of the groups. Resume with the groups of the run that wrote the checkpoint; to change them, let a switch "
            "lead to others."
        )
    with pytest.raises(
        CheckpointError, match=r"^the optimizer has 3 groups in the checkpoint and 1 in this run, and the optimizer's"
    ):
        train(tmp_path, ParamGroups(), LATER, resumed_from=1)
    with pytest.raises(CheckpointError) as caught:
        train(tmp_path, FIRST, ParamGroups(), resumed_from=3, policy="config")
    assert str(caught.value) == (
        "this run's rules put parameters into other groups than those of the checkpoint, in whose order the optimizer's state "
        "lies. Resume with the rules of the run that wrote it, or with switch.on_resume=checkpoint."
    )
    groups = train(tmp_path, FIRST, ParamGroups(), resumed_from=3, policy="checkpoint").groups
    assert list(groups[0]) == ["biases", "default", "last"]
    assert groups[0]["biases"][1] == 0.0


# Every strategy


def grouped_on(strategy: str) -> list[Any]:
    """Groups of the first and of the second phase by name, with the number of tensors and the scalars that the plan counts."""
    warnings.simplefilter("ignore")
    groups = ParamGroups(vectors={"ndim": "<2", "lr_scale": 0.5}, last={"match": "net.2.*", "module": "Linear", "ndim": 2})
    module = attach(ShardableNet(), optimizer=partial(Adam, lr=1e-2), param_groups=groups)
    later = "inherit" if strategy.startswith("deepspeed") else ParamGroups(wide={"ndim": 2, "module": "Linear", "lr_scale": 0.1})
    seen = Seen()
    trainer(strategy=STRATEGIES[strategy](), devices=2, max_epochs=2, callbacks=[switch(later), seen]).fit(module, loader())
    assert seen.plan is not None
    tables = [[(row.name, row.tensors, row.parameters, row.lr) for row in phase.table] for phase in seen.plan.phases]
    return [*tables, [{name: lr for name, (lr, _, _) in seen.groups[step].items()} for step in (0, -1)]]


@pytest.mark.parametrize(
    "strategy",
    ["ddp", "fsdp2 sharded", "fsdp full", *(pytest.param(f"deepspeed {stage}", marks=pytest.mark.slow) for stage in (1, 3))],
)
def test_the_dimensions_of_the_whole_parameter_count_wherever_it_is_sharded(strategy: str, pair: Pair) -> None:
    one, other = pair.run(grouped_on, strategy)
    assert one == other
    first, later, lrs = one
    assert first == [("last", 1, 128, "1.0e-02"), ("default", 1, 512, "1.0e-02"), ("vectors", 2, 36, "5.0e-03")]
    assert lrs[0] == {"last": 1e-2, "default": 1e-2, "vectors": 5e-3}
    if not strategy.startswith("deepspeed"):
        assert later == [("default", 2, 36, "2.0e-02"), ("wide", 2, 640, "2.0e-03")]
        assert lrs[1] == {"default": 0.02, "wide": pytest.approx(0.002)}


# The command line


def test_rules_are_added_changed_and_taken_out_on_the_command_line(train: Run, tmp_path: Path) -> None:
    ended = train(
        *SHORT, "switch=none", "optimizer=adamw", "param_groups=no_decay", "+param_groups.emb={match: net.0.*, lr_scale: .1}"
    )
    assert ended.code == 0, ended.err
    assert "emb             1         144  1.0e-04   0.01  name net.0.*" in ended.out + ended.err
    ended = train(*SHORT, "switch=none", "optimizer=adamw", "param_groups=no_decay", "~param_groups.no_decay")
    assert (ended.code, "no_decay" in ended.out.partition("PLAN")[2]) == (0, False)
    ended = train(*SHORT, "param_groups=no_decay", "param_groups.no_decay.match=*.biass")
    assert (ended.code, len(runs(tmp_path))) == (2, 3)
    assert (
        "param_groups.no_decay.match: '*.biass' matches none of 8 parameters. Nearest: net.1.bias, net.4.bias, net.9.bias."
        in ended.err
    )
