"""The softmax of rows that are decided: where one probability is nearly 1, its digits are in what is left to 1.

Rounded to float32, 1 - 1e-6 has one digit of its distance to 1, and p (t - mean) or p - q of that column is noise. So
the logarithm of the largest probability is formed from the others, -log1p(sum of their ratios to it), and its
derivative is minus the sum of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# No two columns of a row have more, also where probabilities are of rounded logits, and below it 1 - p has lost no
# more than two bits. csrc/cpu/similarity_values.cpp has the same number.
DECIDED = 0.75


def log_softmax(logits: Tensor) -> Tensor:
    """``logits.log_softmax(1)``, with the digits of a largest probability near 1; differentiable."""
    if not logits.shape[1]:
        return logits.log_softmax(1)
    best = logits.detach().argmax(1, keepdim=True)
    ratio = logits - logits.gather(1, best)
    others = ratio.exp().scatter(1, best, 0.0).sum(1, keepdim=True)
    return ratio - others.log1p()


def log_softmax_(logits: Tensor) -> Tensor:
    """The same in the place of the logits."""
    if not logits.shape[1]:
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
