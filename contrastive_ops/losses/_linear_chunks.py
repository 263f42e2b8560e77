"""Entropies and divergences of a large softmax: plain torch, some rows at a time, with gradients by their formulas.

A chunk of logits is made, reduced and forgotten, and made again in backward, where each gradient is one more product
into the same memory; autograd through the chunks would write a matrix of the size of the classes for each of them.
Log-probabilities come from the same logits, so whoever asks for the entropy pays for one pass, not for two.

    statistic             value of a row                          derivative by the logit s_j
    log_prob              s_t - lse                               [j = t] - p_j
    entropy               -sum_j p_j log p_j                      -p_j (log p_j + entropy)
    reverse divergence    sum_j p_j log(p_j / q_j)                p_j (log(p_j / q_j) - sum_k p_k log(p_k / q_k))
    forward divergence    sum_j q_j log(q_j / p_j)                p_j - q_j
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core import autocast
from ..core.checks import accumulator
from ..core.derivatives import alias, grad
from ..core.numerics import CHUNK_ELEMENTS, balanced, chunks_of_rows, log_softmax, log_softmax_
from ..core.operators import define
from ..reference.stream import stream_rows

# x, y, bias are those of the softmax; q is the other one, of divergences. Both need what the other does not.
_PROBLEM = "Tensor x, Tensor y, Tensor? bias, Tensor? target, Tensor? qx, Tensor? qy, Tensor? q_bias, str kind"
# Up to here a chunk's product with y gets faster with its rows; then it only takes more memory.
_ROWS = 512
# What is done to a product number by number is done in pieces of this many, while they are in a processor's cache.
_PIECE = 1 << 16
# Where log p and log q are this close, what is left of p - q and log(p / q) is of second order, and must be formed so.
_CLOSE = 0.5


def log_prob_and_entropy(x: Tensor, y: Tensor, bias: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) logarithm of the probability of each row's target, and (N,) entropy in nats."""
    dtype = accumulator(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    found = torch.ops.contrastive_ops.linear_rows_forward(x, y, bias, target, None, None, None, "entropy")
    return found[0], found[1]


def divergence(
    x: Tensor, y: Tensor, bias: Tensor | None, qx: Tensor, qy: Tensor, q_bias: Tensor | None, kind: str
) -> Tensor:
    """(N,) KL(p || q) for "reverse", KL(q || p) for "forward", in nats; q has no gradient."""
    dtype = accumulator(x.dtype)
    bias = None if bias is None else bias.to(dtype)
    q_bias = None if q_bias is None else q_bias.detach().to(dtype)
    return torch.ops.contrastive_ops.linear_rows_forward(x, y, bias, None, qx.detach(), qy.detach(), q_bias, kind)[0]


# ---- Chunks --------------------------------------------------------------------------------------------------------


def chunks(x: Tensor, y: Tensor) -> Iterator[slice]:
    """A chunk of logits is no larger than the matrix of classes, whose gradient takes as much, or about a million."""
    rows = max(CHUNK_ELEMENTS // max(y.shape[0], 1), min(_ROWS, y.shape[1]))
    return chunks_of_rows(x.shape[0], max(rows, 1))


def pieces(rows: slice, y: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of all, and the same as rows of the chunk. On a GPU the chunk is one piece: there each operation costs."""
    count = rows.stop - rows.start
    step = max(1, _PIECE // max(y.shape[0], 1)) if y.device.type == "cpu" else max(count, 1)
    for piece in chunks_of_rows(count, step):
        yield slice(rows.start + piece.start, rows.start + piece.stop), piece


class Softmax:
    """The logits of one chunk of rows at a time, always in the same memory; the matrix of classes is widened once."""

    def __init__(self, x: Tensor, y: Tensor, bias: Tensor | None, dtype: torch.dtype, softcap: float = 0.0) -> None:
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

    def log_p(self, piece: slice) -> Tensor:
        """log p of rows of the chunk, in the place of their logits."""
        return log_softmax_(self.logits[piece])


def _softmaxes(
    x: Tensor, y: Tensor, bias: Tensor | None, qx: Tensor | None, qy: Tensor | None, q_bias: Tensor | None
) -> tuple[Softmax, Softmax]:
    """p and q; p twice where there is no other."""
    dtype = accumulator(x.dtype)
    p = Softmax(x, y, bias, dtype)
    return p, p if qx is None or qy is None else Softmax(qx, qy, q_bias, dtype)


def _times_log(p: Tensor, log_p: Tensor) -> Tensor:
    """p log p, which is 0 for classes that have no probability."""
    return p * log_p.masked_fill(p == 0, 0.0)


def _kl(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    return kl_of_rows(log_p, log_q) if kind == "reverse" else kl_of_rows(log_q, log_p)


def kl_of_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p log(p / q) - p + q over each row: no term is negative, and errors of the two lse cancel."""
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    close = ratio.abs() < _CLOSE
    near = torch.where(close, ratio, 0.0)
    return torch.where(close, p * (torch.expm1(-near) + near), q - p + _times_log(p, ratio)).sum(1)


def _forward(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    qx: Tensor | None,
    qy: Tensor | None,
    q_bias: Tensor | None,
    kind: str,
) -> tuple[Tensor, Tensor]:
    first = x.new_empty(x.shape[:1], dtype=accumulator(x.dtype))
    second = torch.empty_like(first)
    with autocast.disabled(x):
        p, q = _softmaxes(x, y, bias, qx, qy, q_bias)
        for chunk in chunks(x, y):
            p.multiply(chunk)
            if target is None:
                q.multiply(chunk)
            for rows, piece in pieces(chunk, y):
                if target is None:
                    first[rows] = _kl(p.log_p(piece), q.log_p(piece), kind)
                    continue
                log_p = p.log_p(piece)
                first[rows] = log_p.gather(1, target[rows, None])[:, 0]
                second[rows] = -_times_log(log_p.exp(), log_p).sum(1)
    return first, second


def _backward(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    qx: Tensor | None,
    qy: Tensor | None,
    q_bias: Tensor | None,
    kind: str,
    second: Tensor,
    d_first: Tensor | None,
    d_second: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dy, dbias = empty_gradients(x, y, needs)
    dx, dy, dbias = dx.zero_(), dy.zero_(), dbias.zero_()
    zeros = torch.zeros_like(second)
    d_first, d_second = (zeros if d is None else d for d in (d_first, d_second))
    with autocast.disabled(x):
        p, q = _softmaxes(x, y, bias, qx, qy, q_bias)
        for chunk in chunks(x, y):
            p.multiply(chunk)
            if target is None:
                q.multiply(chunk)
            for rows, piece in pieces(chunk, y):
                by_first, by_second, of_second = (each[rows, None] for each in (d_first, d_second, second))
                if target is None:
                    g = _of_divergence(p.log_p(piece), q.log_p(piece), by_first, kind)
                else:
                    g = _of_entropy(p.log_p(piece), target[rows, None], by_first, by_second, of_second)
                p.logits[piece] = g
            if needs & 1:
                torch.mm(p.logits, p.y, out=dx[chunk])
            if needs & 2:
                dy.addmm_(p.logits.T, p.x[chunk])
            if needs & 4:
                dbias += p.logits.sum(0)
    return dx, dy, dbias


def _of_entropy(log_p: Tensor, at: Tensor, by_log_prob: Tensor, by_entropy: Tensor, entropy: Tensor) -> Tensor:
    """The derivative of log-probabilities and entropies by a chunk's logits."""
    p = log_p.exp()
    g = _times_log(p, log_p).mul_(-by_entropy).sub_(p * (by_log_prob + by_entropy * entropy))
    return balanced(g.scatter_add_(1, at, by_log_prob), p)


def _of_divergence(log_p: Tensor, log_q: Tensor, by_value: Tensor, kind: str) -> Tensor:
    """The derivative of divergences by a chunk's logits of p."""
    p = log_p.exp()
    if kind == "forward":
        return balanced(p - log_q.exp(), p).mul_(by_value)
    weighted = _times_log(p, log_p.sub_(log_q))
    # Not the value of forward: this mean has the errors of both lse, which the difference then does not.
    mean = weighted.sum(1, keepdim=True)
    return balanced(weighted.sub_(p * mean), p).mul_(by_value)


# ---- Operators -----------------------------------------------------------------------------------------------------


def empty_gradients(x: Tensor, y: Tensor, needs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, y and bias, without rows where they are not needed."""
    sizes = (x.shape[0], *x.shape[1:]), (y.shape[0], *y.shape[1:]), (y.shape[0],)
    wanted = (size if needs >> bit & 1 else (0, *size[1:]) for bit, size in enumerate(sizes))
    dx, dy, dbias = (x.new_empty(size, dtype=accumulator(x.dtype)) for size in wanted)
    return dx, dy, dbias


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    first, second = (x.new_empty(x.shape[:1], dtype=accumulator(x.dtype)) for _ in range(2))
    return first, second


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, d_first: Tensor | None, d_second: Tensor | None) -> tuple[Any, ...]:
    *problem, second = ctx.saved_tensors
    needs = sum(1 << bit for bit in range(3) if ctx.needs_input_grad[bit])
    if torch.is_grad_enabled():
        gradients = _differentiably(problem, ctx.kind, d_first, d_second)
    else:
        found = torch.ops.contrastive_ops.linear_rows_backward(
            *problem, ctx.kind, second, d_first, d_second if ctx.kind == "entropy" else None, needs
        )
        gradients = tuple(
            g.to(t.dtype) if needs >> bit & 1 else None
            for bit, (g, t) in enumerate(zip(found, problem[:3], strict=True))
        )
    return (*gradients, *(None,) * 5)


def _differentiably(
    problem: list[Any], kind: str, d_first: Tensor | None, d_second: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same gradients as functions of the inputs, for second derivatives."""
    x, y, bias = (alias(t) for t in problem[:3])
    target, qx, qy, q_bias = problem[3:]

    def of_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, ...]:
        log_p = log_softmax(logits if bias is None else logits + bias)
        if target is not None:
            return log_p.gather(1, target[rows, None])[:, 0], -_times_log(log_p.exp(), log_p).sum(1)
        _, q = _softmaxes(x, y, bias, qx, qy, q_bias)
        with torch.no_grad():
            q.multiply(rows)
        return (_kl(log_p, q.log_p(slice(None)), kind),)

    with autocast.disabled(x):
        values = stream_rows(of_chunk, x, y)
        pairs = [(v, d) for v, d in zip(values, (d_first, d_second), strict=False) if d is not None]
        leaves = [t for t in (x, y, bias) if t is not None and t.requires_grad]
        found = iter(grad([v for v, _ in pairs], leaves, [d for _, d in pairs]))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in (x, y, bias))


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
    " -> (Tensor dx, Tensor dy, Tensor dbias)",
    _backward,
    lambda x, y, *rest: empty_gradients(x, y, rest[-1]),
)
