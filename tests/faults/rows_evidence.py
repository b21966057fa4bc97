"""Faults of evidence and report, and the tests that bring them about."""

# ruff: noqa: E501

from __future__ import annotations

CERTIFICATE = "tests/verify/test_certificate.py"
THREATS = "tests/verify/test_threats.py"
RECEIPTS = "tests/verify/test_receipts.py"
REPLAY = "tests/verify/test_replay.py"
LEDGER = "tests/engine/test_ledger.py"
INERT = "tests/report/test_report_is_inert.py"

ROWS: dict[str, tuple[str, list[str] | str]] = {
    "R01": ("a byte of weights, scores, ledger, certificate or trust file changed: exit 8 at its level, with what it was",
            [f"{CERTIFICATE}::test_every_byte_of_the_envelope_counts",
             f"{CERTIFICATE}::test_bytes_of_the_trust_file_and_the_commitment_count",
             f"{THREATS}::test_6_7_10_12_files_of_the_run_were_changed"]),
    "R02": ("lines of the ledger taken out, moved, put in, cut: the chain breaks there; a torn last line is told from it",
            [f"{THREATS}::test_7_a_ledger_is_a_chain", f"{LEDGER}::test_a_broken_chain_is_refused",
             f"{LEDGER}::test_lines_are_a_chain_over_attempts_and_torn_lines"]),
    "R03": ("an unknown key, one key twice, a revoked certificate, no signature: does not hold",
            [f"{THREATS}::test_2_another_key_and_one_key_twice", f"{THREATS}::test_1_an_outsider_edits_the_envelope",
             f"{THREATS}::test_21_a_certificate_that_was_revoked"]),
    "R04": ("a payload or envelope in other bytes, with other fields or a field twice: does not hold",
            [f"{THREATS}::test_1_an_outsider_edits_the_envelope",
             f"{CERTIFICATE}::test_every_field_of_the_predicate_counts"]),
    "R05": ("a run that is not whole or contradicts itself: not certified, exit 3",
            [f"{THREATS}::test_what_was_changed_before_is_not_certified",
             "tests/verify/test_dose_run.py::test_a_run_without_its_look_at_the_doses_is_not_certified"]),
    "R06": ("margins, attacks or confidence changed after the commitment: does not hold, or the run is refused",
            [f"{THREATS}::test_the_operator_signs_something_else",
             f"{THREATS}::test_a_run_that_does_not_keep_to_its_commitment_is_refused"]),
    "R07": ("a figure that is missing, or of too few images: never a pass",
            ["tests/audit/test_gates.py::test_too_few_images_never_pass_but_may_fail",
             "tests/verify/test_contradictions.py::test_report_refuses"]),
    "R08": ("a receipt of another image, certificate or count: does not hold; one names nobody else",
            [f"{RECEIPTS}::test_every_part_of_a_receipt_counts",
             f"{RECEIPTS}::test_19_no_receipt_for_an_image_that_was_not_in_the_request",
             f"{RECEIPTS}::test_nothing_that_leaves_the_operator_names_an_image_or_a_place"]),
    "R09": ("markup, scripts and huge texts in every field of a report: plain text",
            [f"{INERT}::test_hostile_text_is_inert_wherever_it_stands"]),
    "R10": ("ids, paths and hosts in report, certificate, register: searched, none is there; a guess is not confirmed",
            [f"{RECEIPTS}::test_nothing_that_leaves_the_operator_names_an_image_or_a_place",
             f"{RECEIPTS}::test_20_a_guess_about_a_person_is_not_confirmed"]),
    "R11": ("a report that is made again: the same bytes", [f"{INERT}::test_same_inputs_give_the_same_bytes"]),
    "R12": ("a verifier without torch, network and home directory",
            [f"{CERTIFICATE}::test_the_verifier_works_alone_without_torch_network_and_home"]),
    "R13": ("a statement of another form or version: refused",
            [f"{CERTIFICATE}::test_every_field_of_the_predicate_counts"]),
    "R14": ("weights that no training made, an encoder in the place of another, one step of another kind: caught",
            [f"{REPLAY}::test_12_14_weights_that_no_training_made",
             f"{REPLAY}::test_12_13_14_one_step_that_is_not_the_declared_one"]),
    "R15": ("images of the request that entered no loss, or entered it as retained ones: refused",
            [f"{LEDGER}::test_every_single_image_must_be_covered_where_the_method_shows_them",
             f"{LEDGER}::test_a_forget_image_in_a_loss_as_a_retain_image_is_refused"]),
}  # fmt: skip
