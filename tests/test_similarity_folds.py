"""Every fold, rule and option of similarity_reduce against the dense truth, alone and in random combinations."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairwise import pairwise

from contrastive_ops import Fold, Pairs, similarity_reduce
from contrastive_ops.ops import Guide
from contrastive_ops.testing import TOLERANCE, dense_reduce, relative_error
from contrastive_ops.testing.compare import check_derivatives

DOUBLE = torch.float64
KINDS = ("logsumexp", "max", "sum_softplus", "sum_relu", "sum", "count")


class Inputs:
    """Random inputs of one call, as leaves of one dtype."""

    def __init__(self, n, m, d, *, self_similarity=False, dtype=DOUBLE, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.n, self.m, self.d = n, n if self_similarity else m, d
        self.x = self.leaf(n, d)
        self.y = None if self_similarity else self.leaf(m, d)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=DOUBLE)

    def leaf(self, *shape):
        return self.random(*shape).to(self.dtype).requires_grad_()

    def ids(self, size, kinds):
        return torch.randint(-1, kinds, (size,), generator=self.generator)

    def lists(self, longest, weights=False):
        lengths = torch.randint(0, min(longest, self.m) + 1, (self.n,), generator=self.generator)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        columns = [torch.randperm(self.m, generator=self.generator)[:k].sort().values for k in lengths.tolist()]
        indices = torch.cat([*columns, torch.zeros(0, dtype=torch.int64)])
        return (indptr, indices, self.random(len(indices)).to(self.dtype)) if weights else (indptr, indices)

    def guide(self):
        return self.random(self.n, 3), None if self.y is None else self.random(self.m, 3)

    def pairs(self, name):
        n, m = self.n, self.m
        rules = {
            "diagonal": lambda: {"diagonal": 1},
            "differ": lambda: {"differ": (self.ids(n, 4), self.ids(m, 4))},
            "same": lambda: {"same": (self.ids(n, 2), self.ids(m, 2))},
            "exclude": lambda: {"exclude": self.lists(7)},
            "below": lambda: {"below": (1.0, self.random(n), self.random(1, m).abs())},
            "above": lambda: {"above": (-2.0, self.random(n, 1) - 1, self.random(1, m) - 1)},
            "guide": lambda: {"guide": Guide(*self.guide(), (self.random(n), self.random(1, m)))},
            "log_weight": lambda: {"log_weight": (self.random(3, 4).to(self.dtype), self.ids(n, 3), self.ids(m, 4))},
            "fill": lambda: {"diagonal": 0, "differ": (self.ids(n, 3), self.ids(m, 3)), "fill": 0.3},
        }
        return rules[name]()

    def tensors(self, *others):
        return [t for t in (self.x, self.y, *others) if isinstance(t, torch.Tensor) and t.requires_grad]


RULES = ("diagonal", "differ", "same", "exclude", "below", "above", "guide", "log_weight", "fill")


def flat(reduced):
    parts = [*(reduced.rows or ()), *(reduced.cols or ()), reduced.target, reduced.linear]
    return [p for p in parts if p is not None]


def winners(reduced):
    return [w for w in (*(reduced.row_argmax or ()), *(reduced.col_argmax or ())) if w is not None and w.numel()]


def total_of(values, cotangents):
    finite = (torch.where(v.isfinite(), v, 0.0) * c.to(v.dtype) for v, c in zip(values, cotangents, strict=True))
    return sum(v.sum() for v in finite)


def check(inputs, backend, leaves, tolerance=1e-10, **options):
    """Values, winners and every gradient with random cotangents."""
    dim = options.pop("dim", (0, 1))
    reduce = options.pop("reduce", ("logsumexp",))
    budget = options.pop("memory_budget", None)
    got = similarity_reduce(
        inputs.x, inputs.y, reduce=reduce, dim=dim, memory_budget=budget, backend=backend, **options
    )
    truth = dense_reduce(inputs.x, inputs.y, reduce=reduce, dim=dim, **options)
    cotangents = [torch.randn(v.shape, dtype=DOUBLE) for v in flat(truth)]
    for value, expected in zip(flat(got), flat(truth), strict=True):
        assert relative_error(value, expected) <= tolerance
    for index, expected in zip(winners(got), winners(truth), strict=True):
        assert torch.equal(index, expected)
    if not any(v.requires_grad for v in flat(truth)):
        return
    everything = inputs.tensors(*leaves)
    gradients = [
        torch.autograd.grad(total_of(flat(r), cotangents), everything, allow_unused=True, retain_graph=True)
        for r in (got, truth)
    ]
    for g, e in zip(*gradients, strict=True):
        if e is None:
            assert g is None or not g.any()
        else:
            assert relative_error(g, e) <= tolerance


@pairwise(kind=KINDS, negate=[False, True], self_similarity=[False, True], dim=[(1,), (0,), (0, 1)])
def test_each_fold(backend, kind, negate, self_similarity, dim):
    inputs = Inputs(150, 270, 9, self_similarity=self_similarity)
    scale, row_bias, col_bias = inputs.leaf(inputs.n), inputs.leaf(inputs.n), inputs.leaf(inputs.m)
    options = {"scale": scale, "row_bias": row_bias, "col_bias": col_bias, "pairs": Pairs(diagonal=0)}
    check(inputs, backend, [scale, row_bias, col_bias], reduce=(Fold(kind, negate=negate),), dim=dim, **options)


@pairwise(rule=RULES, kind=KINDS, self_similarity=[False, True])
def test_each_rule(backend, rule, kind, self_similarity):
    inputs = Inputs(140, 150, 7, self_similarity=self_similarity, seed=3)
    bias = inputs.leaf(inputs.n)
    pairs = Pairs(**inputs.pairs(rule))
    check(inputs, backend, [bias], reduce=(kind,), pairs=pairs, row_bias=bias, scale=0.7)


@pytest.mark.parametrize("first,second", list(itertools.combinations(RULES[:-1], 2)))
@pytest.mark.parametrize("self_similarity", [False, True])
def test_rules_are_anded(backend, first, second, self_similarity):
    inputs = Inputs(60, 145, 5, self_similarity=self_similarity, seed=5)
    pairs = Pairs(**{**inputs.pairs(first), **inputs.pairs(second)})
    target = torch.randint(inputs.m, (inputs.n,))
    check(inputs, backend, [], reduce=("logsumexp", "count"), pairs=pairs, target=target, scale=0.5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 200),
    st.integers(1, 300),
    st.integers(1, 20),
    st.booleans(),
    st.lists(st.sampled_from(RULES), unique=True, max_size=4),
    st.lists(
        st.tuples(st.sampled_from(KINDS), st.booleans(), st.booleans(), st.lists(st.sampled_from(RULES), max_size=2)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([(1,), (0,), (0, 1)]),
    st.integers(0, 15),
    st.integers(0, 1000),
)
@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
def test_anything_goes(backend_name, n, m, d, self_similarity, rules, folds, dim, switches, seed):
    """Several folds with their own scales, pairs and signs, both doors, column scales, kept products or not."""
    inputs = Inputs(n, m, d, self_similarity=self_similarity, seed=seed)
    leaves, options = [], {}
    if rules:
        options["pairs"] = Pairs(**{k: v for rule in rules for k, v in inputs.pairs(rule).items()})
    guide = (options["pairs"].guide if rules else None) or None
    requests = []
    for kind, negate, own_scale, own_rules in folds:
        own = {k: v for rule in own_rules for k, v in inputs.pairs(rule).items()}
        if "guide" in own and guide is not None:
            own["guide"] = Guide(guide.gx, guide.gy, 0.5)
        guide = guide or own.get("guide")
        scale = inputs.leaf(inputs.n) if own_scale else None
        leaves.append(scale)
        requests.append(Fold(kind, scale=scale, pairs=Pairs(**own) if own_rules else None, negate=negate))
    options["scale"] = inputs.leaf(1).detach().squeeze(0).requires_grad_() if switches & 1 else inputs.leaf(inputs.n)
    leaves.append(options["scale"])
    if switches & 2:
        options["col_scale"] = inputs.leaf(inputs.m)
        options["col_bias"] = inputs.leaf(inputs.m)
        leaves += [options["col_scale"], options["col_bias"]]
    if switches & 4:
        options["target"] = torch.randint(inputs.m, (inputs.n,), generator=inputs.generator)
    if switches & 8:
        options["linear"] = inputs.lists(5, weights=True)
    budget = 0 if seed % 2 else None
    check(
        inputs, backend_name, leaves, reduce=tuple(requests), dim=dim, memory_budget=budget, tolerance=1e-9, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision(backend, dtype, kind):
    inputs = Inputs(150, 270, 33, dtype=dtype)
    pairs = Pairs(differ=(inputs.ids(150, 5), inputs.ids(270, 5)))
    got = similarity_reduce(inputs.x, inputs.y, reduce=(kind,), dim=(0, 1), pairs=pairs, scale=0.3, backend=backend)
    exact = [t.detach().double().requires_grad_() for t in (inputs.x, inputs.y)]
    truth = dense_reduce(*exact, reduce=(kind,), pairs=pairs, scale=0.3)
    for value, expected in zip(flat(got), flat(truth), strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, expected) <= 1e-6 if kind != "count" else torch.equal(value.double(), expected)
    if kind == "count":
        return
    gradients = torch.autograd.grad(sum(v.sum() for v in flat(got)), [inputs.x, inputs.y])
    expected = torch.autograd.grad(sum(v.sum() for v in flat(truth)), exact)
    for g, e in zip(gradients, expected, strict=True):
        assert relative_error(g, e) <= TOLERANCE[dtype]


@pytest.mark.parametrize("bias", [-30.0, -10.0, 0.0, 10.0, 100.0])
def test_small_softplus_keeps_its_relative_accuracy(backend, bias):
    """SigLIP starts at a bias of -10, where softplus is exp(-10) and log(1 + u) would lose its digits."""
    x, y = torch.randn(40, 8), torch.randn(300, 8)
    row_bias = torch.full((40,), bias)
    got = similarity_reduce(x, y, reduce="sum_softplus", row_bias=row_bias, backend=backend)
    truth = torch.nn.functional.softplus(x.double() @ y.double().T + bias, threshold=1e9).sum(1)
    assert relative_error(got, truth) <= 1e-6


@pytest.mark.parametrize(
    "dtype,bias", [(torch.float32, -90.0), (torch.float32, -1e4), (DOUBLE, -800.0), (DOUBLE, 800.0)]
)
@pytest.mark.parametrize("self_similarity", [False, True])
def test_logits_far_from_zero(backend, dtype, bias, self_similarity):
    """exp(-logit) overflows: a part without pairs must not be scaled by it."""
    inputs = Inputs(300, 140, 8, self_similarity=self_similarity, dtype=dtype)
    row_bias, pairs = torch.full((300,), bias, dtype=dtype), Pairs(diagonal=0)
    got = similarity_reduce(inputs.x, inputs.y, dim=(0, 1), row_bias=row_bias, pairs=pairs, backend=backend)
    truth = dense_reduce(inputs.x.double(), None if self_similarity else inputs.y.double(), pairs=pairs)
    for value, expected in ((got.rows, truth.rows[0]), (got.cols, truth.cols[0])):
        torch.testing.assert_close(value.double(), expected + bias, rtol=1e-6, atol=1e-3 if bias == -1e4 else 1e-5)


# ---- Ties, NaN, infinities -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("self_similarity", [False, True])
def test_ties_go_to_the_smallest_index(backend, dtype, self_similarity):
    x = torch.randint(-1, 2, (700, 3)).to(dtype)
    y = None if self_similarity else torch.randint(-1, 2, (400, 3)).to(dtype)
    got = similarity_reduce(x, y, reduce="max", dim=(0, 1), pairs=Pairs(diagonal=0), backend=backend)
    logits = x @ (x if y is None else y).T
    logits = logits.masked_fill(torch.arange(len(x))[:, None] == torch.arange(logits.shape[1]), -torch.inf)
    for direction, value, index in ((1, got.rows, got.row_argmax), (0, got.cols, got.col_argmax)):
        assert torch.equal(value, logits.amax(direction))
        first = (logits == logits.amax(direction, keepdim=True)).int().argmax(direction)
        assert torch.equal(index, first)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["max", "sum_softplus", "sum_relu"])
def test_nan_and_inf_propagate_to_their_rows_alone(backend, bad, kind):
    x, y = torch.randn(40, 8), torch.randn(140, 8).abs()
    x[3, 2] = bad
    got = similarity_reduce(x, y, reduce=(kind,), dim=(0, 1), backend=backend)
    logits = x @ y.T
    for value, direction in ((got.rows[0], 1), (got.cols[0], 0)):
        each = {"max": logits.amax, "sum_softplus": None, "sum_relu": None}[kind]
        if each is not None:
            expected = each(direction)
        elif kind == "sum_relu":
            expected = logits.relu().sum(direction)
        else:
            expected = torch.logaddexp(logits, torch.zeros(())).sum(direction)
        torch.testing.assert_close(value, expected, equal_nan=True)
    if kind == "max":
        first = logits.max(1)
        assert torch.equal(got.row_argmax[0], torch.where(first.values == -torch.inf, -1, first.indices))


def test_no_pair_takes_part(backend):
    """Bounds that remove everything: each fold has its empty value, and no gradient is NaN."""
    x, y = torch.randn(20, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    got = similarity_reduce(x, y, reduce=KINDS, dim=(0, 1), pairs=Pairs(below=-1e9), backend=backend)
    for kind, row, col in zip(KINDS, got.rows, got.cols, strict=True):
        empty = -torch.inf if kind in ("logsumexp", "max") else 0.0
        assert (row == empty).all() and (col == empty).all(), kind
    assert (got.row_argmax[1] == -1).all() and (got.col_argmax[1] == -1).all()
    values = [v for k, v in zip(KINDS, got.rows, strict=True) if k != "count"]
    for gradient in torch.autograd.grad(sum(v.sum() for v in values), [x, y]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("n,m", [(0, 5), (5, 0), (0, 0)])
def test_empty(backend, n, m):
    x, y = torch.randn(n, 4, requires_grad=True), torch.randn(m, 4, requires_grad=True)
    ids = (torch.arange(n), torch.arange(m))
    got = similarity_reduce(x, y, reduce=KINDS, dim=(0, 1), pairs=Pairs(differ=ids), backend=backend)
    truth = dense_reduce(x, y, reduce=KINDS, pairs=Pairs(differ=ids))
    for value, expected in zip((*got.rows, *got.cols), (*truth.rows, *truth.cols), strict=True):
        assert torch.equal(value, expected.to(value.dtype))


# ---- Rules ----------------------------------------------------------------------------------------------------------


def test_no_rule_drops_the_target(backend):
    x, y = torch.randn(30, 5), torch.randn(40, 5)
    target = torch.randint(40, (30,))
    pairs = Pairs(below=-1e9, differ=(torch.zeros(30, dtype=torch.int64), torch.zeros(40, dtype=torch.int64)))
    got = similarity_reduce(x, y, target=target, pairs=pairs, backend=backend)
    torch.testing.assert_close(got.target, (x * y[target]).sum(1))
    assert (got.rows == -torch.inf).all()


@pytest.mark.parametrize("ids", ["small", "huge", "negative"])
def test_ids_of_any_size(backend, ids):
    """Ids are compared as 64-bit numbers although lanes have 32."""
    values = {
        "small": torch.tensor([0, 1, 2, -1]),
        "huge": torch.tensor([1 << 40, (1 << 40) + (1 << 32), (1 << 62), -1]),
        "negative": torch.tensor([-(1 << 63), -2, -(1 << 31), -1]),
    }[ids]
    x, y = torch.randn(50, 4), torch.randn(60, 4)
    rows, cols = values[torch.randint(4, (50,))], values[torch.randint(4, (60,))]
    for rule in ("same", "differ"):
        got = similarity_reduce(x, y, reduce="count", pairs=Pairs(**{rule: (rows, cols)}), backend=backend)
        equal = (rows[:, None] == cols) & (rows[:, None] != -1)
        assert torch.equal(got, (equal if rule == "same" else ~equal).sum(1).float())


@pytest.mark.parametrize("bound", [2.0, torch.full((2,), 2.0), torch.full((1, 3), 2.0)], ids=["pair", "row", "column"])
def test_bounds_include_their_value_and_let_nan_pass(backend, bound):
    x, y = torch.tensor([[1.0], [torch.nan]]), torch.tensor([[1.0], [2.0], [3.0]])
    count = similarity_reduce(x, y, reduce="count", pairs=Pairs(below=bound, above=bound), backend=backend)
    assert count.tolist() == [1.0, 3.0]
    guide = Guide(x, y, bound)
    count = similarity_reduce(x, y, reduce="count", pairs=Pairs(guide=guide, above=bound), backend=backend)
    assert count.tolist() == [1.0, 3.0]


def test_unsorted_and_repeated_columns_are_sorted(backend):
    x, y = torch.randn(3, 4), torch.randn(200, 4)
    indptr, indices = torch.tensor([0, 3, 3, 6]), torch.tensor([150, 2, 150, 9, 8, 9])
    count = similarity_reduce(x, y, reduce="count", pairs=Pairs(exclude=(indptr, indices)), backend=backend)
    assert count.tolist() == [198.0, 200.0, 198.0]
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    got = similarity_reduce(x, y, linear=(indptr, indices, weights), backend=backend).linear
    logits = x @ y.T
    expected = torch.stack(
        [4 * logits[0, 150] + 2 * logits[0, 2], torch.zeros(()), 10 * logits[2, 9] + 5 * logits[2, 8]]
    )
    torch.testing.assert_close(got, expected)


def test_bounds_from_positives_carry_no_gradient(backend):
    x, y = torch.randn(20, 4, requires_grad=True), torch.randn(20, 4)
    own = (x * y).sum(1) + 1e-3  # not within rounding of any similarity
    pairs = Pairs(below=own)
    got = torch.autograd.grad(similarity_reduce(x, y, pairs=pairs, backend=backend).exp().sum(), x)[0]
    plain = torch.autograd.grad(dense_reduce(x, y, pairs=Pairs(below=own.detach())).rows[0].exp().sum(), x)[0]
    torch.testing.assert_close(got, plain)


def test_folds_of_one_sweep_equal_single_calls(backend):
    inputs = Inputs(130, 140, 40, dtype=torch.float32)
    ids = inputs.ids(130, 9), inputs.ids(140, 9)
    folds = (Fold("logsumexp", pairs=Pairs(differ=ids)), Fold("logsumexp", scale=2.0), "sum_softplus", "max")
    together = similarity_reduce(inputs.x, inputs.y, reduce=folds, backend=backend)
    for fold, value in zip(folds, together.rows, strict=True):
        alone = similarity_reduce(inputs.x, inputs.y, reduce=(fold,), backend=backend).rows[0]
        assert torch.equal(value, alone)


@pytest.mark.parametrize("dim", [(0, 1), (1,), (0,)])
@pytest.mark.parametrize("self_similarity", [False, True])
def test_a_bias_of_each_fold(backend, self_similarity, dim):
    """Numbers and vectors; folds that share one share a set, and its target and lists have the call's bias alone."""
    inputs = Inputs(70, 61, 5, self_similarity=self_similarity, seed=4)
    scale, bias = torch.tensor(0.9, dtype=DOUBLE, requires_grad=True), inputs.leaf(inputs.n)
    of_rows, pairs = inputs.random(inputs.n), Pairs(**inputs.pairs("differ"))
    folds = (
        "logsumexp",
        Fold("sum_relu", bias=0.7),
        Fold("sum_relu", bias=torch.tensor(-0.4, dtype=DOUBLE), negate=True, pairs=Pairs(diagonal=0)),
        Fold("logsumexp", bias=of_rows, scale=inputs.leaf(inputs.n)),
        Fold("sum_softplus", bias=of_rows, pairs=pairs),
        Fold("max", bias=of_rows, pairs=pairs),
        Fold("count", bias=0.7),
    )
    options = {"scale": scale, "row_bias": bias, "reduce": folds, "dim": dim, "linear": inputs.lists(5, weights=True)}
    target = torch.randint(inputs.m, (inputs.n,), generator=inputs.generator)
    check(inputs, backend, [scale, bias, folds[3].scale], target=target, **options)
    found = similarity_reduce(inputs.x, inputs.y, reduce=(Fold("logsumexp", bias=1e-3), "logsumexp"), backend=backend)
    torch.testing.assert_close(found.rows[0] - found.rows[1], torch.full((inputs.n,), 1e-3, dtype=DOUBLE))


def test_biases_of_folds_that_there_are_not():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="Fold: bias must"):
        Fold("sum", bias=float("nan"))
    with pytest.raises(ValueError, match="Fold: bias must not require a gradient"):
        Fold("sum", bias=torch.zeros(3, requires_grad=True))
    with pytest.raises(ValueError, match=r"similarity_reduce: bias of a fold must be one number or have shape \(3,\)"):
        similarity_reduce(x, reduce=(Fold("sum", bias=torch.zeros(4)),))
    weights = Pairs(
        log_weight=(torch.zeros(1, 1), torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    )
    with pytest.raises(NotImplementedError, match="similarity_reduce: pairs.log_weight must be None for a fold with a"):
        similarity_reduce(x, reduce=(Fold("sum", bias=1.0, pairs=weights),))


def test_gradcheck(backend):
    inputs = Inputs(5, 6, 3)
    ids = inputs.ids(5, 2), inputs.ids(6, 2)
    lists = inputs.lists(3, weights=True)
    scale, col_scale, own = inputs.leaf(5), inputs.leaf(6), inputs.leaf(5)
    row_bias, col_bias = inputs.leaf(5), inputs.leaf(6)

    def function(x, y, scale, col_scale, own, row_bias, col_bias):
        folds = (
            Fold("logsumexp", pairs=Pairs(differ=ids)),
            Fold("sum_softplus", scale=own, negate=True),
            Fold("sum_relu", pairs=Pairs(same=ids, fill=0.5)),
            "max",
            Fold("sum", pairs=Pairs(diagonal=1)),
        )
        reduced = similarity_reduce(
            x,
            y,
            reduce=folds,
            dim=(0, 1),
            scale=scale,
            col_scale=col_scale,
            row_bias=row_bias,
            col_bias=col_bias,
            target=torch.tensor([0, 5, 2, 2, 1]),
            linear=lists,
            backend=backend,
        )
        return tuple(torch.where(v.isfinite(), v, 0.0) for v in flat(reduced))

    leaves = (inputs.x, inputs.y, scale, col_scale, own, row_bias, col_bias)
    check_derivatives(function, leaves)


def test_two_runs_and_thread_counts_agree_bitwise():
    inputs = Inputs(900, 800, 40, dtype=torch.float32)
    ids = inputs.ids(900, 9), inputs.ids(800, 9)
    folds = (*KINDS, Fold("logsumexp", pairs=Pairs(differ=ids)), Fold("sum_softplus", scale=2.0, negate=True))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        got = similarity_reduce(inputs.x, inputs.y, reduce=folds, dim=(0, 1), backend="cpu")
        results.append([*flat(got), *torch.autograd.grad(sum(v.sum() for v in flat(got)), inputs.tensors())])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
