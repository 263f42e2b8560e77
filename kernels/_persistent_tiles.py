"""Tiles of a persistent sweep: programs that each go through many, their order, their sizes and inner products.

As many programs as the device has processors take tile after tile, and the loads of the next one begin while the last
one is folded. Rows and columns of operands come by tensor descriptors where the hardware has them, else by addresses.
A tile leaves a part for each of its rows and columns, so no result depends on the number of programs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch
from ._similarity_plan import Parts
from ._similarity_problem import Problem, dense_rows
from ._tiles import Tiles, load_rows, precision, product

# Tiles of rows whose columns come one after another before the next ones: both sides then stay in the L2 cache.
GROUP = 8
# Rows of a launch, for which parts of tiles are kept.
BAND_ROWS = 8192
# Numbers in 16 bytes: descriptors, and loads that take as much, begin at multiples of them.
STEP = 8

# By architecture and "fold" or "weigh", for calls without ids and bounds and for those with: registers set the limit.
_TABLE = {
    "sm_80": {
        "fold": (Tiles(128, 64, 64, 8, 3), Tiles(64, 64, 64, 8, 3)),
        "weigh": (Tiles(128, 64, 64, 8, 3), Tiles(64, 64, 64, 8, 3)),
    },
    "sm_90": {
        "fold": (Tiles(128, 128, 64, 8, 4), Tiles(128, 64, 64, 8, 4)),
        "weigh": (Tiles(128, 64, 64, 8, 4), Tiles(128, 64, 64, 8, 4)),
    },
    "gfx942": {
        "fold": (Tiles(128, 64, 32, 8, 2), Tiles(64, 64, 32, 8, 2)),
        "weigh": (Tiles(64, 64, 32, 8, 2), Tiles(64, 64, 32, 8, 2)),
    },
    "interpreter": {"fold": (Tiles(32, 32, 16, 1, 1),) * 2, "weigh": (Tiles(32, 16, 16, 1, 1),) * 2},
}
# Architectures whose tiles come by descriptors.
DESCRIPTORS = {"sm_80": False, "sm_90": True, "gfx942": False, "interpreter": True}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One kernel over all tiles of a similarity matrix, band of rows by band of rows.

    Attributes:
        p: rows, columns, rules.
        tiles: their sizes.
    """

    p: Problem
    tiles: Tiles

    @classmethod
    def of(cls, p: Problem, kernel: str) -> Sweep:
        """The sweep of "fold" or "weigh"."""
        return cls(p, _TABLE[p.arch][kernel][p.pairs.sets[0].counted != 0])

    def bands(self, most: int) -> Iterator[slice]:
        """Rows of one launch after another, at most so many and whole tiles; none without a pair."""
        N, M, _ = self.p.shape
        step = max(1, most // self.tiles.rows) * self.tiles.rows
        return (slice(i, min(i + step, N)) for i in range(0, N if M else 0, step))

    def across(self) -> int:
        """Tiles of a row."""
        return triton.cdiv(len(self.p.y), self.tiles.cols)

    def down(self, rows: slice) -> int:
        """Tiles of a column of a band."""
        return triton.cdiv(rows.stop - rows.start, self.tiles.rows)

    def row_parts(self, rows: slice, folds: Sequence[Any]) -> tuple[Problem, Parts]:
        """The band as a problem of its own, whose rows are complete, and room for a part of each tile."""
        band = dataclasses.replace(self.p, x=self.p.x[rows])
        return band, Parts.of(band, folds, self.across(), 0, False)

    def col_parts(self, bands: Sequence[slice], folds: Sequence[Any]) -> Parts:
        """Room for the parts of one band at a time, of which the first is the largest."""
        return Parts.of(self.p, folds, 0, self.down(bands[0]) if bands else 0, False)

    def launch(self, kernel: Any, rows: slice, **arguments: Any) -> Launch:
        """A launch over the tiles of a band."""
        p, tiles = self.p, self.tiles
        common = {
            **p.sides(),
            "N": len(p.x),
            "M": len(p.y),
            "D": p.shape[2],
            "first_row": rows.start,
            "last_row": rows.stop,
            "data": p.pairs.data,
            "offsets": p.pairs.offsets,
            "sets": p.pairs.sets,
            "GROUP": GROUP,
            "ROWS": tiles.rows,
            "COLS": tiles.cols,
            "DEPTH": tiles.depth,
            "DESCRIPTORS": DESCRIPTORS[p.arch],
            "PRECISION": precision(p.arch, p.x.dtype),
        }
        programs = min(self.down(rows) * self.across(), processors(p))
        return Launch(kernel, programs, {**common, **arguments}, tiles.options, descriptors=DESCRIPTORS[p.arch])


def processors(p: Problem) -> int:
    """Programs that run at once."""
    return _processors_of(p.x.device.index) if p.x.device.type == "cuda" else 3


@functools.cache
def _processors_of(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def padded(size: int) -> int:
    """The next number of 16-bit numbers that are whole steps of 16 bytes."""
    return triton.cdiv(size, STEP) * STEP


def aligned_rows(x: Tensor) -> Tensor:
    """The same rows, each of which begins at a multiple of 16 bytes."""
    rows = dense_rows(x)
    return (
        rows
        if rows.data_ptr() % 16 == 0 and rows.stride(0) % STEP == 0
        else rows.clone(memory_format=torch.contiguous_format)
    )


# ---- Device ----------------------------------------------------------------------------------------------------------


@triton.jit
def place_of(tile, down, across, GROUP: tl.constexpr):
    """Which tile of the rows and which of the columns is the next."""
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = tile % (GROUP * across)
    return first + within % height, within // height


@triton.jit
def source_of(x, size, stride, D, BLOCK: tl.constexpr, DEPTH: tl.constexpr, DESCRIPTORS: tl.constexpr):
    """What blocks of rows are read through; nothing but zeros is outside of the matrix."""
    if DESCRIPTORS:
        source = tl.make_tensor_descriptor(x, shape=[size, D], strides=[stride, 1], block_shape=[BLOCK, DEPTH])
    else:
        source = x
    return source


@triton.jit
def tile_products(
    of_x, of_y, row, col, last_row, M, D, x_stride, y_stride, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner products of the tile that begins at (row, col), summed over all of the dimension in float32."""
    dots = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, D, DEPTH):
        if DESCRIPTORS:
            a = of_x.load([row, first])
            b = of_y.load([col, first])
        else:
            a = load_rows(of_x, row + tl.arange(0, ROWS), last_row, x_stride, first, D, DEPTH)
            b = load_rows(of_y, col + tl.arange(0, COLS), M, y_stride, first, D, DEPTH)
        dots = product(a, tl.trans(b), dots, PRECISION)
    return dots
