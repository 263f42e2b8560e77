"""Triplets, mined triplets and contrastive pairs against dense formulas in float64."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contrastive_ops.losses.triplet import batch_hard_triplet, batch_semi_hard_triplet, contrastive, triplet
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
REDUCTIONS = ("mean", "sum", "none")
DISTANCES = ("euclidean", "sqeuclidean", "cosine")
FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


# ---- The definitions, written row by row or with whole matrices ----------------------------------------------------


def one_distance(a, b, distance):
    if distance == "cosine":
        return 1 - F.cosine_similarity(a, b, dim=0)
    return (a - b).norm() if distance == "euclidean" else (a - b).square().sum()


def dense_batch_hard(x, labels, y, col_labels, margin, soft, distance):
    """Losses and which rows count."""
    own = y is None
    y, col_labels = (x, labels) if own else (y, col_labels)
    losses, counted = [], []
    for i, label in enumerate(labels.tolist()):
        same = [label != -1 and other == label for other in col_labels.tolist()]
        d = [one_distance(x[i], each, distance) for each in y]
        positives = [d[j] for j in range(len(y)) if same[j] and not (own and j == i)]
        negatives = [d[j] for j in range(len(y)) if not same[j]]
        counted.append(bool(positives and negatives))
        if not counted[-1]:
            losses.append(x[i].sum() * 0)
            continue
        gap = torch.stack(positives).max() - torch.stack(negatives).min()
        losses.append(-F.logsigmoid(-gap) if soft else F.relu(gap + margin))
    return stacked(losses, x), torch.tensor(counted, dtype=torch.bool)


def dense_semi_hard(x, labels, y, col_labels, target, margin, distance):
    losses, counted = [], []
    for i, (label, p) in enumerate(zip(labels.tolist(), target.tolist(), strict=True)):
        differs = [label == -1 or other != label for other in col_labels.tolist()]
        negatives = [one_distance(x[i], y[j], distance) for j in range(len(y)) if differs[j]]
        counted.append(p >= 0 and bool(negatives))
        if not counted[-1]:
            losses.append(x[i].sum() * 0)
            continue
        positive = one_distance(x[i], y[p], distance)
        farther = [d for d in negatives if d > positive]
        negative = torch.stack(farther).min() if farther else torch.stack(negatives).max()
        losses.append(F.relu(positive - negative + margin))
    return stacked(losses, x), torch.tensor(counted, dtype=torch.bool)


def stacked(losses, x):
    return torch.stack(losses) if losses else x.sum(1)


@st.composite
def cases(draw):
    """Shapes, labels and options; tensors follow from the seed."""
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    rows, columns = draw(st.integers(0, 8)), draw(st.integers(0, 10))
    label = st.integers(-1, draw(st.integers(-1, 5)))
    return {
        "x": leaf(rows, 5),
        "y": leaf(columns, 5),
        "labels": torch.tensor(draw(st.lists(label, min_size=rows, max_size=rows)), dtype=torch.int64),
        "col_labels": torch.tensor(draw(st.lists(label, min_size=columns, max_size=columns)), dtype=torch.int64),
        "weight": torch.rand(rows, dtype=DOUBLE).requires_grad_() if draw(st.booleans()) else None,
        "reduction": draw(st.sampled_from(REDUCTIONS)),
        "distance": draw(st.sampled_from(DISTANCES)),
        "margin": draw(st.sampled_from([0.1, 0.7, 3.0])),
        "flag": draw(st.booleans()),
        "other_flag": draw(st.booleans()),
    }


def common(case):
    return {name: case[name] for name in ("weight", "reduction")}


# ---- Distances -----------------------------------------------------------------------------------------------------


@FUZZ
@given(case=cases())
def test_triplet(case):
    anchor, margin, distance = case["x"], case["margin"], case["distance"]
    positive, negative = leaf(*anchor.shape), leaf(*anchor.shape)
    value = triplet(anchor, positive, negative, margin=margin, distance=distance, **common(case))
    if distance == "euclidean":
        truth = F.triplet_margin_loss(anchor, positive, negative, margin=margin, reduction="none")
    else:
        gaps = [
            one_distance(a, p, distance) - one_distance(a, n, distance)
            for a, p, n in zip(anchor, positive, negative, strict=True)
        ]
        truth = F.relu(stacked(gaps, anchor) + margin)
    leaves = [anchor, positive, negative, case["weight"]]
    check(value, reduced(truth, case["reduction"], case["weight"]), leaves)


def test_triplet_at_distance_zero_is_that_of_torch():
    anchor = leaf(3, 4)
    positive, negative = anchor.detach().clone().requires_grad_(), leaf(3, 4)
    leaves = [anchor, positive, negative]
    check(triplet(*leaves, margin=5.0), F.triplet_margin_loss(*leaves, margin=5.0), leaves)
    for distance in DISTANCES:
        value = triplet(anchor, anchor, anchor, margin=5.0, distance=distance)
        assert all(g.isfinite().all() for g in torch.autograd.grad(value, anchor))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@FUZZ
@given(case=cases())
def test_contrastive(distance, case):
    x, y, margin = case["x"], leaf(*case["x"].shape), case["margin"]
    labels = torch.randint(0, 2, (len(x),))
    labels = labels.bool() if case["flag"] else labels.to(torch.float32) if case["other_flag"] else labels
    value = contrastive(x, y, labels, margin=margin, distance=distance, **common(case))
    d = 1 - F.cosine_similarity(x, y) if distance == "cosine" else F.pairwise_distance(x, y)
    truth = 0.5 * (labels.double() * d**2 + (1 - labels.double()) * F.relu(margin - d) ** 2)
    check(value, reduced(truth, case["reduction"], case["weight"]), [x, y, case["weight"]])


def test_cosine_distance_of_zero_rows_and_of_close_ones():
    zero, x = torch.zeros(2, 3), torch.randn(2, 3)
    ones = torch.ones(2)
    torch.testing.assert_close(contrastive(zero, x, ones, reduction="none"), ones / 2)
    torch.testing.assert_close(contrastive(zero, zero, ones, reduction="none"), ones / 2)
    x = torch.randn(50, 64)
    y = x + 1e-3 * torch.randn(50, 64)
    truth = 1 - F.cosine_similarity(x.double(), y.double())
    value = (2 * contrastive(x, y, torch.ones(50), reduction="none")).sqrt()
    assert relative_error(value, truth) <= 1e-3  # 1 - cosine in float32: 0.1


@FUZZ
@given(case=cases())
def test_batch_hard_triplet(backend, case):
    x, labels, soft, distance = case["x"], case["labels"], case["other_flag"], case["distance"]
    y, col_labels = (None, None) if case["flag"] else (case["y"], case["col_labels"])
    margin = None if soft else case["margin"]
    value = batch_hard_triplet(
        x, labels, y, col_labels, margin=margin, soft=soft, distance=distance, backend=backend, **common(case)
    )
    truth, counted = dense_batch_hard(x, labels, y, col_labels, margin, soft, distance)
    check(value, reduced(truth, case["reduction"], case["weight"], counted), [x, y, case["weight"]])


@FUZZ
@given(case=cases())
def test_batch_semi_hard_triplet(backend, case):
    x, labels, margin, distance = case["x"], case["labels"], case["margin"], case["distance"]
    y, col_labels = (None, None) if case["flag"] else (case["y"], case["col_labels"])
    columns, ids = (x, labels) if y is None else (y, col_labels)
    target = torch.randint(-1, len(columns), (len(x),)) if len(columns) else torch.full((len(x),), -1)
    # A positive has its row's label, if it has any.
    found = [[j for j, other in enumerate(ids.tolist()) if other == own != -1] for own in labels.tolist()]
    target = torch.tensor(
        [each[int(t) % len(each)] if each and t >= 0 else -1 for each, t in zip(found, target, strict=True)],
        dtype=torch.int64,
    )
    options = {"margin": margin, "distance": distance, "backend": backend}
    value = batch_semi_hard_triplet(x, labels, y, col_labels, target=target, **options, **common(case))
    truth, counted = dense_semi_hard(x, labels, columns, ids, target, margin, distance)
    check(value, reduced(truth, case["reduction"], case["weight"], counted), [x, y, case["weight"]])


def test_semi_hard_of_partners(backend):
    x, y, labels = leaf(40, 6), leaf(40, 6), torch.arange(40) // 2
    for distance in DISTANCES:
        value = batch_semi_hard_triplet(x, labels, y, labels, distance=distance, backend=backend)
        truth, counted = dense_semi_hard(x, labels, y, labels, torch.arange(40), 0.2, distance)
        check(value, reduced(truth, "mean", None, counted), [x, y])


def test_semi_hard_of_every_positive_pair(backend):
    """The full version, as TensorFlow and sentence-transformers have it, by repeating rows."""
    x, labels = leaf(30, 6), torch.randint(0, 5, (30,))
    pair = (labels[:, None] == labels) & ~torch.eye(30, dtype=torch.bool)
    rows, cols = pair.nonzero(as_tuple=True)
    options = {"target": cols, "margin": 2.0, "backend": backend}
    value = batch_semi_hard_triplet(x[rows], labels[rows], x, labels, **options)
    d = torch.cdist(x, x)
    negatives = d.masked_fill(labels[:, None] == labels, torch.inf)[:, None, :]
    outside = negatives.masked_fill(negatives <= d[:, :, None], torch.inf).amin(2)
    inside = d.masked_fill(labels[:, None] == labels, -torch.inf).amax(1, keepdim=True)
    negative = torch.where(outside < torch.inf, outside, inside)
    check(value, F.relu(d - negative + 2.0)[pair].mean(), [x])


def test_copies_of_the_positive_are_not_farther(backend):
    """A negative equal to the positive, whose distance rounding may make larger or smaller."""
    for distance in DISTANCES:
        x, y = torch.randn(16, 24), torch.randn(16, 24)
        y = torch.cat([y, y, -3.0 * x])  # copies, and negatives that are farther
        labels, col_labels = torch.arange(16), torch.arange(16).repeat(3) + torch.arange(3).repeat_interleave(16) * 100
        options = {"target": torch.arange(16), "distance": distance, "margin": 0.5, "backend": backend}
        value = batch_semi_hard_triplet(x, labels, y, col_labels, reduction="none", **options)
        without = col_labels.clone()
        without[16:32] = labels  # no negative of its own row
        truth = batch_semi_hard_triplet(x, labels, y, without, reduction="none", **options)
        torch.testing.assert_close(value, truth)


@pytest.mark.parametrize("distance", DISTANCES)
def test_collapsed_rows(backend, distance):
    """All distances are 0: the margin is the loss, and nothing is NaN."""
    row = torch.randn(1, 8, dtype=DOUBLE)
    x, labels = row.repeat(12, 1).requires_grad_(), torch.arange(12) // 2
    hard = batch_hard_triplet(x, labels, margin=0.3, distance=distance, backend=backend)
    soft = batch_hard_triplet(x, labels, soft=True, distance=distance, backend=backend)
    semi = batch_semi_hard_triplet(x, labels, target=torch.arange(12) ^ 1, distance=distance, backend=backend)
    for value, expected in ((hard, 0.3), (soft, torch.tensor(2.0).log()), (semi, 0.2)):
        assert abs(value - expected) <= 1e-6
        assert torch.autograd.grad(value, x)[0].abs().max() <= 1e-6


def test_distances_far_from_the_origin_do_not_cancel(backend):
    """|x|^2 - 2 <x, y> + |y|^2 loses these distances in float32; the selected ones are computed from differences."""
    x = torch.randn(40, 8, dtype=DOUBLE) * 0.3
    x[20:] += 3.0
    labels = torch.arange(40) // 20
    moved = (x + 100.0).float()
    truth, _ = dense_batch_hard(moved.double(), labels, None, None, 5.0, False, "euclidean")
    value = batch_hard_triplet(moved, labels, margin=5.0, reduction="none", backend=backend)
    assert relative_error(value, truth) <= 1e-3


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_more_rows_than_a_tile(backend, reduction):
    x, labels = leaf(300, 24), torch.randint(0, 40, (300,))
    d = torch.cdist(x, x)
    same = labels[:, None] == labels
    farthest = d.masked_fill(~same | torch.eye(300, dtype=torch.bool), -1.0).max(1).values
    nearest = d.masked_fill(same, torch.inf).min(1).values
    truth = F.relu(farthest - nearest + 0.2)
    value = batch_hard_triplet(x, labels, reduction=reduction, backend=backend)
    assert (same.sum(1) > 1).all()
    check(value, reduced(truth, reduction), [x], 1e-8)


# ---- Derivatives, precision ----------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 0, 1, 1, 2])
MINED = {
    "batch_hard": lambda x, y, **o: batch_hard_triplet(x, LABELS, y, LABELS, margin=2.0, **o),
    "batch_hard_soft": lambda x, y, **o: batch_hard_triplet(x, LABELS, soft=True, distance="cosine", **o),
    "batch_semi_hard": lambda x, y, **o: batch_semi_hard_triplet(x, LABELS, y, LABELS, margin=2.0, **o),
}


@pytest.mark.parametrize("name", MINED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, name, reduction):
    def function(x, y, weight):
        return MINED[name](x, y, weight=weight, reduction=reduction, backend=backend)

    leaves = (leaf(5, 3), leaf(5, 3), torch.rand(5, dtype=DOUBLE).requires_grad_())
    check_derivatives(function, leaves)


@pytest.mark.parametrize("distance", DISTANCES)
def test_gradcheck_of_given_pairs(distance):
    leaves = (leaf(5, 3), leaf(5, 3), leaf(5, 3))

    def of_triplets(a, p, n):
        return triplet(a, p, n, distance=distance)

    def of_pairs(a, p, n):
        kind = "euclidean" if distance == "sqeuclidean" else distance
        return contrastive(a, p, torch.tensor([1, 0, 0, 1, 0]), margin=1.5, distance=kind) + 0 * n.sum()

    for function in (of_triplets, of_pairs):
        check_derivatives(function, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_error(backend, dtype, reduction):
    x, y = leaf(48, 32, dtype=dtype), leaf(48, 32, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    labels = torch.arange(48) // 4
    options = {"reduction": reduction, "backend": backend}
    hard = {"margin": 2.0, "distance": "euclidean"}
    cases = [
        (
            triplet(x, y, y.roll(1, 0), reduction=reduction),
            F.triplet_margin_loss(exact[0], exact[1], exact[1].roll(1, 0)),
        ),
        (
            contrastive(x, y, labels % 2, margin=1.5, reduction=reduction),
            contrastive(*exact, labels % 2, margin=1.5),
        ),
        (
            batch_hard_triplet(x, labels, y, labels, **hard, **options),
            dense_batch_hard(exact[0], labels, exact[1], labels, 2.0, False, "euclidean")[0].mean(),
        ),
        (
            batch_hard_triplet(x, labels, soft=True, distance="cosine", **options),
            dense_batch_hard(exact[0], labels, None, None, None, True, "cosine")[0].mean(),
        ),
        (
            batch_semi_hard_triplet(x, labels, y, labels, margin=1.0, **options),
            dense_semi_hard(exact[0], labels, exact[1], labels, torch.arange(48), 1.0, "euclidean")[0].mean(),
        ),
    ]
    bound = 1e-4 if dtype == torch.float32 else GRADIENT_ERROR_16_BIT
    for value, truth in cases:
        assert value.dtype == torch.float32
        value = value.mean()
        assert relative_error(value, truth) <= (1e-5 if dtype == torch.float32 else 1e-3)
        got, expected = (
            torch.autograd.grad(v, t, materialize_grads=True) for v, t in ((value, [x, y]), (truth, exact))
        )
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == dtype
            assert relative_error(a, b) <= bound


# ---- Rows that do not count ----------------------------------------------------------------------------------------


def test_rows_without_a_positive_or_a_negative(backend):
    x = leaf(6, 4)
    calls = [
        lambda labels: batch_hard_triplet(x, labels, margin=9.0, backend=backend),
        lambda labels: batch_hard_triplet(x, labels, soft=True, backend=backend),
        lambda labels: batch_semi_hard_triplet(x, labels, target=torch.full((6,), -1), margin=9.0, backend=backend),
    ]
    for labels in (torch.zeros(6, dtype=torch.int64), torch.arange(6), torch.full((6,), -1)):
        for call in calls:
            value = call(labels)
            assert value == 0
            assert torch.equal(torch.autograd.grad(value, x)[0], torch.zeros_like(x))


# ---- Other packages ------------------------------------------------------------------------------------------------


def test_sentence_transformers(backend):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    x, y, z = leaf(24, 8), leaf(24, 8), leaf(24, 8)
    labels = torch.arange(24) // 3
    model = torch.nn.Module()
    metrics = {
        "euclidean": losses.BatchHardTripletLossDistanceFunction.euclidean_distance,
        "cosine": losses.BatchHardTripletLossDistanceFunction.cosine_distance,
    }
    pair = (labels[:, None] == labels) & ~torch.eye(24, dtype=torch.bool)
    rows, cols = pair.nonzero(as_tuple=True)
    for distance, metric in metrics.items():
        options = {"distance": distance, "backend": backend}
        truth = losses.BatchHardTripletLoss(model, metric, margin=0.7).compute_loss_from_embeddings([x], labels)
        check(batch_hard_triplet(x, labels, margin=0.7, **options), truth, [x], 1e-8)
        truth = losses.BatchHardSoftMarginTripletLoss(model, metric).compute_loss_from_embeddings([x], labels)
        check(batch_hard_triplet(x, labels, soft=True, **options), truth, [x], 1e-8)
        truth = losses.BatchSemiHardTripletLoss(model, metric, margin=0.7).compute_loss_from_embeddings([x], labels)
        value = batch_semi_hard_triplet(x[rows], labels[rows], x, labels, target=cols, margin=0.7, **options)
        check(value, truth, [x], 1e-8)
    together = labels % 2
    for distance, metric in (
        ("cosine", losses.SiameseDistanceMetric.COSINE_DISTANCE),
        ("euclidean", losses.SiameseDistanceMetric.EUCLIDEAN),
    ):
        truth = losses.ContrastiveLoss(model, metric, margin=1.5).compute_loss_from_embeddings([x, y], together)
        check(contrastive(x, y, together, margin=1.5, distance=distance), truth, [x, y])
    metric = losses.TripletDistanceMetric.COSINE
    truth = losses.TripletLoss(model, metric, 0.7).compute_loss_from_embeddings([x, y, z], None)
    check(triplet(x, y, z, margin=0.7, distance="cosine"), truth, [x, y, z])


# ---- Bad input -----------------------------------------------------------------------------------------------------

X, Y, IDS = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
CASES = [
    (
        lambda: triplet(X, X, Y),
        ValueError,
        "triplet: negative must have shape (4, 3) or (4, K, 3), got (5, 3)",
    ),
    (
        lambda: triplet(X, Y, X),
        ValueError,
        "triplet: positive must have the same shape as anchor, got anchor (4, 3) and",
    ),
    (lambda: triplet(X, X, X.half()), TypeError, "triplet: negative must have the same dtype as anchor"),
    (lambda: triplet(X, X, X, margin=-1), ValueError, "triplet: margin must be in [0, inf), got -1"),
    (lambda: triplet(X, X, X, margin="1"), TypeError, "triplet: margin must be a number, got str"),
    (
        lambda: triplet(X, X, X, distance="l1"),
        ValueError,
        "triplet: distance must be one of 'euclidean', 'sqeuclidean', 'cosine', 'dot', got 'l1'",
    ),
    (lambda: triplet(X, X, X, weight=-torch.ones(4)), ValueError, "triplet: weight must not be negative, got -1.0"),
    (
        lambda: contrastive(X, Y, IDS),
        ValueError,
        "contrastive: y must have the same shape as x, got x (4, 3) and y (5, 3)",
    ),
    (lambda: contrastive(X, X, IDS), ValueError, "contrastive: labels must be 0 or 1, got 2"),
    (lambda: contrastive(X, X, IDS[:3] * 0), ValueError, "contrastive: labels must have shape (4,), got (3,)"),
    (lambda: contrastive(X, X, [0, 1, 0, 1]), TypeError, "contrastive: labels must be a tensor, got list"),
    (
        lambda: contrastive(X, X, IDS * 0, distance="sqeuclidean"),
        ValueError,
        "contrastive: distance must be one of 'cosine', 'euclidean', got 'sqeuclidean'",
    ),
    (lambda: batch_hard_triplet(X, IDS[:3]), ValueError, "batch_hard_triplet: labels must have shape (4,), got (3,)"),
    (
        lambda: batch_hard_triplet(X, IDS.float()),
        TypeError,
        "batch_hard_triplet: labels must be int64, got torch.float32",
    ),
    (
        lambda: batch_hard_triplet(X, IDS, Y),
        ValueError,
        "batch_hard_triplet: col_labels must be given with y, got None",
    ),
    (
        lambda: batch_hard_triplet(X, IDS, Y, IDS),
        ValueError,
        "batch_hard_triplet: col_labels must have shape (5,), got (4,)",
    ),
    (
        lambda: batch_hard_triplet(X, IDS, None, IDS),
        ValueError,
        "batch_hard_triplet: col_labels must be left out where y is, got a tensor",
    ),
    (
        lambda: batch_hard_triplet(X, IDS, soft=True, margin=0.1),
        ValueError,
        "batch_hard_triplet: margin must be left out with soft=True, got 0.1",
    ),
    (
        lambda: batch_semi_hard_triplet(X, IDS),
        ValueError,
        "batch_semi_hard_triplet: target must be given where y is not, got None",
    ),
    (
        lambda: batch_semi_hard_triplet(X, IDS, Y, torch.arange(5)),
        ValueError,
        "batch_semi_hard_triplet: y must have the same shape as x, got x (4, 3) and y (5, 3)",
    ),
    (
        lambda: batch_semi_hard_triplet(X, IDS, target=IDS + 1),
        ValueError,
        "batch_semi_hard_triplet: target must be in [-1, 4), got 4",
    ),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[m[:60] for *_, m in CASES])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine", "dot"])
@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("count", [None, 0, 1, 3])
def test_several_negatives_of_a_triplet(distance, hardest, count):
    anchor, positive = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    negative = torch.randn(7, *(() if count is None else (count,)), 5, dtype=torch.float64, requires_grad=True)

    def between(a, b):
        if distance == "euclidean":
            return (a - b + 1e-6).norm(dim=-1)
        if distance == "sqeuclidean":
            return (a - b).square().sum(-1)
        return 1 - F.cosine_similarity(a, b, dim=-1) if distance == "cosine" else -(a * b).sum(-1)

    each = negative.view(7, -1, 5) if count != 0 else negative
    hinges = (between(anchor, positive)[:, None] - between(anchor[:, None], each) + 0.3).relu()
    truth = (hinges.amax(1) if hardest and count != 0 else hinges.sum(1)).mean()
    value = triplet(anchor, positive, negative, margin=0.3, distance=distance, hardest=hardest)
    torch.testing.assert_close(value, truth)
    leaves = [anchor, positive, negative]
    for a, b in zip(*(torch.autograd.grad(v, leaves) for v in (value, truth)), strict=True):
        torch.testing.assert_close(a, b)
