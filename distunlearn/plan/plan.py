"""What a run would do: steps, images, memory and coverage, checked before any compute is spent."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from distunlearn.audit.trainings.stress import check_count, largest_request, stress_names
from distunlearn.common.files import write_json
from distunlearn.common.text import printable
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import digest
from distunlearn.constraints.evaluators.base import LayersConfig
from distunlearn.constraints.gradients.layers import left_out, left_out_parts
from distunlearn.data.manifest.columns import NO_LABEL
from distunlearn.data.manifest.records import ROLES
from distunlearn.data.manifest.request import has_request
from distunlearn.data.prepare.draw import open_and_draw
from distunlearn.data.prepare.selection import draw_request, request_facts
from distunlearn.data.sources.decode import image_size
from distunlearn.data.sources.sources import read_bytes
from distunlearn.encoders.model import ContrastiveModel, MomentumEncoder, build_model
from distunlearn.engine.dose.looks import dose_images
from distunlearn.engine.phases import pretrain_steps, take_checkpoint
from distunlearn.engine.run_directory import refuse_large_batches, verified_manifest
from distunlearn.engine.session import Trained
from distunlearn.errors import (
    ConfigError,
    DataError,
    DistunlearnError,
    EncoderError,
)
from distunlearn.methods.base import Method, method_class, refuse_missing
from distunlearn.methods.training import Pretrain, Retrain, TrainHeads
from distunlearn.objectives import make_objective
from distunlearn.objectives.base import objective_class
from distunlearn.plan.audit_cost import audit_looks, audit_trainings
from distunlearn.plan.dry_run import NotFollowed, count_training
from distunlearn.plan.interval_widths import expected_widths
from distunlearn.verify.records import find_record

MIB = 1 << 20
LOOKED_AT = 256  # members whose size is read before there is an index


def _together(problems: list[DistunlearnError]) -> DistunlearnError:
    """One error that says all of them."""
    if len(problems) == 1:
        return problems[0]
    kind = DataError if any(isinstance(problem, DataError) for problem in problems) else ConfigError
    return kind(" ".join(map(str, problems)))


def make_plan(cfg: RunConfig, out: Path | None = None) -> dict[str, Any]:
    """Resolve roles, encoder and schedule of `cfg` without writing anything.

    Returns:
        plain JSON: roles, request (counts of listed, missing, copied and small images), phases (steps, images, share of
        retraining, peak memory of one process that has the whole batch and shards nothing), audit (the same of what the
        audit trains besides), looks (images and passes of the audit itself), intervals (how wide the gates' will be,
        see `expected_widths`), coverage, encoder, not_probed (layers that the constraint's and the audit's probes
        cannot follow), config digest.

    Raises:
        DataError: the data cannot be had, or the schedule cannot reach every forget image.
        ConfigError: an encoder that cannot be built or loaded; several problems are reported together.
    """
    problems: list[DistunlearnError] = []
    counts: Counter[str] = Counter()
    classes: Counter[int] = Counter()
    facts: dict[str, Any] = {}
    try:
        counts, classes, facts = _roles(cfg, out)
    except DistunlearnError as error:
        problems.append(error)
    model: ContrastiveModel | None = None
    notes: list[str] = []
    labels = max(max(classes, default=1) + 1, facts.get("previous", {}).get("labels", 0))
    try:
        model, notes = _model(cfg, labels)
    except DistunlearnError as error:
        problems.append(error)
    if counts:
        try:
            refuse_missing(cfg, counts)
            refuse_large_batches(cfg, counts)
            _check_schedule(cfg, counts)
            _check_stress(cfg, counts)
        except DistunlearnError as error:
            problems.append(error)
    if problems:
        raise _together(problems)
    assert model is not None, "or there was a problem"
    trains_heads = model.backbone_frozen
    model.requires_grad_(True).backbone_frozen = False
    begins = None if cfg.encoder.checkpoint is None else trains_heads
    phases = _phases(cfg, model, counts, False if cfg.data.previous else begins)
    return {
        "recipe": cfg.recipe,
        "digest": digest(cfg),
        "backend": cfg.backend,
        "method": cfg.method.name,
        "objective": cfg.objective.name,
        "roles": dict(counts),
        "request": facts,
        "encoder": _encoder(cfg, model, labels) | ({"checkpoint": notes} if notes else {}),
        "not_probed": _not_probed(cfg, model),
        "phases": phases,
        "audit": audit_trainings(cfg, counts, classes, phases),
        "looks": audit_looks(cfg, counts),
        "intervals": expected_widths(cfg, counts),
        "coverage": _coverage(cfg, counts),
    }


def _roles(cfg: RunConfig, out: Path | None) -> tuple[Counter[str], Counter[int], dict[str, Any]]:
    """Images per role, members per label and facts of the request, from existing shards or else from the source."""
    known = out or cfg.data.shards or cfg.runtime.reuse
    manifest = verified_manifest(cfg, out) if known else None
    if manifest is not None and not (out and has_request(out)):
        manifest = draw_request(cfg.data, cfg.seed, manifest, foreign=cfg.encoder.checkpoint is not None)
    if manifest is not None:
        found = Counter(manifest.columns.label[manifest.rows(("retain", "forget"))].tolist())
        found.pop(NO_LABEL, None)
        used = manifest.rows(ROLES)
        sides = np.minimum(manifest.columns.width[used], manifest.columns.height[used])
        facts = request_facts({**manifest.info, **manifest.facts}) | _enlarged(cfg, sides)
        return Counter(manifest.count_roles()), found, facts
    opened, drawn = open_and_draw(cfg.data, cfg.seed, cfg.encoder.checkpoint is not None)
    roles = drawn.roles
    labels = Counter(
        label for i, label in opened.members.samples if label is not None and roles.get(i) in ("retain", "forget")
    )
    members = [i for i, role in roles.items() if role in ("retain", "forget")]
    looked_at = members[:: -(-len(members) // LOOKED_AT)]
    sides = np.array([min(image_size(read_bytes(opened.members, i), i, cfg.data.max_pixels)) for i in looked_at])
    return Counter(roles.values()), labels, request_facts(drawn.facts) | _enlarged(cfg, sides)


def _enlarged(cfg: RunConfig, sides: np.ndarray) -> dict[str, dict[str, int]]:
    """Images whose shorter side, of those in pixels [n], is smaller than the encoder's: they are shown enlarged."""
    return {
        "smaller_than_the_encoder": {"images": int((sides < cfg.encoder.image_size).sum()), "looked_at": len(sides)}
    }


def _model(cfg: RunConfig, classes: int) -> tuple[ContrastiveModel, list[str]]:
    """The encoder with its heads, and what was taken from the checkpoint, which is tried on it."""
    notes: list[str] = []
    model = build_model(cfg, classes if objective_class(cfg).head == "classifier" else None)
    if cfg.encoder.checkpoint is not None:
        momentum = MomentumEncoder(model) if make_objective(cfg.objective).needs_momentum else None
        notes = take_checkpoint(Trained(model, momentum, None, {}), cfg)
    _try_references(cfg, model)
    if cfg.audit.part_crops and not hasattr(model.backbone, "forward_intermediates"):
        raise ConfigError(
            f"audit.part_crops needs feature maps, which {cfg.encoder.name} does not give; set audit.part_crops=0."
        )
    return model, notes


def _try_references(cfg: RunConfig, model: ContrastiveModel) -> None:
    """Files that stand in the place of a retrained encoder fit, and come with heads if that of the original does."""
    for place in cfg.audit.reference:
        if Path(place).is_dir():
            continue
        encoder = dataclasses.replace(cfg.encoder, checkpoint=place)
        tried = Trained(copy.deepcopy(model).requires_grad_(True), None, None, {})
        tried.model.backbone_frozen = False
        take_checkpoint(tried, dataclasses.replace(cfg, encoder=encoder))
        if tried.model.backbone_frozen != model.backbone_frozen:
            with_heads, without = ("the original encoder", place)[:: -1 if model.backbone_frozen else 1]
            raise EncoderError(
                f"audit.reference: {with_heads} comes with heads that fit the objective and {without} does not, so a "
                "difference between the two need not come from the images; give both as files of one program."
            )


def _encoder(cfg: RunConfig, model: ContrastiveModel, classes: int) -> dict[str, Any]:
    return {
        "name": cfg.encoder.name,
        "embed_dim": model.embed_dim,
        "image_size": cfg.encoder.image_size,
        "mean": list(cfg.encoder.mean or [0.5] * cfg.encoder.in_chans),
        "std": list(cfg.encoder.std or [0.5] * cfg.encoder.in_chans),
        "crop_pct": cfg.encoder.crop_pct or 1.0,
        "interpolation": cfg.encoder.interpolation or "bilinear",
        "backbone_parameters": sum(p.numel() for p in model.backbone.parameters()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": classes if objective_class(cfg).head == "classifier" else None,
    }


def _not_probed(cfg: RunConfig, model: ContrastiveModel) -> dict[str, list[str]]:
    """Layers that per-sample probes leave out, by who probes, a text a reason; nothing where all are followed."""
    asked: dict[str, str | None] = {"audit": None}
    if getattr(method_class(cfg)(cfg), "evaluator", None) and isinstance(cfg.constraint, LayersConfig):
        asked["constraint"] = cfg.constraint.layers
    found = {who: left_out_parts(left_out(model, model, pattern)) for who, pattern in asked.items()}
    return {who: parts for who, parts in found.items() if parts}


def _phases(
    cfg: RunConfig, model: ContrastiveModel, counts: Counter[str], trains_heads: bool | None
) -> dict[str, dict[str, Any]]:
    """Steps, images, share of retraining and memory of every training; steps alone where code cannot be followed.

    trains_heads: whether new heads are trained on a backbone that is given; None: the encoder is trained first.
    """
    method = method_class(cfg)(cfg)
    retraining = pretrain_steps(cfg, counts["retain"])
    unlearning = {"unlearn": cfg.unlearn.steps, "pretrain": retraining, "none": 0}[method.steps]
    trainings: dict[str, tuple[int, Method]] = {
        "pretrain": (pretrain_steps(cfg, counts["retain"] + counts["forget"]), Pretrain(cfg)),
        **({} if trains_heads is None else {"pretrain": (retraining * trains_heads, TrainHeads(cfg))}),
        "unlearn": (unlearning, method),
        "retrain": (retraining, Retrain(cfg)),
    }
    phases: dict[str, dict[str, Any]] = {}
    for name, (steps, by) in trainings.items():
        phases[name] = {"steps": steps}
        try:
            counted = count_training(cfg, by, model, steps, counts)
        except NotFollowed as error:
            phases[name]["not_counted"] = printable(str(error), 300)
            continue
        before = counted.calibration_images
        after = dose_images(cfg, counts) if name == "unlearn" else 0
        phases[name] |= {
            "images": counted.images,
            **({"calibration_images": before} if before else {}),
            **({"dose_images": after} if after else {}),
            "peak_memory_mib": round(counted.peak_bytes / MIB, 1),
        }
    whole = phases["retrain"].get("images")
    for phase in phases.values():
        if whole and "images" in phase:
            images = sum(phase.get(part, 0) for part in ("images", "calibration_images", "dose_images"))
            phase["share_of_retraining"] = round(images / whole, 4)
    return phases


def _coverage(cfg: RunConfig, counts: Counter[str]) -> dict[str, float]:
    """Consumptions per forget image that the schedule guarantees: whole passes over the forget list."""
    rows = _forget_steps(cfg) * cfg.unlearn.forget_batch
    return {"requested": counts["forget"], "scheduled_min": rows // max(1, counts["forget"])}


def _check_schedule(cfg: RunConfig, counts: Counter[str]) -> None:
    forgets = method_class(cfg).forgets
    steps = _forget_steps(cfg)
    rows = steps * cfg.unlearn.forget_batch
    if forgets and rows < counts["forget"]:
        share = "" if steps == cfg.unlearn.steps else f" (the {steps} of {cfg.unlearn.steps} that see them)"
        raise DataError(
            f"unlearn.steps{share} x unlearn.forget_batch = {rows} images cannot reach all {counts['forget']} forget "
            f"images; expected at least {counts['forget']}; raise one of the two."
        )


def _check_stress(cfg: RunConfig, counts: Counter[str]) -> None:
    if not cfg.audit.stress:
        return
    check_count(counts["forget"])
    largest = largest_request(stress_names(cfg.audit.stress), counts["forget"])
    if largest > counts["forget"]:
        try:
            _check_schedule(cfg, Counter({**counts, "forget": largest}))
        except DataError as error:
            raise DataError(f"audit.stress has {largest} forget images in its largest request: {error}") from error


def _forget_steps(cfg: RunConfig) -> int:
    """Steps of the unlearning that consume forget images."""
    return method_class(cfg)(cfg).forget_steps()


def write_plan(planned: dict, out: Path) -> None:
    """Keep the plan beside the run it describes; one of the same settings stays, so that a resumed run has the plan of
    its first start: with the shards there, the next plan looks at other images."""
    path, kept = Path(out) / "plan.json", None
    with contextlib.suppress(DataError):  # a damaged one is written anew
        kept = find_record(path)
    if kept is None or kept.get("digest") != planned["digest"]:
        write_json(path, planned)
