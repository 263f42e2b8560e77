"""SupCon over the rows of all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import losses
from ..core import checks
from ..core.folds import Fold
from ..core.numerics import softplus
from ..core.rules import Pairs
from ..losses import _arguments
from ..losses._columns import check_filters
from ..losses._distances import METRICS, as_products
from ..losses._labels import labelled, one_positive, other_labels
from ..losses.multi_positive import TEMPERATURE
from ._agreement import Agreement
from ._collectives import gather_rows
from ._losses import over_ranks, team_of
from ._rows import local_reduction, rank_share
from ._sweep import ShardedSweep


@over_ranks(losses.sup_con)
def sup_con(
    x: Tensor, labels: Tensor, y: Tensor | None = None, col_labels: Tensor | None = None, **options: Any
) -> Tensor:
    """`losses.sup_con` of the rows of all ranks: the positives of a row are on any of them.

    Equivalent to::

        losses.sup_con(all_gather(x), all_gather(labels), ...)      # the mean over ranks of what is returned

    Args:
        x: (N, D) this rank's rows; see `clip` for what all ranks share.
        labels: (N,) int64; the labels of all ranks are compared. -1 is no label.
        y: (M, D), this rank's part of the columns to compare with; None compares the rows of all ranks.
        col_labels: (M,) int64, the labels of y; given together with it.
        options: as in `losses.sup_con`, and group, schedule, average and check; see `clip`, also of ``metric``.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.

    Note:
        8 N_local M_all D operations, 6 if kept.
    """
    name = "sup_con"
    team, (x, y) = team_of(name, (x, y), options)
    schedule, average, check = (options.pop(each) for each in ("schedule", "average", "check"))
    if team is None:
        found: Tensor = losses.sup_con(x, labels, y, col_labels, **options)
        return found
    pairs, weight, reduction, normalize = (options[each] for each in ("pairs", "weight", "reduction", "normalize"))
    with Agreement(name, team, check) as agreed:
        checks.check_choice(name, "positives", options["positives"], ("mean_log", "log_mean"))
        scaling = options["temperature"], options["scale"], TEMPERATURE
        x, y, scale, of_others, of_same = labelled(
            name, x, labels, y, col_labels, *scaling, reduction, weight, normalize
        )
        of_others = other_labels(name, pairs, of_others, y is None)
        columns = x if y is None else y
        check_filters(name, None, options["col_bias"], columns.shape[0], "x", x)
        checks.check_choice(name, "metric", options["metric"], METRICS)
        unit = _arguments.in_sweep(normalize, x)
        if options["metric"] == "sqeuclidean":
            x, columns = as_products([x], [columns], unit, shifted=False)
            unit = False
        shown = {each: value for each, value in options.items() if each != "pairs"}
        agreed.compare(x, columns, of_others, schedule=schedule, average=average, **shown)
    x, columns = agreed.with_gradients(x, columns)
    sweep = agreed.sweep(
        schedule,
        columns,
        (name, "x", "y"),
        scale,
        pairs=of_others,
        col_bias=options["col_bias"],
        unit=unit,
        memory_budget=options["memory_budget"],
        backend=options["backend"],
    )
    target, count = _positives(sweep, checks.as_index(name, "labels", labels), col_labels)
    part = local_reduction(reduction)
    loss = _rows(sweep, options["positives"], x, columns, of_same, target, count, weight, part)
    return rank_share(loss, agreed.rows, weight, reduction, average, counted=count > 0)


def _positives(sweep: ShardedSweep, labels: Tensor, col_labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """A column with each row's label, counted from this rank's first one, and the number of such columns."""
    if col_labels is None:  # of the rows of all ranks, none is its own positive
        target, count = one_positive(gather_rows(labels, sweep.rows), None)
        here = slice(sweep.rows.offset, sweep.rows.offset + sweep.rows.local)
        target, count = None if target is None else target[here], count[here]
    else:
        target, count = one_positive(
            labels, gather_rows(checks.as_index("sup_con", "col_labels", col_labels), sweep.columns)
        )
    return None if target is None else target - sweep.columns.offset, count


def _rows(
    sweep: ShardedSweep,
    positives: str,
    x: Tensor,
    y: Tensor,
    of_same: Pairs,
    target: Tensor | None,
    count: Tensor,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """The losses of this rank's rows, or their sum."""
    options: dict[str, Any] = {"weight": weight, "reduction": reduction}
    if sweep.schedule == "gather" and target is not None:
        return sweep.loss(positives, x, y, positives=of_same, target=target, count=count, **options)
    # No column of another rank can leave a block as the target: all positives together stand in for it.
    folds = ("logsumexp", Fold("logsumexp", pairs=of_same), Fold("sum", pairs=of_same))
    (others, same, total), *_ = sweep.fold(x, y, *folds)
    counted, number = count > 0, count.to(total.dtype).clamp_min(1.0)
    same = torch.where(counted, same, 0.0)
    inner = same - total / number if positives == "mean_log" else number.log()
    rows = torch.where(counted, softplus(others - same) + inner, 0.0)
    return _arguments.reduce_rows(rows, weight, reduction)
