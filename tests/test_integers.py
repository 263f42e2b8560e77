"""Labels, ids and places: every function takes any integer dtype for them, and refuses floats by name.

The losses are those of `contrastive_ops.testing.losses`, so that a new one joins by itself; what else takes integers is
listed in `CALLS`, one call for each argument.
"""

import pytest
import torch

from contrastive_ops import (
    Pairs,
    info_nce,
    metrics,
    mine_hard_negatives,
    mining,
    route,
    similarity_reduce,
    similarity_topk,
)
from contrastive_ops.losses import mined_info_nce
from contrastive_ops.losses.negative_sampling import UnigramSampler
from contrastive_ops.mining import MemoryBank
from contrastive_ops.ops import TokenSets, dispatch, grouped_matmul, maxsim, maxsim_pairs, similarity_prefix, xtr
from contrastive_ops.testing.losses import LOSSES

DTYPES = [torch.int32, torch.int16, torch.uint8]


def changed(value, dtype):
    """The same with every int64 tensor in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.dtype == torch.int64 else value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(changed(each, dtype) for each in value)
    if isinstance(value, dict):
        return {name: changed(each, dtype) for name, each in value.items()}
    if isinstance(value, Pairs):
        return Pairs(**{name: changed(getattr(value, name), dtype) for name in value.__dataclass_fields__})
    return value


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    case = LOSSES[name]
    expected = case(case.inputs(7, 6))
    for dtype in (torch.int32, torch.int16):
        inputs = case.inputs(7, 6)
        given = {**case.options, **case.arrange(inputs)}
        value = case.function(**{key: changed(each, dtype) for key, each in given.items()})
        torch.testing.assert_close(value[0] if isinstance(value, tuple) else value, expected, rtol=0, atol=0)


torch.manual_seed(0)
X, Y = torch.randn(4, 8), torch.randn(9, 8)
I4, I9, LISTS = torch.arange(4), torch.arange(9), (torch.tensor([0, 1, 1, 2, 4]), torch.tensor([3, 8, 0, 5]))
LOGITS = torch.randn(6, 3)


def bank(ids):
    made = MemoryBank(8, 8)
    made.enqueue(X, ids, ids)
    return made.topk(X, 2, ids=ids, labels=ids).indices, made.ids


CALLS = {
    "target": lambda f: similarity_reduce(X, Y, target=f(I4)).rows,
    "differ": lambda f: similarity_reduce(X, Y, pairs=Pairs(differ=(f(I4), f(I9)))),
    "same": lambda f: similarity_topk(X, Y, 3, pairs=Pairs(same=(f(I4), f(I9)))).values,
    "exclude": lambda f: similarity_topk(X, Y, 3, pairs=Pairs(exclude=(f(LISTS[0]), f(LISTS[1])))).values,
    "log_weight": lambda f: similarity_reduce(X, Y, pairs=Pairs(log_weight=(torch.eye(9), f(I4), f(I9)))),
    "exclude of search": lambda f: mining.search(X, Y, 3, pairs=Pairs(exclude=(f(LISTS[0]), f(LISTS[1])))).values,
    "offsets": lambda f: maxsim(TokenSets(X, offsets=f(torch.tensor([0, 2, 4]))), Y[None]),
    "pairs": lambda f: maxsim_pairs(X[None], Y.view(3, 3, 8), (f(I4[:1]), f(I4[2:3]))),
    "offsets of xtr": lambda f: xtr(TokenSets(X, offsets=f(torch.tensor([0, 2, 4]))), Y[None], 2),
    "segments": lambda f: route(LOGITS, 2, segments=f(torch.arange(6) % 2), losses=["switch"]).losses["switch"],
    "allowed": lambda f: route(LOGITS, 2, allowed=f(torch.tensor([[0, 1]] * 6))).gates,
    "offsets of groups": lambda f: grouped_matmul(X, torch.ones(2, 8, 3), f(torch.tensor([0, 1, 4]))),
    "positives": lambda f: mine_hard_negatives(X, Y, f(I4), 2).indices,
    "positive lists": lambda f: mine_hard_negatives(X, Y, (f(LISTS[0]), f(LISTS[1])), 2).indices,
    "ids of sampling": lambda f: (
        mine_hard_negatives(X, Y, I4, 2, sampling=mining.Sampling("uniform", ids=(f(I4), f(I9)))).indices
    ),
    "bank": lambda f: bank(f(I4)),
    "avoid": lambda f: UnigramSampler(torch.ones(9))(f(I4), 3, generator=torch.Generator().manual_seed(1)),
    "neighbours": lambda f: metrics.hubness(f(LISTS[0][:, None].clamp_max(2)), 5),
    "segments of isotropy": lambda f: metrics.isotropy(X, f(I4 % 2)),
    "found": lambda f: metrics.retrieval_metrics(f(I9.view(3, 3)), (f(I4), f(I4[:3])), k=(2,))["recall@2"],
    "collapse": lambda f: mining.collapse(f(I9.view(3, 3)), documents=f(I9 // 2)),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    expected = CALLS[name](lambda t: t)
    for dtype in DTYPES:
        torch.testing.assert_close(CALLS[name](lambda t, dtype=dtype: t.to(dtype)), expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match=r"^\w+.*: .* must .*got (a tensor of )?torch.float32"):
        CALLS[name](lambda t: t.float())


def test_dispatch_after_routing_by_small_integers():
    routing = route(LOGITS, 1, allowed=torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.int32))
    assert routing.experts.dtype == torch.int64
    assert torch.equal(dispatch(LOGITS, routing), LOGITS[[0, 3, 1, 4, 2, 5]])


def test_arrays_are_taken_where_a_corpus_may_be_one():
    np = pytest.importorskip("numpy")
    expected = mine_hard_negatives(X, Y, I4, 2)
    for query in (X.numpy(), X.numpy().copy()):
        mined = mine_hard_negatives(query, Y.numpy(), I4.numpy(), np.int64(2))
        assert torch.equal(mined.indices, expected.indices)
    lists = tuple(each.numpy() for each in LISTS)
    assert torch.equal(mine_hard_negatives(X, Y, lists, 2).indices, mine_hard_negatives(X, Y, LISTS, 2).indices)
    assert torch.equal(mining.search(X.numpy(), Y.numpy(), 3).indices, similarity_topk(X, Y, 3).indices)
    state = mining.TopKState(X.numpy(), np.int64(3))
    state.update(Y.numpy(), np.int64(0))
    assert torch.equal(state.finalize().indices, similarity_topk(X, Y, 3).indices)
    assert type(state.covered[0][1]) is int  # what a checkpoint holds
    frozen = X.numpy().copy()
    frozen.flags.writeable = False
    assert torch.equal(mining.search(frozen[::-1], Y, 3).indices, similarity_topk(X.flip(0), Y, 3).indices)
    for wrong in (np.array(["a"] * 4), np.array([None] * 4)):
        with pytest.raises(TypeError, match="query must be a tensor or an array of numbers, got an array of"):
            mine_hard_negatives(wrong, Y, I4, 2)
        with pytest.raises(TypeError, match="positives must be a tensor or an array of numbers, got an array of"):
            mine_hard_negatives(X, Y, wrong, 2)
    with pytest.raises(TypeError, match="info_nce: query must be a tensor, got ndarray"):
        info_nce(X.numpy(), X)


def test_more_than_there_are():
    """Lists end in -1 where rules or the corpus leave fewer, everywhere; draws with replacement have no limit."""
    everything = similarity_topk(X, Y, 9)
    for found in (similarity_topk(X, Y, 20), mining.search(X, Y, 20)):
        assert torch.equal(found.indices[:, :9], everything.indices) and (found.indices[:, 9:] == -1).all()
        assert (found.values[:, 9:] == -torch.inf).all() and (found.counts == 9).all()
    for strategy in ("top", "uniform", "softmax", "simans"):
        rules = mining.NegativeRules(rank_window=(1, 4))
        mined = mine_hard_negatives(X, Y, I4, 20, rules=rules, sampling=mining.Sampling(strategy))
        assert mined.indices.shape == (4, 20) and (mined.counts == 3).all() and (mined.indices[:, 3:] == -1).all()
    held = MemoryBank(8, 8)
    held.enqueue(X)
    assert (held.topk(X, 6).indices[:, 4:] == -1).all()
    torch.testing.assert_close(mined_info_nce(X, X, Y, 20), mined_info_nce(X, X, Y, 9))
    assert UnigramSampler(torch.ones(2))(torch.tensor([0]), 50).eq(1).all()


@pytest.mark.parametrize("diagonal", [2**63 - 1, 2**62, 3, -(2**62), -(2**63)])
def test_a_diagonal_of_any_number(backend, diagonal):
    """One beyond all columns drops nothing; C++ must not add it to the number of a row."""
    x, y = torch.randn(2, 3, 4).unbind()
    pairs = Pairs(diagonal=diagonal)
    call = {"dim": 1, "backend": backend}
    assert torch.equal(similarity_reduce(x, y, pairs=pairs, **call), similarity_reduce(x, y, **call))
    with_pairs, without = (similarity_prefix(x, y, dims=(2, 4), pairs=each, **call) for each in (pairs, None))
    assert torch.equal(with_pairs.rows, without.rows)


@pytest.mark.parametrize("capacity", [2**62, 2**63 - 1])
def test_a_capacity_of_any_number(backend, capacity):
    """As many places as there are tokens are enough; C++ must not multiply them by the number of experts."""
    logits = torch.randn(6, 3)
    huge, none = (route(logits, 2, capacity=each, backend=backend) for each in (capacity, None))
    for name in ("experts", "slots", "offsets"):
        assert torch.equal(getattr(huge, name), getattr(none, name)), name
