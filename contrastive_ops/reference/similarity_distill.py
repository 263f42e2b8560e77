"""similarity_distill in plain PyTorch: any device, any floating dtype, memory bounded by chunks of rows.

Every function takes what the operator of the same name in ops/similarity_distill.py takes. `values` is made
of differentiable operations: it defines the second derivative of every backend.

A *line* is a row or a column. Its statistics are (5, lines): the logsumexp of the student's logits as their maximum and
the logarithm of sum exp(logit - maximum), the same of the teacher's, and the mean that a derivative is taken from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import accumulator
from ..core.numerics import CHUNK_ELEMENTS, DECIDED, chunks_of_rows, times
from ..core.ordered import long_product
from ..core.problem import Layout, LogitSet, ScaleOf
from ..core.recompute import recomputed
from .pairs import SetOfChunk, chunk_sets, inner_products

# The position is the number of a kind in csrc/similarity_distill.h. The last two are of logits that are squared
# distances, pair by pair: the Huber loss between the student's and the teacher's distance, and the distance itself.
KINDS = ("kl", "reverse_kl", "ce", "js", "huber", "distance")
PAIRWISE = ("huber", "distance")
# Whose derivative is q times the distance to a mean; that of the others is a difference that is formed from logarithms.
DECIDES = ("reverse_kl", "js")
# Bits of `dims`.
ROWS, COLS = 1, 2

# ---- One pair --------------------------------------------------------------------------------------------------------


def _series(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        total = total * x + c
    return total


# (exp(d) - 1 - d) / d^2, and ((1 + r) log(1 + r) + (1 - r) log(1 - r)) / 2 r^2 in r^2.
_EXCESS = [1 / math.factorial(k + 2) for k in range(15)]
_MIXTURE = [1 / (2 * k * (2 * k - 1)) for k in range(1, 25)]


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (exp(d) - 1 - d) with d = log q - log p: never negative, and sums to KL(p || q) as p and q sum to 1."""
    p, q = log_p.exp(), log_q.exp()
    d = torch.where((p == 0) & (q == 0), 0.0, log_q - log_p)
    near = d.abs() < 0.5
    # Where a branch is not taken, it must be finite for its gradient to be 0.
    small = torch.where(near, d, 0.0)
    large = torch.where(p == 0, 0.0, p * torch.where(p == 0, 0.0, d))
    return torch.where(near, p * small.square() * _series(_EXCESS, small), q - p - large)


def _share(p: Tensor, q: Tensor) -> Tensor:
    """(q - p) / (q + p), 0 for 0 / 0."""
    total = p + q
    return (q - p) / torch.where(total == 0, 1.0, total)


def _js(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(p log(p / m) + q log(q / m)) / 2 with m = (p + q) / 2, from r = (q - p) / (q + p): never negative."""
    p, q = log_p.exp(), log_q.exp()
    r = _share(p, q)
    near = r.abs() < 0.25
    small = torch.where(near, r, 0.0).square()
    low, high = 1 - r.abs(), 1 + r.abs()
    far = (high * high.log() + low * torch.where(low > 0, low, 1.0).log()) / 2
    return (p + q) / 2 * torch.where(near, small * _series(_MIXTURE, small), far)


def _half_log_share(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log(q / m) / 2, 0 where q is 0."""
    p, q = log_p.exp(), log_q.exp()
    excess = torch.expm1(log_q - log_p)
    far = torch.where(q == 0, 1.0, 2 * q / torch.where(q == 0, 1.0, p + q)).log()
    return torch.where(excess.abs() < 0.5, (excess / (excess + 2)).log1p(), far) / 2


def _difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """q - p; two numbers near 1 differ by what their logarithms do."""
    p, d = log_p.exp(), log_q - log_p
    return torch.where(d.abs() < 0.5, p * torch.expm1(d), log_q.exp() - p)


def _divergence(kind: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """What each pair adds to the divergence of the student q from the teacher p."""
    if kind == "kl":
        return _kl(log_p, log_q)
    if kind == "reverse_kl":
        return _kl(log_q, log_p)
    if kind == "js":
        return _js(log_p, log_q)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, -p * torch.where(p == 0, 0.0, log_q))


def _divergence_slope(kind: str, log_p: Tensor, log_q: Tensor, mean: Tensor) -> Tensor:
    """The derivative of a line's divergence by the student's logits."""
    q = log_q.exp()
    if kind in ("kl", "ce"):
        return _difference(log_p, log_q)
    of_pair = _half_log_share(log_p, log_q) if kind == "js" else log_q - log_p
    return torch.where(q == 0, 0.0, q * (of_pair - mean))


def _distance(square: Tensor) -> Tensor:
    """Square roots with gradient 0 at 0; rounding may have made a square negative, and -inf takes no part."""
    positive = (square > 0) | square.isnan()
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def _between(kind: str, delta: float, s: Tensor, t: Tensor) -> Tensor:
    """What each pair of distances adds."""
    student = _distance(s)
    if kind == "distance":
        return student
    gap = student - _distance(t)
    return torch.where(gap.abs() <= delta, gap.square() / 2, delta * (gap.abs() - delta / 2))


def _between_slope(kind: str, delta: float, s: Tensor, t: Tensor) -> Tensor:
    student = _distance(s)
    slope = torch.ones_like(student) if kind == "distance" else (student - _distance(t)).clamp(-delta, delta)
    return torch.where(student == 0, 0.0, slope / (2 * student))


# ---- Lines -----------------------------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """Logsumexps of rows or columns as maximum and logarithm; -inf and 0 where no pair takes part.

    The logarithm is that of 1 and the ratios of all others to the maximum, so that it keeps the digits of small ones.
    """

    top: Tensor
    log: Tensor

    def log_probability(self, logits: Tensor) -> Tensor:
        return (logits - _finite(self.top)) - self.log

    def unsqueeze(self, dim: int) -> _Line:
        return _Line(self.top.unsqueeze(dim), self.log.unsqueeze(dim))


def _finite(top: Tensor) -> Tensor:
    return torch.where(torch.isfinite(top), top, 0.0)


def _safe_log(total: Tensor) -> Tensor:
    return torch.where(total == 0, 1.0, total).log()


def _line(logits: Tensor, dim: int) -> _Line:
    """The lines of a chunk, with kept dimensions."""
    if logits.shape[dim] == 0:
        empty = logits.sum(dim, keepdim=True)
        return _Line(empty - torch.inf, empty)
    best = logits.detach().argmax(dim, keepdim=True)
    top = logits.gather(dim, best)
    ratio, is_number = (logits - _finite(top)).exp(), torch.isfinite(top)
    others = torch.where(is_number, ratio.scatter(dim, best, 0.0), ratio).sum(dim, keepdim=True)
    return _Line(top, torch.where(is_number, others.log1p(), _safe_log(others)))


def _merged(a: _Line, b: _Line) -> _Line:
    first = a.top >= b.top
    (top, low), (log, low_log) = (
        (torch.where(first, s, t), torch.where(first, t, s)) for s, t in zip(a, b, strict=True)
    )
    other, is_number = ((low - _finite(top)) + low_log).exp(), torch.isfinite(top)
    total = ((top - _finite(top)) + log).exp() + other
    return _Line(top, torch.where(is_number, (torch.expm1(log) + other).log1p(), _safe_log(total)))


# ---- The problem -----------------------------------------------------------------------------------------------------


class _Problem:
    """The arguments that all operators share, and chunks of both matrices."""

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
        self.x, self.y, self.kind, self.delta = x, y, kind, delta
        self.rows, self.cols = bool(dims & ROWS), bool(dims & COLS)
        self.dtype = accumulator(x.dtype)
        self.student = (x, y, scale, row_bias, col_bias)
        self.teacher = (teacher_x, teacher_y, teacher_scale, teacher_row_bias, teacher_col_bias)
        self.layout = Layout.decode(pair_data, spec)
        of_rows = teacher_scale.shape[0] != 1
        self.teacher_layout = Layout((LogitSet(ScaleOf.ROWS if of_rows else ScaleOf.ALL),), ())

    def chunks(self) -> Iterator[slice]:
        return chunks_of_rows(len(self.x), max(1, CHUNK_ELEMENTS // max(len(self.y), 1)))

    def logits(self, part: slice) -> tuple[SetOfChunk, Tensor, Tensor]:
        """The student's set, its logits and the teacher's: -inf in both where a pair takes no part."""
        student, s = self._one(self.layout, part, *self.student)
        _, t = self._one(self.teacher_layout, part, *self.teacher)
        return student, s, t.masked_fill(s.detach() == -torch.inf, -torch.inf)

    @staticmethod
    def _one(
        layout: Layout,
        part: slice,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        row_bias: Tensor | None,
        col_bias: Tensor | None,
    ) -> tuple[SetOfChunk, Tensor]:
        dots = inner_products(x[part], y)
        (each,) = chunk_sets(layout, part, dots, x, y, scale, row_bias, col_bias, None)
        return each, each.without_left_out()

    def lines(self) -> tuple[int, int]:
        """How many rows and columns have results."""
        return len(self.x) * self.rows, len(self.y) * self.cols


def values(*problem: Any) -> tuple[Tensor, Tensor]:
    """Return (values, statistics): of the rows, then of the columns, where these are asked for."""
    p = _Problem(*problem)
    rows, cols = p.lines()
    found = p.x.new_zeros((rows + cols,), dtype=p.dtype)
    statistics = p.x.new_zeros((5, 0 if p.kind in PAIRWISE else rows + cols), dtype=p.dtype)
    of_columns = _column_lines(p) if p.cols and p.kind not in PAIRWISE else None
    mean_of_columns = p.x.new_zeros((cols,), dtype=p.dtype)

    def one_chunk(part: slice) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        _, s, t = p.logits(part)
        if p.kind in PAIRWISE:
            pairs = _between(p.kind, p.delta, s, t)
            return pairs.sum(1), pairs.sum(0), None, None
        by_rows = (_line(s, 1), _line(t, 1)) if p.rows else None
        of_rows, row_mean = _line_values(p, s, t, by_rows, 1)
        of_cols, col_mean = _line_values(p, s, t, of_columns, 0)
        if by_rows is None:
            return of_rows, of_cols, None, col_mean
        of_rows = torch.where(by_rows[1].top.squeeze(1) == -torch.inf, 0.0, of_rows)
        parts = [*by_rows[0], *by_rows[1], row_mean[:, None]]
        return of_rows, of_cols, torch.cat(parts, 1).T.detach(), col_mean

    run = recomputed(one_chunk)
    for part in p.chunks():
        of_rows, of_cols, row_statistics, col_mean = run(part)
        if p.rows:
            found[part] = of_rows
        if p.cols:
            found[rows:] += of_cols
        if row_statistics is not None:
            statistics[:, part] = row_statistics
        if of_columns is not None and col_mean is not None:
            mean_of_columns += col_mean.detach()
    if of_columns is not None:
        found[rows:] = torch.where(of_columns[1].top[0] == -torch.inf, 0.0, found[rows:])
        parts = [*of_columns[0], *of_columns[1], mean_of_columns[None]]
        statistics[:, rows:] = torch.cat([each.detach() for each in parts])
    if p.kind == "reverse_kl":
        statistics[4] = found.detach()
    return found, statistics


def _line_values(
    p: _Problem, s: Tensor, t: Tensor, lines: tuple[_Line, _Line] | None, dim: int
) -> tuple[Tensor, Tensor]:
    """What a chunk adds to the values of its lines, and to their mean (for "js"; that of "reverse_kl" is its value)."""
    if lines is None:
        nothing = s.new_zeros((s.shape[1 - dim],))
        return nothing, nothing
    log_q, log_p = lines[0].log_probability(s), lines[1].log_probability(t)
    value = _divergence(p.kind, log_p, log_q).sum(dim)
    if p.kind != "js":
        return value, torch.zeros_like(value)
    return value, (log_q.exp() * _half_log_share(log_p, log_q)).sum(dim)


def _column_lines(p: _Problem) -> tuple[_Line, _Line]:
    """(1, M) the lines of all columns, of the student and the teacher."""

    def one_chunk(part: slice) -> tuple[_Line, _Line]:
        _, s, t = p.logits(part)
        return _line(s, 0), _line(t, 0)

    run = recomputed(one_chunk)
    parts = [run(part) for part in p.chunks()]
    student, teacher = parts[0]
    for more_student, more_teacher in parts[1:]:
        student, teacher = _merged(student, more_student), _merged(teacher, more_teacher)
    return student, teacher


# ---- The operators ---------------------------------------------------------------------------------------------------


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (values, statistics, kept): the problem and `kept_size`, see the operator."""
    *problem, kept_size = arguments
    x = problem[0]
    return *values(*problem), x.new_empty((kept_size,), dtype=accumulator(x.dtype))


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, scale, row_bias, col_bias in the accumulation dtype."""
    *problem, statistics, d_values, _, needs = arguments
    p = _Problem(*problem)
    rows, _ = p.lines()
    x, y, dtype = p.x, p.y, p.dtype
    dx, dy = (t.new_zeros(t.shape, dtype=dtype) for t in (x, y))
    dscale = torch.zeros_like(problem[2])
    drow_bias, dcol_bias = (t.new_zeros((len(t),), dtype=dtype) for t in (x, y))
    of_rows_scale = p.layout.sets[0].scale_of == ScaleOf.ROWS
    of_columns = _sums_of_columns(p, statistics[:, rows:], d_values[rows:]) if p.cols else d_values[:0]
    for part in p.chunks():
        student, s, t = p.logits(part)
        e = torch.zeros_like(s)
        for wanted, own, dim in ((p.rows, part, 1), (p.cols, slice(rows, None), 0)):
            if wanted:
                own_statistics = statistics[:, own].unsqueeze(dim + 1) if len(statistics.T) else None
                slope, decided = _slope(p, s, t, own_statistics, d_values[own].unsqueeze(dim))
                total = slope.sum(1, keepdim=True) if dim else of_columns
                e = e + (slope if decided is None else torch.where(decided, -total, slope))
        e = e.masked_fill(s == -torch.inf, 0.0)
        weights = e * student.scale
        dx[part] = long_product(weights, y.to(dtype))
        dy += long_product(weights.T, x[part].to(dtype))
        drow_bias[part] = student.sign * e.sum(1)
        dcol_bias += student.sign * e.sum(0)
        of_scale = student.scale_gradient(times(e, student.dots))
        dscale[part if of_rows_scale else slice(0, 1)] += of_scale
    if problem[1] is None:
        dx, dy = dx + dy, dy[:0]
    full = (dx, dy, dscale, drow_bias, dcol_bias)
    return tuple(g if needs >> bit & 1 else g[:0] for bit, g in enumerate(full))  # type: ignore[return-value]


def _sums_of_columns(p: _Problem, statistics: Tensor, d_values: Tensor) -> Tensor:
    """(1, M) the sum of each column's derivatives, without those of decided rows."""
    total = p.x.new_zeros((1, len(p.y)), dtype=p.dtype)
    for part in p.chunks() if p.kind in DECIDES else ():
        _, s, t = p.logits(part)
        total += _slope(p, s, t, statistics[:, None], d_values[None])[0].sum(0)
    return total


def _slope(
    p: _Problem, s: Tensor, t: Tensor, statistics: Tensor | None, upstream: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The derivative of the total by the student's logits through the lines of one direction.

    It is 0 where the second result is True: there a line is decided, and the derivative is minus the sum of the others.
    """
    if statistics is None:
        return upstream * _between_slope(p.kind, p.delta, s, t), None
    top_s, log_s, top_t, log_t, mean = statistics
    upstream = upstream.masked_fill(top_t == -torch.inf, 0.0)  # a line without a pair is 0, whatever is in it
    log_q, log_p = _Line(top_s, log_s).log_probability(s), _Line(top_t, log_t).log_probability(t)
    slope = torch.where(upstream == 0, 0.0, upstream * _divergence_slope(p.kind, log_p, log_q, mean))
    if p.kind not in DECIDES:
        return slope, None
    decided = log_q.exp() > DECIDED
    return slope.masked_fill(decided, 0.0), decided
