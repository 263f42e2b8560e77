"""Batches smaller than a block: the same bits for any number of threads, at every edge, whatever memory held before.

Small problems are cut otherwise than large ones (narrow blocks, rows cut by threads, no threads at all), and their
scratch and gradients are memory that nobody has cleared.
"""

import os
import subprocess
import sys

import pytest
import torch

from contrastive_ops import Pairs, clip, info_nce, nt_xent, similarity_reduce, similarity_topk, sup_con
from contrastive_ops.ops import similarity_distill, similarity_prefix, similarity_values
from contrastive_ops.testing import relative_error

# Around the widths of blocks (32, 64, 128) and where they change, and one of everything.
COLUMNS = [1, 31, 33, 127, 128, 129, 191, 256, 257]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def garbage():
    """New memory holds NaN, and so does the scratch that kernels keep."""
    torch.use_deterministic_algorithms(True)
    for dtype in (torch.float32, torch.float64):
        bad = torch.full((300, 40), torch.nan, dtype=dtype, requires_grad=True)
        clip(bad, bad * 1, backend="cpu").backward()
        nt_xent(bad, bad * 1, backend="cpu").backward()
        similarity_topk(bad, bad, 3, backend="cpu")
    yield
    torch.use_deterministic_algorithms(False)


def leaves_of(rows, columns, depth, dtype=torch.float32):
    return [torch.randn(n, depth, dtype=dtype, requires_grad=True) for n in (rows, columns)]


# ---- Lists -----------------------------------------------------------------------------------------------------------


def stable_sort(scores, k):
    """The k best of each row, ties by the column, padded."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    missing = max(0, k - scores.shape[1])
    values = torch.nn.functional.pad(values[:, :k], (0, missing), value=-torch.inf)
    indices = torch.nn.functional.pad(indices[:, :k], (0, missing), value=-1)
    return values, indices.masked_fill(values == -torch.inf, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [2, 60])
@pytest.mark.parametrize("k", [1, 5, 8, 9, 16, 33, 64, 65, 300])
def test_lists_of_few_rows_and_columns(k, spread, dtype, threads):
    """Spread 2 makes hundreds of ties, also at the threshold that the first block sets."""
    for rows in (1, 3, 64, 129, 256):
        for columns in COLUMNS:
            x, y = (torch.randint(-spread, spread + 1, (n, 3)).to(dtype) for n in (rows, columns))
            values, indices = stable_sort(x.double() @ y.double().T, k)
            for count in (1, 2, 3):
                threads(count)
                found = similarity_topk(x, y, k, backend="cpu")
                assert torch.equal(found.indices, indices) and torch.equal(found.values.double(), values)


@pytest.mark.parametrize("k", [1, 7, 8, 31, 32])
@pytest.mark.parametrize("diagonal", [-3, 0, 2])
def test_the_diagonal_is_no_neighbour_though_it_is_the_best(diagonal, k):
    x = torch.randint(-9, 10, (200, 6)).float()
    y = 5 * x.roll(diagonal, 0)
    scores = (x.double() @ y.double().T).clone()
    for i in range(200):
        if 0 <= i + diagonal < 200:
            scores[i, i + diagonal] = -torch.inf
    values, indices = stable_sort(scores, k)
    found = similarity_topk(x, y, k, pairs=Pairs(diagonal=diagonal), backend="cpu")
    assert torch.equal(found.indices, indices) and torch.equal(found.values.double(), values)


@pytest.mark.parametrize("number", [torch.nan, -torch.inf, torch.inf, 3.4e38, -3.4e38])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99, 1.0])
def test_numbers_that_are_no_scores_set_no_threshold(number, share):
    """In the first block, in all of it, and where fewer columns than k are left."""
    x, y = torch.randint(-3, 4, (70, 4)).float(), torch.randint(-3, 4, (300, 4)).float()
    bias = torch.where(torch.rand(300) < share, number, 0.0)
    values, indices = stable_sort((x @ y.T) + bias, 5)
    found = similarity_topk(x, y, 5, col_bias=bias, backend="cpu")
    assert torch.equal(found.indices, indices) and torch.equal(found.values, values)


# ---- Losses and primitives ---------------------------------------------------------------------------------------


def run_all(rows, columns, dtype=torch.float32, depth=19, backend="cpu"):
    """Values and gradients of everything that shares the sweep, of a problem with rows x columns."""
    torch.manual_seed(0)
    results = []

    def run(function, *leaves):
        value = function(*leaves)
        parts = [v for v in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(v, torch.Tensor)]
        total = sum(part.where(part > -torch.inf, 0.0).sin().sum() for part in parts)
        results.extend([*(part.detach() for part in parts), *torch.autograd.grad(total, leaves, allow_unused=True)])

    x, y = leaves_of(rows, columns, depth, dtype)
    values = torch.randn(columns, 7, dtype=dtype, requires_grad=True)
    teacher = torch.randn(rows, 5, dtype=dtype), torch.randn(columns, 5, dtype=dtype)
    scale = torch.tensor(0.7, dtype=dtype if dtype == torch.float64 else torch.float32, requires_grad=True)
    target = torch.randint(columns, (rows,))
    options = {"backend": backend}
    for budget in (0, None):
        for reduce in ("logsumexp", "max"):
            run(
                lambda x, y, s, r=reduce, b=budget: similarity_reduce(
                    x, y, reduce=r, dim=(0, 1), scale=s, target=target, memory_budget=b, **options
                )[:2],
                x,
                y,
                scale,
            )
        run(
            lambda x, y, v, s, b=budget: similarity_values(x, y, v, scale=s, memory_budget=b, **options),
            x,
            y,
            values,
            scale,
        )
        run(
            lambda x, y, s, b=budget: tuple(
                similarity_distill(x, y, *teacher, dim=(0, 1), scale=s, memory_budget=b, **options)
            )[:2],
            x,
            y,
            scale,
        )
    run(lambda x, s: similarity_reduce(x, scale=s, pairs=Pairs(diagonal=0), **options), x, scale)
    run(lambda x, y: similarity_prefix(x, y, dims=(8, 19), dim=(0, 1), target=target, **options).rows, x, y)
    run(lambda x, y: info_nce(x, y, target=target, **options), x, y)
    run(lambda x: sup_con(x, torch.arange(rows) // 2, **options), x)
    if rows == columns:
        run(lambda x, y: clip(x, y, **options), x, y)
        run(lambda x, y: nt_xent(x, y, **options), x, y)
    return results


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 5, 128, 257])
def test_threads_and_what_memory_held_change_no_bit(rows, columns, threads, garbage):
    first = None
    for count in (1, 2, 3):
        threads(count)
        found = run_all(rows, columns)
        first = first or found
        for a, b in zip(first, found, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
            assert a is None or not a.isnan().any()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 130])
def test_values_and_gradients_are_those_of_the_reference(rows, columns):
    found, expected = (run_all(rows, columns, torch.float64, backend=name) for name in ("cpu", "reference"))
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            finite = b > -torch.inf
            assert torch.equal(finite, a > -torch.inf)
            assert relative_error(a[finite], b[finite]) <= 1e-9


@pytest.mark.parametrize("rows, columns", [(0, 3), (3, 0), (0, 0)])
def test_gradients_of_no_pairs_are_zero_whatever_memory_held(rows, columns, garbage):
    x, y = leaves_of(rows, columns, 5)
    values = torch.randn(columns, 4, requires_grad=True)
    folded = similarity_reduce(x, y, dim=(0, 1), backend="cpu")
    total = sum(part.where(part > -torch.inf, 0.0).sum() for part in folded[:2])
    total = total + similarity_values(x, y, values, backend="cpu").sum()
    for gradient in torch.autograd.grad(total, (x, y, values), allow_unused=True):
        assert gradient is None or not gradient.any()


CHILD = """
import sys, torch
sys.path.insert(0, {tests!r})
from test_small_batches import run_all
from contrastive_ops.core import extension
assert extension.load().cpu_capability() == {level!r}
for rows, columns in ((1, 1), (5, 33), (129, 127), (64, 129)):
    results = {{}}
    for count in (1, 2):
        torch.set_num_threads(count)
        results[count] = run_all(rows, columns)
    for a, b in zip(results[1], results[2]):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    from contrastive_ops.testing import relative_error
    for a, b in zip(run_all(rows, columns, torch.float64), run_all(rows, columns, torch.float64, backend="reference")):
        if a is not None:
            finite = b > -torch.inf
            assert relative_error(a[finite], b[finite]) <= 1e-9
"""


@pytest.mark.parametrize("level", ["default", "avx2", "avx512", "avx512_bf16", "amx", "neon", "neon_bf16"])
def test_every_level_of_this_processor(level):
    from contrastive_ops.core import extension

    levels = extension.load().build_config()["cpu_levels"].split()
    if level not in levels[: levels.index(extension.load().cpu_capability_detected()) + 1]:
        pytest.skip(f"this processor has no {level}")
    code = CHILD.format(tests=os.path.dirname(__file__), level=level)
    environment = {**os.environ, "CONTRASTIVE_OPS_CPU_CAPABILITY": level}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
