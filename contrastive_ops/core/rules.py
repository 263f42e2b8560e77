"""Which pairs (row, column) of a similarity matrix take part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import checks
from .lists import pair_order, pairs_ascend
from .problem import Slot
from .results import pytree

Bound = float | Tensor


def _bounds(function: str, name: str, value: object) -> object:
    """Bounds that are no tensors as floats, whatever they came as."""
    if isinstance(value, tuple):
        return tuple(_bounds(function, name, each) for each in value)
    return value if value is None or isinstance(value, Tensor) else checks.factor(function, name, value)


@pytree
@dataclass(frozen=True, eq=False)
class Guide:
    """A second, frozen similarity that drops pairs: those whose guide similarity exceeds a bound.

    Args:
        gx: (N, D') the guide's rows, in any floating dtype; not differentiated.
        gy: (M, D') the guide's columns; None where a matrix is compared with itself.
        below: keep pairs whose guide similarity <gx_i, gy_j> is at most this; forms as `Pairs.below`.
    """

    gx: Tensor
    gy: Tensor | None
    below: Bound | tuple[Bound, ...]

    def __post_init__(self) -> None:
        """Check what does not depend on the matrices."""
        object.__setattr__(self, "below", _bounds("Guide", "below", self.below))


@pytree
@dataclass(frozen=True, eq=False)
class Pairs:
    """Rules for the pairs that take part in a fold; all rules are ANDed and none needs an N x M tensor.

    Equivalent to::

        s = x @ y.T                                                         # the similarity, without scale and biases
        keep = torch.ones(N, M, dtype=torch.bool)
        keep &= torch.arange(N)[:, None] + diagonal != torch.arange(M)      # diagonal
        equal = lambda r, c: (r[:, None] == c) & (r[:, None] != -1)
        keep &= ~equal(*differ) & equal(*same)                              # differ, same
        keep[row, column] = False                                           # exclude, for each column in the row's list
        keep &= ~(s > below[:, None]) & ~(s < above[:, None])               # below, above
        keep &= ~(gx @ gy.T > guide.below[:, None])                         # guide
        logits = logits + log_weight[row_class[:, None], column_class]      # log_weight
        logits = logits.masked_fill(~keep, -torch.inf if fill is None else fill)

    The target of a row is never dropped.

    Args:
        diagonal: drop column ``i + diagonal`` of row ``i`` (0 drops each row's own column). None drops nothing.
        differ: (row_ids (N,), col_ids (M,)) int64: keep pairs whose ids differ. Any int64; -1 equals nothing.
        same: (row_ids, col_ids) int64: keep pairs with equal ids. -1 equals nothing.
        exclude: (indptr (N + 1,), indices) int64: row i drops the columns ``indices[indptr[i]:indptr[i + 1]]``.
            In any order; a column that is listed twice is dropped once. One that does not exist is an error that names
            the row.
        below: keep pairs whose similarity <x_i, y_j> (no scale, no bias) is at most this: a float, a 0-d tensor, (N,)
            or (N, 1) for a bound per row, (1, M) for one per column, or a tuple of these, all of which must hold.
        above: keep pairs whose similarity is at least this; the same forms.
        guide: a second similarity that drops pairs; computed tile by tile with the first.
        log_weight: (table (C, C'), row_classes (N,), col_classes (M,)): add ``table[row_class, col_class]`` to the
            logit, nothing for class -1.
        fill: the constant logit of dropped pairs, which then take part without a gradient (some papers' masks mean 0).
            None removes them.

    Note:
        Bounds and the guide decide and are not differentiated. NaN similarities pass every bound, so that they
        propagate. A pair that a rule drops reaches no value, whatever its rows hold. Nor does a row that takes part in
        no pair reach a gradient; its own is 0. A row with NaN or infinity that takes part in any pair, as a target or
        in ``linear`` too, does: NaN arrives also in the gradients of rows that it has no pair with, as in a product of
        matrices. A bias or a class weight of -inf is no rule: added to NaN it is NaN.
        Not differentiable in ``log_weight``: a table that requires a gradient is refused.
    """

    diagonal: int | None = None
    differ: tuple[Tensor, Tensor] | None = None
    same: tuple[Tensor, Tensor] | None = None
    exclude: tuple[Tensor, Tensor] | None = None
    below: Bound | tuple[Bound, ...] | None = None
    above: Bound | tuple[Bound, ...] | None = None
    guide: Guide | None = None
    log_weight: tuple[Tensor, Tensor, Tensor] | None = None
    fill: float | None = None

    def __post_init__(self) -> None:
        """Check what does not depend on the matrices."""
        if self.diagonal is not None:
            object.__setattr__(self, "diagonal", checks.integer("Pairs", "diagonal", self.diagonal))
        for name, size in (("differ", 2), ("same", 2), ("exclude", 2), ("log_weight", 3)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, tuple) or len(value) != size):
                raise TypeError(f"Pairs: {name} must be a tuple of {size} tensors, got {_described(value)}")
        if self.guide is not None and not isinstance(self.guide, Guide):
            raise TypeError(f"Pairs: guide must be a Guide or None, got {type(self.guide).__name__}")
        for name in ("below", "above"):
            object.__setattr__(self, name, _bounds("Pairs", name, getattr(self, name)))
        if self.fill is not None:
            object.__setattr__(self, "fill", checks.number("Pairs", "fill", self.fill, "[-inf, inf]"))


def resolve(function: str, pairs: Pairs, x: Tensor, y: Tensor) -> dict[Slot, Tensor]:
    """Check the rules against the matrices they are for and return their tensors as the backends take them."""
    return _Resolver(function, x, y).all(pairs)


def _described(value: object) -> str:
    return f"{len(value)} elements" if isinstance(value, tuple) else type(value).__name__


class _Resolver:
    def __init__(self, function: str, x: Tensor, y: Tensor) -> None:
        self.function, self.x, self.y = function, x, y
        self.dtype = checks.accumulator(x.dtype)
        self.data: dict[Slot, Tensor] = {}

    def all(self, pairs: Pairs) -> dict[Slot, Tensor]:
        if pairs.differ is not None:
            self._ids("differ", pairs.differ, Slot.DIFFER_ROWS, Slot.DIFFER_COLS)
        if pairs.same is not None:
            self._ids("same", pairs.same, Slot.SAME_ROWS, Slot.SAME_COLS)
        if pairs.exclude is not None:
            indptr, indices = check_lists(self.function, "exclude", pairs.exclude, self.x, self.y)[:2]
            self.data.update({Slot.EXCLUDE_INDPTR: indptr, Slot.EXCLUDE_INDICES: indices})
        if pairs.below is not None:
            self._bound("below", pairs.below, Slot.BELOW_ROWS, Slot.BELOW_COLS, torch.minimum)
        if pairs.above is not None:
            self._bound("above", pairs.above, Slot.ABOVE_ROWS, Slot.ABOVE_COLS, torch.maximum)
        if pairs.guide is not None:
            self._guide(pairs.guide)
        if pairs.log_weight is not None:
            self._log_weight(*pairs.log_weight)
        if pairs.fill is not None:
            self.data[Slot.FILL] = torch.full((), pairs.fill, dtype=self.dtype, device=self.x.device)
        return self.data

    def _ids(self, name: str, ids: tuple[Tensor, Tensor], rows: Slot, cols: Slot) -> None:
        for side, of, like, slot in (("rows", ids[0], self.x, rows), ("columns", ids[1], self.y, cols)):
            of = checks.check_index(self.function, f"pairs.{name} of the {side}", of, like.shape[0], "x", self.x)
            self.data[slot] = of

    def _bound(self, name: str, value: Bound | tuple[Bound, ...], rows: Slot, cols: Slot, both: object) -> None:
        n, m = self.x.shape[0], self.y.shape[0]
        for bound in value if isinstance(value, tuple) else (value,):
            bound = checks.factor(self.function, f"pairs.{name}", bound)
            if not isinstance(bound, Tensor):
                slot, vector = rows, torch.full((n,), bound, dtype=self.dtype, device=self.x.device)
            elif bound.dim() == 2 and tuple(bound.shape) == (1, m):
                slot, vector = cols, bound[0]
            elif bound.dim() == 0 or tuple(bound.shape) in ((n,), (n, 1)):
                slot, vector = rows, bound.reshape(-1).expand(n)
            else:
                raise ValueError(
                    f"{self.function}: pairs.{name} must be one number or have shape ({n},), ({n}, 1) or (1, {m}), "
                    f"got {checks.shape(bound)}"
                )
            checks.check_device(self.function, "x", self.x, f"pairs.{name}", vector)
            vector = vector.detach().to(self.dtype)
            self.data[slot] = both(self.data[slot], vector) if slot in self.data else vector  # type: ignore[operator]

    def _guide(self, guide: Guide) -> None:
        gy = guide.gx if guide.gy is None else guide.gy
        checks.check_matrices(self.function, "guide.gx", guide.gx, "guide.gy", gy)
        checks.check_device(self.function, "x", self.x, "guide.gx", guide.gx)
        for name, matrix, like in (("gx", guide.gx, self.x), ("gy", gy, self.y)):
            if matrix.shape[0] != like.shape[0]:
                raise ValueError(
                    f"{self.function}: guide.{name} must have {like.shape[0]} rows, got {checks.shape(matrix)}"
                )
        gx = guide.gx.detach().to(self.dtype)
        self.data[Slot.GUIDE_X] = gx
        self.data[Slot.GUIDE_Y] = gx if guide.gy is None else gy.detach().to(self.dtype)
        self._bound("guide.below", guide.below, Slot.GUIDE_BELOW_ROWS, Slot.GUIDE_BELOW_COLS, torch.minimum)

    def _log_weight(self, table: Tensor, row_classes: Tensor, col_classes: Tensor) -> None:
        checks.check_matrix(self.function, "pairs.log_weight", table)
        checks.check_constant(self.function, "pairs.log_weight", table)
        self._ids("log_weight", (row_classes, col_classes), Slot.CLASS_ROWS, Slot.CLASS_COLS)
        for name, classes, size in (("rows", row_classes, table.shape[0]), ("columns", col_classes, table.shape[1])):
            checks.check_index_values(
                self.function, f"pairs.log_weight classes of the {name}", classes, size, or_none=True
            )
        self.data[Slot.LOG_WEIGHT] = table.to(self.dtype)


def check_lists(
    function: str, name: str, lists: tuple[Tensor, ...], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Check lists of columns per row; return (indptr, indices, order) with the columns of each row ascending.

    `order` says which of the given entries each returned one is.
    """
    indptr, indices = lists[:2]
    n, m = x.shape[0], y.shape[0]
    indptr = checks.check_index(function, f"{name} indptr", indptr, n + 1, "x", x)
    indices = checks.check_index(function, f"{name} indices", indices, None, "x", x)
    if not checks.may_read(indptr, waits=True):
        return indptr, indices, torch.arange(indices.shape[0], device=indices.device)
    lengths = indptr.diff()
    if int(indptr[0]) != 0 or int(indptr[-1]) != indices.shape[0] or bool((lengths < 0).any()):
        raise ValueError(
            f"{function}: {name} indptr must rise from 0 to the {indices.shape[0]} indices, "
            f"got {int(indptr[0])} to {int(indptr[-1])}" + (", not monotonic" if bool((lengths < 0).any()) else "")
        )
    row = torch.repeat_interleave(lengths)
    wrong = ((indices < 0) | (indices >= m)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"{function}: {name} indices must be in [0, {m}), got {int(indices[at])} in the list of row {int(row[at])}"
        )
    if pairs_ascend(row, indices):
        return indptr, indices, torch.arange(indices.shape[0], device=indices.device)
    order = pair_order(row, indices)
    return indptr, indices[order], order
