"""The primitives: check arguments, pick a backend, register autograd."""

from .pairs import Pairs
from .similarity_reduce import Reduced, merge_lse, similarity_reduce

__all__ = ["Pairs", "Reduced", "merge_lse", "similarity_reduce"]
