"""torch.library operators of similarity_reduce: schema, fake, autograd.

One operator per direction, plus the weighted total that forms its gradients in the forward pass. They exist without
the compiled extension, so that tracing, export and meta tensors never depend on it. What needs a gradient is an
argument: inside an operator grad mode says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _autocast
from .._checks import accumulator, check_index_values
from .._dispatch import Backend
from ..reference import similarity_reduce as reference

# Not torch.library.custom_op, whose first call imports torch._dynamo: three seconds and 150 MiB for a plain evaluation.
_LIBRARY = torch.library.Library("contrastive_ops", "FRAGMENT")

_PROBLEM = "Tensor x, Tensor? y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor{q} target, SymInt? diagonal"
_FORWARD = f"({_PROBLEM.format(q='?')}, bool rows, bool cols, SymInt kept_size, str backend)" + (
    " -> (Tensor row_lse, Tensor col_lse, Tensor target_logit, Tensor kept)"
)
_BACKWARD = (
    f"({_PROBLEM.format(q='?')}, Tensor? row_lse, Tensor? col_lse, Tensor? d_rows, Tensor? d_cols, Tensor? d_target,"
    " Tensor kept, int needs, str backend)"
    " -> (Tensor dx, Tensor dy, Tensor dscale, Tensor drow_bias, Tensor dcol_bias)"
)
_TOTAL = (
    f"({_PROBLEM.format(q='')}, Tensor weight, Tensor? extra, Tensor? target_weight, int needs, str backend)"
    " -> (Tensor total, Tensor losses, Tensor target_logit, Tensor dx, Tensor dy, Tensor dscale, Tensor drow_bias,"
    " Tensor dcol_bias, Tensor dextra)"
)

# Inputs that can need a gradient; bit b of `needs` stands for input b.
_X, _Y, _SCALE, _ROW_BIAS, _COL_BIAS = range(5)


def register(backends: Mapping[str, Backend]) -> None:
    """Define the operators; `backends` says where each backend's functions are."""

    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *problem, backend = arguments
        _check_target(problem)
        with _autocast.disabled(problem[0]):
            return backends[backend].functions().forward(*problem)

    def backward(*arguments: Any) -> tuple[Tensor, ...]:
        *problem, backend = arguments
        with _autocast.disabled(problem[0]):
            return backends[backend].functions().backward(*problem)

    def total(*arguments: Any) -> tuple[Tensor, ...]:
        *problem, backend = arguments
        _check_target(problem)
        with _autocast.disabled(problem[0]):
            losses, target_logit, *gradients = backends[backend].functions().total(*problem)
        weight, target_weight = problem[7], problem[9]
        value = (weight * losses).sum()
        if target_weight is not None:
            value = value + (target_weight * target_logit).sum()
        return value, losses, target_logit, *gradients

    for name, schema, function, fake, setup, derivative in (
        ("forward", _FORWARD, forward, _forward_fake, _forward_setup, _forward_derivative),
        ("backward", _BACKWARD, backward, _backward_fake, _backward_setup, _backward_derivative),
        ("total", _TOTAL, total, _total_fake, _total_setup, _total_derivative),
    ):
        qualified = f"contrastive_ops::similarity_reduce_{name}"
        _LIBRARY.define(f"similarity_reduce_{name}{schema}")
        _LIBRARY.impl(f"similarity_reduce_{name}", function, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, fake, lib=_LIBRARY)
        torch.library.register_autograd(qualified, derivative, setup_context=setup, lib=_LIBRARY)


def _check_target(problem: list[Any]) -> None:
    x, y, target = problem[0], problem[1], problem[5]
    if target is not None:
        check_index_values("similarity_reduce", "target", target, len(x if y is None else y))


def _gradient_shapes(x: Tensor, y: Tensor | None, needs: int) -> list[tuple[Any, ...]]:
    rows, depth = x.shape
    columns = rows if y is None else y.shape[0]
    wants = [bool(needs >> bit & 1) for bit in range(5)]
    wants[_Y] = wants[_Y] and y is not None
    shapes = [(rows, depth), (columns, depth), (rows,), (rows,), (columns,)]
    return [shape if want else (0, *shape[1:]) for shape, want in zip(shapes, wants, strict=True)]


def _needs(ctx: Any) -> int:
    return sum(1 << bit for bit in range(5) if ctx.needs_input_grad[bit])


# ---- forward ---------------------------------------------------------------------------------------------------


def _forward_fake(  # noqa: PLR0913
    x: Tensor, y: Any, scale: Tensor, row_bias: Any, col_bias: Any, target: Any, diagonal: Any, rows: bool,
    cols: bool, kept_size: int, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = accumulator(x.dtype)
    columns = x if y is None else y
    sizes = (x.shape[0] if rows else 0, columns.shape[0] if cols else 0, 0 if target is None else x.shape[0], kept_size)
    return tuple(x.new_empty((size,), dtype=dtype) for size in sizes)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, diagonal, rows, cols, _, backend = inputs
    row_lse, col_lse, _, kept = output
    ctx.save_for_backward(*tensors, row_lse if rows else None, col_lse if cols else None, kept)
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # a gradient of zeros for `kept` would be as large as the matrix
    ctx.diagonal, ctx.backend = diagonal, backend


def _forward_derivative(ctx: Any, d_rows: Any, d_cols: Any, d_target: Any, _: Any) -> tuple[Any, ...]:
    *tensors, row_lse, col_lse, kept = ctx.saved_tensors
    no_gradients = (None,) * 11
    # An output that was not asked for is empty, and so is whatever gradient arrives for it.
    d_rows = None if row_lse is None else d_rows
    d_cols = None if col_lse is None else d_cols
    d_target = None if tensors[5] is None else d_target
    if d_rows is None and d_cols is None and d_target is None:
        return no_gradients
    needs = _needs(ctx)
    gradients = torch.ops.contrastive_ops.similarity_reduce_backward(
        *tensors, ctx.diagonal, row_lse, col_lse, d_rows, d_cols, d_target, kept, needs, ctx.backend
    )
    return _to_inputs(tensors, gradients, needs) + no_gradients[5:]


def _to_inputs(inputs: list[Any], gradients: Any, needs: int) -> tuple[Any, ...]:
    """Gradients in the dtype and shape of the first five inputs; None where none is needed."""
    result: list[Tensor | None] = []
    for bit, (tensor, gradient) in enumerate(zip(inputs[:5], gradients, strict=True)):
        if not needs >> bit & 1 or tensor is None:
            result.append(None)
        elif bit == _SCALE and tensor.dim() == 0:
            result.append(gradient.sum().to(tensor.dtype))
        else:
            result.append(gradient.to(tensor.dtype))
    return tuple(result)


# ---- backward --------------------------------------------------------------------------------------------------


def _backward_fake(x: Tensor, y: Any, *arguments: Any) -> tuple[Tensor, ...]:
    needs = arguments[-2]
    return tuple(x.new_empty(shape, dtype=accumulator(x.dtype)) for shape in _gradient_shapes(x, y, needs))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, kept, needs, _ = inputs
    diagonal = tensors.pop(6)
    ctx.save_for_backward(*tensors, kept)
    ctx.set_materialize_grads(False)
    ctx.diagonal, ctx.needs = diagonal, needs


def _backward_derivative(ctx: Any, *d_gradients: Any) -> tuple[Any, ...]:
    """The second derivative: autograd through the streamed reference, whatever the backend was."""
    *tensors, kept = ctx.saved_tensors
    with torch.enable_grad(), _autocast.disabled(tensors[0]):
        # Aliases: only what this operator itself does with an input counts, not how row_lse came from x.
        aliases = [t if t is None or not t.is_floating_point() else t.view_as(t) for t in tensors]
        leaves = [a for a in aliases if a is not None and a.requires_grad]
        arguments: list[Any] = [*aliases[:6], ctx.diagonal, *aliases[6:], kept, ctx.needs]
        outputs = reference.backward(*arguments)
        pairs = [(o, d) for o, d in zip(outputs, d_gradients, strict=True) if d is not None and o.requires_grad]
        found = iter(_grad([o for o, _ in pairs], leaves, [d for _, d in pairs]))
    gradients = [next(found) if a is not None and a.requires_grad else None for a in aliases]
    return (*gradients[:6], None, *gradients[6:], None, None, None)


def _grad(outputs: list[Tensor], inputs: list[Tensor], d_outputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    if not outputs or not inputs:
        return (None,) * len(inputs)
    return torch.autograd.grad(outputs, inputs, d_outputs, create_graph=True, allow_unused=True)


# ---- total -----------------------------------------------------------------------------------------------------


def _total_fake(
    x: Tensor, y: Any, scale: Tensor, row_bias: Any, col_bias: Any, target: Tensor, diagonal: Any, weight: Tensor,
    extra: Any, target_weight: Any, needs: int, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = x.shape[0]
    shapes = [(), (rows,), (rows,), *_gradient_shapes(x, y, needs), (0 if extra is None else rows,)]
    return tuple(x.new_empty(shape, dtype=accumulator(x.dtype)) for shape in shapes)


def _total_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, needs, backend = inputs
    diagonal = tensors.pop(6)
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.diagonal, ctx.needs, ctx.backend = diagonal, needs, backend


def _total_derivative(ctx: Any, d_total: Any, *_: Any) -> tuple[Any, ...]:
    inputs, (losses, target_logit, *gradients) = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    if d_total is None:
        return (None,) * 12
    if torch.is_grad_enabled():
        found = _total_again(ctx, inputs, d_total)
    else:
        # Out of place, so that the graph can be retained; float32 until the upstream factor is in.
        *gradients, dextra = (gradient * d_total for gradient in gradients)
        row_wise = (losses * d_total, dextra, target_logit * d_total)
        optional = (g if t is not None else None for t, g in zip(inputs[6:], row_wise, strict=True))
        found = (*_to_inputs(list(inputs), gradients, ctx.needs), None, *optional)
    return (*found[:6], None, *found[6:], None, None)


def _total_again(ctx: Any, inputs: tuple[Any, ...], d_total: Tensor) -> tuple[Any, ...]:
    """The same gradients as functions of the inputs, for second derivatives."""
    aliases = [t if t is None or not t.is_floating_point() else t.view_as(t) for t in inputs]
    *problem, weight, extra, target_weight = aliases
    lse, _, target_logit, _ = torch.ops.contrastive_ops.similarity_reduce_forward(
        *problem, ctx.diagonal, True, False, 0, ctx.backend
    )
    if extra is not None:
        lse = reference.merge_lse(lse, extra)
    total = (weight * -torch.nn.functional.logsigmoid(target_logit - lse)).sum()
    if target_weight is not None:
        total = total + (target_weight * target_logit).sum()
    leaves = [a for a in aliases if a is not None and a.requires_grad]
    found = iter(_grad([total], leaves, [d_total]))
    return tuple(next(found) if a is not None and a.requires_grad else None for a in aliases)
