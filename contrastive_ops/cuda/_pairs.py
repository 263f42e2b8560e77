"""Logit sets and folds as kernels take them; csrc/cuda/similarity_pairs.h has the other side."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core.problem import Layout

# As in csrc/cuda/similarity_pairs.h: what an argument of a kernel has room for.
MOST_SETS, MOST_FOLDS = 6, 12


def no_room(layout: Layout) -> list[str]:
    """Reasons why kernels have no room for the sets and folds of a call."""
    sets, folds = len(layout.sets), len(layout.folds)
    if sets <= MOST_SETS and folds <= MOST_FOLDS:
        return []
    return [f"{sets} logit sets and {folds} folds (supported: {MOST_SETS} and {MOST_FOLDS})"]


def dense(tensor: Tensor | None) -> Tensor | None:
    """The same numbers as kernels read them."""
    return None if tensor is None else tensor.detach().contiguous()


def dense_tuple(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same tensors as kernels read them."""
    return tuple(tensor.detach().contiguous() for tensor in tensors)
