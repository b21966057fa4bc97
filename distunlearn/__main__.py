"""`python -m distunlearn`, `torchrun -m distunlearn`, `accelerate launch -m distunlearn`."""

from __future__ import annotations

import os
import sys

# With -m Python looks for every module in the current folder first: a timm.py that lies there would be run. The entry
# stays where the package itself was found there, in a source tree that is not installed.
if (
    not getattr(sys.flags, "safe_path", False)
    and sys.path
    and os.path.realpath(sys.path[0] or ".") == os.path.realpath(".")
):
    if os.path.realpath(os.path.join(os.path.dirname(__file__), "..")) != os.path.realpath("."):
        del sys.path[0]

from distunlearn.cli.exit import leave  # noqa: E402
from distunlearn.cli.main import main  # noqa: E402

if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ:
        leave(code)
    sys.exit(code)
