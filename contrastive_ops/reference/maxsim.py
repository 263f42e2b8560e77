"""maxsim in plain PyTorch: any device, any floating dtype, memory bounded by chunks of documents or pairs.

Every function takes what the operator of the same name in ops/maxsim.py takes. `backward` is made of
differentiable operations, so that it also defines the second derivative of every backend. Reads the offsets, so on a
GPU every call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.checks import accumulator
from ..core.numerics import CHUNK_ELEMENTS, chunks_of_rows
from ..core.ordered import add_segments
from ..core.recompute import recomputed

# ---- Forward -------------------------------------------------------------------------------------------------------


@dataclass
class _Table:
    """The tokens of each set that take part, in order, padded to the largest number of them."""

    token: Tensor  # (sets, L) rows of the matrix of tokens; 0 for padding
    place: Tensor  # (sets, L) places within the set
    valid: Tensor  # (sets, L)

    @classmethod
    def of(cls, offsets: Tensor, mask: Tensor | None) -> _Table:
        sets, begin = offsets.shape[0] - 1, offsets[:-1]
        owner = torch.arange(sets, device=offsets.device).repeat_interleave(offsets.diff())
        token = torch.arange(int(offsets[0]), int(offsets[-1]), device=offsets.device)
        if mask is not None:
            owner, token = owner[mask[token]], token[mask[token]]
        count = owner.bincount(minlength=sets)
        rank = torch.arange(len(owner), device=offsets.device) - (count.cumsum(0) - count)[owner]
        length = int(count.max()) if sets > 0 else 0
        table = offsets.new_zeros((sets, length))
        table[owner, rank] = token
        valid = torch.arange(length, device=offsets.device) < count[:, None]
        return cls(table, (table - begin[:, None]).masked_fill(~valid, -1), valid)

    def __getitem__(self, part: slice | Tensor) -> _Table:
        return _Table(self.token[part], self.place[part], self.valid[part])

    @property
    def size(self) -> int:
        return self.token.shape[1]


def forward(
    queries: Tensor,
    documents: Tensor,
    query_offsets: Tensor,
    document_offsets: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    pair_queries: Tensor | None,
    pair_documents: Tensor | None,
    longest_query: int,
    k: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return (scores, winners): (N, M) and (M, T, k), or (P,) and (P, longest_query, k) for pairs.

    `winners` are places of tokens within their documents, -1 where there are fewer than k; without `keep` it is empty.
    """
    q, d = _Table.of(query_offsets, query_mask), _Table.of(document_offsets, document_mask)
    dtype = accumulator(queries.dtype)
    cost = max(q.size * d.size, 1)

    def rows(of: Tensor, table: _Table) -> Tensor:
        return of[table.token].to(dtype)

    if pair_queries is not None and pair_documents is not None:
        pairs = pair_queries.shape[0]
        scores = queries.new_zeros((pairs,), dtype=dtype)
        winners = _no_winners(queries, pairs if keep else 0, longest_query, k)
        for part in chunks_of_rows(pairs, max(1, CHUNK_ELEMENTS // cost)):
            left, right = q[pair_queries[part]], d[pair_documents[part]]
            x, y = rows(queries, left), rows(documents, right).transpose(1, 2)
            values, places = _best_of_tokens(
                lambda some, x=x, y=y: x[:, some] @ y,  # type: ignore[misc]
                left.size,
                x.shape[0] * right.size,
                right.valid[:, None],
                right.place[:, None],
                k,
            )
            scores[part] = torch.where(left.valid, values, 0.0).sum(1)
            if keep:
                of, token = left.valid.nonzero(as_tuple=True)
                winners[part.start + of, left.place[of, token]] = places[of, token]
        return scores, winners

    count = len(document_offsets) - 1
    scores = queries.new_zeros((len(query_offsets) - 1, count), dtype=dtype)
    winners = _no_winners(queries, count if keep else 0, queries.shape[0], k)
    at_once = max(1, CHUNK_ELEMENTS // cost)
    for of_queries in chunks_of_rows(len(q.token), at_once):
        left = q[of_queries]
        step = max(1, at_once // max(len(left.token), 1))
        for of_documents in chunks_of_rows(count, step):
            right = d[of_documents]
            x, y = rows(queries, left), rows(documents, right).flatten(0, 1).T

            def dots(some: slice, x: Tensor = x, y: Tensor = y, shape: torch.Size = right.token.shape) -> Tensor:
                of_some = x[:, some]
                return (of_some.flatten(0, 1) @ y).view(*of_some.shape[:2], *shape).permute(2, 0, 1, 3)

            values, places = _best_of_tokens(
                dots,
                left.size,
                left.token.shape[0] * right.token.numel(),
                right.valid[:, None, None],
                right.place[:, None, None],
                k,
            )
            scores[of_queries, of_documents] = torch.where(left.valid, values, 0.0).sum(2).T
            if keep:
                winners[of_documents, left.token[left.valid]] = places[:, left.valid]
    return scores, winners


def _no_winners(like: Tensor, groups: int, tokens: int, k: int) -> Tensor:
    return torch.full((groups, tokens, k), -1, dtype=torch.int32, device=like.device)


def _best_of_tokens(
    dots: Callable[[slice], Tensor], tokens: int, cost: int, valid: Tensor, place: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """`_best` of all query tokens, some at a time where a query and a document are both long; `cost` is of a token."""
    step = max(1, CHUNK_ELEMENTS // max(cost, 1))
    if tokens <= step:
        return _best(dots(slice(0, tokens)), valid, place, k)
    parts = [_best(dots(some), valid, place, k) for some in chunks_of_rows(tokens, step)]
    return torch.cat([values for values, _ in parts], -1), torch.cat([places for _, places in parts], -2)


def _best(dots: Tensor, valid: Tensor, place: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The sum of the k largest over the last dimension, -inf where nothing is valid, and their places.

    Padding comes last, so a stable order finds it after every token, even one with a product of -inf.
    """
    size = dots.shape[-1]
    if size == 0:
        return dots.new_full(dots.shape[:-1], -torch.inf), place.new_full((*dots.shape[:-1], k), -1).int()
    shown = dots.masked_fill(~valid, -torch.inf)
    if k == 1:
        values, at = shown.max(dim=-1, keepdim=True)
    else:
        values, at = (each[..., :k] for each in shown.sort(dim=-1, descending=True, stable=True))
    held = valid.expand_as(shown).gather(-1, at)
    places = torch.where(held, place.expand_as(shown).gather(-1, at), -1)
    total = torch.where(held, values, 0.0).sum(-1)
    return torch.where(held[..., 0], total, -torch.inf), pad(places, (0, max(k - size, 0)), value=-1).int()


# ---- Gradients -----------------------------------------------------------------------------------------------------

# Returns for a slice of the first dimension of the winners: the rows of queries and the upstream gradients of its
# tokens, both (slice, tokens), and where the documents begin.
_Entries = Callable[[slice], tuple[Tensor, Tensor, Tensor]]


def backward(
    queries: Tensor,
    documents: Tensor,
    query_offsets: Tensor,
    document_offsets: Tensor,
    pair_queries: Tensor | None,
    pair_documents: Tensor | None,
    winners: Tensor,
    d_scores: Tensor,
    needs: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries and documents in the accumulation dtype; the winners are constants."""
    dtype = accumulator(queries.dtype)
    left, right = queries.to(dtype), documents.to(dtype)
    dqueries, ddocuments = torch.zeros_like(left), torch.zeros_like(right)
    if pair_queries is None or pair_documents is None:
        entries = _entries_of_all(queries, query_offsets, document_offsets, d_scores)
    else:
        entries = _entries_of_pairs(
            queries, query_offsets, document_offsets, pair_queries, pair_documents, winners, d_scores
        )

    def one_chunk(part: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row, upstream, begin = entries(part)
        listed = winners[part] >= 0
        column = torch.where(listed, begin[:, None, None] + winners[part], 0)
        weight = torch.where(listed, upstream[:, :, None], 0.0)[..., None]
        # Where there is no winner, the rows are those of tokens that may hold anything.
        of_queries = torch.where(listed[..., None], weight * right[column], 0.0).sum(2)
        of_documents = torch.where(listed[..., None], weight * left[row][:, :, None], 0.0)
        return row.flatten(), of_queries.flatten(0, 1), column.flatten(), of_documents.flatten(0, 2)

    run = recomputed(one_chunk)
    for part in _chunks(winners, queries, documents) if d_scores.numel() > 0 else ():  # tokens may be of no query
        row, of_queries, column, of_documents = run(part)
        add_segments(dqueries, of_queries, row)
        add_segments(ddocuments, of_documents, column)
    return dqueries if needs & 1 else dqueries[:0], ddocuments if needs & 2 else ddocuments[:0]


def _chunks(winners: Tensor, queries: Tensor, documents: Tensor) -> Iterator[slice]:
    groups, tokens, k = winners.shape
    if groups * tokens * k == 0 or not len(queries) or not len(documents):
        return iter(())
    return chunks_of_rows(groups, max(1, CHUNK_ELEMENTS // (tokens * k * max(queries.shape[1], 1))))


def _entries_of_all(queries: Tensor, query_offsets: Tensor, document_offsets: Tensor, d_scores: Tensor) -> _Entries:
    row = torch.arange(queries.shape[0], device=queries.device)
    # Tokens of no query have no winners: whose gradient they meet does not matter.
    owner = (torch.searchsorted(query_offsets, row, right=True) - 1).clamp(0, max(len(query_offsets) - 2, 0))

    def entries(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        upstream = d_scores[:, part].T[:, owner]
        return row.expand(upstream.shape), upstream, document_offsets[:-1][part]

    return entries


def _entries_of_pairs(
    queries: Tensor,
    query_offsets: Tensor,
    document_offsets: Tensor,
    pair_queries: Tensor,
    pair_documents: Tensor,
    winners: Tensor,
    d_scores: Tensor,
) -> _Entries:
    place = torch.arange(winners.shape[1], device=queries.device)

    def entries(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        row = (query_offsets[pair_queries[part], None] + place).clamp_max(queries.shape[0] - 1)
        return row, d_scores[part, None].expand(row.shape), document_offsets[pair_documents[part]]

    return entries
