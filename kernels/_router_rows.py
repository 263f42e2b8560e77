"""Rows that move between tokens and experts. Rows lie `stride` apart, the numbers of a row next to each other."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["R"])
def dispatch_kernel(
    tokens, gates, order, rows, R, D, tokens_stride, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Each row its token, times its gate if there are gates; 0 where it has none, which is never read."""
    parts = tl.cdiv(D, BLOCK_D)
    row = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = (tl.program_id(0) % parts) * BLOCK_D + tl.arange(0, BLOCK_D)
    choice = tl.load(order + row, mask=row < R, other=-1)
    taken = choice >= 0
    at = (choice // K)[:, None] * tokens_stride + d[None, :]
    value = tl.load(tokens + at, mask=taken[:, None] & (d < D)[None, :], other=0.0)
    if gates is not None:
        gate = tl.load(gates + choice, mask=taken, other=0.0)
        value = (value.to(tl.float32) * gate[:, None]).to(value.dtype)
    tl.store(rows + row[:, None] * D + d[None, :], value, mask=(row < R)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    rows, gates, slots, tokens, T, D, rows_stride, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Each token the sum of its rows, times their gates if there are gates, in the order of its choices."""
    parts = tl.cdiv(D, BLOCK_D)
    token = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (tl.program_id(0) % parts) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for j in range(K):
        slot = tl.load(slots + token * K + j, mask=token < T, other=-1)
        taken = slot >= 0
        at = slot[:, None] * rows_stride + d[None, :]
        value = tl.load(rows + at, mask=taken[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        if gates is not None:
            value *= tl.load(gates + token * K + j, mask=taken, other=0.0)[:, None]
        total += value
    inside = (token < T)[:, None] & (d < D)[None, :]
    tl.store(tokens + token[:, None] * D + d[None, :], total.to(tokens.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def dots_kernel(
    tokens, rows, slots, dots, T, D, tokens_stride, rows_stride,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Inner product of each token with each of its rows, 0 where it has none."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    for j in range(K):
        slot = tl.load(slots + token * K + j, mask=token < T, other=-1)
        total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for first in range(0, D, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            inside = (slot >= 0)[:, None] & (d < D)[None, :]
            a = tl.load(tokens + token[:, None] * tokens_stride + d[None, :], mask=inside, other=0.0)
            b = tl.load(rows + slot[:, None] * rows_stride + d[None, :], mask=inside, other=0.0)
            total += a.to(tl.float32) * b.to(tl.float32)
        tl.store(dots + token * K + j, tl.sum(total, 1), mask=token < T)
