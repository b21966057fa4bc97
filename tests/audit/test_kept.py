"""Kept signals count for the very weights and settings they were made with, and for nothing else."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
from synthetic import make_signals

from distunlearn.audit.signals.cache import keep_signals, kept_signals, signals_key
from distunlearn.audit.signals.collect import Signals
from distunlearn.config.schema import AuditConfig, RunConfig, RuntimeConfig
from distunlearn.data.manifest.manifest import Manifest


def test_what_is_kept_comes_back_and_only_for_its_key(tmp_path):
    signals, path = make_signals(0.5), tmp_path / "audit" / "signals-original.npz"
    assert kept_signals(path, "k") is None
    keep_signals(path, signals, "k")
    found = kept_signals(path, "k")
    for f in fields(Signals):
        np.testing.assert_array_equal(getattr(found, f.name), getattr(signals, f.name))
    assert isinstance(found.ids, list) and isinstance(found.ids[0], str)
    assert kept_signals(path, "other") is None
    path.write_bytes(path.read_bytes()[:2000])
    assert kept_signals(path, "k") is None


def test_key_depends_on_all_that_decides_the_signals():
    cfg, manifest = RunConfig(), Manifest(".", [], {})
    key = signals_key(cfg, manifest, "w")
    assert key == signals_key(replace(cfg, runtime=RuntimeConfig(reuse="somewhere", threads=3)), manifest, "w")
    audits = (AuditConfig(views=4), AuditConfig(part_crops=2), AuditConfig(precision="bf16"))
    others = [replace(cfg, seed=1), *(replace(cfg, audit=audit) for audit in audits)]
    others.append(replace(cfg, views=replace(cfg.views, flip=0.5)))
    keys = [signals_key(other, manifest, "w") for other in others] + [signals_key(cfg, manifest, "v")]
    assert key not in keys and len(set(keys)) == len(keys)
