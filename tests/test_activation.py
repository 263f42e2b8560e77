"""What lies between the layers of experts: values, derivatives of any order, halves of rows, numbers at the ends."""

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import moe
from contrastive_ops.core import extension
from contrastive_ops.ops._activation import NAMES, activate
from contrastive_ops.testing import TOLERANCE

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
COMPILED = pytest.mark.skipif(extension.load() is None, reason="needs the C++ extension")
# The definitions, not torch's functions.
DENSE = {
    "gelu": lambda x: x * 0.5 * torch.erfc(-x * 0.5**0.5),
    "relu": lambda x: x.clamp_min(0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def dense(hidden, name, gated):
    if not gated:
        return DENSE[name](hidden)
    half = hidden.shape[1] // 2
    return DENSE[name](hidden[:, :half]) * hidden[:, half:]


@COMPILED
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_definition(name, dtype, gated):
    for rows, columns in ((1, 1), (3, 7), (5, 16), (130, 33), (40, 1050), (0, 4), (4, 0)):
        hidden = (3 * torch.randn(rows, columns * (2 if gated else 1))).to(dtype).requires_grad_()
        upstream = torch.randn(rows, columns).to(dtype)
        out = activate(hidden, name, gated, "cpu")
        (found,) = torch.autograd.grad(out, hidden, upstream)
        assert out.dtype == found.dtype == dtype
        wide = hidden.detach().double().requires_grad_()
        truth = dense(wide, name, gated)
        (slope,) = torch.autograd.grad(truth, wide, upstream.double())
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(out.detach().double(), truth.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.double(), slope, rtol=tolerance, atol=4 * tolerance)


@COMPILED
@pytest.mark.parametrize("name", NAMES)
def test_far_from_zero(name):
    """Small values keep their digits, and what is no number stays none."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 300.0, -300.0, 3e38, -3e38])])
    found = activate(x[None], name, False, "cpu")[0].double()
    truth = DENSE[name](x.double())
    error = (found - truth).abs() / truth.abs().clamp_min(1e-30)
    assert error.max() < 1e-5  # of the smallest, too: exp(-x^2 / 2) at x = 12 has lost some digits
    ends = torch.tensor([[torch.inf, torch.nan, -torch.inf]])
    torch.testing.assert_close(activate(ends, name, False, "cpu"), DENSE[name](ends), equal_nan=True)


@COMPILED
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name, gated):
    hidden = torch.randn(3, 6, dtype=torch.float64)
    hidden = torch.where(hidden.abs() < 0.1, 0.5, hidden).requires_grad_()  # not at the corner of relu

    def function(hidden):
        return activate(hidden, name, gated, "cpu")

    assert torch.autograd.gradcheck(function, hidden)
    assert torch.autograd.gradgradcheck(function, hidden)


@COMPILED
@pytest.mark.parametrize("gated", [False, True])
def test_experts_on_the_cpu_are_those_of_plain_torch(gated):
    layers = [moe.Experts(8, 12, 3, gated=gated, bias=True, activation="gelu") for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].activation = lambda x: F.gelu(x)  # a function of the user's
    rows, offsets, found = torch.randn(20, 8), torch.tensor([0, 4, 11, 18]), []
    for layer in layers:
        x = rows.clone().requires_grad_()
        out = layer(x, offsets, backend="cpu")
        found.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs)
    assert any("activate" in name for name in _graph(layers[0](rows, offsets, backend="cpu")))
    assert not any("activate" in name for name in _graph(layers[1](rows, offsets, backend="cpu")))


def _graph(out):
    """Names of the nodes behind a tensor."""
    found, todo = [], [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            found.append(node.name())
            todo += [before for before, _ in node.next_functions]
    return found


def test_other_backends_take_torch():
    hidden = torch.randn(4, 6)
    assert torch.equal(activate(hidden, "silu", True, "reference"), F.silu(hidden[:, :3]) * hidden[:, 3:])
