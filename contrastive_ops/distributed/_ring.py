"""Blocks of columns go from rank to rank, each is folded while the next one travels.

No rank ever holds the columns of all. Backward sends them round again, folds each block once more, and with a block
travels its gradient, to which every rank adds its own, until both are at home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.folds import Folded
from ._collectives import finish_hop, start_hop
from ._groups import Shards, eager

# (owner of the block, x, block of y, other tensors by name) -> the folds of the block
Block: TypeAlias = Callable[[int, Tensor, Tensor, dict[str, Tensor]], Folded]


@eager
def ring(
    block: Block, x: Tensor, y: Tensor, tensors: dict[str, Tensor], columns: Shards, counts: tuple[int, int]
) -> Folded:
    """Fold the rows of x with the columns of all ranks.

    Args:
        block: folds one block; what it returns is differentiable by its tensors.
        x: (N, D) the rows of this rank.
        y: (M, D) its columns.
        tensors: what else has a gradient.
        columns: where all columns are.
        counts: how many folds of rows and of columns a block has.

    Returns:
        What `block` returns, for all columns: of rows (ranks, N) parts, of columns those of all ranks in order.
    """
    flat = _Ring.apply(block, columns, tuple(tensors), x, y, *tensors.values())
    rows, cols = counts
    target, *winners = flat[rows + cols :]
    return Folded(
        rows=flat[:rows],
        cols=flat[rows : rows + cols],
        target=target,
        linear=target.new_empty((0,)),
        row_argmax=tuple(winners[:rows]),
        col_argmax=tuple(winners[rows:]),
    )


def travelling(y: Tensor, columns: Shards) -> Iterator[tuple[int, Tensor]]:
    """(owner, block) of each rank, its own first; the next one is on its way before a block is yielded."""
    team, block = columns.team, y
    for step in range(team.size):
        owner, last = (team.rank - step) % team.size, step == team.size - 1
        coming = (owner - 1) % team.size
        started = None if last else start_hop(block, team, (columns.sizes[owner], columns.sizes[coming]))
        yield owner, block
        block = block if started is None else finish_hop(started, y, team)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, block: Block, columns: Shards, names: tuple[str, ...], x: Tensor, y: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, y, *tensors)
        ctx.block, ctx.columns, ctx.names = block, columns, names
        here = dict(zip(names, tensors, strict=True))
        parts = {owner: block(owner, x, each, here) for owner, each in travelling(y.contiguous(), columns)}
        values, winners = _assembled([parts[rank] for rank in range(columns.team.size)], columns)
        ctx.mark_non_differentiable(*winners)
        return (*values, *winners)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, y, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        columns, totals, of_block = ctx.columns, [torch.zeros(())] * len(needs), None
        for owner, each in travelling(y.contiguous(), columns):
            found = _block_gradients(ctx, owner, (x, each, *tensors), needs, gradients)
            if needs[1]:
                of_block, found[1] = _passed_on(of_block, found[1], owner, columns), None
            totals = [total if part is None else total + part for total, part in zip(totals, found, strict=True)]
        if needs[1]:
            like = y.new_empty((), dtype=checks.accumulator(y.dtype))
            totals[1] = finish_hop(of_block, like, columns.team)  # type: ignore[arg-type]
        inputs = zip((x, y, *tensors), totals, strict=True)
        found = [total.to(given.dtype) if need else None for need, (given, total) in zip(needs, inputs, strict=True)]
        return None, None, None, *found


def _passed_on(coming: Tensor | None, part: Tensor, owner: int, columns: Shards) -> Tensor:
    """Add this rank's part to the gradient that comes with the block, and send both on."""
    team = columns.team
    total = part if coming is None else finish_hop(coming, part, team).add_(part)
    return start_hop(total, team, (columns.sizes[owner], columns.sizes[(owner - 1) % team.size]))


def _block_gradients(
    ctx: Any, owner: int, inputs: tuple[Tensor, ...], needs: Sequence[bool], gradients: Sequence[Tensor]
) -> list[Any]:
    """The derivatives of what one block contributes by x, the block and the other tensors, in wide dtypes."""
    begin, end = ctx.columns.begins[owner : owner + 2]
    with torch.enable_grad(), autocast.disabled(inputs[0]):
        leaves = [each.detach().requires_grad_(need) for each, need in zip(inputs, needs, strict=True)]
        folded = ctx.block(owner, leaves[0], leaves[1], dict(zip(ctx.names, leaves[2:], strict=True)))
    rows, cols = len(folded.rows), len(folded.cols)
    arriving = [
        *(gradient[owner] for gradient in gradients[:rows]),
        *(gradient[begin:end] for gradient in gradients[rows : rows + cols]),
        gradients[rows + cols] if folded.target.numel() > 0 else folded.target,
    ]
    wanted = [each for each, need in zip(leaves, needs, strict=True) if need]
    outputs = [*folded.rows, *folded.cols, folded.target]
    pairs = [(output, d) for output, d in zip(outputs, arriving, strict=True) if output.requires_grad]
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [d for _, d in pairs], allow_unused=True))
    by_leaf = [(leaf, next(found) if need else None) for leaf, need in zip(leaves, needs, strict=True)]
    filled = [
        torch.zeros_like(leaf) if need and d is None else d for (leaf, d), need in zip(by_leaf, needs, strict=True)
    ]
    return [d if d is None else d.to(checks.accumulator(d.dtype)) for d in filled]


def _assembled(parts: list[Folded], columns: Shards) -> tuple[list[Tensor], list[Tensor]]:
    """The folds and the targets' logits of all blocks, and the winners."""
    rows, cols = range(len(parts[0].rows)), range(len(parts[0].cols))
    values = [torch.stack([part.rows[fold] for part in parts]) for fold in rows]
    values += [torch.cat([part.cols[fold] for part in parts]) for fold in cols]
    values.append(parts[columns.team.rank].target)
    begins = zip(parts, columns.begins, strict=False)
    moved = [[torch.where(w < 0, w, w + begin) for w in part.row_argmax] for part, begin in begins]
    winners = [torch.stack([part[fold] for part in moved]) for fold in rows]
    winners += [torch.cat([part.col_argmax[fold] for part in parts]) for fold in cols]
    return values, winners
