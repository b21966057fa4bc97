"""Memory of a process that computes on a CPU: what a tensor frees is kept for the next one.

glibc gives blocks above 32 MiB back to the system at once and takes them anew for the next tensor, where every page is
cleared and mapped again: a sixth of the CPU seconds of a ResNet's step. Kept, the same pages serve every step; the
process stays as large as its largest step made it. Numbers do not change.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of mallopt, malloc.h


def keep_freed_memory() -> bool:
    """Tell the C library's allocator to keep what is freed; False where it takes no such wish (no glibc)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another libc, or another system
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
