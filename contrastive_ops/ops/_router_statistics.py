"""Balance losses and metrics of a router: short algebra on sums over the tokens of each segment, for every backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.masks import times
from ..core.results import pytree
from .gating import RouterLoss


@pytree
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
        served: (S,) int64, tokens that have an expert, where experts choose.
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
    served: Tensor | None = None

    def losses(self, function: str, wanted: Sequence[RouterLoss]) -> tuple[dict[str, Tensor], Tensor]:
        """Each loss by name, (S,) or (1,) where it is pooled, and their weighted total."""
        by_name, total = self._losses(function, [loss for loss in wanted if not loss.pooled])
        pooled = [loss for loss in wanted if loss.pooled]
        if pooled:
            of_all, more = self.pooled()._losses(function, pooled)
            total = total + more if by_name else more
            by_name |= of_all
        return {loss.name: by_name[loss.name] for loss in wanted}, total

    def pooled(self) -> Statistics:
        """The same with all segments as one."""
        sums = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Statistics(
            **{name: value if value is None else value.sum(0, keepdim=True) for name, value in sums.items()}
        )

    def _losses(self, function: str, wanted: Sequence[RouterLoss]) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of each segment; 0 for one without tokens, whose sums are 0.

        In few operations: on a CPU a small one takes longer than a thousand tokens, and its derivative as long again.
        """
        names = [loss.name for loss in wanted]
        if not names:
            return {}, self.entropy.new_zeros(())
        tokens = self.tokens.clamp_min(1).to(self.entropy.dtype)
        values: dict[str, Tensor] = {}
        varied = [name for name in ("importance", "load") if name in names]
        if varied:
            sums = [self.probability if name == "importance" else self.chance for name in varied]
            values.update(zip(varied, squared_variation(torch.stack(sums)).unbind(), strict=True))
        if "switch" in names:
            choices = self.choices.to(tokens.dtype)
            factor = choices.shape[1] / (choices.sum(1).clamp_min(1) * tokens)
            values["switch"] = (choices * factor[:, None] * self.noisy).sum(1)
        if "z" in names:
            values["z"] = self.lse_squared / tokens
        if "local_entropy" in names:
            values["local_entropy"] = self.entropy / tokens
        if "global_entropy" in names:
            values["global_entropy"] = self._global_entropy(function, wanted[names.index("global_entropy")], tokens)
        by_name = {name: values[name] for name in names}
        every = torch.stack(tuple(by_name.values()))
        if not all(isinstance(loss.weight, (int, float)) and loss.weight == 1 for loss in wanted):
            every = times(per_segment(function, wanted, [loss.weight for loss in wanted], every), every)
        return by_name, every.sum()

    def _global_entropy(self, function: str, loss: RouterLoss, tokens: Tensor) -> Tensor:
        p = self.probability / tokens[:, None]
        # 0 log 0 is 0; its gradient is finite, and multiplies probabilities that are all 0.
        value = (p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(1)
        if loss.threshold is None:
            return value
        value = value + per_segment(function, [loss], [loss.threshold], value[None])[0]
        return torch.where(self.tokens > 0, value, 0.0).clamp_min(0.0)

    def metrics(self) -> dict[str, Tensor]:
        """Numbers to log, by name; see `Routing.metrics`."""
        dtype = self.margin.dtype
        tokens, choices = self.tokens.to(dtype), self.choices.to(dtype)
        of_segment = choices.sum(1)
        total = of_segment.sum().clamp_min(1)
        joint = choices / total
        spread, used = entropy_of(of_segment / total), entropy_of(joint.sum(0))
        information = relative_entropy(joint, of_segment[:, None] / total * joint.sum(0))
        least = torch.minimum(spread, used)
        return {
            "tokens": self.tokens,
            "choices": self.choices,
            "success_rate": self.kept.sum(1) / of_segment if self.served is None else self.served / tokens,
            "load": choices / of_segment[:, None],
            "entropy": self.entropy / tokens,
            "effective_experts": entropy_of(self.probability / tokens[:, None]).exp(),
            "top1_margin": self.margin / tokens,
            "mutual_information": information,
            "normalized_mutual_information": torch.where(least > 0, information / least, 0.0),
        }


def squared_variation(values: Tensor) -> Tensor:
    """Squared coefficient of variation of the last dimension: variance over squared mean; 0 where all are 0."""
    variance, mean = torch.var_mean(values, -1, correction=0)
    square = mean.square()
    return variance / torch.where(square == 0, 1.0, square)  # not so where the mean is NaN, which must come out


def entropy_of(p: Tensor) -> Tensor:
    """Entropy of the last dimension in nats. Its gradient at 0 is infinite."""
    return torch.special.entr(p).sum(-1)


def relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """Sum of p log(p / q) for distributions: of terms that are never negative, as a difference of entropies cancels."""
    apart = torch.where(q > 0, (p - q) / torch.where(q > 0, q, 1.0), 0.0)
    return (q * (torch.special.xlog1py(1 + apart, apart) - apart).clamp_min(0)).sum()


def per_segment(function: str, losses: Sequence[RouterLoss], values: Sequence[Any], like: Tensor) -> Tensor:
    """Weights or thresholds of some losses as a matrix like (losses, S), made at once where they are numbers."""
    rows = [loss.per_segment(function, value, like.shape[1]) for loss, value in zip(losses, values, strict=True)]
    if not any(isinstance(row, Tensor) for row in rows):
        return torch.tensor(rows, dtype=like.dtype, device=like.device)
    return torch.stack([torch.as_tensor(row, dtype=like.dtype, device=like.device) for row in rows])
