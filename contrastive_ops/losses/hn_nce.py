"""Hard-negative NCE: both directions of one matrix, with more weight on negatives that are close."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import softplus
from ..core.rules import Pairs
from . import _arguments
from ._columns import check_filters
from ._hardness import hardness_folds, log_number, weighted_negatives
from ._sweep import Sweep
from .diagnostics import Diagnostics, Ranking

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def hn_nce(
    image: Tensor,
    text: Tensor,
    *,
    alpha: float = ...,
    beta: float = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_arguments.RuledOptions],
) -> Tensor: ...


@overload
def hn_nce(
    image: Tensor,
    text: Tensor,
    *,
    alpha: float = ...,
    beta: float = ...,
    diagnostics: Literal[True],
    **options: Unpack[_arguments.RuledOptions],
) -> tuple[Tensor, tuple[Diagnostics, Diagnostics]]: ...


def hn_nce(
    image: Tensor,
    text: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.25,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, tuple[Diagnostics, Diagnostics]]:
    """Hard-negative NCE: CLIP's loss with more weight on negatives that are close, from one sweep.

    Equivalent to::

        def one_direction(logits):
            positive = logits.diagonal()
            logits = logits.masked_fill(torch.eye(N, dtype=torch.bool), -torch.inf)
            negative = (N - 1) * ((beta * logits).softmax(1) * logits.exp()).sum(1)
            return -(positive.exp() / (alpha * positive.exp() + negative)).log()

        logits = F.normalize(image) @ F.normalize(text).T / temperature
        ((one_direction(logits) + one_direction(logits.T)) / 2).mean()              # in log space: nothing overflows

    Args:
        image: (N, D) float32, bfloat16, float16 or float64.
        text: (N, D); row i belongs to row i of ``image``.
        alpha: share of the positive in the denominator, >= 0; 0 decouples it.
        beta: concentration of the negatives on those close to the row, >= 0. alpha = 1 and beta = 0 is `clip`.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead, for instance ``logit_scale.exp()``; not both.
        pairs: which images and texts are negatives of each other: ids of false negatives, bounds on the similarity, a
            guide, ... N - 1 above is then the number of a row's, or column's, negatives.
        weight: (N,) weight of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        diagnostics: also return `Diagnostics` of both directions from the same sweep.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``: the average of both directions (the paper adds them), in float32
        (float64 for float64 inputs); with ``diagnostics`` the pair (loss, (Diagnostics of images, Diagnostics of
        texts)). Never negative for alpha >= 1. A direction without negatives has loss 0, and a pair without any is left
        out of the mean, which is 0 where no pair has any.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``. The importance weights are differentiated.

    Source:
        Radenovic et al., Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training, 2023.

    Examples:
        >>> from contrastive_ops import clip
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> torch.allclose(hn_nce(image, text, alpha=1.0, beta=0.0), clip(image, text), rtol=1e-4)
        True
    """
    name = "hn_nce"
    alpha = checks.number(name, "alpha", alpha, "[0, inf)")
    beta = checks.number(name, "beta", beta, "[0, inf)")
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
    check_filters(name, pairs, None, text.shape[0], "image", image)
    unit = _arguments.in_sweep(normalize, image)
    sweep = Sweep((name, "image", "text"), scale, pairs, unit=unit, memory_budget=memory_budget, backend=backend)
    ranking = Ranking(image, text, text, pairs, both=True, unit=unit) if diagnostics else None
    negatives, counts = hardness_folds(name, scale, beta), () if pairs is None else ("count",)
    folds, end = (*negatives, *counts, *(ranking.folds if ranking else ())), len(negatives) + len(counts)
    target = torch.arange(image.shape[0], device=image.device)
    rows, cols, positive, *_ = sweep.fold(image, text, *folds, dim=(0, 1), target=target)
    losses, counted = positive.new_zeros(positive.shape), torch.zeros_like(positive, dtype=torch.bool)
    for found in (rows, cols):
        some = found[0] != -torch.inf
        log_count = log_number(positive, found[len(negatives)] if counts else image.shape[0] - 1)
        difference = weighted_negatives(found[: len(negatives)], log_count) - positive
        of_direction = math.log(alpha) + softplus(difference - math.log(alpha)) if alpha else difference
        losses, counted = losses + torch.where(some, of_direction, 0.0), counted | some
    loss = _arguments.mean_over(losses / 2, counted, weight, reduction)
    return (loss, ranking.read_both(rows[end:], cols[end:])) if ranking else loss
