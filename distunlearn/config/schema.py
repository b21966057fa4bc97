"""RunConfig: everything that decides a run, as frozen dataclasses with documented ranges.

Loading is strict (see `config_io`): unknown keys, wrong types and impossible values are refused
with the nearest valid name before any compute is spent. A recipe (`recipes.py`) is a function
that returns one of these; `--config file.yaml` and `--set a.b=c` change single values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

__all__ = [
    "AuditConfig",
    "CheckpointConfig",
    "ConstraintConfig",
    "DataConfig",
    "EncoderConfig",
    "GatesConfig",
    "MethodConfig",
    "ObjectiveConfig",
    "PretrainConfig",
    "RunConfig",
    "UnlearnConfig",
    "ViewsConfig",
]

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]

Tracker = Literal["tensorboard", "wandb", "mlflow", "clearml", "comet_ml", "aim", "swanlab"]

STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and which role each plays (roles: see docs/words in README)."""

    __pydantic_config__ = STRICT

    source: str = "digits"  # a built-in source, or an own one: package.module:Name, path/to/file.py:Name
    root: str | None = None  # folder of the source; None: the source's own default place
    shards: str | None = None  # folder of shards and manifest; None: <out>/shards
    store: str | None = None  # URL of the folder that holds the shards; the manifest stays in data.shards
    store_cache: str | None = None  # local folder for copies of the store's shards; None: images are read by ranges
    store_cache_mib: PositiveInt = 51_200  # of those copies, for all processes of a machine; the oldest use goes first
    members: NonNegativeInt = 700  # images the original encoder is trained on (retain + forget); 0: all left over
    forget: int | float | str = 200  # a count, a share in (0, 1), "class:N", or a file of ids (.txt .csv .jsonl)
    allow_missing: bool = False  # leave out listed ids that the source does not have (recorded), instead of refusing
    forget_cap: Annotated[float, Field(gt=0, le=1)] = 0.5  # largest share of the members that may be forgotten
    copies: Literal["refuse", "forget", "keep"] = "refuse"  # retain images with the very bytes of a forget image
    near_distance: Annotated[int, Field(ge=0, le=16)] | None = 4  # bits of a perceptual hash; null: no search
    holdout: PositiveInt = 600
    calibration: PositiveInt = 150
    third_party: PositiveInt = 200
    third_party_audit: PositiveInt = 147
    third_party_source: str | None = None  # None: the members' own source
    third_party_root: str | None = None
    samples_per_shard: PositiveInt = 256
    prepare_workers: NonNegativeInt = 0  # processes that write shards; 0: one a core for large sets, else this one
    max_pixels: PositiveInt = 64_000_000  # width x height above which an image is refused before decoding
    verify: Literal["digest", "size"] = "digest"  # of every shard before a run; digest: sha256 of all bytes
    cache_mib: NonNegativeInt = 2048  # decoded images kept in memory up to this size, else streamed every epoch
    workers: NonNegativeInt = 0  # processes, for each rank, that read and decode ahead; 0: the training process does
    prefetch: PositiveInt = 2  # batches that each worker is ahead of the training (prefetch_factor of the DataLoader)
    decode: Literal["exact", "fast"] = "exact"  # fast: JPEGs at a smaller scale, resize in integers; other pixels
    read_retries: NonNegativeInt = 4  # of a failed read, after 0.25 s, 0.5 s, 1 s and so on; then the run ends
    max_undecodable: Share = 0.001  # share of a role's images that may be replaced; forget images never are


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A timm backbone or an own module by name, its input, and optionally the checkpoint it starts from."""

    __pydantic_config__ = STRICT

    name: str = "resnet18"
    image_size: PositiveInt = 32  # side of the square input, pixels
    in_chans: Literal[1, 3] = 1
    stem: Literal["standard", "deep"] = "deep"  # ResNets; deep: three 3x3; small images: also args.output_stride=8
    args: dict[str, Any] = field(default_factory=dict)  # of timm.create_model (channels, layers, patch_size ...)
    mean: tuple[float, ...] | None = None  # of each channel in [0, 1], that the encoder wants subtracted; null: 0.5
    std: tuple[PositiveFloat, ...] | None = None  # by which it wants the difference divided; null: 0.5
    embed_dim: PositiveInt | None = None  # declared embedding size; checked against the backbone
    checkpoint: str | None = None  # .safetensors or .pth (weights only): a foreign original encoder


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """The contrastive objective the encoder was, or is, trained with."""

    __pydantic_config__ = STRICT

    name: Literal["simclr", "moco", "mocov3", "byol", "supervised"] = "simclr"
    temperature: PositiveFloat = 0.2
    hidden_dim: PositiveInt = 128  # width of projector and predictor
    output_dim: PositiveInt = 64
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99  # of the momentum encoder, per step
    queue_size: PositiveInt = 512  # moco only
    similarity_mib: PositiveFloat = 1024.0  # for one copy of a process's similarities; above it tile by tile, exactly


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Random views; every draw is keyed by (seed, epoch, sample id, view)."""

    __pydantic_config__ = STRICT

    crop_scale_min: Annotated[float, Field(gt=0, le=1)] = 0.4  # smallest share of the area a crop keeps
    rotation: NonNegativeFloat = 0.0  # degrees, both sides
    flip: Share = 0.0  # probability of a horizontal flip
    brightness: NonNegativeFloat = 0.4
    contrast: NonNegativeFloat = 0.4
    saturation: NonNegativeFloat = 0.0  # 3 channels only
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # 3 channels only
    grayscale: Share = 0.0  # probability; 3 channels only
    blur: Share = 0.0  # probability of a Gaussian blur
    noise: NonNegativeFloat = 0.0  # standard deviation, image values in [0, 1]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Training of the original and, by the very same recipe, of the retrained encoder."""

    __pydantic_config__ = STRICT

    epochs: PositiveInt = 300
    batch: PositiveInt = 128  # images per global batch (two views each)
    accumulate: PositiveInt = 1  # micro-batches a step: parts of the batch with losses of their own, less memory
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 1e-4
    warmup: Share = 0.05  # share of the steps
    clip: NonNegativeFloat = 0.0  # largest gradient norm; 0: no clipping, the same on every backend
    checkpoint_every: PositiveInt = 200  # steps


@dataclass(frozen=True, kw_only=True)
class UnlearnConfig:
    """The fine-tuning that forgets: global batches per step, in images."""

    __pydantic_config__ = STRICT

    steps: PositiveInt = 150
    retain_batch: PositiveInt = 128
    forget_batch: Annotated[int, Field(ge=2)] = 50
    third_party_batch: Annotated[int, Field(ge=2)] = 50
    third_party_draw: Literal["uniform", "matched"] = "uniform"  # matched: those like the forgotten ones, more often
    accumulate: PositiveInt = 1  # micro-batches a step, each with a part of all three batches
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 1e-4
    warmup: Share = 0.05
    clip: NonNegativeFloat = 0.0
    checkpoint_every: PositiveInt = 50  # steps


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """How to forget; weights are those of the three-part loss (docs/method.md)."""

    __pydantic_config__ = STRICT

    name: Literal[
        "third_party", "alignment_calibration", "neg_grad", "grad_ascent", "scrub", "salun", "sure",
        "held_out_distillation", "random_target", "l1_sparse", "finetune", "retrain", "none", "random_init",
    ] = "third_party"  # fmt: skip
    utility_weight: NonNegativeFloat = 1.0  # third_party only: of the loss on retained images
    gradient_weight: NonNegativeFloat = 1.0  # of the distance between per-sample gradients
    output_weight: NonNegativeFloat = 1.0  # of the distance between outputs (view agreement, bank similarities)
    confidence_weight: NonNegativeFloat = 0.1
    view_pairs: PositiveInt = 1  # third_party only: pairs of views over which each sample's gradient is averaged
    confidence: Literal["hinge", "entropy"] = "hinge"
    confidence_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.25  # of the original's confidence on calibration data
    anchor_weight: NonNegativeFloat = 0.0  # third_party only: third-party images stay as the original encoder has them
    distill_weight: NonNegativeFloat = 0.0  # third_party only: stay near the original encoder's retain embeddings
    target: Literal["calibrated", "zero"] = "calibrated"  # Phi*: third-party against calibration, or 0
    ascent_weight: NonNegativeFloat = 1.0  # grad_ascent, neg_grad: of the forget loss that is climbed
    ascent_bound: PositiveFloat = 50.0  # grad_ascent, neg_grad: stop (exit 4) when that loss passes this
    forget_weight: NonNegativeFloat = 1.0  # scrub, salun, sure, held_out_distillation, random_target: the forget term
    retain_weight: NonNegativeFloat = 1.0  # scrub only: of the distance to the original encoder on retain images
    max_share: Annotated[float, Field(gt=0, le=1)] = 0.5  # scrub only: share of the steps that push forget images away
    mask_share: Annotated[float, Field(gt=0, le=1)] = 0.5  # salun only: share of the weights that may move
    alignment_weight: NonNegativeFloat = 1.0  # alignment_calibration only: of the alignment of a forget image's views
    calibration_weight: NonNegativeFloat = 1.0  # alignment_calibration only: of forget images with foreign partners
    l1_weight: NonNegativeFloat = 0.1  # l1_sparse only: of the sum of the weights' absolute values
    critic_width: PositiveInt = 64  # sure only: hidden units of the domain classifier
    critic_lr: PositiveFloat = 1e-3  # sure only: its learning rate
    loss_bound: PositiveFloat | None = None  # any method: stop (exit 4) when the size of the loss passes it; null: none
    embedding_bound: PositiveFloat | None = None  # any method: stop (exit 4) when the norm of an embedding passes it


@dataclass(frozen=True, kw_only=True)
class ConstraintConfig:
    """How the per-sample gradients are reached and compared."""

    __pydantic_config__ = STRICT

    evaluator: Literal["head", "sketch", "sliced", "ghost_norm", "input_gp", "double_backward"] = "head"
    distance: Literal["energy", "mmd"] = "energy"
    sketch_out: PositiveInt = 8  # rows of the Kronecker sketch (output side)
    sketch_in: PositiveInt = 8
    layers: str | None = None  # regular expression found in the names of the layers that are probed; null: all
    rho: PositiveFloat | None = None  # step of finite differences; null: the evaluator's own for the precision
    check_every: PositiveInt = 100  # steps between comparisons of finite differences at rho and rho / 2
    center: Literal[0, 1] = 1  # input_gp only: gradient norm that the penalty pulls to
    spread_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # running estimate of the third-party's spread
    phi_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # running mean that switches the term
    memory: NonNegativeInt = 0  # past steps whose samples the gradient of Phi is taken against too: less noise


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """Equivalence gates, declared before the run."""

    __pydantic_config__ = STRICT

    view_agreement: PositiveFloat = 0.06  # |AUC(unlearned) - AUC(retrained)|
    attack: PositiveFloat = 0.08  # the same for every other attack
    utility_points: PositiveFloat = 2.5  # allowed loss of accuracy, percentage points
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.9  # of the two-sided bootstrap interval
    also: str | None = None  # further attacks that are judged like the others, by name, separated by commas


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Membership inference before, after, and on the retrained encoder."""

    __pydantic_config__ = STRICT

    views: Annotated[int, Field(ge=2)] = 10  # views per image for view agreement and EncoderMI
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    neighbours: PositiveInt = 5  # of the kNN
    tier: Literal[0, 1, 2] = 1  # 0: no training, no retrained encoder unless it is there; 1: with it; 2: shadows too
    part_crops: NonNegativeInt = 0  # small crops of each image for the PartCrop attack; 0: without it (the paper: 128)
    relearn_steps: NonNegativeInt = 16  # of the relearning attack; 0: without it
    keep_signals: bool = False  # of original and retrained encoder, for the audits of runs that reuse this one
    shadows: Annotated[int, Field(ge=6, le=64)] = 12  # pooled shadow encoders of tier 2
    stress: str | None = None  # tier 3, by name, with commas: worst_case, whole_class, canaries, sequential; null: none
    average: str = "view_agreement,encodermi_vector,bank_loss,gradient_norm_network"  # attacks of the average gap
    gates: GatesConfig = field(default_factory=GatesConfig)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How the state of a training is saved; how often is `checkpoint_every` of the training."""

    __pydantic_config__ = STRICT

    asynchronous: bool = True  # training goes on while a copy in memory (a second state) is written, synced, committed
    sharded: Literal["auto", "always", "never"] = "auto"  # each process writes its own part; auto: fsdp2, zero3, large


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run. `seed` decides roles, order, views, initial weights and bootstrap draws."""

    __pydantic_config__ = STRICT

    recipe: str = "digits"
    seed: NonNegativeInt = 0
    reuse: str | None = None  # a finished run whose shards, original and retrained encoder are taken over
    backend: Literal["single", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "single"
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False  # blocks keep their inputs alone and run forward again in the backward
    compile: bool = False  # blocks through torch.compile, except in passes that hook into them
    sync_batchnorm: bool = True  # batch statistics over the global batch, whatever the number of processes
    watchdog_s: NonNegativeFloat = 600.0  # seconds in one part of a step that end a run which hangs (exit 5); 0: off
    watchdog_save_s: NonNegativeFloat = 3600.0  # the same for checkpoints, calibration and the first step
    join_s: PositiveFloat = 600.0  # seconds to wait for the other processes at the start
    tracking: tuple[Tracker, ...] = ("tensorboard",)  # experiment trackers beside metrics.jsonl
    accept_code_change: bool = False  # go on with a run that another version of this package began; it is recorded
    threads: NonNegativeInt = 0  # CPU threads per process; 0: OMP_NUM_THREADS, else all cores, shared by the processes
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    unlearn: UnlearnConfig = field(default_factory=UnlearnConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    constraint: ConstraintConfig = field(default_factory=ConstraintConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
