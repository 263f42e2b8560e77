"""What similarity_reduce can be made to compile: every two options of a call together in some kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from contrastive_ops.core.problem import KINDS, Layout, LogitSet, ScaleOf, SetFold
from contrastive_ops.core.rules import Slot, bound_rules

from . import _pairs
from . import _similarity_plan as plan
from ._cover import Combine
from ._folds import TileFold
from ._launch import Launch
from ._similarity_backward import BIAS, RESIDUAL, SCALE, TileSum
from ._similarity_problem import Problem
from ._tiles import resident_depth
from ._variants import Variant

# Sizes of the problems that launches are made for; only their dtypes and the dimension reach the compiler.
_ROWS, _COLUMNS = 48, 80

# (set, kind, of columns)
_FOLDS: dict[str, tuple[tuple[int, str, bool], ...]] = {
    "lse": ((0, "logsumexp", False),),
    "clip": ((0, "logsumexp", False), (0, "logsumexp", True)),
    "max": ((0, "max", False), (0, "max", True), (0, "sum", False), (0, "count", False)),
    "two_sets": ((0, "sum_softplus", False),),
}
_ELSEWHERE = {kind for folds in _FOLDS.values() for _, kind, _ in folds}
_FOLDS["two_sets"] += tuple((1, kind, True) for kind in KINDS if kind not in _ELSEWHERE)

_RULES: dict[str, tuple[Slot, ...]] = {
    "all": (),
    "ids": (Slot.DIFFER_ROWS, Slot.DIFFER_COLS, Slot.SAME_ROWS, Slot.SAME_COLS),
    "bounds": (*(slot for rule in bound_rules() for slot in rule.slots), Slot.FILL),
    "lists": (Slot.EXCLUDE_INDPTR, Slot.EXCLUDE_INDICES, Slot.CLASS_ROWS, Slot.CLASS_COLS, Slot.LOG_WEIGHT),
    "guide": (Slot.GUIDE_X, Slot.GUIDE_Y, Slot.GUIDE_BELOW_ROWS, Slot.GUIDE_BELOW_COLS),
}

# Kernels with the dimension of a head, the largest that stays on the chip (0), and one beyond.
_KERNELS = (("fold", 64), ("fold", 0), ("fold", 768), ("rows", 64), ("rows", 0), ("columns", 0), ("weights", 768))

_CHOICES: dict[str, tuple[Any, ...]] = {
    "kernel": _KERNELS,
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "itself": (False, True),
    "folds": tuple(_FOLDS),
    "rules": tuple(_RULES),
    "scale_of": tuple(ScaleOf),
    "biases": (False, True),
    "target": (False, True),
    "linear": (False, True),
    "sums_alone": (False, True),
}


def _problem(arch: str, choice: dict[str, Any]) -> tuple[Problem, Tensor | None]:
    """The problem of a combination, and its targets."""
    rows = _ROWS
    columns = rows if choice["itself"] else _COLUMNS
    (kernel, D), most = choice["kernel"], resident_depth(arch, choice["dtype"])
    D = min(D or most, most) if kernel in ("rows", "columns") else D or most
    x, y = torch.empty(rows, D, dtype=choice["dtype"]), torch.empty(columns, D, dtype=choice["dtype"])
    data = {slot: _pairs.empty(slot, _ROWS, _COLUMNS) for slot in _RULES[choice["rules"]]}
    lists = (Slot.LINEAR_INDPTR, Slot.LINEAR_INDICES, Slot.LINEAR_WEIGHT) if choice["linear"] else ()
    diagonal = 0 if choice["rules"] in ("ids", "bounds") else None
    folds = tuple(SetFold(*fold) for fold in _FOLDS[choice["folds"]])
    listed = {slot: _pairs.empty(slot, _ROWS, _COLUMNS) for slot in lists}
    sets = [LogitSet(choice["scale_of"], False, diagonal, {**data, **listed})]
    if any(fold.set for fold in folds):
        sets.append(LogitSet(ScaleOf.ALL, True, diagonal, data))
    layout = Layout(tuple(sets), folds)
    scale = torch.empty(layout.scale_slices(rows, columns)[-1].stop)
    biases = (torch.empty(rows), torch.empty(columns)) if choice["biases"] else (None, None)
    target = torch.empty(rows, dtype=torch.int64) if choice["target"] else None
    problem = Problem.of(
        x, None if choice["itself"] else y, scale, *biases, target, *layout.encode(), arch
    )  # fmt: skip
    return problem, target


def _forward(p: Problem, target: Tensor | None) -> Iterator[Launch]:
    folds = p.folds(p.layout.folds) + ((plan.linear_fold(),) if p.layout.has_linear else ())
    values = torch.empty(sum(p.shape[fold.cols] for fold in folds))
    argmax = torch.empty(sum(p.layout.argmax_sizes(*p.shape[:2])), dtype=torch.int64)
    return plan.forward_launches(p, folds, values, argmax, None if target is None else torch.empty(len(p.x)))


def _backward(p: Problem, target: Tensor | None, kernel: str, biases: bool, sums_alone: bool) -> Iterator[Launch]:
    upstream = {
        "values": torch.empty(1),
        "argmax": torch.empty(1, dtype=torch.int64),
        "d_values": torch.empty(1),
        "d_target": None if target is None else torch.empty(1),
        "d_linear": torch.empty(1) if p.layout.has_linear else None,
        "folds": p.folds(p.layout.folds),
        "norm": torch.empty(()) if p.x.dtype == torch.float16 else None,
    }
    sums = [TileSum(BIAS.value, cols) for cols in (False, True) if biases]
    sums += [TileSum(SCALE.value, each.scale_of == ScaleOf.COLUMNS, s) for s, each in enumerate(p.layout.sets)]
    if target is not None and p.x.element_size() == 2 and not sums_alone:
        sums += [TileSum(RESIDUAL.value, cols) for cols in (False, True)]
    if kernel in ("rows", "columns"):
        of_columns = kernel == "columns" and not p.itself
        own = tuple(each for each in sums if p.itself or each.cols == of_columns)
        yield from plan.side_launches(p, upstream, own, of_columns, not sums_alone)[0]
    else:
        for chunk in plan.chunks(p, upstream, tuple(sums), torch.empty(1), not sums_alone):
            yield from chunk.launches


def variants(arch: str, combine: Combine) -> Iterator[Variant]:
    """The launches of every combination."""
    for choice in combine(_CHOICES):
        p, target = _problem(arch, choice)
        kernel, D = choice["kernel"][0], p.shape[2]
        if kernel == "fold":
            launches = _forward(p, target)
        else:
            launches = _backward(p, target, kernel, choice["biases"], choice["sums_alone"])
        shown = ("itself", "biases", "target", "linear", *(("sums_alone",) if kernel != "fold" else ()))
        switches = [name for name in shown if choice[name]]
        parts = [choice["folds"], choice["rules"], f"scale_of_{choice['scale_of'].name.lower()}", *switches]
        name = f"similarity_reduce-{kernel}-{D}-{str(choice['dtype'])[6:]}-{'-'.join(parts)}"
        yield next(iter(launches)).variant(name, has_dot=choice["dtype"] != torch.float32)
    yield from _small_kernels(arch)


def _small_kernels(arch: str) -> Iterator[Variant]:
    """What merges the parts of folds, and what gives rounding errors back."""
    p, _ = _problem(
        arch,
        {
            "kernel": ("fold", 64), "dtype": torch.bfloat16, "itself": False, "folds": "lse", "rules": "all",
            "scale_of": ScaleOf.ALL, "biases": False, "target": False, "linear": False,
        },
    )  # fmt: skip
    folds = tuple(TileFold(kind, 0, cols) for kind in range(len(KINDS)) for cols in (False, True)) + (
        plan.linear_fold(),
    )
    for mirrored in (False, True):
        for last in (False, True):
            parts = plan.Parts.of(p, folds, 2, 2, mirrored)
            merge = parts.merge(p, folds, 2, torch.empty(1), torch.empty(1, dtype=torch.int64), last)
            yield merge.variant(f"similarity_reduce-merge-{'last' if last else 'more'}{'-itself' * mirrored}")
    sums = tuple(TileSum(what.value, cols) for what in (BIAS, SCALE, RESIDUAL) for cols in (False, True))
    merge = plan.Parts.of(p, sums, 2, 2, False).merge(p, sums, 2, torch.empty(1, dtype=torch.float64), None, True)
    yield merge.variant("similarity_reduce-merge-sums")
    for dtype in (torch.bfloat16, torch.float16):
        indices = torch.empty(_ROWS, dtype=torch.int64)
        gradient, other = torch.empty(_ROWS, 64), torch.empty(_ROWS, 64, dtype=dtype)
        launch = plan.give_back(gradient, torch.empty(_ROWS), indices, other, arch)
        yield launch.variant(f"similarity_reduce-give_back-{str(dtype)[6:]}")
