"""Contrastive search: text that is likely and does not repeat what was said."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .core import autocast, checks
from .core.results import named
from .core.unit_rows import unit_rows

__all__ = ["ContrastiveCache", "ContrastiveChoice", "contrastive_search"]


@named
class ContrastiveChoice(NamedTuple):
    """What `contrastive_search` returns.

    Attributes:
        chosen: (B,) int64, which of the k candidates is best; the first of equal ones. One whose score is NaN is worse
            than all others; the first where all are NaN.
        score: (B, k), in float32 (float64 for float64 inputs).
        penalty: (B, k), each candidate's largest cosine similarity to the context; -1 without context.
    """

    chosen: Tensor
    score: Tensor
    penalty: Tensor


@torch.no_grad()
def contrastive_search(
    candidates: Tensor,
    probabilities: Tensor,
    context: Tensor | ContrastiveCache,
    *,
    alpha: float = 0.6,
    mask: Tensor | None = None,
) -> ContrastiveChoice:
    """Choose the next token by contrastive search: probability less degeneration penalty.

    Equivalent to::

        cosine = F.normalize(candidates, dim=-1) @ F.normalize(context, dim=-1).mT
        penalty = cosine.masked_fill(~mask[:, None], -torch.inf).amax(-1)
        score = (1 - alpha) * probabilities - alpha * penalty
        chosen = score.argmax(-1)

    Args:
        candidates: (B, k, D) hidden states of the k most probable next tokens, one forward pass of the model each.
        probabilities: (B, k) of these tokens.
        context: (B, L, D) hidden states of the tokens so far; or a `ContrastiveCache` of them, with which a step costs
            O(B k L D) alone and normalises no row twice.
        alpha: weight of the penalty, in [0, 1]; 0 is greedy search.
        mask: (B, L) bool, False for padding. A cache has its own.

    Returns:
        `ContrastiveChoice`.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Source:
        Su et al., A Contrastive Framework for Neural Text Generation, 2022; Su and Collier, Contrastive Search Is What
        You Need For Neural Text Generation, 2023.

    Examples:
        >>> context = torch.eye(3)[None, :2]                                  # two tokens so far
        >>> candidates = torch.eye(3)[None, 1:]                               # the likelier one repeats the second
        >>> contrastive_search(candidates, torch.tensor([[0.6, 0.4]]), context).chosen
        tensor([1])
    """
    name = "contrastive_search"
    alpha = checks.number(name, "alpha", alpha, "[0, 1]")
    _check_states(name, "candidates", candidates)
    B, k, D = candidates.shape
    if k == 0:
        raise ValueError(f"{name}: candidates must be one or more for each text, got {checks.shape(candidates)}")
    if not isinstance(probabilities, Tensor) or probabilities.shape != (B, k):
        raise ValueError(f"{name}: probabilities must have shape ({B}, {k}), got {_shape(probabilities)}")
    cache = context
    if not isinstance(cache, ContrastiveCache):
        _check_states(name, "context", cache)
        cache = ContrastiveCache(cache, mask)
    elif mask is not None:
        raise ValueError(f"{name}: mask must be None with a ContrastiveCache, which has its own")
    rows, valid = cache.rows(), cache.valid()
    if rows.shape[0] != B or rows.shape[2] != D:
        raise ValueError(f"{name}: context must have shape ({B}, L, {D}), got {checks.shape(rows)}")
    with autocast.disabled(candidates):
        wide = unit_rows(candidates.to(rows.dtype))
        cosine = (wide @ rows.mT).masked_fill(~valid[:, None], -1.0)
        nothing = cosine.new_full((B, k, 1), -1.0)
        penalty = torch.cat([nothing, cosine], 2).amax(2)
        score = (1 - alpha) * probabilities.to(rows.dtype) - alpha * penalty
        # A candidate whose score is NaN, such as one whose hidden state overflowed, comes after all others.
        least = torch.finfo(score.dtype).min
        order = torch.where(score.isnan(), -torch.inf, score.clamp_min(least))
    return ContrastiveChoice(order.argmax(1), score, penalty)


class ContrastiveCache:
    """Unit hidden states of the tokens so far, in memory that grows by doubling.

    Args:
        context: (B, L, D) hidden states of the prompt.
        mask: (B, L) bool, False for padding.

    Examples:
        >>> cache = ContrastiveCache(torch.randn(2, 5, 8))
        >>> choice = contrastive_search(torch.randn(2, 4, 8), torch.rand(2, 4), cache)
        >>> cache.append(torch.randn(2, 8))
        >>> len(cache)
        6
    """

    def __init__(self, context: Tensor, mask: Tensor | None = None) -> None:
        name = "ContrastiveCache"
        _check_states(name, "context", context)
        B, L, D = context.shape
        if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (B, L)):
            raise ValueError(f"{name}: mask must be a bool tensor of shape ({B}, {L}), got {_shape(mask)}")
        dtype = checks.accumulator(context.dtype)
        self._length = L
        self._rows = torch.zeros((B, max(2 * L, 16), D), dtype=dtype, device=context.device)
        self._valid = torch.ones(self._rows.shape[:2], dtype=torch.bool, device=context.device)
        self._rows[:, :L] = unit_rows(context.detach().to(dtype))
        if mask is not None:
            self._valid[:, :L] = mask

    def __len__(self) -> int:
        """The number of tokens."""
        return self._length

    def rows(self) -> Tensor:
        """(B, L, D) unit rows."""
        return self._rows[:, : self._length]

    def valid(self) -> Tensor:
        """(B, L) False for padding."""
        return self._valid[:, : self._length]

    @torch.no_grad()
    def append(self, state: Tensor, mask: Tensor | None = None) -> None:
        """Add the hidden state (B, D) of the token that was chosen; where mask (B,) is False the text has ended."""
        name = "ContrastiveCache.append"
        B, room, D = self._rows.shape
        if not isinstance(state, Tensor) or state.shape != (B, D):
            raise ValueError(f"{name}: state must have shape ({B}, {D}), got {_shape(state)}")
        if self._length == room:
            self._rows = torch.cat([self._rows, torch.zeros_like(self._rows)], 1)
            self._valid = torch.cat([self._valid, torch.ones_like(self._valid)], 1)
        self._rows[:, self._length] = unit_rows(state.to(self._rows.dtype))
        if mask is not None:
            self._valid[:, self._length] = mask
        self._length += 1


def _shape(value: object) -> str:
    return checks.shape(value) if isinstance(value, Tensor) else type(value).__name__


def _check_states(function: str, name: str, states: object) -> None:
    states = checks.check_tensor(function, name, states)
    if states.dtype not in checks.FLOATING:
        raise TypeError(f"{function}: {name} must be a floating tensor, got {states.dtype}")
    if states.dim() != 3:
        raise ValueError(f"{function}: {name} must have three dimensions (B, L, D), got {checks.shape(states)}")
