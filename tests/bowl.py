"""A task whose loss and gradient are known by hand: one example is a point, the loss its half squared distance."""

from dataclasses import dataclass

import torch

from tasks.base import Dataset, Datasets, Task
from tasks.random import normal
from tasks.static import StaticConfig, Work


class _Points(Dataset):
    num_examples = 1_000_000

    def sample(self, keys, batch_size):
        return {"point": normal(keys, (batch_size, 6))}


@dataclass(frozen=True, kw_only=True)
class Bowl(StaticConfig, kind="test_bowl"):
    """x = (a, b, c) of a (4,), b (1, 1), c (): the mean of 0.5 ``curvature`` |x - point|^2, plus 3 times x's sum."""

    batch_size: int = 5
    curvature: float = 2.0

    def build(self, library):
        return BowlTask(self)

    def work(self):
        return Work(6, 10 * self.batch_size, 6 * self.batch_size)


class BowlTask(Task):
    datasets = Datasets(_Points(), _Points(), _Points())
    worst_loss = 100.0

    def __init__(self, static):
        self.batch_size, self.curvature = static.batch_size, static.curvature

    def sample_dynamic(self, generator, n):
        return {"shift": torch.rand(n, generator=generator)}

    def init(self, generator, dynamic=None):
        values = torch.randn(6, generator=generator)
        return {"a": values[:4], "b": values[4].reshape(1, 1), "c": values[5]}

    def loss(self, params, batch, dynamic=None):
        x = torch.cat([params["a"], params["b"].flatten(), params["c"].reshape(1)])
        shift = dynamic.get("shift", 0.0) if dynamic else 0.0
        return (0.5 * self.curvature * (x - batch["point"]).square().sum(-1)).mean() + 3 * x.sum() + shift

    def normalizer(self, loss, dynamic=None):
        return torch.nan_to_num(loss, nan=100.0, posinf=100.0, neginf=100.0).clamp(-100, 100)
