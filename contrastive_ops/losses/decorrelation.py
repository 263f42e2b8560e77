"""Losses on the features of a batch: variance, decorrelation, log-determinant and rank of D x D Gram matrices.

A Gram matrix and its dual, ``x.T @ x`` (D, D) and ``x @ x.T`` (N, N), have the same norm and the same eigenvalues apart
from zeros. The smaller of the two is made, so that wide features of a small batch need no D x D matrix. What the dual
tells of the squares off the diagonal is a difference, and is made in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..core import autocast, checks
from ..core.offsets import centred
from ..core.ordered import in_float64, long_product, wide_dtype
from ..core.state import State
from . import _arguments

# Added to variances where batch normalisation does it, as torch.nn.BatchNorm1d.
_BATCH_NORM_EPSILON = 1e-5


def variance_hinge(x: Tensor, *, std: float = 1.0, eps: float = 1e-4) -> Tensor:
    """VICReg's variance term: a hinge on the standard deviation of each feature.

    Equivalent to::

        F.relu(std - (x.var(0) + eps).sqrt()).mean()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        std: the least standard deviation that costs nothing.
        eps: keeps the root's slope finite.

    Returns:
        0-d, in float32 (float64 for float64 inputs). 0 with gradient 0 for one row, such as that of a last batch, which
        has no statistics; NaN for no rows.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Bardes et al., VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, 2022.

    Examples:
        >>> variance_hinge(torch.zeros(4, 3))
        tensor(0.9900)
    """
    name = "variance_hinge"
    eps = checks.number(name, "eps", eps, "(0, inf)")
    (x,) = _features(name, x=x)
    if x.shape[0] == 1:
        return _nothing(x)
    return _hinge_of_spread(centred(x).square().sum(0), x.shape[0], std, eps)


def covariance_penalty(x: Tensor) -> Tensor:
    """VICReg's covariance term: squared covariances of different features.

    Equivalent to::

        covariance = x.T.cov()
        covariance.fill_diagonal_(0).square().sum() / D

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.

    Returns:
        0-d, in float32 (float64 for float64 inputs). 0 with gradient 0 for one row, such as that of a last batch, which
        has no statistics; NaN for no rows.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D + min(N, D)^2); work O(N D min(N, D)).

    Source:
        Bardes et al., VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, 2022.

    Examples:
        >>> covariance_penalty(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        tensor(4.)
    """
    (x,) = _features("covariance_penalty", x=x)
    if x.shape[0] == 1:
        return _nothing(x)
    deviations = centred(x)
    return _penalty_of_covariances(_off_diagonal(deviations, deviations)[0], *x.shape)


def vicreg(
    x: Tensor,
    y: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:
    """VICReg: partners are equal, features vary, and no two features say the same.

    Equivalent to::

        invariance * F.mse_loss(x, y)
        + variance * (variance_hinge(x) + variance_hinge(y)) / 2
        + covariance * (covariance_penalty(x) + covariance_penalty(y))

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (N, D); row i is another view of row i of ``x``.
        invariance: weight of the distance of partners.
        variance: weight of `variance_hinge`.
        covariance: weight of `covariance_penalty`.

    Returns:
        0-d, in float32 (float64 for float64 inputs). 0 with gradient 0 for one row, such as that of a last batch, which
        has no statistics; NaN for no rows.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D + min(N, D)^2).

    Source:
        Bardes et al., VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning, 2022.

    Examples:
        >>> vicreg(torch.randn(8, 4), torch.randn(8, 4)).shape
        torch.Size([])
    """
    x, y = _features("vicreg", x=x, y=y)
    if x.shape[0] == 1:
        return _nothing(x, y)
    (shared_x, squares_x), (shared_y, squares_y) = (_off_diagonal(each, each) for each in (centred(x), centred(y)))
    spread = _hinge_of_spread(squares_x, x.shape[0]) + _hinge_of_spread(squares_y, x.shape[0])
    shared = _penalty_of_covariances(shared_x + shared_y, *x.shape)
    return invariance * mse_loss(x, y) + variance * spread / 2 + covariance * shared


def barlow_twins(x: Tensor, y: Tensor, *, off_diagonal: float = 0.0051) -> Tensor:
    """Barlow Twins: the cross-correlation of two views' features is the identity.

    Equivalent to::

        correlation = F.batch_norm(x, None, None, training=True).T @ F.batch_norm(y, None, None, training=True) / N
        different = correlation.square().fill_diagonal_(0).sum()
        (correlation.diag() - 1).square().sum() + off_diagonal * different

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (N, D); row i is another view of row i of ``x``.
        off_diagonal: weight of the correlations of different features.

    Returns:
        0-d, in float32 (float64 for float64 inputs). 0 with gradient 0 for one row, such as that of a last batch, which
        has no statistics; NaN for no rows.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D + min(N, D)^2); work O(N D min(N, D)).

    Source:
        Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, 2021.

    Examples:
        >>> x = torch.tensor([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, 1.0]])
        >>> bool(barlow_twins(x, x) < 1e-8)                                   # two features without correlation
        True
    """
    x, y = _features("barlow_twins", x=x, y=y)
    if x.shape[0] == 1:
        return _nothing(x, y)
    (x, x_lacks), (y, y_lacks) = _standardised(x), _standardised(y)
    rows = x.new_full((), x.shape[0])
    # 1 - <x, y> / N from differences: near the end of a training it is small.
    short = (x - y).square().sum(0) / rows + x_lacks + y_lacks
    return short.square().sum() / 4 + off_diagonal * _off_diagonal(x, y)[0] / rows.square()


class RunningCovariance(State):
    """Mean and covariance of features over the steps of a training: ``covariance = running(x)``.

    Equivalent to::

        mean = momentum * x.mean(0) + (1 - momentum) * mean
        covariance = momentum * (x - mean).T @ (x - mean) / N + (1 - momentum) * covariance

    The result is differentiable by the batch; what is kept for the next step is detached. In evaluation nothing is
    kept. It starts with mean 0 and the identity, in float64, whose digits a long average needs and which it keeps
    whatever the module is cast to. Under DistributedDataParallel each process has its own. A batch that makes any of
    its numbers infinite or NaN is not kept, and shows in the result for that batch alone.

    Args:
        dim: D.
        momentum: weight of a batch, in (0, 1]; the past has 1 - momentum. The released code of CorInfoMax gives 0.01 to
            the past, and the identity that it starts from is gone after a step or two.

    Source:
        Ozsoy et al., Self-Supervised Learning with an Information Maximization Criterion, 2022 (CorInfoMax).
    """

    digits = own = ("mean", "covariance")
    mean: Tensor
    covariance: Tensor

    def __init__(self, dim: int, momentum: float = 0.99, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.momentum = checks.number("RunningCovariance", "momentum", momentum, "(0, 1]")
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.covariance = torch.eye(dim, dtype=torch.float64, device=device)

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all batches."""
        self.mean.zero_()
        self.covariance.zero_().fill_diagonal_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return (D, D) of the past and the batch (N, D), in float64."""
        name = "RunningCovariance"
        (x,) = _features(name, x=x)
        if x.shape[1] != len(self.mean):
            raise ValueError(f"{name}: x must have shape (N, {len(self.mean)}), got {checks.shape(x)}")
        x, old = x.to(self.mean.dtype), 1 - self.momentum
        mean = self.momentum * x.mean(0) + old * self.mean
        deviations = x - mean
        with autocast.disabled(x):
            covariance = self.momentum * (deviations.T @ deviations) / len(x) + old * self.covariance
        if self.training:
            with torch.no_grad():
                finite = mean.isfinite().all() & covariance.isfinite().all()
                for kept, new in ((self.mean, mean), (self.covariance, covariance)):
                    kept.copy_(torch.where(finite, new, kept))
        return covariance


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
    (x,) = _features(name, x=x)
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
    (x,) = _features(name, x=x)
    if x.shape[0] == 1:
        return (_nothing(x) + 1).to(dtype)
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


# ---- What they share -----------------------------------------------------------------------------------------------


def _features(function: str, **matrices: Tensor) -> list[Tensor]:
    """Check matrices, the second of which is partner of the first; return them in the accumulation dtype."""
    (x_name, x), *others = matrices.items()
    checks.check_matrix(function, x_name, x)
    for name, each in others:
        checks.check_matrices(function, x_name, x, name, each)
        _arguments.check_partners(function, x_name, x, name, each)
    with autocast.disabled(x):
        return [each.to(checks.accumulator(each.dtype)) for each in matrices.values()]


def _hinge_of_spread(squares: Tensor, rows: int, std: float = 1.0, eps: float = 1e-4) -> Tensor:
    """`variance_hinge` of columns less their means, of which (D,) sums of squares are given."""
    variance = squares / squares.new_full((), rows - 1)
    return (std - (variance + eps).sqrt()).relu().mean()


def _penalty_of_covariances(of_pairs: Tensor, rows: int, columns: int) -> Tensor:
    """`covariance_penalty` from the sum of squared products of different columns less their means."""
    # (N - 1)^2 once instead of in every number.
    return of_pairs / ((of_pairs.new_full((), rows) - 1).square() * columns)


def _nothing(*matrices: Tensor) -> Tensor:
    """0 with gradient 0, whatever the matrices hold."""
    return torch.stack([each[:0].sum() for each in matrices]).sum()


def _smaller_gram(x: Tensor) -> Tensor:
    with autocast.disabled(x):
        return x @ x.T if x.shape[0] < x.shape[1] else x.T @ x


def _off_diagonal(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the squares of x.T @ y off its diagonal, and (D,) the diagonal.

    Directly, or, for many more features than rows, as the square of everything less that of the diagonal. A few large
    features make that a small difference of large numbers, for which float64 has the digits.
    """
    with autocast.disabled(x):
        if 2 * x.shape[0] >= x.shape[1] or wide_dtype(x) != torch.float64:
            products = long_product(x.T, y)
            own = products.diagonal()
            return (products - torch.diag(own)).square().sum(), own
        wide_x = x.double()
        wide_y = wide_x if x is y else y.double()
        of_x = wide_x @ wide_x.T
        everything = of_x.square().sum() if x is y else (of_x * (wide_y @ wide_y.T)).sum()
        diagonal = (wide_x * wide_y).sum(0)
        return (everything - diagonal.square().sum()).to(x.dtype), diagonal.to(x.dtype)


def _standardised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Batch normalisation without parameters, and (D,) what the mean squares of its features lack of 1."""
    deviations = centred(x)
    # Not x.var(0), whose gradient has deviations from a mean that is rounded.
    variance = deviations.square().mean(0) + _BATCH_NORM_EPSILON
    return deviations * variance.rsqrt(), _BATCH_NORM_EPSILON / variance
