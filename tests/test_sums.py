"""Sums of millions of rows into few: 1e-6 relative at most, where float32 added up one by one drifts by thousandths.

Sites are found by a search of the source: nothing there adds rows to rows but the helpers of `core/ordered.py`,
apart from sums of integers and of numbers that are scattered to places of their own.
"""

import pathlib
import re

import pytest
import torch

import contrastive_ops
from contrastive_ops import route, similarity_reduce, similarity_topk
from contrastive_ops.core.ordered import (
    add_segments,
    long_product,
    ordered_logsumexp,
    ordered_sum,
    repeated,
    segment_rows,
    segment_sums,
)
from contrastive_ops.losses import barlow_twins, covariance_penalty, vicreg
from contrastive_ops.metrics import isotropy
from contrastive_ops.ops import RouterLoss, maxsim, maxsim_pairs, similarity_distill, similarity_values
from contrastive_ops.ops.router_losses import entropy_of, relative_entropy

MILLIONS = 4_000_000
BOUND = 1e-6


def relative(got, truth):
    return float(((got.detach().double() - truth.detach()).abs() / truth.detach().abs()).max())


def few_values(rows, values=(0.7, 0.3, -0.45)):
    return torch.tensor(values)[torch.randint(len(values), (rows, 1), generator=torch.Generator().manual_seed(0))]


# Sums of whole numbers: tokens of an expert, near-duplicates of a candidate.
COUNTS = {"ops/expert_choice.py": 1, "mining/_near_duplicates.py": 1}


def test_rows_are_added_to_rows_in_one_place():
    package = pathlib.Path(contrastive_ops.__file__).parent
    found = {}
    for path in package.rglob("*.py"):
        number = len(
            re.findall(r"\.index_add_?\(|\.index_reduce|segment_reduce\(|bincount\([^)]*weights", path.read_text())
        )
        if number and path.name != "ordered.py":
            found[path.relative_to(package).as_posix()] = number
    assert found == COUNTS


# ---- Helpers -------------------------------------------------------------------------------------------------------


def test_long_sums_have_the_same_bits_for_any_number_of_threads():
    """torch splits a sum of more than 32,768 numbers among its threads."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_003, generator=generator).requires_grad_()
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            one = torch.ones((), requires_grad=True)
            (gradient,) = torch.autograd.grad(repeated(one, len(values)), one, values.detach())
            found.append([ordered_sum(values), ordered_logsumexp(values), gradient])
    finally:
        torch.set_num_threads(before)
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


def test_sums_of_segments():
    values, segments = few_values(MILLIONS), torch.randint(-1, 3, (MILLIONS,))
    truth = torch.stack([values[segments == each].double().sum(0) for each in range(3)])
    assert relative(segment_sums(values, segments, 3), truth) < BOUND
    total = torch.zeros(3, 1)
    add_segments(total, values, segments.clamp_min(0))
    truth[0] += values[segments == -1].double().sum(0)
    assert relative(total, truth) < BOUND


def test_gradients_of_sums_of_segments():
    segments = torch.tensor([0, 3, -1, 3, 1])
    values = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    table = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    for function, leaf in (
        (lambda v: segment_sums(v, segments, 4), values),
        (lambda t: segment_rows(t, segments), table),
    ):
        assert torch.autograd.gradcheck(function, leaf)
        assert torch.autograd.gradgradcheck(lambda v, function=function: function(v).square(), leaf)
    wide = torch.zeros(2, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad((segment_rows(wide, torch.ones(MILLIONS, dtype=torch.int64)) * 0.7).sum(), wide)
    assert relative(gradient[1:], torch.tensor([[0.7]]).double() * MILLIONS) < BOUND


def test_long_products_and_vectors():
    a, b = few_values(MILLIONS).T, few_values(MILLIONS, (1.1, 0.9))
    assert relative(long_product(a, b), a.double() @ b.double()) < BOUND
    a = torch.randn(3, 20_001, dtype=torch.float64, requires_grad=True)
    b = torch.randn(20_001, 2, dtype=torch.float64, requires_grad=True)
    for got, truth in zip(
        *(torch.autograd.grad(v.square().sum(), (a, b)) for v in (long_product(a, b), a @ b)), strict=True
    ):
        torch.testing.assert_close(got, truth)
    vector = torch.full((MILLIONS,), 0.1)
    assert relative(ordered_sum(vector), vector.double().sum()) < BOUND
    assert relative(ordered_logsumexp(vector), vector.double().logsumexp(0)) < BOUND


# ---- Folds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kinds", [("logsumexp", "sum"), ("sum_softplus", "sum_relu", "count")])
def test_folds_over_millions(kinds, dim, backend):
    few, many = torch.tensor([[1.1], [0.9]]), few_values(MILLIONS if backend == "cpu" else MILLIONS // 2)
    given = [each.clone().requires_grad_() for each in ((few, many) if dim == 1 else (many, few))]
    scale = torch.tensor(1.0, requires_grad=True)
    folded = similarity_reduce(*given, reduce=kinds, dim=dim, scale=scale, backend=backend)
    own = given[0] if dim == 1 else given[1]
    got = folded.rows if dim == 1 else folded.cols
    wide, wide_scale = few.double().requires_grad_(), torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    logits = wide_scale * (wide @ many.double().T)
    dense = {
        "logsumexp": lambda: logits.logsumexp(1),
        "sum": lambda: logits.sum(1),
        "sum_softplus": lambda: torch.nn.functional.softplus(logits).sum(1),
        "sum_relu": lambda: logits.relu().sum(1),
        "count": lambda: torch.full((2,), float(len(many)), dtype=torch.float64),
    }
    truths = [dense[kind]() for kind in kinds]
    for value, truth in zip(got, truths, strict=True):
        assert relative(value, truth) < BOUND
    totals = [sum(v.sum() for v, kind in zip(each, kinds, strict=True) if kind != "count") for each in (got, truths)]
    gradients = [torch.autograd.grad(totals[0], (own, scale)), torch.autograd.grad(totals[1], (wide, wide_scale))]
    for value, truth in zip(*gradients, strict=True):
        assert relative(value, truth) < BOUND


def test_counts_are_exact_beyond_the_digits_of_float32(backend):
    many = torch.zeros(2**24 + 4, 1)
    folded = similarity_reduce(torch.ones(1, 1), many, reduce="count", backend=backend)
    assert float(folded[0]) == 2**24 + 4


def test_gradients_of_a_column_that_millions_list(backend):
    rows = 1_000_000
    x, y = torch.full((rows, 1), 0.7), torch.tensor([[1.1], [-2.0]], requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    for metric, truth in (("dot", 0.7 * rows), ("sqeuclidean", 2 * (0.7 - 1.1) * rows)):
        found = similarity_topk(x, y, 1, col_bias=bias, metric=metric, backend=backend)
        dy, dbias = torch.autograd.grad((found.values * 0.3).sum(), (y, bias))
        assert relative(dy[0], torch.tensor([0.3 * truth]).double()) < BOUND
        assert relative(dbias[:1], torch.tensor([0.3 * rows]).double()) < BOUND


# ---- Divergences, weighted values ----------------------------------------------------------------------------------


def divergence_of_many(numbers, dim, kind, backend, dtype):
    """Of columns (or rows) with these logits of the student, and equal ones of the teacher."""
    few = torch.ones(2, 1, dtype=dtype, requires_grad=True)
    many, teacher = numbers[:, None].to(dtype), [torch.zeros(k, 1, dtype=dtype) for k in (2, len(numbers))]
    x, y, tx, ty = (few, many, *teacher) if dim == 1 else (many, few, *teacher[::-1])
    return similarity_distill(x, y, tx, ty, divergence=kind, dim=dim, backend=backend), few


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("hub", ["document", "query"])
def test_gradients_of_a_token_that_wins_thousands_of_times(hub, paired, backend):
    many, one = torch.full((8000, 1, 5), 0.1), torch.full((1, 1, 5), 0.1)
    sides = [one, many] if hub == "query" else [many, one]
    leaves = [t.requires_grad_() for t in sides]
    if paired:
        rows = torch.arange(8000)
        pairs = (rows, 0 * rows) if hub == "document" else (0 * rows, rows)
        scores = maxsim_pairs(*leaves, pairs, backend=backend)
    else:
        scores = maxsim(*leaves, backend=backend)
    gradient = torch.autograd.grad(scores.sum(), one)[0]
    assert float((gradient / 8000 / 0.1 - 1).abs().max()) < BOUND


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "ce", "js"])
def test_divergences_of_long_lines(kind, dim):
    """A few large logits, and many of which those of 64 rows are less than half of the last place of their sum."""
    numbers = torch.full((1 << 17,), -15.4)
    numbers[:64] = 0.0
    got, _ = divergence_of_many(numbers, dim, kind, "cpu", torch.float32)
    truth, _ = divergence_of_many(numbers, dim, kind, "reference", torch.float64)
    assert relative(got, truth) < 2 * BOUND


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", ["reverse_kl", "js"])
def test_gradients_of_decided_lines_that_are_long(kind, dim):
    """The derivative of the decided entry is minus the sum of the others."""
    numbers = torch.full((1 << 19,), -10.0)
    numbers[0] = 10.0
    got, truth = (
        torch.autograd.grad(value.sum(), few)[0]
        for value, few in (
            divergence_of_many(numbers, dim, kind, "cpu", torch.float32),
            divergence_of_many(numbers, dim, kind, "reference", torch.float64),
        )
    )
    assert relative(got, truth) < 5 * BOUND


@pytest.mark.parametrize("many", ["x", "y"])
def test_gradients_of_decided_rows_beside_hundreds_of_thousands(many, backend):
    """Gradients of few rows are summed in float64, and what belongs to decided entries with them."""
    size = 1 << 19
    numbers = torch.full((size, 1), -6.0)
    numbers[0] = 14.0
    x, y = (torch.ones(2, 1), numbers) if many == "y" else (torch.full((size, 1), 3.0), torch.tensor([[2.0], [-2.0]]))
    values = torch.arange(len(y), dtype=torch.float32).remainder(7)[:, None]
    single = [each.clone().requires_grad_() for each in (x, y)]
    double = [each.double().requires_grad_() for each in (x, y)]
    few = int(many == "x")
    (got,) = torch.autograd.grad(similarity_values(*single, values, backend=backend).sum(), single[few])
    truth = torch.autograd.grad(((double[0] @ double[1].T).softmax(1) @ values.double()).sum(), double[few])[0]
    assert relative(got, truth) < 5 * BOUND


# ---- Routers and measures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [False, True])
def test_router_losses_of_millions_of_tokens(same, backend):
    tokens = MILLIONS // 2
    logits = torch.randn(1 if same else tokens, 2) * 0.3 + torch.tensor([0.5, 0.0])
    logits = logits.expand(tokens, 2).contiguous()
    names = ["switch", "importance", "z", "local_entropy", "global_entropy"]
    routing = route(logits, 1, losses=[RouterLoss(name) for name in names], backend=backend)
    p = logits.double().softmax(1)
    mean = p.mean(0)
    share = torch.nn.functional.one_hot(logits.argmax(1), 2).double().mean(0)
    truths = {
        "switch": 2 * (share * mean).sum(),
        "importance": mean.var(correction=0) / mean.mean().square(),
        "z": logits.double().logsumexp(1).square().mean(),
        "local_entropy": -(p * p.log()).sum(1).mean(),
        "global_entropy": (mean * mean.log()).sum(),
    }
    for name, truth in truths.items():
        # A squared variation of means is twice as far off as they are, relative to their difference.
        assert relative(routing.losses[name], truth) < (BOUND if name != "importance" else 1e-5), name
    metrics = routing.metrics
    assert relative(metrics["entropy"], truths["local_entropy"]) < BOUND
    top = p.topk(2).values
    assert relative(metrics["top1_margin"], (top[:, 0] - top[:, 1]).mean()) < BOUND


def test_mutual_information_is_no_difference_of_entropies():
    for size in (1e-2, 1e-3, 1e-4):
        counts = (1e7 * (1 + size * torch.randn(3, 4, dtype=torch.float64))).round()
        exact = counts / counts.sum()
        truth = (exact * (exact / (exact.sum(1, keepdim=True) * exact.sum(0))).log()).sum()
        p = exact.float()
        got = relative_entropy(p, p.sum(1, keepdim=True) * p.sum(0))
        assert abs(float(got) / float(truth) - 1) < 1e-6 / size
    p = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
    assert float(relative_entropy(p, torch.full((2, 2), 0.25))) == pytest.approx(float(entropy_of(torch.ones(2) / 2)))


@pytest.mark.parametrize("spread", [0.05, 1e-3])
def test_isotropy_of_millions_of_rows(spread):
    x = torch.randn(MILLIONS // 4, 2) * spread + torch.tensor([1.0, 2.0])
    segments = torch.randint(-1, 2, (len(x),))
    unit, apart, pairs = torch.nn.functional.normalize(x.double(), dim=1), 0.0, 0.0
    for own in (unit[segments == each] for each in (0, 1)):
        apart += len(own) * float((own - own.mean(0)).square().sum())
        pairs += len(own) * (len(own) - 1)
    assert float(isotropy(x, segments)) == pytest.approx(apart / pairs, rel=BOUND)


# ---- A small number as the difference of two large sums ------------------------------------------------------------


def plain_covariance(x):
    covariance = x.T.cov()
    return (covariance - torch.diag(covariance.diagonal())).square().sum() / x.shape[1]


def plain_barlow(x, y):
    x, y = ((each - each.mean(0)) * (each.var(0, correction=0) + 1e-5).rsqrt() for each in (x, y))
    c = x.T @ y / len(x)
    return (c.diagonal() - 1).square().sum() + 0.0051 * (c - torch.diag(c.diagonal())).square().sum()


def norm_of(matrix):
    return float(torch.linalg.vector_norm(matrix))


@pytest.mark.parametrize("shape", [(128, 256), (32, 256), (200, 64), (100, 101)])
@pytest.mark.parametrize("std", [1.0, 100.0, 10_000.0])
@pytest.mark.parametrize("large", [1, 40])
def test_features_with_large_ones_among_them(shape, std, large):
    x = torch.randn(shape)
    x[:, :large] *= std
    y = x + 1e-2 * torch.randn(shape)
    for function, truth, given in (
        (covariance_penalty, plain_covariance, (x,)),
        (barlow_twins, plain_barlow, (x, y)),
        (lambda *views: vicreg(*views, invariance=0.0, variance=0.0), lambda *v: sum(map(plain_covariance, v)), (x, y)),
    ):
        single = [each.clone().requires_grad_() for each in given]
        double = [each.double().requires_grad_() for each in given]
        value, expected = function(*single), truth(*double)
        assert relative(value, expected) < 3e-6
        gradients = torch.autograd.grad(value, single), torch.autograd.grad(expected, double)
        for got, wide in zip(*gradients, strict=True):
            # Also of the large feature alone, which is one of many.
            assert norm_of(got.double() - wide) / norm_of(wide) < 1e-5
            assert norm_of((got.double() - wide)[:, 0]) / norm_of(wide[:, 0]) < 1e-5
