"""InfoNCE with the keys of all ranks."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from .. import losses
from ..core.rules import Pairs
from ..losses.diagnostics import Diagnostics
from ..losses.info_nce import prepared_info_nce
from ._losses import FilteredOptions, loss_over_ranks, over_ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    row_negatives: Tensor | None = ...,
    row_negative_bias: float | Tensor | None = ...,
    row_negative_mask: Tensor | None = ...,
    negative_pairs: Pairs | None = ...,
    in_batch: bool = ...,
    target: Tensor | None = ...,
    margin: float | Tensor = ...,
    smooth: str = ...,
    hardness: float = ...,
    z_loss: float = ...,
    metric: str = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[FilteredOptions],
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    row_negatives: Tensor | None = ...,
    row_negative_bias: float | Tensor | None = ...,
    row_negative_mask: Tensor | None = ...,
    negative_pairs: Pairs | None = ...,
    in_batch: bool = ...,
    target: Tensor | None = ...,
    margin: float | Tensor = ...,
    smooth: str = ...,
    hardness: float = ...,
    z_loss: float = ...,
    metric: str = ...,
    diagnostics: Literal[True],
    **options: Unpack[FilteredOptions],
) -> tuple[Tensor, Diagnostics]: ...


@over_ranks(losses.info_nce)
def info_nce(query: Tensor, key: Tensor, negatives: Tensor | None = None, **options: Any) -> Any:
    """`losses.info_nce` of the queries of all ranks with the keys and negatives of all ranks.

    Equivalent to::

        queries, keys, others = (all_gather(each) for each in (query, key, negatives))      # with gradients
        losses.info_nce(queries, keys, others, ...)                 # the mean over ranks of what is returned

    Columns are counted as each rank has them: its keys, its negatives, then those of the next rank.

    Args:
        query: (N, D) this rank's queries; see `clip` for what all ranks share.
        key: (M, D) this rank's keys; query i belongs to key ``target[i]``, counted on this rank.
        negatives: (K, D) more columns for every query of all ranks, this rank's part of them.
        options: as in `losses.info_nce`, and group, schedule, average and check; see `clip`, also of ``metric``.

    Returns:
        As `losses.info_nce`: 0-d, or this rank's rows for ``reduction="none"``; with ``diagnostics`` a pair.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.

    Note:
        6 N_local M_all D operations for "gather", which forms gradients in the forward pass, 8 for "ring".
    """
    prepare = functools.partial(prepared_info_nce, shifted=False)
    return loss_over_ranks(losses.info_nce, prepare, (query, key, negatives), options)
