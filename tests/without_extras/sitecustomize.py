"""First on the path of the processes that tests start: transformers, which tests alone need, cannot be imported."""

import sys

sys.modules["transformers"] = None
