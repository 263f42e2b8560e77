"""Decoupled contrastive learning: the positive is left out of the denominator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from ..core import checks
from ..core.folds import Fold
from ..core.rules import Pairs
from . import _arguments
from ._columns import partner_similarity
from ._views import stacked
from .diagnostics import Diagnostics, Ranking

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def dcl(
    z0: Tensor,
    z1: Tensor,
    *,
    sigma: float | None = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_arguments.BiasedOptions],
) -> Tensor: ...


@overload
def dcl(
    z0: Tensor,
    z1: Tensor,
    *,
    sigma: float | None = ...,
    diagnostics: Literal[True],
    **options: Unpack[_arguments.BiasedOptions],
) -> tuple[Tensor, Diagnostics]: ...


def dcl(
    z0: Tensor,
    z1: Tensor,
    *,
    sigma: float | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Decoupled contrastive learning: NT-Xent without the positive in the denominator.

    Equivalent to::

        z = F.normalize(torch.cat([z0, z1]))                                        # (2 N, D)
        logits, sample = z @ z.T / temperature, torch.arange(2 * N) % N
        positive = logits.diagonal(N).repeat(2)                                     # of the two views of a sample
        lse = logits.masked_fill(sample[:, None] == sample, -torch.inf).logsumexp(1)
        (lse - positive).mean()
        # with sigma (DCLW): samples whose views are alike already count less
        w = 2 - N * (temperature * logits.diagonal(N) / sigma).softmax(0).repeat(2).detach()
        (lse - w * positive).mean()

    Args:
        z0: (N, D) float32, bfloat16, float16 or float64: the first view.
        z1: (N, D): the second view.
        sigma: weigh the positives with negative von Mises-Fisher weights of this width (DCLW; the paper's value is
            0.5). The weights are not differentiated. None: no weights.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.1.
        scale: 1 / temperature instead; not both.
        pairs: which of the other rows are negatives: ids of false negatives, bounds on the similarity, a guide, ...
            Vectors of rows have 2 N entries, those of z0 first: ``differ=(ids.repeat(2), ids.repeat(2))``. The other
            view is the positive whatever they say.
        col_bias: (2 N,), added to the logits of each row as a column, positives included; differentiable.
        weight: (N,) weight of each sample, or (2 N,) of each row; the mean divides by its sum over the rows that count.
            Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the paper does; O(N D).
        diagnostics: also return `Diagnostics` (accuracy, ranks, mean similarities) from the same sweep.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (2 N,) for ``reduction="none"``: the rows of z0, then those of z1. float32 (float64 for float64
        inputs); with ``diagnostics`` the pair (loss, Diagnostics). May be negative. A row without
        negatives, such as those of a single sample, has loss 0 and is left out of the mean, which is 0 where no row has
        any.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``; self-similarity at half the work.

    Source:
        Yeh et al., Decoupled Contrastive Learning, 2022, equation 6.

    Examples:
        >>> z0, z1 = torch.randn(8, 16), torch.randn(8, 16)
        >>> float(dcl(z0, z1)) < float(dcl(z0, -z0))
        True
    """
    views = stacked(
        "dcl",
        z0,
        z1,
        0.1,
        temperature=temperature,
        scale=scale,
        pairs=pairs,
        col_bias=col_bias,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        memory_budget=memory_budget,
        backend=backend,
    )
    z, unit = views.z, views.sweep.unit
    ranking = None
    if diagnostics:
        biased = col_bias is not None
        ranking = Ranking(z, z, z.detach()[views.partner], views.sweep.pairs, unit=unit, biased=biased)
    folds: tuple[str | Fold, ...] = ("logsumexp", *(ranking.folds if ranking else ()))
    (others, *more), _, positive, *_ = views.sweep.fold(z, None, *folds, target=views.partner)
    if sigma is not None:
        positive = positive * _von_mises_fisher("dcl", z, sigma, unit)
    loss = _arguments.mean_over(others - positive, others != -torch.inf, views.weight, reduction)
    return (loss, ranking.read(more)) if ranking else loss


def _von_mises_fisher(function: str, z: Tensor, sigma: float, unit: bool) -> Tensor:
    """(2 N,) weights with mean 1, smaller for samples whose views are alike."""
    sigma = checks.number(function, "sigma", sigma, "(0, inf)")
    count = z.shape[0] // 2
    with torch.no_grad():
        similarity = partner_similarity(z[:count], z[count:], unit)
        return (2 - count * (similarity / sigma).softmax(0)).repeat(2)
