"""Miners, the memory and the losses of what they pick against pytorch-metric-learning's own."""

import warnings

import pytest
import torch

original = pytest.importorskip("pytorch_metric_learning.losses")
miners = pytest.importorskip("pytorch_metric_learning.miners")
from pytorch_metric_learning import distances, reducers  # noqa: E402

from contrastive_ops.integrations import _originals  # noqa: E402
from contrastive_ops.integrations import _pytorch_metric_learning_miners as rules  # noqa: E402
from contrastive_ops.integrations import pytorch_metric_learning as ours  # noqa: E402

COSINE, DOT = {"distance": distances.CosineSimilarity()}, {"distance": distances.DotProductSimilarity()}
PLAIN = {"distance": distances.DotProductSimilarity(normalize_embeddings=False)}
CONTRASTIVE = {"pos_margin": 0.9, "neg_margin": 0.1}
MEAN = {"reducer": reducers.MeanReducer()}


def batches(count, rows=40, dtype=torch.float64):
    torch.manual_seed(0)
    for _ in range(count):
        yield torch.randn(rows, 8, dtype=dtype, requires_grad=True), torch.randint(-1, 6, (rows,))


def curve(modules, name, options, miner=None, memory=False):
    """Values and gradients of some batches, of pairs that a miner picks, among the batch or a memory of 70 rows."""
    loss = getattr(modules[0], name)(**options)
    found = []
    miner = getattr(modules[1], miner[0])(**miner[1]) if miner else None
    whole = modules[0].CrossBatchMemory(loss, 8, memory_size=70, miner=miner) if memory else loss
    for x, labels in batches(4 if memory else 2):
        torch.manual_seed(1)
        value = whole(x, labels) if memory or not miner else whole(x, labels, miner(x, labels))
        value.backward()
        found += [value.detach(), x.grad]
    return found


def check_curve(*arguments, tolerance=1e-11, **options):
    mine = curve((ours, ours), *arguments, **options)
    theirs = curve((original, miners), *arguments, **options)
    assert any(value.any() for value in theirs)
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1e-3, float(expected.abs().max())))


@pytest.fixture(autouse=True)
def fused():
    """Nothing here may run the original."""
    _originals._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has no fused form")
        yield


MULTI = ("MultiSimilarityMiner", {"epsilon": 0.2})
LOSSES = [
    ("SupConLoss", {}),
    ("SupConLoss", DOT),
    ("NTXentLoss", {"temperature": 0.5}),
    ("MultiSimilarityLoss", {}),
    ("MultiSimilarityLoss", PLAIN | {"alpha": 1, "beta": 2, "base": 0.2}),
    ("ContrastiveLoss", CONTRASTIVE | COSINE),
    ("ContrastiveLoss", CONTRASTIVE | COSINE | MEAN),
]


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(("name", "options"), LOSSES)
def test_losses_of_all_pairs_and_of_pairs_by_rules(name, options, memory):
    check_curve(name, options, None, memory, tolerance=1e-6 if name == "NTXentLoss" else 1e-11)
    same = {"distance": options.get("distance", COSINE["distance"])}
    check_curve(name, options, (MULTI[0], MULTI[1] | same), memory, tolerance=1e-6 if name == "NTXentLoss" else 1e-11)
    pairs = ("PairMarginMiner", {"pos_margin": 0.5, "neg_margin": 0.1} | same)
    check_curve(name, options, pairs, memory, tolerance=1e-6 if name == "NTXentLoss" else 1e-11)


EASY_HARD = [("hard", "hard"), ("easy", "semihard"), ("easy", "easy"), ("semihard", "hard"), ("semihard", "easy")]


@pytest.mark.parametrize("strategies", EASY_HARD)
@pytest.mark.parametrize("distance", [distances.LpDistance(), distances.LpDistance(power=2), *DOT.values()])
def test_extrema_of_rows(strategies, distance):
    options = {"distance": distance, "pos_strategy": strategies[0], "neg_strategy": strategies[1]}
    mine, theirs = (module.BatchEasyHardMiner(**options, collect_stats=True) for module in (ours, miners))
    for x, labels in batches(1):
        for found, expected in zip(mine(x, labels), theirs(x, labels), strict=True):
            assert torch.equal(found, expected)
    for name in ("hardest_triplet", "easiest_pos_pair", "hardest_neg_pair"):
        assert getattr(mine, name) == pytest.approx(getattr(theirs, name), abs=1e-5)


@pytest.mark.parametrize("kind", ["all", "hard", "semihard", "easy"])
@pytest.mark.parametrize("distance", [distances.LpDistance(), *COSINE.values()])
def test_triplets_come_in_the_order_of_the_original(kind, distance, monkeypatch):
    monkeypatch.setattr(rules, "BLOCK_ELEMENTS", 100)
    mine, theirs = (module.TripletMarginMiner(0.3, kind, distance=distance) for module in (ours, miners))
    (x, labels), (y, ref_labels) = batches(2)
    for given in ((x, labels), (x, labels, y, ref_labels)):
        for found, expected in zip(mine(*given), theirs(*given), strict=True):
            assert torch.equal(found, expected) and len(found)


@pytest.mark.parametrize("options", [{}, {"swap": True, "smooth_loss": True}, COSINE, {"triplets_per_anchor": 3}])
@pytest.mark.parametrize("memory", [False, True])
def test_triplet_losses(options, memory):
    if "triplets_per_anchor" in options:
        if memory:
            return  # the memory lists its pairs
        check_curve("TripletMarginLoss", options)
    else:
        check_curve(
            "TripletMarginLoss", options, ("BatchHardMiner", {}), memory and "swap" not in options, tolerance=2e-5
        )


@pytest.mark.parametrize("name", ["CircleLoss", "MarginLoss"])
def test_other_losses_read_the_lists(name, monkeypatch):
    monkeypatch.setattr(rules, "BLOCK_ELEMENTS", 100)
    check_curve(name, {}, ("MultiSimilarityMiner", {}))
    check_curve(name, {}, ("MultiSimilarityMiner", {}), memory=True)


def test_rules_are_for_the_embeddings_that_were_mined():
    (x, labels), (other, _) = batches(2)
    picked = ours.MultiSimilarityMiner()(x, labels)
    assert len(picked) == 4 and picked.suits(distances.CosineSimilarity(), x, x)
    with (
        pytest.warns(UserWarning, match="indices_tuple that no miner of contrastive_ops made"),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always")
        value = ours.SupConLoss()(other, labels, picked)
    assert value == original.SupConLoss()(other, labels, tuple(picked))
    anchors, positives, _, negatives = picked
    assert (labels[anchors] == labels[positives]).all() and (anchors != positives).all() and len(negatives)


@pytest.mark.parametrize("rows", [40, 70])
def test_lists_of_the_memory_leave_out_the_rows_own_copies(rows):
    """Where the memory begins again in the middle of a batch, too."""
    mine, theirs = (module.CrossBatchMemory(each, 8, memory_size=70) for module, each in losses_of_both())
    for x, labels in batches(3, rows, torch.float32):
        given = []
        for memory in (mine, theirs):
            memory.add_to_memory(x, labels, len(x))
            kept = (memory.embedding_memory, memory.label_memory)
            given.append(memory.create_indices_tuple(x, labels, *kept, None, True))
        assert isinstance(given[0], rules.Picked) and len(given[0][0]) > 0
        for (a, b), (c, d) in zip(pairs_of(given[0]), pairs_of(given[1]), strict=True):
            assert set(zip(a.tolist(), b.tolist(), strict=True)) == set(zip(c.tolist(), d.tolist(), strict=True))


def losses_of_both():
    return ((module, module.ContrastiveLoss(**COSINE)) for module in (ours, original))


def pairs_of(lists):
    a, p, b, n = lists
    return (a, p), (b, n)


def test_numbers_of_pairs_are_counted_where_they_are_asked_for():
    mine, theirs = (module.MultiSimilarityMiner(collect_stats=True) for module in (ours, miners))
    for x, labels in batches(1):
        mine(x, labels), theirs(x, labels)
    assert (mine.num_pos_pairs, mine.num_neg_pairs) == (theirs.num_pos_pairs, theirs.num_neg_pairs) != (0, 0)


@pytest.mark.parametrize("collect_stats", [False, True])
@pytest.mark.parametrize("name", ["MultiSimilarityMiner", "PairMarginMiner"])
def test_miners_of_a_distance_are_the_originals(name, collect_stats):
    """Their lists pass through what counts pairs, too."""
    options = {"distance": distances.LpDistance(), "collect_stats": collect_stats}
    options |= {"pos_margin": 0.5, "neg_margin": 1.2} if name == "PairMarginMiner" else {}
    mine, theirs = (getattr(module, name)(**options) for module in (ours, miners))
    for x, labels in batches(1):
        with pytest.warns(UserWarning, match="distance=LpDistance has no fused form"):
            found = mine(x, labels)
        expected = theirs(x, labels)
        assert type(found) is tuple and all(map(torch.equal, found, expected)) and len(found[0])


@pytest.mark.parametrize("labels", [torch.zeros(6, dtype=torch.long), torch.arange(6)])
def test_one_class_and_classes_of_one(labels):
    x = torch.randn(6, 4, requires_grad=True)
    for name, options in (
        ("SupConLoss", {}),
        ("MultiSimilarityLoss", {}),
        ("ContrastiveLoss", COSINE),
        ("NTXentLoss", {}),
    ):
        picked = [module.MultiSimilarityMiner()(x, labels) for module in (ours, miners)]
        pair = [getattr(module, name)(**options) for module in (ours, original)]
        for mine, theirs in ((None, None), picked):
            torch.testing.assert_close(pair[0](x, labels, mine), pair[1](x, labels, theirs))


@pytest.mark.parametrize("options", [COSINE, CONTRASTIVE | COSINE, {"distance": distances.DotProductSimilarity()}])
@pytest.mark.parametrize("against", [False, True])
def test_few_pairs_take_their_matrix_and_many_a_sweep(options, against, monkeypatch):
    margins = {"pos_margin": 0.8, "neg_margin": 0.1}
    mine, theirs = (module.ContrastiveLoss(**margins | options) for module in (ours, original))
    x, labels = torch.randn(40, 9), torch.randint(0, 6, (40,))
    other = (None, torch.randn(23, 9), torch.randint(0, 6, (23,))) if against else ()
    found = []
    for few, loss in ((ours.FEW_PAIRS, mine), (0, mine), (0, theirs)):
        monkeypatch.setattr(ours, "FEW_PAIRS", few)
        leaf = x.clone().requires_grad_()
        swept = []
        monkeypatch.setattr(type(mine), "folded", count_calls(type(mine).folded, swept))
        value = loss(leaf, labels, *other)
        value.backward()
        found.append((value.detach(), leaf.grad))
        assert len(swept) == (few == 0 and loss is mine)
        monkeypatch.undo()
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def count_calls(function, calls):
    def call(*args):
        calls.append(args)
        return function(*args)

    return call
