"""The fused update on GPUs: features, normalisers, network and step, in Triton.

Owns what one program of these phases computes; ``gpu`` owns the tables that say which part of which tensor that is, and
launches the phases in the order in which they stand here, behind those of ``triton_moments``. The reference is
``per_parameter``; formulas are explained there and in ``features``. Import it only where there is triton.

Pointers come out of a table as integers, so nothing is promised about their alignment: loads are coalesced, four bytes
a lane. Kernels are compiled once per kind of rule: sizes are never specialised. (The compiler knows tuples only by
adding them, and types not as Python does.)
"""
# ruff: noqa: RUF005
# mypy: ignore-errors

import triton
import triton.language as tl

from lopt import features
from lopt.kernels import gpu
from lopt.kernels import triton_tables as tables

NORMALIZER_EPS = tl.constexpr(features.NORMALIZER_EPS)
EXP_MULT = tl.constexpr(features.EXP_MULT)
COLUMNS = tl.constexpr(gpu.PLACES)
STEP = tl.constexpr(gpu.PLACES - 1)


@triton.jit
def _relu(x):
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _tensor(pointers, layout, means, means_size, tensor, particle):
    """What ``_columns`` needs to know of a tensor, loaded once per program."""
    words = layout + tensor * tables.LAYOUT_WORDS
    row_axis, col_axis, mean_axis = words + tables.ROW_AXIS, words + tables.COL_AXIS, words + tables.MEAN_AXIS
    inputs = (
        tables.pointer(pointers, tensor, tables.P, particle),
        tables.pointer(pointers, tensor, tables.G, particle),
        tables.pointer(pointers, tensor, tables.M, particle),
        tables.pointer(pointers, tensor, tables.V, particle),
    )
    moments = (
        tables.pointer(pointers, tensor, tables.ROW, particle),
        tables.pointer(pointers, tensor, tables.ROW_OUT, particle),
        tables.pointer(pointers, tensor, tables.COL_OUT, particle),
        means + particle * means_size + tl.load(mean_axis + tables.OFFSET),
    )
    axes = (
        tables.word(row_axis, tables.EXTENT),
        tables.word(row_axis, tables.STRIDE),
        tables.word(col_axis, tables.EXTENT),
        tables.word(col_axis, tables.STRIDE),
        tables.word(mean_axis, tables.EXTENT),
        tables.word(mean_axis, tables.STRIDE),
    )
    sizes = (
        tl.load(words + tables.SIZE),
        tl.load(row_axis + tables.OUTPUTS),
        tl.load(col_axis + tables.OUTPUTS),
        tl.load(mean_axis + tables.OUTPUTS),
    )
    m_decay = tables.pointer(pointers, tensor, tables.M_DECAY, particle)
    v_decay = tables.pointer(pointers, tensor, tables.V_DECAY, particle)
    factored_decay = tables.pointer(pointers, tensor, tables.FACTORED_DECAY, particle)
    weights = (
        1.0 - tl.load(m_decay),
        1.0 - tl.load(m_decay + 1),
        1.0 - tl.load(m_decay + 2),
        1.0 - tables.unit(tl.load(v_decay)),
        1.0 - tables.unit(tl.load(factored_decay)),
        1.0 - tables.unit(tl.load(factored_decay + 1)),
        1.0 - tables.unit(tl.load(factored_decay + 2)),
    )
    return tl.load(words + tables.FACTORED) != 0, inputs, moments, axes, sizes, weights


@triton.jit
def _factored(moments, axes, sizes, at, inside):
    """Row and column of each element, and Adafactor's preconditioner: three of each."""
    _, row_out, col_out, means = moments
    row_extent, row_stride, col_extent, col_stride, mean_extent, mean_stride = axes
    _, row_size, col_size, mean_size = sizes
    row_at = tables.without_axis(at, row_extent, row_stride)
    col_at = tables.without_axis(at, col_extent, col_stride)
    mean_at = tables.without_axis(row_at, mean_extent, mean_stride)
    rows = ()
    cols = ()
    scales = ()
    for k in tl.static_range(3):
        row = tl.load(row_out + k * row_size + row_at, mask=inside, other=0.0)
        col = tl.load(col_out + k * col_size + col_at, mask=inside, other=0.0)
        mean = tl.load(means + k * mean_size + mean_at, mask=inside, other=0.0)
        rows = rows + (row,)
        cols = cols + (col,)
        scales = scales + (tables.safe_rsqrt(row * mean) * tables.safe_rsqrt(col),)
    return rows, cols, scales, scales


@triton.jit
def _full(moments, sizes, weights, square, at, inside, diag_eps: tl.constexpr):
    """The same where nothing is factored, and the row, which is also the column, is the full second moment."""
    rows = ()
    g_scales = ()
    m_scales = ()
    for k in tl.static_range(3):
        old = tl.load(moments[0] + k * sizes[0] + at, mask=inside, other=0.0)
        row = tables.lerp(old, square + 1e-30, weights[4 + k])
        rows = rows + (row,)
        g_scales = g_scales + (tables.safe_rsqrt(row + 1e-9),)
        m_scales = m_scales + (tl.rsqrt(row + diag_eps),)
    return rows, rows, g_scales, m_scales


@triton.jit
def _columns(tensor, at, inside, clipped: tl.constexpr, max_gradient: tl.constexpr, diag_eps: tl.constexpr):
    """All columns at some places of a tensor, in the order of the first layer's rows, and zeros up to ``COLUMNS``."""
    factored, inputs, moments, axes, sizes, weights = tensor
    p = tl.load(inputs[0] + at, mask=inside, other=0.0)
    g = tl.load(inputs[1] + at, mask=inside, other=0.0)
    if max_gradient > 0:
        g = tables.clip(g, max_gradient)
    m0 = tables.lerp(tl.load(inputs[2] + at, mask=inside, other=0.0), g, weights[0])
    m1 = tables.lerp(tl.load(inputs[2] + sizes[0] + at, mask=inside, other=0.0), g, weights[1])
    m2 = tables.lerp(tl.load(inputs[2] + 2 * sizes[0] + at, mask=inside, other=0.0), g, weights[2])
    square = g * g
    v = tables.lerp(tl.load(inputs[3] + at, mask=inside, other=0.0), square, weights[3])
    r = tl.rsqrt(v + 1e-6)
    if factored:
        rows, cols, g_scales, m_scales = _factored(moments, axes, sizes, at, inside)
    else:
        rows, cols, g_scales, m_scales = _full(moments, sizes, weights, square, at, inside, diag_eps)
    momenta = (m0, m1, m2, v, m0 * r, m1 * r, m2 * r, r)
    factored_g = (g * g_scales[0], g * g_scales[1], g * g_scales[2])
    factored_m = (m0 * m_scales[0], m1 * m_scales[1], m2 * m_scales[2])
    row_rsqrt = (tl.rsqrt(rows[0] + 1e-8), tl.rsqrt(rows[1] + 1e-8), tl.rsqrt(rows[2] + 1e-8))
    col_rsqrt = (tl.rsqrt(cols[0] + 1e-8), tl.rsqrt(cols[1] + 1e-8), tl.rsqrt(cols[2] + 1e-8))
    moments = rows + cols + row_rsqrt + col_rsqrt + factored_m
    none = tl.zeros_like(g)
    if clipped:
        columns = (g, tables.clip(g, 0.1), p) + momenta + factored_g + (g * r,) + moments + (none, none)
    else:
        columns = (g, p) + momenta + factored_g + moments + (none, none, none, none)
    return columns


@triton.jit
def _matrix(columns, block: tl.constexpr):
    """The columns side by side: (block, COLUMNS), every row with one thread."""
    for level in tl.static_range(5):  # two tensors make one whose new last axis is the next bit of the column's number
        joined = ()
        for k in tl.static_range(COLUMNS >> (level + 1)):
            joined = joined + (tl.join(columns[k], columns[k + (COLUMNS >> (level + 1))]),)
        columns = joined
    return tl.reshape(columns[0], [block, COLUMNS])


@triton.jit(do_not_specialize=["means_size"])
def column_sums(
    pointers, layout, chunks, means, means_size, sums, clipped: tl.constexpr, max_gradient: tl.constexpr,
    diag_eps: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Sums of squares of all columns over one chunk."""
    chunk, particle = tl.program_id(0), tl.program_id(1).to(tl.int64)
    item = chunks + chunk * 2
    tensor = _tensor(pointers, layout, means, means_size, tables.word(item, 0), particle)
    first = tables.word(item, 1)
    end = tl.minimum(first + tables.CHUNK, tensor[4][0].to(tl.int32))
    total = tl.zeros([block, COLUMNS], tl.float32)
    for start in range(first, end, block):
        at = start + tl.arange(0, block)
        columns = _columns(tensor, at, at < end, clipped, max_gradient, diag_eps)
        x = _matrix(columns, block)
        x = tl.where((at < end)[:, None], x, 0.0)
        total += x * x
    out = sums + (particle * tl.num_programs(0) + chunk) * COLUMNS
    tl.store(out + tl.arange(0, COLUMNS), tl.sum(total, 0))


@triton.jit(do_not_specialize=["num_chunks"])
def normalizers(pointers, layout, sums, scales, num_chunks, scaled: tl.constexpr, p_column: tl.constexpr):
    """What each column of a tensor is multiplied by; in place ``STEP`` what the step is."""
    tensor, particle = tl.program_id(0), tl.program_id(1).to(tl.int64)
    words = layout + tensor * tables.LAYOUT_WORDS
    first, last = tables.word(words, tables.FIRST_CHUNK), tables.word(words, tables.LAST_CHUNK)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([tables.CHUNKS_STEP, COLUMNS], tl.float32)
    for start in range(first, last, tables.CHUNKS_STEP):
        chunk = start + tl.arange(0, tables.CHUNKS_STEP)
        places = (particle * num_chunks + chunk) * COLUMNS
        total += tl.load(sums + places[:, None] + column[None, :], mask=(chunk < last)[:, None], other=0.0)
    mean = tl.sum(total, 0) / tl.load(words + tables.SIZE).to(tl.float32)
    step = tl.load(tables.pointer(pointers, tensor, tables.FACTOR, particle))
    if scaled:
        step *= tl.sqrt(tl.sum(tl.where(column == p_column, mean, 0.0), 0) + 1e-9)
    out = scales + (particle * tl.num_programs(0) + tensor) * COLUMNS
    tl.store(out + column, tl.where(column == STEP, step, tl.rsqrt(mean + NORMALIZER_EPS)))


@triton.jit
def _dense(x, weights, bias, scales, inputs: tl.constexpr, outputs: tl.constexpr, stride: tl.constexpr):
    """A layer of a few units, unrolled: a tuple of ``inputs``, each times its scale -> a tuple of ``outputs``."""
    out = ()
    for h in tl.static_range(outputs):
        out = out + (tl.zeros_like(x[0]) + tl.load(bias + h),)
    for f in tl.static_range(inputs):
        scale = tl.load(scales + f) if scales is not None else 1.0
        added = ()
        for h in tl.static_range(outputs):
            added = added + (out[h] + x[f] * (tl.load(weights + f * stride + h) * scale),)
        out = added
    return out


@triton.jit
def _rectified(x, units: tl.constexpr):
    out = ()
    for h in tl.static_range(units):
        out = out + (_relu(x[h]),)
    return out


@triton.jit
def _narrow_mlp(columns, layers, scales, hidden: tl.constexpr, inputs: tl.constexpr, outputs: tl.constexpr):
    """Direction and magnitude, with a number per place for every unit."""
    w0, b0, w1, b1, w2, b2 = layers
    x = _rectified(_dense(columns, w0, b0, scales, inputs, hidden, hidden), hidden)
    x = _rectified(_dense(x, w1, b1, None, hidden, hidden, hidden), hidden)
    return _dense(x, w2, b2, None, hidden, 2, outputs)


@triton.jit
def _wide_mlp(columns, layers, block: tl.constexpr, precision: tl.constexpr):
    """The same as products of matrices; ``layers`` as ``_wide_layers`` loads them."""
    w0, b0, w1, b1, w2_direction, w2_magnitude, direction, magnitude = layers
    x = _matrix(columns, block)
    x = _relu(tl.dot(x, w0, input_precision=precision) + b0[None, :])
    x = _relu(tl.dot(x, w1, input_precision=precision) + b1[None, :])
    direction += tl.sum(x * w2_direction[None, :], 1)
    magnitude += tl.sum(x * w2_magnitude[None, :], 1)
    return direction, magnitude


@triton.jit
def _wide_layers(
    layers, scales, hidden: tl.constexpr, padded: tl.constexpr, inputs: tl.constexpr, outputs: tl.constexpr
):
    """Weights and biases as tiles, zero beyond ``hidden``, with the normalisers folded into the first."""
    w0, b0, w1, b1, w2, b2 = layers
    column, before, after = tl.arange(0, COLUMNS), tl.arange(0, padded), tl.arange(0, padded)
    first = tl.load(
        w0 + column[:, None] * hidden + after[None, :],
        mask=(column < inputs)[:, None] & (after < hidden)[None, :],
        other=0.0,
    )
    second = tl.load(
        w1 + before[:, None] * hidden + after[None, :],
        mask=(before < hidden)[:, None] & (after < hidden)[None, :],
        other=0.0,
    )
    return (
        first * tl.load(scales + column)[:, None],
        tl.load(b0 + after, mask=after < hidden, other=0.0),
        second,
        tl.load(b1 + after, mask=after < hidden, other=0.0),
        tl.load(w2 + after * outputs, mask=after < hidden, other=0.0),
        tl.load(w2 + after * outputs + 1, mask=after < hidden, other=0.0),
        tl.load(b2),
        tl.load(b2 + 1),
    )


@triton.jit(do_not_specialize=["means_size", "num_tensors"])
def apply(
    pointers, layout, chunks, means, means_size, scales, num_tensors, clipped: tl.constexpr,
    max_gradient: tl.constexpr, diag_eps: tl.constexpr, hidden: tl.constexpr, padded: tl.constexpr,
    outputs: tl.constexpr, precision: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """p <- p - lr (step d exp(0.001 a) + weight_decay p) and the accumulators, over one chunk."""
    item = chunks + tl.program_id(0) * 2
    particle = tl.program_id(1).to(tl.int64)
    index, first = tables.word(item, 0), tables.word(item, 1)
    tensor = _tensor(pointers, layout, means, means_size, index, particle)
    size = tensor[4][0]
    end = tl.minimum(first + tables.CHUNK, size.to(tl.int32))
    scale = scales + (particle * num_tensors + index) * COLUMNS
    step = tl.load(scale + STEP)
    rates = pointers + index * tables.POINTER_WORDS + tables.RATES
    lr = tables.word(rates, 0).to(tl.float32, bitcast=True)
    weight_decay = tables.word(rates, 1).to(tl.float32, bitcast=True)
    p_out, m_out = (
        tables.pointer(pointers, index, tables.P_OUT, particle),
        tables.pointer(pointers, index, tables.M_OUT, particle),
    )
    v_out, row_out = (
        tables.pointer(pointers, index, tables.V_OUT, particle),
        tables.pointer(pointers, index, tables.ROW_OUT, particle),
    )
    layers = (
        tables.pointer(pointers, index, tables.W0, particle),
        tables.pointer(pointers, index, tables.B0, particle),
        tables.pointer(pointers, index, tables.W1, particle),
        tables.pointer(pointers, index, tables.B1, particle),
        tables.pointer(pointers, index, tables.W2, particle),
        tables.pointer(pointers, index, tables.B2, particle),
    )
    inputs: tl.constexpr = 30 if clipped else 28
    if padded > 0:
        tiles = _wide_layers(layers, scale, hidden, padded, inputs, outputs)
    for start in range(first, end, block):
        at = start + tl.arange(0, block)
        inside = at < end
        columns = _columns(tensor, at, inside, clipped, max_gradient, diag_eps)
        if padded > 0:
            direction, magnitude = _wide_mlp(columns, tiles, block, precision)
        else:
            direction, magnitude = _narrow_mlp(columns, layers, scale, hidden, inputs, outputs)
        tl.debug_barrier()  # outputs may be the inputs, and an element may have been loaded by several threads
        p = columns[2 if clipped else 1]
        moved = p - lr * (direction * tl.exp(magnitude * EXP_MULT) * step + weight_decay * p)
        tl.store(p_out + at, moved, mask=inside)
        for k in tl.static_range(3):
            tl.store(m_out + k * size + at, columns[(3 if clipped else 2) + k], mask=inside)
        tl.store(v_out + at, columns[6 if clipped else 5], mask=inside)
        if not tensor[0]:
            for k in tl.static_range(3):
                tl.store(row_out + k * size + at, columns[(15 if clipped else 13) + k], mask=inside)
