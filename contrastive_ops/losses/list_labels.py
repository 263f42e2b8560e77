"""Cross-entropy of short lists of scores with labels: what a reranker learns from groups of candidates.

Scores come from wherever they are made, such as a cross-encoder. Lists that a teacher scores: `rank_distillation`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..core import checks
from . import _arguments
from ._list_arguments import factor_of, lists_of
from ._rank_lists import Options, list_losses

POSITIVES = ("mean_log", "log_mean")


def listwise_cross_entropy(
    scores: Tensor,
    relevance: Tensor,
    *,
    positives: str = "mean_log",
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of each list of scores with its relevant candidates, of which there may be several.

    Equivalent to::

        p = (scores / temperature).masked_fill(~mask, -torch.inf).softmax(1)
        q = relevance / relevance.sum(1, keepdim=True)
        -(q * p.log()).sum(1).mean()                            # positives="mean_log"
        -(q * p).sum(1).log().mean()                            # positives="log_mean"

    Args:
        scores: (N, K) float32, bfloat16, float16 or float64; differentiable.
        relevance: (N, K) weights >= 0 of the candidates, bool or any numbers, 0 for those that are not relevant; or
            (N,) int64, the one relevant candidate of each list, -1 for none. Not differentiated.
        positives: "mean_log": the mean of their losses, each of which must be found. "log_mean": the loss of their mean
            probability, so that one that is found is enough.
        temperature: divides the scores; float or 0-d tensor, differentiable.
        mask: (N, K) bool, False where a list has no candidate. A candidate that is listed twice counts twice, unless
            this leaves one out: `contrastive_ops.mining.first_of_each` of ids.
        weight: (N,) weight of each list; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs), never negative. A list without a
        relevant candidate has loss and gradient 0 and no part in the mean.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach, 2007; of one relevant candidate the
        loss of Nogueira and Cho's rerankers with groups of negatives.

    Examples:
        >>> scores = torch.tensor([[2.0, 0.0, 1.0]])
        >>> listwise_cross_entropy(scores, torch.tensor([0]))
        tensor(0.4076)
        >>> listwise_cross_entropy(scores, torch.tensor([[1.0, 0.0, 1.0]]), positives="log_mean")
        tensor(0.7875)
    """
    name = "listwise_cross_entropy"
    checks.check_choice(name, "positives", positives, POSITIVES)
    weights = _weights_of(name, scores, relevance)
    scores, weights, valid = lists_of(name, scores, weights, mask, weight, reduction, "relevance")
    if checks.may_read(weights, waits=True) and bool((weights < 0).any()):
        raise ValueError(f"{name}: relevance must be >= 0, got {weights.amin().item()}")
    losses = list_losses(
        scores * factor_of(name, "temperature", temperature, scores), weights, valid, Options(positives)
    )
    return _arguments.mean_over(losses, ~(weights.sum(1) <= 0), weight, reduction)


def _weights_of(function: str, scores: Tensor, relevance: Tensor) -> Tensor:
    """(N, K) in the dtype of sums, of whatever form."""
    checks.check_tensor(function, "scores", scores)
    checks.check_tensor(function, "relevance", relevance)
    if relevance.dtype != torch.bool and relevance.dtype not in checks.INTEGERS:
        checks.check_floating(function, "relevance", relevance)
    dtype = checks.accumulator(scores.dtype)
    if relevance.dim() != 1 or scores.dim() != 2:
        return relevance.detach().to(dtype)
    target = checks.check_index(function, "relevance", relevance, scores.shape[0], "scores", scores)
    checks.check_index_values(function, "relevance", target, scores.shape[1], or_none=True)
    return one_hot(target.clamp_min(0), scores.shape[1]).to(dtype) * (target >= 0).to(dtype)[:, None]
