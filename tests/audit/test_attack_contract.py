"""What every attack keeps to: a new one in the table falls into these tests by itself."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from synthetic import make_signals
from test_attacks import NONE, STRONG, with_parts

from distunlearn.audit.attacks import attack
from distunlearn.config.registry import ATTACKS
from distunlearn.verify.statistics import auc

every_attack = pytest.mark.parametrize("name", ATTACKS)


def ask(name: str, shift: float, seed: int = 0, change=lambda signals: signals):
    """The attack's result on an encoder that knows its members by `shift`; a paired one compares with one that does
    not, as it is meant to."""
    known, other = with_parts(make_signals(shift, seed=1), shift), with_parts(make_signals(NONE, seed=3), NONE, seed=6)
    if ATTACKS[name].reference is None:
        return attack(name)(change(known), seed)
    pair = (other, known) if ATTACKS[name].reference == "original" else (known, other)
    return attack(name)(*map(change, pair), seed)


@every_attack
def test_it_scores_every_image_to_forget_and_every_held_out_one(name):
    found, signals = ask(name, STRONG), make_signals(STRONG, seed=1)
    forget, holdout = signals.of("forget"), signals.of("holdout")
    rows = np.concatenate([part.rows for part in found.comparison.parts])
    assert sorted(rows.tolist()) == list(range(len(holdout)))  # each held-out image once, over the parts
    for part in found.comparison.parts:
        assert part.positives.shape == (len(forget),) and part.negatives.shape == part.rows.shape
        assert np.isfinite(part.positives).all() and np.isfinite(part.negatives).all()
    assert found.shown.shape == (len(signals.ids),)


@every_attack
def test_it_is_a_function_of_its_arguments_and_finds_members_that_are_there(name):
    first, second = ask(name, STRONG), ask(name, STRONG)
    np.testing.assert_array_equal(first.shown, second.shown)
    assert auc(first.comparison) == auc(second.comparison) > 0.6


@every_attack
def test_images_of_other_roles_move_no_score(name):
    """Third-party images are controls: whatever they look like, forget and holdout are scored alike."""

    def other_strangers(signals):
        rows, changed = signals.of("third_party_audit"), {}
        for field in dataclasses.fields(signals):
            value = getattr(signals, field.name)
            if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
                changed[field.name] = value.copy()
                changed[field.name][rows] = value[rows[::-1]]
        return replace(signals, **changed)

    plain, moved = ask(name, STRONG), ask(name, STRONG, change=other_strangers)
    for one, other in zip(plain.comparison.parts, moved.comparison.parts, strict=True):
        np.testing.assert_allclose(one.positives, other.positives, rtol=1e-9)
        np.testing.assert_allclose(one.negatives, other.negatives, rtol=1e-9)


@every_attack
def test_it_says_in_a_line_what_it_does(name):
    text = attack(name).__doc__
    assert text and 10 < len(text.strip().splitlines()[0]) <= 120
