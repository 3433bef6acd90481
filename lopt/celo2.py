"""Celo2: a small MLP that chooses a direction for every matrix, orthogonalised and scaled to RMS one.

Owns the optimizer of Moudgil et al. 2026 ("Celo2: Towards learned optimization free lunch"): which tensors its MLP
updates and which Adam does, what it takes for a matrix, Newton-Schulz, and the normalisation of the step. Has no
schedule and never looks at losses or horizons: how far to go is the caller's learning rate.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from configs.checks import one_of
from lopt import chunked
from lopt.accumulators import (
    ADAFACTOR_DECAYS,
    MOMENTUM_DECAYS,
    Decays,
    Factored,
    Statistics,
    as_vector,
    decayed,
    init_accumulators,
    update_accumulators,
)
from lopt.base import Argument, LearnedOptimizer, Params, State, Theta, ThetaSpec
from lopt.features import STEP_MULT, columns, init_weights, mlp_entries
from lopt.kernels import VELO_COLUMNS

COLUMNS = VELO_COLUMNS
NUM_COLUMNS = 30
VECTOR_COLUMNS = COLUMNS[:9]
"""What there is of a tensor that is not factored: rows and columns are left out, not replaced as in Celo."""
NUM_VECTOR_COLUMNS = 15
HIDDEN = 8
MAX_GRADIENT = 1000.0
EPS = 1e-9
RSQRT_EPS = 1e-8
RMS_DECAYS = (0.95,)
ADAM_DECAYS = (0.9, 0.95)
ADAM_MULT = 20.0
MAX_ADAM_GRADIENT = 1e18
"""Squares of more would be infinite, and the parameter would never move again."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
LAYOUTS = ("torch", "jax")


class Celo2(LearnedOptimizer):
    """p <- p - 0.001 s, s = d / rms(d), d = orthogonalised MLP(30 normalised columns) of each matrix. Digest 1.9.

    ``orthogonalize=False`` is Celo2-base, whose MLP updates every tensor.

    Otherwise Adam (decays 0.9 and 0.95, not bias-corrected, 20 times the rate: as in meta-training) updates all that is
    no matrix: tensors of fewer than two dimensions, and embedding tables, which are told by their names:
    ``adam_names`` are glob patterns (of ``fnmatch``) separated by spaces, for the names that ``params`` come with.
    ``compat=True`` routes by ``adam_names`` alone, as the original does by a regular expression: a vector whose name
    does not match is then updated by the MLP, which sees 15 of its columns. The published weights do not need it: in
    their meta-training the names were those of the vectors.

    ``layout`` says what the matrices of a tensor with more than two dimensions are. ``"torch"``: one matrix, first
    dimension x all others (out x in kh kw of a convolution). ``"jax"``: one per index of the leading dimensions, the
    last two being its rows and columns (in x out at each place of a kernel in JAX's layout; also right for the stacked
    linear layers of experts). Orthogonalisation and both normalisations are per matrix.

    The rate: the published recipe is ``scale_by_celo2 -> add_decayed_weights -> scale_by_learning_rate``. Here the
    learning rate of meta-training, 0.001, belongs to the rule, so that ``Optimizer(lr=1.0)`` is as trained, like all
    others: ours is 1000 times the paper's, and an LR scheduler makes its schedule. Of ``weight_decay`` a thousandth of
    the paper's is ours (0.1 at a rate of 0.001 is 0.0001 at 1.0: both take 0.01 % in a step); it is the same for
    tensors that Adam updates, where the original's is 20 times as strong.
    """

    name = "celo2"
    paper = "Moudgil et al. 2026, Celo2: Towards learned optimization free lunch, arXiv:2602.19142"
    jax_names: ClassVar[dict[str, str | tuple[str, ...]]] = {
        "mlp.w0": tuple(f"ff_mod_stack/w0__{i}" for i in range(len(COLUMNS))),
        **{f"mlp.{leaf}": f"ff_mod_stack/{leaf}" for leaf in ("b0", "w1", "b1", "w2", "b2")},
    }

    def __init__(
        self, orthogonalize: bool = True, layout: str = "torch", adam_names: str = "*embed*", compat: bool = False
    ) -> None:
        one_of("layout", layout, LAYOUTS)
        self.orthogonalize, self.layout, self.adam_names, self.compat = orthogonalize, layout, adam_names, compat
        self.spec = ThetaSpec(mlp_entries(NUM_COLUMNS, HIDDEN, HIDDEN, 3))

    @property
    def arguments(self) -> dict[str, Argument]:
        return {
            "orthogonalize": self.orthogonalize,
            "layout": self.layout,
            "adam_names": self.adam_names,
            "compat": self.compat,
        }

    def init_theta(self, generator: torch.Generator) -> Theta:
        return init_weights(self.spec, generator)

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        state: State = {}
        for name, param in params.items():
            if self._by_adam(name, param):
                p = as_vector(param).unsqueeze(1)
                state |= {f"m/{name}": torch.zeros_like(p), f"v/{name}": torch.zeros_like(p)}
            else:
                state |= init_accumulators(name, param)
        return state

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        momentum, rms, adafactor, adam_m, adam_v = (
            torch.tensor([values], device=loss.device)
            for values in (MOMENTUM_DECAYS, RMS_DECAYS, ADAFACTOR_DECAYS, ADAM_DECAYS[:1], ADAM_DECAYS[1:])
        )
        new_params: Params = {}
        new_state: State = {}
        for name, param in params.items():
            p, g = as_vector(param), as_vector(grads[name])
            if self._by_adam(name, param):
                g = g.clamp(-MAX_ADAM_GRADIENT, MAX_ADAM_GRADIENT)
                m, v = decayed(state[f"m/{name}"], g, adam_m), decayed(state[f"v/{name}"], g.square(), adam_v)
                step = (m * torch.rsqrt(v + RSQRT_EPS)).squeeze(1) * ADAM_MULT
                new_state |= {f"m/{name}": m, f"v/{name}": v}
            else:
                step, accumulators = self._learned(theta, name, state, p, g, (momentum, rms, adafactor))
                new_state |= accumulators
            new_params[name] = param - STEP_MULT * step.reshape(param.shape)
        return new_params, new_state

    def _by_adam(self, name: str, param: Tensor) -> bool:
        """Whether Adam updates this tensor (P, *s)."""
        named = any(fnmatchcase(name, pattern) for pattern in self.adam_names.split())
        return self.orthogonalize and (named or (param.ndim < 3 and not self.compat))

    def _learned(
        self, theta: Theta, name: str, state: State, p: Tensor, g: Tensor, decays: Decays
    ) -> tuple[Tensor, State]:
        """The step (P, *s) of one tensor and its new accumulators; p, g (P, *s) with at least one dimension."""
        shape, is_matrix = p.shape, p.ndim > 2
        g = g.clamp(-MAX_GRADIENT, MAX_GRADIENT)
        accumulators, statistics = update_accumulators(name, state, g, decays)
        # the magnitude is multiplied by zero in the original and the third output unused: only the direction is left
        first = theta["mlp.w0"] if is_matrix else theta["mlp.w0"][:, :NUM_VECTOR_COLUMNS]
        weights = [first, theta["mlp.w1"], theta["mlp.w2"][..., :1]]
        biases = [theta["mlp.b0"], theta["mlp.b1"], theta["mlp.b2"][..., :1]]
        if self.layout == "jax" and p.ndim > 3:
            # every matrix is normalised by itself: make it a particle
            lead = shape[1:-2]
            weights, biases = ([x.repeat_interleave(prod(lead), dim=0) for x in xs] for xs in (weights, biases))
            p, g = (_matrices(x.unsqueeze(1), lead).squeeze(1) for x in (p, g))
            statistics = _of_matrices(statistics, lead)
        blocks = _matrix_blocks if is_matrix else _vector_blocks
        step = chunked.outputs(weights, biases, blocks, p, g, statistics, EPS).squeeze(1)
        step = step.flatten(2) if is_matrix else step.unsqueeze(1)
        if is_matrix and self.orthogonalize:
            step = newton_schulz(step)
        step = step * torch.rsqrt(step.square().mean((-2, -1), keepdim=True) + EPS)
        return step.reshape(shape), accumulators


def _matrix_blocks(p: Tensor, g: Tensor, statistics: Statistics) -> list[Tensor]:
    blocks = columns(p, g, statistics, diag_eps=0.0, rsqrt_eps=RSQRT_EPS)
    return [blocks[column] for column in COLUMNS]


def _vector_blocks(p: Tensor, g: Tensor, statistics: Statistics) -> list[Tensor]:
    return _matrix_blocks(p, g, statistics)[: len(VECTOR_COLUMNS)]


def _matrices(x: Tensor, lead: torch.Size) -> Tensor:
    """(P, k, *b), broadcastable to (P, k, *lead, r, c), as one particle per matrix: (P x prod(lead), k, ...)."""
    return x.expand(-1, -1, *lead, -1, -1).movedim(1, -3).reshape(-1, x.shape[1], *x.shape[-2:])


def _of_matrices(statistics: Statistics, lead: torch.Size) -> Statistics:
    parts = vars(statistics.factored).items()
    factored = Factored(**{name: _matrices(part, lead) for name, part in parts})
    return Statistics(_matrices(statistics.m, lead), _matrices(statistics.v, lead), factored)


def newton_schulz(x: Tensor) -> Tensor:
    """Matrices (B, r, c) with all singular values moved near one (0.7 to 1.2), by five steps of a quintic iteration.

    Source: Jordan et al. 2024, Muon; celo2_optax.py.
    """
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT).mT  # the same for less work: x xT is the smaller of the two
    a, b, c = NEWTON_SCHULZ
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-8)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
