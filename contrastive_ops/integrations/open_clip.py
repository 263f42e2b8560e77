"""open_clip's losses on fused kernels.

    from contrastive_ops.integrations.open_clip import ClipLoss, create_loss, patch

    patch()                                       # then `open_clip.create_loss(args)`, which open_clip_train calls
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)

Features are taken as they are, as open_clip's models normalise them; no logits of all pairs are kept. Over several
ranks the gradients that DistributedDataParallel averages are those of the loss of all rows, whatever `local_loss` and
`gather_with_grad` say: without the latter the original divides them by the number of ranks, or turns them elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..losses import similarity_distillation
from ._originals import runs_original, third_party

open_clip = third_party("open_clip", "open_clip_torch")


class ClipLoss(open_clip.loss.ClipLoss):
    """`open_clip.loss.ClipLoss` without the logits of all pairs.

    Equivalent to::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        labels = torch.arange(len(logits))
        (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    Args:
        local_loss: return the mean over this rank's rows instead of all, for logs; gradients are the same.
        gather_with_grad: they are exact in any case.
        cache_labels: no labels are made.
        rank: of this process.
        world_size: more than 1: negatives are those of all ranks, of which torch.distributed's default group is made.
        use_horovod: the original runs.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """Return the loss, or a dict of it."""
        if self.world_size > 1 and self.use_horovod:
            runs_original(self, "use_horovod=True")
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        group = _group(self.world_size)
        loss = distributed.clip(image_features, text_features, scale=logit_scale, normalize=False, group=group)
        if self.world_size > 1 and not self.local_loss:
            loss = _of_all_ranks(loss)
        if isinstance(logit_bias, Tensor):
            # A number added to all logits changes no softmax; DistributedDataParallel wants a gradient for it.
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss


class CoCaLoss(open_clip.loss.CoCaLoss, ClipLoss):
    """`open_clip.loss.CoCaLoss`, whose contrastive part is `ClipLoss` of this module."""


class DistillClipLoss(open_clip.loss.DistillClipLoss, ClipLoss):
    """`open_clip.loss.DistillClipLoss` without the four matrices of logits.

    Equivalent to::

        logits, teacher = logit_scale * image @ text.T, dist_logit_scale * dist_image @ dist_text.T
        contrastive = ClipLoss()(image, text, logit_scale)
        distill = (cross_entropy(logits, teacher.softmax(1)) + cross_entropy(logits.T, teacher.T.softmax(1))) / 2
    """

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> Any:
        """Return the contrastive and the distillation loss, or a dict of both."""
        student, teacher = (image_features, text_features), (dist_image_features, dist_text_features)
        trained = torch.is_grad_enabled() and any(features.requires_grad for features in teacher)
        if self.world_size > 1 or trained:
            runs_original(self, "a teacher with gradients" if trained else f"world_size={self.world_size}")
            original: Any = super()
            return original.forward(*student, logit_scale, *teacher, dist_logit_scale, output_dict)
        contrastive = ClipLoss.forward(self, *student, logit_scale)
        distill = similarity_distillation(
            *student,
            *teacher,
            divergence="ce",
            symmetric=True,
            scale=logit_scale,
            teacher_scale=dist_logit_scale,
            normalize=False,
        )
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill


class SigLipLoss(open_clip.loss.SigLipLoss):
    """`open_clip.loss.SigLipLoss` without the logits of all pairs.

    Equivalent to::

        logits = logit_scale * image_features @ text_features.T + logit_bias
        -F.logsigmoid((2 * torch.eye(N) - 1) * logits).sum() / N

    Args:
        cache_labels: no labels are made.
        rank: of this process.
        world_size: more than 1: negatives are those of all ranks.
        dist_impl: how features reach other ranks is `contrastive_ops.distributed`'s to say.
    """

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Any:
        """Return the loss, or a dict of it."""
        bias = 0.0 if logit_bias is None else logit_bias
        group = _group(self.world_size)
        loss = distributed.siglip(
            image_features, text_features, scale=logit_scale, bias=bias, normalize=False, group=group
        )
        return {"contrastive_loss": loss} if output_dict else loss


def _group(world_size: int) -> Any:
    """All ranks; None for one alone."""
    return torch.distributed.group.WORLD if world_size > 1 else None


def _of_all_ranks(loss: Tensor) -> Tensor:
    """The mean over ranks as the value; gradients stay this rank's."""
    mean = loss.detach().clone()
    torch.distributed.all_reduce(mean)
    return loss + (mean / torch.distributed.get_world_size() - loss.detach())


LOSSES = {"ClipLoss": ClipLoss, "CoCaLoss": CoCaLoss, "DistillClipLoss": DistillClipLoss, "SigLipLoss": SigLipLoss}


def patch(args: Any = None) -> torch.nn.Module | None:
    """Let `open_clip.create_loss`, which `open_clip_train` calls, make the losses of this module.

    Args:
        args: of `open_clip_train`; None changes what is made later and nothing else.

    Returns:
        The loss that `open_clip.create_loss` makes of `args`, None without.
    """
    for name, loss in LOSSES.items():
        setattr(open_clip.factory, name, loss)
    return open_clip.create_loss(args) if args is not None else None


def create_loss(args: Any) -> torch.nn.Module:
    """`open_clip.create_loss` with the losses of this module; nothing else is changed."""
    before = {name: getattr(open_clip.factory, name) for name in LOSSES}
    patch()
    try:
        loss: torch.nn.Module = open_clip.create_loss(args)
    finally:
        for name, original in before.items():
            setattr(open_clip.factory, name, original)
    return loss


def __getattr__(name: str) -> Any:
    return getattr(open_clip.loss, name)
