"""Rank correlation, AUC, CKA, recall of pairs and tables against loops and packages; trec_eval's measures."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.metrics import auc, cka, pair_recall, retrieval_metrics, spearman, table

DOUBLE = torch.float64


# ---- Scores ----------------------------------------------------------------------------------------------------------


def mean_ranks(values):
    return torch.tensor([(sum(v < x for v in values) + sum(v <= x for v in values) + 1) / 2 for x in values.tolist()])


@pytest.mark.parametrize("kinds", [4, 1000])
def test_spearman_is_the_correlation_of_mean_ranks(kinds):
    x, y = torch.randint(kinds, (3, 40)), torch.randint(kinds, (3, 40)) / 7
    expected = [torch.corrcoef(torch.stack([mean_ranks(a), mean_ranks(b)]))[0, 1] for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(spearman(x, y), torch.stack(expected).double())
    torch.testing.assert_close(spearman(x[0], y[0]), expected[0].double())


def test_spearman_of_what_has_none():
    assert spearman(torch.ones(5), torch.arange(5)).isnan()
    assert spearman(torch.tensor([1.0, math.nan, 2.0]), torch.arange(3)).isnan()
    assert spearman(torch.ones(1), torch.ones(1)).isnan() and spearman(torch.ones(0), torch.ones(0)).isnan()


@pytest.mark.parametrize("kinds", [4, 1000])
def test_auc_counts_pairs(kinds):
    scores, labels = torch.randint(kinds, (60,)) / 8, torch.rand(60) < 0.3
    p, n = scores[labels, None], scores[~labels]
    torch.testing.assert_close(auc(scores, labels), ((p > n).double() + (p == n).double() / 2).mean())
    assert torch.equal(auc(scores, labels), auc(scores.double(), labels.float()))
    assert auc(scores, torch.ones(60)).isnan()


def test_cka_of_kernels():
    x = torch.randn(12, 5, dtype=DOUBLE) + 100
    y = x @ torch.randn(5, 9, dtype=DOUBLE) + torch.randn(12, 9, dtype=DOUBLE)
    centre = torch.eye(12, dtype=DOUBLE) - 1 / 12
    k, m = (centre @ z @ z.T @ centre for z in (x, y))
    torch.testing.assert_close(cka(x, y), (k * m).sum() / (k.norm() * m.norm()))

    def hsic(k, m):
        k, m = (each.clone().fill_diagonal_(0) for each in (k, m))
        ones, n = torch.ones(12, dtype=DOUBLE), 12
        outer = (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return torch.trace(k @ m) + outer - 2 / (n - 2) * (ones @ k @ m @ ones)

    k, m = x @ x.T, y @ y.T
    expected = hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()
    torch.testing.assert_close(cka(x, y, debiased=True), expected, rtol=1e-5, atol=1e-6)
    assert cka(x, torch.ones(12, 3)).isnan()


# ---- Pairs -----------------------------------------------------------------------------------------------------------


def ranks(s, same):
    best = s.masked_fill(~same, -math.inf).amax(1)
    rank = 1 + ((s >= best[:, None]) & ~same).sum(1)
    return rank[same.any(1)].double()


def test_recall_of_pairs_in_both_directions():
    image = torch.randn(11, 6)
    labels, captions = torch.arange(11), torch.cat([torch.arange(10).repeat(3), torch.tensor([-1])])
    text = image[captions.clamp_min(0)] + 1.5 * torch.randn(31, 6)
    s = F.normalize(image.double()) @ F.normalize(text.double()).T
    same = labels[:, None] == captions
    found = pair_recall(image, text, labels, captions, k=(1, 3), names=("i", "t"))
    for way, rank in (("i_to_t", ranks(s, same)), ("t_to_i", ranks(s.T, same.T))):
        assert len(rank) in (10, 30)
        for k in (1, 3):
            assert found[f"{way}_R@{k}"] == pytest.approx(100 * float((rank <= k).double().mean()))
        assert found[f"{way}_mean_rank"] == pytest.approx(float(rank.mean()))
        assert found[f"{way}_median_rank"] == float(rank.median())
    assert found["rsum"] == pytest.approx(sum(found[f"{way}_R@{k}"] for way in ("i_to_t", "t_to_i") for k in (1, 3)))


def test_collapsed_embeddings_have_no_recall():
    same = torch.ones(40, 8) * torch.rand(40, 1).add(0.1)
    found = pair_recall(same, same.flip(0))
    assert found["rsum"] == 0 and found["image_to_text_mean_rank"] == 40
    assert pair_recall(torch.eye(4), torch.eye(4))["rsum"] == 600
    assert math.isnan(
        pair_recall(torch.eye(2), torch.eye(2), torch.full((2,), -1), torch.arange(2))["image_to_text_R@1"]
    )


def test_table():
    one = {"ndcg@10": torch.tensor([0.5, math.nan, 0.7]), "R@1": 31.25}
    text = table({"a": one, "b": {"R@1": 40.0, "mean_rank": 3.0}, "c": {"mean_rank": 2.0}}, digits=2)
    assert text.splitlines() == [
        "| | ndcg@10 | R@1 | mean_rank |",
        "|---|---|---|---|",
        "| a | **60.00** | 31.25 | - |",
        "| b | - | **40.00** | 3.00 |",
        "| c | - | - | **2.00** |",
    ]
    assert table({"a": one}, names=["ndcg@10"], percent=False).splitlines()[-1] == "| a | **0.6** |"


# ---- trec_eval -------------------------------------------------------------------------------------------------------


def random_run(queries, documents, kinds):
    """A run and judgements as BEIR has them; few different scores, so that many are equal."""
    generator = torch.Generator().manual_seed(2)

    def draw(count, most):
        chosen = torch.randperm(documents, generator=generator)[:count].tolist()
        return {f"d{one}": int(torch.randint(most, (), generator=generator)) for one in chosen}

    run = {f"q{i}": {name: score / 8 for name, score in draw(60, kinds).items()} for i in range(queries)}
    return run, {f"q{i}": draw(1 + i % 9, 4) for i in range(queries + 3)}


@pytest.mark.parametrize("kinds", [12, 1 << 20])
def test_measures_of_trec_eval(kinds):
    pytrec_eval = pytest.importorskip("pytrec_eval", reason="make peers")
    run, judged = random_run(30, 90, kinds)
    cuts = (1, 5, 20, 100)
    names = {"P": "precision", "recall": "recall", "success": "hit", "map_cut": "map", "ndcg_cut": "ndcg"}
    wanted = {f"{name}.{','.join(map(str, cuts))}" for name in names} | {"recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(judged, wanted).evaluate(run)
    ours = retrieval_metrics(run, judged, k=cuts, ties="trec_eval")
    compared = 0
    for row, query in enumerate(run):
        if not any(judged[query].values()):
            assert ours["ndcg@5"][row].isnan()
            continue
        for name, own in names.items():
            for cut in cuts:
                assert float(ours[f"{own}@{cut}"][row]) == pytest.approx(theirs[query][f"{name}_{cut}"], abs=1e-9)
                compared += 1
        assert float(ours["mrr@100"][row]) == pytest.approx(theirs[query]["recip_rank"], abs=1e-9)
    assert compared > 400


def test_ties_by_name():
    run, judged = {"q": {"d1": 0.5, "d3": 0.5, "d2": 0.5 + 1e-9}}, {"q": {"d3": 1}, "unknown": {"d1": 1}}
    listed, by_name = (float(retrieval_metrics(run, judged, ties=ties)["mrr@10"]) for ties in ("listed", "trec_eval"))
    assert listed == pytest.approx(1 / 3) and by_name == 1
    with pytest.raises(ValueError, match=re.escape('ties must be "listed" where found has no scores')):
        retrieval_metrics([["d1"]], [["d1"]], ties="trec_eval")


X = torch.ones(3, 2)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: spearman(torch.ones(3), torch.ones(4)), ValueError, "spearman: x and y must have one shape (..., N)"),
        (lambda: spearman(torch.ones(3) * 1j, torch.ones(3)), TypeError, "spearman: x must be real numbers"),
        (lambda: auc(torch.ones(3), torch.ones(2)), ValueError, "auc: scores and labels must have one shape (N,)"),
        (lambda: auc(torch.ones(3), torch.arange(3)), ValueError, "auc: labels must be 0 or 1, got 2"),
        (lambda: cka(X, X[:2]), ValueError, "cka: y must have as many rows as x"),
        (lambda: cka(X, X, debiased=True), ValueError, "cka: debiased must be False for fewer than four rows, got 3"),
        (lambda: pair_recall(X, X[:2]), ValueError, "pair_recall: labels must be given where sides have different"),
        (lambda: pair_recall(X, X, torch.arange(3)), ValueError, "labels and col_labels must both be given"),
        (lambda: pair_recall(X, X, k=(0,)), ValueError, "pair_recall: k must be at least 1, got 0"),
        (lambda: pair_recall(X, X, names=("a",)), ValueError, "pair_recall: names must be two strings"),
        (lambda: table([1.0]), TypeError, "table: measures must be a dict {system: measures}"),
        (lambda: table({"a": {"x": 1.0}}, names=["y"]), ValueError, "table: names must be among x, got 'y'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
