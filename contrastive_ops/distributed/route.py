"""Routing of the tokens of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..core import checks
from ..core.backends import choose
from ..core.operators import call
from ..ops import Capacity, Gating, RouterLoss, Routing
from ..ops.expert_routing import BACKENDS, routing_in_parts
from ..ops.gating import DEFAULT, RouterProblem, router_problem
from ._agreement import Agreement
from ._collectives import gather_rows, sum_over_ranks
from ._groups import Group, Shards, Team, find_team, local_tensor

CAPACITY_OVER = ("group", "rank")
# In the order in which `router_problem` takes them.
LABELS = ("segments", "num_segments", "valid", "allowed", "losses", "generator", "noise")


def route(
    logits: Tensor,
    k: int = 1,
    *,
    capacity: int | float | Capacity | None = None,
    capacity_over: str = "group",
    priority: str = "gate",
    gating: Gating = DEFAULT,
    segments: Tensor | None = None,
    num_segments: int | None = None,
    valid: Tensor | None = None,
    allowed: Tensor | None = None,
    losses: Sequence[str | RouterLoss] = (),
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
    backend: str = "auto",
    group: Group = None,
    check: bool = True,
) -> Routing:
    """`ops.route` of the tokens of all ranks: choices and places of this rank's, losses and metrics of all.

    Equivalent to::

        whole = ops.route(all_gather(logits), k, ...)                    # with gradients
        experts, gates, kept = (each[tokens of this rank] for each in (whole.experts, whole.gates, whole.kept))
        losses, metrics = whole.losses, whole.metrics                    # the same on all ranks

    Args:
        logits: (T, E) of this rank's tokens; E and dtype are those of all ranks. A DTensor that is Shard(0) names its
            mesh.
        k: as in `ops.route`.
        capacity: as in `ops.route`, of the tokens that ``capacity_over`` says. Not padded over a group.
        capacity_over: an expert takes tokens of the "group", by priority wherever they are, as in V-MoE; or of each
            "rank", of whose tokens a factor is a share.
        priority: as in `ops.route`; tokens are counted over all ranks, one rank after another.
        gating: as in `ops.route`, the same on all ranks.
        segments: (T,) int64 of this rank's tokens, with ``num_segments``.
        num_segments: S.
        valid: (T,) of this rank's tokens; ``allowed``, ``generator`` and ``noise`` too.
        allowed: (T, E), or (T, k).
        losses: as in `ops.route`, of the tokens of all ranks.
        generator: for the noise, which ranks must draw differently.
        noise: (T, E).
        backend: as in `ops.route`.
        group: as in `clip`; ``check`` too.
        check: compare shapes, dtypes and options of all ranks first.

    Returns:
        `Routing`: ``slots``, ``order`` and ``offsets`` are those of this rank's rows. The gradient of a sum over ranks
        of what is computed from it is that of one process, where each rank adds ``loss``: so W times that of one loss,
        which the mean over ranks of gradients, as DDP and FSDP take it, makes that of one.

    Raises:
        ValueError, TypeError, NotImplementedError: as `ops.route`; what one rank raises, or has else than the others,
            is raised on every rank.
        RuntimeError: a rank has ended, or does not take part before the group's timeout.

    Note:
        Sums of 3 S (E + 1) numbers travel, and over a group with a capacity 4 k + 4 bytes of each token of all ranks,
        which each rank puts in order. Same bits for the same logits on any number of ranks, but for losses, whose sums
        are rounded once for each rank.
    """
    function = "route"
    team = find_team(function, group, logits)
    logits = local_tensor(logits)
    asked: dict[str, Any] = {"priority": priority, "gating": gating, "segments": segments}
    asked |= {"num_segments": num_segments, "valid": valid, "allowed": allowed, "losses": losses}
    asked |= {"generator": generator, "noise": noise}
    if team is None:
        return ops.route(logits, k, capacity=capacity, backend=backend, **asked)
    asked |= {"capacity": capacity, "backend": backend}
    return route_agreed(function, team, lambda: (logits, asked), k, capacity_over, check)


def route_agreed(
    function: str,
    team: Team,
    asked: Callable[[], tuple[Tensor, dict[str, Any]]],
    k: int,
    capacity_over: str,
    check: bool,
) -> Routing:
    """`route`, where what raises in `asked`, which gives logits and options, is raised on all ranks."""
    with Agreement(function, team, check) as agreed:
        logits, given = asked()
        checks.check_choice(function, "capacity_over", capacity_over, CAPACITY_OVER)
        if given["segments"] is not None and given["num_segments"] is None:
            raise ValueError(f"{function}: num_segments must be given with segments where ranks share sums, got None")
        labels = [given.get(name) for name in LABELS]
        k, limits, problem = router_problem(
            function, logits, given["capacity"], k, given["priority"], given["gating"], *labels
        )
        if limits.padded and capacity_over == "group":
            raise NotImplementedError(
                f'{function}: capacity must not be padded with capacity_over="group", got {limits}\n'
                '  rows of a rank are no fixed share of those of all; leave out padded, or take capacity_over="rank"'
            )
        shared = {"k": k, "capacity": limits, "capacity_over": capacity_over, "priority": given["priority"]}
        shared |= {"segments": problem.segments, "losses": [loss.name for loss in problem.losses]}
        agreed.compare(logits, logits, noise=given.get("noise"), **shared)
        backend = choose(function, BACKENDS, logits, given["backend"])
        chosen, gates, first, *scores = call.expert_routing_scores(*problem.arguments(k), backend)
        taking = problem.kept_by_chance(chosen, gates)
        if capacity_over == "rank":
            taken, size = limits.slots(function, logits.shape[0], logits.shape[1], k)
    if capacity_over == "group":
        taken, size = limits.slots(function, agreed.rows.total, logits.shape[1], k)
    places = [logits.shape[1], size if taken >= 0 else logits.shape[0], taken, int(limits.padded), problem.segments]
    priorities = first if given["priority"] == "gate" and taken >= 0 else None
    if capacity_over == "rank" or taken < 0:
        found = call.expert_routing_slots(taking, priorities, problem.segment, places, backend)
    else:
        found = _slots_of_group(problem, taking, priorities, places, agreed.rows, backend)
    *places_of_rows, kept = found
    *scores, kept = _sums_of_all([*scores, kept], team)
    return routing_in_parts(problem, chosen, gates, scores, (*places_of_rows, kept))


def _slots_of_group(
    problem: RouterProblem, chosen: Tensor, priorities: Tensor | None, places: list[int], tokens: Shards, backend: str
) -> list[Tensor]:
    """What `slots` returns of this rank's choices: those that are kept among the choices of all ranks."""
    every = gather_rows(chosen.to(torch.int32), tokens).to(torch.int64)
    first = None if priorities is None else gather_rows(priorities, tokens)
    slots, *_ = call.expert_routing_slots(every, first, None, [*places[:4], 1], backend)
    kept = slots[tokens.offset : tokens.offset + tokens.local] >= 0
    experts, _, _, padded, segments = places
    here = [experts, tokens.local, -1, padded, segments]
    return list(call.expert_routing_slots(torch.where(kept, chosen, -1), None, problem.segment, here, backend))


def _sums_of_all(parts: Sequence[Tensor], team: Team) -> list[Tensor]:
    """Sums over the tokens of all ranks, from those of this rank's: numbers of one kind travel together."""
    found = list(parts)
    for floating in (True, False):
        which = [place for place, part in enumerate(parts) if part.is_floating_point() == floating]
        total = sum_over_ranks(torch.cat([parts[place].flatten() for place in which]), team)
        for place, part in zip(which, total.split([parts[place].numel() for place in which]), strict=True):
            found[place] = part.view_as(parts[place])
    return found
