"""Hard negatives against a loop over queries that does what the documentation says, one step after another."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contrastive_ops import Pairs
from contrastive_ops.mining.hard_negatives import NegativeRules, Sampling, mine_hard_negatives
from contrastive_ops.ops import Guide

FUZZ = settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
MASK = (1 << 64) - 1


# ---- The loop ------------------------------------------------------------------------------------------------------


def mixed(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def gumbel(seed, query_id, document_id):
    step = 0x9E3779B97F4A7C15
    key = mixed(mixed((seed + step) & MASK) ^ mixed(query_id * step & MASK))
    u = ((mixed(key + (document_id + 1) * step & MASK) >> 12) + 0.5) * 2.0**-52
    return -math.log(-math.log(u))


def similarity(a, b, metric):
    """Exact on small integers; in float64 otherwise."""
    a, b = a.double(), b.double()
    if metric == "sqeuclidean":
        return -(a[:, None] - b).square().sum(2)
    return F.normalize(a) @ F.normalize(b).T if metric == "cosine" else a @ b.T


def dropped_by(pairs, i, s):
    """What the rules of the user drop of the columns of one query, by name."""
    s = torch.tensor(s)
    column = torch.arange(len(s))
    drops = {}
    if pairs.diagonal is not None:
        drops["diagonal"] = column == i + pairs.diagonal
    if pairs.exclude is not None:
        indptr, indices = pairs.exclude
        drops["exclude"] = torch.isin(column, indices[indptr[i] : indptr[i + 1]])
    for name, ids in (("differ", pairs.differ), ("same", pairs.same)):
        if ids is not None:
            equal = (ids[1] == ids[0][i]) & (ids[1] != -1)
            drops[name] = equal if name == "differ" else ~equal
    if pairs.below is not None:
        drops["below"] = s > pairs.below[i]
    if pairs.above is not None:
        drops["above"] = s < pairs.above[0]
    if pairs.guide is not None:
        gy = pairs.guide.gx if pairs.guide.gy is None else pairs.guide.gy
        drops["guide"] = gy.double() @ pairs.guide.gx[i].double() > pairs.guide.below
    return {name: drop.tolist() for name, drop in drops.items()}


def drawn(window, s, p, i, n, own, rules, sampling, between):
    """The negatives that are taken from a window, in the order in which they are taken."""
    if sampling.strategy != "top":
        weight = {
            "uniform": lambda v: 0.0,
            "softmax": lambda v: v / sampling.temperature,
            "simans": lambda v: -sampling.a * (v - p - sampling.b) ** 2,
        }[sampling.strategy]
        query_id = i if sampling.ids is None else int(sampling.ids[0][i])
        ids = range(len(s)) if sampling.ids is None else sampling.ids[1].tolist()
        window = sorted(window, key=lambda j: -(weight(s[j]) + gumbel(sampling.seed, query_id, ids[j])))
    taken = []
    for j in window:
        close = rules.near_duplicate is not None and any(between[j][o] > rules.near_duplicate for o in own + taken)
        if len(taken) < n and not close:
            taken.append(j)
    return taken


def oracle(query, corpus, lists, n, rules, sampling, metric, pairs=None):
    """((indices, scores) of each query, statistics by name)."""
    results, statistics = [], {}
    scores, between = similarity(query, corpus, metric).tolist(), similarity(corpus, corpus, metric).tolist()
    for i, own in enumerate(lists):
        s, own = scores[i], list(dict.fromkeys(own))
        mine = torch.tensor([s[j] for j in own], dtype=query.dtype)
        p = {"min": torch.amin, "max": torch.amax, "mean": torch.mean}[rules.positive_score](mine) if own else None
        # In the precision of the inputs: a mean of integers is none.
        absolute = math.inf if rules.absolute_margin is None else float(p - rules.absolute_margin)
        relative = math.inf if rules.relative_margin is None else float(p - p.abs() * rules.relative_margin)
        p = float(p) if own else None
        nothing = [False] * len(corpus)
        drops = dict.fromkeys(("differ", "same", "below", "above", "guide"), nothing)
        drops |= dropped_by(Pairs() if pairs is None else pairs, i, s)
        ranked = [not any(d[j] for d in drops.values()) and j not in own for j in range(len(corpus))]
        high = [v > absolute or v > relative or (rules.max_score is not None and v > rules.max_score) for v in s]
        low = [rules.min_score is not None and v < rules.min_score for v in s]
        kept = [r and not h and not w for r, h, w in zip(ranked, high, low, strict=True)]
        raw = rules.rank_basis == "raw"
        order = sorted((j for j in range(len(corpus)) if (ranked if raw else kept)[j]), key=lambda j: (-s[j], j))
        first, end = rules.rank_window
        width = n if sampling.strategy == "top" else 10 * n
        grows = end is None and rules.near_duplicate is not None and not raw
        if grows and sampling.strategy == "top":
            width = len(corpus)
        while True:
            window = [j for j in order[first : first + width if end is None else end] if kept[j]]
            taken = drawn(window, s, p, i, n, own, rules, sampling, between)
            if not grows or len(taken) == n or first + width >= len(order):
                break
            width *= 2
        taken = sorted(taken, key=lambda j: (-s[j], j))
        results.append((taken, [s[j] for j in taken]))
        others = [j for j in range(len(corpus)) if j not in own]
        row = {
            "eligible": sum(kept),
            "positives": len(own),
            "positive_rank": sum(s[j] > p for j in others) if own else -1,
            "below": sum(high[j] or drops["below"][j] for j in others),
            "above": sum(low[j] or drops["above"][j] for j in others),
            **{name: sum(drops[name][j] for j in others) for name in ("differ", "same", "guide")},
        }
        for name, value in row.items():
            statistics.setdefault(name, []).append(value)
    return results, statistics


def check(mined, expected, n):
    """Equal lists, padding and statistics."""
    results, statistics = expected
    for i, (indices, scores) in enumerate(results):
        pad = n - len(indices)
        assert mined.indices[i].tolist() == indices + [-1] * pad, i
        torch.testing.assert_close(
            mined.scores[i].double(),
            torch.tensor(scores + [-math.inf] * pad, dtype=torch.float64),
            rtol=1e-5,
            atol=1e-6,
        )
        assert mined.counts[i] == len(indices)
    assert {name: each.tolist() for name, each in mined.statistics.items()} == statistics


# ---- All rules at once ---------------------------------------------------------------------------------------------


def as_csr(lists):
    indptr = torch.tensor([0, *(len(own) for own in lists)]).cumsum(0)
    return indptr, torch.tensor([j for own in lists for j in own], dtype=torch.int64)


def as_padded(lists):
    width = max((len(own) for own in lists), default=0)
    return torch.tensor([own + [-1] * (width - len(own)) for own in lists], dtype=torch.int64).view(len(lists), width)


def draw_rules(draw, pick):
    first = draw(st.integers(0, 3))
    return NegativeRules(
        absolute_margin=pick(0.0, 1.0, 4.5),
        relative_margin=pick(0.25, 0.5),
        min_score=pick(-6.0, 0.0),
        max_score=pick(5.0, -1.5),
        positive_score=draw(st.sampled_from(["min", "max", "mean"])),
        rank_window=(first, draw(st.sampled_from([None, None, first + 1, first + 7, 200]))),
        rank_basis=draw(st.sampled_from(["surviving", "surviving", "raw"])),
        near_duplicate=pick(-0.5, 3.0),
    )


def draw_pairs(draw, n, m):
    if draw(st.booleans()):
        return None
    choose = lambda make: make() if draw(st.integers(0, 2)) == 0 else None  # noqa: E731
    return Pairs(
        diagonal=choose(lambda: draw(st.integers(-2, 3))),
        differ=choose(lambda: (torch.randint(-1, 4, (n,)), torch.randint(-1, 4, (m,)))),
        same=choose(lambda: (torch.randint(-1, 2, (n,)), torch.randint(-1, 2, (m,)))),
        exclude=choose(lambda: as_csr([torch.randint(0, m, (3,)).tolist() for _ in range(n)])),
        below=choose(lambda: torch.randint(-3, 9, (n,)).float()),
        above=choose(lambda: torch.randint(-9, 3, (1, m)).float()),
        guide=choose(
            lambda: Guide(torch.randint(-2, 3, (n, 3)).bfloat16(), torch.randint(-2, 3, (m, 3)).bfloat16(), 1.0)
        ),
    )


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("strategy", ["top", "uniform", "softmax", "simans"])
def test_all_rules_on_small_integers(backend, strategy, data):
    """Exact in any order of sums: indices are equal, ties included."""
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    n, m, depth = draw(st.integers(1, 6)), draw(st.integers(1, 60)), draw(st.integers(1, 4))
    query, corpus = (torch.randint(-3, 4, (rows, depth)).to(torch.float32) for rows in (n, m))
    rules = draw_rules(draw, lambda *values: draw(st.sampled_from([None, None, *values])))
    needed = rules.needs_positive or strategy == "simans"
    lists = [torch.randint(0, m, (draw(st.integers(1 if needed else 0, 3)),)).tolist() for _ in range(n)]
    ids = (torch.randint(-9, 9, (n,)), torch.randperm(m) * 7 - 3) if draw(st.booleans()) else None
    sampling = Sampling(strategy, seed=draw(st.integers(-5, 5)), temperature=2.0, a=0.1, b=-2.0, ids=ids)
    wanted, metric = draw(st.integers(1, 5)), draw(st.sampled_from(["dot", "sqeuclidean"]))
    pairs = draw_pairs(draw, n, m)
    mined = mine_hard_negatives(
        query,
        corpus,
        draw(st.sampled_from([as_csr, as_padded]))(lists),
        wanted,
        rules=rules,
        sampling=sampling,
        metric=metric,
        pairs=pairs,
        block_rows=draw(st.sampled_from([None, 9, 25])),
        backend=backend,
    )
    check(mined, oracle(query, corpus, lists, wanted, rules, sampling, metric, pairs), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
def test_real_embeddings(backend, metric, dtype):
    query, corpus = torch.randn(20, 16, dtype=dtype), torch.randn(300, 16, dtype=dtype)
    lists = [torch.randint(0, 300, (1 + i % 4,)).tolist() for i in range(20)]
    rules = NegativeRules(relative_margin=0.1, min_score=-20.0, positive_score="max", near_duplicate=0.9)
    mined = mine_hard_negatives(query, corpus, as_csr(lists), 6, rules=rules, metric=metric, backend=backend)
    check(mined, oracle(query, corpus, lists, 6, rules, Sampling(), metric), 6)


# ---- What went wrong elsewhere -------------------------------------------------------------------------------------


def test_several_positives_leave_enough_candidates(backend):
    """sentence-transformers #3872: one more than range_max was fetched, however many positives come first."""
    corpus = torch.eye(12)[:, :8] + torch.linspace(1, 0, 12)[:, None]
    positives = torch.arange(8).expand(2, 8).contiguous()
    mined = mine_hard_negatives(torch.ones(2, 8), corpus, positives, 3, metric="dot", backend=backend)
    assert mined.indices.tolist() == [[8, 9, 10]] * 2
    assert mined.statistics["positives"].tolist() == [8, 8]


def test_relative_margin_of_a_negative_positive(backend):
    """sentence-transformers #3819: p (1 - r) is above p where p is negative, and nothing is dropped."""
    corpus = torch.tensor([[-10.0], [-8.0], [-10.5], [-11.0], [-20.0]])
    rules = NegativeRules(relative_margin=0.1)
    mined = mine_hard_negatives(
        torch.ones(1, 1), corpus, torch.tensor([0]), 4, rules=rules, metric="dot", backend=backend
    )
    assert mined.indices.tolist() == [[3, 4, -1, -1]]  # at most -10 - 1
    assert mined.statistics["below"].tolist() == [2]
    assert mined.statistics["positive_rank"].tolist() == [1]


@pytest.mark.parametrize("strategy", ["top", "uniform", "softmax", "simans"])
@pytest.mark.parametrize("basis", ["raw", "surviving"])
@pytest.mark.parametrize("near_duplicate", [None, 0.999])
def test_window_smaller_than_num_negatives(backend, strategy, basis, near_duplicate):
    """sentence-transformers #3903: sampling more than the window has was an error; also one behind the corpus."""
    query, corpus = torch.randn(3, 8), torch.randn(30, 8)
    for window, count in (((4, 6), 2), ((25, 40), 4), ((29, 30), 0), ((100, 110), 0)):
        rules = NegativeRules(rank_window=window, rank_basis=basis, near_duplicate=near_duplicate)
        mined = mine_hard_negatives(
            query, corpus, torch.arange(3), 5, rules=rules, sampling=Sampling(strategy), backend=backend
        )
        assert mined.counts.tolist() == [count] * 3
        assert (mined.indices[:, count:] == -1).all() and (mined.scores[:, count:] == -torch.inf).all()


def test_each_query_has_the_margin_of_its_own_positives(backend):
    """sentence-transformers before 6.2: scores of positives were sliced by the count of the query before."""
    query, corpus = torch.ones(3, 1), torch.arange(20.0)[:, None]
    lists = [[19, 18, 17], [6], [12, 10]]
    rules = NegativeRules(absolute_margin=1.0)
    mined = mine_hard_negatives(query, corpus, as_csr(lists), 2, rules=rules, metric="dot", backend=backend)
    assert mined.indices.tolist() == [[16, 15], [5, 4], [9, 8]]
    assert mined.positive_scores.tolist() == [19, 18, 17, 6, 12, 10]
    for how, first in (("max", [16, 5, 11]), ("mean", [16, 5, 9])):
        rules = NegativeRules(absolute_margin=1.0, positive_score=how)
        mined = mine_hard_negatives(query, corpus, as_padded(lists), 1, rules=rules, metric="dot", backend=backend)
        assert mined.indices[:, 0].tolist() == first, how


def test_padding_is_no_document(backend):
    """-1 resolved to the last document where texts were looked up."""
    query, corpus = torch.eye(2), torch.eye(2)
    mined = mine_hard_negatives(query, corpus, torch.tensor([[0, 1], [1, -1]]), 3, backend=backend)
    assert mined.indices.tolist() == [[-1, -1, -1], [0, -1, -1]]
    texts = {"queries": ["q0", "q1"], "documents": ["d0", "d1"]}
    assert mined.format("triplet", **texts) == {"anchor": ["q1"], "positive": ["d1"], "negative": ["d0"]}
    assert mined.format("labeled-pair", **texts)["passage"] == ["d0", "d1", "d1", "d0"]
    assert mined.format("labeled-list", **texts)["passages"] == [["d1", "d0"]]


def test_counts_say_what_is_missing(backend):
    """sentence-transformers #3504: the number of samples without enough negatives was wrong."""
    corpus = torch.arange(10.0)[:, None]
    rules = NegativeRules(absolute_margin=1.0)
    mined = mine_hard_negatives(
        torch.ones(3, 1), corpus, torch.tensor([9, 2, 0]), 4, rules=rules, metric="dot", backend=backend
    )
    assert mined.counts.tolist() == [4, 2, 0]
    assert mined.statistics["eligible"].tolist() == [9, 2, 0]
    assert len(mined.format("n-tuple")["anchor"]) == 1 and len(mined.format("triplet")["anchor"]) == 6


def test_cosine_of_rows_of_any_length(backend):
    """sentence-transformers #2944: embeddings that were not normalised gave NaN; zeros have no direction."""
    query, corpus = torch.randn(4, 8) * 100, torch.randn(40, 8) * torch.logspace(-9, 4, 40)[:, None]
    corpus[11] = 0
    query[3] = 0
    found = mine_hard_negatives(query, corpus, torch.arange(4), 35, backend=backend)
    unit = mine_hard_negatives(F.normalize(query), F.normalize(corpus), torch.arange(4), 35, backend=backend)
    assert not found.scores.isnan().any() and found.scores.max() <= 1 + 1e-6
    assert torch.equal(found.indices, unit.indices)
    assert found.scores[3].tolist() == [0.0] * 35 and 11 in found.indices[3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("metric", ["cosine", "dot", "sqeuclidean"])
def test_positives_and_candidates_are_scored_alike(backend, metric, dtype):
    """Candidates in fp16 and positives in fp32: copies of the positive pass a margin smaller than the rounding."""
    query, corpus = (torch.randn(size, 64).to(dtype) for size in (6, 40))
    corpus = torch.cat([corpus, corpus[:6]])
    margin = {"cosine": 1e-5, "dot": 1e-3, "sqeuclidean": 1e-2}[metric]
    for rules in (NegativeRules(absolute_margin=margin), NegativeRules(relative_margin=1e-4)):
        mined = mine_hard_negatives(query, corpus, torch.arange(6), 45, rules=rules, metric=metric, backend=backend)
        copies = torch.arange(40, 46)
        assert not (mined.indices == copies[:, None]).any()
        # A copy is not above the positive, and neither is the positive itself.
        dense = similarity(query.float(), corpus[:40].float(), metric)
        rank = (dense > dense.diagonal()[:, None] + 2 * margin).sum(1)
        assert (mined.statistics["positive_rank"] >= rank).all()
        assert torch.equal(mined.counts, 45 - mined.statistics["below"])


def test_rank_of_the_positive_is_0_where_nothing_beats_it(backend):
    """The positive itself, scored twice in two orders of sums, must not count."""
    corpus = torch.randn(200, 301)
    query = corpus[:50] + 0.01 * torch.randn(50, 301)
    for metric in ("cosine", "sqeuclidean"):
        mined = mine_hard_negatives(query, corpus, torch.arange(50), 1, metric=metric, backend=backend)
        assert mined.statistics["positive_rank"].eq(0).all()


def test_no_starvation_where_over_fetching_starves(backend):
    """FlagEmbedding: a window of retrieved ranks, then filters. Here 100 false negatives rank before all others."""
    corpus = torch.cat([torch.linspace(0.96, 0.999, 100), torch.linspace(0.1, 0.9, 50), torch.ones(1)])[:, None]
    query, positive, n = torch.ones(1, 1), torch.tensor([150]), 5
    rules = NegativeRules(relative_margin=0.05)
    scores = (query @ corpus.T)[0]
    fetched = scores.topk(10 * n + 1).indices
    survivors = [j for j in fetched.tolist() if j != 150 and scores[j] <= 0.95]
    assert len(survivors) == 0
    mined = mine_hard_negatives(query, corpus, positive, n, rules=rules, metric="dot", backend=backend)
    assert mined.indices.tolist() == [[149, 148, 147, 146, 145]]
    assert mined.statistics["below"].tolist() == [100] and mined.statistics["eligible"].tolist() == [50]


def test_near_duplicates_never_starve(backend):
    """Copies fill every pool of candidates but the last one; only queries without enough are searched again."""
    directions = F.normalize(torch.randn(6, 32))
    copies = directions.repeat_interleave(torch.tensor([200, 100, 50, 10, 2, 1]), 0)
    corpus = copies + 1e-4 * torch.randn(copies.shape)
    own = len(corpus)
    query = F.normalize(directions * torch.tensor([6.0, 5, 4, 3, 2, 1])[:, None]).sum(0, keepdim=True) + directions[:1]
    query = torch.cat([query, torch.randn(3, 32)])
    corpus = torch.cat([corpus, directions[5:] + 1e-4])
    rules = NegativeRules(near_duplicate=0.99)
    for sampling in (Sampling(), Sampling("uniform"), Sampling("softmax", temperature=0.01)):
        mined = mine_hard_negatives(
            query, corpus, torch.full((4,), own), 5, rules=rules, sampling=sampling, backend=backend
        )
        expected = oracle(query, corpus, [[own]] * 4, 5, rules, sampling, "cosine")
        check(mined, expected, 5)
        assert mined.counts.tolist() == [5] * 4
        unit = F.normalize(corpus[mined.indices[0]])
        assert (unit @ unit.T - torch.eye(5)).max() < 0.99
    # With a window, it is the limit.
    limited = NegativeRules(near_duplicate=0.99, rank_window=(0, 20))
    assert mine_hard_negatives(query, corpus, torch.full((4,), own), 5, rules=limited, backend=backend).counts[0] < 5


def test_rules_of_the_user_hold_for_queries_that_are_searched_again(backend):
    """Documents mined for themselves, with a guide of one matrix, ids, bounds per row and a diagonal."""
    corpus = torch.cat([torch.randint(-3, 4, (5, 3)), torch.randint(-3, 4, (40, 3))]).float()
    corpus = torch.cat([corpus[:5].repeat(15, 1), corpus[5:]])
    m = len(corpus)
    pairs = Pairs(
        diagonal=1,
        differ=(torch.arange(m) % 7, torch.arange(m) % 7),
        below=(torch.randint(0, 9, (m,)).float()),
        guide=Guide(torch.randint(-2, 3, (m, 3)).bfloat16(), None, 4.0),
    )
    rules, lists = NegativeRules(near_duplicate=4.0), [[j] for j in range(m)]
    mined = mine_hard_negatives(
        corpus, corpus, torch.arange(m), 4, rules=rules, metric="dot", pairs=pairs, backend=backend
    )
    check(mined, oracle(corpus, corpus, lists, 4, rules, Sampling(), "dot", pairs), 4)


@pytest.mark.parametrize(("n", "m"), [(1, 9), (3, 1), (3, 9), (0, 9)])
def test_bounds_of_every_form(backend, n, m):
    """0-d, a number for each row, or for each column; the positive itself is not counted as dropped."""
    forms = (-0.5, torch.tensor(-0.5), torch.full((n,), -0.5), torch.full((n, 1), -0.5), torch.full((1, m), -0.5))
    for bounds in (*forms, forms):
        pairs = Pairs(below=bounds, above=bounds)
        mined = mine_hard_negatives(
            torch.ones(n, 1),
            torch.ones(m, 1),
            torch.zeros(n, dtype=torch.int64),
            2,
            rules=NegativeRules(absolute_margin=-5.0),
            pairs=pairs,
            backend=backend,
        )
        assert mined.statistics["below"].tolist() == [m - 1] * n
        assert mined.statistics["above"].tolist() == [0] * n


def test_raw_ranks_include_what_the_rules_drop(backend):
    corpus = torch.arange(20.0, 0, -1)[:, None]
    positives = torch.tensor([3])  # 17
    for basis, expected in (("surviving", [7, 8, 9]), ("raw", [5, 6, 7])):
        rules = NegativeRules(absolute_margin=2.0, rank_window=(2, 7), rank_basis=basis)
        mined = mine_hard_negatives(torch.ones(1, 1), corpus, positives, 3, rules=rules, metric="dot", backend=backend)
        assert mined.indices.tolist() == [expected]
    rules = NegativeRules(absolute_margin=2.0, rank_window=(2, 5), rank_basis="raw")
    mined = mine_hard_negatives(torch.ones(1, 1), corpus, positives, 3, rules=rules, metric="dot", backend=backend)
    assert mined.indices.tolist() == [[5, -1, -1]] and mined.statistics["eligible"].tolist() == [15]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("basis", ["raw", "surviving"])
def test_guide_of_any_dtype(backend, basis, dtype):
    """Ranks and statistics are under two sets of rules with one guide; the positive itself is none of what it drops."""
    query, corpus = torch.ones(2, 1), torch.arange(10.0)[:, None]
    guide = Guide(torch.ones(2, 1, dtype=dtype), corpus.flip(0).to(dtype), 4.0)
    rules = NegativeRules(absolute_margin=1.0, rank_window=(0, 10), rank_basis=basis)
    mined = mine_hard_negatives(
        query, corpus, torch.tensor([9, 2]), 3, rules=rules, metric="dot", pairs=Pairs(guide=guide), backend=backend
    )
    assert mined.indices.tolist() == [[8, 7, 6], [-1, -1, -1]]
    assert mined.statistics["guide"].tolist() == [5, 4] and mined.statistics["eligible"].tolist() == [4, 0]


# ---- Formats -------------------------------------------------------------------------------------------------------


def mined_example():
    """Query 0 has two positives and one negative, query 1 one and two; query 2 has no positive."""
    corpus = torch.arange(5.0)[:, None]
    lists, pairs = [[4, 1], [3], []], Pairs(exclude=as_csr([[0, 2], [4, 2], [0, 1, 2, 3]]))
    return mine_hard_negatives(torch.ones(3, 1), corpus, as_csr(lists), 2, metric="dot", pairs=pairs)


def test_formats():
    mined = mined_example()
    assert mined.indices.tolist() == [[3, -1], [1, 0], [4, -1]]
    assert mined.format() == {"anchor": [0, 0, 1, 1], "positive": [4, 1, 3, 3], "negative": [3, 3, 1, 0]}
    assert mined.format("n-tuple") == {"anchor": [1], "positive": [3], "negative_1": [1], "negative_2": [0]}
    assert mined.format("labeled-pair") == {
        "anchor": [0, 0, 0, 1, 1, 1, 2],
        "passage": [4, 1, 3, 3, 1, 0, 4],
        "label": [1, 1, 0, 1, 0, 0, 0],
    }
    assert mined.format("labeled-list") == {
        "anchor": [0, 0, 1],
        "passages": [[4, 3], [1, 3], [3, 1, 0]],
        "labels": [[1, 0], [1, 0], [1, 0, 0]],
    }


def test_formats_with_texts_and_scores():
    mined, queries, documents = mined_example(), ["a", "b", "c"], np.array(["v", "w", "x", "y", "z"])
    made = mined.format("triplet", queries, documents, output_scores=True)
    assert list(made) == ["anchor", "positive", "negative", "scores"]
    assert made["anchor"] == ["a", "a", "b", "b"] and made["negative"] == ["y", "y", "w", "v"]
    assert made["scores"] == [[4, 3], [1, 3], [3, 1], [3, 0]]
    made = mined.format("n-tuple", queries, documents, output_scores=True)
    assert {name: values[0] for name, values in made.items()} == {
        "anchor": "b",
        "positive": "y",
        "negative_1": "w",
        "negative_2": "v",
        "scores": [3, 1, 0],
    }
    made = mined.format("labeled-list", documents=documents, output_scores=True)
    assert made["anchor"] == [0, 0, 1] and made["passages"][2] == ["y", "w", "v"]
    assert list(made) == ["anchor", "passages", "scores"] and made["scores"][1] == [1, 3]
    assert mined.format("labeled-pair", queries, output_scores=True)["score"] == [4, 1, 3, 3, 1, 0, 4]


def test_formats_refuse_what_does_not_fit():
    mined = mined_example()
    with pytest.raises(ValueError, match=re.escape("output_format must be one of 'triplet', 'n-tuple'")):
        mined.format("tuple")
    with pytest.raises(ValueError, match=re.escape("queries must have 3 items, one for each query, got 2")):
        mined.format(queries=["a", "b"])
    with pytest.raises(ValueError, match=re.escape("at least 5, got 4")):
        mined.format(documents=["v"] * 4)


# ---- Sizes, kinds of corpus, bad input -----------------------------------------------------------------------------


def test_corpora_that_are_no_tensors(backend, tmp_path):
    query, corpus = torch.randn(5, 8), torch.randn(100, 8)
    rules, positives = NegativeRules(absolute_margin=0.05, near_duplicate=0.8), torch.randint(0, 100, (5, 2))
    kept = np.memmap(tmp_path / "rows", np.float32, "w+", shape=(100, 8))
    kept[:] = corpus.numpy()
    seen = []
    expected = mine_hard_negatives(query, corpus, positives, 4, rules=rules, backend=backend)
    for source in (kept, corpus.numpy()):
        mined = mine_hard_negatives(
            query,
            source,
            positives,
            4,
            rules=rules,
            block_rows=33,
            progress=lambda done, rows: seen.append((done, rows)),
            backend=backend,
        )
        assert torch.equal(mined.indices, expected.indices)
    assert seen[:4] == [(33, 100), (66, 100), (99, 100), (100, 100)]


def test_nothing_to_find(backend):
    some = torch.randn(3, 4)
    for rows, columns, positives in ((0, 5, torch.empty(0, dtype=torch.int64)), (3, 0, torch.full((3,), -1))):
        for sampling in (Sampling(), Sampling("softmax")):
            for near in (None, 0.9):
                mined = mine_hard_negatives(
                    some[:rows],
                    torch.randn(columns, 4),
                    positives,
                    2,
                    rules=NegativeRules(near_duplicate=near),
                    sampling=sampling,
                    backend=backend,
                )
                assert mined.indices.tolist() == [[-1, -1]] * rows
                assert mined.statistics["eligible"].tolist() == [0] * rows
                assert mined.format("labeled-pair") == {"anchor": [], "passage": [], "label": []}
    everything = Pairs(below=-2.0)
    mined = mine_hard_negatives(some, torch.randn(50, 4), torch.arange(3), 2, pairs=everything, backend=backend)
    assert mined.counts.tolist() == [0, 0, 0] and mined.statistics["below"].tolist() == [49] * 3


def test_nan(backend):
    query, corpus = torch.randn(3, 4), torch.randn(12, 4)
    corpus[5] = corpus[7] = torch.nan
    query[2] = torch.nan
    positives = torch.tensor([0, 5, 2])
    mined = mine_hard_negatives(query, corpus, positives, 20, backend=backend)
    assert mined.counts.tolist() == [9, 10, 0]
    assert mined.statistics["positive_rank"][1:].tolist() == [-1, -1]
    rules = NegativeRules(absolute_margin=0.0, near_duplicate=0.99)
    mined = mine_hard_negatives(query, corpus, positives, 20, rules=rules, backend=backend)
    assert mined.counts[1:].tolist() == [0, 0] and mined.counts[0] > 0


def test_gradients_and_autocast_make_no_difference(backend):
    query, corpus = torch.randn(4, 16, requires_grad=True), torch.randn(60, 16, requires_grad=True)
    expected = mine_hard_negatives(query.detach(), corpus.detach(), torch.arange(4), 5, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        mined = mine_hard_negatives(query, corpus, torch.arange(4), 5, backend=backend)
    assert torch.equal(mined.scores, expected.scores) and not mined.scores.requires_grad


def mine(positives=None, n=3, query=None, **options):
    query = torch.randn(4, 8) if query is None else query
    return mine_hard_negatives(
        query, torch.randn(20, 8), torch.arange(4) if positives is None else positives, n, **options
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mine(n=0), ValueError, "num_negatives must be at least 1, got 0"),
        (lambda: mine(n=2.0), TypeError, "num_negatives must be an int, got float"),
        (lambda: mine(block_rows=0), ValueError, "block_rows must be at least 1"),
        (
            lambda: mine(torch.tensor([0, 20, 1, 2])),
            ValueError,
            "positives must be in [0, 20) or -1 for none, got 20 for query 1",
        ),
        (lambda: mine(torch.tensor([[0, -1], [1, 2], [-2, 0], [3, 3]])), ValueError, "got -2 for query 2"),
        (
            lambda: mine((torch.tensor([0, 1, 1, 1, 2]), torch.tensor([5, 99]))),
            ValueError,
            "positives indices must be in [0, 20), got 99 in the list of row 3",
        ),
        (
            lambda: mine((torch.tensor([0, 1, 2]), torch.tensor([5, 9]))),
            ValueError,
            "positives indptr must have shape (5,)",
        ),
        (lambda: mine(torch.arange(3)), ValueError, "positives must have shape (4,) or (4, P), got (3,)"),
        (lambda: mine(torch.arange(4.0)), TypeError, "positives must be int64, got torch.float32"),
        (lambda: mine([0, 1, 2, 3]), TypeError, "positives must be an int64 tensor or (indptr, indices), got list"),
        (
            lambda: mine(torch.tensor([0, 1, -1, 3]), rules=NegativeRules(absolute_margin=0.1)),
            ValueError,
            "at least one for each query where there are margins, got none for query 2",
        ),
        (lambda: mine(torch.tensor([0, -1, 1, 3]), sampling=Sampling("simans")), ValueError, "got none for query 1"),
        (
            lambda: mine(metric="euclid"),
            ValueError,
            "metric must be one of 'dot', 'cosine', 'sqeuclidean', got 'euclid'",
        ),
        (lambda: mine(query=torch.randn(4, 7)), ValueError, "corpus must have the same last dimension as query"),
        (lambda: mine(query=torch.randn(4, 8).half()), TypeError, "corpus must have the same dtype as query"),
        (lambda: mine(pairs=Pairs(fill=0.0)), ValueError, "pairs.fill must be None"),
        (
            lambda: mine(pairs=Pairs(exclude=(torch.tensor([0, 1, 1, 1, 1]), torch.tensor([20])))),
            ValueError,
            "mine_hard_negatives: pairs.exclude indices must be in [0, 20), got 20 in the list of row 0",
        ),
        (
            lambda: mine(pairs=Pairs(below=torch.zeros(3))),
            ValueError,
            "mine_hard_negatives: pairs.below must be one number or",
        ),
        (lambda: mine(pairs="all"), TypeError, "pairs must be Pairs or None, got str"),
        (lambda: NegativeRules(rank_window=(-1, 5)), ValueError, "rank_window[0] must be at least 0, got -1"),
        (lambda: NegativeRules(rank_window=(5, 5)), ValueError, "rank_window[1] must be at least 6, got 5"),
        (
            lambda: NegativeRules(rank_window=(0.4, 0.2)),
            ValueError,
            "rank_window must be two rising shares, got 0.4 and",
        ),
        (lambda: NegativeRules(rank_window=(0.4, 2.0)), ValueError, "rank_window[1] must be in [0, 1], got 2.0"),
        (lambda: NegativeRules(rank_window=(0.4, None)), TypeError, "rank_window[1] must be a number, got None"),
        (lambda: NegativeRules(rank_window=5), TypeError, "rank_window must be (first, end), got 5"),
        (
            lambda: NegativeRules(positive_score="median"),
            ValueError,
            "positive_score must be one of 'min', 'max', 'mean'",
        ),
        (
            lambda: NegativeRules(rank_basis="all"),
            ValueError,
            "rank_basis must be one of 'surviving', 'raw', got 'all'",
        ),
        (lambda: NegativeRules(absolute_margin="1"), TypeError, "absolute_margin must be a number, got str"),
        (lambda: NegativeRules(max_score=math.nan), ValueError, "max_score must be in [-inf, inf], got nan"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
