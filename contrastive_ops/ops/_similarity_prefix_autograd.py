"""torch.library operators of similarity_prefix: schema, fake, autograd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import autocast
from ..core.backends import Backend
from ..core.checks import accumulator, check_index_values
from ..core.derivatives import alias, grad
from ..core.operators import call, define
from ..reference import similarity_prefix as reference

_TENSORS = "Tensor x, Tensor? y, Tensor scale, Tensor? target, Tensor? differ_rows, Tensor? differ_cols"
_PROBLEM = f"{_TENSORS}, int[] dims, SymInt? diagonal, bool normalize"
_FORWARD = f"({_PROBLEM}, int directions, str backend) -> (Tensor rows, Tensor cols, Tensor target_logit)"
_BACKWARD = (
    f"({_PROBLEM}, Tensor rows, Tensor cols, Tensor? d_rows, Tensor? d_cols, Tensor? d_target, int needs,"
    " str backend) -> (Tensor dx, Tensor dy, Tensor dscale)"
)

# Arguments of a problem: x, y and scale are differentiable; bit b of `needs` stands for the b-th of them.
_TARGET, _DIMS, _END = 3, 6, 9


def register(backends: Mapping[str, Backend]) -> None:
    """Define the operators; `backends` says where each backend's functions are."""

    def of_stem(name: str) -> Any:
        def function(*arguments: Any) -> Any:
            *problem, backend = arguments
            x, y, target = problem[0], problem[1], problem[_TARGET]
            if target is not None:
                check_index_values("similarity_prefix", "target", target, (x if y is None else y).shape[0])
            with autocast.disabled(x):
                return getattr(backends[backend].functions(), name)(*problem)

        return function

    for name, schema, fake, setup, derivative in (
        ("forward", _FORWARD, _forward_fake, _forward_setup, _forward_derivative),
        ("backward", _BACKWARD, _backward_fake, _backward_setup, _backward_derivative),
    ):
        define(f"similarity_prefix_{name}", schema, of_stem(name), fake, setup, derivative)


# ---- forward ---------------------------------------------------------------------------------------------------------


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, y, _, target, _, _, dims, _, _, directions, _ = arguments
    n, m, prefixes = x.shape[0], x.shape[0] if y is None else y.shape[0], len(dims)
    shapes = [
        (prefixes, n if directions & 1 else 0),
        (prefixes, m if directions & 2 else 0),
        (prefixes, 0 if target is None else n),
    ]
    return tuple(x.new_empty(shape, dtype=accumulator(x.dtype)) for shape in shapes)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, cols, _ = output
    ctx.save_for_backward(*inputs[:_DIMS], rows, cols)
    ctx.set_materialize_grads(False)
    ctx.options, ctx.directions, ctx.backend = inputs[_DIMS:_END], inputs[_END], inputs[-1]


def _forward_derivative(ctx: Any, d_rows: Any, d_cols: Any, d_target: Any) -> tuple[Any, ...]:
    *problem, rows, cols = ctx.saved_tensors
    rest = (None,) * 8
    # An output that was not asked for is empty, and so is whatever gradient arrives for it.
    wanted = (ctx.directions & 1, ctx.directions & 2, problem[_TARGET] is not None)
    upstream = [d if want else None for d, want in zip((d_rows, d_cols, d_target), wanted, strict=True)]
    if all(d is None for d in upstream):
        return None, None, None, *rest
    needs = sum(1 << bit for bit in range(3) if ctx.needs_input_grad[bit])
    gradients = call.similarity_prefix_backward(*problem, *ctx.options, rows, cols, *upstream, needs, ctx.backend)
    dims, _, normalize = ctx.options
    if normalize and problem[0].dtype == torch.float16:
        dx, dy, dscale = gradients
        gradients = _within_float16(problem[0], dx, dims[0]), _within_float16(problem[1], dy, dims[0]), dscale
    return *_to_inputs(problem, gradients, needs), *rest


def _within_float16(x: Tensor | None, gradient: Tensor, shortest: int) -> Tensor:
    """The gradient without what float16 cannot hold in rows whose first prefix is 0.

    Such a prefix has a constant factor of 1e12 in place of its inverse length, which turns the rounding of terms that
    cancel into infinity.
    """
    if x is None or not gradient.shape[0]:
        return gradient
    zero = (x[:, :shortest] == 0).all(1, keepdim=True)
    beyond = (gradient.abs() > torch.finfo(torch.float16).max) & gradient.isfinite()
    return gradient.masked_fill(zero & beyond, 0.0)


def _to_inputs(problem: list[Any], gradients: Any, needs: int) -> tuple[Any, ...]:
    return tuple(
        gradient.to(tensor.dtype) if needs >> bit & 1 and tensor is not None else None
        for bit, (tensor, gradient) in enumerate(zip(problem[:_TARGET], gradients, strict=True))
    )


# ---- backward --------------------------------------------------------------------------------------------------------


def _backward_fake(x: Tensor, y: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    needs, dtype = arguments[-2], accumulator(x.dtype)
    m, d = (x if y is None else y).shape
    shapes: list[tuple[Any, ...]] = [
        (x.shape[0] if needs & 1 else 0, d),
        (m if needs & 2 and y is not None else 0, d),
        () if needs & 4 else (0,),
    ]
    return tuple(x.new_empty(shape, dtype=dtype) for shape in shapes)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *saved, ctx.needs, _ = inputs[_END:]
    ctx.save_for_backward(*inputs[:_DIMS], *saved)
    ctx.set_materialize_grads(False)
    ctx.options = inputs[_DIMS:_END]


def _backward_derivative(ctx: Any, *d_gradients: Tensor | None) -> tuple[Any, ...]:
    """The second derivative: autograd through the chunked reference, whatever the backend was."""
    saved = ctx.saved_tensors
    with torch.enable_grad(), autocast.disabled(saved[0]):
        # Aliases: only what this operator itself does with an input counts, not how the folds came from x.
        tensors = [alias(t) for t in saved]
        leaves = [a for a in tensors if a is not None and a.requires_grad]
        arguments: list[Any] = [*tensors[:_DIMS], *ctx.options, *tensors[_DIMS:], ctx.needs]
        outputs = reference.backward(*arguments)
        pairs = [(o, d) for o, d in zip(outputs, d_gradients, strict=True) if d is not None and o.requires_grad]
        found = iter(grad([o for o, _ in pairs], leaves, [d for _, d in pairs]))
    gradients = [next(found) if a is not None and a.requires_grad else None for a in tensors]
    return *gradients[:_DIMS], None, None, None, *gradients[_DIMS:], None, None
