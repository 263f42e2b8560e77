"""expert_routing by CUDA kernels: launchers with the names and arguments of reference/expert_routing.py.

Blocks and parts depend on the problem alone, every number has one writer, and sums are made in a fixed order: all
results have the same bits in every run and on every GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.cuda_kernels import kernels
from ..core.routing import ScoreSpec, SlotSpec

# Most blocks that sums are made in, and the numbers that their tables have in all, with which there are fewer.
PARTS, TABLES = 1024, 1 << 21
# Bytes of shared memory that a block may use for its sums.
SHARED = 64 << 10
# Experts of a thread in one run; threads of a block in which each warp has tokens of its own.
RUN, THREADS = 8, 128
MOST_EXPERTS = 4096
# Choices that a warp places, and the experts for which a block that places some has room.
WARP_ITEMS, MOST_PLACED = 256, 8192
# What kernels that make losses and their slopes have room for; csrc/cuda/expert_routing_losses.h has the same numbers.
MOST_LOSSES, MOST_NUMBERS, MOST_SEGMENTS = 12, 256, 64


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if each is None else each.contiguous() for each in tensors]


# ---- Scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Team:
    """The threads that work on one token; csrc/cuda/expert_routing_token.h has a kernel for each."""

    lanes: int
    items: int  # experts of a thread

    @classmethod
    def of(cls, function: str, experts: int) -> _Team:
        """The team for so many experts."""
        runs = -(-experts // RUN)
        if runs <= 32:
            return cls(_power_of_two(runs), RUN)
        if runs <= 128:
            return cls(32, RUN * _power_of_two(-(-runs // 32)))
        if experts > MOST_EXPERTS:
            raise NotImplementedError(
                f"{function}: backend 'cuda' has no kernel for more than {MOST_EXPERTS} experts, got {experts}\n"
                '  use backend="reference"'
            )
        return cls(32 * -(-experts // 512), 16)

    @property
    def tokens(self) -> int:
        """Tokens that a block has at once."""
        return max(THREADS // self.lanes, 1) if self.lanes <= 32 else 1

    @property
    def tables(self) -> int:
        """Tables of a block: one of each warp that has tokens of its own."""
        return THREADS // 32 if self.lanes <= 32 else 1


def _power_of_two(n: int) -> int:
    """The next one."""
    return 1 << max(n - 1, 0).bit_length()


def scores(
    logits: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    given: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    spec: Sequence[int],
    sigma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (experts, gates, priority, sums, totals, choices, tokens, margin); see `Routing` and `Statistics`."""
    s, experts = ScoreSpec(*spec), logits.shape[1]

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    sums, totals, margin = numbers(3, s.segments, experts), numbers(2, s.segments), numbers(s.segments)
    choices, routed = numbers(s.segments, experts, dtype=torch.int64), numbers(s.segments, dtype=torch.int64)
    found = _Sums(sums, totals, choices, routed, margin)
    rules = (bias, allowed, given, segment, valid)
    chosen, gates, priority = _scores(logits, noise, rules, s, sigma, found, None, None, [], [])
    return chosen, gates, priority, *found


class _Sums(NamedTuple):
    """What the scores are summed to."""

    sums: Tensor
    totals: Tensor
    choices: Tensor
    tokens: Tensor
    margin: Tensor

    @classmethod
    def of(cls, floating: Tensor, integers: Tensor, segments: int, experts: int) -> _Sums:
        """Parts of the vectors that `Statistics.unpack` takes."""
        cells = segments * experts
        sums, totals, margin = floating.split([3 * cells, 2 * segments, segments])
        choices, _, tokens = integers.split([cells, cells, segments])
        return cls(sums, totals, choices, tokens, margin)


class _Losses(NamedTuple):
    """Where the kernels write losses, and what else they write there."""

    values: Tensor
    total: Tensor
    kept: Tensor  # which becomes 0


def _scores(
    logits: Tensor,
    noise: Tensor | None,
    rules: Sequence[Tensor | None],
    s: ScoreSpec,
    sigma: float,
    found: _Sums,
    losses: _Losses | None,
    state: Tensor | None,
    wanted: list[int],
    numbers: list[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (experts, gates, priority), and write sums and losses. `state` becomes 0, for what follows."""
    (tokens, experts), team = logits.shape, _Team.of("scores", logits.shape[1])
    if s.load and noise is None:
        raise NotImplementedError("scores: backend 'cuda' has the load loss only with noise")

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    kinds = 1 + (noise is not None) + bool(s.load)
    cells = s.segments * experts
    width, table = kinds * cells + 3 * s.segments, s.segments * (kinds * team.lanes * team.items + 3)
    in_shared = 4 * (team.tables * table + cells + s.segments) <= SHARED
    per_part = width if in_shared else width + team.tables * table
    # One at least, which writes that there are no tokens.
    parts = max(min(PARTS, max(TABLES // per_part, 16), -(-tokens // team.tokens)), 1)
    tables = None if in_shared else empty(parts, team.tables, table)
    chosen = empty(tokens, s.k, dtype=torch.int64)
    gates, priority = empty(tokens, s.k), empty(tokens)
    written = (None,) * 3 if losses is None else (losses.kept, losses.values, losses.total)
    kernels().cuda_expert_routing_scores(
        *_dense(logits, noise, *rules), chosen, gates, priority, *found, *written, state,
        empty(parts, width, dtype=torch.float64), empty(parts, cells + s.segments, dtype=torch.int32), tables,
        [int(each) for each in s], [team.lanes, team.items, parts, kinds, 0 if state is None else state.numel()],
        wanted, numbers, tokens, experts, float(sigma),
    )  # fmt: skip
    return chosen, gates, priority


def scores_backward(
    logits: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    spec: Sequence[int],
    sigma: float,
    experts: Tensor,
    d_gates: Tensor,
    d_sums: Tensor,
    d_totals: Tensor,
) -> Tensor:
    """Gradient by the logits, in float32, of a total that is linear in the outputs of `scores`."""
    dlogits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    problem = (logits, noise, allowed, segment, valid, experts, d_gates)
    _gradient(problem, (d_sums, d_totals, *(None,) * 6), dlogits, spec, [], [], sigma)
    return dlogits


def _gradient(
    problem: Sequence[Tensor | None],
    upstream: Sequence[Tensor | None],
    dlogits: Tensor,
    spec: Sequence[int],
    losses: list[int],
    numbers: list[float],
    sigma: float,
) -> None:
    team = _Team.of("scores_backward", dlogits.shape[1])
    kernels().cuda_expert_routing_scores_backward(
        *_dense(*problem, *upstream), dlogits, [int(each) for each in ScoreSpec(*spec)], [team.lanes, team.items],
        losses, numbers, *dlogits.shape, float(sigma),
    )  # fmt: skip


# ---- Whole routers -------------------------------------------------------------------------------------------------


def _has_room(s: ScoreSpec, experts: int, noise: bool, losses: Sequence[int], numbers: Sequence[float]) -> bool:
    """Whether kernels make the losses: what is told with a launch is short, and a block holds all slopes."""
    slopes = (1 + noise + bool(s.load)) * s.segments * experts + 2 * s.segments
    few = s.segments <= MOST_SEGMENTS and len(losses) <= 4 * MOST_LOSSES and len(numbers) <= MOST_NUMBERS
    return few and 4 * slopes <= SHARED


def route(
    logits: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    given: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    spec: Sequence[int],
    sigma: float,
    places: Sequence[int],
    by_gate: bool,
    losses: Sequence[int],
    numbers: Sequence[float],
) -> tuple[Tensor, ...] | None:
    """Scores, slots and losses, as the operator returns them; None where kernels have no room for the losses."""
    s, experts, device = ScoreSpec(*spec), logits.shape[1], logits.device
    if not _has_room(s, experts, noise is not None, losses, numbers):
        return None
    cells = s.segments * experts
    floating = torch.empty(3 * (cells + s.segments), dtype=torch.float32, device=device)
    integers = torch.empty(2 * cells + s.segments, dtype=torch.int64, device=device)
    size = sum(1 if pooled else s.segments for pooled in losses[1::4])
    values, total = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((size,), ()))
    state = torch.empty(3, dtype=torch.int32, device=device)  # a ticket of the losses, and what places begin with
    found = _Sums.of(floating, integers, s.segments, experts)
    written = _Losses(values, total, integers[cells : 2 * cells])
    rules = (bias, allowed, given, segment, valid)
    wanted, told = [int(each) for each in losses], [float(each) for each in numbers]
    chosen, gates, first = _scores(logits, noise, rules, s, sigma, found, written, state, wanted, told)
    priority = first if by_gate else None
    placed = _slots(chosen, priority, segment, SlotSpec(*places), written.kept, state[1:])
    return chosen, gates, *placed, values, total, floating, integers


def route_backward(
    logits: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    spec: Sequence[int],
    sigma: float,
    losses: Sequence[int],
    numbers: Sequence[float],
    experts: Tensor,
    sums: Tensor,
    counts: Tensor,
    d_gates: Tensor | None,
    d_values: Tensor | None,
    d_total: Tensor | None,
) -> Tensor | None:
    """The gradient by the logits in their dtype; None where kernels have no room for the losses."""
    s = ScoreSpec(*spec)
    if not _has_room(s, logits.shape[1], noise is not None, losses, numbers):
        return None
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    found = _Sums.of(sums, counts, s.segments, logits.shape[1])[:4]
    problem = (logits, noise, allowed, segment, valid, experts, d_gates)
    wanted, told = [int(each) for each in losses], [float(each) for each in numbers]
    _gradient(problem, (None, None, *found, d_values, d_total), dlogits, spec, wanted, told, sigma)
    return dlogits


# ---- Slots ---------------------------------------------------------------------------------------------------------


def slots(
    experts: Tensor, priority: Tensor | None, segment: Tensor | None, spec: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (slots (T, k), order (R,), offsets (E + 1,), kept (S, E)); see `Routing`."""
    s = SlotSpec(*spec)
    cells = s.segments * s.experts
    cleared = torch.zeros(cells + 1, dtype=torch.int64, device=experts.device)
    kept, state = cleared[:cells].view(s.segments, s.experts), cleared[cells:].view(torch.int32)
    return *_slots(experts, priority, segment, s, kept, state), kept


def _slots(
    experts: Tensor, priority: Tensor | None, segment: Tensor | None, s: SlotSpec, kept: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same but for `kept`, which is added to; `state` is two zeros."""
    tokens, k = experts.shape
    groups, device = s.groups(tokens), experts.device
    if tokens * k >= 1 << 31:
        raise NotImplementedError(f"slots: backend 'cuda' places fewer than 2^31 choices, got {tokens} tokens and {k=}")
    if s.experts > MOST_PLACED:
        raise NotImplementedError(
            f"slots: backend 'cuda' has no room for more than {MOST_PLACED} experts, got {s.experts}\n"
            '  use backend="reference"'
        )
    items = tokens * k // max(groups, 1) if s.capacity >= 0 else tokens * k
    warps = min(_warps(s.experts), _power_of_two(-(-items // WARP_ITEMS)))
    blocks = (max(-(-each // (warps * WARP_ITEMS)), 1) for each in (items, tokens * k))
    of_groups, of_all = blocks
    lists = tokens * k * ((s.capacity >= 0) + bool(s.padded))
    size = lists + s.experts * (2 * max(groups, 1) + max(groups * of_groups, of_all))
    memory = torch.empty(size, dtype=torch.int32, device=device)
    rows = s.rows(tokens, k)
    places, order, offsets = (
        torch.empty(shape, dtype=torch.int64, device=device) for shape in ((tokens, k), (rows,), (s.experts + 1,))
    )
    kernels().cuda_expert_routing_slots(
        *_dense(experts, priority, segment), places, order, offsets, kept, memory, state, [int(each) for each in s],
        [groups, tokens, k, rows, warps],
    )  # fmt: skip
    return places, order, offsets


def _warps(experts: int) -> int:
    """Warps of a block that places choices: each has a table of the experts in shared memory."""
    return max(min(16, 8192 // _power_of_two(experts)), 1)


# ---- Moving rows ---------------------------------------------------------------------------------------------------


def dispatch(tokens: Tensor, gates: Tensor | None, slots: Tensor, order: Tensor) -> Tensor:
    """(R, D): each row the token that it was given to, times its gate if there are gates; 0 where there is none."""
    rows = tokens.new_empty((order.shape[0], tokens.shape[1]))
    kernels().cuda_expert_routing_dispatch(*_dense(tokens, gates, order), rows, slots.shape[1], *rows.shape)
    return rows


def combine(rows: Tensor, gates: Tensor | None, slots: Tensor, order: Tensor) -> Tensor:
    """(T, D): each token's rows, times their gates if there are gates, summed in the order of its choices."""
    T, k = slots.shape
    tokens = rows.new_empty((T, rows.shape[1]))
    kernels().cuda_expert_routing_combine(*_dense(rows, gates, slots), tokens, T, k, rows.shape[1])
    return tokens


def dots(tokens: Tensor, rows: Tensor, slots: Tensor, order: Tensor) -> Tensor:
    """(T, k): inner product of each token with each of its rows, 0 where it has none."""
    products = torch.empty(slots.shape, dtype=torch.float32, device=tokens.device)
    kernels().cuda_expert_routing_dots(*_dense(tokens, rows, slots), products, *slots.shape, tokens.shape[1])
    return products
