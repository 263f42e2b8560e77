"""Losses that normalise 16-bit rows, against the same losses in float64 on the same rows: three regimes, every loss.

Members are the entries of `testing.LOSSES` whose function has `normalize`, so that a new loss joins by itself. Rows
have lengths that differ by a factor of seven.
"""

import inspect

import pytest
import torch
from pairwise import pairwise

from contrastive_ops import Fold, Pairs, info_nce
from contrastive_ops.core import extension
from contrastive_ops.core.problem import Problem
from contrastive_ops.ops.similarity_loss import similarity_loss
from contrastive_ops.ops.similarity_reduce import fold
from contrastive_ops.testing import LOSSES, leaves, relative_error


def multiplies_bfloat16():
    compiled = extension.load()
    return compiled is not None and compiled.cpu_capability() in ("avx512_bf16", "amx", "neon_bf16")


NORMALISING = {
    name: case for name, case in LOSSES.items() if "normalize" in inspect.signature(case.function).parameters
}
# The scale, and how far from each other the two sides of a pair lie: near convergence, in training, in the beginning.
REGIMES = {"converged": (20.0, 0.8), "ordinary": (10.0, 1.5), "early": (1.0, 3.0)}
# A gradient is rounded to its dtype at the end: 0.17% in bfloat16, 0.02% in float16. Some come from two operators.
# Where the processor multiplies bfloat16, weights of gradients are rounded, too, once for each of two operators.
LARGEST_ERROR = 4e-3 if multiplies_bfloat16() else 3e-3


def drawn(case, dtype, regime, rows=48, depth=32):
    scale, distance = REGIMES[regime]
    generator, first, found = torch.Generator().manual_seed(1), None, {}
    for name, t in case.inputs(rows, depth, torch.float64).items():
        wanted = t.requires_grad
        if t.is_floating_point() and t.dim() >= 2 and t.shape[-1] == depth:
            t = t.detach()
            if first is not None and t.shape == first.shape and wanted:
                t = first + distance * t
            first = t if first is None else first
            length = 0.5 + 3 * torch.rand(t.shape[:-1], generator=generator, dtype=torch.float64)
            t = (t * length[..., None]).to(dtype)
        elif name in ("scale", "text_scale"):
            t = torch.full_like(t, scale, dtype=torch.float32)
        elif t.is_floating_point():
            t = t.detach().float()
        found[name] = t.requires_grad_(wanted)
    return found


@pairwise(regime=REGIMES, dtype=[torch.bfloat16, torch.float16], name=NORMALISING)
def test_normalised_rows_are_not_rounded(name, dtype, regime):
    case = NORMALISING[name]
    low = drawn(case, dtype, regime)
    high = {
        key: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for key, t in low.items()
    }
    value, truth = case(low, normalize=True), case(high, backend="reference", normalize=True)
    assert relative_error(value.detach(), truth.detach()) <= 1e-5
    value.backward()
    truth.backward()
    for got, expected in zip(leaves(low), leaves(high), strict=True):
        if expected.grad is not None and expected.grad.norm() > 1e-6:
            assert relative_error(got.grad, expected.grad) <= LARGEST_ERROR


def folded(case, x, y, **options):
    """Values of folds of unit rows; each case has other arguments."""
    N, M = len(x), len(y)
    ids, of_rows = (torch.arange(N) // 3, torch.arange(M) // 3), torch.linspace(1, 20, N)
    target = torch.arange(N)

    def problem(y, target, row_bias=None):
        return Problem.of((case, "x", "y"), x, y, row_bias, target=target)

    if case == "both sides":
        both = {"dim": (0, 1), "scale": of_rows, "col_scale": torch.linspace(2, 9, M)}
        return fold(problem(y, target), **both, **options)
    if case == "rules":
        near = Fold("sum_softplus", pairs=Pairs(differ=ids, below=0.4))
        folds = ("logsumexp", near, Fold("max", negate=True))
        return fold(problem(y, target, of_rows / 9), reduce=folds, scale=of_rows, **options)
    if case == "lists":
        lists = (torch.arange(N + 1), target, of_rows)
        return fold(problem(y, target.flip(0)), scale=9.0, linear=lists, **options)
    if case == "itself":
        same = Fold("sum", pairs=Pairs(same=(ids[0], ids[0]), diagonal=0))
        return fold(problem(None, target.roll(3)), reduce=("logsumexp", same), scale=9.0, **options)
    reduction = "none" if case == "rows of a loss" else "sum"
    return (similarity_loss(problem(y, target), scale=9.0, weight=of_rows, reduction=reduction, **options),)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["both sides", "rules", "lists", "itself", "a loss", "rows of a loss"])
def test_every_backend_has_the_factors(case, dtype, backend):
    torch.manual_seed(0)
    y = torch.randn(150, 40, dtype=torch.float64) * (0.2 + 5 * torch.rand(150, 1, dtype=torch.float64))
    x = y[:130] + torch.randn(130, 40, dtype=torch.float64)
    found = []
    for kind, chosen in ((dtype, backend), (torch.float64, "reference")):
        a, b = (t.to(dtype).to(kind).requires_grad_() for t in (x, y))
        results = [t for each in folded(case, a, b, unit=True, backend=chosen) for t in _flat(each)]
        results = [t for t in results if t.is_floating_point() and t.numel()]
        sum((t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in results).backward()
        found.append([*(t.detach() for t in results), *(t.grad for t in (a, b) if t.grad is not None)])
    count = len(found[1]) - (1 if case == "itself" else 2)
    for at, (got, truth) in enumerate(zip(*found, strict=True)):
        assert relative_error(got, truth) <= (1e-5 if at < count else LARGEST_ERROR)


def _flat(result):
    return result if isinstance(result, tuple) else (result,)


def test_second_derivatives_of_unit_rows(backend):
    """Those of the float64 loss, whose rows are normalised before the sweep."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 8), torch.randn(6, 8)
    found = []
    for dtype, chosen in ((torch.bfloat16, backend), (torch.float64, "reference")):
        a, b = (t.bfloat16().to(dtype).requires_grad_() for t in (x, y))
        loss = info_nce(a, b, scale=4.0, normalize=True, backend=chosen)
        (first,) = torch.autograd.grad(loss, a, create_graph=True)
        found.append(torch.autograd.grad(first.double().square().sum(), (a, b)))
    assert all(relative_error(got, truth) <= 1e-2 for got, truth in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_any_length(dtype):
    """Zero rows have cosines of 0; long and short ones what their directions say."""
    torch.manual_seed(0)
    x = torch.randn(6, 8).to(dtype)
    lengths = torch.tensor([1.0, 0.0, 2.0**-7, 2.0**7, 3.0, 1.0], dtype=dtype)
    rows = (x * lengths[:, None]).requires_grad_()
    loss = info_nce(rows, x.roll(1, 0), scale=5.0, normalize=True)
    expected = info_nce(rows.detach().double(), x.roll(1, 0).double(), scale=5.0, normalize=True)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=0)
    loss.backward()
    assert rows.grad[[0, 2, 3, 4, 5]].isfinite().all()


def test_autocast_takes_the_same_way():
    torch.manual_seed(0)
    x, y = torch.randn(8, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        got = info_nce(x, y, normalize=True)
    truth = info_nce(x.bfloat16().double(), y.bfloat16().double(), normalize=True)
    assert relative_error(got, truth) <= 1e-6
