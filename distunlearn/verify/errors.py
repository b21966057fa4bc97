"""The errors that a check of evidence can end with; `distunlearn.errors` has the others.

Every message says what was found, what was expected and what to do.
"""

from __future__ import annotations


class DistunlearnError(Exception):
    """Base of all errors with a one-sentence message; exit code 70 (internal) unless narrowed.

    agreed: True on an error that all ranks raise alike, at the same place.
    """

    exit_code = 70
    agreed = False


class ConfigError(DistunlearnError):
    """Bad usage or configuration; exit code 2."""

    exit_code = 2


class DataError(DistunlearnError):
    """Missing, damaged or contradictory data; exit code 3."""

    exit_code = 3


class EvidenceError(DataError):
    """The files of a run contradict each other or what was signed; exit code 3, of `verify` 8."""
