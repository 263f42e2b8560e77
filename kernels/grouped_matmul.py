"""grouped_matmul in Triton: launchers with the names and arguments of reference/grouped_matmul.py.

The sizes of the groups stay on the device: grids are bounded by what R rows and E groups can need, and each program
finds its group by a search. Nothing waits for the device, and each number has one writer and a fixed order of addition.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.core import triton_kernels

from ._cover import Combine, pairwise_cover
from ._launch import arch_of, launch, recording
from ._variants import Variant

# The interpreter multiplies the bits of bfloat16 numbers; in float32 the products are the same ones.
WIDEN = tl.constexpr(triton_kernels.interprets())

# ---- Kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _bound(offsets, i, R, E):
    """Where the i-th stretch of rows begins: rows before all groups, the E groups, rows behind them."""
    bound = tl.load(offsets + tl.minimum(tl.maximum(i - 1, 0), E))
    # Offsets that do not fit, which only a reading of them could refuse, must not address other memory.
    bound = tl.minimum(tl.maximum(bound, 0), R)
    return tl.where(i == 0, 0, tl.where(i > E + 1, R, bound))


@triton.jit
def _stretch_of(tile, offsets, R, E, BLOCK_M: tl.constexpr):
    """The stretch that a tile of rows belongs to, its first tile.

    Stretch i has the tiles from bound_i // BLOCK_M + i on, which are at least as many as it needs.
    """
    low, high = tl.zeros([], tl.int64), tl.zeros([], tl.int64) + (E + 1)
    while low < high:  # the last stretch that begins no later
        middle = (low + high + 1) // 2
        begins = _bound(offsets, middle, R, E) // BLOCK_M + middle
        low = tl.where(begins <= tile, middle, low)
        high = tl.where(begins <= tile, high, middle - 1)
    return low, _bound(offsets, low, R, E) // BLOCK_M + low


@triton.jit
def _tokens_of(row, is_row, order, T, K: tl.constexpr):
    """The token that each row reads, and whether it has one; without an order, rows are those of the matrix."""
    if order is not None:
        choice = tl.load(order + row, mask=is_row, other=-1)
        row = choice // K
        is_row = (choice >= 0) & (row < T)  # an order that does not fit must not address other memory
    return row, is_row


@triton.jit
def _multiply(left, right, total):
    if WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit(do_not_specialize=["R", "T"])
def forward_kernel(
    a, b, offsets, bias, order, out, R, T, E, D, F, a_stride, a_step, b_stride, b_row, b_column, bias_stride, bias_step,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """A tile of (R, F): rows times the matrix of their group, or zeros where they have none."""
    across = tl.cdiv(F, BLOCK_N)
    tile = (tl.program_id(0) // across).to(tl.int64)
    stretch, first = _stretch_of(tile, offsets, R, E, BLOCK_M)
    end = _bound(offsets, stretch + 1, R, E)
    row = _bound(offsets, stretch, R, E) + (tile - first) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = row < end, column < F
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ahead = tl.full([], BLOCK_K, tl.int64)  # as BLOCK_K strides may need 64 bits where one does not
    if (stretch > 0) & (stretch <= E) & (tl.min(row, 0) < end):
        group = stretch - 1
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        token, is_token = _tokens_of(row, is_row, order, T, K)
        a_at = a + token[:, None] * a_stride + k[None, :] * a_step
        b_at = b + group * b_stride + k[:, None] * b_row + column.to(tl.int64)[None, :] * b_column
        for done in range(0, D, BLOCK_K):
            inside = done + k < D
            left = tl.load(a_at, mask=is_token[:, None] & inside[None, :], other=0.0)
            right = tl.load(b_at, mask=inside[:, None] & is_column[None, :], other=0.0)
            total = _multiply(left, right, total)
            a_at += ahead * a_step
            b_at += ahead * b_row
        if bias is not None:
            at = bias + group * bias_stride + column.to(tl.int64) * bias_step
            total += tl.load(at, mask=is_column, other=0.0).to(tl.float32)[None, :]
    at = out + row[:, None] * F + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["R", "T"])
def outer_kernel(
    a, g, offsets, order, db, R, T, E, D, F, a_stride, a_step, g_stride, g_step, db_row, db_column,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """A tile of (D, F) of one group: the sum of the outer products of its rows."""
    across, down = tl.cdiv(F, BLOCK_N), tl.cdiv(D, BLOCK_M)
    group = (tl.program_id(0) // (across * down)).to(tl.int64)
    d = (tl.program_id(0) // across % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_d, is_column = d < D, column < F
    begin, end = _bound(offsets, group + 1, R, E), _bound(offsets, group + 2, R, E)
    k = begin + tl.arange(0, BLOCK_K)
    a_at = a + d.to(tl.int64)[:, None] * a_step
    g_at = g + k[:, None] * g_stride + column.to(tl.int64)[None, :] * g_step
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ahead = tl.full([], BLOCK_K, tl.int64)
    token, is_token = _tokens_of(k, k < end, order, T, K)
    for done in range(0, (end - begin).to(tl.int32), BLOCK_K):
        inside = k + done < end
        left = tl.load(a_at + token[None, :] * a_stride, mask=is_d[:, None] & is_token[None, :], other=0.0)
        right = tl.load(g_at, mask=inside[:, None] & is_column[None, :], other=0.0)
        total = _multiply(left, right, total)
        g_at += ahead * g_stride
        # One step ahead, so that loads of tokens do not wait for where they are.
        next_k = k + done + BLOCK_K
        token, is_token = _tokens_of(next_k, next_k < end, order, T, K)
    at = db + group * D * F + d.to(tl.int64)[:, None] * db_row + column.to(tl.int64)[None, :] * db_column
    tl.store(at, total.to(db.dtype.element_ty), mask=is_d[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=["R"])
def sums_kernel(g, offsets, dbias, R, E, F, g_stride, g_step, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums over the rows of one group."""
    across = tl.cdiv(F, BLOCK_N)
    group = (tl.program_id(0) // across).to(tl.int64)
    column = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = _bound(offsets, group + 1, R, E), _bound(offsets, group + 2, R, E)
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for row in range(begin, end, BLOCK_K):
        k = row + tl.arange(0, BLOCK_K)
        at = g + k[:, None] * g_stride + column.to(tl.int64)[None, :] * g_step
        total += tl.load(at, mask=(k < end)[:, None] & (column < F)[None, :], other=0.0).to(tl.float32)
    value = tl.sum(total, 0).to(dbias.dtype.element_ty)
    tl.store(dbias + group * F + column, value, mask=column < F)


# ---- Launchers -----------------------------------------------------------------------------------------------------

_INTERPRETED = ((16, 16, 16), {"num_warps": 4, "num_stages": 1})
# (BLOCK_M, BLOCK_N, BLOCK_K) and options by target, for 16 bits and for float32.
_TILES = {
    ("sm_80", 16): ((128, 128, 64), {"num_warps": 8, "num_stages": 3}),
    ("sm_90", 16): ((128, 128, 64), {"num_warps": 8, "num_stages": 4}),
    ("gfx942", 16): ((128, 128, 32), {"num_warps": 8, "num_stages": 2}),
    ("sm_80", 32): ((64, 64, 32), {"num_warps": 8, "num_stages": 3}),
    ("sm_90", 32): ((64, 64, 32), {"num_warps": 8, "num_stages": 3}),
    ("gfx942", 32): ((64, 64, 32), {"num_warps": 8, "num_stages": 2}),
}


def _tile(x: Tensor, sizes: tuple[int, int], *factors: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The tile of a product; a smaller one where no 16 bytes can be moved at once: each number then has an address."""
    (block_m, block_n, block_k), options = _TILES.get((arch_of(x), 8 * x.element_size()), _INTERPRETED)
    strides = [stride for factor in factors for stride in factor.stride() if stride != 1]
    if any(n % 16 for n in (*sizes, *strides)):
        block_n, block_k = max(block_n // 2, 16), max(block_k // 2, 16)
    return (block_m, block_n, block_k), options


def _places(a: Tensor, slots: Tensor | None, order: Tensor | None) -> tuple[int, Tensor | None, int]:
    """How many rows there are, the choice of each where `a` are tokens, and how many choices a token has."""
    if slots is None or order is None:
        return a.shape[0], None, 1
    return order.shape[0], order.contiguous(), max(slots.shape[1], 1)


def forward(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, slots: Tensor | None, order: Tensor | None
) -> Tensor:
    (tokens, depth), (groups, _, columns) = a.shape, b.shape
    rows, order, choices = _places(a, slots, order)
    out = torch.empty((rows, columns), dtype=a.dtype, device=a.device)
    (block_m, block_n, block_k), options = _tile(a, (depth, columns), a, b)
    # Each group, and the rows before and behind all of them, can need one tile more than their rows fill.
    tiles = rows // block_m + groups + 2 if rows else 0
    launch(
        forward_kernel, tiles * triton.cdiv(columns, block_n),
        a, b, offsets.contiguous(), bias, order, out, rows, tokens, groups, depth, columns, *a.stride(), *b.stride(),
        *((0, 0) if bias is None else bias.stride()),
        options=options, K=choices, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return out


def outer(
    a: Tensor,
    g: Tensor,
    offsets: Tensor,
    slots: Tensor | None,
    order: Tensor | None,
    transposed: bool,
    wants_b: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor]:
    (tokens, depth), columns, groups = a.shape, g.shape[1], offsets.shape[0] - 1
    rows, order, choices = _places(a, slots, order)
    sides = (columns, depth) if transposed else (depth, columns)
    db = torch.empty((groups if wants_b else 0, *sides), dtype=a.dtype, device=a.device)
    db = db.transpose(1, 2) if transposed else db
    dbias = torch.empty((groups if wants_bias else 0, columns), dtype=a.dtype, device=a.device)
    (block_m, block_n, block_k), options = _tile(a, (depth, columns), a, g)
    offsets = offsets.contiguous()
    launch(
        outer_kernel, len(db) * triton.cdiv(depth, block_m) * triton.cdiv(columns, block_n),
        a, g, offsets, order, db, rows, tokens, groups, depth, columns, *a.stride(), *g.stride(), *db.stride()[1:],
        options=options, K=choices, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    launch(
        sums_kernel, len(dbias) * triton.cdiv(columns, 64),
        g, offsets, dbias, rows, groups, columns, *g.stride(),
        options={"num_warps": 4, "num_stages": 1}, BLOCK_K=32, BLOCK_N=64,
    )  # fmt: skip
    return db, dbias


# ---- What is compiled ahead of time --------------------------------------------------------------------------------


def variants(arch: str, combine: Combine = pairwise_cover) -> Iterator[Variant]:
    """Both products with every layout that backward passes on, and sizes that do not divide by 16."""
    choices: dict[str, Sequence[Any]] = {
        "dtype": (torch.bfloat16, torch.float16, torch.float32),
        "size": ((768, 3072), (70, 130)),
        "transposed": (False, True),
        "bias": (False, True),
        "routed": (False, True),
    }
    for row in combine(choices):
        (depth, columns), dtype = row["size"], row["dtype"]
        a, g = torch.empty(256, depth, dtype=dtype), torch.empty(256, columns, dtype=dtype)
        b = torch.empty(4, columns, depth, dtype=dtype).transpose(1, 2)
        b = b if row["transposed"] else b.contiguous()
        bias = torch.empty(4, columns, dtype=dtype) if row["bias"] else None
        offsets = torch.empty(5, dtype=torch.int64)
        places = [torch.empty(s, dtype=torch.int64) for s in ((128, 2), (256,))] if row["routed"] else (None, None)
        with recording(arch) as recorded:
            forward(a, b, offsets, bias, *places)
            columns_first = row["transposed"] and not row["routed"]
            outer(a.T.contiguous().T if columns_first else a, g, offsets, *places, row["transposed"], True, False)
        about = " ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in row.items())
        yield from recorded.variants(f"grouped_matmul {about}", has_dot=dtype != torch.float32)
        with recording(arch) as recorded:
            outer(a, g, offsets, None, None, False, False, row["bias"] and columns % 16 > 0)
        yield from recorded.variants(f"grouped_matmul {about}")
