"""What the eigenvalues of a batch's features say: the logarithm of their determinant, and how many there are in use.

A Gram matrix and its dual, ``x.T @ x`` (D, D) and ``x @ x.T`` (N, N), have the same eigenvalues apart from zeros. The
smaller of the two is made, so that wide features of a small batch need no D x D matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.ordered import in_float64
from ._features import feature_matrices, nothing


def log_det(x: Tensor, *, eps: float = 1e-6, covariance: bool = False) -> Tensor:
    """Logarithm of the determinant of the features' covariance: the volume that they fill, to be maximised.

    Equivalent to::

        torch.logdet(x.T.cov(correction=0) + eps * torch.eye(D))

    Args:
        x: (N, D) float32, bfloat16, float16 or float64; or (D, D), a covariance such as `RunningCovariance` returns.
        eps: added to the diagonal; a number > 0. CorInfoMax takes 1e-6.
        covariance: whether ``x`` is a covariance already.

    Returns:
        0-d, in float32 (float64 for float64 inputs); factorised in float64 whatever the input is. NaN for no rows, and
        for a covariance that is not positive definite.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D + min(N, D)^2): with fewer rows than features, det(C + eps 1) = eps^(D - N) det(K + eps 1), where K
        is the N x N dual.

    Source:
        Ozsoy et al., Self-Supervised Learning with an Information Maximization Criterion, 2022; Yu et al., Learning
        Diverse and Discriminative Representations via the Principle of Maximal Coding Rate Reduction, 2020.

    Examples:
        >>> x = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]])
        >>> round(float(log_det(x)), 4) + 0.0                                 # its covariance is the identity
        0.0
    """
    name = "log_det"
    eps = checks.number(name, "eps", eps, "(0, inf)")
    dtype = checks.accumulator(x.dtype) if isinstance(x, Tensor) else torch.float32
    (x,) = feature_matrices(name, x=x)
    wide = in_float64(x)
    missing = 0
    if covariance:
        if x.shape[0] != x.shape[1]:
            raise ValueError(f"{name}: x must have shape (D, D) with covariance=True, got {checks.shape(x)}")
        gram = wide
    else:
        wide = wide - wide.mean(0)
        missing = max(x.shape[1] - x.shape[0], 0)
        gram = _smaller_gram(wide) / x.shape[0]
    factor, failed = torch.linalg.cholesky_ex(gram + eps * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    total = 2 * factor.diagonal().log().sum() + missing * math.log(eps)
    empty = not covariance and x.shape[0] == 0
    return torch.where((failed == 0) & (not empty), total, torch.nan).to(device=x.device, dtype=dtype)


def effective_rank(x: Tensor, *, centre: bool = False) -> Tensor:
    """How many directions the rows use: the exponential of the entropy of the Gram matrix's eigenvalues.

    Equivalent to::

        p = torch.linalg.eigvalsh(x.T @ x)
        p = p / p.sum()
        torch.special.entr(p).sum().exp()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        centre: subtract the mean row first, for the spectrum of the covariance.

    Returns:
        0-d, in float32 (float64 for float64 inputs), between 1 and min(N, D); computed in float64. Its logarithm is the
        regulariser of rank reduction. One row has rank 1 with gradient 0; NaN where all numbers are 0.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D + min(N, D)^2), work O(min(N, D)^3). Directions that are not used have no gradient.

    Source:
        Roy and Vetterli, The Effective Rank: A Measure of Effective Dimensionality, 2007 (of singular values; here the
        eigenvalues of the Gram matrix, which make it the exponential of the von Neumann entropy).

    Examples:
        >>> round(float(effective_rank(torch.eye(5))), 4), round(float(effective_rank(torch.ones(5, 3))), 4)
        (5.0, 1.0)
    """
    name = "effective_rank"
    dtype = checks.accumulator(x.dtype) if isinstance(x, Tensor) else torch.float32
    (x,) = feature_matrices(name, x=x)
    if x.shape[0] == 1:
        return (nothing(x) + 1).to(dtype)
    wide = in_float64(x)
    if centre:
        wide = wide - wide.mean(0)
    gram = _smaller_gram(wide)
    # LAPACK fails on NaN; the product carries it to the result.
    broken = ~gram.isfinite().all()
    share = torch.linalg.eigvalsh(gram.masked_fill(broken, 0.0)) + torch.where(broken, torch.nan, 0.0)
    share = share / share.sum()
    # Rounding makes small ones negative; the logarithm's slope at 0 is infinite.
    used = share > torch.finfo(torch.float64).eps
    share = torch.where(used, share, 1.0)
    entropy = -(torch.where(used, share, 0.0) * share.log()).sum()
    return torch.where(used.any(), entropy.exp(), torch.nan).to(device=x.device, dtype=dtype)


def _smaller_gram(x: Tensor) -> Tensor:
    with autocast.disabled(x):
        return x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
