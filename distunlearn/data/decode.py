"""Untrusted image bytes -> uint8 tensors.

PNG, JPEG and WebP only, recognised by content. The size is read from the header and checked before
any pixel is decoded. Conversions, all deliberate: EXIF orientation is applied; transparency is laid
over white; palette, CMYK and YCbCr become RGB; colour profiles are ignored; of an animation the first
frame counts; 16-bit and floating-point greys are refused, because PIL would clip them silently.
"""

from __future__ import annotations

import io
import struct

import numpy as np
import torch
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from distunlearn.errors import DataError

__all__ = ["check_header", "decode_image", "to_square"]

# The plugin classes themselves, not Image.open: no other format is ever tried and PIL's own, laxer size limit
# (a warning) does not get in the way of ours.
_OPENERS = {
    "png": PngImagePlugin.PngImageFile,
    "jpg": JpegImagePlugin.JpegImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}


def check_header(data: bytes, sample_id: str, max_pixels: int) -> str:
    """The format of an encoded image, "png", "jpg" or "webp", after a check of its size from the header.

    Raises:
        DataError: another format, an unreadable header, no pixels, or width x height > max_pixels.
    """
    kind = _recognise(data, sample_id)
    try:
        width, height = _HEADER_SIZES[kind](data)
    except Exception as error:  # hostile bytes: the parsers raise anything from struct.error to SyntaxError
        raise DataError(f"The image {sample_id!r} has a damaged {kind} header; replace the file.") from error
    _check_size(width, height, sample_id, max_pixels)
    return kind


def decode_image(data: bytes, sample_id: str, max_pixels: int, channels: int) -> torch.Tensor:
    """Decode into uint8 [C, H, W] with C = channels (1 or 3), height and width as the viewer sees them.

    Raises:
        DataError: see `check_header`; also a truncated or damaged image, or an unsupported pixel format.
    """
    assert channels in (1, 3), channels
    kind = check_header(data, sample_id, max_pixels)
    try:
        image = _OPENERS[kind](io.BytesIO(data))
        _check_size(image.width, image.height, sample_id, max_pixels)
        if image.mode not in _MODES:
            raise DataError(
                f"The image {sample_id!r} has pixels of kind {image.mode}; convert it to 8 bits per channel first."
            )
        image.load()
        image = _flatten(ImageOps.exif_transpose(image))
        pixels = np.array(image.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    except DataError:
        raise
    except Exception as error:  # hostile bytes, see check_header
        raise DataError(f"The image {sample_id!r} ({kind}) cannot be decoded; replace the file.") from error
    tensor = torch.from_numpy(pixels)
    return tensor[None] if channels == 1 else tensor.permute(2, 0, 1).contiguous()


def to_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """Centre square of uint8 [C, H, W], resized to uint8 [C, size, size] (bilinear, antialiased when it shrinks).

    The crop comes before the resize: the same picture, but a 1 x 60,000,000 image stays cheap.
    """
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[:, top : top + side, left : left + side]
    if side == size:
        return square.contiguous()
    resized = torch.nn.functional.interpolate(
        square[None].float(), size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return resized[0].round_().clamp_(0, 255).to(torch.uint8)


def _recognise(data: bytes, sample_id: str) -> str:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise DataError(f"The image {sample_id!r} ({len(data)} bytes) is not PNG, JPEG or WebP; convert or remove it.")


def _check_size(width: int, height: int, sample_id: str, max_pixels: int) -> None:
    if width < 1 or height < 1 or width * height > max_pixels:
        raise DataError(
            f"The image {sample_id!r} claims {width} x {height} pixels; allowed are 1 to {max_pixels} in all "
            "(data.max_pixels), so remove it or raise the limit."
        )


def _png_size(data: bytes) -> tuple[int, int]:
    if data[12:16] != b"IHDR":
        raise ValueError("no IHDR chunk")
    return struct.unpack(">II", data[16:24])


def _jpeg_size(data: bytes) -> tuple[int, int]:
    return JpegImagePlugin.JpegImageFile(io.BytesIO(data)).size  # reads markers up to the frame header only


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from a VP8X, VP8L or VP8 chunk (RFC 9649); PIL's plugin would allocate the canvas first."""
    chunk = data[12:16]
    if chunk == b"VP8X":
        return (
            1 + int.from_bytes(data[24:27], "little"),
            1 + int.from_bytes(data[27:30], "little") if len(data) >= 30 else 0,
        )
    if chunk == b"VP8L" and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no VP8 chunk")


_HEADER_SIZES = {"png": _png_size, "jpg": _jpeg_size, "webp": _webp_size}


def _flatten(image: Image.Image) -> Image.Image:
    """Lay transparency over white; opaque images pass through."""
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)
