"""grouped_matmul: values and derivatives against a loop over the groups, rows of no group, exactness, invariance.

Products of small integers are exact in any order of summation and in 16 bits, so backends are compared bit by bit.
"""

import itertools

import pytest
import torch
import torch._dynamo.testing

from contrastive_ops.ops import grouped_matmul
from contrastive_ops.testing import TOLERANCE, relative_error, saved_bytes
from contrastive_ops.testing.compare import check_derivatives

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FORWARD = torch.ops.contrastive_ops.grouped_matmul_forward
OUTER = torch.ops.contrastive_ops.grouped_matmul_outer


def outer(a, g, offsets, *options):
    return OUTER(a, g, offsets, None, None, False, *options)


def loop(a, b, offsets, bias=None):
    """The definition in the docstring, out of pieces that autograd follows; what is not used has a gradient of zero."""
    bounds = offsets.tolist()
    pieces = [a.new_zeros(bounds[0], b.shape[2])]
    for e, (begin, end) in enumerate(itertools.pairwise(bounds)):
        product = a[begin:end] @ b[e]
        pieces.append(product if bias is None else product + bias[e])
    pieces.append(a.new_zeros(a.shape[0] - bounds[-1], b.shape[2]))
    unused = sum(t.flatten()[:0].sum() for t in (a, b, bias) if t is not None)
    return torch.cat(pieces) + unused


def problem(sizes, depth, columns, dtype=torch.float32, before=0, after=0, integers=False):
    """Random a, b, bias, upstream gradient and the offsets of groups of these sizes between rows of no group."""
    offsets = torch.tensor([before, *sizes]).cumsum(0)
    rows, groups = int(offsets[-1]) + after, len(sizes)
    shapes = ((rows, depth), (groups, depth, columns), (groups, columns), (rows, columns))
    if integers:
        tensors = [torch.randint(-2, 3, shape).to(dtype) for shape in shapes]
    else:
        tensors = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    return *tensors, offsets


def evaluate(function, a, b, bias, upstream, offsets):
    """The output and the gradients of a, b and bias."""
    leaves = [t.detach().requires_grad_() for t in (a, b, bias)]
    out = function(leaves[0], leaves[1], offsets, leaves[2])
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def on(backend):
    return lambda *arguments: grouped_matmul(*arguments, backend=backend)


# Group sizes, depth, columns: blocks, tiles and vectors that end early, none at all, and one number.
SHAPES = [
    ([1], 1, 1),
    ([3, 0, 5], 7, 9),
    ([0, 0, 33, 1, 0], 64, 32),
    ([129, 7], 70, 130),
    ([600, 40], 33, 17),
    ([40, 9], 1100, 70),
    ([12, 4], 530, 1050),
    ([1100], 20, 3),
]


# ---- Values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_a_loop(shape, dtype, backend):
    inputs = problem(*shape, dtype, before=3, after=5)
    found = evaluate(on(backend), *inputs)
    truth = evaluate(loop, *(t.double() for t in inputs[:-1]), inputs[-1])
    for value, expected in zip(found, truth, strict=True):
        assert value.dtype == dtype
        assert relative_error(value, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_integers_are_exact(shape, dtype, backend):
    inputs = problem(*shape, torch.float64, before=3, after=5, integers=True)
    truth = evaluate(loop, *inputs)
    found = evaluate(on(backend), *(t.to(dtype) for t in inputs[:-1]), inputs[-1])
    for value, expected in zip(found, truth, strict=True):
        assert torch.equal(value, expected.to(dtype))


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_every_subset_of_inputs_may_require_a_gradient(needs, backend):
    *tensors, upstream, offsets = problem([4, 0, 6], 5, 8, torch.float64, after=2)
    results = []
    for function in (on(backend), loop):
        a, b, bias = (t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True))
        out = function(a, b, offsets, bias)
        assert out.requires_grad == any(needs)
        if out.requires_grad:
            out.backward(upstream)
        results.append((a.grad, b.grad, bias.grad))
    for value, expected, need in zip(*results, needs, strict=True):
        assert (value is not None) == need
        if need:
            torch.testing.assert_close(value, expected)


def test_without_bias(backend):
    a, b, _, upstream, offsets = problem([4, 0, 6], 5, 8, torch.float64, after=2)
    leaves = [t.requires_grad_() for t in (a, b)]
    results = []
    for function in (on(backend), loop):
        out = function(a, b, offsets)
        results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck_and_gradgradcheck(bias, backend):
    a, b, c, _, offsets = problem([2, 0, 3], 3, 2, torch.float64, before=1, after=1)
    leaves = [t.requires_grad_() for t in ((a, b, c) if bias else (a, b))]

    def function(a, b, c=None):
        return grouped_matmul(a, b, offsets, c, backend=backend)

    check_derivatives(function, leaves)


@pytest.mark.parametrize("name", ["a", "b", "bias"])
def test_second_derivative_by_one_input(name, backend):
    """The derivative of each gradient by everything it depends on, where the other gradients are not asked for."""
    *tensors, upstream, offsets = problem([3, 0, 4], 4, 5, torch.float64, after=1)
    results = []
    for function in (on(backend), loop):
        leaves = [t.detach().requires_grad_() for t in (*tensors, upstream)]
        which = leaves[["a", "b", "bias"].index(name)]
        out = function(leaves[0], leaves[1], offsets, leaves[2])
        (first,) = torch.autograd.grad(out, which, leaves[3], create_graph=True)
        results.append(
            torch.autograd.grad(first, leaves, torch.arange(1.0, first.numel() + 1).double().view_as(first),
                                allow_unused=True, materialize_grads=True)
        )  # fmt: skip
    torch.testing.assert_close(*results)


def test_expanded_gradient(backend):
    a, b, bias, upstream, offsets = problem([4, 6], 5, 8)
    leaves = [t.requires_grad_() for t in (a, b, bias)]
    got = torch.autograd.grad(grouped_matmul(a, b, offsets, bias, backend=backend).sum(), leaves)
    expected = evaluate(on(backend), a, b, bias, torch.ones_like(upstream), offsets)[1:]
    for value, truth in zip(got, expected, strict=True):
        assert torch.equal(value, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, backend):
    a, b, bias, upstream, offsets = problem([40, 0, 25], 33, 70, dtype, after=3, integers=True)
    expected = evaluate(on(backend), a, b, bias, upstream, offsets)
    wide_a, wide_b = a.repeat_interleave(2, 1), b.repeat_interleave(2, 2)
    variants = {
        "transposed matrices": (a, b.transpose(1, 2).contiguous().transpose(1, 2), bias, upstream),
        "transposed rows": (a.T.contiguous().T, b, bias, upstream.T.contiguous().T),
        "parts of rows": (torch.cat([a, a], 1)[:, : a.shape[1]], torch.cat([b, b], 2)[..., : b.shape[2]], bias,
                          torch.cat([upstream, upstream], 1)[:, : upstream.shape[1]]),
        "every other number": (wide_a[:, ::2], wide_b[..., ::2], bias.repeat_interleave(2, 1)[:, ::2], upstream),
    }  # fmt: skip
    for name, inputs in variants.items():
        found = evaluate(on(backend), *inputs, offsets)
        for value, truth in zip(found, expected, strict=True):
            assert torch.equal(value, truth), name


def test_one_matrix_for_all_groups(backend):
    a, b, _, _, offsets = problem([5, 8, 2], 6, 4, torch.float64)
    shared = b[:1].expand(3, -1, -1)
    torch.testing.assert_close(grouped_matmul(a, shared, offsets, backend=backend), a @ b[0])


# ---- Rows of no group, groups without rows ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_no_group_are_zero_and_reach_nothing(dtype, backend):
    a, b, bias, upstream, offsets = problem([40, 0, 25], 33, 70, dtype, before=2, after=600)
    clean = evaluate(on(backend), a, b, bias, upstream, offsets)
    outside = torch.ones(len(a), dtype=torch.bool)
    outside[2:67] = False
    a[outside], upstream[outside] = torch.nan, torch.inf
    found = evaluate(on(backend), a, b, bias, upstream, offsets)
    for value, expected in zip(found, clean, strict=True):
        assert torch.equal(value, expected)
    assert (found[0][outside] == 0).all() and (found[1][outside] == 0).all()
    assert (found[2][1] == 0).all() and (found[3][1] == 0).all()


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("depth", [0, 4])
@pytest.mark.parametrize("columns", [0, 5])
def test_empty_dimensions(rows, groups, depth, columns, backend):
    sizes = [rows] + [0] * (groups - 1) if groups else []
    inputs = problem(sizes, depth, columns, torch.float64, after=0 if groups else rows)
    for value, expected in zip(evaluate(on(backend), *inputs), evaluate(loop, *inputs), strict=True):
        torch.testing.assert_close(value, expected)


def test_nan_and_infinity_stay_in_their_rows(backend):
    a, b, bias, _, offsets = problem([9, 9], 5, 8)
    a[3, 0], a[12, 1] = torch.nan, torch.inf
    out = grouped_matmul(a, b, offsets, bias, backend=backend)
    assert out[3].isnan().all() and out[12].isinf().all()
    assert out[[i for i in range(18) if i not in (3, 12)]].isfinite().all()


# ---- Invariance ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, threads):
    inputs = problem([530, 0, 3, 77], 300, 600, dtype, after=9)
    first = None
    for count in (1, 2, 3, 16, 2):
        threads(count)
        found = evaluate(on("cpu"), *inputs)
        first = first or found
        assert all(torch.equal(value, expected) for value, expected in zip(found, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_group(dtype):
    a, b, bias, _, offsets = problem([600], 700, 170, dtype)
    whole = grouped_matmul(a, b, offsets, bias, backend="cpu")
    for begin, end in ((0, 1), (1, 8), (5, 38), (590, 600)):
        alone = grouped_matmul(a[begin:end], b, torch.tensor([0, end - begin]), bias, backend="cpu")
        assert torch.equal(alone, whole[begin:end])


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_only_what_backward_reads_is_kept(backend):
    a, b, bias, _, offsets = problem([64, 64], 32, 48)
    size = {"a": a.nbytes, "b": b.nbytes}
    for names in (("a",), ("b",), ("a", "b")):
        x, y = a.detach().requires_grad_("a" in names), b.detach().requires_grad_("b" in names)
        kept, _ = saved_bytes(lambda x=x, y=y: grouped_matmul(x, y, offsets, bias, backend=backend))
        others = {"a": "b", "b": "a"}
        assert kept == offsets.nbytes + sum(size[others[name]] for name in names)


def test_strides_beyond_32_bits(backend):
    """Rows and matrices that lie more than 2^31 numbers apart, in memory of which only their pages are touched."""
    far = 2**31 + 40
    space = torch.empty(2 * far + 4096, dtype=torch.bfloat16)
    a, b, _, upstream, offsets = problem([1, 1, 1], 4, 6, torch.bfloat16, integers=True)
    far_a, far_g = space.as_strided((3, 4), (far, 1)), space.as_strided((3, 6), (far, 1), 64)
    far_b = space.as_strided((3, 4, 6), (far, 6, 1), 1024)
    for to, source in ((far_a, a), (far_g, upstream), (far_b, b)):
        to.copy_(source)
    out = grouped_matmul(far_a, far_b, offsets, backend=backend)
    assert torch.equal(out, grouped_matmul(a, b, offsets, backend=backend))
    found, expected = (outer(x, g, offsets, True, True, backend) for x, g in ((far_a, far_g), (a, upstream)))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.slow
def test_outputs_beyond_32_bits():
    """Of the reference torch takes the addresses."""
    rows, columns = 2**16 + 2, 2**15
    bias = torch.randn(2, columns, dtype=torch.bfloat16)
    a, b = torch.empty(rows, 0, dtype=torch.bfloat16), torch.empty(2, 0, columns, dtype=torch.bfloat16)
    out = grouped_matmul(a, b, torch.tensor([0, 2**16, 2**16 + 1]), bias, backend="cpu")
    assert torch.equal(out[0], bias[0]) and torch.equal(out[2**16], bias[1]) and (out[-1] == 0).all()


# ---- Autocast, compilation -------------------------------------------------------------------------------------------


def test_autocast_is_the_product_of_bfloat16_inputs(backend):
    inputs = problem([5, 0, 8], 6, 4)
    rounded = [t.bfloat16() for t in inputs[:-1]]

    def region(*arguments):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return grouped_matmul(*arguments, backend=backend)

    upstream = rounded[3]
    found = evaluate(region, *inputs[:3], upstream, inputs[-1])
    expected = evaluate(on(backend), *rounded, inputs[-1])
    assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    for value, truth in zip(found, expected, strict=True):
        assert torch.equal(value, truth.to(value.dtype))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_forward(bias, backend):
    a, b, c, _, offsets = problem([2, 0, 3], 3, 4, torch.float64, after=1)
    leaves = [t.requires_grad_() for t in (a, b, c)]
    arguments = (leaves[0], leaves[1], offsets, leaves[2] if bias else None, None, None, backend)
    torch.library.opcheck(FORWARD, arguments)


@pytest.mark.parametrize("wants", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_outer(transposed, wants, backend):
    a, _, _, upstream, offsets = problem([2, 0, 3], 3, 4, torch.float64, after=1)
    tensors = (a.requires_grad_(), upstream.requires_grad_(), offsets, None, None)
    torch.library.opcheck(OUTER, (*tensors, transposed, *wants, backend))


def test_compiles_without_graph_break_or_recompilation(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def function(a, b, bias, offsets):
        return grouped_matmul(a, b.transpose(1, 2), offsets, bias, backend=backend).square().sum()

    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=None)
    for sizes in ([5, 0, 8], [9, 3, 1], [20, 30, 40], [1, 1, 100]):
        a, b, bias, _, offsets = problem(sizes, 6, 4, after=2)
        leaves = [t.requires_grad_() for t in (a, b.transpose(1, 2).contiguous(), bias)]
        torch._dynamo.maybe_mark_dynamic(a, 0)
        value, expected = compiled(*leaves, offsets), function(*leaves, offsets)
        torch.testing.assert_close(value, expected)
        got, truth = (torch.autograd.grad(v, leaves) for v in (value, expected))
        torch.testing.assert_close(got, truth)
    assert counter.frame_count == 1


def test_meta_tensors():
    a, b, bias, _, offsets = (t.to("meta") for t in problem([2, 3], 4, 6, torch.bfloat16, after=1))
    leaves = [t.requires_grad_() for t in (a, b, bias)]
    out = grouped_matmul(a, b, offsets, bias)
    assert out.shape == (6, 6) and out.dtype == torch.bfloat16 and out.device.type == "meta"
    for gradient, leaf in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype


# ---- Bad input -------------------------------------------------------------------------------------------------------

GOOD = {"a": torch.zeros(5, 3), "b": torch.zeros(2, 3, 4), "offsets": torch.tensor([0, 2, 5]), "bias": None}
BAD = {
    "a is a list": ({"a": [1.0]}, TypeError, "a must be a tensor, got list"),
    "a of integers": ({"a": torch.zeros(5, 3, dtype=torch.int64)}, TypeError, "a must be float32"),
    "a of one dimension": ({"a": torch.zeros(5)}, ValueError, "a must have two dimensions"),
    "b is a list": ({"b": [1.0]}, TypeError, "b must be a tensor, got list"),
    "b of two dimensions": ({"b": torch.zeros(3, 4)}, ValueError, r"b must have shape \(E, 3, F\)"),
    "b stored the other way": ({"b": torch.zeros(2, 4, 3)}, ValueError, r"weight.transpose\(1, 2\)"),
    "b of another dtype": ({"b": torch.zeros(2, 3, 4).double()}, TypeError, "b must have the same dtype as a"),
    "b elsewhere": ({"b": torch.zeros(2, 3, 4, device="meta")}, ValueError, "b must be on the same device as a"),
    "bias of another shape": ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(2, 4\), got \(4,\)"),
    "bias of another dtype": ({"bias": torch.zeros(2, 4).half()}, TypeError, "bias must have the same dtype as a"),
    "offsets of float32": ({"offsets": torch.tensor([0.0, 2, 5])}, TypeError, "offsets must be int64"),
    "offsets without the first": ({"offsets": torch.tensor([2, 5])}, ValueError, r"offsets must have shape \(3,\)"),
    "offsets that descend": ({"offsets": torch.tensor([0, 3, 2])}, ValueError, "got 2 at index 2 after 3"),
    "offsets below 0": (
        {"offsets": torch.tensor([-1, 3, 5])},
        ValueError,
        "got -1 at index 0",
    ),
    "offsets past the end": ({"offsets": torch.tensor([0, 3, 6])}, ValueError, r"ascend within \[0, 5\], got 6"),
    "unknown backend": ({"backend": "fast"}, ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=f"grouped_matmul: .*{message}" if "weight" not in message else message):
        grouped_matmul(**{**GOOD, **change})


def test_the_compiled_functions_protect_memory():
    """They check what addresses memory once more, for a graph may run on other offsets than it was traced with."""
    from contrastive_ops.core import extension

    if extension.why_missing() is not None:
        pytest.skip(extension.why_missing())
    functions = extension.functions("grouped_matmul")
    a, b, g = torch.zeros(5, 3), torch.zeros(2, 3, 4), torch.zeros(5, 4)
    for bad in ([0, 2, 6], [0, 4, 2], [-1, 0, 1], [0, 2]):
        with pytest.raises(ValueError):
            functions.forward(a, b, torch.tensor(bad), None, None, None)
        if len(bad) == 3:
            with pytest.raises(ValueError):
                functions.outer(a, g, torch.tensor(bad), None, None, False, True, True)
    with pytest.raises(ValueError):
        functions.forward(a, b.transpose(1, 2), torch.tensor([0, 2, 5]), None, None, None)
    with pytest.raises(TypeError):
        functions.forward(a, b.double(), torch.tensor([0, 2, 5]), None, None, None)
    with pytest.raises(ValueError):
        functions.forward(a, b, torch.tensor([0, 2, 5]), torch.zeros(2, 3), None, None)
    with pytest.raises(ValueError):
        functions.outer(a, g[:4], torch.tensor([0, 2, 4]), None, None, False, True, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_that_go_past_the_caches(dtype):
    """16 MiB and more are stored in whole lines where these are aligned; at the ends of rows and groups as others."""
    columns = 1024 if dtype == torch.float32 else 2048
    for width in (columns, columns + 5):
        a, b = torch.randint(-3, 4, (4210, 3)), torch.randint(-3, 4, (2, 3, width))
        offsets = torch.tensor([7, 1500, 4203])
        out = grouped_matmul(a.to(dtype), b.to(dtype), offsets)
        expected = torch.zeros(4210, width, dtype=torch.int64)
        for begin, end, matrix in ((7, 1500, b[0]), (1500, 4203, b[1])):
            expected[begin:end] = a[begin:end] @ matrix
        assert out.numel() * out.element_size() >= 2**24 and torch.equal(out.long(), expected)
