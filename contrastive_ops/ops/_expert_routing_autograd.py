"""torch.library operators of expert_routing: schema, fake, autograd.

`route` is a whole router: scores, slots and losses. `scores`, its derivative `scores_backward`, and `slots`, which has
none, are its parts, for experts that choose tokens in between and for second derivatives.
`dispatch`, `combine` and `dots` move rows; the derivatives of each are the others, so that they can be differentiated
any number of times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import autocast, eager
from ..core.backends import Backend
from ..core.checks import accumulator
from ..core.declarations import backend_function
from ..core.derivatives import alias, grad
from ..core.operators import call, define
from ..core.routing import ScoreSpec, SlotSpec
from ..reference import expert_routing as reference
from .router_losses import Statistics, decode, summary

_GIVEN = "Tensor logits, Tensor? noise, Tensor? bias, Tensor? allowed"
_RULES = "Tensor? segment, Tensor? valid, SymInt[] spec, float sigma"
_SCORES = (
    f"({_GIVEN}, Tensor? given, {_RULES}, str backend) -> (Tensor experts, Tensor gates, Tensor priority,"
    " Tensor sums, Tensor totals, Tensor choices, Tensor tokens, Tensor margin)"
)
_SCORES_BACKWARD = (
    f"({_GIVEN}, {_RULES}, Tensor experts, Tensor d_gates, Tensor d_sums, Tensor d_totals, str backend)"
    " -> Tensor dlogits"
)
_LOSSES = "int[] losses, float[] numbers"
_ROUTE = (
    f"({_GIVEN}, Tensor? given, {_RULES}, SymInt[] places, bool by_gate, {_LOSSES}, str backend) -> (Tensor experts,"
    " Tensor gates, Tensor slots, Tensor order, Tensor offsets, Tensor values, Tensor total, Tensor sums,"
    " Tensor counts)"
)
_ROUTE_BACKWARD = (
    f"({_GIVEN}, {_RULES}, {_LOSSES}, Tensor experts, Tensor sums, Tensor counts, Tensor? d_gates, Tensor? d_values,"
    " Tensor? d_total, str backend) -> Tensor dlogits"
)
_SLOTS = (
    "(Tensor experts, Tensor? priority, Tensor? segment, SymInt[] spec, str backend)"
    " -> (Tensor slots, Tensor order, Tensor offsets, Tensor kept)"
)
_DISPATCH = "(Tensor tokens, Tensor? gates, Tensor slots, Tensor order, str backend) -> Tensor rows"
_COMBINE = "(Tensor rows, Tensor? gates, Tensor slots, Tensor order, str backend) -> Tensor tokens"
_DOTS = "(Tensor tokens, Tensor rows, Tensor slots, Tensor order, str backend) -> Tensor dots"


def register(backends: Mapping[str, Backend]) -> None:
    """Define the operators; `backends` says where each backend's functions are."""
    for name, schema, fake, setup, derivative in (
        ("route", _ROUTE, _route_fake, _route_setup, _route_derivative),
        ("route_backward", _ROUTE_BACKWARD, _route_backward_fake, None, None),
        ("scores", _SCORES, _scores_fake, _scores_setup, _scores_derivative),
        ("scores_backward", _SCORES_BACKWARD, _backward_fake, _backward_setup, _backward_derivative),
        ("slots", _SLOTS, _slots_fake, None, None),
        ("dispatch", _DISPATCH, _dispatch_fake, _moved_setup, _dispatch_derivative),
        ("combine", _COMBINE, _combine_fake, _moved_setup, _combine_derivative),
        ("dots", _DOTS, _dots_fake, _dots_setup, _dots_derivative),
    ):
        function = backend_function(backends, name)
        function = _as_logits(function) if name == "route_backward" else function
        in_cpp = IN_CPP if name == "route" else None
        define(f"expert_routing_{name}", schema, function, fake, setup, derivative, in_cpp)


class InParts:
    """The functions of a backend, and `route` and its derivative made of them."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)

    def route(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Scores, slots and losses."""
        *problem, places, by_gate, losses, numbers = arguments
        noise, segment = problem[1], problem[5]
        experts, gates, first, *scores = self._functions.scores(*problem)
        *placed, kept = self._functions.slots(experts, first if by_gate else None, segment, places)
        return experts, gates, *placed, *summary(scores, kept, decode(losses, numbers), noise is not None)

    def route_backward(self, *arguments: Any) -> Tensor:
        """The gradient by the logits, in the accumulation dtype."""
        *problem, losses, numbers, experts, sums, counts, d_gates, d_values, d_total = arguments
        logits, noise = problem[:2]
        if d_gates is None:
            d_gates = sums.new_zeros(experts.shape)
        statistics = Statistics.unpack(sums, counts, logits.shape[1], noise is not None)
        slopes = statistics.slopes(decode(losses, numbers), d_values, d_total)
        gradient: Tensor = self._functions.scores_backward(*problem, experts, d_gates, *slopes)
        return gradient


class Whole(InParts):
    """The same of a backend that has kernels for a whole router, but returns None where they have no room."""

    def route(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Scores, slots and losses."""
        found: tuple[Tensor, ...] | None = self._functions.route(*arguments)
        return super().route(*arguments) if found is None else found

    def route_backward(self, *arguments: Any) -> Tensor:
        """The gradient by the logits, in their dtype or in the accumulation dtype."""
        found: Tensor | None = self._functions.route_backward(*arguments)
        return super().route_backward(*arguments) if found is None else found


# ---- route ---------------------------------------------------------------------------------------------------------


def _as_logits(function: Any) -> Any:
    """The gradient in the dtype of the logits: some backends write it so, others in the accumulation dtype."""

    def run(logits: Tensor, *arguments: Any) -> Tensor:
        gradient: Tensor = function(logits, *arguments)
        return gradient.to(logits.dtype)

    return run


def _route_fake(*arguments: Any) -> tuple[Tensor, ...]:
    *problem, places, _, losses, _, backend = arguments
    experts, gates, _, sums, totals, *_ = _scores_fake(*problem, backend)
    slots, order, offsets, kept = _slots_fake(experts, None, None, places, backend)
    segments = kept.shape[0]
    values = gates.new_empty((sum(1 if pooled else segments for pooled in losses[1::4]),))
    floating = gates.new_empty((sums.numel() + totals.numel() + segments,))
    integers = experts.new_empty((2 * kept.numel() + segments,))
    return experts, gates, slots, order, offsets, values, gates.new_empty(()), floating, integers


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, noise, bias, allowed, _, segment, valid, spec, sigma, _, _, losses, numbers, backend = inputs
    experts, _, slots, order, offsets, values, total, sums, counts = output
    ctx.save_for_backward(logits, noise, bias, allowed, segment, valid, experts, sums, counts)
    ctx.set_materialize_grads(False)
    ctx.rules, ctx.backend = (spec, sigma, losses, numbers), backend
    constant = () if losses else (values, total)
    ctx.mark_non_differentiable(experts, slots, order, offsets, sums, counts, *constant)


def _route_derivative(ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
    _, d_gates, _, _, _, d_values, d_total, *_ = d_outputs
    upstream = (d_gates, d_values, d_total)
    if all(d is None for d in upstream):
        return (None,) * 14
    spec, sigma, losses, numbers = ctx.rules
    gradient = _gradient(ctx.saved_tensors, spec, sigma, losses, numbers, upstream, ctx.backend)
    return (gradient, *(None,) * 13)


def _gradient(
    tensors: Sequence[Any],
    spec: Any,
    sigma: float,
    losses: list[int],
    numbers: list[float],
    upstream: tuple[Any, ...],
    backend: str = "cpu",
) -> Any:
    """The gradient by the logits; under grad mode, as a function of them and of what comes from upstream."""
    *problem, experts, sums, counts = tensors
    logits, noise, bias, allowed, segment, valid = problem
    if not torch.is_grad_enabled():
        return call.expert_routing_route_backward(
            *problem, spec, sigma, losses, numbers, experts, sums, counts, *upstream, backend
        )
    # By the operators of the parts, which have a derivative.
    with autocast.disabled(logits):
        leaf = alias(logits)
        _, gates, _, *scores = call.expert_routing_scores(
            leaf, noise, bias, allowed, experts, segment, valid, spec, sigma, backend
        )
        values, total, *_ = summary(scores, scores[2], decode(losses, numbers), noise is not None)
        pairs = [(output, d) for output, d in zip((gates, values, total), upstream, strict=True) if d is not None]
        (gradient,) = grad([output for output, _ in pairs], [leaf], [d for _, d in pairs])
    return logits.new_zeros(logits.shape) if gradient is None else gradient


# The same with all of this in C++, for plain tensors on the CPU; or None.
IN_CPP = eager.function("route", _gradient)


# ---- scores --------------------------------------------------------------------------------------------------------


def _scores_fake(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    spec = ScoreSpec(*arguments[-3])
    tokens, experts = logits.shape
    dtype = accumulator(logits.dtype)
    return (
        logits.new_empty((tokens, spec.k), dtype=torch.int64),
        logits.new_empty((tokens, spec.k), dtype=dtype),
        logits.new_empty((tokens,), dtype=dtype),
        logits.new_empty((3, spec.segments, experts), dtype=dtype),
        logits.new_empty((2, spec.segments), dtype=dtype),
        logits.new_empty((spec.segments, experts), dtype=torch.int64),
        logits.new_empty((spec.segments,), dtype=torch.int64),
        logits.new_empty((spec.segments,), dtype=dtype),
    )


def _scores_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, noise, bias, allowed, _, segment, valid, spec, sigma, backend = inputs
    experts, _, priority, _, _, choices, tokens, margin = output
    ctx.save_for_backward(logits, noise, bias, allowed, segment, valid, experts)
    ctx.set_materialize_grads(False)  # those of integers would take longer than the derivative
    ctx.spec, ctx.sigma, ctx.backend = spec, sigma, backend
    ctx.mark_non_differentiable(experts, priority, choices, tokens, margin)


def _scores_derivative(ctx: Any, *d_outputs: Any) -> tuple[Any, ...]:
    *problem, experts = ctx.saved_tensors
    _, d_gates, _, d_sums, d_totals, *_ = d_outputs
    if d_gates is None and d_sums is None and d_totals is None:
        return (None,) * 10
    logits, segments = problem[0], ScoreSpec(*ctx.spec).segments
    dtype = accumulator(logits.dtype)
    upstream = [
        logits.new_zeros(shape, dtype=dtype) if given is None else given
        for given, shape in (
            (d_gates, experts.shape),
            (d_sums, (3, segments, logits.shape[1])),
            (d_totals, (2, segments)),
        )
    ]
    gradient = call.expert_routing_scores_backward(*problem, ctx.spec, ctx.sigma, experts, *upstream, ctx.backend)
    return (gradient.to(logits.dtype), *(None,) * 9)


def _route_backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=accumulator(logits.dtype))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, spec, sigma, experts, d_gates, d_sums, d_totals, _ = inputs
    ctx.save_for_backward(*tensors, experts, d_gates, d_sums, d_totals)
    ctx.spec, ctx.sigma = spec, sigma


def _backward_derivative(ctx: Any, d_gradient: Tensor) -> tuple[Any, ...]:
    """The second derivative: autograd through the reference, whatever the backend was."""
    logits, *others, experts, d_gates, d_sums, d_totals = ctx.saved_tensors
    with torch.enable_grad(), autocast.disabled(logits):
        leaves = [alias(t) for t in (logits, d_gates, d_sums, d_totals)]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        arguments: list[Any] = [leaves[0], *others, ctx.spec, ctx.sigma, experts, *leaves[1:]]
        output = reference.scores_backward(*arguments)
        found = iter(grad([output] if output.requires_grad else [], wanted, [d_gradient]))
    d_logits, *d_upstream = [next(found) if leaf.requires_grad else None for leaf in leaves]
    return (d_logits, *(None,) * 8, *d_upstream, None)


# ---- slots ---------------------------------------------------------------------------------------------------------


def _slots_fake(experts: Tensor, priority: Any, segment: Any, spec: Any, backend: str) -> tuple[Tensor, ...]:
    s = SlotSpec(*spec)
    return (
        experts.new_empty(experts.shape),
        experts.new_empty((s.rows(*experts.shape),)),
        experts.new_empty((s.experts + 1,)),
        experts.new_empty((s.segments, s.experts)),
    )


# ---- dispatch, combine, dots -------------------------------------------------------------------------------------


def _dispatch_fake(tokens: Tensor, gates: Any, slots: Tensor, order: Tensor, backend: str) -> Tensor:
    return tokens.new_empty((order.shape[0], tokens.shape[1]))


def _combine_fake(rows: Tensor, gates: Any, slots: Tensor, order: Tensor, backend: str) -> Tensor:
    return rows.new_empty((slots.shape[0], rows.shape[1]))


def _dots_fake(tokens: Tensor, rows: Tensor, slots: Tensor, order: Tensor, backend: str) -> Tensor:
    return tokens.new_empty(slots.shape, dtype=accumulator(tokens.dtype))


def _moved_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    moved, gates, slots, order, backend = inputs
    # Only the gradient of the gates needs what was moved.
    ctx.save_for_backward(moved if ctx.needs_input_grad[1] else None, gates, slots, order)
    ctx.backend = backend


def _dispatch_derivative(ctx: Any, d_rows: Tensor) -> tuple[Any, ...]:
    tokens, gates, *places = ctx.saved_tensors
    ops, places = call, (*places, ctx.backend)
    d_tokens = ops.expert_routing_combine(d_rows, gates, *places) if ctx.needs_input_grad[0] else None
    d_gates = ops.expert_routing_dots(tokens, d_rows, *places) if ctx.needs_input_grad[1] else None
    return d_tokens, d_gates, None, None, None


def _combine_derivative(ctx: Any, d_tokens: Tensor) -> tuple[Any, ...]:
    rows, gates, *places = ctx.saved_tensors
    ops, places = call, (*places, ctx.backend)
    d_rows = ops.expert_routing_dispatch(d_tokens, gates, *places) if ctx.needs_input_grad[0] else None
    d_gates = ops.expert_routing_dots(d_tokens, rows, *places) if ctx.needs_input_grad[1] else None
    return d_rows, d_gates, None, None, None


def _dots_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, rows, slots, order, backend = inputs
    ctx.save_for_backward(tokens, rows, slots, order)
    ctx.backend = backend


def _dots_derivative(ctx: Any, d_dots: Tensor) -> tuple[Any, ...]:
    tokens, rows, *places = ctx.saved_tensors
    ops, places = call, (*places, ctx.backend)
    d_tokens = ops.expert_routing_combine(rows, d_dots, *places) if ctx.needs_input_grad[0] else None
    d_rows = ops.expert_routing_dispatch(tokens, d_dots, *places) if ctx.needs_input_grad[1] else None
    return d_tokens, d_rows, None, None, None
