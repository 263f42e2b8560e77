"""Sums whose bits do not depend on the number of threads, and whose digits do not depend on their length.

torch splits one long sum among its threads. Here it is cut into parts that are too short for that; on a GPU nothing has
to be done. Sums of many rows into few, which torch adds up one after another in the rows' dtype, are made in float64:
in float32 they drift, and end where a row is less than half of a last place. Pairs of operators, each the other's
derivative: a traced program does not see the parts, whose number would bind it to one batch size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .checks import accumulator
from .operators import call, define

# Half of the size from which torch splits a sum.
PART = 1 << 14
# Numbers that are converted to float64 at a time: few enough for a level-2 cache, or enough for a GPU.
_CONVERTED, _CONVERTED_ON_DEVICE = 1 << 16, 1 << 24
# Products that `long_product` adds up one after another.
_DEPTH = 64


def in_parts(values: Tensor) -> Tensor:
    """The sum of a vector, for operators, which autograd does not look into."""
    parts = [values.sum()] if values.is_cuda else [part.sum() for part in values.split(PART)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def ordered_sum(values: Tensor) -> Tensor:
    """``values.sum()`` of a vector, differentiable, with the same bits for any number of threads."""
    return values.sum() if values.is_cuda else call.ordered_sum(values)


def repeated(value: Tensor, size: int) -> Tensor:
    """``value.expand(size)`` of a 0-d tensor, whose gradient is an `ordered_sum`."""
    return call.repeated(value, size)


def ordered_logsumexp(values: Tensor) -> Tensor:
    """``values.logsumexp(0)`` of a vector in the same way; -inf with gradient 0 where all of them are, or none are."""
    if values.shape[0] == 0:
        return values.sum() - torch.inf
    top = values.detach().amax()
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = ordered_sum((values - top).exp())
    empty = total == 0
    return torch.where(empty, -torch.inf, top + torch.where(empty, 1.0, total).log())


def segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """(count, ...) the sums of the rows of each segment, differentiable; in the accumulation dtype of the rows.

    Args:
        values: (N, ...) floating.
        segments: (N,) int64 the segment of each row, in [0, count), or -1 for a row that is in none.
        count: how many there are.
    """
    return call.segment_sums(values, segments, count)


def segment_rows(table: Tensor, segments: Tensor) -> Tensor:
    """``table[segments]``, 0 where a segment is -1; its gradient is made of `segment_sums`."""
    return call.segment_rows(table, segments)


def wide_dtype(like: Tensor) -> torch.dtype:
    """The dtype in which millions of numbers of a tensor are added up one after another: float64 where there is one."""
    return torch.float64 if like.device.type != "mps" else torch.float32


def in_float64(x: Tensor) -> Tensor:
    """`x` in float64: on the CPU where its device has none, for what is small or needs the digits. Differentiable."""
    return (x if wide_dtype(x) == torch.float64 else x.cpu()).double()


def long_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for (N, K) and (K, D): where N or D is small, torch adds up millions of products one after another.

    Here they are cut into parts of K, whose sums are added in pairs. Differentiable.
    """
    K = a.shape[1]
    if K <= 256 * _DEPTH or min(a.shape[0], b.shape[1]) > 64:
        return a @ b
    parts, rest = K // _DEPTH, K // _DEPTH * _DEPTH
    left = a[:, :rest].reshape(a.shape[0], parts, _DEPTH).transpose(0, 1)
    product = torch.bmm(left, b[:rest].reshape(parts, _DEPTH, b.shape[1])).sum(0)
    return product + a[:, rest:] @ b[rest:] if rest < K else product


def add_segments(total: Tensor, values: Tensor, segments: Tensor) -> Tensor:
    """``total.index_add_(0, segments, values)``, for a chunk of many rows and a total of any size; eager only."""
    named, place = segments.unique(return_inverse=True)
    return total.index_add_(0, named, segment_sums(values, place, named.shape[0]).to(total.dtype))


def _segment_sums(values: Tensor, segments: Tensor, count: int) -> Tensor:
    shape = (count + 1, *values.shape[1:])  # the last one is that of rows in none
    place = torch.where(segments < 0, count, segments)
    dtype = accumulator(values.dtype)
    if wide_dtype(values) != torch.float64:
        step = max(1, -(-values.shape[0] // 64))
        parts = [
            values.new_zeros(shape, dtype=dtype).index_add_(0, place[begin : begin + step], part.to(dtype))
            for begin, part in _parts(values, step)
        ]
        return torch.stack(parts).sum(0)[:-1] if parts else values.new_zeros(shape, dtype=dtype)[:-1]
    total = values.new_zeros(shape, dtype=torch.float64)
    width = max(1, values[:1].numel())
    step = max(1, (_CONVERTED if values.device.type == "cpu" else _CONVERTED_ON_DEVICE) // width)
    for begin, part in _parts(values, step):
        total.index_add_(0, place[begin : begin + step], part.double())
    return total[:-1].to(dtype)


def _parts(values: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    for begin in range(0, values.shape[0], step):
        yield begin, values[begin : begin + step]


def _segment_rows(table: Tensor, segments: Tensor) -> Tensor:
    if table.shape[0] == 0:
        return table.new_zeros((segments.shape[0], *table.shape[1:]))
    rows = table.index_select(0, segments.clamp_min(0))
    return rows.masked_fill_((segments < 0).view(-1, *(1,) * (table.dim() - 1)), 0.0)


def _segment_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.dtype, ctx.rows = inputs[0].dtype, inputs[0].shape[0]


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
    (
        "segment_sums",
        "(Tensor values, Tensor segments, SymInt count) -> Tensor",
        _segment_sums,
        lambda values, segments, count: values.new_empty((count, *values.shape[1:]), dtype=accumulator(values.dtype)),
        _segment_setup,
        lambda ctx, d_sums: (segment_rows(d_sums, ctx.saved_tensors[0]).to(ctx.dtype), None, None),
    ),
    (
        "segment_rows",
        "(Tensor table, Tensor segments) -> Tensor",
        _segment_rows,
        lambda table, segments: table.new_empty((segments.shape[0], *table.shape[1:])),
        _segment_setup,
        lambda ctx, d_rows: (segment_sums(d_rows, ctx.saved_tensors[0], ctx.rows).to(ctx.dtype), None),
    ),
):
    define(_name, _schema, _function, _fake, _setup, _derivative)
