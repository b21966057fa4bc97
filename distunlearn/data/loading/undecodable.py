"""Images that cannot be decoded: counted by role, limited, and never passed over in silence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from distunlearn.common.text import printable
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.errors import CoverageError, DataError

SHOWN = 5  # ids in a message


class Undecodable:
    """What was found so far, and whether it is too much.

    Args:
        share: of a role's images that may be undecodable, 0 to 1; rounded down to whole images.

    Attributes:
        found: {id: sentence that says why}.
    """

    def __init__(self, manifest: Manifest, share: float) -> None:
        self.found: dict[str, str] = {}
        self._manifest = manifest
        self._share = share

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self.found

    def add(self, found: Mapping[str, str]) -> None:
        """Take note of images.

        Raises:
            CoverageError: one of them is to be forgotten; none of those is ever replaced by another.
            DataError: too many of one role.
        """
        self.found.update(found)
        self.check(self.found)

    def check(self, ids: Iterable[str]) -> None:
        """Judge ids that this or another process found, as `add` does."""
        by_role: dict[str, list[str]] = {}
        for sample in self._manifest.lookup(sorted(set(ids))):
            by_role.setdefault(sample.role, []).append(sample.id)
        for role, those in sorted(by_role.items()):
            names = ", ".join(repr(printable(i)) for i in those[:SHOWN]) + (", ..." if len(those) > SHOWN else "")
            why = next((f" ({self.found[i]})" for i in those if i in self.found), "")
            if role == "forget":
                raise CoverageError(
                    f"{len(those)} forget images cannot be decoded, so nothing can be forgotten about them: {names}"
                    f"{why}; replace the files or take them off the list, and prepare again."
                )
            total = len(self._manifest.select(role).ids)
            if len(those) > self._share * total:
                raise DataError(
                    f"{len(those)} of {total} {role} images cannot be decoded: {names}{why}; expected at most "
                    f"{self._share:.2%} (data.max_undecodable); replace the files and prepare again, or raise that."
                )
