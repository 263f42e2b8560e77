"""similarity_prefix in Triton: fused passes over running inner products between products of the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.core.ordered import in_parts
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf
from contrastive_ops.core.rules import Slot
from contrastive_ops.cuda import _products as products
from contrastive_ops.reference.similarity_prefix import inverse_lengths, segments, weighted_prefixes

from . import _pairs, _stored
from ._cover import Combine, pairwise_cover
from ._folds import exact_sum, with_lost
from ._launch import arch_of, recording
from ._similarity_problem import Problem
from ._variants import Variant

__all__ = ["backward", "forward", "variants"]


@triton.jit(do_not_specialize=["N", "M", "first_row", "last_row"])
def weights_kernel(
    dots, N, M, first_row, last_row, data, offsets, guide_depth, row_lse, col_lse, d_rows, d_cols, d_target, total,
    weights, rest, of_rows, by_cols, sets: tl.constexpr, guide: tl.constexpr, ADD: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """dtotal/d(inner product) through one prefix, on top of what longer ones weigh, for rows of a chunk.

    Args:
        row_lse: (N,) logsumexps of rows; None as `d_rows` where no gradient arrives at them. `col_lse` likewise.
        d_target: (N,) what arrives at the targets' logits, or None.
        total: (rows, M) float32, the weights so far; read only where `ADD`.
        weights: (rows, M) where to write them in the dtype that they are multiplied in, and `rest` of `Weights`.
        of_rows: (N,) sums of rows, of derivatives times inner products.
        by_cols: (programs, M) the same of columns.
    """
    own = _stored.owned(first_row, OWN)
    is_row = own < last_row
    rows = own[:, None]
    along, lost = tl.zeros([OWN], tl.float32), tl.zeros([OWN], tl.float32)
    for start in range(0, M, OTHER):
        other = start + tl.arange(0, OTHER)
        cols = other[None, :]
        found, z = _stored.stored_logits(
            dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, sets, guide, 0, OWN, OTHER
        )
        e = tl.zeros_like(found)
        if d_rows is not None:
            lse = tl.load(row_lse + own, mask=is_row, other=0.0)[:, None]
            e += _stored.probability(z, lse) * tl.load(d_rows + own, mask=is_row, other=0.0)[:, None]
        if d_cols is not None:
            lse = tl.load(col_lse + other, mask=other < M, other=0.0)[None, :]
            e += _stored.probability(z, lse) * tl.load(d_cols + other, mask=other < M, other=0.0)[None, :]
        e = tl.where(z == float("-inf"), 0.0, e)
        if d_target is not None:
            is_own = _pairs.own_column(rows, cols, N, data, sets[0]) & is_row[:, None]
            e = tl.where(is_own, tl.load(d_target + own, mask=is_row, other=0.0)[:, None], e)
        times = tl.where(e == 0, 0.0, e * found)
        along, lost = exact_sum(along, tl.sum(times, 1), lost)
        tl.store(by_cols + tl.program_id(0).to(tl.int64) * M + other, tl.sum(times, 0), mask=other < M)
        g = e * _pairs.scale_factor(rows, cols, N, M, data, sets[0])
        g *= _pairs.unit_factor(rows, cols, N, M, data, sets[0])
        if ADD:
            g += _stored.chunk_tile(total, rows, cols, first_row, last_row, M)
        _stored.store_tile(total, g, own, other, first_row, last_row, M)
        _stored.store_weights(weights, rest, g, own, other, first_row, last_row, M)
    tl.store(of_rows + own, with_lost(along, lost), mask=is_row)


# ---- Launchers -------------------------------------------------------------------------------------------------------


class _Prefixes:
    """Both sides, the problem of every prefix, and the factors of its rows."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        scale: Tensor,
        target: Tensor | None,
        differ_rows: Tensor | None,
        differ_cols: Tensor | None,
        dims: Sequence[int],
        diagonal: int | None,
        normalize: bool,
    ) -> None:
        self.segments, self.target = segments(dims), target
        x_factor, self.x_slope = inverse_lengths(x.float(), dims, normalize)
        y_factor, self.y_slope = (x_factor, self.x_slope) if y is None else inverse_lengths(y.float(), dims, normalize)
        self.scale, self.factors = scale.detach().reshape(1), (x_factor, y_factor)
        ids = {Slot.DIFFER_ROWS: differ_rows, Slot.DIFFER_COLS: differ_cols}
        rules = {slot: tensor for slot, tensor in ids.items() if tensor is not None}
        arch = arch_of(x)
        self.problems = []
        for of_rows, of_cols in zip(x_factor, y_factor, strict=True):
            own = LogitSet(ScaleOf.ALL, False, diagonal, {**rules, Slot.ROW_FACTOR: of_rows, Slot.COL_FACTOR: of_cols})
            encoded = Layout((own,), ()).encode()
            self.problems.append(Problem.of(x, y, self.scale, None, None, target, *encoded, arch))
        self.x, self.y = self.problems[0].x, self.problems[0].y

    @property
    def shape(self) -> tuple[int, int, int]:
        """Prefixes, rows, columns."""
        return len(self.problems), len(self.x), len(self.y)

    def add_segment(self, prefix: int, rows: slice, out: Tensor, before: Tensor | None) -> None:
        """The inner products of a prefix from those of the one before it, which may be in the same memory."""
        columns = self.segments[prefix]
        if before is not None and before is not out:
            out.copy_(before)
        products.set_or_add(out, self.x[rows, columns], self.y[:, columns].T, add=before is not None)

    def target_logits(self, prefix: int, rows: slice, dots: Tensor) -> Tensor:
        """The logits of the rows' targets, NaN for a target that does not exist."""
        target = self.target[rows]  # type: ignore[index]
        there = (target >= 0) & (target < self.shape[2])
        column = torch.where(there, target, 0)
        of_rows, of_cols = (factor[prefix] for factor in self.factors)
        logit = self.scale * (dots.gather(1, column[:, None]).squeeze(1) * (of_rows[rows] * of_cols[column]))
        return torch.where(there, logit, torch.nan)


def forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    differ_rows: Tensor | None,
    differ_cols: Tensor | None,
    dims: Sequence[int],
    diagonal: int | None,
    normalize: bool,
    directions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rows (P, N), cols (P, M), target_logit (P, N)); what was not asked for is empty."""
    q = _Prefixes(x, y, scale, target, differ_rows, differ_cols, dims, diagonal, normalize)
    count, N, M = q.shape
    lines = [[_stored.no_lines(x, 1, size) for _ in range(count)] for size in (N, M)]
    target_logit = x.new_empty((count, 0 if target is None else N), dtype=torch.float32)
    buffer = _stored.room(q.problems[0])
    for rows in _stored.chunks(q.problems[0]):
        dots = buffer[: (rows.stop - rows.start) * M].view(-1, M)
        for prefix, p in enumerate(q.problems):
            q.add_segment(prefix, rows, dots, dots if prefix else None)
            chunk = _stored.Chunk(p, rows, dots)
            for cols in (False, True):
                if directions >> cols & 1:
                    chunk.launch(_stored.lines_kernel, cols, lines=lines[cols][prefix], size=(N, M)[cols])
            if target is not None:
                target_logit[prefix, rows] = q.target_logits(prefix, rows, dots)

    def finished(cols: bool) -> Tensor:
        if not directions >> cols & 1:
            return x.new_empty((count, 0), dtype=torch.float32)
        return torch.cat([sum(_stored.tops_and_logs(each)) for each in lines[cols]])  # type: ignore[misc]

    return finished(False), finished(True), target_logit


def backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    target: Tensor | None,
    differ_rows: Tensor | None,
    differ_cols: Tensor | None,
    dims: Sequence[int],
    diagonal: int | None,
    normalize: bool,
    rows: Tensor,
    cols: Tensor,
    d_rows: Tensor | None,
    d_cols: Tensor | None,
    d_target: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, y and scale in float32, empty where not needed."""
    q = _Prefixes(x, y, scale, target, differ_rows, differ_cols, dims, diagonal, normalize)
    count, N, M = q.shape
    # float16 cannot hold the factors of short rows beside those of long ones.
    left, right = (side.float() if x.dtype == torch.float16 else side for side in (q.x, q.y))
    dx, dy = (side.new_zeros(side.shape, dtype=torch.float32) for side in (q.x, q.y))
    of_rows, of_cols = (x.new_zeros((count, size), dtype=torch.float32) for size in (N, M))
    matrices = count + 2
    buffers = [_stored.room(q.problems[0], matrices) for _ in range(count + 1)]
    weights = _stored.Weights(left, buffers[0].numel())
    for number, part in enumerate(_stored.chunks(q.problems[0], matrices)):
        *dots, total = (memory[: (part.stop - part.start) * M].view(-1, M) for memory in buffers)
        for prefix in range(count):
            q.add_segment(prefix, part, dots[prefix], dots[prefix - 1] if prefix else None)
        for prefix in reversed(range(count)):
            chunk = _stored.Chunk(q.problems[prefix], part, dots[prefix])
            by_cols = chunk.blocks()
            chunk.launch(
                weights_kernel, False, row_lse=_of(rows, prefix, d_rows), col_lse=_of(cols, prefix, d_cols),
                d_rows=_of(d_rows, prefix), d_cols=_of(d_cols, prefix),
                d_target=None if target is None else _of(d_target, prefix), total=total,
                of_rows=of_rows[prefix], by_cols=by_cols, ADD=prefix < count - 1, **weights.arguments(total.shape),
            )  # fmt: skip
            of_cols[prefix] += by_cols.sum(0, dtype=torch.float64)
            # A prefix weighs all columns before its end, so a segment has the weights of the prefixes from its own on.
            columns = q.segments[prefix]
            if needs & 1:
                weights.product(dx[part, columns], right[:, columns], add=False)
            if needs & 2 or (y is None and needs & 1):
                weights.product(dy[:, columns], left[part, columns], add=number > 0, of_columns=True)
    if normalize:
        dx -= weighted_prefixes(q.x.float(), q.segments, q.scale * of_rows * q.x_slope)
        dy -= weighted_prefixes(q.y.float(), q.segments, q.scale * of_cols * q.y_slope)
    if y is None:
        dx += dy
    return (
        dx if needs & 1 else dx.new_empty((0, dx.shape[1])),
        dy if needs & 2 and y is not None else dy.new_empty((0, dy.shape[1])),
        in_parts(of_rows.flatten()).float().reshape(scale.shape) if needs & 4 else of_rows.new_empty((0,)),
    )


def _of(values: Tensor | None, prefix: int, wanted: Tensor | bool | None = True) -> Tensor | None:
    """The row of a prefix, where there is one that somebody wants."""
    return None if values is None or wanted is None else values[prefix].contiguous()


# ---- What is compiled ahead of time ----------------------------------------------------------------------------------


def variants(arch: str, combine: Combine = pairwise_cover) -> Iterator[Variant]:
    """Every two options that users can reach together in some variant."""
    choices: dict[str, Sequence[Any]] = {
        "dtype": (torch.bfloat16, torch.float16, torch.float32),
        "differ": (False, True),
        "target": (False, True),
        "diagonal": (None, 0),
        "directions": (1, 2, 3),
    }
    for row in combine(choices):
        x, y = (torch.zeros(size, 64, dtype=row["dtype"]) for size in (48, 80))
        ids = [torch.zeros(size, dtype=torch.int64) if row["differ"] else None for size in (48, 80)]
        target = torch.zeros(48, dtype=torch.int64) if row["target"] else None
        problem = (x, y, torch.ones(()), target, *ids, [16, 64], row["diagonal"], True)
        with recording(arch) as recorded:
            rows, cols, logit = forward(*problem, row["directions"])
            upstream = [each if each.numel() else None for each in (rows, cols, logit)]
            backward(*problem, rows, cols, *upstream, 7)
        about = " ".join(f"{name}={_stored.shown(value)}" for name, value in row.items())
        yield from _stored.distinct(recorded.variants(f"similarity_prefix {about}"))
