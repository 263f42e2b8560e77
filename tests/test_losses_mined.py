"""mined_info_nce against a dense float64 formula."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairwise import pairwise
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_ops import Pairs, info_nce, similarity_topk
from contrastive_ops.losses import mined_info_nce, moco
from contrastive_ops.mining.bank import MemoryBank
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, clustered_pairs, relative_error
from contrastive_ops.testing.compare import check, check_derivatives, leaf, reduced

DOUBLE = torch.float64
FUZZ = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def hardest(query, corpus, k, keep=None):
    """(N, k) the columns with the largest similarity among those to keep, -1 where there are fewer."""
    scores = query.detach() @ corpus.detach().T
    scores = scores if keep is None else scores.masked_fill(~keep, -torch.inf)
    kept = min(k, scores.shape[1])
    best = scores.topk(kept)
    indices = best.indices.masked_fill(best.values == -torch.inf, -1)
    return F.pad(indices, (0, k - kept), value=-1)


def dense(query, positive, corpus, indices, scale, ids=None, in_batch=True):
    """Rows of the loss: the positive, the listed rows, the others of the batch."""
    # A column for what is listed as -1, so that an empty corpus can be listed too.
    similarity = F.pad(query @ corpus.T, (0, 1))
    logits = [(query * positive).sum(1, keepdim=True), similarity.gather(1, indices % similarity.shape[1])]
    drop = [torch.zeros(len(query), 1, dtype=torch.bool), indices < 0]
    if in_batch:
        logits.append(query @ positive.T)
        drop.append(torch.eye(len(query), dtype=torch.bool))
        if ids is not None:
            drop[-1] = drop[-1] | ((ids[:, None] == ids) & (ids[:, None] >= 0))
    by_row = scale[:, None] if isinstance(scale, torch.Tensor) and scale.dim() else scale
    logits = (by_row * torch.cat(logits, 1)).masked_fill(torch.cat(drop, 1), -torch.inf)
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64), reduction="none")


def lists_of(keep):
    """The columns that each row drops, as `Pairs.exclude` has them."""
    dropped = (~keep).nonzero()
    indptr = F.pad((~keep).sum(1).cumsum(0), (1, 0))
    return indptr, dropped[:, 1].contiguous()


@FUZZ
@given(data=st.data())
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mined(backend, reduction, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    n, m, depth, k = (draw(st.integers(*bounds)) for bounds in ((1, 19), (0, 29), (1, 7), (1, 9)))
    query, positive, corpus = leaf(n, depth), leaf(n, depth), leaf(m, depth)
    normalize, in_batch = draw(st.booleans()), draw(st.booleans())
    q, p, c = (F.normalize(t) if normalize else t for t in (query, positive, corpus))
    keep, rules = torch.ones(n, m, dtype=torch.bool), {}
    if draw(st.booleans()):
        rules["exclude"] = lists_of(keep := torch.rand(n, m) < draw(st.sampled_from([0.0, 0.3, 0.9])))
    if draw(st.booleans()):
        rules["differ"] = torch.randint(-1, 4, (n,)), torch.randint(-1, 4, (m,))
        keep = keep & ((rules["differ"][0][:, None] != rules["differ"][1]) | (rules["differ"][0][:, None] < 0))
    if draw(st.booleans()):
        rules["below"] = (q * p).sum(1).detach() - 0.1
        keep = keep & ((q @ c.T) <= rules["below"][:, None])
    ids = torch.randint(-1, 4, (n,)) if in_batch and draw(st.booleans()) else None
    scale = (
        torch.rand(n, dtype=DOUBLE) + 1 if draw(st.booleans()) else torch.tensor(2.0, dtype=DOUBLE)
    ).requires_grad_()
    weight = torch.rand(n, dtype=DOUBLE, requires_grad=True) if draw(st.booleans()) else None
    indices = hardest(q, c, k, keep)
    mines = draw(st.booleans())
    value = mined_info_nce(
        query,
        positive,
        corpus,
        k if mines else None,
        indices=None if mines else indices,
        pairs=Pairs(**rules) if mines else None,
        labels=ids,
        in_batch=in_batch,
        scale=scale,
        weight=weight,
        reduction=reduction,
        normalize=normalize,
        backend=backend,
    )
    rows = dense(q, p, c, indices, scale, ids, in_batch)
    check(value, reduced(rows, reduction, weight), [query, positive, corpus, scale, weight])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_of_the_corpus_is_info_nce_and_moco(backend, reduction):
    query, positive, corpus = leaf(9, 4), leaf(9, 4), leaf(13, 4)
    options = {"temperature": 0.5, "reduction": reduction, "backend": backend}
    both = mined_info_nce(query, positive, corpus, 13, **options)
    check(both, info_nce(query, positive, corpus, **options), [query, positive, corpus])
    alone = mined_info_nce(query, positive, corpus, 20, in_batch=False, **options)
    check(alone, moco(query, positive, corpus, **options), [query, positive])


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_corpus_costs_no_gradient(backend, reduction, in_batch):
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.contrastive_ops.similarity_topk_backward.default:
                asked.append(args[-2])
            return function(*args, **(kwargs or {}))

    query, positive, corpus = leaf(6, 4), leaf(6, 4), leaf(9, 4)
    options = {"in_batch": in_batch, "reduction": reduction, "backend": backend}
    expected = mined_info_nce(query, positive, corpus, 3, normalize=False, **options).sum()
    frozen = mined_info_nce(query, positive, corpus.detach(), 3, normalize=False, **options).sum()
    wanted = torch.autograd.grad(expected, [query, positive, corpus])
    with Watch():
        got = torch.autograd.grad(frozen, [query, positive])
    assert asked == [0b001]
    for a, b in zip(got, wanted, strict=False):
        torch.testing.assert_close(a, b)
    touched = similarity_topk(query, corpus, 3).indices.unique()
    others = torch.ones(9, dtype=torch.bool).index_fill(0, touched, False)
    assert (wanted[2][others] == 0).all() and (wanted[2][touched].abs().sum(1) > 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_negatives_loss_and_gradient_are_zero(backend, reduction):
    query, positive, corpus, ids = leaf(6, 4), leaf(6, 4), leaf(5, 4), torch.full((6,), 7)
    nothing = Pairs(differ=(ids, ids[:5]))
    for given_corpus, choice in (
        (leaf(0, 4), {"k": 3, "in_batch": False}),
        (corpus, {"k": 3, "pairs": nothing, "in_batch": False}),
        (corpus, {"k": 3, "pairs": nothing, "labels": ids}),
        (corpus, {"indices": torch.full((6, 2), -1), "in_batch": False}),
        (corpus, {"indices": torch.full((6, 2), -1), "labels": ids}),
        (corpus, {"indices": torch.empty(6, 0, dtype=torch.int64), "labels": ids}),
    ):
        value = mined_info_nce(
            query, positive, given_corpus, reduction=reduction, backend=backend, normalize=False, **choice
        )
        assert torch.equal(value, torch.zeros_like(value))
        for gradient in torch.autograd.grad(value.sum(), [query, positive, given_corpus]):
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_padding_and_repeated_rows(backend):
    """-1 is nobody, wherever it stands; a row that is listed twice is one negative."""
    query, positive, corpus = leaf(3, 4), leaf(3, 4), leaf(5, 4)
    padded = torch.tensor([[-1, 2, -1, 4], [0, -1, -1, -1], [3, 3, 1, -1]])
    again = torch.zeros_like(padded, dtype=torch.bool)
    again[2, 1] = True
    scale = torch.tensor(1.5, dtype=DOUBLE, requires_grad=True)
    for in_batch in (False, True):
        value = mined_info_nce(
            query,
            positive,
            corpus,
            indices=padded,
            scale=scale,
            in_batch=in_batch,
            reduction="none",
            backend=backend,
            normalize=False,
        )
        rows = dense(query, positive, corpus, padded.masked_fill(again, -1), scale, None, in_batch)
        check(value, rows, [query, positive, corpus, scale])


def test_ids_keep_duplicates_of_the_batch_apart(backend):
    """Two queries of one document: neither is pushed from the other's copy of it."""
    document, ids = leaf(1, 4), torch.tensor([5, 5, 8, -1, -1])
    query, positive = leaf(5, 4), torch.cat([document, document, leaf(3, 4)])
    options = {"indices": torch.zeros(5, 1, dtype=torch.int64), "reduction": "none", "backend": backend}
    corpus = leaf(2, 4)
    apart = mined_info_nce(query, positive, corpus, labels=ids, **options)
    together = mined_info_nce(query, positive, corpus, **options)
    assert (apart[:2] < together[:2]).all()
    torch.testing.assert_close(apart[2:], together[2:])


def test_a_query_is_not_pushed_from_its_own_document(backend):
    """The corpus holds the positives: without a rule the hardest row of a query is its own document."""
    corpus = F.normalize(torch.randn(40, 8, dtype=DOUBLE), dim=1)
    own = torch.arange(10) * 3
    query = F.normalize(corpus[own] + 0.1 * torch.randn(10, 8, dtype=DOUBLE), dim=1).requires_grad_()
    options = {"in_batch": False, "reduction": "none", "scale": 20.0, "backend": backend}
    fooled = mined_info_nce(query, corpus[own], corpus, 4, normalize=False, **options)
    assert (fooled >= torch.tensor(2.0).log()).all()
    for rule in ({"exclude": (torch.arange(11), own)}, {"differ": (own, torch.arange(40))}):
        rows = mined_info_nce(query, corpus[own], corpus, 4, pairs=Pairs(**rule), normalize=False, **options)
        keep = own[:, None] != torch.arange(40)
        check(rows, dense(query, corpus[own], corpus, hardest(query, corpus, 4, keep), 20.0, in_batch=False), [query])


def test_class_weights_enter_the_logits(backend):
    query, positive, corpus = leaf(5, 4), leaf(5, 4), leaf(8, 4)
    table, rows, cols = torch.randn(3, 3, dtype=DOUBLE), torch.arange(5) % 3, torch.arange(8) % 4 - 1
    pairs = Pairs(log_weight=(table, rows, cols))
    value = mined_info_nce(
        query,
        positive,
        corpus,
        8,
        pairs=pairs,
        scale=2.0,
        in_batch=False,
        reduction="none",
        backend=backend,
        normalize=False,
    )
    extra = table[rows[:, None], cols.clamp_min(0)].masked_fill(cols < 0, 0.0)
    lse = (2.0 * query @ corpus.T + extra).logsumexp(1)
    check(value, F.softplus(lse - 2.0 * (query * positive).sum(1)), [query, positive, corpus])


def test_a_row_with_nan_is_never_mined(backend):
    query, positive, corpus = leaf(5, 4), leaf(5, 4), torch.randn(9, 4, dtype=DOUBLE)
    corpus[2] = torch.nan
    expected = mined_info_nce(query, positive, corpus[torch.arange(9) != 2], 9, backend=backend, normalize=False)
    check(mined_info_nce(query, positive, corpus, 9, backend=backend, normalize=False), expected, [query, positive])


@pytest.mark.parametrize("in_batch", [False, True])
def test_memory_bank_as_corpus(backend, in_batch):
    bank = MemoryBank(12, 4, dtype=DOUBLE)
    for step in range(3):
        bank.enqueue(torch.randn(5, 4), ids=torch.arange(5) + 3 * step)
    query, positive, ids = leaf(6, 4), leaf(6, 4), torch.arange(6) + 4
    entries = bank.entries()
    pairs = Pairs(differ=(ids, entries.ids))
    value = mined_info_nce(
        query,
        positive,
        entries.rows,
        3,
        pairs=pairs,
        in_batch=in_batch,
        reduction="none",
        backend=backend,
        normalize=False,
    )
    listed = hardest(query, entries.rows, 3, ids[:, None] != entries.ids)
    check(value, dense(query, positive, entries.rows, listed, 1 / 0.07, in_batch=in_batch), [query, positive])
    assert torch.equal(bank.topk(query, 3, ids=ids, metric="dot", backend=backend).indices, listed)


def test_rows_that_were_overwritten_before_backward_are_an_error(backend):
    """Entries are views: gradients of rows that are gone would be wrong without a word."""
    bank, query, positive = MemoryBank(6, 4), torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
    bank.enqueue(torch.randn(6, 4))
    value = mined_info_nce(query, positive, bank.entries().rows, 2, backend=backend, normalize=False)
    bank.enqueue(positive)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend, reduction, in_batch):
    keep = torch.rand(3, 5) < 0.7

    def function(query, positive, corpus, scale):
        options = {"in_batch": in_batch, "reduction": reduction, "backend": backend}
        return mined_info_nce(
            query, positive, corpus, 2, pairs=Pairs(exclude=lists_of(keep)), scale=scale, normalize=False, **options
        )

    leaves = (leaf(3, 2), leaf(3, 2), leaf(5, 2), (torch.rand(3, dtype=DOUBLE) + 1).requires_grad_())
    check_derivatives(function, leaves)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    x = torch.randn(5, 16).to(dtype).to(DOUBLE if dtype == DOUBLE else torch.float32).requires_grad_()
    y = torch.randn(7, 16).to(dtype).requires_grad_()
    scale, spec = torch.rand(5, dtype=x.dtype, requires_grad=True), [1, 0, 1, 0, 0, 0, 0]
    indices = torch.tensor([[0, 3], [6, -1], [2, 2], [-1, -1], [5, 1]])
    torch.library.opcheck(torch.ops.contrastive_ops.listed_logits, (x, y, scale, [], spec, indices, backend))


@pairwise(
    dtype=[torch.bfloat16, torch.float16], level=[0.3, 0.01, 0.001], in_batch=[False, True], reduction=["mean", "none"]
)
def test_gradient_error_in_three_regimes(backend, dtype, level, in_batch, reduction):
    """Mined rows are the positive's neighbours and nearly cancel it: gradients must meet before they are rounded."""
    query, positive = (t.requires_grad_() for t in clustered_pairs(256, 64, level, dtype=dtype))
    corpus = positive.detach().roll(1, 0).requires_grad_()
    pairs = Pairs(differ=(torch.arange(256), (torch.arange(256) - 1) % 256))
    listed = similarity_topk(query, corpus, 7, pairs=pairs).indices
    exact = [t.detach().double().requires_grad_() for t in (query, positive, corpus)]
    truth = dense(*exact, listed, 50.0, in_batch=in_batch).mean()
    options = {"pairs": pairs, "scale": 50.0, "in_batch": in_batch, "reduction": reduction, "backend": backend}
    value = mined_info_nce(query, positive, corpus, 7, normalize=False, **options).mean()
    assert relative_error(value, truth) <= 1e-3
    gradients = (torch.autograd.grad(v, each) for v, each in ((value, [query, positive, corpus]), (truth, exact)))
    for got, expected in zip(*gradients, strict=True):
        assert got.dtype == dtype and relative_error(got, expected) <= GRADIENT_ERROR_16_BIT


def test_rows_are_exact_and_never_negative_near_convergence(backend):
    query, positive = clustered_pairs(200, 64, 0.001, dtype=torch.float32, scale=100.0)
    corpus = torch.cat([positive, -positive])
    pairs = Pairs(exclude=(torch.arange(201), torch.arange(200)))
    listed = hardest(query, corpus, 7, torch.arange(200)[:, None] != torch.arange(400))
    for in_batch in (False, True):
        options = {"pairs": pairs, "scale": 100.0, "in_batch": in_batch, "reduction": "none", "backend": backend}
        rows = mined_info_nce(query, positive, corpus, 7, normalize=False, **options)
        truth = dense(query.double(), positive.double(), corpus.double(), listed, 100.0, in_batch=in_batch)
        assert (rows >= 0).all() and truth.max() < 0.1
        torch.testing.assert_close(rows.double(), truth, rtol=1e-3, atol=1e-9)


X, C, IDS, LISTS = torch.randn(4, 3), torch.randn(6, 3), torch.arange(4), torch.zeros(4, 2, dtype=torch.int64)
BAD = [
    (
        lambda: mined_info_nce(X, C, C, 2),
        ValueError,
        "positive must have the same shape as query, got query (4, 3) and positive (6, 3)",
    ),
    (
        lambda: mined_info_nce(X, X, torch.randn(6, 2), 2),
        ValueError,
        "corpus must have the same last dimension as query, got query (4, 3) and corpus (6, 2)",
    ),
    (
        lambda: mined_info_nce(X, X, C.bfloat16(), 2),
        TypeError,
        "corpus must have the same dtype as query, got query torch.float32 and corpus torch.bfloat16",
    ),
    (lambda: mined_info_nce(X, X, C), ValueError, "k and indices must not both be None: k mines"),
    (lambda: mined_info_nce(X, X, C, 2, indices=LISTS), ValueError, "k and indices must not both be given: k mines"),
    (lambda: mined_info_nce(X, X, C, 0), ValueError, "k must be at least 1, got 0"),
    (lambda: mined_info_nce(X, X, C, 2.0), TypeError, "k must be an int, got float"),
    (lambda: mined_info_nce(X, X, C, 2, pairs={}), TypeError, "pairs must be Pairs or None, got dict"),
    (
        lambda: mined_info_nce(X, X, C, 2, pairs=Pairs(differ=(IDS, IDS))),
        ValueError,
        "pairs.differ of the columns must have shape (6,), got (4,)",
    ),
    (lambda: mined_info_nce(X, X, C, 2, pairs=Pairs(fill=0.0)), ValueError, "pairs.fill must be None, got 0.0"),
    (
        lambda: mined_info_nce(X, X, C, indices=LISTS, pairs=Pairs(below=0.5)),
        ValueError,
        "pairs must be None where indices are given, got Pairs\n  rules decide what is mined; write -1",
    ),
    (lambda: mined_info_nce(X, X, C, indices=[[1]]), TypeError, "indices must be a tensor, got list"),
    (lambda: mined_info_nce(X, X, C, indices=LISTS.float()), TypeError, "indices must be int64, got torch.float32"),
    (lambda: mined_info_nce(X, X, C, indices=LISTS[:3]), ValueError, "indices must have shape (4, P), got (3, 2)"),
    (lambda: mined_info_nce(X, X, C, indices=LISTS[0]), ValueError, "indices must have shape (4, P), got (2,)"),
    (lambda: mined_info_nce(X, X, C, indices=LISTS + 6), ValueError, "indices must be in [-1, 6), got 6"),
    (lambda: mined_info_nce(X, X, C, indices=LISTS - 2), ValueError, "indices must be in [-1, 6), got -2"),
    (lambda: mined_info_nce(X, X, C, 2, labels=IDS[:3]), ValueError, "labels must have shape (4,), got (3,)"),
    (
        lambda: mined_info_nce(X, X, C, 2, labels=IDS, in_batch=False),
        ValueError,
        "labels must be None where in_batch is False, got labels of the batch\n  use pairs=Pairs(differ=",
    ),
    (lambda: mined_info_nce(X, X, C, 2, temperature=0.0), ValueError, "temperature must be in (0, inf], got 0.0"),
    (
        lambda: mined_info_nce(X, X, C, 2, scale=torch.ones(3)),
        ValueError,
        "scale must be one number or have shape (4,), got (3,)",
    ),
    (lambda: mined_info_nce(X, X, C, 2, weight=-torch.ones(4)), ValueError, "weight must not be negative, got -1.0"),
    (
        lambda: mined_info_nce(X, X, C, 2, backend="gpu"),
        ValueError,
        "backend must be one of 'auto', 'reference', 'cpu', 'triton', 'cuda', 'hopper', got 'gpu'",
    ),
]


@pytest.mark.parametrize("call,error,message", BAD, ids=[m[:50] for *_, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(f"mined_info_nce: {message}")):
        call()
