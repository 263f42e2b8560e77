"""Launches that fold a similarity matrix, and those that form its gradients: sizes, memory, order."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._folds import FOUND, PLAIN, TileFold, merge_kernel, planes
from ._launch import Launch
from ._similarity_backward import TileSum, give_back_kernel, gradient_kernel, weights_kernel
from ._similarity_forward import fold_kernel
from ._similarity_problem import Problem

# Programs that fill a GPU of any size. A constant, so that the order of sums does not depend on the device.
PROGRAMS = 512
# Bytes of parts of folds across the rows that one launch may write before they are merged.
PARTS_BYTES = 32 << 20
# Rows of a chunk whose weights are written for matrix products, and bytes of these weights.
CHUNK_ROWS = 2048
CHUNK_BYTES = 32 << 20
# Gradients of one side that programs with a part of the other side each may write before they are added up.
MOST_SPLITS = 8

_MERGE_BLOCK = 128
# Most columns of a span: float32 counts that many.
_MOST_COUNTED = 1 << 23


class Parts(NamedTuple):
    """Memory for the parts of folds, as _folds.py lays them out.

    Attributes:
        memory: zeros, which are folds of no pair.
        spans: parts of each fold along the rows of tiles.
        row_blocks: parts of each fold across them.
        mirrored: whether tiles are read both ways, so that every fold has both.
    """

    memory: Tensor
    spans: int
    row_blocks: int
    mirrored: bool

    @classmethod
    def of(cls, p: Problem, folds: Sequence[Any], spans: int, row_blocks: int, mirrored: bool) -> Parts:
        """Room for these folds."""
        size = 0
        for fold in folds:
            count = FOUND.value + (spans if mirrored or not fold.cols else 0)
            count += row_blocks if mirrored or fold.cols else 0
            size += count * planes(fold.kind) * p.shape[fold.cols]
        return cls(p.x.new_zeros((size,), dtype=torch.float32), spans, row_blocks, mirrored)

    def merge(
        self, p: Problem, folds: tuple[Any, ...], used_blocks: int, values: Tensor, argmax: Tensor | None, last: bool
    ) -> Launch:
        """Merge what a launch of `used_blocks` blocks found with all that was found before."""
        N, M, _ = p.shape
        sizes = [p.shape[fold.cols] for fold in folds]
        return Launch(
            merge_kernel,
            triton.cdiv(max(sizes, default=0), _MERGE_BLOCK),
            {
                "partials": self.memory,
                "values": values,
                "argmax": argmax,
                "N": N,
                "M": M,
                "spans": self.spans,
                "row_blocks": self.row_blocks,
                "used_blocks": used_blocks,
                "folds": folds,
                "SELF": self.mirrored,
                "LAST": last,
                "BLOCK": _MERGE_BLOCK,
            },
            {"num_warps": 4},
        )


def _spans(blocks: int, columns: int, step: int) -> tuple[int, int]:
    """The columns of a span, a multiple of `step`, and the number of spans, so that programs fill a GPU."""
    tiles = max(1, triton.cdiv(columns, step))
    span = min(triton.cdiv(tiles, triton.cdiv(PROGRAMS, max(blocks, 1))), _MOST_COUNTED // step)
    return span * step, triton.cdiv(tiles, span)


# ---- Forward ---------------------------------------------------------------------------------------------------------


def forward_launches(
    p: Problem, folds: tuple[TileFold, ...], values: Tensor, argmax: Tensor, target_logit: Tensor | None
) -> Iterator[Launch]:
    """Fold all rows and columns: `values` and `argmax` are those of all folds, one after another."""
    N, M, _ = p.shape
    tiles = p.tiles("fold", resident=p.resident)
    blocks = triton.cdiv(N, tiles.rows)
    across = sum(planes(f.kind) * p.shape[f.cols] for f in folds if p.itself or f.cols)
    row_blocks = max(1, min(blocks, PARTS_BYTES // (4 * across))) if across else blocks
    span, spans = _spans(row_blocks, M, tiles.cols)
    parts = Parts.of(p, folds, spans, row_blocks, p.itself)
    for first in range(0, max(blocks, 1), max(row_blocks, 1)):
        used = min(row_blocks, blocks - first)
        arguments = {
            **p.sides(),
            **p.arguments(tiles),
            "first_row": first * tiles.rows,
            "blocks": used,
            "span": span,
            "spans": spans,
            "row_blocks": row_blocks,
            "target_logit": target_logit,
            "partials": parts.memory,
            "folds": folds,
            "RESIDENT": p.resident,
        }
        yield Launch(fold_kernel, used * spans, arguments, tiles.options)
        yield parts.merge(p, folds, used, values, argmax, last=first + used >= blocks)


def linear_fold() -> TileFold:
    """The weighted sum of the logits in each row's list."""
    return TileFold(PLAIN.value, 0, False)


# ---- Backward --------------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """What backward is to form.

    Attributes:
        dx: the gradient of x (of both sides where a matrix is compared with itself).
        dy: the gradient of y.
        sums: sums of derivatives along rows and columns.
    """

    dx: bool
    dy: bool
    sums: tuple[TileSum, ...]


class Gradients(NamedTuple):
    """What backward formed; None for what nobody wanted."""

    dx: Tensor | None
    dy: Tensor | None
    sums: dict[TileSum, Tensor]


def side_launches(
    p: Problem,
    upstream: Mapping[str, Any],
    sums: tuple[TileSum, ...],
    of_columns: bool,
    wanted: bool,
) -> tuple[list[Launch], Tensor | None, Tensor]:
    """Launches for one side, its gradient in parts [splits, size, D], and the sums [sums, size] in float64."""
    N, M, D = p.shape
    own, other = (p.y, p.x) if of_columns else (p.x, p.y)
    tiles = p.tiles("gradient", resident=True)
    blocks = triton.cdiv(len(own), tiles.rows)
    most = max(1, min(MOST_SPLITS, triton.cdiv(PROGRAMS, max(blocks, 1)), triton.cdiv(len(other), tiles.cols)))
    span = triton.cdiv(triton.cdiv(len(other), tiles.cols), most) * tiles.cols
    splits = max(1, triton.cdiv(len(other), max(span, 1)))
    parts = Parts.of(p, sums, splits, splits, False)
    gradient = own.new_empty((splits, len(own), D), dtype=torch.float32) if wanted else None
    values = own.new_empty((len(sums), len(own)), dtype=torch.float64)
    arguments = {
        **p.arguments(tiles),
        **upstream,
        "own": own,
        "other": other,
        "own_stride": own.stride(0),
        "other_stride": other.stride(0),
        "own_size": len(own),
        "other_size": len(other),
        "blocks": blocks,
        "span": span,
        "splits": splits,
        "gradient": gradient,
        "partials": parts.memory,
        "sums": sums,
        "OWN_COLS": int(of_columns),
    }
    launches = [Launch(gradient_kernel, blocks * splits, arguments, tiles.options)]
    if sums:
        launches.append(parts.merge(p, sums, splits, values, None, last=True))
    return launches, gradient, values


def fused(p: Problem, upstream: Mapping[str, Any], wanted: Wanted) -> Gradients:
    """Both gradients without a weight in memory: each side computes the logits again."""
    found, sums = [], {}
    for of_columns, wants in ((False, wanted.dx), (True, wanted.dy)):
        own_sums = tuple(s for s in wanted.sums if p.itself or s.cols == of_columns)
        if (of_columns and p.itself) or not (wants or own_sums):
            found.append(None)
            continue
        launches, gradient, values = side_launches(p, upstream, own_sums, of_columns, wants)
        for launch in launches:
            launch.run()
        found.append(None if gradient is None else gradient[0] if len(gradient) == 1 else gradient.sum(0))
        sums.update(zip(own_sums, values, strict=True))
    return Gradients(*found, sums)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A rectangle of pairs, whose weights are written by `launches`."""

    rows: slice
    cols: slice
    weights: Tensor | None
    launches: tuple[Launch, ...]


def chunks(
    p: Problem, upstream: Mapping[str, Any], sums: tuple[TileSum, ...], values: Tensor, writes: bool
) -> Iterator[Chunk]:
    """The rectangles of the matrix; `values` are the sums one after another once all of them are done."""
    N, M, _ = p.shape
    tiles = p.tiles("weights", resident=False)
    height = max(1, min(triton.cdiv(CHUNK_ROWS, tiles.rows), triton.cdiv(N, tiles.rows))) * tiles.rows
    most = CHUNK_BYTES // (height * p.x.element_size()) // tiles.cols
    width = max(1, min(most, triton.cdiv(M, tiles.cols))) * tiles.cols
    row_blocks = height // tiles.rows
    span, spans = _spans(row_blocks, width, tiles.cols)
    parts = Parts.of(p, sums, spans, row_blocks, p.itself)
    buffer = p.x.new_empty((height * width,)) if writes else None
    places = [(i, j) for i in range(0, N, height) for j in range(0, M, width) if not p.itself or j + width > i]
    for i, j in places:
        rows, cols = slice(i, min(i + height, N)), slice(j, min(j + width, M))
        shape = (rows.stop - i, cols.stop - j)
        weights = None if buffer is None else buffer[: shape[0] * shape[1]].view(shape)
        used = triton.cdiv(shape[0], tiles.rows)
        arguments = {
            **p.sides(),
            **p.arguments(tiles),
            **upstream,
            "first_row": i,
            "blocks": used,
            "first_col": j,
            "last_col": cols.stop,
            "span": span,
            "spans": spans,
            "row_blocks": row_blocks,
            "weights": weights,
            "weights_stride": shape[1],
            "partials": parts.memory,
            "sums": sums,
        }
        launches = [Launch(weights_kernel, used * triton.cdiv(shape[1], span), arguments, tiles.options)]
        if sums:
            launches.append(parts.merge(p, sums, used, values, None, last=(i, j) == places[-1]))
        yield Chunk(rows, cols, weights, tuple(launches))


def by_chunks(p: Problem, upstream: Mapping[str, Any], wanted: Wanted) -> Gradients:
    """Both gradients as products of weights that are written chunk by chunk."""
    dx = p.x.new_zeros(p.x.shape, dtype=torch.float32) if wanted.dx else None
    dy = p.y.new_zeros(p.y.shape, dtype=torch.float32) if wanted.dy and not p.itself else None
    of_columns = dx if p.itself else dy
    sizes = [p.shape[each.cols] for each in wanted.sums]
    values = p.x.new_empty((sum(sizes),), dtype=torch.float64)
    factor = upstream["norm"]
    for chunk in chunks(p, upstream, wanted.sums, values, wanted.dx or wanted.dy):
        for launch in chunk.launches:
            launch.run()
        if chunk.weights is None:
            continue
        if dx is not None:
            dx[chunk.rows] += _unscaled(_product(chunk.weights, p.y[chunk.cols]), factor)
        if of_columns is not None:
            of_columns[chunk.cols] += _unscaled(_product(chunk.weights.T, p.x[chunk.rows]), factor)
    return Gradients(dx, dy, dict(zip(wanted.sums, values.split(sizes), strict=True)))


def _unscaled(product: Tensor, norm: Tensor | None) -> Tensor:
    return product if norm is None else product.div_(norm)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The matrix product, summed and returned in float32."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def give_back(gradient: Tensor, residual: Tensor, partner: Tensor, other: Tensor, arch: str) -> Launch:
    """What rounding the weights took from each row, along its partner."""
    rows, depth = (32, 16) if arch == "interpreter" else (16, 64)
    size, D = gradient.shape
    arguments = {
        "gradient": gradient,
        "residual": residual,
        "partner": partner,
        "other": other,
        "other_stride": other.stride(0),
        "size": size,
        "D": D,
        "ROWS": rows,
        "DEPTH": depth,
    }
    return Launch(give_back_kernel, triton.cdiv(size, rows), arguments, {"num_warps": 4})
