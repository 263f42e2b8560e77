"""The nearest columns of every row: squared distances are sums of squared differences, whoever found the columns.

``2 <x, y> - |x|^2 - |y|^2`` is one product of matrices, but of rows far from the origin or close to one another it has
few digits. So products of rows less a common one *propose* a few more columns than are wanted; the distances of these
are computed from differences, and a bound on what a product may be off proves that no other column belongs to the list.
Rows without the proof are searched again, from one of them as the origin or with more candidates. What is returned
depends neither on the origin nor on what else was asked in the call: equal rows are at distance 0, and rows, blocks and
shards that are searched on their own give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import autocast
from ..core.backends import Backend
from ..core.checks import accumulator
from ..core.numerics import chunks_of_rows
from ..core.offsets import common_row
from ..core.operators import call, define
from ..core.problem import Layout, LogitSet, ScaleOf, take_rows
from ..core.records import changed
from ..core.rule_kinds import Places
from ..core.rules import STATISTICS, Slot, bound_rules
from ..reference.similarity_topk import logits_of_listed
from ._listed_distances import CHUNK_ELEMENTS, distances, listed_distances

# Entries of lists of candidates at a time, where many columns are equally far.
LIST_ELEMENTS = 1 << 22


def register(backends: Mapping[str, Backend]) -> None:
    """Define the operators; `backends` says where each backend's functions are."""

    def nearest_columns(*arguments: Any) -> tuple[Tensor, ...]:
        *problem, k, floor, count_above, backend = arguments
        with torch.no_grad(), autocast.disabled(problem[0]):
            return _nearest(Search(backends[backend].functions(), *problem), k, floor, count_above)

    define(
        "nearest_columns",
        "(Tensor x, Tensor y, Tensor scale, Tensor? row_bias, Tensor? col_bias, Tensor[] pair_data, SymInt[] spec, "
        "SymInt k, Tensor? floor, Tensor? count_above, str backend) -> "
        "(Tensor values, Tensor indices, Tensor counts, Tensor statistics)",
        nearest_columns,
        _nearest_fake,
    )


def products(x: Tensor, y: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices whose inner products are minus the squared distances of (N, D) from (M, D), two more dimensions."""
    D = x.shape[1]
    left, right = (side.new_ones((side.shape[0], D + 2)) for side in (x, y))
    left[:, D], right[:, D + 1] = -_squared_lengths(x, origin, left), -_squared_lengths(y, origin, right)
    left[:, :D] *= 2
    return left, right


def _squared_lengths(x: Tensor, origin: Tensor, kept: Tensor | None = None) -> Tensor:
    """(N,) squared lengths of the rows less a common one, which are written into the first columns of `kept`."""
    squared = x.new_empty(x.shape[:1])
    step = max(1, CHUNK_ELEMENTS // max(x.shape[1], 1)) if x.device.type == "cpu" else max(1, x.shape[0])
    for part in chunks_of_rows(x.shape[0], step):
        apart = x[part] - origin
        if kept is not None:
            kept[part, :-2] = apart
        squared[part] = apart.square_().sum(1)
    return squared


def rounding(x: Tensor) -> float:
    """How far minus a squared distance by `products` may be off, in squares of the two lengths' sum."""
    # D products and the lengths are added up; the roundings of many do not all go one way.
    return min(x.shape[1] + 4.0, 16.0 * x.shape[1] ** 0.5 + 4.0) * torch.finfo(x.dtype).eps * 1.1


def select(*arguments: Any) -> tuple[Tensor, ...]:
    """What `similarity_topk_forward` takes and returns; values are differentiable."""
    constant = [each.detach() if isinstance(each, Tensor) else each for each in arguments]
    values, *others = call.nearest_columns(*constant)
    if torch.is_grad_enabled() and any(isinstance(each, Tensor) and each.requires_grad for each in arguments):
        values = logits_at(arguments[:-4], others[0])
    return values, *others


def logits_at(arguments: tuple[Any, ...], indices: Tensor) -> Tensor:
    """(N, P) logits of the columns that each row lists, -inf for -1."""
    x, y, scale, row_bias, col_bias, *rules = arguments
    first = Layout.decode(*rules).sets[0]
    if first.scale_of == ScaleOf.ROWS:
        scale = scale[: x.shape[0], None]
    elif first.scale_of == ScaleOf.ALL:
        scale = scale[:1]
    dots = listed_distances(x, y, indices)
    listed, column = indices >= 0, indices.clamp_min(0)
    return logits_of_listed(first, slice(None), dots, scale, row_bias, col_bias, column, listed)


# ---- Search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Search:
    """What the operator takes; the bounds of the rules are on minus the squared distance."""

    functions: Any
    x: Tensor
    y: Tensor
    scale: Tensor
    row_bias: Tensor | None
    col_bias: Tensor | None
    pair_data: list[Tensor]
    spec: list[int]

    @property
    def layout(self) -> Layout:
        return Layout.decode(self.pair_data, self.spec)

    def take_rows(self, rows: Tensor) -> Search:
        """The same for some of the rows."""
        shape = self.x.shape[0], self.y.shape[0]
        own = take_rows(rows, shape, self.scale, self.row_bias, self.pair_data, self.spec)
        scale, row_bias, pair_data, spec = own
        return Search(self.functions, self.x[rows], self.y, scale, row_bias, self.col_bias, pair_data, spec)


@dataclass
class _Pass:
    """A first pass over all columns, from one origin, and what is known after it."""

    problem: Search
    origin: Tensor
    width: int

    def __post_init__(self) -> None:
        p = self.problem
        if p.x.shape[0] == 1 and not _capturing(p.x) and torch.equal(p.x[0], self.origin):
            # The lengths are the distances.
            self.left, self.right = p.x.new_ones((1, 1)), -_squared_lengths(p.y, self.origin)[:, None]
            self.squared = p.x.new_zeros(1)
        else:
            self.left, self.right = products(p.x, p.y, self.origin)
            self.squared = -self.left[:, -2]
        self.kappa = rounding(p.x)
        layout = p.layout
        self.set = layout.sets[0]
        self.sets = layout.sets
        own = layout.scale_slices(p.x.shape[0], p.y.shape[0])[0]
        self.scale = p.scale[own].expand(p.x.shape[0])
        self.bounds = [rule for rule in bound_rules() if rule.is_in(self.set.data)]
        self.biased = p.col_bias is not None or Slot.LOG_WEIGHT in self.set.data

    def search(self, k: int, floor: Tensor | None, count_above: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (values (N, k), indices (N, k), certified (N,), statistics)."""
        p = self.problem
        least = None if floor is None else floor - self._reach(floor)
        counted = count_above is not None
        sets = (self._relaxed(), *(self.sets[-1:] if counted and (self.bounds or len(self.sets) > 1) else ()))
        slices = p.layout.scale_slices(p.x.shape[0], p.y.shape[0])
        scale = p.scale[slices[0]] if len(sets) == 1 else torch.cat([p.scale[slices[0]], p.scale[slices[-1]]])
        rules = Layout(sets, ()).encode()
        problem = (self.left, self.right, scale, p.row_bias, p.col_bias, *rules)
        found, candidates, _, statistics = p.functions.forward(*problem, self.width, least, count_above)
        values, indices = p.functions.order(self._exact(candidates), candidates, k)
        last, rest = values[:, -1], found[:, -1]
        last = last if floor is None else torch.maximum(last, floor)
        certified = (rest == -torch.inf) | (rest + self._reach(rest) < last)
        if not _capturing(p.x) and not bool(certified.all()) and self._is_exact():
            certified = certified | (rest <= last)
        return values, indices, certified, statistics

    def _exact(self, candidates: Tensor) -> Tensor:
        """The logits of the candidates from differences, -inf where they are out of bounds."""
        p = self.problem
        listed, column = candidates >= 0, candidates.clamp_min(0)
        dots = distances(p.x, p.y, candidates)
        logits = logits_of_listed(
            self.set, slice(None), dots, self._scale_column(), p.row_bias, p.col_bias, column, listed
        )
        places = Places((slice(None), None), column, dots)
        for rule in self.bounds:
            logits = logits.masked_fill(rule.mask(self.set.data, places), -torch.inf)
        return logits

    def _scale_column(self) -> Tensor:
        return self.scale[:, None] if self.set.scale_of == ScaleOf.ROWS else self.problem.scale[:1]

    def _margin(self, squared: Tensor, similarity: Tensor) -> Tensor:
        """How far products may be off for rows of this squared length and columns at this similarity, or beyond.

        A column is no longer than the row and the distance together.
        """
        return self.kappa * (2 * squared.sqrt() + (-similarity).clamp_min(0).sqrt()).square()

    def _reach(self, logits: Tensor) -> Tensor:
        """How far above a logit of each row by products a column can be that is not above it by products."""
        size, row_bias = self.scale.abs(), self.problem.row_bias
        longest = (-self.right[:, -1]).nan_to_num(0.0, posinf=0.0).amax()
        anywhere = size * self.kappa * (self.squared.sqrt() + longest.sqrt()).square()
        if self.biased:
            return anywhere
        similarity = (logits if row_bias is None else logits - row_bias) / torch.where(size > 0, self.scale, 1.0)
        reach = size * self._margin(self.squared, similarity)
        return torch.where(self.scale > 0, reach, anywhere)

    def _relaxed(self) -> LogitSet:
        """The rules that select, with bounds that no pair fails because of rounding."""
        lengths = self.squared.nan_to_num(0.0, posinf=0.0)

        def reach(bounds: Tensor, of_columns: bool) -> Tensor:
            # An infinite bound stays what it is.
            margin = self._margin(lengths.amax() if of_columns else lengths, bounds)
            return torch.where(torch.isfinite(bounds), margin, 0.0)

        data = dict(self.set.data)
        for rule in self.bounds:
            data.update(rule.relaxed(self.set.data, reach))
        return changed(self.set, data=data)

    def _is_exact(self) -> bool:
        """Whether nothing was rounded, as for small integers, so that equal distances are equal products."""
        p = self.problem
        if self.biased or p.row_bias is not None or not bool((self.scale == 1).all()):
            return False
        most = float(self.squared.amax().sqrt() + (-self.right[:, -1]).amax().sqrt())
        if not 0 < most < 1e15:
            return most == 0
        # Multiples of a unit, whose squared lengths have no more digits than a number.
        unit = 2.0 ** torch.tensor(2 * most * torch.finfo(p.x.dtype).eps ** 0.5).log2().ceil().item()
        return all(bool((side / unit).frac().eq(0).all()) for side in (p.x, p.y))


def _nearest(problem: Search, k: int, floor: Tensor | None, count_above: Tensor | None) -> tuple[Tensor, ...]:
    x, y = problem.x, problem.y
    if x.shape[0] == 0 or y.shape[0] == 0:
        values, indices, *numbers = _nearest_fake(x, k, floor, count_above, "")
        return values.fill_(-torch.inf), indices.fill_(-1), *(each.zero_() for each in numbers)
    width = k + k // 4 + 4
    searched = _Pass(problem, common_row(x), width)
    values, indices, certified, statistics = searched.search(k, floor, count_above)
    if not _capturing(x) and not bool(certified.all()):
        lengths, widths = searched.squared, torch.full_like(indices[:, 0], width)
        left = (~certified).nonzero().squeeze(1)
        while len(left):
            group, origin, width = _next(x, left, lengths, widths)
            searched = _Pass(problem.take_rows(group), origin, width)
            of_group = [None if each is None else each[group] for each in (floor, count_above)]
            values[group], indices[group], found, counted = searched.search(k, *of_group)
            if count_above is not None:
                statistics[:, group] = counted
            lengths[group], widths[group], certified[group] = searched.squared, width, found
            left = left[~certified[left]]
    return values, indices, (indices >= 0).sum(1), statistics


def _next(x: Tensor, left: Tensor, lengths: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, int]:
    """Which rows are searched next, from which origin and with how many candidates.

    The first one that is left is the origin, and rows come along that are much nearer to it than to their last origin.
    Where it was that already, many columns are as far as the last of its list, and more candidates are kept.
    """
    first = left[:1]
    origin = torch.where(torch.isfinite(x[first[0]]), x[first[0]], 0.0)
    width = int(widths[first])
    if not float(lengths[first]) > 0:
        width *= 4
        group = left[(x[left] == x[first]).all(1) | (left == first)]
        return group[: max(1, LIST_ELEMENTS // width)], origin, width
    nearer = (x[left] - origin).square().sum(1) <= lengths[left] / 16
    return left[nearer | (left == first)], origin, width


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is recorded, in which nothing can be decided by numbers."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _nearest_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    k, _, count_above, _ = arguments[-4:]
    N = x.shape[0]
    return (
        x.new_empty((N, k), dtype=accumulator(x.dtype)),
        x.new_empty((N, k), dtype=torch.int64),
        x.new_empty((N,), dtype=torch.int64),
        x.new_empty((0 if count_above is None else len(STATISTICS), N), dtype=torch.int64),
    )
