"""Coarse first passes: the lists of the full precision, and certificates that never lie."""

import pytest
import torch

from contrastive_ops import Pairs, similarity_topk
from contrastive_ops.core.rule_slices import columns_of, rows_of
from contrastive_ops.ops import Coarse, Guide
from contrastive_ops.testing import dense_keep

COARSE = [torch.bfloat16, torch.int8]


def unit_rows(rows, depth, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, depth, generator=generator), dim=1)


def close_rows(rows, depth):
    """Rows in tight clusters, whose scores differ by less than what rounding takes."""
    centre = unit_rows(rows // 50 + 1, depth).repeat_interleave(50, 0)[:rows]
    return torch.nn.functional.normalize(centre + 1e-4 * unit_rows(rows, depth, 1), dim=1)


def assert_exact(found, exact):
    assert torch.equal(found.indices, exact.indices)
    assert torch.equal(found.values, exact.values)
    assert torch.equal(found.counts, exact.counts)


@pytest.mark.parametrize("dtype", COARSE, ids=str)
@pytest.mark.parametrize("k", [1, 10, 200])
def test_lists_are_those_of_the_full_precision(k, dtype):
    x, y = unit_rows(60, 96), unit_rows(4000, 96, 1)
    exact = similarity_topk(x, y, k, backend="cpu")
    found = similarity_topk(x, y, k, coarse=dtype, backend="cpu")
    assert_exact(found, exact)
    assert found.certified.float().mean() > 0.9
    assert_exact(similarity_topk(x, y, k, coarse=Coarse.of(y, dtype), backend="cpu"), exact)


@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_rows_without_a_certificate_are_searched_again(dtype):
    y = close_rows(3000, 64)
    x = y[:40] + 0.01 * unit_rows(40, 64, 2)
    exact = similarity_topk(x, y, 20, backend="cpu")
    found = similarity_topk(x, y, 20, coarse=Coarse(dtype, candidates=20), backend="cpu")
    assert not found.certified.any()  # fifty columns lie closer together than rounding moves them
    assert_exact(found, exact)
    kept = similarity_topk(x, y, 20, coarse=Coarse(dtype, candidates=20, retry=False), backend="cpu")
    assert not torch.equal(kept.indices, exact.indices)  # so the second search was needed


@pytest.mark.parametrize("where", ["row_bias", "col_bias", "log_weight"])
@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_a_certificate_knows_what_large_biases_take(dtype, where):
    """Scores of 2^18 are 1/32 apart: columns that differ by less change places, or are equal, by rounding alone."""
    x, y, options = unit_rows(200, 8), unit_rows(500, 8, 1), {}
    if where == "log_weight":
        kinds = torch.zeros(200, dtype=torch.int64), torch.zeros(500, dtype=torch.int64)
        options["pairs"] = Pairs(log_weight=(torch.full((1, 1), 2.0**18), *kinds))
    else:
        options[where] = torch.full((200 if where == "row_bias" else 500,), 2.0**18)
    exact = similarity_topk(x, y, 3, backend="cpu", **options)
    found = similarity_topk(x, y, 3, coarse=Coarse(dtype, candidates=40, retry=False), backend="cpu", **options)
    assert torch.equal(found.indices[found.certified], exact.indices[found.certified])
    assert_exact(similarity_topk(x, y, 3, coarse=Coarse(dtype, candidates=40), backend="cpu", **options), exact)
    small = {**options, where: options[where] / 2**18} if where != "log_weight" else {}
    assert similarity_topk(x, y, 3, coarse=Coarse(dtype, candidates=40), backend="cpu", **small).certified.all()


def test_a_certificate_knows_what_sums_take():
    """Every score is the same number, by other sums: nothing tells which columns the full precision puts first."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(256, generator=generator).bfloat16().float()  # which the first pass does not round
    y = torch.stack([numbers[torch.randperm(256, generator=generator)] for _ in range(600)])
    x = torch.randn(100, 1, generator=generator).bfloat16().float().expand(100, 256)
    coarse = Coarse(torch.bfloat16, candidates=20, retry=False)
    assert not similarity_topk(x, y, 5, coarse=coarse, backend="cpu").certified.any()


@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_float64_rows_have_biases(dtype):
    x, y = unit_rows(20, 8).double(), unit_rows(500, 8, 1).double()
    options = {"row_bias": torch.randn(20, dtype=x.dtype), "col_bias": torch.randn(500), "backend": "cpu"}
    assert_exact(similarity_topk(x, y, 3, coarse=dtype, **options), similarity_topk(x, y, 3, **options))


@pytest.mark.parametrize("dtype", COARSE, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_a_certificate_is_never_wrong(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    y = close_rows(2000, 48) if seed % 2 else unit_rows(2000, 48, seed)
    y = y * (0.1 + 3 * torch.rand(2000, 1, generator=generator))
    x = torch.randn(80, 48, generator=generator) * torch.rand(80, 1, generator=generator).mul(6).exp()
    found = similarity_topk(x, y, 12, coarse=Coarse(dtype, candidates=24, retry=False), backend="cpu")
    exact = similarity_topk(x, y, 12, backend="cpu")
    same = (found.indices == exact.indices).all(1)
    assert not (found.certified & ~same).any()


def rules(rows, columns):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, (rows,), generator=generator), torch.randint(5, (columns,), generator=generator)
    indptr = torch.arange(rows + 1) * 3
    listed = torch.randint(columns, (3 * rows,), generator=generator)
    bound = 0.1 + 0.2 * torch.rand(rows, generator=generator)
    column_bound = 0.2 + 0.2 * torch.rand(1, columns, generator=generator)
    guide = Guide(unit_rows(rows, 8, 3), unit_rows(columns, 8, 4), 0.3)
    table = torch.randn(5, 5, generator=generator), *ids
    return Pairs(
        diagonal=1,
        differ=ids,
        exclude=(indptr, listed),
        below=(bound, column_bound, 0.29),
        above=(torch.tensor(-0.3), column_bound - 0.6),
        guide=guide,
        log_weight=table,
    )


@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_rules_scales_and_biases(dtype):
    x, y = unit_rows(50, 64), unit_rows(3000, 64, 1)
    generator = torch.Generator().manual_seed(0)
    options = {
        "pairs": rules(50, 3000),
        "scale": torch.randn(50, generator=generator),
        "row_bias": torch.randn(50, generator=generator),
        "col_bias": 0.01 * torch.randn(3000, generator=generator),
    }
    for own in (options, {"pairs": options["pairs"]}, {"scale": -2.0}):
        exact = similarity_topk(x, y, 15, **own, backend="cpu")
        assert_exact(similarity_topk(x, y, 15, **own, coarse=dtype, backend="cpu"), exact)
        assert_exact(similarity_topk(x, y, 15, **own, coarse=Coarse(dtype, candidates=16), backend="cpu"), exact)


@pytest.mark.parametrize("dtype", COARSE, ids=str)
@pytest.mark.parametrize("metric", ["cosine", "sqeuclidean"])
def test_metrics(metric, dtype):
    x, y = 3 * unit_rows(20, 32), torch.randn(900, 32)
    exact = similarity_topk(x, y, 9, metric=metric, backend="cpu")
    assert_exact(similarity_topk(x, y, 9, metric=metric, coarse=dtype, backend="cpu"), exact)


@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_rows_of_zeros_nan_and_infinity(dtype, backend):
    x, y = unit_rows(5, 16), unit_rows(300, 16, 1)
    y[3], y[7, 2], x[1], x[2] = 0.0, torch.nan, 0.0, torch.nan
    exact = similarity_topk(x, y, 290, backend=backend)
    found = similarity_topk(x, y, 290, coarse=dtype, backend=backend)
    assert torch.equal(found.counts, exact.counts) and torch.equal(found.indices[0], exact.indices[0])
    assert not (found.indices == 7).any()


@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_gradients_are_those_of_the_full_precision(dtype):
    x, y = unit_rows(6, 16).requires_grad_(), unit_rows(90, 16, 1).requires_grad_()
    gradients = []
    for coarse in (None, dtype):
        values = similarity_topk(x, y, 4, coarse=coarse, backend="cpu").values
        gradients.append(torch.autograd.grad(values.square().sum(), [x, y]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_rules_of_some_rows_and_columns():
    x, y = unit_rows(9, 5), unit_rows(40, 5, 1)
    pairs = rules(9, 40)
    rows = torch.tensor([7, 2, 2, 8])
    keep = dense_keep(pairs, x, y)
    assert torch.equal(dense_keep(rows_of(pairs, rows, 40), x[rows], y), keep[rows])
    assert torch.equal(dense_keep(columns_of(pairs, 11, 33), x, y[11:33]), keep[:, 11:33])
    # A diagonal that leaves the matrix, and a guide that is compared with itself.
    square = Pairs(diagonal=3, guide=Guide(unit_rows(9, 4), None, 0.2))
    some = dense_keep(rows_of(square, rows, 9), x[rows], x)
    assert torch.equal(some, dense_keep(square, x, x)[rows])
    similarity_topk(x, x, 3, pairs=rows_of(Pairs(diagonal=3), torch.arange(9), 9))
    assert rows_of(None, rows, 40) is None and columns_of(None, 0, 1) is None


def test_a_coarse_corpus_of_another_shape_is_refused():
    x, y = unit_rows(4, 8), unit_rows(30, 8)
    with pytest.raises(ValueError, match="coarse must be made from y, got rows .29, 8. and y .30, 8."):
        similarity_topk(x, y, 3, coarse=Coarse.of(y[1:]))
    with pytest.raises(ValueError, match="Coarse: dtype must be one of"):
        similarity_topk(x, y, 3, coarse=torch.float16)
    with pytest.raises(ValueError, match="candidates must be at least 1, got"):
        Coarse(candidates=0)
