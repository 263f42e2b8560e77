"""Matryoshka losses against loops over prefixes: dense formulas, the losses themselves, sentence-transformers."""

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import Pairs, nn
from contrastive_ops.losses import matryoshka_clip, matryoshka_info_nce, matryoshka_nt_xent
from contrastive_ops.testing.compare import check, leaf, number, reduced
from contrastive_ops.testing.samples import relative_error

INF = float("inf")
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def prefix(z, d, normalize):
    return F.normalize(z[:, :d], dim=1) if normalize else z[:, :d]


def rows_of(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


def info_nce_rows(query, key, dims, weights, scale, target, normalize=True, left_out=None):
    total = 0.0
    for d, w in zip(dims, weights, strict=True):
        logits = scale * (prefix(query, d, normalize) @ prefix(key, d, normalize).T)
        if left_out is not None:
            logits = logits.masked_fill(left_out, -INF)
        total = total + w * rows_of(logits, target)
    return total


def clip_rows(image, text, dims, weights, scale, normalize=True, left_out=None):
    total, own = 0.0, torch.arange(len(image))
    for d, w in zip(dims, weights, strict=True):
        logits = scale * (prefix(image, d, normalize) @ prefix(text, d, normalize).T)
        if left_out is not None:
            logits = logits.masked_fill(left_out, -INF)
        total = total + w * (rows_of(logits, own) + rows_of(logits.T, own)) / 2
    return total


def nt_xent_rows(z0, z1, dims, weights, scale, normalize=True):
    total, count = 0.0, len(z0)
    for d, w in zip(dims, weights, strict=True):
        z = prefix(torch.cat([z0, z1]), d, normalize)
        logits = (scale * (z @ z.T)).masked_fill(torch.eye(2 * count, dtype=torch.bool), -INF)
        total = total + w * rows_of(logits, (torch.arange(2 * count) + count) % (2 * count))
    return total


DIMS, WEIGHTS = (3, 8, 19), (1.0, 0.5, 2.0)


@REDUCTIONS
@pytest.mark.parametrize("normalize", [False, True])
def test_info_nce(reduction, normalize, backend):
    query, key, scale = leaf(40, 21), leaf(55, 21), number(2.5)
    target, weight = torch.randint(55, (40,)), torch.rand(40, dtype=torch.float64).requires_grad_()
    truth = info_nce_rows(query, key, DIMS, WEIGHTS, scale, target, normalize)
    value = matryoshka_info_nce(
        query,
        key,
        dims=DIMS,
        dim_weights=WEIGHTS,
        target=target,
        scale=scale,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
    )
    check(value, reduced(truth, reduction, weight), [query, key, scale, weight])


@REDUCTIONS
@pytest.mark.parametrize("normalize", [False, True])
def test_clip(reduction, normalize, backend):
    image, text, temperature = leaf(40, 21), leaf(40, 21), number(0.4)
    weight = torch.rand(40, dtype=torch.float64).requires_grad_()
    truth = clip_rows(image, text, DIMS, WEIGHTS, 1 / temperature, normalize)
    value = matryoshka_clip(
        image,
        text,
        dims=DIMS,
        dim_weights=WEIGHTS,
        temperature=temperature,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
    )
    check(value, reduced(truth, reduction, weight), [image, text, temperature, weight])


@REDUCTIONS
@pytest.mark.parametrize("count", [1, 2, 40, 130])
def test_nt_xent(reduction, count, backend):
    z0, z1, temperature = leaf(count, 21), leaf(count, 21), number(0.4)
    truth = nt_xent_rows(z0, z1, DIMS, (1.0, 1.0, 1.0), 1 / temperature)
    value = matryoshka_nt_xent(z0, z1, dims=DIMS, temperature=temperature, reduction=reduction, backend=backend)
    check(value, reduced(truth, reduction), [z0, z1, temperature])


def test_false_negatives_by_id(backend):
    """Texts of one image are no negatives of each other, and an image keeps its own text."""
    image, text, ids = leaf(40, 21), leaf(40, 21), torch.randint(-1, 12, (40,))
    equal = (ids[:, None] == ids) & (ids[:, None] != -1)
    left_out = equal & ~torch.eye(40, dtype=torch.bool)
    pairs = Pairs(differ=(ids, ids))
    truth = clip_rows(image, text, DIMS, WEIGHTS, 3.0, left_out=left_out)
    options = {"dims": DIMS, "dim_weights": WEIGHTS, "scale": 3.0, "pairs": pairs, "reduction": "none"}
    check(matryoshka_clip(image, text, backend=backend, **options), truth, [image, text])
    one_way = info_nce_rows(image, text, DIMS, WEIGHTS, 3.0, torch.arange(40), left_out=left_out)
    check(matryoshka_info_nce(image, text, backend=backend, **options), one_way, [image, text])


def test_defaults_are_those_of_the_plain_losses(backend):
    a, b = leaf(12, 8), leaf(12, 8)
    ones, own = (1.0, 1.0), torch.arange(12)
    check(
        matryoshka_info_nce(a, b, dims=(4, 8), backend=backend),
        info_nce_rows(a, b, (4, 8), ones, 1 / 0.07, own).mean(),
        [a, b],
    )
    check(matryoshka_clip(a, b, dims=(4, 8), backend=backend), clip_rows(a, b, (4, 8), ones, 1 / 0.07).mean(), [a, b])
    check(matryoshka_nt_xent(a, b, dims=(4, 8), backend=backend), nt_xent_rows(a, b, (4, 8), ones, 2.0).mean(), [a, b])


def test_a_prefix_of_weight_0_has_no_gradient_of_its_own(backend):
    a, b = leaf(12, 8), leaf(12, 8)
    value = matryoshka_clip(a, b, dims=(2, 5, 8), dim_weights=(1, 0, 0), backend=backend)
    da, db = torch.autograd.grad(value, (a, b), retain_graph=True)
    assert (da[:, 2:] == 0).all() and (db[:, 2:] == 0).all()
    check(value, clip_rows(a, b, (2,), (1.0,), 1 / 0.07).mean(), [a, b])


@pytest.mark.parametrize("temperature,noise", [(0.005, 0.8), (0.07, 0.2)])
def test_near_convergence(temperature, noise, backend):
    """Small losses, never negative, with gradients as exact as float32 logits are."""
    a = F.normalize(torch.randn(96, 64, dtype=torch.float64), dim=1)
    b = (a + noise * F.normalize(torch.randn(96, 64, dtype=torch.float64), dim=1)).float().requires_grad_()
    a = a.float().requires_grad_()
    value = matryoshka_info_nce(a, b, dims=(24, 64), temperature=temperature, reduction="none", backend=backend)
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    truth = info_nce_rows(*wide, (24, 64), (1.0, 1.0), 1 / temperature, torch.arange(96))
    assert (value >= 0).all()
    torch.testing.assert_close(value.double(), truth, rtol=2e-6 / temperature, atol=1e-9)
    found, expected = torch.autograd.grad(value.sum(), (a, b)), torch.autograd.grad(truth.sum(), wide)
    for g, t in zip(found, expected, strict=True):
        assert relative_error(g, t) <= 2e-6 / temperature


def test_modules_learn_their_temperature():
    a = F.normalize(torch.randn(32, 8), dim=1)
    loss = nn.MatryoshkaCLIPLoss(1.0, dims=(4, 8))
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    before = loss(a, a).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss(a, a).backward()
        optimizer.step()
    assert loss(a, a).item() < before and loss.logit_scale.item() > 0
    assert list(loss.state_dict()) == ["logit_scale"]


# ---- sentence-transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [0, 1])
@pytest.mark.parametrize("weights", [None, [1, 0.5, 0.25]])
def test_matryoshka_loss_of_sentence_transformers(negatives, weights, backend):
    """MatryoshkaLoss over MultipleNegativesRankingLoss, of a model that looks embeddings up."""
    models = pytest.importorskip("sentence_transformers.losses")
    sentence_transformers = pytest.importorskip("sentence_transformers")

    class Lookup(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(64, 24)

        def forward(self, features):
            return {**features, "sentence_embedding": self.table(features["input_ids"][:, 0])}

    model = sentence_transformers.SentenceTransformer(modules=[Lookup()])
    inner = models.MultipleNegativesRankingLoss(model, scale=20.0)
    theirs = models.MatryoshkaLoss(model, inner, [24, 12, 6], weights)
    columns = [torch.randperm(64)[:16, None] for _ in range(2 + negatives)]
    table = model[0].table.weight
    expected = theirs([{"input_ids": each} for each in columns], torch.zeros(16))
    query, *keys = (table[each[:, 0]] for each in columns)
    value = matryoshka_info_nce(
        query,
        torch.cat(keys),
        dims=(6, 12, 24),
        dim_weights=None if weights is None else weights[::-1],
        scale=20.0,
        backend=backend,
    )
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    found, truth = (torch.autograd.grad(each, table)[0] for each in (value, expected))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-6)


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"dims": (4, 2)}, ValueError, r"dims must be one or more ascending lengths >= 1, got \(4, 2\)"),
        ({"dims": ()}, ValueError, r"dims must be one or more ascending lengths >= 1, got \(\)"),
        ({"dims": (4, 9)}, ValueError, "dims must be at most the last dimension of"),
        ({"dim_weights": (1.0,)}, ValueError, "dim_weights must be as many as dims, got 1 weights and 2 dims"),
        ({"dim_weights": (1.0, -1.0)}, ValueError, "dim_weights must be in"),
        ({"dim_weights": (1.0, INF)}, ValueError, "dim_weights must be in"),
        ({"dim_weights": (1.0, "a")}, TypeError, "dim_weights must be a number, got str"),
        ({"temperature": 0.0}, ValueError, "temperature must be in"),
        ({"scale": torch.ones(5)}, ValueError, "scale must be one number, got a tensor"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
    ],
)
@pytest.mark.parametrize("loss", [matryoshka_info_nce, matryoshka_clip, matryoshka_nt_xent])
def test_wrong_arguments(loss, options, error, message):
    with pytest.raises(error, match=f"{loss.__name__}: {message}"):
        loss(torch.randn(5, 8), torch.randn(5, 8), **{"dims": (4, 8), **options})


def test_partners_and_targets():
    a, b = torch.randn(5, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match="matryoshka_info_nce: key must have at least as many rows as query"):
        matryoshka_info_nce(a, b, dims=(8,))
    with pytest.raises(ValueError, match=r"matryoshka_info_nce: target must be in \[0, 4\), got 4"):
        matryoshka_info_nce(a, b, dims=(8,), target=torch.arange(5))
    with pytest.raises(ValueError, match="matryoshka_clip: text must have the same shape as image"):
        matryoshka_clip(a, b, dims=(8,))
    with pytest.raises(TypeError, match="matryoshka_clip: pairs must be Pairs or None, got bool"):
        matryoshka_clip(a, a, dims=(8,), pairs=True)
