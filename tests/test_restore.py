"""The right phase stands before anything of a checkpoint is loaded: every strategy, every way to name a checkpoint."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_adaptive import CheckpointError, ConfigError, OptimizerSwitchCallback
from lightning_adaptive.strategies import running_optimizer
from tests.cpu_strategies import STRATEGIES, CpuDeepSpeed, ShardableNet, whole_weights
from tests.pair import Pair
from tests.support import ROOT, Net, loader, trainer

EPOCHS = 4
TO_SGD = partial(SGD, lr=0.1, momentum=0.9)
Weights = dict[str, torch.Tensor]
slow = partial(pytest.param, marks=pytest.mark.slow)


def _model_parallel(data: int, tensor: int, sharded: bool = True) -> Strategy:
    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor, save_distributed_checkpoint=sharded)


class ForcedLate(CpuDeepSpeed):
    """Offloads to the CPU and has the engine insist on an optimizer of DeepSpeed's own from then on.

    From the start it would insist on one for the first phase too, and DeepSpeed would compile that for minutes.
    """

    def setup(self, trainer: Trainer) -> None:
        super().setup(trainer)
        self.deepspeed_engine._config.zero_force_ds_cpu_optimizer = True


def _deepspeed(stage: int, cls: type[CpuDeepSpeed] = CpuDeepSpeed, offload: bool = False, **config: Any) -> Strategy:
    strategy = cls(
        stage=stage,
        zero_optimization=stage > 0,
        offload_optimizer=offload,
        initial_scale_power=16,
        loss_scale_window=3,
        hysteresis=1,
    )
    assert isinstance(strategy.config, dict)
    strategy.config.update(config)
    return strategy


ALL: dict[str, Callable[[], Strategy]] = {
    **STRATEGIES,
    "fsdp2 alone": partial(_model_parallel, 1, 1),
    "tensor parallel sharded": partial(_model_parallel, 1, 2),
    "tensor parallel full": partial(_model_parallel, 1, 2, sharded=False),
    "deepspeed 0": partial(_deepspeed, 0),
    "deepspeed 1 fp32 gradients": partial(_deepspeed, 1, data_types={"grad_accum_dtype": "fp32"}),
    **{f"deepspeed {stage} scaled": partial(_deepspeed, stage) for stage in (1, 2, 3)},
    **{
        f"deepspeed {stage} offloaded": partial(_deepspeed, stage, offload=True, zero_force_ds_cpu_optimizer=False)
        for stage in (1, 2, 3)
    },
    "deepspeed 2 forced": partial(_deepspeed, 2, offload=True),
    "deepspeed 2 forced late": partial(_deepspeed, 2, ForcedLate, offload=True, zero_force_ds_cpu_optimizer=False),
    "deepspeed 2 tested only": partial(_deepspeed, 2, zero_allow_untested_optimizer=False),
}


@dataclass(frozen=True)
class Case:
    """One run that switches from Adam.

    Args:
        strategy: name in `ALL`, for two processes; ``None`` is one process.
        net: class of the model.
        at: the moment.
        target: the optimizer that it switches to.
        policy: ``on_resume``.
        batch: size of a batch on a process.
        options: the trainer's.
        besides: the switch's other options.
    """

    strategy: str | None
    net: type[LightningModule] = ShardableNet
    at: str = "2ep"
    target: Callable[..., Optimizer] = TO_SGD
    policy: Any = "error"
    batch: int = 8
    options: dict[str, Any] = field(default_factory=dict)
    besides: dict[str, Any] = field(default_factory=dict)

    def switch(self, cls: type[OptimizerSwitchCallback] = OptimizerSwitchCallback) -> OptimizerSwitchCallback:
        return cls(at=self.at, optimizer=self.target, on_resume=self.policy, **self.besides)

    def trainer(self, *callbacks: Callback, **options: Any) -> Trainer:
        strategy = {} if self.strategy is None else {"strategy": ALL[self.strategy](), "devices": 2}
        return trainer(
            **{
                "max_epochs": EPOCHS,
                "callbacks": list(callbacks),
                "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
                **strategy,
                **self.options,
                **options,
            }
        )

    def loader(self) -> Any:
        return loader(batch_size=self.batch)


@dataclass(frozen=True)
class Ended:
    """What a run ended with, on one process: whole weights, and the steps of each class."""

    weights: Weights
    steps: Counter[str]


class Look(Callback):
    """Keeps the whole weights of each epoch's end."""

    def __init__(self) -> None:
        self.epochs: list[Weights] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(whole_weights(trainer))


@contextmanager
def counted_updates() -> Iterator[Counter[str]]:
    """Counts each class's steps with a learning rate; FSDP2 makes others without when it saves or loads."""
    counts: Counter[str] = Counter()

    def count(optimizer: Optimizer, *_: Any) -> None:
        counts[type(optimizer).__name__] += any(group["lr"] for group in optimizer.param_groups)

    handle = register_optimizer_step_post_hook(count)
    try:
        yield counts
    finally:
        handle.remove()


def each_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="epoch{epoch}", auto_insert_metric_name=False, save_top_k=-1)


def saved(folder: Path, epochs_done: int) -> Path:
    return folder / f"epoch{epochs_done - 1}.ckpt"


def fit(case: Case, runner: Trainer, ckpt_path: Any = None) -> Ended:
    """Fits a new model; the trainer has a `Look`."""
    seed_everything(1, verbose=False)
    [look] = [callback for callback in runner.callbacks if isinstance(callback, Look)]
    with counted_updates() as steps:
        runner.fit(case.net(), case.loader(), ckpt_path=ckpt_path, weights_only=True)
    return Ended(look.epochs[-1], +steps)


def run(case: Case, folder: Path, epochs_done: int = 0) -> Ended:
    """Trains and saves each epoch; or goes on where so many epochs were done, and saves nothing."""
    warnings.simplefilter("ignore")
    if epochs_done:
        return fit(case, case.trainer(case.switch(), Look()), saved(folder, epochs_done))
    return fit(case, case.trainer(case.switch(), Look(), each_epoch(folder)))


def run_everywhere(case: Case, folder: Path) -> list[Ended]:
    """The uninterrupted run, then a run from the end of each epoch."""
    return [run(case, folder, epochs_done) for epochs_done in range(EPOCHS)]


def difference(one: Weights, other: Weights) -> float:
    """The largest absolute difference of any weight."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def classes(switch: int, steps_per_epoch: int, epochs_done: int = 0, names: tuple[str, str] = ("Adam", "SGD")) -> Counter[str]:
    """What each class must step when so many epochs were done before."""
    begin, end = epochs_done * steps_per_epoch, EPOCHS * steps_per_epoch
    return +Counter({names[0]: max(switch - begin, 0), names[1]: end - max(switch, begin)})


def assert_one_run(ranks: list[list[Ended]], switch: int, steps_per_epoch: int, names: tuple[str, str] = ("Adam", "SGD")) -> None:
    """All of `run_everywhere` ended in the same weights on every process, and the right class made each step."""
    reference = ranks[0][0].weights
    for runs in ranks:
        for epochs_done, ended in enumerate(runs):
            assert ended.steps == classes(switch, steps_per_epoch, epochs_done, names), f"after {epochs_done} epochs"
            assert difference(ended.weights, reference) == 0, f"after {epochs_done} epochs"


# Tensor parallelism


class ParallelNet(Net):
    """Splits its layers over the processes, each of which sees every sample."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["tensor_parallel"]
        parallelize_module(self.net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})

    def on_train_start(self) -> None:
        weight: Any = self.net[0].weight
        assert (weight.shape, weight.to_local().shape) == ((32, 16), (16, 16))


@pytest.mark.parametrize("strategy", ["tensor parallel sharded", "tensor parallel full"])
def test_layers_that_are_split_switch_and_resume(strategy: str, pair: Pair, tmp_path: Path) -> None:
    case = Case(strategy, net=ParallelNet)
    assert_one_run(pair.run(run_everywhere, case, tmp_path), switch=16, steps_per_epoch=8)


# Checkpoints that Lightning finds by itself


class Stop(Callback):
    """Ends the run after so many epochs."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch + 1 == self.epochs:
            self.end(trainer)

    def end(self, trainer: Trainer) -> None:
        trainer.should_stop = True


class Requeue(Stop):
    """SLURM's warning before it takes the machine away: Lightning saves and asks for another."""

    def end(self, trainer: Trainer) -> None:
        signal.raise_signal(signal.SIGUSR1)
        super().end(trainer)


def resumed_by_name(case: Case, folder: Path, epochs: int) -> Ended:
    """Stops after so many epochs, and goes on with ``ckpt_path="last"``."""
    warnings.simplefilter("ignore")
    newest = partial(ModelCheckpoint, folder, save_last=True)
    fit(case, case.trainer(case.switch(), Look(), Stop(epochs), newest()))
    return fit(case, case.trainer(case.switch(), Look(), newest()), "last")


def resumed_by_slurm(case: Case, folder: Path, epochs: int) -> Ended:
    """SLURM stops the job after so many epochs, and starts it again as it was."""
    warnings.simplefilter("ignore")
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    scontrol = folder / f"bin{rank}" / "scontrol"
    scontrol.parent.mkdir(parents=True)
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n', encoding="utf-8")
    scontrol.chmod(0o755)
    job = {
        "SLURM_JOB_NAME": "train",
        "SLURM_JOB_ID": "70",
        "SLURM_NTASKS": world,
        "SLURM_NTASKS_PER_NODE": world,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_NODEID": "0",
        "PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}",
    }
    with mock.patch.dict(os.environ, job):
        start = partial(case.trainer, case.switch(), Look(), default_root_dir=folder)
        fit(case, case.trainer(case.switch(), Look(), Requeue(epochs), plugins=[SLURMEnvironment()], default_root_dir=folder))
        return fit(case, start(plugins=[SLURMEnvironment()]))


BY_ITSELF = {"by name": resumed_by_name, "by SLURM": resumed_by_slurm}


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("way", BY_ITSELF)
def test_a_checkpoint_that_lightning_finds_resumes_on_one_process(way: str, epochs: int, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        reference = run(Case(None), tmp_path / "reference")
        ended = BY_ITSELF[way](Case(None), tmp_path / "stopped", epochs)
    assert ended.steps == classes(16, 8, epochs)
    assert difference(ended.weights, reference.weights) == 0
    if way == "by SLURM":
        assert (tmp_path / "stopped" / "hpc_ckpt_1.ckpt").is_file()
        assert (tmp_path / "stopped" / "requeued").read_text() == "requeue 70\n"


@pytest.mark.parametrize("epochs", [1, 3])
@pytest.mark.parametrize("way", BY_ITSELF)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2 sharded", "deepspeed 2"])
def test_a_checkpoint_that_lightning_finds_resumes_on_two_processes(
    strategy: str, way: str, epochs: int, pair: Pair, tmp_path: Path
) -> None:
    reference = pair.run(run, Case(strategy), tmp_path / "reference")[0]
    for ended in pair.run(BY_ITSELF[way], Case(strategy), tmp_path / "stopped", epochs):
        assert ended.steps == classes(8, 4, epochs)
        assert difference(ended.weights, reference.weights) == 0
    if way == "by SLURM":
        assert (tmp_path / "stopped" / "hpc_ckpt_1.ckpt").is_dir() == (strategy != "ddp")


# Evaluation


class EvaluatedNet(ShardableNet):
    """Can be validated, tested and asked for predictions; its layers are sharded once, though Lightning asks again."""

    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            super().configure_model()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    test_step = predict_step = validation_step


class Evaluated(Callback):
    """Keeps the whole weights that were evaluated."""

    weights: Weights

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = whole_weights(trainer)

    on_test_end = on_predict_end = on_validation_end


VERBS = ("validate", "test", "predict")


def evaluated(case: Case, folder: Path) -> list[float]:
    """Difference of the evaluated weights from those of the epoch: the fitted trainer, then others with and without a switch."""
    warnings.simplefilter("ignore")
    look, seen, model = Look(), Evaluated(), case.net()
    fitted = case.trainer(case.switch(), look, seen, each_epoch(folder))
    seed_everything(1, verbose=False)
    fitted.fit(model, case.loader())
    differences = []

    def evaluate(verb: str, runner: Trainer, module: LightningModule, epochs_done: int) -> None:
        getattr(runner, verb)(module, case.loader(), ckpt_path=saved(folder, epochs_done), weights_only=True)
        differences.append(difference(seen.weights, look.epochs[epochs_done - 1]))

    for epochs_done in (1, EPOCHS):
        for verb in VERBS:
            evaluate(verb, fitted, model, epochs_done)
            evaluate(verb, case.trainer(case.switch(), seen), case.net(), epochs_done)
            evaluate(verb, case.trainer(seen), case.net(), epochs_done)
    assert isinstance(running_optimizer(fitted), SGD)
    return differences


@pytest.mark.filterwarnings("ignore:The '.*' does not have many workers")
def test_checkpoints_of_either_phase_are_evaluated_on_one_process(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        assert evaluated(Case(None, net=EvaluatedNet), tmp_path) == [0] * 18
        for epochs_done in (1, EPOCHS):
            model = Net.load_from_checkpoint(saved(tmp_path, epochs_done), weights_only=True)
            file = torch.load(saved(tmp_path, epochs_done), weights_only=True)
            assert difference(model.state_dict(), file["state_dict"]) == 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2 sharded", "fsdp2 full", "deepspeed 2"])
def test_checkpoints_of_either_phase_are_evaluated_on_two_processes(strategy: str, pair: Pair, tmp_path: Path) -> None:
    assert pair.run(evaluated, Case(strategy, net=EvaluatedNet), tmp_path) == [[0] * 18] * 2


@pytest.mark.parametrize("epochs_done", [1, 3])
def test_a_fit_after_an_evaluation_begins_anew(epochs_done: int, tmp_path: Path) -> None:
    case = Case(None, net=EvaluatedNet)
    with warnings.catch_warnings():
        reference = run(case, tmp_path)
        runner = case.trainer(case.switch(), Look())
        runner.validate(case.net(), case.loader(), ckpt_path=saved(tmp_path, epochs_done), weights_only=True)
        assert difference(fit(case, runner).weights, reference.weights) == 0
        disabled = case.trainer(OptimizerSwitchCallback(enabled=False), Look())
        disabled.validate(case.net(), case.loader(), ckpt_path=saved(tmp_path, epochs_done), weights_only=True)
        assert fit(case, disabled).steps == {"Adam": 32}


def test_an_evaluation_does_not_move_the_switch(tmp_path: Path) -> None:
    case = Case(None, net=EvaluatedNet)
    with warnings.catch_warnings():
        run(case, tmp_path)
        switch = case.switch()
        runner = case.trainer(switch, Look())
        fit(case, runner)
        runner.test(runner.lightning_module, case.loader(), ckpt_path=saved(tmp_path, 1), weights_only=True)
    assert (switch.phase, switch.first_step) == (1, 16)


# Other numbers of processes


def test_a_run_of_one_process_resumes_on_two(pair: Pair, tmp_path: Path) -> None:
    """An epoch has half the steps then; moments are counted in the steps of the whole run."""
    with warnings.catch_warnings():
        run(Case(None, at="10st"), tmp_path)
    case = Case("ddp", at="10st", policy="config")
    for epochs_done, steps in ((1, {"Adam": 2, "SGD": 10}), (3, {"SGD": 4})):
        one, other = pair.run(run, case, tmp_path, epochs_done)
        assert one.steps == other.steps == steps
        assert difference(one.weights, other.weights) == 0


def alone(folder: Path) -> dict[str, Any]:
    """On one process what two have saved: a folder of FSDP2 against a file of DDP, then with the same batches as before."""
    case = Case("fsdp2 alone", at="10st", policy="config", options={"devices": 1})
    found: dict[str, Any] = {}
    for epochs_done in (1, 3):
        sharded = run(case, folder / "fsdp2 sharded", epochs_done)
        file = run(replace(case, strategy="ddp"), folder / "ddp", epochs_done)
        same_batches = run(replace(case, policy="error", batch=16), folder / "fsdp2 sharded", epochs_done)
        reference = torch.load(folder / "weights", weights_only=True)
        found[str(epochs_done)] = {
            "steps": sharded.steps,
            "from the file": difference(sharded.weights, file.weights),
            "from two processes": difference(same_batches.weights, reference),
        }
    return found


def test_a_folder_of_two_processes_resumes_on_one(pair: Pair, tmp_path: Path) -> None:
    for strategy in ("ddp", "fsdp2 sharded"):
        ended = pair.run(run, Case(strategy, at="10st"), tmp_path / strategy)[0]
    torch.save(ended.weights, tmp_path / "weights")
    code = "import json, pathlib, sys; from tests.test_restore import alone; print(json.dumps(alone(pathlib.Path(sys.argv[1]))))"
    # A process of its own: one whose group has a single member.
    command = [sys.executable, "-c", code, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for epochs_done, steps in (("1", {"Adam": 6, "SGD": 18}), ("3", {"SGD": 8})):
        assert found[epochs_done]["steps"] == steps
        assert found[epochs_done]["from the file"] == 0
        assert found[epochs_done]["from two processes"] < 1e-6  # one sum over 16 samples instead of two over 8


# DeepSpeed: loss scale, fp32 weights, offload


@contextmanager
def half_precision() -> Iterator[None]:
    """DeepSpeed allows fp16 on CPUs that are quick at it; torch computes it on any."""
    from deepspeed.accelerator import get_accelerator

    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True):
        yield


class Scales(OptimizerSwitchCallback):
    """Notes the loss scale and the fp32 weights that DeepSpeed keeps, before and after each exchange."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[tuple[float, int, list[torch.Tensor]]] = []

    def _exchange(self, trainer: Trainer, *arguments: Any) -> None:
        self._note(trainer)
        super()._exchange(trainer, *arguments)
        self._note(trainer)

    def _note(self, trainer: Trainer) -> None:
        wrapper = trainer.strategy.model.optimizer
        scaler = getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)
        owned = vars(wrapper)
        kept = next((owned[name] for name in owned if "fp32" in name and "partition" in name and owned[name]), None)
        flat = kept or [tensor for group in owned["fp32_groups"] for tensor in group]
        copies = [tensor.detach().clone() for tensor in flat]
        self.seen.append((getattr(scaler, "cur_scale", 1.0), id(scaler), copies))


def scaled(case: Case, folder: Path) -> tuple[list[Ended], float, bool, bool]:
    """`run_everywhere`; the scale at the switch; whether the scaler and the fp32 weights were carried bit for bit."""
    warnings.simplefilter("ignore")
    with half_precision():
        switch = case.switch(Scales)
        fit(case, case.trainer(switch, Look()))
        (scale, scaler, weights), (scale_after, scaler_after, weights_after) = switch.seen
        same = all(torch.equal(one, other) for one, other in zip(weights, weights_after, strict=True))
        rounded = all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights)
        assert not rounded  # so rounding would show
        return run_everywhere(case, folder), scale, (scale, scaler) == (scale_after, scaler_after), same


WRAPPERS = [
    slow("deepspeed 1 scaled", "16-mixed"),
    ("deepspeed 2 scaled", "16-mixed"),
    slow("deepspeed 3 scaled", "16-mixed"),
    slow("deepspeed 2 scaled", "16-true"),
    *((f"deepspeed {stage}", "bf16-mixed") for stage in (1, 2, 3)),
    slow("deepspeed 1 fp32 gradients", "bf16-mixed"),
    ("deepspeed 0", "16-mixed"),
    slow("deepspeed 0", "bf16-mixed"),
]


@pytest.mark.parametrize(("strategy", "precision"), WRAPPERS)
def test_deepspeeds_loss_scale_and_fp32_weights_cross_the_switch(strategy: str, precision: str, pair: Pair, tmp_path: Path) -> None:
    case = Case(strategy, options={"precision": precision})
    for runs, scale, scaler_is_kept, weights_are_kept in pair.run(scaled, case, tmp_path):
        assert precision == "bf16-mixed" or scale != 2**16  # a new scaler would begin there
        assert scaler_is_kept
        assert weights_are_kept
        for ended in runs:
            assert difference(ended.weights, runs[0].weights) == 0


def cpu_adam(parameters: Any, lr: float = 1e-2) -> Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(parameters, lr=lr)


class CpuAdamNet(ShardableNet):
    """Its own optimizer is DeepSpeed's Adam for the CPU, which DeepSpeed compiles when it is first used on a machine."""

    def configure_optimizers(self) -> Any:
        return cpu_adam(self.parameters())


@pytest.mark.parametrize("stage", [slow(1), 2, slow(3)])
def test_an_offloaded_optimizer_switches_and_resumes(stage: int, pair: Pair, tmp_path: Path) -> None:
    ranks = pair.run(run_everywhere, Case(f"deepspeed {stage} offloaded"), tmp_path / "offloaded")
    assert_one_run(ranks, switch=8, steps_per_epoch=4)
    ddp = pair.run(run, Case("ddp"), tmp_path / "ddp")[0]
    assert difference(ranks[0][0].weights, ddp.weights) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "names"),
    [
        (Case("deepspeed 2 offloaded", net=CpuAdamNet), ("DeepSpeedCPUAdam", "SGD")),
        (Case("deepspeed 2 offloaded", target=partial(cpu_adam, lr=1e-3)), ("Adam", "DeepSpeedCPUAdam")),
        (Case("deepspeed 2 forced", net=CpuAdamNet, target=partial(cpu_adam, lr=1e-3)), ("DeepSpeedCPUAdam", "DeepSpeedCPUAdam")),
    ],
    ids=["source", "target", "both"],
)
def test_deepspeeds_adam_for_the_cpu(case: Case, names: tuple[str, str], pair: Pair, tmp_path: Path) -> None:
    ranks = pair.run(run_everywhere, case, tmp_path, timeout=1200)
    if names[0] == names[1]:
        assert ranks[0][0].steps == {names[0]: 16}
        for ended in ranks[0]:
            assert difference(ended.weights, ranks[0][0].weights) == 0
    else:
        assert_one_run(ranks, switch=8, steps_per_epoch=4, names=names)


def refused(case: Case) -> str:
    """The error that ends the run before its first step."""
    warnings.simplefilter("ignore")
    with counted_updates() as steps:
        try:
            case.trainer(case.switch()).fit(case.net(), case.loader())
        except ConfigError as error:
            assert not steps
            return str(error)
    return ""


STATELESS = (
    "switch.optimizer.momentum: SGD without momentum keeps no state, and Lightning cannot load a checkpoint of such an optimizer "
    "under FSDP. Give it momentum, or use ModelParallelStrategy (FSDP2) with save_distributed_checkpoint=True."
)
CLASSES = {"fsdp sharded": "CpuFSDP", "fsdp2 sharded": "ModelParallelStrategy", "deepspeed 1": "CpuDeepSpeed"}
REFUSED = {
    "offloaded": (
        Case("deepspeed 2 forced late"),
        "switch.optimizer: DeepSpeed takes no SGD here, only DeepSpeedCPUAdam, as its optimizer lies on the CPU. For another class "
        "put zero_force_ds_cpu_optimizer: false into trainer.strategy.config.",
    ),
    "not tested with ZeRO": (
        Case("deepspeed 2 tested only"),
        "switch.optimizer: DeepSpeed takes no SGD here, only the classes that it was tested with, such as Adam and AdamW. For "
        "another class put zero_allow_untested_optimizer: true into trainer.strategy.config.",
    ),
    "windows over the end of an epoch": (
        Case("deepspeed 2", options={"accumulate_grad_batches": 2, "limit_train_batches": 3}),
        "trainer.accumulate_grad_batches: under DeepSpeed 2 does not go with 3 batches an epoch: it accumulates over the epoch's "
        "end, and Lightning counts other steps than are made. Write a divisor, or cut the rest off with "
        "trainer.limit_train_batches=2.",
    ),
    "another clipping value": (
        Case("deepspeed 2", besides={"gradient_clip_val": 1.0}),
        "switch.gradient_clip_val: 1.0 cannot be set under DeepSpeed: its config fixes clipping for the whole run. Write 'keep'.",
    ),
    **{
        f"a closure, {strategy}": (
            Case(strategy, target=LBFGS),
            f"switch.optimizer: LBFGS needs the whole parameters and a closure, which {name} does not give. Use one process or "
            "DDP.",
        )
        for strategy, name in CLASSES.items()
    },
    "no state, fsdp sharded": (Case("fsdp sharded", target=partial(SGD, lr=0.1)), STATELESS),
    "no state, fsdp full": (Case("fsdp full", target=partial(SGD, lr=0.1)), STATELESS),
    "no state, fsdp2 full": (Case("fsdp2 full", target=partial(SGD, lr=0.1)), STATELESS),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_fail_at_the_switch_or_at_a_resume_is_refused_at_the_start(name: str, pair: Pair) -> None:
    case, message = REFUSED[name]
    assert pair.run(refused, case) == [message] * 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2 sharded", "deepspeed 2"])
def test_an_optimizer_without_state_resumes(strategy: str, pair: Pair, tmp_path: Path) -> None:
    case = Case(strategy, target=partial(SGD, lr=0.1))
    assert_one_run(pair.run(run_everywhere, case, tmp_path), switch=8, steps_per_epoch=4)


# Accumulated gradients


class UndividedNet(ShardableNet):
    """Takes back one of the two divisions by the number of accumulated batches, Lightning's and DeepSpeed's."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.trainer.accumulate_grad_batches


ACCUMULATED = {
    "ddp": ShardableNet,
    "fsdp sharded": ShardableNet,
    "fsdp2 sharded": ShardableNet,
    **dict.fromkeys(["deepspeed 1", "deepspeed 2", "deepspeed 3"], UndividedNet),
}


@pytest.mark.parametrize("strategy", [slow(name) if name in ("deepspeed 1", "deepspeed 3") else name for name in ACCUMULATED])
def test_a_switch_between_accumulated_steps_resumes_and_ends_as_ddp_does(strategy: str, pair: Pair, tmp_path: Path) -> None:
    """The third epoch has its switch in the middle, after the fifth of eight steps of two batches each."""
    case = Case(strategy, net=ACCUMULATED[strategy], at="5st", options={"accumulate_grad_batches": 2})
    ranks = pair.run(run_everywhere, case, tmp_path / "this")
    assert_one_run(ranks, switch=5, steps_per_epoch=2)
    ddp = pair.run(run, replace(case, strategy="ddp", net=ShardableNet), tmp_path / "ddp")[0]
    # FSDP2 and ZeRO average over the processes before they add the batches up, DDP after it.
    assert difference(ranks[0][0].weights, ddp.weights) < 1e-6


class SgdNet(ShardableNet):
    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


def one_step(case: Case) -> tuple[Weights, list[str]]:
    """How far the first step goes, and what was warned of."""
    look, net = Look(), case.net()
    before = {name: tensor.detach().clone() for name, tensor in net.named_parameters()}
    seed_everything(1, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        case.trainer(case.switch(), look, max_epochs=2).fit(net, case.loader())
    return {name: look.epochs[0][name] - before[name] for name in before}, [str(warning.message) for warning in caught]


def test_gradients_that_lightning_and_deepspeed_both_divide_are_said(pair: Pair) -> None:
    """When this fails, one of the two no longer divides, and the warning is to go."""
    case = Case("ddp", net=SgdNet, at="1ep", options={"accumulate_grad_batches": 2, "limit_train_batches": 2})
    (step, _), _ = pair.run(one_step, case)
    (half, said), _ = pair.run(one_step, replace(case, strategy="deepspeed 2"))
    for name in step:
        torch.testing.assert_close(2 * half[name], step[name], rtol=1e-4, atol=1e-7)  # differences of rounded weights
    assert (
        "trainer.accumulate_grad_batches=2: Lightning divides the loss by it, and DeepSpeed divides it again, so gradients are 2 "
        "times too small. Adam does not mind, SGD does. Multiply the loss that training_step returns by it."
    ) in said


# A gradient scaler on one process


class InfiniteNet(Net):
    """Has an infinite loss at one step."""

    at_step: int | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.trainer.global_step == self.at_step else loss


class InfiniteBefore(InfiniteNet):
    at_step = 15


class InfiniteAfter(InfiniteNet):
    at_step = 16


class RealScaler(Case):
    """16-mixed on the CPU, with a scaler that really scales; Lightning's own choice there would be bf16."""

    def trainer(self, *callbacks: Callback, **options: Any) -> Trainer:
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=5)
        return super().trainer(*callbacks, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **options)


@pytest.mark.parametrize(
    ("net", "steps"),
    [(InfiniteNet, (16, 16)), (InfiniteBefore, (15, 16)), (InfiniteAfter, (16, 15))],
    ids=["no step", "the last step before", "the first step after"],
)
def test_a_step_that_the_scaler_skips_neither_loses_nor_repeats_the_switch(
    net: type[Net], steps: tuple[int, int], tmp_path: Path
) -> None:
    case = RealScaler(None, net=net, options={"gradient_clip_val": 0.5})
    switch = case.switch()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = fit(case, case.trainer(switch, Look(), each_epoch(tmp_path)))
        resumed = {epochs_done: run(case, tmp_path, epochs_done) for epochs_done in range(1, EPOCHS)}
    assert (switch.phase, switch.first_step) == (1, 16)
    assert reference.steps == {"Adam": steps[0], "SGD": steps[1]}
    for epochs_done, ended in resumed.items():
        begin = 8 * epochs_done
        assert ended.steps == +Counter({"Adam": max(steps[0] - begin, 0), "SGD": min(steps[1], 32 - begin)})
        assert difference(ended.weights, reference.weights) == 0


# What lives at the seams


def live_bytes() -> int:
    """Bytes of the tensors in the state of every optimizer that is alive, each counted once."""
    optimizers: list[Any] = [found for found in gc.get_objects() if issubclass(type(found), Optimizer)]
    values = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    tensors = {id(value): value for value in values if isinstance(value, torch.Tensor)}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class Weighed(OptimizerSwitchCallback):
    """Weighs all optimizers' state at each seam of the switch."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.bytes: dict[str, int] = {}

    def _is_due(self, *arguments: Any) -> bool:
        due = super()._is_due(*arguments)
        if due:
            self.bytes["asked"] = live_bytes()
        return due

    def _build_next(self, *arguments: Any) -> Any:
        built = super()._build_next(*arguments)
        self.bytes["built"] = live_bytes()
        return built

    def _exchange(self, *arguments: Any) -> None:
        super()._exchange(*arguments)
        self.bytes["installed"] = live_bytes()

    def _announce(self, *arguments: Any) -> None:
        super()._announce(*arguments)
        self.bytes["announced"] = live_bytes()


class Hoarder(Callback):
    """Keeps every optimizer that it sees."""

    def __init__(self) -> None:
        self.hoard: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.hoard.append(running_optimizer(trainer))


def weighed(strategy: str, hoard: bool) -> dict[str, int]:
    warnings.simplefilter("ignore")
    gc.collect()
    gc.disable()  # what only the collector would free counts as alive
    try:
        case = Case(strategy)
        switch = case.switch(Weighed)
        before = live_bytes()
        fit(case, case.trainer(switch, Look(), *([Hoarder()] if hoard else [])))
        return {**{seam: count - before for seam, count in switch.bytes.items()}, "at the end": live_bytes() - before}
    finally:
        gc.enable()


@pytest.mark.parametrize("strategy", ["ddp", slow("fsdp sharded"), "fsdp2 sharded", "deepspeed 2", slow("deepspeed 3")])
def test_no_more_than_one_phases_state_lives_at_any_seam(strategy: str, pair: Pair) -> None:
    for found in pair.run(weighed, strategy, False):
        adam, sgd = found["asked"], found["at the end"]
        assert adam > sgd > 0
        assert found == {"asked": adam, "built": adam, "installed": 0, "announced": 0, "at the end": sgd}


def test_an_old_phase_that_somebody_keeps_is_seen_at_the_seams(pair: Pair) -> None:
    for found in pair.run(weighed, "ddp", True):
        assert found["announced"] == found["installed"] == found["asked"] > 0


# A checkpoint names nothing that is imported


class Asked:
    """Notes the name of every module that is looked for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        self.names.append(name)


@pytest.mark.parametrize("name", ["os.system", "planted.SGD", "antigravity"])
def test_a_class_that_a_checkpoint_names_is_not_imported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    called: list[str] = []
    monkeypatch.setattr(os, "system", called.append)
    case = Case(None)
    with warnings.catch_warnings():
        run(case, tmp_path)
        file = torch.load(saved(tmp_path, 3), weights_only=True)
        [state] = [value for key, value in file["callbacks"].items() if key.startswith("OptimizerSwitchCallback")]
        state["optimizer"] = name
        state["settings"] = dict.fromkeys(state["settings"], name)
        torch.save(file, saved(tmp_path, 3))
        asked = Asked()
        monkeypatch.setattr(sys, "meta_path", [asked, *sys.meta_path])
        with pytest.raises(CheckpointError, match=f"was stepped by {name}, but switch.optimizer is SGD in this run"):
            run(case, tmp_path, 3)
    assert not called
    assert [found for found in asked.names if found.split(".")[0] in ("planted", "antigravity", "this")] == []
    assert {"planted", "antigravity"}.isdisjoint(sys.modules)
