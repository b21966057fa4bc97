"""Which test shows which row of the fault catalogue: checkpoints and the file system."""

# ruff: noqa: E501

from __future__ import annotations

CHECKPOINT = "tests/engine/test_checkpoint.py"
SAVING = "tests/engine/test_saving.py"
RESUME = "tests/engine/test_resume_at_every_step.py"
LEASE = "tests/engine/test_lease.py"
SHARDED = "tests/dist/test_sharded_checkpoints.py"
SWITCH = "tests/dist/test_backend_switch.py"

# A row: what goes wrong and what happens, then the tests, or the reason why it does not apply.
ROWS: dict[str, tuple[str, list[str] | str]] = {
    "K01": (
        "SIGKILL at a hundred points inside a save, beside training and of two ranks: a whole checkpoint is found",
        [
            "tests/engine/test_save_kills.py::test_every_kill_leaves_a_whole_checkpoint_and_the_next_save_works",
            "tests/engine/test_save_kills.py::test_control_a_torn_file_under_the_final_name_is_rejected",
            "tests/e2e/test_resume.py::test_killed_mid_pretrain_and_mid_unlearn_ends_in_the_same_weights",
        ],
    ),
    "K02": (
        "full, failing or read-only disk, quota, limit on file sizes: the run stops with exit 3, the checkpoint before is intact",
        [
            f"{SAVING}::test_a_full_or_broken_disk_is_an_error_and_the_checkpoint_before_stays",
            f"{SAVING}::test_a_rank_that_cannot_write_stops_all_with_its_own_reason",
            f"{RESUME}::test_a_limit_of_the_system_on_files_ends_a_run_in_one_sentence",
        ],
    ),
    "K03": (
        "damaged, missing, swapped or foreign files, an edited COMMIT.json, any content of LATEST, links: passed over for the one before",
        [
            f"{CHECKPOINT}::test_a_damaged_checkpoint_is_passed_over_for_the_one_before",
            f"{CHECKPOINT}::test_nothing_is_read_where_latest_points",
            f"{CHECKPOINT}::test_a_rank_file_of_another_step_or_none_at_all_is_refused",
            f"{CHECKPOINT}::test_pieces_that_leave_a_gap_or_overlap_are_refused",
            f"{SAVING}::test_every_rank_looks_at_its_share_and_one_that_is_damaged_is_passed_over_by_all",
            f"{SAVING}::test_a_ledger_that_lost_lines_is_noticed_and_one_that_grew_is_not",
            f"{SHARDED}::test_a_part_of_another_step_is_refused",
        ],
    ),
    "K04": (
        "resumed at every step: weights, optimizer, method and ledger as without the interruption, bit for bit",
        [
            f"{RESUME}::test_resumed_at_every_step_it_ends_in_the_same_state",
            "tests/e2e/test_stop.py::test_one_rank_is_asked_and_all_stop_after_the_same_step",
        ],
    ),
    "K05": (
        "resumed on another number of processes or backend: the same state, the same losses within 1e-4, recorded",
        [
            f"{SWITCH}::test_it_loses_what_the_uninterrupted_run_loses",
            f"{SWITCH}::test_control_without_its_moments_it_does_not",
            f"{SHARDED}::test_each_rank_wrote_a_part_and_one_process_reads_the_whole",
            f"{SHARDED}::test_two_ranks_of_another_backend_read_it",
            f"{CHECKPOINT}::test_pieces_of_any_number_of_ranks_are_read_whole_and_in_parts",
        ],
    ),
    "K06": (
        "a save still at work at the next save, at a stop, at an error, at the loss of a rank: waited for or given up, never torn",
        [
            f"{SAVING}::test_whoever_leaves_waits_for_the_save_in_flight",
            f"{SAVING}::test_the_next_save_waits_for_the_one_in_flight",
            f"{SAVING}::test_the_main_rank_does_not_commit_before_the_other_has_written",
            f"{SAVING}::test_a_part_that_never_comes_ends_in_an_error",
            f"{SAVING}::test_a_rank_that_leaves_does_not_wait_for_the_lost_one",
            f"{SAVING}::test_training_goes_on_and_what_is_saved_is_the_state_at_the_time",
        ],
    ),
    "K07": (
        "old checkpoints are removed, but not the last sound ones; one that cannot be removed is noted",
        [
            f"{SAVING}::test_an_old_checkpoint_that_cannot_be_removed_is_noted_and_training_goes_on",
            f"{CHECKPOINT}::test_a_damaged_one_of_a_later_step_costs_no_sound_one_and_is_made_anew",
            f"{CHECKPOINT}::test_round_trip_and_retention",
        ],
    ),
    "K08": (
        "a clock that jumped, changed file times: the step decides",
        [f"{CHECKPOINT}::test_the_choice_is_by_step_whatever_the_clock_said"],
    ),
    "K09": (
        "two processes in one run directory: the second is refused with exit 2 and the owner's process",
        [
            "tests/dist/test_lost_rank.py::test_a_second_start_is_refused_while_the_first_is_at_work",
            f"{LEASE}::test_claimed_checked_and_given_back",
        ],
    ),
    "K10": (
        "an orphan of an earlier attempt: it commits nothing, writes no line and ends with exit 5",
        [
            f"{LEASE}::test_an_orphan_can_neither_commit_nor_write_a_line",
            f"{SAVING}::test_a_directory_that_was_taken_over_is_not_committed_to",
            f"{LEASE}::test_the_next_attempt_of_a_slurm_job_takes_over_from_one_that_lives",
            "tests/slurm/test_cluster.py::test_a_lost_node",
        ],
    ),
    "K11": (
        "a checkpoint written long ago in this format is read, one of another format refused by its number",
        [
            f"{CHECKPOINT}::test_the_committed_checkpoint_is_read",
            f"{CHECKPOINT}::test_another_format_is_refused_by_its_number_and_not_passed_over",
        ],
    ),
    "K12": (
        "a moved run goes on; a copy of a run at work only after its claim is deleted by hand",
        [f"{RESUME}::test_a_moved_run_goes_on_and_a_copy_of_a_living_one_only_when_told_to"],
    ),
    "K13": (
        "no generator has a state to lose: every draw follows from seed, step and sample; global ones are changed before each resumption",
        [f"{RESUME}::test_resumed_at_every_step_it_ends_in_the_same_state"],
    ),
    "K14": (
        "a checkpoint folder that others may write into, or own: a warning",
        [
            f"{CHECKPOINT}::test_a_folder_that_others_may_write_into_is_named",
            f"{SAVING}::test_every_rank_looks_at_its_share_and_one_that_is_damaged_is_passed_over_by_all",
        ],
    ),
}
