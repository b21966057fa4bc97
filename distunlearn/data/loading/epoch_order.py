"""The order of an epoch, evaluated where it is asked for: nothing is kept of it but numbers of shards.

Shards are shuffled by (seed, epoch), then samples within each block of BLOCK_SHARDS shards, so that reads stay within a
few files for a while; with up to BLOCK_SHARDS shards this is a full shuffle. The samples of a block are sorted by their
random words, up to SORTED of them at a time; a larger block goes through a keyed permutation, place by place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from distunlearn.data.manifest.ids import ids_at
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.schedule import keyed_places, permutation, random_words_at

BLOCK_SHARDS = 8  # shards shuffled together
SORTED = 1 << 20  # samples of a block that is sorted
WINDOW = 1 << 12  # places of a larger block that are evaluated together
KEPT = 4  # sorted blocks or windows that are kept


def epoch_order(manifest: Manifest, roles: str | Sequence[str], seed: int, epoch: int) -> Sequence[str]:
    """Ids of the roles in the order of this epoch; every id once, the same on every rank."""
    chosen = manifest.select(roles)
    name = roles if isinstance(roles, str) else ",".join(sorted(set(roles)))
    shards = permutation(len(chosen.shards), seed, "shards of", name, epoch)
    return EpochOrder(chosen.ids, chosen.starts, shards, (seed, "samples of", name, epoch))


class EpochOrder(Sequence[str]):
    """Ids in another order, looked up when asked for.

    Args:
        ids: n of them, shard after shard. starts: int64 [S + 1], where those of each shard begin.
        shards: int64 [S], the shards in the order of the epoch. key: of the random words.
    """

    def __init__(self, ids: Sequence[str], starts: np.ndarray, shards: np.ndarray, key: tuple[int | str, ...]) -> None:
        self._ids, self._starts, self._shards, self._key = ids, starts, shards, key
        sizes = np.diff(starts)[shards]
        firsts = np.arange(0, len(shards), BLOCK_SHARDS)
        self._borders = np.append(0, np.cumsum(np.add.reduceat(sizes, firsts) if len(firsts) else []).astype(np.int64))
        self._known: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, position: int) -> str:  # type: ignore[override]
        return self.at(np.array([position]))[0]

    def at(self, positions: np.ndarray) -> list[str]:
        """The ids at many positions, int64 [k]."""
        return ids_at(self._ids, self.places(positions))

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Numbers of the ids at these positions, among the ids in their own order, int64 [k]."""
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"a position beyond {len(self)} ids")
        blocks = np.searchsorted(self._borders, positions, side="right") - 1
        within = positions - self._borders[blocks]
        is_large = np.diff(self._borders)[blocks] > SORTED
        windows = np.where(is_large, within // WINDOW, 0)
        found = np.empty(len(positions), dtype=np.int64)
        for block, number in sorted(set(zip(blocks.tolist(), windows.tolist(), strict=True))):
            rows = np.flatnonzero((blocks == block) & (windows == number))
            found[rows] = self._piece(block, number)[within[rows] - number * WINDOW]
        return found

    def _piece(self, block: int, number: int) -> np.ndarray:
        """Places of a block in the order of the epoch, or of one window of it where it is large, int64."""
        if (block, number) not in self._known:
            while len(self._known) >= KEPT:
                self._known.pop(next(iter(self._known)))
            size = int(self._borders[block + 1] - self._borders[block])
            self._known[block, number] = self._sorted(block) if size <= SORTED else self._window(block, number, size)
        return self._known[block, number]

    def _shards_of(self, block: int) -> np.ndarray:
        return np.sort(self._shards[block * BLOCK_SHARDS : (block + 1) * BLOCK_SHARDS])

    def _sorted(self, block: int) -> np.ndarray:
        shards = self._shards_of(block)
        places = np.concatenate([np.arange(*self._starts[shard : shard + 2]) for shard in shards])
        return places[np.argsort(random_words_at(places, *self._key), kind="stable")]

    def _window(self, block: int, number: int, size: int) -> np.ndarray:
        positions = np.arange(number * WINDOW, min((number + 1) * WINDOW, size))
        within = keyed_places(positions, size, *self._key, block)
        shards = self._shards_of(block)
        before = np.cumsum(self._starts[shards + 1] - self._starts[shards])
        at = np.searchsorted(before, within, side="right")
        return self._starts[shards[at] + 1] - (before[at] - within)
