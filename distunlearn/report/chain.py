"""The requests before this one on the same encoder, what became of them, and what was purged; no id leaves here."""

from __future__ import annotations

from typing import Any

from distunlearn.report.data import RunFiles, number, tree
from distunlearn.report.formatting import interval, text, whole
from distunlearn.report.texts import NOT_EVALUATED


def chain(run: RunFiles) -> dict[str, Any]:
    """{"intro": sentences, "rows": a dict an earlier request, "notes": sentences}; empty for a single request."""
    images = run.chain.get("images") or []
    facts = tree(run.request, "facts", "previous") or tree(run.request, "facts", "excluded_chain")
    notes = [*_near(facts), *_purged(run)]
    if len(images) < 2:
        return {"intro": [], "rows": [], "notes": notes}
    intro = [
        f"This is request {len(images)} of a chain on one encoder: it started from the encoder that the request before "
        "had left, with its heads, and what earlier requests forgot was in none of its batches.",
    ]
    rows = []
    for place, count in enumerate(images[:-1], start=1):
        now = tree(run.audit, "earlier", str(place), "view_agreement")
        still = number(tree(run.audit, "earlier", str(place)), "images")
        if not still:
            continue
        rows.append(
            {
                "request": place, "images": whole(count), "looked_at": whole(still),
                "before": text(number(now, "original")), "after": text(number(now, "unlearned")),
                "retrained": text(number(now, "retrained")),
                "interval": interval(number(now, "low"), number(now, "high"), sign=True) or NOT_EVALUATED,
            }
        )  # fmt: skip
    lost = sum(images[:-1]) - int(number(facts, "present") or 0)
    if lost > 0:
        intro.append(
            f"{whole(lost)} of the images forgotten before are no longer in the shards; nobody can look again."
        )
    return {"intro": intro, "rows": rows, "notes": notes}


def _near(facts: dict[str, Any]) -> list[str]:
    near = number(facts, "near_copies_among_members")
    if not near:
        return []
    return [
        f"Images that stay and look almost like one that was forgotten before: {whole(near)}. The encoder learns from "
        "them."
    ]


def _purged(run: RunFiles) -> list[str]:
    count = number(run.purge, "images")
    if count is None:
        return []
    copies = number(run.purge, "copies") or 0
    return [
        f"Images purged from the shards after this audit: {whole(count)}; images with the same bytes under other names "
        f"that stay: {whole(copies)}. The source of the images and other copies are not reached by that."
    ]
