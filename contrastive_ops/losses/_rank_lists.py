"""Losses of short lists of scores against a teacher's, with the derivative of each row formed beside its loss.

What a row's loss depends on is the row, so its derivative by the scores is as small as they are, whatever the cotangent
will be. It is made in the forward pass, some rows at a time, or some candidates of one row: neither all lists nor all
pairs of a long one are in memory at once, and backward is one product.

    kind          loss of a row                                      derivative by s_j
    kl            sum_j q_j log(q_j / p_j)                           p_j - q_j
    listnet       -sum_j q_j log p_j                                 p_j - q_j
    listmle       sum_k softplus(b_k - s_k), in q's order            sum_(k < j) p_kj - sigmoid(b_j - s_j)
    mean_log      -sum_j w_j log p_j                                 p_j - w_j
    log_mean      -log sum_j w_j p_j                                 p_j - w_j p_j / sum_k w_k p_k
    margin_mse    mean_j ((s_0 - s_j) - (t_0 - t_j))^2               by the chain rule
    logistic      mean over t_i > t_j of w_ij softplus(s_j - s_i)    by the chain rule
    hinge         mean over t_i > t_j of w_ij relu(margin + s_j - s_i)

p and q are the softmax of the scores and of the teacher's scores; w are weights that sum to 1, in place of these; b_k
is the lse of the scores behind s_k, and p_kj the softmax of s_k and those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import autocast
from ..core.numerics import CHUNK_ELEMENTS, balanced, chunks_of_rows, log_softmax, softplus
from ..core.operators import call, define
from ._linear_rows import kl_of_rows

PAIRWISE = ("logistic", "hinge")
WEIGHTINGS = ("none", "reciprocal_rank", "lambda")

# Pairs that are in memory at once: what a core's cache holds. A GPU, which waits for each launch, takes more.
PAIRS, PAIRS_OF_GPU = 1 << 17, CHUNK_ELEMENTS


class Options(NamedTuple):
    """What a loss of lists is.

    Attributes:
        kind: as in the table above.
        weighting: of pairs, one of `WEIGHTINGS`.
        margin: of "hinge".
        sums_pairs: sum over the pairs of a list, not their mean.
        first: of "lambda", how many places of a list count; 0 for all.
    """

    kind: str
    weighting: str = "none"
    margin: float = 0.0
    sums_pairs: bool = False
    first: int = 0


def list_losses(scores: Tensor, teacher: Tensor, valid: Tensor, options: Options) -> Tensor:
    """(N,) losses; lists without anything to compare have loss 0.

    Args:
        scores: (N, K) float32 or float64. Differentiable.
        teacher: (N, K) of the same dtype, without a gradient.
        valid: (N, K) bool: which candidates there are.
        options: the loss.
    """
    return call.rank_lists(scores, teacher, valid, *options)[0]


# ---- Losses and their derivatives ----------------------------------------------------------------------------------


def _rows(scores: Tensor, teacher: Tensor, valid: Tensor, options: Options, slopes: bool) -> tuple[Tensor, Tensor]:
    """Losses of some rows and, where asked for, their derivatives."""
    # What is not there must not reach a sum, be it NaN; and its derivative is 0.
    scores, teacher = scores.masked_fill(~valid, 0.0), teacher.masked_fill(~valid, 0.0)
    losses, derivative = OTHERS.get(options.kind, _pairs)(scores, teacher, valid, options, slopes)
    # Comparisons with NaN are false, which would hide it.
    losses = losses.masked_fill(teacher.isnan().any(1), torch.nan)
    return losses, derivative.masked_fill(~valid, 0.0) if slopes else derivative


def _softmax(scores: Tensor, teacher: Tensor, valid: Tensor, options: Options, slopes: bool) -> tuple[Tensor, Tensor]:
    # A list without candidates is one of equal candidates, whose divergence is 0.
    hidden = ~valid & valid.any(1, keepdim=True)
    log_p, log_q = (log_softmax(each.masked_fill(hidden, -torch.inf)) for each in (scores, teacher))
    p, q = log_p.exp(), log_q.exp()
    if options.kind == "kl":
        losses = kl_of_rows(log_q, log_p)
    else:
        losses = -(q * log_p.masked_fill(q == 0, 0.0)).sum(1).masked_fill(~valid.any(1), 0.0)
    return losses, balanced(p - q, p)


def _labels(scores: Tensor, weights: Tensor, valid: Tensor, options: Options, slopes: bool) -> tuple[Tensor, Tensor]:
    """Losses of weights in place of a teacher's scores; 0 where all weights are."""
    has = weights.sum(1, keepdim=True) > 0
    hidden, w = ~valid & valid.any(1, keepdim=True), weights / torch.where(has, weights.sum(1, keepdim=True), 1.0)
    log_p = log_softmax(scores.masked_fill(hidden, -torch.inf))
    if options.kind == "mean_log":
        losses, of_positives = -(w * log_p.masked_fill(w == 0, 0.0)).sum(1), w
    else:
        # What all positives have of the probability, and then what each has of that: no difference of large numbers.
        relevant = (w > 0) | ~has
        outside = scores.masked_fill(relevant | hidden, -torch.inf).logsumexp(1)
        all_positives = scores.masked_fill(~relevant | hidden, -torch.inf)
        among = log_softmax(all_positives) + w.log().masked_fill(~has, 0.0)
        within = among.logsumexp(1)
        losses = softplus(outside - all_positives.logsumexp(1)) - within
        of_positives = (among - within[:, None]).exp()
    losses = losses.masked_fill(~has[:, 0], 0.0)
    return losses, balanced(log_p.exp() - of_positives, log_p.exp()).masked_fill(~has, 0.0) if slopes else losses


def _permutation(
    scores: Tensor, teacher: Tensor, valid: Tensor, options: Options, slopes: bool
) -> tuple[Tensor, Tensor]:
    """The negative logarithm of the probability of the teacher's order under Plackett and Luce's model."""
    order = teacher.masked_fill(~valid, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    there = valid.gather(1, order)
    # Not -inf, of which logcumsumexp has no derivative.
    nothing = torch.finfo(scores.dtype).min / 4
    s = scores.gather(1, order).masked_fill(~there, nothing)
    # Of those that come later, so that neither a loss nor its derivative is the difference of two large numbers.
    followed = pad(there[:, 1:], (0, min(1, s.shape[1])), value=False)
    behind = pad(s[:, 1:].flip(1).logcumsumexp(1).flip(1), (0, min(1, s.shape[1])), value=nothing)
    losses = softplus((behind - s).masked_fill(~followed, 0.0)).masked_fill(~followed, 0.0).sum(1)
    if not slopes:
        return losses, losses
    # lse_k is at least s_j for every k up to j, so no term of the sum exceeds 1.
    lse = torch.logaddexp(behind, s)
    ahead = pad((-lse[:, :-1]).logcumsumexp(1), (min(1, s.shape[1]), 0), value=-torch.inf)
    derivative = (s + ahead).exp() - (behind - s).sigmoid()
    return losses, torch.zeros_like(scores).scatter(1, order, derivative)


def _margins(scores: Tensor, teacher: Tensor, valid: Tensor, options: Options, slopes: bool) -> tuple[Tensor, Tensor]:
    there = valid[:, 1:] & valid[:, :1]
    off = (scores[:, :1] - scores[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
    off = off.masked_fill(~there, 0.0)
    count = there.sum(1, keepdim=True).clamp_min(1)
    by_margin = 2 * off / count
    return (off.square() / count).sum(1), torch.cat([by_margin.sum(1, keepdim=True), -by_margin], 1)


def _pairs(scores: Tensor, teacher: Tensor, valid: Tensor, options: Options, slopes: bool) -> tuple[Tensor, Tensor]:
    """Sums over all pairs of each list, of which some are in memory at a time: those of some better candidates."""
    ratings = _ratings(scores.detach(), teacher, valid, options)
    losses, count = scores.new_zeros(scores.shape[:1]), scores.new_zeros(scores.shape[:1])
    derivative = torch.zeros_like(scores, memory_format=torch.contiguous_format)
    for part in chunks_of_rows(scores.shape[1], max(1, _at_once(scores) // max(scores.numel(), 1))):
        better = (teacher[:, part, None] > teacher[:, None]) & valid[:, part, None] & valid[:, None]
        lead = scores[:, part, None] - scores[:, None]
        weight = better.to(scores.dtype)
        for rating in ratings:
            weight = weight * (rating[:, part, None] - rating[:, None]).abs()
        cost = (options.margin - lead).relu() if options.kind == "hinge" else softplus(-lead)
        losses = losses + (weight * cost.masked_fill(~better, 0.0)).sum((1, 2))
        count = count + better.sum((1, 2))
        if not slopes:
            continue
        if options.kind == "hinge":  # a comparison would hide NaN
            falling = torch.where(lead.isnan(), lead, (lead < options.margin).to(lead))
        else:
            falling = (-lead).sigmoid()
        by_lead = -weight * falling.masked_fill(~better, 0.0)
        derivative[:, part] += by_lead.sum(2)
        derivative -= by_lead.sum(1)
    if options.sums_pairs:
        return losses, derivative
    count = count.clamp_min(1)
    return losses / count, derivative / count[:, None]


def _at_once(scores: Tensor) -> int:
    return PAIRS if scores.device.type == "cpu" else PAIRS_OF_GPU


def _ratings(scores: Tensor, teacher: Tensor, valid: Tensor, options: Options) -> tuple[Tensor, ...]:
    """(N, K) numbers of the candidates: the weight of a pair is the product of how far they are apart in each."""
    if options.weighting == "none":
        return ()
    if options.weighting == "reciprocal_rank":
        return (1 / _ranks(teacher, valid),)
    # 2^grade - 1 over that of the best order: the largest grade is taken out of the powers, which overflow.
    grade = teacher.masked_fill(~valid, 0.0)
    largest = grade.amax(1, keepdim=True)
    gain = -torch.expm1(-math.log(2) * grade) * (grade - largest).exp2()
    # The best order has equal grades one after another, however they are numbered.
    best = gain.sort(1, descending=True).values
    places = torch.arange(1, gain.shape[1] + 1, device=gain.device, dtype=gain.dtype)
    ideal = (best * _discounts(places, options.first)).sum(1, keepdim=True)
    gain = gain / torch.where(ideal > 0, ideal, 1.0)
    return gain, _discounts(_ranks(scores, valid, ties=True), options.first)


def _discounts(ranks: Tensor, first: int) -> Tensor:
    """What a gain at each rank counts in NDCG, of the first ranks alone unless that is 0."""
    discounts = 1 / (1 + ranks).log2()
    return discounts.masked_fill(ranks > first, 0.0) if first else discounts


def _ranks(values: Tensor, valid: Tensor, ties: bool = False) -> Tensor:
    """1 for the largest of what is there; equal values share the best of their ranks, or are ranked as they come."""
    values, order = values.masked_fill(values.isnan(), -torch.inf).sort(dim=1, descending=True, stable=True)
    # What is not there comes last, also after -inf.
    there, place = valid.gather(1, order).to(torch.uint8).sort(dim=1, descending=True, stable=True)
    values, order = values.gather(1, place), order.gather(1, place)
    rank = torch.arange(values.shape[1], device=values.device).expand_as(order)
    if not ties:
        first = torch.ones_like(there, dtype=torch.bool)
        first[:, 1:] = values[:, 1:] != values[:, :-1]
        rank = torch.where(first, rank, 0).cummax(1).values
    return torch.zeros_like(values).scatter(1, order, 1 + rank.to(values.dtype))


OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor, Options, bool], tuple[Tensor, Tensor]]] = {
    "kl": _softmax,
    "listnet": _softmax,
    "listmle": _permutation,
    "margin_mse": _margins,
    "mean_log": _labels,
    "log_mean": _labels,
}


# ---- Operators -----------------------------------------------------------------------------------------------------


def _forward(scores: Tensor, teacher: Tensor, valid: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    of_what = Options(*options)
    losses, slopes = scores.new_empty(scores.shape[:1]), torch.empty_like(scores, memory_format=torch.contiguous_format)
    size, at_once = scores.shape[1], CHUNK_ELEMENTS
    if of_what.kind in PAIRWISE:
        size, at_once = size**2, _at_once(scores)
    with autocast.disabled(scores):
        for rows in chunks_of_rows(scores.shape[0], max(1, at_once // max(size, 1))):
            losses[rows], slopes[rows] = _rows(scores[rows], teacher[rows], valid[rows], of_what, True)
    return losses, slopes


def _fake(scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape[:1]), torch.empty_like(scores, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, teacher, valid, *options = inputs
    ctx.save_for_backward(scores, teacher, valid, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.options = Options(*options)


def _derivative(ctx: Any, d_losses: Tensor | None, _: Any) -> tuple[Any, ...]:
    scores, teacher, valid, slopes = ctx.saved_tensors
    others = (None,) * (2 + len(ctx.options))
    if d_losses is None:
        return None, *others
    if not torch.is_grad_enabled():
        return d_losses[:, None] * slopes, *others
    # The same slopes as functions of the scores.
    _, slopes = _rows(scores, teacher, valid, ctx.options, True)
    return d_losses[:, None] * slopes, *others


define(
    "rank_lists",
    "(Tensor scores, Tensor teacher, Tensor valid, str kind, str weighting, float margin, bool sums_pairs,"
    " SymInt first)"
    " -> (Tensor losses, Tensor slopes)",
    _forward,
    _fake,
    _setup,
    _derivative,
)
