"""Decoded images of a manifest, with a cache of bounded size, and what was found undecodable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from distunlearn.config.schema import RunConfig
from distunlearn.data.loading.dataset import ImageDataset
from distunlearn.data.loading.loader import Decoded, Loader
from distunlearn.data.loading.undecodable import Undecodable
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.storage.retry import Counts
from distunlearn.errors import DataError

PIECE = 32  # most images that are decoded at once outside of a batch


class ImageStore:
    """Decoded images of a manifest, uint8 [C, S, S] each, with a cache of bounded size.

    The cache is one uint8 tensor [rows, C, S, S] and a dictionary id -> row. A role is cached as a whole or
    not at all: roles are admitted in the order of first use while they fit into cache_mib.

    Args:
        manifest: of verified shards.
        image_size: S, pixels. channels: C, 1 or 3.
        cache_mib: size limit of the cache, MiB; 0: no cache.
        max_pixels: images above are refused before decoding.
        workers: processes that read and decode ahead; 0: none. prefetch: batches that each is ahead.
        decode: see `decode_square`. retries: see `Reader`. max_undecodable: see `Undecodable`.
        pin: images are given in page-locked memory, for a GPU.

    Attributes:
        undecodable: images that turned out to be none.
        loader: what reads and decodes.
    """

    def __init__(
        self,
        manifest: Manifest,
        image_size: int,
        channels: int,
        cache_mib: int,
        max_pixels: int,
        *,
        workers: int = 0,
        prefetch: int = 2,
        decode: str = "exact",
        retries: int = 4,
        max_undecodable: float = 0.001,
        pin: bool = False,
    ) -> None:
        self.manifest = manifest
        self.shape = (channels, image_size, image_size)
        dataset = ImageDataset(manifest, image_size, channels, max_pixels, decode, retries)
        self.loader = Loader(dataset, workers, prefetch, pin)
        self.undecodable = Undecodable(manifest, max_undecodable)
        self._pin = pin
        self._free = min(len(manifest), (cache_mib << 20) // (channels * image_size * image_size))
        # Untouched rows cost no memory: the operating system hands out pages on first write.
        self._cache = torch.empty((self._free, *self.shape), dtype=torch.uint8)
        self._rows: dict[str, int] = {}
        self._admitted: set[str] = set()
        self._loaded: set[str] = set()
        self._tried: set[str] = set()  # by `decodable`, which is asked for the same images again and again

    @property
    def counts(self) -> Counts:
        """What reading and decoding cost, in all processes."""
        return self.loader.counts

    def close(self) -> None:
        """End the workers and close the shards; what is used afterwards opens them again."""
        self.loader.close()

    def load(self, roles: str | Sequence[str]) -> bool:
        """Fill the cache with these roles.

        Returns:
            False, with nothing read, if they do not fit; True once all of them are cached.

        Raises:
            DataError, CoverageError: see `Reader.read` and `Undecodable`.
        """
        names = {roles} if isinstance(roles, str) else set(roles)
        if names <= self._loaded:
            return True
        if not self._admit(names):
            return False
        missing = [i for i in self.manifest.select(roles).ids if i not in self._rows and i not in self.undecodable]
        self.undecodable.add(self._decode(missing, None))
        self._loaded |= names
        return True

    def batch(self, ids: Sequence[str]) -> torch.Tensor:
        """Cached images as uint8 [n, C, S, S], a copy; KeyError for an id that is not cached."""
        rows = torch.tensor([self._rows[sample_id] for sample_id in ids], dtype=torch.int64)
        images = torch.empty((len(ids), *self.shape), dtype=torch.uint8, pin_memory=self._pin)
        return torch.index_select(self._cache, 0, rows, out=images)

    def by_offset(self, ids: Sequence[str]) -> torch.Tensor:
        """Images of any ids, in this order, as uint8 [n, C, S, S]; those not cached are read.

        Raises:
            DataError: see `Reader.read`; or one of them cannot be decoded.
        """
        images = torch.empty((len(ids), *self.shape), dtype=torch.uint8)
        bad = self.fill(ids, images)
        if bad:
            self.undecodable.add(bad)
            raise DataError(next(iter(bad.values())))
        return images

    def decodable(self, ids: Sequence[str]) -> list[str]:
        """The ids without those that cannot be decoded, which are taken note of.

        Raises:
            DataError, CoverageError: see `Reader.read` and `Undecodable`.
        """
        new = [sample_id for sample_id in ids if sample_id not in self._tried and sample_id not in self._rows]
        for start in range(0, len(new), 8 * PIECE):
            part = new[start : start + 8 * PIECE]
            self.undecodable.add(self.fill(part, torch.empty((len(part), *self.shape), dtype=torch.uint8)))
        self._tried.update(new)
        return [sample_id for sample_id in ids if sample_id not in self.undecodable]

    def fill(self, ids: Sequence[str], images: torch.Tensor) -> dict[str, str]:
        """Write the images of any ids to images [n, C, S, S]; returns {id: why} of those that cannot be decoded."""
        for role in {sample.role for sample in self.manifest.lookup(ids)}:
            self._admit({role})
        bad = {i: self.undecodable.found[i] for i in ids if i in self.undecodable}
        rows = [row for row, i in enumerate(ids) if i not in self._rows and i not in bad]
        bad |= self._decode([ids[row] for row in rows], images, rows)
        for row, sample_id in enumerate(ids):
            if sample_id in self._rows:
                images[row] = self._cache[self._rows[sample_id]]
        return bad

    def _decode(
        self, ids: Sequence[str], images: torch.Tensor | None, rows: Sequence[int] | None = None
    ) -> dict[str, str]:
        """Decode ids into the cache, if their role has room, and id i into images[rows[i]]; returns those that fail."""
        bad: dict[str, str] = {}
        for first, decoded in self._in_pieces(ids):
            failures = dict(decoded.failures)
            samples = self.manifest.lookup(ids[first : first + len(decoded.images)])
            for row, sample in enumerate(samples):
                if row in failures:
                    bad[sample.id] = failures[row]
                    continue
                if images is not None and rows is not None:
                    images[rows[first + row]] = decoded.images[row]
                if sample.role in self._admitted:
                    self._cache[self._rows.setdefault(sample.id, len(self._rows))] = decoded.images[row]
        return bad

    def _in_pieces(self, ids: Sequence[str]) -> Iterator[tuple[int, Decoded]]:
        """(place of the first, images) of all ids in order: by the workers, unless there is too little for them."""
        pieces = [ids[start : start + PIECE] for start in range(0, len(ids), PIECE)]
        shared = self.loader.workers > 0 and len(pieces) > 1
        if shared:
            self.loader.start(pieces)
        for number, piece in enumerate(pieces):
            yield number * PIECE, self.loader.next() if shared else self.loader.here(piece)

    def _admit(self, roles: set[str]) -> bool:
        """Reserve room for the roles that have none yet; all of them or none."""
        new = roles - self._admitted
        needed = sum(len(self.manifest.select(role).ids) for role in new)
        if needed > self._free:
            return False
        self._free -= needed
        self._admitted |= new
        return True


def open_store(manifest: Manifest, cfg: RunConfig, device: torch.device | None = None) -> ImageStore:
    """The images of a manifest as the settings want them shown and read; `close` it in the end.

    device: that computes with them.
    """
    return ImageStore(
        manifest,
        cfg.encoder.image_size,
        cfg.encoder.in_chans,
        cfg.data.cache_mib,
        cfg.data.max_pixels,
        workers=cfg.data.workers,
        prefetch=cfg.data.prefetch,
        decode=cfg.data.decode,
        retries=cfg.data.read_retries,
        max_undecodable=cfg.data.max_undecodable,
        pin=device is not None and device.type == "cuda",
    )
