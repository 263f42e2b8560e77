"""Derivatives that autograd's backward pass is not asked for: forward mode, and the transforms of torch.func.

Losses are those of the registry, operators those of the library: whatever is added to them is asked too.
"""

import pytest
import torch
from torch.autograd import forward_ad

from contrastive_ops import Pairs, route, similarity_reduce, similarity_topk
from contrastive_ops.core.ordered import ordered_logsumexp
from contrastive_ops.core.unit_rows import unit_rows
from contrastive_ops.moe import ExpertChoice, SoftMoE, SparseMoE
from contrastive_ops.nn import CLIPLoss
from contrastive_ops.ops import (
    combine,
    dispatch,
    expert_choice,
    grouped_matmul,
    maxsim,
    merge_lse,
    similarity_distill,
    similarity_prefix,
    similarity_values,
    stream_rows,
)
from contrastive_ops.testing import LOSSES, leaves

DOUBLE = torch.float64
X, Y, V = torch.randn(3, 6, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)).unbind()
OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("contrastive_ops::"))


def _layer(layer):
    layer = layer.double().requires_grad_(False)
    return lambda x: layer(x)[0] if not isinstance(layer, SoftMoE) else layer(x)


def _with_y(loss):
    loss = loss.double().requires_grad_(False)
    return lambda x: loss(x, Y)


# Every primitive, as a function of a matrix (6, 5).
FUNCTIONS = {
    "similarity_reduce": lambda x: similarity_reduce(x, Y, dim=(0, 1)).rows,
    "similarity_reduce with itself": lambda x: similarity_reduce(x, pairs=Pairs(diagonal=0)),
    "similarity_topk": lambda x: similarity_topk(x, Y, 3, metric="cosine").values,
    "similarity_values": lambda x: similarity_values(x, Y),
    "similarity_distill": lambda x: similarity_distill(x, Y, V, Y),
    "similarity_prefix": lambda x: similarity_prefix(x, Y, dims=[2, 5]).rows,
    "maxsim": lambda x: maxsim(x.view(2, 3, 5), Y.view(3, 2, 5)),
    "stream_rows": lambda x: stream_rows(lambda logits, rows: logits.logsumexp(1), x, Y, chunk_rows=4),
    "merge_lse": lambda x: merge_lse(x, Y),
    "ordered_logsumexp": lambda x: ordered_logsumexp(x.flatten()),
    "unit_rows": unit_rows,
    "route": lambda x: route(x, 2, losses=["switch", "z"]).loss + route(x, 2).gates.sum(),
    "expert_choice": lambda x: expert_choice(x, 1.0).gates,
    "dispatch": lambda x: dispatch(x, route(Y, 2)),
    "combine": lambda x: combine(torch.cat([x, x]), route(Y, 2)),
    "grouped_matmul": lambda x: grouped_matmul(x, Y.view(2, 5, 3), torch.tensor([0, 2, 6])),
    "SparseMoE": _layer(SparseMoE(5, 4, experts=3, k=2)),
    "ExpertChoice": _layer(ExpertChoice(5, 4, experts=3)),
    "SoftMoE": _layer(SoftMoE(5, 4, experts=3)),
    "a learned scale": _with_y(CLIPLoss()),
    "a learned scale at its bound": _with_y(CLIPLoss(0.01)),
}


def _cases():
    for name, function in FUNCTIONS.items():
        yield pytest.param(function, [X], id=name)
    for name, case in LOSSES.items():
        yield pytest.param(*_loss(case), id=name)


def _loss(case):
    inputs = case.inputs(6, 5, DOUBLE)
    wanted = [name for name, t in inputs.items() if t.requires_grad]
    reduction = "none" if "none" in case.reductions else "mean"

    def function(*tensors):
        given = dict(zip(wanted, tensors, strict=True))
        return case({name: given.get(name, t) for name, t in inputs.items()}, reduction)

    return function, [t.detach() for t in leaves(inputs)]


every_function = pytest.mark.parametrize("function,inputs", list(_cases()))


def _scalar(function):
    """A number with some cotangent behind it."""

    def total(*inputs):
        value = function(*inputs)
        weight = torch.arange(1, value.numel() + 1, dtype=DOUBLE).sin().view(value.shape)
        return (value * weight).sum()

    return total


def _gradients(function, inputs):
    fresh = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*fresh), fresh)


@every_function
def test_forward_mode_is_right_or_refused(function, inputs):
    total, tangents = _scalar(function), [torch.randn_like(t) for t in inputs]
    expected = sum((g * t).sum() for g, t in zip(_gradients(total, inputs), tangents, strict=True))

    def dual():
        with forward_ad.dual_level():
            value = total(*(forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)))
            return forward_ad.unpack_dual(value).tangent

    for run in (lambda: torch.func.jvp(total, tuple(inputs), tuple(tangents))[1], dual):
        try:
            got = run()
        except NotImplementedError as error:
            assert "must have no forward-mode tangents" in str(error) and "torch.autograd.functional.jvp" in str(error)
            assert str(error).partition(":")[0] not in ("unit_rows", "similarity_loss") or function is unit_rows
        else:
            torch.testing.assert_close(got, expected)
    _, got = torch.autograd.functional.jvp(total, tuple(inputs), tuple(tangents))  # what the message names
    torch.testing.assert_close(got, expected)


@every_function
def test_transforms_of_torch_func(function, inputs):
    total, places = _scalar(function), tuple(range(len(inputs)))
    first = torch.func.grad(total, argnums=places)
    for got, expected in zip(first(*inputs), _gradients(total, inputs), strict=True):
        torch.testing.assert_close(got, expected)
    _, pullback = torch.func.vjp(lambda *given: _scalar(lambda *g: first(*g)[0])(*given), *inputs)
    second = pullback(torch.ones((), dtype=DOUBLE))
    fresh = [t.clone().requires_grad_() for t in inputs]
    again = _scalar(lambda *_: torch.autograd.grad(total(*fresh), fresh[0], create_graph=True)[0])()
    expected = torch.autograd.grad(again, fresh, materialize_grads=True) if again.requires_grad else [0.0 * X]
    for got, right in zip(second, expected, strict=True):
        assert not got.requires_grad
        torch.testing.assert_close(got, right)


@every_function
def test_vmap(function, inputs, request):
    if "sog_clr" in request.node.callspec.id or "stream_rows" in request.node.callspec.id:
        pytest.skip("has a state or draws a seed, of which there is one and not one for each entry")
    total, (first, *rest) = _scalar(function), inputs
    batch = torch.stack([first, 1.1 * first, 0.7 * first], 1)
    got = torch.vmap(torch.func.grad_and_value(lambda x: total(x, *rest)), in_dims=1)(batch)
    expected = [torch.func.grad_and_value(lambda x: total(x, *rest))(x) for x in batch.unbind(1)]
    for each, right in zip(got, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(each, torch.stack(right))


def test_hessian_by_reverse_mode():
    def function(x):
        return similarity_reduce(x, Y, scale=0.5).square().sum()

    expected = torch.func.hessian(lambda x: (0.5 * x @ Y.T).logsumexp(1).square().sum())(X)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(function))(X), expected)
    for forward in (torch.func.hessian, torch.func.jacfwd, lambda f: torch.func.linearize(f, X)):
        with pytest.raises(NotImplementedError, match=r"^similarity_reduce: inputs must have no forward-mode tangents"):
            forward(function)(X)
    with pytest.raises(NotImplementedError, match="tangents"):
        torch.func.jvp(torch.func.grad(function), (X,), (V,))
    with pytest.raises(NotImplementedError, match="tangents"):
        torch.func.grad(lambda x: torch.func.jvp(function, (x,), (V,))[1])(X)
    with pytest.raises(NotImplementedError, match="tangents"):
        torch.vmap(lambda v: torch.func.jvp(function, (X,), (v,))[1])(torch.stack([V, X]))


def test_vmap_over_nothing():
    assert torch.vmap(lambda x: similarity_topk(x, Y, 3).values)(torch.empty(0, 6, 5, dtype=DOUBLE)).shape == (0, 6, 3)


def test_functional_call():
    layer = SparseMoE(5, 4, experts=3, k=2, router={"losses": ["switch"]}).double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(given):
        out, routing = torch.func.functional_call(layer, given, (X,))
        return out.square().sum() + routing.loss

    got = torch.func.grad(loss)(parameters)
    loss(dict(layer.named_parameters())).backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(got[name], p.grad)


def test_batched_labels_are_not_read():
    target = torch.stack([torch.arange(6), torch.arange(6).flip(0)])
    got = torch.vmap(lambda t: similarity_reduce(X, Y, target=t).target)(target)
    expected = [similarity_reduce(X, Y, target=t).target for t in target]
    torch.testing.assert_close(got, torch.stack(expected))
    offsets = torch.tensor([[0, 2, 6], [0, 6, 6]])
    got = torch.vmap(lambda o: grouped_matmul(X, Y.view(2, 5, 3), o))(offsets)
    torch.testing.assert_close(got[1], grouped_matmul(X, Y.view(2, 5, 3), offsets[1]))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_all_kernels(name):
    for key in ("Autograd", "FuncTorchBatched", "CompositeExplicitAutograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), key
