"""What `audit.precision` costs, against the same look in float64; what is stated in docs/audit.md."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from distunlearn.audit.signals.collect import Signals, audit_bank, audited, encoder_view, looking, signals_of
from distunlearn.engine.run_directory import saved_config
from distunlearn.engine.session import load_trained, open_session

SIGNALS = ("embedding_cosines", "output_cosines", "bank_loss", "gradient_norm_head", "gradient_norm_network")
# Largest difference to float64, in standard deviations of the signal over the images.
BOUNDS = {"fp32": 1e-4, "tf32": 1e-4, "bf16": 0.3}


@pytest.fixture(scope="module")
def looks(finished_run) -> dict[str, Signals]:
    """The same images through one encoder, by precision."""
    out, _ = finished_run("digits")
    cfg = saved_config(out)
    found = {}
    with open_session(cfg, out) as session:
        encoder = encoder_view(session, load_trained(out / "original", session))
        chosen = audited(session.manifest, cfg.seed, session.store)[-96:]
        arguments = (chosen, session.store, session.manifest)
        for precision in ("fp32", "tf32", "bf16"):
            with looking(encoder, precision):
                bank = audit_bank(encoder, session.store, session.manifest)
                audit = dataclasses.replace(cfg.audit, precision=precision)
                found[precision] = signals_of(encoder, audit, *arguments, bank)
        model, momentum = encoder.model.double(), None if encoder.momentum is None else encoder.momentum.double()
        plain = model.forward
        model.forward = lambda images: plain(images.double())
        exact = dataclasses.replace(encoder, model=model, momentum=momentum)
        with torch.no_grad():
            bank = audit_bank(exact, session.store, session.manifest)
        found["exact"] = signals_of(exact, cfg.audit, *arguments, bank)
    return found


@pytest.mark.parametrize("precision", BOUNDS)
def test_the_difference_to_float64_is_within_what_is_stated(looks, precision):
    for name in SIGNALS:
        exact, found = getattr(looks["exact"], name), getattr(looks[precision], name)
        spread = np.nanstd(exact, axis=0)
        difference = np.nanmax(np.abs(found - exact) / spread)
        print(f"{precision} {name}: {difference:.2g} standard deviations")
        assert difference < BOUNDS[precision], name


def test_control_bf16_is_another_precision(looks):
    assert max(np.nanmax(np.abs(getattr(looks["bf16"], n) - getattr(looks["fp32"], n))) for n in SIGNALS) > 1e-4


def test_what_is_set_is_set_back(finished_run):
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    out, _ = finished_run("digits")
    with open_session(saved_config(out), out) as session:
        encoder = encoder_view(session, load_trained(out / "original", session))
        for precision, allowed in (("fp32", False), ("tf32", True), ("bf16", True)):
            with looking(encoder, precision):
                assert [place.allow_tf32 for place in places] == [allowed] * 2
            assert [place.allow_tf32 for place in places] == before
