"""Statistics of the rows of a large softmax p, and their derivatives by its logits z.

    kind             value of a row                          derivative by z_j
    cross_entropy    sum_j t_j (lse - z_j)                   p_j sum_k t_k - t_j
                     lse                                     p_j
    entropy          log p_t                                 [j = t] - p_j
                     entropy: -sum_j p_j log p_j             -p_j (log p_j + entropy)
    reverse          sum_j p_j log(p_j / q_j)                p_j (log(p_j / q_j) - sum_k p_k log(p_k / q_k))
    forward          sum_j q_j log(q_j / p_j)                p_j - q_j

The target t of a cross entropy is what smoothing and the weights of classes make of a label or of probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.numerics import balanced, log_softmax

# Where log p and log q are this close, what is left of p - q and log(p / q) is of second order, and must be formed so.
_CLOSE = 0.5


class Rows(NamedTuple):
    """What the operators of `_linear_chunks` take: two softmaxes, of which q is that of divergences, and a statistic.

    Attributes:
        x: (N, D).
        y: (V, D).
        bias: (V,).
        target: (N,) int64, or (N, V) probabilities of a cross entropy; None for divergences.
        class_weight: (V,), not differentiated.
        qx: (N, D'). Nothing of q is differentiated.
        qy: (V, D').
        q_bias: (V,).
        kind: "cross_entropy", "entropy", "reverse" or "forward".
        label_smoothing: in [0, 1].
        softcap: logits are softcap * tanh(logits / softcap); 0 for none.
        q_softcap: the same of q.
    """

    x: Tensor
    y: Tensor
    bias: Tensor | None = None
    target: Any = None
    class_weight: Tensor | None = None
    qx: Tensor | None = None
    qy: Tensor | None = None
    q_bias: Tensor | None = None
    kind: str = "cross_entropy"
    label_smoothing: float = 0.0
    softcap: float = 0.0
    q_softcap: float = 0.0


def values(
    problem: Rows,
    rows: slice,
    logits: Tensor,
    log_q: Tensor | None,
    log_of: Callable[[Tensor], Tensor] = log_softmax,
) -> tuple[Tensor, Tensor | None]:
    """The two statistics of some rows; None where there is one. `log_of` may write into the logits."""
    if logits.shape[1] == 0:
        return logits.sum(1), None
    if problem.kind == "cross_entropy":
        # The class whose probability may be nearly 1 has it from those of the others.
        top, at = logits.max(1, keepdim=True)
        log_p = log_of(logits)
        share = _shares(problem, rows, log_p)
        # A class without a share does not count, however impossible it is.
        loss = -(share * log_p.masked_fill(share == 0, 0.0)).sum(1)
        return loss, (top - log_p.gather(1, at))[:, 0]
    log_p = log_of(logits)
    if log_q is None:
        own = log_p.gather(1, problem.target[rows, None])[:, 0]
        return own, -_times_log(log_p.exp(), log_p).sum(1)
    return kl_of_rows(log_p, log_q) if problem.kind == "reverse" else kl_of_rows(log_q, log_p), None


def by_logits(
    problem: Rows,
    rows: slice,
    log_p: Tensor,
    log_q: Tensor | None,
    by_first: Tensor,
    by_second: Tensor,
    second: Tensor,
) -> Tensor:
    """Derivatives by the logits of some rows.

    Args:
        problem: all rows.
        rows: those that are asked for.
        log_p: of these; overwritten.
        log_q: of these.
        by_first: (rows, 1) the gradients of the first statistic.
        by_second: (rows, 1) those of the second.
        second: (rows, 1) the second statistic.
    """
    p = log_p.exp()
    if problem.kind == "cross_entropy":
        share = _shares(problem, rows, log_p)
        slopes = (p * share.sum(1, keepdim=True)).sub_(share).mul_(by_first)
        return balanced(slopes, p).addcmul_(by_second, p)
    if log_q is None:
        slopes = _times_log(p, log_p).mul_(-by_second).sub_(p * (by_first + by_second * second))
        return balanced(slopes.scatter_add_(1, problem.target[rows, None], by_first), p)
    if problem.kind == "forward":
        return balanced(p - log_q.exp(), p).mul_(by_first)
    slopes = _times_log(p, log_p.sub_(log_q))
    # Not the value of forward: this mean has the errors of both lse, which the difference then does not.
    mean = slopes.sum(1, keepdim=True)
    return balanced(slopes.sub_(p * mean), p).mul_(by_first)


def by_probabilities(problem: Rows, log_p: Tensor, by_first: Tensor) -> Tensor:
    """Derivatives of a cross entropy by the probabilities that are its target."""
    weighted = log_p if problem.class_weight is None else log_p * problem.class_weight
    return weighted * (by_first * (problem.label_smoothing - 1))


def kl_of_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum of p log(p / q) - p + q over each row: no term is negative, and errors of the two lse cancel."""
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    close = ratio.abs() < _CLOSE
    near = torch.where(close, ratio, 0.0)
    return torch.where(close, p * (torch.expm1(-near) + near), q - p + _times_log(p, ratio)).sum(1)


def _times_log(p: Tensor, log_p: Tensor) -> Tensor:
    """p log p, which is 0 for classes that have no probability."""
    return p * log_p.masked_fill(p == 0, 0.0)


def _shares(problem: Rows, rows: slice, like: Tensor) -> Tensor:
    """(rows, V) what each logarithm counts in a cross entropy: smoothed targets times the weights of classes."""
    target, kept = problem.target[rows], 1 - problem.label_smoothing
    if target.is_floating_point():
        share = target.to(like.dtype) * kept
    else:
        share = torch.zeros_like(like).scatter_(1, target[:, None], kept)
    if problem.label_smoothing:
        share = share + problem.label_smoothing / like.shape[1]
    return share if problem.class_weight is None else share * problem.class_weight
