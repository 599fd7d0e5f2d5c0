"""Several optimizers for the groups of one phase: each steps as it would alone; they save, switch and resume as one."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import nn
from torch.optim import LBFGS, SGD, Adafactor, Adagrad, Adam, AdamW, Muon, NAdam, Optimizer

from lightning_adaptive import (
    CheckpointError,
    Clock,
    CombinedOptimizer,
    ConfigError,
    Cosine,
    OptimizerSwitchCallback,
    ParamGroups,
    attach,
    config,
)
from lightning_adaptive.combined import class_name, part_of_each_group
from tests.cli import SHORT, Run
from tests.cpu_strategies import STRATEGIES, ShardableNet
from tests.grouped import Seen, fit, fit_saved
from tests.pair import Pair
from tests.support import Net, counted_steps, dataset, digest, loader, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")

MUON = partial(Muon, lr=0.02, weight_decay=0.01)
ADAMW = partial(AdamW, lr=3e-3, weight_decay=0.1)
COMBINED = partial(CombinedOptimizer, optimizers={"hidden": MUON, "default": ADAMW})
TO_SGD = partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
RULES = ParamGroups(
    head={"match": "net.2.*", "ndim": 2}, no_decay={"ndim": 1, "weight_decay": 0, "lr_scale": 0.5}, hidden={"ndim": 2}
)
MEMBERS = {"head": ("net.2.weight",), "hidden": ("net.0.weight",), "no_decay": ("net.0.bias", "net.2.bias")}
"""In the order of the groups: a group with a learning rate of its own comes last."""


def combined(**optimizers: Any) -> Callable[..., CombinedOptimizer]:
    return partial(CombinedOptimizer, optimizers=optimizers)


def groups_of(model: Net) -> list[dict[str, Any]]:
    """Two groups of one optimizer with one of the other between them."""
    (first, bias, last, end) = model.parameters()
    return [{"params": [bias], "name": "biases"}, {"params": [first], "name": "hidden"}, {"params": [last, end], "name": "head"}]


def step(model: Net, optimizers: list[Optimizer], count: int, first: int = 0) -> None:
    """Steps on batches of their own, each with a smaller learning rate than the one before."""
    images, targets = dataset().tensors
    for index in range(first, first + count):
        part = slice(8 * (index % 8), 8 * (index % 8) + 8)
        model.zero_grad()
        nn.functional.cross_entropy(model.net(images[part]), targets[part]).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 0.95
            optimizer.step()


PAIRS = [
    (MUON, ADAMW),
    (MUON, partial(AdamW, lr=3e-3, fused=True)),
    (MUON, partial(Adagrad, lr=0.05)),  # its state is there before the first step
    (partial(SGD, lr=0.05), partial(NAdam, lr=3e-3)),
    (partial(Adafactor, lr=0.02), partial(SGD, lr=0.1, momentum=0.9)),
]


@pytest.mark.parametrize(("hidden", "rest"), PAIRS)
def test_each_steps_as_it_would_alone(hidden: Any, rest: Any) -> None:
    model, other = Net(), Net()
    groups, others = groups_of(model), groups_of(other)
    step(model, [CombinedOptimizer(groups, {"hidden": hidden, "default": rest})], 20)
    step(other, [hidden([others[1]]), rest([others[0], others[2]])], 20)
    assert digest(model) == digest(other)
    assert all(not torch.equal(tensor, weights(Net())[name]) for name, tensor in weights(model).items())


def loaded(model: Net, optimizer: CombinedOptimizer, factories: Any) -> tuple[Net, CombinedOptimizer]:
    """By a file that holds plain values alone."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = copy.deepcopy(model)
    other = CombinedOptimizer(groups_of(fresh), factories)
    other.load_state_dict(torch.load(file, weights_only=True))
    return fresh, other


WAYS: dict[str, Callable[..., tuple[Net, CombinedOptimizer]]] = {
    "load_state_dict": loaded,
    "pickle": lambda model, optimizer, _: pickle.loads(pickle.dumps((model, optimizer))),
    "deepcopy": lambda model, optimizer, _: copy.deepcopy((model, optimizer)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("hidden", "rest"), PAIRS)
def test_what_was_saved_goes_on_bit_for_bit(hidden: Any, rest: Any, way: str) -> None:
    model, factories = Net(), {"hidden": hidden, "default": rest}
    optimizer = CombinedOptimizer(groups_of(model), factories)
    step(model, [optimizer], 10)
    fresh, other = WAYS[way](model, optimizer, factories)
    assert other is not optimizer
    assert {id(tensor) for tensor in other.state} <= {id(tensor) for tensor in fresh.parameters()}
    before = digest(model)
    for one, its in ((model, optimizer), (fresh, other)):
        step(one, [its], 10, first=10)
    assert digest(model) == digest(fresh) != before


def test_its_state_is_that_of_one_plain_optimizer() -> None:
    model, other = Net(), Net()
    groups, others = groups_of(model), groups_of(other)
    optimizer, plain = (
        CombinedOptimizer(groups, {"hidden": partial(Adam, lr=0.1), "default": partial(Adam, lr=0.1)}),
        Adam(others, lr=0.1),
    )
    for one, its in ((model, optimizer), (other, plain)):
        step(one, [its], 3)
    saved, expected = optimizer.state_dict(), plain.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert set(saved["state"]) == set(expected["state"]) == set(range(4))
    for place, state in expected["state"].items():
        assert list(saved["state"][place]) == list(state)
        assert all(torch.equal(saved["state"][place][name], tensor) for name, tensor in state.items())


def test_the_loss_is_evaluated_once_with_gradients() -> None:
    model = Net()
    optimizer = CombinedOptimizer(groups_of(model), {"hidden": MUON, "default": ADAMW})
    calls = []

    def closure() -> Any:
        loss = model.net(dataset().tensors[0]).square().sum()
        loss.backward()
        calls.append(loss.detach())
        return loss

    with counted_steps() as counts:
        loss = optimizer.step(closure)
    assert calls == [loss]
    assert counts == {"Muon": 1, "AdamW": 1, "CombinedOptimizer": 1}


@pytest.mark.parametrize("bad", [False, True])
def test_a_scaled_loss_is_unscaled_for_all_and_a_step_that_is_not_finite_left_out(bad: bool) -> None:
    runs = []
    for scale in (1.0, 1024.0):  # a power of two changes no bit
        model = Net()
        optimizer = CombinedOptimizer(groups_of(model), {"hidden": MUON, "default": partial(AdamW, lr=3e-3, fused=True)})
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        loss = model.net(dataset().tensors[0]).square().sum()
        scaler.scale(loss * (torch.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        runs.append(digest(model))
    assert runs[0] == runs[1]
    assert (runs[0] == digest(Net())) == bad


def test_a_group_is_added_to_the_optimizer_of_its_name() -> None:
    model, other = Net(), nn.ParameterDict({"matrix": torch.ones(3, 3), "bias": torch.ones(3), "more": torch.ones(2)})
    optimizer = CombinedOptimizer(groups_of(model), {"hidden": MUON, "default": ADAMW})
    optimizer.add_param_group({"params": [other["matrix"]], "name": "hidden", "lr": 0.5})
    optimizer.add_param_group({"params": other["bias"]})
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [other["matrix"]]})
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        optimizer.add_param_group({"params": ["no tensor"], "name": "hidden"})
    assert [group["lr"] for group in optimizer.param_groups] == [3e-3, 0.02, 3e-3, 0.5, 3e-3]
    assert [type(part).__name__ for part in part_of_each_group(optimizer)] == ["AdamW", "Muon", "AdamW", "Muon", "AdamW"]
    for tensor in other.parameters():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    assert {name for name, tensor in other.items() if not torch.equal(tensor, torch.ones_like(tensor))} == {"matrix", "bias"}
    alone = CombinedOptimizer([{"params": [other["more"]], "name": "only"}], {"only": ADAMW})
    with pytest.raises(ConfigError, match=r"^optimizers: none takes the group None\. Add one of this name"):
        alone.add_param_group({"params": [other["bias"]]})


def test_it_is_told_by_its_members() -> None:
    optimizer = CombinedOptimizer(groups_of(Net()), {"hidden": MUON, "default": ADAMW, "none": None})
    assert class_name(optimizer) == "AdamW(default)+Muon(hidden)"
    lines = repr(optimizer).splitlines()
    assert [line for line in lines if line.endswith("(")] == [
        "CombinedOptimizer (",
        "default: AdamW (",
        "hidden: Muon (",
    ]


# Under Lightning


def switch(optimizer: Any, groups: Any = "inherit", at: str = "1ep", **options: Any) -> OptimizerSwitchCallback:
    return OptimizerSwitchCallback(at=at, optimizer=optimizer, param_groups=groups, **options)


def test_a_schedule_drives_each_group_on_its_own_base() -> None:
    _, seen = fit(attach(Net(), optimizer=COMBINED, scheduler=Cosine(warmup="2st"), param_groups=RULES))
    factor = Cosine(warmup="2st")(Clock(steps_per_epoch=8, total_steps=16))
    assert seen.members() == MEMBERS
    for step in range(16):
        expected = {"head": 3e-3, "hidden": 0.02, "no_decay": 1.5e-3}
        assert seen.lrs(step) == {name: pytest.approx(lr * factor(step), rel=1e-12) for name, lr in expected.items()}
    assert str(seen.plan).splitlines()[1:] == [
        "  phase 1  AdamW(default)+Muon(hidden) steps 0..15  cosine, warmup 2st  lr 1.5e-03/1.0e-02/7.5e-04 -> "
        "3.0e-03/2.0e-02/1.5e-03 (step 1) -> "
        f"{3e-3 * factor(15):.1e}/{0.02 * factor(15):.1e}/{1.5e-3 * factor(15):.1e}  676 parameters, 3 groups  "
        "<- configure_optimizers",
        "         group     tensors  parameters       lr  decay  matched by",
        "         head            1         128  3.0e-03    0.1  name net.2.*, and ndim 2",
        "         hidden          1         512  2.0e-02   0.01  ndim 2",
        "         no_decay        2          36  1.5e-03      0  ndim 1",
    ]


def test_a_switch_to_several_by_rules_and_what_one_inherits_of_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), counted_steps() as counts:
        to_several = switch(COMBINED, RULES, then=switch(TO_SGD, at="2ep", then=switch(COMBINED, at="3ep")))
        _, seen = fit(Net(), to_several, max_epochs=4)
    assert counts == {"Adam": 8, "SGD": 8, "CombinedOptimizer": 16, "Muon": 16, "AdamW": 16}
    assert [{name: group[:2] for name, group in seen.groups[step].items()} for step in (8, 16, 24)] == [
        {"head": (3e-3, 0.1), "hidden": (0.02, 0.01), "no_decay": (1.5e-3, 0.0)},
        # A ratio to a learning rate of AdamW says nothing of one of Muon.
        {"head": (0.1, 5e-4), "hidden": (0.1, 5e-4), "no_decay": (0.05, 0.0)},
        {"head": (3e-3, 0.1), "hidden": (0.02, 0.01), "no_decay": (1.5e-3, 0.0)},
    ]
    assert [seen.members(step) for step in (8, 16, 24)] == [MEMBERS] * 3
    said = [record.getMessage().partition(",")[0] for record in caplog.records if record.getMessage().startswith("SWITCH")]
    assert said == [
        "SWITCH at step 8 (epoch 1): Adam lr 1.0e-02 -> AdamW(default)+Muon(hidden) lr 3.0e-03/2.0e-02/1.5e-03 (own)",
        "SWITCH at step 16 (epoch 2): AdamW(default)+Muon(hidden) lr 3.0e-03/2.0e-02/1.5e-03 -> SGD lr 1.0e-01/5.0e-02 (own)",
        "SWITCH at step 24 (epoch 3): SGD lr 1.0e-01/5.0e-02 -> AdamW(default)+Muon(hidden) lr 3.0e-03/2.0e-02/1.5e-03 (own)",
    ]


def test_the_line_says_whose_learning_rate_is_a_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit(Net(), switch(combined(hidden=Muon, default=ADAMW), RULES))
    assert " lr 3.0e-03/1.0e-03/1.5e-03 (own, the default of Muon), because at=1ep was reached; " in caplog.text


class Held(Callback):
    """Weak references to a combined optimizer, its members and a tensor of its state."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, CombinedOptimizer):
            buffer = optimizer.state[pl_module.net[0].weight]["momentum_buffer"]  # type: ignore[index, union-attr]
            self.references = [weakref.ref(found) for found in (optimizer, *optimizer.optimizers.values(), buffer)]
        elif trainer.global_step == 14:
            self.alive = [reference() is not None for reference in self.references]


@pytest.mark.parametrize("resumed", [False, True])
def test_the_old_ones_and_their_state_are_freed_without_the_garbage_collector(resumed: bool, tmp_path: Path) -> None:
    def module() -> Net:
        return attach(Net(), optimizer=COMBINED, scheduler=Cosine(), param_groups=RULES)

    held, options = Held(), {}
    if resumed:
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
        fit(module(), switch(TO_SGD, at="12st"), saver, enable_checkpointing=True)
        options = {"ckpt_path": tmp_path / "step=8.ckpt"}
    gc.collect()
    gc.disable()
    try:
        trainer(max_epochs=2, callbacks=[switch(TO_SGD, at="12st"), held]).fit(module(), loader(), **options)
    finally:
        gc.enable()
    assert held.alive == [False] * 4


# The same run back


def train(folder: Path, strategy: str | None, resumed_from: int = 0, optimizer: Any = COMBINED) -> Seen:
    """Six epochs: several optimizers, SGD from the third, several again from the fifth."""
    module = attach(ShardableNet(), optimizer=optimizer, scheduler=Cosine(), param_groups=RULES)
    chain = switch(TO_SGD, at="2ep", scheduler=Cosine(), then=switch(optimizer, at="4ep", scheduler=Cosine()))
    return fit_saved(folder, module, chain, 6, strategy, resumed_from)


def resumes(folder: Path, strategy: str | None) -> list[bool]:
    """Whether it resumes bit for bit from each epoch's end, in all phases and at each switch."""
    whole = train(folder, strategy)
    return [whole.goes_on_in(train(folder, strategy, epoch)) for epoch in range(1, 6)]


def test_a_run_resumes_bit_for_bit_from_either_side_of_each_switch(tmp_path: Path) -> None:
    assert resumes(tmp_path, None) == [True] * 5
    saved = torch.load(tmp_path / "epoch5.ckpt", weights_only=True)
    [state] = [value for key, value in saved["callbacks"].items() if key.startswith("OptimizerSwitchCallback")]
    assert state["optimizer"] == "AdamW(default)+Muon(hidden)"
    assert {key: value for key, value in state["settings"].items() if key.startswith("optimizer")} == {
        "optimizer": "CombinedOptimizer",
        "optimizer.optimizers.default": "AdamW",
        "optimizer.optimizers.default.decoupled_weight_decay": True,
        "optimizer.optimizers.default.lr": 3e-3,
        "optimizer.optimizers.default.weight_decay": 0.1,
        "optimizer.optimizers.hidden": "Muon",
        "optimizer.optimizers.hidden.lr": 0.02,
        "optimizer.optimizers.hidden.weight_decay": 0.01,
    }
    assert {key: value for key, value in state["settings"].items() if key.startswith("param_groups")} == {
        "param_groups.no_decay.lr": 1.5e-3,
        "param_groups.no_decay.weight_decay": 0.0,
    }


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2 sharded", "fsdp2 full"])
def test_two_processes_resume_bit_for_bit(strategy: str, pair: Pair, tmp_path: Path) -> None:
    assert pair.run(resumes, tmp_path, strategy) == [[True] * 5] * 2


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first epoch of two, with a switch in the second."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1)
    fit(attach(Net(), optimizer=COMBINED, param_groups=RULES), switch(TO_SGD, at="12st"), saver, enable_checkpointing=True)
    return tmp_path / "step=8.ckpt"


def test_a_changed_option_of_one_is_said_on_resume_and_obeys_the_policy(first: Path) -> None:
    def resumed(policy: str) -> dict[str, float]:
        other = combined(hidden=partial(MUON, lr=0.01), default=ADAMW)
        seen = Seen()
        runner = trainer(max_epochs=2, callbacks=[switch(TO_SGD, at="12st", on_resume=policy), seen])
        runner.fit(attach(Net(), optimizer=other, param_groups=RULES), loader(), ckpt_path=first)
        return seen.lrs(0)

    with pytest.raises(
        CheckpointError, match=r"\n  optimizer\.optimizers\.hidden\.lr: 0\.02 in the checkpoint, 0\.01 in this run\n"
    ):
        resumed("error")
    assert resumed("config") == {"head": 3e-3, "hidden": 0.01, "no_decay": 1.5e-3}
    assert resumed("checkpoint") == {"head": 3e-3, "hidden": 0.02, "no_decay": 1.5e-3}


def test_another_class_never_gets_the_state_of_one(first: Path) -> None:
    other = combined(hidden=TO_SGD, default=ADAMW)
    for policy in ("error", "config", "checkpoint"):
        runner = trainer(max_epochs=2, callbacks=[switch(TO_SGD, at="12st", on_resume=policy)])
        with pytest.raises(CheckpointError) as caught:
            runner.fit(attach(Net(), optimizer=other, param_groups=RULES), loader(), ckpt_path=first)
        assert str(caught.value) == (
            "the checkpoint's first phase was stepped by AdamW(default)+Muon(hidden), this run's by AdamW(default)+SGD(hidden). "
            "Resume with the optimizer of the run that wrote it; to change it, let a switch lead from AdamW(default)+Muon(hidden) "
            "to AdamW(default)+SGD(hidden)."
        )


# What cannot be meant


class OwnState(SGD):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)


class Undecided(SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        for group in self.param_groups:
            group["lr"] = None


def flat(groups: Any) -> Optimizer:
    return SGD([tensor for group in groups for tensor in group["params"]])


NAMES = (
    "several optimizers need parameter groups by name, one for each. Choose param_groups=muon, or write rules: "
    "ParamGroups(hidden={...})."
)
ONE_OF_SEVERAL = "so it cannot be one of several. Choose another optimizer."


@pytest.mark.parametrize(
    ("optimizer", "groups", "message"),
    [
        (COMBINED, ParamGroups(), f": {NAMES}"),
        (
            combined(hiden=MUON, default=ADAMW),
            RULES,
            ".optimizers.hiden: no parameter group has this name. Did you mean 'hidden'? Groups: head, hidden, no_decay.",
        ),
        (
            combined(hidden=MUON, head=ADAMW),
            RULES,
            ".optimizers: none takes the group 'no_decay'. Add one of this name, or one called default for all groups without one.",
        ),
        (
            combined(hidden=MUON, head=ADAMW, no_decay=ADAMW, default=ADAMW),
            RULES,
            ".optimizers.default: every group has an optimizer of its name, so none is left for this one. Leave it out.",
        ),
        (
            partial(CombinedOptimizer, optimizers=[]),
            RULES,
            ".optimizers: [] is no mapping. Give an optimizer for each name of a group, and one called default for the others.",
        ),
        (
            combined(hidden=3, default=ADAMW),
            RULES,
            ".optimizers.hidden: 3 is not a factory. Pass a class, or partial(...) of one.",
        ),
        (
            combined(hidden=SGD([torch.zeros(1)]), default=ADAMW),
            RULES,
            ".optimizers.hidden: a SGD that is already built holds its own parameters. Pass a factory: partial(SGD, ...) from "
            "functools.",
        ),
        (
            combined(hidden=list, default=ADAMW),
            RULES,
            ".optimizers.hidden: the factory returned a list, not a torch.optim.Optimizer.",
        ),
        (
            combined(hidden=ADAMW, default=MUON),
            RULES,
            ".optimizers.default: cannot be built: Muon only supports 2D parameters whereas we found a parameter with size: "
            "torch.Size([32])",
        ),
        (combined(hidden=LBFGS, default=ADAMW), RULES, f".optimizers.hidden: LBFGS evaluates the loss itself, {ONE_OF_SEVERAL}"),
        (
            combined(hidden=OwnState, default=ADAMW),
            RULES,
            f".optimizers.hidden: OwnState saves and loads its state in a way of its own, {ONE_OF_SEVERAL}",
        ),
        (
            combined(hidden=combined(hidden=MUON), default=ADAMW),
            RULES,
            f".optimizers.hidden: CombinedOptimizer holds several itself, {ONE_OF_SEVERAL}",
        ),
        (
            combined(hidden=MUON, default=flat),
            RULES,
            f".optimizers.default: SGD makes other groups of those that it is given, {ONE_OF_SEVERAL}",
        ),
        (
            combined(hidden=Undecided, default=ADAMW),
            RULES,
            ".optimizers.hidden.lr: Undecided has no learning rate (lr is None). Give it one.",
        ),
    ],
)
def test_what_cannot_be_meant_ends_the_run_before_its_first_step(optimizer: Any, groups: Any, message: str) -> None:
    for module, callbacks, key in (
        (attach(Net(), optimizer=optimizer, param_groups=groups), (), "optimizer"),
        (Net(), (switch(optimizer, groups),), "switch.optimizer"),
    ):
        with counted_steps() as counts, pytest.raises(ConfigError) as caught:
            fit(module, *callbacks)
        assert str(caught.value) == key + message
        assert not counts


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"betas": [0.9, 0.99]},
            "betas: the optimizer has no option 'betas'. A rule sets lr_scale, lr, weight_decay, momentum, nesterov, "
            "ns_coefficients, eps, ns_steps, adjust_lr_fn; its conditions are match, regex, module, ndim, any.",
        ),
        ({"momentum": -1}, "Muon cannot be built: momentum should be >= 0 but is: -1."),
    ],
)
def test_an_option_of_a_group_is_one_of_its_own_optimizer(rule: Any, message: str) -> None:
    groups = ParamGroups(hidden={"match": "net.0.weight", **rule}, rest={"match": "*.bias", "betas": [0.5, 0.9]})
    with pytest.raises(ConfigError) as caught:
        fit(attach(Net(), optimizer=COMBINED, param_groups=groups))
    assert str(caught.value) in (f"param_groups.hidden.{message}", f"param_groups.hidden: {message}")


def test_so_each_group_may_have_other_options() -> None:
    groups = ParamGroups(hidden={"match": "net.0.weight", "momentum": 0.8}, rest={"match": "*.bias", "betas": [0.5, 0.9]})
    runner, _ = fit(attach(Net(), optimizer=COMBINED, param_groups=groups), max_epochs=1)
    found = {group["name"]: (group.get("momentum"), group.get("betas")) for group in runner.optimizers[0].param_groups}
    assert found == {"hidden": (0.8, None), "rest": (None, (0.5, 0.9)), "default": (None, (0.9, 0.999))}


NODE = {
    "_target_": "lightning_adaptive.CombinedOptimizer",
    "optimizers": {
        "hidden": {"_target_": "torch.optim.Muon", "_partial_": True, "lr": 0.02},
        "default": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 3e-3, "betas": [0.9, 0.95]},
    },
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizers": {"hidden": {"lr": -1}}}, "optimizers.hidden.lr: -1 is no learning rate. It is finite and above zero."),
        (
            {"optimizers": {"hidden": {"momentun": 0.9}}},
            "optimizers.hidden.momentun: Muon has no option 'momentun'. Did you mean 'momentum'? Options: lr, weight_decay, "
            "momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn.",
        ),
        (
            {"optimizers": {"hidden": {"momentum": -1}}},
            "optimizers.hidden: Muon cannot be built: momentum should be >= 0 but is: -1.",
        ),
        (
            {"optimizers": {"default": {"betas": [0.9]}}},
            "optimizers.default.betas: [0.9] is not a row of 2 numbers. Write them in brackets, for example [0.9, 0.999].",
        ),
        (
            {"optimizers": {"hidden": {"_target_": "os.system"}}},
            "optimizers.hidden._target_: 'os.system' lies in the standard library, which a config may never name.",
        ),
        (
            {"optimizers": {"hidden": {"_target_": "torch.nn.Linear"}}},
            "optimizers.hidden._target_: torch.nn.Linear is not a class of Optimizer, which belongs here.",
        ),
        (
            {"optimizers": {"hidden": "sgd"}},
            "optimizers.hidden: 'sgd' is a word where a node belongs, such as {_target_: torch.optim.AdamW, lr: 3e-4}.",
        ),
        ({"optimizers": {"hidden": 3}}, "optimizers.hidden: 3 stands where a node belongs, a mapping with _target_."),
        (
            {"optimizers": 3},
            "optimizers: 3 is no mapping. Give an optimizer for each name of a group, and one called default for the others.",
        ),
        ({"lr": 3}, "lr: CombinedOptimizer has no option 'lr'. Options: optimizers."),
    ],
)
def test_a_node_within_is_checked_under_its_whole_key(change: dict[str, Any], message: str) -> None:
    for key in ("optimizer", "switch.optimizer"):
        with pytest.raises(ConfigError) as caught:
            config.optimizer_factory(OmegaConf.merge(NODE, change), key)
        assert str(caught.value) == f"{key}.{message}"


def test_a_node_without_its_optimizers_says_so() -> None:
    with pytest.raises(ConfigError) as caught:
        config.optimizer_factory({"_target_": NODE["_target_"]})
    assert str(caught.value) == "optimizer.optimizers: CombinedOptimizer needs the option 'optimizers'."


@pytest.mark.parametrize("convert", ["none", "partial", "all"])
def test_nodes_objects_and_what_hydra_makes_of_them_train_alike(convert: str) -> None:
    node = OmegaConf.create({**NODE, "_partial_": True})
    partials = combined(hidden=partial(Muon, lr=0.02), default=partial(AdamW, lr=3e-3, betas=(0.9, 0.95)))
    runs = []
    for optimizer in (node, OmegaConf.to_container(node), instantiate(node, _convert_=convert), partials):
        module = attach(Net(), optimizer=optimizer, param_groups=RULES)
        runner, _ = fit(module, max_epochs=1)
        runs.append(digest(module))
        kinds = {type(value) for group in runner.optimizers[0].param_groups for name, value in group.items() if name != "params"}
        assert kinds <= {bool, int, float, str, tuple, list, type(None)}, "torch can load nothing else from a checkpoint"
    assert len(set(runs)) == 1


def test_one_within_may_be_left_out() -> None:
    node = OmegaConf.merge(NODE, {"optimizers": {"hidden": None}})
    runner, _ = fit(attach(Net(), optimizer=node, param_groups=RULES), max_epochs=1)
    assert class_name(runner.optimizers[0]) == "AdamW(default)"


# Every strategy


FLAT = combined(hidden=TO_SGD, default=ADAMW)
"""Two that flat vectors suit, unlike Muon, which refuses them by itself."""


def refused(strategy: str, optimizer: Any, at_start: bool = True) -> list[str]:
    """What is said of it after a switch, and as the first one."""
    warnings.simplefilter("ignore")
    said = []
    runs = [(ShardableNet(), [switch(optimizer, RULES)]), (attach(ShardableNet(), optimizer=optimizer, param_groups=RULES), [])]
    for module, callbacks in runs[: 1 + at_start]:
        with counted_steps() as counts, pytest.raises(ConfigError) as caught:
            trainer(strategy=STRATEGIES[strategy](), devices=2, max_epochs=2, callbacks=callbacks).fit(module, loader())
        assert not counts
        said.append(str(caught.value))
    return said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "fault"),
    [
        ("deepspeed 1", "CpuDeepSpeed makes one flat vector of each group"),
        ("fsdp sharded", "CpuFSDP makes one flat vector of parameters of several groups"),
    ],
)
def test_a_strategy_that_would_break_it_refuses_it(strategy: str, fault: str, pair: Pair) -> None:
    message = (
        f"{fault}, so several optimizers cannot each have their own. Choose one optimizer, or DDP or ModelParallelStrategy (FSDP2)."
    )
    assert pair.run(refused, strategy, FLAT) == [[f"switch.optimizer: {message}", f"optimizer: {message}"]] * 2
    if strategy == "deepspeed 1":
        assert pair.run(refused, strategy, COMBINED) == [[f"switch.optimizer: {message}", f"optimizer: {message}"]] * 2


def test_one_without_state_is_refused_where_it_could_not_be_loaded(pair: Pair) -> None:
    stateless = combined(hidden=partial(SGD, lr=0.1), default=ADAMW)
    assert (
        pair.run(refused, "fsdp2 sharded", stateless, False)
        == [
            [
                "switch.optimizer.optimizers.hidden.momentum: SGD without momentum keeps no state, and Lightning cannot load a "
                "checkpoint of such an optimizer under FSDP. Give it momentum."
            ]
        ]
        * 2
    )


def difference(strategy: str, folder: Path) -> dict[str, torch.Tensor]:
    return train(folder, strategy, optimizer=FLAT).weights


@pytest.mark.slow
def test_shards_end_with_the_weights_of_whole_parameters(pair: Pair, tmp_path: Path) -> None:
    """Not with Muon: where a matrix is cut along its longer side, its iterations in bf16 round sums by parts."""
    (whole, _), (sharded, _) = (pair.run(difference, name, tmp_path / name) for name in ("ddp", "fsdp2 sharded"))
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    assert all(not torch.equal(tensor, weights(ShardableNet())[name]) for name, tensor in whole.items())


# The command line


MYLAB = """
from collections import OrderedDict
from torch import nn
from lightning_adaptive.tasks.digits import DigitsNet

class Perceptron(DigitsNet):
    def __init__(self, width=16, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(OrderedDict(
            flat=nn.Flatten(), first=nn.Linear(64, width), relu=nn.ReLU(), second=nn.Linear(width, width), norm=nn.LayerNorm(width),
            head=nn.Linear(width, 10),
        ))
"""


OWN = ("--trust", "mylab", "task.module._target_=mylab.Perceptron", *SHORT)


@pytest.fixture
def mylab(tmp_path: Path) -> None:
    (tmp_path / "mylab.py").write_text(MYLAB)


@pytest.mark.usefixtures("mylab")
def test_one_value_of_one_optimizer_is_an_override(train: Run) -> None:
    ended = train(*OWN, "optimizer=muon", "param_groups=muon", "switch=none", "optimizer.optimizers.hidden.lr=0.01")
    assert ended.code == 0, ended.err
    told = ended.out + ended.err
    assert "phase 1  AdamW(default)+Muon(hidden) steps 0..3  cosine  lr 3.0e-04/1.0e-02 -> " in told
    rows = [line.split()[:5] for line in told.splitlines() if line.startswith("         ")]
    assert rows == [
        ["group", "tensors", "parameters", "lr", "decay"],
        ["head", "1", "160", "3.0e-04", "0.01"],
        ["no_decay", "5", "74", "3.0e-04", "0"],
        ["hidden", "2", "1,280", "1.0e-02", "0.01"],
    ]


@pytest.mark.usefixtures("mylab")
def test_it_is_chosen_for_a_switch_as_others_are(train: Run, caplog: pytest.LogCaptureFixture) -> None:
    chosen = ("optimizer@switch.optimizer=muon", "param_groups@switch.param_groups=muon", "switch.at=2st")
    ended = train(*OWN, *chosen, "switch.optimizer.optimizers.default.lr=2e-3")
    assert ended.code == 0, ended.err
    assert "-> AdamW(default)+Muon(hidden) lr 2.0e-03/2.0e-02 (own), because at=2st was reached; " in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), f"optimizer: {NAMES}"),
        (
            ("param_groups=muon",),
            "param_groups.head.match: ['head.*', '*.head.*', '*lm_head.*', 'classifier.*', '*.classifier.*', 'fc.*', 'model.fc.*', "
            "'net.fc.*'] matches none of 8 parameters. Nearest: net.3.weight, net.4.weight, net.9.weight.",
        ),
        (
            ("param_groups=muon", "param_groups.head.match=net.9.*"),
            "param_groups.hidden: all 1 parameters that it matches are taken by rules before it: head. Put it first, or leave it "
            "out.",
        ),
        (
            ("param_groups=muon", "optimizer.optimizers.hidden.lrr=0.01"),
            "optimizer.optimizers.hidden.lrr=0.01: there is no key 'lrr' in optimizer.optimizers.hidden. Did you mean 'lr'? "
            "Keys: lr, momentum, nesterov, weight_decay, ns_steps, adjust_lr_fn.",
        ),
    ],
)
def test_a_net_that_does_not_fit_gets_one_line(overrides: tuple[str, ...], message: str, train: Run) -> None:
    ended = train("optimizer=muon", "switch=none", *overrides, *SHORT)
    assert ended.err == f"lightning-adaptive: {message}\n"
    assert ended.code == 2
