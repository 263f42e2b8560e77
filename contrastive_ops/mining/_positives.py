"""The positives of queries: lists in one form, their scores, and one score per query that margins refer to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.column_lists import check_lists
from ..core.lists import distinct_pairs, first_of_pairs
from ..core.offsets import common_row
from ..core.ordered import segment_sums
from ..core.problem import Problem
from ..ops._nearest import products
from ..ops.similarity_topk import logits_at, metric_rows

AGGREGATES = ("min", "max", "mean")

# Numbers of gathered rows at a time.
CHUNK_ELEMENTS = 1 << 20


class Positives(NamedTuple):
    """Lists of columns, each column once in a list, in the order in which they were given.

    Attributes:
        indptr: (N + 1,) where the list of each query begins.
        row: (P,) the query of each entry.
        column: (P,) the column of each entry.
    """

    indptr: Tensor
    row: Tensor
    column: Tensor

    @property
    def counts(self) -> Tensor:
        """(N,) positives of each query."""
        return self.indptr.diff()

    def excluded_with(self, indptr: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Lists, ascending, of the columns that are a positive or in the given lists."""
        row = torch.cat([self.row, torch.repeat_interleave(indptr.diff())])
        return lists_of(*distinct_pairs(row, torch.cat([self.column, index])), len(self.indptr) - 1)


class Scored(NamedTuple):
    """Scores of positives, and how far two roundings of one score may be apart."""

    values: Tensor
    slack: Tensor


def lists_of(row: Tensor, index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(indptr, indices) of entries whose rows ascend."""
    lengths = torch.bincount(row, minlength=rows)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), index


def parse(function: str, positives: object, query: Tensor, columns: int) -> Positives:
    """Check the positives of each query against a corpus of so many rows and bring them to one form.

    Args:
        function: the function to name in errors.
        positives: (N,) or (N, P) int64, -1 for none, or (indptr (N + 1,), indices).
        query: (N, D).
        columns: M.
    """
    rows = query.shape[0]
    if isinstance(positives, tuple):
        if len(positives) != 2:
            raise TypeError(f"{function}: positives must be (indptr, indices), got a tuple of {len(positives)}")
        arrays = (checks.from_array(function, "positives", each) for each in positives)
        positives = tuple(checks.as_index(function, "positives", each) for each in arrays)
        check_lists(function, "positives", positives, query, query.new_empty((columns, 0)))
        row, index = torch.repeat_interleave(positives[0].diff()), positives[1]
    else:
        row, index = _listed(function, positives, query)
        wrong = ((index < 0) | (index >= columns)).nonzero()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"{function}: positives must be in [0, {columns}) or -1 for none, got {int(index[at])} for query "
                f"{int(row[at])}"
            )
    first = first_of_pairs(row, index)
    row, index = row[first], index[first]
    return Positives(lists_of(row, index, rows)[0], row, index)


def _listed(function: str, positives: object, query: Tensor) -> tuple[Tensor, Tensor]:
    rows = query.shape[0]
    positives = checks.from_array(function, "positives", positives)
    if not isinstance(positives, Tensor):
        raise TypeError(
            f"{function}: positives must be an int64 tensor or (indptr, indices), got {type(positives).__name__}"
        )
    positives = checks.as_index(function, "positives", positives)
    if positives.dim() not in (1, 2) or positives.shape[0] != rows:
        raise ValueError(
            f"{function}: positives must have shape ({rows},) or ({rows}, P), got {checks.shape(positives)}"
        )
    checks.check_device(function, "query", query, "positives", positives)
    table = positives if positives.dim() == 2 else positives[:, None]
    row, slot = (table != -1).nonzero(as_tuple=True)
    return row, table[row, slot]


def score(
    function: str,
    query: Tensor,
    take: Callable[[Tensor], Tensor],
    positives: Positives,
    metric: str,
    backend: str,
) -> Scored:
    """Score every positive in the arithmetic in which candidates are scored, from rows of the same dtype.

    Args:
        function: the function to name in errors.
        query: (N, D).
        take: returns the rows of the corpus that an int64 vector names.
        positives: which.
        metric: as in `similarity_topk`.
        backend: as in `similarity_topk`.
    """
    dtype = checks.accumulator(query.dtype)
    values = torch.empty(positives.column.shape, dtype=dtype, device=query.device)
    slack = torch.empty_like(values)
    origin = common_row(query.to(dtype))  # that of a search for the same queries
    step = max(1, CHUNK_ELEMENTS // max(query.shape[1], 1))
    for begin in range(0, len(values), step):
        part = slice(begin, begin + step)
        rows, row = positives.row[part].unique(return_inverse=True)
        columns, column = positives.column[part].unique(return_inverse=True)
        x, y = metric_rows(function, query[rows], take(columns), metric)
        listed = Problem((function, "query", "corpus"), x[row], y)
        values[part] = logits_at(listed, column[:, None], metric=metric, backend=backend).squeeze(1)
        if metric == "sqeuclidean":
            x, y = products(x, y, origin)
        length = [torch.linalg.vector_norm(side.to(dtype), dim=1) for side in (x, y)]
        slack[part] = length[0][row] * length[1][column]
    # Two orders of adding D products differ by about sqrt(D) roundings of a number no larger than the lengths' product.
    return Scored(values, slack * (2 * torch.finfo(dtype).eps * max(query.shape[1], 1) ** 0.5))


def aggregate(scores: Tensor, positives: Positives, how: str) -> Tensor:
    """(N,) the minimum, maximum or mean of the scores of each query's positives; NaN where none or one is NaN."""
    counts = positives.counts
    none = counts == 0
    if how == "mean":
        total = segment_sums(scores, positives.row, len(counts))
        return (total / counts).masked_fill(none, torch.nan)
    of_row = scores.new_full((len(counts),), torch.inf if how == "min" else -torch.inf)
    of_row = of_row.scatter_reduce(0, positives.row, scores, "amin" if how == "min" else "amax")
    broken = torch.zeros_like(none).index_fill(0, positives.row[scores.isnan()], True)
    return of_row.masked_fill(none | broken, torch.nan)
