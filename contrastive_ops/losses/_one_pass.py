"""Sums of functions that are no fold, whose gradients are formed while they are summed, a chunk of rows at a time.

A function returns its slopes beside its values, so that no graph of a chunk is kept and no product is made twice:
6 N M D operations, and 3 N^2 D where the pairs of one matrix are the same in both orders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import autocast
from ..core.numerics import chunks_of_rows
from ..core.offsets import from_common_row
from ..core.ordered import ordered_sum

# Of a chunk: what a core's own cache holds twice.
ELEMENTS = 1 << 18


class Part(NamedTuple):
    """What a function found in a chunk.

    Attributes:
        values: (rows,) what is summed.
        slopes: (rows, columns) the derivative of their sum by what the function was given; None without gradients.
    """

    values: Tensor
    slopes: Tensor | None


# Of (inner products or squared distances, which it may overwrite; rows; columns; whether slopes are wanted).
Function = Callable[[Tensor, slice, slice, bool], Part]


def by_autograd(fn: Callable[[Tensor, slice], Tensor]) -> Function:
    """A function of (inner products, rows) in plain torch, out of place; each chunk has a graph of its own."""

    def part(dots: Tensor, rows: slice, columns: slice, needs: bool) -> Part:
        if not needs:
            return Part(fn(dots, rows), None)
        with torch.enable_grad():
            values = fn(dots.requires_grad_(), rows)
            (slopes,) = torch.autograd.grad(values.sum(), dots)
        return Part(values.detach(), slopes)

    return part


def binary_softmax(logits: Tensor, start: int, needs: bool) -> Part:
    """Binary cross-entropies of each row's softmax, added up: -log p of its own column, -log(1 - p) of the others.

    Args:
        logits: (rows, columns), which it overwrites; the own column of row i is ``start + i``.
        start: of the chunk.
        needs: whether slopes are wanted.
    """
    own, p, lse = logits.diagonal(start).clone(), logits.softmax(1), logits.logsumexp(1)
    p.diagonal(start).zero_()
    rest = torch.neg(p, out=logits).log1p_().clamp_min_(-100.0)  # as torch's binary cross-entropy has it
    losses = lse - own - rest.sum(1)
    if not needs:
        return Part(losses, None)
    odds = torch.sub(1.0, p, out=logits).clamp_min_(1e-12).reciprocal_().mul_(p)
    total = odds.sum(1, keepdim=True)
    slopes = odds.addcmul_(p, 1 - total)
    slopes.diagonal(start).copy_((own - lse).exp() * (1 - total[:, 0]) - 1)
    return Part(losses, slopes)


def sum_of_rows(function: str, fn: Function, x: Tensor, y: Tensor, chunk_rows: int | None = None) -> Tensor:
    """The sum over the rows of a function of their inner products with all columns; differentiable once.

    Args:
        function: the loss, for errors.
        fn: the function; rows do not see each other.
        x: (N, D) in the accumulation dtype.
        y: (M, D).
        chunk_rows: rows at a time, where the function makes more of them than it is given.
    """
    with autocast.disabled(x):
        return _Sum.apply(function, fn, functools.partial(_rows_of_products, chunk_rows=chunk_rows), x, y)


def sum_of_distances(function: str, fn: Function, x: Tensor, y: Tensor) -> Tensor:
    """The sum over the rows of a function of their squared distances from all columns; differentiable once.

    Arguments as in `sum_of_rows`.
    """
    with autocast.disabled(x):
        return _Sum.apply(function, fn, _rows_of_distances, *from_common_row(x, y))


def sum_of_pairs(function: str, fn: Function, x: Tensor) -> Tensor:
    """The sum over all pairs of rows of a function of their squared distance; differentiable once.

    Each pair is looked at in one order: the function must be the same in the other. Pairs of a row with itself count.

    Args:
        function: the loss, for errors.
        fn: the function; values are sums of the chunk's rows over its columns.
        x: (N, D) in the accumulation dtype.
    """
    with autocast.disabled(x):
        return _Sum.apply(function, fn, _pairs, x, None)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, fn: Function, method: Callable[..., Any], x: Tensor, y: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        total, gradients = method(fn, x, y, needs)
        ctx.save_for_backward(*(each for each in gradients if each is not None))
        ctx.name, ctx.needs = name, needs
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> Any:
        if torch.is_grad_enabled():  # or what depends on the inputs would look like a constant
            raise NotImplementedError(f"{ctx.name}: create_graph must be False, got True: it is differentiable once")
        found = iter(ctx.saved_tensors)
        return None, None, None, *(d_total * next(found) if need else None for need in ctx.needs)


def _rows_of_products(
    fn: Function, x: Tensor, y: Tensor, needs: tuple[bool, bool], chunk_rows: int | None
) -> tuple[Tensor, list[Tensor | None]]:
    values, all_columns = x.new_empty(x.shape[:1]), slice(0, y.shape[0])
    dx, dy = (torch.zeros_like(each) if need else None for each, need in zip((x, y), needs, strict=True))
    for rows in chunks_of_rows(x.shape[0], chunk_rows or max(1, 2 * ELEMENTS // max(y.shape[0], 1))):
        part = fn(x[rows] @ y.T, rows, all_columns, any(needs))
        values[rows] = part.values
        if dx is not None:
            torch.mm(part.slopes, y, out=dx[rows])  # type: ignore[arg-type]
        if dy is not None:
            dy.addmm_(part.slopes.T, x[rows])  # type: ignore[union-attr]
    return ordered_sum(values), [dx, dy]


def _rows_of_distances(
    fn: Function, x: Tensor, y: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor, list[Tensor | None]]:
    values, of_x, of_y = x.new_empty(x.shape[:1]), x.square().sum(1), y.square().sum(1)
    sums, all_columns = torch.zeros_like(of_y), slice(0, y.shape[0])
    dx, dy = (torch.zeros_like(each) if need else None for each, need in zip((x, y), needs, strict=True))
    for rows in chunks_of_rows(x.shape[0], max(1, 2 * ELEMENTS // max(y.shape[0], 1))):
        squared = torch.addmm(of_y, x[rows], y.T, alpha=-2).add_(of_x[rows, None]).clamp_min_(0.0)
        part = fn(squared, rows, all_columns, any(needs))
        values[rows] = part.values
        if part.slopes is None:
            continue
        if dx is not None:
            torch.mm(part.slopes, y, out=dx[rows])
            dx[rows].neg_().addcmul_(part.slopes.sum(1, keepdim=True), x[rows]).mul_(2)
        if dy is not None:
            dy.addmm_(part.slopes.T, x[rows], alpha=-1)
            sums += part.slopes.sum(0)
    return ordered_sum(values), [dx, None if dy is None else dy.addcmul_(sums[:, None], y).mul_(2)]


def _pairs(fn: Function, x: Tensor, _: None, needs: tuple[bool, bool]) -> tuple[Tensor, list[Tensor | None]]:
    size, lengths = x.shape[0], x.square().sum(1)
    values, sums = torch.zeros_like(lengths), torch.zeros_like(lengths)
    dx = torch.zeros_like(x) if needs[0] else None
    for rows in chunks_of_rows(size, max(1, 2 * ELEMENTS // max(size, 1))):
        # Pairs of two rows of the chunk in both orders, others in one.
        for columns, times in ((rows, 1), (slice(rows.stop, size), 2)):
            if columns.start == columns.stop:
                continue
            squared = torch.addmm(lengths[columns], x[rows], x[columns].T, alpha=-2)
            squared.add_(lengths[rows, None]).clamp_min_(0.0)
            if times == 1:
                squared.fill_diagonal_(0.0)
            part = fn(squared, rows, columns, needs[0])
            values[rows] += times * part.values
            if dx is None or part.slopes is None:
                continue
            sums[rows] += part.slopes.sum(1)
            dx[rows].addmm_(part.slopes, x[columns], alpha=-1)
            if times == 2:
                sums[columns] += part.slopes.sum(0)
                dx[columns].addmm_(part.slopes.T, x[rows], alpha=-1)
    return ordered_sum(values), [None if dx is None else dx.addcmul_(sums[:, None], x).mul_(4)]
