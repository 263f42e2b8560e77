"""Measures of similarities and of spectra: histograms, IsoScore, contrast sets. Part of `metrics`."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import checks
from .core.numerics import CHUNK_ELEMENTS, chunks_of_rows
from .core.ordered import in_float64
from .losses._columns import wide


@torch.no_grad()
def similarity_histogram(
    x: Tensor, y: Tensor | None = None, *, bins: int = 50, low: float = -1.0, high: float = 1.0, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """How the similarities of all pairs are spread, without storing them.

    Equivalent to::

        s = F.normalize(x) @ F.normalize(y).T                                   # without y: pairs of different rows
        torch.histogram(s.flatten().clamp(low, high), bins, range=(low, high))

    A plot: ``matplotlib.pyplot.stairs(counts, edges)``.

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (M, D), or None for the pairs of different rows of x.
        bins: number of bins of equal width.
        low: the lower edge of the first; what lies below is counted there.
        high: the upper edge of the last; what lies above is counted there.
        normalize: cosines; False: inner products.

    Returns:
        (bins,) int64 counts, NaN uncounted, and (bins + 1,) edges.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O((N + M) D) and one chunk of rows; 2 N M D operations.

    Examples:
        >>> counts, edges = similarity_histogram(torch.eye(3), bins=4)
        >>> counts.tolist()
        [0, 0, 6, 0]
    """
    name = "similarity_histogram"
    checks.check_matrix(name, "x", x)
    if y is not None:
        checks.check_matrices(name, "x", x, "y", y)
    bins = checks.integer(name, "bins", bins, 1)
    low, high = checks.number(name, "low", low), checks.number(name, "high", high)
    if not low < high:
        raise ValueError(f"{name}: low must be below high, got {low} and {high}")
    rows, columns = wide(x, normalize), wide(x if y is None else y, normalize)
    counts = torch.zeros(bins, dtype=torch.int64, device=x.device)
    for chunk in chunks_of_rows(rows.shape[0], max(1, CHUNK_ELEMENTS // max(columns.shape[0], 1))):
        found = rows[chunk] @ columns.T
        if y is None:
            found[:, chunk].fill_diagonal_(torch.nan)
        place = ((found - low) * (bins / (high - low))).floor().clamp(0, bins - 1)
        counts += torch.bincount(place[~place.isnan()].long(), minlength=bins)
    return counts, torch.linspace(low, high, bins + 1, dtype=rows.dtype, device=x.device)


@torch.no_grad()
def iso_score(x: Tensor) -> Tensor:
    """IsoScore: how evenly rows use their dimensions, 1 for all alike, 0 for a single one; blind to the mean.

    Equivalent to::

        v = torch.linalg.eigvalsh(torch.cov(x.T))
        v = v * D**0.5 / v.norm()
        defect = (v - 1).norm() / (2 * (D - D**0.5)) ** 0.5
        share = (D - defect**2 * (D - D**0.5)) ** 2 / D**2
        (D * share - 1) / (D - 1)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64; N and D at least 2.

    Returns:
        0-d, in float32 (float64 for float64 inputs). NaN where all rows are alike.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        O(N D^2), and the eigenvalues of a D x D matrix in float64.

    Source:
        Rudman et al., IsoScore: Measuring the Uniformity of Embedding Space Utilization, 2022.

    Examples:
        >>> round(float(iso_score(torch.cat([torch.eye(4), -torch.eye(4)]))), 6)
        1.0
    """
    checks.check_matrix("iso_score", "x", x)
    rows, depth = x.shape
    if rows < 2 or depth < 2:
        raise ValueError(f"iso_score: x must have at least 2 rows of 2 numbers, got {checks.shape(x)}")
    centred = in_float64(x)
    centred = centred - centred.mean(0)
    spectrum = torch.linalg.eigvalsh(centred.T @ centred / (rows - 1)).clamp_min(0)
    spectrum = spectrum * depth**0.5 / spectrum.norm()
    defect = (spectrum - 1).square().sum() / (2 * (depth - depth**0.5))
    share = (depth - defect * (depth - depth**0.5)) ** 2 / depth**2
    return ((depth * share - 1) / (depth - 1)).to(device=x.device, dtype=checks.accumulator(x.dtype))


@torch.no_grad()
def contrast_accuracy(scores: Tensor) -> Tensor:
    """The share of contrast sets that are ordered right: both queries prefer the document of their own.

    Equivalent to::

        ((s[:, 0, 0] > s[:, 0, 1]) & (s[:, 1, 1] > s[:, 1, 0])).double().mean()

    Args:
        scores: (N, 2, 2) of two queries (or of a text and its edit) against their two documents.

    Returns:
        0-d float64, a quarter for random scores; equal scores are wrong. NaN for no sets. The gap of two subsets is
        the difference of two calls.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Weller et al., NevIR: Negation in Neural Information Retrieval, 2024: pairwise accuracy.

    Examples:
        >>> float(contrast_accuracy(torch.eye(2)[None]))
        1.0
    """
    scores = checks.check_tensor("contrast_accuracy", "scores", scores)
    if scores.dim() != 3 or scores.shape[1:] != (2, 2):
        raise ValueError(f"contrast_accuracy: scores must have shape (N, 2, 2), got {checks.shape(scores)}")
    right = (scores[:, 0, 0] > scores[:, 0, 1]) & (scores[:, 1, 1] > scores[:, 1, 0])
    return right.double().mean()
