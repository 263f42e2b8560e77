"""similarity_reduce by kernels for Hopper GPUs, whose inner products never reach memory.

One kernel multiplies and folds. Another multiplies again and leaves the weights of the products that gradients are,
which the library forms; for a loss whose slopes need no fold it is the only sweep. Forward, backward and total are as
the operators take them. Gradients of other folds than the second has, and of biases of columns, are those of "cuda".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import cuda_kernels, extension
from ..core.cuda_kernels import kernels
from ..core.problem import Layout, ScaleOf
from ..core.rules import Slot
from ..reference.row_losses import Terms, kind_of, row_losses
from . import _pairs, _products
from . import similarity_reduce as chunked
from ._chunks import Problem, padded
from ._pairs import dense
from ._weights import Gradients, Upstream, Wanted

CAPABILITY, CODE = (9, 0), "sm_90a"
LEAST_DIMENSION, MOST_DIMENSION, STEP = 64, 2048, 8
# Columns of tiles that are folded and weighed, and rows of the two tiles of a cluster; csrc/cuda/hopper has the same.
FOLD_COLUMNS, WEIGH_COLUMNS, CLUSTER_ROWS = 192, 128, 256
# Rows that one launch folds, for which parts of tiles are kept; and bytes of weights that are multiplied at once.
FOLDED_ROWS, WEIGHT_BYTES = 8192, 256 << 20
# Numbers that a tile leaves for each of its rows, and for each of its columns.
ROW_PARTS, COL_PARTS = 5, 1

_RULES = {
    *(Slot.DIFFER_ROWS, Slot.DIFFER_COLS, Slot.SAME_ROWS, Slot.SAME_COLS),
    *(Slot.BELOW_ROWS, Slot.BELOW_COLS, Slot.ABOVE_ROWS, Slot.ABOVE_COLS),
    *(Slot.ROW_FACTOR, Slot.COL_FACTOR, Slot.UNIT),
}


def unsupported(x: Tensor) -> list[str]:
    """Reasons why these kernels cannot run on rows like `x`, of which there are none to look at in an empty one."""
    reasons = [*cuda_kernels.unsupported(x), *_products.unsupported(x)]
    if len(x) and x.dtype == torch.float32:
        reasons.append(f"dtype={x.dtype} (supported: bfloat16, float16)")
    if len(x) and (x.shape[-1] % STEP or not LEAST_DIMENSION <= x.shape[-1] <= MOST_DIMENSION):
        supported = f"{LEAST_DIMENSION} to {MOST_DIMENSION}, a multiple of {STEP}"
        reasons.append(f"D={x.shape[-1]} (supported: {supported})")
    if x.device.type == "cuda" and cuda_kernels.why_missing() is None:
        module: Any = extension.load()
        reasons += _why_not_on(torch.cuda.get_device_capability(x.device.index), module.build_config()["cuda"])
    return reasons


def _why_not_on(capability: tuple[int, int], built: str) -> list[str]:
    if capability != CAPABILITY:
        return [f"compute capability {capability[0]}.{capability[1]} (supported: 9.0)"]
    if CODE in built.split():
        return []
    return [f'no code for {CODE} in CUDA {built}; install again with TORCH_CUDA_ARCH_LIST="9.0a"']


def no_room(layout: Layout) -> list[str]:
    """Reasons why the sets and rules of a call are not for these kernels."""
    reasons = _pairs.no_room(layout)
    if len(layout.sets) != 1:
        return [*reasons, f"{len(layout.sets)} logit sets (supported: 1)"]
    own = layout.sets[0]
    if own.scale_of == ScaleOf.COLUMNS:
        reasons.append("a scale of columns (supported: one number, or one for each row)")
    others = sorted(slot.name.lower() for slot in own.data if slot not in _RULES)
    if others:
        reasons.append(
            f"rules or lists with {', '.join(others)} (supported: a diagonal, ids, and bounds without a guide)"
        )
    return reasons


def _problem(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
) -> Problem:
    """The problem of rows that are read 16 bytes at once.

    A matrix that is compared with itself is one that is compared with another where the logits of (i, j) and (j, i)
    differ, and where both directions are folded, which tiles above the diagonal would have to be read twice for.
    """
    rows, columns = aligned(x), None if y is None else aligned(y)
    layout = Layout.decode(pair_data, spec)
    is_symmetric = layout.sets[0].scale_of == ScaleOf.ALL and row_bias is None and col_bias is None
    if y is None and not (is_symmetric and len({fold.cols for fold in layout.folds}) == 1):
        columns = rows
    return Problem.of(rows, columns, scale, row_bias, col_bias, target, pair_data, spec)


def aligned(x: Tensor) -> Tensor:
    """The same rows, one behind another, where 16 bytes of them are read at once."""
    rows = x.detach().contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def _bands(p: Problem, most: int, kept: Kept | None = None) -> Iterator[tuple[slice, Kept | None]]:
    """Rows, at most so many at a time, with what is kept of them: those that are kept come first."""
    N = p.shape[0] if p.shape[1] > 0 else 0
    ends = [N] if kept is None else [kept.rows, N]
    for begin, end, own in zip([0, *ends], ends, [kept, None][-len(ends) :], strict=False):
        for i in range(begin, end, most):
            yield slice(i, min(i + most, end)), own


def _parts(p: Problem, rows: slice, columns: int, of_rows: int, of_cols: int) -> Tensor:
    """Room for so many numbers for each row and for each column of every tile of so many columns."""
    count, M = rows.stop - rows.start, p.shape[1]
    across, down = -(-M // columns), 2 * -(-count // CLUSTER_ROWS)
    return p.x.new_empty((of_rows * across * count + of_cols * down * M,), dtype=torch.float32)


class Kept(NamedTuple):
    """Logits of the first rows as 16-bit fixed point, in the memory that forward gives backward; see hopper/kept.h.

    Attributes:
        rows: how many, in pairs of row tiles.
        wide: one for each pair of row tiles of the matrix, int64.
        target_logit: (N,).
        heads: where the logits of a warp begin, and their step.
        logits: (rows, columns padded), of the size of x's numbers.
    """

    rows: int
    wide: Tensor
    target_logit: Tensor
    heads: Tensor
    logits: Tensor

    @staticmethod
    def sizes(N: int, M: int, pairs: int) -> tuple[int, int, int, int]:
        """Numbers of 4 bytes for each of the tensors, where so many pairs of row tiles are kept."""
        across, all_pairs = -(-M // FOLD_COLUMNS), -(-N // CLUSTER_ROWS)
        heads = pairs * CLUSTER_ROWS // 32 * across * 2
        return padded(2 * all_pairs), padded(N), padded(heads), pairs * CLUSTER_ROWS * padded(M) // 2

    @classmethod
    def most(cls, N: int, M: int) -> int:
        """Numbers of 4 bytes that there are to keep, at most."""
        return sum(cls.sizes(N, M, -(-N // CLUSTER_ROWS)))

    @classmethod
    def of(cls, p: Problem, memory: Tensor) -> Kept | None:
        """As many rows as there is memory for, or None."""
        N, M, _ = p.shape
        pairs = -(-N // CLUSTER_ROWS)
        fixed, whole = sum(cls.sizes(N, M, 0)), cls.most(N, M)
        pairs = 0 if whole == fixed else min(pairs, (len(memory) - fixed) * pairs // (whole - fixed))
        while pairs > 0 and sum(cls.sizes(N, M, pairs)) > len(memory):
            pairs -= 1
        if pairs <= 0 or not _is_kept(p):
            return None
        sizes = cls.sizes(N, M, pairs)
        wide, target_logit, heads, logits = memory[: sum(sizes)].split(sizes)
        rows = min(pairs * CLUSTER_ROWS, N)
        return cls(rows, wide.view(torch.int64), target_logit[:N], heads, logits.view(p.x.dtype))

    def from_row(self, p: Problem, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, heads and which are wide from a row on that begins a pair of row tiles."""
        M = p.shape[1]
        heads = row // 32 * -(-M // FOLD_COLUMNS) * 2
        return self.logits[row * padded(M) :], self.heads[heads:], self.wide[row // CLUSTER_ROWS :]


def _is_kept(p: Problem) -> bool:
    """Whether logits are those of one logsumexp, of rows, of columns or of both."""
    _, _, _, row_bias, col_bias, *_ = p.arguments
    folds = p.layout.folds
    softmax = {fold.kind for fold in folds} == {"logsumexp"} and len({fold.cols for fold in folds}) == len(folds)
    return softmax and not p.itself and row_bias is None and col_bias is None


def _fold(p: Problem, folding: chunked.Folding, rows: slice, kept: Kept | None = None) -> None:
    target_logit = folding.target_logit if len(folding.target_logit) else None
    count, D = rows.stop - rows.start, p.shape[2]
    parts = _parts(p, rows, FOLD_COLUMNS, 2, 2)
    kernels().cuda_hopper_fold(
        p.x, p.y, D, rows.start, count, *p.arguments, int(p.itself), parts, target_logit, folding.state,
        *((None, None, None) if kept is None else kept.from_row(p, rows.start)),
    )  # fmt: skip


def forward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    kept_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (folds, argmax, target_logit, linear, kept); what was not asked for is empty."""
    p = _problem(x, y, scale, row_bias, col_bias, target, pair_data, spec)
    folding = chunked.Folding.of(p, target)
    memory = folding.target_logit.new_empty((kept_size if y is not None else 0,))
    kept = Kept.of(p, memory)
    if kept is not None:
        kept.wide.zero_()
    for rows, own in _bands(p, FOLDED_ROWS, kept):
        _fold(p, folding, rows, own)
    if kept is not None and target is not None:
        kept.target_logit.copy_(folding.target_logit)
    nothing = folding.target_logit.new_empty((0,))
    return *folding.finish(p), folding.target_logit, nothing, memory if kept is not None else nothing.clone()


# ---- Gradients -------------------------------------------------------------------------------------------------------


class _Weighing:
    """Gradients while they are formed, and the memory that weights of a band of rows go through."""

    def __init__(self, p: Problem, gradients: Gradients, most: int = FOLDED_ROWS) -> None:
        self.p, self.gradients = p, gradients
        self.pitch = padded(p.shape[1])
        fitting = WEIGHT_BYTES // max(1, 2 * self.pitch) // CLUSTER_ROWS * CLUSTER_ROWS
        self.rows = max(1, min(max(fitting, CLUSTER_ROWS), p.shape[0], most))
        self.weights = p.x.new_empty((self.rows * self.pitch if gradients.has_product else 0,))
        if p.itself and gradients.has_product:  # below the diagonal, where nothing is written
            self.weights.view(self.rows, self.pitch)[:, : self.rows].zero_()

    def add(
        self, rows: slice, kept: Kept | None = None, target_logit: Tensor | None = None, state: Tensor | None = None
    ) -> None:
        """Add what the pairs of some rows give, from what is kept of them unless one of their tiles is wide."""
        p, up, wide = self.p, self.gradients.upstream, None
        count, has_product = rows.stop - rows.start, self.gradients.has_product
        arriving = (up.values, up.d_values, up.d_target, up.norm)
        weights, sums = self.weights if has_product else None, self.gradients.sums(p)
        parts, totals = _parts(p, rows, WEIGH_COLUMNS, ROW_PARTS, COL_PARTS), self.gradients.totals
        if kept is not None:
            logits, heads, wide = kept.from_row(p, rows.start)
            kernels().cuda_hopper_weigh_kept(
                rows.start, count, *p.arguments, *arriving, logits, heads, wide, kept.target_logit, weights, sums,
                parts, totals,
            )  # fmt: skip
        kernels().cuda_hopper_weigh(
            p.x, p.y, p.shape[2], rows.start, count, *p.arguments, int(p.itself), *arriving, wide, weights, sums,
            parts, target_logit, totals, state,
        )  # fmt: skip
        if has_product:
            columns = slice(rows.start if p.itself else 0, p.shape[1])
            matrix = self.weights[: count * self.pitch].view(count, self.pitch)[:, : columns.stop - columns.start]
            self.gradients.multiply(p, rows, columns, matrix)


def _both(p: Problem, y: Tensor | None, needs: int) -> int:
    """What is needed of both sides where they are one but for the sweep."""
    return needs | (needs & 1) << 1 if y is None and not p.itself else needs


def _as_one(p: Problem, y: Tensor | None, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of two sides as that of one, where they are one."""
    dx, dy, *rest = gradients
    return (dx + dy, dy[:0], *rest) if y is None and not p.itself else gradients


def _has_weights(layout: Layout, needs: int) -> bool:
    """Whether the kernel forms the gradients of these folds."""
    kinds = [(fold.kind, fold.cols) for fold in layout.folds]
    softmax = {kind for kind, _ in kinds} <= {"logsumexp"} and len(set(kinds)) == len(kinds)
    return (softmax or kinds == [("sum_softplus", False)]) and not needs >> 4 & 1


def backward(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor | None,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    folds: Tensor,
    argmax: Tensor,
    d_folds: Tensor | None,
    d_target: Tensor | None,
    d_linear: Tensor | None,
    kept: Tensor,
    needs: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of x, y, scale, row_bias, col_bias in float32, empty where not needed."""
    problem = (scale, row_bias, col_bias, target, pair_data, spec)
    p = _problem(x, y, *problem)
    arriving = (folds, argmax, d_folds, d_target, d_linear)
    if not _has_weights(p.layout, needs):
        return chunked.backward(x, y, *problem, *arriving, kept, needs)
    wanted = Wanted.of(p, target, _both(p, y, needs))
    gradients = Gradients.of(p, wanted, Upstream.of(p, scale, *arriving))
    weighing = _Weighing(p, gradients)
    for rows, own in _bands(p, weighing.rows, Kept.of(p, kept)):
        weighing.add(rows, own)
    return _as_one(p, y, gradients.finish(p, scale, target, needs))


def total(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    row_bias: Tensor | None,
    col_bias: Tensor | None,
    target: Tensor,
    pair_data: Sequence[Tensor],
    spec: Sequence[int],
    weight: Tensor,
    extra: Tensor | None,
    target_weight: Tensor | None,
    needs: int,
) -> tuple[Tensor, ...]:
    """Return (losses, target_logit, dx, dy, dscale, drow_bias, dcol_bias, dextra).

    Rows are folded before they are weighed; a sum of softplus is folded by the sweep that weighs it.
    """
    problem = (scale, row_bias, col_bias, target, pair_data, spec)
    p = _problem(x, y, *problem)
    if not _has_weights(p.layout, needs):
        return chunked.total(x, y, *problem, weight, extra, target_weight, needs)
    kind, folding = kind_of(p.layout), chunked.Folding.of(p, target)
    of_rows = chunked.RowLosses.of(p, kind, weight, extra, target_weight)
    wanted = Wanted.of(p, target, needs)
    upstream = Upstream.of(p, scale, of_rows.fold, target.new_empty((0,)), *of_rows.bounds(), None)
    if kind == "sigmoid":
        upstream = upstream._replace(d_values=dense(weight), d_target=dense(target_weight))
    else:
        upstream = upstream._replace(d_values=of_rows.d_fold, d_target=of_rows.d_target)
    gradients = Gradients.of(p, wanted, upstream)
    weighing = _Weighing(p, gradients)
    for rows, _ in _bands(p, weighing.rows):
        if kind == "sigmoid":
            weighing.add(rows, None, folding.target_logit, folding.state)
            continue
        _fold(p, folding, rows)
        of_rows.complete(p, rows, folding)
        weighing.add(rows)
    if kind == "sigmoid" or p.shape[1] == 0:
        fold, _ = folding.finish(p)
        of_rows.fold.copy_(fold)
        of_rows.losses.copy_(row_losses(kind, (fold,), folding.target_logit, Terms(extra=extra)))
    found = gradients.finish(p, scale, target, needs)
    return of_rows.losses, folding.target_logit, *found, of_rows.dextra
