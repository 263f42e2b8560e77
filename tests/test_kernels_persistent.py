"""similarity_reduce by persistent sweeps in Triton against the reference in float64: values and every gradient."""

import functools

import pytest
import torch
from pairwise import pairwise

from contrastive_ops import Pairs, clip, info_nce, siglip, similarity_reduce
from contrastive_ops.core import triton_kernels
from contrastive_ops.core.problem import Layout, LogitSet, ScaleOf, SetFold
from contrastive_ops.ops import _persistent
from contrastive_ops.ops.similarity_reduce import BACKENDS
from contrastive_ops.testing import GRADIENT_ERROR_16_BIT, clustered_pairs, relative_error

if triton_kernels.why_missing() is not None:
    pytest.skip(triton_kernels.why_missing(), allow_module_level=True)
if not (triton_kernels.interprets() or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

import similarity_cases
from similarity_cases import exact, flat, gradients_of, leaves

from contrastive_ops.kernels import _persistent_tiles, similarity_reduce_persistent
from contrastive_ops.kernels._launch import Launch

DEVICE = "cpu" if triton_kernels.interprets() else "cuda"
Inputs = functools.partial(similarity_cases.Inputs, device=DEVICE)
NAME = "triton_persistent"
DTYPES = (torch.bfloat16, torch.float16)
VALUE_ERROR = 2e-5
# Of gradients before they are rounded to the dtype of the inputs, whose weights have 8 or 11 bits.
WEIGHT_ERROR = {torch.bfloat16: 5e-3, torch.float16: 6e-4}


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    """Several tiles for a program and several launches, on small matrices; random numbers of the CPU."""
    monkeypatch.setattr(similarity_reduce_persistent, "BAND_ROWS", 96)
    monkeypatch.setattr(_persistent_tiles, "GROUP", 2)
    torch.manual_seed(0)


@pytest.fixture(params=[True, False], ids=["descriptors", "addresses"])
def _both_ways(request, monkeypatch):
    """Operands come by descriptors, or by addresses."""
    if DEVICE == "cuda":
        pytest.skip("the device has one of both")
    monkeypatch.setitem(_persistent_tiles.DESCRIPTORS, "interpreter", request.param)


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched, by name."""
    names = []
    run = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (names.append(self.kernel.__name__), run(self))[1])
    return names


def problem(n, m, d, dtype=torch.bfloat16, seed=0, longest=4.0):
    """Rows of one length, so that logits have one size whatever the dimension."""
    inputs = Inputs(n, m, d, dtype=dtype, seed=seed)
    for name in ("x", "y"):
        rows = torch.nn.functional.normalize(getattr(inputs, name).detach().float(), dim=1) * longest
        setattr(inputs, name, rows.to(dtype).requires_grad_())
    return inputs


def check(options, dtype, gradients=True):
    """Values, targets' logits, and every gradient for random cotangents, in the dtype of its leaf."""
    options = {"reduce": ("logsumexp",), "dim": (0, 1), **options}
    doubled = exact(options)
    got, truth = (
        flat(similarity_reduce(**given, memory_budget=0, backend=name))
        for given, name in ((options, NAME), (doubled, "reference"))
    )
    for value, expected in zip(got, truth, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, expected) <= VALUE_ERROR
    if not gradients:
        return
    cotangents = [torch.randn(value.shape).to(DEVICE) for value in truth]
    expected = gradients_of(truth, cotangents, leaves(doubled))
    for g, e, leaf in zip(gradients_of(got, cotangents, leaves(options)), expected, leaves(options), strict=True):
        assert g.dtype == leaf.dtype and g.shape == leaf.shape
        assert relative_error(g, e) <= WEIGHT_ERROR[dtype]


# ---- Shapes and options ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_both_ways")
@pytest.mark.parametrize("n,m,d", [(1, 1, 8), (33, 3, 24), (100, 50, 24)])
def test_shapes_around_tiles(n, m, d):
    """Tiles at every edge, several for each program, several bands, and dimensions that end within a step."""
    dtype = DTYPES[n % 2]
    inputs = problem(n, m, d, dtype)
    check({"x": inputs.x, "y": inputs.y, "scale": 2.0, "target": inputs.target()}, dtype)


@pairwise(
    kind=("logsumexp", "sum_softplus"),
    dim=((0, 1), (1,), (0,)),
    rules=((), ("diagonal",), ("differ", "below"), ("same", "above")),
    dtype=DTYPES,
    scale=("rows", "one", "constant"),
    biases=(True, False),
    target=(True, False),
)
def test_options(kind, dim, rules, dtype, scale, biases, target):
    inputs = problem(40, 45, 24, dtype, seed=3)
    scales = {"rows": inputs.leaf(40), "one": torch.tensor(-1.3, device=DEVICE).requires_grad_(), "constant": 0.7}
    options = {"reduce": (kind,), "dim": dim, "scale": scales[scale], "target": inputs.target() if target else None}
    if rules:
        options["pairs"] = inputs.pairs(*rules)
    if biases:
        options |= {"row_bias": inputs.leaf(40), "col_bias": inputs.leaf(45)}
    check({"x": inputs.x, "y": inputs.y, **options}, dtype)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_every_subset_of_gradients(wanted):
    inputs = problem(40, 50, 16)
    given = (inputs.x, inputs.y, torch.tensor(1.0, device=DEVICE))
    x, y, scale = (t.detach().requires_grad_(k in wanted) for k, t in enumerate(given))
    check({"x": x, "y": y, "scale": scale, "target": inputs.target()}, torch.bfloat16)


def test_a_matrix_that_is_compared_with_itself():
    inputs = problem(40, 40, 24)
    check({"x": inputs.x, "y": None, "pairs": Pairs(diagonal=0), "target": inputs.target()}, torch.bfloat16)


def test_rows_that_do_not_begin_at_16_bytes_are_copied():
    inputs = problem(40, 60, 16)
    memory = torch.empty(40 * 16 + 1, dtype=torch.bfloat16, device=DEVICE)
    shifted = memory[1:].view(40, 16).copy_(inputs.x.detach())
    narrow = torch.zeros(60, 20, dtype=torch.bfloat16, device=DEVICE)[:, :16].copy_(inputs.y.detach())
    assert shifted.data_ptr() % 16 and narrow.stride(0) % 8
    check({"x": shifted, "y": narrow}, torch.bfloat16, gradients=False)


@pytest.mark.parametrize("n,m", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("kind", ["logsumexp", "sum_softplus"])
def test_no_rows_and_no_columns(n, m, kind):
    inputs = Inputs(n, m, 8, dtype=torch.bfloat16)
    options = {"row_bias": inputs.leaf(n), "scale": inputs.leaf(n), "reduce": (kind,)}
    check({"x": inputs.x, "y": inputs.y, **options}, torch.bfloat16)


# ---- One exponential for a pair --------------------------------------------------------------------------------------


def test_logits_that_lie_far_apart(launched):
    """Rows and columns of such a tile are folded by themselves, in a second launch that all calls of both have."""
    inputs = problem(40, 45, 16)
    x = (inputs.x.detach() * torch.linspace(0.01, 16, 40, device=DEVICE)[:, None]).to(torch.bfloat16)
    check({"x": x, "y": inputs.y.detach(), "scale": 8.0, "target": inputs.target()}, torch.bfloat16, gradients=False)
    assert launched.count("persistent_fold_kernel") == 2


def test_a_row_far_below_its_first_tile_meets_its_own_logits_in_the_next():
    """The reference of the first tile, of other rows, must not take from what is small there and large for the row."""
    x = torch.zeros(2, 8, dtype=torch.bfloat16, device=DEVICE)
    x[0, 0], x[1, 1] = 1.0, 1.0
    y = torch.zeros(64, 8, dtype=torch.bfloat16, device=DEVICE)
    y[:32, 0], y[32:, 0], y[32:, 1] = 80.0, -80.0, -3.0
    check({"x": x, "y": y, "dim": (0, 1)}, torch.bfloat16, gradients=False)


def test_values_that_are_not_finite_stay_in_their_rows_and_columns():
    inputs = problem(40, 45, 16)
    x = inputs.x.detach().clone()
    x[7, 3], x[35, 0] = torch.nan, torch.inf
    options = {"reduce": ("logsumexp",), "dim": (0, 1)}
    got = similarity_reduce(x, inputs.y.detach(), **options, backend=NAME)
    truth = similarity_reduce(x.double(), inputs.y.detach().double(), **options, backend="reference")
    for value, expected in zip(flat(got), flat(truth), strict=True):
        assert torch.equal(value.isnan(), expected.isnan())
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_rows_and_columns_without_a_pair():
    inputs = problem(40, 60, 16)
    ids = [torch.zeros(size, dtype=torch.int64, device=DEVICE) for size in (40, 60)]
    options = {"reduce": ("logsumexp",), "dim": (0, 1), "pairs": Pairs(differ=tuple(ids))}
    values = flat(similarity_reduce(inputs.x, inputs.y, **options, backend=NAME))
    assert all(torch.equal(value, torch.full_like(value, -torch.inf)) for value in values)
    gradients = torch.autograd.grad(sum(value.exp().sum() for value in values), [inputs.x, inputs.y])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


# ---- Losses ----------------------------------------------------------------------------------------------------------


def loss_gradients(loss, x, y, **options):
    inputs = [x.detach().requires_grad_(), y.detach().requires_grad_()]
    value = loss(*inputs, **options)
    return value.detach(), *torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("loss,options", [(clip, {}), (info_nce, {})], ids=lambda v: str(v)[:20])
def test_losses(loss, options):
    """With rows that count as if they had length 1, as losses have them by default."""
    inputs = problem(40, 40, 24, longest=3.0)
    got = loss_gradients(loss, inputs.x, inputs.y, scale=10.0, backend=NAME, **options)
    doubled = inputs.x.double(), inputs.y.double()
    truth = loss_gradients(loss, *doubled, scale=10.0, backend="reference", **options)
    for value, expected in zip(got, truth, strict=True):
        assert relative_error(value, expected) <= WEIGHT_ERROR[torch.bfloat16]


def test_a_loss_of_softplus_is_one_sweep(launched, monkeypatch):
    """The inner products are formed once: a launch for each band, and none that folds."""
    monkeypatch.setattr(similarity_reduce_persistent, "BAND_ROWS", 32)
    inputs = problem(40, 40, 24, torch.float16, longest=3.0)
    options = {"scale": 10.0, "bias": -3.0}
    got = loss_gradients(siglip, inputs.x, inputs.y, backend=NAME, **options)
    assert launched.count("persistent_weights_kernel") == 2 and "persistent_fold_kernel" not in launched
    doubled = inputs.x.double(), inputs.y.double()
    for value, expected in zip(got, loss_gradients(siglip, *doubled, backend="reference", **options), strict=True):
        assert relative_error(value, expected) <= WEIGHT_ERROR[torch.float16]


@pytest.mark.parametrize(
    "loss,normalize,dtype",
    [(clip, False, torch.bfloat16), (info_nce, True, torch.float16)],
    ids=["clip-bfloat16", "info_nce-unit-float16"],
)
def test_gradients_where_weights_cancel(loss, normalize, dtype):
    """Near convergence, in clusters: what rounding takes from weights is given back."""
    x, y = (t.to(DEVICE) for t in clustered_pairs(64, 32, 0.1, dtype=dtype, scale=100.0))
    got = loss_gradients(loss, x, y, scale=100.0, normalize=normalize, backend=NAME)
    truth = loss_gradients(loss, x.double(), y.double(), scale=100.0, normalize=normalize, backend="reference")
    for value, expected in zip(got, truth, strict=True):
        assert relative_error(value, expected) <= GRADIENT_ERROR_16_BIT


def test_results_do_not_depend_on_the_number_of_programs(monkeypatch):
    inputs = problem(40, 45, 24)
    target = torch.zeros(40, dtype=torch.int64, device=DEVICE)  # all give back to one column
    found = []
    for programs in (1, 7):
        monkeypatch.setattr(_persistent_tiles, "processors", lambda p, programs=programs: programs)
        options = {"reduce": ("logsumexp",), "dim": (0, 1), "target": target}
        values = flat(similarity_reduce(inputs.x, inputs.y, **options, backend=NAME))
        found.append([*values, *torch.autograd.grad(sum(v.sum() for v in values), [inputs.x, inputs.y])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---- What cannot run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "d", "reason"),
    [
        (torch.float32, 64, r"dtype=torch.float32 \(supported: bfloat16, float16\)"),
        (torch.bfloat16, 68, r"D=68 \(supported: a multiple of 8\)"),
        (torch.bfloat16, 0, r"D=0 \(supported"),
    ],
)
def test_what_rows_must_be(dtype, d, reason):
    x = torch.zeros(3, d, dtype=dtype, device=DEVICE)
    with pytest.raises(NotImplementedError, match=f"backend '{NAME}' cannot run these inputs:(.|\n)*{reason}"):
        similarity_reduce(x, x, backend=NAME)


@pytest.mark.parametrize("rule", ["exclude", "guide", "log_weight", "fill"])
def test_what_rules_must_be(rule):
    inputs = problem(20, 30, 16)
    with pytest.raises(NotImplementedError, match="supported: a diagonal, ids, and bounds without a guide"):
        similarity_reduce(inputs.x, inputs.y, pairs=inputs.pairs(rule), backend=NAME)


def test_what_folds_must_be():
    one = LogitSet(ScaleOf.ALL, False, None, {})
    rows = SetFold(0, "logsumexp", False)

    def reasons(*folds):
        return _persistent.no_room(Layout((one,), folds))

    assert reasons(rows) == reasons(rows, SetFold(0, "logsumexp", True)) == []
    assert reasons(SetFold(0, "max", False)) == ["max (supported: logsumexp, sum_softplus)"]
    assert "several folds of a direction" in reasons(rows, rows)[0]
    assert "of two kinds" in reasons(rows, SetFold(0, "sum_softplus", True))[0]
    assert "2 logit sets (supported: 1)" in _persistent.no_room(Layout((one, one), (rows,)))[0]


def test_it_is_taken_by_name_only():
    assert BACKENDS[NAME].by_name is not None
