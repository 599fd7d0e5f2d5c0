"""Every checkpoint of a run leads back to the same weights, optimizer state, random states, batches and logged steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.data import WeightedRandomSampler

from tests.exactness import Case, resume_everywhere, run
from tests.pair import Pair

CASES = {
    "plain": Case(),
    "validated": Case(validated=True),
    "switched in mid-epoch": Case(switched=True),
    "switched, one batch a step": Case(switched=True, validated=True, options={"accumulate_grad_batches": 1}),
    "draws in on_train_start and on_train_epoch_start": Case(module=("draws at the start", "draws in each epoch")),
    "reads the number of steps": Case(module=("reads the number of steps",), switched=True),
    "max_steps": Case(options={"max_steps": 12, "max_epochs": -1}),
    "max_steps, validated": Case(options={"max_steps": 12, "max_epochs": -1}, validated=True),
    "max_steps and max_epochs": Case(options={"max_steps": 12, "max_epochs": 3}),
    "max_steps and max_epochs, validated": Case(options={"max_steps": 12, "max_epochs": 3}, validated=True),
    "plateau": Case(module=("plateau",), validated=True),
    "validated every three batches": Case(options={"val_check_interval": 3}, validated=True),
    "validated across epochs": Case(options={"check_val_every_n_epoch": None, "val_check_interval": 5}, validated=True),
    "validated every other epoch": Case(options={"check_val_every_n_epoch": 2}, validated=True),
    "three batches a step, of eight": Case(options={"accumulate_grad_batches": 3}, validated=True),
    "not shuffled": Case(loader={"shuffle": False}),
    "own generator": Case(loader={"generator": torch.Generator().manual_seed(3)}),
    "weighted sampler": Case(loader={"shuffle": False, "sampler": WeightedRandomSampler([1.0, 2.0] * 30, 64)}),
    "limited": Case(options={"limit_train_batches": 5}, validated=True),
    "last batch dropped": Case(loader={"drop_last": True, "batch_size": 6}),
    "workers": Case(workers=2),
}
SLOW = {
    "workers, validated, switched": Case(workers=2, validated=True, switched=True),
    "persistent workers": Case(workers=2, loader={"persistent_workers": True}),
    "workers, max_steps": Case(workers=2, options={"max_steps": 12, "max_epochs": -1}),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_every_checkpoint_leads_back(name: str, tmp_path: Path) -> None:
    count, differing = resume_everywhere({**CASES, **SLOW}[name], tmp_path)
    assert count >= 8
    assert differing == {}


@pytest.mark.parametrize("name", ["plain", "three batches a step, of eight", "validated every three batches", "plateau"])
def test_checkpoints_within_a_step_lead_back(name: str, tmp_path: Path) -> None:
    count, differing = resume_everywhere(CASES[name], tmp_path, every_batch=True)
    assert count >= 23
    assert differing == {}


def test_a_validation_draws_nothing_from_what_training_draws_from() -> None:
    validated, alone = run(Case(validated=True), None, 1), run(Case(), None, 1)
    assert (validated.weights, validated.random, validated.seen) == (alone.weights, alone.random, alone.seen)


def test_plain_lightning_does_not_lead_back(tmp_path: Path) -> None:
    """What these tests are about: each of the same checkpoints ends elsewhere without the callback."""
    count, differing = resume_everywhere(Case(exact=False), tmp_path)
    assert len(differing) == count
    assert all("weights" in faults for faults in differing.values())


PAIRED = {
    # By rank, or the random states of both would be the same.
    "ddp": Case(strategy="ddp", validated=True, switched=True, module=("draws by rank",)),
    "fsdp2": Case(strategy="fsdp2 sharded", validated=True, switched=True),
}
PAIRED_SLOW = {
    "fsdp": Case(strategy="fsdp sharded", switched=True),
    "ddp, workers": Case(strategy="ddp", workers=2),
    "ddp, not shuffled": Case(strategy="ddp", loader={"shuffle": False}),
    "ddp, weighted sampler": Case(strategy="ddp", loader=CASES["weighted sampler"].loader),
    "ddp, max_steps": Case(strategy="ddp", options={"max_steps": 12, "max_epochs": -1}, validated=True),
    "ddp, reads the number of steps": Case(strategy="ddp", module=("reads the number of steps", "draws at the start")),
    "fsdp2, workers": Case(strategy="fsdp2 sharded", workers=2, switched=True),
    "fsdp2, max_steps": Case(strategy="fsdp2 sharded", options={"max_steps": 12, "max_epochs": -1}, validated=True),
    "fsdp2, reads the number of steps": Case(strategy="fsdp2 sharded", module=("reads the number of steps", "draws at the start")),
    "fsdp2 full": Case(strategy="fsdp2 full", validated=True, switched=True),
    "zero-2": Case(strategy="deepspeed 2", switched=True),
    "zero-3": Case(strategy="deepspeed 3", switched=True),
}


@pytest.mark.parametrize("name", [*PAIRED, *(pytest.param(name, marks=pytest.mark.slow) for name in PAIRED_SLOW)])
def test_every_checkpoint_of_two_processes_leads_back(name: str, tmp_path: Path, pair: Pair) -> None:
    for count, differing in pair.run(resume_everywhere, {**PAIRED, **PAIRED_SLOW}[name], tmp_path):
        assert count >= 7
        assert differing == {}
