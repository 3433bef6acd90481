"""Hand-designed rules move parameters as torch.optim, pytorch_optimizer and the papers do, one particle or many."""

import inspect
from functools import partial

import numpy as np
import pytest
import torch

import lopt
from lopt.hand_designed import HAND_DESIGNED
from lopt.hand_designed.matrix import merged
from tests.lopt_laws import LAWS, ORACLES, check_it_stays_finite, close, particles, rows, run

NAMES = [kind.name for kind in HAND_DESIGNED]
SHAPES = {
    "scalar": (),
    "bias": (5,),
    "layer/w": (6, 4),
    "cube": (3, 2, 4),
    "conv": (4, 3, 2, 2),
    "five": (2, 1, 3, 2, 2),
}
STEPS = 30


@pytest.fixture
def fp64():
    """Differences that rounding would hide are then visible."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def problem(shapes=SHAPES, seed=0):
    """Parameters, and the gradient of a badly scaled quadratic plus noise at every step; zero at step 7."""
    draws = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draws)
    params = {name: normal(*shape) if shape else normal(()) for name, shape in shapes.items()}
    scales = {name: torch.logspace(-2, 1, p.shape[-1]) if p.ndim else torch.tensor(1.0) for name, p in params.items()}
    noise = [{name: normal(p.shape) for name, p in params.items()} for _ in range(STEPS)]

    def grads(t, params):
        return {name: (t != 7) * scales[name] * (p + noise[t][name]) for name, p in params.items()}

    return params, grads


def trajectory(rule, theta, params, grads, num_steps=STEPS):
    theta = {name: torch.as_tensor(value, dtype=torch.get_default_dtype()) for name, value in theta.items()}
    state = rule.init_state(theta, params, num_steps)
    for t in range(STEPS):
        params, state = rule.update(theta, state, params, grads(t, params), torch.tensor(0.0))
        yield params


def textbook(rule):
    return {h.name: h.default for h in rule.hyperparameters}


TORCH = {
    "sgd": ("sgd", {}, torch.optim.SGD, {"lr": 0.01}),
    "sgdm": ("sgdm", {"momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8, "lr": 0.01}),
    "nesterov": (
        partial(lopt.build, "sgdm", nesterov=True), {"learning_rate": 0.02},
        torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "lr": 0.02},
    ),
    "adam": ("adam", {"beta1": 0.8, "eps": 0.1}, torch.optim.Adam, {"betas": (0.8, 0.999), "eps": 0.1}),
    "adamw": ("adamw", {"weight_decay": 0.3}, torch.optim.AdamW, {"weight_decay": 0.3}),
    "radam": ("radam", {"learning_rate": 0.01, "beta2": 0.98}, torch.optim.RAdam, {"lr": 0.01, "betas": (0.9, 0.98)}),
    "rmsprop": ("rmsprop", {}, torch.optim.RMSprop, {}),
    "rmsprop with momentum": ("rmsprop", {"momentum": 0.9}, torch.optim.RMSprop, {"momentum": 0.9}),
    "adagrad": ("adagrad", {"initial_accumulator": 0.1}, torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "adafactor": (
        "adafactor", {"learning_rate": 0.3, "clipping_threshold": 1.2}, torch.optim.Adafactor,
        {"lr": 0.3, "d": 1.2, "eps": (torch.finfo(torch.float32).eps, 1e-3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "theta", "original", "keywords"), TORCH.values(), ids=TORCH)
def test_thirty_steps_equal_torchs_on_tensors_of_every_rank(fp64, name, theta, original, keywords):
    rule = name() if callable(name) else lopt.build(name)
    params, grads = problem()
    theirs = {key: torch.nn.Parameter(p.clone()) for key, p in params.items()}
    optimizer = original(theirs.values(), **keywords)
    for t, ours in enumerate(trajectory(rule, textbook(rule) | theta, params, grads)):
        for key, g in grads(t, {key: p.detach() for key, p in theirs.items()}).items():
            theirs[key].grad = g
        optimizer.step()
        close(ours, {key: p.detach() for key, p in theirs.items()}, rtol=1e-9, atol=1e-11)


def test_muon_equals_torchs_where_that_keeps_its_precision(fp64, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    params, grads = problem({"wide": (4, 7), "tall": (9, 3), "square": (5, 5)})
    theirs = {key: torch.nn.Parameter(p.clone()) for key, p in params.items()}
    optimizer = torch.optim.Muon(theirs.values(), lr=0.01, adjust_lr_fn="match_rms_adamw")
    rule = lopt.build("muon")
    for t, ours in enumerate(trajectory(rule, textbook(rule) | {"learning_rate": 0.01}, params, grads)):
        for key, g in grads(t, {key: p.detach() for key, p in theirs.items()}).items():
            theirs[key].grad = g
        optimizer.step()
        close(ours, {key: p.detach() for key, p in theirs.items()}, rtol=1e-6, atol=1e-7)


def test_muon_gives_vectors_to_adamw_and_takes_a_convolution_as_out_by_rest():
    params, grads = problem()
    flat, _ = problem(SHAPES | {"conv": (4, 12)})
    muon, adamw = lopt.build("muon"), lopt.build("adamw")
    *_, ours = trajectory(muon, {}, params, grads)
    *_, vectors = trajectory(adamw, {"weight_decay": 0.1}, params, grads)
    close({k: ours[k] for k in ("scalar", "bias")}, {k: vectors[k] for k in ("scalar", "bias")}, rtol=0, atol=0)
    flat["conv"] = params["conv"].reshape(4, 12)
    as_matrix = lambda t, p: {n: g.reshape(p[n].shape) for n, g in grads(t, _like(p, params)).items()}  # noqa: E731
    *_, matrices = trajectory(muon, {}, _like(params, flat), as_matrix)
    close(ours, _like(matrices, params), rtol=1e-5, atol=1e-6)


def _like(tensors, shapes):
    return {name: tensor.reshape(shapes[name].shape) for name, tensor in tensors.items()}


GOLDEN = {
    "adabelief": ("adabelief", {}, {"learning_rate": 0.01}),
    "yogi": ("yogi", {}, {}),
    "sm3": ("sm3", {}, {}),
    "fromage": ("fromage", {}, {}),
} | {
    f"shampoo_{graft}": ("shampoo", {"graft": graft, "block_size": 4}, {"weight_decay": 0.1})
    for graft in ("none", "sgd", "adagrad", "rmsprop", "sqrt_n")
}  # fmt: skip


@pytest.mark.parametrize("case", GOLDEN)
def test_thirty_steps_equal_pytorch_optimizers(fp64, case):
    data = np.load(ORACLES / "hand_designed.npz", allow_pickle=False)
    names = [key.removeprefix(f"{case}/") for key in data.files if key.startswith(f"{case}/")]
    name, arguments, theta = GOLDEN[case]
    rule = lopt.build(name, **arguments)
    params = {key: torch.from_numpy(data[f"p0/{key}"]) for key in names}
    grads = {key: torch.from_numpy(data[f"g/{key}"]) for key in names}
    steps = dict(zip(data["steps"].tolist(), range(len(data["steps"])), strict=True))
    for t, ours in enumerate(
        trajectory(rule, textbook(rule) | theta, params, lambda t, _: {k: g[t] for k, g in grads.items()})
    ):
        if t in steps:
            theirs = {key: torch.from_numpy(data[f"{case}/{key}"])[steps[t]] for key in names}
            close(ours, theirs, rtol=1e-8, atol=1e-9)


def lamb(h, p, g, s, t, _):
    m = s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    v = s["v"] = 0.999 * s.get("v", 0) + 0.001 * g**2
    u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6) + h["weight_decay"] * p
    return p - h["learning_rate"] * np.linalg.norm(p) / np.linalg.norm(u) * u


def lars(h, p, g, s, t, _):
    w, local = h["weight_decay"], h["trust"] * np.linalg.norm(p)
    local = local / (np.linalg.norm(g) + w * np.linalg.norm(p))
    s["m"] = 0.9 * s.get("m", 0) + h["learning_rate"] * local * (g + w * p)
    return p - s["m"]


def sm3(h, p, g, s, t, _):
    """SM3-II of a matrix with a moving average in place of the sum."""
    row, column = s.get("row", np.zeros((p.shape[0], 1))), s.get("column", np.zeros((1, p.shape[1])))
    v = 0.9 * np.minimum(row, column) + 0.1 * g**2
    s["row"], s["column"] = v.max(1, keepdims=True), v.max(0, keepdims=True)
    m = s["m"] = 0.9 * s.get("m", 0) + 0.1 * g / np.sqrt(v)
    return p - h["learning_rate"] * m


def shampoo_of_vectors(h, p, g, s, t, arguments):
    """Blocks of one axis: the inverse square root of a moving average of outer products, grafted onto a length."""
    g, shape, graft = g.reshape(-1), g.shape, arguments["graft"]
    second = s["second"] = 0.999 * s.get("second", 1e-6 * np.eye(len(g))) + 0.001 * np.outer(g, g)
    n = g / np.linalg.norm(g) if "normalized" in graft else g
    v = s["v"] = s.get("v", 0) + n**2 if "adagrad" in graft else 0.999 * s.get("v", 0) + 0.001 * n**2
    values, vectors = np.linalg.eigh(second)
    d = vectors @ ((values + 1e-6 * values[-1]) ** -0.5 * (vectors.T @ g))
    u = n / (np.sqrt(v / (1 - 0.999**t) if graft == "adam" else v) + 1e-10)
    d = d * np.linalg.norm(u) / (np.linalg.norm(d) + 1e-16)
    m = s["m"] = 0.9 * s.get("m", 0) + d
    return p - h["learning_rate"] * (d + 0.9 * m).reshape(shape)


def nadamw(h, p, g, s, t, arguments):
    """learned_optimization's, with its schedule in steps; digest 4, TaskSet's original for the warm-up."""
    sign, longest = (-1, max) if arguments else (1, min)
    g = g + sign * h["l2_weight_decay"] * p
    m = s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    v = s["v"] = 0.98 * s.get("v", 0) + 0.02 * g**2
    constant, done = STEPS * h["constant_fraction"], t - 1
    warm = STEPS * longest(h["warmup_fraction"], h["constant_fraction"])
    low = h["min_learning_rate_mult"]
    lr = low + (1 - low) * (np.cos((max(done, constant) - constant) * np.pi / (STEPS - constant)) + 1) / 2
    lr = h["learning_rate"] * (done / warm if done < warm else lr) * np.sqrt(1 - 0.98**t) / (1 - 0.9**t)
    n = 0.9 * m + 0.1 * g if h["use_nesterov"] else m
    return p - lr * (n / (np.sqrt(v) + h["epsilon"]) + h["adamw_weight_decay"] * p)


DECAYED = {"learning_rate": 0.1, "beta2": 0.98, "epsilon": 0.05, "adamw_weight_decay": 0.1, "l2_weight_decay": 0.3}
SCHEDULED = DECAYED | {"warmup_fraction": 0.2, "constant_fraction": 0.5, "min_learning_rate_mult": 0.1}
FORMULAE = {
    "lamb": (lamb, "lamb", {}, {"learning_rate": 0.02, "weight_decay": 0.2}, SHAPES),
    "lars": (lars, "lars", {}, {"weight_decay": 0.1, "trust": 0.02}, SHAPES),
    "sm3 that forgets": (sm3, "sm3", {}, {"beta2": 0.9}, {"matrix": (6, 4)}),
    "nadamw": (nadamw, "nadamw", {}, SCHEDULED, SHAPES),
    "nadamw without nesterov": (nadamw, "nadamw", {}, SCHEDULED | {"use_nesterov": 0.0}, SHAPES),
    "nadamw compat": (nadamw, "nadamw", {"compat": True}, SCHEDULED, SHAPES),
} | {
    f"shampoo of vectors, {graft}": (
        shampoo_of_vectors, "shampoo", {"graft": graft, "start": 0}, {}, {"b": (5,), "merged": (2, 3)},
    )
    for graft in ("adam", "adagrad_normalized", "rmsprop_normalized")
}  # fmt: skip


@pytest.mark.parametrize(("formula", "name", "arguments", "theta", "shapes"), FORMULAE.values(), ids=FORMULAE)
def test_thirty_steps_equal_the_papers_formula(fp64, formula, name, arguments, theta, shapes):
    rule = lopt.build(name, **arguments)
    params, grads = problem(shapes)
    # a trust ratio of a zero gradient is a case of its own, which the formulae do not have
    nonzero = lambda t, params: grads(t if t != 7 else 8, params)  # noqa: E731
    h = textbook(rule) | theta
    theirs, slots = {key: p.numpy() for key, p in params.items()}, {key: {} for key in params}
    for t, ours in enumerate(trajectory(rule, h, params, nonzero)):
        g = nonzero(t, {key: torch.from_numpy(np.asarray(p)) for key, p in theirs.items()})
        theirs = {
            key: np.asarray(formula(h, p, g[key].numpy(), slots[key], t + 1, arguments)) for key, p in theirs.items()
        }
        close(ours, {key: torch.from_numpy(p) for key, p in theirs.items()}, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "factors"),
    [
        ({}, {0: 0.0, 5: 0.5, 10: 1.0, 30: 1.0, 50: 1.0, 75: 0.6, 100: 0.2, 150: 0.2}),
        ({"compat": True}, {0: 0.0, 5: 0.1, 10: 0.2, 30: 0.6, 50: 1.0, 75: 0.6, 100: 0.2, 150: 0.2}),
    ],
)
def test_nadamw_warms_up_stays_and_falls_along_a_cosine(arguments, factors):
    rule = lopt.build("nadamw", **arguments)
    theta = {"warmup_fraction": 0.1, "constant_fraction": 0.5, "min_learning_rate_mult": 0.2, "beta1": 1e-6}
    theta = {name: torch.tensor([value]) for name, value in theta.items()} | {"learning_rate": torch.tensor([0.1])}
    p, g = {"p": torch.ones(1, 1)}, {"p": torch.full((1, 1), 3.0)}
    for step, factor in factors.items():
        state = rule.init_particles(theta, p, torch.tensor([100]))
        # with an old second moment of g^2 and no momentum a step is lr(t) sqrt(1 - beta2^t)
        state |= {"iteration": torch.tensor([step]), "v/p": g["p"].square()}
        moved, _ = rule.update_particles(theta, state, p, g, torch.zeros(1))
        expected = 0.1 * factor * (1 - 0.999 ** (step + 1)) ** 0.5
        assert 1 - moved["p"].item() == pytest.approx(expected, rel=1e-4, abs=1e-7), step


@pytest.mark.parametrize("compat", [False, True])
def test_nadamw_without_warm_up_or_decay_is_constant_from_the_first_step(compat):
    rule = lopt.build("nadamw", compat=compat)
    theta = {"warmup_fraction": torch.tensor([0.0, 0.3]), "constant_fraction": torch.tensor([1.0, 0.0])}
    values = theta | {"min_learning_rate_mult": 0.0}
    for done, expected in ((0.0, [1.0, float(not compat)]), (0.5, [1.0, 0.5]), (1.0, [1.0, 0.0])):
        factor = rule.schedule(values, torch.full((2,), done))
        torch.testing.assert_close(factor, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("law", [law for law in LAWS if law is not check_it_stays_finite])
def test_every_rule_keeps_the_laws_of_learned_optimizers(name, law):
    law(lopt.build(name, log_space=True))


@pytest.mark.parametrize("graft", ["none", "adam", "adagrad_normalized", "rmsprop_normalized", "sqrt_n"])
@pytest.mark.parametrize("law", [law for law in LAWS if law is not check_it_stays_finite])
def test_shampoo_keeps_them_with_every_graft_and_with_blocks(graft, law):
    law(lopt.build("shampoo", graft=graft, block_size=2, start=2, log_space=True))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_gradients_of_zero_and_of_all_sizes_give_finite_steps(name):
    rule = lopt.build(name)
    batch = particles(rule, count=2, perturbation=0.0)
    scales = {key: 10.0 ** torch.linspace(-8, 8, p.shape[-1]) for key, p in batch.params.items()}
    grads = [{key: leaf * scales[key] for key, leaf in g.items()} for g in batch.grads]
    for first in (0, 3):
        grads[first] = {key: torch.zeros_like(leaf) for key, leaf in grads[first].items()}
    zero = {key: torch.zeros_like(p) for key, p in batch.params.items()}
    for params in (batch.params, zero):
        moved, state = run(rule, batch._replace(params=params, grads=grads))
        assert all(leaf.isfinite().all() for leaf in (*moved.values(), *state.values()))
        assert (moved["layer/matrix"] != params["layer/matrix"]).any()


@pytest.mark.parametrize("name", NAMES)
def test_a_particle_that_diverges_disturbs_no_other(name):
    rule = lopt.build(name)
    batch = particles(rule, perturbation=0.0)
    params, state = run(rule, batch)
    for bad in (float("nan"), float("inf"), 1e30):
        grads = [{key: leaf.clone() for key, leaf in g.items()} for g in batch.grads]
        for g in grads[2:]:
            for leaf in g.values():
                leaf[1] = bad
        broken, broken_state = run(rule, batch._replace(grads=grads))
        others = torch.tensor([0, 2])
        close(rows(broken, others), rows(params, others), rtol=1e-6, atol=1e-7)
        close(rows(broken_state, others), rows(state, others), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_elementwise_rules_and_only_they_may_have_their_tensors_cut(name):
    rule = lopt.build(name)
    params, grads = problem({"w": (6, 4)})
    cut = lambda tensors: {f"{k}{i}": t for k, v in tensors.items() for i, t in enumerate(v.split([1, 5]))}  # noqa: E731
    glue = lambda pieces: {"w": torch.cat([pieces["w0"], pieces["w1"]])}  # noqa: E731
    *_, whole = trajectory(rule, {}, params, grads)
    *_, pieces = trajectory(rule, {}, cut(params), lambda t, p: cut(grads(t, glue(p))))
    same = torch.allclose(glue(pieces)["w"], whole["w"], rtol=1e-5, atol=1e-7)
    assert same == rule.elementwise


@pytest.mark.parametrize("name", NAMES)
def test_theta_that_is_partial_whole_or_in_log_space_means_the_same(name):
    plain, logarithmic = lopt.build(name), lopt.build(name, log_space=True)
    params, grads = problem()
    draws = torch.Generator().manual_seed(0)
    *_, expected = trajectory(plain, plain.init_theta(draws), params, grads)
    for rule, theta in ((plain, {}), (logarithmic, {}), (logarithmic, logarithmic.init_theta(draws))):
        *_, ours = trajectory(rule, theta, params, grads)
        close(ours, expected, rtol=1e-2, atol=1e-3)
    rate = next(h for h in plain.hyperparameters if h.name == "learning_rate")
    *_, doubled = trajectory(plain, {"learning_rate": 2 * rate.default}, params, grads)
    *_, also = trajectory(logarithmic, {"learning_rate": rate.encode(2 * rate.default)}, params, grads)
    close(doubled, also, rtol=1e-2, atol=1e-3)
    assert not torch.allclose(doubled["cube"], expected["cube"], rtol=1e-2, atol=1e-3)


def test_log_space_keeps_every_hyper_parameter_in_its_range():
    for kind in HAND_DESIGNED:
        for h in kind.hyperparameters:
            assert h.decode(torch.tensor(h.encode(h.default))).item() == pytest.approx(h.default, rel=1e-4, abs=1e-7)
            values = h.decode(torch.linspace(-9, 9, 19))
            if h.space == "decay":
                assert ((values >= 0) & (values < 1)).all()
            elif h.space == "log":
                assert (values > 0).all()


def test_textbook_values_are_torchs():
    for name, original in {
        "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam,
        "rmsprop": torch.optim.RMSprop, "adagrad": torch.optim.Adagrad, "adafactor": torch.optim.Adafactor,
        "muon": torch.optim.Muon,
    }.items():  # fmt: skip
        theirs = {key: p.default for key, p in inspect.signature(original).parameters.items()}
        theirs["learning_rate"] = theirs.pop("lr")
        theirs |= dict(zip(("beta1", "beta2"), theirs.pop("betas", ()), strict=False))
        ours = lopt.build(name).init_theta(torch.Generator())
        shared = (ours.keys() & theirs.keys()) - ({"eps"} if name == "muon" else set())
        assert len(shared) >= 2
        for key in shared:
            assert ours[key].item() == pytest.approx(theirs[key]), (name, key)


def test_a_misspelt_hyper_parameter_is_refused_by_name():
    with pytest.raises(lopt.ThetaError, match=r"'learning_rat'.*did you mean 'learning_rate'"):
        lopt.build("adamw").init_state({"learning_rat": torch.tensor(0.1)}, {"p": torch.ones(2)}, 10)


def test_rules_are_built_by_name_with_their_arguments_and_kept_in_files():
    assert len(set(NAMES)) == 17
    cases = [(name, {}) for name in NAMES] + [
        ("sgdm", {"nesterov": True}), ("nadamw", {"compat": True}),
        ("shampoo", {"graft": "adam", "block_size": 64, "start": 0}), ("adam", {"log_space": True}),
    ]  # fmt: skip
    for name, arguments in cases:
        rule = lopt.build(name, **arguments)
        assert arguments.items() <= rule.arguments.items()
        theta = rule.init_theta(torch.Generator())
        again, loaded, _ = lopt.decode(lopt.encode(rule, theta, {}))
        assert (again.name, again.arguments) == (name, rule.arguments)
        assert all(torch.equal(theta[key], loaded[key]) for key in theta)
        assert rule.paper
    with pytest.raises(ValueError, match="did you mean 'adagrad'"):
        lopt.build("shampoo", graft="adagrat")
    with pytest.raises(ValueError, match="block_size = 0"):
        lopt.build("shampoo", block_size=0)
    with pytest.raises(lopt.CheckpointError, match="nesterof"):
        lopt.build("sgdm", nesterof=True)


def test_factored_rules_keep_far_less_than_the_tensor():
    for name, elements in (("adafactor", 64 + 48), ("sm3", 64 * 48 + 64 + 48), ("adam", 2 * 64 * 48), ("sgd", 0)):
        state = lopt.build(name).init_state({}, {"w": torch.ones(64, 48)}, 1)
        assert sum(leaf.numel() for key, leaf in state.items() if "/" in key) == elements


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_a_model_at_its_textbook_values(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 3))
    x = torch.randn(64, 8)
    y = x[:, :3].argmax(1)
    rule = lopt.build(name)
    optimizer = lopt.Optimizer(model.parameters(), rule, rule.init_theta(torch.Generator()), num_steps=200)
    losses = []
    for _ in range(200):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_shampoo_merges_small_neighbouring_axes_up_to_a_block():
    assert merged((1, 2, 512, 1, 2048, 1, 3, 4), 1024) == [1024, 2048, 12]  # distributed_shampoo's own example
    assert merged((3, 3, 3, 8), 128) == [27, 8]
    assert merged((), 128) == merged((1, 1), 128) == []
    params, grads = problem({"w": (3, 2, 30)})
    matrix = {"w": params["w"].reshape(6, 30)}
    rule = lopt.build("shampoo", block_size=30)
    *_, ours = trajectory(rule, {}, params, grads)
    as_matrix = lambda t, p: _like(grads(t, _like(p, params)), matrix)  # noqa: E731
    *_, theirs = trajectory(rule, {}, matrix, as_matrix)
    close(ours, _like(theirs, params), rtol=0, atol=0)
