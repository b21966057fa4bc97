"""Views against torchvision v2 with the same windows and parameters, and bit-identity in any batch."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from distunlearn.config.schema import ViewsConfig
from distunlearn.config.view_recipes import VIEW_RECIPES, View, views_of
from distunlearn.data.sources.decode import decode_image
from distunlearn.data.views import colour
from distunlearn.data.views.colour import make_view, parameters, plain_view
from distunlearn.data.views.crops import EVALUATION, TRIES, Cutter, enlarged, evaluation_crop, resize, window
from distunlearn.data.views.draws import COLOUR, CROP, uniforms
from distunlearn.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from photos import jpeg  # noqa: E402

NAMED = [name for name in VIEW_RECIPES if name != "grey"]
EVERYTHING = {"recipe": "simclr", "blur": 0.5, "solarize": 0.3, "jitter": 0.9}


@pytest.fixture(scope="module")
def photos() -> list[torch.Tensor]:
    """Of the benchmark's generator, 500 x 400 JPEGs."""
    return [decode_image(jpeg(seed), "x", 10**6, 3) for seed in range(4)]


def names(n: int) -> list[str]:
    return [f"digits/{i:06d}" for i in range(n)]


def crops_of(photos: list[torch.Tensor], settings: ViewsConfig, views=(0, 1), size: int = 224) -> torch.Tensor:
    crops = Cutter(size, settings).crops(names(len(photos)), np.zeros(len(photos), dtype=int), views)
    out = torch.empty((len(photos), len(views), photos[0].shape[0], size, size), dtype=torch.uint8)
    for row, photo in enumerate(photos):
        crops.crop(photo, row, out[row])
    return out


def pictures(n: int, channels: int = 3, side: int = 32) -> torch.Tensor:
    """Smooth pictures with some noise, uint8 [n, C, S, S]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(n, channels, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return ((smooth + 0.1 * torch.rand(n, channels, side, side, generator=generator)) * 255).clamp(0, 255).byte()


def view_of(batch: torch.Tensor, cfg: ViewsConfig, *, seed=0, epochs=None, ids=None, view=0) -> torch.Tensor:
    n = len(batch)
    epochs = np.zeros(n, dtype=np.int64) if epochs is None else epochs
    return make_view(batch, cfg, seed=seed, epochs=epochs, ids=names(n) if ids is None else ids, view=view)


# -- crops -------------------------------------------------------------------------------------------------------------


def psnr(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(10 * torch.log10(255**2 / (found.double() - expected.double()).square().mean()))


def detail(image: torch.Tensor) -> float:
    """Energy of the differences of neighbours."""
    return float(sum(image.double().diff(dim=dim).square().sum() for dim in (-1, -2)))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crops_are_those_of_torchvision_on_the_same_windows(photos, mode):
    """As RandomResizedCrop(antialias=True) gives them on a PIL image and on a tensor in floating point."""
    cfg = ViewsConfig(recipe="simclr", interpolation=mode)
    found = crops_of(photos, cfg)
    for view in (0, 1):
        draws = uniforms(0, np.zeros(len(photos), dtype=int), names(len(photos)), view, CROP.stop)[:, CROP]
        for row, photo in enumerate(photos):
            place = window(draws[row], *photo.shape[1:], 0.08)
            kind = v2.InterpolationMode(mode)
            whole = Image.fromarray(photo.permute(1, 2, 0).numpy())
            by_pil = tv.pil_to_tensor(tv.resized_crop(whole, *place, [224, 224], kind))
            exact = tv.resized_crop(photo.double(), *place, [224, 224], kind, antialias=True).clamp(0, 255)
            exact = exact.round()  # rounding by itself adds detail to a smooth crop
            assert torch.equal(found[row, view], tv.resized_crop(photo, *place, [224, 224], kind, antialias=True))
            for expected in (by_pil, exact):
                assert psnr(found[row, view], expected) >= 45
                assert 0.98 <= detail(found[row, view]) / detail(expected) <= 1.02
    thumbnail = resize(photos[0][:, :, 50:450], (224, 224), mode)  # control: what a crop of a thumbnail loses
    coarse = resize(thumbnail[:, 50:150, 50:150], (224, 224), mode)
    assert detail(coarse) < 0.9 * detail(resize(photos[0][:, 89:268, 139:318], (224, 224), mode))


@pytest.mark.parametrize("shape", [(400, 500), (30, 500), (500, 30)])
def test_windows_are_drawn_as_torchvision_draws_them(shape):
    """Means and spreads of 4,000 windows, and the window in the middle where none fits."""
    torch.manual_seed(0)
    picture, u = torch.empty(3, *shape), uniforms(0, np.zeros(4000, dtype=int), names(4000), 0, CROP.stop)[:, CROP]
    mine = np.array([window(row, *shape, 0.2) for row in u], dtype=float)
    draw = v2.RandomResizedCrop(224, scale=(0.2, 1))
    found = [draw.make_params([picture]) for _ in range(1000)]
    theirs = np.array([[p[k] for k in ("top", "left", "height", "width")] for p in found], dtype=float)
    error = 5 * np.sqrt(mine.var(0) / len(mine) + theirs.var(0) / len(theirs)) + 1e-9
    assert (np.abs(mine.mean(0) - theirs.mean(0)) <= error).all()
    assert ((mine[:, :2] >= 0) & (mine[:, :2] + mine[:, 2:] <= shape)).all() and len(u[0]) == 2 * TRIES + 2


@pytest.mark.parametrize(("crop_pct", "mode"), [(1.0, "bilinear"), (0.875, "bicubic")])
def test_evaluation_is_timms(photos, crop_pct, mode):
    from timm.data import create_transform

    theirs = create_transform(224, crop_pct=crop_pct, interpolation=mode, mean=(0.0,) * 3, std=(1.0,) * 3)
    for photo in photos:
        expected = 255 * theirs(Image.fromarray(photo.permute(1, 2, 0).numpy()))
        assert psnr(evaluation_crop(photo, 224, crop_pct, mode), expected) >= 45
    assert torch.equal(
        crops_of(photos, ViewsConfig(), (EVALUATION,))[:, 0],
        torch.stack([evaluation_crop(photo, 224, 1.0, "bilinear") for photo in photos]),
    )


def test_large_photos_are_decoded_smaller_and_crops_stay_what_they_are():
    """Four times the size, decoded at half of it or by means over squares: crops that shrink differ little."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (200, 250, 3), dtype=np.uint8))
    photo = coarse.resize((2000, 1600), Image.Resampling.BICUBIC)
    for kind in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        photo.save(buffer, kind, quality=95)
        whole, half = (decode_image(buffer.getvalue(), "x", 10**7, 3, bound) for bound in (None, 800))
        assert half.shape == (3, 800, 1000) and whole.shape == (3, 1600, 2000)
        one, other = (evaluation_crop(image, 224, 1.0, "bilinear") for image in (whole, half))
        assert psnr(one, other) >= 40
        assert decode_image(buffer.getvalue(), "x", 10**7, 3, 801).shape == whole.shape


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5000), (3, 5000, 1), (1, 2, 3)])
def test_odd_shapes_have_views(shape):
    photo = enlarged(torch.full(shape, 77, dtype=torch.uint8), 32)
    assert photo.numel() <= 3 * 5000 and (min(photo.shape[1:]) == 32 or max(shape) > 1000)
    found = crops_of([photo], ViewsConfig(), (0, 1, EVALUATION), 32)
    assert found.shape == (1, 3, shape[0], 32, 32) and (found == 77).all()


# -- colour ------------------------------------------------------------------------------------------------------------


def by_torchvision(crop: torch.Tensor, recipe: View, p: dict[str, np.ndarray], row: int) -> torch.Tensor:
    """One image, float64 [C, S, S] in [0, 1], operation by operation."""
    x = crop[None].double() / 255
    x = tv.horizontal_flip(x) if p["flip"][row] else x
    steps = {
        "brightness": tv.adjust_brightness, "contrast": tv.adjust_contrast, "saturation": tv.adjust_saturation,
        "hue": tv.adjust_hue,
    }  # fmt: skip
    if p["jitter"][row]:
        for number in p["order"][row]:
            name = colour.JITTER[number]
            if getattr(recipe, name):
                x = steps[name](x, float(p[name][row]))
    x = tv.rgb_to_grayscale(x, 3) if p["grayscale"][row] else x
    if p["blur"][row]:
        x = tv.gaussian_blur(x, [23, 23], [float(p["sigma"][row])] * 2)
    return (tv.solarize(x, 0.5) if p["solarize"][row] else x)[0]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("view", [0, 1])
def test_a_named_recipe_is_torchvision_with_the_same_parameters(name, view):
    batch, cfg = pictures(48, side=48), ViewsConfig(recipe=name)
    recipe = views_of(cfg)[view]
    u = uniforms(0, np.zeros(48, dtype=int), names(48), view, len(COLOUR))
    p = parameters(recipe, dict(zip(COLOUR, u.T, strict=True)))
    found = view_of(batch, cfg, view=view) * 0.5 + 0.5
    near = 0
    for row, crop in enumerate(batch):
        expected = by_torchvision(crop, recipe, p, row)
        wrong = (found[row].double() - expected).abs()
        # A value within rounding of the threshold may be inverted on one side only.
        wrong = torch.where((expected - 0.5).abs() < 1e-4, 0, wrong) if p["solarize"][row] else wrong
        assert wrong.max() <= 2e-4, row
        near += int(wrong.max() < 1e-5)
    assert near > 24
    assert {n for n in p if p[n].dtype == bool and p[n].any()} >= {"flip", "jitter", "grayscale"}


def test_named_recipes_are_the_published_ones():
    """Numbers from the papers and their official code, written down apart from the package's table."""
    jitter = lambda v: (v.jitter, v.brightness, v.contrast, v.saturation, v.hue)  # noqa: E731
    rest = lambda v: (v.crop_scale_min, v.flip, v.grayscale, v.blur, v.solarize, v.blur_sigma)  # noqa: E731
    expected = {
        "simclr": [((0.8, 0.8, 0.8, 0.8, 0.2), (0.08, 0.5, 0.2, 0.5, 0.0, (0.1, 2.0)))] * 2,
        "mocov2": [((0.8, 0.4, 0.4, 0.4, 0.1), (0.2, 0.5, 0.2, 0.5, 0.0, (0.1, 2.0)))] * 2,
        "mocov3": [((0.8, 0.4, 0.4, 0.2, 0.1), (0.08, 0.5, 0.2, b, s, (0.1, 2.0))) for b, s in ((1, 0), (0.1, 0.2))],
        "byol": [((0.8, 0.4, 0.4, 0.2, 0.1), (0.08, 0.5, 0.2, b, s, (0.1, 2.0))) for b, s in ((1, 0), (0.1, 0.2))],
        "dino": [((0.8, 0.4, 0.4, 0.2, 0.1), (0.4, 0.5, 0.2, b, s, (0.1, 2.0))) for b, s in ((1, 0), (0.1, 0.2))],
    }
    assert {n: [(jitter(v), rest(v)) for v in VIEW_RECIPES[n]] for n in NAMED} == expected
    assert {n for n in NAMED if VIEW_RECIPES[n][0].interpolation == "bicubic"} == {"simclr", "byol", "dino"}


@pytest.mark.parametrize("sigma", [0.7, 1.0, 1.5, 2.0])
def test_a_blur_holds_its_sigma(sigma):
    """The second moment of what becomes of one bright pixel. The control: five taps would not hold it."""
    point = torch.zeros(2, 3, 65, 65, dtype=torch.uint8)
    point[:, :, 32, 32] = 255
    off = {"crop_scale_min": 1.0, "flip": 0.0, "jitter": 0.0, "grayscale": 0.0}
    cfg = ViewsConfig(recipe="simclr", **off, blur=1.0, blur_sigma=(sigma, sigma))
    seen = (view_of(point, cfg) * 0.5 + 0.5).double()[0, 0]
    steps = torch.arange(65) - 32.0
    for line in (seen.sum(0), seen.sum(1)):
        assert float((line * steps**2).sum() / line.sum()) ** 0.5 == pytest.approx(sigma, rel=0.02)
        short = line * (steps.abs() <= 2)
        if sigma > 1:
            assert float((short * steps**2).sum() / short.sum()) ** 0.5 < 0.98 * sigma


# -- bit-identity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [32, 33])
def test_a_view_is_bit_identical_in_any_batch_and_with_more_threads(side):
    n, cfg = 37, ViewsConfig(**EVERYTHING)
    batch, ids, epochs = pictures(n, 3, side), names(n), np.arange(n) % 5
    whole = view_of(batch, cfg, epochs=epochs, ids=ids)
    assert torch.isfinite(whole).all() and whole.min() >= -1 and whole.max() <= 1
    order, threads = np.random.default_rng(1).permutation(n), torch.get_num_threads()
    for rows in [order, order[:2], order[3:10], np.arange(5, 36, 3), *(np.array([i]) for i in range(n))]:
        part = view_of(batch[rows], cfg, epochs=epochs[rows], ids=[ids[i] for i in rows])
        assert torch.equal(part, whole[rows])
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(view_of(batch, cfg, epochs=epochs, ids=ids), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"view": 1}, {"epochs": np.ones(6, dtype=np.int64)}, {"ids": list("abcdef")}]
)
def test_another_key_gives_another_view(change):
    batch, cfg = pictures(6), ViewsConfig(recipe="simclr", jitter=1.0)
    a, b = view_of(batch, cfg), view_of(batch, cfg, **change)
    assert all(not torch.equal(a[i], b[i]) for i in range(6))


def test_one_operation_more_leaves_the_draws_of_the_others_alone():
    batch = pictures(6)
    plain, twice = (view_of(batch, ViewsConfig(recipe="mocov2", blur=0.0, flip=flip)) for flip in (0.0, 1.0))
    torch.testing.assert_close(plain.flip(-1), twice, atol=1e-5, rtol=0)


def test_compiled_operations_give_the_same_view(monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda act, **how: compiled(act, backend="aot_eager", fullgraph=True, **how))
    colour._operation.cache_clear()
    batch, key = pictures(24), {"seed": 0, "epochs": np.zeros(24, dtype=int), "ids": names(24), "view": 0}
    cfg = ViewsConfig(**EVERYTHING | {"solarize": 0.0})
    found = make_view(batch, cfg, **key, compiled=True)
    colour._operation.cache_clear()
    torch.testing.assert_close(found, make_view(batch, cfg, **key), atol=2e-5, rtol=0)


# -- own callables, refusals -------------------------------------------------------------------------------------------


OWN = """
import torch
from torchvision.transforms import v2

PIPELINE = v2.Compose([v2.RandomResizedCrop(32, scale=(0.2, 1), antialias=True), v2.RandomHorizontalFlip()])


def view(photo, number):
    return PIPELINE(photo)


def wrong(photo, number):
    return photo.float()
"""


def test_own_callables_draw_whole_views_by_the_same_keys(photos, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    cfg = ViewsConfig(recipe=f"{tmp_path / 'own.py'}:view")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = crops_of(photos, cfg, (0, 1, 2), 32)
    assert torch.equal(torch.get_rng_state(), before), "the training's generator is not moved"
    torch.manual_seed(2)
    assert torch.equal(crops_of(photos[:2], cfg, (0, 2), 32), whole[:2, [0, 2]])
    assert not torch.equal(whole[:, 0], whole[:, 1]) and not torch.equal(whole[:, 0], whole[:, 2])
    assert torch.equal(view_of(whole[:, 0], cfg), plain_view(whole[:, 0]))
    with pytest.raises(ConfigError, match=r"returned torch.float32 .*expected a tensor torch.uint8 \[3, 32, 32\]"):
        crops_of(photos[:1], ViewsConfig(recipe=f"{tmp_path / 'own.py'}:wrong"), size=32)
    with pytest.raises(ConfigError, match="did you mean simclr"):
        crops_of(photos[:1], ViewsConfig(recipe="simcrl"))


@pytest.mark.parametrize("name", ["saturation", "hue", "grayscale"])
def test_colour_operations_on_one_channel_are_refused(name):
    with pytest.raises(ConfigError, match=f"views.{name}=0.3 needs colour"):
        view_of(pictures(2, 1), ViewsConfig(**{name: 0.3}))


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
def test_wrong_crops_are_refused(batch):
    for act in (plain_view, lambda crops: view_of(crops, ViewsConfig())):
        with pytest.raises(ValueError, match="crops must be"):
            act(batch)


def test_an_empty_batch_gives_an_empty_view_and_the_input_is_left_alone():
    batch = pictures(4)
    copy = batch.clone()
    assert view_of(batch[:0], ViewsConfig(**EVERYTHING)).shape == (0, 3, 32, 32)
    view_of(batch, ViewsConfig(**EVERYTHING))
    assert torch.equal(batch, copy)
    with pytest.raises(ValueError, match="4 crops came with 3 ids"):
        view_of(batch, ViewsConfig(), ids=names(3))
