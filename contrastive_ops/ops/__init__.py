"""The primitives: check arguments, pick a backend, register autograd."""

from .coarse import Coarse
from .folds import Fold, Reduced
from .pairs import Guide, Pairs
from .similarity_reduce import merge_lse, similarity_reduce
from .similarity_topk import TopK, similarity_topk

__all__ = [
    "Coarse",
    "Fold",
    "Guide",
    "Pairs",
    "Reduced",
    "TopK",
    "merge_lse",
    "similarity_reduce",
    "similarity_topk",
]
