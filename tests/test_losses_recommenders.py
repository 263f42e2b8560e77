"""What recommenders train with: drawn negatives and their logQ, padded lists, margins of rows, sparse gradients."""

import itertools
import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import Pairs, info_nce
from contrastive_ops.losses import UnigramSampler, mined_info_nce, negative_sampling, triplet
from contrastive_ops.testing.compare import check, check_derivatives, leaf, number, reduced

DOUBLE = torch.float64
N, D, K = 6, 5, 3


# ---- A row's own negatives, of which there may be fewer --------------------------------------------------------------


def dense(query, key, shared, own, keep, *, scale, bias=None, own_bias=0.0, margin=0.0, hardness=0.0, in_batch=True):
    """(N, M + K + K') logits of every column, -inf for what takes no part."""
    x, y, h, o = (F.normalize(each, dim=-1) for each in (query, key, shared, own))
    similarity = torch.cat([x @ y.T, x @ h.T, torch.einsum("nd,nkd->nk", x, o)], 1)
    target = F.one_hot(torch.arange(len(x)), similarity.shape[1])
    logits = scale * (similarity - margin * target) + hardness * similarity.detach() * (1 - target)
    logits = logits + torch.cat(
        [torch.zeros(len(y) + len(h), dtype=DOUBLE).expand(len(x), -1), own_bias + 0 * o[..., 0]], 1
    )
    if bias is not None:
        logits = logits + F.pad(bias, (0, o.shape[1]))
    drop = torch.zeros_like(logits, dtype=torch.bool)
    drop[:, len(y) + len(h) :] = ~keep
    if not in_batch:
        drop[:, : len(y)] = ~torch.eye(len(x), len(y), dtype=torch.bool)
    return logits.masked_fill(drop, -torch.inf), similarity


def smoothed(logits, share, smooth):
    log_p, part = logits.log_softmax(1), logits != -torch.inf
    own = torch.eye(*logits.shape, dtype=torch.bool)
    spread = part if smooth == "all" else part & ~own
    even = torch.where(spread, log_p, 0.0).sum(1) / spread.sum(1)
    return -(1 - share) * log_p.diagonal() - share * even


MASK = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
OPTIONS = [
    {},
    {"hardness": 2.0},
    {"share": 0.3, "smooth": "all"},
    {"share": 0.3, "smooth": "others"},
    {"margin": True},
    {"own_bias": True},
    {"bias": True},
    {"margin": True, "share": 0.2, "smooth": "all", "bias": True, "own_bias": True},
]


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("ruled", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_row_may_have_fewer_negatives_of_its_own(backend, options, ruled, in_batch):
    query, key, shared, own = leaf(N, D), leaf(N, D), leaf(4, D), leaf(N, K, D)
    with torch.no_grad():
        own[~MASK] = torch.nan  # what is not there is not looked at
    margin = torch.rand(N, dtype=DOUBLE, requires_grad=True) if options.get("margin") else None
    own_bias = leaf(N, K) if options.get("own_bias") else None
    bias, scale, weight = leaf(N + 4) if options.get("bias") else None, number(1.3), torch.rand(N, dtype=DOUBLE)
    known = {"scale": scale, "bias": bias, "in_batch": in_batch, "hardness": options.get("hardness", 0.0)}
    known |= {} if margin is None else {"margin": margin[:, None]}
    known |= {} if own_bias is None else {"own_bias": own_bias}
    there = own.masked_fill(~MASK[..., None], 0.0)
    logits, similarity = dense(query, key, shared, there, MASK, **known)
    losses = smoothed(logits, options.get("share", 0.0), options.get("smooth", "all"))
    given = {"row_negatives": own, "row_negative_mask": MASK, "scale": scale, "weight": weight, "backend": backend}
    given |= {"in_batch": in_batch, "col_bias": bias, "hardness": options.get("hardness", 0.0)}
    given |= {} if margin is None else {"margin": margin}
    given |= {} if own_bias is None else {"row_negative_bias": own_bias}
    given |= {"label_smoothing": options["share"], "smooth": options["smooth"]} if "share" in options else {}
    if ruled:  # rules that drop nothing, but take another way
        given |= {"negative_pairs": Pairs(below=9.0)} | ({"pairs": Pairs(below=9.0)} if in_batch else {})
    leaves = [query, key, shared, own, scale, *(each for each in (margin, own_bias, bias) if each is not None)]
    check(info_nce(query, key, shared, **given), reduced(losses, "mean", weight), leaves)
    _, found = info_nce(query, key, shared, diagnostics=True, **given)
    others = (logits != -torch.inf) & ~torch.eye(*logits.shape, dtype=torch.bool)
    assert torch.equal(found.rank, ((similarity >= similarity.diagonal()[:, None]) & others).sum(1) + 1)
    torch.testing.assert_close(found.negative_similarity, similarity[others].mean())


def test_a_mask_of_one_negative_each_and_rows_without_any(backend):
    query, key, own = leaf(N, D), leaf(N, D), leaf(N, D)
    keep = torch.tensor([True, False, True, True, False, True])
    losses = info_nce(
        query,
        key,
        row_negatives=own,
        row_negative_mask=keep,
        in_batch=False,
        scale=2.0,
        reduction="none",
        backend=backend,
    )
    x, y, o = (F.normalize(each) for each in (query, key, own))
    truth = F.softplus(2 * ((x * o).sum(1) - (x * y).sum(1))) * keep
    check(losses, truth, [query, key, own])


def test_derivatives_of_margins_and_masks(backend):
    query, key, own, margin = leaf(4, 3), leaf(4, 3), leaf(4, 2, 3), torch.rand(4, dtype=DOUBLE, requires_grad=True)
    keep = torch.tensor([[True, False], [False, False], [True, True], [False, True]])
    check_derivatives(
        lambda *leaves: info_nce(
            *leaves[:2], row_negatives=leaves[2], row_negative_mask=keep, margin=leaves[3], scale=2.0, backend=backend
        ),
        (query, key, own, margin),
    )


# ---- Margins of rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hardest", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "cosine", "dot"])
def test_triplets_with_a_margin_each(distance, hardest):
    anchor, positive, negative = leaf(N, D), leaf(N, D), leaf(N, K, D)
    margin, weight = (2 * torch.rand(N, dtype=DOUBLE)).requires_grad_(), torch.rand(N, dtype=DOUBLE)
    rows = []
    for i in range(N):
        a, p = anchor[i], positive[i]
        far = {
            "euclidean": lambda b, a=a: (a - b + 1e-6).norm(),
            "cosine": lambda b, a=a: 1 - F.cosine_similarity(a, b, dim=0),
            "dot": lambda b, a=a: -(a * b).sum(),
        }[distance]
        hinges = torch.stack([F.relu(far(p) - far(n) + margin[i]) for n in negative[i]])
        rows.append(hinges.max() if hardest else hinges.sum())
    given = {"margin": margin, "distance": distance, "hardest": hardest, "weight": weight}
    value = triplet(anchor, positive, negative, **given)
    check(value, reduced(torch.stack(rows), "mean", weight), [anchor, positive, negative, margin])


def test_a_row_of_weight_0_may_have_any_margin():
    weight, margin = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.1, torch.nan, 0.2])
    x, y = torch.randn(2, 3, 4)
    for loss in (info_nce(x, y, margin=margin, weight=weight), triplet(x, y, y.flip(0), margin=margin, weight=weight)):
        assert loss.isfinite()


# ---- Items that were drawn -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("form", ["of all", "as listed"])
def test_sampled_softmax(backend, form, in_batch):
    users, items, corpus = leaf(N, D), leaf(N, D), leaf(11, D)
    lists = torch.stack([torch.randperm(11)[:4] for _ in range(N)])
    lists[1, 2:], lists[3] = -1, -1
    expected = leaf(11) if form == "of all" else leaf(N, 4)
    bias, scale, weight = leaf(N), number(1.5), torch.rand(N, dtype=DOUBLE)
    x, y, c = (F.normalize(each) for each in (users, items, corpus))
    listed = torch.einsum("nd,npd->np", x, c[lists.clamp_min(0)]) * scale
    listed = listed - (expected[lists.clamp_min(0)] if form == "of all" else expected)
    own = scale * (x * y).sum(1, keepdim=True) + bias[:, None]
    logits = [own, listed.masked_fill(lists < 0, -torch.inf)]
    if in_batch:
        logits.append((scale * x @ y.T + bias).masked_fill(torch.eye(N, dtype=torch.bool), -torch.inf))
    logits = torch.cat(logits, 1)
    truth = F.cross_entropy(logits, torch.zeros(N, dtype=torch.int64), reduction="none")
    given = {"indices": lists, "log_expected": expected, "col_bias": bias, "scale": scale, "weight": weight}
    value = mined_info_nce(users, items, corpus, in_batch=in_batch, backend=backend, **given)
    check(value, reduced(truth, "mean", weight), [users, items, corpus, expected, bias, scale])


def test_a_bias_of_positives_with_mined_rows(backend):
    users, items, corpus, bias = leaf(N, D), leaf(N, D), leaf(9, D), leaf(N)
    mined = (F.normalize(users) @ F.normalize(corpus).T).topk(3).indices
    given = {"col_bias": bias, "backend": backend}
    value = mined_info_nce(users, items, corpus, 3, **given)
    check(value, mined_info_nce(users, items, corpus, indices=mined, **given), [users, items, corpus, bias])


def test_sampled_softmax_estimates_the_softmax_over_all_items():
    """The sum of exp(logit) over what was drawn, so corrected, has no bias: its mean is that over all items."""
    torch.manual_seed(0)
    sampler = UnigramSampler(torch.tensor([9.0, 4.0, 1.0, 0.5, 3.0]))
    logits = torch.randn(5, dtype=DOUBLE)
    avoid = torch.full((20_000,), 2)
    drawn = sampler(avoid, 3)
    corrected = logits[drawn] - sampler.log_expected(3, drawn, avoid=avoid)
    estimate = corrected.exp().sum(1)
    truth = logits.exp().sum() - logits[2].exp()
    assert abs(estimate.mean() - truth) < 5 * estimate.std() / 20_000**0.5


# ---- What is drawn ---------------------------------------------------------------------------------------------------

COUNTS = torch.tensor([50.0, 0.0, 200.0, 8.0, 1.0, 30.0, 0.0])


def shares(counts, power):
    return torch.where(counts > 0, counts.double() ** power, 0.0)


@pytest.mark.parametrize("power", [-1.0, -0.5, 0.75])
def test_more_than_one_word_is_avoided(power):
    sampler = UnigramSampler(COUNTS, power)
    avoid = torch.tensor([[-1, -1, -1], [2, -1, 0], [2, 2, 3], [0, 5, 4], [4, 5, 6], [1, -1, 6], [3, 4, 5]])
    drawn = sampler(avoid, 40_000, generator=torch.Generator().manual_seed(0))
    for row, words in enumerate(avoid.tolist()):
        own = shares(COUNTS, power)
        own[[word for word in words if word >= 0]] = 0
        expected = own / own.sum()
        found = torch.bincount(drawn[row], minlength=7).double() / drawn.shape[1]
        assert not found[expected == 0].any()
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / drawn.shape[1]).sqrt()).all()


def test_one_word_to_avoid_is_a_list_of_one():
    sampler, avoid = UnigramSampler(COUNTS), torch.tensor([0, -1, 2, 6])
    one, other, padded = (
        sampler(each, 50, generator=torch.Generator().manual_seed(3))
        for each in (avoid, avoid[:, None], F.pad(avoid[:, None], (2, 1), value=-1))
    )
    assert torch.equal(one, other) and torch.equal(one, padded)
    nothing = sampler(avoid[:, None][:, :0], 50, generator=torch.Generator().manual_seed(3))
    assert torch.equal(nothing, sampler(torch.full((4,), -1), 50, generator=torch.Generator().manual_seed(3)))


def test_where_every_word_is_avoided_all_are_drawn():
    sampler = UnigramSampler(COUNTS)
    everything = torch.tensor([[0, 2, 3, 4, 5]])
    drawn = sampler(everything, 2000)
    assert set(drawn.flatten().tolist()) == {0, 2, 3, 4, 5}
    expected = sampler.log_expected(4, torch.tensor([[0, 2]]), avoid=everything)
    torch.testing.assert_close(expected, sampler.log_expected(4)[[0, 2]][None])


def test_every_set_of_words_is_avoided_to_the_last_bit(monkeypatch):
    """At the ends of what is left, and next to each stretch, where rounding could lead into one."""
    counts = torch.tensor([1.0, 3.0, 0.0, 7.0, 1e-3, 2.0])
    sampler = UnigramSampler(counts, 1.0)
    words = [word for word in range(6) if counts[word] > 0]
    for size in range(1, 5):
        for avoid in itertools.permutations(range(6), size):
            left = [word for word in words if word not in avoid]
            if not left:
                continue
            share = shares(counts, 1.0)[left]
            ends = (share.cumsum(0) / share.sum())[:-1].tolist()
            points = [0.0, 1 - 2**-53, *ends, *(end - 2**-53 for end in ends), *(end + 2**-53 for end in ends)]
            given = torch.tensor([points], dtype=DOUBLE)
            monkeypatch.setattr(torch, "rand", lambda shape, given=given, **_: given)
            drawn = sampler(torch.tensor([avoid]), len(points))[0].tolist()
            assert set(drawn) <= set(left), avoid
            assert drawn[:2] == [left[0], left[-1]], avoid


def test_powers_of_any_size():
    for power, word in ((400.0, 2), (-400.0, 4)):
        assert (UnigramSampler(COUNTS, power)(torch.tensor([-1]), 100) == word).all()


@pytest.mark.parametrize("unique", [False, True])
def test_log_expected(unique):
    sampler, k = UnigramSampler(COUNTS, 0.5), 6
    share = shares(COUNTS, 0.5) / shares(COUNTS, 0.5).sum()
    truth = (1 - (1 - share) ** k if unique else k * share).log()
    torch.testing.assert_close(sampler.log_expected(k, unique=unique), truth)
    words = torch.tensor([[0, 3, -1], [2, 1, 5]])
    found = sampler.log_expected(k, words, unique=unique)
    torch.testing.assert_close(found, truth[words.clamp_min(0)].masked_fill(words < 0, -torch.inf))
    avoid = torch.tensor([[3, 2, -1], [5, 5, 0]])
    truth = []
    for i, row in enumerate(words.tolist()):
        left = share.clone()
        left[[word for word in avoid[i].tolist() if word >= 0]] = 0
        left = left / left.sum()
        left = 1 - (1 - left) ** k if unique else k * left
        truth.append([left[word].log().item() if word >= 0 else -torch.inf for word in row])
    torch.testing.assert_close(
        sampler.log_expected(k, words, avoid=avoid, unique=unique), torch.tensor(truth, dtype=DOUBLE)
    )


def test_noise_contrastive_estimation_with_numbers_of_the_sampler(backend):
    sampler = UnigramSampler(torch.arange(1, 12))
    center, table = leaf(4, D), leaf(11, D)
    context, negatives = torch.tensor([3, 1, 0, 7]), torch.tensor([[4, 4, -1], [10, 2, 0], [-1, -1, -1], [5, 6, 7]])
    words = torch.cat([context[:, None], negatives], 1)
    expected = sampler.log_expected(3)
    of_all = lambda: negative_sampling(center, table, context, negatives, log_expected=expected, backend=backend)  # noqa: E731
    listed = expected[words.clamp_min(0)].masked_fill(words < 0, torch.nan)
    as_listed = negative_sampling(center, table, context, negatives, log_expected=listed, backend=backend)
    check(as_listed, of_all(), [center, table])
    logits = torch.einsum("nd,nkd->nk", center, table[words.clamp_min(0)]) - expected[words.clamp_min(0)]
    noise = F.logsigmoid(-logits[:, 1:]).masked_fill(negatives < 0, 0.0)
    check(of_all(), -(F.logsigmoid(logits[:, 0]) + noise.sum(1)).mean(), [center, table])


# ---- Sparse gradients ------------------------------------------------------------------------------------------------

CONTEXT, NEGATIVES = torch.tensor([3, 1, 3]), torch.tensor([[4, 4], [9, -1], [1, 3]])


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.0, 2.0])])
def test_a_sparse_gradient_is_that_of_the_rows_that_are_named(backend, weight):
    center, table = torch.randn(3, D, requires_grad=True), torch.randn(10, D, requires_grad=True)
    given = {"weight": weight, "log_expected": torch.randn(10), "backend": backend}
    dense_loss = negative_sampling(center, table, CONTEXT, NEGATIVES, **given)
    sparse_loss = negative_sampling(center, table, CONTEXT, NEGATIVES, sparse=True, **given)
    assert torch.equal(dense_loss, sparse_loss)
    truth = torch.autograd.grad(dense_loss, (center, table))
    found = torch.autograd.grad(sparse_loss, (center, table))
    assert found[1].is_sparse and found[1].coalesce().indices().shape[1] <= 4
    torch.testing.assert_close(found[0], truth[0])
    torch.testing.assert_close(found[1].to_dense(), truth[1])


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.SGD])
def test_sparse_gradients_train(optimizer):
    """A word's table row follows its context; rows that are never named stay as they were, to the last bit."""
    torch.manual_seed(0)
    center = torch.nn.Embedding(4, 8, sparse=True)
    table = torch.nn.Parameter(0.1 * torch.randn(40, 8))
    before, sampler = table.detach().clone(), UnigramSampler(torch.cat([torch.ones(20), torch.zeros(20)]))
    trained = optimizer([center.weight, table], lr=0.05)
    words, losses = torch.arange(4).repeat(8), []
    for _ in range(60):
        loss = negative_sampling(center(words), table, words, sampler(words, 5), sparse=True)
        trained.zero_grad()
        loss.backward()
        trained.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0] if optimizer is torch.optim.SparseAdam else losses[-1] < losses[0]
    assert torch.equal(table[20:], before[20:]) and not torch.equal(table[:4], before[:4])


def test_sparse_gradients_under_autocast_are_of_the_parameter():
    center, table = torch.randn(3, D, requires_grad=True), torch.randn(10, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        dense_loss = negative_sampling(center, table, CONTEXT, NEGATIVES)
        loss = negative_sampling(center, table, CONTEXT, NEGATIVES, sparse=True)
    assert torch.equal(loss, dense_loss)
    (gradient,) = torch.autograd.grad(loss, table)
    assert gradient.is_sparse and gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.to_dense(), torch.autograd.grad(dense_loss, table)[0])


def test_nothing_is_needed_of_a_table_that_is_not_trained():
    center, table = torch.randn(3, D), torch.randn(10, D)
    with torch.no_grad():
        loss = negative_sampling(center, table, CONTEXT, NEGATIVES, sparse=True)
    assert torch.equal(loss, negative_sampling(center, table, CONTEXT, NEGATIVES))


# ---- Bad input -------------------------------------------------------------------------------------------------------

X, OWN, TABLE = torch.randn(4, 3), torch.randn(4, 2, 3), torch.randn(5, 3, requires_grad=True)
LISTS = torch.tensor([[0, 1], [2, -1], [3, 4], [-1, -1]])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: info_nce(X, X, row_negative_mask=torch.ones(4, dtype=torch.bool)),
            ValueError,
            "info_nce: row_negatives must be given with row_negative_mask, got None",
        ),
        (
            lambda: info_nce(X, X, row_negatives=OWN, row_negative_mask=torch.ones(4, 3, dtype=torch.bool)),
            ValueError,
            "info_nce: row_negative_mask must have shape (4,) or (4, 2), got (4, 3)",
        ),
        (
            lambda: info_nce(X, X, row_negatives=OWN, row_negative_mask=torch.ones(4, 2)),
            TypeError,
            "info_nce: row_negative_mask must be a bool tensor, got torch.float32",
        ),
        (
            lambda: info_nce(X, X, margin=torch.tensor([0.1, -0.1, 0.0, 0.0])),
            ValueError,
            "info_nce: margin must be in [0, inf), got -0.1",
        ),
        (lambda: info_nce(X, X, margin=torch.ones(3)), ValueError, "info_nce: margin must have shape (4,), got (3,)"),
        (lambda: triplet(X, X, OWN, margin=torch.ones(4, 2)), ValueError, "triplet: margin must have shape (4,)"),
        (
            lambda: mined_info_nce(X, X, TABLE, 2, log_expected=torch.zeros(5)),
            ValueError,
            "mined_info_nce: log_expected must be None where k is given",
        ),
        (
            lambda: mined_info_nce(X, X, TABLE, indices=LISTS, log_expected=torch.zeros(4)),
            ValueError,
            "mined_info_nce: log_expected must have shape (5,), got (4,)",
        ),
        (
            lambda: mined_info_nce(X, X, TABLE, indices=LISTS, log_expected=torch.zeros(4, 3)),
            ValueError,
            "mined_info_nce: log_expected must have shape (5,) or, of indices, (4, 2), got (4, 3)",
        ),
        (
            lambda: mined_info_nce(X, X, TABLE, 2, col_bias=torch.zeros(5)),
            ValueError,
            "mined_info_nce: col_bias must have shape (4,), got (5,)",
        ),
        (
            lambda: negative_sampling(X, TABLE, LISTS[:, 0].clamp_min(0), LISTS, log_expected=torch.zeros(4, 2)),
            ValueError,
            "log_expected must have shape (5,) or, of context and negatives, (4, 3), got (4, 2)",
        ),
        (
            lambda: negative_sampling(X, 2 * TABLE, LISTS[:, 0].clamp_min(0), LISTS, sparse=True),
            ValueError,
            "negative_sampling: table must be a leaf that requires a gradient with sparse=True, got one that other",
        ),
        (
            lambda: negative_sampling(X, TABLE.detach(), LISTS[:, 0].clamp_min(0), LISTS, sparse=True),
            ValueError,
            "negative_sampling: table must be a leaf that requires a gradient with sparse=True, got one that does not",
        ),
        (
            lambda: UnigramSampler(COUNTS)(LISTS[None], 2),
            ValueError,
            "UnigramSampler: avoid must have shape (N,) or (N, A), got (1, 4, 2)",
        ),
        (lambda: UnigramSampler(COUNTS)(LISTS - 1, 2), ValueError, "UnigramSampler: avoid must be in [-1, 7), got -2"),
        (
            lambda: UnigramSampler(COUNTS).log_expected(3, avoid=LISTS),
            ValueError,
            "UnigramSampler.log_expected: words must be given with avoid, got None",
        ),
        (
            lambda: UnigramSampler(COUNTS).log_expected(3, LISTS, avoid=LISTS[:2]),
            ValueError,
            "UnigramSampler.log_expected: avoid must have 4 rows as words, got (2, 2)",
        ),
        (
            lambda: UnigramSampler(COUNTS).log_expected(3, LISTS[0]),
            ValueError,
            "UnigramSampler.log_expected: words must have shape (N, P), got (2,)",
        ),
        (lambda: UnigramSampler(COUNTS, torch.nan), ValueError, "UnigramSampler: power must be in (-inf, inf)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
