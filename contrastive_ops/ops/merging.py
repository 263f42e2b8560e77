"""Merge what blocks of columns were folded to."""

from __future__ import annotations

from torch import Tensor

from ..core import checks, numerics


def merge_lse(*lse: Tensor) -> Tensor:
    """Merge the logsumexp of several blocks of columns into that of their union.

    Equivalent to::

        torch.logsumexp(torch.stack(lse), dim=0)

    but with gradient 0 instead of NaN where every block is empty (-inf).

    Args:
        lse: one or more tensors of one shape.

    Returns:
        A tensor of that shape.
    """
    if not lse:
        raise ValueError("merge_lse: lse must be at least one tensor, got none")
    for tensor in lse:
        checks.check_tensor("merge_lse", "lse", tensor)
        if tensor.shape != lse[0].shape:
            raise ValueError(
                f"merge_lse: lse must have one shape, got {checks.shape(lse[0])} and {checks.shape(tensor)}"
            )
    return numerics.merge_lse(*lse)
