"""Small encoders of many families, as settings: name, image size, arguments."""

from __future__ import annotations

from distunlearn.config.schema import EncoderConfig

TOKENS = {"embed_dim": 24, "depth": 1, "num_heads": 2}
WINDOWS = {"window_size": 4, "embed_dim": 12, "depths": [2, 1], "num_heads": [1, 2]}
CONVNEXT = {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 24]}
# name: image size, arguments, what probes leave out
FAMILIES: dict[str, tuple[int, dict, tuple[str, ...]]] = {
    "convnext_atto": (32, CONVNEXT, ("convolutions in groups",)),
    "swin_tiny_patch4_window7_224": (32, WINDOWS, ()),
    "swinv2_tiny_window8_256": (32, WINDOWS, ("used past their own forward", "not samples")),
    "efficientnet_b0": (32, {}, ("convolutions in groups",)),
    "mobilenetv3_small_050": (32, {}, ("convolutions in groups",)),
    "regnetx_002": (32, {}, ("convolutions in groups",)),
    "eva02_tiny_patch14_224": (28, TOKENS, ("used past their own forward",)),
    "beit_base_patch16_224": (32, TOKENS, ("used past their own forward",)),
    "vit_small_patch14_reg4_dinov2": (28, TOKENS, ()),
    "vit_base_patch16_siglip_224": (32, TOKENS, ()),
    "resnet50": (32, {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1], "stem_width": 16}, ()),
}


def family(name: str) -> EncoderConfig:
    size, args, _ = FAMILIES[name]
    return EncoderConfig(name=name, image_size=size, in_chans=3, args=args)
