"""similarity_topk: exact order on small integers, rules inside the selection, extreme values, gradients, invariance.

Inner products of small integers are exact in any order of summation, so indices are compared with those of a dense
stable sort, ties included.
"""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from pairwise import pairwise
from similarity_topk_cases import logits_at, select

from contrastive_ops import Pairs, similarity_topk
from contrastive_ops.ops import Guide
from contrastive_ops.ops.similarity_topk import TopK, merge, order
from contrastive_ops.testing import TOLERANCE, dense_keep, relative_error, saved_bytes
from contrastive_ops.testing.compare import check_derivatives

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def integers(rows, depth, dtype=torch.float32, seed=0, low=-3, high=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (rows, depth), generator=generator).to(dtype)


def dense_topk(scores, k, keep=None):
    """The definition in the docstring, N x M and all."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    scores = scores if keep is None else scores.masked_fill(~keep, -torch.inf)
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    missing = max(0, k - scores.shape[1])
    values = torch.nn.functional.pad(values[:, :k], (0, missing), value=-torch.inf)
    indices = torch.nn.functional.pad(indices[:, :k], (0, missing), value=-1).masked_fill(values == -torch.inf, -1)
    return TopK(values, indices, (indices >= 0).sum(1))


def assert_same(found, expected):
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values.double(), expected.values.double())
    assert torch.equal(found.counts, expected.counts)


# ---- Order ---------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (3, 2, 7), (5, 127, 8), (4, 128, 5), (9, 129, 33), (2, 257, 16), (37, 1031, 3), (530, 300, 4)]


@pairwise(dtype=DTYPES, shape=SHAPES, k=[1, 7, 64, 300])
def test_indices_and_ties_are_those_of_a_stable_sort(shape, k, dtype, backend):
    rows, columns, depth = shape
    x, y = integers(rows, depth, dtype), integers(columns, depth, dtype, seed=1)
    expected = dense_topk(x.double() @ y.double().T, k)
    found = similarity_topk(x, y, k, backend=backend)
    assert_same(found, expected)
    assert found.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("k", [100, 1000, 8192, 20_000])
@pytest.mark.parametrize("sequence", ["random", "ascending", "descending", "equal", "two values"])
def test_long_lists_in_any_order_of_columns(k, sequence, backend):
    """Ascending scores beat the threshold at every column, equal ones never after the first k."""
    columns = 12_345
    score = torch.arange(columns, dtype=torch.float32)
    if sequence == "random":
        score = score[torch.randperm(columns, generator=torch.Generator().manual_seed(0))]
    elif sequence == "descending":
        score = score.flip(0)
    elif sequence == "equal":
        score = torch.full_like(score, 3.0)
    elif sequence == "two values":
        score = score % 2
    x = torch.tensor([[1.0], [-1.0], [2.0]])
    assert_same(similarity_topk(x, score[:, None], k, backend=backend), dense_topk(x * score, k))


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("columns", [0, 3])
@pytest.mark.parametrize("depth", [0, 2])
def test_empty_matrices(rows, columns, depth, backend):
    x, y = torch.ones(rows, depth), torch.ones(columns, depth)
    assert_same(similarity_topk(x, y, 2, backend=backend), dense_topk(x @ y.T, 2))


def test_strided_and_expanded_inputs(backend):
    wide_x, wide_y = integers(20, 30), integers(60, 30, seed=1)
    for x, y in (
        (wide_x[::2, 3:17], wide_y[5::3, 3:17]),
        (wide_x.T[:20].T[:, :9], wide_y[:, 20:29]),
        (wide_x[:1].expand(6, 30), wide_y[:1].expand(50, 30)),
    ):
        assert_same(similarity_topk(x, y, 11, backend=backend), dense_topk(x @ y.T, 11))


# ---- Rules -----------------------------------------------------------------------------------------------------------


def lists(rows, columns, most, generator):
    lengths = torch.randint(0, most + 1, (rows,), generator=generator)
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return indptr, torch.randint(columns, (int(indptr[-1]),), generator=generator)


def random_rules(rows, columns, chosen, seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, 4, (rows,), generator=g), torch.randint(-1, 4, (columns,), generator=g)
    bound = torch.randint(-4, 12, (rows,), generator=g).float()
    column_bound = torch.randint(-4, 12, (1, columns), generator=g).float()
    guide = Guide(integers(rows, 3, seed=seed), integers(columns, 3, seed=seed + 1), (bound, 9.0))
    every = {
        "diagonal": 2,
        "differ": ids,
        "same": ids,
        "exclude": lists(rows, columns, 5, g),
        "below": (bound, column_bound),
        "above": (-bound, -column_bound),
        "guide": guide,
        "log_weight": (torch.arange(8.0).reshape(2, 4), ids[0].clamp_max(1), ids[1]),
    }
    return Pairs(**{name: every[name] for name in chosen})


RULES = ("diagonal", "differ", "same", "exclude", "below", "above", "guide", "log_weight")


def check_rules(rows, columns, k, chosen, seed, backend, dtype=torch.float32):
    x, y = integers(rows, 6, dtype, seed), integers(columns, 6, dtype, seed + 1)
    pairs = random_rules(rows, columns, chosen, seed)
    scores = x.double() @ y.double().T
    keep = dense_keep(pairs, x.double(), y.double())
    if pairs.log_weight is not None:
        table, r, c = pairs.log_weight
        scores = scores + table[r.clamp_min(0)][:, c.clamp_min(0)].masked_fill((r[:, None] < 0) | (c < 0), 0.0)
    assert_same(similarity_topk(x, y, k, pairs=pairs, backend=backend), dense_topk(scores, k, keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_each_rule(rule, dtype, backend):
    check_rules(23, 301, 40, (rule,), 5, backend, dtype)


@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 400),
    k=st.integers(1, 60),
    chosen=st.sets(st.sampled_from(RULES)),
    seed=st.integers(0, 1000),
)
def test_any_rules_together(backend_name, rows, columns, k, chosen, seed):
    check_rules(rows, columns, k, sorted(chosen), seed, backend_name)


def test_a_row_gets_its_k_best_wherever_there_are_so_many(backend):
    """Nine of ten columns lie above the bound: fetching 10 k and filtering would leave these rows empty."""
    x = torch.ones(3, 1)
    y = torch.arange(2000.0)[:, None]
    found = similarity_topk(x, y, 50, pairs=Pairs(below=torch.tensor([199.0, 60.0, 49.0])), backend=backend)
    assert found.counts.tolist() == [50, 50, 50]
    assert found.indices[:, 0].tolist() == [199, 60, 49]


def test_excluded_columns_of_the_first_block_set_no_threshold(backend):
    """The best of the first columns are excluded: whatever is left lies below what those would ask for."""
    x, y = torch.ones(3, 1), 2000 - torch.arange(2000.0)[:, None]
    listed = torch.tensor([0, 40, 40, 60]), torch.cat([torch.arange(40), torch.arange(20)])
    found = similarity_topk(x, y, 5, pairs=Pairs(exclude=listed), backend=backend)
    assert found.indices.tolist() == [[*range(first, first + 5)] for first in (40, 0, 20)]


def test_scale_and_biases(backend):
    x, y = integers(9, 5), integers(200, 5, seed=1)
    scale = torch.tensor([1.0, 2.0, -1.0, 0.0, 4.0, -2.0, 1.0, 1.0, 8.0])
    row_bias, col_bias = torch.arange(9.0), torch.randint(-9, 9, (200,)).float()
    col_bias[17] = -torch.inf  # -inf takes no part
    expected = dense_topk(scale[:, None] * (x @ y.T) + row_bias[:, None] + col_bias, 199)
    found = similarity_topk(x, y, 199, scale=scale, row_bias=row_bias, col_bias=col_bias, backend=backend)
    assert_same(found, expected)
    assert not (found.indices == 17).any()


# ---- Metrics ---------------------------------------------------------------------------------------------------------


def test_squared_distances_and_their_bounds(backend):
    x, y = integers(12, 4, torch.bfloat16), integers(90, 4, torch.bfloat16, seed=1)
    scores = -torch.cdist(x.double(), y.double()).square().round()
    assert_same(similarity_topk(x, y, 20, metric="sqeuclidean", backend=backend), dense_topk(scores, 20))
    bounded = similarity_topk(x, y, 20, metric="sqeuclidean", pairs=Pairs(below=-9.0, above=-30.0), backend=backend)
    assert_same(bounded, dense_topk(scores, 20, (scores <= -9) & (scores >= -30)))


def test_cosine_of_rows_of_any_length(backend):
    x, y = torch.randn(12, 6) * 5, torch.randn(90, 6)
    y[3] = 0  # a row of zeros has similarity 0 with everything
    unit = [torch.nn.functional.normalize(t.double(), dim=1) for t in (x, y)]
    found = similarity_topk(x, y, 90, metric="cosine", backend=backend)
    assert torch.equal(found.indices, dense_topk(unit[0] @ unit[1].T, 90).indices)
    assert found.values.isfinite().all()


# ---- Extreme values --------------------------------------------------------------------------------------------------


def test_nan_never_displaces_a_number(backend):
    x, y = integers(6, 4), integers(300, 4, seed=1)
    y[torch.randperm(300, generator=torch.Generator().manual_seed(0))[:200]] = torch.nan
    x[2] = torch.nan
    expected = dense_topk(x @ y.T, 120)
    found = similarity_topk(x, y, 120, backend=backend)
    assert_same(found, expected)
    assert found.counts.tolist() == [100, 100, 0, 100, 100, 100]


def test_infinite_scores(backend):
    x = torch.tensor([[1.0], [-1.0]])
    y = torch.tensor([[1.0], [torch.inf], [-torch.inf], [2.0], [torch.inf]])
    found = similarity_topk(x, y, 4, backend=backend)
    assert found.indices.tolist() == [[1, 4, 3, 0], [2, 0, 3, -1]]
    assert found.values[1].tolist() == [torch.inf, -1.0, -2.0, -torch.inf]


def test_zeros_of_both_signs_are_equal(backend):
    y = torch.tensor([0.0, -0.0] * 100)[:, None]
    found = similarity_topk(torch.tensor([[1.0], [-1.0]]), y, 150, backend=backend)
    assert torch.equal(found.indices, torch.arange(150).expand(2, 150))


def test_rows_without_any_eligible_column(backend):
    x, y = integers(4, 3), integers(70, 3, seed=1)
    every = torch.arange(70)
    indptr = torch.tensor([0, 0, 70, 70, 70])
    found = similarity_topk(x, y, 5, pairs=Pairs(exclude=(indptr, every)), backend=backend)
    assert found.counts.tolist() == [5, 0, 5, 5]
    assert found.indices[1].tolist() == [-1] * 5 and (found.values[1] == -torch.inf).all()


# ---- Invariance ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40, 1100])
def test_any_number_of_threads_gives_the_same_bits(rows, dtype, threads):
    x, y = torch.randn(rows, 33, dtype=dtype), torch.randn(9000, 33, dtype=dtype)
    pairs = Pairs(below=torch.rand(rows, dtype=torch.float64) * 6)
    first = None
    for count in (1, 2, 3, 2):
        threads(count)
        found = similarity_topk(x, y, 70, pairs=pairs, backend="cpu")
        first = first or found
        assert torch.equal(found.values, first.values) and torch.equal(found.indices, first.indices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_scores_in_any_batch_and_shard(dtype):
    x, y = torch.randn(70, 77, dtype=dtype), torch.randn(3000, 77, dtype=dtype)
    whole = similarity_topk(x, y, 30, backend="cpu")
    for part in (slice(0, 1), slice(1, 3), slice(5, 9), slice(9, 22), slice(30, 70)):
        alone = similarity_topk(x[part], y, 30, backend="cpu")
        assert torch.equal(alone.values, whole.values[part]) and torch.equal(alone.indices, whole.indices[part])
    shards = [similarity_topk(x, y[b:e], 30, backend="cpu") for b, e in ((0, 5), (5, 1711), (1711, 3000))]
    shifted = [
        TopK(s.values, s.indices.where(s.indices < 0, s.indices + b), s.counts)
        for s, b in zip(shards, (0, 5, 1711), strict=True)
    ]
    for a, b, c in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        merged = merge(merge(shifted[a], shifted[b]), shifted[c])
        assert_same(merged, whole)
    assert torch.equal(logits_at(x, y, whole.indices, backend="cpu"), whole.values)


# ---- Sizes -----------------------------------------------------------------------------------------------------------


def test_more_than_two_to_the_31_pairs():
    x, y = torch.arange(46_400.0)[:, None] % 7 - 3, torch.arange(46_500.0)[:, None] % 1000
    found = similarity_topk(x, y, 2, backend="cpu")
    largest, zero = [999, 1999], [0, 1000]
    expected = torch.tensor([zero, zero, zero, [0, 1], largest, largest, largest])
    assert torch.equal(found.indices, expected[torch.arange(46_400) % 7])


@pytest.mark.slow
def test_more_than_two_to_the_31_columns():
    numpy = pytest.importorskip("numpy")
    columns = (1 << 31) + 300
    y = numpy.zeros((columns, 1), dtype=numpy.float16)  # pages that are only read are not resident
    y[[5, columns // 2, columns - 2]] = [[1.0], [3.0], [2.0]]
    excluded = torch.tensor([0, 2]), torch.tensor([0, columns - 1])
    found = similarity_topk(torch.ones(1, 1).half(), torch.from_numpy(y), 5, pairs=Pairs(exclude=excluded))
    assert found.indices.tolist() == [[columns // 2, columns - 2, 5, 1, 2]]


# ---- Gradients -------------------------------------------------------------------------------------------------------

NEEDS = [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 1)]


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("scalar", [False, True])
def test_gradcheck(needs, scalar, backend):
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(19, 4, dtype=torch.float64)
    scale = torch.tensor(1.5, dtype=torch.float64) if scalar else torch.rand(5, dtype=torch.float64) + 0.5
    biases = torch.randn(5, dtype=torch.float64), torch.randn(19, dtype=torch.float64)
    table = (torch.randn(2, 2, dtype=torch.float64), torch.arange(5) % 2, torch.arange(19) % 3 - 1)
    leaves = [t.requires_grad_(bool(need)) for t, need in zip((x, y, scale, *biases), needs, strict=True)]

    def values(x, y, scale, row_bias, col_bias):
        return similarity_topk(
            x,
            y,
            3,
            scale=scale,
            row_bias=row_bias,
            col_bias=col_bias,
            pairs=Pairs(below=2.0, log_weight=table),
            backend=backend,
        ).values

    check_derivatives(values, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["dot", "cosine", "sqeuclidean"])
def test_gradients_of_random_cotangents(metric, dtype, backend):
    x, y = torch.randn(40, 19), torch.randn(300, 19)
    leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
    found = similarity_topk(*leaves, 17, metric=metric, backend=backend)
    upstream = torch.randn(found.values.shape)
    got = torch.autograd.grad((found.values * upstream).sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    unit = [torch.nn.functional.normalize(t, dim=1) for t in wide] if metric == "cosine" else wide
    scores = -torch.cdist(*wide).square() if metric == "sqeuclidean" else unit[0] @ unit[1].T
    expected = torch.autograd.grad((scores.gather(1, found.indices) * upstream).sum(), wide)
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) <= max(3 * TOLERANCE[dtype], 1e-6)


def test_a_short_list_has_no_gradient_where_it_is_padded(backend):
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    values = similarity_topk(x, y, 5, backend=backend).values
    values.masked_fill(values == -torch.inf, 0.0).sum().backward()
    torch.testing.assert_close(x.grad, y.detach().sum(0).expand(3, 4))
    torch.testing.assert_close(y.grad, x.detach().sum(0).expand(2, 4))


def test_backward_keeps_the_lists_and_nothing_of_the_matrix(backend):
    x, y = torch.randn(64, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
    size, _ = saved_bytes(lambda: similarity_topk(x, y, 10, backend=backend).values)
    assert size <= (64 + 5000) * 8 * 4 + 64 * 10 * 8 + 100


# ---- Selection for mining --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 30])
def test_statistics_count_every_column(rows, backend):
    x, y = integers(rows, 5), integers(700, 5, seed=1)
    y[5:9] = torch.nan
    pairs = random_rules(rows, 700, ("diagonal", "exclude", "differ", "below", "above", "guide"), 3)
    level = torch.randint(-5, 10, (rows,)).float()
    scores = x @ y.T
    for given, counted in ((pairs, None), (Pairs(exclude=pairs.exclude), pairs)):
        found = select(x, y, 9, pairs=given, count_above=level, count_pairs=counted, backend=backend)
        assert_same(found.top, dense_topk(scores, 9, dense_keep(given, x, y)))
        eligible = dense_keep(pairs, x, y) & ~scores.isnan()
        assert torch.equal(found.statistics["eligible"], eligible.sum(1))
        assert torch.equal(found.statistics["higher"], (scores > level[:, None]).sum(1))
        for rule in ("differ", "below", "above", "guide"):
            alone = dense_keep(Pairs(**{rule: getattr(pairs, rule)}), x, y)
            assert torch.equal(found.statistics[rule], (~alone).sum(1)), rule
        assert not found.statistics["same"].any()


def test_floor_is_exclusive(backend):
    x, y = integers(10, 4), integers(500, 4, seed=1)
    scores = x @ y.T
    floor = scores.sort(dim=1, descending=True).values[:, 20].clone()
    floor[3] = -torch.inf
    found = select(x, y, 60, floor=floor, backend=backend).top
    assert_same(found, dense_topk(scores, 60, scores > floor[:, None]))


def test_listed_logits(backend):
    x, y = torch.randn(7, 5), torch.randn(30, 5)
    indices = torch.randint(-1, 30, (7, 21))
    scale, bias = torch.rand(7), torch.randn(30)
    dense = (scale[:, None] * (x @ y.T) + bias).gather(1, indices.clamp_min(0)).masked_fill(indices < 0, -torch.inf)
    got = logits_at(x, y, indices, scale=scale, col_bias=bias, backend=backend)
    torch.testing.assert_close(got, dense)


def test_lists_in_no_order(backend):
    values = torch.randint(-3, 3, (9, 40)).float()
    indices = torch.stack([torch.randperm(60)[:40] for _ in range(9)])
    indices[2, 5:], values[3, 7:], values[4, ::2] = -1, -torch.inf, torch.nan
    dense = torch.full((9, 60), -torch.inf)
    for row in range(9):
        listed = indices[row] >= 0
        dense[row, indices[row, listed]] = values[row, listed]
    for k in (1, 11, 40, 50):
        assert_same(order(values, indices, k, backend), dense_topk(dense, k))


# ---- Against faiss ---------------------------------------------------------------------------------------------------


def test_the_sets_are_those_of_faiss_on_real_embeddings():
    """Hashed words of the docstrings of the standard library."""
    faiss = pytest.importorskip("faiss")
    import inspect
    import pydoc
    import re
    import zlib

    names = ("argparse", "collections", "email", "http", "json", "logging", "os", "pathlib", "unittest")
    texts = []
    for name in names:
        for member, value in inspect.getmembers(pydoc.locate(name)):
            texts += [f"{member} {getattr(v, '__doc__', '')}" for _, v in inspect.getmembers(value)]
    texts = sorted({" ".join(t.split()) for t in texts if len(t) > 40})[:4000]
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(4096, 96, generator=generator)
    bags = [[zlib.crc32(w.lower().encode()) % 4096 for w in re.findall(r"\w+", t)] for t in texts]
    rows = torch.stack([table[bag].mean(0) for bag in bags])
    rows = torch.nn.functional.normalize(rows, dim=1)
    index = faiss.IndexFlatIP(96)
    index.add(rows.numpy())
    k = 50
    found = similarity_topk(rows[:500], rows, k)
    scores, indices = (torch.from_numpy(t) for t in index.search(rows[:500].numpy(), k + 10))
    assert len(texts) > 1000
    for i in range(500):
        # Rounding may swap what lies at the border, so only sets that a gap separates are compared.
        if scores[i, k - 1] - scores[i, k] > 1e-5:
            assert set(found.indices[i].tolist()) == set(indices[i, :k].tolist())
    torch.testing.assert_close(found.values, scores[:, :k], rtol=1e-5, atol=1e-5)


# ---- Bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "k must be at least 1, got 0": lambda x: similarity_topk(x, x, 0),
    "k must be an int, got float": lambda x: similarity_topk(x, x, 2.0),
    "k must be an int, got bool": lambda x: similarity_topk(x, x, True),
    "metric must be one of 'dot', 'cosine', 'sqeuclidean', got 'l2'": lambda x: similarity_topk(x, x, 1, metric="l2"),
    "y must have the same last dimension as x, got x (4, 3) and y (4, 2)": lambda x: similarity_topk(x, x[:, :2], 1),
    "y must be a tensor, got list": lambda x: similarity_topk(x, [1], 1),
    "pairs.fill must be None, got 0.0": lambda x: similarity_topk(x, x, 1, pairs=Pairs(fill=0.0)),
    "col_bias must have shape (4,), got (3,)": lambda x: similarity_topk(x, x, 1, col_bias=torch.zeros(3)),
    "exclude indices must be in [0, 4), got 4 in the list of row 1": lambda x: similarity_topk(
        x, x, 1, pairs=Pairs(exclude=(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([4])))
    ),
    "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', 'hopper', got 'gpu'": lambda x: (
        similarity_topk(x, x, 1, backend="gpu")
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_name_function_argument_and_value(message):
    with pytest.raises((ValueError, TypeError)) as error:
        BAD[message](torch.ones(4, 3))
    assert str(error.value).startswith("similarity_topk: ") and message in str(error.value)
