"""The best entries of lists: which of them stay when a list is cut down to its k best, and how they are sorted.

An entry is a score and a column. Lists are in the order of columns, so of equal scores the first is the best; scores
are never NaN, and -inf stands for no entry.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NO_COLUMN: tl.constexpr = tl.constexpr((1 << 31) - 1)

# ---- Keys ------------------------------------------------------------------------------------------------------------


@triton.jit
def _rank(score):
    """uint32 in the order of the scores; zeros of both signs are equal."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
    return bits ^ tl.where(bits >> 31 != 0, 0xFFFFFFFF, 0x80000000)


@triton.jit
def _score(rank):
    """The inverse of `_rank`."""
    return (rank ^ tl.where(rank >> 31 != 0, 0x80000000, 0xFFFFFFFF)).to(tl.float32, bitcast=True)


def best(scores: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (scores, columns), at most k per row: score descending, then column ascending; -inf and -1 for none.

    Sorts keys of 64 bits that are in this order and differ, so that nothing depends on how ties are treated.
    """
    bits = scores.masked_fill(scores == 0.0, 0.0).view(torch.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    key |= 0xFFFFFFFF - columns.long()
    # A sort is the faster of the two where it keeps everything.
    key = key.sort(1, descending=True)[0] if key.shape[1] <= k else key.topk(k)[0]
    code = (key >> 32).to(torch.int32)
    scores = (code ^ ((code >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return scores, (0xFFFFFFFF - (key & 0xFFFFFFFF)).masked_fill(scores == -torch.inf, -1)


# ---- Lists in memory -------------------------------------------------------------------------------------------------


@triton.jit
def append(scores, columns, at, capacity, score, column, counts):
    """Write the scores of a tile above -inf to the lists `at` of its rows, in the order of columns; return new counts.

    One score of every row at a time: nothing but the tile has to be in registers, and rarely a row has two.
    """
    begin = at * capacity
    first = tl.min(tl.where(score > float("-inf"), column, _NO_COLUMN), 1)
    while tl.min(first, 0) < _NO_COLUMN:
        own = column == first[:, None]
        found = first < _NO_COLUMN
        value = tl.max(tl.where(own, score, float("-inf")), 1)
        tl.store(scores + begin + counts, value, mask=found)
        tl.store(columns + begin + counts, first, mask=found)
        counts += found.to(tl.int32)
        score = tl.where(own, float("-inf"), score)
        first = tl.min(tl.where(score > float("-inf"), column, _NO_COLUMN), 1)
    return counts


@triton.jit
def _last_rank(ranks, k):
    """The k-th largest of each row, bit by bit from the highest."""
    last = tl.zeros((ranks.shape[0],), tl.uint32)
    bit = tl.full((ranks.shape[0],), 0x80000000, tl.uint32)
    for _ in range(32):
        reached = tl.sum((ranks >= (last | bit)[:, None]).to(tl.int32), 1)
        last = tl.where(reached >= k, last | bit, last)
        bit = bit >> 1
    return last


@triton.jit
def shrink(
    scores,  # (.., capacity) float32
    columns,  # (.., capacity) int32
    counts,  # int32 of each list
    thresholds,  # float32 of each list: what a score must exceed to be of interest
    first,  # the first list of this program; the lists of its next rows are `step` apart
    step,
    capacity,
    k,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,  # rows at a time
    SPAN: tl.constexpr,  # the power of two that a whole list fits in
    PIECE: tl.constexpr,  # entries at a time, where they are moved
):
    """Leave the k best of each list in their order, and raise thresholds to the last of them."""
    for row in range(0, ROWS, GROUP):
        at = first + (row + tl.arange(0, GROUP)).to(tl.int64) * step
        count = tl.load(counts + at)
        begin = (at * capacity)[:, None]
        entry = tl.arange(0, SPAN)[None, :]
        ranks = _rank(tl.load(scores + begin + entry, mask=entry < count[:, None], other=float("-inf")))
        last = _last_rank(ranks, k)
        ties_left = k - tl.sum((ranks > last[:, None]).to(tl.int32), 1)
        kept = tl.zeros_like(count)
        for piece in range(0, tl.max(count, 0), PIECE):
            moved = piece + tl.arange(0, PIECE)[None, :]
            inside = moved < count[:, None]
            score = tl.load(scores + begin + moved, mask=inside, other=float("-inf"))
            column = tl.load(columns + begin + moved, mask=inside, other=0)
            rank = _rank(score)
            tie = (inside & (rank == last[:, None])).to(tl.int32)
            stays = (tl.cumsum(tie, 1) <= ties_left[:, None]) & (tie != 0)
            stays |= inside & (rank > last[:, None])
            place = kept[:, None] + tl.cumsum(stays.to(tl.int32), 1) - 1
            tl.debug_barrier()  # entries move to where others were just read
            tl.store(scores + begin + place, score, mask=stays)
            tl.store(columns + begin + place, column, mask=stays)
            ties_left -= tl.sum(tie, 1)
            kept += tl.sum(stays.to(tl.int32), 1)
        tl.store(counts + at, kept)
        # Of fewer than k entries the last is -inf.
        tl.store(thresholds + at, tl.maximum(tl.load(thresholds + at), _score(last)))


@triton.jit
def pad(scores, at, capacity, counts, length):
    """Write that there is no entry behind those that there are, up to `length`."""
    for entry in range(0, length, 32):
        place = entry + tl.arange(0, 32)[None, :]
        none = tl.full((at.shape[0], 32), float("-inf"), tl.float32)
        tl.store(scores + (at * capacity)[:, None] + place, none, mask=(place >= counts[:, None]) & (place < length))
