"""The page in short, for who has to decide: case, what was asked, what was done, what remains, what to do next."""

from __future__ import annotations

from typing import Any

from distunlearn.report.data import RunFiles, number
from distunlearn.report.formatting import whole
from distunlearn.report.texts import NEXT, NOT_EVALUATED
from distunlearn.verify.commitment import kept_commitment

NO_REFERENCE = "none; an officer gives one by countersigning the commitment before the run"
MAX_OPEN = 20  # checks that are named one by one


def case(run: RunFiles) -> list[tuple[str, str]]:
    """Case reference and digest of the request: by these a file about the request finds its report."""
    kept = kept_commitment(run.folder) if run.folder else None
    return [
        ("Case reference", str(kept[1].reference) if kept else NO_REFERENCE),
        ("Digest of the request", run.request_sha256 or NOT_EVALUATED),
    ]


def brief(
    run: RunFiles, request: dict[str, Any], covered: dict[str, Any], verdict: str, rows: dict[str, list[dict[str, Any]]]
) -> list[tuple[str, list[str]]]:
    """(heading, sentences). request, covered: of `facts`. verdict: its name. rows: of `evidence.gates`."""
    asked = f"To forget {request['count']} images: {request['chosen']}."
    done = f"Method: {request['method']}. It took {request['length']}." if number(run.done, "steps") is not None else (
        f"Method: {request['method']}."
    )  # fmt: skip
    following = NEXT[verdict].format(folder="RUN")
    return [
        ("What was asked", [asked]),
        ("What was done", [done, covered["sentence"]]),
        ("What remains", _remains(run, request, rows)),
        ("Next step", [following[:1].upper() + following[1:]]),
    ]


def _remains(run: RunFiles, request: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What is not settled, and where the images still are."""
    unsettled = [row for row in (*rows["attacks"], *rows["utility"]) if row["verdict"] != "pass"]
    found = [
        f"{row['title']}: {row['word'].lower()}{', for ' + row['reason'] if row['reason'] else ''}."
        for row in unsettled[:MAX_OPEN]
    ]
    if request["copies"]:
        found.append(f"{request['copies']} of the forgotten images have an exact copy among the images that stay.")
    purged = number(run.purge, "images")
    if purged is None:
        found.append("The forgotten images themselves: this run has deleted none of them from its shards.")
    else:
        found.append(f"{whole(purged)} images were deleted from the shards; sources and backups are not reached.")
    return found
