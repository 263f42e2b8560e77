"""Experts that are spread over ranks: rows travel to the rank of their expert and back.

A rank has consecutive experts, as many as `Shard(0)` gives it, in parameters that are DTensors. Rows of an expert
arrive in the order of their ranks, in which one process with the tokens of all ranks has them too: so sums over them
have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..core import autocast, checks
from ..ops import Routing, combine, dispatch
from ._agreement import Agreement, gathered_numbers
from ._collectives import exchange_rows
from ._groups import Group, Team, eager, find_team, is_dtensor, local_tensor


class Spread:
    """How E experts are spread over the processes of a group.

    Attributes:
        mesh: the processes, as a DeviceMesh of one dimension.
        team: the same.
        begins: the first expert of each rank, and behind them E.
        average: gradients of the experts are divided by the number of ranks, as DDP and FSDP divide all others.
        check: whether ranks compare D and dtype before rows travel.
    """

    def __init__(
        self, function: str, group: Group, team: Team, experts: int, average: bool, check: bool, device: Any
    ) -> None:
        self.team = team
        self.average = checks.flag(function, "average", average)
        self.check = checks.flag(function, "check", check)
        self.mesh = group if isinstance(group, DeviceMesh) else _mesh(team.group, device)
        size = -(-experts // team.size)
        self.begins = [min(rank * size, experts) for rank in range(team.size + 1)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Spread:
        """A group is no thing to copy."""
        return self

    @property
    def here(self) -> range:
        """The experts of this rank."""
        return range(*self.begins[self.team.rank : self.team.rank + 2])

    def parameter(self, whole: tuple[int, ...], **options: Any) -> nn.Parameter:
        """One of the shape `whole`, of which this rank has the rows of its experts."""
        return nn.Parameter(self.spread(torch.empty(len(self.here), *whole[1:], **options), whole))

    def spread(self, part: Tensor, whole: tuple[int, ...]) -> Tensor:
        """The DTensor of the shape `whole` of which this rank has a part."""
        from torch.distributed.tensor import DTensor, Shard

        stride = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(part, self.mesh, [Shard(0)], run_check=False, shape=torch.Size(whole), stride=stride)

    def part(self, weight: Tensor) -> Tensor:
        """What this rank has of a parameter; its gradient is the sum over ranks, or their mean."""
        if not is_dtensor(weight):  # of all experts, put in by torch.func.functional_call
            return weight[self.here.start : self.here.stop]
        local: Tensor = local_tensor(weight)
        if self.average and local.requires_grad:
            local.register_hook(lambda gradient: gradient / self.team.size)
        return local


def find_spread(function: str, group: Group, experts: int, average: bool, check: bool, device: Any) -> Spread | None:
    """None for a group of one process, or without one. `device`: of the parameters."""
    team = None if group is None else find_team(function, group)
    return None if team is None else Spread(function, group, team, experts, average, check, device)


@eager
def apply_experts(
    function: Callable[[Tensor, Tensor | Routing], Tensor],
    rows: Tensor,
    offsets: Tensor | Routing,
    spread: Spread,
    backend: str,
) -> Tensor:
    """Send rows to the ranks of their experts, apply these, and bring back what they made of each.

    Args:
        function: the experts of this rank on tokens, as their routing says.
        rows: (R, D) by expert, or tokens (T, D).
        offsets: (E + 1,) where the rows of each expert begin; or the routing of the tokens.
        spread: which rank has which experts.
        backend: as in `dispatch`.
    """
    team = spread.team
    (rows,) = autocast.cast(rows)
    with Agreement("Experts", team, spread.check) as agreed:
        if isinstance(offsets, Routing):
            rows, offsets = dispatch(rows, offsets, backend=backend), offsets.offsets
        checks.check_matrix("Experts", "rows", rows)
        checks.check_index("Experts", "offsets", offsets, spread.begins[-1] + 1, "rows", rows)
        agreed.compare(rows, rows, experts=spread.begins[-1])
    if spread.check:
        rows, _ = agreed.with_gradients(rows, rows)
    counts = gathered_numbers(offsets.diff().tolist(), team)
    owners = list(zip(spread.begins, spread.begins[1:], strict=False))
    sent = [sum(counts[team.rank][begin:end]) for begin, end in owners]
    arriving = [row[spread.here.start : spread.here.stop] for row in counts]
    received = [sum(row) for row in arriving]
    total = sum(sent)
    arrived = exchange_rows(rows[:total], received, sent, team)
    if len(spread.here):
        expert = torch.arange(len(spread.here), device=rows.device).repeat(team.size)
        expert = expert.repeat_interleave(torch.tensor(arriving, device=rows.device).flatten())
        gates = torch.ones((len(expert), 1), dtype=checks.accumulator(rows.dtype), device=rows.device)
        routing = Routing.from_choices(expert[:, None], gates, len(spread.here), backend=backend)
        arrived = combine(function(arrived, routing), routing, backend=backend)
    else:  # no expert and no row, but parameters with a gradient
        arrived = function(arrived, offsets.new_zeros(1))
    out = exchange_rows(arrived, sent, received, team)
    return out if total == rows.shape[0] else torch.cat([out, out.new_zeros((rows.shape[0] - total, out.shape[1]))])


def spread_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of experts that are spread over ranks, by name: those that DDP and FSDP must leave alone.

    Examples:
        >>> from contrastive_ops.moe import SparseMoE
        >>> spread_parameters(SparseMoE(8, 16, experts=4))                 # of one process: none
        {}
    """
    experts = {module for module in model.modules() if getattr(module, "spread", None) is not None}
    spread = {id(parameter) for module in experts for parameter in module.parameters()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in spread}


def _mesh(group: dist.ProcessGroup, device: Any) -> DeviceMesh:
    kind = torch.device(torch.get_default_device() if device is None else device).type
    if kind == "meta":  # of what will be there: what the group is for
        kinds = [each.type for each in group._device_types]
        kind = "cuda" if "cuda" in kinds and torch.cuda.is_available() else "cpu"
    return DeviceMesh.from_group(group, kind)
