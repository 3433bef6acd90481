"""What every process of tests/test_distributed.py does, and the same problems for one process."""

import copy
import io
import sys
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import lopt
from lopt import chunked

TIMEOUT = timedelta(seconds=30)
SHAPES = {
    "scalar": (),
    "one": (1,),
    "bias": (3,),
    "matrix": (7, 5),
    "square": (4, 4),
    "tall": (3, 2),
    "conv": (5, 2, 3, 3),
    "conv_in": (2, 9, 3, 1),
    "five": (2, 3, 1, 4, 2),
}
PER_PARAMETER = ("celo", "small_fc_lopt", "velo")
OTHERS = ("adamw", "celo_adam", "nn_adam", "celo2")


@cache
def rule(name):
    """A rule and weights that do something: the published ones, or random ones."""
    if name == "celo":
        found, theta, _ = lopt.read("celo")
        return found, theta
    build = {
        "small_fc_lopt": lambda: lopt.SmallFcLopt(8),
        "velo": lambda: lopt.Velo(16, 4),
        "adamw": lambda: lopt.build("adamw"),
        "celo_adam": lopt.CeloAdam,
        "nn_adam": lambda: lopt.NNAdam(8),
        "celo2": lopt.Celo2,
    }
    found, draws = build[name](), torch.Generator().manual_seed(1)
    theta = found.init_theta(draws)
    if name != "adamw":
        theta = {key: leaf + 0.02 * torch.randn(leaf.shape, generator=draws) for key, leaf in theta.items()}
    return found, theta


def optimizer(name, params, **keywords):
    found, theta = rule(name)
    return lopt.Optimizer(params, found, theta, num_steps=100, **keywords)


# ---- tensors with given gradients ------------------------------------------------------------------------------------


def tensors(steps=4):
    """Whole parameters, and gradients of each step whose size differs along every axis by orders of magnitude."""
    draws = torch.Generator().manual_seed(0)
    params = {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}
    grads = []
    for _ in range(steps):
        step = {name: torch.randn(p.shape, generator=draws) for name, p in params.items()}
        for g in step.values():
            for axis, size in enumerate(g.shape):
                g *= (10 ** torch.linspace(-2, 1, size)).reshape([-1 if i == axis else 1 for i in range(g.ndim)])
        grads.append(step)
    return params, grads


def train(name, params, grads, **keywords):
    """Apply the rule ``name`` with these gradients; the optimizer."""
    params = {key: nn.Parameter(p) for key, p in params.items()}
    opt = optimizer(name, params.items(), **keywords)
    for t, step in enumerate(grads):
        for key, p in params.items():
            p.grad = step[key]
        opt.step(loss=2 / (t + 1))
    return opt


def parameters(opt):
    group = opt.param_groups[0]
    return {name: p.detach() for name, p in zip(group["param_names"], group["params"], strict=True)}


def placements(ndim, shape, shift):
    """A different cut for every tensor: each of the mesh's ``ndim`` dimensions cuts some axis, or none."""
    axes = [(shift + dim) % (len(shape) + (ndim > 1)) if shape else 0 for dim in range(ndim)]
    return [Shard(axis) if axis < len(shape) else Replicate() for axis in axes]


def cut(mesh, whole, shift=0):
    return {
        name: distribute_tensor(x.clone(), mesh, placements(mesh.ndim, x.shape, i + shift), src_data_rank=None)
        for i, (name, x) in enumerate(whole.items())
    }


def full(tree):
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in tree.items()}


def sharded(rank, world, folder, mesh=None, names=PER_PARAMETER + OTHERS):
    mesh = mesh or init_device_mesh("cpu", (world,))
    params, grads = tensors()
    out = {}
    for name in names:
        for shift in (0, 1):
            opt = train(name, cut(mesh, params, shift), [cut(mesh, step, shift) for step in grads])
            state = {key: full(opt.state[p]) for key, p in zip(SHAPES, opt.state, strict=True)}
            out[f"{name}/{shift}"] = full(parameters(opt)), state
    return out


def sharded_in_two_dimensions(rank, world, folder):
    return sharded(rank, world, folder, init_device_mesh("cpu", (2, 2)), PER_PARAMETER)


def sharded_in_chunks(rank, world, folder):
    chunked.CHUNK = 7
    return sharded(rank, world, folder, names=PER_PARAMETER)


def sharded_in_part(rank, world, folder):
    """Some tensors are DTensors, the others are not; and half precision."""
    mesh = init_device_mesh("cpu", (world,))
    params, grads = tensors()
    out = {}
    for name in PER_PARAMETER + OTHERS:
        mixed = lambda whole: whole | cut(mesh, {key: whole[key] for key in ("bias", "matrix", "conv")})  # noqa: E731
        opt = train(name, mixed({key: p.clone() for key, p in params.items()}), [mixed(step) for step in grads])
        out[name] = full(parameters(opt))
        half = [{key: x.bfloat16() for key, x in tree.items()} for tree in (params, *grads)]
        out[f"{name}/half"] = full(parameters(train(name, cut(mesh, half[0]), [cut(mesh, x) for x in half[1:]])))
    return out


def costs(rank, world, folder):
    """Collectives per step, by number of tensors; and how many numbers of the momenta this process holds."""
    mesh = init_device_mesh("cpu", (world,))
    params, grads = tensors(steps=3)
    counted, all_reduce = [], dist.all_reduce

    def counting(*args, **kwargs):
        counted.append(args[0].numel())
        return all_reduce(*args, **kwargs)

    out = {}
    for name in ("celo", "velo", "adamw"):
        for keys in (["matrix"], list(params)):
            some = lambda whole: cut(mesh, {key: whole[key] for key in keys})  # noqa: B023, E731
            own, own_grads = some(params), [some(step) for step in grads]
            dist.all_reduce = counting
            opt = train(name, own, own_grads)
            dist.all_reduce = all_reduce
            out[f"{name}/{len(keys)}"] = len(counted) / len(grads)
            counted.clear()
        out[f"{name}/m"] = sum(state["m"].to_local().numel() for state in opt.state.values())
    return out


# ---- a model and its data --------------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(5 * 16, 3), nn.Tanh(), nn.Linear(3, 3), nn.Linear(3, 1)
    )


def batch(rank=0, world=1):
    """This process's part of 8 examples."""
    draws = torch.Generator().manual_seed(2)
    x, y = torch.randn(8, 1, 6, 6, generator=draws), torch.randn(8, 1, generator=draws)
    x = x * 10 ** torch.linspace(-2, 1, 6)
    return x[rank::world], y[rank::world]


def fit(model, opt, data, steps=8, by_closure=False):
    """Losses of the steps."""
    x, y = data

    def closure():
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return torch.stack([opt.step(closure) if by_closure else opt.step(loss=closure()) for _ in range(steps)]).detach()


def weights(model):
    return full({name.removeprefix("module."): p.detach().clone() for name, p in model.named_parameters()})


def replicated(rank, world, folder):
    """DDP: every process has its part of the batch and the whole model."""
    data, out = batch(rank, world), {}
    alone = dist.new_subgroups(group_size=1)[0]
    for name in ("celo", "velo"):
        for case, keywords in (("", {}), ("/own", {"process_group": False}), ("/group", {"process_group": alone})):
            model = DistributedDataParallel(network())
            losses = fit(model, optimizer(name, model.parameters(), **keywords), data, by_closure=name == "velo")
            out[name + case] = weights(model) | {"losses": losses}
    return out


def refused(rank, world, folder):
    """One process has a loss that is not finite."""
    model = DistributedDataParallel(network())
    opt = optimizer("celo", model.parameters())
    fit(model, opt, batch(rank, world), steps=2)
    before, message = weights(model), ""
    try:
        opt.step(loss=float("nan") if rank == 1 else 1.0)
    except ValueError as error:
        message = str(error)
    unchanged = all(torch.equal(p, before[name]) for name, p in weights(model).items())
    fit(model, opt, batch(rank, world), steps=2)
    return {"message": message, "unchanged": unchanged, "weights": weights(model)}


class Branches(nn.Module):
    """The second branch has no part in the loss of the first process, the third in none."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(0)
        self.rank, self.branches = rank, nn.ModuleList([network(), network(1), network(2)])

    def forward(self, x):
        return self.branches[0](x) + (self.branches[1](x) if self.rank else 0)


def unused(rank, world, folder):
    model = DistributedDataParallel(Branches(rank), find_unused_parameters=True)
    fit(model, optimizer("celo", model.parameters()), batch(rank, world))
    return weights(model)


def fully_sharded_network(seed=0):
    model = network(seed)
    fully_shard(model[0])
    fully_shard(model)
    return model


def fully_sharded(rank, world, folder):
    """FSDP2: parts of the batch and of the model."""
    out = {}
    for name, keywords in (*((name, {}) for name in PER_PARAMETER + OTHERS), ("celo", {"max_steps": 50})):
        model = fully_sharded_network()
        fit(model, optimizer(name, model.parameters(), **keywords), batch(rank, world))
        out[name + "/max_steps" * bool(keywords)] = weights(model)
    return out


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(36, 10), nn.Tanh(), nn.Linear(10, 7), nn.Linear(7, 1))


def flat(data):
    x, y = data
    return x.flatten(1), y


TENSOR_PARALLEL = ("celo", "small_fc_lopt", "adamw", "nn_adam")


def tensor_parallel(rank, world, folder):
    """Two dimensions that may cut the same axis: FSDP2 over tensor parallelism; and a layer that only one cuts."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    out = {}
    for name in TENSOR_PARALLEL:
        model = perceptron()
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
        fit(model, optimizer(name, model.parameters()), flat(batch(mesh.get_local_rank("data"), 2)))
        out[name] = weights(model)
    return out


CHECKPOINTED = ("celo", "velo", "adamw", "nn_adam")
STATE_OPTIONS = {
    "parts": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "whole": {"full_state_dict": True},
    "from_one": {"full_state_dict": True, "broadcast_from_rank0": True},
}


def checkpoint(rank, world, folder):
    """Five steps; and three, a checkpoint, and two more by another model and optimizer."""
    data, out = batch(rank, world), {}
    for name in CHECKPOINTED:
        model = fully_sharded_network()
        opt = optimizer(name, model.parameters())
        fit(model, opt, data, steps=3)
        dcp.save(states(model, opt), checkpoint_id=folder / name)
        saved = io.BytesIO()
        torch.save((model.state_dict(), opt.state_dict()), saved)
        kept = {case: copy.deepcopy(states(model, opt, **options)) for case, options in STATE_OPTIONS.items()}
        fit(model, opt, data, steps=2)
        out[f"{name}/uninterrupted"] = weights(model)

        def resume(case, load, name=name):
            model = fully_sharded_network(seed=1)
            opt = optimizer(name, model.parameters())
            load(model, opt)
            fit(model, opt, data, steps=2)
            out[f"{name}/{case}"] = weights(model)

        def load_from_torch(model, opt, saved=saved):
            saved.seek(0)
            model_state, opt_state = torch.load(saved, weights_only=False)
            model.load_state_dict(model_state)
            opt.load_state_dict(opt_state)

        resume("saved by torch", load_from_torch)
        resume("saved in parts", lambda model, opt, name=name: load_parts(model, opt, folder / name))
        for case, options in STATE_OPTIONS.items():
            resume(case, lambda model, opt, state=kept[case], options=options: put(model, opt, state, **options))
    return out


def states(model, opt, **options):
    options = dcp_state.StateDictOptions(**options)
    return dict(zip(("model", "opt"), dcp_state.get_state_dict(model, opt, options=options), strict=True))


def put(model, opt, state, **options):
    options = dcp_state.StateDictOptions(**options)
    dcp_state.set_state_dict(
        model, opt, model_state_dict=state["model"], optim_state_dict=state["opt"], options=options
    )


def load_parts(model, opt, folder, **keywords):
    state = states(model, opt)
    dcp.load(state, checkpoint_id=folder, **keywords)
    put(model, opt, state)


def main(scenario, rank, world, folder):
    """Entry of a process: writes ``{rank}.pt``; what it says, and why it fails, is in ``{rank}.log``."""
    folder = Path(folder)
    sys.stdout = sys.stderr = (folder / f"{rank}.log").open("w", buffering=1)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    torch.save(globals()[scenario](rank, world, folder), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
