"""A training loader whose order is a function of seed and epoch, and which can begin at any batch of an epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SequentialSampler, get_worker_info

from lightning_adaptive.random_states import mix, seed_all

_REAL = ("dataset", "batch_sampler", "sampler", "generator")
"""Attributes of the user's loader for which the one that is iterated has something else."""


class OrderedLoader:
    """Stands for a `DataLoader`: the same batches, in an order that a resumed run draws again.

    The sampler draws from a generator that is seeded anew with each epoch, or is told the epoch (``set_epoch``); what iterating
    costs in random numbers is drawn elsewhere than from the global generator; and each worker is seeded before each batch, so
    that random augmentation in workers is a function of seed, epoch and batch too. Everything else is the loader's own: its
    attributes are read and set there. The user's objects are as before after `release`.

    Args:
        loader: the user's, with a map-style dataset.
        place: tells, when an epoch's first batch is fetched, where training stands: epoch, and number of its batches done.
        before_batch: called before each batch is fetched.
    """

    def __init__(self, loader: DataLoader, place: Callable[[], tuple[int, int]], before_batch: Callable[[], None]) -> None:
        samplers = list(_samplers(loader))
        seeds = [(sampler, sampler.seed) for sampler in samplers if isinstance(sampler, DistributedSampler)]
        generators = [(sampler, sampler.generator) for sampler in samplers if _draws(sampler)]
        own_seeds = [*(seed for _, seed in seeds), *(given.initial_seed() for _, given in generators if given is not None)]
        iterated = copy.copy(loader)
        kind = "sampler" if loader.batch_sampler is None else "batch_sampler"
        order = _Order(getattr(loader, kind))
        vars(iterated).update({kind: order, "generator": torch.Generator()})
        if loader.num_workers and kind == "batch_sampler":
            vars(iterated)["dataset"] = _SeededDataset(loader.dataset)
        vars(self).update(
            _loader=loader,
            _iterated=iterated,
            _order=order,
            _samplers=samplers,
            _generators=generators,
            _seeds=seeds,
            _place=place,
            _before_batch=before_batch,
            own_seed=own_seeds[0] if own_seeds else None,
            seed=0,
            cycles=True,
        )

    def _begin(self) -> Iterator[Any]:
        """An iterator over what is left of the epoch in which training stands."""
        epoch, done = self._place()
        # A loader that is shorter than the epoch, beside a longer one, begins again within it, or has ended by now.
        turn, done = divmod(done, max(len(self._loader), 1)) if self.cycles else (0, done)
        for number, sampler in enumerate(self._samplers):
            if isinstance(sampler, DistributedSampler):
                sampler.seed = self.seed
            if _draws(sampler):
                sampler.generator = torch.Generator().manual_seed(mix(self.seed, epoch, turn, number))
            if callable(getattr(sampler, "set_epoch", None)):
                sampler.set_epoch(epoch)
        seed = mix(self.seed, epoch, turn, -1)
        self._iterated.generator.manual_seed(seed)
        self._order.begin_at, self._order.seed = done, seed
        return iter(self._iterated)

    def release(self) -> None:
        """Gives the user's samplers their own generators and seeds back."""
        for sampler, generator in self._generators:
            sampler.generator = generator
        for sampler, seed in self._seeds:
            sampler.seed = seed

    def __iter__(self) -> Iterator[Any]:
        # Begins when its first batch is asked for: only then is it known for certain where training stands.
        self._before_batch()
        for batch in self._begin():
            yield batch
            self._before_batch()

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader if name in _REAL else self._iterated, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self):
            vars(self)[name] = value
        else:
            setattr(self._loader if name in _REAL else self._iterated, name, value)

    def state_dict(self) -> dict[str, Any]:
        """Empty: order and position follow from seed and place. It tells Lightning that this loader resumes."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing; see `state_dict`."""


class _Order:
    """A batch sampler that leaves the batches out that are done, and gives each of the others a seed for its worker."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.begin_at = 0
        self.seed = 0

    def __iter__(self) -> Iterator[Any]:
        begin_at, seed = self.begin_at, self.seed
        for number, indices in enumerate(self.sampler):
            if number >= begin_at:
                yield _SeededBatch(indices, mix(seed, number)) if isinstance(indices, list | tuple) else indices

    def __len__(self) -> int:
        return len(self.sampler)


class _SeededBatch(list):
    """Indices of a batch on their way to a worker."""

    def __init__(self, indices: Sequence[Any] = (), seed: int = 0) -> None:
        super().__init__(indices)
        self.seed = seed


class _SeededDataset:
    """A dataset in a worker, which seeds the worker's generators before each batch."""

    def __init__(self, dataset: Any) -> None:
        vars(self)["_dataset"] = dataset

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        if isinstance(indices, _SeededBatch) and get_worker_info() is not None:
            seed_all(indices.seed)
        several = getattr(self._dataset, "__getitems__", None)
        return several(list(indices)) if several else [self._dataset[index] for index in indices]

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # while it is being unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)


def doubt(loader: Any) -> str:
    """Why the order of a training loader cannot be drawn again, with the cure; empty when it can.

    Args:
        loader: what was given to Lightning for training.
    """
    if obstacle := _obstacle(loader):
        return obstacle
    for sampler in _samplers(loader):
        is_fixed = type(sampler) in (SequentialSampler, BatchSampler) or hasattr(sampler, "_sampler")
        if not is_fixed and not _draws(sampler) and not callable(getattr(sampler, "set_epoch", None)):
            name = type(sampler).__name__
            return f"{name} has neither a generator nor set_epoch, so its order may not come back. Give it one of the two."
    return ""


def can_be_ordered(loader: Any) -> bool:
    """Whether `OrderedLoader` can stand for a training loader."""
    return not _obstacle(loader)


def _obstacle(loader: Any) -> str:
    if not isinstance(loader, DataLoader):
        return f"{type(loader).__name__} is no torch DataLoader, so a resumed epoch begins where it likes to. Give a DataLoader."
    if isinstance(loader.dataset, IterableDataset):
        name = type(loader.dataset).__name__
        return f"{name} is an IterableDataset, so a resumed epoch begins at its start. Give a dataset with __getitem__ and __len__."
    if callable(getattr(loader, "state_dict", None)):
        return f"{type(loader).__name__} keeps its own position, which Lightning loses at the end of an epoch. Give a DataLoader."
    return ""


def _samplers(loader: Any) -> Iterator[Any]:
    """The loader's samplers, from the outermost to what it draws from."""
    seen: set[int] = set()
    ahead = [getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)]
    while ahead:
        sampler = ahead.pop(0)
        if sampler is None or id(sampler) in seen:
            continue
        seen.add(id(sampler))
        yield sampler
        ahead.append(getattr(sampler, "sampler", None))
        ahead.append(getattr(sampler, "_sampler", None))  # Lightning's, around one that is not distributed
        if isinstance(sampler, DistributedSampler) and hasattr(sampler.dataset, "_sampler"):
            ahead.append(sampler.dataset)


def _draws(sampler: Any) -> bool:
    return hasattr(sampler, "generator") and (sampler.generator is None or isinstance(sampler.generator, torch.Generator))
