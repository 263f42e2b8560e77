"""Losses on the features of a batch: variance and decorrelation.

A Gram matrix and its dual, ``x.T @ x`` (D, D) and ``x @ x.T`` (N, N), have the same norm. The smaller of the two is
made, so that wide features of a small batch need no D x D matrix. What the dual tells of the squares off the diagonal
is a difference, and is made in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ..core import autocast, checks
from ..core.offsets import centred
from ..core.ordered import long_product, wide_dtype
from ..core.state import State
from ._features import feature_matrices, nothing

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
    (x,) = feature_matrices(name, x=x)
    if x.shape[0] == 1:
        return nothing(x)
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
    (x,) = feature_matrices("covariance_penalty", x=x)
    if x.shape[0] == 1:
        return nothing(x)
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
    x, y = feature_matrices("vicreg", x=x, y=y)
    if x.shape[0] == 1:
        return nothing(x, y)
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
    x, y = feature_matrices("barlow_twins", x=x, y=y)
    if x.shape[0] == 1:
        return nothing(x, y)
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
        (x,) = feature_matrices(name, x=x)
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


# ---- What they share -----------------------------------------------------------------------------------------------


def _hinge_of_spread(squares: Tensor, rows: int, std: float = 1.0, eps: float = 1e-4) -> Tensor:
    """`variance_hinge` of columns less their means, of which (D,) sums of squares are given."""
    variance = squares / squares.new_full((), rows - 1)
    return (std - (variance + eps).sqrt()).relu().mean()


def _penalty_of_covariances(of_pairs: Tensor, rows: int, columns: int) -> Tensor:
    """`covariance_penalty` from the sum of squared products of different columns less their means."""
    # (N - 1)^2 once instead of in every number.
    return of_pairs / ((of_pairs.new_full((), rows) - 1).square() * columns)


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
