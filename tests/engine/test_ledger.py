"""The ledger counts what entered the loss, and an interrupted attempt's lost steps do not count."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest

from distunlearn.engine.ledger import Ledger, require_coverage
from distunlearn.errors import CoverageError, DataError, EvidenceError
from distunlearn.verify.ledger import coverage, effective_states, effective_steps, read_ledger

FORGET = frozenset({"f0", "f1", "f2"})


def write(path, first, batches, attempt):
    ledger = Ledger(path)
    ledger.start("unlearn", first, attempt=attempt)
    for step, ids in enumerate(batches, start=first):
        ledger.step("unlearn", step, {"forget": ids, "retain": [f"r{step}"]}, FORGET)
    ledger.close()


def test_counts_equal_a_plain_count_of_what_was_consumed(tmp_path):
    path = tmp_path / "ledger.jsonl"
    batches = [["f0", "f1"], ["f2", "f0"], ["f1", "f2"], ["f0", "f0"]]
    write(path, 0, batches, 1)
    found = coverage(read_ledger(path), sorted(FORGET))
    expected = Counter(i for batch in batches for i in batch)
    assert dict(found.counts) == dict(expected)
    assert (found.requested, found.consumed_min, found.consumed_max, found.used_as_retain) == (3, 2, 4, 0)


def test_steps_after_the_resumed_checkpoint_are_superseded(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path, 0, [["f0"], ["f1"], ["f2"], ["f2"]], 1)  # killed after step 3; the checkpoint was at step 2
    write(path, 2, [["f1"]], 2)
    lines = read_ledger(path)
    assert [effective_steps(lines, "unlearn")[k]["forget"] for k in (0, 1, 2)] == [["f0"], ["f1"], ["f1"]]
    found = coverage(lines, sorted(FORGET))
    assert dict(found.counts) == {"f0": 1, "f1": 2, "f2": 0}
    assert found.consumed_min == 0  # the naive count over all lines would claim that f2 was processed
    assert Counter(i for line in lines if line["event"] == "step" for i in line["forget"])["f2"] == 2


def test_a_forget_image_on_the_retain_side_is_seen(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.start("unlearn", 0, attempt=1)
    ledger.step("unlearn", 0, {"forget": ["f0", "f1", "f2"], "retain": ["r0", "f1"]}, FORGET)
    ledger.close()
    lines = read_ledger(path)
    assert coverage(lines, sorted(FORGET)).used_as_retain == 1
    assert coverage(lines, ["f0", "f2"]).used_as_retain == 1  # of an earlier request


@pytest.mark.parametrize("forgets", [True, False])
@pytest.mark.parametrize("phase", ["unlearn", "retrain"])
def test_a_forget_image_in_a_loss_as_a_retain_image_is_refused(tmp_path, phase, forgets):
    """In the unlearning and in the retraining: a yardstick that saw a forgotten image makes every gap lenient."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.start("unlearn", 0, attempt=1)
    ledger.step("unlearn", 0, {"forget": sorted(FORGET), "retain": ["r0"]}, FORGET)
    require_coverage(coverage(read_ledger(path), sorted(FORGET)), forgets)  # control: all is well so far
    ledger.start(phase, 1, attempt=1)
    ledger.step(phase, 1, {"forget": [], "retain": ["r1", "f1", "f2", "f1"]}, FORGET)
    ledger.close()
    found = coverage(read_ledger(path), sorted(FORGET))
    assert found.used_as_retain == 2
    with pytest.raises(CoverageError, match="2 of 3 forget images entered a loss as retain images"):
        require_coverage(found, forgets)


def test_every_single_image_must_be_covered_where_the_method_shows_them(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path, 0, [["f0", "f1", "f1"]], 1)
    found = coverage(read_ledger(path), sorted(FORGET))
    with pytest.raises(CoverageError, match="1 of 3 forget images never entered the loss"):
        require_coverage(found, True)
    require_coverage(found, False)
    require_coverage(coverage(read_ledger(path), ["f0", "f1"]), True)


def test_a_step_that_is_to_be_repeated_does_not_count_before_it_is(tmp_path):
    """Killed after step 2; the checkpoint was at step 2, and the next attempt dies before it has repeated it."""
    path = tmp_path / "ledger.jsonl"
    write(path, 0, [["f0"], ["f1"], ["f2"]], 1)
    write(path, 2, [], 2)
    lines = read_ledger(path)
    assert sorted(effective_steps(lines, "unlearn")) == [0, 1]
    assert dict(coverage(lines, sorted(FORGET)).counts) == {"f0": 1, "f1": 1, "f2": 0}


def test_pretraining_on_members_is_counted_but_names_nobody(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.step("pretrain", 0, {"members": ["f0", "r0"]}, FORGET, names="")
    ledger.close()
    (line,) = read_ledger(path)
    assert line["count"] == {"members": 2}
    assert "f0" not in json.dumps(line)


def test_a_torn_last_line_is_ended_and_the_next_attempt_goes_on(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path, 0, [["f0"]], 1)
    with open(path, "a") as file:
        file.write('{"event":"step","phase":"unlearn","st')
    write(path, 1, [["f1"]], 2)
    assert dict(coverage(read_ledger(path), sorted(FORGET)).counts) == {"f0": 1, "f1": 1, "f2": 0}


def test_damage_in_the_middle_of_an_attempt_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(path, 0, [["f0"], ["f1"], ["f2"]], 1)
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:20]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="line 3"):
        read_ledger(path)


def test_other_ranks_write_nothing(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", is_main=False)
    ledger.start("unlearn", 0, attempt=1)
    ledger.close()
    assert not (tmp_path / "ledger.jsonl").exists()


def test_lines_are_a_chain_over_attempts_and_torn_lines(tmp_path):
    """Computed here by hand: number, and SHA-256 of the bytes of the line before; the first goes back to the anchor."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, anchor="a" * 64)
    ledger.start("unlearn", 0, attempt=1)
    ledger.close()
    with open(path, "ab") as file:
        file.write(b'{"event":"step","ph')
    write(path, 0, [["f0"], ["f1"]], 2)
    read_ledger(path)
    raw = path.read_bytes().splitlines()
    expected = ["a" * 64, *(hashlib.sha256(line).hexdigest() for line in raw)]
    for number in (0, 2, 3, 4):
        line = json.loads(raw[number])
        assert (line["n"], line["prev"]) == (number, expected[number])


@pytest.mark.parametrize("edit", ["cut", "moved", "changed", "put in", "cut at the front"])
def test_a_broken_chain_is_refused(tmp_path, edit):
    path = tmp_path / "ledger.jsonl"
    write(path, 0, [["f0"], ["f1"], ["f2"]], 1)
    a, b, c, d = path.read_text().splitlines()
    edited = {"cut": [a, b, d], "moved": [a, c, b, d], "changed": [a, b.replace("f0", "f9"), c, d],
              "put in": [a, b, b, c, d], "cut at the front": [b, c, d]}[edit]  # fmt: skip
    path.write_text("\n".join(edited) + "\n")
    with pytest.raises(EvidenceError, match="the ledger was changed"):
        read_ledger(path)


def test_states_of_attempts_that_were_given_up_do_not_count(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.start("unlearn", 0, attempt=1, state="0")
    for step in (2, 4):
        ledger.state("unlearn", step, f"first {step}")
    ledger.start("unlearn", 2, attempt=2, state="first 2")
    ledger.state("unlearn", 4, "second 4")
    ledger.state("unlearn", 6, "end", final=True)
    ledger.close()
    states = effective_states(read_ledger(path), "unlearn")
    assert {step: state["digest"] for step, state in states.items()} == {
        0: "0", 2: "first 2", 4: "second 4", 6: "end",
    }  # fmt: skip
