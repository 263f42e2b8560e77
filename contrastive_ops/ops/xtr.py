"""Late interaction over the document tokens that each query token retrieves: XTR."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import checks
from ..core.ordered import segment_sums
from ..core.problem import Problem
from .maxsim import REDUCTIONS
from .similarity_topk import select
from .token_sets import Packed, TokenSets, check_two_sides, packed

MISSING = ("skip", "impute")


def xtr(
    queries: Tensor | TokenSets,
    documents: Tensor | TokenSets,
    k: int,
    *,
    missing: str = "skip",
    reduce: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Score every query with every document by the tokens that are retrieved: the k best of each query token (XTR).

    Equivalent to::

        similarity = query_tokens @ document_tokens.T          # (T, T'), the tokens of all queries and all documents
        least = similarity.topk(k, dim=1).values[:, -1:]
        for n, m in itertools.product(range(N), range(M)):     # the tokens of query n and of document m
            best = similarity[n][:, m].amax(1)                 # maxsim
            retrieved = best >= least[n]
            total = best[retrieved].sum() + missing            # 0, or least[n][~retrieved].sum()
            scores[n, m] = total / count                       # retrieved.sum(), or the number of tokens

    Args:
        queries: as in `maxsim`.
        documents: as in `maxsim`: the mini-batch, or all candidates.
        k: how many document tokens each query token retrieves, among those of all documents; of equal similarities the
            ones that come first.
        missing: what a query token adds where it retrieves no token of a document: "skip", nothing, as in training; or
            "impute", the similarity of the last token that it did retrieve, an upper bound, as in inference.
        reduce: "mean" over the query tokens that add something, or "sum".
        backend: as in `similarity_topk`, which does the work.

    Returns:
        (N, M) in float32 (float64 for float64 inputs). A document of which nothing is retrieved has score 0 with
        "skip". A document without tokens has score -inf, a query without tokens 0, a query or document with a NaN in
        its tokens NaN.

    Raises:
        ValueError, TypeError, NotImplementedError: as `maxsim`.

    Note:
        Differentiable in both, twice; which tokens are retrieved is not differentiated. Memory O(T k + T M): one pass
        of `similarity_topk`, and a table of a number for each query token and document. Where k reaches the number of
        document tokens, the mean is that of `maxsim`.

    Source:
        Lee et al., Rethinking the Role of Token Retrieval in Multi-Vector Retrieval, 2023.

    Examples:
        >>> from contrastive_ops.ops import maxsim, xtr
        >>> queries, documents = torch.randn(2, 4, 8), torch.randn(3, 9, 8)
        >>> torch.allclose(xtr(queries, documents, k=27), maxsim(queries, documents, reduce="mean"), atol=1e-5)
        True
    """
    name = "xtr"
    q, d = packed(name, "queries", queries), packed(name, "documents", documents)
    return retrieved_scores(name, q, d, k, missing, reduce, backend)


def retrieved_scores(function: str, q: Packed, d: Packed, k: int, missing: str, reduce: str, backend: str) -> Tensor:
    """`xtr` of sets that are packed already."""
    check_two_sides(function, q, d)
    k = checks.integer(function, "k", k, 1)
    checks.check_choice(function, "missing", missing, MISSING)
    checks.check_choice(function, "reduce", reduce, REDUCTIONS)
    dtype = checks.accumulator(q.tokens.dtype)
    of_query, of_document = q.owners(), d.owners()
    no_token = torch.zeros_like(of_document, dtype=dtype).masked_fill(of_document < 0, -torch.inf)
    tokens = Problem.of((function, "queries", "documents"), q.tokens, d.tokens, None, no_token)
    top = select(tokens, k, backend=backend).top
    best, retrieved = _best_of_documents(top.values, top.indices, of_document, d.shape[0])
    takes_part = (of_query >= 0)[:, None]
    counted = retrieved & takes_part
    if missing == "impute":
        # Lists are filled up with -inf where there are fewer than k tokens; then what is missing has products of -inf,
        # or no tokens.
        best = torch.where(retrieved, best, top.values[:, -1:])
        counted = takes_part.expand_as(counted)
    total = _sum_over_queries(q, of_query, torch.where(counted, best, 0.0))
    if reduce == "mean":
        total = total / _sum_over_queries(q, of_query, counted.to(dtype)).clamp_min(1.0)
    empty = (d.counts() == 0) & (q.counts() > 0)[:, None]
    nan = (_holds_nan(q, of_query)[:, None] + _holds_nan(d, of_document)).to(dtype)
    return total.masked_fill(empty, -torch.inf) + nan


def _best_of_documents(values: Tensor, indices: Tensor, of_document: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(T, M) the best value that each row lists of each document, and whether it lists any."""
    owner = pad(of_document, (0, 1), value=-1)[indices]  # an index of -1 takes the last one
    owner = owner.masked_fill(owner < 0, count)
    # Best first: the first of each document is its best, and a stable order leaves it first.
    owner, order = owner.sort(dim=1, stable=True)
    again = pad(owner[:, 1:] == owner[:, :-1], (1, 0))
    owner = owner.masked_fill(again, count)
    found = values.gather(1, order)
    # Only the column for what belongs to no document, which is dropped, is written more than once.
    shape = (values.shape[0], count + 1)
    best = values.new_zeros(shape).scatter(1, owner, found.masked_fill(owner == count, 0.0))
    retrieved = torch.zeros(shape, dtype=torch.bool, device=values.device).scatter(1, owner, owner < count)
    return best[:, :count], retrieved[:, :count]


def _sum_over_queries(q: Packed, of_query: Tensor, rows: Tensor) -> Tensor:
    """(N, M) sums of the rows (T, M) of each query; those of masked tokens must be 0."""
    if q.length is not None:
        return rows.view(q.shape[0], q.length, rows.shape[1]).sum(1)
    return _sums_by_owner(q, of_query, rows)


def _holds_nan(sets: Packed, owner: Tensor) -> Tensor:
    """(B,) NaN for sets with a NaN in a token that takes part, else 0. Retrieval alone would pass NaN over."""
    tokens = sets.tokens.detach()
    nan = torch.where((owner >= 0) & tokens.isnan().any(1), torch.nan, 0.0)
    if sets.length is not None:
        return nan.view(sets.shape[0], sets.length).sum(1)
    return _sums_by_owner(sets, owner, nan)


def _sums_by_owner(sets: Packed, owner: Tensor, rows: Tensor) -> Tensor:
    """(B, ...) sums of the rows (T, ...) of each set; what belongs to none is dropped."""
    return segment_sums(rows, owner, sets.shape[0])
