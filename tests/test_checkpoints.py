"""A checkpoint is whole or it is refused, and a crash while one is written leaves a whole one that is found."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_adaptive import CheckpointError, checkpoints
from lightning_adaptive.checkpoints import MANIFEST, read_metadata, saved_step
from tests.support import Net


def write_file(path: Path, step: int) -> None:
    torch.save({"global_step": step, "state_dict": Net().state_dict()}, path)


def write_folder(path: Path, step: int) -> None:
    """As `ExactResume` has it written by FSDP2: files in folders, and a manifest."""
    write_plain_folder(path, step)
    checkpoints.seal(path, checkpoints.digests(path))


def write_plain_folder(path: Path, step: int) -> None:
    """As plain Lightning has it written."""
    (path / "shards").mkdir(parents=True)
    (path / "shards" / "__0_0.distcp").write_bytes(random.Random(step).randbytes(300))
    torch.save({"global_step": step}, path / "meta.pt")


def write_link_to_file(path: Path, step: int) -> None:
    """As ``save_last="link"`` has it."""
    write_file(path.with_name("linked.ckpt"), step)
    path.symlink_to("linked.ckpt")


def write_link_to_folder(path: Path, step: int) -> None:
    write_folder(path.with_name("linked.ckpt"), step)
    path.symlink_to("linked.ckpt")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What is wrong with a file


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step=8.ckpt"
    write_file(path, 8)
    return path


def test_a_whole_file_has_no_fault(saved: Path) -> None:
    assert checkpoints.fault(saved) == ""
    checkpoints.check(saved)


def in_bytes(size: int) -> str:
    return f"({size:,} bytes)"


def test_what_is_wrong_with_a_file_is_said(saved: Path) -> None:
    whole = saved.read_bytes()
    half = len(whole) // 2
    faults: dict[bytes, str] = {
        b"": "the file is empty",
        b"weights": "no checkpoint, or not a whole one (7 bytes)",
        b"\x80\x02}q\x00.": "no checkpoint, or not a whole one (6 bytes)",
        whole[:-1]: f"no checkpoint, or not a whole one {in_bytes(len(whole) - 1)}",
        whole[:half]: f"no checkpoint, or not a whole one {in_bytes(half)}",
        bytes(len(whole)): f"no checkpoint, or not a whole one {in_bytes(len(whole))}",
    }
    for content, fault in faults.items():
        saved.write_bytes(content)
        assert checkpoints.fault(saved) == fault


def test_a_file_that_is_not_there_and_another_archive_are_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoints.fault(tmp_path / "none.ckpt") == "there is no such file"
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as archive:
        archive.writestr("notes.txt", "weights")
    assert checkpoints.fault(tmp_path / "other.ckpt") == "an archive, but no checkpoint (123 bytes)"


def content_spans(path: Path) -> list[range]:
    """Where the entries' content lies, of which the archive has checksums."""
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    spans = []
    for entry in entries:
        head = entry.header_offset
        lengths = int.from_bytes(data[head + 26 : head + 28], "little"), int.from_bytes(data[head + 28 : head + 30], "little")
        begin = head + 30 + sum(lengths)
        spans.append(range(begin, begin + entry.file_size))
    return spans


def test_a_flipped_bit_is_found_wherever_there_is_content(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()
    positions = [position for span in content_spans(saved) for position in span]
    assert len(positions) > 0.5 * len(whole)
    chooser = random.Random(0)
    for position in chooser.sample(positions, 200):
        saved.write_bytes(flipped(whole, position, chooser.randrange(8)))
        assert "damaged" in checkpoints.fault(saved), f"at {position}"


@pytest.mark.parametrize("flag", [0x10, 0x30])
def test_an_entry_that_calls_itself_a_folder_is_a_fault(flag: int, saved: Path) -> None:
    """One bit: torch would take memory that nobody has written for the weights, and say nothing."""
    whole = bytearray(saved.read_bytes())
    place = whole.rindex(b"step=8/data/0") - 8  # the attributes in the archive's directory
    assert whole[place : place + 4] == bytes(4)
    whole[place] = flag
    saved.write_bytes(whole)
    torch.load(saved, weights_only=True)
    assert checkpoints.fault(saved).startswith("damaged: the checksum of its entry step=8/data/0 does not fit (")


def test_an_entry_of_two_sizes_is_a_fault(saved: Path) -> None:
    whole = bytearray(saved.read_bytes())
    whole[whole.rindex(b"step=8/data/0") - 26] ^= 1
    saved.write_bytes(whole)
    with pytest.raises(RuntimeError, match="PytorchStreamReader"):
        torch.load(saved, weights_only=True)
    assert checkpoints.fault(saved).startswith("damaged: the checksum of its entry step=8/data/0 does not fit (")


def test_a_flipped_bit_that_is_not_found_changes_nothing_that_is_loaded(saved: Path) -> None:
    """Checksums do not cover padding, dates and the like: torch then loads the same, or refuses by itself."""
    whole = saved.read_bytes()
    expected = torch.load(saved, weights_only=True)
    content = set().union(*map(set, content_spans(saved)))
    chooser = random.Random(1)
    missed = 0
    for position in chooser.sample(sorted(set(range(len(whole))) - content), 400):
        saved.write_bytes(flipped(whole, position, chooser.randrange(8)))
        if checkpoints.fault(saved):
            continue
        missed += 1
        with suppress(RuntimeError):  # of torch's reader of archives
            loaded = torch.load(saved, weights_only=True)
            assert loaded["global_step"] == expected["global_step"]
            assert loaded["state_dict"].keys() == expected["state_dict"].keys()
            assert all(torch.equal(value, expected["state_dict"][name]) for name, value in loaded["state_dict"].items())
    assert 100 < missed < 350


def flipped(data: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[position] ^= 1 << bit
    return bytes(changed)


def test_torch_itself_does_not_see_a_flipped_weight(saved: Path) -> None:
    """What the checksums are looked at for. When this fails, torch does it."""
    first = Net().state_dict()["net.0.weight"]
    raw = first.numpy().tobytes()[:16]
    whole = saved.read_bytes()
    assert whole.count(raw) == 1
    saved.write_bytes(flipped(whole, whole.index(raw), 7))
    assert not torch.equal(torch.load(saved, weights_only=True)["state_dict"]["net.0.weight"], first)
    assert checkpoints.fault(saved).startswith("damaged: the checksum of its entry step=8/data/0 does not fit (")


# What is wrong with a folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "step=8.ckpt"
    write_folder(path, 8)
    return path


def change_a_byte(folder: Path) -> None:
    path = folder / "shards" / "__0_0.distcp"
    path.write_bytes(flipped(path.read_bytes(), 17, 0))


FOLDER_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing": (lambda folder: None, ""),
    "an extra file": (lambda folder: (folder / "notes.txt").write_text("mine"), ""),
    "a missing file": (lambda folder: (folder / "meta.pt").unlink(), "damaged: meta.pt is missing"),
    "a missing folder": (lambda folder: shutil.rmtree(folder / "shards"), "damaged: shards/__0_0.distcp is missing"),
    "a changed byte": (change_a_byte, "damaged: shards/__0_0.distcp is not what was written"),
    "a file that grew": (
        lambda folder: (folder / "meta.pt").open("ab").write(b"\0"),
        "damaged: meta.pt is not what was written",
    ),
    "an empty file": (lambda folder: (folder / "meta.pt").write_bytes(b""), "damaged: meta.pt is not what was written"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), ""),
    "no manifest and no metadata": (
        lambda folder: [(folder / name).unlink() for name in (MANIFEST, "meta.pt")],
        "a folder, but no checkpoint of FSDP, FSDP2 or DeepSpeed, or not a whole one",
    ),
}


@pytest.mark.parametrize("name", FOLDER_FAULTS)
@pytest.mark.filterwarnings("ignore:unclosed file")
def test_what_is_wrong_with_a_folder_is_said(name: str, folder: Path) -> None:
    change, fault = FOLDER_FAULTS[name]
    change(folder)
    assert checkpoints.fault(folder) == fault


def test_a_folder_of_deepspeed_is_known_without_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    assert checkpoints.fault(tmp_path).startswith("a folder, but no checkpoint")
    torch.save({}, tmp_path / "checkpoint" / "mp_rank_00_model_states.pt")
    assert checkpoints.fault(tmp_path) == ""


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "{}", '{"files": 3}', '{"files": {"meta.pt": 3}}', '{"files": {"meta.pt": [1]}}', "\udcff"]
)
def test_a_damaged_manifest_is_a_fault(text: str, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert checkpoints.fault(folder).startswith("damaged: its manifest cannot be read (")


def test_shares_of_the_digests_are_the_whole(folder: Path) -> None:
    whole = checkpoints.digests(folder)
    assert whole.keys() == {"meta.pt", "shards/__0_0.distcp"}
    shares = [checkpoints.digests(folder, share, 3) for share in range(3)]
    assert {name: value for share in shares for name, value in share.items()} == whole
    assert sum(map(len, shares)) == len(whole)
    assert json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"] == whole


def test_each_file_of_a_folder_is_on_the_disk_before_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(checkpoints, "_to_disk", lambda path: order.append(path.name))
    write_folder(tmp_path / "step=8.ckpt", 8)
    assert order == ["meta.pt", "__0_0.distcp", MANIFEST]


# What is refused, and what is found instead


def test_the_refusal_names_path_size_reason_and_the_newest_whole_neighbour(tmp_path: Path) -> None:
    broken, older, newer, newest_but_broken = (tmp_path / f"{name}.ckpt" for name in ("last", "b", "a", "c"))
    for age, path in enumerate((newest_but_broken, newer, older, broken)):
        write_file(path, 9)
        os.utime(path, (1e9 - age, 1e9 - age))
    for path in (broken, newest_but_broken):
        os.truncate(path, 1000)
    before = broken.read_bytes()
    with pytest.raises(CheckpointError) as error:
        checkpoints.check(broken)
    assert str(error.value) == (
        f"{broken}: no checkpoint, or not a whole one (1,000 bytes). It was left as it is. Newest whole one there: {newer}."
    )
    assert broken.read_bytes() == before
    newer.unlink(), older.unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoints.check(broken)
    assert str(error.value) == f"{broken}: no checkpoint, or not a whole one (1,000 bytes). It was left as it is."


def test_the_refusal_of_a_folder_names_the_neighbour_too(folder: Path) -> None:
    neighbour = folder.with_name("step=4.ckpt")
    write_folder(neighbour, 4)
    change_a_byte(folder)
    with pytest.raises(CheckpointError) as error:
        checkpoints.check(folder)
    assert str(error.value) == (
        f"{folder}: damaged: shards/__0_0.distcp is not what was written. Newest whole one there: {neighbour}."
    )


def test_a_folder_of_checkpoints_is_refused_with_the_newest_in_it(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"Newest whole one there: {saved}\.$"):
        checkpoints.check(saved.parent)


def test_candidates_are_files_and_folders_that_have_or_lost_the_name_of_a_checkpoint(tmp_path: Path) -> None:
    write_file(tmp_path / "b.ckpt", 1)
    write_folder(tmp_path / "a.ckpt", 1)
    write_folder(tmp_path / ".a.ckpt.old", 1)  # a.ckpt has its name
    write_folder(tmp_path / ".c.ckpt.old", 1)
    write_folder(tmp_path / ".d.ckpt.partial", 1)
    write_plain_folder(tmp_path / ".e.ckpt.partial", 1)  # nobody says that it is complete
    write_file(tmp_path / ".f.ckpt.partial", 1)
    write_plain_folder(tmp_path / ".g.ckpt.old", 1)  # it had its name, so it was complete
    (tmp_path / "notes.txt").write_text("mine")
    assert [path.name for path in checkpoints.candidates(tmp_path)] == [
        ".c.ckpt.old",
        ".d.ckpt.partial",
        ".g.ckpt.old",
        "a.ckpt",
        "b.ckpt",
    ]
    assert checkpoints.candidates(tmp_path / "none") == checkpoints.candidates(tmp_path / "notes.txt") == []


def test_the_newest_is_furthest_in_training_then_youngest_and_never_broken(tmp_path: Path) -> None:
    for name, step, age in (("a", 8, 30), ("b", 8, 20), ("c", 4, 10), ("d", 12, 0)):
        path = tmp_path / f"{name}.ckpt"
        write_file(path, step)
        os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "d.ckpt").write_bytes(b"")
    assert checkpoints.newest(tmp_path) == (tmp_path / "b.ckpt", {tmp_path / "d.ckpt": "the file is empty"})
    assert checkpoints.newest(tmp_path / "none") == (None, {})


class Touch:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_runs_that_a_checkpoint_has_pickled(tmp_path: Path) -> None:
    path, mark = tmp_path / "hostile.ckpt", tmp_path / "ran"
    torch.save({"global_step": 8, "callbacks": Touch(mark)}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        read_metadata(path)
    assert checkpoints.newest(tmp_path) == (None, {path: "no checkpoint of a training"})
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "it would have run"


# A crash while one is written


WRITERS: dict[str, Callable[[Path, int], None]] = {"file": write_file, "folder": write_folder}
BEFORE: dict[str, Callable[[Path, int], None]] = {
    **WRITERS,
    "plain folder": write_plain_folder,
    "link to a file": write_link_to_file,
    "link to a folder": write_link_to_folder,
}


class Crash(BaseException):
    """Stands for the end of the process: nothing catches it."""


OPERATIONS = ("open", "fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
"""What changes a disk, or waits for it."""


@contextmanager
def crashing_at(number: int) -> Iterator[list[str]]:
    """Crashes instead of an operation of the operating system, counted from 0; gives the list of those that were done."""
    done: list[str] = []

    def stand_for(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            if len(done) == number:
                raise Crash(name)
            done.append(name)
            return real(*arguments, **options)

        return operation

    with pytest.MonkeyPatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, stand_for(name, getattr(os, name)))
        yield done


def save(write: Callable[[Path, int], None], target: Path, step: int) -> None:
    """As `ExactResume` does it on one process."""
    written = checkpoints.unfinished(target)
    checkpoints.remove(written)
    write(written, step)
    checkpoints.publish(written, target)


def crash_everywhere(write: Callable[[Path, int], None], before: Path, after: Path, step: int) -> Iterator[int]:
    """Gives the number of each operation of a save at which it crashed; the state that it left lies in ``after``."""
    number = 0
    while True:
        shutil.rmtree(after, ignore_errors=True)
        shutil.copytree(before, after, symlinks=True)
        try:
            with crashing_at(number):
                save(write, after / "last.ckpt", step)
        except Crash:
            yield number
            number += 1
        else:
            return


@pytest.mark.parametrize("written", WRITERS)
@pytest.mark.parametrize("replaced", BEFORE)
def test_a_crash_at_any_operation_leaves_a_whole_checkpoint_that_is_found(replaced: str, written: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    BEFORE[replaced](first / "last.ckpt", 1)
    crashes = 0
    for number in crash_everywhere(WRITERS[written], first, second, 2):
        crashes += 1
        found, _ = checkpoints.newest(second)
        assert found is not None, f"after a crash at operation {number}: {names(second)}"
        assert saved_step(found) in (1, 2)
    assert crashes >= 4
    save(WRITERS[written], second / "last.ckpt", 2)
    assert saved_step(second / "last.ckpt") == 2


@pytest.mark.parametrize("kind", ["file", pytest.param("folder", marks=pytest.mark.slow)])
def test_two_crashes_in_a_row_leave_a_whole_checkpoint_that_is_found(kind: str, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    first.mkdir()
    write = WRITERS[kind]
    write(first / "last.ckpt", 1)
    crashes = 0
    for number in crash_everywhere(write, first, second, 2):
        for other in crash_everywhere(write, second, third, 3):
            crashes += 1
            found, _ = checkpoints.newest(third)
            assert found is not None, f"after crashes at operations {number} and {other}: {names(third)}"
            assert saved_step(found) in (1, 2, 3)
        assert names(third) == ["last.ckpt"]  # the save that went well has cleaned up
        assert saved_step(third / "last.ckpt") == 3
    assert crashes >= 16


@pytest.mark.parametrize("written", WRITERS)
@pytest.mark.parametrize("replaced", BEFORE)
def test_a_checkpoint_takes_the_place_of_what_has_its_name(replaced: str, written: str, tmp_path: Path) -> None:
    target = tmp_path / "last.ckpt"
    BEFORE[replaced](target, 1)
    save(WRITERS[written], target, 2)
    assert checkpoints.fault(target) == ""
    assert not target.is_symlink()
    assert saved_step(target) == 2
    assert names(tmp_path) == (["last.ckpt", "linked.ckpt"] if "link" in replaced else ["last.ckpt"])
    if "link" in replaced:
        assert saved_step(tmp_path / "linked.ckpt") == 1  # what it led to is another checkpoint


@pytest.mark.parametrize("written", WRITERS)
def test_the_first_checkpoint_of_a_folder_needs_no_other(written: str, tmp_path: Path) -> None:
    save(WRITERS[written], tmp_path / "last.ckpt", 1)
    assert names(tmp_path) == ["last.ckpt"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path) -> None:
    """Else a loss of power could leave the name on nothing."""
    with crashing_at(-1) as done:
        save(write_file, tmp_path / "last.ckpt", 1)
    assert done[:1] == ["unlink"]  # what an earlier attempt may have left
    assert done[1:] == ["open", "fsync", "replace", "open", "fsync"]


def test_what_an_earlier_attempt_left_is_removed(tmp_path: Path) -> None:
    for write in (write_file, write_folder):
        path = tmp_path / "x"
        write(path, 1)
        checkpoints.remove(path)
        checkpoints.remove(path)
        assert names(tmp_path) == []
