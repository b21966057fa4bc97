from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, WebPImagePlugin

from distunlearn.data.decode import check_header, decode_image, to_square
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
    assert decoded.dtype == torch.uint8 and decoded.is_contiguous()
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


def test_to_square_crops_the_centre():
    image = torch.arange(3 * 5, dtype=torch.uint8).reshape(1, 3, 5)
    assert torch.equal(to_square(image, 3), image[:, :, 1:4])
    assert torch.equal(to_square(image.transpose(1, 2), 3), image.transpose(1, 2)[:, 1:4])


def test_to_square_halves_like_a_triangle_filter():
    image = torch.from_numpy(random_rgb(12, 12)).permute(2, 0, 1)
    size, scale = 6, 2.0
    weights = np.zeros((size, 12))  # antialiased bilinear: a triangle twice as wide, written out
    for out in range(size):
        distance = np.abs((np.arange(12) + 0.5) - (out + 0.5) * scale) / scale
        weights[out] = np.maximum(1 - distance, 0)
        weights[out] /= weights[out].sum()
    expected = np.einsum("yh,chw,xw->cyx", weights, image.numpy().astype(np.float64), weights)
    assert np.abs(to_square(image, size).numpy() - expected).max() <= 0.51


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 5000), (3, 5000, 1), (1, 2, 3)])
def test_to_square_of_odd_shapes(shape):
    image = torch.full(shape, 77, dtype=torch.uint8)
    out = to_square(image, 32)
    assert out.shape == (shape[0], 32, 32) and (out == 77).all()
