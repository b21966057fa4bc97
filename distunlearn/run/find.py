"""The verb `find`: the images most like a given one, as a help to write a request.

Likeness is told twice: by the cosine of the original encoder's embeddings, and by the bits in which perceptual hashes
differ. An image comes as early as the better of its two places. A hash knows nothing of crops, and the given image may
be cut out of one of the source: so each of those is hashed as a whole and in nine windows, and the nearest one counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distunlearn.common.text import printable
from distunlearn.config.load import load_config
from distunlearn.config.schema import EncoderConfig, RunConfig
from distunlearn.data.prepare.duplicates import count_bits, grey_image, hash_of
from distunlearn.data.sources.decode import decode_image
from distunlearn.data.sources.sources import open_source, read_bytes
from distunlearn.data.views.crops import Cutter, evaluation_crop
from distunlearn.encoders.backbone import create_backbone
from distunlearn.encoders.export import WEIGHTS
from distunlearn.encoders.weights import load_checkpoint
from distunlearn.errors import ConfigError, DataError, UndecodableError

AT_ONCE = 64  # images that are read before they go through the encoder
WINDOW = 0.88  # side of a window, of that of the image
PLACES = tuple((x, y) for y in (0.0, 0.5, 1.0) for x in (0.0, 0.5, 1.0))  # of windows: 0 is left or top


class Like(NamedTuple):
    """An image of the source. cosine: of the embeddings, None without an encoder. bits: of 64, that differ at least."""

    id: str
    cosine: float | None
    bits: int


class Found(NamedTuple):
    """most: the images most alike, the first first. undecodable: how many of the source could not be looked at."""

    most: list[Like]
    undecodable: int


def find_images(
    recipe: str | None, config: Path | None, overrides: list[str], image: Path, count: int, run: Path | None
) -> Found:
    """The `count` images of the members' source that are most like one.

    Args:
        recipe, config, overrides: the settings; None and None: those of the run.
        run: a run directory, whose original encoder is asked; None, or one that has none yet: `encoder.checkpoint`.
            Without an encoder the hashes decide alone.

    Raises:
        DataError: the image or the source cannot be read. EncoderError: the checkpoint does not fit. ConfigError: there
            are no settings.
    """
    if recipe is None and config is None:
        if run is None:
            raise ConfigError("no settings to start from; give --config, --run or a recipe")
        config = run / "run.yaml"
    try:
        data = image.read_bytes()
    except OSError as error:
        raise DataError(f"{printable(image)} cannot be read ({error.strerror or error}); check the path.") from error
    gallery = Gallery(load_config(recipe, config, overrides, world=1), run)
    return Found(gallery.most_like(data, str(image))[:count], gallery.undecodable)


class Gallery:
    """Hashes and unit embeddings of all images of the members' source that can be decoded; see `find_images`."""

    def __init__(self, cfg: RunConfig, run: Path | None = None) -> None:
        self._cfg, self._cutter, self._backbone = cfg, Cutter.of(cfg), _backbone(cfg.encoder, run)
        self._ids: list[str] = []
        self.undecodable = 0
        words, embeddings = [], []
        source = open_source(cfg.data.source, cfg.data.root, cfg.data.max_pixels)
        for chunk in _chunks([sample_id for sample_id, _ in source.samples]):
            crops = []
            for sample_id in chunk:
                try:
                    data = read_bytes(source, sample_id)
                    hashes, crop = _hashes(data, sample_id, cfg.data.max_pixels), self._crop(data, sample_id)
                except UndecodableError:
                    self.undecodable += 1
                    continue
                self._ids.append(sample_id)
                words.append(hashes)
                crops.append(crop)
            if crops:
                embeddings.append(self._embed(torch.stack(crops)))
        if not self._ids:
            raise DataError(f"None of the {self.undecodable} images of {source.name} can be decoded; check data.root.")
        self._words, self._embeddings = np.array(words, dtype=np.uint64), torch.cat(embeddings)

    def most_like(self, data: bytes, name: str) -> list[Like]:
        """All images, the most alike first. data: an encoded image."""
        word = np.uint64(_hashes(data, name, self._cfg.data.max_pixels)[0])
        bits = count_bits(self._words ^ word).min(1)
        cosines, places = None, _places(bits)
        if self._backbone is not None:
            cosines = (self._embeddings @ self._embed(self._crop(data, name)[None])[0]).tolist()
            places = np.minimum(places, _places(-np.array(cosines)))
        order = np.lexsort((bits, places)).tolist()
        return [Like(self._ids[k], None if cosines is None else cosines[k], int(bits[k])) for k in order]

    def _crop(self, data: bytes, name: str) -> Tensor:
        """uint8 [C, S, S], as evaluation shows the image."""
        cutter, bound = self._cutter, self._cfg.data.decode_size or 4 * self._cutter.size
        photo = decode_image(data, name, self._cfg.data.max_pixels, self._cfg.encoder.in_chans, bound)
        return evaluation_crop(photo, cutter.size, cutter.crop_pct, cutter.interpolation)

    @torch.no_grad()
    def _embed(self, crops: Tensor) -> Tensor:
        """uint8 [n, C, S, S] -> unit vectors [n, E]; without an encoder [n, 0]."""
        if self._backbone is None:
            return torch.zeros((len(crops), 0))
        encoder = self._cfg.encoder
        mean, std = (torch.tensor(v or (0.5,) * encoder.in_chans).view(-1, 1, 1) for v in (encoder.mean, encoder.std))
        return nn.functional.normalize(self._backbone((crops / 255 - mean) / std), dim=1)


def _hashes(data: bytes, name: str, max_pixels: int) -> list[int]:
    """Of the whole image, then of its windows."""
    image = grey_image(data, name, max_pixels)
    width, height = image.size
    lefts = [((1 - WINDOW) * x * width, (1 - WINDOW) * y * height) for x, y in PLACES]
    boxes = [(left, top, left + WINDOW * width, top + WINDOW * height) for left, top in lefts]
    return [hash_of(image), *(hash_of(image, box) for box in boxes)]


def _backbone(encoder: EncoderConfig, run: Path | None) -> nn.Module | None:
    """The original encoder; None: there is none."""
    kept = None if run is None else run / "original" / "export" / WEIGHTS
    checkpoint = str(kept) if kept is not None and kept.exists() else encoder.checkpoint
    if checkpoint is None:
        return None
    backbone = create_backbone(encoder)
    own = checkpoint == encoder.checkpoint
    prefix, ignore = (encoder.prefix, encoder.ignore) if own else (None, ())  # which are of that file
    load_checkpoint(backbone, replace(encoder, checkpoint=checkpoint, prefix=prefix, ignore=ignore))
    return backbone.eval()


def _places(values: np.ndarray) -> np.ndarray:
    """The place of each value, the smallest first; equal values share the first of their places."""
    return np.searchsorted(np.sort(values), values)


def _chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), AT_ONCE):
        yield ids[start : start + AT_ONCE]
