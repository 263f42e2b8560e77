"""What a tile is folded to, how parts of a fold merge, and what a fold's derivative is.

A fold so far is a pair of numbers per row (or column), and both are 0 before its first pair, so that memory filled with
zeros holds folds of nothing:

    logsumexp   a number `top`, less than 1 above the maximum, and the sum of exp(l - top)
    max         the maximum, and 1 + its index
    others      their sum, and nothing

`top` is a whole number, so that where logits exceed all before them again and again, a sum is rescaled seldom, and what
rescaling rounds is smaller every time.

Merging does not depend on who met a pair: ties of a maximum go to the smaller index, and NaN beats every number.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from contrastive_ops.core.problem import KINDS

LOGSUMEXP = tl.constexpr(KINDS.index("logsumexp"))
MAX = tl.constexpr(KINDS.index("max"))
SUM_SOFTPLUS = tl.constexpr(KINDS.index("sum_softplus"))
SUM_RELU = tl.constexpr(KINDS.index("sum_relu"))
SUM = tl.constexpr(KINDS.index("sum"))
COUNT = tl.constexpr(KINDS.index("count"))
# The weighted sum of a list's logits, and sums that gradients are made of: what is in the tile is added as it is.
PLAIN = tl.constexpr(len(KINDS))

LOG2_E = tl.constexpr(1.4426950408889634)
# Parts of what earlier launches found; those of a launch are behind them.
FOUND = tl.constexpr(2)


class TileFold(NamedTuple):
    """A fold as kernels see it, compile-time.

    Attributes:
        kind: one of the numbers above.
        set: the logit set.
        cols: one result per column, not per row.
    """

    kind: int
    set: int
    cols: bool


def planes(kind: int) -> int:
    """How many numbers a part of a fold has."""
    return 2 if kind in (KINDS.index("logsumexp"), KINDS.index("max")) else 1


# ---- One tile --------------------------------------------------------------------------------------------------------


@triton.jit
def log_of_1_plus(u):
    """log(1 + u) for u from 0 to 1, with its relative accuracy where it is small: it is 2 atanh(u / (2 + u))."""
    s = u / (2.0 + u)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return 2.0 * s * series


@triton.jit
def softplus(z):
    """log(1 + exp(z)), exact on both sides."""
    return tl.where(z < 0, 0.0, z) + log_of_1_plus(tl.exp2(-tl.abs(z) * LOG2_E))


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + tl.exp2(-z * LOG2_E))


@triton.jit
def finite_or_zero(m):
    """What is subtracted from logits before exp: infinities would turn into NaN."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def tile_part(z, index, KIND: tl.constexpr, AXIS: tl.constexpr):
    """Fold a tile along an axis.

    Args:
        z: logits, -inf for pairs that take no part (0 for `PLAIN`).
        index: int32, of the pairs along the axis; broadcasts to the tile.
    """
    if KIND == LOGSUMEXP:
        first = tl.ceil(tl.max(z, AXIS))
        second = tl.sum(tl.exp2((z - tl.expand_dims(finite_or_zero(first), AXIS)) * LOG2_E), AXIS)
    elif KIND == MAX:
        nan = z != z
        any_nan = tl.max(nan.to(tl.int32), AXIS) > 0
        first = tl.max(tl.where(nan, float("-inf"), z), AXIS)
        best = tl.where(tl.expand_dims(any_nan, AXIS), nan, z == tl.expand_dims(first, AXIS))
        second = 1 + tl.min(tl.where(best, index, 2147483646), AXIS)
        second = tl.where(any_nan | (first != float("-inf")), second, 0)
        first = tl.where(any_nan, float("nan"), first)
    else:
        if KIND == SUM_SOFTPLUS:
            z = softplus(z)
        elif KIND == SUM_RELU:
            z = tl.where(z < 0, 0.0, z)
        elif KIND == SUM:
            z = tl.where(z == float("-inf"), 0.0, z)
        elif KIND == COUNT:
            z = (z != float("-inf")).to(tl.float32)
        first = tl.sum(z, AXIS)
        second = tl.zeros_like(first)
    return first, second


@triton.jit
def add_slope(e, z, rows, cols, fold, size, value, argmax, d_value):
    """Add the derivative of the total through one fold by the logits z."""
    own = cols if fold.cols else rows
    upstream = tl.load(d_value + own, mask=own < size, other=0.0)
    if fold.kind == LOGSUMEXP:
        e += upstream * tl.exp2((z - tl.load(value + own, mask=own < size, other=0.0)) * LOG2_E)
    elif fold.kind == MAX:
        winner = tl.load(argmax + own, mask=own < size, other=-1)
        e += tl.where(winner == (rows if fold.cols else cols), upstream, 0.0)
    elif fold.kind == SUM_SOFTPLUS:
        e += upstream * sigmoid(z)
    elif fold.kind == SUM_RELU:
        e += tl.where(z > 0, upstream, 0.0)
    else:
        e += upstream
    return e


@triton.jit
def empty_part(KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The fold of no pair."""
    return tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32 if KIND == MAX else tl.float32)


@triton.jit
def merge_parts(one, other, KIND: tl.constexpr):
    """The fold of the pairs of both."""
    a, b = one
    c, d = other
    if KIND == LOGSUMEXP:
        a = tl.where(b == 0, float("-inf"), a)
        c = tl.where(d == 0, float("-inf"), c)
        first = tl.maximum(a, c)
        top = finite_or_zero(first)
        second = b * tl.exp2((a - top) * LOG2_E) + d * tl.exp2((c - top) * LOG2_E)
    elif KIND == MAX:
        tie = (a == c) | ((a != a) & (c != c))
        larger = (c > a) | ((c != c) & (a == a))
        takes = (d != 0) & ((b == 0) | larger | (tie & (d < b)))
        first = tl.where(takes, c, a)
        second = tl.where(takes, d, b)
    else:
        first = a + c
        second = b
    return first, second


# ---- One tile after another ------------------------------------------------------------------------------------------
#
# A program carries a third number beside a part: what rounding took from its sum, so that no row of tiles is too long.
# Not for counts, which are exact, nor for lists, which are short next to rows: there are no registers left for them.


@triton.jit
def empty_carry(KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The fold of no pair."""
    part = empty_part(KIND, BLOCK)
    if KIND != MAX and KIND != COUNT and KIND != PLAIN:
        part = part + (tl.zeros([BLOCK], tl.float32),)
    return part


@triton.jit
def exact_sum(total, more, lost):
    """The sum of two numbers, and what rounding took from this sum and those before."""
    result = total + more
    added = result - total
    return result, lost + ((total - (result - added)) + (more - added))


@triton.jit
def with_lost(total, lost):
    """A sum with what rounding took from it; of an infinite sum that is NaN."""
    return tl.where(tl.abs(lost) < float("inf"), total + lost, total)


@triton.jit
def carry_on(carried, part, KIND: tl.constexpr):
    """The fold of what a program carries and of the next tile."""
    if KIND == LOGSUMEXP:
        a, b, lost = carried
        c, d = part
        a = tl.where(b == 0, float("-inf"), a)
        c = tl.where(d == 0, float("-inf"), c)
        first = tl.maximum(a, c)
        top = finite_or_zero(first)
        factor = tl.exp2((a - top) * LOG2_E)
        second, lost = exact_sum(b * factor, d * tl.exp2((c - top) * LOG2_E), lost * factor)
        result = (first, second, lost)
    elif KIND != MAX and KIND != COUNT and KIND != PLAIN:
        first, lost = exact_sum(carried[0], part[0], carried[2])
        result = (first, carried[1], lost)
    else:
        result = merge_parts(carried, part, KIND)
    return result


@triton.jit
def carried_part(carried, KIND: tl.constexpr):
    """What a program carried as a part."""
    part = carried
    if KIND == LOGSUMEXP:
        part = (carried[0], with_lost(carried[1], carried[2]))
    elif KIND != MAX and KIND != COUNT and KIND != PLAIN:
        part = (with_lost(carried[0], carried[2]), carried[1])
    return part


@triton.jit
def wide_part(part, KIND: tl.constexpr):
    """A part whose sum is float64: that of millions of pairs has so many parts that float32 drifts."""
    a, b = part
    if KIND == LOGSUMEXP:
        b = b.to(tl.float64)
    elif KIND != MAX:
        a = a.to(tl.float64)
    return a, b


@triton.jit
def narrow_part(part, KIND: tl.constexpr):
    """The inverse of `wide_part`, and a part of what rounding took: both merge to what was wide."""
    a, b = part
    lost_a, lost_b = tl.zeros_like(a), tl.zeros_like(b)
    if KIND == LOGSUMEXP:
        lost_a, lost_b = a, b - b.to(tl.float32).to(tl.float64)
        b, lost_b = b.to(tl.float32), tl.where(tl.abs(lost_b) < float("inf"), lost_b, 0.0).to(tl.float32)
    elif KIND != MAX:
        lost_a = a - a.to(tl.float32).to(tl.float64)
        a, lost_a = a.to(tl.float32), tl.where(tl.abs(lost_a) < float("inf"), lost_a, 0.0).to(tl.float32)
        lost_b = b
    return (a, b), (lost_a, lost_b)


@triton.jit
def merge_in_order(one, other, KIND: tl.constexpr):
    """`merge_parts` of a wide part and another one."""
    a, b = one
    c, d = other
    if KIND == LOGSUMEXP:
        a = tl.where(b == 0, float("-inf"), a)
        c = tl.where(d == 0, float("-inf"), c)
        first = tl.maximum(a, c)
        top = finite_or_zero(first)
        # Where the largest so far stays the largest, the factor is 1 and nothing is rounded.
        second = b * tl.exp2((a - top) * LOG2_E).to(tl.float64) + (d * tl.exp2((c - top) * LOG2_E)).to(tl.float64)
    elif KIND == MAX:
        first, second = merge_parts(one, other, KIND)
    else:
        first = a + c.to(tl.float64)
        second = b
    return first, second


# ---- Parts in memory -------------------------------------------------------------------------------------------------
#
# Per fold: [parts, planes, size]. Parts 0 and 1 are what earlier launches found, and what rounding took from it. Then,
# for folds that a program carries along its row of tiles, a part per span of columns; then, for folds across it, a part
# per block of rows of this launch. Where a matrix is compared with itself, each tile is read both ways, and every fold
# has both.


@triton.jit
def part_count(cols, spans, row_blocks, SELF: tl.constexpr):
    """The number of parts of a fold."""
    if SELF:
        count = FOUND + spans + row_blocks
    elif cols:
        count = FOUND + row_blocks
    else:
        count = FOUND + spans
    return count


@triton.jit
def fold_size(fold, N, M):
    """The number of results of a fold."""
    return (M if fold.cols else N).to(tl.int64)


@triton.jit
def part_size(fold, N, M):
    """The numbers in a part of a fold."""
    size = fold_size(fold, N, M)
    return size * 2 if fold.kind == LOGSUMEXP or fold.kind == MAX else size


@triton.jit
def part_at(partials, part, folds, N, M, spans, row_blocks, F: tl.constexpr, SELF: tl.constexpr):
    """Where a part of fold F begins."""
    at = partials + part * part_size(folds[F], N, M)
    for f in tl.static_range(F):
        at += part_size(folds[f], N, M) * part_count(folds[f].cols, spans, row_blocks, SELF)
    return at


@triton.jit
def store_part(at, part, index, size, KIND: tl.constexpr):
    """Write a part whose memory begins at `at`."""
    tl.store(at + index, part[0], mask=index < size)
    if KIND == LOGSUMEXP:
        tl.store(at + size + index, part[1], mask=index < size)
    elif KIND == MAX:
        tl.store(at + size + index, part[1].to(tl.float32, bitcast=True), mask=index < size)


@triton.jit
def load_part(at, index, size, KIND: tl.constexpr):
    """The inverse of `store_part`."""
    first = tl.load(at + index, mask=index < size, other=0.0)
    if KIND == LOGSUMEXP:
        second = tl.load(at + size + index, mask=index < size, other=0.0)
    elif KIND == MAX:
        second = tl.load(at + size + index, mask=index < size, other=0.0).to(tl.int32, bitcast=True)
    else:
        second = tl.zeros_like(first)
    return first, second


@triton.jit
def finished(part, KIND: tl.constexpr):
    """The value of a fold once all its parts are merged."""
    value, second = part
    if KIND == LOGSUMEXP:
        value = tl.where(second == 0, float("-inf"), value + tl.log(second))
    elif KIND == MAX:
        value = tl.where(second == 0, float("-inf"), value)
    return value


@triton.jit(do_not_specialize=["N", "M", "spans", "row_blocks", "used_blocks"])
def merge_kernel(
    partials,
    values,
    argmax,
    N,
    M,
    spans,
    row_blocks,
    used_blocks,
    folds: tl.constexpr,
    SELF: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the parts of every fold, in their order, into the first two or, after the last launch, into the results.

    What is merged into them is set to zeros behind it, because the next launch may not meet every part: of a matrix
    that is compared with itself, blocks further down meet fewer columns.

    Args:
        row_blocks: blocks that `partials` has room for.
        used_blocks: blocks of the launch before this one.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value_begin = tl.zeros([], tl.int64)
    winner_begin = tl.zeros([], tl.int64)
    for f in tl.static_range(len(folds)):
        size = fold_size(folds[f], N, M)
        at = part_at(partials, 0, folds, N, M, spans, row_blocks, f, SELF)
        part = wide_part(load_part(at, index, size, folds[f].kind), folds[f].kind)
        step = part_size(folds[f], N, M)
        part = merge_in_order(part, load_part(at + step, index, size, folds[f].kind), folds[f].kind)
        for p in range(FOUND, part_count(folds[f].cols, spans, used_blocks, SELF)):
            next_at = at + p * step
            part = merge_in_order(part, load_part(next_at, index, size, folds[f].kind), folds[f].kind)
            if not LAST:
                # Loads and stores of the same numbers may be other threads' each.
                tl.debug_barrier()
                store_part(next_at, empty_part(folds[f].kind, BLOCK), index, size, folds[f].kind)
        if LAST:
            tl.store(values + value_begin + index, finished(part, folds[f].kind), mask=index < size)
            if folds[f].kind == MAX:
                tl.store(argmax + winner_begin + index, part[1].to(tl.int64) - 1, mask=index < size)
        else:
            found, lost = narrow_part(part, folds[f].kind)
            tl.debug_barrier()
            store_part(at, found, index, size, folds[f].kind)
            store_part(at + step, lost, index, size, folds[f].kind)
        value_begin += size
        if folds[f].kind == MAX:
            winner_begin += size
