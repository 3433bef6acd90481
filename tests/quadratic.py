"""A problem small enough to know the exact meta-gradient of: gradient descent on a parabola, theta = its step size."""

import torch

import lopt
import tasks
from configs.schema import FamilyConfig, TaskConfig


class Gd(lopt.LearnedOptimizer):
    """x <- x - theta * grad."""

    name = "gd"

    def __init__(self):
        self.spec = lopt.ThetaSpec((lopt.ThetaEntry("rate", (2,)), lopt.ThetaEntry("unused", (3,), frozen=True)))

    def init_theta(self, generator):
        return {"rate": torch.tensor([0.08, 0.03]), "unused": torch.ones(3)}

    def init_particles(self, theta, params, num_steps):
        return {"iteration": torch.zeros_like(num_steps)}

    def update_particles(self, theta, state, params, grads, loss):
        return {"x": params["x"] - theta["rate"] * grads["x"]}, {"iteration": state["iteration"] + 1}


class _Nothing(tasks.Dataset):
    num_examples = 1

    def sample(self, keys, batch_size):
        return {"nothing": torch.zeros(len(keys), batch_size)}


class Parabola(tasks.Task):
    datasets = tasks.Datasets(_Nothing(), _Nothing(), _Nothing())
    batch_size = 1
    worst_loss = 1e6
    curvature = torch.tensor([2.0, 5.0])

    def init(self, generator, dynamic=None):
        return {"x": torch.tensor([1.0, -1.0])}

    def loss(self, params, batch, dynamic=None):
        return 0.5 * (self.curvature * params["x"].square()).sum() + 0 * batch["nothing"].sum()

    def normalizer(self, loss, dynamic=None):
        return torch.nan_to_num(loss, nan=self.worst_loss).clamp(0, self.worst_loss)


class Static(tasks.StaticConfig):
    def build(self, library):
        return Parabola()

    def work(self):
        return None

    def to_json(self):
        return "{}"


class Parabolas:
    """A task distribution whose families are all the same parabola."""

    def __init__(self, *families, **settings):
        self.families = families
        self.config = TaskConfig(families=dict.fromkeys(families, FamilyConfig()), **settings)

    def draw(self, rng, family=None, size=1.0):
        return tasks.Draw(family or self.families[int(rng.integers(len(self.families)))], Static())

    def build(self, static):
        return static.build(None)


def exact_gradients(length):
    """d L_t / d theta for t = 0 .. length - 1, by back-propagation: (length, 2) float64."""
    theta = Gd().init_theta(None)["rate"].double().requires_grad_()
    x, rows = torch.tensor([1.0, -1.0], dtype=torch.float64), []
    for t in range(length):
        loss = 0.5 * (Parabola.curvature.double() * x.square()).sum()
        rows.append(torch.autograd.grad(loss, theta, retain_graph=True)[0] if t else torch.zeros(2).double())
        x = x - theta * Parabola.curvature.double() * x
    return torch.stack(rows)
