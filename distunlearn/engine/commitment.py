"""A run under a commitment: what it declares before the first step, and that every attempt keeps to it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from distunlearn import __version__
from distunlearn.common.files import file_sha256, write_atomic
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import plain
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.request import REQUEST
from distunlearn.distributed.world import World
from distunlearn.engine.provenance import code_digest, numerics
from distunlearn.errors import ConfigError, EvidenceError
from distunlearn.methods.base import method_class
from distunlearn.verify.certificate import CERTIFICATE, read_predicate
from distunlearn.verify.commitment import COMMITMENT, Commitment, kept_commitment, read_commitment
from distunlearn.verify.envelope import load, read
from distunlearn.verify.figures import REFERENCES, Rules
from distunlearn.verify.forms import rules_part
from distunlearn.verify.keys import load_key, passphrase
from distunlearn.verify.ledger import read_ledger
from distunlearn.verify.receipt import ROWS, request_leaves, tree
from distunlearn.verify.records import find_record, read_plain, read_record
from distunlearn.verify.run import CHECKPOINT_SHA256, DONE, DONE_FIELDS, REFERENCE
from distunlearn.verify.secret import commitment, make_secret


class Declared(NamedTuple):
    """Digest and nonce of the commitment of a run; None: it has none."""

    digest: str | None = None
    nonce: str | None = None


def packages_digest() -> str:
    """sha256 (hex) over name, version and list of files of all installed packages."""
    found = sorted(
        (str(part.metadata["Name"]), part.version, part.read_text("RECORD") or "") for part in metadata.distributions()
    )
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def write_rows(out: Path, manifest: Manifest) -> dict[str, str]:
    """Keep the request, {id: SHA-256 of the image}, and return it.

    Raises:
        EvidenceError: the one that is kept is another.
    """
    rows = {sample.id: sample.sha256 for sample in manifest.lookup(manifest.ids("forget"))}
    path, text = out / ROWS, json.dumps(rows, sort_keys=True)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise EvidenceError(f"{path} is not the request of the shards; one of them was changed; restore it.")
    if not path.exists():
        make_secret(out)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    return rows


def declaration(cfg: RunConfig, out: Path, world: World, manifest: Manifest) -> dict[str, Any]:
    """What a commitment to this run says, as plain data; `run.yaml` and `request.json` are there."""
    secret = make_secret(out)
    sequence, previous = chain_link(cfg)
    return {
        "run": commitment(secret, "run", b""), "sequence": sequence, "previous": previous, "reference": None,
        "settings": commitment(secret, "run.yaml", (out / "run.yaml").read_bytes()),
        "rules": rules_part(Rules.of(plain(cfg))), "tier": cfg.audit.tier,
        "dose": plain(cfg.dose) if cfg.method.dose == "auto" and method_class(cfg).dosed(cfg) else None,
        "request": tree(request_leaves(write_rows(out, manifest), secret)),
        "images": commitment(secret, REQUEST, (out / REQUEST).read_bytes()),
        "original": _original(cfg), "references": source_digests(cfg, out),
        "version": __version__, "code": code_digest(), "packages": packages_digest(),
        "numerics": numerics(cfg, world), "nonce": None,
    }  # fmt: skip


def chain_link(cfg: RunConfig) -> tuple[int, str | None]:
    """Number of the run's certificate, and digest of the one of the run that it goes on from, if that has one."""
    path = Path(cfg.data.previous) / CERTIFICATE if cfg.data.previous else None
    if path is None or not path.exists():
        return 1, None
    before = read(read_plain(path), "certificate")
    return read_predicate(before.statement).sequence + 1, before.digest


def _original(cfg: RunConfig) -> str | None:
    if cfg.data.previous:
        return read_record(Path(cfg.data.previous) / DONE)["state"]
    if cfg.encoder.checkpoint:
        path = Path(cfg.encoder.checkpoint)
        return file_sha256(path) if path.is_file() else None
    done = Path(cfg.runtime.reuse).expanduser() / "original" / DONE if cfg.runtime.reuse else None
    return read_record(done)["state"] if done and done.exists() else None


def references(cfg: RunConfig) -> Iterator[tuple[str, Path]]:
    """(folder, place) of every encoder that the user brings."""
    return zip(REFERENCES, map(Path, cfg.audit.reference), strict=False)


def source_digests(cfg: RunConfig, out: Path) -> list[str]:
    """What tells the encoders that are brought: the SHA-256 of a file, the state digest of another run's encoder. Once
    they are taken the places are not needed."""
    found = []
    for name, place in references(cfg):
        done = find_record(out / name / DONE)
        if done is not None:
            kept = done.get(REFERENCE)
            found.append(done[CHECKPOINT_SHA256] if kept is None else kept["state"])
        elif place.is_dir():
            found.append(read_record(place / "retrained" / DONE, DONE_FIELDS)["state"])
        else:
            found.append(file_sha256(place))
    return found


def declared(cfg: RunConfig, out: Path, world: World, manifest: Manifest) -> Declared:
    """The commitment of this run, which this attempt keeps to; to be called on the main rank.

    At the first attempt the file that `evidence.commitment` names is signed with `evidence.key` and kept.

    Raises:
        ConfigError: the run does not keep to it, or began without it.
        EvidenceError: the file is none.
    """
    given = Path(cfg.evidence.commitment).expanduser() if cfg.evidence.commitment else None
    kept = kept_commitment(out)
    if given is not None and kept is None:
        kept = _take(cfg, given, out)
    digest = kept[0].digest if kept else None
    lines = read_ledger(out / "ledger.jsonl") if (out / "ledger.jsonl").exists() else []
    if lines and lines[0].get("prev") != digest:
        raise ConfigError(
            f"{out} began {'without a' if lines[0].get('prev') is None else 'under another'} commitment; a commitment "
            "is made before the first step: choose another --out."
        )
    if kept is None:
        return Declared()
    if given is not None and given.exists() and read_commitment(load(given))[0].digest != digest:
        raise ConfigError(f"{given} is not the commitment that {out} belongs to; leave evidence.commitment out.")
    _require_kept(kept[1], declaration(cfg, out, world, manifest))
    return Declared(digest, kept[1].nonce)


def _take(cfg: RunConfig, given: Path, out: Path) -> Any:
    if not given.exists():
        raise ConfigError(f"evidence.commitment: {given} does not exist; have {COMMITMENT.name} countersigned.")
    if cfg.evidence.key is None:
        raise ConfigError("evidence.commitment needs evidence.key, the operator's private key, which signs it.")
    envelope, _ = read_commitment(load(given))
    key = load_key(Path(cfg.evidence.key).expanduser(), passphrase())
    (out / COMMITMENT).parent.mkdir(mode=0o700, exist_ok=True)
    write_atomic(out / COMMITMENT, envelope.also_signed(key))
    return kept_commitment(out)


def _require_kept(committed: Commitment, now: dict[str, Any]) -> None:
    """Raises ConfigError where the run is not what was committed to."""
    content = committed.model_dump()
    officers = ("reference", "nonce", "sequence", "previous")
    wrong = [name for name in now if name not in officers and now[name] != content[name]]
    if "numerics" in wrong:
        told = [f"{k}: {v} declared, {now['numerics'].get(k)} now" for k, v in committed.numerics.items()
                if now["numerics"].get(k) != v]  # fmt: skip
        raise ConfigError(f"numerics differ from the commitment ({'; '.join(told)}); results would, too; restore them.")
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)} of this run {'is' if len(wrong) == 1 else 'are'} not what was committed to; restore "
            "what was declared, or commit anew in another --out."
        )
