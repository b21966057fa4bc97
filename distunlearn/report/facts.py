"""What was asked, what was done, what it cost, and with which software: values for the page."""

from __future__ import annotations

import re
from typing import Any

from distunlearn.config.checks import HANDED_OVER
from distunlearn.config.registry import METHOD, find
from distunlearn.errors import ConfigError
from distunlearn.report.chain import chain
from distunlearn.report.data import RunFiles, number, tree
from distunlearn.report.formatting import percent, seconds, signed, text, whole
from distunlearn.report.texts import NOT_EVALUATED, ROLES, SOURCES

CLASS = re.compile(r"class:(-?\d{1,9})")
PATH_KEYS = frozenset(
    ("root", "shards", "store", "store_cache", "third_party_root", "holdout_root", "checkpoint", "forget", "reuse",
     "persons", "previous", "exclude", "reference")
)  # fmt: skip
HIDDEN_PATH = "(a path, not shown)"
MAX_ROWS = 300  # of settings or versions


def request(run: RunFiles) -> dict[str, Any]:
    """How many images of which source, how chosen, when, by which method; and the images of each role."""
    data = tree(run.config, "data")
    counts = _role_counts(run)
    requested = number(run.audit, "coverage", "requested")
    members = [counts.get("forget"), counts.get("retain")]
    source, method = _name(data, "source"), _name(tree(run.config, "method"), "name")
    third = data.get("third_party_source")
    copies = number(run.request, "facts", "forget_with_copy_in_retain")
    return {
        "count": whole(requested if requested is not None else counts.get("forget")),
        "members": whole(None if None in members else sum(m or 0 for m in members)),
        "source": SOURCES.get(source, source),
        "chosen": _chosen(data.get("forget"), run.config.get("seed"), source == HANDED_OVER),
        "third_party": SOURCES.get(third, third) if isinstance(third, str) else _own_third_party(run),
        "method": _method(method)[0],
        "encoder": HIDDEN_PATH if "/" in (encoder := _name(tree(run.config, "encoder"), "name")) else encoder,
        "objective": _trained_with(run),
        "when": run.finished or "not recorded",
        "length": _length(run),
        "copies": None if not copies else whole(copies),
        "left_out": [*_named(run), *_left_out(run), *_enlarged(run), *_not_probed(run), *_persons(run)],
        "chain": chain(run),
        "checkpoint": _checkpoint(run),
        "reused": tree(run.config, "runtime").get("reuse") is not None,
        "roles": [
            {"title": title, "meaning": meaning, "count": whole(counts.get(name))}
            for name, (title, meaning) in ROLES.items()
            if name != "watch" or counts.get(name)
        ],
    }


def _non_members_were_named(run: RunFiles) -> bool:
    told = {**tree(run.plan, "request"), **tree(run.request, "facts")}
    return told.get("non_members") == "named" or tree(run.config, "data").get("source") == HANDED_OVER


def _own_third_party(run: RunFiles) -> str:
    if _non_members_were_named(run):
        return "the images that were named as never trained on"
    return "the same source as the members"


def _named(run: RunFiles) -> list[str]:
    """Who says which images the encoder that was handed in was not trained on."""
    if not tree(run.config, "encoder").get("checkpoint") or not _non_members_were_named(run):
        return []
    return [
        "Which images the original encoder was never trained on was stated with the request. None of them has the "
        "bytes of a training image; more cannot be checked."
    ]


def _trained_with(run: RunFiles) -> str:
    """The loss of the original encoder."""
    own = tree(run.config, "encoder").get("trained_with")
    return own if isinstance(own, str) and own else _name(tree(run.config, "objective"), "name")


LEFT_OUT = (
    ("skipped_files", "Files of the source that were left out, because they are no images that can be read: {}."),
    (
        "dropped_copies",
        "Images left out, because a member or an image of another group has the same bytes: {}.",
    ),
    ("near_copies_of_members", "Images that count as never trained on and look almost like a member: {}."),
)


def _left_out(run: RunFiles) -> list[str]:
    """Sentences about images that are in no group, and about those that are doubtful in theirs."""
    facts = {**tree(run.shards, "info"), **tree(run.request, "facts")}
    counts = ((sentence, tree(facts, key)) for key, sentence in LEFT_OUT)
    sums = ((sentence, sum(number(found, name) or 0 for name in found)) for sentence, found in counts)
    return [sentence.format(whole(count)) for sentence, count in sums if count]


def _enlarged(run: RunFiles) -> list[str]:
    """A sentence about images that have fewer pixels than the encoder takes."""
    small, looked_at = (number(run.plan, "request", "smaller_than_the_encoder", n) for n in ("images", "looked_at"))
    if not small:
        return []
    size = whole(number(run.config, "encoder", "image_size"))
    return [
        f"Of {whole(looked_at)} images whose size was looked at, {whole(small)} are smaller than the {size} pixels "
        "that the encoder takes; they are shown to it enlarged."
    ]


def _not_probed(run: RunFiles) -> list[str]:
    """Sentences about layers whose gradients nothing here looks at image by image."""
    found = tree(run.plan, "not_probed")
    who = {"constraint": "The method's gradient constraint", "audit": "The gradient classifier of the audit"}
    return [
        f"{words} sees the gradients of all layers that can be followed image by image, without these: "
        f"{'; '.join(map(str, found[name]))}."
        for name, words in who.items()
        if isinstance(found.get(name), list)
    ]


def _persons(run: RunFiles) -> list[str]:
    """Sentences about the persons on the images, where they are known; by numbers, never by names."""
    told, settled = tree(run.audit, "persons"), tree(run.request, "facts", "persons")
    asked, others = number(told, "forget"), number(told, "holdout")
    if asked is None:
        return []
    how = "Intervals are over persons." if told.get("are_units") is True else (
        "Fewer than 20 are no units: intervals are over images, and say nothing about other images of these persons."
    )  # fmt: skip
    found = [f"The request is of {whole(asked)} persons; {whole(others)} others are on the held-out images. {how}"]
    if stay := number(settled, "images_of_requested_that_stay"):
        found.append(f"{whole(stay)} images of the requested persons stay among the retained ones.")
    each = tree(told, "attacks", "view_agreement").get("each")
    gaps = [(number(row, "unlearned"), number(row, "retrained"), number(row, "images")) for row in each or ()]
    far = max(
        ((u - r, n) for u, r, n in gaps if u is not None and r is not None), key=lambda g: abs(g[0]), default=None
    )
    if far is not None:
        found.append(
            f"By view agreement the requested person who is farthest from retraining differs by {signed(far[0], 2)} "
            f"({whole(far[1])} images)."
        )
    return found


def _checkpoint(run: RunFiles) -> list[str]:
    """What was taken from the encoder that was handed in, and of what kind the yardstick then is."""
    encoder = tree(run.config, "encoder")
    if not encoder.get("checkpoint"):
        return []
    taken = run.original.get("checkpoint")
    notes = [str(note) for note in taken] if isinstance(taken, list) else ["What was taken from it is not recorded."]
    means, stds = (", ".join(map(str, encoder.get(key) or ())) or NOT_EVALUATED for key in ("mean", "std"))
    notes.append(f"Its images are normalised by mean {means} and standard deviation {stds}.")
    objective = _name(tree(run.config, "objective"), "name")
    unnamed = f"It is taken to have been trained with {objective}, as no other loss was named."
    return [*notes, *(other_kind(run) or [unnamed]), *_other_training(run)]


def _other_training(run: RunFiles) -> list[str]:
    """By which settings the yardstick was trained: nobody can read the original's from its weights."""
    pretrain = tree(run.config, "pretrain")
    epochs, batch = (number(pretrain, name) for name in ("epochs", "batch"))
    if not number(run.audit, "cost", "retrain_images"):
        return []
    passes = "1 epoch" if epochs == 1 else f"{whole(epochs)} epochs"
    return [
        f"The retrained encoder was trained by the settings of this run, {passes} in batches of {whole(batch)}. As far "
        "as the original was trained otherwise, a difference between the two need not come from the images to forget."
    ]


def grounds(run: RunFiles) -> Any:
    """What gates of attacks compare with: `retrained_encoder`, `brought_encoders`, `reference_groups` or `none`."""
    return tree(run.audit, "evidence").get("kind", "retrained_encoder")


def compared(run: RunFiles) -> str:
    """What the gates of the attacks are the difference of."""
    return (
        "AUC unlearned minus retrained"
        if grounds(run) in ("retrained_encoder", "brought_encoders")
        else "AUC minus 0.5"
    )


def brought(run: RunFiles) -> list[str]:
    """Whose word it is that the encoders which the gates compare with never saw the images, if any were brought."""
    count, shown = number(run.audit, "evidence", "encoders"), tree(run.retrained, "reference")
    if not count:
        return []
    which = "an encoder" if count == 1 else f"the mean of {whole(count)} encoders"
    told = "That the images to forget were no part of its training is the word of who brought it."
    if count == 1 and shown:
        told = (
            f"It is the retrained encoder of another run, trained on {whole(number(shown, 'images'))} images, where "
            f"this run keeps {whole(number(shown, 'of_images'))}; by the roles there, no image to forget and no "
            "non-member of this run is among them, by their bytes."
        )
    elif count > 1:
        told = "That the images to forget were no part of their training is the word of who brought them."
    return [f"This run retrained no encoder: the gates compare with {which} that audit.reference names. {told}"]


def other_kind(run: RunFiles) -> list[str]:
    """What it means that an encoder was trained with another loss than the retrained one."""
    objective, own = _name(tree(run.config, "objective"), "name"), tree(run.config, "encoder").get("trained_with")
    if not isinstance(own, str) or own == objective:
        return []
    return [
        f"The encoder was trained with {own}, the retrained one with {objective}: the yardstick is of another kind; "
        "a difference between them need not come from the images to forget."
    ]


def _name(settings: dict[str, Any], key: str) -> str:
    value = settings.get(key)
    return value if isinstance(value, str) and value else NOT_EVALUATED


def _method(name: str) -> tuple[str, bool]:
    """What the method does, in plain words, and whether it looks at the forget images; its name if it is not here."""
    try:
        method = find(METHOD, name)
    except ConfigError:
        return name, True
    return method.report, method.forgets


def _role_counts(run: RunFiles) -> dict[str, float]:
    """Images of each role, from the request, the plan or the audit."""
    found = tree(run.request, "roles") or tree(run.plan, "roles") or tree(run.audit, "images")
    return {name: value for name in ROLES if (value := number(found, name)) is not None}


def _length(run: RunFiles) -> str:
    """Steps of the forgetting, and whether it was interrupted."""
    steps, attempts = number(run.done, "steps"), number(run.done, "attempts")
    if steps is None:
        return NOT_EVALUATED
    resumed = f", resumed after an interruption ({whole(attempts)} attempts)" if attempts and attempts > 1 else ""
    return f"{whole(steps)} training steps{resumed}"


def _chosen(forget: Any, seed: Any, handed_over: bool) -> str:
    """How the forgotten images were chosen; the name of a list file is never shown. handed_over: as a dataset."""
    if isinstance(forget, str):
        if match := CLASS.fullmatch(forget):
            return f"every member image of class {match[1]}"
        try:
            forget = float(forget) if "." in forget else int(forget)
        except ValueError:
            return "the images on a list that was handed in as a file (its name is not shown)"
    if handed_over:
        return "all images of the dataset that was handed over to be forgotten"
    if isinstance(forget, bool) or not isinstance(forget, (int, float)):
        return NOT_EVALUATED
    drawn = f"drawn by chance with seed {seed}" if isinstance(seed, int) else "drawn by chance"
    if isinstance(forget, float):
        return f"{100 * forget:g} % of the member images, {drawn}"
    return f"{whole(forget)} of the member images, {drawn}"


def coverage(run: RunFiles) -> dict[str, Any]:
    """Was every requested image really processed, and was none kept as training material?"""
    found = tree(run.audit, "coverage")
    names = ("requested", "consumed_min", "consumed_max", "used_as_retain")
    values = {name: number(found, name) for name in names}
    least, retained = values["consumed_min"], values["used_as_retain"]
    if least == 0 and retained == 0 and not _method(_name(tree(run.config, "method"), "name"))[1]:
        state = "not_evaluated"
        sentence = (
            "The method of this run never looks at the images to forget, so there is no processing to count. "
            "None was used as an image to keep."
        )
    elif least is None or retained is None or None in values.values():
        state, sentence = "not_evaluated", "The record of what was processed is missing: coverage is not evaluated."
    elif least >= 1 and retained == 0:
        state = "pass"
        sentence = (
            f"Every requested image ({whole(values['requested'])}) entered the forgetting, at least "
            f"{whole(least)} and at most {whole(values['consumed_max'])} times. None was used as an image to keep."
        )
    else:
        faults = ["at least one requested image never entered the forgetting"] if least < 1 else []
        faults += ["requested images were used as images to keep"] if retained else []
        state = "fail"
        sentence = f"Not every request was carried out: {' and '.join(faults)}."
    shown = {name: whole(value) for name, value in values.items()}
    return {"state": state, "sentence": sentence, "shown": shown}


def cost(run: RunFiles) -> dict[str, Any]:
    """Images and time of forgetting and of retraining, and their ratio."""
    found = tree(run.audit, "cost")
    rows = []
    units = (("images", "Images passed through the encoder", whole), ("seconds", "Time, in seconds", seconds))
    for unit, title, show in units:
        unlearn, retrain = number(found, f"unlearn_{unit}"), number(found, f"retrain_{unit}")
        ratio = unlearn / retrain if unlearn is not None and retrain is not None and retrain > 0 else None
        values = {"unlearned": unlearn, "retrained": retrain}
        rows.append(
            {
                "unit": unit,
                "title": title,
                "unlearn": show(unlearn),
                "retrain": show(retrain),
                "share": percent(ratio, 0 if ratio is not None and ratio >= 0.1 else 1),
                "values": {name: value for name, value in values.items() if value is not None and value >= 0},
            }
        )
    images = number(found, "pretrain_images")
    trained = "new heads for the original" if tree(run.config, "encoder").get("checkpoint") else "the original"
    before = (
        f"Training {trained} took {whole(images)} of them." if images else "The original was not trained in this run."
    )
    return {"rows": rows, "before": before}


def provenance(run: RunFiles) -> dict[str, Any]:
    """Digest of the settings, versions, hardware, and the settings themselves with paths left out."""
    digest = run.plan.get("digest")
    env, torch = run.env, tree(run.env, "torch")
    versions = [("distunlearn", env.get("distunlearn")), ("Python", env.get("python"))]
    versions += list(tree(env, "packages").items())
    cpu = tree(env, "cpu")
    gpus = torch.get("gpus")
    hardware = [
        ("system", env.get("platform")),
        ("processor", cpu.get("model")),
        ("cores", cpu.get("cores")),
        ("memory", None if number(env, "memory_gib") is None else f"{text(number(env, 'memory_gib'), 1)} GiB"),
        ("accelerators", "; ".join(map(str, gpus)) or "none" if isinstance(gpus, list) else None),
    ]
    settings = _flat(run.config)
    return {
        "digest": digest if isinstance(digest, str) else None,
        "sha256": run.config_sha256,
        "weights": run.checked.states.get("unlearned"),
        "notes": run.checked.notes,
        "versions": _rows(versions),
        "hardware": _rows(hardware),
        "settings": settings[:MAX_ROWS],
        "more_settings": max(0, len(settings) - MAX_ROWS),
    }


def _rows(pairs: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in pairs if isinstance(value, (str, int, float))][:MAX_ROWS]


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text). What may name a file, and with it a person, is left out."""
    if isinstance(value, dict) and value:
        return [row for key, inner in value.items() for row in _flat(inner, f"{prefix}.{key}" if prefix else key)]
    key = prefix.rsplit(".", 1)[-1]
    if value is None or value == {} or value == []:
        return [(prefix, "–")]
    shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    named = isinstance(value, str) and key in PATH_KEYS and not CLASS.fullmatch(value) and not value.isdigit()
    if named or "/" in shown or "\\" in shown:
        return [(prefix, HIDDEN_PATH)]
    return [(prefix, shown[:200])]
