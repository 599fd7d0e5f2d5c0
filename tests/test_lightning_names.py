"""The private names of Lightning that the package uses, each with a test; seen on the versions in `strategies.SEEN`.

When one of these fails on a new version, ``lightning_adaptive/strategies.py`` is the only file to mend.
"""

from __future__ import annotations

import inspect
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.optim import SGD

from lightning_adaptive.checkpoints import METADATA, read_metadata
from lightning_adaptive.strategies import SEEN, placement, warn_if_unseen
from tests.cpu_strategies import STRATEGIES, ShardableNet
from tests.pair import Pair
from tests.support import ROOT, Net, loader, trainer


def test_this_version_was_seen() -> None:
    assert lightning.__version__.startswith(SEEN)


def test_a_version_that_was_never_seen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning, "__version__", "2.60.0")
    with pytest.warns(UserWarning, match=r"^lightning 2\.60\.0 was never tested with lightning-adaptive \(tested: 2\.6\)\."):
        warn_if_unseen()


def test_metadata_of_a_sharded_folder_lies_where_it_is_read(pair: Pair, tmp_path: Path) -> None:
    assert pair.run(saved_folders, tmp_path) == [{"fsdp sharded": True, "fsdp2 sharded": True, "deepspeed 2": True}] * 2


def saved_folders(folder: Path) -> dict[str, bool]:
    warnings.simplefilter("ignore")
    found = {}
    for name in ("fsdp sharded", "fsdp2 sharded", "deepspeed 2"):
        saver = ModelCheckpoint(folder / name, filename="saved")
        runner = trainer(strategy=STRATEGIES[name](), devices=2, max_epochs=1, callbacks=[saver], enable_checkpointing=True)
        runner.fit(ShardableNet(), loader())
        metadata = read_metadata(folder / name / "saved.ckpt")
        found[name] = {"epoch", "global_step", "loops", "callbacks"} <= metadata.keys() and "state_dict" not in metadata
    return found


def test_lightning_calls_the_metadata_as_we_do() -> None:
    assert _METADATA_FILENAME == METADATA


def test_names_of_deepspeed(pair: Pair) -> None:
    assert pair.run(deepspeed_names) == [[]] * 2


def deepspeed_names() -> list[str]:
    """Those that are missing."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    names: dict[Any, list[str]] = {
        DeepSpeedEngine: ["_configure_optimizer", "client_optimizer", "client_lr_scheduler"],
        DeepSpeedZeroOptimizer: ["destroy", "bit16_groups", "single_partition_of_fp32_groups"],
        DeepSpeedZeroOptimizer_Stage3: ["destroy", "fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id"],
    }
    return [name for owner, owned in names.items() for name in owned if name not in inspect.getsource(owner)]


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


def test_fsdp_still_wraps_in_a_method_of_this_name() -> None:
    assert "self.model = self._setup_model(self.model)" in inspect.getsource(FSDPStrategy.setup)


def test_zero_3_without_an_optimizer_still_lacks_what_is_asked_of_it(pair: Pair) -> None:
    """When this fails, the repair in ``DeepSpeed.tested_as_fitted`` can go."""
    assert pair.run(deepspeed_lacks) == [True] * 2


def deepspeed_lacks() -> bool:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    name = "_restore_from_bit16_weights"
    return name in inspect.getsource(DeepSpeedEngine.load_checkpoint) and not hasattr(DeepSpeedZeRoOffload, name)


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


def test_names_of_the_loops_that_an_exact_resume_uses() -> None:
    runner = trainer(max_epochs=1, limit_train_batches=2)
    runner.fit(Net(), loader())
    loop = runner.fit_loop
    assert {"_combined_loader", "_data_fetcher", "epoch_progress"} <= vars(loop).keys()
    assert {"_batches_that_stepped", "batch_progress", "val_loop"} <= vars(loop.epoch_loop).keys()
    assert "_has_run" in vars(loop.epoch_loop.val_loop)
    assert isinstance(runner._logger_connector._callback_metrics, dict)
    assert inspect.signature(loop.epoch_loop._should_check_val_fx).parameters.keys() == {"data_fetcher"}
    assert {"interval", "update_plateau_schedulers"} == inspect.signature(loop.epoch_loop.update_lr_schedulers).parameters.keys()


def test_the_counters_of_a_checkpoint_have_the_names_that_are_repaired() -> None:
    runner = trainer(max_epochs=1)
    runner.fit(Net(), loader())
    state = runner.fit_loop.state_dict()
    counters = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress")
    for name in counters:
        assert state[name]["current"].keys() == {"ready", "started", "processed", "completed"}
        assert state[name]["total"].keys() == state[name]["current"].keys()
    assert state["epoch_loop.batch_progress"]["is_last_batch"] is True
    assert state["epoch_loop.state_dict"] == {"_batches_that_stepped": 8}


def test_names_that_tell_a_step_s_gradients(pair: Pair) -> None:
    assert "_should_accumulate" in vars(_TrainingEpochLoop)
    assert DDPStrategy(ddp_comm_hook=print)._ddp_comm_hook is print
    assert pair.run(flattened) == [[(676, [512, 32, 128, 4])]] * 2


def flattened() -> list[tuple[int, list[int]]]:
    """Elements of FSDP's flat vectors, and of the parameters in them."""
    found: list[tuple[int, list[int]]] = []

    class Looking(Callback):
        def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
            found.extend(
                (sum(count for _, count in held), [count for _, count in held]) for _, held in placement(trainer).flat_parameters()
            )

    runner = trainer(strategy=STRATEGIES["fsdp sharded"](), devices=2, max_epochs=1, limit_train_batches=1, callbacks=[Looking()])
    runner.fit(Net(), loader())
    return found


def test_the_fit_loop_does_not_listen_to_restarting_under_max_steps() -> None:
    """Why `exact_resume` goes past its setter, to the one of its base."""
    runner = trainer(max_steps=4)
    runner.fit(Net(), loader())
    runner.fit_loop.restarting = False
    assert runner.fit_loop.restarting
    _Loop.restarting.fset(runner.fit_loop, False)  # type: ignore[attr-defined]
    assert not runner.fit_loop.restarting
    assert not runner.fit_loop.epoch_loop.restarting


def test_a_sampler_that_lightning_makes_distributed_is_reached() -> None:
    sampler = torch.utils.data.WeightedRandomSampler([1.0] * 4, 4)
    wrapper = DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)
    assert wrapper.dataset._sampler is sampler
