"""The module that routes tokens, and balance by a bias instead of a loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import autocast, checks
from ..core.backends import choose, unsupported_by_cpu
from ..core.masks import left_out
from ..core.numerics import softplus
from ..core.operators import call
from ..core.recompute import random_options
from ..core.records import changed
from ..core.state import State
from ..ops import Capacity, Gating, RouterLoss, Routing, route
from ..ops.gating import DEFAULT, PRIORITIES, as_capacity, check_gating, described
from ..ops.grouped_matmul import BACKENDS

BALANCING = ("sign", "zscore")
# Products from which on a linear map of tokens takes longer than the call of an operator.
LARGE = 1 << 22


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

    The logits are computed in float32 (float64 for float64 tokens) in every autocast region. What is random is drawn in
    training only, and so is the loss "load", which noise defines. Activation checkpointing, of both kinds, draws the
    same again::

        tokens = tokens * torch.empty_like(tokens).uniform_(1 - jitter, 1 + jitter)
        logits = F.linear(tokens, weight)
        logits = logits + torch.randn_like(logits) * F.softplus(F.linear(tokens, noise_weight))     # learned_noise
        allowed = torch.rand_like(logits) >= expert_dropout

    Where `route` runs in C++ a large map does, too, with the same bits for any number of threads.

    Args:
        dim: D of the tokens.
        experts: E.
        k: choices of each token.
        capacity: as in `route`.
        eval_capacity: the same in evaluation; by default `capacity`.
        priority: as in `route`.
        gating: as in `route`.
        losses: as in `route`.
        jitter: tokens are multiplied by numbers from [1 - jitter, 1 + jitter] for their scores alone, as in Switch
            Transformers; in [0, 1], 0 for none.
        learned_noise: normal noise is added to each logit whose deviation is learned, the softplus of a second linear
            map, as in Shazeer et al.; for choices and gates. The loss "load" is that of ``gating.noise_std``.
        expert_dropout: the chance that an expert is no choice of a token, in [0, 1); at least k stay, whichever they
            are. Not of tokens that are given their experts.
        balance: None; or "sign" or "zscore", to choose by a bias that `update_bias` moves: see `balanced_bias`.
        balance_rate: its step.

    Attributes:
        weight: (E, D).
        noise_weight: (E, D), 0 at first, where there is `learned_noise`.
        expert_bias: (E,) buffer, where there is `balance`: at least float32 whatever the module is cast to. It must be
            equal on all ranks, to which DistributedDataParallel copies it from the first.

    Source:
        Fedus et al., Switch Transformers, 2022, for the jitter; Shazeer et al., Outrageously Large Neural Networks: The
        Sparsely-Gated Mixture-of-Experts Layer, 2017, for the noise.

    Examples:
        >>> router = Router(8, 4, k=2, jitter=0.01, learned_noise=True, expert_dropout=0.1)
        >>> tokens = torch.randn(5, 8)
        >>> torch.equal(router.eval()(tokens).gates, router(tokens).gates)
        True
    """

    digits = ("expert_bias",)
    expert_bias: Tensor | None
    noise_weight: nn.Parameter | None

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
        jitter: float = 0.0,
        learned_noise: bool = False,
        expert_dropout: float = 0.0,
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
        self.jitter = checks.number("Router", "jitter", jitter, "[0, 1]")
        self.expert_dropout = checks.number("Router", "expert_dropout", expert_dropout, "[0, 1)")
        learned_noise = checks.flag("Router", "learned_noise", learned_noise)
        self.balance = balance
        self.balance_rate = checks.number("Router", "balance_rate", balance_rate)
        self.weight = nn.Parameter(torch.empty(experts, dim, device=device, dtype=dtype))
        noise_weight = nn.Parameter(torch.empty_like(self.weight)) if learned_noise else None
        self.register_parameter("noise_weight", noise_weight)
        bias = None if balance is None else torch.zeros(experts, dtype=torch.float32, device=device)
        self.register_buffer("expert_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal numbers that give unit logits for unit tokens' components, noise of one size, and no bias."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.weight.shape[1]))
        if self.noise_weight is not None:
            nn.init.zeros_(self.noise_weight)
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def logits(self, tokens: Tensor, generator: torch.Generator | None = None, backend: str = "auto") -> Tensor:
        """(T, E) of tokens (T, D), in training with jitter and learned noise."""
        dtype = checks.accumulator(tokens.dtype)
        random = random_options("Router", generator) if self.training else {}
        with autocast.disabled(tokens):
            tokens = tokens.to(dtype)
            if self.training and self.jitter:
                uniform = torch.rand(tokens.shape, dtype=dtype, device=tokens.device, **random)
                tokens = tokens * (1 + self.jitter * (2 * uniform - 1))
            logits = _linear(tokens, self.weight.to(dtype), backend)
            if self.training and self.noise_weight is not None:
                noise = torch.randn(logits.shape, dtype=dtype, device=logits.device, **random)
                logits = logits + noise * softplus(_linear(tokens, self.noise_weight.to(dtype), backend))
            return logits

    def asked(self, tokens: Tensor, labels: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """`logits` and the labels of `route`, without the experts that are dropped.

        Tokens that take no part are 0, so that what they hold does not reach the weight.
        """
        valid, allowed = labels.get("valid"), labels.get("allowed")
        if allowed is not None:
            some = allowed if allowed.dtype == torch.bool else allowed >= 0
            some = some.any(1) if some.dim() == 2 else some
            valid = some if valid is None else valid & some
        tokens = tokens if valid is None else left_out(tokens, valid)
        logits = self.logits(tokens, labels.get("generator"), labels.get("backend", "auto"))
        given = allowed is not None and allowed.dtype != torch.bool
        if self.training and self.expert_dropout and not given:
            labels = {**labels, "allowed": self._kept(logits, allowed, labels.get("generator"))}
        return logits, labels

    def _kept(self, logits: Tensor, allowed: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """(T, E) bool: the experts that are not dropped, of those that a token may choose."""
        random = random_options("Router", generator)
        chance = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device, **random)
        if allowed is not None:
            chance = chance.masked_fill(~allowed, -1.0)
        best = chance.topk(min(self.k, chance.shape[1]), dim=1).indices
        kept = (chance >= self.expert_dropout).scatter(1, best, True)
        return kept if allowed is None else kept & allowed

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `route` in the present mode."""
        gating = self.gating
        if self.expert_bias is not None:
            gating = changed(gating, bias=self.expert_bias)
        losses = self.losses
        if not self.training and (gating.noise_std or gating.sampled):
            gating = changed(gating, noise_std=0.0, sampled=False)
        if not self.training:
            losses = tuple(loss for loss in losses if loss.name != "load")
        capacity = self.capacity if self.training else self.eval_capacity
        return {"capacity": capacity, "gating": gating, "losses": losses}

    def forward(self, tokens: Tensor, **labels: Any) -> Routing:
        """Route tokens (T, D); `labels` are segments, num_segments, valid, allowed, generator, backend of `route`."""
        logits, labels = self.asked(tokens, labels)
        return route(logits, self.k, priority=self.priority, **self.options(), **labels)

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


def _linear(tokens: Tensor, weight: Tensor, backend: str) -> Tensor:
    """``F.linear(tokens, weight)`` of (T, D) and (E, D); a large one on a CPU as the product of a single group.

    So it is cut into tasks like the layers of the experts, and forward and backward do not depend on threads.
    """
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    plain = all(type(each) in (Tensor, nn.Parameter) for each in (tokens, weight))  # no DTensor
    if traced or not plain or backend not in ("auto", "cpu"):
        return F.linear(tokens, weight)
    large = tokens.shape[0] * weight.numel() >= LARGE and not unsupported_by_cpu(tokens)
    if not large or choose("Router", BACKENDS, tokens, backend) != "cpu":
        return F.linear(tokens, weight)
    rows = torch.tensor([0, tokens.shape[0]])
    return call.grouped_matmul_forward(tokens, weight.t().unsqueeze(0), rows, None, None, None, "cpu")
