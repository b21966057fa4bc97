"""Crops of the images of a manifest, and what was found undecodable."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from distunlearn.config.schema import RunConfig
from distunlearn.data.loading.dataset import ImageDataset, Wanted
from distunlearn.data.loading.loader import Loader
from distunlearn.data.loading.undecodable import Undecodable
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.schedule import rank_slice
from distunlearn.data.storage.retry import Counts
from distunlearn.data.views.crops import Cutter
from distunlearn.distributed.meeting import Meeting
from distunlearn.distributed.world import World
from distunlearn.errors import DataError

PIECE = 32  # most images that are decoded at once outside of a batch


class ImageStore:
    """Crops of the images of a manifest, uint8 [C, S, S] each.

    Args:
        manifest: of verified shards.
        cutter: what is cut. channels: C, 1 or 3.
        cache_mib: of decoded photos that are kept where there are no workers; those that come first.
        max_pixels: images above are refused before decoding. decode_size: see `ImageDataset`.
        workers: processes that read, decode and crop ahead; 0: none. prefetch: batches that each is ahead.
        retries: see `Reader`. max_undecodable: see `Undecodable`.
        pin: crops are given in page-locked memory, for a GPU.

    Attributes:
        undecodable: images that turned out to be none.
        loader: what reads, decodes and crops.
    """

    def __init__(
        self,
        manifest: Manifest,
        cutter: Cutter,
        channels: int,
        cache_mib: int,
        max_pixels: int,
        *,
        decode_size: int | None = None,
        workers: int = 0,
        prefetch: int = 2,
        retries: int = 4,
        max_undecodable: float = 0.001,
        pin: bool = False,
    ) -> None:
        self.manifest = manifest
        # Each worker would keep photos of its own.
        cache_mib = 0 if workers else cache_mib
        dataset = ImageDataset(manifest, cutter, channels, max_pixels, decode_size, cache_mib, retries)
        self.shape = dataset.shape
        self.loader = Loader(dataset, workers, prefetch, pin)
        self.undecodable = Undecodable(manifest, max_undecodable)
        self._tried: set[str] = set()  # by `decodable`, which is asked for the same images again and again

    @property
    def counts(self) -> Counts:
        """What reading and decoding cost, in all processes."""
        return self.loader.counts

    def close(self) -> None:
        """End the workers and close the shards; what is used afterwards opens them again."""
        self.loader.close()

    def cut(self, ids: Sequence[str], epochs: np.ndarray, views: Sequence[int]) -> Tensor:
        """Crops of any ids, in this order, uint8 [n, V, C, S, S]; epochs: int64 [n]. See `Cutter`.

        Raises:
            DataError: see `Reader.read`; or one of them cannot be decoded.
        """
        crops, bad = self.try_cut(Wanted(ids, epochs, views))
        if bad:
            self.undecodable.add(bad)
            raise DataError(next(iter(bad.values())))
        return crops

    def plain(self, ids: Sequence[str]) -> Tensor:
        """Any ids as evaluation shows them, uint8 [n, C, S, S]; errors as of `cut`."""
        wanted = Wanted.plain(ids)
        return self.cut(*wanted)[:, 0]

    def decodable(self, ids: Sequence[str], world: World | None = None) -> list[str]:
        """The ids without those that cannot be decoded, which are taken note of.

        world: whose ranks try a share each and tell the others; collective then. None: this process tries all.

        Raises:
            DataError, CoverageError: see `Reader.read` and `Undecodable`.
        """
        world = world or World(0, 1, torch.device("cpu"))
        new = [sample_id for sample_id in ids if sample_id not in self._tried]
        mine = new[rank_slice(len(new), world.rank, world.size)]
        with Meeting(world):
            for start in range(0, len(mine), 8 * PIECE):
                self.undecodable.add(self.try_cut(Wanted.plain(mine[start : start + 8 * PIECE]))[1])
        for found in world.gather_objects({i: self.undecodable.found[i] for i in mine if i in self.undecodable}):
            self.undecodable.add(found)
        self._tried.update(new)
        return [sample_id for sample_id in ids if sample_id not in self.undecodable]

    def try_cut(self, wanted: Wanted) -> tuple[Tensor, dict[str, str]]:
        """(crops uint8 [n, V, C, S, S], {id: why} of images that cannot be decoded, whose crops are zero).

        By the workers, unless there is too little for them.

        Raises:
            DataError: see `Reader.read`.
        """
        ids, epochs, views = wanted
        slices = [slice(start, start + PIECE) for start in range(0, len(ids), PIECE)]
        pieces = [Wanted(ids[rows], epochs[rows], views) for rows in slices]
        crops = torch.empty((len(ids), len(views), *self.shape), dtype=torch.uint8)
        bad: dict[str, str] = {}
        shared = self.loader.workers > 0 and len(pieces) > 1
        if shared:
            self.loader.start([piece] for piece in pieces)
        for rows, piece in zip(slices, pieces, strict=True):
            decoded = self.loader.next() if shared else self.loader.here([piece])
            crops[rows] = decoded.crops.view(len(piece.ids), *crops.shape[1:])
            bad |= {piece.ids[image]: why for image, why in decoded.failures}
        return crops, bad


def open_store(manifest: Manifest, cfg: RunConfig, device: torch.device | None = None) -> ImageStore:
    """The images of a manifest as the settings want them shown and read; `close` it in the end.

    device: that computes with them.
    """
    return ImageStore(
        manifest,
        Cutter.of(cfg),
        cfg.encoder.in_chans,
        cfg.data.cache_mib,
        cfg.data.max_pixels,
        decode_size=cfg.data.decode_size,
        workers=cfg.data.workers,
        prefetch=cfg.data.prefetch,
        retries=cfg.data.read_retries,
        max_undecodable=cfg.data.max_undecodable,
        pin=device is not None and device.type == "cuda",
    )
