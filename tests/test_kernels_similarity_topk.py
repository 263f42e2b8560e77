"""similarity_topk in Triton against the reference: indices, counts and statistics are equal on small integers.

The interpreter's tiles have 16 rows and 16 columns, so that small matrices have partial tiles on every side, several
ranges of columns, and lists that are cut down several times.
"""

import pytest
import torch

from contrastive_ops.core import triton_kernels

if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)
if not triton_kernels.interprets() and not torch.cuda.is_available():
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from similarity_topk_cases import RULES, assert_selects_as_reference, integers, listed_gradients, on_device, rules_of

from contrastive_ops import Pairs, similarity_topk
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf
from contrastive_ops.core.rules import Slot
from contrastive_ops.kernels import similarity_topk as kernels
from contrastive_ops.mining.hard_negatives import NegativeRules, mine_hard_negatives
from contrastive_ops.mining.state import TopKState
from contrastive_ops.ops.similarity_topk import merge, order
from contrastive_ops.reference import similarity_topk as reference
from contrastive_ops.testing import TOLERANCE, relative_error

DEVICE = "cpu" if triton_kernels.interprets() else "cuda"


def assert_same(x, y, k, **arguments):
    """The same lists and statistics as the reference; returns them."""
    return assert_selects_as_reference("triton", DEVICE, x, y, k, **arguments)


# ---- Order -----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (1, 70, 3), (17, 1, 8), (3, 63, 5), (2, 64, 16), (16, 65, 33), (33, 129, 17)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    rows, columns, depth = shape
    assert_same(integers(rows, depth, dtype), integers(columns, depth, dtype, seed=1), 7)


@pytest.mark.parametrize("k", [1, 5, 37, 100, 109])
def test_lengths_of_lists_with_many_ties(k):
    assert_same(integers(18, 2), integers(100, 2, seed=1), k)


@pytest.mark.parametrize("sequence", ["ascending", "descending", "equal", "two values"])
def test_any_order_of_columns(sequence):
    """Ascending scores beat the threshold at every column, equal ones never after the first k."""
    score = torch.arange(230.0)
    if sequence == "descending":
        score = score.flip(0)
    elif sequence == "equal":
        score = torch.full_like(score, 3.0)
    elif sequence == "two values":
        score = score % 2
    assert_same(torch.tensor([[1.0], [-1.0], [2.0], [0.0]]), score[:, None], 9)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("columns", [0, 3])
@pytest.mark.parametrize("depth", [0, 2])
def test_empty_matrices(rows, columns, depth):
    level = torch.zeros(rows)
    assert_same(torch.ones(rows, depth), torch.ones(columns, depth), 2, count_above=level)


def test_strided_and_expanded_inputs():
    wide_x, wide_y = integers(20, 30), integers(60, 30, seed=1)
    for x, y in (
        (wide_x[::2, 3:17], wide_y[5::3, 3:17]),
        (wide_x.T[:20].T[:, :9], wide_y.T[:9].T),
        (wide_x[:, ::3], wide_y[:, ::3]),
        (wide_x[:1].expand(6, 30), wide_y[:1].expand(50, 30)),
    ):
        assert_same(x, y, 11)


# ---- How work is cut -------------------------------------------------------------------------------------------------


def test_rows_in_several_launches(monkeypatch):
    monkeypatch.setattr(kernels, "LIST_BYTES", 1)
    x, y = integers(39, 3), integers(90, 3, seed=1)
    arch = "interpreter" if triton_kernels.interprets() else "sm_90"
    tile = kernels.tile_for(arch, x.dtype, 39, 4, kernels.Load.NOTHING)
    assert kernels.plan(39, 90, 4, tile, 2).rows == tile.BLOCK_M
    assert_same(x, y, 4, count_above=torch.zeros(39))


@pytest.mark.parametrize("processors", [1, 2, 50])
def test_any_number_of_ranges_of_columns(processors, monkeypatch):
    monkeypatch.setattr(kernels, "_processors", lambda device: processors)
    assert_same(integers(3, 3), integers(300, 3, seed=1), 6, count_above=torch.ones(3))


@pytest.mark.parametrize("longest", [4, 8192])
def test_lists_that_keep_everything(longest, monkeypatch):
    monkeypatch.setattr(kernels, "LONGEST_LIST", longest)
    assert_same(integers(3, 3), integers(300, 3, seed=1), 6)


@pytest.mark.parametrize("k", [1, 100, 8192, 10_000])
@pytest.mark.parametrize("rows", [1, 130, 70_000])
@pytest.mark.parametrize("columns", [1, 5000, 10_000_000, kernels.MOST])
@pytest.mark.parametrize("arch", ["interpreter", "sm_80", "sm_90", "gfx942"])
def test_plans(rows, columns, k, arch):
    for dtype in (torch.float32, torch.bfloat16):
        for load in kernels.Load:
            tile = kernels.tile_for(arch, dtype, rows, k, load)
            cut = kernels.plan(rows, columns, k, tile, 132)
            assert (cut.parts - 1) * cut.width < columns <= cut.parts * cut.width
            assert cut.parts * cut.width + tile.BLOCK_N < 1 << 31
            assert cut.width % tile.BLOCK_N == cut.rows % tile.BLOCK_M == 0
            memory = 8 * cut.rows * cut.parts * cut.capacity
            assert memory <= kernels.LIST_BYTES or cut.rows == tile.BLOCK_M
            if cut.span:
                assert k + tile.BLOCK_N <= cut.capacity <= cut.span
            else:
                assert cut.capacity >= min(cut.width, columns)


def test_more_columns_than_indices_have_bits_for():
    y = torch.zeros((1, 1), device=DEVICE).expand(kernels.MOST + 1, 1)
    layout = Layout((LogitSet(),), ()).encode()
    with pytest.raises(NotImplementedError, match=r"similarity_topk: backend 'triton' takes at most \d+ rows"):
        kernels.forward(y[:1], y, torch.ones(1, device=DEVICE), None, None, *layout, 1, None, None)


# ---- Rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_each_rule(rule):
    x, y = integers(19, 6, seed=5), integers(85, 6, seed=6)
    pairs = rules_of(19, 85, (rule,), 5)
    assert_same(x, y, 5, pairs=pairs)


@pytest.mark.parametrize("named", [1, 2, 5])
def test_rules_that_name_the_best_columns(named):
    x, y = integers(4, 6, seed=5), integers(140, 6, seed=6)
    best = assert_same(x, y, 5).top.indices
    lists = torch.arange(5) * named, best[:, :named].sort(1).values.flatten().cpu()
    found = assert_same(x, y, 5, pairs=Pairs(exclude=lists)).top.indices
    assert not (found[:, :, None] == best[:, None, :named]).any()
    column = int(best[3, named - 1])
    assert not (assert_same(x, y, 5, pairs=Pairs(diagonal=column - 3)).top.indices[3] == column).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_rules_together_and_their_statistics(dtype):
    x, y = integers(19, 6, dtype, seed=7), integers(150, 6, dtype, seed=8)
    y[5:9] = torch.nan
    pairs = rules_of(19, 150, RULES, 7)
    level = torch.randint(-5, 10, (19,)).float()
    found = assert_same(x, y, 5, pairs=pairs, count_above=level)
    assert 0 < found.top.counts.sum() < 19 * 5
    others = {name for name in RULES if name not in ("diagonal", "exclude", "log_weight")}
    assert all(found.statistics[name].any() for name in ("higher", *others))


def test_statistics_of_other_rules_than_those_that_select():
    x, y = integers(19, 6, seed=7), integers(150, 6, seed=8)
    level = torch.randint(-5, 10, (19,)).float()
    every = rules_of(19, 150, ("diagonal", "exclude", "differ", "below", "guide", "log_weight"), 7)
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
    """Nine of ten columns lie above the bound."""
    pairs = Pairs(below=torch.tensor([29.0, 12.0, 8.0]))
    found = assert_same(torch.ones(3, 1), torch.arange(300.0)[:, None], 9, pairs=pairs)
    assert found.top.indices[:, 0].tolist() == [29, 12, 8]


def test_scale_and_biases():
    scale = torch.tensor([1.0, 2.0, -1.0, 0.0, 4.0, -2.0, 1.0, 1.0, 8.0])
    col_bias = torch.randint(-9, 9, (90,)).float()
    col_bias[17] = -torch.inf  # -inf takes no part
    x, y = integers(9, 5), integers(90, 5, seed=1)
    found = assert_same(x, y, 89, scale=scale, row_bias=torch.arange(9.0), col_bias=col_bias)
    assert not (found.top.indices == 17).any()


def test_floor_is_exclusive():
    x, y = integers(10, 4), integers(200, 4, seed=1)
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


def test_infinite_scores():
    y = torch.tensor([[1.0], [torch.inf], [-torch.inf], [2.0], [torch.inf]])
    found = assert_same(torch.tensor([[1.0], [-1.0]]), y.repeat(9, 1), 4).top
    assert found.indices.tolist() == [[1, 4, 6, 9], [2, 7, 12, 17]]


def test_zeros_of_both_signs_are_equal():
    y = torch.tensor([0.0, -0.0] * 50)[:, None]
    found = assert_same(torch.tensor([[1.0], [-1.0]]), y, 30).top
    assert torch.equal(found.indices.cpu(), torch.arange(30).expand(2, 30))


# ---- Codes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes(dtype):
    codes = torch.randint(-127, 128, (90, 5)).to(torch.int8)
    code_scale = 2.0 ** torch.randint(-3, 3, (90,)).float()
    x = integers(18, 5, dtype)
    pairs = rules_of(18, 90, ("below", "above"), 3)
    assert_same(x, codes, 7, code_scale=code_scale, pairs=pairs, count_above=torch.zeros(18))


@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.int8], ids=str)
def test_coarse_pass(coarse):
    x, y = integers(5, 6).to(DEVICE), integers(120, 6, seed=1).to(DEVICE)
    found = similarity_topk(x, y, 4, coarse=coarse, backend="triton")
    expected = similarity_topk(x, y, 4, backend="reference")
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)


# ---- Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_listed_logits_and_their_gradients(dtype, per_row):
    x, y = torch.randn(9, 21).to(dtype), torch.randn(30, 21).to(dtype)
    scale = torch.rand(9) if per_row else torch.tensor(1.5)
    indices = torch.randint(-1, 30, (9, 19))  # a column more than once, too
    problem = (x, y, scale, torch.randn(9), torch.randn(30), torch.randn(9, 19), indices, torch.randn(2, 2))
    problem = on_device(problem, DEVICE)
    values, gradients = listed_gradients(dtype, "triton", *problem)
    expected_values, expected = listed_gradients(torch.float64, "reference", *problem)
    assert torch.equal(values.isinf(), indices.to(DEVICE) < 0)
    assert (
        relative_error(values.nan_to_num(neginf=0.0), expected_values.nan_to_num(neginf=0.0))
        <= TOLERANCE[torch.float32]
    )
    for got, truth in zip(gradients, expected, strict=True):
        assert relative_error(got, truth) <= TOLERANCE[got.dtype]
    again = listed_gradients(dtype, "triton", *problem)[1]
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_gradients_of_a_selection():
    leaves = [t.to(DEVICE).requires_grad_() for t in (torch.randn(3, 4), torch.randn(2, 4))]
    values = similarity_topk(*leaves, 5, backend="triton").values
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
    arguments = (x, y, scale, None, None, *layout, indices, d_values, needs)
    for got, expected in zip(kernels.backward(*arguments), reference.backward(*arguments), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 3, 0)], ids=str)
def test_backward_of_nothing(shape):
    rows, columns, depth = shape
    leaves = [torch.ones(n, depth, device=DEVICE, requires_grad=True) for n in (rows, columns)]
    values = similarity_topk(*leaves, 2, backend="triton").values
    gradients = torch.autograd.grad(values, leaves, torch.ones_like(values))
    assert [g.shape for g in gradients] == [leaf.shape for leaf in leaves] and not any(g.any() for g in gradients)


# ---- Mining ----------------------------------------------------------------------------------------------------------


def test_lists_are_merged_and_ordered_as_in_the_reference():
    values = torch.randint(-3, 3, (9, 20), device=DEVICE).float()
    indices = torch.stack([torch.randperm(60, device=DEVICE)[:20] for _ in range(9)])
    indices[2, 5:], values[3, 7:], values[4, ::2] = -1, -torch.inf, torch.nan
    for k in (1, 11, 30):
        found, expected = (order(values, indices, k, backend) for backend in ("triton", "reference"))
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)
    halves = order(values[:, :10], indices[:, :10], 10), order(values[:, 10:], indices[:, 10:], 10)
    found, expected = (merge(*halves, backend) for backend in ("triton", "reference"))
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.values, expected.values)


def test_streamed_blocks():
    query, corpus = integers(7, 5).to(DEVICE), integers(130, 5, seed=1).to(DEVICE)
    results = []
    for backend in ("triton", "reference"):
        state = TopKState(query, 6, pairs=Pairs(below=torch.arange(7.0, device=DEVICE)), backend=backend)
        for begin in (90, 0, 45):
            state.update(corpus[begin : begin + 45], begin)
        results.append(state.finalize())
    assert torch.equal(results[0].indices, results[1].indices) and torch.equal(results[0].values, results[1].values)


def test_hard_negatives():
    query, corpus = integers(6, 5).to(DEVICE), integers(70, 5, seed=1).to(DEVICE)
    positives, rules = torch.arange(6, device=DEVICE), NegativeRules(absolute_margin=1.0)
    found, expected = (
        mine_hard_negatives(query, corpus, positives, 5, rules=rules, metric="dot", backend=backend)
        for backend in ("triton", "reference")
    )
    assert torch.equal(found.indices, expected.indices)


# ---- Refusals --------------------------------------------------------------------------------------------------------


def test_float64_is_refused():
    x = torch.ones(2, 2, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match=r"backend 'triton' cannot run these inputs:\s+dtype=torch.float64"):
        similarity_topk(x, x, 1, backend="triton")
