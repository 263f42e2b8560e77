"""Fold the similarities of the rows and columns of all ranks: what the losses are made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import autocast, checks
from ..core.folds import Fold, Reduced, as_fold
from ..core.rules import Pairs
from ..losses._sweep import Sweep
from ..ops.similarity_reduce import as_asked_for
from ._agreement import Agreement
from ._groups import Group, find_team, local_tensor


def similarity_reduce(
    x: Tensor,
    y: Tensor | None = None,
    *,
    reduce: str | Fold | tuple[str | Fold, ...] = "logsumexp",
    dim: int | tuple[int, ...] = 1,
    scale: float | Tensor = 1.0,
    col_scale: float | Tensor | None = None,
    row_bias: Tensor | None = None,
    col_bias: Tensor | None = None,
    target: Tensor | None = None,
    pairs: Pairs | None = None,
    memory_budget: int | None = None,
    backend: str = "auto",
    group: Group = None,
    schedule: str = "auto",
    check: bool = True,
) -> Reduced:
    """`ops.similarity_reduce` of the rows and columns of all ranks; what is given and returned is this rank's.

    Equivalent to::

        whole = ops.similarity_reduce(all_gather(x), all_gather(y), ...)      # with gradients
        whole.rows[rows of this rank], whole.cols[columns of this rank]

    Each pair is computed on the rank of its row, for both directions; folds of columns are returned to their owners.
    The gradient of a sum over ranks of what is computed from this is that of one process: no factors.

    Args:
        x: (N, D) this rank's rows; see `clip` for what all ranks share.
        y: (M, D) this rank's columns; None compares the rows of all ranks with each other.
        reduce: as in `ops.similarity_reduce`, ``dim`` too.
        dim: 1 folds this rank's rows over all columns, 0 its columns over all rows, (0, 1) does both in one sweep.
        scale: float, 0-d, or (N,) of this rank's rows.
        col_scale: float, 0-d, or (M,) of this rank's columns.
        row_bias: (N,) of this rank's rows.
        col_bias: (M,) of this rank's columns.
        target: (N,) int64 in [0, M): a column of this rank for each row.
        pairs: rules as in `clip`.
        memory_budget: as in `ops.similarity_reduce`; of "ring" for each block.
        backend: as in `ops.similarity_reduce`.
        group: as in `clip`; ``schedule`` and ``check`` too.
        schedule: "auto", "gather" or "ring".
        check: compare shapes, dtypes and options of all ranks first.

    Returns:
        A `Reduced`, whatever is asked for; where `reduce` is a tuple, of tuples. What ``row_argmax`` and
        ``col_argmax`` name is counted over all ranks.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.
    """
    name = "similarity_reduce"
    team = find_team(name, group, x, y)
    x, y = local_tensor(x), local_tensor(y)
    options: dict[str, Any] = {"dim": dim, "col_scale": col_scale, "row_bias": row_bias, "target": target}
    shared: dict[str, Any] = {"scale": scale, "pairs": pairs, "col_bias": col_bias}
    shared |= {"memory_budget": memory_budget, "backend": backend}
    folds = reduce if isinstance(reduce, tuple) else (reduce,)
    if team is None:
        folded = Sweep((name, "x", "y"), **shared).fold(x, y, *folds, **options)
        return as_asked_for(folded, reduce, dim, target)
    with Agreement(name, team, check) as agreed:
        x, y = autocast.cast(x, y)
        columns = x if y is None else y
        checks.check_matrices(name, "x", x, "y", columns)
        for vector, value, like in (("row_bias", row_bias, x), ("col_bias", col_bias, columns)):
            if value is not None:
                checks.check_vector(name, vector, value, like.shape[0], "x", x)
        if target is not None:
            target = checks.check_index(name, "target", target, x.shape[0], "x", x)
            checks.check_index_values(name, "target", target, columns.shape[0], waits=False)
        kinds = [as_fold(name, request).name for request in folds]
        agreed.compare(x, columns, pairs, reduce=kinds, schedule=schedule, scale=scale, **options)
    x, columns = agreed.with_gradients(x, columns)
    sweep = agreed.sweep(schedule, columns, (name, "x", "y"), **shared)
    return as_asked_for(sweep.fold(x, columns, *folds, **options), reduce, dim, target)
