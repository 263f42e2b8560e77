"""What the kernels of a similarity matrix are given: rows, columns, rules, and the tiles that hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from contrastive_ops.core.problem import KINDS, Layout, SetFold

from . import _pairs, _tiles
from ._folds import TileFold


@dataclasses.dataclass(frozen=True)
class Problem:
    """What forward and backward are given, as kernels take it.

    Attributes:
        x: rows, contiguous along the dimension.
        y: columns; x itself where a matrix is compared with itself.
        itself: whether it is.
        layout: sets and folds.
        pairs: rules.
        arch: of `_launch.arch_of`.
    """

    x: Tensor
    y: Tensor
    itself: bool
    layout: Layout
    pairs: _pairs.PairArguments
    arch: str

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
        arch: str,
    ) -> Problem:
        """The first arguments of every operator."""
        rows = dense_rows(x)
        columns = rows if y is None else dense_rows(y)
        layout = Layout.decode(pair_data, spec)
        pairs = _pairs.arguments(layout, len(rows), len(columns), scale, row_bias, col_bias, target)
        return cls(rows, columns, y is None, layout, pairs, arch)

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, M, D."""
        return len(self.x), len(self.y), self.x.shape[1]

    @property
    def resident(self) -> bool:
        """Whether tiles hold all of the dimension."""
        return self.shape[2] <= _tiles.resident_depth(self.arch, self.x.dtype)

    def tiles(self, kernel: str, *, resident: bool) -> _tiles.Tiles:
        """The tiles of one kernel."""
        (first, *others), folds = self.pairs.sets, self.layout.folds
        lists = first.exclude_indptr >= 0 or first.linear_indptr >= 0
        light = not (self.itself or others or lists or self.pairs.guide_depth or len(folds) > 2)
        tiles = _tiles.tiles_of(self.arch, kernel, self.x.dtype, self.shape[2], light=light, resident=resident)
        # Loads of a guide are in flight too, in registers.
        return tiles._replace(stages=min(tiles.stages, 2)) if self.pairs.guide_depth else tiles

    def folds(self, folds: Sequence[SetFold]) -> tuple[TileFold, ...]:
        """Folds as kernels take them."""
        return tuple(TileFold(KINDS.index(each.kind), each.set, each.cols) for each in folds)

    def arguments(self, tiles: _tiles.Tiles) -> dict[str, Any]:
        """What all kernels that make tiles of logits take."""
        N, M, D = self.shape
        return {
            "N": N,
            "M": M,
            "D": D,
            "data": self.pairs.data,
            "offsets": self.pairs.offsets,
            "guide_depth": self.pairs.guide_depth,
            "sets": self.pairs.sets,
            "guide": self.pairs.guide,
            "SELF": self.itself,
            "ROWS": tiles.rows,
            "COLS": tiles.cols,
            "DEPTH": tiles.depth,
            "GUIDE_DEPTH": 16,
            "PRECISION": _tiles.precision(self.arch, self.x.dtype),
        }

    def factors(self, cols: bool) -> tuple[Tensor | None, Tensor | None]:
        """Of the rows, or of the columns, and of the other side; None where inner products are those of the rows."""
        return self.layout.factors[::-1] if cols else self.layout.factors

    def sides(self) -> dict[str, Any]:
        """Both matrices, for kernels that read them as they are."""
        return {"x": self.x, "y": self.y, "x_stride": self.x.stride(0), "y_stride": self.y.stride(0)}


def dense_rows(x: Tensor) -> Tensor:
    """The same rows with their numbers side by side."""
    return x.detach() if x.stride(1) == 1 or x.shape[1] <= 1 else x.detach().contiguous()
