"""Lists of ids as sets: which entries repeat an earlier one, and how two lists are compared.

An id is any int64. So no key is formed of two ids by arithmetic, which wraps: pairs are sorted by one and then by the
other, and ids that have to be looked up are replaced by their ranks among those that occur.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from . import checks

# What stands where a list has no entry.
NONE = -1

Found = TypeVar("Found", bound="Tensor | NamedTuple")


def pair_order(row: Tensor, index: Tensor) -> Tensor:
    """(P,) the order in which pairs (row, index) ascend; equal ones stay as they come."""
    order = index.argsort(stable=True)
    return order[row[order].argsort(stable=True)]


def first_of_pairs(row: Tensor, index: Tensor) -> Tensor:
    """(P,) bool: True for pairs (row, index) that no earlier one is equal to."""
    order = pair_order(row, index)
    return torch.empty_like(order, dtype=torch.bool).index_copy_(0, order, _changes(row[order], index[order]))


def distinct_pairs(row: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs in ascending order, each once."""
    order = pair_order(row, index)
    row, index = row[order], index[order]
    first = _changes(row, index)
    return row[first], index[first]


def _changes(row: Tensor, index: Tensor) -> Tensor:
    """True for pairs, which ascend, that differ from the one before."""
    changes = torch.ones_like(row, dtype=torch.bool)
    changes[1:] = (row[1:] != row[:-1]) | (index[1:] != index[:-1])
    return changes


def first_of_each(lists: Tensor) -> Tensor:
    """True where a list of ids has an id for the first time: a mask that makes a set of each list.

    Equivalent to::

        mask[i, j] = lists[i, j] != -1 and lists[i, j] not in lists[i, :j]

    Args:
        lists: (N, K) int64; -1 for none.

    Returns:
        (N, K) bool. Losses of lists of scores know no ids and take it as ``mask``, by which a candidate that was listed
        twice counts once.

    Raises:
        TypeError, ValueError: not an int64 matrix.

    Examples:
        >>> first_of_each(torch.tensor([[7, 3, 7, -1]]))
        tensor([[ True,  True, False, False]])
    """
    lists = checks.as_index("first_of_each", "lists", lists)
    if lists.dim() != 2:
        raise ValueError(f"first_of_each: lists must have two dimensions (N, K), got {tuple(lists.shape)}")
    ascending, order = lists.sort(dim=1, stable=True)
    first = torch.ones_like(lists, dtype=torch.bool)
    first[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    return torch.zeros_like(first).scatter(1, order, first) & (lists != NONE)


def moved_up(kept: Tensor) -> Tensor:
    """(N, K) the places of the entries to keep, in their order, and then those of the others."""
    return (~kept).to(torch.uint8).sort(dim=1, stable=True).indices


def ranks(*ids: Tensor) -> list[Tensor]:
    """Each tensor with its ids replaced by their ranks among the ids of all of them: equal where ids are equal."""
    among = torch.cat([each.reshape(-1) for each in ids]).unique(return_inverse=True)[1]
    parts = among.split([each.numel() for each in ids])
    return [part.view(each.shape) for part, each in zip(parts, ids, strict=True)]
