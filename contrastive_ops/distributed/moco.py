"""MoCo over the queries of all ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import losses
from ..core import checks
from ._agreement import Agreement
from ._collectives import gather_rows
from ._groups import Group, find_team, local_tensor
from ._rows import local_reduction, rank_share


def moco(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    *,
    labels: Tensor | None = None,
    queue_labels: Tensor | None = None,
    shared_queue: bool = True,
    temperature: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = True,
    memory_budget: int | None = None,
    backend: str = "auto",
    group: Group = None,
    average: bool = True,
    check: bool = True,
) -> Tensor:
    """`losses.moco` of the queries of all ranks, with a queue that all ranks have, or of which each has a part.

    Equivalent to::

        queue = queue if shared_queue else all_gather(queue)
        losses.moco(all_gather(query), all_gather(key), queue, ...)      # the mean over ranks of what is returned

    Args:
        query: (N, D) this rank's queries; see `clip` for what all ranks share.
        key: (N, D); row i is the positive of query i. The keys of other queries are no negatives.
        queue: (K, D), frozen.
        labels: (N,) int64 with ``queue_labels``; -1 equals nothing.
        queue_labels: (K,) int64 of the entries of ``queue``.
        shared_queue: the queue is the same on all ranks. False: each rank has a part, and all parts are gathered.
        temperature: as in `losses.moco`; scale too.
        scale: 1 / temperature instead; not both.
        label_smoothing: as in `losses.moco`.
        weight: (N,) of this rank's queries; the mean divides by the sum over all ranks.
        reduction: "mean" or "sum" over the queries of all ranks, or "none": the losses of this rank's.
        normalize: scale all rows to length 1 first.
        memory_budget: as in `losses.moco`.
        backend: as in `losses.moco`.
        group: as in `clip`; ``average`` and ``check`` too.
        average: for gradients that are averaged over ranks afterwards, as DDP and FSDP do.
        check: compare shapes, dtypes and options of all ranks first.

    Returns:
        0-d, or (N,) for ``reduction="none"``, in float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.
    """
    name = "moco"
    team = find_team(name, group, query, key)
    query, key, queue = local_tensor(query), local_tensor(key), local_tensor(queue)
    options: dict[str, Any] = {"temperature": temperature, "scale": scale, "label_smoothing": label_smoothing}
    options |= {"weight": weight, "normalize": normalize, "memory_budget": memory_budget, "backend": backend}
    if team is None:
        options |= {"labels": labels, "queue_labels": queue_labels, "reduction": reduction}
        return losses.moco(query, key, queue, **options)
    with Agreement(name, team, check) as agreed:
        checks.check_matrices(name, "query", query, "queue", queue)
        if queue_labels is not None:
            queue_labels = checks.check_index(name, "queue_labels", queue_labels, queue.shape[0], "query", query)
        shared_queue = checks.flag(name, "shared_queue", shared_queue)
        agreed.compare(query, queue, shared_queue=shared_queue, average=average, reduction=reduction, **options)
    if not shared_queue:
        queue = gather_rows(queue.detach(), agreed.columns)
        queue_labels = None if queue_labels is None else gather_rows(queue_labels, agreed.columns)
    part = local_reduction(reduction)
    loss = losses.moco(query, key, queue, labels=labels, queue_labels=queue_labels, reduction=part, **options)
    return rank_share(loss, agreed.rows, weight, reduction, average)
