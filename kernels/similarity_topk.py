"""similarity_topk in Triton: the k best columns of every row, logits of listed pairs, their gradients.

A program has a block of rows and a range of columns, and a list in memory for each row, with room for more than k:

    for each block of its columns
        inner products, logits                               nothing leaves the registers
        logit > the row's threshold?                         if none in the tile: next
            rules -> append what is left to the rows' lists  one entry of every row at a time, so no atomics
            a list is full: leave its k best (bit by bit, a group of rows at once), raise the thresholds

Columns come in ascending order and appending keeps it, so an equal logit that comes later is worse: one strict
comparison is exact, and ties are cut by place. Each list ends as at most k entries, and one sort of 64-bit keys over
all ranges of a row gives its result (see _selection.py). Nothing is fetched in excess, nothing of size N x M exists,
one launch serves all columns, and nothing waits for the host. Few rows are cut into more ranges of columns.

Appending costs a step for every entry of the row that has most of them in a tile: about k ln(M / k) entries of M
columns in random order. Columns sorted by ascending score are the worst case, in which all M are appended.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf
from contrastive_ops.core.rules import STATISTICS, Slot, bound_rules
from contrastive_ops.reference.similarity_topk import merge, order

from . import _listed, _pairs
from ._cover import Combine, pairwise_cover
from ._launch import Launch, arch_of
from ._listed import at, backward, unit_stride
from ._selection import best
from ._topk_sweep import sweep_kernel
from ._variants import Variant

__all__ = ["at", "backward", "forward", "merge", "order", "variants"]

# ---- Sizes -----------------------------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How a kernel is compiled: the tile, and what belongs to it."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # what the compiler of NVIDIA would not give by itself

    @property
    def options(self) -> dict[str, int]:
        """Those of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else {**options, "maxnreg": self.maxnreg}


# Lists of the rows that are searched at once.
LIST_BYTES = 1 << 30
# Longer lists are not cut down while they grow.
LONGEST_LIST = 8192
# From here on fewer rows share a program, so that the lists of all programs stay small.
LONG_LIST = 1024
FEW_ROWS = 16
# Indices have 32 bits in kernels, and run up to a tile of every range past the last column.
MOST = (1 << 31) - (1 << 20)


class Load(enum.IntEnum):
    """What else than one tile of products takes registers."""

    NOTHING = 0
    COLUMNS = 1  # numbers of columns, which rules compare
    TILES = 2  # another tile of products, codes to convert, statistics


def load_of(layout: Layout, level: Tensor | None) -> Load:
    """How crowded registers are."""
    slots = {slot for each in layout.sets for slot in each.data}
    if level is not None or slots & {Slot.GUIDE_X, Slot.CODE_SCALE, Slot.LOG_WEIGHT}:
        return Load.TILES
    return Load.COLUMNS if slots else Load.NOTHING


def tile_for(arch: str, dtype: torch.dtype, rows: int, k: int, load: Load) -> Tile:
    """The tile for a number of rows and length of lists."""
    if arch == "interpreter":
        return Tile(16, 16, 16, 4, 1)
    if dtype == torch.float32:
        few, columns = rows <= FEW_ROWS, 64 if arch == "sm_90" else 32
        return Tile(16 if few else 32, columns, 16, 8, 2, maxnreg=255 if arch == "sm_80" else None)
    crowded = load == Load.TILES
    if rows <= FEW_ROWS:
        if not crowded:
            return Tile(16, 64, 128, 4, 2 if arch == "gfx942" else 4)
        tiles = {"sm_80": Tile(16, 32, 32, 8, 2), "sm_90": Tile(16, 64, 32, 4, 4), "gfx942": Tile(16, 64, 32, 4, 2)}
        return tiles[arch]
    if crowded or k > LONG_LIST:
        return {
            "sm_80": Tile(64, 32, 32, 8, 2),
            "sm_90": Tile(64, 32, 32, 8, 1) if crowded else Tile(64, 64, 32, 8, 3),
            "gfx942": Tile(64, 32, 32, 4, 1),
        }[arch]
    if arch == "gfx942":
        return Tile(128, 64, 64, 8, 2)
    return Tile(128, 128 if load == Load.NOTHING and arch == "sm_90" else 64, 64, 8, 3)


class Plan(NamedTuple):
    """How the work is cut.

    Attributes:
        parts: ranges of columns, each with a list of its own for every row.
        width: columns of a range.
        capacity: entries of a list.
        span: what `sweep_kernel` calls SPAN.
        rows: rows at a time.
    """

    parts: int
    width: int
    capacity: int
    span: int
    rows: int


def plan(rows: int, columns: int, k: int, tile: Tile, processors: int) -> Plan:
    """Cut columns where rows alone do not keep the processors busy, and rows where their lists take too much memory."""
    blocks = triton.cdiv(rows, tile.BLOCK_M)
    wanted = max(1, 2 * processors // blocks)
    width = triton.cdiv(max(triton.cdiv(columns, wanted), 4 * tile.BLOCK_N), tile.BLOCK_N) * tile.BLOCK_N
    parts = triton.cdiv(columns, width)
    capacity = k + tile.BLOCK_N + max(k // 2, tile.BLOCK_N)
    shrinks = k <= LONGEST_LIST and capacity < width
    if not shrinks:
        capacity = min(width, columns)
    affordable = LIST_BYTES // (8 * parts * capacity * tile.BLOCK_M)
    span = triton.next_power_of_2(capacity) if shrinks else 0
    return Plan(parts, width, capacity, span, tile.BLOCK_M * min(max(affordable, 1), blocks))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _group(span: int) -> tuple[int, int]:
    """How many rows are shrunk at a time, and entries of each that are moved at a time."""
    group = min(max(1, 2048 // max(span, 1)), 16) if span else 1
    return group, min(max(span, 16), 1024 // group)


# ---- Forward ---------------------------------------------------------------------------------------------------------


class _Search:
    """One search: what all its launches share, and the lists that they fill."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        layout: Layout,
        pairs: _pairs.PairArguments,
        k: int,
        floor: Tensor | None,
        level: Tensor | None,
        tile: Tile,
        processors: int,
    ) -> None:
        self.tile, self.k = tile, k
        self.cut = cut = plan(len(x), len(y), k, tile, processors)
        x, y = unit_stride(x), unit_stride(y)
        code_scale = layout.sets[0].data.get(Slot.CODE_SCALE)
        floor, level, code_scale = (None if t is None else t.contiguous() for t in (floor, level, code_scale))
        size = (min(cut.rows, triton.cdiv(len(x), tile.BLOCK_M) * tile.BLOCK_M), cut.parts)
        self.scores = torch.empty((*size, cut.capacity), dtype=torch.float32, device=x.device)
        self.columns = torch.empty((*size, cut.capacity), dtype=torch.int32, device=x.device)
        self.counted = None if level is None else torch.empty((*size, 8), dtype=torch.int32, device=x.device)
        group, piece = _group(cut.span)
        self.arguments: Mapping[str, object] = {
            "x": x,
            "y": y,
            "code_scale": code_scale,
            "floor": floor,
            "level": level,
            "scores": self.scores,
            "columns": self.columns,
            "counts": torch.empty(size, dtype=torch.int32, device=x.device),
            "thresholds": torch.empty(size, dtype=torch.float32, device=x.device),
            "statistics": self.counted,
            "x_stride": x.stride(0),
            "y_stride": y.stride(0),
            "N": len(x),
            "M": len(y),
            "D": x.shape[1],
            "guide_depth": pairs.guide_depth,
            "parts": cut.parts,
            "width": cut.width,
            "capacity": cut.capacity,
            "k": k,
            "data": pairs.data,
            "offsets": pairs.offsets,
            "sets": pairs.sets,
            "GUIDE_X": pairs.guide[0],
            "GUIDE_Y": pairs.guide[1],
            "BLOCK_M": tile.BLOCK_M,
            "BLOCK_N": tile.BLOCK_N,
            "BLOCK_K": tile.BLOCK_K,
            "SPAN": cut.span,
            "GROUP": group,
            "PIECE": piece,
        }

    def launch(self, begin: int, end: int) -> Launch:
        """What fills the lists of some rows."""
        programs = triton.cdiv(end - begin, self.tile.BLOCK_M) * self.cut.parts
        return Launch(sweep_kernel, programs, {**self.arguments, "first_row": begin}, self.tile.options)

    def best(self, rows: int) -> tuple[Tensor, Tensor]:
        """Values and indices of the rows that were searched last, at most k of each, best first."""
        length = self.k if self.cut.span else self.cut.capacity
        return best(*(t[:rows, :, :length].reshape(rows, -1) for t in (self.scores, self.columns)), self.k)


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
    if max(rows, columns) > MOST:
        raise NotImplementedError(
            f"similarity_topk: backend 'triton' takes at most {MOST} rows and columns, got {rows} and {columns}\n"
            "  search parts of the matrix, with TopKState"
        )
    values = x.new_full((rows, k), -torch.inf, dtype=torch.float32)
    indices = torch.full((rows, k), -1, dtype=torch.int64, device=x.device)
    statistics = indices.new_zeros((0 if count_above is None else len(STATISTICS), rows))
    if rows and columns:
        layout = Layout.decode(pair_data, spec)
        pairs = _pairs.arguments(layout, rows, columns, scale, row_bias, col_bias)
        floor, level = (None if t is None else t.float() for t in (floor, count_above))
        tile = tile_for(arch_of(x), x.dtype, rows, k, load_of(layout, level))
        search = _Search(x, y, layout, pairs, k, floor, level, tile, _processors(x.device))
        for begin in range(0, rows, search.cut.rows):
            end = min(begin + search.cut.rows, rows)
            search.launch(begin, end).run()
            best_values, best_indices = search.best(end - begin)
            found = best_values.shape[1]
            values[begin:end, :found], indices[begin:end, :found] = best_values, best_indices
            if search.counted is not None:
                statistics[:, begin:end] = search.counted[: end - begin, :, : len(STATISTICS)].sum(1).T
    return values, indices, (indices >= 0).sum(1), statistics


# ---- Ahead of time ---------------------------------------------------------------------------------------------------

_RULES = {
    "all pairs": (),
    "ids": (Slot.DIFFER_ROWS, Slot.DIFFER_COLS, Slot.EXCLUDE_INDPTR, Slot.EXCLUDE_INDICES),
    "bounds": (*(slot for rule in bound_rules() for slot in rule.slots), Slot.SAME_ROWS, Slot.SAME_COLS),
    "guide": (Slot.GUIDE_X, Slot.GUIDE_Y, Slot.GUIDE_BELOW_ROWS, Slot.LOG_WEIGHT, Slot.CLASS_ROWS, Slot.CLASS_COLS),
}
_CHOICES = {
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
    "k": [10, 500, LONGEST_LIST, LONGEST_LIST + 1],
    "few": [False, True],
    "rules": list(_RULES),
    "codes": [False, True],
    "extras": ["", "floor and biases", "statistics", "statistics of other rules"],
}


def _set(rules: str, rows: int, columns: int) -> LogitSet:
    """A set with some rules, whose tensors only have to be of the right types."""
    data = {slot: _pairs.empty(slot, rows, columns) for slot in _RULES[rules]}
    return LogitSet(ScaleOf.ALL, False, 0 if rules == "ids" else None, data)


def _sweep_variant(arch: str, chosen: Mapping[str, object]) -> Variant:
    dtype, k, rules, extras = (chosen[name] for name in ("dtype", "k", "rules", "extras"))
    rows, columns = 1 if chosen["few"] else FEW_ROWS + 1, 1 << 15
    sets = [_set(rules, rows, columns)]
    if extras == "statistics of other rules":
        sets.append(_set("guide" if rules == "bounds" else "bounds", rows, columns))
    if chosen["codes"]:
        sets[0].data[Slot.CODE_SCALE] = torch.zeros(columns)
    layout = Layout(tuple(sets), ())
    biases = (torch.zeros(rows), torch.zeros(columns)) if extras == "floor and biases" else (None, None)
    pairs = _pairs.arguments(layout, rows, columns, torch.ones(len(sets)), *biases)
    x = torch.zeros((rows, 128), dtype=dtype)
    y = torch.zeros((columns, 128), dtype=torch.int8 if chosen["codes"] else dtype)
    level = torch.zeros(rows) if extras.startswith("statistics") else None
    tile = tile_for(arch, dtype, rows, k, load_of(layout, level))
    search = _Search(x, y, layout, pairs, k, biases[0], level, tile, 1)
    name = ", ".join(
        ["similarity_topk", str(dtype).removeprefix("torch."), f"k={k}", rules]
        + [name for name in ("few", "codes") if chosen[name]]
        + ([extras] if extras else [])
    )
    # Tensor cores multiply 64 rows at a time or, with older instructions, 16.
    return search.launch(0, rows).variant(name, has_dot=dtype != torch.float32 and tile.BLOCK_M >= 64)


def variants(arch: str, combine: Combine = pairwise_cover) -> Iterator[Variant]:
    """Every two options of `sweep_kernel` together in some variant, and the kernels of listed pairs."""
    yield from (_sweep_variant(arch, chosen) for chosen in combine(_CHOICES))
    yield from _listed.variants(arch)
