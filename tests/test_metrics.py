"""Isotropy, hubness and retrieval measures against loops over their definitions."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import similarity_topk
from contrastive_ops.metrics import hubness, isotropy, retrieval_metrics

DOUBLE = torch.float64


def test_isotropy_of_all_pairs():
    x = torch.randn(9, 5, dtype=DOUBLE)
    c = F.normalize(x) @ F.normalize(x).T
    expected = 1 - sum(c[i, j] for i in range(9) for j in range(9) if i != j) / (9 * 8)
    torch.testing.assert_close(isotropy(x), expected)
    assert isotropy(x[:1]).isnan()


def test_isotropy_of_pairs_within_texts():
    x = torch.randn(10, 5, dtype=DOUBLE)
    segments = torch.tensor([0, 2, 0, -1, 2, 2, 3, 0, -1, 2])
    c = F.normalize(x) @ F.normalize(x).T
    pairs = [(i, j) for i in range(10) for j in range(10) if i != j and segments[i] == segments[j] >= 0]
    expected = 1 - sum(c[i, j] for i, j in pairs) / len(pairs)
    torch.testing.assert_close(isotropy(x, segments), expected)
    torch.testing.assert_close(isotropy(x, segments, num_segments=7), expected)


def test_hubness_is_the_skewness_of_occurrences():
    corpus, query = torch.randn(40, 8), torch.randn(30, 8)
    top = similarity_topk(query, corpus, 5)
    counts = [sum(int(j) == column for row in top.indices for j in row) for column in range(40)]
    mean = sum(counts) / 40
    second, third = (sum((c - mean) ** power for c in counts) / 40 for power in (2, 3))
    assert math.isclose(float(hubness(top, 40)), third / second**1.5)
    assert float(hubness(top, 40)) == float(hubness(top.indices, 40))
    assert hubness(torch.tensor([[0], [1]]), 2).isnan()


# ---- Retrieval -------------------------------------------------------------------------------------------------------


def of_query(ranking, grades, k, p, top, gain):
    """Every measure of one query, from its definition; `grades` maps relevant documents to theirs."""
    relevant = sum(g > 0 for g in grades.values())
    if not relevant:
        return dict.fromkeys(("precision", "recall", "hit", "mrr", "map", "ndcg", "err", "rbp"), math.nan)
    g = [grades.get(d, 0.0) if d >= 0 else 0.0 for d in ranking]
    of = (lambda x: x) if gain == "linear" else (lambda x: 2**x - 1)
    hits = [x > 0 for x in g]
    first = next((r for r in range(k) if hits[r]), None)
    best = sorted(grades.values(), reverse=True)[:k]
    discounted = [sum(of(x) / math.log2(r + 2) for r, x in enumerate(values)) for values in (g[:k], best)]
    err, unsatisfied = 0.0, 1.0
    for r in range(k):
        satisfied = (2 ** g[r] - 1) / 2**top
        err += unsatisfied * satisfied / (r + 1)
        unsatisfied *= 1 - satisfied
    return {
        "precision": sum(hits[:k]) / k,
        "recall": sum(hits[:k]) / relevant,
        "hit": float(any(hits[:k])),
        "mrr": 0.0 if first is None else 1 / (first + 1),
        "map": sum(hits[r] * sum(hits[: r + 1]) / (r + 1) for r in range(k)) / relevant,
        "ndcg": discounted[0] / discounted[1],
        "err": err,
        "rbp": (1 - p) * sum(p**r * x for r, x in enumerate(g)) / top,
    }


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("graded", [True, False])
def test_retrieval_measures(gain, graded):
    generator = torch.Generator().manual_seed(5)
    queries, documents, found_each, p = 25, 30, 8, 0.7
    found = torch.stack([torch.randperm(documents, generator=generator)[:found_each] for _ in range(queries)])
    found[3, 5:] = -1
    lists = [torch.randperm(documents, generator=generator)[: i % 7] for i in range(queries)]
    grades = [torch.randint(0, 4, (len(each),), generator=generator).double() for each in lists]
    if not graded:
        grades = [torch.ones_like(each) for each in grades]
    indptr = torch.tensor([0, *(len(each) for each in lists)]).cumsum(0)
    relevant = (indptr, torch.cat(lists), torch.cat(grades))
    measures = retrieval_metrics(found, relevant if graded else relevant[:2], k=(1, 3, 8), persistence=(p,), gain=gain)
    top = float(torch.cat(grades).max())
    for i in range(queries):
        own = dict(zip(lists[i].tolist(), grades[i].tolist(), strict=True))
        for k in (1, 3, 8):
            expected = of_query(found[i].tolist(), own, k, p, top, gain)
            for name, value in expected.items():
                key = f"rbp@{p}" if name == "rbp" else f"{name}@{k}"
                torch.testing.assert_close(float(measures[key][i]), value, equal_nan=True)
    assert measures["ndcg@3"].isnan().any() and not measures["ndcg@3"].nanmean().isnan()


def test_the_best_ranking_has_the_best_measures():
    corpus = F.normalize(torch.randn(50, 16))
    query = corpus + 0.01 * torch.randn(50, 16)
    relevant = torch.arange(51), torch.arange(50)
    measures = retrieval_metrics(similarity_topk(query, corpus, 10), relevant)
    for name in ("ndcg@1", "mrr@10", "recall@1", "map@5", "hit@1", "precision@1"):
        assert torch.equal(measures[name], torch.ones(50, dtype=DOUBLE))


def test_nothing_found_and_nothing_relevant():
    nothing = torch.full((2, 3), -1)
    measures = retrieval_metrics(nothing, (torch.tensor([0, 1, 1]), torch.tensor([4])), k=(3,))
    assert measures["recall@3"][0] == 0 and measures["recall@3"][1].isnan()
    empty = retrieval_metrics(nothing, (torch.tensor([0, 0, 0]), torch.zeros(0, dtype=torch.int64)), k=(3,))
    assert all(value.isnan().all() for value in empty.values())
    none = retrieval_metrics(nothing[:0], (torch.tensor([0]), torch.zeros(0, dtype=torch.int64)), k=(3,))
    assert all(value.shape == (0,) for value in none.values())


FOUND, INDPTR, INDICES = torch.tensor([[0, 1]]), torch.tensor([0, 1]), torch.tensor([1])


@pytest.mark.parametrize(
    "call,error,message",
    [
        (
            lambda: isotropy(torch.ones(3, 2), torch.zeros(2).long()),
            ValueError,
            "isotropy: segments must have shape (3,)",
        ),
        (lambda: hubness(torch.ones(3, 2), 4), TypeError, "hubness: neighbours must be int64, got"),
        (lambda: hubness(FOUND, 1), ValueError, "hubness: neighbours must be in [-1, 1), got 1"),
        (
            lambda: retrieval_metrics(FOUND, (INDPTR, INDICES), k=(0,)),
            ValueError,
            "k must be at least 1, got 0",
        ),
        (
            lambda: retrieval_metrics(FOUND, (INDPTR, INDICES), k=(2.5,)),
            TypeError,
            "k must be an int, got float",
        ),
        (lambda: retrieval_metrics(FOUND, INDICES, k=(1,)), TypeError, "relevant must be (indptr, indices)"),
        (lambda: retrieval_metrics(FOUND, (INDPTR[:1], INDICES), k=(1,)), ValueError, "indptr must have shape (2,)"),
        (
            lambda: retrieval_metrics(FOUND, (INDPTR + 1, INDICES), k=(1,)),
            ValueError,
            "indptr must ascend from 0 to 1, got [1, 2]",
        ),
        (
            lambda: retrieval_metrics(FOUND, (INDPTR, INDICES, -torch.ones(1)), k=(1,)),
            ValueError,
            "grades must not be negative, got -1.0",
        ),
        (
            lambda: retrieval_metrics(FOUND, (INDPTR, INDICES), k=(1,), persistence=(1.0,)),
            ValueError,
            "persistence must be in (0, 1), got 1.0",
        ),
        (lambda: retrieval_metrics(FOUND, (INDPTR, INDICES), k=(1,), gain="log"), ValueError, "gain must be one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
