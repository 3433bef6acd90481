"""The update rules of ``jax_peer.py``: small_fc_lopt, both phases of Celo and VeLO-S, for one particle, in jax.numpy.

The formulae are those of ``lopt/{features,accumulators,small_fc,celo,velo,schedule,recurrent,loss_features}.py``. Owns
no task and no measurement; imports nothing of paceline, so that it cannot share a mistake with it. What varies along
one axis only enters the first layer once per row or column, time features enter its bias, and the normalisers are
folded into the weights.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = Any
Tree = dict[str, Array]

MOMENTUM, ADAFACTOR, RMS = (0.9, 0.99, 0.999), (0.9, 0.99, 0.999), (0.999,)
TIMESCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
FRACTIONS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
LSTM = 64
BANK = 32
RULES = ("small_fc/4", "small_fc/8", "small_fc/32", "celo/1", "celo/2", "velo_s")


def shapes_of_theta(rule: str) -> dict[str, tuple[int, ...]]:
    """Leaves of one particle's theta, named as in ``lopt``; what is dead there is left out."""
    kind, _, size = rule.partition("/")
    inputs, hidden, outputs = (39, int(size), 2) if kind == "small_fc" else (30, 4, 3)
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.w0": (inputs, hidden), "mlp.b0": (hidden,), "mlp.w1": (hidden, hidden), "mlp.b1": (hidden,),
        "mlp.w2": (hidden, outputs), "mlp.b2": (outputs,),
    }  # fmt: skip
    if kind == "small_fc":
        return {**shapes, "momentum_decays": (3,), "rms_decays": (1,), "adafactor_decays": (3,)}
    if rule == "celo/1":
        return shapes
    if rule == "velo_s":
        shapes = {name: (BANK, *shape) for name, shape in shapes.items()}
        shapes |= {"controls.w": (LSTM, BANK), "controls.b": (BANK,)}
    inputs = 18 if rule == "celo/2" else 30
    return shapes | {
        "mix.w": (inputs, LSTM), "mix.b": (LSTM,), "input.w": (inputs, LSTM), "input.b": (LSTM,),
        "lstm.w": (2 * LSTM, 4 * LSTM), "lstm.b": (4 * LSTM,), "lstm.hidden": (LSTM,), "lstm.cell": (LSTM,),
        "step_size.w": (LSTM, 1), "step_size.b": (1,),
    }  # fmt: skip


def axes_of(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Adafactor's two largest axes (d1, d0) of a tensor; None where there are fewer."""
    if len(shape) < 2:
        return None
    order = np.argsort(np.asarray(shape), kind="stable")
    return int(order[-2]), int(order[-1])


def init_accumulators(params: Tree) -> Tree:
    """Zeros, all of one particle: m (3, *s), v (*s), and row and col (3, *s without one axis) or diag (3, *s)."""
    state = {}
    for name, p in params.items():
        state[f"m/{name}"], state[f"v/{name}"] = jnp.zeros((3, *p.shape)), jnp.zeros(p.shape)
        axes = axes_of(p.shape)
        if axes is None:
            state[f"diag/{name}"] = jnp.zeros((3, *p.shape))
        else:
            d1, d0 = axes
            state[f"row/{name}"] = jnp.zeros((3, *np.delete(p.shape, d0)))
            state[f"col/{name}"] = jnp.zeros((3, *np.delete(p.shape, d1)))
    return state


def ema(old: Array, new: Array, decay: Array) -> Array:
    decay = decay.reshape(decay.shape + (1,) * (old.ndim - decay.ndim))
    return old * decay + new * (1 - decay)


def safe_rsqrt(x: Array) -> Array:
    return lax.rsqrt(jnp.maximum(x, 1e-9))


def columns(name: str, p: Array, g: Array, old: Tree, decays: Any, diag_eps: float) -> tuple[Tree, dict[str, list]]:
    """New accumulators, and each column block as a list of arrays that broadcast to the tensor."""
    momentum, rms, adafactor = decays
    square = jnp.square(g) + 1e-30
    m = ema(old[f"m/{name}"], g, momentum)
    v = ema(old[f"v/{name}"], jnp.square(g), jnp.clip(rms, 0, 1)[0])
    fade = jnp.clip(adafactor, 0, 1)
    axes = axes_of(p.shape)
    if axes is None:
        diag = ema(old[f"diag/{name}"], square, fade)
        new = {f"diag/{name}": diag}
        row = col = diag
        factored = [(safe_rsqrt(diag[k] + 1e-9), lax.rsqrt(diag[k] + diag_eps)) for k in range(3)]
    else:
        d1, d0 = axes
        row = ema(old[f"row/{name}"], square.mean(d0), fade)
        col = ema(old[f"col/{name}"], square.mean(d1), fade)
        new = {f"row/{name}": row, f"col/{name}": col}
        row, col = jnp.expand_dims(row, d0 + 1), jnp.expand_dims(col, d1 + 1)
        mean = row.mean(d1 + 1, keepdims=True)
        both = safe_rsqrt(row / (mean + 1e-9)) * safe_rsqrt(col)
        factored = [(both[k], both[k]) for k in range(3)]
    new |= {f"m/{name}": m, f"v/{name}": v}
    r = lax.rsqrt(v + 1e-6)
    return new, {
        "g": [g], "clipped_g": [jnp.clip(g, -0.1, 0.1)], "p": [p], "m": list(m), "v": [v],
        "m_rsqrt": [x * r for x in m], "rsqrt": [r], "factored_g": [g * f for f, _ in factored], "g_rsqrt": [g * r],
        "row": list(row), "col": list(col), "row_rsqrt": list(lax.rsqrt(row + 1e-8)),
        "col_rsqrt": list(lax.rsqrt(col + 1e-8)), "factored_m": [x * f for x, (_, f) in zip(m, factored, strict=True)],
    }  # fmt: skip


SMALL_FC = ("g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g", "row", "col", "row_rsqrt", "col_rsqrt", "factored_m")
VELO = (
    "g", "clipped_g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g", "g_rsqrt",
    "row", "col", "row_rsqrt", "col_rsqrt", "factored_m",
)  # fmt: skip


def direction(blocks: dict[str, list], names: tuple[str, ...], shape: tuple[int, ...], net: Any, how: str) -> Array:
    """d exp(0.001 a) of one tensor; ``net`` is (w0, b0, w1, b1, w2, b2)."""
    w0, b0, w1, b1, w2, b2 = net
    flat = [column for name in names for column in blocks[name]]
    scaled = [lax.rsqrt(jnp.mean(jnp.square(column)) + 1e-5) * w0[i] for i, column in enumerate(flat)]
    full = [i for i, column in enumerate(flat) if column.shape == shape]
    lines = [i for i, column in enumerate(flat) if column.shape != shape]
    hidden = len(b0)
    if how == "dot":
        x = jnp.stack([flat[i].reshape(-1) for i in full])
        first = jnp.stack([scaled[i] for i in full])
        h = (first.T @ x).reshape(hidden, *shape)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in lines:
            groups.setdefault(flat[i].shape, []).append(i)
        for inner, members in groups.items():
            x = jnp.stack([flat[i].reshape(-1) for i in members])
            h += (jnp.stack([scaled[i] for i in members]).T @ x).reshape(hidden, *inner)
        h = jax.nn.relu(h.reshape(hidden, -1) + b0[:, None])
        h = jax.nn.relu(w1.T @ h + b1[:, None])
        out = w2[:, :2].T @ h + b2[:2, None]
        return (out[0] * jnp.exp(out[1] * 0.001)).reshape(shape)
    groups = {}
    for i in lines:
        groups.setdefault(flat[i].shape, []).append(i)
    hs = []
    for j in range(hidden):
        h = b0[j]
        for members in (*groups.values(), full):
            h = h + sum(scaled[i][j] * flat[i] for i in members)
        hs.append(jax.nn.relu(h))
    hs = [jax.nn.relu(b1[j] + sum(w1[i, j] * hs[i] for i in range(hidden))) for j in range(hidden)]
    d, a = (b2[j] + sum(w2[i, j] * hs[i] for i in range(hidden)) for j in range(2))
    return d * jnp.exp(a * 0.001)


def fraction_features(t: Array, horizon: Array) -> Array:
    return jnp.tanh((t / horizon - jnp.array(FRACTIONS)) * 10)


def init_losses(horizon: Array) -> Tree:
    halflife = 10 ** (1 + jnp.linspace(0, 1, 10) * (jnp.log10(horizon) - 1))
    return {
        "loss.decays": jnp.exp(-1 / halflife), "loss.means": jnp.zeros(10),
        "loss.lowest": jnp.full(10, 999999999999.0),
    }  # fmt: skip


def update_losses(state: Tree, t: Array, loss: Array) -> tuple[Tree, Array]:
    """The buffer after the loss of step ``t`` (from 0), and its nine features."""
    decays, means = state["loss.decays"], state["loss.means"]
    unbias = 1 - decays ** (t + 1)
    largest = jnp.where(t == 0, loss, jnp.max(means / unbias))
    loss = jnp.minimum(2 * jnp.abs(largest), loss)
    means = means * decays + loss * (1 - decays)
    now = means / unbias
    lowest = jnp.minimum(state["loss.lowest"], now)
    position = (now[:-1] - lowest[:-1]) / jnp.maximum(now[1:] - lowest[:-1], 1e-8)
    features = jnp.where(t + 1 <= 2, 0.0, jnp.clip(position - 1, -1, 1))
    return {"loss.decays": decays, "loss.means": means, "loss.lowest": lowest}, features


def advance(theta: Tree, x: Array, hidden: Array, cell: Array) -> tuple[Array, Array, Array]:
    """One LSTM step of rows x (N, n), hidden and cell (N, H)."""
    mixed = jax.nn.relu(x @ theta["mix.w"] + theta["mix.b"]).max(0, keepdims=True)
    x = x @ theta["input.w"] + theta["input.b"] + mixed
    i, g, f, o = jnp.split(jnp.concatenate([x, hidden], -1) @ theta["lstm.w"] + theta["lstm.b"], 4, -1)
    cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
    hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
    return hidden, cell, (hidden @ theta["step_size.w"] + theta["step_size.b"])[:, 0]


def init_state(rule: str, theta: Tree, params: Tree, horizon: Array) -> Tree:
    """One particle's state before the first step."""
    state = {"t": jnp.zeros(()), **init_accumulators(params)}
    if rule in ("celo/2", "velo_s"):
        rows = 1 if rule == "celo/2" else len(params)
        state |= {"horizon": horizon, **init_losses(horizon)}
        state |= {name: jnp.broadcast_to(theta[f"lstm.{name}"], (rows, LSTM)) for name in ("hidden", "cell")}
    return state


NET = ("mlp.w0", "mlp.b0", "mlp.w1", "mlp.b1", "mlp.w2", "mlp.b2")


def update(rule: str, how: str, theta: Tree, state: Tree, params: Tree, grads: Tree, loss: Array) -> tuple[Tree, Tree]:
    """One step of one particle, of any parameters."""
    t = state["t"]
    new: Tree = {"t": t + 1}
    if rule.startswith("small_fc"):
        start = {"momentum_decays": MOMENTUM, "rms_decays": RMS, "adafactor_decays": ADAFACTOR}
        decays = [1 - jnp.exp((jnp.log(1 - jnp.array(d)) / 10 + theta[name]) * 10) for name, d in start.items()]
        time_features = jnp.tanh(t / jnp.array(TIMESCALES) - 1)
        bias = theta["mlp.b0"] + time_features @ theta["mlp.w0"][28:]
        nets = [(theta["mlp.w0"], bias, *(theta[name] for name in NET[2:]))] * len(params)
        factors, names, diag_eps = [0.001] * len(params), SMALL_FC, 1e-6
    else:
        grads = {name: jnp.clip(g, -1000, 1000) for name, g in grads.items()}
        decays = [jnp.array(d) for d in (MOMENTUM, RMS, ADAFACTOR)]
        rms = [jnp.sqrt(jnp.mean(jnp.square(p)) + 1e-9) for p in params.values()]
        nets = [tuple(theta[name] for name in NET)] * len(params)
        lrs: Any = [1.0] * len(params)
        if rule != "celo/1":
            losses, features = update_losses(state, t, loss)
            x = jnp.concatenate([fraction_features(t, state["horizon"]), features])[None]
            if rule == "velo_s":
                x = velo_inputs(x, state, params)
            hidden, cell, step_size = advance(theta, x, state["hidden"], state["cell"])
            new |= {**losses, "horizon": state["horizon"], "hidden": hidden, "cell": cell}
            if rule == "velo_s":
                controls = (hidden @ theta["controls.w"] + theta["controls.b"]) * (100.0 / BANK)
                bank = jnp.concatenate([theta[name].reshape(BANK, -1) for name in NET], -1)
                nets = [unpacked(mixed) for mixed in controls @ bank]
                lrs = list(step_size)
            else:
                lrs = [jnp.exp(step_size[0]) * 0.1] * len(params)
        factors, names, diag_eps = [0.001 * lr * r for lr, r in zip(lrs, rms, strict=True)], VELO, 0.0
    moved = {}
    for (name, p), net, factor in zip(params.items(), nets, factors, strict=True):
        accumulators, blocks = columns(name, p, grads[name], state, decays, diag_eps)
        new |= accumulators
        moved[name] = p - factor * direction(blocks, names, p.shape, net, how)
    return moved, new


def unpacked(flat: Array) -> tuple[Array, ...]:
    """One MLP of VeLO's bank from its numbers in a row."""
    sizes = [(30, 4), (4,), (4, 4), (4,), (4, 3), (3,)]
    parts = jnp.split(flat, np.cumsum([int(np.prod(size)) for size in sizes])[:-1])
    return tuple(part.reshape(size) for part, size in zip(parts, sizes, strict=True))


def velo_inputs(time_inputs: Array, state: Tree, params: Tree) -> Array:
    """What VeLO's LSTM sees of every tensor: (T, 30)."""

    def magnitude(x: Array) -> Array:
        return jnp.clip(jnp.log(jnp.abs(10 * x) + 1e-8), -5, 5) * 0.5

    rows = []
    for name, p in params.items():
        m, v = state[f"m/{name}"].reshape(3, -1), state[f"v/{name}"].reshape(-1)
        scale = safe_rsqrt(jnp.mean(jnp.square(p)))
        rank = jnp.array([float(sum(n > 1 for n in p.shape) == k) for k in range(5)])
        blocks = [magnitude(v.mean() * scale)[None], rank, magnitude(m.var(1) * scale**2)]
        rows.append(jnp.concatenate([time_inputs[0], *blocks, jnp.repeat(magnitude(v.var() * scale**2), 3)]))
    return jnp.stack(rows)
