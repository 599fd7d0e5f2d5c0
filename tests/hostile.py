"""Targets that a config must not reach, every place of a config that may hold one, and a watch over what they would do.

Run by tests/test_trust.py in a process of its own, since an audit hook cannot be taken away again.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lightning_adaptive import attach, config, trust
from lightning_adaptive.errors import ConfigError
from tests.support import Net

TOUCH = "touch payload_ran"


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
    "piece of a schedule": lambda node: config.scheduler({"_target_": "lightning_adaptive.Piecewise", "pieces": {"mine": node}}),
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
    """An audit hook that notes and stops what would have an effect, while it is armed.

    Args:
        folder: the working folder; code in a file of it is never to run.
    """

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


def main(folder: str) -> None:
    """Tries every target in every slot, then calls them without the gate, and prints what happened."""
    watch = prepared(folder)
    print("\n" + json.dumps({"tried": try_all(watch), "called": call_all(watch), "without trust": without_trust(watch)}))


def try_all(watch: Watch) -> dict[str, Any]:
    """Every target through every slot: how many, what ran, what was not refused as a mistake, and what was imported."""
    count, ran, passed = 0, [], {}
    for one in HOSTILE:
        for slot, build in SLOTS.items():
            count += 1
            with watch.armed():
                try:
                    passed[f"{one.target} as {slot}"] = repr(build(one.node))
                except ConfigError:
                    pass
                except BaseException as error:  # noqa: BLE001 - whatever else ends it is a fault that the test shows
                    passed[f"{one.target} as {slot}"] = repr(error)
            ran += [f"{one.target} as {slot}: {event}" for event in watch.seen]
    imported = [name for name in sys.modules if name.startswith(("payload", "claimed", "schedulefree", "google.payload"))]
    return {"count": count, "ran": ran, "passed": passed, "imported": imported}


def call_all(watch: Watch) -> dict[str, list[str]]:
    """What the watch sees of each target when there is no gate."""
    seen = {}
    for one in HOSTILE:
        with watch.armed(), contextlib.suppress(BaseException):
            call_without_the_gate(one.node)
        seen[one.target] = list(watch.seen)
    return seen


def without_trust(watch: Watch) -> dict[str, list[str]]:
    """What it sees of the working folder's when there is the gate, but without its first question."""
    trust.check = lambda *_: None
    seen = {}
    for one in IN_THE_WORKING_FOLDER:
        with watch.armed(), contextlib.suppress(BaseException):
            config.optimizer_factory(one.node)
        seen[one.target] = list(watch.seen)
    return seen


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
