"""Measures of embeddings and of retrieval: no gradients, and no N x M matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._correlations import auc, cka, spearman
from ._judgements import Hits, parse
from ._pair_recall import pair_recall, table
from ._similarity_metrics import contrast_accuracy, iso_score, similarity_histogram
from .core import autocast, checks
from .core.lists import NONE, first_of_each, ranks
from .core.ordered import in_float64, segment_rows, segment_sums, wide_dtype
from .core.unit_rows import unit_rows
from .losses.log_det import effective_rank
from .ops.similarity_topk import TopK

__all__ = [
    "auc",
    "cka",
    "contrast_accuracy",
    "effective_rank",
    "hubness",
    "iso_score",
    "isotropy",
    "pair_recall",
    "retrieval_metrics",
    "similarity_histogram",
    "spearman",
    "table",
]

GAINS = ("linear", "exponential")
TIES = ("listed", "trec_eval")
# Judgements that are ranked at once.
LIST_ELEMENTS = 1 << 20


@torch.no_grad()
def isotropy(x: Tensor, segments: Tensor | None = None, num_segments: int | None = None) -> Tensor:
    """Isotropy: 1 minus the mean cosine similarity of different rows.

    Equivalent to::

        c = F.normalize(x) @ F.normalize(x).T
        1 - c.fill_diagonal_(0).sum() / (N * (N - 1))                         # of pairs of one segment

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        segments: (N,) int64: the text of each token; only pairs of one text count. -1 for padding. None for one text.
        num_segments: how many there are, and texts are in [0, num_segments); None: any numbers, which are counted.

    Returns:
        0-d, in float32 (float64 for float64 inputs). NaN where there is no pair.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        O(N D): the sum of all inner products is the squared length of the sum of the rows. A measure without a
        gradient; `losses.uniformity` spreads rows.

    Source:
        Su and Collier, Contrastive Search Is What You Need For Neural Text Generation, 2023.

    Examples:
        >>> isotropy(torch.eye(4)), isotropy(torch.ones(4, 4))
        (tensor(1.), tensor(0.))
    """
    name = "isotropy"
    checks.check_matrix(name, "x", x)
    if segments is None:
        segments, num_segments = x.new_zeros((x.shape[0],), dtype=torch.int64), 1
    segments = checks.check_index(name, "segments", segments, x.shape[0], "x", x)
    if num_segments is None:
        there = segments != NONE
        (known,) = ranks(segments[there])
        segments = torch.full_like(segments, NONE).masked_scatter(there, known)
        num_segments = int(known.max()) + 1 if known.numel() > 0 else 0
    checks.check_index_values(name, "segments", segments, num_segments, or_none=True)
    with autocast.disabled(x):
        return _isotropy(x, segments, num_segments)


def _isotropy(x: Tensor, segments: Tensor, count: int) -> Tensor:
    """From deviations from the mean: for directions that nearly agree, 1 minus their cosine would be all rounding.

    With z rows of zeros among n rows, the others of length 1, sum_{i != j} (1 - <u_i, u_j>) is
    n sum_i |u_i - mean|^2 + (n - 1) z.
    """
    dtype = wide_dtype(x)
    step = max(1, (1 << 18) // max(x.shape[1], 1))
    chunks = [slice(begin, begin + step) for begin in range(0, x.shape[0], step)]

    def summed(rows: Callable[[slice], Tensor], width: int) -> Tensor:
        total = x.new_zeros((count, width), dtype=dtype)
        for chunk in chunks:
            total += segment_sums(rows(chunk), segments[chunk], count)
        return total

    def unit(chunk: slice) -> Tensor:
        return unit_rows(x[chunk].to(dtype))

    number = summed(lambda chunk: x.new_ones(segments[chunk].shape[0], 1, dtype=dtype), 1)
    zeros = summed(lambda chunk: (x[chunk] == 0).all(1, keepdim=True).to(dtype), 1)
    mean = summed(unit, x.shape[1]) / number.clamp_min(1)
    spread = summed(lambda chunk: (unit(chunk) - segment_rows(mean, segments[chunk])).square().sum(1, keepdim=True), 1)
    apart = (number * spread + (number - 1) * zeros).sum()
    return (apart / (number * (number - 1)).sum()).to(checks.accumulator(x.dtype))


@torch.no_grad()
def hubness(neighbours: Tensor | TopK, columns: int) -> Tensor:
    """Hubness: the skewness of how often each column is among the neighbours of a row.

    Equivalent to::

        occurrences = torch.bincount(neighbours[neighbours >= 0], minlength=columns).double()   # once in a row
        deviation = occurrences - occurrences.mean()
        deviation.pow(3).mean() / deviation.square().mean().pow(1.5)

    Args:
        neighbours: (N, k) int64 columns, -1 for none, or what `similarity_topk` returns. A column that a row lists more
            than once counts once.
        columns: M, how many columns there are.

    Returns:
        0-d float64. 0 is symmetric; large where a few hubs are near everything. NaN where all are as frequent.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Radovanovic et al., Hubs in Space: Popular Nearest Neighbors in High-Dimensional Data, 2010.

    Examples:
        >>> round(float(hubness(torch.tensor([[0], [0], [0], [1]]), columns=3)), 3)
        0.382
    """
    indices = _indices("hubness", "neighbours", neighbours)
    checks.check_index_values("hubness", "neighbours", indices, columns, or_none=True)
    occurrences = in_float64(torch.bincount(indices[first_of_each(indices)], minlength=columns))
    deviation = occurrences - occurrences.mean()
    return deviation.pow(3).mean() / deviation.square().mean().pow(1.5)


@torch.no_grad()
def retrieval_metrics(
    found: Tensor | TopK | Sequence[Any] | Mapping[Any, Any],
    relevant: tuple[Tensor, ...] | Sequence[Any] | Mapping[Any, Any],
    *,
    documents: Tensor | Mapping[Any, Any] | None = None,
    k: Sequence[int] = (1, 5, 10),
    persistence: Sequence[float] = (0.8,),
    gain: str = "linear",
    ties: str = "listed",
) -> dict[str, Tensor]:
    """Measures of a ranking: NDCG, MRR, recall, precision, hit rate, average precision, ERR and RBP of each query.

    With g_r the grade of the document at rank r, G the largest grade of all, R the number of relevant documents of the
    query, and 1 where a grade is positive::

        precision@k = sum_{r <= k} [g_r > 0] / k            recall@k = sum_{r <= k} [g_r > 0] / R
        hit@k       = whether any of the first k is relevant    mrr@k = 1 / the first rank r <= k with g_r > 0, or 0
        map@k       = sum_{r <= k} [g_r > 0] precision@r / R
        ndcg@k      = sum_{r <= k} gain(g_r) / log2(r + 1), over the same sum of the best ranking
        err@k       = sum_{r <= k} s_r / r prod_{q < r} (1 - s_q) with s_r = (2^g_r - 1) / 2^G
        rbp@p       = (1 - p) sum_r p^(r - 1) g_r / G, of all that was found

    Lists are sets. A document that was found more than once counts at its best rank, and what was found after it moves
    up; one that was judged more than once has the largest of its grades. So every measure is in [0, 1].

    Args:
        found: (N, K) int64 documents, the best first, -1 for none; what `similarity_topk` returns; an array; a list of
            documents for each query; or a dict {query: {document: score}}.
        relevant: (indptr, indices) or (indptr, indices, grades): query i's relevant documents are
            ``indices[indptr[i]:indptr[i + 1]]``, in any order. Or a list of documents, or a dict {document: grade}, for
            each query; or a matrix with -1 for none. Or a dict {query: {document: grade}}, where a query is a row of
            `found`, or one of its keys; those of queries that were not searched for are not looked at. Grades are
            finite, of any dtype, and not negative; 1 where there are none.
        documents: the document of each chunk where `found` has chunks: (M,) int64, or a dict. `relevant` names
            documents; a document is found where the first of its chunks is. See `contrastive_ops.mining.collapse`.
        k: cut-offs, at least 1. Beyond what was found nothing is relevant.
        persistence: p of rank-biased precision, in (0, 1).
        gain: "linear", the grade itself; or "exponential", 2^grade - 1.
        ties: of documents with equal scores in a dict {document: score}. "listed": the first of the dict comes first;
            or "trec_eval": the last by name, of scores that are rounded to float32, as in pytrec_eval.

    Returns:
        The measures by name ("ndcg@10", "rbp@0.8", ...), each (N,) float64, in the order of `found`. NaN for a query
        without a relevant document, which has none of them: ``value.nanmean()`` leaves it out.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Ids are any int64 but -1, and in lists and dicts also strings. Memory O(N K + the number of judgements). Equal
        to trec_eval's P, recall, success, map_cut, ndcg_cut and, where K is the cut-off, recip_rank.

    Source:
        Järvelin and Kekäläinen, Cumulated Gain-Based Evaluation of IR Techniques, 2002; Chapelle et al., Expected
        Reciprocal Rank for Graded Relevance, 2009; Moffat and Zobel, Rank-Biased Precision, 2008.

    Examples:
        >>> found = torch.tensor([[3, 1, 0], [2, 0, 1]])
        >>> measures = retrieval_metrics(found, [[1], [2]], k=(1, 3))
        >>> measures["recall@1"].tolist(), measures["mrr@3"].tolist()
        ([0.0, 1.0], [0.5, 1.0])
        >>> judged = {"q1": {"d7": 2, "d9": 1}}
        >>> float(retrieval_metrics({"q1": {"d9": 0.3, "d7": 0.8}}, judged)["ndcg@10"])
        1.0
    """
    name = "retrieval_metrics"
    checks.check_choice(name, "gain", gain, GAINS)
    checks.check_choice(name, "ties", ties, TIES)
    k = [checks.integer(name, "k", cut, 1) for cut in checks.listed(name, "k", k)]
    persistence = checks.listed(name, "persistence", persistence)
    persistence = [checks.number(name, "persistence", p, "(0, 1)") for p in persistence]
    indices, judged = parse(name, found, relevant, documents, ties)
    N = len(indices)
    rank, grades = Hits.of(indices, judged)
    number = torch.bincount(judged.query[judged.grade > 0], minlength=N)
    # Measures are ratios, and so the largest grade is taken out before a power is formed: 2^grade overflows.
    largest = judged.grade.new_zeros(N).scatter_reduce(0, judged.query, judged.grade, "amax")[:, None]
    ideal = _best_sums(judged.query, _gain(judged.grade, largest[judged.query, 0], gain), N, k)
    gained = _gain(grades, largest, gain) / (rank + 1).log2()
    measures: dict[str, Tensor] = {}
    for cut in k:
        measures |= _of_hits(rank, number, cut)
        measures[f"ndcg@{cut}"] = gained.masked_fill(rank > cut, 0.0).sum(1) / ideal[cut]
    top = judged.grade.max() if judged.grade.numel() > 0 else judged.grade.new_zeros(())
    satisfied = _gain(grades, top, "exponential")
    seen_on = torch.cat([satisfied.new_ones((N, 1)), (1 - satisfied).cumprod(1)], 1)[:, :-1]
    for cut in k:
        measures[f"err@{cut}"] = (satisfied * seen_on / rank).masked_fill(rank > cut, 0.0).sum(1)
    for p in persistence:
        share = grades / torch.where(top > 0, top, 1.0)
        measures[f"rbp@{p:g}"] = (1 - p) * (p ** (rank - 1) * share).sum(1)
    # The sum of a perfect ranking may round to just above that of the best one.
    return {key: torch.where(number > 0, value.clamp_max(1.0), torch.nan) for key, value in measures.items()}


def _indices(function: str, name: str, found: object) -> Tensor:
    indices = found.indices if isinstance(found, TopK) else found
    indices = checks.as_index(function, name, checks.from_array(function, name, indices))
    if indices.dim() != 2:
        raise ValueError(f"{function}: {name} must have two dimensions (queries, k), got {checks.shape(indices)}")
    return indices


def _of_hits(rank: Tensor, number: Tensor, cut: int) -> dict[str, Tensor]:
    """The measures that do not know grades, up to a cut-off, of the (N, H) ranks of what is relevant, ascending."""
    there = rank <= cut
    total = there.double().sum(1)
    return {
        f"precision@{cut}": total / cut,
        f"recall@{cut}": total / number,
        f"hit@{cut}": (total > 0).double(),
        f"mrr@{cut}": (1 / rank[:, :1]).masked_fill(~there[:, :1], 0.0).sum(1),
        f"map@{cut}": (_places(rank) / rank).masked_fill(~there, 0.0).sum(1) / number,
    }


def _places(lists: Tensor) -> Tensor:
    return torch.arange(1, lists.shape[1] + 1, device=lists.device, dtype=torch.float64)


def _best_sums(query: Tensor, gains: Tensor, rows: int, k: Sequence[int]) -> dict[int, Tensor]:
    """(rows,) the discounted gains of the best ranking of each query up to each cut-off; entries are by query.

    Queries go by how much was judged, some at a time, so that one long list does not make all of them as long.
    """
    counts = torch.bincount(query, minlength=rows)
    begins = counts.cumsum(0) - counts
    by_count = counts.argsort(descending=True, stable=True)
    sums = {cut: gains.new_zeros(rows) for cut in k}
    done = 0
    while sums and done < rows:
        width = int(counts[by_count[done]])
        which = by_count[done : done + max(1, LIST_ELEMENTS // max(width, 1))]
        place = torch.arange(width, device=gains.device)
        there = place < counts[which, None]
        entry = (begins[which, None] + place).masked_fill(~there, 0)
        best = gains[entry].masked_fill(~there, 0.0).sort(dim=1, descending=True).values if width else there.double()
        discounted = best / (_places(best) + 1).log2()
        for cut, total in sums.items():
            total[which] = discounted[:, :cut].sum(1)
        done += len(which)
    return sums


def _gain(grades: Tensor, largest: Tensor, gain: str) -> Tensor:
    """The gain of each grade over `largest`, or over 2^largest; in [0, 1]."""
    if gain == "linear":
        return grades / torch.where(largest > 0, largest, 1.0)
    return -torch.expm1(-math.log(2) * grades) * (grades - largest).exp2()
