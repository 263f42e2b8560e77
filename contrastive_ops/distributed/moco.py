"""MoCo over the queries of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from .. import losses
from ..core import checks
from ..core.records import changed
from ..core.rules import Pairs
from ..losses import _arguments
from ..losses._columns import check_pairs
from ..losses._sweep import FIELDS
from ..losses.diagnostics import Diagnostics
from ..losses.moco import prepared_moco
from ._agreement import Agreement
from ._collectives import gather_rows, sum_over_ranks
from ._losses import FilteredOptions, MergedSweep, over_ranks, team_of
from ._rows import local_reduction, rank_share

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def moco(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    labels: Tensor | None = ...,
    queue_labels: Tensor | None = ...,
    shared_queue: bool = ...,
    smooth: str = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[FilteredOptions],
) -> Tensor: ...


@overload
def moco(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    labels: Tensor | None = ...,
    queue_labels: Tensor | None = ...,
    shared_queue: bool = ...,
    smooth: str = ...,
    diagnostics: Literal[True],
    **options: Unpack[FilteredOptions],
) -> tuple[Tensor, Diagnostics]: ...


@over_ranks(losses.moco, shared_queue=("bool", True))
def moco(query: Tensor, key: Tensor, queue: Tensor, **options: Any) -> Any:
    """`losses.moco` of the queries of all ranks, with a queue that all ranks have, or of which each has a part.

    Equivalent to::

        queue = queue if shared_queue else all_gather(queue)
        losses.moco(all_gather(query), all_gather(key), queue, ...)      # the mean over ranks of what is returned

    Args:
        query: (N, D) this rank's queries; see `clip` for what all ranks share.
        key: (N, D); row i is the positive of query i. The keys of other queries are no negatives.
        queue: (K, D), frozen.
        options: as in `losses.moco`, and group, average and check; see `clip`. There are no blocks to exchange,
            whatever ``schedule`` says. ``shared_queue``: the queue is the same on all ranks. False: each rank has a
            part of it, and of ``queue_labels``, ``col_bias`` and the rules of its columns; all parts are gathered.

    Returns:
        As `losses.moco`: 0-d, or this rank's rows for ``reduction="none"``; with ``diagnostics`` a pair.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.
    """
    name = "moco"
    team, (query, key, queue) = team_of(name, (query, key, queue), options)
    average, check, shared = (options.pop(each) for each in ("average", "check", "shared_queue"))
    schedule = options.pop("schedule")
    if team is None:
        return losses.moco(query, key, queue, **options)
    reduction = options["reduction"]
    options["reduction"] = local_reduction(reduction)
    with Agreement(name, team, check) as agreed:
        _arguments.check_reduction(name, reduction)
        shared = checks.flag(name, "shared_queue", shared)
        check_pairs(name, options["pairs"])
        checks.check_matrices(name, "query", query, "queue", queue)
        if options["queue_labels"] is not None:
            given = checks.check_index(name, "queue_labels", options["queue_labels"], queue.shape[0], "query", query)
            options["queue_labels"] = given
        problem = prepared_moco(query, key, queue, **options)
        shown = {each: value for each, value in options.items() if each != "pairs"}
        shown |= {"shared_queue": shared, "average": average, "schedule": schedule, "reduction": reduction}
        agreed.compare(query, queue, options["pairs"] if not shared else None, **shown)
    if not shared:
        of_all = agreed.sweep("gather", queue, (name, "query", "queue"), 1.0)
        pairs = of_all.global_pairs(options["pairs"])
        if pairs is not None and pairs.diagonal is not None:  # which counts the queue, and no rows of other ranks
            pairs = changed(pairs, diagonal=options["pairs"].diagonal)
        options |= {"pairs": pairs, "col_bias": of_all.gathered(options["col_bias"])}
        if options["queue_labels"] is not None:
            options["queue_labels"] = gather_rows(options["queue_labels"], agreed.columns)
        problem = prepared_moco(query, key, gather_rows(queue.detach(), agreed.columns), **options)
    fields = {each: getattr(problem.sweep, each) for each in FIELDS}
    sweep = MergedSweep(**fields, merge=lambda sums: sum_over_ranks(sums, team))
    if options["diagnostics"] and sweep.pairs is None:
        sweep = changed(sweep, pairs=Pairs())
    found = problem.function(sweep, problem.x, problem.y, **problem.options)
    loss, measures = found if options["diagnostics"] else (found, None)
    share = rank_share(loss, agreed.rows, options["weight"], reduction, average)
    return (share, measures) if options["diagnostics"] else share
