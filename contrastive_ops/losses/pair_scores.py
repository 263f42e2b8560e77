"""Losses of graded pairs: the squared error of their cosines, and the order of their scores (CoSENT, AnglE)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import softplus
from ..core.unit_rows import unit_rows
from . import _arguments
from ._columns import partner_similarity, wide


def pair_mse(
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
) -> Tensor:
    """Squared error of each pair's cosine against a label, which may be any number.

    Equivalent to::

        F.mse_loss(F.cosine_similarity(x, y), labels)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (N, D); row i is the partner of row i of ``x``.
        labels: (N,) the cosine that each pair should have; differentiable.
        weight: (N,) weight >= 0 of each pair; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first; False compares inner products.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D).

    Source:
        Reimers and Gurevych, Sentence-BERT, 2019: ``CosineSimilarityLoss`` of sentence-transformers.

    Examples:
        >>> x = torch.randn(4, 8)
        >>> float(pair_mse(x, 2 * x, torch.ones(4))) < 1e-10
        True
    """
    name = "pair_mse"
    x, y, _ = _arguments.two_sides(
        name,
        (("x", x), ("y", y)),
        temperature=None,
        scale=None,
        default_temperature=1.0,
        reduction=reduction,
        weight=weight,
        partners=True,
        anchors=2,
    )
    labels = _arguments.of_weighted(weight, labels)
    checks.check_vector(name, "labels", labels, x.shape[0], "x", x)
    similarity = partner_similarity(x, y, normalize)
    return _arguments.reduce_rows((similarity - labels.to(similarity.dtype)).square(), weight, reduction)


def cosent(
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """CoSENT: a pair with a higher label must have a higher cosine than every pair with a lower one.

    Equivalent to::

        s = scale * F.cosine_similarity(x, y)
        wrong = (s[:, None] - s)[labels[:, None] < labels]              # for each two pairs of different label
        torch.cat([torch.zeros(1), wrong]).logsumexp(0)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (N, D); row i is the partner of row i of ``x``.
        labels: (N,) numbers, whose order alone counts; pairs of equal label are not compared.
        temperature: divides the cosines; float or 0-d tensor, differentiable. Default 0.05.
        scale: 1 / temperature instead; not both.
        normalize: scale all rows to length 1 first; False compares inner products.

    Returns:
        0-d, in float32 (float64 for float64 inputs). Never negative; 0 where no two labels differ.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N D): pairs are sorted, and no two of them need a number of their own. Time O(N D + N log N).

    Source:
        Huang et al., CoSENT: Consistent Sentence Embedding via Similarity Ranking, 2024; equal to ``CoSENTLoss`` of
        sentence-transformers.

    Examples:
        >>> x = torch.randn(3, 8)
        >>> float(cosent(x, x, torch.tensor([0.1, 0.5, 0.5])) > 0)
        1.0
    """
    x, y, factor = _partners("cosent", x, y, temperature, scale)
    return _order("cosent", partner_similarity(x, y, normalize), labels, factor, x)


def angle(
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """AnglE: `cosent` of angles in complex space, which have a gradient where a cosine is flat.

    Equivalent to::

        (a, b), (c, d) = F.normalize(x).chunk(2, 1), F.normalize(y).chunk(2, 1)
        s = scale * ((a * c + b * d).sum(1) + (b * c - a * d).sum(1)).abs()
        wrong = (s[:, None] - s)[labels[:, None] < labels]
        torch.cat([torch.zeros(1), wrong]).logsumexp(0)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64. The second half of its columns is the imaginary part of the
            first; where D is odd a column of zeros is added.
        y: (N, D); row i is the partner of row i of ``x``.
        labels: (N,) numbers, whose order alone counts; pairs of equal label are not compared.
        temperature: divides the scores; float or 0-d tensor, differentiable. Default 0.05.
        scale: 1 / temperature instead; not both.

    Returns:
        0-d, in float32 (float64 for float64 inputs). Never negative; 0 where no two labels differ.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory and time as `cosent`.

    Source:
        Li and Li, AnglE-optimized Text Embeddings, 2023; equal to ``AnglELoss`` of sentence-transformers.

    Examples:
        >>> x, y = torch.randn(3, 8), torch.randn(3, 8)
        >>> angle(x, y, torch.tensor([0.1, 0.5, 0.9])).shape
        torch.Size([])
    """
    x, y, factor = _partners("angle", x, y, temperature, scale)
    with autocast.disabled(x):
        u, v = (unit_rows(wide(each)) for each in (x, y))
        u, v = (torch.nn.functional.pad(each, (0, each.shape[1] % 2)) for each in (u, v))
        (a, b), (c, d) = u.chunk(2, 1), v.chunk(2, 1)
        scores = ((a * c + b * d).sum(1) + (b * c - a * d).sum(1)).abs()
    return _order("angle", scores, labels, factor, x)


def _partners(
    function: str, x: Tensor, y: Tensor, temperature: float | Tensor | None, scale: float | Tensor | None
) -> tuple[Tensor, Tensor, float | Tensor]:
    return _arguments.two_sides(
        function,
        (("x", x), ("y", y)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.05,
        reduction="mean",
        partners=True,
    )


def _order(function: str, scores: Tensor, labels: Tensor, scale: float | Tensor, x: Tensor) -> Tensor:
    """log(1 + the sum of exp(scale (s_i - s_j)) over pairs i with a lower label than j)."""
    checks.check_tensor(function, "labels", labels)
    if labels.shape != scores.shape:
        raise ValueError(f"{function}: labels must have shape ({scores.shape[0]},), got {checks.shape(labels)}")
    checks.check_device(function, "x", x, "labels", labels)
    known = labels.detach().to(torch.uint8) if labels.dtype == torch.bool else labels.detach()
    ascending, order = known.sort(stable=True)
    logits = checks.one_number(function, "scale", scale, "x", x) * scores.index_select(0, order)
    # lse of the scores of all pairs with a lower label. Of none it is a number so low that it adds nothing and has no
    # gradient; -inf would have to be masked.
    lower = torch.cat([logits.new_full((1,), torch.finfo(logits.dtype).min / 2), logits.logcumsumexp(0)])
    wrong = lower.index_select(0, torch.searchsorted(ascending, ascending)) - logits
    return softplus(wrong.logsumexp(0))
