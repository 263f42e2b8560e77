"""similarity_topk by CUDA kernels: launchers with the names and arguments of reference/similarity_topk.py.

A tile of inner products, which a library makes, passes to a kernel that adds to each row's list
what is above the row's threshold and no rule drops; see csrc/cuda/similarity_topk.cu. Nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.cuda_kernels import kernels
from ..core.listed_gradients import Lists, gradients
from ..core.problem import Layout, LogitSet
from ..core.rules import STATISTICS, Slot
from ..reference import similarity_topk as reference
from ._products import CHUNK_BYTES, inner_products

# ---- Sizes -----------------------------------------------------------------------------------------------------------

# Columns that are read between two looks at whether a list is full; csrc/cuda/similarity_topk.cu has the same number.
LEG = 1024
# Rows of a tile, where there are so many: as many blocks as a GPU runs at once.
TILE_ROWS = 4096
# A row has several lists where there are fewer rows than this, so that they keep a GPU busy.
LISTS = 1024
# Lists of the rows that are searched at once.
LIST_BYTES = 1 << 30
# A list is cut down when it has this many more than k, or twice k.
LEAST_SURPLUS = 128
# What one block sorts in shared memory, of keys and of (value, index); longer lists are sorted by a library.
MOST_SORTED, MOST_ORDERED = 8192, 4096
# Kernels keep columns in 32 bits.
MOST_COLUMNS = (1 << 32) - 1


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


class Plan(NamedTuple):
    """How the work is cut.

    Attributes:
        rows: rows at a time.
        columns: columns of a tile.
        stride: from row to row of a tile.
        parts: lists of a row.
        strip: columns of a tile that belong to one list.
        capacity: keys of a list.
    """

    rows: int
    columns: int
    stride: int
    parts: int
    strip: int
    capacity: int


def plan(rows: int, columns: int, k: int) -> Plan:
    """Cut a matrix of at least one row and column into tiles, and the tiles into what belongs to each list."""
    at_once = min(rows, TILE_ROWS)
    width = min(columns, max(CHUNK_BYTES // (4 * at_once) // LEG * LEG, LEG))
    # A list costs k keys, which are looked at again.
    parts = max(1, min(LISTS // at_once, width // (4 * max(LEG, k))))
    strip = _round_up(-(-width // parts), LEG)
    # Either the surplus that is cut off from time to time, or all that comes.
    capacity = min(k + max(k, LEAST_SURPLUS) + LEG, strip * -(-columns // width))
    parts = -(-width // strip)
    affordable = max(1, LIST_BYTES // (8 * parts * capacity))
    return Plan(min(at_once, affordable), width, _round_up(width, 4), parts, strip, capacity)


# ---- Forward ---------------------------------------------------------------------------------------------------------


class _Problem:
    """What all tiles of a search share: the operands, and what kernels take for logits and rules."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor,
        row_bias: Tensor | None,
        col_bias: Tensor | None,
        pair_data: Sequence[Tensor],
        spec: Sequence[int],
    ) -> None:
        self.x, self.y = x, y
        self.layout = Layout.decode(pair_data, spec)
        vectors = [None if t is None else t.contiguous() for t in (scale, row_bias, col_bias)]
        self.arguments = (*vectors, tuple(t.contiguous() for t in pair_data), list(spec))


class _Sweep:
    """The lists of some rows at a time, and the tiles that fill them."""

    def __init__(self, problem: _Problem, cut: Plan, k: int, floor: Tensor | None, level: Tensor | None) -> None:
        self.problem, self.cut, self.k, self.floor, self.level = problem, cut, k, floor, level
        # The host has about 20 microseconds for a tile: what can be made once is.
        starts = range(0, len(problem.y), cut.columns)
        self.tiles = list(zip(starts, problem.y.split(cut.columns), strict=True))
        device = problem.x.device
        self.keys = torch.empty((cut.rows * cut.parts, cut.capacity), dtype=torch.int64, device=device)
        self.dots = torch.empty((cut.rows, cut.stride), dtype=torch.float32, device=device)
        has_guide = any(Slot.GUIDE_X in each.data for each in problem.layout.sets)
        self.guide = torch.empty_like(self.dots) if has_guide else None
        self.counts = torch.empty(0, dtype=torch.int32, device=device)
        self.counted = torch.empty(0, dtype=torch.int64, device=device)

    def run(self, rows: slice) -> None:
        """Fill the lists of these rows, and count their columns."""
        problem, cut = self.problem, self.cut
        size = rows.stop - rows.start
        self.counts = self.counts.new_zeros(size * cut.parts)
        self.counted = self.counted.new_zeros((len(STATISTICS), size * cut.parts))
        thresholds = self._thresholds(rows)
        first, last = problem.layout.sets[0], problem.layout.sets[-1]
        x = problem.x[rows]
        for begin, y in self.tiles:
            shape = (len(problem.x), len(problem.y), rows.start, size, begin, len(y))
            where = (*shape, cut.stride, cut.parts, cut.strip)
            _multiply(x, y.to(x.dtype), self.dots)  # codes are int8
            lists = (self.keys, self.counts, thresholds)
            guide = self._guide(first, rows, begin, len(y))
            kernels().cuda_similarity_topk_filter(
                self.dots, guide, *problem.arguments, *lists, *where, cut.capacity, self.k
            )
            if self.level is not None:
                guide = guide if last is first else self._guide(last, rows, begin, len(y))
                counted = (self.level, self.counted)
                kernels().cuda_similarity_topk_count(self.dots, guide, *problem.arguments, *counted, *where)

    def _thresholds(self, rows: slice) -> Tensor:
        """What scores must exceed at first; a floor of NaN is none."""
        if self.floor is None:
            return self.dots.new_full((len(self.counts),), -torch.inf)
        floor = self.floor[rows]
        return floor.masked_fill(floor.isnan(), -torch.inf).repeat_interleave(self.cut.parts)

    def _guide(self, each: LogitSet, rows: slice, begin: int, size: int) -> Tensor | None:
        if self.guide is None or Slot.GUIDE_X not in each.data:
            return None
        _multiply(each.data[Slot.GUIDE_X][rows], each.data[Slot.GUIDE_Y][begin : begin + size], self.guide)
        return self.guide

    def select(self, values: Tensor, indices: Tensor, counts: Tensor) -> None:
        """Write what is known of the rows that were searched last."""
        best_of_lists(self.keys, self.counts, self.cut.parts, self.k, len(self.problem.y), values, indices, counts)

    def statistics(self) -> Tensor:
        """(STATISTICS, rows) of the rows that were searched last."""
        return self.counted.view(len(STATISTICS), -1, self.cut.parts).sum(2)


def best_of_lists(
    keys: Tensor, lengths: Tensor, parts: int, k: int, columns: int, values: Tensor, indices: Tensor, counts: Tensor
) -> None:
    """Write what some rows have in their lists, `parts` for each row and so long; keys are (lists, capacity)."""
    rows, capacity = len(values), keys.shape[1]
    size = _power_of_two(min(k, parts * capacity, columns))
    size = size if size <= MOST_SORTED else 0
    found = (values, indices, counts)
    kernels().cuda_similarity_topk_select(keys, lengths, *found, rows, parts, capacity, k, size)
    if size == 0:
        values[:], indices[:] = reference.order(values, indices, k)


def _multiply(x: Tensor, y: Tensor, tile: Tensor) -> None:
    inner_products(x, y, tile[: len(x), : len(y)])


def forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    k: int,
    floor: Tensor | None,
    count_above: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (values, indices, counts, statistics).

    The first set selects; statistics are counted under the rules of the last one and empty without `count_above`.
    """
    rows, columns = len(x), len(y)
    if columns > MOST_COLUMNS:
        raise NotImplementedError(
            f"similarity_topk: backend 'cuda' takes at most {MOST_COLUMNS} columns, got {columns}\n"
            "  search parts of the matrix, with TopKState"
        )
    values = torch.empty((rows, k), dtype=torch.float32, device=x.device)
    indices = torch.empty((rows, k), dtype=torch.int64, device=x.device)
    counts = indices.new_zeros(rows)
    statistics = indices.new_zeros((0 if count_above is None else len(STATISTICS), rows))
    if not columns:
        values.fill_(-torch.inf), indices.fill_(-1)
    elif rows:
        problem = _Problem(x, y, scale, row_bias, col_bias, pair_data, spec)
        floor, level = (None if t is None else t.float().contiguous() for t in (floor, count_above))
        sweep = _Sweep(problem, plan(rows, columns, k), k, floor, level)
        for begin in range(0, rows, sweep.cut.rows):
            part = slice(begin, min(begin + sweep.cut.rows, rows))
            sweep.run(part)
            sweep.select(values[part], indices[part], counts[part])
            if level is not None:
                statistics[:, part] = sweep.statistics()
    return values, indices, counts, statistics


# ---- Lists -----------------------------------------------------------------------------------------------------------


def order(values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of a list per row: score descending, then index ascending; padded with -inf and -1."""
    rows, listed = values.shape
    size = _power_of_two(listed)
    if size > MOST_ORDERED:
        return reference.order(values, indices, k)
    best = torch.empty((rows, k), dtype=torch.float32, device=values.device)
    best_indices = torch.empty((rows, k), dtype=torch.int64, device=values.device)
    lists = (values.float().contiguous(), indices.contiguous())
    kernels().cuda_similarity_topk_order(*lists, best, best_indices, rows, listed, k, size)
    return best.to(values.dtype), best_indices


def merge(values: Tensor, indices: Tensor, other_values: Tensor, other_indices: Tensor) -> tuple[Tensor, Tensor]:
    """The best of two lists per row, as long as the first."""
    return order(torch.cat([values, other_values], 1), torch.cat([indices, other_indices], 1), values.shape[1])


# ---- Logits of listed pairs ------------------------------------------------------------------------------------------


def _at(problem: _Problem, indices: Tensor, *, raw: bool) -> Tensor:
    """Logits of the listed pairs, -inf where there is none; or, if raw, inner products and 0."""
    x, y = problem.x, problem.y
    rows, listed = indices.shape
    values = torch.empty(indices.shape, dtype=torch.float32, device=x.device)
    operands = (x.contiguous(), y.to(x.dtype).contiguous())
    shape = (rows, len(y), x.shape[1], listed)
    kernels().cuda_similarity_topk_at(*operands, *problem.arguments, indices.contiguous(), values, *shape, raw)
    return values


def at(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    indices: Tensor,
) -> Tensor:
    """Return the logits of the columns that each row lists, -inf where it lists -1. Rules do not apply."""
    if indices.numel() == 0 or not len(y):
        return torch.full(indices.shape, -torch.inf, dtype=torch.float32, device=x.device)
    return _at(_Problem(x, y, scale, row_bias, col_bias, pair_data, spec), indices, raw=False)


# ---- Gradients -------------------------------------------------------------------------------------------------------


def _sum_lists(lists: Lists, weights: Tensor, rows: Tensor | None) -> Tensor:
    owners = len(lists.indptr) - 1
    if rows is None:
        sums = weights.new_zeros(owners)
        kernels().cuda_similarity_topk_sum(lists.indptr, weights, sums, owners)
        return sums
    sums = weights.new_zeros((owners, rows.shape[1]))
    if sums.numel() > 0 and weights.numel() > 0:
        arguments = (rows.contiguous(), lists.indptr, lists.partners, weights, sums)
        kernels().cuda_similarity_topk_sum_rows(*arguments, *sums.shape)
    return sums


def backward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    indices: Tensor,
    d_values: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, scale, row_bias, col_bias in float32; those not in `needs` have no rows."""
    problem = _Problem(x, y, scale, row_bias, col_bias, pair_data, spec)
    each = problem.layout.sets[0]

    def dots() -> Tensor:
        return _at(problem, indices, raw=True)

    return gradients(x, y.to(x.dtype), scale, each, indices, d_values, needs, dots, _sum_lists)
