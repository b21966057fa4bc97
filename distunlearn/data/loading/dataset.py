"""The images of a manifest as a map-style torch dataset: sample id -> decoded image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distunlearn.data.loading.shard_reader import Reader
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.sources.decode import decode_square
from distunlearn.errors import UndecodableError


class ImageDataset(Dataset[Tensor]):
    """uint8 images [C, S, S] by sample id; any torch DataLoader takes it, with a sampler that gives ids.

    Args:
        image_size: S, pixels. channels: C, 1 or 3. max_pixels: larger images are refused before decoding.
        mode: see `decode_square`. retries: see `Reader`.

    Attributes:
        note: called with each id before its image is decoded, and with the first before all are read.
    """

    def __init__(
        self, manifest: Manifest, image_size: int, channels: int, max_pixels: int, mode: str = "exact", retries: int = 4
    ) -> None:
        self.manifest = manifest
        self.shape = (channels, image_size, image_size)
        self.max_pixels = max_pixels
        self.mode = mode
        self.reader = Reader(manifest, retries)
        self.note: Callable[[str], None] = _ignore

    def __len__(self) -> int:
        return len(self.manifest)

    def __getitem__(self, sample_id: str) -> Tensor:
        """One image.

        Raises:
            DataError: see `Reader.read`.
            UndecodableError: its bytes are those of the manifest, and no image.
        """
        return self.__getitems__([sample_id])[0]

    def __getitems__(self, ids: Sequence[str]) -> list[Tensor]:
        """A batch, neighbours in a shard by one read; errors as for one image."""
        images = torch.empty((len(ids), *self.shape), dtype=torch.uint8)
        failures = self.fill(ids, images)
        if failures:
            raise failures[0][1]
        return list(images)

    def fill(self, ids: Sequence[str], images: Tensor) -> list[tuple[int, UndecodableError]]:
        """Decode image i of a batch into images[i]; returns the rows that cannot be decoded, which are set to zero.

        Raises:
            DataError: see `Reader.read`.
        """
        samples = self.manifest.lookup(ids)
        channels, size, _ = self.shape
        failures: list[tuple[int, UndecodableError]] = []
        if samples:
            self.note(samples[0].id)
        for row, (sample, data) in enumerate(zip(samples, self.reader.read(samples), strict=True)):
            self.note(sample.id)
            try:
                images[row] = decode_square(data, sample.id, self.max_pixels, channels, size, self.mode)
            except UndecodableError as error:
                images[row] = 0
                failures.append((row, error))
            self.reader.counts.images += 1
        return failures


def _ignore(sample_id: str) -> None:
    """Default `note` callback: discards the id."""
