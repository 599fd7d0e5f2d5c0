"""`trust`, and the gate as a whole: whose code a config may bring in, and that nothing else ever runs.

The hostile targets are tried in a process of their own, in which an audit hook watches what the interpreter itself does. Another
process calls the same targets without the gate, which shows that the hook would have seen each of them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
from tests.support import ROOT, Net, loader, trainer

# What a config may not bring in

TOUCH = "touch payload_ran"
PICKLES = ("payload.pickle", "payload.npy")


@dataclass(frozen=True)
class Hostile:
    """A target, what it would be called with, and what the watch sees when it is called.

    Args:
        target: as a config would name it.
        effect: the audit event of its doing; empty for what only makes an object, and for names that lead nowhere.
        args: positional values, in a config ``_args_``.
        options: the others; a mapping with ``_target_`` is a node of its own.
    """

    target: str
    effect: str = ""
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def node(self) -> dict[str, Any]:
        return {"_target_": self.target, **({"_args_": list(self.args)} if self.args else {}), **self.options}


def hostile(target: str, effect: str = "", *args: Any, **options: Any) -> Hostile:
    return Hostile(target, effect, args, options)


HOSTILE = [
    # Commands, under their own names and under those that other modules lend them
    hostile("os.system", "os.system", command=TOUCH),
    hostile("posix.system", "os.system", command=TOUCH),
    hostile("logging.os.system", "os.system", command=TOUCH),
    hostile("torch.os.system", "os.system", command=TOUCH),
    hostile("torch.hub.os.system", "os.system", command=TOUCH),
    hostile("lightning.fabric.os.system", "os.system", command=TOUCH),
    hostile("lightning_adaptive.trust.os.system", "os.system", command=TOUCH),
    hostile("pytorch_optimizer.base.optimizer.torch.os.system", "os.system", command=TOUCH),
    hostile("joblib.os.system", "os.system", command=TOUCH),
    hostile("torch.optim.adam.os.system", command=TOUCH),
    hostile("__main__.os.system", "os.system", command=TOUCH),
    hostile("os.popen", "subprocess.Popen", TOUCH),
    hostile("os.execv", "os.exec", "/bin/sh", ["sh", "-c", TOUCH]),
    hostile("os.posix_spawn", "os.posix_spawn", "/bin/sh", ["sh", "-c", TOUCH], {}),
    hostile("os.fork", "os.fork"),
    hostile("pty.spawn", "pty.spawn", ["sh", "-c", TOUCH]),
    hostile("subprocess.Popen", "subprocess.Popen", TOUCH, shell=True),
    hostile("subprocess.run", "subprocess.Popen", TOUCH, shell=True),
    hostile("subprocess.getoutput", "subprocess.Popen", TOUCH),
    hostile("torch.utils.collect_env.run", "subprocess.Popen", command=TOUCH),
    hostile("torch.utils.collect_env.subprocess.check_output", "subprocess.Popen", TOUCH, shell=True),
    hostile("setuptools._distutils.spawn.spawn", "subprocess.Popen", cmd=["touch", "payload_ran"]),
    # Code as text
    hostile("builtins.eval", "compile", "__import__('os').system('touch payload_ran')"),
    hostile("builtins.exec", "compile", "import payload_import"),
    hostile("builtins.compile", "compile", "payload", "payload", "exec"),
    hostile("timeit.timeit", "compile", "payload", number=1),
    hostile("cProfile.run", "compile", "payload"),
    hostile("code.InteractiveInterpreter.runsource", "compile", {"_target_": "code.InteractiveInterpreter"}, "payload()"),
    hostile("sympy.sympify", "compile", "__import__('os').system('touch payload_ran')"),
    hostile("sympy.parsing.sympy_parser.parse_expr", "compile", "__import__('os').system('touch payload_ran')"),
    # Code in files
    hostile("builtins.__import__", "import", "payload_import"),
    hostile("importlib.import_module", "compile", name="payload_import"),
    hostile("pkgutil.resolve_name", "compile", name="payload_import.Opt"),
    hostile("pydoc.locate", "import", "payload_import.Opt"),
    hostile("runpy.run_path", "compile", "payload_import.py"),
    hostile("hydra.utils.get_method", path="os.system"),
    hostile("hydra.utils.get_object", "compile", path="payload_import.Opt"),
    hostile("hydra.utils.instantiate", "compile", {"_target_": "payload_import.Opt"}),
    hostile("hydra._internal.utils._locate", "compile", "payload_import.Opt"),
    hostile("torch.importlib.import_module", "compile", "payload_import"),
    hostile("torch.hub.load", "compile", repo_or_dir=".", model="entry", source="local"),
    hostile("torch.ops.load_library", "ctypes.dlopen", "payload.so"),
    hostile("ctypes.CDLL", "ctypes.dlopen", "payload.so"),
    hostile("numpy.ctypeslib.load_library", "ctypes.dlopen", "payload.so", "."),
    hostile("torch.utils.cpp_extension.load_inline", "open", name="payload", cpp_sources="payload", build_directory="payload"),
    # Pickles
    hostile("pickle.loads", "pickle.find_class", b"cos\nsystem\n(S'touch payload_ran'\ntR."),
    hostile("cloudpickle.loads", "pickle.find_class", b"cos\nsystem\n(S'touch payload_ran'\ntR."),
    hostile("joblib.load", "pickle.find_class", "payload.pickle"),
    hostile("torch.load", "pickle.find_class", f="payload.pickle", weights_only=False),
    hostile("torch.serialization.load", "pickle.find_class", f="payload.pickle", weights_only=False),
    hostile("pytorch_optimizer.base.type.torch.load", "pickle.find_class", f="payload.pickle", weights_only=False),
    hostile("lightning.pytorch.LightningModule.load_from_checkpoint", "pickle.find_class", "payload.pickle", weights_only=False),
    hostile("numpy.load", "pickle.find_class", file="payload.npy", allow_pickle=True),
    hostile("yaml.unsafe_load", "os.system", "!!python/object/apply:os.system ['touch payload_ran']"),
    hostile("pandas.read_pickle", filepath_or_buffer="payload.pickle"),
    # Files
    hostile("builtins.open", "open", "payload_ran", "w"),
    hostile("io.FileIO", "open", "payload_ran", "w"),
    hostile("pathlib.Path.write_text", "open", {"_target_": "pathlib.Path", "_args_": ["payload_ran"]}, "payload"),
    hostile("numpy.savetxt", "open", "payload_ran", [1]),
    hostile("torch.save", "open", [1], "payload_ran", _use_new_zipfile_serialization=False),
    hostile("joblib.dump", "open", 1, "payload_ran"),
    hostile("os.makedirs", "os.mkdir", "payload_ran"),
    hostile("os.remove", "os.remove", "payload.pickle"),
    hostile("os.rename", "os.rename", "payload.pickle", "payload_ran"),
    hostile("os.symlink", "os.symlink", "payload.pickle", "payload_ran"),
    hostile("shutil.copy", "shutil.copyfile", "payload.pickle", "payload_ran"),
    hostile("shutil.copytree", "shutil.copytree", ".", "payload_ran"),
    hostile("shutil.rmtree", "shutil.rmtree", "payload_package"),
    # The network, threads and processes
    hostile("urllib.request.urlopen", "urllib.Request", "http://127.0.0.1:9/payload"),
    hostile("socket.create_connection", "socket.getaddrinfo", ["127.0.0.1", 9]),
    hostile("socket.socket", "socket.__new__"),
    hostile("torch.hub.load_state_dict_from_url", "os.mkdir", "http://127.0.0.1:9/payload", model_dir="payload_ran"),
    hostile("threading.Timer", interval=0, function={"_target_": "os.getpid"}),
    hostile("multiprocessing.Process"),
    hostile("webbrowser.BackgroundBrowser", name="sh"),
    hostile("asyncio.run", "compile", {"_target_": "builtins.eval", "_args_": ["'payload'"]}),
    # Programs within installed packages, which run when they are imported
    hostile("tqdm.__main__.main", "exec"),
    hostile("pygments.__main__.main", "exec"),
    hostile("PIL.__main__.main", "exec"),
    # The working folder: when it is imported; when it is called; in a package; under an installed name; with a dist-info of its
    # own; in the folder of a package that has several
    hostile("payload_import.Opt", "compile"),
    hostile("payload_constructor.Opt", "compile"),
    hostile("payload_package.inner.Opt", "compile"),
    hostile("schedulefree.AdamWScheduleFree", "compile"),
    hostile("claimed.Opt", "compile"),
    hostile("google.payload.Opt", "compile"),
    # A node within a node
    hostile("torch.optim.Adam", "subprocess.Popen", betas=[{"_target_": "subprocess.Popen", "args": TOUCH, "shell": True}, 0.9]),
    hostile("torch.optim.SGD", "os.system", {"_target_": "os.system", "command": TOUCH}),
    hostile("pytorch_optimizer.Lion", "os.system", [], anything={"deeper": [{"_target_": "os.system", "command": TOUCH}]}),
    hostile("functools.partial", "os.system", {"_target_": "os.system", "command": TOUCH}),
    # Parts of classes, and spellings that something might read otherwise
    hostile("torch.optim.SGD.__init__"),
    hostile("torch.optim.SGD.__class__"),
    hostile("torch.optim.SGD.__init__.__globals__"),
    hostile("torch.optim.SGD.__subclasses__"),
    hostile("torch.__builtins__.eval", args=["1"]),
    hostile("torch.__loader__.load_module", fullname="payload_import"),
    hostile("__main__.absent"),
    hostile("os:system", "os.system", command=TOUCH),
    hostile("torch.hub:os.system", "os.system", command=TOUCH),
    hostile(" os.system", command=TOUCH),
    hostile("os.system\n", command=TOUCH),
    hostile("\uff4f\uff53.system", command=TOUCH),
    hostile("torch.\uff4f\uff53.system", command=TOUCH),
    hostile("os..system", command=TOUCH),
    hostile(".os.system", command=TOUCH),
    hostile("torch.os.system.", command=TOUCH),
    hostile("torch.1.system", command=TOUCH),
    hostile("", command=TOUCH),
    hostile(".", command=TOUCH),
    hostile("system", command=TOUCH),
    hostile("../payload_import.Opt"),
    hostile("payload import.Opt"),
]

IN_THE_WORKING_FOLDER = [one for one in HOSTILE if one.target.startswith(("payload_", "schedulefree", "claimed", "google"))]

RUNS = "import os\nos.system('touch payload_ran')\n"
OPT = "import torch\nclass Opt(torch.optim.SGD):\n    pass\nAdamWScheduleFree = Opt\n"
PAYLOAD = {
    "payload_import.py": RUNS + OPT,
    "payload_constructor.py": (
        "import torch\nclass Opt(torch.optim.SGD):\n    def __init__(self, *_, **__):\n        open('payload_ran', 'w').close()\n"
    ),
    "payload_package/__init__.py": "",
    "payload_package/inner.py": RUNS + OPT,
    "schedulefree.py": RUNS + OPT,
    "claimed.py": RUNS + OPT,
    "claimed-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: claimed\nVersion: 1.0\n",
    "claimed-1.0.dist-info/RECORD": "claimed.py,,\n",
    "claimed.egg-info/PKG-INFO": "Metadata-Version: 2.1\nName: claimed\nVersion: 1.0\n",
    "claimed.egg-info/top_level.txt": "claimed\n",
    "google/payload.py": RUNS + OPT,
    "hubconf.py": RUNS + "def entry():\n    pass\n",
    "payload.so": "",
    "payload.pickle": "cos\nsystem\n(S'touch payload_ran'\ntR.",
    "payload.npy": "cos\nsystem\n(S'touch payload_ran'\ntR.",
}

SGD = {"_target_": "torch.optim.SGD", "lr": 0.1}
SWITCH = {"_target_": "lightning_adaptive.OptimizerSwitchCallback", "at": "3ep", "optimizer": SGD}
TRAINER = {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "logger": False}
LOGGER = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "logs"}
NET = "lightning_adaptive.tasks.digits.DigitsNet"
DATA = "lightning_adaptive.tasks.digits.DigitsData"

Slot = Callable[[Any], Any]


def optimizer_with(name: str, target: str = "torch.optim.Adam", wrap: Callable[[Any], Any] = lambda node: node) -> Slot:
    return lambda node: config.optimizer_factory({"_target_": target, name: wrap(node)})


def switch_with(name: str) -> Slot:
    return lambda node: config.switch({**SWITCH, name: node})


SLOTS: dict[str, Slot] = {
    "optimizer": config.optimizer_factory,
    "optimizer as Hydra would": lambda node: config.optimizer_factory({**node, "_partial_": True, "_recursive_": True}),
    "optimizer by interpolation": lambda node: config.optimizer_factory(
        OmegaConf.create({"hidden": node["_target_"], "node": {**node, "_target_": "${hidden}"}}).node
    ),
    "optimizer of attach": lambda node: attach(Net(), optimizer=node),
    "option of an optimizer": optimizer_with("betas"),
    "list of an optimizer": optimizer_with("betas", wrap=lambda node: [node, 0.9]),
    "mapping of an optimizer": optimizer_with("betas", wrap=lambda node: {"deeper": [node]}),
    "unknown option of an optimizer": optimizer_with("anything", "pytorch_optimizer.Lion"),
    "_args_ of an optimizer": optimizer_with("_args_", wrap=lambda node: [node]),
    "_args_ of an optimizer that takes anything": optimizer_with("_args_", "pytorch_optimizer.Lion", lambda node: [node]),
    "scheduler": config.scheduler,
    "scheduler of attach": lambda node: attach(Net(), optimizer=torch.optim.SGD, scheduler=node),
    "scheduler in Lightning's dictionary": lambda node: config.scheduler({"scheduler": node, "interval": "epoch"}),
    "monitor in Lightning's dictionary": lambda node: config.scheduler({"scheduler": None, "monitor": node}),
    "option of a scheduler": lambda node: config.scheduler({"_target_": "torch.optim.lr_scheduler.LambdaLR", "lr_lambda": node}),
    "option of a schedule": lambda node: config.scheduler({"_target_": "lightning_adaptive.Cosine", "warmup": node}),
    "param_groups": config.param_groups,
    "rule of param_groups": lambda node: config.param_groups({"_target_": "lightning_adaptive.ParamGroups", "norms": node}),
    "switch": config.switch,
    **{f"switch.{name}": switch_with(name) for name in ("optimizer", "scheduler", "param_groups", "handover", "then")},
    **{f"switch.{name}": switch_with(name) for name in ("at", "when", "gradient_clip_val", "on_resume", "enabled", "dry_run")},
    "switch.then.optimizer": lambda node: config.switch({**SWITCH, "then": {**SWITCH, "at": "5ep", "optimizer": node}}),
    "callback": lambda node: config.callbacks({"mine": node}),
    "option of a callback": lambda node: config.callbacks(
        {"mine": {"_target_": "lightning.pytorch.callbacks.LambdaCallback", "on_train_start": node}}
    ),
    "logger": lambda node: config.loggers({"mine": node}),
    "option of a logger": lambda node: config.loggers({"mine": {**LOGGER, "name": node}}),
    "trainer": config.trainer,
    "trainer.strategy": lambda node: config.trainer({**TRAINER, "strategy": node}),
    "option of a strategy": lambda node: config.trainer(
        {**TRAINER, "strategy": {"_target_": "lightning.pytorch.strategies.DDPStrategy", "process_group_backend": node}}
    ),
    "trainer.plugins": lambda node: config.trainer({**TRAINER, "plugins": [node]}),
    "trainer.callbacks": lambda node: config.trainer({**TRAINER, "callbacks": {"mine": node}}),
    "module": lambda node: config.module(node, "task.module"),
    "option of a module": lambda node: config.module({"_target_": NET, "width": node}, "task.module"),
    "datamodule": lambda node: config.datamodule(node, "task.data"),
    "option of a datamodule": lambda node: config.datamodule({"_target_": DATA, "batch_size": node}, "task.data"),
}
"""Every place of a config that may hold a node, and places that may not."""

# What happens in the process that tries them

FAMILIES = {
    "ctypes": "dlopen",
    "os": "chmod exec fork forkpty kill link mkdir posix_spawn remove rename rmdir symlink system truncate",
    "pickle": "find_class",
    "pty": "spawn",
    "shutil": "chown copyfile copymode copytree make_archive move rmtree unpack_archive",
    "socket": "__new__ bind connect getaddrinfo",
    "subprocess": "Popen",
    "tempfile": "mkdtemp mkstemp",
    "urllib": "Request",
}
EFFECTS = {f"{family}.{name}" for family, names in FAMILIES.items() for name in names.split()}
"""Audit events that are effects whatever they are called with; `Watch` looks closer at others."""


class Ran(BaseException):
    """Stops what the watch has seen, so that the payload never does its work."""


class Watch:
    """An audit hook that notes what would have had an effect; it cannot be taken away again, so its process is its own."""

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self._folder = str(folder)
        self._armed = False
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        self.seen.clear()
        self._armed = True
        try:
            yield
        finally:
            self._armed = False

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self._armed and self._has_effect(event, args):
            self.seen.append(event)
            raise Ran(event)

    def _has_effect(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "open":
            _, mode, flags = args
            return bool(set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if event == "import":
            return "payload" in str(args[0])
        if event == "compile":
            source, name = args
            return str(name).startswith((self._folder, "payload")) or "payload" in str(source)
        if event == "exec":
            code = args[0]
            names = (*code.co_names, *code.co_consts)
            return code.co_filename.startswith(self._folder) or code.co_filename.endswith("__main__.py") or "payload" in repr(names)
        return event in EFFECTS


def try_all(folder: str) -> None:
    """In a process of its own: every target through every slot. Prints what was not refused as a mistake, and what ran."""
    watch = prepared(folder)
    tried, ran, passed = 0, [], {}
    for one in HOSTILE:
        for slot, build in SLOTS.items():
            tried += 1
            with watch.armed():
                try:
                    passed[f"{one.target} as {slot}"] = repr(build(one.node))
                except ConfigError:
                    pass
                except BaseException as error:  # noqa: BLE001 - whatever else ends it is a fault that the test shows
                    passed[f"{one.target} as {slot}"] = repr(error)
            ran += [f"{one.target} as {slot}: {event}" for event in watch.seen]
    imported = [name for name in sys.modules if name.startswith(("payload", "claimed", "schedulefree", "google.payload"))]
    print("\n" + json.dumps({"tried": tried, "ran": ran, "passed": passed, "imported": imported}))


def call_all(folder: str) -> None:
    """In a process of its own: every target without the gate, then those of the working folder without `trust.check`."""
    watch = prepared(folder)
    seen = {}
    for one in HOSTILE:
        with watch.armed(), contextlib.suppress(BaseException):
            call_without_the_gate(one.node)
        seen[one.target] = list(watch.seen)
    without_trust = {}
    trust.check = lambda *_: None
    for one in IN_THE_WORKING_FOLDER:
        with watch.armed(), contextlib.suppress(BaseException):
            config.optimizer_factory(one.node)
        without_trust[one.target] = list(watch.seen)
    print("\n" + json.dumps({"seen": seen, "without_trust": without_trust}))


def prepared(folder: str) -> Watch:
    """The watch, once what the targets need was imported: installed packages do much when they are."""
    sys.modules["__main__"].os = os  # type: ignore[attr-defined]
    for one in HOSTILE:
        if one not in IN_THE_WORKING_FOLDER and "payload" not in one.target and "__main__" not in one.target:
            with contextlib.suppress(ImportError, AttributeError, ValueError):
                pkgutil.resolve_name(one.target)
    return Watch(Path(folder))


def call_without_the_gate(node: Any) -> Any:
    """What Hydra's ``instantiate`` did before it had a list of what it refuses."""
    if isinstance(node, list):
        return [call_without_the_gate(item) for item in node]
    if not isinstance(node, dict):
        return node
    options = {name: call_without_the_gate(value) for name, value in node.items() if name != "_target_"}
    return pkgutil.resolve_name(node["_target_"])(*options.pop("_args_", ()), **options) if "_target_" in node else options


def in_a_process(function: Callable[[str], None], folder: Path) -> dict[str, Any]:
    for name, text in PAYLOAD.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    before = sorted(folder.rglob("*"))
    ended = subprocess.run(
        # -c leaves the working folder at the head of the search path, as a script in it would.
        [sys.executable, "-B", "-W", "ignore", "-c", f"from tests.test_trust import *; {function.__name__}({str(folder)!r})"],
        cwd=folder,
        env={**{key: value for key, value in os.environ.items() if key != TRUST_VARIABLE}, "PYTHONPATH": str(ROOT)},
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


def test_no_hostile_target_runs_in_any_slot(tmp_path: Path) -> None:
    answer = in_a_process(try_all, tmp_path)
    assert answer == {"tried": len(HOSTILE) * len(SLOTS), "ran": [], "passed": {}, "imported": []}


def test_the_watch_sees_what_each_of_them_does(tmp_path: Path) -> None:
    answer = in_a_process(call_all, tmp_path)
    assert answer["seen"] == {one.target: [one.effect] if one.effect else [] for one in HOSTILE}
    assert answer["without_trust"] == {one.target: [one.effect] for one in IN_THE_WORKING_FOLDER}, "it is trust that stops these"


def test_no_target_stands_twice() -> None:
    assert len({one.target for one in HOSTILE}) == len(HOSTILE) >= 100


# Whose code a config may bring in: what counts as installed


Install = Callable[..., Path]


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


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


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


@pytest.mark.parametrize(
    ("name", "about"),
    [
        ("lab-project", {"top_level": "labkit"}),
        ("lab-project", {"record": "labkit.pth __editable___labkit_finder.py", "top_level": "labkit"}),
        ("labkit", {"record": "labkit.pth"}),
        ("labkit", {}),
    ],
    ids=["top_level.txt", "top_level.txt and a finder", "a .pth file", "nothing"],
)
def test_an_editable_install_stays_in_its_project(
    site: Path, name: str, about: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    project = site.parent / "my project"
    write(project / "src" / "labkit" / "__init__.py")
    describe(site, name, edited=project, **about)
    monkeypatch.setattr(sys, "path", [*sys.path, str(project / "src")])
    trust.check("labkit.optim.Opt", "optimizer._target_")


def test_the_name_of_an_editable_install_is_compared_as_installers_do(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = site.parent / "project"
    write(project / "lab_kit.py")
    describe(site, "Lab-Kit", edited=project)
    monkeypatch.setattr(sys, "path", [*sys.path, str(project)])
    trust.check("lab_kit.Opt", "optimizer._target_")


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


def test_a_file_of_the_working_folder_may_not_stand_before_an_installed_package(site: Path) -> None:
    write(site / "labkit" / "__init__.py")
    describe(site, "labkit", "labkit/__init__.py")
    shadow = write(Path.cwd() / "labkit.py")
    assert refusal("labkit.Opt") == f"optimizer._target_: {shadow} stands before the installed package 'labkit'. {how('labkit')}"


def test_nor_before_an_editable_one(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = site.parent / "project"
    write(project / "labkit.py")
    describe(site, "labkit", edited=project)
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
    monkeypatch.setenv(TRUST_VARIABLE, "other:labkit.make::")
    assert trust.names() == {"other", "labkit.make"}
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

OWN_PROGRAM = """
import sys
import torch
from lightning_adaptive import config
from lightning_adaptive.errors import ConfigError

class Opt(torch.optim.SGD):
    pass

if __name__ == "__main__":
    for target in sys.argv[1:]:
        try:
            print(config.optimizer_factory({"_target_": target, "lr": 0.1}).func.__module__)
        except ConfigError as error:
            print(error)
"""


@pytest.mark.parametrize(
    ("start", "package"),
    [(["-m", "labprogram.train"], "trusted"), (["labprogram/train.py"], "refused")],
    ids=["as a module", "as a script"],
)
def test_the_running_program_may_name_its_own_classes(start: list[str], package: str, tmp_path: Path) -> None:
    write(tmp_path / "labprogram" / "__init__.py")
    write(tmp_path / "labprogram" / "train.py", OWN_PROGRAM)
    write(tmp_path / "labprogram" / "optim.py", OPT)
    write(tmp_path / "labprogram" / "beside.py", OPT)
    describe(tmp_path / "labprogram", "beside", "beside.py")
    write(tmp_path / "labother.py", OPT)
    ended = subprocess.run(
        [sys.executable, *start, "__main__.Opt", "labprogram.optim.Opt", "labother.Opt", "beside.Opt", "__main__.torch.load"],
        cwd=tmp_path,
        env={**{key: value for key, value in os.environ.items() if key != TRUST_VARIABLE}, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "__main__",
        "labprogram.optim" if package == "trusted" else not_installed("labprogram"),
        not_installed("labother"),
        not_installed("beside"),
        "optimizer._target_: __main__.torch.load is not a class of Optimizer, which belongs here.",
    ]


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
