"""The rows of some roles among a hundred million, found when they are asked for.

What is kept is how many of the rows lie before each window of WINDOW rows, 8 bytes a window, and the rows of the few
windows that were looked at last.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW = 1 << 16  # rows looked at together
KEPT = 16  # windows whose rows are kept


class RoleRows:
    """Row numbers of the roles, ascending, like an int64 array [n] that is not there.

    Args:
        role: uint8 [N], of every row. codes: the roles that count.
        borders: int64 [S + 1], ascending, first 0 and last N: where each shard begins.

    Attributes:
        starts: int64 [S + 1], how many of the rows lie before each border.
    """

    def __init__(self, role: np.ndarray, codes: Sequence[int], borders: np.ndarray) -> None:
        self._role = role
        self._wanted = np.zeros(256, dtype=bool)
        self._wanted[list(codes)] = True
        windows = range(0, len(role), WINDOW)
        counts = [int(self._wanted[role[start : start + WINDOW]].sum()) for start in windows]
        self._before = np.cumsum([0, *counts], dtype=np.int64)
        self._found: dict[int, np.ndarray] = {}
        self.starts = np.zeros(len(borders), dtype=np.int64)
        window_of = borders // WINDOW
        for window in np.unique(window_of).tolist():
            at = slice(*np.searchsorted(window_of, [window, window + 1]).tolist())
            self.starts[at] = self._before[window] + np.searchsorted(self._rows(window), borders[at])
        self._found.clear()

    def __len__(self) -> int:
        return int(self._before[-1])

    def __getitem__(self, places: int | slice | np.ndarray) -> np.ndarray:
        """The rows at these places, int64; of one place a scalar."""
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)))
        wanted = np.asarray(places, dtype=np.int64)
        if ((wanted < -len(self)) | (wanted >= len(self))).any():
            raise IndexError(f"a place beyond {len(self)} rows")
        flat = np.where(wanted < 0, wanted + len(self), wanted).ravel()
        rows = np.empty(len(flat), dtype=np.int64)
        windows = np.searchsorted(self._before, flat, side="right") - 1
        order = np.argsort(windows, kind="stable")
        for some in np.split(order, np.flatnonzero(np.diff(windows[order])) + 1) if len(flat) else ():
            window = int(windows[some[0]])
            rows[some] = self._rows(window)[flat[some] - self._before[window]]
        return rows.reshape(wanted.shape)[()]

    def _rows(self, window: int) -> np.ndarray:
        """The rows in one window, int64 ascending."""
        if window not in self._found:
            while len(self._found) >= KEPT:
                self._found.pop(next(iter(self._found)))
            start = window * WINDOW
            self._found[window] = np.flatnonzero(self._wanted[self._role[start : start + WINDOW]]) + start
        return self._found[window]
