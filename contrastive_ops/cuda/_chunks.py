"""Chunks of inner products: how large they are, where they are kept, and what multiplies them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.problem import Layout
from ..core.rules import Slot
from . import _products
from ._pairs import dense, dense_tuple

_logger = logging.getLogger("contrastive_ops")
_warned = False

# Rows of a chunk. As many as columns, more or less, so that gradients of both sides are products with a long sum.
CHUNK_ROWS = 4096
# Columns of the tiles that blocks of threads read; csrc/cuda/similarity_chunk.h has the same number.
TILE_COLUMNS = 256
# Columns of a chunk are a multiple of it.
COLUMN_STEP = TILE_COLUMNS
# Rows of these tiles: fewer where there would not be blocks for a GPU of any size.
TILE_ROWS, LEAST_TILE_ROWS, BLOCKS = 256, 8, 512
# Numbers to which rows of a chunk are padded, so that libraries and kernels read 16 bytes at once in any dtype.
PAD = 8


def padded(size: int, step: int = PAD) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


@dataclass(frozen=True)
class Problem:
    """What forward and backward are given, as kernels take it.

    Attributes:
        x: rows.
        y: columns; x itself where a matrix is compared with itself.
        itself: whether it is.
        layout: sets and folds.
        guide: rows and columns of the guide.
        arguments: of all kernels that read pairs.
    """

    x: Tensor
    y: Tensor
    itself: bool
    layout: Layout
    guide: tuple[Tensor, Tensor] | None
    arguments: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor | None,
        scale: Tensor,
        row_bias: Tensor | None,
        col_bias: Tensor | None,
        target: Tensor | None,
        pair_data: Sequence[Tensor],
        spec: Sequence[int],
    ) -> Problem:
        """The first arguments of every operator."""
        layout = Layout.decode(pair_data, spec)
        rows = x.detach().contiguous()
        columns = rows if y is None else y.detach().contiguous()
        guides = [each.data for each in layout.sets if Slot.GUIDE_X in each.data]
        guide = (guides[0][Slot.GUIDE_X], guides[0][Slot.GUIDE_Y]) if guides else None
        vectors = [dense(tensor) for tensor in (scale, row_bias, col_bias, target)]
        arguments = (dense_tuple(pair_data), list(spec), *vectors, len(rows), len(columns))
        return cls(rows, columns, y is None, layout, guide, arguments)

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, M, D."""
        return len(self.x), len(self.y), self.x.shape[1]


class Chunk(NamedTuple):
    """A rectangle of the matrix, whose inner products are (rows, pitch) in `dots`, and those of the guide in `guide`.

    Attributes:
        rows: of x.
        cols: of y; from the diagonal on where a matrix is compared with itself.
        dots: inner products, flat.
        guide: of the guide, flat.
        itself: whether the matrix is compared with itself.
    """

    rows: slice
    cols: slice
    dots: Tensor
    guide: Tensor | None
    itself: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start

    @property
    def pitch(self) -> int:
        """Numbers from one row to the next."""
        return padded(self.shape[1])

    @property
    def tile_rows(self) -> int:
        """Rows of a tile."""
        rows, cols = self.shape
        wanted = padded(-(-rows * -(-cols // TILE_COLUMNS) // BLOCKS), LEAST_TILE_ROWS)
        return min(max(wanted, LEAST_TILE_ROWS), TILE_ROWS)

    def numbers(self) -> list[int]:
        """What kernels are told."""
        rows, cols = self.shape
        return [self.pitch, self.rows.start, rows, self.cols.start, cols, self.tile_rows, int(self.itself)]

    def parts(self, of_rows: int, of_cols: int) -> int:
        """Room for so many numbers for each row of each tile, and for each column of each tile."""
        rows, cols = self.shape
        return of_rows * rows * -(-cols // TILE_COLUMNS) + of_cols * cols * -(-rows // self.tile_rows)

    def matrix(self, numbers: Tensor) -> Tensor:
        """What is (rows, pitch) as a matrix without its padding."""
        rows, cols = self.shape
        return numbers[: rows * self.pitch].view(rows, self.pitch)[:, :cols]


class Memory:
    """A buffer in which chunks are stored one after another, as many as there is room for."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers, self.used = numbers, 0

    def take(self, size: int) -> Tensor | None:
        """Room for `size` numbers behind what was taken before, or None."""
        if self.used + size > self.numbers.numel():
            return None
        self.used += size
        return self.numbers[self.used - size : self.used]


@dataclass(frozen=True)
class Sizes:
    """Rows and columns of chunks."""

    rows: int
    cols: int

    @classmethod
    def of(cls, p: Problem) -> Sizes:
        """Chunks whose inner products stay in the cache, for these sizes alone."""
        N, M, _ = p.shape
        rows = max(1, min(CHUNK_ROWS, N))
        cols = max(1, _products.CHUNK_BYTES // (4 * rows) // COLUMN_STEP) * COLUMN_STEP
        return cls(rows, max(1, min(cols, M)))

    @property
    def numbers(self) -> int:
        """What the largest chunk takes."""
        return self.rows * padded(self.cols)

    def bands(self, p: Problem) -> Iterator[list[tuple[slice, slice]]]:
        """Rows and columns of the chunks of one band of rows after another."""
        N, M, _ = p.shape
        for i in range(0, N, self.rows):
            columns = range(i if p.itself else 0, M, self.cols)
            yield [(slice(i, min(i + self.rows, N)), slice(j, min(j + self.cols, M))) for j in columns]


class Workspace:
    """Buffers of a sweep and the products that fill them.

    Where memory runs out the sweep tries chunks of half the rows, and says so once. Sums are then added up in another
    order, so results may differ in their last bits from those of a run that had the memory.

    Args:
        p: the problem.
        extra: further buffers of the size of a chunk, as (numbers per number of the chunk, dtype).
        sizes: of chunks; None for the usual ones.
        holds: whether all chunks have memory elsewhere.
    """

    def __init__(
        self, p: Problem, *extra: tuple[int, torch.dtype], sizes: Sizes | None = None, holds: bool = False
    ) -> None:
        self.p, self.holds = p, holds
        usual = sizes or Sizes.of(p)
        self.sizes, self.extra = usual, extra
        while True:
            try:
                self._allocate()
                break
            except torch.OutOfMemoryError:
                if self.sizes.rows <= LEAST_TILE_ROWS:
                    raise
                self.sizes = Sizes(self.sizes.rows // 2, self.sizes.cols)
                _say_once(self.sizes)
        self.usual = self.sizes == usual

    def _allocate(self) -> None:
        x, size = self.p.x, self.sizes.numbers
        self.dots = x.new_empty((0 if self.holds else size,), dtype=torch.float32)
        self.guide = None if self.p.guide is None else x.new_empty((size,), dtype=torch.float32)
        self.buffers = [x.new_empty((times * size,), dtype=dtype) for times, dtype in self.extra]

    def chunk(self, rows: slice, cols: slice, memory: Memory | None = None, *, filled: bool = False) -> Chunk:
        """The inner products of a rectangle, in `memory` where it has room.

        Args:
            rows: of x.
            cols: of y.
            memory: where to store them.
            filled: whether what is stored there is already known.
        """
        chunk = Chunk(rows, cols, self.dots, self.guide, self.p.itself)
        stored = None if memory is None else memory.take(chunk.shape[0] * chunk.pitch)
        if stored is not None:
            chunk = chunk._replace(dots=stored)
        if not filled or stored is None:
            _products.inner_products(self.p.x[rows], self.p.y[cols], chunk.matrix(chunk.dots))
            of_rows, of_cols = self.p.layout.factors
            if of_rows is not None and of_cols is not None:
                chunk.matrix(chunk.dots).mul_(of_rows[rows, None]).mul_(of_cols[cols])
        if self.p.guide is not None and chunk.guide is not None:
            _products.inner_products(self.p.guide[0][rows], self.p.guide[1][cols], chunk.matrix(chunk.guide))
        return chunk


def _say_once(sizes: Sizes) -> None:
    global _warned
    if not _warned:
        _warned = True
        _logger.warning(
            "similarity_reduce: out of memory for a chunk of inner products; goes on with chunks of %d rows",
            sizes.rows,
        )
