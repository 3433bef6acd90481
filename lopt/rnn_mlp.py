"""rnn_mlp_lopt: an LSTM that looks at whole tensors and an MLP that looks at single parameters, telling each other.

Owns RNNMLPLOpt of Metz et al. 2020 ("Tasks, stability, architecture, and compute: Training more effective learned
optimizers, and using them to train themselves"), 35,799 meta-parameters: per tensor an LSTM with 64 units and 52
inputs, per parameter an MLP 54-32-32-18. Never looks at horizons.

What the original does differently, and why nothing here reproduces it: it also takes validation losses, which no
contract of this library has, so that its validation loss is 0 as it is there before the first one (where the original,
compiled, computes 0 * inf = NaN); and it starts its training and validation accumulators as each other's, which are
equal at the start.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from lopt.accumulators import align, as_vector, decayed
from lopt.base import LearnedOptimizer, Params, State, Theta, ThetaEntry, ThetaSpec
from lopt.features import TIMESCALES, clipped_log, init_weights, mlp, mlp_entries, mlp_layers, moments, step
from lopt.recurrent import LSTM_JAX_NAMES, linear, lstm, lstm_entries, per_tensor, rows

DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
NUM_COLUMNS = 3 + 4 * len(DECAYS)
NUM_CONSTANTS = len(TIMESCALES) + 3
NUM_STATISTICS = 18
LSTM = 64
HIDDEN = 32
LSTM_TO_LSTM = 18
LSTM_TO_MLP = 17
MLP_TO_LSTM = 16
LOSS_DECAY = 0.9
CLIP_DECAY = 0.99
CLIP_MULT = 10.0


class RnnMlp(LearnedOptimizer):
    """p <- p - 0.001 d exp(0.001 a), (d, a, message) = MLP(23 normalised columns, 14 constants, LSTM's 17). Digest 1.4.

    Next step's LSTM hears the mean message of its tensor's parameters and the mean answer of all tensors' LSTMs.
    """

    name = "rnn_mlp_lopt"
    paper = "Metz et al. 2020, Tasks, stability, architecture, and compute ..., arXiv:2009.11243"
    needs_loss = True
    jax_names: ClassVar[dict[str, str]] = {
        **LSTM_JAX_NAMES,
        "from_lstm": "initial_from_lstm",
        "from_mlp": "initial_from_mlp",
        "to_lstm.w": "rnn_to_in_params/rnn_to_in/w",
        "to_lstm.b": "rnn_to_in_params/rnn_to_in/b",
        "to_mlp.w": "rnn_to_ff_params/rnn_to_ff/w",
        "to_mlp.b": "rnn_to_ff_params/rnn_to_ff/b",
    } | {f"mlp.{leaf}{i}": f"ffmod_params/mlp/linear_{i}/{leaf}" for i in range(3) for leaf in ("w", "b")}

    def __init__(self) -> None:
        inputs = LSTM_TO_LSTM + MLP_TO_LSTM + NUM_STATISTICS
        self.spec = ThetaSpec(
            (
                *lstm_entries(inputs, LSTM),
                ThetaEntry("from_lstm", (LSTM_TO_LSTM,)),
                ThetaEntry("from_mlp", (MLP_TO_LSTM,)),
                ThetaEntry("to_lstm.w", (LSTM, LSTM_TO_LSTM)),
                ThetaEntry("to_lstm.b", (LSTM_TO_LSTM,)),
                ThetaEntry("to_mlp.w", (LSTM, LSTM_TO_MLP)),
                ThetaEntry("to_mlp.b", (LSTM_TO_MLP,)),
                *mlp_entries(NUM_COLUMNS + NUM_CONSTANTS + LSTM_TO_MLP, HIDDEN, HIDDEN, 2 + MLP_TO_LSTM),
            )
        )

    def init_theta(self, generator: torch.Generator) -> Theta:
        """As haiku's layers; the first messages are truncated normals too, of standard deviation n^-0.5."""
        theta = init_weights(self.spec, generator)
        for name in ("from_lstm", "from_mlp"):
            sigma = len(theta[name]) ** -0.5 / 0.87962566103423978  # what is left of it behind the cut at two
            torch.nn.init.trunc_normal_(theta[name], 0.0, sigma, -2 * sigma, 2 * sigma, generator=generator)
        return theta

    def init_particles(self, theta: Theta, params: Params, num_steps: Tensor) -> State:
        zeros = torch.zeros(num_steps.shape, device=num_steps.device)
        state = {
            "iteration": torch.zeros_like(num_steps),
            "loss.mean": zeros,
            "loss.variance": zeros.clone(),
            "gradient_scale": torch.full_like(zeros, 1 - CLIP_DECAY),
            "from_lstm": theta["from_lstm"].clone(),
        }
        for name, param in params.items():
            p = as_vector(param)
            accumulator = p.new_zeros(p.shape[0], len(DECAYS), *p.shape[1:])
            state |= {f"m/{name}": accumulator, f"v/{name}": accumulator.clone()}
            state |= {f"from_mlp/{name}": theta["from_mlp"].clone()}
            state |= {f"lstm_{part}/{name}": theta[f"lstm.{part}"].clone() for part in ("hidden", "cell")}
        return state

    def update_particles(
        self, theta: Theta, state: State, params: Params, grads: Params, loss: Tensor
    ) -> tuple[Params, State]:
        loss_state, loss_features = _normalized_loss(state, loss)
        gradient_scale, clipped = _clip(state, grads)
        new_state: State = {"iteration": state["iteration"] + 1, "gradient_scale": gradient_scale, **loss_state}
        decays = torch.tensor([DECAYS], device=loss.device)
        for name, g in clipped.items():
            new_state[f"m/{name}"] = decayed(state[f"m/{name}"], g, decays)
            new_state[f"v/{name}"] = decayed(state[f"v/{name}"], g.square(), decays)

        x = _lstm_inputs(state, new_state, params, clipped, loss_features)
        hidden, cell = (rows(state, kind, params) for kind in ("lstm_hidden", "lstm_cell"))
        hidden, cell = lstm(theta["lstm.w"], theta["lstm.b"], x, hidden, cell)
        new_state["from_lstm"] = linear(hidden, theta["to_lstm.w"], theta["to_lstm.b"]).mean(1)
        new_state |= per_tensor("lstm_hidden", params, hidden) | per_tensor("lstm_cell", params, cell)
        to_mlp = linear(hidden, theta["to_mlp.w"], theta["to_mlp.b"])

        new_params: Params = {}
        for i, (name, param) in enumerate(params.items()):
            p, g, m, v = as_vector(param), clipped[name], new_state[f"m/{name}"], new_state[f"v/{name}"]
            constants = _mlp_constants(p, state["iteration"], len(params))
            weights, biases = mlp_layers(theta, torch.cat([constants, to_mlp[:, i]], dim=-1))
            out = mlp(weights, biases, _columns(p, g, m, v), p.shape)
            new_params[name] = param - step(out).reshape(param.shape)
            new_state[f"from_mlp/{name}"] = out[:, 2:].mean(-1)
        return new_params, new_state


def _normalized_loss(state: State, loss: Tensor) -> tuple[State, Tensor]:
    """The loss, and 0 in place of a validation loss, in running standard deviations from the running mean: (P, 2)."""
    mean = LOSS_DECAY * state["loss.mean"] + (1 - LOSS_DECAY) * loss
    variance = LOSS_DECAY * state["loss.variance"] + (1 - LOSS_DECAY) * (mean - loss).square()
    unbias = 1 / (1 - LOSS_DECAY ** (state["iteration"] + 1) + 1e-8)
    distance = torch.stack([loss, torch.zeros_like(loss)], dim=-1) - (mean * unbias).unsqueeze(-1)
    features = (distance * torch.rsqrt(variance * unbias + 1e-8).unsqueeze(-1)).clamp(-5, 5)
    return {"loss.mean": mean, "loss.variance": variance}, features


def _clip(state: State, grads: Params) -> tuple[Tensor, Params]:
    """Gradients cut off at ten times their running root mean square, and its accumulator (P,) after this step."""
    scale = state["gradient_scale"]
    limit = scale / (1 - CLIP_DECAY ** (state["iteration"] + 1)) * CLIP_MULT
    clipped = {}
    for name, grad in grads.items():
        g = as_vector(grad)
        clipped[name] = g.clamp(-align(limit, g), align(limit, g))
    mean_squares = torch.stack([g.square().flatten(1).mean(1) for g in clipped.values()])
    return scale * CLIP_DECAY + torch.sqrt(1e-8 + mean_squares.mean(0)) * (1 - CLIP_DECAY), clipped


def _lstm_inputs(state: State, new_state: State, params: Params, grads: Params, loss_features: Tensor) -> Tensor:
    """What the LSTM sees of every tensor, the new accumulators included: (P, T, 52), in the original's order."""
    measured = [
        _statistics(as_vector(param), grads[name], new_state[f"m/{name}"], new_state[f"v/{name}"])
        for name, param in params.items()
    ]
    statistics = torch.stack(measured, dim=1)
    norm_g, m, v, p, norm_p, *variances = clipped_log(statistics).unbind(-1)
    _, sign_m, sign_v, sign_p, *_ = torch.sign(statistics).unbind(-1)
    shapes = torch.tensor([_shape(param) for param in params.values()], device=p.device)
    is_scalar, *shape = shapes.expand(len(p), -1, -1).unbind(-1)
    losses = loss_features.unsqueeze(1).expand(*p.shape, 2).unbind(-1)
    seen = [norm_g, is_scalar, m, sign_m, v, sign_v, p, sign_p, norm_p, *shape, *losses, *variances]
    from_lstm = state["from_lstm"].unsqueeze(1).expand(-1, len(params), -1)
    return torch.cat([from_lstm, rows(state, "from_mlp", params), torch.stack(seen, dim=-1)], dim=-1)


def _statistics(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """Norm of g, means of m, v, p, norm of p, and variances of m, v, p over one tensor: (P, 8)."""
    means, variances = zip(*(moments(x) for x in (m, v, p)), strict=True)
    return torch.stack([_norm(g), *means, _norm(p), *variances], dim=-1)


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norm


def _shape(p: Tensor) -> list[float]:
    """Whether a tensor (P, *s) is a scalar (1 or -1), and the logarithms of its first four sizes, less 1."""
    sizes = [*p.shape[1:], 1, 1, 1, 1][:4]
    return [1.0 if p.ndim == 1 else -1.0, *(math.log(size) - 1 for size in sizes)]


def _mlp_constants(p: Tensor, iteration: Tensor, num_tensors: int) -> Tensor:
    """What the MLP sees that is the same for a tensor (P, *s), not normalised: time, T, norm and size, (P, 14)."""
    scales = torch.tensor(TIMESCALES, device=p.device) * math.pi
    time = torch.sin(iteration.to(torch.float32).unsqueeze(-1) / scales)
    norm = torch.log(_norm(p) + 1e-8)
    num_parameters = p[0].numel()
    counts = [torch.full_like(norm, value) for value in (math.log(num_tensors) - 1, math.log(num_parameters))]
    return torch.cat([time, torch.stack([counts[0], norm, counts[1]], dim=-1)], dim=-1)


def _columns(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> list[Tensor]:
    """What the MLP sees of every parameter, 23 columns to be normalised: p, g (P, *s), m, v (P, 5, *s)."""
    g, p, rsqrt = g.unsqueeze(1), p.unsqueeze(1), torch.rsqrt(v + 1e-6)
    return [g, p, torch.log(p.abs() + 1e-8), m, v, m * rsqrt, rsqrt]
