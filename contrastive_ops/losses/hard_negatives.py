"""Softmax losses that count negatives differently: decoupled, debiased, hard-negative weighted.

Each is made of the logsumexp of the negatives, at one scale or at two: with importance weights exp(beta l), the
weighted mean of exp(l) is a ratio of sums whose logarithm is lse((1 + beta) l) - lse(beta l), both from one sweep.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.folds import Fold
from ..core.numerics import softplus
from ..core.rules import Pairs
from ..ops.similarity_reduce import fold
from . import _arguments
from ._columns import partner_similarity


def dcl(
    z0: Tensor,
    z1: Tensor,
    *,
    sigma: float | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
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
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the paper does; O(N D).
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (2 N,) for ``reduction="none"``: the rows of z0, then those of z1. float32 (float64 for float64
        inputs). May be negative. A single sample has no negatives and loss 0, and so has a mean over no rows.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``; self-similarity at half the work.

    Source:
        Yeh et al., Decoupled Contrastive Learning, 2022, equation 6.

    Example:
        >>> z0, z1 = torch.randn(8, 16), torch.randn(8, 16)
        >>> float(dcl(z0, z1)) < float(dcl(z0, -z0))
        True
    """
    name = "dcl"
    common = {"temperature": temperature, "scale": scale, "reduction": reduction, "normalize": normalize}
    z, scale, partner, negatives = _two_views(name, z0, z1, 0.1, **common)
    unit = _arguments.in_sweep(normalize, z)
    (others,), _, positive, *_ = fold(
        z,
        scale=scale,
        target=partner,
        pairs=negatives,
        unit=unit,
        memory_budget=memory_budget,
        names=(name, "z0", "z1"),
        backend=backend,
    )
    if sigma is not None:
        positive = positive * _von_mises_fisher(name, z, sigma, unit)
    return _arguments.mean_over(others - positive, others != -torch.inf, None, reduction)


def debiased(
    z0: Tensor,
    z1: Tensor,
    *,
    tau_plus: float = 0.1,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
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
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the bound above presumes; O(N D).
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (2 N,) for ``reduction="none"``: the rows of z0, then those of z1. float32 (float64 for float64
        inputs). Never negative. A single sample has no negatives and loss 0, and so has a mean over no rows. Where
        the bound holds, no gradient flows to the negatives.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``; self-similarity at half the work. The bound is differentiated by the
        temperature.

    Source:
        Chuang et al., Debiased Contrastive Learning, 2020, with one positive (M = 1).

    Example:
        >>> z0 = torch.randn(8, 16)
        >>> z1 = z0 + 0.1 * torch.randn(8, 16)
        >>> bool(debiased(z0, z1, tau_plus=0.2) < debiased(z0, z1, tau_plus=0.0))
        True
    """
    common = {"temperature": temperature, "scale": scale, "reduction": reduction, "normalize": normalize}
    return _two_view_loss("debiased", (z0, z1), 0.0, tau_plus, memory_budget, backend, **common)


def hcl(
    z0: Tensor,
    z1: Tensor,
    *,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
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
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first, as the bound above presumes; O(N D).
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (2 N,) for ``reduction="none"``: the rows of z0, then those of z1. float32 (float64 for float64
        inputs). Never negative. A single sample has no negatives and loss 0, and so has a mean over no rows. Where
        the bound holds, no gradient flows to the negatives.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``; self-similarity at half the work, two folds of one sweep. The
        importance weights are differentiated, as in the authors' code; so is the bound, by the temperature.

    Source:
        Robinson et al., Contrastive Learning with Hard Negative Samples, 2021.

    Example:
        >>> z0, z1 = torch.randn(8, 16), torch.randn(8, 16)
        >>> bool(hcl(z0, z1, beta=2.0) > hcl(z0, z1, beta=0.0))
        True
    """
    common = {"temperature": temperature, "scale": scale, "reduction": reduction, "normalize": normalize}
    return _two_view_loss("hcl", (z0, z1), beta, tau_plus, memory_budget, backend, **common)


def hn_nce(
    image: Tensor,
    text: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.25,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
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
        weight: (N,) weight of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``: the average of both directions (the paper adds them), in float32
        (float64 for float64 inputs). Never negative for alpha >= 1. A single pair has no negatives and loss 0, and so
        has a mean over no pairs.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D) beside ``memory_budget``. The importance weights are differentiated.

    Source:
        Radenovic et al., Filtering, Distillation, and Hard Negatives for Vision-Language Pre-Training, 2023.

    Example:
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
    rows, cols, positive, *_ = fold(
        image,
        text,
        reduce=_folds(name, scale, beta),
        dim=(0, 1),
        scale=scale,
        target=torch.arange(image.shape[0], device=image.device),
        unit=_arguments.in_sweep(normalize, image),
        memory_budget=memory_budget,
        names=(name, "image", "text"),
        backend=backend,
    )
    losses = positive.new_zeros(positive.shape)
    for lse in (rows, cols):
        difference = _weighted_negatives(lse, image.shape[0] - 1) - positive
        losses = losses + (math.log(alpha) + softplus(difference - math.log(alpha)) if alpha else difference)
    return _arguments.mean_over(losses / 2, rows[0] != -torch.inf, weight, reduction)


# ---- Two views of N samples ----------------------------------------------------------------------------------------


def _two_views(
    function: str, z0: Tensor, z1: Tensor, default_temperature: float, **common: Any
) -> tuple[Tensor, float | Tensor, Tensor, Pairs]:
    """All rows, the scale, the row of each one's other view, and the pairs of different samples."""
    sides = ("z0", z0), ("z1", z1)
    z0, z1, scale = _arguments.two_sides(
        function, sides, default_temperature=default_temperature, partners=True, **common
    )
    count = z0.shape[0]
    sample = torch.arange(count, device=z0.device).repeat(2)
    partner = torch.arange(2 * count, device=z0.device).roll(count)
    return torch.cat([z0, z1]), scale, partner, Pairs(differ=(sample, sample))


def _two_view_loss(
    function: str,
    views: tuple[Tensor, Tensor],
    beta: float,
    tau_plus: float,
    memory_budget: int | None,
    backend: str,
    **common: Any,
) -> Tensor:
    beta = checks.number(function, "beta", beta, "[0, inf)")
    tau_plus = checks.number(function, "tau_plus", tau_plus, "[0, 1)")
    z, scale, partner, negatives = _two_views(function, *views, 0.5, **common)
    lse, _, positive, *_ = fold(
        z,
        reduce=_folds(function, scale, beta),
        scale=scale,
        target=partner,
        unit=_arguments.in_sweep(common["normalize"], z),
        pairs=negatives,
        memory_budget=memory_budget,
        names=(function, "z0", "z1"),
        backend=backend,
    )
    count = z.shape[0] - 2
    mass = _weighted_negatives(lse, count)
    if tau_plus:
        mass = _log_difference(mass, positive + _log_count(positive, count) + math.log(tau_plus))
        mass = mass - math.log1p(-tau_plus)
    least = _log_count(positive, count) - checks.scale_tensor(function, scale, "z0", z)
    mass = torch.maximum(mass, least)
    return _arguments.mean_over(softplus(mass - positive), lse[0] != -torch.inf, None, common["reduction"])


def _von_mises_fisher(function: str, z: Tensor, sigma: float, unit: bool) -> Tensor:
    """(2 N,) weights with mean 1, smaller for samples whose views are alike."""
    sigma = checks.number(function, "sigma", sigma, "(0, inf)")
    count = z.shape[0] // 2
    with torch.no_grad():
        similarity = partner_similarity(z[:count], z[count:], unit)
        return (2 - count * (similarity / sigma).softmax(0)).repeat(2)


# ---- Weighted negatives --------------------------------------------------------------------------------------------


def _folds(function: str, scale: float | Tensor, beta: float) -> tuple[str | Fold, ...]:
    """What `_weighted_negatives` needs of the sweep."""
    if isinstance(scale, Tensor):
        checks.check_floating(function, "scale", scale)
    if not beta:
        return ("logsumexp",)
    return Fold("logsumexp", scale=(1 + beta) * scale), Fold("logsumexp", scale=beta * scale)


def _weighted_negatives(lse: tuple[Tensor, ...], count: int) -> Tensor:
    """The logarithm of `count` times the weighted mean of exp(l); 0 where there are no negatives."""
    empty = lse[0] == -torch.inf  # a difference of infinities would be NaN, in the gradient too
    high, *low = (each.masked_fill(empty, 0.0) for each in lse)
    return high + _log_count(high, count) - low[0] if low else high


def _log_count(like: Tensor, count: int) -> Tensor:
    return like.new_full((), count).clamp_min(1.0).log()


def _log_difference(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) - exp(b)); -inf, with gradient 0, where that is not positive."""
    positive = ~(b >= a)  # NaN stays in
    gap = torch.where(positive, b - a, -1.0)
    # Both forms are exact on their side; the unused one stays finite.
    near = (-gap.clamp_min(-1.0).expm1()).log()
    far = (-gap.clamp_max(-0.5).exp()).log1p()
    return torch.where(positive, a + torch.where(gap > -0.7, near, far), -torch.inf)
