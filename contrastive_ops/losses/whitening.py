"""Whitening: features without mean and correlation, by the statistics of a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.offsets import centred
from ..core.recompute import random_options


class _InverseRoot(torch.autograd.Function):
    """(..., C, C) symmetric matrices to the power -1/2.

    The gradient by eigenvectors is infinite where two eigenvalues are equal; that of the matrix function is not: its
    divided differences are those of s^(-1/2), which have a closed form. Also returns what backward needs.
    """

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # LAPACK fails on NaN, which the batch has, or which is the mean of no rows.
        broken = ~matrix.isfinite().all(-1).all(-1)[..., None, None]
        values, vectors = torch.linalg.eigh(matrix.masked_fill(broken, 0.0))
        roots = values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()
        vectors = vectors.masked_fill(broken, torch.nan)
        return (vectors / roots[..., None, :]) @ vectors.mT, roots, vectors

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, roots, vectors = output
        ctx.mark_non_differentiable(roots, vectors)
        ctx.save_for_backward(roots, vectors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_root: Tensor, *_: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        roots, vectors = ctx.saved_tensors
        inside = vectors.mT @ d_root @ vectors
        a, b = roots[..., :, None], roots[..., None, :]
        return vectors @ (-inside / (a * b * (a + b))) @ vectors.mT


def group_whiten(
    x: Tensor, groups: int = 1, *, eps: float = 1e-5, shuffle: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Whiten groups of features by the statistics of the batch: zero mean, and the identity as covariance (ZCA).

    Equivalent to::

        for columns in torch.randperm(D).chunk(groups) if shuffle else torch.arange(D).chunk(groups):
            values, vectors = torch.linalg.eigh(x[:, columns].T.cov(correction=0) + eps * torch.eye(D // groups))
            out[:, columns] = (x[:, columns] - x[:, columns].mean(0)) @ vectors @ values.rsqrt().diag() @ vectors.T

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        groups: of D / groups features each; it must divide D. WhitenedCSE takes 128 for D = 768.
        eps: added to variances; a number > 0.
        shuffle: whether features are dealt out to groups at random, which makes another view of each call.
        generator: of these random numbers, on the device of ``x``.

    Returns:
        (N, D) in the dtype of ``x``, computed in at least float32. Differentiable once.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D + D^2 / groups). A group with as many features as the batch has rows, or more, can only be whitened
        by eps.

    Source:
        Zhuo et al., WhitenedCSE: Whitening-based Contrastive Learning of Sentence Embeddings, 2023, which has no eps;
        Huang et al., Iterative Normalization: Beyond Standardization towards Efficient Whitening, 2019.

    Examples:
        >>> white = group_whiten(torch.randn(64, 8, dtype=torch.float64), groups=2, eps=1e-12)
        >>> bool(torch.allclose(white[:, :4].T.cov(correction=0), torch.eye(4, dtype=torch.float64)))
        True
    """
    name = "group_whiten"
    eps = checks.number(name, "eps", eps, "(0, inf)")
    checks.check_matrix(name, "x", x)
    N, D = x.shape
    groups = checks.integer(name, "groups", groups, 1)
    if D % groups:
        raise ValueError(f"{name}: groups must be an int that divides {D} features, got {checks.shown(groups)}")
    with autocast.disabled(x):
        order = torch.randperm(D, device=x.device, **random_options(name, generator)) if shuffle else None
        dealt = x if order is None else x[:, order]
        grouped = dealt.to(checks.accumulator(x.dtype)).view(N, groups, D // groups).transpose(0, 1)
        deviations = centred(grouped, 1)
        identity = torch.eye(D // groups, dtype=deviations.dtype, device=x.device)
        root, _, _ = _InverseRoot.apply(deviations.mT @ deviations / N + eps * identity)
        white = (deviations @ root).transpose(0, 1).reshape(N, D)
        return (white if order is None else white[:, order.argsort()]).to(x.dtype)
