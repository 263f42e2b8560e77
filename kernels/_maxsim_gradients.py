"""Gradients of maxsim: rows gather what won for them, or for what they were best."""

from __future__ import annotations

import triton
import triton.language as tl

from ._folds import exact_sum, with_lost
from ._tiles import product


@triton.jit(do_not_specialize=["tokens", "query_tokens", "document_tokens", "groups", "k", "blocks"])
def query_gradient_kernel(
    documents, document_stride, query_offsets, document_offsets, owner, pair_documents, order, starts, winners,
    d_scores, dqueries, tokens, query_tokens, document_tokens, groups, D, k, blocks, ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of query tokens: the sum of the document tokens that were best for them.

    Args:
        owner: (query tokens,) the query of each.
        order: numbers of pairs by their queries, and `starts` where those of each query begin; None without pairs.
    """
    row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    depth = (tl.program_id(0) // blocks) * DEPTH + tl.arange(0, DEPTH)
    is_row = row < query_tokens
    query = tl.load(owner + row, mask=is_row, other=0)
    place = row
    if order is not None:
        place = row - tl.load(query_offsets + query, mask=is_row, other=0)
        at = tl.load(starts + query, mask=is_row, other=0)
        end = tl.load(starts + query + 1, mask=is_row, other=0)
        is_row &= (place >= 0) & (place < tokens)
    else:
        at = row * 0
        end = at + groups
    total, lost = tl.zeros([ROWS, DEPTH], tl.float32), tl.zeros([ROWS, DEPTH], tl.float32)
    is_depth = (depth < D)[None, :]
    while tl.max((is_row & (at < end)).to(tl.int32), 0) > 0:
        active = is_row & (at < end)
        group = at
        if order is not None:
            group = tl.load(order + at, mask=active, other=0)
            document = tl.load(pair_documents + group, mask=active, other=0)
            upstream = tl.load(d_scores + group, mask=active, other=0.0)
        else:
            document = group
            upstream = tl.load(d_scores + query * groups + group, mask=active, other=0.0)
        begin = tl.load(document_offsets + document, mask=active, other=0)
        for rank in range(k):
            winner = tl.load(winners + (group * tokens + place) * k + rank, mask=active, other=-1)
            column = begin + winner
            held = (winner >= 0) & (column >= 0) & (column < document_tokens)
            from_at = documents + column[:, None] * document_stride + depth[None, :]
            best = tl.load(from_at, mask=held[:, None] & is_depth, other=0.0).to(tl.float32)
            more = tl.where(held[:, None], upstream[:, None] * best, 0.0)
            total, lost = exact_sum(total, more, lost)
        at += 1
    to = dqueries + row[:, None] * D + depth[None, :]
    tl.store(to, with_lost(total, lost), mask=(row < query_tokens)[:, None] & is_depth)


@triton.jit
def rounded_product(weight, rows, total, norm, PRECISION: tl.constexpr):
    """total + weight rows; in 16 bits the weights are sums of two, so that nothing is lost that counts."""
    if norm is not None:
        weight *= tl.load(norm)
    first = weight.to(rows.dtype)
    total = product(first, rows, total, PRECISION)
    if rows.dtype != tl.float32:
        total = product((weight - first.to(tl.float32)).to(rows.dtype), rows, total, PRECISION)
    return total


@triton.jit(
    do_not_specialize=["tokens", "query_tokens", "document_tokens", "document_sets", "groups", "k", "blocks"],
)
def document_gradient_kernel(
    queries, query_stride, query_offsets, document_offsets, owner, document_owner, pair_queries, order, starts, winners,
    d_scores, norm, ddocuments, tokens, query_tokens, document_tokens, document_sets, groups, D, k, blocks,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of document tokens: the sum of the query tokens for which they were best.

    Args:
        document_owner: (document tokens,) the document of each.
        order: numbers of pairs by their documents, and `starts` where those of each document begin.
    """
    first_row = (tl.program_id(0) % blocks).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    depth = (tl.program_id(0) // blocks) * DEPTH + tl.arange(0, DEPTH)
    is_depth = (depth < D)[None, :]
    last_row = tl.minimum(first_row + ROWS, document_tokens) - 1
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    column = tl.arange(0, COLS)
    for document in range(tl.load(document_owner + first_row), tl.load(document_owner + last_row) + 1):
        begin = tl.load(document_offsets + document)
        entry, end = document * 0, document * 0 + 1
        if order is not None:
            entry = tl.load(starts + document)
            end = tl.load(starts + document + 1)
        for number in range(entry, end):
            group, base = document, begin * 0
            if order is not None:
                group = tl.load(order + number)
                base = tl.load(query_offsets + tl.load(pair_queries + group))
            for start in range(0, tokens, COLS):
                place = start + column
                token = base + place
                is_token = (place < tokens) & (token < query_tokens)
                if order is not None:
                    upstream = tl.load(d_scores + group + column * 0, mask=is_token, other=0.0)
                else:
                    query = tl.load(owner + token, mask=is_token, other=0)
                    upstream = tl.load(d_scores + query * groups + group, mask=is_token, other=0.0)
                hit = tl.zeros([ROWS, COLS], tl.int1)
                wins = tl.zeros([COLS], tl.int1)
                for rank in range(k):
                    winner = tl.load(winners + (group * tokens + place) * k + rank, mask=is_token, other=-1)
                    hit |= (winner >= 0)[None, :] & ((begin + winner)[None, :] == row[:, None])
                    wins |= winner >= 0
                weight = tl.where(hit, upstream[None, :], 0.0)
                # Rows without a winner may hold anything.
                at_token = queries + token[:, None] * query_stride + depth[None, :]
                rows = tl.load(at_token, mask=(is_token & wins)[:, None] & is_depth, other=0.0)
                wide = rows.to(tl.float32)
                finite = tl.abs(wide) < float("inf")
                total = rounded_product(weight, tl.where(finite, wide, 0.0).to(rows.dtype), total, norm, PRECISION)
                # What is no number reaches those that it was best for, and no others.
                strange = tl.max((~finite).to(tl.int32), 1) > 0
                next = tl.min(tl.where(strange, column, COLS), 0)
                while next < COLS:
                    is_next = column == next
                    own = tl.sum(tl.where(is_next[:, None], wide, 0.0), 0)
                    own_weight = tl.sum(tl.where(is_next[None, :], weight, 0.0), 1)
                    own_hit = tl.max((hit & is_next[None, :]).to(tl.int32), 1) > 0
                    is_number = tl.abs(own) < float("inf")
                    more = own_weight[:, None] * own[None, :]
                    total += tl.where(own_hit[:, None] & ~is_number[None, :], more, 0.0)
                    strange &= ~is_next
                    next = tl.min(tl.where(strange, column, COLS), 0)
    if norm is not None:
        total *= 1.0 / tl.load(norm)
    to = ddocuments + row[:, None] * D + depth[None, :]
    tl.store(to, total, mask=(row < document_tokens)[:, None] & is_depth)
