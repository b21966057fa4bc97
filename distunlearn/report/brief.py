"""The page in short, for who has to decide: case, what was asked, what was done, what remains, what to do next."""

from __future__ import annotations

from typing import Any

from distunlearn.report.data import RunFiles, number
from distunlearn.report.formatting import text, whole
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
    following = next_step(run, verdict, "RUN")
    return [
        ("What was asked", _asked(run, request)),
        ("What was done", [*_done(run, request), covered["sentence"]]),
        ("What remains", _remains(run, request, rows)),
        ("Next step", [following[:1].upper() + following[1:]]),
    ]


def next_step(run: RunFiles, verdict: str, folder: str) -> str:
    """What to do now, in a sentence with commands in backticks. folder: how the run directory is called there."""
    return NEXT["purged" if verdict == "pass" and run.purge else verdict].format(folder=folder)


def _asked(run: RunFiles, request: dict[str, Any]) -> list[str]:
    chosen = "" if request["chosen"] == NOT_EVALUATED else f": {request['chosen']}"
    found = [f"To forget {request['count']} image{'' if request['count'] == '1' else 's'}{chosen}."]
    if (people := number(run.audit, "persons", "forget")) is not None:
        found.append(f"Persons on them: {whole(people)}.")
    if len(earlier := run.chain.get("images") or []) > 1:
        found.append(f"It is request {len(earlier)} on this encoder.")
    return found


def _done(run: RunFiles, request: dict[str, Any]) -> list[str]:
    took = f" It took {request['length']}." if number(run.done, "steps") is not None else ""
    found = [f"Method: {request['method']}.{took}"]
    if (dose := number(run.done, "dose")) is not None and dose != 1:
        found.append(f"Of the move that this made, the encoder keeps the share {text(dose, 2)}, which was chosen.")
        if dose == 0:
            found.append("So it is the original encoder, and nothing was forgotten.")
    return found


def _remains(run: RunFiles, request: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What is not settled, and where the images still are."""
    unsettled = [row for row in (*rows["attacks"], *rows["utility"]) if row["verdict"] != "pass"]
    found = [
        f"{row['title']} ({row['word'].lower()}){': ' + row['reason'] if row['reason'] else ''}."
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
