"""Sums of values weighted by the softmax of similarities, and their distillation, in chunks of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _autocast, _checks
from .._unit_rows import unit_rows
from ..reference.pairs import inner_products
from ..reference.stream import stream_rows
from . import _arguments
from .distillation import _teacher_scale


def softmax_values(
    x: Tensor,
    y: Tensor,
    values: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    euclidean: bool = False,
    normalize: bool = False,
) -> Tensor:
    """Sum the values of all columns, weighted by each row's softmax: soft assignment to a codebook, soft retrieval.

    Equivalent to::

        logits = x @ y.T / temperature                           # euclidean: -torch.cdist(x, y).square() / temperature
        logits.softmax(1) @ values

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        y: (M, D), such as the entries of a codebook.
        values: (M, V) of the same dtype; None for ``values=y``. Differentiable.
        temperature: divides the logits; float, 0-d or (N,) tensor, differentiable. Default 1.
        scale: 1 / temperature instead; not both.
        euclidean: logits are negative squared distances instead of inner products.
        normalize: scale all rows of ``x`` and ``y`` to length 1 first.

    Returns:
        (N, V) float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: inputs that do not fit.

    Note:
        Memory O((N + M) (D + V)) and one chunk of logits, as `stream_rows`, by which it is made: any device,
        differentiable as often as needed.

    Source:
        van den Oord et al., Neural Discrete Representation Learning, 2017, with soft assignment in training.

    Example:
        >>> x, y = torch.randn(5, 4), torch.randn(7, 4)
        >>> torch.allclose(softmax_values(x, y), (x @ y.T).softmax(1) @ y, atol=1e-5)
        True
    """
    name = "softmax_values"
    x, y, values = _autocast.cast(x, y, y if values is None else values)
    _checks.check_matrices(name, "x", x, "y", y)
    values = _checked_values(name, values, "y", y)
    factor = _row_scale(name, _arguments.resolve_scale(name, temperature, scale, 1.0), x)
    if normalize:
        x, y = unit_rows(x), unit_rows(y)
    wide = values.to(_checks.accumulator(x.dtype))
    # What is the same for all columns leaves a softmax as it is: the squared length of the row is left out.
    square = y.to(wide.dtype).square().sum(1) if euclidean else None

    def weigh(dots: Tensor, rows: slice) -> Tensor:
        logits = dots if square is None else 2.0 * dots - square
        return (_of_rows(factor, rows) * logits).softmax(1) @ wide

    return stream_rows(weigh, x, y)  # type: ignore[return-value]


def value_distillation(
    x: Tensor,
    y: Tensor,
    teacher_x: Tensor,
    teacher_y: Tensor,
    values: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    teacher_temperature: float | Tensor | None = None,
    teacher_scale: float | Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Make what each row retrieves the teacher's: squared distance between sums of values under both softmaxes.

    Equivalent to::

        q = (x @ y.T / temperature).softmax(1)
        p = (teacher_x @ teacher_y.T / teacher_temperature).softmax(1)
        ((q - p) @ values).square().sum(1).mean()

    It forgives what `similarity_distillation` does not: probability that moves between columns of like values.

    Args:
        x: (N, D) float32, bfloat16, float16 or float64: the student's rows.
        y: (M, D) the student's columns.
        teacher_x: (N, D') the teacher's rows; a constant, as everything of the teacher.
        teacher_y: (M, D') the teacher's columns.
        values: (M, V) what a column stands for; a constant. None for the teacher's columns.
        temperature: divides the student's inner products; float, 0-d or (N,) tensor, differentiable. Default 0.07.
        scale: 1 / temperature instead; not both.
        teacher_temperature: the teacher's. Default: the student's.
        teacher_scale: 1 / teacher_temperature instead; not both.
        weight: (N,) weight of each row; the mean divides by its sum. Differentiable.
        reduction: "mean", "sum" or "none".
        normalize: scale all rows of student and teacher to length 1 first, values excepted.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs). Never negative; 0 where both
        softmaxes are the same.

    Raises:
        ValueError, TypeError: inputs that do not fit.

    Note:
        As `softmax_values`. The difference of the softmaxes is formed before the sum, so that it does not cancel.

    Example:
        >>> x, y = torch.randn(5, 4), torch.randn(7, 4)
        >>> float(value_distillation(x, y, x, y))
        0.0
    """
    name = "value_distillation"
    _arguments.check_reduction(name, reduction)
    x, y = _autocast.cast(x, y)
    _checks.check_matrices(name, "x", x, "y", y)
    teacher_x, teacher_y = (t.detach() for t in _autocast.cast(teacher_x, teacher_y))
    _checks.check_matrices(name, "teacher_x", teacher_x, "teacher_y", teacher_y)
    for own_name, own, side, teacher in (("x", x, "teacher_x", teacher_x), ("y", y, "teacher_y", teacher_y)):
        _checks.check_device(name, own_name, own, side, teacher)
        if len(own) != len(teacher):
            raise ValueError(
                f"{name}: {side} must have as many rows as {own_name}, "
                f"got {own_name} {_checks.shape(own)} and {side} {_checks.shape(teacher)}"
            )
    if weight is not None:
        _arguments.check_weight(name, weight, x.shape[0], "x", x)
    values = _checked_values(name, teacher_y if values is None else _autocast.cast(values.detach())[0], "y", y)
    factor = _row_scale(name, _arguments.resolve_scale(name, temperature, scale, 0.07), x)
    own_scale = teacher_temperature is None and teacher_scale is None
    of_teacher = (
        factor
        if own_scale
        else _row_scale(name, _teacher_scale(name, teacher_temperature, teacher_scale), x, "teacher_scale")
    )
    of_teacher = of_teacher.detach()
    if normalize:
        x, y, teacher_x, teacher_y = map(unit_rows, (x, y, teacher_x, teacher_y))
    wide = values.to(_checks.accumulator(x.dtype))

    def distance(dots: Tensor, rows: slice) -> Tensor:
        q = (_of_rows(factor, rows) * dots).softmax(1)
        with torch.no_grad():
            p = (_of_rows(of_teacher, rows) * inner_products(teacher_x[rows], teacher_y).to(dots.dtype)).softmax(1)
        return ((q - p) @ wide).square().sum(1)

    return _arguments.reduce_rows(stream_rows(distance, x, y), weight, reduction)  # type: ignore[arg-type]


def _checked_values(function: str, values: Tensor, y_name: str, y: Tensor) -> Tensor:
    _checks.check_matrix(function, "values", values)
    _checks.check_device(function, y_name, y, "values", values)
    if len(values) != len(y):
        raise ValueError(
            f"{function}: values must have as many rows as {y_name}, "
            f"got {y_name} {_checks.shape(y)} and values {_checks.shape(values)}"
        )
    return values


def _row_scale(function: str, scale: float | Tensor, x: Tensor, name: str = "scale") -> Tensor:
    """0-d or (N, 1), in the accumulation dtype."""
    factor = _checks.scale_tensor(function, scale, "x", x, name)
    return factor[:, None] if factor.dim() else factor


def _of_rows(factor: Tensor, rows: slice) -> Tensor:
    return factor[rows] if factor.dim() else factor
