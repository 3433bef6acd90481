"""The input columns of the per-parameter rules, written out in float64 for one tensor: slow, and hard to get wrong."""

import numpy as np

MOMENTUM = ADAFACTOR = (0.9, 0.99, 0.999)


class NaiveColumns:
    """Accumulators of one tensor; ``step`` takes a gradient and returns all columns by name, each (*s, k)."""

    def __init__(self, shape, rms_decay=0.999, rsqrt_eps=1e-6, diag_eps=1e-6):
        self.shape = tuple(shape) or (1,)
        self.rms_decay, self.rsqrt_eps, self.diag_eps = rms_decay, rsqrt_eps, diag_eps
        self.m = np.zeros((*self.shape, 3))
        self.v = np.zeros((*self.shape, 1))
        self.square = [np.zeros(self.shape) for _ in ADAFACTOR]

    def step(self, p, g):
        p, g = (np.asarray(x, np.float64).reshape(self.shape) for x in (p, g))
        self.m = self.m * MOMENTUM + (1 - np.array(MOMENTUM)) * g[..., None]
        self.v = self.v * self.rms_decay + (1 - self.rms_decay) * g[..., None] ** 2
        # means over an axis commute with the decays: keep the whole second moment and reduce it afterwards
        self.square = [d * s + (1 - d) * (g**2 + 1e-30) for d, s in zip(ADAFACTOR, self.square, strict=True)]
        rsqrt = 1 / np.sqrt(self.v + self.rsqrt_eps)
        columns = {
            "g": g[..., None],
            "clipped_g": np.clip(g, -0.1, 0.1)[..., None],
            "p": p[..., None],
            "m": self.m,
            "v": self.v,
            "m_rsqrt": self.m * rsqrt,
            "rsqrt": rsqrt,
            "g_rsqrt": g[..., None] * rsqrt,
        }
        full = np.stack(self.square, -1)
        if len(self.shape) < 2:
            rows = columns_ = full
            factor_g = 1 / np.sqrt(full + 1e-9)
            factor_m = 1 / np.sqrt(full + self.diag_eps)
        else:
            d1, d0 = np.argsort(self.shape, kind="stable")[-2:]
            rows, columns_ = full.mean(d0, keepdims=True), full.mean(d1, keepdims=True)
            mean = rows.mean(d1, keepdims=True)
            factor_g = factor_m = _safe_rsqrt(rows / (mean + 1e-9)) * _safe_rsqrt(columns_)
        wide = np.ones((*self.shape, 1))
        return columns | {
            "factored_g": g[..., None] * factor_g,
            "row": rows * wide,
            "col": columns_ * wide,
            "row_rsqrt": 1 / np.sqrt(rows + 1e-8) * wide,
            "col_rsqrt": 1 / np.sqrt(columns_ + 1e-8) * wide,
            "factored_m": self.m * factor_m,
        }


def normalised(x, axes, eps):
    """x / sqrt(mean(x^2) + eps) over ``axes``."""
    return x / np.sqrt(np.mean(x**2, axis=axes, keepdims=True) + eps)


def mlp(theta, x):
    """ReLU MLP with the weights mlp.w0, mlp.b0, ...: (*s, inputs) -> (*s, outputs)."""
    weights = [np.asarray(theta[name], np.float64) for name in sorted(theta) if name.startswith("mlp.w")]
    biases = [np.asarray(theta[name], np.float64) for name in sorted(theta) if name.startswith("mlp.b")]
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = (np.maximum(x, 0) if i else x) @ w + b
    return x


def axis_scaled(generator, shape):
    """Gradients whose scale differs between rows, columns and places, by which mistaken axes show."""
    g = generator.standard_normal(shape)
    for axis, size in enumerate(shape):
        scale = 10 ** generator.uniform(-1.5, 1.5, size)
        g = g * scale.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return g.astype(np.float32)


def _safe_rsqrt(x):
    return 1 / np.sqrt(np.maximum(x, 1e-9))
