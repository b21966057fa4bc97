"""What the two views of an image are drawn from: published recipes by name, or an own callable.

A pair's second view may be drawn otherwise than its first (BYOL, MoCo v3, DINO). The numbers are those of the published
code, read there:

* simclr: `preprocess_for_train` and `batch_random_blur` of google-research/simclr, data_util.py, strength 1.
* mocov2: `--aug-plus` of facebookresearch/moco, main_moco.py.
* mocov3: `augmentation1` and `augmentation2` of facebookresearch/moco-v3, main_moco.py. `--crop-min` is 0.08 there; its
  reference commands for ResNets (CONFIG.md) have 0.2: set `views.crop_scale_min`.
* byol: `augment_config` of google-deepmind/deepmind-research, byol/utils/augmentations.py, and dataset.py beside it.
* dino: the global crops of `DataAugmentationDINO` of facebookresearch/dino, main_dino.py, with its default scale; with
  two views and no local crops its help recommends 0.14.

Operations are torchvision's for all of them, as in moco, moco-v3 and dino. The code of simclr (TensorFlow) and byol
(JAX) has the same strengths, but resizes without antialias, takes the contrast about the mean of each channel and the
saturation in HSV; byol adds its brightness; simclr draws its windows by `sample_distorted_bounding_box`, which leaves
out those below 0.1.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from distunlearn.common import plugins

if TYPE_CHECKING:
    from distunlearn.config.schema import ViewsConfig


@dataclass(frozen=True)
class View:
    """How one view is drawn; names as in torchvision's transforms v2.

    crop_scale_min: smallest share of the area that a crop keeps; aspects are log-uniform in 3/4 .. 4/3.
    flip, jitter, grayscale, blur, solarize: probabilities. brightness, contrast, saturation, hue: strengths of the
        jitter, in random order. blur_sigma: range, pixels of the view.
    """

    crop_scale_min: float = 0.08
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0


_GREY = View(
    crop_scale_min=0.4, flip=0.0, jitter=1.0, saturation=0.0, hue=0.0, grayscale=0.0
)  # of small grey images such as digits
_SIMCLR = View(interpolation="bicubic", brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, blur=0.5)
_MOCO_V2 = View(crop_scale_min=0.2, saturation=0.4, blur=0.5)
_MOCO_V3 = (View(blur=1.0), View(blur=0.1, solarize=0.2))
_BYOL = tuple(dataclasses.replace(v, interpolation="bicubic") for v in _MOCO_V3)
_DINO = tuple(dataclasses.replace(v, crop_scale_min=0.4) for v in _BYOL)

VIEW_RECIPES: dict[str, tuple[View, ...]] = {
    "grey": (_GREY, _GREY),
    "simclr": (_SIMCLR, _SIMCLR),
    "mocov2": (_MOCO_V2, _MOCO_V2),
    "mocov3": _MOCO_V3,
    "byol": _BYOL,
    "dino": _DINO,
}


@functools.lru_cache(maxsize=64)
def views_of(cfg: ViewsConfig) -> tuple[View, ...]:
    """Of the first and of the second view of a pair: the recipe, with the settings' changes; none of own callables."""
    if cfg.recipe not in VIEW_RECIPES:
        return ()
    asked = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(View)}
    changes = {name: value for name, value in asked.items() if value is not None}
    found = []
    for number, view in enumerate(VIEW_RECIPES[cfg.recipe]):
        pair = {n: v[number] if n in ("blur", "solarize") and isinstance(v, tuple) else v for n, v in changes.items()}
        found.append(dataclasses.replace(view, **pair))
    return tuple(found)


def own_view(cfg: ViewsConfig) -> Callable[[Any, int], Any] | None:
    """The callable that `views.recipe` names, `package.module:Name` or `file.py:Name`; None: it is a named recipe.

    Raises:
        ConfigError: there is no such recipe.
    """
    if cfg.recipe in VIEW_RECIPES:
        return None
    return plugins.resolve(cfg.recipe, dict.fromkeys(VIEW_RECIPES, ""), None, "distunlearn.views", "views.recipe")
