"""The order of a training loader is a function of seed and epoch, begins anywhere, and leaves the user's loader as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_adaptive import ExactResume
from lightning_adaptive.data_order import OrderedLoader, can_be_ordered, doubt
from tests.exactness import SaveAtEachMoment
from tests.support import Net, digest, trainer


class Numbers(Dataset):
    """Its samples are their own indices."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class Noisy(Numbers):
    """Its samples are drawn from the three global generators of whoever reads them."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(1).item(), random.random(), float(np.random.rand())], dtype=torch.float64)


def ordered(loader: DataLoader, epoch: int = 0, done: int = 0, seed: int = 1) -> OrderedLoader:
    """An epoch of a loader from a batch on."""
    made = OrderedLoader(loader, place=lambda: (epoch, done), before_batch=lambda: None)
    made.seed = seed
    return made


def batches(loader: DataLoader, epoch: int = 0, done: int = 0, seed: int = 1) -> list[Any]:
    made = ordered(loader, epoch, done, seed)
    try:
        return [batch.tolist() for batch in made]
    finally:
        made.release()


def flat(several: list[Any]) -> list[Any]:
    return [number for batch in several for number in batch]


# Any position of any epoch


@settings(deadline=None, max_examples=150)
@given(
    length=st.integers(1, 40),
    size=st.integers(1, 9),
    epoch=st.integers(0, 1000),
    seed=st.integers(0, 2**63 - 1),
    place=st.floats(0, 1),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_an_epoch_from_any_batch_on_is_the_tail_of_that_epoch(
    length: int, size: int, epoch: int, seed: int, place: float, shuffle: bool, drop_last: bool
) -> None:
    loader = DataLoader(Numbers(length), batch_size=size, shuffle=shuffle, drop_last=drop_last)
    whole = batches(loader, epoch, 0, seed)
    assert len(whole) == len(loader)
    seen = flat(whole)
    assert len(set(seen)) == len(seen) == (length // size * size if drop_last else length)
    if not shuffle:
        assert seen == list(range(len(seen)))
    done = min(int(place * (len(whole) + 1)), max(len(whole) - 1, 0))
    assert batches(loader, epoch, done, seed) == whole[done:]


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}, {"prefetch_factor": 1}], ids=str)
def test_an_epoch_from_any_batch_on_is_its_tail_with_workers(options: dict[str, Any]) -> None:
    loader = DataLoader(Numbers(20), batch_size=3, shuffle=True, num_workers=2, **options)
    alone = DataLoader(Numbers(20), batch_size=3, shuffle=True)
    for epoch, done in ((0, 0), (0, 4), (2, 1), (2, 6)):
        assert batches(loader, epoch, done) == batches(alone, epoch)[done:]


def test_persistent_workers_go_through_epochs_of_one_loader() -> None:
    place = (0, 0)
    made = OrderedLoader(
        DataLoader(Noisy(12), batch_size=4, shuffle=True, num_workers=2, persistent_workers=True), lambda: place, lambda: None
    )
    alone = DataLoader(Noisy(12), batch_size=4, shuffle=True, num_workers=1)
    for place in ((0, 0), (1, 2), (1, 0), (0, 1)):  # the lambda above reads it
        assert [batch.tolist() for batch in made] == batches(alone, *place, seed=0)


def test_epochs_and_seeds_differ_and_the_same_ones_do_not() -> None:
    loader = DataLoader(Numbers(50), batch_size=5, shuffle=True)
    orders = [batches(loader, epoch, seed=seed) for epoch in range(4) for seed in range(4)]
    assert len({str(order) for order in orders}) == 16
    assert orders == [batches(loader, epoch, seed=seed) for epoch in range(4) for seed in range(4)]


def test_what_was_drawn_before_does_not_matter() -> None:
    loader = DataLoader(Numbers(50), batch_size=5, shuffle=True)
    torch.manual_seed(1)
    expected = batches(loader)
    torch.manual_seed(2)
    next(iter(loader))
    assert batches(loader) == expected


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "own generator": lambda: {"shuffle": True, "generator": torch.Generator().manual_seed(5)},
    "random": lambda: {"sampler": RandomSampler(range(30), generator=torch.Generator().manual_seed(5))},
    "with replacement": lambda: {"sampler": RandomSampler(range(30), replacement=True, num_samples=40)},
    "weighted": lambda: {"sampler": WeightedRandomSampler([1.0, 3.0] * 15, 30)},
    "subset": lambda: {"sampler": SubsetRandomSampler(range(3, 30))},
    "batches": lambda: {"batch_sampler": BatchSampler(RandomSampler(range(30)), 4, drop_last=True)},
    "batches with a generator": lambda: {"batch_sampler": RandomBatches(30, 4)},
    "distributed": lambda: {"sampler": DistributedSampler(Numbers(30), num_replicas=2, rank=1)},
    "no batches": lambda: {"shuffle": True, "batch_size": None},
    "no batches, weighted": lambda: {"sampler": WeightedRandomSampler([1.0, 3.0] * 15, 30), "batch_size": None},
}


class RandomBatches(Sampler):
    """A custom batch sampler that draws from a generator."""

    def __init__(self, length: int, size: int) -> None:
        self.length = length
        self.size = size
        self.generator = torch.Generator().manual_seed(5)

    def __len__(self) -> int:
        return self.length // self.size

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            yield torch.randint(self.length, (self.size,), generator=self.generator).tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_kind_of_sampler_comes_back(name: str) -> None:
    def loader() -> DataLoader:
        return DataLoader(Numbers(30), **{"batch_size": 1 if "batch" in name else 4, **SAMPLERS[name]()})

    whole = batches(loader(), epoch=2)
    assert len(whole) == len(loader())
    assert batches(loader(), epoch=2) == whole != batches(loader(), epoch=3)
    again = loader()
    for _ in again:
        pass  # an epoch of another run
    for done in (1, len(whole) // 2, len(whole) - 1):
        assert batches(again, epoch=2, done=done) == whole[done:]


def test_a_sampler_that_is_told_the_epoch_draws_by_it() -> None:
    class Told(Sampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(10, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    loader = DataLoader(Numbers(10), batch_size=2, sampler=Told())
    whole = batches(loader, epoch=3)
    assert flat(whole) == torch.randperm(10, generator=torch.Generator().manual_seed(3)).tolist()
    assert batches(loader, epoch=3, done=2) == whole[2:]


def test_a_loader_that_is_shorter_than_the_epoch_begins_again_in_another_order() -> None:
    loader = DataLoader(Numbers(9), batch_size=3, shuffle=True)
    turns = [batches(loader, done=done) for done in (0, 3, 6)]
    assert len({str(turn) for turn in turns}) == 3
    assert batches(loader, done=4) == turns[1][1:]


# What is the user's stays the user's


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_users_loader_and_its_samplers_are_as_before_after_release(name: str) -> None:
    loader = DataLoader(Numbers(30), **SAMPLERS[name]())
    objects = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    owned = [vars(one) for one in objects if one is not None]
    before = [dict(each) for each in owned]
    generators = [value for each in before for value in each.values() if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    made = ordered(loader)
    list(made)
    assert vars(loader) == before[0]
    assert owned != before  # the samplers draw from other generators
    made.release()
    for now, then in zip(owned, before, strict=True):
        assert now.keys() == then.keys()
        assert all(now[attribute] is value for attribute, value in then.items() if attribute != "epoch")
    assert all(torch.equal(generator.get_state(), state) for generator, state in zip(generators, states, strict=True))


def test_attributes_are_the_users_own() -> None:
    loader = DataLoader(Numbers(30), batch_size=4, shuffle=True, num_workers=1, pin_memory=False, timeout=5)
    made = ordered(loader)
    for name in (
        "dataset",
        "sampler",
        "batch_sampler",
        "generator",
        "batch_size",
        "num_workers",
        "timeout",
        "collate_fn",
        "drop_last",
    ):
        assert getattr(made, name) is getattr(loader, name), name
    assert len(made) == len(loader)
    assert not hasattr(made, "nothing_of_that_name")
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = made.nothing_of_that_name


def test_an_attribute_that_is_set_reaches_the_workers() -> None:
    made = ordered(DataLoader(Noisy(6), batch_size=2, num_workers=2))
    made.worker_init_fn = take_index
    assert made.worker_init_fn is take_index
    made.collate_fn = with_start
    assert [start for start, _ in made] == ["told 0", "told 1", "told 0"]


_start = ""


def take_index(index: int) -> None:
    global _start  # noqa: PLW0603 - of a worker
    _start = f"told {index}"


def with_start(samples: list[Any]) -> Any:
    return _start, samples


def test_iterating_draws_nothing_from_the_global_generators() -> None:
    for options in ({"shuffle": True}, {"shuffle": False}, {"shuffle": True, "num_workers": 1}):
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        expected = torch.rand(1).item(), random.random(), np.random.rand()
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        list(ordered(DataLoader(Numbers(30), batch_size=4, **options)))
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_plain_iterating_draws_which_is_why() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(DataLoader(Numbers(30), batch_size=4))
    assert not torch.equal(torch.get_rng_state(), before)


# Workers


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_what_workers_draw_is_a_function_of_seed_epoch_and_batch() -> None:
    def loader(workers: int) -> DataLoader:
        return DataLoader(Noisy(30), batch_size=4, shuffle=True, num_workers=workers)

    whole = batches(loader(2), epoch=1)
    assert batches(loader(3), epoch=1) == whole
    assert batches(loader(2), epoch=1, done=3) == whole[3:]
    noise = [tuple(sample[1:]) for sample in flat(whole)]
    assert len({value for several in noise for value in several}) == 90  # no two draws are the same
    drawn = {value for sample in flat(batches(loader(2), epoch=2)) for value in sample[1:]}
    assert not drawn & {value for several in noise for value in several}
    assert batches(loader(2), epoch=1, seed=2) != whole


class Changing(Numbers):
    """Its attributes decide what it gives."""

    scale = 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index * self.scale)


def scale_by_three(index: int) -> None:
    info = get_worker_info()
    assert info.dataset.length == 6
    assert len(info.dataset) == 6
    info.dataset.scale = info.dataset.scale * 3


def test_a_workers_dataset_can_be_read_and_set() -> None:
    loader = DataLoader(Changing(6), batch_size=3, num_workers=2, worker_init_fn=scale_by_three)
    assert batches(loader) == [[0, 3, 6], [9, 12, 15]]
    assert loader.dataset.scale == 1


class AtOnce(Numbers):
    """Reads a batch at once."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        assert isinstance(indices, list)
        return [torch.tensor(index + 100) for index in indices]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_that_reads_batches_at_once_does_so(workers: int) -> None:
    assert batches(DataLoader(AtOnce(4), batch_size=2, num_workers=workers)) == [[100, 101], [102, 103]]


@pytest.mark.parametrize("name", ["no batches", "no batches, weighted"])
def test_samples_come_one_by_one_from_workers_too(name: str) -> None:
    def loader(workers: int) -> DataLoader:
        return DataLoader(Numbers(30), num_workers=workers, **SAMPLERS[name]())

    whole = batches(loader(0), epoch=1)
    assert all(isinstance(sample, int) for sample in whole)
    assert batches(loader(2), epoch=1, done=7) == whole[7:]


@pytest.mark.slow
def test_workers_are_spawned_as_well_as_forked() -> None:
    loader = DataLoader(Noisy(8), batch_size=2, shuffle=True, num_workers=1, multiprocessing_context="spawn")
    forked = DataLoader(Noisy(8), batch_size=2, shuffle=True, num_workers=1)
    assert batches(loader, epoch=1, done=1) == batches(forked, epoch=1)[1:]


# What cannot be ordered


class Lines(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))


class Positioned(DataLoader):
    def state_dict(self) -> dict[str, Any]:
        return {}


class Hidden(Sampler):
    """Draws from where nobody knows."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(10).tolist())


DOUBTS: dict[str, tuple[Callable[[], Any], str, bool]] = {
    "list of batches": (
        lambda: [torch.zeros(2)],
        "list is no torch DataLoader, so a resumed epoch begins where it likes to. Give a DataLoader.",
        False,
    ),
    "IterableDataset": (
        lambda: DataLoader(Lines()),
        "Lines is an IterableDataset, so a resumed epoch begins at its start. Give a dataset with __getitem__ and __len__.",
        False,
    ),
    "own position": (
        lambda: Positioned(Numbers(10)),
        "Positioned keeps its own position, which Lightning loses at the end of an epoch. Give a DataLoader.",
        False,
    ),
    "hidden sampler": (
        lambda: DataLoader(Numbers(10), sampler=Hidden()),
        "Hidden has neither a generator nor set_epoch, so its order may not come back. Give it one of the two.",
        True,
    ),
    "hidden batch sampler": (
        lambda: DataLoader(Numbers(10), batch_sampler=BatchSampler(Hidden(), 2, False)),
        "Hidden has neither a generator nor set_epoch, so its order may not come back. Give it one of the two.",
        True,
    ),
    "plain": (lambda: DataLoader(Numbers(10)), "", True),
    **{name: (lambda name=name: DataLoader(Numbers(30), **SAMPLERS[name]()), "", True) for name in SAMPLERS},
}


@pytest.mark.parametrize("name", DOUBTS)
def test_a_doubt_is_said_with_its_cure(name: str) -> None:
    make, said, can_be = DOUBTS[name]
    loader = make()
    assert doubt(loader) == said
    assert can_be_ordered(loader) is can_be


# Through Lightning


class Several(Net):
    """Trains on what several loaders give; remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append({name: item[1].tolist() for name, item in batch.items() if item is not None})
        return sum(self.net(item[0]).square().mean() for item in batch.values() if item is not None)


def numbered(size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(size)
    return TensorDataset(torch.randn(size, 16, generator=generator), torch.arange(size))


def fit(loaders: Callable[[], Any], path: Path | None = None, seed: int = 1, *callbacks: Callback) -> Several:
    seed_everything(seed, verbose=False)
    model = Several()
    runner = trainer(max_epochs=2, callbacks=[ExactResume(strict=True), *callbacks])
    runner.fit(model, loaders(), ckpt_path=path, weights_only=True)
    return model


def shuffled(size: int, batch_size: int) -> DataLoader:
    return DataLoader(numbered(size), batch_size=batch_size, shuffle=True)


def test_a_distributed_sampler_keeps_its_own_seed() -> None:
    """So that the order is the one that Lightning alone would have, and the same on each process."""
    data = numbered(24)
    seen = fit(lambda: {"a": DataLoader(data, 4, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=11))}).seen
    expected = DistributedSampler(data, num_replicas=1, rank=0, seed=11)
    for epoch in range(2):
        expected.set_epoch(epoch)
        assert [number for batch in seen[6 * epoch : 6 * epoch + 6] for number in batch["a"]] == list(expected)


def test_two_loaders_of_one_length_have_different_orders() -> None:
    model = fit(lambda: {"a": shuffled(24, 4), "b": shuffled(24, 4)})
    assert len(model.seen) == 12
    first = [[number for batch in model.seen[:6] for number in batch[name]] for name in "ab"]
    assert first[0] != first[1]
    assert sorted(first[0]) == sorted(first[1]) == list(range(24))


COMBINED: dict[str, tuple[Callable[[], Any], int]] = {
    "a dict": (lambda: {"a": shuffled(24, 4), "b": shuffled(24, 4)}, 12),
    "the shorter one again": (lambda: CombinedLoader({"a": shuffled(28, 4), "b": shuffled(9, 3)}, "max_size_cycle"), 14),
    "as long as the shorter one": (lambda: CombinedLoader({"a": shuffled(28, 4), "b": shuffled(15, 3)}, "min_size"), 10),
    "as long as the longer one": (lambda: CombinedLoader({"a": shuffled(28, 4), "b": shuffled(9, 3)}, "max_size"), 14),
}


@pytest.mark.parametrize("name", COMBINED)
def test_several_loaders_resume_exactly(name: str, tmp_path: Path) -> None:
    loaders, steps = COMBINED[name]
    whole = fit(loaders, None, 1, SaveAtEachMoment(tmp_path))
    assert len(whole.seen) == steps
    for step in range(1, steps):
        resumed = fit(loaders, tmp_path / f"{step:03d}-batch.ckpt", seed=2)
        assert resumed.seen == whole.seen[step:], f"from step {step}"
        assert digest(resumed) == digest(whole), f"from step {step}"
