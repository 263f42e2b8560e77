"""xtr against the formula of the paper: the best tokens of the whole batch, what is missing, and the normaliser."""

import itertools

import pytest
import torch
import torch._dynamo.testing

from contrastive_ops.ops import TokenSets, maxsim, xtr
from contrastive_ops.testing import TOLERANCE, relative_error
from contrastive_ops.testing.compare import check_derivatives

INF = float("inf")
OPTIONS = list(itertools.product(["skip", "impute"], ["mean", "sum"]))


def formula(queries, documents, query_mask, document_mask, k, missing, reduce):
    """A loop over queries and documents with the similarities of all tokens."""
    tokens = documents[document_mask]
    owner = torch.arange(len(documents))[:, None].expand(document_mask.shape)[document_mask]
    rows = []
    for n in range(len(queries)):
        similarity = queries[n][query_mask[n]] @ tokens.T
        order = similarity.sort(dim=1, descending=True, stable=True)
        retrieved = torch.zeros_like(similarity, dtype=torch.bool).scatter(1, order.indices[:, :k], True)
        least = order.values[:, min(k, len(tokens)) - 1] if len(tokens) else None
        row = []
        for m in range(len(documents)):
            mine = owner == m
            if len(similarity) == 0:
                row.append(similarity.sum())
                continue
            if not mine.any():
                row.append(torch.full((), -INF, dtype=queries.dtype))
                continue
            hit = retrieved[:, mine].any(1)
            best = similarity[:, mine].masked_fill(~retrieved[:, mine], -INF).max(1).values  # of the first of equals
            total, count = best[hit].sum(), hit.sum()
            if missing == "impute":
                total, count = total + least[~hit].sum(), len(hit)
            row.append(total / max(int(count), 1) if reduce == "mean" else total)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def problem(dtype=torch.float64, integers=False, depth=8):
    shapes = ((4, 5, depth), (6, 7, depth))
    if integers:
        tokens = [torch.randint(-1, 2, shape).to(dtype) for shape in shapes]
    else:
        tokens = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    masks = [torch.rand(t.shape[:2]) < 0.7 for t in tokens]
    masks[0][1], masks[1][2] = False, False
    return [t.requires_grad_() for t in tokens], masks


def packed(tokens, mask):
    """The same sets without padding, between tokens of no set."""
    rows, outside = tokens[mask], tokens.detach()[0, :1] * 100
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return TokenSets(torch.cat([outside, rows, outside]), offsets=offsets + 1)


def check(value, truth, leaves, tolerance):
    assert relative_error(value, truth) <= tolerance
    finite = truth.isfinite()
    upstream = torch.randn_like(truth)
    found, expected = (
        torch.autograd.grad((torch.where(finite, v, 0.0) * upstream).sum(), t, materialize_grads=True)
        for v, t in ((value, leaves), (truth, leaves))
    )
    for got, wanted in zip(found, expected, strict=True):
        assert relative_error(got, wanted) <= tolerance


@pytest.mark.parametrize("missing,reduce", OPTIONS)
@pytest.mark.parametrize("k", [1, 3, 10, 100])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_values_and_gradients_are_those_of_the_paper(missing, reduce, k, layout, backend):
    (queries, documents), masks = problem()
    sets = [
        TokenSets(t, m) if layout == "padded" else packed(t, m)
        for t, m in zip((queries, documents), masks, strict=True)
    ]
    value = xtr(*sets, k, missing=missing, reduce=reduce, backend=backend)
    truth = formula(queries, documents, *masks, k, missing, reduce)
    check(value, truth, [queries, documents], 1e-11)


@pytest.mark.parametrize("missing,reduce", OPTIONS)
def test_equal_similarities_are_retrieved_in_the_order_of_tokens(missing, reduce, backend):
    (queries, documents), masks = problem(integers=True, depth=3)
    sets = [TokenSets(t, m) for t, m in zip((queries, documents), masks, strict=True)]
    for k in (1, 4, 9):
        value = xtr(*sets, k, missing=missing, reduce=reduce, backend=backend)
        check(value, formula(queries, documents, *masks, k, missing, reduce), [queries, documents], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, backend):
    (queries, documents), masks = problem(dtype)
    sets = [TokenSets(t, m) for t, m in zip((queries, documents), masks, strict=True)]
    value = xtr(*sets, 4, backend=backend)
    truth = formula(queries.double(), documents.double(), *masks, 4, "skip", "mean")
    assert value.dtype == torch.float32 and relative_error(value, truth) <= TOLERANCE[dtype]


def test_with_every_token_it_is_maxsim(backend):
    (queries, documents), masks = problem()
    sets = [TokenSets(t, m) for t, m in zip((queries, documents), masks, strict=True)]
    for missing in ("skip", "impute"):
        value = xtr(*sets, 42, missing=missing, backend=backend)
        torch.testing.assert_close(value, maxsim(*sets, reduce="mean", backend=backend))


@pytest.mark.parametrize("missing", ["skip", "impute"])
def test_gradcheck_and_gradgradcheck(missing, backend):
    queries, documents = torch.randn(2, 2, 3).double().requires_grad_(), torch.randn(3, 3, 3).double().requires_grad_()

    def function(queries, documents):
        return xtr(queries, documents, 3, missing=missing, backend=backend)

    check_derivatives(function, (queries, documents))


def test_nan_stays_in_sight(backend):
    """Retrieval passes NaN over: the scores of its query and of its document say so."""
    (queries, documents), masks = problem()
    masks[0][0, 0], masks[1][3, 1] = True, True
    with torch.no_grad():
        queries[0, 0, 2], documents[3, 1, 0] = torch.nan, torch.nan
        queries[~masks[0]], documents[~masks[1]] = torch.nan, torch.nan
    value = xtr(TokenSets(queries, masks[0]), TokenSets(documents, masks[1]), 4, backend=backend)
    assert value[0].isnan().all() and value[:, 3].isnan().all()
    assert not value[1:, [0, 1, 2, 4, 5]].isnan().any()
    packed_value = xtr(packed(queries, masks[0]), packed(documents, masks[1]), 4, backend=backend)
    torch.testing.assert_close(packed_value, value, equal_nan=True)


def test_what_is_missing_where_every_token_was_retrieved(backend):
    """Products of -inf are products of tokens, as `maxsim` has them; documents without tokens have gradient zero."""
    queries = torch.tensor([[[1.0, 0.0], [1e30, 0.0]]], requires_grad=True)
    documents = torch.tensor([[[-1e30, 1.0], [-2e30, 1.0]], [[3.0, 1.0], [2.0, 0.0]], [[9.0, 0.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    for k in (4, 9):
        value = xtr(queries, TokenSets(documents, mask), k, missing="impute", backend=backend)
        assert torch.equal(value, maxsim(queries, TokenSets(documents, mask), reduce="mean", backend=backend))
        assert value[0, 0] == value[0, 2] == -INF and value[0, 1] > 0
        (gradient,) = torch.autograd.grad(value[0, 1], queries)
        assert torch.equal(gradient, torch.tensor([[[1.5, 0.5], [1.5, 0.5]]]))
    some = xtr(queries, TokenSets(documents, mask), 2, missing="impute", backend=backend)
    assert some[0, 0] == (2 + 2e30) / 2  # the second of the two that each token retrieved


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_any_number_of_threads_gives_the_same_bits(layout):
    queries, documents = torch.randn(64, 32, 24, requires_grad=True), torch.randn(90, 40, 24, requires_grad=True)
    mask = torch.rand(90, 40) < 0.8
    before, first = torch.get_num_threads(), None
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            sets = [(queries, torch.ones(64, 32, dtype=torch.bool)), (documents, mask)]
            sets = [TokenSets(t, m) if layout == "padded" else packed(t, m) for t, m in sets]
            value = xtr(*sets, 50, missing="impute", backend="cpu")
            found = [value.detach(), *torch.autograd.grad(value.square().sum(), [queries, documents])]
            first = first or found
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("sizes", list(itertools.product([0, 2], repeat=4)), ids=str)
def test_empty_dimensions(sizes, backend):
    n, length, m, other = sizes
    queries, documents = torch.randn(n, length, 4).requires_grad_(), torch.randn(m, other, 4).requires_grad_()
    for missing in ("skip", "impute"):
        value = xtr(queries, documents, 2, missing=missing, backend=backend)
        assert value.shape == (n, m)
        if length == 0:
            assert (value == 0).all()
        elif other == 0:
            assert (value == -INF).all()
        found = torch.autograd.grad(value.sum(), [queries, documents], materialize_grads=True)
        assert all(gradient.isfinite().all() for gradient in found)


def test_compiles_without_graph_break_or_recompilation():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def step(queries, documents, mask):
        return xtr(queries, TokenSets(documents, mask), 5, missing="impute").square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (5, 7, 12):
        queries, documents = torch.randn(n, 3, 8, requires_grad=True), torch.randn(n + 2, 6, 8, requires_grad=True)
        mask = (torch.rand(n + 2, 6) < 0.7) | (torch.arange(6) == 0)  # no score of -inf
        for t in (queries, documents, mask):
            torch._dynamo.mark_dynamic(t, 0)
        value, expected = compiled(queries, documents, mask), step(queries, documents, mask)
        torch.testing.assert_close(value, expected)
        for got, wanted in zip(*(torch.autograd.grad(v, [queries, documents]) for v in (value, expected)), strict=True):
            torch.testing.assert_close(got, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "change,kind,message",
    [
        ({"k": 0}, ValueError, "xtr: k must be at least 1, got 0"),
        ({"missing": "drop"}, ValueError, "xtr: missing must be one of 'skip', 'impute', got 'drop'"),
        ({"reduce": "max"}, ValueError, "xtr: reduce must be one of 'sum', 'mean', got 'max'"),
        ({"documents": torch.randn(3, 4)}, ValueError, "xtr: documents must have shape (B, L, D), or (T, D) with"),
    ],
)
def test_bad_input(change, kind, message):
    given = {"queries": torch.randn(2, 3, 4), "documents": torch.randn(3, 4, 4), "k": 2, **change}
    with pytest.raises(kind) as error:
        xtr(**given)
    assert message in str(error.value)
