"""No method ever sees an image that audits keep for themselves: every image that a store hands out is recorded."""

from __future__ import annotations

import pytest
import tiny
from parts import METHODS, TRAINED

from distunlearn.config.load import load_config
from distunlearn.data.loading.dataset import ImageDataset
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.run import pipeline

SMALLEST = [
    *tiny.TINY, "pretrain.epochs=1", "encoder.image_size=16", "encoder.embed_dim=16",
    "encoder.args={stem_width: 4, channels: [4, 8, 8, 16], layers: [1, 1, 1, 1]}", "audit.relearn_steps=1",
    "objective.hidden_dim=16", "objective.output_dim=8", "audit.tier=0",
]  # fmt: skip


def config(*extra: str):
    return load_config("digits", None, [*SMALLEST, *extra], world=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("untouched") / "base"
    cfg = config("method.name=none")
    pipeline.prepare(cfg, out)
    pipeline.pretrain(cfg, out)
    return out


@pytest.fixture
def shown(monkeypatch):
    """Ids of all images that are read."""
    seen: set[str] = set()

    original = ImageDataset.fill

    def recorded(self, wanted, out):
        seen.update(i for part in wanted for i in part.ids)
        return original(self, wanted, out)

    monkeypatch.setattr(ImageDataset, "fill", recorded)
    return seen


@pytest.mark.parametrize("method", TRAINED)
def test_no_method_sees_what_audits_keep_for_themselves(method, base, shown, tmp_path):
    cfg = config(f"method.name={method}", f"runtime.reuse={base}")
    pipeline.unlearn(cfg, tmp_path / "run")
    manifest = Manifest.of_run(base)
    kept = set(manifest.ids(("holdout", "third_party_audit")))
    assert shown and not shown & kept
    assert not shown & set(manifest.ids("forget")) or METHODS[method].forgets


def test_the_recorder_would_notice(base, shown, tmp_path):
    """Negative control: an audit does look at them."""
    cfg = config("method.name=none", f"runtime.reuse={base}")
    pipeline.unlearn(cfg, tmp_path / "run")
    pipeline.audit(tmp_path / "run", cfg)
    manifest = Manifest.of_run(base)
    assert set(manifest.ids(("holdout", "third_party_audit"))) <= shown
