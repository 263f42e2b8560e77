"""Losses in C++ from checks to autograd: the same bits as by the operators, and by the operators where they must."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_ops import clip, info_nce, nt_xent, siglip, sup_con
from contrastive_ops.core import eager
from contrastive_ops.losses import _eager as doors

pytestmark = pytest.mark.skipif(eager.reason() is not None, reason=str(eager.reason()))

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
    """What `call` returns by C++ and by the operators."""
    found = call()
    with eager.closed():
        return found, call()


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))


def gradients(loss, leaves, cotangent=None, **options):
    cotangent = torch.ones_like(loss) if cotangent is None else cotangent
    return torch.autograd.grad(loss, leaves, cotangent, allow_unused=True, **options)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits(name, dtype, reduction, weighted):
    x, y, scale = inputs(dtype)
    options = {"reduction": reduction, "normalize": dtype in (torch.float32, torch.float64)}
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
    assert made_by == "SimilarityLossBackward" != made_by_operator
    assert_same(got, expected)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("needed", range(1, 8))
def test_every_subset_of_gradients_and_none(name, needed):
    x, y, scale = (t.detach().requires_grad_(bool(needed >> bit & 1)) for bit, t in enumerate(inputs()))
    leaves = [t for t in (x, y, scale) if t.requires_grad]

    def call():
        loss = CALLS[name](x, y, scale)
        return [loss, *(gradients(loss, leaves) if loss.requires_grad else ())]

    assert_same(*both_ways(call))
    with torch.no_grad():
        got, expected = both_ways(lambda: CALLS[name](x, y, scale))
    assert not got.requires_grad and torch.equal(got, expected)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_second_derivatives(name, reduction, normalize):
    x, y, scale = (t.detach().requires_grad_() for t in inputs(torch.float64))
    leaves = [x, y, scale]

    def call():
        loss = CALLS[name](x, y, scale, reduction=reduction, normalize=normalize).square().sum()
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
    def call(x, y):
        with context():
            return clip(x, y)

    return call


@pytest.mark.parametrize(
    "call",
    [
        _under(lambda: torch.autocast("cpu")),
        _under(_Dispatch),
        _under(_Mode),
        _under(lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])),
        lambda x, y: clip(x.as_subclass(_Tensor), y),
        lambda x, y: clip(x, y, backend="reference"),
        lambda x, y: clip(x, y, label_smoothing=0.1),
        lambda x, y: clip(x, y, weight=torch.arange(ROWS).float()),
        lambda x, y: clip(x, y, scale=torch.linspace(1, 2, ROWS)),
        lambda x, y: clip(x.bfloat16(), y.bfloat16()),
        lambda x, y: torch.compile(clip, backend="eager")(x, y),
    ],
    ids=[
        "autocast",
        "dispatch mode",
        "mode",
        "profiler",
        "subclass",
        "reference",
        "smoothing",
        "weight 0",
        "rows",
        "16 bits",
        "compile",
    ],
)
def test_calls_that_go_by_the_operators(call):
    x, y, _ = inputs()
    assert call(x, y).grad_fn.name() != "SimilarityLossBackward"


def test_transforms_and_fake_tensors_go_by_the_operators():
    x, y, _ = (t.detach() for t in inputs())
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(clip)(x, y), torch.autograd.grad(clip(leaf, y), leaf)[0])
    assert torch.func.vmap(clip)(x[None], y[None]).shape == (1,)
    with FakeTensorMode() as mode:
        assert type(clip(mode.from_tensor(x), mode.from_tensor(y))).__name__ == "FakeTensor"
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: clip(x, y), (x,), (x,))


@pytest.mark.parametrize("variable", ["reference", "cpu"])
def test_the_variable_that_chooses_a_backend(monkeypatch, variable):
    x, y, _ = inputs()
    monkeypatch.setenv("CONTRASTIVE_OPS_BACKEND", variable)
    assert (clip(x, y).grad_fn.name() == "SimilarityLossBackward") == (variable == "cpu")


@pytest.mark.parametrize("name", ["info_nce", "clip"])
def test_a_graph_is_used_once_and_its_inputs_are_not_changed(name):
    x, y, scale = inputs()
    loss = CALLS[name](x, y, scale)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = CALLS[name](x, y, scale)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["info_nce", "siglip"])
def test_gradients_formed_in_forward_are_handed_over_without_a_copy(name):
    x, y, scale = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        loss = CALLS[name](x, y, scale, normalize=False)
    assert torch.autograd.grad(loss, [x])[0].data_ptr() in saved


def test_without_the_module(monkeypatch):
    x, y, scale = inputs()
    expected = clip(x, y, scale=scale)
    monkeypatch.setattr(doors, "_LOSS", None)
    loss = clip(x, y, scale=scale)
    assert loss.grad_fn.name() != "SimilarityLossBackward" and torch.equal(loss, expected)
