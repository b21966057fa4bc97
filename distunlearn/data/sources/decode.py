"""Untrusted image bytes -> uint8 tensors.

PNG, JPEG, WebP, BMP, TIFF, GIF and (with pillow-heif) HEIC only, recognised by content. The size is read from the
header and checked before any pixel is decoded. Conversions, all deliberate: EXIF orientation is applied; transparency
is laid over white; palette, CMYK and YCbCr become RGB; colour profiles are ignored; of an animation the first frame
counts; 16-bit and floating-point greys are refused, because PIL would clip them silently.

PIL decides what an image is. The pixels of plain colour JPEGs come from simplejpeg, where it is installed, or else from
torchvision: both are faster and give the very same pixels. A comparison at first use makes sure of that on this
machine; without such a decoder PIL decodes them too.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from functools import cache
from importlib import import_module

import numpy as np
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from distunlearn.errors import UndecodableError

# Endings of files that are images, each with the kind it promises; what a file is, its content says.
SUFFIXES = {
    "png": "png", "jpg": "jpg", "jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "webp": "webp", "bmp": "bmp", "dib": "bmp",
    "tif": "tif", "tiff": "tif", "gif": "gif", "heic": "heic", "heif": "heic",
}  # fmt: skip
PngImagePlugin.MAX_TEXT_CHUNK = 16 << 20  # of a compressed chunk, such as a colour profile; PIL's 1 MiB is too small

# The plugin classes themselves, not Image.open: no other format is ever tried and PIL's own, laxer size limit
# (a warning) does not get in the way of ours.
_OPENERS = {
    "png": PngImagePlugin.PngImageFile,
    "jpg": JpegImagePlugin.JpegImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tif": TiffImagePlugin.TiffImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "heic": lambda stream: _heif_opener()(stream),
}
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_WITH_ALPHA = {"LA", "La", "PA", "RGBA", "RGBa"}
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_ORIENTATION = 0x0112  # EXIF tag; 1: as the viewer sees it
MAX_SCANS = 100  # of a progressive JPEG; encoders write about 10, and each costs as much as a whole image
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # of a JPEG, but for restarts and stuffed bytes
_SAMPLINGS = {(1, 1), (2, 1), (2, 2)}  # of the luma of JPEGs that need not be decoded by PIL: 4:4:4, 4:2:2, 4:2:0


def check_header(data: bytes, sample_id: str, max_pixels: int) -> str:
    """The format of an encoded image (a value of `SUFFIXES`), after a check of its size. Errors: see `read_header`."""
    return read_header(data, sample_id, max_pixels)[0]


def read_header(data: bytes, sample_id: str, max_pixels: int) -> tuple[str, int, int]:
    """(format, a value of `SUFFIXES`; width; height) of an encoded image, in pixels as they are stored.

    Raises:
        UndecodableError: another format, an unreadable header, no pixels, or width x height > max_pixels.
    """
    kind = _recognise(data, sample_id)
    try:
        width, height = _HEADER_SIZES[kind](data) if kind in _HEADER_SIZES else _OPENERS[kind](io.BytesIO(data)).size
    except UndecodableError as error:
        raise UndecodableError(f"The image {sample_id!r} {error}") from error
    except Exception as error:  # hostile bytes: the parsers raise anything from struct.error to SyntaxError
        raise UndecodableError(f"The image {sample_id!r} has a damaged {kind} header; replace the file.") from error
    _check_size(width, height, sample_id, max_pixels)
    return kind, width, height


def image_size(data: bytes, sample_id: str, max_pixels: int) -> tuple[int, int]:
    """(width, height) in pixels as they are stored; 0 and 0 of an image that `read_header` refuses."""
    try:
        return read_header(data, sample_id, max_pixels)[1:]
    except UndecodableError:
        return 0, 0


def open_image(data: bytes, sample_id: str, max_pixels: int) -> Image.Image:
    """The image as PIL opens it: header read and size checked, no pixel decoded yet. Errors: see `check_header`."""
    return _OPENERS[check_header(data, sample_id, max_pixels)](io.BytesIO(data))


def decode_image(data: bytes, sample_id: str, max_pixels: int, channels: int, bound: int | None = None) -> torch.Tensor:
    """Decode into uint8 [C, H, W], any strides, with C = channels (1 or 3), height and width as the viewer sees them.

    bound: an image whose shorter side has at least twice as many pixels is shrunk, but not below: a JPEG by decoding
        it at a smaller one of its scales (1/2, 1/4, 1/8), the rest and other formats by means over squares of pixels.

    Raises:
        UndecodableError: see `check_header`; also a truncated or damaged image, or an unsupported pixel format.
    """
    assert channels in (1, 3), channels
    kind = _recognise(data, sample_id)
    if kind != "jpg":  # of a JPEG PIL reads no more than the header either, before its size is checked
        check_header(data, sample_id, max_pixels)
    else:
        _check_scans(data, sample_id)
    try:
        image = _OPENERS[kind](io.BytesIO(data))
        _check_size(image.width, image.height, sample_id, max_pixels)
        if image.mode not in _MODES:
            raise UndecodableError(
                f"The image {sample_id!r} has pixels of kind {image.mode}; convert it to 8 bits per channel first."
            )
        shrunk = bound is not None and kind == "jpg" and _shrink(image, bound)
        if channels == 3 and not shrunk and kind == "jpg" and _is_plain(image, data):
            pixels = _quickly(data)
            if pixels is not None:
                return pixels
        image.load()
        image = _flatten(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
        if bound is not None and min(image.size) >= 2 * bound:
            image = image.reduce(min(image.size) // bound)
        array = np.array(image, dtype=np.uint8)
    except UndecodableError:
        raise
    except Exception as error:  # hostile bytes, see check_header
        raise UndecodableError(f"The image {sample_id!r} ({kind}) cannot be decoded; replace the file.") from error
    tensor = torch.from_numpy(array)
    return tensor[None] if channels == 1 else tensor.permute(2, 0, 1)


def _shrink(image: Image.Image, smallest: int) -> bool:
    """Have a JPEG decoded at the smallest scale whose shorter side has at least `smallest` pixels; True if below 1.

    Its mode stays: with another one PIL would also take the brightness from the file in place of computing it.
    """
    width, height = before = image.size
    shorter = min(before)
    image.draft(image.mode, (width * smallest // shorter, height * smallest // shorter))
    return image.size != before


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """A whole colour JPEG, stored as YCbCr in a usual sampling, that needs no turning."""
    layers = getattr(image, "layer", [])
    return (
        image.mode == "RGB"
        and len(layers) == 3
        and tuple(layers[0][1:3]) in _SAMPLINGS
        and all(tuple(layer[1:3]) == (1, 1) for layer in layers[1:])
        and image.info.get("adobe_transform", 1) == 1
        and data.endswith(b"\xff\xd9")
        and image.getexif().get(_ORIENTATION, 1) == 1
    )


def _quickly(data: bytes) -> torch.Tensor | None:
    """uint8 [3, H, W] of a plain JPEG by the faster decoder; None: PIL is to decide."""
    decoder = _quick_decoder()
    if decoder is None:
        return None
    try:
        return decoder(data)
    except (ValueError, RuntimeError):
        return None


@cache
def _quick_decoder() -> Callable[[bytes], torch.Tensor] | None:
    """The first decoder that is there and gives PIL's pixels on noise in every sampling."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8))
    samples = []
    for sampling in range(len(_SAMPLINGS)):
        buffer = io.BytesIO()
        noise.save(buffer, "JPEG", quality=90, subsampling=sampling)
        pixels = np.array(JpegImagePlugin.JpegImageFile(io.BytesIO(buffer.getvalue())))
        samples.append((buffer.getvalue(), torch.from_numpy(pixels).permute(2, 0, 1)))
    for decoder in (_by_simplejpeg, _by_torchvision):
        try:
            if all(torch.equal(decoder(data), pixels) for data, pixels in samples):
                return decoder
        except Exception:  # not installed, or builds that do not fit each other: they fail in many ways
            continue
    return None


def _by_simplejpeg(data: bytes) -> torch.Tensor:
    import simplejpeg

    pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _by_torchvision(data: bytes) -> torch.Tensor:
    import torchvision  # noqa: F401  registers the operator, whose Python function warns at each call since 0.29

    return torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), 0, False)


def find_decoder() -> None:
    """What else the first image would do: look for the fastest decoder. For once before processes are forked."""
    _quick_decoder()


def _recognise(data: bytes, sample_id: str) -> str:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:2] == b"BM":
        return "bmp"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "tif"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        return "heic"
    raise UndecodableError(
        f"The image {sample_id!r} ({len(data)} bytes) is not PNG, JPEG, WebP, BMP, TIFF, GIF or HEIC; "
        "convert or remove it."
    )


def _heif_opener() -> Callable[[io.BytesIO], Image.Image]:
    try:
        return import_module("pillow_heif").HeifImageFile
    except ImportError as error:
        raise UndecodableError("is HEIC, which needs pillow-heif; install distunlearn[heif], or convert it.") from error


def _check_size(width: int, height: int, sample_id: str, max_pixels: int) -> None:
    if width < 1 or height < 1 or width * height > max_pixels:
        raise UndecodableError(
            f"The image {sample_id!r} claims {width} x {height} pixels; allowed are 1 to {max_pixels} in all "
            "(data.max_pixels), so remove it or raise the limit."
        )


def _check_scans(data: bytes, sample_id: str) -> None:
    """UndecodableError if a JPEG has more than `MAX_SCANS` scans: a small file would be decoded for minutes."""
    if data.count(b"\xff\xda") <= MAX_SCANS:  # fast, and true of all but hostile files and films
        return
    at, scans = 2, 0
    while (marker := _MARKER.search(data, at)) is not None:
        code = data[marker.start() + 1]
        if code == 0xD9:  # what follows is another image, or a film
            return
        scans += code == 0xDA
        if scans > MAX_SCANS:
            raise UndecodableError(
                f"The image {sample_id!r} is a JPEG of more than {MAX_SCANS} scans; save it again as an ordinary one."
            )
        at = marker.end() + (
            0 if code in (0x01, 0xD8) else int.from_bytes(data[marker.end() : marker.end() + 2], "big")
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
