"""Listed pairs: their logits, and the gradients of these.

A gradient is a weighted sum of rows for each owner of a list: of rows of y for the rows that list them, and of rows of
x for the columns that are listed, whose lists come from a stable sort. Every sum has one program and one order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops._similarity import Layout, LogitSet, ScaleOf, Slot

from . import _pairs
from ._launch import Launch
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


def _at_launch(
    x: Tensor,
    y: Tensor,
    code_scale: Tensor | None,
    indices: Tensor,
    pairs: _pairs.PairArguments,
    out: Tensor,
    logits: bool,
) -> Launch:
    x, y = unit_stride(x), unit_stride(y)
    arguments = {
        "x": x,
        "y": y,
        "code_scale": code_scale,
        "indices": indices,
        "out": out,
        "x_stride": x.stride(0),
        "y_stride": y.stride(0),
        "N": len(x),
        "M": len(y),
        "D": x.shape[1],
        "listed": indices.shape[1],
        "data": pairs.data,
        "sets": pairs.sets,
        "LOGITS": logits,
        "BLOCK_E": BLOCK_ENTRIES,
        "BLOCK_K": BLOCK_DEPTH,
    }
    return Launch(_at, triton.cdiv(indices.numel(), BLOCK_ENTRIES), arguments, _OPTIONS)


def _dots(
    x: Tensor, y: Tensor, code_scale: Tensor | None, indices: Tensor, pairs: _pairs.PairArguments, logits: bool
) -> Tensor:
    """Inner products or logits of the listed pairs."""
    out = torch.empty(indices.shape, dtype=torch.float32, device=x.device)
    _at_launch(x, y, code_scale, indices.contiguous(), pairs, out, logits).run()
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


def _sums_launch(indptr: Tensor, partners: Tensor, weights: Tensor, rows: Tensor | None, out: Tensor) -> Launch:
    owners, depth = out.shape
    block = 1 if rows is None else BLOCK_DEPTH
    blocks = triton.cdiv(depth, block)
    arguments = {
        "indptr": indptr,
        "partners": partners,
        "weights": weights,
        "rows": rows,
        "out": out,
        "rows_stride": 0 if rows is None else rows.stride(0),
        "D": depth,
        "blocks": blocks,
        "BLOCK_E": BLOCK_ENTRIES,
        "BLOCK_D": block,
    }
    return Launch(_sums, owners * blocks, arguments, _OPTIONS)


class _Lists:
    """Entries by owner: the lists of `partners` that `indptr` cuts."""

    def __init__(self, indptr: Tensor, partners: Tensor) -> None:
        self.indptr, self.partners = indptr, partners

    def sum(self, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        """(owners, D) weighted sums of the partners' rows, or (owners,) sums of the weights."""
        rows = None if rows is None else unit_stride(rows)
        out = weights.new_zeros((len(self.indptr) - 1, 1 if rows is None else rows.shape[1]))
        if out.numel() and weights.numel():
            _sums_launch(self.indptr, self.partners, weights, rows, out).run()
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
    rows, columns, listed = len(x), len(y), indices.shape[1]
    known = indices >= 0 if columns else torch.zeros_like(indices, dtype=torch.bool)
    column = indices.clamp_min(0)
    e = d_values.float().masked_fill(~known, 0.0)
    code_scale = each.data.get(Slot.CODE_SCALE)
    wants = [bool(needs >> bit & 1) for bit in range(5)]

    weight = e
    if known.numel() and columns:
        own = scale[layout.scale_slices(rows, columns)[0]].float()
        of_column = each.scale_of == ScaleOf.COLUMNS
        weight = e * (own[column] if of_column else own[:, None] if each.scale_of == ScaleOf.ROWS else own)
        weight = weight if code_scale is None else weight * code_scale[column]
    sorted_columns, by_column = indices.flatten().sort(stable=True)
    of_rows = _Lists(torch.arange(rows + 1, device=x.device) * listed, indices.flatten())
    of_columns = _Lists(
        torch.searchsorted(sorted_columns, torch.arange(columns + 1, device=x.device)), by_column // max(listed, 1)
    )
    dscale = torch.zeros_like(scale)
    if wants[2] and known.numel() and columns:
        e_dots = e * _dots(x, y, code_scale, indices, pairs, logits=False)
        if each.scale_of == ScaleOf.COLUMNS:
            dscale[:columns] = of_columns.sum(e_dots.flatten()[by_column])
        elif each.scale_of == ScaleOf.ROWS:
            dscale[:rows] = e_dots.sum(1)
        else:
            dscale[:1] = e_dots.sum()
    return (
        of_rows.sum(weight.flatten(), y) if wants[0] else x.new_zeros((0, x.shape[1]), dtype=torch.float32),
        of_columns.sum(weight.flatten()[by_column], x)
        if wants[1]
        else x.new_zeros((0, x.shape[1]), dtype=torch.float32),
        dscale if wants[2] else dscale[:0],
        e.sum(1) if wants[3] else e.new_zeros(0),
        of_columns.sum(e.flatten()[by_column]) if wants[4] else e.new_zeros(0),
    )


# ---- Ahead of time ---------------------------------------------------------------------------------------------------


def variants() -> Iterator[Variant]:
    """The kernels of this file in all dtypes, with and without everything that logits may need."""
    indices = torch.zeros((4, 8), dtype=torch.int64)
    out, vector = torch.zeros((4, 8)), torch.zeros(8)
    table = {
        Slot.LOG_WEIGHT: torch.zeros((2, 2)),
        Slot.CLASS_ROWS: torch.zeros(4, dtype=torch.int64),
        Slot.CLASS_COLS: torch.zeros(8, dtype=torch.int64),
    }
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, y = torch.zeros((4, 64), dtype=dtype), torch.zeros((8, 64), dtype=dtype)
        name = f"similarity_topk listed {str(dtype).removeprefix('torch.')}"
        layout = Layout((LogitSet(ScaleOf.COLUMNS, data=table),), ())
        pairs = _pairs.arguments(layout, 4, 8, vector, vector[:4], vector)
        yield _at_launch(x, y, None, indices, pairs, out, logits=True).variant(f"{name}, logits")
        pairs = _pairs.arguments(Layout((LogitSet(),), ()), 4, 8, vector[:1])
        yield _at_launch(x, y, vector, indices, pairs, out, logits=False).variant(f"{name}, products with codes' scale")
        yield _sums_launch(indices[0], indices[1], vector, y, x.float()).variant(f"{name}, sums of rows")
    yield _sums_launch(indices[0], indices[1], vector, None, vector[:, None]).variant("similarity_topk listed, sums")
