"""Chunks of documents that were found as documents, each once."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ..core import checks
from ..core.lists import first_of_each, moved_up
from ..ops.similarity_topk import TopK

Found = TypeVar("Found", Tensor, TopK)


def collapse(found: Found, documents: Tensor | None = None) -> Found:
    """Lists of what was found as sets: each document once, at its best place, and what comes after it moves up.

    Equivalent to, for each row::

        ids = [documents[j] for j in found if j != -1]
        list(dict.fromkeys(ids))                                        # and -1 for the rest

    Args:
        found: (N, K) int64, the best first, -1 for none; or a `TopK`, whose values move along and keep their gradient.
        documents: (M,) int64, the document of each chunk, where what was found are chunks in [0, M); any int64, but not
            -1 for one that was found. None: what was found are documents, some of them more than once.

    Returns:
        As `found`, of the same shape. K chunks may be fewer than K documents: search for more where that is too few.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Examples:
        >>> collapse(torch.tensor([[4, 0, 5, 2]]), documents=torch.tensor([7, 7, 8, 8, 9, 9]))
        tensor([[ 9,  7,  8, -1]])
    """
    name = "collapse"
    indices = found.indices if isinstance(found, TopK) else found
    indices = checks.as_index(name, "found", indices)
    if indices.dim() != 2:
        raise ValueError(f"{name}: found must have two dimensions (N, K), got {checks.shape(indices)}")
    ids = indices if documents is None else documents_of(name, "found", indices, documents)
    first = first_of_each(ids)
    place = moved_up(first)
    kept = first.gather(1, place)
    ids = ids.gather(1, place).masked_fill(~kept, -1)
    if not isinstance(found, TopK):
        return ids
    values = found.values.gather(1, place).masked_fill(~kept, -torch.inf)
    return found._replace(values=values, indices=ids, counts=kept.sum(1))


def documents_of(function: str, name: str, chunks: Tensor, documents: Tensor) -> Tensor:
    """The document of each chunk, -1 for none."""
    documents = checks.check_index(function, "documents", documents, None, name, chunks)
    checks.check_index_values(function, name, chunks, documents.shape[0], or_none=True)
    if documents.shape[0] == 0:
        return torch.full_like(chunks, -1)
    of_chunk = documents[chunks.clamp_min(0)]
    if checks.may_read(documents, waits=True) and bool(((of_chunk == -1) & (chunks >= 0)).any()):
        raise ValueError(
            f"{function}: documents must not be -1, which stands for none, got it for a chunk that was found"
        )
    return torch.where(chunks < 0, -1, of_chunk)
