"""Softmax over class prototypes with a margin on the own class: CosFace, ArcFace, with one prototype each or several.

The best of several prototypes of a class is a maximum inside of the sum of exponentials, which no fold is: those are
the work of plain torch, some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.backends import choose
from ..core.numerics import lse_of_rows, softplus
from ..ops.similarity_reduce import BACKENDS
from ..reference.stream import stream_rows
from . import _arguments
from ._columns import checked_target, wide
from ._row_softmax import row_softmax
from ._sweep import Sweep

KINDS = ("cosface", "arcface")


def cos_face(
    x: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    margin: float | Tensor = 0.35,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """CosFace: cross-entropy over class prototypes, with a margin subtracted from the cosine of the own class.

    Equivalent to::

        cosine = F.normalize(x) @ F.normalize(prototypes).T
        F.cross_entropy(scale * (cosine - margin * F.one_hot(labels, C)), labels)

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        prototypes: (C, D), one of each class; differentiable, usually a parameter. (C, K, D) has K sub-centres of each,
            of which the nearest to a row counts (sub-centre ArcFace), by plain torch on all backends.
        labels: (N,) int64 in [0, C).
        margin: subtracted from the cosine; a float >= 0, or (N,) with a margin for each row, differentiable.
        temperature: 1 / scale instead; not both.
        scale: factor of the cosines; float, 0-d or (N,) tensor, differentiable. Default 64.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first. Without it they must have that length already.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + C) D) beside ``memory_budget``; never N x C. Work 8 N C D, 6 if kept, 2 without gradients.

    Source:
        Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, 2018.

    Examples:
        >>> x, prototypes, labels = torch.randn(6, 16), torch.randn(4, 16), torch.tensor([0, 1, 2, 3, 0, 1])
        >>> cos_face(x, prototypes, labels, scale=16.0).shape
        torch.Size([])
    """
    return _margin_softmax(
        "cos_face",
        x,
        prototypes,
        labels,
        margin=margin,
        kind="cosface",
        easy_margin=False,
        temperature=temperature,
        scale=scale,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        memory_budget=memory_budget,
        backend=backend,
    )


def arc_face(
    x: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    margin: float | Tensor = 0.5,
    easy_margin: bool = False,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """ArcFace: cross-entropy over class prototypes, with a margin added to the angle to the own class.

    Equivalent to::

        cosine = F.normalize(x) @ F.normalize(prototypes).T
        own = cosine.gather(1, labels[:, None])
        moved = torch.cos(torch.acos(own) + margin)
        moved = torch.where(own >= -math.cos(margin), moved, own - margin * math.sin(margin))
        F.cross_entropy(scale * cosine.scatter(1, labels[:, None], moved), labels)

    The second case keeps the logit falling with the angle where the angle and the margin exceed 180 degrees. With
    ``easy_margin`` the margin is for angles below 90 degrees alone: ``torch.where(own > 0, moved, own)``.

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        prototypes: (C, D), one of each class; differentiable, usually a parameter. (C, K, D) has K sub-centres of each,
            of which the nearest to a row counts (sub-centre ArcFace), by plain torch on all backends.
        labels: (N,) int64 in [0, C).
        margin: added to the angle, in radians (0.5 is 28.6 degrees); a float in [0, pi], or (N,) with a margin for each
            row, differentiable.
        easy_margin: no margin for angles of 90 degrees and more.
        temperature: 1 / scale instead; not both.
        scale: factor of the cosines; float, 0-d or (N,) tensor, differentiable. Default 64.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first. Without it they must have that length already.
        memory_budget: bytes of inner products kept for backward; see `similarity_reduce`.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory O((N + C) D) beside ``memory_budget``; never N x C. Work 8 N C D, 6 if kept, 2 without gradients. The
        angle has no derivative where a row lies on its prototype; there the margin's part of the gradient is 0.

    Source:
        Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, 2019; Deng et al., Sub-center
        ArcFace: Boosting Face Recognition by Large-Scale Noisy Web Faces, 2020.

    Examples:
        >>> x, prototypes, labels = torch.randn(6, 16), torch.randn(4, 16), torch.tensor([0, 1, 2, 3, 0, 1])
        >>> arc_face(x, prototypes, labels, margin=0.3, scale=16.0, reduction="none").shape
        torch.Size([6])
    """
    return _margin_softmax(
        "arc_face",
        x,
        prototypes,
        labels,
        margin=margin,
        kind="arcface",
        easy_margin=easy_margin,
        temperature=temperature,
        scale=scale,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        memory_budget=memory_budget,
        backend=backend,
    )


def margin_softmax(
    x: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    margin: float | Tensor,
    kind: str = "cosface",
    easy_margin: bool = False,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy over class prototypes with a margin of the kind that is named.

    Equivalent to::

        {"cosface": cos_face, "arcface": arc_face}[kind](x, prototypes, labels, margin=margin, scale=scale)

    Args:
        x: (N, D), as in `cos_face`, as is everything else.
        prototypes: (C, D) or (C, K, D).
        labels: (N,) int64.
        margin: of the cosine ("cosface") or of the angle in radians ("arcface").
        kind: "cosface" or "arcface".
        easy_margin: as in `arc_face`.
        temperature: 1 / scale instead.
        scale: factor of the cosines. Default 64.
        weight: (N,).
        reduction: "mean", "sum" or "none".
        normalize: scale all rows to length 1 first.
        memory_budget: bytes of inner products kept for backward.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        0-d, or (N,) for ``reduction="none"``.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_reduce`.

    Note:
        Memory and work as in `cos_face`.

    Source:
        As `cos_face` and `arc_face`.

    Examples:
        >>> x, prototypes, labels = torch.randn(6, 16), torch.randn(4, 16), torch.tensor([0, 1, 2, 3, 0, 1])
        >>> loss = margin_softmax(x, prototypes, labels, margin=0.2, kind="cosface", scale=16.0)
        >>> torch.equal(loss, cos_face(x, prototypes, labels, margin=0.2, scale=16.0))
        True
    """
    return _margin_softmax(
        "margin_softmax",
        x,
        prototypes,
        labels,
        margin=margin,
        kind=kind,
        easy_margin=easy_margin,
        temperature=temperature,
        scale=scale,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        memory_budget=memory_budget,
        backend=backend,
    )


def _margin_softmax(
    function: str,
    x: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    margin: float | Tensor,
    kind: str,
    easy_margin: bool,
    temperature: float | Tensor | None,
    scale: float | Tensor | None,
    weight: Tensor | None,
    reduction: str,
    normalize: bool,
    memory_budget: int | None,
    backend: str,
) -> Tensor:
    checks.check_choice(function, "kind", kind, KINDS)
    if easy_margin and kind != "arcface":
        raise ValueError(f"{function}: easy_margin must be False for kind={kind!r}, got True")
    classes, centres = checks.check_tensor(function, "prototypes", prototypes).shape[:1], None
    if prototypes.dim() == 3 and prototypes.shape[1] > 0:
        centres, prototypes = prototypes.shape[1], prototypes.flatten(0, 1)
    x, prototypes, scale = _arguments.two_sides(
        function,
        (("x", x), ("prototypes", prototypes)),
        temperature=temperature,
        scale=scale,
        default_temperature=1 / 64,
        reduction=reduction,
        weight=weight,
        normalize=normalize,
        anchors=1,
    )
    scale = checks.scale_tensor(function, scale, "x", x)
    margin, labels = (_arguments.of_weighted(weight, each) for each in (margin, labels))
    margin = _margin(function, margin, kind, x)

    def own_logit(logit: Tensor, rows: slice = slice(None)) -> Tensor:
        factor, moved = (each[rows] if each.dim() else each for each in (scale, margin))
        if kind == "cosface":
            return logit - factor * moved
        return factor * _add_angle(logit / factor, moved, easy_margin)

    unit = _arguments.in_sweep(normalize, x)
    target = checked_target(function, "labels", labels, "x", x, classes[0])
    if centres is not None:
        choose(function, BACKENDS, x, backend)
        losses = _of_centres(wide(x, unit), wide(prototypes, unit), centres, target, scale, own_logit)
        return _arguments.reduce_rows(losses, weight, reduction)
    return row_softmax(
        Sweep((function, "x", "prototypes"), scale, unit=unit, memory_budget=memory_budget, backend=backend),
        x,
        prototypes,
        target=target,
        own_logit=own_logit,
        weight=weight,
        reduction=reduction,
    )


def _of_centres(
    x: Tensor,
    prototypes: Tensor,
    centres: int,
    target: Tensor,
    scale: Tensor,
    own_logit: Callable[[Tensor, slice], Tensor],
) -> Tensor:
    """(N,) losses of rows whose classes have several prototypes each, one class after another."""

    def losses(similarity: Tensor, rows: slice) -> Tensor:
        best = similarity.unflatten(1, (-1, centres)).max(2).values
        factor = scale[rows, None] if scale.dim() else scale
        logits, own = factor * best, target[rows, None]
        others = lse_of_rows(logits.scatter(1, own, -torch.inf))
        return softplus(others - own_logit(logits.gather(1, own)[:, 0], rows))

    with autocast.disabled(x):
        return stream_rows(losses, x, prototypes)


def _margin(function: str, margin: float | Tensor, kind: str, x: Tensor) -> Tensor:
    """Check the margin; return it in the accumulation dtype, 0-d or one of each row."""
    dtype = checks.accumulator(x.dtype)
    if isinstance(margin, Tensor) and margin.numel() == 1:
        return checks.one_number(function, "margin", margin, "x", x)
    if isinstance(margin, Tensor):
        checks.check_vector(function, "margin", margin, x.shape[0], "x", x)
        return margin.to(dtype)
    margin = checks.number(function, "margin", margin, "[0, inf)")
    if kind == "arcface":
        margin = checks.number(function, "margin", margin, f"[0, {math.pi}]")
    return torch.full((), margin, dtype=dtype, device=x.device)


def _add_angle(cosine: Tensor, margin: Tensor, easy_margin: bool) -> Tensor:
    """cos(acos(cosine) + margin), continued where that would rise with the angle."""
    # Without acos, whose derivative is infinite at 1, where rounding often puts a cosine.
    square = (1 - cosine) * (1 + cosine)
    inside = square > 0
    sine = torch.where(inside, torch.where(inside, square, 1.0).sqrt(), 0.0)
    moved = cosine * margin.cos() - sine * margin.sin()
    if easy_margin:
        return torch.where(cosine > 0, moved, cosine)
    return torch.where(cosine >= -margin.cos(), moved, cosine - margin * margin.sin())
