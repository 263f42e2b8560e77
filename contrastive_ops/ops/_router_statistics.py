"""Balance losses and metrics of a router: short algebra on sums over the tokens of each segment, for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gating import RouterLoss


@dataclass(frozen=True, eq=False)
class Statistics:
    """What losses and metrics are made of; sums over the tokens of each of S segments.

    p is the noise-free distribution of a token over the experts: its softmax, or its sigmoids scaled to sum to 1.

    Attributes:
        probability: (S, E) sum of p. Differentiable.
        noisy: (S, E) sum of the same with noise. Differentiable.
        chance: (S, E) sum of the probability to be chosen when an expert's own noise is drawn again. Differentiable.
        lse_squared: (S,) sum of the squared logsumexp of the logits. Differentiable.
        entropy: (S,) sum of the entropy of p. Differentiable.
        choices: (S, E) int64, choices of each expert.
        kept: (S, E) int64, those that were not dropped.
        tokens: (S,) int64, tokens that were routed.
        margin: (S,) sum of the difference of the two largest p.
    """

    probability: Tensor
    noisy: Tensor
    chance: Tensor
    lse_squared: Tensor
    entropy: Tensor
    choices: Tensor
    kept: Tensor
    tokens: Tensor
    margin: Tensor

    def losses(self, function: str, wanted: Sequence[RouterLoss]) -> tuple[dict[str, Tensor], Tensor]:
        """Each loss by name, (S,), and their weighted total; 0 for a segment without tokens."""
        by_name: dict[str, Tensor] = {}
        total = self.entropy.new_zeros(())
        for loss in wanted:
            value = self._loss(loss.name)
            segments = value.shape[0]
            if loss.threshold is not None:
                value = (loss.per_segment(function, loss.threshold, segments, value) + value).clamp_min(0.0)
            value = torch.where(self.tokens > 0, value, 0.0)
            by_name[loss.name] = value
            total = total + (loss.per_segment(function, loss.weight, segments, value) * value).sum()
        return by_name, total

    def _loss(self, name: str) -> Tensor:
        tokens = self.tokens.clamp_min(1).to(self.entropy.dtype)
        if name == "importance":
            return squared_variation(self.probability)
        if name == "load":
            return squared_variation(self.chance)
        if name == "switch":
            choices = self.choices.to(tokens.dtype)
            share = choices / choices.sum(1, keepdim=True).clamp_min(1)
            return share.shape[1] * (share * self.noisy).sum(1) / tokens
        if name == "z":
            return self.lse_squared / tokens
        if name == "local_entropy":
            return self.entropy / tokens
        return -entropy_of(self.probability / tokens[:, None])

    def metrics(self, served: Tensor | None = None) -> dict[str, Tensor]:
        """Numbers to log, by name; see `Routing.metrics`. `served`: (S,) tokens that have an expert."""
        dtype = self.margin.dtype
        tokens, choices = self.tokens.to(dtype), self.choices.to(dtype)
        mean = self.probability.detach() / tokens[:, None]
        joint = choices / choices.sum().clamp_min(1)
        of_segment, of_expert = entropy_of(joint.sum(1)), entropy_of(joint.sum(0))
        # A sum of logarithms can be below 0 by a rounding where segments and experts are independent.
        information = (of_segment + of_expert - entropy_of(joint.flatten())).clamp_min(0)
        least = torch.minimum(of_segment, of_expert)
        return {
            "tokens": self.tokens,
            "choices": self.choices,
            "success_rate": self.kept.sum(1) / choices.sum(1) if served is None else served / tokens,
            "load": choices / choices.sum(1, keepdim=True),
            "entropy": self.entropy.detach() / tokens,
            "effective_experts": entropy_of(mean).exp(),
            "top1_margin": self.margin / tokens,
            "mutual_information": information,
            "normalized_mutual_information": torch.where(least > 0, information / least, 0.0),
        }


def squared_variation(values: Tensor) -> Tensor:
    """Squared coefficient of variation of each row: variance over squared mean; 0 where all are 0."""
    mean = values.mean(1)
    variance = (values - mean[:, None]).square().mean(1)
    empty = mean.square() == 0  # not so where the mean is NaN, which must come out
    return torch.where(empty, 0.0, variance / torch.where(empty, 1.0, mean.square()))


def entropy_of(p: Tensor) -> Tensor:
    """Entropy of each row in nats; 0 log 0 is 0, and has gradient 0."""
    return -(p * torch.where(p > 0, p, 1.0).log()).sum(-1)
