"""CLIP's loss over the images and texts of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from .. import losses
from ..losses._sweep import Prepared
from ..losses.clip import by_metric, prepared_clip
from ..losses.diagnostics import Diagnostics
from ._losses import FilteredOptions, loss_over_ranks, over_ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def clip(
    image: Tensor,
    text: Tensor,
    *,
    smooth: str = ...,
    hardness: float = ...,
    metric: str = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[FilteredOptions],
) -> Tensor: ...


@overload
def clip(
    image: Tensor,
    text: Tensor,
    *,
    smooth: str = ...,
    hardness: float = ...,
    metric: str = ...,
    diagnostics: Literal[True],
    **options: Unpack[FilteredOptions],
) -> tuple[Tensor, tuple[Diagnostics, Diagnostics]]: ...


@over_ranks(losses.clip, without=("text_negatives", "image_negatives"))
def clip(image: Tensor, text: Tensor, **options: Any) -> Any:
    """`losses.clip` of the images and texts of all ranks, of which each has its own.

    Equivalent to::

        images, texts = all_gather(image), all_gather(text)      # with gradients
        losses.clip(images, texts, ...)                          # the mean over ranks of what is returned

    Args:
        image: (N, D) this rank's images, any number of them; D and dtype are those of all ranks. A DTensor that is
            Shard(0) names its mesh.
        text: (N, D); row i belongs to row i of ``image``.
        options: as in `losses.clip`, the same on all ranks; what belongs to rows and columns is that of this rank's.
            ``pairs`` are rules for this rank's rows; ids, bounds and guides of columns are those of this rank's,
            ``exclude`` and ``diagonal`` count the columns of all ranks, one rank after another. ``reduction`` is over
            all ranks, or "none": the losses of this rank's rows. ``memory_budget`` is that of each rank, of "ring" for
            each block. The ranks in ``diagnostics`` are those of this rank's rows, its means those of all.
            ``metric``: "dot" or "sqeuclidean", of rows as they are: those far from the origin lose digits.
            ``group``: a ProcessGroup, a DeviceMesh of one dimension, or None for all processes; where torch.distributed
            is not initialised, or of one process, this is `losses.clip`.
            ``schedule``: "gather", "ring", or "auto": "ring" from 4 GiB of gathered columns and their gradient on.
            ``average``: return (number of ranks) / (rows of all) times the sum of this rank's losses, so that the mean
            of gradients, as DDP and FSDP take it, is the gradient of the loss of all. False: without the number of
            ranks, where gradients are summed.
            ``check``: compare shapes, dtypes and options of all ranks first: one small collective, which is waited for.
            False: all ranks have the same number of rows.

    Returns:
        As `losses.clip`: 0-d, or this rank's rows for ``reduction="none"``; with ``diagnostics`` a pair.

    Raises:
        ValueError, TypeError, NotImplementedError: as `losses.clip`; what one rank raises, or has else than the
            others, is raised on every rank.
        RuntimeError: a rank has ended, or does not take part before the group's timeout.

    Note:
        Each similarity is computed on one rank for both directions: 8 N_local N_all D operations, 6 if kept. Memory of
        "gather" is O(N_all D), of "ring" O(N_local D). Every rank must run backward.
    """
    return loss_over_ranks(losses.clip, _prepared, (image, text), options)


def _prepared(image: Tensor, text: Tensor, *, metric: str, **options: Any) -> Prepared:
    # Rows less one that is common to all ranks would take a collective.
    return by_metric(prepared_clip(image, text, **options), metric, shifted=False)
