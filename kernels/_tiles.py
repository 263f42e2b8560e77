"""Tiles of inner products, and how large they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._launch import next_power_of_2


class Tiles(NamedTuple):
    """Sizes of one kernel.

    Attributes:
        rows: rows of a tile, of the side that a program owns.
        cols: columns of a tile, of the side that it sweeps.
        depth: how much of the dimension is loaded at once.
        warps: of a program.
        stages: loads in flight.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes."""
        return {"num_warps": self.warps, "num_stages": self.stages}


INTERPRETED = Tiles(32, 32, 16, 1, 1)


# Up to this dimension the rows of a program stay on the chip, and gradients are formed without writing weights; of
# 16-bit operands, of float32.
RESIDENT_DEPTH = {"sm_80": (256, 32), "sm_90": (256, 32), "gfx942": (128, 64), "interpreter": (256, 256)}

# By architecture and "fold", "gradient", "weights"; of light calls with 16-bit operands, of others with
# 16-bit operands, and of float32. Registers set the limit: every rule and fold keeps some numbers per pair of the tile.
_TABLE = {
    "sm_80": {
        "fold": (Tiles(128, 64, 64, 8, 2), Tiles(64, 32, 64, 8, 2), Tiles(32, 64, 32, 8, 2)),
        "gradient": (Tiles(64, 32, 64, 8, 2), Tiles(32, 32, 64, 8, 2), Tiles(32, 16, 32, 8, 1)),
        "weights": (Tiles(64, 64, 64, 8, 2), Tiles(64, 32, 32, 8, 2), Tiles(32, 64, 32, 8, 2)),
    },
    "sm_90": {
        "fold": (Tiles(128, 64, 64, 8, 3), Tiles(64, 64, 64, 8, 3), Tiles(32, 32, 32, 8, 2)),
        "gradient": (Tiles(64, 64, 64, 8, 2), Tiles(64, 32, 64, 8, 2), Tiles(32, 16, 32, 8, 1)),
        "weights": (Tiles(128, 64, 64, 8, 3), Tiles(64, 64, 64, 8, 3), Tiles(32, 64, 32, 8, 2)),
    },
    "gfx942": {
        "fold": (Tiles(64, 64, 32, 8, 2), Tiles(32, 32, 32, 4, 2), Tiles(32, 32, 16, 8, 1)),
        "gradient": (Tiles(32, 32, 32, 4, 1), Tiles(32, 32, 32, 4, 1), Tiles(32, 16, 16, 8, 1)),
        "weights": (Tiles(64, 64, 32, 8, 2), Tiles(64, 32, 32, 8, 2), Tiles(32, 32, 16, 8, 1)),
    },
}


def tiles_of(arch: str, kernel: str, dtype: torch.dtype, D: int, *, light: bool, resident: bool) -> Tiles:
    """The tiles of a kernel.

    Args:
        arch: of `_launch.arch_of`.
        kernel: "fold", "gradient" or "weights".
        dtype: of the operands.
        D: dimension.
        light: whether the call has little to keep per pair beside its logit.
        resident: whether all of the dimension is loaded at once, which makes it the tiles' depth.
    """
    if arch == "interpreter":
        tiles = INTERPRETED
    else:
        tiles = _TABLE[arch][kernel][2 if dtype == torch.float32 else 0 if light else 1]
    return tiles._replace(depth=whole_depth(D)) if resident else tiles


def resident_depth(arch: str, dtype: torch.dtype) -> int:
    """The largest dimension that tiles hold at once."""
    return RESIDENT_DEPTH[arch][dtype == torch.float32]


def precision(arch: str, dtype: torch.dtype) -> str:
    """How `product` treats operands: float32 is never rounded to TF32."""
    if dtype == torch.float32:
        return "ieee"
    return "widened" if arch == "interpreter" else "tf32"


def whole_depth(D: int) -> int:
    """The side of a tile that holds all of a dimension."""
    return next_power_of_2(max(D, 1))


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr):
    """total + a b, summed in float32."""
    if PRECISION == "widened":  # the interpreter multiplies the bits of bfloat16 as integers
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def load_rows(x, index, size, stride, first, D, DEPTH: tl.constexpr):
    """Rows of x, as a tile (rows, DEPTH) from dimension `first` on; zeros outside of the matrix."""
    k = first + tl.arange(0, DEPTH)
    at = x + index.to(tl.int64)[:, None] * stride + k[None, :]
    return tl.load(at, mask=(index < size)[:, None] & (k < D)[None, :], other=0.0)


@triton.jit
def inner_products(
    x, y, i, j, N, M, x_stride, y_stride, D, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Inner products of rows i of x with rows j of y, summed over all of the dimension in float32."""
    dots = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, D, DEPTH):
        a = load_rows(x, i, N, x_stride, first, D, DEPTH)
        b = load_rows(y, j, M, y_stride, first, D, DEPTH)
        dots = product(a, tl.trans(b), dots, PRECISION)
    return dots


@triton.jit
def guide_products(gx, gy, i, j, N, M, depth, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    """Inner products of the guide, in float32, whatever the operands are."""
    return inner_products(gx, gy, i, j, N, M, depth, depth, depth, ROWS, COLS, DEPTH, "ieee")
