"""expert_routing in plain PyTorch: any device, any floating dtype, O(T E) memory.

Every function takes what the operator of the same name in ops/expert_routing.py takes. All but `slots` are made of
differentiable operations, so that they also define the second derivative of every backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core.checks import accumulator
from ..core.ordered import segment_sums
from ..core.routing import GROUP_SCORES, SCORES, ScoreSpec, SlotSpec

# ---- Scores --------------------------------------------------------------------------------------------------------


def scores(
    logits: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    given: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    spec: Sequence[int],
    sigma: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (experts, gates, priority, sums, totals, choices, tokens, margin); see `Routing` and `Statistics`."""
    s = ScoreSpec(*spec)
    z, noisy, blocked, live = _logits(logits, noise, allowed, valid, sigma)
    gate = _gates(noisy, blocked, s)
    if given is None:
        experts = _choose(_keys(noisy, gate.detach(), blocked, bias, s), s.k)
    else:
        experts = given
    experts = experts.masked_fill(~live[:, None], -1)
    chosen = experts >= 0
    gates = gate.gather(1, experts.clamp_min(0)).masked_fill(~chosen, 0.0)
    priority = gates[:, 0].detach().clone()
    if s.renormalize:
        total = gates.sum(1, keepdim=True)
        gates = torch.where(total == 0, 0.0, gates / torch.where(total == 0, 1.0, total))
    label = torch.zeros_like(experts[:, 0]) if segment is None else segment
    log_p = _log_distribution(z, blocked, s)
    p = log_p.exp().masked_fill(blocked, 0.0)
    entropy = -(p * log_p.masked_fill(blocked, 0.0)).sum(1)
    lse = z.logsumexp(1)

    def summed(values: Tensor) -> Tensor:
        return segment_sums(values, torch.where(live, label, -1), s.segments)

    nothing = p.new_zeros((s.segments, p.shape[1]))
    of_noisy = (
        nothing if noise is None else summed(_log_distribution(noisy, blocked, s).exp().masked_fill(blocked, 0.0))
    )
    of_load = summed(_chance(z, noisy, experts, blocked, sigma)) if s.load else nothing
    sums = torch.stack([summed(p), of_noisy, of_load])
    totals = torch.stack([summed(lse.square()), summed(entropy)])
    cell = (label[:, None] * p.shape[1] + experts)[chosen]
    choices = torch.bincount(cell, minlength=nothing.numel()).view_as(nothing)
    best = p.detach().topk(min(2, p.shape[1]), dim=1).values
    margin = summed(best[:, 0] - best[:, 1] if best.shape[1] > 1 else best[:, 0])
    tokens = torch.bincount(label[live], minlength=s.segments)
    return experts, gates, priority, sums, totals, choices, tokens, margin


def scores_backward(
    logits: Tensor,
    noise: Tensor | None,
    bias: Tensor | None,
    allowed: Tensor | None,
    segment: Tensor | None,
    valid: Tensor | None,
    spec: Sequence[int],
    sigma: float,
    experts: Tensor,
    d_gates: Tensor,
    d_sums: Tensor,
    d_totals: Tensor,
) -> Tensor:
    """Gradient by the logits, in the accumulation dtype, of a total that is linear in the outputs of `scores`."""
    s = ScoreSpec(*spec)
    z, noisy, blocked, live = _logits(logits, noise, allowed, valid, sigma)
    label = torch.zeros_like(experts[:, 0]) if segment is None else segment
    d_p, d_noisy_p, d_chance = d_sums[:, label]
    d_lse_squared, d_entropy = d_totals[:, label, None]
    log_p = _log_distribution(z, blocked, s)
    p, log_p = log_p.exp().masked_fill(blocked, 0.0), log_p.masked_fill(blocked, 0.0)
    surprise = log_p - (p * log_p).sum(1, keepdim=True)
    gradient = (_through_softmax(p, d_p) - d_entropy * p * surprise) * _slope(z, blocked, s)
    gradient = gradient + 2 * d_lse_squared * z.logsumexp(1, keepdim=True) * z.softmax(1)

    gate = _gates(noisy, blocked, s)
    chosen, place = experts >= 0, experts.clamp_min(0)
    d_gates = d_gates.masked_fill(~chosen, 0.0)
    if s.renormalize:
        gates = gate.gather(1, place).masked_fill(~chosen, 0.0)
        total = gates.sum(1, keepdim=True)
        safe = torch.where(total == 0, 1.0, total)
        d_gates = (d_gates - (d_gates * gates / safe).sum(1, keepdim=True)) / safe
        d_gates = torch.where((total == 0) | ~chosen, 0.0, d_gates)
    d_gate = torch.zeros_like(gate).scatter_add(1, place, d_gates)
    if SCORES[s.score] == "sigmoid":
        gradient = gradient + d_gate * gate * (1 - gate)
    else:
        gradient = gradient + _through_softmax(gate, d_gate)
    if noise is not None:
        noisy_p = _log_distribution(noisy, blocked, s).exp().masked_fill(blocked, 0.0)
        gradient = gradient + _through_softmax(noisy_p, d_noisy_p) * _slope(noisy, blocked, s)
    if s.load:
        u, certain = _distance(z, noisy, experts, blocked, sigma)
        density = torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)
        part = (d_chance * density / sigma).masked_fill(blocked | certain, 0.0)
        # The threshold is a logit itself: that of the last choice.
        gradient = (gradient + part).scatter_add(1, place[:, -1:], -part.sum(1, keepdim=True))
    return gradient.masked_fill(blocked | ~live[:, None], 0.0)


def _through_softmax(p: Tensor, d_p: Tensor) -> Tensor:
    """Gradient by the logits of a softmax p."""
    return p * (d_p - (p * d_p).sum(1, keepdim=True))


def _slope(z: Tensor, blocked: Tensor, s: ScoreSpec) -> Tensor | float:
    """Derivative, by the logits, of what the softmax is taken of."""
    return (-z.masked_fill(blocked, 0.0)).sigmoid() if SCORES[s.score] == "sigmoid" else 1.0


def _logits(
    logits: Tensor, noise: Tensor | None, allowed: Tensor | None, valid: Tensor | None, sigma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits without and with noise, which experts a token must not choose, and which tokens are routed.

    What takes no part is replaced by 0, so that no -inf enters a derivative.
    """
    z = logits.to(accumulator(logits.dtype))
    blocked = z == -torch.inf
    if allowed is not None:
        blocked = blocked | ~allowed
    live = ~blocked.all(1)
    if valid is not None:
        live = live & valid
    z = torch.where(live[:, None], z, 0.0)
    blocked = blocked & live[:, None]
    noisy = z if noise is None else z + sigma * noise
    return z.masked_fill(blocked, -torch.inf), noisy.masked_fill(blocked, -torch.inf), blocked, live


def _log_distribution(z: Tensor, blocked: Tensor, s: ScoreSpec) -> Tensor:
    """The logarithm of a token's distribution over the experts."""
    if SCORES[s.score] == "sigmoid":
        z = logsigmoid(z.masked_fill(blocked, 0.0)).masked_fill(blocked, -torch.inf)
    return z.log_softmax(1)


def _gates(noisy: Tensor, blocked: Tensor, s: ScoreSpec) -> Tensor:
    """Scores of all experts, as combine weighs them."""
    if SCORES[s.score] == "sigmoid":
        return noisy.masked_fill(blocked, 0.0).sigmoid().masked_fill(blocked, 0.0)
    return noisy.softmax(1)


def _keys(noisy: Tensor, gate: Tensor, blocked: Tensor, bias: Tensor | None, s: ScoreSpec) -> Tensor:
    """What experts are chosen by: -inf for those that must not be, the lowest number for NaN."""
    # Logits are in the order of their scores, and have not been rounded once more.
    keys = noisy.detach() if bias is None and s.expert_groups == 1 else gate
    if bias is not None:
        keys = keys + bias
    keys = keys.masked_fill(keys.isnan(), torch.finfo(keys.dtype).min).masked_fill(blocked, -torch.inf)
    if s.expert_groups == 1:
        return keys
    of_group = keys.view(len(keys), s.expert_groups, keys.shape[1] // s.expert_groups)
    best = of_group.topk(min(2 if GROUP_SCORES[s.group_score] == "top2" else 1, of_group.shape[2]), dim=2).values
    value = best[..., 0] + (best[..., 1:].masked_fill(best[..., 1:] == -torch.inf, 0.0).sum(2))
    # Two experts with NaN must not make a group that has none.
    value = torch.where(best[..., 0] == -torch.inf, value, value.clamp_min(torch.finfo(value.dtype).min))
    kept = _choose(value, s.kept_groups)
    mask = torch.zeros_like(value, dtype=torch.bool).scatter(1, kept.clamp_min(0), kept >= 0)
    return of_group.masked_fill(~mask[:, :, None], -torch.inf).flatten(1)


def _choose(keys: Tensor, k: int) -> Tensor:
    """The k largest of each row, ties by index; -1 where the rest is -inf."""
    best = keys.argsort(dim=1, descending=True, stable=True)[:, :k]
    return best.masked_fill(keys.gather(1, best) == -torch.inf, -1)


def _chance(z: Tensor, noisy: Tensor, experts: Tensor, blocked: Tensor, sigma: float) -> Tensor:
    """Probability that an expert is above the last choice of a token when only its own noise is drawn again."""
    u, certain = _distance(z, noisy, experts, blocked, sigma)
    return torch.special.ndtr(u).masked_fill(certain, 1.0).masked_fill(blocked, 0.0)


def _distance(z: Tensor, noisy: Tensor, experts: Tensor, blocked: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """How far above the last choice logits are, in standard deviations of the noise; and whether all are chosen."""
    last = experts[:, -1:]
    threshold = noisy.gather(1, last.clamp_min(0))
    # With fewer eligible experts than choices, each of them is chosen for certain.
    certain = (last < 0).expand_as(blocked)
    return ((z - threshold) / sigma).masked_fill(blocked | certain, 0.0), certain


# ---- Slots ---------------------------------------------------------------------------------------------------------


def slots(
    experts: Tensor, priority: Tensor | None, segment: Tensor | None, spec: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (slots (T, k), order (R,), offsets (E + 1,), kept (S, E)); see `Routing`."""
    s = SlotSpec(*spec)
    tokens, k = experts.shape
    groups, rows = s.groups(tokens), s.rows(tokens, k)
    kept = experts >= 0
    position = torch.zeros_like(experts)
    if s.capacity >= 0:
        position = _positions(experts, priority, groups)
        kept = kept & (position < s.capacity)
    flat = kept.flatten().nonzero()[:, 0]
    expert = experts.flatten()[flat]
    if s.padded:
        group = flat // max(1, s.group_size * k)
        slot = (expert * groups + group) * s.capacity + position.flatten()[flat]
        offsets = torch.arange(s.experts + 1, device=experts.device) * (groups * s.capacity)
    else:
        flat = flat[expert.argsort(stable=True)]
        slot = torch.arange(len(flat), device=experts.device)
        counts = torch.bincount(expert, minlength=s.experts)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    places = torch.full_like(experts, -1, memory_format=torch.contiguous_format)
    places.view(-1)[flat] = slot
    order = torch.full((rows,), -1, dtype=torch.int64, device=experts.device)
    order[slot] = flat
    label = torch.zeros_like(experts[:, 0]) if segment is None else segment
    cell = (label[:, None] * s.experts + experts)[kept]
    table = torch.bincount(cell, minlength=s.segments * s.experts).view(s.segments, s.experts)
    return places, order, offsets, table


def _positions(experts: Tensor, priority: Tensor | None, groups: int) -> Tensor:
    """How many choices of the same expert in the same group come before each.

    All first choices come before all second choices, and among those tokens come by priority, NaN last, then in order.
    """
    tokens, k = experts.shape
    size = tokens // max(groups, 1)
    if priority is None:
        turn = torch.arange(size, device=experts.device).expand(groups, size)
    else:
        priority = priority.masked_fill(priority.isnan(), -torch.inf)
        turn = priority.reshape(groups, size).argsort(dim=1, descending=True, stable=True)
    # The choices of a group in their order, as places in a group's (size, k).
    place = (turn[:, None, :] * k + torch.arange(k, device=experts.device)[:, None]).flatten(1)
    ordered = experts.reshape(groups, size * k).gather(1, place)
    by_expert = ordered.argsort(dim=1, stable=True)
    grouped = ordered.gather(1, by_expert)
    index = torch.arange(size * k, device=experts.device).expand_as(grouped)
    is_first = torch.ones_like(grouped, dtype=torch.bool)
    is_first[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    first = torch.where(is_first, index, 0).cummax(1).values if grouped.numel() > 0 else index
    position = torch.empty_like(grouped).scatter_(1, by_expert, index - first)
    return torch.empty_like(position).scatter_(1, place, position).view(tokens, k)


# ---- Moving rows ---------------------------------------------------------------------------------------------------


def dispatch(tokens: Tensor, gates: Tensor | None, slots: Tensor, order: Tensor) -> Tensor:
    """(R, D): each row the token that it was given to, times its gate if there are gates; 0 where there is none."""
    empty, choice = order < 0, order.clamp_min(0)
    if not len(tokens):
        return tokens.new_zeros((len(order), tokens.shape[1]))
    rows = tokens[choice // slots.shape[1]]
    if gates is not None:
        rows = rows.to(accumulator(tokens.dtype)) * gates.flatten()[choice, None]
    return rows.masked_fill(empty[:, None], 0.0).to(tokens.dtype)


def combine(rows: Tensor, gates: Tensor | None, slots: Tensor, order: Tensor) -> Tensor:
    """(T, D): each token's rows, times their gates if there are gates, summed in the order of its choices."""
    dtype = accumulator(rows.dtype)
    total = rows.new_zeros((len(slots), rows.shape[1]), dtype=dtype)
    for j in range(slots.shape[1]):
        taken = _taken(rows, slots[:, j])
        # A gate that is NaN must not come back where the choice was dropped.
        weight = None if gates is None else gates[:, j].masked_fill(slots[:, j] < 0, 0.0)
        total = total + (taken if weight is None else taken * weight[:, None])
    return total.to(rows.dtype)


def dots(tokens: Tensor, rows: Tensor, slots: Tensor, order: Tensor) -> Tensor:
    """(T, k): inner product of each token with each of its rows, 0 where it has none."""
    wide = tokens.to(accumulator(tokens.dtype))
    columns = [
        (wide * _taken(rows, slots[:, j])).sum(1).masked_fill(slots[:, j] < 0, 0.0) for j in range(slots.shape[1])
    ]
    return torch.stack(columns, 1) if columns else wide.new_zeros((len(tokens), 0))


def _taken(rows: Tensor, slot: Tensor) -> Tensor:
    """The rows at some slots, in the accumulation dtype; 0 where a slot is -1, whatever the rows hold."""
    dtype = accumulator(rows.dtype)
    if not len(rows):
        return rows.new_zeros((len(slot), rows.shape[1]), dtype=dtype)
    return rows[slot.clamp_min(0)].to(dtype).masked_fill((slot < 0)[:, None], 0.0)
