"""torch.library operators of maxsim: schema, fake, autograd.

`forward` finds the best document tokens, `backward` is the derivative of their inner products; which tokens were the
best is not differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import autocast
from ..core.backends import Backend
from ..core.checks import accumulator
from ..core.derivatives import alias, grad
from ..core.operators import call, define, of_backend
from ..reference import maxsim as reference

_SETS = "Tensor queries, Tensor documents, Tensor query_offsets, Tensor document_offsets"
_PAIRS = "Tensor? pair_queries, Tensor? pair_documents"
_FORWARD = (
    f"({_SETS}, Tensor? query_mask, Tensor? document_mask, {_PAIRS}, SymInt longest_query, SymInt k, bool keep,"
    " str backend) -> (Tensor scores, Tensor winners)"
)
_BACKWARD = (
    f"({_SETS}, {_PAIRS}, Tensor winners, Tensor d_scores, int needs, str backend)"
    " -> (Tensor dqueries, Tensor ddocuments)"
)


def register(backends: Mapping[str, Backend]) -> None:
    """Define the operators; `backends` says where each backend's functions are."""
    for name, schema, fake, setup, derivative in (
        ("forward", _FORWARD, _forward_fake, _forward_setup, _forward_derivative),
        ("backward", _BACKWARD, _backward_fake, _backward_setup, _backward_derivative),
    ):
        define(f"maxsim_{name}", schema, of_backend(backends, name), fake, setup, derivative)


# ---- forward ---------------------------------------------------------------------------------------------------------


def _forward_fake(
    queries: Tensor,
    documents: Tensor,
    query_offsets: Tensor,
    document_offsets: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    pair_queries: Tensor | None,
    pair_documents: Tensor | None,
    longest_query: int,
    k: int,
    keep: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    sets, others = query_offsets.shape[0] - 1, document_offsets.shape[0] - 1
    pairs = None if pair_queries is None else pair_queries.shape[0]
    groups, tokens = (others, queries.shape[0]) if pairs is None else (pairs, longest_query)
    return (
        queries.new_empty((sets, others) if pairs is None else (pairs,), dtype=accumulator(queries.dtype)),
        queries.new_empty((groups if keep else 0, tokens, k), dtype=torch.int32),
    )


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, documents, query_offsets, document_offsets, _, _, pair_queries, pair_documents, *_, ctx.backend = inputs
    ctx.save_for_backward(queries, documents, query_offsets, document_offsets, pair_queries, pair_documents, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _forward_derivative(ctx: Any, d_scores: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * 10
    if d_scores is None:
        return None, None, *rest
    needs = sum(1 << bit for bit in range(2) if ctx.needs_input_grad[bit])
    gradients = call.maxsim_backward(*ctx.saved_tensors, d_scores, needs, ctx.backend)
    queries, documents = (
        gradient.to(tensor.dtype) if needs >> bit & 1 else None
        for bit, (tensor, gradient) in enumerate(zip(ctx.saved_tensors[:2], gradients, strict=True))
    )
    return queries, documents, *rest


# ---- backward --------------------------------------------------------------------------------------------------------


def _backward_fake(queries: Tensor, documents: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    needs, dtype = arguments[-2], accumulator(queries.dtype)
    shapes = [(x.shape[0] if needs >> bit & 1 else 0, x.shape[1]) for bit, x in enumerate((queries, documents))]
    return queries.new_empty(shapes[0], dtype=dtype), queries.new_empty(shapes[1], dtype=dtype)


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.needs, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward_derivative(ctx: Any, *d_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The second derivative: autograd through the chunked reference, whatever the backend was."""
    queries, documents, *constants, d_scores = ctx.saved_tensors
    with torch.enable_grad(), autocast.disabled(queries):
        leaves = [alias(t) for t in (queries, documents, d_scores)]
        arguments: list[Any] = [leaves[0], leaves[1], *constants, leaves[2], ctx.needs]
        outputs = reference.backward(*arguments)
        pairs = [(o, d) for o, d in zip(outputs, d_gradients, strict=True) if d is not None and o.requires_grad]
        wanted = [t for t in leaves if t.requires_grad]
        found = iter(grad([o for o, _ in pairs], wanted, [d for _, d in pairs]))
    by_queries, by_documents, by_scores = (next(found) if t.requires_grad else None for t in leaves)
    return by_queries, by_documents, *(None,) * len(constants), by_scores, None, None
