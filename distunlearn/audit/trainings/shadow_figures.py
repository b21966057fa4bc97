"""What a pool of shadow encoders says of a method: U-LiRA, KLoM and the epsilon score. Reported, never judged.

    m_ik = ln c / (1 - c)     margin of image i in shadow k; c: confidence of the bank softmax, so that m is the
                              alignment of two views less the log-sum-exp of the similarities to a fixed bank

It takes the place of a classifier's label margin. Formulas, over images i with margins U_i (where it was unlearned) and
O_i (where it was never seen), in different shadows:

* U-LiRA (Hayes et al., arXiv 2403.01218, after Carlini et al. 2022): ln N(m; mean U_i, s) - ln N(m; mean O_i, s), m
  left out of its own mean, one s for all, for so few shadows; AUC of telling unlearned from never seen, 0.5: cannot.
* KLoM (Georgiev et al., "Attribute-to-Delete", arXiv 2410.23232, E.1): KL(histogram of U_i | histogram of O_i), 20 bins
  over the joint range, margins clipped to +-100, 1e-5 added to every bin.
* epsilon (NeurIPS 2023 unlearning competition, Triantafillou et al., arXiv 2406.09073): the largest
  max(ln(1 - d - FPR) - ln FNR, ln(1 - d - FNR) - ln FPR), d = 1e-5, over single and double thresholds; score: mean of
  2^-bucket with buckets of width 0.5. With n shadows of each kind no finite epsilon exceeds about ln(n): `ceiling`.

With few shadows chance alone separates some images. So every figure comes with the same figure after the two kinds were
shuffled image by image (`chance`), and with IN in place of UNLEARNED (`nothing_forgotten`): the ends of its scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from distunlearn.audit.signals.collect import AUDIT_EPOCH, audit_bank, usable_labels
from distunlearn.common.random import STREAMS
from distunlearn.config.schema import RunConfig
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.views.colour import plain_view
from distunlearn.objectives.forward import EncoderView
from distunlearn.verify.statistics import Comparison, auc, percentile_interval

IN, OUT, UNLEARNED = 0, 1, 2
BINS, CLIP, ADDED = 20, 100.0, 1e-5
DELTA, EPSILON_CAP, BUCKET = 1e-5, 50.0, 0.5
SHUFFLES = 20
DRAWS = 500
CHUNK = 256


@torch.no_grad()
def margins(encoder: EncoderView, store: ImageStore, manifest: Manifest, ids: Sequence[str], count: int) -> np.ndarray:
    """m_i of the images, [n]: mean over disjoint pairs of `count` views."""
    bank, found = audit_bank(encoder, store, manifest), []
    for start in range(0, len(ids), CHUNK):
        chosen = ids[start : start + CHUNK]
        plain = plain_view(store.plain(chosen).to(encoder.device))
        labels = usable_labels(encoder, plain, manifest.labels(chosen))
        views = encoder.views(chosen, store.cut, AUDIT_EPOCH, count)
        per_pair = []
        for first in range(0, len(views) - 1, 2):
            c = encoder.objective.confidence(encoder.branches(views[first : first + 2], chosen, labels), bank).double()
            per_pair.append(torch.logit(c, eps=1e-12))
        found.append(torch.stack(per_pair).mean(0).cpu().numpy())
    return np.concatenate(found)


def pooled_figures(found: np.ndarray, parts: np.ndarray, cfg: RunConfig) -> dict[str, Any]:
    """All figures with their two ends and 95 % intervals over images.

    found: margins [shadows, images]. parts: IN, OUT or UNLEARNED of the same shape.
    """
    generator = np.random.default_rng([cfg.seed, STREAMS["shadow chance"]])
    result: dict[str, Any] = {
        "shadows": int(found.shape[0]),
        "images": int(found.shape[1]),
        "epsilon_ceiling": epsilon_ceiling(parts),
    }
    kinds: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {"u_lira_auc": u_lira, "klom": klom, "epsilon": epsilon}
    shuffled = [_shuffled(parts, generator) for _ in range(SHUFFLES)]
    kept = np.where(parts == IN, UNLEARNED, np.where(parts == OUT, OUT, -1))
    for name, figure in kinds.items():
        value, low, high = _with_interval(figure, found, parts, generator)
        chance = [_value(figure(found, other)) for other in shuffled]
        result[name] = {
            "value": value,
            "low": low,
            "high": high,
            "chance": float(np.mean(chance)),
            "chance_low": float(np.quantile(chance, 0.025)),
            "chance_high": float(np.quantile(chance, 0.975)),
            "nothing_forgotten": _value(figure(found, kept)),
        }
    buckets = 2.0 ** -np.floor(epsilon(found, parts) / BUCKET)
    result["epsilon"]["score"] = float(buckets.mean())
    return result


def u_lira(found: np.ndarray, parts: np.ndarray) -> Comparison:
    """Leave-one-out log likelihood ratios: of UNLEARNED shadows (positives) against OUT ones, over all images."""
    sides = {part: parts == part for part in (UNLEARNED, OUT)}
    total = {part: np.where(mask, found, 0).sum(0) for part, mask in sides.items()}
    count = {part: mask.sum(0) for part, mask in sides.items()}
    mean = {part: total[part] / np.maximum(count[part], 1) for part in sides}
    residuals = np.concatenate([(found - mean[part])[mask] for part, mask in sides.items()])
    freedom = sum(int(np.maximum(count[part] - 1, 0).sum()) for part in sides)
    variance = max(float((residuals**2).sum()) / max(freedom, 1), 1e-12)
    ratios = {}
    for own in sides:
        left_out = {
            part: (total[part] - found) / np.maximum(count[part] - 1, 1) if part == own else mean[part]
            for part in sides
        }
        ratio = ((found - left_out[OUT]) ** 2 - (found - left_out[UNLEARNED]) ** 2) / (2 * variance)
        ratios[own] = ratio[sides[own]]
    return Comparison.of(ratios[UNLEARNED], ratios[OUT])


def klom(found: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """KL(U_i | O_i) of every image in nats, [images], >= 0."""
    clipped, values = np.clip(found, -CLIP, CLIP), []
    for column, part in zip(clipped.T, parts.T, strict=True):
        first, second = column[part == UNLEARNED], column[part == OUT]
        ends = (min(first.min(), second.min()), max(first.max(), second.max()))
        edges = np.linspace(*ends, BINS + 1) if ends[1] > ends[0] else np.array([ends[0] - 0.5, ends[0] + 0.5])
        p, q = (np.histogram(side, edges)[0] / len(side) + ADDED for side in (first, second))
        p, q = p / p.sum(), q / q.sum()
        values.append(float((p * np.log(p / q)).sum()))
    return np.array(values)


def epsilon(found: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """epsilon_i of every image, [images], in [0, 50]; 50 where some threshold separates the two kinds wholly."""
    return np.array([
        _epsilon(column[part == UNLEARNED], column[part == OUT]) for column, part in zip(found.T, parts.T, strict=True)
    ])  # fmt: skip


def _epsilon(first: np.ndarray, second: np.ndarray) -> float:
    """Over regions above, below, inside and outside of thresholds half way between neighbouring margins."""
    if np.ptp(np.concatenate([first, second])) == 0:
        return 0.0
    if min(np.ptp(first), np.ptp(second)) < 0.01 * max(np.ptp(first), np.ptp(second)):
        return EPSILON_CAP  # one side is a point beside the other, which the competition counts as separated
    ordered = np.unique(np.concatenate([first, second]))
    cuts = np.concatenate([(ordered[1:] + ordered[:-1]) / 2, [np.inf]])
    above = np.stack([(side[:, None] > cuts).mean(0) for side in (first, second)])  # [2, cuts]
    inside = np.abs(above[:, :, None] - above[:, None, :]).reshape(2, -1)  # a single threshold: cut against infinity
    best = 0.0
    for accused in (inside, 1 - inside):
        false_negative, false_positive = 1 - accused[0], accused[1]
        if ((false_negative == 0) & (false_positive == 0)).any():
            return EPSILON_CAP
        usable = (false_negative > 0) & (false_positive > 0)  # one rate of exactly 0 says how few shadows there are
        fn, fp = false_negative[usable], false_positive[usable]
        for one, other in ((fp, fn), (fn, fp)):
            with np.errstate(divide="ignore", invalid="ignore"):
                found = np.log(1 - DELTA - one) - np.log(other)
            found = found[np.isfinite(found)]
            best = max(best, float(found.max())) if len(found) else best
    return min(best, EPSILON_CAP)


def epsilon_ceiling(parts: np.ndarray) -> float:
    """The largest finite epsilon that so many shadows of each kind allow: both rates at 1 / n."""
    n = min(int((parts == part).sum(0).min()) for part in (OUT, UNLEARNED))
    return math.log((1 - 1 / n) * n) if n > 1 else 0.0


def _value(figure: Any) -> float:
    return auc(figure) if isinstance(figure, Comparison) else float(np.mean(figure))


def _with_interval(
    figure: Callable, found: np.ndarray, parts: np.ndarray, generator: np.random.Generator
) -> tuple[float, float, float]:
    """The figure and its bootstrap interval over images."""
    whole = figure(found, parts)
    images = found.shape[1]
    if isinstance(whole, Comparison):
        draws = [generator.integers(0, images, images) for _ in range(DRAWS // 5)]
        sampled = np.array([_value(figure(found[:, rows], parts[:, rows])) for rows in draws])
    else:
        sampled = whole[generator.integers(0, images, (DRAWS, images))].mean(1)
    return (_value(whole), *percentile_interval(sampled, 0.95))


def _shuffled(parts: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """UNLEARNED and OUT exchanged at random within every image; IN stays."""
    result = parts.copy()
    for column in result.T:
        rows = np.flatnonzero(column != IN)
        column[rows] = generator.permutation(column[rows])
    return result
