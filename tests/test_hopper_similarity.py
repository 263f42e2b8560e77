"""similarity_reduce by the kernels for Hopper GPUs against the reference in float64; see hopper_cases.py."""

import functools
import re
from pathlib import Path

import pytest
import similarity_cases
import torch
from hopper_cases import (  # noqa: F401 - fixtures
    DEVICE,
    DTYPES,
    ON_GPU,
    SCHEDULES,
    close_kernels,
    every_schedule,
    kernels,
    running,
    schedule,
)
from similarity_cases import exact, flat, gradients_of, leaves, winners

from contrastive_ops import Fold, Pairs, clip, info_nce, nt_xent, siglip, similarity_reduce
from contrastive_ops.core import cuda_kernels
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf, SetFold
from contrastive_ops.core.rules import Slot
from contrastive_ops.cuda import hopper
from contrastive_ops.ops.similarity_reduce import BACKENDS
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, clustered_pairs, relative_error

Inputs = functools.partial(similarity_cases.Inputs, device=DEVICE)
VALUE_ERROR = 2e-5
# Of gradients before they are rounded to the dtype of the inputs, whose weights have 8 or 11 bits.
WEIGHT_ERROR = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def folded(options, backend):
    return similarity_reduce(**options, memory_budget=0, backend=backend)


def check_values(options):
    """Values, targets' logits and winners."""
    options = {"reduce": ("logsumexp",), "dim": (0, 1), **options}
    with torch.no_grad():
        got, truth = folded(options, "hopper"), folded(exact(options), "reference")
    for value, expected in zip(flat(got), flat(truth), strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, expected) <= VALUE_ERROR
    for index, expected in zip(winners(got), winners(truth), strict=True):
        assert torch.equal(index, expected)


def unit_leaf(x, longest):
    """Rows of such a length, so that logits have one size whatever the dimension."""
    x = (torch.nn.functional.normalize(x.detach().float(), dim=1) * longest).to(x.dtype)
    return x.requires_grad_()


def problem(n, m, d, dtype=torch.bfloat16, seed=0, longest=4.0):
    inputs = Inputs(n, m, d, dtype=dtype, seed=seed)
    inputs.x, inputs.y = (unit_leaf(t, longest) for t in (inputs.x, inputs.y))
    return inputs


# ---- Folds -----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 64), (130, 3, 72), (5, 200, 128), (300, 500, 64), (257, 385, 200), (700, 193, 64)]


@every_schedule
@pytest.mark.parametrize("n,m,d", SHAPES)
def test_logsumexp_of_rows_and_columns(n, m, d):
    """Tiles at every edge, several for each block, and dimensions that end within a step."""
    inputs = problem(n, m, d, DTYPES[n % 2])
    check_values({"x": inputs.x, "y": inputs.y, "scale": 2.0, "target": inputs.target()})


def negated_or_with_target(kind, inputs, dim):
    """Not both: targets' logits are of a set whose sign is plain."""
    negate = dim == (1,)
    return {"reduce": (Fold(kind, negate=negate),), "target": None if negate else inputs.target()}


@pytest.mark.parametrize("dim", [(1,), (0,), (0, 1)])
@pytest.mark.parametrize("kind", similarity_cases.KINDS)
def test_every_kind(kind, dim):
    inputs = problem(150, 210, 64)
    options = {"dim": dim, "pairs": Pairs(diagonal=2), **negated_or_with_target(kind, inputs, dim)}
    check_values({"x": inputs.x, "y": inputs.y, "scale": 1.5, **options})


def test_several_kinds_in_one_call():
    inputs = problem(140, 200, 64)
    check_values({"x": inputs.x, "y": inputs.y, "reduce": similarity_cases.KINDS})


@pytest.mark.parametrize(
    "rules", [("diagonal",), ("differ",), ("same",), ("below",), ("above",), ("differ", "same", "below", "above")]
)
def test_rules(rules):
    inputs = problem(150, 230, 64, seed=3)
    options = {"pairs": inputs.pairs(*rules), "target": inputs.target()}
    check_values({"x": inputs.x, "y": inputs.y, "reduce": ("logsumexp", "count"), **options})


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("of_rows", [False, True])
def test_scales_and_biases(of_rows, negate):
    """Scales may be negative, and biases infinite."""
    inputs = problem(150, 230, 64)
    scale = inputs.random(150) if of_rows else -1.3
    row_bias, col_bias = inputs.random(150), inputs.random(230)
    row_bias[3], col_bias[200] = -torch.inf, -torch.inf
    options = {"scale": scale, "row_bias": row_bias, "col_bias": col_bias, "target": inputs.target()}
    if negate:
        row_bias[3], col_bias[200], options["target"] = 3.0, -2.0, None
    check_values({"x": inputs.x, "y": inputs.y, "reduce": (Fold("logsumexp", negate=negate),), **options})


@every_schedule
def test_logits_that_lie_far_apart():
    """Rows and columns then have maxima of their own."""
    inputs = problem(200, 210, 64)
    inputs.x = (inputs.x.detach() * torch.linspace(0.01, 16, 200)[:, None]).to(torch.bfloat16)
    check_values({"x": inputs.x, "y": inputs.y, "scale": 8.0, "target": inputs.target()})


def test_values_that_are_not_finite_stay_in_their_rows_and_columns():
    inputs = problem(200, 210, 64)
    x = inputs.x.detach().clone()
    x[7, 3], x[150, 0] = torch.nan, torch.inf
    options = {"reduce": ("logsumexp",), "dim": (0, 1)}
    got = similarity_reduce(x, inputs.y, **options, backend="hopper")
    truth = similarity_reduce(x.double(), inputs.y.double(), **options, backend="reference")
    for value, expected in zip(flat(got), flat(truth), strict=True):
        assert torch.equal(value.isnan(), expected.isnan())
        finite = expected.isfinite()
        assert relative_error(value[finite], expected[finite]) <= VALUE_ERROR
        torch.testing.assert_close(value[~finite].double(), expected[~finite], equal_nan=True)


def test_rows_and_columns_without_a_pair():
    inputs = problem(140, 200, 64)
    ids = torch.zeros(140, dtype=torch.int64, device=DEVICE)
    others = torch.zeros(200, dtype=torch.int64, device=DEVICE)
    options = {"reduce": ("logsumexp",), "dim": (0, 1), "pairs": Pairs(differ=(ids, others))}
    got = similarity_reduce(inputs.x, inputs.y, **options, backend="hopper")
    assert all(torch.equal(value, torch.full_like(value, -torch.inf)) for value in flat(got))


@pytest.mark.parametrize("n,m", [(0, 5), (5, 0), (0, 0)])
def test_no_rows_and_no_columns(n, m):
    inputs = Inputs(n, m, 64, dtype=torch.bfloat16)
    check_values({"x": inputs.x, "y": inputs.y})


# ---- Gradients -------------------------------------------------------------------------------------------------------


def check_gradients(options, dtype):
    """Every gradient, for random cotangents, in the dtype of its leaf."""
    options = {"reduce": ("logsumexp",), "dim": (0, 1), **options}
    doubled = exact(options)
    got, truth = folded(options, "hopper"), folded(doubled, "reference")
    cotangents = [torch.randn(v.shape).to(DEVICE) for v in flat(truth)]
    expected = gradients_of(flat(truth), cotangents, leaves(doubled))
    for g, e, leaf in zip(gradients_of(flat(got), cotangents, leaves(options)), expected, leaves(options), strict=True):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        assert relative_error(g, e) <= WEIGHT_ERROR[dtype]


@every_schedule
@pytest.mark.parametrize("n,m,d", [(1, 1, 64), (130, 3, 72), (300, 500, 64), (600, 261, 136)])
def test_gradients_of_rows_and_columns(n, m, d):
    inputs = problem(n, m, d, DTYPES[n % 2])
    scale = torch.tensor(2.0, device=DEVICE).requires_grad_()
    check_gradients({"x": inputs.x, "y": inputs.y, "scale": scale, "target": inputs.target()}, DTYPES[n % 2])


@pytest.mark.parametrize("dim", [(1,), (0,)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["logsumexp", "sum_softplus"])
def test_gradients_of_one_direction(kind, dtype, dim):
    """Those of columns of softplus are of kernels for every GPU."""
    inputs = problem(150, 210, 64, dtype)
    options = {"scale": inputs.leaf(150), "row_bias": inputs.leaf(150), "pairs": Pairs(diagonal=1)}
    options |= negated_or_with_target(kind, inputs, dim)
    check_gradients({"x": inputs.x, "y": inputs.y, "dim": dim, **options}, dtype)


@pytest.mark.parametrize("rules", [("differ", "below"), ("same",), ("above",)])
def test_gradients_under_rules(rules):
    inputs = problem(150, 230, 64, seed=3)
    options = {"pairs": inputs.pairs(*rules), "target": inputs.target(), "row_bias": inputs.leaf(150)}
    check_gradients({"x": inputs.x, "y": inputs.y, **options}, torch.bfloat16)


def test_gradients_of_other_folds_and_of_biases_of_columns():
    inputs = problem(40, 60, 64)
    options = {"reduce": ("max", "sum_relu"), "col_bias": inputs.leaf(60)}
    check_gradients({"x": inputs.x, "y": inputs.y, **options}, torch.bfloat16)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_every_subset_of_gradients(wanted):
    inputs = problem(140, 150, 64)
    given = (inputs.x, inputs.y, torch.tensor(1.0, device=DEVICE))
    x, y, scale = (t.detach().requires_grad_(k in wanted) for k, t in enumerate(given))
    check_gradients({"x": x, "y": y, "scale": scale, "target": inputs.target()}, torch.bfloat16)


def test_bands_of_rows(monkeypatch):
    """Several launches, each with weights of some of the rows."""
    monkeypatch.setattr(hopper, "FOLDED_ROWS", 256)
    monkeypatch.setattr(hopper, "WEIGHT_BYTES", 1)
    inputs = problem(600, 150, 64)
    options = {"scale": inputs.leaf(600), "target": inputs.target()}
    check_values({"x": inputs.x, "y": inputs.y, **options})
    check_gradients({"x": inputs.x, "y": inputs.y, **options}, torch.bfloat16)


# ---- Kept logits -----------------------------------------------------------------------------------------------------

# With logits that are off by up to 2^-11.
KEPT_ERROR = {torch.bfloat16: 4e-3, torch.float16: 8e-4}
ALL = 1 << 30


def weighed(inputs, scale, budget, **options):
    """Values, and gradients of x, y and the scale for one cotangent, formed twice."""
    factor = torch.tensor(scale, device=DEVICE).requires_grad_()
    given = {"x": inputs.x, "y": inputs.y, "scale": factor, "reduce": ("logsumexp",), "dim": (0, 1), **options}
    values = flat(similarity_reduce(**given, memory_budget=budget, backend="hopper"))
    truth = exact(given)
    expected = flat(similarity_reduce(**truth, backend="reference"))
    cotangents = [torch.randn(len(v), generator=torch.Generator().manual_seed(len(v))).to(DEVICE) for v in values]
    found = [gradients_of(values, cotangents, leaves(given)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # what was kept is as it was
    errors = [
        float(relative_error(g, e))
        for g, e in zip(found[0], gradients_of(expected, cotangents, leaves(truth)), strict=True)
    ]
    return values, found[0], errors


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@every_schedule
@pytest.mark.parametrize("n,m", [(1, 1), (97, 150), (130, 3), (300, 500)])
def test_gradients_from_kept_logits(n, m):
    """Which values are those that forward has without."""
    dtype = DTYPES[n % 2]
    inputs = problem(n, m, 64, dtype)
    options = {"pairs": Pairs(diagonal=1), "target": inputs.target()}
    values, kept, errors = weighed(inputs, 2.0, ALL, **options)
    others, again, _ = weighed(inputs, 2.0, 0, **options)
    assert same(values, others) and max(errors) <= KEPT_ERROR[dtype]
    assert n == 1 or not same(kept, again)


@pytest.mark.parametrize("dim", [(1,), (0,)])
def test_kept_logits_of_one_direction_under_rules(dim):
    inputs = problem(150, 230, 64, seed=3)
    options = {"dim": dim, "pairs": inputs.pairs("differ", "below"), "target": inputs.target()}
    assert max(weighed(inputs, 2.0, ALL, **options)[2]) <= KEPT_ERROR[torch.bfloat16]


def test_logits_that_lie_too_far_apart_are_not_kept():
    """The gradients are those without, bit for bit."""
    inputs = problem(300, 210, 64)
    target = inputs.target()
    found = [weighed(inputs, 8.0, budget, target=target) for budget in (ALL, 0)]
    assert same(found[0][1], found[1][1]) and max(found[0][2]) <= WEIGHT_ERROR[torch.bfloat16]


@pytest.mark.parametrize("rows", [256, 512, 768])
def test_kept_logits_of_some_rows(rows, monkeypatch):
    """The others are multiplied again, as is the second band, which has a pair of tiles that is wide."""
    monkeypatch.setattr(hopper, "WEIGHT_BYTES", 1)
    inputs = problem(600, 130, 64)
    x = inputs.x.detach().clone()
    x[300] *= 16
    inputs.x = x.requires_grad_()
    budget, target = 4 * sum(hopper.Kept.sizes(600, 130, rows // 256)), inputs.target()
    values, kept, errors = weighed(inputs, 2.0, budget, target=target)
    others, again, _ = weighed(inputs, 2.0, 0, target=target)
    assert same(values, others) and max(errors) <= KEPT_ERROR[torch.bfloat16]
    alike = [torch.equal(a, b) for a, b in zip(kept[0].split(256), again[0].split(256), strict=True)]
    assert alike == [False, True, rows < 768]


@pytest.mark.parametrize("normalize", [False, True])
def test_kept_logits_where_weights_cancel(normalize):
    x, y = (t.to(DEVICE) for t in clustered_pairs(256, 64, 0.1, dtype=torch.bfloat16, scale=30.0))
    options = {"scale": 30.0, "normalize": normalize}
    got = loss_gradients(clip, x, y, **options, memory_budget=ALL, backend="hopper")
    truth = loss_gradients(clip, x.double(), y.double(), **options, backend="reference")
    for value, expected in zip(got, truth, strict=True):
        assert relative_error(value, expected) <= GRADIENT_ERROR_16_BIT


def test_values_that_are_not_finite_are_not_kept():
    inputs = problem(40, 50, 64)
    x = inputs.x.detach().clone()
    x[7, 3] = torch.nan
    rows = similarity_reduce(x.requires_grad_(), inputs.y, memory_budget=ALL, backend="hopper")
    (dx,) = torch.autograd.grad(rows.nan_to_num().sum() + rows[7], x)
    assert dx[7].isnan().all()


# ---- A matrix that is compared with itself ---------------------------------------------------------------------------


def itself(n, d=64, dtype=torch.bfloat16, seed=0):
    inputs = Inputs(n, n, d, itself=True, dtype=dtype, seed=seed)
    inputs.x = unit_leaf(inputs.x, 4.0)
    return inputs


def check_itself(inputs, dim=(1,), **options):
    """Values and gradients; `options` are made of the inputs."""
    given = {"y": None, "dim": dim, **options}
    check_values({"x": inputs.x.detach(), **given})
    check_gradients({"x": inputs.x, **given}, inputs.x.dtype)


@every_schedule
@pytest.mark.parametrize("n", [1, 97, 129, 257, 705])
def test_tiles_above_the_diagonal(n):
    """One tile and less, tiles that the diagonal crosses, and those that only their mirror has; targets anywhere."""
    inputs = itself(n, dtype=DTYPES[n // 97 % 2])
    scale = torch.tensor(2.0, device=DEVICE).requires_grad_()
    check_itself(inputs, scale=scale, pairs=Pairs(diagonal=0), target=inputs.target())


@pytest.mark.parametrize("dim", [(1,), (0,), (0, 1)])
@pytest.mark.parametrize("kind", ["logsumexp", "sum_softplus"])
def test_directions_of_a_matrix_with_itself(kind, dim):
    """A diagonal that is not in the middle, so that (i, j) is left out and (j, i) is not."""
    inputs = itself(300, seed=1)
    kept = Pairs(diagonal=2 if dim == (1,) else -131)
    check_itself(inputs, dim, reduce=(kind,), pairs=kept, target=inputs.target())


@pytest.mark.parametrize("dim", [(1,), (0,)])
def test_every_kind_of_a_matrix_with_itself(dim):
    inputs = itself(210)
    options = {"dim": dim, "pairs": inputs.pairs("diagonal", "differ"), "target": inputs.target()}
    check_values({"x": inputs.x, "y": None, "reduce": similarity_cases.KINDS, **options})


@pytest.mark.parametrize("dim", [(1,), (0,)])
@pytest.mark.parametrize("rules", [("differ",), ("same",), ("below",), ("above",), ("diagonal", "differ", "below")])
def test_rules_of_a_matrix_with_itself(rules, dim):
    """Vectors of rows that are not those of columns."""
    inputs = itself(290, seed=3)
    check_itself(inputs, dim, pairs=inputs.pairs(*rules), target=inputs.target())


@pytest.mark.parametrize("target", ["before", "behind", "own", "one"])
def test_targets_of_a_matrix_with_itself(target):
    """In the half that is not multiplied, in the other, on the diagonal, and one of all rows."""
    inputs, rows = itself(400), torch.arange(400, device=DEVICE)
    columns = {"before": (rows - 150).clamp(min=0), "behind": (rows + 150).clamp(max=399), "own": rows}
    check_itself(inputs, target=columns.get(target, torch.full_like(rows, 201)))


@pytest.mark.parametrize("option", ["scale", "row_bias", "col_bias"])
def test_logits_that_are_not_symmetric(option):
    """Then all tiles are multiplied."""
    inputs = itself(150)
    check_itself(inputs, target=inputs.target(), **{option: inputs.leaf(150)})


@pytest.mark.parametrize("dim", [(1,), (0,)])
def test_a_matrix_with_itself_whose_logits_lie_far_apart(dim):
    inputs = itself(300)
    inputs.x = (inputs.x.detach() * torch.linspace(0.01, 8, 300)[:, None].to(DEVICE)).to(torch.bfloat16)
    options = {"dim": dim, "scale": 4.0, "pairs": inputs.pairs("differ"), "target": inputs.target()}
    check_values({"x": inputs.x, "y": None, **options})


def test_bands_of_a_matrix_with_itself(monkeypatch):
    """Rows of which earlier bands have a part, and weights that begin with the band's columns."""
    monkeypatch.setattr(hopper, "FOLDED_ROWS", 256)
    monkeypatch.setattr(hopper, "WEIGHT_BYTES", 1)
    inputs = itself(600)
    check_itself(inputs, pairs=Pairs(diagonal=0), target=inputs.target())


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nt_xent_where_weights_cancel(dtype, normalize):
    z0, z1 = (t.to(DEVICE) for t in clustered_pairs(150, 64, 0.1, dtype=dtype, scale=100.0))
    options = {"scale": 100.0, "normalize": normalize}
    got = loss_gradients(nt_xent, z0, z1, **options, backend="hopper")
    truth = loss_gradients(nt_xent, z0.double(), z1.double(), **options, backend="reference")
    for value, expected in zip(got, truth, strict=True):
        assert relative_error(value, expected) <= GRADIENT_ERROR_16_BIT


def test_rounding_is_given_back_to_rows_and_columns():
    """The second half of the rows is mostly met as columns: without theirs its error is 1.8 times that of the first."""
    z0, z1 = (t.to(DEVICE) for t in clustered_pairs(150, 64, 0.1, dtype=torch.bfloat16, scale=20.0))
    got = loss_gradients(nt_xent, z0, z1, scale=20.0, normalize=False, backend="hopper")
    truth = loss_gradients(nt_xent, z0.double(), z1.double(), scale=20.0, normalize=False, backend="reference")
    _, first, second = (relative_error(value, expected) for value, expected in zip(got, truth, strict=True))
    assert second <= 1.35 * first


def test_half_of_the_tiles_is_multiplied(monkeypatch):
    """And half of the numbers of the products behind them."""
    names, products = [], []

    class Recorded:
        def __getattr__(self, name):
            def call(*arguments):
                names.append((name, [each for each in arguments if isinstance(each, int)]))
                return getattr(cuda_kernels.kernels() if ON_GPU else kernels(SCHEDULES[-1]), name)(*arguments)

            return call

    def multiplied(out, a, b, *, add):
        products.append(a.numel())
        return set_or_add(out, a, b, add=add)

    set_or_add = hopper._products.set_or_add
    monkeypatch.setattr(hopper._products, "set_or_add", multiplied)
    monkeypatch.setattr(hopper, "WEIGHT_BYTES", 1)
    monkeypatch.setattr(hopper, "kernels", Recorded)
    inputs = itself(600)
    reduced = similarity_reduce(inputs.x, target=inputs.target(), backend="hopper")
    torch.autograd.grad(reduced.rows.sum() + reduced.target.sum(), inputs.x)
    called = [numbers for name, numbers in names if name.startswith("cuda_hopper")]
    assert all(numbers[-1] == 1 for numbers in called) and len(called) == 4
    assert sum(products) == 2 * sum(min(256, 600 - i) * (600 - i) for i in range(0, 600, 256))


# ---- Losses ----------------------------------------------------------------------------------------------------------


def loss_gradients(loss, x, y, **options):
    leaves_ = [x.detach().requires_grad_(), y.detach().requires_grad_()]
    value = loss(*leaves_, **options)
    return value.detach(), *torch.autograd.grad(value, leaves_)


@every_schedule
@pytest.mark.parametrize(
    "loss,options", [(clip, {}), (info_nce, {}), (siglip, {"bias": -3.0})], ids=lambda v: str(v)[:20]
)
def test_losses(loss, options):
    """With rows that count as if they had length 1, as losses have them by default."""
    inputs = problem(300, 300, 64, longest=3.0)
    got = loss_gradients(loss, inputs.x, inputs.y, scale=10.0, backend="hopper", **options)
    doubled = inputs.x.double(), inputs.y.double()
    truth = loss_gradients(loss, *doubled, scale=10.0, backend="reference", **options)
    for value, expected in zip(got, truth, strict=True):
        assert relative_error(value, expected) <= WEIGHT_ERROR[torch.bfloat16]


@pytest.mark.parametrize("loss", [clip, info_nce], ids=lambda v: v.__name__)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_where_weights_cancel(loss, dtype, normalize):
    """Near convergence, in clusters: what rounding takes from weights is given back."""
    x, y = (t.to(DEVICE) for t in clustered_pairs(256, 64, 0.1, dtype=dtype, scale=100.0))
    got = loss_gradients(loss, x, y, scale=100.0, normalize=normalize, backend="hopper")
    truth = loss_gradients(loss, x.double(), y.double(), scale=100.0, normalize=normalize, backend="reference")
    for value, expected in zip(got, truth, strict=True):
        assert relative_error(value, expected) <= GRADIENT_ERROR_16_BIT


@pytest.mark.skipif(ON_GPU, reason="counts launches on the processor")
def test_a_loss_of_softplus_is_one_sweep():
    """The inner products are formed once: one launch beside those that add parts up."""
    inputs = problem(200, 200, 64, longest=1.0)
    before = kernels(SCHEDULES[-1]).launches
    names = []

    class Recorded:
        def __getattr__(self, name):
            names.append(name)
            return getattr(kernels(SCHEDULES[-1]), name)

    with cuda_kernels.on_host(Recorded()):
        loss_gradients(siglip, inputs.x, inputs.y, scale=10.0, bias=-3.0, backend="hopper")
    assert names.count("cuda_hopper_weigh") == 1 and "cuda_hopper_fold" not in names
    assert kernels(SCHEDULES[-1]).launches > before


def test_results_do_not_depend_on_the_schedule():
    inputs = problem(300, 260, 64)
    target = inputs.target()
    found = []
    for name in SCHEDULES:
        with running(name):
            options = {"reduce": ("logsumexp",), "dim": (0, 1), "target": target}
            reduced = similarity_reduce(inputs.x, inputs.y, **options, backend="hopper")
            values = flat(reduced)
            found.append([*values, *torch.autograd.grad(sum(v.sum() for v in values), [inputs.x, inputs.y])])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---- What cannot run -------------------------------------------------------------------------------------------------


def test_rows_that_are_not_aligned_are_copied():
    inputs = problem(40, 60, 64)
    memory = torch.empty(40 * 64 + 1, dtype=torch.bfloat16, device=DEVICE)
    shifted = memory[1:].view(40, 64).copy_(inputs.x.detach())
    assert shifted.data_ptr() % 16
    check_values({"x": shifted, "y": inputs.y})


@pytest.mark.parametrize(
    ("dtype", "d", "reason"),
    [
        (torch.float32, 64, r"dtype=torch.float32 \(supported: bfloat16, float16\)"),
        (torch.bfloat16, 68, r"D=68 \(supported: 64 to 2048, a multiple of 8\)"),
        (torch.bfloat16, 56, r"D=56 \(supported"),
        (torch.float16, 2056, r"D=2056 \(supported"),
    ],
)
def test_what_rows_must_be(dtype, d, reason):
    x = torch.zeros(3, d, dtype=dtype, device=DEVICE)
    with pytest.raises(NotImplementedError, match=f"backend 'hopper' cannot run these inputs:(.|\n)*{reason}"):
        similarity_reduce(x, x, backend="hopper")


@pytest.mark.parametrize("rule", ["exclude", "guide", "log_weight", "fill"])
def test_what_rules_must_be(rule):
    inputs = problem(20, 30, 64)
    with pytest.raises(NotImplementedError, match="supported: a diagonal, ids, and bounds without a guide"):
        similarity_reduce(inputs.x, inputs.y, pairs=inputs.pairs(rule), backend="hopper")


def test_what_sets_must_be():
    ids = torch.zeros(3, dtype=torch.int64)
    one = LogitSet(ScaleOf.ALL, False, None, {Slot.DIFFER_ROWS: ids, Slot.DIFFER_COLS: ids})
    columns = LogitSet(ScaleOf.COLUMNS, False, None, {})
    folds = (SetFold(0, "logsumexp", False),)
    assert hopper.no_room(Layout((one,), folds)) == []
    assert "2 logit sets (supported: 1)" in hopper.no_room(Layout((one, one), folds))[0]
    assert "a scale of columns" in hopper.no_room(Layout((columns,), folds))[0]


def test_which_devices_have_it():
    assert hopper._why_not_on((9, 0), "13.0 for sm_80 sm_90a compute_90") == []
    assert hopper._why_not_on((8, 0), "13.0 for sm_80 sm_90a") == ["compute capability 8.0 (supported: 9.0)"]
    (why,) = hopper._why_not_on((9, 0), "13.0 for sm_80 compute_90")
    assert why.startswith("no code for sm_90a") and 'TORCH_CUDA_ARCH_LIST="9.0a"' in why


def test_it_is_taken_by_name_only():
    assert BACKENDS["hopper"].by_name is not None


def test_constants_are_those_of_the_kernels():
    sources = Path(__file__).resolve().parent.parent / "csrc" / "cuda" / "hopper"
    if not sources.exists():
        pytest.skip("needs the source checkout")
    constants = dict(
        re.findall(r"(k\w+) = (\d+)", (sources / "sweep.h").read_text() + (sources / "clusters.h").read_text())
    )
    assert int(constants["kRows"]) * int(constants["kCluster"]) == hopper.CLUSTER_ROWS
    for name, columns in (("fold", hopper.FOLD_COLUMNS), ("weigh", hopper.WEIGH_COLUMNS)):
        assert f"kCols = {columns}," in (sources / f"{name}.cu").read_text()
