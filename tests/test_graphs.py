"""capture: what it asks of a step and its arguments, by a fake of torch's graphs; on a GPU, the bits of the step."""

import pytest
import torch

import contrastive_ops
from contrastive_ops import capture, clip, graphs


def step(x, y):
    return clip(x, y, scale=5.0)


@pytest.fixture
def fake(monkeypatch):
    """Graphs on the CPU: what was captured, and the step itself in place of a replay."""
    captured = []

    def make(function, samples, allow_unused_input):
        captured.append((function, samples, allow_unused_input))
        return function

    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make)
    return captured


def samples(**changes):
    return [torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)]


def test_a_captured_step_is_the_step(fake):
    x, y = samples()
    replay = capture(step, x, y)
    assert fake == [(step, (x, y), True)]
    other = torch.randn(5, 4, requires_grad=True)
    assert torch.equal(replay(other, y), step(other, y))


def test_parameters_of_a_module_take_part(fake):
    module = contrastive_ops.nn.CLIPLoss()
    capture(module, *samples())
    assert fake[0][0] is module


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x, y: (x,), ValueError, "must be given 2 tensors as its samples, got 1"),
        (lambda x, y: (x, 3.0), TypeError, "must be tensors, got float at position 1"),
        (
            lambda x, y: (x, y.double()),
            TypeError,
            "must have the dtype of the sample, torch.float32, got torch.float64",
        ),
        (
            lambda x, y: (x, y[:4]),
            ValueError,
            r"must have the shape of the sample, \(5, 4\), got \(4, 4\) at position 1",
        ),
        (lambda x, y: (x, y.to("meta")), ValueError, "must be on the sample's device, cpu, got meta"),
        (lambda x, y: (x.detach(), y), ValueError, "must require a gradient where the sample does"),
    ],
)
def test_arguments_unlike_the_samples(fake, change, error, message):
    x, y = samples()
    replay = capture(step, x, y)
    with pytest.raises(error, match=f"capture: .*{message}"):
        replay(*change(x, y))


@pytest.mark.parametrize(
    "given, error, message",
    [
        ((3, torch.zeros(2)), TypeError, "step must be a function or a module, got int"),
        ((step,), ValueError, "samples must be one tensor for each argument of the step, got none"),
        ((step, torch.zeros(2), "text"), TypeError, "samples must be tensors, got str at position 1"),
        ((step, torch.zeros(2, device="meta")), ValueError, "samples must be on a CUDA device, got meta at position 0"),
    ],
)
def test_what_cannot_be_captured(fake, given, error, message):
    with pytest.raises(error, match=f"capture: {message}"):
        capture(*given)
    assert not fake


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotImplementedError, match="capture: a CUDA graph must have a CUDA device, got torch"):
        capture(step, *samples())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", ["clip", "siglip", "info_nce"])
def test_bits_of_a_graph(loss):
    """Whatever the samples held, replays are the step on what they are given."""
    function = getattr(contrastive_ops, loss)
    x, y = (torch.randn(256, 64, device="cuda", requires_grad=True) for _ in range(2))
    replay = capture(function, x, y)
    for _ in range(3):
        given = [torch.randn(256, 64, device="cuda", requires_grad=True) for _ in range(2)]
        expected = function(*given)
        gradients = torch.autograd.grad(expected, given)
        found = replay(*given)
        assert torch.equal(found, expected)
        assert all(map(torch.equal, torch.autograd.grad(found, given), gradients))
