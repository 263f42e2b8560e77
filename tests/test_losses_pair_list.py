"""Lists of pairs against torch's binary cross-entropy in float64."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from contrastive_ops.losses import _pair_list, pair_bce
from contrastive_ops.testing.compare import check, check_derivatives, leaf, number, reduced

DOUBLE = torch.float64
FUZZ = settings(max_examples=25, deadline=None, derandomize=True)


def cross_entropy(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")


@FUZZ
@given(
    seed=st.integers(0, 1 << 20),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(0, 40)),
    chunk=st.sampled_from([1, 17, 1 << 20]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weighted=st.booleans(),
    scale_per_row=st.booleans(),
)
def test_pair_bce(seed, sizes, chunk, reduction, weighted, scale_per_row):
    torch.manual_seed(seed)
    x, y, pairs = leaf(sizes[0], 5), leaf(sizes[1], 5), sizes[2]
    rows, cols = torch.randint(0, len(x), (pairs,)), torch.randint(0, len(y), (pairs,))
    labels = torch.rand(pairs, dtype=DOUBLE).requires_grad_()
    weight = torch.rand(pairs, dtype=DOUBLE).requires_grad_() if weighted else None
    scale, bias = leaf(len(x)) if scale_per_row else number(1.7), number(-1.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_pair_list, "CHUNK_ELEMENTS", chunk)
        value = pair_bce(x, y, rows, cols, labels, scale=scale, bias=bias, weight=weight, reduction=reduction)
        factor = scale[rows] if scale_per_row else scale
        truth = cross_entropy(factor * (x[rows] * y[cols]).sum(1) + bias, labels)
        check(value, reduced(truth, reduction, weight), [x, y, scale, bias, weight, labels])


def test_gradcheck_of_pairs(monkeypatch):
    monkeypatch.setattr(_pair_list, "CHUNK_ELEMENTS", 6)
    rows, cols = torch.tensor([0, 0, 3, 1, 0]), torch.tensor([4, 1, 1, 1, 4])
    labels = torch.rand(5, dtype=DOUBLE).requires_grad_()

    def function(x, y, scale, bias, labels):
        return pair_bce(x, y, rows, cols, labels, scale=scale, bias=bias, normalize=True)

    leaves = (leaf(4, 3), leaf(5, 3), number(1.3), number(-0.7), labels)
    check_derivatives(function, leaves)
    x = leaf(5, 3)  # rows and columns of one matrix
    assert torch.autograd.gradgradcheck(lambda x: pair_bce(x, x, rows, cols, labels.detach()), x)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.numel())
        return result


def test_a_pair_list_gathers_a_chunk_of_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(_pair_list, "CHUNK_ELEMENTS", 800)
    x, y, labels = leaf(50, 16), leaf(60, 16), torch.rand(5000, dtype=DOUBLE)
    rows, cols = torch.randint(0, 50, (5000,)), torch.randint(0, 60, (5000,))
    with _Largest() as largest:
        pair_bce(x, y, rows, cols, labels).backward()
    assert largest.elements == 5000  # gathered at once, the rows alone would be 80,000


def test_a_pair_list_compiles_even_where_both_sides_are_one_tensor():
    x, index, labels = leaf(6, 4), torch.arange(6), torch.rand(6, dtype=DOUBLE)

    def function(x):
        return pair_bce(x, x, index, index, labels)

    check(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x), [x])


# ---- Bad input -----------------------------------------------------------------------------------------------------

X, Y, LABELS, PAIR = torch.randn(4, 3), torch.randn(5, 3), torch.rand(2), torch.tensor([0, 3])
CASES = [
    (lambda: pair_bce(X, Y, PAIR + 1, PAIR, LABELS), ValueError, "pair_bce: rows must be in [0, 4), got 4"),
    (lambda: pair_bce(X, Y, PAIR, PAIR - 1, LABELS), ValueError, "pair_bce: cols must be in [0, 5), got -1"),
    (lambda: pair_bce(X, Y, PAIR, PAIR.repeat(2), LABELS), ValueError, "pair_bce: cols must have shape (2,), got (4,)"),
    (
        lambda: pair_bce(X, Y, PAIR, PAIR, LABELS.repeat(2)),
        ValueError,
        "pair_bce: labels must have shape (2,), got (4,)",
    ),
    (lambda: pair_bce(X, Y, PAIR, PAIR, -LABELS - 1), ValueError, "pair_bce: labels must be in [0, 1], got -1."),
    (
        lambda: pair_bce(X, Y, PAIR, PAIR, LABELS, weight=-LABELS),
        ValueError,
        "pair_bce: weight must not be negative, got -",
    ),
    (
        lambda: pair_bce(X, Y, PAIR, PAIR, LABELS, reduction="avg"),
        ValueError,
        "pair_bce: reduction must be one of 'mean', 'sum', 'none', got 'avg'",
    ),
]


@pytest.mark.parametrize("call,error,message", CASES, ids=[m[:60] for *_, m in CASES])
def test_bad_input(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()
