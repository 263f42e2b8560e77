"""expert_routing by CUDA kernels: launchers with the names and arguments of reference/expert_routing.py."""

from __future__ import annotations

from torch import Tensor

from .._cuda import kernels


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if each is None else each.contiguous() for each in tensors]


def dispatch(tokens: Tensor, gates: Tensor | None, slots: Tensor, order: Tensor) -> Tensor:
    """(R, D): each row the token that it was given to, times its gate if there are gates; 0 where there is none."""
    rows = tokens.new_empty((order.shape[0], tokens.shape[1]))
    T, k = slots.shape
    kernels().cuda_expert_routing_dispatch(*_dense(tokens, gates, order, rows), T, k, *rows.shape)
    return rows


def combine(rows: Tensor, gates: Tensor | None, slots: Tensor, order: Tensor) -> Tensor:
    """(T, D): each token's rows, times their gates if there are gates, summed in the order of its choices."""
    T, k = slots.shape
    tokens = rows.new_empty((T, rows.shape[1]))
    kernels().cuda_expert_routing_combine(*_dense(rows, gates, slots, tokens), T, k, *rows.shape)
    return tokens
