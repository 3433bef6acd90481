"""What every learned optimizer promises, as checks for the tests of any of them; and its oracle's numbers."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import lopt

ORACLES = Path(__file__).parent / "oracles"
SHAPES = {
    "scalar": (),
    "one": (1,),
    "bias": (5,),
    "layer/matrix": (4, 3),
    "square": (3, 3),
    "conv": (3, 2, 3, 3),
    "five": (2, 1, 3, 2, 2),
}


class Oracle:
    """One file of ``tests/oracles``: ``group("p/")`` are the entries under that prefix, without it."""

    def __init__(self, name):
        self.data = np.load(ORACLES / f"{name}.npz", allow_pickle=False)
        self.num_steps, self.losses = int(self.data["num_steps"]), torch.from_numpy(self.data["loss"])

    def group(self, prefix):
        return {key[len(prefix) :]: self.data[key] for key in self.data.files if key.startswith(prefix)}

    def theta(self, rule):
        return lopt.theta_from_jax(rule, self.group("theta/"))

    def run(self, rule, theta=None):
        """Yields (step, parameters, state) of ``rule`` after each of the oracle's steps."""
        theta = self.theta(rule) if theta is None else theta
        params = {name: torch.from_numpy(p) for name, p in self.group("p0/").items()}
        grads = {name: torch.from_numpy(g) for name, g in self.group("g/").items()}
        state = rule.init_state(theta, params, self.num_steps)
        for t, loss in enumerate(self.losses):
            params, state = rule.update(theta, state, params, {name: g[t] for name, g in grads.items()}, loss)
            yield t, params, state


class Batch(NamedTuple):
    """``count`` particles, all different: theta, parameters, horizons; ten steps of gradients and losses."""

    theta: dict
    params: dict
    horizons: torch.Tensor
    grads: list
    losses: torch.Tensor


def particles(rule, count=3, seed=0, perturbation=0.1):
    draws = torch.Generator().manual_seed(seed)
    theta = rule.init_theta(draws)
    theta = {n: leaf + perturbation * torch.randn(count, *leaf.shape, generator=draws) for n, leaf in theta.items()}
    params = {name: torch.randn(count, *shape, generator=draws) for name, shape in SHAPES.items()}
    grads = [{n: torch.randn(p.shape, generator=draws) for n, p in params.items()} for _ in range(10)]
    return Batch(theta, params, 20 * torch.arange(1, count + 1), grads, torch.rand(10, count, generator=draws) + 1)


def run(rule, batch, steps=10):
    params, state = batch.params, rule.init_particles(batch.theta, batch.params, batch.horizons)
    for g, loss in zip(batch.grads[:steps], batch.losses, strict=False):
        params, state = rule.update_particles(batch.theta, state, params, g, loss)
    return params, state


def rows(leaves, index):
    return {name: leaf[index] for name, leaf in leaves.items()}


def close(ours, theirs, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=rtol, atol=atol)


def check_particles_equal_particles_alone(rule):
    batch = particles(rule)
    params, state = run(rule, batch)
    for i, horizon in enumerate(batch.horizons.tolist()):
        theta, alone = rows(batch.theta, i), rows(batch.params, i)
        own = rule.init_state(theta, alone, horizon)
        for g, loss in zip(batch.grads, batch.losses[:, i], strict=True):
            alone, own = rule.update(theta, own, alone, rows(g, i), loss)
        close(rows(params, i), alone)
        close(rows(state, i), own)


def check_a_restarted_particle_equals_a_fresh_start(rule):
    """An engine overwrites rows of the state with those of ``init_particles``, as here the second of two."""
    batch, second = particles(rule, count=2), torch.tensor([1])
    params, state = run(rule, batch, steps=5)
    fresh = rule.init_particles(rows(batch.theta, second), rows(batch.params, second), batch.horizons[second])
    assert fresh.keys() == state.keys()
    state = {name: leaf.index_copy(0, second, fresh[name]) for name, leaf in state.items()}
    params = {name: leaf.index_copy(0, second, batch.params[name][second]) for name, leaf in params.items()}
    params, state = rule.update_particles(batch.theta, state, params, batch.grads[0], batch.losses[0])
    first_step, first_state = run(rule, batch, steps=1)
    close(rows(params, 1), rows(first_step, 1))
    close(rows(state, 1), rows(first_state, 1))
    assert all(not torch.equal(params[name][0], first_step[name][0]) for name in params)


def check_inputs_are_left_alone(rule):
    batch = particles(rule, count=2)
    given = (batch.theta, rule.init_particles(batch.theta, batch.params, batch.horizons), batch.params, batch.grads[0])
    kept = [{name: leaf.clone() for name, leaf in leaves.items()} for leaves in given]
    rule.update_particles(*given, batch.losses[0])
    for leaves, before in zip(given, kept, strict=True):
        assert all(torch.equal(leaf, before[name]) for name, leaf in leaves.items())


def check_every_leaf_leads_with_the_particles(rule):
    params, state = run(rule, particles(rule), steps=2)
    assert all(len(leaf) == 3 for leaf in (*params.values(), *state.values()))
    assert {name: tuple(p.shape[1:]) for name, p in params.items()} == SHAPES
    assert all(leaf.dtype in (torch.float32, torch.int64) for leaf in state.values())


def check_it_stays_finite(rule):
    """Gradients of all sizes, scaled along one axis, zero and huge; a loss that jumps; more steps than declared."""
    batch = particles(rule, count=2)._replace(horizons=torch.tensor([5, 50]))
    scales = {name: 10.0 ** torch.linspace(-8, 8, p.shape[-1]) for name, p in batch.params.items()}
    grads = [{name: leaf * scales[name] for name, leaf in g.items()} for g in batch.grads]
    grads[3] = {name: torch.zeros_like(leaf) for name, leaf in grads[3].items()}
    grads[4] = {name: leaf * 1e20 for name, leaf in grads[4].items()}
    losses = batch.losses * torch.tensor([1.0, 1e-6, 1e6, 1, 1, 1e9, -1, 0, 1, 1]).unsqueeze(-1)
    params, state = run(rule, batch._replace(grads=grads, losses=losses))
    assert all(leaf.isfinite().all() for leaf in (*params.values(), *state.values()))
    zero = batch._replace(params={name: torch.zeros_like(p) for name, p in batch.params.items()})
    assert all(leaf.isfinite().all() for leaf in run(rule, zero)[0].values())


LAWS = [check for name, check in list(globals().items()) if name.startswith("check_")]
