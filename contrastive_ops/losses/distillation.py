"""Distillation from a teacher's embeddings: softmaxes of similarities, and distances, without an N x M matrix."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.offsets import from_common_row
from ..core.ordered import ordered_sum
from ..core.problem import Layout, LogitSet, Problem
from ..core.rules import Pairs
from ..core.unit_rows import unit_rows
from ..ops.similarity_distill import DIVERGENCES, compare, run
from . import _arguments
from ._columns import wide


def similarity_distillation(
    x: Tensor,
    y: Tensor | None,
    teacher_x: Tensor,
    teacher_y: Tensor | None = None,
    *,
    divergence: str = "kl",
    symmetric: bool = False,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    teacher_scale: float | Tensor | None = None,
    teacher_bias: Tensor | None = None,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Make each row's softmax over the batch that of a teacher: distillation of contrastive models (CLIP-KD, CompRess).

    Equivalent to::

        x, y, teacher_x, teacher_y = (F.normalize(each) for each in (x, y, teacher_x, teacher_y))
        p = (teacher_x @ teacher_y.T / teacher_temperature).softmax(1)
        q = (x @ y.T / temperature).log_softmax(1)
        (p * (p.log() - q)).sum(1).mean()                        # "kl"; symmetric: averaged with that of the columns

    Args:
        x: (N, D) float32, bfloat16, float16 or float64: the student's rows.
        y: (M, D) the student's columns. None compares the rows with each other; a row and itself are then no pair
            unless `pairs` says otherwise.
        teacher_x: (N, D') the teacher's rows; a constant, as everything of the teacher.
        teacher_y: (M, D'); None where y is None.
        divergence: "kl", "reverse_kl", "ce" or "js", as in `similarity_distill`.
        symmetric: average the divergences of row i and of column i, as for images and texts; then M = N.
        temperature: divides the student's cosines; float, 0-d or (N,) tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        teacher_temperature: the teacher's; a constant. Default: the student's, through which no gradient comes.
        teacher_scale: 1 / teacher_temperature instead; not both.
        teacher_bias: (M,) added to the teacher's logits of each column; -inf takes its probability.
        pairs: which pairs take part, for both.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows of student and teacher to length 1 first; O((N + M) (D + D')). False where
            they have it already, or lengths shall count.
        memory_budget: bytes of inner products kept for backward; see `similarity_distill`.
        backend: "auto", "reference" or "cpu".

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative; 0 where student
        and teacher agree ("ce": the teacher's entropy). A row in which no pair takes part is 0 and counts.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_distill`.

    Note:
        Memory O((N + M) (D + D')) beside ``memory_budget``. "ce" has the gradients of "kl". Gradients shrink with
        1 / temperature: Hinton et al. multiply the loss by its square.

    Source:
        Yang et al., CLIP-KD: An Empirical Study of CLIP Model Distillation, 2024 (contrastive relational distillation);
        `DistillClipLoss` of open_clip is ``divergence="ce", symmetric=True``. Without y: Koohpayegani et al., CompRess:
        Self-Supervised Learning by Compressing Representations, 2020.

    Examples:
        >>> image, text = torch.randn(8, 16), torch.randn(8, 16)
        >>> teacher = image + 0.1 * torch.randn(8, 16)
        >>> same = similarity_distillation(image, text, image, text, symmetric=True)
        >>> float(same), bool(similarity_distillation(image, text, teacher, text) > 0)
        (0.0, True)
    """
    name = "similarity_distillation"
    checks.check_choice(name, "divergence", divergence, DIVERGENCES)
    columns = x if y is None else y
    x, columns, factor = _arguments.two_sides(
        name,
        (("x", x), ("y", columns)),
        temperature=temperature,
        scale=scale,
        default_temperature=0.07,
        reduction=reduction,
        weight=weight,
        anchors=int(y is not None and not symmetric),
    )
    if y is not None and not symmetric:
        teacher_x, teacher_temperature, teacher_scale = (
            _arguments.of_weighted(weight, each, otherwise)
            for each, otherwise in ((teacher_x, 0), (teacher_temperature, 1), (teacher_scale, 1))
        )
    if symmetric and columns.shape[0] != x.shape[0]:
        raise ValueError(
            f"{name}: y must have as many rows as x where symmetric=True, "
            f"got x {checks.shape(x)} and y {checks.shape(columns)}"
        )
    teacher_factor = factor
    if teacher_temperature is not None or teacher_scale is not None:
        teacher_factor = _arguments.resolve_scale(name, teacher_temperature, teacher_scale, 1.0, "teacher_")
    teacher_x, teacher_y = autocast.cast(teacher_x, teacher_y)
    # Unit rows in the accumulation dtype: in 16 bits they would be rounded once more.
    with autocast.disabled(x) if normalize else nullcontext():
        if normalize:
            x, teacher_x = wide(x, True), _unit_teacher(name, "teacher_x", teacher_x)
            columns = x if y is None else wide(columns, True)
            teacher_y = None if teacher_y is None else _unit_teacher(name, "teacher_y", teacher_y)
        rows, cols = compare(
            Problem.of((name, "x", "y"), x, None if y is None else columns),
            teacher_x,
            teacher_y,
            kind=divergence,
            dim=(0, 1) if symmetric else 1,
            scale=factor,
            teacher_scale=teacher_factor,
            teacher_bias=teacher_bias,
            pairs=Pairs(diagonal=0) if y is None and pairs is None else pairs,
            memory_budget=memory_budget,
            backend=backend,
        )
    return _arguments.reduce_rows((rows + cols) / 2 if symmetric else rows, weight, reduction)


def distance_distillation(
    x: Tensor,
    teacher_x: Tensor,
    *,
    relative: bool = True,
    delta: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Make the distances between all rows of a batch those of a teacher: Huber loss over all pairs (RKD, ProCLIP).

    Equivalent to::

        d, t = torch.cdist(x, x), torch.cdist(teacher_x, teacher_x)
        d, t = (each * N * (N - 1) / each.sum() for each in (d, t))         # relative: divided by their mean
        F.huber_loss(d, t, delta=delta, reduction="sum") / (N * (N - 1))

    Args:
        x: (N, D) float32, bfloat16, float16 or float64: the student's rows.
        teacher_x: (N, D') the teacher's rows; a constant.
        relative: divide the distances of each side by their mean over all pairs, through which the gradient goes.
        delta: where the Huber loss becomes linear.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable. 0 leaves it out.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows of student and teacher to length 1 first; O(N (D + D')).
        memory_budget: bytes of inner products kept for backward; see `similarity_distill`.
        backend: "auto", "reference" or "cpu".

    Returns:
        0-d, or (N,) for ``reduction="none"``: for each row the mean over the other rows. float32 (float64 for float64
        inputs). Never negative; 0 where all distances agree. One row alone is 0.

    Raises:
        ValueError, TypeError, NotImplementedError: as `similarity_distill`.

    Note:
        Memory O(N (D + D')) beside ``memory_budget``; ``relative`` takes one more sweep of each side for the means.
        Distances come from inner products in float32, of rows less a common one: those below a thousandth of the rows'
        distances from their middle are inexact.
        RKD's own mean counts the N zeros of the diagonal, and is (N - 1) / N of this one; ProCLIP's loss is the sum
        over i < j without ``relative``, N (N - 1) / 2 times this one.

    Source:
        Park et al., Relational Knowledge Distillation, 2019 (the distance-wise loss); Hu et al., ProCLIP: Progressive
        Vision-Language Alignment via LLM-based Embedder, 2025 (structure alignment: ``relative=False``).

    Examples:
        >>> x = torch.randn(8, 16)
        >>> float(distance_distillation(x, 3.0 * x)) < 1e-6
        True
    """
    name = "distance_distillation"
    _arguments.check_reduction(name, reduction)
    delta = checks.number(name, "delta", delta, "(0, inf]")
    x, teacher_x = autocast.cast(x, teacher_x)
    checks.check_matrix(name, "x", x)
    checks.check_matrix(name, "teacher_x", teacher_x)
    checks.check_device(name, "x", x, "teacher_x", teacher_x)
    if teacher_x.shape[0] != x.shape[0]:
        raise ValueError(
            f"{name}: teacher_x must have as many rows as x, "
            f"got x {checks.shape(x)} and teacher_x {checks.shape(teacher_x)}"
        )
    if weight is not None:
        _arguments.check_weight(name, weight, x.shape[0], "x", x)
    # Both in the accumulation dtype: a difference of squares has no digits to lose.
    student, teacher = x.to(checks.accumulator(x.dtype)), teacher_x.detach().to(checks.accumulator(x.dtype))
    if normalize:
        student, teacher = unit_rows(student), unit_rows(teacher)
    options = {"memory_budget": memory_budget, "function": name, "backend": backend}
    student, teacher = (from_common_row(each)[0] for each in (student, teacher))
    if relative:
        student, teacher = (each / _mean_distance(each, **options) for each in (student, teacher))
    rows = _between_all(student, teacher, "huber", delta, **options)
    return _arguments.reduce_rows(rows / _others(student), weight, reduction)


# ---- Parts -----------------------------------------------------------------------------------------------------------


def _others(x: Tensor) -> Tensor:
    """0-d: how many other rows each row has, at least 1. A tensor: a number would fix a traced batch size."""
    return torch.full((), x.shape[0] - 1, dtype=x.dtype, device=x.device).clamp_min(1.0)


def _between_all(student: Tensor, teacher: Tensor, kind: str, delta: float, **options: object) -> Tensor:
    """(N,) the sum over the other rows of what `kind` makes of both distances."""
    sides = []
    for each in (student, teacher):
        square = each.square().sum(1)
        sides.append((each, None, torch.full((1,), -2.0, dtype=each.dtype, device=each.device), square, square))
    layout = Layout((LogitSet(diagonal=0),), ())
    return run(sides[0], sides[1], layout, kind=kind, delta=delta, **options)[0]  # type: ignore[arg-type]


def _mean_distance(x: Tensor, **options: object) -> Tensor:
    """0-d: the mean distance over all pairs of rows; 1 where all rows are the same."""
    # No teacher: its rows have no dimension, and all its distances are 0.
    sums = _between_all(x, x.detach()[:, :0], "distance", 1.0, **options)
    others = _others(x)
    mean = ordered_sum(sums) / (others * (others + 1))
    return torch.where(mean == 0, 1.0, mean)


def _unit_teacher(function: str, name: str, teacher: Tensor) -> Tensor:
    checks.check_matrix(function, name, teacher)
    return wide(teacher.detach(), True)
