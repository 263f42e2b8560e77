"""Losses: short algebra on the primitives, one family a file.

`weight` says how much a row's own loss counts. A row of weight 0 is left out: what belongs to it alone (its query,
its label, its temperature, its own negatives, its list) reaches no value and no gradient, be it NaN or an unknown
label, and the weight's own gradient there is 0. What other rows are compared with, such as its key among the keys of
a batch, or both sides of it in losses of two directions, stays a candidate of theirs: `Pairs` takes pairs out of
both.
"""

from .all_pairs import batch_contrastive, lifted_structure
from .bixse import bixse, pair_bce
from .clip import clip
from .dcl import dcl
from .decorrelation import (
    RunningCovariance,
    barlow_twins,
    covariance_penalty,
    variance_hinge,
    vicreg,
)
from .diagnostics import Diagnostics
from .distillation import distance_distillation, similarity_distillation
from .ge2e import ge2e
from .gist import gist, gte
from .hard_negatives import debiased, hcl
from .hinge import energy_hinge, simctg, vse
from .hn_nce import hn_nce
from .info_nce import info_nce
from .late_interaction import late_interaction
from .linear_softmax import CrossEntropy, LogProb, linear_cross_entropy, linear_kl, linear_log_prob
from .list_labels import listwise_cross_entropy
from .log_det import effective_rank, log_det
from .margin_softmax import arc_face, cos_face, margin_softmax
from .matryoshka import matryoshka_clip, matryoshka_info_nce, matryoshka_nt_xent
from .mined import mined_info_nce
from .moco import moco
from .multi_positive import multi_positive_info_nce, soft_info_nce, sup_con
from .multi_similarity import multi_similarity
from .negative_sampling import UnigramSampler, negative_sampling
from .nt_xent import nt_xent
from .pair_scores import angle, cosent, pair_mse
from .preference import dpo, kl_estimate, log_odds
from .prototypes import RunningPrototypes
from .rank_distillation import listwise_distillation, margin_mse, pairwise_rank_distillation
from .regularizers import alignment, koleo, sparsity, uniformity
from .self_distillation import RunningCentre, dino, swav
from .siglip import multi_positive_siglip, siglip
from .sog_clr import RunningDenominator, sog_clr
from .spectral import spectral_contrastive
from .triplet import batch_hard_triplet, batch_semi_hard_triplet, contrastive, triplet
from .whitening import group_whiten
from .y_aware import y_aware_info_nce

__all__ = [
    "CrossEntropy",
    "Diagnostics",
    "LogProb",
    "RunningCentre",
    "RunningCovariance",
    "RunningDenominator",
    "RunningPrototypes",
    "UnigramSampler",
    "alignment",
    "angle",
    "arc_face",
    "barlow_twins",
    "batch_contrastive",
    "batch_hard_triplet",
    "batch_semi_hard_triplet",
    "bixse",
    "clip",
    "contrastive",
    "cos_face",
    "cosent",
    "covariance_penalty",
    "dcl",
    "debiased",
    "dino",
    "distance_distillation",
    "dpo",
    "effective_rank",
    "energy_hinge",
    "ge2e",
    "gist",
    "group_whiten",
    "gte",
    "hcl",
    "hn_nce",
    "info_nce",
    "kl_estimate",
    "koleo",
    "late_interaction",
    "lifted_structure",
    "linear_cross_entropy",
    "linear_kl",
    "linear_log_prob",
    "listwise_cross_entropy",
    "listwise_distillation",
    "log_det",
    "log_odds",
    "margin_mse",
    "margin_softmax",
    "matryoshka_clip",
    "matryoshka_info_nce",
    "matryoshka_nt_xent",
    "mined_info_nce",
    "moco",
    "multi_positive_info_nce",
    "multi_positive_siglip",
    "multi_similarity",
    "negative_sampling",
    "nt_xent",
    "pair_bce",
    "pair_mse",
    "pairwise_rank_distillation",
    "siglip",
    "simctg",
    "similarity_distillation",
    "soft_info_nce",
    "sog_clr",
    "sparsity",
    "spectral_contrastive",
    "sup_con",
    "swav",
    "triplet",
    "uniformity",
    "variance_hinge",
    "vicreg",
    "vse",
    "y_aware_info_nce",
]
