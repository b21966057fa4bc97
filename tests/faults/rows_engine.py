"""Which test shows which row of the fault catalogue: settings, encoders, processes, numerics, secrets."""

# ruff: noqa: E501

from __future__ import annotations

CONFIG = "tests/cli/test_config_io.py"
YAML = "tests/cli/test_yaml.py"
TRACKERS = "tests/engine/test_trackers.py"
HYGIENE = "tests/faults/test_hygiene.py"
RANKS = "tests/faults/test_ranks.py"
START = "tests/faults/test_start.py"
ENGINE = "tests/faults/test_engine_faults.py"
REFUSALS = "tests/faults/test_refusals.py"
GROUP = "tests/engine/test_process_group.py"
WEIGHTS = "tests/encoders/test_encoder_weights.py"
BUILD = "tests/encoders/test_encoder_build.py"
MODEL = "tests/encoders/test_encoder_model.py"
EXPORT = "tests/encoders/test_encoder_export.py"
BACKENDS = "tests/dist/test_backends.py"
LOST = "tests/dist/test_lost_rank.py"

# A row: what goes wrong and what happens, then the tests, or the reason why it does not apply.
ROWS: dict[str, tuple[str, list[str] | str]] = {
    "C01": (
        "unknown key: exit 2, with the file, the key and the nearest valid one",
        [f"{CONFIG}::test_unknown_key_names_origin_path_and_nearest",
         f"{CONFIG}::test_unknown_key_in_a_file_names_the_file", f"{REFUSALS}::test_unknown_config_key"],
    ),
    "C02": (
        "value of the wrong type: shown with the type expected; a boolean is no number",
        [f"{CONFIG}::test_wrong_values_show_what_was_found_and_expected",
         f"{CONFIG}::test_no_field_that_is_not_boolean_accepts_one"],
    ),
    "C03": (
        "NaN, infinite, negative or zero where that cannot be: refused when the settings are read",
        [f"{CONFIG}::test_wrong_values_show_what_was_found_and_expected",
         f"{CONFIG}::test_no_number_may_be_infinite_or_nan"],
    ),
    "C04": (
        "duplicate keys, Python tags, huge files, alias bombs in YAML: refused, nothing executed",
        [f"{YAML}::test_yaml_that_is_refused", f"{YAML}::test_alias_bomb_is_refused_at_the_first_anchor",
         f"{YAML}::test_large_files_are_refused"],
    ),
    "C05": ("`_target_: os.system`: an unknown key", [f"{CONFIG}::test_target_is_just_an_unknown_key"]),
    "C06": (
        "batches that processes and micro-batches cannot share: exit 2 with the nearest sizes",
        [f"{CONFIG}::test_batches_are_shared_equally",
         f"{CONFIG}::test_micro_batches_are_equal_and_hold_images_to_compare"],
    ),
    "C07": (
        "the method lacks data it needs (nothing to retain, no labels, no third-party folder): exit 2",
        [f"{CONFIG}::test_settings_that_exclude_one_another", f"{CONFIG}::test_supervised_needs_class_folders"],
    ),
    "C08": (
        "a choice that does not work with the encoder or backend: exit 2 with the way out",
        [f"{CONFIG}::test_settings_that_exclude_one_another", f"{BUILD}::test_impossible_arguments_are_refused_at_build",
         "tests/e2e/test_evaluator_runs.py::test_double_backward_is_refused_for_sharded_weights_before_anything_is_written"],
    ),
    "C09": (
        "the folder belongs to other settings: refused with the differences, no file changed",
        ["tests/e2e/test_resume.py::test_another_configuration_does_not_resume_into_the_folder"],
    ),
    "C10": (
        "resumed with another rate, seed, forget list or code: refused; other code goes on only if accepted, and recorded",
        [f"{HYGIENE}::test_settings_that_changed_are_shown_with_both_values",
         f"{HYGIENE}::test_a_forget_list_that_was_edited_is_refused",
         f"{HYGIENE}::test_other_code_goes_on_only_where_it_is_accepted_and_is_written_down"],
    ),
    "C11": (
        "`plan` with several problems: all at once, nothing written",
        [f"{HYGIENE}::test_plan_reports_every_problem_at_once_and_writes_nothing",
         f"{CONFIG}::test_all_problems_are_reported_together"],
    ),
    "C12": (
        "options that change unnoticed",
        [f"{HYGIENE}::test_options_are_those_that_scripts_rely_on", f"{HYGIENE}::test_verbs_are_those_that_scripts_rely_on"],
    ),
    "C13": (
        "Ctrl-C, once and twice; a reader that goes away: 75 or the signal, no traceback",
        ["tests/e2e/test_stop.py::test_a_second_signal_ends_the_process_at_once",
         "tests/e2e/test_stop.py::test_signals_and_the_stop_file_lose_no_step",
         "tests/cli/test_closed_pipe.py::test_a_closed_pipe_is_no_error"],
    ),
    "C14": (
        "encodings other than UTF-8, CRLF, byte order marks: read, or refused with the offset",
        [f"{YAML}::test_encodings", f"{YAML}::test_bytes_that_are_no_text_are_refused"],
    ),
    "C15": (
        "blanks, quotes, line breaks, `$()`, `~`, loops of links in paths: handled or refused, no shell",
        [f"{HYGIENE}::test_hostile_names_are_folders_like_any_other_or_refused",
         f"{HYGIENE}::test_a_loop_of_links_is_refused", f"{CONFIG}::test_home_is_expanded_in_paths_only",
         "tests/slurm/test_submit.py::test_hostile_values_reach_the_ranks_as_they_are"],
    ),
    "E01": (
        "malicious pickle as checkpoint: refused, not executed",
        [f"{WEIGHTS}::test_a_malicious_pickle_is_refused_and_nothing_runs",
         f"{REFUSALS}::test_malicious_pickle_as_checkpoint"],
    ),
    "E02": (
        "files of a run's checkpoint replaced by pickles: refused by their digest, unread",
        [f"{ENGINE}::test_checkpoint_files_that_were_replaced_by_pickles_are_refused_unread"],
    ),
    "E03": (
        "damaged safetensors: refused in bounded memory",
        [f"{WEIGHTS}::test_damaged_safetensors_are_refused_in_bounded_memory"],
    ),
    "E04": (
        "prefixes are mapped and logged; missing, unknown and misshapen weights are refused by name",
        [f"{WEIGHTS}::test_known_prefixes_are_stripped_and_logged",
         f"{WEIGHTS}::test_what_belongs_inside_or_is_missing_is_refused_with_the_first_ten"],
    ),
    "E05": (
        "NaN, infinity, all zeros, overflow in weights: refused by name",
        [f"{WEIGHTS}::test_weights_that_are_not_finite_are_named", f"{WEIGHTS}::test_weights_of_zeros_are_refused_and_zero_gains_are_not",
         f"{WEIGHTS}::test_an_overflow_is_found_on_either_side_of_the_conversion"],
    ),
    "E06": (
        "wrong name of an encoder; a classifier head: near names, head dropped and logged",
        [f"{BUILD}::test_a_wrong_name_is_refused_with_a_way_out", f"{WEIGHTS}::test_heads_are_dropped_and_logged"],
    ),
    "E07": (
        "tied and non-contiguous weights: saved and read back equal",
        [f"{EXPORT}::test_tied_and_non_contiguous_weights_are_saved_and_read_back"],
    ),
    "E08": (
        "the export loads with timm alone in a fresh process: embeddings equal to the last bit",
        [f"{EXPORT}::test_a_fresh_process_gets_bit_equal_embeddings"],
    ),
    "E09": (
        "running statistics of batch norms: batch statistics in the utility term only, frozen backbones keep theirs",
        [f"{MODEL}::test_batchnorm_mode_switches_every_batchnorm_and_only_them",
         f"{MODEL}::test_in_eval_mode_an_image_does_not_depend_on_its_batch_mates_and_statistics_stay",
         f"{BACKENDS}::test_two_processes_train_as_one"],
    ),
    "E10": (
        "the name of a hub given as a checkpoint, without network: an error at once, nothing is looked up",
        [f"{HYGIENE}::test_names_of_a_hub_are_not_looked_up"],
    ),
    "D01": (
        "a rank raises: it says so with its traceback, the others end with 5 and name it and its error",
        [f"{RANKS}::test_the_error_of_a_rank_reaches_the_others"],
    ),
    "D02": (
        "a rank is killed: the others end within seconds with 5 and name it",
        [f"{RANKS}::test_a_killed_rank_is_named",
         f"{LOST}::test_the_survivor_of_a_killed_rank_ends_with_5_and_says_so"],
    ),
    "D03": (
        "a rank hangs: named with the place where it hangs, its stack kept, all end with 5 within `watchdog_s` + 25 s",
        [f"{RANKS}::test_a_rank_that_hangs_is_named_and_the_job_ends"],
    ),
    "D04": (
        "ranks with other settings, roles, code, torch or precision: refused before the first step, with both values",
        [f"{RANKS}::test_ranks_that_do_not_run_the_same_are_refused_at_the_start",
         f"{START}::test_a_rank_that_runs_something_else_is_refused"],
    ),
    "D05": (
        "a rank leaves a collective operation out: told from a slow rank after a quarter of `watchdog_s`",
        [f"{RANKS}::test_a_collective_left_out_is_told_from_a_slow_rank"],
    ),
    "D06": (
        "wrong RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; a port in use: named, within `join_s`",
        [f"{START}::test_a_variable_that_cannot_be_right_is_named_at_once", f"{START}::test_a_port_in_use_is_named",
         f"{START}::test_variables_that_contradict_one_another", f"{START}::test_a_rank_that_is_taken_is_refused",
         f"{GROUP}::test_a_missing_variable_is_named", f"{GROUP}::test_an_impossible_variable_is_named",
         f"{GROUP}::test_ranks_that_do_not_come_are_reported"],
    ),
    "D07": (
        "started without a launcher: one process, with the numbers of a world of one",
        [f"{BACKENDS}::test_a_world_of_one_without_a_launcher_works",
         f"{BACKENDS}::test_single_is_plain_torch_to_the_last_bit"],
    ),
    "D08": (
        "two processes against one, same global batch: losses, gradients and weights agree",
        [f"{BACKENDS}::test_two_processes_train_as_one",
         "tests/dist/test_launchers.py::test_two_processes_lose_what_one_loses",
         "tests/dist/test_constraint_parity.py::test_gradients_and_trajectories_are_those_of_one_process[ddp]"],
    ),
    "D09": (
        "scale of gradients through gathers: that of one process",
        ["tests/objectives/test_world_parity.py::test_utility_and_its_gradient_equal_one_process",
         "tests/objectives/test_world_parity.py::test_the_backward_of_a_gather_sums_what_all_ranks_ask"],
    ),
    "D10": (
        "frozen layers on several processes: no hang, the others train as on one",
        [f"{BACKENDS}::test_two_processes_train_as_one", f"{MODEL}::test_gradients_survive_ddp"],
    ),
    "D11": (
        "momentum encoder, queue and method differ between ranks: nothing is saved, exit 5",
        [f"{ENGINE}::test_momentum_encoder_and_queue_are_alike_on_all_ranks_or_nothing_is_saved"],
    ),
    "D12": (
        "other numbers of reader processes: the same batches",
        ["tests/data/test_stream.py::test_every_world_and_worker_count_gives_the_same_batches"],
    ),
    "D13": (
        "kNN with fewer rows than ranks",
        "does not apply: the main process alone computes kNN and attacks, on all rows.",
    ),
    "D14": (
        "the main rank is slow in a checkpoint: the others wait under a limit of its own (`watchdog_save_s`)",
        [f"{RANKS}::test_a_slow_checkpoint_is_no_hang_and_the_same_time_in_a_step_is",
         f"{RANKS}::test_checkpoints_are_marked_as_slow_by_the_loop"],
    ),
    "D15": (
        "torchrun, `accelerate launch` and srun: the same losses",
        ["tests/dist/test_launchers.py::test_two_processes_lose_what_one_loses",
         "tests/slurm/test_cluster.py::test_two_warnings_in_two_phases"],
    ),
    "D16": (
        "torchrun is killed: its ranks notice, save and end",
        [f"{ENGINE}::test_ranks_whose_launcher_is_killed_stop_in_a_state_that_resumes"],
    ),
    "N01": (
        "NaN on one rank: all stop before the update, exit 4, a capture of every rank; the run goes on as if nothing was",
        [f"{RANKS}::test_a_value_that_is_not_finite_on_one_rank_stops_all_before_the_update"],
    ),
    "N02": (
        "infinite gradient, finite loss: the same",
        [f"{RANKS}::test_a_value_that_is_not_finite_on_one_rank_stops_all_before_the_update"],
    ),
    "N03": (
        "ascent diverges: stopped by the declared bound, exit 4, no finished encoder",
        [f"{ENGINE}::test_a_run_that_diverges_is_stopped_by_its_declared_bound",
         "tests/methods/test_methods.py::test_grad_ascent_climbs_and_is_bounded"],
    ),
    "N04": (
        "zero embeddings, an empty or fully masked bank: finite values and gradients",
        ["tests/objectives/test_objectives.py::test_zero_outputs_and_an_empty_bank_stay_finite",
         "tests/objectives/test_bank.py::test_a_fully_masked_bank_gives_zero_loss_and_finite_gradients",
         "tests/objectives/test_bank.py::test_zero_outputs_stay_finite"],
    ),
    "N05": (
        "extreme similarities and low precision: against float64",
        ["tests/objectives/test_infonce_forms.py::test_similarities_far_apart_neither_overflow_nor_vanish",
         "tests/objectives/test_infonce_forms.py::test_autocast_does_not_reach_the_similarities",
         "tests/objectives/test_bank.py::test_bfloat16_outputs_and_autocast_are_computed_in_float32"],
    ),
    "N06": (
        "objectives against brute force and autograd in float64",
        ["tests/objectives/test_objectives.py::test_utility_equals_the_brute_force_oracle",
         "tests/objectives/test_objectives.py::test_per_sample_loss_and_confidence_equal_the_oracle",
         "tests/objectives/test_objectives.py::test_delta_equals_torch_func_and_autograd_on_the_oracle"],
    ),
    "N07": ("first loss of each recipe against a recorded one", [f"{HYGIENE}::test_the_first_loss_of_a_recipe_is_what_it_was"]),
    "N08": (
        "two runs of one seed on two ranks: equal ledgers but for the times, equal weights",
        [f"{ENGINE}::test_a_fault_that_never_fires_changes_no_bit"],
    ),
    "N09": (
        "another hash seed, one thread or two: the same order, sums within 1e-4",
        [f"{HYGIENE}::test_neither_hash_seed_nor_threads_change_the_order"],
    ),
    "N10": (
        "micro-batches add up to the mean of their gradients; their losses contrast less, as documented",
        [f"{BACKENDS}::test_micro_batches_add_up_to_the_mean_of_their_gradients",
         "tests/e2e/test_evaluator_runs.py::test_micro_batches_are_parts_of_the_same_batches"],
    ),
    "X01": (
        "secrets in the environment: in no file of a run and in no line it prints",
        [f"{ENGINE}::test_no_secret_of_the_environment_is_in_any_file_or_line"],
    ),
    "X02": (
        "a tracker that is not installed: refused before anything is computed; one that fails: one warning, training goes on",
        [f"{TRACKERS}::test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written",
         f"{TRACKERS}::test_a_tracker_that_fails_is_one_warning_and_the_others_go_on"],
    ),
    "X03": (
        "a whole run under Python's audit hook: no program, no connection, no foreign pickle",
        [f"{ENGINE}::test_a_run_starts_no_program_opens_no_connection_and_loads_no_foreign_pickle"],
    ),
    "X04": (
        "the ledger is its owner's alone; no temporary file is left",
        [f"{ENGINE}::test_only_the_owner_may_read_ids_and_no_temporary_file_is_left"],
    ),
    "X05": (
        "a private key on the command line: refused, and not shown",
        ["tests/verify/test_certificate.py::test_a_key_on_the_command_line_is_refused_and_not_shown"],
    ),
    "X06": (
        "control characters in ids and names: escaped in logs, metrics and progress",
        ["tests/engine/test_telemetry.py::test_control_characters_are_inert_everywhere"],
    ),
    "X07": (
        "optional packages",
        "does not apply: every package that a run needs is a requirement; `jpeg` only decodes faster, the rest is for tests.",
    ),
}  # fmt: skip
