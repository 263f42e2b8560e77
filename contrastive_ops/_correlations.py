"""How two sets of numbers agree: rank correlation, area under a curve, alignment of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import autocast, checks
from .core.ordered import in_float64


@torch.no_grad()
def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman's rank correlation: Pearson's of the ranks, where equal numbers share the mean of theirs.

    Equivalent to::

        scipy.stats.spearmanr(x, y).statistic

    Args:
        x: (..., N) numbers of any real dtype, such as cosines of pairs.
        y: (..., N), such as the grades that people gave to them.

    Returns:
        (...) float64, in [-1, 1]. NaN where all numbers of one side are equal, or one is NaN, and for fewer than two.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Spearman, The Proof and Measurement of Association between Two Things, 1904.

    Examples:
        >>> spearman(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([0, 2, 2]))
        tensor(0.8660, dtype=torch.float64)
    """
    x, y = _numbers("spearman", "x", x), _numbers("spearman", "y", y)
    if x.dim() == 0 or x.shape != y.shape:
        raise ValueError(f"spearman: x and y must have one shape (..., N), got {checks.shape(x)} and {checks.shape(y)}")
    checks.check_device("spearman", "x", x, "y", y)
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], torch.nan)
    x, y = (ranks - ranks.mean(-1, keepdim=True) for ranks in (_mean_ranks(x), _mean_ranks(y)))
    found = (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()
    return found.clamp(-1.0, 1.0)


@torch.no_grad()
def auc(scores: Tensor, labels: Tensor) -> Tensor:
    """Area under the ROC curve: how often a positive scores above a negative, where ties count half.

    Equivalent to::

        above = (scores[labels][:, None] > scores[~labels]).double() + (scores[labels][:, None] == scores[~labels]) / 2
        above.mean()

    Args:
        scores: (N,) numbers of any real dtype.
        labels: (N,) bool, or 0 and 1 of any dtype.

    Returns:
        0-d float64. NaN where a score is, or without a positive or a negative.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        A sort, not all pairs: O(N log N).

    Source:
        Hanley and McNeil, The Meaning and Use of the Area under a Receiver Operating Characteristic Curve, 1982.

    Examples:
        >>> auc(torch.tensor([0.9, 0.4, 0.4, 0.1]), torch.tensor([1, 1, 0, 0]))
        tensor(0.8750, dtype=torch.float64)
    """
    scores, labels = _numbers("auc", "scores", scores), _numbers("auc", "labels", labels)
    if scores.dim() != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"auc: scores and labels must have one shape (N,), got {checks.shape(scores)} and {checks.shape(labels)}"
        )
    checks.check_device("auc", "scores", scores, "labels", labels)
    wrong = labels[(labels != 0) & (labels != 1)]
    if len(wrong):
        raise ValueError(f"auc: labels must be 0 or 1, got {float(wrong[0]):g}")
    positives = labels.sum()
    pairs = positives * (len(labels) - positives)
    return ((_mean_ranks(scores) * labels).sum() - positives * (positives + 1) / 2) / pairs


@torch.no_grad()
def cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> Tensor:
    """Linear centred kernel alignment: how similar the similarities of the same things are in two representations.

    Equivalent to::

        x, y = x - x.mean(0), y - y.mean(0)
        (x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (N, D') of the same things, such as those of another layer or model; any dtype of these.
        debiased: estimate of the kernels' dependence without bias, which few rows of many features have; at least four
            rows.

    Returns:
        0-d float64, in [0, 1]; `debiased` may be negative. NaN where all rows of a side are equal.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        In float64 and without an N x N kernel: memory O(N (D + D') + (D + D')^2), work O(N (D + D')^2).

    Source:
        Kornblith et al., Similarity of Neural Network Representations Revisited, 2019; without bias: Song et al.,
        Feature Selection via Dependence Maximization, 2012.

    Examples:
        >>> x = torch.eye(4)
        >>> round(float(cka(x, 3 * x.flip(1) + 1)), 6)
        1.0
    """
    checks.check_matrix("cka", "x", x)
    checks.check_matrix("cka", "y", y)
    checks.check_device("cka", "x", x, "y", y)
    checks.flag("cka", "debiased", debiased)
    if len(x) != len(y):
        raise ValueError(f"cka: y must have as many rows as x, got x {checks.shape(x)} and y {checks.shape(y)}")
    if debiased and len(x) < 4:
        raise ValueError(f"cka: debiased must be False for fewer than four rows, got {len(x)}")
    with autocast.disabled(x):
        # Less their mean in any case: kernels do not change by it, and products then keep their digits.
        x, y = (each - each.mean(0) for each in (in_float64(x), in_float64(y)))
        between, of_x, of_y = (_dependence(*each, debiased) for each in ((x, y), (x, x), (y, y)))
        return between / (of_x * of_y).sqrt()


def _dependence(x: Tensor, y: Tensor, debiased: bool) -> Tensor:
    """Hilbert-Schmidt independence criterion of two linear kernels of centred rows, up to a factor."""
    total = (x.T @ y).square().sum()
    if not debiased:
        return total
    n = len(x)
    # The kernels without their diagonals; their rows sum to minus these, because rows are centred.
    p, q = x.square().sum(1), y.square().sum(1)
    return total - (p * q).sum() + p.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (p * q).sum()


def _numbers(function: str, name: str, x: Tensor) -> Tensor:
    """Real numbers of any dtype in float64."""
    x = checks.check_tensor(function, name, checks.from_array(function, name, x))
    if x.is_complex():
        raise TypeError(f"{function}: {name} must be real numbers, got {x.dtype}")
    return in_float64(x.detach())


def _mean_ranks(x: Tensor) -> Tensor:
    """(..., N) from 1; equal numbers share the mean of theirs. NaN in a row makes all of its ranks NaN."""
    ascending, x = x.sort(dim=-1).values, x.contiguous()
    below, not_above = (torch.searchsorted(ascending, x, right=right) for right in (False, True))
    ranks = (below + not_above + 1).double() / 2
    return ranks.masked_fill(x.isnan().any(-1, keepdim=True), torch.nan)
