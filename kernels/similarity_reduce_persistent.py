"""similarity_reduce by persistent sweeps in Triton: forward, backward and total as the operators take them.

One sweep multiplies and folds, and logits never reach memory. Another multiplies again and leaves 16-bit weights, with
which the library forms the gradients; a sum of softplus is folded by the sweep that weighs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from contrastive_ops.core.problem import KINDS, Layout, LogitSet, ScaleOf, SetFold
from contrastive_ops.core.rules import Slot, bound_rules
from contrastive_ops.cuda import _products as products
from contrastive_ops.reference.row_losses import Terms, kind_of, row_losses, weighted_slopes

from . import _pairs
from . import _similarity_plan as plan
from ._cover import Combine, pairwise_cover
from ._folds import LOGSUMEXP, TileFold
from ._launch import arch_of, recording
from ._persistent_fold import persistent_fold_kernel
from ._persistent_tiles import BAND_ROWS, Sweep, aligned_rows, padded
from ._persistent_weigh import FOLD, persistent_weights_kernel
from ._similarity_backward import TileSum
from ._similarity_gradients import compensate, contiguous, finished, fold_then_weigh, norm_of, wanted_of
from ._similarity_problem import Problem
from ._variants import Variant

__all__ = ["backward", "forward", "total", "variants"]

# Bytes of weights that are multiplied at once.
WEIGHT_BYTES = 256 << 20


def _problem(x: Tensor, y: Tensor | None, *rest: Any) -> Problem:
    """A matrix that is compared with itself is one that is compared with another."""
    rows = aligned_rows(x)
    return Problem.of(rows, rows if y is None else aligned_rows(y), *rest, arch_of(x))


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
    target_logit = _target_logits(p, target)
    values = _fold(p, None if target is None else target_logit)
    nothing = values.new_empty((0,))
    return values, nothing.long(), target_logit, nothing, nothing.clone()


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
    p = _problem(x, y, scale, row_bias, col_bias, target, pair_data, spec)
    upstream = {
        **_of_sides(p, "row_value", "col_value", folds),
        **_of_sides(p, "d_rows", "d_cols", d_folds),
        "d_target": contiguous(d_target),
        "norm": norm_of(p, scale, d_folds, d_target, None),
    }
    return _gradients(p, scale, target, y is None, upstream, None, needs)[0]


def total(
    x: Tensor,
    y: Tensor | None,
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
    """Return (losses, target_logit, dx, dy, dscale, drow_bias, dcol_bias, dextra)."""
    problem = (x, y, scale, row_bias, col_bias, target, pair_data, spec)
    p = _problem(*problem)
    kind = kind_of(p.layout)
    if kind != "sigmoid":
        return fold_then_weigh(forward, backward, problem, weight, extra, target_weight, needs)
    target_logit = _target_logits(p, target)
    # No slope is larger than its row's weight.
    bound = weight.abs() if target_weight is None else weight.abs() + target_weight.abs()
    upstream = {
        **_of_sides(p, "row_value", "col_value", None),
        **_of_sides(p, "d_rows", "d_cols", weight),
        "d_target": contiguous(target_weight),
        "norm": norm_of(p, scale, weight, bound, None),
    }
    gradients, fold = _gradients(p, scale, target, y is None, upstream, target_logit, needs)
    losses = row_losses(kind, (fold,), target_logit, Terms(extra=extra))
    dextra = weighted_slopes(kind, fold, target_logit, weight, extra, target_weight)[2]
    return losses, target_logit, *gradients, dextra


def _target_logits(p: Problem, target: Tensor | None) -> Tensor:
    """Room for the targets' logits; NaN for a target that no column is."""
    return p.x.new_full((0 if target is None else len(p.x),), torch.nan, dtype=torch.float32)


def _of_sides(p: Problem, rows: str, cols: str, folds: Tensor | None) -> dict[str, Tensor | None]:
    """What belongs to the fold of rows and to that of columns, by these names; None without one."""
    found: dict[str, Tensor | None] = {rows: None, cols: None}
    if folds is not None:
        parts = contiguous(folds).detach().split(p.layout.sizes(*p.shape[:2]))
        found.update({cols if each.cols else rows: part for each, part in zip(p.layout.folds, parts, strict=True)})
    return found


# ---- Folds -----------------------------------------------------------------------------------------------------------


def _fold(p: Problem, target_logit: Tensor | None) -> Tensor:
    """The values of all folds, one after another."""
    sweep, kind = Sweep.of(p, "fold"), p.folds(p.layout.folds)[0].kind
    values = p.x.new_full((sum(p.layout.sizes(*p.shape[:2])),), _of_nothing(kind), dtype=torch.float32)
    of = _of_sides(p, "rows", "cols", values)
    row_folds, col_folds = ((TileFold(kind, 0, cols),) for cols in (False, True))
    bands = list(sweep.bands(BAND_ROWS))
    col_parts = sweep.col_parts(bands, col_folds if of["cols"] is not None else ())
    for rows in bands:
        band, row_parts = sweep.row_parts(rows, row_folds if of["rows"] is not None else ())
        shares = kind == LOGSUMEXP.value and of["rows"] is not None and of["cols"] is not None
        tiles = sweep.down(rows) * sweep.across()
        arguments = {
            "target_logit": target_logit,
            "row_partials": None if of["rows"] is None else row_parts.memory,
            "col_partials": None if of["cols"] is None else col_parts.memory,
            "far_tiles": p.x.new_empty((tiles,), dtype=torch.int32) if shares else None,
            "KIND": kind,
        }
        for apart in (False, True) if shares else (False,):
            sweep.launch(persistent_fold_kernel, rows, **arguments, APART=apart).run()
        if of["rows"] is not None:
            row_parts.merge(band, row_folds, 0, of["rows"][rows], None, last=True).run()
        if of["cols"] is not None:
            last = rows == bands[-1]
            col_parts.merge(p, col_folds, sweep.down(rows), of["cols"], None, last=last).run()
    return values


def _of_nothing(kind: int) -> float:
    return -torch.inf if KINDS[kind] == "logsumexp" else 0.0


# ---- Gradients -------------------------------------------------------------------------------------------------------


def _gradients(
    p: Problem,
    scale: Tensor,
    target: Tensor | None,
    itself: bool,
    upstream: Mapping[str, Tensor | None],
    target_logit: Tensor | None,
    needs: int,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The gradients, and the folds of rows where `target_logit` has room for what these sweeps fold themselves."""
    needs |= (needs & 1) << 1 if itself else 0
    needed = [bool(needs >> bit & 1) for bit in range(5)]
    wanted = wanted_of(p, target, needed)
    if target_logit is not None:
        wanted = wanted._replace(sums=(*wanted.sums, TileSum(FOLD.value, False)))
    found = _weigh(p, wanted, upstream, target_logit)
    compensate(p, target, found)
    dx, dy, *rest = finished(p, scale, found, needed)
    if itself and needed[0]:
        dx, dy = dx + dy, dy[:0].clone()
    fold = found.sums.get(TileSum(FOLD.value, False), p.x.new_zeros((0,)))
    return (dx, dy, *rest), fold.float()


def _weigh(
    p: Problem, wanted: plan.Wanted, upstream: Mapping[str, Tensor | None], target_logit: Tensor | None
) -> plan.Gradients:
    """Sweep band by band, and multiply the weights of each."""
    N, M, D = p.shape
    sweep, pitch, norm = Sweep.of(p, "weigh"), padded(M), upstream["norm"]
    bands = list(sweep.bands(min(BAND_ROWS, WEIGHT_BYTES // max(1, 2 * pitch))))
    dx, dy = (
        p.x.new_zeros((size, D), dtype=torch.float32) if wants else None
        for size, wants in ((N, wanted.dx), (M, wanted.dy))
    )
    row_sums, col_sums = (tuple(each for each in wanted.sums if each.cols == cols) for cols in (False, True))
    of_rows = p.x.new_zeros((len(row_sums), N), dtype=torch.float64)
    of_cols = p.x.new_zeros((len(col_sums), M), dtype=torch.float64)
    col_parts = sweep.col_parts(bands, col_sums)
    most = bands[0].stop if bands else 0
    buffer = p.x.new_empty((most, pitch)) if wanted.dx or wanted.dy else None
    for rows in bands:
        band, row_parts = sweep.row_parts(rows, row_sums)
        weights = None if buffer is None else buffer[: rows.stop - rows.start]
        sweep.launch(
            persistent_weights_kernel,
            rows,
            **upstream,
            target_logit=target_logit,
            weights=weights,
            weights_stride=pitch,
            row_partials=row_parts.memory,
            col_partials=col_parts.memory,
            row_blocks=col_parts.row_blocks,
            row_sums=row_sums,
            col_sums=col_sums,
            KIND=p.folds(p.layout.folds)[0].kind,
        ).run()
        if row_sums:
            sums = of_rows.new_empty((len(row_sums), rows.stop - rows.start))
            row_parts.merge(band, row_sums, 0, sums, None, last=True).run()
            of_rows[:, rows] = sums
        if col_sums:
            col_parts.merge(p, col_sums, sweep.down(rows), of_cols, None, last=rows == bands[-1]).run()
        if dx is not None:
            products.set_or_add(dx[rows], weights[:, :M], p.y, add=False)
        if dy is not None:
            products.set_or_add(dy, weights[:, :M].T, p.x[rows], add=rows.start > 0)
    for gradient in (dx, dy):
        if gradient is not None and norm is not None:
            gradient /= norm
    return plan.Gradients(dx, dy, dict(zip((*row_sums, *col_sums), (*of_rows, *of_cols), strict=True)))


# ---- What is compiled ahead of time ----------------------------------------------------------------------------------

_ROWS, _COLUMNS = 40, 84
# Folds, and whether they are formed by the sweep that weighs.
_FOLDS = {
    "both": (("logsumexp", False), ("logsumexp", True)),
    "softplus_in_one": (("sum_softplus", False),),
    "rows": (("logsumexp", False),),
    "columns": (("logsumexp", True),),
    "softplus": (("sum_softplus", False), ("sum_softplus", True)),
}
_RULES: dict[str, tuple[Slot, ...]] = {
    "all": (),
    "ids": (Slot.DIFFER_ROWS, Slot.DIFFER_COLS, Slot.SAME_ROWS, Slot.SAME_COLS),
    "bounds": tuple(slot for rule in bound_rules() for slot in rule.slots),
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "folds": tuple(_FOLDS),
    "rules": tuple(_RULES),
    "unit": (True, False),
    "dtype": (torch.bfloat16, torch.float16),
    "D": (768, 72, 64),
    "scale_of": (ScaleOf.ALL, ScaleOf.ALL, ScaleOf.ROWS),
    "biases": (False, True),
    "target": (True, True, False),
    "needs": (7, 3, 31),
}


def variants(arch: str, combine: Combine = pairwise_cover) -> Iterator[Variant]:
    """Both kernels for every combination of options."""
    for choice in combine(_CHOICES):
        with recording(arch) as record:
            _run(choice)
        shown = "-".join(str(value).removeprefix("torch.") for value in choice.values())
        for number, each in enumerate(record.launches):
            if each.kernel in (persistent_fold_kernel, persistent_weights_kernel):
                name = f"similarity_reduce_persistent-{shown}-{number} {each.kernel.__name__}"
                yield each.variant(name, has_dot=True)


def _run(choice: Mapping[str, Any]) -> None:
    """A call with gradients."""
    x, y = (torch.zeros(size, choice["D"], dtype=choice["dtype"]) for size in (_ROWS, _COLUMNS))
    folds = tuple(SetFold(0, kind, cols) for kind, cols in _FOLDS[choice["folds"]])
    one_sweep = choice["folds"] == "softplus_in_one"
    rules = {slot: _pairs.empty(slot, _ROWS, _COLUMNS) for slot in _RULES[choice["rules"]]}
    if choice["unit"]:
        rules.update({Slot.ROW_FACTOR: torch.zeros(_ROWS), Slot.COL_FACTOR: torch.zeros(_COLUMNS)})
    layout = Layout((LogitSet(choice["scale_of"], False, 0 if choice["rules"] == "ids" else None, rules),), folds)
    scale = torch.zeros(layout.scale_slices(_ROWS, _COLUMNS)[-1].stop)
    biases = (torch.zeros(_ROWS), torch.zeros(_COLUMNS)) if choice["biases"] else (None, None)
    target = torch.zeros(_ROWS, dtype=torch.int64) if choice["target"] or one_sweep else None
    problem = (x, y, scale, *biases, target, *layout.encode())
    if one_sweep:
        total(*problem, torch.zeros(_ROWS), None, torch.zeros(_ROWS), choice["needs"])
        return
    values, argmax, *_, kept = forward(*problem, 0)
    d_target = None if target is None else torch.zeros(_ROWS)
    backward(*problem, values, argmax, values, d_target, None, kept, choice["needs"])
