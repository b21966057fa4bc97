"""The roles of the next request, and the chain that knows what earlier ones forgot; HMACs are computed anew here."""

from __future__ import annotations

import hashlib
import hmac
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pictures import Pictures, jpeg
from PIL import Image

from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.previous import chain_after, count_labels, leave_out, next_request
from distunlearn.data.prepare.selection import draw_request
from distunlearn.data.prepare.write_shards import prepare_shards, write_shards
from distunlearn.data.purge import purge_shards
from distunlearn.errors import DataError
from distunlearn.verify.chain import Chain

SMALL = DataConfig(
    members=40, forget=10, holdout=12, calibration=6, third_party=6, third_party_audit=6, samples_per_shard=8
)


@pytest.fixture
def first(tmp_path) -> Path:
    """The run directory of a first request that has forgotten, beside its shards."""
    made = prepare_shards(SMALL, 0, tmp_path / "shards")
    made.save_request(tmp_path / "one")
    chain_after(made, Chain.new(), original="a", unlearned="b").save(tmp_path / "one")
    return tmp_path / "one"


def listed(folder: Path, ids: list[str], name: str = "list.txt") -> str:
    (folder / name).write_text("\n".join(ids) + "\n")
    return str(folder / name)


def test_the_chain_holds_hmacs_and_neither_ids_nor_digests(first):
    made = Manifest.load(first.parent / "shards", run=first)
    text, key = (first / "chain.json").read_text(), (first / "chain.key").read_bytes()
    found = json.loads(text)
    assert len(key) == 32 and found["requests"] == [{"images": 10, "labels": 10, "original": "a", "unlearned": "b"}]
    samples = made.lookup(made.ids("forget"))
    assert found["forgotten"] == [
        [1, hmac.new(key, b"image" + bytes.fromhex(s.sha256), hashlib.sha256).hexdigest(),
         hmac.new(key, b"id" + s.id.encode(), hashlib.sha256).hexdigest(), f"{near:016x}"]
        for s, near in zip(samples, made.columns.near[made.rows(("forget",))].tolist(), strict=True)
    ]  # fmt: skip
    assert not any(s.id in text or s.sha256[:16] in text for s in samples)
    chain = Chain.load(first)
    assert chain.requests_of([bytes.fromhex(samples[0].sha256), bytes(32)]) == [1, 0]
    assert repr(chain).count(key.hex()) == 0 and "key" not in repr(chain)


@pytest.mark.parametrize("purged", [False, True])
def test_the_next_request_takes_over_roles_and_leaves_out_what_was_forgotten(first, tmp_path, purged):
    shards = tmp_path / "shards"
    made = Manifest.load(shards, run=first)
    if purged:
        purge_shards(shards, made.ids("forget"))
    wanted = made.ids("retain")[:5]
    found = next_request(replace(SMALL, forget=listed(tmp_path, wanted)), 0, Manifest.load(shards), first)
    assert found.ids("forget") == wanted and found.ids("retain") == made.ids("retain")[5:]
    assert found.ids("forgotten") == ([] if purged else made.ids("forget"))
    for role in ("holdout", "calibration", "third_party", "third_party_audit"):
        assert found.ids(role) == made.ids(role)
    facts = found.facts["previous"]
    assert (facts["forgotten"], facts["present"], facts["requests"]) == (10, 0 if purged else 10, 1)
    found.save_request(tmp_path / "two")
    chain_after(found, Chain.load(first), original="b", unlearned="c").save(tmp_path / "two")
    after = next_request(replace(SMALL, forget=4), 3, Manifest.load(shards), tmp_path / "two")
    assert len(after.ids("forget")) == 4 and len(after.ids("retain")) == 40 - 10 - 5 - 4
    assert set(after.ids("forgotten")) == ({*wanted} if purged else {*wanted, *made.ids("forget")})
    assert Chain.load(tmp_path / "two").key == Chain.load(first).key


def test_a_classifier_keeps_the_output_of_a_class_whose_last_image_was_purged(first, tmp_path):
    made = Manifest.load(tmp_path / "shards", run=first)
    last = made.columns.ids.at(np.flatnonzero(made.columns.label == 9))
    made = next_request(replace(SMALL, forget="class:9"), 0, made, first)
    made.save_request(tmp_path / "two")
    chain_after(made, Chain.load(first), original="b", unlearned="c").save(tmp_path / "two")
    purge_shards(tmp_path / "shards", last)
    after = next_request(replace(SMALL, forget=4), 3, Manifest.load(tmp_path / "shards"), tmp_path / "two")
    assert after.label_range(("retain", "forget", "forgotten"))[1] < 9 and count_labels(after) == 10


def test_what_may_not_come_again_is_refused(first, tmp_path):
    shards = tmp_path / "shards"
    made = Manifest.load(shards, run=first)
    gone, holdout = made.ids("forget")[:2], made.ids("holdout")[:1]
    for ids, words in ((gone, "an earlier request has forgotten already"), (holdout, "the encoder never saw")):
        cfg = replace(SMALL, forget=listed(tmp_path, [*ids, made.ids("retain")[0]]))
        with pytest.raises(DataError, match=words):
            next_request(cfg, 0, Manifest.load(shards), first)
        found = next_request(replace(cfg, allow_missing=True), 0, Manifest.load(shards), first)
        assert found.ids("forget") == made.ids("retain")[:1]
    (tmp_path / "roles.csv").write_text(f"id,role\n{made.ids('retain')[0]},forget\n{gone[0]},retain\n")
    with pytest.raises(DataError, match="gives the role retain"):
        next_request(replace(SMALL, forget=str(tmp_path / "roles.csv")), 0, Manifest.load(shards), first)
    with pytest.raises(DataError, match=r"chain\.json cannot be read"):
        next_request(replace(SMALL, forget=3), 0, Manifest.load(shards), tmp_path)


def shards_of(folder: Path, images: dict[str, bytes], roles: dict[str, str]) -> Manifest:
    """Shards of these very images."""
    source = Pictures([(i, None) for i in images])
    source.read = lambda sample_id: (images[sample_id], "jpg")  # type: ignore[method-assign]
    source.stamp = lambda sample_id: hashlib.sha256(images[sample_id]).hexdigest()  # type: ignore[method-assign]
    return write_shards([source], roles, folder, 8, seed=0, near_distance=4)


def test_a_set_that_others_made_of_what_is_left_is_matched_by_bytes(tmp_path):
    """Other names, other order, some images gone, new ones, one that was forgotten back again under a new name."""
    images = {f"p{n}": jpeg(n) for n in range(40)}
    roles = {i: "forget" if n < 6 else "retain" if n < 30 else "holdout" for n, i in enumerate(images)}
    one = shards_of(tmp_path / "a", images, roles)
    one.save_request(tmp_path / "one")
    chain_after(one, Chain.new(), original="a", unlearned="b").save(tmp_path / "one")
    new = {f"x/{39 - n}": jpeg(39 - n) for n in range(34)} | {"x/new": jpeg(99), "x/back": jpeg(2)}
    other = shards_of(tmp_path / "b", new, dict.fromkeys(new, "retain"))
    found = next_request(DataConfig(forget=3, near_distance=4), 0, other, tmp_path / "one")
    assert found.ids("forgotten") == ["x/back"] and found.ids("unused") == ["x/new"]
    assert set(found.ids("holdout")) == {f"x/{n}" for n in range(30, 40)}
    assert set(found.ids(("retain", "forget"))) == {f"x/{n}" for n in range(6, 30)}
    facts = found.facts["previous"]
    assert (facts["forgotten"], facts["present"], facts["new_images"]) == (6, 1, 1)
    again = shards_of(tmp_path / "c", {**new, "p0": jpeg(7, 44)}, dict.fromkeys([*new, "p0"], "retain"))
    with pytest.raises(DataError, match="'p0'.* under other bytes, and now they are members again"):
        leave_out(again, again.columns.role, Chain.load(tmp_path / "one"), None)


def blocks(seed: int, side: int, quality: int) -> bytes:
    """16 x 16 squares, as a JPEG: something with detail, which a hash holds on to."""
    squares = np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(squares).resize((side, side), Image.Resampling.NEAREST).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_near_copies_of_what_was_forgotten_are_counted(tmp_path):
    images = {f"p{n}": blocks(n, 160, 95) for n in range(12)}
    one = shards_of(tmp_path / "a", images, {i: "forget" if n < 3 else "retain" for n, i in enumerate(images)})
    chain = chain_after(one, Chain.new(), original="a", unlearned="b")
    copies = {**{f"c{n}": blocks(n, 128, 70) for n in range(3)}, "q": blocks(500, 160, 95)}
    other = shards_of(tmp_path / "b", copies, dict.fromkeys(copies, "retain"))
    role, facts = leave_out(other, other.columns.role, chain, 4)
    assert facts["near_copies_among_members"] == 3 and (role == other.columns.role).all()
    assert leave_out(other, other.columns.role, chain, None)[1]["near_copies_among_members"] == 0


def test_who_comes_without_the_run_before_names_what_to_leave_out(first, tmp_path):
    """By a list, when shards are made, and by a chain, when they are there."""
    shards = tmp_path / "shards"
    gone = Manifest.load(shards, run=first).ids("forget")
    control = draw_request(SMALL, 0, Manifest.load(shards))
    assert set(gone) <= set(control.ids("forget"))
    chained = draw_request(replace(SMALL, forget=11, exclude=str(first / "chain.json")), 0, Manifest.load(shards))
    assert set(chained.ids("forgotten")) == set(gone) and len(chained.ids(("retain", "forget"))) == 30
    assert chained.facts["excluded_chain"]["present"] == 10
    cfg = replace(SMALL, exclude=listed(tmp_path, [*gone, "digits/nobody"]))
    made = prepare_shards(cfg, 0, tmp_path / "new")
    assert not set(gone) & set(made.by_id) and len(made.ids(("retain", "forget"))) == 40
    assert made.facts["excluded"] == 10


def test_a_damaged_chain_is_refused(first):
    sound = (first / "chain.json").read_text()
    for change in ("{", sound.replace('"version":1', '"version":2'), sound.replace("[1,", "[2,"), "[]", sound[:-9]):
        (first / "chain.json").write_text(change)
        with pytest.raises(DataError, match="damaged"):
            Chain.load(first)
    (first / "chain.json").write_text(sound)
    Chain.load(first)
    (first / "chain.key").write_bytes(bytes(31))
    with pytest.raises(DataError, match="damaged"):
        Chain.load(first)
    (first / "chain.key").unlink()
    with pytest.raises(DataError, match=r"chain\.key cannot be read"):
        Chain.load(first)
