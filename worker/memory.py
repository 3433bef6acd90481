"""Memory that was freed stays with the process.

Owns how a worker's C library gives memory back: not at all, up to a limit. Every inner step allocates and frees the
same few hundred kilobytes to megabytes; by default glibc maps such blocks anew each time, and the kernel clears every
page of them again, which takes up to a fifth of a step. Must never be called in a process that is not ours alone.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
KEPT = {
    M_TRIM_THRESHOLD: 1 << 30,  # give back only beyond this many free bytes
    M_TOP_PAD: 16 << 20,  # and ask for so many more than needed
    M_MMAP_THRESHOLD: 32 << 20,  # blocks above this (glibc's most) are mapped and unmapped one by one
}


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed; whether this one can be told so (glibc can, unless LD_PRELOAD has put
    another allocator in its place, which then does as it likes)."""
    if os.name != "posix":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(setting, value) == 1 for setting, value in KEPT.items())
