"""What the benchmark of requests in turn says of an encoder is what the audit says of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from sklearn.metrics import roc_auc_score

from distunlearn.data.manifest.manifest import Manifest
from distunlearn.engine.run_directory import saved_config
from distunlearn.verify.chain import Chain

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from requests_in_turn import agreements, of_requests  # noqa: E402


def test_an_encoder_is_looked_at_as_the_audit_looks(finished_run):
    run, _ = finished_run("digits")
    cfg, kept = saved_config(run, world=1), Manifest.of_run(run)
    named, holdout = of_requests(kept, Chain.load(run)), kept.ids("holdout")
    assert {1: sorted(kept.ids("forget"))} == {number: sorted(ids) for number, ids in named.items()}
    judged = json.loads((run / "audit/summary.json").read_text())["attacks"]["view_agreement"]
    for encoder, folder in (("original", run / "original"), ("unlearned", run), ("retrained", run / "retrained")):
        known = agreements(folder, cfg, kept, [*named[1], *holdout])
        found = roc_auc_score([1] * len(named[1]) + [0] * len(holdout), [known[i] for i in [*named[1], *holdout]])
        assert found == pytest.approx(judged[encoder]["auc"], abs=2e-3), encoder  # a pair or two, by rounding
