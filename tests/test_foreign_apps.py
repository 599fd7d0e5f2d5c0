"""Our groups in somebody else's Hydra application: all that docs/hydra.md shows, and what Hydra makes of our nodes."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

import lightning_adaptive as la
from lightning_adaptive import config
from lightning_adaptive.combined import parts
from lightning_adaptive.errors import ConfigError, ConfigTypeError
from lightning_adaptive.trust import TRUST_VARIABLE
from tests.support import ROOT, Net, counted_steps, loader, trainer
from tests.test_readme import blocks

PAGE = (ROOT / "docs" / "hydra.md").read_text(encoding="utf-8")


# The page


def page_files() -> dict[str, str]:
    """The files that the page shows, by the name in their first line."""
    texts = [text for language in ("python", "yaml") for text in blocks(PAGE, language)]
    return {text.splitlines()[0].removeprefix("# "): text for text in texts}


def page_commands() -> list[str]:
    return [line for block in blocks(PAGE, "bash") for line in block.splitlines()]


QUICK = {
    "python nodes/train.py optimizer=mine switch.at=2ep switch.optimizer.lr=0.03": "SWITCH at step 16 (epoch 2): NAdam ",
    "python template/train.py switch.at=2ep optimizer@switch.optimizer=rmsprop": "SWITCH at step 16 (epoch 2): AdamW ",
}
"""Commands that stand for their kind in the quick tests, with what they say of the switch."""


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a command of the page in a folder with the page's files."""
    for name, text in page_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    words = shlex.split(command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    assert words[0] == "python"
    inherited = {name: value for name, value in os.environ.items() if name != TRUST_VARIABLE}
    return subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "command", [pytest.param(command, marks=() if command in QUICK else pytest.mark.slow) for command in page_commands()]
)
def test_a_command_of_the_page(command: str, tmp_path: Path) -> None:
    ended = run(command, tmp_path)
    assert ended.returncode == 0, ended.stderr
    said = [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith("SWITCH")]
    assert len(said) == (0 if "switch=none" in command else 2 if "switch.then" in command else 1)
    assert "".join(said).startswith(QUICK.get(command, ""))
    if "switch.at=2ep optimizer@switch" in command:
        [shown] = re.findall(r"The second says `(SWITCH .*?); \.\.\.`", PAGE)
        assert said[0].startswith(f"{shown}; ") or said[0].startswith(f"{shown}, ")


def test_every_command_and_every_file_of_the_page_is_run() -> None:
    assert len(page_commands()) == 9
    assert set(QUICK) <= set(page_commands())
    assert all(re.fullmatch(r"(nodes|template)/[\w/]+\.(py|yaml)", name) for name in page_files())
    assert len(page_files()) == 10
    assert PAGE.count("```") == 2 * (len(page_files()) + len(blocks(PAGE, "bash")))


@pytest.mark.slow
def test_without_the_word_code_of_the_folder_is_refused(tmp_path: Path) -> None:
    [command] = [command for command in page_commands() if command.startswith(TRUST_VARIABLE)]
    ended = run(command.partition(" ")[2], tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        "lightning_adaptive.errors.ConfigError: optimizer._target_: 'own' is not an installed package. If it is your own code, "
        "say so outside the config: --trust own, or LIGHTNING_ADAPTIVE_TRUST=own."
    )


# What Hydra's `instantiate` makes of our nodes

Compose = Callable[..., DictConfig]

MINE = "_target_: torch.optim.NAdam\n_partial_: true\nlr: 2.0e-3\nbetas: [0.8, 0.95]\n"
DEFAULTS = "defaults:\n  - optimizer: adamw\n  - scheduler: cosine\n  - param_groups: none\n  - switch: adam_to_sgd\n  - _self_\n"


@pytest.fixture
def composed(tmp_path: Path) -> Compose:
    """Composes an application with our groups and a file of its own; its switch is after an epoch."""
    (tmp_path / "conf" / "optimizer").mkdir(parents=True)
    (tmp_path / "conf" / "app.yaml").write_text(DEFAULTS + 'switch: {at: 1ep}\nhydra: {searchpath: ["lightning_adaptive://"]}\n')
    (tmp_path / "conf" / "optimizer" / "mine.yaml").write_text(MINE)

    def composed(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
            return compose("app", list(overrides))

    return composed


class Own(Net):
    """A module that hands on what it was given."""

    def __init__(self, optimizer: Any, scheduler: Any = None, param_groups: Any = None) -> None:
        super().__init__()
        self.optimizer, self.scheduler, self.param_groups = optimizer, scheduler, param_groups

    def configure_optimizers(self) -> Any:
        return la.configure_optimizers(self, optimizer=self.optimizer, scheduler=self.scheduler, param_groups=self.param_groups)


def fit(model: Net, *callbacks: Callback | None, epochs: int = 2, **options: Any) -> dict[str, int]:
    """Trains eight steps an epoch; answers how many each optimizer class made."""
    with counted_steps() as counts:
        trainer(max_epochs=epochs, callbacks=[one for one in callbacks if one], **options).fit(model, loader())
    return dict(counts)


def built(factory: Any, *names: str) -> Optimizer:
    """For a weight, or for one in a group of each name."""
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "name": name} for name in names]
    optimizer: Optimizer = factory(groups or [nn.Parameter(torch.zeros(2, 2))])
    return optimizer


def kinds(optimizer: Optimizer) -> set[type]:
    """The types of the options that the optimizer keeps."""
    options = [*optimizer.param_groups, *(part.defaults for part in parts(optimizer).values())]
    return {type(value) for group in options for name, value in group.items() if name != "params"}


def test_the_whole_of_an_application_trains_and_switches(composed: Compose) -> None:
    cfg = composed("optimizer@switch.optimizer=rmsprop")
    model = Own(instantiate(cfg.optimizer), instantiate(cfg.scheduler), instantiate(cfg.param_groups))
    assert fit(model, instantiate(cfg.switch)) == {"AdamW": 8, "RMSprop": 8}


def test_nodes_and_objects_train_alike(composed: Compose) -> None:
    cfg = composed("optimizer@switch.optimizer=nadam", "scheduler.warmup=4st")
    models = [
        Own(cfg.optimizer, cfg.scheduler, cfg.param_groups),
        Own(instantiate(cfg.optimizer), instantiate(cfg.scheduler), instantiate(cfg.param_groups)),
        la.attach(Net(), optimizer=cfg.optimizer, scheduler=cfg.scheduler, param_groups=cfg.param_groups),
        la.attach(Net(), optimizer=instantiate(cfg.optimizer), scheduler=instantiate(cfg.scheduler)),
    ]
    for model, switch in zip(models, [config.switch(cfg.switch), *[instantiate(cfg.switch)] * 3], strict=True):
        assert fit(model, switch) == {"AdamW": 8, "NAdam": 8}
    first, *others = [model.state_dict() for model in models]
    assert not torch.equal(first["net.0.weight"], Net().state_dict()["net.0.weight"])
    for other in others:
        for name, tensor in first.items():
            assert torch.equal(tensor, other[name])


def test_a_module_may_use_our_optimizer_files_without_our_function(composed: Compose) -> None:
    class Theirs(Net):
        def configure_optimizers(self) -> Any:
            return self.factory(params=self.parameters())

    cfg = composed("optimizer=radam")
    model = Theirs()
    model.factory = instantiate(cfg.optimizer)
    assert fit(model, instantiate(cfg.switch)) == {"RAdam": 8, "SGD": 8}


# Lists: torch keeps what it is given, and a checkpoint with Hydra's own kind cannot be loaded


@pytest.mark.parametrize("name", sorted({path.stem for path in (ROOT / "conf" / "optimizer").glob("*.yaml")} - {"custom"}))
def test_no_file_of_ours_puts_omegaconf_into_an_optimizer(composed: Compose, name: str) -> None:
    cfg = composed(f"optimizer={name}", f"optimizer@switch.optimizer={name}")
    for factory in (instantiate(cfg.optimizer), instantiate(cfg.switch).chain[0].optimizer):
        assert kinds(built(factory, *(("hidden", "default") if name == "muon" else ()))) <= {
            bool,
            int,
            float,
            str,
            tuple,
            list,
            type(None),
        }


def test_nor_does_a_class_that_custom_names(composed: Compose) -> None:
    chosen = ("optimizer=custom", "optimizer._target_=pytorch_optimizer.Lion", "+optimizer.betas=[0.9,0.98]")
    assert type(built(instantiate(composed(*chosen).optimizer)).param_groups[0]["betas"]) is list


def test_a_file_of_their_own_is_plain_where_we_build_it(composed: Compose) -> None:
    cfg = composed("optimizer=mine", "optimizer@switch.optimizer=mine")
    handed = instantiate(cfg.optimizer)
    assert ListConfig in kinds(built(handed)), "the trouble exists"
    assert ListConfig not in kinds(built(config.optimizer_factory(handed)))
    assert ListConfig not in kinds(built(config.optimizer_factory(cfg.optimizer)))
    assert ListConfig not in kinds(built(instantiate(cfg.switch).chain[0].optimizer))
    assert ListConfig not in kinds(built(config.switch(cfg.switch).chain[0].optimizer))  # type: ignore[union-attr]


def test_a_partial_keeps_hydras_watch_over_its_call(composed: Compose) -> None:
    handed = instantiate(composed("optimizer=mine").optimizer)
    factory = config.optimizer_factory(handed)
    assert isinstance(factory, functools.partial)
    assert factory.func is handed
    plain = functools.partial(torch.optim.Adam, betas=(0.9, 0.95))
    assert config.optimizer_factory(plain) is plain


def test_schedulers_of_torch_get_plain_lists_as_well(composed: Compose) -> None:
    node = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "_partial_": True, "max_lr": [0.1], "total_steps": 10}
    handed = instantiate(OmegaConf.create(node))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1, momentum=0.9)
    with pytest.raises(TypeError):
        handed(optimizer)
    factory = config.scheduler(handed)
    assert callable(factory)
    assert factory(optimizer).total_steps == 10  # type: ignore[call-arg, arg-type, union-attr]


# A run that goes on saves beside what it goes on from.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("first", "then"), [("mine", "sgd"), ("adamw", "mine"), ("radam", "nadam")])
def test_a_checkpoint_of_either_phase_loads_and_goes_on(composed: Compose, first: str, then: str, tmp_path: Path) -> None:
    cfg = composed(f"optimizer={first}", f"optimizer@switch.optimizer={then}")

    def go(**options: Any) -> None:
        saves = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=8)
        model = Own(instantiate(cfg.optimizer), instantiate(cfg.scheduler))
        trainer(max_epochs=3, enable_checkpointing=True, callbacks=[instantiate(cfg.switch), saves]).fit(model, loader(), **options)

    go()
    for step in (8, 16):  # the ends of an epoch before the switch and of one after it
        path = tmp_path / "saved" / f"step={step}.ckpt"
        torch.load(path, weights_only=True)
        go(ckpt_path=path)


# Schedules are dataclasses, which OmegaConf takes apart when they stand in a mapping


@pytest.mark.parametrize("convert", ["none", "partial", "object", "all"])
def test_a_config_may_be_instantiated_as_a_whole(composed: Compose, convert: str) -> None:
    whole = instantiate(composed("scheduler.warmup=1ep", "switch.scheduler.floor=0.1"), _convert_=convert)
    assert config.scheduler(whole["scheduler"]) == la.Cosine(warmup="1ep")
    assert whole["switch"].chain[0].scheduler == la.Cosine(floor=0.1)
    model = Own(whole["optimizer"], whole["scheduler"], whole["param_groups"])
    assert fit(model, whole["switch"]) == {"AdamW": 8, "SGD": 8}


AROUND = "{scheduler: {_target_: lightning_adaptive.Cosine, warmup: 2st}, name: mine}"
AROUND_TORCH = "{scheduler: {_target_: torch.optim.lr_scheduler.MultiStepLR, _partial_: true, milestones: [1, 2]}, interval: epoch}"


@pytest.mark.parametrize("around", [AROUND, AROUND_TORCH], ids=["ours", "torch's"])
@pytest.mark.parametrize("build", [lambda node: node, instantiate], ids=["node", "instantiated"])
def test_lightnings_dictionary_around_a_scheduler(composed: Compose, around: str, build: Callable[[Any], Any]) -> None:
    cfg = composed("~scheduler", f"+scheduler={around}", "~switch.scheduler", f"+switch.scheduler={around}")
    switch = build(cfg.switch)
    assert fit(Own(cfg.optimizer, build(cfg.scheduler)), config.switch(switch)) == {"AdamW": 8, "SGD": 8}


# Several switches, and none


def test_then_is_built_with_its_switch(composed: Compose) -> None:
    cfg = composed("switch@switch.then=adam_to_sgd", "switch.then.at=2ep", "optimizer@switch.then.optimizer=mine")
    switch = instantiate(cfg.switch)
    assert [str(one.at) for one in switch.chain] == ["1ep", "2ep"]
    assert fit(Own(cfg.optimizer), switch, epochs=3) == {"AdamW": 8, "SGD": 8, "NAdam": 8}


@pytest.mark.parametrize("override", ["switch=none", "switch.enabled=false"])
def test_no_switch_is_a_callback_that_does_nothing(composed: Compose, override: str) -> None:
    assert fit(Own(composed().optimizer), instantiate(composed(override).switch)) == {"AdamW": 16}


def test_no_switch_after_the_first(composed: Compose) -> None:
    assert len(instantiate(composed("switch@switch.then=none").switch).chain) == 1


def test_a_switch_among_callbacks_by_name(composed: Compose) -> None:
    cfg = composed("+callbacks={switch: '${switch}', resume: {_target_: lightning_adaptive.ExactResume}}")
    callbacks = [instantiate(node) for node in cfg.callbacks.values() if isinstance(node, DictConfig) and "_target_" in node]
    assert [type(callback) for callback in callbacks] == [la.OptimizerSwitchCallback, la.ExactResume]


# Mistakes, as they are seen on each way


def through_nodes(cfg: DictConfig) -> None:
    fit(Own(cfg.optimizer, cfg.scheduler, cfg.param_groups), config.switch(cfg.switch))


def through_hydra(cfg: DictConfig) -> None:
    try:
        fit(Own(instantiate(cfg.optimizer), instantiate(cfg.scheduler)), instantiate(cfg.switch))
    except InstantiationException as error:
        raise error.__cause__ or error from None


MISTAKES: Mapping[str, tuple[str, str, str]] = {
    "an option that does not exist": (
        "+switch.optimizer.momentun=1",
        "switch.optimizer.momentun: SGD has no option 'momentun'. Did you mean 'momentum'? Options: lr, momentum, dampening, "
        "weight_decay, nesterov, maximize, foreach, differentiable, fused.",
        "switch.optimizer: cannot be built: SGD.__init__() got an unexpected keyword argument 'momentun'",
    ),
    "a learning rate that cannot be meant": (
        "optimizer.lr=-1",
        "optimizer.lr: -1 is no learning rate. It is finite and above zero.",
        "optimizer: cannot be built: Invalid learning rate: -1",
    ),
    "a word for a node": (
        "switch.optimizer=lbfgs",
        "switch.optimizer: 'lbfgs' is a word where a node belongs. To choose a file of the group, write "
        "optimizer@switch.optimizer=lbfgs.",
        "optimizer: 'lbfgs' is not a factory. Pass a class, or partial(...) of one.",
    ),
    "a bare number as moment": (
        "switch.at=5",
        "switch.at: 5 has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training).",
        "at: 5 has no unit. Write 5ep (epochs), 5st (optimizer steps) or 5% (of training).",
    ),
    "a moment after the end": (
        "switch.at=9ep",
        "switch.at: 9ep is step 72, but training ends after 16 steps. Choose an earlier moment.",
        "switch.at: 9ep is step 72, but training ends after 16 steps. Choose an earlier moment.",
    ),
    "a bare number as warm-up": (
        "switch.scheduler.warmup=4",
        "switch.scheduler.warmup: 4 has no unit. Write 4ep (epochs), 4st (optimizer steps) or 4% (of training).",
        "warmup: 4 has no unit. Write 4ep (epochs), 4st (optimizer steps) or 4% (of training).",
    ),
    "a function": (
        "optimizer._target_=torch.optim.Optimizer.state_dict",
        "optimizer._target_: torch.optim.Optimizer.state_dict is not a class of Optimizer, which belongs here.",
        "optimizer: cannot be built: Optimizer.state_dict() got an unexpected keyword argument 'lr'",
    ),
    "a class of another kind": (
        "~optimizer +optimizer={_target_:torch.nn.ParameterList,_partial_:true}",
        "optimizer._target_: torch.nn.ParameterList is not a class of Optimizer, which belongs here.",
        "optimizer: the factory returned a ParameterList, not a torch.optim.Optimizer.",
    ),
    "mappings where factories belong": (
        "+switch._recursive_=false",
        "",
        "optimizer: {'_target_': 'torch.optim.SGD', '_partial_': True, 'lr': 0.1, 'momentum': 0.9, 'dampening': 0.0, 'nesterov': "
        "False, 'weight_decay': 0.0} is not a factory. Pass a class, or partial(...) of one.",
    ),
}


@pytest.mark.parametrize(("override", "nodes", "hydra"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_said_on_both_ways(composed: Compose, override: str, nodes: str, hydra: str) -> None:
    for way, message in ((through_nodes, nodes), (through_hydra, hydra)):
        if not message:
            way(composed(*override.split()))  # our builder reads past what only Hydra's obeys
            continue
        with pytest.raises(ConfigError) as caught:
            way(composed(*override.split()))
        assert str(caught.value) == message


def test_hydra_calls_what_we_refuse(composed: Compose, tmp_path: Path) -> None:
    torch.save([1], tmp_path / "saved.pt")
    node = OmegaConf.create({"_target_": "torch.load", "f": str(tmp_path / "saved.pt"), "weights_only": False})
    assert instantiate(node) == [1]
    with pytest.raises(ConfigTypeError) as caught:
        la.attach(Net(), optimizer=node)
    assert str(caught.value) == "optimizer._target_: torch.load is not a class of Optimizer, which belongs here."
