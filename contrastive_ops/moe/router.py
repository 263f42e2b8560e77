"""The module that routes tokens, and balance by a bias instead of a loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import autocast, checks
from ..core.masks import left_out
from ..core.state import State
from ..ops import Capacity, Gating, RouterLoss, Routing, route
from ..ops.expert_routing import DEFAULT, PRIORITIES
from ..ops.gating import as_capacity, check_gating, described

BALANCING = ("sign", "zscore")


def balanced_bias(bias: Tensor, choices: Tensor, rate: float = 1e-3, rule: str = "sign") -> Tensor:
    """Move a router's bias towards the experts that were chosen less than the others: balance without a loss.

    Equivalent to::

        error = choices.float().mean() - choices
        bias.float() + rate * (error.sign() if rule == "sign" else error / choices.float().std(correction=0))

    Args:
        bias: (E,) of `Gating`.
        choices: (E,) or (S, E), how often each expert was chosen since the last time: ``routing.metrics["choices"]``,
            added up over the micro-batches and ranks of a step.
        rate: step.
        rule: "sign"; or "zscore", in proportion to the deviation, which does not oscillate around balance.

    Returns:
        (E,) the new bias, in float32 (float64 for a bias in float64), whose digits many small steps need; `bias` itself
        is not changed. Choices that are not finite change nothing.

    Raises:
        ValueError: an unknown rule, or choices of another number of experts.

    Source:
        Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, 2024, for "sign".

    Examples:
        >>> balanced_bias(torch.zeros(3), torch.tensor([9, 3, 0]), rate=0.1)
        tensor([-0.1000,  0.1000,  0.1000])
    """
    checks.check_choice("balanced_bias", "rule", rule, BALANCING)
    if choices.shape[-1] != bias.shape[0]:
        raise ValueError(
            f"balanced_bias: choices must have one count for each of {len(bias)} experts, got {checks.shape(choices)}"
        )
    bias = bias.to(checks.accumulator(bias.dtype))
    counts = choices.reshape(-1, len(bias)).to(bias.dtype if choices.is_floating_point() else torch.int64).sum(0)
    # E times the mean less E times each: integers, so that equal counts are equal however many they are.
    error = (counts.sum() - len(bias) * counts).to(bias.dtype)
    if rule == "sign":
        step = error.sign()
    else:
        spread = error.square().mean().sqrt()
        step = error / torch.where(spread > 0, spread, 1.0)
    return torch.where(error.isfinite().all(), bias + rate * step, bias)


class Router(State):
    """Scores of the experts by a linear map, and `route`: ``routing = router(tokens)``.

    The logits are computed in float32 (float64 for float64 tokens) in every autocast region. Noise is drawn in training
    only, and so is the loss "load", which it defines.

    Args:
        dim: D of the tokens.
        experts: E.
        k: choices of each token.
        capacity: as in `route`.
        eval_capacity: the same in evaluation; by default `capacity`.
        priority: as in `route`.
        gating: as in `route`.
        losses: as in `route`.
        balance: None; or "sign" or "zscore", to choose by a bias that `update_bias` moves: see `balanced_bias`.
        balance_rate: its step.

    Attributes:
        weight: (E, D).
        expert_bias: (E,) buffer, where there is `balance`: at least float32 whatever the module is cast to. It must be
            equal on all ranks, to which DistributedDataParallel copies it from the first.
    """

    digits = ("expert_bias",)
    expert_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 1,
        *,
        capacity: int | float | Capacity | None = None,
        eval_capacity: int | float | Capacity | None = None,
        priority: str = "gate",
        gating: Gating = DEFAULT,
        losses: Sequence[str | RouterLoss] = (),
        balance: str | None = None,
        balance_rate: float = 1e-3,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim, experts = checks.integer("Router", "dim", dim, 0), checks.integer("Router", "experts", experts, 1)
        for each in (capacity, eval_capacity):
            as_capacity("Router", each)
        checks.check_choice("Router", "priority", priority, PRIORITIES)
        check_gating("Router", gating)
        if balance is not None:
            checks.check_choice("Router", "balance", balance, BALANCING)
        if balance is not None and gating.bias is not None:
            raise ValueError("Router: gating.bias must be None with balance, which has a bias of its own, got both")
        self.k = checks.integer("Router", "k", k, 1)
        self.capacity, self.priority, self.gating = capacity, priority, gating
        self.eval_capacity = capacity if eval_capacity is None else eval_capacity
        self.losses = described("Router", losses)
        self.balance = balance
        self.balance_rate = checks.number("Router", "balance_rate", balance_rate)
        self.weight = nn.Parameter(torch.empty(experts, dim, device=device, dtype=dtype))
        bias = None if balance is None else torch.zeros(experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal numbers that give unit logits for unit tokens' components, and no bias."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def logits(self, tokens: Tensor) -> Tensor:
        """(T, E) of tokens (T, D)."""
        dtype = checks.accumulator(tokens.dtype)
        with autocast.disabled(tokens):
            return F.linear(tokens.to(dtype), self.weight.to(dtype))

    def scored(self, tokens: Tensor, labels: dict[str, Any]) -> Tensor:
        """`logits` in which tokens that take no part are 0, so that what they hold does not reach the weight."""
        valid, allowed = labels.get("valid"), labels.get("allowed")
        if allowed is not None:
            some = allowed if allowed.dtype == torch.bool else allowed >= 0
            some = some.any(1) if some.dim() == 2 else some
            valid = some if valid is None else valid & some
        return self.logits(tokens if valid is None else left_out(tokens, valid))

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `route` in the present mode."""
        gating = self.gating
        if self.expert_bias is not None:
            gating = dataclasses.replace(gating, bias=self.expert_bias)
        losses = self.losses
        if not self.training:
            gating = dataclasses.replace(gating, noise_std=0.0)
            losses = tuple(loss for loss in losses if loss.name != "load")
        capacity = self.capacity if self.training else self.eval_capacity
        return {"capacity": capacity, "gating": gating, "losses": losses}

    def forward(self, tokens: Tensor, **labels: Any) -> Routing:
        """Route tokens (T, D); `labels` are segments, num_segments, valid, allowed, generator, backend of `route`."""
        return route(self.scored(tokens, labels), self.k, priority=self.priority, **self.options(), **labels)

    @torch.no_grad()
    def update_bias(self, choices: Tensor) -> None:
        """Move the bias by `balanced_bias`: once a step, with the choices of all its micro-batches and ranks."""
        if self.balance is None or self.expert_bias is None:
            raise ValueError('Router.update_bias: balance must be "sign" or "zscore", got None')
        # FSDP may have cast the buffer behind the module's back; a sum of small steps needs its digits.
        wide = self.expert_bias.to(checks.accumulator(self.expert_bias.dtype))
        self.expert_bias = wide.copy_(balanced_bias(wide, choices, self.balance_rate, self.balance))

    def extra_repr(self) -> str:
        """Sizes and rules."""
        experts, dim = self.weight.shape
        return f"{dim}, {experts}, k={self.k}, capacity={self.capacity}, priority={self.priority!r}"
