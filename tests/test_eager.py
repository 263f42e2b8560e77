"""Losses past the operators, in C++ or by few operations of torch: the same bits, and by operators where they must."""

import pytest
import torch
from pairwise import pairwise
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_ops import clip, info_nce, nt_xent, siglip, sup_con
from contrastive_ops.core import eager
from contrastive_ops.core.unit_rows import unit_rows
from contrastive_ops.losses import _eager as doors
from contrastive_ops.testing import saved_bytes

built = pytest.mark.skipif(eager.reason() is not None, reason=str(eager.reason()))
# Its node in the graph of each backend.
NODES = {"cpu": "SimilarityLossBackward", "reference": "DenseLossBackward"}
everywhere = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=built), "reference"])

ROWS, DEPTH = 37, 70
LABELS = torch.arange(ROWS) % 5 - 1


def labelled(x, y, scale, **options):
    return sup_con(x, LABELS, scale=scale, **options)


def labelled_columns(x, y, scale, **options):
    return sup_con(x, LABELS, y, torch.arange(len(y)) % 7 - 1, scale=scale, positives="log_mean", **options)


CALLS = {
    "info_nce": lambda x, y, scale, **options: info_nce(x, y, scale=scale, **options),
    "info_nce target": lambda x, y, scale, **options: info_nce(x, y, target=LABELS + 2, scale=scale, **options),
    "info_nce temperature": lambda x, y, scale, **options: info_nce(x, y, temperature=scale, **options),
    "clip": lambda x, y, scale, **options: clip(x, y, scale=scale, **options),
    "siglip": lambda x, y, scale, **options: siglip(x, y, scale=scale, bias=scale.neg(), **options),
    "siglip number": lambda x, y, scale, **options: siglip(x, y, temperature=0.3, **options),
    "nt_xent": lambda x, y, scale, **options: nt_xent(x, y, scale=scale, **options),
    "sup_con": labelled,
    "sup_con columns": labelled_columns,
}


def inputs(dtype=torch.float32):
    torch.manual_seed(0)
    x, y = (torch.randn(ROWS, DEPTH).to(dtype).div_(4).requires_grad_() for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x, y, torch.tensor([1.7], dtype=wide, requires_grad=True)


def both_ways(call):
    """What `call` returns without and with the operators."""
    found = call()
    with eager.closed():
        return found, call()


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def gradients(loss, leaves, cotangent=None, **options):
    cotangent = torch.ones_like(loss) if cotangent is None else cotangent
    return torch.autograd.grad(loss, leaves, cotangent, allow_unused=True, **options)


@everywhere
@pairwise(
    weighted=[False, True],
    reduction=["mean", "sum", "none"],
    dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float16],
    normalize=[False, True],
    name=CALLS,
)
def test_the_same_bits(name, dtype, normalize, reduction, weighted, backend):
    x, y, scale = inputs(dtype)
    # The reference takes 16-bit rows of any length by the operator.
    normalize = normalize and (backend == "cpu" or dtype in (torch.float32, torch.float64))
    options = {"reduction": reduction, "normalize": normalize, "backend": backend}
    leaves = [x, y, scale]
    if weighted and name != "nt_xent":
        options["weight"] = (0.1 + torch.rand(ROWS, dtype=scale.dtype)).requires_grad_()
        leaves.append(options["weight"])
    factor = torch.rand(2 * ROWS if name == "nt_xent" else ROWS, dtype=scale.dtype) if reduction == "none" else None

    def call():
        loss = CALLS[name](x, y, scale, **options)
        one = gradients(loss, leaves, factor, retain_graph=True)
        return loss.grad_fn.name(), [loss, *one, *gradients(3 * loss, leaves, factor)]

    (made_by, got), (made_by_operator, expected) = both_ways(call)
    assert made_by == NODES[backend] != made_by_operator
    assert_same(got, expected)


@everywhere
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_gradients_and_none(name, needed, backend):
    x, y, scale = (t.detach().requires_grad_(bool(needed >> bit & 1)) for bit, t in enumerate(inputs()))
    leaves = [t for t in (x, y, scale) if t.requires_grad]

    def call():
        loss = CALLS[name](x, y, scale, backend=backend)
        return [loss, *(gradients(loss, leaves) if loss.requires_grad else ())]

    assert_same(*both_ways(call))
    with torch.no_grad():
        got, expected = both_ways(lambda: CALLS[name](x, y, scale, backend=backend))
    assert not got.requires_grad and torch.equal(got, expected)


@everywhere
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives(name, reduction, normalize, backend):
    x, y, scale = (t.detach().requires_grad_() for t in inputs(torch.float64))
    leaves = [x, y, scale]

    def call():
        options = {"reduction": reduction, "normalize": normalize, "backend": backend}
        loss = CALLS[name](x, y, scale, **options).square().sum()
        first = [g for g in gradients(loss, leaves, create_graph=True) if g is not None]
        return gradients(sum(g.square().sum() for g in first), leaves)

    got, expected = both_ways(call)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class _Tensor(torch.Tensor):
    pass


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _under(context):
    def call(x, y, **options):
        with context():
            return clip(x, y, **options)

    return call


@everywhere
@pytest.mark.parametrize(
    "call",
    [
        _under(lambda: torch.autocast("cpu")),
        _under(_Dispatch),
        _under(_Mode),
        _under(lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])),
        lambda x, y, **options: clip(x.as_subclass(_Tensor), y, **options),
        lambda x, y, **options: clip(x, y, label_smoothing=0.1, **options),
        lambda x, y, **options: clip(x, y, weight=torch.arange(ROWS).float(), **options),
        lambda x, y, **options: clip(x, y, scale=torch.linspace(1, 2, ROWS), **options),
        lambda x, y, **options: torch.compile(clip, backend="eager")(x, y, **options),
    ],
    ids=[
        "autocast",
        "dispatch mode",
        "mode",
        "profiler",
        "subclass",
        "smoothing",
        "weight 0",
        "rows",
        "compile",
    ],
)
def test_calls_that_go_by_the_operators(call, backend):
    x, y, _ = inputs()
    assert call(x, y, backend=backend).grad_fn.name() not in NODES.values()


@everywhere
@pytest.mark.parametrize("name", CALLS)
def test_numbers_that_are_not_finite_go_by_the_operators(name, backend):
    x, y, scale = inputs()
    x.data[3, 4] = torch.nan
    assert_same(*both_ways(lambda: [loss := CALLS[name](x, y, scale, backend=backend), *gradients(loss, [x, y])]))


@everywhere
@pytest.mark.parametrize("name", ["info_nce", "clip", "siglip", "nt_xent"])
def test_what_is_kept_grows_with_the_rows(name, backend):
    sizes = []
    for rows in (250, 500):
        x, y = (torch.randn(rows, 64, requires_grad=True) for _ in range(2))
        scale = torch.tensor(3.0, requires_grad=True)
        size, _ = saved_bytes(lambda x=x, y=y, scale=scale: CALLS[name](x, y, scale, memory_budget=0, backend=backend))
        sizes.append(size)
    assert sizes[1] <= 2.2 * sizes[0] < 500 * 500 * 4


def test_the_reference_takes_16_bit_rows_of_any_length_by_the_operator():
    x, y, _ = inputs(torch.bfloat16)
    assert clip(x, y, backend="reference").grad_fn.name() not in NODES.values()


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives_of_16_bit_rows_of_any_length(name, dtype):
    x, y, scale = inputs(dtype)

    def call():
        loss = CALLS[name](x, y, scale, backend="cpu")
        first = [g for g in gradients(loss, [x, y, scale], create_graph=True) if g is not None]
        return gradients(sum(g.float().square().sum() for g in first), [x, y, scale])

    for a, b in zip(*both_ways(call), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-4)


def test_more_pairs_than_a_chunk_has_go_by_the_operators():
    x = torch.randn(1100, 4, requires_grad=True)
    assert info_nce(x, x, backend="reference").grad_fn.name() != NODES["reference"]


def test_transforms_and_fake_tensors_go_by_the_operators():
    x, y, _ = (t.detach() for t in inputs())
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(clip)(x, y), torch.autograd.grad(clip(leaf, y), leaf)[0])
    assert torch.func.vmap(clip)(x[None], y[None]).shape == (1,)
    with FakeTensorMode() as mode:
        assert type(clip(mode.from_tensor(x), mode.from_tensor(y))).__name__ == "FakeTensor"
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: clip(x, y), (x,), (x,))


@everywhere
def test_the_variable_that_chooses_a_backend(monkeypatch, backend):
    x, y, _ = inputs()
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", backend)
    assert clip(x, y).grad_fn.name() == NODES[backend]


@everywhere
@pytest.mark.parametrize("name", ["info_nce", "clip"])
def test_a_graph_is_used_once_and_its_inputs_are_not_changed(name, backend):
    x, y, scale = inputs()
    loss = CALLS[name](x, y, scale, backend=backend)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = CALLS[name](x, y, scale, backend=backend)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@everywhere
@pytest.mark.parametrize("name", ["info_nce", "siglip"])
def test_gradients_formed_in_forward_are_handed_over_without_a_copy(name, backend):
    x, y, scale = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        loss = CALLS[name](x, y, scale, normalize=False, backend=backend)
    assert torch.autograd.grad(loss, [x])[0].data_ptr() in saved


@built
def test_without_the_module(monkeypatch):
    x, y, scale = inputs()
    expected = clip(x, y, scale=scale)
    monkeypatch.setattr(doors, "_LOSS", None)
    loss = clip(x, y, scale=scale)
    assert loss.grad_fn.name() != "SimilarityLossBackward" and torch.equal(loss, expected)


@built
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (2000, 256)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_unit_rows_have_the_same_bits(dtype, shape):
    """In ranges of rows, too, and for a row of zeros."""
    torch.manual_seed(0)
    x, cotangent = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x[0] = 0
    x.requires_grad_()

    def call():
        unit = unit_rows(x)
        return unit.grad_fn.name(), [unit, *gradients(unit, [x], cotangent)]

    (made_by, got), (made_by_operator, expected) = both_ways(call)
    assert made_by == "UnitRowsBackward" != made_by_operator
    assert_same(got, expected)


@built
def test_unit_rows_are_differentiable_twice_and_in_batches():
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unit_rows, x) and torch.autograd.gradgradcheck(unit_rows, x)
    cotangents = torch.randn(3, 6, 4, dtype=torch.float64)
    got, expected = both_ways(lambda: gradients(unit_rows(x), [x], cotangents, is_grads_batched=True))
    assert_same(got, expected)


@built
def test_a_unit_row_that_nothing_depends_on_has_no_gradient():
    x, cotangent = torch.randn(ROWS, DEPTH), torch.randn(ROWS, DEPTH)
    x[3], cotangent[3] = torch.nan, 0
    x.requires_grad_()
    got, expected = both_ways(lambda: gradients(unit_rows(x), [x], cotangent))
    assert_same(got, expected)
    assert torch.equal(got[0][3], torch.zeros(DEPTH)) and got[0].isfinite().all()


@pytest.mark.parametrize("size", [(3,), (2, 3, 4), (0, 4)], ids=str)
def test_other_rows_go_by_the_operator(size):
    assert unit_rows(torch.randn(size, requires_grad=True)).grad_fn.name() != "UnitRowsBackward"
