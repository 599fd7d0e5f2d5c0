"""Checkpoints as files and folders: written whole or not at all, looked at before they are loaded, found again.

A file carries a checksum of each of its entries, since it is a zip archive; torch does not look at them. A folder gets a
manifest of digests, which is written last.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_adaptive.errors import CheckpointError

MANIFEST = "manifest.json"
METADATA = "meta.pt"  # of FSDP and FSDP2, as Lightning calls it
_DIGEST = "blake2b"


def unfinished(target: Path) -> Path:
    """Where a checkpoint is written before it gets its name; in the same folder, so that a rename is all that is left."""
    return target.with_name(f".{target.name}.partial")


def digests(folder: Path, share: int = 0, shares: int = 1) -> dict[str, list[str | int]]:
    """Size and digest of a folder's files, or of one of several shares of them, by their name in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files[share::shares]}


def seal(folder: Path, of_files: Mapping[str, list[str | int]]) -> None:
    """Writes the manifest, after which the folder counts as whole.

    Args:
        folder: a checkpoint's, with all its files.
        of_files: what `digests` says of them.
    """
    for name in of_files:
        _to_disk(folder / name)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"digest": _DIGEST, "files": dict(of_files)}, indent=1), encoding="utf-8")
    _to_disk(manifest)


def publish(written: Path, target: Path) -> None:
    """Gives a checkpoint that was written at `unfinished` its name, in the place of one that has it.

    A crash leaves the old one or the new one under the name; of a folder, for which there are two renames, it may leave none
    of them there, and then both beside it.
    """
    if written.is_file():
        _to_disk(written)
    old = target.with_name(f".{target.name}.old")
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    elif written.is_dir() and (target.exists() or target.is_symlink()):
        target.unlink()
    os.replace(written, target)
    _to_disk(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Removes what an earlier attempt to write has left, file or folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def save_whole(strategy: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
    """What a strategy's ``save_checkpoint`` does, beside the place; then it is renamed. Called on every process.

    Args:
        strategy: Lightning's.
        checkpoint: the dictionary.
        filepath: where to; what is no path of a file system is left to the strategy.
        storage_options: the strategy's.
    """
    save = functools.partial(type(strategy).save_checkpoint, strategy)
    target = str(strategy.broadcast(filepath))
    if "://" in target:
        save(checkpoint, target, storage_options=storage_options)
        return
    path = Path(target).absolute()
    written = unfinished(path)
    if strategy.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(written)
    strategy.barrier("ExactResume: before writing")
    save(checkpoint, written, storage_options=storage_options)
    strategy.barrier("ExactResume: written")
    if written.is_dir():
        _seal_together(strategy, written)
    if strategy.is_global_zero:
        publish(written, path)
    strategy.barrier("ExactResume: named")


def _seal_together(strategy: Any, folder: Path) -> None:
    """Writes a folder's manifest; each process digests its share of the files."""
    import torch

    shares: list[Any] = [digests(folder, strategy.global_rank, strategy.world_size)]
    if strategy.world_size > 1:
        shares *= strategy.world_size
        torch.distributed.all_gather_object(shares, shares[0])
    if strategy.is_global_zero:
        seal(folder, {name: value for share in shares for name, value in share.items()})


def fault(path: Path) -> str:
    """What is wrong with a checkpoint; empty for one that is whole.

    Of a folder without a manifest, which plain Lightning writes, only the file is looked at that every one of them has.
    """
    if path.is_dir():
        return _fault_of_folder(path)
    return _fault_of_file(path) if path.is_file() else "there is no such file"


def _fault_of_file(path: Path) -> str:
    size = path.stat().st_size
    if size == 0:
        return "the file is empty"
    try:
        if not zipfile.is_zipfile(path):
            return f"no checkpoint, or not a whole one ({size:,} bytes)"
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return f"an archive, but no checkpoint ({size:,} bytes)"
            damaged = archive.testzip()
            damaged = damaged or next((entry.filename for entry in archive.infolist() if _is_misread(entry)), None)
    # The last two: a name that is no text, an entry that calls itself encrypted.
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, UnicodeDecodeError, RuntimeError) as error:
        return f"damaged ({size:,} bytes; {error})"
    return f"damaged: the checksum of its entry {damaged} does not fit ({size:,} bytes)" if damaged else ""


def _is_misread(entry: zipfile.ZipInfo) -> bool:
    """Whether torch reads an entry otherwise than Python does, which looks neither at its second size nor at its attributes.

    With a second size that does not fit torch refuses it; what calls itself a folder it takes for memory that nobody has written.
    """
    is_stored = entry.compress_type == zipfile.ZIP_STORED
    return (is_stored and entry.compress_size != entry.file_size) or bool(entry.external_attr & 0x10)


def _fault_of_folder(folder: Path) -> str:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        metadata = metadata_file(folder)
        if metadata is None:
            return "a folder, but no checkpoint of FSDP, FSDP2 or DeepSpeed, or not a whole one"
        wrong = _fault_of_file(metadata)
        return f"{metadata.relative_to(folder).as_posix()} in it: {wrong}" if wrong else ""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        for name, (size, digest) in files.items():
            path = folder / name
            if not path.is_file():
                return f"damaged: {name} is missing"
            if path.stat().st_size != size or _digest(path) != digest:
                return f"damaged: {name} is not what was written"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"damaged: its manifest cannot be read ({error!r})"
    return ""


def metadata_file(path: Path) -> Path | None:
    """The file of a checkpoint that holds everything but weights and optimizer state, if it is there.

    Args:
        path: a file, or a folder as FSDP and FSDP2 (``meta.pt``) or DeepSpeed (``checkpoint/*model_states.pt``) leave it.
    """
    if not path.is_dir():
        return path if path.is_file() else None
    states = sorted((path / "checkpoint").glob("*model_states.pt"))
    return next((file for file in (path / METADATA, *states) if file.is_file()), None)


def read_metadata(path: Path) -> dict[str, Any]:
    """A checkpoint's dictionary without weights and optimizer state: of a file, or of a folder of FSDP, FSDP2 or DeepSpeed.

    Raises:
        CheckpointError: when nothing of these lies there.
    """
    file = metadata_file(path)
    if file is None:
        raise CheckpointError(f"{path} is no checkpoint: neither a file nor a folder of FSDP, FSDP2 or DeepSpeed.")
    import torch  # which takes seconds, and a folder without a checkpoint needs none

    checkpoint = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states", "module")}


def saved_step(path: Path) -> int | None:
    """The global step at which a checkpoint was written; ``None`` when it cannot be read."""
    try:
        return int(read_metadata(path)["global_step"])
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, pickle.UnpicklingError):
        return None


def check(path: Path, name: str = "") -> None:
    """Refuses a checkpoint that is not whole.

    Args:
        path: the checkpoint.
        name: what the message calls it; its path unless given.

    Raises:
        CheckpointError: with what is wrong, and the newest whole one beside it.
    """
    wrong = fault(path)
    if not wrong:
        return
    left = " It was left as it is." if path.is_file() else ""
    beside = [found for place in (path, path.parent) for found in candidates(place) if found != path and not fault(found)]
    newest = f" Newest whole one there: {max(beside, key=lambda found: found.stat().st_mtime)}." if beside else ""
    raise CheckpointError(f"{name or path}: {wrong}.{left}{newest}")


def check_resumable(path: Path) -> None:
    """Refuses a checkpoint that is not whole, or from which no run can go on.

    Raises:
        CheckpointError: with what is wrong.
    """
    check(path)
    try:
        metadata = read_metadata(path)
    except pickle.UnpicklingError:
        return  # it holds more than plain types, which Lightning may be told to allow
    except AttributeError:
        metadata = {}  # no dictionary
    if "pytorch-lightning_version" not in metadata:
        raise CheckpointError(f"{path} is no checkpoint of a Lightning run. Use it as initial weights, without ckpt_path.")
    if "lr_schedulers" not in metadata:
        raise CheckpointError(
            f"{path} holds no optimizer, since it was saved with save_weights_only. Use it as initial weights, without ckpt_path."
        )


def candidates(folder: Path) -> list[Path]:
    """The checkpoints of a folder, whole or not; of one that lost its name in a crash what lies beside its place."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.suffix == ".ckpt" and not path.name.startswith(".")]
    names = {path.name for path in found}
    for path in folder.iterdir():
        name, _, state = path.name.removeprefix(".").rpartition(".")
        is_complete = state == "old" or (state == "partial" and (path / MANIFEST).is_file())
        if is_complete and path.is_dir() and name not in names:
            found.append(path)
    return sorted(found)


def newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """A folder's whole checkpoint that is furthest in training, and what is wrong with those that may be further."""
    broken: dict[Path, str] = {}
    steps = {path: saved_step(path) for path in candidates(folder)}
    for path in sorted(steps, key=lambda path: (steps[path] is None, steps[path] or 0, path.stat().st_mtime), reverse=True):
        wrong = fault(path) or ("" if steps[path] is not None else "no checkpoint of a training")
        if not wrong:
            return path, broken
        broken[path] = wrong
    return None, broken


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _DIGEST).hexdigest()


def _to_disk(path: Path) -> None:
    """Waits until a file's, or a folder's, content would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
