"""similarity_reduce against dense float64: values, every gradient, shapes, extreme values, low precision."""

import itertools

import pytest
import torch

from contrastive_ops import Pairs, similarity_reduce
from contrastive_ops.ops import Reduced, merge_lse
from contrastive_ops.testing import TOLERANCE, Problem, dense, relative_error, sample_problem
from contrastive_ops.testing.compare import check_derivatives

# (N, M, D): one of everything, primes, a column count around the block of 128 and the chunk of 512 rows, dimensions
# below, at and not a multiple of a vector.
SHAPES = [
    (1, 1, 1),
    (1, 7, 3),
    (7, 1, 8),
    (37, 41, 67),
    (64, 127, 16),
    (65, 128, 17),
    (63, 129, 15),
    (511, 257, 5),
    (513, 300, 33),
    (1030, 131, 9),
]


def fold(problem: Problem, backend: str, dim=(0, 1), memory_budget=0):
    reduced = similarity_reduce(
        problem.x,
        problem.y,
        dim=dim,
        scale=problem.scale,
        row_bias=problem.row_bias,
        col_bias=problem.col_bias,
        target=problem.target,
        pairs=Pairs(diagonal=problem.diagonal),
        memory_budget=memory_budget,
        backend=backend,
    )
    return [v for v in reduced[:3] if v is not None]


def total_of(values, cotangents):
    """A scalar that weighs every finite output; rows without a pair (-inf) have no say."""
    parts = [
        (v.masked_fill(v == -torch.inf, 0.0) * c.to(v.dtype)).sum() for v, c in zip(values, cotangents, strict=True)
    ]
    return sum(parts)


def check_against_truth(problem: Problem, backend: str, memory_budget=0, tolerance=None):
    tolerance = tolerance or TOLERANCE[problem.x.dtype]
    truth, eager = problem.to(torch.float64), problem.to(problem.x.dtype)
    expected, plain = ([v for v in dense(p) if v is not None] for p in (truth, eager))
    got = fold(problem, backend, memory_budget=memory_budget)
    cotangents = [torch.randn(v.shape) for v in expected]
    gradients = torch.autograd.grad(total_of(got, cotangents), problem.leaves())
    expected_gradients = torch.autograd.grad(total_of(expected, cotangents), truth.leaves())
    plain_gradients = torch.autograd.grad(total_of(plain, cotangents), eager.leaves())
    rows = list(zip(got, expected, plain, strict=True))
    rows += list(zip(gradients, expected_gradients, plain_gradients, strict=True))
    for value, exact, low in rows:
        assert relative_error(value, exact) <= 2 * relative_error(low, exact) + tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype):
    check_against_truth(sample_problem(*shape, dtype=dtype, target=shape[1] > 1), backend)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_self_similarity(backend, shape):
    rows, _, depth = shape
    problem = sample_problem(rows, rows, depth, self_similarity=True, diagonal=0, target=rows > 2, dtype=torch.float64)
    check_against_truth(problem, backend)


@pytest.mark.parametrize("diagonal", [None, 0, 3, -40, 1000])
@pytest.mark.parametrize("self_similarity", [False, True])
def test_diagonal(backend, diagonal, self_similarity):
    problem = sample_problem(150, 140, 12, diagonal=diagonal, self_similarity=self_similarity, dtype=torch.float64)
    check_against_truth(problem, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("self_similarity", [False, True])
def test_low_precision_is_no_worse_than_torch(backend, dtype, self_similarity):
    problem = sample_problem(130, 257, 33, dtype=dtype, self_similarity=self_similarity, diagonal=0)
    # Plain torch needs one dtype; ours keeps scale and biases in float32 as they came.
    check_against_truth(problem, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_residuals_of_rounded_weights_are_given_back(side, dtype, backend):
    """Where all rows of the other side are one row, the weights of a row and its target cancel, however they round."""
    size = 67  # 1 / 67 is rounded, each time in the same direction
    own = torch.randn(size, 24).to(dtype).requires_grad_()
    other = torch.randn(1, 24).to(dtype).expand(size, 24).contiguous()
    target = torch.randperm(size)
    x, y, dim = (own, other, 1) if side == "rows" else (other, own, 0)
    found = similarity_reduce(x, y, dim=dim, target=target, backend=backend)
    folds = found.rows if side == "rows" else found.cols[target]
    (gradient,) = torch.autograd.grad((folds - found.target).sum(), own)
    assert float(gradient.abs().max()) <= 1e-4 * float(other[0].abs().max())


@pytest.mark.parametrize("per_row_scale,biases,target", list(itertools.product([False, True], repeat=3)))
def test_options(backend, per_row_scale, biases, target):
    problem = sample_problem(70, 50, 20, per_row_scale=per_row_scale, biases=biases, target=target, dtype=torch.float64)
    check_against_truth(problem, backend)


@pytest.mark.parametrize("budget", [0, 1, 700 * 300 * 4, 1 << 30, None])
@pytest.mark.parametrize("self_similarity", [False, True])
def test_memory_budget_does_not_change_a_bit(budget, self_similarity, backend):
    problem = sample_problem(1100, 300, 64, self_similarity=self_similarity, diagonal=0)
    results = []
    for each in (0, budget):
        got = fold(problem, backend, memory_budget=each)
        cotangents = [torch.linspace(-1, 1, len(v)) for v in got]
        results.append([*got, *torch.autograd.grad(total_of(got, cotangents), problem.leaves())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [w for n in (1, 2, 5) for w in itertools.combinations(range(5), n)], ids=str)
def test_every_subset_of_gradients(backend, wanted):
    full = sample_problem(40, 30, 16, dtype=torch.float64)
    names = ("x", "y", "scale", "row_bias", "col_bias")
    every = dict(zip(names, full.leaves(), strict=True))

    def gradients(chosen):
        inputs = {name: every[name].detach().requires_grad_(name in chosen) for name in names}
        problem = Problem(**inputs, target=full.target)
        got = fold(problem, backend)
        return torch.autograd.grad(sum(v.sin().sum() for v in got), [inputs[name] for name in chosen])

    chosen = [names[k] for k in wanted]
    for name, gradient in zip(chosen, gradients(chosen), strict=True):
        expected = dict(zip(names, gradients(names), strict=True))[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", [0, 1, (0, 1), (1, 0)])
def test_dim_and_return_type(backend, dim):
    x, y = torch.randn(9, 4), torch.randn(6, 4)
    got = similarity_reduce(x, y, dim=dim, backend=backend)
    logits = x @ y.T
    if isinstance(dim, int):
        torch.testing.assert_close(got, logits.logsumexp(dim))
    else:
        assert isinstance(got, Reduced) and got.target is None
        torch.testing.assert_close(got.rows, logits.logsumexp(1))
        torch.testing.assert_close(got.cols, logits.logsumexp(0))


@pytest.mark.parametrize("self_similarity", [False, True])
def test_gradcheck(backend, self_similarity):
    problem = sample_problem(6, 5, 4, dtype=torch.float64, self_similarity=self_similarity, diagonal=0)
    names = [n for n in ("x", "y", "scale", "row_bias", "col_bias") if getattr(problem, n) is not None]

    def function(*leaves):
        fields = dict(zip(names, leaves, strict=True))
        return tuple(fold(Problem(**fields, target=problem.target, diagonal=0), backend))

    leaves = [getattr(problem, n) for n in names]
    check_derivatives(function, leaves)


def strided(x):
    return torch.randn(x.shape[0], 2 * x.shape[1] + 3)[:, : 2 * x.shape[1] : 2].copy_(x)


@pytest.mark.parametrize(
    "view",
    [
        strided,
        lambda x: x.T.contiguous().T,
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x[:1].expand(x.shape),
        lambda x: x.flip(0),
    ],
    ids=["column-stride", "transposed", "row-stride", "expanded", "flipped"],
)
def test_strides(backend, view):
    x, y = view(torch.randn(33, 12)), view(torch.randn(45, 12))
    expected = similarity_reduce(x.contiguous(), y.contiguous(), dim=(0, 1), backend=backend)
    got = similarity_reduce(x, y, dim=(0, 1), backend=backend)
    assert torch.equal(got.rows, expected.rows) and torch.equal(got.cols, expected.cols)


def test_expanded_cotangent(backend):
    x = torch.randn(20, 6, requires_grad=True)
    similarity_reduce(x, torch.randn(9, 6), backend=backend).sum().backward()
    assert x.grad.shape == x.shape and x.grad.abs().sum() > 0


def test_retain_graph_gives_the_same_gradient_twice(backend):
    x = torch.randn(20, 64, requires_grad=True)
    loss = similarity_reduce(x, torch.randn(9, 64), backend=backend).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x)[0])


# ---- Empty and extreme ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,m,d", [(0, 5, 4), (5, 0, 4), (0, 0, 4), (3, 4, 0)])
def test_empty(backend, n, m, d):
    x, y = torch.randn(n, d, requires_grad=True), torch.randn(m, d, requires_grad=True)
    got = similarity_reduce(x, y, dim=(0, 1), backend=backend)
    logits = x.detach() @ y.detach().T
    assert torch.equal(got.rows, logits.logsumexp(1))
    assert torch.equal(got.cols, logits.logsumexp(0))
    gradients = torch.autograd.grad(got.rows.sum() + got.cols.sum(), [x, y])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_a_row_without_a_pair_is_minus_inf_with_gradient_zero(backend):
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    lse = similarity_reduce(x, y, pairs=Pairs(diagonal=0), backend=backend)
    assert lse[0] == -torch.inf and lse[1:].isfinite().all()
    gx, gy = torch.autograd.grad(lse.sum(), [x, y])
    assert torch.equal(gx[0], torch.zeros(4)) and gx.isfinite().all() and gy.isfinite().all()


@pytest.mark.parametrize("magnitude", [1e4, 1e-4, 0.0])
def test_extreme_logits(backend, magnitude):
    x, y = torch.randn(50, 8, dtype=torch.float64), torch.randn(140, 8, dtype=torch.float64)
    problem = Problem(x=x.float().requires_grad_(), y=y.float().requires_grad_(), scale=magnitude)
    check_against_truth(problem, backend, tolerance=1e-4 if magnitude == 1e4 else None)


def test_temperature_of_one_twohundredth(backend):
    x = torch.nn.functional.normalize(torch.randn(64, 32, dtype=torch.float64), dim=1)
    problem = Problem(x=x.float().requires_grad_(), y=x.flip(0).float().requires_grad_(), scale=200.0)
    check_against_truth(problem, backend, tolerance=1e-4)


def test_huge_bias_masks_columns(backend):
    x, y = torch.randn(10, 4), torch.randn(6, 4)
    bias = torch.tensor([0.0, -torch.inf, 0.0, -1e30, 1.0, -torch.inf])
    expected = (x @ y.T + bias).logsumexp(1)
    torch.testing.assert_close(similarity_reduce(x, y, col_bias=bias, backend=backend), expected)
    everything = similarity_reduce(x, y, col_bias=torch.full((6,), -torch.inf), backend=backend)
    assert torch.equal(everything, torch.full((10,), -torch.inf))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("columns", [5, 16, 140])
def test_nan_and_inf_propagate_to_their_rows_alone(backend, bad, columns):
    x, y = torch.randn(40, 8), torch.randn(columns, 8).abs()
    x[3, 2] = bad
    got = similarity_reduce(x, y, dim=(0, 1), backend=backend)
    logits = x @ y.T
    torch.testing.assert_close(got.rows, logits.logsumexp(1), equal_nan=True)
    torch.testing.assert_close(got.cols, logits.logsumexp(0), equal_nan=True)


def test_merge_lse_of_blocks_is_the_lse_of_all():
    x, y = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(12, 5, dtype=torch.float64)
    merged = merge_lse(*(similarity_reduce(x, part) for part in y.split([3, 4, 5])))
    torch.testing.assert_close(merged, (x @ y.T).logsumexp(1))
    torch.testing.assert_close(
        torch.autograd.grad(merged.sum(), x)[0], torch.autograd.grad((x @ y.T).logsumexp(1).sum(), x)[0]
    )


def test_merge_lse_has_gradient_zero_where_everything_is_empty():
    a = torch.tensor([-torch.inf, 1.0, torch.inf], requires_grad=True)
    b = torch.tensor([-torch.inf, -torch.inf, 0.0], requires_grad=True)
    merged = merge_lse(a, b)
    assert torch.equal(merged, torch.tensor([-torch.inf, 1.0, torch.inf]))
    ga, gb = torch.autograd.grad(merged[:2].sum(), [a, b])
    assert torch.equal(ga[:2], torch.tensor([0.0, 1.0])) and torch.equal(gb[:2], torch.zeros(2))


def test_offsets_beyond_32_bits(backend):
    """Rows 2^31 elements apart, on memory that is mapped but never touched in between."""
    stride = 1 << 31
    base = torch.empty(2 * stride + 64, dtype=torch.bfloat16)  # 8 GiB of address space, three pages of memory
    y = base.as_strided((3, 8), (stride, 1))
    y.copy_(torch.randn(3, 8))
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    got = similarity_reduce(x, y, backend=backend)
    assert torch.equal(got, similarity_reduce(x, y.contiguous(), backend=backend))


def test_more_than_2_to_31_pairs():
    """All logits equal: the fold only counts columns, and every index in between exceeds 32 bits."""
    x, y = torch.ones(1, 1).expand(70_000, 1), torch.ones(1, 1).expand(32_000, 1)
    assert x.shape[0] * y.shape[0] > 1 << 31
    got = similarity_reduce(x, y, dim=(0, 1), scale=0.5, target=torch.arange(70_000) % 32_000, backend="cpu")
    rows = torch.full((70_000,), 0.5) + torch.tensor(31_999.0).log()
    torch.testing.assert_close(got.rows, rows, rtol=1e-6, atol=0)
    # Columns 0 to 5,999 are the target of three rows, the others of two.
    left_out = torch.where(torch.arange(32_000) < 6_000, 3.0, 2.0)
    torch.testing.assert_close(got.cols, 0.5 + (70_000 - left_out).log(), rtol=1e-6, atol=0)
    assert torch.equal(got.target, torch.full((70_000,), 0.5))


def test_autocast_casts_as_a_matmul_would(backend):
    x, y = torch.randn(20, 16, requires_grad=True), torch.randn(30, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = similarity_reduce(x, y, backend=backend)
    assert got.dtype == torch.float32
    assert torch.equal(got, similarity_reduce(x.bfloat16(), y.bfloat16(), backend=backend))
    got.sum().backward()
    assert x.grad.dtype == torch.float32


def test_backends_agree():
    problem = sample_problem(300, 200, 40)
    for a, b in zip(fold(problem, "cpu"), fold(problem, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
