"""Learned-optimizer training as a task: its loss, gradients by back-propagation, and estimates by ES and PES."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.checks import ConfigError
from tasks.augmentations.bfloat16 import Bfloat16
from tasks.augmentations.es_gradient import EsGradient
from tasks.families.draws import Pool
from tasks.families.image_conv import ImageConv
from tasks.families.image_mlp import ImageMlp
from tasks.families.lopt_training import NETWORKS, OPTIMIZERS, LoptTraining, draw
from tasks.fixed import es_wrapped, lopt, lopt_pes
from tasks.keys import generator
from tasks.random import keys
from tests.naive_columns import NaiveColumns, mlp, normalised
from tests.task_laws import (
    RandomLibrary,
    assert_batches,
    assert_gradients,
    assert_init,
    assert_normalizer,
    assert_round_trip,
    assert_work,
    error,
    make_particles,
    rows,
)

LIBRARY = RandomLibrary()
MLP = ImageMlp(image_size=4, hidden=(6,), activation="tanh", batch_size=8)
SIZES = [("sgd", 2), ("sgdm", 2), ("adam", 2), *((name, layers) for name in NETWORKS for layers in (1, 2, 3))]

SMALL_FC_COLUMNS = (
    "g", "p", "m", "v", "m_rsqrt", "rsqrt", "factored_g", "row", "col", "row_rsqrt", "col_rsqrt", "factored_m"
)  # fmt: skip


def small(optimizer, layers=2, **fields):
    sizes = {"num_steps": 4, "outer_batch": 2, "hidden_size": 5, "exp_mult": 0.1, "step_mult": 0.1, "inner": MLP}
    return LoptTraining(optimizer=optimizer, hidden_layers=layers, **sizes | fields)


def in_float64(leaves):
    return {name: leaf.double() if leaf.is_floating_point() else leaf for name, leaf in leaves.items()}


def one_particle(task, seed=0):
    """theta and batch of one particle, in float64."""
    drawn = make_particles(task, 1, seed)
    theta, batch = (in_float64(rows(part, 0)) for part in (drawn.params, drawn.batch))
    for name, leaf in theta.items():  # away from zero, where network biases start
        theta[name] = leaf + 0.05 * torch.randn(leaf.shape, generator=generator(seed, name), dtype=torch.float64)
    return theta, batch


# the loss


@pytest.mark.parametrize(
    ("optimizer", "fields", "expected"),
    [
        ("sgd", {}, 1),
        ("sgdm", {}, 2),
        ("adam", {}, 4),
        ("mlp_lopt", {"hidden_size": 32}, 19 * 32 + 32 + 32 * 32 + 32 + 32 * 2 + 2),
        ("mlp_lopt", {"hidden_size": 7, "hidden_layers": 1}, 19 * 7 + 7 + 7 * 2 + 2),
        ("small_fc", {}, 39 * 4 + 4 + 4 * 4 + 4 + 4 * 2 + 2 + 7),  # and 3 + 1 + 3 decays
        ("small_fc", {"hidden_size": 16, "hidden_layers": 4}, 39 * 16 + 16 + 3 * (16 * 16 + 16) + 16 * 2 + 2 + 7),
    ],
)
def test_theta_is_that_of_the_published_optimizer(optimizer, fields, expected):
    static = LoptTraining(optimizer=optimizer, **fields)
    theta = static.build(LIBRARY).init(generator(0))
    assert sum(leaf.numel() for leaf in theta.values()) == static.work().parameters == expected


def test_theta_starts_as_published():
    assert LoptTraining(optimizer="adam").build(LIBRARY).init(generator(0)) == {
        "learning_rate": torch.tensor(math.log(1e-3)),
        "beta1": torch.tensor(math.log(1 - 0.9)),
        "beta2": torch.tensor(math.log(1 - 0.999)),
        "eps": torch.tensor(math.log(1e-8)),
    }
    assert LoptTraining(optimizer="sgdm").build(LIBRARY).init(generator(0)) == {
        "learning_rate": torch.tensor(math.log(0.01)),
        "momentum": torch.tensor(math.log(1 - 0.9)),
    }
    assert_init(LoptTraining().build(LIBRARY), make_particles(LoptTraining().build(LIBRARY), 2))


class HandWritten:
    """The update rules once more, of one training in float64, from their published formulae."""

    def __init__(self, static, theta, params):
        self.static = static
        self.theta = {name: leaf.numpy() for name, leaf in theta.items()}
        self.naive = {name: NaiveColumns(leaf.shape) for name, leaf in params.items()}
        self.memory, self.second = dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
        self.step = 0

    def update(self, params, grads):
        self.step += 1
        rule = getattr(self, self.static.optimizer)
        return {name: torch.as_tensor(rule(name, p.numpy(), grads[name].numpy())) for name, p in params.items()}

    def sgd(self, name, p, g):
        return p - np.exp(self.theta["learning_rate"]) * g

    def sgdm(self, name, p, g):
        self.memory[name] = (1 - np.exp(self.theta["momentum"])) * self.memory[name] + g
        return p - np.exp(self.theta["learning_rate"]) * self.memory[name]

    def adam(self, name, p, g):
        b1, b2 = (1 - np.exp(self.theta[beta]) for beta in ("beta1", "beta2"))
        self.memory[name] = b1 * self.memory[name] + (1 - b1) * g
        self.second[name] = b2 * self.second[name] + (1 - b2) * g**2
        m, v = self.memory[name] / (1 - b1**self.step), self.second[name] / (1 - b2**self.step)
        return p - np.exp(self.theta["learning_rate"]) * m / (np.sqrt(v + 1e-8) + np.exp(self.theta["eps"]))

    def mlp_lopt(self, name, p, g):
        decays = np.array([0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])
        self.memory[name] = self.memory[name] * decays + (1 - decays) * g[..., None]
        return self.network(p, np.concatenate([g[..., None], p[..., None], self.memory[name]], -1))

    def small_fc(self, name, p, g):
        found = self.naive[name].step(p, g)
        return self.network(p, np.concatenate([found[column] for column in SMALL_FC_COLUMNS], -1))

    def network(self, p, columns):
        x = normalised(columns, tuple(range(p.ndim)), 1e-5)
        scales = np.array([1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5])
        time = np.broadcast_to(np.tanh((self.step - 1) / scales - 1), (*p.shape, 11))
        out = mlp(self.theta, np.concatenate([x, time], -1))
        return p - self.static.step_mult * out[..., 0] * np.exp(self.static.exp_mult * out[..., 1])


def loss_by_hand(task, static, theta, batch):
    """The mean over trainings and steps of the normalised losses, by a loop over both."""
    losses = []
    for training in range(static.outer_batch):
        params = {name[6:]: leaf[training] for name, leaf in batch.items() if name.startswith("start/")}
        rule = HandWritten(static, theta, params)
        for step in range(static.steps):
            data = {name[5:]: leaf[training, step] for name, leaf in batch.items() if name.startswith("data/")}
            leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
            loss = task.inner.loss(leaves, data)
            grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
            losses.append(min(loss.item(), task.inner.worst_loss))
            params = rule.update(params, grads)
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("optimizer", "layers"), SIZES)
def test_the_loss_is_the_mean_over_the_steps_of_trainings_by_the_published_rule(optimizer, layers):
    static = small(optimizer, layers)
    task = static.build(LIBRARY)
    theta, batch = one_particle(task)
    if optimizer == "small_fc":  # the reference has the initial decays
        theta |= {name: 0 * leaf for name, leaf in theta.items() if name.endswith("decays")}
    expected = loss_by_hand(task, static, theta, batch)
    assert task.loss(theta, batch).item() == pytest.approx(expected, rel=1e-5)
    first = loss_by_hand(task, replace(static, num_steps=1), theta, batch)
    assert abs(first - expected) > 1e-3  # the updates matter to it
    if optimizer in NETWORKS:
        for other in ({"exp_mult": 1.0}, {"step_mult": 0.2}):
            assert loss_by_hand(task, replace(static, **other), theta, batch) != pytest.approx(expected, rel=1e-4)


def test_every_training_has_its_own_start_data_and_dynamic_config():
    inner = ImageMlp(image_size=4, hidden=(6,), activation="dynamic", initializer="dynamic", batch_size=3)
    task = small("sgd", inner=inner, outer_batch=4).build(LIBRARY)
    batch = task.batch("train", keys(5, 0))
    assert batch["data/image"].shape == (5, 4, 4, 3, 1, 4, 4)
    assert batch["data/key"].shape == (5, 4, 4)
    assert batch["start/w0"].shape == (5, 4, 16, 6)
    assert batch["dynamic/initializer_scale"].shape == (5, 4)
    for name in ("data/key", "dynamic/initializer_scale"):
        assert len(batch[name].unique()) == batch[name].numel()
    assert len(batch["dynamic/activation"].unique()) > 5
    assert len({row.tobytes() for row in batch["start/w0"].flatten(0, 1).numpy()}) == 20
    again = task.batch("train", torch.cat([keys(5, 0)[2:3]] * 2))
    assert all(torch.equal(leaf[0], leaf[1]) for leaf in again.values())
    assert_batches(task)
    assert_gradients(task, make_particles(task, 2), exact=False)


# gradients


@pytest.mark.parametrize(("optimizer", "layers"), SIZES)
def test_batched_gradients_are_those_of_func_and_of_a_loop_over_the_particles(optimizer, layers):
    task = small(optimizer, layers).build(LIBRARY)
    drawn = make_particles(task, 3)
    worst = assert_gradients(task, drawn, exact=False)
    out = task.losses_and_grads(drawn.params, {}, drawn.batch, {})
    by_func, losses = torch.func.vmap(torch.func.grad_and_value(task.loss))(drawn.params, drawn.batch)
    torch.testing.assert_close(out.losses, losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(task.losses(drawn.params, drawn.batch), losses, rtol=1e-5, atol=1e-6)
    assert max(worst, error(out.grads, by_func)) < 2e-4
    assert out.state == {}


@pytest.mark.parametrize(("optimizer", "layers"), SIZES)
def test_the_gradient_is_what_finite_differences_say(optimizer, layers):
    task = small(optimizer, layers, num_steps=6).build(LIBRARY)
    theta, batch = one_particle(task)
    grads = torch.func.grad(task.loss)(theta, batch)
    batched = task.losses_and_grads(*({n: leaf[None] for n, leaf in part.items()} for part in (theta, {}, batch)))
    for name, leaf in grads.items():
        torch.testing.assert_close(batched.grads[name][0], leaf, rtol=1e-8, atol=1e-10)
    # along the gradient itself: a part that is missing makes the slope another one than its squared length
    length = math.sqrt(sum(leaf.square().sum().item() for leaf in grads.values()))
    h = 1e-6 / length
    up, down = (task.loss({n: leaf + sign * h * grads[n] for n, leaf in theta.items()}, batch) for sign in (1, -1))
    assert (up - down).item() / (2 * h) == pytest.approx(length**2, rel=1e-5)


def test_hand_designed_optimizers_keep_the_laws_of_second_derivatives_too():
    for optimizer in ("sgd", "sgdm", "adam"):
        task = small(optimizer).build(LIBRARY)
        assert_gradients(task, make_particles(task, 2))


def test_adam_has_finite_gradients_where_roots_and_logarithms_are_at_zero():
    task = small("adam", inner=replace(MLP, activation="relu")).build(LIBRARY)
    drawn = make_particles(task, 2)
    image = torch.zeros_like(drawn.batch["data/image"])  # so that the gradient of w0 is zero
    params = drawn.params | {"beta1": torch.tensor([0.5, 0.0])}  # decays that would be negative or 0
    out = task.losses_and_grads(params, {}, drawn.batch | {"data/image": image}, {})
    assert all(leaf.isfinite().all() for leaf in out.grads.values())


def test_a_particle_that_is_not_finite_leaves_the_others_alone_and_has_the_worst_loss():
    for optimizer in OPTIMIZERS:
        task = small(optimizer).build(LIBRARY)
        drawn = make_particles(task, 3)
        whole = task.losses_and_grads(drawn.params, {}, drawn.batch, {})
        broken = {name: torch.cat([leaf[:1] * math.nan, leaf[1:]]) for name, leaf in drawn.params.items()}
        out = task.losses_and_grads(broken, {}, drawn.batch, {})
        assert torch.equal(out.losses[1:], whole.losses[1:])
        assert all(torch.equal(out.grads[name][1:], leaf[1:]) for name, leaf in whole.grads.items())
        assert out.losses[0] > whole.losses[0]
        assert out.losses[0] <= task.worst_loss


def test_the_meta_loss_is_the_loss():
    task = small("sgd").build(LIBRARY)
    assert_normalizer(task, make_particles(task, 2))
    assert task.worst_loss == MLP.build(LIBRARY).worst_loss
    assert task.normalizer(torch.tensor([-3.0, 0.5])).tolist() == [-3.0, 0.5]


CONV = ImageConv(image_size=6, hidden=(4, 5), strided=1, batch_size=2, norm="batch_norm")


@pytest.mark.parametrize("inner", [MLP, replace(MLP, norm="layer_norm"), replace(MLP, hidden=()), CONV])
def test_the_work_is_what_torch_counts(inner):
    # torch counts the backward pass of two networks' convolutions at once as less than twice that of one
    fields = {"inner": inner, "outer_batch": 1 if inner is CONV else 2}
    for static in (
        *(small(optimizer, layers, num_steps=2, **fields) for optimizer, layers in SIZES),
        small("small_fc", gradient="pes", window=3, **fields),
        small("sgd", **fields | {"inner": replace(inner, hidden=(), **({"strided": 0} if inner is CONV else {}))}),
    ):
        task = static.build(LIBRARY)
        assert_work(static, task, make_particles(task, 1))


def test_bfloat16_rounds_theta_and_data_and_es_perturbs_theta():
    static = small("small_fc")
    plain, rounded = static.build(LIBRARY), Bfloat16(task=static).build(LIBRARY)
    drawn = make_particles(rounded, 2)
    out, exact = (task.losses_and_grads(drawn.params, {}, drawn.batch, {}) for task in (rounded, plain))
    torch.testing.assert_close(out.losses, exact.losses, rtol=2e-2, atol=0)
    assert not torch.equal(out.losses, exact.losses)
    assert all(leaf.dtype == torch.float32 for leaf in out.grads.values())
    estimated = EsGradient(task=small("sgd"), sigma=0.1, pairs=50).build(LIBRARY)
    drawn = make_particles(estimated, 4)
    out, exact = (task.losses_and_grads(drawn.params, {}, drawn.batch, {}) for task in (estimated, estimated.task))
    torch.testing.assert_close(out.grads["learning_rate"], exact.grads["learning_rate"], rtol=0.8, atol=0)


# ES and PES


def windows(task, count, particles, state=None, params=None):
    """``count`` steps of the task on fixed theta, each with a new batch: the outcomes, batches, last state."""
    drawn = make_particles(task, particles)
    params = drawn.params if params is None else params
    state = task.init_state(params) if state is None else state
    outs, batches = [], []
    for index in range(count):
        batches.append(task.batch("train", keys(particles, "window", index)))
        outs.append(task.losses_and_grads(params, state, batches[-1], {}))
        state = outs[-1].state
    return outs, batches, state


def in_step(task, particles):
    """A state in which all trainings are over, and none has its first, shorter episode ahead."""
    state = task.init_state(make_particles(task, particles).params)
    for name in ("step", "end"):
        state[f"lopt_training/{name}"] += task.static.num_steps
    return state


def test_windows_continue_the_trainings_to_their_end_and_then_begin_others():
    static = small("sgdm", num_steps=6, window=2, gradient="pes", sigma=1e-6)
    task, whole = static.build(LIBRARY), replace(static, gradient="backprop").build(LIBRARY)
    params = make_particles(task, 3).params
    outs, batches, _ = windows(task, 6, 3, in_step(task, 3))
    for first in (0, 3):
        own = batches[first : first + 3]
        batch = {name: torch.cat([part[name] for part in own], 2) for name in own[0] if name.startswith("data/")}
        batch |= {name: leaf for name, leaf in own[0].items() if name.startswith(("start/", "dynamic/", "key"))}
        losses = sum(out.losses for out in outs[first : first + 3]) / 3
        torch.testing.assert_close(losses, whole.losses(params, batch), rtol=1e-4, atol=0)
    assert not torch.allclose(outs[0].losses, outs[2].losses, rtol=1e-3)


def test_a_row_of_a_fresh_state_begins_anew_and_first_episodes_end_at_random():
    static = small("sgd", num_steps=20, window=1, outer_batch=16, gradient="pes", sigma=1e-6)
    task = static.build(LIBRARY)
    _, _, state = windows(task, 1, 8)
    ends = state["lopt_training/end"]
    assert ends.shape == (8, 16)
    assert len(ends.unique()) > 15
    assert (ends.min(), ends.max()) == (1, 20)
    assert 8 < ends.float().mean() < 13
    params = make_particles(task, 8).params
    fresh = task.init_state(params)
    mixed = {name: torch.cat([leaf[:1], fresh[name][1:2], leaf[2:]]) for name, leaf in state.items()}
    batch = task.batch("train", keys(8, "later"))
    out, other = (task.losses_and_grads(params, before, batch, {}) for before in (mixed, state))
    begun = task.losses_and_grads(params, fresh, batch, {})
    assert torch.equal(out.losses[1], begun.losses[1])
    assert out.losses[1] != other.losses[1]
    assert torch.equal(out.losses[2:], other.losses[2:])
    assert (out.state["lopt_training/step"][1] == 1).all()
    for _ in range(25):
        out = task.losses_and_grads(params, out.state, batch, {})
    ends = out.state["lopt_training/end"]
    assert (ends == 20).all()  # only the first episode is a shorter one


LOGISTIC = replace(MLP, hidden=(), batch_size=4)


def estimates(gradient, num_steps, window, count, outer_batch=100, particles=20):
    """Of ``count`` windows, the estimates (count, particles), every step on one batch of data; and the batches."""
    static = small(
        "sgd", gradient=gradient, num_steps=num_steps, window=window, outer_batch=outer_batch, inner=LOGISTIC
    )
    task = replace(static, sigma=0.1).build(LIBRARY)
    params = {"learning_rate": torch.full((particles,), math.log(0.2))}
    state, found, batches = in_step(task, particles), [], []
    data = {name: leaf[:1, :1, :1] for name, leaf in task.batch("train", keys(1, "data")).items() if "data/" in name}
    for index in range(count):
        batch = task.batch("train", keys(particles, "window", index))
        same = {n: data.get(n, leaf[:1, :1]).expand(leaf.shape) for n, leaf in batch.items() if n != "key"}
        out = task.losses_and_grads(params, state, {**same, "key": batch["key"]}, {})
        state = out.state
        found.append(out.grads["learning_rate"])
        batches.append({name: leaf[:1, :1] for name, leaf in same.items()} | {"key": batch["key"][:1]})
    return torch.stack(found), batches


def exact(batches, window, begins):
    """d / d theta of the mean loss over the steps of ``batches``, where trainings begin at the steps ``begins``."""
    steps, total = window * len(batches), 0.0
    for begin, end in itertools.pairwise([*begins, steps]):
        whole = small("sgd", num_steps=end - begin, outer_batch=1, inner=LOGISTIC).build(LIBRARY)
        batch = {n: torch.cat([part[n] for part in batches], 2)[:, :, begin:end] for n in batches[0] if "data/" in n}
        start = {n: leaf for n, leaf in batches[begin // window].items() if "data/" not in n}
        grads = whole.losses_and_grads({"learning_rate": torch.tensor([math.log(0.2)])}, {}, batch | start, {}).grads
        total += (end - begin) * grads["learning_rate"].item()
    return total / steps


@pytest.mark.parametrize(("num_steps", "window", "begins"), [(4, 4, [0]), (4, 2, [0]), (3, 2, [0, 3])])
def test_pes_is_unbiased_also_where_trainings_end_within_a_window(num_steps, window, begins):
    found, batches = estimates("pes", num_steps, window, {4: 4 // window, 3: 3}[num_steps])
    mean, truth = found.mean(0), exact(batches, window, begins)
    deviation = mean.std().item() / math.sqrt(len(mean))
    assert deviation < 0.05 * abs(truth)
    assert abs(mean.mean().item() - truth) < 4 * deviation + 0.03 * abs(truth)  # since sigma is not zero


def test_truncated_es_forgets_what_earlier_windows_did():
    pes, _ = estimates("pes", 6, 2, 3)
    es, _ = estimates("es", 6, 2, 3)
    torch.testing.assert_close(es[0], pes[0], rtol=1e-4, atol=1e-7)
    assert abs(es[2].mean()) < 0.7 * abs(pes[2].mean())


def test_what_pes_remembers_is_the_sum_of_the_perturbations_since_each_training_began():
    static = small("sgd", num_steps=5, window=2, outer_batch=3, gradient="pes", sigma=0.5)
    task = static.build(LIBRARY)
    outs, _, _ = windows(task, 4, 2, in_step(task, 2))
    sums = torch.stack([out.state["lopt_training/sum/learning_rate"] for out in outs])
    steps = torch.stack([out.state["lopt_training/step"][0, 0] for out in outs]).tolist()
    assert steps == [2, 4, 1, 3]
    eps = torch.cat([sums[:1], sums[1:2] - sums[:1], sums[2:3], sums[3:] - sums[2:3]])
    assert 0.3 < eps.std() < 0.8
    assert len(eps.unique()) == eps.numel() == 24


def test_a_state_goes_through_a_checkpoint_bit_for_bit_and_rows_are_particles():
    for optimizer in OPTIMIZERS:
        task = small(optimizer, num_steps=5, window=2, gradient="pes").build(LIBRARY)
        outs, batches, state = windows(task, 2, 3)
        assert all(len(leaf) == 3 for leaf in state.values())
        fresh = task.init_state(make_particles(task, 3).params)
        assert {n: (leaf.shape, leaf.dtype) for n, leaf in fresh.items()} == {
            n: (leaf.shape, leaf.dtype) for n, leaf in state.items()
        }
        params = make_particles(task, 3).params
        read = safetensors.torch.load(safetensors.torch.save({n: leaf.contiguous() for n, leaf in state.items()}))
        first, second = (task.losses_and_grads(params, before, batches[0], {}) for before in (state, read))
        assert torch.equal(first.losses, second.losses)
        assert all(torch.equal(leaf, second.grads[name]) for name, leaf in first.grads.items())
        for i in range(3):
            alone = task.losses_and_grads(
                *({n: leaf[i : i + 1] for n, leaf in part.items()} for part in (params, state, batches[0], {}))
            )
            torch.testing.assert_close(alone.losses[0], first.losses[i])
            torch.testing.assert_close(rows(alone.grads, 0), rows(first.grads, i), rtol=1e-3, atol=1e-5)
        assert first.losses.isfinite().all()
        assert not torch.equal(outs[0].losses, outs[1].losses)


# configs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adm"}, r"optimizer = 'adm'.*did you mean 'adam'"),
        ({"gradient": "nes"}, r"gradient = 'nes'"),
        ({"num_steps": 0}, r"num_steps = 0"),
        ({"step_mult": 0.0}, r"step_mult = 0.0"),
        ({"inner": LoptTraining()}, r"inner.kind = 'lopt_training': expected image_mlp or image_conv"),
        ({"inner": Bfloat16(task=MLP)}, r"inner.kind = 'bfloat16'"),
        ({"gradient": "pes", "num_steps": 5, "window": 6}, r"window = 6: expected at most num_steps = 5"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoptTraining(**fields)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_drawn_configs_are_in_range_and_the_smaller_ones_run(seed):
    static = draw(np.random.default_rng(seed), Pool(images=("digits", "cifar10")))
    assert_round_trip(static)
    assert static.gradient == "backprop"
    assert 1 <= static.num_steps <= 100
    assert 1 <= static.outer_batch <= 8
    if static.optimizer in NETWORKS:
        assert 2 <= static.hidden_size <= 512
        assert 1 <= static.hidden_layers <= 4
        assert 1e-5 <= static.exp_mult <= 1
        assert 1e-5 <= static.step_mult <= 1
    assert isinstance(static.inner, ImageMlp)
    assert static.inner.activation == "dynamic"
    if static.work().flops < 3e7 and static.num_steps <= 10:
        task = static.build(LIBRARY)
        drawn = make_particles(task, 2)
        out = task.losses_and_grads(drawn.params, {}, drawn.batch, {})
        assert out.losses.isfinite().all()
        assert (out.losses <= task.worst_loss).all()


def test_all_optimizers_are_drawn():
    rng = np.random.default_rng(0)
    drawn = [draw(rng, Pool()) for _ in range(500)]
    counts = [sum(static.optimizer == name for static in drawn) for name in OPTIMIZERS]
    assert min(counts) > 70
    for name, low, high in (("num_steps", 1, 100), ("outer_batch", 1, 8)):
        values = [getattr(static, name) for static in drawn]
        assert (min(values), max(values)) == (low, high)


def test_the_fixed_tasks_are_the_published_ones():
    assert [len(module.TASKS) for module in (lopt, lopt_pes, es_wrapped)] == [13, 10, 6]
    static = lopt.TASKS["LOpt_AdafacMLPLOpt_FashionMnist_50"]
    assert static.to_dict() | {"inner": None} == {
        "kind": "lopt_training", "optimizer": "small_fc", "num_steps": 50, "outer_batch": 1, "hidden_size": 4,
        "hidden_layers": 2, "exp_mult": 0.001, "step_mult": 0.001, "inner": None, "gradient": "backprop", "window": 10,
        "sigma": 0.01,
    }  # fmt: skip
    assert (static.inner.dataset, static.inner.image_size, static.inner.hidden) == ("fashion_mnist", 8, (32,))
    assert lopt.TASKS["LOpt_MLPLOpt_FahionMnist_100"].work().parameters == 1762
    assert lopt.TASKS["LOpt_LearnableAdam_Cifar10_8_200"].num_steps == 200
    es = lopt.TASKS["LOpt_ES4_LOpt_MLPLOpt_Cifar10_16_10"]
    assert (es.sigma, es.pairs, es.task) == (0.01, 4, lopt.TASKS["LOpt_MLPLOpt_Cifar10_16_10"])
    pes = lopt_pes.TASKS["LOptPES_Adafac_Cifar_OuterBS8_Length50_Trunc5"]
    assert (pes.outer_batch, pes.num_steps, pes.window, pes.gradient, pes.sigma) == (8, 50, 5, "pes", 0.01)
    assert (pes.inner.dataset, pes.inner.grey, pes.inner.image_size) == ("cifar10", True, 8)
    for module in (lopt, lopt_pes, es_wrapped):
        for name, config in module.TASKS.items():
            assert_round_trip(config)
            assert config.work().parameters > 0, name
    for name in ("LOpt_AdafacMLPLOpt_FashionMnist_20", "LOpt_LearnableAdam_Cifar10_8_50"):
        task = lopt.TASKS[name].build(LIBRARY)
        drawn = make_particles(task, 1)
        assert task.losses(drawn.params, drawn.batch).item() == pytest.approx(math.log(10), abs=0.4)
    task = pes.build(LIBRARY)
    (out, *_), _, _ = windows(task, 1, 1)
    assert out.losses.item() == pytest.approx(math.log(10), abs=0.4)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 100))
def test_equal_keys_give_equal_windows(seed):
    task = small("small_fc", gradient="pes", window=2).build(LIBRARY)
    drawn = make_particles(task, 1, seed)
    pair = [{n: torch.cat([leaf, leaf]) for n, leaf in part.items()} for part in (drawn.params, drawn.batch)]
    out = task.losses_and_grads(pair[0], task.init_state(pair[0]), pair[1], {})
    assert torch.equal(out.losses[0], out.losses[1])
