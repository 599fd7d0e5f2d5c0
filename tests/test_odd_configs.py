"""Valid but odd command lines: they run, make the steps that they say, and switch where they say."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.cli import SHORT, Run, result, runs

Phases = list[tuple[str, int]]
"""Class name of the optimizer and first step of each phase."""

ADAM_TO_SGD = [("Adam", 0), ("SGD", 3)]  # 70 % of four steps

# What is typed beside `SHORT`, which makes an epoch of four batches; the phases; the steps.
ODD: list[tuple[str, Phases, int]] = [
    # Moments and lengths.
    ("'switch.at=2 steps'", [("Adam", 0), ("SGD", 2)], 4),
    ("switch.at=0.5ep", [("Adam", 0), ("SGD", 2)], 4),
    ("switch.at=37.5%", [("Adam", 0), ("SGD", 2)], 4),  # a half is rounded up
    ("'switch.at=1 EPOCH' trainer.max_epochs=2", [("Adam", 0), ("SGD", 4)], 8),
    ("scheduler.warmup=100%", ADAM_TO_SGD, 4),
    ("scheduler.length=50st", ADAM_TO_SGD, 4),
    ("scheduler=step scheduler.every=1st", ADAM_TO_SGD, 4),
    ("scheduler=none scheduler@switch.scheduler=none", ADAM_TO_SGD, 4),
    # Phases.
    ("optimizer=sgd", [("SGD", 0), ("SGD", 3)], 4),
    ("optimizer=sgd optimizer@switch.optimizer=adam", [("SGD", 0), ("Adam", 3)], 4),
    ("switch=none optimizer=lbfgs", [("LBFGS", 0)], 4),
    ("switch.enabled=false", [("Adam", 0)], 4),
    (
        "switch@switch.then=adam_to_sgd switch.at=1st switch.then.at=2st optimizer@switch.then.optimizer=rmsprop",
        [("Adam", 0), ("SGD", 1), ("RMSprop", 2)],
        4,
    ),
    (
        "switch@switch.then=adam_to_sgd switch@switch.then.then=adam_to_sgd "
        "switch.at=1st switch.then.at=2st switch.then.then.at=3st optimizer@switch.then.optimizer=adam",
        [("Adam", 0), ("SGD", 1), ("Adam", 2), ("SGD", 3)],
        4,
    ),
    (
        "switch@switch.then=adam_to_lbfgs switch.then.at=80% trainer.max_epochs=3",
        [("Adam", 0), ("SGD", 8), ("LBFGS", 10)],
        12,
    ),
    (
        "scheduler@switch.scheduler=cosine switch.scheduler.warmup=5% optimizer@switch.optimizer=adamw",
        [("Adam", 0), ("AdamW", 3)],
        4,
    ),
    ("switch.gradient_clip_val=0.5", ADAM_TO_SGD, 4),
    ("switch.gradient_clip_val=null trainer.gradient_clip_val=1", ADAM_TO_SGD, 4),
    # Values in other spellings, and keys that no file lists.
    ("optimizer.lr=1", ADAM_TO_SGD, 4),
    ("optimizer.lr=.001 optimizer.betas=[0,0.5]", ADAM_TO_SGD, 4),
    ("++optimizer.lr=1E-2 +optimizer.foreach=true optimizer.fused=null", ADAM_TO_SGD, 4),
    ("~optimizer.lr", ADAM_TO_SGD, 4),
    ("'optimizer.lr=${switch.optimizer.lr}'", ADAM_TO_SGD, 4),
    (
        "scheduler=custom scheduler._target_=torch.optim.lr_scheduler.StepLR +scheduler.step_size=25%",
        [("Adam", 0), ("SGD", 3)],
        4,
    ),
    ("optimizer=custom optimizer._target_=torch.optim.Rprop +optimizer.etas=[0.4,1.3]", [("Rprop", 0), ("SGD", 3)], 4),
    ("optimizer=custom optimizer._target_=pytorch_optimizer.Lion optimizer.lr=1e-4", [("Lion", 0), ("SGD", 3)], 4),
    ("'optimizer={lr:0.5}'", ADAM_TO_SGD, 4),
    ("optimizer=adam.yaml", ADAM_TO_SGD, 4),
    ("seed=null", ADAM_TO_SGD, 4),
    # The trainer.
    ("trainer.max_epochs=-1 trainer.max_steps=4 switch.at=1st", [("Adam", 0), ("SGD", 1)], 4),
    ("+trainer.max_time=00:01:00:00", ADAM_TO_SGD, 4),
    ("trainer.accumulate_grad_batches=3", [("Adam", 0), ("SGD", 1)], 2),
    ("trainer.accumulate_grad_batches=100 trainer.max_epochs=2", [("Adam", 0), ("SGD", 1)], 2),
    ("trainer.num_sanity_val_steps=2 trainer.val_check_interval=0.5", ADAM_TO_SGD, 4),
    ("+trainer.limit_val_batches=0 task.monitor=null", ADAM_TO_SGD, 4),
    ("+trainer.enable_progress_bar=false", ADAM_TO_SGD, 4),
    ("trainer.precision=bf16-mixed", ADAM_TO_SGD, 4),
    # Parts taken out, put in another order, or put elsewhere.
    ("~callbacks.checkpoint", ADAM_TO_SGD, 4),
    ("callbacks.exact_resume=null", ADAM_TO_SGD, 4),
    ("logger=[tensorboard,csv]", ADAM_TO_SGD, 4),
    ("-r seed=3", ADAM_TO_SGD, 4),
    ("'hydra.run.dir=\"outputs/a b,c=d\"'", ADAM_TO_SGD, 4),
]


@pytest.mark.filterwarnings("ignore:The number of training batches")  # of Lightning's, about its lines of metrics
@pytest.mark.filterwarnings("ignore:Precision bf16-mixed is not supported by the model summary")
@pytest.mark.filterwarnings("ignore:trainer.accumulate_grad_batches=100 is more than the 4 batches of an epoch")
@pytest.mark.parametrize(("arguments", "phases", "steps"), ODD, ids=[arguments for arguments, _, _ in ODD])
def test_an_odd_command_line_runs(arguments: str, phases: Phases, steps: int, train: Run, tmp_path: Path) -> None:
    typed = shlex.split(arguments)
    keys = {argument.partition("=")[0] for argument in typed}
    ended = train(*typed, *(argument for argument in SHORT if argument.partition("=")[0] not in keys))
    assert ended.code == 0, ended.err
    [run] = runs(tmp_path)
    told = result(run)
    assert [(phase["optimizer"], phase["first_step"]) for phase in told["phases"]] == phases
    assert told["steps"] == steps
