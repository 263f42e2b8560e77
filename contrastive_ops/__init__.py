"""Fused kernels for contrastive training in PyTorch.

    from contrastive_ops import clip, info_nce, siglip, sup_con

    loss = clip(image_features, text_features, scale=logit_scale.exp())

Every loss is short algebra on `similarity_reduce`, which folds the rows and columns of a similarity matrix without
storing it, and hard negatives come from `similarity_topk`, which finds the best columns of each row. `Pairs` says which
pairs take part, `Fold` what a row or column becomes.
"""

from . import mining, nn
from .losses import (
    Diagnostics,
    RunningDenominator,
    arc_face,
    batch_hard_triplet,
    batch_semi_hard_triplet,
    bixse,
    clip,
    contrastive,
    cos_face,
    dcl,
    debiased,
    energy_hinge,
    gist,
    gte,
    hcl,
    hn_nce,
    info_nce,
    margin_softmax,
    mined_info_nce,
    moco,
    multi_positive_info_nce,
    multi_positive_siglip,
    nt_xent,
    pair_bce,
    siglip,
    simctg,
    soft_info_nce,
    sog_clr,
    sup_con,
    triplet,
    vse,
)
from .mining import MemoryBank, NegativeRules, RefreshSchedule, Sampling, TopKState, mine_hard_negatives
from .ops import Coarse, Fold, Guide, Pairs, Reduced, TopK, merge_lse, similarity_reduce, similarity_topk
from .reference.stream import stream_rows

__version__ = "0.1.0"

__all__ = [
    "Coarse",
    "Diagnostics",
    "Fold",
    "Guide",
    "MemoryBank",
    "NegativeRules",
    "Pairs",
    "Reduced",
    "RefreshSchedule",
    "RunningDenominator",
    "Sampling",
    "TopK",
    "TopKState",
    "__version__",
    "arc_face",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
    "bixse",
    "clip",
    "contrastive",
    "cos_face",
    "dcl",
    "debiased",
    "energy_hinge",
    "gist",
    "gte",
    "hcl",
    "hn_nce",
    "info_nce",
    "margin_softmax",
    "merge_lse",
    "mine_hard_negatives",
    "mined_info_nce",
    "mining",
    "moco",
    "multi_positive_info_nce",
    "multi_positive_siglip",
    "nn",
    "nt_xent",
    "pair_bce",
    "siglip",
    "simctg",
    "similarity_reduce",
    "similarity_topk",
    "soft_info_nce",
    "sog_clr",
    "stream_rows",
    "sup_con",
    "triplet",
    "vse",
]
