"""What lies between the two layers of experts: an activation, or one half of each row gated by the other.

An operator on the CPU, because torch's passes over the rows are not among the tasks that the products are cut into.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import autocast
from ..core.backends import choose
from ..core.derivatives import second_derivative
from ..core.operators import call, define
from ..reference import grouped_matmul as reference
from .grouped_matmul import BACKENDS

NAMES = tuple(reference.ACTIVATIONS)


def activate(hidden: Tensor, activation: str, gated: bool, backend: str) -> Tensor:
    """The activation of rows (R, F); of gated rows (R, 2 F) that of the left half, times the right one."""
    kind, backend = NAMES.index(activation), choose("grouped_matmul", BACKENDS, hidden, backend)
    if backend != "cpu":
        return reference.activate(hidden, kind, gated)
    return call.grouped_matmul_activate(hidden, kind, gated, backend)


def _forward(hidden: Tensor, activation: int, gated: bool, backend: str) -> Tensor:
    with autocast.disabled(hidden):
        return BACKENDS[backend].functions().activate(hidden, activation, gated)


def _forward_fake(hidden: Tensor, activation: int, gated: bool, backend: str) -> Tensor:
    return hidden.new_empty((hidden.shape[0], hidden.shape[1] // 2 if gated else hidden.shape[1]))


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, ctx.activation, ctx.gated, ctx.backend = inputs
    ctx.save_for_backward(hidden)


def _forward_derivative(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    (hidden,) = ctx.saved_tensors
    found = call.grouped_matmul_activate_backward(g, hidden, ctx.activation, ctx.gated, ctx.backend)
    return found, None, None, None


def _backward(g: Tensor, hidden: Tensor, activation: int, gated: bool, backend: str) -> Tensor:
    with autocast.disabled(hidden):
        return BACKENDS[backend].functions().activate_backward(g, hidden, activation, gated)


def _backward_fake(g: Tensor, hidden: Tensor, activation: int, gated: bool, backend: str) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    g, hidden, ctx.activation, ctx.gated, _ = inputs
    ctx.save_for_backward(g, hidden)


def _backward_derivative(ctx: Any, d_gradient: Tensor) -> tuple[Tensor | None, ...]:
    g, hidden = ctx.saved_tensors

    def value(hidden: Tensor) -> Tensor:
        return reference.activate(hidden, ctx.activation, ctx.gated)

    d_hidden, d_g = second_derivative(value, [hidden], g, (d_gradient,), 1)
    return d_g, d_hidden, None, None, None


define(
    "grouped_matmul_activate",
    "(Tensor hidden, int activation, bool gated, str backend) -> Tensor",
    _forward,
    _forward_fake,
    _forward_setup,
    _forward_derivative,
)
define(
    "grouped_matmul_activate_backward",
    "(Tensor g, Tensor hidden, int activation, bool gated, str backend) -> Tensor",
    _backward,
    _backward_fake,
    _backward_setup,
    _backward_derivative,
)
