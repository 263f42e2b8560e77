"""maxsim in Triton: the best tokens of a document for a block of query tokens, and gradients that gather them.

A *group* is a document, or a pair of a query and a document where pairs are given; winners are of each group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from contrastive_ops.core.weight_norm import power_below

from . import _tiles
from ._cover import Combine, pairwise_cover
from ._launch import Launch, arch_of, recording
from ._maxsim_gradients import document_gradient_kernel, query_gradient_kernel
from ._similarity_problem import dense_rows
from ._stored import distinct, shown
from ._tiles import inner_products
from ._variants import Variant

__all__ = ["backward", "forward", "variants"]

# Bytes of the best products of all query tokens, before they are summed.
BEST_BYTES = 64 << 20

_NONE: tl.constexpr = tl.constexpr((1 << 31) - 1)


@triton.jit
def set_bounds(offsets, number, size):
    """Where the tokens of a set begin and end, within the matrix whatever the offsets say."""
    begin = tl.minimum(tl.maximum(tl.load(offsets + number), 0), size)
    return begin, tl.minimum(tl.maximum(tl.load(offsets + number + 1), begin), size)


@triton.jit
def group_of(group, pair_queries, pair_documents):
    """The document of a group, and its query (0 where a group is one document for all queries)."""
    document, query = group, group * 0
    if pair_queries is not None:
        document = tl.load(pair_documents + group)
        query = tl.load(pair_queries + group)
    return document, query


# ---- Forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def better(dots, open, place):
    """Of each row of a tile the largest of the open products and its place, NaN before numbers, then the first."""
    nan = open & (dots != dots)
    any_nan = tl.max(nan.to(tl.int32), 1) > 0
    top = tl.max(tl.where(open & ~nan, dots, float("-inf")), 1)
    wins = tl.where(any_nan[:, None], nan, open & (dots == top[:, None]))
    at = tl.min(tl.where(wins, place, _NONE), 1)
    return tl.where(any_nan, float("nan"), top), at


@triton.jit(
    do_not_specialize=["first_group", "tokens", "query_tokens", "document_tokens", "query_sets", "k", "blocks"],
)
def best_kernel(
    queries, documents, query_stride, document_stride, query_offsets, document_offsets, query_mask, document_mask,
    pair_queries, pair_documents, best, winners, first_group, tokens, query_tokens, document_tokens, query_sets, D, k,
    blocks, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The k best products of a block of query tokens with the tokens of one document: their sum, and their places.

    Each pass over the document finds what comes next behind the winner of the pass before it.

    Args:
        best: (groups of this launch, tokens); 0 for tokens that take no part.
        winners: (groups, tokens, k) int32, or None.
    """
    group = first_group + (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    document, query = group_of(group, pair_queries, pair_documents)
    begin, end = set_bounds(document_offsets, document, document_tokens)
    if pair_queries is not None:
        first, last = set_bounds(query_offsets, query, query_tokens)
        row = first + place
    else:
        first, last = tl.load(query_offsets), tl.minimum(tl.load(query_offsets + query_sets), query_tokens)
        row = place.to(tl.int64)
    is_row = (row >= first) & (row < last) & (place < tokens)
    if query_mask is not None:
        is_row &= tl.load(query_mask + row, mask=is_row, other=0) != 0
    total = tl.zeros([ROWS], tl.float32)
    value, at = tl.zeros([ROWS], tl.float32), tl.full([ROWS], -1, tl.int32)
    for rank in range(k):
        next_value, next_at = tl.full([ROWS], float("-inf"), tl.float32), tl.full([ROWS], _NONE, tl.int32)
        for start in range(0, (end - begin).to(tl.int32), COLS):
            own = start + tl.arange(0, COLS)
            j = begin + own
            open = (j < end)[None, :] & is_row[:, None]
            if document_mask is not None:
                open &= (tl.load(document_mask + j, mask=j < end, other=0) != 0)[None, :]
            dots = inner_products(
                queries, documents, row, j, query_tokens, document_tokens, query_stride, document_stride, D, ROWS, COLS,
                DEPTH, PRECISION,
            )  # fmt: skip
            if rank > 0:
                nan, last_nan = dots != dots, (value != value)[:, None]
                smaller = tl.where(last_nan, ~nan, dots < value[:, None])
                equal = tl.where(last_nan, nan, dots == value[:, None])
                open &= smaller | (equal & (own[None, :] > at[:, None]))
            tile_value, tile_at = better(dots, open, own[None, :])
            larger = (tile_value > next_value) | ((tile_value != tile_value) & (next_value == next_value))
            takes = (tile_at != _NONE) & ((next_at == _NONE) | larger)
            next_value = tl.where(takes, tile_value, next_value)
            next_at = tl.where(takes, tile_at, next_at)
        # Behind the last of them nothing is found any more.
        found = next_at != _NONE
        value, at = next_value, next_at
        total = tl.where(found, total + value, tl.where(is_row & (rank == 0), float("-inf"), total))
        if winners is not None:
            to = winners + (group * tokens + place) * k + rank
            tl.store(to, tl.where(found, at, -1), mask=place < tokens)
    tl.store(best + (group - first_group) * tokens + place, total, mask=place < tokens)


@triton.jit(do_not_specialize=["first_group", "tokens", "query_tokens", "sums", "groups", "blocks"])
def sum_kernel(
    best, scores, query_offsets, pair_queries, first_group, tokens, query_tokens, sums, groups, blocks,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """Add up the best products of the tokens of each query, one after another, so that padding changes no bit.

    Args:
        sums: queries that each group has: all, or one.
        groups: all groups, which a row of `scores` has where a group is a document.
    """
    group = first_group + (tl.program_id(0) // blocks).to(tl.int64)
    number = (tl.program_id(0) % blocks) * QUERIES + tl.arange(0, QUERIES)
    is_query = number < sums
    query = number.to(tl.int64)
    if pair_queries is not None:
        query = tl.load(pair_queries + group) + query
    first = tl.load(query_offsets + query, mask=is_query, other=0)
    last = tl.load(query_offsets + query + 1, mask=is_query, other=0)
    first = tl.minimum(tl.maximum(first, 0), query_tokens)
    size = tl.maximum(tl.minimum(last, query_tokens) - first, 0)
    begin = (group - first_group) * tokens + (first * 0 if pair_queries is not None else first)
    total = tl.zeros([QUERIES], tl.float32)
    for step in range(0, tl.max(size, 0)):
        total += tl.load(best + begin + step, mask=is_query & (step < size), other=0.0)
    to = scores + (group + number if pair_queries is not None else number.to(tl.int64) * groups + group)
    tl.store(to, total, mask=is_query)


# ---- Launchers -------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    rows: int
    cols: int
    depth: int
    options: dict[str, int]


_INTERPRETED = _Tile(16, 16, 16, {"num_warps": 4, "num_stages": 1})
# Of 16 bits and of float32: forward, the gradient of queries, that of documents.
_TILES = (
    (
        _Tile(64, 64, 64, {"num_warps": 4, "num_stages": 2}),
        _Tile(16, 0, 128, {"num_warps": 4, "num_stages": 1}),
        _Tile(64, 32, 64, {"num_warps": 4, "num_stages": 1}),
    ),
    (
        _Tile(32, 32, 32, {"num_warps": 4, "num_stages": 1}),
        _Tile(16, 0, 128, {"num_warps": 4, "num_stages": 1}),
        _Tile(32, 32, 32, {"num_warps": 4, "num_stages": 1}),
    ),
)


def _tile(x: Tensor, kernel: int) -> _Tile:
    return _INTERPRETED if arch_of(x) == "interpreter" else _TILES[x.dtype == torch.float32][kernel]


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
    """Return (scores, winners): (N, M) and (M, T, k), or (P,) and (P, longest_query, k) for pairs."""
    x, y = dense_rows(queries), dense_rows(documents)
    sets, others = len(query_offsets) - 1, len(document_offsets) - 1
    all_pairs = pair_queries is None or pair_documents is None
    groups, tokens = (others, len(x)) if pair_queries is None else (len(pair_queries), longest_query)
    scores = x.new_zeros((sets, others) if all_pairs else (groups,), dtype=torch.float32)
    winners = torch.full((groups if keep else 0, tokens, k), -1, dtype=torch.int32, device=x.device)
    masks = [None if mask is None else mask.contiguous().view(torch.uint8) for mask in (query_mask, document_mask)]
    tile, precision = _tile(x, 0), _tiles.precision(arch_of(x), x.dtype)
    step = max(1, BEST_BYTES // (4 * max(tokens, 1)))
    best = x.new_empty((min(step, groups), tokens), dtype=torch.float32)
    blocks, sums = triton.cdiv(tokens, tile.rows), sets if all_pairs else 1
    for first in range(0, groups, step):
        count = min(step, groups - first)
        arguments = {
            "queries": x, "documents": y, "query_stride": x.stride(0), "document_stride": y.stride(0),
            "query_offsets": query_offsets.contiguous(), "document_offsets": document_offsets.contiguous(),
            "query_mask": masks[0], "document_mask": masks[1], "pair_queries": pair_queries,
            "pair_documents": pair_documents, "best": best, "winners": winners if keep else None, "first_group": first,
            "tokens": tokens, "query_tokens": len(x), "document_tokens": len(y), "query_sets": sets, "D": x.shape[1],
            "k": k, "blocks": blocks, "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "PRECISION": precision,
        }  # fmt: skip
        Launch(best_kernel, count * blocks, arguments, tile.options).run()
        of_sums = triton.cdiv(sums, 32)
        arguments = {
            "best": best, "scores": scores, "query_offsets": query_offsets.contiguous(), "pair_queries": pair_queries,
            "first_group": first, "tokens": tokens, "query_tokens": len(x), "sums": sums, "groups": groups,
            "blocks": of_sums, "QUERIES": 32,
        }  # fmt: skip
        Launch(sum_kernel, count * of_sums, arguments, {"num_warps": 1}).run()
    return scores, winners


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
    """Return the gradients of queries and documents in float32; the winners are constants."""
    x, y = dense_rows(queries), dense_rows(documents)
    dqueries, ddocuments = (
        t.new_zeros((len(t) if needs & bit else 0, t.shape[1]), dtype=torch.float32) for t, bit in ((x, 1), (y, 2))
    )
    groups, tokens, k = winners.shape
    if not winners.numel() or not len(x) or not len(y):
        return dqueries, ddocuments
    query_offsets, document_offsets = query_offsets.contiguous(), document_offsets.contiguous()
    common = {
        "query_offsets": query_offsets, "document_offsets": document_offsets, "owner": _owners(query_offsets, len(x)),
        "winners": winners.contiguous(), "d_scores": d_scores.float().contiguous(), "tokens": tokens,
        "query_tokens": len(x), "document_tokens": len(y), "groups": groups, "D": x.shape[1], "k": k,
    }  # fmt: skip
    if needs & 1:
        tile = _tile(x, 1)
        order, starts = _lists(pair_queries, len(query_offsets) - 1)
        blocks = triton.cdiv(len(x), tile.rows)
        arguments = {
            **common, "documents": y, "document_stride": y.stride(0), "pair_documents": pair_documents, "order": order,
            "starts": starts, "dqueries": dqueries, "blocks": blocks, "ROWS": tile.rows, "DEPTH": tile.depth,
        }  # fmt: skip
        Launch(query_gradient_kernel, blocks * triton.cdiv(x.shape[1], tile.depth), arguments, tile.options).run()
    if needs & 2:
        tile, norm = _tile(x, 2), None
        if x.dtype == torch.float16:
            norm = power_below(d_scores.abs().amax().float())
        order, starts = _lists(pair_documents, len(document_offsets) - 1)
        blocks = triton.cdiv(len(y), tile.rows)
        arguments = {
            **common, "queries": x, "query_stride": x.stride(0), "pair_queries": pair_queries, "order": order,
            "starts": starts, "norm": norm, "ddocuments": ddocuments, "blocks": blocks, "ROWS": tile.rows,
            "document_owner": _owners(document_offsets, len(y)), "document_sets": len(document_offsets) - 1,
            "COLS": tile.cols, "DEPTH": tile.depth, "PRECISION": _tiles.precision(arch_of(x), x.dtype),
        }  # fmt: skip
        Launch(document_gradient_kernel, blocks * triton.cdiv(x.shape[1], tile.depth), arguments, tile.options).run()
    return dqueries, ddocuments


def _owners(offsets: Tensor, size: int) -> Tensor:
    """The set of each token; of tokens of no set any, since they have no winners."""
    token = torch.arange(size, device=offsets.device)
    return (torch.searchsorted(offsets, token, right=True) - 1).clamp(0, max(len(offsets) - 2, 0))


def _lists(sides: Tensor | None, size: int) -> tuple[Tensor | None, Tensor | None]:
    """Numbers of pairs by one of their sides, and where those of each begin."""
    if sides is None:
        return None, None
    values, order = sides.sort(stable=True)
    return order, torch.searchsorted(values, torch.arange(size + 1, device=sides.device))


# ---- What is compiled ahead of time ----------------------------------------------------------------------------------


def variants(arch: str, combine: Combine = pairwise_cover) -> Iterator[Variant]:
    """Every two options that users can reach together in some variant."""
    choices: dict[str, Sequence[Any]] = {
        "dtype": (torch.bfloat16, torch.float16, torch.float32),
        "pairs": (False, True),
        "masks": (False, True),
        "keep": (True, False),
    }
    for row in combine(choices):
        x, y = (torch.zeros(size, 96, dtype=row["dtype"]) for size in (48, 80))
        offsets = torch.tensor([0, 20, 48]), torch.tensor([0, 30, 60, 80])
        pairs = [torch.zeros(5, dtype=torch.int64) for _ in range(2)] if row["pairs"] else (None, None)
        masks = [torch.ones(size, dtype=torch.bool) for size in (48, 80)] if row["masks"] else (None, None)
        with recording(arch) as recorded:
            scores, winners = forward(x, y, *offsets, *masks, *pairs, 28, 2, row["keep"])
            if row["keep"]:
                backward(x, y, *offsets, *pairs, winners, scores, 3)
        about = " ".join(f"{name}={shown(value)}" for name, value in row.items())
        yield from distinct(recorded.variants(f"maxsim {about}"))
