"""`trust`, and the gate as a whole: whose code a config may bring in, and that nothing else ever runs.

The hostile targets are tried in a process of their own, in which an audit hook watches what the interpreter itself does. Another
process calls the same targets without the gate, which shows that the hook would have seen each of them.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

from lightning_adaptive import attach, config, trust
from lightning_adaptive.errors import ConfigError, ConfigTypeError
from lightning_adaptive.trust import TRUST_VARIABLE
from tests.hostile import HOSTILE, IN_THE_WORKING_FOLDER, OPT, PAYLOAD, SLOTS
from tests.support import ROOT, Net, loader, trainer

# What a config may not bring in


@pytest.fixture(scope="module")
def happened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happened in the process that tried the targets and then called them, in a folder with the payload."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, text in PAYLOAD.items():
        write(folder / name, text)
    before = sorted(folder.rglob("*"))
    ended = subprocess.run(
        # -c leaves the working folder at the head of the search path, as a script in it would.
        [sys.executable, "-B", "-W", "ignore", "-c", f"from tests import hostile; hostile.main({str(folder)!r})"],
        cwd=folder,
        env=without_a_word(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert sorted(folder.rglob("*")) == before
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answer


def without_a_word() -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if name != TRUST_VARIABLE}, "PYTHONPATH": str(ROOT)}


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_no_hostile_target_runs_in_any_slot(happened: dict[str, Any]) -> None:
    assert happened["tried"] == {"count": len(HOSTILE) * len(SLOTS), "ran": [], "passed": {}, "imported": []}


def test_the_watch_sees_what_each_of_them_does(happened: dict[str, Any]) -> None:
    assert happened["called"] == {one.target: [one.effect] if one.effect else [] for one in HOSTILE}


def test_it_is_trust_that_stops_the_working_folder(happened: dict[str, Any]) -> None:
    assert happened["without trust"] == {one.target: [one.effect] for one in IN_THE_WORKING_FOLDER}
    assert len(IN_THE_WORKING_FOLDER) == 6


def test_no_target_stands_twice() -> None:
    assert len({one.target for one in HOSTILE}) == len(HOSTILE) >= 100


# Whose code a config may bring in: what counts as installed


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `trust` has found out so far holds for the packages of this process; a test makes others."""
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)

    def forget() -> None:
        trust._homes.cache_clear()
        trust._packages.cache_clear()
        importlib.invalidate_caches()

    forget()
    yield
    forget()


@pytest.fixture
def site(forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that an installer would write to, on the search path; the working folder is another, and stands before it."""
    folder, working = tmp_path / "site", tmp_path / "working"
    for one in (folder, working):
        one.mkdir()
    monkeypatch.chdir(working)
    monkeypatch.setattr(sys, "path", [str(working), str(folder), *sys.path])
    return folder


def describe(
    folder: Path,
    name: str,
    record: str = "",
    top_level: str | None = None,
    edited: Path | None = None,
    url: Mapping[str, Any] | None = None,
) -> None:
    """What an installer leaves beside a package: the name of the distribution, its files, and where it came from."""
    about = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    write(about / "METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    write(about / "RECORD", "".join(f"{file},,\n" for file in (*record.split(), f"{about.name}/RECORD")))
    if top_level is not None:
        write(about / "top_level.txt", f"{top_level}\n")
    if edited is not None:
        url = {"url": edited.as_uri(), "dir_info": {"editable": True}}
    if url is not None:
        write(about / "direct_url.json", json.dumps(url))


def refusal(target: str, key: str = "optimizer._target_") -> str:
    with pytest.raises(ConfigError) as caught:
        trust.check(target, key)
    return str(caught.value)


def how(package: str) -> str:
    return f"If it is your own code, say so outside the config: --trust {package}, or LIGHTNING_ADAPTIVE_TRUST={package}."


def not_installed(package: str) -> str:
    return f"optimizer._target_: {package!r} is not an installed package. {how(package)}"


@pytest.mark.parametrize(
    "target", ["torch.optim.SGD", "lightning_adaptive.Cosine", "schedulefree.AdamWScheduleFree", "yaml.Loader"]
)
def test_what_is_installed_may_be_named(forgotten: None, target: str) -> None:
    trust.check(target, "optimizer._target_")


@pytest.mark.parametrize("about", [{"record": "labkit/__init__.py"}, {"top_level": "labkit"}], ids=["RECORD", "top_level.txt"])
def test_an_installed_package_is_known_by_what_its_installer_listed(site: Path, about: dict[str, str]) -> None:
    write(site / "labkit" / "__init__.py")
    describe(site, "lab-kit", **about)
    trust.check("labkit.Opt", "optimizer._target_")


def test_one_that_was_installed_from_a_folder_is_no_editable_one(site: Path) -> None:
    write(site / "labkit.py")
    describe(site, "labkit", "labkit.py", url={"url": (site.parent / "checkout").as_uri(), "dir_info": {}})
    trust.check("labkit.Opt", "optimizer._target_")


def test_an_installer_may_link_to_files_elsewhere(site: Path) -> None:
    cache = write(site.parent / "cache" / "labkit.py")
    (site / "labkit.py").symlink_to(cache)
    describe(site, "labkit", "labkit.py")
    trust.check("labkit.Opt", "optimizer._target_")


def test_the_folder_of_packages_may_be_reached_by_a_link(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(site / "labkit.py")
    describe(site, "labkit", "labkit.py")
    (site.parent / "link").symlink_to(site)
    monkeypatch.setattr(sys, "path", [str(site.parent / "link"), *sys.path])
    trust.check("labkit.Opt", "optimizer._target_")


@pytest.mark.parametrize("linked", [False, True], ids=["", "by a link"])
@pytest.mark.parametrize(
    ("name", "about", "package"),
    [
        ("lab-project", {"top_level": "labkit"}, "labkit"),
        ("lab-project", {"record": "labkit.pth __editable___labkit_finder.py", "top_level": "labkit"}, "labkit"),
        ("labkit", {"record": "labkit.pth"}, "labkit"),
        ("labkit", {}, "labkit"),
        ("Lab-Kit", {}, "lab_kit"),  # names are compared as installers do
    ],
    ids=["top_level.txt", "top_level.txt and a finder", "a .pth file", "nothing", "another spelling"],
)
def test_an_editable_install_stays_in_its_project(
    site: Path, name: str, about: dict[str, str], package: str, linked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = site.parent / "my project"
    write(project / "src" / package / "__init__.py")
    describe(site, name, edited=project, **about)
    (site.parent / "link").symlink_to(project)
    monkeypatch.setattr(sys, "path", [*sys.path, str((site.parent / "link" if linked else project) / "src")])
    trust.check(f"{package}.optim.Opt", "optimizer._target_")


def test_an_editable_install_that_lists_nothing_is_known_by_its_name_alone(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = site.parent / "project"
    write(project / "labkit.py")
    describe(site, "lab-project", "lab_project.pth", edited=project)
    monkeypatch.setattr(sys, "path", [*sys.path, str(project)])
    assert refusal("labkit.Opt") == not_installed("labkit")


def test_a_distribution_of_the_name_that_lists_other_packages_is_not_enough(site: Path) -> None:
    write(site / "labkit.py")
    describe(site, "labkit", "other.py")
    assert refusal("labkit.Opt") == not_installed("labkit")


@pytest.mark.parametrize("editable", [False, True])
def test_a_file_of_the_working_folder_may_not_stand_before_an_installed_package(
    site: Path, editable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = site.parent / "project" if editable else site
    write(project / "labkit.py")
    describe(site, "labkit", "" if editable else "labkit.py", edited=project if editable else None)
    monkeypatch.setattr(sys, "path", [*sys.path, str(project)])
    shadow = write(Path.cwd() / "labkit.py")
    assert refusal("labkit.Opt") == f"optimizer._target_: {shadow} stands before the installed package 'labkit'. {how('labkit')}"


def test_a_package_of_several_folders_has_none_in_the_working_folder(site: Path) -> None:
    write(site / "labs" / "optim.py")
    describe(site, "labs-optim", "labs/optim.py")
    trust.check("labs.optim.Opt", "optimizer._target_")
    importlib.invalidate_caches()
    write(Path.cwd() / "labs" / "evil.py")
    expected = f"optimizer._target_: {Path.cwd() / 'labs'} stands before the installed package 'labs'. {how('labs')}"
    assert refusal("labs.evil.Opt") == expected


@pytest.mark.parametrize("kind", ["dist-info", "egg-info", "editable"])
def test_what_a_working_folder_says_of_itself_does_not_install_it(site: Path, kind: str) -> None:
    """A checkout often brings an egg-info along; whoever wrote the config may have written that too."""
    working = Path.cwd()
    write(working / "labkit.py")
    if kind == "egg-info":
        write(working / "labkit.egg-info" / "PKG-INFO", "Metadata-Version: 2.1\nName: labkit\nVersion: 1.0\n")
        write(working / "labkit.egg-info" / "top_level.txt", "labkit\n")
    else:
        describe(working, "labkit", "labkit.py", edited=working if kind == "editable" else None)
    assert refusal("labkit.Opt") == not_installed("labkit")
    trust._homes.cache_clear()
    describe(site, "labkit", edited=working)
    trust.check("labkit.Opt", "optimizer._target_")  # really installed, it may lie where one works


def test_a_program_within_a_package_is_refused() -> None:
    expected = "optimizer._target_: 'tqdm.__main__.main' is a program, which would run when it is imported."
    assert refusal("tqdm.__main__.main") == expected


@pytest.mark.parametrize("target", ["", ".torch.optim.SGD", "."])
def test_a_name_without_a_package_is_refused(forgotten: None, target: str) -> None:
    assert refusal(target) == not_installed("")


@pytest.mark.parametrize("target", ["torch..optim.SGD", "torch.optim.SGD.", ".torch.optim.SGD", "torch.1.SGD", "torch.optim.SGD\n"])
def test_a_name_with_an_empty_or_impossible_part_is_no_path(target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.optimizer_factory({"_target_": target})
    expected = f"optimizer._target_: {target!r} is no path of a class. Write package.module.Class, of Optimizer."
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"optimizer": {"_target_": "os.system"}}, "optimizer._target_"),
        (
            {"callbacks": {"a": {"_target_": "torch.optim.SGD", "_args_": [{"_target_": "os.system"}]}}},
            "callbacks.a._args_.0._target_",
        ),
        ({"a": ({"b": "c"}, {"_target_": "os.system"})}, "a.1._target_"),
        ([{"_target_": "os.system"}], "0._target_"),
        (OmegaConf.create({"a": [{"_target_": "os.system"}]}), "a.0._target_"),
    ],
    ids=["mapping", "_args_", "tuple", "list", "OmegaConf"],
)
def test_every_target_of_a_tree_is_checked(tree: Any, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trust.check_all(tree)
    assert str(caught.value) == f"{key}: 'os.system' lies in the standard library, which a config may never name."


def test_a_tree_of_installed_names_passes_as_does_what_is_no_text() -> None:
    trust.check_all(
        {"a": {"_target_": "torch.optim.SGD"}, "b": {"_target_": "???"}, "c": {"_target_": 3}, "d": "_target_", "e": None}
    )


# What the user gave a word for


def test_the_word_is_for_packages_and_for_single_functions(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(Path.cwd() / "labkit.py")
    monkeypatch.setenv(TRUST_VARIABLE, "other:labkit.make:lab:labkit.OptA::")
    assert trust.names() == {"other", "labkit.make", "lab", "labkit.OptA"}
    trust.check("other.Opt", "optimizer._target_")
    trust.check("labkit.make", "optimizer._target_")
    assert refusal("labkit.Opt") == not_installed("labkit")
    monkeypatch.setenv(TRUST_VARIABLE, "labkit")
    trust.check("labkit.Opt", "optimizer._target_")


@pytest.mark.parametrize("word", ["os", "os.system"])
def test_no_word_is_enough_for_the_standard_library(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, word)
    assert refusal("os.system") == "optimizer._target_: 'os.system' lies in the standard library, which a config may never name."


FACTORIES = """
import torch

def make(params, lr=0.1, momentum=0.0):
    return torch.optim.SGD(params, lr=lr, momentum=momentum)

def decay(optimizer, every=2):
    return torch.optim.lr_scheduler.StepLR(optimizer, every)

def wrong(params):
    return torch.nn.Linear(1, 1)

alias = make

class Opt(torch.optim.SGD):
    pass
"""


@pytest.fixture(params=["installed", "own"])
def factories(site: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """A package with functions that make optimizers, installed or in the working folder."""
    write((site if request.param == "installed" else Path.cwd()) / "labfactories.py", FACTORIES)
    if request.param == "installed":
        describe(site, "labfactories", "labfactories.py")
    yield "labfactories"
    sys.modules.pop("labfactories", None)


def test_a_trusted_function_makes_an_optimizer(factories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, f"{factories}.make:{factories}.decay")
    factory = config.optimizer_factory({"_target_": f"{factories}.make", "lr": 0.3})
    built = factory([nn.Parameter(torch.zeros(2))])
    assert isinstance(built, torch.optim.SGD)
    assert built.param_groups[0]["lr"] == 0.3
    scheduler = config.scheduler({"_target_": f"{factories}.decay", "every": 7})
    assert isinstance(scheduler, functools.partial)
    assert scheduler(built).step_size == 7


@pytest.mark.parametrize("word", ["labfactories", "other:labfactories", "labfactories.Opt"])
def test_a_trusted_class_is_used(factories: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, word)
    assert type(config.optimizer_factory({"_target_": f"{factories}.Opt", "lr": 0.1})(weights())).__name__ == "Opt"


def test_a_trusted_function_has_its_options_checked(factories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, f"{factories}.make")
    with pytest.raises(ConfigError) as caught:
        config.optimizer_factory({"_target_": f"{factories}.make", "momentun": 0.9})
    assert str(caught.value) == "optimizer.momentun: make has no option 'momentun'. Did you mean 'momentum'? Options: lr, momentum."


@pytest.mark.parametrize("word", ["labfactories", "labfactories:labfactories.alias", "labfactories:make"])
def test_a_function_is_taken_by_a_word_for_itself_alone(factories: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, word)
    with pytest.raises(ConfigTypeError) as caught:
        config.optimizer_factory({"_target_": f"{factories}.make"})
    assert str(caught.value) == "optimizer._target_: labfactories.make is not a class of Optimizer, which belongs here."


def test_a_trusted_function_cannot_stand_where_a_class_belongs(factories: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, f"{factories}.make")
    with pytest.raises(ConfigTypeError) as caught:
        config.callbacks({"mine": {"_target_": f"{factories}.make"}})
    assert str(caught.value) == "callbacks.mine._target_: labfactories.make is not a class of Callback, which belongs here."


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        ("optimizer", "optimizer: the factory returned a Linear, not a torch.optim.Optimizer."),
        ("scheduler", "scheduler: the factory returned a Linear, not a scheduler of torch."),
    ],
)
def test_what_a_trusted_function_makes_is_looked_at(
    factories: str, slot: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TRUST_VARIABLE, f"{factories}.wrong")
    phase: dict[str, Any] = {"optimizer": torch.optim.SGD, slot: {"_target_": f"{factories}.wrong"}}
    model = attach(Net(), **phase)
    with pytest.raises(ConfigTypeError) as caught:
        trainer(max_epochs=1).fit(model, loader())
    assert str(caught.value) == message


# The running program may be named without a word

IMPORTS_TORCH = """
import torch
from lightning_adaptive import config

class Opt(torch.optim.SGD):
    pass

def answer(target):
    return config.optimizer_factory({"_target_": target, "lr": 0.1}).func.__module__
"""
ASKS_ONLY = """
from lightning_adaptive import trust

def answer(target):
    return trust.check(target, "optimizer._target_")
"""
PROGRAM = """
import sys
from lightning_adaptive.errors import ConfigError

if __name__ == "__main__":
    for target in sys.argv[1:]:
        try:
            print(answer(target))
        except ConfigError as error:
            print(error)
"""


def answers(start: list[str], targets: list[str], folder: Path) -> list[str]:
    """What a program of one's own gets for some names."""
    ended = subprocess.run(
        [sys.executable, *start, *targets],
        cwd=folder,
        env=without_a_word(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_a_program_that_runs_as_a_module_may_name_its_package(tmp_path: Path) -> None:
    write(tmp_path / "labprogram" / "__init__.py")
    write(tmp_path / "labprogram" / "train.py", IMPORTS_TORCH + PROGRAM)
    write(tmp_path / "labprogram" / "optim.py", OPT)
    write(tmp_path / "labother.py", OPT)
    targets = ["__main__.Opt", "labprogram.optim.Opt", "labother.Opt", "__main__.torch.load"]
    assert answers(["-m", "labprogram.train"], targets, tmp_path) == [
        "__main__",
        "labprogram.optim",
        not_installed("labother"),
        "optimizer._target_: __main__.torch.load is not a class of Optimizer, which belongs here.",
    ]


def test_a_script_may_name_itself_and_nothing_that_lies_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "labprogram" / "train.py", ASKS_ONLY + PROGRAM)
    write(tmp_path / "labprogram" / "beside.py", OPT)
    describe(tmp_path / "labprogram", "beside", "beside.py")  # nor what says there that it is installed
    targets = ["__main__.Opt", "labprogram.optim.Opt", "beside.Opt"]
    expected = ["None", not_installed("labprogram"), not_installed("beside")]
    assert answers(["labprogram/train.py"], targets, tmp_path) == expected


# Every optimizer of torch, pytorch_optimizer and schedulefree passes


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2, 2))]


def inner() -> Optimizer:
    return torch.optim.SGD(weights(), lr=0.1)


REQUIRED: dict[str, tuple[dict[str, Any], str]] = {
    "pytorch_optimizer.BSAM": ({"num_data": 1000}, "the size of the training set, which only the user knows"),
    "pytorch_optimizer.Ranger21": ({"num_iterations": 1000}, "its own schedule ends there"),
}
"""Options that a class needs, and why it has no default for them."""

OBJECTS: dict[str, tuple[dict[str, Callable[[], Any]], str]] = {
    **dict.fromkeys(
        [f"pytorch_optimizer.{name}" for name in ("SAM", "FriendlySAM", "LookSAM")],
        ({"base_optimizer": lambda: torch.optim.SGD}, "two steps with another optimizer, which they build from its class"),
    ),
    **dict.fromkeys(
        [f"pytorch_optimizer.{name}" for name in ("LOMO", "AdaLOMO", "AdamMini")],
        ({"model": lambda: nn.Linear(2, 2)}, "they look at the model's layers, not at parameters"),
    ),
    **dict.fromkeys(
        [
            f"pytorch_optimizer.{name}"
            for name in ("TRAC", "Lookahead", "Magma", "OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper")
        ],
        ({"optimizer": inner}, "they wrap an optimizer that is built already"),
    ),
    "pytorch_optimizer.WSAM": (
        {"model": lambda: nn.Linear(2, 2), "base_optimizer": lambda: torch.optim.SGD},
        "as SAM, and it holds back the model's gradient synchronization",
    ),
    "pytorch_optimizer.GSAM": (
        {"base_optimizer": inner, "model": lambda: nn.Linear(2, 2), "rho_scheduler": object},
        "as WSAM, with a schedule of its radius",
    ),
}
"""Classes that need an object, which a config cannot write; the Python API can put it into the node."""


def optimizers(package: str) -> dict[str, type[Optimizer]]:
    found = vars(importlib.import_module(package)).items()
    return {
        f"{package}.{name}": cls
        for name, cls in found
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
    }


CLASSES = {
    target: cls for package in ("torch.optim", "pytorch_optimizer", "schedulefree") for target, cls in optimizers(package).items()
}


def test_the_classes_are_all_there() -> None:
    counts = Counter(target.rpartition(".")[0] for target in CLASSES)
    assert counts == {"torch.optim": 15, "pytorch_optimizer": 139, "schedulefree": 9}
    assert len(set(CLASSES.values())) == 157  # pytorch_optimizer lends six of torch's
    assert {*REQUIRED, *OBJECTS} <= set(CLASSES)


@pytest.mark.parametrize("target", CLASSES)
def test_an_optimizer_is_accepted(target: str) -> None:
    needed = {**REQUIRED.get(target, ({}, ""))[0], **{name: make() for name, make in OBJECTS.get(target, ({}, ""))[0].items()}}
    factory = config.optimizer_factory({"_target_": target, **needed})
    assert isinstance(factory, functools.partial)
    assert factory.func is CLASSES[target]


@pytest.mark.parametrize("target", sorted(set(CLASSES) - set(OBJECTS)))
def test_an_optimizer_takes_its_own_defaults_from_a_file(target: str) -> None:
    """Written out they come as YAML has them: a tuple is a list. A few are functions or types of numbers, which it has not."""
    parameters = inspect.signature(CLASSES[target]).parameters.values()
    defaults = {one.name: one.default for one in parameters if isinstance(one.default, bool | int | float | str | tuple | None)}
    node = OmegaConf.create({"_target_": target, **REQUIRED.get(target, ({}, ""))[0], **defaults})
    factory = config.optimizer_factory(OmegaConf.create(OmegaConf.to_yaml(node)))
    assert isinstance(factory, functools.partial)
    assert set(factory.keywords) >= set(defaults)


@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target, (needed, _) in OBJECTS.items() for name in list(needed)[:1]]
)
def test_an_optimizer_that_needs_an_object_says_what_it_needs(target: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.optimizer_factory({"_target_": target})
    cls = target.rpartition(".")[2]
    assert str(caught.value) in {f"optimizer.{option}: {cls} needs the option {option!r}." for option in OBJECTS[target][0]}


BETAS = {"_target_": "pytorch_optimizer.AdaBelief"}


@pytest.mark.parametrize("betas", [[0.9, 0.99], [0.9, 0.99, 0.999]])
def test_a_row_may_have_each_length_that_its_class_allows(betas: list[float]) -> None:
    factory = config.optimizer_factory({**BETAS, "betas": betas})
    assert isinstance(factory, functools.partial)
    assert factory.keywords == {"betas": betas}


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.9], "optimizer.betas: [0.9] is not a row of 2 or 3 numbers. Write them in brackets, for example [0.9, 0.999]."),
        (0.9, "optimizer.betas: 0.9 is not a row of 2 or 3 numbers. Write them in brackets, for example [0.9, 0.999]."),
        ([0.9, 0.9, "x"], "optimizer.betas.2: 'x' is not a number."),
        ([0.9, float("nan")], "optimizer.betas.1: nan is not a number."),
    ],
)
def test_a_row_of_another_length_or_kind_is_refused(betas: Any, message: str) -> None:
    with pytest.raises(ConfigTypeError) as caught:
        config.optimizer_factory({**BETAS, "betas": betas})
    assert str(caught.value) == message
