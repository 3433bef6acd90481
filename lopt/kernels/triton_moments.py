"""Second moments of gradients along axes, and moments of whole tensors, on GPUs: the kernels, in Triton.

Owns the phases of a step before its columns, and the statistics that VeLO's LSTM sees. ``gpu`` owns the tables that say
which part of which tensor a program takes, and launches the phases. Import it only where there is triton.

Nothing is added with atomics: a phase writes the sums of its parts, the next adds them up in a fixed order.
"""
# mypy: ignore-errors

import triton
import triton.language as tl

from lopt.kernels import gpu
from lopt.kernels import triton_tables as tables

ALONG_SUMS, ALONG_STEP, ALONG_PART = (tl.constexpr(size) for size in gpu.ALONG)
ACROSS_SUMS, ACROSS_STEP, ACROSS_PART = (tl.constexpr(size) for size in gpu.ACROSS)
ENTRIES, PARTS_STEP = (tl.constexpr(size) for size in gpu.ENTRIES)
MEANS, MEANS_STEP = (tl.constexpr(size) for size in gpu.MEANS)
MOMENTS = tl.constexpr(gpu.MOMENTS)
MOMENTS_STEP = tl.constexpr(1024)


@triton.jit
def _square_sum(
    g, begin, end, outputs, stride, known, axis: tl.constexpr, step: tl.constexpr, max_gradient: tl.constexpr
):
    """Sum of g^2 over begin..end of one axis of the tensor and of the tile, at the offsets ``outputs`` where known."""
    across: tl.constexpr = 1 - axis
    along = tl.arange(0, step)
    total = tl.zeros([known.shape[0], step] if axis == 1 else [step, known.shape[0]], tl.float32)
    for first in range(begin, end, step):
        place = first + along
        x = tl.load(
            g + tl.expand_dims(outputs, axis) + tl.expand_dims(place * stride, across),
            mask=tl.expand_dims(known, axis) & tl.expand_dims(place < end, across),
            other=0.0,
        )
        if max_gradient > 0:
            x = tables.clip(x, max_gradient)
        total += x * x
    return tl.sum(total, axis)


@triton.jit(do_not_specialize=["partials_size"])
def axis_sums(pointers, layout, items, partials, partials_size, max_gradient: tl.constexpr):
    """Partial sums of g^2 over part of the axis that the row (kind 0) or the column (1) lacks."""
    item = items + tl.program_id(0) * 4
    tensor, kind, first, part = tables.word(item, 0), tables.word(item, 1), tables.word(item, 2), tables.word(item, 3)
    particle = tl.program_id(1).to(tl.int64)
    axis = layout + tensor * tables.LAYOUT_WORDS + tables.ROW_AXIS + kind * tables.AXIS_WORDS
    extent, stride = tables.word(axis, tables.EXTENT), tables.word(axis, tables.STRIDE)
    outputs = tl.load(axis + tables.OUTPUTS)
    g = tables.pointer(pointers, tensor, tables.G, particle)
    out = partials + particle * partials_size + tl.load(axis + tables.OFFSET) + part * outputs
    if tl.load(axis + tables.CONTIGUOUS) != 0:  # lanes along the axis
        run = first + tl.arange(0, ALONG_SUMS)
        end = tl.minimum((part + 1) * ALONG_PART, extent)
        sums = _square_sum(g, part * ALONG_PART, end, run * extent, 1, run < outputs, 1, ALONG_STEP, max_gradient)
        tl.store(out + run, sums, mask=run < outputs)
    else:  # lanes along the outputs
        lane = first + tl.arange(0, ACROSS_SUMS)
        end = tl.minimum((part + 1) * ACROSS_PART, extent)
        at = lane // stride * (extent * stride) + lane % stride
        total = _square_sum(g, part * ACROSS_PART, end, at, stride, lane < outputs, 0, ACROSS_STEP, max_gradient)
        tl.store(out + lane, total, mask=lane < outputs)


@triton.jit(do_not_specialize=["partials_size"])
def accumulate(pointers, layout, items, partials, partials_size):
    """Adafactor's accumulators from the sums of g^2, for some entries of the row (kind 0) or the column (1)."""
    item = items + tl.program_id(0) * 3
    tensor, kind, first = tables.word(item, 0), tables.word(item, 1), tables.word(item, 2)
    particle = tl.program_id(1).to(tl.int64)
    axis = layout + tensor * tables.LAYOUT_WORDS + tables.ROW_AXIS + kind * tables.AXIS_WORDS
    outputs, parts = tl.load(axis + tables.OUTPUTS), tables.word(axis, tables.PARTS)
    at = first + tl.arange(0, ENTRIES)
    part = tl.arange(0, PARTS_STEP)
    sums = partials + particle * partials_size + tl.load(axis + tables.OFFSET)
    total = tl.zeros([PARTS_STEP, ENTRIES], tl.float32)
    for start in range(0, parts, PARTS_STEP):
        places = (start + part)[:, None] * outputs + at[None, :]
        total += tl.load(sums + places, mask=((start + part) < parts)[:, None] & (at < outputs)[None, :], other=0.0)
    mean = tl.sum(total, 0) / tl.load(axis + tables.EXTENT).to(tl.float32) + 1e-30
    old, new = (
        tables.pointer(pointers, tensor, tables.ROW + kind, particle),
        tables.pointer(pointers, tensor, tables.ROW_OUT + kind, particle),
    )
    decay = tables.pointer(pointers, tensor, tables.FACTORED_DECAY, particle)
    for k in tl.static_range(3):
        weight = 1.0 - tables.unit(tl.load(decay + k))
        moment = tl.load(old + k * outputs + at, mask=at < outputs, other=0.0)
        tl.debug_barrier()  # old and new may be the same, and several threads may have loaded an entry
        tl.store(new + k * outputs + at, tables.lerp(moment, mean, weight), mask=at < outputs)


@triton.jit(do_not_specialize=["means_size"])
def row_means(pointers, layout, items, means, means_size):
    """1 / (mean of the row over d1 + 1e-9), for some places without d1."""
    item = items + tl.program_id(0) * 2
    tensor, first = tables.word(item, 0), tables.word(item, 1)
    particle = tl.program_id(1).to(tl.int64)
    axis = layout + tensor * tables.LAYOUT_WORDS + tables.MEAN_AXIS
    extent, stride = tables.word(axis, tables.EXTENT), tables.word(axis, tables.STRIDE)
    outputs, rows = (
        tl.load(axis + tables.OUTPUTS),
        tl.load(layout + tensor * tables.LAYOUT_WORDS + tables.ROW_AXIS + tables.OUTPUTS),
    )
    row = tables.pointer(pointers, tensor, tables.ROW_OUT, particle)
    out = means + particle * means_size + tl.load(axis + tables.OFFSET)
    at = first + tl.arange(0, MEANS)
    offset = at // stride * (extent * stride) + at % stride
    along = tl.arange(0, MEANS_STEP)
    for k in tl.static_range(3):
        total = tl.zeros([MEANS, MEANS_STEP], tl.float32)
        for start in range(0, extent, MEANS_STEP):
            place = start + along
            inside = (at < outputs)[:, None] & (place < extent)[None, :]
            total += tl.load(row + k * rows + offset[:, None] + (place * stride)[None, :], mask=inside, other=0.0)
        mean = tl.sum(total, 1) / extent.to(tl.float32)
        tl.store(out + k * outputs + at, 1.0 / (mean + 1e-9), mask=at < outputs)


@triton.jit
def chunk_moments(pointers, layout, chunks, parts):
    """Of one chunk: sum of p^2, then of m (3) and v their means, and then their sums of squares about them."""
    chunk, particle = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tensor, first = tables.word(chunks, 2 * chunk), tables.word(chunks, 2 * chunk + 1)
    size = tl.load(layout + tensor * tables.LAYOUT_WORDS + tables.SIZE)
    end = tl.minimum(first + tables.CHUNK, size.to(tl.int32))
    width = (end - first).to(tl.float32)
    p, m = tables.pointer(pointers, tensor, tables.P, particle), tables.pointer(pointers, tensor, tables.M, particle)
    v = tables.pointer(pointers, tensor, tables.V, particle)
    out = parts + (particle * tl.num_programs(0) + chunk) * MOMENTS
    tl.store(out, _sum(p, first, end, 0.0, 2))
    for k in tl.static_range(4):
        x = m + k * size if k < 3 else v
        mean = _sum(x, first, end, 0.0, 1) / width
        tl.store(out + 1 + k, mean)
        tl.store(out + 5 + k, _sum(x, first, end, mean, 2))


@triton.jit
def _sum(x, first, end, shift, power: tl.constexpr):
    """Of (x - shift)^power over a chunk."""
    total = tl.zeros([MOMENTS_STEP], tl.float32)
    for start in range(first, end, MOMENTS_STEP):
        at = start + tl.arange(0, MOMENTS_STEP)
        y = tl.where(at < end, tl.load(x + at, mask=at < end, other=0.0) - shift, 0.0)
        total += y * y if power == 2 else y
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["num_chunks"])
def tensor_moments(layout, parts, out, num_chunks):
    """The moments of a tensor from those of its chunks, combined as by Chan et al. 1979: nothing cancels."""
    tensor, particle = tl.program_id(0), tl.program_id(1).to(tl.int64)
    words = layout + tensor * tables.LAYOUT_WORDS
    count, size = (
        tables.word(words, tables.LAST_CHUNK) - tables.word(words, tables.FIRST_CHUNK),
        tables.word(words, tables.SIZE),
    )
    parts += (particle * num_chunks + tables.word(words, tables.FIRST_CHUNK)) * MOMENTS
    out += (particle * tl.num_programs(0) + tensor) * MOMENTS
    for k in tl.static_range(5):  # p, m and v
        total = tl.zeros([tables.CHUNKS_STEP], tl.float32)
        for start in range(0, count, tables.CHUNKS_STEP):
            chunk = start + tl.arange(0, tables.CHUNKS_STEP)
            x = tl.load(parts + chunk * MOMENTS + k, mask=chunk < count, other=0.0)
            total += x if k == 0 else x * _width(chunk, size)
        mean = tl.sum(total, 0) / size.to(tl.float32)
        tl.store(out + k, mean)
        if k > 0:
            total = tl.zeros([tables.CHUNKS_STEP], tl.float32)
            for start in range(0, count, tables.CHUNKS_STEP):
                chunk = start + tl.arange(0, tables.CHUNKS_STEP)
                shift = tl.load(parts + chunk * MOMENTS + k, mask=chunk < count, other=0.0) - mean
                spread = tl.load(parts + chunk * MOMENTS + 4 + k, mask=chunk < count, other=0.0)
                total += tl.where(chunk < count, spread + shift * shift * _width(chunk, size), 0.0)
            tl.store(out + 4 + k, tl.sum(total, 0) / size.to(tl.float32))


@triton.jit
def _width(chunk, size):
    """Elements in a chunk of a tensor."""
    return tl.minimum(size - chunk * tables.CHUNK, tables.CHUNK).to(tl.float32)
