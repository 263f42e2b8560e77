"""stream_rows: any row-wise function of a similarity matrix, one chunk of rows in memory at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import overload

import torch
from torch import Tensor

from ..core import autocast, checks
from ..core.numerics import CHUNK_ELEMENTS, chunks_of_rows
from ..core.recompute import recomputed
from .pairs import inner_products

RowFunction = Callable[[Tensor, slice], "Tensor | tuple[Tensor, ...]"]


@overload
def stream_rows(
    fn: Callable[[Tensor, slice], Tensor], x: Tensor, y: Tensor | None = ..., *, chunk_rows: int | None = ...
) -> Tensor: ...


@overload
def stream_rows(
    fn: Callable[[Tensor, slice], tuple[Tensor, ...]],
    x: Tensor,
    y: Tensor | None = ...,
    *,
    chunk_rows: int | None = ...,
) -> tuple[Tensor, ...]: ...


def stream_rows(
    fn: RowFunction, x: Tensor, y: Tensor | None = None, *, chunk_rows: int | None = None
) -> Tensor | tuple[Tensor, ...]:
    """Apply a row-wise function of your own to a similarity matrix without storing the matrix.

    Equivalent to::

        fn(x.float() @ y.float().T, slice(0, N))

    for a function whose row i depends on row i of its logits alone. The way out where no built-in loss fits; a built-in
    one is faster, because it fuses `fn` into the tiles.

    Args:
        fn: called as ``fn(logits, rows)`` with logits of shape (rows.stop - rows.start, M) in float32 (float64 for
            float64 inputs) and the slice of rows they belong to. Returns one tensor whose first dimension is the
            chunk's rows, or a tuple of such tensors. It may use parameters and tensors from outside, which receive
            gradients. It runs again in backward, with the same random numbers, so it must not have side effects.
        x: (N, D) float32, bfloat16, float16 or float64. Differentiable.
        y: (M, D) of the same dtype; None for y = x. Differentiable.
        chunk_rows: rows of a chunk. None: about a million logits.

    Returns:
        What `fn` returns, concatenated over all rows.

    Raises:
        ValueError, TypeError: inputs that do not fit, or an `fn` that returns something else than the chunk's rows.

    Note:
        Memory: O((N + M) D) and what `fn` needs for one chunk; nothing of a chunk is kept for backward. Work: 8 N M D
        with gradients, 2 N M D without. Any device; differentiable as often as `fn` is. Random numbers that `fn` draws
        follow from one number that the call takes from torch's default generator.

    Examples:
        A hinge against the 90th percentile of each row's logits, which is no fold:

        >>> query, key = torch.randn(6, 4), torch.randn(6, 4)
        >>> margin = torch.tensor(0.2, requires_grad=True)
        >>> def hinge(logits, rows):
        ...     own = logits.diagonal(rows.start)
        ...     return (margin + logits.quantile(0.9, dim=1) - own).relu()
        >>> stream_rows(hinge, query, key, chunk_rows=4).shape
        torch.Size([6])
    """
    name = "stream_rows"
    x, y = autocast.cast(x, y)
    if y is None:
        checks.check_matrix(name, "x", x)
    else:
        checks.check_matrices(name, "x", x, "y", y)
    columns = x if y is None else y
    if chunk_rows is None:
        chunk_rows = max(1, CHUNK_ELEMENTS // max(1, columns.shape[0]))
    else:
        chunk_rows = checks.integer(name, "chunk_rows", chunk_rows, 1)

    # checkpoint would save the generator's state, 5 kB a chunk, and small pieces that outlive the chunks' large
    # temporaries lie between them and keep the allocator from reusing memory: the peak then grows with N M. One number
    # seeds all chunks instead, and results are written into place at once.
    seed = int(torch.randint(1 << 62, ()))

    def one_chunk(rows: slice) -> tuple[Tensor, ...]:
        with autocast.disabled(x):
            logits = inner_products(x[rows], columns)
        with _seeded(x.device, seed + rows.start):
            result = fn(logits, rows)
        parts = result if isinstance(result, tuple) else (result,)
        for part in parts:
            _check_rows(name, part, rows.stop - rows.start)
        returns_tuple.append(isinstance(result, tuple))
        return parts

    run = recomputed(one_chunk)
    returns_tuple: list[bool] = []
    joined: list[Tensor] = []
    for rows in chunks_of_rows(x.shape[0], chunk_rows):
        parts = run(rows)
        if not joined:
            joined = [part.new_empty((x.shape[0], *part.shape[1:])) for part in parts]
        for whole, part in zip(joined, parts, strict=True):
            whole[rows] = part
    return tuple(joined) if returns_tuple[0] else joined[0]


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers that depend on `seed` alone; the generators of the caller are left as they were."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _check_rows(function: str, part: object, rows: int) -> None:
    if not isinstance(part, Tensor):
        raise TypeError(f"{function}: fn must return a tensor or a tuple of tensors, got {type(part).__name__}")
    if part.dim() == 0 or part.shape[0] != rows:
        raise ValueError(
            f"{function}: fn must return one entry for each of the chunk's {rows} rows, "
            f"got shape {checks.shape(part)}\n"
            "  leave reductions over rows to the caller: a chunk does not see the other rows"
        )
