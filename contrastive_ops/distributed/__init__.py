"""Losses of the batch of all processes, on torch.distributed: rows of this rank in, its part of the loss out.

    from contrastive_ops import distributed

    loss = distributed.clip(image, text, scale=logit_scale.exp())        # in DDP or FSDP; then loss.backward()

What DDP and FSDP make of the gradients, their mean over ranks, is the gradient of the single-process loss of all rows.
`similarity_reduce` is what other losses of this kind are made of. docs/distributed.md has the conventions, and says
which schedule to take when.
"""

from ..ops.merging import merge_lse
from ._bank import unique_ids
from ._experts import spread_parameters
from .cached_step import cached_step
from .clip import clip
from .gte import gte
from .info_nce import info_nce
from .moco import moco
from .modules import CLIPLoss, GTELoss, InfoNCELoss, MoCoLoss, NTXentLoss, SigLIPLoss, SupConLoss
from .nt_xent import nt_xent
from .route import route
from .siglip import siglip
from .similarity_reduce import similarity_reduce
from .sup_con import sup_con

__all__ = [
    "CLIPLoss",
    "GTELoss",
    "InfoNCELoss",
    "MoCoLoss",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "cached_step",
    "clip",
    "gte",
    "info_nce",
    "merge_lse",
    "moco",
    "nt_xent",
    "route",
    "siglip",
    "similarity_reduce",
    "spread_parameters",
    "sup_con",
    "unique_ids",
]
