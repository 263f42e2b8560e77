"""Who computes a case: this package, plain torch, and other packages, imported when built.

A provider's ``build(inputs)`` returns a step, one forward and backward from fresh leaves. Peers are
called the way their own users call them; where a peer lacks an argument (a scale), the step pays
for the work-around a user would write, and the docstring says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import OURS, Inputs, Outcome, Provider, Step

MATMUL = "torch.mm"


def differentiate(loss_of: Callable[..., Tensor], tensors: Mapping[str, Tensor]) -> Step:
    """A step that calls ``loss_of(**leaves)`` and differentiates every leaf."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}

    def step() -> Outcome:
        loss = loss_of(**leaves)
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return Outcome(loss.detach(), dict(zip(leaves, grads, strict=True)))

    return step


def _rows(inputs: Inputs) -> list[Tensor]:
    return [tensor for tensor in inputs.tensors.values() if tensor.ndim == 2]


# ---------------------------------------------------------------------------------------------
# This package


def ours(function: str, name: str = OURS, *, cache: bool | None = None) -> Provider:
    """``contrastive_ops.<function>`` on the case's tensors and constants.

    ``cache``: None leaves ``memory_budget`` at its default, False gives it no byte, True enough to
    keep one float32 matrix of all logits.
    """

    def build(inputs: Inputs) -> Step:
        import contrastive_ops

        options: dict[str, float] = dict(inputs.constants)
        if cache is not None:
            first, last = _rows(inputs)[0], _rows(inputs)[-1]
            options["memory_budget"] = 4 * len(first) * len(last) if cache else 0
        loss = getattr(contrastive_ops, function)
        return differentiate(lambda **leaves: loss(**leaves, **options), inputs.tensors)

    return Provider(name, build, kind="ours", package="contrastive_ops")


# ---------------------------------------------------------------------------------------------
# The machine: the case's own matrix products and nothing else


def matmuls(products: str, *, self_similarity: bool = False) -> Provider:
    """``torch.mm`` over the products of a loss, with outputs allocated once.

    Args:
        products: one letter pair each: "NT" makes logits from x and y, "NN" a gradient of x from
            logits and y, "TN" a gradient of y from logits and x.
        self_similarity: x and y are both the concatenation of the two inputs.
    """

    def build(inputs: Inputs) -> Step:
        x, y = _rows(inputs)[:2]
        if self_similarity:
            x = y = torch.cat([x, y])
        logits = torch.empty(len(x), len(y), dtype=x.dtype, device=x.device)
        dx, dy = torch.empty_like(x), torch.empty_like(y)
        calls = {
            "NT": lambda: torch.mm(x, y.T, out=logits),
            "NN": lambda: torch.mm(logits, y, out=dx),
            "TN": lambda: torch.mm(logits.T, x, out=dy),
        }
        order = [calls[pair] for pair in products.split()]

        def step() -> None:
            for call in order:
                call()

        return step

    return Provider(MATMUL, build, kind="matmul")


# ---------------------------------------------------------------------------------------------
# Plain torch


def torch_eager(name: str, loss_of: Callable[..., Tensor], *, compiled: bool = False) -> Provider:
    """``loss_of(**tensors, **constants)`` in eager torch, or under ``torch.compile``."""

    def build(inputs: Inputs) -> Step:
        loss = torch.compile(loss_of) if compiled else loss_of
        return differentiate(lambda **leaves: loss(**leaves, **dict(inputs.constants)), inputs.tensors)

    return Provider(name, build, kind="torch", optional=compiled)


def eager_clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """CLIP with one matrix product: the columns' direction reads the same logits transposed."""
    logits = scale * (image @ text.T)
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def eager_info_nce(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """InfoNCE from queries to keys."""
    logits = scale * (query @ key.T)
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def eager_nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """NT-Xent with one matrix product and the diagonal filled with -inf."""
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(z0)))


def linear_cross_entropy(acc_policy: str) -> Provider:
    """torch's chunked ``F.linear_cross_entropy``; it takes no scale, so the keys are multiplied."""

    def build(inputs: Inputs) -> Step:
        options_class = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if options_class is None:
            raise ImportError("torch.nn.LinearCrossEntropyOptions needs torch 2.13 or newer")
        options = options_class(acc_policy=acc_policy)
        scale = inputs.constants["scale"]

        def loss_of(query: Tensor, key: Tensor) -> Tensor:
            labels = torch.arange(len(query), device=query.device)
            return F.linear_cross_entropy(query, scale * key, labels, options=options)

        return differentiate(loss_of, inputs.tensors)

    return Provider(f"torch linear_cross_entropy {acc_policy}", build, kind="torch")


# ---------------------------------------------------------------------------------------------
# Other packages


def open_clip_loss() -> Provider:
    """open_clip's ClipLoss on one process."""

    def build(inputs: Inputs) -> Step:
        from open_clip.loss import ClipLoss

        loss = ClipLoss()
        return differentiate(lambda image, text, scale: loss(image, text, scale), inputs.tensors)

    return Provider("open_clip ClipLoss", build, package="open_clip_torch")


def lightly_nt_xent() -> Provider:
    """lightly's NTXentLoss without a memory bank; it normalises its inputs."""

    def build(inputs: Inputs) -> Step:
        from lightly.loss import NTXentLoss

        loss = NTXentLoss(temperature=inputs.constants["temperature"])
        return differentiate(lambda z0, z1: loss(z0, z1), inputs.tensors)

    return Provider("lightly NTXentLoss", build, package="lightly")


def sentence_transformers_mnrl() -> Provider:
    """sentence-transformers' MultipleNegativesRankingLoss with the dot product, without a model."""

    def build(inputs: Inputs) -> Step:
        from sentence_transformers import util
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

        loss = MultipleNegativesRankingLoss(
            model=torch.nn.Module(),
            scale=inputs.constants["scale"],
            similarity_fct=util.dot_score,
        )
        return differentiate(
            lambda query, key: loss.compute_loss_from_embeddings([query, key], None),
            inputs.tensors,
        )

    return Provider("sentence-transformers MNRL", build, package="sentence-transformers")
