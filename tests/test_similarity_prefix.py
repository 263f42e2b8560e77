"""similarity_prefix against a loop over prefixes in plain torch: values, gradients, rules, shapes, extremes."""

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import Pairs
from contrastive_ops.ops import similarity_prefix
from contrastive_ops.ops.similarity_prefix import BACKENDS
from contrastive_ops.testing import saved_bytes
from contrastive_ops.testing.compare import check_derivatives, leaf, number
from contrastive_ops.testing.samples import TOLERANCE, relative_error

INF = float("inf")
DOUBLE = torch.float64


def dense(x, y, dims, scale=1.0, normalize=False, target=None, left_out=None):
    """(rows, cols, target logits) from all matrices of logits."""
    rows, cols, own = [], [], []
    for d in dims:
        a, b = x[:, :d], y[:, :d]
        if normalize:
            a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        logits = scale * (a @ b.T)
        out = torch.zeros(logits.shape, dtype=torch.bool) if left_out is None else left_out
        if target is not None:
            own.append(logits.gather(1, target[:, None]).squeeze(1))
            out = out | F.one_hot(target, len(y)).bool()
        logits = logits.masked_fill(out, -INF)
        rows.append(logits.logsumexp(1))
        cols.append(logits.logsumexp(0))
    return torch.stack(rows), torch.stack(cols), torch.stack(own) if own else None


def assert_same(got, expected, inputs, tolerance=1e-9):
    """Equal results, and equal gradients for random cotangents of all of them; folds of no pair have none."""
    pairs = [(a, b) for a, b in zip(got, expected, strict=True) if a is not None]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    cotangents = [torch.randn_like(b) for _, b in pairs]

    def total(tensors):
        shown = [t.masked_fill(b == -INF, 0.0) for t, (_, b) in zip(tensors, pairs, strict=True)]
        return sum((c * t).sum() for c, t in zip(cotangents, shown, strict=True))

    found = torch.autograd.grad(total([a for a, _ in pairs]), inputs)
    truth = torch.autograd.grad(total([b for _, b in pairs]), inputs)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


DIRECTIONS = {"rows": 1, "columns": 0, "both": (0, 1)}


def asked(folds, dim):
    rows, cols, own = folds
    return rows if dim != 0 else None, cols if dim != 1 else None, own


# ---- Values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("with_target", [False, True])
def test_two_matrices(dim, normalize, with_target, backend):
    x, y, scale = leaf(70, 21), leaf(150, 21), number(1.7)
    dims, target = (3, 8, 20), torch.randint(150, (70,)) if with_target else None
    got = similarity_prefix(
        x,
        y,
        dims=dims,
        dim=dim,
        scale=scale,
        normalize=normalize,
        target=target,
        backend=backend,
    )
    truth = asked(dense(x, y, dims, scale, normalize, target), dim)
    assert_same(got, truth, [x, y, scale] if dim or with_target else [x, y])


@pytest.mark.parametrize("count", [1, 2, 63, 130, 300])
@pytest.mark.parametrize("normalize", [False, True])
def test_self_similarity(count, normalize, backend):
    x, scale = leaf(count, 13), number(0.8)
    target = torch.randint(count, (count,))
    pairs, left_out = Pairs(diagonal=0), torch.eye(count, dtype=torch.bool)
    got = similarity_prefix(
        x,
        dims=(5, 13),
        scale=scale,
        normalize=normalize,
        target=target,
        pairs=pairs,
        backend=backend,
    )
    rows, _, own = dense(x, x, (5, 13), scale, normalize, target, left_out)
    assert_same(got, (rows, None, own), [x, scale])


@pytest.mark.parametrize("diagonal", [None, 0, 3, -140])
@pytest.mark.parametrize("self_similarity", [False, True])
def test_rules(diagonal, self_similarity, backend):
    """Ids of one side need not be those of the other, even where a matrix is compared with itself."""
    x = leaf(200, 9)
    y = x if self_similarity else leaf(170, 9)
    row_ids, col_ids = torch.randint(-1, 6, (200,)), torch.randint(-1, 6, (len(y),))
    target = torch.randint(len(y), (200,))
    left_out = (row_ids[:, None] == col_ids) & (row_ids[:, None] != -1)
    if diagonal is not None:
        left_out = left_out | (torch.arange(200)[:, None] + diagonal == torch.arange(len(y)))
    got = similarity_prefix(
        x,
        None if self_similarity else y,
        dims=(1, 4, 9),
        dim=1 if self_similarity else (0, 1),
        normalize=True,
        target=target,
        pairs=Pairs(diagonal=diagonal, differ=(row_ids, col_ids)),
        backend=backend,
    )
    truth = dense(x, y, (1, 4, 9), 1.0, True, target, left_out)
    assert_same(got, asked(truth, 1) if self_similarity else truth, [x] if self_similarity else [x, y])


@pytest.mark.parametrize("n,m", [(0, 0), (0, 5), (5, 0), (1, 1), (1, 129), (31, 128), (64, 127), (65, 257), (520, 33)])
@pytest.mark.parametrize("dims", [(1,), (7,), (1, 2, 3), (8, 16, 31), (16, 17, 64, 65)], ids=str)
def test_shapes(n, m, dims, backend):
    x, y = leaf(n, dims[-1] + 2), leaf(m, dims[-1] + 2)
    got = similarity_prefix(x, y, dims=dims, dim=(0, 1), normalize=True, scale=2.0, backend=backend)
    assert got.rows.shape == (len(dims), n) and got.cols.shape == (len(dims), m) and got.target is None
    if n == 0 or m == 0:
        assert (got.rows == -INF).all() and (got.cols == -INF).all()
        found = torch.autograd.grad(got.rows.sum() + got.cols.sum(), [x, y])
        assert all((g == 0).all() for g in found)
        return
    assert_same(got, dense(x, y, dims, 2.0, True), [x, y])


def test_columns_after_the_last_prefix_take_no_part(backend):
    x, y = leaf(9, 8), leaf(7, 8)
    with torch.no_grad():
        x[:, 5:] = torch.nan
    folds = similarity_prefix(x, y, dims=[2, 5], dim=(0, 1), normalize=True, backend=backend)
    dx, dy = torch.autograd.grad(folds.rows.sum() + folds.cols.sum(), [x, y])
    assert (dx[:, 5:] == 0).all() and (dy[:, 5:] == 0).all() and dx[:, :5].abs().min() > 0


def test_strided_and_expanded_inputs(backend):
    x, y = torch.randn(40, 22, dtype=DOUBLE)[:, ::2], torch.randn(11, 30, dtype=DOUBLE).T
    row = torch.randn(1, 11, dtype=DOUBLE).expand(40, 11)
    for a, b in ((x, y), (row, y), (x, row)):
        got = similarity_prefix(a, b, dims=(4, 11), dim=(0, 1), backend=backend)
        torch.testing.assert_close(got.rows, dense(a, b, (4, 11))[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got.cols, dense(a, b, (4, 11))[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needs", range(1, 8))
def test_every_subset_of_gradients(needs, backend):
    x, y, scale = leaf(20, 6), leaf(30, 6), number(1.5)
    for bit, t in enumerate((x, y, scale)):
        t.requires_grad_(bool(needs >> bit & 1))
    wanted = [t for t in (x, y, scale) if t.requires_grad]
    target = torch.randint(30, (20,))
    got = similarity_prefix(x, y, dims=(2, 6), dim=(0, 1), scale=scale, normalize=True, target=target, backend=backend)
    assert_same(got, dense(x, y, (2, 6), scale, True, target), wanted)


@pytest.mark.parametrize("self_similarity", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize, self_similarity, backend):
    x, y, scale = leaf(4, 5), leaf(3, 5), number(0.7)
    target, pairs = torch.tensor([1, 2, 0, 1]), Pairs(diagonal=0)

    def function(x, y, scale):
        folds = similarity_prefix(
            x,
            None if self_similarity else y,
            dims=(2, 4),
            dim=1 if self_similarity else (0, 1),
            scale=scale,
            normalize=normalize,
            target=target,
            pairs=pairs,
            backend=backend,
        )
        return tuple(t.masked_fill(t == -INF, 0.0) for t in folds if t is not None)

    check_derivatives(function, (x, y, scale))


# ---- Precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_low_precision(dtype, scale, backend):
    """Logits of 16-bit inputs are those of float64 with the same numbers, but for float32 sums."""
    dims, target = (16, 40, 96), torch.arange(90)
    x, y = leaf(90, 96, dtype=dtype), leaf(200, 96, dtype=dtype)
    with torch.no_grad():
        x += 2 * y[:90]
    options = {"dims": dims, "scale": scale, "normalize": True, "target": target}
    got = similarity_prefix(x, y, dim=(0, 1), backend=backend, **options)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    truth = dense(*wide, **options)
    for a, b in zip(got, truth, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() <= 3e-6 * scale * 2 + 1e-6

    def loss(folds):
        rows, cols, own = folds
        return (F.softplus(rows - own) + F.softplus(cols[:, :90] - own)).sum()

    found, expected = torch.autograd.grad(loss(got), (x, y)), torch.autograd.grad(loss(truth), wide)
    for a, b in zip(found, expected, strict=True):
        # float32 logits of this size are wrong in their last place, and so are their exponentials.
        assert a.dtype == dtype and relative_error(a, b) <= TOLERANCE[dtype] + 1e-6 * scale


def test_gradients_across_a_row_are_accurate_near_convergence(backend):
    """Normalisation removes nearly all of what the products say, and what is left must not be rounding."""
    x = F.normalize(torch.randn(64, 96, dtype=DOUBLE), dim=1)
    y = (x + 0.3 * F.normalize(torch.randn(64, 96, dtype=DOUBLE), dim=1)).bfloat16().requires_grad_()
    x = x.bfloat16().requires_grad_()
    options = {"dims": (32, 96), "scale": 30.0, "normalize": True, "target": torch.arange(64)}
    got = similarity_prefix(x, y, backend=backend, **options)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    rows, _, own = dense(*wide, **options)
    found = torch.autograd.grad(F.softplus(got.rows - got.target).sum(), (x, y))
    truth = torch.autograd.grad(F.softplus(rows - own).sum(), wide)
    for a, b in zip(found, truth, strict=True):
        assert relative_error(a, b) <= 5e-3


# ---- Extremes ------------------------------------------------------------------------------------------------------


def test_huge_and_equal_logits(backend):
    x = torch.randn(60, 12, dtype=DOUBLE)
    for a, b, scale in ((100 * x, 100 * x, 1.0), (x, x, 200.0), (torch.ones_like(x), torch.ones_like(x), 5.0)):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        target = torch.arange(60)
        got = similarity_prefix(a, b, dims=(5, 12), dim=(0, 1), scale=scale, target=target, backend=backend)
        assert_same(got, dense(a, b, (5, 12), scale, target=target), [a, b], tolerance=1e-7)


def test_zero_rows_have_a_finite_gradient(backend):
    """A prefix of zeros is divided by the constant 1e-12, as F.normalize does."""
    x, y = leaf(8, 6), leaf(9, 6)
    with torch.no_grad():
        x[2], x[3, :2], y[4, :2] = 0, 0, 0
    got = similarity_prefix(x, y, dims=(2, 6), dim=(0, 1), normalize=True, backend=backend)
    truth = dense(x, y, (2, 6), 1.0, True)
    for a, b in zip(got[:2], truth[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(got.rows.sum() + got.cols.sum(), (x, y))
    expected = torch.autograd.grad(truth[0].sum() + truth[1].sum(), (x, y))
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("self_similarity", [False, True])
def test_nan_and_inf_propagate(value, self_similarity, backend):
    x, y = leaf(140, 6), leaf(150, 6)
    with torch.no_grad():
        x[3, 4] = value  # only the second prefix sees it
    other = x if self_similarity else y
    got = similarity_prefix(x, None if self_similarity else y, dims=(3, 6), normalize=True, backend=backend)
    truth, *_ = dense(x, other, (3, 6), 1.0, True)
    torch.testing.assert_close(got.rows, truth, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert got.rows[0].isfinite().all() and got.rows[1, 3].isnan()
    (dx,) = torch.autograd.grad(got.rows[:, 3].sum(), (x,))
    assert dx[3].isnan().any()


def test_rows_without_pairs(backend):
    """-inf, with gradient 0, even where the upstream gradient is not."""
    x, y, ids = leaf(5, 4), leaf(6, 4), torch.zeros(5, dtype=torch.int64)
    pairs = Pairs(differ=(ids, torch.zeros(6, dtype=torch.int64)))
    folds = similarity_prefix(x, y, dims=(2, 4), dim=(0, 1), pairs=pairs, backend=backend)
    assert (folds.rows == -INF).all() and (folds.cols == -INF).all()
    for g in torch.autograd.grad(folds.rows.sum() + folds.cols.sum(), (x, y)):
        assert (g == 0).all()


def test_a_scale_of_zero(backend):
    x, y, scale = leaf(5, 4), leaf(6, 4), number(0.0)
    got = similarity_prefix(x, y, dims=(2, 4), dim=(0, 1), scale=scale, normalize=True, backend=backend)
    assert_same(got, dense(x, y, (2, 4), scale, True), [x, y, scale])


# ---- Promises ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE], ids=str)
@pytest.mark.parametrize("self_similarity", [False, True])
def test_any_number_of_threads_gives_the_same_bits(dtype, self_similarity, threads):
    x, y, scale = leaf(700, 50, dtype=dtype), leaf(900, 50, dtype=dtype), torch.tensor(3.0, requires_grad=True)
    results = []
    for count in (1, 2, 3, 1):
        threads(count)
        folds = similarity_prefix(
            x,
            None if self_similarity else y,
            dims=(7, 24, 50),
            dim=1 if self_similarity else (0, 1),
            scale=scale,
            normalize=True,
            target=torch.arange(700).flip(0),
        )
        found = [t for t in folds if t is not None]
        leaves = [x, scale] if self_similarity else [x, y, scale]
        results.append([*found, *torch.autograd.grad(sum(t.sum() for t in found), leaves)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_graph_can_be_used_again(backend):
    x, y = leaf(100, 20), leaf(200, 20)
    folds = similarity_prefix(x, y, dims=(4, 20), dim=(0, 1), backend=backend)
    value = folds.rows.sum() + folds.cols.sum()
    first, second = (torch.autograd.grad(value, (x, y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_saved_bytes(backend):
    """Inputs and vectors."""
    x, y = leaf(500, 16, dtype=torch.float32), leaf(600, 16, dtype=torch.float32)
    size, _ = saved_bytes(lambda: similarity_prefix(x, y, dims=(4, 8, 16), dim=(0, 1), backend=backend))
    assert size <= 2 * 4 * (x.numel() + y.numel())


@pytest.mark.parametrize("self_similarity", [False, True])
def test_opcheck(self_similarity, backend):
    x, y, scale = leaf(6, 5), leaf(7, 5), number(1.5)
    ids = torch.randint(3, (6,)), torch.randint(3, (6 if self_similarity else 7,))
    torch.library.opcheck(
        torch.ops.contrastive_ops.similarity_prefix_forward,
        (
            x,
            None if self_similarity else y,
            scale,
            torch.arange(6),
            *ids,
            [2, 5],
            0,
            True,
            1 if self_similarity else 3,
            backend,
        ),
    )


def test_autocast():
    x, y = torch.randn(9, 8), torch.randn(7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = similarity_prefix(x, y, dims=(4, 8))
    expected = similarity_prefix(x.bfloat16(), y.bfloat16(), dims=(4, 8))
    assert value.rows.dtype == torch.float32 and torch.equal(value.rows, expected.rows)


# ---- Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dims,error,message",
    [
        ((), ValueError, r"dims must be one or more ascending lengths >= 1, got \(\)"),
        ((0, 4), ValueError, "dims must be at least 1, got 0"),
        ((-2,), ValueError, "dims must be at least 1, got -2"),
        ((4, 2), ValueError, r"ascending lengths >= 1, got \(4, 2\)\n  sort them"),
        ((4, 4), ValueError, r"ascending lengths >= 1, got \(4, 4\)"),
        ((4, 9), ValueError, r"dims must be at most the last dimension of x, got \(4, 9\) and x \(3, 8\)"),
        ((2.0, 4), TypeError, "dims must be an int, got float"),
        ((True, 4), TypeError, "dims must be an int, got bool"),
        (4, TypeError, "dims must be a tuple or list of numbers, got int"),
    ],
)
def test_wrong_dims(dims, error, message):
    with pytest.raises(error, match=f"similarity_prefix: .*{message}"):
        similarity_prefix(torch.randn(3, 8), torch.randn(4, 8), dims=dims)


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"scale": torch.ones(3)}, ValueError, r"scale must be one number, got a tensor of shape \(3,\)"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"dim": 2}, ValueError, r"dim must be 0, 1 or \(0, 1\), got 2"),
        ({"target": torch.tensor([0, 1, 4])}, ValueError, r"target must be in \[0, 4\), got 4"),
        ({"target": torch.tensor([0, 1])}, ValueError, r"target must have shape \(3,\), got \(2,\)"),
        ({"pairs": Pairs(below=0.5)}, ValueError, "pairs must have no rules but diagonal and differ, got below"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'reference', 'cpu', 'triton', got 'cuda'"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=f"similarity_prefix: {message}"):
        similarity_prefix(torch.randn(3, 8, requires_grad=True), torch.randn(4, 8), dims=(4, 8), **options)


def test_self_similarity_has_no_columns():
    with pytest.raises(ValueError, match="similarity_prefix: dim must be 1 for self-similarity, got 0"):
        similarity_prefix(torch.randn(3, 8), dims=(4,), dim=0)


def test_the_extension_checks_what_addresses_memory():
    if BACKENDS["cpu"].unsupported(torch.zeros(1)):
        pytest.skip("no compiled extension")
    forward = BACKENDS["cpu"].functions().forward
    x, scale = torch.randn(4, 3), torch.tensor(1.0)
    for dims in ([], [0], [2, 2], [4]):
        with pytest.raises(ValueError, match="dims must"):
            forward(x, x, scale, None, None, None, dims, None, False, 1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_zero_prefixes_of_float16_have_finite_gradients(backend):
    """Terms that cancel, times the factor 1e12 of a row without a length: rounding must not become infinity."""
    for seed in range(20):
        torch.manual_seed(seed)
        x, y = torch.randn(20, 9).half(), torch.randn(20, 9).half()
        x[torch.rand(20, 9) < 0.3] = 0
        x.requires_grad_(), y.requires_grad_()
        folds = similarity_prefix(x, y, dims=(1, 4), normalize=True, scale=100.0, dim=(0, 1), backend=backend)
        for gradient in torch.autograd.grad(folds.rows.sum() + folds.cols.sum(), (x, y)):
            assert gradient.isfinite().all()
