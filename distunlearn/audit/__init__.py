"""Membership inference before, after and on the retrained encoder; utility; gates; raw scores.

| module | what it holds |
|---|---|
| `signals` | one pass of every audited image through one encoder |
| `gradients` | per-sample gradient norms over the whole network |
| `network_sketch` | lengths of layers' gradients and a sketch of the whole |
| `parts` | responses of an image to its own small crops |
| `attacks/` | one attack a file |
| `statistics` | AUC, paired bootstrap, TPR at a low FPR, KS |
| `utility` | kNN and linear probe |
| `similarity` | linear CKA |
| `completeness` | ToW, IAM, average gap |
| `relearn` | how fast forgotten images come back |
| `shadows`, `pooled` | pooled shadow encoders, and what they say |
| `two_sample` | can forgotten and third-party images be told apart? |
| `gates` | equivalence tests with margins declared before the run |
| `summary` | all of it, as audit/summary.json and raw scores |
| `evidence` | the audit of a run directory, by tier |
| `kept` | signals of encoders that many runs share |
"""

from __future__ import annotations

from distunlearn.audit.attacks import ATTACKS
from distunlearn.audit.signals import Signals, collect_signals
from distunlearn.audit.summary import summarise, write_audit

__all__ = ["ATTACKS", "Signals", "collect_signals", "summarise", "write_audit"]
