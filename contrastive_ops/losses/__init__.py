"""Losses: short algebra on the primitives, one family a file."""

from .softmax import clip, info_nce, nt_xent

__all__ = ["clip", "info_nce", "nt_xent"]
