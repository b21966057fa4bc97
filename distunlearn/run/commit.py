"""The verbs `commit` and `countersign`: what is declared before the first step, and by whom."""

from __future__ import annotations

import json
import secrets
import time
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
from distunlearn.verify.commitment import REQUEST, Commitment, add_to_register
from distunlearn.verify.envelope import canonical, read, sign
from distunlearn.verify.forms import read_form
from distunlearn.verify.keys import load_key


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


def countersign(request: Path, key: Path, passphrase: str, register: Path, reference: str) -> Path:
    """Sign an operator's request as the officer, with a fresh nonce, and enter it in the register.

    reference: the officer's own word for the request to forget; commitments of one reference are tries of one request.

    Returns:
        `commitment.json` beside the request.

    Raises:
        ConfigError: the key is wrong, or there is such a file. EvidenceError: the request is none.
    """
    private, target = load_key(key, passphrase), request.with_name("commitment.json")
    content = canonical(_bytes(request), "the request for a commitment")
    if not isinstance(content, dict) or (content.get("nonce"), content.get("reference")) != (None, None):
        raise ConfigError(f"{request} is no request for a commitment, or is countersigned; give the operator's file.")
    content |= {"nonce": secrets.token_hex(32), "reference": reference}
    found = read_form(Commitment, content, "the request for a commitment")
    if target.exists():
        raise ConfigError(f"{target} is there; a commitment is countersigned once: move it away.")
    data = sign("commitment", {"request": found.request.root}, content, private)
    digest = read(data, "commitment").digest
    add_to_register(register, commitment=digest, reference=reference, run=found.run, time=int(time.time()))
    write_atomic(target, data)
    return target


def in_words(request: Path) -> str:
    """What an officer is about to sign."""
    found = read_form(Commitment, canonical(_bytes(request), "the request for a commitment"), "the request")
    rules = found.rules
    return "\n".join((
        f"Run {found.run[:12]} of distunlearn {found.version} (code {found.code[:12]}), method {rules.method}.",
        f"It is asked to forget {found.request.size} images (tree {found.request.root[:12]}).",
        f"Pass: difference of AUC to retraining within {rules.view_agreement:g} (view agreement) and {rules.attack:g} "
        f"({', '.join(rules.gates)}), loss of accuracy below {rules.utility_points:g} points, "
        f"{100 * rules.confidence:g} % intervals of {rules.bootstrap} draws; audit tier {found.tier}.",
        f"Original encoder: {found.original or 'trained by this run'}. On: {json.dumps(found.numerics)}.",
        "Signing draws the nonce, from which the run's seeds follow, and enters the commitment in the register.",
    ))  # fmt: skip


def _bytes(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}); give the operator's file.") from None
