"""Every row of the threats on one finished run: caught at its level with its sentence, or never, and said so.

The numbers are those of `docs/assurance.md`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import rfc8785
import test_contradictions as forgeries
import tiny
from evidence_case import PASSPHRASE, Case

from distunlearn.cli.main import main
from distunlearn.verify import envelope
from distunlearn.verify.certificate import LIMITS
from distunlearn.verify.check import FAILS, HOLDS, OPEN
from distunlearn.verify.commitment import add_to_register
from distunlearn.verify.errors import ConfigError
from distunlearn.verify.keys import read_trust

RELY = "Do not rely on this certificate."


def caught(found, level: int, sentence: str) -> None:
    """At this level and at no lower one."""
    words = [check.word for check in found.checks]
    assert found.exit_code == 8 and words[level] == FAILS and FAILS not in words[:level], str(found)
    assert sentence in found.checks[level].why and RELY in str(found), str(found)


def recommitted(case: Case, edit: Callable[[dict], object], folder) -> object:
    """Another commitment with both signatures."""
    content = envelope.read(case.commitment.read_bytes(), "commitment").statement["predicate"]
    edit(content)
    data = envelope.sign("commitment", {"request": "0" * 64}, content, case.key("officer"))
    path = folder / "commitment.json"
    path.write_bytes(envelope.read(data, "commitment").also_signed(case.key()))
    return path


def margins(predicate: dict) -> None:
    predicate["rules"]["attack"] = 0.5
    for name, gate in predicate["figures"]["gates"].items():
        if name not in ("view_agreement", "knn", "linear_probe"):
            gate["margin"] = 0.5


SIGNED = {  # O signs something else: row -> (edit of the predicate, level that notices, sentence)
    "3 another commitment": (lambda p: p.update(commitment="0" * 64), 0, "it is of another run"),
    "3 another run": (lambda p: p.update(run="0" * 64), 0, "run of the certificate is"),
    "4 wider margin in the gate alone": (
        lambda p: p["figures"]["gates"]["bank_loss"].update(margin=0.5), 0, "and 0.08 was declared"),
    "4 wider margins in both": (margins, 0, "attack of the rules is 0.5, not 0.08"),
    "4 lower confidence": (lambda p: p["rules"].update(confidence=0.6), 0, "did not follow what was declared"),
    "4 an attack is dropped": (
        lambda p: p["figures"]["gates"].pop("bank_loss"), 0, "was declared and is not there"),
    "6 a verdict that the scores do not give": (lambda p: p.update(verdict="pass"), 2, "verdict: the run directory"),
    "6 a figure": (lambda p: p["figures"]["aucs"]["bank_loss"].update(unlearned=0.5), 2, "figures.aucs.bank_loss"),
    "7 fewer attempts": (lambda p: p["ledger"]["attempts"].update(unlearn=0), 2, "ledger.attempts.unlearn"),
    "7 another head": (lambda p: p["ledger"].update(head="0" * 64), 2, "ledger.head"),
    "8 another request": (lambda p: p["request"].update(size=3), 0, "size of the request is 3, not 24"),
    "8 another manifest": (
        lambda p: p["private"].update({"request.json": "0" * 64}), 0, "request.json of the private files"),
    "8 other settings": (lambda p: p["private"].update({"run.yaml": "0" * 64}), 0, "run.yaml of the private files"),
    "9 more images": (lambda p: p["coverage"].update(consumed_min=9), 2, "coverage.consumed_min"),
    "9 another outcome": (lambda p: p["outcome"].update(root="0" * 64), 2, "outcome.root"),
    "12 another original": (lambda p: p["states"].update(original="0" * 64), 2, "states.original"),
    "15 other code": (lambda p: p["ledger"].update(codes=["0" * 64]), 0, "codes of the ledger"),
    "a broken chain": (lambda p: p.update(sequence=2), 0, "sequence of the certificate is 2, not 1"),
    "a sentence left out": (lambda p: p.update(limits=p["limits"][1:]), 0, "leaves out sentences"),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNED)
def test_the_operator_signs_something_else(case, name):
    edit, level, sentence = SIGNED[name]
    caught(case.check(case.signed(edit)), level, sentence)


def test_1_an_outsider_edits_the_envelope(case):
    outer = json.loads(case.path.read_bytes())
    for edit in (
        {"comment": "hello"}, {"payloadType": "text/plain"}, {"signatures": []},
        {"signatures": outer["signatures"] * 2},
    ):  # fmt: skip
        found = case.statement_alone(rfc8785.dumps({**outer, **edit}))
        assert found.exit_code == 8 and found.checks[0].word == FAILS
    assert case.statement_alone(json.dumps(outer).encode()).exit_code == 8


def test_2_another_key_and_one_key_twice(case):
    caught(case.statement_alone(case.signed(lambda p: None, "stranger")), 0, "no trusted operator's key")
    caught(case.statement_alone(case.signed(lambda p: None, "officer")), 0, "no trusted operator's key")
    for holders in ((("operator", "operator"),) * 2, (("operator", "operator"), ("operator", "officer"))):
        with pytest.raises(ConfigError, match="one key twice"):
            read_trust(case.trusting(*holders))


def test_3_a_commitment_that_was_made_afterwards(case, tmp_path):
    other = recommitted(case, lambda c: c["rules"].update(attack=0.5), tmp_path)
    caught(case.statement_alone(commitment=other), 0, "it is of another run")


def test_5_another_encoder_is_deployed(case, tmp_path):
    export = shutil.copytree(case.run / "export", tmp_path / "export")
    shutil.copy(case.run / "original/export/model.safetensors", export)
    caught(case.check(export=export), 1, "is not the certified file")


@pytest.mark.parametrize("forge", forgeries.FORGERIES, ids=lambda forge: forge.__name__)
def test_6_7_10_12_files_of_the_run_were_changed(case, tmp_path, forge):
    run = case.copy(tmp_path)
    forge(run)
    found = case.check(run=run, export=None)
    assert found.exit_code == 8 and found.checks[2].word == FAILS and RELY in str(found)


@pytest.mark.parametrize("forge", forgeries.FORGERIES, ids=lambda forge: forge.__name__)
def test_what_was_changed_before_is_not_certified(case, tmp_path, monkeypatch, capsys, forge):
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    run = case.copy(tmp_path)
    (run / "evidence" / "certificate.json").unlink()
    forge(run)
    assert main(["certify", str(run), "--key", str(case.folder / "operator")]) == 3
    assert forgeries.FORGERIES[forge] in capsys.readouterr().err
    assert not (run / "evidence" / "certificate.json").exists()


def test_7_a_ledger_of_a_run_without_the_commitment(case, tmp_path):
    """Chained anew from nothing: the commitment was not there before the first step."""
    run = case.copy(tmp_path)
    forgeries.ledger(run, lambda lines: [{**lines[0], "prev": None}, *lines[1:]])
    found = case.check(run=run, export=None)
    assert found.exit_code == 8 and "ledger.jsonl" in found.checks[2].why


@pytest.mark.parametrize("edit", ["cut", "moved", "changed", "put in"])
def test_7_a_ledger_is_a_chain(case, tmp_path, edit, capsys):
    run = case.copy(tmp_path)
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    edited = {"cut": lines[:5] + lines[6:], "moved": [*lines[:5], lines[6], lines[5], *lines[7:]],
              "changed": [*lines[:5], lines[5].replace('"time":1', '"time":2'), *lines[6:]],
              "put in": [*lines[:5], lines[4], *lines[5:]]}[edit]  # fmt: skip
    (run / "ledger.jsonl").write_text("".join(edited))
    assert main(["report", str(run)]) == 3 and "the ledger was changed" in capsys.readouterr().err


def test_8_a_request_that_was_changed_afterwards(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    run = case.copy(tmp_path)
    forgeries.change(run / "evidence/requested.json", lambda rows: rows.popitem())
    found = case.check(run=run, export=None)
    assert found.exit_code == 8 and "evidence/requested.json" in found.checks[2].why
    assert main(["certify", str(run), "--key", str(case.folder / "operator")]) == 3
    assert "is not the request of the shards" in capsys.readouterr().err


def test_16_a_try_that_is_not_shown_is_listed(case, tmp_path):
    register = tmp_path / "register.jsonl"
    shutil.copy(case.register, register)
    add_to_register(register, commitment="5" * 64, reference="ticket 17", run="5" * 64, time=0)
    add_to_register(register, commitment="6" * 64, reference="ticket 18", run="6" * 64, time=0)
    found = case.statement_alone(register=register)
    assert found.checks[0].word == OPEN and "1 other commitments" in str(found) and "555555555555" in str(found)
    assert found.exit_code != 0
    empty = tmp_path / "empty"
    empty.write_text("")
    caught(case.statement_alone(register=empty), 0, "is not in the register")
    lines = register.read_text().splitlines(keepends=True)
    register.write_text("".join([lines[0], lines[2]]))
    caught(case.statement_alone(register=register), 0, "was changed (line 2)")


def test_the_certificate_before_is_the_one_that_is_named(case, tmp_path):
    """One of another encoder is a new lineage, which is said; another certificate, or one by somebody else, does not
    hold."""
    first = envelope.read(case.path.read_bytes(), "certificate")
    later = {"sequence": 2, "previous": first.digest}
    commitment = recommitted(case, lambda content: content.update(later), tmp_path)
    digest = envelope.read(commitment.read_bytes(), "commitment").digest
    unlearned = case.statement()["predicate"]["states"]["unlearned"]

    def second(**more: object) -> bytes:
        return case.signed(lambda p: p.update({**later, "commitment": digest, **more}))

    def checked(data: bytes, previous=case.path):
        return case.statement_alone(data, previous=previous, commitment=commitment, register=None)

    follows = second(states={**case.statement()["predicate"]["states"], "original": unlearned})
    assert checked(follows).checks[0].word == HOLDS and "follows certificate 1" in str(checked(follows))
    assert checked(second()).checks[0].word == HOLDS and "new lineage" in str(checked(second()))
    assert "new lineage" not in str(case.statement_alone(second(), commitment=commitment, register=None))
    stranger = tmp_path / "stranger.json"
    stranger.write_bytes(case.signed(lambda p: None, "stranger"))
    caught(checked(follows, stranger), 0, "no trusted operator's key signed the certificate before this one")
    other = tmp_path / "other.json"
    other.write_bytes(case.signed(lambda p: p["tool"].update(version="9")))
    caught(checked(follows, other), 0, "the chain is broken")


def test_21_a_certificate_that_was_revoked(case, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTUNLEARN_PASSPHRASE", PASSPHRASE)
    folder = tmp_path / "revocations"
    folder.mkdir()
    assert "revocations: not looked for" in str(case.statement_alone())
    assert case.statement_alone(revocations=folder).checks[0].word == HOLDS
    argv = ["revoke", str(case.path), "--reason", "key-compromise", "--out", str(folder / "a.json")]
    assert main([*argv, "--key", str(case.folder / "stranger")]) == 0
    assert case.statement_alone(revocations=folder).checks[0].word == HOLDS, "a stranger revokes nothing"
    assert main([*argv, "--key", str(case.folder / "officer")]) == 0
    caught(case.statement_alone(revocations=folder), 0, "was revoked (key-compromise)")


NEVER = [(11, 1), (13, 5), (18, 7), (22, 4), (23, 5), (24, 6), (25, 3), (26, 8)]  # row, sentence


@pytest.mark.parametrize(("row", "number"), NEVER)
def test_what_is_never_caught_here_is_said(case, row, number):
    """`verify` passes, and the sentence stands in every answer."""
    found = case.check()
    assert all(check.word == HOLDS for check in found.checks[:3]) and LIMITS[number] in str(found)


def test_every_row_of_the_threats_has_a_test():
    """By the numbers in their names, and in docs/assurance.md."""
    folder = Path(__file__).parent
    texts = [path.read_text("utf-8") for path in folder.glob("test_*.py")]
    heads = [head for text in texts for head in re.findall(r"def test_((?:\d+_)+)", text)]
    named = {int(number) for head in heads for number in head.split("_")[:-1]}
    named |= {int(name.split()[0]) for name in SIGNED if name[0].isdigit()}
    named |= {row for row, _ in NEVER}
    assert named == set(range(1, 28))
    page = (folder.parents[1] / "docs/assurance.md").read_text("utf-8")
    shown = "\n".join(
        line.split("|")[1].partition(":")[0] for line in page.splitlines() if re.match(r"\| \d+[,:]", line)
    )
    listed = {int(n) for n in re.findall(r"\d+", shown)} | set(range(22, 27))  # "22 to 26"
    assert listed == set(range(1, 28))


# -- the run follows the commitment ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(case, tmp_path_factory):
    """A copy of the run that has committed and not yet begun."""
    run = tmp_path_factory.mktemp("begun") / "run"
    shutil.copytree(case.run, run, ignore=shutil.ignore_patterns("ledger*", "original", "retrained", "audit", "export",
                    "done.json", "*.safetensors", "checkpoints", "certificate.json", "commitment.json"))  # fmt: skip
    return run


@pytest.mark.parametrize(("setting", "sentence"), [
    ("runtime.threads=2", "threads: 1 declared, 2 now"),
    ("evidence.commitment=/nonexistent", "does not exist"),
    ("audit.gates.attack=0.5", "belongs to a run with other settings"),
])  # fmt: skip
def test_a_run_that_does_not_keep_to_its_commitment_is_refused(case, begun, tmp_path, setting, sentence):
    run = shutil.copytree(begun, tmp_path / "run")
    settings = tiny.settings(*case.declared(), setting)
    done = tiny.command("pretrain", "digits", "--out", str(run), *settings, DISTUNLEARN_PASSPHRASE=PASSPHRASE)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr[-2000:]
    assert not (run / "ledger.jsonl").exists()


@pytest.mark.parametrize(("setting", "passphrase", "sentence"), [
    ("evidence.key=null", PASSPHRASE, "needs evidence.key"),
    ("evidence.key=/nonexistent", PASSPHRASE, "cannot be read"),
    (None, "wrong", "does not open with this passphrase"),
])  # fmt: skip
def test_a_run_whose_key_is_missing_is_refused_before_it_trains(case, begun, tmp_path, setting, passphrase, sentence):
    run = shutil.copytree(begun, tmp_path / "run")
    settings = tiny.settings(*case.declared(), *([setting] if setting else []))
    done = tiny.command("pretrain", "digits", "--out", str(run), *settings, DISTUNLEARN_PASSPHRASE=passphrase)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr[-2000:]
    assert not (run / "ledger.jsonl").exists() and not (run / "original").exists()


def test_a_run_that_has_begun_is_not_committed_to_afterwards(case, finished_run, tmp_path):
    run = shutil.copytree(finished_run()[0], tmp_path / "run")
    settings = tiny.settings(*case.declared())
    for verb in ("commit", "unlearn"):
        done = tiny.command(verb, "digits", "--out", str(run), *settings, DISTUNLEARN_PASSPHRASE=PASSPHRASE)
        assert done.returncode == 2 and "a commitment is made before the first step" in done.stderr, done.stderr[-2000:]


def test_seeds_follow_from_the_nonce(case, finished_run):
    """Another order of the images to forget than without a commitment, and the same original encoder."""
    plain = finished_run()[0]
    state = [json.loads((run / "original/done.json").read_text())["state"] for run in (plain, case.run)]
    assert state[0] == state[1]
    steps = [
        [json.loads(line).get("forget") for line in (run / "ledger.jsonl").read_text().splitlines()
         if '"step","phase":"unlearn"' in line] for run in (plain, case.run)
    ]  # fmt: skip
    assert steps[0] != steps[1] and sorted(map(len, steps[0])) == sorted(map(len, steps[1]))
    assert os.path.exists(case.run / "evidence/commitment.json")
