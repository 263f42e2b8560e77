"""Spectral contrastive loss: squares of the negatives' inner products, which Gram matrices sum."""

from __future__ import annotations

from torch import Tensor

from ..core import autocast
from . import _arguments
from ._columns import partner_similarity, wide


def spectral_contrastive(x: Tensor, y: Tensor, *, normalize: bool = False) -> Tensor:
    """Spectral contrastive loss: the factorisation of the graph of augmentations by inner products.

    Equivalent to::

        s = x @ y.T
        -2 * s.diagonal().mean() + s.square().fill_diagonal_(0).sum() / (N * (N - 1))

    Args:
        x: (N, D) float32, bfloat16, float16 or float64: the first view.
        y: (N, D): the second view; row i belongs to row i of ``x``.
        normalize: scale all rows to length 1 first. False, as lengths are part of the factorisation; the paper bounds
            them by sqrt(mu).

    Returns:
        0-d, in float32 (float64 for float64 inputs). May be negative. A single pair has no negatives, and no rows give
        NaN.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D + D^2) and 4 N D^2 operations forward: the sum over all pairs is that of the products of two D x D
        Gram matrices.

    Source:
        HaoChen et al., Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss, 2021.

    Examples:
        >>> x = torch.eye(4)
        >>> float(spectral_contrastive(x, x))
        -2.0
    """
    x, y, _ = _arguments.two_sides(
        "spectral_contrastive",
        (("x", x), ("y", y)),
        temperature=None,
        scale=None,
        default_temperature=1.0,
        reduction="mean",
        partners=True,
    )
    with autocast.disabled(x):
        x, y = wide(x, normalize), wide(y, normalize)
        own, rows = partner_similarity(x, y), x.new_full((), x.shape[0])
        others = ((x.T @ x) * (y.T @ y)).sum() - own.square().sum()
        return -2 * own.sum() / rows + others / (rows * (rows - 1)).clamp_min(1.0)
