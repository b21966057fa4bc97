"""The door for Python: forget images of your own datasets in an encoder of your own, and see the evidence.

    import distunlearn as du
    run = du.unlearn(encoder, retain=..., forget=..., third_party=..., holdout=..., out="runs/mine")
    run.encoder; run.audit().verdict; run.report; run.figures

The verbs of the command line are functions here: `prepare`, `pretrain`, `unlearn_config`, `audit`, `report`, `run`,
`plan`, `purge`, `status`, each of settings (`load_config`; `next_config` for the next request on a finished run) or of
a run directory. Errors are exceptions (`distunlearn.errors`); nothing here ends the process.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save
from torch import nn

from distunlearn.common import plugins
from distunlearn.common.files import write_atomic
from distunlearn.common.progress import progress_of
from distunlearn.config.checks import HANDED_OVER
from distunlearn.config.load import load_config
from distunlearn.config.schema import RunConfig
from distunlearn.config.shape import known_keys
from distunlearn.data.manifest.manifest import Manifest
from distunlearn.data.manifest.request import has_request
from distunlearn.data.prepare.roles import forget_facts
from distunlearn.data.prepare.write_shards import write_shards
from distunlearn.data.sources.dataset import PARTS, DatasetSource, fixed_roles, selection_digest
from distunlearn.encoders.backbone import create_backbone
from distunlearn.encoders.own_module import hand_over, without_reset
from distunlearn.engine.backends import open_backend
from distunlearn.engine.run_directory import saved_config, shards_folder
from distunlearn.errors import ConfigError, DataError
from distunlearn.plan.plan import make_plan as plan
from distunlearn.run import pipeline, tables
from distunlearn.run.pipeline import audit, next_config, prepare, pretrain, report, run
from distunlearn.run.pipeline import unlearn as unlearn_config
from distunlearn.run.purge import purge
from distunlearn.run.status import run_status as status
from distunlearn.verify.records import find_record
from distunlearn.verify.run import SUMMARY_FIELDS

if TYPE_CHECKING:
    import pandas

__all__ = [
    "Run", "audit", "load_config", "next_config", "open_run", "plan", "prepare", "pretrain", "purge", "report", "run",
    "status", "unlearn", "unlearn_config",
]  # fmt: skip

WEIGHTS = "encoder.safetensors"  # that a module was handed over with
LARGEST = 512  # pixels a side up to which the first image's own size is taken for that of the encoder's input
# Batches of the recipe that shrink to the images that there are, unless they were asked for.
BATCHES = (("pretrain.batch", "members"), ("unlearn.retain_batch", "retain"), ("unlearn.forget_batch", "forget"),
           ("unlearn.third_party_batch", "third_party"))  # fmt: skip


class Run:
    """A run directory. `encoder` needs the unlearning to be done; `verdict`, `figures` and `report` need `audit()`."""

    def __init__(self, out: str | Path, given: _Given | None = None) -> None:
        self.out = Path(out)
        self._given = given

    @property
    def encoder(self) -> nn.Module:
        """The unlearned encoder, a new copy in evaluation mode: images [n, C, S, S], normalised by its mean and std
        (without any: pixels from -1 to 1), to embeddings [n, E]."""
        weights = self.out / "export" / "model.safetensors"
        if not weights.exists():
            raise DataError(f"{self.out} holds no unlearned encoder; finish the run (unlearn) first.")
        self._hand_over()
        backbone = create_backbone(saved_config(self.out, world=1).encoder)
        backbone.load_state_dict(load_file(weights))
        return backbone.eval()

    @property
    def figures(self) -> dict[str, Any]:
        """Everything that the audit found, as plain data: `audit/summary.json`."""
        found = find_record(self.out / "audit" / "summary.json", SUMMARY_FIELDS)
        if found is None:
            raise DataError(f"{self.out} was not audited yet; call audit() first.")
        return found

    @property
    def scores(self) -> pandas.DataFrame:
        """The raw scores of the audit, a row for each encoder and image: `run.tables.scores`."""
        return tables.scores(self.out)

    @property
    def embeddings(self) -> pandas.DataFrame:
        """The embeddings that an audit with `audit.keep_signals` kept: `run.tables.embeddings`."""
        return tables.embeddings(self.out)

    @property
    def metrics(self) -> pandas.DataFrame:
        """Losses and progress, a row for each line of `metrics.jsonl`: `run.tables.metrics`."""
        return tables.metrics(self.out)

    @property
    def verdict(self) -> str:
        """pass, fail or inconclusive."""
        return self.figures["gates"]["verdict"]

    @property
    def report(self) -> Path:
        """The page `report.html`, made from what the audit saved."""
        self.figures  # noqa: B018  it says what is missing
        return report(self.out)

    @property
    def dose(self) -> dict[str, Any]:
        """What was seen at each dose, and the one that was chosen: `dose/curve.json`."""
        found = find_record(self.out / "dose" / "curve.json")
        if found is None:
            raise DataError(f"{self.out} has looked at no doses; set method.dose=auto, or call look_at_doses().")
        return found

    def look_at_doses(self) -> dict[str, Any]:
        """Look at every dose, and change no encoder; the figures of `dose`. Needs watch images (`data.watch`)."""
        self._hand_over()
        return pipeline.dose(self.out)

    @property
    def status(self) -> dict[str, Any]:
        """Where the run stands."""
        return status(self.out)

    def audit(self) -> Run:
        """Train the retrained reference where the settings want one, attack all encoders, judge the gates."""
        self._hand_over()
        audit(self.out)
        return self

    def purge(self, apply: bool = False) -> dict[str, Any]:
        """Take the forgotten images out of the shards; without `apply` only say what would happen."""
        return purge(self.out, apply=apply)

    def _hand_over(self) -> None:
        if self._given is not None:
            self._given.hand_over()

    def __repr__(self) -> str:
        verdict = self.verdict if (self.out / "audit" / "summary.json").exists() else "not audited"
        return f"Run({str(self.out)!r}, {verdict})"


def open_run(out: str | Path, encoder: Any = None, *, factory: Callable[[], nn.Module] | None = None) -> Run:
    """A run directory of an earlier call; encoder, factory: as they were given to `unlearn`, where it was a module."""
    saved_config(Path(out), world=1)
    return Run(out, None if encoder is None or isinstance(encoder, (str, Path)) else _Given.of(encoder, factory))


def unlearn(
    encoder: nn.Module | Callable[[], nn.Module] | str | Path,
    /,
    *,
    retain: Any,
    forget: Any,
    third_party: Any,
    holdout: Any,
    out: str | Path,
    objective: Any = None,
    method: Any = None,
    steps: int | None = None,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    factory: Callable[[], nn.Module] | None = None,
    recipe: str | None = None,
    **settings: Any,
) -> Run:
    """Make an encoder forget the images of one dataset. The same call goes on where an interrupted one stopped.

    Args:
        encoder: a module, whose weights are those that are to forget; a class or function that makes one, a timm name,
            or `package.module:Name`, which is trained on retain and forget first; or a checkpoint file of a timm model,
            whose name is then `encoder={"name": ...}` in the settings.
        retain, forget: map-style datasets of the images that the encoder was trained on (see `data.sources.dataset`).
        third_party, holdout: images that it was never trained on; a share of them is kept apart for audit and targets.
        out: run directory.
        objective, method: a name, a settings object (`du.ThirdParty(gradient_weight=2)`), a dict of settings with
            `name`, or a class of your own.
        steps: of the unlearning. image_size: side of the encoder's input; None: of the first image.
        mean, std: per channel in [0, 1], by which the encoder wants its images normalised; None: 0.5 and 0.5.
        factory: makes the encoder with fresh weights, for the retrained reference of an encoder that is a module.
            Without it the reference starts from a copy with all weights reset; a module that cannot be reset has none.
        recipe: settings to start from. settings: sections (`pretrain={"epochs": 100}`) or single keys (`seed=1`,
            `**{"audit.tier": 2}`).

    Raises:
        ConfigError, DataError and the other errors of `distunlearn.errors`: as the command line ends with.
    """
    asked = _flat(settings) | _named("objective", objective) | _named("method", method)
    asked |= {} if steps is None else {"unlearn.steps": steps}
    given = None if isinstance(encoder, (str, Path)) else _Given.of(encoder, factory)
    if given is None and factory is not None:
        raise ConfigError("factory is for an encoder that is a module; name a class or function as encoder instead.")
    data = DatasetSource(
        {"retain": retain, "forget": forget, "holdout": holdout, "third_party": third_party},
        asked.get("data.max_pixels", RunConfig().data.max_pixels),
    )
    asked = _encoder_settings(encoder, given, data, image_size, mean, std, asked) | asked
    first = _resolve(recipe, asked)
    roles, left_out = fixed_roles(data, first.data, first.seed, [key.removeprefix("data.") for key in asked])
    asked = _sizes(first, roles, asked) | asked
    folder, template = Path(out), None if given is None else given.template
    inputs = functools.partial(_write_inputs, _resolve(recipe, asked), folder, template, data, roles, left_out)
    open_backend(first).world.on_main(inputs)
    cfg = _resolve(recipe, asked if template is None else asked | {"encoder.checkpoint": str(folder / WEIGHTS)})
    pretrain(cfg, folder, pipeline.begin(cfg, folder))
    unlearn_config(cfg, folder)
    return Run(folder, given)


@dataclasses.dataclass(frozen=True)
class _Given:
    """An encoder that was handed over as an object."""

    template: nn.Module | None
    factory: Callable[[], nn.Module] | None

    @classmethod
    def of(cls, encoder: Any, factory: Callable[[], nn.Module] | None) -> _Given:
        if isinstance(encoder, nn.Module):
            return cls(encoder, factory)
        if not callable(encoder):
            raise ConfigError(
                f"encoder is a {type(encoder).__name__}, expected a torch.nn.Module, a class or function that makes "
                "one, a name or a checkpoint file."
            )
        return cls(None, encoder)

    def hand_over(self) -> str:
        return plugins.name_of(self.factory) if self.template is None else hand_over(self.template, self.factory)


# -- settings --------------------------------------------------------------------------------------------------------


def _flat(settings: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Sections as keys with dots."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{at}{name}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Mapping) and key not in known_keys():
            found |= _flat(value, f"{key}.")
        else:
            found[key] = value
    return found


def _named(section: str, chosen: Any) -> dict[str, Any]:
    if chosen is None or isinstance(chosen, str):
        return {} if chosen is None else {f"{section}.name": chosen}
    return _flat({section: {"name": chosen} if isinstance(chosen, type) else chosen})


def _resolve(recipe: str | None, asked: Mapping[str, Any]) -> RunConfig:
    return load_config(recipe, None, [f"{key}={json.dumps(_plain(value))}" for key, value in asked.items()])


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if callable(value):
        return plugins.name_of(value)
    return str(value) if isinstance(value, Path) else value


def _encoder_settings(
    encoder: Any,
    given: _Given | None,
    data: DatasetSource,
    image_size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """What the encoder and the first image say about the section `encoder`."""
    channels, height, width = data.first_image()
    side = image_size or asked.get("encoder.image_size") or min(height, width)
    if side > LARGEST and image_size is None and "encoder.image_size" not in asked:
        raise ConfigError(
            f"image_size is not given, and the first image has {height} x {width} pixels; set the side that the "
            "encoder was made for, such as image_size=224."
        )
    found: dict[str, Any] = {
        "encoder.args": {}, "encoder.embed_dim": None, "encoder.stem": "standard", "encoder.in_chans": channels,
        "encoder.image_size": side, "data.source": HANDED_OVER,
    }  # fmt: skip
    if mean is not None or std is not None:
        found |= {"encoder.mean": list(mean or ()) or None, "encoder.std": list(std or ()) or None}
    if given is not None:
        name = found["encoder.name"] = given.hand_over()
        kept = without_reset(name)
        if kept and asked.get("audit.tier", 0):
            raise ConfigError(
                f"audit.tier={asked['audit.tier']} needs an encoder with fresh weights, but {', '.join(kept[:3])} of "
                "the encoder has no reset_parameters; give factory=, which makes one."
            )
        found |= {"audit.tier": 0} if kept else {}
    elif Path(str(encoder)).is_file():
        found["encoder.checkpoint"] = str(encoder)
        if "encoder.name" not in asked:
            raise ConfigError(
                f'encoder is the file {encoder}, which does not name its model; add encoder settings: {{"name": ...}}.'
            )
    else:
        found["encoder.name"] = str(encoder)
    return found


def _sizes(cfg: RunConfig, roles: Mapping[str, str], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Images per role, as the datasets have them, and batches that are not larger."""
    counts = {role: 0 for names in PARTS.values() for role in names}
    for role in roles.values():
        counts[role] += 1
    counts["members"] = counts["retain"] + counts["forget"]
    found = {f"data.{name}": counts[name] for name in ("members", "forget", "holdout", "calibration", "watch")}
    found |= {f"data.{name}": counts[name] for name in ("third_party", "third_party_audit")}
    for key, name in BATCHES:
        section, field = key.split(".")
        if key not in asked:
            found[key] = min(getattr(getattr(cfg, section), field), counts[name])
    return found


# -- files -----------------------------------------------------------------------------------------------------------


def _keep_weights(module: nn.Module, path: Path) -> None:
    """The weights that the encoder came with, as the checkpoint that the run starts from."""
    tensors = {
        name: tensor.detach().cpu().float().contiguous().clone() if tensor.is_floating_point() else tensor.cpu().clone()
        for name, tensor in module.state_dict().items()
    }
    content = save(tensors, metadata={"format": "pt"})
    if path.exists() and path.read_bytes() != content:
        raise ConfigError(f"{path.parent} belongs to a run of an encoder with other weights; choose another out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)


def _write_inputs(
    cfg: RunConfig, out: Path, template: nn.Module | None, data: DatasetSource, roles: Mapping[str, str],
    left_out: Mapping[str, int],
) -> None:  # fmt: skip
    """The weights of an encoder that is a module, and the shards."""
    if template is not None:
        _keep_weights(template, out / WEIGHTS)
    folder, digest = shards_folder(cfg, out), selection_digest(data, roles)
    if has_request(out):
        if Manifest.load(folder, run=out).facts.get(HANDED_OVER, {}).get("sha256") != digest:
            raise DataError(f"{folder} holds shards of other datasets or of another seed; choose another out.")
        return
    labels = dict(data.samples)
    members = [i for i, role in roles.items() if role in ("retain", "forget")]
    forget = {i for i in members if roles[i] == "forget"}
    facts = forget_facts(members, labels, forget, cfg.data)
    facts[HANDED_OVER] = {"sha256": digest, "left_out_as_copies": {k: n for k, n in left_out.items() if n}}
    with progress_of("prepare", "images") as progress:
        made = write_shards(
            [data], roles, folder, cfg.data.samples_per_shard, seed=cfg.seed, progress=progress,
            workers=cfg.data.prepare_workers or 1, copies=cfg.data.copies, near_distance=cfg.data.near_distance,
            max_pixels=cfg.data.max_pixels, facts=facts,
        )  # fmt: skip
    made.save_request(out)
