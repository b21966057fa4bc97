"""The chain of requests on one encoder: which images earlier requests forgot, without their ids or their bytes.

Two files in a run directory, of the operator alone (mode 0600). `chain.key`: 32 random bytes, the same in every run of
a chain. `chain.json`, which is the suppression list:

    {"version": 1, "lineage": random id,
     "requests": [{"images", "labels", "original", "unlearned"} ...],
     "forgotten": [[number of the request from 1, HMAC of the image, HMAC of its id, perceptual hash or null] ...]}

`original` and `unlearned` are digests of the encoder before and after; `labels` is how many a classifier of the members
has, 0 where a member has none. HMAC is HMAC-SHA256 under the key, hexadecimal: of b"image" and the 32 bytes of the
sha256 of the image's encoded bytes; of b"id" and the UTF-8 of its id in normal form. The perceptual hash is plain
(16 hexadecimal digits), or copies that were re-encoded could not be counted.
"""

from __future__ import annotations

import functools
import hmac
import json
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .errors import DataError
from .records import read_plain

CHAIN = "chain.json"
KEY = "chain.key"
VERSION = 1
KEY_BYTES = 32
_HEX = re.compile(r"[0-9a-f]{64}")
_NEAR = re.compile(r"[0-9a-f]{16}")

Forgotten = tuple[int, str, str, str | None]  # request, marks of image and id, perceptual hash


@dataclass(frozen=True)
class Chain:
    """See the top of this file. key: the chain's."""

    lineage: str
    key: bytes = field(repr=False)
    requests: tuple[dict[str, Any], ...] = ()
    forgotten: tuple[Forgotten, ...] = ()

    @classmethod
    def new(cls) -> Chain:
        """A chain without a request."""
        return cls(secrets.token_hex(16), secrets.token_bytes(KEY_BYTES))

    @classmethod
    def load(cls, path: Path) -> Chain:
        """The chain of a run directory, or of the file `chain.json`, whose key lies beside it.

        Raises:
            DataError: a file is missing or damaged.
        """
        path = path / CHAIN if path.is_dir() else path
        try:
            found = json.loads(read_plain(path))
            key = read_plain(path.with_name(KEY))
            rows = tuple((number, image, name, near) for number, image, name, near in found["forgotten"])
            good = found["version"] == VERSION and len(key) == KEY_BYTES and all(map(_is_row, rows))
            good = good and all(type(entry.get("labels", 0)) is int for entry in found["requests"])
            chain = cls(str(found["lineage"]), key, tuple(dict(entry) for entry in found["requests"]), rows)
        except OSError as error:
            raise DataError(
                f"{error.filename} cannot be read ({error.strerror or error}); a chain of requests is {CHAIN} and "
                f"beside it {KEY}, which a run writes when it has forgotten."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is damaged; restore it from a copy.") from error
        if not good or any(not 1 <= number <= len(chain.requests) for number, *_ in rows):
            raise DataError(f"{path} or its {KEY} is damaged; restore both from a copy.")
        return chain

    def save(self, folder: Path) -> None:
        """Write both files into a run directory, readable by their owner alone; the key first."""
        content = {
            "version": VERSION, "lineage": self.lineage, "requests": list(self.requests),
            "forgotten": [list(row) for row in self.forgotten],
        }  # fmt: skip
        _write_private(folder / KEY, self.key)
        _write_private(folder / CHAIN, (json.dumps(content, separators=(",", ":")) + "\n").encode())

    def image_mark(self, sha256: bytes) -> str:
        """HMAC of an image, by the 32 bytes of its digest."""
        return hmac.digest(self.key, b"image" + sha256, "sha256").hex()

    def id_mark(self, sample_id: str) -> str:
        """HMAC of an id in its normal form (`data.manifest.ids`)."""
        return hmac.digest(self.key, b"id" + sample_id.encode(), "sha256").hex()

    def requests_of(self, digests: Iterable[bytes]) -> list[int]:
        """For each image the number of the request that forgot it, 0 for none."""
        known = {image: number for number, image, _, _ in self.forgotten}
        return [known.get(self.image_mark(digest), 0) for digest in digests]

    def has_id(self, sample_id: str) -> bool:
        """Whether a request forgot an image of this id."""
        return self.id_mark(sample_id) in self._ids

    @functools.cached_property
    def _ids(self) -> frozenset[str]:
        return frozenset(name for _, _, name, _ in self.forgotten)

    def hashes(self) -> list[int]:
        """Perceptual hashes that are known."""
        return [int(near, 16) for *_, near in self.forgotten if near is not None]

    @property
    def labels(self) -> int:
        """Outputs that a classifier had before the last request; 0: none is known."""
        return max((entry.get("labels", 0) for entry in self.requests), default=0)

    def with_request(self, images: Sequence[tuple[bytes, str, int | None]], **facts: Any) -> Chain:
        """The chain with one more request. images: (sha256, id, perceptual hash) of each. facts: of the request."""
        number = len(self.requests) + 1
        rows = (
            (number, self.image_mark(digest), self.id_mark(name), None if near is None else f"{near:016x}")
            for digest, name, near in images
        )
        entry = {"images": len(images), **facts}
        return replace(self, requests=(*self.requests, entry), forgotten=(*self.forgotten, *rows))


def chain_facts(run: Path) -> dict[str, Any]:
    """Of a run directory: `lineage`, number of its `request`, and the `images` of each request; {} before it has one.

    Raises:
        DataError: a file is damaged.
    """
    if not (run / CHAIN).exists():
        return {}
    chain = Chain.load(run)
    return {"lineage": chain.lineage, "request": len(chain.requests), "images": [r["images"] for r in chain.requests]}


def _is_row(row: Sequence[Any]) -> bool:
    number, image, name, near = row
    marks = all(isinstance(mark, str) and _HEX.fullmatch(mark) for mark in (image, name))
    return type(number) is int and marks and (near is None or bool(_NEAR.fullmatch(near)))


def _write_private(path: Path, content: bytes) -> None:
    """Replace a file as a whole, durably, with mode 0600 from the first moment on."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
