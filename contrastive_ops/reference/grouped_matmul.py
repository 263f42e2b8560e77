"""grouped_matmul in plain PyTorch: one matrix product per group, in the accumulation dtype.

Reads the offsets, so on a GPU every call waits for the device.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from .._checks import accumulator


def forward(a: Tensor, b: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Every row of (R, D) times the matrix of its group plus the bias of its group: (R, F)."""
    dtype = accumulator(a.dtype)
    out = a.new_zeros((a.shape[0], b.shape[2]))
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        product = a[begin:end].to(dtype) @ b[e].to(dtype)
        out[begin:end] = product if bias is None else product + bias[e].to(dtype)
    return out


def outer(a: Tensor, g: Tensor, offsets: Tensor, wants_b: bool, wants_bias: bool) -> tuple[Tensor, Tensor]:
    """Sums over the rows of each group, of the outer products of a (R, D) and g (R, F), and of g."""
    dtype, groups = accumulator(a.dtype), offsets.shape[0] - 1
    db = a.new_empty((groups if wants_b else 0, a.shape[1], g.shape[1]))
    dbias = a.new_empty((groups if wants_bias else 0, g.shape[1]))
    for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
        rows = g[begin:end].to(dtype)
        if wants_b:
            db[e] = a[begin:end].to(dtype).T @ rows
        if wants_bias:
            dbias[e] = rows.sum(0)
    return db, dbias
