"""How low the loss of each task of a suite gets: Adam at several learning rates, one particle each, side by side.

    python benchmarks/loss_floors.py embedded17 [--steps 2000] [--root /data]

prints the table of docs/tasks.md. A task on which an optimizer can reach losses near rounding noise says nothing by the
ratio of two losses; the smallest loss here should be well above 1e-3.
"""

from __future__ import annotations

import argparse
import time

import torch

from configs.schema import DataConfig
from tasks.data.library import Library
from tasks.fixed import fixed_task
from tasks.keys import generator
from tasks.random import keys
from tasks.static import StaticConfig
from tasks.suites import suite

RATES = (1e-3, 3e-3, 1e-2)
FINAL_BATCHES = 10


def final_losses(static: StaticConfig, library: Library, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses (len(RATES),) before and after ``steps`` of Adam, both means over ``FINAL_BATCHES`` training batches.

    All particles start alike and see the same batches. A rate at which training diverged has a loss that is not finite.
    """
    task = static.build(library)
    n = len(RATES)
    dynamic = {
        name: leaf.expand(n, *leaf.shape[1:]) for name, leaf in task.sample_dynamic(generator("dynamic"), 1).items()
    }
    one = task.init(generator("init"), {name: leaf[0] for name, leaf in dynamic.items()})
    params = {name: value.repeat(n, *[1] * value.ndim) for name, value in one.items()}
    state = task.init_state(params)
    rates = torch.tensor(RATES)
    mean = {name: torch.zeros_like(value) for name, value in params.items()}
    square = {name: torch.zeros_like(value) for name, value in params.items()}

    def measured() -> torch.Tensor:
        batches = keys(FINAL_BATCHES, "final")
        losses = [task.losses(params, task.batch("train", key.expand(n)), dynamic) for key in batches]
        return torch.stack(losses).mean(0)

    first = measured()
    for step, key in enumerate(keys(steps, "steps"), 1):
        _, grads, state = task.losses_and_grads(params, state, task.batch("train", key.expand(n)), dynamic)
        for name, grad in grads.items():
            mean[name].lerp_(grad, 0.1)
            square[name].lerp_(grad.square(), 0.001)
            update = mean[name] / (1 - 0.9**step) / ((square[name] / (1 - 0.999**step)).sqrt() + 1e-8)
            params[name] = params[name] - rates.reshape(n, *[1] * (grad.ndim - 1)) * update
    return first, measured()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", help="a suite, or one fixed task")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--root", help="where data sets lie")
    arguments = parser.parse_args()
    library = Library(DataConfig(root=arguments.root))
    try:
        names = suite(arguments.suite)
    except ValueError:
        names = (arguments.suite,)
    torch.set_num_threads(1)
    print("| task | parameters | ms per step | first loss | steps | last loss | rate |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        static = fixed_task(name)
        start = time.thread_time()
        first, last = final_losses(static, library, arguments.steps)
        milliseconds = 1e3 * (time.thread_time() - start) / (arguments.steps + 2 * FINAL_BATCHES) / len(RATES)
        best = int(last.nan_to_num(nan=torch.inf).argmin())
        print(
            f"| {name} | {static.work().parameters:,} | {milliseconds:.2f} | {first[best]:.3f} | {arguments.steps} "
            f"| {last[best]:.4f} | {RATES[best]:g} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
