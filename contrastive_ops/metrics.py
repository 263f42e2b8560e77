"""Measures of embeddings and of retrieval: no gradients, and no N x M matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _autocast, _checks
from ._unit_rows import unit_rows
from .losses.decorrelation import effective_rank
from .ops.similarity_topk import TopK

__all__ = ["effective_rank", "hubness", "isotropy", "retrieval_metrics"]

GAINS = ("linear", "exponential")


@torch.no_grad()
def isotropy(x: Tensor, segments: Tensor | None = None, num_segments: int | None = None) -> Tensor:
    """Isotropy: 1 minus the mean cosine similarity of different rows.

    Equivalent to::

        c = F.normalize(x) @ F.normalize(x).T
        1 - c.fill_diagonal_(0).sum() / (N * (N - 1))                         # of pairs of one segment

    Args:
        x: (N, D) float32, bfloat16, float16 or float64.
        segments: (N,) int64: the text of each token; only pairs of one text count. -1 for padding. None for one text.
        num_segments: how many there are, without which the largest is read.

    Returns:
        0-d, in float32 (float64 for float64 inputs). NaN where there is no pair.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        O(N D): the sum of all inner products is the squared length of the sum of the rows.

    Source:
        Su and Collier, Contrastive Search Is What You Need For Neural Text Generation, 2023.

    Example:
        >>> isotropy(torch.eye(4)), isotropy(torch.ones(4, 4))
        (tensor(1.), tensor(0.))
    """
    name = "isotropy"
    _checks.check_matrix(name, "x", x)
    if segments is None:
        segments, num_segments = x.new_zeros((x.shape[0],), dtype=torch.int64), 1
    _checks.check_index(name, "segments", segments, x.shape[0], "x", x)
    if num_segments is None:
        num_segments = int(segments.max()) + 1 if segments.numel() else 0
    _checks.check_index_values(name, "segments", segments, num_segments, or_none=True)
    with _autocast.disabled(x):
        rows = unit_rows(x.to(_checks.accumulator(x.dtype)))
        # The last place is that of padding.
        place = torch.where(segments < 0, num_segments, segments)
        sums = rows.new_zeros((num_segments + 1, x.shape[1])).index_add_(0, place, rows)[:-1]
        own = rows.new_zeros((num_segments + 1,)).index_add_(0, place, rows.square().sum(1))[:-1]
        lengths = torch.bincount(place, minlength=num_segments + 1)[:-1].to(rows.dtype)
        return 1 - (sums.square().sum(1) - own).sum() / (lengths * (lengths - 1)).sum()


@torch.no_grad()
def hubness(neighbours: Tensor | TopK, columns: int) -> Tensor:
    """Hubness: the skewness of how often each column is among the neighbours of a row.

    Equivalent to::

        occurrences = torch.bincount(neighbours[neighbours >= 0], minlength=columns).double()
        deviation = occurrences - occurrences.mean()
        deviation.pow(3).mean() / deviation.square().mean().pow(1.5)

    Args:
        neighbours: (N, k) int64 columns, -1 for none, or what `similarity_topk` returns.
        columns: M, how many columns there are.

    Returns:
        0-d float64. 0 is symmetric; large where a few hubs are near everything. NaN where all are as frequent.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Radovanovic et al., Hubs in Space: Popular Nearest Neighbors in High-Dimensional Data, 2010.

    Example:
        >>> round(float(hubness(torch.tensor([[0], [0], [0], [1]]), columns=3)), 3)
        0.382
    """
    indices = _indices("hubness", "neighbours", neighbours)
    _checks.check_index_values("hubness", "neighbours", indices, columns, or_none=True)
    occurrences = torch.bincount(indices[indices >= 0], minlength=columns).double()
    deviation = occurrences - occurrences.mean()
    return deviation.pow(3).mean() / deviation.square().mean().pow(1.5)


@torch.no_grad()
def retrieval_metrics(
    found: Tensor | TopK,
    relevant: tuple[Tensor, ...],
    *,
    k: Sequence[int] = (1, 5, 10),
    persistence: Sequence[float] = (0.8,),
    gain: str = "linear",
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

    Args:
        found: (N, K) int64 documents, the best first, -1 for none; or what `similarity_topk` returns.
        relevant: (indptr, indices) or (indptr, indices, grades): query i's relevant documents are
            ``indices[indptr[i]:indptr[i + 1]]``, in any order, with grades >= 0, or 1.
        k: cut-offs, from 1 to K.
        persistence: p of rank-biased precision, in (0, 1).
        gain: "linear", the grade itself; or "exponential", 2^grade - 1.

    Returns:
        The measures by name ("ndcg@10", "rbp@0.8", ...), each (N,) float64. NaN for a query without a relevant
        document, which has none of them: ``value.nanmean()`` leaves it out.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Note:
        Memory O(N K + the number of relevant documents).

    Source:
        Järvelin and Kekäläinen, Cumulated Gain-Based Evaluation of IR Techniques, 2002; Chapelle et al., Expected
        Reciprocal Rank for Graded Relevance, 2009; Moffat and Zobel, Rank-Biased Precision, 2008.

    Example:
        >>> found = torch.tensor([[3, 1, 0], [2, 0, 1]])
        >>> relevant = torch.tensor([0, 1, 2]), torch.tensor([1, 2])           # of query 0: 1, of query 1: 2
        >>> measures = retrieval_metrics(found, relevant, k=(1, 3))
        >>> measures["recall@1"].tolist(), measures["mrr@3"].tolist()
        ([0.0, 1.0], [0.5, 1.0])
    """
    name = "retrieval_metrics"
    _checks.check_choice(name, "gain", gain, GAINS)
    indices = _indices(name, "found", found)
    N, K = indices.shape
    for cut in k:
        if not 1 <= cut <= K:
            raise ValueError(f"{name}: k must be in [1, {K}], got {cut}")
    for p in persistence:
        if not 0 < p < 1:
            raise ValueError(f"{name}: persistence must be in (0, 1), got {p}")
    query, document, grade = _relevant(name, relevant, indices)
    grades = _grades(indices, query, document, grade)
    hit = (grades > 0).double()
    rank = torch.arange(1, K + 1, device=indices.device, dtype=torch.float64)
    number = torch.bincount(query[grade > 0], minlength=N).double()
    gains = _gain(grades, gain)
    best = _gain(_best_grades(query, grade, N, max(k, default=0)), gain)
    top = float(grade.max()) if grade.numel() else 0.0
    satisfied = (grades.exp2() - 1) / 2.0**top
    seen_on = torch.cat([satisfied.new_ones((N, 1)), (1 - satisfied).cumprod(1)[:, :-1]], 1)
    measures = {}
    for cut in k:
        first = hit[:, :cut]
        total = first.sum(1)
        precision = first.cumsum(1) / rank[:cut]
        discount = (rank[:cut] + 1).log2()
        measures[f"precision@{cut}"] = total / cut
        measures[f"recall@{cut}"] = total / number
        measures[f"hit@{cut}"] = (total > 0).double()
        measures[f"mrr@{cut}"] = (first / rank[:cut]).amax(1)
        measures[f"map@{cut}"] = (first * precision).sum(1) / number
        measures[f"ndcg@{cut}"] = (gains[:, :cut] / discount).sum(1) / (best[:, :cut] / discount).sum(1)
        measures[f"err@{cut}"] = (satisfied * seen_on / rank)[:, :cut].sum(1)
    for p in persistence:
        measures[f"rbp@{p:g}"] = (1 - p) * (p ** (rank - 1) * grades).sum(1) / top if top else hit.sum(1)
    return {key: torch.where(number > 0, value, torch.nan) for key, value in measures.items()}


def _indices(function: str, name: str, found: Tensor | TopK) -> Tensor:
    indices = found.indices if isinstance(found, TopK) else found
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64:
        kind = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"{function}: {name} must be an int64 tensor or a TopK, got {kind}")
    if indices.dim() != 2:
        raise ValueError(f"{function}: {name} must have two dimensions (queries, k), got {_checks.shape(indices)}")
    return indices


def _relevant(function: str, relevant: tuple[Tensor, ...], indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The query, the document and the grade of each entry of the lists."""
    if not isinstance(relevant, tuple) or len(relevant) not in (2, 3):
        raise TypeError(
            f"{function}: relevant must be (indptr, indices) or (indptr, indices, grades), got {relevant!r}"
        )
    indptr, document = relevant[:2]
    _checks.check_index(function, "indptr", indptr, len(indices) + 1, "found", indices)
    _checks.check_index(function, "indices", document, None, "found", indices)
    lengths = indptr.diff()
    if int(indptr[0]) != 0 or int(indptr[-1]) != len(document) or bool((lengths < 0).any()):
        raise ValueError(f"{function}: indptr must ascend from 0 to {len(document)}, got {indptr.tolist()}")
    query = torch.repeat_interleave(lengths)
    grade = torch.ones(len(document), dtype=torch.float64, device=indices.device)
    if len(relevant) == 3:
        _checks.check_vector(function, "grades", relevant[2], len(document), "found", indices)
        grade = relevant[2].double()
        if bool((grade < 0).any()):
            raise ValueError(f"{function}: grades must not be negative, got {float(grade.min())}")
    return query, document, grade


def _grades(indices: Tensor, query: Tensor, document: Tensor, grade: Tensor) -> Tensor:
    """(N, K) grade of each document that was found, 0 for those that no list names."""
    if not document.numel() or not indices.numel():
        return torch.zeros(indices.shape, dtype=torch.float64, device=indices.device)
    width = int(torch.maximum(indices.max(), document.max())) + 2
    row = torch.arange(len(indices), device=indices.device)[:, None]
    key, order = (query * width + document + 1).sort()
    wanted = row * width + indices + 1
    at = torch.searchsorted(key, wanted).clamp_max(len(key) - 1)
    return torch.where((key[at] == wanted) & (indices >= 0), grade[order][at], 0.0)


def _best_grades(query: Tensor, grade: Tensor, rows: int, cut: int) -> Tensor:
    """(rows, cut) grades of each query in the best order, 0 where there are no more."""
    by_grade = grade.argsort(descending=True, stable=True)
    order = by_grade[query[by_grade].argsort(stable=True)]
    counts = torch.bincount(query, minlength=rows)
    place = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query[order]]
    best = grade.new_zeros((rows, cut))
    kept = place < cut
    best[query[order][kept], place[kept]] = grade[order][kept]
    return best


def _gain(grades: Tensor, gain: str) -> Tensor:
    return grades if gain == "linear" else grades.exp2() - 1
