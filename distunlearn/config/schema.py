"""RunConfig: everything that decides a run, as frozen dataclasses with documented ranges.

Loading is strict (see `load.py`): unknown keys, wrong types and impossible values are refused with the nearest valid
name before any compute is spent. A recipe (`recipes.py`) is a function that returns one of these; `--config file.yaml`
and `--set a.b=c` change single values.

The sections `method`, `objective` and `constraint` have the settings class of the part that they name, which that part
defines (`registry.py`); here are only the bases of those classes, with what all parts share.

A field says of itself what it changes: `affects="nothing"`, `"speed"` or `"rounding"` are fields with which a run may
go on under another value; without it, the field decides results. `local` fields may differ between the processes of
a run, and `path` fields hold a path.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, TypeAdapter
from pydantic_core import PydanticCustomError

from distunlearn.config.registry import EVALUATOR, METHOD, OBJECTIVE, Kind, settings_class, settings_of
from distunlearn.errors import ConfigError

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]  # 0 and 1 included
PartShare = Annotated[float, Field(gt=0, le=1)]

Tracker = Literal["tensorboard", "wandb", "mlflow", "clearml", "comet_ml", "aim", "swanlab"]

STRICT = ConfigDict(extra="forbid", strict=True)
FREE: Any = Field(json_schema_extra={"affects": "nothing"})
LOCAL: Any = Field(json_schema_extra={"affects": "nothing", "local": True})
PLACE: Any = Field(json_schema_extra={"affects": "nothing", "local": True, "path": True})
SPEED: Any = Field(json_schema_extra={"affects": "speed"})
LOCAL_SPEED: Any = Field(json_schema_extra={"affects": "speed", "local": True})
CHECKPOINT: Any = Field(json_schema_extra={"local": True, "path": True})  # its bytes count, not where they lie
ROUNDING: Any = Field(json_schema_extra={"affects": "rounding"})

Place = Annotated[str | None, PLACE]
LocalMib = Annotated[PositiveInt, LOCAL_SPEED]
SpeedInt = Annotated[NonNegativeInt, SPEED]
GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.4, 1.6)
AVERAGE = ("view_agreement", "encodermi_vector", "bank_loss", "gradient_norm_network")


def _compiles(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise PydanticCustomError("pattern", "expected a regular expression ({error})", {"error": str(error)}) from None
    return text


Pattern = Annotated[str, AfterValidator(_compiles)]


def _of(kind: Kind) -> Any:
    """Validator of a section whose settings class is that of the part it names."""

    def validate(value: Any) -> Any:
        if not isinstance(value, dict):
            raise PydanticCustomError("section", "expected a group of settings")
        try:
            settings = settings_class(kind, value.get(kind.key, kind.default))
        except ConfigError as error:
            raise PydanticCustomError("part", "{error}", {"error": str(error)}) from error
        return _adapter(settings).validate_json(json.dumps(value))

    return PlainValidator(validate)


@functools.cache
def _adapter(settings: type) -> TypeAdapter[Any]:
    return TypeAdapter(settings)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and which role each plays (roles: see docs/glossary.md)."""

    __pydantic_config__ = STRICT

    source: str = "digits"  # a built-in source, or an own one: package.module:Name, path/to/file.py:Name
    root: Place = None  # folder of the source; None: the source's own default place
    shards: Place = None  # folder of shards and their index; None: <out>/shards
    store: Annotated[str | None, LOCAL] = None  # URL of the folder of the shards; the index stays in data.shards
    store_cache: Place = None  # local folder for copies of the store's shards; None: images are read by ranges
    store_cache_mib: LocalMib = 51_200  # of those copies, of all processes of a machine; the longest unused go first
    members: PositiveInt | None = 700  # images the original encoder is trained on; None: all that are left over
    forget: int | float | str = 200  # a count, a share in (0, 1), "class:NAME", or a list (.txt .csv .tsv .jsonl)
    forget_column: str | None = None  # of the list, that names the images; None: the one with a usual name
    forget_by: Literal["id", "url", "key", "sha256", "person"] = "id"  # what the list names images by
    persons: str | None = None  # who is on which image: a table (.csv .tsv .jsonl) of images and persons, or "class"
    person_column: str = "person"  # of that table, and of a list that names persons
    allow_missing: bool = False  # leave out listed ids that the source does not have (recorded), instead of refusing
    max_forget_share: PartShare = 0.5  # largest share of the members that may be forgotten
    copies: Literal["refuse", "forget", "keep"] = "refuse"  # retain images with the very bytes of a forget image
    near_distance: Annotated[int, Field(ge=0, le=16)] | None = 4  # bits of a perceptual hash; null: no search
    holdout: PositiveInt = 600
    calibration: PositiveInt = 150
    third_party: PositiveInt = 200
    third_party_audit: PositiveInt = 147
    watch: NonNegativeInt = 0  # non-members in no loss and no audit; needed by method.dose=auto
    holdout_source: str | None = None  # of all non-members; None: data.source, in holdout_root if that is set
    holdout_root: Place = None  # folder of images the encoder never saw; needed with encoder.checkpoint, or list roles
    third_party_source: str | None = None  # None: the non-members' own source
    third_party_root: Place = None
    previous: Annotated[str | None, CHECKPOINT] = None  # run directory of the request before, from which this goes on
    exclude: Annotated[str | None, CHECKPOINT] = None  # list, or chain.json, of images that were forgotten elsewhere
    samples_per_shard: PositiveInt = 256
    prepare_workers: SpeedInt = 0  # processes that write shards; 0: one a core for large sets, else this one
    max_pixels: PositiveInt = 64_000_000  # width x height above which an image is refused before decoding
    verify: Annotated[Literal["digest", "size"], LOCAL] = "digest"  # of each shard before a run; digest: of all bytes
    cache_mib: Annotated[NonNegativeInt, LOCAL_SPEED] = 2048  # of decoded images in memory; more are read every epoch
    workers: SpeedInt = 0  # processes, for each rank, that read and decode ahead; 0: the training process does
    prefetch: Annotated[PositiveInt, SPEED] = 2  # batches that each worker is ahead (DataLoader's prefetch_factor)
    decode_size: PositiveInt | None = None  # shorter side to which large photos may shrink; null: 4 x image_size
    read_retries: Annotated[NonNegativeInt, FREE] = 4  # of a failed read, after 0.25 s, 0.5 s and so on; then it ends
    max_undecodable: Annotated[Share, FREE] = 0.001  # share of a role that may be replaced; forget images never are


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A timm backbone or an own module by name, its input, and optionally the checkpoint it starts from."""

    __pydantic_config__ = STRICT

    name: str = "resnet18"
    image_size: PositiveInt = 32  # side of the square input, pixels
    in_chans: Literal[1, 3] = 1
    stem: Literal["standard", "deep"] = "standard"  # deep: ResNets with three 3x3; small images: args.output_stride=8
    args: dict[str, Any] = field(default_factory=dict)  # of timm.create_model (channels, layers, patch_size ...)
    mean: tuple[float, ...] | None = None  # of each channel in [0, 1], subtracted; null: the checkpoint's, or 0.5
    std: tuple[PositiveFloat, ...] | None = None  # of each channel, by which is divided; null: likewise
    crop_pct: PartShare | None = None  # share of the shorter side that evaluation keeps; null: the checkpoint's, or 1
    interpolation: Literal["bilinear", "bicubic"] | None = None  # of that resize; null: the checkpoint's, or bilinear
    embed_dim: PositiveInt | None = None  # declared embedding size; checked against the backbone
    checkpoint: Annotated[str | None, CHECKPOINT] = None  # safetensors or torch.save: weights of the original encoder
    trained_with: str | None = None  # its loss (dino, mae, clip ...) where that is not objective.name
    prefix: str | None = None  # what stands before the backbone's names in it; null: found
    ignore: tuple[str, ...] = ()  # patterns of its names that may be left out although they belong inside the backbone


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The objective the encoder was, or is, trained with: what all objectives share."""

    __pydantic_config__ = STRICT

    name: str

    if TYPE_CHECKING:  # keys of the part that `name` names

        def __getattr__(self, key: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Random views; every draw is keyed by (seed, epoch, sample id, view)."""

    __pydantic_config__ = STRICT

    recipe: str = "grey"  # grey, simclr, mocov2, mocov3, byol, dino, or an own callable; null below: as it says
    crop_scale_min: PartShare | None = None  # smallest share of the area that a crop keeps
    interpolation: Literal["bilinear", "bicubic"] | None = None  # of the crops, antialiased
    flip: Share | None = None  # probability of a horizontal flip
    jitter: Share | None = None  # probability of the next four, in random order
    brightness: NonNegativeFloat | None = None
    contrast: NonNegativeFloat | None = None
    saturation: NonNegativeFloat | None = None  # 3 channels only
    hue: Annotated[float, Field(ge=0, le=0.5)] | None = None  # 3 channels only
    grayscale: Share | None = None  # probability; 3 channels only
    blur: Share | tuple[Share, Share] | None = None  # probability of a Gaussian blur; two: of a pair's views
    blur_sigma: tuple[PositiveFloat, PositiveFloat] | None = None  # range of its standard deviation, pixels
    solarize: Share | tuple[Share, Share] | None = None  # probability; two: of a pair's views


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How weights are stepped: what both trainings share (docs/encoders.md)."""

    __pydantic_config__ = STRICT

    accumulate: PositiveInt = 1  # micro-batches a step: parts of the batch with losses of their own, less memory
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"  # lars: not with zero1, zero2 and zero3
    lr: PositiveFloat = 1e-3  # largest learning rate, after the warm-up; a cosine leads from it to 0
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"  # linear: lr x batch / 256; sqrt: lr x root of batch / 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # of sgd and lars
    nesterov: bool = False  # of sgd and lars
    trust: PositiveFloat = 1e-3  # of lars: length of a weight's step at rate 1, relative to the weight
    weight_decay: NonNegativeFloat = 1e-4  # of matrices and kernels: see decay_all
    decay_all: bool = False  # decay (and lars: adapt) biases, norms, position embeddings and class tokens too
    warmup: Share = 0.05  # share of the steps in which the rate grows linearly; 0: none
    clip: NonNegativeFloat = 0.0  # largest gradient norm; 0: no clipping, the same on every backend


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(OptimizerConfig):
    """Training of the original and, by the very same recipe, of the retrained encoder."""

    __pydantic_config__ = STRICT

    epochs: PositiveInt = 300
    batch: PositiveInt = 128  # images per global batch (two views each)
    lr: PositiveFloat = 2e-3  # largest learning rate, after the warm-up; a cosine leads from it to 0
    checkpoint_every: Annotated[PositiveInt, FREE] = 200  # steps


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig(OptimizerConfig):
    """The fine-tuning that forgets: global batches per step, in images."""

    __pydantic_config__ = STRICT

    steps: PositiveInt = 150
    retain_batch: PositiveInt = 128  # images to keep; the batch that lr_scaling goes by
    forget_batch: Annotated[int, Field(ge=2)] = 50
    third_party_batch: Annotated[int, Field(ge=2)] = 50
    checkpoint_every: Annotated[PositiveInt, FREE] = 50  # steps


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """How to forget: what all methods share. Weights are those of the method's loss (docs/method.md)."""

    __pydantic_config__ = STRICT

    name: str
    dose: Literal["auto"] | NonNegativeFloat = 1.0  # share of the change that is kept; auto: chosen by watch images
    loss_bound: PositiveFloat | None = None  # stop (exit 4) when the size of the loss passes it; null: no bound
    embedding_bound: PositiveFloat | None = None  # stop (exit 4) when the norm of an embedding passes it

    if TYPE_CHECKING:  # keys of the part that `name` names

        def __getattr__(self, key: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class DoseConfig:
    """How `method.dose=auto` is chosen; off by default, and why: [the dose](method.md#the-dose)."""

    __pydantic_config__ = STRICT

    grid: tuple[Annotated[float, Field(ge=0, le=1.6)], ...] = GRID  # doses that are tried, ascending, from 0
    aim: Literal["half", "retained"] = "retained"  # AUCs that are right: 1/2, or forget against retain at dose 0
    images: PositiveInt = 512  # of retain, forget and watch each, at most
    views: Annotated[int, Field(ge=2, multiple_of=2)] = 6  # of each image
    knn_points: NonNegativeFloat = 2.0  # of accuracy on labelled retained images that may be lost, as far as is known
    loss_share: NonNegativeFloat = 0.5  # of what the loss of retained images is below chance, that may be lost
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95  # of the interval of the dose and of those bounds
    bootstrap: Annotated[int, Field(ge=100)] = 500  # draws behind that interval
    enough: PositiveInt = 250  # with fewer watch images the smallest dose inside the interval is taken


@dataclass(frozen=True, kw_only=True)
class ConstraintConfig:
    """How the per-sample gradients are reached and compared: what all evaluators share."""

    __pydantic_config__ = STRICT

    evaluator: str
    distance: Literal["energy", "mmd"] = "energy"
    view_pairs: PositiveInt = 1  # pairs of views over which each sample's gradient is averaged
    spread_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # running estimate of the third-party's spread
    phi_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # running mean that switches the term
    memory_steps: NonNegativeInt = 0  # past steps whose samples the gradient of Phi is taken against too: less noise

    if TYPE_CHECKING:  # keys of the part that `evaluator` names

        def __getattr__(self, key: str) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """Equivalence gates, declared before the run."""

    __pydantic_config__ = STRICT

    view_agreement: PositiveFloat = 0.06  # |AUC(unlearned) - AUC(retrained)|
    attack: PositiveFloat = 0.08  # the same for every other attack
    utility_points: PositiveFloat = 2.5  # allowed loss of accuracy, percentage points
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.9  # of the two-sided bootstrap interval
    also: tuple[str, ...] = ()  # further attacks that are judged like the others; own ones by file.py:function


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Membership inference before, after, and on the retrained encoder."""

    __pydantic_config__ = STRICT

    views: Annotated[int, Field(ge=2)] = 10  # views per image for view agreement and EncoderMI
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    neighbours: PositiveInt = 5  # of the kNN
    tier: Literal[0, 1, 2] = 1  # 0: no retrained encoder unless it is there; 1: with it; 2: shadows too
    reference: Annotated[tuple[str, ...], CHECKPOINT, Field(max_length=4)] = ()  # not retrained: checkpoints, or runs
    part_crops: NonNegativeInt = 0  # small crops of each image for the PartCrop attack; 0: without it (the paper: 128)
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"  # bf16: of passes without a gradient; tf32: GPUs alone
    relearn_steps: NonNegativeInt = 16  # of the relearning attack; 0: without it
    keep_signals: Annotated[bool, FREE] = False  # embeddings and the like, to read, and for runs that reuse this one
    shadows: Annotated[int, Field(ge=6, le=64)] = 12  # pooled shadow encoders of tier 2
    stress: tuple[str, ...] = ()  # stress tests: worst_case, whole_class, canaries, sequential
    average: tuple[str, ...] = AVERAGE  # attacks of the average gap
    gates: GatesConfig = field(default_factory=GatesConfig)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How the state of a training is saved; how often is `checkpoint_every` of the training."""

    __pydantic_config__ = STRICT

    asynchronous: Annotated[bool, FREE] = True  # training goes on while a copy in memory is written and synced
    sharded: Annotated[Literal["auto", "always", "never"], FREE] = "auto"  # by every process; auto: fsdp2, zero3, large


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How the processes of a run work: nothing here changes what is computed, beyond rounding."""

    __pydantic_config__ = STRICT

    threads: Annotated[NonNegativeInt, LOCAL_SPEED] = 0  # CPU threads a process; 0: OMP_NUM_THREADS, else cores
    compile: Annotated[bool, ROUNDING] = False  # blocks through torch.compile, but for some passes of evaluators
    activation_checkpointing: Annotated[bool, ROUNDING] = False  # blocks run forward again in the backward: less memory
    mesh: Annotated[tuple[PositiveInt, PositiveInt] | None, ROUNDING] = None  # fsdp2: copies, and shards of each copy
    bf16_gather: Annotated[bool, ROUNDING] = False  # fsdp2, precision=bf16, GPUs: blocks' weights travel in bf16
    reuse: Place = None  # a finished run whose shards, original and retrained encoder are taken
    join_s: Annotated[PositiveFloat, LOCAL] = 600.0  # seconds to wait for the other processes at the start
    watchdog_s: Annotated[NonNegativeFloat, LOCAL] = 600.0  # seconds of one part of a step that end a run; 0: no limit
    watchdog_save_s: Annotated[NonNegativeFloat, LOCAL] = 3600.0  # of checkpoints, calibration and the first step
    accept_code_change: Annotated[bool, FREE] = False  # go on under another version of this package; it is recorded


@dataclass(frozen=True, kw_only=True)
class EvidenceConfig:
    """What a run keeps for those who check it (docs/assurance.md)."""

    __pydantic_config__ = STRICT

    commitment: Place = None  # countersigned commitment to settings, request and images; None: nothing is declared
    key: Place = None  # the operator's private key, which signs the commitment
    keep: Annotated[Literal["newest", "all"], FREE] = "newest"  # checkpoints; all: every step can be repeated


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `seed` decides roles, order, views, initial weights and bootstrap draws."""

    __pydantic_config__ = STRICT

    recipe: str = "digits"
    seed: NonNegativeInt = 0
    backend: Annotated[Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"], ROUNDING] = "single"
    precision: Literal["fp32", "bf16"] = "fp32"
    sync_batchnorm: bool = True  # batch statistics over the global batch, whatever the number of processes
    tracking: Annotated[tuple[Tracker, ...], LOCAL] = ("tensorboard",)  # experiment trackers beside metrics.jsonl
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    objective: Annotated[ObjectiveConfig, _of(OBJECTIVE)] = field(default_factory=lambda: settings_of(OBJECTIVE))
    views: ViewsConfig = field(default_factory=ViewsConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    method: Annotated[MethodConfig, _of(METHOD)] = field(default_factory=lambda: settings_of(METHOD))
    dose: DoseConfig = field(default_factory=DoseConfig)
    constraint: Annotated[ConstraintConfig, _of(EVALUATOR)] = field(default_factory=lambda: settings_of(EVALUATOR))
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    evidence: EvidenceConfig = field(default_factory=EvidenceConfig)
