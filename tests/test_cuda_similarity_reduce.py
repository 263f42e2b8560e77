"""similarity_reduce by library products and CUDA kernels against the reference in float64.

Without a GPU the kernels run on the processor, under sanitizers and in an order of threads that each test names.
"""

import contextlib
import dataclasses
import functools
import logging
import re
from pathlib import Path

import cuda_host
import idle_rows_cases
import pytest
import similarity_cases
import torch
from pairwise import pairwise
from similarity_cases import KINDS, RULES, exact, flat, gradients_of, leaves, mapped, winners

from contrastive_ops import Fold, Pairs, clip, info_nce, nt_xent, siglip, similarity_reduce, sup_con
from contrastive_ops.core import cuda_kernels
from contrastive_ops.core.backends import choose
from contrastive_ops.core.problem import Layout, LogitSet, Problem, SetFold
from contrastive_ops.cuda import _chunks, _pairs, _products, _weights
from contrastive_ops.cuda import similarity_reduce as launchers
from contrastive_ops.losses import gte
from contrastive_ops.ops.similarity_loss import similarity_loss
from contrastive_ops.ops.similarity_reduce import BACKENDS
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, TOLERANCE, clustered_pairs, relative_error

ON_GPU = torch.cuda.is_available() and cuda_kernels.why_missing() is None
if not ON_GPU and cuda_host.why_missing() is not None:
    pytest.skip(cuda_host.why_missing(), allow_module_level=True)

DEVICE = "cuda" if ON_GPU else "cpu"
SCHEDULES = ("gpu",) if ON_GPU else ("ascending", "descending", "shuffled")
Inputs = functools.partial(similarity_cases.Inputs, device=DEVICE)
# Sums of float32 in another order than the reference's, of numbers that may cancel.
FLOAT32_ERROR = 2e-5


@functools.cache
def kernels(schedule):
    return None if ON_GPU else cuda_host.HostKernels(schedule)


@pytest.fixture(autouse=True)
def schedule(request):
    """Tests that do not name an order of threads get a shuffled one."""
    name = getattr(request, "param", SCHEDULES[-1])
    with contextlib.nullcontext() if ON_GPU else cuda_kernels.on_host(kernels(name)):
        yield name


@pytest.fixture(scope="module", autouse=True)
def _close():
    yield
    for name in SCHEDULES:
        if not ON_GPU:
            kernels(name).close()


def every(count):
    """So many schedules, in turns."""
    return [SCHEDULES[k % len(SCHEDULES)] for k in range(count)]


every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, indirect=True)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several bands of several chunks, also for `total`, on small matrices."""
    monkeypatch.setattr(_chunks, "CHUNK_ROWS", 16)
    monkeypatch.setattr(_chunks, "COLUMN_STEP", 16)
    monkeypatch.setattr(_products, "CHUNK_BYTES", 16 * 32 * 4)
    monkeypatch.setattr(launchers, "LEAST_HELD_ROWS", 4)
    torch.manual_seed(0)


def large_chunks(monkeypatch):
    """One chunk of several tiles."""
    monkeypatch.setattr(_chunks, "CHUNK_ROWS", 2048)
    monkeypatch.setattr(_products, "CHUNK_BYTES", 32 << 20)


def reduced_by(backend, options, memory_budget=0):
    return similarity_reduce(**options, memory_budget=memory_budget, backend=backend)


def check(options, tolerance=FLOAT32_ERROR, memory_budget=0):
    """Values, winners and every gradient for random cotangents."""
    options = {"reduce": ("logsumexp",), "dim": (0, 1), **options}
    doubled = exact(options)
    got, truth = reduced_by("cuda", options, memory_budget), reduced_by("reference", doubled)
    for value, expected in zip(flat(got), flat(truth), strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, expected) <= FLOAT32_ERROR
    for index, expected in zip(winners(got), winners(truth), strict=True):
        assert torch.equal(index, expected)
    if not any(value.requires_grad for value in flat(truth)):
        return
    cotangents = [torch.randn(v.shape).to(DEVICE) for v in flat(truth)]
    expected = gradients_of(flat(truth), cotangents, leaves(doubled))
    for g, e, leaf in zip(gradients_of(flat(got), cotangents, leaves(options)), expected, leaves(options), strict=True):
        assert g.dtype == leaf.dtype
        assert relative_error(g, e) <= tolerance


# ---- Folds and rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_fold_under_each_rule(rule, itself):
    inputs = Inputs(20, 37, 9, itself=itself, seed=3)
    check({"x": inputs.x, "y": inputs.y, "reduce": KINDS, "scale": 0.7, "pairs": inputs.pairs(rule)})


@pytest.mark.parametrize("dim", [(1,), (0,), (0, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_each_fold_negated_with_biases_and_scales(kind, dim):
    inputs = Inputs(19, 35, 6, itself=dim == (0, 1))
    options = {"scale": inputs.leaf(inputs.n), "row_bias": inputs.leaf(inputs.n), "col_bias": inputs.leaf(inputs.m)}
    options["reduce"] = (Fold(kind, negate=True),)
    check({"x": inputs.x, "y": inputs.y, "dim": dim, "pairs": Pairs(diagonal=0), **options})


@pytest.mark.parametrize("schedule,dim", [*zip(every(3), [(1,), (0,), (0, 1)], strict=True)], indirect=["schedule"])
@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("kind", ["logsumexp", "sum_softplus"])
def test_calls_without_rules(kind, itself, dim):
    """What most losses are, which has kernels of its own; with every gradient that such a call has."""
    inputs = Inputs(21, 35, 7, itself=itself)
    options = {"reduce": (Fold(kind, negate=dim == (1,)),), "dim": dim, "target": inputs.target()}
    options["scale"] = torch.tensor(0.8, device=DEVICE).requires_grad_()
    if not itself:
        options["row_bias"] = inputs.leaf(21)
    check({"x": inputs.x, "y": inputs.y, "pairs": Pairs(diagonal=2) if itself else None, **options})


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("first,second", [("differ", "below"), ("exclude", "above"), ("same", "guide")])
def test_rules_are_anded_and_spare_the_target(first, second, itself):
    inputs = Inputs(21, 34, 5, itself=itself, seed=5)
    options = {"pairs": inputs.pairs(first, second), "target": inputs.target(), "reduce": ("logsumexp", "count")}
    check({"x": inputs.x, "y": inputs.y, **options})


@every_schedule
@pytest.mark.parametrize("itself", [False, True])
def test_sets_targets_and_lists_in_one_sweep(itself):
    """Folds with scales, pairs and signs of their own, a scale of columns, both doors; every input has a gradient."""
    inputs = Inputs(20, 35, 11, itself=itself)
    folds = (
        "logsumexp",
        Fold("logsumexp", scale=inputs.leaf(inputs.n), pairs=inputs.pairs("differ", "log_weight")),
        Fold("max", pairs=inputs.pairs("exclude"), negate=True),
        Fold("sum_softplus", scale=-0.5, negate=True, bias=0.3),
    )
    options = {
        "x": inputs.x,
        "y": inputs.y,
        "reduce": folds,
        "scale": torch.tensor(0.8, device=DEVICE).requires_grad_(),
        "col_scale": inputs.leaf(inputs.m),
        "row_bias": inputs.leaf(inputs.n),
        "col_bias": inputs.leaf(inputs.m),
        "target": inputs.target(),
        "linear": inputs.lists(6, weights=True),
    }
    check(options)


@pytest.mark.parametrize("itself", [False, True])
def test_lists_may_name_a_column_twice(itself):
    inputs = Inputs(5, 40, 4, itself=itself)
    columns = torch.tensor([3, 3, 4, 0, 4, 4], device=DEVICE)
    indptr = torch.tensor([0, 3, 3, 4, 6, 6], device=DEVICE)
    linear = (indptr, columns, inputs.random(6))
    check({"x": inputs.x, "y": inputs.y, "linear": linear, "pairs": Pairs(exclude=(indptr, columns))})


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 4), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_subset_of_gradients(wanted, dtype):
    inputs = Inputs(20, 35, 7, dtype=dtype)
    names = ("x", "y", "scale", "row_bias", "col_bias")
    every = (inputs.x, inputs.y, inputs.leaf(20), inputs.leaf(20), inputs.leaf(35))
    target = inputs.target()

    def gradients(chosen):
        options = {
            name: value.detach().requires_grad_(index in chosen)
            for index, (name, value) in enumerate(zip(names, every, strict=True))
        }
        reduced = reduced_by("cuda", {**options, "reduce": ("logsumexp",), "dim": (0, 1), "target": target})
        return torch.autograd.grad(sum(v.sin().sum() for v in flat(reduced)), [options[names[i]] for i in chosen])

    whole = gradients(range(5))
    for index, gradient in zip(wanted, gradients(wanted), strict=True):
        assert torch.equal(gradient, whole[index])


# ---- Shapes ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (1, 33, 3), (33, 1, 8), (16, 32, 17), (17, 33, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_around_chunks(shape):
    inputs = Inputs(*shape)
    options = {"target": inputs.target() if inputs.m > 1 else None, "reduce": ("logsumexp", "max")}
    check({"x": inputs.x, "y": inputs.y, **options})


@pytest.mark.parametrize("size", [1, 2, 16, 17, 33])
def test_self_similarity_around_chunks(size):
    inputs = Inputs(size, size, 5, itself=True)
    options = {"pairs": Pairs(diagonal=0), "target": (torch.arange(size, device=DEVICE) + 1) % size}
    check({"x": inputs.x, "y": None, "reduce": ("logsumexp", "max"), **options})


@pytest.mark.parametrize("schedule,rules", [*zip(every(2), [(), ("differ",)], strict=True)], indirect=["schedule"])
@pytest.mark.parametrize("n,m", [(12, 300), (77, 261), (264, None)])
def test_chunks_of_several_tiles(monkeypatch, n, m, rules):
    """Tiles of more rows than warps take at a time, and tiles that lie below the diagonal, where there is no pair."""
    large_chunks(monkeypatch)
    monkeypatch.setattr(_chunks, "BLOCKS", 1)
    inputs = Inputs(n, m or n, 3, itself=m is None)
    options = {"target": inputs.target(), "pairs": inputs.pairs(*rules) if rules else None}
    options["scale"] = torch.tensor(0.8, device=DEVICE).requires_grad_()
    check({"x": inputs.x, "y": inputs.y, **options}, tolerance=1e-4)


@pytest.mark.parametrize("dim", [(1,), (0,), (0, 1)])
@pytest.mark.parametrize("kind", ["logsumexp", "sum_softplus", "sum_relu"])
@pytest.mark.parametrize("rules", [(), ("differ",)], ids=["plain", "general"])
def test_tiles_of_more_rows_than_warps_take_at_a_time(monkeypatch, rules, kind, dim):
    large_chunks(monkeypatch)
    monkeypatch.setattr(_chunks, "BLOCKS", 1)
    inputs = Inputs(69, 35, 3)
    options = {"reduce": (kind,), "dim": dim, "target": inputs.target(), "row_bias": inputs.leaf(69)}
    options["pairs"] = inputs.pairs(*rules) if rules else None
    check({"x": inputs.x, "y": inputs.y, "scale": inputs.leaf(69), **options})


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_target_that_does_not_exist_is_nan(dtype, itself):
    """A GPU is not waited for to refuse it, so kernels must stay within bounds."""
    n, m = 20, 20 if itself else 37
    inputs = Inputs(n, m, 9, itself=itself)
    x, y = (t if t is None else t.detach().to(dtype) for t in (inputs.x, inputs.y))
    target = torch.arange(n, device=DEVICE)
    target[3], target[5], target[8] = -7, m, 2**32 + 1
    layout = Layout((LogitSet(),), (SetFold(0, "logsumexp", False),)).encode()
    problem = (x, y, torch.ones(1, device=DEVICE), None, None, target, *layout)
    folds, argmax, target_logit, _, kept = launchers.forward(*problem, 0)
    assert target_logit.isnan().nonzero()[:, 0].tolist() == [3, 5, 8]
    logits = x.double() @ (x if y is None else y).double().T
    torch.testing.assert_close(folds[3], logits[3].logsumexp(0).float(), rtol=1e-3, atol=1e-3)
    gradients = launchers.backward(
        *problem, folds, argmax, torch.ones_like(folds), torch.ones_like(folds), None, kept, 7
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("n,m,d", [(0, 5, 4), (5, 0, 4), (0, 0, 4), (3, 4, 0)])
def test_empty(n, m, d):
    inputs = Inputs(n, m, d)
    options = {"x": inputs.x, "y": inputs.y, "reduce": KINDS, "dim": (0, 1), "row_bias": inputs.leaf(n)}
    got, truth = reduced_by("cuda", options), reduced_by("reference", options)
    for value, expected in zip((*flat(got), *winners(got)), (*flat(truth), *winners(truth)), strict=True):
        torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(sum(v.sum() for v in flat(r)), leaves(options)) for r in (got, truth)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


VIEWS = {
    "row-stride": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "transposed": lambda x: x.T.contiguous().T,
    "column-stride": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "unaligned": lambda x: torch.cat([x[0, :1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view):
    inputs = Inputs(17, 36, 18)
    results = []
    for change in (VIEWS[view], lambda x: VIEWS[view](x).clone(memory_format=torch.contiguous_format)):
        x, y = (change(t.detach()).requires_grad_() for t in (inputs.x, inputs.y))
        reduced = similarity_reduce(x, y, dim=(0, 1), backend="cuda")
        rows = torch.ones((), device=DEVICE).expand(17)
        results.append([reduced.rows, reduced.cols, *torch.autograd.grad(reduced.rows, [x, y], rows)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) <= FLOAT32_ERROR


# ---- Extreme values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itself", [False, True])
def test_no_pair_takes_part(itself):
    inputs = Inputs(6, 7, 4, itself=itself)
    nothing = Pairs(same=(torch.zeros(6, dtype=torch.int64), torch.ones(inputs.m, dtype=torch.int64)))
    options = {
        "x": inputs.x,
        "y": inputs.y,
        "reduce": KINDS,
        "dim": (0, 1),
        "pairs": mapped(nothing, lambda t: t.to(DEVICE)),
    }
    reduced = reduced_by("cuda", options)
    for kind, row, col in zip(KINDS, reduced.rows, reduced.cols, strict=True):
        expected = -torch.inf if kind in ("logsumexp", "max") else 0.0
        assert (row == expected).all() and (col == expected).all(), kind
    assert (reduced.row_argmax[1] == -1).all() and (reduced.col_argmax[1] == -1).all()
    for gradient in torch.autograd.grad(sum(v.sum() for v in flat(reduced)), leaves(options)):
        assert not gradient.any()


def test_a_row_without_a_pair_has_gradient_zero():
    x, y = torch.randn(3, 4).to(DEVICE).requires_grad_(), torch.randn(1, 4).to(DEVICE).requires_grad_()
    lse = similarity_reduce(x, y, pairs=Pairs(diagonal=0), backend="cuda")
    assert lse[0] == -torch.inf and lse[1:].isfinite().all()
    gx, gy = torch.autograd.grad(lse.sum(), [x, y])
    assert not gx[0].any() and gx.isfinite().all() and gy.isfinite().all()


@pytest.mark.parametrize(("rule", "bad"), idle_rows_cases.CASES[::4], ids=str)
def test_rows_that_take_part_in_no_pair_reach_nothing(rule, bad):
    loss = idle_rows_cases.reduce_loss(similarity_reduce, idle_rows_cases.rules_of(rule, DEVICE), "cuda")
    idle_rows_cases.check(loss, bad, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("itself", [False, True])
def test_nan_and_inf_propagate_as_in_the_reference(bad, itself):
    inputs = Inputs(20, 37, 8, itself=itself)
    x = inputs.x.detach().clone()
    x[3, 2] = x[5, 1] = bad
    y = None if itself else inputs.y.detach().abs()
    options = {"x": x, "y": y, "reduce": ("logsumexp", "max", "sum_softplus", "sum_relu"), "dim": (0, 1)}
    got, truth = reduced_by("cuda", options), reduced_by("reference", exact(options))
    for value, expected in zip(flat(got), flat(truth), strict=True):
        torch.testing.assert_close(value.double(), expected, equal_nan=True, rtol=1e-5, atol=1e-4)
    for index, expected in zip(winners(got), winners(truth), strict=True):
        assert torch.equal(index, expected)


def test_ties_go_to_the_smallest_index():
    x, y = torch.randint(-1, 2, (35, 3)).float().to(DEVICE), torch.randint(-1, 2, (40, 3)).float().to(DEVICE)
    for other in (y, None):
        options = {"x": x, "y": other, "reduce": ("max",), "dim": (0, 1), "pairs": Pairs(diagonal=0)}
        got, truth = reduced_by("cuda", options), reduced_by("reference", exact(options))
        for index, expected in zip(winners(got), winners(truth), strict=True):
            assert torch.equal(index, expected)


@pytest.mark.parametrize("magnitude", [1e4, 1e-4, 0.0])
def test_extreme_logits(magnitude):
    inputs = Inputs(17, 35, 8)
    # A logit of 1e5 has an error of 1e-2 in float32, whoever sums it.
    tolerance = 5e-2 if magnitude == 1e4 else FLOAT32_ERROR
    options = {"reduce": ("logsumexp", "sum_softplus"), "scale": magnitude}
    check({"x": inputs.x, "y": inputs.y, **options}, tolerance=tolerance)


@pytest.mark.parametrize("kind,bias", [("logsumexp", -1e4), ("logsumexp", -90.0), ("sum_softplus", -10.0)])
@pytest.mark.parametrize("of", ["row_bias", "col_bias"])
def test_logits_far_from_zero(kind, bias, of):
    """exp(-logit) overflows, and log(1 + exp(-10)) would lose its digits."""
    inputs = Inputs(20, 40, 8)
    options = {"x": inputs.x.detach(), "y": inputs.y.detach(), "reduce": (kind,), "dim": (0, 1)}
    options[of] = torch.full((20 if of == "row_bias" else 40,), bias, device=DEVICE)
    got, truth = reduced_by("cuda", options), reduced_by("reference", exact(options))
    for value, expected in zip(flat(got), flat(truth), strict=True):
        assert relative_error(value, expected) <= 1e-6


@pytest.mark.parametrize("of", ["row_bias", "col_bias"])
def test_a_bias_of_minus_infinity_drops_its_pairs(of):
    inputs = Inputs(10, 6, 4)
    bias = torch.tensor([0.0, -torch.inf, 0.0, -1e30, 1.0, -torch.inf], device=DEVICE)
    x, y = (inputs.y, inputs.x) if of == "row_bias" else (inputs.x, inputs.y)
    folds = ("logsumexp", "max") if of == "col_bias" else ("logsumexp",)
    check({"x": x, "y": y, "reduce": folds, of: bias, "dim": (0, 1)})


# ---- Low precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule,dtype", [*zip(every(2), [torch.bfloat16, torch.float16], strict=True)], indirect=["schedule"]
)
@pytest.mark.parametrize("itself", [False, True])
def test_values_are_exact_and_gradients_rounded(dtype, itself):
    inputs = Inputs(20, 37, 33, dtype=dtype, itself=itself)
    options = {
        "reduce": ("logsumexp", "max", "sum_softplus"),
        "scale": inputs.leaf(inputs.n),
        "target": inputs.target(),
    }
    check({"x": inputs.x, "y": inputs.y, **options}, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e7])
def test_float16_weights_stay_in_range(size):
    """Weights of 1e-9 are 0 in float16, and 1e7 is infinite."""
    inputs = Inputs(17, 36, 16, dtype=torch.float16)
    upstream = (size * torch.randn(17)).to(DEVICE)
    found = []
    for backend, dtype in (("cuda", torch.float16), ("reference", torch.float64)):
        # The operators, because autograd would round their float32 gradients to float16.
        x, y = inputs.x.detach().to(dtype), inputs.y.detach().to(dtype)
        scale = torch.ones(1, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
        problem = (x, y, scale, None, None, None, *Layout((LogitSet(),), (SetFold(0, "logsumexp", False),)).encode())
        operators = torch.ops.contrastive_ops
        folds, argmax, _, _, kept = operators.similarity_reduce_forward(*problem, 0, backend)
        gradients = operators.similarity_reduce_backward(
            *problem, folds, argmax, upstream.to(scale.dtype), None, None, kept, 3, backend
        )
        found.append(gradients[:2])
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) <= TOLERANCE[torch.float16]


PAIRED = {"info_nce": info_nce, "clip": clip, "nt_xent": functools.partial(nt_xent, normalize=False)}
# Of rows of any length: factors of rows and columns, between rectangles and within a matrix.
UNIT = {"clip of unit rows": functools.partial(clip, normalize=True), "nt_xent of unit rows": nt_xent}


def lengthened(t):
    return (t.double() * torch.linspace(0.5, 3, len(t), dtype=torch.float64, device=t.device)[:, None]).to(t.dtype)


@pairwise(dtype=[torch.bfloat16, torch.float16], level=[0.3, 0.01, 0.001], name=[*PAIRED, *UNIT])
def test_gradient_error_in_three_regimes(monkeypatch, dtype, level, name):
    large_chunks(monkeypatch)
    function, pairs = {**PAIRED, **UNIT}[name], clustered_pairs(64, 64, level, dtype=dtype)
    a, b = ((lengthened(t) if name in UNIT else t).to(DEVICE).requires_grad_() for t in pairs)
    doubled = [t.detach().double().requires_grad_() for t in (a, b)]
    truth = function(*doubled, scale=50.0, backend="reference")
    expected = torch.autograd.grad(truth, doubled)
    value = function(a, b, scale=50.0, backend="cuda")
    assert relative_error(value, truth) <= 1e-3
    for got, each in zip(torch.autograd.grad(value, [a, b]), expected, strict=True):
        assert got.dtype == dtype
        assert relative_error(got, each) <= GRADIENT_ERROR_16_BIT


@pytest.mark.skipif(not ON_GPU, reason="a GPU is needed for a CUDA graph")
@pytest.mark.parametrize("name", [*PAIRED, "siglip"])
def test_a_step_can_be_a_cuda_graph(name):
    """Nothing waits for the GPU, and nothing depends on when memory was asked for."""
    loss = siglip if name == "siglip" else PAIRED[name]
    a, b = (t.cuda().requires_grad_() for t in clustered_pairs(64, 64, 0.3, dtype=torch.bfloat16))

    def step():
        a.grad = b.grad = None
        value = loss(a, b, scale=50.0)
        value.backward()
        return value

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()
    with torch.no_grad():
        a.copy_(b.roll(1, 0))
    graph.replay()
    got = [value.detach().clone(), a.grad.clone(), b.grad.clone()]
    assert all(map(torch.equal, got, (step().detach(), a.grad, b.grad)))


# ---- What stands on it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [True, False], ids=["bands", "two sweeps"])
@pytest.mark.parametrize("rule", ["differ", "guide"])
@pytest.mark.parametrize("kind,has_extra", [("softmax", False), ("softmax", True), ("sigmoid", False)])
def test_losses_of_one_direction(monkeypatch, kind, has_extra, rule, held):
    monkeypatch.setattr(launchers, "HELD_BYTES", 8 * 40 * 4 if held else 0)
    inputs = Inputs(20, 40, 9)
    options = {
        "x": inputs.x,
        "y": inputs.y,
        "scale": inputs.leaf(20),
        "row_bias": inputs.leaf(20),
        "pairs": inputs.pairs(rule),
        "weight": inputs.leaf(20),
        "target_weight": inputs.leaf(20),
        "extra": inputs.leaf(20) if has_extra else None,
    }
    target, doubled = inputs.target(), exact(options)

    def total(given, backend):
        taken = (given[name] for name in ("x", "y", "row_bias"))
        problem = Problem.of(("similarity_loss", "x", "y"), *taken, target=target)
        rest = {name: value for name, value in given.items() if name not in ("x", "y", "row_bias")}
        return similarity_loss(problem, kind=kind, reduction="sum", backend=backend, **rest)

    totals = [total(each, backend) for each, backend in ((options, "cuda"), (doubled, "reference"))]
    assert relative_error(*totals) <= FLOAT32_ERROR
    expected = torch.autograd.grad(totals[1], leaves(doubled))
    for got, each in zip(torch.autograd.grad(totals[0], leaves(options)), expected, strict=True):
        assert relative_error(got, each) <= FLOAT32_ERROR


def test_a_loss_of_one_direction_multiplies_each_pair_once(monkeypatch):
    inputs, pairs = Inputs(35, 40, 9), []
    multiply = _products.inner_products
    monkeypatch.setattr(_products, "inner_products", lambda x, y, out: (pairs.append(out.numel()), multiply(x, y, out)))
    info_nce(inputs.x, inputs.y[:35], backend="cuda").backward()
    assert sum(pairs) == 35 * 35


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e7])
def test_a_loss_of_one_direction_in_16_bits(dtype, size):
    inputs = Inputs(35, 40, 9, dtype=dtype)
    weight, target = (size * torch.rand(35)).to(DEVICE), inputs.target()
    found = []
    for backend, change in (("cuda", dtype), ("reference", torch.float64)):
        x, y = inputs.x.detach().to(change), inputs.y.detach().to(change)
        scale = torch.full((1,), 2.0, dtype=torch.promote_types(change, torch.float32), device=DEVICE)
        layout = Layout((LogitSet(),), (SetFold(0, "logsumexp", False),)).encode()
        arguments = (x, y, scale, None, None, target, *layout, weight.to(scale.dtype), None, None, None)
        options = ("softmax", "sum", 3, 0, backend)
        found.append(torch.ops.contrastive_ops.similarity_loss(*arguments, *options)[4:6])
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) <= TOLERANCE[dtype]


LOSSES = {
    "info_nce": lambda a, b, ids, **options: info_nce(a, b, pairs=Pairs(differ=(ids, ids)), **options),
    "clip": lambda a, b, ids, **options: clip(a, b, label_smoothing=0.1, **options),
    "siglip": lambda a, b, ids, **options: siglip(a, b, **options),
    "nt_xent": lambda a, b, ids, **options: nt_xent(a, b, **options),
    "sup_con": lambda a, b, ids, **options: sup_con(torch.cat([a, b]), torch.cat([ids, ids]), **options),
    "gte": lambda a, b, ids, **options: gte(a, b, **options),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, reduction):
    inputs = Inputs(20, 20, 12)
    options = {"a": inputs.x, "b": inputs.y, "scale": torch.tensor(3.0, device=DEVICE).requires_grad_()}
    ids, doubled = torch.arange(20, device=DEVICE) // 2, exact(options)
    values = [
        LOSSES[name](**each, ids=ids, reduction=reduction, backend=backend)
        for each, backend in ((options, "cuda"), (doubled, "reference"))
    ]
    assert relative_error(*values) <= FLOAT32_ERROR
    cotangent = torch.randn(values[0].shape).to(DEVICE)
    found = [
        torch.autograd.grad(value, leaves(each), cotangent.to(value.dtype))
        for value, each in zip(values, (options, doubled), strict=True)
    ]
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) <= FLOAT32_ERROR


# ---- Memory, order, choice -------------------------------------------------------------------------------------------


def results_of(inputs, target, memory_budget=0):
    reduced = similarity_reduce(
        inputs.x,
        inputs.y,
        reduce=("logsumexp", "sum"),
        dim=(0, 1),
        target=target,
        memory_budget=memory_budget,
        backend="cuda",
    )
    sides = [t for t in (inputs.x, inputs.y) if t is not None]
    return [*flat(reduced), *torch.autograd.grad(sum(v.sin().sum() for v in flat(reduced)), sides)]


@pytest.mark.parametrize("itself", [False, True])
def test_runs_and_schedules_agree_bitwise(itself):
    inputs = Inputs(34, 40, 20, dtype=torch.bfloat16, itself=itself)
    target = torch.zeros(34, dtype=torch.int64, device=DEVICE)  # all give back to one column
    results = []
    for name in (*SCHEDULES, SCHEDULES[0]):
        with contextlib.nullcontext() if ON_GPU else cuda_kernels.on_host(kernels(name)):
            results.append(results_of(inputs, target))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_kept_products_save_products_and_change_no_bit(monkeypatch, itself, share):
    inputs, pairs = Inputs(34, 40, 64, itself=itself), []
    multiply = _products.inner_products
    monkeypatch.setattr(_products, "inner_products", lambda x, y, out: (pairs.append(out.numel()), multiply(x, y, out)))
    target = inputs.target()
    recomputed, all_pairs = results_of(inputs, target), sum(pairs)
    pairs.clear()
    kept = results_of(inputs, target, memory_budget=int(share * 4 * 36 * 40))
    assert sum(pairs) == all_pairs // 2 if share == 1.0 else all_pairs // 2 < sum(pairs) < all_pairs
    assert all(torch.equal(a, b) for a, b in zip(recomputed, kept, strict=True))


def test_self_similarity_multiplies_half(monkeypatch):
    inputs, pairs = Inputs(128, 128, 3, itself=True), []
    multiply = _products.inner_products
    monkeypatch.setattr(_products, "inner_products", lambda x, y, out: (pairs.append(out.numel()), multiply(x, y, out)))
    similarity_reduce(inputs.x, backend="cuda")
    assert sum(pairs) <= 0.57 * 128 * 128


def test_gradients_of_one_graph_twice():
    """What is kept is not overwritten by the weights."""
    inputs = Inputs(30, 40, 64)
    lse = similarity_reduce(inputs.x, inputs.y, backend="cuda", memory_budget=1 << 20)
    first, second = (torch.autograd.grad(lse.sum(), [inputs.x, inputs.y], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("itself", [False, True])
def test_out_of_memory_halves_the_chunks_and_says_so_once(monkeypatch, caplog, itself):
    inputs = Inputs(34, 40, 64, itself=itself)
    target = inputs.target()
    expected = results_of(inputs, target)
    allocate = _chunks.Workspace._allocate

    def short(self):
        if self.sizes.rows > 8:
            raise torch.OutOfMemoryError
        allocate(self)

    monkeypatch.setattr(_chunks.Workspace, "_allocate", short)
    monkeypatch.setattr(_chunks, "_warned", False)
    with caplog.at_level(logging.WARNING, "contrastive_ops"):
        got = results_of(inputs, target, memory_budget=1 << 20)
    assert [record.message for record in caplog.records] == [
        "similarity_reduce: out of memory for a chunk of inner products; goes on with chunks of 8 rows"
    ]
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) <= FLOAT32_ERROR


def test_memory_that_is_never_enough_is_an_error(monkeypatch):
    def never(self):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(_chunks.Workspace, "_allocate", never)
    inputs = Inputs(60, 50, 4)
    with pytest.raises(torch.OutOfMemoryError):
        similarity_reduce(inputs.x, inputs.y, backend="cuda")


def test_the_second_derivative_is_the_references():
    inputs = Inputs(9, 10, 4)
    found = []
    for backend, options in (
        ("cuda", {"x": inputs.x, "y": inputs.y}),
        ("reference", exact({"x": inputs.x, "y": inputs.y})),
    ):
        value = similarity_reduce(**options, backend=backend).sum()
        first = torch.autograd.grad(value, leaves(options), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves(options)))
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) <= FLOAT32_ERROR


def test_float64_is_refused():
    x = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    with pytest.raises(NotImplementedError, match="float64"):
        similarity_reduce(x, x, backend="cuda")


def test_more_sets_than_kernels_have_room_for():
    inputs = Inputs(3, 4, 2)
    folds = tuple(Fold("logsumexp", scale=float(k)) for k in range(_pairs.MOST_SETS + 1))
    with pytest.raises(NotImplementedError, match=r"7 logit sets and 7 folds \(supported: 6 and 12\)"):
        similarity_reduce(inputs.x, inputs.y, reduce=folds, backend="cuda")


def test_constants_are_those_of_the_kernels():
    sources = cuda_host.SOURCES
    text = "".join(Path(sources / name).read_text() for name in ("similarity_pairs.h", "similarity_chunk.h"))
    text += Path(sources / "similarity_sums.h").read_text()
    numbers = dict(re.findall(r"\b(k[A-Z]\w+) = (\d+)", text))
    assert (int(numbers["kMostSets"]), int(numbers["kMostFolds"])) == (_pairs.MOST_SETS, _pairs.MOST_FOLDS)
    assert int(numbers["kTileColumns"]) == _chunks.TILE_COLUMNS
    assert int(numbers["kWarps"]) == _chunks.LEAST_TILE_ROWS
    assert (int(numbers["kRowSlots"]), int(numbers["kColSlots"])) == (_weights.ROW_SLOTS, _weights.COL_SLOTS)


def test_auto_takes_the_first_backend_that_has_room(monkeypatch):
    from contrastive_ops.core import backends

    monkeypatch.setitem(backends.ORDER, "cpu", backends.ORDER["cuda"])
    # Both can run, wherever this does.
    table = {name: dataclasses.replace(BACKENDS[name], unsupported=lambda x: []) for name in ("triton", "cuda")}
    assert choose("f", table, torch.empty(2, 4), "auto") == "cuda"
    too_many = Layout((LogitSet(),) * (_pairs.MOST_SETS + 1), ())
    assert choose("f", table, torch.empty(2, 4), "auto", too_many) == "triton"
