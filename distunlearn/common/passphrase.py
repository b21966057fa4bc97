"""The passphrase of a key: of a variable, or typed."""

from __future__ import annotations

import getpass
import os
import sys

from distunlearn.errors import ConfigError

VARIABLE = "DISTUNLEARN_PASSPHRASE"


def passphrase(*, twice: bool = False) -> str:
    """Of the variable, or typed; twice: asked for again.

    Raises:
        ConfigError: there is neither, or the two differ.
    """
    found = os.environ.get(VARIABLE)
    if found is not None:
        return found
    if not sys.stdin.isatty():
        raise ConfigError(f"no passphrase; set {VARIABLE}, or call this from a terminal.")
    found = getpass.getpass("passphrase: ")
    if twice and getpass.getpass("again: ") != found:
        raise ConfigError("the passphrases differ; try again.")
    return found
