"""`config`: which nodes become which objects, and which are refused, with the whole message and before anything runs."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from lightning_adaptive import Constant, Cosine, Handover, Inherit, OptimizerSwitchCallback, ParamGroups, config
from lightning_adaptive.errors import ConfigError, ConfigTypeError
from lightning_adaptive.trust import TRUST_VARIABLE

SGD = {"_target_": "torch.optim.SGD", "lr": 0.1}
SWITCH = {"_target_": "lightning_adaptive.OptimizerSwitchCallback", "at": "3ep", "optimizer": SGD}
ADAM_OPTIONS = "lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused, decoupled_weight_decay"


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2))]


def node(**options: Any) -> DictConfig:
    """A node as Hydra hands it over."""
    return OmegaConf.create(options)


def test_an_optimizer_node_becomes_a_factory_with_plain_options() -> None:
    factory = config.optimizer_factory(node(_target_="torch.optim.AdamW", _partial_=True, lr=3e-4, betas=[0.9, 0.95]))
    assert isinstance(factory, functools.partial)
    assert factory.func is torch.optim.AdamW
    assert factory.keywords == {"lr": 3e-4, "betas": [0.9, 0.95]}
    assert type(factory.keywords["betas"]) is list
    assert isinstance(factory(parameters()), torch.optim.AdamW)


def test_omegaconf_inside_a_plain_mapping_becomes_plain_too() -> None:
    factory = config.optimizer_factory({"_target_": "torch.optim.Adam", "betas": OmegaConf.create([0.9, 0.95])})
    assert isinstance(factory, functools.partial)
    assert type(factory.keywords["betas"]) is list


def test_an_interpolation_in_a_node_is_resolved() -> None:
    whole = OmegaConf.create({"base": 0.2, "optimizer": {"_target_": "torch.optim.SGD", "lr": "${base}"}})
    assert config.optimizer_factory(whole.optimizer)(parameters()).param_groups[0]["lr"] == 0.2


def test_callables_pass_unchanged() -> None:
    factory = functools.partial(torch.optim.SGD, lr=0.1)
    assert config.optimizer_factory(factory) is factory
    assert config.optimizer_factory(torch.optim.SGD) is torch.optim.SGD
    schedule = Cosine()
    assert config.scheduler(schedule) is schedule


def test_factories_survive_pickle_and_deepcopy() -> None:
    factory = config.optimizer_factory(node(**SGD))
    for copied in (pickle.loads(pickle.dumps(factory)), copy.deepcopy(factory)):
        assert copied(parameters()).param_groups[0]["lr"] == 0.1


def test_a_schedule_node_becomes_a_schedule() -> None:
    built = config.scheduler(node(_target_="lightning_adaptive.Cosine", warmup="5%", floor=0.1))
    assert built == Cosine(warmup="5%", floor=0.1)


def test_a_torch_scheduler_node_becomes_a_factory() -> None:
    factory = config.scheduler(node(_target_="torch.optim.lr_scheduler.StepLR", step_size=7))
    assert callable(factory)
    built = factory(torch.optim.SGD(parameters(), lr=1.0))  # type: ignore[call-arg, arg-type]
    assert isinstance(built, StepLR)
    assert built.step_size == 7


def test_lightnings_dictionary_around_a_scheduler_keeps_its_other_keys() -> None:
    around = node(scheduler={"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "patience": 3}, monitor="val/loss")
    built = config.scheduler(around)
    assert isinstance(built, dict)
    assert built["monitor"] == "val/loss"
    plateau = built["scheduler"](torch.optim.SGD(parameters(), lr=1.0))
    assert isinstance(plateau, ReduceLROnPlateau)
    assert plateau.patience == 3


@pytest.mark.parametrize("build", [config.scheduler, config.param_groups, config.switch])
@pytest.mark.parametrize("empty", [None, {}, OmegaConf.create({})], ids=["null", "dict", "DictConfig"])
def test_an_empty_slot_means_its_default(build: Callable[[Any], Any], empty: Any) -> None:
    assert build(empty) is None


@pytest.mark.parametrize(
    ("target", "kind"), [("lightning_adaptive.ParamGroups", ParamGroups), ("lightning_adaptive.Inherit", Inherit)]
)
def test_param_group_nodes(target: str, kind: type) -> None:
    assert isinstance(config.param_groups(node(_target_=target)), kind)


def test_a_switch_node_builds_all_its_slots() -> None:
    callback = config.switch(
        node(
            **SWITCH,
            scheduler={"_target_": "lightning_adaptive.Constant", "warmup": "2st"},
            param_groups={"_target_": "lightning_adaptive.ParamGroups"},
            handover={"_target_": "lightning_adaptive.Handover", "lr": "own"},
            gradient_clip_val=0.5,
        )
    )
    assert isinstance(callback, OptimizerSwitchCallback)
    [built] = callback.chain
    assert str(built.at) == "3ep"
    assert isinstance(built.optimizer, functools.partial)
    assert built.optimizer.func is torch.optim.SGD
    assert built.scheduler == Constant(warmup="2st")
    assert isinstance(built.param_groups, ParamGroups)
    assert built.handover == Handover()
    assert built.gradient_clip_val == 0.5


def test_empty_slots_of_a_switch_mean_their_defaults() -> None:
    callback = config.switch(node(**SWITCH, scheduler={}, param_groups={}, handover={}, when=None, then={}))
    assert callback is not None
    [built] = callback.chain
    assert built.scheduler is None
    assert isinstance(built.param_groups, Inherit)
    assert built.handover == Handover()


def test_then_is_the_switch_after_this_one() -> None:
    built = config.switch(node(**SWITCH, then={**SWITCH, "at": "5ep", "optimizer": {"_target_": "torch.optim.LBFGS"}}))
    assert built is not None
    assert [str(switch.at) for switch in built.chain] == ["3ep", "5ep"]


def test_a_disabled_switch_ignores_its_other_keys() -> None:
    built = config.switch(node(_target_=SWITCH["_target_"], enabled=False, at=None, optimizer={"lr": 0.3}))
    assert built is not None
    assert built.chain == ()


def test_callbacks_and_loggers_come_by_name_in_file_order(tmp_path: Path) -> None:
    callbacks = config.callbacks(
        node(
            rate={"_target_": "lightning.pytorch.callbacks.LearningRateMonitor", "logging_interval": "step"},
            left_out=None,
            bar={"_target_": "lightning.pytorch.callbacks.TQDMProgressBar"},
        )
    )
    assert [type(callback).__name__ for callback in callbacks] == ["LearningRateMonitor", "TQDMProgressBar"]
    assert isinstance(callbacks[0], LearningRateMonitor)
    assert callbacks[0].logging_interval == "step"
    [logger] = config.loggers(node(csv={"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}))
    assert isinstance(logger, CSVLogger)
    assert config.callbacks(None) == []


def test_a_switch_may_stand_among_the_callbacks() -> None:
    built, rate = config.callbacks(node(switch=SWITCH, rate={"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}))
    assert isinstance(built, OptimizerSwitchCallback)
    assert str(built.chain[0].at) == "3ep"
    assert isinstance(rate, LearningRateMonitor)
    with pytest.raises(ConfigError, match=r"^callbacks\.switch\.optimizer\.momentun: SGD has no option"):
        config.callbacks(node(switch={**SWITCH, "optimizer": {**SGD, "momentun": 0.9}}))


def test_a_trainer_may_hold_a_node_of_a_strategy() -> None:
    built = config.trainer(
        node(
            _target_="lightning.pytorch.Trainer",
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            strategy={"_target_": "lightning.pytorch.strategies.DDPStrategy", "find_unused_parameters": True},
        )
    )
    assert isinstance(built, Trainer)
    assert isinstance(built.strategy, DDPStrategy)


# What is refused, with the whole message


def optimizer(**options: Any) -> Callable[[], Any]:
    return lambda: config.optimizer_factory(node(**{"_target_": "torch.optim.Adam", **options}))


def schedule(**options: Any) -> Callable[[], Any]:
    return lambda: config.scheduler(node(**{"_target_": "lightning_adaptive.Cosine", **options}))


def switch(**options: Any) -> Callable[[], Any]:
    return lambda: config.switch(node(**{**SWITCH, **options}))


def lightning_trainer(**options: Any) -> Callable[[], Any]:
    return lambda: config.trainer(node(_target_="lightning.pytorch.Trainer", accelerator="cpu", logger=False, **options))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "an option that the class does not have": (
        optimizer(momentun=0.9),
        f"optimizer.momentun: Adam has no option 'momentun'. Options: {ADAM_OPTIONS}.",
    ),
    "its nearest": (
        optimizer(wieght_decay=0.9),
        f"optimizer.wieght_decay: Adam has no option 'wieght_decay'. Did you mean 'weight_decay'? Options: {ADAM_OPTIONS}.",
    ),
    "a class of another kind": (
        optimizer(_target_="torch.nn.Linear"),
        "optimizer._target_: torch.nn.Linear is not a class of Optimizer, which belongs here.",
    ),
    "a function": (
        optimizer(_target_="torch.load"),
        "optimizer._target_: torch.load is not a class of Optimizer, which belongs here.",
    ),
    "an instance": (
        optimizer(_target_="torch.float32"),
        "optimizer._target_: torch.float32 is not a class of Optimizer, which belongs here.",
    ),
    "a scheduler as optimizer": (
        optimizer(_target_="lightning_adaptive.Cosine"),
        "optimizer._target_: lightning_adaptive.Cosine is not a class of Optimizer, which belongs here.",
    ),
    "an optimizer as scheduler": (
        schedule(_target_="torch.optim.SGD"),
        "scheduler._target_: torch.optim.SGD is not a class of Schedule or LRScheduler or ReduceLROnPlateau, which belongs here.",
    ),
    "a misspelt class": (
        optimizer(_target_="torch.optim.Addam"),
        "optimizer._target_: torch.optim has no 'Addam'. Did you mean 'Adam'?",
    ),
    "a misspelt class of ours, which is imported only when asked for": (
        schedule(_target_="lightning_adaptive.Cosin"),
        "scheduler._target_: lightning_adaptive has no 'Cosin'. Did you mean 'Cosine'?",
    ),
    "a missing module": (
        optimizer(_target_="torch.optimm.Adam"),
        "optimizer._target_: there is no module 'torch.optimm'.",
    ),
    "a package that is not installed": (
        optimizer(_target_="no_such_package.Lion"),
        "optimizer._target_: 'no_such_package' is not an installed package. If it is your own code, say so outside the config: "
        "--trust no_such_package, or LIGHTNING_ADAPTIVE_TRUST=no_such_package.",
    ),
    "the standard library": (
        optimizer(_target_="os.system", command="exit"),
        "optimizer._target_: 'os.system' lies in the standard library, which a config may never name.",
    ),
    "builtins": (
        optimizer(_target_="builtins.eval"),
        "optimizer._target_: 'builtins.eval' lies in the standard library, which a config may never name.",
    ),
    "a word without a dot": (
        optimizer(_target_="Adam"),
        "optimizer._target_: 'Adam' is no path of a class. Write package.module.Class, of Optimizer.",
    ),
    "an entry-point path, which would be resolved another way": (
        optimizer(_target_="torch.optim:Adam"),
        "optimizer._target_: 'torch.optim:Adam' is no path of a class. Write package.module.Class, of Optimizer.",
    ),
    "a missing target": (
        lambda: config.optimizer_factory(node(lr=0.1)),
        "optimizer._target_: must be given: the path of a class, package.module.Class, of Optimizer.",
    ),
    "a target that must be given": (
        optimizer(_target_="???"),
        "optimizer._target_: must be given: the path of a class, package.module.Class, of Optimizer.",
    ),
    "an option that must be given": (
        optimizer(lr="???"),
        "optimizer.lr: must be given.",
    ),
    "an option that the class needs": (
        schedule(_target_="torch.optim.lr_scheduler.StepLR"),
        "scheduler.step_size: StepLR needs the option 'step_size'.",
    ),
    "a negative learning rate": (optimizer(lr=-1), "optimizer.lr: -1 is no learning rate. It is finite and above zero."),
    "a learning rate of zero": (optimizer(lr=0.0), "optimizer.lr: 0.0 is no learning rate. It is finite and above zero."),
    "a learning rate that is not a number": (
        optimizer(lr=float("nan")),
        "optimizer.lr: nan is no learning rate. It is finite and above zero.",
    ),
    "an infinite learning rate": (
        optimizer(lr=float("inf")),
        "optimizer.lr: inf is no learning rate. It is finite and above zero.",
    ),
    "a word as learning rate": (optimizer(lr="fast"), "optimizer.lr: 'fast' is not a number. Write one, for example 0.001."),
    "a number with a slip, which YAML reads as a word": (
        optimizer(lr="1e-3x"),
        "optimizer.lr: '1e-3x' is not a number. Write one, for example 0.001.",
    ),
    "an empty learning rate": (optimizer(lr=""), "optimizer.lr: '' is not a number. Write one, for example 0.001."),
    "no learning rate": (optimizer(lr=None), "optimizer.lr: null is not a number. Write one, for example 0.001."),
    "yes as learning rate": (optimizer(lr=True), "optimizer.lr: True is not a number. Write one, for example 0.001."),
    "a word as another number": (optimizer(eps="tiny"), "optimizer.eps: 'tiny' is not a number. Write one, for example 1e-08."),
    "a fraction of an epoch in the Trainer": (
        lightning_trainer(max_epochs=2.5),
        "trainer.max_epochs: 2.5 is not a whole number. Write one, for example 1.",
    ),
    "an empty number of epochs": (
        lightning_trainer(max_epochs=""),
        "trainer.max_epochs: '' is not a whole number. Write one, for example 1.",
    ),
    "a word for a node": (
        lambda: config.optimizer_factory("adam"),  # type: ignore[arg-type]
        "optimizer: 'adam' is a word where a node belongs. To choose a file of the group, write optimizer=adam.",
    ),
    "a number for a node": (
        lambda: config.optimizer_factory(3),  # type: ignore[arg-type]
        "optimizer: 3 stands where a node belongs, a mapping with _target_.",
    ),
    "a list for a node": (
        lambda: config.scheduler(OmegaConf.create([1])),
        "scheduler: [1] stands where a node belongs, a mapping with _target_.",
    ),
    "a node among an optimizer's options": (
        optimizer(foreach={"_target_": "torch.optim.SGD"}),
        "optimizer.foreach: a node is not allowed here; only plain values are.",
    ),
    "a node within a list among an optimizer's options": (
        optimizer(foreach=[True, {"_target_": "os.system"}]),
        "optimizer.foreach.1: a node is not allowed here; only plain values are.",
    ),
    "a node of another kind in the Trainer": (
        lightning_trainer(profiler={"_target_": "torch.optim.SGD"}),
        "trainer.profiler._target_: torch.optim.SGD is not a class of Strategy, which belongs here.",
    ),
    "a bare number as warm-up": (
        schedule(warmup=3),
        "scheduler.warmup: 3 has no unit. Write 3ep (epochs), 3st (optimizer steps) or 3% (of training).",
    ),
    "a bare number as moment": (
        switch(at=5),
        "switch.at: 5 has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training).",
    ),
    "a bare number in quotes as moment": (
        switch(at="5"),
        "switch.at: '5' has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training).",
    ),
    "no moment": (
        switch(at=None),
        "switch.at: a switch needs its moment: 5ep (epochs), 5st (optimizer steps) or 5% (of training); or a trigger (when).",
    ),
    "no optimizer": (
        switch(optimizer=None),
        "switch.optimizer: a switch needs its next optimizer. Choose one with optimizer@switch.optimizer=sgd, "
        "or no switch with switch=none.",
    ),
    "a word for the next optimizer": (
        switch(optimizer="lbfgs"),
        "switch.optimizer: 'lbfgs' is a word where a node belongs. To choose a file of the group, "
        "write optimizer@switch.optimizer=lbfgs.",
    ),
    "a word for the switch after it": (
        switch(then="adam_to_sgd"),
        "switch.then: 'adam_to_sgd' is a word where a node belongs. To choose a file of the group, "
        "write switch@switch.then=adam_to_sgd.",
    ),
    "a slip in a later phase": (
        switch(then={**SWITCH, "at": "5ep", "optimizer": {**SGD, "momentun": 0.9}}),
        "switch.then.optimizer.momentun: SGD has no option 'momentun'. Did you mean 'momentum'? Options: lr, momentum, dampening, "
        "weight_decay, nesterov, maximize, foreach, differentiable, fused.",
    ),
    "an option that a switch does not have": (
        switch(att="3ep"),
        "switch.att: OptimizerSwitchCallback has no option 'att'. Did you mean 'at'? Options: at, optimizer, when, scheduler, "
        "param_groups, handover, then, gradient_clip_val, optimizer_index, on_resume, dry_run, enabled.",
    ),
    "an interpolation that leads nowhere": (
        lambda: config.optimizer_factory(OmegaConf.create({"optimizer": {**SGD, "lr": "${nowhere}"}}).optimizer),
        "optimizer.lr: Interpolation key 'nowhere' not found",
    ),
    "a number for a callback": (
        lambda: config.callbacks(node(checkpoint=3)),
        "callbacks.checkpoint: 3 stands where a node belongs, a mapping with _target_.",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_with_the_whole_message(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["a class of another kind", "a word as learning rate", "a word for a node"])
def test_a_wrong_kind_of_value_is_a_type_error(name: str) -> None:
    with pytest.raises(ConfigTypeError):
        REFUSED[name][0]()


def test_what_a_class_says_it_takes_is_not_second_guessed() -> None:
    # No annotation, a default of the other kind of number, and a catch-all: all of these exist in published optimizers.
    config.optimizer_factory(node(_target_="torch.optim.Adam", weight_decay=0.1))  # its default is the integer 0
    config.optimizer_factory(node(_target_="torch.optim.LBFGS", max_eval=None, line_search_fn="strong_wolfe"))
    config.trainer(node(_target_="lightning.pytorch.Trainer", accelerator="cpu", devices="1", val_check_interval=0.5, logger=False))


def test_an_import_that_fails_within_a_trusted_module_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import absent_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv(TRUST_VARIABLE, "needs_more")
    with pytest.raises(ConfigError) as caught:
        config.optimizer_factory(node(_target_="needs_more.Opt"))
    assert str(caught.value) == ("optimizer._target_: importing needs_more.Opt failed: No module named 'absent_dependency'.")


# Hydra's own `instantiate` builds our nodes in somebody else's application


def test_hydras_instantiate_builds_our_switch_in_a_foreign_application(tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("defaults:\n  - optimizer: adamw\n  - switch: adam_to_sgd\n  - _self_\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        composed = compose(
            "app",
            [
                "hydra.searchpath=[lightning_adaptive://]",
                "switch.at=3ep",
                "switch.optimizer.lr=0.03",
                "scheduler@switch.scheduler=step",
            ],
        )
    first = instantiate(composed.optimizer)
    assert isinstance(first(parameters()), torch.optim.AdamW)
    callback = instantiate(composed.switch)
    assert isinstance(callback, OptimizerSwitchCallback)
    [switch] = callback.chain
    assert str(switch.at) == "3ep"
    built = switch.optimizer(parameters())
    assert isinstance(built, torch.optim.SGD)
    assert built.param_groups[0]["lr"] == 0.03
    assert type(switch.scheduler).__name__ == "StepDecay"
    assert isinstance(switch.param_groups, Inherit)


def test_our_builder_and_hydras_agree(tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("defaults:\n  - switch: adam_to_sgd\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        composed = compose("app", ["hydra.searchpath=[lightning_adaptive://]"])
    callback = config.switch(composed.switch)
    assert callback is not None
    [ours], [theirs] = callback.chain, instantiate(composed.switch).chain
    for name in ("at", "scheduler", "handover", "gradient_clip_val"):
        assert getattr(ours, name) == getattr(theirs, name)
    built, built_by_hydra = ours.optimizer(parameters()), theirs.optimizer(parameters())
    assert {**built.param_groups[0], "params": ()} == {**built_by_hydra.param_groups[0], "params": ()}
