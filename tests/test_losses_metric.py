"""Softmaxes of minus squared distances, against distances by differences."""

import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import Pairs, clip, info_nce, nt_xent, sup_con
from contrastive_ops.testing.compare import check, leaf, number, reduced

DOUBLE = torch.float64
N, K, MORE, D = 7, 4, 3, 5
TARGET = torch.arange(N)
METRIC = {"metric": "sqeuclidean"}


def apart(x, y):
    return -(x[:, None] - y).square().sum(2)


def far(*shape):
    """Rows of which a length says nothing."""
    return (torch.randn(*shape, dtype=DOUBLE) + 10).requires_grad_()


def sides(normalize, *tensors):
    return [F.normalize(each, dim=-1) if normalize else each for each in tensors]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("in_batch", [False, True])
def test_info_nce_of_distances(backend, normalize, in_batch):
    query, key, shared, own, scale = far(N, D), far(N + 2, D), far(K, D), far(N, 2, D), number(0.7)
    bias, share = leaf(N + 2 + K), number(0.2)
    x, y, h, o = sides(normalize, query, key, shared, own)
    blocks = [apart(x, y), apart(x, h), -(x[:, None] - o).square().sum(2)]
    logits = scale * torch.cat(blocks, 1) + F.pad(bias, (0, 2))
    if not in_batch:
        logits[:, : N + 2] = logits[:, : N + 2].masked_fill(~torch.eye(N, N + 2, dtype=torch.bool), -torch.inf)
    log_p, part = logits.log_softmax(1), logits != -torch.inf
    even = torch.where(part, log_p, 0.0).sum(1) / part.sum(1)
    truth = (-(1 - share) * log_p[TARGET, TARGET] - share * even).mean()
    given = {"scale": scale, "col_bias": bias, "label_smoothing": share, "normalize": normalize, "in_batch": in_batch}
    value = info_nce(query, key, shared, row_negatives=own, **METRIC, **given, backend=backend)
    check(value, truth, [query, key, shared, own, scale, bias, share])


def test_prototypical_networks(backend):
    """The softmax of minus squared distances from the means of classes, far from the origin in float32."""
    rows, labels = torch.randn(30, D, dtype=DOUBLE) + 1000, torch.arange(30) % 4
    means = torch.stack([rows[labels == each].mean(0) for each in range(4)])
    truth = F.cross_entropy(apart(rows, means), labels)
    options = {"temperature": 1.0, "normalize": False, "backend": backend, **METRIC}
    value = info_nce(rows.float(), means.float(), target=labels, **options)
    torch.testing.assert_close(value.double(), truth, rtol=1e-3, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_clip_of_distances(backend, given, normalize):
    image, text, texts, images, scale = far(N, D), far(N, D), far(K, D), far(MORE, D), number(0.7)
    x, y, t, i = sides(normalize, image, text, texts, images)
    of_images = torch.cat([apart(x, y), *([apart(x, t)] if given[0] else [])], 1)
    of_texts = torch.cat([apart(y, x), *([apart(y, i)] if given[1] else [])], 1)
    truth = (F.cross_entropy(scale * of_images, TARGET) + F.cross_entropy(scale * of_texts, TARGET)) / 2
    negatives = texts if given[0] else None, images if given[1] else None
    options = {"scale": scale, "normalize": normalize, "backend": backend, **METRIC}
    leaves = [image, text, scale, *(each for each in negatives if each is not None)]
    check(clip(image, text, *negatives, **options), truth, leaves)
    value, found = clip(image, text, *negatives, diagnostics=True, **options)
    torch.testing.assert_close(value, truth)
    for measures, similarity in zip(found, (of_images, of_texts), strict=True):
        ranks = (similarity >= similarity.diagonal()[:, None]).sum(1)
        assert torch.equal(measures.rank, ranks)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("ruled", [False, True])
def test_nt_xent_of_distances(backend, ruled, normalize):
    a, b, scale = far(N, D), far(N, D), number(0.7)
    (z,) = sides(normalize, torch.cat([a, b]))
    partner = torch.arange(2 * N).roll(N)
    keep = ~torch.eye(2 * N, dtype=torch.bool)
    bound = -0.01 if normalize else -8.0
    if ruled:
        keep &= (apart(z, z) <= bound) | F.one_hot(partner, 2 * N).bool()
    truth = F.cross_entropy((scale * apart(z, z)).masked_fill(~keep, -torch.inf), partner)
    pairs = Pairs(below=bound) if ruled else None
    value = nt_xent(a, b, scale=scale, pairs=pairs, normalize=normalize, backend=backend, **METRIC)
    check(value, truth, [a, b, scale])


def test_distances_of_16_bits_are_those_of_their_numbers(backend):
    x, y = ((torch.randn(N, D) + 3).to(torch.bfloat16).requires_grad_() for _ in range(2))
    truth = F.cross_entropy(0.5 * apart(x.double(), y.double()), TARGET)
    value = info_nce(x, y, scale=0.5, normalize=False, backend=backend, **METRIC)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-6)
    for each, wanted in zip(*(torch.autograd.grad(v, (x, y)) for v in (value, truth)), strict=True):
        assert each.dtype == torch.bfloat16
        torch.testing.assert_close(each, wanted, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("metric, power", [("sqeuclidean", 2), ("euclidean", 1)])
@pytest.mark.parametrize("normalize", [False, True])
def test_distances_of_pytorch_metric_learning(normalize, metric, power):
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    distance = pytest.importorskip("pytorch_metric_learning.distances").LpDistance
    a, b, labels = far(N, D), far(N, D), torch.arange(N).repeat(2)
    apart_as_theirs = distance(normalize_embeddings=normalize, p=2, power=power)
    options = {"temperature": 0.5, "normalize": normalize, "metric": metric}
    wanted = theirs.NTXentLoss(temperature=0.5, distance=apart_as_theirs)(torch.cat([a, b]), labels)
    check(nt_xent(a, b, **options), wanted, [a, b])
    labels = labels % 3
    wanted = theirs.SupConLoss(temperature=0.5, distance=apart_as_theirs)(torch.cat([a, b]), labels)
    check(sup_con(torch.cat([a, b]), labels, **options), wanted, [a, b])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [False, True])
def test_info_nce_of_euclidean_distances(reduction, normalize, monkeypatch):
    monkeypatch.setattr("contrastive_ops.losses._one_pass.ELEMENTS", 24)  # chunks of a few rows
    query, key, shared, target = far(N, D), far(N + 2, D), far(K, D), torch.arange(N).flip(0)
    x, y = (torch.cat(sides(normalize, *each)) for each in ((query,), (key, shared)))
    logits = -(x[:, None] - y).square().sum(2).sqrt() - 0.3 * F.one_hot(target, N + 2 + K).to(DOUBLE)
    weight = torch.rand(N, dtype=DOUBLE)
    weight[3] = 0.0
    truth = reduced(F.cross_entropy(2 * logits, target, reduction="none"), reduction, weight)
    options = {"target": target, "margin": 0.3, "weight": weight, "reduction": reduction, "normalize": normalize}
    value = info_nce(query, key, shared, scale=2.0, metric="euclidean", **options)
    check(value, truth, [query, key, shared])


def test_scale_of_euclidean_distances_and_rows_that_are_alike():
    query, key, scale = far(N, D), far(N, D), number(1.3)
    distance = (query[:, None] - key).square().sum(2).sqrt()
    value = info_nce(query, key, scale=scale, metric="euclidean", normalize=False)
    check(value, F.cross_entropy(-scale * distance, TARGET), [query, key, scale])
    same = torch.ones(3, D, requires_grad=True)
    value = info_nce(same, same.detach(), metric="euclidean", normalize=False)
    torch.testing.assert_close(value.exp(), torch.tensor(3.0))
    assert not torch.autograd.grad(value, same)[0].any()


def rooted(x, y):
    squared = (x[:, None] - y).square().sum(2)
    return -torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [False, True])
def test_clip_and_nt_xent_of_euclidean_distances(normalize, reduction, weighted, monkeypatch):
    monkeypatch.setattr("contrastive_ops.losses._one_pass.ELEMENTS", 24)
    a, b, scale = far(N, D), far(N, D), number(1.3)
    weight = torch.rand(N, dtype=DOUBLE) if weighted else None
    options = {"scale": scale, "normalize": normalize, "reduction": reduction, "weight": weight, "metric": "euclidean"}
    x, y = sides(normalize, a, b)
    both = [F.cross_entropy(scale * rooted(*each), TARGET, reduction="none") for each in ((x, y), (y, x))]
    check(clip(a, b, **options), reduced((both[0] + both[1]) / 2, reduction, weight), [a, b, scale])
    z, partner = torch.cat(sides(normalize, a, b)), torch.arange(2 * N).roll(N)
    logits = (scale * rooted(z, z)).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    truth = F.cross_entropy(logits, partner, reduction="none")
    twice = None if weight is None else weight.repeat(2)
    check(nt_xent(a, b, **options), reduced(truth, reduction, twice), [a, b, scale])


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean"])
@pytest.mark.parametrize("positives", ["mean_log", "log_mean"])
@pytest.mark.parametrize("with_columns", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_sup_con_of_distances(normalize, with_columns, positives, metric, monkeypatch):
    monkeypatch.setattr("contrastive_ops.losses._one_pass.ELEMENTS", 24)
    x, y, scale = far(9, D), far(6, D), number(0.7)
    labels, col_labels = torch.tensor([0, 1, 0, 2, -1, 1, 3, 0, -1]), torch.tensor([1, 0, 0, -1, 2, 1])
    weight = torch.rand(9, dtype=DOUBLE)
    rows, columns = sides(normalize, x, y if with_columns else x)
    known = col_labels if with_columns else labels
    itself = torch.zeros(9, len(known), dtype=torch.bool) if with_columns else torch.eye(9, dtype=torch.bool)
    logits = scale * (apart if metric == "sqeuclidean" else rooted)(rows, columns)
    log_p = logits.masked_fill(itself, -torch.inf).log_softmax(1)
    same = (labels[:, None] == known) & (labels[:, None] != -1) & ~itself
    count = same.sum(1)
    if positives == "mean_log":
        losses = -log_p.masked_fill(~same, 0.0).sum(1) / count.clamp_min(1)
    else:
        losses = count.clamp_min(1).log() - log_p.masked_fill(~same, -1e30).logsumexp(1)
    counted = count > 0
    truth = (losses * weight)[counted].sum() / weight[counted].sum()
    others = (y, col_labels) if with_columns else (None, None)
    options = {"scale": scale, "weight": weight, "normalize": normalize, "positives": positives, "metric": metric}
    check(sup_con(x, labels, *others, **options), truth, [x, scale, *([y] if with_columns else [])])
    total = sup_con(x, labels, *others, **{**options, "weight": None, "reduction": "sum"})
    torch.testing.assert_close(total, losses[counted].sum())


def test_sup_con_of_squared_distances_takes_rules_and_biases(backend):
    x, labels, bias = far(9, D), torch.arange(9) % 3, leaf(9)
    logits = (0.7 * apart(x, x) + bias).masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf)
    same = (labels[:, None] == labels) & ~torch.eye(9, dtype=torch.bool)
    log_p = logits.masked_fill((apart(x, x) > -6.0) & ~same, -torch.inf).log_softmax(1)
    truth = -log_p.masked_fill(~same, 0.0).sum(1) / 2
    options = {"scale": 0.7, "normalize": False, "reduction": "none", "metric": "sqeuclidean", "col_bias": bias}
    value = sup_con(x, labels, pairs=Pairs(below=-6.0), backend=backend, **options)
    check(value, truth, [x, bias])


def test_no_positives_or_columns_by_distance():
    for metric in ("sqeuclidean", "euclidean"):
        x = torch.randn(4, D, requires_grad=True)
        alone = sup_con(x, torch.arange(4), metric=metric)
        assert alone == 0 and not torch.autograd.grad(alone, x)[0].any()
        assert sup_con(x, torch.arange(4), x[:0], torch.arange(0), metric=metric) == 0
        assert sup_con(x[:0], torch.arange(0), metric=metric) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"label_smoothing": 0.1}, "label_smoothing must be 0.0 with metric='euclidean', got 0.1"),
        ({"pairs": Pairs(diagonal=0)}, "pairs must be None with metric='euclidean'"),
        ({"in_batch": False}, "in_batch must be True with metric='euclidean', got False"),
        ({"reduction": "none"}, "reduction must be 'mean' or 'sum' with metric='euclidean', got 'none'"),
        ({"diagnostics": True}, "diagnostics must be False"),
        ({"col_bias": torch.zeros(3)}, "col_bias must be None"),
        ({"scale": torch.ones(3)}, "scale must be one number"),
    ],
)
def test_what_euclidean_distances_do_not_take(options, message):
    with pytest.raises(NotImplementedError, match="info_nce: " + re.escape(message)):
        info_nce(torch.randn(3, 4), torch.randn(3, 4), metric="euclidean", **options)
    if "in_batch" in options:
        return
    x = torch.randn(3, 4)
    for loss in (clip, nt_xent):
        with pytest.raises(NotImplementedError, match=f"{loss.__name__}: " + re.escape(message)):
            loss(x, x, metric="euclidean", **options)
    if not {"label_smoothing", "diagnostics"} & set(options):
        with pytest.raises(NotImplementedError, match="sup_con: " + re.escape(message)):
            sup_con(x, torch.zeros(3, dtype=torch.int64), metric="euclidean", **options)


def test_clip_by_distance_has_no_negatives_of_its_own():
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match="clip: text_negatives must be None with metric='euclidean'"):
        clip(x, x, x, metric="euclidean")


@pytest.mark.parametrize("loss", [info_nce, clip, nt_xent, sup_con])
def test_a_metric_that_there_is_not(loss):
    message = f"{loss.__name__}: metric must be one of 'dot', 'sqeuclidean', 'euclidean', got 'cosine'"
    with pytest.raises(ValueError, match=message):
        loss(torch.randn(3, 4), torch.arange(3) if loss is sup_con else torch.randn(3, 4), metric="cosine")
