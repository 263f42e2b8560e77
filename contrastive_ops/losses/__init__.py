"""Losses: short algebra on the primitives, one family a file."""

from .classifier import arc_face, cos_face, margin_softmax
from .diagnostics import Diagnostics
from .hardness import dcl, debiased, hcl, hn_nce
from .margin import energy_hinge, simctg, vse
from .mined import mined_info_nce
from .multi_positive import multi_positive_info_nce, soft_info_nce, sup_con
from .partition import gist, gte
from .queue import moco
from .running import RunningDenominator, sog_clr
from .sigmoid import bixse, multi_positive_siglip, pair_bce, siglip
from .softmax import clip, info_nce, nt_xent
from .triplet import batch_hard_triplet, batch_semi_hard_triplet, contrastive, triplet

__all__ = [
    "Diagnostics",
    "RunningDenominator",
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
    "mined_info_nce",
    "moco",
    "multi_positive_info_nce",
    "multi_positive_siglip",
    "nt_xent",
    "pair_bce",
    "siglip",
    "simctg",
    "soft_info_nce",
    "sog_clr",
    "sup_con",
    "triplet",
    "vse",
]
