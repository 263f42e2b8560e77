"""Losses of plain tensors with their usual options: in C++ (csrc/eager.cpp), or by `_dense` without it.

A step with few rows is mostly host time, and most of that is Python. `eager_loss` returns None for every call that is
not for it, or that has something to refuse; the loss then goes on by its operator, whose checks word the error.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from ..core import backends, eager, extension
from ..ops.similarity_reduce import DEFAULT_MEMORY_BUDGET
from ..reference.row_losses import KINDS, REDUCTIONS
from ._calls import COLUMNS as COLUMNS
from ._calls import LABELLED as LABELLED
from ._calls import PARTNERS as PARTNERS
from ._calls import STACKED as STACKED
from ._calls import Call, gradients_again
from ._dense import dense_loss, is_for_dense


def eager_loss(
    kind: str,
    form: int,
    x: Tensor,
    y: Tensor | None,
    *,
    temperature: Any,
    scale: Any,
    default_temperature: float,
    bias: Any = None,
    target: Tensor | None = None,
    labels: Tensor | None = None,
    col_labels: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str,
    normalize: bool,
    memory_budget: int | None,
    backend: str,
) -> Tensor | None:
    """The loss, or None where Python has to look at the call. Arguments are those of the loss, as they were given."""
    if torch.compiler.is_compiling() or not eager.is_open():
        return None
    matrices, numbers = (_NUMBERS[kind], form, x, y), (scale, temperature, default_temperature, bias)
    options = (reduction, normalize, memory_budget, backend)
    loss: Tensor | None = None
    if _LOSS is not None:
        loss = _LOSS(*matrices, *numbers, target, labels, col_labels, weight, *options)
    if loss is None and _takes_reference(backend):
        loss = _dense(kind, form, x, y, *numbers, (weight, target, labels, col_labels), *options)
    return loss


def is_off(*options: Any) -> bool:
    """Whether options are their default of 0.0, without looking into tensors."""
    return all(type(option) is float and option == 0.0 for option in options)


def _dense(
    kind: str,
    form: int,
    x: Any,
    y: Any,
    scale: Any,
    temperature: Any,
    default_temperature: float,
    bias: Any,
    rows: tuple[Any, ...],
    reduction: str,
    normalize: bool,
    memory_budget: int | None,
    backend: str,
) -> Tensor | None:
    """The loss by the reference, or None; `rows` are weight, target, labels and col_labels."""
    budget = DEFAULT_MEMORY_BUDGET if memory_budget is None else memory_budget
    known = reduction in REDUCTIONS and type(normalize) is bool and type(budget) is int and budget >= 0
    if not known or (temperature is not None and scale is not None):
        return None
    inverted, factor = scale is None, temperature if scale is None else scale
    factor = default_temperature if factor is None else factor
    if not is_for_dense(form, x, y, normalize, (factor, bias), rows):
        return None
    number, bias_number, has_bias = 1.0, 0.0, bias is not None
    if isinstance(factor, float):
        if inverted and not factor > 0:
            return None
        number, factor, inverted = 1 / factor if inverted else factor, None, False
    if isinstance(bias, float):
        bias_number, bias = bias, None
    reduced, own = REDUCTIONS.index(reduction), (x, y, factor, bias, *rows)
    call = Call(_NUMBERS[kind], form, reduced, normalize, inverted, number, bias_number, budget, has_bias)
    return dense_loss(call, own)


def _takes_reference(backend: object) -> bool:
    if backend == "auto":
        chosen = os.environ.get(backends.ENVIRONMENT_VARIABLE, "")
        # One call goes by the operator and says why the reference is taken.
        return chosen == "reference" or (not chosen and extension.load() is None and backends.has_warned())
    return backend == "reference"


def _second_derivative(tensors: tuple[Tensor | None, ...], d_loss: Tensor, *call: Any) -> tuple[Tensor | None, ...]:
    return gradients_again(Call(*call), tensors, d_loss, "cpu" if d_loss.device.type == "cpu" else "cuda")


_LOSS = eager.function("loss", _second_derivative)
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
