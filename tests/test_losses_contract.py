"""What every loss promises, asked of the whole registry: memory, tracing, dtypes, determinism, gradients, edges."""

import contextlib
import importlib
import inspect
import pkgutil

import pytest
import torch
import torch._dynamo.testing

import contrastive_ops.losses
from contrastive_ops.core import backends, eager
from contrastive_ops.losses import RunningDenominator
from contrastive_ops.testing import LOSSES, leaves, saved_bytes
from contrastive_ops.testing.draws import DATA_SET

DOUBLE = torch.float64
ONE_EACH = [name for name, case in LOSSES.items() if name == case.function.__name__]


def _parameters():
    reasons = backends.backends()["similarity_reduce"]
    for name, case in LOSSES.items():
        for backend in ("reference", "cpu") if case.takes_backend else ("auto",):
            missing = reasons.get(backend)
            marks = [] if missing is None else [pytest.mark.skip(reason=missing)]
            yield pytest.param(case, backend, id=f"{name}-{backend}", marks=marks)


everywhere = pytest.mark.parametrize("case,backend", list(_parameters()))


def gradients(value, inputs, cotangent=None):
    cotangent = torch.ones_like(value) if cotangent is None else cotangent
    return torch.autograd.grad(value, leaves(inputs), cotangent, retain_graph=True)


def changed(inputs, change):
    """The inputs with each tensor changed, as new leaves."""
    return {name: change(t.detach()).requires_grad_(t.requires_grad) for name, t in inputs.items()}


def assert_equal(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def assert_close(got, expected, tolerance=1e-9):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_every_loss_is_in_the_registry():
    package = contrastive_ops.losses
    modules = [
        importlib.import_module(f"{package.__name__}.{each.name}") for each in pkgutil.iter_modules(package.__path__)
    ]
    functions = {
        function
        for module in modules
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and "reduction" in inspect.signature(function).parameters
        if inspect.signature(function).return_annotation != "Prepared"  # a part of one
        if function.__module__.startswith(package.__name__) and "._" not in function.__module__
    }
    assert functions == {LOSSES[name].function for name in ONE_EACH} == {case.function for case in LOSSES.values()}
    assert {function.__name__ for function in functions} <= set(package.__all__)


# ---- Memory --------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_are_linear_in_the_batch(case, backend, reduction):
    if case.keeps_scores:
        pytest.skip("keeps a matrix of scores, which is small next to the tokens of its rows")
    keep_none = {"memory_budget": 0} if case.takes_memory_budget else {}
    sizes = []
    # The reference has a way of its own for few rows, which keeps other things: tests/test_eager.py.
    with eager.closed() if backend == "reference" else contextlib.nullcontext():
        for rows in (500, 1000):
            inputs = case.inputs(rows, 64)
            size, _ = saved_bytes(lambda inputs=inputs: case(inputs, reduction, backend, **keep_none))
            sizes.append(size)
    assert sizes[1] <= 2.2 * sizes[0]
    # Inputs, their unit rows or float32 gradients, a few vectors; a float32 matrix alone would be larger.
    assert sizes[1] <= 4 * sum(t.numel() * t.element_size() for t in inputs.values()) + 32 * rows


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_evaluation_keeps_nothing_and_gives_the_value_of_training(case, backend, reduction):
    inputs = case.inputs(70, 64)  # from this depth on training keeps inner products
    value = case(inputs, reduction, backend)
    with torch.no_grad():
        size, evaluated = saved_bytes(lambda: case(inputs, reduction, backend))
    assert size == 0 and not evaluated.requires_grad
    torch.testing.assert_close(evaluated, value.detach(), rtol=1e-6, atol=1e-6)


# ---- Tracing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ONE_EACH)
def test_compile_without_graph_break_or_recompilation(name):
    case = LOSSES[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda inputs, given: case(inputs, **given), fullgraph=True, backend=counter)
    # A module that is stored in lives longer than a step.
    given, again = ({"state": RunningDenominator(DATA_SET)} if name == "sog_clr" else {} for _ in range(2))
    for rows in (24, 37, 50):
        inputs = case.inputs(rows, 16)
        if rows == 24:
            for t in inputs.values():
                for dimension, size in enumerate(t.shape):
                    if size not in (2, 16, DATA_SET):
                        torch._dynamo.mark_dynamic(t, dimension)
        value, expected = compiled(inputs, given), case(inputs, **again)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        got = torch.autograd.grad(value, leaves(inputs))
        assert_close(got, gradients(expected, inputs), 1e-5)
    assert counter.frame_count == 1


@everywhere
def test_meta_tensors(case, backend):
    inputs = changed(case.inputs(6, 4), lambda t: t.to("meta"))
    for reduction in case.reductions:
        value = case(inputs, reduction)
        assert value.device.type == "meta" and value.dtype == torch.float32
        assert value.shape == ((6 * case.copies,) if reduction == "none" else ())
        assert [g.shape for g in gradients(value, inputs)] == [t.shape for t in leaves(inputs)]


# ---- Dtypes --------------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("reduction, dtype", [("mean", torch.bfloat16), ("none", torch.float16)], ids=str)
def test_autocast_is_the_loss_of_16_bit_inputs(case, backend, reduction, dtype):
    inputs, rounded = case.inputs(40, 16), case.inputs(40, 16, dtype)
    with torch.autocast("cpu", dtype=dtype):
        value = case(inputs, reduction, backend)
    expected = case(rounded, reduction, backend)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    got = gradients(value, inputs)
    assert_equal([g.to(t.dtype) for g, t in zip(got, leaves(rounded), strict=True)], gradients(expected, rounded))


# ---- Determinism ---------------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_and_any_number_of_threads_agree_bitwise(case, backend, dtype, threads):
    inputs = case.inputs(600, 40, dtype)
    results = []
    for count in (1, 1) if backend == "reference" else (1, 2, 3, 2):
        threads(count)
        value = case(inputs, "mean", backend)
        results.append([value.detach(), *gradients(value, inputs)])
    for other in results[1:]:
        assert_equal(results[0], other)


# ---- Gradients -----------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_and_upstream_gradients(case, backend, reduction, way):
    inputs = case.inputs(40, 16)
    value = case(inputs, reduction, backend)
    cotangent = torch.randn_like(value)
    first, second = gradients(value, inputs, cotangent), gradients(value, inputs, cotangent)
    assert_equal(first, second)
    # A power of two changes no digit.
    assert_equal([4 * g for g in first], gradients(value, inputs, 4 * cotangent))


@everywhere
def test_gradients_may_be_overwritten_while_the_graph_is_kept(case, backend, way):
    inputs = case.inputs(6, 5)
    value = case(inputs, backend=backend)
    value = value.sum() if value.dim() else value
    first = torch.autograd.grad(value, leaves(inputs), retain_graph=True, allow_unused=True)
    expected = [None if each is None else each.clone() for each in first]
    for each in first:
        if each is not None:
            each.mul_(5.0)
    again = torch.autograd.grad(value, leaves(inputs), allow_unused=True)
    for got, wanted in zip(again, expected, strict=True):
        assert (got is None and wanted is None) or torch.equal(got, wanted)


@everywhere
def test_a_cotangent_of_rows_is_a_weighted_sum(case, backend, way):
    inputs = case.inputs(7, 5, DOUBLE)
    rows = case(inputs, "none", backend)
    cotangent = torch.randn_like(rows)
    got = gradients(rows, inputs, cotangent)
    by_row = [gradients(row, inputs, c) for row, c in zip(rows, cotangent, strict=True)]
    assert_close(got, [sum(parts) for parts in zip(*by_row, strict=True)])
    if case.takes_weight and "weight" not in inputs:
        weight = torch.rand_like(rows)
        total = case(inputs, "sum", backend, weight=weight)
        assert_close(gradients(total, inputs), gradients(rows, inputs, weight))


@everywhere
def test_reductions_agree(case, backend):
    inputs = case.inputs(23, 5, DOUBLE)
    rows = case(inputs, "none", backend)
    for value, expected in (
        (case(inputs, "sum", backend), rows.sum()),
        (case(inputs, "mean", backend), case.mean(inputs, rows)),
    ):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        assert_close(gradients(value, inputs), gradients(expected, inputs))


@everywhere
def test_rows_follow_a_permutation(case, backend):
    if not case.permutes:
        pytest.skip("a tensor names rows by number")
    count = 23
    inputs = case.inputs(count, 5, DOUBLE)
    order = torch.randperm(count)
    permuted = changed(inputs, lambda t: t[order] if t.dim() and t.shape[0] == count else t.clone())
    rows, moved = case(inputs, "none", backend), case(permuted, "none", backend)
    positions = torch.cat([order + count * copy for copy in range(case.copies)])
    torch.testing.assert_close(moved, rows[positions], rtol=1e-12, atol=1e-12)
    before, after = gradients(rows, inputs), gradients(moved, permuted)
    assert_close(after, [g[order] if g.dim() and g.shape[0] == count else g for g in before])


# ---- Edge cases ----------------------------------------------------------------------------------------------------


@everywhere
@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one_row(case, backend, rows):
    inputs = case.inputs(rows, 5)
    names = [name for name, t in inputs.items() if t.requires_grad]
    for reduction in case.reductions:
        value = case(inputs, reduction, backend)
        assert value.shape == ((rows * case.copies,) if reduction == "none" else ())
        if rows:
            assert value.isfinite().all()
        else:  # a mean of no rows may be NaN, as everywhere in torch
            assert not value.any() or reduction == "mean" and value.isnan()
        for name, gradient in zip(names, gradients(value, inputs), strict=True):
            assert gradient.isfinite().all(), name


@everywhere
def test_nan_stays_in_sight(case, backend):
    inputs = case.inputs(20, 5)
    first = next(iter(inputs.values()))
    with torch.no_grad():
        first[3] = torch.nan
    rows = case(inputs, "none", backend)
    for copy in range(case.copies):
        assert rows[3 + 20 * copy].isnan()
    assert case(inputs, "mean", backend).isnan()
    for gradient in gradients(rows, inputs)[:1]:
        assert gradient[3].isnan().any()


def strided(t):
    """The same numbers with gaps between rows and, in vectors, between entries."""
    if t.dim() == 0:
        return t.clone()
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 7, dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


@everywhere
@pytest.mark.parametrize("layout", ["gaps", "columns first"])
def test_strided_inputs(case, backend, layout):
    inputs = case.inputs(30, 9, DOUBLE)
    change = (
        strided if layout == "gaps" else lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t
    )
    other = changed(inputs, change)
    assert layout == "columns first" or not any(t.is_contiguous() for t in other.values() if t.dim())
    value, expected = case(other, "mean", backend), case(inputs, "mean", backend)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert_close(gradients(value, other), gradients(expected, inputs))
