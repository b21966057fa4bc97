"""Plain data as bytes for other processes, and back: JSON, and numpy arrays of numbers. Nothing in it can be executed.

Tuples arrive as lists; a key that is no text is refused.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

ARRAY = "\x00array"


def encode(value: Any) -> bytes:
    """TypeError: it is no plain data."""
    _require_text_keys(value)
    return json.dumps(value, default=_array).encode()


def decode(data: bytes) -> Any:
    """What `encode` was given. ValueError: it is not of `encode`."""
    return json.loads(data, object_hook=_restored)


def _array(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        content = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {ARRAY: [value.dtype.str, list(value.shape), content]}
    raise TypeError(f"{type(value).__name__} is no plain data; send numbers, texts, lists, dicts or arrays of numbers")


def _restored(found: dict[str, Any]) -> Any:
    if found.keys() != {ARRAY}:
        return found
    kind, shape, content = found[ARRAY]
    if np.dtype(kind).kind not in "biuf":
        raise ValueError(f"an array of {kind}")
    return np.frombuffer(base64.b64decode(content), dtype=kind).reshape(shape).copy()


def _require_text_keys(value: Any) -> None:
    """`json` would turn other keys into text, silently."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no text")
            _require_text_keys(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _require_text_keys(inner)
