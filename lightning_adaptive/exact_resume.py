"""`ExactResume`: the same run back, for any Lightning training.

One of the two files that know Lightning's inside (the private names are listed in ``tests/test_lightning_names.py``).
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_adaptive import checkpoints, random_states, strategies
from lightning_adaptive.data_order import OrderedLoader, can_be_ordered, doubt
from lightning_adaptive.errors import CheckpointError, ConfigError, reading
from lightning_adaptive.random_states import States, mix

STATE_VERSION = 1
"""Version of the callback's saved state; CONTRIBUTING.md says what happens when it changes."""


_Place = Literal["at a step", "within a step", "at its end", "over"]
"""Where in an epoch a checkpoint was written."""


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint says of the moment at which it was written.

    Args:
        random: packed random states, one row of bytes for each process.
        seeds: of the training loaders, one row for each process.
        batch_sizes: of the training loaders; 0 where it is not known.
        pending: batches of the open accumulation window, which the resumed run sees again.
        validates: whether a validation comes next.
        has_batch_norm: whether running statistics saw the pending batches.
        metrics: those that a schedule may ask for.
    """

    random: Tensor
    seeds: list[list[int]]
    batch_sizes: list[int] = field(default_factory=list)
    pending: int = 0
    validates: bool = False
    has_batch_norm: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, so that a checkpoint loads with ``weights_only=True``."""
        return {"version": STATE_VERSION, **vars(self), "metrics": dict(self.metrics)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> SavedState:
        """Reads what `to_dict` wrote.

        Raises:
            CheckpointError: for another version, or values of the wrong type or range.
        """
        with reading("ExactResume", state, STATE_VERSION):
            saved = cls(
                random=state["random"],
                seeds=[[int(seed) for seed in row] for row in state["seeds"]],
                batch_sizes=[int(size) for size in state["batch_sizes"]],
                pending=int(state["pending"]),
                validates=bool(state["validates"]),
                has_batch_norm=bool(state["has_batch_norm"]),
                metrics={str(name): float(value) for name, value in state["metrics"].items()},
            )
            rows, _ = saved.random.shape
        if saved.pending < 0 or rows != len(saved.seeds):
            raise CheckpointError(
                f"ExactResume's state in the checkpoint is damaged: random states of {rows} processes, seeds of "
                f"{len(saved.seeds)}, {saved.pending} pending batches."
            )
        return saved


class ExactResume(Callback):
    """Lets a run that was stopped go on as if it had not been: the same batches, the same random numbers, the same weights.

    Plain Lightning brings back neither random states nor the data's position, and miscounts in some cases. With this callback in
    both runs,

    * random states (python, numpy, torch, CUDA) of every process come back. Validation leaves them as they were;
    * a plain `DataLoader` is shuffled by a seed that is kept in the checkpoint, and by the epoch; a resumed run begins at the
      batch where the other stopped, also with workers, whose generators are seeded before each batch. So the order differs from
      the one that Lightning alone would draw;
    * batches of an accumulation window that had not become a step are seen again;
    * a checkpoint that was written at the last batch of an epoch is followed by that epoch's validation and end;
    * a checkpoint is written beside its place, complete, and then renamed; and it is checked before anything of it is loaded.

    What cannot come back exactly is said in one line when training starts.

    Args:
        strict: whether what cannot come back exactly is an error.

    Raises:
        ConfigError: when training starts, for what cannot come back exactly, if `strict`.
        CheckpointError: on resume, for a checkpoint that is damaged, or holds no random states, if `strict`.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self._seeds: list[int] = []
        self._stop_checking: Callable[[], None] | None = None
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._saved: SavedState | None = None
        self._left_at: _Place | None = None
        self._loaders: list[OrderedLoader] = []
        self._doubts: list[str] = []
        self._boundary: States | None = None
        self._boundary_at = -1
        self._before_validation: States | None = None

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategies.warn_if_unseen()
        self._begin_anew()
        if not trainer.global_step:
            self._seeds = []  # another run than the one before, if there was one
        strategy: Any = trainer.strategy
        strategy.process_dataloader = functools.partial(self._take_loader, trainer)
        strategy.on_train_start = functools.partial(self._begin, trainer)
        if isinstance(strategy.checkpoint_io, AsyncCheckpointIO):
            self._doubts.append("AsyncCheckpointIO writes when it likes to, so a crash may leave half a checkpoint. Write at once.")
        else:
            strategy.save_checkpoint = functools.partial(checkpoints.save_whole, strategy)
        check = functools.partial(_on_first_process, trainer, checkpoints.check_resumable)
        self._stop_checking = strategies.before_restore(trainer, check, first=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._before_validation = random_states.take(trainer.strategy.root_device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before_validation is not None:
            random_states.give(self._before_validation, trainer.strategy.root_device)
            self._before_validation = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.restarting and _plateaus_have_metrics(trainer):
            # Else Lightning leaves plateau schedules out at the end of the epoch in which it resumed.
            _no_longer_restarting(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"][self.state_key] = self._state(trainer, pl_module).to_dict()
        loops = checkpoint["loops"]["fit_loop"]["state_dict"]
        if all(isinstance(loader, OrderedLoader) for loader in _training_loaders(trainer)):
            loops.pop("combined_loader", None)  # empty, and a run without this callback could not place it

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        saved = self._saved = None if state is None else SavedState.from_dict(state)
        loops = checkpoint["loops"]["fit_loop"]
        self._left_at = repair_counts(loops, saved.pending if saved else 0, saved.validates if saved else None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._let_go(trainer, "process_dataloader", "on_train_start")  # callbacks that save on an exception come after this one

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._let_go(trainer, "process_dataloader", "on_train_start", "save_checkpoint")

    # What is saved

    def _state(self, trainer: Trainer, pl_module: LightningModule) -> SavedState:
        loop: Any = trainer.fit_loop.epoch_loop
        batches = loop.batch_progress.current
        is_last = batches.processed >= trainer.num_training_batches
        pending = 0 if is_last else batches.processed % trainer.accumulate_grad_batches
        is_within_step = bool(pending) or batches.ready > batches.processed
        states = self._boundary if is_within_step else self._before_validation
        packed = random_states.pack(states or random_states.take(trainer.strategy.root_device))
        between = trainer.state.fn == "fit" and batches.ready == batches.processed == batches.completed + 1
        return SavedState(
            random=_gathered(trainer, packed),
            seeds=_gathered(trainer, torch.tensor(self._seeds, dtype=torch.int64)).tolist(),
            batch_sizes=_batch_sizes(trainer),
            pending=pending,
            validates=between and _is_validation_due(trainer),
            has_batch_norm=any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in pl_module.modules()),
            metrics={name: float(value) for name, value in trainer.callback_metrics.items()},
        )

    def _before_batch(self, trainer: Trainer) -> None:
        """Keeps the random states of each step's beginning, for a checkpoint that is written within the step."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        number = progress.total.ready
        if progress.current.ready % trainer.accumulate_grad_batches == 0 and number != self._boundary_at:
            self._boundary, self._boundary_at = random_states.take(trainer.strategy.root_device), number

    # The training loaders

    def _take_loader(self, trainer: Trainer, loader: Any) -> Any:
        """Stands in place of the strategy's ``process_dataloader``."""
        loader = type(trainer.strategy).process_dataloader(trainer.strategy, loader)
        if not trainer.training:
            return _neutral(loader)
        unclear, by_hand = doubt(loader), False
        if is_param_in_hook_signature(trainer.lightning_module.training_step, "dataloader_iter", explicit=True):
            unclear, by_hand = "training_step takes batches by itself, so their number is not known. Let it take a batch.", True
        if unclear and unclear not in self._doubts:
            self._doubts.append(unclear)
        if by_hand or not can_be_ordered(loader):
            return loader
        ordered = OrderedLoader(
            loader, place=functools.partial(self._place, trainer), before_batch=functools.partial(self._before_batch, trainer)
        )
        self._loaders.append(ordered)
        return ordered

    def _place(self, trainer: Trainer) -> tuple[int, int]:
        """Epoch and number of its batches done, when a batch is fetched; every loader has its seed by then."""
        for index, loader in enumerate(_training_loaders(trainer)):
            if index >= len(self._seeds):
                own_seed = getattr(loader, "own_seed", None)
                self._seeds.append(mix(torch.initial_seed(), index) if own_seed is None else own_seed)
            if isinstance(loader, OrderedLoader):
                loader.seed = self._seeds[index]
                loader.cycles = getattr(trainer.fit_loop._combined_loader, "_mode", "") != "max_size"
        loop: Any = trainer.fit_loop
        return loop.epoch_progress.current.processed, loop.epoch_loop.batch_progress.current.ready

    # Resume

    def _begin(self, trainer: Trainer) -> None:
        """Stands in place of the strategy's ``on_train_start``, which comes after everybody else's and before the first epoch."""
        type(trainer.strategy).on_train_start(trainer.strategy)
        _on_first_process(trainer, _check_folders, trainer)
        self._say([*self._doubts, *_doubts_of_optimizers(trainer)], ConfigError)
        if self._left_at is None:
            return  # nothing was loaded
        saved, self._saved = self._saved, None
        self._say(_doubts_of_resume(trainer, saved), CheckpointError)
        if saved is None:
            return
        if len(saved.seeds) == trainer.world_size:  # else some processes would have other seeds for the order that they share
            self._seeds = list(saved.seeds[trainer.global_rank])
            random_states.give(_unpacked(saved.random[trainer.global_rank], trainer), trainer.strategy.root_device)
        self._go_on(trainer, saved)

    def _go_on(self, trainer: Trainer, saved: SavedState) -> None:
        """Lets the loops go on where the checkpoint was written, rather than where Lightning believes that it was."""
        loop = trainer.fit_loop
        trainer._logger_connector._callback_metrics.update({name: torch.tensor(value) for name, value in saved.metrics.items()})
        if self._left_at == "over":
            # A fresh epoch begins. That a plateau schedule saw the old one came after the checkpoint.
            if _plateaus_have_metrics(trainer):
                loop.epoch_progress.current.completed -= 1
                loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
                loop.epoch_progress.current.completed += 1
            _no_longer_restarting(trainer)
        elif self._left_at == "at its end":
            loop.epoch_loop.val_loop._has_run = True  # or Lightning would ask for another batch
        elif self._left_at == "within a step" and _is_validation_due(trainer):
            loop.epoch_loop._batches_that_stepped -= 1  # Lightning counts it again where it passes over a validation

    def _say(self, doubts: list[str], error: type[ConfigError | CheckpointError]) -> None:
        if not doubts:
            return
        if self.strict:
            raise error(f"this run cannot be resumed exactly, and ExactResume is strict: {' '.join(doubts)}")
        rank_zero_warn(f"This run cannot be resumed exactly: {' '.join(doubts)}")

    def _let_go(self, trainer: Trainer, *names: str) -> None:
        """Gives loaders and strategy back what is theirs; of the strategy the methods of these names."""
        for loader in self._loaders:
            loader.release()
        self._loaders = []
        for name in names:
            vars(trainer.strategy).pop(name, None)
        if self._stop_checking is not None:
            self._stop_checking()
            self._stop_checking = None


def repair_counts(loops: dict[str, Any], pending: int, validates: bool | None) -> _Place:
    """Puts the counters of a checkpoint where its run stood, in the state of Lightning's fit loop.

    Args:
        loops: the state, which is changed.
        pending: batches of an open accumulation window, which are not counted as done.
        validates: whether a validation comes next; ``None`` if nobody knows.

    Returns:
        Where the epoch was left: ``"over"`` when the next one begins, ``"at its end"`` when only its end is to come.
    """
    epoch, batch = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
    now = epoch["current"]
    if now["ready"] == now["started"] == now["processed"] == now["completed"] + 1 and batch["is_last_batch"]:
        # Saved in on_train_epoch_end. With max_steps, Lightning would train on in the old epoch, or end one too early.
        _add(epoch, "completed", 1)
        batch["is_last_batch"] = False
        batch["current"] = dict.fromkeys(batch["current"], 0)
        return "over"
    if validates is None:
        return "at a step"
    steps = loops["epoch_loop.state_dict"]
    done = batch["current"]
    if done["ready"] == done["processed"] == done["completed"] + 1:
        # Saved in on_train_batch_end. Lightning would leave out the validation that follows, and the epoch's end.
        _add(batch, "completed", 1)
        if validates:
            _begin_validation(loops["epoch_loop.val_loop.batch_progress"])
        elif not pending:
            steps["_batches_that_stepped"] += 1
            if batch["is_last_batch"]:
                return "at its end"
    if pending or done["ready"] > done["processed"]:
        begun = done["completed"] - pending
        for name, count in tuple(done.items()):
            _add(batch, name, begun - count)
        return "within a step"
    return "at a step"


def _add(progress: dict[str, Any], name: str, count: int) -> None:
    for counts in (progress["current"], progress["total"]):
        counts[name] += count


def _begin_validation(progress: dict[str, Any]) -> None:
    """Counts of a validation of which nothing is done yet; Lightning then runs it."""
    progress["current"] = {**dict.fromkeys(progress["current"], 0), "ready": 1, "started": 1}
    progress["total"] = dict(progress["current"])
    progress["is_last_batch"] = False


def _doubts_of_optimizers(trainer: Trainer) -> list[str]:
    """Optimizers with weights of their own for an evaluation, as those of schedulefree, to which the module changes and back."""
    rounding = {type(optimizer).__name__ for optimizer in trainer.optimizers if callable(getattr(optimizer, "eval", None))}
    if not rounding or not trainer.enable_validation:
        return []
    names = " and ".join(sorted(rounding))
    return [f"{names} changes the weights for a validation and back, which rounds by about 3e-8. Validate as often on resume."]


def _doubts_of_resume(trainer: Trainer, saved: SavedState | None) -> list[str]:
    """What keeps this checkpoint from coming back exactly."""
    if saved is None:
        return ["the checkpoint was written without ExactResume, so it holds neither random states nor the order of the data."]
    doubts = []
    if len(saved.seeds) != trainer.world_size:
        doubts.append(f"{len(saved.seeds)} processes wrote the checkpoint, and {trainer.world_size} go on.")
    sizes = _batch_sizes(trainer)
    if sizes != saved.batch_sizes:
        doubts.append(f"batches had {_listed(saved.batch_sizes)} samples in the checkpoint and have {_listed(sizes)} now.")
    if saved.pending and saved.has_batch_norm:
        doubts.append(
            f"the checkpoint lies within an accumulation window, and batch norm sees its {saved.pending} batches a second time. "
            "Resume from one that lies at a step."
        )
    return doubts


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes)) or "no"


def _unpacked(row: Tensor, trainer: Trainer) -> States:
    try:
        return random_states.unpack(row.cpu(), trainer.strategy.root_device)
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint's random states are not those of a {trainer.strategy.root_device}: {error}."
        ) from error


def _gathered(trainer: Trainer, values: Tensor) -> Tensor:
    """One row for each process."""
    if trainer.world_size == 1:
        return values[None].clone()
    every = trainer.strategy.all_gather(values.to(trainer.strategy.root_device))
    assert isinstance(every, Tensor)
    return every.reshape(trainer.world_size, -1).cpu()


def _training_loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else combined.flattened


def _batch_sizes(trainer: Trainer) -> list[int]:
    return [int(getattr(loader, "batch_size", 0) or 0) for loader in _training_loaders(trainer)]


def _is_validation_due(trainer: Trainer) -> bool:
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and bool(trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher))


def _no_longer_restarting(trainer: Trainer) -> None:
    _Loop.restarting.fset(trainer.fit_loop, False)  # type: ignore[attr-defined] # its own setter does not listen under max_steps


def _plateaus_have_metrics(trainer: Trainer) -> bool:
    monitored = {config.monitor for config in trainer.lr_scheduler_configs if config.reduce_on_plateau}
    return monitored <= trainer.callback_metrics.keys()


def _neutral(loader: Any) -> Any:
    """A loader for validation whose iterator draws its seed elsewhere than from the generator that training uses."""
    if not isinstance(loader, DataLoader) or loader.generator is not None:
        return loader
    copied = copy.copy(loader)
    copied.generator = torch.Generator().manual_seed(torch.initial_seed())
    return copied


def _check_folders(trainer: Trainer) -> None:
    """Refuses folders for checkpoints in which nothing can be written, rather than after the first epoch."""
    for folder in {str(getattr(callback, "dirpath", None) or "") for callback in trainer.checkpoint_callbacks}:
        if folder and "://" not in folder:
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise CheckpointError(f"no checkpoint can be written in {folder}: {error.strerror}.") from error


def _on_first_process(trainer: Trainer, check: Callable[[Any], None], checked: Any) -> None:
    """Runs a check of something on the first process; what it refuses is refused on every process.

    Raises:
        CheckpointError: as the check does.
    """
    message = ""
    if trainer.is_global_zero:
        try:
            check(checked)
        except CheckpointError as error:
            message = str(error)
    message = trainer.strategy.broadcast(message)
    if message:
        raise CheckpointError(message)
