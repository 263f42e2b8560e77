"""SigLIP, several positives and BiXSE against torch's binary cross-entropy in float64."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from torch.nn import functional as F

from contrastive_ops import Pairs
from contrastive_ops.losses import bixse, multi_positive_siglip, pair_bce, siglip
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, TOLERANCE, clustered_pairs, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, number, reduced

DOUBLE = torch.float64
REDUCTIONS = ("mean", "sum", "none")
FUZZ = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def cross_entropy(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


def dense_logits(x, y, scale, bias, normalize=False):
    x, y = (F.normalize(x), F.normalize(y)) if normalize else (x, y)
    scale = scale[:, None] if scale.dim() else scale
    return scale * (x @ y.T) + bias


def dense_siglip(x, y, scale, bias, normalize=False):
    sign = 2 * torch.eye(len(x), dtype=DOUBLE) - 1
    return -F.logsigmoid(sign * dense_logits(x, y, scale, bias, normalize)).sum(1)


def dense_multi(x, y, scale, bias, row_ids, col_ids, balanced):
    logits = dense_logits(x, y, scale, bias)
    positive = (row_ids[:, None] == col_ids) & (row_ids[:, None] != -1)
    losses = cross_entropy(logits, positive.to(DOUBLE))
    if balanced:
        counts = positive.sum(1, keepdim=True), (~positive).sum(1, keepdim=True)
        losses = losses / torch.where(positive, *counts).clamp(min=1)
    return losses.sum(1)


def dense_bixse(x, y, scale, bias, rows, cols, grades):
    labels = torch.zeros(len(x), len(y), dtype=DOUBLE).index_put((rows, cols), grades)
    return cross_entropy(dense_logits(x, y, scale, bias), labels).sum(1)


@st.composite
def cases(draw):
    """Shapes and options; tensors follow from the seed."""
    torch.manual_seed(draw(st.integers(0, 1 << 20)))
    rows, columns = draw(st.integers(0, 9)), draw(st.integers(0, 11))
    case = {
        "x": leaf(rows, 5),
        "y": leaf(columns, 5),
        "scale": number(1.7) if draw(st.booleans()) else (0.5 + torch.rand(rows, dtype=DOUBLE)).requires_grad_(),
        "bias": number(-1.3),
        "weight": torch.rand(rows, dtype=DOUBLE).requires_grad_() if draw(st.booleans()) else None,
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }
    highest = draw(st.integers(-1, 6))
    ids = st.integers(-1, highest)
    case["row_ids"] = torch.tensor(draw(st.lists(ids, min_size=rows, max_size=rows)), dtype=torch.int64)
    case["col_ids"] = torch.tensor(draw(st.lists(ids, min_size=columns, max_size=columns)), dtype=torch.int64)
    case["flag"] = draw(st.booleans())
    return case


def common(case):
    return {name: case[name] for name in ("scale", "bias", "weight", "reduction")}


def leaves_of(case):
    return [case[name] for name in ("x", "y", "scale", "bias", "weight")]


@FUZZ
@given(case=cases())
def test_siglip(backend, case):
    case["y"] = leaf(*case["x"].shape)
    x, y, normalize = case["x"], case["y"], case["flag"]
    value = siglip(x, y, normalize=normalize, backend=backend, **common(case))
    truth = dense_siglip(x, y, case["scale"], case["bias"], normalize)
    check(value, reduced(truth, case["reduction"], case["weight"]), leaves_of(case))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_false_negatives_and_a_bias_of_columns(backend, reduction, several):
    """Texts with the image's id are left out by rules, or are positives."""
    x, y, scale, col_bias = leaf(9, 5), leaf(9, 5), number(1.7), leaf(9)
    ids, own = torch.arange(9) // 2, torch.eye(9, dtype=torch.bool)
    equal = ids[:, None] == ids
    logits = dense_logits(x, y, scale, -1.0, True) + col_bias
    options = {"scale": scale, "bias": -1.0, "col_bias": col_bias, "reduction": reduction, "backend": backend}
    pushed, pulled = F.softplus(logits) * ~equal, F.softplus(-logits)
    if several:
        value, truth = multi_positive_siglip(x, y, ids, **options), (pushed + pulled * equal).sum(1)
    else:
        value, truth = siglip(x, y, pairs=Pairs(differ=(ids, ids)), **options), (pushed + pulled * own).sum(1)
    check(value, reduced(truth, reduction), [x, y, scale, col_bias])


@FUZZ
@given(case=cases())
def test_multi_positive_siglip(backend, case):
    x, y, row_ids, col_ids, balanced = (case[name] for name in ("x", "y", "row_ids", "col_ids", "flag"))
    value = multi_positive_siglip(
        x, y, row_ids, col_ids, balanced=balanced, backend=backend, normalize=False, **common(case)
    )
    truth = dense_multi(x, y, case["scale"], case["bias"], row_ids, col_ids, balanced)
    check(value, reduced(truth, case["reduction"], case["weight"]), leaves_of(case))


@FUZZ
@given(case=cases())
def test_bixse_with_one_grade(backend, case):
    x, y, own = case["x"], case["y"], case["flag"]
    if len(y) < (len(x) if own else 1):
        y = case["y"] = leaf(len(x) + 1, 5)
    grades = torch.rand(len(x), dtype=DOUBLE).requires_grad_()
    target = torch.arange(len(x)) if own else torch.randint(0, len(y), (len(x),))
    value = bixse(x, y, grades, target=None if own else target, backend=backend, normalize=False, **common(case))
    truth = dense_bixse(x, y, case["scale"], case["bias"], torch.arange(len(x)), target, grades)
    check(value, reduced(truth, case["reduction"], case["weight"]), [*leaves_of(case), grades])


@FUZZ
@given(case=cases())
def test_bixse_with_lists(backend, case):
    x, y = case["x"], case["y"]
    listed = torch.rand(len(x), len(y)) < 0.3
    rows, cols = listed.nonzero(as_tuple=True)
    order = (rows + torch.rand(len(rows))).argsort()  # unsorted within each row
    rows, cols = rows[order], cols[order]
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    grades = torch.rand(len(rows), dtype=DOUBLE).round().requires_grad_() if case["flag"] else leaf(len(rows))
    grades = grades if case["flag"] else grades.detach().sigmoid().requires_grad_()
    value = bixse(x, y, grades, target=cols, indptr=indptr, backend=backend, normalize=False, **common(case))
    truth = dense_bixse(x, y, case["scale"], case["bias"], rows, cols, grades)
    check(value, reduced(truth, case["reduction"], case["weight"]), [*leaves_of(case), grades])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_more_rows_than_a_tile(backend, reduction):
    x, y, scale, bias = leaf(300, 24), leaf(300, 24), number(1.1), number(-4.0)
    options = {"scale": scale, "bias": bias, "reduction": reduction, "backend": backend}
    check(
        siglip(x, y, normalize=False, **options),
        reduced(dense_siglip(x, y, scale, bias), reduction),
        [x, y, scale, bias],
    )
    ids = torch.randint(0, 40, (300,))
    value = multi_positive_siglip(x, y, ids, normalize=False, **options)
    check(value, reduced(dense_multi(x, y, scale, bias, ids, ids, False), reduction), [x, y, scale, bias])


def test_defaults_are_those_of_the_paper(backend):
    x, y = leaf(6, 4), leaf(6, 4)
    check(siglip(x, y, backend=backend, normalize=False), dense_siglip(x, y, torch.tensor(10.0), -10.0).mean(), [x, y])
    check(
        siglip(x, y, temperature=0.5, backend=backend, normalize=False),
        dense_siglip(x, y, torch.tensor(2.0), -10.0).mean(),
        [x, y],
    )


def test_distinct_ids_are_siglip_and_binary_grades_of_one_too(backend):
    x, y = leaf(7, 4), leaf(7, 4)
    truth = siglip(x, y, reduction="none", backend=backend, normalize=False)
    torch.testing.assert_close(
        multi_positive_siglip(x, y, torch.arange(7), reduction="none", backend=backend, normalize=False), truth
    )
    ones = torch.ones(7, dtype=DOUBLE)
    torch.testing.assert_close(bixse(x, y, ones, reduction="none", backend=backend, normalize=False), truth)
    lists = {"target": torch.arange(7), "indptr": torch.arange(8)}
    torch.testing.assert_close(bixse(x, y, ones, reduction="none", backend=backend, normalize=False, **lists), truth)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, reduction):
    x, y, scale, bias, weight = leaf(4, 3), leaf(4, 3), number(1.3), number(-0.7), torch.rand(4, dtype=DOUBLE)
    ids, indptr, listed = torch.tensor([0, 0, 1, -1]), torch.tensor([0, 2, 2, 3, 4]), torch.tensor([3, 0, 1, 2])
    grades = torch.rand(4, dtype=DOUBLE)
    options = {"reduction": reduction, "backend": backend}

    def of_siglip(x, y, scale, bias, weight, grades):
        return siglip(x, y, scale=scale, bias=bias, weight=weight, normalize=False, **options)

    def of_multi(x, y, scale, bias, weight, grades):
        return multi_positive_siglip(
            x, y, ids, scale=scale, bias=bias, weight=weight, balanced=True, normalize=False, **options
        )

    def of_bixse(x, y, scale, bias, weight, grades):
        return bixse(x, y, grades, scale=scale, bias=bias, weight=weight, normalize=False, **options)

    def of_lists(x, y, scale, bias, weight, grades):
        lists = {"target": listed, "indptr": indptr}
        return bixse(x, y, grades, scale=scale, bias=bias, weight=weight, normalize=False, **lists, **options)

    leaves = (x, y, scale, bias, weight.requires_grad_(), grades.requires_grad_())
    for function in (of_siglip, of_multi, of_bixse, of_lists):
        check_derivatives(function, leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 3)])
def test_gradients_of_some_inputs_alone(backend, wanted):
    every = [leaf(20, 6), leaf(20, 6), number(3.0), number(-2.0)]
    chosen = [t if k in wanted else t.detach() for k, t in enumerate(every)]
    value = siglip(chosen[0], chosen[1], scale=chosen[2], bias=chosen[3], backend=backend, normalize=False)
    check(value, dense_siglip(*chosen).mean(), [chosen[k] for k in wanted])


@pairwise(dtype=[torch.bfloat16, torch.float16, torch.float32], level=[0.3, 0.001], reduction=["mean", "none"])
def test_gradient_error(backend, dtype, level, reduction):
    a, b = (t.requires_grad_() for t in clustered_pairs(256, 96, level, dtype=dtype))
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    scale, bias, ids, grades = torch.tensor(40.0), -30.0, torch.arange(256) // 2, torch.rand(256)
    options = {"scale": scale, "bias": bias, "reduction": reduction, "backend": backend}
    rows, cols = torch.arange(256), torch.arange(256).roll(1)
    lists = {"target": cols, "indptr": torch.arange(257)}
    cases = [
        (siglip(a, b, normalize=False, **options), dense_siglip(*exact, scale.double(), bias)),
        (
            multi_positive_siglip(a, b, ids, normalize=False, **options),
            dense_multi(*exact, scale.double(), bias, ids, ids, False),
        ),
        (
            bixse(a, b, grades, normalize=False, **options),
            dense_bixse(*exact, scale.double(), bias, rows, rows, grades.double()),
        ),
        (
            bixse(a, b, grades, normalize=False, **lists, **options),
            dense_bixse(*exact, scale.double(), bias, rows, cols, grades.double()),
        ),
        (
            pair_bce(a, b, rows, cols, grades, scale=scale, bias=bias, reduction=reduction),
            cross_entropy(scale * (exact[0] * exact[1][cols]).sum(1) + bias, grades.double()),
        ),
    ]
    bound = 1e-4 if dtype == torch.float32 else GRADIENT_ERROR_16_BIT
    for value, truth in cases:
        assert value.dtype == torch.float32
        value, truth = value.mean(), truth.mean()
        assert relative_error(value, truth) <= 1e-4
        gradients = zip(torch.autograd.grad(value, [a, b]), torch.autograd.grad(truth, exact), strict=True)
        for got, expected in gradients:
            assert got.dtype == dtype
            assert relative_error(got, expected) <= bound


def test_small_losses_are_exact_in_float32(backend):
    """softplus(l) - l would be 0 or negative at l = 20."""
    x = torch.eye(8)
    truth = 8 * torch.exp(torch.tensor(-20.0, dtype=DOUBLE)).log1p()
    options = {"scale": 40.0, "bias": -20.0, "backend": backend}
    lists = {"target": torch.arange(8), "indptr": torch.arange(9)}
    assert relative_error(siglip(x, x, normalize=False, **options), truth) <= 1e-6
    assert relative_error(multi_positive_siglip(x, x, torch.arange(8), normalize=False, **options), truth) <= 1e-6
    assert relative_error(bixse(x, x, torch.ones(8), normalize=False, **options), truth) <= 1e-6
    assert relative_error(bixse(x, x, torch.ones(8), normalize=False, **lists, **options), truth) <= 1e-6
    own = torch.arange(8)
    assert relative_error(pair_bce(x, x, own, own, torch.ones(8), scale=40.0, bias=-20.0), truth / 8) <= 1e-6


def test_rows_without_positives_count(backend):
    x, y = leaf(5, 4), leaf(3, 4)
    none = torch.full((5,), -1)
    truth = F.softplus(dense_logits(x, y, torch.tensor(10.0), -10.0)).sum(1).mean()
    check(
        multi_positive_siglip(x, y, none, torch.zeros(3, dtype=torch.int64), backend=backend, normalize=False),
        truth,
        [x, y],
    )


def test_open_clip(backend):
    loss = pytest.importorskip("open_clip.loss")
    x, y, scale, bias = leaf(40, 16), leaf(40, 16), number(10.0), number(-10.0)
    truth = loss.SigLipLoss()(x, y, logit_scale=scale, logit_bias=bias)
    check(siglip(x, y, scale=scale, bias=bias, backend=backend, normalize=False), truth, [x, y, scale, bias])


def test_float16_mean_over_many_rows(backend):
    a, b = (t.half().requires_grad_() for t in (torch.randn(2000, 8), torch.randn(2000, 8)))
    value = siglip(a, b, scale=1.0, bias=-7.0, backend=backend, normalize=False) * 65536.0
    exact = [t.detach().double().requires_grad_() for t in (a, b)]
    truth = torch.autograd.grad(dense_siglip(*exact, torch.tensor(1.0), -7.0).mean() * 65536.0, exact)
    for got, expected in zip(torch.autograd.grad(value, [a, b]), truth, strict=True):
        assert relative_error(got, expected) <= TOLERANCE[torch.float16]


# ---- Bad input -----------------------------------------------------------------------------------------------------

X, Y, IDS, GRADES = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4), torch.rand(4)
CASES = [
    (lambda: siglip(X, Y), ValueError, "siglip: text must have the same shape as image, got image (4, 3) and text"),
    (
        lambda: siglip(X, X, bias=torch.zeros(4)),
        ValueError,
        "siglip: bias must be one number, got a tensor of shape (4,)",
    ),
    (lambda: siglip(X, X, bias="0"), TypeError, "siglip: bias must be a number, got str"),
    (
        lambda: siglip(X, X, bias=torch.tensor(True)),
        TypeError,
        "siglip: bias must be a number or a floating tensor, got torch.bool",
    ),
    (lambda: siglip(X, X, temperature=0.0), ValueError, "siglip: temperature must be in (0, inf], got 0.0"),
    (lambda: siglip(X, X, weight=-GRADES), ValueError, "siglip: weight must not be negative, got -"),
    (lambda: siglip(X, X, weight=GRADES[:2]), ValueError, "siglip: weight must have shape (4,), got (2,)"),
    (
        lambda: siglip(X, X, scale=GRADES[:2]),
        ValueError,
        "siglip: scale must be one number or have shape (4,)",
    ),
    (
        lambda: multi_positive_siglip(X, Y, IDS[:3], torch.arange(5)),
        ValueError,
        "multi_positive_siglip: labels must have shape (4,), got (3,)",
    ),
    (
        lambda: multi_positive_siglip(X, Y, IDS),
        ValueError,
        "multi_positive_siglip: col_labels must have shape (5,), got (4,)",
    ),
    (
        lambda: multi_positive_siglip(X, X, GRADES),
        TypeError,
        "multi_positive_siglip: labels must be int64, got torch.float32",
    ),
    (
        lambda: bixse(Y, X, torch.rand(5)),
        ValueError,
        "bixse: key must have at least as many rows as query where target is not given",
    ),
    (lambda: bixse(X, Y, GRADES[:3]), ValueError, "bixse: grades must have shape (4,), got (3,)"),
    (lambda: bixse(X, Y, GRADES + 1), ValueError, "bixse: grades must be in [0, 1], got 1."),
    (lambda: bixse(X, Y, GRADES * torch.nan), ValueError, "bixse: grades must be in [0, 1], got nan"),
    (lambda: bixse(X, Y, IDS), TypeError, "bixse: grades must be a floating tensor, got torch.int64"),
    (lambda: bixse(X, Y, GRADES, target=IDS + 2), ValueError, "bixse: target must be in [0, 5), got 5"),
    (
        lambda: bixse(X, Y, GRADES, indptr=torch.arange(5)),
        ValueError,
        "bixse: target must be given with indptr, got None",
    ),
    (
        lambda: bixse(X, Y, GRADES, target=IDS, indptr=torch.arange(4)),
        ValueError,
        "bixse: target indptr must have shape (5,), got (4,)",
    ),
    (
        lambda: bixse(X, Y, GRADES, target=IDS + 2, indptr=torch.arange(5)),
        ValueError,
        "bixse: target indices must be in [0, 5), got 5 in the list of row 3",
    ),
    (
        lambda: bixse(X, Y, GRADES, target=torch.ones(4).long(), indptr=torch.tensor([0, 1, 3, 3, 4])),
        ValueError,
        "bixse: target must name each key at most once per query, got 1 twice in the list of row 1",
    ),
    (
        lambda: bixse(X, Y, GRADES, target="all", indptr=torch.arange(5)),
        TypeError,
        "bixse: target must be a tensor, got str",
    ),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[m[:60] for *_, m in CASES])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
