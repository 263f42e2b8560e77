"""Batches of all ranks for a bank that all of them share, and ids that no two ranks have."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ._agreement import Agreement
from ._collectives import gather_rows
from ._groups import Group, find_team


def of_all_ranks(
    function: str, rows: Tensor, ids: Tensor | None, labels: Tensor | None, group: Group
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The rows of all ranks with their ids and labels, one rank after another."""
    team = find_team(function, group, rows)
    if team is None:
        return rows, ids, labels
    with Agreement(function, team, True) as agreed:
        checks.check_matrix(function, "rows", rows)
        for name, index in (("ids", ids), ("labels", labels)):
            if index is not None:
                checks.check_index(function, name, index, rows.shape[0], "rows", rows)
        agreed.compare(rows, rows, ids=ids, labels=labels)
    found = (None if each is None else gather_rows(each.detach(), agreed.rows) for each in (rows, ids, labels))
    return tuple(found)  # type: ignore[return-value]


def unique_ids(ids: Tensor, *, group: Group = None) -> Tensor:
    """Ids that differ over ranks, of ids that each rank counts for itself.

    Equivalent to::

        torch.where(ids < 0, -1, ids * world_size + rank)

    Args:
        ids: int64 of any shape, such as numbers of the samples in this rank's own files; what is negative is no id.
        group: as in `clip`.

    Returns:
        Int64 of the same shape. Ids of a sampler that counts the samples of all ranks, such as `DistributedSampler`,
        need no change.

    Raises:
        TypeError: ids that are no integers.

    Examples:
        >>> unique_ids(torch.tensor([0, 1, -1]))          # of one process: the same
        tensor([ 0,  1, -1])
    """
    ids = checks.as_index("unique_ids", "ids", ids)
    team = find_team("unique_ids", group, ids)
    rank, size = (0, 1) if team is None else (team.rank, team.size)
    return torch.where(ids < 0, -1, ids * size + rank)
