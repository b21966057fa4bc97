"""Which timm models are encoders here: the ResNet and ViT families, by name."""

from __future__ import annotations

import difflib
import re

import timm

from distunlearn.common.text import printable
from distunlearn.errors import EncoderError

RESNET = re.compile(r"^(?:wide_|se|eca|legacy_se)?resne(?:t|xt)\d")  # the pattern by which configs are checked
VIT = re.compile(r"^(?:vit|deit)_")
UNFIT = frozenset(
    {
        # Without a classifier it still ends in a projection, so its embedding has another size than it says.
        "resnet50_mlp",
        # timm fetches published weights for their inner ResNet whenever it loads an export of them.
        "vit_base_resnet26d_224",
        "vit_base_resnet50d_224",
        "vit_small_resnet26d_224",
        "vit_small_resnet50d_s16_224",
    }
)


def is_resnet(name: str) -> bool:
    """Whether a timm name is one of the ResNet family."""
    return RESNET.match(name) is not None


def list_encoders() -> list[str]:
    """Sorted timm names that `build_model` builds; reads timm's register only, so it costs no more than the import."""
    known = (name for name in timm.list_models() if is_resnet(name) or VIT.match(name))
    return sorted(name for name in known if name not in UNFIT)


def check_name(name: str) -> None:
    """Refuse what is not in `list_encoders`.

    Raises:
        EncoderError: a name that timm does not know, of another family, with a weights tag or a source prefix.
    """
    encoders = list_encoders()
    if name in encoders:
        return
    shown, bare = printable(name), name.rsplit(":", 1)[-1].split(".")[0]
    if bare != name and bare in encoders:
        raise EncoderError(
            f"encoder.name is {shown!r}, which names published weights, and those are never downloaded; "
            f"expected a model's name alone: set encoder.name={bare}, and encoder.checkpoint to a file of weights."
        )
    if name in timm.list_models():
        raise EncoderError(
            f"encoder.name is {shown!r}, which is not among the ResNets and ViTs that "
            "can be trained here; expected one of them: see `distunlearn list encoders`."
        )
    close = difflib.get_close_matches(bare, encoders, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see `distunlearn list encoders`."
    raise EncoderError(f"encoder.name is {shown!r}, which timm does not know; expected a timm model; {hint}")
