"""Contrastive search against its definition, with and without a cache."""

import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.decoding import ContrastiveCache, contrastive_search


def by_loops(candidates, probabilities, context, alpha, mask=None):
    B, k, _ = candidates.shape
    score = torch.empty(B, k)
    for b in range(B):
        for c in range(k):
            similarities = [
                F.cosine_similarity(candidates[b, c], context[b, j], dim=0)
                for j in range(context.shape[1])
                if mask is None or mask[b, j]
            ]
            penalty = max(similarities, default=torch.tensor(-1.0))
            score[b, c] = (1 - alpha) * probabilities[b, c] - alpha * penalty
    return score


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_contrastive_search(masked, alpha):
    candidates, context = torch.randn(3, 4, 8), torch.randn(3, 6, 8)
    probabilities = torch.rand(3, 4)
    mask = None
    if masked:
        mask = torch.rand(3, 6) < 0.5
        mask[0] = False
    found = contrastive_search(candidates, probabilities, context, alpha=alpha, mask=mask)
    score = by_loops(candidates, probabilities, context, alpha, mask)
    torch.testing.assert_close(found.score, score)
    assert torch.equal(found.chosen, score.argmax(1))
    assert not masked or bool((found.penalty[0] == -1).all())


def test_a_cache_gives_what_the_whole_context_gives():
    context, cache = torch.randn(2, 5, 8), None
    cache = ContrastiveCache(context)
    for step in range(30):
        candidates, probabilities = torch.randn(2, 4, 8), torch.rand(2, 4)
        found = contrastive_search(candidates, probabilities, cache)
        expected = contrastive_search(candidates, probabilities, context)
        torch.testing.assert_close(found.score, expected.score)
        assert torch.equal(found.chosen, expected.chosen) and len(cache) == 5 + step
        state = candidates[torch.arange(2), found.chosen]
        cache.append(state)
        context = torch.cat([context, state[:, None]], 1)


def test_a_text_that_has_ended_gets_no_more_context():
    cache = ContrastiveCache(torch.eye(4)[None, :1].repeat(2, 1, 1), torch.tensor([[True], [False]]))
    cache.append(torch.eye(4)[1].repeat(2, 1), torch.tensor([True, False]))
    found = contrastive_search(torch.eye(4)[None].repeat(2, 1, 1), torch.full((2, 4), 0.25), cache)
    torch.testing.assert_close(found.penalty, torch.tensor([[1.0, 1.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]]))


def test_low_precision_states_are_compared_in_float32():
    candidates, context = torch.randn(2, 4, 8).bfloat16(), torch.randn(2, 6, 8).bfloat16()
    probabilities = torch.rand(2, 4)
    found = contrastive_search(candidates, probabilities, context)
    torch.testing.assert_close(found.score, by_loops(candidates.float(), probabilities, context.float(), 0.6))


STATES, SHARES = torch.ones(2, 3, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: contrastive_search(STATES[0], SHARES, STATES), ValueError, "candidates must have three dimensions"),
        (lambda: contrastive_search(STATES.long(), SHARES, STATES), TypeError, "candidates must be a floating tensor"),
        (lambda: contrastive_search(STATES, SHARES[:1], STATES), ValueError, "probabilities must have shape (2, 3)"),
        (lambda: contrastive_search(STATES, SHARES, STATES[:1]), ValueError, "context must have shape (2, L, 4)"),
        (lambda: contrastive_search(STATES, SHARES, STATES, alpha=2.0), ValueError, "alpha must be in [0, 1], got 2.0"),
        (lambda: contrastive_search(STATES, SHARES, STATES, mask=SHARES), ValueError, "mask must be a bool tensor"),
        (
            lambda: contrastive_search(STATES, SHARES, ContrastiveCache(STATES), mask=SHARES > 0),
            ValueError,
            "mask must be None with a ContrastiveCache",
        ),
        (lambda: ContrastiveCache(STATES).append(STATES[:, 0, :2]), ValueError, "state must have shape (2, 4)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
