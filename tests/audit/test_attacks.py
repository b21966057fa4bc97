"""The further attacks against brute force, on signals with a known answer, and where there is nothing to find."""

from __future__ import annotations

import inspect
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from synthetic import make_signals

from distunlearn.audit.attacks import attack, run_attacks
from distunlearn.audit.attacks.base import crosswise_attack, fitted_log_odds
from distunlearn.audit.attacks.embedding_norm import embedding_norm
from distunlearn.audit.attacks.encodermi import (
    BUMPS,
    encodermi_set,
    encodermi_threshold,
    encodermi_vector,
    pooled_bumps,
)
from distunlearn.audit.attacks.lira import alignment_likelihood
from distunlearn.audit.attacks.rmia import A, rmia
from distunlearn.config.registry import ATTACKS
from distunlearn.verify.figures import JUDGED
from distunlearn.verify.statistics import auc, auc_bootstrap, draw_images, percentile_interval

STRONG, NONE = 1.2, 0.0


def with_parts(signals, shift: float, seed: int = 5):
    """Responses to crops and lengths of embeddings that tell members by `shift` standard deviations."""
    known = np.isin(signals.roles, ["retain", "forget"]) * shift
    noise = np.random.default_rng(seed)
    responses = known[:, None] * 0.5 + noise.normal(size=(len(known), 12))
    directions = noise.normal(size=(len(known), 8))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    lengths = np.exp(0.1 * (known + noise.normal(size=len(known))))
    return replace(signals, part_responses=responses, embedding=directions * lengths[:, None])


def three(shift: float):
    """An encoder that knows its members by `shift`, and one that knows none, of the same images."""
    first = with_parts(make_signals(shift, seed=1), shift)
    return {"original": first, "unlearned": first, "retrained": with_parts(make_signals(NONE, seed=3), NONE, seed=6)}


def test_the_table_names_functions_and_what_they_compare_with():
    assert list(JUDGED) == [
        "view_agreement", "encodermi_vector", "bank_loss", "gradient_norm_network", "gradient_norm_head"
    ]  # fmt: skip
    for name in ATTACKS:
        taken = list(inspect.signature(attack(name)).parameters)
        assert len(taken) == 2 + bool(ATTACKS[name].reference) and taken[-1] == "seed", name


def test_every_attack_finds_members_that_are_there():
    found = run_attacks(three(STRONG), seed=0)
    assert set(found) == set(ATTACKS)
    for name, attacked in found.items():
        encoder = "retrained" if name == "alignment_gap" else "unlearned"
        assert auc(attacked[encoder].comparison) > 0.6, name


def test_no_attack_finds_members_where_roles_are_dealt_at_random():
    """Null: one kind of image, dealt to the roles by lot. 99 % intervals of 13 attacks, over three deals."""
    missed = []
    for deal in range(3):
        signals = three(NONE)
        roles = np.random.default_rng(deal).permutation(signals["original"].roles)
        signals = {name: replace(s, roles=roles) for name, s in signals.items()}
        draws = draw_images(60, 140, 400, deal)
        for name, attacked in run_attacks(signals, seed=deal).items():
            low, high = percentile_interval(auc_bootstrap(attacked["unlearned"].comparison, draws), 0.99)
            if not low <= 0.5 <= high:
                missed.append((deal, name))
    assert len(missed) <= 1, missed


def test_attacks_are_blind_to_which_encoder_is_which():
    """Names dealt anew deal the results anew, where an attack looks at one encoder alone."""
    signals = three(STRONG) | {"unlearned": with_parts(make_signals(0.4, seed=8), 0.4, seed=9)}
    turned = {"original": "unlearned", "unlearned": "retrained", "retrained": "original"}
    found, other = run_attacks(signals, 0), run_attacks({turned[name]: s for name, s in signals.items()}, 0)
    for name in [name for name in ATTACKS if not ATTACKS[name].reference]:
        for encoder in signals:
            np.testing.assert_array_equal(found[name][encoder].shown, other[name][turned[encoder]].shown)
            assert auc(found[name][encoder].comparison) == auc(other[name][turned[encoder]].comparison)


def test_part_crop_is_left_out_without_crops_and_paired_attacks_without_their_reference():
    signals = {"original": make_signals(STRONG, seed=1), "unlearned": make_signals(NONE, seed=2)}
    assert set(run_attacks(signals, 0)) == set(ATTACKS) - {"part_crop", "rmia", "lira_alignment"}


def test_set_form_does_not_depend_on_the_order_of_similarities():
    signals = make_signals(STRONG, seed=1)
    shuffled = np.random.default_rng(0).permuted(signals.embedding_cosines, axis=1)
    other = replace(signals, embedding_cosines=shuffled)
    assert auc(encodermi_set(signals, 0).comparison) == pytest.approx(auc(encodermi_set(other, 0).comparison))


def test_vector_form_is_fitted_on_sorted_similarities():
    """A view has no number: the same similarities in another order of each image give the same scores."""
    signals = make_signals(STRONG, seed=1)
    shuffled = np.random.default_rng(0).permuted(signals.embedding_cosines, axis=1)
    assert not np.array_equal(shuffled, signals.embedding_cosines)
    found, other = (encodermi_vector(replace(signals, embedding_cosines=c), 0)
                    for c in (signals.embedding_cosines, shuffled))  # fmt: skip
    np.testing.assert_allclose(found.shown, other.shown, rtol=1e-9, equal_nan=True)


def test_vector_form_is_not_fitted_to_the_noise_of_its_many_similarities():
    """190 similarities of 20 uneven views: the classifier knows what their mean knows, and a loose one less."""
    sizes = {"retain": 300, "forget": 150, "third_party_audit": 10, "holdout": 400}
    first, second = np.triu_indices(20, 1)
    found, mean, loose = [], [], []
    for seed in range(3):
        signals = make_signals(0.6, seed=seed, sizes=sizes)
        level = signals.embedding_cosines.mean(1, keepdims=True)
        views = 0.1 * np.random.default_rng(seed).normal(size=(len(level), 20))
        wide = replace(signals, embedding_cosines=level + views[:, first] + views[:, second])
        found.append(auc(encodermi_vector(wide, seed).comparison))
        mean.append(auc(encodermi_threshold(wide, seed).comparison))
        scores = fitted_log_odds(np.sort(wide.embedding_cosines, axis=1), 0.1)
        loose.append(auc(crosswise_attack(wide, scores, seed).comparison))
    assert np.mean(found) > np.mean(mean) - 0.01
    assert np.mean(loose) < np.mean(found) - 0.005  # the control


def test_bumps_are_those_of_the_formula():
    cosines = np.random.default_rng(0).normal(size=(7, 5))
    centres = np.quantile(cosines, [(k + 0.5) / BUMPS for k in range(BUMPS)])
    width = (centres[-1] - centres[0]) / (BUMPS - 1)
    expected = [[np.mean([np.exp(-((s - c) ** 2) / (2 * width**2)) for s in row]) for c in centres] for row in cosines]
    np.testing.assert_allclose(pooled_bumps(cosines), expected, rtol=1e-12)


def test_rmia_counts_the_strangers_that_are_beaten():
    signals = three(STRONG)
    found = rmia(signals["original"], signals["retrained"], seed=0)
    c, r = signals["original"].confidence, signals["retrained"].confidence
    p = [ci / (((1 + A) * ri + (1 - A)) / 2) for ci, ri in zip(c, r, strict=True)]
    holdout, forget = signals["original"].of("holdout"), signals["original"].of("forget")
    for part in found.comparison.parts:
        strangers = np.delete(holdout, part.rows)
        expected = [np.mean([p[i] > p[z] for z in strangers]) for i in forget]
        np.testing.assert_allclose(part.positives, expected, atol=1e-12)


def test_rmia_beats_nobody_by_a_tie():
    """Saturated confidences of 1.0 are ties: the formula asks for more than the stranger's ratio."""
    signals = three(STRONG)
    one = {name: replace(s, confidence=np.ones(len(s.ids))) for name, s in signals.items()}
    found = rmia(one["original"], one["retrained"], seed=0)
    for part in found.comparison.parts:
        assert not part.positives.any() and not part.negatives.any()
    assert auc(found.comparison) == 0.5


def test_rmia_gains_from_its_reference():
    """Negative control: with a reference that is a constant, hard images drown the signal."""
    signals = three(0.6)
    constant = replace(signals["retrained"], confidence=np.full(len(signals["retrained"].ids), 0.5))
    with_it, without = (auc(rmia(signals["original"], ref, 0).comparison) for ref in (signals["retrained"], constant))
    assert with_it > without + 0.03


def test_alignment_likelihood_by_hand():
    signals, one, two = make_signals(STRONG, seed=1), make_signals(NONE, seed=2), make_signals(NONE, seed=3)
    a, b, c = (np.arctanh(s.output_cosines.mean(1)) for s in (signals, one, two))
    rows = signals.of("holdout")
    np.testing.assert_allclose(alignment_likelihood(signals, [one]), (a - b) / b[rows].std(), rtol=1e-9)
    pooled = np.sqrt(np.mean([np.var([x, y], ddof=1) for x, y in zip(b, c, strict=True)]))
    np.testing.assert_allclose(alignment_likelihood(signals, [one, two]), (a - (b + c) / 2) / pooled, rtol=1e-9)


def test_an_encoder_compared_with_itself_gives_nothing_away():
    signals = three(STRONG)
    found = run_attacks(signals, 0)
    assert auc(found["alignment_gap"]["original"].comparison) == 0.5
    assert auc(found["lira_alignment"]["retrained"].comparison) == 0.5
    assert abs(auc(found["rmia"]["retrained"].comparison) - 0.5) < 0.1


def test_embedding_norm_is_the_likelihood_ratio_of_two_gaussians():
    signals = with_parts(make_signals(STRONG, seed=1), STRONG)
    found = embedding_norm(signals, 0)
    lengths = np.log(np.linalg.norm(signals.embedding, axis=1) + 1e-12)
    part = found.comparison.parts[0]
    known = lengths[signals.of("retain")]
    unknown = lengths[np.delete(signals.of("holdout"), part.rows)]
    expected = stats.norm(known.mean(), known.std()).logpdf(lengths) - stats.norm(unknown.mean(), unknown.std()).logpdf(
        lengths
    )
    np.testing.assert_allclose(part.positives, expected[signals.of("forget")], rtol=1e-6)


def test_fitted_rows_are_never_scored():
    """Negative control of the crosswise fit: a classifier with more features than images separates its own rows."""
    signals = with_parts(make_signals(NONE, seed=1), NONE)
    wide = np.random.default_rng(0).normal(size=(len(signals.ids), 400)).astype(np.float32)
    found = attack("part_crop")(replace(signals, part_responses=wide), 0)
    assert 0.35 < auc(found.comparison) < 0.65
    for part in found.comparison.parts:
        assert len(part.rows) == 70 and len(part.positives) == 60
