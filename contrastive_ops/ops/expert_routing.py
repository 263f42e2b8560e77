"""Routing of tokens to experts: which experts, with which gate, in which place, and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import checks, cuda_kernels, eager, extension, triton_kernels
from ..core.backends import NEVER_ON_A_DEVICE, Backend, choose, enrol, unsupported_by_cpu
from ..core.operators import call
from ..core.recompute import must_reach
from ..core.results import pytree
from ..reference import expert_routing as reference
from ._expert_routing_autograd import IN_CPP, InParts, Whole, register
from .gating import DEFAULT, Capacity, Gating, RouterProblem, plan_of, router_problem
from .router_losses import RouterLoss, Statistics, encode, summary
from .router_losses import keys as loss_keys

# One hop to every implementation; each offers route, route_backward, scores, scores_backward, slots, dispatch, combine
# and dots.
BACKENDS = enrol(
    "expert_routing",
    {
        "reference": Backend(
            source="contrastive_ops/reference/expert_routing.py",
            functions=functools.cache(lambda: InParts(reference)),
            unsupported=lambda x: [],
        ),
        "cpu": Backend(
            source="csrc/cpu/expert_routing.cpp",
            functions=functools.cache(lambda: extension.functions("expert_routing")),
            unsupported=unsupported_by_cpu,
        ),
        "triton": Backend(
            source="kernels/expert_routing.py",
            functions=functools.cache(lambda: InParts(triton_kernels.functions("expert_routing"))),
            unsupported=triton_kernels.unsupported,
        ),
        "cuda": Backend(
            source="csrc/cuda/expert_routing.cu",
            functions=functools.cache(lambda: Whole(cuda_kernels.functions("expert_routing"))),
            unsupported=cuda_kernels.unsupported,
            by_name=NEVER_ON_A_DEVICE,
        ),
    },
)

register(BACKENDS)


@pytree
@dataclass(frozen=True, eq=False)
class Routing:
    """Where every token goes. T tokens, k choices, E experts, R rows of dispatched tokens, S segments.

    Attributes:
        experts: (T, k) int64, best first; -1 where a token has fewer choices.
        gates: (T, k) their weights in `combine`, whether kept or not; float32 (float64 for float64 logits).
            Differentiable.
        slots: (T, k) int64 the row of the dispatched tokens that each choice has; -1 where it is dropped.
        order: (R,) int64 the choice ``token * k + j`` that each row has; -1 where it is empty.
        offsets: (E + 1,) int64: expert e has the rows from ``offsets[e]`` to ``offsets[e + 1]``.
        losses: of each `RouterLoss` by name, (S,), or (1,) where it is pooled, as "pooled NAME" where the same is
            wanted by segment, too. Differentiable.
        loss: 0-d, their weighted total.
        sums: and `counts`, numbers over the tokens of each segment that `metrics` are made of.
        counts: see `sums`.
        served: (S,) int64, tokens that have an expert, where experts choose.
    """

    experts: Tensor
    gates: Tensor
    slots: Tensor
    order: Tensor
    offsets: Tensor
    losses: dict[str, Tensor]
    loss: Tensor
    sums: Tensor
    counts: Tensor
    served: Tensor | None = None

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Numbers to log, without gradients, computed when they are first read.

        Of each segment, (S,): "tokens"; "choices" (S, E), how often each expert was chosen; "success_rate", the share
        of choices that were kept; "load" (S, E), each expert's share of the choices; "entropy", mean over tokens, in
        nats; "effective_experts", exp of the entropy of the mean probabilities; "top1_margin", mean difference of the
        two largest probabilities. And 0-d: "mutual_information" of segment and chosen expert in nats,
        "normalized_mutual_information", the same over the smaller of their entropies. NaN where a segment has no
        tokens.
        """
        found: dict[str, Tensor] | None = self.__dict__.get("_metrics")
        if found is None:
            with torch.no_grad():
                statistics = Statistics.unpack(self.sums, self.counts, self.offsets.shape[0] - 1, noise=False)
                found = statistics.metrics(self.served)
            if not torch.compiler.is_compiling():  # a traced program computes once what it reads twice
                self.__dict__["_metrics"] = found
        return found

    @property
    def kept(self) -> Tensor:
        """(T, k) bool, which choices are not dropped."""
        return self.slots >= 0

    @classmethod
    def from_choices(cls, experts: Tensor, gates: Tensor, num_experts: int, *, backend: str = "auto") -> Routing:
        """The routing of choices that a router of your own made; nothing is dropped.

        Equivalent to, with the choices of no expert at the end::

            order = torch.where(experts < num_experts, experts, num_experts).flatten().argsort(stable=True)

        Args:
            experts: (T, k) int64, the experts of each token, each at most once; what is not in [0, num_experts) is no
                choice.
            gates: (T, k) their weights in `combine`; float32 (others are cast to it, but float64). Differentiable.
            num_experts: E.
            backend: "auto", "reference", "cpu", "triton" or "cuda".

        Returns:
            `Routing` of one segment without losses. Metrics that need probabilities are NaN.

        Raises:
            ValueError, TypeError: shapes and dtypes that do not fit.

        Examples:
            >>> experts, gates = torch.tensor([[1, 0], [2, 1]]), torch.full((2, 2), 0.5)
            >>> routing = Routing.from_choices(experts, gates, 3)
            >>> routing.offsets.tolist(), routing.order.tolist()
            ([0, 1, 3, 4], [1, 0, 3, 2])
        """
        function = "Routing.from_choices"
        count = checks.integer(function, "num_experts", num_experts, 1)
        checks.check_matrix(function, "gates", gates)
        experts = checks.as_index(function, "experts", experts)
        if experts.shape != gates.shape:
            raise ValueError(
                f"{function}: experts must have the shape of gates, {checks.shape(gates)}, got {checks.shape(experts)}"
            )
        checks.check_device(function, "experts", experts, "gates", gates)
        gates = gates.to(checks.accumulator(gates.dtype))
        chosen = torch.where((experts >= 0) & (experts < count), experts, -1)
        spec = [count, experts.shape[0], -1, 0, 1]
        chooser = choose(function, BACKENDS, gates, backend)
        slots, order, offsets, kept = call.expert_routing_slots(chosen, None, None, spec, chooser)
        unknown = gates.new_full((3 * count + 3,), torch.nan)
        counts = torch.cat([kept.flatten(), kept.flatten(), (chosen >= 0).any(1).sum(0, keepdim=True)])
        zero = gates.new_zeros(())
        return cls(chosen, gates, slots, order, offsets, {}, zero, unknown, counts)


def route(
    logits: Tensor,
    k: int = 1,
    *,
    capacity: int | float | Capacity | None = None,
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
) -> Routing:
    """Choose k experts for every token and a place for every choice.

    Equivalent to, with C slots of each expert and for one group of tokens::

        p = logits.softmax(1)                                            # in float32
        gates, experts = p.topk(k)                                       # not renormalised
        order = gates[:, 0].argsort(descending=True, stable=True)        # priority="gate"; or torch.arange(T)
        position, taken = torch.empty_like(experts), [0] * E
        for j in range(k):                                               # all first choices, then all second ones
            for t in order:
                position[t, j] = taken[experts[t, j]]
                taken[experts[t, j]] += 1                                # also where the choice is dropped
        kept = position < C

    Args:
        logits: (T, E) float32, bfloat16, float16 or float64. An expert whose logit is -inf is never chosen.
        k: choices of a token.
        capacity: an int, tokens that an expert takes; a float, a factor of its fair share k T / E, rounded up; or
            `Capacity`, which also has groups and the padded layout. None drops nothing. 0 drops everything.
        priority: who is kept where more want an expert than it takes: "gate", tokens by the score of their first choice
            (Batch Priority Routing); or "position", those that come first. In causal models a token must not depend on
            those after it: with "gate" and a capacity it does, and with "position" and k > 1, where first choices of
            later tokens come before second ones. Without a capacity, or with "position", k = 1 and a capacity that is
            an int, nothing depends on later tokens.
        gating: scores, noise, renormalisation, bias and groups of experts; see `Gating`.
        segments: (T,) int64 the segment of each token, such as its modality, tower or language. Losses and metrics are
            per segment; priority and capacity do not look at it.
        num_segments: S; by default one more than the largest label, which reads the data.
        valid: (T,) bool; padding is not routed and counts nowhere, whatever its logits, noise, segment and experts are.
        allowed: (T, E) bool, the experts that a token may choose, to which its probabilities are restricted; or (T, k)
            int64, the experts it is given, -1 for none, each once: one that is named again is left out. A row with
            fewer experts than k has -1 and gate 0 in the rest.
        losses: names, or `RouterLoss` with weights and thresholds.
        generator: for the noise and what is ``sampled``; by default torch's own.
        noise: (T, E) normal numbers to use instead of drawing them, such as those of an earlier pass over the same
            tokens that must take the same decisions.
        backend: "auto", "reference", "cpu", "triton" or "cuda", which is taken by name only: its kernels have not run
            on a device.

    Returns:
        `Routing`.

    Raises:
        ValueError: arguments that do not fit: k above the number of experts, "load" without noise, segments out of
            range.
        TypeError: dtypes that do not fit.
        NotImplementedError: an explicit backend that cannot run these inputs.

    Note:
        Order of choices: score descending, then expert ascending; equal gates keep the order of tokens. The experts of
        a token differ also where logits are NaN: a NaN comes after every number, and makes gates and losses NaN.
        Nothing depends on the number of threads. One pass over the logits forward, and one backward, whichever losses
        are asked for; memory O(T k + S E), and T E for noise. No state is kept: losses survive recomputation and
        chunked training steps. A token without an expert to choose is left out like one that is not valid.

    Source:
        Riquelme et al., Scaling Vision with Sparse Mixture of Experts, 2021, for choices, priority, importance and
        load; Mustafa et al., Multimodal Contrastive Learning with LIMoE, 2022, for the entropy losses; Fedus et al.,
        Switch Transformers, 2022; Zoph et al., ST-MoE, 2022, for the z-loss.

    Examples:
        >>> logits, is_text = torch.randn(12, 4), torch.arange(12) % 3
        >>> losses = ["importance", RouterLoss("global_entropy", weight=[0.0, 0.1, 0.1], threshold=1.0)]
        >>> routing = route(logits, 2, capacity=1.25, segments=is_text, num_segments=3, losses=losses)
        >>> routing.experts.shape, routing.losses["importance"].shape, routing.metrics["success_rate"].shape
        (torch.Size([12, 2]), torch.Size([3]), torch.Size([3]))
    """
    function = "route"
    given = (segments, num_segments, valid, allowed, generator, noise)
    usual = gating is DEFAULT and all(each is None for each in given)
    if usual and (found := _in_cpp(logits, k, capacity, priority, losses, backend)) is not None:
        return found
    asked = (k, priority, gating, segments, num_segments, valid, allowed, losses, generator, noise)
    k, limits, problem = router_problem(function, logits, capacity, *asked)
    taken, group = limits.slots(function, logits.shape[0], logits.shape[1], k)
    backend = choose(function, BACKENDS, logits, backend)
    places = [logits.shape[1], group, taken, int(limits.padded), problem.segments]
    by_gate = priority == "gate" and taken >= 0
    encoded = encode(problem.losses)
    arguments = problem.arguments(k)
    if encoded is not None and problem.chances is None:
        return as_routing(problem, call.expert_routing_route(*arguments, places, by_gate, *encoded, backend))
    chosen, gates, first, *scores = call.expert_routing_scores(*arguments, backend)
    first = first if by_gate else None
    found = call.expert_routing_slots(problem.kept_by_chance(chosen, gates), first, problem.segment, places, backend)
    return routing_in_parts(problem, chosen, gates, scores, found)


def _in_cpp(logits: Any, k: Any, capacity: Any, priority: Any, losses: Any, backend: Any) -> Routing | None:
    """`route` of usual options past Python (csrc/eager_route.h), or None: what they come to is worked out once."""
    plain = isinstance(losses, (tuple, list)) and type(k) is int and type(capacity) in (type(None), int, float)
    if IN_CPP is None or not plain or torch.compiler.is_compiling() or not eager.is_open():
        return None
    checks.check_matrix("route", "logits", logits)
    if not (type(logits) is Tensor or type(logits) is torch.nn.Parameter) or type(logits.shape[0]) is not int:
        return None
    try:
        problem, *arguments = plan_of(*logits.shape, k, capacity, priority, *losses)
    except TypeError:  # of weights in lists, which may change, or of what does not fit
        return None
    found = IN_CPP(logits, None, None, None, None, None, None, *arguments, backend)
    return None if found is None else as_routing(problem, found)


def as_routing(problem: RouterProblem, outputs: Sequence[Tensor], served: Tensor | None = None) -> Routing:
    """What the operator returned by name."""
    experts, gates, slots, order, offsets, values, total, sums, counts = outputs
    if problem.gating.renormalize and experts.shape[1] == 1:
        gates = torch.where(gates.isnan(), gates, (experts >= 0).to(gates.dtype))
    losses: dict[str, Tensor] = {}
    if problem.losses:
        parts = values.split([1 if loss.pooled else problem.segments for loss in problem.losses])
        losses = dict(zip(loss_keys(problem.losses), parts, strict=True))
        must_reach(problem.function, (*parts, total))
    return Routing(experts, gates, slots, order, offsets, losses, total, sums, counts, served)


def routing_in_parts(
    problem: RouterProblem,
    experts: Tensor,
    gates: Tensor,
    scores: Sequence[Tensor],
    places: Sequence[Tensor],
    served: Tensor | None = None,
) -> Routing:
    """The same of separate operators: experts that choose tokens, or losses whose weights are in tensors."""
    *placed, kept = places
    values, total, sums, counts = summary(scores, kept, problem.losses, problem.noise is not None)
    return as_routing(problem, (experts, gates, *placed, values, total, sums.detach(), counts), served)


def dispatch(tokens: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
    """Copy every token to its rows.

    Equivalent to::

        rows = tokens[routing.order // k]
        rows[routing.order < 0] = 0

    Args:
        tokens: (T, D) float32, bfloat16, float16 or float64. Differentiable.
        routing: of the same T tokens.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        (R, D) in the dtype of `tokens`, grouped by expert: those of expert e are the rows from ``routing.offsets[e]``
        to ``routing.offsets[e + 1]``. Rows of no token are 0.

    Raises:
        ValueError, TypeError, NotImplementedError: inputs that do not fit.

    Note:
        Reads and writes each row once; the gradient of a token is summed in the order of its choices, in float32.

    Examples:
        >>> tokens, routing = torch.randn(12, 8), route(torch.randn(12, 4), 2)
        >>> torch.equal(dispatch(tokens, routing)[routing.slots[5, 1]], tokens[5])
        True
    """
    check_rows("dispatch", "tokens", tokens, routing.slots.shape[0], routing)
    chosen = choose("dispatch", BACKENDS, tokens, backend)
    return call.expert_routing_dispatch(tokens, None, routing.slots, routing.order, chosen)


def combine(rows: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
    """Sum every token's rows, weighted by their gates.

    Equivalent to::

        taken = rows[routing.slots].masked_fill((routing.slots < 0)[:, :, None], 0)
        (routing.gates[:, :, None] * taken).sum(1)

    Args:
        rows: (R, D) in the layout of `dispatch`. Differentiable, and so are ``routing.gates``.
        routing: that the tokens were dispatched by.
        backend: "auto", "reference", "cpu", "triton" or "cuda".

    Returns:
        (T, D) in the dtype of `rows`, summed in float32 (float64 for float64) in the order of choices. A token whose
        choices were all dropped is 0.

    Raises:
        ValueError, TypeError, NotImplementedError: inputs that do not fit.

    Note:
        Reads each row once and writes each token once; never a (T, k, D) tensor. Rows of no token are not read.

    Examples:
        >>> tokens, routing = torch.randn(12, 8), route(torch.randn(12, 4), 2)
        >>> out = combine(dispatch(tokens, routing), routing)
        >>> torch.allclose(out, tokens * routing.gates.sum(1, keepdim=True), atol=1e-6)
        True
    """
    check_rows("combine", "rows", rows, routing.order.shape[0], routing)
    gates = routing.gates.to(checks.accumulator(rows.dtype))
    chosen = choose("combine", BACKENDS, rows, backend)
    return call.expert_routing_combine(rows, gates, routing.slots, routing.order, chosen)


def check_rows(function: str, name: str, rows: Tensor, size: int, routing: Routing) -> None:
    """`rows` must be a matrix of `size` rows where the routing is."""
    checks.check_matrix(function, name, rows)
    if rows.shape[0] != size:
        raise ValueError(f"{function}: {name} must have {size} rows as the routing has, got {checks.shape(rows)}")
    checks.check_device(function, "routing", routing.slots, name, rows)
