"""Every YAML file under conf/ and recipes/: its form, that it composes, that it builds, and that it can take a step."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf

import lightning_adaptive
from hydra_plugins.lightning_adaptive import data_folder
from lightning_adaptive import Clock, LayerDecay, MupLike, ParamGroups, attach, config
from lightning_adaptive.app import job  # noqa: F401 - registers the resolvers that train.yaml uses
from lightning_adaptive.errors import ConfigError
from lightning_adaptive.handover import PRESETS
from lightning_adaptive.param_groups import NO_DECAY
from tests.support import ROOT, Net, ValidatedNet, counted_steps, loader, trainer, weights

FILES = sorted(path.relative_to(ROOT) for folder in ("conf", "recipes") for path in (ROOT / folder).rglob("*.yaml"))
RECIPES = [path.stem for path in FILES if path.parts[0] == "recipes"]
MARKS = ("_target_", "_partial_")
"""Keys that say what a node is, and need no comment."""


def names(group: str) -> list[str]:
    return [path.stem for path in FILES if path.parent.name == group]


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Any]:
    """Composes ``train`` with overrides, in a run folder of the test's own."""
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        yield lambda *overrides: compose("train", [f"output_dir={tmp_path}", *overrides])


def override_of(path: Path) -> str:
    """The override that chooses a file: where it belongs, which for some groups is after a switch."""
    group, name = path.parent.name, path.stem
    if group == "recipes":
        return f"recipe={name}"
    if group == "help":
        return f"hydra/help={name}"
    if group == "handover" or name in ("inherit", "continue"):
        return f"{group}@switch.{group}={name}"
    if group == "trigger":
        return f"trigger@switch.when={name}"
    return f"{group}={name}"


# Form


def test_every_file_is_found() -> None:
    phase = ("optimizer", "scheduler", "param_groups", "switch", "trigger", "handover")
    groups = (*phase, "callbacks", "hydra/help", "logger", "task", "trainer")
    assert {str(path.parent) for path in FILES} == {"conf", "recipes", *(f"conf/{group}" for group in groups)}
    assert len(FILES) >= 92, "so many there were when this was written"
    every = {path.relative_to(ROOT) for folder in ("conf", "recipes") for path in (ROOT / folder).rglob("*") if path.is_file()}
    assert every - set(FILES) == {Path("recipes/README.md")}, "beside it conf/ and recipes/ hold YAML files and nothing else"


def test_every_row_of_a_table_below_is_of_a_file() -> None:
    """Files without a row are tested without what is said of them there."""
    tables = {"scheduler": AFTER_TWO_OF_TWO_STEPS, "param_groups": MADE, "trigger": TRIGGERS, "switch": SWITCHES}
    for group, table in tables.items():
        assert table.keys() <= set(names(group))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_is_short_and_says_first_what_it_is(path: Path) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    if path.parts[0] == "recipes":
        assert lines.pop(0) == "# @package _global_"
    assert lines[0].startswith("# ")
    assert len(lines[0].split()) >= 5
    assert len(lines) <= 40


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "conf"], ids=str)
def test_every_value_is_documented_where_it_stands(path: Path) -> None:
    inherited = {key for sibling in siblings(path) for key, text in leaves(path.with_name(f"{sibling}.yaml")) if "#" in text}
    undocumented = [key for key, text in leaves(path) if "#" not in text and key not in inherited]
    assert undocumented == []


def siblings(path: Path) -> list[str]:
    """Files of its own group that a file builds on, and so need not explain again."""
    defaults = yaml.safe_load((ROOT / path).read_text(encoding="utf-8")).get("defaults", [])
    return [entry for entry in defaults if isinstance(entry, str) and entry != "_self_"]


def leaves(path: Path) -> Iterator[tuple[str, str]]:
    """Dotted key and line of each value of a file; a list is one value."""
    text = (ROOT / path).read_text(encoding="utf-8")
    lines = text.splitlines()

    def walk(mapping: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, str]]:
        for key, value in mapping.value:
            if key.value in (*MARKS, "defaults"):
                continue
            if isinstance(value, yaml.MappingNode):
                yield from walk(value, f"{prefix}{key.value}.")
            else:
                yield prefix + key.value, lines[key.start_mark.line]

    node = yaml.compose(text)
    assert isinstance(node, yaml.MappingNode)
    yield from walk(node, "")


def test_all_switches_have_the_same_slots() -> None:
    """Otherwise ``recipe=X switch=none`` fails, since the recipe sets what the other file does not have."""
    files = [yaml.safe_load((ROOT / "conf/switch" / f"{name}.yaml").read_text(encoding="utf-8")) for name in names("switch")]
    slots = [{next(iter(entry)) for entry in file["defaults"] if isinstance(entry, dict)} for file in files]
    keys = [set(file) - {"handover"} for file in files]
    assert all(one == slots[0] for one in slots)
    assert all(one == keys[0] for one in keys)
    assert {slot.partition("@")[2] for slot in slots[0]} == {"optimizer", "scheduler", "param_groups", "when", "handover", "then"}


def test_interpolations_of_phase_files_are_relative() -> None:
    """A node is placed at several packages, also in other people's applications, where our root keys do not exist."""
    groups = ("optimizer", "scheduler", "param_groups", "switch", "trigger", "handover")
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in FILES if path.parent.name in groups}
    assert [path for path, text in texts.items() if "${" in text.replace("${.", "")] == []


# Composition


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_composes_where_it_belongs(path: Path, composed: Any) -> None:
    whole = composed(*([] if path.name == "train.yaml" else [override_of(path)]))
    assert isinstance(whole, DictConfig)
    assert set(whole) == {
        *("task", "optimizer", "scheduler", "param_groups", "switch", "trainer", "logger", "callbacks"),
        *("seed", "resume", "ckpt_path", "test", "study", "output_dir"),
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("switch", names("switch"))
def test_every_recipe_goes_with_every_switch(recipe: str, switch: str, composed: Any) -> None:
    whole = composed(f"recipe={recipe}", f"switch={switch}")
    built = config.switch(whole.switch)
    assert built is not None
    assert built.enabled == (switch != "none")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_sets_only_keys_that_exist(recipe: str, composed: Any) -> None:
    """Hydra would add a misspelt one in silence."""
    body = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    choices = [next(iter(entry.items())) for entry in body.pop("defaults")]
    without = composed(*(f"{group.removeprefix('override /')}={name}" for group, name in choices))
    missing = object()
    for key in dotted(body):
        assert OmegaConf.select(without, key, default=missing) is not missing, key


def dotted(mapping: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key


# Objects and their first steps


def fit(module: Net, steps: int, *callbacks: Any, **options: Any) -> Trainer:
    running = trainer(max_steps=steps, callbacks=list(callbacks), **options)
    running.fit(module, loader(), *([loader()] if isinstance(module, ValidatedNet) else []))
    assert running.global_step == steps
    return running


def moved(module: Net) -> bool:
    before = weights(Net())
    return all(not torch.equal(before[name], tensor) for name, tensor in weights(module).items())


OPTIMIZERS = [name for name in names("optimizer") if name != "custom"]
"""``custom`` names no class of its own; see below."""


def with_groups(name: str, where: str = "") -> list[str]:
    """What chooses an optimizer, at the start or after a switch, with the groups that it needs."""
    if name != "muon":
        return [f"optimizer{'@switch.optimizer' * bool(where)}={name}"]
    groups = f"param_groups{'@switch.param_groups' * bool(where)}=muon"
    return [f"optimizer{'@switch.optimizer' * bool(where)}=muon", groups, f"{where}param_groups.head.match=net.2.*"]


def steppers(node: Any) -> dict[str, int]:
    """The class that steps, and of several for groups each."""
    inner = node.get("optimizers", {}).values()
    return {each["_target_"].rpartition(".")[2]: 1 for each in (node, *inner)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_a_step(name: str, composed: Any) -> None:
    whole = composed(*with_groups(name))
    module = attach(Net(), optimizer=whole.optimizer, param_groups=whole.param_groups)
    with counted_steps() as counts:
        fit(module, 1)
    assert moved(module)
    assert counts == steppers(whole.optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_takes_a_step_after_a_switch(name: str, composed: Any) -> None:
    whole = composed(*with_groups(name, "switch."), "switch.at=1st")
    with counted_steps() as counts:
        running = fit(attach(Net(), optimizer=whole.optimizer), 2, config.switch(whole.switch))
    target = whole.switch.optimizer["_target_"].rpartition(".")[2]
    assert type(running.optimizers[0]).__name__ == target
    assert counts == ({"Adam": 2} if target == "Adam" else {"Adam": 1, **steppers(whole.switch.optimizer)})


def test_the_custom_optimizer_must_be_named_and_then_takes_a_step(composed: Any) -> None:
    with pytest.raises(ConfigError, match=r"^optimizer\._target_: must be given"):
        config.optimizer_factory(composed("optimizer=custom").optimizer)
    whole = composed("optimizer=custom", "optimizer._target_=torch.optim.Rprop", "+optimizer.etas=[0.4,1.3]")
    module = attach(Net(), optimizer=whole.optimizer)
    running = fit(module, 1)
    assert type(running.optimizers[0]) is torch.optim.Rprop
    assert tuple(running.optimizers[0].param_groups[0]["etas"]) == (0.4, 1.3)
    assert moved(module)


AFTER_TWO_OF_TWO_STEPS: dict[str, tuple[list[str], float]] = {
    "constant": ([], 1.0),
    "cosine": ([], 0.0),
    "cosine_restarts": (["cycle=1st", "t_mult=2", "decay=0.5"], 0.25),
    "cyclic": (["rise=2st"], 1.0),
    "exponential": (["every=1st"], 0.95**2),
    "inverse_sqrt": (["timescale=1st"], 3**-0.5),
    "linear": ([], 0.0),
    "multistep": (["milestones=[1st]"], 0.1),
    "none": ([], 1.0),
    "one_cycle": ([], 4e-6),
    "per_option": (["options.lr.floor=0.5"], 0.5),
    "piecewise": (["pieces.second.floor=0.25"], 0.25),
    "plateau": (["monitor=train/loss", "patience=0", "threshold=1000.0", "threshold_mode=abs", "interval=step"], 0.1),
    "polynomial": ([], 0.0),
    "rex": ([], 0.0),
    "step": (["every=1st"], 0.01),
    "wsd": (["decay=100%"], 0.0),
}
"""What is changed of a schedule so that two steps show it, and its factor after them; without a row, as the class itself says."""

SCHEDULES = [name for name in names("scheduler") if name not in ("continue", "custom")]
"""Those with which a run may begin; ``custom`` names no class of its own."""


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_drives_a_step(name: str, composed: Any) -> None:
    overrides, factor = AFTER_TWO_OF_TWO_STEPS.get(name, ([], None))
    whole = composed(
        "optimizer=adamw", f"scheduler={name}", *(f"scheduler.{override}" for override in overrides), "optimizer.lr=0.5"
    )
    running = fit(attach(Net(), optimizer=whole.optimizer, scheduler=whole.scheduler), 2)
    if factor is None:
        factor = config.scheduler(whole.scheduler)(Clock(steps_per_epoch=8, total_steps=2))(2)  # type: ignore[operator, arg-type]
    assert running.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5 * factor, rel=1e-12, abs=0)


def test_a_schedule_is_continued_after_a_switch(composed: Any) -> None:
    whole = composed("scheduler=linear", "scheduler@switch.scheduler=continue", "switch.at=2st", "switch.optimizer.lr=0.2")
    switch = config.switch(whole.switch)
    running = fit(attach(Net(), optimizer=whole.optimizer, scheduler=whole.scheduler), 4, switch)
    assert running.optimizers[0].param_groups[0]["lr"] == 0
    assert running.lr_scheduler_configs[0].scheduler.lrs_at(0) == [0.1]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_bears_the_shortest_trainings(name: str, composed: Any) -> None:
    """As ``trainer.fast_dev_run=true`` makes them: what is written in percent must not fail by rounding."""
    schedule = config.scheduler(composed(f"scheduler={name}").scheduler)
    assert isinstance(schedule, lightning_adaptive.Schedule)
    for total in range(1, 9):
        factor = schedule(Clock(steps_per_epoch=total, total_steps=total))
        assert all(0 <= factor(step) <= 1 for step in range(total + 1))


@pytest.mark.parametrize("name", [*(name for name in SCHEDULES if name != "none"), "continue"])
def test_a_schedule_lists_all_its_options(name: str) -> None:
    """So that each can be overridden without a plus, and is documented where it stands."""
    node = yaml.safe_load((ROOT / "conf/scheduler" / f"{name}.yaml").read_text(encoding="utf-8"))
    options = {field.name for field in fields(getattr(lightning_adaptive, node["_target_"].rpartition(".")[2]))}
    assert set(node) - {"_target_", "_convert_", "defaults"} == options


def test_the_custom_scheduler_must_be_named_and_then_counts_steps(composed: Any) -> None:
    with pytest.raises(ConfigError, match=r"^scheduler\._target_: must be given: the path of a class, package\.module\.Class, of"):
        config.scheduler(composed("scheduler=custom").scheduler)
    words = ("scheduler=custom", "scheduler._target_=torch.optim.lr_scheduler.MultiStepLR", "+scheduler.milestones=[25%,75%]")
    node = composed(*words, "optimizer.lr=0.5").scheduler
    for scheduler in (node, instantiate(node)):
        running = fit(attach(Net(), optimizer=composed("optimizer.lr=0.5").optimizer, scheduler=scheduler), 4)
        assert sorted(running.lr_scheduler_configs[0].scheduler.milestones) == [1, 3]
        assert running.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.005)


@pytest.mark.parametrize("name", [*SCHEDULES, "continue"])
def test_hydras_own_instantiate_builds_the_same_schedule(name: str, composed: Any) -> None:
    node = composed(f"scheduler={name}").scheduler
    built = config.scheduler(node)
    assert config.scheduler(instantiate(node)) == instantiate(node) == built
    assert config.scheduler(instantiate({"scheduler": node, "name": "mine"})) == {"scheduler": built, "name": "mine"}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "{first: constant, length 50%; second: cosine}"),
        (
            ["scheduler.pieces.first.length=10ep", "scheduler@scheduler.pieces.second=linear"],
            "{first: constant, length 10ep; second: linear}",
        ),
        (
            ["scheduler.pieces.second.length=20%", "+scheduler@scheduler.pieces.third=rex"],
            "{first: constant, length 50%; second: cosine, length 20%; third: rex}",
        ),
        (["~scheduler.pieces.first", "scheduler.pieces.second.warmup=untuned"], "{second: cosine, warmup untuned}"),
    ],
)
def test_pieces_are_chosen_added_and_left_out_by_name(overrides: list[str], words: str, composed: Any) -> None:
    assert str(config.scheduler(composed("scheduler=piecewise", *overrides).scheduler)) == f"piecewise, pieces {words}"
    at_the_switch = [override.replace("scheduler.pieces", "switch.scheduler.pieces") for override in overrides]
    built = config.switch(composed("scheduler@switch.scheduler=piecewise", *at_the_switch).switch)
    assert built is not None
    assert str(built.chain[0].scheduler) == f"piecewise, pieces {words}"


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "none"])
def test_every_schedule_warms_up(name: str, composed: Any) -> None:
    more = {"per_option": ["scheduler.options.lr.warmup=4st"], "plateau": ["scheduler.monitor=train/loss", "scheduler.warmup=4st"]}
    whole = composed("optimizer=adamw", f"scheduler={name}", *more.get(name, ["scheduler.warmup=4st"]), "optimizer.lr=0.8")
    running = fit(attach(Net(), optimizer=whole.optimizer, scheduler=whole.scheduler), 4)
    scheduler: Any = running.lr_scheduler_configs[0].scheduler
    assert [scheduler.factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


MADE: dict[str, tuple[list[str], dict[str, int]]] = {
    "none": ([], {"": 4}),
    "inherit": ([], {"": 4}),
    "no_decay": ([], {"no_decay": 2, "default": 2}),
    "discriminative": (["backbone.match=net.0.*"], {"default": 2, "backbone": 2}),
    "layer_decay": (["decay=0.5"], {"layer_1": 1, "layer_1_no_decay": 1, "layer_0": 1, "layer_0_no_decay": 1}),
    "mup_like": (["base_fan_in=32"], {"default": 2, "fan_in_16": 1, "fan_in_32": 1}),
    "muon": (["head.match=net.2.*"], {"head": 1, "no_decay": 2, "hidden": 1}),
}
"""What a preset of groups must be given, and how many parameters of the tests' net it puts into which group."""


@pytest.mark.parametrize("name", names("param_groups"))
def test_param_groups_hold_every_parameter(name: str, composed: Any) -> None:
    overrides, made = MADE.get(name, ([], None))
    more = [f"switch.param_groups.{override}" for override in overrides]
    whole = composed(f"param_groups@switch.param_groups={name}", "switch.at=1st", *more)
    running = fit(attach(Net(), optimizer=whole.optimizer), 2, config.switch(whole.switch))
    found = {group.get("name", ""): len(group["params"]) for group in running.optimizers[0].param_groups}
    assert sum(found.values()) == 4
    assert made in (None, found)


def test_presets_mean_what_the_classes_mean_by_default(composed: Any) -> None:
    assert repr(config.param_groups(composed("param_groups=layer_decay").param_groups)) == repr(LayerDecay())
    assert repr(config.param_groups(composed("param_groups=mup_like").param_groups)) == repr(MupLike())
    no_decay = repr(config.param_groups(composed("param_groups=no_decay").param_groups))
    assert no_decay == repr(ParamGroups(no_decay={**NO_DECAY, "weight_decay": 0}))
    for name in names("param_groups"):  # also by other people's instantiate
        node = composed(f"param_groups@switch.param_groups={name}").switch.param_groups
        assert repr(instantiate(node)) == repr(config.param_groups(node))


TRIGGERS = {
    "plateau": (["monitor=train/loss", "patience=0"], "OnPlateau(monitor=train/loss, patience=0)"),
    "threshold": (["monitor=train/loss", "below=99"], "OnThreshold(monitor=train/loss, below=99)"),
    "manual": (["every_n_steps=1"], "Manual(every_n_steps=1)"),
    "any": ([], "AnyOf(standstill: OnPlateau(monitor=val/loss), asked: Manual())"),
    "swats": (["criterion=paper", "eps=1e-3"], "Swats(criterion=paper, eps=0.001)"),
    "noise": (["above=2"], "OnNoise(above=2)"),
    "all": (["of.standstill.patience=5"], "AllOf(standstill: OnPlateau(monitor=val/loss, patience=5), asked: Manual())"),
}
"""What is changed of a trigger, and what it is then."""


@pytest.mark.parametrize("name", names("trigger"))
def test_a_trigger_builds_whoever_builds_it(name: str, composed: Any) -> None:
    overrides, words = TRIGGERS.get(name, ([], None))
    whole = composed(f"trigger@switch.when={name}", *(f"switch.when.{override}" for override in overrides))
    switch = config.switch(whole.switch)
    assert switch is not None
    [ours], [theirs] = switch.chain, instantiate(whole.switch).chain
    assert str(ours.when) == str(theirs.when)
    assert words in (None, str(ours.when))


@pytest.mark.parametrize("name", names("trigger"))
def test_a_trigger_lists_all_its_options(name: str) -> None:
    node = yaml.safe_load((ROOT / "conf/trigger" / f"{name}.yaml").read_text(encoding="utf-8"))
    options = {field.name for field in fields(getattr(lightning_adaptive, node["_target_"].rpartition(".")[2]))}
    assert set(node) - {"_target_", "_convert_", "defaults"} == options


@pytest.mark.parametrize("name", names("handover"))
def test_a_handover_builds_and_is_used(name: str, composed: Any) -> None:
    whole = composed(f"handover@switch.handover={name}", "switch.at=1st")
    switch = config.switch(whole.switch)
    assert switch is not None
    assert switch.chain[0].handover == instantiate(whole.switch).chain[0].handover == PRESETS[name]
    fit(attach(Net(), optimizer=whole.optimizer), 2, switch)
    assert switch.phase == 1


SWITCHES: dict[str, tuple[list[str], list[str]]] = {
    "noise": ([], ["Adam", "SGD"]),
    "none": ([], ["Adam", "Adam"]),
    "adam_to_sgd": ([], ["Adam", "SGD"]),
    "adamw_to_sgd": (["optimizer=adamw"], ["AdamW", "SGD"]),
    "adam_to_lbfgs": ([], ["Adam", "LBFGS"]),
    "lower_lr": (["optimizer=sgd"], ["SGD", "SGD"]),
    "plateau": ([], ["Adam", "SGD"]),
    "sgd_to_adam": (["optimizer=sgd"], ["SGD", "Adam"]),
    "swats": ([], ["Adam", "SGD"]),
    "three_phases": (["switch.then.at=2st"], ["Adam", "SGD", "SGD"]),
}
"""What goes before a switch, and what steps then."""


@pytest.mark.parametrize("name", names("switch"))
def test_a_switch_takes_a_step_on_either_side(name: str, composed: Any) -> None:
    overrides, steppers = SWITCHES.get(name, ([], None))
    whole = composed(f"switch={name}", "switch.at=1st", *overrides)
    steppers = steppers or ["Adam", whole.switch.optimizer["_target_"].rpartition(".")[2]]
    switch = config.switch(whole.switch)
    with counted_steps() as counts:
        module = attach(ValidatedNet(), optimizer=whole.optimizer)
        # The noise shows between the gradients of a step.
        noise = [lightning_adaptive.GradientNoiseMonitor()] if name == "noise" else []
        fit(module, len(steppers), switch, *noise, accumulate_grad_batches=2 if noise else 1)
    assert counts == Counter(steppers)
    assert str(switch) == str(instantiate(whole.switch))


def test_a_third_phase_is_one_more_override(composed: Any) -> None:
    whole = composed(
        "switch@switch.then=adam_to_sgd", "switch.at=1st", "switch.then.at=2st", "optimizer@switch.then.optimizer=adagrad"
    )
    with counted_steps() as counts:
        fit(attach(Net(), optimizer=whole.optimizer), 3, config.switch(whole.switch))
    assert counts == {"Adam": 1, "SGD": 1, "Adagrad": 1}


ON_GPUS = ("gpu", "ddp", "fsdp", "fsdp2", "deepspeed_1", "deepspeed_2", "deepspeed_3")


@pytest.mark.parametrize("name", names("trainer"))
def test_a_trainer_builds(name: str, composed: Any) -> None:
    node = composed(f"trainer={name}", "trainer.max_epochs=7").trainer
    if name in ON_GPUS and not torch.cuda.is_available():
        with pytest.raises(ConfigError) as caught:
            config.trainer(node, logger=False)
        assert str(caught.value) == "trainer: Trainer cannot be built: No supported gpu backend found."
        return
    built = config.trainer(node, logger=False)
    assert built.max_epochs == 7
    assert type(built.strategy).__name__ == {"ddp_cpu": "DDPStrategy", "ddp": "DDPStrategy"}.get(name, "SingleDeviceStrategy")


LOGGER_PACKAGES = {"csv": None, "tensorboard": "tensorboard", "many": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


@pytest.mark.parametrize("name", names("logger"))
def test_a_logger_builds_or_says_which_package_it_needs(name: str, composed: Any) -> None:
    node = composed(f"logger={name}", *(["logger.wandb.offline=true"] if name == "wandb" else [])).logger
    package = LOGGER_PACKAGES.get(name, name)
    if package is not None and importlib.util.find_spec(package) is None:
        with pytest.raises(ConfigError, match=rf"^logger\.{name}: .* cannot be built: .*{package}"):
            config.loggers(node)
        return
    built = config.loggers(node)
    assert type(built[0]).__name__ == "CSVLogger", "the picture is drawn from its file"
    assert len(built) == (1 if name == "csv" else 2)


@pytest.mark.parametrize("name", names("callbacks"))
def test_callbacks_build(name: str, composed: Any) -> None:
    nodes = composed(f"callbacks={name}").callbacks
    built = [type(callback).__name__ for callback in config.callbacks(nodes)]
    assert built == [node["_target_"].rpartition(".")[2] for node in nodes.values()]
    default = ["ModelCheckpoint", "ModelCheckpoint", "ExactResume", "LearningRateMonitor"]
    assert {"default": default, "noise": [*default, "GradientNoiseMonitor"], "none": []}.get(name, built) == built


@pytest.mark.parametrize("name", names("task"))
def test_a_task_builds_and_gives_batches(name: str, composed: Any) -> None:
    task = composed(f"task={name}").task
    module, data = config.module(task.module, "task.module"), config.datamodule(task.data, "task.data")
    data.setup("fit")
    images, targets = next(iter(data.train_dataloader()))
    assert module(images).shape[0] == targets.shape[0]
    assert task.mode in ("min", "max")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_builds_and_its_phases_take_a_step(recipe: str, composed: Any) -> None:
    whole = composed(f"recipe={recipe}", "switch.at=1st")
    switch = config.switch(whole.switch)
    assert switch is not None
    module = attach(Net(), optimizer=whole.optimizer, scheduler=whole.scheduler, param_groups=whole.param_groups)
    noise = [lightning_adaptive.GradientNoiseMonitor()] if "noise" in whole.callbacks else []
    fit(module, 2, switch, *noise, accumulate_grad_batches=whole.trainer.accumulate_grad_batches)
    assert switch.phase == (1 if switch.enabled else 0)
    assert moved(module)
