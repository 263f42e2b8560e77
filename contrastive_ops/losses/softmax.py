"""Softmax losses: InfoNCE, CLIP, NT-Xent.

Each is softplus(lse over the other columns - target logit) per row. How their gradients are formed:

    loss      reduction      gradients                                multiply-adds (2 each), N = M
    info_nce  mean, sum      in the forward pass                      6 N^2 D
    info_nce  none           recomputed in backward, or kept          8 N^2 D, 6 if kept
    clip      any            recomputed in backward, or kept          8 N^2 D, 6 if kept
    nt_xent   any            recomputed in backward, or kept          4 N^2 D, 3 if kept (N = both views)

Each is one operator (`similarity_loss`). A margin, a z-loss, label smoothing of filtered pairs and diagnostics need
more of the sweep: with any of them a loss is algebra on folds, and info_nce recomputes whatever its reduction is.

Both directions of clip need every column's statistics before the first gradient, and so do the mirrored tiles of
nt_xent, which is why they cannot form gradients in their forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import softplus
from ..core.rules import Pairs
from ..ops.similarity_loss import similarity_loss
from ..ops.similarity_reduce import fold
from . import _arguments
from ._columns import (
    check_own_column,
    check_pairs,
    checked_row_negatives,
    checked_target,
    logit_sums,
    mean_logit,
    partner_similarity,
    scaled,
    smoothing_folds,
    smoothing_share,
    sum_and_count,
    wide,
)
from ._eager import COLUMNS, PARTNERS, STACKED, eager_loss, is_off
from ._row_softmax import row_softmax, whole_softmax
from .diagnostics import Diagnostics, Ranking

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
    name = "info_nce"
    if (
        negatives is None
        and row_negatives is None
        and pairs is None
        and col_bias is None
        and diagnostics is False
        and is_off(margin, label_smoothing, z_loss)
        and (
            loss := eager_loss(
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
        )
        is not None
    ):
        return loss
    _arguments.check_reduction(name, reduction)
    check_pairs(name, pairs)
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
    if target is None:
        check_own_column(name, query, key)
    else:
        target = checked_target(name, "target", target, "query", query, key.shape[0])
    if negatives is not None:
        checks.check_matrices(name, "query", query, "negatives", negatives)
        key = torch.cat([key, negatives])
    if col_bias is not None:
        checks.check_vector(name, "col_bias", col_bias, key.shape[0], "query", query)
    if row_negatives is not None:
        row_negatives = checked_row_negatives(name, query, row_negatives)
    unit, (query, key) = _arguments.in_sweep(normalize, query), _arguments.unit_sides(normalize, query, key)
    own = None
    if row_negatives is not None:
        (row_negatives,) = _arguments.unit_sides(normalize, row_negatives)
        own = partner_similarity(query, row_negatives, unit)
    return row_softmax(
        (name, "query", "key"),
        query,
        key,
        target=target,
        scale=scale,
        pairs=pairs,
        col_bias=col_bias,
        own=own,
        unit=unit,
        own_logit=(lambda logit: logit - scaled(scale, torch.full_like(logit, margin))) if margin else None,
        share=share,
        z_loss=z_loss,
        weight=weight,
        reduction=reduction,
        diagnostics=diagnostics,
        memory_budget=memory_budget,
        backend=backend,
    )


@overload
def clip(
    image: Tensor, text: Tensor, *, diagnostics: Literal[False] = ..., **options: Unpack[_arguments.FilteredOptions]
) -> Tensor: ...


@overload
def clip(
    image: Tensor, text: Tensor, *, diagnostics: Literal[True], **options: Unpack[_arguments.FilteredOptions]
) -> tuple[Tensor, tuple[Diagnostics, Diagnostics]]: ...


def clip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, tuple[Diagnostics, Diagnostics]]:
    """CLIP's loss: InfoNCE from images to texts and from texts to images, averaged, from one sweep.

    Equivalent to::

        image, text = F.normalize(image), F.normalize(text)
        logits, labels = scale * image @ text.T, torch.arange(N)
        logits = logits.masked_fill(~keep, -torch.inf)                              # the rules of Pairs, not the target
        (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Args:
        image: (N, D) float32, bfloat16, float16 or float64.
        text: (N, D); row i belongs to row i of ``image``.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead, for instance ``logit_scale.exp()``; not both.
        pairs: which images and texts are negatives of each other: ids of false negatives, bounds on the similarity, a
            guide, ... An image and its own text always take part.
        col_bias: (N,), added to the logits of each text; differentiable. The softmax of images over texts sees it, that
            of texts over images does not.
        label_smoothing: share of the target distribution that is spread evenly over all columns that take part; a
            float, or (N,) with a share for each pair, differentiable.
        weight: (N,) weight of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        diagnostics: also return `Diagnostics` of both directions from the same sweep.
        memory_budget: bytes of inner products kept for backward: 0 keeps none (8 N^2 D), 4 N^2 keeps all of them
            (6 N^2 D). None: 128 MiB, on a GPU 1 GiB. Does not change the result.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs); with ``diagnostics`` the pair
        (loss, (Diagnostics of images, Diagnostics of texts)). Never negative without label smoothing.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``.

    Source:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021.

    Example:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> cosines = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
        >>> labels = torch.arange(8)
        >>> both = [torch.nn.functional.cross_entropy(each, labels) for each in (10.0 * cosines, 10.0 * cosines.T)]
        >>> torch.allclose(clip(image, text, scale=10.0), sum(both) / 2, rtol=1e-4)
        True
    """
    name = "clip"
    if (
        pairs is None
        and col_bias is None
        and diagnostics is False
        and is_off(label_smoothing)
        and (
            loss := eager_loss(
                "softmax_both",
                PARTNERS,
                image,
                text,
                temperature=temperature,
                scale=scale,
                default_temperature=0.07,
                weight=weight,
                reduction=reduction,
                normalize=normalize,
                memory_budget=memory_budget,
                backend=backend,
            )
        )
        is not None
    ):
        return loss
    image, text, scale = _arguments.two_sides(
        name,
        (("image", image), ("text", text)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        partners=True,
    )
    check_pairs(name, pairs)
    if col_bias is not None:
        checks.check_vector(name, "col_bias", col_bias, text.shape[0], "image", image)
    share = smoothing_share(name, _arguments.of_weighted(weight, label_smoothing), "image", image)
    of_smoothing = smoothing_folds(share, pairs)
    unit = _arguments.in_sweep(normalize, image)
    if not (diagnostics or of_smoothing):
        sums = None
        if share is not None:
            sides = wide(image, unit), wide(text, unit)  # once, or 16-bit gradients would be rounded once more
            both = logit_sums(*sides, scale, col_bias=col_bias)
            both = both + logit_sums(*sides, scale, of_columns=True, col_bias=col_bias)
            sums = both / (2 * image.shape[0])
        return whole_softmax(
            (name, "image", "text"),
            image,
            text,
            "softmax_both",
            None,
            scale,
            pairs,
            col_bias,
            None,
            share,
            sums,
            weight,
            reduction,
            unit,
            memory_budget,
            backend,
        )
    ranking = Ranking(image, text, text, pairs, both=True, unit=unit) if diagnostics else None
    folded = fold(
        image,
        text,
        reduce=("logsumexp", *of_smoothing, *(ranking.folds if ranking else ())),
        dim=(0, 1),
        scale=scale,
        col_bias=col_bias,
        target=torch.arange(image.shape[0], device=image.device),
        pairs=pairs,
        unit=unit,
        memory_budget=memory_budget,
        names=(name, "image", "text"),
        backend=backend,
    )
    (rows, *of_rows), (cols, *of_cols), target_logit, *_ = folded
    end = len(of_smoothing)
    losses = (softplus(rows - target_logit) + softplus(cols - target_logit)) / 2
    if share is not None:
        row_mean, col_mean = (
            mean_logit(*sum_and_count(image, text, scale, target_logit, folded[:end], of_columns, unit, col_bias))
            for folded, of_columns in ((of_rows, False), (of_cols, True))
        )
        losses = losses + share * (target_logit - (row_mean + col_mean) / 2)
    loss = _arguments.reduce_rows(losses, weight, reduction)
    return (loss, (ranking.read(of_rows[end:]), ranking.read(of_cols[end:], dim=0))) if ranking else loss


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """NT-Xent (SimCLR): two views of N samples, each must find the other among all 2 N - 1 others.

    Equivalent to::

        z = F.normalize(torch.cat([z0, z1]))                                        # (2 N, D)
        logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
        F.cross_entropy(logits, (torch.arange(2 * N) + N) % (2 * N))

    Args:
        z0: (N, D) float32, bfloat16, float16 or float64: the first view.
        z1: (N, D): the second view.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.5.
        scale: 1 / temperature instead; not both.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the paper does; O(N D).
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (2 N,) for ``reduction="none"`` (first the rows of ``z0``), in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``. The similarity matrix is symmetric and only its tiles on and above
        the diagonal are computed: half the work.

    Source:
        Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020.

    Example:
        >>> z0, z1 = torch.randn(4, 16), torch.randn(4, 16)
        >>> nt_xent(z0, z1, reduction="none").shape
        torch.Size([8])
    """
    name = "nt_xent"
    loss = eager_loss(
        "softmax",
        STACKED,
        z0,
        z1,
        temperature=temperature,
        scale=scale,
        default_temperature=0.5,
        reduction=reduction,
        normalize=normalize,
        memory_budget=memory_budget,
        backend=backend,
    )
    if loss is not None:
        return loss
    z0, z1, scale = _arguments.two_sides(
        name,
        (("z0", z0), ("z1", z1)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.5,
        reduction=reduction,
        normalize=normalize,
        partners=True,
    )
    z = torch.cat([z0, z1])
    return similarity_loss(
        z,
        scale=scale,
        pairs=Pairs(diagonal=0),
        reduction=reduction,
        unit=_arguments.in_sweep(normalize, z),
        memory_budget=memory_budget,
        names=(name, "z0", "z1"),
        backend=backend,
    )
