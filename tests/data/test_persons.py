"""Persons as units: a request names them, roles are dealt to whole persons, and counts equal those of brute force."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from pictures import jpeg

from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.records import ROLES
from distunlearn.data.prepare.draw import open_and_draw
from distunlearn.data.prepare.selection import check_selection, draw_request
from distunlearn.data.prepare.write_shards import prepare_shards
from distunlearn.errors import DataError

PERSONS, EACH = 40, 6
ASKED = ("anna", "person 07", "zo\u00eb")
NAMES = {0: "anna", 7: "person 07", 39: "zo\u00eb"}
MEMBERS = ("retain", "forget")


def who(number: int) -> str:
    return NAMES.get(number, f"person {number:02d}")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """(folder, {id: person}, configuration): six images of each of 40 persons, who lie in no folders of their own."""
    folder = tmp_path_factory.mktemp("persons")
    owner = {}
    for n in range(PERSONS * EACH):
        path = folder / "images" / f"c{n % 3}" / f"{n:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(n))
        owner[f"c{n % 3}/{n:04d}.jpg"] = who(n // EACH)
    rows = [f"{name},{sample_id}" for sample_id, name in owner.items()]
    (folder / "persons.csv").write_text("\n".join(["person,file", *rows]) + "\n")
    (folder / "request.txt").write_text("\n".join(ASKED) + "\n")
    cfg = DataConfig(
        source="imagefolder", root=str(folder / "images"), persons=str(folder / "persons.csv"), forget_by="person",
        forget=str(folder / "request.txt"), members=150, holdout=36, calibration=12, third_party=12,
        third_party_audit=12, watch=6,
    )  # fmt: skip
    return folder, owner, cfg


def by_role(roles, owner):
    return {role: {owner[i] for i, own in roles.items() if own == role} for role in ROLES}


@pytest.mark.parametrize("seed", range(4))
def test_roles_are_dealt_to_whole_persons(photos, seed):
    _, owner, cfg = photos
    drawn = open_and_draw(cfg, seed)[1]
    roles, found = drawn.roles, by_role(drawn.roles, owner)
    assert {i for i, role in roles.items() if role == "forget"} == {i for i, name in owner.items() if name in ASKED}
    assert list(roles.values()).count("retain") == 150 - 3 * EACH
    for one in ROLES:
        for other in ROLES[ROLES.index(one) + 1 :]:
            shared = found[one] & found[other]
            assert not shared or {one, other} == {"retain", "forget"} and not shared & set(ASKED)
    whole = Counter(owner.values())
    facts = drawn.facts["persons"]
    assert facts["requested"] == 3 and facts["images_of_requested_that_stay"] == 0
    assert facts["by_role"] == {role: len(names) for role, names in found.items() if names}
    asked = {"holdout": 36, "calibration": 12, "third_party": 12, "third_party_audit": 12, "watch": 6}
    lost = {role: count - list(roles.values()).count(role) for role, count in asked.items()}
    assert facts["dropped"] == {role: count for role, count in lost.items() if count}
    assert sum(lost.values()) < 6 * max(whole.values()), "no more than what lies on the borders"


def test_without_persons_the_same_request_would_share_them(photos):
    """The control: images dealt one by one put nearly everybody into several roles."""
    folder, owner, cfg = photos
    listed = folder / "ids.txt"
    listed.write_text("\n".join(i for i, name in owner.items() if name in ASKED))
    plain = dataclasses.replace(cfg, persons=None, forget_by="id", forget=str(listed))
    found = by_role(open_and_draw(plain, 0)[1].roles, owner)
    assert len(found["retain"] & found["holdout"]) > 10


def test_a_request_for_some_images_of_a_person_tells_what_stays(photos, tmp_path):
    _, owner, cfg = photos
    (tmp_path / "some.csv").write_text("id\nc0/0000.jpg\nc1/0001.jpg\n")
    drawn = open_and_draw(dataclasses.replace(cfg, forget=str(tmp_path / "some.csv"), forget_by="id"), 0)[1]
    stay = [i for i, role in drawn.roles.items() if role == "retain" and owner[i] == "anna"]
    assert drawn.facts["persons"]["images_of_requested_that_stay"] == len(stay)
    assert not [i for i, role in drawn.roles.items() if role not in MEMBERS and owner[i] == "anna"]
    assert drawn.facts["persons"]["requested"] == 1


def test_non_members_of_a_folder_of_their_own_are_strangers_by_person(photos, tmp_path):
    """Somebody who was asked for may be on an image that the encoder never saw: it is no holdout image."""
    folder, _, cfg = photos
    rows = (folder / "persons.csv").read_text().splitlines()
    for n in range(120):
        path = tmp_path / "never" / f"c{n % 3}" / f"n{n:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(9000 + n))
        rows.append(f"{'anna' if n < 4 else f'stranger {n // 4}'},holdout/c{n % 3}/n{n:03d}.jpg")
    (tmp_path / "all.csv").write_text("\n".join(rows) + "\n")
    cfg = dataclasses.replace(
        cfg, holdout_root=str(tmp_path / "never"), persons=str(tmp_path / "all.csv"), members=None, holdout=72
    )
    drawn = open_and_draw(cfg, 0, foreign=True)[1]
    assert not [i for i in drawn.roles if i.startswith("holdout/") and int(i[-7:-4]) < 4]
    assert sum(drawn.facts["persons"]["dropped"].values()) >= 1 or drawn.facts["persons"]["by_role"]["holdout"] == 18


def test_the_class_folder_can_be_the_person(photos):
    _, _, cfg = photos
    drawn = open_and_draw(
        dataclasses.replace(cfg, persons="class", forget=5, forget_by="id", members=70, holdout=40, calibration=4,
                            third_party=4, third_party_audit=4, watch=0), 0)[1]  # fmt: skip
    members = {i[:2] for i, role in drawn.roles.items() if role in MEMBERS}
    assert not members & {i[:2] for i, role in drawn.roles.items() if role not in MEMBERS}


def test_copies_are_counted_by_person_and_numbers_are_kept_without_names(photos, tmp_path):
    folder, owner, cfg = photos
    root = tmp_path / "images"
    for sample_id in owner:
        (root / sample_id).parent.mkdir(parents=True, exist_ok=True)
        (root / sample_id).write_bytes((folder / "images" / sample_id).read_bytes())
    copies = [0, 1, 7 * EACH]  # two images of anna, one of person 07, again among those of person 20 and 21
    for n, target in zip(copies, (20 * EACH, 20 * EACH + 1, 21 * EACH), strict=True):
        (root / f"c{target % 3}" / f"{target:04d}.jpg").write_bytes(jpeg(n))
    ids = [i for i in owner if owner[i] not in ASKED]
    rows = [f"{i},forget" for i in owner if owner[i] in ASKED] + [
        f"{i},retain" for i in ids if owner[i] in (who(20), who(21))
    ]
    (tmp_path / "list.csv").write_text("\n".join(["id,role", *rows]) + "\n")
    cfg = dataclasses.replace(cfg, root=str(root), forget=str(tmp_path / "list.csv"), forget_by="id", copies="keep")
    run = tmp_path / "run"
    made = prepare_shards(cfg, 0, run / "shards")
    request = draw_request(cfg, 0, Manifest.load(run / "shards"))
    request.save_request(run)
    found = Manifest.of_run(run)
    assert found.facts["persons"]["requested_with_copy_in_retain"] == 2 and found.facts["copies_in_retain"] == 3
    numbers = dict(zip(found.columns.ids, found.persons(list(found.columns.ids)).tolist(), strict=True))
    same = {(owner[i], number) for i, number in numbers.items()}
    assert len(same) == len({name for name, _ in same}) == len({number for _, number in same}), "a number a person"
    check_selection(cfg, 0, found)
    assert len(made) == len(found)
    kept = b"".join(
        path.read_bytes() for path in (*run.glob("*.json"), *run.glob("*.arrow"), *run.glob("shards/*.arrow"))
    )
    assert b"anna" not in kept and "zo\u00eb".encode() not in kept


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file,who\nc0/0000.jpg,anna\n", "0 columns named 'person'"),
        ("file,person\nc0/0000.jpg,anna\nc0/0000.jpg,bert\n", "line 3: 'c0/0000.jpg' is listed with two persons"),
        ("file,person\nc9/9999.jpg,anna\n", "no line has a person"),
    ],
)
def test_tables_of_persons_that_say_nothing_clear_are_refused(photos, tmp_path, table, message):
    _, _, cfg = photos
    (tmp_path / "p.csv").write_text(table)
    with pytest.raises(DataError, match=message):
        open_and_draw(dataclasses.replace(cfg, persons=str(tmp_path / "p.csv")), 0)


def test_a_person_whom_nobody_knows_is_refused(photos, tmp_path):
    _, _, cfg = photos
    (tmp_path / "request.txt").write_text("anna\nnobody\n")
    with pytest.raises(DataError, match="'nobody'"):
        open_and_draw(dataclasses.replace(cfg, forget=str(tmp_path / "request.txt")), 0)
