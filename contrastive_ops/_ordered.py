"""Sums whose bits do not depend on the number of threads.

torch splits one long sum among its threads. Here it is cut into parts that are too short for that; on a GPU nothing has
to be done. Two operators, each the other's derivative: a traced program does not see the parts, whose number would bind
it to one batch size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import define

# Half of the size from which torch splits a sum.
PART = 1 << 14


def in_parts(values: Tensor) -> Tensor:
    """The sum of a vector, for operators, which autograd does not look into."""
    parts = [values.sum()] if values.is_cuda else [part.sum() for part in values.split(PART)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def ordered_sum(values: Tensor) -> Tensor:
    """``values.sum()`` of a vector, differentiable, with the same bits for any number of threads."""
    return values.sum() if values.is_cuda else torch.ops.contrastive_ops.ordered_sum(values)


def repeated(value: Tensor, size: int) -> Tensor:
    """``value.expand(size)`` of a 0-d tensor, whose gradient is an `ordered_sum`."""
    return torch.ops.contrastive_ops.repeated(value, size)


def ordered_logsumexp(values: Tensor) -> Tensor:
    """``values.logsumexp(0)`` of a vector in the same way; -inf with gradient 0 where all of them are, or none are."""
    if not values.shape[0]:
        return values.sum() - torch.inf
    top = values.detach().amax()
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = ordered_sum((values - top).exp())
    empty = total == 0
    return torch.where(empty, -torch.inf, top + torch.where(empty, 1.0, total).log())


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size = inputs[0].shape[0]


def _repeated_fake(value: Tensor, size: int) -> Tensor:
    return value.new_empty((size,))


for _name, _schema, _function, _fake, _setup, _derivative in (
    (
        "ordered_sum",
        "(Tensor values) -> Tensor",
        in_parts,
        lambda values: values.new_empty(()),
        _sum_setup,
        lambda ctx, d_sum: repeated(d_sum, ctx.size),
    ),
    (
        "repeated",
        "(Tensor value, SymInt size) -> Tensor",
        lambda value, size: value.expand(size).contiguous(),
        _repeated_fake,
        lambda ctx, inputs, output: None,
        lambda ctx, d_repeated: (ordered_sum(d_repeated), None),
    ),
):
    define(_name, _schema, _function, _fake, _setup, _derivative)
