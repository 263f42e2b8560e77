"""Lists by squared distance: sums of squared differences, and lists that do not depend on what is asked at once."""

import pytest
import torch
from similarity_topk_cases import logits_at, select

from contrastive_ops import Pairs, mine_hard_negatives, similarity_topk
from contrastive_ops.mining import TopKState
from contrastive_ops.ops._listed_distances import listed_distances
from contrastive_ops.testing.compare import check_derivatives


def nearest(x, y, k, backend="auto", **options):
    return similarity_topk(x, y, k, metric="sqeuclidean", backend=backend, **options)


def dense(x, y):
    return -(x.double()[:, None] - y.double()).square().sum(2)


def listed(x, y, found):
    """Minus the squared distances of what was found, in float64."""
    return torch.where(found.indices >= 0, dense(x, y).gather(1, found.indices.clamp_min(0)), -torch.inf)


def same(found, expected):
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.counts, expected.counts)


def clusters(rows, seed, centres=7, apart=1000.0):
    """Rows in clusters that are a thousand of their standard deviations from one another."""
    places = torch.randn(centres, 24, generator=torch.Generator().manual_seed(0)) * apart
    generator = torch.Generator().manual_seed(seed)
    return places[torch.randint(centres, (rows,), generator=generator)] + torch.randn(rows, 24, generator=generator)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e4])
def test_equal_rows_are_at_distance_zero(offset, backend):
    y = torch.randn(500, 64) + offset
    found = nearest(y[:80], y, 3, backend)
    assert bool((found.values <= 0).all())
    assert torch.equal(found.values[:, 0], torch.zeros(80)) and torch.equal(found.indices[:, 0], torch.arange(80))
    assert not (-found.values).sqrt().isnan().any()
    mined = mine_hard_negatives(y[:80], y, torch.arange(80), 1, metric="sqeuclidean", backend=backend)
    assert torch.equal(mined.positive_scores, torch.zeros(80))
    assert torch.equal(mined.statistics["positive_rank"], torch.zeros(80, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_clusters_far_from_one_another(dtype, backend):
    x, y = clusters(60, 1).to(dtype), clusters(900, 2).to(dtype)
    found = nearest(x, y, 9, backend)
    best = dense(x, y).sort(dim=1, descending=True, stable=True).values[:, :9]
    torch.testing.assert_close(listed(x, y, found), best, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.values.double(), best, rtol=1e-5, atol=0)


def test_a_row_far_from_all_others_changes_nothing(backend):
    x, y = torch.randn(40, 16), torch.randn(300, 16)
    expected = nearest(x, y, 5, backend)
    far = torch.full((1, 16), 1e12)
    same(nearest(x, torch.cat([y, far]), 5, backend), expected)
    found = nearest(torch.cat([x[:7], far, x[7:]]), y, 5, backend)
    kept = torch.arange(41) != 7
    same(type(found)(*(each[kept] for each in found[:3])), expected)


def test_rows_that_are_not_finite_reach_no_other(backend):
    x, y = torch.randn(40, 16) + 100, torch.randn(300, 16) + 100
    expected = nearest(x, y, 5, backend)
    x[3], x[11, 2] = torch.nan, torch.inf
    y = torch.cat([y, torch.full((2, 16), torch.nan), torch.full((2, 16), torch.inf)])
    found = nearest(x, y, 5, backend)
    finite = torch.isfinite(x).all(1)
    same(type(found)(*(each[finite] for each in found[:3])), type(found)(*(each[finite] for each in expected[:3])))
    assert torch.equal(found.counts[~finite], torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("depth", [1, 3, 24, 130])
def test_slices_blocks_and_shards_are_the_whole_to_the_bit(depth, backend):
    x, y = torch.randn(37, depth) + 30, torch.randn(700, depth) + 30
    y[100:130] = y[500:530]
    whole = nearest(x, y, 12, backend)
    for rows in (slice(0, 1), slice(5, 18), slice(36, 37)):
        part = nearest(x[rows], y, 12, backend)
        same(part, type(whole)(*(each[rows] for each in whole[:3])))
    halves = [TopKState(x, 12, metric="sqeuclidean", backend=backend) for _ in range(2)]
    for begin, end in ((333, 700), (0, 1), (90, 333), (1, 90)):
        halves[begin % 2].update(y[begin:end], begin)
    same(halves[0].merge(halves[1]).finalize(), whole)


@pytest.mark.parametrize("coarse", [None, torch.bfloat16, torch.int8], ids=str)
def test_ties_go_by_index(coarse, backend):
    x, y = (torch.randint(0, 2, (rows, 12)).float() for rows in (30, 800))
    found = nearest(x, y, 40, backend, coarse=coarse)
    values, indices = dense(x, y).sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.values.double(), values[:, :40]) and torch.equal(found.indices, indices[:, :40])


def test_more_ties_than_candidates(backend):
    x = torch.randn(5, 8) * 0.37 + 11.1
    y = torch.cat([torch.randn(20, 8) + 30, (x[:1] + 0.21).expand(150, 8), torch.randn(20, 8) + 30])
    found = nearest(x, y, 3, backend)
    values, indices = dense(x, y).sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.indices, indices[:, :3])
    equal = torch.full((300, 4), 0.1)
    assert torch.equal(nearest(equal[:3], equal, 4, backend).indices, torch.arange(4).expand(3, 4))


def test_rules_see_the_distances_that_are_returned(backend):
    x, y = torch.randn(30, 16) + 500, torch.randn(400, 16) + 500
    y[200:260] = y[:60]
    distances = listed_distances(x, y, torch.arange(400).expand(30, 400))
    bound = distances[:, 7].contiguous()  # exactly that of a pair, and of its copy
    ids, columns = torch.arange(30) % 5, torch.arange(400) % 6
    excluded = torch.arange(0, 31) * 2, torch.arange(60)
    pairs = Pairs(below=bound, above=bound * 3, differ=(ids, columns), exclude=excluded, diagonal=3)
    keep = (distances <= bound[:, None]) & (distances >= 3 * bound[:, None]) & (ids[:, None] != columns)
    keep[torch.arange(30).repeat_interleave(2), excluded[1]] = False
    keep[torch.arange(30), torch.arange(30) + 3] = False
    scale, row_bias, col_bias = torch.rand(30) + 0.5, torch.randn(30), torch.randn(400)
    for options in ({}, {"scale": scale, "row_bias": row_bias}, {"scale": 0.3, "col_bias": col_bias}, {"scale": -1.0}):
        logits = distances * torch.as_tensor(options.get("scale", 1.0)).view(-1, 1)
        logits = logits + options.get("row_bias", torch.zeros(30))[:, None] + options.get("col_bias", torch.zeros(400))
        values, indices = logits.masked_fill(~keep, -torch.inf).sort(dim=1, descending=True, stable=True)
        found = nearest(x, y, 6, backend, pairs=pairs, **options)
        assert torch.equal(found.indices, indices[:, :6].masked_fill(values[:, :6] == -torch.inf, -1))
        torch.testing.assert_close(found.values, values[:, :6], rtol=1e-6, atol=0)


def test_rules_of_rows_follow_those_that_are_searched_again(backend):
    x, y = clusters(50, 3), clusters(400, 4)
    ids, columns = torch.arange(50) % 3, torch.arange(400) % 4
    pairs = Pairs(differ=(ids, columns), diagonal=0, below=torch.linspace(-40, -20, 50))
    keep = (ids[:, None] != columns) & (dense(x, y) <= torch.linspace(-40, -20, 50)[:, None])
    keep[torch.arange(50), torch.arange(50)] = False
    values, indices = dense(x, y).masked_fill(~keep, -torch.inf).sort(dim=1, descending=True, stable=True)
    found = nearest(x, y, 5, backend, pairs=pairs)
    assert torch.equal(found.indices, indices[:, :5].masked_fill(values[:, :5] == -torch.inf, -1))


def test_gradients(backend):
    x, y = (clusters(rows, rows).requires_grad_() for rows in (20, 90))
    scale, bias = torch.tensor(0.7, requires_grad=True), torch.randn(90, requires_grad=True)
    found = nearest(x, y, 4, backend, scale=scale, col_bias=bias)
    wide = [each.detach().double().requires_grad_() for each in (x, y, scale, bias)]
    apart = (wide[0][:, None] - wide[1][found.indices]).square().sum(2)
    truth = -wide[2] * apart + wide[3][found.indices]
    cotangent = torch.randn(20, 4)
    got = torch.autograd.grad(found.values, [x, y, scale, bias], cotangent)
    for a, b in zip(got, torch.autograd.grad(truth, wide, cotangent.double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    x, y = (torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (4, 6))
    indices = torch.tensor([[0, 5, -1], [2, 2, 1], [-1, -1, -1], [3, 0, 5]])
    function = lambda *sides: logits_at(*sides, indices, scale=1.5, metric="sqeuclidean").exp()  # noqa: E731
    check_derivatives(function, (x, y))


@pytest.mark.parametrize("shape", [(0, 4, 3), (3, 0, 3), (1, 1, 1), (2, 3, 0)])
def test_small_shapes(shape, backend):
    rows, columns, depth = shape
    found = nearest(torch.randn(rows, depth), torch.randn(columns, depth), 2, backend)
    assert torch.equal(found.counts, torch.full((rows,), min(columns, 2)))


def test_traced():
    x, y = torch.randn(8, 4, requires_grad=True), torch.randn(30, 4)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def traced(x, y):
        return nearest(x, y, 3).values

    value = traced(x, y)
    assert torch.equal(value, nearest(x, y, 3).values)
    (got,), (expected,) = (torch.autograd.grad(v.sum(), x) for v in (value, nearest(x, y, 3).values))
    torch.testing.assert_close(got, expected)


def test_autocast_rounds_rows_and_not_distances(backend):
    x, y = torch.randn(20, 8), torch.randn(90, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = nearest(x, y, 3, backend)
    same(found, nearest(x.bfloat16(), y.bfloat16(), 3, backend))


def test_statistics_and_floors(backend):
    x, y = torch.randn(20, 8) + 40, torch.randn(300, 8) + 40
    distances = listed_distances(x, y, torch.arange(300).expand(20, 300))
    above = distances.sort(dim=1, descending=True).values[:, 30:32].mean(1)
    found = select(x, y, 5, metric="sqeuclidean", count_above=above, pairs=Pairs(below=above), backend=backend)
    assert torch.equal(found.statistics["higher"], torch.full((20,), 31))
    assert torch.equal(found.statistics["below"], torch.full((20,), 31))
    assert torch.equal(found.statistics["eligible"], torch.full((20,), 269))
    floor = distances.sort(dim=1, descending=True).values[:, 3].contiguous()
    found = select(x, y, 3, metric="sqeuclidean", floor=floor, backend=backend)
    same(found.top, nearest(x, y, 3, backend))
