"""Under muP a model learns alike at every width; and muLO is small_fc_lopt with ten times the step."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import lopt
from lopt import mup
from tests.lopt_laws import particles

WIDTHS = (64, 128, 256, 512, 1024)


def mlp(width):
    return nn.Sequential(
        *(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, 10),
    )


def linear_outputs(model, x):
    outputs = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.Linear):
            outputs.append(x.detach())
    return outputs


def moves(width, seed, with_groups, steps=2):
    """RMS by which two training steps move what each linear layer returns."""
    draws, rule = torch.Generator().manual_seed(seed), lopt.MuLO()
    theta = rule.init_theta(draws)
    x, y = torch.randn(32, 16, generator=draws), torch.randint(10, (32,), generator=draws)
    model, base = mlp(width), mlp(WIDTHS[0])
    mup.init_(model, base, draws)
    mup.scale_outputs_(model, base)
    # a tenth of the step: activations move by little, so that what is seen is the step and not where it leads
    groups = mup.param_groups(model, base, lr=0.1) if with_groups else model.parameters()
    opt = lopt.Optimizer(groups, rule, theta, lr=0.1)
    before = linear_outputs(model, x)
    for _ in range(steps):
        opt.zero_grad()
        # under muP gradients shrink with the width; far above the epsilons of the rule's normalisers that is not seen
        loss = 1e4 * nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step(loss=loss)
    return [
        (new - old).square().mean().sqrt().item() for new, old in zip(linear_outputs(model, x), before, strict=True)
    ]


def exponents(with_groups):
    """k of moves ~ width^k for every layer, by least squares over the logarithms, mean over two thetas."""
    rows = torch.tensor([[moves(width, seed, with_groups) for width in WIDTHS] for seed in (0, 2)]).log().mean(0)
    x = torch.tensor(WIDTHS).log()
    x = x - x.mean()
    return ((x @ rows) / x.square().sum()).tolist()


def test_coordinate_check_updates_of_activations_have_one_size_at_all_widths_and_only_with_the_groups():
    first, second, third, output = exponents(with_groups=True)
    assert max(map(abs, (first, second, third))) < 0.1
    assert abs(output) < 0.2
    first, second, third, output = exponents(with_groups=False)
    assert abs(first) < 0.1
    assert min(second, third) > 0.6
    assert output > 0.3


class Transformer(nn.Module):
    """Every kind of parameter there is: tables, own parameters, attention, norms, an output tied to a table."""

    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.place = nn.Parameter(torch.zeros(1, 7, width))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens) + self.place
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


def test_only_weights_between_two_widths_step_less_and_only_the_output_layer_is_scaled():
    model, base = Transformer(24), Transformer(8)
    tokens = torch.arange(14).reshape(2, 7)
    before = model(tokens)
    mup.scale_outputs_(model, base)
    torch.testing.assert_close(model(tokens), before / 3)
    slow, fast = sorted(mup.param_groups(model, base, lr=0.5, weight_decay=0.1), key=lambda group: group["lr"])
    hidden = {"attention.in_proj_weight", "attention.out_proj.weight", "up.weight", "down.weight"}
    assert {name for name, _ in slow["params"]} == hidden
    assert dict(slow["params"] + fast["params"]) == dict(model.named_parameters())
    assert (slow["lr"], slow["weight_decay"]) == pytest.approx((0.5 / 3, 0.1 * 3))
    assert (fast["lr"], fast["weight_decay"]) == pytest.approx((0.5, 0.1))


def test_convolutions_are_layers_between_widths_too():
    make = lambda width: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, width, 3), nn.Conv2d(width, 2 * width, 3), nn.Flatten(), nn.Linear(2 * width * 16, 10)
    )
    model, base = make(32), make(8)
    mup.init_(model, base, torch.Generator().manual_seed(0))
    mup.scale_outputs_(model, base)
    [wide] = [group for group in mup.param_groups(model, base) if group["lr"] != 1]
    assert (wide["lr"], wide["params"]) == (0.25, [("1.weight", model[1].weight)])
    x = torch.randn(1, 2 * 32 * 16)
    torch.testing.assert_close(model[3](x), nn.functional.linear(x, model[3].weight, model[3].bias) / 4)


def test_initialisation_follows_the_table():
    def stds(width, base):
        model = mlp(width)
        mup.init_(model, base, torch.Generator().manual_seed(0))
        assert all((layer.bias == 0).all() for layer in model if isinstance(layer, nn.Linear))
        return [layer.weight.std().item() for layer in model if isinstance(layer, nn.Linear)]

    expected = lambda width: [16**-0.5, width**-0.5, width**-0.5, 64**-0.5]  # noqa: E731
    assert stds(64, mlp(64)) == pytest.approx(expected(64), rel=0.1)
    assert stds(512, mlp(64)) == pytest.approx(expected(512), rel=0.1)
    first, second = mlp(32), mlp(32)
    for model in (first, second):
        mup.init_(model, mlp(8), torch.Generator().manual_seed(1))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_a_base_of_width_one_gives_the_factors_of_the_authors_code():
    model, base = mlp(64), {name: p.shape for name, p in mlp(1).named_parameters()}
    mup.init_(model, base)
    mup.scale_outputs_(model, base)
    factors = {name: group["lr"] for group in mup.param_groups(model, base) for name, _ in group["params"]}
    assert factors == {name: 1 / 64 if name in ("2.weight", "4.weight") else 1.0 for name in factors}
    assert model[6].weight.std().item() == pytest.approx(1, rel=0.1)
    x = torch.randn(5, 64)
    torch.testing.assert_close(model[6](x), (x @ model[6].weight.T + model[6].bias) / 64)


def test_the_multiplier_survives_copies_is_set_once_and_is_no_part_of_the_weights():
    model, base = mlp(128), mlp(64)
    keys, x = list(model.state_dict()), torch.randn(3, 16)
    plain = model(x)
    for _ in range(2):
        mup.scale_outputs_(model, base)
    assert list(model.state_dict()) == keys
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(x), plain / 2)
    mup.scale_outputs_(model, mlp(32))
    torch.testing.assert_close(model(x), plain / 4)


def test_a_base_of_another_model_is_refused_with_the_parameters_name():
    model = mlp(32)
    with pytest.raises(mup.WidthError, match=r"output layer '6'.*scale_outputs_"):
        mup.param_groups(model, mlp(8))
    shapes = {name: tuple(p.shape) for name, p in mlp(8).named_parameters()}
    cases = {
        "only the model has it": {name: shape for name, shape in shapes.items() if name != "4.bias"},
        "only the base has it.*did you mean '4.bias'": shapes | {"44.bias": (8,)},
        r"'4.bias' has shape \(32,\).*\(8, 8\)": shapes | {"4.bias": (8, 8)},
        "'2.weight' has shape": shapes | {"2.weight": (0, 8)},
    }
    for message, base in cases.items():
        for call in (mup.init_, mup.scale_outputs_, mup.param_groups):
            with pytest.raises(mup.WidthError, match=message):
                call(model, base)
    with pytest.raises(mup.WidthError, match="at most two widths"):
        mup.scale_outputs_(nn.Conv2d(8, 8, 5), nn.Conv2d(4, 4, 3))


def test_mulo_is_small_fc_lopt_with_ten_times_the_step_and_32_hidden_units():
    mulo, small = lopt.MuLO(), lopt.SmallFcLopt(32)
    assert mulo.spec.size == 2409
    assert lopt.build("mulo", **mulo.arguments).spec.digest == mulo.spec.digest == small.spec.digest
    batch = particles(mulo)
    states = [rule.init_particles(batch.theta, batch.params, batch.horizons) for rule in (mulo, small)]
    one, ten = (
        rule.update_particles(batch.theta, state, batch.params, batch.grads[0], batch.losses[0])[0]
        for rule, state in zip((small, mulo), states, strict=True)
    )
    for name, p in batch.params.items():
        torch.testing.assert_close(ten[name] - p, 10 * (one[name] - p), rtol=1e-3, atol=1e-5)


def test_the_groups_lr_multiplies_mulos_step():
    width, base = 32, 8
    rule = lopt.MuLO()
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    steps = []
    for grouped in (True, False):
        torch.manual_seed(0)
        model = mlp(width)
        start = copy.deepcopy(model.state_dict())
        mup.scale_outputs_(model, mlp(base))
        opt = lopt.Optimizer(mup.param_groups(model, mlp(base)) if grouped else model.parameters(), rule, theta)
        model(torch.ones(2, 16)).square().mean().backward()
        opt.step(loss=1.0)
        steps.append({name: p - start[name] for name, p in model.state_dict().items()})
    for name, step in steps[0].items():
        factor = base / width if name in ("2.weight", "4.weight") else 1
        assert math.isclose(step.norm(), factor * steps[1][name].norm(), rel_tol=1e-3), name
