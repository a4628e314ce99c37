"""The table of what training promises in docs/training.md, from a run of the tests that hold each promise.

    python benchmarks/promises.py

Runs exactly the tests listed here, the slow ones among them, in one pytest, and writes promise, tests and result
between the two marker lines. It leaves with 1 where not all of them passed.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pages import table, write_between

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "training.md"
COLUMNS = ("promise", "tests", "passed")


@dataclass(frozen=True)
class Promise:
    """What holds, in plain words, and the tests that would fail if it did not."""

    words: str
    tests: dict[str, tuple[str, ...]]
    """Names of tests by their file in tests/; all cases of a test, unless one is named in brackets."""

    def ids(self) -> list[str]:
        """Return the tests' ids as pytest takes them from the repository's root."""
        return [f"tests/{file}::{name}" for file, names in self.tests.items() for name in names]

    def cells(self) -> list[str]:
        """Return the first two cells of the promise's row."""
        listed = (f"`{file}`: " + ", ".join(f"`{name}`" for name in names) for file, names in self.tests.items())
        return [self.words, "; ".join(listed)]


_TWO = "train/test_distributed.py"

PROMISES = (
    Promise(
        "A resumed run is the straight one, bit for bit: stopped at a checkpoint or after it, within an epoch, and "
        "going on across its end; with 0 and 2 worker processes; at every stage",
        {
            "train/test_loop.py": (
                "test_an_interrupted_run_resumes_to_the_same_bits",
                "test_worker_processes_change_nothing",
            ),
            "train/test_stages.py": ("test_20_steps_are_10_and_10_resumed",),
            "train/test_streamed.py": ("test_worker_processes_read_the_same",),
        },
    ),
    Promise(
        "Killed (kill -9) before, within or after any file operation of a save, a run goes on to the same bits",
        {
            "train/test_kill.py": (
                "test_killed_at_any_moment_of_a_save_a_run_goes_on_to_the_same_bits",
                "test_a_checkpoint_is_on_the_disk_before_it_has_its_name",
                "test_leftovers_of_killed_processes_are_removed_and_the_rest_is_left_alone",
            )
        },
    ),
    Promise(
        "A file of a checkpoint with a flipped byte, cut short, empty or missing is named, and the checkpoint before "
        "it used; where none is whole, the run does not start anew",
        {
            "train/test_loop.py": (
                "test_a_damaged_checkpoint_is_named_and_the_one_before_is_used",
                "test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew",
                "test_older_checkpoints_stay_until_the_new_one_reads_back_right",
            ),
            "train/test_kill.py": ("test_a_damaged_newer_checkpoint_does_not_push_out_the_new_one",),
        },
    ),
    Promise(
        "A full disk is said, the last good checkpoint kept, and training goes on; the last save has to succeed",
        {
            "train/test_kill.py": (
                "test_a_full_disk_is_said_and_the_last_good_checkpoint_kept",
                "test_a_limit_on_files_is_said_and_training_goes_on",
                "test_a_disk_that_stays_full_ends_the_run_with_an_error_and_room_lets_it_go_on",
            ),
            _TWO: ("test_a_full_disk_of_the_first_process_is_everyones",),
        },
    ),
    Promise(
        "SIGTERM saves the step at hand and stops, also where one of two processes gets it",
        {
            "train/test_loop.py": ("test_sigterm_saves_the_step_at_hand_and_stops",),
            _TWO: ("test_sigterm_to_one_process_makes_both_save_and_stop",),
        },
    ),
    Promise(
        "One process, two with DDP and two with FSDP2 train the same run (within 1e-6; with Muon 1e-5): losses, "
        "weights, averages, optimizer; a run may change from one to the other",
        {_TWO: ("test_two_processes_are_one", "test_what_two_processes_export_is_whole")},
    ),
    Promise(
        "Gradients accumulated over parts are those of the whole batch",
        {
            "train/test_loop.py": ("test_accumulated_gradients_are_those_of_the_batch",),
            "train/test_stages.py": ("test_the_autoencoders_gradients_accumulate",),
            "train/test_options.py": ("test_accumulated_gradients_of_the_generator_are_those_of_the_batch",),
            _TWO: tuple(f"test_two_processes_are_one[groups accumulated-{name}]" for name in ("ddp", "fsdp2")),
        },
    ),
    Promise(
        "A loss or gradient that is no number never reaches a weight, also where one process alone has it; its "
        "samples, their t and group are written down",
        {
            "train/test_loop.py": (
                "test_a_loss_that_is_no_number_stops_before_the_update",
                "test_a_gradient_that_is_no_number_stops_before_the_update",
                "test_updates_that_are_no_numbers_are_left_out",
            ),
            "train/test_guard.py": ("test_a_set_that_is_no_number_is_left_out_and_the_other_is_not",),
            "train/test_groups.py": ("test_an_update_that_is_no_number_is_left_out_of_its_group_alone",),
            _TWO: (
                "test_a_loss_that_is_no_number_in_one_process_stops_both_before_the_update",
                "test_a_loss_that_is_no_number_in_one_process_is_left_out_by_both",
            ),
        },
    ),
    Promise(
        "A process without samples of some group neither hangs nor changes the result",
        {
            _TWO: tuple(
                f"test_two_processes_are_one[{case}-{name}]"
                for case in ("mixed groups", "groups without samples", "one group")
                for name in ("ddp", "fsdp2")
            )
        },
    ),
    Promise(
        "Groups trained apart and merged are the joint run, bit for bit",
        {
            "train/test_groups.py": (
                "test_groups_trained_apart_are_those_trained_together",
                "test_runs_of_several_groups_can_be_merged_too",
                "test_a_merged_pipeline_draws_and_says_that_it_has_all_groups",
            )
        },
    ),
    Promise(
        "On Ray, groups trained apart and merged are the joint run, bit for bit, also where a worker is killed; "
        "encoding leaves the same bytes",
        {
            "train/test_on_ray.py": ("test_groups_on_ray_leave_the_bits_of_one_run",),
            "train/test_encode.py": ("test_on_ray_it_leaves_the_same_bytes",),
        },
    ),
    Promise(
        "LoRA trains adapters alone, and leaves them beside the whole model",
        {
            "train/test_streamed.py": ("test_adapters_alone_are_trained_and_left_beside_the_whole",),
            "models/test_lora.py": (
                "test_only_the_adapter_learns",
                "test_a_saved_adapter_loads_into_a_fresh_replica",
            ),
        },
    ),
    Promise(
        "A broken picture is left out, listed, and replaced by one that follows from epoch and number alone, in any "
        "process and after any interruption",
        {
            "data/test_quarantine.py": (
                "test_no_broken_file_gets_through",
                "test_every_broken_file_is_listed_and_replaced",
                "test_what_stands_in_depends_on_epoch_and_index_alone",
                "test_worker_processes_agree_and_count_together",
                "test_past_the_limit_the_run_stops",
            )
        },
    ),
    Promise(
        "Training from latents is training from pictures (losses within 1e-5; 1e-2 where contexts are in bfloat16)",
        {"train/test_streamed.py": ("test_training_from_latents_is_training_from_pictures",)},
    ),
    Promise(
        "Encoding that is killed and started again leaves the bytes of a straight run",
        {
            "train/test_encode.py": (
                "TestGoingOn::test_killed_anywhere_it_ends_with_the_bytes_of_a_straight_run",
                "TestGoingOn::test_a_damaged_shard_is_made_anew_and_others_are_not",
                "test_a_process_killed_twice_and_resumed_leaves_what_a_straight_run_leaves",
            )
        },
    ),
    Promise(
        "Activation checkpointing keeps less and changes nothing that is learned",
        {
            "train/test_options.py": (
                "test_activations_computed_again_give_the_same_gradients_and_are_not_kept",
                "test_activation_checkpointing_changes_nothing_that_is_learned",
            )
        },
    ),
    Promise(
        "The backbone never changes: weights, logits and answers are bit-identical after training",
        {
            "train/test_stages.py": ("test_the_generator_learns_a_batch_and_draws",),
            "models/test_backbones_frozen.py": ("test_understanding_is_the_backbones_before_and_after_training",),
            "test_pipeline.py": ("test_training_the_experts_leaves_the_backbone_bit_for_bit",),
        },
    ),
    Promise(
        "What training keeps for the backward pass, and what a network call holds, is what the formulas say (2 to 3%, "
        "6 to 16%)",
        {
            "evaluate/test_memory.py": (
                "test_saved_activations_are_what_autograd_keeps",
                "test_saved_activations_under_lora_are_what_autograd_keeps",
                "test_a_step_holds_what_the_formula_says",
            )
        },
    ),
    Promise(
        "A folder of pictures becomes a model in three commands, offline",
        {"cli/test_cli_own_pictures.py": ("test_three_commands_from_a_folder_of_pictures_to_a_picture_drawn",)},
    ),
)


class Tally:
    """How each case of each test ended, by its id."""

    def __init__(self) -> None:
        self.ended: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a case's worst moment for its end: the test itself, unless what is around it failed."""
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.nodeid] = report.outcome

    def result(self, promise: Promise) -> str:
        """Return how many of a promise's cases passed, and what became of the others."""
        wanted = promise.ids()
        ends = Counter(end for case, end in self.ended.items() if any(_is_case_of(case, test) for test in wanted))
        others = "".join(f", {count} {end}" for end, count in sorted(ends.items()) if end != "passed")
        return f"{ends['passed']} of {ends.total()}{others}"


def _is_case_of(case: str, test: str) -> bool:
    return case == test or case.startswith(f"{test}[")


def main() -> None:
    """Run, count, write."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tally = Tally()
    # A file's tests one after the other: what they share is made once.
    tests = sorted({test for promise in PROMISES for test in promise.ids()})
    began = time.monotonic()
    status = pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "-m", "", *tests], plugins=[tally])
    minutes = (time.monotonic() - began) / 60
    passed = sum(end == "passed" for end in tally.ended.values())
    lines = [
        *table(COLUMNS, ([*promise.cells(), tally.result(promise)] for promise in PROMISES)),
        "",
        f"{passed} of {len(tally.ended)} tests passed on {time.strftime('%Y-%m-%d')} in {minutes:.0f} minutes. Python "
        f"{platform.python_version()}, torch {torch.__version__}, {platform.machine()} CPU, "
        f"{'with' if torch.accelerator.is_available() else 'without'} a GPU; models and data sets are toys.",
    ]
    write_between(PAGE, "promises", lines)
    print("\n".join(lines))
    sys.exit(0 if status == 0 and passed == len(tally.ended) else 1)


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
