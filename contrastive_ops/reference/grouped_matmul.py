"""grouped_matmul in plain PyTorch: one matrix product per group, in the accumulation dtype.

Reads the offsets, so on a GPU every call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.checks import accumulator
from ..core.ordered import long_product
from .expert_routing import dispatch

# Between the layers of experts, in the order of csrc/grouped_matmul.h.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


def activate(hidden: Tensor, activation: int, gated: bool) -> Tensor:
    """The activation of rows (R, F); of gated rows (R, 2 F) that of the left half, times the right one."""
    function = [*ACTIVATIONS.values()][activation]
    if not gated:
        return function(hidden)
    gate, other = hidden.chunk(2, dim=1)
    return function(gate) * other


def activate_backward(g: Tensor, hidden: Tensor, activation: int, gated: bool) -> Tensor:
    """The gradient of `hidden` where g arrives at the result."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        (found,) = torch.autograd.grad(activate(leaf, activation, gated), leaf, g)
    return found


def forward(
    a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None, slots: Tensor | None, order: Tensor | None
) -> Tensor:
    """Every row (R, D) times the matrix of its group plus the bias of its group: (R, F)."""
    dtype = accumulator(a.dtype)
    out = a.new_zeros((a.shape[0] if order is None else order.shape[0], b.shape[2]))
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        product = _rows(a, slots, order, begin, end).to(dtype) @ b[e].to(dtype)
        out[begin:end] = product if bias is None else product + bias[e].to(dtype)
    return out


def outer(
    a: Tensor,
    g: Tensor,
    offsets: Tensor,
    slots: Tensor | None,
    order: Tensor | None,
    transposed: bool,
    wants_b: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Sums over the rows of each group, of the outer products of a row (R, D) and g (R, F), and of g.

    `transposed`: the products are stored as (E, F, D).
    """
    dtype, groups = accumulator(a.dtype), offsets.shape[0] - 1
    sides = (g.shape[1], a.shape[1]) if transposed else (a.shape[1], g.shape[1])
    db = a.new_empty((groups if wants_b else 0, *sides))
    db = db.transpose(1, 2) if transposed else db
    dbias = a.new_empty((groups if wants_bias else 0, g.shape[1]))
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        rows = g[begin:end].to(dtype)
        if wants_b:
            db[e] = long_product(_rows(a, slots, order, begin, end).to(dtype).T, rows)
        if wants_bias:
            dbias[e] = rows.sum(0)
    return db, dbias


def _rows(a: Tensor, slots: Tensor | None, order: Tensor | None, begin: int, end: int) -> Tensor:
    """Rows of `a`, or those that its tokens have in an order."""
    if slots is None or order is None:
        return a[begin:end]
    return dispatch(a, None, slots, order[begin:end])
