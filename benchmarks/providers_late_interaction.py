"""Who scores queries and documents by late interaction: this package, plain torch, and late-interaction-kernels.

A step is one forward and backward of the scores, weighted as a loss would weigh them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.providers import differentiate
from benchmarks.registry import OURS, Inputs, Provider, Step

PACKED = f"{OURS} packed"
EINSUM = "torch einsum + max"
PEER = "late-interaction-kernels"


def _weighted(inputs: Inputs, scores: Callable[[Tensor, Tensor], Tensor]) -> Step:
    weight = inputs.frozen["weight"]
    return differentiate(lambda queries, documents: (scores(queries, documents) * weight).sum(), inputs.tensors)


def ours() -> Provider:
    """``contrastive_ops.ops.maxsim`` of padded documents."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops.ops import TokenSets, maxsim

        mask = inputs.frozen.get("mask")
        return _weighted(inputs, lambda queries, documents: maxsim(queries, TokenSets(documents, mask)))

    return Provider(OURS, build, kind="ours", package="contrastive_ops")


def ours_packed() -> Provider:
    """The same of documents that are packed in the step, as a model without padding would hand them over."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops.ops import TokenSets, maxsim

        mask = inputs.frozen["mask"]
        offsets = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
        return _weighted(
            inputs, lambda queries, documents: maxsim(queries, TokenSets(documents[mask], offsets=offsets))
        )

    return Provider(PACKED, build, kind="ours", package="contrastive_ops")


def einsum() -> Provider:
    """``torch.einsum`` and ``max``: PyLate's ``colbert_scores`` with -inf for masked tokens."""

    def build(inputs: Inputs) -> Step:
        mask = inputs.frozen.get("mask")

        def scores(queries: Tensor, documents: Tensor) -> Tensor:
            similarity = torch.einsum("ash,bth->abst", queries, documents)
            if mask is not None:
                similarity = similarity.masked_fill(~mask[None, :, None], -torch.inf)
            return similarity.max(dim=-1).values.sum(dim=-1)

        return _weighted(inputs, scores)

    return Provider(EINSUM, build, kind="torch")


def late_interaction_kernels() -> Provider:
    """``maxsim`` of late-interaction-kernels, whose fallback without a GPU is plain torch."""

    def build(inputs: Inputs) -> Step:
        from late_interaction_kernels import maxsim

        return _weighted(inputs, lambda queries, documents: maxsim(queries, documents))

    return Provider(PEER, build, package="late-interaction-kernels", optional=True)


def products() -> Provider:
    """All products of tokens through ``torch.mm``, some documents at a time, into one buffer. Not checked."""

    def build(inputs: Inputs) -> Step:
        queries, documents = (inputs.tensors[name].flatten(0, 1) for name in ("queries", "documents"))
        parts = documents.split(4096)
        buffer = documents.new_empty(len(parts[0]), len(queries))

        def step() -> None:
            for part in parts:
                torch.mm(part, queries.T, out=buffer[: len(part)])

        return step

    return Provider("torch.mm", build, kind="matmul")
