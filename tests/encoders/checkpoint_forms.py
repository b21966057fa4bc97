"""Encoders of other libraries, small, and the files in which people keep them."""

from __future__ import annotations

import argparse
import sys
import types
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

from distunlearn.encoders.cifar import resnet

SIDE, NARROW = 32, {"channels": [8, 16, 24, 32], "layers": [1, 1, 1, 1]}
VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": SIDE}
CLIP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
State = dict[str, Tensor]


def new(name: str, **args: object) -> nn.Module:
    return timm.create_model(name, num_classes=0, **args).eval()


def shaken(module: nn.Module) -> nn.Module:
    """Distinct gains, biases and statistics: what is 0 or 1 would hide a wrong pairing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator)
                value.add_(0.1 * noise.abs() if "var" in name else 0.1 * noise)
    return module.eval()


class Source:
    """An encoder of some library: its weights, how it embeds, and the timm model that it should fit."""

    def __init__(self, make: Callable[[], nn.Module], module: nn.Module, embed: Callable, head: str = "fc.") -> None:
        self.make, self.module, self.embed = make, shaken(module), embed
        self.state = {k: v.clone() for k, v in module.state_dict().items()}
        self.backbone = {k: v for k, v in self.state.items() if not k.startswith(head)}


def vit_of_open_clip() -> nn.Module:
    """open_clip's image tower: its names, and its forward in plain torch."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(32), nn.MultiheadAttention(32, 2), nn.LayerNorm(32)
            self.mlp = nn.Sequential()
            for name, part in (("c_fc", nn.Linear(32, 128)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(128, 32))):
                self.mlp.add_module(name, part)

        def forward(self, x: Tensor) -> Tensor:
            y = self.ln_1(x).transpose(0, 1)
            x = x + self.attn(y, y, y, need_weights=False)[0].transpose(0, 1)
            return x + self.mlp(self.ln_2(x))

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.class_embedding = nn.Parameter(torch.randn(32))
            self.positional_embedding = nn.Parameter(torch.randn(17, 32))
            self.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
            self.ln_pre, self.ln_post = nn.LayerNorm(32), nn.LayerNorm(32)
            self.transformer = nn.Module()
            self.transformer.resblocks = nn.ModuleList([Block(), Block()])
            self.proj = nn.Parameter(torch.randn(32, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv1(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
            x = self.ln_pre(x)
            for block in self.transformer.resblocks:
                x = block(x)
            return self.ln_post(x[:, 0])

    return Tower()


def pooled(module: nn.Module, x: Tensor) -> Tensor:
    return module(pixel_values=x).last_hidden_state[:, 0]


def make_sources() -> dict[str, Source]:
    """One of every kind, with weights of its own."""
    torch.manual_seed(0)
    small = {k: v for k, v in CLIP.items() if k not in ("num_hidden_layers",)}
    registers = transformers.Dinov2WithRegistersConfig(num_hidden_layers=2, num_register_tokens=4, **small)
    basic = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic"
    )
    clip = {**VIT, "pre_norm": True}
    make_resnet = lambda: new("resnet18", **NARROW)  # noqa: E731
    make_vit = lambda: new("vit_tiny_patch16_224", **VIT)  # noqa: E731
    make_dino = lambda **a: new("vit_small_patch14_dinov2", **VIT, **a)  # noqa: E731
    plain = lambda m, x: m(x)  # noqa: E731
    return {
        "resnet": Source(make_resnet, timm.create_model("resnet18", num_classes=0, **NARROW), plain),
        "torchvision resnet": Source(
            lambda: new("resnet18"), torchvision.models.resnet18(),
            lambda m, x: nn.Sequential(*list(m.children())[:-1], nn.Flatten())(x),
        ),
        "vit": Source(make_vit, timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT), plain),
        "dinov2": Source(make_dino, timm.create_model("vit_small_patch14_dinov2", num_classes=0, **VIT), plain),
        "cifar": Source(lambda: resnet("resnet18", **NARROW).eval(), resnet("resnet18", **NARROW), plain),
        "hf vit": Source(
            lambda: new("vit_tiny_patch16_224", **VIT),
            transformers.ViTModel(transformers.ViTConfig(intermediate_size=128, **CLIP)), pooled,
        ),
        "hf dinov2": Source(
            make_dino, transformers.Dinov2Model(transformers.Dinov2Config(num_hidden_layers=2, **small)), pooled
        ),
        "hf dinov2 registers": Source(
            lambda: new("vit_small_patch14_reg4_dinov2", **VIT),
            transformers.Dinov2WithRegistersModel(registers), pooled,
        ),
        "hf clip": Source(
            lambda: new("vit_base_patch32_clip_quickgelu_224", **clip),
            transformers.CLIPVisionModel(transformers.CLIPVisionConfig(intermediate_size=128, **CLIP)),
            lambda m, x: m(pixel_values=x).pooler_output,
        ),
        "hf resnet": Source(
            make_resnet, transformers.ResNetModel(basic), lambda m, x: m(pixel_values=x).pooler_output.flatten(1)
        ),
        "open_clip": Source(lambda: new("vit_base_patch32_clip_224", **clip), vit_of_open_clip(), plain, head="proj"),
    }  # fmt: skip


# -- forms: (source, what the file holds) ----------------------------------------------------------------------------


def under(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + k: v.clone() for k, v in state.items()}


def other(prefix: str, state: State) -> State:
    """A copy of the backbone with other weights: a momentum encoder, a student."""
    return {prefix + k: v + 1 if v.is_floating_point() else v for k, v in state.items()}


def z(*shape: int) -> Tensor:
    return torch.randn(*shape)


PREFIXES = (
    "", "module.", "_orig_mod.", "module._orig_mod.", "backbone.", "encoder.", "model.", "net.", "trunk.",
    "student_backbone.", "online_backbone.", "online_encoder.net.", "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.", "module.base_encoder.", "module.encoder_q.", "model.backbone.", "anything.at.all.",
    "img_backbone.",
)  # fmt: skip
CONTAINERS = ("state_dict", "model", "teacher", "model.state_dict", "classy_state_dict.base_model.model.trunk")
SEQUENTIAL = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
FORMS: dict[str, tuple[str, Callable[[State], object]]] = {
    **{f"prefix {p or 'none'}": ("resnet", under(p)) for p in PREFIXES},
    **{f"vit prefix {p or 'none'}": ("vit", under(p)) for p in PREFIXES[:6]},
    **{f"container {c}": ("resnet", lambda s, c=c: nested(c, s)) for c in CONTAINERS},
    "moco": ("resnet", lambda s: {"state_dict": {
        **under("module.encoder_q.")(s), **other("module.encoder_k.", s), "module.encoder_q.fc.0.weight": z(8, 32),
        "module.encoder_k.fc.0.weight": z(8, 32), "module.queue": z(8, 9), "module.queue_ptr": z(1)}, "epoch": 1}),
    "moco v3": ("vit", lambda s: {"state_dict": {
        **under("module.base_encoder.")(s), **other("module.momentum_encoder.", s),
        "module.base_encoder.head.0.weight": z(8, 32), "module.predictor.0.weight": z(8, 8)}}),
    "simsiam": ("resnet", lambda s: {"state_dict": {
        **under("module.encoder.")(s), "module.encoder.fc.0.weight": z(8, 32), "module.predictor.0.weight": z(8, 8)}}),
    "solo": ("resnet", lambda s: {"state_dict": {
        **under("backbone.")(s), **other("momentum_backbone.", s), "projector.0.weight": z(8, 32),
        "queue": z(2, 8, 9)}}),
    "lightly momentum": ("resnet", lambda s: {"state_dict": {
        **under("backbone.")(s), **other("backbone_momentum.", s), "projection_head.layers.0.weight": z(8, 32)}}),
    "lightly teacher": ("vit", lambda s: {"state_dict": {
        **other("student_backbone.", s), **under("teacher_backbone.")(s), "student_head.layers.0.weight": z(8, 32)}}),
    "lightly sequential": ("torchvision resnet", lambda s: {"state_dict": {
        f"backbone.{SEQUENTIAL[k.partition('.')[0]]}.{k.partition('.')[2]}": v for k, v in s.items()}}),
    "barlow twins": ("resnet", lambda s: {"model": {
        **under("module.backbone.")(s), "module.projector.0.weight": z(8, 32), "module.bn.running_mean": z(8)}}),
    "byol pytorch": ("resnet", lambda s: {
        **under("net.")(s), **other("target_encoder.net.", s), "online_encoder.projector.net.0.weight": z(8, 32),
        "online_predictor.net.0.weight": z(8, 8)}),
    "mmselfsup": ("resnet", lambda s: {"state_dict": {
        **under("backbone.")(s), "neck.fc.weight": z(4, 4), "head.fc.weight": z(4, 4)}}),
    "dino": ("vit", lambda s: {"student": other("module.backbone.", s), "teacher": under("backbone.")(s),
                              "args": argparse.Namespace(arch="vit_small", lr=1e-3), "epoch": 3}),
    "dinov2 with head": ("dinov2", lambda s: {"teacher": {
        **under("backbone.")(s), "backbone.mask_token": z(1, 32), "dino_head.mlp.0.weight": z(4, 4)}}),
    "mae": ("vit", lambda s: {"model": {
        **s, "mask_token": z(1, 1, 16), "decoder_pos_embed": z(1, 17, 16), "decoder_embed.weight": z(16, 32),
        "decoder_blocks.0.norm1.weight": z(16)}}),
    "open_clip of timm": ("vit", lambda s: {"state_dict": {
        **under("module.visual.trunk.")(s), "module.visual.head.proj.weight": z(8, 32), "module.logit_scale": z(1)[0],
        "module.text.token_embedding.weight": z(9, 8)}}),
    "open_clip": ("open_clip", lambda s: {
        **under("visual.")(s), "logit_scale": z(1)[0], "token_embedding.weight": z(9, 8), "ln_final.weight": z(8),
        "transformer.resblocks.0.ln_1.weight": z(8)}),
    "open_clip in training": ("open_clip", lambda s: {"state_dict": under("module.visual.")(s), "epoch": 1}),
    "open_clip tower": ("open_clip", lambda s: s),
    "torchvision classifier": ("torchvision resnet", lambda s: {**s, "fc.weight": z(10, 512), "fc.bias": z(10)}),
    "timm classifier": ("vit", lambda s: {**s, "head.weight": z(10, 32), "head.bias": z(10)}),
    "timm training": ("vit", lambda s: {
        "state_dict": s, "state_dict_ema": {k: v + 1 for k, v in s.items()}, "args": argparse.Namespace(model="vit"),
        "optimizer": {"state": {0: {"exp_avg": z(4)}}, "param_groups": [{"lr": 0.1}]}}),
    "cifar": ("cifar", lambda s: {"state_dict": {**under("backbone.")(s), "classifier.weight": z(10, 32)}}),
    "cifar shortcut": ("cifar", lambda s: {k.replace("downsample", "shortcut"): v for k, v in s.items()}),
    "hf vit": ("hf vit", lambda s: s),
    "hf vit classifier": ("hf vit", lambda s: {**under("vit.")(s), "classifier.weight": z(10, 32)}),
    "hf vit of version 4": ("hf vit", lambda s: {of_version_4(k): v for k, v in s.items()}),
    "hf dinov2": ("hf dinov2", lambda s: s),
    "hf dinov2 classifier": ("hf dinov2", lambda s: {**under("dinov2.")(s), "classifier.weight": z(10, 64)}),
    "hf dinov2 registers": ("hf dinov2 registers", lambda s: s),
    "hf clip": ("hf clip", lambda s: s),
    "hf clip whole": ("hf clip", lambda s: {
        **under("vision_model.")(s), "text_model.embeddings.token_embedding.weight": z(9, 8),
        "visual_projection.weight": z(8, 32), "logit_scale": z(1)[0]}),
    "hf resnet": ("hf resnet", under("resnet.")),
    "lightning hyperparameters": ("resnet", lambda s: {
        "state_dict": under("backbone.")(s), "hyper_parameters": settings_object("AttributeDict", lr=0.1), "epoch": 2}),
    "omegaconf": ("resnet", lambda s: {
        "model": s, "cfg": settings_object("DictConfig", lr=0.1), "counts": defaultdict(int, a=1)}),
    "numpy scalars": ("resnet", lambda s: {"state_dict": s, "best_acc": np.float64(0.5)}),
}  # fmt: skip


def nested(path: str, content: object) -> object:
    for name in reversed(path.split(".")):
        content = {"epoch": 1, name: content}
    return content


def of_version_4(name: str) -> str:
    """Names of `transformers` before version 5."""
    for new_name, old in (
        ("layers.", "encoder.layer."), ("attention.q_proj", "attention.attention.query"),
        ("attention.k_proj", "attention.attention.key"), ("attention.v_proj", "attention.attention.value"),
        ("attention.o_proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
    ):  # fmt: skip
        name = name.replace(new_name, old) if not name.startswith("encoder.layer.") or new_name != "layers." else name
    return name


PLACES = {"AttributeDict": "lightning_fabric.utilities.data", "DictConfig": "omegaconf.dictconfig"}


def settings_object(name: str, **values: object) -> object:
    """An object of a class that this machine need not have, as its library pickles it."""
    place = PLACES[name]
    module = types.ModuleType(place)
    kind = type(name, (dict,), {"__module__": place})
    setattr(module, name, kind)
    sys.modules[place] = module
    for parent in (".".join(place.split(".")[:i]) for i in range(1, place.count(".") + 1)):
        sys.modules.setdefault(parent, types.ModuleType(parent))
    return kind(values)


ENDINGS = {"moco": "moco.pth.tar", "lightning hyperparameters": "a.ckpt", "mmselfsup": "e.torch", "simsiam": "c"}
