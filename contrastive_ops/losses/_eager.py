"""Losses of plain tensors on the CPU with their usual options, checked and differentiated in C++ (csrc/eager.cpp).

A step with few rows is mostly host time, and most of that is Python. `eager_loss` returns None for every call that is
not for it, or that has something to refuse; the loss then goes on in Python and words the error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import autocast, eager
from ..core.derivatives import alias, grad
from ..core.ordered import repeated
from ..core.rules import Pairs
from ..core.unit_rows import unit_rows
from ..ops.similarity_loss import similarity_loss
from ..reference.row_losses import KINDS, REDUCTIONS
from ._labels import one_positive

# How rows meet: y has a column for each row and maybe more; row i of y belongs to row i of x; both stacked are compared
# with themselves; rows of one label belong together. csrc/eager.cpp has the same numbers.
COLUMNS, PARTNERS, STACKED, LABELLED = range(4)


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
    if torch.compiler.is_compiling() or _LOSS is None or not eager.is_open():
        return None
    loss: Tensor | None = _LOSS(
        _NUMBERS[kind],
        form,
        x,
        y,
        scale,
        temperature,
        default_temperature,
        bias,
        target,
        labels,
        col_labels,
        weight,
        reduction,
        normalize,
        memory_budget,
        backend,
    )
    return loss


def is_off(*options: Any) -> bool:
    """Whether options are their default of 0.0, without looking into tensors."""
    return all(type(option) is float and option == 0.0 for option in options)


def _second_derivative(
    tensors: tuple[Tensor | None, ...],
    d_loss: Tensor,
    kind: int,
    form: int,
    reduction: int,
    normalize: bool,
    inverted: bool,
    number: float,
    bias_number: float,
    memory_budget: int,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, y, scale or temperature, bias and weight as functions of them, by the operator."""
    target, labels, col_labels = tensors[5:]
    with torch.enable_grad(), autocast.disabled(d_loss):
        leaves = [alias(each) for each in tensors[:5]]
        x, y, factor, bias, weight = leaves
        scale = number if factor is None else factor.reshape(()).reciprocal() if inverted else factor
        x, y = (unit_rows(each) if normalize and each is not None else each for each in (x, y))
        options: dict[str, Any] = {"target": target}
        if form == STACKED:
            x, y, options = torch.cat([x, y]), None, {"pairs": Pairs(diagonal=0)}
        elif form == LABELLED:
            ids = (labels, labels if col_labels is None else col_labels)
            diagonal = 0 if y is None else None
            target, count = one_positive(*(labels, col_labels))  # type: ignore[arg-type]
            rules = {"pairs": Pairs(diagonal=diagonal, differ=ids), "positives": Pairs(diagonal=diagonal, same=ids)}  # type: ignore[arg-type]
            options = {"target": target, "count": count, **rules}
        if KINDS[kind] == "sigmoid":
            one = d_loss.new_full((), bias_number) if bias is None else bias.reshape(())
            options["row_bias"] = repeated(one, x.shape[0])
        loss = similarity_loss(
            x,
            y,
            kind=KINDS[kind],
            scale=scale,
            weight=weight,
            reduction=REDUCTIONS[reduction],
            memory_budget=memory_budget,
            backend="cpu",
            **options,
        )
        wanted = [each for each in leaves if each is not None and each.requires_grad]
        found = iter(grad([loss], wanted, [d_loss]))
    return tuple(next(found) if each is not None and each.requires_grad else None for each in leaves)


_LOSS = eager.connect(_second_derivative)
_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}
