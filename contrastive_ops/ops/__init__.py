"""The primitives: check arguments, pick a backend, register autograd."""

from .folds import Fold, Reduced
from .pairs import Guide, Pairs
from .similarity_reduce import merge_lse, similarity_reduce

__all__ = ["Fold", "Guide", "Pairs", "Reduced", "merge_lse", "similarity_reduce"]
