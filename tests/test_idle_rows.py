"""Rows that take part in no pair reach nothing, whatever they hold: all primitives and rules, and losses over them.

A NaN that does take part is seen, also where that is as a target, in a list, or in one fold of several.
"""

import idle_rows_cases
import pytest
import torch
from idle_rows_cases import (
    CASES,
    COLUMN,
    ROW,
    RULES,
    M,
    N,
    cases_without,
    check,
    finite_sum,
    gradients,
    matrices,
    put,
    rules_of,
)

from contrastive_ops import Fold, Pairs, info_nce, similarity_reduce, similarity_topk
from contrastive_ops.core.problem import Problem
from contrastive_ops.ops import similarity_distill, similarity_prefix, similarity_values
from contrastive_ops.ops.similarity_loss import similarity_loss
from contrastive_ops.ops.similarity_reduce import fold

every_case = pytest.mark.parametrize(("rule", "bad"), CASES, ids=str)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_similarity_reduce(rule, bad, dtype, backend):
    check(idle_rows_cases.reduce_loss(similarity_reduce, rules_of(rule), backend), bad, dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_similarity(dtype, unit, bad, backend):
    """A row of a class of its own, compared with its class; and a batch of one."""
    ids = idle_rows_cases.vectors(7, 0)[0]
    x = matrices(dtype)[0]
    pairs = Pairs(same=(ids, ids), diagonal=0)

    def loss(x, pairs=pairs):
        problem = Problem.of(("fold", "x", "x"), x, None)
        return finite_sum(fold(problem, pairs=pairs, unit=unit, backend=backend).rows[0])

    truth, got = gradients(loss, [x]), gradients(loss, [put(x, ROW, bad)])
    torch.testing.assert_close(got, truth)
    _, alone = gradients(lambda x: loss(x, Pairs(diagonal=0)), [put(x, ROW, bad)[ROW : ROW + 1]])
    assert not alone.any()


def test_a_bound_from_below(backend):
    loss = idle_rows_cases.reduce_loss(similarity_reduce, Pairs(above=-1000.0), backend)
    check(loss, -torch.inf, row=False)


@every_case
@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_kept_products_change_nothing(rule, bad, budget, backend):
    """From a dimension of 64 on, inner products are kept for backward."""
    inner = idle_rows_cases.reduce_loss(similarity_reduce, rules_of(rule), backend, memory_budget=budget)
    check(lambda x, y: inner(x.repeat(1, 8), y.repeat(1, 8)), bad)


@every_case
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_similarity_loss(rule, bad, kind, backend):
    """Rows take part with their targets; column 3 is nobody's."""
    target, weight = torch.tensor([0, 1, 0, 1, 2, 4, 0]), torch.ones(N)
    options = {"scale": 0.5, "pairs": rules_of(rule), "weight": weight, "reduction": "sum", "backend": backend}

    def loss(x, y):
        return similarity_loss(Problem.of(("similarity_loss", "x", "y"), x, y, target=target), kind=kind, **options)

    check(loss, bad, row=False)


@pytest.mark.parametrize(("rule", "bad"), cases_without("fill"), ids=str)
def test_similarity_topk(rule, bad, backend):
    def loss(x, y):
        return finite_sum(similarity_topk(x, y, 3, scale=0.5, pairs=rules_of(rule), backend=backend).values)

    check(loss, bad)


@pytest.mark.parametrize(("rule", "bad"), cases_without("fill"), ids=str)
def test_similarity_values(rule, bad, backend):
    """And what is summed for a column of no pair."""
    values = put(torch.rand(M, 3, dtype=torch.float64), COLUMN, bad).requires_grad_()

    def loss(x, y):
        return similarity_values(x, y, values, pairs=rules_of(rule), backend=backend).square().sum()

    check(loss, bad, torch.float64)


@pytest.mark.parametrize(("rule", "bad"), cases_without("fill", "classes"), ids=str)
@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "ce", "js"])
def test_similarity_distill(rule, bad, divergence, backend):
    teacher = [put(each, 1, 0.7) for each in matrices(torch.float64)]
    options = {"divergence": divergence, "dim": (0, 1), "pairs": rules_of(rule), "backend": backend}

    def loss(x, y):
        found = similarity_distill(x, y, *teacher, **options)
        return found.rows.sum() + found.cols.sum()

    check(loss, bad, torch.float64)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("normalize", [False, True])
def test_similarity_prefix(normalize, bad, backend):
    """A row whose id all columns have."""
    ids = torch.tensor([0, 0, 5, 0, 0, 0, 0]), torch.tensor([5, 5, 5, 5, 5])
    options = {"dims": (3, 8), "pairs": Pairs(differ=ids), "normalize": normalize, "backend": backend}
    x, y = matrices()
    truth = gradients(lambda x, y: finite_sum(similarity_prefix(x, y, **options).rows), [x, y])
    got = gradients(lambda x, y: finite_sum(similarity_prefix(x, y, **options).rows), [put(x, ROW, bad), y])
    for value, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(value, expected)
    assert not got[1][ROW].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_with_unit_rows(dtype, bad, backend):
    """A candidate that the rules keep from every query, normalised by the loss; and a row of no class."""
    x, y = matrices(dtype)
    ids = torch.arange(N), torch.tensor([0, 1, 2, 3, 4])
    same = torch.zeros(N, dtype=torch.int64), torch.tensor([0, 0, 0, 1, 0])
    target = torch.tensor([0, 1, 2, 4, 4, 0, 1])

    def loss(x, y):
        return info_nce(x, y, target=target, pairs=Pairs(same=same), normalize=True, backend=backend)

    value, dx, dy = gradients(loss, [x, put(y, COLUMN, bad)])
    assert value.isfinite()
    assert dx.isfinite().all()
    assert dy.isfinite().all()
    assert not dy[COLUMN].any()
    assert len(ids[0]) == N


@pytest.mark.parametrize("dim", [0, 1, (0, 1)])
@pytest.mark.parametrize("kind", ["logsumexp", "sum_softplus", "sum", "max", "sum_relu"])
def test_what_takes_part_is_seen(kind, dim, backend):
    """A row of NaN with one pair alone."""
    rows, cols = idle_rows_cases.vectors(7, 7)
    x, y = matrices()

    def loss(x, y):
        found = similarity_reduce(x, y, reduce=(kind,), dim=dim, pairs=Pairs(same=(rows, cols)), backend=backend)
        return sum(each.sum() for each in (*(found.rows or ()), *(found.cols or ())))

    _, dx, dy = gradients(loss, [put(x, ROW, torch.nan), y])
    assert dy[COLUMN].isnan().all()
    if kind not in ("sum", "max", "sum_relu"):  # whose derivatives by a logit that is NaN are numbers
        assert dx[ROW].isnan().all()


def test_a_target_and_a_list_take_part(backend):
    """Row 2 and column 3 are in no fold."""
    x, y = matrices()
    pairs = RULES["same"]
    target = torch.tensor([0, 0, 1, 0, COLUMN, 0, 0])
    lists = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2]), torch.tensor([1, COLUMN])
    for options, name in (({"target": target}, "target"), ({"linear": lists}, "linear")):

        def loss(x, y, options=options, name=name):
            found = similarity_reduce(x, y, pairs=pairs, backend=backend, **options)
            return finite_sum(found.rows) + getattr(found, name).sum()

        _, dx, dy = gradients(loss, [put(x, ROW, torch.nan), put(y, COLUMN, torch.nan)])
        assert dy[1].isnan().all()
        assert dx[4].isnan().all()


def test_a_row_that_one_fold_alone_leaves_out_is_seen(backend):
    x, y = matrices()
    folds = Fold("logsumexp", pairs=RULES["same"]), Fold("logsumexp", pairs=Pairs(diagonal=0))

    def loss(x, y):
        return sum(each.sum() for each in similarity_reduce(x, y, reduce=folds, backend=backend).rows)

    _, _, dy = gradients(loss, [put(x, ROW, torch.nan), y])
    assert dy.isnan().any()


def test_second_derivatives(backend):
    x, y = (each.requires_grad_() for each in matrices(torch.float64))

    def penalty(x, y):
        lse = similarity_reduce(x, y, pairs=RULES["same"], backend=backend)
        dx, dy = torch.autograd.grad(finite_sum(lse), (x, y), create_graph=True)
        return dx.square().sum() + dy.square().sum()

    truth = torch.autograd.grad(penalty(x, y), (x, y))
    bad = [put(each.detach(), at, torch.nan).requires_grad_() for each, at in ((x, ROW), (y, COLUMN))]
    for value, expected in zip(torch.autograd.grad(penalty(*bad), bad), truth, strict=True):
        torch.testing.assert_close(value, expected)
