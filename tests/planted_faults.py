"""Faults that really happen, planted one at a time into a copy of the tree, each with the quickest test that catches it.

``python -m tests.planted_faults`` runs them all in some minutes, prints the table, and ends with 1 if one survives. Words choose
some: ``python -m tests.planted_faults clock momentum``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hydra  # noqa: F401 - as pytest and what the tests import, once for all
import pytest

from tests.support import ROOT
from tests.test_project import tracked_files


@dataclass(frozen=True)
class Fault:
    """One fault.

    Args:
        title: what goes wrong.
        file: the file in the package.
        old: text that stands there once.
        new: what stands there instead.
        test: the test that catches it, without ``tests/test_``.
    """

    title: str
    file: str
    old: str
    new: str
    test: str

    @property
    def node(self) -> str:
        """The test as pytest names it."""
        return f"tests/test_{self.test}"


FAULTS = (
    Fault(
        "a duration is cut off instead of rounded",
        "durations.py",
        "(number + Fraction(1, 2)).__floor__()",
        "number.__floor__()",
        "durations.py::test_counts_steps_to_the_nearest_halves_up",
    ),
    Fault(
        "a phase's schedule spans the whole training",
        "durations.py",
        "self.total_steps - self.first_step",
        "self.total_steps",
        "schedules.py::test_spans_from_the_phase_to_the_end_of_training",
    ),
    Fault(
        "a warm-up begins at zero",
        "schedules.py",
        "rise((step + 1) / warmup)",
        "rise(step / warmup)",
        "schedules.py::test_pain_10_the_warm_up_is_a_field_of_every_schedule_and_the_shape_follows",
    ),
    Fault(
        "the floor cuts what it should scale",
        "schedules.py",
        "floor + (1 - floor) * shape(step)",
        "max(floor, shape(step))",
        "schedules.py::test_the_floor_scales_what_ends_at_zero_and_cuts_the_rest",
    ),
    Fault(
        "a milestone comes one step late",
        "curves.py",
        "bisect_right(reached, step)",
        "bisect_right(reached, step - 1)",
        "schedules.py::test_equals_others_over_a_whole_run",
    ),
    Fault(
        "the last rule that matches wins",
        "param_groups.py",
        "taker = next((name for name, rule in self.rules.items()",
        "taker = next((name for name, rule in reversed(self.rules.items())",
        "param_groups.py::test_the_first_match_wins_and_the_rest_is_the_default_group",
    ),
    Fault(
        "a frozen parameter is taken in",
        "param_groups.py",
        "for parameter in members if parameter.trainable)",
        "for parameter in members)",
        "param_groups.py::test_a_rule_of_frozen_parameters_is_not_dead_and_takes_them_when_they_are_unfrozen",
    ),
    Fault(
        "a zero decay is lost where nothing decays",
        "partitions.py",
        "group.no_decay or asked.no_decay",
        "group.no_decay",
        "param_groups.py::test_a_zero_decay_that_a_rule_asks_for_is_kept_where_nothing_decays",
    ),
    Fault(
        "a number of dimensions is compared the wrong way round",
        "rules.py",
        "(len(parameter.size_of_shape()), int(found[2]))",
        "(int(found[2]), len(parameter.size_of_shape()))",
        "param_groups.py::test_a_condition_matches",
    ),
    Fault(
        "a plateau fires one validation early",
        "triggers.py",
        "if waited <= self.patience:",
        "if waited < self.patience:",
        "triggers.py::test_a_plateau",
    ),
    Fault(
        "a metric that is not a number is looked at",
        "triggers.py",
        "if not math.isfinite(value):",
        "if math.isinf(value):",
        "triggers.py::test_a_plateau",
    ),
    Fault(
        "a smoothed metric is not corrected for its beginning",
        "triggers.py",
        "average / (1 - self.smoothing**count)",
        "average",
        "triggers.py::test_smoothing_is_an_average_that_is_corrected_for_its_beginning",
    ),
    Fault(
        "SWATS waits for one look more than its patience",
        "triggers.py",
        'after["agreed"] >= self.patience',
        'after["agreed"] > self.patience',
        "triggers.py::test_swats_looks_every_so_many_steps_and_shows_what_it_sees",
    ),
    Fault(
        "the tolerance of SWATS is a number and no share",
        "triggers.py",
        "abs(lr - short) / lr if lr else math.inf}",
        "abs(lr - short)}",
        "triggers.py::test_the_relative_criterion_is_its_definition",
    ),
    Fault(
        "a resumed schedule is one step ahead",
        "lr_schedulers.py",
        'self.last_epoch = state_dict["step"]',
        'self.last_epoch = state_dict["step"] + 1',
        "lr_schedulers.py::test_its_state_is_the_step_and_a_resume_at_any_step_goes_on",
    ),
    Fault(
        "several optimizers evaluate the loss without gradients",
        "combined.py",
        "with torch.enable_grad():",
        "with torch.no_grad():",
        "combined.py::test_the_loss_is_evaluated_once_with_gradients",
    ),
    Fault(
        "the gain of SGD forgets its dampening",
        "moments.py",
        '(1 - float(group["dampening"])) / (1 - momentum)',
        "1 / (1 - momentum)",
        "moments.py::test_within_a_family_an_update_is_the_learning_rate_and_the_gain",
    ),
    Fault(
        "a carried momentum keeps Adam's bias",
        "moments.py",
        'gain(new) / (1 - old["betas"][0] ** max(float(state["step"]), 1))',
        "gain(new)",
        "moments.py::test_adam_to_sgd",
    ),
    Fault(
        "a learning rate for SGD forgets the gain",
        "handover.py",
        '(moments.gain(group) if toward == "sgd" else 1.0)',
        "1.0",
        "handover.py::test_match_projection_takes_the_estimate_of_a_trigger",
    ),
    Fault(
        "the guard stays for one update more",
        "switch.py",
        "if trainer.global_step >= self._guarded_to:",
        "if trainer.global_step > self._guarded_to:",
        "handover_in_runs.py::test_a_guards_window_may_end_within_a_batch",
    ),
    Fault(
        "the bytes of a state are counted in elements",
        "phases.py",
        "value.numel() * value.element_size()",
        "value.numel()",
        "phases.py::test_counts_the_bytes_of_an_optimizers_state",
    ),
    Fault(
        "the normal deviate that Python keeps is lost",
        "random_states.py",
        "normal if has_normal else None",
        "None",
        "random_states.py::test_the_normal_that_a_generator_keeps_comes_back[python, normal]",
    ),
    Fault(
        "a resumed epoch leaves one batch out",
        "data_order.py",
        "if number >= begin_at:",
        "if number > begin_at:",
        "data_order.py::test_every_kind_of_sampler_comes_back",
    ),
    Fault(
        "every epoch has the order of the first",
        "data_order.py",
        "mix(self.seed, epoch, turn, number)",
        "mix(self.seed, turn, number)",
        "data_order.py::test_epochs_and_seeds_differ_and_the_same_ones_do_not",
    ),
    Fault(
        "a worker has one seed for all its batches",
        "data_order.py",
        "mix(seed, number)",
        "mix(seed)",
        "data_order.py::test_what_workers_draw_is_a_function_of_seed_epoch_and_batch",
    ),
    Fault(
        "the checksums of a file are skipped",
        "checkpoints.py",
        "damaged = archive.testzip()",
        "damaged = None",
        "checkpoints.py::test_a_flipped_bit_is_found_wherever_there_is_content",
    ),
    Fault(
        "a checkpoint has its name before it is on the disk",
        "checkpoints.py",
        "_to_disk(written)",
        "written.stat()",
        "checkpoints.py::test_a_file_is_on_the_disk_before_it_has_its_name",
    ),
    Fault(
        "the digests of a manifest are not compared",
        "checkpoints.py",
        " or _digest(path) != digest",
        "",
        "checkpoints.py::test_what_is_wrong_with_a_folder_is_said",
    ),
    Fault(
        "an epoch's rest of batches is no step",
        "trainers.py",
        "math.ceil(batches / accumulated",
        "math.floor(batches / accumulated",
        "preview.py::test_the_clock_of_a_trainer",
    ),
    Fault(
        "a switch comes at the last batch of a window",
        "strategies.py",
        "return batch_idx % trainer.accumulate_grad_batches == 0",
        "return (batch_idx + 1) % trainer.accumulate_grad_batches == 0",
        "switch.py::test_accumulated_gradients_are_never_dropped",
    ),
    Fault(
        "a metric is the sum over all ranks",
        "trainers.py",
        '"mean") for name, value in own',
        '"sum") for name, value in own',
        "triggers.py::test_ranks_that_see_different_values_decide_together[ddp]",
    ),
    Fault(
        "each rank decides by its own sums",
        "strategies.py",
        "torch.distributed.broadcast(rows, 0)",
        "pass",
        "handover_in_runs.py::test_ranks_that_have_computed_other_sums_decide_by_those_of_the_first",
    ),
    Fault(
        "a checkpoint's pickle is trusted",
        "checkpoints.py",
        "mmap=True, weights_only=True",
        "mmap=True, weights_only=False",
        "checkpoints.py::test_nothing_runs_that_a_checkpoint_has_pickled",
    ),
    Fault(
        "the old scheduler stays, and keeps the old optimizer alive",
        "strategies.py",
        "self.strategy.lr_scheduler_configs = lr_scheduler_configs",
        "self.strategy.lr_scheduler_configs += lr_scheduler_configs",
        "switch.py::test_the_old_optimizer_its_state_and_its_scheduler_are_freed_without_the_garbage_collector",
    ),
    Fault(
        "a failed exchange leaves the new optimizer in place",
        "strategies.py",
        "self._put(*self._old)",
        "pass",
        "resume.py::test_an_exception_at_a_seam_leaves_a_checkpoint_that_resumes[after install-exception]",
    ),
    Fault(
        "what a schedule made of an option counts as a setting",
        "settings.py",
        'group.get(f"initial_{name}", group[name])',
        "group[name]",
        "phases.py::test_settings_of_groups_are_those_of_the_configuration_and_not_what_a_schedule_makes_of_them",
    ),
    Fault(
        "a switch comes one step late",
        "switch.py",
        "trainer.global_step >= moment",
        "trainer.global_step > moment",
        "switch.py::test_switches_at_the_step_that_was_asked_for",
    ),
    Fault(
        "the next schedule counts from the start of training",
        "switch.py",
        "_clock(trainer, step)",
        "_clock(trainer)",
        "schedules_in_runs.py::test_a_schedule_of_the_next_phase_spans_what_remains",
    ),
    Fault(
        "what a trigger has seen is not saved",
        "switch_state.py",
        '"trigger": dict(self.trigger)',
        '"trigger": {}',
        "triggers.py::test_what_is_remembered_lies_in_the_checkpoint_in_plain_values",
    ),
    Fault(
        "the first step of a continued schedule is not restored",
        "switch.py",
        "since = state.first_step - state.schedule_step",
        "since = 0",
        "schedules_in_runs.py::test_a_continued_schedule_goes_on_after_a_resume",
    ),
    Fault(
        "the Trainer's clipping value is not set back",
        "switch.py",
        "trainer.gradient_clip_val = self._trainer_clip_val",
        "pass",
        "switch.py::test_gradient_clipping_of_the_next_phase_and_back",
    ),
    Fault(
        "other settings on resume are no error",
        "switch.py",
        'any(change.key != "seed"',
        'any(change.key == "seed"',
        "resume.py::test_other_settings_are_said_and_end_the_run_unless_a_policy_is_given",
    ),
    Fault(
        "a validation moves the random states of training",
        "exact_resume.py",
        "random_states.give(self._before_validation,",
        "random_states.give(random_states.take(trainer.strategy.root_device),",
        "exact_resume.py::test_a_validation_draws_nothing_from_what_training_draws_from",
    ),
    Fault(
        "pending batches are not seen again",
        "exact_resume.py",
        "_add(batch, name, begun - count)",
        "_add(batch, name, 0 * count)",
        "exact_resume.py::test_checkpoints_within_a_step_lead_back[plain]",
    ),
    Fault(
        "every rank goes on with the random states of the first",
        "exact_resume.py",
        "saved.random[trainer.global_rank]",
        "saved.random[0]",
        "exact_resume.py::test_every_checkpoint_of_two_processes_leads_back[ddp]",
    ),
    Fault(
        "norms are added up before they are squared",
        "gradient_norms.py",
        "together.double().square().sum()",
        "together.double().sum().square()",
        "noise.py::test_every_kind_of_gradient_is_seen",
    ),
    Fault(
        "the small and the big batch are exchanged",
        "noise_scale.py",
        "(big_batch * big_sq - small_batch * small_sq)",
        "(small_batch * big_sq - big_batch * small_sq)",
        "noise_scale.py::test_the_estimates_are_the_sample_variance_and_the_mean_of_products",
    ),
    Fault(
        "the loss scale is undone once, though norms are squared",
        "noise.py",
        "small / gradients / scale**2",
        "small / gradients / scale",
        "noise.py::test_the_loss_scale_is_undone",
    ),
    Fault(
        "a preview steps schedulers one epoch early",
        "series.py",
        "(step // epoch.steps + 1) % frequency",
        "(step // epoch.steps) % frequency",
        "preview.py::test_what_preview_draws_is_what_training_does",
    ),
    Fault(
        "a plan ends each phase one step late",
        "plan.py",
        "str(self.end_step - 1)",
        "str(self.end_step)",
        "report.py::test_the_plan_says_what_the_run_then_does",
    ),
    Fault(
        "a result holds NaN, which is no JSON",
        "report.py",
        "value if math.isfinite(value) else None",
        "value if not math.isinf(value) else None",
        "report.py::test_the_result_is_plain_json_with_null_for_what_is_not_finite",
    ),
    Fault(
        "the standard library may be named",
        "trust.py",
        "if package in sys.stdlib_module_names:",
        "if package in sys.builtin_module_names:",
        "trust.py::test_no_word_is_enough_for_the_standard_library",
    ),
    Fault(
        "a name is imported without a look at its package",
        "config.py",
        'trust.check(target, f"{key}._target_")',
        "pass",
        "trust.py::test_no_hostile_target_runs_in_any_slot",
    ),
    Fault(
        "an optimizer that is built already is taken for a factory",
        "hooks.py",
        'check_factory(factory, Optimizer, "optimizer")',
        "pass",
        "attach.py::test_attach_refuses_at_once",
    ),
    Fault(
        "a mistake in a command ends as a failed training does",
        "app/cli.py",
        "_fail(str(error), error.exit_code)",
        "_fail(str(error), 1)",
        "mistakes.py::test_a_mistake_beside_train",
    ),
    Fault(
        "a checkpoint that is none ends as a failed training does",
        "app/job.py",
        "sys.exit(error.exit_code)",
        "sys.exit(1)",
        "mistakes.py::test_a_file_that_is_no_checkpoint_gets_code_3",
    ),
    Fault(
        "a job takes the folder of another config",
        "app/sweep.py",
        'if marked not in ("", own):',
        'if marked in ("", own):',
        "sweeps.py::test_a_folder_of_another_config_is_left_alone",
    ),
)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the tracked files, for as long as it lasts."""
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as name:
        tree = Path(name)
        for path in tracked_files():
            target = tree / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        yield tree


@contextmanager
def planted(fault: Fault, tree: Path) -> Iterator[None]:
    """Has the fault in a copy of the tree."""
    path = tree / "lightning_adaptive" / fault.file
    sound = path.with_suffix(".sound")
    shutil.copy2(path, sound)
    path.write_text(path.read_text(encoding="utf-8").replace(fault.old, fault.new), encoding="utf-8")
    try:
        yield
    finally:
        sound.replace(path)  # with its time, by which Python knows which of its compiled files is this one's


def run(tree: Path, tests: Sequence[str], timeout: int = 300, says: bool = False) -> int:
    """Runs tests in a copy of the tree, up to the first that fails; gives pytest's code, which is 1 for that and for nothing else.

    The process is forked from this one, in which all but the package and its tests is imported.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = -1
    try:
        signal.alarm(timeout)
        os.dup2(2 if says else os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = sys.path[0] = str(tree)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("hydra_plugins", "lightning_adaptive", "tests")]:
            del sys.modules[name]
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore:Module already imported", *tests])
    finally:
        os._exit(code)


def main(words: Sequence[str]) -> int:
    """Prints the table; 1 if a fault survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted_faults", description=__doc__)
    parser.add_argument("words", nargs="*", help="parts of titles, to plant these faults alone")
    words = parser.parse_args(words).words
    chosen = [fault for fault in FAULTS if not words or any(word in fault.title for word in words)]
    if not chosen:
        parser.error(f"no fault has {' or '.join(words)} in its title")
    survivors = 0
    with copied() as tree:
        if run(tree, list(dict.fromkeys(fault.node for fault in chosen)), timeout=1800, says=True):
            print("A test fails without any fault.", file=sys.stderr)
            return 1
        print("| fault | caught by | caught |\n|---|---|---|")
        for fault in chosen:
            with planted(fault, tree):
                is_caught = run(tree, [fault.node]) == 1
            survivors += not is_caught
            print(f"| {fault.title} | `{fault.test}` | {'yes' if is_caught else 'NO'} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} were caught.")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
