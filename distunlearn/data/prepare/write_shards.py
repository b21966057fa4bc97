"""Sources to WebDataset tar shards: deterministic, over several processes, going on after a kill.

webdataset's own writer writes them: each sample is `<key>.<png|jpg|webp>`, `<key>.cls` (the label, if known) and
`<key>.json` ({"id": ...}), in the order of these names, with a running number as the key. Three groups: `members-*`
(retain and forget mixed, in an order drawn by seed, so a shard's name says nothing about what is to be forgotten),
`third_party-*`, `reserve-*` (calibration, holdout, watch). The same input gives the same bytes, whatever the number of
processes.

A shard is written together with a note of what is in it. After a kill the next attempt keeps every shard whose note
belongs to the same images, unchanged since, and whose bytes have the digest of the note.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.common.files import HashingFile, file_sha256, sync_path, write_atomic
from distunlearn.config.schema import DataConfig
from distunlearn.data.manifest.columns import NO_HASH, NO_LABEL, Columns, Row
from distunlearn.data.manifest.manifest import INDEX, SUMMARY, Manifest, Shard
from distunlearn.data.manifest.records import CODE
from distunlearn.data.prepare.draw import open_and_draw
from distunlearn.data.prepare.duplicates import duplicate_facts, perceptual_hash
from distunlearn.data.prepare.persons import with_persons
from distunlearn.data.prepare.process_pool import num_workers, run_jobs
from distunlearn.data.schedule import permutation
from distunlearn.data.sources.decode import image_size
from distunlearn.data.sources.sources import Source
from distunlearn.data.sources.tar_index import read_tar
from distunlearn.errors import DataError, UndecodableError

_GROUPS = {
    "members": ("retain", "forget"),
    "third_party": ("third_party", "third_party_audit"),
    "reserve": ("calibration", "holdout", "watch"),
}
_NAMED = 100  # undecodable images that are named at once; all of them are counted
_OURS = (INDEX, SUMMARY)
_OUR_SHARDS = re.compile(rf"({'|'.join(_GROUPS)})-\d{{6}}\.tar")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Job:
    """One shard to write. entries: (source number, id, label or None), in order; first: running number of the first."""

    name: str
    first: int
    entries: list[tuple[int, str, int | None]]


@dataclass(frozen=True)
class _Shared:
    """What every process needs: readers of the sources, the folder, the pixel limit, whether hashes are wanted."""

    readers: list[Source]
    folder: Path
    max_pixels: int
    hashes: bool


def prepare_shards(
    cfg: DataConfig,
    seed: int,
    folder: str | Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
    foreign: bool = False,
) -> Manifest:
    """Sources to shards in one call: open, draw roles, write. See `write_shards`; foreign: see `draw_roles`.

    The roles are in memory alone; `Manifest.save_request` writes them into a run directory.
    """
    opened, drawn = open_and_draw(cfg, seed, foreign)
    made = write_shards(
        opened.all, drawn.roles, folder, cfg.samples_per_shard, seed=seed, replace=replace, progress=progress,
        workers=cfg.prepare_workers, copies=cfg.copies, near_distance=cfg.near_distance, max_pixels=cfg.max_pixels,
        max_undecodable=cfg.max_undecodable, facts=drawn.facts,
    )  # fmt: skip
    return with_persons(made, drawn.person)


def write_shards(
    sources: Sequence[Source],
    roles: Mapping[str, str],
    folder: str | Path,
    samples_per_shard: int,
    *,
    seed: int,
    replace: bool = False,
    progress: Progress | None = None,
    workers: int = 1,
    copies: str = "keep",
    near_distance: int | None = None,
    max_pixels: int = 64_000_000,
    max_undecodable: float = 0.0,
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write every image that has a role, the index and the summary; all of it or nothing.

    Args:
        sources: where the ids of `roles` are read from; ids are unique over all sources.
        roles: {id: role}.
        folder: created, or replaced as a whole by a rename once everything is on disk. Shards of the
            same selection are replaced (which repairs them), those of another only with `replace`.
        seed: decides the order within each group.
        progress: called with (images written, images in all) after every shard.
        workers: processes; 0: one a core for large sets, else this one.
        copies: what to do with retained images that have the bytes of one to forget, see `copies.settle_copies`.
        near_distance: bits of a perceptual hash up to which an image is counted as a near-copy; None: no search.
        max_pixels: limit of the search for near-copies. facts: of the request.
        max_undecodable: share of a role's images that may be left out because they cannot be decoded; of those to
            forget none may.

    Raises:
        DataError: an image cannot be read, too many cannot be decoded (all of which are named), copies are refused, the
            folder holds other things or cannot be written, or another prepare writes there. What a killed prepare left
            is kept for the next one, after an error nothing.
    """
    folder = Path(folder)
    jobs = _plan(sources, roles, samples_per_shard, seed)
    try:
        with _partial_folder(folder, {job.name for job in jobs}) as partial:
            readers = [source.reader() if hasattr(source, "reader") else source for source in sources]
            shared = _Shared(readers, partial, max_pixels, near_distance is not None)
            processes = num_workers(workers, len(roles), len(jobs))
            columns, files, bad = _write_all(shared, jobs, roles, processes, progress)
            refuse_undecodable(bad, roles, max_undecodable)
            role, found = duplicate_facts(columns, copies, near_distance)
            lost = {"undecodable": len(bad), "undecodable_ids": sorted(bad)} if bad else {}
            settled, info = columns.with_roles(role), {**_facts(sources), **lost}
            manifest = Manifest(partial, settled, files, info, facts={**found, **(facts or {})})
            for job in jobs:
                _note(partial, job.name).unlink()
            manifest.save(partial)
            sync_path(partial)
            _put_in_place(partial, folder, manifest, replace)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"Shards cannot be written to {folder} ({reason}); choose another folder.") from error
    manifest.folder = folder
    return manifest


def refuse_undecodable(bad: Mapping[str, str], roles: Mapping[str, str], share: float) -> None:
    """DataError naming all of them: one is to be forgotten, or they are more than this share of a role.

    bad: {id: why}.
    """
    total, lost = Counter(roles.values()), Counter(roles[i] for i in bad)
    if not lost["forget"] and all(count <= share * total[role] for role, count in lost.items()):
        return
    named = "; ".join(why.rstrip(".") for why in list(bad.values())[:_NAMED])
    more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    forgotten = f", {lost['forget']} of them to be forgotten" if lost["forget"] else ""
    raise DataError(
        f"{len(bad)} images cannot be used{forgotten}: {named}{more}; correct or remove them all, or set "
        f"data.max_undecodable (now {share:g}, of each role; of those to forget none may be lost)."
    )


def _plan(sources: Sequence[Source], roles: Mapping[str, str], samples_per_shard: int, seed: int) -> list[_Job]:
    """Which image goes where: a pure function of the arguments."""
    home = {i: (number, label) for number, source in enumerate(sources) for i, label in source.samples}
    jobs: list[_Job] = []
    first = 0
    for group, group_roles in _GROUPS.items():
        ids = [sample_id for sample_id, role in roles.items() if role in group_roles]
        order = [ids[i] for i in permutation(len(ids), seed, "shards", group).tolist()]
        for number, start in enumerate(range(0, len(order), samples_per_shard)):
            entries = [(home[i][0], i, home[i][1]) for i in order[start : start + samples_per_shard]]
            jobs.append(_Job(f"{group}-{number:06d}.tar", first, entries))
            first += len(entries)
    return jobs


def _write_all(
    shared: _Shared, jobs: Sequence[_Job], roles: Mapping[str, str], workers: int, progress: Progress | None
) -> tuple[Columns, dict[str, Shard], dict[str, str]]:
    """All shards; their samples as columns with roles, sizes and digests, and {id: why} that are left out."""
    files: dict[str, Shard] = {}
    pieces: list[Columns] = []
    codes: list[int] = []
    bad: dict[str, str] = {}
    done = 0
    for number, (job, note) in enumerate(zip(jobs, run_jobs(_write_shard, shared, jobs, workers), strict=True)):
        bad |= note["bad"]
        files[job.name] = Shard(note["bytes"], note["sha256"], len(note["images"]))
        pieces.append(Columns.build(_rows(number, job, note)))
        codes += [CODE[roles[sample_id]] for _, sample_id, _ in job.entries if sample_id not in note["bad"]]
        done += len(job.entries)
        if progress is not None:
            progress(done, len(roles))
    return Columns.join(pieces).with_roles(np.array(codes, dtype=np.uint8)), files, bad


def _rows(number: int, job: _Job, note: Mapping[str, Any]) -> Iterator[Row]:
    good = [entry for entry in job.entries if entry[1] not in note["bad"]]
    for (_, sample_id, label), (offset, length, sha256, near, width, height) in zip(good, note["images"], strict=True):
        known = NO_LABEL if label is None else label
        yield sample_id, number, offset, length, bytes.fromhex(sha256), known, width, height, near, None


def _write_shard(shared: _Shared, job: _Job) -> dict[str, Any]:
    """Write one shard and its note, or find both as an earlier attempt left them."""
    from webdataset import TarWriter  # imports torch, which the processes that only read do not need

    stamps = [_stamp(shared.readers[source], sample_id) for source, sample_id, _ in job.entries]
    plan = hashlib.sha256(json.dumps([asdict(job), stamps, shared.hashes]).encode()).hexdigest()
    path, note_path = shared.folder / job.name, _note(shared.folder, job.name)
    note = _good_note(path, note_path, plan)
    if note is not None:
        return note
    note_path.unlink(missing_ok=True)
    images: list[list[Any]] = []
    bad: dict[str, str] = {}
    sink = HashingFile(path)
    with sink, TarWriter(sink, "", "", 0o644, compress=False, encoder=False, mtime=0) as tar:  # owner 0 without a name
        for number, (source, sample_id, label) in enumerate(job.entries, start=job.first):
            try:
                data, kind = shared.readers[source].read(sample_id)
                width, height = image_size(data, sample_id, shared.max_pixels)
                near = perceptual_hash(data, sample_id, shared.max_pixels) if shared.hashes else NO_HASH
            except UndecodableError as error:
                bad[sample_id] = str(error)
                continue
            sample = {"__key__": f"{number:08d}", kind: data, "json": json.dumps({"id": sample_id}).encode()}
            tar.write(sample if label is None else sample | {"cls": str(label).encode()})
            images.append([0, len(data), hashlib.sha256(data).hexdigest(), near, width, height])
    good = [entry for entry in job.entries if entry[1] not in bad]
    for image, (_, sample_id, label), found in zip(images, good, read_tar(path), strict=True):
        written = None if label is None else str(label)
        assert (found.id, found.label, found.image.size) == (sample_id, written, image[1]), f"{sample_id!r} is lost"
        image[0] = found.image.offset  # where it lies is read, not reckoned
    note = {"plan": plan, "bytes": sink.size, "sha256": sink.sha256(), "images": images, "bad": bad}
    write_atomic(note_path, json.dumps(note).encode())
    return note


def _stamp(source: Source, sample_id: str) -> str:
    """What changes when an image does; of a source without stamps, the digest of the image."""
    if hasattr(source, "stamp"):
        return source.stamp(sample_id)
    return hashlib.sha256(source.read(sample_id)[0]).hexdigest()


def _note(folder: Path, name: str) -> Path:
    return folder / f".{name}.note"


def _good_note(path: Path, note_path: Path, plan: str) -> dict[str, Any] | None:
    """The note of a shard that an earlier attempt finished, if both are whole and of the same plan."""
    try:
        note = json.loads(note_path.read_bytes())
        good = note["plan"] == plan and path.stat().st_size == note["bytes"] and file_sha256(path) == note["sha256"]
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    return note if good else None


def _facts(sources: Sequence[Source]) -> dict[str, object]:
    own = [code for source in sources if (code := getattr(source, "code", None))]
    codes = {Path(code.file).name: code.sha256 for code in own}
    return {
        **({"source_code": codes} if codes else {}),
        "sources": [source.name for source in sources],
        "classes": list(sources[0].classes),
        "labels_known": sources[0].labels_known,
        "skipped_files": dict(sum((Counter(source.skipped) for source in sources), Counter())),
    }


@contextmanager
def _partial_folder(folder: Path, names: set[str]) -> Iterator[Path]:
    """A locked folder beside `folder`, which may hold shards `names` of a prepare that was killed, and nothing else.

    Unless it was renamed in the end, it and new parents are removed; after Ctrl-C it stays.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    new_parents = [parent for parent in folder.parents if not parent.exists()]  # innermost first
    kept = names | {_note(partial, name).name for name in names}
    with ExitStack() as on_exit:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir(exist_ok=True)
            handle = os.open(partial, os.O_RDONLY)
            on_exit.callback(os.close, handle)
            _lock(handle, folder)
            for left_over in partial.iterdir():
                if left_over.is_dir():
                    shutil.rmtree(left_over)
                elif left_over.name not in kept:
                    left_over.unlink()
            yield partial
        except (_BusyError, KeyboardInterrupt):
            raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):
                    parent.rmdir()
            raise


class _BusyError(DataError):
    """The partial folder is another process's: leave it alone."""


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _BusyError(f"Another prepare is writing {folder}; wait for it to end.") from error


def _put_in_place(partial: Path, folder: Path, manifest: Manifest, replace: bool) -> None:
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        _check_replaceable(folder, manifest, replace)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    try:
        os.rename(partial, folder)
    except BaseException:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
    sync_path(folder.parent)


def _check_replaceable(folder: Path, manifest: Manifest, replace: bool) -> None:
    """Only what an earlier prepare wrote may be replaced, and another selection only if asked to."""
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; expected a folder for the shards.")
    names = sorted(path.name for path in folder.iterdir())
    strange = [name for name in names if name not in _OURS and _OUR_SHARDS.fullmatch(name) is None]
    if strange:
        raise DataError(f"{folder} holds {strange[0]!r}, which prepare did not write; give an empty or a new folder.")
    try:
        found = Manifest.load(folder).index_sha256
    except DataError:
        return  # damaged shards, or an empty folder
    if found != manifest.index_sha256 and not replace:
        raise DataError(f"{folder} holds shards of another selection; give another folder or remove that one.")
