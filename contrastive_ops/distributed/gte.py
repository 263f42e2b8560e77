"""GTE's loss over the queries and documents of all ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import losses
from ..core.folds import Fold, Folded
from ..core.problem import Problem
from ..core.records import changed
from ..losses import _arguments
from ..losses._gte import gte_blocks, gte_losses
from ._agreement import Agreement
from ._losses import over_ranks, team_of
from ._rows import local_reduction, rank_share


@over_ranks(losses.gte)
def gte(query: Tensor, document: Tensor, negatives: Tensor | None = None, **options: Any) -> Tensor:
    """`losses.gte` of the queries, documents and hard negatives of all ranks.

    Equivalent to::

        losses.gte(all_gather(query), all_gather(document), all_gather(negatives), ...)      # the mean over ranks

    Args:
        query: (N, D) this rank's queries; see `clip` for what all ranks share.
        document: (N, D); row i is the positive of query i.
        negatives: (N, K, D), K documents of each query, or (H, D) of nobody: this rank's part of them.
        options: as in `losses.gte`, and group, schedule, average and check; see `clip`. Ids of ``pairs`` are those of
            this rank's queries and documents, and compared with those of all ranks.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.
    """
    name = "gte"
    team, (query, document, negatives) = team_of(name, (query, document, negatives), options)
    schedule, average, check = (options.pop(each) for each in ("schedule", "average", "check"))
    if team is None:
        found: Tensor = losses.gte(query, document, negatives, **options)
        return found
    weight, reduction, partition = options["weight"], options["reduction"], options["partition"]
    with Agreement(name, team, check) as agreed:
        blocks, owners = gte_blocks(query, document, negatives, **options)
        shown = {each: value for each, value in options.items() if each != "pairs"}
        shown |= {"schedule": schedule, "average": average, "negatives": negatives}
        agreed.compare(blocks.sides["q"], blocks.sides["d"], options["pairs"], **shown)

    def sweep(problem: Problem, *, reduce: tuple[str | Fold, ...], scale: Tensor, **given: Any) -> Folded:
        """Some sides of all ranks against others, whose sizes are exchanged."""
        with Agreement(name, team, check) as here:
            here.compare(problem.x, problem.columns)
        x, columns = here.with_gradients(problem.x, problem.columns)
        here_and_there = here.sweep(schedule, columns, problem.names, scale)
        return here_and_there.fold(x, columns, *reduce, target=problem.target, **given)

    if owners is not None:  # queries of other ranks are others
        owners = owners[0] + agreed.rows.offset, owners[1] + agreed.rows.offset
    rows = gte_losses(changed(blocks, sweep=sweep), owners, partition, options["directions"])
    loss = _arguments.reduce_rows(rows, weight, local_reduction(reduction))
    return rank_share(loss, agreed.rows, weight, reduction, average)
