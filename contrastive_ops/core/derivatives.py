"""What the operators of all primitives share in autograd: which gradients are needed, their shapes.

The first five inputs of every operator are x, y, scale, row_bias, col_bias; bit b of `needs` stands for input b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import autocast


def to_inputs(inputs: list[Any], gradients: Any, needs: int) -> tuple[Any, ...]:
    """Gradients in the dtype of the first inputs; None where none is needed."""
    return tuple(
        gradient.to(tensor.dtype) if needs >> bit & 1 and tensor is not None else None
        for bit, (tensor, gradient) in enumerate(zip(inputs[: len(gradients)], gradients, strict=True))
    )


def gradient_shapes(x: Tensor, y: Tensor | None, scale: Tensor, needs: int) -> list[tuple[Any, ...]]:
    """The shapes of the gradients of the first five inputs; one that is not needed has no rows."""
    rows, depth = x.shape
    columns = rows if y is None else y.shape[0]
    wants = [bool(needs >> bit & 1) for bit in range(5)]
    wants[1] = wants[1] and y is not None
    shapes = [(rows, depth), (columns, depth), tuple(scale.shape), (rows,), (columns,)]
    return [shape if want else (0, *shape[1:]) for shape, want in zip(shapes, wants, strict=True)]


def needed(ctx: Any, inputs: int = 5) -> int:
    """`needs` of a forward operator's context, of its first inputs."""
    return sum(1 << bit for bit in range(inputs) if ctx.needs_input_grad[bit])


def alias(t: Any) -> Any:
    """The same numbers as another node of the graph."""
    if t is None or not t.is_floating_point():
        return t
    same = t.view_as(t)
    functorch = torch._C._functorch
    if same.requires_grad or not functorch.is_gradtrackingtensor(t) or functorch.maybe_get_level(t) >= 0:
        return same
    # The pullback of torch.func.vjp runs when its transform has ended, and nothing that was saved requires a gradient.
    allowed = functorch.get_inplace_requires_grad_allowed()
    functorch.set_inplace_requires_grad_allowed(True)
    try:
        return same.detach().requires_grad_()
    finally:
        functorch.set_inplace_requires_grad_allowed(allowed)


def grad(outputs: list[Tensor], inputs: list[Tensor], d_outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` that can be differentiated again, with None for what does not take part."""
    if not outputs or not inputs:
        return (None,) * len(inputs)
    return torch.autograd.grad(outputs, inputs, d_outputs, create_graph=True, allow_unused=True)


def second_derivative(
    function: Callable[..., Tensor],
    inputs: list[Any],
    d_values: Tensor,
    d_gradients: tuple[Tensor | None, ...],
    needs: int,
) -> tuple[Tensor | None, ...]:
    """Differentiate the gradients of ``function(*inputs)`` by the inputs and by `d_values`, their upstream gradient.

    `d_gradients` are those of the gradients of the inputs; bit b of `needs` says whether that of input b was asked for.
    Aliases: only what the operator itself does with an input counts, not how its other inputs came from it.
    """
    with torch.enable_grad(), autocast.disabled(inputs[0]):
        leaves = [alias(t) for t in (*inputs, d_values)]
        differentiable = [t is not None and t.requires_grad for t in leaves]
        wanted = [t for t, wants in zip(leaves, differentiable, strict=True) if wants]
        sources = [t for t, wants in zip(leaves[:-1], differentiable, strict=False) if wants]
        first = iter(grad([function(*leaves[:-1])], sources, [leaves[-1]]))
        by_input = [next(first) if wants else None for wants in differentiable[:-1]]
        pairs = [
            (g, d)
            for bit, (g, d) in enumerate(zip(by_input, d_gradients, strict=True))
            if g is not None and d is not None and needs >> bit & 1
        ]
        found = iter(grad([g for g, _ in pairs], wanted, [d.to(g.dtype) for g, d in pairs]))
    return tuple(next(found) if wants else None for wants in differentiable)
