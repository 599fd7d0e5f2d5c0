"""Everything as nodes of LightningCLI: what they train, what they refuse, what they save, and how they resume."""

from __future__ import annotations

import copy
import inspect
import logging
import os
import pickle
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.cli import LightningCLI
from torch.optim import SGD, Adagrad, Adam
from torch.optim.lr_scheduler import ExponentialLR, StepLR
from torch.utils.data import DataLoader

import lightning_adaptive as la
from lightning_adaptive import CheckpointError, ConfigError, OptimizerSwitchCallback
from tests.support import QUIET, ROOT, Net, ValidatedNet, counted_steps, digest, digest_of, loader, trainer
from tests.test_readme import blocks

PAGE = (ROOT / "docs" / "lightning_cli.md").read_text(encoding="utf-8")
SWITCH = "lightning_adaptive.OptimizerSwitchCallback"
EPOCHS, STEPS_PER_EPOCH = 4, 8


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return loader(shuffle=True)


class ValidatedData(Data):
    def val_dataloader(self) -> DataLoader:
        return loader(16)


class NetWithoutOptimizer(Net):
    configure_optimizers = LightningModule.configure_optimizers


class QuickCLI(LightningCLI):
    """LightningCLI with the subcommands that are used here, since building a parser for each takes its time."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}


class KeyedCLI(QuickCLI):
    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_lightning_class_args(OptimizerSwitchCallback, "switch")


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for what is saved, no command line of pytest, and no seed that outlives the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls what jsonargparse 4.53 would replace


def cli(
    *words: str,
    model: type[LightningModule] = Net,
    data: type[Data] = Data,
    kind: type[LightningCLI] = QuickCLI,
    run: bool = True,
) -> LightningCLI:
    """What ``python main.py WORDS`` does."""
    return kind(
        model,
        data,
        args=list(words),
        run=run,
        seed_everything_default=1,
        trainer_defaults={**QUIET, "max_epochs": EPOCHS},
        save_config_kwargs={"overwrite": True},
    )


def node(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}


def write(*callbacks: dict[str, Any], name: str = "run.yaml", **trainer_options: Any) -> str:
    """A YAML with these callbacks; returns the option that reads it."""
    Path(name).write_text(yaml.safe_dump({"trainer": {"callbacks": list(callbacks), **trainer_options}}), encoding="utf-8")
    return f"--config={name}"


SGD_NODE = node("torch.optim.SGD", lr=0.1, momentum=0.9)


def switch_node(**init_args: Any) -> dict[str, Any]:
    return node(SWITCH, **{"at": "2ep", "optimizer": SGD_NODE, **init_args})


def to_sgd(**options: Any) -> OptimizerSwitchCallback:
    return OptimizerSwitchCallback(**{"at": "2ep", "optimizer": partial(SGD, lr=0.1, momentum=0.9), **options})


def found_switch(built: LightningCLI) -> OptimizerSwitchCallback:
    [found] = [callback for callback in built.trainer.callbacks if isinstance(callback, OptimizerSwitchCallback)]
    return found


def trained_in_python(*callbacks: Callback, model: type[LightningModule] = Net) -> str:
    """The weights of the same training without LightningCLI."""
    seed_everything(1, workers=True, verbose=False)
    net = model()
    trainer(max_epochs=EPOCHS, callbacks=list(callbacks)).fit(net, Data())
    return digest(net)


# What nodes train

COSINE = node("lightning_adaptive.Cosine", warmup="3st", floor=0.1)
DECAYING_NODE = node("torch.optim.SGD", lr=0.1, weight_decay=0.5)
BIASES = {"ndim": "<2", "weight_decay": 0.0}
NODES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "optimizer": ({}, {}),
    "optimizer by path": ({"optimizer": "torch.optim.Adagrad"}, {"optimizer": Adagrad}),
    "optimizer by name": ({"optimizer": "Adagrad"}, {"optimizer": Adagrad}),
    "moment in percent": ({"at": "75%"}, {"at": "75%"}),
    "constant": ({"scheduler": node("lightning_adaptive.Constant", warmup="25%")}, {"scheduler": la.Constant(warmup="25%")}),
    "cosine": ({"scheduler": COSINE}, {"scheduler": la.Cosine(warmup="3st", floor=0.1)}),
    "cosine by path": ({"scheduler": "lightning_adaptive.Cosine"}, {"scheduler": la.Cosine()}),
    "step decay": (
        {"scheduler": node("lightning_adaptive.StepDecay", every="1ep", gamma=0.5, length="12 steps")},
        {"scheduler": la.StepDecay(every="1ep", gamma=0.5, length="12st")},
    ),
    "factory of torch": (
        {"scheduler": node("torch.optim.lr_scheduler.StepLR", step_size=1, gamma=0.5)},
        {"scheduler": partial(StepLR, step_size=1, gamma=0.5)},
    ),
    "dictionary around torch": (
        {"scheduler": {"scheduler": node("torch.optim.lr_scheduler.StepLR", step_size=3), "interval": "step"}},
        {"scheduler": {"scheduler": partial(StepLR, step_size=3), "interval": "step"}},
    ),
    "dictionary around ours": (
        {"scheduler": {"scheduler": COSINE, "name": "x"}},
        {"scheduler": la.Cosine(warmup="3st", floor=0.1)},
    ),
    "groups and handover": (
        {"param_groups": {"class_path": "lightning_adaptive.ParamGroups"}, "handover": {"lr": "own"}},
        {"param_groups": la.ParamGroups(), "handover": la.Handover()},
    ),
    "groups and handover by path": (
        {"param_groups": "lightning_adaptive.Inherit", "handover": node("lightning_adaptive.Handover", momentum="zero")},
        {"param_groups": la.Inherit(), "handover": la.Handover()},
    ),
    "rules of groups": (
        {
            "optimizer": DECAYING_NODE,
            "param_groups": {"class_path": "lightning_adaptive.ParamGroups", "dict_kwargs": {"biases": BIASES}},
        },
        {"optimizer": partial(SGD, lr=0.1, weight_decay=0.5), "param_groups": la.ParamGroups(biases=BIASES)},
    ),
    "clipping": ({"gradient_clip_val": 0.01}, {"gradient_clip_val": 0.01}),
    "switch after it": (
        {"then": switch_node(at="3ep", optimizer="torch.optim.Adam", scheduler=COSINE)},
        {"then": to_sgd(at="3ep", optimizer=Adam, scheduler=la.Cosine(warmup="3st", floor=0.1))},
    ),
    "switch after it, without class_path": (
        {"then": {"at": "3ep", "optimizer": "torch.optim.Adam"}},
        {"then": to_sgd(at="3ep", optimizer=Adam)},
    ),
}


QUICK = {"factory of torch", "dictionary around torch", "rules of groups", "switch after it", "moment", "schedule"}
"""Cases that stand for their kind in the quick tests."""


def cases(table: Mapping[str, tuple[Any, Any]]) -> list[Any]:
    return [pytest.param(*case, marks=() if name in QUICK else pytest.mark.slow, id=name) for name, case in table.items()]


@pytest.mark.parametrize(("nodes", "options"), cases(NODES))
def test_a_node_trains_as_the_object_does_and_so_does_the_saved_config(nodes: dict[str, Any], options: dict[str, Any]) -> None:
    expected = trained_in_python(to_sgd(**options))
    assert digest(cli("fit", write(switch_node(**nodes))).model) == expected
    assert digest(cli("fit", "--config=config.yaml").model) == expected


def test_a_switch_that_is_not_enabled_does_nothing() -> None:
    assert digest(cli("fit", write(node(SWITCH, enabled=False))).model) == trained_in_python()


def test_a_dictionary_around_a_schedule_is_written_without_a_complaint() -> None:
    config = write(switch_node(scheduler={"scheduler": COSINE, "interval": "step"}))
    with warnings.catch_warnings(record=True) as said:  # as an error the warning would be caught, and not be seen
        warnings.simplefilter("always")
        cli(config, run=False)
    assert [warning for warning in said if "Unable to serialize" in str(warning.message)] == []


def test_what_print_config_prints_trains_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "fit",
        write(switch_node(scheduler=COSINE, then=switch_node(at="3ep", optimizer="Adagrad"))),
        "--trainer.callbacks.at=9st",
    )
    with pytest.raises(SystemExit) as ended:
        cli(*words, "--print_config")
    assert ended.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    built = cli("fit", "--config=printed.yaml")
    assert digest(built.model) == digest(cli(*words).model)
    assert repr(found_switch(built)) == "OptimizerSwitchCallback(at=9st; at=3ep)"


# The command line

CALLBACK = "--trainer.callbacks"
ALONE = (f"{CALLBACK}+={SWITCH}", f"{CALLBACK}.at=2ep", f"{CALLBACK}.optimizer=SGD", f"{CALLBACK}.optimizer.lr=0.1")
LINES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "optimizer": ((f"{CALLBACK}.optimizer.momentum=0.9",), {}),
    "moment": ((f"{CALLBACK}.optimizer.momentum=0.9", f"{CALLBACK}.at=3ep"), {"at": "3ep"}),
    # Another class keeps the options that it has as well: here the learning rate.
    "another optimizer": ((f"{CALLBACK}.optimizer=Adagrad",), {"optimizer": partial(Adagrad, lr=0.1)}),
    "schedule": (
        (f"{CALLBACK}.optimizer=Adagrad", f"{CALLBACK}.scheduler=Cosine", f"{CALLBACK}.scheduler.warmup=10%"),
        {"optimizer": partial(Adagrad, lr=0.1), "scheduler": la.Cosine(warmup="10%")},
    ),
    "schedule of torch": (
        (f"{CALLBACK}.optimizer=Adagrad", f"{CALLBACK}.scheduler=StepLR", f"{CALLBACK}.scheduler.step_size=1"),
        {"optimizer": partial(Adagrad, lr=0.1), "scheduler": partial(StepLR, step_size=1)},
    ),
    "switch after it": (
        (
            f"{CALLBACK}.optimizer.momentum=0.9",
            f"{CALLBACK}.then={SWITCH}",
            f"{CALLBACK}.then.at=3ep",
            f"{CALLBACK}.then.optimizer=Adam",
            f"{CALLBACK}.then.optimizer.lr=0.02",
            f"{CALLBACK}.then.scheduler=lightning_adaptive.StepDecay",
            f"{CALLBACK}.then.scheduler.every=2st",
        ),
        {"then": to_sgd(at="3ep", optimizer=partial(Adam, lr=0.02), scheduler=la.StepDecay(every="2st"))},
    ),
}


@pytest.mark.parametrize(("words", "options"), cases(LINES))
def test_the_command_line_alone(words: tuple[str, ...], options: dict[str, Any]) -> None:
    assert digest(cli("fit", *ALONE, *words).model) == trained_in_python(to_sgd(**options))


def test_the_command_line_stands_over_the_yaml_and_reaches_the_last_callback() -> None:
    config = write(node("lightning_adaptive.ExactResume"), switch_node(scheduler=COSINE))
    words = (f"{CALLBACK}.at=75%", f"{CALLBACK}.optimizer.lr=0.3", f"{CALLBACK}.scheduler.warmup=1ep")
    switch = found_switch(cli(config, *words, run=False))
    [switch] = switch.chain
    assert (str(switch.at), switch.scheduler) == ("75%", la.Cosine(warmup="1ep", floor=0.1))
    assert switch.optimizer([torch.zeros(1)]).defaults == {**SGD([torch.zeros(1)], momentum=0.9).defaults, "lr": 0.3}


def test_a_key_of_its_own() -> None:
    Path("keyed.yaml").write_text(yaml.safe_dump({"switch": {"at": "2ep", "optimizer": SGD_NODE, "scheduler": COSINE}}))
    built = cli("fit", "--config=keyed.yaml", "--switch.at=3ep", "--switch.scheduler.floor=0.5", kind=KeyedCLI)
    assert digest(built.model) == trained_in_python(to_sgd(at="3ep", scheduler=la.Cosine(warmup="3st", floor=0.5)))
    assert digest(cli("fit", "--config=config.yaml", kind=KeyedCLI).model) == digest(built.model)
    assert digest(cli("fit", "--switch.enabled=false", kind=KeyedCLI).model) == trained_in_python()


def test_a_built_switch_can_be_copied_and_sent_to_another_process() -> None:
    built = cli(*ALONE, f"{CALLBACK}.scheduler=StepLR", f"{CALLBACK}.scheduler.step_size=1", run=False)
    for same in (copy.deepcopy(found_switch(built)), pickle.loads(pickle.dumps(found_switch(built)))):
        assert trained_in_python(same) == trained_in_python(found_switch(built))


# Help


def squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)  # argparse breaks lines at hyphens as well


def described(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each argument of the class."""
    texts: dict[str, str] = {}
    for base in cls.__mro__:
        if base.__module__.startswith("lightning_adaptive"):
            for argument in docstring_parser.parse(base.__doc__ or "").params:
                texts.setdefault(argument.arg_name, argument.description or "")
    assert set(texts) == set(inspect.signature(cls).parameters)
    return texts


def untold(cls: type, *words: str, capsys: pytest.CaptureFixture[str], **options: Any) -> list[str]:
    """The arguments of a class whose text a help does not show."""
    with pytest.raises(SystemExit) as ended:
        cli("fit", *words, **options)
    assert ended.value.code == 0
    shown = squeezed(capsys.readouterr().out)
    return [name for name, text in described(cls).items() if not text or squeezed(text) not in shown]


@pytest.mark.parametrize("name", ["OptimizerSwitchCallback", "ExactResume"])
def test_the_help_of_a_callback_is_its_docstring(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert untold(getattr(la, name), f"{CALLBACK}.help=lightning_adaptive.{name}", capsys=capsys) == []


def test_the_help_of_a_key_of_its_own_is_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    assert untold(OptimizerSwitchCallback, "--help", capsys=capsys, kind=KeyedCLI) == []


@pytest.mark.parametrize("name", ["Constant", "Cosine", "StepDecay"])
def test_the_help_of_a_schedule_is_its_docstring_and_that_of_its_bases(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    word = f"--switch.scheduler.help=lightning_adaptive.{name}"
    assert untold(getattr(la, name), word, capsys=capsys, kind=KeyedCLI) == []


# Every schedule

NEEDED = {
    "Plateau": {"monitor": "val/loss"},
    "MultiStep": {"milestones": ["50%", "20st"]},
    "Piecewise": {"pieces": {"high": node("lightning_adaptive.Constant", length="2st"), "low": COSINE}},
    "PerOption": {
        "options": {"lr": "lightning_adaptive.Cosine", "weight_decay": node("lightning_adaptive.Constant", warmup="1ep")}
    },
}
"""What the schedules need that have options without a default."""

SCHEDULES = [
    name
    for name in la.__all__
    if inspect.isclass(cls := getattr(la, name)) and issubclass(cls, la.Schedule) and not inspect.isabstract(cls)
]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_read_and_written(name: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--schedule", type=la.Schedule)
    read = parser.parse_object({"schedule": node(f"lightning_adaptive.{name}", **NEEDED.get(name, {}))})
    built = parser.instantiate(read).schedule
    assert type(built) is getattr(la, name)
    assert parser.instantiate(parser.parse_string(parser.dump(read))).schedule == built
    with pytest.raises(ArgumentError, match="Option 'colour' is not accepted"):
        parser.parse_object({"schedule": node(f"lightning_adaptive.{name}", **NEEDED.get(name, {}), colour="red")})


# Mistakes


def refused(capsys: pytest.CaptureFixture[str], *words: str, **options: Any) -> list[str]:
    """The lines of a usage error."""
    with pytest.raises(SystemExit) as ended:
        cli(*words, **options)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return [line.strip() for line in said.splitlines()]


FACTORY = (
    "- Type collections.abc.Callable[[torch.optim.optimizer.Optimizer], torch.optim.lr_scheduler.LRScheduler | "
    "torch.optim.lr_scheduler.ReduceLROnPlateau] expects a function or a callable class: "
)
OPTIMIZER_FACTORY = (
    "- Type collections.abc.Callable[[collections.abc.Iterable], torch.optim.optimizer.Optimizer] expects a function or a callable "
    "class: "
)
WRONG_NODES: dict[str, tuple[dict[str, Any], str]] = {
    # Within a union jsonargparse strikes the value itself out of every message.
    "bare number": (
        {"at": 30},
        "- Not of type Duration: has no unit. Write 30ep (epochs), 30st (optimizer steps) or 30% (of training).",
    ),
    "bare number as text": (
        {"at": "30"},
        "- Not of type Duration: '30' has no unit. Write 30ep (epochs), 30st (optimizer steps) or 30% (of training).",
    ),
    "unknown unit": (
        {"at": "30min"},
        "- Not of type Duration: '30min' has the unknown unit 'min'. Units are ep (epochs), st (steps) and %.",
    ),
    "a moment that is a word": (
        {"at": "soon"},
        "- Not of type Duration: 'soon' is not a duration. Write a number and its unit: 5ep (epochs), 5st (optimizer steps) or 5%.",
    ),
    "part of a step": ({"at": "1.5st"}, "- Not of type Duration: '1.5st' is not a whole number of steps."),
    "bare number in a schedule": (
        {"scheduler": node("lightning_adaptive.Cosine", warmup=3)},
        "Not of type Warmup: 3 has no unit. Write 3ep (epochs), 3st (optimizer steps) or 3% (of training).",
    ),
    "bare number in a dictionary around a schedule": (
        {"scheduler": {"scheduler": node("lightning_adaptive.StepDecay", every="30")}},
        "Not of type Duration: '30' has no unit. Write 30ep (epochs), 30st (optimizer steps) or 30% (of training).",
    ),
    "bare number in the switch after it": (
        {"then": switch_node(at="3")},
        "- Not of type Duration: '3' has no unit. Write 3ep (epochs), 3st (optimizer steps) or 3% (of training).",
    ),
    "option of the callback": ({"att": "3ep"}, "Option 'att' is not accepted"),
    "option of the schedule": ({"scheduler": node("lightning_adaptive.Cosine", warmpu="3ep")}, "Option 'warmpu' is not accepted"),
    "option of the groups": ({"param_groups": node("lightning_adaptive.Inherit", rule=1)}, "Option 'rule' is not accepted"),
    "option of the optimizer": (
        {"optimizer": node("torch.optim.SGD", lrr=0.1)},
        f"{OPTIMIZER_FACTORY}Option 'lrr' is not accepted. Got value: Namespace(class_path='torch.optim.SGD', "
        "init_args=Namespace(lrr=0.1))",
    ),
    "value of the optimizer": ({"optimizer": node("torch.optim.SGD", lr="fast")}, "- Expected a <class 'float'>"),
    "option of a scheduler of torch": (
        {"scheduler": node("torch.optim.lr_scheduler.StepLR", stepsize=1)},
        f"{FACTORY}Option 'stepsize' is not accepted. Got value: Namespace(class_path='torch.optim.lr_scheduler.StepLR', "
        "init_args=Namespace(stepsize=1))",
    ),
    "key of the dictionary": (
        {"scheduler": {"scheduler": COSINE, "intervall": "step"}},
        "- Unexpected keys: {'intervall'}",
    ),
    "policy": ({"on_resume": "erorr"}, "Expected a typing.Literal['error', 'config', 'checkpoint']. Got value: erorr"),
    "rule of the handover": (
        {"handover": {"lr": "ovn"}},
        "Expected a typing.Literal['own', 'keep', 'match_norm', 'match_orthogonal', 'match_projection']. Got value: ovn",
    ),
    "clipping": ({"gradient_clip_val": "none"}, "- Expected a <class 'float'>"),
    "index": ({"optimizer_index": "first"}, "Expected a <class 'int'>. Got value: first"),
    "truth": ({"enabled": "perhaps"}, "Expected a <class 'bool'>. Got value: perhaps"),
}


@pytest.mark.parametrize(("nodes", "line"), WRONG_NODES.values(), ids=WRONG_NODES)
def test_a_mistake_in_a_node_is_an_error_of_usage(nodes: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in refused(capsys, "fit", write(switch_node(**nodes)))


WRONG_WORDS: dict[str, tuple[str, str]] = {
    "moment": (
        "--switch.at=30",
        "- Not of type Duration: '30' has no unit. Write 30ep (epochs), 30st (optimizer steps) or 30% (of training).",
    ),
    "schedule": (
        "--switch.scheduler.warmup=3",
        "Not of type Warmup: '3' has no unit. Write 3ep (epochs), 3st (optimizer steps) or 3% (of training).",
    ),
    "option of the schedule": ("--switch.scheduler.warmpu=3ep", "Option 'warmpu' is not accepted"),
    "policy": ("--switch.on_resume=erorr", "Expected a typing.Literal['error', 'config', 'checkpoint']. Got value: erorr"),
}


@pytest.mark.parametrize(("word", "line"), WRONG_WORDS.values(), ids=WRONG_WORDS)
def test_a_mistake_on_the_command_line_is_an_error_of_usage(word: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    keyed = ("--switch.at=2ep", "--switch.optimizer=SGD", "--switch.scheduler=lightning_adaptive.Cosine")
    assert line in refused(capsys, "fit", *keyed, word, kind=KeyedCLI)
    assert line in refused(capsys, "fit", write(switch_node(scheduler=COSINE)), word.replace("--switch", CALLBACK))


def test_a_misspelt_option_of_the_callback_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "error: unrecognized arguments: --switch.att=3ep" in refused(capsys, "fit", "--switch.att=3ep", kind=KeyedCLI)
    assert "Option 'att' is not accepted" in refused(capsys, "fit", write(switch_node()), f"{CALLBACK}.att=3ep")


EXACT = {"class_path": "lightning_adaptive.ExactResume"}
NOT_TAKEN: dict[str, tuple[list[dict[str, Any]], tuple[str, ...], str]] = {
    "option of a callback that is not the last": ([switch_node(), EXACT], (f"{CALLBACK}.at=3ep",), "Option 'at' is not accepted"),
    "option within a dictionary around a schedule": (
        [switch_node()],
        (f"{CALLBACK}.scheduler.scheduler=StepLR", f"{CALLBACK}.scheduler.scheduler.step_size=1"),
        "Given value: NestedArg(key='scheduler.scheduler.step_size', val='1')",
    ),
    "node of Hydra": (
        [switch_node(optimizer={"_target_": "torch.optim.SGD"})],
        (),
        f"{OPTIMIZER_FACTORY}Option '_target_' is not accepted. Got value: Namespace(class_path='torch.optim.Optimizer', "
        "init_args=Namespace(_target_='torch.optim.SGD'))",
    ),
}


@pytest.mark.parametrize(("callbacks", "words", "line"), NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_what_lightning_cli_does_not_take(
    callbacks: list[dict[str, Any]], words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert line in refused(capsys, "fit", write(*callbacks), *words)


def test_what_only_a_constructor_sees_is_said_by_its_exception() -> None:
    with pytest.raises(ConfigError, match=r"^gradient_clip_val: -1.0 is below zero.$"):
        cli("fit", "--switch.at=2ep", "--switch.optimizer=SGD", "--switch.gradient_clip_val=-1", kind=KeyedCLI)
    with pytest.raises(ValueError, match="Union subtypes") as raised:  # LightningCLI tries the other kinds of callbacks as well
        cli("fit", write(switch_node(gradient_clip_val=-1)))
    assert "  - gradient_clip_val: -1.0 is below zero." in str(raised.value).splitlines()


def test_what_only_the_start_of_training_sees_is_said_by_its_exception() -> None:
    message = "switch.at: 9ep is step 72, but training ends after 32 steps. Choose an earlier moment."
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        cli("fit", write(switch_node(at="9ep")))


ORDERS = [
    "import lightning_adaptive, jsonargparse",
    "import lightning_adaptive.schedules, jsonargparse",
    "from lightning_adaptive import Cosine; import jsonargparse",
    "import jsonargparse, lightning_adaptive",
]


@pytest.mark.parametrize("imports", ORDERS)
def test_durations_are_read_in_whatever_order_things_are_imported(imports: str) -> None:
    lines = [
        imports,
        "from lightning_adaptive.curves import Cosine",
        "from lightning_adaptive.schedules import Schedule",
        "parser = jsonargparse.ArgumentParser()",
        "parser.add_argument('--schedule', type=Schedule)",
        "words = ['--schedule=lightning_adaptive.curves.Cosine', '--schedule.warmup=3ep']",
        "print(parser.instantiate(parser.parse_args(words)).schedule)",
        "parser.parse_args([*words, '--schedule.warmup=3'])",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (2, "cosine, warmup 3ep\n"), ended.stderr
    message = "Not of type Warmup: '3' has no unit. Write 3ep (epochs), 3st (optimizer steps) or 3% (of training)."
    assert message in [line.strip() for line in ended.stderr.splitlines()]


# The first optimizer from the command line, which is the same object at every call of `configure_optimizers`

FIRST = ("--optimizer=Adam", "--optimizer.lr=0.02")


def test_a_first_optimizer_from_the_command_line(caplog: pytest.LogCaptureFixture) -> None:
    with counted_steps() as counts, caplog.at_level(logging.INFO):
        built = cli("fit", write(switch_node(scheduler=COSINE)), *FIRST, model=NetWithoutOptimizer)
    assert built.model.configure_optimizers() is built.model.configure_optimizers()
    assert counts == {"Adam": 16, "SGD": 16}
    assert type(built.trainer.optimizers[0]) is SGD
    [line] = [record.message for record in caplog.records if record.message.startswith("SWITCH")]
    assert line == (
        "SWITCH at step 16 (epoch 2): Adam lr 2.0e-02 -> SGD lr 3.3e-02 (own), because at=2ep was reached; "
        "cosine, warmup 3st, floor 0.1, momentum zero, still held elsewhere 5.4 KB"
    )
    expected = trained_in_python(to_sgd(scheduler=la.Cosine(warmup="3st", floor=0.1)), model=partial(Net, lr=0.02))
    assert digest(built.model) == expected


def test_a_first_schedule_from_the_command_line_ends_at_the_switch() -> None:
    words = ("--lr_scheduler=ExponentialLR", "--lr_scheduler.gamma=0.5")
    built = cli("fit", write(switch_node()), *FIRST, *words, model=NetWithoutOptimizer)
    assert built.trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    assert built.model.configure_optimizers()[0][0].param_groups[0]["lr"] == 0.02 * 0.5**2

    class Decaying(Net):
        def configure_optimizers(self) -> Any:
            optimizer = Adam(self.parameters(), lr=0.02)
            return [optimizer], [ExponentialLR(optimizer, gamma=0.5)]

    assert digest(built.model) == trained_in_python(to_sgd(), model=Decaying)


def test_a_second_fit_goes_on_with_the_second_optimizer() -> None:
    built = cli("fit", write(switch_node()), *FIRST, model=NetWithoutOptimizer)
    built.trainer.fit_loop.max_epochs = EPOCHS + 1
    with counted_steps() as counts:
        built.trainer.fit(built.model, built.datamodule)
    assert counts == {"SGD": STEPS_PER_EPOCH}


# Resume


def resumable(*words: str, **options: Any) -> LightningCLI:
    """A run of two switches with a checkpoint at every fourth step, whose saved ``config.yaml`` lies in the folder."""
    saving = node("lightning.pytorch.callbacks.ModelCheckpoint", dirpath="saved", save_top_k=-1, every_n_train_steps=4)
    saving["init_args"]["filename"] = "{step}"
    switch = switch_node(scheduler=COSINE, then=switch_node(at="3ep", optimizer=node("torch.optim.RMSprop", lr=0.001)))
    config = write({"class_path": "lightning_adaptive.ExactResume"}, saving, switch, enable_checkpointing=True)
    return cli("fit", config, *words, **options)


again = pytest.mark.filterwarnings("ignore:Checkpoint directory .*saved exists and is not empty")  # the same config runs twice


@again
@pytest.mark.parametrize(
    ("model", "words", "steps"),
    [
        pytest.param(Net, (), (12, 16, 20, 28), id="module"),  # before the first switch, at it, after it, after the second one
        pytest.param(NetWithoutOptimizer, FIRST, (12, 20), id="command line"),
    ],
)
def test_a_resumed_run_is_in_its_phase_and_ends_as_the_other_did(
    model: type[LightningModule], words: tuple[str, ...], steps: tuple[int, ...]
) -> None:
    expected = digest(resumable(*words, model=model).model)
    classes = ["Adam"] * 16 + ["SGD"] * 8 + ["RMSprop"] * 8
    seen: list[tuple[int, int, int]] = []

    class Watched(model):
        def on_train_start(self) -> None:
            switch = next(callback for callback in self.trainer.callbacks if isinstance(callback, OptimizerSwitchCallback))
            seen.append((self.trainer.global_step, switch.phase, switch.first_step))

    for step in steps:
        with counted_steps() as counts:
            built = cli("fit", "--config=config.yaml", f"--ckpt_path=saved/step={step}.ckpt", "--seed_everything=2", model=Watched)
        assert seen.pop() == (step, *((0, 0) if step <= 16 else (1, 16) if step <= 24 else (2, 24)))
        assert counts == {name: classes[step:].count(name) for name in classes[step:]}
        assert digest(built.model) == expected, step
        found = found_switch(built)
        assert (built.trainer.global_step, found.phase, found.first_step) == (32, 2, 24)


@again
def test_a_run_that_resumes_with_another_option_says_so_and_obeys_the_policy() -> None:
    resumable()
    words = ("--config=config.yaml", "--ckpt_path=saved/step=20.ckpt", f"{CALLBACK}.optimizer.lr=0.3")
    message = (
        "this run is configured otherwise than the one that wrote the checkpoint:\n"
        "  switch.optimizer.lr: 0.1 in the checkpoint, 0.3 in this run\n"
        "Say which options the running optimizer goes on with: switch.on_resume=config or switch.on_resume=checkpoint."
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        cli("fit", *words)
    built = cli("fit", *words, f"{CALLBACK}.on_resume=config", f"{CALLBACK}.then=null")
    assert built.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.3


@again
def test_a_checkpoint_of_a_later_phase_is_validated() -> None:
    expected = resumable(model=ValidatedNet, data=ValidatedData).trainer.callback_metrics["val/loss"]
    built = cli("validate", "--config=run.yaml", "--ckpt_path=saved/step=32.ckpt", model=ValidatedNet, data=ValidatedData)
    assert built.trainer.callback_metrics["val/loss"] == expected


# The page


def page_files() -> dict[str, str]:
    """The files that the page shows, by the name in their first line."""
    texts = [text for language in ("python", "yaml") for text in blocks(PAGE, language)]
    return {text.splitlines()[0].removeprefix("# "): text for text in texts}


def page_commands() -> list[str]:
    return [line for block in blocks(PAGE, "bash") for line in block.splitlines()]


def write_page() -> None:
    for name, text in page_files().items():
        Path(name).write_text(text, encoding="utf-8")


def run_here(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a script of the page in this process, where everything is imported already; returns the exit code."""
    assert words[0] == "python"
    with monkeypatch.context() as patch:
        patch.syspath_prepend(Path.cwd())
        patch.setattr(sys, "argv", words[1:])
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
        finally:
            sys.modules.pop("main", None)
    return 0


TO_SGD = "SWITCH at step 32 (epoch 2): Adam lr 5.4e-03 -> SGD lr 3.3e-02 (own), because at=2ep was reached; cosine, warmup 10%, "
SAID: list[list[str]] = [
    [TO_SGD],
    ["SWITCH at step 48 (epoch 3): Adam lr 1.6e-03 -> SGD lr 1.5e-01 (own), because at=75% was reached; cosine, warmup 10%, "],
    [TO_SGD.replace("cosine, warmup 10%", "step decay, warmup 10%, every 1ep")],
    [TO_SGD, "SWITCH at step 48 (epoch 3): SGD lr 5.8e-02 -> RMSprop lr 1.0e-02 (own, the default of RMSprop), because at=3ep "],
    [TO_SGD],
    [],
    [],
    [],
    ["SWITCH at step 32 (epoch 2): Adam lr 1.0e-03 -> SGD lr 3.0e-01 (own), because at=2ep was reached; constant, "],
    ["SWITCH at step 32 (epoch 2): Adam lr 1.0e-03 -> SGD lr 1.0e-03 (own, the default of SGD), because at=2ep was reached; "],
    [],
]
"""How the lines of the switches begin that each command of the page says."""


@again
@pytest.mark.filterwarnings(
    "ignore:The number of training batches .* is smaller than the logging interval"
)  # the page logs nothing
def test_the_commands_of_the_page(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_page()
    ends: list[str] = []
    outputs: list[str] = []
    for line, beginnings in zip(page_commands(), SAID, strict=True):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert run_here(shlex.split(line), monkeypatch) == 0, line
        outputs.append(capsys.readouterr().out)
        said = [record.message for record in caplog.records if record.message.startswith("SWITCH")]
        assert [text[: len(beginning)] for text, beginning in zip(said, beginnings, strict=True)] == beginnings
        saved = sorted(Path("saved").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
        ends.append(f"{len(saved)} {digest_of(torch.load(saved[-1], weights_only=True)['state_dict'])}")
    counts, digests = zip(*(end.split() for end in ends), strict=True)
    assert counts[:7] == ("4", "8", "12", "16", "20", "21", "21")
    assert digests[0] == digests[4] == digests[5]
    assert len({*digests[:4]}) == 4
    assert "\n      at: 3ep\n" in outputs[6]
    assert squeezed(described(OptimizerSwitchCallback)["then"]) in squeezed(outputs[7])


def test_the_mistake_of_the_page(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    write_page()
    [block] = blocks(PAGE, "console")
    line, _, answer = block.removeprefix("$ ").partition("\n")
    assert run_here(shlex.split(line), monkeypatch) == 2
    assert capsys.readouterr().err.endswith(answer)


@pytest.mark.slow
@pytest.mark.parametrize(("line", "code"), [(page_commands()[0], 0), (f"{page_commands()[0]} --trainer.callbacks.at=3", 2)])
def test_a_command_of_the_page_in_a_process_of_its_own(line: str, code: int) -> None:
    write_page()
    ended = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == code, ended.stderr
    assert ("SWITCH at step 32" in ended.stderr) == (code == 0)
    assert "Traceback" not in ended.stderr
