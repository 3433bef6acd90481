"""The inner problem of the fused window on GPUs, in Triton: batches, an MLP's loss and its gradient.

Owns what one program does for one particle between two updates. Never knows the update rule. The reference is
``tasks``: ``random`` for the bits that name a batch, ``data.images`` for what is made of them, ``families.image_mlp``
for the model. Import it only where there is triton.

A matrix is rows of ``width`` numbers in global memory, which the caches hold: a particle's activations and weights are
some tens of kilobytes. Products go tile by tile, and what is beyond a matrix reads as zero, so that no size is
compiled in.
"""
# mypy: ignore-errors

import math

import triton
import triton.language as tl

from tasks import random
from worker.fused import gpu

GAMMA, MIX1, MIX2 = tl.constexpr(random._GAMMA), tl.constexpr(random._MIX1), tl.constexpr(random._MIX2)
UNIT = tl.constexpr(2.0**-32)
ANGLE = tl.constexpr(2 * math.pi * 2.0**-32)
EXAMPLES, SHIFT, NOISE = (tl.constexpr(random.tag_bits(name)) for name in ("examples", "shift", "noise"))
ROWS, COLUMNS, INNER = (tl.constexpr(size) for size in gpu.TILE)
LAYER_WORDS = tl.constexpr(len(gpu.LAYER))
INPUTS, OUTPUTS, WEIGHTS, BIASES, WEIGHTS_GRADIENT, BIASES_GRADIENT, INPUT, OUTPUT = (
    tl.constexpr(gpu.LAYER.index(name)) for name in gpu.LAYER
)


@triton.jit
def _shifted(x, bits: tl.constexpr):
    """The logical right shift."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@triton.jit
def _mix(x):
    x = (x ^ _shifted(x, 30)) * MIX1
    x = (x ^ _shifted(x, 27)) * MIX2
    return x ^ _shifted(x, 31)


@triton.jit
def fold(key, tag):
    return _mix(_mix(key + GAMMA) ^ tag)


@triton.jit
def _bits(key, at):
    """The 64 bits that the stream of ``key`` has at some places."""
    return _mix(key + (at.to(tl.int64) + 1) * GAMMA)


@triton.jit
def _integers(key, at, high):
    return (_shifted(_bits(key, at), 32) * high) >> 32


@triton.jit
def _normals(key, at):
    drawn = _bits(key, at // 2)
    radius = tl.sqrt(-2.0 * tl.log((_shifted(drawn, 32).to(tl.float32) + 0.5) * UNIT))
    angle = (drawn & 0xFFFFFFFF).to(tl.float32) * ANGLE
    return radius * tl.where(at % 2 == 0, tl.cos(angle), tl.sin(angle))


@triton.jit
def _examples(data, key, at, inside):
    """The rows of the data set that make up a batch."""
    _, _, order, first, count = data
    return tl.load(order + first + _integers(fold(key, EXAMPLES), at, count), mask=inside, other=0)


@triton.jit
def fetch(
    data, key, batch, pixels, x, side: tl.constexpr, shift: tl.constexpr, noise: tl.constexpr, whole: tl.constexpr
):
    """A batch of images as a matrix (batch, pixels); ``whole`` is the number that 1.0 is stored as."""
    images = data[0]
    for first in range(0, batch, ROWS):
        rows = first + tl.arange(0, ROWS)
        start = _examples(data, key, rows, rows < batch).to(tl.int64) * pixels
        if shift > 0:
            down = (_integers(fold(fold(key, EXAMPLES), SHIFT), 2 * rows, 2 * shift + 1) - shift).to(tl.int32)
            right = (_integers(fold(fold(key, EXAMPLES), SHIFT), 2 * rows + 1, 2 * shift + 1) - shift).to(tl.int32)
        for pixel in range(0, pixels, INNER):
            columns = pixel + tl.arange(0, INNER)
            inside = (rows < batch)[:, None] & (columns < pixels)[None, :]
            at = start[:, None] + columns[None, :]
            present = inside
            if shift > 0:
                y = (columns // side % side)[None, :] + down[:, None]
                z = (columns % side)[None, :] + right[:, None]
                present = inside & (y >= 0) & (y < side) & (z >= 0) & (z < side)
                at += down[:, None] * side + right[:, None]
            value = tl.load(images + at, mask=present, other=0).to(tl.float32)
            if whole != 1:
                value = tl.div_rn(value, tl.full(value.shape, whole, tl.float32))
            place = rows[:, None] * pixels + columns[None, :]
            if noise > 0:
                value += noise * _normals(fold(fold(key, EXAMPLES), NOISE), place)
            tl.store(x + place, value, mask=inside)


@triton.jit
def _part(x, width, rows, columns, end_row, end_column):
    """Some rows and columns of a matrix."""
    inside = (rows < end_row)[:, None] & (columns < end_column)[None, :]
    return tl.load(x + rows[:, None] * width + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _product(
    a, b, row, column, rows, columns, inner, a_turned: tl.constexpr, b_turned: tl.constexpr, precision: tl.constexpr
):
    """The tile of a b that begins at (row, column); a is stored as its transpose where it is ``turned``, so is b."""
    at_row, at_column = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, inner, INNER):
        between = first + tl.arange(0, INNER)
        if a_turned:
            left = tl.trans(_part(a, rows, between, at_row, inner, rows))
        else:
            left = _part(a, inner, at_row, between, rows, inner)
        if b_turned:
            right = tl.trans(_part(b, inner, at_column, between, columns, inner))
        else:
            right = _part(b, columns, between, at_column, inner, columns)
        total = tl.dot(left, right, total, input_precision=precision)
    inside = (at_row < rows)[:, None] & (at_column < columns)[None, :]
    return total, at_row[:, None] * columns + at_column[None, :], at_column, inside


@triton.jit
def _forward(params, scratch, layer, hidden, batch, tau, precision: tl.constexpr):
    """y = relu(tau (x w + b)), without relu in the last layer."""
    inputs, outputs = tl.load(layer + INPUTS), tl.load(layer + OUTPUTS)
    x, y = scratch + tl.load(layer + INPUT), scratch + tl.load(layer + OUTPUT)
    w, b = params + tl.load(layer + WEIGHTS), params + tl.load(layer + BIASES)
    for row in range(0, batch, ROWS):
        for column in range(0, outputs, COLUMNS):
            total, at, at_column, inside = _product(x, w, row, column, batch, outputs, inputs, False, False, precision)
            total = tau * (total + tl.load(b + at_column, mask=at_column < outputs, other=0.0)[None, :])
            tl.store(y + at, tl.where(hidden & (total < 0.0), 0.0, total), mask=inside)


@triton.jit
def _backward(params, scratch, layer, first, batch, tau, precision: tl.constexpr):
    """The layer's gradients from that of y, which lies where y was; then that of x comes to lie where x was."""
    inputs, outputs = tl.load(layer + INPUTS), tl.load(layer + OUTPUTS)
    x, y = scratch + tl.load(layer + INPUT), scratch + tl.load(layer + OUTPUT)
    w, b_gradient = params + tl.load(layer + WEIGHTS), scratch + tl.load(layer + BIASES_GRADIENT)
    w_gradient = scratch + tl.load(layer + WEIGHTS_GRADIENT)
    for row in range(0, inputs, ROWS):
        for column in range(0, outputs, COLUMNS):
            total, at, _, inside = _product(x, y, row, column, inputs, outputs, batch, True, False, precision)
            tl.store(w_gradient + at, tau * total, mask=inside)
    for column in range(0, outputs, COLUMNS):
        columns = column + tl.arange(0, COLUMNS)
        total = tl.zeros([INNER, COLUMNS], tl.float32)
        for row in range(0, batch, INNER):
            total += _part(y, outputs, row + tl.arange(0, INNER), columns, batch, outputs)
        tl.store(b_gradient + columns, tau * tl.sum(total, 0), mask=columns < outputs)
    tl.debug_barrier()  # x is overwritten only when nobody reads it any more
    if not first:
        for row in range(0, batch, ROWS):
            for column in range(0, inputs, COLUMNS):
                total, at, _, inside = _product(y, w, row, column, batch, inputs, outputs, False, True, precision)
                active = tl.load(x + at, mask=inside, other=0.0)
                tl.debug_barrier()
                tl.store(x + at, tl.where(active <= 0.0, 0.0, tau * total), mask=inside)


@triton.jit
def _cross_entropy(data, key, batch, logits, count, classes: tl.constexpr):
    """The mean loss of logits (batch, count), which its gradient replaces; ``classes`` is a power of two."""
    total = tl.zeros([ROWS], tl.float32)
    columns = tl.arange(0, classes)
    for first in range(0, batch, ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < batch)[:, None] & (columns < count)[None, :]
        at = logits + rows[:, None] * count + columns[None, :]
        z = tl.where((columns < count)[None, :], tl.load(at, mask=inside, other=0.0), float("-inf"))
        z -= tl.max(z, 1)[:, None]
        e = tl.exp(z)
        norm = tl.sum(e, 1)
        label = tl.load(data[1] + _examples(data, key, rows, rows < batch), mask=rows < batch, other=0)
        hit = columns[None, :] == label[:, None]
        total += tl.where(rows < batch, tl.log(norm) - tl.sum(tl.where(hit, z, 0.0), 1), 0.0)
        tl.debug_barrier()
        tl.store(at, (e / norm[:, None] - tl.where(hit, 1.0, 0.0)) / batch, mask=inside)
    return tl.sum(total, 0) / batch


@triton.jit
def loss_and_gradient(
    params, scratch, layers, num_layers, data, key, batch, tau, classes: tl.constexpr, precision: tl.constexpr
):
    """The loss of one particle on the batch that ``fetch`` has brought; its gradient lies in ``scratch`` afterwards.

    The model's weights are ``params`` times tau (``tasks.augmentations.reparam``).
    """
    for number in range(num_layers):
        tl.debug_barrier()
        _forward(params, scratch, layers + number * LAYER_WORDS, number + 1 < num_layers, batch, tau, precision)
    tl.debug_barrier()
    last = layers + (num_layers - 1) * LAYER_WORDS
    loss = _cross_entropy(data, key, batch, scratch + tl.load(last + OUTPUT), tl.load(last + OUTPUTS), classes)
    for number in range(num_layers):
        tl.debug_barrier()
        _backward(params, scratch, last - number * LAYER_WORDS, number + 1 == num_layers, batch, tau, precision)
    tl.debug_barrier()
    return loss
