"""Which tensors of a foreign checkpoint are the backbone's, and what they are called in timm.

Training scripts keep a backbone inside other modules (`state_dict.module.encoder_q.conv1.weight`), beside heads,
queues, moving averages and optimizer state. No list of such names is kept here: a prefix is one of the backbone's if
the tensors below it have, in one of the dialects, all of its names and shapes, and none that belongs inside it is left.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from distunlearn.encoders.dialects import DIALECTS, timm_filter

COUNTER = "num_batches_tracked"  # absent from checkpoints of before 2018; only a cumulative average reads it
WRAPPERS = re.compile(r"\b(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")  # of torch, anywhere
# Copies that follow another one: a momentum encoder's, an exponential average's.
MOVING = re.compile(r"momentum|target|(?:^|[._])(?:ema|key)(?:[._]|$)|_(?:k|ema)(?:[._]|$)")
DEPTH = 8  # mappings in mappings
PARTS = 24  # of a dotted name
TENSORS = 200_000
LARGEST = 4  # times the backbone's size, of a tensor that is looked at
PREFIXES = 32  # tried in every dialect
PARTS_BELOW = (2, 8)  # a prefix has at least 1 / this of the backbone's number of tensors; the first that finds one


class Reading(NamedTuple):
    """One way to read a checkpoint as a backbone.

    prefix: in front of the backbone's names, with the keys of the mappings that hold them; "" or with a dot at the end.
    dialect: by whose names. state: by timm's names, those of the backbone alone. fitting: how many of the backbone's
    tensors are there in the right shape, counters of BatchNorm not counted. missing: names that are not there; misfits:
    those there with another shape. inside: names that belong inside the backbone, which has none of them. outside: all
    other names of the file.
    """

    prefix: str
    dialect: str
    state: dict[str, Tensor]
    fitting: int
    missing: list[str]
    misfits: list[str]
    inside: list[str]
    outside: list[str]

    @property
    def is_whole(self) -> bool:
        """Whether it is the backbone, all of it and nothing else."""
        return not (self.missing or self.misfits or self.inside)


def flatten(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor below string keys, by its dotted name; names of torch's own wrappers are taken out.

    Each mapping is visited once, at most DEPTH deep; names too long for a module and tensors past TENSORS are left out.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def visit(mapping: Mapping[Any, Any], path: str, depth: int) -> None:
        if id(mapping) in seen or depth > DEPTH:
            return
        seen.add(id(mapping))
        for key, value in mapping.items():
            if not isinstance(key, str) or len(path) + len(key) > 500 or len(found) >= TENSORS:
                continue
            name = f"{path}{key}"
            if isinstance(value, Tensor) and name.count(".") < PARTS:
                found[WRAPPERS.sub("", name)] = value
            elif isinstance(value, Mapping):
                visit(value, f"{name}.", depth + 1)

    visit(content, "", 0)
    return found


def whole_readings(
    tensors: Mapping[str, Tensor], backbone: nn.Module, *, prefix: str | None = None, ignore: Sequence[str] = ()
) -> list[Reading]:
    """Every reading that is the whole backbone, the one to take first; none: the best of the others alone.

    Args:
        prefix: take only what stands under it, with or without the keys of mappings; None: any.
        ignore: patterns (`*` and `?`) of names in the file that may be left out although they belong inside.
    """
    readings: list[Reading] = []
    whole: list[Reading] = []
    for part in PARTS_BELOW:  # a smaller model's prefix, too, so that a refusal speaks of it
        places = [(p, dialect) for p in _prefixes(tensors, backbone, prefix, part) for dialect in DIALECTS]
        found = (_read(tensors, backbone, candidate, dialect, ignore) for candidate, dialect in places)
        readings += [reading for reading in found if reading is not None]
        whole = [reading for reading in readings if reading.is_whole]
        if whole:
            break
    if not whole:
        return [best_reading(readings)] if readings else []
    # timm's filter finds some prefixes by itself; what it read is below the longer one.
    unique = {r.prefix: r for r in reversed(whole)}
    for prefix in sorted(unique, key=len):
        longer = [r for p, r in unique.items() if p != prefix and p.startswith(prefix)]
        if any(value is r.state[name] for r in longer for name, value in unique[prefix].state.items()):
            del unique[prefix]
    place = {reading.prefix: -1 for reading in unique.values()}
    for number, name in enumerate(tensors):
        for prefix in [p for p, at in place.items() if at < 0 and name.startswith(p)]:
            place[prefix] = number
    return sorted(unique.values(), key=lambda r: (precedence(r.prefix), place[r.prefix]))


def best_reading(readings: Sequence[Reading]) -> Reading:
    """The one with most of the backbone, and the least that does not belong there."""
    return max(readings, key=lambda r: (r.fitting, -len(r.missing), -len(r.inside), -precedence(r.prefix)))


def precedence(prefix: str) -> int:
    """Which of several copies the users of a training script take: the trained one before its moving average, and of
    teacher and student, as in DINO, the teacher."""
    return 2 if MOVING.search(prefix) else int("student" in prefix)


def _prefixes(tensors: Mapping[str, Tensor], backbone: nn.Module, wanted: str | None, part: int) -> list[str]:
    """Candidates: dotted prefixes with at least 1 / `part` as many tensors below them as the backbone has."""
    own = sum(not name.endswith(COUNTER) for name in backbone.state_dict())
    below: Counter[str] = Counter()
    for name in tensors:
        if not name.endswith(COUNTER):
            below.update(_beginnings(name))
    if wanted is not None:
        ending = f".{wanted.strip('.')}."
        return [prefix for prefix in below if f".{prefix}".endswith(ending)][:PREFIXES] if wanted.strip(".") else [""]
    enough = [prefix for prefix, count in below.items() if part * count >= own]
    return sorted(enough, key=lambda prefix: (below[prefix], -len(prefix)))[:PREFIXES] or [""]


def _beginnings(name: str) -> Iterator[str]:
    yield ""
    at = name.find(".")
    while at >= 0:
        yield name[: at + 1]
        at = name.find(".", at + 1)


def _read(
    tensors: Mapping[str, Tensor], backbone: nn.Module, prefix: str, dialect: str, ignore: Sequence[str]
) -> Reading | None:
    own = backbone.state_dict()
    most = LARGEST * sum(
        tensor.numel() for tensor in own.values()
    )  # what follows must not enlarge a view of one number
    names = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix) and t.numel() <= most}
    state = DIALECTS[dialect](names, backbone)
    if state is None:
        return None
    if not _fits(own, state) or any(_belongs(backbone, name) for name in state if name not in own):
        state = timm_filter(state, backbone)
    left = [name for name in state if name not in own]
    inside = [n for n in left if _belongs(backbone, n) and not any(fnmatchcase(f"{prefix}{n}", i) for i in ignore)]
    required = [name for name in own if not name.endswith(COUNTER)]
    taken = {name: state[name] for name in own if name in state}
    outside = [name for name in tensors if not name.startswith(prefix)]
    outside += [f"{prefix}{name}" for name in left if f"{prefix}{name}" in tensors and name not in inside]
    return Reading(
        prefix, dialect, taken,
        fitting=sum(name in taken and taken[name].shape == own[name].shape for name in required),
        missing=[name for name in required if name not in taken],
        misfits=[name for name in required if name in taken and taken[name].shape != own[name].shape],
        inside=inside, outside=outside,
    )  # fmt: skip


def _fits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return all(name in state and state[name].shape == own[name].shape for name in own if not name.endswith(COUNTER))


def _belongs(backbone: nn.Module, name: str) -> bool:
    """Whether a name that the backbone lacks is one of its parts all the same, and no classifier that was cut off."""
    classifier = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = ("fc", "head", "head_dist", "classifier", *((classifier,) if isinstance(classifier, str) else classifier))
    if name.endswith(COUNTER) or any(name.startswith(f"{h}.") and _has_no_weights(backbone, h) for h in heads):
        return False
    first = name.partition(".")[0]
    parts = (backbone._modules, backbone._parameters, backbone._buffers)
    return any(first in part for part in parts) or vars(backbone).get(first, 0) is None  # None: it could have had one


def _has_no_weights(backbone: nn.Module, path: str) -> bool:
    try:
        return not any(True for _ in backbone.get_submodule(path).parameters())
    except AttributeError:
        return True
