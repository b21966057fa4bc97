"""What `plan` says an audit shows to its encoders, against a count of what really goes through one."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from parts import objective_settings

from distunlearn.audit.signals import gradient_norms
from distunlearn.audit.signals.collect import AUDITED, collect_signals, encoder_view
from distunlearn.constraints.gradients.layers import followed_layers
from distunlearn.engine.run_directory import saved_config
from distunlearn.engine.session import open_session, scratch
from distunlearn.plan.audit_cost import audit_looks


@pytest.mark.parametrize("objective", ["simclr", "moco", "byol", "supervised"])
def test_the_passes_are_those_of_an_audit(finished_run, monkeypatch, objective):
    """Every image of every forward of both networks; `vmap` makes one forward of all images of the last kind."""
    out, _ = finished_run("digits")
    seen: Counter[str] = Counter()

    def plain_squares(model, weights, views, delta):
        seen["images"] += views.shape[0] * views.shape[1]
        return torch.ones(views.shape[1], dtype=torch.float64)

    monkeypatch.setattr(gradient_norms, "_plain_squares", plain_squares)
    with open_session(saved_config(out), out) as session:
        cfg = dataclasses.replace(session.cfg, objective=objective_settings(objective))
        session = dataclasses.replace(session, cfg=cfg)
        encoder = encoder_view(session, scratch(session, "pretrain"))
        for trained in (True, False):  # these look at three images, once
            followed_layers(encoder.model, encoder.model, trained=trained)
        for network in filter(None, (encoder.model, encoder.momentum)):
            network.register_forward_pre_hook(lambda _, images: seen.update(images=len(images[0])))
        collect_signals(encoder, session.store, session.manifest, cfg)
        counts = session.manifest.count_roles()
    planned = audit_looks(cfg, counts)
    assert planned["encoders"] == 3 and planned["images"] == sum(counts.get(role, 0) for role in AUDITED)
    assert planned["passes"] == 3 * seen["images"]
    assert audit_looks(dataclasses.replace(cfg, audit=dataclasses.replace(cfg.audit, tier=0)), counts)["encoders"] == 2
