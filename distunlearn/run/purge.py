"""The verb `purge`: the images that a run forgot leave its shards."""

from __future__ import annotations

from pathlib import Path

from distunlearn.common.files import write_json
from distunlearn.config.schema import RunConfig
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.purge import plan_purge, purge_shards, purged_before
from distunlearn.engine.run_directory import saved_config, shards_folder, shards_remote
from distunlearn.engine.run_lock import owned
from distunlearn.errors import ConfigError, DataError
from distunlearn.run.chain import keep_chain
from distunlearn.verify.secret import commitment, make_secret


def purge(run_dir: Path, apply: bool = False) -> dict:
    """Take the images that the run forgot out of its shards; without `apply` only say what would happen.

    After it the run's report can still be made, but none of its encoders can be trained or audited again; the shards
    serve other requests, and the next one of this chain.

    Returns:
        plain JSON: what is, or would be, removed; with `apply` it is also kept as `purge.json` in the run directory.

    With `apply` the run directory is claimed, so that no audit reads the shards meanwhile.

    Raises:
        DataError: the run has not forgotten yet, was not audited, or its shards are not as the manifest says.
        ConfigError: its shards lie in an object store.
    """
    cfg, folder = saved_config(run_dir, world=1), Path(run_dir)
    remote = shards_remote(cfg)
    if remote is not None:
        raise ConfigError(
            f"the shards of {folder} lie in {remote.url}, and only local shards can be purged; purge a local copy of "
            "them and put it in their place."
        )
    for name, verb in (("done.json", "unlearn"), ("audit/summary.json", "audit")):
        if not (folder / name).exists():
            raise DataError(
                f"{folder} has no {name}, so its images are still needed; finish the run ({verb}) before purging them."
            )
    shards = shards_folder(cfg, folder)
    if not apply:
        return _purge(cfg, folder, shards, apply)
    with owned(folder):
        return _purge(cfg, folder, shards, apply)


def _purge(cfg: RunConfig, folder: Path, shards: Path, apply: bool) -> dict:
    facts: dict = {"applied": apply, "shards_folder": str(shards)}
    manifest = Manifest.load(shards, run=folder)
    if apply and manifest.ids("forget"):
        keep_chain(cfg, folder, manifest)  # by which the next request knows them
    ids = manifest.ids("forget")
    done = None if ids else purged_before(shards)
    if done is None:
        if apply:  # salted: the plain digest of a list confirms whoever guesses the list
            content = "\n".join(sorted(ids)).encode()
            facts["ids_commitment"] = commitment(make_secret(folder), "purged ids", content)
        done = purge_shards(shards, ids) if apply else plan_purge(manifest, ids)
    facts |= done.facts()
    if apply:
        Manifest.load(shards, run=folder).save_request(folder)  # without the digests of what is gone
    if apply and ("ids_commitment" in facts or not (folder / "purge.json").exists()):
        write_json(folder / "purge.json", facts)
    return facts
