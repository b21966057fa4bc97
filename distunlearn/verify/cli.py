"""`distunlearn verify` and, of the wheel that has nothing else, `distunlearn-verify`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .check import Further, Given, verify
from .errors import ConfigError, DistunlearnError
from .keys import read_trust
from .records import read_plain

INPUTS = {
    "trust": "your own file of the keys that you trust",
    "commitment": "what was countersigned before the run, where it is not in the run directory",
    "register": "the officer's register of commitments",
    "revocations": "folder of revocations",
    "previous": "the certificate before this one",
    "timestamps": "folder of commitment.tsr and certificate.tsr, the answers of a time stamp service",
    "tsa": "root certificates of the time stamp services that you trust (PEM)",
    "disposal": "what the operator signed about deletion",
    "receipt": "receipt of one image",
    "image": "the very file of that image",
    "export": "folder of the encoder that is deployed",
    "run": "run directory",
    "secret": "its run secret, where it is not in the run directory",
}


def run(
    certificate: Path,
    inputs: Mapping[str, Path | None],
    further: Mapping[int, Further] | None = None,
    as_json: bool = False,
    silent: bool = False,
) -> int:
    """Check, print what was found, and return the exit code.

    inputs: by the names of INPUTS. further: checks of levels 3 and 4.

    Raises:
        ConfigError: an input is not there.
    """
    try:
        data = read_plain(certificate)
    except OSError as error:
        raise ConfigError(
            f"{certificate} cannot be read ({error.strerror or error}); give a certificate.json."
        ) from None
    trust = inputs.get("trust")
    given = Given(**{**inputs, "trust": read_trust(trust) if trust else None})  # type: ignore[arg-type]
    found = verify(data, given, further)
    if not silent:
        print(json.dumps(found.as_dict(), indent=1) if as_json else found)
    return found.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """The command of the wheel."""
    parser = argparse.ArgumentParser("distunlearn-verify", description="Check a certificate of distunlearn, offline.")
    parser.add_argument("certificate", type=Path)
    for name, words in INPUTS.items():
        parser.add_argument(f"--{name}", type=Path, help=words)
    parser.add_argument("--json", action="store_true", help="plain data in place of words")
    given = parser.parse_args(argv)
    try:
        return run(given.certificate, {name: getattr(given, name) for name in INPUTS}, as_json=given.json)
    except DistunlearnError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
