"""Losses of the batch of all processes, on torch.distributed: rows of this rank in, its part of the loss out.

    from contrastive_ops import distributed

    loss = distributed.clip(image, text, scale=logit_scale.exp())        # in DDP or FSDP; then loss.backward()

What DDP and FSDP make of the gradients, their mean over ranks, is the gradient of the single-process loss of all rows.
"""

from .clip import clip

__all__ = ["clip"]
