"""What every task promises, as checks for the tests of any family, and a library of random data of every shape."""

import dataclasses
import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from tasks.base import Dataset, Datasets
from tasks.data.catalogue import CATALOGUE, channels, num_classes
from tasks.keys import generator
from tasks.random import integers, keys
from tasks.static import static_from_dict, static_from_json

TOLERANCE = 2e-4
"""The largest difference between two ways to one gradient, as a share of the tensor's largest component."""


class _Tensors(Dataset):
    """Random rows of ``leaves``, each (num_examples, ...)."""

    def __init__(self, **leaves):
        self.leaves = leaves
        self.num_examples = len(next(iter(leaves.values())))

    def sample(self, keys, batch_size):
        index = integers(keys, self.num_examples, (batch_size,))
        return {name: leaf[index] for name, leaf in self.leaves.items()}


class RandomLibrary:
    """Stands in for tasks.data.Library: noise in the true shapes of every data set, so that nothing needs a file."""

    def __init__(self, examples=64):
        self.examples = examples

    def images(self, dataset, size, grey=False, shift=0, noise=0.0, classes=None):
        shape = (self.examples, 1 if grey else channels(dataset), size, size)
        if classes is None:
            classes = num_classes(dataset) if dataset in CATALOGUE else 10

        def split(name):
            draws = generator(dataset, size, name)
            labels = torch.randint(classes, (self.examples,), generator=draws)
            return _Tensors(image=torch.rand(shape, generator=draws), label=labels)

        return Datasets(*(split(name) for name in Datasets.SPLITS))

    def text(self, corpus, vocabulary, vocab_size, sequence_length):
        def split(name):
            draws = generator(corpus, vocabulary, name)
            tokens = torch.randint(1, vocab_size, (self.examples, sequence_length + 1), generator=draws)
            return _Tensors(obs=tokens[:, :-1], target=tokens[:, 1:])

        return Datasets(*(split(name) for name in Datasets.SPLITS))

    def missing(self, name):
        return None


class Particles(NamedTuple):
    """``count`` particles of a task, all different: leaves (count, ...)."""

    dynamic: dict
    params: dict
    batch: dict


def rows(leaves, index):
    return {name: leaf[index] for name, leaf in leaves.items()}


def make_particles(task, count=3, seed=0, split="train"):
    dynamic = task.sample_dynamic(generator(seed, "dynamic"), count)
    each = [task.init(generator(seed, "init", i), rows(dynamic, i)) for i in range(count)]
    params = {name: torch.stack([one[name] for one in each]) for name in each[0]}
    return Particles(dynamic, params, task.batch(split, keys(count, seed, "batch")))


def parameter_count(params):
    return sum(leaf.numel() for leaf in params.values())


def forward_flops(task, seed=0):
    """The flops of one particle's loss on one batch, as torch counts them."""
    dynamic, params, batch = (rows(leaves, 0) for leaves in make_particles(task, 1, seed))
    with FlopCounterMode(display=False) as counter:
        task.loss(params, batch, dynamic)
    return counter.get_total_flops()


def error(ours, theirs):
    """The largest difference of two sets of gradients, as a share of each tensor's (nearly zero ones: of all)."""
    assert ours.keys() == theirs.keys()
    largest = max(leaf.abs().max().item() for leaf in theirs.values())
    return max(
        (ours[name] - leaf).abs().max().item() / max(leaf.abs().max().item(), 1e-3 * largest, 1e-30)
        for name, leaf in theirs.items()
    )


def assert_laws(static, library, particles=3, exact_gradients=True):
    """All the checks below; gives the largest gradient error. ``exact_gradients``: they are those of ``loss``."""
    assert_round_trip(static)
    task = static.build(library)
    drawn = make_particles(task, particles)
    assert_init(task, drawn)
    assert_batches(task)
    assert_work(static, task, drawn)
    assert_normalizer(task, drawn)
    assert_isolation(task, drawn)
    return assert_gradients(task, drawn, exact_gradients)


def assert_round_trip(static):
    assert static_from_dict(static.to_dict()) == static
    assert static_from_json(static.to_json()) == static
    assert hash(static_from_json(static.to_json())) == hash(static)
    assert static.to_dict()["kind"] == static.kind
    size = static.batch_size + 1 if hasattr(static, "batch_size") else None
    if size is not None and dataclasses.fields(static):
        assert dataclasses.replace(static, batch_size=size).digest() != static.digest()


def assert_init(task, drawn):
    """float32 on the CPU, finite; a function of the generator, and of nothing else."""
    row = rows(drawn.dynamic, 0)
    first, again = task.init(generator(0, "init", 0), row), task.init(generator(0, "init", 0), row)
    other = task.init(generator(0, "init", 1), row)
    assert all(leaf.dtype == torch.float32 and leaf.device.type == "cpu" for leaf in first.values())
    assert all(leaf.isfinite().all() for leaf in first.values())
    assert all(torch.equal(leaf, again[name]) for name, leaf in first.items())
    assert any(not torch.equal(leaf, other[name]) for name, leaf in first.items())


def assert_batches(task):
    """Row i of a batch depends on key i alone, and splits are different data."""
    several = keys(3, "laws")
    batch, alone = task.batch("train", several), task.batch("train", several[1:2])
    assert all(torch.equal(leaf[1:2], alone[name]) for name, leaf in batch.items())
    assert batch["key"].shape == (3,)
    assert batch["key"].dtype == torch.int64
    assert len(set(batch["key"].tolist())) == 3
    examples = next(name for name in batch if name != "key")
    assert batch[examples].shape[:2] == (3, task.batch_size)
    for split in ("outer_valid", "test"):
        assert task.batch(split, several)[examples].shape == batch[examples].shape


def assert_work(static, task, drawn):
    work = static.work()
    assert work.parameters == parameter_count(rows(drawn.params, 0))
    assert work.flops == forward_flops(task)
    assert work.activations >= 0


def assert_normalizer(task, drawn):
    """Finite and at most ``worst_loss`` always, and that for what is not finite; never reverses an order."""
    count = len(drawn.batch["key"])
    for value in (math.nan, math.inf, -math.inf):
        out = task.normalizer(torch.full((count,), value), drawn.dynamic)
        assert out.shape == (count,)
        assert torch.equal(out, torch.full((count,), task.worst_loss)), value
    values = (-1e30, -5, 0, 1e-4, 0.5, 2, 9, 1e30)
    outs = [task.normalizer(torch.full((count,), value), drawn.dynamic) for value in values]
    assert all(out.isfinite().all() and (out <= task.worst_loss).all() for out in outs)
    assert all((low <= high).all() for low, high in pairwise(outs[2:]))  # many losses cannot be negative
    losses = task.losses(drawn.params, drawn.batch, drawn.dynamic)
    together = task.normalizer(losses, drawn.dynamic)
    alone = [task.normalizer(losses[i], rows(drawn.dynamic, i)) for i in range(count)]
    torch.testing.assert_close(together, torch.stack(alone))


def assert_isolation(task, drawn):
    """A particle that is not finite, or soon will be, leaves the others' losses and gradients bit-identical."""
    state = task.init_state(drawn.params)
    whole = task.losses_and_grads(drawn.params, state, drawn.batch, drawn.dynamic)
    for poison in (math.nan, math.inf, 1e30):
        broken = {name: leaf.clone() for name, leaf in drawn.params.items()}
        for leaf in broken.values():
            leaf[0] = poison
        poisoned = task.losses_and_grads(broken, state, drawn.batch, drawn.dynamic)
        assert not math.isnan(poison) or not poisoned.losses[0].isfinite()
        assert torch.equal(poisoned.losses[1:], whole.losses[1:])
        assert all(torch.equal(poisoned.grads[name][1:], leaf[1:]) for name, leaf in whole.grads.items())


def assert_gradients(task, drawn, exact=True):
    """Batched losses and gradients, vmap of torch.func's gradient, and a loop over the particles are all the same."""
    dynamic, params, batch = drawn
    count = len(batch["key"])
    out = task.losses_and_grads(params, task.init_state(params), batch, dynamic)
    assert out.losses.shape == (count,)
    assert out.losses.isfinite().all()
    assert not out.losses.requires_grad
    assert list(out.grads) == list(params)
    for name, leaf in out.grads.items():
        assert (leaf.shape, leaf.dtype, leaf.requires_grad) == (params[name].shape, torch.float32, False), name
    losses = task.losses(params, batch, dynamic)
    assert not losses.requires_grad
    looped, loop = [], []
    for i in range(count):
        leaves = {name: leaf.requires_grad_() for name, leaf in rows(params, i).items()}
        value = task.loss(leaves, rows(batch, i), rows(dynamic, i))
        assert value.shape == ()
        grads = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        looped.append(value.detach())
        loop.append(dict(zip(leaves, grads, strict=True)))
    theirs = {name: torch.stack([one[name] for one in loop]) for name in params}
    by_func, values = torch.func.vmap(torch.func.grad_and_value(task.loss))(params, batch, dynamic)
    worst = error(by_func, theirs)
    torch.testing.assert_close(losses, torch.stack(looped), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values, losses, rtol=1e-4, atol=1e-6)
    if exact:
        torch.testing.assert_close(out.losses, losses, rtol=1e-4, atol=1e-6)
        worst = max(worst, error(out.grads, theirs))
        assert_differentiable_twice(task, *(rows(leaves, 0) for leaves in (params, batch, dynamic)))
    assert worst < TOLERANCE
    return worst


def assert_differentiable_twice(task, params, batch, dynamic):
    """In float64, the gradient of the squared gradient is what a finite difference along it says."""
    moved = generator("laws", "moved")  # from where it started, as there a black pixel lies on the kink of a relu
    params = {name: leaf + 0.01 * torch.randn(leaf.shape, generator=moved) for name, leaf in params.items()}
    params, batch = (
        {name: leaf.double() if leaf.is_floating_point() else leaf for name, leaf in leaves.items()}
        for leaves in (params, batch)
    )

    def squared(leaves):
        grads = torch.func.grad(task.loss)(leaves, batch, dynamic)
        return sum(leaf.square().sum() for leaf in grads.values())

    second = torch.func.grad(squared)(params)
    length = math.sqrt(sum(leaf.square().sum().item() for leaf in second.values()))
    assert math.isfinite(length)
    step = 1e-9 / max(length, 1e-6)  # so short that it hardly ever crosses the kink of a relu
    up, down = ({name: leaf + sign * step * second[name] for name, leaf in params.items()} for sign in (1, -1))
    slope = (squared(up) - squared(down)).item() / (2 * step)
    assert math.isclose(slope, length**2, rel_tol=1e-3, abs_tol=1e-6), (slope, length**2)
