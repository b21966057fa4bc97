"""Which test shows which row of the fault catalogue: SLURM (`pytest -m slurm`, and rendering without it)."""

# ruff: noqa: E501

from __future__ import annotations

CLUSTER = "tests/slurm/test_cluster.py"
SUBMIT = "tests/slurm/test_submit.py"

ROWS: dict[str, tuple[str, list[str] | str]] = {
    "L01": ("`scontrol requeue`: stop, save, go on to the same weights", [f"{CLUSTER}::test_scontrol_requeue"]),
    "L02": ("preemption with a warning: the same", [f"{CLUSTER}::test_preemption"]),
    "L03": ("the time limit, with a warning before it: the same, attempts counted", [f"{CLUSTER}::test_time_limit"]),
    "L04": (
        "a node is lost: requeued, the orphan is fenced off, the same weights",
        [f"{CLUSTER}::test_a_lost_node", "tests/engine/test_lease.py::test_an_orphan_can_neither_commit_nor_write_a_line"],
    ),
    "L05": ("`scancel`: not requeued, resumable by hand", [f"{CLUSTER}::test_signals_in_a_row_and_scancel"]),
    "L06": ("signals in a row, during start and saving", [f"{CLUSTER}::test_signals_in_a_row_and_scancel"]),
    "L07": ("a job that fails at once: not tried again", [f"{CLUSTER}::test_what_fails_at_once_is_not_tried_again"]),
    "L08": (
        "one task of an array fails: only its own index is requeued",
        [f"{CLUSTER}::test_tasks_of_an_array_are_requeued_each_by_itself",
         f"{SUBMIT}::test_tasks_of_an_array_are_runs_of_their_own"],
    ),
    "L09": (
        "two nodes with a task each find one another and end as one node with two",
        [f"{CLUSTER}::test_two_warnings_in_two_phases", f"{SUBMIT}::test_a_rank_finds_the_others"],
    ),
    "L10": (
        "`scontrol` is missing on the node: exit 75, and the log says what to do",
        [f"{SUBMIT}::test_where_scontrol_fails_the_log_says_what_to_do"],
    ),
    "L11": (
        "hostile names and values in a job: quoted, or refused",
        [f"{SUBMIT}::test_hostile_values_reach_the_ranks_as_they_are",
         f"{SUBMIT}::test_directives_are_numbers_and_plain_words",
         f"{SUBMIT}::test_dry_run_prints_the_script_and_writes_nothing"],
    ),
    "L12": (
        "logs across attempts: appended, each line with its attempt",
        [f"{CLUSTER}::test_scontrol_requeue", "tests/engine/test_telemetry.py::test_logs_are_appended_across_attempts"],
    ),
}  # fmt: skip
