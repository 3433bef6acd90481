"""The fused window on GPUs, in Triton: one program is one particle, for all inner steps of a truncation window.

Owns the loop over steps, resets inside it, the accumulators and the order of phases; ``triton_mlp`` is the inner
problem, and columns and network are those of the fused update (``lopt.kernels.triton_rules``). The reference is
``worker.paths``. Programs never wait for each other, so any number of particles may share a launch. Import it only
where there is triton.

Everything of a particle lies in global memory, some 100 kB in the caches; barriers separate the phases, in each of
which a number is written by one thread and read by any in the next.
"""
# ruff: noqa: RUF005
# mypy: ignore-errors

import triton
import triton.language as tl

from lopt.kernels import triton_rules as rules
from lopt.kernels import triton_tables as tables
from worker.fused import gpu, triton_mlp

PLACES = rules.COLUMNS
LINES, UNROLLED = tl.constexpr(gpu.LINES), tl.constexpr(gpu.UNROLLED)
TENSOR_WORDS = tl.constexpr(len(gpu.TENSOR))
(
    SIZE, FACTORED, P, G, M, V, ROWS_MOMENT, COLUMNS_MOMENT, NUM_ROWS, NUM_COLUMNS, ROW_IS_ROWS,
) = (tl.constexpr(gpu.TENSOR.index(name)) for name in gpu.TENSOR)  # fmt: skip


@triton.jit
def _reset(flat, size, fresh, num_params, block: tl.constexpr):
    """An episode's first parameters, and accumulators of zero."""
    for first in range(0, size, block):
        at = first + tl.arange(0, block)
        tl.store(flat + at, tl.load(fresh + at, mask=at < num_params, other=0.0), mask=at < size)


@triton.jit
def _line_means(g, moment, rows, columns, weights, axis: tl.constexpr, max_gradient: tl.constexpr):
    """Adafactor's moments after the gradient (rows, columns) whose mean squares over ``axis`` enter them."""
    if axis == 0:
        lines, along = columns, rows
    else:
        lines, along = rows, columns
    for first in range(0, lines, LINES):
        line = first + tl.arange(0, LINES)
        total = tl.zeros([LINES], tl.float32)
        for start in range(0, along, LINES):
            other = start + tl.arange(0, LINES)
            if axis == 0:
                at, inside = other[:, None] * columns + line[None, :], (other < rows)[:, None] & (line < lines)[None, :]
            else:
                at, inside = (
                    line[:, None] * columns + other[None, :],
                    (line < lines)[:, None] & (other < along)[None, :],
                )
            x = tl.load(g + at, mask=inside, other=0.0)
            if max_gradient > 0:
                x = tables.clip(x, max_gradient)
            total += tl.sum(tl.where(inside, x * x + 1e-30, 0.0), axis)
        mean = total / along
        new = ()
        for k in tl.static_range(3):
            old = tl.load(moment + k * lines + line, mask=line < lines, other=0.0)
            new = new + (tables.lerp(old, mean, weights[4 + k]),)
        tl.debug_barrier()  # a number may have been loaded by several threads
        for k in tl.static_range(3):
            tl.store(moment + k * lines + line, new[k], mask=line < lines)


@triton.jit
def _inverse_means(moment, lines, out):
    """What the rows' moments are divided by, as factors."""
    for k in tl.static_range(3):
        total = tl.zeros([LINES], tl.float32)
        for first in range(0, lines, LINES):
            line = first + tl.arange(0, LINES)
            total += tl.load(moment + k * lines + line, mask=line < lines, other=0.0)
        tl.store(out + k, 1.0 / (tl.sum(total, 0) / lines + 1e-9))


@triton.jit
def _update(
    flat, scratch, words, means, scale, scaled_w0, layers, weights, factor, block: tl.constexpr, hidden: tl.constexpr,
    padded: tl.constexpr, inputs: tl.constexpr, outputs: tl.constexpr, clipped: tl.constexpr, scaled: tl.constexpr,
    max_gradient: tl.constexpr, diag_eps: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Accumulators and parameters of one tensor after its gradient: twice over it, as ``triton_rules``.

    ``scaled_w0`` is room for the first layer with the normalisers folded in, where the network is unrolled.
    """
    size, factored = tl.load(words + SIZE), tl.load(words + FACTORED) != 0
    p, m, v = flat + tl.load(words + P), flat + tl.load(words + M), flat + tl.load(words + V)
    g = scratch + tl.load(words + G)
    of_rows, of_columns = flat + tl.load(words + ROWS_MOMENT), flat + tl.load(words + COLUMNS_MOMENT)
    rows, columns = tl.load(words + NUM_ROWS), tl.load(words + NUM_COLUMNS)
    row_is_rows = tl.load(words + ROW_IS_ROWS) != 0
    row, col = tl.where(row_is_rows, of_rows, of_columns), tl.where(row_is_rows, of_columns, of_rows)
    row_size, col_size = tl.where(row_is_rows, rows, columns), tl.where(row_is_rows, columns, rows)
    row_stride, col_stride = tl.where(row_is_rows, 1, columns), tl.where(row_is_rows, columns, 1)
    if factored:
        _line_means(g, of_rows, rows, columns, weights, 1, max_gradient)
        _line_means(g, of_columns, rows, columns, weights, 0, max_gradient)
        tl.debug_barrier()
        _inverse_means(row, row_size, means)
        tl.debug_barrier()
    axes = (col_size, row_stride, row_size, col_stride, row_size, 1)
    tensor = (factored, (p, g, m, v), (row, row, col, means), axes, (size, row_size, col_size, 1), weights)

    total = tl.zeros([block, PLACES], tl.float32)
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        x = rules._matrix(rules._columns(tensor, at, at < size, clipped, max_gradient, diag_eps), block)
        x = tl.where((at < size)[:, None], x, 0.0)
        total += x * x
    mean, place = tl.sum(total, 0) / size, tl.arange(0, PLACES)
    tl.store(scale + place, tl.rsqrt(mean + rules.NORMALIZER_EPS))
    step = factor
    if scaled:
        step *= tl.sqrt(tl.sum(tl.where(place == 2, mean, 0.0), 0) + 1e-9)
    tl.debug_barrier()

    if padded > 0:
        tiles = rules._wide_layers(layers, scale, hidden, padded, inputs, outputs)
    else:
        w0, b0, w1, b1, w2, b2 = layers
        entry = tl.arange(0, PLACES * UNROLLED)
        used = entry < inputs * hidden
        w = tl.load(w0 + entry, mask=used, other=0.0) * tl.load(scale + entry // hidden, mask=used, other=0.0)
        tl.store(scaled_w0 + entry, w, mask=used)
        layers = (scaled_w0, b0, w1, b1, w2, b2)
        tl.debug_barrier()
    for start in range(0, size, block):
        at = start + tl.arange(0, block)
        inside = at < size
        x = rules._columns(tensor, at, inside, clipped, max_gradient, diag_eps)
        if padded > 0:
            direction, magnitude = rules._wide_mlp(x, tiles, block, precision)
        else:
            direction, magnitude = rules._narrow_mlp(x, layers, None, hidden, inputs, outputs)
        tl.debug_barrier()  # an element may have been loaded by several threads
        moved = x[2 if clipped else 1] - direction * tl.exp(magnitude * rules.EXP_MULT) * step
        tl.store(p + at, moved, mask=inside)
        for k in tl.static_range(3):
            tl.store(m + k * size + at, x[(3 if clipped else 2) + k], mask=inside)
        tl.store(v + at, x[6 if clipped else 5], mask=inside)
        if not factored:
            for k in tl.static_range(3):
                tl.store(row + k * size + at, x[(15 if clipped else 13) + k], mask=inside)
    tl.debug_barrier()


SIZES = (
    "flat_size", "scratch_size", "num_layers", "num_tensors", "theta_size", "num_params", "first_example",
    "num_examples", "steps", "num_tasks", "batch", "factor",
)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def window(
    flat, flat_size, scratch, scratch_size, layers, num_layers, tensors, num_tensors,
    theta, theta_size, first_bias, begins, fresh, num_params, taus, batches, tags,
    images, labels, order, first_example, num_examples, losses, steps, num_tasks, batch, factor,
    side: tl.constexpr, shift: tl.constexpr, noise: tl.constexpr, whole: tl.constexpr, classes: tl.constexpr,
    hidden: tl.constexpr, padded: tl.constexpr, outputs: tl.constexpr, clipped: tl.constexpr, scaled: tl.constexpr,
    max_gradient: tl.constexpr, diag_eps: tl.constexpr, precision: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """All steps of one particle; see ``gpu.run`` for what the tables hold."""
    inputs: tl.constexpr = 30 if clipped else 28
    particle = tl.program_id(0).to(tl.int64)
    task = particle % num_tasks
    flat += particle * flat_size
    scratch += particle * scratch_size
    first_bias += particle * steps * hidden
    w0 = theta + particle * theta_size
    w1 = w0 + inputs * hidden
    b1 = w1 + hidden * hidden
    w2 = b1 + hidden
    b2 = w2 + hidden * outputs
    decays = b2 + outputs
    weights = (
        1.0 - tl.load(decays),
        1.0 - tl.load(decays + 1),
        1.0 - tl.load(decays + 2),
        1.0 - tables.unit(tl.load(decays + 3)),
        1.0 - tables.unit(tl.load(decays + 4)),
        1.0 - tables.unit(tl.load(decays + 5)),
        1.0 - tables.unit(tl.load(decays + 6)),
    )
    data = (images, labels, order, first_example, num_examples)
    key = tl.load(batches + task)
    pixels = tl.load(layers + triton_mlp.INPUTS)
    x = scratch + tl.load(layers + triton_mlp.INPUT)
    for step in range(steps):
        begun = tl.load(begins + step * num_tasks + task)
        if begun >= 0:
            _reset(flat, flat_size, fresh + begun * num_params, num_params, block)
        tau = tl.load(taus + step * num_tasks + task)
        step_key = triton_mlp.fold(key, tl.load(tags + step))
        triton_mlp.fetch(data, step_key, batch, pixels, x, side, shift, noise, whole)
        loss = triton_mlp.loss_and_gradient(
            flat, scratch, layers, num_layers, data, step_key, batch, tau, classes, precision
        )
        tl.store(losses + step * 2 * num_tasks + particle, loss)
        rule = (w0, first_bias + step * hidden, w1, b1, w2, b2)
        for t in range(num_tensors):
            _update(
                flat, scratch, tensors + t * TENSOR_WORDS, scratch + PLACES, scratch, scratch + 2 * PLACES, rule,
                weights, factor, block, hidden, padded, inputs, outputs, clipped, scaled, max_gradient, diag_eps,
                precision,
            )  # fmt: skip
