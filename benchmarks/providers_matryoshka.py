"""Who computes losses of several prefixes: this package at once and in a loop, plain torch, sentence-transformers.

All normalise every prefix, whose lengths are 1/12, 1/6, 1/3, 2/3 and all of the dimension: 64, 128, 256, 512 and 768.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.providers import differentiate, eager_clip, eager_info_nce
from benchmarks.registry import OURS, Inputs, Outcome, Provider, Step

OURS_IN_A_LOOP = f"{OURS} in a loop"
TORCH_LOOP = "torch loop"
PEER = "sentence-transformers MatryoshkaLoss"


def dims_of(depth: int) -> tuple[int, ...]:
    """The lengths of the prefixes."""
    return tuple(depth * twelfths // 12 for twelfths in (1, 2, 4, 8, 12))


def _depth(inputs: Inputs) -> int:
    return next(t.shape[1] for t in inputs.tensors.values() if t.ndim == 2)


def ours(function: str) -> Provider:
    """``contrastive_ops.losses.<function>`` of all prefixes."""

    def build(inputs: Inputs) -> Step:
        import contrastive_ops

        loss, dims = getattr(contrastive_ops.losses, function), dims_of(_depth(inputs))
        return differentiate(lambda **leaves: loss(**leaves, **inputs.arguments, dims=dims), inputs.tensors)

    return Provider(OURS, build, kind="ours", package="contrastive_ops")


def ours_in_a_loop(function: str) -> Provider:
    """``contrastive_ops.losses.<function>`` of one prefix after the other."""

    def build(inputs: Inputs) -> Step:
        import contrastive_ops

        loss = getattr(contrastive_ops.losses, function)

        return _loop(inputs, loss)

    return Provider(OURS_IN_A_LOOP, build, kind="ours", package="contrastive_ops")


def torch_loop(loss: Callable[..., Tensor], *, compiled: bool = False) -> Provider:
    """A loss in eager torch of one normalised prefix after the other, or all of it under ``torch.compile``."""

    def of_prefix(**tensors: Tensor | float) -> Tensor:
        return loss(
            **{k: F.normalize(t, dim=1) if isinstance(t, Tensor) and t.ndim == 2 else t for k, t in tensors.items()}
        )

    def build(inputs: Inputs) -> Step:
        return _loop(inputs, of_prefix, compiled=compiled)

    return Provider("torch.compile" if compiled else TORCH_LOOP, build, kind="torch", optional=compiled)


def _loop(inputs: Inputs, of_prefix: Callable[..., Tensor], *, compiled: bool = False) -> Step:
    dims = dims_of(_depth(inputs))

    def total(**leaves: Tensor) -> Tensor:
        parts = [
            of_prefix(**{k: t[:, :d] if t.ndim == 2 else t for k, t in leaves.items()}, **inputs.arguments)
            for d in dims
        ]
        return torch.stack(parts).sum()

    return differentiate(torch.compile(total) if compiled else total, inputs.tensors)


class _Lookup(torch.nn.Module):
    """A model whose embeddings are those that it is given."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": features["input_embeds"]}


def sentence_transformers_loop() -> Provider:
    """MatryoshkaLoss over MultipleNegativesRankingLoss, of a model that hands its input on."""

    def build(inputs: Inputs) -> Step:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

        model = SentenceTransformer(modules=[_Lookup()], device="cpu")
        inner = MultipleNegativesRankingLoss(model, scale=inputs.constants["scale"])
        loss = MatryoshkaLoss(model, inner, list(dims_of(_depth(inputs)))[::-1])

        def step() -> Outcome:
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.tensors.items()}
            value = loss([{"input_embeds": leaf} for leaf in leaves.values()], None)
            grads = torch.autograd.grad(value, list(leaves.values()))
            return Outcome(value.detach(), dict(zip(leaves, grads, strict=True)))

        return step

    return Provider(PEER, build, package="sentence-transformers")


EAGER = {"clip": eager_clip, "info_nce": eager_info_nce}
