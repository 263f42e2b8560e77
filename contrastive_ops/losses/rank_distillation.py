"""Distillation from the scores that a teacher gives to the candidates of each query.

Scores come from wherever the student has them: ``torch.einsum("nd,nkd->nk", query, candidates)`` for embeddings,
`maxsim_pairs` for late interaction, the outputs of a cross-encoder. Each list has its own candidates; for the matrix of
all queries and documents of a batch there are other losses. Memory is that of the lists, pairs are never all stored.

Lists of scores have no ids. Where a candidate may be listed twice, ``mask=contrastive_ops.mining.first_of_each(ids)``
makes sets of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from . import _arguments
from ._list_arguments import factor_of, lists_of
from ._rank_lists import PAIRWISE, WEIGHTINGS, Options, list_losses

LISTWISE = ("kl", "listnet", "listmle")


def margin_mse(
    scores: Tensor,
    teacher_scores: Tensor,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """MarginMSE: the positive's lead over each negative must be as large as it is for the teacher.

    Equivalent to::

        margin = scores[:, :1] - scores[:, 1:]
        teacher_margin = teacher_scores[:, :1] - teacher_scores[:, 1:]
        (margin - teacher_margin).square().mean()

    Args:
        scores: (N, K) of the student: column 0 has the positive, the others negatives. float32, bfloat16, float16 or
            float64; differentiable.
        teacher_scores: (N, K) of the teacher, -inf where a list has no candidate. Not differentiated. Margins t alone
            are the scores ``torch.cat([torch.zeros(N, 1), -t], 1)``.
        mask: (N, K) bool, False where a list has no candidate. A candidate that is listed twice counts twice, unless
            this leaves one out: `contrastive_ops.mining.first_of_each` of ids.
        weight: (N,) weight of each list; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".

    Returns:
        0-d, or (N,) means over the negatives of each list for ``reduction="none"``, in float32 (float64 for float64
        inputs). A list without its positive or without a negative has loss and gradient 0 and no part in the mean.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Hofstätter et al., Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation,
        2020.

    Examples:
        >>> margin_mse(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[9.0, 7.0, 5.0]]))
        tensor(4.5000)
    """
    name = "margin_mse"
    scores, teacher, valid = lists_of(name, scores, teacher_scores, mask, weight, reduction)
    counted = valid[:, 0] & valid[:, 1:].any(1)
    losses = list_losses(scores, teacher, valid, Options("margin_mse"))
    return _arguments.mean_over(losses, counted, weight, reduction)


def listwise_distillation(
    scores: Tensor,
    teacher_scores: Tensor,
    *,
    kind: str = "kl",
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Distil the teacher's distribution over the candidates of each query, or its order of them.

    Equivalent to::

        log_p = (scores / temperature).log_softmax(1)
        q = (teacher_scores / teacher_temperature).softmax(1)
        kl = temperature**2 * F.kl_div(log_p, q, reduction="batchmean")
        listnet = -(q * log_p).sum(1).mean()
        s = (scores / temperature).gather(1, teacher_scores.argsort(dim=1, descending=True, stable=True))
        listmle = sum(s[:, k:].logsumexp(1) - s[:, k] for k in range(K)).mean()

    Args:
        scores: (N, K) of the student: float32, bfloat16, float16 or float64; differentiable.
        teacher_scores: (N, K) of the teacher, -inf where a list has no candidate. Not differentiated.
        kind: "kl": the divergence from the teacher's distribution, times the squared temperature, which keeps the size
            of gradients; "listnet": the cross entropy, whose gradient is the same but for that factor; "listmle": the
            negative log-likelihood of the teacher's order, in which equal scores stay as they come.
        temperature: divides the student's scores; float or 0-d tensor, differentiable.
        teacher_temperature: divides the teacher's scores. None: as the student's. A constant in any case.
            Without effect on "listmle".
        mask: (N, K) bool, False where a list has no candidate. A candidate that is listed twice counts twice, unless
            this leaves one out: `contrastive_ops.mining.first_of_each` of ids.
        weight: (N,) weight of each list; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs), never negative. A list without
        any candidate has loss and gradient 0 and no part in the mean.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Lin et al., Distilling Dense Representations for Ranking using Tightly-Coupled Teachers, 2020; Cao et al.,
        Learning to Rank: From Pairwise Approach to Listwise Approach, 2007 (ListNet); Xia et al., Listwise Approach to
        Learning to Rank: Theory and Algorithm, 2008 (ListMLE).

    Examples:
        >>> scores, teacher = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[4.0, 2.0, -torch.inf]])
        >>> listwise_distillation(scores, teacher)
        tensor(0.8287)
    """
    name = "listwise_distillation"
    checks.check_choice(name, "kind", kind, LISTWISE)
    scores, teacher, valid = lists_of(name, scores, teacher_scores, mask, weight, reduction)
    factor = factor_of(name, "temperature", temperature, scores)
    of_teacher = factor.detach()
    if teacher_temperature is not None:
        of_teacher = factor_of(name, "teacher_temperature", teacher_temperature, scores).detach()
    losses = list_losses(scores * factor, teacher * of_teacher, valid, Options(kind))
    if kind == "kl":
        losses = losses / factor.square()
    return _arguments.mean_over(losses, valid.any(1), weight, reduction)


def pairwise_rank_distillation(
    scores: Tensor,
    teacher_scores: Tensor,
    *,
    kind: str = "logistic",
    pair_weight: str = "none",
    pair_reduction: str = "mean",
    k: int | None = None,
    margin: float = 1.0,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Order every two candidates of a query as the teacher does: RankNet, RankSVM, LambdaRank and CL-DRD.

    Equivalent to::

        better = teacher_scores[:, :, None] > teacher_scores[:, None]               # i is better than j
        lead = (scores[:, :, None] - scores[:, None]) / temperature
        cost = F.softplus(-lead) if kind == "logistic" else F.relu(margin - lead)
        losses = (better * w * cost).sum((1, 2)) / (better.sum((1, 2)) if pair_reduction == "mean" else 1)
        losses.mean()

    Args:
        scores: (N, K) of the student: float32, bfloat16, float16 or float64; differentiable.
        teacher_scores: (N, K) of the teacher, -inf where a list has no candidate. Not differentiated. Pairs of equal
            scores do not count.
        kind: "logistic" (RankNet) or "hinge" (RankSVM).
        pair_weight: w of the pair (i, j). "none": 1. "reciprocal_rank": ``|1 / rank_i - 1 / rank_j|`` of the teacher's
            ranks, where equal scores share the best of theirs (CL-DRD). "lambda": by how much NDCG would change if both
            changed places in the student's order (LambdaRank), of gains ``2**teacher_scores - 1``: for grades >= 0.
        pair_reduction: "mean" or "sum" over the pairs of a list.
        k: of "lambda", NDCG@k: places after the first k count nothing, so that pairs of such places have weight 0.
            None: NDCG of whole lists.
        margin: of "hinge", a finite number >= 0.
        temperature: divides the student's scores; float or 0-d tensor, differentiable.
        mask: (N, K) bool, False where a list has no candidate. A candidate that is listed twice counts twice, unless
            this leaves one out: `contrastive_ops.mining.first_of_each` of ids.
        weight: (N,) weight of each list; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). A list in which the teacher
        prefers nothing has loss and gradient 0 and no part in the mean.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Work O(N K^2), memory O(N K) and a few MiB, for one long list as for many short ones. A second derivative keeps
        the pairs of all lists, O(N K^2).

    Source:
        Burges et al., Learning to Rank using Gradient Descent, 2005; Burges, From RankNet to LambdaRank to LambdaMART,
        2010; Zeng et al., Curriculum Learning for Dense Retrieval Distillation, 2022, and, with it, Zamani and
        Bendersky, Multivariate Representation Learning for Information Retrieval, 2023.

    Examples:
        >>> pairwise_rank_distillation(torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.9, 0.5, 0.1]]))
        tensor(0.5845)
    """
    name = "pairwise_rank_distillation"
    checks.check_choice(name, "kind", kind, PAIRWISE)
    checks.check_choice(name, "pair_weight", pair_weight, WEIGHTINGS)
    checks.check_choice(name, "pair_reduction", pair_reduction, ("mean", "sum"))
    if k is not None:
        k = checks.integer(name, "k", k, 1)
        if pair_weight != "lambda":
            raise ValueError(f'{name}: k must be None for pair_weight="{pair_weight}", got {k}')
    margin = checks.number(name, "margin", margin, "[0, inf)")
    scores, teacher, valid = lists_of(name, scores, teacher_scores, mask, weight, reduction)
    factor = factor_of(name, "temperature", temperature, scores)
    options = Options(kind, pair_weight, margin, pair_reduction == "sum", 0 if k is None else k)
    losses = list_losses(scores * factor, teacher, valid, options)
    lowest, highest = (teacher.masked_fill(~valid, end).sort(1).values for end in (torch.inf, -torch.inf))
    # Not `highest > lowest`, which would leave out lists with NaN.
    counted = ~(highest[:, -1] <= lowest[:, 0])
    return _arguments.mean_over(losses, counted, weight, reduction)
