"""Memory that a worker frees is not given back and cleared again at every step."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from worker.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
libc.free.argtypes, libc.memset.argtypes = (ctypes.c_void_p,), (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
SIZE, BLOCKS, kept = 1 << 20, 40, [0] * 40

def steps(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        for k in range(BLOCKS):
            kept[k] = libc.malloc(SIZE)
            libc.memset(kept[k], 1, SIZE)
        for block in reversed(kept):
            libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

steps(10)  # the memory itself
print(steps(20))
"""


def faults(setting):
    done = subprocess.run([sys.executable, "-c", FAULTS, setting], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library cannot be told to keep memory")
def test_what_is_freed_is_used_again_without_the_kernel():
    pages = 40 * (1 << 20) // 4096
    assert faults("leave") > 20 * pages / 4, "glibc by itself gives back what is free at the end"
    assert faults("keep") < pages
