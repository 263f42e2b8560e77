"""Which processes a call is for, and how many rows each of them holds."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..core import checks

# A process group, a DeviceMesh of one dimension, or None for all processes.
Group: TypeAlias = Any
F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """`torch.compiler.disable`, which imports torch._dynamo, only where that is there already."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        outside = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function
        return outside(*arguments)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


@dataclass(frozen=True)
class Team:
    """The processes of a group, in the order of their ranks.

    Attributes:
        group: the process group.
        rank: that of this process in the group.
        size: how many there are.
    """

    group: dist.ProcessGroup
    rank: int
    size: int


@dataclass(frozen=True)
class Shards:
    """A matrix whose rows are spread over a team: those of rank 0, then those of rank 1, ...

    Attributes:
        team: the processes.
        sizes: how many rows each of them has.
    """

    team: Team
    sizes: tuple[int, ...]

    @property
    def begins(self) -> tuple[int, ...]:
        """The first row of each rank in the whole matrix, and behind them the number of all rows."""
        return (0, *accumulate(self.sizes))

    @property
    def offset(self) -> int:
        """The first row of this process."""
        return self.begins[self.team.rank]

    @property
    def total(self) -> int:
        """The rows of all."""
        return self.begins[-1]

    @property
    def local(self) -> int:
        """The rows of this process."""
        return self.sizes[self.team.rank]


def find_team(function: str, group: Group, *tensors: Any) -> Team | None:
    """The processes that `group` names, or the mesh of DTensors where it is None; None for one process alone."""
    group = _mesh_of(function, tensors) if group is None else group
    if not (dist.is_available() and dist.is_initialized()):
        if group is None:
            return None
        raise ValueError(
            f"{function}: group must be None where there is no process group, got {type(group).__name__}\n"
            "  call torch.distributed.init_process_group first, or start the program with torchrun"
        )
    found = _process_group(function, group)
    size = dist.get_world_size(found)
    return None if size == 1 else Team(found, dist.get_rank(found), size)


def local_tensor(x: Any) -> Any:
    """The rows of a DTensor that this process holds; anything else as it is."""
    return x.to_local() if is_dtensor(x) else x


def _process_group(function: str, group: Group) -> dist.ProcessGroup:
    outside = f"{function}: group must be one that this process is in, got one without rank "
    if group is None:
        return dist.distributed_c10d._get_default_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{outside}{dist.get_rank()}")
    if hasattr(group, "get_coordinate"):  # a DeviceMesh
        if group.ndim != 1:
            names = group.mesh_dim_names or ("...",)
            raise ValueError(
                f"{function}: group must be a DeviceMesh of one dimension, got {group.ndim} dimensions\n"
                f'  name the dimension over which rows are spread: mesh["{names[0]}"]'
            )
        if group.get_coordinate() is None:
            raise ValueError(f"{outside}{dist.get_rank()}")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{function}: group must be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{outside}{dist.get_rank()}")
    return group


def is_dtensor(x: Any) -> bool:
    plain = type(x) is Tensor or type(x) is torch.nn.Parameter
    return not plain and isinstance(x, Tensor) and any(kind.__name__ == "DTensor" for kind in type(x).__mro__)


def _mesh_of(function: str, tensors: tuple[Any, ...]) -> Group:
    """The mesh dimension over which the rows of DTensors are spread; None where there are none."""
    found = None
    for tensor in filter(is_dtensor, tensors):
        placements = tensor.placements
        spread = [dim for dim, placement in enumerate(placements) if placement.is_shard(0)]
        others = [placement for placement in placements if not placement.is_shard(0) and not placement.is_replicate()]
        if len(spread) != 1 or others:
            raise ValueError(
                f"{function}: a DTensor must be Shard(0) in one dimension of its mesh, and Replicate() in others, "
                f"got {checks.shown(list(placements))}"
            )
        mesh, name = tensor.device_mesh, spread[0]
        here = mesh if mesh.ndim == 1 else mesh.get_group(name)
        if found is not None and here != found:
            raise ValueError(f"{function}: DTensors must be spread over one mesh, got {found} and {here}")
        found = here
    return found
