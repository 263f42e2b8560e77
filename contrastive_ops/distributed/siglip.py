"""SigLIP's loss over the images and texts of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from .. import losses
from ..losses.diagnostics import Diagnostics
from ..losses.siglip import prepared_siglip
from ._losses import BiasedOptions, loss_over_ranks, over_ranks

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


@overload
def siglip(
    image: Tensor,
    text: Tensor,
    *,
    bias: float | Tensor = ...,
    diagnostics: Literal[False] = ...,
    **options: Unpack[BiasedOptions],
) -> Tensor: ...


@overload
def siglip(
    image: Tensor,
    text: Tensor,
    *,
    bias: float | Tensor = ...,
    diagnostics: Literal[True],
    **options: Unpack[BiasedOptions],
) -> tuple[Tensor, tuple[Diagnostics, Diagnostics]]: ...


@over_ranks(losses.siglip)
def siglip(image: Tensor, text: Tensor, **options: Any) -> Any:
    """`losses.siglip` of the images and texts of all ranks, of which each has its own.

    Equivalent to::

        images, texts = all_gather(image), all_gather(text)      # with gradients
        losses.siglip(images, texts, ...)                        # the mean over ranks of what is returned

    Args:
        image: (N, D) this rank's images; see `clip` for what all ranks share.
        text: (N, D); row i belongs to row i of ``image``.
        options: as in `losses.siglip`, and group, schedule, average and check; see `clip`.

    Returns:
        As `losses.siglip`: 0-d, or this rank's rows for ``reduction="none"``; with ``diagnostics`` a pair.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as `clip`.

    Note:
        6 N_local N_all D operations for "gather", which forms gradients in the forward pass, 8 for "ring".
    """
    return loss_over_ranks(losses.siglip, prepared_siglip, (image, text), options)
