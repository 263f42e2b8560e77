"""Statistics of the rows of a large softmax: plain torch, some rows at a time, with gradients by their formulas.

A chunk of logits is made, reduced and forgotten, and made again in backward, where each gradient is one more product
into the same memory; autograd through the chunks would write a matrix of the size of the classes for each of them.
Log-probabilities come from the same logits, so whoever asks for the entropy pays for one pass, not for two. Which
statistics there are, and their derivatives, is in `_linear_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core import autocast
from ..core.checks import accumulator
from ..core.derivatives import alias, grad, needed, to_inputs
from ..core.numerics import CHUNK_ELEMENTS, chunks_of_rows, log_softmax_
from ..core.operators import call, define
from ..reference.stream import stream_rows
from ._linear_rows import Rows, by_logits, by_probabilities, values

# The fields of Rows.
_PROBLEM = (
    "Tensor x, Tensor y, Tensor? bias, Tensor? target, Tensor? class_weight, Tensor? qx, Tensor? qy, Tensor? q_bias, "
    "str kind, float label_smoothing, float softcap, float q_softcap"
)
_FIELDS = len(Rows._fields)
# Those that have gradients: x, y, bias, target.
_DIFFERENTIABLE = 4
# Up to here a chunk's product with y gets faster with its rows; then it only takes more memory.
_ROWS = 512
# What is done to a product number by number is done in pieces of this many, while they are in a processor's cache.
_PIECE = 1 << 16


def statistics(problem: Rows) -> tuple[Tensor, Tensor]:
    """(N,) both statistics of each row, in the accumulation dtype; of a divergence the first alone counts."""
    dtype = accumulator(problem.x.dtype)
    wide = {name: value.to(dtype) for name in ("bias", "class_weight") if (value := getattr(problem, name)) is not None}
    for name in ("qx", "qy", "q_bias"):
        if (value := getattr(problem, name)) is not None:
            wide[name] = value.detach().to(dtype) if name == "q_bias" else value.detach()
    # Not by _replace, which torch 2.6 cannot trace under Python 3.10.
    first, second = call.linear_rows_forward(*[wide.get(*field) for field in zip(Rows._fields, problem, strict=True)])
    return first, second


# ---- Chunks --------------------------------------------------------------------------------------------------------


def _chunks(x: Tensor, y: Tensor) -> Iterator[slice]:
    """A chunk of logits is no larger than the matrix of classes, whose gradient takes as much, or about a million."""
    rows = max(CHUNK_ELEMENTS // max(y.shape[0], 1), min(_ROWS, y.shape[1]))
    return chunks_of_rows(x.shape[0], max(rows, 1))


def _pieces(rows: slice, y: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of all, and the same as rows of the chunk. On a GPU the chunk is one piece: there each operation costs."""
    count = rows.stop - rows.start
    step = max(1, _PIECE // max(y.shape[0], 1)) if y.device.type == "cpu" else max(count, 1)
    for piece in chunks_of_rows(count, step):
        yield slice(rows.start + piece.start, rows.start + piece.stop), piece


class _Softmax:
    """The logits of one chunk of rows at a time, always in the same memory; the matrix of classes is widened once."""

    def __init__(self, x: Tensor, y: Tensor, bias: Tensor | None, dtype: torch.dtype, softcap: float) -> None:
        self.x, self.y, self.bias, self.softcap = x.to(dtype), y.to(dtype), bias, softcap
        self.logits = self.y.new_empty(0)
        self._memory = self._slope = self.logits

    def multiply(self, rows: slice, slope: bool = False) -> None:
        """Make the logits of these rows, and for `times_slope` what backward multiplies with."""
        x, size = self.x[rows], (rows.stop - rows.start) * self.y.shape[0]
        if self._memory.shape[0] < size:
            self._memory = self.y.new_empty(size)
        self.logits = self._memory[:size].view(x.shape[0], self.y.shape[0])
        if self.bias is None:
            torch.mm(x, self.y.T, out=self.logits)
        else:
            torch.addmm(self.bias, x, self.y.T, out=self.logits)
        if self.softcap:
            self.logits.div_(self.softcap).tanh_()
            self._slope = 1 - self.logits.square() if slope else self._slope
            self.logits.mul_(self.softcap)

    def times_slope(self) -> None:
        """Turn derivatives by capped logits, in the place of the logits, into those by the product."""
        if self.softcap:
            self.logits.mul_(self._slope)


def _other(problem: Rows) -> _Softmax | None:
    """q of a divergence."""
    if problem.qx is None or problem.qy is None:
        return None
    return _Softmax(problem.qx, problem.qy, problem.q_bias, accumulator(problem.x.dtype), problem.q_softcap)


def _multiplied(problem: Rows, slope: bool) -> Iterator[tuple[slice, _Softmax, _Softmax | None]]:
    """Chunks of rows, with the logits of both softmaxes made."""
    p = _Softmax(problem.x, problem.y, problem.bias, accumulator(problem.x.dtype), problem.softcap)
    q = _other(problem)
    for chunk in _chunks(problem.x, problem.y):
        p.multiply(chunk, slope)
        if q is not None:
            q.multiply(chunk)
        yield chunk, p, q


def _log_q(q: _Softmax | None, piece: slice) -> Tensor | None:
    return None if q is None else log_softmax_(q.logits[piece])


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    problem = Rows(*arguments)
    first = problem.x.new_zeros(problem.x.shape[:1], dtype=accumulator(problem.x.dtype))
    second = torch.full_like(first, -torch.inf if problem.kind == "cross_entropy" else 0.0)
    with autocast.disabled(problem.x):
        for chunk, p, q in _multiplied(problem, slope=False):
            for rows, piece in _pieces(chunk, problem.y):
                found = values(problem, rows, p.logits[piece], _log_q(q, piece), log_softmax_)
                for statistic, value in zip((first, second), found, strict=True):
                    if value is not None:
                        statistic[rows] = value
    return first, second


def _backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem = Rows(*arguments[:_FIELDS])
    second, d_first, d_second, needs = arguments[_FIELDS:]
    dx, dy, dbias, dtarget = (each.zero_() for each in _empty_gradients(problem, needs))
    if problem.y.shape[0] == 0:
        return dx, dy, dbias, dtarget
    zeros = torch.zeros_like(second)
    given = [zeros if d is None else d for d in (d_first, d_second)]
    with autocast.disabled(problem.x):
        for chunk, p, q in _multiplied(problem, slope=True):
            for rows, piece in _pieces(chunk, problem.y):
                by_first, by_second, of_second = (each[rows, None] for each in (*given, second))
                log_p = log_softmax_(p.logits[piece])
                if needs & 8:
                    dtarget[rows] = by_probabilities(problem, log_p, by_first)
                slopes = by_logits(problem, rows, log_p, _log_q(q, piece), by_first, by_second, of_second)
                p.logits[piece] = slopes
            p.times_slope()
            if needs & 1:
                torch.mm(p.logits, p.y, out=dx[chunk])
            if needs & 2:
                dy.addmm_(p.logits.T, p.x[chunk])
            if needs & 4:
                dbias += p.logits.sum(0)
    return dx, dy, dbias, dtarget


# ---- Operators -----------------------------------------------------------------------------------------------------


def _empty_gradients(problem: Rows, needs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, y, bias and target, without rows where they are not needed."""
    x, y, target = problem.x, problem.y, problem.target
    of_target = (0,) if target is None else target.shape
    shapes = (x.shape, y.shape, y.shape[:1], of_target)
    dx, dy, dbias, dtarget = (
        x.new_empty(shape if needs >> bit & 1 else (0, *shape[1:]), dtype=accumulator(x.dtype))
        for bit, shape in enumerate(shapes)
    )
    return dx, dy, dbias, dtarget


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    first, second = (x.new_empty(x.shape[:1], dtype=accumulator(x.dtype)) for _ in range(2))
    return first, second


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    problem = Rows(*inputs)
    ctx.options = problem[Rows._fields.index("kind") :]
    ctx.save_for_backward(*problem[: -len(ctx.options)], output[1])
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, d_first: Tensor | None, d_second: Tensor | None) -> tuple[Any, ...]:
    *tensors, second = ctx.saved_tensors
    problem = Rows(*tensors, *ctx.options)
    if torch.is_grad_enabled():
        gradients = _differentiably(problem, d_first, d_second)
    else:
        needs = needed(ctx, _DIFFERENTIABLE)
        found = call.linear_rows_backward(*problem, second, d_first, d_second, needs)
        gradients = to_inputs(list(problem), found, needs)
    return (*gradients, *(None,) * (_FIELDS - _DIFFERENTIABLE))


def _differentiably(problem: Rows, d_first: Tensor | None, d_second: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same gradients as functions of the inputs, for second derivatives."""
    inputs = [alias(t) for t in problem[:_DIFFERENTIABLE]]
    problem = Rows(*inputs, *problem[_DIFFERENTIABLE:])
    bias, cap = problem.bias, problem.softcap
    q = _other(problem)

    def of_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, ...]:
        logits = logits if bias is None else logits + bias
        logits = cap * (logits / cap).tanh() if cap else logits
        with torch.no_grad():
            if q is not None:
                q.multiply(rows)
            log_q = _log_q(q, slice(None))
        return tuple(each for each in values(problem, rows, logits, log_q) if each is not None)

    with autocast.disabled(problem.x):
        found = stream_rows(of_chunk, problem.x, problem.y)
        pairs = [(v, d) for v, d in zip(found, (d_first, d_second), strict=False) if d is not None]
        leaves = [t for t in inputs if t is not None and t.requires_grad]
        gradients = iter(grad([v for v, _ in pairs], leaves, [d for _, d in pairs]))
    return tuple(next(gradients) if t is not None and t.requires_grad else None for t in inputs)


define(
    "linear_rows_forward",
    f"({_PROBLEM}) -> (Tensor first, Tensor second)",
    _forward,
    _forward_fake,
    _setup,
    _derivative,
)
define(
    "linear_rows_backward",
    f"({_PROBLEM}, Tensor second, Tensor? d_first, Tensor? d_second, int needs)"
    " -> (Tensor dx, Tensor dy, Tensor dbias, Tensor dtarget)",
    _backward,
    lambda *arguments: _empty_gradients(Rows(*arguments[:_FIELDS]), arguments[-1]),
)
