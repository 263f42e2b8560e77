"""CLIP's loss: InfoNCE in both directions of one matrix.

Both directions need the statistics of every column before the first gradient, so products are made again in backward,
or kept: 8 N^2 D operations, 6 if kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import softplus
from ..core.rules import Pairs
from ..ops.similarity_reduce import fold
from . import _arguments
from ._columns import (
    check_pairs,
    logit_sums,
    mean_logit,
    smoothing_folds,
    smoothing_share,
    sum_and_count,
    wide,
)
from ._eager import PARTNERS, eager_loss, is_off
from ._row_softmax import whole_softmax
from .diagnostics import Diagnostics, Ranking

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


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
