"""Problems of more than 2^31 pairs or numbers: rows are a few that repeat, or one that is expanded; truths are small.

Operands that lie more than 2^31 numbers apart, and outputs of more, are in the tests of their primitives.
"""

import pytest
import torch
from test_similarity_distill import divergence_of, logits_of
from test_similarity_values import sums_of

from contrastive_ops import route, similarity_reduce
from contrastive_ops.ops import (
    TokenSets,
    combine,
    maxsim,
    similarity_distill,
    similarity_prefix,
    similarity_topk,
    similarity_values,
)
from contrastive_ops.testing import relative_error

DOUBLE = torch.float64
KINDS, ROWS, COLUMNS = 7, 70_000, 32_000
BEYOND = 1 << 31


def repeated(count, depth=1):
    """Rows of KINDS kinds, one after another."""
    numbers = torch.arange(KINDS * depth).view(KINDS, depth) % 11 / 4 - 1
    return numbers.repeat(-(-count // KINDS), 1)[:count]


def columns(depth=1):
    """As `repeated`, but the last is another, that only an index that is right to its end can find."""
    y = repeated(COLUMNS, depth)
    y[-1] = 3.0
    return y


def compare(x, y, ours, dense):
    """Rows and gradients of their sum against those of one row of each kind, weighted by how many there are."""
    assert x.shape[0] * y.shape[0] > BEYOND
    x, y = x.requires_grad_(), y.requires_grad_()
    value = ours(x, y)
    found = torch.autograd.grad(value.sum(), [x, y])
    kinds, all_columns = (t.detach().double().requires_grad_() for t in (x[:KINDS], y))
    count = torch.bincount(torch.arange(len(x)) % KINDS).to(DOUBLE)
    rows = dense(kinds, all_columns)
    truth = torch.autograd.grad((count @ rows.reshape(KINDS, -1)).sum(), [kinds, all_columns])
    kind = torch.arange(len(x)) % KINDS
    assert relative_error(value, rows[kind]) < 1e-5
    assert relative_error(found[0], (truth[0] / count[:, None])[kind]) < 1e-5
    assert relative_error(found[1], truth[1]) < 1e-4


@pytest.mark.slow
def test_gradients_of_more_pairs_of_a_fold():
    compare(
        repeated(ROWS),
        columns(),
        lambda x, y: similarity_reduce(x, y, scale=0.5, backend="cpu"),
        lambda x, y: (0.5 * x @ y.T).logsumexp(1),
    )


@pytest.mark.slow
def test_more_pairs_of_prefixes():
    compare(
        repeated(ROWS, 2),
        columns(2),
        lambda x, y: similarity_prefix(x, y, dims=(1, 2), backend="cpu").rows.T,
        lambda x, y: torch.stack([(x[:, :d] @ y[:, :d].T).logsumexp(1) for d in (1, 2)], 1),
    )


@pytest.mark.slow
def test_more_pairs_of_a_divergence():
    teacher_x, teacher_y = repeated(ROWS).flip(1) / 2, columns() / 3
    compare(
        repeated(ROWS),
        columns(),
        lambda x, y: similarity_distill(x, y, teacher_x, teacher_y, backend="cpu"),
        lambda x, y: divergence_of(*logits_of(x, y, teacher_x[:KINDS].double(), teacher_y.double()), "kl", 1),
    )


@pytest.mark.slow
def test_more_pairs_of_sums_of_values():
    values = columns()  # which go with the logits, so that gradients are no small differences
    compare(
        repeated(ROWS),
        columns(),
        lambda x, y: similarity_values(x, y, values, backend="cpu"),
        lambda x, y: sums_of(x, y, values.double()),
    )


def test_more_pairs_of_a_search():
    found = similarity_topk(repeated(ROWS), columns(), 3, backend="cpu")
    truth = (repeated(KINDS) @ columns().T).sort(dim=1, descending=True, stable=True)
    kind = torch.arange(ROWS) % KINDS
    assert torch.equal(found.indices, truth.indices[kind, :3]) and torch.equal(found.values, truth.values[kind, :3])


def test_more_pairs_of_tokens():
    queries, documents = repeated(ROWS).view(70, 1000, 1), columns().view(32, 1000, 1)
    found = maxsim(TokenSets(queries), TokenSets(documents), backend="cpu")
    best = torch.stack([(repeated(KINDS) @ document.T).amax(1) for document in documents], 1).double()
    kind = (torch.arange(ROWS) % KINDS).view(70, 1000)
    assert relative_error(found, best[kind].sum(1)) < 1e-6


@pytest.mark.slow
def test_more_choices_than_2_to_31():
    """Tokens times experts; all tokens are one, whose row is not copied."""
    tokens, experts = (BEYOND >> 10) + 1000, 1024
    logits = torch.arange(experts).remainder(97).float()[None] / 8
    logits[0, -1] = 20.0
    routing = route(logits.expand(tokens, -1), 2, backend="cpu")
    gates, experts = (each[:2] for each in logits[0].softmax(0).sort(descending=True, stable=True))
    assert (routing.experts == experts).all()
    torch.testing.assert_close(routing.gates, gates.expand(tokens, -1))


@pytest.mark.slow
def test_more_numbers_of_expert_rows():
    """Tokens times choices times depth: rows of experts are one row."""
    tokens, k, depth = 8_200, 8, 1 << 15
    assert tokens * k * depth > BEYOND
    routing = route(repeated(tokens, 16).bfloat16(), k, backend="cpu")
    row = torch.randn(1, depth).bfloat16()
    found = combine(row.expand(tokens * k, -1), routing, backend="cpu")
    few = route(repeated(KINDS, 16).bfloat16(), k, backend="cpu")
    first = combine(row.expand(KINDS * k, -1), few, backend="cpu")
    assert torch.equal(found[-KINDS:], first[torch.arange(tokens - KINDS, tokens) % KINDS])


def far_rows(rows):
    """The same rows, more than 2^31 numbers apart, in memory of which only their pages are touched."""
    far = BEYOND + 40
    space = torch.empty(2 * far + 4096, dtype=rows.dtype)
    return space.as_strided(rows.shape, (far, 1)).copy_(rows)


@pytest.mark.parametrize("call", ["prefix", "distill", "values", "topk"])
def test_rows_beyond_32_bits(call, backend):
    x, rows = torch.randn(4, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    calls = {
        "prefix": lambda y: similarity_prefix(x, y, dims=(3, 8), backend=backend).rows,
        "distill": lambda y: similarity_distill(x, y, x, y, teacher_scale=2.0, backend=backend),
        "values": lambda y: similarity_values(x, y, y, backend=backend),
        "topk": lambda y: similarity_topk(x, y, 3, backend=backend).values,
    }
    assert torch.equal(calls[call](far_rows(rows)), calls[call](rows))
