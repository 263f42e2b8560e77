"""Fused kernels for contrastive training in PyTorch.

    from contrastive_ops import clip, info_nce, nt_xent

    loss = clip(image_features, text_features, scale=logit_scale.exp())

Every loss is short algebra on one primitive, `similarity_reduce`, which folds the rows and columns of a
similarity matrix without storing it.
"""

from . import nn
from .losses import clip, info_nce, nt_xent
from .ops import Fold, Guide, Pairs, Reduced, merge_lse, similarity_reduce
from .reference.stream import stream_rows

__version__ = "0.1.0"

__all__ = [
    "Fold",
    "Guide",
    "Pairs",
    "Reduced",
    "__version__",
    "clip",
    "info_nce",
    "merge_lse",
    "nn",
    "nt_xent",
    "similarity_reduce",
    "stream_rows",
]
