"""What the types of schema.py cannot say: settings that exclude one another or do not work in this version.

Pure functions of the config, the number of processes and, for files that are named in it, the file system.
The parts that the config names (method, objective, evaluator) add their own: see their `problems`.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from distunlearn.common.plugins import names
from distunlearn.common.store_url import url_problem
from distunlearn.config.registry import (
    ATTACK_GROUP,
    ATTACKS,
    METHOD,
    OBJECTIVE,
    STRESS_TESTS,
    find,
    nearest,
    own_attacks,
)
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import marked
from distunlearn.config.view_recipes import own_view, views_of
from distunlearn.verify.figures import JUDGED

SOURCES = ("digits", "fashion_mnist", "cifar10", "cifar100", "stl10", "imagefolder", "webdataset")
SOURCE_GROUP = "distunlearn.sources"  # of entry points
HANDED_OVER = "dataset"  # the source of shards that were made of Python's datasets
ROOTLESS = ("digits", "fashion_mnist")  # sources that know where their files are
ID_FILES = (".txt", ".csv", ".tsv", ".jsonl")
FLAT = ("zero1", "zero2", "zero3")  # backends whose optimizer sees no single weight
SHARDED = ("fsdp2", "zero3")  # backends whose weights exist on no process as a whole
MAX_SEED = 2**32 - 1  # scikit-learn takes no larger one


def cross_checks(cfg: RunConfig, world: int = 1, begun: bool = False) -> list[str]:
    """All reasons why `cfg` cannot run on `world` processes, one sentence each, naming the keys; empty if none.

    begun: of a run that is there, which may no longer need a file that it has read.
    """
    encoder = functools.partial(_encoder, begun=begun)
    checks = (
        _seed, _text, _sources, _store, _forget, _requests, _sizes, encoder, _views, _optimizers, _compilation, _parts,
        _dose, _audit,
    )  # fmt: skip
    problems = [problem for check in checks for problem in check(cfg)]
    problems.extend(_processes(cfg, world))
    problems.extend(_shares(cfg, world))
    return problems


def forget_is_file(forget: int | float | str) -> bool:
    """Whether `data.forget` names a file of ids."""
    return isinstance(forget, str) and not forget.startswith("class:")


def _seed(cfg: RunConfig) -> Iterator[str]:
    if cfg.seed > MAX_SEED:
        yield f"seed is {cfg.seed}, expected at most {MAX_SEED}"


def _text(cfg: RunConfig) -> Iterator[str]:
    """Control characters in paths and names: they would forge log lines and file names."""
    values: list[tuple[str, Any]] = [(key, _value(cfg, key)) for key in marked(cfg, "path")]
    values += [("data.forget", cfg.data.forget), ("encoder.name", cfg.encoder.name)]
    values += [(f"encoder.args.{key}", value) for key, value in cfg.encoder.args.items()]
    for key, value in values:
        text = "".join(value) if isinstance(value, tuple) else value
        if any(unicodedata.category(char) == "Cc" for char in f"{key}{text}" if isinstance(text, str)):
            yield f"{key} contains a control character; remove it"


def _sources(cfg: RunConfig) -> Iterator[str]:
    data = cfg.data
    if not _is_source(data.source) and data.source != HANDED_OVER:
        yield f"data.source is {data.source!r}, which is no source; {nearest(data.source, SOURCES)}"
    elif data.source in SOURCES and data.source not in ROOTLESS and not data.root and not data.shards:
        yield f"data.source={data.source} needs data.root, the folder that holds it"
    if data.third_party_source is None and data.third_party_root is not None:
        yield "data.third_party_root is set without data.third_party_source; set both or neither"
    for key in ("third_party", "holdout"):
        other, root = getattr(data, f"{key}_source"), getattr(data, f"{key}_root")
        if other is None:
            continue
        if not _is_source(other):
            yield f"data.{key}_source is {other!r}, which is no source; {nearest(other, SOURCES)}"
        elif other in SOURCES and other not in ROOTLESS and not root and not data.shards:
            yield f"data.{key}_source={other} needs data.{key}_root, the folder that holds it"
    named = data.holdout_source or data.holdout_root or forget_is_file(data.forget) or data.source == HANDED_OVER
    if cfg.encoder.checkpoint is not None and not named:
        yield (
            "encoder.checkpoint was trained elsewhere, so images it never saw must be named, or the audit would take "
            "training images for non-members; set data.holdout_root (or data.holdout_source), or give a list with roles"
        )


def _is_source(name: str) -> bool:
    return name in SOURCES or ":" in name or name in names({}, SOURCE_GROUP)


def _store(cfg: RunConfig) -> Iterator[str]:
    data = cfg.data
    problem = None if data.store is None else url_problem(data.store)
    if problem is not None:
        yield f"data.store {problem}"
    elif data.store is not None and not data.shards:
        yield "data.store needs data.shards, the local folder that holds the manifest"
    if data.store_cache is not None and data.store is None:
        yield "data.store_cache is set without data.store; set both or neither"


def _forget(cfg: RunConfig) -> Iterator[str]:
    forget, members = cfg.data.forget, cfg.data.members
    if isinstance(forget, int):
        if forget < 1:
            yield f"data.forget is {forget}: there is nothing to forget; set a count of at least 1"
        elif members is not None and forget >= members:
            yield f"data.forget={forget} leaves nothing of data.members={members} to retain; forget fewer"
    elif isinstance(forget, float):
        if not 0 < forget < 1:
            yield f"data.forget is {forget}, expected a share between 0 and 1 or a whole number of images"
    elif forget.startswith("class:"):
        if not forget.removeprefix("class:").strip():
            yield f"data.forget is {forget!r}, expected class: and the name or number of a class, such as class:3"
    elif not forget.lower().endswith(ID_FILES):
        endings = ", ".join(ID_FILES)
        yield f"data.forget is {forget!r}, expected a count, a share, class:NAME or a file of ids ({endings})"
    if not forget_is_file(forget) and (cfg.data.forget_column is not None or cfg.data.forget_by != "id"):
        yield "data.forget_column and data.forget_by are of a list, but data.forget names none; unset them"
    if cfg.data.forget_by == "person" and cfg.data.persons is None:
        yield "data.forget_by=person needs to know who is on which image; set data.persons to a table, or to class"


def _requests(cfg: RunConfig) -> Iterator[str]:
    """Of the settings for what was forgotten before."""
    data = cfg.data
    if data.exclude is not None and not (data.exclude.lower().endswith((*ID_FILES, ".json")) or "/" in data.exclude):
        yield f"data.exclude is {data.exclude!r}, expected a list ({', '.join(ID_FILES)}) or a chain.json"
    if data.previous is not None and data.exclude is not None:
        yield "data.previous knows what was forgotten before; unset data.exclude"
    if data.previous is not None and (cfg.runtime.reuse or cfg.encoder.checkpoint):
        yield "data.previous gives the encoder to start from; unset runtime.reuse and encoder.checkpoint"


def _sizes(cfg: RunConfig) -> Iterator[str]:
    """What the numbers in the settings say before images are counted."""
    data = cfg.data
    counts = {"third_party": data.third_party}
    if data.members is not None and isinstance(data.forget, int) and 0 < data.forget < data.members:
        counts |= {"forget": data.forget, "retain": data.members - data.forget}
    elif data.members is not None:
        counts |= {"members": data.members}
    yield from batch_problems(cfg, counts)
    for key, size in (("pretrain.batch", cfg.pretrain.batch), ("unlearn.retain_batch", cfg.unlearn.retain_batch)):
        if size < 2:
            yield f"{key} is {size}, expected at least 2: a contrastive loss compares images with one another"


def batch_problems(cfg: RunConfig, counts: Mapping[str, int]) -> Iterator[str]:
    """Batches larger than their roles: they would hold an image twice, and no image is its own negative.

    counts: images by role, as far as they are known; `members` where only these are.
    """
    members = counts.get("members", counts.get("retain", 0) + counts.get("forget", 0))
    for key, batch, size, of in (
        ("pretrain.batch", cfg.pretrain.batch, members, f"data.members={members}"),
        ("unlearn.retain_batch", cfg.unlearn.retain_batch, counts.get("retain"), "the {} images to retain"),
        ("unlearn.third_party_batch", cfg.unlearn.third_party_batch, counts.get("third_party"), "data.third_party={}"),
    ):
        if size and batch > size:
            yield f"{key}={batch} is larger than {of.format(size)}; lower the batch"


def _encoder(cfg: RunConfig, begun: bool) -> Iterator[str]:
    encoder = cfg.encoder
    if not encoder.name.strip():
        yield "encoder.name is empty; expected the name of a timm model such as resnet18"
    if (encoder.mean is None) != (encoder.std is None):
        yield "encoder.mean and encoder.std belong together; set both or neither"
    for key, values in (("mean", encoder.mean), ("std", encoder.std)):
        if values is not None and len(values) != encoder.in_chans:
            yield f"encoder.{key} has {len(values)} numbers, expected encoder.in_chans={encoder.in_chans} of them"
    if encoder.checkpoint is not None:
        if Path(encoder.checkpoint).is_dir():
            yield (
                f"encoder.checkpoint {encoder.checkpoint!r} is a folder without model.safetensors or "
                "pytorch_model.bin; name the file of weights in it, or join several to one"
            )
        elif not begun and not Path(encoder.checkpoint).is_file():
            yield f"encoder.checkpoint {encoder.checkpoint!r} is not a file; check the path"
        elif encoder.mean is None and encoder.std is None:
            yield (
                "encoder.checkpoint is given without encoder.mean and encoder.std, and neither a config.json beside it "
                "nor timm says by which its images are normalised; set both to what it was trained with (ImageNet's: "
                "[0.485,0.456,0.406] and [0.229,0.224,0.225]; of pixels in [-1, 1]: 0.5 for every channel)"
            )


def _views(cfg: RunConfig) -> Iterator[str]:
    views = cfg.views
    if own_view(views) is not None:
        for f in dataclasses.fields(views):
            if f.name != "recipe" and getattr(views, f.name) is not None:
                yield f"views.{f.name} is set, but views.recipe={views.recipe} draws whole views itself; set it to null"
    if views.blur_sigma is not None and views.blur_sigma[0] > views.blur_sigma[1]:
        yield f"views.blur_sigma is {list(views.blur_sigma)}, expected the smaller number first"
    if cfg.encoder.in_chans == 3:
        return
    for name in ("saturation", "hue", "grayscale"):
        value = max((getattr(view, name) for view in views_of(views)), default=0)
        if value:
            yield f"views.{name}={value} needs colour, but encoder.in_chans is 1; set it to 0 or use 3 channels"


def _optimizers(cfg: RunConfig) -> Iterator[str]:
    for key, settings in (("pretrain", cfg.pretrain), ("unlearn", cfg.unlearn)):
        if settings.optimizer == "lars" and cfg.backend in FLAT:
            yield (
                f"{key}.optimizer=lars needs the norm of every weight, but backend={cfg.backend} steps flat parts that "
                "hold pieces of many weights; set backend=fsdp2 or ddp"
            )
        if settings.nesterov and (settings.optimizer == "adamw" or not settings.momentum):
            yield f"{key}.nesterov=true needs momentum above 0 and optimizer sgd or lars; set {key}.nesterov=false"


def _compilation(cfg: RunConfig) -> Iterator[str]:
    if cfg.runtime.compile and cfg.backend == "zero3":
        yield (
            "runtime.compile=true does not go with backend=zero3, whose hooks around every layer cut each block into "
            "pieces that are compiled one by one; set backend=fsdp2, or runtime.compile=false"
        )


def _parts(cfg: RunConfig) -> Iterator[str]:
    """What the named parts say themselves."""
    for kind in (OBJECTIVE, METHOD):
        yield from find(kind, getattr(getattr(cfg, kind.section), kind.key)).problems(cfg)


def _dose(cfg: RunConfig) -> Iterator[str]:
    grid = cfg.dose.grid
    if len(grid) < 2 or grid[0] != 0 or any(a >= b for a, b in zip(grid, grid[1:], strict=False)):
        yield f"dose.grid is {list(grid)}, expected ascending doses from 0, which changes nothing"
    if cfg.method.dose != "auto" and cfg.method.dose > 1.6:
        yield f"method.dose={cfg.method.dose:g} is far beyond what was trained for; expected at most 1.6"
    drawn = not isinstance(cfg.data.forget, str) or cfg.data.forget.startswith("class:")  # a list may name some
    if cfg.method.dose == "auto" and find(METHOD, cfg.method.name).dosed(cfg) and drawn and not cfg.data.watch:
        yield (
            "method.dose=auto needs watch images, by which the dose is chosen, and data.watch is 0; set data.watch, "
            "such as data.watch=250, or method.dose to a number"
        )


def _audit(cfg: RunConfig) -> Iterator[str]:
    """Names of attacks are texts here: one that is no attack would be a gate that is silently left out."""
    audit = cfg.audit
    further = tuple(name for name in ATTACKS if name not in JUDGED)
    for key, chosen, known in (
        ("audit.gates.also", audit.gates.also, further),
        ("audit.average", audit.average, tuple(ATTACKS)),
    ):
        for name in chosen:
            if key == "audit.gates.also" and name not in ATTACKS and (":" in name or name in names({}, ATTACK_GROUP)):
                own_attacks([name])
            elif name not in known:
                yield f"{key} names {name!r}, which is not an attack that it takes; {nearest(name, known)}"
            elif name == "part_crop" and not audit.part_crops:
                yield f"{key} names part_crop, which audit.part_crops=0 leaves out; set audit.part_crops, such as 128"
            elif key == "audit.gates.also" and ATTACKS[name].gates == "never":
                yield f"audit.gates.also names {name}, which has no power on the original encoder by definition"
    if not audit.average:
        yield "audit.average is empty; name at least one attack"
    for name in audit.stress:
        if name not in STRESS_TESTS:
            yield f"audit.stress names {name!r}, which is no stress test; {nearest(name, STRESS_TESTS)}"
    if audit.tier == 0 and audit.stress:
        yield "audit.stress needs the retrained encoder, which audit.tier=0 does not train; set audit.tier=1"
    if audit.reference and not audit.tier:
        yield "audit.reference stands in the place of the retrained encoder, which audit.tier=0 leaves out; set tier 1"
    if len(set(audit.reference)) < len(audit.reference):
        yield "audit.reference names an encoder twice; name each once"
    if audit.tier == 0 and audit.gates.also:
        yield "audit.gates.also needs the retrained encoder, which audit.tier=0 does not train; set audit.tier=1"


def _processes(cfg: RunConfig, world: int) -> Iterator[str]:
    if world == 1:
        return
    if cfg.backend == "single":
        yield f"backend=single cannot use {world} processes; set backend=ddp or start one process"
    if cfg.runtime.bf16_gather and (cfg.backend, cfg.precision) != ("fsdp2", "bf16"):
        yield "runtime.bf16_gather=true is of backend=fsdp2 with precision=bf16; set them, or leave it out"
    mesh = cfg.runtime.mesh
    if mesh and cfg.backend != "fsdp2":
        yield f"runtime.mesh={list(mesh)} is of backend=fsdp2, not {cfg.backend}; leave it out"
    elif mesh and (mesh[0] * mesh[1] != world or mesh[1] == 1):
        yield (
            f"runtime.mesh={list(mesh)} is of {mesh[0] * mesh[1]} processes in copies of {mesh[1]}, and there are "
            f"{world}; set it to [copies, shards of each], shards 2 or more, whose product is the number of processes"
        )


def _shares(cfg: RunConfig, world: int) -> Iterator[str]:
    """Every batch divides into equal micro-batches, and those into equal shares of the processes.

    A micro-batch has losses of its own: contrast and the distances between gradients need two images in each.
    """
    sizes = [("pretrain.batch", cfg.pretrain.batch, cfg.pretrain.accumulate)]
    for key in ("retain_batch", "forget_batch", "third_party_batch"):
        sizes.append((f"unlearn.{key}", getattr(cfg.unlearn, key), cfg.unlearn.accumulate))
    for key, size, parts in sizes:
        unit = parts * world
        if key == "unlearn.forget_batch" and 2 * parts <= size < unit and not size % parts:
            continue  # some processes have none
        if size % unit:
            below, above = size // unit * unit, (size // unit + 1) * unit
            nearest = f"{below} or {above}" if below else f"{above}"
            sharers = [f"{world} processes"] * (world > 1)
            sharers += [f"{parts} micro-batches ({key.split('.')[0]}.accumulate)"] * (parts > 1)
            yield f"{key}={size} cannot be shared equally by {' and '.join(sharers)}; set it to {nearest}"
        elif parts > 1 and size // parts < 2:
            yield (
                f"{key}={size} leaves {size // parts} image to each of {key.split('.')[0]}.accumulate={parts} "
                f"micro-batches, expected at least 2; lower {key.split('.')[0]}.accumulate"
            )


def _value(cfg: RunConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), cfg)
