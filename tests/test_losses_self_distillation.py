"""Sinkhorn, DINO, SwAV and KoLeo against dense formulas in float64."""

import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops import route, sinkhorn
from contrastive_ops.core import extension
from contrastive_ops.losses import RunningCentre, dino, koleo, regularizers, swav
from contrastive_ops.ops.sinkhorn import column_potentials

DOUBLE = torch.float64


def dense_plan(scores, epsilon, iterations, row_mass, col_mass):
    """By logarithms, which no score leaves."""
    log_plan = scores.double() / epsilon + (row_mass > 0).double().log()[:, None]
    for _ in range(iterations):
        log_plan = log_plan - log_plan.logsumexp(0) + col_mass.log()
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True) + row_mass.log()[:, None]
        log_plan = log_plan.masked_fill(row_mass[:, None] == 0, -torch.inf)
    return log_plan.exp()


def even(N, K):
    return torch.ones(N, dtype=DOUBLE), torch.full((K,), N / K, dtype=DOUBLE)


@pytest.mark.parametrize("epsilon", [1.0, 0.05, 1e-3])  # the last one leaves what float32 can multiply
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_plan(epsilon, iterations):
    scores = torch.randn(37, 11)
    expected = dense_plan(scores, epsilon, iterations, *even(37, 11))
    plan = sinkhorn(scores, epsilon=epsilon, iterations=iterations)
    # Rounding of scores of size 1 / epsilon shows in their exponentials.
    torch.testing.assert_close(plan, expected.float(), rtol=0, atol=max(1e-5, 2e-6 / epsilon))
    torch.testing.assert_close(sinkhorn(scores.double(), epsilon=epsilon, iterations=iterations), expected)
    torch.testing.assert_close(plan.sum(1), torch.ones(37))


def test_masses_and_pairs_that_are_forbidden():
    scores = torch.randn(8, 5, dtype=DOUBLE)
    scores[2], scores[:, 3], scores[4, 1] = -torch.inf, -torch.inf, -torch.inf
    rows = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 0.0, 1.5, 2.0], dtype=DOUBLE)
    columns = torch.tensor([2.0, 1.0, 3.0, 0.0, 2.0], dtype=DOUBLE)
    plan = sinkhorn(scores, epsilon=0.5, iterations=200, row_mass=rows, col_mass=columns)
    torch.testing.assert_close(plan.sum(1), rows)
    torch.testing.assert_close(plan.sum(0), columns)
    used, some = rows > 0, columns > 0
    expected = dense_plan(scores[used][:, some], 0.5, 200, rows[used], columns[some])
    torch.testing.assert_close(plan[used][:, some], expected)
    assert sinkhorn(scores.masked_fill(scores == -torch.inf, torch.nan)).isnan().all()


def test_batches_and_long_matrices():
    scores = torch.randn(2, 3, 17, 6, dtype=DOUBLE)
    each = torch.stack([sinkhorn(one) for one in scores.flatten(0, 1)]).view_as(scores)
    torch.testing.assert_close(sinkhorn(scores), each)
    scores = torch.randn(700, 300, dtype=DOUBLE)  # of more than one chunk
    torch.testing.assert_close(sinkhorn(scores, epsilon=0.3), dense_plan(scores, 0.3, 3, *even(700, 300)))


def test_a_router_of_balanced_tokens():
    """BASE: every expert receives nearly as many tokens, where most tokens prefer one of them."""
    logits = torch.randn(256, 8) + torch.tensor([3.0, *[0.0] * 7])
    assert torch.bincount(logits.argmax(1)).max() > 150
    chosen = sinkhorn(logits, epsilon=0.05, iterations=100).argmax(1)
    routing = route(logits, allowed=chosen)
    assert torch.equal(routing.experts[:, 0], chosen) and int(torch.bincount(chosen, minlength=8).max()) <= 36
    torch.testing.assert_close(routing.gates[:, 0], logits.softmax(1).gather(1, chosen[:, None])[:, 0])


@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_plan_of_a_matrix_that_is_not_kept(backend, kept):
    x, y = torch.randn(23, 6, dtype=DOUBLE), torch.randn(9, 6, dtype=DOUBLE)
    v = column_potentials(("test", "x", "y"), x, y, 4.0, 3, None, kept, backend)
    plan = (4.0 * x @ y.T + v).softmax(1)
    torch.testing.assert_close(plan, dense_plan(x @ y.T, 0.25, 3, *even(23, 9)))


# ---- Losses ----------------------------------------------------------------------------------------------------------


def sides(*shapes, dtype=DOUBLE):
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def check(loss, truth, inputs):
    torch.testing.assert_close(loss, truth)
    got, expected = (torch.autograd.grad(each.sum(), inputs) for each in (loss, truth))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("assignment", ["softmax", "sinkhorn"])
def test_dino(backend, assignment, budget):
    student, prototypes, teacher, others = sides((9, 5), (13, 5), (9, 4), (13, 4))
    centre = torch.randn(13, dtype=DOUBLE) / 10
    weight = torch.tensor([1.0, 0, 2, 1, 1, 0, 1, 1, 3], dtype=DOUBLE)
    s, p, t, o = (F.normalize(each) for each in (student, prototypes, teacher, others))
    logits = (t @ o.T).detach()
    q = ((logits - centre) / 0.3).softmax(1)
    if assignment == "sinkhorn":
        used = weight > 0
        q = torch.zeros_like(logits).masked_scatter(used[:, None], sinkhorn(logits[used], epsilon=0.3))
    truth = -(q * (s @ p.T / 0.2).log_softmax(1)).sum(1)
    options = {"temperature": 0.2, "teacher_temperature": 0.3, "assignment": assignment, "backend": backend}
    options |= {"memory_budget": budget, "weight": weight, "centre": centre if assignment == "softmax" else None}
    loss = dino(student, prototypes, teacher, others, **options)
    assert torch.autograd.grad(loss, teacher, retain_graph=True, allow_unused=True)[0] is None
    check(loss, (weight * truth).sum() / weight.sum(), [student, prototypes])


def test_codes_without_a_queue_and_with_one(backend):
    x, y, prototypes = sides((8, 6), (8, 6), (5, 6))
    queue = torch.randn(7, 6, dtype=DOUBLE)
    more = F.normalize(queue)
    for extra in (None, more):
        u, v, p = (F.normalize(each) for each in (x, y, prototypes))
        losses = []
        for student, teacher in ((u, v), (v, u)):
            rows = (teacher if extra is None else torch.cat([teacher, extra])).detach()
            code = sinkhorn(rows @ p.detach().T, epsilon=0.2)[:8]
            losses.append(-(code * (student @ p.T / 0.1).log_softmax(1)).sum(1))
        given = None if extra is None else queue
        loss = swav(x, y, prototypes, given, epsilon=0.2, reduction="none", backend=backend)
        check(loss, (losses[0] + losses[1]) / 2, [x, y, prototypes])


@pytest.mark.parametrize("N,K", [(1, 70_000), (3, 300_001), (2, 600_000)])
@pytest.mark.parametrize("epsilon", [0.1, 1e-3])  # by products, and by logarithms
def test_plan_of_long_rows_with_any_threads(N, K, epsilon):
    scores, before, plans = torch.randn(N, K), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            plans.append(sinkhorn(scores, epsilon=epsilon))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(plans[0], plans[1]) and torch.equal(plans[0], plans[2])
    torch.testing.assert_close(plans[0].double(), dense_plan(scores, epsilon, 3, *even(N, K)), rtol=2e-3, atol=1e-6)


def test_centre_is_the_mean_of_logits_over_steps():
    running, expected = RunningCentre(7, 0.2), torch.zeros(7)
    for _ in range(3):
        teacher, prototypes = torch.randn(5, 4), torch.randn(7, 4)
        torch.testing.assert_close(running(teacher, prototypes), expected)
        expected = 0.8 * expected + 0.2 * (F.normalize(teacher) @ F.normalize(prototypes).T).mean(0)
    running.eval()
    torch.testing.assert_close(running(teacher, prototypes), expected)
    torch.testing.assert_close(running.centre, expected)
    running.train()
    running(torch.full((2, 4), torch.nan), prototypes)
    torch.testing.assert_close(running.centre, expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("spread", [1.0, 1e-5])
def test_koleo(backend, normalize, spread):
    """Also of rows whose cosines float32 cannot tell apart."""
    (x,) = sides((40, 6), dtype=torch.float32)
    with torch.no_grad():
        x[:] = torch.ones(6) + spread * x
    wide = x.detach().double().requires_grad_()
    rows = F.normalize(wide) if normalize else wide
    distance = (rows[:, None] - rows).norm(dim=2) + torch.diag(torch.full((40,), torch.inf, dtype=DOUBLE))
    truth = -(distance.amin(1) + 1e-8).log()
    loss = koleo(x, normalize=normalize, reduction="none", backend=backend)
    # Rows that are rounded to float32 after they are scaled are 1e-7 off.
    torch.testing.assert_close(loss.double(), truth, rtol=0, atol=1e-3 if spread == 1 else 0.2)
    if spread == 1:
        got, expected = torch.autograd.grad(loss.sum(), x)[0], torch.autograd.grad(truth.sum(), wide)[0]
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(extension.load() is None, reason="needs the compiled extension")
@pytest.mark.parametrize("hidden", [0, 12, 150])
def test_koleo_of_rows_that_16_bits_cannot_tell_apart(hidden, monkeypatch):
    """Neighbours that a first pass in bfloat16 may miss: of none, of some, and of too many rows to search again."""
    (x,) = sides((200, 24), dtype=torch.float32)
    with torch.no_grad():
        x[:hidden] = torch.randn(24) + 0.05 * torch.randn(hidden, 24)
    proven = []
    search = regularizers.similarity_topk

    def watched(*arguments, **options):
        found = search(*arguments, **options)
        proven.extend([] if found.certified is None else [int((~found.certified).sum())])
        return found

    monkeypatch.setattr(regularizers, "similarity_topk", watched)
    monkeypatch.setattr(regularizers, "_MANY", 100)
    monkeypatch.setattr(extension, "has_bfloat16_tiles", lambda: True)
    rows = F.normalize(x.detach().double())
    nearest = (rows @ rows.T).fill_diagonal_(-2.0).argmax(1)
    assert torch.equal(regularizers._nearest_rows(F.normalize(x.detach()), True, "cpu"), nearest)
    truth = -((rows - rows[nearest]).norm(dim=1) + 1e-8).log()
    torch.testing.assert_close(koleo(x, reduction="none", backend="cpu").double(), truth, rtol=1e-4, atol=1e-4)
    assert len(proven) == 2 and (proven[0] == 0) == (hidden == 0) and (proven[0] > 25) == (hidden == 150)


def test_koleo_of_duplicates_and_of_a_row_alone():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = koleo(x, eps=1e-4, reduction="none")
    torch.testing.assert_close(loss[:2], -torch.full((2,), 1e-4).log())
    assert torch.autograd.grad(loss[:2].sum(), x)[0].eq(0).all()
    alone = torch.ones(1, 3, requires_grad=True)
    assert koleo(alone) == 0 and torch.autograd.grad(koleo(alone), alone)[0].eq(0).all()


X, SCORES = torch.ones(3, 2), torch.zeros(3, 2)
EMPTY_ROW, EMPTY_COLUMN = SCORES.clone(), SCORES.clone()
EMPTY_ROW[1], EMPTY_COLUMN[:, 1] = -torch.inf, -torch.inf


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: sinkhorn(torch.ones(3)), ValueError, "sinkhorn: scores must have shape (..., N, K), got (3,)"),
        (lambda: sinkhorn(torch.ones(3, 2).long()), TypeError, "sinkhorn: scores must be"),
        (lambda: sinkhorn(SCORES, epsilon=0.0), ValueError, "sinkhorn: epsilon must be in (0, inf), got 0.0"),
        (lambda: sinkhorn(SCORES, iterations=0), ValueError, "sinkhorn: iterations must be at least 1, got 0"),
        (lambda: sinkhorn(EMPTY_ROW), ValueError, "scores must not be -inf in all of a row, got row 1"),
        (lambda: sinkhorn(EMPTY_COLUMN), ValueError, "scores must not be -inf in all of a column, got column 1"),
        (
            lambda: sinkhorn(SCORES, col_mass=torch.ones(2)),
            ValueError,
            "sinkhorn: row_mass and col_mass must have one sum, got 3 and 2",
        ),
        (lambda: sinkhorn(SCORES, row_mass=-torch.ones(3)), ValueError, "row_mass must be finite and >= 0, got -1"),
        (lambda: sinkhorn(SCORES, group=3), ValueError, "sinkhorn: group must be None where there is no process group"),
        (lambda: dino(X, X, X[:2]), ValueError, "dino: teacher must have as many rows as student"),
        (lambda: dino(X, X, X, X[:2]), ValueError, "dino: teacher_prototypes must have as many rows as prototypes"),
        (lambda: dino(X, X, X, assignment="mean"), ValueError, "dino: assignment must be"),
        (
            lambda: dino(X, X, X, assignment="sinkhorn", centre=torch.ones(3)),
            ValueError,
            'dino: centre must be None for assignment="sinkhorn"',
        ),
        (lambda: dino(X, X, X, centre=torch.ones(2)), ValueError, "dino: centre must have shape (3,)"),
        (lambda: swav(X, X[:2], X), ValueError, "swav: y must have the same shape as x"),
        (lambda: RunningCentre(4)(X, X), ValueError, "RunningCentre: prototypes must have 4 rows"),
        (lambda: koleo(X, eps=0.0), ValueError, "koleo: eps must be in (0, inf)"),
        (lambda: koleo(X[0]), ValueError, "koleo: x must"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
