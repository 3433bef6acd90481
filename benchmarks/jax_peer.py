"""The JAX peer of ``inner_loop.py``: the same inner steps as our engine's, written by hand for jit + scan + vmap.

    python benchmarks/jax_peer.py [--rule NAME ...] [--particles 16] [--repeats 7]     prints one JSON object
    python benchmarks/jax_peer.py --serve                                              JSON lines in, JSON lines out

Runs under any Python that has jax and numpy. The rules are in ``jax_rules.py``; ``inner_loop.py`` compares the losses
with the engine's before it compares speeds. Owns no measurement of our engine.

One call runs a window of 50 steps of all particles (2n, the + sides of n tasks, then the - sides): an MLP 64-32-10 with
relu and mean cross entropy, batches of 64 images of 8x8 uint8 pixels drawn by index within the scan from 60,000 rows,
each pair of particles sharing parameters at the start and batches, each particle with its own theta. Episodes do not
end within a window, which is to the peer's advantage.

What has been tuned (``VARIANTS``; ``--tune`` times all of them): the hidden layers as unrolled multiply-adds in one
loop, or as matrix products; particles by vmap or by lax.map over pairs; the unrolling of the scan. On one core unrolled
multiply-adds under vmap are the fastest by 5 to 30 % (hidden size 32: products under vmap, twice as fast as unrolled).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax_rules import RULES, Array, Tree, init_state, shapes_of_theta, update

WINDOW, BATCH, SIDE, HIDDEN, CLASSES, ROWS = 50, 64, 8, 32, 10, 60_000
SHAPES = {"w0": (SIDE * SIDE, HIDDEN), "b0": (HIDDEN,), "w1": (HIDDEN, CLASSES), "b1": (CLASSES,)}


class Variant(NamedTuple):
    """How a rule is written: ``mlp`` unrolled or dot; ``over`` vmap or map; ``unroll`` of the scan."""

    mlp: str
    over: str
    unroll: int = 1


VARIANTS = [Variant(mlp, over, unroll) for mlp in ("unrolled", "dot") for over in ("vmap", "map") for unroll in (1, 2)]
BEST = {"small_fc/32": Variant("dot", "vmap")}
"""The fastest variant of each rule on one core, where it is not ``DEFAULT``."""
DEFAULT = Variant("unrolled", "vmap")


def mlp_loss(params: Tree, image: Array, label: Array) -> Array:
    hidden = jax.nn.relu(image.reshape(len(image), -1) @ params["w0"] + params["b0"])
    logits = hidden @ params["w1"] + params["b1"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1).mean()


def hashed(x: Array) -> Array:
    """32 random bits of each counter (the finaliser of MurmurHash3): far quicker than threefry on a CPU."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def drawn(seed: Array, count: int, rows: int) -> Array:
    return (hashed(jnp.arange(count, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9) + seed) % rows).astype(jnp.int32)


class Problem(NamedTuple):
    """``fetch(draw)`` gives the batch (a tuple) that the two particles of a task share; ``loss(params, *batch)``."""

    fetch: Callable[[Array], tuple[Array, ...]]
    loss: Callable[..., Array]


def window(problem: Problem, update_one: Callable[..., Any], over: str, unroll: int) -> Callable[..., Any]:
    """run(theta, params, state, draws): leaves (n, 2, ...), draws (steps, n, ...) -> params, state, losses.

    The losses, each before its update, are (steps, n, 2), or (n, steps, 2) with ``over`` map.
    """

    def pair_step(theta: Tree, params: Tree, state: Tree, draw: Array) -> Any:
        batch = problem.fetch(draw)
        losses, grads = jax.vmap(lambda p: jax.value_and_grad(problem.loss)(p, *batch))(params)
        params, state = jax.vmap(update_one)(theta, state, params, grads, losses)
        return params, state, losses

    def scanned(step: Callable[..., Any], theta: Tree, params: Tree, state: Tree, draws: Array) -> Any:
        def body(carry: Any, draw: Array) -> Any:
            *carry, losses = step(theta, *carry, draw)
            return tuple(carry), losses

        (params, state), losses = lax.scan(body, (params, state), draws, unroll=unroll)
        return params, state, losses

    if over == "vmap":
        return partial(scanned, jax.vmap(pair_step))
    return lambda theta, params, state, draws: lax.map(
        lambda args: scanned(pair_step, *args), (theta, params, state, jnp.swapaxes(draws, 0, 1))
    )


def image_data(rng: np.random.Generator, rows: int) -> Tree:
    pixels = rng.integers(0, 256, (rows, 1, SIDE, SIDE), dtype=np.uint8)
    return {"image": pixels, "label": rng.integers(0, CLASSES, rows, dtype=np.int32)}


def image_problem(data: Tree, batch_size: int, loss: Callable[..., Array]) -> Problem:
    """A draw is a seed, from which indices into the images (uint8, or float32 in [0, 1]) are made within the scan."""
    pixels, labels = jnp.asarray(data["image"]), jnp.asarray(data["label"], jnp.int32)
    scale = 1 / 255 if pixels.dtype == jnp.uint8 else 1

    def fetch(draw: Array) -> tuple[Array, ...]:
        index = drawn(draw, batch_size, len(labels))
        return pixels[index].astype(jnp.float32) * scale, labels[index]

    return Problem(fetch, loss)


def random_tree(rng: np.random.Generator, shapes: dict[str, tuple[int, ...]], lead: tuple[int, ...]) -> Tree:
    """Weights of about the size that layers start with; biases zero."""
    leaves = {}
    for name, shape in shapes.items():
        scale = shape[-2] ** -0.5 if len(shape) > 1 else 0.0
        leaves[name] = scale * rng.standard_normal((*lead, *shape))
    return leaves


class Start(NamedTuple):
    """What a contest begins with: theta and params (2n, ...), horizons (2n,), data, seeds (50, n) of batches."""

    theta: Tree
    params: Tree
    horizon: Array
    data: Tree
    seeds: Array


def read_start(path: str) -> Start:
    """The npz file that ``inner_loop.py`` writes, entries named ``theta/...``, ``params/...``, ``data/...``."""
    with np.load(path) as file:
        parts: dict[str, Tree] = {"theta": {}, "params": {}, "data": {}}
        for key in file.files:
            part, _, name = key.partition("/")
            if name:
                parts[part][name] = file[key]
        return Start(**parts, horizon=file["horizon"], seeds=file["seeds"])


def random_start(rule: str, shapes: dict[str, tuple[int, ...]], data: Tree, particles: int) -> Start:
    rng = np.random.default_rng(0)
    one = random_tree(rng, shapes_of_theta(rule), ())
    theta = {name: x + 0.01 * rng.standard_normal((particles, *x.shape)) for name, x in one.items()}
    params = random_tree(rng, shapes, (particles,))
    seeds = rng.integers(0, 2**32, (WINDOW, particles // 2), dtype=np.uint32)
    return Start(theta, params, np.full(particles, 2000), data, seeds)


class Rule(NamedTuple):
    """``init(theta, params, horizon)`` and ``update(theta, state, params, grads, loss)`` of one particle; ``leaves`` of
    theta."""

    init: Callable[..., Any]
    update: Callable[..., Any]
    leaves: dict[str, tuple[int, ...]]


def written(rule: str, how: str) -> Rule:
    """The rule as ``jax_rules.py`` has it."""
    return Rule(partial(init_state, rule), partial(update, rule, how), shapes_of_theta(rule))


def original(hidden: int) -> Rule:
    """google/learned_optimization's own ``AdafacMLPLOpt``, as it is published."""
    from learned_optimization.learned_optimizers.adafac_mlp_lopt import AdafacMLPLOpt

    lopt = AdafacMLPLOpt(hidden_size=hidden)

    def opt(theta: Tree) -> Any:
        network = {name.removeprefix("mlp."): x for name, x in theta.items() if name.startswith("mlp.")}
        return lopt.opt_fn({"nn": {"~": network}} | {name: x for name, x in theta.items() if name.endswith("decays")})

    def init(theta: Tree, params: Tree, horizon: Array) -> Any:
        return opt(theta).init(params, num_steps=horizon)

    def step(theta: Tree, state: Any, params: Tree, grads: Tree, loss: Array) -> Any:
        state = opt(theta).update(state, grads, loss)
        return opt(theta).get_params(state), state

    return Rule(init, step, shapes_of_theta(f"small_fc/{hidden}"))


class Timed:
    """A compiled window, and the particles that every call moves on; ``losses`` (50, 2n) are those of the first."""

    def __init__(self, problem: Problem, rule: Rule, over: str, unroll: int, start: Start) -> None:
        n = len(start.horizon) // 2

        def pairs(x: Array) -> Array:
            return jnp.asarray(np.stack([x[:n], x[n:]], 1), jnp.float32)

        self.theta = {name: pairs(start.theta[name]) for name in rule.leaves}
        self.params = {name: pairs(x) for name, x in start.params.items()}
        state = jax.vmap(jax.vmap(rule.init))(self.theta, self.params, pairs(start.horizon))
        # each a buffer of its own, to be donated, and not weakly typed, for which the second call would compile again
        self.state = jax.tree.map(lambda x: jnp.array(x, x.dtype, copy=True), state)
        run = window(problem, rule.update, over, unroll)
        self.run = jax.jit(run, donate_argnums=(1, 2))
        began = time.perf_counter()
        losses = self._call(start.seeds)
        self.first_seconds = time.perf_counter() - began
        self.losses = np.concatenate(np.moveaxis(losses if over == "vmap" else losses.swapaxes(0, 1), 2, 0), 1)
        self.seeds = start.seeds

    def _call(self, seeds: Array) -> Array:
        self.params, self.state, losses = self.run(self.theta, self.params, self.state, jnp.asarray(seeds))
        return np.asarray(losses)

    def steps_per_second(self, seconds: float) -> float:
        """Inner steps per second of CPU time, over at least ``seconds``."""
        start, calls = time.process_time(), 0
        while calls == 0 or time.process_time() - start < seconds:
            self.seeds = self.seeds + np.uint32(1)
            self._call(self.seeds)
            calls += 1
        return calls * self.losses.size / (time.process_time() - start)


def mlp_timed(name: str, path: str, start: Start, variant: Variant | None = None) -> Timed:
    """``path`` is ``jax``, or ``learned_optimization`` for the published code under vmap."""
    variant = variant or best(name)
    rule = original(int(name.partition("/")[2])) if path == "learned_optimization" else written(name, variant.mlp)
    return Timed(image_problem(start.data, BATCH, mlp_loss), rule, variant.over, variant.unroll, start)


def serve(make: Callable[[str, str, Start], Timed]) -> None:
    """Answer requests (open, path, particles, start) and (time, path, particles, seconds), one JSON object a line."""
    opened: dict[tuple[str, str, int], Timed] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request.get("open") or request["time"]
        identity = (name, request["path"], request["particles"])
        answer: dict[str, Any]
        if "open" in request:
            timed = opened[identity] = make(name, request["path"], read_start(request["start"]))
            answer = {"first_seconds": timed.first_seconds, "losses": timed.losses.tolist(), "jax": jax.__version__}
        else:
            answer = {"steps_per_second": opened[identity].steps_per_second(request["seconds"])}
        print(json.dumps(answer), flush=True)


def best(rule: str) -> Variant:
    return BEST.get(rule, DEFAULT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--serve", action="store_true", help="JSON lines in, JSON lines out")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--particles", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tune", action="store_true", help="time all variants, not only the best known")
    chosen = parser.parse_args()
    if chosen.serve:
        serve(mlp_timed)
        return
    data, found = image_data(np.random.default_rng(0), ROWS), {}
    for rule in chosen.rules:
        start = random_start(rule, SHAPES, data, chosen.particles)
        for variant in VARIANTS if chosen.tune else [best(rule)]:
            timed = mlp_timed(rule, "jax", start, variant)
            rate = statistics.median(timed.steps_per_second(0.3) for _ in range(chosen.repeats))
            found[f"{rule} {'/'.join(map(str, variant))}"] = rate
            if chosen.tune:
                print(rule, *variant, round(rate), f"{timed.first_seconds:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps({"jax": jax.__version__, "particles": chosen.particles, "steps_per_second": found}))


if __name__ == "__main__":
    main()
