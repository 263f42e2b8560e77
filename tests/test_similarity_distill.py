"""similarity_distill: values and derivatives against dense formulas, convergence, exclusions, edges, registration."""

import pytest
import torch
import torch._dynamo.testing

from contrastive_ops import Pairs
from contrastive_ops.ops import Guide, similarity_distill
from contrastive_ops.reference import similarity_distill as reference
from contrastive_ops.testing import TOLERANCE, relative_error, saved_bytes
from contrastive_ops.testing.compare import check, check_derivatives, leaf, number

INF = float("inf")
DIVERGENCES = ["kl", "reverse_kl", "ce", "js"]
FORWARD = torch.ops.contrastive_ops.similarity_distill_forward
BACKWARD = torch.ops.contrastive_ops.similarity_distill_backward


def divergence_of(s, t, kind, dim):
    """As the docstring says, with 0 log 0 = 0 and nothing where a pair takes no part."""
    log_q, log_p = s.log_softmax(dim), t.log_softmax(dim)
    q, p = log_q.exp(), log_p.exp()

    def times(weight, value):  # 0 where the weight is 0, also in the gradient
        return torch.where(weight > 1e-300, weight * torch.where(weight > 1e-300, value, 0.0), 0.0)

    if kind == "kl":
        terms = times(p, log_p - log_q)
    elif kind == "reverse_kl":
        terms = times(q, torch.where(q > 0, log_q, 0.0) - log_p)
    elif kind == "ce":
        terms = times(p, -log_q)
    else:
        m = torch.where(p + q > 1e-300, (p + q) / 2, 1.0).log()
        terms = (times(p, log_p - m) + times(q, torch.where(q > 0, log_q, 0.0) - m)) / 2
    return terms.sum(dim)


def logits_of(x, y, teacher_x, teacher_y, keep=None, scale=1.0, teacher_scale=1.0, teacher_bias=0.0):
    factor = scale[:, None] if isinstance(scale, torch.Tensor) and scale.dim() else scale
    s, t = factor * (x @ y.T), teacher_scale * (teacher_x @ teacher_y.T) + teacher_bias
    return (s, t) if keep is None else (s.masked_fill(~keep, -INF), t.masked_fill(~keep, -INF))


def both(value):
    return torch.cat([value.rows, value.cols])


class Sides:
    """Student and teacher of one batch, the teacher of another dimension."""

    def __init__(self, n, m, depth=6, dtype=torch.float64):
        self.x, self.y = leaf(n, depth, dtype=dtype), leaf(m, depth, dtype=dtype)
        self.teacher = [torch.randn(k, 4, dtype=torch.float64).to(dtype) for k in (n, m)]

    @property
    def all(self):
        return self.x, self.y, *self.teacher


def rules(n, m):
    ids, col_ids = torch.arange(n) % 4, torch.arange(m) % 4
    equal = ids[:, None] == col_ids
    own = torch.arange(n)[:, None] + 1 == torch.arange(m)
    listed = torch.rand(n, m) < 0.3
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0)])
    return {
        "none": (None, torch.ones(n, m, dtype=torch.bool)),
        "diagonal": (Pairs(diagonal=1), ~own),
        "differ": (Pairs(differ=(ids, col_ids)), ~equal),
        "same": (Pairs(same=(ids, col_ids), diagonal=1), equal & ~own),
        "exclude": (Pairs(exclude=(indptr, listed.nonzero()[:, 1])), ~listed),
    }


@pytest.mark.parametrize("rule", ["none", "diagonal", "differ", "same", "exclude"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients(divergence, rule, backend):
    """Rows and columns in several blocks and chunks, and columns past the last whole vector."""
    for n, m in ((7, 9), (70, 137), (530, 131)):
        sides, scale = Sides(n, m), number(0.9)
        bias = torch.randn(m, dtype=torch.float64)
        pairs, keep = rules(n, m)[rule]
        options = {"scale": scale, "teacher_scale": 0.7, "teacher_bias": bias}
        truth = {}
        for dim in (1, 0):
            truth[dim] = divergence_of(*logits_of(*sides.all, keep, **options), divergence, dim)
        given = {"divergence": divergence, "pairs": pairs, "backend": backend, **options}
        value = similarity_distill(*sides.all, dim=(0, 1), **given)
        check(both(value), torch.cat([truth[1], truth[0]]), [sides.x, sides.y, scale])
        for dim in (1, 0):
            torch.testing.assert_close(similarity_distill(*sides.all, dim=dim, **given), truth[dim])


def test_bounds_and_a_guide(backend):
    sides, guides = Sides(40, 50), [torch.randn(k, 3, dtype=torch.float64) for k in (40, 50)]
    pairs = Pairs(below=2.0, above=-3.0, guide=Guide(*guides, 1.5))
    similarity = sides.x @ sides.y.T
    keep = (similarity <= 2.0) & (similarity >= -3.0) & (guides[0] @ guides[1].T <= 1.5)
    s, t = logits_of(*sides.all, keep)
    value = similarity_distill(*sides.all, dim=(0, 1), pairs=pairs, backend=backend)
    check(both(value), torch.cat([divergence_of(s, t, "kl", dim) for dim in (1, 0)]), [sides.x, sides.y])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_scales_of_rows(divergence, backend):
    sides, scale, teacher_scale = Sides(9, 13), leaf(9), torch.rand(9, dtype=torch.float64)
    s, t = logits_of(*sides.all, scale=scale, teacher_scale=teacher_scale[:, None])
    options = {"scale": scale, "teacher_scale": teacher_scale, "backend": backend}
    value = similarity_distill(*sides.all, divergence=divergence, dim=(0, 1), **options)
    truth = torch.cat([divergence_of(s, t, divergence, dim) for dim in (1, 0)])
    check(both(value), truth, [sides.x, sides.y, scale])


@pytest.mark.parametrize("rule", ["none", "diagonal", "differ", "same", "exclude"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_with_each_other(divergence, rule, backend):
    """One block, several, several chunks; with what belongs to rows or columns alone, so that nothing is symmetric."""
    for n in (1, 30, 150, 530, 1100) if rule == "none" else (30, 530):
        sides, scale = Sides(n, n), leaf(n)
        pairs, keep = rules(n, n)[rule]
        options = {"scale": scale, "teacher_scale": torch.rand(n, dtype=torch.float64)}
        options["teacher_bias"] = torch.randn(n, dtype=torch.float64)
        given = {"divergence": divergence, "pairs": pairs, "backend": backend, **options}
        dense = {**options, "teacher_scale": options["teacher_scale"][:, None]}
        s, t = logits_of(sides.x, sides.x, sides.teacher[0], sides.teacher[0], keep, **dense)
        truth = divergence_of(s, t, divergence, 1)
        check(similarity_distill(sides.x, None, sides.teacher[0], **given), truth, [sides.x, scale])
        if n == 530:
            columns = similarity_distill(sides.x, None, sides.teacher[0], dim=0, **given)
            torch.testing.assert_close(columns, divergence_of(s, t, divergence, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", ["kl", "ce"])
def test_rows_with_each_other_are_as_with_their_copies(divergence, dtype, backend):
    """Both halves of the matrix, or one that is read twice; kept or computed again."""
    sides, upstream = Sides(700, 700, depth=64, dtype=dtype), torch.rand(700)
    options = {"divergence": divergence, "scale": 0.3, "pairs": Pairs(diagonal=0), "backend": backend}
    found = []
    for budget in (None, 0, 700 * 300 * 4):
        value = similarity_distill(sides.x, None, sides.teacher[0], memory_budget=budget, **options)
        found.append((value, *torch.autograd.grad(value @ upstream, sides.x)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    x, teacher = (each.detach().double() for each in (sides.x, sides.teacher[0]))
    x.requires_grad_()
    whole = similarity_distill(x, x, teacher, teacher, **{**options, "backend": "reference"})
    (gradient,) = torch.autograd.grad(whole @ upstream.double(), x)
    assert relative_error(found[0][0], whole) < TOLERANCE[torch.float32]
    assert relative_error(found[0][1], gradient) < TOLERANCE[dtype]


def test_a_bound_and_a_guide_of_rows_with_each_other(backend):
    n = 150
    sides, guide, bound = Sides(n, n), torch.randn(n, 3, dtype=torch.float64), torch.rand(n, dtype=torch.float64) + 1
    pairs = Pairs(below=bound, guide=Guide(guide, None, 1.5))
    keep = ((sides.x @ sides.x.T) <= bound[:, None]) & (guide @ guide.T <= 1.5)
    s, t = logits_of(sides.x, sides.x, sides.teacher[0], sides.teacher[0], keep)
    value = similarity_distill(sides.x, None, sides.teacher[0], pairs=pairs, backend=backend)
    check(value, divergence_of(s, t, "kl", 1), [sides.x])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_derivatives_by_differences(divergence, backend):
    sides, scale = Sides(5, 4, depth=3), number(0.8)
    pairs = Pairs(diagonal=0)

    def function(x, y, scale):
        options = {"divergence": divergence, "scale": scale, "pairs": pairs, "backend": backend}
        return both(similarity_distill(x, y, *sides.teacher, dim=(0, 1), **options))

    check_derivatives(function, (sides.x, sides.y, scale))


def test_second_derivatives_in_chunks(monkeypatch):
    sides, scale = Sides(7, 4, depth=3), number(0.8)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 8)

    def function(x, y, scale):
        return both(similarity_distill(x, y, *sides.teacher, divergence="js", dim=(0, 1), scale=scale))

    assert torch.autograd.gradgradcheck(function, (sides.x, sides.y, scale), fast_mode=True)


@pytest.mark.parametrize("wanted", [("x",), ("y",), ("scale",), ("x", "scale")])
def test_every_subset_of_gradients(wanted, backend):
    sides, scale = Sides(8, 9), number(1.3)
    inputs = {"x": sides.x, "y": sides.y, "scale": scale}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in wanted)
    s, t = logits_of(*sides.all, scale=scale)
    value = similarity_distill(*sides.all, scale=scale, backend=backend)
    check(value, divergence_of(s, t, "kl", 1), [inputs[name] for name in wanted])


# ---- Convergence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_student_that_is_its_teacher_is_at_zero(divergence, dtype, backend):
    x, y = leaf(600, 24, dtype=dtype), leaf(300, 24, dtype=dtype)
    scale = torch.tensor(5.0, requires_grad=True)
    options = {"scale": scale, "teacher_scale": 5.0, "pairs": Pairs(diagonal=0), "backend": backend}
    value = both(similarity_distill(x, y, x.detach(), y.detach(), divergence=divergence, dim=(0, 1), **options))
    assert torch.equal(value, torch.zeros(900))
    for gradient in torch.autograd.grad(value, (x, y, scale), torch.randn(900)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js"])
def test_small_divergences_keep_their_digits(divergence, backend):
    """Where log-sum-exps less logits would have lost all of them."""
    x, y = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (300, 600))
    teacher = x + 1e-5 * torch.randn(300, 16), y
    exact = [t.double() for t in (x, y, *teacher)]
    s, t = logits_of(*exact, scale=20.0, teacher_scale=20.0)
    for dim in (1, 0):
        truth = divergence_of(s, t, divergence, dim)
        assert 1e-10 < truth.mean() < 1e-7
        options = {"divergence": divergence, "dim": dim, "scale": 20.0, "teacher_scale": 20.0, "backend": backend}
        value = similarity_distill(x, y, *teacher, **options)
        assert (value >= 0).all()
        assert relative_error(value, truth) < 0.05
        plain = divergence_of(s.float(), t.float(), divergence, dim)
        assert (plain - truth).abs().mean() > 10 * (value - truth).abs().mean()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_16_bits(divergence, dtype, backend):
    x, y = (torch.nn.functional.normalize(torch.randn(n, 64), dim=1).to(dtype) for n in (200, 300))
    teacher = [(t + 0.02 * torch.randn(t.shape)).to(dtype) for t in (x.float(), y.float())]
    exact = [t.double().requires_grad_() for t in (x, y)]
    s, t = logits_of(*exact, *(t.double() for t in teacher), scale=30.0, teacher_scale=30.0)
    truth = divergence_of(s, t, divergence, 1)
    x, y = x.requires_grad_(), y.requires_grad_()
    options = {"divergence": divergence, "scale": 30.0, "teacher_scale": 30.0, "backend": backend}
    value = similarity_distill(x, y, *teacher, **options)
    assert value.dtype == torch.float32
    assert relative_error(value, truth) <= TOLERANCE[torch.float32] * 10
    got, expected = (torch.autograd.grad(v.sum(), leaves) for v, leaves in ((value, (x, y)), (truth, exact)))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == dtype and relative_error(a, b) <= 5e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_logits(divergence, backend):
    sides = Sides(33, 40, dtype=torch.float32)
    # Powers of two keep the logits of all precisions the same; rows whose softmax has one winner, and rows of equals.
    x = (sides.x.detach() * 16).round() / 16
    x[:4] = 0
    teacher = [(t * 16).round() / 16 for t in sides.teacher]
    y = ((sides.y.detach() * 16).round() / 16).requires_grad_()
    x.requires_grad_()
    options = {"scale": 512.0, "teacher_scale": 256.0}
    exact = [t.detach().double() for t in (x, y, *teacher)]
    for t in exact[:2]:
        t.requires_grad_()
    s, t = logits_of(*exact, **options)
    assert s.abs().max() > 2000
    for dim in (1, 0):
        truth = divergence_of(*logits_of(*exact, **options), divergence, dim)
        value = similarity_distill(x, y, *teacher, divergence=divergence, dim=dim, backend=backend, **options)
        torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-5)
        got, expected = (torch.autograd.grad(v.sum(), leaves) for v, leaves in ((value, (x, y)), (truth, exact[:2])))
        for a, b in zip(got, expected, strict=True):
            # Those of rows whose winner has all of the probability underflow in float32.
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-3)


# ---- What takes no part ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["kl", "ce", "js"])
def test_columns_without_a_teacher(divergence, backend):
    """Probability 0 and not 0 times infinity; blocks that the teacher excludes as a whole among them."""
    for n, m in ((20, 30), (600, 300)):
        sides = Sides(n, m)
        bias = torch.zeros(m, dtype=torch.float64)
        bias[::3] = -INF
        bias[: m // 2] = -INF
        s, t = logits_of(*sides.all, teacher_bias=bias)
        options = {"divergence": divergence, "teacher_bias": bias, "backend": backend}
        value = similarity_distill(*sides.all, **options)
        check(value, divergence_of(s, t, divergence, 1), [sides.x, sides.y])
        by_columns = similarity_distill(*sides.all, dim=0, **options)
        out = bias == -INF
        assert torch.equal(by_columns[out], torch.zeros_like(by_columns[out])) and (by_columns[~out] > 0).all()
        (dy,) = torch.autograd.grad(by_columns.sum(), sides.y)
        assert dy.isfinite().all() and not dy[out].any() and dy[~out].any()


def test_a_student_that_picks_what_the_teacher_excludes(backend):
    sides = Sides(20, 30)
    bias = torch.zeros(30, dtype=torch.float64)
    bias[4] = -INF
    value = similarity_distill(*sides.all, divergence="reverse_kl", teacher_bias=bias, backend=backend)
    assert torch.equal(value.detach(), torch.full((20,), INF, dtype=torch.float64))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_rows_and_columns_without_a_pair(divergence, backend):
    sides = Sides(150, 140)
    ids, col_ids = torch.arange(150) % 3, torch.arange(140) % 3
    ids[::5], col_ids[::7] = 9, 8
    pairs, keep = Pairs(same=(ids, col_ids)), ids[:, None] == col_ids
    value = both(similarity_distill(*sides.all, divergence=divergence, dim=(0, 1), pairs=pairs, backend=backend))
    empty = torch.cat([~keep.any(1), ~keep.any(0)])
    assert not value[empty].any() and (value[~empty] > 0).all()
    gradients = torch.autograd.grad(value.sum(), (sides.x, sides.y))
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][::5].any() and not gradients[1][::7].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(divergence, backend):
    for side in (0, 2):
        sides = list(Sides(20, 300).all)
        sides[side] = sides[side].detach().clone()
        sides[side][3, 1] = torch.nan
        sides[0] = sides[0].detach().requires_grad_()
        value = similarity_distill(*sides, divergence=divergence, backend=backend)
        assert value.isnan().nonzero().flatten().tolist() == [3]
        (dx,) = torch.autograd.grad(value.sum(), sides[0])
        assert dx[3].isnan().any() and dx[4].isfinite().all()


@pytest.mark.parametrize("n,m", [(0, 5), (5, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_rows_and_no_columns(n, m, divergence, backend):
    sides = Sides(n, m, dtype=torch.float32)
    value = similarity_distill(*sides.all, divergence=divergence, dim=(0, 1), backend=backend)
    assert torch.equal(value.rows, torch.zeros(n)) and torch.equal(value.cols, torch.zeros(m))
    gradients = torch.autograd.grad(value.rows.sum() + value.cols.sum(), (sides.x, sides.y))
    assert not any(g.any() for g in gradients)


def test_no_dimension(backend):
    """All logits are 0, of the student or of the teacher."""
    x, y, teacher_x, teacher_y = torch.randn(5, 0), torch.randn(6, 0), torch.randn(5, 4), torch.randn(6, 4)
    s, t = logits_of(x, y, teacher_x, teacher_y)
    torch.testing.assert_close(
        similarity_distill(x, y, teacher_x, teacher_y, backend=backend), divergence_of(s, t, "kl", 1)
    )
    torch.testing.assert_close(
        similarity_distill(teacher_x, teacher_y, x, y, backend=backend), divergence_of(t, s, "kl", 1)
    )


# ---- Layouts and dtypes ----------------------------------------------------------------------------------------------


def test_strided_rows(backend):
    sides = Sides(20, 30)
    wide = [torch.randn(len(t), 2 * t.shape[1], dtype=t.dtype) for t in sides.all]
    for to, t in zip(wide, sides.all, strict=True):
        to[:, ::2] = t.detach()
    views = [t[:, ::2] for t in wide]
    transposed = [t.detach().T.contiguous().T for t in sides.all]
    expected = similarity_distill(*sides.all, backend=backend).detach()
    for other in (views, transposed):
        torch.testing.assert_close(similarity_distill(*other, backend=backend), expected)


def test_a_teacher_of_another_dtype(backend):
    """Both are multiplied in the accumulation dtype."""
    sides = Sides(20, 30, dtype=torch.bfloat16)
    teacher = [torch.randn(k, 4) for k in (20, 30)]
    value = similarity_distill(sides.x, sides.y, *teacher, backend=backend)
    wide = similarity_distill(sides.x.float(), sides.y.float(), *teacher, backend=backend)
    assert value.dtype == torch.float32 and torch.equal(value, wide)
    assert torch.autograd.grad(value.sum(), sides.x)[0].dtype == torch.bfloat16
    narrow = similarity_distill(sides.x.float(), sides.y.float(), *(t.double() for t in teacher), backend=backend)
    assert narrow.dtype == torch.float32 and torch.equal(narrow, wide)


# ---- Determinism, memory ---------------------------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_number_of_threads_gives_the_same_bits(divergence, dtype, threads):
    sides, scale = Sides(1100, 700, depth=70, dtype=dtype), torch.tensor(0.5, requires_grad=True)
    cotangent = torch.randn(1800)
    results = []
    for count in (1, 2, 3, 2):
        threads(count)
        options = {"divergence": divergence, "scale": scale, "pairs": Pairs(diagonal=0), "memory_budget": 1 << 20}
        value = both(similarity_distill(*sides.all, dim=(0, 1), backend="cpu", **options))
        results.append([value.detach(), *torch.autograd.grad(value, (sides.x, sides.y, scale), cotangent)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("budget", [1 << 20, 1 << 40])
def test_kept_products_change_no_bit(divergence, budget):
    sides = Sides(1100, 300, depth=130, dtype=torch.float32)
    results = []
    for allowed in (0, budget):
        options = {"divergence": divergence, "pairs": Pairs(below=9.0), "memory_budget": allowed, "backend": "cpu"}
        value = both(similarity_distill(*sides.all, dim=(0, 1), **options))
        cotangent = torch.linspace(-1, 1, 1400)
        results.append([value.detach(), *torch.autograd.grad(value, (sides.x, sides.y), cotangent)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_budget_bounds_what_is_kept(backend):
    sides = Sides(1000, 900, depth=128, dtype=torch.float32)
    tensors = sum(t.numel() * t.element_size() for t in sides.all)
    statistics, whole = 5 * 4 * 1000, 2 * 4 * (1000 + 32) * (900 + 128)
    for budget, kept in ((0, 0), (1 << 20, 1 << 20), (1 << 40, whole)):
        size, _ = saved_bytes(
            lambda budget=budget: similarity_distill(*sides.all, memory_budget=budget, backend=backend)
        )
        kept = kept if backend == "cpu" else 0
        assert size - kept <= tensors + statistics + 64


# ---- Registration ----------------------------------------------------------------------------------------------------


def arguments(dims=3, kind="kl"):
    x, y = leaf(9, 5), leaf(7, 5)
    sides = [x, y, leaf(1), leaf(9), leaf(7)]
    teacher = [torch.randn(*shape, dtype=torch.float64) for shape in ((9, 4), (7, 4), (1,), (9,), (7,))]
    if kind in reference.PAIRWISE:
        sides[2:], teacher[2:] = (
            [torch.tensor([-2.0], dtype=torch.float64), *(z.detach().square().sum(1) for z in s)]
            for s in ((x, y), teacher[:2])
        )
    return [*sides, *teacher, [], [1, 0, 0, 0, 1, 0, 0], kind, 0.5, dims]


@pytest.mark.parametrize("kind", reference.KINDS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_opcheck(kind, dims, backend):
    problem = arguments(dims, kind)
    torch.library.opcheck(FORWARD, (*problem, 0, backend))
    values, statistics, kept = FORWARD(*problem, 0, backend)
    torch.library.opcheck(
        BACKWARD,
        (*problem, statistics, torch.randn_like(values, requires_grad=True), kept, 31, backend),
        # Second derivatives recompute through the reference; AOT tracing of them is not promised.
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("kind", reference.KINDS)
def test_biases_of_rows_and_columns(kind, backend):
    """Losses whose logits are distances give both sides biases."""
    for dims in (1, 2, 3):
        problem = arguments(dims, kind)
        values = FORWARD(*problem, 0, backend)[0]
        truth = reference.values(*problem)[0]
        check(values, truth, [t for t in problem[:5] if t.requires_grad])


def test_compile_without_graph_break_or_recompilation():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def function(x, y, teacher_x, teacher_y, scale):
        value = similarity_distill(x, y, teacher_x, teacher_y, dim=(0, 1), scale=scale, pairs=Pairs(diagonal=0))
        return value.rows.sum() + value.cols.sum()

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for count in (64, 65, 100):
        sides, scale = Sides(count, count + 7, depth=64, dtype=torch.float32), torch.tensor(2.0, requires_grad=True)
        if count == 64:
            for t in sides.all:
                torch._dynamo.mark_dynamic(t, 0)
        value, expected = compiled(*sides.all, scale), function(*sides.all, scale)
        torch.testing.assert_close(value, expected)
        inputs = (sides.x, sides.y, scale)
        for a, b in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_meta_tensors():
    x, y, teacher_x, teacher_y = (torch.empty(n, d, device="meta") for n, d in ((5, 4), (6, 4), (5, 3), (6, 3)))
    value = similarity_distill(x, y, teacher_x, teacher_y, dim=(0, 1))
    assert value.rows.shape == (5,) and value.cols.shape == (6,) and value.rows.device.type == "meta"


# ---- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,error,message",
    [
        (
            {"teacher_x": torch.zeros(4, 3)},
            ValueError,
            r"similarity_distill: teacher_x must have as many rows as x, got x \(5, 8\) and teacher_x \(4, 3\)",
        ),
        (
            {"teacher_y": torch.zeros(7, 3)},
            ValueError,
            r"similarity_distill: teacher_y must have as many rows as y, got y \(6, 8\) and teacher_y \(7, 3\)",
        ),
        ({"teacher_y": torch.zeros(6, 2)}, ValueError, "teacher_y must have the same last dimension as teacher_x"),
        ({"teacher_y": None}, ValueError, "teacher_y must be given where y is, got None"),
        ({"y": None}, ValueError, "teacher_y must be None where y is None"),
        ({"y": torch.zeros(6, 9)}, ValueError, "y must have the same last dimension as x"),
        ({"teacher_x": [1.0]}, TypeError, "teacher_x must be a tensor, got list"),
        ({"teacher_bias": torch.zeros(5)}, ValueError, r"teacher_bias must have shape \(6,\)"),
        ({"teacher_scale": torch.zeros(3)}, ValueError, "teacher_scale must be one number or have shape"),
        ({"divergence": "l2"}, ValueError, "divergence must be one of 'kl', 'reverse_kl', 'ce', 'js', got 'l2'"),
        ({"dim": 2}, ValueError, r"dim must be 0, 1 or \(0, 1\), got 2"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be at least 0"),
        ({"pairs": Pairs(fill=0.0)}, NotImplementedError, "pairs.fill must be None"),
        ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'reference', 'cpu', 'triton', got 'cuda'"),
    ],
)
def test_errors(change, error, message):
    given = {"x": torch.zeros(5, 8), "y": torch.zeros(6, 8), "teacher_x": torch.zeros(5, 3)}
    given = {**given, "teacher_y": torch.zeros(6, 3), **change}
    with pytest.raises(error, match=message):
        similarity_distill(**given)
