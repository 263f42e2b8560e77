"""NT-Xent over the views of all ranks."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from .. import losses
from ..losses.diagnostics import Diagnostics
from ..losses.nt_xent import prepared_nt_xent
from ._losses import FilteredOptions, loss_over_ranks, over_ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    smooth: str = ...,
    hardness: float = ...,
    metric: str = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[FilteredOptions],
) -> Tensor: ...


@overload
def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    smooth: str = ...,
    hardness: float = ...,
    metric: str = ...,
    diagnostics: Literal[True],
    **options: Unpack[FilteredOptions],
) -> tuple[Tensor, Diagnostics]: ...


@over_ranks(losses.nt_xent)
def nt_xent(z0: Tensor, z1: Tensor, **options: Any) -> Any:
    """`losses.nt_xent` of the two views of the samples of all ranks.

    Equivalent to::

        losses.nt_xent(all_gather(z0), all_gather(z1), ...)      # the mean over ranks of what is returned

    Columns are counted as each rank has them: its rows of ``z0``, those of ``z1``, then those of the next rank.

    Args:
        z0: (N, D) the first view of this rank's samples; see `clip` for what all ranks share.
        z1: (N, D) the second view.
        options: as in `losses.nt_xent`, and group, schedule, average and check; see `clip`, also of ``metric``.

    Returns:
        As `losses.nt_xent`: 0-d, or this rank's rows for ``reduction="none"``; with ``diagnostics`` a pair.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.

    Note:
        6 (2 N_local) (2 N_all) D operations for "gather", 8 for "ring": a pair of samples on different ranks is
        computed on both of them.
    """
    return loss_over_ranks(losses.nt_xent, functools.partial(prepared_nt_xent, shifted=False), (z0, z1), options)
