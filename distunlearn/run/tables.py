"""What a run holds of every image and step, as tables of pandas; `to_parquet(FILE)` of a table keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distunlearn.audit.signals.cache import signals_file
from distunlearn.engine.metrics_log import METRICS
from distunlearn.errors import ConfigError, DataError
from distunlearn.verify.records import read_records
from distunlearn.verify.run import FOLDERS
from distunlearn.verify.scores import read_scores

if TYPE_CHECKING:
    import pandas


def scores(run: Path) -> pandas.DataFrame:
    """A row for each encoder and image: `encoder`, `id`, `role`, `label`, a column for each attack (NaN: no score).

    Raises:
        DataError: the run was not audited. ConfigError, here and below: pandas is not installed.
    """
    found = read_scores(run / "audit")
    if not found:
        raise DataError(f"{run} was not audited yet; call audit() first.")
    rows = [{"encoder": e, "id": i, **row} for e, file in found.items() for i, row in file["samples"].items()]
    return _pandas().DataFrame(rows)


def embeddings(run: Path) -> pandas.DataFrame:
    """A row for each encoder and audited image: `encoder`, `id`, `role`, `label` (-1: unknown), `embedding` [E].

    Raises:
        DataError: the audit kept none.
    """
    tables = []
    for encoder in FOLDERS:
        path = signals_file(run, encoder)
        if path.exists():
            with np.load(path, allow_pickle=False) as kept:
                columns = {"id": kept["ids"], "role": kept["roles"], "label": kept["labels"]}
                tables.append(
                    _pandas().DataFrame({"encoder": encoder, **columns, "embedding": list(kept["embedding"])})
                )
    if not tables:
        raise DataError(
            f"{run} holds no embeddings; set audit.keep_signals=true and audit again, and the audit keeps them."
        )
    return _pandas().concat(tables, ignore_index=True)


def metrics(run: Path) -> pandas.DataFrame:
    """A row for each line of `metrics.jsonl`: `phase`, `step`, `wall`, `attempt`, and a column for each value.

    Raises:
        DataError: the file is missing or damaged.
    """
    rows = [row for _, row in read_records(run / METRICS)]
    return _pandas().DataFrame([{**row, **row.pop("values")} for row in rows])


def _pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise ConfigError("pandas is not installed, and this is a table of it; pip install pandas.") from None
    return pandas
