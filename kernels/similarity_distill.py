"""similarity_distill in Triton: fused passes over chunks of both inner products between products of the library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.core.numerics import DECIDED
from contrastive_ops.core.ordered import in_parts
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf
from contrastive_ops.reference.similarity_distill import COLS, DECIDES, KINDS, PAIRWISE, ROWS

from . import _pairs, _stored
from ._cover import Combine, pairwise_cover
from ._divergences import JS, between, between_slope, divergence, divergence_slope, half_log_share, log_probability
from ._folds import exact_sum, with_lost
from ._launch import arch_of, recording
from ._similarity_problem import Problem, dense_rows
from ._variants import Variant

__all__ = ["backward", "forward", "variants"]

_DECIDED: tl.constexpr = tl.constexpr(DECIDED)
_PAIRWISE: tl.constexpr = tl.constexpr(len(KINDS) - len(PAIRWISE))

# ---- Kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def both_logits(
    dots, teacher_dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, teacher_data, sets, guide,
    teacher_sets, OWN_COLS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Inner products of the student, its logits and the teacher's."""
    found, s = _stored.stored_logits(
        dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, sets, guide, OWN_COLS, OWN, OTHER
    )
    t = _stored.teacher_logits(
        teacher_dots, s, own, other, first_row, last_row, N, M, teacher_data, teacher_sets, OWN_COLS
    )
    return found, s, t


@triton.jit
def both_log_probabilities(s, t, statistics, line, mask, size):
    """Logarithms of the teacher's and the student's probabilities; `statistics` are [5, size]."""
    at = statistics + line
    log_q = log_probability(s, tl.load(at, mask=mask, other=0.0), tl.load(at + size, mask=mask, other=0.0))
    at += 2 * size
    log_p = log_probability(t, tl.load(at, mask=mask, other=0.0), tl.load(at + size, mask=mask, other=0.0))
    return log_p, log_q


@triton.jit(do_not_specialize=["N", "M", "first_row", "last_row", "size"])
def values_kernel(
    dots, teacher_dots, N, M, first_row, last_row, data, offsets, guide_depth, teacher_data, statistics, sums, size,
    delta, sets: tl.constexpr, guide: tl.constexpr, teacher_sets: tl.constexpr, KIND: tl.constexpr,
    OWN_COLS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Go on with the divergences of lines, and with the means that derivatives are taken from.

    Args:
        statistics: [5, size] of the lines; without meaning where pairs are compared one by one.
        sums: [4, size]: divergence, mean, and what rounding took from each.
    """
    first, last, begin, end = _stored.bounds(M, first_row, last_row, OWN_COLS)
    own = _stored.owned(first, OWN)
    mask = own < last
    at = sums + own
    total, lost = tl.load(at, mask=mask, other=0.0), tl.load(at + 2 * size, mask=mask, other=0.0)
    mean, mean_lost = tl.load(at + size, mask=mask, other=0.0), tl.load(at + 3 * size, mask=mask, other=0.0)
    for start in range(begin, end, OTHER):
        other = start + tl.arange(0, OTHER)
        _, s, t = both_logits(
            dots, teacher_dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, teacher_data, sets,
            guide, teacher_sets, OWN_COLS, OWN, OTHER,
        )  # fmt: skip
        if KIND >= _PAIRWISE:
            value = between(s, t, delta, KIND)
        else:
            log_p, log_q = both_log_probabilities(s, t, statistics, own[:, None], mask[:, None], size)
            value = divergence(log_p, log_q, KIND)
            # Lines and pairs outside of the chunk are -inf in both.
            value = tl.where(mask[:, None] & (other < end)[None, :], value, 0.0)
            if KIND == JS:
                of_pair = tl.where(s == float("-inf"), 0.0, _stored.exp(log_q) * half_log_share(log_p, log_q))
                mean, mean_lost = exact_sum(mean, tl.sum(of_pair, 1), mean_lost)
        total, lost = exact_sum(total, tl.sum(value, 1), lost)
    tl.store(at, total, mask=mask)
    tl.store(at + size, mean, mask=mask)
    tl.store(at + 2 * size, lost, mask=mask)
    tl.store(at + 3 * size, mean_lost, mask=mask)


@triton.jit
def line_slopes(s, t, statistics, upstream, line, mask, size, KIND: tl.constexpr):
    """The derivative of the total by the student's logits through their lines, and where these are decided.

    There it is minus the sum of the others.
    """
    arriving = tl.load(upstream + line, mask=mask, other=0.0)
    log_p, log_q = both_log_probabilities(s, t, statistics, line, mask, size)
    top_t = tl.load(statistics + 2 * size + line, mask=mask, other=float("-inf"))
    arriving = tl.where(top_t == float("-inf"), 0.0, arriving)  # a line without a pair is 0, whatever is in it
    mean = tl.load(statistics + 4 * size + line, mask=mask, other=0.0)
    slope = tl.where((arriving == 0) | (s == float("-inf")), 0.0, arriving * divergence_slope(log_p, log_q, mean, KIND))
    return slope, _stored.exp(log_q) > _DECIDED


@triton.jit(do_not_specialize=["N", "M", "first_row", "last_row", "size"])
def totals_kernel(
    dots, teacher_dots, N, M, first_row, last_row, data, offsets, guide_depth, teacher_data, statistics, upstream, sums,
    size, sets: tl.constexpr, guide: tl.constexpr, teacher_sets: tl.constexpr, KIND: tl.constexpr,
    OWN_COLS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Go on with the sums of the derivatives of lines, [2, size], without those of decided pairs."""
    first, last, begin, end = _stored.bounds(M, first_row, last_row, OWN_COLS)
    own = _stored.owned(first, OWN)
    mask = own < last
    at = sums + own
    total, lost = tl.load(at, mask=mask, other=0.0), tl.load(at + size, mask=mask, other=0.0)
    for start in range(begin, end, OTHER):
        other = start + tl.arange(0, OTHER)
        _, s, t = both_logits(
            dots, teacher_dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, teacher_data, sets,
            guide, teacher_sets, OWN_COLS, OWN, OTHER,
        )  # fmt: skip
        slope, decided = line_slopes(s, t, statistics, upstream, own[:, None], mask[:, None], size, KIND)
        total, lost = exact_sum(total, tl.sum(tl.where(decided, 0.0, slope), 1), lost)
    tl.store(at, total, mask=mask)
    tl.store(at + size, lost, mask=mask)


@triton.jit(do_not_specialize=["N", "M", "first_row", "last_row"])
def weights_kernel(
    dots, teacher_dots, N, M, first_row, last_row, data, offsets, guide_depth, teacher_data, row_statistics,
    col_statistics, d_rows, d_cols, row_totals, col_totals, delta, weights, rest, of_bias, of_scale, by_cols,
    sets: tl.constexpr, guide: tl.constexpr, teacher_sets: tl.constexpr, KIND: tl.constexpr, DECIDES: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """dtotal/d(inner product of the student) of rows of a chunk, and the sums of dtotal/dlogit.

    Args:
        row_statistics: [5, N]; None as `d_rows` where rows are not compared. `col_statistics` likewise.
        row_totals: of `totals_kernel`, one number a row, where the kind `DECIDES`.
        weights: where to write, and `rest` of `Weights`.
        of_bias: (N,) sums of rows.
        of_scale: (N,) sums of rows, of derivatives times inner products.
        by_cols: (programs, M) sums of columns, or None.
    """
    own = _stored.owned(first_row, OWN)
    is_row = own < last_row
    rows = own[:, None]
    bias, bias_lost = tl.zeros([OWN], tl.float32), tl.zeros([OWN], tl.float32)
    scale, scale_lost = tl.zeros([OWN], tl.float32), tl.zeros([OWN], tl.float32)
    for start in range(0, M, OTHER):
        other = start + tl.arange(0, OTHER)
        cols = other[None, :]
        is_col = cols < M
        found, s, t = both_logits(
            dots, teacher_dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, teacher_data, sets,
            guide, teacher_sets, 0, OWN, OTHER,
        )  # fmt: skip
        e = tl.zeros_like(found)
        if d_rows is not None:
            if KIND >= _PAIRWISE:
                e += tl.load(d_rows + rows, mask=is_row[:, None], other=0.0) * between_slope(s, t, delta, KIND)
            else:
                slope, decided = line_slopes(s, t, row_statistics, d_rows, rows, is_row[:, None], N, KIND)
                if DECIDES:
                    slope = tl.where(decided, -tl.load(row_totals + rows, mask=is_row[:, None], other=0.0), slope)
                e += slope
        if d_cols is not None:
            if KIND >= _PAIRWISE:
                e += tl.load(d_cols + cols, mask=is_col, other=0.0) * between_slope(s, t, delta, KIND)
            else:
                slope, decided = line_slopes(s, t, col_statistics, d_cols, cols, is_col, M, KIND)
                if DECIDES:
                    slope = tl.where(decided, -tl.load(col_totals + cols, mask=is_col, other=0.0), slope)
                e += slope
        e = tl.where(s == float("-inf"), 0.0, e)
        bias, bias_lost = exact_sum(bias, tl.sum(e, 1), bias_lost)
        scale, scale_lost = exact_sum(scale, tl.sum(tl.where(e == 0, 0.0, e * found), 1), scale_lost)
        if by_cols is not None:
            at = by_cols + tl.program_id(0).to(tl.int64) * M + other
            tl.store(at, tl.sum(e, 0), mask=other < M)
        g = e * _pairs.scale_factor(rows, cols, N, M, data, sets[0])
        _stored.store_weights(weights, rest, g, own, other, first_row, last_row, M)
    tl.store(of_bias + own, with_lost(bias, bias_lost), mask=is_row)
    tl.store(of_scale + own, with_lost(scale, scale_lost), mask=is_row)


# ---- Launchers -------------------------------------------------------------------------------------------------------


class _Both:
    """The problem of the student, the teacher's matrices and rules, and chunks of both inner products."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor | None,
        scale: Tensor,
        row_bias: Tensor | None,
        col_bias: Tensor | None,
        teacher_x: Tensor,
        teacher_y: Tensor | None,
        teacher_scale: Tensor,
        teacher_row_bias: Tensor | None,
        teacher_col_bias: Tensor | None,
        pair_data: Sequence[Tensor],
        spec: Sequence[int],
        kind: str,
        delta: float,
        dims: int,
    ) -> None:
        y, teacher_y = x if y is None else y, teacher_x if teacher_y is None else teacher_y
        self.p = Problem.of(x, y, scale, row_bias, col_bias, None, pair_data, spec, arch_of(x))
        self.teacher = dense_rows(teacher_x), dense_rows(teacher_y)
        per_row = teacher_scale.shape[0] != 1
        layout = Layout((LogitSet(ScaleOf.ROWS if per_row else ScaleOf.ALL),), ())
        self.rules = _pairs.arguments(
            layout, len(x), len(y), teacher_scale, teacher_row_bias, teacher_col_bias
        )  # fmt: skip
        self.kind, self.delta, self.has_lines = kind, float(delta), kind not in PAIRWISE
        # Which directions are compared, and how many lines each has.
        self.wanted = tuple(bool(dims & bit) for bit in (ROWS, COLS))
        self.sizes = (len(x), len(y))

    @property
    def number(self) -> int:
        """The number of the kind, as kernels have it."""
        return KINDS.index(self.kind)

    def chunks(self) -> Iterator[_stored.Chunk]:
        """All chunks, one after another in the same memory."""
        p, buffers = self.p, [_stored.room(self.p, 4) for _ in range(2)]
        for rows in _stored.chunks(p, 4):
            dots = _stored.inner_products(p.x[rows], p.y, buffers[0])
            of_teacher = _stored.inner_products(self.teacher[0][rows], self.teacher[1], buffers[1])
            yield _stored.Chunk(p, rows, dots, (self.rules, of_teacher))

    def parts(self, lines: Tensor) -> list[Tensor | None]:
        """Of (.., rows and columns that are compared) those of the rows, and those of the columns."""
        rows = self.sizes[0] if self.wanted[0] else 0
        split = lines[..., :rows], lines[..., rows:]
        return [part.contiguous() if wants else None for part, wants in zip(split, self.wanted, strict=True)]


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (values, statistics, kept): the problem and `kept_size`, see the operator."""
    *problem, kept_size = arguments
    b = _Both(*problem)
    x = b.p.x
    statistics = [x.new_zeros((5, size), dtype=torch.float32) for size in b.sizes]
    sums = [x.new_zeros((4, size), dtype=torch.float32) for size in b.sizes]
    lines = [_stored.no_lines(x, 2, size) for size in b.sizes]

    def add_lines(chunk: _stored.Chunk, cols: bool) -> None:
        chunk.launch(_stored.lines_kernel, cols, lines=lines[cols], size=b.sizes[cols])

    def add_values(chunk: _stored.Chunk, cols: bool) -> None:
        chunk.launch(
            values_kernel, cols, statistics=statistics[cols], sums=sums[cols], size=b.sizes[cols], delta=b.delta,
            KIND=b.number,
        )  # fmt: skip

    if b.wanted[1] and b.has_lines:  # the lines of columns are known after all rows
        for chunk in b.chunks():
            add_lines(chunk, True)
        _keep_lines(statistics[1], lines[1], slice(None))
    for chunk in b.chunks():
        if b.wanted[0]:
            if b.has_lines:
                add_lines(chunk, False)
                _keep_lines(statistics[0], lines[0], chunk.rows)
            add_values(chunk, False)
        if b.wanted[1]:
            add_values(chunk, True)
    values = []
    for own, own_sums, wants in zip(statistics, sums, b.wanted, strict=True):
        total, mean = (own_sums[k] + own_sums[2 + k].nan_to_num(0.0, 0.0, 0.0) for k in (0, 1))
        if b.has_lines:
            total = torch.where(own[2] == -torch.inf, 0.0, total)
        own[4] = total if b.kind == "reverse_kl" else mean
        values.append(total if wants else total[:0])
    kept = x.new_empty((kept_size,), dtype=torch.float32)
    asked = [
        own[:, : own.shape[1] if wants and b.has_lines else 0] for own, wants in zip(statistics, b.wanted, strict=True)
    ]
    return torch.cat(values), torch.cat(asked, 1), kept


def _keep_lines(statistics: Tensor, lines: Tensor, part: slice) -> None:
    tops, logs = _stored.tops_and_logs(lines[:, :, part])
    for side in (0, 1):
        statistics[2 * side, part], statistics[2 * side + 1, part] = tops[side], logs[side]


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of x, y, scale, row_bias, col_bias in float32, empty where not needed."""
    *problem, statistics, d_values, _, needs = arguments
    b = _Both(*problem)
    x, y = b.p.x, b.p.y
    # Derivatives have no bound that float16 could be given the range of.
    left, right = (side.float() if side.dtype == torch.float16 else side for side in (x, y))
    dx, dy = (side.new_zeros(side.shape, dtype=torch.float32) for side in (x, y))
    of_bias, of_scale = (x.new_zeros((len(x),), dtype=torch.float32) for _ in range(2))
    by_cols = x.new_zeros((len(y),), dtype=torch.float32)
    of_lines, upstream = b.parts(statistics) if b.has_lines else [None, None], b.parts(d_values.float())
    totals = [x.new_zeros((2, size), dtype=torch.float32) for size in b.sizes]

    def add_totals(chunk: _stored.Chunk, cols: bool) -> None:
        chunk.launch(
            totals_kernel, cols, statistics=of_lines[cols], upstream=upstream[cols], sums=totals[cols],
            size=b.sizes[cols], KIND=b.number,
        )  # fmt: skip

    decides = b.kind in DECIDES
    if b.wanted[1] and decides:
        for chunk in b.chunks():
            add_totals(chunk, True)
    col_totals = _finished(totals[1])
    weights = _stored.Weights(left, _stored.room(b.p, 4).numel())
    for number, chunk in enumerate(b.chunks()):
        if b.wanted[0] and decides:
            add_totals(chunk, False)
        of_blocks = chunk.blocks() if needs >> 4 & 1 else None
        chunk.launch(
            weights_kernel, False, row_statistics=of_lines[0], col_statistics=of_lines[1], d_rows=upstream[0],
            d_cols=upstream[1], row_totals=_finished(totals[0]), col_totals=col_totals, delta=b.delta, of_bias=of_bias,
            of_scale=of_scale, by_cols=of_blocks, KIND=b.number, DECIDES=decides,
            **weights.arguments(chunk.dots.shape),
        )  # fmt: skip
        if of_blocks is not None:
            by_cols += of_blocks.sum(0, dtype=torch.float64)
        if needs & 1:
            weights.product(dx[chunk.rows], right, add=False)
        if needs & 2 or problem[1] is None:
            weights.product(dy, left[chunk.rows], add=number > 0, of_columns=True)
    own = b.p.layout.sets[0]
    sign = -1.0 if own.negate else 1.0
    dscale = sign * (of_scale if own.scale_of == ScaleOf.ROWS else in_parts(of_scale).reshape(1).float())
    if problem[1] is None:
        dx += dy
    full = (dx, dy, dscale, sign * of_bias, sign * by_cols)
    return tuple(g if needs >> bit & 1 else g.new_empty((0, *g.shape[1:])) for bit, g in enumerate(full))


def _finished(sums: Tensor) -> Tensor:
    """Sums with what rounding took from them."""
    return sums[0] + sums[1].nan_to_num(0.0, 0.0, 0.0)


# ---- What is compiled ahead of time ----------------------------------------------------------------------------------


def variants(arch: str, combine: Combine = pairwise_cover) -> Iterator[Variant]:
    """Every two options that users can reach together in some variant."""
    choices: dict[str, Sequence[Any]] = {
        "kind": KINDS,
        "dtype": (torch.bfloat16, torch.float16, torch.float32),
        "rules": _stored.RULES,
        "scale_of": (ScaleOf.ALL, ScaleOf.ROWS),
        "bias": (False, True),
        "dims": (ROWS, COLS, ROWS | COLS),
    }
    for row in combine(choices):
        x, y, scale, bias, layout = _stored.sample(row)
        problem = (x, y, scale, None, None, x, y, scale, None, bias, *layout.encode(), row["kind"], 1.0, row["dims"])
        with recording(arch) as recorded:
            values, statistics, kept = forward(*problem, 0)
            backward(*problem, statistics, values, kept, 7 if bias is None else 31)
        about = " ".join(f"{name}={_stored.shown(value)}" for name, value in row.items())
        yield from _stored.distinct(recorded.variants(f"similarity_distill {about}"))
