"""Which encoder a checkpoint holds and how it was trained, as far as its names, shapes and settings say.

ResNets and ViTs are told by the shapes of their tensors in the names of timm, torchvision, Hugging Face and open_clip;
other models by what stands beside the weights (config.json, the name in the file). Nothing is believed: what is found
is built, and every one of its tensors must be in the file.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from distunlearn.common.text import printable
from distunlearn.config.preprocessing import weights_file
from distunlearn.config.schema import EncoderConfig
from distunlearn.encoders.backbone import create_backbone, embed_dim
from distunlearn.encoders.checkpoint_file import read_checkpoint, shown
from distunlearn.encoders.checkpoint_heads import Shape, head_shapes
from distunlearn.encoders.checkpoint_names import Reading, flatten, precedence, whole_readings
from distunlearn.encoders.timm_names import list_encoders
from distunlearn.errors import ConfigError, EncoderError
from distunlearn.verify.records import read_plain

PATCHES = re.compile(r"(?:patch_embed\.proj|conv_proj|patch_embeddings\.projection|patch_embedding|conv1)\.weight$")
POSITIONS = re.compile(
    r"(?:pos_embed|pos_embedding|position_embeddings|position_embedding\.weight|positional_embedding)$"
)
BLOCKS = re.compile(r"(?:blocks\.|encoder_layer_|layers?\.|resblocks\.)(\d+)\.")
STAGES = re.compile(
    r"^(?P<prefix>.*?)(?P<stage>layer\d|stages\.\d\.layers|(?<![^.])\d)\.(?P<block>\d+)\."
    r"(?:conv|layer\.)(?P<conv>\d)(?:\.convolution)?\.weight$"
)
STEM = re.compile(r"(?:^|\.)(?:conv1\.weight|conv1\.0\.weight|convolution\.weight|0\.weight)$")
VITS = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large", (1280, 32): "huge"}
RESNETS: dict[tuple[int, ...], tuple[str, str]] = {
    (2, 2, 2, 2): ("resnet18", "resnet26"), (3, 4, 6, 3): ("resnet34", "resnet50"), (3, 4, 23, 3): ("", "resnet101"),
    (3, 8, 36, 3): ("", "resnet152"),
}  # fmt: skip
LIKE = {"_224": "vit_tiny_patch16_224", "_clip_224": "vit_base_patch32_clip_224"}  # where the sizes are others
PLANES = [64, 128, 256, 512]
HEAD_WIDTH = 64  # of ViTs' attention, where the number of heads is told by nothing
# What other losses leave in a file: pattern of names, the loss.
OTHERS = (
    (r"dino_head|(?:^|\.)(?:teacher|student)\b", "dino"), (r"decoder_(?:blocks|embed|pos_embed)", "mae"),
    (r"logit_scale$", "clip"),
)  # fmt: skip


@dataclass
class Recognised:
    """encoder: as it is built. embed_dim. sized: whether the file says for which image size. objective: settings that
    its heads and its other tensors speak for; {}: nothing does. trained_with: another loss than those there are.
    epochs: of its training, if the file says. doubts: what was assumed, a sentence each.
    """

    encoder: EncoderConfig
    embed_dim: int
    sized: bool
    objective: dict[str, Any] = field(default_factory=dict)
    trained_with: str | None = None
    epochs: int | None = None
    doubts: list[str] = field(default_factory=list)


def recognise(file: str | Path, name: str | None = None, small: bool = False) -> Recognised:
    """The encoder in a checkpoint.

    Args:
        name: of the encoder, where the file is not to be asked. small: the images have less than 64 pixels, which is
            all that tells the image size of a ResNet.

    Raises:
        ConfigError: no encoder is recognised. EncoderError: see `read_checkpoint`.
    """
    path = Path(weights_file(str(file)))
    content = read_checkpoint(path)
    tensors = flatten(content)
    tried: list[str] = []
    for guess in _guesses(path, content, tensors, name):
        size = guess.size or (32 if small else 224)
        encoder = EncoderConfig(
            name=guess.name, image_size=size, in_chans=guess.chans, stem=guess.stem, args=guess.args,  # type: ignore[arg-type]
        )  # fmt: skip
        try:
            backbone = create_backbone(encoder)
        except EncoderError as error:
            tried.append(printable(str(error), 160))
            continue
        readings = whole_readings(tensors, backbone)
        if not readings or not readings[0].is_whole:
            tried.append(f"{guess.name} lacks or has too many of its tensors")
            continue
        found = Recognised(encoder, embed_dim(backbone, encoder), guess.size is not None, doubts=guess.doubts)
        _training(found, content, tensors, readings)
        return found
    why = f" ({'; '.join(dict.fromkeys(tried))})" if tried else ""
    raise ConfigError(
        f"{shown(path)} holds no encoder that is recognised by its names and shapes{why}; say which with --encoder, by "
        "timm's name (distunlearn list encoders) or as package.module:Name."
    )


# -- which encoder ---------------------------------------------------------------------------------------------------


@dataclass
class _Guess:
    name: str
    args: dict[str, Any] = field(default_factory=dict)
    stem: str = "standard"
    chans: int = 3
    size: int | None = None
    doubts: list[str] = field(default_factory=list)


def _guesses(
    path: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str | None
) -> Iterator[_Guess]:
    beside = _beside(path)
    shapes = [*_vit(tensors, beside), *_resnet(tensors)]
    like = shapes[0] if shapes else _Guess("", chans=_channels(tensors))
    if name is not None:
        yield from (guess for guess in shapes if guess.name == name)
        yield _Guess(name, chans=like.chans, size=like.size)
        return
    if beside:
        yield from _written(beside)
    args = content.get("args")
    for holder in (content, args if isinstance(args, Mapping) else vars(args) if hasattr(args, "__dict__") else {}):
        arch = holder.get("arch", holder.get("architecture"))
        if isinstance(arch, str) and arch in list_encoders():
            yield from (guess for guess in shapes if guess.name == arch)
            yield _Guess(arch, chans=like.chans, size=like.size)
    yield from shapes


def _beside(path: Path) -> Mapping[str, Any]:
    """config.json of timm, of an export or of Hugging Face; {} where there is none."""
    try:
        content = json.loads(read_plain(path.with_name("config.json"), 1 << 20).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}


def _written(config: Mapping[str, Any]) -> Iterator[_Guess]:
    """What a config.json of timm or of an export says."""
    name, images = config.get("architecture", config.get("encoder")), config.get("pretrained_cfg", config)
    args = dict(config.get("model_args", config.get("args")) or {})
    size = images.get("input_size") if isinstance(images, Mapping) else None
    if not isinstance(name, str) or not (isinstance(size, list) and len(size) == 3):
        return
    stem = "deep" if args.pop("stem_type", "") == "deep" else "standard"
    kept = {k: v for k, v in args.items() if k not in ("in_chans", "num_classes", "img_size", "pretrained_cfg")}
    yield _Guess(name, kept, stem, int(size[0]), int(size[1]))


def _vit(tensors: Mapping[str, Tensor], beside: Mapping[str, Any]) -> Iterator[_Guess]:
    """By the patches' convolution, the blocks and the position embeddings."""
    for name, tensor in tensors.items():
        patches = PATCHES.search(name)
        if patches is None or tensor.dim() != 4 or not 4 <= tensor.shape[2] == tensor.shape[3]:
            continue
        width, chans, patch, _ = tensor.shape
        prefix = name[: patches.start()].removesuffix("embeddings.")
        inside = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        depth = 1 + max((int(found[1]) for n in inside if (found := BLOCKS.search(n))), default=-1)
        side = _side(next((t.shape[-2] for n, t in inside.items() if POSITIONS.search(n) and t.dim() > 1), 0))
        if not depth or not side or chans not in (1, 3):
            continue
        kind = _kind_of_vit(inside)
        model = f"vit_{VITS.get((width, depth), '')}_patch{patch}{kind}"
        if model in list_encoders():
            yield _Guess(model, chans=chans, size=side * patch)
        heads = beside.get("num_attention_heads")
        told = isinstance(heads, int)
        args: dict[str, Any] = {"patch_size": patch, "embed_dim": width, "depth": depth}
        args["num_heads"] = heads if told else max(1, width // HEAD_WIDTH)
        if not any("cls" in n or "class" in n for n in inside):
            args |= {"class_token": False, "global_pool": "avg"}
        doubt = f"the number of heads is not in the file, {args['num_heads']} are taken: compare encoder.args.num_heads"
        like = LIKE.get(kind, f"vit_small_patch14{kind}")
        yield _Guess(like, args, chans=chans, size=side * patch, doubts=[] if told else [doubt])


def _kind_of_vit(names: Iterable[str]) -> str:
    """The end of timm's name, by tensors that only some kinds have."""
    text = "\n".join(names)
    if "ls1" in text or "lambda1" in text:
        return "_reg4_dinov2" if "reg" in text else "_dinov2"
    return "_clip_224" if "norm_pre" in text or "pre_layrnorm" in text or "ln_pre" in text else "_224"


def _side(tokens: int) -> int:
    """Patches along a side, of an image whose tokens are those and at most two more; 0: there is none."""
    sides = (math.isqrt(tokens - more) for more in range(3) if tokens > more)
    return next((side for side in sides if side * side in (tokens, tokens - 1, tokens - 2)), 0)


def _resnet(tensors: Mapping[str, Tensor]) -> Iterator[_Guess]:
    """By the convolutions of the stages, and that of the stem."""
    copies: dict[str, dict[tuple[int, int, int], Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if (found := STAGES.match(name)) and tensor.dim() == 4:
            stage = int(re.sub(r"\D", "", found["stage"]))
            copies[found["prefix"]][stage, int(found["block"]), int(found["conv"])] = tensor
    for prefix in sorted(copies, key=precedence):
        convs = copies[prefix]
        stages = sorted({stage for stage, _, _ in convs})
        numbers = sorted({number for _, _, number in convs})
        root = prefix.removesuffix("encoder.")
        stems = {n: t for n, t in tensors.items() if n.startswith(root) and STEM.search(n[len(root) :])}
        stem = next((n for n, t in stems.items() if t.dim() == 4 and t.shape[1] in (1, 3)), None)
        if stem is None or len(stages) != 4:
            continue
        layers = tuple(1 + max(block for at, block, _ in convs if at == stage) for stage in stages)
        planes = [convs[stage, 0, numbers[0]].shape[0] for stage in stages]
        width, chans, kernel, _ = stems[stem].shape
        deep, inner = len(numbers) == 3, stem.endswith("conv1.0.weight")
        published = RESNETS.get(layers, ("", ""))[deep]
        name = published or ("resnet50" if deep else "resnet18")
        args: dict[str, Any] = {"stem_width": width} if inner else {}
        if planes != PLANES or not published:
            args |= {"channels": planes, "layers": list(layers)}
        if kernel == 3 and not inner:
            yield _Guess("distunlearn.encoders.cifar:resnet", {"name": name, **args}, chans=chans, size=32)
        elif planes == [2 * plane for plane in PLANES]:
            yield _Guess(f"wide_{name}_2", chans=chans)
        yield _Guess(name, args, "deep" if inner else "standard", chans)


def _channels(tensors: Mapping[str, Tensor]) -> int:
    """Of the first convolution that could take an image."""
    return next((t.shape[1] for t in tensors.values() if t.dim() == 4 and t.shape[1] in (1, 3)), 3)


# -- how it was trained ----------------------------------------------------------------------------------------------


def _training(
    found: Recognised, content: Mapping[str, Any], tensors: Mapping[str, Tensor], readings: list[Reading]
) -> None:
    """Objective, heads and epochs that the file speaks for."""
    reading, *copies = readings
    epochs = content.get("epoch", content.get("epochs"))
    if isinstance(epochs, int) and not isinstance(epochs, bool) and 0 < epochs <= 10_000:
        found.epochs = epochs
    outside = reading.outside
    found.trained_with = next((loss for pattern, loss in OTHERS if any(re.search(pattern, n) for n in outside)), None)
    heads = head_shapes(tensors, reading, copies, found.embed_dim)
    projector = next((head for head in heads if not head.is_predictor and head.layers > 1), None)
    predictor = any(head.is_predictor for head in heads)
    moving = any(precedence(copy.prefix) == 2 for copy in copies)
    queue = next((tensors[n] for n in outside if n.rpartition(".")[2] == "queue" and tensors[n].dim() == 2), None)
    online = any(re.search(r"online|target", name) for name in tensors)
    if found.trained_with:
        return
    if queue is not None:
        found.objective = {"name": "moco", "queue_size": max(queue.shape)}
    elif predictor:
        found.objective = {"name": "byol" if online or not moving else "mocov3"}
        if not moving and not online:
            found.trained_with = "simsiam"
    elif projector is not None:
        found.objective = {"name": "simclr"}
    elif any(tensors[n].dim() == 2 and tensors[n].shape[1] == found.embed_dim for n in outside if n.endswith("weight")):
        found.objective = {"name": "supervised"}
    if projector is not None:
        found.objective |= _head_settings(projector)


def _head_settings(head: Shape) -> dict[str, Any]:
    return {
        "hidden_dim": head.widths[0], "output_dim": head.widths[-1], "head_layers": head.layers, "head_norm": head.norm
    }  # fmt: skip
