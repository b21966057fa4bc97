"""Who sees what, when: pure functions of (seed, epoch, step, rank).

No state and no library generator: the same numbers on every platform and library version, so that
a resumed run, a run on other ranks and a replay from the ledger all see the same images.

Legend: n = ids of a role set, B = images per global batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from distunlearn.common.random import GAMMA, finalise
from distunlearn.data.views.crops import Cut


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's rows of a global batch.

    ids: n sample ids; epochs: int64 numpy [n], the epoch each row belongs to (views are keyed by it); labels: int64
    tensor [n], -1 where unknown; cut: makes crops of any ids, epochs and views; crops: uint8 [n, V, C, S, S], the first
    V views, where they are cut already; replaced: the ids, none of them among `ids` for this reason, in whose place
    another image came because they cannot be decoded; sizes: rows of every rank, where the schedule knows them.
    """

    ids: list[str]
    epochs: np.ndarray
    labels: torch.Tensor
    cut: Cut
    crops: torch.Tensor | None = None
    replaced: list[str] = field(default_factory=list)
    sizes: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def views(self, numbers: Sequence[int]) -> torch.Tensor:
        """The crops of some views, uint8 [n, V, C, S, S], where they are."""
        if self.crops is not None and max(numbers) < self.crops.shape[1]:
            return self.crops[:, list(numbers)]
        return self.cut(self.ids, self.epochs, numbers)

    def part(self, rows: slice) -> Batch:
        """Some consecutive rows; `replaced`, which belongs to no row, stays behind."""
        crops = None if self.crops is None else self.crops[rows]
        return Batch(self.ids[rows], self.epochs[rows], self.labels[rows], self.cut, crops)

    def pick(self, rows: Sequence[int]) -> Batch:
        """Some rows, in this order."""
        at = torch.as_tensor(rows, dtype=torch.int64)
        crops = None if self.crops is None else self.crops[at]
        return Batch([self.ids[row] for row in rows], self.epochs[list(rows)], self.labels[at], self.cut, crops)

    def at_epoch(self, epoch: int) -> Batch:
        """The same images with the views of another epoch."""
        return dataclasses.replace(self, epochs=np.full(len(self.ids), epoch, dtype=np.int64), crops=None)


def concat_batches(first: Batch, second: Batch) -> Batch:
    """One batch of both, in this order (one forward for forget and third-party: the same code path for both)."""
    crops = None
    if first.crops is not None and second.crops is not None:
        views = min(first.crops.shape[1], second.crops.shape[1])
        crops = torch.cat([first.crops[:, :views], second.crops[:, :views]])
    return Batch(
        ids=[*first.ids, *second.ids],
        epochs=np.concatenate([first.epochs, second.epochs]),
        labels=torch.cat([first.labels, second.labels]),
        cut=first.cut,
        crops=crops,
        replaced=[*first.replaced, *second.replaced],
        sizes=first.sizes and second.sizes and tuple(map(sum, zip(first.sizes, second.sizes, strict=True))),
    )


def random_words(n: int, *key: int | str) -> np.ndarray:
    """n pseudo-random uint64 [n], a pure function of `key` (splitmix64 started at a hash of the key)."""
    return random_words_at(np.arange(n), *key)


def random_words_at(places: np.ndarray, *key: int | str) -> np.ndarray:
    """Some of the words of `random_words`, at these places >= 0, each by itself."""
    text = "\x1f".join(str(part) for part in key)
    start = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return finalise((places.astype(np.uint64) + np.uint64(1)) * np.uint64(GAMMA) + np.uint64(start))


def permutation(n: int, *key: int | str) -> np.ndarray:
    """A permutation of range(n), int64 [n], a pure function of `key`."""
    return np.argsort(random_words(n, *key), kind="stable")


ROUNDS = 8  # of the Feistel network; even, so that the halves end as wide as they began
LEAST_BITS = 8  # of its domain; with fewer the halves hardly mix


def keyed_places(places: np.ndarray, n: int, *key: int | str) -> np.ndarray:
    """Where some places of range(n) go in a permutation of it that is evaluated place by place, int64.

    A Feistel network over the next power of two: (left, right) -> (right, left ^ word(right)), ROUNDS times, each time
    with other words. A place that leaves range(n) goes through it again until it is back (cycle walking), so the whole
    is a bijection of range(n) for every n. See Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002.
    """
    bits = max(LEAST_BITS, (n - 1).bit_length())
    found, out = places.astype(np.uint64), np.ones(len(places), dtype=bool)
    while out.any():
        found[out] = _feistel(found[out], bits, key)
        out = found >= n
    return found.astype(np.int64)


def _feistel(values: np.ndarray, bits: int, key: tuple[int | str, ...]) -> np.ndarray:
    """One pass through the network on range(2^bits), uint64."""
    widths = bits - bits // 2, bits // 2  # of the left and the right half, exchanged at every round
    for number in range(ROUNDS):
        left, right = values >> np.uint64(widths[1]), values & np.uint64((1 << widths[1]) - 1)
        mixed = (left ^ random_words_at(right, *key, number)) & np.uint64((1 << widths[0]) - 1)
        values = right << np.uint64(widths[0]) | mixed
        widths = widths[::-1]
    return values


def rank_slice(n_global: int, rank: int, world: int) -> slice:
    """The contiguous rows of rank `rank`: all n_global rows are covered once, shares differ by at most one."""
    assert 0 <= rank < world and n_global >= 0, (n_global, rank, world)
    return slice(rank * n_global // world, (rank + 1) * n_global // world)


def rank_sizes(n_global: int, world: int) -> tuple[int, ...]:
    """Rows of every rank's `rank_slice`."""
    shares = (rank_slice(n_global, rank, world) for rank in range(world))
    return tuple(share.stop - share.start for share in shares)


class Cycle:
    """Batches of a fixed size over endless epochs.

    Row r of step t has the global position g = t * B + r; it is id number g % n of epoch g // n.
    Batches run across epoch borders, so nothing is dropped and nothing repeats within an epoch; with
    n < B one id may occur several times in a batch, each time with another epoch number.

    Args:
        ids_per_epoch: epoch -> its n ids in order; the same ids in every epoch.
        batch: B, at least 1.
    """

    def __init__(self, ids_per_epoch: Callable[[int], Sequence[str]], batch: int) -> None:
        assert batch >= 1, batch
        self._ids_per_epoch = ids_per_epoch
        self._orders: dict[int, Sequence[str]] = {}
        self.batch = batch
        self.num_ids = len(self.order(0))
        assert self.num_ids >= 1, "a cycle needs at least one id"

    def order(self, epoch: int) -> Sequence[str]:
        """The ids of one epoch in order (the few orders a batch touches are kept)."""
        if epoch not in self._orders:
            order = self._ids_per_epoch(epoch)
            keep = 2 + (self.batch // max(len(order), 1))
            while len(self._orders) >= keep:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = order
        return self._orders[epoch]

    def positions(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, positions within the epoch), int64, of these rows of the step's global batch."""
        assert step >= 0, step
        first = step * self.batch
        return np.divmod(np.arange(first, first + self.batch, dtype=np.int64)[rows], self.num_ids)

    def at(self, step: int, rows: slice = slice(None)) -> tuple[np.ndarray, list[str]]:
        """(epochs int64 [n], ids) of these rows of the step's global batch; pure in `step`."""
        epochs, positions = self.positions(step, rows)
        ids: list[str] = []
        for epoch in np.unique(epochs).tolist():  # ascending, as the rows are
            order, wanted = self.order(epoch), positions[epochs == epoch]
            ids += order.at(wanted) if hasattr(order, "at") else [order[position] for position in wanted.tolist()]
        return epochs, ids

    def coverage_steps(self) -> int:
        """Number of steps, from step 0 on, after which every id has been in a batch at least once."""
        return -(-self.num_ids // self.batch)
