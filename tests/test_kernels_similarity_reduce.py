"""similarity_reduce in Triton against the reference in float64: values, winners and every gradient."""

import functools

import pytest
import torch
from pairwise import pairwise

from contrastive_ops import Fold, Pairs, clip, info_nce, nt_xent, siglip, similarity_reduce, sup_con
from contrastive_ops.core import triton_kernels
from contrastive_ops.core.problem import Layout, LogitSet, Problem, SetFold
from contrastive_ops.ops.similarity_loss import similarity_loss
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, TOLERANCE, clustered_pairs, relative_error

if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)
if not (triton_kernels.interprets() or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import idle_rows_cases
import similarity_cases
from similarity_cases import KINDS, RULES, exact, flat, gradients_of, leaves, mapped, winners

from contrastive_ops.kernels import _similarity_plan, _tiles

DEVICE = "cpu" if triton_kernels.interprets() else "cuda"
Inputs = functools.partial(similarity_cases.Inputs, device=DEVICE)
DOUBLE = torch.float64
# Of `use_tier`: gradients by a kernel for each side, and by products of weights in chunks.
TIERS = (256, 0)
# Sums of float32 in another order than the reference's, of numbers that may cancel.
FLOAT32_ERROR = 2e-5


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """Several tiles per span, several spans per launch, several launches and several chunks, on small matrices."""
    monkeypatch.setattr(_similarity_plan, "PROGRAMS", 4)
    monkeypatch.setattr(_similarity_plan, "CHUNK_ROWS", 64)
    monkeypatch.setattr(_similarity_plan, "CHUNK_BYTES", 64 * 64 * 4)


@pytest.fixture(autouse=True)
def _seed_device():
    """Random numbers are made on the CPU, so that they are the same for every device."""
    torch.manual_seed(0)


def use_tier(monkeypatch, depth):
    """Up to this dimension, sweeps hold all of it and gradients are formed by a kernel for each side."""
    monkeypatch.setattr(_tiles, "RESIDENT_DEPTH", dict.fromkeys(_tiles.RESIDENT_DEPTH, (depth, depth)))


def reduced_by(backend, options):
    return similarity_reduce(**options, memory_budget=0, backend=backend)


def check(monkeypatch, options, tolerance=FLOAT32_ERROR, tiers=TIERS):
    """Values, winners and every gradient for random cotangents, by both ways to form gradients."""
    options = {"reduce": ("logsumexp",), "dim": (0, 1), **options}
    doubled = exact(options)
    got, truth = reduced_by("triton", options), reduced_by("reference", doubled)
    for value, expected in zip(flat(got), flat(truth), strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, expected) <= FLOAT32_ERROR
    for index, expected in zip(winners(got), winners(truth), strict=True):
        assert torch.equal(index, expected)
    if not any(value.requires_grad for value in flat(truth)):
        return
    cotangents = [torch.randn(v.shape).to(DEVICE) for v in flat(truth)]
    expected = gradients_of(flat(truth), cotangents, leaves(doubled))
    for depth in tiers:
        use_tier(monkeypatch, depth)
        for g, e, leaf in zip(
            gradients_of(flat(got), cotangents, leaves(options)), expected, leaves(options), strict=True
        ):
            assert g.dtype == leaf.dtype
            assert relative_error(g, e) <= tolerance


# ---- Folds and rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_every_fold_under_each_rule(monkeypatch, rule, itself):
    inputs = Inputs(33 if itself else 20, 45, 9, itself=itself, seed=3)
    options = {"reduce": KINDS, "scale": 0.7, "pairs": inputs.pairs(rule)}
    # Each rule with each way to form gradients, once with a matrix itself and once with another.
    tier = TIERS[(RULES.index(rule) + itself) % 2]
    check(monkeypatch, {"x": inputs.x, "y": inputs.y, **options}, tiers=(tier,))


@pytest.mark.parametrize("dim", [(1,), (0,), (0, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_each_fold_negated_with_biases_and_scales(monkeypatch, kind, dim):
    inputs = Inputs(35, 43, 6, itself=dim == (0, 1))
    options = {"scale": inputs.leaf(inputs.n), "row_bias": inputs.leaf(inputs.n), "col_bias": inputs.leaf(inputs.m)}
    options["reduce"] = (Fold(kind, negate=True),)
    check(monkeypatch, {"x": inputs.x, "y": inputs.y, "dim": dim, "pairs": Pairs(diagonal=0), **options})


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("first,second", [("differ", "below"), ("exclude", "above"), ("same", "guide")])
def test_rules_are_anded_and_spare_the_target(monkeypatch, first, second, itself):
    inputs = Inputs(34, 40, 5, itself=itself, seed=5)
    options = {"pairs": inputs.pairs(first, second), "target": inputs.target(), "reduce": ("logsumexp", "count")}
    check(monkeypatch, {"x": inputs.x, "y": inputs.y, **options})


@pytest.mark.parametrize("itself, seed", [(False, 0), (True, 1)])
def test_sets_targets_and_lists_in_one_sweep(monkeypatch, itself, seed):
    """Folds with scales, pairs and signs of their own, a scale of columns, both doors; every input has a gradient."""
    inputs = Inputs(35, 50, 11, itself=itself, seed=seed)
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
    check(monkeypatch, options)


@pytest.mark.parametrize("itself", [False, True])
def test_lists_may_name_a_column_twice(monkeypatch, itself):
    inputs = Inputs(5, 70, 4, itself=itself)
    columns = torch.tensor([3, 3, 4, 0, 4, 4], device=DEVICE)
    indptr = torch.tensor([0, 3, 3, 4, 6, 6], device=DEVICE)
    linear = (indptr, columns, inputs.random(6))
    check(monkeypatch, {"x": inputs.x, "y": inputs.y, "linear": linear, "pairs": Pairs(exclude=(indptr, columns))})


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 4), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("depth", TIERS)
def test_every_subset_of_gradients(monkeypatch, wanted, depth):
    use_tier(monkeypatch, depth)
    inputs = Inputs(20, 35, 7)
    names = ("x", "y", "scale", "row_bias", "col_bias")
    every = (inputs.x, inputs.y, inputs.leaf(20), inputs.leaf(20), inputs.leaf(35))

    def gradients(chosen):
        options = {
            name: value.detach().requires_grad_(index in chosen)
            for index, (name, value) in enumerate(zip(names, every, strict=True))
        }
        reduced = reduced_by("triton", {**options, "reduce": ("logsumexp",), "dim": (0, 1), "target": inputs_target})
        return torch.autograd.grad(sum(v.sin().sum() for v in flat(reduced)), [options[names[i]] for i in chosen])

    inputs_target = inputs.target()
    whole = gradients(range(5))
    for index, gradient in zip(wanted, gradients(wanted), strict=True):
        torch.testing.assert_close(gradient, whole[index], rtol=1e-6, atol=1e-6)


# ---- Shapes ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 1), (1, 33, 3), (33, 1, 8), (31, 64, 17), (32, 65, 16), (33, 63, 31), (65, 97, 1), (2, 67, 40)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_around_tiles(monkeypatch, shape):
    inputs = Inputs(*shape)
    options = {"target": inputs.target() if inputs.m > 1 else None, "reduce": ("logsumexp", "max")}
    check(monkeypatch, {"x": inputs.x, "y": inputs.y, **options})


@pytest.mark.parametrize("size", [1, 2, 31, 33, 64, 97])
def test_self_similarity_around_tiles(monkeypatch, size):
    inputs = Inputs(size, size, 5, itself=True)
    options = {"pairs": Pairs(diagonal=0), "target": (torch.arange(size, device=DEVICE) + 1) % size}
    check(monkeypatch, {"x": inputs.x, "y": None, "reduce": ("logsumexp", "max"), **options})


@pytest.mark.parametrize("itself", [False, True])
def test_a_dimension_that_is_summed_in_steps(monkeypatch, itself):
    inputs = Inputs(33, 34, 300, itself=itself)
    check(monkeypatch, {"x": inputs.x, "y": inputs.y, "reduce": ("logsumexp",), "scale": 0.1}, tiers=(256,))


@pytest.mark.parametrize("itself", [False, True])
def test_parts_of_folds_are_merged_between_launches(monkeypatch, itself):
    """Memory for one block of rows: a launch per block, and what a block of an earlier launch left is not met again."""
    monkeypatch.setattr(_similarity_plan, "PARTS_BYTES", 1)
    inputs = Inputs(70, 40, 4, itself=itself)
    options = {"reduce": ("logsumexp", "max"), "linear": inputs.lists(4), "pairs": inputs.pairs("differ")}
    check(monkeypatch, {"x": inputs.x, "y": inputs.y, **options})


@pytest.mark.parametrize("n,m,d", [(0, 5, 4), (5, 0, 4), (0, 0, 4), (3, 4, 0)])
@pytest.mark.parametrize("depth", TIERS)
def test_empty(monkeypatch, n, m, d, depth):
    use_tier(monkeypatch, depth)
    inputs = Inputs(n, m, d)
    options = {"x": inputs.x, "y": inputs.y, "reduce": KINDS, "dim": (0, 1), "row_bias": inputs.leaf(n)}
    got, truth = reduced_by("triton", options), reduced_by("reference", options)
    for value, expected in zip((*flat(got), *winners(got)), (*flat(truth), *winners(truth)), strict=True):
        torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(sum(v.sum() for v in flat(r)), leaves(options)) for r in (got, truth)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        lambda x: x.T.contiguous().T,
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: x[:1].expand(x.shape),
    ],
    ids=["row-stride", "transposed", "column-stride", "expanded"],
)
@pytest.mark.parametrize("depth", TIERS)
def test_strides(monkeypatch, view, depth):
    use_tier(monkeypatch, depth)
    inputs = Inputs(33, 40, 18)
    results = []
    for change in (view, lambda x: view(x).contiguous()):
        x, y = (change(t.detach()).requires_grad_() for t in (inputs.x, inputs.y))
        reduced = similarity_reduce(x, y, dim=(0, 1), backend="triton")
        rows = torch.ones((), device=DEVICE).expand(33)
        results.append([reduced.rows, reduced.cols, *torch.autograd.grad(reduced.rows, [x, y], rows)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


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
    reduced = reduced_by("triton", options)
    for kind, row, col in zip(KINDS, reduced.rows, reduced.cols, strict=True):
        expected = -torch.inf if kind in ("logsumexp", "max") else 0.0
        assert (row == expected).all() and (col == expected).all(), kind
    assert (reduced.row_argmax[1] == -1).all() and (reduced.col_argmax[1] == -1).all()
    for gradient in torch.autograd.grad(sum(v.sum() for v in flat(reduced)), leaves(options)):
        assert not gradient.any()


def test_a_row_without_a_pair_has_gradient_zero():
    x, y = torch.randn(3, 4).to(DEVICE).requires_grad_(), torch.randn(1, 4).to(DEVICE).requires_grad_()
    lse = similarity_reduce(x, y, pairs=Pairs(diagonal=0), backend="triton")
    assert lse[0] == -torch.inf and lse[1:].isfinite().all()
    gx, gy = torch.autograd.grad(lse.sum(), [x, y])
    assert not gx[0].any() and gx.isfinite().all() and gy.isfinite().all()


@pytest.mark.parametrize("depth", TIERS)
@pytest.mark.parametrize(("rule", "bad"), idle_rows_cases.CASES[::4], ids=str)
def test_rows_that_take_part_in_no_pair_reach_nothing(rule, bad, depth, monkeypatch):
    use_tier(monkeypatch, depth)
    loss = idle_rows_cases.reduce_loss(similarity_reduce, idle_rows_cases.rules_of(rule, DEVICE), "triton")
    idle_rows_cases.check(loss, bad, torch.bfloat16, DEVICE)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("itself", [False, True])
def test_nan_and_inf_propagate_as_in_the_reference(bad, itself):
    inputs = Inputs(40, 37, 8, itself=itself)
    x = inputs.x.detach().clone()
    x[3, 2] = bad
    y = None if itself else inputs.y.detach().abs()
    options = {"x": x, "y": y, "reduce": ("logsumexp", "max", "sum_softplus", "sum_relu"), "dim": (0, 1)}
    got, truth = reduced_by("triton", options), reduced_by("reference", exact(options))
    for value, expected in zip(flat(got), flat(truth), strict=True):
        torch.testing.assert_close(value.double(), expected, equal_nan=True, rtol=1e-5, atol=1e-4)
    for index, expected in zip(winners(got), winners(truth), strict=True):
        assert torch.equal(index, expected)


def test_ties_go_to_the_smallest_index():
    x, y = torch.randint(-1, 2, (70, 3)).float().to(DEVICE), torch.randint(-1, 2, (75, 3)).float().to(DEVICE)
    for other in (y, None):
        options = {"x": x, "y": other, "reduce": ("max",), "dim": (0, 1), "pairs": Pairs(diagonal=0)}
        got, truth = reduced_by("triton", options), reduced_by("reference", exact(options))
        for index, expected in zip(winners(got), winners(truth), strict=True):
            assert torch.equal(index, expected)


@pytest.mark.parametrize("magnitude", [1e4, 1e-4, 0.0])
def test_extreme_logits(monkeypatch, magnitude):
    inputs = Inputs(33, 35, 8)
    # A logit of 1e5 has an error of 1e-2 in float32, whoever sums it.
    tolerance = 5e-2 if magnitude == 1e4 else FLOAT32_ERROR
    options = {"reduce": ("logsumexp", "sum_softplus"), "scale": magnitude}
    check(monkeypatch, {"x": inputs.x, "y": inputs.y, **options}, tolerance=tolerance)


@pytest.mark.parametrize("kind,bias", [("logsumexp", -1e4), ("logsumexp", -90.0), ("sum_softplus", -10.0)])
def test_logits_far_from_zero(kind, bias):
    """exp(-logit) overflows, and log(1 + exp(-10)) would lose its digits."""
    inputs = Inputs(20, 40, 8)
    options = {"x": inputs.x.detach(), "y": inputs.y.detach(), "reduce": (kind,), "dim": (0, 1)}
    options["row_bias"] = torch.full((20,), bias, device=DEVICE)
    got, truth = reduced_by("triton", options), reduced_by("reference", exact(options))
    for value, expected in zip(flat(got), flat(truth), strict=True):
        assert relative_error(value, expected) <= 1e-6


def test_a_bias_of_minus_infinity_drops_a_column(monkeypatch):
    inputs = Inputs(10, 6, 4)
    bias = torch.tensor([0.0, -torch.inf, 0.0, -1e30, 1.0, -torch.inf], device=DEVICE)
    check(monkeypatch, {"x": inputs.x, "y": inputs.y, "reduce": ("logsumexp", "max"), "col_bias": bias, "dim": (1,)})


# ---- Low precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("itself", [False, True])
def test_values_are_exact_and_gradients_rounded(monkeypatch, dtype, itself):
    inputs = Inputs(37, 45, 33, dtype=dtype, itself=itself)
    options = {
        "reduce": ("logsumexp", "max", "sum_softplus"),
        "scale": inputs.leaf(inputs.n),
        "target": inputs.target(),
    }
    check(monkeypatch, {"x": inputs.x, "y": inputs.y, **options}, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e7])
@pytest.mark.parametrize("depth", TIERS)
def test_float16_weights_stay_in_range(monkeypatch, size, depth):
    """Weights of 1e-9 are 0 in float16, and 1e7 is infinite."""
    use_tier(monkeypatch, depth)
    inputs = Inputs(33, 40, 16, dtype=torch.float16)
    upstream = (size * torch.randn(33)).to(DEVICE)
    found = []
    for backend, dtype in (("triton", torch.float16), ("reference", DOUBLE)):
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
    monkeypatch.setattr(_tiles, "INTERPRETED", _tiles.Tiles(128, 128, 32, 1, 1))
    function, pairs = {**PAIRED, **UNIT}[name], clustered_pairs(256, 64, level, dtype=dtype)
    a, b = ((lengthened(t) if name in UNIT else t).to(DEVICE).requires_grad_() for t in pairs)
    doubled = [t.detach().double().requires_grad_() for t in (a, b)]
    truth = function(*doubled, scale=50.0, backend="reference")
    expected = torch.autograd.grad(truth, doubled)
    for depth in TIERS:
        use_tier(monkeypatch, depth)
        value = function(a, b, scale=50.0, backend="triton")
        assert relative_error(value, truth) <= 1e-3
        for got, each in zip(torch.autograd.grad(value, [a, b]), expected, strict=True):
            assert got.dtype == dtype
            assert relative_error(got, each) <= GRADIENT_ERROR_16_BIT


# ---- What stands on it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,has_extra", [("softmax", False), ("softmax", True), ("sigmoid", False)])
def test_losses_of_one_direction(kind, has_extra):
    inputs = Inputs(35, 40, 9)
    options = {
        "x": inputs.x,
        "y": inputs.y,
        "scale": inputs.leaf(35),
        "row_bias": inputs.leaf(35),
        "pairs": inputs.pairs("differ"),
        "weight": inputs.leaf(35),
        "target_weight": inputs.leaf(35),
        "extra": inputs.leaf(35) if has_extra else None,
    }
    target, doubled = inputs.target(), exact(options)

    def total(given, backend):
        taken = (given[name] for name in ("x", "y", "row_bias"))
        problem = Problem.of(("similarity_loss", "x", "y"), *taken, target=target)
        rest = {name: value for name, value in given.items() if name not in ("x", "y", "row_bias")}
        return similarity_loss(problem, kind=kind, reduction="sum", backend=backend, **rest)

    totals = [total(each, backend) for each, backend in ((options, "triton"), (doubled, "reference"))]
    assert relative_error(*totals) <= FLOAT32_ERROR
    expected = torch.autograd.grad(totals[1], leaves(doubled))
    for got, each in zip(torch.autograd.grad(totals[0], leaves(options)), expected, strict=True):
        assert relative_error(got, each) <= FLOAT32_ERROR


LOSSES = {
    "info_nce": lambda a, b, ids, **options: info_nce(a, b, pairs=Pairs(differ=(ids, ids)), **options),
    "clip": lambda a, b, ids, **options: clip(a, b, label_smoothing=0.1, **options),
    "siglip": lambda a, b, ids, **options: siglip(a, b, **options),
    "nt_xent": lambda a, b, ids, **options: nt_xent(a, b, **options),
    "sup_con": lambda a, b, ids, **options: sup_con(torch.cat([a, b]), torch.cat([ids, ids]), **options),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, reduction):
    inputs = Inputs(20, 20, 12)
    options = {"a": inputs.x, "b": inputs.y, "scale": torch.tensor(3.0, device=DEVICE).requires_grad_()}
    ids, doubled = torch.arange(20, device=DEVICE) // 2, exact(options)
    values = [
        LOSSES[name](**each, ids=ids, reduction=reduction, backend=backend)
        for each, backend in ((options, "triton"), (doubled, "reference"))
    ]
    assert relative_error(*values) <= FLOAT32_ERROR
    cotangent = torch.randn(values[0].shape).to(DEVICE)
    found = [
        torch.autograd.grad(value, leaves(each), cotangent.to(value.dtype))
        for value, each in zip(values, (options, doubled), strict=True)
    ]
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) <= FLOAT32_ERROR


@pytest.mark.parametrize("itself", [False, True])
def test_two_runs_agree_bitwise(monkeypatch, itself):
    inputs = Inputs(70, 80, 20, dtype=torch.bfloat16, itself=itself)
    target = torch.zeros(70, dtype=torch.int64, device=DEVICE)  # all give back to one column
    for depth in TIERS:
        use_tier(monkeypatch, depth)
        results = []
        for _ in range(2):
            reduced = similarity_reduce(
                inputs.x, inputs.y, reduce=("logsumexp", "sum"), dim=(0, 1), target=target, backend="triton"
            )
            results.append([*flat(reduced), *torch.autograd.grad(flat(reduced)[0].sin().sum(), inputs_of(inputs))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def inputs_of(inputs):
    return [t for t in (inputs.x, inputs.y) if t is not None]


def test_no_products_are_kept():
    inputs = Inputs(20, 20, 64)
    reduced = similarity_reduce(inputs.x, inputs.y, memory_budget=1 << 30, backend="triton")
    saved = reduced.grad_fn.saved_tensors if hasattr(reduced.grad_fn, "saved_tensors") else ()
    assert sum(t.numel() for t in saved if t is not None) <= 4 * (inputs.x.numel() + inputs.y.numel())


def test_the_second_derivative_is_the_references(monkeypatch):
    inputs = Inputs(9, 10, 4)
    found = []
    for backend, options in (
        ("triton", {"x": inputs.x, "y": inputs.y}),
        ("reference", exact({"x": inputs.x, "y": inputs.y})),
    ):
        value = similarity_reduce(**options, backend=backend).sum()
        first = torch.autograd.grad(value, leaves(options), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves(options)))
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) <= FLOAT32_ERROR
