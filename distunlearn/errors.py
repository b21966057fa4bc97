"""Errors a user can meet, each with the exit code that scripts rely on.

Every message is one sentence that says what was found, what was expected and what to do.
"""

from __future__ import annotations

from distunlearn.verify.errors import ConfigError, DataError, DistunlearnError, EvidenceError

__all__ = [
    "CoverageError",
    "ConfigError",
    "DataError",
    "DistunlearnError",
    "EncoderError",
    "EvidenceError",
    "LaunchError",
    "NumericsError",
    "RankLostError",
    "StoppedError",
    "UndecodableError",
    "EXIT_GATE_FAILED",
    "EXIT_INCONCLUSIVE",
]

EXIT_GATE_FAILED = 6
EXIT_INCONCLUSIVE = 7


class LaunchError(ConfigError):
    """The launcher's variables of one process are wrong, so that it has to say so itself; exit code 2."""


class EncoderError(ConfigError):
    """A checkpoint or encoder that cannot be used (unsafe file, wrong shapes, unknown name); exit code 2."""


class UndecodableError(DataError):
    """An image whose bytes are as the manifest says, but are no image that can be used; exit code 3."""


class CoverageError(DataError):
    """A forget sample was never consumed, or was consumed as retain; exit code 3."""


class NumericsError(DistunlearnError):
    """A value that is not finite where training must not go on; exit code 4."""

    exit_code = 4


class RankLostError(DistunlearnError):
    """A rank of a distributed run died or disagreed; exit code 5."""

    exit_code = 5


class StoppedError(DistunlearnError):
    """Stopped on request in a state that resumes; exit code 75."""

    exit_code = 75
    agreed = True
