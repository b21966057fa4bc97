"""Relearning attack: whatever was only hidden comes back faster than what was never known.

The attacker trains the encoder on candidates, forgotten and as many held-out images alike, by the bank loss, and
measures how far the views of each image agree after some steps. Without a trace both kinds are learned at one pace.

    steps to relearn = first measured step at which the forgotten images agree as they did in the original encoder
    score_i = mean over the measured steps after the start of the view agreement of image i

Source: relearn time, Tarun et al., "Fast Yet Effective Machine Unlearning", TNNLS 2023 (arXiv 2111.08947); candidates
of both kinds and per-image scores are ours. Training is that of an attacker, in evaluation mode, on a copy; no encoder
of the run is touched.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distunlearn.audit.signals.collect import audit_bank, sampled, usable_labels
from distunlearn.common.progress import progress_of
from distunlearn.common.random import STREAMS, VIEW_EPOCHS
from distunlearn.config.schema import RunConfig
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.views.colour import plain_view
from distunlearn.data.views.crops import Cut
from distunlearn.objectives.forward import EncoderView
from distunlearn.objectives.memory_bank import normalise
from distunlearn.verify.statistics import Comparison, auc, auc_bootstrap, draw_images, percentile_interval

CANDIDATES = 256  # of each kind
BATCH = 32  # of each kind
MEASURED_EPOCH, TRAINED_EPOCH = (VIEW_EPOCHS[f"relearning, {kind}"][0] for kind in ("measured", "trained"))


@dataclass(frozen=True, eq=False)
class Relearned:
    """Steps [k] at which was measured, and the view agreement [k, n] of forget and [k, m] of holdout images."""

    steps: tuple[int, ...]
    forget: np.ndarray
    holdout: np.ndarray

    def comparison(self) -> Comparison:
        """score_i of the module's text; where only the start was measured, the agreement there."""
        first = 1 if len(self.steps) > 1 else 0
        return Comparison.of(self.forget[first:].mean(0), self.holdout[first:].mean(0))


def relearn(encoder: EncoderView, store: ImageStore, manifest: Manifest, cfg: RunConfig, steps: int) -> Relearned:
    """Train a copy of the encoder for `steps` steps, measured at 0, 1, 2, 4 ... and the last; 0: measure only."""
    count = min(CANDIDATES, len(manifest.ids("forget")), len(manifest.ids("holdout")))
    holdout = store.decodable(sampled(manifest.ids("holdout"), count, cfg.seed + 2))
    count = len(holdout)
    forget = sampled(manifest.ids("forget"), count, cfg.seed + 2)
    ids = [*forget, *holdout]
    bank = audit_bank(encoder, store, manifest)
    labels = usable_labels(encoder, plain_view(store.plain(ids).to(encoder.device)), manifest.labels(ids))
    encoder = dataclasses.replace(encoder, model=copy.deepcopy(encoder.model).requires_grad_(True))
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=cfg.unlearn.lr, weight_decay=cfg.unlearn.weight_decay)
    moments = sorted({0, steps, *(1 << k for k in range(steps.bit_length()) if 1 << k < steps)})
    found = []
    with progress_of("relearning") as show:
        for step in range(steps + 1):
            if step in moments:
                found.append(_agreement(encoder, ids, store.cut))
            if step == steps:
                break
            rows = _rows(step, count, cfg.seed)
            chosen = [ids[i] for i in rows]
            with torch.enable_grad():
                pair = encoder.views(chosen, store.cut, TRAINED_EPOCH + step, 2)
                loss = encoder.objective.per_sample_loss(encoder.branches(pair, chosen, labels[rows]), bank).mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            show(step + 1, steps)
    agreement = np.stack(found)
    return Relearned(tuple(moments), agreement[:, :count], agreement[:, count:])


def _rows(step: int, count: int, seed: int) -> np.ndarray:
    """Rows of one batch: as many forgotten as held-out candidates, in rounds over all of them."""
    size = min(BATCH, count)
    per_round = -(-count // size)
    order = np.random.default_rng([seed, STREAMS["relearning order"], step // per_round]).permutation(count)
    chosen = np.resize(order, per_round * size)[(step % per_round) * size :][:size]
    return np.concatenate([chosen, count + chosen])


@torch.no_grad()
def _agreement(encoder: EncoderView, ids: list[str], cut: Cut) -> np.ndarray:
    """Cosine between the head's outputs for two views of every image, [n], for views that no training has."""
    found = []
    for start in range(0, len(ids), 256):
        views = encoder.views(ids[start : start + 256], cut, MEASURED_EPOCH, 2)
        first, second = (normalise(encoder.model(view).output) for view in views)
        found.append((first * second).sum(-1).double().cpu().numpy())
    return np.concatenate(found)


def relearning_figures(found: Mapping[str, Relearned], cfg: RunConfig) -> dict[str, Any]:
    """Curves by encoder, steps to relearn, and the AUC of score_i with its paired gap to the retrained encoder.

    found: at least `original`, of which the start is enough: its agreement there is the level to come back to.
    """
    level = float(found["original"].forget[0].mean())
    draws = draw_images(found["original"].forget.shape[1], found["original"].holdout.shape[1], 500, cfg.seed)
    result: dict[str, Any] = {"level": level, "images": int(found["original"].forget.shape[1])}
    drawn = {}
    for name, curve in found.items():
        means = curve.forget.mean(1)
        reached = [step for step, mean in zip(curve.steps, means, strict=True) if mean >= level]
        drawn[name] = auc_bootstrap(curve.comparison(), draws)
        low, high = percentile_interval(drawn[name], 0.95)
        result[name] = {
            "steps": list(curve.steps),
            "forget": means.tolist(),
            "holdout": curve.holdout.mean(1).tolist(),
            "auc_at_step": [auc(Comparison.of(f, h)) for f, h in zip(curve.forget, curve.holdout, strict=True)],
            "auc": auc(curve.comparison()),
            "auc_low": low,
            "auc_high": high,
            "steps_to_relearn": reached[0] if reached else None,
        }
    if "unlearned" in found and "retrained" in found:
        low, high = percentile_interval(drawn["unlearned"] - drawn["retrained"], cfg.audit.gates.confidence)
        value = result["unlearned"]["auc"] - result["retrained"]["auc"]
        result["gap"] = {"auc": value, "low": low, "high": high}
    return result
