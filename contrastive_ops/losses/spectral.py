"""Spectral contrastive loss: squares of the negatives' inner products, which Gram matrices sum; other f-divergences."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import softplus
from ..core.ordered import ordered_logsumexp, ordered_sum
from . import _arguments
from ._columns import partner_similarity, wide
from ._sweep import Sweep

DIVERGENCES = ("chi2", "kl", "js")


def spectral_contrastive(x: Tensor, y: Tensor, *, divergence: str = "chi2", normalize: bool = False) -> Tensor:
    """Spectral contrastive loss: the factorisation of the graph of augmentations by inner products.

    It is one of a family: a bound on an f-divergence of the pairs from independent views.

    Equivalent to::

        s = x @ y.T
        own, others = s.diagonal(), s[~torch.eye(N, dtype=torch.bool)]
        -2 * own.mean() + others.square().mean()                        # "chi2"
        -own.mean() + others.exp().mean().log()                         # "kl"
        F.softplus(-own).mean() + F.softplus(others).mean()             # "js"

    Args:
        x: (N, D) float32, bfloat16, float16 or float64: the first view.
        y: (N, D): the second view; row i belongs to row i of ``x``.
        divergence: chi squared, which is the spectral loss; Kullback-Leibler, by Donsker and Varadhan; Jensen-Shannon.
        normalize: scale all rows to length 1 first. False, as lengths are part of the factorisation; the paper bounds
            them by sqrt(mu).

    Returns:
        0-d, in float32 (float64 for float64 inputs). May be negative. A single pair has no negatives, and no rows give
        NaN.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D + D^2) and 4 N D^2 operations forward: the sum over all pairs is that of the products of two D x D
        Gram matrices. The other divergences take one sweep, 2 N^2 D forward, and no matrix of pairs either.

    Source:
        HaoChen et al., Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss, 2021.
        Contrasts by other divergences: Nowozin et al., f-GAN, 2016.

    Examples:
        >>> x = torch.eye(4)
        >>> float(spectral_contrastive(x, x))
        -2.0
    """
    name = "spectral_contrastive"
    checks.check_choice(name, "divergence", divergence, DIVERGENCES)
    x, y, _ = _arguments.two_sides(
        name,
        (("x", x), ("y", y)),
        temperature=None,
        scale=None,
        default_temperature=1.0,
        reduction="mean",
        partners=True,
    )
    if divergence != "chi2":
        sweep = Sweep((name, "x", "y"), 1.0, unit=_arguments.in_sweep(normalize, x))
        x, y = _arguments.unit_sides(normalize, x, y)
        return _of_folds(sweep, x, y, divergence)
    with autocast.disabled(x):
        x, y = wide(x, normalize), wide(y, normalize)
        own, rows = partner_similarity(x, y), x.new_full((), x.shape[0])
        others = ((x.T @ x) * (y.T @ y)).sum() - own.square().sum()
        return -2 * own.sum() / rows + others / (rows * (rows - 1)).clamp_min(1.0)


def _of_folds(sweep: Sweep, x: Tensor, y: Tensor, divergence: str) -> Tensor:
    kind = "logsumexp" if divergence == "kl" else "sum_softplus"
    found = sweep.fold(x, y, kind, target=torch.arange(x.shape[0], device=x.device))
    (of_rows,), own = found.rows, found.target
    rows = own.new_full((), own.shape[0])
    pairs = rows * (rows - 1)
    if divergence == "js":
        return ordered_sum(softplus(-own)) / rows + ordered_sum(of_rows) / pairs.clamp_min(1.0)
    others = ordered_logsumexp(of_rows) - pairs.clamp_min(1.0).log()
    return torch.where(pairs > 0, others, 0.0) - ordered_sum(own) / rows
