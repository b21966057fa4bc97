"""The images of a manifest as a map-style torch dataset: sample id -> decoded image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.utils.data import Dataset

from distunlearn.data.loading.shard_reader import Reader
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.sources.decode import decode_square
from distunlearn.errors import UndecodableError

__all__ = ["ImageDataset"]


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
        (found,) = self.decode([sample_id])
        if isinstance(found, UndecodableError):
            raise found
        return found

    def __getitems__(self, ids: Sequence[str]) -> list[Tensor]:
        """A batch, neighbours in a shard by one read; errors as for one image."""
        found = self.decode(ids)
        for item in found:
            if isinstance(item, UndecodableError):
                raise item
        return [item for item in found if isinstance(item, Tensor)]

    def decode(self, ids: Sequence[str]) -> list[Tensor | UndecodableError]:
        """The images of a batch in its order, and in the place of one that cannot be decoded the error that says why.

        Raises:
            DataError: see `Reader.read`.
        """
        samples = self.manifest.lookup(ids)
        channels, size, _ = self.shape
        found: list[Tensor | UndecodableError] = []
        if samples:
            self.note(samples[0].id)
        for sample, data in zip(samples, self.reader.read(samples), strict=True):
            self.note(sample.id)
            try:
                found.append(decode_square(data, sample.id, self.max_pixels, channels, size, self.mode))
            except UndecodableError as error:
                found.append(error)
            self.reader.counts.images += 1
        return found


def _ignore(sample_id: str) -> None:
    """Default `note` callback: discards the id."""
