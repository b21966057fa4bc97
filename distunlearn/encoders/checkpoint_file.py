"""The content of a foreign checkpoint: nothing in it is executed, and a hostile one ends soon and in little memory.

A file is read by what it is, whatever its ending: safetensors, or what `torch.save` writes, by `weights_only=True` and
never otherwise. Objects that training scripts keep beside the weights (settings, the best accuracy) become inert
stand-ins; a class of any other package is named and the file refused.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from distunlearn.common.text import printable
from distunlearn.errors import EncoderError

HEADER_BYTES = 8 << 20  # of a safetensors header: 80,000 tensors; an encoder has some thousand
PICKLE_BYTES = 4 << 20  # of the pickle in an archive, which is read byte by byte; a ViT-g with its optimizer: 0.6 MB
PICKLE_READS = 4_000_000  # the same for files of before PyTorch 1.6, whose pickle has no length of its own
ENTRIES = 65_535  # of an archive: more need a directory that is slow to read
CLASSES = 64  # kinds of objects beside the tensors
# Packages whose objects stand beside weights in published checkpoints.
SETTINGS = frozenset(
    "addict argparse collections easydict fvcore hydra lightning lightning_fabric ml_collections mmcv mmengine numpy "
    "omegaconf pathlib pytorch_lightning typing yacs".split()
)
TYPES = frozenset(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "object", "str", "tuple"))
UNKNOWN = re.compile(r"GLOBAL (\S+) was not an allowed global")


class _Inert:
    """Stands for an object beside the tensors: takes what it is given and keeps nothing."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Bounded(io.BufferedReader):
    """A file that answers a limited number of reads, none longer than itself."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.reads, self.size = 0, path.stat().st_size

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > PICKLE_READS:
            raise ValueError(f"its pickle has more than {PICKLE_READS} parts")
        return super().read(-1 if size is None else min(size, self.size))


def shown(path: Path) -> str:
    """The path in quotes, fit to be printed."""
    return repr(printable(path))


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """The file's content as a mapping; tensors on the CPU, those of an archive mapped into memory.

    Raises:
        EncoderError: a file that is missing, damaged, unsafe, of another kind, or larger than weights need.
    """
    if not path.is_file():
        raise EncoderError(f"encoder.checkpoint {shown(path)} is not a file; expected weights; check the path.")
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix.lower() == ".safetensors" or head[8:] == b"{":
        return _read_safetensors(path)
    content = _read_archive(path) if head.startswith(b"PK") else _load(path)
    if not isinstance(content, Mapping):
        raise EncoderError(
            f"{shown(path)} holds a {type(content).__name__}, expected a state dict; "
            "save the encoder's state_dict() and use that file."
        )
    return content


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    try:
        _check_header(path)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise EncoderError(
            f"{shown(path)} is no complete safetensors file ({printable(error)}); expected header and data to "
            "agree; copy the file again."
        ) from error


def _check_header(path: Path) -> None:
    """ValueError where a header is too long, or names a tensor twice: two readers could then see different weights."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name occurs twice in its header")
        return found

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, expected at most {HEADER_BYTES}")
        json.loads(file.read(length), object_pairs_hook=unique)


def _read_archive(path: Path) -> Any:
    """A zip file of torch.save, checked before torch sees it: torch never compresses, and unpacks without a limit."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        end = file.read()
    at = end.rfind(b"PK\x05\x06")
    if at < 0 or int.from_bytes(end[at + 10 : at + 12], "little") >= ENTRIES:
        raise EncoderError(f"{shown(path)} is no complete archive of weights (its end is missing); copy it again.")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError) as error:  # another version of zip, encrypted
        raise _unreadable(path, error) from error
    names = {entry.filename.rpartition("/")[2]: entry for entry in entries}
    if "constants.pkl" in names:
        raise EncoderError(
            f"{shown(path)} is a TorchScript program, which would have to be run; expected weights; where it is "
            "trusted, save torch.jit.load(FILE).state_dict() and use that file."
        )
    if "data.pkl" not in names:
        raise EncoderError(
            f"{shown(path)} is an archive without weights of torch.save (no data.pkl), expected a checkpoint; unpack "
            "it and use the file of weights in it."
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise EncoderError(
            f"{shown(path)} is a compressed archive, which torch.save never writes; expected weights as they were "
            "saved; unpack it and use the file of weights in it."
        )
    if names["data.pkl"].file_size > PICKLE_BYTES:
        raise EncoderError(
            f"{shown(path)} holds {names['data.pkl'].file_size} bytes besides its tensors, expected at most "
            f"{PICKLE_BYTES}; save the encoder's state_dict() alone and use that file."
        )
    return _load(path, mmap=True)


def _load(path: Path, **options: Any) -> Any:
    """torch.load of weights only; each package of SETTINGS that the file asks for is answered with a stand-in."""
    allowed: list[Any] = [argparse.Namespace]
    while True:
        try:
            with torch.serialization.safe_globals(allowed), _Bounded(path) as file:
                return torch.load(path if options else file, map_location="cpu", weights_only=True, **options)
        except pickle.UnpicklingError as error:
            asked = UNKNOWN.search(str(error))
            name = asked[1] if asked else ""
            if not asked or len(allowed) > CLASSES or name in [n for _, n in allowed[1:]]:
                raise _damaged(path, name) from error
            if name.partition(".")[0] not in SETTINGS and f"builtins.{name.removeprefix('builtins.')}" not in TYPES:
                raise _damaged(path, name) from error
            full = f"builtins.{name}" if f"builtins.{name}" in TYPES else name
            allowed.append((_stand_in(full), full))
        except Exception as error:  # a damaged archive fails in many ways
            raise _unreadable(path, error) from error


def _stand_in(name: str) -> Any:
    """torch fills no mapping but its own kinds; a defaultdict is made by a call, the others are not."""
    if name == "collections.defaultdict":
        return _empty
    return OrderedDict if "dict" in name.rpartition(".")[2].lower() and name not in TYPES else _Inert


def _empty(*_: Any) -> OrderedDict:
    return OrderedDict()


def _damaged(path: Path, name: str) -> EncoderError:
    which = f" ({printable(name)})" if name else ""
    return EncoderError(
        f"{shown(path)} is damaged or holds Python objects besides tensors{which}, which could run code and are never "
        "loaded; expected tensors and plain settings; have its owner save a state_dict, best as .safetensors."
    )


def _unreadable(path: Path, error: Exception) -> EncoderError:
    return EncoderError(
        f"{shown(path)} cannot be read ({type(error).__name__}: {printable(error)}), expected safetensors or a file "
        "written by torch.save; copy the file again, or save the encoder's state_dict() and use that file."
    )
