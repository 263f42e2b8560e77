"""Routing in which experts choose tokens; scores, places and losses are those of `expert_routing`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import checks
from ..core.backends import choose
from ..core.operators import call
from ..core.routing import SlotSpec, smaller
from .expert_routing import BACKENDS, Routing, routing_in_parts
from .gating import DEFAULT, Capacity, Gating, RouterProblem, as_capacity, check_gating
from .router_losses import RouterLoss


def expert_choice(
    logits: Tensor,
    capacity: int | float | Capacity,
    *,
    gating: Gating = DEFAULT,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    valid: Tensor | None = None,
    allowed: Tensor | None = None,
    losses: Sequence[str | RouterLoss] = (),
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    backend: str = "auto",
) -> Routing:
    """Let every expert choose its tokens: balanced by construction, with as many experts a token as want it.

    Equivalent to, for one group of tokens::

        p = logits.softmax(1)
        gates, tokens = p.topk(C, dim=0)                                 # (C, E): each expert's best tokens

    Args:
        logits: (T, E) float32, bfloat16, float16 or float64. An expert does not choose where its logit is -inf.
        capacity: tokens that an expert takes of a group: an int; a float, a factor of T / E, rounded up; or `Capacity`.
        gating: as in `route`, without bias, groups and renormalisation.
        segments: as in `route`.
        num_segments: as in `route`.
        valid: as in `route`.
        allowed: (T, E) bool, as in `route`.
        losses: as in `route`; not "load".
        generator: as in `route`.
        noise: as in `route`.
        backend: as in `route`.

    Returns:
        `Routing` with k = E: choice j of a token is expert j where that has chosen it, and -1 elsewhere. "success_rate"
        is the share of tokens that some expert has chosen, and "load" the experts' shares of what they have chosen.

    Raises:
        ValueError, TypeError, NotImplementedError: as `route`.

    Note:
        Equal scores are taken in the order of tokens, NaN after all numbers. Memory O(T E). Not for causal models:
        whether an expert takes a token depends on the tokens after it. `route` without a capacity does not.

    Source:
        Zhou et al., Mixture-of-Experts with Expert Choice Routing, 2022.

    Examples:
        >>> routing = expert_choice(torch.randn(12, 4), capacity=1.0)
        >>> routing.offsets.tolist()
        [0, 3, 6, 9, 12]
    """
    function = "expert_choice"
    checks.check_matrix(function, "logits", logits)
    tokens, experts = logits.shape
    check_gating(function, gating)
    if gating.bias is not None or gating.expert_groups != 1 or gating.renormalize or gating.sampled:
        raise ValueError(
            f"{function}: gating must have no bias, no groups, no renormalisation and no sampled choices, got one of "
            "them: experts choose by the scores themselves"
        )
    gating = gating.checked(function, 1, experts, logits)
    limits = as_capacity(function, capacity)
    taken, group = limits.slots(function, tokens, experts, 1)
    if taken < 0:
        raise ValueError(f"{function}: capacity must have a factor or a limit, got {capacity}")
    if allowed is not None and allowed.dtype != torch.bool:
        raise TypeError(f"{function}: allowed must be bool (T, E), got {allowed.dtype}")
    problem = RouterProblem.of(
        function, logits, experts, gating, segments, num_segments, valid, allowed, losses, generator, noise
    )
    if problem.asks("load"):
        raise ValueError(f'{function}: losses must not have "load", got it: every expert takes as many tokens')
    backend = choose(function, BACKENDS, logits, backend)
    everyone = torch.arange(experts, device=logits.device).expand(tokens, experts).contiguous()
    eligible, gates, _, sums, totals, _, counts, margin = call.expert_routing_scores(
        *problem.arguments(experts, everyone), backend
    )
    if allowed is not None:
        eligible = eligible.masked_fill(~allowed, -1)
    eligible = eligible.masked_fill(logits == -torch.inf, -1)
    chosen = _best_tokens(gates.detach(), eligible >= 0, taken, group)
    spec = SlotSpec(experts, group, taken if limits.padded else -1, int(limits.padded), problem.segments)
    picked = torch.where(chosen, eligible, -1)
    places = call.expert_routing_slots(picked, None, problem.segment, list(spec), backend)
    if not limits.padded:  # rows that experts can fill, not one of every token and expert
        slots, order, offsets, kept = places
        filled = smaller(tokens, spec.groups(tokens) * taken) * experts
        # A slice would bind a traced program to the numbers of tokens that it is shorter for.
        order = order.index_select(0, torch.arange(filled, device=order.device))
        places = (slots, order, offsets, kept)
    label = torch.zeros_like(picked[:, 0]) if problem.segment is None else problem.segment
    served = torch.zeros_like(counts).index_add(0, label, chosen.any(1).long())
    scores = (sums, totals, places[3], counts, margin)
    return routing_in_parts(problem, picked, gates.masked_fill(~chosen, 0.0), scores, places, served)


def _best_tokens(gates: Tensor, eligible: Tensor, count: int, group: int) -> Tensor:
    """(T, E) whether a token is among the `count` best of an expert in its group; ties by token."""
    values = gates.masked_fill(gates.isnan(), torch.finfo(gates.dtype).min).masked_fill(~eligible, -torch.inf)
    if count == 0 or values.numel() == 0:
        return torch.zeros_like(eligible)
    values = values.unflatten(0, (-1, group))
    kept = smaller(count, group)
    if torch.compiler.is_compiling():  # topk would bind the program to some numbers of tokens
        place = torch.full((1,), kept - 1, device=values.device)
        last = values.sort(dim=1, descending=True).values.index_select(1, place)
    else:  # topk may return any of equal scores: it is asked for the last value only
        last = values.topk(kept, dim=1).values[:, -1:]
    above, ties = values > last, (values == last) & (values > -torch.inf)
    return (above | (ties & (ties.cumsum(1) <= count - above.sum(1, keepdim=True)))).flatten(0, 1)
