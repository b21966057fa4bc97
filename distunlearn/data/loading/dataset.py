"""The images of a manifest as a map-style torch dataset: sample id -> crops of the photo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distunlearn.data.loading.shard_reader import Reader
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.sources.decode import decode_image
from distunlearn.data.views.crops import EVALUATION, Cutter, enlarged
from distunlearn.errors import UndecodableError


class Wanted(NamedTuple):
    """Crops of n images: of each its epoch, int64 [n], and the numbers of the views that are cut out of it."""

    ids: Sequence[str]
    epochs: np.ndarray
    views: Sequence[int]

    @property
    def crops(self) -> int:
        """How many crops that are."""
        return len(self.ids) * len(self.views)

    @classmethod
    def plain(cls, ids: Sequence[str]) -> Wanted:
        """The evaluation transform of these images."""
        return cls(ids, np.zeros(len(ids), dtype=np.int64), (EVALUATION,))


class ImageDataset(Dataset[Tensor]):
    """uint8 crops [C, S, S] by sample id; any torch DataLoader takes it, with a sampler that gives ids.

    Args:
        cutter: what is cut. channels: C, 1 or 3. max_pixels: larger images are refused before decoding.
        decode_size: `bound` of `decode_image`; None: 4 S. cache_mib: of decoded photos that are kept, those that come
            first. retries: see `Reader`.

    Attributes:
        note: called with each id before its image is decoded, and with the first before all are read.
    """

    def __init__(
        self,
        manifest: Manifest,
        cutter: Cutter,
        channels: int,
        max_pixels: int,
        decode_size: int | None = None,
        cache_mib: int = 0,
        retries: int = 4,
    ) -> None:
        self.manifest = manifest
        self.cutter = cutter
        self.shape = (channels, cutter.size, cutter.size)
        self.max_pixels = max_pixels
        self.bound = decode_size or 4 * cutter.size
        self.reader = Reader(manifest, retries)
        self.note: Callable[[str], None] = _ignore
        self._room = cache_mib << 20  # bytes
        self._photos: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, sample_id: str) -> Tensor:
        """One image as evaluation shows it.

        Raises:
            DataError: see `Reader.read`.
            UndecodableError: its bytes are those of the manifest, and no image.
        """
        return self.__getitems__([sample_id])[0]

    def __getitems__(self, ids: Sequence[str]) -> list[Tensor]:
        """A batch, neighbours in a shard by one read; errors as for one image."""
        images = torch.empty((len(ids), *self.shape), dtype=torch.uint8)
        failures = self.fill([Wanted.plain(ids)], images)
        if failures:
            raise failures[0][1]
        return list(images)

    def fill(self, wanted: Sequence[Wanted], out: Tensor) -> list[tuple[int, UndecodableError]]:
        """Write all crops to out, uint8 [crops, C, S, S]: part by part, image by image, view by view.

        Returns the images, counted over all parts, that cannot be decoded; their crops are set to zero.

        Raises:
            DataError: see `Reader.read`.
        """
        ids = [i for part in wanted for i in part.ids]
        samples = self.manifest.lookup([i for i in dict.fromkeys(ids) if i not in self._photos])
        if samples:
            self.note(samples[0].id)
        encoded = {s.id: data for s, data in zip(samples, self.reader.read(samples), strict=True)}
        failures: list[tuple[int, UndecodableError]] = []
        number = start = 0
        for part in wanted:
            crops = self.cutter.crops(part.ids, part.epochs, part.views)
            for row, sample_id in enumerate(part.ids):
                stop = start + len(part.views)
                try:
                    crops.crop(self._photo(sample_id, encoded), row, out[start:stop])
                except UndecodableError as error:
                    out[start:stop] = 0
                    failures.append((number, error))
                number, start = number + 1, stop
        return failures

    def _photo(self, sample_id: str, encoded: dict[str, bytes]) -> Tensor:
        """uint8 [C, H, W], kept while there is room."""
        photo = self._photos.get(sample_id)
        if photo is None:
            self.note(sample_id)
            self.reader.counts.images += 1
            photo = decode_image(encoded[sample_id], sample_id, self.max_pixels, self.shape[0], self.bound)
            photo = enlarged(photo, self.cutter.size)
            if photo.nbytes <= self._room:
                self._room -= photo.nbytes
                self._photos[sample_id] = photo
        return photo


def _ignore(sample_id: str) -> None:
    """Default `note` callback: discards the id."""
