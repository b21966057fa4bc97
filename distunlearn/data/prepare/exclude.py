"""`data.exclude`: images that were forgotten elsewhere, by a list or by the chain of another run.

They play no part: no training, no draw of roles, no audit as non-members, for the encoder may once have known them.
A list names ids, URLs, keys or digests, as `data.forget_by` says; entries that no image has are counted, for the images
may be gone. A chain (`chain.json`, or the run directory that holds it) finds them by the digest of their bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.ids import IdTable
from distunlearn.data.prepare.forget_list import resolve_list
from distunlearn.verify.chain import Chain


def excluding_chain(cfg: DataConfig) -> Chain | None:
    """The chain that the settings name; None where they name a list, or nothing."""
    if cfg.exclude is None:
        return None
    path = Path(cfg.exclude)
    return Chain.load(path) if path.is_dir() or path.suffix == ".json" else None


def excluded_ids(cfg: DataConfig, ids: Sequence[str], names: Sequence[Collection[str]] | None = None) -> set[str]:
    """Ids among these that the list of the settings names; none where it is a chain, or where there is no list.

    names: by what a list may mean each of them, see `resolve_list`.

    Raises:
        DataError: the list cannot be read, or has faults.
    """
    if cfg.exclude is None or excluding_chain(cfg) is not None:
        return set()
    table = IdTable.of(ids)
    by = cfg.forget_by if names is not None else "id"
    found = resolve_list(cfg.exclude, table, root=cfg.root, by=by, names=names, allow_missing=True)
    return set(table.at(found.forget))
