"""What the Triton kernels are compared on with the reference, on any device.

Run as a script this does all ``CASES`` under triton's interpreter, without a GPU, and prints as JSON by how much each
differs. Needs a process of its own with ``TRITON_INTERPRET=1``: triton looks at that when it is imported.
"""

import json
from dataclasses import replace

import torch

import lopt
from lopt import kernels
from lopt.kernels import gpu
from lopt.velo import tensor_statistics

FEW = ((5, 12), (7,), (4, 3, 2, 6))
MANY = (
    (), (7,), (2100,), (7, 1), (1, 7), (1, 1, 1), (10, 10), (12, 5), (5, 12), (3, 3, 3, 8), (9, 9, 3, 3),
    (2, 5, 7, 3, 4), (4, 10, 30),
)  # fmt: skip
RULES = {
    "small_fc 4": (lambda: lopt.SmallFcLopt(4), FEW),
    "small_fc 6": (lambda: lopt.SmallFcLopt(6), FEW),
    "small_fc 12": (lambda: lopt.SmallFcLopt(12), FEW),
    "mulo 32": (lambda: lopt.MuLO(32), (*FEW, (300,))),
    "celo 1": (lambda: lopt.Celo(1), FEW),
    "celo 2": (lambda: lopt.Celo(2), FEW),
    "velo": (lambda: lopt.Velo(8, 4), MANY),
}
CASES = [
    *RULES,
    "zero gradients",
    "not contiguous",
    "not a number",
    "one decay for all",
    "in place",
    "order of tensors",
    "moments",
]
PARTICLES = 2


def axis_scaled(generator, shapes):
    """Gradients of which every axis has its own scales: what separates a row from a column."""
    grads = {}
    for t, shape in enumerate(shapes):
        g = torch.randn(PARTICLES, *shape, generator=generator) * 10.0 ** (t % 5 - 3)
        for axis, size in enumerate(shape):
            scales = torch.exp(1.5 * torch.randn(size, generator=generator))
            g = g * scales.reshape([-1] + [1] * (len(shape) - 1 - axis))
        grads[f"layer/{t}"] = g
    return grads


def step_of(rule, shapes, device, grads=None, steps=2):
    """What a step of the kernels takes, in the middle of a training: network, state, params and grads."""
    generator = torch.Generator().manual_seed(0)
    thetas = [rule.init_theta(generator) for _ in range(PARTICLES)]
    theta = {
        name: torch.stack([x[name] for x in thetas])
        + 0.1 * torch.randn(PARTICLES, *thetas[0][name].shape, generator=generator) * ("decay" not in name)
        for name in thetas[0]
    }
    params = {f"layer/{t}": torch.randn(PARTICLES, *shape, generator=generator) for t, shape in enumerate(shapes)}
    state = rule.init_particles(theta, params, torch.tensor([50, 60]))
    with kernels.reference():
        for i in range(steps):
            loss = torch.tensor([1.0, 2.0]) / (i + 1)
            params, state = rule.update_particles(theta, state, params, axis_scaled(generator, shapes), loss)
    grads = grads or axis_scaled(generator, shapes)
    theta, state, params, grads = (
        {name: x.to(device) for name, x in tree.items()} for tree in (theta, state, params, grads)
    )
    network, _ = rule.network(theta, state, params, grads, torch.tensor([0.5, 0.6], device=device))
    # steps as large as the parameters, so that rounding those does not hide an error
    return replace(network, factor=1000 * network.factor), state, params, grads


def differences(rule, step, found):
    """How far ``found`` (parameters and accumulators) is from the reference's.

    Parameters: relative to the tensor's largest step. Accumulators: relative to each entry, and for momenta to the
    gradient that went in.
    """
    network, state, params, grads = step
    expected_params, expected_state = rule._reference(network, state, params, grads)
    assert found[0].keys() == expected_params.keys()
    assert found[1].keys() == expected_state.keys()
    errors = {"params": [], "state": []}
    for name, expected in expected_params.items():
        errors["params"].append((found[0][name] - expected).abs().max() / (expected - params[name]).abs().max())
    for key, expected in expected_state.items():
        scale = expected.abs()
        if key.startswith("m/"):
            scale = scale + grads[key.removeprefix("m/")].abs().unsqueeze(1).reshape_as(expected[:, :1])
        errors["state"].append(((found[1][key] - expected).abs() / scale.clamp_min(1e-38)).max())
    return {what: float(torch.stack(found).max()) for what, found in errors.items()}


def run_case(case, device):
    """By how much the kernels differ from what the case expects, by name of what is compared."""
    if case in RULES:
        make, shapes = RULES[case]
        rule = make()
        step = step_of(rule, shapes, device)
        return differences(rule, step, gpu.update(rule, *step))
    rule = lopt.Celo(2)
    if case == "zero gradients":
        zero = {f"layer/{t}": torch.zeros(PARTICLES, *shape) for t, shape in enumerate(FEW)}
        step = step_of(rule, FEW, device, zero, steps=0)
        return differences(rule, step, gpu.update(rule, *step))
    if case == "not contiguous":
        network, *trees = step_of(rule, FEW, device)
        step = (network, *({name: across(x) for name, x in tree.items()} for tree in trees))
        return differences(rule, step, gpu.update(rule, *step)) | moment_errors(*step[1:3])
    if case == "not a number":
        network, state, params, grads = step_of(rule, FEW, device)
        grads["layer/0"][1, 2, 3] = float("nan")
        found, _ = gpu.update(rule, network, state, params, grads)
        expected, _ = rule._reference(network, state, params, grads)
        return {name: float((x.isnan() != expected[name].isnan()).sum()) for name, x in found.items()}
    if case == "one decay for all":  # decays above one half, and outside of 0..1, where they are clamped
        network, *rest = step_of(rule, FEW, device)
        decays = tuple(torch.tensor([row], device=device) for row in ((0.3, 0.99, 0.5), (1.2,), (-0.1, 1.1, 0.4)))
        step = (replace(network, decays=decays), *rest)
        return differences(rule, step, gpu.update(rule, *step))
    if case == "in place":
        return in_place(rule, device)
    if case == "order of tensors":
        network, state, params, grads = step_of(rule, FEW, device)
        forth, back = (
            gpu.update(rule, network, state, {name: params[name] for name in names}, grads)
            for names in (list(params), list(params)[::-1])
        )
        return {name: float((forth[0][name] - back[0][name]).abs().max()) for name in params}
    return moment_errors(*step_of(rule, MANY, device)[1:3])


def across(x):
    """The same numbers, with neighbours along the last axis far apart in memory."""
    return x.mT.contiguous().mT if x.ndim > 1 else x


def moment_errors(state, params):
    expected, found = tensor_statistics(state, params), gpu.moments(state, params)
    spread = expected[..., 5:].sqrt()  # a mean is as exact as the tensor is wide
    scale = torch.cat([expected[..., :1], expected[..., 1:5].abs() + spread, expected[..., 5:] + 1e-30], dim=-1)
    return {"moments": float(((found - expected).abs() / scale).max())}


def in_place(rule, device):
    """Two steps with a rate and a decay per tensor, against ``PerParameterRule.apply`` without kernels."""
    generator = torch.Generator().manual_seed(0)
    theta = rule.init_theta(generator)
    params = {name: x[0] for name, x in axis_scaled(generator, FEW).items()}
    state = rule.init_state(theta, params, 50)
    theta, params, state = ({name: x.to(device) for name, x in tree.items()} for tree in (theta, params, state))
    rates, weight_decays = [0.5, 1.0, 2.0], [0.0, 0.1, 0.01]
    ours, our_state = ({name: x.clone() for name, x in tree.items()} for tree in (params, state))
    errors = {}
    for i in range(2):
        loss = torch.tensor(1.0 / (i + 1), device=device)
        grads = {name: x[0].to(device) for name, x in axis_scaled(generator, FEW).items()}
        one = [{name: x.unsqueeze(0) for name, x in tree.items()} for tree in (theta, our_state, ours, grads)]
        network, new_state = rule.network(*one, loss.unsqueeze(0))
        before = {name: x.data_ptr() for name, x in ours.items()}
        gpu.apply(rule, network, *one[1:], rates, weight_decays)
        our_state |= {name: x.squeeze(0) for name, x in new_state.items()}
        with kernels.reference():
            state = rule.apply(theta, state, params, grads, loss, rates, weight_decays)
        assert before == {name: x.data_ptr() for name, x in ours.items()}
    for name, x in ours.items():
        errors[name] = float((x - params[name]).abs().max() / params[name].abs().max())
    for name, x in our_state.items():
        errors[name] = float((x - state[name]).abs().max() / state[name].abs().max().clamp_min(1e-30))
    return errors


def main():
    # small tensors are cut into as many pieces as large ones are
    gpu.CHUNK, gpu.COMBINED, gpu.ALONG, gpu.ACROSS = 1024, 2, (16, 4, 8), (64, 4, 4)
    gpu.ENTRIES, gpu.MEANS = (64, 2), (2, 4)
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        """As the original, which patches triton.language anew for every call of a function: most of all time."""
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    torch.set_num_threads(1)
    print(json.dumps({case: run_case(case, torch.device("cpu")) for case in CASES}))


if __name__ == "__main__":
    main()
