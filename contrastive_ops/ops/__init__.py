"""The primitives: check arguments, pick a backend, register autograd."""

from .coarse import Coarse
from .expert_choice import expert_choice
from .expert_routing import Routing, combine, dispatch, route
from .folds import Fold, Reduced
from .gating import Capacity, Gating, RouterLoss
from .grouped_matmul import grouped_matmul
from .pairs import Guide, Pairs
from .similarity_reduce import merge_lse, similarity_reduce
from .similarity_topk import TopK, similarity_topk

__all__ = [
    "Capacity",
    "Coarse",
    "Fold",
    "Gating",
    "Guide",
    "Pairs",
    "Reduced",
    "RouterLoss",
    "Routing",
    "TopK",
    "combine",
    "dispatch",
    "expert_choice",
    "grouped_matmul",
    "merge_lse",
    "route",
    "similarity_reduce",
    "similarity_topk",
]
