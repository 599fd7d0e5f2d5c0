"""The random states of a process as one tensor of bytes: python, numpy, torch, and one device."""

from __future__ import annotations

import hashlib
import random
import struct
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_PYTHON = struct.Struct("<i625I?d")
"""Version, the 624 words of the Mersenne twister with the position, and the normal deviate that is kept, if one is."""

_NUMPY = struct.Struct("<624Ii?d")
"""The 624 words of numpy's global Mersenne twister, the position, and the normal deviate that is kept, if one is."""


class States(NamedTuple):
    """The states of the global generators at one moment; `pack` makes bytes of them."""

    python: tuple[Any, ...]
    numpy: Any
    torch: Tensor
    device: Tensor | None


def take(device: torch.device) -> States:
    """The states of the global generators now.

    Args:
        device: whose generator is taken too, unless it is the CPU.
    """
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    numpy: Any = np.random.get_state(legacy=False)  # in half the time of the other form
    words = numpy["bit_generator"], numpy["state"]["key"], numpy["state"]["pos"], numpy["has_gauss"], numpy["gauss"]
    return States(random.getstate(), words, torch.get_rng_state(), cuda)


def give(states: States, device: torch.device) -> None:
    """Sets the global generators to what `take` returned in this process."""
    random.setstate(states.python)
    np.random.set_state(states.numpy)
    torch.set_rng_state(states.torch)
    if states.device is not None:
        torch.cuda.set_rng_state(states.device, device)


def pack(states: States) -> Tensor:
    """States as bytes (``uint8``), equally many on each process that trains on the same kind of device."""
    version, words, normal = states.python
    python = _PYTHON.pack(version, *words, normal is not None, normal or 0.0)
    _, keys, position, has_normal, normal = states.numpy
    parts = [python, _NUMPY.pack(*keys.tolist(), position, bool(has_normal), normal)]
    tensors = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts]
    return torch.cat([*tensors, *([] if states.device is None else [states.device]), states.torch])


def unpack(packed: Tensor, device: torch.device) -> States:
    """What `pack` was given.

    Args:
        packed: the bytes.
        device: of the process that takes them over.

    Raises:
        ValueError: when they are too few or too many, as those of a process with another kind of device.
    """
    now = take(device)
    sizes = [_PYTHON.size, _NUMPY.size, *([] if now.device is None else [now.device.numel()]), now.torch.numel()]
    if packed.dtype != torch.uint8 or packed.numel() != sum(sizes):
        raise ValueError(f"{packed.numel()} bytes of random states, where this process has {sum(sizes)}")
    python, numpy, *tensors = packed.split(sizes)
    version, *words, has_normal, normal = _PYTHON.unpack(python.numpy().tobytes())
    *keys, position, has_numpy_normal, numpy_normal = _NUMPY.unpack(numpy.numpy().tobytes())
    return States(
        python=(version, tuple(words), normal if has_normal else None),
        numpy=("MT19937", np.array(keys, dtype=np.uint32), position, int(has_numpy_normal), numpy_normal),
        torch=tensors[-1].clone(),
        device=None if now.device is None else tensors[0].clone(),
    )


def mix(*numbers: int) -> int:
    """A seed of 63 bits from whole numbers; the same on every machine, and without a pattern in its neighbours.

    >>> mix(1, 2) == mix(1, 2), mix(1, 2) == mix(2, 1)
    (True, False)
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Seeds python, numpy and torch, as a loader's worker needs it before a batch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
