"""Collectives over rows that are spread unevenly, differentiable; each is the derivative of the other.

They are made of two functional collectives, which torch.compile traces. Sums over ranks are made where they belong, in
the order of the ranks and in the accumulation dtype: their bits depend neither on the algorithm of a backend nor on
timing, and 16-bit gradients travel in 16 bits without being added up in 16 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ._groups import Shards, Team


def gather_rows(x: Tensor, shards: Shards) -> Tensor:
    """The rows of all ranks; the gradient of each is summed over the ranks and returned to the one that holds it."""
    return _Gather.apply(x, shards)


def sum_to_owners(x: Tensor, shards: Shards) -> Tensor:
    """(local rows, ...) the sum over ranks of what each of them has for the rows of this one."""
    return _SumToOwners.apply(x, shards)


def send_to_owners(values: Tensor, shards: Shards) -> Tensor:
    """(ranks, local rows, ...) what each rank has for the rows of this one; `values` (all rows, ...) are for all."""
    ranks, rows = shards.team.size, shards.local
    arrived = exchange_rows(values, [rows] * ranks, shards.sizes, shards.team)
    return arrived.view(ranks, rows, *values.shape[1:])


def exchange_rows(x: Tensor, received: Sequence[int], sent: Sequence[int], team: Team) -> Tensor:
    """(sum of `received`, ...) rows from all ranks in their order; x (sum of `sent`, ...) has those for all ranks."""
    return _Exchange.apply(x, tuple(received), tuple(sent), team)


def sum_over_ranks(values: Tensor, team: Team) -> Tensor:
    """The sum of what each rank has, in the order of the ranks; on all of them."""
    return gather_rows(values[None], Shards(team, (1,) * team.size)).sum(0)


def start_hop(x: Tensor, team: Team, sizes: tuple[int, int]) -> Tensor:
    """Send `x` to the next rank and receive what the last one sends; `finish_hop` waits for it.

    Args:
        x: (S, ...) contiguous.
        team: the ring.
        sizes: (S, R), the rows that are sent and received.
    """
    sent, received = [0] * team.size, [0] * team.size
    sent[(team.rank + 1) % team.size], received[(team.rank - 1) % team.size] = sizes
    with failures_named(team):
        return _all_to_all(_as_bytes(x), received, sent, team)


def finish_hop(started: Tensor, like: Tensor, team: Team) -> Tensor:
    """Wait for what `start_hop` receives: rows as those of `like`."""
    return _from_bytes(_wait(started, team), like)


@contextlib.contextmanager
def failures_named(team: Team) -> Iterator[None]:
    """Say what a broken connection or a timeout means."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"contrastive_ops.distributed: the exchange of rank {team.rank} with the rest of its group "
            f"failed: one of them has ended, raised an error or does not take part\n  {str(error).splitlines()[0]}"
        ) from error


# ---- With autograd ---------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return _all_gather(x.detach(), shards)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_to_owners(gradient, ctx.shards), None


class _SumToOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        parts = _to_owners(x.detach(), shards)
        return parts.sum(0, dtype=checks.accumulator(x.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gather_rows(gradient, ctx.shards), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, received: tuple[int, ...], sent: tuple[int, ...], team: Team) -> Tensor:
        ctx.sizes, ctx.team = (received, sent), team
        return _exchange(x.detach(), received, sent, team)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent = ctx.sizes
        return exchange_rows(gradient, sent, received, ctx.team), None, None, None


# ---- Without ---------------------------------------------------------------------------------------------------------


def _all_gather(x: Tensor, shards: Shards) -> Tensor:
    """Ranks with fewer rows than the largest fill up, because a gather takes equal parts."""
    team, sizes = shards.team, shards.sizes
    largest = max(sizes)
    padded = x if x.shape[0] == largest else torch.cat([x, x.new_zeros((largest - x.shape[0], *x.shape[1:]))])
    sent = _as_bytes(padded)
    with failures_named(team):
        started = torch.ops._c10d_functional.all_gather_into_tensor(sent, team.size, team.group.group_name)
    gathered = _from_bytes(_wait(started, team), x)
    if len(set(sizes)) == 1:
        return gathered
    return torch.cat([part[:size] for part, size in zip(gathered.split(largest), sizes, strict=True)])


def _to_owners(x: Tensor, shards: Shards) -> Tensor:
    ranks, rows = shards.team.size, shards.local
    received = _exchange(x, [rows] * ranks, shards.sizes, shards.team)
    return received.view(ranks, rows, *x.shape[1:])


def _exchange(x: Tensor, received: Sequence[int], sent: Sequence[int], team: Team) -> Tensor:
    with failures_named(team):
        started = _all_to_all(_as_bytes(x), received, sent, team)
    return _from_bytes(_wait(started, team), x)


def _all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], team: Team) -> Tensor:
    found: Tensor = torch.ops._c10d_functional.all_to_all_single(x, list(received), list(sent), team.group.group_name)
    return found


def _wait(started: Tensor, team: Team) -> Tensor:
    with failures_named(team):
        found: Tensor = torch.ops._c10d_functional.wait_tensor(started)
    return found


def _as_bytes(x: Tensor) -> Tensor:
    """Not every backend knows every dtype of 16 bits; what travels is not computed with."""
    x = x.contiguous()
    if x.dtype not in (torch.bfloat16, torch.float16):
        return x
    return x.unsqueeze(-1).view(torch.uint8)


def _from_bytes(x: Tensor, like: Tensor) -> Tensor:
    return x if x.dtype == like.dtype else x.view(like.dtype).squeeze(-1)
