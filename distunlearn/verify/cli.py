"""`distunlearn verify` and, of the wheel that has nothing else, `distunlearn-verify`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .check import verify
from .errors import ConfigError, DistunlearnError
from .keys import read_trust
from .records import read_plain


def run(
    certificate: Path,
    *,
    trust: Path | None = None,
    export: Path | None = None,
    run_dir: Path | None = None,
    secret: Path | None = None,
    as_json: bool = False,
) -> int:
    """Check, print what was found, and return the exit code.

    Raises:
        ConfigError: an input is not there.
    """
    try:
        data = read_plain(certificate)
    except OSError as error:
        raise ConfigError(
            f"{certificate} cannot be read ({error.strerror or error}); give a certificate.json."
        ) from None
    found = verify(data, trust=read_trust(trust) if trust else None, export=export, run=run_dir, secret=secret)
    print(json.dumps(found.as_dict(), indent=1) if as_json else found)
    return found.exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """The command of the wheel."""
    parser = argparse.ArgumentParser("distunlearn-verify", description="Check a certificate of distunlearn, offline.")
    parser.add_argument("certificate", type=Path)
    for name, words in (
        ("trust", "your own file of the keys that you trust"),
        ("export", "folder of the encoder that is deployed"),
        ("run", "run directory"),
        ("secret", "its run secret, where it is not in the run directory"),
    ):
        parser.add_argument(f"--{name}", type=Path, help=words)
    parser.add_argument("--json", action="store_true", help="plain data in place of words")
    given = parser.parse_args(argv)
    try:
        return run(
            given.certificate, trust=given.trust, export=given.export, run_dir=given.run, secret=given.secret,
            as_json=given.json,
        )  # fmt: skip
    except DistunlearnError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
