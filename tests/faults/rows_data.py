"""Which test shows which row of the fault catalogue: shards, and lists of images to forget."""

from __future__ import annotations

_SHARDS = "tests/faults/test_shard_faults.py::"
_PREPARE = "tests/faults/test_prepare_faults.py::"
_LISTS = "tests/faults/test_forget_list_faults.py::"
_COPIES = "tests/faults/test_copies.py::"
_REFUSALS = "tests/faults/test_refusals.py::"
_DECODE = "tests/data/test_decode.py::"
_RUNS = "tests/dist/test_data_faults.py::"
_STREAM = "tests/data/test_stream.py::"
_WORKERS = "tests/data/test_workers.py::"
_READING = "tests/data/test_reading.py::"
_IDS = "tests/data/test_forget_list.py::"

# A row: what goes wrong and what happens, then the tests, or the reason why it does not apply.
ROWS: dict[str, tuple[str, list[str] | str]] = {
    "S01": (
        "header broken in mid-shard: refused at plan with shard, byte, images found and expected; by readers too",
        [
            f"{_SHARDS}test_s01_a_header_broken_in_mid_shard",
            f"{_SHARDS}test_s01_is_found_by_whoever_reads_the_shard_even_where_digests_are_not_asked_for",
            f"{_SHARDS}test_s01_s02_a_broken_shard_of_others_is_never_indexed_in_part",
        ],
    ),
    "S02": (
        "truncated, empty, HTML, missing or compressed shard: exit 3 at plan, never a shorter epoch",
        [
            f"{_SHARDS}test_s02_a_shard_that_is_not_whole",
            f"{_SHARDS}test_s01_s02_a_broken_shard_of_others_is_never_indexed_in_part",
            f"{_REFUSALS}test_missing_shard",
            f"{_REFUSALS}test_truncated_shard",
        ],
    ),
    "S03": (
        "same size, other bytes: found by the digest of the shard, and of the image when it is read",
        [
            f"{_SHARDS}test_s03_other_bytes_of_the_same_size_are_found_by_the_digest_of_the_image_too",
            f"{_REFUSALS}test_one_byte_changed_in_a_shard",
        ],
    ),
    "S04": (
        "manifest of other shards, shard the manifest lacks: refused, told to prepare again",
        [
            f"{_SHARDS}test_s04_a_manifest_that_is_not_of_these_shards",
        ],
    ),
    "S05": (
        "member twice, parts apart: refused with its name; key in two shards: told apart by the shard's name",
        [
            f"{_SHARDS}test_s05_s06_a_member_that_is_not_as_it_should_be",
            f"{_SHARDS}test_s05_one_key_in_two_shards",
        ],
    ),
    "S06": (
        "member that climbs, is absolute, a link, device, sparse or too large: refused, nothing extracted",
        [
            f"{_SHARDS}test_s05_s06_a_member_that_is_not_as_it_should_be",
        ],
    ),
    "S07": (
        "URL or command as folder or shard: refused, no process and no connection (audit hook)",
        [
            f"{_SHARDS}test_s07_urls_and_commands_are_no_folders_and_no_shards",
        ],
    ),
    "S08": (
        "pickles among the parts of a sample: never opened, no class looked up (audit hook)",
        [
            f"{_SHARDS}test_s08_pickles_among_the_parts_are_never_opened",
        ],
    ),
    "S09": (
        "60000 x 60000 or 10000 x 10000 pixels: refused from the header, in bounded memory",
        [
            f"{_SHARDS}test_s09_a_huge_claim_costs_no_memory",
            f"{_SHARDS}test_s09_s10_s11_an_image_that_cannot_be_used_is_named",
            f"{_REFUSALS}test_an_image_of_60000_x_60000_pixels",
            f"{_DECODE}test_huge_claim_is_refused_from_the_header",
            f"{_DECODE}test_huge_webp_claim_is_refused_from_the_header",
        ],
    ),
    "S10": (
        "truncated, empty or foreign file as image: refused by its id",
        [
            f"{_SHARDS}test_s09_s10_s11_an_image_that_cannot_be_used_is_named",
            f"{_DECODE}test_damaged_or_foreign_bytes_are_refused_by_name",
        ],
    ),
    "S11": (
        "odd pixel formats, EXIF, profiles, animations: converted as documented, 16 bits refused",
        [
            f"{_DECODE}test_common_modes_of_white_are_white",
            f"{_DECODE}test_cmyk_jpeg_is_converted",
            f"{_DECODE}test_transparency_is_laid_over_white",
            f"{_DECODE}test_exif_orientation_is_applied",
            f"{_DECODE}test_sixteen_bit_grey_is_refused",
            f"{_SHARDS}test_s11_of_an_animation_the_first_frame_counts_and_profiles_do_not",
        ],
    ),
    "S12": (
        "images of 1 x 1, 1 x 5000, below the crop: prepared, and have views",
        [
            f"{_SHARDS}test_s12_odd_shapes_are_prepared",
            "tests/data/test_views.py::test_odd_shapes_have_views",
        ],
    ),
    "S13": (
        "retained image that cannot be read: the next one in its place, counted, named once; above a share exit 3",
        [
            f"{_RUNS}test_an_undecodable_retain_image_is_replaced_and_recorded",
            f"{_RUNS}test_a_run_with_undecodable_images_goes_through",
            f"{_RUNS}test_what_must_not_be_replaced_ends_the_run_with_3",
            f"{_STREAM}test_an_undecodable_image_is_replaced_the_same_way_everywhere",
            f"{_STREAM}test_too_many_undecodable_images_end_the_run",
            f"{_STREAM}test_nothing_but_undecodable_images",
        ],
    ),
    "S14": (
        "image to forget that cannot be read: exit 3, naming it, whatever share is allowed",
        [
            f"{_RUNS}test_what_must_not_be_replaced_ends_the_run_with_3",
            f"{_STREAM}test_an_undecodable_forget_image_is_never_passed_over",
        ],
    ),
    "S15": (
        "reader process killed or hanging: the run ends within a minute and names the process and its image",
        [
            f"{_RUNS}test_a_killed_worker_ends_both_ranks_and_leaves_no_process",
            f"{_WORKERS}test_a_worker_that_is_killed_at_work",
            f"{_WORKERS}test_a_worker_that_is_killed_between_batches",
            f"{_WORKERS}test_a_worker_that_hangs",
        ],
    ),
    "S16": (
        "reader process raises an error that cannot be pickled: one readable sentence",
        [
            f"{_WORKERS}test_a_worker_that_raises_anything",
        ],
    ),
    "S17": (
        "uneven shares, last batches: as many steps on every rank, each id once an epoch, for any world and workers",
        [
            f"{_STREAM}test_every_world_and_worker_count_gives_the_same_batches",
            f"{_STREAM}test_fewer_forget_rows_than_ranks",
            "tests/data/test_schedule.py::test_rank_slices_tile_the_batch",
            "tests/data/test_schedule.py::test_cycle_is_the_concatenation_of_epochs",
        ],
    ),
    "S18": (
        "fewer images than a batch: each comes again in another epoch; a role without images is refused",
        [
            f"{_STREAM}test_fewer_images_than_ranks_times_rows",
            f"{_STREAM}test_no_image_of_a_role_is_refused",
        ],
    ),
    "S19": (
        "failing and slow reads: repeated with growing waits, then exit 3; nothing is lost or cut short",
        [
            f"{_READING}test_a_read_that_fails_for_a_while_is_repeated",
            f"{_READING}test_a_read_that_fails_for_good_ends_the_run",
            f"{_READING}test_an_error_that_cannot_pass_is_not_repeated",
            f"{_READING}test_short_and_slow_reads_lose_nothing",
            f"{_READING}test_errors_reach_a_feeder_of_any_worker_count",
        ],
    ),
    "S20": (
        "prepare killed at ten points: the next gives the same bytes, keeps whole shards, notices changed images",
        [
            f"{_PREPARE}test_s20_a_prepare_that_was_killed_goes_on_to_the_same_bytes",
            f"{_PREPARE}test_s20_what_changed_since_the_kill_is_written_anew",
            f"{_PREPARE}test_s20_any_number_of_processes_writes_the_same_bytes",
        ],
    ),
    "S21": (
        "second prepare or index into one folder: refused, the first is not disturbed",
        [
            f"{_PREPARE}test_s21_a_second_prepare_into_the_same_folder_is_refused",
            f"{_PREPARE}test_two_indexes_of_one_folder",
        ],
    ),
    "F01": (
        "list of nobody: exit 3, nothing written",
        [
            f"{_LISTS}test_f01_a_list_of_nobody",
            f"{_REFUSALS}test_empty_forget_list",
        ],
    ),
    "F02": (
        "ids that no image has: refused with count and first ids, or left out and each recorded",
        [
            f"{_LISTS}test_f02_ids_that_no_image_has",
            f"{_REFUSALS}test_unknown_id",
        ],
    ),
    "F03": (
        "one image listed in many ways: one image, duplicates counted",
        [
            f"{_LISTS}test_f03_one_image_listed_in_many_ways_is_one_image",
        ],
    ),
    "F04": (
        "nearly everybody: refused above data.max_forget_share; whole classes noted in the plan",
        [
            f"{_LISTS}test_f04_a_list_of_nearly_everybody",
            f"{_LISTS}test_f04_a_list_that_covers_a_class_is_noted",
        ],
    ),
    "F05": (
        "id to forget and to retain, also in two spellings: exit 3, named",
        [
            f"{_LISTS}test_f05_an_id_to_forget_and_to_retain",
            f"{_REFUSALS}test_id_in_both_forget_and_retain",
        ],
    ),
    "F06": (
        "exact copy among the retained: refused, forgotten too, or kept and recorded",
        [
            f"{_COPIES}test_f06_exact_copies_of_a_forgotten_image",
        ],
    ),
    "F07": (
        "near-copies among the retained: counted by a perceptual hash in summary and plan",
        [
            f"{_COPIES}test_f07_near_copies_are_counted",
            f"{_COPIES}test_perceptual_hashes_stay_for_copies_and_differ_for_others",
            f"{_COPIES}test_near_copies_equal_a_comparison_of_all_pairs",
        ],
    ),
    "F08": (
        "list edited after the shards were made: refused by its digest",
        [
            f"{_LISTS}test_f08_a_list_edited_after_the_shards_were_made",
        ],
    ),
    "F09": (
        "list of a million ids: read as a stream, memory bounded",
        [
            f"{_LISTS}test_f09_a_million_ids_in_bounded_memory",
            "tests/data/test_manifest_at_scale.py::test_look_ups_in_mapped_columns_take_no_memory_that_stays",
        ],
    ),
    "F10": (
        "formulas, markup and control characters in ids: plain text in manifest, messages and report",
        [
            f"{_LISTS}test_f10_ids_that_are_formulas_markup_or_control_stay_text",
            f"{_IDS}test_a_list_is_read_right",
            "tests/report/test_report_is_inert.py::test_hostile_text_is_inert_wherever_it_stands",
        ],
    ),
    "F11": (
        "id that is a path out of the folder: refused with its line",
        [
            f"{_LISTS}test_f11_an_id_that_is_a_path_out_of_the_folder",
            f"{_IDS}test_refuses_with_one_sentence",
        ],
    ),
    "F12": (
        "malformed or huge list: refused with its line, never read or unpacked as a whole",
        [
            f"{_LISTS}test_f12_a_malformed_file_is_refused_with_its_line",
            f"{_LISTS}test_f12_a_file_without_a_line_end_is_never_read_as_a_whole",
        ],
    ),
    "F13": (
        "Unicode form, slashes, case: one documented form; a spelling that two images share is refused",
        [
            f"{_LISTS}test_f13_unicode_form_and_slashes_do_not_matter_and_case_does",
            f"{_LISTS}test_f13_a_spelling_that_two_images_share_is_refused",
        ],
    ),
    "F14": (
        "fewer images to forget than ranks: each is consumed, ranks without one have empty batches, none hangs",
        [
            f"{_STREAM}test_fewer_forget_rows_than_ranks",
            f"{_STREAM}test_fewer_images_than_ranks_times_rows",
        ],
    ),
    "F15": (
        "the key or its passphrase is missing or wrong: exit 2 before anything is trained",
        ["tests/verify/test_threats.py::test_a_run_whose_key_is_missing_is_refused_before_it_trains"],
    ),
}
