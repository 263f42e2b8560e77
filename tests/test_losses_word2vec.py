"""Skip-gram with negative sampling against loops, and the distribution that negatives come from."""

import re

import pytest
import torch
from torch.nn import functional as F

from contrastive_ops.losses import UnigramSampler, negative_sampling

DOUBLE = torch.float64


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("nce", [True, False])
def test_negative_sampling(backend, nce):
    center = torch.randn(7, 5, dtype=DOUBLE).requires_grad_()
    table = torch.randn(11, 5, dtype=DOUBLE).requires_grad_()
    context, negatives = torch.randint(11, (7,)), torch.randint(-1, 11, (7, 4))
    log_expected = torch.randn(11, dtype=DOUBLE) if nce else None
    shift = torch.zeros(11, dtype=DOUBLE) if log_expected is None else log_expected
    losses = []
    for i in range(7):
        loss = -F.logsigmoid(center[i] @ table[context[i]] - shift[context[i]])
        for word in negatives[i].tolist():
            if word >= 0:
                loss = loss - F.logsigmoid(shift[word] - center[i] @ table[word])
        losses.append(loss)
    expected = torch.stack(losses)
    found = negative_sampling(
        center, table, context, negatives, log_expected=log_expected, reduction="none", backend=backend
    )
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn(7, dtype=DOUBLE)
    for a, b in zip(
        torch.autograd.grad(found, (center, table), cotangent),
        torch.autograd.grad(expected, (center, table), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("power", [0.0, 0.75, 1.0])
def test_words_are_drawn_in_proportion_to_a_power_of_their_counts(power):
    counts = torch.tensor([50.0, 0.0, 200.0, 8.0, 1.0])
    sampler = UnigramSampler(counts, power)
    avoid = torch.tensor([-1, 2, 0, 1])
    drawn = sampler(avoid, 40_000, generator=torch.Generator().manual_seed(0))
    share = torch.where(counts > 0, counts.double() ** power, 0.0)
    for row, word in enumerate(avoid.tolist()):
        own = share.clone()
        if word >= 0:
            own[word] = 0
        expected = own / own.sum()
        found = torch.bincount(drawn[row], minlength=5).double() / drawn.shape[1]
        assert found[1] == 0 and (word < 0 or found[word] == 0)
        # Five standard deviations of a share.
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / drawn.shape[1]).sqrt()).all()


def test_the_only_word_that_occurs_is_drawn_even_where_it_is_to_be_avoided():
    sampler = UnigramSampler(torch.tensor([0, 3, 0]))
    assert (sampler(torch.tensor([1, 0]), 6) == 1).all()


def test_the_ends_of_the_table_are_reached_and_not_passed(monkeypatch):
    sampler = UnigramSampler(torch.tensor([1, 1, 1]), power=1.0)
    for uniform, words in ((0.0, [0, 1, 0]), (1 - 2**-53, [2, 2, 1])):
        monkeypatch.setattr(torch, "rand", lambda shape, uniform=uniform, **_: torch.full(shape, uniform, dtype=DOUBLE))
        assert sampler(torch.tensor([-1, 0, 2]), 1)[:, 0].tolist() == words


def test_a_large_vocabulary_is_drawn_to_its_end():
    counts = torch.arange(1_000_000, 0, -1)
    sampler = UnigramSampler(counts)
    drawn = sampler(torch.arange(2000), 64)
    assert drawn.max() < 1_000_000 and drawn.min() >= 0 and bool((drawn != torch.arange(2000)[:, None]).all())


CENTER, TABLE, CONTEXT = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])
NEGATIVES = torch.tensor([[1, 2], [3, -1]])


@pytest.mark.parametrize(
    "call,error,message",
    [
        (
            lambda: negative_sampling(CENTER, TABLE, CONTEXT + 1, NEGATIVES),
            ValueError,
            "negative_sampling: context must be in [0, 5), got 5",
        ),
        (
            lambda: negative_sampling(CENTER, TABLE, CONTEXT, NEGATIVES - 1),
            ValueError,
            "negative_sampling: negatives must be in [-1, 5), got -2",
        ),
        (lambda: negative_sampling(CENTER, TABLE, CONTEXT, NEGATIVES.float()), TypeError, "negatives must be int64"),
        (
            lambda: negative_sampling(CENTER, TABLE, CONTEXT, NEGATIVES[:1]),
            ValueError,
            "negatives must have shape (2, k), got (1, 2)",
        ),
        (
            lambda: negative_sampling(CENTER, TABLE[:, :2], CONTEXT, NEGATIVES),
            ValueError,
            "table must have the same last dimension as center",
        ),
        (
            lambda: negative_sampling(CENTER, TABLE, CONTEXT, NEGATIVES, log_expected=torch.ones(2)),
            ValueError,
            "log_expected must have shape (5,), got (2,)",
        ),
        (lambda: UnigramSampler(torch.tensor([0, 0])), ValueError, "counts must be >= 0 and not all 0"),
        (lambda: UnigramSampler(torch.tensor([1, -1])), ValueError, "counts must be finite and >= 0, got -1"),
        (lambda: UnigramSampler(torch.tensor([1.0]), torch.inf), ValueError, "power must be in (-inf, inf)"),
        (
            lambda: UnigramSampler(torch.ones(3))(CONTEXT, 1),
            ValueError,
            "UnigramSampler: avoid must be in [-1, 3), got 4",
        ),
        (lambda: UnigramSampler(torch.ones(5))(CONTEXT, 0), ValueError, "UnigramSampler: k must be at least 1, got 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_step_is_that_of_gensim():
    """One negative for each pair, always the same word; theirs takes sigmoids from a table, 0.003 off."""
    theirs, sentence, noise, rate = pytest.importorskip("gensim.models.word2vec"), list("abcdeaceb"), 2, 0.5
    options = {"vector_size": 8, "window": 2, "min_count": 1, "sg": 1, "negative": 1, "sample": 0, "workers": 1}
    model = theirs.Word2Vec(**options, shrink_windows=False, seed=1)
    model.build_vocab([sentence])
    vectors, table = (torch.randn(5, 8) / 2 for _ in range(2))
    model.wv.vectors[:], model.syn1neg[:] = vectors.numpy(), table.numpy()
    model.cum_table[:noise], model.cum_table[noise:] = 0, 2**31 - 1
    model.train([sentence], total_examples=1, epochs=1, start_alpha=rate, end_alpha=rate)
    words = [model.wv.key_to_index[word] for word in sentence]
    before = vectors.clone(), table.clone()
    for i, word in enumerate(words):
        for j in (j for j in range(max(0, i - 2), min(len(words), i + 3)) if j != i):
            center, out = vectors[words[j]].clone().requires_grad_(), table.clone().requires_grad_()
            negatives = torch.tensor([[-1 if word == noise else noise]])
            negative_sampling(center[None], out, torch.tensor([word]), negatives, reduction="sum").backward()
            vectors[words[j]] -= rate * center.grad
            table -= rate * out.grad
    for ours, them, old in zip((vectors, table), (model.wv.vectors, model.syn1neg), before, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(them), rtol=0, atol=0.03)
        assert (ours - old).abs().amax() > 0.3
