"""What a router is asked: `Gating`, `Capacity`, and the arguments that `route` and `expert_choice` share, checked."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.lists import NONE, first_of_each
from ..core.masks import left_out
from ..core.recompute import random_options
from ..core.records import changed
from ..core.routing import GROUP_SCORES, SCORES, ScoreSpec
from .router_losses import PLAIN, RouterLoss, encode

PRIORITIES = ("gate", "position")
# Of labels that are read: each is a row of every metric.
MOST_SEGMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class Gating:
    """How experts are scored and chosen.

    Attributes:
        score: "softmax" over the experts, or "sigmoid" of each.
        renormalize: divide the gates of a token by their sum over its k choices, before any is dropped. With k = 1
            every gate is 1, as checkpoints expect that are run with one expert per token; the router then has no
            gradient through the gates and learns from balance losses alone.
        noise_std: noise of standard deviation noise_std / E is added to the logits, for choices and gates; 0 for none.
        sampled: a token's choices after its best are kept by chance, as the second expert of GShard is: one of gate g
            with probability ``min(1, k * g / gates.sum())``. The others are dropped before experts take tokens: they
            count as chosen, have no slot, and leave the gates of the rest as they are.
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
    sampled: bool = False

    def checked(self, function: str, k: int, experts: int, logits: Tensor) -> Gating:
        """Return it with Python's numbers; raise where it does not fit k choices among the logits' experts."""
        checks.check_choice(function, "gating.score", self.score, SCORES)
        checks.check_choice(function, "gating.group_score", self.group_score, GROUP_SCORES)
        checks.flag(function, "gating.sampled", self.sampled)
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
        return changed(self, noise_std=noise_std, expert_groups=groups, kept_groups=kept)


DEFAULT = Gating()


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


UNLIMITED = Capacity()


@dataclass(eq=False)
class RouterProblem:
    """A router's inputs. Rows are tokens; `segment`, `valid`, `mask`, `given`, `noise` and `chances` may be None."""

    function: str
    logits: Tensor
    gating: Gating
    noise: Tensor | None
    mask: Tensor | None
    given: Tensor | None
    segment: Tensor | None
    segments: int
    valid: Tensor | None
    losses: tuple[RouterLoss, ...]
    chances: Tensor | None = None

    @classmethod
    def of(
        cls,
        function: str,
        logits: Tensor,
        k: int,
        gating: Gating,
        segments: Tensor | None,
        num_segments: int | None,
        valid: Tensor | None,
        allowed: Tensor | None,
        losses: Sequence[str | RouterLoss],
        generator: torch.Generator | None,
        noise: Tensor | None,
    ) -> RouterProblem:
        """Check the arguments, and draw the noise, then the chances of choices."""
        tokens = logits.shape[0]
        wanted = described(function, losses)
        if len({(loss.name, loss.pooled) for loss in wanted}) < len(wanted):
            raise ValueError(
                f"{function}: losses must differ in name or in pooled, got {[loss.name for loss in wanted]}"
            )
        if valid is not None:  # what padding has for a segment and for experts is not looked at
            _check_like(function, "valid", valid, torch.bool, (tokens,), logits)
            segments, allowed = (_without_padding(each, valid) for each in (segments, allowed))
        if segments is not None:
            segments = checks.as_index(function, "segments", segments)
        count = _segments(function, segments, num_segments, logits)
        for loss in wanted:
            loss.check(function, count)
        mask, given = _allowed(function, allowed, k, logits)
        if given is not None:  # a token that is given no expert is left out
            some = (given >= 0).any(1)
            valid = some if valid is None else valid & some
        dtype = checks.accumulator(logits.dtype)
        if noise is not None:
            if not gating.noise_std:
                raise ValueError(f"{function}: noise must be None without gating.noise_std, got a tensor")
            checks.check_matrix(function, "noise", noise)
            _check_like(function, "noise", noise, noise.dtype, tuple(logits.shape), logits)
            checks.check_constant(function, "noise", noise)
            noise = noise.to(dtype).contiguous()
            noise = noise if valid is None else left_out(noise, valid)
        elif gating.noise_std:
            noise = torch.randn(logits.shape, dtype=dtype, device=logits.device, **random_options(function, generator))
        chances = None
        if gating.sampled:
            random = random_options(function, generator)
            chances = torch.rand((tokens, k), dtype=dtype, device=logits.device, **random)
        return cls(function, logits, gating, noise, mask, given, segments, count, valid, wanted, chances)

    def kept_by_chance(self, chosen: Tensor, gates: Tensor) -> Tensor:
        """(T, k) the choices, -1 for those that are dropped before experts take tokens."""
        if self.chances is None:
            return chosen
        gates = gates.detach()
        kept = self.chances * gates.sum(1, keepdim=True) < gates.shape[1] * gates
        kept[:, :1] = True
        return torch.where(kept, chosen, NONE)

    def asks(self, loss: str) -> bool:
        """Whether a loss is wanted."""
        return any(each.name == loss for each in self.losses)

    def arguments(self, k: int, given: Tensor | None = None) -> tuple[Any, ...]:
        """What the operator takes that scores the experts, up to the backend."""
        g = self.gating
        groups = (g.expert_groups, g.kept_groups, GROUP_SCORES.index(g.group_score))
        # With one choice the gate is 1, which `as_routing` puts there: x / x has a gradient of rounding errors.
        spec = ScoreSpec(
            k, SCORES.index(g.score), int(g.renormalize and k > 1), *groups, self.segments, int(self.asks("load"))
        )
        bias = None if g.bias is None else g.bias.detach().to(checks.accumulator(self.logits.dtype))
        sigma = g.noise_std / max(self.logits.shape[1], 1)
        given = self.given if given is None else given
        return self.logits, self.noise, bias, self.mask, given, self.segment, self.valid, list(spec), sigma


def router_problem(
    function: str,
    logits: Tensor,
    capacity: int | float | Capacity | None,
    k: int,
    priority: str,
    gating: Gating,
    *labels: Any,
) -> tuple[int, Capacity, RouterProblem]:
    """The arguments of `route`, checked: k, what experts take, and the rest."""
    checks.check_matrix(function, "logits", logits)
    k = checks.integer(function, "k", k, 1)
    checks.check_choice(function, "priority", priority, PRIORITIES)
    experts = logits.shape[1]
    if k > experts:
        raise ValueError(f"{function}: k must be at most the number of experts, got k={k} and {experts} experts")
    if gating is not DEFAULT:
        check_gating(function, gating)
        gating = gating.checked(function, k, experts, logits)
    limits = as_capacity(function, capacity)
    problem = RouterProblem.of(function, logits, k, gating, *labels)
    if problem.asks("load") and (gating.noise_std == 0 or gating.bias is not None or gating.expert_groups > 1):
        raise ValueError(
            f'{function}: losses must not have "load" without noise, or with a bias or groups of experts, got '
            f"noise_std={gating.noise_std}: it is the chance to be chosen when the noise is drawn again"
        )
    return k, limits, problem


@functools.lru_cache(maxsize=64, typed=True)
def plan_of(
    tokens: int, experts: int, k: int, capacity: int | float | None, priority: str, *losses: str | RouterLoss
) -> tuple[Any, ...]:
    """What a call without labels and noise comes to: a problem without numbers, and what the operator takes of it."""
    function, like = "route", torch.empty((tokens, experts), device="meta")
    k, limits, problem = router_problem(
        function, like, capacity, k, priority, DEFAULT, None, None, None, None, losses, None, None
    )
    taken, group = limits.slots(function, tokens, experts, k)
    encoded = encode(problem.losses)
    if encoded is None:
        raise TypeError(f"{function}: losses must have numbers for weights here, got tensors")
    *_, spec, sigma = problem.arguments(k)
    return problem, spec, sigma, [experts, group, taken, 0, 1], priority == "gate" and taken >= 0, *encoded


def check_gating(function: str, gating: object) -> None:
    """`gating` must be a description of one."""
    if not isinstance(gating, Gating):
        raise TypeError(f"{function}: gating must be Gating, got {type(gating).__name__}")


def as_capacity(function: str, capacity: int | float | Capacity | None) -> Capacity:
    """A limit, a factor or a description as a description."""
    if isinstance(capacity, Capacity):
        return capacity
    if capacity is None:
        return UNLIMITED
    value = checks.plain(function, "capacity", capacity, "an int, a float, Capacity or None")
    return Capacity(limit=value) if isinstance(value, int) else Capacity(factor=value)


def _check_like(
    function: str, name: str, tensor: object, dtype: torch.dtype, shape: tuple[int, ...], logits: Tensor
) -> None:
    tensor = checks.check_tensor(function, name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{function}: {name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{function}: {name} must have shape {shape}, got {checks.shape(tensor)}")
    checks.check_device(function, "logits", logits, name, tensor)


def _without_padding(label: Tensor | None, valid: Tensor) -> Tensor | None:
    """A label of tokens with 0 for padding, if it fits; what does not is left to the checks."""
    fits = isinstance(label, Tensor) and label.shape[:1] == valid.shape and label.device == valid.device
    return left_out(label, valid) if fits and isinstance(label, Tensor) else label


def described(function: str, losses: object) -> tuple[RouterLoss, ...]:
    """Names and descriptions as descriptions."""
    if not isinstance(losses, (list, tuple)):
        raise TypeError(f"{function}: losses must be a list of names and RouterLoss, got {type(losses).__name__}")
    for loss in losses:
        if not isinstance(loss, (str, RouterLoss)):
            raise TypeError(f"{function}: losses must be names and RouterLoss, got {type(loss).__name__}")
    # A name that is not known is told by the constructor.
    return tuple((PLAIN.get(loss) or RouterLoss(loss)) if isinstance(loss, str) else loss for loss in losses)


def _segments(function: str, segments: Tensor | None, num_segments: int | None, logits: Tensor) -> int:
    """How many segments there are."""
    if num_segments is not None:
        num_segments = checks.integer(function, "num_segments", num_segments, 1)
    if segments is None:
        if num_segments not in (None, 1):
            raise ValueError(f"{function}: segments must be given for num_segments={num_segments}, got None")
        return 1
    _check_like(function, "segments", segments, torch.int64, (logits.shape[0],), logits)
    if num_segments is None:
        if not checks.may_read(segments, waits=True):
            raise ValueError(f"{function}: num_segments must be given where segments cannot be read, got None")
        num_segments = int(segments.max()) + 1 if segments.shape[0] > 0 else 1
        if num_segments > MOST_SEGMENTS:
            raise ValueError(
                f"{function}: segments must be numbers of rows of the metrics, got {num_segments - 1}\n"
                "  number them: segments.unique(return_inverse=True)[1]"
            )
    # Kernels for a GPU count a token of another segment nowhere.
    checks.check_index_values(function, "segments", segments, num_segments, waits=False)
    return num_segments


def _allowed(function: str, allowed: Tensor | None, k: int, logits: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The argument as (mask, assignment), of which one at most is there."""
    tokens, experts = logits.shape
    if allowed is None:
        return None, None
    if isinstance(allowed, Tensor) and allowed.dtype == torch.bool:
        _check_like(function, "allowed", allowed, torch.bool, (tokens, experts), logits)
        return allowed, None
    if isinstance(allowed, Tensor) and allowed.dtype in checks.INTEGERS:
        given = checks.as_index(function, "allowed", allowed)
        given = given[:, None] if given.dim() == 1 and k == 1 else given
        _check_like(function, "allowed", given, torch.int64, (tokens, k), logits)
        checks.check_index_values(function, "allowed", given, experts, or_none=True, waits=False)
        if k > 1:
            given = torch.where(first_of_each(given), given, NONE)
        return None, given
    kind = allowed.dtype if isinstance(allowed, Tensor) else type(allowed).__name__
    raise TypeError(f"{function}: allowed must be bool (T, E), or int64 (T, k) experts, got {kind}")
