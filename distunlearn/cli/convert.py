"""`distunlearn convert`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from distunlearn.cli.output import Verb, tell


@dataclass(frozen=True)
class Convert(Verb):
    """Write the backbone of another program's checkpoint under timm's names, as a file of safetensors."""

    file: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE", help="weights of another program")]
    out: Annotated[Path, tyro.conf.arg(metavar="FILE", help="file to write", help_behavior_hint="")] = tyro.MISSING
    name: Annotated[str, tyro.conf.arg(help="timm's name of the encoder", help_behavior_hint="")] = tyro.MISSING
    to: Annotated[Literal["timm"], tyro.conf.arg(help="whose names are written")] = "timm"
    image_size: Annotated[int, tyro.conf.arg(help="side of its input, pixels")] = 224
    in_chans: Annotated[Literal[1, 3], tyro.conf.arg(help="channels of its input")] = 3
    args: Annotated[str, tyro.conf.arg(metavar="JSON", help="further arguments of timm.create_model")] = "{}"
    prefix: Annotated[str | None, tyro.conf.arg(help="in front of its names; else it is found")] = None

    def __call__(self) -> int:
        from distunlearn.encoders.convert import convert

        notes = convert(self.file, self.out, self.name, self.image_size, self.in_chans, self.args, self.prefix)
        tell("\n".join([*notes, str(self.out)]), {"file": self.out, "notes": notes})
        return 0
