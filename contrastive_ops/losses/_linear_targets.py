"""Cross entropies of a large softmax with capped logits, or with probabilities as targets: plain torch, in chunks.

For each row, with z the capped logits, p their softmax and t what the class weights make of the (smoothed) target::

    loss = sum_j t_j (lse - z_j)                derivative by z_j: p_j sum_k t_k - t_j
    lse  = log sum_j exp(z_j)                                      p_j

The logits of a chunk are made, reduced and forgotten, and made again in backward, as in `_linear_chunks`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import autocast
from ..core.checks import accumulator
from ..core.derivatives import alias, grad
from ..core.operators import define
from ..reference.stream import stream_rows
from ._linear_chunks import Softmax, chunks, empty_gradients, pieces

_PROBLEM = "Tensor x, Tensor y, Tensor? bias, Tensor target, Tensor? class_weight, float label_smoothing, float softcap"


def losses_and_lse(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """(N,) cross entropies and (N,) logsumexps of the capped logits.

    Args:
        x: (N, D).
        y: (V, D).
        bias: (V,).
        target: (N,) int64, or (N, V) probabilities.
        class_weight: (V,), not differentiated.
        label_smoothing: in [0, 1].
        softcap: logits are softcap * tanh(logits / softcap); 0 for none.
    """
    bias, class_weight = (None if each is None else each.to(accumulator(x.dtype)) for each in (bias, class_weight))
    found = torch.ops.contrastive_ops.linear_targets_forward(x, y, bias, target, class_weight, label_smoothing, softcap)
    return found[0], found[1]


# ---- Chunks --------------------------------------------------------------------------------------------------------


def _shares(target: Tensor, like: Tensor, class_weight: Tensor | None, label_smoothing: float) -> Tensor:
    """(rows, V) what each class's logarithm counts in the loss: smoothed targets times the weights of classes."""
    if target.is_floating_point():
        share = target.to(like.dtype) * (1 - label_smoothing)
    else:
        share = torch.zeros_like(like).scatter_(1, target[:, None], 1 - label_smoothing)
    if label_smoothing:
        share = share + label_smoothing / like.shape[1]
    return share if class_weight is None else share * class_weight


def _summed(share: Tensor, log_p: Tensor) -> Tensor:
    """Sum of share * -log p; a class without a share does not count, however impossible it is."""
    return -(share * log_p.masked_fill(share == 0, 0.0)).sum(1)


def _forward(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    loss = x.new_zeros(x.shape[:1], dtype=accumulator(x.dtype))
    lse = torch.full_like(loss, -torch.inf)
    if not y.shape[0]:
        return loss, lse
    with autocast.disabled(x):
        softmax = Softmax(x, y, bias, loss.dtype, softcap)
        for chunk in chunks(x, y):
            softmax.multiply(chunk)
            for rows, piece in pieces(chunk, y):
                # The class whose probability may be nearly 1 has it from those of the others.
                top, at = softmax.logits[piece].max(1, keepdim=True)
                log_p = softmax.log_p(piece)
                lse[rows] = (top - log_p.gather(1, at))[:, 0]
                loss[rows] = _summed(_shares(target[rows], log_p, class_weight, label_smoothing), log_p)
    return loss, lse


def _backward(
    x: Tensor,
    y: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    softcap: float,
    d_loss: Tensor | None,
    d_lse: Tensor | None,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dy, dbias, dtarget = (each.zero_() for each in _empty_gradients(x, y, target, needs))
    if not y.shape[0]:
        return dx, dy, dbias, dtarget
    zeros = x.new_zeros(x.shape[:1], dtype=dx.dtype)
    d_loss, d_lse = (zeros if d is None else d for d in (d_loss, d_lse))
    with autocast.disabled(x):
        softmax = Softmax(x, y, bias, dx.dtype, softcap)
        for chunk in chunks(x, y):
            softmax.multiply(chunk, slope=True)
            for rows, piece in pieces(chunk, y):
                at, by_loss, by_lse = softmax.logits[piece].argmax(1)[:, None], d_loss[rows, None], d_lse[rows, None]
                log_p = softmax.log_p(piece)
                share = _shares(target[rows], log_p, class_weight, label_smoothing)
                if needs & 8:
                    weighted = log_p if class_weight is None else log_p * class_weight
                    dtarget[rows] = weighted * (by_loss * (label_smoothing - 1))
                softmax.logits[piece] = _by_logits(log_p, at, share, by_loss, by_lse)
            softmax.times_slope()
            if needs & 1:
                torch.mm(softmax.logits, softmax.y, out=dx[chunk])
            if needs & 2:
                dy.addmm_(softmax.logits.T, softmax.x[chunk])
            if needs & 4:
                dbias += softmax.logits.sum(0)
    return dx, dy, dbias, dtarget


def _by_logits(log_p: Tensor, at: Tensor, share: Tensor, by_loss: Tensor, by_lse: Tensor) -> Tensor:
    total = share.sum(1, keepdim=True)
    by_p = by_loss * total + by_lse
    # 1 - p of the class that may be nearly certain from its logarithm, which keeps its digits.
    others = by_loss * (total - share.gather(1, at)) + by_lse
    own = by_p * torch.expm1(log_p.gather(1, at)) + others
    return (by_p * log_p.exp() - by_loss * share).scatter_(1, at, own)


# ---- Operators -----------------------------------------------------------------------------------------------------


def _empty_gradients(x: Tensor, y: Tensor, target: Tensor, needs: int) -> tuple[Tensor, ...]:
    wanted = target.shape if needs & 8 else (0, *target.shape[1:])
    return (*empty_gradients(x, y, needs), x.new_empty(wanted, dtype=accumulator(x.dtype)))


def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss, lse = (x.new_empty(x.shape[:1], dtype=accumulator(x.dtype)) for _ in range(2))
    return loss, lse


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, label_smoothing, softcap = inputs
    ctx.options = label_smoothing, softcap
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, d_loss: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
    problem = list(ctx.saved_tensors)
    needs = sum(1 << bit for bit in range(4) if ctx.needs_input_grad[bit])
    if torch.is_grad_enabled():
        gradients = _differentiably(problem, ctx.options, d_loss, d_lse)
    else:
        found = torch.ops.contrastive_ops.linear_targets_backward(*problem, *ctx.options, d_loss, d_lse, needs)
        gradients = tuple(
            g.to(t.dtype) if needs >> bit & 1 else None
            for bit, (g, t) in enumerate(zip(found, problem[:4], strict=True))
        )
    return (*gradients, None, None, None)


def _differentiably(
    problem: list[Any], options: tuple[float, float], d_loss: Tensor | None, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same gradients as functions of the inputs, for second derivatives."""
    x, y, bias, target = (alias(t) for t in problem[:4])
    class_weight, (label_smoothing, softcap) = problem[4], options

    def of_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        logits = logits if bias is None else logits + bias
        logits = softcap * (logits / softcap).tanh() if softcap else logits
        log_p = logits.log_softmax(1)
        share = _shares(target[rows], log_p, class_weight, label_smoothing)
        return _summed(share, log_p), logits.logsumexp(1)

    with autocast.disabled(x):
        values = stream_rows(of_chunk, x, y)
        pairs = [(v, d) for v, d in zip(values, (d_loss, d_lse), strict=True) if d is not None]
        inputs = (x, y, bias, target)
        leaves = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(grad([v for v, _ in pairs], leaves, [d for _, d in pairs]))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in inputs)


define(
    "linear_targets_forward",
    f"({_PROBLEM}) -> (Tensor loss, Tensor lse)",
    _forward,
    _forward_fake,
    _setup,
    _derivative,
)
define(
    "linear_targets_backward",
    f"({_PROBLEM}, Tensor? d_loss, Tensor? d_lse, int needs) -> (Tensor dx, Tensor dy, Tensor dbias, Tensor dtarget)",
    _backward,
    lambda x, y, bias, target, *rest: _empty_gradients(x, y, target, rest[-1]),
)
