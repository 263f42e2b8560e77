"""Arithmetic of logits that every room shares: exact near its limits, with derivatives that are numbers there, too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

# Logits that one chunk of rows may hold: 4 MiB of float32, some twenty times that with temporaries.
CHUNK_ELEMENTS = 1 << 20


def chunks_of_rows(rows: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` rows; one empty slice for no rows, so that shapes are still found out."""
    for begin in range(0, max(rows, 1), step):
        yield slice(begin, min(begin + step, rows))


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)), exact on both sides (torch's softplus becomes the identity above 20)."""
    return -logsigmoid(-z)


def merge_lse(*lse: Tensor) -> Tensor:
    """Logsumexp over equally shaped tensors, with gradient 0 (not NaN) where all of them are -inf."""
    stacked = torch.stack(lse)
    top = stacked.detach().amax(0)
    top = torch.where(torch.isfinite(top), top, 0.0)
    total = (stacked - top).exp().sum(0)
    empty = total == 0
    # log is kept away from 0, whose infinite slope would turn the masked gradient into NaN.
    return torch.where(empty, -torch.inf, top + torch.where(empty, 1.0, total).log())


def lse_of_rows(logits: Tensor) -> Tensor:
    """(N,) logsumexp of each row of (N, P); -inf with gradient 0, not NaN, where there is nothing but -inf."""
    empty = (logits == -torch.inf).all(1)
    return logits.masked_fill(empty[:, None], 0.0).logsumexp(1).masked_fill(empty, -torch.inf)


def times(e: Tensor, values: Tensor) -> Tensor:
    """``e * values``, but 0 where e is 0 and values are no numbers; with both derivatives also where e is 0."""
    return e * values.masked_fill((e == 0) & ~values.isfinite(), 0.0)


def probability(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 where lse is -inf: a row or column without a pair has no gradient."""
    empty = lse == -torch.inf
    return (logits - lse.masked_fill(empty, 0.0)).exp().masked_fill(empty, 0.0)


# ---- Decided rows --------------------------------------------------------------------------------------------------
#
# Where one probability of a row is nearly 1, its digits are in what is left to 1. Rounded to float32, 1 - 1e-6 has one
# digit of its distance to 1, and p (t - mean) or p - q of that column is noise. So the logarithm of the largest
# probability is formed from the others, -log1p(sum of their ratios to it); its derivative is minus the sum of theirs.

# No two columns of a row have more, also where probabilities are of rounded logits, and below it 1 - p has lost no
# more than two bits. csrc/cpu/similarity_values.cpp has the same number.
DECIDED = 0.75


def log_softmax(logits: Tensor) -> Tensor:
    """``logits.log_softmax(1)``, with the digits of a largest probability near 1; differentiable."""
    if logits.shape[1] == 0:
        return logits.log_softmax(1)
    best = logits.detach().argmax(1, keepdim=True)
    ratio = logits - logits.gather(1, best)
    others = ratio.exp().scatter(1, best, 0.0).sum(1, keepdim=True)
    return ratio - others.log1p()


def log_softmax_(logits: Tensor) -> Tensor:
    """The same in the place of the logits."""
    if logits.shape[1] == 0:
        return logits
    best = logits.argmax(1, keepdim=True)
    ratio = logits.sub_(logits.gather(1, best))
    others = ratio.exp().scatter_(1, best, 0.0).sum(1, keepdim=True)
    return ratio.sub_(others.log1p_())


def balanced(slopes: Tensor, p: Tensor) -> Tensor:
    """Derivatives by the logits of each row, which sum to 0; that of a decided column as minus the sum of others."""
    decided = p > DECIDED
    others = slopes.masked_fill(decided, 0.0)
    return torch.where(decided, -others.sum(1, keepdim=True), others)
