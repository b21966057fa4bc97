"""`python -m distunlearn`, `torchrun -m distunlearn`, `accelerate launch -m distunlearn`."""

from __future__ import annotations

import sys

from distunlearn.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
