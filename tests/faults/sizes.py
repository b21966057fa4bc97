"""Settings of the runs that faults are put into."""

from __future__ import annotations

SMALL = ("pretrain.epochs=1", "unlearn.steps=5", "unlearn.checkpoint_every=2")
