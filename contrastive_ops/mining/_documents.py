"""Search by document where a document has several chunks: its best chunk counts, and no other takes a place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core import checks
from ..core.lists import distinct_pairs, first_of_each, moved_up
from ..ops.similarity_topk import TopK, merge, order
from ._positives import Positives, lists_of

# Of (rows or None for all of them, length of the lists): the best chunks.
Search = Callable[[Tensor | None, int], TopK]


def checked_documents(function: str, documents: object, query: Tensor, rows: int | None) -> Tensor | None:
    """(M,) int64, the document of each chunk, none of them -1; None where chunks are no parts of documents."""
    if documents is None:
        return None
    documents = checks.from_array(function, "documents", documents)
    found = checks.check_index(function, "documents", documents, rows, "query", query)
    if checks.may_read(found, waits=True) and bool((found == -1).any()):
        raise ValueError(f"{function}: documents must not be -1, which stands for none, got it for a chunk")
    return found


def whole_documents(positives: Positives, documents: Tensor | None) -> Positives:
    """All chunks of the documents of each query's positives."""
    if documents is None:
        return positives
    order = documents.argsort(stable=True)
    ordered, own = documents[order], documents[positives.column].contiguous()
    begin = torch.searchsorted(ordered, own)
    counts = torch.searchsorted(ordered, own, right=True) - begin
    entry = torch.repeat_interleave(counts)
    column = order[torch.arange(len(entry), device=entry.device) + (begin - (counts.cumsum(0) - counts))[entry]]
    row, column = distinct_pairs(positives.row[entry], column)
    return Positives(lists_of(row, column, len(positives.indptr) - 1)[0], row, column)


def best(search: Search, documents: Tensor | None, begin: int, end: int, k: int) -> TopK:
    """The k best documents of every row among the chunks [begin, end), each at its best chunk; or the k best chunks.

    The best chunks hold the best documents, but perhaps too few: rows whose list is full of chunks of fewer than k
    documents are searched again, for twice as many.

    Args:
        search: finds chunks; an index is that of a chunk, -1 for none.
        documents: (M,) int64, or None.
        begin: the first chunk that is searched; indices count from it.
        end: the one behind the last.
        k: length of the lists.
    """
    if documents is None:
        return search(None, k)
    documents = documents[begin:end]
    width = min(k + k // 2 + 2, max(len(documents), k))
    top = search(None, width)
    values, indices, too_few = distinct(top, documents, k)
    left = too_few.nonzero().squeeze(1)
    while len(left):
        width = min(2 * width, max(len(documents), k))
        values[left], indices[left], too_few = distinct(search(left, width), documents, k)
        left = left[too_few]
    return TopK(values, indices, (indices >= 0).sum(1))


def distinct(top: TopK, documents: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first chunk of each document in lists of k, and which lists would be longer if more chunks were known."""
    values, indices = top.values, top.indices
    ids = documents[indices.clamp_min(0)] if len(documents) else torch.zeros_like(indices)
    # A number that no document has in a list: the first chunk's for what is not there, which is dropped in any case.
    first = first_of_each(ids.masked_fill(indices < 0, -1))
    place = moved_up(first)[:, :k]
    kept = first.gather(1, place)
    found = indices.gather(1, place).masked_fill(~kept, -1)
    values = values.gather(1, place).masked_fill(~kept, -torch.inf)
    too_few = (kept.sum(1) < k) & (indices >= 0).all(1) & (indices.shape[1] < len(documents))
    return values, found, too_few


def merged(top: TopK, other: TopK, documents: Tensor | None, backend: str) -> TopK:
    """The best documents of two lists, each of other chunks; or the best chunks."""
    if documents is None:
        return merge(top, other, backend)
    values, indices = (torch.cat(both, 1) for both in zip(top[:2], other[:2], strict=True))
    both = order(values, indices, values.shape[1], backend)
    values, indices, _ = distinct(both, documents, top.values.shape[1])
    return TopK(values, indices, (indices >= 0).sum(1))
