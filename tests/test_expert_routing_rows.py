"""dispatch, combine and their derivative dots: against plain indexing, rows of no token, strides, memory.

Sums and products of small integers are exact in any order and in 16 bits, so backends are compared bit by bit.
"""

import pytest
import torch

from contrastive_ops import route
from contrastive_ops.ops import Capacity, combine, dispatch, grouped_matmul
from contrastive_ops.testing import TOLERANCE, relative_error, saved_bytes
from contrastive_ops.testing.compare import check_derivatives

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAN = torch.nan
OPS = torch.ops.contrastive_ops

# Tokens, experts, choices, capacity, depth: layouts with and without dropped tokens and empty rows.
CASES = {
    "dropless": (20, 4, 2, None, 8),
    "one": (1, 1, 1, None, 1),
    "dropping": (40, 4, 2, Capacity(factor=0.6), 33),
    "padded": (40, 5, 3, Capacity(factor=1.5, padded=True), 17),
    "padded groups": (40, 5, 2, Capacity(limit=3, group_size=10, padded=True), 70),
    "no place": (10, 4, 2, Capacity(limit=0), 8),
    "no tokens": (0, 4, 2, Capacity(limit=2, padded=True), 8),
    "no depth": (10, 4, 2, None, 0),
    "deep": (9, 3, 3, Capacity(factor=0.8), 20_000),
}


def routed(tokens, experts, k, capacity, depth=0, dtype=torch.float32, **options):
    """A routing whose gates are a leaf; some tokens are padding."""
    valid = torch.rand(tokens) < 0.9
    found = route(torch.randn(tokens, experts), k, capacity=capacity, valid=valid, backend="reference", **options)
    found.__dict__["gates"] = torch.rand(found.gates.shape).to(dtype).requires_grad_()
    return found


def indexed_dispatch(tokens, routing):
    """The definition in the docstring of dispatch, in differentiable indexing."""
    k = routing.slots.shape[1]
    table = torch.cat([tokens, tokens.new_zeros(1, tokens.shape[1])])
    choice = torch.where(routing.order < 0, len(tokens), routing.order.div(k, rounding_mode="floor"))
    return table[choice]


def indexed_combine(rows, routing):
    """The definition in the docstring of combine."""
    table = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    taken = table[torch.where(routing.slots < 0, len(rows), routing.slots)]
    return (routing.gates[:, :, None] * taken).sum(1)


def with_gradients(function, moved, routing, upstream):
    """Output, gradient of what is moved and gradient of the gates (None where they are not used)."""
    moved = moved.detach().requires_grad_()
    out = function(moved, routing)
    gradients = torch.autograd.grad(out, (moved, routing.gates), upstream, allow_unused=True)
    return out.detach(), *gradients


def inputs(name, dtype, integers=False):
    *problem, depth = CASES[name]
    routing = routed(*problem, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def numbers(rows):
        return torch.randint(-2, 3, (rows, depth)).to(dtype) if integers else torch.randn(rows, depth).to(dtype)

    tokens, rows = len(routing.slots), len(routing.order)
    if integers:
        routing.gates.data = torch.randint(0, 3, routing.gates.shape).to(routing.gates.dtype)
    return routing, numbers(tokens), numbers(rows)


# ---- Values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_dispatch_is_indexing(name, dtype, backend):
    routing, tokens, upstream = inputs(name, dtype)
    found = with_gradients(lambda x, r: dispatch(x, r, backend=backend), tokens, routing, upstream)
    expected = with_gradients(indexed_dispatch, tokens.double(), routing, upstream.double())
    assert found[0].dtype == dtype and torch.equal(found[0].double(), expected[0])
    assert relative_error(found[1], expected[1]) <= TOLERANCE[dtype] and found[2] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_combine_is_a_weighted_sum_of_indexed_rows(name, dtype, backend):
    routing, upstream, rows = inputs(name, dtype)
    found = with_gradients(lambda x, r: combine(x, r, backend=backend), rows, routing, upstream)
    expected = with_gradients(indexed_combine, rows.double(), routing, upstream.double())
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == routing.gates.dtype
    for value, truth in zip(found, expected, strict=True):
        assert relative_error(value, truth) <= TOLERANCE[dtype]
    dropped = ~routing.kept.any(1)
    assert (found[0][dropped] == 0).all() and (found[2][~routing.kept] == 0).all()
    assert (found[1][routing.order < 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_small_integers_are_exact(name, dtype, backend):
    routing, tokens, rows = inputs(name, dtype, integers=True)
    if name == "deep":  # inner products that float16 holds
        tokens[:, 500:], rows[:, 500:] = 0, 0
    for function, truth, moved, upstream in (
        (dispatch, indexed_dispatch, tokens, rows),
        (combine, indexed_combine, rows, tokens),
    ):
        found = with_gradients(lambda x, r, f=function: f(x, r, backend=backend), moved, routing, upstream)
        expected = with_gradients(truth, moved.double(), routing, upstream.double())
        for value, want in zip(found, expected, strict=True):
            assert (value is None) == (want is None)
            assert value is None or torch.equal(value.double(), want.double())


@pytest.mark.parametrize("capacity", [None, Capacity(factor=0.7), Capacity(limit=3, padded=True)], ids=str)
def test_gradcheck_and_gradgradcheck(capacity, backend):
    routing = routed(6, 3, 2, capacity, dtype=torch.float64)
    tokens, rows = torch.randn(6, 2).double(), torch.randn(len(routing.order), 2).double()

    def combined(x, gates):
        routing.__dict__["gates"] = gates
        return combine(x, routing, backend=backend)

    cases = ((lambda x: dispatch(x, routing, backend=backend), (tokens,)),
             (combined, (rows, routing.gates)),
             (lambda x, g: OPS.expert_routing_dispatch(x, g, routing.slots, routing.order, backend),
              (tokens, routing.gates)),
             (lambda x, y: OPS.expert_routing_dots(x, y, routing.slots, routing.order, backend),
              (tokens, rows)))  # fmt: skip
    for function, leaves in cases:
        leaves = tuple(t.detach().requires_grad_() for t in leaves)
        check_derivatives(function, leaves)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True), (False, False)], ids=str)
def test_every_subset_of_inputs_may_require_a_gradient(needs, backend):
    routing, upstream, rows = inputs("dropping", torch.float64)
    expected = with_gradients(indexed_combine, rows, routing, upstream)[1:]
    rows = rows.requires_grad_(needs[0])
    routing.__dict__["gates"] = gates = routing.gates.detach().requires_grad_(needs[1])
    out = combine(rows, routing, backend=backend)
    assert out.requires_grad == any(needs)
    if out.requires_grad:
        out.backward(upstream)
    for leaf, truth, need in zip((rows, gates), expected, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, truth)


def test_expanded_gradient(backend):
    """The gradient of a plain sum has no strides, which torch's grouped_mm refuses."""
    routing, tokens, rows = inputs("dropping", torch.float32)
    for function, moved in ((dispatch, tokens), (combine, rows)):
        moved = moved.requires_grad_()
        (found,) = torch.autograd.grad(function(moved, routing, backend=backend).sum(), moved)
        out = function(moved, routing, backend=backend)
        assert torch.equal(found, torch.autograd.grad(out, moved, torch.ones_like(out))[0])


def test_a_layer_of_experts(backend):
    """route, dispatch, grouped_matmul and combine are a loop over tokens and their experts, in value and gradients."""
    x, w = (torch.randn(*s).double().requires_grad_() for s in ((14, 5), (3, 5, 5)))
    router = torch.randn(5, 3).double().requires_grad_()
    routing = route(x @ router, 2, capacity=0.8, backend=backend)
    rows = grouped_matmul(dispatch(x, routing, backend=backend), w, routing.offsets, backend=backend)
    found = combine(rows.relu(), routing, backend=backend)
    p = (x @ router).softmax(1)
    expected = torch.stack([
        sum((p[t, e] * (x[t] @ w[e]).relu() for e, kept in zip(chosen.tolist(), keep.tolist(), strict=True) if kept),
            torch.zeros(5).double())
        for t, (chosen, keep) in enumerate(zip(routing.experts, routing.kept, strict=True))
    ])  # fmt: skip
    assert not routing.kept.all()
    torch.testing.assert_close(found, expected)
    weight = torch.randn(14, 5).double()
    got, want = (torch.autograd.grad((v * weight).sum(), (x, w, router)) for v in (found, expected))
    torch.testing.assert_close(got, want)
    assert got[2].abs().max() > 0


# ---- Rows of no token, strides, memory -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["dropping", "padded", "padded groups"])
def test_rows_of_no_token_and_dropped_tokens_reach_nothing(name, dtype, backend):
    """torch's grouped_mm leaves rows past the last group as they are; NaN in them must go nowhere."""
    routing, tokens, rows = inputs(name, dtype)
    dropped, empty = ~routing.kept.any(1), routing.order < 0
    assert dropped.any() and (empty.any() or name == "dropping")
    for function, moved, unread, upstream, unwritten in (
        (dispatch, tokens, dropped, rows, empty),
        (combine, rows, empty, tokens, dropped),
    ):
        clean = with_gradients(lambda x, r, f=function: f(x, r, backend=backend), moved, routing, upstream)
        moved, upstream = moved.clone(), upstream.clone()
        moved[unread], upstream[unwritten] = NAN, torch.inf
        routing.gates.data[~routing.kept] = NAN
        found = with_gradients(lambda x, r, f=function: f(x, r, backend=backend), moved, routing, upstream)
        for value, expected in zip(found, clean, strict=True):
            assert value is None or torch.equal(value, expected)
        assert (found[0][unwritten] == 0).all() and (found[1][unread] == 0).all()


def test_a_nan_stays_with_its_token(backend):
    routing, tokens, rows = inputs("dropless", torch.float32)
    token = int(routing.kept.all(1).nonzero()[3])
    tokens[token, 2] = NAN
    bad = dispatch(tokens, routing, backend=backend).isnan()
    expected = torch.zeros_like(bad)
    expected[routing.slots[token], 2] = True
    assert torch.equal(bad, expected)
    rows[routing.slots[token, 1], 5] = NAN
    bad = combine(rows, routing, backend=backend).isnan()
    assert bad[token, 5] and bad.sum() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, backend):
    routing, tokens, rows = inputs("padded", dtype, integers=True)
    for function, moved, upstream in ((dispatch, tokens, rows), (combine, rows, tokens)):

        def run(x, g, f=function):
            return with_gradients(lambda y, r: f(y, r, backend=backend), x, routing, g)

        expected = run(moved, upstream)
        for x, g in (
            (moved.T.contiguous().T, upstream.T.contiguous().T),
            (torch.cat([moved, moved], 1)[:, : moved.shape[1]], torch.cat([upstream, upstream])[: len(upstream)]),
            (moved.repeat_interleave(2, 1)[:, ::2], upstream.flip(0).flip(0)),
        ):
            for value, truth in zip(run(x, g), expected, strict=True):
                assert value is None or torch.equal(value, truth)


def test_rows_far_apart(backend):
    """Rows that lie more than 2^31 numbers apart, in memory of which only their pages are touched."""
    far = 2**31 + 40
    space = torch.empty(2 * far + 4096, dtype=torch.bfloat16)
    routing = route(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), 1)
    tokens = torch.randn(3, 4).bfloat16()
    far_tokens = space.as_strided((3, 4), (far, 1)).copy_(tokens)
    assert torch.equal(dispatch(far_tokens, routing, backend=backend), tokens[[0, 2, 1]])
    expected = combine(tokens, routing, backend=backend)
    assert torch.equal(combine(far_tokens, routing, backend=backend), expected)
    logits = space.as_strided((3, 4), (far, 1), 64).copy_(tokens)
    found, expected = (route(z, 2, losses=["z"], backend=backend) for z in (logits, tokens))
    assert torch.equal(found.gates, expected.gates) and torch.equal(found.loss, expected.loss)


def test_memory_does_not_hold_copies_of_rows(backend):
    tokens, experts, k, depth = 64, 4, 4, 256
    routing = routed(tokens, experts, k, None)
    places = routing.slots.nbytes + routing.order.nbytes
    x = torch.randn(tokens, depth, requires_grad=True)
    kept, rows = saved_bytes(lambda: dispatch(x, routing, backend=backend))
    assert kept == places
    rows = rows.detach()
    kept, _ = saved_bytes(lambda: combine(rows, routing, backend=backend))
    assert kept == places + rows.nbytes + routing.gates.nbytes  # the rows themselves, for the gradient of the gates
    routing.__dict__["gates"] = routing.gates.detach()
    kept, _ = saved_bytes(lambda: combine(rows.requires_grad_(), routing, backend=backend))
    assert kept == places + routing.gates.nbytes


def test_a_router_keeps_its_logits_and_choices(backend):
    logits = torch.randn(4096, 16, requires_grad=True)
    losses = ["importance", "switch", "z", "local_entropy", "global_entropy"]
    kept, routing = saved_bytes(lambda: route(logits, 2, losses=losses, backend=backend))
    assert kept <= logits.nbytes + routing.experts.nbytes + 4096


def test_autocast_moves_rows_in_their_dtype(backend):
    routing, tokens, rows = inputs("dropping", torch.float32)
    for function, moved in ((dispatch, tokens), (combine, rows)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = function(moved, routing, backend=backend)
        assert torch.equal(found, function(moved, routing, backend=backend))
        low = function(moved.bfloat16(), routing, backend=backend)
        assert low.dtype == torch.bfloat16
