"""The sweep of similarity_topk: one program has some rows and a range of columns, and a list of each row in memory."""

from __future__ import annotations

import triton
import triton.language as tl

from contrastive_ops.core import triton_kernels

from . import _pairs
from ._selection import append, pad, shrink

# The interpreter takes the bits of bfloat16 numbers for the numbers; in float32 the products are the same ones.
WIDEN = tl.constexpr(triton_kernels.interprets())
# Products of float32 numbers use no tensor cores, and keep operands in registers.
GUIDE_K = tl.constexpr(16)


@triton.jit
def products(x, x_stride, rows, y, y_stride, cols, D, BLOCK_K: tl.constexpr):
    """Inner products of rows of x, (B, 1), with rows of y, (1, B); codes of y become numbers of the dtype of x."""
    depth = tl.arange(0, BLOCK_K)
    x_row, y_row = x + rows.to(tl.int64) * x_stride, y + cols.to(tl.int64) * y_stride
    dots = tl.zeros((rows.shape[0], cols.shape[1]), tl.float32)
    for d in range(0, D, BLOCK_K):
        a = tl.load(x_row + (d + depth)[None, :], mask=(d + depth)[None, :] < D, other=0)
        b = tl.load(y_row + (d + depth)[:, None], mask=(d + depth)[:, None] < D, other=0)
        if WIDEN:
            a = a.to(tl.float32)
        dots = tl.dot(a, b.to(a.dtype), dots, input_precision="ieee")
    return dots


@triton.jit
def _column(true, number: tl.constexpr):
    """(rows, 8) how often a tile is true in each row, in one column."""
    return tl.where(tl.arange(0, 8)[None, :] == number, tl.sum(true.to(tl.int32), 1)[:, None], 0)


@triton.jit
def counted(logit, dots, guide, outside, level, rows, cols, N, M, data, offset, rules):
    """(rows, 8) what each of STATISTICS counts in a tile."""
    inside = ~outside
    takes_part = inside & (logit > float("-inf"))
    if rules.drops:
        takes_part &= ~_pairs.dropped(dots, guide, rows, cols, N, M, data, offset, rules)
    total = _column(takes_part, 0) + _column(inside & (logit > level), 1)
    for rule in tl.static_range(_pairs.FIRST_RULE, _pairs.END_OF_RULES):
        if (rules.counted >> rule) & 1 != 0:
            drop = _pairs.also_dropped(outside & inside, rule, dots, guide, rows, cols, N, M, data, rules)
            total += _column(inside & drop, rule)
    return total


@triton.jit(do_not_specialize=["N", "M", "parts", "first_row", "width", "capacity", "k"])
def sweep_kernel(
    x,
    y,
    code_scale,  # (M,) what a unit of each column's codes is worth, or None
    floor,  # (N,) or None
    level,  # (N,) for the statistics, or None
    scores,  # (rows, ranges, capacity) float32
    columns,  # (rows, ranges, capacity) int32
    counts,  # (rows, ranges) int32, scratch
    thresholds,  # (rows, ranges) float32, scratch
    statistics,  # (rows, ranges, 8) int32, or None
    x_stride,
    y_stride,
    N,
    M,
    D,
    guide_depth,
    parts,  # ranges of columns
    first_row,  # the row of x that the first list belongs to
    width,  # columns of a range
    capacity,
    k,
    data,
    offsets,
    sets: tl.constexpr,
    GUIDE_X: tl.constexpr,
    GUIDE_Y: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPAN: tl.constexpr,  # the power of two that a list fits in; 0 where all that is above the floor stays
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
):
    # Programs that run at the same time read the same columns.
    blocks = tl.num_programs(0) // parts
    block, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    own = block * BLOCK_M + tl.arange(0, BLOCK_M)
    own_list = own.to(tl.int64) * parts + part
    first_list = block.to(tl.int64) * BLOCK_M * parts + part
    rows = (first_row + own)[:, None]
    x_rows = tl.minimum(rows, N - 1)  # past the end any row will do
    threshold = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if floor is not None:
        threshold = tl.load(floor + first_row + own, mask=first_row + own < N, other=0.0)
        threshold = tl.where(threshold == threshold, threshold, float("-inf"))
    count = tl.zeros((BLOCK_M,), tl.int32)
    total = tl.zeros((BLOCK_M, 8), tl.int32)
    begin = part * width
    for first_col in range(begin, tl.minimum(begin + width, M), BLOCK_N):
        cols = first_col + tl.arange(0, BLOCK_N)[None, :]
        y_cols = tl.minimum(cols, M - 1)
        dots = products(x, x_stride, x_rows, y, y_stride, y_cols, D, BLOCK_K)
        if code_scale is not None:
            dots *= tl.load(code_scale + y_cols)
        outside = (rows >= N) | (cols >= M)
        logit = _pairs.logits(dots, rows, cols, N, M, data, sets[0])
        guide = dots
        if GUIDE_X >= 0 and statistics is not None:
            guide = products(
                data[GUIDE_X], guide_depth, x_rows, data[GUIDE_Y], guide_depth, y_cols, guide_depth, GUIDE_K
            )
        if statistics is not None:
            other = logit
            if sets[-1].log_weight != sets[0].log_weight:
                other = _pairs.logits(dots, rows, cols, N, M, data, sets[-1])
            high = tl.load(level + rows, mask=rows < N, other=0.0)
            total += counted(other, dots, guide, outside, high, rows, cols, N, M, data, offsets[-1], sets[-1])
        wanted = (logit > threshold[:, None]) & ~outside
        if tl.max(tl.max(wanted.to(tl.int32), 1), 0) > 0:
            if sets[0].drops:
                if GUIDE_X >= 0 and statistics is None:
                    guide = products(
                        data[GUIDE_X], guide_depth, x_rows, data[GUIDE_Y], guide_depth, y_cols, guide_depth, GUIDE_K
                    )
                wanted &= ~_pairs.dropped(dots, guide, rows, cols, N, M, data, offsets[0], sets[0])
            logit = tl.where(wanted, logit, float("-inf"))
            count = append(scores, columns, own_list, capacity, logit, cols, count)
            if SPAN > 0:  # noqa: SIM102  (the inner test is one of run time)
                if tl.max(count, 0) > capacity - BLOCK_N:
                    tl.store(counts + own_list, count)
                    tl.store(thresholds + own_list, threshold)
                    tl.debug_barrier()  # lists are read by other threads than those that wrote them
                    shrink(
                        scores, columns, counts, thresholds, first_list, parts, capacity, k, BLOCK_M, GROUP, SPAN, PIECE
                    )
                    tl.debug_barrier()
                    count = tl.load(counts + own_list)
                    threshold = tl.load(thresholds + own_list)
    length = capacity
    if SPAN > 0:
        length = k
        if tl.max(count, 0) > k:
            tl.store(counts + own_list, count)
            tl.debug_barrier()
            shrink(scores, columns, counts, thresholds, first_list, parts, capacity, k, BLOCK_M, GROUP, SPAN, PIECE)
            tl.debug_barrier()
            count = tl.load(counts + own_list)
    pad(scores, own_list, capacity, count, length)
    if statistics is not None:
        tl.store(statistics + (own_list * 8)[:, None] + tl.arange(0, 8)[None, :], total)
