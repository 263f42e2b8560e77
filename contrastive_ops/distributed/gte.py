"""GTE's loss over the queries and documents of all ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .. import losses
from ..core.folds import Fold, Folded
from ..core.problem import Problem
from ..core.rules import Pairs
from ..losses import _arguments
from ..losses._blocks import DIRECTIONS
from ..losses._gte import gte_blocks, gte_losses
from ._agreement import Agreement
from ._groups import Group, find_team, local_tensor
from ._rows import local_reduction, rank_share


def gte(
    query: Tensor,
    document: Tensor,
    negatives: Tensor | None = None,
    *,
    partition: str = "joint",
    directions: tuple[str, ...] = DIRECTIONS,
    false_negative_margin: float | None = None,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    pairs: Pairs | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
    group: Group = None,
    schedule: str = "auto",
    average: bool = True,
    check: bool = True,
) -> Tensor:
    """`losses.gte` of the queries, documents and hard negatives of all ranks.

    Equivalent to::

        losses.gte(all_gather(query), all_gather(document), all_gather(negatives), ...)      # the mean over ranks

    Args:
        query: (N, D) this rank's queries; see `clip` for what all ranks share.
        document: (N, D); row i is the positive of query i.
        negatives: (N, K, D), K documents of each query, or (H, D) of nobody: this rank's part of them.
        partition: as in `losses.gte`; ``directions``, ``false_negative_margin`` and the temperature too.
        directions: which blocks take part.
        false_negative_margin: drop pairs of row i whose similarity exceeds that of (q_i, d_i) by more than this.
        temperature: divides the similarities.
        scale: 1 / temperature instead; not both.
        pairs: as in `losses.gte`, of this rank's queries and documents; ids of all ranks are compared.
        weight: (N,) of this rank's rows; the mean divides by the sum over all ranks.
        reduction: "mean" or "sum" over the rows of all ranks, or "none": the losses of this rank's.
        normalize: scale all rows to length 1 first.
        memory_budget: as in `losses.gte`; of "ring" for each block.
        backend: as in `losses.gte`.
        group: as in `clip`; ``schedule``, ``average`` and ``check`` too.
        schedule: "auto", "gather" or "ring".
        average: for gradients that are averaged over ranks afterwards, as DDP and FSDP do.
        check: compare shapes, dtypes and options of all ranks first.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.
    """
    name = "gte"
    team = find_team(name, group, query, document)
    query, document, negatives = local_tensor(query), local_tensor(document), local_tensor(negatives)
    blocks_of: dict[str, Any] = {"partition": partition, "directions": directions}
    options: dict[str, Any] = {"false_negative_margin": false_negative_margin, "temperature": temperature}
    options |= {"scale": scale, "weight": weight, "reduction": reduction, "normalize": normalize}
    more: dict[str, Any] = {"pairs": pairs, "memory_budget": memory_budget, "backend": backend}
    if team is None:
        return losses.gte(query, document, negatives, **blocks_of, **options, **more)
    with Agreement(name, team, check) as agreed:
        blocks, owners = gte_blocks(query, document, negatives, **blocks_of, **options, **more)
        of_all = {"schedule": schedule, "average": average, "negatives": negatives}
        agreed.compare(blocks.sides["q"], blocks.sides["d"], pairs, **of_all, **blocks_of, **options)

    def sweep(problem: Problem, *, reduce: tuple[str | Fold, ...], scale: Tensor, **given: Any) -> Folded:
        """Some sides of all ranks against others, whose sizes are exchanged."""
        with Agreement(name, team, check) as here:
            here.compare(problem.x, problem.columns)
        x, columns = here.with_gradients(problem.x, problem.columns)
        here_and_there = here.sweep(schedule, columns, problem.names, scale)
        return here_and_there.fold(x, columns, *reduce, target=problem.target, **given)

    if owners is not None:  # queries of other ranks are others
        owners = owners[0] + agreed.rows.offset, owners[1] + agreed.rows.offset
    rows = gte_losses(replace(blocks, sweep=sweep), owners, partition, directions)
    loss = _arguments.reduce_rows(rows, weight, local_reduction(reduction))
    return rank_share(loss, agreed.rows, weight, reduction, average)
