"""Sampling of negatives: the hash, the frequencies, and what the result must not depend on."""

import itertools
import math
import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.mining import _sampling
from contrastive_ops.mining.hard_negatives import NegativeRules, Sampling, mine_hard_negatives

STRATEGIES = ["uniform", "softmax", "simans"]


def test_hash_is_splitmix64():
    """The first numbers of the generator with seed 0, as published with it."""
    states = torch.arange(1, 4) * _sampling._STEP
    found = [int(z) % (1 << 64) for z in _sampling.mix(states)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_uniform_numbers():
    """Inside (0, 1) even at the ends of the hash, evenly spread, and different for every seed and id."""
    u = _sampling.uniform(3, torch.arange(200), torch.arange(200).expand(200, 200))
    assert u.unique().numel() == u.numel()
    counts = torch.histc(u, 100, 0, 1)
    assert ((counts - 400).square() / 400).sum() < 150  # chi-square of 99 degrees: 99.9% are below
    # Neighbours in either id are not correlated: 4 standard deviations of 40,000 products.
    v = (u - 0.5) * math.sqrt(12)
    assert (v[1:] * v[:-1]).mean().abs() < 0.02 and (v[:, 1:] * v[:, :-1]).mean().abs() < 0.02
    assert (v * _sampling_numbers(4)).mean().abs() < 0.02 and (v * v.T).triu(1).sum().abs() / 19900 < 0.03
    ends = torch.tensor([0, -1, 1 << 62, -(1 << 63), (1 << 63) - 1])
    for seed in (0, -1, 1 << 70):
        u = _sampling.uniform(seed, ends, ends.expand(5, 5))
        assert ((u > 0) & (u < 1)).all() and u.unique().numel() == 25


def test_queries_without_labels_need_no_placeholder():
    query, corpus = torch.randn(5, 8), torch.randn(40, 8)
    for options in ({}, {"rules": NegativeRules(max_score=0.3), "sampling": Sampling("uniform", seed=3)}):
        found = mine_hard_negatives(query, corpus, num_negatives=4, metric="dot", **options)
        placed = mine_hard_negatives(query, corpus, torch.full((5, 2), -1), 4, metric="dot", **options)
        assert torch.equal(found.indices, placed.indices) and torch.equal(found.scores, placed.scores)
    assert torch.equal(
        mine_hard_negatives(query, corpus, num_negatives=4, metric="dot").indices, (query @ corpus.T).topk(4).indices
    )
    with pytest.raises(ValueError, match="positives must name at least one for each query where there are margins"):
        mine_hard_negatives(query, corpus, rules=NegativeRules(relative_margin=0.1))


def _sampling_numbers(seed):
    u = _sampling.uniform(seed, torch.arange(200), torch.arange(200).expand(200, 200))
    return (u - 0.5) * math.sqrt(12)


@pytest.mark.parametrize("lowest", [-(1 << 63), (1 << 63) - 1])
def test_no_hash_gives_0_or_1(monkeypatch, lowest):
    """A logarithm of 0 would put a candidate first or last for good."""
    monkeypatch.setattr(_sampling, "mix", lambda z: torch.full_like(z, -1 if lowest > 0 else 0))
    u = _sampling.uniform(0, torch.arange(1), torch.arange(1).view(1, 1))
    assert 0 < float(u) < 1 and torch.isfinite(-(-u.log()).log()).all()


def probabilities(weights, n):
    """P(set) of drawing n without replacement, one after another, with probabilities proportional to exp(weights)."""
    total = {}
    for order in itertools.permutations(range(len(weights)), n):
        p, left = 1.0, sum(weights)
        for j in order:
            p, left = p * weights[j] / left, left - weights[j]
        total[tuple(sorted(order))] = total.get(tuple(sorted(order)), 0.0) + p
    return total


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_frequencies(strategy):
    """Sets of two out of five come as often as drawing one after another gives them; chi-square with 9 degrees."""
    queries, scores, p = 4000, torch.tensor([0.9, 0.7, 0.6, 0.3, 0.1]), 1.0
    sampling = Sampling(strategy, seed=5, temperature=0.4, a=4.0, b=-0.3)
    corpus = torch.cat([scores, torch.tensor([p])])[:, None]
    mined = mine_hard_negatives(
        torch.ones(queries, 1), corpus, torch.full((queries,), 5), 2, sampling=sampling, metric="dot"
    )
    weights = {
        "uniform": torch.ones(5),
        "softmax": (scores / 0.4).exp(),
        "simans": (-4 * (scores - p + 0.3) ** 2).exp(),
    }[strategy]
    expected = probabilities(weights.tolist(), 2)
    found = dict.fromkeys(expected, 0)
    for row in mined.indices.sort(1).values.tolist():
        found[tuple(row)] += 1
    chi = sum((found[s] - queries * q) ** 2 / (queries * q) for s, q in expected.items())
    assert chi < 27.9  # 99.9% are below
    # Not uniform by accident: the same counts are far from uniform where weights are not.
    flat = sum((count - queries / 10) ** 2 / (queries / 10) for count in found.values())
    assert (flat < 27.9) == (strategy == "uniform")


def example():
    """Queries between their two positives, which most of the corpus is below."""
    corpus, positives = torch.randn(150, 8), torch.randint(0, 150, (12, 2))
    return F.normalize(corpus[positives], dim=2).sum(1), corpus, positives


def mine(query, corpus, positives, strategy, *, near=None, ids=None, seed=1, **options):
    sampling = Sampling(strategy, seed=seed, temperature=0.2, a=9.0, b=-0.2, ids=ids)
    rules = NegativeRules(absolute_margin=0.01, rank_window=(2, 60), near_duplicate=near)
    return mine_hard_negatives(query, corpus, positives, 6, rules=rules, sampling=sampling, **options)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("near", [None, 0.6])
def test_independent_of_blocks_batches_and_order(backend, strategy, near):
    query, corpus, positives = example()
    whole = mine(query, corpus, positives, strategy, near=near, backend=backend)
    assert torch.equal(whole.indices, mine(query, corpus, positives, strategy, near=near, backend=backend).indices)
    assert (whole.scores.diff(dim=1) <= 0).all()
    for block_rows in (29, 140):
        again = mine(query, corpus, positives, strategy, near=near, block_rows=block_rows, backend=backend)
        assert torch.equal(again.indices, whole.indices)
    # Batches of queries, as ranks would mine them, in another order.
    order = torch.randperm(12)
    for rows in order.split(5):
        ids = (rows, torch.arange(150))
        part = mine(query[rows], corpus, positives[rows], strategy, near=near, ids=ids, backend=backend)
        assert torch.equal(part.indices, whole.indices[rows])
    # Documents in another order: the same ones, by their ids.
    moved = torch.randperm(150)
    place = moved.argsort()
    ids = (torch.arange(12), moved)
    part = mine(query, corpus[moved], place[positives], strategy, near=near, ids=ids, backend=backend)
    assert torch.equal(moved[part.indices], whole.indices)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_seeds(strategy):
    query, corpus, positives = example()
    first, second = (mine(query, corpus, positives, strategy, seed=seed).indices for seed in (1, 2))
    assert not torch.equal(first, second)
    # Neither torch's generator nor Python's has a part in it.
    torch.manual_seed(99)
    assert torch.equal(mine(query, corpus, positives, strategy, seed=1).indices, first)


def test_every_negative_once_and_from_the_window(backend):
    query, corpus, positives = example()
    top = mine(query, corpus, positives, "top", backend=backend)
    for strategy in STRATEGIES:
        mined = mine(query, corpus, positives, strategy, backend=backend)
        for row, best in zip(mined.indices.tolist(), top.indices.tolist(), strict=True):
            assert len(set(row)) == 6 and -1 not in row
            assert row != best
        drawn = mine_hard_negatives(query, corpus, positives, 6, sampling=Sampling(strategy), backend=backend)
        window = mine_hard_negatives(query, corpus, positives, 60, backend=backend).indices
        assert all(set(a) <= set(b) for a, b in zip(drawn.indices.tolist(), window.tolist(), strict=True))


def test_limits_of_the_weights(backend):
    """A small temperature takes the best; a large a takes those next to the preferred score."""
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 1.0])[:, None]
    query, positive = torch.ones(5, 1), torch.full((5,), 6)
    for sampling, expected in (
        (Sampling("softmax", temperature=1e-6), [0, 1]),
        (Sampling("simans", a=1e6), [0, 1]),
        (Sampling("simans", a=1e6, b=-0.46), [3, 4]),
    ):
        mined = mine_hard_negatives(query, scores, positive, 2, sampling=sampling, metric="dot", backend=backend)
        assert mined.indices.tolist() == [expected] * 5


def test_infinite_scores(backend):
    """No number of a candidate is NaN: it is drawn last, not lost."""
    corpus = torch.tensor([[torch.inf], [2.0], [3.0], [1.0]])
    for strategy in STRATEGIES:
        mined = mine_hard_negatives(
            torch.ones(1, 1), corpus, torch.tensor([3]), 3, sampling=Sampling(strategy), metric="dot", backend=backend
        )
        assert mined.indices.tolist() == [[0, 2, 1]]
    # Of equal keys the lower id comes first, wherever its row is.
    corpus = torch.tensor([[torch.inf], [torch.inf], [torch.inf], [1.0]])
    sampling = Sampling("softmax", ids=(torch.arange(1), torch.tensor([8, 4, 6, 0])))
    mined = mine_hard_negatives(
        torch.ones(1, 1), corpus, torch.tensor([3]), 2, sampling=sampling, metric="dot", backend=backend
    )
    assert mined.indices.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Sampling("random"), ValueError, "strategy must be one of 'top', 'uniform', 'softmax', 'simans'"),
        (lambda: Sampling(temperature=0.0), ValueError, "temperature must be in (0, inf), got 0.0"),
        (lambda: Sampling(temperature=-1), ValueError, "temperature must be in (0, inf), got -1"),
        (lambda: Sampling(temperature=math.nan), ValueError, "temperature must be in (0, inf), got nan"),
        (lambda: Sampling(a=-1.0), ValueError, "a must be in [0, inf), got -1.0"),
        (lambda: Sampling(b="0"), TypeError, "b must be a number, got str"),
        (lambda: Sampling(seed=0.5), TypeError, "seed must be an int, got float"),
        (lambda: Sampling(ids=torch.arange(3)), TypeError, "ids must be (query_ids, corpus_ids) or None"),
        (
            lambda: mine(*example(), "uniform", ids=(torch.arange(12), torch.arange(9))),
            ValueError,
            "mine_hard_negatives: sampling.ids corpus_ids must have shape (150,), got (9,)",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()
