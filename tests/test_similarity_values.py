"""similarity_values: sums and derivatives against dense formulas, exclusions, edges, bits, registration."""

import os
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing

from contrastive_ops import Pairs
from contrastive_ops.ops import Guide, similarity_values
from contrastive_ops.reference import similarity_values as reference
from contrastive_ops.testing import TOLERANCE, relative_error, saved_bytes
from contrastive_ops.testing.compare import check, check_derivatives, leaf, number

INF = float("inf")
FORWARD = torch.ops.contrastive_ops.similarity_values_forward
BACKWARD = torch.ops.contrastive_ops.similarity_values_backward
SIZES = ((7, 9, 3), (70, 137, 40), (530, 131, 7))  # several blocks and chunks, columns past the last whole vector


def sums_of(x, y, values, keep=None, scale=1.0, col_bias=0.0):
    """As the docstring says, 0 in rows in which no pair takes part."""
    logits = (scale[:, None] if isinstance(scale, torch.Tensor) and scale.dim() else scale) * (x @ y.T) + col_bias
    if keep is None:
        return logits.softmax(1) @ values
    some = keep.any(1, keepdim=True)
    weights = logits.masked_fill(~keep & some, -INF).softmax(1)
    return weights.masked_fill(~keep, 0.0) @ values


def drawn(n, m, width=4, depth=6, dtype=torch.float64):
    return leaf(n, depth, dtype=dtype), leaf(m, depth, dtype=dtype), leaf(m, width, dtype=dtype)


def rules(n, m):
    ids, col_ids = torch.arange(n) % 4, torch.arange(m) % 4
    equal = ids[:, None] == col_ids
    own = torch.arange(n)[:, None] + 1 == torch.arange(m)
    listed = torch.rand(n, m) < 0.3
    listed[2] = True
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    return {
        "none": (None, torch.ones(n, m, dtype=torch.bool)),
        "diagonal": (Pairs(diagonal=1), ~own),
        "same": (Pairs(same=(ids, col_ids), diagonal=1), equal & ~own),
        "exclude": (Pairs(exclude=(indptr, listed.nonzero()[:, 1])), ~listed),
    }


@pytest.mark.parametrize("rule", ["none", "diagonal", "same", "exclude"])
@pytest.mark.parametrize("n,m,width", SIZES)
def test_sums_and_gradients(n, m, width, rule, backend):
    x, y, values = drawn(n, m, width)
    scale, bias = number(0.9), leaf(m)
    pairs, keep = rules(n, m)[rule]
    got = similarity_values(x, y, values, scale=scale, col_bias=bias, pairs=pairs, backend=backend)
    check(got, sums_of(x, y, values, keep, scale, bias), [x, y, values, scale, bias])


def test_bounds_and_a_guide(backend):
    x, y, values = drawn(40, 50)
    guides = [torch.randn(k, 3, dtype=torch.float64) for k in (40, 50)]
    pairs = Pairs(below=2.0, above=-3.0, guide=Guide(*guides, 1.5))
    similarity = x @ y.T
    keep = (similarity <= 2.0) & (similarity >= -3.0) & (guides[0] @ guides[1].T <= 1.5)
    check(similarity_values(x, y, values, pairs=pairs, backend=backend), sums_of(x, y, values, keep), [x, y, values])


def test_scales_of_rows(backend):
    (x, y, values), scale = drawn(9, 13), leaf(9)
    check(
        similarity_values(x, y, values, scale=scale, backend=backend),
        sums_of(x, y, values, scale=scale),
        [x, y, values, scale],
    )


def test_values_are_the_columns_themselves(backend):
    x, y, _ = drawn(9, 13)
    check(similarity_values(x, y, scale=2.0, backend=backend), sums_of(x, y, y, scale=2.0), [x, y])
    keep = ~torch.eye(9, dtype=torch.bool)
    check(similarity_values(x, None, pairs=Pairs(diagonal=0), backend=backend), sums_of(x, x, x, keep), [x])


def test_soft_assignment_by_distance(backend):
    """What the docstring promises for squared distances."""
    x, codebook, _ = drawn(30, 8)
    expected = (-torch.cdist(x, codebook).square() / 0.3).softmax(1) @ codebook
    bias = -codebook.square().sum(1) / 0.3
    got = similarity_values(x, codebook, scale=2 / 0.3, col_bias=bias, backend=backend)
    check(got, expected, [x, codebook])


def test_derivatives_by_differences(backend):
    (x, y, values), scale, bias = drawn(5, 4, depth=3), number(0.8), leaf(4)

    def function(x, y, values, scale, bias):
        pairs = Pairs(diagonal=0)
        return similarity_values(x, y, values, scale=scale, col_bias=bias, pairs=pairs, backend=backend)

    check_derivatives(function, (x, y, values, scale, bias))


def test_second_derivatives_in_chunks(monkeypatch):
    (x, y, values), scale = drawn(7, 4, depth=3), number(0.8)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 8)

    def function(x, y, values, scale):
        return similarity_values(x, y, values, scale=scale)

    assert torch.autograd.gradgradcheck(function, (x, y, values, scale), fast_mode=True)


@pytest.mark.parametrize("wanted", ["x", "y", "values", "scale", "col_bias"])
def test_every_gradient_alone(wanted, backend):
    x, y, values = drawn(8, 150)
    inputs = {"x": x, "y": y, "values": values, "scale": number(1.3), "col_bias": leaf(150)}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == wanted)
    x, y, values, scale, bias = inputs.values()
    got = similarity_values(x, y, values, scale=scale, col_bias=bias, backend=backend)
    check(got, sums_of(x, y, values, None, scale, bias), [inputs[wanted]])


# ---- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, backend):
    narrow = [torch.nn.functional.normalize(torch.randn(k, 64), dim=1).to(dtype) for k in (200, 300)]
    narrow.append(torch.randn(300, 24).to(dtype))
    exact = [t.double().requires_grad_() for t in narrow]
    narrow = [t.requires_grad_() for t in narrow]
    truth = sums_of(*exact, scale=20.0)
    got = similarity_values(*narrow, scale=20.0, backend=backend)
    assert got.dtype == torch.float32
    limit = TOLERANCE[torch.float32] * 10 if dtype == torch.float32 else 5e-3
    assert relative_error(got, truth) <= limit
    cotangent = torch.randn(200, 24).to(dtype)
    for a, b in zip(
        torch.autograd.grad(got, narrow, cotangent.float()),
        torch.autograd.grad(truth, exact, cotangent.double()),
        strict=True,
    ):
        assert a.dtype == dtype and relative_error(a, b) <= limit


def test_equal_values_leave_no_gradient_by_logits(backend):
    """t - mean is 0: what differs is only rounding."""
    x, y, _ = drawn(40, 60, dtype=torch.float32)
    same = torch.full((60, 5), 2.0)
    got = similarity_values(x, y, same, scale=3.0, backend=backend)
    torch.testing.assert_close(got, torch.full((40, 5), 2.0))
    for gradient in torch.autograd.grad(got.sum(), (x, y)):
        assert gradient.abs().max() < 1e-4


def test_extreme_logits(backend):
    """A row with one winner returns the winner's value, whatever the size of the logits."""
    x, y, values = (t.detach() for t in drawn(33, 40, dtype=torch.float32))
    winner = (x @ y.T).argmax(1)
    x = x.requires_grad_()
    got = similarity_values(x, y, values, scale=1e6, backend=backend)
    torch.testing.assert_close(got, values[winner], rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(got.sum(), x)[0].isfinite().all()


# ---- What takes no part ----------------------------------------------------------------------------------------------


def test_rows_without_a_pair(backend):
    x, y, values = drawn(12, 300, dtype=torch.float32)
    ids, cols = torch.arange(12) % 3, torch.arange(300) % 2  # rows of id 2 have no partner
    got = similarity_values(x, y, values, pairs=Pairs(same=(ids, cols)), backend=backend)
    assert not got[2::3].any() and got[::3].all()
    gradients = torch.autograd.grad(got.square().sum(), (x, y, values))
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][2::3].any()


def test_columns_of_bias_minus_infinity_take_no_part(backend):
    x, y, values = drawn(20, 30)
    bias = torch.zeros(30, dtype=torch.float64)
    bias[::3] = -INF
    keep = (bias == 0).expand(20, 30)
    check(similarity_values(x, y, values, col_bias=bias, backend=backend), sums_of(x, y, values, keep), [x, y, values])
    everything = torch.full((30,), -INF, dtype=torch.float64)
    nothing = similarity_values(x, y, values, col_bias=everything, backend=backend)
    assert torch.equal(nothing, torch.zeros_like(nothing))
    assert not any(g.any() for g in torch.autograd.grad(nothing.sum(), (x, y, values)))


def test_nan_stays_in_its_row(backend):
    x, y, values = drawn(20, 300)
    x = x.detach().clone()
    x[3, 1] = torch.nan
    x.requires_grad_()
    got = similarity_values(x, y, values, backend=backend)
    assert got.isnan().any(1).nonzero().flatten().tolist() == [3]
    (dx,) = torch.autograd.grad(got.sum(), x)
    assert dx[3].isnan().any() and dx[4].isfinite().all()


@pytest.mark.parametrize(
    "n,m,width,depth", [(0, 5, 2, 3), (5, 0, 2, 3), (0, 0, 2, 3), (1, 1, 1, 1), (4, 5, 0, 3), (4, 5, 2, 0)]
)
def test_no_rows_columns_or_dimensions(n, m, width, depth, backend):
    x, y, values = drawn(n, m, width, depth, torch.float32)
    got = similarity_values(x, y, values, backend=backend)
    assert got.shape == (n, width)
    if m:
        torch.testing.assert_close(got, sums_of(x, y, values))
    else:
        assert not got.any()
    gradients = torch.autograd.grad(got.sum(), (x, y, values))
    assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(gradients, (x, y, values), strict=True))


# ---- Layouts and dtypes ----------------------------------------------------------------------------------------------


def test_strided_matrices(backend):
    given = [t.detach() for t in drawn(20, 30)]
    expected = similarity_values(*given, backend=backend)
    views = [torch.stack([t, t], 2).flatten(1)[:, ::2] for t in given]
    transposed = [t.T.contiguous().T for t in given]
    for other in (views, transposed):
        torch.testing.assert_close(similarity_values(*other, backend=backend), expected)


def test_values_of_another_dtype(backend):
    x, y, _ = drawn(20, 30, dtype=torch.bfloat16)
    values = torch.randn(30, 4, requires_grad=True)
    got = similarity_values(x, y, values, backend=backend)
    assert got.dtype == torch.float32
    assert torch.equal(got, similarity_values(x.float(), y.float(), values, backend=backend))
    gradients = torch.autograd.grad(got.sum(), (x, y, values))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_autocast(backend):
    x, y, values = drawn(20, 30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = similarity_values(x, y, values, backend=backend)
        gradients = torch.autograd.grad(got.sum(), (x, y, values))
    assert got.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradients)
    assert torch.equal(got, similarity_values(*(t.bfloat16() for t in (x, y, values)), backend=backend))


# ---- Determinism, memory ---------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype, threads):
    (x, y, values), scale = drawn(1100, 700, 33, 70, dtype), torch.tensor(0.5, requires_grad=True)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        options = {"scale": scale, "pairs": Pairs(diagonal=0), "memory_budget": 1 << 20, "backend": "cpu"}
        got = similarity_values(x, y, values, **options)
        upstream = torch.linspace(-1, 1, got.numel()).view_as(got)
        results.append([got.detach(), *torch.autograd.grad(got, (x, y, values, scale), upstream)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("budget", [1 << 20, 1 << 40])
def test_kept_products_change_no_bit(budget):
    x, y, values = drawn(1100, 300, 5, 130, torch.float32)
    results = []
    for allowed in (0, budget):
        got = similarity_values(x, y, values, pairs=Pairs(below=9.0), memory_budget=allowed, backend="cpu")
        results.append([got.detach(), *torch.autograd.grad(got.square().sum(), (x, y, values))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_budget_bounds_what_is_kept(backend):
    x, y, values = drawn(1000, 900, 8, 128, torch.float32)
    tensors = sum(t.numel() * t.element_size() for t in (x, y, values))
    results, whole = 4 * 1000 * 9, 4 * (1000 + 32) * (900 + 128)
    for budget, kept in ((0, 0), (1 << 20, 1 << 20), (1 << 40, whole)):
        size, _ = saved_bytes(
            lambda budget=budget: similarity_values(x, y, values, memory_budget=budget, backend=backend)
        )
        assert size - (kept if backend == "cpu" else 0) <= tensors + results + 64


CHILD = """
import torch
from contrastive_ops.ops import similarity_values
from contrastive_ops.testing import reset_peak, resident_bytes

given = [torch.randn(10_000, 32, requires_grad=True) for _ in range(3)]
for t in given:
    t.grad = torch.zeros_like(t)
similarity_values(*(t[:600] for t in given), memory_budget=0).sum().backward()
base = reset_peak()
sums = similarity_values(*given, memory_budget=0)
print(resident_bytes("VmHWM") - base)
reset_peak()
sums.sum().backward()
print(resident_bytes("VmHWM") - base)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's resettable peak")
def test_peak_resident_set():
    """The matrix would take 381 MiB; the inner products of 512 rows take 20, weights 16 and the three gradients 3.7."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    forward_peak, backward_peak = (int(line) / 2**20 for line in done.stdout.split())
    assert forward_peak <= 48 and backward_peak <= 64, (forward_peak, backward_peak)


# ---- Registration ----------------------------------------------------------------------------------------------------


def test_opcheck(backend):
    x, y, values = drawn(9, 7, depth=5)
    problem = [x, y, leaf(1), leaf(9), leaf(7), values, [], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]
    torch.library.opcheck(FORWARD, (*problem, 0, backend))
    sums, lse, kept = FORWARD(*problem, 0, backend)
    torch.library.opcheck(
        BACKWARD,
        (*problem, sums.detach(), lse, torch.randn_like(sums, requires_grad=True), kept, 63, backend),
        # Second derivatives recompute through the reference; AOT tracing of them is not promised.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_one_graph_for_any_batch(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def step(x, y, values):
        return similarity_values(x, y, values, scale=2.0, backend=backend)

    for n in (8, 12, 20):
        x, y, values = drawn(n, 9)
        check(step(x, y, values), sums_of(x, y, values, scale=2.0), [x, y, values])
    assert counter.frame_count == 1


# ---- Bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"values": torch.zeros(12, 3)}, ValueError, "values must have as many rows as y, got y"),
        ({"values": torch.zeros(13)}, ValueError, "values must"),
        ({"y": None, "values": torch.zeros(12, 3)}, ValueError, "values must have as many rows as x"),
        ({"y": torch.zeros(13, 4)}, ValueError, "must have"),
        ({"col_bias": torch.zeros(12)}, ValueError, "col_bias must have shape"),
        ({"scale": torch.zeros(4)}, ValueError, "scale must"),
        ({"pairs": Pairs(diagonal=0, fill=1.0)}, NotImplementedError, "pairs.fill must be None"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
        ({"memory_budget": -1}, ValueError, "memory_budget must"),
    ],
)
def test_what_does_not_fit(change, error, message):
    given = {"x": torch.zeros(9, 5), "y": torch.zeros(13, 5), "values": torch.zeros(13, 3), **change}
    with pytest.raises(error, match=f"similarity_values: .*{message}"):
        similarity_values(**given)
