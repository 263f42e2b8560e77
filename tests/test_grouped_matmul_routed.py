"""grouped_matmul on the tokens of a routing: the rows of dispatch that are never written.

Products of small integers are exact in any order of summation and in 16 bits, so these are compared bit by bit.
"""

import dataclasses
import itertools

import pytest
import torch
import torch._dynamo.testing
from pairwise import pairwise

from contrastive_ops import route
from contrastive_ops.ops import Capacity, dispatch, expert_choice, grouped_matmul
from contrastive_ops.testing import TOLERANCE, relative_error, saved_bytes
from contrastive_ops.testing.compare import check_derivatives

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORWARD = torch.ops.contrastive_ops.grouped_matmul_forward
OUTER = torch.ops.contrastive_ops.grouped_matmul_outer
NAN = torch.nan

# Routers of T tokens to E experts: one and more choices, dropped tokens, empty rows, experts that choose tokens.
ROUTERS = {
    "one choice": lambda z: route(z, 1),
    "two choices": lambda z: route(z, 2),
    "dropping": lambda z: route(z, 2, capacity=Capacity(factor=0.3)),
    "padded": lambda z: route(z, 2, capacity=Capacity(factor=1.5, padded=True)),
    "padded dropping": lambda z: route(z, 2, capacity=Capacity(factor=0.3, padded=True)),
    "no place": lambda z: route(z, 2, capacity=Capacity(limit=0)),
    "empty experts": lambda z: route(z.index_fill(1, torch.tensor([0, 2]), -torch.inf), 1),
    "expert choice": lambda z: expert_choice(z, 1.4),
    "padded expert choice": lambda z: expert_choice(z, Capacity(factor=1.2, padded=True)),
}
# Tokens, experts, depth, columns: blocks, steps of the depth, tiles and vectors that end early, none, one number.
SHAPES = [(1, 4, 1, 1), (40, 5, 33, 17), (700, 3, 20, 140), (60, 4, 1100, 70), (1300, 4, 530, 9), (0, 4, 5, 6)]


def problem(router, shape, dtype=torch.float32, integers=False):
    """A routing, tokens, matrices, biases and an upstream gradient."""
    tokens, experts, depth, columns = shape
    routing = ROUTERS[router](torch.randn(tokens, experts))
    shapes = ((tokens, depth), (experts, depth, columns), (experts, columns), (len(routing.order), columns))
    if integers:
        return routing, *(torch.randint(-2, 3, shape).to(dtype) for shape in shapes)
    return routing, *(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def fused(backend, transposed=False):
    def function(routing, x, b, bias=None):
        return grouped_matmul(x, b, routing, bias, backend=backend)

    return stored_transposed(function) if transposed else function


def dispatched(backend, transposed=False):
    """The definition in the docstring."""

    def function(routing, x, b, bias=None):
        return grouped_matmul(dispatch(x, routing, backend=backend), b, routing.offsets, bias, backend=backend)

    return stored_transposed(function) if transposed else function


def stored_transposed(function):
    """With matrices that are stored as (E, F, D)."""
    return lambda routing, x, b, *bias: function(routing, x, b.transpose(1, 2), *bias)


def row_by_row(routing, x, b, bias):
    """Each row on its own, out of pieces that autograd follows."""
    k, expert = (
        routing.slots.shape[1],
        torch.bucketize(torch.arange(len(routing.order)), routing.offsets[1:], right=True),
    )
    rows = []
    for choice, e in zip(routing.order.tolist(), expert.tolist(), strict=True):
        if e == len(b):  # behind all groups
            rows.append(bias.new_zeros(bias.shape[1]))
        else:
            rows.append((x[choice // k] @ b[e] if choice >= 0 else 0) + bias[e])
    unused = sum(t.flatten()[:0].sum() for t in (x, b, bias))
    return (torch.stack(rows) if rows else bias.new_zeros(0, bias.shape[1])) + unused


def evaluate(function, routing, x, b, bias, upstream):
    """The output and the gradients of tokens, matrices and biases."""
    leaves = [t.detach().requires_grad_() for t in (x, b, bias)]
    out = function(routing, *leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


# ---- Values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_every_row_is_its_token_times_a_matrix(router, dtype, backend):
    routing, *tensors = problem(router, (40, 5, 33, 17), dtype)
    found = evaluate(fused(backend), routing, *tensors)
    truth = evaluate(row_by_row, routing, *(t.double() for t in tensors))
    for value, expected in zip(found, truth, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, expected) <= TOLERANCE[dtype]


@pairwise(dtype=DTYPES, router=ROUTERS, transposed=[False, True])
def test_small_integers_are_those_of_dispatched_rows(transposed, router, dtype, backend):
    for shape in SHAPES:
        routing, x, b, bias, upstream = problem(router, shape, dtype, integers=True)
        inputs = (routing, x, b.transpose(1, 2).contiguous() if transposed else b, bias, upstream)
        found = evaluate(fused(backend, transposed), *inputs)
        expected = evaluate(dispatched("reference", transposed), *inputs)
        for value, truth in zip(found, expected, strict=True):
            assert torch.equal(value, truth), shape


@pairwise(dtype=DTYPES, router=ROUTERS, transposed=[False, True])
def test_sums_are_those_of_dispatched_rows(transposed, router, dtype):
    """To the bit: the same products are added in the same order."""
    for shape in SHAPES:
        routing, x, b, bias, upstream = problem(router, shape, dtype)
        inputs = (routing, x, b.transpose(1, 2).contiguous() if transposed else b, bias, upstream)
        found, expected = (evaluate(f("cpu", transposed), *inputs) for f in (fused, dispatched))
        for value, truth in zip(found, expected, strict=True):
            assert torch.equal(value, truth), shape


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_every_subset_of_inputs_may_require_a_gradient(needs, backend):
    routing, *tensors, upstream = problem("padded", (9, 3, 4, 5), torch.float64)
    expected = evaluate(row_by_row, routing, *tensors, upstream)[1:]
    leaves = [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    out = fused(backend)(routing, *leaves)
    assert out.requires_grad == any(needs)
    if out.requires_grad:
        out.backward(upstream)
    for leaf, truth, need in zip(leaves, expected, needs, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad, truth)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("router", ["dropping", "padded", "expert choice"])
def test_gradcheck_and_gradgradcheck(router, transposed, bias, backend):
    routing, x, b, c, _ = problem(router, (5, 3, 3, 2), torch.float64)
    b = b.transpose(1, 2).contiguous() if transposed else b
    leaves = [t.requires_grad_() for t in ((x, b, c) if bias else (x, b))]

    def function(*tensors):
        return fused(backend, transposed)(routing, *tensors)

    check_derivatives(function, leaves)


@pytest.mark.parametrize("name", ["x", "b", "bias"])
@pytest.mark.parametrize("transposed", [False, True])
def test_second_derivative_by_one_input(transposed, name, backend):
    """The derivative of each gradient by everything it depends on, where the other gradients are not asked for."""
    routing, x, b, bias, upstream = problem("padded", (6, 3, 4, 5), torch.float64)
    b = b.transpose(1, 2).contiguous() if transposed else b
    results = []
    for function in (fused(backend, transposed), stored_transposed(row_by_row) if transposed else row_by_row):
        leaves = [t.detach().requires_grad_() for t in (x, b, bias, upstream)]
        which = leaves[["x", "b", "bias"].index(name)]
        (first,) = torch.autograd.grad(function(routing, *leaves[:3]), which, leaves[3], create_graph=True)
        weight = torch.arange(1.0, first.numel() + 1).double().view_as(first)
        results.append(torch.autograd.grad(first, leaves, weight, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_strides(transposed, dtype, backend):
    routing, x, b, bias, upstream = problem("padded", (40, 4, 33, 70), dtype, integers=True)
    b = b.transpose(1, 2).contiguous() if transposed else b
    expected = evaluate(fused(backend, transposed), routing, x, b, bias, upstream)
    for tokens in (
        x.T.contiguous().T,
        torch.cat([x, x], 1)[:, : x.shape[1]],
        x.repeat_interleave(2, 1)[:, ::2],
        x.repeat_interleave(3, 0)[::3],
    ):
        found = evaluate(fused(backend, transposed), routing, tokens, b, bias, upstream.T.contiguous().T)
        assert all(torch.equal(value, truth) for value, truth in zip(found, expected, strict=True))
    strided = dataclasses.replace(routing, order=torch.stack([routing.order, routing.order], 1)[:, 0])
    found = evaluate(fused(backend, transposed), strided, x, b, bias, upstream)
    assert all(torch.equal(value, truth) for value, truth in zip(found, expected, strict=True))


@pytest.mark.parametrize("of", ["one token", "one number"])
def test_expanded_tokens(of, backend):
    routing, x, b, bias, upstream = problem("padded", (20, 4, 6, 7), integers=True)
    expanded = (x[:1] if of == "one token" else x[:, :1]).expand_as(x)
    for transposed in (False, True):
        matrices = b.transpose(1, 2).contiguous() if transposed else b
        found = evaluate(fused(backend, transposed), routing, expanded, matrices, bias, upstream)
        expected = evaluate(fused(backend, transposed), routing, expanded.contiguous(), matrices, bias, upstream)
        assert all(torch.equal(value, truth) for value, truth in zip(found, expected, strict=True))


# ---- Rows of no token, tokens of no row ------------------------------------------------------------------------------


def test_empty_rows_are_zeros_times_the_matrix(backend):
    """As rows of zeros are: the bias remains. Rows behind all groups have none."""
    routing, x, b, bias, _ = problem("padded", (20, 4, 6, 7))
    expert = torch.bucketize(torch.arange(len(routing.order)), routing.offsets[1:], right=True)
    empty = routing.order < 0
    assert empty.any()
    assert torch.equal(grouped_matmul(x, b, routing, bias, backend=backend)[empty], bias[expert[empty]])
    routing, x, b, bias, _ = problem("dropping", (20, 4, 6, 7))  # rows that no expert has
    routing = dataclasses.replace(routing, order=torch.cat([routing.order, torch.tensor([-1, -1])]))
    out = grouped_matmul(x, b, routing, bias, backend=backend)
    assert len(out) == len(routing.order) and (out[int(routing.offsets[-1]) :] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("router", ["dropping", "padded dropping"])
def test_dropped_tokens_reach_nothing(router, transposed, dtype, backend):
    routing, x, b, bias, upstream = problem(router, (60, 4, 33, 20), dtype)
    b = b.transpose(1, 2).contiguous() if transposed else b
    dropped = ~routing.kept.any(1)
    assert dropped.any()
    clean = evaluate(fused(backend, transposed), routing, x, b, bias, upstream)
    x[dropped] = NAN
    found = evaluate(fused(backend, transposed), routing, x, b, bias, upstream)
    assert all(torch.equal(value, truth) for value, truth in zip(found, clean, strict=True))
    assert (found[1][dropped] == 0).all()


def test_a_nan_stays_with_its_token(backend):
    routing, x, b, bias, _ = problem("two choices", (30, 4, 6, 7))
    x[11, 3] = NAN
    expected = torch.zeros(len(routing.order), dtype=torch.bool)
    expected[routing.slots[11]] = True
    bad = grouped_matmul(x, b, routing, bias, backend=backend).isnan()
    assert torch.equal(bad, expected[:, None].expand_as(bad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    inputs = problem("padded", (700, 4, 300, 600), dtype)
    routing, x, b, *others = inputs
    stored = (routing, x, b.transpose(1, 2).contiguous(), *others)
    before, first = torch.get_num_threads(), None
    try:
        for count in (1, 2, 3, 16, 2):
            torch.set_num_threads(count)
            found = [*evaluate(fused("cpu"), *inputs), *evaluate(fused("cpu", True), *stored)]
            first = first or found
            assert all(torch.equal(value, expected) for value, expected in zip(found, first, strict=True))
    finally:
        torch.set_num_threads(before)


# ---- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
def test_tokens_and_not_rows_are_kept(transposed, backend):
    tokens, experts, depth, columns = 64, 4, 256, 8
    routing = route(torch.randn(tokens, experts), experts)  # four rows of each
    places = sum(t.untyped_storage().nbytes() for t in (routing.slots, routing.order, routing.offsets))
    x = torch.randn(tokens, depth)
    b = torch.randn(*((experts, columns, depth) if transposed else (experts, depth, columns)))
    size, other = {"x": x.nbytes, "b": b.nbytes}, {"x": "b", "b": "x"}
    for names in (("x",), ("b",), ("x", "b")):
        leaves = [t.detach().requires_grad_(name in names) for name, t in (("x", x), ("b", b))]
        kept, _ = saved_bytes(lambda leaves=leaves: fused(backend, transposed)(routing, *leaves))
        assert kept == places + sum(size[other[name]] for name in names)


def test_tokens_beyond_32_bits(backend):
    """Tokens that lie more than 2^31 numbers apart, in memory of which only their pages are touched."""
    far = 2**31 + 40
    space = torch.empty(2 * far + 4096, dtype=torch.bfloat16)
    routing, x, b, bias, upstream = problem("two choices", (3, 4, 4, 6), torch.bfloat16, integers=True)
    far_x = space.as_strided((3, 4), (far, 1)).copy_(x)
    expected = evaluate(fused(backend), routing, x, b, bias, upstream)
    assert torch.equal(grouped_matmul(far_x, b, routing, bias, backend=backend), expected[0])
    for transposed in (False, True):
        places = (routing.offsets, routing.slots, routing.order)
        found = OUTER(far_x, upstream, *places, transposed, True, True, backend)
        assert torch.equal(found[0], expected[2]) and torch.equal(found[1], expected[3])


# ---- Autocast, compilation -------------------------------------------------------------------------------------------


def test_autocast_is_the_product_of_bfloat16_tokens(backend):
    routing, *tensors = problem("two choices", (20, 4, 6, 5))
    rounded = [t.bfloat16() for t in tensors]

    def region(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused(backend)(*arguments)

    found = evaluate(region, routing, *tensors[:3], rounded[3])
    expected = evaluate(fused(backend), routing, *rounded)
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    for value, truth in zip(found, expected, strict=True):
        assert torch.equal(value, truth.to(value.dtype))


@pytest.mark.parametrize("router", ["dropping", "padded"])
def test_opcheck(router, backend):
    routing, x, b, bias, upstream = problem(router, (6, 3, 3, 4), torch.float64)
    leaves = [t.requires_grad_() for t in (x, b, bias, upstream)]
    places = (routing.slots, routing.order, backend)
    torch.library.opcheck(FORWARD, (*leaves[:2], routing.offsets, leaves[2], *places))
    for transposed, wants in itertools.product([False, True], [(True, False), (True, True)]):
        arguments = (x, upstream, routing.offsets, *places[:2], transposed, *wants, backend)
        torch.library.opcheck(OUTER, arguments)


def test_compiles_without_graph_break_or_recompilation(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def function(x, b, bias, logits):
        routing = route(logits, 2, capacity=1.5, backend=backend)
        return grouped_matmul(x, b.transpose(1, 2), routing, bias, backend=backend).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=None)
    for tokens in (13, 20, 100, 31):
        leaves = [torch.randn(s).requires_grad_() for s in ((tokens, 6), (3, 4, 6), (3, 4))]
        logits = torch.randn(tokens, 3)
        for t in (leaves[0], logits):
            torch._dynamo.maybe_mark_dynamic(t, 0)
        value, expected = compiled(*leaves, logits), function(*leaves, logits)
        torch.testing.assert_close(value, expected)
        got, truth = (torch.autograd.grad(v, leaves) for v in (value, expected))
        torch.testing.assert_close(got, truth)
    assert counter.frame_count == 1


def test_meta_tensors():
    routing, *tensors, _ = problem("padded", (7, 3, 4, 6), torch.bfloat16)
    places = {name: getattr(routing, name).to("meta") for name in ("slots", "order", "offsets")}
    leaves = [t.to("meta").requires_grad_() for t in tensors]
    out = grouped_matmul(leaves[0], leaves[1], dataclasses.replace(routing, **places), leaves[2])
    assert out.shape == (len(routing.order), 6) and out.dtype == torch.bfloat16 and out.device.type == "meta"
    for gradient, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype


# ---- Bad input -------------------------------------------------------------------------------------------------------


def test_bad_routings():
    routing, x, b, _, _ = problem("two choices", (7, 3, 4, 6))
    with pytest.raises(ValueError, match=r"grouped_matmul: a must have 7 rows as the routing has, got \(6, 4\)"):
        grouped_matmul(x[:6], b, routing)
    with pytest.raises(ValueError, match=r"grouped_matmul: offsets must have shape \(3,\)"):
        grouped_matmul(x, b[:2], routing)
    with pytest.raises(ValueError, match="grouped_matmul: a must be on the same device as routing"):
        grouped_matmul(x.to("meta"), b.to("meta"), routing)
    with pytest.raises(ValueError, match=r"grouped_matmul: offsets must ascend within \[0, 14\], got 15"):
        grouped_matmul(x, b, dataclasses.replace(routing, offsets=torch.tensor([0, 2, 5, 15])))
    with pytest.raises(TypeError, match="grouped_matmul: a must be a tensor, got list"):
        grouped_matmul([1.0], b, routing)


@pytest.mark.parametrize("bad", [14, -2, 2**62, -(2**62)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_compiled_functions_protect_memory(transposed, bad):
    """They check what addresses memory, for a graph may run on another order than it was traced with."""
    from contrastive_ops.core import extension

    if extension.why_missing() is not None:
        pytest.skip(extension.why_missing())
    functions = extension.functions("grouped_matmul")
    routing, x, b, _, upstream = problem("two choices", (7, 3, 4, 6))
    order = routing.order.clone()
    order[-1] = bad
    for slots, each in ((routing.slots, order), (routing.slots[:6], routing.order), (None, routing.order),
                        (routing.slots, None), (routing.slots, routing.order[:, None]),
                        (routing.slots, routing.order[:13]), (routing.slots[:, :1], routing.order)):  # fmt: skip
        with pytest.raises(ValueError):
            functions.outer(x, upstream, routing.offsets, slots, each, transposed, True, True)
        with pytest.raises(ValueError):
            functions.forward(x, b, routing.offsets, None, slots, each)
    with pytest.raises(TypeError, match="order must have dtype"):
        functions.forward(x, b, routing.offsets, None, routing.slots, routing.order.int())
    with pytest.raises(ValueError, match=r"order must be in \[-1, 14\), got"):
        grouped_matmul(x, b, dataclasses.replace(routing, order=order), backend="cpu")
