"""`python -m distunlearn`, `torchrun -m distunlearn`, `accelerate launch -m distunlearn`."""

from __future__ import annotations

import os
import sys

from distunlearn.cli.exit import leave
from distunlearn.cli.main import main

if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:
        leave(code)
    sys.exit(code)
