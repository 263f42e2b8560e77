"""A loss of plain tensors as one call: what csrc/eager.cpp and `_dense` take, and its second derivative."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import autocast
from ..core.derivatives import alias, grad
from ..core.ordered import repeated
from ..core.problem import Problem
from ..core.rules import Pairs
from ..ops.similarity_loss import similarity_loss
from ..reference.row_losses import KINDS, REDUCTIONS
from ._arguments import in_sweep, unit_sides
from ._labels import one_positive

# How rows meet: y has a column for each row and maybe more; row i of y belongs to row i of x; both stacked are compared
# with themselves; rows of one label belong together. csrc/eager_problem.h has the same numbers.
COLUMNS, PARTNERS, STACKED, LABELLED = range(4)


class Call(NamedTuple):
    """What a loss is asked for, beside its tensors (x, y, scale or temperature, bias, weight, target, both labels).

    `kind` and `reduction` are places in KINDS and REDUCTIONS. Where there is no tensor `number` is the scale; a tensor
    is a temperature if `inverted`. `bias_number` goes with `has_bias`, where no tensor is one.
    """

    kind: int
    form: int
    reduction: int
    normalize: bool
    inverted: bool
    number: float
    bias_number: float
    memory_budget: int
    has_bias: bool = False


def gradients_again(
    call: Call, tensors: tuple[Tensor | None, ...], d_loss: Tensor, backend: str
) -> tuple[Tensor | None, ...]:
    """The gradients of x, y, scale or temperature, bias and weight as functions of them, by the operator."""
    kind, form, target, labels, col_labels = KINDS[call.kind], call.form, *tensors[5:]
    with torch.enable_grad(), autocast.disabled(d_loss):
        leaves = [alias(each) for each in tensors[:5]]
        x, y, factor, bias, weight = leaves
        scale = call.number if factor is None else factor.reshape(()).reciprocal() if call.inverted else factor
        unit = x is not None and in_sweep(call.normalize, x)
        sides = unit_sides(call.normalize, *(each for each in (x, y) if each is not None))
        x, y = (*sides, None)[:2]
        rules: dict[str, Any] = {}
        if form == STACKED:
            x, y, rules = torch.cat(sides), None, {"pairs": Pairs(diagonal=0)}
        elif form == LABELLED:
            ids = (labels, labels if col_labels is None else col_labels)
            diagonal = 0 if y is None else None
            target, count = one_positive(*(labels, col_labels))  # type: ignore[arg-type]
            rules = {"pairs": Pairs(diagonal=diagonal, differ=ids), "positives": Pairs(diagonal=diagonal, same=ids)}  # type: ignore[arg-type]
            rules["count"] = count
        row_bias = None
        if kind == "sigmoid":
            one = d_loss.new_full((), call.bias_number) if bias is None else bias.reshape(())
            row_bias = repeated(one, x.shape[0])
        loss = similarity_loss(
            Problem.of(("similarity_loss", "x", "y"), x, y, row_bias, target=target),
            kind=kind,
            scale=scale,
            weight=weight,
            reduction=REDUCTIONS[call.reduction],
            unit=unit,
            memory_budget=call.memory_budget,
            backend=backend,
            **rules,
        )
        wanted = [each for each in leaves if each is not None and each.requires_grad]
        found = iter(grad([loss], wanted, [d_loss]))
    return tuple(next(found) if each is not None and each.requires_grad else None for each in leaves)
