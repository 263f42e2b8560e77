"""A loss as one operator, from matrices to the number that is trained on."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from ..core import checks, extension
from ..core.backends import Backend, choose, enrol, unsupported_by_cpu
from ..core.operators import call
from ..core.problem import LogitSets, Problem
from ..core.rules import Pairs
from ..reference import similarity_loss as reference
from ..reference.row_losses import FOLDS, KINDS, REDUCTIONS
from ._similarity_loss_autograd import needed, register
from .similarity_reduce import BACKENDS as SWEEPS
from .similarity_reduce import budget_bytes, kept_size


class _Compiled:
    """The compiled launcher with the names of kinds and reductions in place of their numbers."""

    def __init__(self) -> None:
        self._forward = extension.functions("similarity_loss").forward

    def forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        *problem, kind, reduction, needs, kept_size = arguments
        numbers = KINDS.index(kind), REDUCTIONS.index(reduction)
        found: tuple[Tensor, ...] = self._forward(*problem, *numbers, needs, kept_size)
        return found


def _over(name: str) -> Backend:
    """The rows' algebra of the reference around the sweeps of a backend."""
    sweep = SWEEPS[name]
    return Backend(
        source="contrastive_ops/reference/similarity_loss.py",
        functions=functools.cache(lambda: reference.Composed(sweep.functions())),
        unsupported=sweep.unsupported,
        keeps=sweep.keeps,
        no_room=sweep.no_room,
        by_name=sweep.by_name,
    )


# One hop to every implementation.
BACKENDS = enrol(
    "similarity_loss",
    {
        "reference": Backend(
            source="contrastive_ops/reference/similarity_loss.py",
            functions=lambda: reference,
            unsupported=lambda x: [],
            keeps=True,
        ),
        "cpu": Backend(
            source="csrc/similarity_loss.cpp",
            functions=functools.cache(_Compiled),
            unsupported=unsupported_by_cpu,
            keeps=True,
        ),
        "triton": _over("triton"),
        "triton_persistent": _over("triton_persistent"),
        "cuda": _over("cuda"),
        "hopper": _over("hopper"),
    },
)

register(BACKENDS)


def similarity_loss(
    problem: Problem,
    *,
    kind: str = "softmax",
    scale: float | Tensor = 1.0,
    pairs: Pairs | None = None,
    positives: Pairs | None = None,
    weight: Tensor | None = None,
    extra: Tensor | None = None,
    target_weight: Tensor | None = None,
    count: Tensor | None = None,
    reduction: str = "mean",
    unit: bool = False,
    memory_budget: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The loss of the rows of a similarity matrix that is never stored, in one operator.

    Equivalent to::

        reduced = fold(problem, reduce=FOLDS[kind], scale=scale, pairs=pairs)
        losses = row_losses(kind, reduced, extra, count)              # reference/row_losses.py has the formulas
        losses = weight * losses + target_weight * reduced.target
        losses.sum() / weight.sum()                                   # "mean", of the rows with a positive

    Gradients of a mean or sum in one direction are formed in the forward pass (6 N M D); others take 8, 6 if kept. For
    losses, which check what belongs to them; not part of the public surface.

    Args:
        problem: (N, D) and (M, D) or None, biases, and a target for each row. Without targets: column i of row i; of
            two stacked views (y is None) the other view of the sample.
        kind: "softmax", "softmax_both" (of rows and columns; N = M, and the target is the diagonal), "sigmoid",
            "mean_log" or "log_mean" (several positives).
        scale: as in `similarity_reduce`.
        pairs: which pairs take part.
        positives: the positives of the kinds with several; `pairs` are the others.
        weight: (N,) of each row's loss. Differentiable. None: 1, which is not made.
        extra: (N,) lse of logits that the sweep does not see, for "softmax". Differentiable.
        target_weight: (N,) of each target's logit, which is added: label smoothing, graded labels. Differentiable.
        count: (N,) how many positives a row has, for the kinds with several; rows of none are left out.
        reduction: "mean" (divides by the sum of the weights of the rows that count), "sum" or "none".
        unit: as in `fold`.
        memory_budget: as in `similarity_reduce`.
        backend: as in `similarity_reduce`.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in the accumulation dtype.
    """
    function, x, y = problem.names[0], problem.x, problem.y
    sets = LogitSets(problem, unit)
    sets.add(scale, pairs)
    if positives is not None:
        sets.add(scale, positives)
    layout, dtype = sets.layout(*FOLDS[kind]), checks.accumulator(x.dtype)
    weight, extra, target_weight, count = (
        None if each is None else each.to(dtype) for each in (weight, extra, target_weight, count)
    )
    arguments = sets.arguments()
    needs = needed(*arguments, weight, extra, target_weight)
    chosen = choose(function, BACKENDS, x, backend, layout)
    kept = 0
    if needs & reference.SWEPT and not reference.in_one_pass(kind, reduction, y is None, needs):
        budget = budget_bytes(function, memory_budget, x.device.type)
        kept = kept_size(x, y, budget, chosen) if BACKENDS[chosen].keeps else 0
    elif memory_budget is not None:
        budget_bytes(function, memory_budget, x.device.type)
    terms = (weight, extra, target_weight, count)
    given = (*arguments, problem.target, *layout.encode())
    loss: Tensor = call.similarity_loss(*given, *terms, kind, reduction, needs, kept, chosen)[0]
    return loss
