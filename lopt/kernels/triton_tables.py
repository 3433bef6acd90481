"""The tables that the Triton kernels read, from within a kernel, and arithmetic that all phases share.

Owns the places of columns in the tables, as ``gpu`` lays them out. Comparisons are written so that what is not a number
stays so. Import it only where there is triton.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from lopt.kernels import gpu

P, G, M, V = (tl.constexpr(gpu.POINTERS.index(name)) for name in "pgmv")
ROW = tl.constexpr(gpu.POINTERS.index("row"))  # and then the column
P_OUT, M_OUT, V_OUT, ROW_OUT, COL_OUT = (
    tl.constexpr(gpu.POINTERS.index(name)) for name in ("p_out", "m_out", "v_out", "row_out", "col_out")
)
W0, B0, W1, B1, W2, B2 = (tl.constexpr(gpu.POINTERS.index(name)) for name in ("w0", "b0", "w1", "b1", "w2", "b2"))
M_DECAY, V_DECAY, FACTORED_DECAY, FACTOR = (
    tl.constexpr(gpu.POINTERS.index(name)) for name in ("m_decay", "v_decay", "factored_decay", "factor")
)
RATES = tl.constexpr(2 * len(gpu.POINTERS))
POINTER_WORDS = tl.constexpr(2 * len(gpu.POINTERS) + 2)

SIZE, FACTORED, FIRST_CHUNK, LAST_CHUNK = (
    tl.constexpr(gpu.LAYOUT.index(name)) for name in ("size", "factored", "first_chunk", "last_chunk")
)
ROW_AXIS, COL_AXIS, MEAN_AXIS = (tl.constexpr(gpu.LAYOUT.index(f"{name}_extent")) for name in ("row", "col", "mean"))
EXTENT, STRIDE, OUTPUTS, PARTS, OFFSET, CONTIGUOUS = (tl.constexpr(k) for k in range(len(gpu.AXIS)))
AXIS_WORDS = tl.constexpr(len(gpu.AXIS))
LAYOUT_WORDS = tl.constexpr(len(gpu.LAYOUT))

CHUNK = tl.constexpr(gpu.CHUNK)
CHUNKS_STEP = tl.constexpr(gpu.COMBINED)


@triton.jit
def word(table, at):
    """One number of a table."""
    return tl.load(table + at).to(tl.int32)


@triton.jit
def pointer(pointers, tensor, column, particle):
    """One of the tensor's pointers, moved on to this particle."""
    words = pointers + tensor * POINTER_WORDS + 2 * column
    return (tl.load(words) + particle * tl.load(words + 1)).to(tl.pointer_type(tl.float32))


@triton.jit
def clip(x, limit):
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def lerp(old, new, weight):
    """As torch.lerp rounds it."""
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))


@triton.jit
def safe_rsqrt(x):
    return tl.rsqrt(tl.where(x < 1e-9, 1e-9, x))


@triton.jit
def unit(x):
    return tl.where(x > 1.0, 1.0, tl.where(x < 0.0, 0.0, x))


@triton.jit
def without_axis(at, extent, stride):
    """Place in a tensor that lacks one axis of that in which the place is ``at``."""
    return at // (extent * stride) * stride + at % stride
