"""Receipts show one person his own image and nobody another's; nothing that leaves the operator confirms a guess."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import re
import shutil
import socket
from pathlib import Path

import pytest
import rfc8785

from distunlearn.cli.main import main
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.verify.check import FAILS, HOLDS
from distunlearn.verify.merkle import leaf_hash
from distunlearn.verify.receipt import ROWS, read_rows


def written(case, sample_id: str, folder: Path) -> Path:
    path = folder / "receipt.json"
    path.unlink(missing_ok=True)
    assert main(["receipt", str(case.run), "--id", sample_id, "--out", str(path)]) == 0
    return path


@pytest.fixture
def mine(case, tmp_path) -> tuple[str, Path]:
    sample_id = sorted(read_rows(case.run))[5]
    return sample_id, written(case, sample_id, tmp_path)


def checked(case, path: Path, **more):
    return case.statement_alone(receipt=path, **more)


def refused(case, path: Path, sentence: str, **more) -> None:
    found = checked(case, path, **more)
    assert found.exit_code == 8 and found.checks[-1].word == FAILS and sentence in str(found), str(found)


def test_a_receipt_holds_with_and_without_the_image(case, mine, tmp_path, capsys):
    sample_id, path = mine
    assert path.stat().st_size <= 2048 and path.stat().st_mode & 0o777 == 0o600
    found = checked(case, path)
    assert found.checks[-1].word == HOLDS and "was not checked: give --image" in str(found)
    manifest = Manifest.of_run(case.run)
    sample = manifest.by_id[sample_id]
    with (case.run / "shards" / sample.shard).open("rb") as shard:
        shard.seek(sample.offset)
        (tmp_path / "mine.png").write_bytes(shard.read(sample.length))
    found = checked(case, path, image=tmp_path / "mine.png")
    assert found.checks[-1].word == HOLDS and "was not checked" not in found.checks[-1].why
    assert re.search(r"entered the loss [1-9]\d* times", found.checks[-1].why)
    argv = ["verify", str(case.path), "--trust", str(case.trust), "--receipt", str(path)]
    main([*argv, "--commitment", str(case.commitment)])
    assert "receipt of one image" in capsys.readouterr().out
    (tmp_path / "mine.png").write_bytes(b"another")
    refused(case, path, "is not the file of the receipt", image=tmp_path / "mine.png")


def test_19_no_receipt_for_an_image_that_was_not_in_the_request(case, mine, tmp_path, capsys):
    _, path = mine
    retained = Manifest.of_run(case.run).ids("retain")[0]
    assert main(["receipt", str(case.run), "--id", retained, "--out", str(tmp_path / "x")]) == 2
    assert "is not in the request" in capsys.readouterr().err and retained not in capsys.readouterr().err
    content = json.loads(path.read_bytes())
    content["leaf"]["id"] = retained
    path.write_bytes(rfc8785.dumps(content))
    refused(case, path, "is not in the request that was certified")


def test_every_part_of_a_receipt_counts(case, mine):
    """Every byte of it, and what it says about how often the image was used."""
    _, path = mine
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert checked(case, path).exit_code == 8, at
    for name, value in (("consumed", 99), ("misused", True)):
        content = json.loads(data)
        content["leaf"][name] = value
        path.write_bytes(rfc8785.dumps(content))
        refused(case, path, "is not in the outcome that was certified")
    content = json.loads(data)
    content["certificate"] = "0" * 64
    path.write_bytes(rfc8785.dumps(content))
    refused(case, path, "is for another certificate")


def test_nothing_that_leaves_the_operator_names_an_image_or_a_place(case, tmp_path):
    """Certificate, commitment, register and report name nobody; a receipt names its own image alone."""
    manifest = Manifest.of_run(case.run)
    ids = [sample.id for sample in manifest.samples]
    rows = read_rows(case.run)
    lists = ("\n".join(sorted(rows)), json.dumps(sorted(rows)), (case.run / ROWS).read_text(), "\n".join(rows))
    secrets = [
        str(case.run), str(case.folder), str(Path.home()), socket.gethostname(), *(s.sha256 for s in manifest.samples),
        *(hashlib.sha256(text.encode()).hexdigest() for text in lists), manifest.fingerprint,
    ]  # fmt: skip
    secrets = [name for name in secrets if len(name) > 5]
    own = sorted(rows)[3]
    receipt = written(case, own, tmp_path).read_text()
    payloads = [json.dumps(case.statement()), (case.run / "evidence/commitment.request.json").read_text(),
                case.register.read_text(), (case.run / "report.html").read_text()]  # fmt: skip
    for text in payloads:
        for name in [*ids, *secrets]:
            assert name not in text, name
    mine = {own, rows[own]}
    for name in [*ids, *secrets]:
        assert name in mine or name not in receipt, name
    assert own in receipt, "control: what is there is found"


def test_20_a_guess_about_a_person_is_not_confirmed(case, tmp_path):
    """Whoever knows the id and the very image, and certificate, commitment and another's receipt, learns nothing: no
    digest in them is one of the guess, salted by anything that they hold."""
    rows = read_rows(case.run)
    other, guess = sorted(rows)[:2]
    receipt = json.loads(written(case, other, tmp_path).read_text())
    held = set(re.findall(r"[0-9a-f]{64}", json.dumps([case.statement(), receipt]) + case.register.read_text()))
    salts = [receipt["leaf"]["salt"], *sorted(held), ""]
    leaves = [{"salt": salt, "id": guess, "image": rows[guess]} for salt in salts]
    leaves += [{**leaf, "consumed": count, "misused": False} for leaf, count in itertools.product(leaves, range(1, 9))]
    guesses = {leaf_hash(rfc8785.dumps(leaf)).hex() for leaf in leaves}
    plain = (guess, rows[guess], f"{guess}\n", json.dumps([guess]), json.dumps({guess: rows[guess]}))
    guesses |= {hashlib.sha256(text.encode()).hexdigest() for text in plain}
    assert not guesses & held
    known = leaf_hash(rfc8785.dumps({name: receipt["leaf"][name] for name in ("salt", "id", "image")})).hex()
    (tmp_path / "receipt.json").unlink()
    shown = json.loads(written(case, guess, tmp_path).read_text())
    everywhere = [hash for sample in sorted(rows) for hash in _path(case, sample, tmp_path)]
    assert known in everywhere, "control: with the salt the same search finds the leaf"
    assert shown["leaf"]["salt"] != receipt["leaf"]["salt"]


def _path(case, sample_id: str, folder: Path) -> list[str]:
    return json.loads(written(case, sample_id, folder).read_text())["request"]["path"]


def test_places_in_the_trees_tell_nothing_about_the_ids(case, tmp_path):
    """Leaves are sorted by their salted hash: the order of the ids does not come back in the places."""
    rows = sorted(read_rows(case.run))
    indices = [json.loads(written(case, i, tmp_path).read_text())["request"]["index"] for i in rows]
    assert sorted(indices) == list(range(len(rows))) and indices != sorted(indices)
    shuffled = list(indices)
    random.Random(0).shuffle(shuffled)
    inversions = sum(a > b for a, b in itertools.combinations(indices, 2))
    pairs = len(rows) * (len(rows) - 1) / 2
    assert 0.2 < inversions / pairs < 0.8


def test_a_receipt_needs_the_secret(case, tmp_path, capsys):
    run = case.copy(tmp_path)
    shutil.rmtree(run / "evidence", ignore_errors=False)
    assert main(["receipt", str(run), "--id", "x", "--out", str(tmp_path / "r")]) == 3
    assert "certify it first" in capsys.readouterr().err
