"""expert_routing by CUDA kernels: launchers with the names and arguments of reference/expert_routing.py.

Blocks and parts depend on the problem alone, every number has one writer, and sums are made in a fixed order: all
results have the same bits in every run and on every GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    s = ScoreSpec(*spec)
    (tokens, experts), team = logits.shape, _Team.of("scores", logits.shape[1])
    if s.load and noise is None:
        raise NotImplementedError("scores: backend 'cuda' has the load loss only with noise")

    def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    kinds = 1 + (noise is not None) + bool(s.load)
    cells = s.segments * experts
    width, table = kinds * cells + 3 * s.segments, s.segments * (kinds * team.lanes * team.items + 3)
    in_shared = 4 * (team.tables * table + cells + s.segments) <= SHARED
    per_part = width if in_shared else width + team.tables * table
    parts = min(PARTS, max(TABLES // per_part, 16), -(-tokens // team.tokens))
    tables = None if in_shared else numbers(parts, team.tables, table)

    integer = torch.int64
    chosen, gates, priority = numbers(tokens, s.k, dtype=integer), numbers(tokens, s.k), numbers(tokens)
    sums, totals, margin = numbers(3, s.segments, experts), numbers(2, s.segments), numbers(s.segments)
    choices, routed = numbers(s.segments, experts, dtype=integer), numbers(s.segments, dtype=integer)
    kernels().cuda_expert_routing_scores(
        *_dense(logits, noise, bias, allowed, given, segment, valid), chosen, gates, priority, sums, totals, choices,
        routed, margin, numbers(parts, width, dtype=torch.float64),
        numbers(parts, cells + s.segments, dtype=torch.int32), tables, [int(each) for each in s],
        [team.lanes, team.items, parts, kinds], tokens, experts, float(sigma),
    )  # fmt: skip
    return chosen, gates, priority, sums, totals, choices, routed, margin


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
    team = _Team.of("scores_backward", logits.shape[1])
    dlogits = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    kernels().cuda_expert_routing_scores_backward(
        *_dense(logits, noise, allowed, segment, valid, experts, d_gates, d_sums, d_totals), dlogits,
        [int(each) for each in ScoreSpec(*spec)], [team.lanes, team.items], *logits.shape, float(sigma),
    )  # fmt: skip
    return dlogits


# ---- Slots ---------------------------------------------------------------------------------------------------------


def slots(
    experts: Tensor, priority: Tensor | None, segment: Tensor | None, spec: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (slots (T, k), order (R,), offsets (E + 1,), kept (S, E)); see `Routing`."""
    s = SlotSpec(*spec)
    tokens, k = experts.shape
    groups, device = s.groups(tokens), experts.device
    if tokens * k >= 1 << 31:
        raise NotImplementedError(f"slots: backend 'cuda' places fewer than 2^31 choices, got {tokens} tokens and {k=}")
    places = torch.empty((tokens, k), dtype=torch.int64, device=device)
    kept = torch.zeros((s.segments, s.experts), dtype=torch.int64, device=device)
    rows = s.rows(tokens, k)
    if s.padded:
        order = torch.full((rows,), -1, dtype=torch.int64, device=device)
        offsets = torch.arange(s.experts + 1, device=device) * (groups * s.capacity)
    else:
        order = torch.empty((rows,), dtype=torch.int64, device=device)
        offsets = torch.empty(s.experts + 1, dtype=torch.int64, device=device)

    def place(turn: Tensor | None, groups: int, *, by_turn: bool, only_kept: bool = False) -> None:
        # Every block counts at least 256 choices of a group.
        blocks = groups * max(-(-(tokens // groups * k) // 256), 1)
        counts = torch.empty((blocks, s.experts), dtype=torch.int32, device=device)
        totals = torch.empty((groups, s.experts), dtype=torch.int32, device=device)
        rows_known = s.padded or not by_turn
        kernels().cuda_expert_routing_slots(
            *_dense(experts, turn, segment), places, order if rows_known else None, offsets, kept, counts, totals,
            [int(each) for each in s], [groups, tokens, k, rows], by_turn, only_kept,
        )  # fmt: skip

    if s.capacity >= 0 and tokens > 0:
        place(None if priority is None else _turns(priority, groups), groups, by_turn=True)
    if not s.padded:
        place(None, 1, by_turn=False, only_kept=s.capacity >= 0)
    return places, order, offsets, kept


def _turns(priority: Tensor, groups: int) -> Tensor:
    """(groups, T / groups): tokens of each group by priority, NaN last, then in order."""
    first = priority.masked_fill(priority.isnan(), -torch.inf).view(groups, -1)
    return first.argsort(dim=1, descending=True, stable=True)


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
