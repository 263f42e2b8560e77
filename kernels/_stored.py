"""Chunks of a similarity matrix whose inner products the library multiplied, and what kernels read there.

A *line* is a row or a column. A program owns a few lines of one direction and sweeps what they meet in the chunk, so a
number has one writer and every sum an order of its own. Axis 0 of a tile is what the program owns.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.core.numerics import chunks_of_rows
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf
from contrastive_ops.core.rules import Slot, bound_rules
from contrastive_ops.cuda import _products as products

from . import _pairs
from ._folds import LOG2_E, exact_sum, finite_or_zero
from ._launch import Launch
from ._similarity_problem import Problem
from ._tiles import guide_products
from ._variants import Variant

# Bytes of inner products that a chunk may have, of all matrices together.
CHUNK_BYTES = products.CHUNK_BYTES

# ---- Host ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tile:
    """How many lines a program owns, and how many of the other direction it reads at a time."""

    own: int
    other: int
    options: dict[str, int]


_OPTIONS = {"num_warps": 4, "num_stages": 1}
# Of rows, whose numbers lie side by side, and of columns; of two matrices half as much.
_TILES = (Tile(16, 64, _OPTIONS), Tile(64, 16, _OPTIONS))
_TILES_OF_TWO = (Tile(16, 32, _OPTIONS), Tile(32, 16, {"num_warps": 8, "num_stages": 1}))
_INTERPRETED = (Tile(32, 32, _OPTIONS), Tile(32, 32, _OPTIONS))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some rows of a similarity matrix.

    Attributes:
        problem: matrices, rules.
        rows: which rows.
        dots: (rows, M) float32 inner products.
        teacher: rules and inner products of a second matrix of the same shape, or None.
    """

    problem: Problem
    rows: slice
    dots: Tensor
    teacher: tuple[_pairs.PairArguments, Tensor] | None = None

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.rows.stop - self.rows.start

    def tile(self, cols: bool) -> Tile:
        """The tile of a program that owns rows, or columns."""
        if self.problem.arch == "interpreter":
            return _INTERPRETED[cols]
        return (_TILES if self.teacher is None else _TILES_OF_TWO)[cols]

    def launch(self, kernel: Any, cols: bool, **arguments: Any) -> None:
        """Run a kernel whose programs own all rows of the chunk, or all columns."""
        p, tile = self.problem, self.tile(cols)
        teacher_pairs, teacher_dots = self.teacher or (None, None)
        common = {
            "dots": self.dots,
            "N": len(p.x),
            "M": len(p.y),
            "first_row": self.rows.start,
            "last_row": self.rows.stop,
            "data": p.pairs.data,
            "offsets": p.pairs.offsets,
            "guide_depth": p.pairs.guide_depth,
            "sets": p.pairs.sets,
            "guide": p.pairs.guide,
            "teacher_dots": teacher_dots,
            "teacher_data": None if teacher_pairs is None else teacher_pairs.data,
            "teacher_sets": None if teacher_pairs is None else teacher_pairs.sets,
            "OWN_COLS": int(cols),
            "OWN": tile.own,
            "OTHER": tile.other,
        }
        known = {name: value for name, value in common.items() if name in kernel.arg_names}
        lines = len(p.y) if cols else self.count
        Launch(kernel, triton.cdiv(lines, tile.own), {**known, **arguments}, tile.options).run()

    def blocks(self) -> Tensor:
        """Zeros for sums of columns, one row for each program that owns rows."""
        programs = triton.cdiv(self.count, self.tile(False).own)
        return self.dots.new_zeros((programs, self.dots.shape[1]))


def chunks(p: Problem, matrices: int = 1) -> Iterator[slice]:
    """The rows of each chunk where this many matrices of float32 are held at a time; none without a pair."""
    N, M, _ = p.shape
    if N and M:
        # Whole tiles, so that sums of columns come in an order that does not depend on the number of matrices.
        step = max(1, CHUNK_BYTES // (4 * M * matrices) // 32) * 32
        yield from chunks_of_rows(N, step)


def inner_products(x: Tensor, y: Tensor, buffer: Tensor) -> Tensor:
    """x @ y.T in float32, in the memory of `buffer`."""
    out = buffer[: len(x) * len(y)].view(len(x), len(y))
    products.inner_products(x, y, out)
    return out


def room(p: Problem, matrices: int = 1) -> Tensor:
    """Memory for the inner products of the largest chunk."""
    first = next(chunks(p, matrices), slice(0, 0))
    return p.x.new_empty(((first.stop - first.start) * len(p.y),), dtype=torch.float32)


class Weights:
    """Memory for the weights of a chunk: one matrix, or of 16 bits two, the second of what rounding takes from it.

    The weights of a row cancel where its gradient is small; what independent rounding errors add does not.
    """

    def __init__(self, like: Tensor, size: int) -> None:
        self.memory = [like.new_empty((size,)) for _ in range(2 if like.element_size() == 2 else 1)]
        self.parts: list[Tensor] = []

    def arguments(self, shape: torch.Size) -> dict[str, Tensor | None]:
        """Where a kernel is to write weights of this shape."""
        self.parts = [memory[: shape.numel()].view(shape) for memory in self.memory]
        return {"weights": self.parts[0], "rest": self.parts[1] if len(self.parts) > 1 else None}

    def product(self, out: Tensor, other: Tensor, *, add: bool, of_columns: bool = False) -> None:
        """Write weights @ other, or weights.T @ other, to `out`, or add it."""
        for number, part in enumerate(self.parts):
            products.set_or_add(out, part.T if of_columns else part, other, add=add or number > 0)


def no_lines(like: Tensor, sides: int, size: int) -> Tensor:
    """(sides, 3, size) of lines that have met no pair: maximum, sum of the others' ratios to it, what rounding took."""
    lines = like.new_zeros((sides, 3, size), dtype=torch.float32)
    lines[:, 0] = -torch.inf
    return lines


def tops_and_logs(lines: Tensor) -> tuple[Tensor, Tensor]:
    """(sides, size) each: the maximum of each line, and log of sum exp(logit - maximum)."""
    top, others = lines[:, 0], lines[:, 1] + torch.where(lines[:, 2].isfinite(), lines[:, 2], 0.0)
    return top.clone(), torch.where(top == torch.inf, torch.inf, others.log1p())


# ---- On a tile -------------------------------------------------------------------------------------------------------


@triton.jit
def exp(x):
    """exp, by the instruction that GPUs have for powers of two."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def owned(begin, OWN: tl.constexpr):
    """The lines of this program."""
    return begin + tl.program_id(0) * OWN + tl.arange(0, OWN)


@triton.jit
def bounds(M, first_row, last_row, OWN_COLS: tl.constexpr):
    """Where the lines of all programs begin and end, and where what they meet does."""
    return (
        0 if OWN_COLS else first_row,
        M if OWN_COLS else last_row,
        first_row if OWN_COLS else 0,
        last_row if OWN_COLS else M,
    )


@triton.jit
def places(own, other, OWN_COLS: tl.constexpr):
    """Rows and columns of a tile, of shapes that broadcast to it."""
    return (other[None, :] if OWN_COLS else own[:, None]), (own[:, None] if OWN_COLS else other[None, :])


@triton.jit
def chunk_tile(matrix, rows, cols, first_row, last_row, M):
    """A tile of a chunk's matrix in float32, 0 outside of it."""
    inside = (rows < last_row) & (cols < M)
    return tl.load(matrix + (rows - first_row).to(tl.int64) * M + cols, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def stored_logits(
    dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, sets, guide, OWN_COLS: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Inner products of a tile, and its logits: -inf for pairs that take no part, also those outside of the chunk."""
    rows, cols = places(own, other, OWN_COLS)
    outside = (rows >= last_row) | (cols >= M)
    found = chunk_tile(dots, rows, cols, first_row, last_row, M)
    if sets[0].row_factor >= 0:
        found *= _pairs.unit_factor(rows, cols, N, M, data, sets[0])
    similarity = found
    if guide[0] >= 0:
        own_size = M if OWN_COLS else N
        other_size = N if OWN_COLS else M
        similarity = guide_products(
            data[guide[OWN_COLS]], data[guide[1 - OWN_COLS]], own, other, own_size, other_size, guide_depth, OWN, OTHER,
            16,
        )  # fmt: skip
    logit = _pairs.logits(found, rows, cols, N, M, data, sets[0])
    shown = _pairs.shown(logit, found, similarity, outside, rows, cols, N, M, data, offsets[0], sets[0], False)
    return found, shown


@triton.jit
def teacher_logits(dots, shown, own, other, first_row, last_row, N, M, data, sets, OWN_COLS: tl.constexpr):
    """Logits of a second matrix; -inf where the first has it."""
    rows, cols = places(own, other, OWN_COLS)
    found = chunk_tile(dots, rows, cols, first_row, last_row, M)
    logit = _pairs.logits(found, rows, cols, N, M, data, sets[0])
    return tl.where(shown == float("-inf"), float("-inf"), logit)


@triton.jit
def store_tile(matrix, tile, own, other, first_row, last_row, M):
    """Write a tile of rows into a chunk's matrix, rounded to its dtype."""
    at = matrix + (own - first_row).to(tl.int64)[:, None] * M + other[None, :]
    tl.store(at, tile.to(matrix.dtype.element_ty), mask=(own < last_row)[:, None] & (other < M)[None, :])


@triton.jit
def store_weights(weights, rest, tile, own, other, first_row, last_row, M):
    """Write a tile of rows of weights, as a sum of two where there is a matrix for what rounding takes."""
    store_tile(weights, tile, own, other, first_row, last_row, M)
    if rest is not None:
        taken = tile - tile.to(weights.dtype.element_ty).to(tl.float32)
        store_tile(rest, taken, own, other, first_row, last_row, M)


@triton.jit
def probability(z, lse):
    """exp(z - lse), 0 in lines in which no pair takes part."""
    return tl.where(lse == float("-inf"), 0.0, exp(z - finite_or_zero(lse)))


# ---- Logsumexp of lines ----------------------------------------------------------------------------------------------


@triton.jit
def merged_line(top, others, lost, z, OTHER: tl.constexpr):
    """A line and the tile of its next logits. The ratio of the maximum to itself, 1, is in no sum."""
    nan = tl.max((z != z).to(tl.int32), 1) > 0
    own_top = tl.max(tl.where(z != z, float("-inf"), z), 1)
    index = tl.arange(0, OTHER)[None, :]
    best = tl.min(tl.where(z == own_top[:, None], index, OTHER), 1)
    ratio = exp(z - finite_or_zero(own_top)[:, None])
    own_others = tl.sum(tl.where(index == best[:, None], 0.0, ratio), 1)
    new_top = tl.maximum(top, own_top)
    # What was the largest and is no longer has a ratio as all others.
    old = exp(top - finite_or_zero(new_top))
    new = exp(own_top - finite_or_zero(new_top))
    stays = top >= own_top
    more = tl.where(stays, (1.0 + own_others) * new, own_others)
    total = tl.where(stays, others, (1.0 + others) * old)
    lost = tl.where(stays, lost, lost * old)
    total, lost = exact_sum(total, more, lost)
    return tl.where(nan | (top != top), float("nan"), new_top), total, lost


@triton.jit(do_not_specialize=["N", "M", "first_row", "last_row", "size"])
def lines_kernel(
    dots, teacher_dots, N, M, first_row, last_row, data, offsets, guide_depth, teacher_data, lines, size,
    sets: tl.constexpr, guide: tl.constexpr, teacher_sets: tl.constexpr, OWN_COLS: tl.constexpr, OWN: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """Go on with lines, [sides, 3, size], by what they meet in this chunk."""
    first, last, begin, end = bounds(M, first_row, last_row, OWN_COLS)
    own = owned(first, OWN)
    mask = own < last
    at = lines + own
    top = tl.load(at, mask=mask, other=float("-inf"))
    others = tl.load(at + size, mask=mask, other=0.0)
    lost = tl.load(at + 2 * size, mask=mask, other=0.0)
    if teacher_dots is not None:
        top_t = tl.load(at + 3 * size, mask=mask, other=float("-inf"))
        others_t = tl.load(at + 4 * size, mask=mask, other=0.0)
        lost_t = tl.load(at + 5 * size, mask=mask, other=0.0)
    for start in range(begin, end, OTHER):
        other = start + tl.arange(0, OTHER)
        _, s = stored_logits(
            dots, own, other, first_row, last_row, N, M, data, offsets, guide_depth, sets, guide, OWN_COLS, OWN, OTHER
        )
        top, others, lost = merged_line(top, others, lost, s, OTHER)
        if teacher_dots is not None:
            t = teacher_logits(
                teacher_dots, s, own, other, first_row, last_row, N, M, teacher_data, teacher_sets, OWN_COLS
            )
            top_t, others_t, lost_t = merged_line(top_t, others_t, lost_t, t, OTHER)
    tl.store(at, top, mask=mask)
    tl.store(at + size, others, mask=mask)
    tl.store(at + 2 * size, lost, mask=mask)
    if teacher_dots is not None:
        tl.store(at + 3 * size, top_t, mask=mask)
        tl.store(at + 4 * size, others_t, mask=mask)
        tl.store(at + 5 * size, lost_t, mask=mask)


# ---- What is compiled ahead of time ----------------------------------------------------------------------------------

# Rules of a call, by name: every two of them that share code are in one.
_SLOTS: dict[str, tuple[Slot, ...]] = {
    "all": (),
    "ids": (Slot.DIFFER_ROWS, Slot.DIFFER_COLS, Slot.SAME_ROWS, Slot.SAME_COLS),
    "bounds": tuple(slot for rule in bound_rules() for slot in rule.slots),
    "lists": (Slot.EXCLUDE_INDPTR, Slot.EXCLUDE_INDICES),
    "guide": (Slot.GUIDE_X, Slot.GUIDE_Y, Slot.GUIDE_BELOW_ROWS, Slot.GUIDE_BELOW_COLS),
}
RULES = tuple(_SLOTS)


def sample(choice: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Layout]:
    """Matrices, scale, bias of columns and layout of a combination of "dtype", "rules", "scale_of" and "bias"."""
    rows, columns = 48, 80
    x, y = (torch.zeros(size, 64, dtype=choice["dtype"]) for size in (rows, columns))
    data = {slot: _pairs.empty(slot, rows, columns) for slot in _SLOTS[choice["rules"]]}
    own = LogitSet(choice["scale_of"], False, 0 if choice["rules"] == "ids" else None, data)
    scale = torch.ones(rows if choice["scale_of"] == ScaleOf.ROWS else 1)
    return x, y, scale, torch.zeros(columns) if choice["bias"] else None, Layout((own,), ())


def distinct(found: Iterable[Variant]) -> Iterator[Variant]:
    """The first variant of each name: chunks and prefixes launch the same kernels again and again."""
    names: set[str] = set()
    for variant in found:
        if variant.name not in names:
            names.add(variant.name)
            yield variant


def shown(value: Any) -> str:
    """An option, for the name of a variant."""
    return value.name.lower() if isinstance(value, enum.Enum) else str(value).removeprefix("torch.")
