"""Image encoders: timm backbones with contrastive heads, their momentum copies, and safe weights in and out."""

from __future__ import annotations

from distunlearn.encoders.timm_names import list_encoders

__all__ = ["list_encoders"]
