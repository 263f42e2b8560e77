"""stream_rows: values, every gradient, memory, and functions that are not row-wise."""

import json
import os
import subprocess
import sys

import pytest
import torch

from contrastive_ops.ops import stream_rows
from contrastive_ops.testing.compare import check_derivatives

DOUBLE = torch.float64


def leaf(*shape):
    return torch.randn(*shape, dtype=DOUBLE, requires_grad=True)


def hinge(margin):
    """Nothing a fold can do: a quantile of the row."""

    def fn(logits, rows):
        own = logits.diagonal(rows.start)
        return (margin + logits.quantile(0.9, dim=1) - own).relu()

    return fn


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 20, 1000, None])
def test_values_and_gradients(chunk_rows):
    x, y, margin = leaf(20, 6), leaf(25, 6), leaf(1)
    got = stream_rows(hinge(margin), x, y, chunk_rows=chunk_rows)
    truth = hinge(margin)(x @ y.T, slice(0, 20))
    torch.testing.assert_close(got, truth)
    cotangent = torch.randn_like(truth)
    for a, b in zip(
        torch.autograd.grad(got, [x, y, margin], cotangent),
        torch.autograd.grad(truth, [x, y, margin], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_self_similarity_counts_both_sides():
    x = leaf(15, 4)
    got = stream_rows(lambda logits, rows: logits.sin().sum(1), x, chunk_rows=4)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), x)[0], torch.autograd.grad((x @ x.T).sin().sum(), x)[0])


def test_several_results_and_labels_from_outside():
    x, y, labels = leaf(9, 4), leaf(7, 4), torch.randint(0, 7, (9,))

    def fn(logits, rows):
        return logits.gather(1, labels[rows, None]).squeeze(1), logits.topk(3, dim=1).values

    own, best = stream_rows(fn, x, y, chunk_rows=4)
    logits = x @ y.T
    torch.testing.assert_close(own, logits[torch.arange(9), labels])
    torch.testing.assert_close(best, logits.topk(3, dim=1).values)


def test_second_derivatives():
    x, y, margin = leaf(4, 3), leaf(5, 3), leaf(1)

    def function(x, y, margin):
        return stream_rows(lambda logits, rows: (margin * logits).tanh().logsumexp(1), x, y, chunk_rows=3)

    check_derivatives(function, (x, y, margin))


def test_random_numbers_are_the_same_in_backward():
    x, y = leaf(12, 4), leaf(10, 4)
    got = stream_rows(lambda logits, rows: torch.nn.functional.dropout(logits, 0.5).sum(1), x, y, chunk_rows=5)
    # The sum is linear, so its gradient is the mask that the forward drew: sum(x * dx) gives the value back.
    gradient = torch.autograd.grad(got.sum(), x)[0]
    torch.testing.assert_close((x * gradient).sum(), got.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_float32(dtype):
    x, y = torch.randn(9, 8).to(dtype).requires_grad_(), torch.randn(7, 8).to(dtype)
    got = stream_rows(lambda logits, rows: logits.logsumexp(1), x, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, (x.float() @ y.float().T).logsumexp(1))
    got.sum().backward()
    assert x.grad.dtype == dtype
    with torch.autocast("cpu", dtype=dtype):
        inside = stream_rows(lambda logits, rows: logits.logsumexp(1), x.detach().float(), y.float())
    torch.testing.assert_close(inside, got)


def test_no_rows():
    assert stream_rows(lambda logits, rows: logits.sum(1), torch.randn(0, 4), torch.randn(5, 4)).shape == (0,)


def test_functions_that_are_not_row_wise_are_refused():
    x = torch.randn(6, 4)
    with pytest.raises(
        ValueError, match="stream_rows: fn must return one entry for each of the chunk's 4 rows, got shape"
    ):
        stream_rows(lambda logits, rows: logits.sum(), x, chunk_rows=4)
    with pytest.raises(TypeError, match="stream_rows: fn must return a tensor or a tuple of tensors, got float"):
        stream_rows(lambda logits, rows: logits.sum().item(), x)
    with pytest.raises(ValueError, match="stream_rows: chunk_rows must be at least 1, got 0"):
        stream_rows(lambda logits, rows: logits.sum(1), x, chunk_rows=0)
    with pytest.raises(ValueError, match="stream_rows: y must have the same last dimension as x"):
        stream_rows(lambda logits, rows: logits.sum(1), x, torch.randn(6, 5))


CHILD = """
import json, torch
from contrastive_ops.ops import stream_rows
from contrastive_ops.testing import reset_peak, resident_bytes
x, y = (torch.randn(8000, 16, requires_grad=True) for _ in range(2))
fn = lambda logits, rows: logits.square().mean(1)
stream_rows(fn, x[:64], y[:64]).sum().backward()
base = reset_peak()
stream_rows(fn, x, y).sum().backward()
print(json.dumps(resident_bytes("VmHWM") - base))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's resettable peak")
def test_peak_resident_set():
    """The matrix would take 256 MB, and autograd of the dense form three of them."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) <= 96 << 20
