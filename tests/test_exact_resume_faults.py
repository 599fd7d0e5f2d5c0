"""Faults and mistakes around `ExactResume`: each ends in the same weights, in a refusal before a step, or in one line."""

from __future__ import annotations

import copy
import errno
import functools
import os
import pickle
import random
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset

from lightning_adaptive import CheckpointError, ConfigError, Cosine, ExactResume, OptimizerSwitchCallback, checkpoints
from lightning_adaptive.exact_resume import SavedState
from tests.cpu_strategies import STRATEGIES
from tests.exactness import Augmented, RandomNet, RandomValidatedNet, SaveAtEachMoment
from tests.faults import FORKS
from tests.pair import Pair
from tests.support import Net, ValidatedNet, dataset, digest, digest_of, loader, trainer

pytestmark = [
    # A resumed run saves nothing here.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*This DataLoader will create"),
]

STATE = "ExactResume"
DOUBT = "This run cannot be resumed exactly: "
STRICT = "this run cannot be resumed exactly, and ExactResume is strict: "


class Fault(Exception):
    """Planted."""


def shuffled(workers: int = 0, **options: Any) -> DataLoader:
    return DataLoader(Augmented(), **{"batch_size": 8, "shuffle": True, "num_workers": workers, **options})


def plain(workers: int = 0, **options: Any) -> DataLoader:
    return DataLoader(dataset(), batch_size=8, shuffle=True, num_workers=workers, **options)


def switch(**options: Any) -> OptimizerSwitchCallback:
    return OptimizerSwitchCallback(
        **{"at": "1.5ep", "optimizer": partial(SGD, lr=0.1, momentum=0.9), "scheduler": Cosine(), **options}
    )


def fit(
    path: Path | None = None,
    seed: int = 1,
    callbacks: Sequence[Callback] = (),
    module: LightningModule | None = None,
    data: Any = None,
    validation: Any = None,
    exact: Callback | None = None,
    **options: Any,
) -> str:
    """Two epochs of 8 batches with dropout and augmentation, unless told otherwise; gives the weights' digest."""
    seed_everything(seed, verbose=False)
    model = RandomNet() if module is None else module
    several = [exact if exact is not None else ExactResume(), *callbacks]
    runner = trainer(
        **{"max_epochs": 2, "enable_checkpointing": any(isinstance(item, Checkpoint) for item in several), **options},
        callbacks=several,
    )
    runner.fit(model, shuffled() if data is None else data, validation, ckpt_path=path, weights_only=True)
    return digest(model)


class SaveOnException(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


class RaiseIn(Callback):
    """Raises, or does something else, in a hook at a batch, once."""

    def __init__(self, hook: str, batch: int, act: Callable[[Trainer], Any] | None = None) -> None:
        self.batch = batch
        self.act = act
        self.done = False
        setattr(self, hook, self._do)

    def _do(self, trainer: Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        if not self.done and trainer.training and loop.total_batch_idx == self.batch:
            self.done = True
            if self.act is None:
                raise Fault
            self.act(trainer)


class Steps(Callback):
    """Counts what a run did, so that a test sees that nothing was done."""

    count = 0

    def on_train_batch_start(self, *_: Any) -> None:
        self.count += 1


def stop(path: Path, hook: str, batch: int, resumed: Path | None = None, **options: Any) -> Path:
    """Ends a run of `fit` in a hook at a batch, with a checkpoint."""
    with pytest.raises(Fault):
        fit(resumed, callbacks=[RaiseIn(hook, batch), SaveOnException(path)], **options)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint of each step, validation and epoch of the run that `fit` makes."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / "ended.txt").write_text(fit(callbacks=[SaveAtEachMoment(folder)]))
    return folder


@pytest.fixture(scope="module")
def ended(saved: Path) -> str:
    return (saved / "ended.txt").read_text()


@functools.cache
def whole(kind: str) -> str:
    """The weights of a run that was left alone."""
    return fit(callbacks=[switch()]) if kind == "switched" else fit(accumulate_grad_batches=4)


def edited(path: Path, edit: Callable[[dict[str, Any]], Any], folder: Path) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, folder / "edited.ckpt")
    return folder / "edited.ckpt"


def doubts(*arguments: Any, **options: Any) -> list[str]:
    """What a run of `fit` says that cannot come back exactly."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(*arguments, **options)
    lines = [str(warning.message) for warning in caught]
    return [line.removeprefix(DOUBT) for line in lines if line.startswith(DOUBT)]


def refused(error: type[Exception], path: Path | None = None, callbacks: Sequence[Callback] = (), **options: Any) -> str:
    """What a run of `fit` says that ends before its first step."""
    steps = Steps()
    with pytest.raises(error) as caught:
        fit(path, callbacks=[*callbacks, steps], **options)
    assert steps.count == 0
    return str(caught.value)


def test_a_run_that_goes_on_ends_the_same(saved: Path, ended: str) -> None:
    assert fit(saved / "005-batch.ckpt", seed=2) == ended
    assert fit(seed=2) != ended


# Within an accumulation window (F4)


@pytest.mark.parametrize("hook", ["on_before_backward", "on_train_batch_end"])
@pytest.mark.parametrize("batch", [4, 5, 6, 7, 9, 14])
def test_a_run_that_stopped_within_a_window_ends_the_same(hook: str, batch: int, tmp_path: Path) -> None:
    stopped = stop(tmp_path / "stopped.ckpt", hook, batch, accumulate_grad_batches=4)
    assert fit(stopped, seed=2, accumulate_grad_batches=4) == whole("accumulated")


class NormedNet(RandomNet):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))


def test_batch_norm_within_a_window_is_said(tmp_path: Path) -> None:
    stopped = stop(tmp_path / "stopped.ckpt", "on_train_batch_end", 5, module=NormedNet(), accumulate_grad_batches=4)
    assert doubts(stopped, module=NormedNet(), accumulate_grad_batches=4) == [
        "the checkpoint lies within an accumulation window, and batch norm sees its 2 batches a second time. Resume from one that "
        "lies at a step."
    ]


def test_batch_norm_at_a_step_is_exact(tmp_path: Path) -> None:
    undisturbed = fit(module=NormedNet(), accumulate_grad_batches=4, callbacks=[SaveAtEachMoment(tmp_path)])
    assert fit(tmp_path / "001-batch.ckpt", 2, module=NormedNet(), accumulate_grad_batches=4) == undisturbed


# Crashes and errors around saving (F6, F9, F11)


def keep_one(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=1, monitor="step", mode="max")


def test_a_crash_before_the_old_checkpoint_is_removed(tmp_path: Path, ended: str, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = []

    def crash(strategy: Any, path: Any) -> None:
        removed.append(path)
        if len(removed) == 4:
            raise Fault

    monkeypatch.setattr("lightning.pytorch.strategies.Strategy.remove_checkpoint", crash)
    with pytest.raises(Fault):
        fit(callbacks=[keep_one(tmp_path)])
    monkeypatch.undo()
    newest, broken = checkpoints.newest(tmp_path)
    assert newest == tmp_path / "step=5.ckpt"
    assert broken == {}
    assert fit(newest, seed=2) == ended
    assert fit(newest, seed=2, callbacks=[keep_one(tmp_path)]) == ended


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_optimizer_step"])
def test_an_error_in_a_users_hook_at_the_switch_leaves_no_half_state(hook: str, first: bool, tmp_path: Path) -> None:
    fault, saver = RaiseIn(hook, 12), SaveOnException(tmp_path / "stopped.ckpt")
    with pytest.raises(Fault):
        fit(callbacks=[fault, saver, switch()] if first else [switch(), fault, saver])
    assert fit(tmp_path / "stopped.ckpt", seed=2, callbacks=[switch()]) == whole("switched")


def no_space(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, number: int) -> None:
    """A full disk from the given call on."""
    real, calls = getattr(place, name), []

    def write(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, write)


@pytest.mark.parametrize("number", [2, 3, 6])
@pytest.mark.parametrize(("place", "name"), [(LocalFileOpener, "write"), (os, "fsync"), (os, "replace")], ids=str)
def test_a_full_disk_ends_the_run_and_the_last_good_checkpoint_is_whole(
    place: Any, name: str, number: int, tmp_path: Path, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1, enable_version_counter=False)
    with monkeypatch.context() as patch:
        no_space(patch, place, name, number)
        with pytest.raises(OSError, match=r"No space left on device$"):
            fit(callbacks=[saver])
    newest, broken = checkpoints.newest(tmp_path)
    assert newest == tmp_path / "last.ckpt"
    assert broken == {}
    assert {path.name for path in tmp_path.iterdir()} <= {"last.ckpt", ".last.ckpt.partial"}
    again = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1, enable_version_counter=False)
    assert fit(newest, seed=2, callbacks=[again]) == ended
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]  # what the full disk left is gone


def test_a_checkpoint_that_is_saved_on_an_exception_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = []
    real = checkpoints.publish
    monkeypatch.setattr(checkpoints, "publish", lambda *paths: (published.append(paths[1].name), real(*paths)))
    stop(tmp_path / "stopped.ckpt", "on_train_batch_end", 3)
    assert published == ["stopped.ckpt"]


def sealed(folder: Path) -> list[bool]:
    """On two processes under DeepSpeed: whether the checkpoints before and after a switch were written whole."""
    warnings.simplefilter("ignore")
    saver = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    fit(callbacks=[switch(at="1ep"), saver], strategy=STRATEGIES["deepspeed 2"](), devices=2)
    return [(folder / f"epoch={epoch}.ckpt" / checkpoints.MANIFEST).is_file() for epoch in (0, 1)]


def test_checkpoints_are_written_whole_after_a_switch_under_deepspeed(pair: Pair, tmp_path: Path) -> None:
    assert pair.run(sealed, tmp_path) == [[True, True]] * 2


# What is no whole checkpoint of such a run (F12, F13, F26, F46)


def truncated(path: Path) -> None:
    os.truncate(path, 3000)


def one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def bare(path: Path) -> None:
    torch.save(RandomNet().state_dict(), path)


def no_dict(path: Path) -> None:
    torch.save([1, 2], path)


NEIGHBOUR = " It was left as it is. Newest whole one there: {neighbour}."
MUTATIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "{path}: no checkpoint, or not a whole one (3,000 bytes)." + NEIGHBOUR),
    "one bit": (one_bit, "{path}: damaged: the checksum of its entry {entry} does not fit ({size:,} bytes)." + NEIGHBOUR),
    "bare state dict": (bare, "{path} is no checkpoint of a Lightning run. Use it as initial weights, without ckpt_path."),
    "no dict": (no_dict, "{path} is no checkpoint of a Lightning run. Use it as initial weights, without ckpt_path."),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_no_whole_checkpoint_is_refused_before_a_step(name: str, saved: Path, tmp_path: Path) -> None:
    mutate, expected = MUTATIONS[name]
    neighbour, path = tmp_path / "4.ckpt", tmp_path / "5.ckpt"
    neighbour.write_bytes((saved / "004-batch.ckpt").read_bytes())
    path.write_bytes((saved / "005-batch.ckpt").read_bytes())
    mutate(path)
    before = path.read_bytes()
    model = RandomNet()
    first = digest(model)
    told = refused(CheckpointError, path, module=model)
    entry = told.partition("entry ")[2].partition(" does")[0]
    assert told == expected.format(path=path, neighbour=neighbour, entry=entry, size=len(before))
    assert digest(model) == first
    assert path.read_bytes() == before


def test_a_checkpoint_that_lightning_saved_without_an_optimizer_is_refused(tmp_path: Path) -> None:
    fit(callbacks=[ModelCheckpoint(tmp_path, filename="saved", save_weights_only=True)], max_epochs=1)
    path = tmp_path / "saved.ckpt"
    assert refused(CheckpointError, path) == (
        f"{path} holds no optimizer, since it was saved with save_weights_only. Use it as initial weights, without ckpt_path."
    )


def test_a_checkpoint_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    assert refused(CheckpointError, tmp_path / "none.ckpt") == f"{tmp_path / 'none.ckpt'}: there is no such file."


def test_a_file_in_the_place_of_the_folder_is_refused_before_a_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("mine")
    for folder in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "inner"):
        told = refused(CheckpointError, callbacks=[ModelCheckpoint(folder)])
        assert told.startswith(f"no checkpoint can be written in {folder}: ")
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_a_folder_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    fit(callbacks=[ModelCheckpoint(tmp_path / "a" / "b", every_n_epochs=5)])
    assert list((tmp_path / "a" / "b").iterdir()) == []


DAMAGES = {
    "random": (None, "text", {}, -1, [3], torch.zeros(3)),
    "seeds": (None, "text", {}, -1, [3], [["a"]], [[1], [2]]),
    "batch_sizes": (None, "text", -1, [None]),
    "pending": (None, "text", {}, -1, [3]),
    "metrics": (None, "text", -1, [3], {"loss": "low"}),
}
FIELDS = ("random", "seeds", "batch_sizes", "pending", "validates", "has_batch_norm", "metrics")


def fewer_bytes(state: dict[str, Any]) -> None:
    state["random"] = state["random"][:, :-1].clone()


DAMAGED = "ExactResume's state in the checkpoint is damaged: "
OTHER_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    **{
        f"version {version!r}": (
            partial(dict.update, version=version),
            rf"the checkpoint holds ExactResume's state in version {version!r}, not 1\.$",
        )
        for version in (0, 2, "1", None)
    },
    **{
        f"{field} {value}": (partial(dict.update, **{field: value}), DAMAGED)
        for field, values in DAMAGES.items()
        for value in values
    },
    **{f"no {field}": (lambda state, field=field: state.pop(field), rf"{DAMAGED}KeyError\('{field}'\)\.$") for field in FIELDS},
    "fewer bytes": (
        fewer_bytes,
        r"the checkpoint's random states are not those of a cpu: \d+ bytes of random states, where this process has \d+\.$",
    ),
}


@pytest.mark.parametrize("name", OTHER_STATES)
def test_another_state_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    edit, message = OTHER_STATES[name]
    path = edited(saved / "005-batch.ckpt", lambda checkpoint: edit(checkpoint["callbacks"][STATE]), tmp_path)
    assert re.match(message, refused(CheckpointError, path))


def test_an_evaluation_takes_the_weights_whatever_the_state_is(saved: Path, tmp_path: Path) -> None:
    path = edited(saved / "005-batch.ckpt", lambda checkpoint: checkpoint["callbacks"][STATE].update(version=2), tmp_path)
    model, seen = RandomValidatedNet(), torch.load(path, weights_only=True)["state_dict"]
    runner = trainer(callbacks=[ExactResume()])
    runner.validate(model, DataLoader(Augmented(16), batch_size=8), ckpt_path=path, weights_only=True, verbose=False)
    assert digest(model) == digest_of(seen)


def test_every_field_survives_a_checkpoint(saved: Path) -> None:
    state = torch.load(saved / "005-batch.ckpt", weights_only=True)["callbacks"][STATE]
    state |= {"pending": 3, "validates": True, "has_batch_norm": True}  # not their defaults
    again = SavedState.from_dict(state).to_dict()
    assert torch.equal(again.pop("random"), state.pop("random"))
    assert again == state


# What cannot come back exactly is said once, and an error if strict (F27, F43)


def test_another_batch_size_is_said(saved: Path) -> None:
    line = "batches had 8 samples in the checkpoint and have 16 now."
    path, data = saved / "005-batch.ckpt", shuffled(batch_size=16)
    assert doubts(path, data=data) == [line]
    assert refused(CheckpointError, path, data=data, exact=ExactResume(strict=True)) == STRICT + line


def test_a_checkpoint_that_was_written_without_it_is_said(tmp_path: Path) -> None:
    fit(exact=Callback(), callbacks=[SaveAtEachMoment(tmp_path)])
    line = "the checkpoint was written without ExactResume, so it holds neither random states nor the order of the data."
    assert doubts(tmp_path / "005-batch.ckpt") == [line]
    assert refused(CheckpointError, tmp_path / "005-batch.ckpt", exact=ExactResume(strict=True)) == STRICT + line


@pytest.mark.parametrize("name", ["005-batch", "008-epoch", "008-batch"])
def test_a_checkpoint_that_was_written_with_it_resumes_without_it(name: str, saved: Path) -> None:
    steps = Steps()
    assert doubts(saved / f"{name}.ckpt", exact=Callback(), callbacks=[steps]) == []
    assert steps.count == 16 - int(name[:3])


class Lines(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(dataset(32))


def test_a_loader_that_cannot_be_ordered_is_said_once(tmp_path: Path) -> None:
    line = "Lines is an IterableDataset, so a resumed epoch begins at its start. Give a dataset with __getitem__ and __len__."
    data = DataLoader(Lines(), batch_size=8)
    assert doubts(data=data, callbacks=[SaveAtEachMoment(tmp_path)]) == [line]
    assert doubts(tmp_path / "006-batch.ckpt", data=data) == [line]
    assert refused(ConfigError, data=data, exact=ExactResume(strict=True)) == STRICT + line


def test_a_writer_that_writes_when_it_likes_to_is_said() -> None:
    line = "AsyncCheckpointIO writes when it likes to, so a crash may leave half a checkpoint. Write at once."
    assert doubts(max_epochs=1, plugins=[AsyncCheckpointIO()]) == [line]
    assert refused(ConfigError, exact=ExactResume(strict=True), plugins=[AsyncCheckpointIO()]) == STRICT + line


def test_what_is_exact_is_not_doubted(saved: Path) -> None:
    strict = ExactResume(strict=True)
    assert doubts(exact=strict) == []
    assert doubts(saved / "005-batch.ckpt", seed=2, exact=strict) == []


class Seen(Callback):
    """The first number of each sample of the second epoch."""

    def __init__(self) -> None:
        self.numbers: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1:
            self.numbers += batch[0][:, 0].tolist()


def paired_order(path: Path) -> list[float]:
    """On two processes of a group: what each sees of an epoch, in a run with a seed of its own."""
    warnings.simplefilter("ignore")
    seen = Seen()
    fit(path, 5, [seen], data=plain(), strategy="ddp", devices=2)
    return seen.numbers


def test_more_processes_still_share_the_data(saved: Path, pair: Pair) -> None:
    one, other = pair.run(paired_order, saved / "002-batch.ckpt")
    assert sorted(one + other) == sorted(dataset()[:][0][:, 0].tolist())


def paired(path: Path | None, folder: Path, strict: bool) -> Any:
    """On two processes of a group."""
    saver = SaveAtEachMoment(folder)
    try:
        return doubts(path, exact=ExactResume(strict), callbacks=[saver], strategy="ddp", devices=2, max_epochs=1)
    except CheckpointError as error:
        return str(error)


def test_another_number_of_processes_is_said(saved: Path, tmp_path: Path, pair: Pair) -> None:
    line = "1 processes wrote the checkpoint, and 2 go on."
    assert pair.run(paired, saved / "002-batch.ckpt", tmp_path, False) == [[line], []]
    assert pair.run(paired, saved / "002-batch.ckpt", tmp_path, True) == [STRICT + line] * 2
    pair.run(paired, None, tmp_path / "two", False)
    line = "2 processes wrote the checkpoint, and 1 go on."
    assert doubts(tmp_path / "two" / "002-batch.ckpt") == [line]
    assert refused(CheckpointError, tmp_path / "two" / "002-batch.ckpt", exact=ExactResume(strict=True)) == STRICT + line


# The time of day (F25)


@pytest.mark.parametrize("shift", [-3600.0, 365 * 86400.0])
def test_the_time_of_day_does_not_matter(
    shift: float, saved: Path, ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    calls = []

    def shifted() -> float:
        calls.append(1)
        return real() + shift * (len(calls) > 3)

    monkeypatch.setattr(time, "time", shifted)
    assert fit(callbacks=[SaveAtEachMoment(tmp_path)]) == ended
    assert fit(tmp_path / "005-batch.ckpt", seed=2) == ended
    assert fit(saved / "005-batch.ckpt", seed=2) == ended


# Moments (F33, F34, F38)


@pytest.mark.parametrize("first", [True, False])
def test_switch_validation_and_checkpoint_at_the_end_of_one_epoch(first: bool, tmp_path: Path) -> None:
    def run(path: Path | None, seed: int, saves: Path | None) -> str:
        at_steps = ModelCheckpoint(saves, filename="steps-{step}", every_n_train_steps=4, save_top_k=-1)
        at_validation = ModelCheckpoint(saves, filename="validation-{step}", every_n_epochs=1, save_top_k=-1)
        savers = [at_steps, at_validation] if saves else []
        ours = [switch(at="8st"), ExactResume()] if first else [ExactResume(), switch(at="8st")]
        validation = DataLoader(Augmented(16), batch_size=8)
        return fit(path, seed, [ours[1], *savers], RandomValidatedNet(), None, validation, ours[0], max_epochs=3)

    undisturbed = run(None, 1, tmp_path)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert [path.name for path in paths] == [
        *(f"steps-step={step}.ckpt" for step in (12, 16, 20, 24, 4, 8)),
        *(f"validation-step={step}.ckpt" for step in (16, 24, 8)),
    ]
    for path in paths:
        if "24" not in path.name:
            assert run(path, 2, None) == undisturbed, path.name


class Positioned(DataLoader):
    """Counts its batches, as a stateful loader does."""

    given = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self.given += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


def test_after_the_last_batch_of_an_epoch_a_loader_with_its_own_position_gives_a_whole_epoch(tmp_path: Path) -> None:
    def run(path: Path | None, *callbacks: Callback) -> list[str]:
        return doubts(path, data=Positioned(dataset(), batch_size=8), callbacks=callbacks)

    line = "Positioned keeps its own position, which Lightning loses at the end of an epoch. Give a DataLoader."
    assert run(None, SaveAtEachMoment(tmp_path)) == [line]
    for name in ("008-batch", "008-epoch"):
        steps = Steps()
        run(tmp_path / f"{name}.ckpt", steps)
        assert steps.count == 8, name


HOOKS = [
    "on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_train_batch_end",
]  # fmt: skip


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_checkpoint_that_a_users_hook_saves_in_the_step_of_the_switch(hook: str, first: bool, tmp_path: Path) -> None:
    path = tmp_path / "saved.ckpt"
    user = RaiseIn(hook, 12, lambda trainer: trainer.save_checkpoint(path))
    assert fit(callbacks=[user, switch()] if first else [switch(), user]) == whole("switched")
    assert user.done
    assert fit(path, seed=2, callbacks=[switch()]) == whole("switched")


# Again and again (F39, F40, F41, F42)


def test_a_run_that_is_resumed_thrice_ends_the_same(tmp_path: Path, ended: str) -> None:
    path: Path | None = None
    for number, batch in enumerate((3, 4, 11)):
        path = stop(tmp_path / f"{number}.ckpt", "on_train_batch_end", batch, path, seed=number + 1)
    assert fit(path, seed=9) == ended


def test_an_error_while_restoring_leaves_the_checkpoint_as_it_was(saved: Path, ended: str) -> None:
    class Broken(RandomNet):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            raise Fault

    path = saved / "005-batch.ckpt"
    before = path.read_bytes()
    with pytest.raises(Fault):
        fit(path, module=Broken())
    assert path.read_bytes() == before
    assert fit(path, seed=2) == ended


def on_one_trainer(saved: Path | None, *before: Callable[[Trainer, LightningModule, Any], Any]) -> tuple[str, Trainer]:
    """A fit of a trainer that did something else before."""
    model, data = RandomNet(), shuffled()
    runner = trainer(max_epochs=2, callbacks=[ExactResume()])
    for act in before:
        act(runner, model, data)
    seed_everything(1 if saved is None else 2, verbose=False)
    model.load_state_dict(RandomNet().state_dict())
    runner.fit(model, data, ckpt_path=saved, weights_only=True)
    return digest(model), runner


def test_a_second_fit_of_one_trainer_is_the_first_one_again(saved: Path, ended: str) -> None:
    def other_fit(runner: Trainer, model: LightningModule, data: Any) -> None:
        seed_everything(77, verbose=False)
        runner.fit(model, data)

    assert on_one_trainer(saved / "005-batch.ckpt", other_fit)[0] == ended
    assert on_one_trainer(saved / "005-batch.ckpt", other_fit, other_fit)[0] == ended


def test_a_fit_that_goes_further_keeps_the_order(tmp_path: Path) -> None:
    undisturbed = fit(max_epochs=4)
    seed_everything(1, verbose=False)
    model, data = RandomNet(), shuffled()
    runner = trainer(max_epochs=2, callbacks=[ExactResume()])
    runner.fit(model, data)
    runner.save_checkpoint(tmp_path / "half.ckpt")
    assert fit(tmp_path / "half.ckpt", seed=2, max_epochs=4) == undisturbed


def test_a_fit_after_validate_is_a_fit(ended: str, saved: Path) -> None:
    def validate(runner: Trainer, model: LightningModule, data: Any) -> None:
        model.validation_step = model.training_step  # type: ignore[method-assign]
        runner.validate(model, DataLoader(Augmented(16), batch_size=8), verbose=False)
        del model.validation_step

    assert on_one_trainer(None, validate)[0] == ended
    assert on_one_trainer(saved / "005-batch.ckpt", validate)[0] == ended


@pytest.mark.filterwarnings("ignore:Failed to compute suggestion")
def test_a_fit_after_the_tuner_is_a_fit(saved: Path, ended: str, tmp_path: Path) -> None:
    def tune(runner: Trainer, model: LightningModule, data: Any) -> None:
        Tuner(runner).lr_find(model, data, num_training=5, update_attr=False)

    assert on_one_trainer(saved / "005-batch.ckpt", partial(in_folder, tmp_path, tune))[0] == ended


def in_folder(folder: Path, act: Callable[..., Any], runner: Trainer, *arguments: Any) -> None:
    runner._default_root_dir = str(folder)
    act(runner, *arguments)


def nothing_held(callback: ExactResume) -> bool:
    """Whether no module hangs on it, but for the two methods that Lightning gives to every callback."""
    own = {name: value for name, value in vars(callback).items() if name not in ("log", "log_dict")}
    return b"Net" not in pickle.dumps(own)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))], ids=["copy", "pickle"])
def test_the_callback_can_be_copied_before_and_after_a_fit(copied: Callable[..., Any], saved: Path, ended: str) -> None:
    callback = copied(ExactResume(strict=True))
    assert callback.strict
    assert fit(exact=callback) == ended
    assert nothing_held(callback)
    again = copied(callback)
    assert fit(saved / "005-batch.ckpt", seed=2, exact=again) == ended
    assert fit(saved / "005-batch.ckpt", seed=3, exact=callback) == ended


def test_a_callback_of_another_run_takes_the_seed_of_this_one(ended: str) -> None:
    callback = ExactResume()
    fit(seed=7, exact=callback)
    assert fit(exact=callback) == ended


def test_a_callback_of_a_run_that_broke_can_be_copied(ended: str) -> None:
    callback = ExactResume()
    with pytest.raises(Fault):
        fit(exact=callback, callbacks=[RaiseIn("on_train_batch_end", 3)])
    assert fit(exact=copy.deepcopy(callback)) == fit(exact=pickle.loads(pickle.dumps(callback))) == ended


@pytest.mark.parametrize(
    ("before", "after"), [(0, {"workers": 2}), (2, {}), (2, {"workers": 1, "persistent_workers": True})], ids=str
)
def test_another_number_of_workers_goes_on_the_same(before: int, after: dict[str, Any], tmp_path: Path) -> None:
    undisturbed = fit(data=plain(before), callbacks=[SaveAtEachMoment(tmp_path)])
    assert fit(data=plain()) == undisturbed
    for name in ("005-batch", "008-epoch"):
        assert fit(tmp_path / f"{name}.ckpt", seed=2, data=plain(**after)) == undisturbed


# Kill -9 while a checkpoint is written (F5)


class Large(Net):
    """Saves after each step, slowly."""

    def __init__(self, folder: Path, steps: Any) -> None:
        super().__init__()
        self.register_buffer("large", torch.zeros(2_000_000))
        self.folder = folder
        self.steps = steps

    def on_train_batch_end(self, *_: Any) -> None:
        self.trainer.save_checkpoint(self.folder / "last.ckpt")
        self.steps.value = self.trainer.global_step


def save_on_and_on(folder: Path, memory: Path, exact: bool, steps: Any) -> None:
    """What a process does until it is killed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tempfile.tempdir = str(memory)  # as TMPDIR would have it
    trainer(max_epochs=-1, callbacks=[ExactResume()] if exact else []).fit(Large(folder, steps), loader())


def kill_while_saving(folder: Path, memory: Path, exact: bool, wait: Callable[[], None]) -> set[str]:
    """Kills after the third checkpoint and a wait; gives the names that lie in the folder then."""
    folder.mkdir()
    steps = FORKS.Value("i", 0)
    process = FORKS.Process(target=save_on_and_on, args=(folder, memory, exact, steps))
    process.start()
    deadline = time.monotonic() + 60
    while steps.value < 3 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    wait()
    assert process.is_alive()
    process.kill()
    process.join()
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on another device."""
    if not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second device for temporary files")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def test_a_kill_while_saving_never_leaves_a_broken_checkpoint(tmp_path: Path, memory: Path) -> None:
    chooser = random.Random(5)
    partials = 0
    for number in range(40):
        if partials and number >= 8:
            break
        folder = tmp_path / str(number)
        left = kill_while_saving(folder, memory, True, lambda: time.sleep(chooser.uniform(0, 0.1)))
        assert checkpoints.fault(folder / "last.ckpt") == ""
        assert left <= {"last.ckpt", ".last.ckpt.partial"}
        assert checkpoints.newest(folder)[0] == folder / "last.ckpt"
        partials += ".last.ckpt.partial" in left
    assert partials > 0, "no kill came while a checkpoint was written, so nothing was tested"


def test_without_it_a_kill_leaves_a_broken_checkpoint(tmp_path: Path, memory: Path) -> None:
    """What the test above is about. When this fails, Lightning writes beside the place too."""
    path = tmp_path / "0" / "last.ckpt"

    def until_it_is_written_again() -> None:
        whole, deadline = path.stat().st_size, time.monotonic() + 30
        while path.exists() and path.stat().st_size >= whole and time.monotonic() < deadline:
            pass

    for number in range(20):
        path = tmp_path / str(number) / "last.ckpt"
        kill_while_saving(path.parent, memory, False, until_it_is_written_again)
        if checkpoints.fault(path):
            return
    pytest.fail("none of 20 kills broke a checkpoint")


class Averaging(torch.optim.SGD):
    """Has weights of its own for an evaluation, as the optimizers of schedulefree."""

    def eval(self) -> None:
        """Would change to them."""


class AveragingNet(ValidatedNet):
    def configure_optimizers(self) -> Any:
        return Averaging(self.parameters(), lr=0.1)


def test_an_optimizer_that_rounds_with_each_validation_is_said() -> None:
    validated = {"module": AveragingNet(), "validation": loader(), "max_epochs": 1}
    assert doubts(**validated) == [
        "Averaging changes the weights for a validation and back, which rounds by about 3e-8. Validate as often on resume."
    ]
    assert doubts(**validated, limit_val_batches=0) == []
