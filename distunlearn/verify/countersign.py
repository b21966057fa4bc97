"""`distunlearn countersign`, and `distunlearn-countersign` of the wheel: the officer's part before a run."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .commitment import Commitment, add_to_register
from .envelope import canonical, read, sign
from .errors import ConfigError, DistunlearnError
from .forms import read_form
from .keys import load_key, passphrase
from .records import read_plain
from .timestamps import write_query


def in_words(request: Path) -> str:
    """What an officer is about to sign. Errors: see `countersign`."""
    found = _read(request)
    rules = found.rules
    return "\n".join((
        f"Run {found.run[:12]} of distunlearn {found.version} (code {found.code[:12]}), method {rules.method}.",
        f"It is asked to forget {found.request.size} images (tree {found.request.root[:12]}).",
        f"Pass: difference of AUC to retraining within {rules.view_agreement:g} (view agreement) and {rules.attack:g} "
        f"({', '.join(rules.gates)}), loss of accuracy below {rules.utility_points:g} points, "
        f"{100 * rules.confidence:g} % intervals of {rules.bootstrap} draws; audit tier {found.tier}.",
        f"Original encoder: {found.original or 'trained by this run'}. "
        f"Encoder without the images: {', '.join(found.references) or 'trained by this run, or none'}. "
        f"On: {json.dumps(found.numerics)}.",
        "Signing draws the nonce, from which the run's seeds follow, and enters the commitment in the register.",
    ))  # fmt: skip


def countersign(request: Path, key: Path, secret: str, register: Path, reference: str) -> Path:
    """Sign an operator's request as the officer, with a fresh nonce, and enter it in the register.

    secret: passphrase of the key. reference: the officer's own word for the request to forget; commitments of one
    reference are tries of one request.

    Returns:
        `commitment.json` beside the request, and `commitment.tsq` to have it time stamped.

    Raises:
        ConfigError: the key is wrong, or there is such a file. EvidenceError: the request is none.
    """
    private, target = load_key(key, secret), request.with_name("commitment.json")
    if target.exists():
        raise ConfigError(f"{target} is there; a commitment is countersigned once: move it away.")
    asked = _read(request).model_dump() | {"nonce": secrets.token_hex(32), "reference": reference}
    found = read_form(Commitment, asked, "the request for a commitment")
    data = sign("commitment", {"request": found.request.root}, asked, private)
    digest = read(data, "commitment").digest
    add_to_register(register, commitment=digest, reference=reference, run=found.run, time=int(time.time()))
    with open(target, "xb") as file:
        file.write(data)
    write_query(target, digest)
    return target


def _read(request: Path) -> Commitment:
    try:
        data = read_plain(request)
    except OSError as error:
        raise ConfigError(f"{request} cannot be read ({error.strerror or error}); give the operator's file.") from None
    found = read_form(Commitment, canonical(data, "the request for a commitment"), "the request for a commitment")
    if (found.nonce, found.reference) != (None, None):
        raise ConfigError(f"{request} is countersigned already; give the operator's request.")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command of the wheel."""
    parser = argparse.ArgumentParser("distunlearn-countersign", description="Countersign what a run is to keep to.")
    parser.add_argument("request", type=Path)
    parser.add_argument("--key", type=Path, required=True, help="your private key")
    parser.add_argument("--register", type=Path, required=True, help="your register; made if it is not there")
    parser.add_argument("--reference", required=True, help="your own word for the request to forget")
    given = parser.parse_args(argv)
    try:
        print(in_words(given.request))
        print(countersign(given.request, given.key, passphrase(), given.register, given.reference))
    except DistunlearnError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
