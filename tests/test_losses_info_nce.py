"""InfoNCE and CLIP with filtered columns, smoothing, margin, z-loss and diagnostics, against dense float64 formulas."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from torch.nn import functional as F

from contrastive_ops import Pairs, clip, info_nce
from contrastive_ops.losses import moco
from contrastive_ops.ops import Guide
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, clustered_pairs, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
FUZZ = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
RULES = ("differ", "below", "guide", "exclude")


def rules_and_mask(kinds, query, columns):
    """Random rules of these kinds, and the (N, M) pairs that they keep."""
    n, m = len(query), len(columns)
    keep, rules = torch.ones(n, m, dtype=torch.bool), {}
    if "differ" in kinds:
        rows, cols = torch.randint(-1, 4, (n,)), torch.randint(-1, 4, (m,))
        rules["differ"] = (rows, cols)
        keep &= ~((rows[:, None] == cols) & (rows[:, None] >= 0))
    if "below" in kinds:
        rules["below"] = torch.randn(n, dtype=DOUBLE) + 1
        keep &= (query @ columns.T).detach() <= rules["below"][:, None]
    if "guide" in kinds:
        gx, gy, bound = torch.randn(n, 3, dtype=DOUBLE), torch.randn(m, 3, dtype=DOUBLE), torch.rand(n, dtype=DOUBLE)
        rules["guide"] = Guide(gx, gy, below=bound)
        keep &= gx @ gy.T <= bound[:, None]
    if "exclude" in kinds and m:
        drop = torch.rand(n, m) < 0.3
        rules["exclude"] = (F.pad(drop.sum(1).cumsum(0), (1, 0)), drop.nonzero()[:, 1])
        keep &= ~drop
    return (Pairs(**rules) if rules else None), keep


def dense_rows(logits, keep, target, share=0.0, z_loss=0.0, smooth="all"):
    """Each row's smoothed cross-entropy over the columns that it keeps, and its z-loss."""
    own = F.one_hot(target, logits.shape[1]).bool()
    keep = keep | own
    lse = logits.masked_fill(~keep, -torch.inf).logsumexp(1)
    positive = torch.where(own, logits, 0.0).sum(1)
    spread = keep if smooth == "all" else keep & ~own
    mean = torch.where(spread, logits, 0.0).sum(1) / spread.sum(1)
    share = torch.where(spread.any(1), torch.as_tensor(share, dtype=DOUBLE), 0.0)
    mean = torch.where(spread.any(1), mean, 0.0)
    return (1 - share) * (lse - positive) + share * (lse - mean) + z_loss * lse**2


def draw_options(draw, n):
    """Options of both losses, as (options, leaves among them)."""
    share = draw(st.sampled_from(["none", "float", "rows"]))
    weighted, by_row = draw(st.booleans()), draw(st.booleans())
    scale = (torch.rand(n, dtype=DOUBLE) + 0.5 if by_row else torch.tensor(1.7, dtype=DOUBLE)).requires_grad_()
    shares = {"none": 0.0, "float": 0.3, "rows": torch.rand(n, dtype=DOUBLE, requires_grad=True)}
    weight = torch.rand(n, dtype=DOUBLE, requires_grad=True) if weighted else None
    options = {"scale": scale, "label_smoothing": shares[share], "weight": weight}
    return options, [t for t in options.values() if isinstance(t, torch.Tensor)]


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_info_nce(backend, reduction, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    n, m, depth = draw(st.integers(1, 23)), draw(st.integers(1, 29)), draw(st.integers(1, 9))
    query, key = leaf(n, depth), leaf(m, depth)
    target = None if draw(st.booleans()) and m >= n else torch.randint(0, m, (n,))
    negatives = leaf(draw(st.integers(0, 7)), depth) if draw(st.booleans()) else None
    own = leaf(n, *draw(st.sampled_from([(1,), (3,), ()])), depth) if draw(st.booleans()) else None
    margin, z_loss = draw(st.sampled_from([0.0, 0.2])), draw(st.sampled_from([0.0, 0.01]))
    options, leaves = draw_options(draw, n)
    columns = key if negatives is None else torch.cat([key, negatives])
    in_batch = draw(st.booleans()) or not (own is not None or (negatives is not None and len(negatives)))
    kinds, smooth = st.lists(st.sampled_from(RULES), unique=True, max_size=2), draw(st.sampled_from(["all", "others"]))
    pairs, keep = rules_and_mask(draw(kinds) if in_batch else (), query, key)
    keep, of_negatives = keep & in_batch, None
    if negatives is not None:
        of_negatives, more = rules_and_mask(draw(kinds), query, negatives)
        if (
            pairs is not None
            and pairs.guide is not None
            and of_negatives is not None
            and of_negatives.guide is not None
        ):
            bound = torch.rand(n, dtype=DOUBLE)
            gy = of_negatives.guide.gy
            gx = pairs.guide.gx
            of_negatives, more = Pairs(guide=Guide(gx, gy, below=bound)), gx @ gy.T <= bound[:, None]
        keep = torch.cat([keep, more], 1)

    similarity = query @ columns.T
    bias, more = leaf(len(columns)) if draw(st.booleans()) else None, 0
    if own is not None:
        similarity = torch.cat([similarity, torch.einsum("nd,nkd->nk", query, own.view(n, -1, depth))], 1)
        more = similarity.shape[1] - len(columns)
        keep = F.pad(keep, (0, more), value=True)
    at = torch.arange(n) if target is None else target
    scale = options["scale"].expand(n)[:, None]
    logits = scale * (similarity - margin * F.one_hot(at, similarity.shape[1]).double())
    logits = logits if bias is None else logits + F.pad(bias, (0, more))
    of_own = None if own is None else draw(st.sampled_from([None, 0.3, leaf(n), leaf(n, more)]))
    if of_own is not None:
        wide = torch.full((n, more), of_own, dtype=DOUBLE) if isinstance(of_own, float) else of_own.view(n, -1)
        logits = torch.cat([logits[:, : len(columns)], logits[:, len(columns) :] + wide], 1)
    rows = dense_rows(logits, keep, at, options["label_smoothing"], z_loss, smooth)
    value = info_nce(
        query,
        key,
        negatives,
        row_negatives=own,
        row_negative_bias=of_own,
        in_batch=in_batch,
        target=target,
        pairs=pairs,
        negative_pairs=of_negatives,
        col_bias=bias,
        smooth=smooth,
        margin=margin,
        z_loss=z_loss,
        reduction=reduction,
        backend=backend,
        normalize=False,
        **options,
    )
    leaves += [t for t in (query, key, negatives, own, bias, of_own) if isinstance(t, torch.Tensor)]
    check(value, reduced(rows, reduction, options["weight"]), leaves)


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_clip(backend, reduction, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    n, depth = draw(st.integers(1, 23)), draw(st.integers(1, 9))
    image, text = leaf(n, depth), leaf(n, depth)
    options, leaves = draw_options(draw, n)
    pairs, keep = rules_and_mask(draw(st.lists(st.sampled_from(RULES), unique=True, max_size=2)), image, text)
    logits = options["scale"].expand(n)[:, None] * (image @ text.T)
    if draw(st.booleans()):
        options["col_bias"] = leaf(n)
        leaves.append(options["col_bias"])
        logits = logits + options["col_bias"]
    both = [
        dense_rows(*each, torch.arange(n), options["label_smoothing"]) for each in ((logits, keep), (logits.T, keep.T))
    ]
    value = clip(image, text, pairs=pairs, reduction=reduction, backend=backend, normalize=False, **options)
    check(value, reduced((both[0] + both[1]) / 2, reduction, options["weight"]), [image, text, *leaves])


def test_filled_pairs_take_part_with_their_constant(backend):
    query, key, ids = leaf(9, 4), leaf(9, 4), torch.arange(9) % 3
    same = (ids[:, None] == ids) & ~torch.eye(9, dtype=torch.bool)
    logits = (2.0 * query @ key.T).masked_fill(same, 0.5)
    truth = F.cross_entropy(logits, torch.arange(9), label_smoothing=0.2)
    pairs = Pairs(differ=(ids, ids), fill=0.5)
    check(
        info_nce(query, key, scale=2.0, pairs=pairs, label_smoothing=0.2, backend=backend, normalize=False),
        truth,
        [query, key],
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}, {"diagnostics": True}], ids=str)
@pytest.mark.parametrize("loss", [info_nce, clip])
def test_without_any_negative_loss_and_gradient_are_zero(backend, loss, options, reduction):
    a, b, ids = leaf(6, 4), leaf(6, 4), torch.zeros(6, dtype=torch.int64)
    value = loss(a, b, pairs=Pairs(differ=(ids, ids)), reduction=reduction, backend=backend, **options)
    value = value[0] if isinstance(value, tuple) else value
    assert torch.equal(value, torch.zeros_like(value))
    gradients = torch.autograd.grad(value.sum(), [a, b])
    assert all(torch.allclose(g, torch.zeros_like(g), atol=1e-15) for g in gradients)


def test_row_negatives_alone_are_negatives_too(backend):
    query, key, own, ids = leaf(6, 4), leaf(6, 4), leaf(6, 2, 4), torch.zeros(6, dtype=torch.int64)
    logits = torch.cat([(query * key).sum(1, keepdim=True), torch.einsum("nd,nkd->nk", query, own)], 1)
    truth = F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    value = info_nce(
        query, key, row_negatives=own, pairs=Pairs(differ=(ids, ids)), scale=1.0, backend=backend, normalize=False
    )
    check(value, truth, [query, key, own])


def test_no_rows(backend):
    a = leaf(0, 4)
    options = {"z_loss": 0.1, "margin": 0.1, "label_smoothing": 0.1, "backend": backend}
    assert info_nce(a, a, reduction="none", normalize=False, **options).shape == (0,)
    loss, measures = info_nce(a, a, reduction="sum", diagnostics=True, normalize=False, **options)
    assert loss == 0 and measures.rank.shape == (0,) and measures.accuracy.isnan()
    assert clip(a, a, label_smoothing=0.1, backend=backend, normalize=False).isnan()


@pytest.mark.parametrize("pairs", [False, True])
def test_gradcheck_with_every_option(backend, pairs):
    ids, more = (torch.tensor([0, 1, 0, -1]), torch.tensor([0, 1, 2, 0])), torch.tensor([1, 0])
    share = torch.rand(4, dtype=DOUBLE, requires_grad=True)

    def function(query, key, negatives, own, scale, share):
        return info_nce(
            query,
            key,
            negatives,
            row_negatives=own,
            pairs=Pairs(differ=ids) if pairs else None,
            negative_pairs=Pairs(same=(ids[0], more)) if pairs else None,
            margin=0.2,
            label_smoothing=share,
            z_loss=0.1,
            scale=scale,
            backend=backend,
            normalize=False,
        )

    leaves = (leaf(4, 3), leaf(4, 3), leaf(2, 3), leaf(4, 1, 3), torch.tensor(1.5, dtype=DOUBLE, requires_grad=True))
    check_derivatives(function, (*leaves, share))


def test_gradcheck_of_filtered_totals(backend):
    """The mean whose gradients are formed in forward, with rules and shares of rows; and clip with both."""
    ids, share = torch.tensor([0, 1, 0, -1]), torch.rand(4, dtype=DOUBLE, requires_grad=True)
    leaves = (leaf(4, 3), leaf(4, 3))
    for function, inputs in (
        (
            lambda a, b: info_nce(a, b, pairs=Pairs(differ=(ids, ids)), scale=1.5, backend=backend, normalize=False),
            leaves,
        ),
        (
            lambda a, b, e: info_nce(a, b, label_smoothing=e, scale=1.5, backend=backend, normalize=False),
            (*leaves, share),
        ),
        (
            lambda a, b, e: clip(
                a, b, pairs=Pairs(differ=(ids, ids)), label_smoothing=e, scale=1.5, backend=backend, normalize=False
            ),
            (*leaves, share),
        ),
    ):
        check_derivatives(function, inputs)


# ---- Low precision ---------------------------------------------------------------------------------------------


@pairwise(
    dtype=[torch.bfloat16, torch.float16],
    level=[0.3, 0.01, 0.001],
    reduction=["mean", "none"],
    which=["pairs", "smoothed pairs", "margin", "z_loss", "clip"],
)
def test_gradient_error_in_three_regimes(backend, dtype, level, reduction, which):
    a, b = (t.requires_grad_() for t in clustered_pairs(256, 64, level, dtype=dtype))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    ids = torch.arange(256) // 2
    filtered = Pairs(differ=(ids, ids))
    options = {
        "pairs": {"pairs": filtered},
        "smoothed pairs": {"pairs": filtered, "label_smoothing": 0.1},
        "margin": {"margin": 0.05},
        "z_loss": {"z_loss": 1e-4},
        "clip": {"pairs": filtered, "label_smoothing": 0.1},
    }[which]
    share = options.get("label_smoothing", 0.0)
    keep = ids[:, None] != ids if "pairs" in options else torch.ones(256, 256, dtype=torch.bool)
    at = torch.arange(256)
    logits = 50.0 * (exact[0] @ exact[1].T - options.get("margin", 0.0) * torch.eye(256, dtype=DOUBLE))
    truth = dense_rows(logits, keep, at, share, options.get("z_loss", 0.0)).mean()
    if which == "clip":
        truth = (truth + dense_rows(logits.T, keep.T, at, share).mean()) / 2
    loss = clip if which == "clip" else info_nce
    value = loss(a, b, scale=50.0, reduction=reduction, normalize=False, backend=backend, **options).mean()
    for got, expected in zip(torch.autograd.grad(value, [a, b]), torch.autograd.grad(truth, exact), strict=True):
        assert got.dtype == dtype
        assert relative_error(got, expected) <= GRADIENT_ERROR_16_BIT


# ---- Diagnostics -----------------------------------------------------------------------------------------------


def dense_measures(similarity, keep, target):
    own = F.one_hot(target, similarity.shape[1]).bool()
    positive = torch.where(own, similarity, 0.0).sum(1)
    others = keep & ~own
    rank = 1 + (others & (similarity >= positive[:, None] - 1e-12)).sum(1)
    negative = similarity[others].mean() if others.any() else torch.tensor(torch.nan, dtype=similarity.dtype)
    return (rank == 1).double().mean(), rank, positive.mean(), negative


def check_measures(measures, truth):
    assert not any(t.requires_grad for t in measures)
    assert measures.rank.dtype == torch.int64
    for name, got, expected in zip(measures._fields, measures, truth, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12, equal_nan=True, msg=name)


@FUZZ
@given(data=st.data())
def test_diagnostics_of_info_nce(backend, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    n, m, depth = draw(st.integers(1, 19)), draw(st.integers(1, 23)), draw(st.integers(1, 6))
    query, key, target = leaf(n, depth), leaf(m, depth), torch.randint(0, m, (n,))
    own = leaf(n, 2, depth) if draw(st.booleans()) else None
    pairs, keep = rules_and_mask(draw(st.lists(st.sampled_from(RULES), unique=True, max_size=2)), query, key)
    options = {"target": target, "row_negatives": own, "pairs": pairs, "label_smoothing": 0.1, "backend": backend}
    plain = info_nce(query, key, normalize=False, **options)
    loss, measures = info_nce(query, key, diagnostics=True, normalize=False, **options)
    similarity = query @ key.T
    if own is not None:
        similarity = torch.cat([similarity, torch.einsum("nd,nkd->nk", query, own)], 1)
        keep = F.pad(keep, (0, 2), value=True)
    check_measures(measures, dense_measures(similarity.detach(), keep, target))
    check(loss, plain, [query, key])


@FUZZ
@given(data=st.data())
def test_diagnostics_of_clip(backend, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    n, depth = draw(st.integers(1, 19)), draw(st.integers(1, 6))
    image, text, at = leaf(n, depth), leaf(n, depth), torch.arange(n)
    pairs, keep = rules_and_mask(draw(st.lists(st.sampled_from(RULES), unique=True, max_size=2)), image, text)
    plain = clip(image, text, pairs=pairs, backend=backend, normalize=False)
    loss, (of_images, of_texts) = clip(image, text, pairs=pairs, diagnostics=True, backend=backend, normalize=False)
    similarity = (image @ text.T).detach()
    check_measures(of_images, dense_measures(similarity, keep, at))
    check_measures(of_texts, dense_measures(similarity.T, keep.T, at))
    check(loss, plain, [image, text])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_columns_count_against_the_positive(backend, dtype):
    """Whatever the order of summation makes of their inner products."""
    query, key = torch.randn(40, 300).to(dtype), torch.randn(20, 300).to(dtype)
    _, measures = info_nce(query, torch.cat([key, key]), diagnostics=True, backend=backend, normalize=False)
    assert measures.accuracy == 0
    exact = (query.double() @ key.double().T).repeat(1, 2)  # one product over all 40 would round equal columns apart
    expected = (exact >= exact.diagonal()[:, None]).sum(1)
    assert torch.equal(measures.rank, expected)


def test_rank_ignores_scale_and_constants(backend):
    """The order of similarities counts, also where filled pairs enter the loss with a large logit."""
    query, key, ids = torch.randn(12, 5), torch.randn(12, 5), torch.arange(12) // 3
    scale = torch.rand(12) + 0.5
    plain = info_nce(query, key, pairs=Pairs(differ=(ids, ids)), diagnostics=True, backend=backend, normalize=False)[1]
    filled = Pairs(differ=(ids, ids), fill=99.0)
    other = info_nce(query, key, pairs=filled, scale=scale, diagnostics=True, backend=backend, normalize=False)[1]
    assert torch.equal(plain.rank, other.rank)
    torch.testing.assert_close(plain.negative_similarity, other.negative_similarity)


# ---- Bad input -------------------------------------------------------------------------------------------------

X, Y = torch.randn(4, 3), torch.randn(5, 3)
IDS = torch.arange(4)
CASES = [
    (lambda: info_nce(X, Y, label_smoothing=-0.1), ValueError, "info_nce: label_smoothing must be in [0, 1], got -0.1"),
    (
        lambda: info_nce(X, Y, label_smoothing=torch.tensor([0.0, 0.5, 2.0, 0.1])),
        ValueError,
        "info_nce: label_smoothing must be in [0, 1], got 2.0",
    ),
    (
        lambda: info_nce(X, Y, label_smoothing=torch.zeros(3)),
        ValueError,
        "info_nce: label_smoothing must have shape (4,), got (3,)",
    ),
    (
        lambda: clip(X, X, label_smoothing="0.1"),
        TypeError,
        "clip: label_smoothing must be a number, got str",
    ),
    (lambda: info_nce(X, Y, z_loss=-1.0), ValueError, "info_nce: z_loss must be in [0, inf), got -1.0"),
    (lambda: info_nce(X, Y, margin=-0.1), ValueError, "info_nce: margin must be in [0, inf), got -0.1"),
    (lambda: info_nce(X, Y, margin="0.1"), TypeError, "info_nce: margin must be a number, got str"),
    (lambda: info_nce(X, Y, pairs=3), TypeError, "info_nce: pairs must be Pairs or None, got int"),
    (lambda: clip(X, X, pairs=3, diagnostics=True), TypeError, "clip: pairs must be Pairs or None, got int"),
    (
        lambda: info_nce(X, Y, pairs=Pairs(differ=(IDS, IDS))),
        ValueError,
        "info_nce: pairs.differ of the columns must have shape (5,), got (4,)",
    ),
    (
        lambda: info_nce(X, Y, pairs=Pairs(differ=(IDS.float(), IDS))),
        TypeError,
        "info_nce: pairs.differ of the rows must be int64, got torch.float32",
    ),
    (
        lambda: info_nce(X, Y, weight=torch.tensor([1.0, -2.0, 1.0, 1.0])),
        ValueError,
        "info_nce: weight must not be negative, got -2.0",
    ),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[m[:60] for *_, m in CASES])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


@pytest.mark.parametrize("mode", ["in batch", "unpaired", "paired"])
def test_parity_with_info_nce_pytorch(backend, mode):
    """Explicit negatives replace those of the batch there: a queue for all rows, or a list for each."""
    theirs = pytest.importorskip("info_nce").info_nce
    query, key, shared, own = leaf(20, 8), leaf(20, 8), leaf(13, 8), leaf(20, 3, 8)
    options = {"temperature": 0.1, "backend": backend}
    if mode == "in batch":
        check(info_nce(query, key, **options), theirs(query, key), [query, key])
    elif mode == "unpaired":
        frozen = shared.detach()
        check(moco(query, key, frozen, **options), theirs(query, key, frozen), [query, key])
    else:
        ours = info_nce(query, key, row_negatives=own, pairs=Pairs(below=-torch.inf), **options)
        check(ours, theirs(query, key, own, negative_mode="paired"), [query, key, own])
