"""Sketches and part responses against per-image gradients and single crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from test_gradients import RESNET, VIT, setting

from distunlearn.audit.signals import part_crops
from distunlearn.audit.signals.gradient_sketch import SIDE, network_sketches
from distunlearn.audit.signals.part_crops import crop_boxes, part_responses
from distunlearn.constraints.gradients.layers import probed_layers
from distunlearn.constraints.gradients.probes import ProbeSet


@pytest.mark.parametrize("name", ["simclr", "moco", "supervised"])
@pytest.mark.parametrize("encoder", [RESNET, VIT], ids=["resnet", "vit"])
def test_sketches_are_those_of_one_backward_pass_per_image(encoder, name):
    model, objective, views, branches, bank = setting(encoder, name, n=3)
    n, count = views.shape[1], objective.branches

    shown = branches(slice(None))  # for its targets: the probes follow one run of the model

    def loss():
        out = model(torch.cat(list(views)))
        return objective.per_sample_loss(shown._replace(output=out.output.view(count, n, -1)), bank)

    norms, sketch = network_sketches(model, loss, n, count, seed=4)
    layers = probed_layers(model, trained=False)
    probes = ProbeSet(layers, SIDE, SIDE, 4, 0, dtype=torch.float64)
    for i in range(n):
        one = objective.per_sample_loss(branches(slice(i, i + 1)), bank)[0]
        gradients = torch.autograd.grad(one, [layer.weight for layer in layers.values()])
        expected = [
            (outer.T @ g.flatten(1) @ inner.flatten(1).T)
            for g, inner, outer in zip(gradients, probes.ins, probes.outs, strict=True)
        ]
        np.testing.assert_allclose(norms[i], [np.log(max(float(s.norm()), 1e-12)) for s in expected], rtol=1e-7)
        signs = np.random.default_rng([4, 0x51C2]).choice([-1.0, 1.0], len(expected))
        whole = sum(sign * s for sign, s in zip(signs, expected, strict=True))
        np.testing.assert_allclose(sketch[i], whole.flatten().numpy(), rtol=1e-7, atol=1e-12)
    varied = np.ptp(norms, axis=0) > 1e-6  # not where a fresh block ends in a scale of 0
    assert varied.mean() >= 0.4  # else equal rows would say nothing


def test_training_mode_is_refused():
    model, *_ = setting(RESNET, "simclr")
    model.train()
    with pytest.raises(AssertionError, match="evaluation mode"):
        network_sketches(model, lambda: torch.zeros(1), 1, 2, 0)


@pytest.mark.parametrize(("encoder", "places"), [(RESNET, 4), (VIT, 4)], ids=["resnet", "vit"])
def test_responses_are_those_of_one_crop_at_a_time(encoder, places):
    model, *_ = setting(encoder, "simclr")
    backbone = model.backbone
    images = torch.rand(3, 1, 16, 16, dtype=torch.float64) * 2 - 1
    ids = ["a", "b", "c"]
    with torch.no_grad():
        found = part_responses(backbone, images, ids, 5, seed=2)
        flat, normal = np.zeros((3, 5)), np.zeros((3, 5))
        draws = torch.randn(places, generator=torch.Generator().manual_seed(2)).double().softmax(0).numpy()
        for i in range(3):
            features = part_crops._maps(backbone, images[i : i + 1])[0].numpy()
            assert features.shape[1] >= places
            for k in range(5):
                cut = part_crops._cut(images[i : i + 1], crop_boxes(2, ids, k)[i : i + 1])
                part = part_crops._maps(backbone, cut)[0].numpy().mean(1)
                answer = np.exp(part @ features - np.logaddexp.reduce(part @ features))
                flat[i, k] = stats.entropy(np.full(features.shape[1], 1 / features.shape[1]), answer)
                normal[i, k] = stats.entropy(draws, answer) if features.shape[1] == places else np.nan
    expected = np.concatenate([np.sort(flat, axis=1), np.sort(normal, axis=1)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_crops_are_cut_where_their_boxes_say():
    """A ramp in x and y: the middle of each crop has the coordinates of the middle of its box."""
    size = 32
    centres = (torch.arange(size) + 0.5) / size
    ramp = torch.stack([centres.expand(size, size), centres[:, None].expand(size, size)])[None].double()
    boxes = crop_boxes(1, ["x", "y", "z"], 0)
    areas = boxes[:, 0] ** 2
    assert ((areas >= 0.08) & (areas <= 0.2)).all() and (boxes[:, 1:] + boxes[:, :1] <= 1).all()
    cut = part_crops._cut(ramp.expand(3, -1, -1, -1), boxes)
    middle = cut[:, :, size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1].mean((2, 3)).numpy()
    np.testing.assert_allclose(middle, boxes[:, 1:] + boxes[:, :1] / 2, atol=1e-6)


def test_without_crops_there_are_no_responses():
    model, *_ = setting(VIT, "simclr")
    assert part_responses(model.backbone, torch.zeros(2, 1, 16, 16).double(), ["a", "b"], 0, 0).shape == (2, 0)
