"""Shards -> decoded images -> batches, in an order that is a pure function of (seed, epoch).

A rank reads, decodes and crops only its own rows, batches ahead in the worker processes of one DataLoader for all its
streams; without workers photos that fit into the cache are decoded once. The order and every bit are the same either
way, for any number of workers and ranks.

Nothing is left out: which images come is decided by the manifest alone, never by what a file seems to hold, and an
image comes only with the digest of the manifest. One that cannot be decoded is replaced, see `RoleFeeder`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType

import numpy as np
import torch

from distunlearn.common.device import on_device
from distunlearn.data.loading.dataset import Wanted
from distunlearn.data.loading.epoch_order import epoch_order
from distunlearn.data.loading.image_store import ImageStore
from distunlearn.data.loading.loader import Decoded
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.schedule import Batch, Cycle, rank_sizes, rank_slice
from distunlearn.errors import DataError


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
        pairs: of views of each image that a batch brings along; others are cut when they are asked for.

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
        pairs: int = 1,
    ) -> None:
        if not manifest.select(roles).ids:
            raise DataError(f"The manifest in {manifest.folder} has no image of role {roles}; run prepare again.")
        self.rows, self.sizes = rank_slice(batch, rank, world), rank_sizes(batch, world)
        self.cycle = Cycle(lambda epoch: epoch_order(manifest, roles, seed, epoch), batch)
        self.store = store
        self._manifest = manifest
        self._views = range(2 * pairs)

    def batch_at(self, step: int) -> Batch:
        """The batch of this step, made by the calling process; see `Batches`.

        Raises:
            DataError, CoverageError: see `Reader.read` and `Undecodable`.
        """
        wanted, positions = self.rows_at(step)
        return self.batch(wanted, positions, self.store.loader.here([wanted]))

    def rows_at(self, step: int) -> tuple[Wanted, np.ndarray]:
        """The crops of the batch of this step, of undecodable images too, and each image's position in its epoch, int64
        [n]; a pure function of the step."""
        epochs, ids = self.cycle.at(step, self.rows)
        return Wanted(ids, epochs, self._views), self.cycle.positions(step, self.rows)[1]

    def batch(self, wanted: Wanted, positions: np.ndarray, decoded: Decoded) -> Batch:
        """The batch of these rows. decoded: their crops.

        Raises:
            DataError, CoverageError: see `Reader.read` and `Undecodable`.
        """
        ids, epochs = list(wanted.ids), wanted.epochs
        crops = decoded.crops.view(len(ids), len(self._views), *self.store.shape)
        bad = [row for row, _ in decoded.failures]
        self.store.undecodable.add({ids[row]: why for row, why in decoded.failures})
        replaced = [ids[row] for row in bad]
        for row in bad:
            ids[row], crops[row] = self._replacement(epochs[row : row + 1], int(positions[row]))
        labels = torch.from_numpy(self._manifest.labels(ids))
        return Batch(ids, epochs, labels, self.store.cut, crops, replaced, self.sizes)

    def ids_by_rank(self, step: int, world: int) -> list[list[str]]:
        """The ids that each of `world` ranks has at this step, but for those that cannot be decoded."""
        return [self.cycle.at(step, rank_slice(self.cycle.batch, rank, world))[1] for rank in range(world)]

    def coverage_steps(self) -> int:
        """Steps, counted from 0, after which every id of the roles was in a global batch at least once."""
        return self.cycle.coverage_steps()

    def _replacement(self, epoch: np.ndarray, position: int) -> tuple[str, torch.Tensor]:
        """The next image of the role that can be decoded, in the order of the epoch and round its end, and its crops.

        epoch: int64 [1].
        """
        order = self.cycle.order(int(epoch[0]))
        role = self._manifest.by_id[order[position]].role
        for candidate in self._after(order, position):
            if self._manifest.by_id[candidate].role == role and candidate not in self.store.undecodable:
                crops, bad = self.store.try_cut(Wanted([candidate], epoch, self._views))
                if not bad:
                    return candidate, crops[0]
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
        device: to which the crops go.
        last: number of draws of the phase; none beyond it is decoded ahead.
    """

    def __init__(self, feeders: Mapping[str, RoleFeeder], device: torch.device, last: int) -> None:
        self._feeders, self._device, self._last = feeders, device, last
        # draws that the DataLoader was asked for
        self._planned: deque[tuple[int, dict[str, tuple[Wanted, np.ndarray]]]] = deque()
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
            DataError, CoverageError: see `Loader.next` and `RoleFeeder.batch`.
        """
        assert 0 <= draw < self._last, draw
        loader = next(iter(self._feeders.values())).store.loader
        if loader.serial != self._serial or not self._planned or self._planned[0][0] != draw:
            self._planned.clear()
            self._serial = loader.start(self._plan(draw))
        whole = loader.next()
        _, rows = self._planned.popleft()
        batches, image, crop = {}, 0, 0
        for name, (wanted, positions) in rows.items():
            last = image + len(wanted.ids)
            failures = [(row - image, why) for row, why in whole.failures if image <= row < last]
            decoded = Decoded(whole.crops[crop : crop + wanted.crops], failures)
            batch = self._feeders[name].batch(wanted, positions, decoded)
            assert batch.crops is not None, "a batch has the crops that it was given"
            batches[name] = replace(batch, crops=on_device(batch.crops, self._device))
            image, crop = last, crop + wanted.crops
        return batches

    def _plan(self, first: int) -> Iterator[list[Wanted]]:
        """The crops of each draw from this one on, all feeders one after the other."""
        for draw in range(first, self._last):
            rows = {name: feeder.rows_at(draw) for name, feeder in self._feeders.items()}
            self._planned.append((draw, rows))
            yield [wanted for wanted, _ in rows.values()]
