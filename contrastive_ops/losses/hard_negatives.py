"""Losses of two views whose negatives are corrected: debiased, and with more weight on those that are close."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core import checks
from ..core.numerics import softplus
from ..core.rules import Pairs
from . import _arguments
from ._hardness import hardness_folds, log_number, weighted_negatives
from ._views import Views, stacked
from .diagnostics import Diagnostics, Ranking

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def debiased(
    z0: Tensor,
    z1: Tensor,
    *,
    tau_plus: float = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_arguments.RuledOptions],
) -> Tensor: ...


@overload
def debiased(
    z0: Tensor,
    z1: Tensor,
    *,
    tau_plus: float = ...,
    diagnostics: Literal[True],
    **options: Unpack[_arguments.RuledOptions],
) -> tuple[Tensor, Diagnostics]: ...


def debiased(
    z0: Tensor,
    z1: Tensor,
    *,
    tau_plus: float = 0.1,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Debiased contrastive loss: NT-Xent whose negatives are corrected for those that share the row's class.

    Equivalent to::

        z, K = F.normalize(torch.cat([z0, z1])), 2 * N - 2
        logits, sample = z @ z.T / temperature, torch.arange(2 * N) % N
        positive = logits.diagonal(N).repeat(2).exp()                               # of the two views of a sample
        negative = logits.exp().masked_fill(sample[:, None] == sample, 0.0).sum(1)
        negative = (negative - K * tau_plus * positive) / (1 - tau_plus)            # may be negative
        negative = negative.clamp_min(K * exp(-1 / temperature))                    # the least that K cosines can give
        -(positive / (positive + negative)).log().mean()                            # in log space: nothing overflows

    Args:
        z0: (N, D) float32, bfloat16, float16 or float64: the first view.
        z1: (N, D): the second view.
        tau_plus: probability that a sample drawn as a negative has the row's class, in [0, 1).
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.5.
        scale: 1 / temperature instead; not both.
        pairs: which of the other rows are negatives: ids of false negatives, bounds on the similarity, a guide, ...
            Vectors of rows have 2 N entries, those of z0 first: ``differ=(ids.repeat(2), ids.repeat(2))``. The other
            view is the positive whatever they say. K is the number of a row's negatives.
        weight: (N,) weight of each sample, or (2 N,) of each row; the mean divides by its sum over the rows that count.
            Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the bound above presumes; O(N D).
        diagnostics: also return `Diagnostics` (accuracy, ranks, mean similarities) from the same sweep.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (2 N,) for ``reduction="none"``: the rows of z0, then those of z1. float32 (float64 for float64
        inputs); with ``diagnostics`` the pair (loss, Diagnostics). Never negative. A row without
        negatives, such as those of a single sample, has loss 0 and is left out of the mean, which is 0 where no row has
        any. Where the bound holds, no gradient flows to the negatives.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``; self-similarity at half the work. The bound is differentiated by the
        temperature.

    Source:
        Chuang et al., Debiased Contrastive Learning, 2020, with one positive (M = 1).

    Examples:
        >>> z0 = torch.randn(8, 16)
        >>> z1 = z0 + 0.1 * torch.randn(8, 16)
        >>> bool(debiased(z0, z1, tau_plus=0.2) < debiased(z0, z1, tau_plus=0.0))
        True
    """
    views = stacked(
        "debiased",
        z0,
        z1,
        0.5,
        temperature=temperature,
        scale=scale,
        pairs=pairs,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        memory_budget=memory_budget,
        backend=backend,
    )
    return _corrected("debiased", views, 0.0, tau_plus, reduction, diagnostics)


@overload
def hcl(
    z0: Tensor,
    z1: Tensor,
    *,
    beta: float = ...,
    tau_plus: float = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_arguments.RuledOptions],
) -> Tensor: ...


@overload
def hcl(
    z0: Tensor,
    z1: Tensor,
    *,
    beta: float = ...,
    tau_plus: float = ...,
    diagnostics: Literal[True],
    **options: Unpack[_arguments.RuledOptions],
) -> tuple[Tensor, Diagnostics]: ...


def hcl(
    z0: Tensor,
    z1: Tensor,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Diagnostics]:
    """Contrastive loss with hard negative sampling: `debiased` with more weight on negatives that are close.

    Equivalent to::

        z, K = F.normalize(torch.cat([z0, z1])), 2 * N - 2
        logits, sample = z @ z.T / temperature, torch.arange(2 * N) % N
        positive = logits.diagonal(N).repeat(2).exp()                               # of the two views of a sample
        logits = logits.masked_fill(sample[:, None] == sample, -torch.inf)
        negative = K * ((beta * logits).softmax(1) * logits.exp()).sum(1)           # K times the weighted mean
        negative = (negative - K * tau_plus * positive) / (1 - tau_plus)            # may be negative
        negative = negative.clamp_min(K * exp(-1 / temperature))                    # the least that K cosines can give
        -(positive / (positive + negative)).log().mean()                            # in log space: nothing overflows

    Args:
        z0: (N, D) float32, bfloat16, float16 or float64: the first view.
        z1: (N, D): the second view.
        beta: concentration of the negatives on those close to the row, >= 0; 0 weighs all alike (`debiased`).
        tau_plus: probability that a sample drawn as a negative has the row's class, in [0, 1).
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.5.
        scale: 1 / temperature instead; not both.
        pairs: which of the other rows are negatives: ids of false negatives, bounds on the similarity, a guide, ...
            Vectors of rows have 2 N entries, those of z0 first: ``differ=(ids.repeat(2), ids.repeat(2))``. The other
            view is the positive whatever they say. K is the number of a row's negatives.
        weight: (N,) weight of each sample, or (2 N,) of each row; the mean divides by its sum over the rows that count.
            Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the bound above presumes; O(N D).
        diagnostics: also return `Diagnostics` (accuracy, ranks, mean similarities) from the same sweep.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (2 N,) for ``reduction="none"``: the rows of z0, then those of z1. float32 (float64 for float64
        inputs); with ``diagnostics`` the pair (loss, Diagnostics). Never negative. A row without
        negatives, such as those of a single sample, has loss 0 and is left out of the mean, which is 0 where no row has
        any. Where the bound holds, no gradient flows to the negatives.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``; self-similarity at half the work, two folds of one sweep. The
        importance weights are differentiated, as in the authors' code; so is the bound, by the temperature.

    Source:
        Robinson et al., Contrastive Learning with Hard Negative Samples, 2021.

    Examples:
        >>> z0, z1 = torch.randn(8, 16), torch.randn(8, 16)
        >>> bool(hcl(z0, z1, beta=2.0) > hcl(z0, z1, beta=0.0))
        True
    """
    views = stacked(
        "hcl",
        z0,
        z1,
        0.5,
        temperature=temperature,
        scale=scale,
        pairs=pairs,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        memory_budget=memory_budget,
        backend=backend,
    )
    return _corrected("hcl", views, beta, tau_plus, reduction, diagnostics)


# ---- Two views of N samples ----------------------------------------------------------------------------------------


def _corrected(function: str, views: Views, beta: float, tau_plus: float, reduction: str, diagnostics: bool) -> Any:
    """The loss of negatives weighted by `beta` and corrected for the share `tau_plus` of positives among them."""
    beta = checks.number(function, "beta", beta, "[0, inf)")
    tau_plus = checks.number(function, "tau_plus", tau_plus, "[0, 1)")
    z, sweep = views.z, views.sweep
    ranking = Ranking(z, z, z.detach()[views.partner], sweep.pairs, unit=sweep.unit) if diagnostics else None
    negatives = hardness_folds(function, sweep.scale, beta)
    counts = ("count",) if views.filtered else ()
    folds = (*negatives, *counts, *(ranking.folds if ranking else ()))
    found, _, positive, *_ = sweep.fold(z, None, *folds, target=views.partner)
    lse, more = found[: len(negatives)], found[len(negatives) :]
    log_count = log_number(positive, more[0] if counts else z.shape[0] - 2)
    mass = weighted_negatives(lse, log_count)
    if tau_plus:
        mass = _log_difference(mass, positive + log_count + math.log(tau_plus))
        mass = mass - math.log1p(-tau_plus)
    mass = torch.maximum(mass, log_count - checks.scale_tensor(function, sweep.scale, "z0", z))
    loss = _arguments.mean_over(softplus(mass - positive), lse[0] != -torch.inf, views.weight, reduction)
    return (loss, ranking.read(more[len(counts) :])) if ranking else loss


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) - exp(b)); -inf, with gradient 0, where that is not positive."""
    positive = ~(b >= a)  # NaN stays in
    gap = torch.where(positive, b - a, -1.0)
    # Both forms are exact on their side; the unused one stays finite.
    near = (-gap.clamp_min(-1.0).expm1()).log()
    far = (-gap.clamp_max(-0.5).exp()).log1p()
    return torch.where(positive, a + torch.where(gap > -0.7, near, far), -torch.inf)
