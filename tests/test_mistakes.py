"""What a user gets wrong on the command line, and what is said: key, value, what is allowed, the nearest; a message and a code."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_adaptive.app import cli
from tests.cli import SCRIPT, Run, digests
from tests.support import ROOT, command


def choices(folder: str) -> str:
    """Of which file a message says that it can be chosen."""
    return ", ".join(sorted(path.stem for path in (ROOT / folder).glob("*.yaml")))


OPTIMIZERS, RECIPES, SWITCHES = choices("conf/optimizer"), choices("recipes"), choices("conf/switch")
FLAGS = (
    "--help, --hydra-help, --version, --run, --multirun, --resolve, --shell-completion, --cfg, --package, --config-path, "
    "--config-name, --config-dir, --experimental-rerun, --trust, --info"
)
KINDS = "optimizers, schedulers, param_groups, switches, triggers, handovers, recipes, tasks, trainers, loggers, callbacks"
UNITS = "Write {0}ep (epochs), {0}st (optimizer steps) or {0}% (of training)."
NO_LR = "is no learning rate. It is finite and above zero."

MISTAKES: list[tuple[str, str]] = [
    # An unknown choice in a group.
    ("optimizer=adamv", f"optimizer=adamv: optimizer has no 'adamv'. Did you mean 'adam'? Choices: {OPTIMIZERS}."),
    (
        "recipe=digits_adam_to_sdg",
        f"recipe=digits_adam_to_sdg: recipe has no 'digits_adam_to_sdg'. Did you mean 'digits_adam_to_sgd'? Choices: {RECIPES}.",
    ),
    ("recipe=./nowhere", f"recipe=./nowhere: recipe has no './nowhere'. Choices: {RECIPES}."),
    (
        "optimizer@switch.optimizer=sgdd",
        f"optimizer@switch.optimizer=sgdd: optimizer has no 'sgdd'. Did you mean 'sgd'? Choices: {OPTIMIZERS}.",
    ),
    (
        "logger=[csv,tensorbord]",
        f"logger=[csv,tensorbord]: logger has no 'tensorbord'. Did you mean 'tensorboard'? Choices: {choices('conf/logger')}.",
    ),
    (
        "switch=null",
        f"switch=null: 'null' is not the name of a file of switch. Choices: {SWITCHES}.",
    ),
    (
        "optimizer@switch.optimzer=sgd",
        "optimizer@switch.optimzer=sgd: there is no place 'optimizer@switch.optimzer'. Did you mean 'optimizer@switch.optimizer'? "
        "Places: optimizer, optimizer@switch.optimizer.",
    ),
    ("+optimizer=sgd", "+optimizer=sgd: optimizer is chosen already. Write it without the plus, to choose another."),
    # A key that does not exist.
    (
        "optimizer.lrr=3",
        "optimizer.lrr=3: there is no key 'lrr' in optimizer. Did you mean 'lr'? "
        "Keys: lr, betas, eps, weight_decay, amsgrad, fused.",
    ),
    (
        "+optimizer.lrr=3",
        "optimizer.lrr: Adam has no option 'lrr'. Did you mean 'lr'? Options: lr, betas, eps, weight_decay, amsgrad, foreach, "
        "maximize, capturable, differentiable, fused, decoupled_weight_decay.",
    ),
    (
        "~optimizer.lrr",
        "~optimizer.lrr: there is no key 'lrr' in optimizer. Did you mean 'lr'? "
        "Keys: lr, betas, eps, weight_decay, amsgrad, fused.",
    ),
    (
        "switch.att=3ep",
        "switch.att=3ep: there is no key 'att' in switch. Did you mean 'at'? "
        "Keys: enabled, at, when, then, gradient_clip_val, on_resume, optimizer, scheduler, param_groups, handover.",
    ),
    (
        "sead=1",
        "sead=1: there is no key 'sead'. Did you mean 'seed'? Keys: task, optimizer, scheduler, param_groups, switch, trainer, "
        "logger, callbacks, seed, resume, ckpt_path, test, study, output_dir.",
    ),
    # What Hydra cannot read.
    ("switch.at", "switch.at: cannot be read. Write key=value, and quote a value with special characters: \"key='a=b'\"."),
    ("seed=1,2", "seed=1,2: several values. Add -m to run each of them, or write a list in brackets: [1,2]."),
    # A duration without its unit, or malformed.
    ("switch.at=5", f"switch.at: 5 has no unit. {UNITS.format(5)}"),
    ("\"switch.at='5'\"", f"switch.at: '5' has no unit. {UNITS.format(5)}"),
    ("switch.at=5x", "switch.at: '5x' has the unknown unit 'x'. Units are ep (epochs), st (steps) and %."),
    (
        "switch.at=-3ep",
        "switch.at: '-3ep' is not a duration. Write a number and its unit: 5ep (epochs), 5st (optimizer steps) or 5%.",
    ),
    (
        "switch.at=null",
        "switch.at: a switch needs its moment: 5ep (epochs), 5st (optimizer steps) or 5% (of training); or a trigger (when).",
    ),
    ("scheduler.warmup=3", f"scheduler.warmup: 3 has no unit. {UNITS.format(3)}"),
    ("switch.scheduler.warmup=3", f"switch.scheduler.warmup: 3 has no unit. {UNITS.format(3)}"),
    ("scheduler.length=0ep", "scheduler.length: '0ep' is no length. Write a duration above zero, or null."),
    # A moment that is not inside the training, which has 20 epochs of 34 steps.
    ("switch.at=900ep", "switch.at: 900ep is step 30600, but training ends after 680 steps. Choose an earlier moment."),
    ("switch.at=100%", "switch.at: 100% is step 680, but training ends after 680 steps. Choose an earlier moment."),
    ("switch.at=120%", "switch.at: '120%' is more than the whole. A percentage lies between 0% and 100%."),
    ("switch.at=0ep", "switch.at: 0ep is step 0; the first phase would not make a step. Begin with this optimizer."),
    (
        "switch@switch.then=adam_to_sgd switch.then.at=60%",
        "switch.then.at: 60% is step 408, but the switch before it is at step 476. Moments must grow.",
    ),
    ("scheduler.warmup=50ep", "scheduler.warmup: 50ep is 1700 steps, but the schedule spans only 680."),
    # A number that is none, or not one that fits.
    ("optimizer.lr=-1", f"optimizer.lr: -1 {NO_LR}"),
    ("optimizer.lr=nan", f"optimizer.lr: nan {NO_LR}"),
    ("switch.optimizer.lr=-1", f"switch.optimizer.lr: -1 {NO_LR}"),
    ("switch.optimizer.lr=fast", "switch.optimizer.lr: 'fast' is not a number. Write one, for example 0.001."),
    ("optimizer.lr=", "optimizer.lr: '' is not a number. Write one, for example 0.001."),
    ("trainer.max_epochs=2.5", "trainer.max_epochs: 2.5 is not a whole number. Write one, for example 1."),
    ("seed=one", "seed: 'one' is no seed. Write a whole number from 0 to 4294967295, or null."),
    # A value where a node belongs.
    (
        "switch.optimizer=lbfgs",
        "switch.optimizer: 'lbfgs' is a word where a node belongs. To choose a file of the group, "
        "write optimizer@switch.optimizer=lbfgs.",
    ),
    (
        "switch.then=adam_to_sgd",
        "switch.then: 'adam_to_sgd' is a word where a node belongs. To choose a file of the group, "
        "write switch@switch.then=adam_to_sgd.",
    ),
    (
        "switch.optimizer=null",
        "switch.optimizer: a switch needs its next optimizer. Choose one with optimizer@switch.optimizer=sgd, "
        "or no switch with switch=none.",
    ),
    # A class that may not be named, or does not exist.
    (
        "optimizer._target_=os.system",
        "optimizer._target_: 'os.system' lies in the standard library, which a config may never name.",
    ),
    ("optimizer._target_=torch.optim.Addam", "optimizer._target_: torch.optim has no 'Addam'. Did you mean 'Adam'?"),
    (
        "trigger@switch.when=plateau +trainer.limit_val_batches=0 switch.at=null",
        "switch.when: OnPlateau(monitor=val/loss) looks at a metric after each validation, and this training has none: a module "
        "with validation_step, validation data and limit_val_batches above 0 are needed.",
    ),
    (
        "trigger@switch.when=plateau switch.when.monitor=val_loss trainer.max_epochs=2 switch.at=null",
        "switch.when.monitor: 'val_loss' was not logged. Did you mean 'val/loss'? Logged: train/loss, lr, val/acc, "
        "val/calibration_error, val/f1, val/loss.",
    ),
    (
        "trigger@switch.when=threshold",
        "switch.when.above: a threshold is either above or below a value. Give one of the two.",
    ),
    (
        "switch.when=plateau",
        "switch.when: 'plateau' is a word where a node belongs. To choose a file of the group, write trigger@switch.when=plateau.",
    ),
    ("scheduler.warmup=20ep trainer.max_epochs=10", "scheduler.warmup: 20ep is 680 steps, but the schedule spans only 340."),
    (
        "'+param_groups.slow={match: net.0.*, lrscale: 0.1}'",
        "param_groups.slow.lrscale: the optimizer has no option 'lrscale'. Did you mean 'lr_scale'? A rule sets lr_scale, lr, "
        "betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused, decoupled_weight_decay; its "
        "conditions are match, regex, module, ndim, any.",
    ),
    (
        "'+param_groups.slow={regex: \"([\", lr_scale: 0.1}'",
        "param_groups.slow.regex: '([' is no regular expression: unterminated character set at position 1.",
    ),
    (
        "'+param_groups.slow={lr_scale: 0.1}'",
        "param_groups.slow: a rule needs a condition, which parameters it is for. Write one of match, regex, module, ndim, any.",
    ),
    (
        "'+param_groups.slow=0.1'",
        "param_groups.slow: 0.1 is no rule. Write a mapping such as {match: '*.bias', weight_decay: 0}.",
    ),
    (
        "scheduler=plateau scheduler.patience=2ep",
        "scheduler.patience: '2ep' is not a whole number. Write one, for example 10.",
    ),
    (
        "scheduler=continue",
        "scheduler: there is no running schedule to continue; only a switch has one. Choose another.",
    ),
    (
        "scheduler=plateau scheduler@switch.scheduler=continue",
        "switch.scheduler: 'continue' needs a running schedule that is a function of the step, and plateau, monitor val/loss is "
        "not one. Give the phase before it a schedule of lightning_adaptive, or the switch one of its own.",
    ),
    (
        "scheduler=per_option",
        "scheduler: weight_decay of Adam is 0 in every group, so a schedule of it does nothing.",
    ),
    (
        "optimizer=adamw scheduler=per_option +scheduler@scheduler.options.beta1=linear",
        "scheduler: AdamW has no number 'beta1' to drive. momentum stands for beta1. Numbers: eps, weight_decay, momentum.",
    ),
    (
        "scheduler=custom scheduler._target_=torch.optim.lr_scheduler.StepLR +scheduler.step_size=2ep +scheduler.gamma=5%",
        "scheduler.gamma: '5%' is not a number. Write one, for example 0.1.",
    ),
    (
        "~scheduler.length",
        "~scheduler.length: the value is null, and Hydra takes out only what has one. Leave it as it is.",
    ),
    (
        "'scheduler={warmupp: 5%}'",
        "scheduler={warmupp: 5%}: it sets what scheduler does not have. Keys: warmup, warmup_shape, floor, length, interval, "
        "frequency.",
    ),
    ("optimizer=custom", "optimizer._target_: must be given: the path of a class, package.module.Class, of Optimizer."),
    ("optimizer._target_=torch.nn.Linear", "optimizer._target_: torch.nn.Linear is not a class of Optimizer, which belongs here."),
    (
        "optimizer._target_=mylab.opt.Muon",
        "optimizer._target_: 'mylab' is not an installed package. If it is your own code, say so outside the config: "
        "--trust mylab, or LIGHTNING_ADAPTIVE_TRUST=mylab.",
    ),
    (
        "optimizer._target_=torch..SGD",
        "optimizer._target_: 'torch..SGD' is no path of a class. Write package.module.Class, of Optimizer.",
    ),
    (
        "task.module._target_=torch.nn.Linear",
        "task.module._target_: torch.nn.Linear is not a class of LightningModule, which belongs here.",
    ),
    (
        "scheduler._target_=lightning_adaptive.Cosin",
        "scheduler._target_: lightning_adaptive has no 'Cosin'. Did you mean 'Cosine'?",
    ),
    # What the class itself refuses.
    ("optimizer.betas=[0.9,1.5]", "optimizer: Adam cannot be built: Invalid beta parameter at index 1: 1.5."),
    ("optimizer.eps=-1", "optimizer: Adam cannot be built: Invalid epsilon value: -1."),
    ("task.module.dropout=2", "task.module: DigitsNet cannot be built: dropout probability has to be between 0 and 1, but got 2."),
    (
        "task.data.batch_size=0",
        "task.data: DigitsData cannot be built: batch_size is at least 1 and num_workers at least 0, not 0 and 0.",
    ),
    ("task.mode=up", "callbacks.checkpoint: ModelCheckpoint cannot be built: `mode` can be min, max but got up."),
    (
        "trainer.max_steps=-5",
        "trainer: Trainer cannot be built: `max_steps` must be a non-negative integer or -1 (infinite steps). You passed in -5.",
    ),
    # A row of numbers, or a truth.
    (
        "optimizer.betas=[0.9]",
        "optimizer.betas: [0.9] is not a row of 2 numbers. Write them in brackets, for example [0.9, 0.999].",
    ),
    ("optimizer.betas=0.9", "optimizer.betas: 0.9 is not a row of 2 numbers. Write them in brackets, for example [0.9, 0.999]."),
    ("optimizer.betas=[0.9,x]", "optimizer.betas.1: 'x' is not a number."),
    ("optimizer.lr=[1,2]", "optimizer.lr: [1, 2] is not a number. Write one, for example 0.001."),
    ("optimizer.amsgrad=maybe", "optimizer.amsgrad: 'maybe' is neither true nor false."),
    ("trainer.deterministic=often", "trainer.deterministic: 'often' is neither true nor false, nor 'warn'."),
    ("switch.enabled=maybe", "switch.enabled: 'maybe' is neither true nor false."),
    ("test=maybe", "test: 'maybe' is neither true nor false."),
    # A training that cannot be meant.
    ("trainer.max_epochs=", "trainer.max_epochs: '' is not a whole number. Write one, for example 1."),
    ("trainer.max_epochs=0", "trainer.max_epochs: 0 makes a training without a step. Write at least 1."),
    ("trainer.limit_train_batches=0.0", "trainer.limit_train_batches: 0.0 makes a training without a step. Write at least 1."),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches: 0 makes a training without a step. Write at least 1."),
    ("trainer.val_check_interval=0", "trainer.val_check_interval: 0 makes no interval between two validations. Write at least 1."),
    ("seed=-1", "seed: -1 is no seed. Write a whole number from 0 to 4294967295, or null."),
    ("ckpt_path=", "ckpt_path: '' names no checkpoint. Write its path, or null."),
    # A key that every run has.
    ("~seed", "~seed: every run has this key. Instead of taking it out, write seed=null, or the value that holds."),
    ("~switch", "~switch: every run has this key. Instead of taking it out, write another of its files: switch=NAME."),
    # Given twice, or in a way that Hydra has another word for.
    ("optimizer=adam optimizer=sgd", "optimizer=adam: given twice. optimizer=sgd would win; leave one of them out."),
    ("seed=1 optimizer.lr=1 seed=2", "seed=1: given twice. seed=2 would win; leave one of them out."),
    ("++optimizer=sgd", "++optimizer=sgd: a group is chosen without a plus: optimizer=sgd."),
    ("+switch.at=3ep", "+switch.at=3ep: switch.at is there already. Write it without the plus, to change it."),
    (
        "switch.then.at=3ep",
        f"switch.then.at=3ep: switch.then is empty. Choose a file for it first: switch@switch.then={SWITCHES.partition(',')[0]}.",
    ),
    ("optimizer.lr=${nowhere}", "optimizer.lr: Interpolation key 'nowhere' not found"),
    (
        "'switch.at=5epoch s'",
        "switch.at: '5epoch s' is not a duration. Write a number and its unit: 5ep (epochs), 5st (optimizer steps) or 5%.",
    ),
    ("'switch.at=5 eps'", "switch.at: '5 eps' has the unknown unit 'eps'. Units are ep (epochs), st (steps) and %."),
    ("switch.at=", "switch.at: '' is not a duration. Write a number and its unit: 5ep (epochs), 5st (optimizer steps) or 5%."),
    (
        "scheduler=cosin",
        f"scheduler=cosin: scheduler has no 'cosin'. Did you mean 'cosine'? Choices: {choices('conf/scheduler')}.",
    ),
    (
        "hydra/launcher=joblibb",
        "hydra/launcher=joblibb: hydra/launcher has no 'joblibb'. Did you mean 'joblib'? "
        "Choices: basic, joblib, submitit_local, submitit_slurm.",
    ),
    # A flag.
    ("--cgf job", f"--cgf: there is no such flag. Did you mean '--cfg'? Flags: {FLAGS}."),
    ("seed=1 -x", f"-x: there is no such flag. Flags: {FLAGS}."),
    ("-cd", "-cd needs a value."),
    ("-cn nothing", "-cn nothing: there is no such config. Ours is train; one of your own lies in the folder of -cd."),
    ("hydra.run.dir=/proc/x", "/proc/x: No such file or directory. A run writes there: hydra.run.dir=FOLDER names another place."),
    ("param_groups=inherit", "param_groups: the first phase has no groups to inherit. Leave it out, or write none."),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[arguments for arguments, _ in MISTAKES])
def test_a_mistake_gets_one_line_and_code_2(arguments: str, message: str, train: Run, tmp_path: Path) -> None:
    earlier = tmp_path / "outputs" / "earlier" / "checkpoints" / "last.ckpt"
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes(b"an earlier run's")
    before = digests(tmp_path)
    ended = train(*shlex.split(arguments))
    assert ended.err == f"lightning-adaptive: {message}\n"
    assert ended.code == 2
    assert before.items() <= digests(tmp_path).items()
    assert [path for path in tmp_path.rglob("*.ckpt") if path != earlier] == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no such file."),
        (b"", "the file is empty. It was left as it is."),
        (b"hello\n", "no checkpoint, or not a whole one (6 bytes). It was left as it is."),
        (b"PK\x05\x06" + 18 * b"\0", "an archive, but no checkpoint (22 bytes). It was left as it is."),
    ],
    ids=["missing", "empty", "text", "another archive"],
)
@pytest.mark.parametrize("name", ["a.ckpt", "epoch=0-step=34.ckpt"])
def test_a_file_that_is_no_checkpoint_gets_code_3(content: bytes | None, told: str, name: str, train: Run, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = digests(tmp_path)
    ended = train(f"ckpt_path={name}")
    assert ended.err == f"lightning-adaptive: ckpt_path={name}: {told}\n"
    assert ended.code == 3
    assert before.items() <= digests(tmp_path).items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "'trian' is no command. Did you mean 'train'? Commands: train, preview, list."),
        (["list", "optimzers"], f"there are no 'optimzers'. Did you mean 'optimizers'? Kinds: {KINDS}."),
        (["list", "--all"], "--all: there is no such flag. Flags: --config-dir, --help."),
        (["list", "-cd", "nowhere"], "-cd nowhere: there is no such folder."),
    ],
)
def test_a_mistake_beside_train(arguments: list[str], message: str, command_line: Run) -> None:
    ended = command_line(*arguments)
    assert ended.err == f"lightning-adaptive: {message}\n"
    assert ended.code == 2


@pytest.mark.filterwarnings("ignore:The number of training batches")  # of Lightning's, about its lines of metrics
def test_a_metric_that_is_never_logged_is_named_after_the_first_validation(train: Run) -> None:
    ended = train("task.monitor=val/accc", "switch=none", "trainer.limit_train_batches=2")
    assert ended.err.splitlines()[-1] == (
        "lightning-adaptive: task.monitor: 'val/accc' was not logged. Did you mean 'val/acc'? "
        "Logged: train/loss, val/acc, val/calibration_error, val/f1, val/loss."
    )
    assert ended.code == 2


def test_far_more_processes_than_cpus_are_refused(train: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    ended = train("trainer=ddp_cpu", "trainer.devices=64")
    assert ended.err == "lightning-adaptive: trainer.devices: 64 processes would bring the 2 CPUs here to a stop. Write 2.\n"
    assert ended.code == 2


@pytest.mark.parametrize(("arguments", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_usage(arguments: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-adaptive", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    shown, other = reversed(capsys.readouterr()) if code else capsys.readouterr()
    assert shown.startswith("usage: lightning-adaptive COMMAND [option=value ...]\n")
    assert other == ""


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    """What Lightning and Python add to stderr counts as well."""
    ended = command(["train", "switch.at=900ep"], tmp_path)
    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    ours = [line for line in lines if not line.startswith("INFO: ")]
    assert ours == [
        "lightning-adaptive: switch.at: 900ep is step 30600, but training ends after 680 steps. Choose an earlier moment."
    ]
    assert "Traceback" not in ended.stdout


def test_the_console_script_is_the_same(tmp_path: Path) -> None:
    ended = subprocess.run([SCRIPT, "train", "optimizer=adamv"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == f"lightning-adaptive: {dict(MISTAKES)['optimizer=adamv']}\n"
    assert os.listdir(tmp_path) == []
