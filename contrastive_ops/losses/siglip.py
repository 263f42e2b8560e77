"""SigLIP: each pair is a binary classification of its own, so that a row is a plain sum of softplus.

A mean or sum of `siglip` forms its gradients in the forward pass (6 N^2 D operations); with several positives products
are made again in backward, or kept (8 N M D, 6 if kept).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from ..core import checks
from ..core.folds import Fold
from ..core.numerics import softplus
from ..core.ordered import repeated
from ..core.rules import Pairs
from ..reference.similarity_loss import usual_target
from . import _arguments
from ._binary import one_grade, shared_bias
from ._columns import check_filters
from ._eager import PARTNERS, eager_loss
from ._labels import other_labels
from ._sweep import Prepared, Sweep
from .diagnostics import Diagnostics, Ranking

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def siglip(
    image: Tensor,
    text: Tensor,
    *,
    bias: float | Tensor = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[_arguments.BiasedOptions],
) -> Tensor: ...


@overload
def siglip(
    image: Tensor,
    text: Tensor,
    *,
    bias: float | Tensor = ...,
    diagnostics: Literal[True],
    **options: Unpack[_arguments.BiasedOptions],
) -> tuple[Tensor, tuple[Diagnostics, Diagnostics]]: ...


def siglip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    bias: float | Tensor = -10.0,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    diagnostics: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, tuple[Diagnostics, Diagnostics]]:
    """SigLIP's loss: tell each image's own text from every other text, pair by pair.

    Equivalent to::

        image, text = F.normalize(image), F.normalize(text)
        logits = scale * image @ text.T + bias
        sign = 2 * torch.eye(N) - 1                             # +1 for the own text, -1 for every other
        -F.logsigmoid(sign * logits).sum() / N

    Args:
        image: (N, D) float32, bfloat16, float16 or float64.
        text: (N, D); row i belongs to row i of ``image``.
        temperature: divides the cosines; float, 0-d or (N,) tensor, differentiable. Default 0.1.
        scale: 1 / temperature instead, for instance ``logit_scale.exp()``; not both.
        bias: added to every logit; float or 0-d tensor, differentiable. It starts at about -log(N): most pairs are
            negative.
        pairs: which texts are negatives of an image: ids of false negatives, bounds on the similarity, a guide, ... Its
            own text always takes part.
        col_bias: (N,), added to the logits of each text; differentiable.
        weight: (N,) weight >= 0 of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none"; of rows, each of which is a sum over its N pairs.
        normalize: scale all rows to length 1 first; O(N D). False where they have it already, or lengths shall count.
        diagnostics: also return `Diagnostics` of both directions from the same sweep.
        memory_budget: bytes kept for backward with ``reduction="none"``; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton", "triton_persistent", "cuda" or "hopper"; as in
            `similarity_reduce`.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs); with ``diagnostics`` the pair
        (loss, (Diagnostics of images, Diagnostics of texts)). Never negative. The mean of no rows is NaN, as in
        `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O(N D). A mean or sum forms its gradients in the forward pass (6 N^2 D), with ``diagnostics`` in backward
        (8 N^2 D, 6 if kept); without gradients only the forward is paid (2 N^2 D).

    Source:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023; equal to open_clip's ``SigLipLoss``.

    Examples:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> cosines = torch.nn.functional.normalize(image) @ torch.nn.functional.normalize(text).T
        >>> sign = 2 * torch.eye(8) - 1
        >>> truth = -torch.nn.functional.logsigmoid(sign * (2.0 * cosines - 3.0)).sum() / 8
        >>> torch.allclose(siglip(image, text, scale=2.0, bias=-3.0), truth, rtol=1e-4)
        True
    """
    loss = None
    if pairs is None and col_bias is None and diagnostics is False:
        loss = eager_loss(
            "sigmoid",
            PARTNERS,
            image,
            text,
            temperature=temperature,
            scale=scale,
            default_temperature=0.1,
            bias=bias,
            weight=weight,
            reduction=reduction,
            normalize=normalize,
            memory_budget=memory_budget,
            backend=backend,
        )
    if loss is not None:
        return loss
    given: dict[str, Any] = {"temperature": temperature, "scale": scale, "bias": bias, "pairs": pairs}
    given.update({"col_bias": col_bias, "weight": weight, "reduction": reduction, "normalize": normalize})
    given.update({"diagnostics": diagnostics, "memory_budget": memory_budget, "backend": backend})
    return prepared_siglip(image, text, **given).loss()


def prepared_siglip(
    image: Tensor,
    text: Tensor,
    *,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    bias: float | Tensor,
    pairs: Pairs | None,
    col_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    normalize: bool,
    diagnostics: bool,
    memory_budget: int | None,
    backend: str,
) -> Prepared:
    """`siglip`, checked; all of its options are given."""
    name = "siglip"
    image, text, scale = _arguments.two_sides(
        name,
        (("image", image), ("text", text)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.1,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        partners=True,
        anchors=1,
    )
    check_filters(name, pairs, col_bias, text.shape[0], "image", image)
    bias = repeated(shared_bias(name, bias, image), image.shape[0])
    unit = _arguments.in_sweep(normalize, image)
    sweep = Sweep((name, "image", "text"), scale, pairs, col_bias, unit, memory_budget, backend)
    options = {"row_bias": bias, "weight": weight, "reduction": reduction, "diagnostics": diagnostics}
    return Prepared(_sigmoids, sweep, image, text, options)


def _sigmoids(
    sweep: Sweep, x: Tensor, y: Tensor, *, row_bias: Tensor, weight: Tensor | None, reduction: str, diagnostics: bool
) -> Any:
    if not diagnostics:
        return one_grade(sweep, x, y, row_bias, None, None, weight, reduction)
    of_all = sweep.sums_of_all
    ranking = Ranking(x, y, y, sweep.pairs, both=True, unit=sweep.unit, biased=True, sums_of_all=of_all)
    folds: tuple[str | Fold, ...] = ("sum_softplus", *ranking.folds)
    (pushed, *rows), (_, *cols), own, *_ = sweep.fold(
        x, y, *folds, dim=(0, 1), row_bias=row_bias, target=usual_target(x, y)
    )
    return _arguments.reduce_rows(pushed + softplus(-own), weight, reduction), ranking.read_both(rows, cols)


def multi_positive_siglip(
    x: Tensor,
    y: Tensor,
    labels: Tensor,
    col_labels: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    bias: float | Tensor = -10.0,
    pairs: Pairs | None = None,
    col_bias: Tensor | None = None,
    balanced: bool = False,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """SigLIP with any number of positives per row: the pairs with equal ids.

    Equivalent to::

        x, y = F.normalize(x), F.normalize(y)
        logits = scale * x @ y.T + bias
        positive = (labels[:, None] == col_labels) & (labels[:, None] != -1)
        pulled = torch.where(positive, F.softplus(-logits), 0).sum(1)
        pushed = torch.where(positive, 0, F.softplus(logits)).sum(1)
        if balanced:
            pulled, pushed = pulled / positive.sum(1).clamp(min=1), pushed / (~positive).sum(1).clamp(min=1)
        (pulled + pushed).mean()

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (M, D).
        labels: (N,) int64. -1 equals nothing: a row of negatives alone.
        col_labels: (M,) int64. None: those of the rows, and M = N.
        temperature: divides the cosines; float, 0-d or (N,) tensor, differentiable. Default 0.1.
        scale: 1 / temperature instead; not both.
        bias: added to every logit; float or 0-d tensor, differentiable.
        pairs: which pairs of different label are negatives: bounds on the similarity, a guide, ... Pairs of one label
            are positives whatever it says; labels take the place of ``differ``, and ``fill`` is refused.
        col_bias: (M,), added to the logits of each column; differentiable.
        balanced: divide each row's sum over positives and its sum over negatives by their numbers. False: every pair
            counts the same, as in SigLIP.
        weight: (N,) weight >= 0 of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none"; of rows, each of which is a sum over its M pairs.
        normalize: scale all rows to length 1 first; O((N + M) D). False where they have it already, or lengths
            shall count.
        memory_budget: bytes kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative. A row without
        positives keeps the loss of its negatives and counts. The mean of no rows is NaN.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + M) D) beside ``memory_budget``. Positives and negatives share one sweep: 8 N M D.

    Source:
        Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023, with the sign +1 for every pair of one id.

    Examples:
        >>> x, y = torch.randn(6, 16), torch.randn(4, 16)
        >>> labels, col_labels = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 3])
        >>> multi_positive_siglip(x, y, labels, col_labels, reduction="none").shape
        torch.Size([6])
    """
    name = "multi_positive_siglip"
    x, y, scale = _arguments.two_sides(
        name,
        (("x", x), ("y", y)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.1,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        anchors=1,
    )
    labels = checks.check_index(name, "labels", labels, x.shape[0], "x", x)
    col_labels = labels if col_labels is None else col_labels
    col_labels = checks.check_index(name, "col_labels", col_labels, y.shape[0], "x", x)
    same = Pairs(same=(labels, col_labels))
    differ = other_labels(name, pairs, Pairs(differ=(labels, col_labels)), False)
    folds: tuple[Fold, ...] = (Fold("sum_softplus", pairs=same, negate=True), Fold("sum_softplus", pairs=differ))
    if balanced:
        folds += (Fold("count", pairs=same, negate=True), Fold("count", pairs=differ))
    sweep = Sweep((name, "x", "y"), scale, None, col_bias, _arguments.in_sweep(normalize, x), memory_budget, backend)
    row_bias = repeated(shared_bias(name, bias, x), x.shape[0])
    (pulled, pushed, *counts), *_ = sweep.fold(x, y, *folds, row_bias=row_bias)
    if balanced:
        pulled, pushed = pulled / counts[0].clamp_min(1), pushed / counts[1].clamp_min(1)
    return _arguments.reduce_rows(pulled + pushed, weight, reduction)
