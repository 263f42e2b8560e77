"""Logits of a tile, and which of its pairs take part: the rules of one logit set, as compile-time switches.

A tile holds inner products of some rows with some columns. `rows` and `cols` are their indices, int32, of shape (B, 1)
and (1, B), or (1, B) and (B, 1) where the tile is read mirrored (self-similarity, or columns that own their gradient):
everything here is elementwise, so that one function serves both.

On the host, `arguments` turns pair_data and spec into

    data     a tuple of tensors, each of them once
    offsets  a tuple of integers, the diagonal of each set
    sets     a compile-time tuple of `SetRules`, which say where in `data` the tensors of a rule are

A kernel takes these three, and passes ``data, offsets[s], sets[s]`` on to the functions here.
"""

from __future__ import annotations

from collections import namedtuple
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf
from contrastive_ops.core.rules import RULES, STATISTICS, GuideRule, Slot, bound_rules

# Slots whose tensors kernels find by `SetRules`. A table for the int8 codes of similarity_topk is no rule.
_SLOTS = {slot: slot.name.lower() for slot in Slot if slot not in (Slot.CODE_SCALE, Slot.UNIT)}

_OPTIONS = ("scale_of", "negate", "has_diagonal", "drops", "counted", "scale")
_COMMON = ("row_bias", "col_bias", "target")

SetRules = namedtuple("SetRules", (*_OPTIONS, *_COMMON, *_SLOTS.values()), defaults=[-1] * (len(_COMMON) + len(_SLOTS)))
SetRules.__doc__ = """One logit set as kernels see it: compile-time switches, and positions in `data`.

A position is -1 for what does not apply. Fields named like a `Slot` hold the position of its tensor.
`class_rows` are offsets of rows of the table.

Attributes:
    scale_of: a `ScaleOf`.
    negate: whether the set reads -l.
    has_diagonal: whether its offset applies.
    drops: whether any rule drops pairs.
    counted: bit s is set where the rule of number s of `STATISTICS` is one of the set's.
    scale: position of the scale: 1, N or M numbers.
    row_bias: position of the bias of rows.
    col_bias: position of the bias of columns.
    target: position of the targets, int64.
"""


class PairArguments(NamedTuple):
    """What kernels take for all sets of a call.

    Attributes:
        data: tensors, contiguous, each of them once.
        offsets: the diagonal of each set, 0 where it has none.
        sets: compile-time, one `SetRules` per set.
        guide_depth: the dimension of the guide, 0 without one.
    """

    data: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    sets: tuple[SetRules, ...]
    guide_depth: int

    @property
    def guide(self) -> tuple[int, int]:
        """Positions in `data` of the guide's rows and columns; (-1, -1) without one."""
        return next(((each.guide_x, each.guide_y) for each in self.sets if each.guide_x >= 0), (-1, -1))


# ---- Host ------------------------------------------------------------------------------------------------------------


class _Data:
    """Collects tensors; one that several sets share is passed once."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._known: dict[tuple[object, ...], int] = {}

    def add(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in self._known:
            self._known[key] = len(self.tensors)
            self.tensors.append(tensor.contiguous())
        return self._known[key]


def arguments(
    layout: Layout,
    rows: int,
    columns: int,
    scale: Tensor,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    target: Tensor | None = None,
) -> PairArguments:
    """Turn what an operator is given into what kernels take."""
    data = _Data()
    common = {"row_bias": data.add(row_bias), "col_bias": data.add(col_bias), "target": data.add(target)}
    scales = [scale.detach()[part] for part in layout.scale_slices(rows, columns)]
    sets = [_set_rules(each, own, common, data) for each, own in zip(layout.sets, scales, strict=True)]
    # Beyond the matrix any offset drops as little as any other.
    offsets = [min(max(each.diagonal or 0, -rows), columns) for each in layout.sets]
    depth = next((each.data[Slot.GUIDE_X].shape[1] for each in layout.sets if Slot.GUIDE_X in each.data), 0)
    return PairArguments(tuple(data.tensors), tuple(offsets), tuple(sets), depth)


def _set_rules(each: LogitSet, scale: Tensor, common: dict[str, int], data: _Data) -> SetRules:
    tensors = {slot: tensor for slot, tensor in each.data.items() if slot in _SLOTS}
    if Slot.LOG_WEIGHT in tensors:
        # Offsets of rows of the table, so that kernels need not know its width.
        row_class, width = tensors[Slot.CLASS_ROWS], tensors[Slot.LOG_WEIGHT].shape[1]
        tensors[Slot.CLASS_ROWS] = torch.where(row_class < 0, -1, row_class * width)
    used = [rule for rule in RULES.values() if rule.is_in(tensors)]
    return SetRules(
        scale_of=int(each.scale_of),
        negate=each.negate,
        has_diagonal=each.diagonal is not None,
        drops=each.diagonal is not None or any(rule.drops for rule in used),
        counted=sum(1 << STATISTICS.index(rule.name) for rule in used if rule.counted),
        scale=data.add(scale),
        **common,
        **{_SLOTS[slot]: data.add(tensor) for slot, tensor in tensors.items()},
    )


def empty(slot: Slot, rows: int, columns: int) -> Tensor:
    """A tensor as operators pass it for a slot, for kernels that are compiled ahead of time."""
    size = rows if slot.name.endswith(("_ROWS", "_X")) else columns
    if slot in (Slot.GUIDE_X, Slot.GUIDE_Y, Slot.LOG_WEIGHT):
        return torch.empty(size, 32)
    if slot == Slot.FILL:
        return torch.empty(())
    if slot == Slot.LINEAR_WEIGHT or any(slot in rule.slots for rule in (*bound_rules(), GuideRule.bounds)):
        return torch.empty(size)
    return torch.empty(rows + 1 if slot.name.endswith("INDPTR") else size, dtype=torch.int64)


# ---- On a tile -------------------------------------------------------------------------------------------------------

_OF_ALL: tl.constexpr = tl.constexpr(int(ScaleOf.ALL))
_OF_ROWS: tl.constexpr = tl.constexpr(int(ScaleOf.ROWS))


@triton.jit
def scale_factor(rows, cols, N, M, data, rules):
    """dlogit/d(inner product), of a shape that broadcasts to the tile."""
    if rules.scale_of == _OF_ALL:
        factor = tl.load(data[rules.scale])
    elif rules.scale_of == _OF_ROWS:
        factor = tl.load(data[rules.scale] + rows, mask=rows < N, other=0.0)
    else:
        factor = tl.load(data[rules.scale] + cols, mask=cols < M, other=0.0)
    return -factor if rules.negate else factor


@triton.jit
def unit_factor(rows, cols, N, M, data, rules):
    """What inner products, and so their derivatives, are multiplied by, for a first set with factors."""
    row_factor = tl.load(data[rules.row_factor] + rows, mask=rows < N, other=1.0)
    return row_factor * tl.load(data[rules.col_factor] + cols, mask=cols < M, other=1.0)


@triton.jit
def logits(dots, rows, cols, N, M, data, rules):
    """Logits of all pairs of the tile, whatever the rules say."""
    logit = dots * scale_factor(rows, cols, N, M, data, rules)
    if rules.row_bias >= 0:
        row_bias = tl.load(data[rules.row_bias] + rows, mask=rows < N, other=0.0)
        logit += -row_bias if rules.negate else row_bias
    if rules.col_bias >= 0:
        col_bias = tl.load(data[rules.col_bias] + cols, mask=cols < M, other=0.0)
        logit += -col_bias if rules.negate else col_bias
    if rules.log_weight >= 0:
        row_class = tl.load(data[rules.class_rows] + rows, mask=rows < N, other=-1)
        col_class = tl.load(data[rules.class_cols] + cols, mask=cols < M, other=-1)
        known = (row_class >= 0) & (col_class >= 0)
        entry = tl.load(data[rules.log_weight] + (row_class + col_class), mask=known, other=0.0)
        logit += -entry if rules.negate else entry
    return logit


@triton.jit
def list_begin(indptr, indices, rows, N, first):
    """Where the columns from `first` on begin in each row's ascending list, and where the list ends."""
    begin = tl.load(indptr + rows, mask=rows < N, other=0)
    end = tl.load(indptr + rows + 1, mask=rows < N, other=0)
    last = end
    while tl.max(last - begin) > 0:
        middle = (begin + last) // 2
        open = begin < last
        before = open & (tl.load(indices + middle, mask=open, other=0) < first)
        begin = tl.where(before, middle + 1, begin)
        last = tl.where(before, last, tl.where(open, middle, last))
    return begin, end


@triton.jit
def listed(dots, rows, cols, N, indptr, indices):
    """True where the row's list names the column."""
    named = tl.full(dots.shape, False, tl.int1)
    at, end = list_begin(indptr, indices, rows, N, tl.min(cols))
    last = tl.max(cols)
    column = tl.load(indices + at, mask=at < end, other=-1)
    while tl.max(((column >= 0) & (column <= last)).to(tl.int32)) > 0:
        named |= column == cols
        at += 1
        column = tl.load(indices + at, mask=at < end, other=-1)
    return named


@triton.jit
def list_weights(dots, rows, cols, N, indptr, indices, weight):
    """The sum of the weights with which the row's list names the column, 0 where it does not."""
    total = tl.zeros_like(dots)
    at, end = list_begin(indptr, indices, rows, N, tl.min(cols))
    last = tl.max(cols)
    column = tl.load(indices + at, mask=at < end, other=-1)
    while tl.max(((column >= 0) & (column <= last)).to(tl.int32)) > 0:
        own = tl.load(weight + at, mask=at < end, other=0.0)
        total += tl.where(column == cols, own, 0.0)
        at += 1
        column = tl.load(indices + at, mask=at < end, other=-1)
    return total


@triton.jit
def equal_ids(rows, cols, N, M, row_ids, col_ids):
    """True where both have the same id; -1 equals nothing."""
    own = tl.load(row_ids + rows, mask=rows < N, other=-1)
    other = tl.load(col_ids + cols, mask=cols < M, other=-1)
    return (own == other) & (own != -1)


# Rules that are counted, by their places in `STATISTICS`.
_DIFFER = tl.constexpr(STATISTICS.index("differ"))
_SAME = tl.constexpr(STATISTICS.index("same"))
_BELOW = tl.constexpr(STATISTICS.index("below"))
_ABOVE = tl.constexpr(STATISTICS.index("above"))
_GUIDE = tl.constexpr(STATISTICS.index("guide"))
FIRST_RULE = tl.constexpr(STATISTICS.index("higher") + 1)
END_OF_RULES = tl.constexpr(len(STATISTICS))


@triton.jit
def also_dropped(drop, RULE: tl.constexpr, dots, guide, rows, cols, N, M, data, rules):
    """`drop`, and where one of the rules that are counted, which the set has, drops a pair. NaN passes bounds."""
    if RULE == _DIFFER:
        drop |= equal_ids(rows, cols, N, M, data[rules.differ_rows], data[rules.differ_cols])
    elif RULE == _SAME:
        drop |= ~equal_ids(rows, cols, N, M, data[rules.same_rows], data[rules.same_cols])
    elif RULE == _BELOW:
        if rules.below_rows >= 0:
            drop |= dots > tl.load(data[rules.below_rows] + rows, mask=rows < N, other=0.0)
        if rules.below_cols >= 0:
            drop |= dots > tl.load(data[rules.below_cols] + cols, mask=cols < M, other=0.0)
    elif RULE == _ABOVE:
        if rules.above_rows >= 0:
            drop |= dots < tl.load(data[rules.above_rows] + rows, mask=rows < N, other=0.0)
        if rules.above_cols >= 0:
            drop |= dots < tl.load(data[rules.above_cols] + cols, mask=cols < M, other=0.0)
    elif RULE == _GUIDE:
        if rules.guide_below_rows >= 0:
            drop |= guide > tl.load(data[rules.guide_below_rows] + rows, mask=rows < N, other=0.0)
        if rules.guide_below_cols >= 0:
            drop |= guide > tl.load(data[rules.guide_below_cols] + cols, mask=cols < M, other=0.0)
    return drop


@triton.jit
def dropped(dots, guide, rows, cols, N, M, data, offset, rules):
    """True where a rule drops a pair, for a set with `drops`.

    `dots` are the inner products and `guide` those of the guide, any tile where no set of the call has one.
    """
    drop = tl.full(dots.shape, False, tl.int1)
    if rules.has_diagonal:
        drop |= rows + offset == cols
    if rules.exclude_indptr >= 0:
        drop |= listed(dots, rows, cols, N, data[rules.exclude_indptr], data[rules.exclude_indices])
    for rule in tl.static_range(FIRST_RULE, END_OF_RULES):
        if (rules.counted >> rule) & 1 != 0:
            drop = also_dropped(drop, rule, dots, guide, rows, cols, N, M, data, rules)
    return drop


@triton.jit
def own_column(rows, cols, N, data, rules):
    """True where the column is the row's target, for a set with one."""
    target = tl.load(data[rules.target] + rows, mask=rows < N, other=-1)
    return target == cols


@triton.jit
def shown(logit, dots, guide, outside, rows, cols, N, M, data, offset, rules, FILLS: tl.constexpr):
    """Logits as folds see them: -inf for a pair that takes no part.

    Args:
        logit: of `logits`.
        outside: True for what is no pair of the matrix, or not this tile's.
        FILLS: show dropped pairs as the constant that `fill` gives them; without, as backward wants it, they are -inf.
    """
    if rules.drops:
        drop = dropped(dots, guide, rows, cols, N, M, data, offset, rules)
        if FILLS and rules.fill >= 0:
            logit = tl.where(drop, tl.load(data[rules.fill]), logit)
        else:
            logit = tl.where(drop, float("-inf"), logit)
    if rules.target >= 0:
        outside |= own_column(rows, cols, N, data, rules)
    return tl.where(outside, float("-inf"), logit)
