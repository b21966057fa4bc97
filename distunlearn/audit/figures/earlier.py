"""Are the images of earlier requests still forgotten? Each request on its own, by the attacks that need no fitting.

A later request trains on; what it brings back of an earlier one shows here. Images that were purged from the shards
cannot be looked at again. Reported, never judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distunlearn.audit.attacks.lira import alignment
from distunlearn.audit.signals.collect import Signals
from distunlearn.config.schema import RunConfig
from distunlearn.data.manifest.records import FORGOTTEN
from distunlearn.verify.statistics import Comparison, auc, auc_bootstrap, draw_images, percentile_interval


def earlier_figures(signals: Mapping[str, Signals], request_of: Mapping[str, int], cfg: RunConfig) -> dict[str, Any]:
    """{number of the request: {"images", attack: {encoder: AUC, "gap", "low", "high"}}}, text as keys.

    request_of: {id: number of the request that forgot it}. gap: AUC(unlearned) - AUC(retrained), with the gates'
    interval over images, which are paired; None without a retrained encoder.
    """
    first = signals["original"]
    holdout, forgotten = first.of("holdout"), first.of(FORGOTTEN)
    numbers = np.array([request_of[first.ids[row]] for row in forgotten.tolist()], dtype=np.int64)
    known = {encoder: (alignment(s), -s.bank_loss) for encoder, s in signals.items()}
    found: dict[str, Any] = {}
    for number in np.unique(numbers).tolist():
        rows = forgotten[numbers == number]
        figures: dict[str, Any] = {"images": len(rows)}
        draws = draw_images(len(rows), len(holdout), cfg.audit.bootstrap, cfg.seed)
        for column, name in enumerate(("view_agreement", "bank_loss")):
            compared = {e: Comparison.of(s[column][rows], s[column][holdout]) for e, s in known.items()}
            figures[name] = {encoder: auc(comparison) for encoder, comparison in compared.items()}
            figures[name] |= dict.fromkeys(("gap", "low", "high"))
            if "retrained" in compared:
                drawn = [auc_bootstrap(compared[encoder], draws) for encoder in ("unlearned", "retrained")]
                low, high = percentile_interval(drawn[0] - drawn[1], cfg.audit.gates.confidence)
                gap = figures[name]["unlearned"] - figures[name]["retrained"]
                figures[name] |= {"gap": gap, "low": low, "high": high}
        found[str(number)] = figures
    return found
