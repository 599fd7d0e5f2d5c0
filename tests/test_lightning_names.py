"""The private names of Lightning that the package uses, each with a test; seen on the versions in `SEEN`.

When one of these fails on a new version, ``lightning_adaptive/strategies.py`` is the only file to mend.
"""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path

import lightning
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.optim import SGD

from tests.support import ROOT, Net, loader, trainer

SEEN = ("2.6",)


def test_this_version_was_seen() -> None:
    assert lightning.__version__.startswith(SEEN)


def test_the_loop_steps_the_wrappers_that_only_the_setter_changes() -> None:
    strategy = SingleDeviceStrategy(device="cpu")
    first, second = SGD([torch.zeros(1)], lr=0.1), SGD([torch.zeros(1)], lr=0.1)
    strategy.optimizers = [first]
    strategy.optimizers[0] = second
    assert strategy._lightning_optimizers[0].optimizer is first  # the silent no-op of the forums
    strategy.optimizers = [second]
    assert strategy._lightning_optimizers[0].optimizer is second


def test_optimizers_to_device_moves_state_but_not_the_step() -> None:
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    _optimizers_to_device([optimizer], torch.device("meta"))
    [state] = optimizer.state.values()
    assert (state["sum"].device.type, state["step"].device.type) == ("meta", "cpu")


def test_setup_data_is_idempotent_and_gives_the_number_of_batches() -> None:
    runner = trainer(max_epochs=1, limit_train_batches=3)
    runner.fit(Net(), loader())
    combined = runner.fit_loop._combined_loader
    runner.fit_loop.setup_data()
    assert runner.fit_loop._combined_loader is combined
    assert runner.num_training_batches == 3


def test_the_observer_of_processes_keeps_them_in_a_list_that_may_be_emptied() -> None:
    observer = _ChildProcessObserver(main_pid=0, child_processes=[])
    assert observer._run() is True
    assert "_child_processes" in vars(observer)


def test_the_launcher_kills_its_processes() -> None:
    assert inspect.signature(_SubprocessScriptLauncher.kill).parameters.keys() == {"self", "signum"}


def test_no_private_name_is_used_outside_of_the_two_files_that_may() -> None:
    allowed = {"strategies.py", "exact_resume.py"}
    reach = re.compile(r"(?:trainer|strategy|fit_loop|launcher|connector|loop)\._[a-z]\w+|from lightning\S* import [^\n]*\b_[a-z]")
    found = {
        f"{path.name}: {match.group()}"
        for path in Path(ROOT, "lightning_adaptive").rglob("*.py")
        if path.name not in allowed
        for match in reach.finditer(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_partial_hooks_count_as_overridden() -> None:
    from lightning.pytorch.utilities.model_helpers import is_overridden

    model = Net()
    model.configure_optimizers = partial(Net.configure_optimizers, model)
    assert is_overridden("configure_optimizers", model)
