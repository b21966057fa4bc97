"""What `init` says of image files with the same bytes in different roles; only files of equal size are read."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator

from distunlearn.common.text import printable
from distunlearn.data.sources.image_folder import FolderSource
from distunlearn.data.sources.sources import Source

FORGET, KEEP, OUTSIDE = "images to forget", "images to keep", "non-members"
COMPARED = 20_000  # files that are read for this, at most
NO_NON_MEMBER = "an image whose bytes the encoder was trained on is no non-member, and loses that role"
EFFECT = {
    (FORGET, OUTSIDE): NO_NON_MEMBER,
    (KEEP, OUTSIDE): NO_NON_MEMBER,
    (FORGET, KEEP): "an image whose copy stays is not forgotten; data.copies says what is done: refuse, forget or keep",
}


def told_copies(images: Iterable[tuple[str, Source, str]]) -> Iterator[str]:
    """A sentence for each two roles that share bytes.

    images: (FORGET, KEEP or OUTSIDE, source, id); those in shards are passed over, for their index says it.
    """
    by_size: dict[str, list[tuple[str, FolderSource, str]]] = defaultdict(list)
    for role, source, sample_id in images:
        if isinstance(source, FolderSource):
            by_size[source.stamp(sample_id).split(":")[0]].append((role, source, sample_id))
    alike = [image for group in by_size.values() if len({role for role, _, _ in group}) > 1 for image in group]
    if len(alike) > COMPARED:
        yield f"{len(alike)} files have the size of a file in another role, too many to compare here; `prepare` does"
        return
    found: dict[bytes, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for role, folder, sample_id in alike:
        found[hashlib.sha256(folder.bytes_of(sample_id)).digest()][role].append(sample_id)
    for (one, other), effect in EFFECT.items():
        both = [ids for ids in found.values() if one in ids and other in ids]
        if both:
            example = " and ".join(repr(printable(both[0][role][0], 80)) for role in (other, one))
            count = sum(len(ids[other]) for ids in both)
            yield f"{count} of the {other} have the very bytes of {one}, such as {example}: {effect}"
