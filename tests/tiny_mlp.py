"""A 4-3-2 MLP on points drawn by key: small enough to back-propagate through its training by the hundred."""

import torch

import tasks
from tasks.random import fold, integers, normal


class Points(tasks.Dataset):
    """Two classes of points in the plane of the first two coordinates, which a line does not separate."""

    num_examples = 1 << 31

    def sample(self, keys, batch_size):
        x = normal(fold(keys, "x"), (batch_size, 4))
        noise = integers(fold(keys, "y"), 10, (batch_size,)) == 0
        return {"x": x, "y": ((x[..., 0] * x[..., 1] > 0) ^ noise).to(torch.int64)}


class TinyMlp(tasks.Task):
    """Softmax cross-entropy of a 4-3-2 tanh network on batches of 8."""

    datasets = tasks.Datasets(Points(), Points(), Points())
    batch_size = 8
    worst_loss = 5.0

    def init(self, generator, dynamic=None):
        shapes = {"w0": (4, 3), "b0": (3,), "w1": (3, 2), "b1": (2,)}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}

    def loss(self, params, batch, dynamic=None):
        hidden = torch.tanh(batch["x"] @ params["w0"] + params["b0"])
        logits = hidden @ params["w1"] + params["b1"]
        return -torch.take_along_dim(logits.log_softmax(-1), batch["y"].unsqueeze(-1), -1).mean()

    def normalizer(self, loss, dynamic=None):
        return torch.nan_to_num(loss, nan=self.worst_loss).clamp(0, self.worst_loss)
