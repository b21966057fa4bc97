"""Shards -> decoded images -> batches, in an order that is a pure function of (seed, epoch).

How an epoch is served: if the decoded images of the roles fit into the cache, they are streamed once
through webdataset with every check, and from then on a batch is one tensor index. If not, every
epoch streams again, and a rank decodes only its own rows. The order is the same either way.

webdataset (1.0.2) alone would lose images: an invalid tar header inside a shard ends that shard without
an error. So after every shard the ids, their count, each image's sha256 and the sha256 of the whole file
are compared with the manifest, before any image of it is handed out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch

from distunlearn.data.decode import decode_image, to_square
from distunlearn.data.manifest import Manifest
from distunlearn.data.schedule import Batch, Cycle, permutation, random_words, rank_slice
from distunlearn.data.shards import check_digest, check_shard_size, read_sample
from distunlearn.errors import DataError

__all__ = ["ImageStore", "RoleFeeder", "epoch_order", "read_shard"]

BLOCK_SHARDS = 8  # shards shuffled together; a streaming rank holds the encoded bytes of one such block
_IMAGE_KINDS = ("png", "jpg", "webp")


def epoch_order(manifest: Manifest, roles: str | Sequence[str], seed: int, epoch: int) -> list[str]:
    """Ids of the roles in the order of this epoch; every id once, the same on every rank.

    Shards are shuffled by (seed, epoch), then samples within each block of BLOCK_SHARDS shards, so that
    a stream needs only one block in memory; with few shards this is a full shuffle.
    """
    ids = manifest.select(roles).ids
    return [ids[i] for i in _order(manifest, roles, seed, epoch)[0]]


def _order(manifest: Manifest, roles: str | Sequence[str], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(order [n]: indices into the selection, block [n]: the block of each position, ascending)."""
    chosen = manifest.select(roles)
    name = roles if isinstance(roles, str) else ",".join(sorted(set(roles)))
    place = np.argsort(permutation(len(chosen.shards), seed, "shards of", name, epoch))
    block = place[chosen.shard_of] // BLOCK_SHARDS
    order = np.lexsort((random_words(len(chosen.ids), seed, "samples of", name, epoch), block))
    return order, block[order]


def read_shard(manifest: Manifest, shard: str, wanted: Collection[str]) -> dict[str, bytes]:
    """{id: encoded bytes} of the wanted images of one shard, read through webdataset and fully checked.

    Raises:
        DataError: missing, truncated, changed by as little as one byte, or other samples than in the manifest.
    """
    path = check_shard_size(manifest, shard)
    expected = manifest.in_shard(shard)
    kept: dict[str, bytes] = {}
    found = 0
    with path.open("rb") as handle:
        stream = _HashingReader(handle)
        try:
            for record in _samples(stream, shard):
                found += 1
                if found > len(expected):
                    continue
                sample = expected[found - 1]
                data = next((record[kind] for kind in _IMAGE_KINDS if kind in record), None)
                if data is None or _record_id(record) != sample.id:
                    raise DataError(
                        f"The shard {shard} has another or a partial sample where {sample.id!r} is expected "
                        f"(number {found} of {len(expected)}); run prepare again."
                    )
                check_digest(sample, data)
                if sample.id in wanted:
                    kept[sample.id] = data
        except DataError:
            raise
        except Exception as error:  # tarfile and webdataset raise many kinds on damaged bytes
            raise DataError(
                f"The shard {shard} cannot be read after {found} of {len(expected)} samples "
                f"({type(error).__name__}); run prepare again."
            ) from error
        digest = stream.finish()
    if found != len(expected):
        raise DataError(
            f"The shard {shard} gave {found} samples; expected {len(expected)}: its contents are damaged, "
            "so run prepare again."
        )
    if digest != manifest.shard_files[shard].sha256:
        raise DataError(f"The shard {shard} does not have the sha256 of the manifest; run prepare again.")
    return kept


class _HashingReader:
    """A file that is only read forwards, hashing what passes."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._handle.read(size)
        self._digest.update(data)
        return data

    def finish(self) -> str:
        """sha256 of the whole file, after reading what is left (the end-of-archive padding)."""
        while self.read(1 << 20):
            pass
        return self._digest.hexdigest()


@cache
def _webdataset() -> ModuleType:
    """webdataset with its secure mode on: it is read at import and forbids commands as URLs and unpickling."""
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    webdataset.utils.enforce_security = True  # if somebody imported it before us
    return webdataset


def _samples(stream: _HashingReader, shard: str) -> Iterator[dict[str, Any]]:
    """webdataset's own tar and grouping stages over a file we opened.

    Not its WebDataset class: that takes URLs, draws from the global random generator, may be redirected
    to a stale cache by an environment variable, and leaves files open.
    """
    wds = _webdataset()
    expand = wds.filters.pipelinefilter(wds.tariterators.tar_file_expander)
    group = wds.filters.pipelinefilter(wds.tariterators.group_by_keys)
    strict = wds.handlers.reraise_exception
    opened = [{"url": shard, "stream": stream}]
    return iter(wds.DataPipeline(lambda: iter(opened), expand(handler=strict), group(handler=strict)))


def _record_id(record: dict[str, Any]) -> Any:
    content = json.loads(record.get("json", b"null"))
    return content.get("id") if isinstance(content, dict) else None


class ImageStore:
    """Decoded images of a manifest, uint8 [C, S, S] each, with a cache of bounded size.

    The cache is one uint8 tensor [rows, C, S, S] and a dictionary id -> row. A role is cached as a whole or
    not at all: roles are admitted in the order of first use while they fit into cache_mib.

    Args:
        manifest: of verified shards.
        image_size: S, pixels. channels: C, 1 or 3.
        cache_mib: size limit of the cache, MiB; 0: no cache.
        max_pixels: images above are refused before decoding.
    """

    def __init__(
        self, manifest: Manifest, image_size: int, channels: int, cache_mib: int, max_pixels: int
    ) -> None:
        self.manifest = manifest
        self.image_size = image_size
        self.channels = channels
        self.max_pixels = max_pixels
        self._free = min(len(manifest), (cache_mib << 20) // (channels * image_size * image_size))
        # Untouched rows cost no memory: the operating system hands out pages on first write.
        self._cache = torch.empty((self._free, channels, image_size, image_size), dtype=torch.uint8)
        self._rows: dict[str, int] = {}
        self._admitted: set[str] = set()
        self._loaded: set[str] = set()

    def load(self, roles: str | Sequence[str]) -> bool:
        """Fill the cache with these roles, streaming each shard once with every check.

        Returns:
            False, with nothing read, if they do not fit; True once all of them are cached.
        """
        names = {roles} if isinstance(roles, str) else set(roles)
        if names <= self._loaded:
            return True
        if not self._admit(roles):
            return False
        chosen = self.manifest.select(roles)
        missing = [sample_id for sample_id in chosen.ids if sample_id not in self._rows]
        by_shard: dict[str, list[str]] = {}
        for sample_id in missing:
            by_shard.setdefault(self.manifest.by_id[sample_id].shard, []).append(sample_id)
        for shard, ids in by_shard.items():
            data = read_shard(self.manifest, shard, set(ids))
            for sample_id in ids:
                self._decode(sample_id, data[sample_id])
        self._loaded |= names
        return True

    def batch(self, ids: Sequence[str]) -> torch.Tensor:
        """Cached images as uint8 [n, C, S, S], a copy; KeyError for an id that is not cached."""
        return self._cache[torch.tensor([self._rows[sample_id] for sample_id in ids], dtype=torch.int64)]

    def stream(
        self, roles: str | Sequence[str], seed: int, epoch: int, positions: Collection[int] | np.ndarray | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(id, uint8 [C, S, S]) in the order of `epoch_order`.

        Args:
            positions: only these positions of the epoch are decoded and given, in ascending order; None: all.
                A boolean array [n] selects by mask. Blocks of shards without a wanted position are not read.

        Raises:
            DataError: see `read_shard` and `decode_image`.
        """
        order, blocks = _order(self.manifest, roles, seed, epoch)
        ids = self.manifest.select(roles).ids
        self._admit(roles)
        for block in range(int(blocks[-1]) + 1 if len(blocks) else 0):
            first, last = np.searchsorted(blocks, [block, block + 1]).tolist()
            places = _chosen_positions(positions, first, last)
            wanted = [ids[order[place]] for place in places]
            missing = {sample_id for sample_id in wanted if sample_id not in self._rows}
            encoded: dict[str, bytes] = {}
            for shard in sorted({self.manifest.by_id[sample_id].shard for sample_id in missing}):
                encoded.update(read_shard(self.manifest, shard, missing))
            for sample_id in wanted:
                if sample_id in self._rows:
                    yield sample_id, self._cache[self._rows[sample_id]].clone()
                else:
                    yield sample_id, self._decode(sample_id, encoded.pop(sample_id))

    def by_offset(self, ids: Sequence[str]) -> torch.Tensor:
        """Images of any ids, in this order, as uint8 [n, C, S, S]; those not cached are read at their offset.

        Raises:
            DataError: see `read_sample` and `decode_image`.
        """
        images = torch.empty((len(ids), self.channels, self.image_size, self.image_size), dtype=torch.uint8)
        for row, sample_id in enumerate(ids):
            if sample_id in self._rows:
                images[row] = self._cache[self._rows[sample_id]]
            else:
                self._admit(self.manifest.by_id[sample_id].role)
                images[row] = self._decode(sample_id, read_sample(self.manifest, sample_id))
        return images

    def _admit(self, roles: str | Sequence[str]) -> bool:
        """Reserve room for the roles that have none yet; all of them or none."""
        new = ({roles} if isinstance(roles, str) else set(roles)) - self._admitted
        needed = sum(len(self.manifest.select(role).ids) for role in new)
        if needed > self._free:
            return False
        self._free -= needed
        self._admitted |= new
        return True

    def _decode(self, sample_id: str, data: bytes) -> torch.Tensor:
        """Decode to [C, S, S] and keep it if its role has room."""
        image = to_square(decode_image(data, sample_id, self.max_pixels, self.channels), self.image_size)
        if self.manifest.by_id[sample_id].role in self._admitted:
            row = self._rows.setdefault(sample_id, len(self._rows))
            self._cache[row] = image
        return image


def _chosen_positions(positions: Collection[int] | np.ndarray | None, first: int, last: int) -> list[int]:
    """The wanted positions in [first, last), ascending."""
    if positions is None:
        return list(range(first, last))
    if isinstance(positions, np.ndarray) and positions.dtype == bool:
        return (np.flatnonzero(positions[first:last]) + first).tolist()
    return [place for place in range(first, last) if place in positions]


class RoleFeeder:
    """This rank's rows of the global batches over some roles; batch_at is a pure function of the step.

    Args:
        store, manifest: where the images are.
        roles: one role or several, mixed.
        seed: of the order.
        batch: images per global batch, over all ranks. More than there are ids is fine: the cycle runs
            across epochs, so one id may occur several times with different epoch numbers.
        rank, world: this process; its rows are `rank_slice(batch, rank, world)` and may be none.
        by_offset: read single images at their offsets instead of streaming shards (for forget).

    Raises:
        DataError: no image has one of these roles.
    """

    def __init__(
        self,
        store: ImageStore,
        manifest: Manifest,
        roles: str | Sequence[str],
        seed: int,
        batch: int,
        rank: int = 0,
        world: int = 1,
        by_offset: bool = False,
    ) -> None:
        if not manifest.select(roles).ids:
            raise DataError(f"The manifest in {manifest.folder} has no image of role {roles}; run prepare again.")
        self.rows = rank_slice(batch, rank, world)
        self.cycle = Cycle(lambda epoch: epoch_order(manifest, roles, seed, epoch), batch)
        self._store = store
        self._manifest = manifest
        self._roles = roles
        self._seed = seed
        self._by_offset = by_offset
        self._stream: Iterator[tuple[str, torch.Tensor]] = iter(())
        self._next = (-1, 0)  # the stream is in this epoch and has passed all positions below

    def batch_at(self, step: int) -> Batch:
        """The batch of this step; any step at any time, though rising steps are what a stream serves fast."""
        epochs, ids = self.cycle.at(step, self.rows)
        if self._by_offset:
            images = self._store.by_offset(ids)
        elif self._store.load(self._roles):
            images = self._store.batch(ids)
        else:
            images = self._streamed(step, ids)
        return Batch(ids, images, epochs, torch.from_numpy(self._manifest.labels(ids)))

    def coverage_steps(self) -> int:
        """Steps, counted from 0, after which every id of the roles was in a global batch at least once."""
        return self.cycle.coverage_steps()

    def _streamed(self, step: int, ids: list[str]) -> torch.Tensor:
        size = self._store.image_size
        images = torch.empty((len(ids), self._store.channels, size, size), dtype=torch.uint8)
        epochs, positions = self.cycle.positions(step, self.rows)
        for row, (epoch, position) in enumerate(zip(epochs.tolist(), positions.tolist(), strict=True)):
            if self._next[0] != epoch or self._next[1] > position:
                mask = self._own_positions(epoch, position)
                self._stream = self._store.stream(self._roles, self._seed, epoch, mask)
            self._next = (-1, 0)  # should the stream fail, a later call opens a new one
            found, image = next(self._stream)
            while found != ids[row]:  # steps were skipped
                found, image = next(self._stream)
            images[row] = image
            self._next = (epoch, position + 1)
        return images

    def _own_positions(self, epoch: int, start: int) -> np.ndarray:
        """Mask [n] of the positions of an epoch, from `start` on, that fall into this rank's rows."""
        n, batch = self.cycle.num_ids, self.cycle.batch
        rows = (np.arange(n, dtype=np.int64) + epoch * n) % batch
        mask = (rows >= self.rows.start) & (rows < self.rows.stop)
        mask[:start] = False
        return mask
