"""Views: keyed draws, bit-identity in any batch, and every operation against a known answer or torchvision."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import functional as tv

from distunlearn.config.schema import ViewsConfig
from distunlearn.data.augmentations import id_hashes, make_view, plain_view, uniforms
from distunlearn.errors import ConfigError

OFF = {"crop_scale_min": 1.0, "brightness": 0.0, "contrast": 0.0}
EVERYTHING = {
    "crop_scale_min": 0.2, "rotation": 15.0, "flip": 0.5, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4,
    "hue": 0.1, "grayscale": 0.3, "blur": 0.5, "noise": 0.05,
}  # fmt: skip
COLOUR_ONLY = ("saturation", "hue", "grayscale")


def config(**settings) -> ViewsConfig:
    return ViewsConfig(**{**OFF, **settings})


def everything(channels: int) -> ViewsConfig:
    return ViewsConfig(**{k: v for k, v in EVERYTHING.items() if channels == 3 or k not in COLOUR_ONLY})


def images(n: int, channels: int = 1, side: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth pictures with some noise, uint8 [n, C, S, S]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    phase = rng.uniform(0, 6, size=(4, n, channels, 1, 1))
    waves = np.sin(4 * x + phase[0]) + np.cos(5 * y + phase[1]) + np.sin(3 * (x + y) + phase[2])
    noise = 0.2 * rng.standard_normal((n, channels, side, side))
    values = 127.5 + 40 * (waves + noise)
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))


def names(n: int) -> list[str]:
    return [f"digits/{i:06d}" for i in range(n)]


def view_of(batch: torch.Tensor, cfg: ViewsConfig, *, seed=0, epochs=None, ids=None, view=0) -> torch.Tensor:
    n = len(batch)
    epochs = np.zeros(n, dtype=np.int64) if epochs is None else epochs
    return make_view(batch, cfg, seed=seed, epochs=epochs, ids=names(n) if ids is None else ids, view=view)


def unit(view: torch.Tensor) -> torch.Tensor:
    return view * 0.5 + 0.5


# -- draws -------------------------------------------------------------------------------------------------------


def test_id_hashes_are_blake2b_and_the_same_in_another_process():
    ids = ["digits/000001", "a b/ü.png", ""]
    code = f"from distunlearn.data.augmentations import id_hashes; print(id_hashes({ids!r}).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(id_hashes(ids).tolist())
    assert id_hashes(ids).dtype == np.int64
    assert id_hashes([]).shape == (0,)
    assert len(set(id_hashes(names(5000)).tolist())) == 5000


MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


def splitmix(z: int) -> int:
    """The finaliser with Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def stream_start(seed: int, epoch: int, id_hash: int, view: int) -> int:
    """Where the draws of an image's view start."""
    key = seed & MASK
    for part in (epoch, id_hash & MASK, view):
        key = splitmix((key + GOLDEN) & MASK) ^ part
    return splitmix((key + GOLDEN) & MASK)


def splitmix_oracle(seed: int, epoch: int, id_hash: int, view: int, draw: int) -> float:
    """The documented construction with Python integers."""
    return (splitmix((stream_start(seed, epoch, id_hash, view) + (draw + 1) * GOLDEN) & MASK) >> 40) / 2**24


def test_uniforms_equal_an_integer_oracle():
    ids, epochs = names(5), np.array([0, 1, 7, 1 << 32, 3])
    for seed, view in ((0, 0), (123456789, 9), (2**63 + 5, 1)):
        u = uniforms(seed, epochs, ids, view, 4)
        assert u.dtype == torch.float32
        for i, name in enumerate(ids):
            for d in range(4):
                expected = splitmix_oracle(seed, int(epochs[i]), int(id_hashes([name])[0]), view, d)
                assert u[i, d].item() == expected


def test_splitmix_finaliser_known_answer():
    """The first outputs of SplitMix64 started at 0, as its authors publish them."""
    from distunlearn.common.random import finalise

    golden = np.uint64(0x9E3779B97F4A7C15)
    out = finalise(np.arange(1, 4, dtype=np.uint64) * golden)
    assert [hex(v) for v in out.tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@pytest.mark.parametrize("axis", ["ids", "epochs", "views", "seeds", "draws"])
def test_uniforms_are_uniform_along_every_key(axis):
    n = 4000
    zeros, one = np.zeros(n, dtype=np.int64), np.zeros(1, dtype=np.int64)
    u = {
        "ids": lambda: uniforms(0, zeros, names(n), 0, 3)[:, 1],
        "epochs": lambda: uniforms(0, np.arange(n), ["x"] * n, 0, 3)[:, 1],
        "views": lambda: torch.cat([uniforms(0, one, ["x"], v, 3)[:, 1] for v in range(n)]),
        "seeds": lambda: torch.cat([uniforms(s, one, ["x"], 0, 3)[:, 1] for s in range(n)]),
        "draws": lambda: uniforms(0, one, ["x"], 0, n)[0],
    }[axis]().numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(n)
    assert len(np.unique(u)) > 0.999 * n


def test_views_and_draws_of_one_sample_are_uncorrelated():
    n = 4000
    zeros = np.zeros(n, dtype=np.int64)
    table = np.concatenate([uniforms(0, zeros, names(n), v, 4).numpy() for v in range(2)], axis=1)
    correlation = np.corrcoef(table.T) - np.eye(8)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(n)


def test_first_draws_do_not_depend_on_how_many_are_drawn():
    epochs = np.arange(6)
    assert torch.equal(uniforms(3, epochs, names(6), 1, 5), uniforms(3, epochs, names(6), 1, 40)[:, :5])
    assert uniforms(3, epochs, names(6), 1, 0).shape == (6, 0)


def test_global_generators_are_neither_read_nor_moved():
    batch = images(4)
    torch.manual_seed(1)
    first, before = view_of(batch, everything(1)), torch.get_rng_state()
    np.random.seed(5)
    torch.manual_seed(2)
    assert torch.equal(view_of(batch, everything(1)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), before)


# -- bit-identity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (1, 32), (3, 32), (3, 33)])
def test_a_view_is_bit_identical_in_any_batch(channels, side):
    n, cfg = 37, everything(channels)
    batch, ids, epochs = images(n, channels, side), names(n), np.arange(n) % 5
    whole = view_of(batch, cfg, epochs=epochs, ids=ids)
    assert torch.isfinite(whole).all()
    order = np.random.default_rng(1).permutation(n)
    subsets = [order, order[:1], order[:2], order[3:10], order[:16], np.array([36]), np.arange(5, 36, 3)]
    subsets += [np.array([i]) for i in range(n)]
    for rows in subsets:
        part = view_of(batch[rows], cfg, epochs=epochs[rows], ids=[ids[i] for i in rows])
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize(("n", "side"), [(300, 32), (3, 224)])
def test_a_view_is_bit_identical_with_more_threads_and_in_a_larger_batch(n, side):
    cfg, batch = everything(1), images(n, 1, side)
    whole = view_of(batch, cfg)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(view_of(batch, cfg), whole)
        assert torch.equal(view_of(batch[:1], cfg), whole[:1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(view_of(batch[:1], cfg), whole[:1])


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"view": 1}, {"epochs": np.ones(6, dtype=np.int64)}, {"ids": list("abcdef")}]
)
def test_another_key_gives_another_view(change):
    batch = images(6)
    a, b = view_of(batch, everything(1)), view_of(batch, everything(1), **change)
    assert all(not torch.equal(a[i], b[i]) for i in range(6))


def test_one_operation_more_leaves_the_draws_of_the_others_alone():
    batch = images(6)
    plain, twice = view_of(batch, config(crop_scale_min=0.3)), view_of(batch, config(crop_scale_min=0.3, flip=1.0))
    torch.testing.assert_close(plain.flip(-1), twice, atol=2e-5, rtol=0)


# -- known answers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_everything_off_is_the_identity(channels):
    batch = images(4, channels)
    assert torch.equal(view_of(batch, config()), plain_view(batch))
    expected = (batch.to(torch.float64) / 255 - 0.5) / 0.5
    torch.testing.assert_close(plain_view(batch).double(), expected, atol=1e-6, rtol=0)


def test_a_crop_of_everything_is_the_identity():
    batch = images(8, 3)
    view = view_of(batch, config(crop_scale_min=1 - 1e-9))  # takes the resampling path
    torch.testing.assert_close(view, plain_view(batch), atol=1e-5, rtol=0)
    view = view_of(batch, config(rotation=1e-7))
    torch.testing.assert_close(view, plain_view(batch), atol=1e-5, rtol=0)


def test_pure_flip():
    batch = images(64, 3)
    torch.testing.assert_close(view_of(batch, config(flip=1.0)), plain_view(batch).flip(-1), atol=1e-5, rtol=0)
    mixed, plain = view_of(batch, config(flip=0.5)), plain_view(batch)
    same = [torch.allclose(mixed[i], plain[i], atol=1e-5) for i in range(64)]
    mirrored = [torch.allclose(mixed[i], plain[i].flip(-1), atol=1e-5) for i in range(64)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 16 < sum(same) < 48


def test_right_angles_are_rotations():
    """With the angle forced to 90 degrees by its draw, the view is the transposed and mirrored image."""
    from distunlearn.data import augmentations

    batch = images(1, 1, 16)
    cfg = config(rotation=90.0)
    u = {name: np.array([1.0 if name == "angle" else 0.5]) for name in augmentations._DRAWS}
    tables = augmentations._tables(cfg, augmentations._parameters(cfg, u), batch.shape[-1])
    view = augmentations._resample(batch.float() / 255, cfg, augmentations._on_device(tables, batch.device))
    expected = torch.rot90(batch.float() / 255, 1, dims=(2, 3))
    torch.testing.assert_close(view, expected, atol=1e-5, rtol=0)


def crop_parameters(cfg: ViewsConfig, n: int) -> dict[str, np.ndarray]:
    from distunlearn.data import augmentations

    u = uniforms(0, np.zeros(n, dtype=np.int64), names(n), 0, len(augmentations._DRAWS)).numpy().astype(np.float64)
    return augmentations._parameters(cfg, dict(zip(augmentations._DRAWS, u.T, strict=True)))


def test_crops_have_the_stated_areas_aspects_and_stay_inside():
    p = crop_parameters(config(crop_scale_min=0.2), 4000)
    area, aspect = p["width"] * p["height"], p["width"] / p["height"]
    assert stats.kstest((area - 0.2) / 0.8, "uniform").pvalue > 1e-3
    assert aspect.min() >= 3 / 4 - 1e-12 and aspect.max() <= 4 / 3 + 1e-12
    free = area < 0.74  # smaller crops fit with any aspect
    assert stats.kstest(np.log(aspect[free]) / np.log(4 / 3), "uniform", args=(-1, 2)).pvalue > 1e-3
    for size, centre in (("width", "centre_x"), ("height", "centre_y")):
        assert p[size].max() <= 1 + 1e-12
        assert (np.abs(p[centre]) + p[size]).max() <= 1 + 1e-12


def test_a_crop_is_a_bilinear_resample_of_its_window():
    """Oracle: float64 interpolation at every output pixel centre, borders clamped."""
    side, n = 12, 5
    batch = images(n, 1, side)
    cfg = config(crop_scale_min=0.3)
    p, view = crop_parameters(cfg, n), unit(view_of(batch, cfg))
    for i in range(n):
        image = batch[i, 0].double().numpy() / 255
        for row in range(side):
            for column in range(side):
                x = p["centre_x"][i] + p["width"][i] * ((2 * column + 1) / side - 1)
                y = p["centre_y"][i] + p["height"][i] * ((2 * row + 1) / side - 1)
                x, y = (np.clip(((v + 1) * side - 1) / 2, 0, side - 1) for v in (x, y))
                x0, y0 = min(int(x), side - 2), min(int(y), side - 2)
                wx, wy = x - x0, y - y0
                top = (1 - wx) * image[y0, x0] + wx * image[y0, x0 + 1]
                bottom = (1 - wx) * image[y0 + 1, x0] + wx * image[y0 + 1, x0 + 1]
                assert view[i, 0, row, column].item() == pytest.approx((1 - wy) * top + wy * bottom, abs=2e-5)


@pytest.mark.parametrize(
    ("name", "function", "channels"),
    [
        ("brightness", tv.adjust_brightness, 1),
        ("brightness", tv.adjust_brightness, 3),
        ("contrast", tv.adjust_contrast, 1),
        ("contrast", tv.adjust_contrast, 3),
        ("saturation", tv.adjust_saturation, 3),
    ],
)
@pytest.mark.parametrize("strength", [0.4, 1.5])
@pytest.mark.parametrize("side", [7, 32])
def test_jitter_agrees_with_torchvision(name, function, channels, strength, side):
    n = 12
    batch = images(n, channels, side)
    view = unit(view_of(batch, config(**{name: strength})))
    factors = crop_parameters(config(**{name: strength}), n)[name]
    assert factors.min() >= max(0, 1 - strength) and factors.max() <= 1 + strength and factors.std() > 0
    for i in range(n):
        expected = function(batch[i].float() / 255, float(factors[i]))
        torch.testing.assert_close(view[i], expected, atol=3e-6, rtol=0)
    assert view.min() >= 0 and view.max() <= 1 + 1e-6


def test_grayscale_agrees_with_torchvision():
    batch = images(40, 3)
    expected = tv.rgb_to_grayscale(batch.float() / 255, num_output_channels=3)
    torch.testing.assert_close(unit(view_of(batch, config(grayscale=1.0))), expected, atol=3e-6, rtol=0)
    mixed = unit(view_of(batch, config(grayscale=0.5)))
    grey = torch.tensor([torch.allclose(mixed[i], expected[i], atol=3e-6) for i in range(40)])
    assert 8 < grey.sum() < 32
    torch.testing.assert_close(mixed[~grey], batch[~grey].float() / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("side", "taps"), [(12, 3), (15, 3), (16, 5), (32, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_blur_agrees_with_torchvision(channels, side, taps):
    n = 8
    batch = images(n, channels, side)
    view, sigmas = unit(view_of(batch, config(blur=1.0))), crop_parameters(config(blur=1.0), n)["sigma"]
    assert sigmas.min() >= 0.1 and sigmas.max() <= 2.0
    for i in range(n):
        expected = tv.gaussian_blur(batch[i].float() / 255, kernel_size=[taps, taps], sigma=[float(sigmas[i])] * 2)
        torch.testing.assert_close(view[i], expected, atol=2e-6, rtol=0)


def test_blur_touches_only_the_drawn_share():
    batch = images(64)
    view = view_of(batch, config(blur=0.25))
    untouched = sum(torch.equal(view[i], plain_view(batch)[i]) for i in range(64))
    assert 36 <= untouched <= 60


def test_hue_keeps_luma_and_grey_and_turns_the_circle():
    from distunlearn.data import augmentations

    def turned_by(pixels: torch.Tensor, turns: float) -> torch.Tensor:
        cos, sin = (torch.tensor(f(2 * np.pi * turns), dtype=torch.float32) for f in (np.cos, np.sin))
        return augmentations._rotate_hue(pixels, cos, sin)

    def luma_of(pixels: torch.Tensor) -> torch.Tensor:
        return (pixels * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)

    x = images(4, 3).float() / 255 * 0.2 + 0.4  # far from the clamps
    turned = turned_by(x, 0.2)
    torch.testing.assert_close(luma_of(turned), luma_of(x), atol=2e-4, rtol=0)
    assert (turned - x).abs().max() > 0.02
    torch.testing.assert_close(turned_by(x, 1.0), x, atol=2e-4, rtol=0)
    torch.testing.assert_close(turned_by(turned, -0.2), x, atol=4e-4, rtol=0)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(turned_by(grey, 0.3), grey, atol=2e-4, rtol=0)


def test_a_view_turns_the_hue_by_the_drawn_angle():
    from distunlearn.data import augmentations

    cfg, batch = config(hue=0.2), images(8, 3)
    view, turns = unit(view_of(batch, cfg)), crop_parameters(cfg, 8)["hue"]
    assert np.abs(turns).max() > 0.05
    for i in range(8):
        cos, sin = (torch.tensor(f(2 * np.pi * turns[i]), dtype=torch.float32) for f in (np.cos, np.sin))
        expected = augmentations._rotate_hue(batch[i : i + 1].float() / 255, cos, sin)
        torch.testing.assert_close(view[i : i + 1], expected, atol=1e-5, rtol=0)


def test_noise_is_standard_normal_and_fresh_everywhere():
    flat = torch.full((64, 1, 32, 32), 128, dtype=torch.uint8)
    noise = ((unit(view_of(flat, config(noise=0.05))) - 128 / 255) / 0.05).double().numpy()
    sample = noise.reshape(-1)
    assert stats.kstest(sample[::7], "norm").pvalue > 1e-3
    assert abs(sample.mean()) < 4 / np.sqrt(sample.size)
    assert sample.std() == pytest.approx(1, abs=0.01)
    assert stats.kurtosis(sample) == pytest.approx(0, abs=0.1)
    rows = noise.reshape(64, -1)
    assert np.abs(np.corrcoef(rows) - np.eye(64)).max() < 6 / np.sqrt(1024)
    for lag in range(1, 9):  # four numbers share one hash
        assert abs(np.corrcoef(sample[:-lag], sample[lag:])[0, 1]) < 4.5 / np.sqrt(sample.size)
        assert abs(np.corrcoef(sample[:-lag] ** 2, sample[lag:] ** 2)[0, 1]) < 4.5 / np.sqrt(sample.size)


def test_noise_equals_an_oracle_and_shares_no_bits_with_the_other_draws():
    """The documented construction with Python integers: a stream of its own, four numbers from 64 bits."""
    tag = 0x6E6F697365000000

    def normals(start: int) -> list[float]:
        found = []
        for block in (1, 2):
            bits = splitmix((start + block * GOLDEN) & MASK)
            cells = [(((bits >> 16 * k) & 0xFFFF) + 0.5) / 65536 for k in range(4)]
            for u, v in (cells[:2], cells[2:]):
                radius = np.sqrt(-2 * np.log(u))
                found += [radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)]
        return found

    flat = torch.full((3, 1, 3, 3), 128, dtype=torch.uint8)
    epochs = np.array([0, 2, 1 << 32])
    view = unit(view_of(flat, config(noise=0.01), seed=7, epochs=epochs, view=1))
    noise = ((view - 128 / 255) / 0.01).double().numpy().reshape(3, -1)[:, :8]
    for i, name in enumerate(names(3)):
        key = stream_start(7, int(epochs[i]), int(id_hashes([name])[0]), 1)
        np.testing.assert_allclose(noise[i], normals(key ^ tag), atol=2e-4)
        assert np.abs(noise[i] - normals(key)).max() > 0.1  # the stream of crop, flip and colour


def test_values_stay_in_range_and_gradients_are_not_tracked():
    for channels in (1, 3):
        view = view_of(images(32, channels), everything(channels))
        assert view.shape == (32, channels, 32, 32) and view.dtype == torch.float32
        assert view.min() >= -1 and view.max() <= 1 and not view.requires_grad


def test_the_input_is_left_alone():
    batch = images(4, 3)
    copy = batch.clone()
    view_of(batch, everything(3))
    plain_view(batch)
    assert torch.equal(batch, copy)


def test_an_empty_batch_gives_an_empty_view():
    batch = torch.zeros(0, 1, 32, 32, dtype=torch.uint8)
    assert view_of(batch, everything(1)).shape == (0, 1, 32, 32)


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COLOUR_ONLY)
def test_colour_operations_on_one_channel_are_refused(name):
    with pytest.raises(ConfigError, match=f"views.{name}=0.3 needs colour"):
        view_of(images(2), config(**{name: 0.3}))


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 1, 8, 8),
        torch.zeros(1, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 2, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 1, 8, 9, dtype=torch.uint8),
        torch.zeros(2, 1, 1, 1, dtype=torch.uint8),
    ],
)
def test_wrong_images_are_refused(batch):
    with pytest.raises(ValueError, match="images must be"):
        view_of(batch, config())
    with pytest.raises(ValueError, match="images must be"):
        plain_view(batch)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": ["a"]}, "2 images came with 1 ids"),
        ({"epochs": np.zeros(3, dtype=np.int64)}, "epochs must be 2 integers"),
        ({"epochs": np.zeros(2)}, "epochs must be 2 integers"),
        ({"epochs": np.array([0, -1])}, "must not be negative"),
        ({"seed": -1}, "must not be negative"),
        ({"view": -1}, "must not be negative"),
    ],
)
def test_wrong_keys_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        view_of(images(2), config(), **change)


def test_a_negative_number_of_draws_is_refused():
    with pytest.raises(ValueError, match="draws is -1"):
        uniforms(0, np.zeros(1, dtype=np.int64), ["a"], 0, -1)


@pytest.mark.parametrize("side", [12, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_fused_form_is_one_graph_and_gives_the_same_view(channels, side):
    """What a GPU compiles with compile=true: here traced whole, and run operation by operation."""
    from dataclasses import replace

    from distunlearn.data import augmentations

    cfg, batch, n = replace(everything(channels), noise=0.0), images(24, channels, side), 24
    draws = uniforms(0, np.zeros(n, dtype=np.int64), names(n), 0, len(augmentations._DRAWS)).numpy().astype(np.float64)
    params = augmentations._parameters(cfg, dict(zip(augmentations._DRAWS, draws.T, strict=True)))
    table = augmentations._on_device(augmentations._tables(cfg, params, side), batch.device)
    fused = torch.compile(augmentations._fused, backend="aot_eager", dynamic=False, fullgraph=True)(batch, table, cfg)
    torch.testing.assert_close(fused, view_of(batch, cfg), atol=2e-5, rtol=0)
    assert (fused - view_of(batch, cfg, view=1)).abs().max() > 0.1, "another view would be told apart"
