"""Shards -> decoded images -> batches, in an order that is a pure function of (seed, epoch).

How an epoch is served: if the decoded images of the roles fit into the cache, they are read once, and from then on a
batch is one tensor index. If not, every epoch reads again, and a rank reads and decodes only its own rows, some
batches ahead in worker processes. The order and every bit are the same either way, for any number of workers and
ranks.

Nothing is left out: which images come is decided by the manifest alone, never by what a file seems to hold, and an
image comes only with the digest of the manifest. One that cannot be decoded is replaced, see `RoleFeeder`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from distunlearn.config.schema import RunConfig
from distunlearn.data.loading.decode_pool import PIECE, Decoder, Piece, Pool
from distunlearn.data.loading.read_ahead import ReadAhead
from distunlearn.data.loading.tar_stream import read_shard
from distunlearn.data.loading.undecodable import Undecodable
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.schedule import Batch, Cycle, permutation, random_words, rank_slice, systematic
from distunlearn.errors import DataError

__all__ = ["ImageStore", "RoleFeeder", "epoch_order", "open_store", "read_shard"]

BLOCK_SHARDS = 8  # shards shuffled together


class _Order(Sequence[str]):
    """Ids in another order, looked up when asked for: an epoch of a hundred million costs its indices alone."""

    def __init__(self, ids: Sequence[str], order: np.ndarray) -> None:
        self._ids = ids
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> str:
        return self._ids[int(self._order[position])]


def epoch_order(
    manifest: Manifest, roles: str | Sequence[str], seed: int, epoch: int, shares: np.ndarray | None = None
) -> Sequence[str]:
    """Ids of the roles in the order of this epoch; every id once, the same on every rank.

    Shards are shuffled by (seed, epoch), then samples within each block of BLOCK_SHARDS shards, so that reads
    stay within a few files for a while; with up to BLOCK_SHARDS shards this is a full shuffle.

    shares: weight of each image, in the manifest's order: images are drawn by systematic sampling instead.
    """
    chosen = manifest.select(roles)
    block = np.argsort(_shard_order(manifest, roles, seed, epoch))[chosen.shard_of] // BLOCK_SHARDS
    words = random_words(len(chosen.ids), seed, "samples of", _name(roles), epoch)
    order = np.lexsort((words, block))
    if shares is not None:
        order = order[systematic(shares[order], seed, "shares of", _name(roles), epoch)]
    return _Order(chosen.ids, order)


def _blocks(manifest: Manifest, roles: str | Sequence[str], seed: int, epoch: int) -> list[list[str]]:
    """The shards of each block of this epoch, in the order in which it visits the blocks."""
    shards = manifest.select(roles).shards
    order = [shards[number] for number in _shard_order(manifest, roles, seed, epoch)]
    return [order[start : start + BLOCK_SHARDS] for start in range(0, len(order), BLOCK_SHARDS)]


def _shard_order(manifest: Manifest, roles: str | Sequence[str], seed: int, epoch: int) -> np.ndarray:
    return permutation(len(manifest.select(roles).shards), seed, "shards of", _name(roles), epoch)


def _name(roles: str | Sequence[str]) -> str:
    return roles if isinstance(roles, str) else ",".join(sorted(set(roles)))


class ImageStore:
    """Decoded images of a manifest, uint8 [C, S, S] each, with a cache of bounded size.

    The cache is one uint8 tensor [rows, C, S, S] and a dictionary id -> row. A role is cached as a whole or
    not at all: roles are admitted in the order of first use while they fit into cache_mib.

    Args:
        manifest: of verified shards.
        image_size: S, pixels. channels: C, 1 or 3.
        cache_mib: size limit of the cache, MiB; 0: no cache.
        max_pixels: images above are refused before decoding.
        workers: processes that read and decode ahead; 0: none. prefetch: batches ahead per feeder.
        decode: see `decode_square`. retries: see `Reader`. max_undecodable: see `Undecodable`.

    Attributes:
        undecodable: images that turned out to be none.
        pool: what reads and decodes; its counts say what that cost.
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
    ) -> None:
        self.manifest = manifest
        self.shape = (channels, image_size, image_size)
        self.prefetch = prefetch if workers else 0
        self.pool = Pool(Decoder(manifest, image_size, channels, max_pixels, decode, retries), workers)
        self.undecodable = Undecodable(manifest, max_undecodable)
        self._free = min(len(manifest), (cache_mib << 20) // (channels * image_size * image_size))
        # Untouched rows cost no memory: the operating system hands out pages on first write.
        self._cache = torch.empty((self._free, *self.shape), dtype=torch.uint8)
        self._rows: dict[str, int] = {}
        self._admitted: set[str] = set()
        self._loaded: set[str] = set()
        self._tried: set[str] = set()  # by `decodable`, which is asked for the same images again and again

    def close(self) -> None:
        """End the workers and close the shards; what is used afterwards opens them again."""
        self.pool.close()

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
        return self._cache[torch.tensor([self._rows[sample_id] for sample_id in ids], dtype=torch.int64)]

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
        asked: deque[tuple[int, Piece]] = deque()
        ahead = self.pool.spare
        try:
            for start in range(0, len(ids) + ahead * PIECE, PIECE):
                if start < len(ids):
                    samples = self.manifest.lookup(ids[start : start + PIECE])
                    asked.append((start, self.pool.submit(samples)))
                if asked and (len(asked) >= ahead or start >= len(ids)):
                    first, piece = asked.popleft()
                    found = torch.empty((len(piece.samples), *self.shape), dtype=torch.uint8)
                    failures = dict(self.pool.take(piece, found))
                    for row, sample in enumerate(piece.samples):
                        if row in failures:
                            bad[sample.id] = failures[row]
                            continue
                        if images is not None and rows is not None:
                            images[rows[first + row]] = found[row]
                        if sample.role in self._admitted:
                            self._cache[self._rows.setdefault(sample.id, len(self._rows))] = found[row]
        finally:
            self.pool.abandon([piece for _, piece in asked])
        return bad

    def _admit(self, roles: set[str]) -> bool:
        """Reserve room for the roles that have none yet; all of them or none."""
        new = roles - self._admitted
        needed = sum(len(self.manifest.select(role).ids) for role in new)
        if needed > self._free:
            return False
        self._free -= needed
        self._admitted |= new
        return True


@dataclass
class _Ahead:
    """A batch that was asked for: its step, and pieces with their rows in it."""

    step: int
    pieces: list[tuple[slice, Piece]]


def open_store(manifest: Manifest, cfg: RunConfig) -> ImageStore:
    """The images of a manifest as the settings want them shown and read; `close` it in the end."""
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
    )


class RoleFeeder:
    """This rank's rows of the global batches over some roles; batch_at is a pure function of the step.

    An image that cannot be decoded is replaced by the next one of its role in the order of the epoch that can be, so
    the replacement, too, is the same for any number of workers and ranks; `Batch.replaced` names the original. One
    that is to be forgotten is never replaced.

    Args:
        store, manifest: where the images are.
        roles: one role or several, mixed.
        seed: of the order.
        batch: images per global batch, over all ranks. More than there are ids is fine: the cycle runs
            across epochs, so one id may occur several times with different epoch numbers.
        rank, world: this process; its rows are `rank_slice(batch, rank, world)` and may be none.
        shares: in which share of the epochs each image comes, float64 in the order of the manifest's ids of the roles,
            with a whole sum, which is the number of images of an epoch; None: all come in every epoch.

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
        shares: np.ndarray | None = None,
    ) -> None:
        if not manifest.select(roles).ids:
            raise DataError(f"The manifest in {manifest.folder} has no image of role {roles}; run prepare again.")
        self.rows = rank_slice(batch, rank, world)
        self.cycle = Cycle(lambda epoch: epoch_order(manifest, roles, seed, epoch, shares), batch)
        self._store = store
        self._manifest = manifest
        self._roles = roles
        self._ahead: deque[_Ahead] = deque()
        self._read_ahead: ReadAhead | None = None  # made when the first batch is streamed
        self._new_read_ahead = partial(ReadAhead, manifest, roles, partial(_blocks, manifest, roles, seed), rank)
        self._whole = shares is None  # a drawn part of a role costs what its own images cost
        count = self.rows.stop - self.rows.start
        # Small enough that all workers share a batch, which then is there sooner.
        self._piece = max(1, min(PIECE, -(-count // max(1, store.pool.num_workers))))
        self._reserved = (store.prefetch + 1) * -(-count // self._piece)
        store.pool.reserve(self._reserved)

    def batch_at(self, step: int) -> Batch:
        """The batch of this step; any step at any time, though one after the other is what is read ahead.

        Raises:
            DataError, CoverageError: see `Pool.take` and `Undecodable`.
        """
        epochs, ids = self.cycle.at(step, self.rows)
        if self._store.load(self._roles):
            bad = [row for row, sample_id in enumerate(ids) if sample_id in self._store.undecodable]
            images = self._store.batch([i for i in ids if i not in self._store.undecodable])
            if bad:
                whole = torch.empty((len(ids), *self._store.shape), dtype=torch.uint8)
                whole[[row for row in range(len(ids)) if row not in bad]] = images
                images = whole
        else:
            images, bad = self._streamed(step, ids)
        replaced = [ids[row] for row in bad]
        if bad:
            positions = self.cycle.positions(step, self.rows)[1]
            for row in bad:
                ids[row], images[row] = self._replacement(int(epochs[row]), int(positions[row]))
        return Batch(ids, images, epochs, torch.from_numpy(self._manifest.labels(ids)), replaced)

    def coverage_steps(self) -> int:
        """Steps, counted from 0, after which every id of the roles was in a global batch at least once."""
        return self.cycle.coverage_steps()

    def close(self) -> None:
        """Give up what was asked for ahead, and the room for it; the last call."""
        self._give_up()
        if self._read_ahead is not None:
            self._read_ahead.close()
        self._store.pool.reserve(-self._reserved)
        self._reserved = 0

    def _give_up(self) -> None:
        while self._ahead:
            self._store.pool.abandon([piece for _, piece in self._ahead.pop().pieces])

    def _streamed(self, step: int, ids: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
        """(images [n, C, S, S], rows that cannot be decoded)."""
        if self._ahead and self._ahead[0].step != step:
            self._give_up()
        for later in range(step + len(self._ahead), step + self._store.prefetch + 1):
            self._ahead.append(self._ask(later))
        images = torch.empty((len(ids), *self._store.shape), dtype=torch.uint8)
        bad: dict[int, str] = {}
        wanted = self._ahead.popleft()
        try:
            while wanted.pieces:
                rows, piece = wanted.pieces[0]
                failures = self._store.pool.take(piece, images[rows])
                bad.update({rows.start + row: why for row, why in failures})
                wanted.pieces.pop(0)
        finally:
            self._store.pool.abandon([piece for _, piece in wanted.pieces])
        self._store.undecodable.add({ids[row]: why for row, why in bad.items()})
        return images, sorted(bad)

    def _ask(self, step: int) -> _Ahead:
        ids = self.cycle.at(step, self.rows)[1]
        epochs, positions = self.cycle.positions(step, self.rows)
        if ids and self._whole:
            self._read_ahead = self._read_ahead or self._new_read_ahead()
            self._read_ahead.at(int(epochs[0]), int(positions[0]))
        pieces = []
        for start in range(0, len(ids), self._piece):
            rows = slice(start, min(start + self._piece, len(ids)))
            pieces.append((rows, self._store.pool.submit(self._manifest.lookup(ids[rows]))))
        return _Ahead(step, pieces)

    def _replacement(self, epoch: int, position: int) -> tuple[str, torch.Tensor]:
        """The next image of the same role, in the order of the epoch and round its end, that can be decoded."""
        order = self.cycle.order(epoch)
        role = self._manifest.by_id[order[position]].role
        image = torch.empty((1, *self._store.shape), dtype=torch.uint8)
        for candidate in self._after(order, position):
            if self._manifest.by_id[candidate].role == role and candidate not in self._store.undecodable:
                bad = self._store.fill([candidate], image)
                if not bad:
                    return candidate, image[0]
                self._store.undecodable.add(bad)
        raise DataError(f"No image of role {role} can be decoded; replace the files and prepare again.")

    @staticmethod
    def _after(order: Sequence[str], position: int) -> Iterator[str]:
        yield from (order[place % len(order)] for place in range(position + 1, position + len(order)))
