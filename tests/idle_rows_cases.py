"""Rules that leave row 2 and column 3 out of every pair, and what must come of numbers that these hold."""

import torch
from similarity_cases import mapped

from contrastive_ops import Pairs
from contrastive_ops.ops import Guide

N, M, D, ROW, COLUMN = 7, 5, 8, 2, 3
KINDS = ("logsumexp", "max", "sum_softplus", "sum_relu", "sum", "count")


def vectors(row, column, others=0, dtype=torch.int64):
    """For rows and for columns: one number of all, another of the row and of the column."""
    rows, cols = torch.full((N,), others, dtype=dtype), torch.full((M,), others, dtype=dtype)
    rows[ROW], cols[COLUMN] = row, column
    return rows, cols


def _lists():
    lists = [list(range(M)) if i == ROW else [COLUMN] for i in range(N)]
    return torch.tensor([0, *(len(each) for each in lists)]).cumsum(0), torch.tensor(sum(lists, []))


def _guide():
    gx, gy = torch.zeros(N, 2), torch.zeros(M, 2)
    gx[:, 1], gy[:, 0], gx[ROW, 0], gy[COLUMN, 1] = 1.0, 1.0, 1.0, 1.0
    return Guide(gx, gy, below=0.5)


RULES = {
    "same": Pairs(same=vectors(7, 8)),
    "same, no id": Pairs(same=vectors(-1, -1)),
    "exclude": Pairs(exclude=_lists()),
    "guide": Pairs(guide=_guide()),
    "two rules": Pairs(same=vectors(7, 0), exclude=_lists()),
    "fill": Pairs(same=vectors(7, 8), fill=0.5),
    "classes": Pairs(same=vectors(7, 8), log_weight=(torch.tensor([[0.5]]), *vectors(-1, -1))),
    "diagonal": Pairs(same=vectors(7, 8), diagonal=0),
}
# Bounds let NaN pass; this one drops what is infinite.
BOUND = Pairs(below=1000.0)
CASES = [(rule, bad) for rule in RULES for bad in (torch.nan, torch.inf, -torch.inf)]
CASES.append(("below", torch.inf))


def rules_of(name, device="cpu"):
    return mapped(BOUND if name == "below" else RULES[name], lambda tensor: tensor.to(device))


def cases_without(*rules):
    """The cases of a primitive that does not take these."""
    return [case for case in CASES if case[0] not in rules]


def matrices(dtype=torch.float32, device="cpu"):
    """Positive, so that the similarity with an infinite row is infinite."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, D, generator=generator).to(device, dtype) + 0.1 for size in (N, M)]


def put(matrix, index, value):
    """The matrix with one value all over a row."""
    matrix = matrix.clone()
    matrix[index] = value
    return matrix


def gradients(loss, tensors):
    """Of a loss of tensors, and its value."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    value = loss(*tensors)
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def finite_sum(*values):
    """The sum of what is finite: folds of no pair are -inf."""
    return sum(torch.where(each.isfinite(), each, 0.0).sum() for each in values)


def check(loss, bad, dtype=torch.float32, device="cpu", row=True):
    """What an idle row (not if `row` is False) and an idle column hold reaches no value and no gradient.

    The truth is what numbers give that the same bounds drop.
    """

    def given(value):
        x, y = matrices(dtype, device)
        return [put(x, ROW, value) if row else x, put(y, COLUMN, value)]

    truth, got = gradients(loss, given(-5000.0 if bad == -torch.inf else 5000.0)), gradients(loss, given(bad))
    for value, expected in zip(got, truth, strict=True):
        assert value.isfinite().all()
        torch.testing.assert_close(value, expected)
    assert not (row and got[1][ROW].any())
    assert not got[2][COLUMN].any()
    assert got[1].any()


def reduce_loss(similarity_reduce, pairs, backend, **options):
    """All kinds of folds of a call, with a scale that has a gradient."""

    def loss(x, y):
        found = similarity_reduce(x, y, reduce=KINDS, dim=(0, 1), pairs=pairs, scale=0.5, backend=backend, **options)
        return finite_sum(*found.rows, *found.cols)

    return loss
