"""Losses of the batch of all processes, on torch.distributed: rows of this rank in, its part of the loss out.

    from contrastive_ops import distributed

    loss = distributed.clip(image, text, scale=logit_scale.exp())        # in DDP or FSDP; then loss.backward()

What DDP and FSDP make of the gradients, their mean over ranks, is the gradient of the single-process loss of all rows.
"""

from .clip import clip
from .info_nce import info_nce
from .moco import moco
from .nt_xent import nt_xent
from .siglip import siglip
from .sup_con import sup_con

__all__ = ["clip", "info_nce", "moco", "nt_xent", "siglip", "sup_con"]
