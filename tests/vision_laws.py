"""What the tests of the vision families share: parameters by formula, for values of the originals, and awake particles.

The numbers that the tests expect of the originals were computed in float64 with the JAX sources of
google/learned_optimization (tasks/resnet.py) and of the vision_transformer package, their parameters filled with
``wave`` under our names, and their batch as in ``as_the_original``.
"""

import torch

from tasks.keys import generator
from tests.task_laws import RandomLibrary, make_particles


def wave(shape, phase):
    """Float64 numbers of the given shape on [-0.5, 0.5], in row-major order."""
    count = torch.Size(shape).numel()
    return (0.5 * torch.cos(torch.arange(count, dtype=torch.float64) * 0.7 + phase)).reshape(shape)


def as_the_original(static):
    """(parameters, loss, length of the gradient, length of the first kernel's) where every parameter is a wave."""
    task = static.build(RandomLibrary())
    params = {name: wave(leaf.shape, sum(name.encode()) % 7) for name, leaf in task.init(generator(0)).items()}
    batch = {
        "image": 0.5 + wave((static.batch_size, static.channels, static.image_size, static.image_size), 0.1),
        "label": torch.arange(static.batch_size) % static.classes,
        "key": torch.tensor(0),
    }
    grads, loss = torch.func.grad_and_value(task.loss)(params, batch)
    first = grads["stem/w" if "stem/w" in grads else "embedding/w"]
    length = sum(leaf.square().sum() for leaf in grads.values()).sqrt()
    return sum(leaf.numel() for leaf in params.values()), loss.item(), length.item(), first.norm().item()


def awake(task, count=3, scale=0.1, split="train"):
    """Particles away from the start, where heads of zero leave every other gradient zero."""
    drawn = make_particles(task, count, split=split)
    draws = generator("awake")
    params = {name: leaf + scale * torch.randn(leaf.shape, generator=draws) for name, leaf in drawn.params.items()}
    return drawn._replace(params=params)
