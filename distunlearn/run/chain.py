"""The chain of requests that a run goes on with."""

from __future__ import annotations

from pathlib import Path

from distunlearn.config.schema import RunConfig
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.prepare.previous import chain_after
from distunlearn.errors import DataError
from distunlearn.verify.chain import CHAIN, Chain
from distunlearn.verify.records import find_record
from distunlearn.verify.run import DONE, DONE_FIELDS


def keep_chain(cfg: RunConfig, out: Path, manifest: Manifest) -> None:
    """Write `chain.json` of a run that has forgotten: the chain before it and its own request; once.

    Raises:
        DataError: the run before has no whole chain, or the encoder that it left is not the one that this run began
            with.
    """
    if (out / CHAIN).exists():
        return
    before = Chain.load(Path(cfg.data.previous)) if cfg.data.previous else Chain.new()
    original, unlearned = _state(out / "original"), _state(out)
    if before.requests and before.requests[-1]["unlearned"] != original:
        raise DataError(
            f"The encoder that {out} began with is not the one that {cfg.data.previous} left; begin anew in another "
            "--out."
        )
    chain_after(manifest, before, original=original, unlearned=unlearned).save(out)


def _state(folder: Path) -> str | None:
    """Digest of the weights of a finished encoder; None where a method has none."""
    done = find_record(folder / DONE, DONE_FIELDS)
    return done["state"] if done else None
