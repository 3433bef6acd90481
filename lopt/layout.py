"""How tensors lie on the processes of a mesh (DTensor), and sums over all of them.

Owns ``Layout``, the parts of tensors and of what is derived from them, and ``add_up``, the only collective that sharded
rules need. Never knows what is summed. To import it takes seconds: only ``lopt.sharded`` does, for DTensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

MeshDim = tuple[DeviceMesh, int]
"""One dimension of a mesh: the processes that a sum goes over."""


@dataclass(frozen=True)
class Layout:
    """How a tensor lies on the processes: its whole shape, and what each dimension of the mesh does to it.

    ``mesh`` is None for a plain tensor, which every process has all of.
    """

    shape: tuple[int, ...]
    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        if isinstance(x, DTensor):
            return cls(tuple(x.shape), x.device_mesh, tuple(x.placements))
        return cls(tuple(x.shape), None, ())

    def cuts(self, *axes: int) -> list[MeshDim]:
        """The mesh dimensions over which sums along these axes of the parts have to be added up."""
        if self.mesh is None:
            return []
        cut = [dim for dim, placement in enumerate(self.placements) if _axis(placement) in axes]
        return [(self.mesh, dim) for dim in cut if self.mesh.size(dim) > 1]

    def leaf(self, shape: Sequence[int], axes: Sequence[int | None]) -> Layout:
        """Of a leaf whose dimensions are these axes of the tensor, or none of it (None), wherever those are cut."""
        to = {axis: i for i, axis in enumerate(axes) if axis is not None}
        return Layout(tuple(shape), self.mesh, tuple(_moved(placement, to) for placement in self.placements))

    def place(self, x: Tensor) -> Tensor:
        """A tensor with this layout, ``x`` itself if it has it already; plain tensors are taken to be whole."""
        if self.mesh is None:
            return x
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return x if x.placements == self.placements else x.redistribute(self.mesh, self.placements)

    def part(self, x: Tensor) -> Tensor:
        """This process's part of a tensor, as ``place`` lays it out."""
        return local(self.place(x))

    def wrap(self, part: Tensor) -> Tensor:
        """The inverse: the DTensor of which this process holds ``part``."""
        if self.mesh is None:
            return part
        strides = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=torch.Size(self.shape), stride=strides
        )


def _axis(placement: Placement) -> int | None:
    """The axis that is cut; None: none is."""
    return getattr(placement, "dim", None)


def _moved(placement: Placement, to: dict[int, int]) -> Placement:
    """The placement of a leaf for which the tensor's axis ``axis`` is ``to[axis]``."""
    axis = _axis(placement)
    if axis is None or axis not in to:
        return Replicate()
    if isinstance(placement, _StridedShard):  # where FSDP2 cuts what tensor parallelism has cut
        return _StridedShard(to[axis], split_factor=placement.split_factor)
    return Shard(to[axis])


def local(x: Tensor) -> Tensor:
    """This process's part."""
    return x.to_local() if isinstance(x, DTensor) else x


Key = tuple[str, str]
Sums = dict[Key, tuple[Tensor, list[MeshDim]]]
"""This process's share of sums, and what they have to be added up over."""


def add_up(sums: Sums) -> dict[Key, Tensor]:
    """The sums over all processes, by one all-reduce per mesh dimension."""
    totals = {key: share.double() for key, (share, _) in sums.items()}
    members: dict[MeshDim, list[Key]] = {}
    for key, (_, cuts) in sums.items():
        for cut in cuts:
            members.setdefault(cut, []).append(key)
    for (mesh, dim), keys in members.items():
        # parameters that are offloaded to the CPU are still reduced on the mesh's devices
        flat = torch.cat([totals[key].flatten() for key in keys]).to(mesh.device_type)
        dist.all_reduce(flat, group=mesh.get_group(dim))
        parts = torch.split(flat.to(totals[keys[0]].device), [totals[key].numel() for key in keys])
        totals |= {key: part.view_as(totals[key]) for key, part in zip(keys, parts, strict=True)}
    return {key: totals[key].to(share.dtype) for key, (share, _) in sums.items()}
