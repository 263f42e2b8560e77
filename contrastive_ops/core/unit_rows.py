"""Rows of length 1, as one operator.

torch's normalisation is four operations, whose gradients take four times as long as the closed form here: for small
dimensions longer than the rest of a loss that is not its sweep.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import autocast, checks, eager
from .checks import may_read
from .masks import left_out
from .operators import call, define

# As torch.nn.functional.normalize: shorter rows are divided by this.
SHORTEST = 1e-12


def unit_rows(x: Tensor) -> Tensor:
    """``F.normalize(x, dim=-1)``, with the length computed in at least float32; differentiable twice."""
    found: Tensor = call.unit_rows(x)[0]
    return found


def inverse_lengths(x: Tensor) -> Tensor:
    """(..., 1) 1 / the length of each row, which is as long as `SHORTEST` at least."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(SHORTEST).reciprocal()


def parts_of(gradient: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a gradient lies along each unit row, (..., 1), and what is left of it, which alone turns the row."""
    along = (unit * gradient).sum(-1, keepdim=True)
    return along, torch.addcmul(gradient, unit, along, value=-1)


def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit rows and (..., 1) the inverse lengths, in the accumulation dtype."""
    with autocast.disabled(x):
        wide = x.to(checks.accumulator(x.dtype))
        inverse = inverse_lengths(wide)
        return (wide * inverse).to(x.dtype), inverse


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=checks.accumulator(x.dtype))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, d_unit: Tensor | None, d_inverse: Tensor | None) -> Tensor | None:
    x, inverse = ctx.saved_tensors
    with autocast.disabled(x):
        dx = None if d_unit is None else _by_rows(x, inverse, d_unit)
        if d_inverse is not None:
            of_length = -d_inverse * inverse.square() * (x.to(inverse.dtype) * inverse)
            dx = of_length if dx is None else dx + of_length
    return None if dx is None else dx.to(x.dtype)


def _by_rows(x: Tensor, inverse: Tensor, d_unit: Tensor) -> Tensor:
    """What remains of the gradient across the row, over its length; made of operations that can be differentiated."""
    d_unit, unit = d_unit.to(inverse.dtype), x.to(inverse.dtype) * inverse
    along, beside = parts_of(d_unit, unit)
    dx = beside * inverse
    if not may_read(along) or not math.isfinite(along.detach().sum().item()):
        # A row that nothing depends on has no gradient, whatever it holds.
        dx = left_out(dx, (d_unit != 0).any(-1))
    return dx


def _again(x: Tensor, d_unit: Tensor) -> Tensor:
    """The gradient by rows, to be differentiated: what csrc/eager_unit_rows.h calls."""
    with autocast.disabled(x):
        return _by_rows(x, inverse_lengths(x.to(checks.accumulator(x.dtype))), d_unit).to(x.dtype)


_EAGER = eager.function("unit_rows", _again)


def _in_cpp(x: Tensor) -> tuple[Tensor, None] | None:
    unit = None if _EAGER is None else _EAGER(x)
    return None if unit is None else (unit, None)  # nobody but the derivative of the operator reads inverse lengths


_SCHEMA = "(Tensor x) -> (Tensor unit, Tensor inverse)"
define("unit_rows", _SCHEMA, _forward, _fake, _setup, _derivative, _in_cpp)
