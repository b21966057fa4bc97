from __future__ import annotations

import collections

import pytest

from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.records import ROLES
from distunlearn.data.prepare.roles import assign_roles
from distunlearn.errors import ConfigError, DataError

SAMPLES = [(f"s/{i:03d}", i % 5) for i in range(100)]


def config(**changes):
    sizes = {
        "members": 40,
        "forget": 10,
        "holdout": 20,
        "calibration": 8,
        "third_party": 7,
        "third_party_audit": 5,
        "watch": 6,
    }
    return DataConfig(**{**sizes, **changes})


def counts(roles):
    return {role: sum(r == role for r in roles.values()) for role in ROLES}


def ids(roles, *names):
    return {i for i, role in roles.items() if role in names}


def listed(tmp_path, text, name="list.csv"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_counts_are_as_configured():
    expected = {
        "retain": 30,
        "forget": 10,
        "holdout": 20,
        "calibration": 8,
        "third_party": 7,
        "third_party_audit": 5,
        "watch": 6,
    }
    assert counts(assign_roles(SAMPLES, config(), 0)) == expected


def test_same_seed_same_roles_and_other_seed_other_roles():
    assert assign_roles(SAMPLES, config(), 3) == assign_roles(SAMPLES, config(), 3)
    assert assign_roles(SAMPLES, config(), 3) != assign_roles(SAMPLES, config(), 4)


def test_members_do_not_depend_on_what_is_forgotten():
    drawn = [assign_roles(SAMPLES, config(forget=forget), 1) for forget in (10, 3, 0.5, "class:2")]
    assert len({frozenset(ids(roles, "retain", "forget")) for roles in drawn}) == 1
    assert len({frozenset(ids(roles, "holdout")) for roles in drawn}) == 1


def test_members_zero_takes_all_that_is_left():
    assert counts(assign_roles(SAMPLES, config(members=None), 0))["retain"] == 100 - 46 - 10


def test_share_of_members():
    assert counts(assign_roles(SAMPLES, config(forget=0.25), 0))["forget"] == 10


def test_class_takes_all_members_of_it_and_nothing_else():
    roles = assign_roles(SAMPLES, config(forget="class:3"), 0)
    labels = dict(SAMPLES)
    members = ids(roles, "retain", "forget")
    assert ids(roles, "forget") == {i for i in members if labels[i] == 3} != set()


def test_listed_ids_become_members(tmp_path):
    path = listed(tmp_path, "id,role\ns/001,forget\ns/002,retain\ns/099,forget\n")
    roles = assign_roles(SAMPLES, config(forget=path), 0)
    assert ids(roles, "forget") == {"s/001", "s/099"} and roles["s/002"] == "retain"
    assert counts(roles)["retain"] == 38


def test_a_list_of_drawn_members_leaves_the_other_roles_alone(tmp_path):
    drawn = assign_roles(SAMPLES, config(), 5)
    path = listed(tmp_path, "id\n" + "\n".join(sorted(ids(drawn, "forget"))))
    assert assign_roles(SAMPLES, config(forget=path), 5) == drawn


def test_third_party_from_another_source():
    guests = [(f"g/{i}", None) for i in range(15)]
    roles = assign_roles(SAMPLES, config(third_party_source="digits"), 0, guests)
    assert ids(roles, "third_party", "third_party_audit") <= {i for i, _ in guests}
    assert counts(roles)["third_party"] == 7 and counts(roles)["third_party_audit"] == 5
    assert len(ids(roles, "retain", "forget", "holdout", "calibration") & {i for i, _ in SAMPLES}) == 68


def test_every_class_gets_members_over_seeds():
    seen = collections.Counter()
    for seed in range(200):
        seen.update(ids(assign_roles(SAMPLES, config(), seed), "retain", "forget"))
    assert min(seen.values()) > 40 and max(seen.values()) < 120 and len(seen) == 100


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"forget": 0}, DataError, "nothing to forget"),
        ({"forget": 0.001}, DataError, "nothing to forget"),
        ({"forget": -1}, ConfigError, "positive count"),
        ({"forget": 1.0}, ConfigError, "strictly between 0 and 1"),
        ({"forget": float("nan")}, ConfigError, "strictly between 0 and 1"),
        ({"forget": 40}, DataError, "at least 2 must be retained"),
        ({"forget": 39}, DataError, "at least 2 must be retained"),
        ({"forget": 41}, DataError, "only 40 members"),
        ({"forget": "class:9"}, DataError, "the classes 'class:0', 'class:1'"),
        ({"forget": "class:x"}, DataError, "nothing to forget"),
        ({"forget": "no/such/list.txt"}, DataError, "cannot be read"),
        ({"members": 61}, DataError, "100 images but 107 are needed"),
        ({"members": 0, "holdout": 90}, DataError, "100 images but"),
    ],
)
def test_impossible_requests_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        assign_roles(SAMPLES, config(**changes), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id\n", "nothing to forget"),
        ("id,role\ns/001,retain\n", "nothing to forget"),
        ("id\ns/001\nnope\nalso-nope\n", r"2 ids \('also-nope', 'nope'\) which the source does not have"),
        ("id,role\ns/001,forget\ns/001,retain\n", "1 id .'s/001'. both to forget and to retain"),
        ("id\n" + "\n".join(i for i, _ in SAMPLES[:41]), "lists 41 ids but data.members is 40"),
        ("id\n" + "\n".join(i for i, _ in SAMPLES[:40]), "at least 2 must be retained"),
    ],
)
def test_contradictory_lists_are_refused(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        assign_roles(SAMPLES, config(forget=listed(tmp_path, text)), 0)


def test_too_few_third_party_images_are_refused():
    with pytest.raises(DataError, match="has 11 images but 12 are needed"):
        assign_roles(SAMPLES, config(third_party_source="digits"), 0, [(f"g/{i}", None) for i in range(11)])


def test_class_without_labels_is_refused():
    with pytest.raises(DataError, match="no labels"):
        assign_roles([(i, None) for i, _ in SAMPLES], config(forget="class:1"), 0)
