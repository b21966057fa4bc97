"""`distunlearn init`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Init:
    """Write settings for your images, encoder and request to standard output; warn of what is doubtful about them."""

    images: Annotated[Path, tyro.conf.arg(metavar="DIR", help="images, or shards, that it was trained on")]
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help="your encoder", help_behavior_hint="")] = None
    request: Annotated[Path | None, tyro.conf.arg(metavar="LIST", help="to forget", help_behavior_hint="")] = None
    non_members: Annotated[
        Path | None, tyro.conf.arg(metavar="DIR", help="images that it never saw", help_behavior_hint="")
    ] = None
    encoder: Annotated[
        str | None, tyro.conf.arg(metavar="NAME", help="of the encoder; else recognised", help_behavior_hint="")
    ] = None

    def __call__(self) -> int:
        from distunlearn.run.init import init

        text, warnings = init(self.images, self.checkpoint, self.request, self.non_members, self.encoder)
        print(text, end="")
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return 0
