"""How a router scores experts, how many tokens an expert takes, and what is asked of the load on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.routing import GROUP_SCORES, SCORES

LOSSES = ("importance", "load", "switch", "z", "local_entropy", "global_entropy")


@dataclass(frozen=True, eq=False)
class Gating:
    """How experts are scored and chosen.

    Attributes:
        score: "softmax" over the experts, or "sigmoid" of each.
        renormalize: divide the gates of a token by their sum over its k choices, before any is dropped. With k = 1
            every gate is 1, as checkpoints expect that are run with one expert per token; the router then has no
            gradient through the gates and learns from balance losses alone.
        noise_std: noise of standard deviation noise_std / E is added to the logits, for choices and gates; 0 for none.
        bias: (E,) added to the scores for the choice alone, as balancing without auxiliary losses does.
        expert_groups: the experts are this many groups of consecutive ones, of which a token's choices must come from
            the best `kept_groups`.
        kept_groups: how many groups remain.
        group_score: value of a group: "top2", the sum of its two best scores, or "max".
    """

    score: str = "softmax"
    renormalize: bool = False
    noise_std: float = 0.0
    bias: Tensor | None = None
    expert_groups: int = 1
    kept_groups: int = 1
    group_score: str = "top2"

    def checked(self, function: str, k: int, experts: int, logits: Tensor) -> Gating:
        """Return it with Python's numbers; raise where it does not fit k choices among the logits' experts."""
        checks.check_choice(function, "gating.score", self.score, SCORES)
        checks.check_choice(function, "gating.group_score", self.group_score, GROUP_SCORES)
        noise_std = checks.number(function, "gating.noise_std", self.noise_std, "[0, inf)")
        if self.bias is not None:
            checks.check_vector(function, "gating.bias", self.bias, experts, "logits", logits)
            checks.check_constant(function, "gating.bias", self.bias)
        groups = checks.integer(function, "gating.expert_groups", self.expert_groups, 1)
        if experts % groups:
            raise ValueError(
                f"{function}: gating.expert_groups must divide the number of experts, got {groups} groups of {experts} "
                "experts"
            )
        kept = checks.integer(function, "gating.kept_groups", self.kept_groups, 1, groups)
        if k > experts // groups * kept:
            raise ValueError(
                f"{function}: k must be at most the number of experts that may be chosen, got k={k} and "
                f"{experts // groups * kept} experts"
            )
        if noise_std is self.noise_std and groups is self.expert_groups and kept is self.kept_groups:
            return self
        return replace(self, noise_std=noise_std, expert_groups=groups, kept_groups=kept)


@dataclass(frozen=True)
class Capacity:
    """How many tokens of a group an expert takes; the rest are dropped.

    Attributes:
        factor: ceil(factor k S / E) tokens, for groups of S tokens.
        limit: or this number of tokens.
        multiple_of: the number is rounded up to a multiple of this.
        group_size: tokens in a group, consecutive ones; None for one group of all. Groups share nothing.
        padded: every expert owns as many rows of the dispatched tokens as it may take, with zeros in those that are
            not taken, so that the layout does not depend on the choices. Otherwise the rows of all experts follow each
            other without gaps.
    """

    factor: float | None = None
    limit: int | None = None
    multiple_of: int = 1
    group_size: int | None = None
    padded: bool = False

    def slots(self, function: str, tokens: int, experts: int, k: int) -> tuple[int, int]:
        """Return (tokens that an expert takes of a group, -1 for all; tokens in a group)."""
        multiple = checks.integer(function, "capacity.multiple_of", self.multiple_of, 1)
        size = tokens
        if self.group_size is not None:
            size = checks.integer(function, "capacity.group_size", self.group_size, 1)
        if self.group_size is not None and tokens % size:
            raise ValueError(
                f"{function}: capacity.group_size must divide the number of tokens, got groups of {size} and {tokens} "
                "tokens; pad the tokens and mark them in valid"
            )
        if self.factor is not None and self.limit is not None:
            raise ValueError(f"{function}: capacity must have a factor or a limit, got both")
        if self.limit is not None:
            most = checks.integer(function, "capacity.limit", self.limit, 0)
        elif self.factor is not None:
            factor = checks.number(function, "capacity.factor", self.factor, "[0, inf)")
            # The product may miss a whole number by a rounding, which must not cost a slot.
            most = math.ceil(factor * k * size / experts - 1e-9)
        elif self.padded:
            raise ValueError(f"{function}: capacity must have a factor or a limit to be padded, got neither")
        else:
            return -1, size
        return -(-most // multiple) * multiple, size


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
            importance and load so, which cannot see a segment of few tokens, beside entropies of each modality.
    """

    name: str
    weight: float | Sequence[float] = 1.0
    threshold: float | Sequence[float] | None = None
    pooled: bool = False

    def __post_init__(self) -> None:
        checks.check_choice("RouterLoss", "name", self.name, LOSSES)
        if self.threshold is not None and self.name != "global_entropy":
            raise ValueError(f"RouterLoss: threshold must be None for {self.name!r}, got {self.threshold}")

    def per_segment(self, function: str, value: Any, segments: int) -> list[float] | Tensor:
        """A weight or threshold as (S,) numbers, in a list if they came as such."""
        if isinstance(value, (int, float)):
            return [value] * segments
        if isinstance(value, (list, tuple)) and all(isinstance(each, (int, float)) for each in value):
            if len(value) == segments:
                return list(value)
        else:
            numbers = torch.as_tensor(value)
            if numbers.dim() == 0 or numbers.shape == (segments,):
                return numbers.expand(segments)
        raise ValueError(
            f"{function}: losses must have one weight and threshold, or one for each of {segments} segments, "
            f"got {checks.shown(value)} for {self.name!r}"
        )
