"""Listed pairs: their logits, and the gradients of these. Every sum has one program and one order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.core.listed_gradients import Lists, gradients
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf
from contrastive_ops.core.rules import Slot

from . import _pairs
from ._launch import launch, recording
from ._variants import Variant

BLOCK_DEPTH = 128
BLOCK_ENTRIES = 16
_OPTIONS = {"num_warps": 4, "num_stages": 2}

# ---- Logits ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "M", "listed"])
def _at(
    x,
    y,
    code_scale,  # (M,) or None
    indices,  # (N, listed) int64
    out,  # (N, listed) float32
    x_stride,
    y_stride,
    N,
    M,
    D,
    listed,
    data,
    sets: tl.constexpr,
    LOGITS: tl.constexpr,  # or inner products alone
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    row = entry // listed
    column = tl.load(indices + entry, mask=row < N, other=-1)
    known = column >= 0
    x_row, y_row = x + (row * x_stride)[:, None], y + (column * y_stride)[:, None]
    dots = tl.zeros((BLOCK_E,), tl.float32)
    for d in range(0, D, BLOCK_K):
        depth = d + tl.arange(0, BLOCK_K)[None, :]
        inside = known[:, None] & (depth < D)
        a = tl.load(x_row + depth, mask=inside, other=0).to(tl.float32)
        b = tl.load(y_row + depth, mask=inside, other=0).to(tl.float32)
        dots += tl.sum(a * b, 1)
    if code_scale is not None:
        dots *= tl.load(code_scale + column, mask=known, other=0.0)
    if LOGITS:
        # Entries without a column read what belongs to none.
        logit = _pairs.logits(dots, row.to(tl.int32), tl.where(known, column, M).to(tl.int32), N, M, data, sets[0])
        dots = tl.where(known, logit, float("-inf"))
    tl.store(out + entry, dots, mask=row < N)


def _problem(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
) -> tuple[Layout, _pairs.PairArguments]:
    layout = Layout.decode(pair_data, spec)
    return layout, _pairs.arguments(Layout(layout.sets[:1], ()), len(x), len(y), scale, row_bias, col_bias)


def _dots(
    x: Tensor, y: Tensor, code_scale: Tensor | None, indices: Tensor, pairs: _pairs.PairArguments, *, logits: bool
) -> Tensor:
    """Inner products or logits of the listed pairs."""
    x, y = unit_stride(x), unit_stride(y)
    out = torch.empty(indices.shape, dtype=torch.float32, device=x.device)
    launch(
        _at, triton.cdiv(indices.numel(), BLOCK_ENTRIES),
        x, y, code_scale, indices.contiguous(), out, x.stride(0), y.stride(0), len(x), len(y), x.shape[1],
        indices.shape[1], pairs.data,
        options=_OPTIONS, sets=pairs.sets, LOGITS=logits, BLOCK_E=BLOCK_ENTRIES, BLOCK_K=BLOCK_DEPTH,
    )  # fmt: skip
    return out


def unit_stride(t: Tensor) -> Tensor:
    """The same matrix with neighbours of a row next to each other."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def at(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    indices: Tensor,
) -> Tensor:
    """Return the logits of the columns that each row lists, -inf where it lists -1. Rules do not apply."""
    if not indices.numel() or not len(y):
        return torch.full(indices.shape, -torch.inf, dtype=torch.float32, device=x.device)
    layout, pairs = _problem(x, y, scale, row_bias, col_bias, pair_data, spec)
    return _dots(x, y, layout.sets[0].data.get(Slot.CODE_SCALE), indices, pairs, logits=True)


# ---- Gradients -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["blocks"])
def _sums(
    indptr,  # (owners + 1,) int64
    partners,  # int64 of each entry, -1 for none
    weights,  # float32 of each entry
    rows,  # of the partners, or None for the sum of the weights alone
    out,  # (owners, D) float32
    rows_stride,
    D,
    blocks,  # of an owner's sum
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    owner = (tl.program_id(0) // blocks).to(tl.int64)
    depth = (tl.program_id(0) % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    begin, end = tl.load(indptr + owner), tl.load(indptr + owner + 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(begin, end, BLOCK_E):
        entry = first + tl.arange(0, BLOCK_E)
        partner = tl.load(partners + entry, mask=entry < end, other=-1)
        known = partner >= 0
        weight = tl.load(weights + entry, mask=known, other=0.0)[:, None]
        if rows is not None:
            inside = known[:, None] & (depth < D)
            weight *= tl.load(rows + (partner * rows_stride)[:, None] + depth, mask=inside, other=0).to(tl.float32)
        total += tl.sum(weight, 0)
    tl.store(out + owner * D + depth, total[None, :], mask=depth < D)


def _sum_lists(lists: Lists, weights: Tensor, rows: Tensor | None) -> Tensor:
    rows = None if rows is None else unit_stride(rows)
    owners, depth = len(lists.indptr) - 1, 1 if rows is None else rows.shape[1]
    out = weights.new_zeros((owners, depth))
    if out.numel() and weights.numel():
        block = 1 if rows is None else BLOCK_DEPTH
        blocks = triton.cdiv(depth, block)
        launch(
            _sums, owners * blocks,
            lists.indptr, lists.partners, weights, rows, out, 0 if rows is None else rows.stride(0), depth, blocks,
            options=_OPTIONS, BLOCK_E=BLOCK_ENTRIES, BLOCK_D=block,
        )  # fmt: skip
    return out.squeeze(1) if rows is None else out


def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    indices: Tensor,
    d_values: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, scale, row_bias, col_bias in float32; those not in `needs` have no rows."""
    layout, pairs = _problem(x, y, scale, row_bias, col_bias, pair_data, spec)
    each = layout.sets[0]

    def dots() -> Tensor:
        return _dots(x, y, each.data.get(Slot.CODE_SCALE), indices, pairs, logits=False)

    return gradients(x, y, scale, each, indices, d_values, needs, dots, _sum_lists)


# ---- Ahead of time ---------------------------------------------------------------------------------------------------


def variants(arch: str) -> Iterator[Variant]:
    """The kernels of this file in all dtypes, with and without everything that logits may need."""
    indices, vector = torch.zeros((4, 8), dtype=torch.int64), torch.zeros(8)
    table = {slot: _pairs.empty(slot, 4, 8) for slot in (Slot.LOG_WEIGHT, Slot.CLASS_ROWS, Slot.CLASS_COLS)}
    of_rows, weights = Lists(torch.zeros(5, dtype=torch.int64), indices.flatten()), torch.zeros(32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = torch.zeros((4, 64), dtype=dtype), torch.zeros((8, 64), dtype=dtype)
        layout = Layout((LogitSet(ScaleOf.COLUMNS, data=table),), ())
        with recording(arch) as recorded:
            pairs = _pairs.arguments(layout, 4, 8, vector, vector[:4], vector)
            _dots(x, y, None, indices, pairs, logits=True)
            pairs = _pairs.arguments(Layout((LogitSet(),), ()), 4, 8, vector[:1])
            _dots(x, y, vector, indices, pairs, logits=False)
            _sum_lists(of_rows, weights, y)
        logits, products, sums = recorded.launches
        name = f"similarity_topk listed {str(dtype).removeprefix('torch.')}"
        yield logits.variant(f"{name}, logits")
        yield products.variant(f"{name}, products with codes' scale")
        yield sums.variant(f"{name}, sums of rows")
    with recording(arch) as recorded:
        _sum_lists(of_rows, weights, None)
    yield recorded.launches[0].variant("similarity_topk listed, sums")
