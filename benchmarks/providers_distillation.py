"""Who distils similarities: this package, plain torch, open_clip.

The loss is the cross-entropy with the teacher's softmax in both directions, averaged: open_clip's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.providers import MATMUL, differentiate
from benchmarks.registry import OURS, Inputs, Provider, Step

NO_CACHE = f"{OURS} memory_budget=0"
EAGER = "torch eager"
OPEN_CLIP = "open_clip DistillClipLoss"


def _step(inputs: Inputs, loss_of: Callable[..., Tensor]) -> Step:
    """``loss_of(image, text, teacher_image, teacher_text, scale)``, differentiated by image and text."""
    teacher = (inputs.frozen["teacher_image"], inputs.frozen["teacher_text"])
    scale = inputs.constants["scale"]
    return differentiate(lambda image, text: loss_of(image, text, *teacher, scale), inputs.tensors)


def ours(name: str = OURS, memory_budget: int | None = None) -> Provider:
    """``contrastive_ops.losses.similarity_distillation``."""

    def build(inputs: Inputs) -> Step:
        from contrastive_ops.losses import similarity_distillation

        options = {"divergence": "ce", "symmetric": True, "normalize": False, "memory_budget": memory_budget}
        return _step(inputs, lambda *sides: similarity_distillation(*sides[:4], scale=sides[4], **options))

    return Provider(name, build, kind="ours", package="contrastive_ops")


def eager() -> Provider:
    """The formula in torch, each matrix formed once."""

    def loss_of(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, scale: float) -> Tensor:
        s, t = scale * image @ text.T, scale * teacher_image @ teacher_text.T
        rows, columns = (-(t.softmax(dim) * s.log_softmax(dim)).sum(dim).mean() for dim in (1, 0))
        return (rows + columns) / 2

    return Provider(EAGER, lambda inputs: _step(inputs, loss_of), kind="torch")


def open_clip() -> Provider:
    """``DistillClipLoss`` of open_clip, which also computes the contrastive loss, without its gradient."""

    def build(inputs: Inputs) -> Step:
        from open_clip.loss import DistillClipLoss

        loss = DistillClipLoss()

        def loss_of(image: Tensor, text: Tensor, teacher_image: Tensor, teacher_text: Tensor, scale: float) -> Tensor:
            return loss(image, text, scale, teacher_image, teacher_text, scale)[1]

        return _step(inputs, loss_of)

    return Provider(OPEN_CLIP, build, package="open_clip_torch")


def products() -> Provider:
    """The products alone through ``torch.mm``: both logits twice, for forward and backward, and two gradients."""

    def build(inputs: Inputs) -> Step:
        x, y = inputs.tensors["image"], inputs.tensors["text"]
        teacher = (inputs.frozen["teacher_image"], inputs.frozen["teacher_text"])
        logits, dx, dy = x.new_empty(len(x), len(y)), torch.empty_like(x), torch.empty_like(y)

        def step() -> None:
            for left, right in 2 * ((x, y), teacher):
                torch.mm(left, right.T, out=logits)
            torch.mm(logits, y, out=dx)
            torch.mm(logits.T, x, out=dy)

        return step

    return Provider(MATMUL, build, kind="matmul")
