"""Writes hand_designed.npz: how pytorch_optimizer 4.1.0 moves parameters in fp64, for tests/test_hand_designed.py.

    pip install --no-deps pytorch_optimizer==4.1.0 && python tests/oracles/make_hand_designed.py

Holds the rules that torch lacks and that pytorch_optimizer has as published. It has not: LAMB (second moments are not
bias-corrected, |p| is clamped), LARS (leaves tensors of one axis alone). Its Shampoo leaves vectors alone and merges
axes wrongly, so that it gets only tensors of more axes and does not merge; its inverse roots are replaced by exact
ones with the ridge of distributed_shampoo. Gradients grow along the last axis; those of step 7 are zero.
"""

from pathlib import Path

import numpy as np
import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.utils import preconditioner

STEPS = (0, 1, 2, 5, 6, 7, 12, 20, 29)
GRAFTS = {"none": 0, "sgd": 1, "adagrad": 2, "rmsprop": 3, "sqrt_n": 4}
RULES = {
    "adabelief": lambda p: pytorch_optimizer.AdaBelief(p, lr=1e-2),
    "yogi": lambda p: pytorch_optimizer.Yogi(p, lr=1e-2),
    "sm3": lambda p: pytorch_optimizer.SM3(p, lr=0.1, momentum=0.9, eps=0.0),
    "fromage": lambda p: pytorch_optimizer.Fromage(p, lr=1e-2),
} | {
    f"shampoo_{graft}": lambda p, kind=kind: pytorch_optimizer.ScalableShampoo(
        p, lr=1e-2, weight_decay=0.1, start_preconditioning_step=6, preconditioning_compute_steps=1, block_size=4,
        shape_interpretation=False, graft_type=kind, use_svd=True,
    )
    for graft, kind in GRAFTS.items()
}  # fmt: skip


def inverse_root(matrix, power):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values + 1e-6 * values.amax(-1, keepdim=True)).unsqueeze(-2) ** (-1 / power)) @ vectors.mT


preconditioner.compute_power_svd = inverse_root
random = np.random.default_rng(0)
shapes = {"scalar": (), "bias": (5,), "layer/w": (6, 5), "conv": (5, 3, 2, 4)}
numbers = {f"p0/{name}": random.standard_normal(shape) for name, shape in shapes.items()}
for name, shape in shapes.items():
    g = random.standard_normal((30, *shape)) * (10.0 ** np.linspace(-2, 1, shape[-1]) if shape else 1)
    g[7] = 0
    numbers[f"g/{name}"] = g
for rule, make in RULES.items():
    names = [name for name in shapes if len(shapes[name]) > 1 or "shampoo" not in rule]
    params = [torch.nn.Parameter(torch.from_numpy(numbers[f"p0/{name}"].copy())) for name in names]
    optimizer, moved = make(params), []
    for t in range(30):
        for name, p in zip(names, params, strict=True):
            p.grad = torch.tensor(numbers[f"g/{name}"][t])
        optimizer.step()
        moved.append([p.detach().numpy().copy() for p in params])
    for i, name in enumerate(names):
        numbers[f"{rule}/{name}"] = np.stack([moved[t][i] for t in STEPS])
np.savez_compressed(Path(__file__).parent / "hand_designed.npz", steps=np.array(STEPS), **numbers)
