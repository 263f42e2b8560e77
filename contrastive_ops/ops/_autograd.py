"""What the operators of all primitives share in autograd: which gradients are needed, their shapes.

The first five inputs of every operator are x, y, scale, row_bias, col_bias; bit b of `needs` stands for input b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_inputs(inputs: list[Any], gradients: Any, needs: int) -> tuple[Any, ...]:
    """Gradients in the dtype of the first five inputs; None where none is needed."""
    return tuple(
        gradient.to(tensor.dtype) if needs >> bit & 1 and tensor is not None else None
        for bit, (tensor, gradient) in enumerate(zip(inputs[:5], gradients, strict=True))
    )


def gradient_shapes(x: Tensor, y: Tensor | None, scale: Tensor, needs: int) -> list[tuple[Any, ...]]:
    """The shapes of the gradients of the first five inputs; one that is not needed has no rows."""
    rows, depth = x.shape
    columns = rows if y is None else y.shape[0]
    wants = [bool(needs >> bit & 1) for bit in range(5)]
    wants[1] = wants[1] and y is not None
    shapes = [(rows, depth), (columns, depth), tuple(scale.shape), (rows,), (columns,)]
    return [shape if want else (0, *shape[1:]) for shape, want in zip(shapes, wants, strict=True)]


def needed(ctx: Any) -> int:
    """`needs` of a forward operator's context."""
    return sum(1 << bit for bit in range(5) if ctx.needs_input_grad[bit])


def alias(t: Any) -> Any:
    """The same numbers as another node of the graph."""
    return t if t is None or not t.is_floating_point() else t.view_as(t)


def grad(outputs: list[Tensor], inputs: list[Tensor], d_outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` that can be differentiated again, with None for what does not take part."""
    if not outputs or not inputs:
        return (None,) * len(inputs)
    return torch.autograd.grad(outputs, inputs, d_outputs, create_graph=True, allow_unused=True)
