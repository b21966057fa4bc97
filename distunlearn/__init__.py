"""Machine unlearning for contrastive image encoders, on one process or many, with the evidence.

Importing the package is cheap: torch and the rest are imported by the modules that use them.
Command line: `distunlearn --help`. From Python: `distunlearn.config.load.load_config` resolves a
configuration and `distunlearn.run.pipeline` runs it.
"""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0.dev0"
