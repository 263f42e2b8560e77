"""late_interaction against dense formulas: PyLate's Contrastive loss, negatives, retrieved tokens, empty documents."""

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import nn
from contrastive_ops.losses import late_interaction
from contrastive_ops.ops import TokenSets
from contrastive_ops.testing import saved_bytes
from contrastive_ops.testing.compare import check, check_derivatives, leaf, number, reduced

INF = float("inf")


def mask_of(*shape):
    """At least one token of each document."""
    mask = torch.rand(*shape) < 0.6
    mask[..., 0] = True
    return mask


def scores_of(queries, documents, mask=None, query_mask=None, reduce="sum"):
    """(N, M): the token-by-token tensor and all."""
    similarity = torch.einsum("nad,mbd->nmab", queries, documents)
    if mask is not None:
        similarity = similarity.masked_fill(~mask[None, :, None], -INF)
    best = similarity.amax(3)
    part = torch.ones(queries.shape[:2], dtype=torch.bool) if query_mask is None else query_mask
    total = torch.where(part[:, None], best, 0.0).sum(2)
    return total if reduce == "sum" else total / part.sum(1, keepdim=True)


def cross_entropy(logits, target):
    return F.cross_entropy(logits, target, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_contrastive_loss_of_pylate(reduction, backend):
    """Groups of documents, the first of them positives; all groups are candidates of all queries."""
    queries, positives, negatives = leaf(5, 4, 8), leaf(5, 6, 8), leaf(5, 7, 8)
    mask, negative_mask = mask_of(5, 6), mask_of(5, 7)
    temperature = number(0.7)
    groups = [scores_of(queries, positives, mask), scores_of(queries, negatives, negative_mask)]
    truth = reduced(cross_entropy(torch.cat(groups, 1) / temperature, torch.arange(5)), reduction)
    value = late_interaction(
        queries,
        TokenSets(positives, mask),
        TokenSets(negatives, negative_mask),
        temperature=temperature,
        reduction=reduction,
        backend=backend,
        normalize=False,
    )
    check(value, truth, [queries, positives, negatives, temperature])


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_everything_at_once(reduce, reduction, backend):
    queries, documents, negatives, own = leaf(5, 4, 8), leaf(7, 6, 8), leaf(3, 2, 8), leaf(5, 2, 7, 8)
    query_mask, mask, own_mask = mask_of(5, 4), mask_of(7, 6), mask_of(5, 2, 7)
    scale, weight, target = (2 + torch.rand(5).double()).requires_grad_(), leaf(5), torch.tensor([6, 0, 2, 2, 5])
    weight = weight.detach().abs().requires_grad_()
    units = [F.normalize(t, dim=-1) for t in (queries, documents, negatives, own)]
    of_own = torch.cat(
        [scores_of(units[0][i : i + 1], units[3][i], own_mask[i], query_mask[i : i + 1], reduce) for i in range(5)]
    )
    logits = torch.cat(
        [
            scores_of(units[0], units[1], mask, query_mask, reduce),
            scores_of(units[0], units[2], None, query_mask, reduce),
            of_own,
        ],
        1,
    )
    truth = reduced(cross_entropy(scale[:, None] * logits, target), reduction, weight)
    value = late_interaction(
        TokenSets(queries, query_mask),
        TokenSets(documents, mask),
        negatives,
        row_negatives=TokenSets(own, own_mask),
        target=target,
        scale=scale,
        weight=weight,
        reduce=reduce,
        reduction=reduction,
        normalize=True,
        backend=backend,
    )
    check(value, truth, [queries, documents, negatives, own, scale, weight])


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_symmetric_scores(reduce, backend):
    queries, documents, negatives, mask = leaf(4, 3, 8), leaf(4, 5, 8), leaf(2, 6, 8), mask_of(4, 5)
    query_mask, parts = mask_of(4, 3), []
    for each, there in ((documents, mask), (negatives, torch.ones(2, 6, dtype=torch.bool))):
        one = scores_of(queries, each, there, query_mask, reduce)
        parts.append((one + scores_of(each, queries, query_mask, there, reduce).T) / 2)
    truth = cross_entropy(torch.cat(parts, 1) / 0.3, torch.arange(4)).mean()
    sets = TokenSets(queries, query_mask), TokenSets(documents, mask), negatives
    options = {"reduce": reduce, "symmetric": True, "temperature": 0.3, "normalize": False}
    check(late_interaction(*sets, backend=backend, **options), truth, [queries, documents, negatives])
    with pytest.raises(ValueError, match="row_negatives and retrieved must be None with symmetric"):
        late_interaction(*sets, retrieved=2, **options)


def test_one_negative_of_each_query_needs_no_list(backend):
    queries, documents, own = torch.randn(4, 3, 8), torch.randn(4, 5, 8), torch.randn(4, 6, 8)
    value = late_interaction(queries, documents, row_negatives=own, backend=backend, normalize=False)
    torch.testing.assert_close(
        value, late_interaction(queries, documents, row_negatives=own[:, None], backend=backend, normalize=False)
    )


@pytest.mark.parametrize("retrieved", [1, 4, 100])
def test_retrieved_tokens_alone(retrieved, backend):
    """XTR: the tokens that are among the best of the batch, negatives included, and their mean."""
    queries, documents, negatives = leaf(4, 3, 8), leaf(4, 5, 8), leaf(2, 6, 8)
    mask = mask_of(4, 5)
    tokens = torch.cat([documents.flatten(0, 1), negatives.flatten(0, 1)])
    owner = torch.cat([torch.arange(4).repeat_interleave(5), 4 + torch.arange(2).repeat_interleave(6)])
    takes_part = torch.cat([mask.flatten(), torch.ones(12, dtype=torch.bool)])
    similarity = (queries @ tokens.T).masked_fill(~takes_part, -INF)
    least = similarity.topk(min(retrieved, int(takes_part.sum())), dim=2).values[..., -1:]
    kept = similarity.masked_fill(similarity < least, -INF)
    best = torch.stack([kept[..., owner == m].amax(2) for m in range(6)], 1)
    hit = best > -INF
    logits = torch.where(hit, best, 0.0).sum(2) / hit.sum(2).clamp_min(1)
    truth = cross_entropy(3.0 * logits, torch.arange(4)).mean()
    value = late_interaction(
        queries,
        TokenSets(documents, mask),
        negatives,
        retrieved=retrieved,
        reduce="mean",
        scale=3.0,
        backend=backend,
        normalize=False,
    )
    check(value, truth, [queries, documents, negatives])


def test_packed_sets_give_the_same_loss(backend):
    queries, documents = torch.randn(4, 3, 8), torch.randn(5, 6, 8)
    mask = mask_of(5, 6)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    packed = TokenSets(documents[mask], offsets=offsets)
    for retrieved in (None, 4):
        options = {"retrieved": retrieved, "backend": backend}
        value = late_interaction(queries, packed, packed, normalize=False, **options)
        padded = TokenSets(documents, mask)
        torch.testing.assert_close(value, late_interaction(queries, padded, padded, normalize=False, **options))


def test_a_query_without_negatives_has_no_loss(backend):
    queries, documents = leaf(1, 3, 8), leaf(1, 4, 8)
    value = late_interaction(queries, documents, backend=backend, normalize=False)
    assert value == 0 and all((g == 0).all() for g in torch.autograd.grad(value, [queries, documents]))


@pytest.mark.parametrize("retrieved", [None, 3])
def test_a_negative_without_tokens_takes_no_part(retrieved, backend):
    queries, documents, scale = leaf(3, 2, 8), leaf(4, 5, 8), number(2.0)
    mask = mask_of(4, 5)
    mask[3] = False
    options = {"scale": scale, "retrieved": retrieved, "backend": backend}
    value = late_interaction(queries, TokenSets(documents, mask), normalize=False, **options)
    truth = late_interaction(queries, TokenSets(documents[:3], mask[:3]), normalize=False, **options)
    check(value, truth, [queries, documents, scale])


def test_a_positive_without_tokens_is_found_nowhere(backend):
    queries, documents = leaf(3, 2, 8), leaf(3, 5, 8)
    mask = mask_of(3, 5)
    mask[1] = False
    rows = late_interaction(queries, TokenSets(documents, mask), reduction="none", backend=backend, normalize=False)
    assert rows[1] == INF and rows[[0, 2]].isfinite().all()
    found = torch.autograd.grad(rows[0] + rows[2], [queries, documents])
    assert all(gradient.isfinite().all() for gradient in found)


def test_a_positive_without_tokens_is_found_nowhere_among_others_without_tokens(backend):
    """Infinite, as for any negatives; other rows do not see it."""
    q, d = torch.randn(3, 2, 4, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
    nothing = torch.zeros(3, 2, dtype=torch.bool)
    found = late_interaction(q, TokenSets(d, nothing), reduction="none", backend=backend)
    assert (found == INF).all()
    some = torch.tensor([[False] * 2, [True] * 2, [False] * 2])
    found = late_interaction(q, TokenSets(d, some), reduction="none", backend=backend)
    assert found.tolist() == [INF, 0.0, INF]
    dq, dd = torch.autograd.grad(found[1], (q, d))
    assert dq.isfinite().all() and dd.isfinite().all()


def test_gradcheck_and_gradgradcheck(backend):
    queries, documents, own = leaf(3, 2, 4), leaf(3, 3, 4), leaf(3, 2, 2, 4)

    def function(queries, documents, own):
        return late_interaction(queries, documents, row_negatives=own, reduce="mean", backend=backend, normalize=False)

    check_derivatives(function, (queries, documents, own))


def test_kept_are_tokens_winners_and_scores(backend):
    queries, documents = torch.randn(40, 16, 32, requires_grad=True), torch.randn(60, 90, 32, requires_grad=True)
    size, _ = saved_bytes(lambda: late_interaction(queries, documents, backend=backend, normalize=False))
    tokens, winners, scores = queries.nbytes + documents.nbytes, 4 * 40 * 16 * 60, 4 * 40 * 61
    assert tokens + winners <= size <= tokens + winners + 16 * scores < 4 * 40 * 60 * 16 * 90 / 4


def test_the_module_has_the_temperature_of_pylate():
    queries, documents = torch.randn(4, 3, 8), torch.randn(4, 5, 8)
    torch.testing.assert_close(nn.LateInteractionLoss()(queries, documents), late_interaction(queries, documents))
    assert nn.LateInteractionLoss(0.5).scale() == 2.0


Q, D = torch.randn(2, 3, 4), torch.randn(5, 6, 4)
BAD = [
    (lambda: late_interaction(D, Q), ValueError, "documents must be at least as many as queries where target is not"),
    (lambda: late_interaction(Q, D, target=torch.tensor([0, 5])), ValueError, "target must be in [0, 5), got 5"),
    (lambda: late_interaction(Q, D, target=torch.tensor([0])), ValueError, "target must have shape (2,), got (1,)"),
    (lambda: late_interaction(Q, D, D[0]), ValueError, "negatives must have shape (B, L, D), or (T, D) with offsets"),
    (lambda: late_interaction(Q, D, D.double()), TypeError, "negatives must have the same dtype as queries"),
    (
        lambda: late_interaction(Q, D, row_negatives=D),
        ValueError,
        "row_negatives must be as many as queries, one or one list each, got 5 and 2",
    ),
    (
        lambda: late_interaction(Q, D, row_negatives=Q, retrieved=3),
        ValueError,
        "row_negatives must be None where retrieved is given",
    ),
    (lambda: late_interaction(Q, D, retrieved=0), ValueError, "late_interaction: retrieved must be at least 1, got 0"),
    (lambda: late_interaction(Q, D, reduce="max"), ValueError, "reduce must be one of 'sum', 'mean', got 'max'"),
    (lambda: late_interaction(Q, D, reduction="max"), ValueError, "reduction must be one of 'mean', 'sum', 'none'"),
    (lambda: late_interaction(Q, D, temperature=0.0), ValueError, "temperature must be in (0, inf], got 0.0"),
    (
        lambda: late_interaction(Q, D, temperature=1.0, scale=1.0),
        ValueError,
        "temperature and scale must not both be given",
    ),
    (
        lambda: late_interaction(Q, D, scale=torch.ones(3)),
        ValueError,
        "scale must be one number or have shape (2,), got (3,)",
    ),
    (lambda: late_interaction(Q, D, weight=-torch.ones(2)), ValueError, "weight must not be negative, got -1.0"),
]


@pytest.mark.parametrize("call,kind,message", BAD, ids=[message for *_, message in BAD])
def test_bad_input(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)
