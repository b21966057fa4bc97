"""Which test covers which row of the catalogue of faults: shards and lists of images to forget.

A row has the ids of its tests (without parameters), or a sentence that says why there is nothing to test.
"""

from __future__ import annotations

_SHARDS = "tests/faults/test_shard_faults.py::"
_LISTS = "tests/faults/test_forget_list_faults.py::"
_REFUSALS = "tests/faults/test_refusals.py::"
_DECODE = "tests/data/test_decode.py::"
_IDS = "tests/data/test_forget_list.py::"

ROWS: dict[str, list[str] | str] = {
    "S01": [
        f"{_SHARDS}test_s01_a_header_broken_in_mid_shard",
        f"{_SHARDS}test_s01_is_found_by_whoever_reads_the_shard_even_where_digests_are_not_asked_for",
        f"{_SHARDS}test_s01_s02_a_broken_shard_of_others_is_never_indexed_in_part",
    ],
    "S02": [
        f"{_SHARDS}test_s02_a_shard_that_is_not_whole",
        f"{_SHARDS}test_s01_s02_a_broken_shard_of_others_is_never_indexed_in_part",
        f"{_REFUSALS}test_missing_shard",
        f"{_REFUSALS}test_truncated_shard",
    ],
    "S03": [
        f"{_SHARDS}test_s03_other_bytes_of_the_same_size_are_found_by_the_digest_of_the_image_too",
        f"{_REFUSALS}test_one_byte_changed_in_a_shard",
    ],
    "S04": [f"{_SHARDS}test_s04_a_manifest_that_is_not_of_these_shards"],
    "S05": [
        f"{_SHARDS}test_s05_s06_a_member_that_is_not_as_it_should_be",
        f"{_SHARDS}test_s05_one_key_in_two_shards",
    ],
    "S06": [f"{_SHARDS}test_s05_s06_a_member_that_is_not_as_it_should_be"],
    "S07": [f"{_SHARDS}test_s07_urls_and_commands_are_no_folders_and_no_shards"],
    "S08": [f"{_SHARDS}test_s08_pickles_among_the_parts_are_never_opened"],
    "S09": [
        f"{_SHARDS}test_s09_a_huge_claim_costs_no_memory",
        f"{_SHARDS}test_s09_s10_s11_an_image_that_cannot_be_used_is_named",
        f"{_REFUSALS}test_an_image_of_60000_x_60000_pixels",
        f"{_DECODE}test_huge_claim_is_refused_from_the_header",
        f"{_DECODE}test_huge_webp_claim_is_refused_from_the_header",
    ],
    "S10": [
        f"{_SHARDS}test_s09_s10_s11_an_image_that_cannot_be_used_is_named",
        f"{_DECODE}test_damaged_or_foreign_bytes_are_refused_by_name",
    ],
    "S11": [
        f"{_DECODE}test_common_modes_of_white_are_white",
        f"{_DECODE}test_cmyk_jpeg_is_converted",
        f"{_DECODE}test_transparency_is_laid_over_white",
        f"{_DECODE}test_exif_orientation_is_applied",
        f"{_DECODE}test_sixteen_bit_grey_is_refused",
        f"{_SHARDS}test_s11_of_an_animation_the_first_frame_counts_and_profiles_do_not",
    ],
    "S12": [
        f"{_SHARDS}test_s12_odd_shapes_are_prepared",
        f"{_DECODE}test_to_square_of_odd_shapes",
    ],
    "S20": [
        f"{_SHARDS}test_s20_a_prepare_that_was_killed_goes_on_to_the_same_bytes",
        f"{_SHARDS}test_s20_what_changed_since_the_kill_is_written_anew",
        f"{_SHARDS}test_s20_any_number_of_processes_writes_the_same_bytes",
    ],
    "S21": [
        f"{_SHARDS}test_s21_a_second_prepare_into_the_same_folder_is_refused",
        f"{_SHARDS}test_two_indexes_of_one_folder",
    ],
    "F01": [f"{_LISTS}test_f01_a_list_of_nobody", f"{_REFUSALS}test_empty_forget_list"],
    "F02": [f"{_LISTS}test_f02_ids_that_no_image_has", f"{_REFUSALS}test_unknown_id"],
    "F03": [f"{_LISTS}test_f03_one_image_listed_in_many_ways_is_one_image"],
    "F04": [
        f"{_LISTS}test_f04_a_list_of_nearly_everybody",
        f"{_LISTS}test_f04_a_list_that_covers_a_class_is_noted",
    ],
    "F05": [f"{_LISTS}test_f05_an_id_to_forget_and_to_retain", f"{_REFUSALS}test_id_in_both_forget_and_retain"],
    "F06": [f"{_LISTS}test_f06_exact_copies_of_a_forgotten_image"],
    "F07": [
        f"{_LISTS}test_f07_near_copies_are_counted",
        f"{_LISTS}test_perceptual_hashes_stay_for_copies_and_differ_for_others",
        f"{_LISTS}test_near_copies_equal_a_comparison_of_all_pairs",
    ],
    "F08": [f"{_LISTS}test_f08_a_list_edited_after_the_shards_were_made"],
    "F09": [
        f"{_LISTS}test_f09_a_million_ids_in_bounded_memory",
        "tests/data/test_manifest.py::test_look_ups_in_mapped_columns_take_no_memory_that_stays",
    ],
    "F10": [
        f"{_LISTS}test_f10_ids_that_are_formulas_markup_or_control_stay_text",
        f"{_IDS}test_ids_with_markup_and_formulas_stay_plain_text",
        "tests/report/test_report.py::test_hostile_text_is_inert_wherever_it_stands",
    ],
    "F11": [
        f"{_LISTS}test_f11_an_id_that_is_a_path_out_of_the_folder",
        f"{_IDS}test_refuses_with_one_sentence",
    ],
    "F12": [
        f"{_LISTS}test_f12_a_malformed_file_is_refused_with_its_line",
        f"{_LISTS}test_f12_a_file_without_a_line_end_is_never_read_as_a_whole",
    ],
    "F13": [
        f"{_LISTS}test_f13_unicode_form_and_slashes_do_not_matter_and_case_does",
        f"{_LISTS}test_f13_a_spelling_that_two_images_share_is_refused",
    ],
    "F15": "Nothing is signed in this package yet, so there is no key that could be missing.",
}
