"""Lists that evaluation scripts have: repeats, any int64 as an id, grades that are counts, dicts, arrays, bad values.

The expected measures are those of Python's sets and dicts: `test_metrics.of_query` on lists without repeats.
"""

import math
import random
import re

import numpy
import pytest
import torch
from test_metrics import of_query
from torch.nn import functional as F

from contrastive_ops import similarity_topk
from contrastive_ops.metrics import hubness, isotropy, retrieval_metrics
from contrastive_ops.mining import collapse, first_of_each

LAST = (1 << 63) - 1
# Ids of which sums, differences, products, 32-bit and floating casts collide.
ODD_IDS = [
    0,
    1,
    2,
    -2,
    -3,
    -LAST - 1,
    -LAST,
    LAST,
    LAST - 1,
    1 << 32,
    (1 << 32) + 1,
    -(1 << 32),
    1 << 53,
    (1 << 53) + 1,
    1 << 62,
]


def measured(found, relevant, k, p=0.7, gain="linear", **options):
    return retrieval_metrics(found, relevant, k=k, persistence=(p,), gain=gain, **options)


def expected(rankings, judged, cut, p=0.7, gain="linear"):
    top = max((g for own in judged for g in own.values()), default=0.0)
    padded = [list(dict.fromkeys(d for d in each if d != -1)) for each in rankings]
    return [
        # of_query takes negative ids for none: their numbers among all ids stand for them.
        of_query(*named(each, own), cut, p, top, gain)
        for each, own in zip(padded, judged, strict=True)
    ]


def named(ranking, own):
    number = {d: i for i, d in enumerate(dict.fromkeys([*ranking, *own]))}
    return [number[d] for d in ranking] + [-1] * 100, {number[d]: g for d, g in own.items()}


def problem(seed, ids, queries=12, width=9):
    """Rankings and judgements with repeats of both, and the largest grade of each judged document."""
    draw = random.Random(seed)
    found = [[draw.choice([*ids, -1]) for _ in range(width)] for _ in range(queries)]
    judged = [[(draw.choice(ids), draw.randrange(4)) for _ in range(draw.randrange(6))] for _ in range(queries)]
    largest = [{d: max(float(g) for e, g in each if e == d) for d, _ in each} for each in judged]
    return found, judged, largest


def as_tuple(judged):
    entries = [entry for each in judged for entry in each]
    lengths = torch.tensor([0, *(len(each) for each in judged)])
    return lengths.cumsum(0), torch.tensor([d for d, _ in entries]), torch.tensor([g for _, g in entries])


@pytest.mark.parametrize("gain", ["linear", "exponential"])
@pytest.mark.parametrize("ids", [list(range(8)), ODD_IDS], ids=["small", "any int64"])
@pytest.mark.parametrize("seed", range(4))
def test_measures_are_those_of_sets(seed, ids, gain):
    found, judged, largest = problem(seed, ids)
    measures = measured(torch.tensor(found), as_tuple(judged), (1, 3, 7, 50), gain=gain)
    for cut in (1, 3, 7, 50):
        for i, row in enumerate(expected(found, largest, cut, gain=gain)):
            for name, value in row.items():
                key = "rbp@0.7" if name == "rbp" else f"{name}@{cut}"
                torch.testing.assert_close(float(measures[key][i]), value, equal_nan=True, msg=f"{key} of query {i}")
    assert all(bool((value.nan_to_num() <= 1).all()) for value in measures.values())


def test_a_perfect_ranking_has_ndcg_1_whatever_repeats():
    found = torch.tensor([[7, 7, 9, 7, 1, 9]])
    measures = retrieval_metrics(found, (torch.tensor([0, 4]), torch.tensor([9, 7, 7, 9])), k=(2, 6))
    for name in ("ndcg@2", "recall@2", "map@6", "hit@2", "mrr@2", "precision@2"):
        assert float(measures[name]) == 1.0, name
    assert float(measures["precision@6"]) == 2 / 6


def test_every_form_of_judgements_gives_the_same():
    found, judged, largest = problem(3, list(range(20)))
    found = torch.tensor(found)
    reference = measured(found, as_tuple(judged), (5, 10))
    width = max(map(len, judged))
    ones = [[d for d, _ in each] for each in judged]
    matrix = torch.tensor([each + [-1] * (width - len(each)) for each in ones])
    indptr, indices, grades = as_tuple(judged)
    lists = [list(each) for each in found.tolist()]
    graded = {
        "float grades": (found, (indptr, indices, grades.float())),
        "16-bit grades": (found, (indptr, indices, grades.half())),
        "arrays": (found.numpy(), tuple(each.numpy() for each in (indptr, indices, grades))),
        "32-bit arrays": (found.numpy().astype(numpy.int32), (indptr.int().numpy(), indices.int(), grades.tolist())),
        "dict of dicts": (found, dict(enumerate(largest))),
        "dict of dicts of numpy": (found, {numpy.int64(i): each for i, each in enumerate(largest)}),
        "list of dicts": (lists, largest),
        "lists": (lists, as_tuple(judged)),
    }
    for form, (what, relevant) in graded.items():
        for name, value in measured(what, relevant, (5, 10)).items():
            torch.testing.assert_close(value, reference[name], equal_nan=True, msg=f"{name} of {form}", rtol=0, atol=0)
    alike = measured(found, (indptr, indices), (5, 10))
    for relevant in (ones, matrix, matrix.numpy(), dict(enumerate(ones))):
        for name, value in measured(found, relevant, (5, 10)).items():
            assert torch.equal(value.nan_to_num(-1.0), alike[name].nan_to_num(-1.0)), name


def test_dicts_of_strings():
    found = {"q2": {"d1": 0.1, "d7": 0.9, "d3": 0.5}, "q1": {"d9": 3.0}, "q3": {}}
    judged = {"q1": {"d1": 1}, "q2": {"d3": 2, "d7": 1, "d8": 0}, "unknown": {"d1": 1}}
    measures = retrieval_metrics(found, judged, k=(1, 10))
    assert measures["hit@1"].tolist()[:2] == [1.0, 0.0] and measures["hit@1"][2].isnan()
    ideal = 2 + 1 / math.log2(3)
    assert math.isclose(float(measures["ndcg@10"][0]), (1 + 2 / math.log2(3)) / ideal)
    of_chunks = {"q2": {"d7#1": 0.2, "d7#0": 0.9, "d3#4": 0.5, "d1#0": 0.1}, "q1": {"d9#9": 1.0}, "q3": {}}
    names = {chunk: chunk.split("#")[0] for each in of_chunks.values() for chunk in each}
    again = retrieval_metrics(of_chunks, judged, documents=names, k=(1, 10))
    for name, value in measures.items():
        assert torch.equal(value.nan_to_num(-1.0), again[name].nan_to_num(-1.0)), name


def test_chunks_are_collapsed_to_documents():
    documents = torch.tensor(ODD_IDS).repeat_interleave(3)
    found = torch.stack([torch.randperm(len(documents))[:12] for _ in range(6)])
    found[2, 4:] = -1
    judged = torch.tensor(ODD_IDS)[torch.randint(0, len(ODD_IDS), (6, 4))]
    as_documents = torch.where(found < 0, -1, documents[found])
    one, other = retrieval_metrics(found, judged, documents=documents), retrieval_metrics(as_documents, judged)
    third = retrieval_metrics(collapse(found, documents), judged)
    for name, value in one.items():
        assert torch.equal(value, other[name]) and torch.equal(value, third[name]), name
    expected_lists = [list(dict.fromkeys(d for d in row if d != -1)) for row in as_documents.tolist()]
    assert [[d for d in row if d != -1] for row in collapse(found, documents).tolist()] == expected_lists


def test_collapse_keeps_the_values_of_the_best_chunk_and_their_gradient():
    query, corpus = torch.randn(4, 8, requires_grad=True), torch.randn(30, 8)
    documents, top = torch.arange(30) // 3 * 100, similarity_topk(query, corpus, 12)
    found = collapse(top, documents)
    scores = torch.full((4, 10), -torch.inf)
    scores = scores.scatter_reduce(1, documents[top.indices] // 100, top.values.detach(), "amax")
    best = scores.sort(dim=1, descending=True)
    for i in range(4):
        count = int(found.counts[i])
        assert count == int((scores[i] > -torch.inf).sum()) and bool((found.indices[i, count:] == -1).all())
        assert torch.equal(found.indices[i, :count], best.indices[i, :count] * 100)
        torch.testing.assert_close(found.values[i, :count].detach(), best.values[i, :count])
        assert bool((found.values[i, count:] == -torch.inf).all())
    found.values[found.indices >= 0].sum().backward()
    assert query.grad.isfinite().all()


def test_first_of_each():
    lists = torch.tensor(ODD_IDS + [-1])[torch.randint(0, len(ODD_IDS) + 1, (20, 25))]
    for ids, mask in zip(lists.tolist(), first_of_each(lists).tolist(), strict=True):
        assert mask == [d != -1 and d not in ids[:j] for j, d in enumerate(ids)]
    assert first_of_each(torch.zeros(3, 0).long()).shape == (3, 0)


@pytest.mark.parametrize("grade", [100.0, 1000.0, 1024.0, 1e6, 1e300, 2**-40, 1e-300])
@pytest.mark.parametrize("gain", ["linear", "exponential"])
def test_grades_of_any_size(grade, gain):
    found, indptr, indices = torch.tensor([[2, 7, 3], [3, 9, 9]]), torch.tensor([0, 2, 3]), torch.tensor([7, 2, 3])
    grades = torch.tensor([grade, grade / 2, grade / 4], dtype=torch.float64)
    measures = retrieval_metrics(found, (indptr, indices, grades), k=(3,), gain=gain)
    ratio = (
        0.5
        if gain == "linear"
        else math.expm1(math.log(2) * grade / 2) / math.expm1(math.log(2) * grade)
        if grade < 1000
        else 0.0
    )
    ndcg = (ratio + 1 / math.log2(3)) / (1 + ratio / math.log2(3))
    torch.testing.assert_close(float(measures["ndcg@3"][0]), ndcg)
    assert all(bool(((value >= 0) & (value <= 1)).all()) for value in measures.values())
    torch.testing.assert_close(float(measures["rbp@0.8"][0]), 0.2 * (0.5 + 0.8))


def test_hubness_of_lists_with_repeats():
    lists = torch.tensor([[0, 0, 1], [0, 2, 2], [0, 1, -1]])
    assert float(hubness(lists, 4)) == float(hubness(torch.tensor([[0, 1], [0, 2], [0, 1]]), 4))


def test_texts_of_any_number():
    x, segments = torch.randn(40, 6), torch.randint(-1, len(ODD_IDS), (40,))
    odd = torch.where(segments < 0, -1, torch.tensor(ODD_IDS)[segments])
    torch.testing.assert_close(isotropy(x, odd), isotropy(x, segments))


def test_one_row_of_thousands():
    corpus = F.normalize(torch.randn(1, 6000), dim=1).T
    measures = retrieval_metrics(
        similarity_topk(corpus[:1], corpus, 6000), [list(range(0, 6000, 2))], k=(1, 6000, 10**6)
    )
    assert float(measures["recall@6000"]) == float(measures["recall@1000000"]) == 1.0
    assert math.isclose(float(measures["precision@1000000"]), 3000 / 10**6)


ONE, TWO = torch.tensor([[3, 1]]), (torch.tensor([0, 1]), torch.tensor([1]))


@pytest.mark.parametrize(
    "call,error,message",
    [
        (
            lambda: retrieval_metrics(ONE, (*TWO, torch.tensor([math.nan]))),
            ValueError,
            "grades must be finite, got nan",
        ),
        (
            lambda: retrieval_metrics(ONE, (*TWO, torch.tensor([math.inf]))),
            ValueError,
            "grades must be finite, got inf",
        ),
        (
            lambda: retrieval_metrics(ONE, (*TWO, torch.tensor([-2]))),
            ValueError,
            "grades must not be negative, got -2.0",
        ),
        (lambda: retrieval_metrics(ONE, [{1: -1}]), ValueError, "grades must not be negative, got -1.0"),
        (lambda: retrieval_metrics(ONE, (*TWO, torch.ones(3))), ValueError, "grades must have shape (1,), got (3,)"),
        (
            lambda: retrieval_metrics(ONE, {1: {1: 1}}),
            ValueError,
            "must have rows of found as keys, from 0 to 0, got 1",
        ),
        (
            lambda: retrieval_metrics(ONE, {"q": {1: 1}}),
            ValueError,
            "must have rows of found as keys, from 0 to 0, got 'q'",
        ),
        (
            lambda: retrieval_metrics(ONE, {0: {"d": 1}}),
            TypeError,
            "relevant must have int64 ids as the others do, got 'd'",
        ),
        (lambda: retrieval_metrics(ONE, {0: 1}), TypeError, "relevant must have documents for each query, got 1 for 0"),
        (lambda: retrieval_metrics(ONE, [1]), TypeError, "relevant must have a list for each query, got 1 for query 0"),
        (
            lambda: retrieval_metrics(ONE, [[1], [2]]),
            ValueError,
            "relevant must have a list for each of the 1 queries, got 2",
        ),
        (lambda: retrieval_metrics(ONE, [[1 << 63]]), ValueError, "ids that int64 can hold, got 9223372036854775808"),
        (lambda: retrieval_metrics(ONE, [[1.0]]), TypeError, "relevant must have int64 ids as the others do, got 1.0"),
        (lambda: retrieval_metrics(ONE, "d1"), TypeError, "relevant must be (indptr, indices)"),
        (lambda: retrieval_metrics(ONE, (TWO[0],)), TypeError, "got a tuple of 1"),
        (lambda: retrieval_metrics(ONE.float(), TWO), TypeError, "found must be an int64 tensor or a TopK"),
        (lambda: retrieval_metrics(ONE[0], TWO), ValueError, "found must have two dimensions (queries, k), got (2,)"),
        (
            lambda: retrieval_metrics(numpy.array([[1 << 63]], dtype=numpy.uint64), TWO),
            ValueError,
            "found must have ids that int64 can hold",
        ),
        (
            lambda: retrieval_metrics({"q": {"d": math.nan}}, {"q": {"d": 1}}),
            ValueError,
            "found must have scores that are",
        ),
        (lambda: retrieval_metrics(ONE, TWO, documents=torch.arange(3)), ValueError, "found must be in [-1, 3), got 3"),
        (
            lambda: retrieval_metrics(ONE, TWO, documents={3: 1}),
            ValueError,
            "documents must name the document of each chunk",
        ),
        (lambda: collapse(ONE, torch.full((9,), -1)), ValueError, "collapse: documents must not be -1"),
        (lambda: collapse(ONE.float()), TypeError, "collapse: found must be int64"),
        (lambda: collapse(ONE[0]), ValueError, "collapse: found must have two dimensions (N, K), got (2,)"),
        (lambda: first_of_each(ONE.float()), TypeError, "first_of_each: lists must be int64"),
        (lambda: first_of_each(ONE[0]), ValueError, "first_of_each: lists must have two dimensions (N, K), got (2,)"),
        (lambda: hubness(torch.tensor([[-2]]), 4), ValueError, "hubness: neighbours must be in [-1, 4), got -2"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
