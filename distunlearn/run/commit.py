"""The verb `commit`: what a run declares before its first step."""

from __future__ import annotations

from pathlib import Path

import rfc8785

from distunlearn.common.files import write_atomic
from distunlearn.config.schema import RunConfig
from distunlearn.engine.backends import open_backend
from distunlearn.engine.commitment import declaration
from distunlearn.engine.run_directory import claim, verified_manifest
from distunlearn.engine.session import load_own_parts
from distunlearn.errors import ConfigError, DataError
from distunlearn.run.pipeline import begin
from distunlearn.verify.commitment import REQUEST


def commit(cfg: RunConfig, out: Path) -> Path:
    """Check and prepare everything, train nothing, and write what an officer is to countersign. Collective: to be
    started by the launcher of the run, for the number of processes is part of it.

    Raises:
        ConfigError: the run has begun.
    """
    load_own_parts(cfg)
    begin(cfg, out)
    world = open_backend(cfg).world

    def write() -> None:
        if (out / "ledger.jsonl").exists():
            raise ConfigError(f"{out} has begun; a commitment is made before the first step: choose another --out.")
        claim(cfg, out)
        manifest = verified_manifest(cfg, out)
        if manifest is None:
            raise DataError(f"{out} has no shards; run prepare first.")
        write_atomic(out / REQUEST, rfc8785.dumps(declaration(cfg, out, world, manifest)))

    world.on_main(write)
    return out / REQUEST
