from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, WebPImagePlugin

from distunlearn.data.sources import decode
from distunlearn.data.sources.decode import check_header, decode_image
from distunlearn.errors import DataError

LIMIT = 1_000_000


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width, height):
    """A well-formed PNG whose header claims a size that its few bytes of pixels do not have."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def random_rgb(height=9, width=7):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_png_pixels_survive_exactly():
    pixels = random_rgb()
    decoded = decode_image(encode(Image.fromarray(pixels)), "x", LIMIT, 3)
    assert decoded.dtype == torch.uint8
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels)


def test_grey_is_repeated_for_three_channels_and_kept_for_one():
    pixels = random_rgb()[..., 0]
    data = encode(Image.fromarray(pixels))
    assert np.array_equal(decode_image(data, "x", LIMIT, 1)[0].numpy(), pixels)
    assert all(np.array_equal(plane.numpy(), pixels) for plane in decode_image(data, "x", LIMIT, 3))


@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"lossless": True}), ("WEBP", {})])
def test_jpeg_and_webp(kind, options):
    pixels = np.full((8, 10, 3), (200, 100, 50), dtype=np.uint8)
    data = encode(Image.fromarray(pixels), kind, **options)
    decoded = decode_image(data, "x", 80, 3)
    assert decoded.shape == (3, 8, 10)
    assert (decoded.permute(1, 2, 0).int() - torch.from_numpy(pixels).int()).abs().max() <= 4
    with pytest.raises(DataError, match="10 x 8 pixels"):
        decode_image(data, "x", 79, 3)


def test_webp_with_alpha_has_its_size_checked():
    data = encode(Image.new("RGBA", (12, 6), (0, 0, 0, 128)), "WEBP", exif=b"Exif\0\0")
    assert data[12:16] == b"VP8X"
    with pytest.raises(DataError, match="12 x 6"):
        check_header(data, "x", 71)
    assert check_header(data, "x", 72) == "webp"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_common_modes_of_white_are_white(mode):
    data = encode(Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode))
    assert (decode_image(data, "x", LIMIT, 1) == 255).all()


def test_cmyk_jpeg_is_converted():
    data = encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert (decode_image(data, "x", LIMIT, 3) >= 250).all()


def test_transparency_is_laid_over_white():
    data = encode(Image.new("RGBA", (2, 2), (0, 0, 0, 0)))
    assert (decode_image(data, "x", LIMIT, 3) == 255).all()
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (decode_image(encode(palette, transparency=0), "x", LIMIT, 3) == 255).all()


def test_exif_orientation_is_applied():
    image = Image.fromarray(random_rgb(6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    decoded = decode_image(encode(image, "PNG", exif=exif), "x", LIMIT, 3)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), np.rot90(random_rgb(6, 4), -1))


def test_sixteen_bit_grey_is_refused():
    data = encode(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)))
    with pytest.raises(DataError, match="'scan/1' has pixels of kind I;16"):
        decode_image(data, "scan/1", LIMIT, 1)


def test_huge_claim_is_refused_from_the_header(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the image was opened")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "__init__", never)
    data = png_claiming(60_000, 60_000)
    assert len(data) < 100
    with pytest.raises(DataError, match=r"'big' claims 60000 x 60000 pixels; allowed are 1 to 64000000"):
        decode_image(data, "big", 64_000_000, 3)


def test_huge_webp_claim_is_refused_from_the_header(monkeypatch):
    monkeypatch.setattr(WebPImagePlugin, "_webp", None)
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff" * 2
    with pytest.raises(DataError, match="16777216 x 16777216"):
        decode_image(b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body, "big", 64_000_000, 3)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not found</html>",
        b"GIF89a" + bytes(20),
        b"%PDF-1.4",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xe0" + bytes(40),
        b"RIFF\0\0\0\0WEBP",
        b"RIFF\0\0\0\0WEBPVP8X\0\0\0\0" + bytes(3),
        b"RIFF\0\0\0\0WEBPVP8L" + bytes(40),
        png_claiming(0, 5),
        png_claiming(30, 30),
        encode(Image.fromarray(random_rgb(50, 50)))[:-800],
        encode(Image.fromarray(random_rgb(50, 50)), "JPEG")[:-500],
        encode(Image.fromarray(random_rgb(50, 50)), "WEBP")[:-500],
    ],
)
def test_damaged_or_foreign_bytes_are_refused_by_name(data):
    with pytest.raises(DataError, match="'album/1.png'") as caught:
        decode_image(data, "album/1.png", LIMIT, 3)
    assert "\n" not in str(caught.value)


# -- faster decoders: the very same pixels ---------------------------------------------------------------------------


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth areas, an edge and noise."""
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    pixels = np.array(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels[:, width // 3] += 90
    return Image.fromarray((pixels + draw.normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8))


def jpegs() -> dict[str, bytes]:
    found = {}
    for sampling in (0, 1, 2):
        for progressive in (False, True):
            for quality, size in ((35, (33, 50)), (92, (64, 48)), (100, (17, 16))):
                name = f"{sampling} {progressive} {quality}"
                options = {"subsampling": sampling, "progressive": progressive, "quality": quality}
                found[name] = encode(photo(*size), "JPEG", restart_marker_blocks=quality % 3, **options)
    exif = Image.Exif()
    for turned in range(1, 9):
        exif[0x0112] = turned
        found[f"turned {turned}"] = encode(photo(20, 30), "JPEG", exif=exif)
    found["grey"] = encode(photo(20, 30).convert("L"), "JPEG")
    found["cmyk"] = encode(photo(20, 30).convert("CMYK"), "JPEG")
    found["kept as RGB"] = encode(photo(20, 30), "JPEG", keep_rgb=True)
    found["trailing bytes"] = encode(photo(20, 30), "JPEG") + b"more"
    return found


def outcome(data: bytes, channels: int = 3) -> torch.Tensor | str:
    try:
        return decode_image(data, "x", LIMIT, channels)
    except DataError as error:
        return str(error)


def same(a: torch.Tensor | str, b: torch.Tensor | str) -> bool:
    return a == b if isinstance(a, str) or isinstance(b, str) else torch.equal(a, b)


@pytest.fixture(params=["simplejpeg", "torchvision"])
def quick(request, monkeypatch):
    """One of the faster decoders, which counts its images."""
    decoder = getattr(decode, f"_by_{request.param}")
    used = []

    def counting(data: bytes) -> torch.Tensor:
        pixels = decoder(data)
        used.append(data)
        return pixels

    monkeypatch.setattr(decode, "_quick_decoder", lambda: counting)
    return used


def test_a_faster_decoder_is_found_here():
    """torchvision is a dependency, so the fast path is there; without it the tests below would prove nothing."""
    assert decode._quick_decoder() in (decode._by_simplejpeg, decode._by_torchvision)


def test_faster_decoders_give_the_same_pixels(quick, monkeypatch):
    found = {name: outcome(data) for name, data in jpegs().items()}
    grey = outcome(jpegs()["2 False 92"], channels=1)
    plain = {data for name, data in jpegs().items() if name[0].isdigit() or name == "turned 1"}
    assert set(quick) == plain and len(plain) == 19
    monkeypatch.setattr(decode, "_quick_decoder", lambda: None)
    for name, data in jpegs().items():
        assert not isinstance(found[name], str) and same(found[name], outcome(data)), name
    assert same(grey, outcome(jpegs()["2 False 92"], channels=1))


def test_faster_decoders_give_the_same_verdict_on_damaged_images(quick, monkeypatch, capfd):
    draw = np.random.default_rng(0)
    damaged = []
    for progressive in (False, True):
        data = encode(photo(33, 50), "JPEG", progressive=progressive)
        damaged += [data[:cut] for cut in range(0, len(data), 37)]
        damaged += [data[:cut] + b"\xff\xd9" for cut in range(99, len(data), 37)]
        for _ in range(150):
            flipped = bytearray(data)
            for place in draw.integers(2, len(data) - 2, draw.integers(1, 4)):
                flipped[place] = draw.integers(256)
            damaged.append(bytes(flipped))
    found = [outcome(data) for data in damaged]
    monkeypatch.setattr(decode, "_quick_decoder", lambda: None)
    assert all(same(a, outcome(data)) for a, data in zip(found, damaged, strict=True))
    refused = sum(isinstance(a, str) for a in found)
    assert 50 < refused < len(found) - 50 and len(quick) > 50  # both kinds, and the faster one decoded many
    capfd.readouterr()  # libjpeg complains on standard error


def test_a_decoder_with_other_pixels_is_not_used(monkeypatch):
    def brighter(data: bytes) -> torch.Tensor:
        return decode._by_torchvision(data).add(1)

    def missing(data: bytes) -> torch.Tensor:
        raise ImportError

    monkeypatch.setattr(decode, "_by_simplejpeg", brighter)
    assert decode._quick_decoder.__wrapped__() is decode._by_torchvision
    monkeypatch.setattr(decode, "_by_torchvision", missing)
    assert decode._quick_decoder.__wrapped__() is None


# -- large photos are decoded smaller --------------------------------------------------------------------------------


@pytest.mark.parametrize("turned", [1, 6])
@pytest.mark.parametrize(("bound", "scale"), [(100, 2), (99, 2), (50, 4), (26, 4), (25, 8), (101, 1)])
def test_jpegs_are_decoded_at_the_smallest_scale_that_is_large_enough(bound, scale, turned):
    """A shorter side of 200 pixels at 1/scale still has `bound` of them; the picture stays nearly the same."""
    exif = Image.Exif()
    exif[0x0112] = turned
    data = encode(photo(200, 304), "JPEG", quality=95, exif=exif)
    whole, small = (decode_image(data, "x", LIMIT, 3, limit) for limit in (None, bound))
    assert list(small.shape[1:]) == [side // scale for side in whole.shape[1:]]
    mean = torch.nn.functional.avg_pool2d(whole[None].double(), scale)[0]
    assert (mean - small).abs().mean() < 6
    assert (mean - small.flip(-1)).abs().mean() > 10  # control: another picture is farther off


@pytest.mark.parametrize(
    ("kind", "bound", "scale"), [("PNG", 66, 3), ("PNG", 101, 1), ("WEBP", 50, 4), ("JPEG", 10, 16)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_other_formats_and_very_large_jpegs_are_means_over_squares(kind, bound, scale, channels):
    data = encode(photo(200, 300), kind)
    whole, small = (decode_image(data, "x", LIMIT, channels, limit) for limit in (None, bound))
    assert list(small.shape[1:]) == [-(-side // scale) for side in whole.shape[1:]]
    mean = torch.nn.functional.avg_pool2d(whole[None].double(), scale, ceil_mode=True)[0]
    assert (mean - small).abs().max() <= (1 if kind != "JPEG" else 255)
    assert (mean - small).abs().mean() < 3
