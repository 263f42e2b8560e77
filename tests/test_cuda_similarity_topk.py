"""similarity_topk by CUDA kernels against the reference: indices, counts and statistics are equal on small integers.

Without a GPU the kernels run on the processor, under sanitizers (tests/cuda_host). A list is looked at every 1024
columns, so that it takes more of them until it is cut down.
"""

import contextlib
import itertools
import re
from pathlib import Path

import cuda_host
import pytest
import torch
from similarity_topk_cases import (
    RULES,
    assert_selects_as_reference,
    integers,
    listed_gradients,
    logits_at,
    on_device,
    rules_of,
    select,
)

from contrastive_ops import Pairs, similarity_topk
from contrastive_ops.core import cuda_kernels
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf
from contrastive_ops.core.rules import Slot
from contrastive_ops.cuda import similarity_topk as launchers
from contrastive_ops.mining.hard_negatives import NegativeRules, mine_hard_negatives
from contrastive_ops.mining.state import TopKState
from contrastive_ops.ops.similarity_topk import merge, order
from contrastive_ops.reference import similarity_topk as reference
from contrastive_ops.testing import TOLERANCE, relative_error

ON_GPU = torch.cuda.is_available() and cuda_kernels.why_missing() is None
if not ON_GPU and cuda_host.why_missing() is not None:
    pytest.skip(cuda_host.why_missing(), allow_module_level=True)

DEVICE = "cuda" if ON_GPU else "cpu"
SCHEDULES = ("ascending", "descending", "shuffled")


@contextlib.contextmanager
def running(schedule):
    """Runs kernels on the GPU, or on the processor with threads in an order."""
    if ON_GPU:
        yield
        return
    functions = cuda_host.HostKernels(schedule)
    try:
        with cuda_kernels.on_host(functions):
            yield
    finally:
        functions.close()


@pytest.fixture(autouse=True, scope="module")
def _running():
    with running("shuffled"):
        yield


def assert_same(x, y, k, **arguments):
    """The same lists and statistics as the reference; returns them."""
    return assert_selects_as_reference("cuda", DEVICE, x, y, k, **arguments)


# ---- Order -----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (1, 70, 3), (5, 1, 8), (3, 63, 5), (2, 1024, 16), (2, 1025, 33), (3, 2047, 17)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    rows, columns, depth = shape
    assert_same(integers(rows, depth, dtype), integers(columns, depth, dtype, seed=1), 7)


@pytest.mark.parametrize("k", [1, 5, 100, 127, 150, 151])
def test_lengths_of_lists_with_many_ties(k):
    assert_same(integers(4, 2), integers(150, 2, seed=1), k)


@pytest.mark.parametrize(("k", "columns"), [(100, 4000), (1000, 5000), (8192, 19_000), (9000, 9500)])
def test_long_lists(k, columns):
    """The third is cut down once and sorted by a block of more threads, the last is sorted by a library."""
    assert_same(integers(1, 6), integers(columns, 6, seed=1), k)


@pytest.mark.parametrize("sequence", ["ascending", "descending", "equal", "two values"])
def test_any_order_of_columns(sequence):
    """Ascending scores beat the threshold at every column, equal ones never after the first k."""
    score = torch.arange(3500.0)
    if sequence == "descending":
        score = score.flip(0)
    elif sequence == "equal":
        score = torch.full_like(score, 3.0)
    elif sequence == "two values":
        score = score % 2
    assert_same(torch.tensor([[1.0], [-1.0], [0.0]]), score[:, None], 9)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("columns", [0, 3])
@pytest.mark.parametrize("depth", [0, 2])
def test_empty_matrices(rows, columns, depth):
    level = torch.zeros(rows)
    assert_same(torch.ones(rows, depth), torch.ones(columns, depth), 2, count_above=level)


def test_strided_and_expanded_inputs():
    wide_x, wide_y = integers(20, 30), integers(60, 30, seed=1)
    for x, y in (
        (wide_x[::6, 3:17], wide_y[5::3, 3:17]),
        (wide_x.T[:20].T[:4, :9], wide_y.T[:9].T),
        (wide_x[:4, ::3], wide_y[:, ::3]),
        (wide_x[:1].expand(3, 30), wide_y[:1].expand(50, 30)),
    ):
        assert_same(x, y, 11)


def test_random_numbers_are_ordered_by_their_scores():
    x, y = torch.randn(3, 40, device=DEVICE), torch.randn(2500, 40, device=DEVICE)
    found = similarity_topk(x, y, 50, backend="cuda")
    expected = similarity_topk(x.double(), y.double(), 50, backend="reference")
    torch.testing.assert_close(found.values.double(), expected.values, rtol=1e-6, atol=1e-5)
    assert (found.values.diff(dim=1) <= 0).all()
    torch.testing.assert_close((x @ y.T).gather(1, found.indices), found.values)


# ---- How work is cut -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of two rows and 1024 columns."""
    monkeypatch.setattr(launchers, "TILE_ROWS", 2)
    monkeypatch.setattr(launchers, "CHUNK_BYTES", 2 * 4 * launchers.LEG)


@pytest.mark.parametrize("k", [3, 600])
def test_several_tiles(k, small_tiles):
    pairs = rules_of(5, 2603, ("diagonal", "exclude", "below", "guide"), 3)
    assert launchers.plan(5, 2603, k)[:2] == (2, 1024)
    assert_same(integers(5, 4), integers(2603, 4, seed=1), k, pairs=pairs, count_above=torch.ones(5))


def test_rows_in_several_launches(monkeypatch):
    monkeypatch.setattr(launchers, "LIST_BYTES", 1)
    assert launchers.plan(3, 90, 4).rows == 1
    assert_same(integers(3, 3), integers(90, 3, seed=1), 4, count_above=torch.zeros(3))


@pytest.mark.parametrize(("k", "tile", "parts"), [(7, 8192, 2), (2000, 8192, 1), (3, 40_960, 10)])
def test_several_lists_of_a_row(k, tile, parts, monkeypatch):
    """The last are so many that another size of blocks selects."""
    monkeypatch.setattr(launchers, "CHUNK_BYTES", 4 * tile)
    cut = launchers.plan(1, 2 * tile + 100, k)
    assert (cut.columns, cut.parts, cut.strip) == (tile, parts, tile // parts)
    x, y, floor = integers(1, 3), integers(2 * tile + 100, 3, seed=1), torch.tensor([torch.nan])
    assert_same(x, y, k, count_above=torch.ones(1), floor=floor)


@pytest.mark.parametrize("k", [1, 100, 8192, 10_000, 1_000_000])
@pytest.mark.parametrize("rows", [1, 130, 70_000])
@pytest.mark.parametrize("columns", [1, 5000, 10_000_000, launchers.MOST_COLUMNS])
def test_plans(rows, columns, k):
    cut = launchers.plan(rows, columns, k)
    assert 0 < cut.rows <= rows and 0 < cut.columns <= columns
    assert cut.stride % 4 == 0 and cut.columns <= cut.stride < cut.columns + 4
    assert cut.columns == columns or cut.columns % launchers.LEG == 0
    assert 4 * cut.rows * cut.stride <= launchers.CHUNK_BYTES + 16 * cut.rows
    assert cut.strip % launchers.LEG == 0
    assert (cut.parts - 1) * cut.strip < cut.columns <= cut.parts * cut.strip
    assert 8 * cut.rows * cut.parts * cut.capacity <= launchers.LIST_BYTES or cut.rows == 1
    passing = cut.strip * -(-columns // cut.columns)
    assert cut.capacity == passing or k + launchers.LEG < cut.capacity < passing


def test_numbers_that_python_and_cuda_share():
    source = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "similarity_topk.cu"
    threads, each = re.search(r"kThreads = (\d+), kPerThread = (\d+);", source.read_text()).groups()
    assert int(threads) * int(each) == launchers.LEG


def test_columns_have_32_bits():
    last = launchers.MOST_COLUMNS
    dots = torch.tensor([[1.0, 5.0, 5.0, 2.0]], device=DEVICE)
    keys, counts = (
        torch.zeros(size, dtype=dtype, device=DEVICE) for size, dtype in ((1024, torch.int64), (1, torch.int32))
    )
    thresholds, scale = torch.full((1,), -torch.inf, device=DEVICE), torch.ones(1, device=DEVICE)
    _, spec = Layout((LogitSet(),), ()).encode()
    problem = (dots, None, scale, None, None, (), spec, keys, counts, thresholds)
    cuda_kernels.kernels().cuda_similarity_topk_filter(*problem, 1, last, 0, 1, last - 4, 4, 4, 1, 1024, 1024, 3)
    values, indices, found = (
        torch.zeros(1, 3, device=DEVICE).to(dtype) for dtype in (torch.float32, torch.int64, torch.int64)
    )
    cuda_kernels.kernels().cuda_similarity_topk_select(
        keys, counts, values, indices, found[0, :1].clone(), 1, 1, 1024, 3, 4
    )
    assert indices.tolist() == [[last - 3, last - 2, last - 1]] and values.tolist() == [[5.0, 5.0, 2.0]]


def test_more_columns_than_indices_have_bits_for():
    y = torch.zeros((1, 1), device=DEVICE).expand(launchers.MOST_COLUMNS + 1, 1)
    layout = Layout((LogitSet(),), ()).encode()
    with pytest.raises(NotImplementedError, match=r"similarity_topk: backend 'cuda' takes at most \d+ columns"):
        launchers.forward(y[:1], y, torch.ones(1, device=DEVICE), None, None, *layout, 1, None, None)


# ---- Rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_each_rule(rule):
    """A list is cut down, so that thresholds and rules meet."""
    x, y = integers(4, 6, seed=5), integers(1400, 6, seed=6)
    pairs = rules_of(4, 1400, (rule,), 5)
    assert_same(x, y, 5, pairs=pairs)


@pytest.mark.parametrize("named", [1, 2, 5])
def test_rules_that_name_the_best_columns(named):
    x, y = integers(4, 6, seed=5), integers(1400, 6, seed=6)
    best = assert_same(x, y, 5).top.indices
    lists = torch.arange(5) * named, best[:, :named].sort(1).values.flatten().cpu()
    found = assert_same(x, y, 5, pairs=Pairs(exclude=lists)).top.indices
    assert not (found[:, :, None] == best[:, None, :named]).any()
    column = int(best[3, named - 1])
    assert not (assert_same(x, y, 5, pairs=Pairs(diagonal=column - 3)).top.indices[3] == column).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_rules_together_and_their_statistics(dtype):
    x, y = integers(9, 6, dtype, seed=7), integers(150, 6, dtype, seed=8)
    y[5:9] = torch.nan
    pairs = rules_of(9, 150, RULES, 7)
    level = torch.randint(-5, 10, (9,)).float()
    found = assert_same(x, y, 5, pairs=pairs, count_above=level)
    assert 0 < found.top.counts.sum() < 9 * 5
    others = {name for name in RULES if name not in ("diagonal", "exclude", "log_weight")}
    assert all(found.statistics[name].any() for name in ("higher", *others))


def test_statistics_of_other_rules_than_those_that_select():
    x, y = integers(6, 6, seed=7), integers(150, 6, seed=8)
    level = torch.randint(-5, 10, (6,)).float()
    every = rules_of(6, 150, ("diagonal", "exclude", "differ", "below", "guide", "log_weight"), 7)
    few = Pairs(exclude=every.exclude)
    assert_same(x, y, 5, pairs=few, count_above=level, count_pairs=every)
    assert_same(x, y, 5, pairs=every, count_above=level, count_pairs=few)


def test_rows_without_any_eligible_column():
    x, y = integers(4, 3), integers(70, 3, seed=1)
    indptr = torch.tensor([0, 0, 70, 70, 70])
    found = assert_same(x, y, 5, pairs=Pairs(exclude=(indptr, torch.arange(70))))
    assert found.top.counts.tolist() == [5, 0, 5, 5]
    ids = torch.zeros(4, dtype=torch.int64), torch.zeros(70, dtype=torch.int64)
    assert not assert_same(x, y, 5, pairs=Pairs(differ=ids)).top.counts.any()


def test_a_row_gets_its_k_best_wherever_there_are_so_many():
    """Nearly all columns lie above the bound."""
    pairs = Pairs(below=torch.tensor([29.0, 12.0, 8.0]))
    found = assert_same(torch.ones(3, 1), torch.arange(3000.0)[:, None], 9, pairs=pairs)
    assert found.top.indices[:, 0].tolist() == [29, 12, 8]


def test_scale_and_biases():
    scale = torch.tensor([1.0, 2.0, -1.0, 0.0, -2.0, 8.0])
    x, y, row_bias = integers(6, 5), integers(1300, 5, seed=1), torch.arange(6.0)
    assert_same(x, y, 89, scale=scale, row_bias=row_bias)
    col_bias = torch.randint(-9, 9, (1300,)).float()
    col_bias[17] = -torch.inf  # -inf takes no part
    found = assert_same(x, y, 1300, scale=scale, row_bias=row_bias, col_bias=col_bias)
    assert not (found.top.indices == 17).any()


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("scale_of", list(ScaleOf))
def test_any_scale_and_sign(negate, scale_of):
    """Those that the public function has no argument for, too."""
    x, y = on_device((integers(3, 4), integers(90, 4, seed=1)), DEVICE)
    size = {ScaleOf.ALL: 1, ScaleOf.ROWS: 3, ScaleOf.COLUMNS: 90}[scale_of]
    scale, row_bias = integers(1, size, seed=2)[0].to(DEVICE), torch.arange(3.0, device=DEVICE)
    layout = Layout((LogitSet(scale_of, negate),), ()).encode()
    arguments = (x, y, scale, row_bias, None, *layout, 70, None, row_bias)
    for got, expected in zip(launchers.forward(*arguments), reference.forward(*arguments), strict=True):
        assert torch.equal(got, expected)


def test_floor_is_exclusive():
    x, y = integers(6, 4), integers(200, 4, seed=1)
    floor = (x @ y.T).sort(dim=1, descending=True).values[:, 20].clone()
    floor[3], floor[4], floor[5] = -torch.inf, torch.nan, torch.inf
    assert_same(x, y, 30, floor=floor)
    assert_same(x, y, 3, floor=floor)


# ---- Extreme values --------------------------------------------------------------------------------------------------


def test_nan_never_displaces_a_number():
    x, y = integers(6, 4), integers(90, 4, seed=1)
    y[torch.randperm(90)[:60]] = torch.nan
    x[2] = torch.nan
    found = assert_same(x, y, 40, count_above=torch.zeros(6))
    assert found.top.counts.tolist() == [30, 30, 0, 30, 30, 30]


def test_nan_passes_bounds_but_not_the_order():
    x, y = integers(2, 3), integers(60, 3, seed=1)
    y[::2] = torch.nan
    bounds = Pairs(below=torch.tensor([2.0, torch.nan]), above=torch.tensor([-4.0, -1.0]))
    assert_same(x, y, 60, pairs=bounds, count_above=torch.zeros(2))


def test_infinite_scores():
    y = torch.tensor([[1.0], [torch.inf], [-torch.inf], [2.0], [torch.inf]])
    found = assert_same(torch.tensor([[1.0], [-1.0]]), y.repeat(9, 1), 4).top
    assert found.indices.tolist() == [[1, 4, 6, 9], [2, 7, 12, 17]]


def test_zeros_of_both_signs_are_equal():
    y = torch.tensor([0.0, -0.0] * 600)[:, None]
    found = assert_same(torch.tensor([[1.0], [-1.0]]), y, 30).top
    assert torch.equal(found.indices.cpu(), torch.arange(30).expand(2, 30))


def test_numbers_of_all_sizes():
    """Subnormal numbers, the largest, and neighbours that differ in the last bit."""
    bits = torch.cat([torch.arange(0, 1 << 31, 1_000_003), 0x3F800000 + torch.arange(50)]).to(torch.int32)
    numbers = bits.view(torch.float32)
    numbers = torch.cat([numbers, -numbers])[torch.randperm(2 * len(numbers))].to(DEVICE)
    lists = numbers.nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)[None], torch.arange(len(numbers), device=DEVICE)[None]
    found, expected = (order(*lists, 4396, backend) for backend in ("cuda", "reference"))
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)


# ---- Codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes(dtype):
    codes = torch.randint(-127, 128, (90, 5)).to(torch.int8)
    code_scale = 2.0 ** torch.randint(-3, 3, (90,)).float()
    x = integers(7, 5, dtype)
    pairs = rules_of(7, 90, ("below", "above"), 3)
    assert_same(x, codes, 7, code_scale=code_scale, pairs=pairs, count_above=torch.zeros(7))


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.int8], ids=str)
def test_coarse_pass(coarse):
    x, y = integers(5, 6).to(DEVICE), integers(120, 6, seed=1).to(DEVICE)
    found = similarity_topk(x, y, 4, coarse=coarse, backend="cuda")
    expected = similarity_topk(x, y, 4, backend="reference")
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)


# ---- Listed pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 21, 64, 300, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_listed_logits_of_any_width(dtype, depth):
    """Of one lane to a warp per pair, and of several steps."""
    x, y = on_device((integers(3, depth, dtype), integers(20, depth, dtype, seed=1)), DEVICE)
    indices = torch.randint(-1, 20, (3, 11), device=DEVICE)
    found, expected = (logits_at(x, y, indices, scale=0.5, backend=backend) for backend in ("cuda", "reference"))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("depth", [21, 24, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_listed_logits_and_their_gradients(dtype, per_row, depth):
    x, y = torch.randn(4, depth).to(dtype), torch.randn(13, depth).to(dtype)
    scale = torch.rand(4) if per_row else torch.tensor(1.5)
    indices = torch.randint(-1, 13, (4, 19))  # a column more than once, too
    problem = (x, y, scale, torch.randn(4), torch.randn(13), torch.randn(4, 19), indices, torch.randn(2, 2))
    problem = on_device(problem, DEVICE)
    values, gradients = listed_gradients(dtype, "cuda", *problem)
    expected_values, expected = listed_gradients(torch.float64, "reference", *problem)
    assert torch.equal(values.isinf(), indices.to(DEVICE) < 0)
    error = relative_error(values.nan_to_num(neginf=0.0), expected_values.nan_to_num(neginf=0.0))
    assert error <= TOLERANCE[torch.float32]
    for got, truth in zip(gradients, expected, strict=True):
        assert relative_error(got, truth) <= TOLERANCE[got.dtype]


def test_gradients_of_a_selection():
    leaves = [t.to(DEVICE).requires_grad_() for t in (torch.randn(3, 4), torch.randn(2, 4))]
    values = similarity_topk(*leaves, 5, backend="cuda").values
    values.masked_fill(values == -torch.inf, 0.0).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].detach().sum(0).expand(3, 4))
    torch.testing.assert_close(leaves[1].grad, leaves[0].detach().sum(0).expand(2, 4))


@pytest.mark.parametrize("needs", [31, 1, 2, 4, 8, 16, 0])
@pytest.mark.parametrize("scale_of", list(ScaleOf))
def test_backward_of_codes_with_any_scale(needs, scale_of):
    x, y = on_device((integers(5, 3), integers(12, 3, seed=1)), DEVICE)
    scale = integers(1, {ScaleOf.ALL: 1, ScaleOf.ROWS: 5, ScaleOf.COLUMNS: 12}[scale_of], seed=2)[0].to(DEVICE)
    code_scale = 2.0 ** torch.randint(-2, 3, (12,), device=DEVICE)
    layout = Layout((LogitSet(scale_of, data={Slot.CODE_SCALE: code_scale}),), ()).encode()
    indices = torch.randint(-1, 12, (5, 7), device=DEVICE)
    d_values = integers(5, 7, seed=3).to(DEVICE)
    arguments = (x, y.to(torch.int8), scale, None, None, *layout, indices, d_values, needs)
    for got, expected in zip(launchers.backward(*arguments), reference.backward(*arguments), strict=True):
        assert got.dtype == torch.float32 and torch.equal(got, expected.float())


def test_numbers_that_no_list_names_do_not_matter():
    """Rows of NaN have no part in the gradients of others, and a gradient of NaN stays with its pair."""
    x, y = on_device((integers(3, 8), integers(5, 8, seed=1)), DEVICE)
    y[0] = torch.nan
    indices = torch.tensor([[1, -1, 2], [3, 3, -1], [-1, -1, -1]], device=DEVICE)
    d_values = integers(3, 3, seed=2).to(DEVICE)
    d_values[0, 1], d_values[1, 0] = torch.nan, torch.nan
    arguments = (x, y, torch.ones(1, device=DEVICE), None, None, *Layout((LogitSet(),), ()).encode(), indices, d_values)
    dx, dy, _, drow_bias, dcol_bias = launchers.backward(*arguments, 31)
    assert dx.isnan().any(1).tolist() == drow_bias.isnan().tolist() == [False, True, False]
    assert dy.isnan().any(1).tolist() == dcol_bias.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 3, 0)], ids=str)
def test_backward_of_nothing(shape):
    rows, columns, depth = shape
    leaves = [torch.ones(n, depth, device=DEVICE, requires_grad=True) for n in (rows, columns)]
    biases = [torch.zeros(n, device=DEVICE, requires_grad=True) for n in (rows, columns)]
    values = similarity_topk(*leaves, 2, row_bias=biases[0], col_bias=biases[1], backend="cuda").values
    gradients = torch.autograd.grad(values, leaves + biases, torch.ones_like(values))
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves + biases]
    assert not any(g.any() for g in gradients[:2])
    assert gradients[2].tolist() == [2.0 * bool(columns)] * rows


# ---- Lists -----------------------------------------------------------------------------------------------------------


def assert_same_lists(function):
    """What a function of a backend returns is that of the reference."""
    found, expected = function("cuda"), function("reference")
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)
    assert torch.equal(found.counts, expected.counts)


@pytest.mark.parametrize("most", [launchers.MOST_ORDERED, 8])
def test_lists_are_merged_and_ordered_as_in_the_reference(most, monkeypatch):
    monkeypatch.setattr(launchers, "MOST_ORDERED", most)  # longer ones are sorted by a library
    values = torch.randint(-3, 3, (9, 20), device=DEVICE).float()
    indices = torch.stack([torch.randperm(60, device=DEVICE)[:20] for _ in range(9)]) + (1 << 40)
    indices[2, 5:], values[3, 7:], values[4, ::2] = -1, -torch.inf, torch.nan
    for k in (1, 11, 30):
        assert_same_lists(lambda backend, k=k: order(values, indices, k, backend))
    halves = [order(values[:, part], indices[:, part], 10, "reference") for part in (slice(10), slice(10, 20))]
    assert_same_lists(lambda backend: merge(*halves, backend))


@pytest.mark.parametrize(("rows", "listed"), [(0, 3), (3, 0), (1, 1), (2, 2049)])
def test_lists_of_any_size(rows, listed):
    values = torch.randint(-9, 9, (rows, listed), device=DEVICE).float()
    indices = torch.arange(rows * listed, device=DEVICE).reshape(rows, listed).flip(1)
    assert_same_lists(lambda backend: order(values, indices, 5, backend))


def test_streamed_blocks():
    query, corpus = integers(4, 5).to(DEVICE), integers(130, 5, seed=1).to(DEVICE)
    results = []
    for backend in ("cuda", "reference"):
        state = TopKState(query, 6, pairs=Pairs(below=torch.arange(4.0, device=DEVICE)), backend=backend)
        for begin in (90, 0, 45):
            state.update(corpus[begin : begin + 45], begin)
        results.append(state.finalize())
    assert torch.equal(results[0].indices, results[1].indices) and torch.equal(results[0].values, results[1].values)


def test_hard_negatives():
    query, corpus = integers(6, 5).to(DEVICE), integers(70, 5, seed=1).to(DEVICE)
    positives, rules = torch.arange(6, device=DEVICE), NegativeRules(absolute_margin=1.0)
    found, expected = (
        mine_hard_negatives(query, corpus, positives, 5, rules=rules, metric="dot", backend=backend)
        for backend in ("cuda", "reference")
    )
    assert torch.equal(found.indices, expected.indices)


# ---- The same in every run -------------------------------------------------------------------------------------------


def everything():
    """Results of all launchers for numbers whose sums depend on their order."""
    torch.manual_seed(1)
    x, y = torch.randn(3, 40, device=DEVICE), torch.randn(1300, 40, device=DEVICE)
    pairs = on_device(rules_of(3, 1300, ("differ", "exclude", "guide", "below"), 1), DEVICE)
    leaves = [x.requires_grad_(), y.requires_grad_(), torch.randn(1300, device=DEVICE, requires_grad=True)]
    arguments = {"col_bias": leaves[2], "pairs": pairs, "backend": "cuda"}
    found = select(x, y, 20, count_above=torch.zeros(3, device=DEVICE), **arguments)
    listed = torch.randint(-1, 6, (3, 90), device=DEVICE)
    values = logits_at(x, y, listed, **arguments)
    gradients = torch.autograd.grad(values.nan_to_num(neginf=0.0).square().sum(), leaves)
    best = order(values.detach(), listed, 50, "cuda")
    return [*found.top[:3], *found.statistics.values(), values.detach(), *gradients, *best[:3]]


def test_results_do_not_depend_on_what_runs_when():
    results = []
    for schedule in SCHEDULES:
        with running(schedule):
            results.append(everything())
    for first, other in itertools.pairwise(results):
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_float64_is_refused():
    x = torch.ones(2, 2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"backend 'cuda' cannot run these inputs:\s+dtype=torch.float64"):
        similarity_topk(x, x, 1, backend="cuda")


def test_tensors_elsewhere_are_refused():
    x = torch.ones(2, 2, device="meta")
    with pytest.raises(NotImplementedError, match=r"backend 'cuda' cannot run these inputs:\s+device=meta"):
        similarity_topk(x, x, 1, backend="cuda")
