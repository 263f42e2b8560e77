"""Balance losses and metrics of a router: what users ask for, and short algebra on sums over the tokens of a segment.

`Statistics.losses` and `Statistics.slopes`, their derivative, are for every backend; csrc/cpu/expert_losses.h is the
same for small batches on a CPU, where a dozen operations of torch take longer than the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import checks
from ..core.masks import times

# In the order of csrc/expert_routing.h.
LOSSES = ("importance", "load", "switch", "z", "local_entropy", "global_entropy")


@dataclass(frozen=True)
class RouterLoss:
    """A loss on how tokens are spread over experts, and its weights.

    Attributes:
        name: one of

            - "importance": squared coefficient of variation of the experts' summed probabilities;
            - "load": the same of the probabilities to be chosen when an expert's own noise is drawn again;
            - "switch": E times the sum over experts of share of choices times mean probability;
            - "z": mean squared logsumexp of the logits;
            - "local_entropy": mean entropy of a token's probabilities: low when each token is decided;
            - "global_entropy": minus the entropy of the mean probabilities: low when the tokens are spread.
        weight: in the total; one number, or one for each segment.
        threshold: for "global_entropy": max(0, threshold + loss), which is 0 from an entropy of `threshold` on: log(S)
            asks a segment to use at least S experts. One number, or one for each segment.
        pooled: over all tokens, whatever their segments, with one weight and a value of shape (1,). LIMoE has
            importance and load so, which cannot see a segment of few tokens, beside entropies of each modality. One
            name may be wanted pooled and by segment: "global_entropy" pooled, less that of segments weighted by their
            share of the tokens, is minus the mutual information of segments and experts.
    """

    name: str
    weight: float | Sequence[float] = 1.0
    threshold: float | Sequence[float] | None = None
    pooled: bool = False

    def __post_init__(self) -> None:
        checks.check_choice("RouterLoss", "name", self.name, LOSSES)
        if self.threshold is not None and self.name != "global_entropy":
            raise ValueError(f"RouterLoss: threshold must be None for {self.name!r}, got {self.threshold}")

    def check(self, function: str, segments: int) -> None:
        """Raise unless the weight and the threshold are one number, or one for each of the segments."""
        for value in (self.weight, self.threshold):
            if value is None or isinstance(value, (int, float)):
                continue
            if isinstance(value, (list, tuple)) and all(isinstance(number, (int, float)) for number in value):
                shape: tuple[int, ...] = (len(value),)
            else:
                shape = tuple(torch.as_tensor(value).shape)
            if shape not in ((), (1 if self.pooled else segments,)):
                raise ValueError(
                    f"{function}: losses must have one weight and threshold, or one for each of "
                    f"{1 if self.pooled else segments} segments, got {checks.shown(value)} for {self.name!r}"
                )


# By name, as users ask for most of them.
PLAIN = {name: RouterLoss(name) for name in LOSSES}


def keys(wanted: Sequence[RouterLoss]) -> list[str]:
    """What results call each loss: its name, with "pooled " before it where the same is wanted by segment, too."""
    by_segment = {loss.name for loss in wanted if not loss.pooled}
    return [f"pooled {loss.name}" if loss.pooled and loss.name in by_segment else loss.name for loss in wanted]


class LossSpec(NamedTuple):
    """The integers of a loss, as operators take them: four of each in a row, and its numbers in another list."""

    loss: int  # of LOSSES
    pooled: int
    weights: int  # how many numbers: one, or one for each segment
    thresholds: int  # the same, or none


def encode(wanted: Sequence[RouterLoss]) -> tuple[list[int], list[float]] | None:
    """Losses as integers and numbers for an operator; None where some of the numbers are in tensors."""
    integers: list[int] = []
    numbers: list[float] = []
    for loss in wanted:
        counts = []
        for value in (loss.weight, loss.threshold):
            values = [value] if isinstance(value, (int, float)) else [] if value is None else value
            if not isinstance(values, (list, tuple)) or not all(isinstance(each, (int, float)) for each in values):
                return None
            counts.append(len(values))
            numbers += values
        integers += (LOSSES.index(loss.name), loss.pooled, *counts)
    return integers, numbers


def decode(integers: Sequence[int], numbers: Sequence[float]) -> list[RouterLoss]:
    """What `encode` was given."""
    wanted, rest = [], list(numbers)
    for at in range(0, len(integers), 4):
        s = LossSpec(*integers[at : at + 4])
        weight: Any = rest[: s.weights]
        threshold: Any = rest[s.weights : s.weights + s.thresholds]
        rest = rest[s.weights + s.thresholds :]
        weight, threshold = (each[0] if len(each) == 1 else each or None for each in (weight, threshold))
        wanted.append(RouterLoss(LOSSES[s.loss], weight, threshold, bool(s.pooled)))
    return wanted


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

    @classmethod
    def unpack(cls, floating: Tensor, integers: Tensor, experts: int, noise: bool) -> Statistics:
        """From its numbers as two vectors, as `summary` packs them; without noise there is one sum of p."""
        segments = floating.shape[0] // (3 * experts + 3)
        cells = segments * experts
        sums, totals = floating[: 3 * cells].view(3, segments, experts), floating[3 * cells :].view(3, segments)
        choices, kept = integers[: 2 * cells].view(2, segments, experts)
        probability, noisy, chance = sums
        lse_squared, entropy, margin = totals
        noisy = noisy if noise else probability
        return cls(probability, noisy, chance, lse_squared, entropy, choices, kept, integers[2 * cells :], margin)

    def pooled(self) -> Statistics:
        """The same with all segments as one."""
        return Statistics(*(getattr(self, field.name).sum(0, keepdim=True) for field in dataclasses.fields(self)))

    def losses(self, wanted: Sequence[RouterLoss]) -> tuple[list[Tensor], Tensor]:
        """Each loss, (S,) or (1,) where it is pooled, and their weighted total; 0 for a segment without tokens."""
        pooled = self.pooled() if any(loss.pooled for loss in wanted) else self
        values = [(pooled if loss.pooled else self)._loss(loss) for loss in wanted]
        weighted = [
            value
            if isinstance(loss.weight, (int, float)) and loss.weight == 1
            else times(_row(loss.weight, value), value)
            for loss, value in zip(wanted, values, strict=True)
        ]
        return values, torch.cat(weighted).sum() if weighted else self.entropy.new_zeros(())

    def slopes(
        self, wanted: Sequence[RouterLoss], d_losses: Tensor | None, d_total: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The derivative of `losses`: by the three tables of sums, (3, S, E), and by lse_squared and entropy, (2, S).

        `d_losses`: of all losses, in a row.
        """
        d_sums = self.probability.new_zeros((3, *self.probability.shape))
        d_totals = self.entropy.new_zeros((2, *self.entropy.shape))
        pooled = self.pooled() if any(loss.pooled for loss in wanted) else self
        at = 0
        for loss in wanted:
            sums = pooled if loss.pooled else self
            size = sums.tokens.shape[0]
            d = sums.entropy.new_zeros((size,)) if d_losses is None else d_losses[at : at + size]
            if d_total is not None:
                weight = _row(loss.weight, d)
                d = d + torch.where(weight != 0, weight * d_total, 0.0)
            at += size
            if loss.name in ("z", "local_entropy"):
                d_totals[0 if loss.name == "z" else 1] += d / sums._divisor()
            else:
                of_noise = loss.name == "switch" and self.noisy is not self.probability
                table = 2 if loss.name == "load" else int(of_noise)
                # A slope may be NaN where nobody asks for the loss.
                d_sums[table] += torch.where(d[:, None] != 0, d[:, None] * sums._slope(loss), 0.0)
        return d_sums, d_totals

    def _divisor(self) -> Tensor:
        """(S,) tokens, at least one."""
        return self.tokens.clamp_min(1).to(self.entropy.dtype)

    def _share(self) -> Tensor:
        """(S, E): the experts' shares of the choices times E, and divided by the tokens."""
        factor = self.choices.shape[1] / (self.choices.sum(1).clamp_min(1) * self._divisor())
        return self.choices.to(self.entropy.dtype) * factor[:, None]

    def _loss(self, loss: RouterLoss) -> Tensor:
        """(S,) one loss."""
        if loss.name == "importance":
            return squared_variation(self.probability)
        if loss.name == "load":
            return squared_variation(self.chance)
        if loss.name == "switch":
            return (self._share() * self.noisy).sum(1)
        if loss.name == "global_entropy":
            return self._above_threshold(loss, self._negative_entropy())
        return (self.lse_squared if loss.name == "z" else self.entropy) / self._divisor()

    def _slope(self, loss: RouterLoss) -> Tensor:
        """(S, E) derivative of one loss by the table that it is made of."""
        if loss.name == "switch":
            return self._share()
        if loss.name == "global_entropy":
            p = self.probability / self._divisor()[:, None]
            least = torch.finfo(p.dtype).tiny
            slope = (p.clamp_min(least).log() + (p >= least)) / self._divisor()[:, None]
            if loss.threshold is None:
                return slope
            value = self._negative_entropy()
            paid = (self.tokens > 0) & (value + _row(loss.threshold, value) >= 0)
            return torch.where(paid[:, None], slope, 0.0)
        values = self.probability if loss.name == "importance" else self.chance
        variance, mean = torch.var_mean(values, 1, correction=0, keepdim=True)
        square = mean.square()
        none, safe = square == 0, torch.where(square == 0, 1.0, square)
        return 2 / values.shape[1] / safe * (values - mean - torch.where(none, 0.0, variance / mean))

    def _negative_entropy(self) -> Tensor:
        """(S,) of the mean probabilities."""
        # 0 log 0 is 0; its gradient is finite, and multiplies probabilities that are all 0.
        p = self.probability / self._divisor()[:, None]
        return (p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(1)

    def _above_threshold(self, loss: RouterLoss, value: Tensor) -> Tensor:
        """(S,) how much of a loss its threshold leaves."""
        if loss.threshold is None:
            return value
        return torch.where(self.tokens > 0, value + _row(loss.threshold, value), 0.0).clamp_min(0.0)

    def metrics(self, served: Tensor | None = None) -> dict[str, Tensor]:
        """Numbers to log, by name; see `Routing.metrics`. `served`: (S,) tokens that have an expert."""
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
            "success_rate": self.kept.sum(1) / of_segment if served is None else served / tokens,
            "load": choices / of_segment[:, None],
            "entropy": self.entropy / tokens,
            "effective_experts": entropy_of(self.probability / tokens[:, None]).exp(),
            "top1_margin": self.margin / tokens,
            "mutual_information": information,
            "normalized_mutual_information": torch.where(least > 0, information / least, 0.0),
        }


def summary(
    scores: Sequence[Tensor], kept: Tensor, wanted: Sequence[RouterLoss], noise: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (losses in a row, their total, floating numbers and integers of `Statistics`).

    `scores`: (sums, totals, choices, tokens, margin) as the backends return them; `kept`: (S, E), of the slots.
    """
    sums, totals, choices, tokens, margin = scores
    floating = torch.cat([sums.flatten(), totals.flatten(), margin])
    integers = torch.cat([choices.flatten(), kept.flatten(), tokens])
    values, total = Statistics.unpack(floating, integers, sums.shape[2], noise).losses(wanted)
    return torch.cat(values) if values else total.new_empty((0,)), total, floating, integers


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


def _row(value: Any, like: Tensor) -> Tensor:
    """A weight or threshold, or one of each segment, as a tensor that is multiplied with or added to (S,) numbers."""
    if isinstance(value, (int, float)):
        return like.new_full((), value)  # a GPU does not wait for it
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)
