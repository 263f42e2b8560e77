"""Who finds the k best columns of every row: this package, plain torch, faiss, usearch, hnswlib and scikit-learn.

A step is one search. What a user does once for a corpus is done when built: an index, a corpus rounded for a first
pass. Others get as many threads as torch has, and search exactly: their graphs find other lists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.providers import insist_on
from benchmarks.registry import OURS, Inputs, Lists, Provider, Step

BF16, INT8 = (f"{OURS} {dtype} + certificate" for dtype in ("bf16", "int8"))
TORCH = "torch mm + topk"
FAISS = "faiss IndexFlatIP"
FAISS_BLAS = "faiss IndexFlatIP always BLAS"
USEARCH = "usearch exact"
HNSWLIB = "hnswlib BFIndex"
SCIKIT = "scikit-learn brute force"
OVER_FETCH = "faiss over-fetch of 10 k"
SELECTOR = "faiss shared selector without margin"
READ = "read bandwidth"

CHUNK_ROWS = 256
# Queries whose lists are looked at when the selector is built, since its step is not checked.
SELECTOR_CHECKED = 32


def _problem(inputs: Inputs) -> tuple[Tensor, Tensor, int]:
    return inputs.tensors["query"], inputs.tensors["corpus"], int(inputs.constants["k"])


# ---------------------------------------------------------------------------------------------
# This package


def ours(name: str = OURS, *, coarse: torch.dtype | None = None, backend: str | None = None) -> Provider:
    """``contrastive_ops.similarity_topk`` with the rules of the case, if it has any.

    ``coarse``: a first pass in this dtype, over a corpus that is rounded when built. Its lists must
    have exactly the columns of those in full precision.
    """

    def build(inputs: Inputs) -> Step:
        from contrastive_ops import Pairs, similarity_topk
        from contrastive_ops.ops import Coarse

        query, corpus, k = _problem(inputs)
        chosen = insist_on(backend, "similarity_topk", query)
        pairs = None
        if inputs.frozen:
            excluded, bound = inputs.frozen["excluded"], inputs.frozen["bound"]
            indptr = excluded.shape[1] * torch.arange(len(query) + 1, device=query.device)
            pairs = Pairs(exclude=(indptr, excluded.reshape(-1)), below=bound)
        first = Coarse.of(corpus, coarse) if coarse is not None else None
        same_as = None
        if first is not None:
            full = similarity_topk(query, corpus, k, pairs=pairs)
            same_as = Lists(full.values, full.indices)

        def step() -> Lists:
            found = similarity_topk(query, corpus, k, pairs=pairs, coarse=first, **chosen)
            return Lists(found.values, found.indices, same_as)

        return step

    return Provider(name, build, kind="ours", package="contrastive_ops")


# ---------------------------------------------------------------------------------------------
# Plain torch


def mm_topk(rows: int = CHUNK_ROWS) -> Provider:
    """``torch.topk`` of the scores of some queries at a time, with the rules of the case as -inf."""

    def build(inputs: Inputs) -> Step:
        query, corpus, k = _problem(inputs)

        def step() -> Lists:
            buffer = query.new_empty(min(rows, len(query)), len(corpus))
            parts = []
            for first in range(0, len(query), rows):
                part = slice(first, first + rows)
                scores = torch.mm(query[part], corpus.T, out=buffer[: len(query[part])])
                if inputs.frozen:
                    scores.scatter_(1, inputs.frozen["excluded"][part], -torch.inf)
                    scores.masked_fill_(scores > inputs.frozen["bound"][part, None], -torch.inf)
                parts.append(scores.topk(k))
            values, indices = (torch.cat(each) for each in zip(*parts, strict=True))
            return Lists(values, indices.masked_fill_(values == -torch.inf, -1))

        return step

    return Provider(TORCH, build, kind="torch")


# ---------------------------------------------------------------------------------------------
# faiss


def _faiss_index(inputs: Inputs) -> tuple[Any, Any]:
    """The package and an exact index of the corpus."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    corpus = inputs.tensors["corpus"]
    index = faiss.IndexFlatIP(corpus.shape[1])
    index.add(corpus.numpy())
    return faiss, index


def faiss_flat(*, always_blas: bool = False) -> Provider:
    """faiss' exact index for inner products.

    Below N D = 128,000 it takes one product after the other; ``always_blas`` lowers that threshold,
    which is a global setting that few of its users know.
    """

    def build(inputs: Inputs) -> Step:
        faiss, index = _faiss_index(inputs)
        query, _, k = _problem(inputs)
        default = faiss.cvar.distance_compute_blas_threshold

        def step() -> Lists:
            if always_blas:
                faiss.cvar.distance_compute_blas_threshold = 0
            try:
                values, indices = index.search(query.numpy(), k)
            finally:
                faiss.cvar.distance_compute_blas_threshold = default
            return Lists(torch.from_numpy(values), torch.from_numpy(indices))

        return step

    return Provider(FAISS_BLAS if always_blas else FAISS, build, package="faiss-cpu")


def faiss_over_fetch() -> Provider:
    """A search for 10 k columns, of which the first k that the rules leave are kept.

    It is what faiss recommends for filters by query. Rows of which the rules drop more than 9 k starve.
    """

    def build(inputs: Inputs) -> Step:
        _, index = _faiss_index(inputs)
        query, corpus, k = _problem(inputs)
        excluded, bound = inputs.frozen["excluded"], inputs.frozen["bound"]

        def step() -> Lists:
            values, indices = index.search(query.numpy(), min(10 * k, len(corpus)))
            return first_that_stay(torch.from_numpy(values), torch.from_numpy(indices), excluded, bound, k)

        return step

    return Provider(OVER_FETCH, build, package="faiss-cpu", starves=True)


def first_that_stay(values: Tensor, indices: Tensor, excluded: Tensor, bound: Tensor, k: int) -> Lists:
    """The first k columns of each row that are not excluded and not above the bound of the row."""
    keep = values <= bound[:, None]
    for column in excluded.unbind(1):  # eight comparisons of matrices are cheaper than one with a third dimension
        keep &= indices != column[:, None]
    place = keep.cumsum(1)
    row, at = (keep & (place <= k)).nonzero(as_tuple=True)
    into = row, place[row, at] - 1
    lists = Lists(values.new_full((len(values), k), -torch.inf), indices.new_full((len(values), k), -1))
    lists.values[into], lists.indices[into] = values[row, at], indices[row, at]
    return lists


def faiss_selector() -> Provider:
    """One search of all queries with one selector, which drops what any query excludes.

    faiss takes one selector a call and none that sees scores, so it cannot do the case: this is not
    checked. The choices favour faiss: a call for each query with its own list takes longer, a bitmap is
    faster than its selectors of lists, and the merged lists spare it the products with up to a sixth of
    the corpus.
    """

    def build(inputs: Inputs) -> Step:
        faiss, index = _faiss_index(inputs)
        query, corpus, k = _problem(inputs)
        allowed = torch.ones(-(-len(corpus) // 8) * 8, dtype=torch.uint8)
        allowed[inputs.frozen["excluded"].reshape(-1)] = 0
        # The index keeps no reference to the bits, so this function does.
        bits = (allowed.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8).numpy()
        params = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))

        def search(rows: Tensor) -> Tensor:
            return torch.from_numpy(index.search(rows.numpy(), k, params=params)[1])

        if not allowed[search(query[:SELECTOR_CHECKED])].all():
            raise RuntimeError("faiss returned columns that its selector drops")

        def step() -> None:
            search(query)

        return step

    return Provider(SELECTOR, build, package="faiss-cpu")


# ---------------------------------------------------------------------------------------------
# Others that search exactly


def usearch_exact() -> Provider:
    """usearch's search of a matrix without an index."""

    def build(inputs: Inputs) -> Step:
        from usearch.index import MetricKind, search

        query, corpus, k = _problem(inputs)
        threads = torch.get_num_threads()

        def step() -> Lists:
            found = search(corpus.numpy(), query.numpy(), k, MetricKind.IP, exact=True, threads=threads)
            return _of_distances(found.distances, found.keys)

        return step

    return Provider(USEARCH, build, package="usearch")


def hnswlib_brute_force() -> Provider:
    """hnswlib's index without a graph, for inner products."""

    def build(inputs: Inputs) -> Step:
        import hnswlib

        query, corpus, k = _problem(inputs)
        index = hnswlib.BFIndex(space="ip", dim=corpus.shape[1])
        index.init_index(max_elements=len(corpus))
        index.add_items(corpus.numpy())
        index.set_num_threads(torch.get_num_threads())

        def step() -> Lists:
            columns, distances = index.knn_query(query.numpy(), k)
            return _of_distances(distances, columns)

        return step

    return Provider(HNSWLIB, build, package="hnswlib")


def _of_distances(distances: Any, columns: Any) -> Lists:
    """The lists of a package that calls 1 - x y a distance."""
    return Lists(1 - torch.from_numpy(distances), torch.from_numpy(columns.astype("int64")))


def scikit_brute_force() -> Provider:
    """scikit-learn's NearestNeighbors without a tree. Of unit rows the nearest are those with the largest product."""

    def build(inputs: Inputs) -> Step:
        from sklearn.neighbors import NearestNeighbors

        query, corpus, k = _problem(inputs)
        index = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="euclidean", n_jobs=torch.get_num_threads())
        index.fit(corpus.numpy())

        def step() -> Lists:
            distances, columns = index.kneighbors(query.numpy())
            return Lists(1 - torch.from_numpy(distances) ** 2 / 2, torch.from_numpy(columns))

        return step

    return Provider(SCIKIT, build, package="scikit-learn")


# ---------------------------------------------------------------------------------------------
# The machine


def read_corpus() -> Provider:
    """Reading the corpus once with all threads: by the fastest of three operations, which is found out when built."""

    def build(inputs: Inputs) -> Step:
        query, corpus, _ = _problem(inputs)
        numbers, product = corpus.view(-1), corpus.new_empty(len(corpus))
        ways: dict[str, Callable[[], Tensor]] = {
            "sum": numbers.sum,
            "amax": numbers.amax,
            "mv": lambda: torch.mv(corpus, query[0], out=product),
        }
        timings = measure.interleave(ways, rounds=3, device=corpus.device.type)
        fastest = ways[min(ways, key=lambda name: timings[name].minimum)]

        def step() -> None:
            fastest()

        return step

    return Provider(READ, build, kind="read")
