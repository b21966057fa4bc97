"""Which timm models are encoders here, by name, and what their family takes."""

from __future__ import annotations

import difflib

import timm

from distunlearn.common.text import printable
from distunlearn.errors import EncoderError

# timm fetches published weights for their inner ResNet whenever it loads an export of them.
UNFIT = frozenset(
    {
        "vit_base_resnet26d_224",
        "vit_base_resnet50d_224",
        "vit_small_resnet26d_224",
        "vit_small_resnet50d_s16_224",
    }
)
SIZED = ("eva",)  # modules whose models of any size take one, too


def is_resnet(name: str) -> bool:
    """Whether a timm name is one of the ResNets whose stem can be chosen."""
    return timm.models.is_model_in_modules(name, ["resnet"])


def takes_size(name: str) -> bool:
    """Whether a timm model is built for one image size."""
    settings = timm.get_pretrained_cfg(name)
    return bool(settings and settings.fixed_input_size) or timm.models.is_model_in_modules(name, SIZED)


def list_encoders() -> list[str]:
    """Sorted timm names that `build_model` builds; reads timm's register only, so it costs no more than the import."""
    return sorted(set(timm.list_models()) - UNFIT)


def check_name(name: str) -> None:
    """Refuse what is not in `list_encoders`.

    Raises:
        EncoderError: a name that timm does not know, has a tag or a prefix, or is of a model that downloads.
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
            f"encoder.name is {shown!r}, for which timm downloads weights of a part of it whenever it is loaded; "
            "expected another model: see `distunlearn list encoders`."
        )
    close = difflib.get_close_matches(bare, encoders, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see `distunlearn list encoders`."
    raise EncoderError(f"encoder.name is {shown!r}, which timm does not know; expected a timm model; {hint}")
