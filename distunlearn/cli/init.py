"""`distunlearn init` and `find`: what comes before a run on own images."""

from __future__ import annotations

import csv
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from distunlearn.cli.arguments import Config, Overrides, Recipe
from distunlearn.cli.output import Verb, tell


@dataclass(frozen=True)
class Init(Verb):
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
        tell(text.rstrip("\n"), {"settings": text, "warnings": warnings})
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        return 0


@dataclass(frozen=True)
class Find(Verb):
    """List the images most like a given one, by the original encoder and by perceptual hash, as a list to edit."""

    image: Annotated[Path, tyro.conf.arg(metavar="FILE", help="an image")]
    recipe: Recipe = None
    run: Annotated[
        Path | None, tyro.conf.arg(metavar="DIR", help="run whose original encoder is asked", help_behavior_hint="")
    ] = None
    count: Annotated[int, tyro.conf.arg(help="images that are listed")] = 20
    config: Config = None
    overrides: Overrides = ()

    def __call__(self) -> int:
        from distunlearn.run.find import find_images

        found = find_images(self.recipe, self.config, list(self.overrides), self.image, self.count, self.run)
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        rows.writerow(["id", "cosine", "bits"])
        for like in found.most:
            rows.writerow([like.id, "" if like.cosine is None else f"{like.cosine:.4f}", like.bits])
        tell(table.getvalue().rstrip("\n"), found._asdict() | {"most": [like._asdict() for like in found.most]})
        if found.undecodable:
            print(f"warning: {found.undecodable} images cannot be decoded and were not looked at", file=sys.stderr)
        if found.most and found.most[0].cosine is None:
            print("warning: there is no encoder to ask (encoder.checkpoint, --run): by hash alone", file=sys.stderr)
        return 0
