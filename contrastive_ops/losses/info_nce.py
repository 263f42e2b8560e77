"""InfoNCE: softplus(lse over the other columns - target logit) of each row.

A mean or sum forms its gradients in the forward pass: 6 N M D operations. Losses of rows, a margin, a z-loss, label
smoothing of filtered pairs and diagnostics need the folds, whose products are made again in backward, or kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.rules import Pairs
from . import _arguments
from ._columns import (
    check_filters,
    checked_own_target,
    checked_row_negatives,
    partner_similarity,
    scaled,
    smoothing_share,
)
from ._eager import COLUMNS, eager_loss, is_off
from ._row_softmax import row_softmax
from ._sweep import Sweep
from .diagnostics import Diagnostics

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = ...,
    *,
    row_negatives: Tensor | None = ...,
    target: Tensor | None = ...,
    margin: float = ...,
    z_loss: float = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_arguments.FilteredOptions],
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = ...,
    *,
    row_negatives: Tensor | None = ...,
    target: Tensor | None = ...,
    margin: float = ...,
    z_loss: float = ...,
    diagnostics: Literal[True],
    **options: Unpack[_arguments.FilteredOptions],
) -> tuple[Tensor, Diagnostics]: ...


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    row_negatives: Tensor | None = None,
    target: Tensor | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    margin: float = 0.0,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Diagnostics]:
    """InfoNCE in one direction: every query must find its key among all keys.

    Equivalent to::

        query, key, negatives, row_negatives = (F.normalize(each, dim=-1) for each in ...)
        logits = query @ torch.cat([key, negatives]).T                              # (N, M + K)
        logits = logits.masked_fill(~keep, -torch.inf)                              # the rules of Pairs, not the target
        logits = torch.cat([logits, torch.einsum("nd,nkd->nk", query, row_negatives)], 1)
        logits = (logits - margin * F.one_hot(target, logits.shape[1])) / temperature
        loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        (loss + z_loss * logits.logsumexp(1) ** 2).mean()

    Args:
        query: (N, D) float32, bfloat16, float16 or float64.
        key: (M, D); query i belongs to key ``target[i]``.
        negatives: (K, D), more columns for every query. Rows have no ids: one that is given twice counts twice.
        row_negatives: (N, D) or (N, K', D), more columns for each query alone; the same is true of them.
        target: (N,) int64 in [0, M). None: query i belongs to key i, and M >= N.
        temperature: divides the cosines; float, 0-d or (N,) tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        pairs: which of the M + K columns are negatives of a query: ids of false negatives, bounds on the similarity, a
            guide, ... The target always takes part, and so do ``row_negatives``.
        col_bias: (M + K,), added to the logits of each column, positives included; differentiable. The logQ correction
            is minus the logarithm of how often a key is drawn. Not of ``row_negatives``.
        margin: subtracted from the similarity of each query with its key (additive margin).
        label_smoothing: share of the target distribution that is spread evenly over all columns that take part; a
            float, or (N,) with a share for each row, differentiable.
        z_loss: factor of the squared logarithm of the softmax's denominator, which is added to the loss.
        diagnostics: also return `Diagnostics` (accuracy, ranks, mean similarities) from the same sweep.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        memory_budget: bytes kept for backward with ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs); with ``diagnostics`` the pair
        (loss, Diagnostics). Never negative without label smoothing. A row without any negative has loss 0 and
        gradient 0. For N = 0 the mean is NaN, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D). A mean or sum forms its gradients in the forward pass (6 N M D), unless ``margin``,
        ``z_loss``, ``diagnostics`` or ``label_smoothing`` with ``pairs`` need the rows themselves (8 N M D, 6 if
        kept); without gradients only the forward is paid (2 N M D).

    Source:
        van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018. The margin: Yang et al.,
        Improving Multilingual Sentence Embedding using Bi-directional Dual Encoder with Additive Margin Softmax, 2019.

    Example:
        >>> query, key = torch.randn(8, 16), torch.randn(8, 16)
        >>> loss = info_nce(query, key, temperature=0.1)
        >>> cosines = torch.nn.functional.normalize(query) @ torch.nn.functional.normalize(key).T
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(cosines / 0.1, torch.arange(8)), atol=1e-5)
        True
    """
    plain = negatives is None and row_negatives is None and pairs is None and col_bias is None
    loss = None
    if plain and diagnostics is False and is_off(margin, label_smoothing, z_loss):
        loss = eager_loss(
            "softmax",
            COLUMNS,
            query,
            key,
            temperature=temperature,
            scale=scale,
            default_temperature=0.07,
            target=target,
            weight=weight,
            reduction=reduction,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
        )
    if loss is not None:
        return loss
    name = "info_nce"
    _arguments.check_reduction(name, reduction)
    margin = checks.number(name, "margin", margin, "[0, inf)")
    z_loss = checks.number(name, "z_loss", z_loss, "[0, inf)")
    query, key, negatives, row_negatives = autocast.cast(query, key, negatives, row_negatives)
    checks.check_matrices(name, "query", query, "key", key)
    if weight is not None:
        _arguments.check_weight(name, weight, query.shape[0], "query", query)
        query, row_negatives, target = (_arguments.of_weighted(weight, each) for each in (query, row_negatives, target))
        label_smoothing = _arguments.of_weighted(weight, label_smoothing)
        temperature, scale = (_arguments.of_weighted(weight, each, 1) for each in (temperature, scale))
    scale = _arguments.resolve_scale(name, temperature, scale, 0.07)
    share = smoothing_share(name, label_smoothing, "query", query)
    target = checked_own_target(name, target, query, key)
    if negatives is not None:
        checks.check_matrices(name, "query", query, "negatives", negatives)
        key = torch.cat([key, negatives])
    check_filters(name, pairs, col_bias, key.shape[0], "query", query)
    if row_negatives is not None:
        row_negatives = checked_row_negatives(name, query, row_negatives)
    unit, (query, key) = _arguments.in_sweep(normalize, query), _arguments.unit_sides(normalize, query, key)
    own = None
    if row_negatives is not None:
        own = partner_similarity(query, _arguments.unit_sides(normalize, row_negatives)[0], unit)
    own_logit = (lambda logit: logit - scaled(scale, torch.full_like(logit, margin))) if margin else None
    sweep = Sweep((name, "query", "key"), scale, pairs, col_bias, unit, memory_budget, backend)
    options: dict[str, Any] = {
        "share": share,
        "z_loss": z_loss,
        "weight": weight,
        "reduction": reduction,
        "diagnostics": diagnostics,
    }
    return row_softmax(sweep, query, key, target=target, own=own, own_logit=own_logit, **options)
