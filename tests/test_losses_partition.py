"""GTE, Qwen3's mask and GISTEmbed against dense float64 formulas and sentence-transformers."""

import itertools
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from torch.nn import functional as F

from contrastive_ops import info_nce
from contrastive_ops.losses.gist import gist, gte
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, clustered_pairs, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
QWEN3 = ("query_to_doc", "query_to_query", "doc_to_doc")
SUBSETS = [("query_to_doc", *rest) for k in range(4) for rest in itertools.combinations(DIRECTIONS[1:], k)]
OFF = (0.0, False, True, True)  # margin 0, not relative, both contrasts
FUZZ = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def unit(t):
    return F.normalize(t, dim=-1)


def dense_gte(query, document, hard, scale, directions, partition="joint", margin=None, normalize=True):
    """Rows of the loss, from the definition: every block written out, masked and put into one softmax or several."""
    q, d = (unit(t) if normalize else t for t in (query, document))
    n, eye = len(q), torch.eye(len(q), dtype=torch.bool)
    columns, own = d, eye
    if hard is not None:
        flat = hard.flatten(0, 1) if hard.dim() == 3 else hard
        columns = torch.cat([d, unit(flat) if normalize else flat])
        of_hard = eye.repeat_interleave(hard.shape[1], 1) if hard.dim() == 3 else torch.zeros(n, len(flat)).bool()
        own = torch.cat([eye, of_hard], 1)
    none = torch.zeros_like(eye)
    # similarities, what is never compared, where the positive stands
    blocks = {
        "query_to_doc": (q @ columns.T, torch.zeros_like(own), F.pad(eye, (0, len(columns) - n))),
        "query_to_query": (q @ q.T, eye, none),
        "doc_to_query": (d @ q.T, none, eye),
        "doc_to_doc": (d @ columns.T, own, torch.zeros_like(own)),
    }
    positive = (q * d).sum(1)
    by_row = scale.expand(n) if isinstance(scale, torch.Tensor) else torch.full((n,), scale, dtype=q.dtype)
    logits = []
    for name in directions:
        similarity, drop, is_positive = blocks[name]
        if margin is not None:
            drop = drop | ((similarity > (positive + margin)[:, None]) & ~is_positive)
        logits.append((by_row[:, None] * similarity).masked_fill(drop, -torch.inf))
    if partition == "joint":
        return torch.cat(logits, 1).logsumexp(1) - by_row * positive
    return torch.stack([each.logsumexp(1) - by_row * positive for each in logits]).mean(0)


def dense_gist(query, key, guides, negatives, scale, margin, relative, anchors, positives, normalize=True):
    q, k, h = (unit(t) if normalize and t is not None else t for t in (query, key, negatives))
    gq, gk, gh = (unit(g) if g is not None else g for g in guides)
    positive = (gq * gk).sum(1, keepdim=True)
    bound = positive - positive.abs() * margin if relative else positive - margin
    own = torch.eye(len(q), dtype=torch.bool)
    blocks = [(q @ k.T, (gq @ gk.T > bound) & ~own)]
    if anchors:
        blocks.append((q @ q.T, (gq @ gq.T > bound) | own))
    if positives:
        blocks.append((k @ k.T, (gk @ gk.T > bound) | own))
    if negatives is not None:
        blocks.append((q @ h.T, gq @ gh.T > bound))
    by_row = scale.expand(len(q))[:, None] if isinstance(scale, torch.Tensor) else scale
    logits = [(by_row * similarity).masked_fill(drop, -torch.inf) for similarity, drop in blocks]
    return F.cross_entropy(torch.cat(logits, 1), torch.arange(len(q)), reduction="none")


def draw_common(draw):
    """Sizes, scale and weight."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    n, depth = draw(st.integers(1, 17)), draw(st.integers(1, 8))
    by_row, weighted = draw(st.booleans()), draw(st.booleans())
    scale = (torch.rand(n, dtype=DOUBLE) + 1 if by_row else torch.tensor(3.0, dtype=DOUBLE)).requires_grad_()
    return n, depth, scale, torch.rand(n, dtype=DOUBLE, requires_grad=True) if weighted else None


# ---- GTE -------------------------------------------------------------------------------------------------------


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gte(backend, reduction, data):
    draw = data.draw
    n, depth, scale, weight = draw_common(draw)
    query, document = leaf(n, depth), leaf(n, depth)
    hard = {"none": None, "own": leaf(n, draw(st.integers(1, 3)), depth), "shared": leaf(5, depth)}[
        draw(st.sampled_from(["none", "own", "shared"]))
    ]
    partition = draw(st.sampled_from(["joint", "joint", "per_direction"]))
    directions = draw(st.sampled_from([SUBSETS[0], SUBSETS[2]] if partition == "per_direction" else SUBSETS))
    margin, normalize = draw(st.sampled_from([None, 0.1, -0.2])), draw(st.booleans())
    value = gte(
        query,
        document,
        hard,
        partition=partition,
        directions=directions,
        false_negative_margin=margin,
        scale=scale,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
    )
    rows = dense_gte(query, document, hard, scale, directions, partition, margin, normalize)
    leaves = [t for t in (query, document, hard, scale, weight) if t is not None]
    check(value, reduced(rows, reduction, weight), leaves)


@pairwise(directions=SUBSETS, hard=[False, True], margin=[None, 0.1])
def test_every_choice_of_directions(backend, directions, hard, margin):
    query, document, own = leaf(11, 6), leaf(11, 6), leaf(11, 2, 6) if hard else None
    temperature = torch.tensor(0.2, dtype=DOUBLE, requires_grad=True)
    value = gte(
        query,
        document,
        own,
        directions=directions,
        temperature=temperature,
        false_negative_margin=margin,
        backend=backend,
    )
    truth = dense_gte(query, document, own, 1 / temperature, directions, margin=margin).mean()
    check(value, truth, [query, document, temperature, *([own] if hard else [])])


def test_one_direction_is_info_nce(backend):
    query, document, shared = leaf(9, 5), leaf(9, 5), leaf(4, 5)
    value = gte(query, document, shared, directions=DIRECTIONS[:1], backend=backend)
    truth = info_nce(query, document, shared, temperature=0.01, normalize=True, backend=backend)
    check(value, truth, [query, document, shared])


def test_joint_loss_stays_above_log_two_and_exact_there(backend):
    """The formula counts the positive twice; lse - positive would lose what is left above log 2."""
    query = torch.eye(6)
    value = gte(query, query, scale=30.0, reduction="none", backend=backend)
    truth = torch.log(2 + 20 * torch.exp(torch.tensor(-30.0, dtype=DOUBLE)))
    assert relative_error(value, truth.expand(6)) <= 1e-6
    assert (value >= torch.log(torch.tensor(2.0))).all()


@pytest.mark.parametrize("directions", [QWEN3, DIRECTIONS[:1], DIRECTIONS[:2]], ids="-".join)
def test_when_the_mask_drops_everything_loss_and_gradient_are_zero(backend, directions):
    query, document, hard = leaf(5, 4), leaf(5, 4), leaf(5, 2, 4)
    value = gte(
        query, document, hard, directions=directions, false_negative_margin=-3.0, reduction="none", backend=backend
    )
    assert torch.equal(value, torch.zeros_like(value))
    for gradient in torch.autograd.grad(value.sum(), [query, document, hard], allow_unused=True):
        assert gradient is None or torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("directions", [DIRECTIONS, QWEN3, DIRECTIONS[:1]], ids="-".join)
def test_no_rows_and_one_row(backend, directions):
    none = leaf(0, 4)
    assert gte(none, none, directions=directions, reduction="none", backend=backend).shape == (0,)
    assert gte(none, none, directions=directions, reduction="sum", backend=backend) == 0
    assert gte(none, none, directions=directions, backend=backend).isnan()
    one = leaf(1, 4), leaf(1, 4)
    check(gte(*one, directions=directions, backend=backend), dense_gte(*one, None, 100.0, directions).mean(), list(one))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("directions", [DIRECTIONS, DIRECTIONS[:3]], ids="-".join)
def test_gradcheck_of_gte(backend, hard, directions):
    def function(query, document, scale, *own):
        options = {"directions": directions, "false_negative_margin": 0.4, "normalize": False}
        return gte(query, document, *own, scale=scale, backend=backend, **options)

    leaves = [leaf(4, 3), leaf(4, 3), torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)]
    leaves += [leaf(4, 1, 3)] if hard else []
    check_derivatives(function, leaves)


@pairwise(dtype=[torch.bfloat16, torch.float16], level=[0.3, 0.01, 0.001], directions=SUBSETS)
def test_gradient_error_of_gte_in_three_regimes(backend, dtype, level, directions):
    a, b = (t.requires_grad_() for t in clustered_pairs(256, 64, level, dtype=dtype))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    truth = dense_gte(*exact, None, 50.0, directions, normalize=False).mean()
    value = gte(a, b, directions=directions, scale=50.0, normalize=False, backend=backend)
    for got, expected in zip(torch.autograd.grad(value, [a, b]), torch.autograd.grad(truth, exact), strict=True):
        assert got.dtype == dtype
        assert relative_error(got, expected) <= GRADIENT_ERROR_16_BIT


@pytest.mark.parametrize("level", [0.3, 0.01, 0.001])
def test_gradient_error_with_hard_negatives_close_to_the_positive(backend, level):
    """The positive and hard negatives nearly cancel in a query's gradient, so that one sweep must see them all."""
    a, b = (t.requires_grad_() for t in clustered_pairs(256, 64, level, dtype=torch.bfloat16))
    hard = b.detach().roll(1, 0)[:, None].clone().requires_grad_()
    exact = [t.detach().double().requires_grad_() for t in (a, b, hard)]
    truth = dense_gte(*exact, 50.0, DIRECTIONS[:1], normalize=False).mean()
    value = gte(a, b, hard, directions=DIRECTIONS[:1], scale=50.0, normalize=False, backend=backend)
    pairs = zip(torch.autograd.grad(value, [a, b, hard]), torch.autograd.grad(truth, exact), strict=True)
    assert all(relative_error(got, expected) <= GRADIENT_ERROR_16_BIT for got, expected in pairs)


# ---- GIST ------------------------------------------------------------------------------------------------------


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gist(backend, reduction, data):
    draw = data.draw
    n, depth, scale, weight = draw_common(draw)
    query, key, guides = leaf(n, depth), leaf(n, depth), list(torch.randn(2, n, 7, dtype=DOUBLE))
    negatives = leaf(6, depth) if draw(st.booleans()) else None
    guides.append(torch.randn(6, 7, dtype=DOUBLE) if negatives is not None else None)
    relative, margin = draw(st.booleans()), draw(st.sampled_from([0.0, 0.2, -0.3]))
    anchors, positives = draw(st.booleans()), draw(st.booleans())
    value = gist(
        query,
        key,
        *guides[:2],
        negatives,
        guides[2],
        margin_strategy="relative" if relative else "absolute",
        margin=margin,
        contrast_anchors=anchors,
        contrast_positives=positives,
        scale=scale,
        weight=weight,
        reduction=reduction,
        backend=backend,
    )
    rows = dense_gist(query, key, guides, negatives, scale, margin, relative, anchors, positives)
    leaves = [t for t in (query, key, negatives, scale, weight) if t is not None]
    check(value, reduced(rows, reduction, weight), leaves)


def test_guides_may_have_another_dtype_and_no_gradient(backend):
    query, key, guides = leaf(9, 4, dtype=torch.bfloat16), leaf(9, 4, dtype=torch.bfloat16), torch.randn(2, 9, 5)
    guides = [g.clone().requires_grad_() for g in guides]
    value = gist(query, key, *guides, backend=backend)
    assert all(g is None for g in torch.autograd.grad(value, guides, allow_unused=True, retain_graph=True))
    truth = dense_gist(unit(query.float()).bfloat16(), unit(key.float()).bfloat16(), [*guides, None], None, 100.0, *OFF)
    assert relative_error(value, truth.mean()) <= 2e-2


def test_gist_where_the_guide_drops_everything(backend):
    query, key, guide = leaf(5, 4), leaf(5, 4), torch.eye(5, dtype=DOUBLE)
    value = gist(query, key, guide, guide, margin=3.0, reduction="none", backend=backend)
    assert torch.equal(value, torch.zeros_like(value))
    for gradient in torch.autograd.grad(value.sum(), [query, key]):
        assert torch.allclose(gradient, torch.zeros_like(gradient), atol=1e-13)


def test_gist_of_no_rows_and_of_one(backend):
    none, guide = leaf(0, 4), torch.randn(0, 3, dtype=DOUBLE)
    assert gist(none, none, guide, guide, reduction="none", backend=backend).shape == (0,)
    assert gist(none, none, guide, guide, backend=backend).isnan()
    guide = torch.randn(1, 3, dtype=DOUBLE)
    assert gist(leaf(1, 4), leaf(1, 4), guide, guide, backend=backend) == 0


@pytest.mark.parametrize("negatives", [False, True])
def test_gradcheck_of_gist(backend, negatives):
    guides = torch.randn(3, 4, 5, dtype=DOUBLE)

    def function(query, key, temperature, *more):
        options = (*more, guides[2]) if more else ()
        return gist(query, key, *guides[:2], *options, temperature=temperature, normalize=False, backend=backend)

    leaves = [leaf(4, 3), leaf(4, 3), torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)]
    leaves += [leaf(4, 3)] if negatives else []
    check_derivatives(function, leaves)


@pytest.mark.parametrize("level", [0.3, 0.01, 0.001])
@pytest.mark.parametrize("negatives", [False, True])
def test_gradient_error_of_gist_in_three_regimes(backend, level, negatives):
    a, b = (t.requires_grad_() for t in clustered_pairs(256, 64, level, dtype=torch.bfloat16))
    hard = b.detach().roll(1, 0).clone().requires_grad_() if negatives else None
    guides = [*unit(torch.randn(2, 256, 8)), unit(torch.randn(256, 8)) if negatives else None]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in (a, b, hard)]
    of_guide = [None if g is None else g.double() for g in guides]
    truth = dense_gist(*exact[:2], of_guide, exact[2], 50.0, *OFF, normalize=False).mean()
    value = gist(a, b, *guides[:2], hard, guides[2], scale=50.0, normalize=False, backend=backend)
    leaves = [t for t in (a, b, hard) if t is not None]
    expected = torch.autograd.grad(truth, [t for t in exact if t is not None])
    for got, truth_of in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        assert relative_error(got, truth_of) <= GRADIENT_ERROR_16_BIT


# ---- sentence-transformers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("directions", SUBSETS, ids="-".join)
@pytest.mark.parametrize("negatives", [0, 2])
def test_gte_is_the_loss_of_sentence_transformers(directions, negatives):
    losses = pytest.importorskip("sentence_transformers.losses")
    query, document, hard = leaf(9, 5), leaf(9, 5), leaf(9, negatives, 5)
    peer = losses.MultipleNegativesRankingLoss(torch.nn.Module(), scale=20.0, directions=directions)
    truth = peer.compute_loss_from_embeddings([query, document, *hard.unbind(1)], None)
    value = gte(query, document, hard if negatives else None, scale=20.0, directions=directions, backend="reference")
    check(value, truth, [query, document, hard])


def test_per_direction_is_the_loss_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.losses")
    query, document, hard, both = leaf(9, 5), leaf(9, 5), leaf(9, 2, 5), ("query_to_doc", "doc_to_query")
    peer = losses.MultipleNegativesRankingLoss(
        torch.nn.Module(), scale=20.0, directions=both, partition_mode="per_direction"
    )
    truth = peer.compute_loss_from_embeddings([query, document, *hard.unbind(1)], None)
    value = gte(query, document, hard, scale=20.0, directions=both, partition="per_direction", backend="reference")
    check(value, truth, [query, document, hard])


class _Column(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, features):
        return {"sentence_embedding": features[self.name]}


@pytest.mark.parametrize("strategy,margin", [("absolute", 0.0), ("absolute", 0.1), ("relative", 0.05)])
@pytest.mark.parametrize("contrast", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("columns", [2, 3])
def test_gist_is_the_loss_of_sentence_transformers(strategy, margin, contrast, columns):
    losses = pytest.importorskip("sentence_transformers.losses")
    peer = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)
    torch.nn.Module.__init__(peer)
    peer.model, peer.guide, peer.must_retokenize = _Column("model"), _Column("guide"), False
    peer.temperature, peer.margin_strategy, peer.margin = 0.05, strategy, margin
    peer.contrast_anchors, peer.contrast_positives = contrast
    peer.gather_across_devices, peer.cross_entropy_loss = False, torch.nn.CrossEntropyLoss()
    peer.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
    embeddings, guides = [leaf(9, 5) for _ in range(columns)], list(torch.randn(columns, 9, 7, dtype=DOUBLE))
    features = [{"model": e, "guide": g} for e, g in zip(embeddings, guides, strict=True)]
    truth = peer(features, None)
    more = (embeddings[2], guides[2]) if columns == 3 else ()
    value = gist(
        *embeddings[:2],
        *guides[:2],
        *more,
        temperature=0.05,
        margin_strategy=strategy,
        margin=margin,
        contrast_anchors=contrast[0],
        contrast_positives=contrast[1],
        backend="reference",
    )
    check(value, truth, embeddings)


# ---- Bad input -------------------------------------------------------------------------------------------------

X, Y, G = torch.randn(4, 3), torch.randn(5, 3), torch.randn(4, 2)
CASES = [
    (lambda: gte(X, Y), ValueError, "gte: document must have the same shape as query, got query (4, 3) and document"),
    (
        lambda: gte(X, X, partition="both"),
        ValueError,
        "gte: partition must be one of 'joint', 'per_direction', got 'both'",
    ),
    (
        lambda: gte(X, X, directions=("doc_to_doc",)),
        ValueError,
        "gte: directions must include query_to_doc, which holds the positive",
    ),
    (
        lambda: gte(X, X, directions=("query_to_doc", "up")),
        ValueError,
        "gte: directions must be a tuple of query_to_doc, query_to_query, doc_to_query, doc_to_doc, got",
    ),
    (lambda: gte(X, X, directions="query_to_doc"), ValueError, "gte: directions must be a tuple of query_to_doc, "),
    (
        lambda: gte(X, X, partition="per_direction"),
        ValueError,
        "gte: directions must each hold the positive for partition='per_direction', got query_to_query\n  use",
    ),
    (
        lambda: gte(X, X, torch.randn(5, 2, 3)),
        ValueError,
        "gte: negatives must have shape (4, K, 3) or (H, 3), got (5, 2, 3)",
    ),
    (
        lambda: gte(X, X, torch.randn(5, 2)),
        ValueError,
        "gte: negatives must have the same last dimension as query, got query (4, 3) and negatives (5, 2)",
    ),
    (
        lambda: gte(X, X, torch.randn(4, 2, 3).half()),
        TypeError,
        "gte: negatives must have the same dtype as query",
    ),
    (lambda: gte(X, X, [X]), TypeError, "gte: negatives must be a tensor, got list"),
    (
        lambda: gte(X, X, false_negative_margin=float("nan")),
        ValueError,
        "gte: false_negative_margin must be in (-inf, inf), got nan",
    ),
    (
        lambda: gte(X, X, false_negative_margin=torch.ones(4)),
        TypeError,
        "gte: false_negative_margin must be a number, got a tensor of torch.float32 with shape (4,)",
    ),
    (lambda: gte(X, X, temperature=0.0), ValueError, "gte: temperature must be in (0, inf], got 0.0"),
    (
        lambda: gte(X, X, scale=torch.ones(3)),
        ValueError,
        "gte: scale must be one number or have shape (4,), got (3,)",
    ),
    (lambda: gte(X, X, weight=-torch.ones(4)), ValueError, "gte: weight must not be negative, got -1.0"),
    (lambda: gte(X, X, reduction="avg"), ValueError, "gte: reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
    (
        lambda: gist(X, X, G, G, margin_strategy="ratio"),
        ValueError,
        "gist: margin_strategy must be one of 'absolute', 'relative', got 'ratio'",
    ),
    (lambda: gist(X, X, G, G, margin=None), TypeError, "gist: margin must be a number, got NoneType"),
    (lambda: gist(X, X, G, G, X), ValueError, "gist: negatives and guide_negatives must both be given, or neither"),
    (
        lambda: gist(X, X, G, torch.randn(4, 3)),
        ValueError,
        "gist: guide_key must have the same last dimension as guide_query, got guide_query (4, 2) and guide_key (4, 3)",
    ),
    (
        lambda: gist(X, X, G, G[:3]),
        ValueError,
        "gist: guide_key must have as many rows as key, got guide_key (3, 2) and key (4, 3)",
    ),
    (lambda: gist(X, X, G.long(), G), TypeError, "gist: guide_query must be float32, float64, bfloat16 or float16"),
    (
        lambda: gist(X, X, G, G, torch.randn(6, 2), torch.randn(6, 2)),
        ValueError,
        "gist: negatives must have the same last dimension as query",
    ),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[m[:60] for *_, m in CASES])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
