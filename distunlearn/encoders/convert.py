"""`distunlearn convert`: the backbone of a foreign checkpoint under timm's names, as a file of safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from distunlearn.common.files import replacing
from distunlearn.common.text import printable
from distunlearn.config.schema import EncoderConfig
from distunlearn.encoders.backbone import create_backbone
from distunlearn.encoders.weights import load_checkpoint
from distunlearn.errors import ConfigError


def convert(
    file: str, out: Path, name: str, image_size: int, in_chans: Literal[1, 3], args: str, prefix: str | None
) -> list[str]:
    """Write `out`; returns what was taken, mapped and left out, a sentence each. args: JSON; others: `EncoderConfig`.

    Raises:
        ConfigError: args are no table. EncoderError: the encoder cannot be built, or `file` does not fit it.
        NumericsError: weights that are not finite.
    """
    try:
        table = dict(json.loads(args))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--args is no table ({printable(str(error))}), expected JSON such as {{}}") from error
    encoder = EncoderConfig(
        name=name, image_size=image_size, in_chans=in_chans, stem="standard", args=table, checkpoint=file, prefix=prefix
    )
    backbone = create_backbone(encoder)
    notes = load_checkpoint(backbone, encoder).notes
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as path:
        save_file({name: tensor.contiguous() for name, tensor in backbone.state_dict().items()}, path)
    return notes
