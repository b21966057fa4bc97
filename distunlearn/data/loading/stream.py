"""Shards -> decoded images -> batches, in an order that is a pure function of (seed, epoch).

How an epoch is served: if the decoded images of the roles fit into the cache, they are read once, and from then on a
batch is one tensor index. If not, every epoch reads again, and a rank reads and decodes only its own rows, batches
ahead in the worker processes of one DataLoader for all its streams. The order and every bit are the same either way,
for any number of workers and ranks.

Nothing is left out: which images come is decided by the manifest alone, never by what a file seems to hold, and an
image comes only with the digest of the manifest. One that cannot be decoded is replaced, see `RoleFeeder`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import torch

from distunlearn.common.device import on_device
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.loading.loader import Decoded
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.schedule import Batch, Cycle, permutation, random_words, rank_slice
from distunlearn.errors import DataError

BLOCK_SHARDS = 8  # shards shuffled together


class _Order(Sequence[str]):
    """Ids in another order, looked up when asked for: an epoch of a hundred million costs its indices alone."""

    def __init__(self, ids: Sequence[str], order: np.ndarray) -> None:
        self._ids = ids
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, position: int) -> str:  # type: ignore[override]
        return self._ids[int(self._order[position])]


def epoch_order(manifest: Manifest, roles: str | Sequence[str], seed: int, epoch: int) -> Sequence[str]:
    """Ids of the roles in the order of this epoch; every id once, the same on every rank.

    Shards are shuffled by (seed, epoch), then samples within each block of BLOCK_SHARDS shards, so that reads
    stay within a few files for a while; with up to BLOCK_SHARDS shards this is a full shuffle.
    """
    chosen = manifest.select(roles)
    block = np.argsort(_shard_order(manifest, roles, seed, epoch))[chosen.shard_of] // BLOCK_SHARDS
    words = random_words(len(chosen.ids), seed, "samples of", _name(roles), epoch)
    return _Order(chosen.ids, np.lexsort((words, block)))


def _shard_order(manifest: Manifest, roles: str | Sequence[str], seed: int, epoch: int) -> np.ndarray:
    return permutation(len(manifest.select(roles).shards), seed, "shards of", _name(roles), epoch)


def _name(roles: str | Sequence[str]) -> str:
    return roles if isinstance(roles, str) else ",".join(sorted(set(roles)))


@dataclass(frozen=True)
class Rows:
    """This rank's rows of a global batch: ids, and of each its epoch and its position in it, int64 [n]."""

    ids: list[str]
    epochs: np.ndarray
    positions: np.ndarray


class RoleFeeder:
    """This rank's rows of the global batches over some roles; a batch is a pure function of its step.

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
    ) -> None:
        if not manifest.select(roles).ids:
            raise DataError(f"The manifest in {manifest.folder} has no image of role {roles}; run prepare again.")
        self.rows = rank_slice(batch, rank, world)
        self.cycle = Cycle(lambda epoch: epoch_order(manifest, roles, seed, epoch), batch)
        self.store = store
        self._manifest = manifest
        self._roles = roles

    def batch_at(self, step: int) -> Batch:
        """The batch of this step, read and decoded by the calling process where it is not cached; see `Batches`.

        Raises:
            DataError, CoverageError: see `Reader.read` and `Undecodable`.
        """
        rows = self.rows_at(step)
        return self.batch(rows, None if self.load() else self.store.loader.here(rows.ids))

    def load(self) -> bool:
        """Fill the store's cache with the roles; False if they do not fit; errors as `ImageStore.load`."""
        return self.store.load(self._roles)

    def rows_at(self, step: int) -> Rows:
        """Which images the batch of this step holds, undecodable ones included; a pure function of the step."""
        epochs, ids = self.cycle.at(step, self.rows)
        return Rows(ids, epochs, self.cycle.positions(step, self.rows)[1])

    def batch(self, rows: Rows, decoded: Decoded | None) -> Batch:
        """The batch of these rows. decoded: their images; None: they are cached.

        Raises:
            DataError, CoverageError: see `Reader.read` and `Undecodable`.
        """
        ids = list(rows.ids)
        if decoded is None:
            images, bad = self._cached(ids)
        else:
            images, bad = decoded.images, [row for row, _ in decoded.failures]
            self.store.undecodable.add({ids[row]: why for row, why in decoded.failures})
        replaced = [ids[row] for row in bad]
        for row in bad:
            ids[row], images[row] = self._replacement(int(rows.epochs[row]), int(rows.positions[row]))
        return Batch(ids, images, rows.epochs, torch.from_numpy(self._manifest.labels(ids)), replaced)

    def coverage_steps(self) -> int:
        """Steps, counted from 0, after which every id of the roles was in a global batch at least once."""
        return self.cycle.coverage_steps()

    def _cached(self, ids: Sequence[str]) -> tuple[torch.Tensor, list[int]]:
        """(images [n, C, S, S], rows that cannot be decoded)."""
        bad = [row for row, sample_id in enumerate(ids) if sample_id in self.store.undecodable]
        images = self.store.batch([i for i in ids if i not in self.store.undecodable])
        if not bad:
            return images, bad
        whole = torch.empty((len(ids), *self.store.shape), dtype=torch.uint8)
        whole[[row for row in range(len(ids)) if row not in bad]] = images
        return whole, bad

    def _replacement(self, epoch: int, position: int) -> tuple[str, torch.Tensor]:
        """The next image of the same role, in the order of the epoch and round its end, that can be decoded."""
        order = self.cycle.order(epoch)
        role = self._manifest.by_id[order[position]].role
        image = torch.empty((1, *self.store.shape), dtype=torch.uint8)
        for candidate in self._after(order, position):
            if self._manifest.by_id[candidate].role == role and candidate not in self.store.undecodable:
                bad = self.store.fill([candidate], image)
                if not bad:
                    return candidate, image[0]
                self.store.undecodable.add(bad)
        raise DataError(f"No image of role {role} can be decoded; replace the files and prepare again.")

    @staticmethod
    def _after(order: Sequence[str], position: int) -> Iterator[str]:
        yield from (order[place % len(order)] for place in range(position + 1, position + len(order)))


class Batches:
    """The batches of a phase, draw by draw, out of all its feeders; used as a context, which ends what is ahead.

    One draw of all feeders is one batch of the store's DataLoader. Which images a draw gets is the schedule's alone:
    workers, what is decoded ahead and jumps change nothing.

    Args:
        feeders: by name, of one store.
        device: to which the images go.
        last: number of draws of the phase; none beyond it is decoded ahead.
    """

    def __init__(self, feeders: Mapping[str, RoleFeeder], device: torch.device, last: int) -> None:
        self._feeders, self._device, self._last = feeders, device, last
        self._streamed: list[str] | None = None  # names of the feeders whose images are not cached
        self._planned: deque[tuple[int, dict[str, Rows]]] = deque()  # draws that the DataLoader was asked for
        self._serial = -1

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give up what is decoded ahead; safe to call twice."""
        for feeder in self._feeders.values():
            if feeder.store.loader.serial == self._serial and not feeder.store.loader.is_idle:
                feeder.store.loader.close()

    def at(self, draw: int) -> dict[str, Batch]:
        """The batches of this draw, images on the device; any draw at any time, though only the next one is ahead.

        Raises:
            DataError, CoverageError: see `Loader.next`, `RoleFeeder.batch` and `ImageStore.load`.
        """
        assert 0 <= draw < self._last, draw
        if self._streamed is None:
            self._streamed = [name for name, feeder in self._feeders.items() if not feeder.load()]
        rows, decoded = self._decoded(draw) if self._streamed else ({}, {})
        batches = {
            name: feeder.batch(rows[name] if name in rows else feeder.rows_at(draw), decoded.get(name))
            for name, feeder in self._feeders.items()
        }
        return {name: replace(batch, images=on_device(batch.images, self._device)) for name, batch in batches.items()}

    def _decoded(self, draw: int) -> tuple[dict[str, Rows], dict[str, Decoded]]:
        """Rows and images of the feeders that are streamed, by name."""
        loader = next(iter(self._feeders.values())).store.loader
        if loader.serial != self._serial or not self._planned or self._planned[0][0] != draw:
            self._planned.clear()
            self._serial = loader.start(self._plan(draw))
        whole = loader.next()
        _, rows = self._planned.popleft()
        parts, start = {}, 0
        for name, part in rows.items():
            stop = start + len(part.ids)
            failures = [(row - start, why) for row, why in whole.failures if start <= row < stop]
            parts[name] = Decoded(whole.images[start:stop], failures)
            start = stop
        return rows, parts

    def _plan(self, first: int) -> Iterator[list[str]]:
        """The ids of each draw from this one on, all feeders one after the other."""
        for draw in range(first, self._last):
            rows = {name: self._feeders[name].rows_at(draw) for name in self._streamed or ()}
            self._planned.append((draw, rows))
            yield [i for part in rows.values() for i in part.ids]
