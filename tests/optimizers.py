"""Small trainings for the tests of ``lopt.Optimizer``, and every architecture there is, in a small size."""

import torch
from torch import nn

import lopt
from lopt.checkpoint import ARCHITECTURES

SMALL = {
    "celo": {"phase": 2},
    "velo": {"lstm_size": 8, "bank_size": 4},
    "small_fc_lopt": {"hidden_size": 4},
    "mulo": {"hidden_size": 4},
    "mlp_lopt": {"hidden_size": 8},
    "nn_adam": {"lstm_size": 4},
    "star": {"nominal_stepsize": 1e-3, "weight_decay": 1e-3},
}
"""Arguments other than the defaults, by architecture. A new one without a line here is tested as it is by default."""
VARIANTS = {
    "celo_phase1": ("celo", {"phase": 1}),
    "celo2_base": ("celo2", {"orthogonalize": False}),
    "shampoo_adam": ("shampoo", {"graft": "adam"}),
}
RULES = {name: (name, SMALL.get(name, {})) for name in ARCHITECTURES} | VARIANTS
NUM_STEPS = 50


def rule_and_theta(name):
    """An architecture or variant, and meta-parameters that make it move."""
    architecture, arguments = RULES[name]
    rule = lopt.build(architecture, **arguments)
    return rule, rule.init_theta(torch.Generator().manual_seed(0))


def make(name, params, **keywords):
    """The optimizer of that name for these parameters."""
    rule, theta = rule_and_theta(name)
    return lopt.Optimizer(params, rule, theta, **{"num_steps": NUM_STEPS} | keywords)


def problem(seed=0):
    """A small model and the loss of any model like it."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10), nn.Tanh(), nn.Linear(10, 3)
    )
    x, y = torch.randn(16, 1, 8, 8), torch.randint(3, (16,))
    return model, lambda model: nn.functional.cross_entropy(model(x), y)


def backward(model, loss_of, opt):
    """The loss of a training step, up to where the optimizer steps."""
    opt.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss


def train(model, loss_of, opt, steps):
    """Losses of the steps."""
    losses = []
    for _ in range(steps):
        loss = backward(model, loss_of, opt)
        opt.step(loss=loss)
        losses.append(loss.item())
    return losses


def with_grad(data, grad=0.3):
    """A parameter whose gradient is ``grad`` everywhere."""
    p = nn.Parameter(data)
    p.grad = torch.full_like(p, grad)
    return p


def equal(model, other, **tolerances):
    """Assert that the parameters of two models are equal, to the last bit by default."""
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **{"rtol": 0, "atol": 0} | tolerances)
