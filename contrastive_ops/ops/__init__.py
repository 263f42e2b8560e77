"""The primitives: check arguments, pick a backend, register autograd."""

from ..core.folds import Fold, Reduced
from ..core.rules import Guide, Pairs
from ..reference.stream import stream_rows
from .coarse import Coarse
from .expert_choice import expert_choice
from .expert_routing import Routing, combine, dispatch, route
from .gating import Capacity, Gating
from .grouped_matmul import grouped_matmul
from .maxsim import maxsim, maxsim_pairs
from .merging import merge_lse
from .router_losses import RouterLoss
from .similarity_distill import similarity_distill
from .similarity_prefix import PrefixFolds, similarity_prefix
from .similarity_reduce import similarity_reduce
from .similarity_topk import TopK, similarity_topk
from .similarity_values import similarity_values
from .sinkhorn import sinkhorn
from .token_sets import TokenSets
from .xtr import xtr

__all__ = [
    "Capacity",
    "Coarse",
    "Fold",
    "Gating",
    "Guide",
    "Pairs",
    "PrefixFolds",
    "Reduced",
    "RouterLoss",
    "Routing",
    "TokenSets",
    "TopK",
    "combine",
    "dispatch",
    "expert_choice",
    "grouped_matmul",
    "maxsim",
    "maxsim_pairs",
    "merge_lse",
    "route",
    "similarity_distill",
    "similarity_prefix",
    "similarity_reduce",
    "similarity_topk",
    "similarity_values",
    "sinkhorn",
    "stream_rows",
    "xtr",
]
