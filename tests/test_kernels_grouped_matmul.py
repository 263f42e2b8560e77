"""The Triton kernels of grouped_matmul against the reference in float64. Without a GPU they run interpreted."""

import dataclasses

import pytest
import torch

from contrastive_ops import route
from contrastive_ops.core import triton_kernels
from contrastive_ops.ops import Capacity, dispatch, expert_choice, grouped_matmul
from contrastive_ops.testing import TOLERANCE, relative_error

if not triton_kernels.interprets() and not torch.cuda.is_available():
    pytest.skip("Triton kernels need a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() and not triton_kernels.interprets() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUTER = torch.ops.contrastive_ops.grouped_matmul_outer
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def problem(sizes, depth, columns, dtype=torch.float32, before=0, after=0, integers=False):
    """Random a, b, bias, upstream gradient and the offsets of groups of these sizes between rows of no group."""
    offsets = torch.tensor([before, *sizes]).cumsum(0)
    rows, groups = int(offsets[-1]) + after, len(sizes)
    shapes = ((rows, depth), (groups, depth, columns), (groups, columns), (rows, columns))
    draw = (lambda shape: torch.randint(-2, 3, shape)) if integers else torch.randn
    return *(draw(shape).to(DEVICE, dtype) for shape in shapes), offsets.to(DEVICE)


def evaluate(a, b, bias, upstream, offsets, backend="triton"):
    """The output and the gradients of a, b and bias."""
    leaves = [t.detach().requires_grad_() for t in (a, b, bias)]
    out = grouped_matmul(leaves[0], leaves[1], offsets, leaves[2], backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


# Group sizes, depth, columns: tiles of 16 that end early, that are whole, that are missing; many groups of few rows.
SHAPES = [
    ([1], 1, 1),
    ([3, 0, 5], 7, 9),
    ([0, 0, 33, 1, 0], 16, 32),
    ([16, 17, 15], 33, 17),
    ([70], 20, 3),
    ([1] * 9 + [0] * 9 + [2, 3], 5, 18),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_reference(shape, dtype):
    *tensors, offsets = problem(*shape, dtype, before=3, after=5)
    found = evaluate(*tensors, offsets)
    truth = evaluate(*(t.double() for t in tensors), offsets, backend="reference")
    for value, expected in zip(found, truth, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("before, after, dtype", [(0, 0, DTYPES[0]), (40, 1, DTYPES[1]), (1, 40, DTYPES[2])], ids=str)
def test_small_integers_are_exact_and_runs_agree(before, after, dtype):
    inputs = problem([20, 0, 33], 21, 19, dtype, before, after, integers=True)
    expected = evaluate(*inputs, backend="reference")
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(evaluate(*inputs), expected, strict=True))


def test_two_runs_have_the_same_bits():
    inputs = problem([20, 0, 33], 21, 19, before=1, after=2)
    first, second = evaluate(*inputs), evaluate(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_bias_and_one_gradient_at_a_time():
    a, b, bias, upstream, offsets = problem([20, 0, 13], 21, 19, after=2, integers=True)
    expected = evaluate(a, b, torch.zeros_like(bias), upstream, offsets, backend="reference")
    assert torch.equal(grouped_matmul(a, b, offsets, backend="triton"), expected[0])
    for wants in ((True, False), (False, True), (True, True)):
        for transposed in (False, True):
            db, dbias = OUTER(a, upstream, offsets, None, None, transposed, *wants, "triton")
            assert torch.equal(db, expected[2]) if wants[0] else db.numel() == 0
            assert torch.equal(dbias, expected[3]) if wants[1] else dbias.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_no_group_are_zero_and_reach_nothing(dtype):
    a, b, bias, upstream, offsets = problem([20, 0, 13], 17, 18, dtype, before=2, after=40)
    clean = evaluate(a, b, bias, upstream, offsets)
    outside = torch.ones(len(a), dtype=torch.bool, device=DEVICE)
    outside[2:35] = False
    a[outside], upstream[outside] = torch.nan, torch.inf
    found = evaluate(a, b, bias, upstream, offsets)
    for value, expected in zip(found, clean, strict=True):
        assert torch.equal(value, expected)
    assert (found[0][outside] == 0).all() and (found[1][outside] == 0).all()
    assert (found[2][1] == 0).all() and (found[3][1] == 0).all()


def test_nan_and_infinity_stay_in_their_rows():
    a, b, bias, _, offsets = problem([9, 9], 5, 8)
    a[3, 0], a[12, 1] = torch.nan, torch.inf
    out = grouped_matmul(a, b, offsets, bias, backend="triton")
    assert out[3].isnan().all() and out[12].isinf().all()
    assert out[[i for i in range(18) if i not in (3, 12)]].isfinite().all()


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("depth", [0, 4])
@pytest.mark.parametrize("columns", [0, 5])
def test_empty_dimensions(rows, groups, depth, columns):
    sizes = [rows] + [0] * (groups - 1) if groups else []
    inputs = problem(sizes, depth, columns, after=0 if groups else rows, integers=True)
    for value, expected in zip(evaluate(*inputs), evaluate(*inputs, backend="reference"), strict=True):
        assert torch.equal(value, expected)


def test_any_strides():
    a, b, bias, upstream, offsets = problem([20, 0, 13], 18, 21, after=3, integers=True)
    expected = evaluate(a, b, bias, upstream, offsets, backend="reference")
    wide_b = b.repeat_interleave(2, 2)
    variants = {
        "transposed matrices": (a, b.transpose(1, 2).contiguous().transpose(1, 2), bias, upstream),
        "transposed rows": (a.T.contiguous().T, b, bias, upstream.T.contiguous().T),
        "parts of rows": (torch.cat([a, a], 1)[:, : a.shape[1]], b, torch.cat([bias, bias], 1)[:, :21], upstream),
        "every other number": (a.repeat_interleave(2, 1)[:, ::2], wide_b[..., ::2], bias, upstream),
    }
    for name, inputs in variants.items():
        for value, truth in zip(evaluate(*inputs, offsets), expected, strict=True):
            assert torch.equal(value, truth), name


def test_expanded_tensors():
    a, b, bias, upstream, offsets = problem([5, 8, 2], 6, 4, integers=True)
    shared, ones = b[:1].expand(3, -1, -1), torch.ones((), device=DEVICE).expand_as(upstream)
    found = evaluate(a, shared, bias, ones, offsets)
    expected = evaluate(a, shared, bias, ones, offsets, backend="reference")
    assert all(torch.equal(value, truth) for value, truth in zip(found, expected, strict=True))


def test_strides_beyond_32_bits():
    """Rows and matrices that lie more than 2^31 numbers apart, in memory of which only their pages are touched."""
    if DEVICE == "cuda":
        pytest.skip("a GPU maps all of its memory")
    far = 2**31 + 40
    space = torch.empty(2 * far + 4096, dtype=torch.bfloat16)
    a, b, _, upstream, offsets = problem([1, 1, 1], 4, 6, torch.bfloat16, integers=True)
    far_a, far_g = space.as_strided((3, 4), (far, 1)), space.as_strided((3, 6), (far, 1), 64)
    far_b = space.as_strided((3, 4, 6), (far, 6, 1), 1024)
    for to, source in ((far_a, a), (far_g, upstream), (far_b, b)):
        to.copy_(source)
    expected = grouped_matmul(a, b, offsets, backend="reference")
    # Interpreted, kernels work on copies of whole storages, so the kernels' addresses are computed, not followed.
    assert torch.equal(grouped_matmul(far_a, far_b, offsets, backend="triton"), expected)


def test_second_derivatives():
    *tensors, offsets = problem([3, 0, 4], 4, 5, after=1)
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.double() if backend == "reference" else t for t in tensors]
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = grouped_matmul(leaves[0], leaves[1], offsets, leaves[2], backend=backend)
        first = torch.autograd.grad(out, leaves[:3], leaves[3], create_graph=True)
        total = sum((each * torch.ones_like(each).cumsum(-1)).sum() for each in first)
        results.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
    for value, truth in zip(*results, strict=True):
        assert relative_error(value, truth) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("bad", [[0, 2, 99], [-5, 2, 3], [0, 4, 2]], ids=str)
def test_offsets_that_do_not_fit_address_no_other_memory(bad):
    """Offsets on a GPU are not read in advance: a row is at worst in another group."""
    from contrastive_ops.kernels import grouped_matmul as launchers

    a, b, _, upstream, _ = problem([2, 3], 4, 6, integers=True)
    offsets = torch.tensor(bad, device=DEVICE)
    assert launchers.forward(a, b, offsets, None, None, None).shape == (5, 6)
    assert launchers.outer(a, upstream, offsets, None, None, False, True, True)[0].shape == (2, 4, 6)


# ---- Tokens of a routing ---------------------------------------------------------------------------------------------

ROUTERS = {
    "one choice": lambda z: route(z, 1),
    "two choices": lambda z: route(z, 2),
    "dropping": lambda z: route(z, 2, capacity=Capacity(factor=0.3)),
    "padded": lambda z: route(z, 2, capacity=Capacity(factor=1.5, padded=True)),
    "empty experts": lambda z: route(z.index_fill(1, torch.tensor([0, 2]), -torch.inf), 1),
    "padded expert choice": lambda z: expert_choice(z, Capacity(factor=1.2, padded=True)),
}


def routed(router, tokens, depth, columns, dtype=torch.float32, integers=False):
    """A routing to four experts, tokens, matrices that are stored as (E, F, D), biases and an upstream gradient."""
    routing = ROUTERS[router](torch.randn(tokens, 4))
    places = {name: getattr(routing, name).to(DEVICE) for name in ("slots", "order", "offsets")}
    shapes = ((tokens, depth), (4, columns, depth), (4, columns), (len(routing.order), columns))
    draw = (lambda shape: torch.randint(-2, 3, shape)) if integers else torch.randn
    return dataclasses.replace(routing, **places), *(draw(shape).to(DEVICE, dtype) for shape in shapes)


def evaluate_routed(routing, x, b, bias, upstream, backend="triton", transposed=True, copies=False):
    """The output and the gradients of tokens, matrices and biases."""
    leaves = [t.detach().requires_grad_() for t in (x, b if transposed else b.transpose(1, 2).contiguous(), bias)]
    matrices = leaves[1].transpose(1, 2) if transposed else leaves[1]
    rows = dispatch(leaves[0], routing, backend=backend) if copies else leaves[0]
    out = grouped_matmul(rows, matrices, routing.offsets if copies else routing, leaves[2], backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("router, transposed", [(name, i % 2 == 1) for i, name in enumerate(ROUTERS)])
def test_tokens_of_a_routing_are_their_dispatched_rows(router, transposed):
    """Also to the bit: the same products are added in the same order."""
    inputs = routed(router, 20, 18, 5)
    found = evaluate_routed(*inputs, transposed=transposed)
    assert all(map(torch.equal, found, evaluate_routed(*inputs, transposed=transposed, copies=True)))
    exact = routed(router, 20, 18, 5, torch.bfloat16, integers=True)
    found = evaluate_routed(*exact, transposed=transposed)
    assert all(map(torch.equal, found, evaluate_routed(*exact, "reference", transposed)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_a_routing_against_float64(dtype):
    routing, *tensors = routed("padded", 40, 33, 18, dtype)
    found = evaluate_routed(routing, *tensors)
    truth = evaluate_routed(routing, *(t.double() for t in tensors), backend="reference")
    for value, expected in zip(found, truth, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, expected) <= TOLERANCE[dtype]


def test_dropped_tokens_reach_nothing():
    routing, x, *others = routed("dropping", 40, 17, 5)
    dropped = ~routing.kept.any(1)
    assert dropped.any()
    clean = evaluate_routed(routing, x, *others)
    x[dropped] = torch.nan
    found = evaluate_routed(routing, x, *others)
    assert all(map(torch.equal, found, clean)) and (found[1][dropped] == 0).all()


def test_any_strides_of_tokens():
    routing, x, *others = routed("padded", 20, 18, 5, integers=True)
    for tokens in (
        x.T.contiguous().T,
        torch.cat([x, x], 1)[:, :18],
        x.repeat_interleave(2, 1)[:, ::2],
        x[:1].expand_as(x),
    ):
        found = evaluate_routed(routing, tokens, *others)
        assert all(map(torch.equal, found, evaluate_routed(routing, tokens.contiguous(), *others, "reference")))


def test_second_derivatives_of_tokens():
    routing, *tensors = routed("padded", 9, 4, 5)
    results = []
    for backend in ("triton", "reference"):
        leaves = [t.double() if backend == "reference" else t for t in tensors]
        leaves = [t.detach().requires_grad_() for t in leaves]
        out = grouped_matmul(leaves[0], leaves[1].transpose(1, 2), routing, leaves[2], backend=backend)
        first = torch.autograd.grad(out, leaves[:3], leaves[3], create_graph=True)
        total = sum((each * torch.ones_like(each).cumsum(-1)).sum() for each in first)
        results.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
    for value, truth in zip(*results, strict=True):
        assert relative_error(value, truth) <= TOLERANCE[torch.float32]


def test_no_tokens():
    inputs = routed("padded", 0, 6, 5)
    assert all(map(torch.equal, evaluate_routed(*inputs), evaluate_routed(*inputs, "reference")))


@pytest.mark.parametrize("bad", [74, -2, 2**62, -(2**62)])
def test_an_order_that_does_not_fit_addresses_no_other_memory(bad):
    """A choice that does not exist is read as none."""
    from contrastive_ops.kernels import grouped_matmul as launchers

    routing, x, b, bias, upstream = routed("two choices", 37, 4, 6)
    wrong, none = routing.order.clone(), routing.order.clone()
    wrong[[3, -1]], none[[3, -1]] = bad, -1
    places = [(routing.slots, order) for order in (wrong, none)]
    found = [launchers.forward(x, b.transpose(1, 2), routing.offsets, bias, *each) for each in places]
    assert torch.equal(*found)
    found = [launchers.outer(x, upstream, routing.offsets, *each, True, True, False)[0] for each in places]
    assert torch.equal(*found)
