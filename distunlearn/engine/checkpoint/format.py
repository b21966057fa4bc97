"""Checkpoints: written whole or not at all, checked before use.

A checkpoint is a folder `step-XXXXXXXX`: safetensors files, and `COMMIT.json`, which names each of them with its sha256
and size and is itself under a digest. Two layouts, which every backend reads:

    state.safetensors, optimizer.safetensors          whole tensors, written by the main rank
    state-RRRRR-of-WWWWW.safetensors                  pieces, each rank's own; where they lie is in COMMIT.json, so that
                                                      a rank opens the files that hold what it needs, and no other

It is made under a temporary name. Every rank writes and syncs its files; the main rank waits for all of them, commits,
renames the folder, and only then names it in `LATEST`. A folder whose COMMIT.json does not verify is passed over in
favour of the one before.
"""

from __future__ import annotations

import grp
import hashlib
import json
import os
import pwd
import re
import shutil
import stat
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rfc8785

from distunlearn.common.files import file_sha256, sync_path, write_atomic, write_json
from distunlearn.errors import DataError
from distunlearn.verify.merkle import leaf_hash, root
from distunlearn.verify.records import read_record

FORMAT = 3
KEEP = 2  # the newest may be the one that a disk damages, so one more is kept
KEEP_ALL = 1 << 60
STEP = re.compile(r"step-\d{8}")
PLAIN = re.compile(r"[\w-][\w.-]*")  # a name in this folder, never a path


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `step` is the next step to run. What is in it: `tensors`."""

    folder: Path
    step: int
    facts: dict[str, Any]


# -- writing ---------------------------------------------------------------------------------------------------------


def commit(
    temporary: Path,
    step: int,
    files: Mapping[str, Any],
    facts: Mapping[str, Any],
    may_write: Callable[[], None] | None = None,
    sound: Collection[int] | None = None,
    keep: int = KEEP,
) -> tuple[Path, list[str]]:
    """Turn `temporary`, in which all files lie, into the checkpoint of `step`; remove all but the `keep` newest.

    Args:
        files: as `write_pieces` describes them, of all ranks.
        facts: plain JSON kept in COMMIT.json.
        may_write: asked before the commit; raises where the directory belongs to another attempt.
        sound: steps whose checkpoints are known to verify; None: all. Only they count as kept.

    Returns:
        The checkpoint's folder, and a sentence for each old one that could not be removed.
    """
    folder = temporary.parent
    final = folder / f"step-{step:08d}"
    content = {**facts, "format": FORMAT, "step": step, "files": dict(files)}
    write_json(temporary / "COMMIT.json", {**content, "commit": _digest(content)})
    if may_write is not None:
        may_write()
    damaged = folder / f".{final.name}.damaged.tmp"
    if final.exists():  # one that did not verify, made anew
        os.replace(final, damaged)
    os.replace(temporary, final)
    sync_path(folder)
    for left in folder.glob(".LATEST.*"):  # of a process that was killed here
        left.unlink(missing_ok=True)
    write_atomic(folder / "LATEST", f"{final.name}\n")
    shutil.rmtree(damaged, ignore_errors=True)
    return final, _remove_old(folder, step, sound, keep)


def begin(folder: Path, step: int, token: str = "0") -> Path:
    """A folder to make the checkpoint of `step` in, without what killed attempts left beside it.

    token: tells attempts at one step apart, for ranks that come to the folder at different times.
    """
    temporary = folder / f".step-{step:08d}.{token}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*"):
        if left != temporary or token == "0":
            shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir(exist_ok=True)
    return temporary


def _remove_old(folder: Path, newest: int, sound: Collection[int] | None, keep: int) -> list[str]:
    """Never one of the `keep` newest that are known to be sound; damaged ones of later steps wait to be made anew."""
    steps = {_number(path): path for path in _steps(folder)}
    kept = sorted(step for step in steps if step == newest or sound is None or step in sound)[-keep:]
    troubles: list[str] = []
    for step, path in steps.items():
        if step not in kept and step < newest:
            try:
                shutil.rmtree(path)
            except OSError as error:
                troubles.append(f"the old checkpoint {path.name} could not be removed ({error})")
    return troubles


def files_digest(files: Mapping[str, Any]) -> str:
    """Digest of a checkpoint's state, hexadecimal: the tree over its files, by name. files: as COMMIT.json has them."""
    leaves = [rfc8785.dumps([name, entry["sha256"]]) for name, entry in sorted(files.items())]
    return root([leaf_hash(leaf) for leaf in leaves]).hex()


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()


# -- reading ---------------------------------------------------------------------------------------------------------


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and the names of newer ones that do not.

    Selection is by step number and COMMIT.json, never by file times; LATEST is for people and scripts.

    Raises:
        DataError: checkpoints exist but none verifies, or one is of another format.
    """
    rejected: list[str] = []
    for name in candidates(folder):
        checkpoint = read_commit(folder / name)
        if checkpoint is not None and verified(checkpoint):
            return checkpoint, rejected
        rejected.append(name)
    if rejected:
        raise none_verifies(folder, rejected)
    return None, rejected


def none_verifies(folder: Path, rejected: Sequence[str]) -> DataError:
    """What to raise where checkpoints exist, all of them damaged."""
    return DataError(
        f"{folder}: none of the checkpoints {', '.join(rejected)} matches its COMMIT.json; delete the folder to start "
        "this phase anew."
    )


def candidates(folder: Path) -> list[str]:
    """Names of the checkpoints in `folder`, the newest step first, sound or not."""
    return [path.name for path in reversed(_steps(folder))] if folder.is_dir() else []


def read_commit(folder: Path) -> Checkpoint | None:
    """What COMMIT.json says; None: it is missing or damaged. The files are not looked at.

    Raises:
        DataError: it is of another format.
    """
    try:
        content = read_record(folder / "COMMIT.json")
    except DataError:
        return None  # a torn folder: the caller goes on to the one before
    try:
        version = content.get("format")
        if isinstance(version, int) and version != FORMAT:
            raise DataError(
                f"{folder} has format {version}, but this version reads format {FORMAT}; go on with the version that "
                "wrote it."
            )
        if content.pop("commit", None) != _digest(content):
            return None
        if content["step"] != _number(folder) or not content["files"] or folder.is_symlink():
            return None
        if all(PLAIN.fullmatch(name) and entry["sha256"] for name, entry in content["files"].items()):
            return Checkpoint(folder, content["step"], content)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def verified(checkpoint: Checkpoint, share: int = 0, of: int = 1) -> bool:
    """Whether the files are those that COMMIT.json names. share, of: look at every `of`-th file alone, from `share`."""
    try:
        files = sorted(checkpoint.facts["files"].items())[share::of]
        return all(file_sha256(checkpoint.folder / name) == entry["sha256"] for name, entry in files)
    except (OSError, DataError):  # a file that cannot be read
        return False


def exposed(folder: Path) -> str | None:
    """The beginning of a sentence that says who else may write into `folder`, or that another owns it; None: nobody."""
    found = folder.stat()
    if found.st_uid not in (os.geteuid(), 0):
        return f"{folder} belongs to user {found.st_uid}, not to the user of this process ({os.geteuid()})"
    if found.st_mode & stat.S_IWOTH:
        return f"{folder} may be written by every user of this machine"
    if found.st_mode & stat.S_IWGRP and not _private(found.st_gid):
        return f"{folder} may be written by every member of the group {found.st_gid}"
    return None


def _private(group: int) -> bool:
    """Whether it is the group that many systems give to this user alone, under the user's name."""
    try:
        found, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
    return found.gr_name == user and set(found.gr_mem) <= {user}


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if STEP.fullmatch(p.name) and p.is_dir())


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
